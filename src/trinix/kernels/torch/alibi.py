"""ALiBi's bias in plain PyTorch: any device, any floating dtype, differentiable in the slopes by autograd."""

import torch
from torch import Tensor


def unsupported(*arguments) -> str | None:
    return None


def forward(slopes: Tensor, seq_q: int, seq_k: int, causal: bool, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(slopes.dtype, torch.promote_types(dtype, torch.float32))
    key = torch.arange(seq_k, device=slopes.device)
    distance = key - torch.arange(seq_k - seq_q, seq_k, device=slopes.device)[:, None]
    bias = (slopes.to(wide)[:, None, None] * -distance.abs()).to(dtype)
    return bias.masked_fill(distance > 0, float("-inf")) if causal else bias
