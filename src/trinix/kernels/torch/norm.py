"""LayerNorm and RMSNorm in plain PyTorch: any device, any floating dtype, differentiable to any order by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trinix.kernels.torch import activation


def unsupported(x: Tensor, *others: Tensor | None) -> str | None:
    return None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    eps: float,
    offset: float,
    center: bool,
    kind: str | None = None,
) -> Tensor:
    same = all(t is None or t.dtype == x.dtype for t in (weight, bias))
    if same and not offset and not kind:
        y = F.layer_norm(x, shape, weight, bias, eps) if center else F.rms_norm(x, shape, weight, eps)
        return y.to(x.dtype)  # autocast answers in float32; the op's contract is x.dtype
    # several roundings would be PyTorch's, not the formula's: do it in the widest dtype here and round once
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = None if weight is None else weight.to(wide) + offset
    if center:
        y = F.layer_norm(x.to(wide), shape, weight, None if bias is None else bias.to(wide), eps)
    else:
        y = F.rms_norm(x.to(wide), shape, weight, eps)
    if kind:
        y = activation.forward(y, kind, 0.0, 0.0)
    return y.to(x.dtype)


def forward_residual(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    eps: float,
    offset: float,
    center: bool,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    h = F.dropout(x, p) + residual if p else x + residual
    return forward(h, weight, bias, shape, eps, offset, center), h
