"""Corrections to Triton's interpreter (3.6 to 3.7, at least), installed only when it is on.

float32 -> bfloat16 rounds to nearest even: the interpreter cuts the low bits off, an error of a whole unit in the last place
that no GPU makes; tests against float64 would blame the kernels for it. A dot of bfloat16 multiplies their values: the
interpreter multiplies their bits.
"""

import numpy as np
import torch
import triton.language as tl
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


def _widening_dot(self, a, b, *rest):
    return _dot(self, _widened(a), _widened(b), *rest)


InterpreterBuilder.create_dot = _widening_dot
