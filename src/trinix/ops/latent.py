"""k and v of every head of a latent attention: what ``FastMultiHeadLatentAttention`` calls.

    both    [B, S, H, N + V]   keys and values, one product's output
    k_rope  [B, S, 1, R]       the rotated channels, the same for all heads
    k       [B, S, H, R + N]   (k_rope, both[..., :N])
    v       [B, S, H, V]       both[..., N:], a view

Nothing is saved for backward. Not one of the public ops: one kernel a pass moves what PyTorch's cat and split move in two and three.
DeepSeek-V2: https://arxiv.org/abs/2405.04434.
"""

import functools

import torch
from torch import Tensor

from trinix import dispatch


def _load():
    from trinix.kernels.triton import latent

    return latent


@functools.cache
def _kernels():
    return None if dispatch.missing(_load) else _load()


def keys_and_values(both: Tensor, k_rope: Tensor, n: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """See the top of this file; ``n`` is N. With ``backend="torch"`` PyTorch's operations, else the kernel on a GPU where
    it can; ``"triton"`` runs it in Triton's interpreter too."""
    if torch.compiler.is_compiling() or not _fused(both, k_rope, n, dispatch.resolve(backend)):
        k, v = both.split((n, both.shape[-1] - n), -1)
        return torch.cat((k_rope.expand(-1, -1, both.shape[2], -1), k), -1), v
    if torch.is_grad_enabled() and (both.requires_grad or k_rope.requires_grad):
        return _KeysAndValues.apply(both, k_rope, n)
    return _kernels().forward(both, k_rope, n), both[..., n:]


def _fused(both: Tensor, k_rope: Tensor, n: int, backend: str) -> bool:
    """Whether the kernel runs this call."""
    return (
        (backend == "triton" or (both.is_cuda and backend != "torch"))
        and dispatch.plain(both, k_rope)
        and _kernels() is not None
        and _kernels().unsupported(both, k_rope, n) is None
    )


class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, both, k_rope, n):
        ctx.r = k_rope.shape[-1]
        return _kernels().forward(both, k_rope, n), both[..., n:]

    @staticmethod
    def backward(ctx, dk, dv):
        r = ctx.r
        if not dispatch.pulled_back_plainly(dk, dv):
            return torch.cat((dk[..., r:], dv), -1), dk[..., :r].sum(2, keepdim=True), None
        return *_kernels().backward(dk, dv, r), None
