"""Triton's interpreter without what it works out again for every value: a third of its time goes into their types.

``install`` is called once, before tests run. What is kept are shapes and names, never a value.
"""

import functools
import inspect
import math

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

_broadcast = type(interpreter.interpreter_semantic).broadcast_impl_value
_block_type = core.block_type.__init__
_np_dtype = functools.cache(interpreter._get_np_dtype)
_ADDRESS = interpreter._get_np_dtype(tl.pointer_type(tl.int8))


def install() -> None:
    core.block_type.__init__ = _block_type_once
    core.tensor.__init__ = _tensor_once
    interpreter._get_np_dtype = _np_dtype_of_scalar
    interpreter._patch_builtin = _patch_builtin
    type(interpreter.interpreter_semantic).broadcast_impl_value = _broadcast_unlike


@functools.cache
def _of_block(sizes: tuple) -> tuple:
    """(shape, number of elements, text of the shape), as a block type has them."""
    made = object.__new__(core.block_type)
    _block_type(made, tl.int1, list(sizes))
    return made.shape, made.numel, str(made.shape)


def _block_type_once(self, element_ty, shape):
    sizes = tuple([one.value if type(one) is core.constexpr else one for one in shape])
    self.shape, self.numel, text = _of_block(sizes)
    self.element_ty, self.name = element_ty, f"<{text}, {element_ty}>"


@functools.cache
def _of_tensor(sizes: tuple) -> tuple:
    return core.tuple([core.constexpr(one) for one in sizes]), core.constexpr(math.prod(sizes))


def _tensor_once(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _of_tensor(tuple(type.shape.values) if type.is_block() else ())


def _np_dtype_of_scalar(kind):
    """Of a block's elements, of which there are few kinds: Triton makes a table of all for every call."""
    scalar = kind.scalar
    return _ADDRESS if scalar.is_ptr() else _np_dtype(scalar)


def _broadcast_unlike(self, a, b):
    """Values of one shape, which is one object here, and two scalars stay as they are."""
    if a.type.is_block() == b.type.is_block() and (not a.type.is_block() or a.type.shape is b.type.shape):
        return a, b
    return _broadcast(self, a, b)


@functools.cache
def _builtins(package) -> list:
    return [(name, one) for name, one in inspect.getmembers(package) if core.is_builtin(one)]


def _patch_builtin(package, builder, scope):
    for name, member in _builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)
