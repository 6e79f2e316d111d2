"""Portable Triton LayerNorm and RMSNorm, plain, with a fused residual, and with an activation behind.

A program holds ROWS whole rows of N columns in registers (float32). Backward programs are persistent: each walks many rows,
keeps its share of dW and db in registers, and leaves one float32 partial row; a second small kernel adds the partials in a
fixed order, so results are the same bits on every run. Rows too wide for registers take the wide kernels: the forward reads
a row twice, in reverse the second time, so that much of it still lies in the L2 cache; the backward reads its inputs twice.

Floor: forward 2, backward 3 (read x, dy; write dx); residual forward 4 (read x, r; write y, h), backward 4 tensors of rows x N.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trinix.kernels.triton import activation
from trinix.kernels.triton._compile import POINTERS, compile_case
from trinix.kernels.triton._launch import (
    INTERPRETED,
    Launch,
    Launcher,
    Repeated,
    by_table,  # noqa: F401  (the op's)
)


@triton.jit
def _tile(t, row, col, inner, s0, s1, N: tl.constexpr, UNIT: tl.constexpr):
    """Pointers of rows x columns. UNIT 0: dense rows; else a row is (row // inner, row % inner) with strides s0, s1 * UNIT."""
    if UNIT == 0:
        at = row * N
    else:
        at = (row // inner * s0 + row % inner * s1) * UNIT
    return t + at[:, None] + col[None, :]


@triton.jit
def _keep(seed, row, col, p, N: tl.constexpr):
    """Dropout's mask of a tile: a pure function of the seed and the element's place."""
    return tl.rand(tl.load(seed), row[:, None] * N + col[None, :]) >= p


@triton.jit
def _statistics(v, live, eps, N: tl.constexpr, CENTER: tl.constexpr, FULL: tl.constexpr):
    """(v - mean, mean, 1 / deviation) of each row; masked columns of v are 0."""
    if CENTER:
        mean = tl.sum(v, 1) / N
        v = tl.where(live, v - mean[:, None], 0.0)
        if FULL:  # float32 inputs show the rounding of a large mean: take off what is left of it
            v = tl.where(live, v - (tl.sum(v, 1) / N)[:, None], 0.0)
    else:
        mean = tl.zeros_like(tl.sum(v, 1))
    rstd = tl.rsqrt(tl.sum(v * v, 1) / N + eps)
    return v, mean, rstd


@triton.jit
def _parameter(t, col, live, GIVEN: tl.constexpr):
    # loaded as [1, BLOCK]: w[None, :] of a vector would change its layout through shared memory
    p = 0.0
    if GIVEN:
        p = tl.load(t + col[None, :], mask=live, other=0.0)
    return p


@triton.jit
def _scaled(v, w, b, offset, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    if WEIGHT:
        v = v * (w.to(tl.float32) + offset)
    if BIAS:
        v = v + b.to(tl.float32)
    return v


@triton.jit
def _affine(v, weight, bias, col, live, offset, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    w = _parameter(weight, col, live, WEIGHT)
    b = _parameter(bias, col, live, BIAS)
    return _scaled(v, w, b, offset, WEIGHT, BIAS)


# exp and 1 / x take care of denormal numbers, in 5 and 6 instructions; the sums of a row's backward leave no time for them.
# Here a denormal e is as good as 0, and the divisor is never below 2.


@triton.jit
def _mish_dx_flushed(x, dy, a, b):
    """``activation``'s derivative of mish, on NVIDIA: 14 instructions an element for 28."""
    x = tl.where(x > 20.0, 20.0, x)
    e = _approximate("ex2.approx.ftz.f32 $0, $1;", x * 1.4426950408889634)
    m = e * e + e
    n = m + e
    r = _approximate("rcp.approx.ftz.f32 $0, $1;", n + 2.0)
    return dy * (r * (n + (4.0 * x) * (m * r)))


@triton.jit
def _approximate(INSTRUCTION: tl.constexpr, x):
    return tl.inline_asm_elementwise(INSTRUCTION, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["rows", "xi", "xs0", "xs1"])
def _forward(
    x, weight, bias, y, stats, rows: "i64", xi: "i64", xs0: "i64", xs1: "i64", eps: "fp32", offset: "fp32",
    N: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
    SAVE: tl.constexpr, X_UNIT: tl.constexpr, DEPENDENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()  # a product of one row may come in now, and fetch its weights
    EARLY: tl.constexpr = BLOCK <= 4096  # in wider rows weight and bias would take registers that the row needs
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    live = (col < N)[None, :]
    some = live & (row < rows)[:, None]
    v = tl.load(_tile(x, row, col, xi, xs0, xs1, N, X_UNIT), mask=some, other=0.0).to(tl.float32)
    if EARLY:  # under way while the threads meet for the statistics
        w = _parameter(weight, col, live, WEIGHT)
        b = _parameter(bias, col, live, BIAS)
    v, mean, rstd = _statistics(v, live, eps, N, CENTER, x.dtype.element_ty == tl.float32)
    if SAVE:
        tl.store(stats + row, rstd, mask=row < rows)
        if CENTER:
            tl.store(stats + rows + row, mean, mask=row < rows)
    if not EARLY:
        w = _parameter(weight, col, live, WEIGHT)
        b = _parameter(bias, col, live, BIAS)
    v = _scaled(v * rstd[:, None], w, b, offset, WEIGHT, BIAS)
    if ACT is not None:
        v = ACT(v, 0.0, 0.0)
    tl.store(_tile(y, row, col, 1, 1, 1, N, 0), v.to(y.dtype.element_ty), mask=some)


@triton.jit(do_not_specialize=["rows", "xi", "xs0", "xs1", "ri", "rs0", "rs1"])
def _forward_residual(
    x, residual, weight, bias, y, h, stats, seed, rows: "i64", xi: "i64", xs0: "i64", xs1: "i64", ri: "i64", rs0: "i64",
    rs1: "i64", eps: "fp32", offset: "fp32", p: "fp32", scale: "fp32",
    N: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    SAVE: tl.constexpr, X_UNIT: tl.constexpr, R_UNIT: tl.constexpr, DEPENDENT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    live = (col < N)[None, :]
    some = live & (row < rows)[:, None]
    v = tl.load(_tile(x, row, col, xi, xs0, xs1, N, X_UNIT), mask=some, other=0.0).to(tl.float32)
    r = tl.load(_tile(residual, row, col, ri, rs0, rs1, N, R_UNIT), mask=some, other=0.0).to(tl.float32)
    if DROPOUT:
        v = tl.where(_keep(seed, row, col, p, N), v * scale, 0.0)
    total = (v + r).to(h.dtype.element_ty)
    tl.store(_tile(h, row, col, 1, 1, 1, N, 0), total, mask=some)
    # what is normalised is what is stored, rounding included: backward reads it
    v, mean, rstd = _statistics(total.to(tl.float32), live, eps, N, CENTER, h.dtype.element_ty == tl.float32)
    if SAVE:
        tl.store(stats + row, rstd, mask=row < rows)
        if CENTER:
            tl.store(stats + rows + row, mean, mask=row < rows)
    v = _affine(v * rstd[:, None], weight, bias, col, live, offset, WEIGHT, BIAS)
    tl.store(_tile(y, row, col, 1, 1, 1, N, 0), v.to(y.dtype.element_ty), mask=some)


@triton.jit(do_not_specialize=["rows", "xi", "xs0", "xs1", "gi", "gs0", "gs1"])
def _backward(
    x, dy, dh, weight, bias, stats, seed, dx, dr, partial, rows: "i64", xi: "i64", xs0: "i64", xs1: "i64", gi: "i64",
    gs0: "i64", gs1: "i64", offset: "fp32", p: "fp32", scale: "fp32",
    N: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr,
    X_UNIT: tl.constexpr, G_UNIT: tl.constexpr, DEPENDENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, KEPT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    col = tl.arange(0, BLOCK)
    live = (col < N)[None, :]
    if WEIGHT:
        w = tl.load(weight + col[None, :], mask=live, other=0.0).to(tl.float32) + offset
    if ACT is not None:
        b = _parameter(bias, col, live, BIAS)
    dw = tl.zeros((KEPT, BLOCK), tl.float32)
    db = tl.zeros((KEPT, BLOCK), tl.float32)
    if AHEAD:
        row = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        some = live & (row < rows)[:, None]
        next_x = tl.load(_tile(x, row, col, xi, xs0, xs1, N, X_UNIT), mask=some, other=0.0)
        next_dy = tl.load(_tile(dy, row, col, gi, gs0, gs1, N, G_UNIT), mask=some, other=0.0)
    for i in tl.range(0, tl.cdiv(rows, programs.to(tl.int64) * ROWS).to(tl.int32), num_stages=STAGES):
        row = (i * programs + pid).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        some = live & (row < rows)[:, None]
        if AHEAD:
            v = next_x.to(tl.float32)
            g = next_dy.to(tl.float32)
            later = row + programs.to(tl.int64) * ROWS
            coming = live & (later < rows)[:, None]
            next_x = tl.load(_tile(x, later, col, xi, xs0, xs1, N, X_UNIT), mask=coming, other=0.0)
            next_dy = tl.load(_tile(dy, later, col, gi, gs0, gs1, N, G_UNIT), mask=coming, other=0.0)
        else:
            v = tl.load(_tile(x, row, col, xi, xs0, xs1, N, X_UNIT), mask=some, other=0.0).to(tl.float32)
            g = tl.load(_tile(dy, row, col, gi, gs0, gs1, N, G_UNIT), mask=some, other=0.0).to(tl.float32)
        rstd = tl.load(stats + row, mask=row < rows, other=0.0)
        if CENTER:
            v = v - tl.load(stats + rows + row, mask=row < rows, other=0.0)[:, None]
        v = v * rstd[:, None]  # columns past N: their g is 0
        if ACT is not None:
            u = v
            if WEIGHT:
                u = u * w
            if BIAS:
                u = u + b.to(tl.float32)
            g = ACT(u, g, 0.0, 0.0)
        if DW:
            dw += g * v if KEPT == ROWS else tl.sum(g * v, 0, keep_dims=True)
        if DB:
            db += g if KEPT == ROWS else tl.sum(g, 0, keep_dims=True)
        if DX:
            if WEIGHT:
                g = g * w
            g = g - v * (tl.sum(g * v, 1) / N)[:, None] - ((tl.sum(g, 1) / N)[:, None] if CENTER else 0.0)
            g = g * rstd[:, None]
            if RESIDUAL:
                g += tl.load(_tile(dh, row, col, 1, 1, 1, N, 0), mask=some, other=0.0).to(tl.float32)
            if DROPOUT:
                tl.store(_tile(dr, row, col, 1, 1, 1, N, 0), g.to(dr.dtype.element_ty), mask=some)
                g = tl.where(_keep(seed, row, col, p, N), g * scale, 0.0)
            tl.store(_tile(dx, row, col, 1, 1, 1, N, 0), g.to(dx.dtype.element_ty), mask=some)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()  # the adding kernel may come in now; it waits for the end of this one
    mine = partial + pid.to(tl.int64) * N * (DW + DB)
    if DW:
        tl.store(mine + col, tl.sum(dw, 0), mask=col < N)
    if DB:
        tl.store(mine + N * DW + col, tl.sum(db, 0), mask=col < N)


@triton.jit(do_not_specialize=["programs"])
def _add_partials(partial, dw, db, programs: "i32", N: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr,
                  DEPENDENT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Column sums of [programs, N * (DW + DB)]; the first N columns are dW's, if there are any."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    width = N * (DW + DB)
    col = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        some = (row < programs)[:, None] & (col < width)[None, :]
        total += tl.load(partial + row[:, None].to(tl.int64) * width + col[None, :], mask=some, other=0.0)
    sums = tl.sum(total, 0)
    if DW:
        tl.store(dw + col, sums.to(dw.dtype.element_ty), mask=col < N)
    if DB:
        at = col - N * DW
        tl.store(db + at, sums.to(db.dtype.element_ty), mask=(at >= 0) & (at < N))


# ---- rows that fill the registers: four chunks of columns, one after the other ------------------------------------------


@triton.jit
def _chunk_sums(x, dy, weight, row, mean, rstd, xi, xs0, xs1, gi, gs0, gs1, offset, dw, db, along, plain,
                START: tl.constexpr, N: tl.constexpr, WEIGHT: tl.constexpr, X_UNIT: tl.constexpr, G_UNIT: tl.constexpr,
                CHUNK: tl.constexpr):  # fmt: skip
    """(x, dy) of a chunk as loaded; its share of dW, db, and of the row's sums of g * v and g."""
    col = START + tl.arange(0, CHUNK)
    live = (col < N)[None, :]
    x = tl.load(_tile(x, row, col, xi, xs0, xs1, N, X_UNIT), mask=live, other=0.0)
    dy = tl.load(_tile(dy, row, col, gi, gs0, gs1, N, G_UNIT), mask=live, other=0.0)
    v = (x.to(tl.float32) - mean) * rstd
    g = dy.to(tl.float32)
    dw += g * v
    db += g
    g = _affine(g, weight, weight, col, live, offset, WEIGHT, False)
    return x, dy, dw, db, along + g * v, plain + g


@triton.jit
def _chunk_dx(x, dy, dh, weight, dx, row, mean, rstd, along, plain, offset,
              START: tl.constexpr, N: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr,
              CHUNK: tl.constexpr):  # fmt: skip
    col = START + tl.arange(0, CHUNK)
    live = (col < N)[None, :]
    v = (x.to(tl.float32) - mean) * rstd
    g = _affine(dy.to(tl.float32), weight, weight, col, live, offset, WEIGHT, False) - v * along
    if CENTER:
        g = g - plain
    g = g * rstd
    if RESIDUAL:
        g += tl.load(_tile(dh, row, col, 1, 1, 1, N, 0), mask=live, other=0.0).to(tl.float32)
    tl.store(_tile(dx, row, col, 1, 1, 1, N, 0), g.to(dx.dtype.element_ty), mask=live)


# fmt: off
@triton.jit(do_not_specialize=["rows", "xi", "xs0", "xs1", "gi", "gs0", "gs1"])
def _backward_chunks(
    x, dy, dh, weight, stats, dx, partial, rows: "i64", xi: "i64", xs0: "i64", xs1: "i64", gi: "i64", gs0: "i64",
    gs1: "i64", offset: "fp32",
    N: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr, DX: tl.constexpr,
    DW: tl.constexpr, DB: tl.constexpr, X_UNIT: tl.constexpr, G_UNIT: tl.constexpr, DEPENDENT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``_backward`` for N in (2 CHUNK, 4 CHUNK], no activation, no dropout: few float32 values of a row live at a time."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    zero = tl.zeros((1, CHUNK), tl.float32)
    dw0, dw1, dw2, dw3, db0, db1, db2, db3 = zero, zero, zero, zero, zero, zero, zero, zero
    for i in tl.range(0, tl.cdiv(rows - pid, programs).to(tl.int32)):
        row = (i * programs + pid).to(tl.int64) + tl.arange(0, 1)
        rstd = tl.load(stats + row)[:, None]
        mean = tl.load(stats + rows + row)[:, None] if CENTER else 0.0
        x0, g0, dw0, db0, along, plain = _chunk_sums(x, dy, weight, row, mean, rstd, xi, xs0, xs1, gi, gs0, gs1, offset, dw0, db0, zero, zero,
            0, N, WEIGHT, X_UNIT, G_UNIT, CHUNK)
        x1, g1, dw1, db1, along, plain = _chunk_sums(x, dy, weight, row, mean, rstd, xi, xs0, xs1, gi, gs0, gs1, offset, dw1, db1, along, plain,
            CHUNK, N, WEIGHT, X_UNIT, G_UNIT, CHUNK)
        x2, g2, dw2, db2, along, plain = _chunk_sums(x, dy, weight, row, mean, rstd, xi, xs0, xs1, gi, gs0, gs1, offset, dw2, db2, along, plain,
            2 * CHUNK, N, WEIGHT, X_UNIT, G_UNIT, CHUNK)
        if N > 3 * CHUNK:
            x3, g3, dw3, db3, along, plain = _chunk_sums(x, dy, weight, row, mean, rstd, xi, xs0, xs1, gi, gs0, gs1, offset, dw3, db3, along, plain,
                3 * CHUNK, N, WEIGHT, X_UNIT, G_UNIT, CHUNK)
        if DX:
            a = (tl.sum(along, 1) / N)[:, None]
            p = (tl.sum(plain, 1) / N)[:, None]
            _chunk_dx(x0, g0, dh, weight, dx, row, mean, rstd, a, p, offset, 0, N, CENTER, WEIGHT, RESIDUAL, CHUNK)
            _chunk_dx(x1, g1, dh, weight, dx, row, mean, rstd, a, p, offset, CHUNK, N, CENTER, WEIGHT, RESIDUAL, CHUNK)
            _chunk_dx(x2, g2, dh, weight, dx, row, mean, rstd, a, p, offset, 2 * CHUNK, N, CENTER, WEIGHT, RESIDUAL, CHUNK)
            if N > 3 * CHUNK:
                _chunk_dx(x3, g3, dh, weight, dx, row, mean, rstd, a, p, offset, 3 * CHUNK, N, CENTER, WEIGHT, RESIDUAL, CHUNK)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    mine = partial + pid.to(tl.int64) * N * (DW + DB)
    if DW:
        _store_chunks(mine, dw0, dw1, dw2, dw3, N, CHUNK)
    if DB:
        _store_chunks(mine + N * DW, db0, db1, db2, db3, N, CHUNK)
# fmt: on


@triton.jit
def _store_chunks(to, c0, c1, c2, c3, N: tl.constexpr, CHUNK: tl.constexpr):
    col = tl.arange(0, CHUNK)[None, :]
    tl.store(to + col, c0)
    tl.store(to + CHUNK + col, c1)
    tl.store(to + 2 * CHUNK + col, c2, mask=2 * CHUNK + col < N)
    if N > 3 * CHUNK:
        tl.store(to + 3 * CHUNK + col, c3, mask=3 * CHUNK + col < N)


# ---- rows wider than registers ----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "xi", "xs0", "xs1", "ri", "rs0", "rs1"])
def _forward_wide(
    x, residual, weight, bias, y, h, stats, seed, rows: "i64", xi: "i64", xs0: "i64", xs1: "i64", ri: "i64", rs0: "i64",
    rs1: "i64", eps: "fp32", offset: "fp32", p: "fp32", scale: "fp32",
    N: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr, SAVE: tl.constexpr, X_UNIT: tl.constexpr, R_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mean = tl.zeros((1,), tl.float32)
    square = tl.zeros((1,), tl.float32)  # sum of (v - mean)^2 so far, or of v^2
    for start in tl.range(0, N, BLOCK):
        col = start + tl.arange(0, BLOCK)
        live = (col < N)[None, :]
        v = tl.load(_tile(x, row, col, xi, xs0, xs1, N, X_UNIT), mask=live, other=0.0).to(tl.float32)
        if RESIDUAL:
            r = tl.load(_tile(residual, row, col, ri, rs0, rs1, N, R_UNIT), mask=live, other=0.0).to(tl.float32)
            if DROPOUT:
                v = tl.where(_keep(seed, row, col, p, N), v * scale, 0.0)
            total = (v + r).to(h.dtype.element_ty)
            tl.store(_tile(h, row, col, 1, 1, 1, N, 0), total, mask=live)
            v = total.to(tl.float32)
        if CENTER:  # Chan's update: exact inside a block, no cancellation between blocks
            count = tl.minimum(N - start, BLOCK).to(tl.float32)
            here = tl.sum(v, 1) / count
            v = tl.where(live, v - here[:, None], 0.0)
            delta = here - mean
            mean += delta * (count / (start + count))
            square += delta * delta * (start * count / (start + count))
        square += tl.sum(v * v, 1)
    rstd = tl.rsqrt(square / N + eps)
    if SAVE:
        tl.store(stats + row, rstd)
        if CENTER:
            tl.store(stats + rows + row, mean)
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    for back in tl.range(0, blocks):  # the end of the row was read last: it is the likeliest to be in a cache
        col = (blocks - 1 - back) * BLOCK + tl.arange(0, BLOCK)
        live = (col < N)[None, :]
        if RESIDUAL:
            v = tl.load(_tile(h, row, col, 1, 1, 1, N, 0), mask=live, other=0.0).to(tl.float32)
        else:
            v = tl.load(_tile(x, row, col, xi, xs0, xs1, N, X_UNIT), mask=live, other=0.0).to(tl.float32)
        v = (v - mean[:, None]) * rstd[:, None]
        v = _affine(v, weight, bias, col, live, offset, WEIGHT, BIAS)
        if ACT is not None:
            v = ACT(v, 0.0, 0.0)
        tl.store(_tile(y, row, col, 1, 1, 1, N, 0), v.to(y.dtype.element_ty), mask=live)


@triton.jit
def _wide_gradient(x, dy, weight, bias, row, col, live, mean, rstd, xi, xs0, xs1, gi, gs0, gs1, offset,
                   N: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
                   X_UNIT: tl.constexpr, G_UNIT: tl.constexpr):  # fmt: skip
    """(normalised x, gradient before the weight) of a tile."""
    v = tl.load(_tile(x, row, col, xi, xs0, xs1, N, X_UNIT), mask=live, other=0.0).to(tl.float32)
    g = tl.load(_tile(dy, row, col, gi, gs0, gs1, N, G_UNIT), mask=live, other=0.0).to(tl.float32)
    v = (v - mean[:, None]) * rstd[:, None]
    if ACT is not None:
        g = ACT(_affine(v, weight, bias, col, live, offset, WEIGHT, BIAS), g, 0.0, 0.0)
    return v, g


@triton.jit(do_not_specialize=["rows", "xi", "xs0", "xs1", "gi", "gs0", "gs1"])
def _backward_wide_sums(
    x, dy, weight, bias, stats, sums, rows: "i64", xi: "i64", xs0: "i64", xs1: "i64", gi: "i64", gs0: "i64", gs1: "i64",
    offset: "fp32",
    N: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
    X_UNIT: tl.constexpr, G_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means of g and of g * normalised x over a row: what dx needs of the whole row."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    rstd = tl.load(stats + row)
    mean = tl.load(stats + rows + row) if CENTER else tl.zeros((1,), tl.float32)
    plain = tl.zeros((1,), tl.float32)
    along = tl.zeros((1,), tl.float32)
    for start in tl.range(0, N, BLOCK):
        col = start + tl.arange(0, BLOCK)
        live = (col < N)[None, :]
        v, g = _wide_gradient(x, dy, weight, bias, row, col, live, mean, rstd, xi, xs0, xs1, gi, gs0, gs1, offset,
                              N, WEIGHT, BIAS, ACT, X_UNIT, G_UNIT)  # fmt: skip
        if WEIGHT:
            g = g * (tl.load(weight + col[None, :], mask=live, other=0.0).to(tl.float32) + offset)
        g = tl.where(live, g, 0.0)
        plain += tl.sum(g, 1)
        along += tl.sum(g * v, 1)
    tl.store(sums + row, along / N)
    tl.store(sums + rows + row, plain / N)


@triton.jit(do_not_specialize=["rows", "xi", "xs0", "xs1", "gi", "gs0", "gs1"])
def _backward_wide(
    x, dy, dh, weight, bias, stats, sums, seed, dx, dr, partial, rows: "i64", xi: "i64", xs0: "i64", xs1: "i64",
    gi: "i64", gs0: "i64", gs1: "i64", offset: "fp32", p: "fp32", scale: "fp32",
    N: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr,
    X_UNIT: tl.constexpr, G_UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    group = tl.program_id(0) // blocks
    groups = tl.num_programs(0) // blocks
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = (col < N)[None, :]
    if WEIGHT:
        w = tl.load(weight + col[None, :], mask=live, other=0.0).to(tl.float32) + offset
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.range(0, tl.cdiv(rows, groups * ROWS).to(tl.int32)):
        row = (i * groups + group).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        here = row < rows
        some = live & here[:, None]
        rstd = tl.load(stats + row, mask=here, other=0.0)
        mean = tl.load(stats + rows + row, mask=here, other=0.0) if CENTER else tl.zeros((ROWS,), tl.float32)
        v, g = _wide_gradient(x, dy, weight, bias, row, col, some, mean, rstd, xi, xs0, xs1, gi, gs0, gs1, offset,
                              N, WEIGHT, BIAS, ACT, X_UNIT, G_UNIT)  # fmt: skip
        g = tl.where(some, g, 0.0)
        if DW:
            dw += g * v
        if DB:
            db += g
        if DX:
            if WEIGHT:
                g = g * w
            g = g - v * tl.load(sums + row, mask=here, other=0.0)[:, None]
            if CENTER:
                g = g - tl.load(sums + rows + row, mask=here, other=0.0)[:, None]
            g = g * rstd[:, None]
            if RESIDUAL:
                g += tl.load(_tile(dh, row, col, 1, 1, 1, N, 0), mask=some, other=0.0).to(tl.float32)
            if DROPOUT:
                tl.store(_tile(dr, row, col, 1, 1, 1, N, 0), g.to(dr.dtype.element_ty), mask=some)
                g = tl.where(_keep(seed, row, col, p, N), g * scale, 0.0)
            tl.store(_tile(dx, row, col, 1, 1, 1, N, 0), g.to(dx.dtype.element_ty), mask=some)
    mine = partial + group.to(tl.int64) * N * (DW + DB)
    if DW:
        tl.store(mine + col, tl.sum(dw, 0), mask=col < N)
    if DB:
        tl.store(mine + N * DW + col, tl.sum(db, 0), mask=col < N)


# ---- the choice, the launches -----------------------------------------------------------------------------------------

_FORWARD = Launcher(_forward, tensors=5)
_FORWARD_RESIDUAL = Launcher(_forward_residual, tensors=8)
_FORWARD_WIDE = Launcher(_forward_wide, tensors=8)
_BACKWARD = Launcher(_backward, tensors=10)
_ADD_PARTIALS = Launcher(_add_partials, tensors=3)
_BACKWARD_CHUNKS = Launcher(_backward_chunks, tensors=7)
_BACKWARD_WIDE_SUMS = Launcher(_backward_wide_sums, tensors=6)
_BACKWARD_WIDE = Launcher(_backward_wide, tensors=11)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLUSHED = {"mish": _mish_dx_flushed}  # derivatives instead, on NVIDIA
CHUNK = 4096  # columns at a time of ``_backward_chunks``
WIDE_FORWARD_BLOCK = (
    16384  # columns at a time of the kernels that walk a wide row: few programs, so that L2 holds their rows
)
WIDE_SUMS_BLOCK = 4096
WIDE_TILE = (2, 2048)  # rows, columns at a time of the one that walks columns


class Norm(NamedTuple):
    """What a call computes, apart from sizes: part of every key."""

    center: bool  # LayerNorm; False is RMSNorm
    kind: str | None = None  # activation behind it


class ForwardConfig(NamedTuple):
    rows: int  # rows of a program
    num_warps: int


class BackwardConfig(NamedTuple):
    rows: int
    num_warps: int
    num_stages: int  # rows in flight, through shared memory from 2 on
    programs_per_sm: int
    kept: int | None = None  # rows of dW's and db's sums in registers: as many as a program's, or 1
    ahead: bool = False  # the next rows are loaded into registers while these are used


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def choose_forward(n: int, itemsize: int, lanes: int) -> ForwardConfig | None:
    """Rows and warps of a forward program; None: the row is too wide for registers.

    From K-ln-* and K-rms-*: all within 2% of the best of 2 to 19 tried at each width.
    """
    block = _power_of_two(n)
    if block > 32768:
        return None
    rows, warps = {
        256: (8, 2) if itemsize == 4 else (4, 1),
        512: (4, 2),
        1024: (2, 4),
        2048: (2, 8),
        4096: (1, 16) if itemsize == 4 else (1, 8),
        32768: (1, 32),
    }.get(block, (max(1, 1024 // block), 4) if block < 256 else (1, 16))
    return ForwardConfig(rows, max(1, warps * 32 // lanes))


def choose_backward(
    n: int, itemsize: int, lanes: int, residual: bool = False, kind: str | None = None
) -> BackwardConfig | None:
    """Rows, warps and stages of a backward program, and programs a multiprocessor; None: too wide for registers.

    From K-ln-* and K-rms-*, the best of 2 to 171 tried; two programs where an activation has one wait for its arithmetic
    from K-rmsa-mish-4096; rows that asynchronous copies do not take (of an odd number of half-precision elements) from
    K-ln-16384x1001 and K-rms-16384x1001.
    """
    block = _power_of_two(n)
    if block > 8192:
        return None
    if block < 128:
        config = BackwardConfig(rows=8192 // block, num_warps=4, num_stages=1, programs_per_sm=8)
    elif block == 128:
        config = BackwardConfig(rows=32, num_warps=4, num_stages=1, programs_per_sm=4)
    elif itemsize == 4:
        config = BackwardConfig(*{
            256: (8, 2, 3, 4), 512: (4, 4, 3, 2), 1024: (1, 4, 4, 2), 2048: (1, 8, 4, 1), 4096: (1, 8, 3, 1),
            8192: (1, 16, 2, 1),
        }[block])  # fmt: skip
    else:
        config = BackwardConfig(*{
            256: (4, 2, 4, 4), 512: (4, 4, 3, 2), 1024: (4, 4, 3, 2), 2048: (2, 8, 4, 1), 4096: (1, 8, 4, 1),
            8192: (1, 16, 3, 1),
        }[block])  # fmt: skip
    if kind == "mish" and itemsize == 2 and block == 4096:
        config = BackwardConfig(rows=1, num_warps=8, num_stages=3, programs_per_sm=2)
    if lanes == 32 and itemsize == 2 and n % 2 and block == 1024 and not residual and kind is None:
        config = BackwardConfig(rows=2, num_warps=4, num_stages=1, programs_per_sm=4, kept=1, ahead=True)
    if residual and block == 4096:  # one more tile in flight: registers
        config = config._replace(num_warps=16)
    if lanes == 64:  # a multiprocessor of AMD's has 64 KiB of shared memory
        return config._replace(num_warps=max(1, config.num_warps // 2), num_stages=1)
    return config


def unsupported(x: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        return f"needs a GPU tensor, got {x.device.type}"
    for t in (x, *others):
        if t is None:
            continue
        if t.layout != torch.strided or t.is_nested:
            return "needs strided tensors, got " + ("a nested tensor" if t.is_nested else str(t.layout))
        if t.dtype not in DTYPES:
            return f"needs float16, bfloat16 or float32, got {str(t.dtype).removeprefix('torch.')}"
        if t.device != x.device:
            return f"needs tensors on one device, got {x.device} and {t.device}"
    return None


def row_view(t: torch.Tensor, n: int) -> tuple[int, int, int] | None:
    """(inner, outer stride, inner stride) that reach every row of n elements of ``t``, or None: it needs a copy.

    Pure. The last dimensions, n elements together, have to be dense, and the others merge into at most two.
    """
    dims = [(size, stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]
    inside = 1
    while inside < n:
        size, stride = dims.pop()
        if stride != inside:
            return None
        inside *= size
    merged = []
    for size, stride in dims:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    (_, outer), (inner, step) = [(1, 0), (1, 0), *merged][-2:]
    return inner, outer, step


def _rows_of(t: torch.Tensor, n: int) -> tuple[torch.Tensor, int, tuple[int, int, int]]:
    """(t or, as the last resort, a dense copy; UNIT; (inner, s0, s1) in units) for ``_tile``."""
    if t.is_contiguous():
        return t, 0, (1, 1, 1)
    view = row_view(t, n)
    if view is None:
        return t.contiguous(), 0, (1, 1, 1)
    inner, outer, step = view
    unit = 16 // t.element_size()  # strides that keep 16-byte accesses whole are passed in such units
    if outer % unit or step % unit:
        unit = 1
    return t, unit, (inner, outer // unit, step // unit)


@functools.cache
def sm_count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def dependent_launch(index: int) -> bool:
    """Whether a kernel may be launched before the one that it depends on has ended (CUDA, capability 9 and later)."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= (9, 0)


def _programs(x: torch.Tensor, rows: int, config: BackwardConfig) -> int:
    """As many as the card holds at a time, less those that an even share of the tiles leaves without work."""
    most = sm_count(x.get_device()) * config.programs_per_sm if x.is_cuda else 3
    tiles = -(-rows // config.rows)
    return -(-tiles // -(-tiles // most))


LANES = 64 if torch.version.hip else 32


@functools.cache
def forward_launch(norm: Norm, n: int, itemsize: int, weight: bool, bias: bool, save: bool, unit: int, dependent: bool, lanes=LANES,
                   config: ForwardConfig | None = None) -> tuple[int, Launch]:  # fmt: skip
    """(rows of a program, launch)."""
    config = config or choose_forward(n, itemsize, lanes)
    value, _ = activation_formula(norm.kind)
    return config.rows, _FORWARD.bind(
        N=n, CENTER=norm.center, WEIGHT=weight, BIAS=bias, ACT=value, SAVE=save, X_UNIT=unit, DEPENDENT=dependent,
        ROWS=config.rows, BLOCK=_power_of_two(n), num_warps=config.num_warps,
    )  # fmt: skip


@functools.cache
def residual_launch(norm: Norm, n: int, itemsize: int, weight: bool, bias: bool, dropout: bool, save: bool,
                    x_unit: int, r_unit: int, dependent: bool, lanes=LANES,
                    config: ForwardConfig | None = None) -> tuple[int, Launch]:  # fmt: skip
    config = config or choose_forward(n, itemsize, lanes)
    if itemsize == 4 and n > 8192:  # two tensors in registers
        config = config._replace(num_warps=1024 // lanes)
    return config.rows, _FORWARD_RESIDUAL.bind(
        N=n, CENTER=norm.center, WEIGHT=weight, BIAS=bias, DROPOUT=dropout, SAVE=save, X_UNIT=x_unit, R_UNIT=r_unit,
        DEPENDENT=dependent, ROWS=config.rows, BLOCK=_power_of_two(n), num_warps=config.num_warps,
    )  # fmt: skip


@functools.cache
def wide_launch(norm: Norm, n: int, weight: bool, bias: bool, residual: bool, dropout: bool, save: bool, x_unit: int,
                r_unit: int, lanes=LANES) -> Launch:  # fmt: skip
    value, _ = activation_formula(norm.kind)
    return _FORWARD_WIDE.bind(
        N=n, CENTER=norm.center, WEIGHT=weight, BIAS=bias, ACT=value, RESIDUAL=residual, DROPOUT=dropout, SAVE=save,
        X_UNIT=x_unit, R_UNIT=r_unit, BLOCK=WIDE_FORWARD_BLOCK, num_warps=1024 // lanes,
    )  # fmt: skip


class Wanted(NamedTuple):
    """Which gradients a backward computes."""

    dx: bool
    dw: bool
    db: bool


@functools.cache
def backward_launch(norm: Norm, n: int, itemsize: int, weight: bool, bias: bool, residual: bool, dropout: bool,
                    wanted: Wanted, x_unit: int, g_unit: int, dependent: bool, lanes=LANES,
                    config: BackwardConfig | None = None) -> tuple[BackwardConfig, Launch] | None:  # fmt: skip
    # a short row's g w - mean(g w) cancels, of one element to 0: both have to see the same rounded product, so no fused
    # multiply-add there
    config = config or choose_backward(n, itemsize, lanes, residual, norm.kind)
    if config is None:
        return None
    _, derivative = activation_formula(norm.kind)
    if lanes == 32 and not INTERPRETED:
        derivative = FLUSHED.get(norm.kind, derivative)
    return config, _BACKWARD.bind(
        N=n, CENTER=norm.center, WEIGHT=weight, BIAS=bias, ACT=derivative, RESIDUAL=residual, DROPOUT=dropout,
        DX=wanted.dx, DW=wanted.dw, DB=wanted.db, X_UNIT=x_unit, G_UNIT=g_unit, DEPENDENT=dependent,
        ROWS=config.rows, BLOCK=_power_of_two(n), STAGES=config.num_stages, KEPT=config.kept or config.rows,
        AHEAD=config.ahead, fp_fusion=n >= 32, num_warps=config.num_warps,
    )  # fmt: skip


def _takes_chunks(norm: Norm, n: int, dropout: bool) -> bool:
    return 2 * CHUNK < n <= 4 * CHUNK and norm.kind is None and not dropout


@functools.cache
def chunks_launch(norm: Norm, n: int, weight: bool, residual: bool, wanted: Wanted, x_unit: int, g_unit: int,
                  dependent: bool, lanes=LANES) -> Launch:  # fmt: skip
    return _BACKWARD_CHUNKS.bind(
        N=n, CENTER=norm.center, WEIGHT=weight, RESIDUAL=residual, DX=wanted.dx, DW=wanted.dw, DB=wanted.db,
        X_UNIT=x_unit, G_UNIT=g_unit, DEPENDENT=dependent, CHUNK=CHUNK, num_warps=512 // lanes,
    )  # fmt: skip


@functools.cache
def wide_backward_launches(norm: Norm, n: int, weight: bool, bias: bool, residual: bool, dropout: bool, wanted: Wanted,
                           x_unit: int, g_unit: int, lanes=LANES) -> tuple[Launch, Launch]:  # fmt: skip
    _, derivative = activation_formula(norm.kind)
    shared = {"N": n, "CENTER": norm.center, "WEIGHT": weight, "BIAS": bias, "ACT": derivative}
    units = {"X_UNIT": x_unit, "G_UNIT": g_unit}
    return (
        _BACKWARD_WIDE_SUMS.bind(**shared, **units, BLOCK=WIDE_SUMS_BLOCK, num_warps=512 // lanes),
        _BACKWARD_WIDE.bind(
            **shared, RESIDUAL=residual, DROPOUT=dropout, DX=wanted.dx, DW=wanted.dw, DB=wanted.db, **units,
            ROWS=WIDE_TILE[0], BLOCK=WIDE_TILE[1], num_warps=128 // lanes,
        ),
    )  # fmt: skip


@functools.cache
def add_partials_launch(n: int, dw: bool, db: bool, programs: int, dependent: bool) -> tuple[int, Launch]:
    """(columns of a program, launch). The whole height at once: its loads are all in flight together."""
    rows = min(512, _power_of_two(programs))
    cols, warps = max(8, 1024 // rows), max(1, rows * 8 // 1024)
    return cols, _ADD_PARTIALS.bind(
        N=n, DW=dw, DB=db, DEPENDENT=dependent, ROWS=rows, COLS=cols, num_warps=warps, launch_pdl=dependent
    )


@functools.cache
def activation_formula(kind: str | None) -> tuple:
    return activation.FORMULAS[kind] if kind else (None, None)


def _dense_like(t: torch.Tensor) -> torch.Tensor:
    # empty_like is the cheaper call by 2 us, and keeps the strides of a transposed t
    return torch.empty_like(t) if t.is_contiguous() else torch.empty(t.shape, dtype=t.dtype, device=t.device)


class Forward(NamedTuple):
    """All of a forward that follows from what its tensors look like."""

    launch: Repeated
    dense: bool  # x's rows lie one behind the other
    stats: int  # how many statistics are kept


def forward_plan(x, weight, bias, n: int, norm: Norm, eps: float, offset: float, save: bool) -> Forward | None:
    """None where a tensor has to be copied first, where there is no row, or a row is longer than a program holds."""
    rows, dense = x.numel() // n, x.is_contiguous()
    if not rows or n > 32768 or not (dense or row_view(x, n)):
        return None
    if any(t is not None and not t.is_contiguous() for t in (weight, bias)):
        return None
    _, unit, view = _rows_of(x, n)
    dependent = x.is_cuda and dependent_launch(x.get_device())
    per, launch = forward_launch(norm, n, x.element_size(), weight is not None, bias is not None, save, unit, dependent)
    scalars = rows, *view, eps, offset
    dtypes = (
        x.dtype, x.dtype if weight is None else weight.dtype, x.dtype if bias is None else bias.dtype, x.dtype,
        torch.float32 if save else x.dtype,
    )  # fmt: skip
    stats = rows * (1 + norm.center) if save else 0
    return Forward(launch.repeated(-(-rows // per), scalars, x.get_device(), dtypes), dense, stats)


def run_forward(plan: Forward, x, weight, bias):
    """``forward`` of tensors that look as ``plan``'s; x stands for what is not there."""
    # on the path of every eager call: addresses are asked for once
    y = torch.empty_like(x) if plan.dense else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats = x.new_empty(plan.stats, dtype=torch.float32) if plan.stats else None
    at = x.data_ptr()
    pointers = (
        at, at if weight is None else weight.data_ptr(), at if bias is None else bias.data_ptr(), y.data_ptr(),
        at if stats is None else stats.data_ptr(),
    )  # fmt: skip
    if not plan.launch.at(pointers):
        w, b, s = (x if t is None else t for t in (weight, bias, stats))
        plan.launch.of(x, w, b, y, s)
    return y, stats


def forward(x, weight, bias, n: int, norm: Norm, eps: float, offset: float, save: bool):
    """(y, statistics for backward or None): y dense, statistics [rows] or [2, rows] float32: 1 / deviation, mean."""
    rows = x.numel() // n
    if not rows or n > 32768:
        y = _dense_like(x)
        stats = x.new_empty(rows * (1 + norm.center), dtype=torch.float32) if save else None
    if not rows:
        return y, stats
    x, unit, view = _rows_of(x, n)
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
    if n <= 32768:
        return run_forward(forward_plan(x, weight, bias, n, norm, eps, offset, save), x, weight, bias)
    launch = wide_launch(norm, n, weight is not None, bias is not None, False, False, save, unit, 0)
    w, b, s = (x if t is None else t for t in (weight, bias, stats))
    launch(rows, (x, x, w, b, y, x, s, x), (rows, *view, 1, 1, 1, eps, offset, 0.0, 1.0))
    return y, stats


def residual_plan(
    x, residual, weight, bias, dropout: bool, n: int, norm: Norm, eps: float, offset: float, p: float, save: bool
) -> Forward | None:
    """As ``forward_plan``."""
    rows, dense = x.numel() // n, x.is_contiguous()
    if (
        not rows
        or n > 32768
        or not (dense or row_view(x, n))
        or not (residual.is_contiguous() or row_view(residual, n))
    ):
        return None
    if any(t is not None and not t.is_contiguous() for t in (weight, bias)):
        return None
    (_, x_unit, x_view), (_, r_unit, r_view) = _rows_of(x, n), _rows_of(residual, n)
    index, flags = x.get_device(), (weight is not None, bias is not None)
    dependent = x.is_cuda and dependent_launch(index)
    per, launch = residual_launch(norm, n, x.element_size(), *flags, dropout, save, x_unit, r_unit, dependent)
    scalars = rows, *x_view, *r_view, eps, offset, p, 1 / (1 - p)  # the quotient in float64, rounded once
    w, b = (x.dtype if t is None else t.dtype for t in (weight, bias))
    dtypes = (
        x.dtype, residual.dtype, w, b, x.dtype, x.dtype, torch.float32 if save else x.dtype,
        torch.int64 if dropout else x.dtype,
    )  # fmt: skip
    stats = rows * (1 + norm.center) if save else 0
    return Forward(launch.repeated(-(-rows // per), scalars, index, dtypes), dense, stats)


def run_residual(plan: Forward, x, residual, weight, bias, seed):
    """``forward_residual`` of tensors that look as ``plan``'s; x stands for what is not there."""
    # on the path of every eager call, as ``run_forward``
    y = torch.empty_like(x) if plan.dense else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty_like(y)
    stats = x.new_empty(plan.stats, dtype=torch.float32) if plan.stats else None
    at = x.data_ptr()
    pointers = (
        at, residual.data_ptr(), at if weight is None else weight.data_ptr(), at if bias is None else bias.data_ptr(),
        y.data_ptr(), h.data_ptr(), at if stats is None else stats.data_ptr(), at if seed is None else seed.data_ptr(),
    )  # fmt: skip
    if not plan.launch.at(pointers):
        w, b, s, drawn = (x if t is None else t for t in (weight, bias, stats, seed))
        plan.launch.of(x, residual, w, b, y, h, s, drawn)
    return y, h, stats


def forward_residual(x, residual, weight, bias, seed, n: int, norm: Norm, eps: float, offset: float, p: float,
                     save: bool):  # fmt: skip
    """(y, h, statistics): h = dropout(x) + residual in x's dtype, y its norm. ``seed`` is an int64 tensor if p > 0."""
    rows = x.numel() // n
    if not rows or n > 32768:
        y, h = _dense_like(x), _dense_like(x)
        stats = x.new_empty(rows * (1 + norm.center), dtype=torch.float32) if save else None
    if not rows:
        return y, h, stats
    x, x_unit, x_view = _rows_of(x, n)
    residual, r_unit, r_view = _rows_of(residual, n)
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
    dropout = seed is not None
    if n <= 32768:
        plan = residual_plan(x, residual, weight, bias, dropout, n, norm, eps, offset, p, save)
        return run_residual(plan, x, residual, weight, bias, seed)
    w, b, s, drawn = (x if t is None else t for t in (weight, bias, stats, seed))
    launch = wide_launch(norm, n, weight is not None, bias is not None, True, dropout, save, x_unit, r_unit)
    launch(rows, (x, residual, w, b, y, h, s, drawn), (rows, *x_view, *r_view, eps, offset, p, 1 / (1 - p)))
    return y, h, stats


class Backward(NamedTuple):
    """All of a backward that follows from what its tensors look like."""

    launch: Repeated
    wanted: Wanted
    dense: bool  # x's rows lie one behind the other
    partial: int  # float32 numbers that wait to be added up; 0: dw and db are not wanted
    add: Repeated | None  # adds them up


def backward_plan(
    x, dy, dh, weight, bias, seed, n: int, norm: Norm, offset: float, p: float, wanted: Wanted
) -> Backward | None:
    """None where a tensor has to be copied first, where there is no row, or rows have another kernel."""
    rows, dense = x.numel() // n, x.is_contiguous()
    if not rows or not (dense or row_view(x, n)) or not (dy.is_contiguous() or row_view(dy, n)):
        return None
    if any(t is not None and not t.is_contiguous() for t in (dh, weight, bias, seed)):
        return None
    (_, x_unit, x_view), (_, g_unit, g_view) = _rows_of(x, n), _rows_of(dy, n)
    sums_wanted, index = wanted.dw + wanted.db, x.get_device()
    dependent = sums_wanted > 0 and x.is_cuda and dependent_launch(index)
    flags = weight is not None, bias is not None, dh is not None, seed is not None
    chosen = backward_launch(norm, n, x.element_size(), *flags, wanted, x_unit, g_unit, dependent)
    if chosen is None or _takes_chunks(norm, n, seed is not None):
        return None
    config, launch = chosen
    programs = _programs(x, rows, config) if sums_wanted else -(-rows // config.rows)
    scalars = rows, *x_view, *g_view, offset, p, 1 / (1 - p)  # the quotient in float64, rounded once
    h, w, b, s = (x.dtype if t is None else t.dtype for t in (dh, weight, bias, seed))
    wide = torch.float32
    dtypes = x.dtype, dy.dtype, h, w, b, wide, s, x.dtype, x.dtype, wide if sums_wanted else x.dtype
    add = _add_plan(n, programs, wanted, w, b, index, dependent) if sums_wanted else None
    return Backward(launch.repeated(programs, scalars, index, dtypes), wanted, dense, programs * n * sums_wanted, add)


@functools.cache
def _add_plan(
    n: int, programs: int, wanted: Wanted, w: torch.dtype, b: torch.dtype, index: int, dependent: bool
) -> Repeated:
    """``w``, ``b``: dtypes of dw and db."""
    cols, launch = add_partials_launch(n, wanted.dw, wanted.db, programs, dependent)
    dtypes = torch.float32, w if wanted.dw else torch.float32, b if wanted.db else torch.float32
    return launch.repeated(-(-n * (wanted.dw + wanted.db) // cols), (programs,), index, dtypes)


def _gradients_like(x, weight, bias, dense: bool, dropout: bool, wanted: Wanted) -> tuple:
    """(dx, d_residual, dw, db) to be written, None for what is not wanted: dense; without dropout d_residual is dx."""
    dx = dw = db = None
    if wanted.dx:
        dx = torch.empty_like(x) if dense else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dr = torch.empty_like(dx) if dropout and wanted.dx else dx
    if wanted.dw:
        dw = _dense_like(weight)
    if wanted.db:
        db = _dense_like(bias)
    return dx, dr, dw, db


def run_backward(plan: Backward, x, dy, dh, weight, bias, stats, seed):
    """``backward`` of tensors that look as ``plan``'s; x stands for what is not there."""
    # on the path of every eager call: addresses are asked for once
    dx, dr, dw, db = _gradients_like(x, weight, bias, plan.dense, seed is not None, plan.wanted)
    out, out_r = x if dx is None else dx, x if dr is None else dr
    partial = _partial(x, plan.partial)
    at, at_out, at_r, at_partial = x.data_ptr(), out.data_ptr(), out_r.data_ptr(), partial.data_ptr()
    pointers = (
        at, dy.data_ptr(), at if dh is None else dh.data_ptr(), at if weight is None else weight.data_ptr(),
        at if bias is None else bias.data_ptr(), stats.data_ptr(), at if seed is None else seed.data_ptr(), at_out, at_r,
        at_partial,
    )  # fmt: skip
    if not plan.launch.at(pointers):
        h, w, b, s = (x if t is None else t for t in (dh, weight, bias, seed))
        plan.launch.of(x, dy, h, w, b, stats, s, out, out_r, partial)
    if plan.add:
        _run_add(plan.add, partial, dw, db)
    return dx, dr, dw, db


def _run_add(add: Repeated, partial, dw, db) -> None:
    at = partial.data_ptr()
    if not add.at((at, at if dw is None else dw.data_ptr(), at if db is None else db.data_ptr())):
        add.of(partial, partial if dw is None else dw, partial if db is None else db)


def backward(x, dy, dh, weight, bias, stats, seed, n: int, norm: Norm, offset: float, p: float, wanted: Wanted):
    """(dx, d_residual, dw, db), None for what is not wanted; dense, in the shapes of x, weight and bias.

    ``dh`` is the gradient of the residual form's second output (None: there is none); without dropout d_residual is dx.
    """
    rows = x.numel() // n
    if not rows:
        dx, dr, dw, db = _gradients_like(x, weight, bias, x.is_contiguous(), seed is not None, wanted)
        return dx, dr, *(t if t is None else t.zero_() for t in (dw, db))
    x, x_unit, x_view = _rows_of(x, n)
    dy, g_unit, g_view = _rows_of(dy, n)
    dh, weight, bias, seed = (t if t is None else t.contiguous() for t in (dh, weight, bias, seed))
    plan = backward_plan(x, dy, dh, weight, bias, seed, n, norm, offset, p, wanted)
    if plan is not None:
        return run_backward(plan, x, dy, dh, weight, bias, stats, seed)
    dx, dr, dw, db = _gradients_like(x, weight, bias, x.is_contiguous(), seed is not None, wanted)
    h, w, b, s, out, out_r = (x if t is None else t for t in (dh, weight, bias, seed, dx, dr))
    sums_wanted, index = wanted.dw + wanted.db, x.get_device()
    scalars = rows, *x_view, *g_view, offset
    flags = weight is not None, bias is not None, dh is not None, seed is not None
    dependent = False
    if _takes_chunks(norm, n, seed is not None):
        dependent = sums_wanted > 0 and x.is_cuda and dependent_launch(index)
        programs = min(rows, sm_count(index) if x.is_cuda else 3)
        partial = _partial(x, programs * n * sums_wanted)
        launch = chunks_launch(norm, n, flags[0], flags[2], wanted, x_unit, g_unit, dependent)
        launch(programs, (x, dy, h, w, stats, out, partial), scalars)
    else:
        sums = x.new_empty(2 * rows, dtype=torch.float32)
        first, second = wide_backward_launches(norm, n, *flags, wanted, x_unit, g_unit)
        if wanted.dx:
            first(rows, (x, dy, w, b, stats, sums), scalars)
        blocks = -(-n // WIDE_TILE[1])
        programs = max(1, min(sm_count(index) * 4 // blocks if x.is_cuda else 3, -(-rows // WIDE_TILE[0])))
        partial = _partial(x, programs * n * sums_wanted)
        tensors = x, dy, h, w, b, stats, sums, s, out, out_r, partial
        second(programs * blocks, tensors, (*scalars, p, 1 / (1 - p)))
    if sums_wanted:
        _run_add(_add_plan(n, programs, wanted, w.dtype, b.dtype, index, dependent), partial, dw, db)
    return dx, dr, dw, db


def _partial(x: torch.Tensor, size: int) -> torch.Tensor:
    return x.new_empty(size, dtype=torch.float32) if size else x


def describe(x: torch.Tensor, n: int) -> str:
    """The forward's configuration, for ``trinix.explain``."""
    config = choose_forward(n, x.element_size(), LANES)
    if config is None:
        return f"wide kernel, one row a program, {WIDE_FORWARD_BLOCK} columns at a time"
    return f"{config.rows} rows of {n} a program, {config.num_warps} warps"


def compile_cases(lanes: int = LANES):
    """LayerNorm and RMSNorm of a small, a middle, an odd and a large width; the residual and the wide forms once each."""
    every = Wanted(True, True, True)
    layer, rms = Norm(True), Norm(False)
    for dtype in DTYPES:
        size, suffix = dtype.itemsize, str(dtype).removeprefix("torch.")
        t, f = POINTERS[suffix], "*fp32"
        for n in (128, 768, 1024, 4096, 8192):
            _, fwd = forward_launch(layer, n, size, True, True, True, 0, False, lanes)
            yield compile_case(f"norm/layer-{n}/fwd/{suffix}", fwd, 2 * size, (t, t, t, t, f))
            _, bwd = backward_launch(layer, n, size, True, True, False, False, every, 0, 0, False, lanes)
            tensors = (t, t, t, t, t, f, "*i64", t, t, f)
            yield compile_case(f"norm/layer-{n}/bwd/{suffix}", bwd, 3 * size, tensors)
            _, bwd = backward_launch(
                rms, n, size, True, False, False, False, Wanted(True, True, False), 0, 0, False, lanes
            )
            yield compile_case(f"norm/rms-{n}/bwd/{suffix}", bwd, 3 * size, tensors)
        _, add = add_partials_launch(1024, True, True, 256, False)
        yield compile_case(f"norm/add-partials/bwd/{suffix}", add, 0.1, (f, t, t), access_bits=16)
        _, fwd = residual_launch(rms, 4096, size, True, False, False, True, 0, 0, False, lanes)
        yield compile_case(f"norm/residual-4096/fwd/{suffix}", fwd, 4 * size, (t, t, t, t, t, t, f, "*i64"))
        wanted = Wanted(True, True, False)
        for name, form, n in (("rms-mish-4096", Norm(False, "mish"), 4096), ("rms-1001", rms, 1001)):
            _, bwd = backward_launch(form, n, size, True, False, False, False, wanted, 0, 0, False, lanes)
            bits = 128 if n % 2 == 0 else 8 * size
            yield compile_case(f"norm/{name}/bwd/{suffix}", bwd, 3 * size, tensors, access_bits=bits)
        _, bwd = backward_launch(rms, 4096, size, True, False, True, False, wanted, 0, 0, False, lanes)
        yield compile_case(f"norm/residual-4096/bwd/{suffix}", bwd, 4 * size, tensors)
        chunks = chunks_launch(layer, 12288, True, False, every, 0, 0, False, lanes)
        yield compile_case(f"norm/layer-12288/bwd/{suffix}", chunks, 3 * size, (t, t, t, t, f, t, f))
        chunks = chunks_launch(rms, 16384, True, False, Wanted(True, True, False), 0, 0, False, lanes)
        yield compile_case(f"norm/rms-16384/bwd/{suffix}", chunks, 3 * size, (t, t, t, t, f, t, f))
        wide = wide_launch(layer, 65536, True, True, True, False, True, 0, 0, lanes)
        yield compile_case(f"norm/wide-65536/fwd/{suffix}", wide, 6 * size, (t, t, t, t, t, t, f, "*i64"))
        first, second = wide_backward_launches(layer, 65536, True, True, False, False, every, 0, 0, lanes)
        yield compile_case(f"norm/wide-sums-65536/bwd/{suffix}", first, 2 * size, (t, t, t, t, f, f), access_bits=32)
        yield compile_case(f"norm/wide-65536/bwd/{suffix}", second, 3 * size, (t, t, t, t, t, f, f, "*i64", t, t, f))
