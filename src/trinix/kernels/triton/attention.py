"""Portable Triton attention: every option, forward and backward, any head dimensions up to 256.

A forward program holds M queries and walks over tiles of N keys with the online softmax, in base 2. Tiles that every query
sees in full go through a loop without bounds, those at an edge (causal diagonal, window, last keys) through one with them.

Backward: ``_prepare`` makes delta = rowsum(dout out) - dlse; where out's rounding would show, ``_backward_queries`` first adds up
p dp in its place (``choose_exact``). A sink's gradient is such sums added up over all rows, which ``_backward_keys`` does by the
way, a number for each tile of keys (``choose_sink``). ``_backward_keys`` holds N keys, walks over queries of all heads of the
group, with scores transposed (keys x queries), so that probabilities and dz multiply from registers. dq comes either from the
same walk by float32 atomics (five products a tile), or from ``_backward_queries``, which repeats two of them (seven), in a fixed
order: the same bits on every run. At 256 channels dk and dv are two walks (eight), so that the sums of 128 keys fit the
registers. On Hopper these kernels overlap: none reads what another writes, so the next one fills the processors that one leaves
idle at its end, and only waits for that end at its own. ``_backward_bias`` makes a bias's gradient in the bias's own shape, the
broadcast dimensions added up in a fixed order.

A bias may hold numbers as low as finfo.min where a key is hidden. With one, exponentials are natural: such a number times
log2(e) is -inf. And where it stands at all keys of a row, lse = max + log(sum) has kept nothing of log(sum) in float32 (under
ALiBi float32 inputs see that too): before backward walks, ``_forward`` runs again for the tiles that have such rows, without
values, and stores the two terms apart.

Options are constants of a kernel: what is not there costs nothing.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trinix.kernels import LEAST_SCALE
from trinix.kernels.triton import activation
from trinix.kernels.triton._compile import POINTERS, compile_case
from trinix.kernels.triton._exact import exact_exp, exact_log, exact_tanh
from trinix.kernels.triton._launch import INTERPRETED, Launch, Launcher

_tanh = activation._tanh
_LOG2E = math.log2(math.e)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """a @ b + total. PRECISION "upcast": Triton's interpreter multiplies 16-bit floats wrongly; "double": of float32, by tensor
    cores that take float64, where a chain of float32 additions over all keys has a larger error than PyTorch's product."""
    if PRECISION == "double":
        total += tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    elif PRECISION == "upcast":
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def _exp(x, rest, BASE2: tl.constexpr, SIZE: tl.constexpr):
    """The exponential of x less ``rest``, which is in base 2 for inputs of ``SIZE`` 16 bits, and 0 without a bias."""
    if BASE2:
        return tl.exp2(x)
    if SIZE == 32:
        return exact_exp(x - rest)
    return tl.exp2(x * 1.4426950408889634 - rest)  # tl.exp takes three instructions more, for subnormal results


@triton.jit
def _in_base(x, BASE2: tl.constexpr):
    return x * 1.4426950408889634 if BASE2 else x


