"""How tensors lie in memory, for the rooms of kernels and for ops alike."""

import math
from collections.abc import Sequence

from torch import Tensor


def dense(*shape: int) -> tuple[tuple, tuple]:
    """A shape and the strides of a contiguous tensor of it."""
    return shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def side_by_side(tensors: Sequence[Tensor], dim: int) -> tuple[tuple, tuple] | None:
    """Shape and strides of the contiguous tensor that ``tensors`` would be slices of, one after the other along ``dim``; None
    where they lie in another way. That they are parts of one allocation is the caller's to know."""
    first = tensors[0]
    whole = list(first.shape)
    whole[dim] = sum(t.shape[dim] for t in tensors)
    shape, strides = dense(*whole)
    at = first.data_ptr()
    for t in tensors:
        whole[dim] = t.shape[dim]
        if t.data_ptr() != at or t.stride() != strides or list(t.shape) != whole or t.dtype != first.dtype:
            return None
        at += t.shape[dim] * strides[dim] * t.element_size()
    return shape, strides
