"""Corrections to Triton's interpreter (3.6 to 3.9), installed only when it is on.

float32 -> bfloat16 rounds to nearest even: the interpreter cuts the low bits off, an error of a whole unit in the last place
that no GPU makes; tests against float64 would blame the kernels for it. A dot of bfloat16 multiplies their values: the
interpreter multiplies their bits. A scalar that is annotated "i32" or "i64" has that type: the interpreter goes by its value. A mask may be
of integers (3.9 makes such ones where a loop's index is compared, and then refuses them).

A dot's terms are added in float64, and the float32 sum is rounded once. NumPy adds them in its BLAS's order: not the kernel's,
and another on every kind of processor. A budget is twice PyTorch's error, so for tensors of a few numbers that order decided
whether a right kernel passed.

Two of the interpreter's costs are saved, together two thirds of its time: it patches all of ``triton.language`` again for every
call of a device function, and works out for every integer operation an overflow that it then tells nobody.
"""

import dataclasses
import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl


def _rounding_cast(self, src, dst_type):
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy().reshape(np.shape(src.data)), dst_type.scalar)
    return _cast(self, src, dst_type)


InterpreterBuilder.cast_impl = _rounding_cast


_dot = InterpreterBuilder.create_dot


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounding_dot(self, a, b, start, *rest):
    a, b = _widened(a), _widened(b)
    if start.data.dtype != np.float32 or 8 in (a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth):
        return _dot(self, a, b, start, *rest)
    total = np.matmul(a.data, b.data, dtype=np.float64) + start.data
    return TensorHandle(total.astype(np.float32), start.dtype.scalar)


InterpreterBuilder.create_dot = _rounding_dot


_load, _store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store


def _boolean(mask):
    if isinstance(mask, np.ndarray) or mask.data.dtype == np.bool_:  # an array: of a descriptor's tile
        return mask
    return TensorHandle(mask.data.astype(np.bool_), tl.int1)


def _masked_load(self, at, mask, *rest, **named):
    return _load(self, at, _boolean(mask), *rest, **named)


def _masked_store(self, at, value, mask, *rest, **named):
    return _store(self, at, value, _boolean(mask), *rest, **named)


InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = _masked_load, _masked_store


_arguments = interpreter.GridExecutor._init_args_hst
_INTEGERS = {"i32": (np.int32, tl.int32), "i64": (np.int64, tl.int64)}


def _typed_arguments(self, given, named):
    given, named = _arguments(self, given, named)
    kinds = {name: str(kind).strip("'\"") for name, kind in self.fn.__annotations__.items()}
    given = [_typed(value, kinds.get(name)) for name, value in zip(self.fn.__code__.co_varnames, given, strict=False)]
    return given, {name: _typed(value, kinds.get(name)) for name, value in named.items()}


def _typed(value, kind):
    if type(value) is not int or kind not in _INTEGERS:
        return value
    bits, kind = _INTEGERS[kind]
    return tl.tensor(TensorHandle(np.array([value], bits), kind), kind)


interpreter.GridExecutor._init_args_hst = _typed_arguments


_patch, _patched = interpreter._patch_lang, set()


@functools.cache
def _languages(function) -> frozenset:
    seen = function.__globals__.values()
    return frozenset(module for module in (tl, tl.core) if any(one is module for one in seen))


def _patch_once(function):
    """What a kernel's launch has patched stays so until it ends, for the device functions that it calls too."""
    if (languages := _languages(function)) and languages <= _patched:
        return interpreter._LangPatchScope()
    scope = _patch(function)
    restore = scope.restore

    def restored():
        _patched.clear()
        restore()

    scope.restore = restored
    _patched.update(languages)
    return scope


interpreter._patch_lang = _patch_once
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
