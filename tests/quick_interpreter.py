"""Triton's interpreter without what it works out again for every value: a third of its time goes into their types.

``install`` is called once, before tests run; another Triton than the one it was written for runs as it is. What is kept are shapes
and names, never a value.
"""

import functools
import inspect
import math

import numpy as np
import triton
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

KNOWN = triton.__version__.startswith("3.7.")

_Semantic = type(interpreter.interpreter_semantic)
_broadcast, _operands = _Semantic.broadcast_impl_value, _Semantic.binary_op_type_checking_impl
_block_type = core.block_type.__init__
_np_dtype = functools.cache(interpreter._get_np_dtype)
_ADDRESS = interpreter._get_np_dtype(tl.pointer_type(tl.int8))


def install() -> None:
    if not KNOWN:
        return
    core.block_type.__init__ = _block_type_once
    core.tensor.__init__ = _tensor_once
    interpreter._get_np_dtype = _np_dtype_of_scalar
    interpreter._patch_builtin = _patch_builtin
    _Semantic.broadcast_impl_value = _broadcast_unlike
    _Semantic.binary_op_type_checking_impl = _operands_unlike


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
    blocks = a.type.is_block(), b.type.is_block()
    if blocks == (False, False) or (blocks == (True, True) and a.type.shape is b.type.shape):
        return a, b
    if blocks == (True, True):
        return _broadcast(self, a, b)
    return (a, _spread(b, a)) if blocks[0] else (_spread(a, b), b)


def _spread(scalar, like):
    """A scalar as often as a block has numbers; Triton's casts may leave another kind of integers below its type."""
    kind, held = scalar.dtype, scalar.handle.dtype.scalar
    block = like.type if kind is like.dtype else like.type.with_element_ty(kind)
    return core.tensor(_filled(scalar.handle.data, held, like), block)


def _filled(value, kind, like):
    return interpreter.TensorHandle(np.full(like.handle.data.shape, value, _np_dtype_of_scalar(kind)), kind)


# what an operation with another of the kind, or with a number that fits, stays in; halves do not in a division
_FLOATS, _INTEGERS = (tl.float32, tl.float64), {tl.int32: 2**31, tl.int64: 2**63}
_IDS = frozenset(map(id, (*_FLOATS, *_INTEGERS)))


def _operands_unlike(
    self, a, b, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False
):  # fmt: skip
    """Most operands are of one kind, or the second is a number: nothing is to be found out about their types."""
    if type(a) is core.tensor:
        kind = a.dtype
        if type(b) is core.tensor:
            if kind is b.dtype and id(kind) in _IDS:
                return _broadcast_unlike(self, a, b)
            if allow_lhs_ptr and kind.is_ptr() and id(b.dtype) in _IDS and b.dtype in _INTEGERS:
                return _broadcast_unlike(self, a, b)
        elif id(kind) in _IDS and arithmetic_check and (
            (type(b) is int and -_INTEGERS.get(kind, math.inf) <= b < _INTEGERS.get(kind, math.inf))
            or (type(b) is float and kind in _FLOATS)
        ):  # fmt: skip
            return a, core.tensor(_filled(b or 0, kind, a), a.type)  # a constant of -0.0 is 0.0 in Triton
    return _operands(self, a, b, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)


@functools.cache
def _builtins(package) -> list:
    return [(name, _of_interpreter(one)) for name, one in inspect.getmembers(package) if core.is_builtin(one)]


def _of_interpreter(member):
    def call(*arguments, **named):
        named["_semantic"] = interpreter.interpreter_semantic
        return member(*arguments, **named)

    return call


def _patch_builtin(package, builder, scope):
    for name, member in _builtins(package):
        scope.set_attr(package, name, member)
