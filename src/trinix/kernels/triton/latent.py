"""Keys of every head of a latent attention: R rotated channels that all heads share, in front of N of a head's own.

``both`` [T, H, N + V] is a product's output, keys and values side by side; ``rope`` [T, R]. k [T, H, R + N] = (rope, both[..., :N]).
Backward writes both's gradient, (dk[..., R:], dv), and rope's, the sum of dk[..., :R] over the heads in their order.

Floor: forward reads N and writes R + N channels of every token and head; backward reads R + N + V and writes N + V.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trinix.kernels.triton._compile import POINTERS, compile_case
from trinix.kernels.triton._launch import INTERPRETED, Launch, Launcher

LANES = 64 if torch.version.hip else 32  # threads of a warp
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UNIT = 8  # strides are counted in as many elements, so that the compiler knows how they are aligned


@triton.jit(do_not_specialize=["heads", "blocks"])
def _forward(
    both, rope, k, heads: "i32", blocks: "i32", N: tl.constexpr, V: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr,
    OWN: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) // blocks).to(tl.int64)
    h = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)
    row = (token * heads + h)[:, None]
    live = (h < heads)[:, None]
    own = tl.arange(0, OWN)[None, :]
    shared = tl.arange(0, SHARED)[None, :]
    x = tl.load(both + (row * (N + V) + own), mask=live & (own < N))
    turned = tl.load(rope + (token * R + shared), mask=shared < R)
    to = k + row * (R + N)
    tl.store(to + shared, tl.broadcast_to(turned, (HEADS, SHARED)), mask=live & (shared < R))
    tl.store(to + (R + own), x, mask=live & (own < N))


@triton.jit(do_not_specialize=["heads", "seq", "kb", "ks", "kh", "vb", "vs", "vh"])
def _backward(
    dk, dv, d_both, d_rope, heads: "i32", seq: "i32", kb: "i64", ks: "i64", kh: "i64", vb: "i64", vs: "i64", vh: "i64",
    N: tl.constexpr, V: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr, HEADS: tl.constexpr, OWN: tl.constexpr,
    VALUES: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b = token // seq
    s = token % seq
    own = tl.arange(0, OWN)[None, :]
    value = tl.arange(0, VALUES)[None, :]
    shared = tl.arange(0, SHARED)[None, :]
    dk += (b * kb + s * ks) * UNIT
    dv += (b * vb + s * vs) * UNIT
    PRECISION: tl.constexpr = tl.float64 if dk.dtype.element_ty == tl.float32 else tl.float32
    total = tl.zeros((HEADS, SHARED), PRECISION)
    for start in tl.range(0, heads, HEADS):
        h = (start + tl.arange(0, HEADS))[:, None]
        live = h < heads
        from_k = dk + h.to(tl.int64) * (kh * UNIT)
        turned = tl.load(from_k + shared, mask=live & (shared < R), other=0.0)
        x = tl.load(from_k + (R + own), mask=live & (own < N))
        y = tl.load(dv + (h.to(tl.int64) * (vh * UNIT) + value), mask=live & (value < V))
        total += turned.to(PRECISION)
        to = d_both + (token * heads + h) * (N + V)
        tl.store(to + own, x, mask=live & (own < N))
        tl.store(to + (N + value), y, mask=live & (value < V))
    tl.store(d_rope + (token * R + tl.arange(0, SHARED)), tl.sum(total, 0).to(d_rope.dtype.element_ty),
             mask=tl.arange(0, SHARED) < R)  # fmt: skip


_FORWARD = Launcher(_forward, tensors=3)
_BACKWARD = Launcher(_backward, tensors=4)


class Config(NamedTuple):
    heads: int
    num_warps: int


def choose_config(channels: int, heads: int, itemsize: int, lanes: int = LANES) -> Config:
    """About 4 accesses of 16 bytes a thread of 4 warps, for the widest part of a row. (With 8, in 72 registers, A-deepseek-v3 took
    118 us forward and 212 backward; at a copy's rate its bytes take 111 and 200.)"""
    return Config(min(_power_of_two(heads), max(1, 4 * 4 * lanes * 16 // itemsize // _power_of_two(channels))), 4)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def forward_launch(n: int, v: int, r: int, config: Config) -> Launch:
    return _FORWARD.bind(
        N=n, V=v, R=r, HEADS=config.heads, OWN=_power_of_two(n), SHARED=_power_of_two(r), num_warps=config.num_warps
    )


@functools.cache
def backward_launch(n: int, v: int, r: int, config: Config) -> Launch:
    return _BACKWARD.bind(
        N=n, V=v, R=r, UNIT=UNIT, HEADS=config.heads, OWN=_power_of_two(n), VALUES=_power_of_two(v),
        SHARED=_power_of_two(r), num_warps=config.num_warps,
    )  # fmt: skip


def unsupported(both: torch.Tensor, rope: torch.Tensor, n: int) -> str | None:
    """Why this kernel does not make the keys of these tensors, or None."""
    if not (both.is_cuda or (INTERPRETED and both.device.type == "cpu")) or rope.device != both.device:
        return f"needs tensors on one GPU, got {both.device} and {rope.device}"
    if both.dtype not in DTYPES or rope.dtype != both.dtype:
        return f"takes tensors of one dtype, float16, bfloat16 or float32, got {both.dtype} and {rope.dtype}"
    if both.dim() != 4 or rope.shape != (*both.shape[:2], 1, rope.shape[-1]) or not both.numel() or not rope.numel():
        return f"takes [B, S, H, N + V] and [B, S, 1, R], got {list(both.shape)} and {list(rope.shape)}"
    if (
        not both.is_contiguous()
        or n % UNIT
        or both.shape[-1] % UNIT
        or rope.shape[-1] % UNIT
        or not 0 < n < both.shape[-1]
    ):
        return f"needs a dense tensor and channels in multiples of {UNIT}"
    return None


def forward(both: torch.Tensor, rope: torch.Tensor, n: int) -> torch.Tensor:
    """k ``[B, S, H, R + N]``."""
    batch, seq, heads, channels = both.shape
    r = rope.shape[-1]
    k = both.new_empty(batch, seq, heads, r + n)
    config = choose_config(n, heads, both.element_size())
    blocks = -(-heads // config.heads)
    launch = forward_launch(n, channels - n, r, config)
    launch(batch * seq * blocks, (both, rope.contiguous(), k), (heads, blocks))
    return k


def backward(dk: torch.Tensor, dv: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of both ``[B, S, H, N + V]``, of rope ``[B, S, 1, R]``)."""
    dk, dv = _aligned(dk), _aligned(dv)
    batch, seq, heads, width = dk.shape
    n, v = width - r, dv.shape[-1]
    d_both, d_rope = dk.new_empty(batch, seq, heads, n + v), dk.new_empty(batch, seq, 1, r)
    config = choose_config(n + v, heads, dk.element_size())
    strides = [s // UNIT for t in (dk, dv) for s in t.stride()[:3]]
    backward_launch(n, v, r, config)(batch * seq, (dk, dv, d_both, d_rope), (heads, seq, *strides))
    return d_both, d_rope


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy where a row does not begin at a multiple of UNIT."""
    return t if t.stride(-1) == 1 and not any(s % UNIT for s in t.stride()[:-1]) else t.contiguous()


def compile_cases(lanes: int = LANES):
    for dtype in DTYPES:
        suffix, size = str(dtype).removeprefix("torch."), dtype.itemsize
        t = POINTERS[suffix]
        launch = forward_launch(128, 128, 64, choose_config(128, 128, size, lanes))
        yield compile_case(f"latent_keys/fwd/{suffix}", launch, 2.5 * size, (t,) * 3)
        launch = backward_launch(128, 128, 64, choose_config(256, 128, size, lanes))
        yield compile_case(f"latent_keys/bwd/{suffix}", launch, 2.25 * size, (t,) * 4)
