"""Softmax and log_softmax on Hopper (sm_90) in Gluon: columns here, long rows in ``softmax_rows``.

Along a dimension that is not the contiguous one, a tensor is seen as [outer, N, C], C contiguous, N reduced. A work
item is a part of the N rows of a panel of columns: small enough that several lie in a multiprocessor's shared memory at
once. One warp keeps the copy engine busy, chunk by chunk through a ring; groups of consumer warps take turns at the
items: statistics of the whole item first, then the result, stored straight from registers, so that one group computes
while another loads and a third stores. Every element crosses DRAM once in each direction, whatever N is.

Where a panel has several parts, each leaves its statistics in global memory and waits until all parts of the panel have.
The launch is cooperative: all programs are resident, or it fails. Programs take their items in order, so the first
unfinished panel always has all its parts under way.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from trinix.kernels import LEAST_SCALE
from trinix.kernels._binary import Binary, Box, raw_stream
from trinix.kernels._binary import is_hopper as _is_hopper
from trinix.kernels._binary import multiprocessors as _multiprocessors
from trinix.kernels.hopper import softmax_rows
from trinix.kernels.hopper._compat import block_barrier, tma_load

LOG2E = math.log2(math.e)
SHARED_BYTES = 221 * 1024  # of the ring; statistics and barriers take the rest of the 227 KiB


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _finite(top):
    """The largest value as a shift of exponents: 0 for a column without any, for -inf - -inf is NaN."""
    return gl.where(top == float("-inf"), 0.0, top)


@gluon.jit
def _item(work, n, panels, parts, rows, CHUNK: gl.constexpr, COLS: gl.constexpr):
    """(panel, outer index, first column, part, its first row, its chunks)."""
    part = work % parts
    panel = work // parts
    row = part * rows
    chunks = (gl.minimum(n - row, rows) + CHUNK - 1) // CHUNK
    return panel, panel // panels, (panel % panels) * COLS, part, row, chunks


@gluon.jit
def _produce(a_desc, b_desc, a_ring, b_ring, full, empty, n, panels, parts, works, rows,
             CHUNK: gl.constexpr, COLS: gl.constexpr, SLOTS: gl.constexpr, PAIR: gl.constexpr):  # fmt: skip
    step = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        _, o, column, _, row, chunks = _item(work, n, panels, parts, rows, CHUNK, COLS)
        for k in range(chunks):
            slot = step % SLOTS
            mbarrier.wait(empty.index(slot), ((step // SLOTS) & 1) ^ 1)
            mbarrier.expect(full.index(slot), a_desc.block_type.nbytes * (2 if PAIR else 1))
            tma_load(a_desc, [o, row + k * CHUNK, column], full.index(slot), a_ring.index(slot))
            if PAIR:
                tma_load(b_desc, [o, row + k * CHUNK, column], full.index(slot), b_ring.index(slot))
            step += 1


@gluon.jit
def _await(full, empty, slot, use):
    """The ``use``-th filling of a slot. Its last one was another group's: until that is emptied, ``full`` may be two phases behind,
    which its parity does not tell from done."""
    mbarrier.wait(empty.index(slot), (use & 1) ^ 1)
    mbarrier.wait(full.index(slot), use & 1)


@gluon.jit
def _meet(arrived, parts):
    block_barrier()  # the stores of all threads come before the one thread's atomic
    seen = gl.atomic_add(arrived, 1, sem="acq_rel") + 1
    while seen < parts:
        seen = gl.atomic_add(arrived, 0, sem="acquire")
    block_barrier()


@gluon.jit
def _store(to, at, value, row, i, j, n, c, EVEN: gl.constexpr):
    if EVEN:
        gl.store(to + at, value)
    else:
        gl.store(to + at, value, mask=(row + i[:, None] < n) & (j[None, :] < c))


@gluon.jit
def _consume_forward(
    ME: gl.constexpr, y, ring, full, empty, partial, arrived, n, c, panels, parts, works, rows, scale,
    LOG: gl.constexpr, SPLIT: gl.constexpr, CHUNK: gl.constexpr, COLS: gl.constexpr, SLOTS: gl.constexpr,
    WARPS: gl.constexpr, GROUPS: gl.constexpr, UNIT: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    SPAN: gl.constexpr = WARPS * 32 * UNIT // COLS
    TILES: gl.constexpr = CHUNK // SPAN
    layout: gl.constexpr = gl.BlockedLayout([1, UNIT], [32 * UNIT // COLS, COLS // UNIT], [WARPS, 1], [1, 0])
    i = gl.arange(0, SPAN, gl.SliceLayout(1, layout))
    j = gl.arange(0, COLS, gl.SliceLayout(0, layout))
    c *= UNIT
    at = i[:, None] * c + j[None, :]
    factor = scale * 1.4426950408889634
    step = 0
    turn = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        panel, o, column, part, row, chunks = _item(work, n, panels, parts, rows, CHUNK, COLS)
        if turn == ME:
            top = gl.full([SPAN, COLS], float("-inf"), gl.float32, layout)
            total = gl.zeros([SPAN, COLS], gl.float32, layout)
            for k in range(chunks):
                slot = (step + k) % SLOTS
                _await(full, empty, slot, (step + k) // SLOTS)
                chunk = ring.index(slot).reshape([CHUNK, COLS])
                new = top
                for u in gl.static_range(TILES):
                    v = chunk.slice(u * SPAN, SPAN).load(layout).to(gl.float32)
                    if not EVEN:
                        v = gl.where(row + k * CHUNK + u * SPAN + i[:, None] < n, v, float("-inf"))
                    new = gl.maximum(new, v)
                least = _finite(
                    new
                )  # what is subtracted first can neither overflow nor leave the largest value's exponent off 0
                total *= _exp2((top - least) * factor)
                for u in gl.static_range(TILES):
                    v = chunk.slice(u * SPAN, SPAN).load(layout).to(gl.float32)
                    if not EVEN:
                        v = gl.where(row + k * CHUNK + u * SPAN + i[:, None] < n, v, float("-inf"))
                    total += _exp2((v - least) * factor)
                top = new
            most = gl.max(top, 0)
            sums = gl.sum(total * _exp2((top - _finite(most)[None, :]) * factor), 0)
            if SPLIT:
                line = partial + panel * (2 * parts * COLS)
                gl.store(line + part * (2 * COLS) + j, most)
                gl.store(line + part * (2 * COLS) + COLS + j, sums)
                _meet(arrived + panel, parts)
                top = gl.full([SPAN, COLS], float("-inf"), gl.float32, layout)
                total = gl.zeros([SPAN, COLS], gl.float32, layout)
                for q in range(0, parts, SPAN):
                    at_q = line + (q + i[:, None]) * (2 * COLS) + j[None, :]
                    peak = gl.load(at_q, mask=q + i[:, None] < parts, other=float("-inf"), cache_modifier=".cg")
                    some = gl.load(at_q + COLS, mask=q + i[:, None] < parts, other=0.0, cache_modifier=".cg")
                    new = gl.maximum(top, peak)
                    least = _finite(new)
                    total = total * _exp2((top - least) * factor) + some * _exp2((peak - least) * factor)
                    top = new
                most = gl.max(top, 0)
                sums = gl.sum(total * _exp2((top - _finite(most)[None, :]) * factor), 0)
            if LOG:
                sums = gl.log(sums)
            elif y.dtype.element_ty != gl.float32:  # a half type does not show the reciprocal's error
                sums = 1.0 / sums
            out = y + (o.to(gl.int64) * n + row) * c + column
            for k in range(chunks):
                slot = (step + k) % SLOTS
                chunk = ring.index(slot).reshape([CHUNK, COLS])
                for u in gl.static_range(TILES):
                    v = chunk.slice(u * SPAN, SPAN).load(layout).to(gl.float32)
                    v -= most[None, :]
                    if LOG:
                        v = v * scale - sums[None, :]
                    elif y.dtype.element_ty == gl.float32:
                        v = gl.div_rn(_exp2(v * factor), gl.broadcast(sums[None, :], v)[0])
                    else:
                        v = _exp2(v * factor) * sums[None, :]
                    first_row = k * CHUNK + u * SPAN
                    _store(
                        out + first_row * c, at, v.to(y.dtype.element_ty), row + first_row, i, j, n, c - column, EVEN
                    )
                mbarrier.arrive(empty.index(slot), count=1)
        step += chunks
        turn = turn + 1 if turn + 1 < GROUPS else 0


@gluon.jit
def _consume_backward(
    ME: gl.constexpr, dx, y_ring, dy_ring, full, empty, partial, arrived, n, c, panels, parts, works, rows, scale,
    LOG: gl.constexpr, SPLIT: gl.constexpr, CHUNK: gl.constexpr, COLS: gl.constexpr, SLOTS: gl.constexpr,
    WARPS: gl.constexpr, GROUPS: gl.constexpr, UNIT: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    SPAN: gl.constexpr = WARPS * 32 * UNIT // COLS
    TILES: gl.constexpr = CHUNK // SPAN
    layout: gl.constexpr = gl.BlockedLayout([1, UNIT], [32 * UNIT // COLS, COLS // UNIT], [WARPS, 1], [1, 0])
    i = gl.arange(0, SPAN, gl.SliceLayout(1, layout))
    j = gl.arange(0, COLS, gl.SliceLayout(0, layout))
    c *= UNIT
    at = i[:, None] * c + j[None, :]
    step = 0
    turn = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        panel, o, column, part, row, chunks = _item(work, n, panels, parts, rows, CHUNK, COLS)
        if turn == ME:
            total = gl.zeros([SPAN, COLS], gl.float32, layout)
            for k in range(chunks):
                slot = (step + k) % SLOTS
                _await(full, empty, slot, (step + k) // SLOTS)
                ys = y_ring.index(slot).reshape([CHUNK, COLS])
                dys = dy_ring.index(slot).reshape([CHUNK, COLS])
                for u in gl.static_range(TILES):
                    g = dys.slice(u * SPAN, SPAN).load(layout).to(gl.float32)  # rows past n: the copy engine's zeros
                    if LOG:
                        total += g
                    else:
                        total += g * ys.slice(u * SPAN, SPAN).load(layout).to(gl.float32)
            sums = gl.sum(total, 0)
            if SPLIT:
                line = partial + panel * (2 * parts * COLS)
                gl.store(line + part * COLS + j, sums)
                _meet(arrived + panel, parts)
                total = gl.zeros([SPAN, COLS], gl.float32, layout)
                for q in range(0, parts, SPAN):
                    at_q = line + (q + i[:, None]) * COLS + j[None, :]
                    total += gl.load(at_q, mask=q + i[:, None] < parts, other=0.0, cache_modifier=".cg")
                sums = gl.sum(total, 0)
            out = dx + (o.to(gl.int64) * n + row) * c + column
            for k in range(chunks):
                slot = (step + k) % SLOTS
                ys = y_ring.index(slot).reshape([CHUNK, COLS])
                dys = dy_ring.index(slot).reshape([CHUNK, COLS])
                for u in gl.static_range(TILES):
                    p = ys.slice(u * SPAN, SPAN).load(layout).to(gl.float32)
                    g = dys.slice(u * SPAN, SPAN).load(layout).to(gl.float32)
                    if LOG:
                        g = scale * (g - _exp2(p * 1.4426950408889634) * sums[None, :])
                    else:
                        g = scale * p * (g - sums[None, :])
                    first_row = k * CHUNK + u * SPAN
                    _store(
                        out + first_row * c, at, g.to(dx.dtype.element_ty), row + first_row, i, j, n, c - column, EVEN
                    )
                mbarrier.arrive(empty.index(slot), count=1)
        step += chunks
        turn = turn + 1 if turn + 1 < GROUPS else 0


@gluon.jit(do_not_specialize=["n", "c", "panels", "parts", "works", "rows"])
def _columns(
    a_desc, b_desc, out, partial, arrived, n: "i32", c: "i32", panels: "i32", parts: "i32", works: "i32", rows: "i32", scale: "fp32",
    LOG: gl.constexpr, BACKWARD: gl.constexpr, SPLIT: gl.constexpr, CHUNK: gl.constexpr, COLS: gl.constexpr,
    SLOTS: gl.constexpr, WARPS: gl.constexpr, GROUPS: gl.constexpr, REGISTERS: gl.constexpr, UNIT: gl.constexpr,
    EVEN: gl.constexpr,
):  # fmt: skip
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [SLOTS, 1, CHUNK, COLS], a_desc.layout)
    if BACKWARD:
        b_ring = gl.allocate_shared_memory(a_desc.dtype, [SLOTS, 1, CHUNK, COLS], a_desc.layout)
    else:
        b_ring = a_ring
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(SLOTS):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    fence_async_shared()
    A: gl.constexpr = 0
    B: gl.constexpr = 1
    C: gl.constexpr = 2
    if BACKWARD and GROUPS == 1:
        gl.warp_specialize([
            (_consume_backward, (A, out, a_ring, b_ring, full, empty, partial, arrived, n, c, panels, parts, works, rows, scale, LOG,
                                 SPLIT, CHUNK, COLS, SLOTS, WARPS, GROUPS, UNIT, EVEN)),
            (_produce, (a_desc, b_desc, a_ring, b_ring, full, empty, n, panels, parts, works, rows, CHUNK, COLS, SLOTS, BACKWARD)),
        ], [1], [24])  # fmt: skip
    elif BACKWARD:
        gl.static_assert(GROUPS == 2)
        gl.warp_specialize([
            (_consume_backward, (A, out, a_ring, b_ring, full, empty, partial, arrived, n, c, panels, parts, works, rows, scale, LOG,
                                 SPLIT, CHUNK, COLS, SLOTS, WARPS, GROUPS, UNIT, EVEN)),
            (_consume_backward, (B, out, a_ring, b_ring, full, empty, partial, arrived, n, c, panels, parts, works, rows, scale, LOG,
                                 SPLIT, CHUNK, COLS, SLOTS, WARPS, GROUPS, UNIT, EVEN)),
            (_produce, (a_desc, b_desc, a_ring, b_ring, full, empty, n, panels, parts, works, rows, CHUNK, COLS, SLOTS, BACKWARD)),
        ], [WARPS, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.static_assert(GROUPS == 3)
        gl.warp_specialize([
            (_consume_forward, (A, out, a_ring, full, empty, partial, arrived, n, c, panels, parts, works, rows, scale, LOG,
                                SPLIT, CHUNK, COLS, SLOTS, WARPS, GROUPS, UNIT, EVEN)),
            (_consume_forward, (B, out, a_ring, full, empty, partial, arrived, n, c, panels, parts, works, rows, scale, LOG,
                                SPLIT, CHUNK, COLS, SLOTS, WARPS, GROUPS, UNIT, EVEN)),
            (_consume_forward, (C, out, a_ring, full, empty, partial, arrived, n, c, panels, parts, works, rows, scale, LOG,
                                SPLIT, CHUNK, COLS, SLOTS, WARPS, GROUPS, UNIT, EVEN)),
            (_produce, (a_desc, b_desc, a_ring, b_ring, full, empty, n, panels, parts, works, rows, CHUNK, COLS, SLOTS, BACKWARD)),
        ], [WARPS, WARPS, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip


# ---- choice -------------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    columns_bytes: int  # of a row in a chunk
    chunk: int  # rows
    part_bytes: int  # of an item, about
    num_warps: int  # of a group
    groups: int


class Plan(NamedTuple):
    config: Config
    cols: int
    panels: int  # of a slab
    parts: int
    rows: int  # of a part
    slots: int


def choose_config(n: int, backward: bool) -> Config:
    """By the columns of (12, 12, n, 128), S-col-512 to S-col-32768."""
    if backward:
        if n <= 512:
            return Config(64, 256, 64 << 10, 4, 2)
        if n <= 1024:
            return Config(64, 256, 128 << 10, 8, 1)
        return Config(128, 128, 96 << 10, 4, 2) if n <= 16384 else Config(64, 256, 128 << 10, 8, 1)
    return Config(64, 256, 64 << 10, 4, 3) if n <= 1024 else Config(128, 128, 64 << 10, 4, 3)


_MOST_PARTS = 64  # with more, items grow to what the ring holds of one for every group


def plan(n: int, c: int, itemsize: int, backward: bool, config: Config | None = None) -> Plan:
    config = config or choose_config(n, backward)
    chunk_bytes = config.chunk * config.columns_bytes * (1 + backward)
    chunks = -(-n // config.chunk)
    slots = SHARED_BYTES // chunk_bytes
    per_part = config.part_bytes // chunk_bytes
    if -(-chunks // per_part) > _MOST_PARTS:
        # an item for every group: behind a shorter ring a group would wait for a barrier's phase after the next, and not be held
        per_part = max(per_part, min(slots // config.groups, -(-chunks // _MOST_PARTS)))
    rows = -(-chunks // -(-chunks // per_part)) * config.chunk
    cols = config.columns_bytes // itemsize
    return Plan(config, cols, -(-c // cols), -(-n // rows), rows, slots)


def unsupported(x: Tensor, mask: Tensor | None, dim: int, scale: float) -> str | None:
    """Why these kernels cannot run the call, or None. One pass over contiguous memory is what they are for."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes float16, bfloat16 and float32, got {x.dtype}"
    if not x.is_cuda:
        return f"needs a GPU tensor, got {x.device.type}"
    if x.layout != torch.strided or x.is_nested or not x.ndim:
        return "needs a strided tensor of one dimension or more"
    if not _is_hopper(x.device.index):
        return "needs a GPU of compute capability 9.0"
    if mask is not None:
        return "takes no mask"
    if not scale >= LEAST_SCALE:
        return f"takes a scale of 2**-126 or above, got {scale}"
    if not x.is_contiguous():
        return "needs a contiguous tensor"
    if not x.numel():
        return "needs elements, got none"
    n, c = x.shape[dim], math.prod(x.shape[dim + 1 :])
    multiprocessors = _multiprocessors(x.device.index)
    if c == 1:
        return softmax_rows.unsupported(x.numel() // n, n, x.element_size(), multiprocessors)
    if c * x.element_size() % 16:
        return "needs rows of a multiple of 16 bytes behind the dimension"
    return _too_large(x.numel() // (n * c), n, c, x.element_size(), multiprocessors)


@functools.lru_cache(4096)
def _too_large(outer: int, n: int, c: int, itemsize: int, multiprocessors: int) -> str | None:
    plans = [plan(n, c, itemsize, backward) for backward in (False, True)]
    if any(p.panels * p.parts * outer >= 2**31 or n + p.rows >= 2**31 for p in plans):
        return "numbers its work in 32 bits"
    if max(p.rows for p in plans) * c >= 2**31:
        return f"counts the elements of a part's rows in 32 bits, {c} columns are too many"
    if max(p.parts for p in plans) > multiprocessors:
        return f"keeps a column on the card's {multiprocessors} multiprocessors, {n} rows are too many"
    return None


# The smallest of the measured rows, S-col-512 in a half type. Below, a tile of the portable kernels holds a column.
_ROWS_FROM = 512
_BYTES_FROM = 144 * 512 * 128 * 2


def wins(x: Tensor, dim: int) -> bool:
    """Whether a call that these kernels support is faster here than in the portable kernels."""
    if _is_row(x, dim):
        n, grad = x.shape[dim], x.requires_grad and torch.is_grad_enabled()
        return softmax_rows.wins(x.numel() // n, n, x.element_size(), grad) and not x.data_ptr() % 16
    return x.shape[dim] >= _ROWS_FROM and x.numel() * x.element_size() >= _BYTES_FROM and not x.data_ptr() % 16


def describe(x: Tensor, mask: None, dim: int, log: bool) -> str:
    n, c, itemsize = x.shape[dim], math.prod(x.shape[dim + 1 :]), x.element_size()
    if c == 1:
        return softmax_rows.describe(x.numel() // n, n, itemsize, _multiprocessors(x.get_device()))
    p = plan(n, c, itemsize, False)
    return f"forward: columns of {p.config.columns_bytes} bytes in {p.parts} parts of {p.rows} rows, {p.config.groups} x {p.config.num_warps} warps"


def _is_row(x: Tensor, dim: int) -> bool:
    return dim == x.ndim - 1 or math.prod(x.shape[dim + 1 :]) == 1


def forward(x: Tensor, mask: None, dim: int, scale: float, log: bool) -> Tensor:
    x = _aligned(x)
    if _is_row(x, dim):
        return softmax_rows.forward(x, x.shape[dim], scale, log, _multiprocessors(x.get_device()))
    y = torch.empty_like(x)
    _run(x, x, y, dim, scale, log, False)
    return y


def backward(y: Tensor, dy: Tensor, dim: int, scale: float, log: bool) -> Tensor:
    y, dy = _aligned(y.contiguous()), _aligned(dy.contiguous())  # hooks on saved tensors may give another y back
    if _is_row(y, dim):
        return softmax_rows.backward(y, dy, y.shape[dim], scale, log, _multiprocessors(y.get_device()))
    dx = torch.empty_like(y)
    _run(y, dy, dx, dim, scale, log, True)
    return dx


def _aligned(t: Tensor) -> Tensor:
    return t.clone() if t.data_ptr() % 16 else t


def _run(a: Tensor, b: Tensor, out: Tensor, dim: int, scale: float, log: bool, backward: bool, config=None) -> None:
    shape, device = a.shape, a.get_device()
    n, c = shape[dim], math.prod(shape[dim + 1 :])
    launch = _launch(a.numel() // (n * c), n, c, a.dtype, device, log, backward, config)
    partial = arrived = out
    if launch.parts > 1:
        partial = torch.empty(launch.partials, dtype=torch.float32, device=a.device)
        arrived = torch.zeros(launch.panels, dtype=torch.int32, device=a.device)
    launch.binary(
        launch.programs,
        raw_stream(device),
        launch.a.at(a.data_ptr()) + launch.b.at(b.data_ptr())
        + (out.data_ptr(), partial.data_ptr(), arrived.data_ptr(), *launch.scalars, scale),
    )  # fmt: skip


class _Launch:
    def __init__(self, outer: int, n: int, c: int, dtype, device: int, log: bool, backward: bool, config):
        p = plan(n, c, dtype.itemsize, backward, config)
        self.parts, self.panels = p.parts, outer * p.panels
        works = self.panels * p.parts
        self.partials = works * 2 * p.cols
        self.programs = min(works, _multiprocessors(device) // p.parts * p.parts)
        block = (1, p.config.chunk, p.cols)
        self.a, self.b = (Box((outer, n, c), (n * c, c, 1), block, dtype) for _ in "ab")
        unit = 16 // dtype.itemsize
        self.scalars = (n, c // unit, p.panels, p.parts, works, p.rows)
        like = torch.empty(256, dtype=dtype, device=torch.device("cuda", device))
        floats, ints = like.view(torch.float32), like.view(torch.int32)
        parts = (floats, ints) if p.parts > 1 else (like, like)
        even = n % p.rows == 0 and c % p.cols == 0
        self.binary = Binary(
            _columns, device, ((self.a, like), (self.b, like), like, *parts, *self.scalars, 1.0),
            _constants(p, log, backward, unit, even), num_warps=p.config.num_warps, launch_cooperative_grid=p.parts > 1,
        )  # fmt: skip


_launch = functools.lru_cache(4096)(_Launch)


def _constants(p: Plan, log: bool, backward: bool, unit: int, even: bool) -> dict:
    return {
        "LOG": log, "BACKWARD": backward, "SPLIT": p.parts > 1, "CHUNK": p.config.chunk, "COLS": p.cols, "SLOTS": p.slots,
        "WARPS": p.config.num_warps, "GROUPS": p.config.groups, "REGISTERS": _registers(p.config), "UNIT": unit, "EVEN": even,
    }  # fmt: skip


def _registers(config: Config) -> int:
    """What the register file holds for a consumer's thread beside the producer's."""
    return min(232, (65536 - 4096) // (config.groups * config.num_warps * 32) // 8 * 8)
