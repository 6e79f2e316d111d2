"""Backward of short calls on Hopper: one kernel makes dq, dk and dv.

Some programs hold N keys and walk over queries for dk and dv, the others hold M queries and walk over keys for dq; both repeat the
scores (seven products a tile where the kernel of long calls has five), and each makes delta = rowsum(dout out) - dlse of the rows that
it meets. So nothing is prepared, added up in memory or converted: a call of a few microseconds is one launch instead of three, and
the same bits every time. Plain attention with as many heads of k as of q, with or without a causal mask.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(at, row, end, stride, D: tl.constexpr, WIDTH: tl.constexpr, BOUND: tl.constexpr):
    """[rows, WIDTH]; rows from ``end`` on, with BOUND, and columns from D on are 0. Strides count 8 elements: the compiler
    knows how rows are aligned."""
    col = tl.arange(0, WIDTH)
    at = at + row[:, None] * (stride * 8) + col[None, :]
    if BOUND:
        tile = tl.load(at, mask=(row < end)[:, None] & (col < D)[None, :], other=0.0)
    elif D != WIDTH:
        tile = tl.load(at, mask=(col < D)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _keep(at, tile, row, end, stride, D: tl.constexpr, WIDTH: tl.constexpr):
    col = tl.arange(0, WIDTH)
    inside = (row < end)[:, None] & (col < D)[None, :]
    tl.store(at + row[:, None] * (stride * 8) + col[None, :], tile.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _log_of(lse, row, end, BOUND: tl.constexpr):
    """lse in base 2; +inf, which makes probabilities 0, where no key was seen and from ``end`` on."""
    log = tl.load(lse + row, mask=row < end, other=float("-inf")) if BOUND else tl.load(lse + row)
    return tl.where(log == float("-inf"), float("inf"), log) * 1.4426950408889634


@triton.jit
def _delta_of(dlse, row, end, out, dout, DLSE: tl.constexpr):
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse + row, mask=row < end, other=0.0)
    return delta


@triton.jit
def _dot(a, b, total, UPCAST: tl.constexpr):
    """UPCAST: Triton's interpreter multiplies bfloat16 wrongly."""
    if UPCAST:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        total = tl.dot(a, b, total)
    return total


