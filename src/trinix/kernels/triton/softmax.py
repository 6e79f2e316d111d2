"""Portable Triton softmax and log_softmax over any dimension, without a transpose.

Every tensor is seen as [outer, N, C]: N is the reduced dimension, C the innermost of the others. Whichever of the two is
contiguous in the output is walked in vectors; the same kernels serve rows (N contiguous) and columns (C contiguous).

- **Tile**: [N, columns] fits into a program's registers. One read, one write.
- **Stream**: N is too long for that. Two passes over a chunk of N in small steps, the second one backwards, so that it
  finds in the L2 cache what the first one read last. With several chunks (``SPLIT``) the programs of one [N, columns]
  block run at the same time, each on its chunk, exchange their statistics through global memory, and wait for each
  other in between. They are launched cooperatively: all of them are resident, or the launch fails. So few bytes
  lie between a chunk's two passes that DRAM sees one read and one write.

Floor: forward 2 * itemsize bytes an element, backward 3 * itemsize.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trinix.kernels import LEAST_SCALE
from trinix.kernels.triton._compile import POINTERS, compile_case
from trinix.kernels.triton._launch import INTERPRETED, Launch, Launcher, by_table  # noqa: F401  (by_table: the op's)
from trinix.kernels.triton.activation import merge_dims

# ---- addresses ---------------------------------------------------------------------------------------------------------
#
# ALONG says which stride of a tensor is known to be 1: of N (0), of C (1), of neither (2), or that there is no such tensor
# (-1). Strides, and the length of the output's contiguous dimension, come in units of UNIT elements: a vector load needs
# to know that they are multiples, and a product with a constant says so for every length with one binary.


@triton.jit
def _offset(i, j, sn, sc, ALONG: tl.constexpr, UNIT: tl.constexpr):
    if ALONG == 0:
        return i + j * (sc * UNIT)
    if ALONG == 1:
        return i * (sn * UNIT) + j
    return i * (sn * UNIT) + j * (sc * UNIT)


@triton.jit
def _slab(o, O1, O2, s0, s1, s2, FLAT: tl.constexpr, UNIT: tl.constexpr):
    """Where index ``o`` of up to three outer dimensions starts."""
    at = 0
    if not FLAT:
        i = o // O2
        at = tl.cast(i // O1, tl.int64) * s0 + tl.cast(i % O1, tl.int64) * s1 + tl.cast(o % O2, tl.int64) * s2
        at *= UNIT
    return at


@triton.jit
def _lengths(n, c, ALONG: tl.constexpr, UNIT: tl.constexpr):
    if ALONG == 0:
        return n * UNIT, c
    return n, c * UNIT


@triton.jit
def _indices(ROWS: tl.constexpr, COLS: tl.constexpr, ALONG: tl.constexpr):
    """Indices of N and C in a tile whose last axis is the output's contiguous one; N is on axis 1 - ALONG."""
    if ALONG == 0:
        i, j = tl.arange(0, ROWS)[None, :], tl.arange(0, COLS)[:, None]
    else:
        i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    return i, j


@triton.jit
def _quotient(e, total, y):
    """e / total for storing into y; a half type does not show the reciprocal's error.

    float32: corrected by what the product misses, two multiply-adds, for tl.div_rn is a call an element. total is from 1 to N.
    """
    inverse = 1.0 / total
    out = e * inverse
    if y.dtype.element_ty == tl.float32:
        missing = tl.fma(-out, tl.broadcast_to(total, e.shape), e)
        out = tl.fma(missing, tl.broadcast_to(inverse, e.shape), out)
    return out


