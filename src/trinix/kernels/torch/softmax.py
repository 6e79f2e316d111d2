"""softmax and log_softmax in plain PyTorch: any device, any floating dtype, differentiable to any order by autograd."""

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def unsupported(x: torch.Tensor, mask: torch.Tensor | None, dim: int, scale: float) -> str | None:
    return None


def forward(x: Tensor, mask: Tensor | None, dim: int, scale: float, log: bool) -> Tensor:
    z = x
    if scale != 1.0 or mask is not None:
        # scale * x + mask is never rounded to a half type on its way into the exponential
        z = x.float() if x.dtype in _HALF else x
        z = z * scale if scale != 1.0 else z
        z = z + mask if mask is not None else z
    y = torch.log_softmax(z, dim) if log else torch.softmax(z, dim)
    return y.to(x.dtype)  # autocast would answer in float32; the op's contract is x.dtype


def backward(y: Tensor, dy: Tensor, dim: int, scale: float, log: bool) -> Tensor:
    """dx from y, in PyTorch's operations: where y carries a graph, it can be differentiated again."""
    dtype = y.dtype
    if dtype in _HALF:
        y, dy = y.float(), dy.float()
    if log:
        dx = dy - torch.exp(y) * dy.sum(dim, keepdim=True)
    else:
        dx = y * (dy - (y * dy).sum(dim, keepdim=True))
    return (dx * scale).to(dtype)
