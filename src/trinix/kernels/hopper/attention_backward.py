"""The kernels of Hopper attention's backward: ``before``, ``after`` and ``join`` in Triton, the work between them in Gluon.

``before`` makes delta = rowsum(dO * O) - dlse and the logsumexp in base 2, and clears dQ's sums. An item of the main
kernel is 128 keys of one key head, two consumer warpgroups 64 keys each, which walk over the query tiles of every query head of
the group, so that grouped heads need no reduction of dK and dV, the last tile first: so all programs of a head that begin
together under a causal mask read the same tiles. Per query tile, in each warpgroup::

    S^T = K Q^T,  dP^T = V dO^T           both operands in shared memory, transposed: keys are the rows
    P^T = exp2(S^T scale - lse),  dS^T = P^T (dP^T - delta)
    dV += P^T dO,  dK += dS^T Q           P^T and dS^T straight from registers as the left operand
    dQ  = dS K                            needs both warpgroups' dS: exchanged through shared memory

A sink is a key whose value is 0: its gradient is minus the sum over all rows of share (sum(P dP) - dlse), share being its
probability. delta is sum(P dP) - dlse but for the rounding of out, which PyTorch's gradient has not. So where this gradient is
wanted, the main kernel adds up share sum(P (dP - delta)) = share (sum(P dP) - (1 - share) delta) by the way, a number for each
head and each warpgroup's keys, and ``before`` what is missing, share ((1 - share) delta - dlse): the rounding is in both, and
cancels.

dQ is added up in float32 by reductions into global memory; its last bits depend on the order of arrival unless
DETERMINISTIC makes every program wait for its turn. dK and dV are the same on every run. The sums lie in the order in which
the threads of a warpgroup hold them (``_in_thread_order``), so that every reduction is 16 bytes a thread and 512 in a row;
``after`` puts them in order, scales and rounds. With COPY_SUMS the threads leave them in shared memory and go on, and the
producer has the copy engine add them.

Two ways to make dQ: TURNS (one warpgroup makes a whole tile, then the other: wide products, and the other one runs ahead),
COLUMNS (each makes half of the columns). Products of 64 queries read as many bytes of
shared memory as it delivers: as many columns of K and V as there are registers for stay in them as left operands
(K_HELD, V_HELD).

With KV_SLOTS a program draws one item after the other from a counter, which ``before`` sets to zero: K, V and the first
tiles of the next arrive while this one's last tiles are worked on. Otherwise it has one.

Where the items are too few for the card, several have the keys of one head, each for a part of its query heads, and ``join`` adds up.

The kernels follow each other by programmatic launches: each lets the next in early, and waits for the one before it.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trinix.kernels.hopper._compat import block_barrier, tma_load, tma_reduce_add, tma_store
from trinix.kernels.hopper.attention_scores import (
    keep_columns,
    named_arrive,
    named_wait,
    publish,
    published,
    sequence,
    tanh_over_2,
)
from trinix.kernels.hopper.early import let_next_kernel_start, wait_for_kernel_before

TURNS, COLUMNS, WIDE = (gl.constexpr(i) for i in range(3))
BLOCK = 128  # rows of a program of ``before``; every sequence's padded rows start and end at multiples of it

_BEFORE = (
    "lse", "dlse", "cu_q", "turns", "sinks", "d_sinks", "H", "seq_q", "padded", "rows_all", "blocks", "out_b", "out_s", "out_h", "dout_b", "dout_s",
    "dout_h", "DV",
)  # fmt: skip


@triton.jit
def _rows_of(cu_q, b, bh, H, seq_q, padded, BLOCK: tl.constexpr, VARLEN: tl.constexpr):
    """Sequence b and head -> (first row in the tensors, rows, first padded row). Padded rows are counted over all heads."""
    row0, rows, base = 0, seq_q, bh.to(tl.int64) * padded
    if VARLEN:
        row0 = tl.load(cu_q + b)
        rows = tl.load(cu_q + b + 1) - row0
        base = (bh % H).to(tl.int64) * padded + (row0 + b * BLOCK) // BLOCK * BLOCK
    return row0, rows, base


@triton.jit(do_not_specialize=_BEFORE)
def before(
    out, dout, lse, dlse, lse2, delta, sums, turns, sinks, d_sinks, cu_q, H, seq_q, padded, rows_all, blocks, out_b: "i64", out_s: "i64",
    out_h: "i64", dout_b: "i64", dout_s: "i64", dout_h: "i64", DV, D: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, VARLEN: tl.constexpr, DLSE: tl.constexpr, SINK: tl.constexpr, DETERMINISTIC: tl.constexpr,
    DRAWN: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    if DRAWN:  # the counter of items
        tl.store(turns, 0, mask=tl.program_id(0) == 0)
    bh = tl.program_id(0) // blocks
    m = tl.program_id(0) % blocks * BLOCK
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    row0, rows, base = _rows_of(cu_q, b, bh, H, seq_q, padded, BLOCK, VARLEN)
    if SINK:
        batch_heads = tl.num_programs(0) // blocks
        d_sinks += tl.program_id(0) % blocks * batch_heads + bh
    if SINK and m >= rows:
        tl.store(d_sinks, 0.0)
    if m >= rows:
        return
    i = m + tl.arange(0, BLOCK)
    d = tl.arange(0, DV_PADDED)
    live = i < rows
    if VARLEN:
        b = b * 0
        at_lse = h * rows_all + row0 + i
    else:
        at_lse = bh.to(tl.int64) * seq_q + i
    at = (row0 + i).to(tl.int64)[:, None]
    inside = live[:, None] & (d < DV * 8)[None, :]
    o = tl.load(out + (b * out_b + h * out_h + at * out_s) * 8 + d[None, :], mask=inside, other=0.0)
    do = tl.load(dout + (b * dout_b + h * dout_h + at * dout_s) * 8 + d[None, :], mask=inside, other=0.0)
    sum_o_do = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if DLSE:
        d_total = tl.load(dlse + at_lse, mask=live, other=0.0)
        sum_o_do -= d_total
    total = tl.load(lse + at_lse, mask=live, other=float("-inf"))
    # +inf makes P zero: for rows past the end and for rows that saw no key
    total = tl.where(total == float("-inf"), float("inf"), total)
    tl.store(lse2 + base + i, total * 1.4426950408889634)
    tl.store(delta + base + i, sum_o_do)
    if SINK:
        share = tl.where(live, tl.exp2((tl.load(sinks + h).to(tl.float32) - total) * 1.4426950408889634), 0.0)
        tl.store(delta + (H if VARLEN else batch_heads) * padded + base + i, share)
        rest = sum_o_do * (1.0 - share)
        if DLSE:
            rest -= d_total
        tl.store(d_sinks, tl.sum(share * rest, 0))
    WIDTH: tl.constexpr = 64 if D == 192 else D  # a power of two
    for part in tl.static_range(D // WIDTH):
        clear = sums + (base + m) * D + part * (BLOCK * WIDTH) + tl.arange(0, BLOCK * WIDTH)
        tl.store(clear, tl.zeros([BLOCK * WIDTH], tl.float32))
    if DETERMINISTIC:
        tl.store(turns + (base + m) // 64 + tl.arange(0, BLOCK // 64), tl.zeros([BLOCK // 64], tl.int32))


@triton.jit(do_not_specialize=("cu_q", "H", "seq_q", "padded", "blocks", "dq_b", "dq_s", "dq_h", "DQ"))
def after(
    sums, dq, cu_q, H, seq_q, padded, blocks, dq_b: "i64", dq_s: "i64", dq_h: "i64", DQ, scale: "fp32", D: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """64 rows and WIDTH columns of dQ. Strides and DQ count 8 elements: so the compiler knows how they are aligned."""
    tl.extra.cuda.gdc_wait()
    PARTS: tl.constexpr = D // WIDTH
    bh = tl.program_id(0) // (blocks * PARTS)
    m = tl.program_id(0) % (blocks * PARTS) // PARTS * 64
    part = tl.program_id(0) % PARTS
    b = (bh // H).to(tl.int64)
    row0, rows, base = _rows_of(cu_q, b, bh, H, seq_q, padded, BLOCK, VARLEN)
    if m >= rows:
        return
    if VARLEN:
        b = b * 0
    flat = tl.load(sums + (base + m) * D + part * (64 * WIDTH) + tl.arange(0, 64 * WIDTH))
    x = tl.reshape(flat * scale, (4, WIDTH // 8, 8, 4, 2, 2))  # as _in_thread_order left it
    x = tl.reshape(tl.permute(x, (0, 4, 2, 1, 3, 5)), (64, WIDTH)).to(dq.dtype.element_ty)
    i = m + tl.arange(0, 64)
    d = part * WIDTH + tl.arange(0, WIDTH)
    to = dq + (b * dq_b + (bh % H).to(tl.int64) * dq_h + (row0 + i).to(tl.int64)[:, None] * dq_s) * 8 + d[None, :]
    tl.store(to, x, mask=(i < rows)[:, None] & (d < DQ * 8)[None, :])


@triton.jit(
    do_not_specialize=(
        "rows", "seq_k", "H", "P", "dk_b", "dk_s", "dk_h", "dv_b", "dv_s", "dv_h", "DQK", "DV", "blocks",
    )
)  # fmt: skip
def join(
    parts_k, parts_v, dk, dv, rows, seq_k, H, P, dk_b: "i64", dk_s: "i64", dk_h: "i64", dv_b: "i64", dv_s: "i64", dv_h: "i64",
    DQK, DV, blocks, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """dK and dV of key heads that several programs share: sums of their P parts, of ``rows`` tokens of H heads, SIZE numbers a program. The
    first ``blocks`` programs make dK. Strides, DQK and DV count 8 elements."""
    tl.extra.cuda.gdc_wait()
    if tl.program_id(0) < blocks:
        _join(parts_k, dk, tl.program_id(0), rows, seq_k, H, P, dk_b, dk_s, dk_h, DQK, WIDTH, SIZE)
    else:
        _join(parts_v, dv, tl.program_id(0) - blocks, rows, seq_k, H, P, dv_b, dv_s, dv_h, DV, V_WIDTH, SIZE)


@triton.jit
def _join(parts, out, program, rows, seq_k, H, P, out_b, out_s, out_h, D, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    BLOCK: tl.constexpr = SIZE // WIDTH
    i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    inside = (i < rows * H)[:, None] & (d < D * 8)[None, :]
    at = parts + (i * P * D * 8)[:, None] + d[None, :]
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    for p in range(P):
        total += tl.load(at + p * D * 8, mask=inside, other=0.0).to(tl.float32)
    token = i // H
    to = token // seq_k * out_b + token % seq_k * out_s + i % H * out_h
    tl.store(out + (to * 8)[:, None] + d[None, :], total.to(out.dtype.element_ty), mask=inside)


# ---- barriers between the two consumers: hardware barriers 8, 9, 10 (Triton itself uses the low ids) --------------------
# ``_both`` has an id of its own: a warpgroup that has only arrived at 8 must not go on to wait at 8, or it would complete
# the barrier by itself while the other one is still on its way there (and that one would wait for ever).


@gluon.jit
def _both():
    named_wait(10)


@gluon.jit
def _wait_for_other(ME: gl.constexpr):
    named_wait(8 + ME)


@gluon.jit
def _tell_other(ME: gl.constexpr):
    named_arrive(9 - ME)


# ---- work --------------------------------------------------------------------------------------------------------------


@gluon.jit
def _place(idx, key_blocks, out_heads, section, Hk, parts):
    """Item -> (key block, batch, head of dK). The first key blocks, which most queries see under a causal mask, go first,
    within sections of heads that share the L2 cache."""
    sec = idx // (section * key_blocks)
    r = idx - sec * section * key_blocks
    width = gl.minimum(section, out_heads - sec * section)
    n = r // width
    bh = sec * section + r % width
    b = bh // (Hk * parts)
    return n, b, bh - b * Hk * parts


@gluon.jit
def _query_tiles(
    n,
    sq,
    sk,
    left,
    right,
    M: gl.constexpr,
    N: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    TAIL: gl.constexpr,
):
    """Key block n -> query tiles: (the first that sees it, the first and the end of those that see all of it, the end)."""
    tiles = gl.cdiv(sq, M)
    key = n * N + sq - sk  # the query that stands at the block's first key
    first = 0
    whole_from = 0
    if RIGHT:
        first = gl.minimum(gl.maximum(key - right, 0) // M, tiles)
        whole_from = gl.cdiv(gl.maximum(key + N - 1 - right, 0), M)
    end = tiles
    whole_to = tiles
    if LEFT:
        end = gl.minimum(gl.cdiv(gl.maximum(key + N + left, 0), M), tiles)
        whole_to = gl.maximum(key + left + 1, 0) // M
    if TAIL:
        whole_from = gl.where(n * N + N > sk, tiles, whole_from)
    if n * N >= sk:  # behind the end of a short sequence
        end = 0
    end = gl.maximum(end, first)
    whole_from = gl.minimum(gl.maximum(whole_from, first), end)
    return first, whole_from, gl.minimum(gl.maximum(whole_to, whole_from), end), end


@gluon.jit
def _queries_that_see(keys, sk, left, right, RIGHT: gl.constexpr):
    """Where the queries stand that see each key: (the first, the last)."""
    return gl.where(keys < sk, keys - right if RIGHT else -(1 << 30), 1 << 30), keys + left


@gluon.jit
def _padded_row(b, h, row0, H, padded, BLOCK: gl.constexpr, VARLEN: gl.constexpr):
    row = (b * H + h) * padded
    if VARLEN:
        row = h * padded + (row0 + b * BLOCK) // BLOCK * BLOCK
    return row


@gluon.jit
def _padded_rows(out_heads, group, Hk, parts, padded, VARLEN: gl.constexpr):
    """Of all heads and batches."""
    heads = out_heads * group
    if VARLEN:
        heads = Hk * parts * group
    return heads * padded


@gluon.jit
def _load_item(
    idx, t, it, q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, cu_q, cu_k, q_s, do_s, k_s, v_s, lse_s, delta_s,
    kv_full, kv_empty, q_full, q_empty, do_full, do_empty, dq_desc, dq_s, dq_full, dq_empty, key_blocks, out_heads,
    section, Hk, parts, group, seq_q, seq_k, padded, left, right, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, DQ_WAY: gl.constexpr, BLOCK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    TAIL: gl.constexpr, VARLEN: gl.constexpr, COPY_SUMS: gl.constexpr, KV_SLOTS: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    n, b, out_head = _place(idx, key_blocks, out_heads, section, Hk, parts)
    batch, row0, key0, sq, sk = sequence(b, cu_q, cu_k, seq_q, seq_k, VARLEN)
    first, _, _, end = _query_tiles(n, sq, sk, left, right, M, N, LEFT, RIGHT, TAIL)
    kv = 0
    if KV_SLOTS:
        kv = t % KV_SLOTS
        mbarrier.wait(kv_empty.index(kv), ((t // KV_SLOTS) & 1) ^ 1)
    mbarrier.expect(kv_full.index(kv), 2 * k_desc.block_type.nbytes + 2 * v_desc.block_type.nbytes)
    for g in gl.static_range(2):
        tma_load(
            k_desc, [batch, key0 + n * N + g * (N // 2), out_head // parts, 0], kv_full.index(kv), k_s.index(2 * kv + g)
        )
        tma_load(
            v_desc, [batch, key0 + n * N + g * (N // 2), out_head // parts, 0], kv_full.index(kv), v_s.index(2 * kv + g)
        )
    wait_for_kernel_before()  # what ``before`` makes; K and V are there since before it
    LINES: gl.constexpr = 2 if SINK else 1
    all_rows = _padded_rows(out_heads, group, Hk, parts, padded, VARLEN)
    row_1 = 0  # the sums' rows of the last tile, and of the one before it
    row_2 = 0
    for g in range(group):
        h = out_head * group + g
        row = _padded_row(b, h, row0, Hk * parts * group, padded, BLOCK, VARLEN)
        for at in range(first, end):
            m = first + end - 1 - at
            slot = it % STAGES
            phase = (it // STAGES) & 1
            it += 1
            mbarrier.wait(q_empty.index(slot), phase ^ 1)
            mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
            tma_load(q_desc, [batch, row0 + m * M, h, 0], q_full.index(slot), q_s.index(slot))
            tma_load(lse_desc, [row + m * M], q_full.index(slot), lse_s.index(slot))
            mbarrier.wait(do_empty.index(slot), phase ^ 1)
            mbarrier.expect(do_full.index(slot), do_desc.block_type.nbytes + LINES * delta_desc.block_type.nbytes)
            tma_load(do_desc, [batch, row0 + m * M, h, 0], do_full.index(slot), do_s.index(slot))
            tma_load(delta_desc, [row + m * M], do_full.index(slot), delta_s.index(slot))
            if SINK:
                tma_load(delta_desc, [all_rows + row + m * M], do_full.index(slot), delta_s.index(STAGES + slot))
            if COPY_SUMS:  # with two slots, dQ of the tile before the last is there when a slot is free for the next
                if it > 2:
                    _add_copied(dq_desc, dq_s, dq_full, dq_empty, it - 3, row_2, D, DQ_WAY)
                row_2 = row_1
                row_1 = row + m * M
    if COPY_SUMS:
        if it > 1:
            _add_copied(dq_desc, dq_s, dq_full, dq_empty, it - 2, row_2, D, DQ_WAY)
        if it > 0:
            _add_copied(dq_desc, dq_s, dq_full, dq_empty, it - 1, row_1, D, DQ_WAY)
    return it


@gluon.jit
def _producer(
    work, work_s, work_full, work_empty, q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, cu_q, cu_k, q_s, do_s,
    k_s, v_s, lse_s, delta_s, kv_full, kv_empty, q_full, q_empty, do_full, do_empty, dq_desc, dq_s, dq_full, dq_empty,
    key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k, padded, left, right, M: gl.constexpr,
    N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DQ_WAY: gl.constexpr, BLOCK: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr, VARLEN: gl.constexpr, COPY_SUMS: gl.constexpr,
    KV_SLOTS: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    it = 0
    t = 0
    idx = gl.program_id(0)
    if KV_SLOTS:
        while idx < key_blocks * out_heads:
            it = _load_item(
                idx, t, it, q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, cu_q, cu_k, q_s, do_s, k_s, v_s,
                lse_s, delta_s, kv_full, kv_empty, q_full, q_empty, do_full, do_empty, dq_desc, dq_s, dq_full,
                dq_empty, key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k, padded, left, right, M, N, D,
                STAGES, DQ_WAY, BLOCK, LEFT, RIGHT, TAIL, VARLEN, COPY_SUMS, KV_SLOTS, SINK,
            )  # fmt: skip
            idx = gl.atomic_add(work, 1) + gl.num_programs(0)
            publish(idx, t, work_s, work_full, work_empty)
            t += 1
    else:  # without a loop around it: the compiler's schedule of the products is another
        _load_item(
            idx, t, it, q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, cu_q, cu_k, q_s, do_s, k_s, v_s, lse_s,
            delta_s, kv_full, kv_empty, q_full, q_empty, do_full, do_empty, dq_desc, dq_s, dq_full, dq_empty,
            key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k, padded, left, right, M, N, D, STAGES,
            DQ_WAY, BLOCK, LEFT, RIGHT, TAIL, VARLEN, COPY_SUMS, KV_SLOTS, SINK,
        )  # fmt: skip


@gluon.jit
def _in_thread_order(dq, WIDTH: gl.constexpr, PART: gl.constexpr):
    """[64, WIDTH] of a warpgroup's product -> one dimension: PART columns after PART columns, and of each 4 values of a thread,
    then the next thread of the warp."""
    x = gl.reshape(
        dq, (4, 2, 8, WIDTH // PART, PART // 8, 4, 2)
    )  # warp, half, row, part, 8 columns, lane of the row, value
    return gl.reshape(gl.permute(x, (3, 0, 4, 2, 5, 1, 6)), (64 * WIDTH,))


@gluon.jit
def add_from_registers(
    sums, row, first, dq, turns, turn, D: gl.constexpr, WIDTH: gl.constexpr, DETERMINISTIC: gl.constexpr,
    PART: gl.constexpr,
):  # fmt: skip
    """Add a warpgroup's [64, WIDTH], 64 rows' columns from ``first`` on, into the sums; with DETERMINISTIC when ``turn`` others
    have done so. Its barrier then stands for the one that Triton would put in front of the next arrival: where a wait for
    products lies between, the caller needs a barrier behind that wait, or one warp gives back what others still read."""
    if DETERMINISTIC:
        while gl.atomic_add(turns + row // 64, 0, sem="acquire") < turn:
            pass
    flat = _in_thread_order(dq, WIDTH, PART)
    to = sums + row.to(gl.int64) * D + first * 64
    gl.atomic_add(to + gl.arange(0, 64 * WIDTH, flat.type.layout), flat, sem="relaxed")
    if DETERMINISTIC:
        block_barrier()  # the sums of all threads come before the one thread's atomic
        gl.atomic_add(turns + row // 64, 1, sem="release")


@gluon.jit
def _dq_turn(i, me, DQ_WAY: gl.constexpr):
    """Tile i -> (the barriers of its dQ, how often their buffer was used before): COLUMNS fills both parts for every tile,
    TURNS one for every second."""
    at = 0
    use = i
    if DQ_WAY == TURNS:
        at = me
        use = i // 2
    return at, use


@gluon.jit
def _add(
    sums, dq_s, dq_full, dq_empty, i, row, share, dq, turns, turn, ME: gl.constexpr, D: gl.constexpr, WIDTH: gl.constexpr,
    DQ_WAY: gl.constexpr, DETERMINISTIC: gl.constexpr, COPY_SUMS: gl.constexpr,
):  # fmt: skip
    if COPY_SUMS:
        at, use = _dq_turn(i, ME, DQ_WAY)
        mbarrier.wait(dq_empty.index(at), (use & 1) ^ 1)
        dq_s.index(ME).store(gl.reshape(_in_thread_order(dq, WIDTH, WIDTH), (WIDTH // 4, 256)))
        fence_async_shared()
        mbarrier.arrive(dq_full.index(at), count=1)
    else:
        add_from_registers(sums, row, share * WIDTH, dq, turns, turn, D, WIDTH, DETERMINISTIC, WIDTH)


@gluon.jit
def _add_copied(dq_desc, dq_s, dq_full, dq_empty, i, row, D: gl.constexpr, DQ_WAY: gl.constexpr):
    """The producer's part of ``_add``."""
    at, use = _dq_turn(i, i % 2, DQ_WAY)
    mbarrier.wait(dq_full.index(at), use & 1)
    if DQ_WAY == COLUMNS:
        for part in gl.static_range(2):
            tma_reduce_add(dq_desc, [row // (256 // D) + part * (D // 8), 0], dq_s.index(part))
    else:
        tma_reduce_add(dq_desc, [row // (256 // D), 0], dq_s.index(at))
    tma.store_wait(0)
    mbarrier.arrive(dq_empty.index(at), count=1)


@gluon.jit
def _scores(left, keys, queries, zero, D: gl.constexpr, HELD: gl.constexpr):
    """``keys queries^T``, started; ``left`` is their first HELD columns in registers, or themselves."""
    if HELD == 0 or HELD == D:
        x = warpgroup_mma(left, queries.permute((1, 0)), zero, use_acc=False, is_async=True)
    else:
        rest = queries.slice(HELD, D - HELD, dim=1).permute((1, 0))
        x = warpgroup_mma(keys.slice(HELD, D - HELD, dim=1), rest, zero, use_acc=False, is_async=True)
        x = warpgroup_mma(left, queries.slice(0, HELD, dim=1).permute((1, 0)), x, is_async=True)
    return x


@gluon.jit
def _dq_product(ds_s, buf, k0, k1, zero, ME: gl.constexpr, WIDTH: gl.constexpr, DQ_WAY: gl.constexpr):
    """dS K over the keys of both warpgroups, started."""
    ds0 = ds_s.index(buf * 2)
    ds1 = ds_s.index(buf * 2 + 1)
    if DQ_WAY == COLUMNS:
        dq = warpgroup_mma(ds0.permute((1, 0)), k0.slice(ME * WIDTH, WIDTH, dim=1), zero, use_acc=False, is_async=True)
        dq = warpgroup_mma(ds1.permute((1, 0)), k1.slice(ME * WIDTH, WIDTH, dim=1), dq, is_async=True)
    else:
        dq = warpgroup_mma(ds0.permute((1, 0)), k0, zero, use_acc=False, is_async=True)
        dq = warpgroup_mma(ds1.permute((1, 0)), k1, dq, is_async=True)
    return dq


# ---- a sink's gradient: sums of share P (dP - delta), by thread until a head's tiles are done ----------------------------


@gluon.jit
def pairs_of_rows(x):
    """x [64, M] of a product -> [warp, 8, M]: the sums of a thread's two rows, which take half as many multiplications."""
    return gl.sum(gl.reshape(x, (4, 2, 8, x.shape[1])), 1)


@gluon.jit
def sums_of_threads(x):
    """[4, 8, M] -> [4, 8, 4]: over each thread's own columns."""
    M: gl.constexpr = x.shape[2]
    x = gl.permute(gl.reshape(x, (4, 8, M // 8, 4, 2)), (0, 1, 3, 2, 4))
    return gl.sum(gl.reshape(x, (4, 8, 4, M // 4)), 3)


@gluon.jit
def weighted(pairs, share_s):
    """``sums_of_threads`` of pairs share."""
    layout: gl.constexpr = pairs.type.layout
    share = share_s.load(gl.SliceLayout(0, gl.SliceLayout(0, layout)))
    return sums_of_threads(pairs * gl.expand_dims(gl.expand_dims(share, 0), 0))


@gluon.jit
def sum_of_all(x):
    return gl.sum(gl.sum(gl.sum(x, 2), 1), 0)


@gluon.jit
def _consume_item(
    idx, t, it, ME: gl.constexpr, dk_desc, dv_desc, dk_ptr, dv_ptr, sums, turns, cu_q, cu_k, slopes, q_s, do_s, k_s,
    v_s, ds_s, dq_s, lse_s, delta_s, kv_full, kv_empty, q_full, q_empty, do_full, do_empty, dq_full,
    dq_empty, key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k, padded, left, right, slopes_batch, D_K,
    D_V, scale, cap, k_scale, d_sinks, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    DQ_WAY: gl.constexpr, BLOCK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr,
    SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, VARLEN: gl.constexpr, DETERMINISTIC: gl.constexpr,
    COPY_SUMS: gl.constexpr, K_HELD: gl.constexpr, V_HELD: gl.constexpr, KV_SLOTS: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = N // 2  # keys of this warpgroup
    PARTS: gl.constexpr = 3 if LEFT else (2 if RIGHT or TAIL else 1)
    WIDTH: gl.constexpr = D // 2 if DQ_WAY == COLUMNS else D  # columns of dQ that a warpgroup makes at once
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])  # S^T, dP^T [HALF, M]
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # dK, dV [HALF, D]
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])  # dQ [64, WIDTH]
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    key_axis: gl.constexpr = gl.SliceLayout(1, s_layout)
    query_axis: gl.constexpr = gl.SliceLayout(0, s_layout)
    dtype: gl.constexpr = q_s.dtype
    n, b, out_head = _place(idx, key_blocks, out_heads, section, Hk, parts)
    H = Hk * parts * group
    batch, row0, key0, sq, sk = sequence(b, cu_q, cu_k, seq_q, seq_k, VARLEN)
    first, whole_from, whole_to, end = _query_tiles(n, sq, sk, left, right, M, N, LEFT, RIGHT, TAIL)
    dk = gl.zeros([HALF, D], gl.float32, d_layout)
    dv = gl.zeros([HALF, D], gl.float32, d_layout)
    zero_s = gl.zeros([HALF, M], gl.float32, s_layout)
    zero_q = gl.zeros([64, WIDTH], gl.float32, q_layout)
    keys = n * N + ME * HALF + gl.arange(0, HALF, key_axis)
    from_query, to_query = _queries_that_see(keys, sk, left, right, RIGHT)
    keys = gl.expand_dims(keys, 1)
    kv = 0
    kv_phase = 0
    if KV_SLOTS:
        kv = t % KV_SLOTS
        kv_phase = (t // KV_SLOTS) & 1
    mbarrier.wait(kv_full.index(kv), kv_phase)
    k0 = k_s.index(2 * kv).reshape([HALF, D])
    k1 = k_s.index(2 * kv + 1).reshape([HALF, D])
    k_my = k_s.index(2 * kv + ME).reshape([HALF, D])
    v_my = v_s.index(2 * kv + ME).reshape([HALF, D])
    k_left = k_my
    v_left = v_my
    if K_HELD:
        k_left = k_my.slice(0, K_HELD, dim=1).load(gl.DotOperandLayout(0, s_layout, 2))
    if V_HELD:
        v_left = v_my.slice(0, V_HELD, dim=1).load(gl.DotOperandLayout(0, s_layout, 2))
    if KV_SLOTS:  # noqa: SIM102  (a constant and a value at run time)
        if t > 0:  # the last item's dK and dV have left the buffers of its K and V by now
            tma.store_wait(0)
            mbarrier.arrive(kv_empty.index(1 - kv), count=1)
    for g in range(group):
        h = out_head * group + g
        padded_row = _padded_row(b, h, row0, H, padded, BLOCK, VARLEN)
        slope = 0.0
        if ALIBI:
            slope = gl.load(slopes + b * slopes_batch + h).to(gl.float32) * 1.4426950408889634
        if SINK:
            sink_sums = sums_of_threads(pairs_of_rows(zero_s))
        for part in gl.static_range(PARTS - 1, -1, -1):  # tiles on the left edge, whole ones, those on the right one
            lo = first
            hi = end
            if PARTS > 1:
                if part == 0:
                    hi = whole_from
                elif part == 1:
                    lo = whole_from
                    hi = whole_to
                else:
                    lo = whole_to
            for place in range(lo, hi):
                m = lo + hi - 1 - place
                slot = it % STAGES
                phase = (it // STAGES) & 1
                buf = it % 2  # dS is double-buffered: one barrier per tile instead of two
                it += 1
                q = q_s.index(slot).reshape([M, D])
                do = do_s.index(slot).reshape([M, D])
                mbarrier.wait(q_full.index(slot), phase)
                s_tok = _scores(k_left, k_my, q, zero_s, D, K_HELD)
                mbarrier.wait(do_full.index(slot), phase)
                dp_tok = _scores(v_left, v_my, do, zero_s, D, V_HELD)
                s = warpgroup_mma_wait(1, deps=(s_tok,))
                lse = gl.expand_dims(lse_s.index(slot).load(query_axis), 0)  # kept in registers it would cause spills
                at = gl.expand_dims(m * M + sk - sq + gl.arange(0, M, query_axis), 0)
                if SOFTCAP:
                    tanh = tanh_over_2(s * scale)
                    s = tanh * cap
                elif ALIBI:
                    s = s * scale
                if ALIBI:
                    s = s - slope * gl.abs(at.to(gl.float32) - keys.to(gl.float32))
                if SOFTCAP or ALIBI:
                    p = gl.exp2(s - lse)
                else:
                    p = gl.exp2(s * scale - lse)
                if PARTS > 1 and part != 1:
                    col = m * M + sk - sq
                    p = keep_columns(p, from_query - col, to_query - col, 0.0, True, LEFT)
                if SOFTCAP and not SINK:  # before dP is there: fewer registers
                    pb = gl.convert_layout(p.to(dtype), a_layout)
                    p = p * (1.0 - tanh * tanh)
                dp = warpgroup_mma_wait(0, deps=(dp_tok,))
                delta = gl.expand_dims(delta_s.index(slot).load(query_axis), 0)
                ds = p * (dp - delta)
                if SINK:
                    ds_pairs = pairs_of_rows(ds)
                    if SOFTCAP:
                        ds = ds * (1.0 - tanh * tanh)
                ds = ds.to(dtype)
                if SINK or not SOFTCAP:
                    pb = gl.convert_layout(p.to(dtype), a_layout)
                dsb = gl.convert_layout(ds, a_layout)
                dv_tok = warpgroup_mma(pb, do, dv, is_async=True)
                row = padded_row + m * M
                turn = n
                if LEFT:
                    turn = n - gl.maximum(m * M + sk - sq - left, 0) // N
                if DQ_WAY == TURNS:
                    dk_tok = warpgroup_mma(dsb, q, dk, is_async=True)
                ds_s.index(buf * 2 + ME).store(ds)
                fence_async_shared()
                if DQ_WAY == COLUMNS:
                    _both()
                if SINK:  # while products are under way
                    sink_sums += weighted(ds_pairs, delta_s.index(STAGES + slot))
                if DQ_WAY == COLUMNS:
                    dq_tok = _dq_product(ds_s, buf, k0, k1, zero_q, ME, WIDTH, DQ_WAY)
                    dk_tok = warpgroup_mma(dsb, q, dk, is_async=True)
                    dv, dq = warpgroup_mma_wait(1, deps=(dv_tok, dq_tok))
                    mbarrier.arrive(do_empty.index(slot), count=1)
                    _add(
                        sums, dq_s, dq_full, dq_empty, it - 1, row, ME, dq, turns, 2 * turn, ME, D, WIDTH, DQ_WAY,
                        DETERMINISTIC, COPY_SUMS,
                    )  # fmt: skip
                    dk = warpgroup_mma_wait(0, deps=(dk_tok,))
                    if DETERMINISTIC:
                        block_barrier()
                    mbarrier.arrive(q_empty.index(slot), count=1)
                else:
                    if buf != ME:
                        _tell_other(ME)
                    dv, dk = warpgroup_mma_wait(0, deps=(dv_tok, dk_tok))
                    mbarrier.arrive(do_empty.index(slot), count=1)
                    mbarrier.arrive(q_empty.index(slot), count=1)
                    if buf == ME:  # this tile's dQ is mine
                        _wait_for_other(ME)
                        dq = _dq_product(ds_s, buf, k0, k1, zero_q, ME, WIDTH, DQ_WAY)
                        dq = warpgroup_mma_wait(0, deps=(dq,))
                        _add(
                            sums, dq_s, dq_full, dq_empty, it - 1, row, 0, dq, turns, turn, ME, D, WIDTH, DQ_WAY,
                            DETERMINISTIC, COPY_SUMS,
                        )  # fmt: skip
        if SINK:
            gl.store(d_sinks + (2 * n + ME) * (out_heads * group) + b * H + h, sum_of_all(sink_sums))
    _both()  # nobody reads K or V any more: their buffers carry dK and dV out
    dk_out = (dk * k_scale).to(dtype)
    dv_out = dv.to(dtype)
    key = n * N + ME * HALF
    if VARLEN:
        if key + HALF > sk:  # keys past the end of this sequence belong to the next one
            out_keys = gl.expand_dims(key + gl.arange(0, HALF, gl.SliceLayout(1, d_layout)), 1)
            cols = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, d_layout)), 0)
            rows = (key0 + out_keys).to(gl.int64) * (Hk * parts) + out_head
            gl.store(dk_ptr + rows * D_K + cols, dk_out, mask=(out_keys < sk) & (cols < D_K))
            gl.store(dv_ptr + rows * D_V + cols, dv_out, mask=(out_keys < sk) & (cols < D_V))
        else:
            k_my.store(dk_out)
            v_my.store(dv_out)
            fence_async_shared()
            tma_store(dk_desc, [batch, key0 + key, out_head, 0], k_s.index(2 * kv + ME))
            tma_store(dv_desc, [batch, key0 + key, out_head, 0], v_s.index(2 * kv + ME))
    else:
        k_my.store(dk_out)
        v_my.store(dv_out)
        fence_async_shared()
        tma_store(dk_desc, [batch, key, out_head, 0], k_s.index(2 * kv + ME))
        tma_store(dv_desc, [batch, key, out_head, 0], v_s.index(2 * kv + ME))
    return it


@gluon.jit
def _consumer(
    work_s, work_full, work_empty, ME: gl.constexpr, dk_desc, dv_desc, dk_ptr, dv_ptr, sums, turns, cu_q, cu_k, slopes,
    q_s, do_s, k_s, v_s, ds_s, dq_s, lse_s, delta_s, kv_full, kv_empty, q_full, q_empty, do_full, do_empty, dq_full,
    dq_empty, key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k, padded, left, right,
    slopes_batch, D_K, D_V, scale, cap, k_scale, d_sinks, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, DQ_WAY: gl.constexpr, BLOCK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    TAIL: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, VARLEN: gl.constexpr, DETERMINISTIC: gl.constexpr,
    COPY_SUMS: gl.constexpr, K_HELD: gl.constexpr, V_HELD: gl.constexpr, KV_SLOTS: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    it = 0
    t = 0
    wait_for_kernel_before()
    idx = gl.program_id(0)
    if KV_SLOTS:
        while idx < key_blocks * out_heads:
            it = _consume_item(
                idx, t, it, ME, dk_desc, dv_desc, dk_ptr, dv_ptr, sums, turns, cu_q, cu_k, slopes, q_s, do_s, k_s, v_s,
                ds_s, dq_s, lse_s, delta_s, kv_full, kv_empty, q_full, q_empty, do_full, do_empty, dq_full, dq_empty,
                key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k, padded, left, right,
                slopes_batch, D_K, D_V, scale, cap, k_scale, d_sinks, M, N, D, STAGES, DQ_WAY, BLOCK, LEFT, RIGHT,
                TAIL, SOFTCAP, ALIBI, VARLEN, DETERMINISTIC, COPY_SUMS, K_HELD, V_HELD, KV_SLOTS, SINK,
            )  # fmt: skip
            idx = published(t, work_s, work_full, work_empty)
            t += 1
    else:  # without a loop around it: the compiler's schedule of the products is another
        _consume_item(
            idx, t, it, ME, dk_desc, dv_desc, dk_ptr, dv_ptr, sums, turns, cu_q, cu_k, slopes, q_s, do_s, k_s, v_s,
            ds_s, dq_s, lse_s, delta_s, kv_full, kv_empty, q_full, q_empty, do_full, do_empty, dq_full, dq_empty,
            key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k, padded, left, right,
            slopes_batch, D_K, D_V, scale, cap, k_scale, d_sinks, M, N, D, STAGES, DQ_WAY, BLOCK, LEFT, RIGHT, TAIL,
            SOFTCAP, ALIBI, VARLEN, DETERMINISTIC, COPY_SUMS, K_HELD, V_HELD, KV_SLOTS, SINK,
        )  # fmt: skip
    tma.store_wait(0)


_RUNTIME = (
    "dk_ptr", "dv_ptr", "turns", "cu_q", "cu_k", "slopes", "key_blocks", "out_heads", "section", "Hk", "parts",
    "group", "seq_q", "seq_k", "padded", "left", "right", "slopes_batch", "D_K", "D_V", "d_sinks",
)  # fmt: skip


@gluon.jit(do_not_specialize=_RUNTIME)
def attention_backward(
    q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, dq_desc, lse_desc, delta_desc, dk_ptr, dv_ptr, sums, turns, cu_q, cu_k,
    slopes, key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k, padded, left, right, slopes_batch, D_K, D_V,
    scale: "fp32", cap: "fp32", k_scale: "fp32", d_sinks, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, DQ_WAY: gl.constexpr, BLOCK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr,
    SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, VARLEN: gl.constexpr, DETERMINISTIC: gl.constexpr,
    COPY_SUMS: gl.constexpr, K_HELD: gl.constexpr, V_HELD: gl.constexpr, KV_SLOTS: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    SLOTS: gl.constexpr = KV_SLOTS if KV_SLOTS else 1
    q_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, M, 1, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, M, 1, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [2 * SLOTS, 1, N // 2, 1, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [2 * SLOTS, 1, N // 2, 1, D], k_desc.layout)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ds_s = gl.allocate_shared_memory(q_desc.dtype, [4, N // 2, M], ds_layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, M], lse_desc.layout)
    LINES: gl.constexpr = 2 if SINK else 1
    delta_s = gl.allocate_shared_memory(gl.float32, [LINES * STAGES, M], delta_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    kv_empty = kv_full
    work_s = kv_full
    work_full = kv_full
    work_empty = kv_full
    if KV_SLOTS:
        kv_empty = gl.allocate_shared_memory(gl.int64, [KV_SLOTS, 1], bar)
        for i in gl.static_range(KV_SLOTS):
            mbarrier.init(kv_empty.index(i), count=2)
        work_s = gl.allocate_shared_memory(gl.int64, [2, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        work_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
        work_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
        for i in gl.static_range(2):
            mbarrier.init(work_full.index(i), count=1)
            mbarrier.init(work_empty.index(i), count=2)
    dq_s = lse_s
    if COPY_SUMS:
        dq_s = gl.allocate_shared_memory(
            gl.float32, [2, dq_desc.block_type.shape[0], dq_desc.block_type.shape[1]], dq_desc.layout
        )
    dq_full = kv_full
    dq_empty = kv_full
    if COPY_SUMS:
        dq_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
        dq_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
        for i in gl.static_range(2):
            mbarrier.init(dq_full.index(i), count=2 if DQ_WAY == COLUMNS else 1)
            mbarrier.init(dq_empty.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(kv_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(do_empty.index(i), count=2)
    fence_async_shared()
    let_next_kernel_start()
    # Part 0 is the producer, 1 and 2 are consumers. The argument tuples must be written out here (attention_forward.py).
    gl.warp_specialize([
        (_producer, (
            turns, work_s, work_full, work_empty, q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, cu_q, cu_k,
            q_s, do_s, k_s, v_s, lse_s, delta_s, kv_full, kv_empty, q_full, q_empty, do_full, do_empty, dq_desc, dq_s,
            dq_full, dq_empty, key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k, padded, left, right, M,
            N, D, STAGES, DQ_WAY, BLOCK, LEFT, RIGHT, TAIL, VARLEN, COPY_SUMS, KV_SLOTS, SINK,
        )) if part == 0 else
        (_consumer, (
            work_s, work_full, work_empty, part - 1, dk_desc, dv_desc, dk_ptr, dv_ptr, sums, turns, cu_q, cu_k, slopes,
            q_s, do_s, k_s, v_s, ds_s, dq_s, lse_s, delta_s, kv_full, kv_empty, q_full, q_empty, do_full, do_empty,
            dq_full, dq_empty, key_blocks, out_heads, section, Hk, parts, group, seq_q, seq_k,
            padded, left, right, slopes_batch, D_K, D_V, scale, cap, k_scale, d_sinks, M, N, D, STAGES, DQ_WAY, BLOCK,
            LEFT, RIGHT, TAIL, SOFTCAP, ALIBI, VARLEN, DETERMINISTIC, COPY_SUMS, K_HELD, V_HELD, KV_SLOTS, SINK,
        ))
        for part in (0, 1, 2)
    ], [4, 4], [240, 240])  # fmt: skip
