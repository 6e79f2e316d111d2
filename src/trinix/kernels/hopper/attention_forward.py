"""The forward kernels of Hopper attention: one for any length, and one for calls that the card runs all at once (at the end).

One program per SM, three or four warpgroups of 128 threads:

producer   loads tiles of Q, K and V by TMA into rings of shared memory, and draws the next item of work
consumers  two or three, each with its own 64 query rows; they share the tiles of K and V

Every slot of a ring has two mbarriers: ``*_full`` (its data has landed) and ``*_empty`` (every reader is done). The n-th use
of a barrier has the parity n & 1; waiting for the opposite parity passes at once on a fresh barrier, which is how the
producer gets through its first round. An item is a block of query rows of one head; items are drawn from a counter that the
last program sets back to zero. Each consumer keeps two products in flight, P(j-1) V(j-1) and Q K(j); the warpgroups drift
apart, or take turns (PINGPONG), so that one's products run under another's softmax.

Without bounds all items take the same time, so a last round with few items would take as long as a full one. With SHARED the
key tiles of these items are dealt out evenly to all programs (as stream-K does with products): a share is the last tiles of one
item and then the first of the next, or some in the middle of one. Who has an item's first tiles owns it; the others leave it
their sums, maxima and O unnormalised as pieces in memory, which it adds up in the order of the shares: the same bits on every
run. Shares go by the number that a program has drawn, from the last share to the first, and pieces are left before anything is
waited for. So whatever a program waits for comes from programs that run already, however few do so at once.
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

from trinix.kernels.hopper._compat import block_barrier, reinterpret, tma_load, tma_store
from trinix.kernels.hopper.attention_scores import (
    follow,
    keep_columns,
    key_tiles,
    keys_visited,
    named_arrive,
    named_wait,
    place,
    publish,
    published,
    sequence,
    transformed,
)

LN2 = gl.constexpr(0.6931471805599453)
NO_ITEM = gl.constexpr(2**31 - 1)


# ---- consumers take turns at starting products: hardware barriers 9 to 11 (Triton itself uses the low ids) -----------------


@gluon.jit
def _wait_turn(ME: gl.constexpr):
    named_wait(9 + ME)


@gluon.jit
def _pass_turn(ME: gl.constexpr, CONSUMERS: gl.constexpr):
    named_arrive(9 + (ME + 1) % CONSUMERS)


# ---- producer ----------------------------------------------------------------------------------------------------------


@gluon.jit
def _next_item(idx, counter, cu_q, items, heads, H, row_blocks, section, BM: gl.constexpr, VARLEN: gl.constexpr):
    """The first item from idx on that has rows: with lengths of their own, many blocks lie behind their sequence."""
    if VARLEN:
        looking = idx < items
        while looking:
            m, bh = place(idx, heads, row_blocks, section)
            b = bh // H
            looking = m * BM >= gl.load(cu_q + b + 1) - gl.load(cu_q + b)
            if looking:
                idx = gl.atomic_add(counter, 1) + gl.num_programs(0)
                looking = idx < items
    return idx


@gluon.jit
def _segment(idx, programs, whole, items, tiles):
    """Number idx -> (item, its first tile, its end, share), tiles as they are visited: from the last key on.

    Numbers below ``whole``, a multiple of all programs, are items. Then come as many shares of the items that are left. A share's
    second segment has the number that lies as far behind its first; where there is none it ends at 0 or below."""
    rest = items - whole
    idx -= whole
    share = programs - 1 - idx % programs
    lo = share * rest * tiles // programs
    hi = (share + 1) * rest * tiles // programs
    item = lo // tiles + idx // programs
    begin = gl.maximum(lo - item * tiles, 0)
    end = gl.minimum(hi - item * tiles, tiles)
    return whole + item, begin, end, share


@gluon.jit
def _item_or_segment(idx, whole, items, tiles):
    """Number idx -> (item, its first tile, its end). Whole items pay none of the divisions."""
    item = idx
    begin = 0
    end = tiles
    if idx >= whole:
        item, begin, end, _ = _segment(idx, gl.num_programs(0), whole, items, tiles)
    return item, begin, end


@gluon.jit
def _next_segment(idx, counter, whole, items, tiles):
    programs = gl.num_programs(0)
    if idx < whole:
        idx = gl.atomic_add(counter, 1) + programs
    else:
        idx += programs
        _, _, end, _ = _segment(idx, programs, whole, items, tiles)
        idx = gl.where(end > 0, idx, NO_ITEM)
    return idx


@gluon.jit
def _anew(n):
    """n as the compiler has not seen it yet: what follows from it is computed again, and not kept in registers until then."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [n], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, counter, cu_q, cu_k, q_s, k_s, v_s, work_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    work_full, work_empty, items, whole, heads, H, group, row_blocks, section, seq_q, seq_k, left, right, M: gl.constexpr,
    N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, Q_BUFFERS: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, VARLEN: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = M * CONSUMERS
    t = 0  # items so far
    kv = 0  # key tiles so far: slot kv % STAGES, phase (kv // STAGES) & 1
    idx = _next_item(gl.program_id(0), counter, cu_q, items, heads, H, row_blocks, section, BM, VARLEN)
    if VARLEN:
        publish(idx, 0, work_s, work_full, work_empty)
    stop = items
    if SHARED:
        stop = NO_ITEM
        tiles = gl.cdiv(seq_k, N)
    while idx < stop:
        item = idx
        if SHARED:
            item, begin, end = _item_or_segment(idx, whole, items, tiles)
        m, bh = place(item, heads, row_blocks, section)
        b = bh // H
        h = bh - b * H
        batch, row0, key0, sq, sk = sequence(b, cu_q, cu_k, seq_q, seq_k, VARLEN)
        first, last = keys_visited(m * BM, sq, sk, left, right, BM, N, LEFT, RIGHT)
        if SHARED:
            first = tiles - end
            last = tiles - begin
        for g in gl.static_range(CONSUMERS):
            i = (t % Q_BUFFERS) * CONSUMERS + g
            mbarrier.wait(q_empty.index(i), ((t // Q_BUFFERS) & 1) ^ 1)
            mbarrier.expect(q_full.index(i), q_desc.block_type.nbytes)
            tma_load(q_desc, [batch, row0 + (m * CONSUMERS + g) * M, h, 0], q_full.index(i), q_s.index(i))
        for j in range(last - first):  # from the last key tile to the first: masked tiles come first
            slot = kv % STAGES
            phase = (kv // STAGES) & 1
            row = key0 + (last - 1 - j) * N
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma_load(k_desc, [batch, row, h // group, 0], k_full.index(slot), k_s.index(slot))
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            tma_load(v_desc, [batch, row, h // group, 0], v_full.index(slot), v_s.index(slot))
            kv += 1
        # Draw the next item now: the latency hides behind the key tiles that are still in flight. Earlier it would stand before
        # the item's first K, and an item drawn late goes to the program that is free first.
        if SHARED:
            idx = _next_segment(idx, counter, whole, items, tiles)
        else:
            idx = gl.atomic_add(counter, 1) + gl.num_programs(0)
            idx = _next_item(idx, counter, cu_q, items, heads, H, row_blocks, section, BM, VARLEN)
        t += 1
        publish(idx, t if VARLEN else t - 1, work_s, work_full, work_empty)
    # Every program has drawn its last item before it says so; the last to say so leaves the counters as it found them.
    if gl.atomic_add(counter + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


# ---- rescaling what was summed up under an older maximum -----------------------------------------------------------------


def _rescale_asm(n):
    """(PTX, constraints) of o *= alpha for n values of a thread, skipped by a warp whose factors are all 1.

    A thread holds pairs of columns of two rows by turns, so the factors of values 0 and 2 are all that there are."""
    outs = [f"${i}" for i in range(n)]
    ins = [f"${n + i}" for i in range(n)]
    a0, a1 = f"${2 * n}", f"${2 * n + 2}"
    lines = ["{", ".reg .pred p, q;", ".reg .f32 t;"]
    lines += [f"mov.f32 {o}, {i};" for o, i in zip(outs, ins, strict=True)]
    lines += [f"setp.ne.f32 p, {a0}, 0f3F800000;", f"setp.ne.or.f32 p, {a1}, 0f3F800000, p;"]
    lines += ["vote.sync.any.pred q, p, 0xffffffff;", "@!q bra.uni SKIP;"]
    lines += [f"mul.ftz.f32 {o}, {o}, {a1 if i & 2 else a0};" for i, o in enumerate(outs)]
    lines += ["SKIP:", "}"]
    return " ".join(lines), ",".join(["=f"] * n + ["f"] * (2 * n))


ASM_32, CONSTRAINTS_32 = (gl.constexpr(text) for text in _rescale_asm(32))
ASM_64, CONSTRAINTS_64 = (gl.constexpr(text) for text in _rescale_asm(64))


@gluon.jit
def _rescale(o, alpha, DV: gl.constexpr):
    """o times alpha, one factor for each row."""
    factors = gl.expand_dims(alpha, 1) + gl.zeros_like(o)
    if DV == 64:
        o = gl.inline_asm_elementwise(ASM_32, CONSTRAINTS_32, [o, factors], dtype=gl.float32, is_pure=True, pack=32)
    else:
        o = gl.inline_asm_elementwise(ASM_64, CONSTRAINTS_64, [o, factors], dtype=gl.float32, is_pure=True, pack=64)
    return o


@gluon.jit
def _normaliser(m_i, l_row, sinks, h, SINK: gl.constexpr):
    """(what O is multiplied by, lse) of rows with these maxima and sums."""
    inv = gl.where(l_row == 0.0, 0.0, 1.0 / l_row)
    if SINK:  # one more logit in the normaliser, whose value is 0
        sink = gl.load(sinks + h).to(gl.float32) * 1.4426950408889634
        most = gl.maximum(m_i, sink)
        m_use = gl.where(most == -float("inf"), 0.0, most)  # neither a key nor a sink: -inf - -inf would be NaN
        shrink = gl.exp2(m_i - m_use)
        l_row = l_row * shrink + gl.exp2(sink - m_use)
        inv = gl.where(l_row == 0.0, 0.0, shrink / l_row)
        m_i = m_use
    # one fused multiply-add: the sum in base 2 would be rounded at the maximum's size
    return inv, m_i * LN2 + gl.log2(l_row) * LN2


# ---- items that programs share -------------------------------------------------------------------------------------------


@gluon.jit
def _leave_piece(at, arrived, o, m_i, l_row):
    """Write down what a share has of an item, and tell the item's owner."""
    M: gl.constexpr = o.shape[0]
    DV: gl.constexpr = o.shape[1]
    rows = gl.arange(0, M, m_i.type.layout)
    gl.store(at + _in_rows(o), o)
    gl.store(at + M * DV + rows, m_i)
    gl.store(at + M * DV + M + rows, l_row)
    block_barrier()  # the stores of all threads come before the one thread's atomic
    gl.atomic_add(arrived, 1, sem="release")


@gluon.jit
def _with_pieces(at, step, pieces, arrived, o, m_i, l_row):
    """O, maxima and sums of all of an item, whose other pieces lie every ``step`` numbers behind ``at``, in order."""
    M: gl.constexpr = o.shape[0]
    DV: gl.constexpr = o.shape[1]
    o_row: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    rows = gl.arange(0, M, m_i.type.layout)
    while gl.atomic_add(arrived, 0, sem="acquire") < pieces:
        pass
    block_barrier()
    gl.store(arrived, 0)  # as the next call wants it
    for i in range(pieces):
        piece = at + (i + 1) * step
        # not through the L1 cache, which may hold what an earlier call's pieces were
        m_more = gl.load(piece + M * DV + rows, cache_modifier=".cg")
        l_more = gl.load(piece + M * DV + M + rows, cache_modifier=".cg")
        o_more = gl.load(piece + _in_rows(o), cache_modifier=".cg")
        m_new = gl.maximum(m_i, m_more)
        m_use = gl.where(m_new == -float("inf"), 0.0, m_new)
        ours = gl.exp2(m_i - m_use)
        theirs = gl.exp2(m_more - m_use)
        m_i = m_new
        l_row = l_row * ours + l_more * theirs
        o = o * gl.expand_dims(gl.convert_layout(ours, o_row), 1)
        o += o_more * gl.expand_dims(gl.convert_layout(theirs, o_row), 1)
    return o, m_i, l_row


@gluon.jit
def _in_rows(o):
    """Where each element of a block lies, row by row."""
    rows = gl.arange(0, o.shape[0], gl.SliceLayout(1, o.type.layout))
    columns = gl.arange(0, o.shape[1], gl.SliceLayout(0, o.type.layout))
    return gl.expand_dims(rows, 1) * o.shape[1] + gl.expand_dims(columns, 0)


# ---- consumers ---------------------------------------------------------------------------------------------------------


@gluon.jit
def _partial_sums(p, M: gl.constexpr, N: gl.constexpr):
    """Row sums over each thread's own columns, [M, 4]: a row lives in 4 threads, added up only once at the end."""
    return gl.sum(gl.sum(gl.reshape(p, (M, N // 8, 4, 2)), 3), 1)


@gluon.jit
def _row_maxima(s, M: gl.constexpr, N: gl.constexpr):
    """Row maxima by short chains that can run side by side: gl.max is one chain over all columns of a thread."""
    x = gl.max(gl.reshape(s, (M, 4, N // 32, 4, 2)), 2)
    x = gl.max(gl.max(x, 3), 1)
    return gl.convert_layout(gl.max(x, 1), gl.SliceLayout(1, s.type.layout))


@gluon.jit
def _new_maximum(s, m_old, scale, IN_LOG2: gl.constexpr, M: gl.constexpr, N: gl.constexpr, LAZY: gl.constexpr):
    """The maximum so far, in units of log2. scale holds log2(e); IN_LOG2: s has been scaled."""
    if IN_LOG2:
        m_new = gl.maximum(m_old, _row_maxima(s, M, N))
    else:
        m_new = gl.maximum(m_old, _row_maxima(s, M, N) * scale)
    if LAZY:  # a maximum may stay behind by 8 bits: exponentials reach 256, sums are float32
        m_new = gl.where(m_new - m_old > 8.0, m_new, m_old)
    return m_new


@gluon.jit
def _exponentials(
    s, m_old, m_new, l_old, scale, IN_LOG2: gl.constexpr, MASKED: gl.constexpr, M: gl.constexpr, N: gl.constexpr
):
    """Scores -> (exponentials, new sums, factor of the old ones).

    scale holds log2(e), so that exp2 of one fused multiply-add is the whole exponential; IN_LOG2: s has been scaled."""
    m_use = m_new
    if MASKED:  # a row without any key yet: -inf - -inf would be NaN
        m_use = gl.where(m_new == -float("inf"), 0.0, m_new)
    if IN_LOG2:
        p = gl.exp2(s - gl.expand_dims(m_use, 1))
    else:
        p = gl.exp2(s * scale - gl.expand_dims(m_use, 1))
    alpha = gl.exp2(m_old - m_use)
    a = gl.convert_layout(alpha, gl.SliceLayout(1, l_old.type.layout))
    return p, l_old * gl.expand_dims(a, 1) + _partial_sums(p, M, N), alpha


@gluon.jit
def _rounded(p, like):
    """p in the type of like. From one loop to the next LLVM would carry the halves of each register apart, and join them by
    an instruction each in every tile; what an assembler line returned it leaves together."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [p.to(like.dtype)], dtype=like.dtype, is_pure=True, pack=2
    )


@gluon.jit
def _score_product(q, k_s, slot, zero, N: gl.constexpr, D: gl.constexpr, D_QK: gl.constexpr):
    """Q K^T, started. D is D_QK up to a power of two; what the copy engine filled with zeros is not multiplied."""
    k = k_s.index(slot).reshape([N, D])
    if D_QK == D:
        return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    HALF: gl.constexpr = D // 2
    s = warpgroup_mma(
        q.slice(0, HALF, dim=1), k.slice(0, HALF, dim=1).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    return warpgroup_mma(
        q.slice(HALF, D_QK - HALF, dim=1), k.slice(HALF, D_QK - HALF, dim=1).permute((1, 0)), s, is_async=True
    )


@gluon.jit
def _tiles_of(part: gl.constexpr, first, last, whole_from, whole_to, PARTS: gl.constexpr):
    """Which tiles behind the first, counted from the last key backwards, are of this part: with a mask on the right edge, without
    one, with one on the left edge. One part has them all."""
    lo = 1
    hi = last - first
    if PARTS > 1:
        if part == 0:
            hi = last - whole_to
        elif part == 1:
            lo = gl.maximum(last - whole_to, 1)
            if PARTS == 3:
                hi = last - whole_from
        else:
            lo = gl.maximum(last - whole_from, 1)
    return lo, hi


@gluon.jit
def _store_block(o, o_desc, at, q_s):
    """Q is no longer needed: its buffer carries O out."""
    o_s = reinterpret(q_s, o.dtype, [1, o.shape[0], 1, o.shape[1]], o_desc.layout)
    o_s.reshape(o.shape).store(o)
    fence_async_shared()  # ordinary stores before the copy engine reads them
    tma_store(o_desc, at, o_s)


@gluon.jit
def _consumer(
    ME: gl.constexpr, o_desc, o_ptr, lse_ptr, counter, cu_q, cu_k, slopes, sinks, pieces, q_s, k_s, v_s, work_s, q_full,
    q_empty, k_full, k_empty, v_full, v_empty, work_full, work_empty, items, whole, heads, H, row_blocks, section, seq_q, seq_k, rows_all, left, right,
    slopes_batch, scale, cap, D_OUT, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, D_QK: gl.constexpr,
    DV: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, Q_BUFFERS: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, TAIL: gl.constexpr, ONE_MASK: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    SINK: gl.constexpr, VARLEN: gl.constexpr, SHARED: gl.constexpr, PINGPONG: gl.constexpr, LAZY: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = M * CONSUMERS
    MASKED: gl.constexpr = LEFT or RIGHT or TAIL
    IN_LOG2: gl.constexpr = SOFTCAP or ALIBI
    # loops over key tiles: those behind the right edge's diagonal, the whole ones, those on the left edge
    PARTS: gl.constexpr = 1 if ONE_MASK else (3 if LEFT else 2)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)  # P stays in registers: same threads, no data moves
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = k_s.dtype
    zero = gl.zeros([M, N], gl.float32, s_layout)  # with use_acc=False it costs no registers
    t = 0
    kv = 0
    idx = gl.program_id(0)
    if VARLEN:
        idx = published(0, work_s, work_full, work_empty)
    if PINGPONG and ME == CONSUMERS - 1:
        _pass_turn(ME, CONSUMERS)  # warpgroup 0 goes first
    stop = items
    if SHARED:
        gl.static_assert(ONE_MASK and not (LEFT or RIGHT or VARLEN))
        PIECE: gl.constexpr = M * (DV + 2)
        stop = NO_ITEM
        tiles = gl.cdiv(seq_k, N)
    while idx < stop:
        item = idx
        if SHARED:
            item, begin, end = _item_or_segment(idx, whole, items, tiles)
        m, bh = place(item, heads, row_blocks, section)
        b = bh // H
        h = bh - b * H
        batch, row0, _, sq, sk = sequence(b, cu_q, cu_k, seq_q, seq_k, VARLEN)
        first, last = keys_visited(m * BM, sq, sk, left, right, BM, N, LEFT, RIGHT)
        if SHARED:
            first = tiles - end
            last = tiles - begin
        whole_from, whole_to = key_tiles(m * BM, first, last, sq, sk, left, right, BM, N, LEFT, RIGHT)
        row = (m * CONSUMERS + ME) * M  # of the sequence
        if RIGHT and BM > N and not PINGPONG:  # give back the tiles on the diagonal that only the warpgroups below need
            end = gl.maximum(gl.minimum(sk, row + M + sk - sq + right), 0)
            end = gl.minimum(gl.maximum(gl.cdiv(end, N), first + 1), last)
            for _ in range(last - end):
                slot = kv % STAGES
                mbarrier.wait(k_full.index(slot), (kv // STAGES) & 1)
                mbarrier.wait(v_full.index(slot), (kv // STAGES) & 1)
                mbarrier.arrive(k_empty.index(slot), count=1)
                mbarrier.arrive(v_empty.index(slot), count=1)
                kv += 1
            last = end
            whole_to = gl.minimum(whole_to, last)
            whole_from = gl.minimum(whole_from, last)
        mine = (t % Q_BUFFERS) * CONSUMERS + ME
        q = q_s.index(mine).reshape([M, D])
        slope = 0.0
        if ALIBI:
            slope = gl.load(slopes + b * slopes_batch + h).to(gl.float32) * 1.4426950408889634
        m_i = gl.full([M], -float("inf"), gl.float32, s_row)
        l_i = _partial_sums(zero, M, N)
        o = gl.zeros([M, DV], gl.float32, o_layout)

        # First key tile: scores and softmax only.
        mbarrier.wait(q_full.index(mine), (t // Q_BUFFERS) & 1)
        slot = kv % STAGES
        mbarrier.wait(k_full.index(slot), (kv // STAGES) & 1)
        if PINGPONG:
            _wait_turn(ME)
        s = _score_product(q, k_s, slot, zero, N, D, D_QK)
        if PINGPONG:
            _pass_turn(ME, CONSUMERS)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        if Q_BUFFERS == 2:  # noqa: SIM102  (a constant and a value at run time)
            if t > 0:  # the previous item's O has left its buffer by now: give that buffer back for the next Q
                tma.store_wait(0)
                mbarrier.arrive(q_empty.index(CONSUMERS + 2 * ME - mine), count=1)
        at = row + sk - sq + gl.arange(0, M, s_row)
        from_key = at - left
        to_key = gl.minimum(at + right, sk - 1) if RIGHT else gl.full([M], 0, gl.int32, s_row) + (sk - 1)
        at = gl.expand_dims(at, 1)
        keys = gl.expand_dims((last - 1) * N + gl.arange(0, N, gl.SliceLayout(0, s_layout)), 0)
        s = transformed(s, at, keys, scale, cap, slope, SOFTCAP, ALIBI)
        if MASKED:
            s = keep_columns(s, from_key - (last - 1) * N, to_key - (last - 1) * N, -float("inf"), LEFT, True)
        m_new = _new_maximum(s, m_i, scale, IN_LOG2, M, N, LAZY)
        p, l_i, alpha = _exponentials(s, m_i, m_new, l_i, scale, IN_LOG2, MASKED, M, N)
        m_i = m_new
        p = _rounded(p, k_s)
        mbarrier.wait(v_full.index(slot), (kv // STAGES) & 1)

        # Steady state, once for each kind of tile.
        for part in gl.static_range(PARTS):
            lo, hi = _tiles_of(part, first, last, whole_from, whole_to, PARTS)
            for j in range(lo, hi):
                v_slot = kv % STAGES
                kv += 1
                slot = kv % STAGES
                phase = (kv // STAGES) & 1
                v = v_s.index(v_slot).reshape([N, DV])
                mbarrier.wait(k_full.index(slot), phase)
                if PINGPONG:
                    _wait_turn(ME)
                s_tok = _score_product(q, k_s, slot, zero, N, D, D_QK)
                o_tok = warpgroup_mma(gl.convert_layout(p, p_layout), v, o, is_async=True)
                if PINGPONG:
                    _pass_turn(ME, CONSUMERS)
                s = warpgroup_mma_wait(1, deps=(s_tok,))
                mbarrier.arrive(k_empty.index(slot), count=1)
                keys = gl.expand_dims((last - 1 - j) * N + gl.arange(0, N, gl.SliceLayout(0, s_layout)), 0)
                s = transformed(s, at, keys, scale, cap, slope, SOFTCAP, ALIBI)
                if PARTS > 1 and part != 1:
                    col = (last - 1 - j) * N
                    s = keep_columns(s, from_key - col, to_key - col, -float("inf"), LEFT, True)
                m_new = _new_maximum(s, m_i, scale, IN_LOG2, M, N, LAZY)
                # V(j) is needed only by the next product. Its wait is a branch: it keeps the wait for O behind the maxima,
                # which would else come first, and the product under them (docs/perf/attention.md).
                mbarrier.wait(v_full.index(slot), phase)
                o = warpgroup_mma_wait(0, deps=(o_tok,))
                mbarrier.arrive(v_empty.index(v_slot), count=1)
                p, l_i, alpha = _exponentials(s, m_i, m_new, l_i, scale, IN_LOG2, PARTS > 1 and part != 1, M, N)
                m_i = m_new
                p = _rounded(p, k_s)
                if LAZY:
                    o = _rescale(o, gl.convert_layout(alpha, o_row), DV)
                else:
                    o = o * gl.expand_dims(gl.convert_layout(alpha, o_row), 1)

        # Last P V, normalise, store.
        slot = kv % STAGES
        o = warpgroup_mma(gl.convert_layout(p, p_layout), v_s.index(slot).reshape([N, DV]), o, is_async=True)
        l_row = gl.convert_layout(gl.sum(l_i, 1), s_row)
        inv, log = _normaliser(m_i, l_row, sinks, h, SINK)
        rows = row + gl.arange(0, M, s_row)
        if VARLEN:
            lse = lse_ptr + h.to(gl.int64) * rows_all + row0
        else:
            lse = lse_ptr + bh.to(gl.int64) * seq_q
        owned = rows < sq
        if SHARED:
            owned &= idx < whole
        gl.store(lse + rows, log, mask=owned)
        o = warpgroup_mma_wait(0, deps=(o,))
        mbarrier.arrive(v_empty.index(slot), count=1)
        if SHARED:
            begin = 0
            if idx >= whole:
                # anew: carried through the loop above, all this took 8 more instructions a tile of 418 (D = 64, Triton 3.6)
                programs = _anew(gl.num_programs(0))
                item, begin, _, share = _segment(_anew(idx), programs, whole, items, tiles)
                rest = items - whole
                item -= whole
                arrived = counter + 2 + item * CONSUMERS + ME
                mine_at = pieces + (share * CONSUMERS + ME) * PIECE
                if begin > 0:
                    _leave_piece(mine_at, arrived, o, m_i, l_row)
                else:
                    # the first share behind this item
                    behind = gl.cdiv((item + 1) * programs, rest)
                    others = behind - share - 1
                    o, m_i, l_row = _with_pieces(mine_at, CONSUMERS * PIECE, others, arrived, o, m_i, l_row)
                    inv, log = _normaliser(m_i, l_row, sinks, h, SINK)
                    gl.store(lse + rows, log, mask=rows < sq)
        kv += 1
        o = (o * gl.expand_dims(gl.convert_layout(inv, o_row), 1)).to(dtype)
        if VARLEN:  # rows past the end of this sequence belong to the next one
            if row + M > sq:
                o_rows = row + gl.arange(0, M, o_row)
                o_cols = gl.arange(0, DV, gl.SliceLayout(0, o_layout))
                to = o_ptr + (row0 * H + h).to(gl.int64) * D_OUT
                to += gl.expand_dims(o_rows, 1).to(gl.int64) * (H * D_OUT) + gl.expand_dims(o_cols, 0)
                gl.store(to, o, mask=(gl.expand_dims(o_rows, 1) < sq) & (gl.expand_dims(o_cols, 0) < D_OUT))
            else:
                _store_block(o, o_desc, [batch, row0 + row, h, 0], q_s.index(mine))
        elif SHARED:
            if begin == 0:
                _store_block(o, o_desc, [batch, row, h, 0], q_s.index(mine))
        else:
            _store_block(o, o_desc, [batch, row, h, 0], q_s.index(mine))
        if Q_BUFFERS == 1:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(mine), count=1)

        t += 1
        idx = published(t if VARLEN else t - 1, work_s, work_full, work_empty)
    tma.store_wait(0)


_RUNTIME = (
    "items", "whole", "heads", "H", "group", "row_blocks", "section", "seq_q", "seq_k", "rows_all", "left", "right",
    "slopes_batch", "D_OUT", "o_ptr", "lse_ptr", "counter", "cu_q", "cu_k", "slopes", "sinks",
)  # fmt: skip


@gluon.jit(do_not_specialize=_RUNTIME)
def attention_forward(
    q_desc, k_desc, v_desc, o_desc, o_ptr, lse_ptr, counter, cu_q, cu_k, slopes, sinks, pieces, items, whole, heads, H, group,
    row_blocks, section, seq_q, seq_k, rows_all, left, right, slopes_batch, D_OUT, scale: "fp32", cap: "fp32", M: gl.constexpr,
    N: gl.constexpr, D: gl.constexpr, D_QK: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, REGISTERS: gl.constexpr, Q_BUFFERS: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    TAIL: gl.constexpr, ONE_MASK: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, SINK: gl.constexpr,
    VARLEN: gl.constexpr, SHARED: gl.constexpr, PINGPONG: gl.constexpr, LAZY: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    q_s = gl.allocate_shared_memory(q_desc.dtype, [Q_BUFFERS * CONSUMERS, 1, M, 1, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, N, 1, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, N, 1, DV], v_desc.layout)
    work_s = gl.allocate_shared_memory(gl.int64, [2, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [Q_BUFFERS * CONSUMERS, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_BUFFERS * CONSUMERS, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    work_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    work_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    for i in gl.static_range(Q_BUFFERS * CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(2):
        mbarrier.init(work_full.index(i), count=1)
        mbarrier.init(work_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    if DEPENDENT:
        follow()
    # Part 0 is the producer, the others are consumers. The argument tuples must be written out here: through a variable, or
    # behind a +, constexprs would turn into tensors.
    gl.warp_specialize([
        (_producer, (
            q_desc, k_desc, v_desc, counter, cu_q, cu_k, q_s, k_s, v_s, work_s, q_full, q_empty, k_full, k_empty, v_full,
            v_empty, work_full, work_empty, items, whole, heads, H, group, row_blocks, section, seq_q, seq_k, left, right, M, N,
            STAGES, CONSUMERS, Q_BUFFERS, LEFT, RIGHT, VARLEN, SHARED,
        )) if part == 0 else
        (_consumer, (
            part - 1, o_desc, o_ptr, lse_ptr, counter, cu_q, cu_k, slopes, sinks, pieces, q_s, k_s, v_s, work_s, q_full,
            q_empty, k_full, k_empty, v_full, v_empty, work_full, work_empty, items, whole, heads, H, row_blocks, section, seq_q, seq_k, rows_all,
            left, right, slopes_batch, scale, cap, D_OUT, M, N, D, D_QK, DV, STAGES, CONSUMERS, Q_BUFFERS, LEFT, RIGHT,
            TAIL, ONE_MASK, SOFTCAP, ALIBI, SINK, VARLEN, SHARED, PINGPONG, LAZY,
        ))
        for part in (0, 1, 2, 3)[:1 + CONSUMERS]
    ], [4] * CONSUMERS, [REGISTERS] * CONSUMERS)  # fmt: skip


# ---- short sequences ---------------------------------------------------------------------------------------------------


@gluon.jit
def _load_again(desc, b, row, head, full, slot):
    """The next tile into a slot that this program's warps have read."""
    block_barrier()
    mbarrier.expect(full, desc.block_type.nbytes)
    tma_load(desc, [b, row, head, 0], full, slot)


_SHORT_RUNTIME = "H", "group", "row_blocks", "falling", "seq_q", "seq_k", "left", "right", "lse_ptr"


@gluon.jit(do_not_specialize=_SHORT_RUNTIME)
def attention_forward_short(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, H, group, row_blocks, falling, seq_q, seq_k, left, right, scale: "fp32",
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BATCH_LAST: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, TAIL: gl.constexpr, ONE_MASK: gl.constexpr, GROUPED: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """A program a block of rows, one warpgroup that loads for itself: no roles to hand out, no counter, no barrier for free slots.

    The grid is (heads, batch, blocks of rows), so that no division stands before the first load; with BATCH_LAST one sequence is
    done before the next begins. Programs of the first ``falling`` blocks go from the longest down; the others, which join them on
    their multiprocessors, from the shortest up."""
    MASKED: gl.constexpr = LEFT or RIGHT or TAIL
    PARTS: gl.constexpr = 1 if ONE_MASK else (3 if LEFT else 2)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [1, M, 1, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, N, 1, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, N, 1, D], v_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    h = gl.program_id(0)
    b = gl.program_id(2 if BATCH_LAST else 1)
    turn = gl.program_id(1 if BATCH_LAST else 2)
    m = row_blocks - 1 - turn
    if turn >= falling:
        m = turn - falling
    key_head = h // group if GROUPED else h
    row = m * M
    first, last = keys_visited(row, seq_q, seq_k, left, right, M, N, LEFT, RIGHT)
    tiles = last - first
    if DEPENDENT:
        follow()
    # Each slot's first tile. Q comes with the first of K.
    mbarrier.expect(k_full.index(0), q_desc.block_type.nbytes + k_desc.block_type.nbytes)
    mbarrier.expect(v_full.index(0), v_desc.block_type.nbytes)
    for i in gl.static_range(1, STAGES):
        mbarrier.expect(k_full.index(i), k_desc.block_type.nbytes)
        mbarrier.expect(v_full.index(i), v_desc.block_type.nbytes)
    tma_load(k_desc, [b, (last - 1) * N, key_head, 0], k_full.index(0), k_s.index(0))
    tma_load(q_desc, [b, row, h, 0], k_full.index(0), q_s)
    tma_load(v_desc, [b, (last - 1) * N, key_head, 0], v_full.index(0), v_s.index(0))
    for i in gl.static_range(1, STAGES):
        if i < tiles:
            tma_load(k_desc, [b, (last - 1 - i) * N, key_head, 0], k_full.index(i), k_s.index(i))
            tma_load(v_desc, [b, (last - 1 - i) * N, key_head, 0], v_full.index(i), v_s.index(i))
    whole_from, whole_to = key_tiles(row, first, last, seq_q, seq_k, left, right, M, N, LEFT, RIGHT)
    q = q_s.reshape([M, D])
    zero = gl.zeros([M, N], gl.float32, s_layout)
    m_i = gl.full([M], -float("inf"), gl.float32, s_row)
    l_i = _partial_sums(zero, M, N)
    o = gl.zeros([M, D], gl.float32, o_layout)
    at = row + seq_k - seq_q + gl.arange(0, M, s_row)
    from_key = at - left
    to_key = gl.minimum(at + right, seq_k - 1) if RIGHT else gl.full([M], 0, gl.int32, s_row) + (seq_k - 1)

    # First key tile: scores and softmax only.
    mbarrier.wait(k_full.index(0), 0)
    s = _score_product(q, k_s, 0, zero, N, D, D)
    s = warpgroup_mma_wait(0, deps=(s,))
    if tiles > STAGES:
        _load_again(k_desc, b, (last - 1 - STAGES) * N, key_head, k_full.index(0), k_s.index(0))
    if MASKED:
        s = keep_columns(s, from_key - (last - 1) * N, to_key - (last - 1) * N, -float("inf"), LEFT, True)
    m_new = _new_maximum(s, m_i, scale, False, M, N, False)
    p, l_i, alpha = _exponentials(s, m_i, m_new, l_i, scale, False, MASKED, M, N)
    m_i = m_new
    p = _rounded(p, k_s)
    mbarrier.wait(v_full.index(0), 0)

    # As in _consumer; a slot is free for the next tile once all warps have come to a barrier.
    for part in gl.static_range(PARTS):
        lo, hi = _tiles_of(part, first, last, whole_from, whole_to, PARTS)
        for j in range(lo, hi):
            v_slot = (j - 1) % STAGES
            slot = j % STAGES
            phase = (j // STAGES) & 1
            mbarrier.wait(k_full.index(slot), phase)
            s_tok = _score_product(q, k_s, slot, zero, N, D, D)
            v = v_s.index(v_slot).reshape([N, D])
            o_tok = warpgroup_mma(gl.convert_layout(p, p_layout), v, o, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s_tok,))
            if j + STAGES < tiles:
                _load_again(k_desc, b, (last - 1 - j - STAGES) * N, key_head, k_full.index(slot), k_s.index(slot))
            if PARTS > 1 and part != 1:
                col = (last - 1 - j) * N
                s = keep_columns(s, from_key - col, to_key - col, -float("inf"), LEFT, True)
            m_new = _new_maximum(s, m_i, scale, False, M, N, False)
            mbarrier.wait(v_full.index(slot), phase)
            o = warpgroup_mma_wait(0, deps=(o_tok,))
            if j - 1 + STAGES < tiles:
                _load_again(v_desc, b, (last - j - STAGES) * N, key_head, v_full.index(v_slot), v_s.index(v_slot))
            p, l_i, alpha = _exponentials(s, m_i, m_new, l_i, scale, False, PARTS > 1 and part != 1, M, N)
            m_i = m_new
            p = _rounded(p, k_s)
            o = o * gl.expand_dims(gl.convert_layout(alpha, o_row), 1)

    v = v_s.index((tiles - 1) % STAGES).reshape([N, D])
    o = warpgroup_mma(gl.convert_layout(p, p_layout), v, o, is_async=True)
    l_row = gl.convert_layout(gl.sum(l_i, 1), s_row)
    inv = gl.where(l_row == 0.0, 0.0, 1.0 / l_row)
    rows = row + gl.arange(0, M, s_row)
    lse = lse_ptr + (b * H + h).to(gl.int64) * seq_q
    gl.store(lse + rows, m_i * LN2 + gl.log2(l_row) * LN2, mask=rows < seq_q)
    o = warpgroup_mma_wait(0, deps=(o,))
    o = (o * gl.expand_dims(gl.convert_layout(inv, o_row), 1)).to(q_desc.dtype)
    o_s = reinterpret(q_s, q_desc.dtype, [1, M, 1, D], o_desc.layout)
    o_s.reshape([M, D]).store(o)
    fence_async_shared()
    tma_store(o_desc, [b, row, h, 0], o_s)
    tma.store_wait(0)