@triton.jit
def _live(i, j, n, cols, UNIT: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(whether an index of N is one, whether an element is one) of a tile that starts at a column of the tensor's."""
    inside = i < n.to(tl.int32)
    if (
        UNIT == 1 and HALF
    ):  # half the comparisons go: eight predicates do not fit the registers, and loads waited for them
        inside = (i < ROWS // 2) | inside
    live = inside
    if COLS > 1:
        live = inside & (j < tl.minimum(cols, COLS).to(tl.int32))
    return inside, live


@triton.jit
def _load(at, live, EVEN: tl.constexpr, KEEP: tl.constexpr):
    """In float32; EVEN: every element of the tile is one of the tensor's; KEEP: how long the caches should hold it."""
    if EVEN:
        x = tl.load(at, eviction_policy=KEEP)
    else:
        x = tl.load(at, mask=live, other=0.0, eviction_policy=KEEP)
    return x.to(tl.float32)


@triton.jit
def _store(at, x, live, EVEN: tl.constexpr, KEEP: tl.constexpr):
    if EVEN:
        tl.store(at, x.to(at.dtype.element_ty), eviction_policy=KEEP)
    else:
        tl.store(at, x.to(at.dtype.element_ty), mask=live, eviction_policy=KEEP)


@triton.jit
def _split_row(row, n, VECTOR: tl.constexpr):
    """A row that starts at element ``row``: elements ahead of its first whole vector, the elements in whole vectors, and,
    of the few others at both ends, indices and whether each is one."""
    ahead = tl.minimum((-row) & (VECTOR - 1), n)
    whole = (n - ahead) // VECTOR * VECTOR
    e = tl.arange(0, 2 * VECTOR)
    behind = (n - ahead - whole).to(tl.int32)
    index = tl.where(e < VECTOR, 0, ahead + whole - VECTOR) + e
    return ahead, whole, index, e % VECTOR < tl.where(e < VECTOR, ahead.to(tl.int32), behind)


# ---- what both kinds of kernels compute --------------------------------------------------------------------------------
#
# LATE, for rows without a mask and a scale above 0: the scale multiplies differences from the largest value only, an operation
# an element less, and exponentials are of base 2. tl.exp2 is one instruction, where tl.exp also looks after subnormal results
# (three more), and two exponentials an element of a half type are what long rows wait for. Columns' chunks spill with it on sm_100.


@triton.jit
def _exp(z, scale, LATE: tl.constexpr):
    if LATE:
        e = tl.exp2(z * (scale * 1.4426950408889634))
    else:
        e = tl.exp(z)
    return e


@triton.jit
def _result(z, sums, y, scale, LATE: tl.constexpr, LOG: tl.constexpr):
    """y of what lies ``z`` above the largest value (below 0, that is)."""
    if LOG:
        out = (z * scale if LATE else z) - tl.log(sums)
    else:
        out = _quotient(_exp(z, scale, LATE), sums, y)
    return out


@triton.jit
def _end_scores(x, mask, end, at_end, mn, mc, scale, LATE: tl.constexpr, M_ALONG: tl.constexpr, UNIT: tl.constexpr):
    """Of a row's elements outside whole vectors; -inf where there is none."""
    z = tl.load(x + end, mask=at_end, other=0.0).to(tl.float32)
    if not LATE:
        z *= scale
    if M_ALONG >= 0:
        z += tl.load(mask + _offset(end, 0, mn, mc, M_ALONG, UNIT), mask=at_end, other=0.0).to(tl.float32)
    return tl.where(at_end, z, float("-inf"))


@triton.jit
def _gradient(p, g, sums, scale, LOG: tl.constexpr):
    if LOG:
        out = scale * (g - _exp(p, 1.0, True) * sums)
    else:
        out = scale * p * (g - sums)
    return out


# ---- the tile kernels --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[
    "n", "c", "blocks", "O1", "O2", "x0", "x1", "x2", "xn", "xc", "m0", "m1", "m2", "mn", "mc", "y0", "y1", "y2", "yn", "yc",
])  # fmt: skip
def _forward_tile(
    x, mask, y, n: "i64", c: "i64", blocks: "i32", O1: "i32", O2: "i32",
    x0: "i64", x1: "i64", x2: "i64", xn: "i64", xc: "i64", m0: "i64", m1: "i64", m2: "i64", mn: "i64", mc: "i64",
    y0: "i64", y1: "i64", y2: "i64", yn: "i64", yc: "i64", scale: "fp32",
    LOG: tl.constexpr, LATE: tl.constexpr, X_ALONG: tl.constexpr, M_ALONG: tl.constexpr, Y_ALONG: tl.constexpr,
    UNIT: tl.constexpr, FLAT: tl.constexpr, SAME: tl.constexpr, EVEN: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    n, c = _lengths(n, c, Y_ALONG, UNIT)
    if SAME:
        x0, x1, x2, xn, xc = y0, y1, y2, yn, yc
    pid = tl.program_id(0)
    o = 0 if FLAT else pid // blocks
    j0 = (pid if FLAT else pid % blocks).to(tl.int64) * COLS
    N_AXIS: tl.constexpr = 1 - Y_ALONG
    i, j = _indices(ROWS, COLS, Y_ALONG)
    from_x = _slab(o, O1, O2, x0, x1, x2, FLAT, UNIT) + _offset(0, j0, xn, xc, X_ALONG, UNIT)
    from_m = _slab(o, O1, O2, m0, m1, m2, FLAT, UNIT) + _offset(0, j0, mn, mc, M_ALONG, UNIT)
    to_y = _slab(o, O1, O2, y0, y1, y2, FLAT, UNIT) + _offset(0, j0, yn, yc, Y_ALONG, UNIT)
    inside, live = _live(i, j, n, c - j0, UNIT, HALF, ROWS, COLS)
    z = _load(x + from_x + _offset(i, j, xn, xc, X_ALONG, UNIT), live, EVEN, "")
    if not LATE:
        z *= scale
    if M_ALONG >= 0:
        z += tl.load(mask + from_m + _offset(i, j, mn, mc, M_ALONG, UNIT), mask=live, other=0.0).to(tl.float32)
    if not EVEN:
        z = tl.where(inside, z, float("-inf"))
    most = tl.max(z, N_AXIS, keep_dims=True)
    z -= most  # all -inf: NaN, as in PyTorch
    e = _exp(z, scale, LATE)
    total = tl.sum(e, N_AXIS, keep_dims=True)
    if LOG:
        out = _result(z, total, y, scale, LATE, LOG)
    else:
        out = _quotient(e, total, y)
    _store(y + to_y + _offset(i, j, yn, yc, Y_ALONG, UNIT), out, live, EVEN, "")


@triton.jit(do_not_specialize=[
    "n", "c", "blocks", "O1", "O2", "y0", "y1", "y2", "yn", "yc", "g0", "g1", "g2", "gn", "gc",
])  # fmt: skip
def _backward_tile(
    y, dy, dx, n: "i64", c: "i64", blocks: "i32", O1: "i32", O2: "i32",
    y0: "i64", y1: "i64", y2: "i64", yn: "i64", yc: "i64", g0: "i64", g1: "i64", g2: "i64", gn: "i64", gc: "i64",
    scale: "fp32",
    LOG: tl.constexpr, Y_ALONG: tl.constexpr, G_ALONG: tl.constexpr, UNIT: tl.constexpr,
    FLAT: tl.constexpr, SAME: tl.constexpr, EVEN: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    n, c = _lengths(n, c, Y_ALONG, UNIT)
    if SAME:
        g0, g1, g2, gn, gc = y0, y1, y2, yn, yc
    # from the end, which forward wrote last: it may lie in the cache still (docs/perf/softmax.md)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    o = 0 if FLAT else pid // blocks
    j0 = (pid if FLAT else pid % blocks).to(tl.int64) * COLS
    N_AXIS: tl.constexpr = 1 - Y_ALONG
    i, j = _indices(ROWS, COLS, Y_ALONG)
    to = _slab(o, O1, O2, y0, y1, y2, FLAT, UNIT) + _offset(0, j0, yn, yc, Y_ALONG, UNIT)
    from_g = _slab(o, O1, O2, g0, g1, g2, FLAT, UNIT) + _offset(0, j0, gn, gc, G_ALONG, UNIT)
    _, live = _live(i, j, n, c - j0, UNIT, HALF, ROWS, COLS)
    at = to + _offset(i, j, yn, yc, Y_ALONG, UNIT)
    p = _load(y + at, live, EVEN, "")
    g = _load(dy + from_g + _offset(i, j, gn, gc, G_ALONG, UNIT), live, EVEN, "")
    sums = tl.sum(g if LOG else p * g, N_AXIS, keep_dims=True)
    _store(dx + at, _gradient(p, g, sums, scale, LOG), live, EVEN, "")


# ---- the stream kernels ------------------------------------------------------------------------------------------------
#
# A step is DEEP tiles of ROWS indices of N, and a tile is one vector a thread: what is summed over DEEP stays in a thread,
# and threads meet once a chunk.
#
# Work items are numbered (outer, panel, chunk, column block of the panel), the last one fastest: neighbours read
# neighbouring columns. A block's chunks are less than the resident programs apart, and a program takes its items in
# order, so the first unfinished block always has all its chunks running: nothing waits for what cannot start.
#
# Rows of a length that is no multiple of 16 bytes (VECTOR > 1) start anywhere between two vectors: each is read and written in
# the whole vectors that lie within it, and the few elements ahead of and behind them are its first chunk's, one by one. Nothing
# outside a row is touched.
#
# disable_licm: what is hoisted out of the loop over work items lives across it, and spills at 64 registers.


@triton.jit
def _step_indices(DEEP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALONG: tl.constexpr):
    i, j = _indices(ROWS, COLS, ALONG)
    return tl.arange(0, DEEP)[:, None, None] * ROWS + i[None, :, :], j[None, :, :]


@triton.jit
def _item(work, panels, chunks, FLAT: tl.constexpr, PANEL: tl.constexpr, COLS: tl.constexpr):
    """A work item's outer index, panel, chunk, first column."""
    part = work // PANEL
    panel = part // chunks
    o = 0 if FLAT else panel // panels
    block = (panel if FLAT else panel % panels) * PANEL + work % PANEL
    return o, panel, part % chunks, tl.cast(block, tl.int64) * COLS


@triton.jit
def _chunk(n, chunk, steps, STEP: tl.constexpr):
    """A chunk's first index of N, its number of steps."""
    start = tl.cast(chunk, tl.int64) * steps * STEP
    return start, tl.cdiv(tl.minimum(n - start, tl.cast(steps, tl.int64) * STEP), STEP).to(tl.int32)


@triton.jit
def _arrive(arrived):
    """Publish what this program has stored; returns how many have arrived, this one included."""
    tl.debug_barrier()  # the stores of all threads come before the one thread's atomic
    return tl.atomic_add(arrived, 1, sem="acq_rel") + 1


@triton.jit
def _wait(arrived, seen, wanted):
    while seen < wanted:
        seen = tl.atomic_add(arrived, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _combine(line, chunks, scale, LATE: tl.constexpr, MERGE: tl.constexpr, COLS: tl.constexpr):
    """Row 0 of ``line`` becomes the largest value and the sum of exponentials of all chunks."""
    column = tl.arange(0, COLS)
    top = tl.full((MERGE, COLS), float("-inf"), tl.float32)
    total = tl.zeros((MERGE, COLS), tl.float32)
    for first in range(0, chunks, MERGE):
        chunk = first + tl.arange(0, MERGE)[:, None]
        at = line + (chunk + 1) * (2 * COLS) + column[None, :]
        peak = tl.load(at, mask=chunk < chunks, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(at + COLS, mask=chunk < chunks, other=0.0, cache_modifier=".cg")
        new = tl.maximum(top, peak)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * _exp(top - safe, scale, LATE) + part * _exp(peak - safe, scale, LATE)
        top = new
    most = tl.max(top, 0)
    safe = tl.where(most == float("-inf"), 0.0, most)
    tl.store(line + column, most)
    tl.store(line + COLS + column, tl.sum(total * _exp(top - safe[None, :], scale, LATE), 0))


@triton.jit
def _combine_sums(line, chunks, MERGE: tl.constexpr, COLS: tl.constexpr):
    column = tl.arange(0, COLS)
    total = tl.zeros((MERGE, COLS), tl.float32)
    for first in range(0, chunks, MERGE):
        chunk = first + tl.arange(0, MERGE)[:, None]
        at = line + (chunk + 1) * COLS + column[None, :]
        total += tl.load(at, mask=chunk < chunks, other=0.0, cache_modifier=".cg")
    tl.store(line + column, tl.sum(total, 0))


@triton.jit
def _step_scores(
    k, base_x, base_m, left, i, j, cols, xn, xc, mn, mc, scale,
    LATE: tl.constexpr, X_ALONG: tl.constexpr, M_ALONG: tl.constexpr, UNIT: tl.constexpr, STEP: tl.constexpr,
    EVEN: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Scores of the k-th step, its first index of N, which indices are N's, which elements are the tensor's."""
    at = tl.cast(k, tl.int64) * STEP
    inside = i < tl.minimum(left - at, STEP).to(tl.int32)
    live = inside & (j < cols)
    z = _load(base_x + _offset(at, 0, xn, xc, X_ALONG, UNIT) + _offset(i, j, xn, xc, X_ALONG, UNIT), live, EVEN, KEEP)
    if not LATE:
        z *= scale
    if M_ALONG >= 0:
        m_at = base_m + _offset(at, 0, mn, mc, M_ALONG, UNIT) + _offset(i, j, mn, mc, M_ALONG, UNIT)
        z += tl.load(m_at, mask=live, other=0.0).to(tl.float32)
    return z, at, inside, live


@triton.jit
def _join(top, total, z, scale, LATE: tl.constexpr):
    """Largest values and sums with a step's scores among them."""
    new = tl.maximum(top, tl.max(z, 0))
    safe = tl.where(new == float("-inf"), 0.0, new)  # nothing but -inf so far: exp(-inf), not exp(NaN)
    return new, total * _exp(top - safe, scale, LATE) + tl.sum(_exp(z - safe[None, :, :], scale, LATE), 0)


@triton.jit(do_not_specialize=[
    "n", "c", "panels", "chunks", "steps", "works", "O1", "O2", "x0", "x1", "x2", "xn", "xc", "m0", "m1", "m2", "mn", "mc",
    "y0", "y1", "y2", "yn", "yc",
])  # fmt: skip
def _forward_stream(
    x, mask, y, partial, arrived, n: "i64", c: "i64", panels: "i32", chunks: "i32", steps: "i32", works: "i32",
    O1: "i32", O2: "i32",
    x0: "i64", x1: "i64", x2: "i64", xn: "i64", xc: "i64", m0: "i64", m1: "i64", m2: "i64", mn: "i64", mc: "i64",
    y0: "i64", y1: "i64", y2: "i64", yn: "i64", yc: "i64", scale: "fp32",
    LOG: tl.constexpr, LATE: tl.constexpr, X_ALONG: tl.constexpr, M_ALONG: tl.constexpr, Y_ALONG: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, SAME: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    PEEL: tl.constexpr, PANEL: tl.constexpr, MERGE: tl.constexpr, DEEP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    n, c = _lengths(n, c, Y_ALONG, UNIT)
    if SAME:
        x0, x1, x2, xn, xc = y0, y1, y2, yn, yc
    STEP: tl.constexpr = DEEP * ROWS
    AGAIN: tl.constexpr = "evict_last" if not SPLIT and Y_ALONG == 0 else ""
    DONE: tl.constexpr = "evict_first" if not SPLIT and Y_ALONG == 0 else ""
    N_AXIS: tl.constexpr = 1 - Y_ALONG
    FIRST: tl.constexpr = ROWS if Y_ALONG == 1 else COLS
    LAST: tl.constexpr = COLS if Y_ALONG == 1 else ROWS
    i, j = _step_indices(DEEP, ROWS, COLS, Y_ALONG)
    # PEEL: steps without a mask as far as they are whole, then smaller ones
    REST_DEEP: tl.constexpr = 1 if PEEL else DEEP
    REST: tl.constexpr = REST_DEEP * ROWS
    i_rest, j_rest = _step_indices(REST_DEEP, ROWS, COLS, Y_ALONG)
    column = tl.arange(0, COLS)
    for work in tl.range(tl.program_id(0), works, tl.num_programs(0), disable_licm=True):
        o, panel, chunk, j0 = _item(work, panels, chunks, FLAT, PANEL, COLS)
        from_x = _slab(o, O1, O2, x0, x1, x2, FLAT, UNIT) + _offset(0, j0, xn, xc, X_ALONG, UNIT)
        from_m = _slab(o, O1, O2, m0, m1, m2, FLAT, UNIT) + _offset(0, j0, mn, mc, M_ALONG, UNIT)
        to_y = _slab(o, O1, O2, y0, y1, y2, FLAT, UNIT) + _offset(0, j0, yn, yc, Y_ALONG, UNIT)
        length = n
        if VECTOR > 1:
            ahead, length, end, at_end = _split_row(from_x, n, VECTOR)
            at_end &= chunk == 0
            z_end = _end_scores(x + from_x, mask + from_m, end, at_end, mn, mc, scale, LATE, M_ALONG, UNIT)
            from_m += _offset(ahead, 0, mn, mc, M_ALONG, UNIT)
            to_end = y + to_y + end
            from_x = tl.cdiv(from_x, VECTOR) * VECTOR
            to_y = from_x if SAME else to_y + ahead
        start, here = _chunk(length, chunk, steps, STEP)
        base_x = x + from_x + _offset(start, 0, xn, xc, X_ALONG, UNIT)
        base_m = mask
        if M_ALONG >= 0:
            base_m += from_m + _offset(start, 0, mn, mc, M_ALONG, UNIT)
        base_y = y + to_y + _offset(start, 0, yn, yc, Y_ALONG, UNIT)
        cols = tl.minimum(c - j0, COLS).to(tl.int32)
        left = length - start
        whole = 0
        if PEEL:
            whole = (left // STEP).to(tl.int32)
            here = tl.cdiv(left, REST).to(tl.int32)

        top = tl.full((FIRST, LAST), float("-inf"), tl.float32)
        total = tl.zeros((FIRST, LAST), tl.float32)
        if PEEL:
            for k in range(whole):
                z, _, _, _ = _step_scores(
                    k, base_x, base_m, left, i, j, cols, xn, xc, mn, mc, scale, LATE, X_ALONG, M_ALONG, UNIT, STEP, True, AGAIN
                )  # fmt: skip
                top, total = _join(top, total, z, scale, LATE)
        for k in range(whole * (STEP // REST), here):
            z, _, inside, _ = _step_scores(
                k, base_x, base_m, left, i_rest, j_rest, cols, xn, xc, mn, mc, scale, LATE, X_ALONG, M_ALONG, UNIT, REST, EVEN,
                AGAIN,
            )  # fmt: skip
            if not EVEN:
                z = tl.where(inside, z, float("-inf"))
            top, total = _join(top, total, z, scale, LATE)
        most = tl.max(top, N_AXIS)
        if VECTOR > 1:
            most = tl.maximum(most, tl.max(z_end, 0))
        safe = tl.where(most == float("-inf"), 0.0, most)
        sums = tl.sum(total * _exp(top - tl.expand_dims(safe, N_AXIS), scale, LATE), N_AXIS)
        if VECTOR > 1:
            sums += tl.sum(_exp(z_end - tl.max(safe, 0), scale, LATE), 0)

        if SPLIT:
            slab = tl.cast(panel, tl.int64) * PANEL + work % PANEL
            line = partial + slab * (chunks + 1) * (2 * COLS)  # two rows for the result, then two for every chunk
            mine = line + (chunk + 1) * (2 * COLS) + column
            tl.store(mine, most)
            tl.store(mine + COLS, sums)
            seen = _arrive(arrived + slab)
            if seen == chunks:  # the last one combines them, whoever it is in the same order
                _combine(line, chunks, scale, LATE, MERGE, COLS)
                seen = _arrive(arrived + slab)
            _wait(arrived + slab, seen, chunks + 1)
            most = tl.load(line + column, cache_modifier=".cg")
            sums = tl.load(line + COLS + column, cache_modifier=".cg")

        if VECTOR > 1:
            y_end = _result(z_end - tl.max(most, 0), tl.max(sums, 0), y, scale, LATE, LOG)  # of the one column
            tl.store(to_end, y_end.to(y.dtype.element_ty), mask=at_end)
        most = tl.expand_dims(most, N_AXIS)[None, :, :]
        sums = tl.expand_dims(sums, N_AXIS)[None, :, :]
        for k in range(here - whole * (STEP // REST)):
            z, at, _, live = _step_scores(
                here - 1 - k, base_x, base_m, left, i_rest, j_rest, cols, xn, xc, mn, mc, scale, LATE, X_ALONG, M_ALONG, UNIT,
                REST, EVEN, DONE,
            )  # fmt: skip
            out = _result(z - most, sums, y, scale, LATE, LOG)
            to = base_y + _offset(at, 0, yn, yc, Y_ALONG, UNIT) + _offset(i_rest, j_rest, yn, yc, Y_ALONG, UNIT)
            _store(to, out, live, EVEN, DONE)
        if PEEL:
            for k in range(whole):
                z, at, _, live = _step_scores(
                    whole - 1 - k, base_x, base_m, left, i, j, cols, xn, xc, mn, mc, scale, LATE, X_ALONG, M_ALONG, UNIT, STEP,
                    True, DONE,
                )  # fmt: skip
                out = _result(z - most, sums, y, scale, LATE, LOG)
                to = base_y + _offset(at, 0, yn, yc, Y_ALONG, UNIT) + _offset(i, j, yn, yc, Y_ALONG, UNIT)
                _store(to, out, live, True, DONE)


@triton.jit(do_not_specialize=[
    "n", "c", "panels", "chunks", "steps", "works", "O1", "O2", "y0", "y1", "y2", "yn", "yc", "g0", "g1", "g2", "gn", "gc",
])  # fmt: skip
def _backward_stream(
    y, dy, dx, partial, arrived, n: "i64", c: "i64", panels: "i32", chunks: "i32", steps: "i32", works: "i32",
    O1: "i32", O2: "i32",
    y0: "i64", y1: "i64", y2: "i64", yn: "i64", yc: "i64", g0: "i64", g1: "i64", g2: "i64", gn: "i64", gc: "i64",
    scale: "fp32",
    LOG: tl.constexpr, Y_ALONG: tl.constexpr, G_ALONG: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr,
    FLAT: tl.constexpr, SAME: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    PANEL: tl.constexpr, MERGE: tl.constexpr, DEEP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    n, c = _lengths(n, c, Y_ALONG, UNIT)
    if SAME:
        g0, g1, g2, gn, gc = y0, y1, y2, yn, yc
    STEP: tl.constexpr = DEEP * ROWS
    AGAIN: tl.constexpr = "evict_last" if not SPLIT and Y_ALONG == 0 else ""
    DONE: tl.constexpr = "evict_first" if not SPLIT and Y_ALONG == 0 else ""
    N_AXIS: tl.constexpr = 1 - Y_ALONG
    FIRST: tl.constexpr = ROWS if Y_ALONG == 1 else COLS
    LAST: tl.constexpr = COLS if Y_ALONG == 1 else ROWS
    i, j = _step_indices(DEEP, ROWS, COLS, Y_ALONG)
    column = tl.arange(0, COLS)
    for work in tl.range(tl.program_id(0), works, tl.num_programs(0), disable_licm=True):
        o, panel, chunk, j0 = _item(work, panels, chunks, FLAT, PANEL, COLS)
        base = _slab(o, O1, O2, y0, y1, y2, FLAT, UNIT) + _offset(0, j0, yn, yc, Y_ALONG, UNIT)
        from_g = _slab(o, O1, O2, g0, g1, g2, FLAT, UNIT) + _offset(0, j0, gn, gc, G_ALONG, UNIT)
        length = n
        if VECTOR > 1:
            ahead, length, end, at_end = _split_row(base, n, VECTOR)
            at_end &= chunk == 0
            p_end = tl.load(y + base + end, mask=at_end, other=0.0).to(tl.float32)
            g_end = tl.load(dy + from_g + _offset(end, 0, gn, gc, G_ALONG, UNIT), mask=at_end, other=0.0).to(tl.float32)
            to_end = dx + base + end
            base = tl.cdiv(base, VECTOR) * VECTOR
            from_g = base if SAME else from_g + _offset(ahead, 0, gn, gc, G_ALONG, UNIT)
        start, here = _chunk(length, chunk, steps, STEP)
        base += _offset(start, 0, yn, yc, Y_ALONG, UNIT)
        base_g = dy + from_g + _offset(start, 0, gn, gc, G_ALONG, UNIT)
        cols = tl.minimum(c - j0, COLS).to(tl.int32)

        total = tl.zeros((FIRST, LAST), tl.float32)
        for k in range(here):
            at = tl.cast(k, tl.int64) * STEP
            live = (i < tl.minimum(length - start - at, STEP).to(tl.int32)) & (j < cols)
            at_y = y + base + _offset(at, 0, yn, yc, Y_ALONG, UNIT) + _offset(i, j, yn, yc, Y_ALONG, UNIT)
            at_g = base_g + _offset(at, 0, gn, gc, G_ALONG, UNIT) + _offset(i, j, gn, gc, G_ALONG, UNIT)
            g = _load(at_g, live, EVEN, AGAIN)
            if not LOG:
                g *= _load(at_y, live, EVEN, AGAIN)
            total += tl.sum(g, 0)
        sums = tl.sum(total, N_AXIS)
        if VECTOR > 1:
            sums += tl.sum(g_end if LOG else p_end * g_end, 0)

        if SPLIT:
            slab = tl.cast(panel, tl.int64) * PANEL + work % PANEL
            line = partial + slab * (chunks + 1) * COLS
            tl.store(line + (chunk + 1) * COLS + column, sums)
            seen = _arrive(arrived + slab)
            if seen == chunks:
                _combine_sums(line, chunks, MERGE, COLS)
                seen = _arrive(arrived + slab)
            _wait(arrived + slab, seen, chunks + 1)
            sums = tl.load(line + column, cache_modifier=".cg")

        if VECTOR > 1:
            dx_end = _gradient(p_end, g_end, tl.sum(sums, 0), scale, LOG)  # of the one column
            tl.store(to_end, dx_end.to(dx.dtype.element_ty), mask=at_end)
        sums = tl.expand_dims(sums, N_AXIS)[None, :, :]
        for k in range(here):
            at = tl.cast(here - 1 - k, tl.int64) * STEP
            live = (i < tl.minimum(length - start - at, STEP).to(tl.int32)) & (j < cols)
            to = base + _offset(at, 0, yn, yc, Y_ALONG, UNIT) + _offset(i, j, yn, yc, Y_ALONG, UNIT)
            at_g = base_g + _offset(at, 0, gn, gc, G_ALONG, UNIT) + _offset(i, j, gn, gc, G_ALONG, UNIT)
            p = _load(y + to, live, EVEN, DONE)
            g = _load(at_g, live, EVEN, DONE)
            out = _gradient(p, g, sums, scale, LOG)
            _store(dx + to, out, live, EVEN, DONE)


# ---- the view, the choice, the launches ----------------------------------------------------------------------------------

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LANES = 64 if torch.version.hip else 32  # threads of a warp
PER_SM = 4  # programs of a split kernel that one multiprocessor holds: 256 threads of at most 64 registers
MERGE = 32  # chunks whose statistics the last program reads at once

_FORWARD_TILE = Launcher(_forward_tile, tensors=3)
_BACKWARD_TILE = Launcher(_backward_tile, tensors=3)
_FORWARD_STREAM = Launcher(_forward_stream, tensors=5)
_BACKWARD_STREAM = Launcher(_backward_stream, tensors=5)


class View(NamedTuple):
    """Tensors of one shape seen as [outer dimensions, N, C]; the first one is the output, which is dense."""

    n: int
    c: int
    outer: tuple  # up to three sizes, outermost first
    along: tuple  # for every tensor 0, 1 or 2: stride 1 along N, along C, along neither
    strides: tuple  # for every tensor: three outer strides, N's, C's


class Tile(NamedTuple):
    """Configuration of the tile kernels: a program's tile of N and C."""

    rows: int  # of N, all of it
    cols: int
    num_warps: int


class Stream(NamedTuple):
    """Configuration of the stream kernels."""

    deep: int  # vectors of a thread in one step
    rows: int  # of N that a program's threads cover with one vector each
    cols: int
    panel: int  # column blocks of a panel
    steps: int  # of a chunk
    chunks: int  # of N; more than one: the split kernels
    num_warps: int
    per_sm: int  # programs that a multiprocessor certainly holds at a time
    peel: bool = False  # forward, whole rows: steps without a mask as far as they are whole, then smaller ones


class Call(NamedTuple):
    """A launch with all that follows from shapes and strides."""

    launch: Launch
    blocks: int
    scalars: tuple  # without the scale
    config: Tile | Stream
    partials: int  # floats of scratch memory
    counters: int  # of arrivals, zero before the launch


def view(shape: tuple, dim: int, strides: tuple) -> View | None:
    """``strides``: of every tensor, the output first. None where more than four other dimensions do not merge. Pure."""
    n = shape[dim] if shape else 1
    others = [shape[:dim] + shape[dim + 1 :], *(s[:dim] + s[dim + 1 :] for s in strides)]
    sizes, merged = merge_dims(others[0], others[1], others[1:])
    if len(sizes) > 4:
        return None
    c, outer = sizes[-1], (1,) * (4 - len(sizes)) + tuple(sizes[:-1])
    of_n = [s[dim] if n > 1 else 0 for s in strides]
    of_c = [m[-1] if c > 1 else 0 for m in merged]
    first = 0 if n > 1 and of_n[0] == 1 else 1
    along, all_strides = [], []
    for sn, sc, m in zip(of_n, of_c, merged, strict=True):
        lengths, steps = (n, c), (sn, sc)
        unit = [a for a in (first, 1 - first) if steps[a] == 1 or (a == first and lengths[a] == 1)]
        along.append(unit[0] if unit else 2)
        all_strides.append((0,) * (4 - len(sizes)) + m[:-1] + steps)
    return View(n, c, outer, tuple(along), tuple(all_strides))


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def choose_tile(n: int, c: int, along: int, itemsize: int, inputs: int, lanes: int = LANES) -> Tile | None:
    """The tile that holds all of N in registers, or None where that is too much; ``along``: the output's contiguous side.

    Four vectors of 16 bytes a thread, or two each of y and dy: loads enough in flight, registers for half the threads that
    a multiprocessor can have. A row of up to that many vectors a lane is one warp's affair; short rows share a warp.
    """
    vector = 16 // itemsize
    a_thread = vector * 4 // inputs
    most_threads = 1024
    most = most_threads * 32 // inputs
    rows = _power_of_two(n)
    if along == 0:
        if rows > most:
            return None
        cols = 1 if rows > lanes * vector else max(1, min(_power_of_two(c), 4 * lanes * a_thread // (2 * rows)))
        # backward: 65536 x 128 22.9 -> 22.4 us, both passes 33.3 -> 32.5; 36864 x 256 25.0 -> 24.7
        warps = 4 // inputs if rows <= lanes * vector else max(1, rows // (lanes * a_thread))
        return Tile(rows, cols, min(most_threads // lanes, warps))
    # columns: neighbours read the rest of the 128-byte line at the same time. X-softmax-2-*: the best tried up to n = 2048
    # forward, 1024 backward
    cols = min(_power_of_two(c), max((64 if rows <= 512 else 32) // itemsize, 8192 // rows))
    if rows * cols > 65536 // (itemsize * inputs):
        return None
    return Tile(
        rows,
        cols,
        min(
            most_threads // lanes,
            max(min(256 // lanes, rows * cols // (lanes * 16)), rows * cols * inputs // (lanes * 64), 1),
        ),
    )


def choose_stream(view: View, itemsize: int, inputs: int, multiprocessors: int, lanes: int = LANES) -> Stream:
    """Steps, chunks and panels for an N that no tile holds; ``multiprocessors`` 0: programs cannot wait for each other.

    A chunk of columns is 64 KiB of x or 32 of y and dy: with 4 programs on each of 132 multiprocessors 17 to 35 MB are
    between their two passes. Rows enough for all multiprocessors are left whole, one program each, in forward and, up to
    128 KiB each of y and dy, in backward.
    """
    vector, threads = 16 // itemsize, 256
    short = view.n * itemsize <= 128 << 10
    if view.along[0] == 0 and (inputs == 1 or short) and view.c * math.prod(view.outer) >= multiprocessors > 0:
        threads, deep, per_sm = 1024, 2, 1
        peel = False
        if inputs == 1 and -view.n % (4 * threads * vector) <= view.n // 8:
            deep = 4
        elif inputs == 1 and (short or itemsize == 4):
            # much of the last step would be idle. 4096 x 50257: 294 us, with two vectors and masks 321; fp32 581 and 633
            deep, peel = 4, True
            if short:
                threads, per_sm = 512, 2
        rows = threads * vector
        return Stream(deep, rows, 1, 1, -(-view.n // (deep * rows)), 1, threads // lanes, per_sm, peel)
    deep = 1 if itemsize == 4 and inputs == 2 else 2  # two of them spill on sm_100
    cols = 1 if view.along[0] == 0 else min(_power_of_two(view.c), 128 // itemsize)
    rows = threads * vector // cols
    blocks = -(-view.c // cols)
    panel = 1 if view.along[0] == 0 else min(2, _power_of_two(blocks))
    needed = -(-view.n // (deep * rows))  # steps of all of N
    chunk = (64 if inputs == 1 and view.along[0] != 0 else 32) << 10
    steps = max(1, chunk // (inputs * itemsize * deep * rows * cols))
    # the chunks of a panel are waiting for each other: they are at most half of what is resident
    most_chunks = multiprocessors * PER_SM // (2 * panel)
    if most_chunks < 2 or needed <= steps:
        return Stream(deep, rows, cols, panel, needed, 1, threads // lanes, 1)
    steps = max(steps, -(-needed // most_chunks))
    return Stream(deep, rows, cols, panel, steps, -(-needed // steps), threads // lanes, PER_SM)


def choose(view: View, itemsize: int, inputs: int, multiprocessors: int, lanes: int = LANES) -> Tile | Stream:
    tile = choose_tile(view.n, view.c, view.along[0], itemsize, inputs, lanes)
    if tile and tile.cols == 1 and view.along[0] == 0 and inputs == 1 and _unit(view, itemsize) == 1:
        # single elements instead of vectors: spread over more warps, a thread has 8 in flight rather than 32 (K-softmax-16384x1001)
        return tile._replace(num_warps=min(1024 // lanes, max(tile.num_warps, tile.rows // (lanes * 8))))
    if tile and len(set(view.along)) > 1 and tile.rows * tile.cols > 8192:
        tile = None  # a tile in two orders is turned in shared memory, which on some cards is 64 KiB
    return tile or choose_stream(view, itemsize, inputs, multiprocessors, lanes)


def _unit(view: View, itemsize: int) -> int:
    """Elements that every stride and the contiguous length are multiples of, up to 16 bytes."""
    divisors = [16 // itemsize, (view.n, view.c)[view.along[0]]]
    for a, strides in zip(view.along, view.strides, strict=True):
        divisors += strides[:3] + tuple(s for side, s in enumerate(strides[3:]) if side != a)
    return math.gcd(*divisors)


def _vector(view: View, itemsize: int, backward: bool) -> int:
    """Elements of a vector where rows start anywhere between two, else 1. The first tensor read says where vectors lie."""
    vector, reads = 16 // itemsize, view.along[0 if backward else 1]
    return vector if (view.along[0], reads) == (0, 0) and _unit(view, itemsize) < vector else 1


def plan(
    view: View, itemsize: int, log: bool, masked: bool | None, multiprocessors: int, config: Tile | Stream | None = None,
    lanes: int = LANES, positive: bool = True,
) -> Call:  # fmt: skip
    """The launch of a view of (y, x), (y, x, mask) or, with ``masked`` None, (dx and y, dy). Pure, but for bound launches."""
    backward = masked is None
    config = config or choose(view, itemsize, 1 + backward, multiprocessors, lanes)
    along = view.along[0]
    lengths = [view.n, view.c]
    unit = _unit(view, itemsize)
    lengths[along] //= unit
    strides = [
        tuple(s // unit for s in s3[:3]) + tuple(0 if side == a else s // unit for side, s in enumerate(s3[3:]))
        for a, s3 in zip(view.along, view.strides, strict=True)
    ]
    blocks = -(-view.c // config.cols)
    outer = math.prod(view.outer)
    flat = outer == 1
    constants = {"LOG": log}
    if backward:
        constants |= {"Y_ALONG": along, "G_ALONG": view.along[1]}
        order = strides[0] + strides[1]
    else:
        constants["LATE"] = not masked and positive and along == 0
        constants |= {"X_ALONG": view.along[1], "M_ALONG": view.along[2] if masked else -1, "Y_ALONG": along}
        order = strides[1] + (strides[2] if masked else (0,) * 5) + strides[0]
    same = view.strides[0] == view.strides[1] and view.along[0] == view.along[1]
    if isinstance(config, Tile):
        even = view.n == config.rows and view.c % config.cols == 0 and not masked
        half = view.n > config.rows // 2
        constants |= {"UNIT": unit, "FLAT": flat, "SAME": same, "EVEN": even, "HALF": half}
        constants |= {"ROWS": config.rows, "COLS": config.cols}
        launcher = _BACKWARD_TILE if backward else _FORWARD_TILE
        # half the threads of a multiprocessor: with 66 registers a second program waits (16384 x 4097: 254 us, 164 with 64).
        # AMD's launches refuse the option; forward takes fewer registers by itself, down to 36 without a bound
        resident = 2 if backward and along == 0 and config.num_warps == 16 and lanes == 32 else 0
        launch = _bound(launcher, config.num_warps, resident, False, *constants.items())
        return Call(launch, outer * blocks, (*lengths, blocks, *view.outer[1:], *order), config, 0, 0)
    vector = _vector(view, itemsize, backward) if config.cols == 1 else 1
    constants |= {"UNIT": unit, "VECTOR": vector, "FLAT": flat, "SAME": same}
    panels = -(-blocks // config.panel)
    slabs = outer * panels * config.panel
    works = slabs * config.chunks
    split = config.chunks > 1
    even = view.n % (config.deep * config.rows) == 0 and view.c % (config.cols * config.panel) == 0 and not masked
    even = even and vector == 1  # a row between two vectors has fewer whole ones
    constants |= {"EVEN": even, "SPLIT": split} | ({} if backward else {"PEEL": config.peel})
    constants |= {"PANEL": config.panel, "MERGE": MERGE}
    constants |= {"DEEP": config.deep, "ROWS": config.rows, "COLS": config.cols}
    launcher = _BACKWARD_STREAM if backward else _FORWARD_STREAM
    launch = _bound(launcher, config.num_warps, config.per_sm, split, *constants.items())
    scalars = (*lengths, panels, config.chunks, config.steps, works, *view.outer[1:], *order)
    if not split:
        return Call(launch, works, scalars, config, 0, 0)
    partials = slabs * (config.chunks + 1) * config.cols * (1 if backward else 2)
    return Call(launch, min(works, multiprocessors * config.per_sm), scalars, config, partials, slabs)


@functools.cache
def _bound(launcher: Launcher, num_warps: int, resident: int, cooperative: bool, *constants) -> Launch:
    """``resident`` programs on a multiprocessor have registers enough, and are promised to a cooperative launch; 0: any number."""
    launch = launcher.bind(num_warps=num_warps, **dict(constants))
    if cooperative:
        launch.options["launch_cooperative_grid"] = True
    if cooperative or resident > 1:
        launch.options["maxnreg"] = 65536 // (resident * num_warps * 32) // 8 * 8
    return launch


@functools.lru_cache(maxsize=4096)
def _plan(shape, dim, strides, itemsize, log, masked, multiprocessors, config=None, positive=True) -> Call | None:
    seen = view(tuple(shape), dim, strides)
    return seen and plan(seen, itemsize, log, masked, multiprocessors, config, positive=positive)


@functools.cache
def _multiprocessors(device: int) -> int:
    """How many a cooperative launch can fill; 0 in the interpreter, where one program runs after another, and on HIP."""
    if INTERPRETED or torch.version.hip:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def unsupported(x: torch.Tensor, mask: torch.Tensor | None, dim: int, scale: float) -> str | None:  # any dim, any scale
    if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        return f"needs a GPU tensor, got {x.device.type}"
    for t in (x,) if mask is None else (x, mask):
        if t.layout != torch.strided or t.is_nested:
            return "needs strided tensors, got " + ("a nested tensor" if t.is_nested else str(t.layout))
        if t.dtype not in DTYPES:
            return f"needs float16, bfloat16 or float32, got {str(t.dtype).removeprefix('torch.')}"
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return "gives no gradient to mask, which requires one"
    return None


def forward(
    x: torch.Tensor, mask: torch.Tensor | None, dim: int, scale: float, log: bool, config: Tile | Stream | None = None
) -> torch.Tensor:
    """y in the layout ``torch.empty_like(x)`` gives; ``mask`` broadcasts to x, ``dim`` >= 0."""
    y = torch.empty_like(x)
    if not x.numel():
        return y
    multiprocessors = _multiprocessors(x.get_device())
    if mask is None:
        strides = (y.stride(), x.stride())
        call = _plan(x.shape, dim, strides, x.itemsize, log, False, multiprocessors, config, scale >= LEAST_SCALE)
        mask = x  # never read
    else:
        mask = mask.expand(x.shape)
        strides = (y.stride(), x.stride(), mask.stride())
        call = _plan(x.shape, dim, strides, x.itemsize, log, True, multiprocessors, config)
    if call is None:  # the one case that copies: more than four other dimensions that do not merge
        x = torch.empty_like(y).copy_(x)
        if strides[2:]:
            mask = torch.empty_like(y, dtype=mask.dtype).copy_(mask)
        strides = (y.stride(),) * len(strides)
        call = _plan(
            x.shape, dim, strides, x.itemsize, log, len(strides) == 3, multiprocessors, config, scale >= LEAST_SCALE
        )
    _run(call, (x, mask, y), scale)
    return y


def backward(
    y: torch.Tensor, dy: torch.Tensor, dim: int, scale: float, log: bool, config: Tile | Stream | None = None
) -> torch.Tensor:
    """dx in y's layout, which ``forward`` made dense."""
    dx = torch.empty_like(y)
    if not y.numel():
        return dx
    if y.stride() != dx.stride():  # a saved tensor that hooks gave back in another layout
        y = torch.empty_like(dx).copy_(y)
    multiprocessors = _multiprocessors(y.get_device())
    strides = (dx.stride(), dy.stride())
    call = _plan(y.shape, dim, strides, y.itemsize, log, None, multiprocessors, config)
    if call is None:
        dy = torch.empty_like(dx).copy_(dy)
        call = _plan(y.shape, dim, (dx.stride(),) * 2, y.itemsize, log, None, multiprocessors, config)
    _run(call, (y, dy, dx), scale)
    return dx


def _run(call: Call, tensors: tuple, scale: float) -> None:
    if isinstance(call.config, Stream):
        out = tensors[2]
        scratch = (out, out)  # never touched
        if call.counters:
            partial = torch.empty(call.partials, dtype=torch.float32, device=out.device)
            scratch = (partial, torch.zeros(call.counters, dtype=torch.int32, device=out.device))
        tensors += scratch
    call.launch(call.blocks, tensors, (*call.scalars, scale))


def describe(x: torch.Tensor, mask: torch.Tensor | None, dim: int, log: bool) -> str:
    """The configuration of forward, for ``trinix.explain``."""
    layout = torch.empty_like(x, device="meta").stride()
    strides = (layout, x.stride(), *(() if mask is None else (mask.expand(x.shape).stride(),)))
    call = _plan(x.shape, dim, strides, x.itemsize, log, mask is not None, _multiprocessors(x.get_device()))
    copied = "after a copy, " if call is None else ""
    if call is None:
        call = _plan(x.shape, dim, (layout,) * len(strides), x.itemsize, log, mask is not None, 0)
    config = call.config
    if isinstance(config, Tile):
        return f"{copied}tile kernel, {config.rows} x {config.cols}, {config.num_warps} warps"
    chunks = f"{config.chunks} chunks of {config.steps} steps" if config.chunks > 1 else f"{config.steps} steps"
    return (
        f"{copied}stream kernel, {chunks}, {config.deep * config.rows} x {config.cols} each, {config.num_warps} warps"
    )


def compile_cases(lanes: int = LANES):
    """Rows and columns, tiles and streams, both passes, all dtypes; log and the mask for one of each."""
    multiprocessors = 132 if lanes == 32 else 0  # names are the same for all targets

    def case(name, shape, dim, dtype, log=False, masked=False):
        size, suffix = dtype.itemsize, str(dtype).removeprefix("torch.")
        pointer = POINTERS[suffix]
        dense = torch.empty(shape, device="meta").stride()
        for word, mask, factor in (("fwd", masked, 2), ("bwd", None, 3)):
            if masked and word == "bwd":
                continue
            strides = (dense,) * (3 if mask else 2)
            call = plan(view(shape, dim, strides), size, log, mask, multiprocessors, lanes=lanes)
            scratch = ("*fp32", "*i32") if isinstance(call.config, Stream) else ()
            op = "log_softmax" if log else "softmax"
            yield compile_case(f"{op}/{name}/{word}/{suffix}", call.launch, factor * size, (pointer,) * 3 + scratch)

    for dtype in DTYPES:
        for width in (128, 1000, 4096, 32768, 50257, 131072):
            yield from case(f"rows-{width}", (8192, width), 1, dtype)
        for length in (256, 8192):
            yield from case(f"columns-{length}", (144, length, 128), 1, dtype)
        yield from case("rows-4096", (8192, 4096), 1, dtype, log=True)
        yield from case("rows-4096-mask", (8192, 4096), 1, dtype, masked=True)
