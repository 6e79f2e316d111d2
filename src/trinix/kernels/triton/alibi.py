"""ALiBi's bias written by one kernel that reads nothing but the slopes.

The output is [H Sq, Sk] rows; a program writes a tile of them. Floor: one write of the output.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trinix.kernels.triton._compile import POINTERS, compile_case
from trinix.kernels.triton._launch import INTERPRETED, Launch, Launcher


@triton.jit(do_not_specialize=["slope_step", "rows", "seq_q", "seq_k"])
def _bias(
    slopes, y, slope_step: "i64", rows: "i32", seq_q: "i32", seq_k: "i32",
    CAUSAL: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    keys = seq_k // VEC * VEC  # the compiler sees that rows start at 16-byte boundaries and end there
    tiles = tl.cdiv(seq_k, COLS)
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (tl.program_id(0) % tiles) * COLS + tl.arange(0, COLS)[None, :]
    slope = tl.load(slopes + row // seq_q * slope_step, mask=row < rows, other=0.0).to(tl.float32)
    distance = col - (row % seq_q + (seq_k - seq_q))
    v = slope * (-tl.abs(distance)).to(tl.float32)
    if CAUSAL:
        v = tl.where(distance > 0, float("-inf"), v)
    tl.store(y + row.to(tl.int64) * keys + col, v.to(y.dtype.element_ty), mask=(row < rows) & (col < keys))


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LANES = 64 if torch.version.hip else 32  # threads of a warp

_BIAS = Launcher(_bias, tensors=2)


class Config(NamedTuple):
    rows: int
    cols: int
    num_warps: int


def choose_tile(rows: int, cols: int, itemsize: int, lanes: int) -> Config:
    """About four 16-byte stores a thread of 4 warps, in whole rows up to 2048 columns."""
    size = 4 * 4 * lanes * 16 // itemsize
    width = min(2048, size, _power_of_two(cols))
    return Config(min(max(1, size // width), _power_of_two(rows)), width, 4)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def unsupported(slopes: torch.Tensor, dtype: torch.dtype) -> str | None:
    if not (slopes.is_cuda or (INTERPRETED and slopes.device.type == "cpu")):
        return f"needs slopes on a GPU, got {slopes.device.type}"
    for name, given in (("slopes of", slopes.dtype), ("dtype", dtype)):
        if given not in DTYPES:
            return f"needs {name} float16, bfloat16 or float32, got {str(given).removeprefix('torch.')}"
    return None


@functools.cache
def _bound(tile: Config, causal: bool, vec: int) -> Launch:
    return _BIAS.bind(CAUSAL=causal, VEC=vec, ROWS=tile.rows, COLS=tile.cols, num_warps=tile.num_warps)


def _plan(rows: int, seq_k: int, causal: bool, itemsize: int, lanes: int) -> tuple[Config, Launch]:
    tile = choose_tile(rows, seq_k, itemsize, lanes)
    return tile, _bound(tile, causal, 1 if seq_k * itemsize % 16 else 16 // itemsize)


def forward(slopes: torch.Tensor, seq_q: int, seq_k: int, causal: bool, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty((slopes.shape[0], seq_q, seq_k), dtype=dtype, device=slopes.device)
    if y.numel():
        rows = slopes.shape[0] * seq_q
        tile, launch = _plan(rows, seq_k, causal, dtype.itemsize, LANES)
        blocks = -(-rows // tile.rows) * -(-seq_k // tile.cols)
        launch(blocks, (slopes, y), (slopes.stride(0), rows, seq_q, seq_k))
    return y


def describe(slopes: torch.Tensor, seq_q: int, seq_k: int, dtype: torch.dtype) -> str:
    """The configuration of a call, for ``trinix.explain``."""
    tile = choose_tile(slopes.shape[0] * seq_q, seq_k, dtype.itemsize, LANES)
    return f"tile {tile.rows} x {tile.cols}, {tile.num_warps} warps"


def compile_cases(lanes: int = LANES):
    """2048 and, with rows shorter than a tile, 200 keys."""
    for seq_k in (2048, 200):
        for causal in (False, True):
            for dtype in DTYPES:
                suffix = str(dtype).removeprefix("torch.")
                _, launch = _plan(32 * seq_k, seq_k, causal, dtype.itemsize, lanes)
                name = f"alibi/{'causal' if causal else 'full'}-{seq_k}/fwd/{suffix}"
                # 32 bits: the loads are of slopes; tests/ops/test_alibi.py looks at the stores
                yield compile_case(name, launch, dtype.itemsize, ("*fp32", POINTERS[suffix]), access_bits=32)
