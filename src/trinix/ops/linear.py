"""y = x W^T + b as ``torch.nn.functional.linear`` has it, with a kernel of its own for a single row of x: what ``FastLinear`` calls.

Not one of the public ops: it has one kernel, for the decoding of one sequence, and everything else is PyTorch's product.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from trinix import dispatch


def _load():
    from trinix.kernels.triton import linear

    return linear


@functools.cache
def _kernels():
    return None if dispatch.missing(_load) else _load()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x ``[..., K]``, weight ``[N, K]`` and bias ``[N]`` to ``[..., N]``; all errors are those of ``F.linear``."""
    if not torch.compiler.is_compiling() and x.numel() == weight.shape[-1] and _one_row(x, weight, bias):
        return _kernels().forward(x, weight, bias)
    return F.linear(x, weight, bias)


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel runs this call."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        dispatch.plain(*tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and dispatch.resolve("auto") in ("auto", "triton")
        and _kernels() is not None
        and _kernels().unsupported(*tensors) is None
        and not torch.is_autocast_enabled(x.device.type)  # last: it knows no meta device
    )
