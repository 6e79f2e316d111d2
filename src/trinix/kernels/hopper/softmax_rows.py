"""Softmax and log_softmax of long rows on Hopper (sm_90) in Gluon: a row in the registers of a cluster of programs.

A row of N contiguous elements is cut into equal pieces, one for each program of a cluster. A program reads its piece once, keeps
it in registers as it came, leaves its statistics in global memory, waits for the others of the cluster, and writes its part of
the result. So every element crosses DRAM once in each direction, where a row that no program can hold is read twice.

Floor: forward 2 * itemsize bytes an element, backward 3 * itemsize.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from trinix.kernels._binary import Binary, raw_stream
from trinix.kernels.hopper.row_vectors import load_all, store

# A tensor of the cluster is [CTAS, SPAN]: a line for each program, and in it a vector of 16 bytes for each thread. A piece is VECTORS of
# them, of which FULL lie within every piece. Lengths come in units of 16 bytes: a vector is in the row or not.


@gluon.jit
def _cluster_barrier():
    """What the cluster's programs stored before it, all of them see behind it."""
    gl.inline_asm_elementwise(
        "barrier.cluster.arrive.release; barrier.cluster.wait.acquire; mov.b32 $0, 0;", "=r,~{memory}", [],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _packed(x):
    """x itself, but the compiler takes it for another: what it made of x before is not kept in registers up to here."""
    if x.dtype.primitive_bitwidth == 16:
        x = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


@gluon.jit
def _places(row, n, piece, UNIT: gl.constexpr, CTAS: gl.constexpr, SPAN: gl.constexpr, LAYOUT: gl.constexpr):
    """Lines, where the row starts, places in the row, and where each line's piece ends."""
    line = gl.arange(0, CTAS, gl.SliceLayout(1, LAYOUT))
    at = (line * (piece * UNIT))[:, None] + gl.arange(0, SPAN, gl.SliceLayout(0, LAYOUT))[None, :]
    return line, row.to(gl.int64) * (n * UNIT), at, gl.minimum((line + 1) * (piece * UNIT), n * UNIT)[:, None]


@gluon.jit
def _finite(top):
    """The largest value as a shift of exponents: 0 where there is none, for -inf - -inf is NaN."""
    return gl.where(top == float("-inf"), 0.0, top)


@gluon.jit(do_not_specialize=["n", "piece"])
def _forward(
    x, y, partial, n: "i32", piece: "i32", scale: "fp32",
    LOG: gl.constexpr, UNIT: gl.constexpr, CTAS: gl.constexpr, SPAN: gl.constexpr, VECTORS: gl.constexpr,
    FULL: gl.constexpr, LAYOUT: gl.constexpr, ALL: gl.constexpr,
):  # fmt: skip
    row = gl.program_id(0)
    line, start, at, end = _places(row, n, piece, UNIT, CTAS, SPAN, LAYOUT)
    vectors = load_all(x + start, at, end, float("-inf"), VECTORS, FULL, SPAN)
    factor = scale * 1.4426950408889634
    tops = vectors[0].to(gl.float32)
    for u in gl.static_range(1, VECTORS):
        tops = gl.maximum(tops, vectors[u].to(gl.float32))
    top = gl.max(tops, 1)  # subtracted first: nothing overflows, and the largest value's exponent is 0
    least = _finite(top)[:, None]
    totals = gl.exp2((_packed(vectors[0]).to(gl.float32) - least) * factor)
    for u in gl.static_range(1, VECTORS):
        totals += gl.exp2((_packed(vectors[u]).to(gl.float32) - least) * factor)
    partial += row.to(gl.int64) * (2 * CTAS)
    gl.store(partial + line, top)
    gl.store(partial + CTAS + line, gl.sum(totals, 1))
    _cluster_barrier()
    every = gl.arange(0, CTAS, ALL)
    tops = gl.load(partial + every, cache_modifier=".cg")
    totals = gl.load(partial + CTAS + every, cache_modifier=".cg")
    most = gl.max(tops, 0)
    total = gl.sum(totals * gl.exp2((tops - _finite(most)) * factor), 0)
    logarithm = gl.log2(total)
    for u in gl.static_range(VECTORS):
        z = _packed(vectors[u]).to(gl.float32) - most  # all -inf: NaN, as in PyTorch
        if LOG:
            out = z * scale - logarithm * 0.6931471805599453
        elif y.dtype.element_ty == gl.float32:
            e = gl.exp2(z * factor)
            inverse = gl.full_like(e, 1.0 / total)
            out = e * inverse
            out = gl.fma(gl.fma(-out, gl.full_like(e, total), e), inverse, out)  # by what the product misses
        else:
            out = gl.exp2(z * factor - logarithm)
        store(y + start, u, at, end, out, FULL, SPAN)


@gluon.jit(do_not_specialize=["n", "piece"])
def _backward(
    y, dy, dx, partial, n: "i32", piece: "i32", scale: "fp32",
    LOG: gl.constexpr, UNIT: gl.constexpr, CTAS: gl.constexpr, SPAN: gl.constexpr, VECTORS: gl.constexpr,
    FULL: gl.constexpr, LAYOUT: gl.constexpr, ALL: gl.constexpr,
):  # fmt: skip
    row = gl.program_id(0)
    line, start, at, end = _places(row, n, piece, UNIT, CTAS, SPAN, LAYOUT)
    ys = load_all(y + start, at, end, 0.0, VECTORS, FULL, SPAN)
    gs = load_all(dy + start, at, end, 0.0, VECTORS, FULL, SPAN)
    totals = gs[0].to(gl.float32) if LOG else gs[0].to(gl.float32) * ys[0].to(gl.float32)
    for u in gl.static_range(1, VECTORS):
        totals += gs[u].to(gl.float32) if LOG else gs[u].to(gl.float32) * ys[u].to(gl.float32)
    partial += row.to(gl.int64) * CTAS
    gl.store(partial + line, gl.sum(totals, 1))
    _cluster_barrier()
    total = gl.sum(gl.load(partial + gl.arange(0, CTAS, ALL), cache_modifier=".cg"), 0)
    for u in gl.static_range(VECTORS):
        p, g = _packed(ys[u]).to(gl.float32), _packed(gs[u]).to(gl.float32)
        if LOG:
            g = scale * (g - gl.exp2(p * 1.4426950408889634) * total)
        else:
            g = scale * p * (g - total)
        store(dx + start, u, at, end, g, FULL, SPAN)


# ---- choice -------------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    ctas: int  # programs of a cluster
    num_warps: int


_PORTABLE = 8  # programs of a cluster that every Hopper card takes
_FORWARD = (Config(4, 4), Config(8, 4), Config(16, 4), Config(8, 8), Config(16, 8), Config(8, 16), Config(16, 16))
_BACKWARD = (Config(8, 4), Config(8, 8), Config(16, 8), Config(8, 16), Config(16, 16))


def choose_config(rows: int, n: int, itemsize: int, backward: bool, multiprocessors: int) -> Config | None:
    """The smallest cluster that holds a row, the largest where there are few rows. None: a row is too long."""
    vectors = 8 if backward else 16  # of each tensor, for a thread
    whole = multiprocessors >= 132
    for config in _BACKWARD if backward else _FORWARD:
        if config.ctas > _PORTABLE and not whole:
            continue
        if config.ctas < 16 and rows <= 16 and whole:
            continue
        if n * itemsize <= config.ctas * config.num_warps * 32 * 16 * vectors:
            return config
    return None


# By the readings in docs/perf/softmax.md, "Rows in clusters": forward from behind this row on, both passes from this on, and few rows
# from 32768 elements on.
_ROW_BYTES = 128 << 10
_FEW_ROWS, _FEW_ROWS_FROM = 64, 1 << 15
_SHORTEST = 64 << 10  # bytes; shorter rows are the portable kernels'
_MOST_PROGRAMS = 1 << 24  # 37.7 million of 8 a cluster ended in an illegal access, 18.9 million did not


def wins(rows: int, n: int, itemsize: int, grad: bool) -> bool:
    return n * itemsize > _ROW_BYTES - grad or (rows <= _FEW_ROWS and n >= _FEW_ROWS_FROM)


@functools.lru_cache(4096)
def unsupported(rows: int, n: int, itemsize: int, multiprocessors: int) -> str | None:
    if n * itemsize % 16:
        return "needs rows of a multiple of 16 bytes"
    if n * itemsize < _SHORTEST:
        return f"takes rows of {_SHORTEST} bytes and more, got {n * itemsize}"
    config = choose_config(rows, n, itemsize, True, multiprocessors)
    if config is None:
        return f"keeps a row in a cluster's registers, {n} elements are too many"
    if rows * config.ctas > _MOST_PROGRAMS:
        return f"launches up to {_MOST_PROGRAMS} programs, got {rows} rows of {config.ctas}"
    return None


def describe(rows: int, n: int, itemsize: int, multiprocessors: int) -> str:
    config = choose_config(rows, n, itemsize, False, multiprocessors)
    return f"forward: rows in clusters of {config.ctas} programs, {config.num_warps} warps each"


def forward(x: Tensor, n: int, scale: float, log: bool, multiprocessors: int) -> Tensor:
    """Over rows of ``n`` elements, one behind the other."""
    y = torch.empty_like(x)
    device = x.get_device()
    launch = _launch(x.numel() // n, n, x.dtype, device, log, False, multiprocessors)
    partial = torch.empty(launch.partials, dtype=torch.float32, device=x.device)
    addresses = x.data_ptr(), y.data_ptr(), partial.data_ptr()
    launch.binary(launch.rows, raw_stream(device), (*addresses, *launch.lengths, scale))
    return y


def backward(y: Tensor, dy: Tensor, n: int, scale: float, log: bool, multiprocessors: int) -> Tensor:
    dx = torch.empty_like(y)
    device = y.get_device()
    launch = _launch(y.numel() // n, n, y.dtype, device, log, True, multiprocessors)
    partial = torch.empty(launch.partials, dtype=torch.float32, device=y.device)
    addresses = y.data_ptr(), dy.data_ptr(), dx.data_ptr(), partial.data_ptr()
    launch.binary(launch.rows, raw_stream(device), (*addresses, *launch.lengths, scale))
    return dx


class _Launch(NamedTuple):
    rows: int
    partials: int
    lengths: tuple[int, int]
    binary: Binary


@functools.lru_cache(4096)
def _launch(rows: int, n: int, dtype, device: int, log: bool, backward: bool, multiprocessors: int) -> _Launch:
    config = choose_config(rows, n, dtype.itemsize, backward, multiprocessors)
    unit = 16 // dtype.itemsize
    lengths = n // unit, -(-n // (unit * config.ctas))
    return _Launch(
        rows, rows * config.ctas * (1 if backward else 2), lengths, _binary(config, n, dtype, device, log, backward)
    )


@functools.lru_cache(4096)
def _binary(config: Config, n: int, dtype, device: int, log: bool, backward: bool) -> Binary:
    like = torch.empty(256, dtype=dtype, device=device)
    given = constants(config, n, dtype.itemsize, log)
    return Binary(
        _backward if backward else _forward, device, (*(like,) * (2 + backward), like.view(torch.float32), 16, 16, 1.0), given,
        num_warps=config.num_warps, num_ctas=config.ctas, maxnreg=registers(given["VECTORS"], 1 + backward, dtype.itemsize),
    )  # fmt: skip


def registers(vectors: int, inputs: int, itemsize: int) -> int:
    """A thread's most: what it holds and what it works with, so that as many programs as can be are on a multiprocessor."""
    return min(128, 4 * vectors * inputs + (24 if itemsize == 4 else 48))


def constants(config: Config, n: int, itemsize: int, log: bool) -> dict:
    unit, bits = 16 // itemsize, config.ctas.bit_length() - 1
    span = config.num_warps * 32 * unit
    piece = -(-n // (unit * config.ctas)) * unit
    shortest = max(0, n - (config.ctas - 1) * piece)
    layout = gl.BlockedLayout(
        [1, unit], [1, 32], [1, config.num_warps], [1, 0], cga_layout=[[1 << b, 0] for b in range(bits)]
    )
    every = gl.BlockedLayout([1], [32], [config.num_warps], [0], cga_layout=[[0]] * bits)
    return {
        "LOG": log, "UNIT": unit, "CTAS": config.ctas, "SPAN": span, "VECTORS": -(-piece // span),
        "FULL": min(piece, shortest) // span, "LAYOUT": layout, "ALL": every,
    }  # fmt: skip
