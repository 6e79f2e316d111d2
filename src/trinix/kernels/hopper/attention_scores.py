"""What both attention kernels ask about an item of work and about scores: where it lies, which keys it sees, what they become.
Hardware barriers between two warpgroups, and how the producer tells the consumers an item."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from trinix.kernels.hopper.early import let_next_kernel_start, wait_for_kernel_before


@gluon.jit
def named_wait(BARRIER: gl.constexpr):
    """Come to a hardware barrier of two warpgroups and wait for the other."""
    gl.inline_asm_elementwise(f"bar.sync {BARRIER}, 256; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def named_arrive(BARRIER: gl.constexpr):
    """Come to a hardware barrier of two warpgroups and go on."""
    gl.inline_asm_elementwise(f"bar.arrive {BARRIER}, 256; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def follow():
    """Wait for the kernel before this one, and let the next one in, which waits for the end of this one.

    What was written before is then visible to the whole program: roles that are handed out behind it need not wait."""
    wait_for_kernel_before()
    let_next_kernel_start()


@gluon.jit
def publish(idx, t, work_s, work_full, work_empty):
    """The producer's t-th word to the consumers: an item's number.

    Every thread writes a word of its own, and the first thread's is read, which is also the one that arrives: no other thread's
    write has to be seen, and compute-sanitizer's racecheck follows it. (Words of 64 bits: those of 32 go by ``stmatrix``.)"""
    each: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    w = t % 2
    mbarrier.wait(work_empty.index(w), ((t // 2) & 1) ^ 1)
    work_s.index(w).store(gl.full([128], idx, gl.int32, each).to(gl.int64))
    mbarrier.arrive(work_full.index(w), count=1)


@gluon.jit
def published(t, work_s, work_full, work_empty):
    """The producer's t-th word."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    w = t % 2
    mbarrier.wait(work_full.index(w), (t // 2) & 1)
    idx = gl.max(work_s.index(w).slice(0, 1).load(one), 0).to(gl.int32)
    mbarrier.arrive(work_empty.index(w), count=1)
    return idx


@gluon.jit
def place(idx, heads, row_blocks, section):
    """Item idx -> (row block, batch * H + head).

    The last row blocks, which see most keys under a causal mask, go first, within sections of heads whose K and V fit the
    L2 cache together."""
    sec = idx // (section * row_blocks)
    r = idx - sec * section * row_blocks
    width = gl.minimum(section, heads - sec * section)
    return row_blocks - 1 - r // width, sec * section + r % width


@gluon.jit
def sequence(b, cu_q, cu_k, seq_q, seq_k, VARLEN: gl.constexpr):
    """Sequence b -> (index of the batch, first query, first key, queries, keys)."""
    batch, row0, key0, sq, sk = b, 0, 0, seq_q, seq_k
    if VARLEN:
        batch = 0
        row0 = gl.load(cu_q + b)
        key0 = gl.load(cu_k + b)
        sq = gl.load(cu_q + b + 1) - row0
        sk = gl.load(cu_k + b + 1) - key0
    return batch, row0, key0, sq, sk


@gluon.jit
def keys_visited(row, sq, sk, left, right, BM: gl.constexpr, N: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Rows row to row + BM -> (first key tile, end), at least one tile."""
    at = row + sk - sq
    first = 0
    if LEFT:
        first = gl.maximum(at - left, 0) // N
    end = sk
    if RIGHT:
        end = gl.maximum(gl.minimum(sk, at + BM + right), 0)
    return first, gl.maximum(gl.cdiv(end, N), first + 1)


@gluon.jit
def key_tiles(
    row, first, last, sq, sk, left, right, BM: gl.constexpr, N: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr
):
    """Of the tiles first to last, (the first, the end) of those that every row of the block sees whole."""
    at = row + sk - sq
    whole_to = sk // N
    if RIGHT:
        whole_to = gl.maximum(gl.minimum(sk, at + right + 1), 0) // N
    whole_to = gl.minimum(gl.maximum(whole_to, first), last)
    whole_from = first
    if LEFT:
        whole_from = gl.minimum(gl.maximum(gl.cdiv(gl.maximum(at + BM - 1 - left, 0), N), first), whole_to)
    return whole_from, whole_to


@gluon.jit
def keep_columns(x, first, last, FILL: gl.constexpr, FROM: gl.constexpr, TO: gl.constexpr):
    """x [rows, columns] of a product, with FILL before column ``first`` (with FROM) and behind ``last`` (with TO) of each row.

    A thread's columns are 8 i + 2 lane + j: with the lane's share taken from the bounds, what is left to compare them with
    are constants."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    parts = gl.reshape(x, (ROWS, COLUMNS // 8, 4, 2))
    by_lane: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, parts.type.layout))
    by_register: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, parts.type.layout))
    lane = gl.expand_dims(2 * gl.arange(0, 4, gl.SliceLayout(0, by_lane)), 0)
    eights = gl.expand_dims(8 * gl.arange(0, COLUMNS // 8, gl.SliceLayout(1, by_register)), 1)
    column = eights + gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(0, by_register)), 0)
    column = gl.expand_dims(gl.expand_dims(column, 1), 0)
    if FROM:
        bound = gl.expand_dims(gl.convert_layout(first, gl.SliceLayout(1, by_lane)), 1) - lane
        parts = gl.where(column >= gl.expand_dims(gl.expand_dims(bound, 1), 3), parts, FILL)
    if TO:
        bound = gl.expand_dims(gl.convert_layout(last, gl.SliceLayout(1, by_lane)), 1) - lane
        parts = gl.where(column <= gl.expand_dims(gl.expand_dims(bound, 1), 3), parts, FILL)
    return gl.convert_layout(gl.reshape(parts, (ROWS, COLUMNS)), x.type.layout)


@gluon.jit
def tanh_over_2(x):
    """tanh(x / 2 ln 2), within 6e-7 of itself: a polynomial up to x = 2, where 1 - 2 / (2^x + 1) would cancel; tanh.approx is
    not good enough."""
    y = x * x
    near = y * -4.4591267e-08 + 1.4491422e-06
    near = near * y - 3.2161279e-05
    near = near * y + 6.6645112e-04
    near = near * y - 1.38759511e-02
    near = near * y + 3.465735912e-01
    inverse = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [gl.exp2(x) + 1.0], dtype=gl.float32, is_pure=True, pack=1
    )
    return gl.where(gl.abs(x) < 2.0, near * x, 1.0 - 2.0 * inverse)


@gluon.jit
def transformed(s, at, keys, scale, cap, slope, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr):
    """q k -> scores times log2(e), where softcap or ALiBi change them; as they are (unscaled) where nothing does.

    scale is the call's times log2(e), or for softcap 2 log2(e) / softcap times that; cap is softcap log2(e)."""
    if SOFTCAP:
        s = tanh_over_2(s * scale) * cap
    elif ALIBI:
        s = s * scale
    if ALIBI:
        s = s - slope * gl.abs(at.to(gl.float32) - keys.to(gl.float32))
    return s
