"""The main kernel of Hopper attention's backward for head dimensions above 128 (``attention_backward`` has the other two).

dK and dV of 64 keys fill the registers of a warpgroup each, so the two consumers share out the products instead of the keys.
Per query tile, keys being the rows::

    warpgroup 0    S^T = K Q^T      P^T = exp2(S^T scale - lse)     dV += P^T dO
    warpgroup 1    dP^T = V dO^T    dS^T = P^T (dP^T - delta)       dK += dS^T Q

P^T goes from the first to the second through shared memory, dS^T back, and both make columns of dQ = dS K, one tile late.
Both buffers are double: what a warpgroup waits for before it writes one tells that the other has read it.

Where a sink's gradient is wanted, the second adds it up, and gets P in two parts: rounded once it would be worth no more than
delta. (Not beside softcap, whose derivative goes with P: there P comes a second time without it, rounded once.)

Tiles of Q and K are 256 columns wide (a power of two), of which the products read USED. Of 192, dK is two sums, of 128 and of
64 columns, and dQ the first warpgroup's 128 and the second one's 64.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trinix.kernels.hopper._compat import block_barrier, tma_load, tma_store
from trinix.kernels.hopper.attention_backward import (
    _both,
    _padded_row,
    _padded_rows,
    _place,
    _queries_that_see,
    _query_tiles,
    add_from_registers,
    pairs_of_rows,
    sum_of_all,
    sums_of_threads,
    weighted,
)
from trinix.kernels.hopper.attention_scores import follow, keep_columns, sequence, tanh_over_2


@gluon.jit
def _producer(
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, cu_q, cu_k, q_s, do_s, k_s, v_s, lse_s, delta_s, kv_full, q_full,
    do_full, empty, key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k, padded, left, right, M: gl.constexpr,
    N: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    TAIL: gl.constexpr, VARLEN: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    n, b, out_head = _place(gl.program_id(0), key_blocks, out_heads, section, Hk, parts)
    batch, row0, key0, sq, sk = sequence(b, cu_q, cu_k, seq_q, seq_k, VARLEN)
    first, _, _, end = _query_tiles(n, sq, sk, left, right, M, N, LEFT, RIGHT, TAIL)
    mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma_load(k_desc, [batch, key0 + n * N, out_head // parts, 0], kv_full, k_s.index(0))
    tma_load(v_desc, [batch, key0 + n * N, out_head // parts, 0], kv_full, v_s.index(0))
    LINES: gl.constexpr = 2 if SINK else 1
    all_rows = _padded_rows(out_heads, group, Hk, parts, padded, VARLEN)
    it = 0
    for g in range(group):
        h = out_head * group + g
        row = _padded_row(b, h, row0, Hk * parts * group, padded, BLOCK, VARLEN)
        for m in range(first, end):
            slot = it % STAGES
            mbarrier.wait(empty.index(slot), ((it // STAGES) & 1) ^ 1)
            it += 1
            mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
            tma_load(q_desc, [batch, row0 + m * M, h, 0], q_full.index(slot), q_s.index(slot))
            tma_load(lse_desc, [row + m * M], q_full.index(slot), lse_s.index(slot))
            mbarrier.expect(do_full.index(slot), do_desc.block_type.nbytes + LINES * delta_desc.block_type.nbytes)
            tma_load(do_desc, [batch, row0 + m * M, h, 0], do_full.index(slot), do_s.index(slot))
            tma_load(delta_desc, [row + m * M], do_full.index(slot), delta_s.index(slot))
            if SINK:
                tma_load(delta_desc, [all_rows + row + m * M], do_full.index(slot), delta_s.index(STAGES + slot))


@gluon.jit
def _scores(left, right, zero, USED: gl.constexpr, D: gl.constexpr):
    """left right^T over the first USED columns of D; not waited for."""
    if USED == 192:  # tiles are powers of two wide: the last quarter would be zeros
        s = warpgroup_mma(
            left.slice(0, 128, dim=1), right.slice(0, 128, dim=1).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        s = warpgroup_mma(left.slice(128, 64, dim=1), right.slice(128, 64, dim=1).permute((1, 0)), s, is_async=True)
    else:
        s = warpgroup_mma(left, right.permute((1, 0)), zero, use_acc=False, is_async=True)
    return s


@gluon.jit
def _consumer(
    ME: gl.constexpr, out_desc, out_ptr, sums, turns, cu_q, cu_k, slopes, q_s, do_s, k_s, v_s, p_s, ds_s, lse_s, delta_s,
    kv_full, q_full, do_full, empty, p_full, ds_full, key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k,
    padded, left, right, slopes_batch, D_OUT, scale, cap, k_scale, d_sinks, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    USED: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, TAIL: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, VARLEN: gl.constexpr,
    DETERMINISTIC: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    """Warpgroup 0 makes dV, warpgroup 1 dK; ``out`` is that, and ``out_2`` the columns of dK from 128 on of 192."""
    SPLIT: gl.constexpr = ME == 1 and USED == 192
    LATE: gl.constexpr = USED == 192 and DV == 128
    OUT: gl.constexpr = DV if ME == 0 else (128 if SPLIT else D)
    FIRST: gl.constexpr = 0 if ME == 0 else 128  # columns of dQ that this warpgroup makes
    WIDTH: gl.constexpr = USED - 128 if ME == 1 else 128
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])  # S^T, dP^T [N, M]
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OUT, 16])  # [N, OUT]
    out_2_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])  # dQ [M, WIDTH]
    a_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    a_2_layout: gl.constexpr = gl.DotOperandLayout(0, out_2_layout, 2)
    key_axis: gl.constexpr = gl.SliceLayout(1, s_layout)
    query_axis: gl.constexpr = gl.SliceLayout(0, s_layout)
    dtype: gl.constexpr = q_s.dtype
    n, b, out_head = _place(gl.program_id(0), key_blocks, out_heads, section, Hk, parts)
    H = Hk * parts * group
    batch, row0, key0, sq, sk = sequence(b, cu_q, cu_k, seq_q, seq_k, VARLEN)
    first, whole_from, whole_to, end = _query_tiles(n, sq, sk, left, right, M, N, LEFT, RIGHT, TAIL)
    out = gl.zeros([N, OUT], gl.float32, out_layout)
    out_2 = gl.zeros([N, 64], gl.float32, out_2_layout)
    zero_s = gl.zeros([N, M], gl.float32, s_layout)
    zero_q = gl.zeros([M, WIDTH], gl.float32, q_layout)
    keys = n * N + gl.arange(0, N, key_axis)
    from_query, to_query = _queries_that_see(keys, sk, left, right, RIGHT)
    keys = gl.expand_dims(keys, 1)
    mbarrier.wait(kv_full, 0)
    k = k_s.index(0).reshape([N, D])
    v = v_s.index(0).reshape([N, DV])
    k_mine = k.slice(FIRST, WIDTH, dim=1)
    it = 0
    late_row = first
    late_turn = 0
    for g in range(group):
        h = out_head * group + g
        padded_row = _padded_row(b, h, row0, H, padded, BLOCK, VARLEN)
        slope = 0.0
        if ALIBI:
            slope = gl.load(slopes + b * slopes_batch + h).to(gl.float32) * 1.4426950408889634
        if SINK and ME == 1:
            sink_sums = sums_of_threads(pairs_of_rows(zero_s))
        for m in range(first, end):
            slot = it % STAGES
            phase = (it // STAGES) & 1
            buf = it % 2
            use = (it // 2) & 1
            q = q_s.index(slot).reshape([M, D])
            do = do_s.index(slot).reshape([M, DV])
            # the last tile's dQ while this one's exponentials are made; in front of the first tile nobody takes what comes out.
            # At D = 256 there are no registers for both
            if not LATE:
                mbarrier.wait(ds_full.index(buf ^ 1), (((it + 1) // 2) & 1) ^ 1)
                dq = warpgroup_mma(ds_s.index(buf ^ 1).permute((1, 0)), k_mine, zero_q, use_acc=False, is_async=True)
                dq = warpgroup_mma_wait(0, deps=(dq,))
                if it > 0:
                    add_from_registers(sums, late_row, FIRST, dq, turns, 2 * late_turn, USED, WIDTH, DETERMINISTIC, 64)
            if ME == 0:
                mbarrier.wait(q_full.index(slot), phase)
                s = _scores(k, q, zero_s, USED, D)
            else:
                mbarrier.wait(do_full.index(slot), phase)
                s = _scores(v, do, zero_s, DV, DV)
            if LATE:
                mbarrier.wait(ds_full.index(buf ^ 1), (((it + 1) // 2) & 1) ^ 1)
                dq = warpgroup_mma(ds_s.index(buf ^ 1).permute((1, 0)), k_mine, zero_q, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1 if LATE else 0, deps=(s,))
            if ME == 0:
                lse = gl.expand_dims(lse_s.index(slot).load(query_axis), 0)
                at = gl.expand_dims(m * M + sk - sq + gl.arange(0, M, query_axis), 0)
                slant = gl.full([N, M], 1.0, gl.float32, s_layout)
                if SOFTCAP:
                    tanh = tanh_over_2(s * scale)
                    slant = 1.0 - tanh * tanh
                    s = tanh * cap
                else:
                    s = s * scale
                if ALIBI:
                    s = s - slope * gl.abs(at.to(gl.float32) - keys.to(gl.float32))
                p = gl.exp2(s - lse)
                if LEFT or RIGHT or TAIL:  # noqa: SIM102  (constants and a value at run time)
                    if (m < whole_from) | (m >= whole_to):
                        col = m * M + sk - sq
                        p = keep_columns(p, from_query - col, to_query - col, 0.0, True, LEFT)
                operand = p.to(dtype)
                if SOFTCAP:
                    p_s.index(buf).store((p * slant).to(dtype))
                else:
                    p_s.index(buf).store(operand)
                if SINK:
                    if SOFTCAP:
                        more = _as_halves(p, dtype)
                    else:
                        more = (p - operand.to(gl.float32)).to(dtype)
                    _more(p_s, ds_s, buf, LATE).store(more)
                mbarrier.arrive(p_full.index(buf), count=1)
            else:
                delta = gl.expand_dims(delta_s.index(slot).load(query_axis), 0)
                mbarrier.wait(p_full.index(buf), use)
                p = p_s.index(buf).load(s_layout)
                if SINK:
                    more = _more(p_s, ds_s, buf, LATE).load(s_layout)
                    if SOFTCAP:
                        exact = _from_halves(more)
                    else:
                        exact = more.to(gl.float32) + p.to(gl.float32)
                    ds_pairs = pairs_of_rows(exact * (s - delta))
                operand = (p.to(gl.float32) * (s - delta)).to(dtype)
                ds_s.index(buf).store(operand)
                fence_async_shared()
                mbarrier.arrive(ds_full.index(buf), count=1)
                if SINK:
                    sink_sums += weighted(ds_pairs, delta_s.index(STAGES + slot))
            if ME == 0:
                mbarrier.wait(do_full.index(slot), phase)
                out = warpgroup_mma(gl.convert_layout(operand, a_layout), do, out, is_async=True)
            else:
                mbarrier.wait(q_full.index(slot), phase)
                if SPLIT:
                    out = warpgroup_mma(
                        gl.convert_layout(operand, a_layout), q.slice(0, 128, dim=1), out, is_async=True
                    )
                    out_2 = warpgroup_mma(
                        gl.convert_layout(operand, a_2_layout), q.slice(128, 64, dim=1), out_2, is_async=True
                    )
                else:
                    out = warpgroup_mma(gl.convert_layout(operand, a_layout), q, out, is_async=True)
            if LATE:
                dq = warpgroup_mma_wait(2 if SPLIT else 1, deps=(dq,))
                if it > 0:
                    add_from_registers(sums, late_row, FIRST, dq, turns, 2 * late_turn, USED, WIDTH, DETERMINISTIC, 64)
            if SPLIT:
                out, out_2 = warpgroup_mma_wait(0, deps=(out, out_2))
            else:
                out = warpgroup_mma_wait(0, deps=(out,))
            if LATE and DETERMINISTIC:
                block_barrier()
            mbarrier.arrive(empty.index(slot), count=1)
            late_row = padded_row + m * M
            late_turn = n
            if LEFT:
                late_turn = n - gl.maximum(m * M + sk - sq - left, 0) // N
            it += 1
        if SINK and ME == 1:
            gl.store(d_sinks + n * (out_heads * group) + b * H + h, sum_of_all(sink_sums))
    if it > 0:
        mbarrier.wait(ds_full.index((it - 1) % 2), ((it - 1) // 2) & 1)
        dq = warpgroup_mma(ds_s.index((it - 1) % 2).permute((1, 0)), k_mine, zero_q, use_acc=False, is_async=True)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        add_from_registers(sums, late_row, FIRST, dq, turns, 2 * late_turn, USED, WIDTH, DETERMINISTIC, 64)
    _both()  # nobody reads K or V any more: their buffers carry dK and dV out
    if ME == 1:
        out = out * k_scale
        if SPLIT:
            out_2 = out_2 * k_scale
    key = n * N
    partial = False
    if VARLEN:
        partial = key + N > sk
        if partial:  # keys past the end of this sequence belong to the next one
            _store_rows(out_ptr, out, key0, key, sk, Hk * parts, out_head, 0, D_OUT)
            if SPLIT:
                _store_rows(out_ptr, out_2, key0, key, sk, Hk * parts, out_head, 128, D_OUT)
    if not partial:
        if ME == 0:
            v.store(out.to(dtype))
            fence_async_shared()
            tma_store(out_desc, [batch, key0 + key, out_head, 0], v_s.index(0))
        else:
            if SPLIT:
                k.slice(0, 128, dim=1).store(out.to(dtype))
                k.slice(128, 64, dim=1).store(out_2.to(dtype))
            else:
                k.store(out.to(dtype))
            fence_async_shared()
            tma_store(out_desc, [batch, key0 + key, out_head, 0], k_s.index(0))
    tma.store_wait(0)


@gluon.jit
def _as_halves(p, dtype: gl.constexpr):
    """P, at most 1, in float16 with all its bits down to 2^-29, as numbers of ``dtype``: in bfloat16 its rounding alone took a
    sink's gradient over its budget."""
    halves = (p * 32768.0).to(gl.float16)
    if dtype != gl.float16:
        halves = halves.to(dtype, bitcast=True)
    return halves