@triton.jit
def _load_rows(at, row, end, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BOUND: tl.constexpr):
    """[rows, BLOCK_D] from ``at``, the first row's address; rows from ``end`` on, with BOUND, and columns from D on are 0."""
    col = tl.arange(0, BLOCK_D)
    at = at + row[:, None] * stride + col[None, :]
    if BOUND:
        if D == BLOCK_D:
            return tl.load(at, mask=(row < end)[:, None], other=0.0)
        return tl.load(at, mask=(row < end)[:, None] & (col < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=(col < D)[None, :], other=0.0)


@triton.jit
def _store_rows(at, x, row, end, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    col = tl.arange(0, BLOCK_D)
    tl.store(
        at + row[:, None] * stride + col[None, :], x.to(at.dtype.element_ty),
        mask=(row < end)[:, None] & (col < D)[None, :],
    )  # fmt: skip


@triton.jit
def _score(
    s, row, col, bounds, scales, slope, bias, mask,
    BOUND: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, RAW: tl.constexpr, BASE2: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """(scores times log2(e) with BASE2, tanh of the cap) of s = q k^T. ``row`` and ``col`` broadcast to s, one way or the other.

    ``bias`` and ``mask`` are the addresses of the rows; BIAS or MASK below 0: all keys share what stands there. RAW: leaves out
    the scale, which is then the caller's affair.
    """
    seq_k, shift, left, right = bounds
    scale, cap, into_cap = scales
    tanh = s
    if CAP:
        tanh = exact_tanh(s * into_cap) if SIZE == 32 else _tanh(s * into_cap, 0.0, 0.0)
        z = tanh * cap
    elif RAW:
        z = s
    else:
        z = s * scale
    if ALIBI:
        z -= slope * tl.abs(row + shift - col).to(tl.float32)
    if BIAS:
        if BIAS < 0:
            extra = tl.load(bias)
        elif BOUND:
            extra = tl.load(bias + col, mask=col < seq_k, other=0.0)
        else:
            extra = tl.load(bias + col)
        z += _in_base(extra.to(tl.float32), BASE2)
    if BOUND:
        visible = col < seq_k
        if RIGHT:
            visible &= col <= row + (shift + right)
        if LEFT:
            visible &= col >= row + (shift - left)
        z = tl.where(visible, z, float("-inf"))
    if MASK:
        if MASK < 0:
            shown = tl.load(mask)
        elif BOUND:
            shown = tl.load(mask + col, mask=col < seq_k, other=0)
        else:
            shown = tl.load(mask + col)
        z = tl.where(shown != 0, z, float("-inf"))
    return z, tanh


@triton.jit
def _keep(seed, plane, row, start, drop, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Dropout's mask of M queries x N keys from ``start`` on, a multiple of 4; TRANSPOSED: of keys x queries.

    Word j % 4 of Philox-4x32 at the counter (j // 4, row, plane, 0), as in the PyTorch room.
    """
    quad = start // 4 + tl.arange(0, N // 4)
    if TRANSPOSED:
        first = tl.broadcast_to(quad[:, None], (N // 4, M))
        second = tl.broadcast_to(row[None, :], (N // 4, M))
    else:
        first = tl.broadcast_to(quad[None, :], (M, N // 4))
        second = tl.broadcast_to(row[:, None], (M, N // 4))
    zero = tl.zeros_like(first)
    a, b, c, d = tl.philox(seed, first, second, zero + plane, zero, 7)
    below = drop.to(tl.uint32)
    # compared before they are joined: a byte each moves through shared memory, not a word
    even = tl.join((a >= below).to(tl.int8), (c >= below).to(tl.int8))
    odd = tl.join((b >= below).to(tl.int8), (d >= below).to(tl.int8))
    kept = tl.join(even, odd)
    if TRANSPOSED:
        kept = tl.reshape(tl.permute(kept, (0, 2, 3, 1)), (N, M))
    else:
        kept = tl.reshape(kept, (M, N))
    return kept != 0


@triton.jit
def _keys_of(first, bounds, M: tl.constexpr, N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Where the tiles of keys that queries first .. first + M - 1 see begin, are seen in full, no longer are, and end."""
    seq_k, shift, left, right = bounds
    low = 0
    full_low = 0
    high = seq_k
    full_high = seq_k
    if RIGHT:
        high = tl.maximum(tl.minimum(seq_k, first + M + shift + right), 0)
        full_high = tl.maximum(tl.minimum(seq_k, first + 1 + shift + right), 0)
    if LEFT:
        low = tl.maximum(first + shift - left, 0) // N * N
        full_low = tl.cdiv(tl.maximum(first + M - 1 + shift - left, 0), N) * N
        full_low = tl.minimum(full_low, tl.cdiv(high, N) * N)
        low = tl.minimum(low, full_low)
    full_high = tl.maximum(full_high // N * N, full_low)
    return low, full_low, full_high, high


# ---- forward -----------------------------------------------------------------------------------------------------------


# fmt: off
@triton.jit
def _walk_keys(
    acc, most, total, queries, more_queries, k, v, row, low, high, ks, vs, bounds, scales, slope, bias, mask,
    seed, plane, drop,
    BOUND: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, BLOCK_DV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, RAW: tl.constexpr, BASE2: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, APART: tl.constexpr,
):
    SIZE: tl.constexpr = queries.dtype.primitive_bitwidth
    scale = scales[0]
    seq_k = bounds[0]
    place = tl.arange(0, N)
    some = low < high if LEFT else True  # see _walk_queries
    if some:
        for start in tl.range(low, high, N, num_stages=STAGES):
            start = tl.multiple_of(start, N)
            keys = _load_rows(k + start * ks, place, seq_k - start, ks.to(tl.int32), min(D, BLOCK_D), BLOCK_D, BOUND)
            s = _dot(queries, keys.T, tl.zeros((M, N), tl.float32), PRECISION)
            if TAIL:
                keys = _load_rows(
                    k + BLOCK_D + start * ks, place, seq_k - start, ks.to(tl.int32), D - BLOCK_D, TAIL, BOUND)
                s = _dot(more_queries, keys.T, s, PRECISION)
            s, _tanh_of = _score(
                s, row[:, None], (start + place)[None, :], bounds, scales, slope, bias, mask,
                BOUND, LEFT, RIGHT, CAP, BIAS, MASK, ALIBI, RAW, BASE2, SIZE,
            )
            if RAW:  # the scale is positive, and joins the subtraction
                new = tl.maximum(most, tl.max(s, 1) * scale)
            else:
                new = tl.maximum(most, tl.max(s, 1))
            if BOUND or BIAS or MASK:  # a row that has seen no key yet
                base = tl.where(new == float("-inf"), 0.0, new)
            else:
                base = new
            if RAW:
                p = _exp(s * scale - base[:, None], 0.0, BASE2, SIZE)
            else:
                p = _exp(s - base[:, None], 0.0, BASE2, SIZE)
            shrink = _exp(most - base, 0.0, BASE2, SIZE)
            total = total * shrink + tl.sum(p, 1)
            most = new
            if not APART:
                if DROPOUT:
                    p = tl.where(_keep(seed, plane, row, start, drop, M, N, False), p, 0.0)
                acc = acc * shrink[:, None]
                values = _load_rows(v + start * vs, place, seq_k - start, vs.to(tl.int32), DV, BLOCK_DV, BOUND)
                acc = _dot(p.to(values.dtype), values, acc, PRECISION)
    return acc, most, total


@triton.jit(do_not_specialize=[
    "qb", "qs", "qh", "kb", "ks", "kh", "vb", "vs", "vh", "bias_b", "bias_h", "bias_row", "mask_b", "mask_h",
    "mask_row", "slopes_b", "lse_b", "lse_h", "heads", "group", "seq_q", "seq_k", "tiles", "left", "right",
    "drop",
])
def _forward(
    q, k, v, bias, mask, slopes, sink, seed, ends_q, ends_k, out, lse,
    qb: "i64", qs: "i64", qh: "i64", kb: "i64", ks: "i64", kh: "i64", vb: "i64", vs: "i64", vh: "i64",
    bias_b: "i64", bias_h: "i64", bias_row: "i64",
    mask_b: "i64", mask_h: "i64", mask_row: "i64", slopes_b: "i64", lse_b: "i64", lse_h: "i64",
    heads: "i32", group: "i32", seq_q: "i32", seq_k: "i32", tiles: "i32", left: "i32", right: "i32",
    scale: "fp32", cap: "fp32", into_cap: "fp32", keep_scale: "fp32", drop: "i64",
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, UNIT: tl.constexpr,
    TAIL: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr, VARLEN: tl.constexpr, RAW: tl.constexpr,
    BASE2: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    APART: tl.constexpr,
):
    """APART: ``lse`` is read, and ``out`` is the ``stats`` of rows whose lse has lost its last places: only these are mended."""
    pid = tl.program_id(0)
    tile = pid % tiles
    if RIGHT:
        tile = tiles - 1 - tile  # the longest walks first
    head = pid // tiles % heads
    batch = (pid // tiles // heads).to(tl.int64)
    # strides are counted in units of UNIT elements, so that the compiler sees aligned rows
    qs = qs * UNIT
    ks = ks * UNIT
    vs = vs * UNIT
    q += (batch * qb + head * qh) * UNIT
    k += (batch * kb + head // group * kh) * UNIT
    v += (batch * vb + head // group * vh) * UNIT
    lse += batch * lse_b + head * lse_h
    if VARLEN:
        start_q = tl.load(ends_q + batch)
        start_k = tl.load(ends_k + batch)
        seq_q = tl.load(ends_q + batch + 1) - start_q
        seq_k = tl.load(ends_k + batch + 1) - start_k
        if tile * M >= seq_q:
            return
        q += start_q * qs
        k += start_k * ks
        v += start_k * vs
        lse += start_q
        out += start_q if APART else (start_q.to(tl.int64) * heads + head) * DV
    elif not APART:
        out += (batch * seq_q * heads + head) * DV
    if APART:
        out += (batch * lse_b + head * lse_h) * 3
    first = tile * M
    row = first + tl.arange(0, M)
    lost = row < seq_q
    if APART:
        log = tl.abs(tl.load(lse + row, mask=row < seq_q, other=0.0))
        lost = (log > 1024.0) & (log < float("inf"))
        if tl.sum(lost.to(tl.int32), 0) == 0:
            return
    inside = tl.minimum(row, seq_q - 1)  # rows past the end read the last one and store nothing
    queries = _load_rows(q, inside.to(tl.int64), seq_q, qs, min(D, BLOCK_D), BLOCK_D, False)
    more_queries = queries
    if TAIL:
        more_queries = _load_rows(q + BLOCK_D, inside.to(tl.int64), seq_q, qs, D - BLOCK_D, TAIL, False)
    SIZE: tl.constexpr = queries.dtype.primitive_bitwidth
    bounds = seq_k, seq_k - seq_q, left, right
    scales = scale, cap, into_cap
    slope = 0.0
    if ALIBI:
        slope = _in_base(tl.load(slopes + batch * slopes_b + head), BASE2)
    bias_at = bias + (batch * bias_b + head * bias_h + inside[:, None] * bias_row) * BIAS
    mask_at = mask + (batch * mask_b + head * mask_h + inside[:, None] * mask_row) * MASK
    dropout_seed = 0
    if DROPOUT:
        dropout_seed = tl.load(seed)
    plane = (batch * heads + head).to(tl.int32)
    low, full_low, full_high, high = _keys_of(first, bounds, M, N, LEFT, RIGHT)
    acc = 0.0 if APART else tl.zeros((M, BLOCK_DV), tl.float32)
    most = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    if LEFT:
        acc, most, total = _walk_keys(
            acc, most, total, queries, more_queries, k, v, row, low, full_low, ks, vs, bounds, scales, slope, bias_at,
            mask_at, dropout_seed, plane, drop,
            True, D, DV, BLOCK_D, TAIL, BLOCK_DV, M, N, LEFT, RIGHT, CAP, BIAS, MASK, ALIBI, DROPOUT, RAW, BASE2, PRECISION, STAGES, APART)
    acc, most, total = _walk_keys(
        acc, most, total, queries, more_queries, k, v, row, full_low, full_high, ks, vs, bounds, scales, slope, bias_at,
        mask_at, dropout_seed, plane, drop,
        False, D, DV, BLOCK_D, TAIL, BLOCK_DV, M, N, LEFT, RIGHT, CAP, BIAS, MASK, ALIBI, DROPOUT, RAW, BASE2, PRECISION, STAGES, APART)
    acc, most, total = _walk_keys(
        acc, most, total, queries, more_queries, k, v, row, full_high, high, ks, vs, bounds, scales, slope, bias_at,
        mask_at, dropout_seed, plane, drop,
        True, D, DV, BLOCK_D, TAIL, BLOCK_DV, M, N, LEFT, RIGHT, CAP, BIAS, MASK, ALIBI, DROPOUT, RAW, BASE2, PRECISION, STAGES, APART)
    if SINK:
        logit = _in_base(tl.load(sink + head).to(tl.float32), BASE2)
        new = tl.maximum(most, logit)
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink = _exp(most - base, 0.0, BASE2, SIZE)
        total = total * shrink + _exp(logit - base, 0.0, BASE2, SIZE)
        if not APART:
            acc = acc * shrink[:, None]
        most = new
    if APART:
        tl.store(out + row, most, mask=lost)
        total = tl.where(lost, total, 1.0)
        tl.store(out + 2 * lse_h + row, exact_log(total) if SIZE == 32 else tl.log2(total), mask=lost)
        return
    total = tl.where(total == 0.0, 1.0, total)  # no key was seen: out 0, lse -inf; a NaN passes
    factor = tl.math.div_rn(1.0, total) if SIZE == 32 else 1.0 / total
    if DROPOUT:
        factor = factor * keep_scale
    log = most * 0.6931471805599453 if BASE2 else most
    tl.store(lse + row, log + exact_log(total), mask=row < seq_q)
    _store_rows(out, acc * factor[:, None], row.to(tl.int64), seq_q, heads.to(tl.int64) * DV, DV, BLOCK_DV)


# ---- backward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _statistics(at, far, row, end, BOUND: tl.constexpr, REST: tl.constexpr):
    """(lse in the kernels' base, delta, with REST rest) of rows, ``far`` apart; +inf and 0 for those from ``end`` on.

    Some are read twice: with as many numbers as threads, each thread copies one into shared memory and takes from there
    what it needs. Of fewer, Triton 3.6 has every thread copy all that it needs by itself.
    """
    at = at + (tl.arange(0, 4) % (3 if REST else 2))[:, None] * far + row[None, :]
    if BOUND:
        four = tl.load(at, mask=(row < end)[None, :], other=0.0)
    else:
        four = tl.load(at)
    even, odd = tl.split(tl.reshape(tl.trans(four), (row.shape[0], 2, 2)))
    log, rest = tl.split(even)
    sums, _odd = tl.split(odd)
    if BOUND:
        log = tl.where(row < end, log, float("inf"))
    return log, sums, rest


@triton.jit(do_not_specialize=["ob", "os", "oh", "gb", "gs", "gh", "lb", "lh", "ls", "heads", "seq_q", "tiles"])
def _prepare(
    out, dout, lse, dlse, stats, dq,
    ob: "i64", os: "i64", oh: "i64", gb: "i64", gs: "i64", gh: "i64", lb: "i64", lh: "i64", ls: "i64",
    heads: "i32", seq_q: "i32", tiles: "i32",
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, UNIT: tl.constexpr,
    DLSE: tl.constexpr, BASE2: tl.constexpr, ZERO: tl.constexpr, REST: tl.constexpr, OUT: tl.constexpr, M: tl.constexpr,
):
    """stats [.., head, 2, row]: lse in the kernels' base, +inf where no key was seen, and delta = rowsum(dout out) - dlse.

    With REST [.., head, 3, row]: the third, rest, is what lse lacks (see ``_exp``). Without OUT delta is -dlse, which
    ``_backward_queries`` adds the sum to.

    ZERO: zeroes dq, which atomics add to.
    """
    pid = tl.program_id(0)
    head = pid // tiles % heads
    batch = (pid // tiles // heads).to(tl.int64)
    row = pid % tiles * M + tl.arange(0, M)
    far = row.to(tl.int64)
    sums = tl.zeros((M,), tl.float32)
    if OUT:
        o = _load_rows(out + (batch * ob + head * oh) * UNIT, far, seq_q, os * UNIT, DV, BLOCK_DV, True).to(tl.float32)
        g = _load_rows(dout + (batch * gb + head * gh) * UNIT, far, seq_q, gs * UNIT, DV, BLOCK_DV, True).to(tl.float32)
        sums = tl.sum(o * g, 1)
    if DLSE:
        sums -= tl.load(dlse + (batch * lb + head * lh + far * ls), mask=row < seq_q, other=0.0).to(tl.float32)
    plane = (batch * heads + head) * seq_q
    log = tl.load(lse + plane + row, mask=row < seq_q, other=0.0)
    log = tl.where(log == float("-inf"), float("inf"), _in_base(log, BASE2))
    stats += plane * (3 if REST else 2)
    tl.store(stats + row, log, mask=row < seq_q)
    tl.store(stats + seq_q + row, sums, mask=row < seq_q)
    if REST:
        tl.store(stats + 2 * seq_q + row, tl.zeros((M,), tl.float32), mask=row < seq_q)
    if ZERO:
        dq += (batch * seq_q * heads + head) * D
        _store_rows(dq, tl.zeros((M, BLOCK_D), tl.float32), far, seq_q, heads.to(tl.int64) * D, D, BLOCK_D)


@triton.jit
def _walk_queries(
    dk, dv, dsink, keys, values, q, dout, stats, far_sums, share, dq, dq_row, col, low, high, seq_q, qs, gs, bounds, scales, slope,
    bias, bias_row, mask, mask_row, seed, plane, drop, keep_scale, back_scale, first_key,
    BOUND: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, FUSED: tl.constexpr, BASE2: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr, WANT_SINK: tl.constexpr, ONE: tl.constexpr,
):
    SIZE: tl.constexpr = keys.dtype.primitive_bitwidth
    REST: tl.constexpr = BIAS != 0 or (ALIBI and not BASE2)
    place = tl.arange(0, M)
    # A loop that may not run at all has sums that other instructions than products write on the way around it, and ptxas
    # then has every product of the loop wait for the one before (C7515). In a loop over heads it has not, and the guard
    # costs registers.
    some = low < high if ONE else True
    if some:
        for start in tl.range(low, high, M, num_stages=STAGES):
            start = tl.multiple_of(start, M)
            row = start + place
            queries = _load_rows(q + start * qs, place, seq_q - start, qs.to(tl.int32), D, BLOCK_D, BOUND)
            s = _dot(keys, queries.T, tl.zeros((N, M), tl.float32), PRECISION)
            log, sums, rest = _statistics(stats, far_sums, row, seq_q, BOUND, REST)
            inside = tl.minimum(row, seq_q - 1) if BOUND else row
            z, tanh = _score(
                s, row[None, :], col[:, None], bounds, scales, slope, bias + inside[None, :] * bias_row * BIAS,
                mask + inside[None, :] * mask_row * MASK, BOUND, LEFT, RIGHT, CAP, BIAS, MASK, ALIBI, False, BASE2, SIZE,
            )
            p = _exp(z - log[None, :], rest[None, :] if REST else 0.0, BASE2, SIZE)
            grads = _load_rows(dout + start * gs, place, seq_q - start, gs.to(tl.int32), DV, BLOCK_DV, BOUND)
            if DROPOUT:
                kept = _keep(seed, plane, row, first_key, drop, M, N, True)
            if WANT_V:
                if DROPOUT:
                    dropped = tl.where(kept, p * keep_scale, 0.0)
                    dv = _dot(dropped.to(grads.dtype), grads, dv, PRECISION)
                else:
                    dv = _dot(p.to(grads.dtype), grads, dv, PRECISION)
            if WANT_K or FUSED:
                dp = _dot(values, grads.T, tl.zeros((N, M), tl.float32), PRECISION)
                if DROPOUT:
                    dp = tl.where(kept, dp * keep_scale, 0.0)
                if WANT_SINK:  # the shares are read no sooner, for want of registers; p dp is then part of dz
                    _log, shares, _rest = _statistics(share, 0, row, seq_q, BOUND, False)
                    dz = p * dp
                    dsink += tl.sum(dz * shares[None, :], 1)
                    dz -= p * sums[None, :]
                else:
                    dz = p * (dp - sums[None, :])
                if CAP:
                    dz = dz * (1.0 - tanh * tanh)
                dz = dz.to(queries.dtype)
            if WANT_K:
                dk = _dot(dz, queries, dk, PRECISION)
            if FUSED:
                part = _dot(dz.T, keys, tl.zeros((M, BLOCK_D), tl.float32), PRECISION) * back_scale
                d = tl.arange(0, BLOCK_D)
                at = dq + start * dq_row + place[:, None] * dq_row.to(tl.int32) + d[None, :]
                if BOUND or D != BLOCK_D:
                    tl.atomic_add(at, part, mask=(row < seq_q)[:, None] & (d < D)[None, :], sem="relaxed")
                else:
                    tl.atomic_add(at, part, sem="relaxed")
    return dk, dv, dsink


@triton.jit(do_not_specialize=[
    "qb", "qs", "qh", "kb", "ks", "kh", "vb", "vs", "vh", "gb", "gs", "gh", "dkb", "dks", "dkh", "dvb", "dvs", "dvh",
    "dk_split", "dv_split", "bias_b", "bias_h", "bias_row", "mask_b", "mask_h", "mask_row",
    "slopes_b", "lse_b", "lse_h", "heads", "group", "each", "seq_q", "seq_k", "tiles", "left", "right", "drop",
])
def _backward_keys(
    q, k, v, bias, mask, slopes, seed, ends_q, ends_k, dout, stats, dq, dk, dv, share, dsink,
    qb: "i64", qs: "i64", qh: "i64", kb: "i64", ks: "i64", kh: "i64", vb: "i64", vs: "i64", vh: "i64",
    gb: "i64", gs: "i64", gh: "i64", dkb: "i64", dks: "i64", dkh: "i64", dvb: "i64", dvs: "i64", dvh: "i64",
    dk_split: "i64", dv_split: "i64", bias_b: "i64", bias_h: "i64", bias_row: "i64",
    mask_b: "i64", mask_h: "i64", mask_row: "i64", slopes_b: "i64", lse_b: "i64", lse_h: "i64",
    heads: "i32", group: "i32", each: "i32", seq_q: "i32", seq_k: "i32", tiles: "i32", left: "i32", right: "i32",
    scale: "fp32", cap: "fp32", into_cap: "fp32", keep_scale: "fp32", back_scale: "fp32", drop: "i64",
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, UNIT: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, VARLEN: tl.constexpr, FUSED: tl.constexpr, ONE: tl.constexpr, BASE2: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr, WANT_SINK: tl.constexpr, OVERLAP: tl.constexpr,
):
    """dk and dv of N keys over ``each`` heads of the group (the whole, or one of several parts that are added up later).

    WANT_SINK: dsink [batch, head, tile] takes the sum of share p dp over these keys and all queries; share [.., head, row] is the
    probability of the sink.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    tile = pid % tiles  # with causal, the first keys are seen by most queries: the longest walks come first
    parts = group // each
    part = pid // tiles % parts
    key_heads = heads // group
    key_head = pid // tiles // parts % key_heads
    batch = (pid // tiles // parts // key_heads).to(tl.int64)
    qs = qs * UNIT
    gs = gs * UNIT
    q += batch * qb * UNIT
    k += (batch * kb + key_head * kh) * UNIT
    v += (batch * vb + key_head * vh) * UNIT
    dout += batch * gb * UNIT
    dk += (part * dk_split + batch * dkb + key_head * dkh) * UNIT
    dv += (part * dv_split + batch * dvb + key_head * dvh) * UNIT
    REST: tl.constexpr = BIAS != 0 or (ALIBI and not BASE2)
    stats += batch * lse_b * (3 if REST else 2)
    share += batch * lse_b
    dq_row = heads.to(tl.int64) * D
    if VARLEN:
        start_q = tl.load(ends_q + batch).to(tl.int64)
        start_k = tl.load(ends_k + batch).to(tl.int64)
        seq_q = (tl.load(ends_q + batch + 1) - start_q).to(tl.int32)
        seq_k = (tl.load(ends_k + batch + 1) - start_k).to(tl.int32)
        if tile * N >= seq_k:
            return
        q += start_q * qs
        k += start_k * ks * UNIT
        v += start_k * vs * UNIT
        dout += start_q * gs
        dk += start_k * dks * UNIT
        dv += start_k * dvs * UNIT
        stats += start_q
        dq += start_q * dq_row
        share += start_q
    else:
        dq += batch * seq_q * dq_row
    first_key = tile * N
    col = first_key + tl.arange(0, N)
    far = col.to(tl.int64)
    keys = _load_rows(k, far, seq_k, ks * UNIT, D, BLOCK_D, True)
    values = _load_rows(v, far, seq_k, vs * UNIT, DV, BLOCK_DV, True)
    shift = seq_k - seq_q
    bounds = seq_k, shift, left, right
    scales = scale, cap, into_cap
    dropout_seed = 0
    if DROPOUT:
        dropout_seed = tl.load(seed)
    # where queries begin to see a key of the tile, see all of them, no longer do, and see none
    low = 0
    full_low = 0
    high = seq_q
    full_high = seq_q // M * M
    if RIGHT:
        low = tl.maximum(first_key - shift - right, 0) // M * M
        full_low = tl.cdiv(tl.maximum(first_key + N - 1 - shift - right, 0), M) * M
    if LEFT:
        high = tl.maximum(tl.minimum(seq_q, first_key + N - shift + left), 0)
        full_high = tl.maximum(tl.minimum(full_high, (first_key + 1 - shift + left) // M * M), 0)
    if first_key + N > seq_k:  # keys past the end: no tile is seen in full
        full_high = 0
    full_low = tl.minimum(full_low, tl.cdiv(high, M) * M)
    low = tl.minimum(low, full_low)
    full_high = tl.maximum(full_high, full_low)
    # what is not wanted is one number that nothing is added to
    dk_sum = tl.zeros((N, BLOCK_D), tl.float32) if WANT_K else 0.0
    dv_sum = tl.zeros((N, BLOCK_DV), tl.float32) if WANT_V else 0.0
    for i in range(1 if ONE else each):  # without the loop the compiler keeps everything in registers
        head = key_head * group + part * each + i
        slope = 0.0
        if ALIBI:
            slope = _in_base(tl.load(slopes + batch * slopes_b + head), BASE2)
        bias_at = bias + (batch * bias_b + head * bias_h) * BIAS
        mask_at = mask + (batch * mask_b + head * mask_h) * MASK
        plane = (batch * heads + head).to(tl.int32)
        q_at = q + head * qh * UNIT
        g_at = dout + head * gh * UNIT
        stats_at = stats + head * lse_h * (3 if REST else 2)
        dq_at = dq + head * D
        share_at = share + head * lse_h
        sink_sum = tl.zeros((N,), tl.float32) if WANT_SINK else 0.0
        if RIGHT:
            dk_sum, dv_sum, sink_sum = _walk_queries(
                dk_sum, dv_sum, sink_sum, keys, values, q_at, g_at, stats_at, lse_h, share_at, dq_at, dq_row, col, low, full_low, seq_q,
                qs, gs, bounds, scales, slope, bias_at, bias_row, mask_at, mask_row, dropout_seed,
                plane, drop, keep_scale, back_scale, first_key,
                True, D, DV, BLOCK_D, BLOCK_DV, M, N, LEFT, RIGHT, CAP, BIAS, MASK, ALIBI, DROPOUT, FUSED, BASE2, PRECISION, STAGES, WANT_K, WANT_V, WANT_SINK, ONE)
        dk_sum, dv_sum, sink_sum = _walk_queries(
            dk_sum, dv_sum, sink_sum, keys, values, q_at, g_at, stats_at, lse_h, share_at, dq_at, dq_row, col, full_low, full_high, seq_q,
            qs, gs, bounds, scales, slope, bias_at, bias_row, mask_at, mask_row, dropout_seed,
            plane, drop, keep_scale, back_scale, first_key,
            False, D, DV, BLOCK_D, BLOCK_DV, M, N, LEFT, RIGHT, CAP, BIAS, MASK, ALIBI, DROPOUT, FUSED, BASE2, PRECISION, STAGES, WANT_K, WANT_V, WANT_SINK, ONE)
        dk_sum, dv_sum, sink_sum = _walk_queries(
            dk_sum, dv_sum, sink_sum, keys, values, q_at, g_at, stats_at, lse_h, share_at, dq_at, dq_row, col, full_high, high, seq_q,
            qs, gs, bounds, scales, slope, bias_at, bias_row, mask_at, mask_row, dropout_seed,
            plane, drop, keep_scale, back_scale, first_key,
            True, D, DV, BLOCK_D, BLOCK_DV, M, N, LEFT, RIGHT, CAP, BIAS, MASK, ALIBI, DROPOUT, FUSED, BASE2, PRECISION, STAGES, WANT_K, WANT_V, WANT_SINK, ONE)
        if WANT_SINK:
            tl.store(dsink + (batch * heads + head) * tiles + tile, tl.sum(sink_sum, 0))
    if WANT_K:
        _store_rows(dk, dk_sum * back_scale, far, seq_k, dks * UNIT, D, BLOCK_D)
    if WANT_V:
        _store_rows(dv, dv_sum, far, seq_k, dvs * UNIT, DV, BLOCK_DV)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _walk_keys_back(
    dq, queries, grads, log, sums, rest, k, v, row, low, high, ks, vs, bounds, scales, slope, bias, mask,
    seed, plane, drop, keep_scale,
    BOUND: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, BASE2: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    SUMS: tl.constexpr,
):
    """dq and what these tiles add to it; with SUMS that is the sum of p dp, a number a row."""
    SIZE: tl.constexpr = queries.dtype.primitive_bitwidth
    REST: tl.constexpr = BIAS != 0 or (ALIBI and not BASE2)
    seq_k = bounds[0]
    place = tl.arange(0, N)
    some = low < high if LEFT else True  # see _walk_queries
    if some:
        for start in tl.range(low, high, N, num_stages=STAGES):
            start = tl.multiple_of(start, N)
            keys = _load_rows(k + start * ks, place, seq_k - start, ks.to(tl.int32), D, BLOCK_D, BOUND)
            s = _dot(queries, keys.T, tl.zeros((M, N), tl.float32), PRECISION)
            values = _load_rows(v + start * vs, place, seq_k - start, vs.to(tl.int32), DV, BLOCK_DV, BOUND)
            dp = _dot(grads, values.T, tl.zeros((M, N), tl.float32), PRECISION)
            z, tanh = _score(
                s, row[:, None], (start + place)[None, :], bounds, scales, slope, bias, mask,
                BOUND, LEFT, RIGHT, CAP, BIAS, MASK, ALIBI, False, BASE2, SIZE,
            )
            p = _exp(z - log[:, None], rest[:, None] if REST else 0.0, BASE2, SIZE)
            if DROPOUT:
                dp = tl.where(_keep(seed, plane, row, start, drop, M, N, False), dp * keep_scale, 0.0)
            if SUMS:
                dq += tl.sum(p * dp, 1)
            else:
                dz = p * (dp - sums[:, None])
                if CAP:
                    dz = dz * (1.0 - tanh * tanh)
                dq = _dot(dz.to(keys.dtype), keys, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=[
    "qb", "qs", "qh", "kb", "ks", "kh", "vb", "vs", "vh", "gb", "gs", "gh", "dqb", "dqs", "dqh", "bias_b", "bias_h",
    "bias_row", "mask_b", "mask_h", "mask_row", "slopes_b", "lse_b", "lse_h", "heads", "group",
    "seq_q", "seq_k", "tiles", "left", "right", "drop",
])
def _backward_queries(
    q, k, v, bias, mask, slopes, seed, ends_q, ends_k, dout, stats, dq,
    qb: "i64", qs: "i64", qh: "i64", kb: "i64", ks: "i64", kh: "i64", vb: "i64", vs: "i64", vh: "i64",
    gb: "i64", gs: "i64", gh: "i64", dqb: "i64", dqs: "i64", dqh: "i64",
    bias_b: "i64", bias_h: "i64", bias_row: "i64",
    mask_b: "i64", mask_h: "i64", mask_row: "i64", slopes_b: "i64", lse_b: "i64", lse_h: "i64",
    heads: "i32", group: "i32", seq_q: "i32", seq_k: "i32", tiles: "i32", left: "i32", right: "i32",
    scale: "fp32", cap: "fp32", into_cap: "fp32", keep_scale: "fp32", back_scale: "fp32", drop: "i64",
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, UNIT: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, VARLEN: tl.constexpr, BASE2: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr, SUMS: tl.constexpr,
):
    """dq of M queries: the forward's walk. SUMS: instead of dq the sum of p dp of each row, which joins ``stats``."""
    pid = tl.program_id(0)
    tile = pid % tiles
    if RIGHT:
        tile = tiles - 1 - tile
    head = pid // tiles % heads
    batch = (pid // tiles // heads).to(tl.int64)
    qs = qs * UNIT
    ks = ks * UNIT
    vs = vs * UNIT
    gs = gs * UNIT
    dqs = dqs * UNIT
    q += (batch * qb + head * qh) * UNIT
    k += (batch * kb + head // group * kh) * UNIT
    v += (batch * vb + head // group * vh) * UNIT
    dout += (batch * gb + head * gh) * UNIT
    dq += (batch * dqb + head * dqh) * UNIT
    REST: tl.constexpr = BIAS != 0 or (ALIBI and not BASE2)
    stats += (batch * lse_b + head * lse_h) * (3 if REST else 2)
    if VARLEN:
        start_q = tl.load(ends_q + batch).to(tl.int64)
        start_k = tl.load(ends_k + batch).to(tl.int64)
        seq_q = (tl.load(ends_q + batch + 1) - start_q).to(tl.int32)
        seq_k = (tl.load(ends_k + batch + 1) - start_k).to(tl.int32)
        if tile * M >= seq_q:
            return
        q += start_q * qs
        k += start_k * ks
        v += start_k * vs
        dout += start_q * gs
        dq += start_q * dqs
        stats += start_q
    first = tile * M
    row = first + tl.arange(0, M)
    inside = tl.minimum(row, seq_q - 1)
    queries = _load_rows(q, inside.to(tl.int64), seq_q, qs, D, BLOCK_D, False)
    grads = _load_rows(dout, inside.to(tl.int64), seq_q, gs, DV, BLOCK_DV, False)
    stats_at = stats + inside
    log = tl.load(stats_at)
    sums = tl.load(stats_at + lse_h)
    rest = tl.load(stats_at + 2 * lse_h) if REST else sums
    bounds = seq_k, seq_k - seq_q, left, right
    scales = scale, cap, into_cap
    slope = 0.0
    if ALIBI:
        slope = _in_base(tl.load(slopes + batch * slopes_b + head), BASE2)
    bias_at = bias + (batch * bias_b + head * bias_h + inside[:, None] * bias_row) * BIAS
    mask_at = mask + (batch * mask_b + head * mask_h + inside[:, None] * mask_row) * MASK
    dropout_seed = 0
    if DROPOUT:
        dropout_seed = tl.load(seed)
    plane = (batch * heads + head).to(tl.int32)
    low, full_low, full_high, high = _keys_of(first, bounds, M, N, LEFT, RIGHT)
    total = tl.zeros((M,), tl.float32) if SUMS else tl.zeros((M, BLOCK_D), tl.float32)
    if LEFT:
        total = _walk_keys_back(
            total, queries, grads, log, sums, rest, k, v, row, low, full_low, ks, vs, bounds, scales, slope, bias_at,
            mask_at, dropout_seed, plane, drop, keep_scale,
            True, D, DV, BLOCK_D, BLOCK_DV, M, N, LEFT, RIGHT, CAP, BIAS, MASK, ALIBI, DROPOUT, BASE2, PRECISION, STAGES, SUMS)
    total = _walk_keys_back(
        total, queries, grads, log, sums, rest, k, v, row, full_low, full_high, ks, vs, bounds, scales, slope, bias_at, mask_at, dropout_seed, plane, drop, keep_scale,
        False, D, DV, BLOCK_D, BLOCK_DV, M, N, LEFT, RIGHT, CAP, BIAS, MASK, ALIBI, DROPOUT, BASE2, PRECISION, STAGES, SUMS)
    total = _walk_keys_back(
        total, queries, grads, log, sums, rest, k, v, row, full_high, high, ks, vs, bounds, scales, slope, bias_at,
        mask_at, dropout_seed, plane, drop, keep_scale,
        True, D, DV, BLOCK_D, BLOCK_DV, M, N, LEFT, RIGHT, CAP, BIAS, MASK, ALIBI, DROPOUT, BASE2, PRECISION, STAGES, SUMS)
    if SUMS:
        tl.store(stats_at + lse_h, sums + total, mask=row < seq_q)
    else:
        _store_rows(dq, total * back_scale, row.to(tl.int64), seq_q, dqs, D, BLOCK_D)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=[
    "qb", "qs", "qh", "kb", "ks", "kh", "vb", "vs", "vh", "gb", "gs", "gh", "bias_b", "bias_h", "bias_row",
    "mask_b", "mask_h", "mask_row", "slopes_b", "lse_b", "lse_h", "batch", "heads", "group", "seq_q",
    "seq_k", "row_tiles", "key_tiles", "splits", "left", "right", "drop",
])
def _backward_bias(
    q, k, v, bias, mask, slopes, seed, dout, stats, dbias,
    qb: "i64", qs: "i64", qh: "i64", kb: "i64", ks: "i64", kh: "i64", vb: "i64", vs: "i64", vh: "i64",
    gb: "i64", gs: "i64", gh: "i64", bias_b: "i64", bias_h: "i64", bias_row: "i64",
    mask_b: "i64", mask_h: "i64", mask_row: "i64", slopes_b: "i64", lse_b: "i64", lse_h: "i64",
    batch: "i32", heads: "i32", group: "i32", seq_q: "i32", seq_k: "i32", row_tiles: "i32", key_tiles: "i32",
    splits: "i32", left: "i32", right: "i32",
    scale: "fp32", cap: "fp32", into_cap: "fp32", keep_scale: "fp32", drop: "i64",
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, UNIT: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, BY_BATCH: tl.constexpr, BY_HEAD: tl.constexpr, BY_ROW: tl.constexpr, BASE2: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):
    """A tile of dbias [splits, B|1, H|1, Sq|1, Sk]: the sum of dz over the dimensions that the bias lacks, or a share of it."""
    pid = tl.program_id(0)
    key_tile = pid % key_tiles
    pid = pid // key_tiles
    own_tiles = row_tiles if BY_ROW else 1
    own_heads = heads if BY_HEAD else 1
    own_batch = batch if BY_BATCH else 1
    own_tile = pid % own_tiles
    own_head = pid // own_tiles % own_heads
    own_b = pid // own_tiles // own_heads % own_batch
    split = pid // own_tiles // own_heads // own_batch
    # what is summed over, as one number: batch outermost, tiles of rows innermost
    sum_tiles = 1 if BY_ROW else row_tiles
    sum_heads = 1 if BY_HEAD else heads
    count = (1 if BY_BATCH else batch) * sum_heads * sum_tiles
    share = tl.cdiv(count, splits)
    shift = seq_k - seq_q
    bounds = seq_k, shift, left, right
    scales = scale, cap, into_cap
    place = tl.arange(0, N)
    col = key_tile * N + place
    total = tl.zeros((M, N), tl.float32)
    dropout_seed = 0
    if DROPOUT:
        dropout_seed = tl.load(seed)
    for at in range(split * share, tl.minimum(count, split * share + share)):
        tile = own_tile if BY_ROW else at % sum_tiles
        head = own_head if BY_HEAD else at // sum_tiles % sum_heads
        b = (own_b if BY_BATCH else at // sum_tiles // sum_heads).to(tl.int64)
        first = tile * M
        some = True
        if RIGHT:
            some = key_tile * N <= first + M - 1 + shift + right
        if LEFT:
            some = some & (key_tile * N + N - 1 >= first + shift - left)
        if some:
            row = first + tl.arange(0, M)
            inside = tl.minimum(row, seq_q - 1)
            far = inside.to(tl.int64)
            queries = _load_rows(q + (b * qb + head * qh) * UNIT, far, seq_q, qs * UNIT, D, BLOCK_D, False)
            keys = _load_rows(
                k + (b * kb + head // group * kh) * UNIT, col.to(tl.int64), seq_k, ks * UNIT, D, BLOCK_D, True)
            s = _dot(queries, keys.T, tl.zeros((M, N), tl.float32), PRECISION)
            slope = 0.0
            if ALIBI:
                slope = _in_base(tl.load(slopes + b * slopes_b + head), BASE2)
            z, _tanh_of = _score(
                s, row[:, None], col[None, :], bounds, scales, slope,
                bias + (b * bias_b + head * bias_h + far[:, None] * bias_row) * BIAS,
                mask + (b * mask_b + head * mask_h + far[:, None] * mask_row) * MASK,
                True, LEFT, RIGHT, CAP, BIAS, MASK, ALIBI, False, BASE2, keys.dtype.primitive_bitwidth,
            )
            plane = (b * heads + head).to(tl.int32)
            stats_at = stats + (b * lse_b + head * lse_h) * 3 + row
            log = tl.load(stats_at, mask=row < seq_q, other=float("inf"))
            sums = tl.load(stats_at + lse_h, mask=row < seq_q, other=0.0)
            rest = tl.load(stats_at + 2 * lse_h, mask=row < seq_q, other=0.0)
            p = _exp(z - log[:, None], rest[:, None], BASE2, keys.dtype.primitive_bitwidth)
            grads = _load_rows(dout + (b * gb + head * gh) * UNIT, far, seq_q, gs * UNIT, DV, BLOCK_DV, False)
            values = _load_rows(
                v + (b * vb + head // group * vh) * UNIT, col.to(tl.int64), seq_k, vs * UNIT, DV, BLOCK_DV, True)
            dp = _dot(grads, values.T, tl.zeros((M, N), tl.float32), PRECISION)
            if DROPOUT:
                dp = tl.where(_keep(dropout_seed, plane, row, key_tile * N, drop, M, N, False), dp * keep_scale, 0.0)
            total += p * (dp - sums[:, None])
    plane = ((split * own_batch + own_b) * own_heads + own_head).to(tl.int64)
    if BY_ROW:
        row = own_tile * M + tl.arange(0, M)
        dbias += plane * seq_q * seq_k
        _store_tile = (row < seq_q)[:, None] & (col < seq_k)[None, :]
        tl.store(
            dbias + row[:, None].to(tl.int64) * seq_k + col[None, :], total.to(dbias.dtype.element_ty), mask=_store_tile)
    else:
        tl.store(dbias + plane * seq_k + col, tl.sum(total, 0).to(dbias.dtype.element_ty), mask=col < seq_k)
# fmt: on


# ---- configurations ----------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """Tile of queries, tile of keys, warps, stages of the software pipeline."""

    m: int
    n: int
    num_warps: int
    num_stages: int


def block_of(d: int) -> int:
    """The tile's width for a head dimension: a power of two, as much as a matrix instruction takes at least."""
    return max(16, triton.next_power_of_2(d))


def score_channels(d: int) -> tuple[int, int]:
    """Widths of the one or two tiles of channels in which the forward multiplies queries and keys: 192 need not be 256."""
    return (128, 64) if 128 < d <= 192 else (block_of(d), 0)


def choose_forward(d: int, dv: int, size: int, card: str, heavy: bool = False, aligned: bool = True) -> Config:
    """``size``: bytes of an element; ``card``: "sm_90", "nvidia" or "amd"; ``heavy``: tiles of a bias, a mask or dropout;
    ``aligned``: accesses of 16 bytes, without which the larger tiles of 129 to 192 channels spill 900 bytes a thread."""
    wide = max(block_of(d), block_of(dv))
    if size == 4:
        m = 64 if wide <= 64 else 32 if wide == 128 else 16
        return Config(m // 2 if heavy and m > 16 else m, 32 if wide <= 128 else 16, 8, 1)
    if card == "amd":
        return Config(128, 64, 4, 1) if wide <= 128 else Config(64, 32, 4, 1)
    if wide <= 64:
        return Config(64, 64, 4, 3)
    if wide <= 128:
        return Config(64, 64, 8, 2) if heavy else Config(64, 64, 4, 3)
    if card == "sm_90" and aligned and not heavy and score_channels(d)[1]:
        return Config(128, 64, 8, 3 if dv <= 128 else 2)
    return Config(128, 32, 8, 3) if card == "sm_90" else Config(64, 32, 8, 2)


def choose_keys(d: int, dv: int, size: int, card: str, heavy: bool = False) -> Config:
    """Of ``_backward_keys``."""
    wide = max(block_of(d), block_of(dv))
    if size == 4:
        return Config(16, 32, 8, 1) if wide <= 128 else Config(16, 16, 8, 1)
    if card == "amd":
        return Config(32, 64, 4, 1) if wide <= 128 else Config(16, 32, 4, 1)
    if wide <= 64:
        return Config(64, 64, 4, 3) if card == "sm_90" else Config(32, 64, 4, 2)
    if wide <= 128:
        # heavy: a float32 bias and a mask take shared memory in every stage
        return Config(64, 128, 8, 2 if heavy else 3) if card == "sm_90" else Config(32, 64, 8, 2)
    return Config(64, 64, 8, 2) if card == "sm_90" else Config(32, 32, 8, 1)


def choose_split(d: int, dv: int, size: int, card: str, heavy: bool = False) -> tuple[Config, Config] | None:
    """Of two ``_backward_keys`` with the same tile of keys, for dk alone and for dv alone; None: one does both."""
    if card == "sm_90" and size == 2 and max(block_of(d), block_of(dv)) == 256 and not heavy:
        return Config(32, 128, 8, 2), Config(64, 128, 8, 2)
    return None


def choose_queries(d: int, dv: int, size: int, card: str, heavy: bool = False, edge: bool = False) -> Config:
    """Of ``_backward_queries``; ``edge``: causal, or a window to the right."""
    wide = max(block_of(d), block_of(dv))
    if size == 4:
        return Config(32, 32, 8, 1) if wide <= 64 else Config(16, 16, 8, 1)
    if card == "amd":
        return Config(64, 32, 4, 1)
    if wide <= 64:
        # heavy: the larger tile spills more than a kilobyte a thread
        if card == "sm_90" and not heavy:
            return Config(64 if edge else 128, 64, 4, 3)
        return Config(64, 64, 4, 2)
    if wide <= 128:
        return Config(128, 64, 8, 2 if heavy else 3) if card == "sm_90" else Config(64, 64, 8, 2)
    return Config(128, 32, 8, 2) if card == "sm_90" else Config(32, 32, 8, 1)


def choose_bias(d: int, dv: int, size: int, card: str) -> Config:
    """Of ``_backward_bias``."""
    wide = max(block_of(d), block_of(dv))
    if size == 4:
        return Config(32, 32, 8, 1) if wide <= 128 else Config(16, 16, 8, 1)
    return Config(64, 32, 4, 1) if wide <= 128 else Config(32, 16, 4, 1)


def choose_fused(d: int, dv: int, size: int, card: str) -> bool:
    """Whether dq comes from the walk over queries, by atomics, where the caller does not ask for the same bits every time."""
    return False


_FEW_KEYS = 16


def choose_exact(size: int, seq_k: int, left: int, right: int, more: bool) -> bool:
    """Whether delta is the sum of p dp over the keys, for two more products, and not rowsum(dout out): an out of 2 bytes is rounded,
    and where a row sees few keys the rounding is all that is left of dp - delta. ``more``: a gradient of a bias is wanted, or of a
    sink that is not added up elsewhere (``choose_sink``): these add such differences up without the products in between that would
    hide it (12 of 264 random calls in half types were up to 7 times over the error that PyTorch makes). A float32 out is as good as
    p, which has the rounding of lse in it.
    """
    if size == 4:
        return False
    keys = min(seq_k, left + right + 1) if left >= 0 and right >= 0 else seq_k
    return more or keys <= _FEW_KEYS


def choose_sink(size: int, dk: bool, bias: bool) -> bool:
    """Whether a sink's gradient is added up where dk is made, which has p and dp, as ``choose_exact`` has it. With a bias the sum
    would take the layout of the bias's tile, and ptxas then has every product of the loop wait for the one before (C7515)."""
    return size == 2 and dk and not bias


def choose_parts(programs: int, group: int, processors: int) -> int:
    """Into how many parts a group's query heads are split in ``_backward_keys``: enough programs for all processors twice."""
    for parts in range(1, group):
        if group % parts == 0 and programs * parts >= 2 * processors:
            return parts
    return group


# ---- launches ----------------------------------------------------------------------------------------------------------

_FORWARD = Launcher(_forward, tensors=12)
_PREPARE = Launcher(_prepare, tensors=6)
_BACKWARD_KEYS = Launcher(_backward_keys, tensors=16)
_BACKWARD_QUERIES = Launcher(_backward_queries, tensors=12)
_BACKWARD_BIAS = Launcher(_backward_bias, tensors=10)


class Form(NamedTuple):
    """What is constant in the kernels of a call."""

    d: int
    dv: int
    unit: int
    left: bool = False
    right: bool = False
    cap: bool = False
    bias: int = 0  # 0: none; else the number of elements that its strides are counted in, below 0 where keys share it
    mask: int = 0
    alibi: bool = False
    sink: bool = False
    dropout: bool = False
    varlen: bool = False
    raw: bool = True
    precision: str = "ieee"  # of float32 products
    base2: bool = True  # exponentials by exp2; float32 inputs see what it costs to round lse log2(e), a bias overflows

    @property
    def rest(self) -> bool:
        """Whether scores may be so large that a float32 lse keeps nothing of log(sum): backward then reads both (REST)."""
        return self.bias != 0 or (self.alibi and not self.base2)

    @property
    def heavy(self) -> bool:
        return bool(self.bias or self.mask or self.dropout)

    def widths(self) -> dict:
        return {
            "D": self.d,
            "DV": self.dv,
            "BLOCK_D": block_of(self.d),
            "BLOCK_DV": block_of(self.dv),
            "UNIT": self.unit,
        }

    def edges(self) -> dict:
        return {"LEFT": self.left, "RIGHT": self.right, "CAP": self.cap}


@functools.cache
def forward_launch(form: Form, config: Config, apart: bool = False) -> Launch:
    d, tail = score_channels(form.d)
    return _FORWARD.bind(
        **form.widths() | {"BLOCK_D": d, "TAIL": tail}, **form.edges(), BIAS=form.bias, MASK=form.mask, ALIBI=form.alibi,
        SINK=form.sink, DROPOUT=form.dropout, VARLEN=form.varlen, RAW=form.raw, BASE2=form.base2, PRECISION=form.precision, M=config.m, N=config.n,
        STAGES=config.num_stages, APART=apart, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


@functools.cache
def prepare_launch(form: Form, dlse: bool, zero: bool, out: bool = True) -> Launch:
    widths = form.widths()
    names = "D", "BLOCK_D", "DV", "BLOCK_DV", "UNIT"
    return _PREPARE.bind(
        **{name: widths[name] for name in names}, DLSE=dlse, BASE2=form.base2, ZERO=zero, REST=form.rest, OUT=out,
        M=_PREPARE_ROWS, num_warps=4,
    )  # fmt: skip


_PREPARE_ROWS = 32


@functools.cache
def keys_launch(
    form: Form,
    fused: bool,
    one: bool,
    config: Config,
    want: tuple[bool, bool, bool] = (True, True, False),
    overlap: bool = False,
    early: bool = False,
) -> Launch:
    """``want``: dk, dv, dsink; ``early``: it may start before the kernel in front has ended."""
    return _BACKWARD_KEYS.bind(
        **form.widths(), **form.edges(), BIAS=form.bias, MASK=form.mask, ALIBI=form.alibi, DROPOUT=form.dropout,
        VARLEN=form.varlen, FUSED=fused, ONE=one, BASE2=form.base2, PRECISION=form.precision, M=config.m, N=config.n, STAGES=config.num_stages,
        WANT_K=want[0], WANT_V=want[1], WANT_SINK=want[2], OVERLAP=overlap, num_warps=config.num_warps, num_stages=config.num_stages,
        launch_pdl=early,
    )  # fmt: skip


@functools.cache
def queries_launch(form: Form, config: Config, overlap: bool = False, sums: bool = False) -> Launch:
    return _BACKWARD_QUERIES.bind(
        **form.widths(), **form.edges(), BIAS=form.bias, MASK=form.mask, ALIBI=form.alibi, DROPOUT=form.dropout,
        VARLEN=form.varlen, BASE2=form.base2, PRECISION=form.precision, M=config.m, N=config.n, STAGES=config.num_stages,
        OVERLAP=overlap, SUMS=sums, num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=overlap,
    )  # fmt: skip


@functools.cache
def bias_launch(form: Form, by_batch: bool, by_head: bool, by_row: bool, config: Config) -> Launch:
    return _BACKWARD_BIAS.bind(
        **form.widths(), **form.edges(), BIAS=form.bias, MASK=form.mask, ALIBI=form.alibi, DROPOUT=form.dropout, BY_BATCH=by_batch,
        BY_HEAD=by_head, BY_ROW=by_row, BASE2=form.base2, PRECISION=form.precision, M=config.m, N=config.n, num_warps=config.num_warps,
    )  # fmt: skip


# ---- calls -------------------------------------------------------------------------------------------------------------

MOST_D = 256
_MOST_STRIDE = 2**22  # of rows: offsets within a tile are 32 bits wide


def unsupported(q: Tensor, k: Tensor, v: Tensor, options, backward: bool) -> str | None:
    if reason := activation.unsupported(q):
        return reason
    if q.shape[-1] > MOST_D or v.shape[-1] > MOST_D:
        return f"takes head dimensions up to {MOST_D}, got {q.shape[-1]} and {v.shape[-1]}"
    at = q.ndim - 3
    if any(t.stride(at) >= _MOST_STRIDE for t in (q, k, v)):
        return "takes strides along the sequence below 2**22 elements; copy the tensor with .contiguous()"
    return None


class _Plan(NamedTuple):
    """What a call's shapes, strides and numbers decide; kept, so that a repeated call computes none of it."""

    form: Form
    card: str
    processors: int
    batch: int
    seq_q: int
    seq_k: int
    heads: int
    group: int
    inputs: tuple  # strides of q, k and v in units: scalars of the kernels
    extras: tuple  # strides of bias, mask and slopes, then of lse
    numbers: tuple  # scale, cap, into_cap, keep_scale
    drop: int


class _Facts(NamedTuple):
    """The key of a plan."""

    dtype: torch.dtype
    device: int
    q: tuple  # (shape, strides)
    k: tuple
    v: tuple
    left: int
    right: int
    scale: float
    softcap: float
    p: float
    sink: bool
    bias: tuple | None  # (shape, strides)
    mask: tuple | None
    slopes: int | None  # dimensions
    varlen: tuple | None  # (ends, greatest lengths of q and k)


def _facts(q, k, v, options) -> _Facts:
    bias, mask, slopes, ends = options.bias, options.mask, options.alibi_slopes, options.cu_seqlens_q
    return _Facts(
        q.dtype, q.get_device(), (q.shape, q.stride()), (k.shape, k.stride()), (v.shape, v.stride()),
        options.window_left, options.window_right, options.scale, options.softcap, options.dropout_p,
        options.sink is not None,
        None if bias is None else (bias.shape, bias.stride()),
        None if mask is None else (mask.shape, mask.stride()),
        None if slopes is None else slopes.ndim,
        None if ends is None else (ends.shape[0], options.max_seqlen_q, options.max_seqlen_k),
    )  # fmt: skip


def _three(shape, stride) -> tuple:
    """Strides of (batch, row, head); of a dimension of one, which is never taken, 0."""
    stride = [0 if n == 1 else s for n, s in zip(shape, stride, strict=True)]
    return (0, stride[0], stride[1]) if len(shape) == 3 else tuple(stride[:3])


def _plane(facts) -> tuple[int, tuple]:
    """(the unit of its strides, strides of (batch, head, row)) of a bias or a mask; negative units where all keys share a number."""
    if facts is None:
        return 0, (0, 0, 0)
    *strides, step = [0 if n == 1 else s for n, s in zip(*facts, strict=True)]
    unit = (8 if all(s % 8 == 0 for s in strides) else 1) * (1 if step else -1)
    return unit, tuple(s // unit for s in strides)


def unit_of(size: int, *strides: int) -> int:
    """How many elements of ``size`` bytes all strides are multiples of: 16 bytes' worth, or 1."""
    return 16 // size if all(s % (16 // size) == 0 for s in strides) else 1


@functools.lru_cache(4096)
def _plan(facts: _Facts) -> _Plan:
    (q_shape, _), (k_shape, _), (v_shape, _) = facts.q, facts.k, facts.v
    heads, key_heads = q_shape[-2], k_shape[-2]
    if facts.varlen is None:
        batch, seq_q, seq_k, lse_b, lse_h = q_shape[0], q_shape[1], k_shape[1], heads * q_shape[1], q_shape[1]
    else:
        ends, seq_q, seq_k = facts.varlen
        batch, lse_b, lse_h = ends - 1, 0, q_shape[0]
    strides = *_three(*facts.q), *_three(*facts.k), *_three(*facts.v)
    d, dv = q_shape[-1], v_shape[-1]
    unit = unit_of(facts.dtype.itemsize, d, dv, *strides)
    plain = not facts.softcap and facts.bias is None and facts.slopes is None
    base2 = facts.dtype.itemsize == 2 and facts.bias is None
    (bias_unit, bias_strides), (mask_unit, mask_strides) = _plane(facts.bias), _plane(facts.mask)
    form = Form(
        d, dv, unit, facts.left >= 0, facts.right >= 0, facts.softcap > 0, bias_unit, mask_unit, facts.slopes is not None,
        facts.sink, facts.p > 0, facts.varlen is not None, plain and facts.scale >= LEAST_SCALE,
        base2=base2,
    )  # fmt: skip
    form = form._replace(precision=_precision(form, facts.dtype.itemsize, facts.device))
    extras = *bias_strides, *mask_strides, heads if facts.slopes == 2 else 0, lse_b, lse_h
    base = _LOG2E if base2 else 1.0
    into_cap = facts.scale / facts.softcap if facts.softcap else 0.0
    numbers = facts.scale * base, facts.softcap * base, into_cap, 1.0 / (1.0 - facts.p)
    return _Plan(
        form, _card(facts.device), _processors(facts.device), batch, seq_q, seq_k, heads, heads // key_heads,
        tuple(s // unit for s in strides), extras, numbers, min(round(facts.p * 2**32), 2**32 - 1),
    )  # fmt: skip


@functools.cache
def _card(device: int) -> str:
    if device < 0:
        return "nvidia"
    if torch.version.hip is not None:
        return "amd"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] == 9 else "nvidia"


def _precision(form: Form, size: int, device: int) -> str:
    """Of float32 products. Triton 3.7 does not compile those of float64 in kernels that hold bytes, of masks and of dropout."""
    if INTERPRETED:
        return "upcast"
    return "double" if size == 4 and not form.mask and not form.dropout and _double(device) else "ieee"


@functools.cache
def _double(device: int) -> bool:
    """Whether tensor cores take float64: no slower there than float32 without them."""
    return device >= 0 and torch.version.hip is None and torch.cuda.get_device_capability(device) in ((8, 0), (9, 0))


@functools.cache
def _processors(device: int) -> int:
    return 1 if device < 0 else torch.cuda.get_device_properties(device).multi_processor_count


def forget_plans() -> None:
    """For tests and tuning, which change what the plans were made with."""
    for cached in (_plan, _forward_call, _backward_plan):
        cached.cache_clear()


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _dense_options(options):
    """With bias and mask dense in their last dimension, or shared by all keys."""
    bias, mask = options.bias, options.mask
    if bias is not None and bias.stride(-1):
        options = options._replace(bias=_dense(bias))
    if mask is not None and mask.stride(-1):
        options = options._replace(mask=_dense(mask))
    return options


def _extras(q, options) -> tuple:
    """(bias, mask, slopes, sink, seed, ends_q, ends_k); q stands for what is not there."""
    bias, mask, slopes, sink = options.bias, options.mask, options.alibi_slopes, options.sink
    return (
        q if bias is None else bias,
        q if mask is None else mask.view(torch.uint8),
        q if slopes is None else slopes.to(torch.float32).contiguous(),
        q if sink is None else sink.contiguous(),
        q if options.seed is None else options.seed,
        q if options.cu_seqlens_q is None else options.cu_seqlens_q.contiguous(),
        q if options.cu_seqlens_k is None else options.cu_seqlens_k.contiguous(),
    )  # fmt: skip


class _Call(NamedTuple):
    """A launch, its number of programs, its scalars."""

    launch: Launch
    programs: int
    scalars: tuple

    def __call__(self, *tensors: Tensor) -> None:
        if self.programs:
            self.launch(self.programs, tensors, self.scalars)


@functools.lru_cache(4096)
def _forward_call(facts, apart: bool = False) -> tuple[_Call, tuple, tuple]:
    """(the kernel's call, out's shape, lse's shape); ``apart``: the call that mends backward's statistics."""
    plan = _plan(facts)
    form = plan.form
    config = choose_forward(form.d, form.dv, facts.dtype.itemsize, plan.card, form.heavy, form.unit > 1)
    tiles = -(-plan.seq_q // config.m)
    scalars = (
        *plan.inputs, *plan.extras, plan.heads, plan.group, plan.seq_q, plan.seq_k, tiles, facts.left, facts.right,
        *plan.numbers, plan.drop,
    )  # fmt: skip
    call = _Call(forward_launch(form, config, apart), tiles * plan.heads * plan.batch, scalars)
    lse = (plan.heads, facts.q[0][0]) if form.varlen else (plan.batch, plan.heads, plan.seq_q)
    return call, (*facts.q[0][:-1], form.dv), lse


def forward(q: Tensor, k: Tensor, v: Tensor, options) -> tuple[Tensor, Tensor]:
    q, k, v, options = _dense(q), _dense(k), _dense(v), _dense_options(options)
    call, shape, lse_shape = _forward_call(_facts(q, k, v, options))
    if options.cu_seqlens_q is None:
        out = torch.empty(shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    else:  # rows that belong to no sequence
        out = torch.zeros(shape, dtype=q.dtype, device=q.device)
        lse = torch.full(lse_shape, float("-inf"), dtype=torch.float32, device=q.device)
    call(q, k, v, *_extras(q, options), out, lse)
    return out, lse


class _BackwardPlan(NamedTuple):
    form: Form
    fused: bool  # dq by atomics
    parts: int  # of a group's heads, whose dk and dv are added up
    prepare: _Call
    sums: _Call | None  # delta from p dp
    keys: tuple[_Call, ...]
    queries: _Call | None
    bias: tuple | None  # (the kernel's call, splits)
    sink: tuple | None  # the shape of the sink's gradient in parts; None: it is made from stats


@functools.lru_cache(4096)
def _backward_plan(facts, dout, out, dlse, needs, deterministic) -> _BackwardPlan:
    """``dout``, ``out``, ``dlse``: their strides; dlse may be None."""
    plan = _plan(facts)
    form, size, varlen = plan.form, facts.dtype.itemsize, plan.form.varlen
    choice = form.d, form.dv, size, plan.card
    want_q, want_k, want_v, want_bias, want_sink = needs
    fused = want_q and not deterministic and choose_fused(*choice)
    by_keys = want_sink and choose_sink(size, want_k or fused, facts.bias is not None)
    exact = choose_exact(size, plan.seq_k, facts.left, facts.right, want_bias or (want_sink and not by_keys))
    by_keys &= not exact
    out_shape = (*facts.q[0][:-1], form.dv)
    read = _three(*facts.q), _three(*facts.k), _three(*facts.v), _three(out_shape, dout)
    dq, dk, dv = (_three(shape, _like(shape, stride)) for shape, stride in facts[2:5])
    # one unit for all, the gradients too
    unit = unit_of(size, form.d, form.dv, *(s for t in (*read, dq, dk, dv) for s in t))
    form = form._replace(unit=unit, sink=False, raw=False)
    inputs, into_dq, into_dk, into_dv = (
        tuple(s // unit for s in strides) for strides in (tuple(s for t in read for s in t), dq, dk, dv)
    )
    window = facts.left, facts.right
    numbers = *plan.numbers, facts.scale, plan.drop

    out = _three(out_shape, out)
    out_unit = unit_of(size, unit, *out) if unit > 1 else 1
    flat_batch, flat_rows = (1, out_shape[0]) if varlen else (plan.batch, plan.seq_q)
    tiles = -(-flat_rows // _PREPARE_ROWS)
    into_dlse = (0, 0, 0) if dlse is None else (0, *dlse) if varlen else dlse
    scalars = *(s // out_unit for s in (*out, *read[3])), *into_dlse, plan.heads, flat_rows, tiles
    launch = prepare_launch(form._replace(unit=out_unit), dlse is not None, fused, not exact)
    prepare = _Call(launch, tiles * plan.heads * flat_batch, scalars)

    keys, queries, bias, sink = (), None, None, None
    parts = 1
    # rows of sequences are zeroed first, by kernels of their own in between
    overlap = plan.card == "sm_90" and not varlen
    if want_k or want_v or fused:
        walks = [(choose_keys(*choice, form.heavy), (True, True, by_keys))]
        if not fused and (split := choose_split(*choice, form.heavy)):
            walks = [(split[0], (True, False, by_keys))] * want_k + [(split[1], (False, True, False))] * want_v
        tiles = -(-plan.seq_k // walks[0][0].n)
        sink = (plan.batch, plan.heads, tiles) if by_keys else None
        programs = tiles * plan.batch * plan.heads // plan.group
        parts = choose_parts(programs, plan.group, plan.processors)
        apart = 0, 0
        if parts > 1:  # float32, dense, one part after the other
            into_dk, into_dv = (
                tuple(s // unit for s in _three(shape, _dense_strides(shape))) for shape, _ in facts[3:5]
            )
            apart = math.prod(facts.k[0]) // unit, math.prod(facts.v[0]) // unit
        scalars = (
            *inputs, *into_dk, *into_dv, *apart, *plan.extras, plan.heads, plan.group, plan.group // parts, plan.seq_q,
            plan.seq_k, tiles, *window, *numbers,
        )  # fmt: skip
        keys = tuple(
            _Call(
                keys_launch(form, fused, parts == plan.group, config, want, overlap, overlap and i > 0),
                programs * parts,
                scalars,
            )
            for i, (config, want) in enumerate(walks)
        )
    config = choose_queries(*choice, form.heavy, form.right)
    tiles = -(-plan.seq_q // config.m)
    programs = tiles * plan.heads * plan.batch
    scalars = (
        *inputs, *into_dq, *plan.extras, plan.heads, plan.group, plan.seq_q, plan.seq_k, tiles, *window, *numbers,
    )  # fmt: skip
    sums = _Call(queries_launch(form, config, sums=True), programs, scalars) if exact else None
    if want_q and not fused:
        queries = _Call(queries_launch(form, config, overlap and bool(keys)), programs, scalars)
    if want_bias:
        config = choose_bias(*choice)
        by_batch, by_head, by_row = (
            n == m for n, m in zip(facts.bias[0], (plan.batch, plan.heads, plan.seq_q), strict=False)
        )
        row_tiles, tiles = -(-plan.seq_q // config.m), -(-plan.seq_k // config.n)
        own = tiles * (row_tiles if by_row else 1) * (plan.heads if by_head else 1) * (plan.batch if by_batch else 1)
        count = (1 if by_row else row_tiles) * (1 if by_head else plan.heads) * (1 if by_batch else plan.batch)
        splits = max(1, min(count, -(-2 * plan.processors // own)))
        scalars = (
            *inputs, *plan.extras, plan.batch, plan.heads, plan.group, plan.seq_q, plan.seq_k, row_tiles, tiles, splits,
            *window, *plan.numbers, plan.drop,
        )  # fmt: skip
        bias = _Call(bias_launch(form, by_batch, by_head, by_row, config), own * splits, scalars), splits
    return _BackwardPlan(form, fused, parts, prepare, sums, keys, queries, bias, sink)


def _like(shape, stride) -> tuple:
    """The strides of ``torch.empty_like``."""
    return torch.empty_like(torch.empty_strided(shape, stride, device="meta")).stride()


def _dense_strides(shape) -> tuple:
    return torch.empty(shape, device="meta").stride()


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options, needs
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dbias, dsink), None where ``needs`` is False."""
    _, want_k, want_v, want_bias, want_sink = needs
    q, k, v, out, dout, lse = _dense(q), _dense(k), _dense(v), _dense(out), _dense(dout), lse.contiguous()
    if dout.stride(dout.ndim - 3) >= _MOST_STRIDE:
        dout = dout.contiguous()
    options = _dense_options(options)
    varlen = options.cu_seqlens_q is not None
    facts = _facts(q, k, v, options)
    plan = _backward_plan(
        facts, dout.stride(), out.stride(), None if dlse is None else dlse.stride(), needs,
        options.deterministic,
    )  # fmt: skip
    like = torch.zeros_like if varlen else torch.empty_like  # zeros for rows that belong to no sequence
    dk = dv = dbias = dsink = None
    form = plan.form
    numbers = 3 if form.rest else 2
    stats = torch.empty((*lse.shape[:-1], numbers, lse.shape[-1]), dtype=torch.float32, device=lse.device)
    sum_q = torch.empty(q.shape, dtype=torch.float32, device=q.device) if plan.fused else q
    plan.prepare(out, dout, lse, q if dlse is None else dlse, stats, sum_q)
    bias, mask, slopes, _, seed, ends_q, ends_k = extras = _extras(q, options)
    if form.rest:
        _forward_call(facts, True)[0](q, k, v, *extras, stats, lse)
    read = q, k, v, bias, mask, slopes, seed, ends_q, ends_k, dout, stats
    if plan.sums:
        plan.sums(*read, q)
    share = by_tile = stats  # where nobody reads them
    if want_sink:
        share = _share(options.sink, stats, form, q.itemsize)
    if plan.sink:
        by_tile = (torch.zeros if varlen else torch.empty)(plan.sink, dtype=torch.float32, device=q.device)
    # made now: its kernel overlaps with what is launched from here on, by other threads too, and with what they free
    dq = like(q) if plan.queries else None
    if plan.keys:
        if plan.parts == 1:
            dk, dv = like(k), like(v)
        else:
            make = torch.zeros if varlen else torch.empty
            dk, dv = (make((plan.parts, *t.shape), dtype=torch.float32, device=t.device) for t in (k, v))
        for call in plan.keys:
            call(*read, sum_q, dk, dv, share, by_tile)
    if plan.queries:  # with no other kernel in front of it: it may overlap with the walks over queries
        plan.queries(*read, dq)
    elif plan.fused:
        dq = sum_q.to(q.dtype)
    if plan.parts > 1:
        dk, dv = dk.sum(0).to(k.dtype) if want_k else None, dv.sum(0).to(v.dtype) if want_v else None
    if want_bias:
        call, splits = plan.bias
        total = torch.empty(
            (splits, *bias.shape), dtype=bias.dtype if splits == 1 else torch.float32, device=bias.device
        )
        call(q, k, v, bias, mask, slopes, seed, dout, stats, total)
        dbias = total[0] if splits == 1 else total.sum(0).to(bias.dtype)
    if want_sink:
        rows = -1 if varlen else (0, 2)
        if plan.sink:
            total = by_tile.sum((0, 2))
            if dlse is not None:
                total -= (share * dlse).sum(rows)
        else:
            total = (share * stats[..., 1, :]).sum(rows)
        dsink = -total.to(options.sink.dtype)
    return dq, dk if want_k else None, dv if want_v else None, dbias, dsink


def _share(sink: Tensor, stats: Tensor, form: Form, size: int) -> Tensor:
    """The probability of the sink in each row; 0 in rows that see nothing, whose lse is +inf in ``stats``."""
    logit = sink.to(torch.float32)[:, None]
    if form.base2:
        return torch.exp2(logit * _LOG2E - stats[..., 0, :])
    share = torch.exp(logit - stats[..., 0, :])
    if form.rest:
        share *= torch.exp(-stats[..., 2, :]) if size == 4 else torch.exp2(-stats[..., 2, :])
    return share


def describe(q: Tensor, k: Tensor, v: Tensor, options, grad: bool) -> str:
    """The configurations of a call, for ``trinix.explain``."""
    device = q.get_device()
    call = q.shape[-1], v.shape[-1], q.element_size(), _card(device)
    heavy = options.bias is not None or options.mask is not None or options.dropout_p > 0
    strides = (n for t in (q, k, v) for n in t.stride()[:-1])
    aligned = unit_of(q.element_size(), *call[:2], *strides) > 1
    text = "forward " + _shown(choose_forward(*call, heavy, aligned))
    if grad:
        fused = not options.deterministic and choose_fused(*call)
        if not fused and (split := choose_split(*call, heavy)):
            text += f", dk {_shown(split[0])}, dv {_shown(split[1])}"
        else:
            text += ", dk and dv " + _shown(choose_keys(*call, heavy))
        if fused:
            return text + ", dq in the same kernel by atomics"
        text += ", dq " + _shown(choose_queries(*call, heavy, options.window_right >= 0))
    return text


def _shown(config: Config) -> str:
    return f"{config.m} queries x {config.n} keys, {config.num_warps} warps, {config.num_stages} stages"


def compile_cases(lanes: int):
    """What ``trinix.lab.aot`` compiles: the tiles of cards that are not sm_90, which fit every card of NVIDIA's, or AMD's."""
    card = "amd" if lanes == 64 else "nvidia"
    causal = {"right": True}
    bias = {"right": True, "bias": 8}
    for name, t in POINTERS.items():
        size = getattr(torch, name).itemsize
        case = functools.partial(_case, name, 4 * size)
        more = t, "*u8", "*fp32", t, "*i64", "*i32", "*i32"  # bias to ends_k
        read = t, t, t, *more[:3], *more[4:], t, "*fp32"
        for d, dv in ((64, 64), (128, 128), (192, 128), (256, 256)):
            if d > 128 and size == 4:  # spills: its tiles cannot be smaller
                continue
            shape = f"d{d}" if d == dv else f"d{d}-{dv}"
            call = d, dv, size, card
            plain = Form(d, dv, 16 // size, base2=size == 2)
            for suffix, options in {"": {}, "-causal": causal, "-bias": bias}.items():
                if suffix == "-bias" and d > 128:
                    continue
                form = plain._replace(**options, base2=plain.base2 and suffix != "-bias")
                inner = form._replace(raw=False)
                forward = forward_launch(form._replace(raw=suffix != "-bias"), choose_forward(*call, form.heavy))
                yield case(f"{shape}/fwd{suffix}", forward, (t, t, t, *more, t, "*fp32"))
                if suffix == "-bias":
                    apart = forward_launch(inner, choose_forward(*call, form.heavy), True)
                    yield case(f"{shape}/apart", apart, (t, t, t, *more, "*fp32", "*fp32"), access_bits=32)
                    sums = queries_launch(inner, choose_queries(*call, form.heavy), sums=True)
                    yield case(f"{shape}/sums", sums, (*read, t), access_bits=32)
                keys = keys_launch(inner, choose_fused(*call), True, choose_keys(*call, form.heavy))
                walk = *read, "*fp32", t, t, "*fp32", "*fp32"
                yield case(f"{shape}/keys{suffix}", keys, walk)
                if suffix == "-causal" and d <= 128:
                    keys = keys_launch(inner, choose_fused(*call), True, choose_keys(*call), (True, True, True))
                    yield case(f"{shape}/keys-sink", keys, walk)
                yield case(
                    f"{shape}/queries{suffix}", queries_launch(inner, choose_queries(*call, form.heavy)), (*read, t)
                )
            prepare = prepare_launch(plain, True, False)
            yield case(f"{shape}/prepare", prepare, (t, t, "*fp32", "*fp32", "*fp32", "*fp32"), access_bits=32)
            to_bias = bias_launch(plain._replace(bias=8, raw=False, base2=False), False, True, True, choose_bias(*call))
            yield case(f"{shape}/bias", to_bias, (t, t, t, t, "*u8", "*fp32", "*i64", t, "*fp32", t), access_bits=16)


def _case(dtype: str, bytes_per_element: float, label: str, launch: Launch, tensors, access_bits: int = 64):
    return compile_case(f"attention/{label}/{dtype}", launch, bytes_per_element, tensors, access_bits=access_bits)
