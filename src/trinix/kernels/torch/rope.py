"""Rotary position embedding in plain PyTorch: any device, any floating dtype, differentiable to any order by autograd.

Arithmetic is float32 for half types, as in the kernels. ``places`` and ``mode`` say where a token's position comes from,
as in ``trinix.ops.rope``.
"""

import math

import torch
from torch import Tensor


def unsupported(*tensors: Tensor | None) -> str | None:
    return None


def positions(shape: tuple, places: Tensor, mode: str, first: int) -> Tensor:
    """Every token's position for a tensor ``shape = [(B,) S, H, D]``: ``[(B|1,) S]``."""
    if mode == "ids":
        return places
    token = torch.arange(shape[-3], device=places.device)
    if mode == "offsets":
        return places[:, None] + token
    starts = places.long()
    return token - starts[torch.searchsorted(starts, token, right=True) - 1] + first


def gather(
    cos: Tensor, sin: Tensor, shape: tuple, places: Tensor | None, mode: str, first: int, half: int
) -> tuple[Tensor, Tensor]:
    """cos and sin of every token, ``[(B,) S, 1, half]``, for a tensor ``shape = [(B,) S, H, D]``; NaN outside the table."""
    cos, sin, length = cos[:, :half], sin[:, :half], shape[-3]
    if mode == "offset":
        rows = slice(first, first + length)
        return cos[rows, None], sin[rows, None]
    at = positions(shape, places, mode, first)
    leading = shape[:-2] if mode == "offsets" else at.shape
    # no index outside ever reaches PyTorch: on a GPU that would end the process
    at = at.flatten()
    row = at.clamp(0, cos.shape[0] - 1)
    outside = (at != row)[:, None]
    return tuple(t.index_select(0, row).masked_fill(outside, float("nan")).view(*leading, 1, half) for t in (cos, sin))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool = False) -> Tensor:
    """x with its first channels rotated by the gathered cos and sin, or by the opposite angle."""
    half = cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    if inverse:
        sin = -sin
    whole = 2 * half == x.shape[-1]  # no slice then: is_grads_batched cannot take a slice of everything
    turned = (x if whole else x[..., : 2 * half]).to(wide)
    a, b = turned.reshape(*turned.shape[:-1], half, 2).unbind(-1) if interleaved else turned.chunk(2, -1)
    pair = a * cos - b * sin, b * cos + a * sin
    parts = (torch.stack(pair, -1).reshape(turned.shape),) if interleaved else pair
    # joined wide: autocast refuses to join half types that are not its own
    parts = parts if whole else (*parts, x[..., 2 * half :].to(wide))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(x.dtype)


def normed(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + weight_offset), in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale * (weight.to(x.dtype) + weight_offset)


def inverse_frequencies(
    rotary_dim: int, base: float, scaling: dict | None, device: torch.device | str | None
) -> tuple[Tensor, float]:
    """(angle that one position turns every pair by, float64; the factor on cos and sin)."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
    kind = (scaling or {}).get("type", "default")
    if kind == "ntk":
        # the slowest pair turns slower by the factor, the fastest as before
        base = base * scaling["factor"] ** (rotary_dim / max(rotary_dim - 2, 1))
    frequency = base**-exponent
    if kind == "linear":
        return frequency / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(frequency, scaling), 1.0
    if kind == "yarn":
        return _yarn(frequency, rotary_dim, base, scaling)
    return frequency, 1.0


def _llama3(frequency: Tensor, scaling: dict) -> Tensor:
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # over the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / scaling["factor"])


def _yarn(frequency: Tensor, rotary_dim: int, base: float, scaling: dict) -> tuple[Tensor, float]:
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]

    def pair_of(turns: float) -> float:
        """The pair, as a real number, that makes so many turns over the original context."""
        return rotary_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_of(scaling.get("beta_fast", 32.0)), pair_of(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    pair = torch.arange(rotary_dim // 2, dtype=torch.float64, device=frequency.device)
    stretched = ((pair - first) / max(last - first, 1e-3)).clamp(0, 1)
    attention = scaling.get("attention_factor")
    if attention is None:
        over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if over and under:
            attention = _yarn_attention(factor, over) / _yarn_attention(factor, under)
        else:
            attention = _yarn_attention(factor, 1.0)
    return frequency * (1 - stretched + stretched / factor), attention


def _yarn_attention(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
