"""LayerNorm and RMSNorm of long rows on Hopper (sm_90) in Gluon, with or without a fused residual.

A row of N contiguous elements is cut into equal pieces, one for each program of a cluster. What a program cannot know
alone (the row's statistics; in backward its two sums) every warp sends to all programs of the cluster, into their shared
memory. So each element crosses DRAM once in each direction, where a row that no program can hold is read twice.

Forward: a cluster for each row, the pieces in registers. Backward: as many clusters as the card holds at a time, and each
walks many rows. They come into shared memory by asynchronous copies, some rows ahead, and while the sums of one row are
on their way the next row's are made. A program keeps its columns' share of dW and db in registers; a small kernel adds
the clusters' shares in a fixed order: the same bits on every run.

Floor: forward 2, backward 3, residual forms 4 tensors of rows x N.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.runtime import driver

from trinix.kernels._binary import Binary, raw_stream
from trinix.kernels._binary import is_hopper as _is_hopper
from trinix.kernels._binary import multiprocessors as _multiprocessors
from trinix.kernels.hopper._compat import async_load
from trinix.kernels.hopper.early import let_next_kernel_start, wait_for_kernel_before
from trinix.kernels.hopper.row_vectors import load, load_all, store

# A tensor of the cluster is [CTAS, WARPS, 32 * UNIT]: for each thread of all programs the UNIT elements of 16 bytes. A piece
# is VECTORS of them, SPAN elements apart, of which FULL lie within every piece. Lengths come in units of 16 bytes: a vector is
# in the row or not.


# ---- floats from every warp of a cluster to all its programs -----------------------------------------------------------------
# In each program's shared memory lie barriers, and behind them for each barrier KINDS lines of a float from every warp.
# Triton knows nothing of it: the memory is declared in the assembler text, static, beside what Triton asks for.

_BARRIERS_BYTES = 64


@gluon.jit
def _open(BARRIERS: gl.constexpr, KINDS: gl.constexpr, CTAS: gl.constexpr, WARPS: gl.constexpr):
    """Where this program's part lies. Nobody sends before ``_opened``."""
    return gl.inline_asm_elementwise(
        f"""{{ // exchange: open
        .reg .pred some; .reg .b32 thread, barrier;
        .shared .align 16 .b8 exchange[{64 + BARRIERS * KINDS * CTAS * WARPS * 4}];
        mov.u32 $0, exchange;
        mov.u32 thread, %tid.x;
        setp.lt.u32 some, thread, {BARRIERS};
        mad.lo.u32 barrier, thread, 8, $0;
        @some mbarrier.init.shared::cta.b64 [barrier], 1;
        @some fence.mbarrier_init.release.cluster;
        barrier.cluster.arrive.relaxed; }}""", "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _opened():
    gl.inline_asm_elementwise(
        "barrier.cluster.wait; mov.b32 $0, 0; // exchange: opened", "=r,~{memory}", [], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def _expect(base, place, KINDS: gl.constexpr, CTAS: gl.constexpr, WARPS: gl.constexpr):
    """How many bytes complete the barrier, next time."""
    gl.inline_asm_elementwise(
        f"""{{ // exchange: expect {KINDS * CTAS * WARPS * 4}
        .reg .pred first; .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], {KINDS * CTAS * WARPS * 4};
        mov.b32 $0, 0; }}""", "=r,r,~{memory}", [base + place * 8], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _send(base, place, kind, value, KINDS: gl.constexpr, CTAS: gl.constexpr, WARPS: gl.constexpr):
    """A lane for each program of the cluster stores the warp's float there."""
    gl.inline_asm_elementwise(
        f"""{{ // exchange: send
        .reg .pred some; .reg .b32 lane, warp, at, barrier;
        mov.u32 lane, %laneid;
        setp.lt.u32 some, lane, {CTAS};
        mov.u32 warp, %tid.x;
        shr.u32 warp, warp, 5;
        mov.u32 at, %cluster_ctarank;
        mad.lo.u32 at, at, {WARPS}, warp;
        mad.lo.u32 at, at, 4, $2;
        @some mapa.shared::cluster.u32 at, at, lane;
        @some mapa.shared::cluster.u32 barrier, $3, lane;
        @some st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [at], $1, [barrier];
        mov.b32 $0, 0; }}""", "=r,f,r,r,~{memory}",
        [value, base + 64 + (place * KINDS + kind) * (CTAS * WARPS * 4), base + place * 8],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _await(base, place, phase):
    gl.inline_asm_elementwise(
        """{ // exchange: await
        .reg .pred done;
        again: mbarrier.try_wait.parity.shared::cta.b64 done, [$1], $2;
        @!done bra again;
        mov.b32 $0, 0; }""", "=r,r,r,~{memory}", [base + place * 8, phase], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _received(base, place, kind, every, KINDS: gl.constexpr, CTAS: gl.constexpr, WARPS: gl.constexpr):
    """The sum of what all warps sent, in a fixed order."""
    floats = gl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1]; // exchange: received", "=f,r,~{memory}",
        [base + 64 + (place * KINDS + kind) * (CTAS * WARPS * 4) + every * 4], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip
    return gl.sum(floats, 0)


# ---- vectors --------------------------------------------------------------------------------------------------------------


@gluon.jit
def _wide(x):
    """x in float32, made anew at every use: kept as it came it takes half the registers."""
    if x.dtype == gl.bfloat16:
        x = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=gl.float32, is_pure=False, pack=2
        )
    elif x.dtype.primitive_bitwidth == 16:
        x = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
        x = x.to(gl.float32)
    return x


@gluon.jit
def _places(n, piece, UNIT: gl.constexpr, CTAS: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """Places of the first vectors in a row, and where each piece ends."""
    two: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    line = gl.arange(0, CTAS, gl.SliceLayout(1, two))
    warp = gl.arange(0, WARPS, gl.SliceLayout(0, two))
    element = gl.arange(0, 32 * UNIT, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    first = (line * (piece * UNIT))[:, None] + warp[None, :] * (32 * UNIT)
    at = first[:, :, None] + element[None, :][:, None, :]
    return at, gl.minimum((line + 1) * (piece * UNIT), n * UNIT)[:, None][:, :, None]


@gluon.jit
def _weighted(v, ws, u, offset, WEIGHT: gl.constexpr, OFFSET: gl.constexpr):
    if WEIGHT:
        w = _wide(ws[u])
        if OFFSET:
            w += offset
        v = v * w
    return v


# ---- forward --------------------------------------------------------------------------------------------------------------


@gluon.jit
def _statistics(
    vectors, base, every, at, end, length, eps, CENTER: gl.constexpr, EXACT: gl.constexpr, CTAS: gl.constexpr, WARPS: gl.constexpr,
    SPAN: gl.constexpr, VECTORS: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """(mean, what its rounding left out, 1 / deviation)"""
    total = _wide(vectors[0]) if CENTER else _wide(vectors[0]) * _wide(vectors[0])
    for u in gl.static_range(1, VECTORS):
        v = _wide(vectors[u])
        total += v if CENTER else v * v
    total = gl.sum(total, 2)
    _opened()
    _expect(base, 0, 1, CTAS, WARPS)
    _send(base, 0, 0, total, 2, CTAS, WARPS)
    _await(base, 0, 0)
    mean = _received(base, 0, 0, every, 2, CTAS, WARPS) / length
    low = 0.0
    square = mean
    if CENTER:
        lows = gl.zeros_like(_wide(vectors[0]))
        squares = gl.zeros_like(lows)
        for u in gl.static_range(VECTORS):
            v = _wide(vectors[u]) - mean
            if u >= FULL:
                v = gl.where(at + u * SPAN < end, v, 0.0)
            lows += v
            squares += v * v
        _expect(base, 1, 2 if EXACT else 1, CTAS, WARPS)
        _send(base, 1, 0, gl.sum(squares, 2), 2, CTAS, WARPS)
        if EXACT:
            _send(base, 1, 1, gl.sum(lows, 2), 2, CTAS, WARPS)
        _await(base, 1, 0)
        square = _received(base, 1, 0, every, 2, CTAS, WARPS) / length
        if EXACT:
            low = _received(base, 1, 1, every, 2, CTAS, WARPS) / length
            square -= low * low
    return mean, low, gl.rsqrt(square + eps)


@gluon.jit(do_not_specialize=["rows", "n", "piece"])
def _forward(
    x, residual, weight, bias, y, h, stats, rows: "i32", n: "i32", piece: "i32", length: "fp32", eps: "fp32", offset: "fp32",
    CENTER: gl.constexpr, WEIGHT: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr, SAVE: gl.constexpr,
    OFFSET: gl.constexpr,
    UNIT: gl.constexpr, CTAS: gl.constexpr, WARPS: gl.constexpr, SPAN: gl.constexpr, VECTORS: gl.constexpr, FULL: gl.constexpr,
    LAYOUT: gl.constexpr, ALL: gl.constexpr,
):  # fmt: skip
    base = _open(2, 2, CTAS, WARPS)
    row = gl.program_id(0).to(gl.int64)
    at, end = _places(n, piece, UNIT, CTAS, WARPS, LAYOUT)
    every = gl.arange(0, CTAS * WARPS, ALL)
    start = row * (n * UNIT)
    vectors = load_all(x + start, at, end, 0.0, VECTORS, FULL, SPAN)
    if RESIDUAL:
        others = load_all(residual + start, at, end, 0.0, VECTORS, FULL, SPAN)
        sums = ()
        for u in gl.static_range(VECTORS):
            total = (_wide(vectors[u]) + _wide(others[u])).to(h.dtype.element_ty)  # what is stored is normalised
            store(h + start, u, at, end, total, FULL, SPAN)
            sums = sums + (total,)  # noqa: RUF005
        vectors = sums
    ws = ()
    EARLY: gl.constexpr = 2 if VECTORS > 2 else VECTORS  # vectors of the weight under way while the warps meet
    if WEIGHT:
        ws = load_all(weight, at, end, 0.0, EARLY, FULL, SPAN)
    mean, low, rstd = _statistics(vectors, base, every, at, end, length, eps, CENTER, x.dtype.element_ty == gl.float32, CTAS, WARPS,
                                  SPAN, VECTORS, FULL)  # fmt: skip
    if SAVE:
        gl.store(stats + row, rstd)
        if CENTER:
            gl.store(stats + rows + row, mean + low)
    for u in gl.static_range(VECTORS):
        v = _wide(vectors[u])
        if CENTER:
            v = (v - mean) - low
        v *= rstd
        if WEIGHT:
            if u >= EARLY:
                ws = ws + (load(weight, u, at, end, 0.0, FULL, SPAN),)  # noqa: RUF005
            v = _weighted(v, ws, u, offset, WEIGHT, OFFSET)
        if BIAS:
            v += load(bias, u, at, end, 0.0, FULL, SPAN).to(gl.float32)
        store(y + start, u, at, end, v, FULL, SPAN)


# ---- backward -------------------------------------------------------------------------------------------------------------


@gluon.jit
def _fetch(x, ring, slot, row, rows, n, at, end, UNIT: gl.constexpr, SPAN: gl.constexpr, VECTORS: gl.constexpr):
    """A row on its way into a slot; zeros behind its end, and for all of a row that is not there."""
    there = row < rows  # not in where(): Triton 3.9 then copies element by element
    for u in gl.static_range(VECTORS):
        copied = (at + u * SPAN < end) & there
        async_load(ring.index(slot * VECTORS + u), x + row * (n * UNIT) + u * SPAN + at, mask=copied)


@gluon.jit
def _fetch_all(x, dy, dh, stats, xs, gs, hs, rings, slot, row, rows, n, at, end, warp, CENTER: gl.constexpr, RESIDUAL: gl.constexpr,
               UNIT: gl.constexpr, SPAN: gl.constexpr, VECTORS: gl.constexpr):  # fmt: skip
    _fetch(x, xs, slot, row, rows, n, at, end, UNIT, SPAN, VECTORS)
    _fetch(dy, gs, slot, row, rows, n, at, end, UNIT, SPAN, VECTORS)
    if RESIDUAL:
        _fetch(dh, hs, slot, row, rows, n, at, end, UNIT, SPAN, VECTORS)
    async_load(rings.index(slot * 2), stats + row + warp, mask=row + warp < rows)
    if CENTER:
        means = stats + rows
        async_load(rings.index(slot * 2 + 1), means + row + warp, mask=row + warp < rows)
    async_copy.commit_group()


@gluon.jit
def _vector(ring, slot, u, VECTORS: gl.constexpr, LAYOUT: gl.constexpr):
    return _wide(ring.index(slot * VECTORS + u).load(LAYOUT))


@gluon.jit
def _row_statistics(rings, slot, CENTER: gl.constexpr, LAYOUT: gl.constexpr):
    rstd = rings.index(slot * 2).load(gl.SliceLayout(2, LAYOUT))
    mean = rstd
    if CENTER:
        mean = rings.index(slot * 2 + 1).load(gl.SliceLayout(2, LAYOUT))
    return mean[:, :, None], rstd[:, :, None]


@gluon.jit
def _share(
    xs, gs, rings, slot, ws, dws, dbs, base, place, offset, CENTER: gl.constexpr, WEIGHT: gl.constexpr, OFFSET: gl.constexpr,
    DX: gl.constexpr, DW: gl.constexpr, DB: gl.constexpr, CTAS: gl.constexpr, WARPS: gl.constexpr, VECTORS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """dW and db with a row's share; sends the sums over it of t (x - mean) and t, t the weighted gradient / deviation. A row that is
    not there adds zeros."""
    KINDS: gl.constexpr = 2 if CENTER else 1
    mean, rstd = _row_statistics(rings, slot, CENTER, LAYOUT)
    new_dws = ()
    new_dbs = ()
    for u in gl.static_range(VECTORS):
        v = _vector(xs, slot, u, VECTORS, LAYOUT)
        g = _vector(gs, slot, u, VECTORS, LAYOUT)
        if CENTER:
            v -= mean
        new_dbs = new_dbs + (dbs[u] + g if DB else dbs[u],)  # noqa: RUF005
        g *= rstd
        new_dws = new_dws + (dws[u] + g * v if DW else dws[u],)  # noqa: RUF005
        t = _weighted(g, ws, u, offset, WEIGHT, OFFSET)
        if u == 0:
            along = t * v
            plain = t
        else:
            along += t * v
            plain += t
    if DX:
        _expect(base, place, KINDS, CTAS, WARPS)
        _send(base, place, 0, gl.sum(along, 2), KINDS, CTAS, WARPS)
        if CENTER:
            _send(base, place, 1, gl.sum(plain, 2), KINDS, CTAS, WARPS)
    return new_dws, new_dbs


@gluon.jit(do_not_specialize=["rows", "n", "piece"])
def _backward(
    x, dy, dh, weight, stats, dx, partial, rows: "i32", n: "i32", piece: "i32", length: "fp32", offset: "fp32",
    CENTER: gl.constexpr, WEIGHT: gl.constexpr, RESIDUAL: gl.constexpr, DX: gl.constexpr, DW: gl.constexpr, DB: gl.constexpr,
    OFFSET: gl.constexpr,
    UNIT: gl.constexpr, CTAS: gl.constexpr, WARPS: gl.constexpr, SPAN: gl.constexpr, VECTORS: gl.constexpr, FULL: gl.constexpr,
    LAYOUT: gl.constexpr, ALL: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, RING: gl.constexpr, SMALL: gl.constexpr,
):  # fmt: skip
    # Row i + AHEAD is sent before row i is awaited. Who sends it has received row i - 1 from all, who then have read row
    # i - 2 - AHEAD: rows i - 1 - AHEAD to i + AHEAD may be in use, so there are PLACES for 2 AHEAD + 2.
    KINDS: gl.constexpr = 2 if CENTER else 1
    PLACES: gl.constexpr = 8 if AHEAD == 2 else 4
    base = _open(PLACES, KINDS, CTAS, WARPS)
    clusters = gl.num_programs(0)
    row = gl.program_id(0).to(gl.int64)
    at, end = _places(n, piece, UNIT, CTAS, WARPS, LAYOUT)
    every = gl.arange(0, CTAS * WARPS, ALL)
    warp = gl.zeros([CTAS, WARPS], gl.int32, gl.SliceLayout(2, LAYOUT))  # each warp's own copy of a row's statistics
    xs = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES * VECTORS, CTAS, WARPS, 32 * UNIT], RING)
    gs = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES * VECTORS, CTAS, WARPS, 32 * UNIT], RING)
    hs = gs
    if RESIDUAL:
        hs = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES * VECTORS, CTAS, WARPS, 32 * UNIT], RING)
    rings = gl.allocate_shared_memory(gl.float32, [STAGES * 2, CTAS, WARPS], SMALL)
    for s in gl.static_range(STAGES):
        _fetch_all(x, dy, dh, stats, xs, gs, hs, rings, s, row + s * clusters, rows, n, at, end, warp, CENTER, RESIDUAL, UNIT, SPAN,
                   VECTORS)  # fmt: skip
    ws = ()
    if WEIGHT:
        ws = load_all(weight, at, end, 0.0, VECTORS, FULL, SPAN)
    dws = ()
    dbs = ()
    for _u in gl.static_range(VECTORS):
        dws = dws + (gl.zeros([CTAS, WARPS, 32 * UNIT], gl.float32, LAYOUT),)  # noqa: RUF005
        dbs = dbs + (gl.zeros([CTAS, WARPS, 32 * UNIT], gl.float32, LAYOUT),)  # noqa: RUF005
    _opened()
    for s in gl.static_range(AHEAD):
        async_copy.wait_group(STAGES - 1 - s)
        dws, dbs = _share(xs, gs, rings, s, ws, dws, dbs, base, s, offset, CENTER, WEIGHT, OFFSET, DX, DW, DB, CTAS, WARPS,
                          VECTORS, LAYOUT)  # fmt: skip
    slot = 0
    count = (rows - gl.program_id(0) + clusters - 1) // clusters
    for i in range(count):
        async_copy.wait_group(STAGES - 1 - AHEAD)
        coming = gl.where(slot + AHEAD >= STAGES, slot + AHEAD - STAGES, slot + AHEAD)
        dws, dbs = _share(xs, gs, rings, coming, ws, dws, dbs, base, (i + AHEAD) % PLACES, offset, CENTER, WEIGHT, OFFSET, DX, DW,
                          DB, CTAS, WARPS, VECTORS, LAYOUT)  # fmt: skip
        if DX:
            mean, rstd = _row_statistics(rings, slot, CENTER, LAYOUT)
            _await(base, i % PLACES, i // PLACES & 1)
            along = _received(base, i % PLACES, 0, every, KINDS, CTAS, WARPS) / length * (rstd * rstd)
            if CENTER:
                plain = _received(base, i % PLACES, 1, every, KINDS, CTAS, WARPS) / length
            for u in gl.static_range(VECTORS):
                v = _vector(xs, slot, u, VECTORS, LAYOUT)
                g = _vector(gs, slot, u, VECTORS, LAYOUT)
                if CENTER:
                    v -= mean
                g = _weighted(g * rstd, ws, u, offset, WEIGHT, OFFSET) - v * along
                if CENTER:
                    g -= plain
                if RESIDUAL:
                    g += _vector(hs, slot, u, VECTORS, LAYOUT)
                store(dx + row * (n * UNIT), u, at, end, g, FULL, SPAN)
        _fetch_all(x, dy, dh, stats, xs, gs, hs, rings, slot, row + STAGES * clusters, rows, n, at, end, warp, CENTER, RESIDUAL, UNIT,
                   SPAN, VECTORS)  # fmt: skip
        slot = gl.where(slot + 1 == STAGES, 0, slot + 1)
        row += clusters
    if DX:
        for s in gl.static_range(AHEAD):  # rows behind the last were sent too: no program ends before they are there
            _await(base, (count + s) % PLACES, (count + s) // PLACES & 1)
    async_copy.wait_group(0)
    let_next_kernel_start()  # the adding one, which waits for the end of this one
    mine = partial + gl.program_id(0).to(gl.int64) * (n * (UNIT * (DW + DB)))
    for u in gl.static_range(VECTORS):
        if DW:
            store(mine, u, at, end, dws[u], FULL, SPAN)
        if DB:
            store(mine + n * (UNIT * DW), u, at, end, dbs[u], FULL, SPAN)


@gluon.jit(do_not_specialize=["clusters", "n"])
def _add(partial, dw, db, clusters: "i32", n: "i32", DW: gl.constexpr, DB: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr,
         LAYOUT: gl.constexpr):  # fmt: skip
    """Column sums of [clusters, 4 n (DW + DB)]; the first 4 n columns are dW's, if there are any."""
    wait_for_kernel_before()
    col = gl.program_id(0) * COLS + gl.arange(0, COLS, gl.SliceLayout(0, LAYOUT))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    width = n * (4 * (DW + DB))
    total = gl.zeros([ROWS, COLS], gl.float32, LAYOUT)
    for start in range(0, clusters, ROWS):
        some = (start + row < clusters)[:, None] & (col < width)[None, :]
        total += gl.load(partial + (start + row).to(gl.int64)[:, None] * width + col[None, :], mask=some, other=0.0)
    sums = gl.sum(total, 0)
    if DW:
        gl.store(dw + col, sums.to(dw.dtype.element_ty), mask=col < n * 4)
    if DB:
        at = col - n * (4 * DW)
        gl.store(db + at, sums.to(db.dtype.element_ty), mask=(at >= 0) & (col < width))


# ---- choice -------------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    ctas: int  # programs of a cluster
    num_warps: int
    per_sm: int  # programs of a multiprocessor


class Plan(NamedTuple):
    config: Config
    piece: int  # units of 16 bytes
    vectors: int
    registers: int
    stages: int  # rows under way, in backward


# (bytes of a row, configuration): N-ln-6, K-rms-2048x65536, K-ln-2048x65536, K-rms-4096x32768, K-ln-4096x32768; of float32, which
# needs fewer registers, K-rmsr-2048x16384-fp32
_FORWARD = ((64 << 10, Config(4, 4, 6)), (128 << 10, Config(8, 4, 6)), (256 << 10, Config(8, 8, 3)))
_BACKWARD = {
    2: (
        (32 << 10, Config(2, 16, 1)),
        (64 << 10, Config(8, 8, 2)),
        (128 << 10, Config(16, 8, 2)),
        (256 << 10, Config(16, 16, 1)),
    ),
    4: ((64 << 10, Config(4, 8, 2)), (128 << 10, Config(8, 8, 2)), (256 << 10, Config(16, 8, 2))),
}
_PORTABLE = 8  # programs of a cluster that every Hopper card takes; the others only a whole one
_PORTABLE_BACKWARD = Config(8, 16, 1)
_SHARED = 227 << 10  # of a multiprocessor
_SYSTEM = 1 << 10  # of it for each program
_MOST_STAGES = 4
_SHORTEST, _LONGEST = 32 << 10, 256 << 10  # bytes of a row
_MOST_ROWS = 1 << 20


def choose_config(n: int, itemsize: int, residual: bool, backward: bool, multiprocessors: int) -> Config:
    config = next(c for most, c in (_BACKWARD[itemsize] if backward else _FORWARD) if n * itemsize <= most)
    if multiprocessors < 132 and config.ctas > _PORTABLE:
        config = _PORTABLE_BACKWARD
    if residual and not backward:  # two tensors in registers at first
        config = config._replace(per_sm=config.per_sm * 2 // 3)
    return config


def plan(n: int, itemsize: int, residual: bool, backward: bool, multiprocessors: int) -> Plan:
    config = choose_config(n, itemsize, residual, backward, multiprocessors)
    threads = config.num_warps * 32
    piece = -(-n * itemsize // (16 * config.ctas))
    vectors = -(-piece // threads)
    stages = 0
    if backward:
        exchange = _BARRIERS_BYTES + 8 * 2 * config.ctas * config.num_warps * 4
        row = (2 + residual) * vectors * threads * 16 + 2 * config.num_warps * 4
        stages = min(_MOST_STAGES, (_SHARED // config.per_sm - _SYSTEM - exchange) // row)
    return Plan(config, piece, vectors, 65536 // (threads * config.per_sm) // 8 * 8, stages)


# Behind 32768 columns the portable forward reads a row twice. The portable backward does behind 16384, and of 16384 it spills dW
# and db.
_FORWARD_BEHIND, _BACKWARD_FROM = 32768, 16384


def wins(tensors: tuple, n: int, kind: str | None, p: float, backward: bool) -> bool:
    """Whether a pass that reads ``tensors`` runs here, faster than in the portable kernels and without a copy."""
    return (
        (n >= _BACKWARD_FROM if backward else n > _FORWARD_BEHIND)
        and unsupported(tensors, n, kind, p) is None
        and all(t is None or (t.is_contiguous() and not t.data_ptr() % 16) for t in tensors)
    )


def unsupported(tensors: tuple, n: int, kind: str | None, p: float) -> str | None:
    """Why these kernels cannot run the call, or None. ``tensors``: x first, None where there is none."""
    x = tensors[0]
    for t in tensors:
        if t is None:
            continue
        if t.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"needs float16, bfloat16 or float32, got {str(t.dtype).removeprefix('torch.')}"
        if not x.is_cuda:
            return f"needs a GPU tensor, got {x.device.type}"
        if t.device != x.device:
            return f"needs tensors on one GPU, got {x.device} and {t.device}"
        if t.layout != torch.strided or t.is_nested:
            return "needs strided tensors, got " + ("a nested tensor" if t.is_nested else str(t.layout))
    if not _is_hopper(x.get_device()):
        return "needs a GPU of compute capability 9.0"
    if kind:
        return f"takes no activation behind it, got {kind!r}"
    if p:
        return f"takes no dropout, got {p}"
    if not x.numel():
        return "needs elements, got none"
    return refused(x.numel() // n, n, x.element_size(), _multiprocessors(x.get_device()))


@functools.lru_cache(4096)
def refused(rows: int, n: int, itemsize: int, multiprocessors: int) -> str | None:
    if n * itemsize % 16:
        return "needs rows of a multiple of 16 bytes"
    if n * itemsize < _SHORTEST:
        return f"takes rows of {_SHORTEST} bytes and more, got {n * itemsize}"
    if n * itemsize > _LONGEST or (multiprocessors < 132 and n * itemsize > 128 << 10):
        return f"keeps pieces of a row in registers, {n} elements are too many"
    if rows > _MOST_ROWS:
        return f"takes up to {_MOST_ROWS} rows, got {rows}"
    return None


def describe(x: Tensor, n: int, backward: bool = False, residual: bool = False) -> str:
    p = plan(n, x.element_size(), residual, backward, _multiprocessors(x.get_device()))
    text = f"rows in clusters of {p.config.ctas} programs, {p.config.num_warps} warps each"
    return f"{text}, {p.stages} rows under way" if backward else text


# ---- launches -----------------------------------------------------------------------------------------------------------


def forward(x, weight, bias, n: int, norm, eps: float, offset: float, save: bool):
    """(y, statistics for backward or None), as the portable kernels give them."""
    y, _, stats = forward_residual(x, None, weight, bias, None, n, norm, eps, offset, 0.0, save)
    return y, stats


def forward_residual(x, residual, weight, bias, seed, n: int, norm, eps: float, offset: float, p: float, save: bool):
    """(y, h, statistics): h = x + residual, y its norm. Without a residual h is x. There is no dropout: no seed, p = 0."""
    x, residual, weight, bias = (_dense(t) for t in (x, residual, weight, bias))
    y = torch.empty_like(x)
    h = x if residual is None else torch.empty_like(x)
    rows, device = x.numel() // n, x.get_device()
    stats = x.new_empty(rows * (1 + norm.center), dtype=torch.float32) if save else None
    run = _forward_launch(
        n, x.dtype, weight is not None and weight.dtype, bias is not None and bias.dtype, norm.center, residual is not None, save,
        offset != 0.0, device,
    )  # fmt: skip
    addresses = [(x if t is None else t).data_ptr() for t in (x, residual, weight, bias, y, h, stats)]
    run.binary(rows, raw_stream(device), (*addresses, rows, *run.lengths, eps, offset))
    return y, h, stats


def backward(x, dy, dh, weight, bias, stats, seed, n: int, norm, offset: float, p: float, wanted):
    """(dx, d_residual, dw, db), None for what is not wanted; d_residual is dx."""
    x, dy, dh, weight = (_dense(t) for t in (x, dy, dh, weight))
    dx = torch.empty_like(x) if wanted.dx else None
    dw = torch.empty_like(weight) if wanted.dw else None
    db = torch.empty_like(bias, memory_format=torch.contiguous_format) if wanted.db else None
    rows, device = x.numel() // n, x.get_device()
    run = _backward_launch(
        n, x.dtype, weight is not None and weight.dtype, norm.center, dh is not None, tuple(wanted), offset != 0.0,
        device,
    )  # fmt: skip
    clusters, added = share(rows, run.clusters), wanted.dw + wanted.db
    partial = x.new_empty(max(1, clusters * n * added), dtype=torch.float32)
    addresses = [(x if t is None else t).data_ptr() for t in (x, dy, dh, weight, stats, dx, partial)]
    run.binary(clusters, raw_stream(device), (*addresses, rows, *run.lengths, offset))
    if added:
        add = _add_binary(wanted.dw and dw.dtype, wanted.db and db.dtype, device)
        addresses = [(partial if t is None else t).data_ptr() for t in (partial, dw, db)]
        add(-(-n * added // _COLS), raw_stream(device), (*addresses, clusters, n // 4))
    return dx, dx, dw, db


def share(rows: int, clusters: int) -> int:
    """Less the clusters that an even share of the rows leaves without work."""
    return -(-rows // -(-rows // clusters))


def _dense(t: Tensor | None) -> Tensor | None:
    if t is None or (t.is_contiguous() and not t.data_ptr() % 16):
        return t
    return t.clone(memory_format=torch.contiguous_format)


class _Launch(NamedTuple):
    binary: Binary
    clusters: int  # that the card holds at a time
    lengths: tuple


@functools.lru_cache(4096)
def _forward_launch(n, dtype, weight, bias, center, residual, save, offset, device) -> _Launch:
    flags = {"CENTER": center, "WEIGHT": bool(weight), "BIAS": bool(bias), "RESIDUAL": residual, "SAVE": save}
    flags["OFFSET"] = offset
    kinds = (dtype, dtype, weight or dtype, bias or dtype, dtype, dtype, torch.float32)
    return _launch(False, n, dtype.itemsize, kinds, flags, device)


@functools.lru_cache(4096)
def _backward_launch(n, dtype, weight, center, residual, wanted, offset, device) -> _Launch:
    flags = {"CENTER": center, "WEIGHT": bool(weight), "RESIDUAL": residual}
    flags |= dict(zip(("DX", "DW", "DB"), wanted, strict=True)) | {"OFFSET": offset}
    kinds = (dtype, dtype, dtype, weight or dtype, torch.float32, dtype, torch.float32)
    return _launch(True, n, dtype.itemsize, kinds, flags, device)


def _launch(backward, n, itemsize, kinds, flags, device) -> _Launch:
    p = plan(n, itemsize, flags["RESIDUAL"], backward, _multiprocessors(device))
    given = flags | constants(p, n, itemsize, backward)
    binary = _binary(backward, kinds, p.config, p.registers, tuple(given.items()), device)
    clusters = _resident(binary, p.config, device) if backward else 0
    return _Launch(binary, clusters, (n * itemsize // 16, p.piece, float(n)))


@functools.lru_cache(4096)
def _binary(backward: bool, kinds: tuple, config: Config, registers: int, given: tuple, device: int) -> Binary:
    examples = (
        *(torch.empty(256, dtype=kind, device=device) for kind in kinds),
        16,
        16,
        16,
        *(1.0,) * (2 if backward else 3),
    )
    return Binary(
        _backward if backward else _forward, device, examples, dict(given), num_warps=config.num_warps, num_ctas=config.ctas,
        maxnreg=registers,
    )  # fmt: skip


def _resident(binary: Binary, config: Config, device: int) -> int:
    """Clusters that the card holds at a time: fewer than its multiprocessors / CTAS, for a cluster lies within one of its parts (of
    132, seven of 16 and fifteen of 8). One cluster more would start when the first has ended."""
    half = max(binary.compiled.metadata.shared, _SHARED >> 1)  # so much shared memory that a multiprocessor takes one
    with torch.cuda.device(device):
        alone = driver.active.utils.cuOccupancyMaxActiveClusters(binary.compiled.function, half, config.ctas)
    return max(1, alone) * config.per_sm


def constants(p: Plan, n: int, itemsize: int, backward: bool) -> dict:
    ctas, num_warps, _ = p.config
    unit, lines = 16 // itemsize, [[1 << b, 0, 0] for b in range(ctas.bit_length() - 1)]
    shortest = max(0, n // unit - (ctas - 1) * p.piece)
    given = {
        "UNIT": unit, "CTAS": ctas, "WARPS": num_warps, "SPAN": num_warps * 32 * unit, "VECTORS": p.vectors,
        "FULL": min(p.piece, shortest) // (num_warps * 32),
        "LAYOUT": gl.BlockedLayout([1, 1, unit], [1, 1, 32], [1, num_warps, 1], [2, 1, 0], cga_layout=lines),
        "ALL": gl.BlockedLayout([max(1, ctas * num_warps // 32)], [32], [num_warps], [0], cga_layout=[[0]] * len(lines)),
    }  # fmt: skip
    if backward:
        given |= {"STAGES": p.stages, "AHEAD": min(2, p.stages - 2)}
        given["RING"] = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0], cga_layout=lines)
        given["SMALL"] = gl.SwizzledSharedLayout(1, 1, 1, [1, 0], cga_layout=[line[:2] for line in lines])
    return given


_ROWS, _COLS = 64, 32  # of the adding kernel's tile


@functools.cache
def _add_binary(dw, db, device: int) -> Binary:
    kinds = (torch.float32, dw or torch.float32, db or torch.float32)
    examples = (*(torch.empty(256, dtype=kind, device=device) for kind in kinds), 16, 16)
    return Binary(_add, device, examples, adding(bool(dw), bool(db)), num_warps=4, launch_pdl=True)


def adding(dw: bool, db: bool) -> dict:
    return {
        "DW": dw,
        "DB": db,
        "ROWS": _ROWS,
        "COLS": _COLS,
        "LAYOUT": gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]),
    }