_COUNTS = (
    *(f"{t}{step}" for t in ("q", "k", "v", "o", "g", "dq", "dk", "dv") for step in "bsh"),
    "heads", "seq_q", "seq_k", "key_tiles", "query_tiles", "of_keys",
)  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def attention_backward_short(
    q, k, v, out, lse, dout, dlse, dq, dk, dv,
    qb: "i64", qs: "i32", qh: "i64", kb: "i64", ks: "i32", kh: "i64", vb: "i64", vs: "i32", vh: "i64",
    ob: "i64", os: "i32", oh: "i64", gb: "i64", gs: "i32", gh: "i64", dqb: "i64", dqs: "i32", dqh: "i64",
    dkb: "i64", dks: "i32", dkh: "i64", dvb: "i64", dvs: "i32", dvh: "i64",
    heads: "i32", seq_q: "i32", seq_k: "i32", key_tiles: "i32", query_tiles: "i32", of_keys: "i32",
    scale: "fp32", back_scale: "fp32",
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, EVEN: tl.constexpr, DLSE: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The first ``of_keys`` programs are those of keys. EVEN: tiles end where sequences do."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    keys_mine = pid < of_keys
    pid = tl.where(keys_mine, pid, pid - of_keys)
    tiles = tl.where(keys_mine, key_tiles, query_tiles)
    plane = pid // tiles
    tile = pid % tiles
    head = (plane % heads).to(tl.int64)
    batch = (plane // heads).to(tl.int64)
    q += (batch * qb + head * qh) * 8
    k += (batch * kb + head * kh) * 8
    v += (batch * vb + head * vh) * 8
    out += (batch * ob + head * oh) * 8
    dout += (batch * gb + head * gh) * 8
    lse += plane.to(tl.int64) * seq_q
    dlse += plane.to(tl.int64) * seq_q
    shift = seq_k - seq_q  # causal: the last query stands at the last key
    BOUND: tl.constexpr = not EVEN
    if keys_mine:
        first = tile * N  # with a causal mask the first keys have the longest walks, and come first
        col = first + tl.arange(0, N)
        keys = _rows(k, col, seq_k, ks, D, WIDTH, BOUND)
        values = _rows(v, col, seq_k, vs, DV, V_WIDTH, BOUND)
        sum_k = tl.zeros((N, WIDTH), tl.float32)
        sum_v = tl.zeros((N, V_WIDTH), tl.float32)
        low = 0
        if CAUSAL:
            low = tl.maximum(first - shift, 0) // M * M
        for start in tl.range(low, seq_q, M, num_stages=STAGES):
            row = start + tl.arange(0, M)
            queries = _rows(q, row, seq_q, qs, D, WIDTH, BOUND)
            grads = _rows(dout, row, seq_q, gs, DV, V_WIDTH, BOUND)
            s = _dot(keys, tl.trans(queries), tl.zeros((N, M), tl.float32), UPCAST)
            dp = _dot(values, tl.trans(grads), tl.zeros((N, M), tl.float32), UPCAST)
            p = tl.exp2(s * scale - _log_of(lse, row, seq_q, BOUND)[None, :])
            if CAUSAL:
                p = tl.where(col[:, None] <= row[None, :] + shift, p, 0.0)
            sum_v = _dot(p.to(q.dtype.element_ty), grads, sum_v, UPCAST)
            outs = _rows(out, row, seq_q, os, DV, V_WIDTH, BOUND)
            dz = p * (dp - _delta_of(dlse, row, seq_q, outs, grads, DLSE)[None, :])
            sum_k = _dot(dz.to(q.dtype.element_ty), queries, sum_k, UPCAST)
        _keep(dk + (batch * dkb + head * dkh) * 8, sum_k * back_scale, col, seq_k, dks, D, WIDTH)
        _keep(dv + (batch * dvb + head * dvh) * 8, sum_v, col, seq_k, dvs, DV, V_WIDTH)
    else:
        if CAUSAL:  # the longest walks first
            tile = query_tiles - 1 - tile
        first = tile * M
        row = first + tl.arange(0, M)
        queries = _rows(q, row, seq_q, qs, D, WIDTH, BOUND)
        grads = _rows(dout, row, seq_q, gs, DV, V_WIDTH, BOUND)
        outs = _rows(out, row, seq_q, os, DV, V_WIDTH, BOUND)
        log = _log_of(lse, row, seq_q, BOUND)
        delta = _delta_of(dlse, row, seq_q, outs, grads, DLSE)
        sum_q = tl.zeros((M, WIDTH), tl.float32)
        high = seq_k
        if CAUSAL:
            high = tl.maximum(tl.minimum(seq_k, first + M + shift), 0)
        for start in tl.range(0, high, N, num_stages=STAGES):
            col = start + tl.arange(0, N)
            keys = _rows(k, col, seq_k, ks, D, WIDTH, BOUND)
            values = _rows(v, col, seq_k, vs, DV, V_WIDTH, BOUND)
            s = _dot(queries, tl.trans(keys), tl.zeros((M, N), tl.float32), UPCAST)
            dp = _dot(grads, tl.trans(values), tl.zeros((M, N), tl.float32), UPCAST)
            p = tl.exp2(s * scale - log[:, None])
            if CAUSAL:
                p = tl.where(col[None, :] <= row[:, None] + shift, p, 0.0)
            elif BOUND:
                p = tl.where(col[None, :] < seq_k, p, 0.0)
            dz = p * (dp - delta[:, None])
            sum_q = _dot(dz.to(q.dtype.element_ty), keys, sum_q, UPCAST)
        _keep(dq + (batch * dqb + head * dqh) * 8, sum_q * back_scale, row, seq_q, dqs, D, WIDTH)