@gluon.jit
def _from_halves(halves):
    if halves.dtype != gl.float16:
        halves = halves.to(gl.float16, bitcast=True)
    return halves.to(gl.float32) * (1 / 32768)


@gluon.jit
def _more(p_s, ds_s, buf, LATE: gl.constexpr):
    """Where P's other part is handed over: in the buffer that dS is about to be written to, which is free by then; but not with
    LATE, when the second warpgroup's product of two tiles ago may still read it."""
    if LATE:
        place = p_s.index(2 + buf)
    else:
        place = ds_s.index(buf)
    return place


@gluon.jit
def _store_rows(to, out, key0, key, sk, heads, head, FIRST: gl.constexpr, D_OUT):
    """The rows of a sequence's last keys, from column FIRST on."""
    layout: gl.constexpr = out.type.layout
    keys = gl.expand_dims(key + gl.arange(0, out.shape[0], gl.SliceLayout(1, layout)), 1)
    cols = FIRST + gl.expand_dims(gl.arange(0, out.shape[1], gl.SliceLayout(0, layout)), 0)
    rows = (key0 + keys).to(gl.int64) * heads + head
    gl.store(to + rows * D_OUT + cols, out.to(to.dtype.element_ty), mask=(keys < sk) & (cols < D_OUT))


_RUNTIME = (
    "dk_ptr", "dv_ptr", "turns", "cu_q", "cu_k", "slopes", "key_blocks", "out_heads", "section", "Hk", "parts", "group",
    "seq_q", "seq_k", "padded", "left", "right", "slopes_batch", "D_K", "D_V", "d_sinks",
)  # fmt: skip


@gluon.jit(do_not_specialize=_RUNTIME)
def attention_backward_wide(
    q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, lse_desc, delta_desc, dk_ptr, dv_ptr, sums, turns, cu_q, cu_k,
    slopes, key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k, padded, left, right, slopes_batch, D_K, D_V,
    scale: "fp32", cap: "fp32", k_scale: "fp32", d_sinks, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, USED: gl.constexpr,
    DV: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr,
    SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, VARLEN: gl.constexpr, DETERMINISTIC: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    q_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, M, 1, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, M, 1, DV], do_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [1, 1, N, 1, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [1, 1, N, 1, DV], v_desc.layout)
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    P_BUFFERS: gl.constexpr = 4 if SINK and USED == 192 and DV == 128 else 2
    p_s = gl.allocate_shared_memory(q_desc.dtype, [P_BUFFERS, N, M], square)
    ds_s = gl.allocate_shared_memory(q_desc.dtype, [2, N, M], square)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, M], lse_desc.layout)
    LINES: gl.constexpr = 2 if SINK else 1
    delta_s = gl.allocate_shared_memory(gl.float32, [LINES * STAGES, M], delta_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    p_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(ds_full.index(i), count=1)
    fence_async_shared()
    follow()
    W0: gl.constexpr = 0
    W1: gl.constexpr = 1
    gl.warp_specialize([
        (_producer, (
            q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, cu_q, cu_k, q_s, do_s, k_s, v_s, lse_s, delta_s, kv_full,
            q_full, do_full, empty, key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k, padded, left, right, M,
            N, STAGES, BLOCK, LEFT, RIGHT, TAIL, VARLEN, SINK,
        )),
        (_consumer, (
            W0, dv_desc, dv_ptr, sums, turns, cu_q, cu_k, slopes, q_s, do_s, k_s, v_s, p_s, ds_s, lse_s, delta_s, kv_full,
            q_full, do_full, empty, p_full, ds_full, key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k, padded,
            left, right, slopes_batch, D_V, scale, cap, k_scale, d_sinks, M, N, D, USED, DV, STAGES, BLOCK, LEFT, RIGHT, TAIL,
            SOFTCAP, ALIBI, VARLEN, DETERMINISTIC, SINK,
        )),
        (_consumer, (
            W1, dk_desc, dk_ptr, sums, turns, cu_q, cu_k, slopes, q_s, do_s, k_s, v_s, p_s, ds_s, lse_s, delta_s, kv_full,
            q_full, do_full, empty, p_full, ds_full, key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k, padded,
            left, right, slopes_batch, D_K, scale, cap, k_scale, d_sinks, M, N, D, USED, DV, STAGES, BLOCK, LEFT, RIGHT, TAIL,
            SOFTCAP, ALIBI, VARLEN, DETERMINISTIC, SINK,
        )),
    ], [4, 4], [240, 240])  # fmt: skip
