"""Attention of few queries over a long cache: split-KV, grouped heads packed, appending in the same launch.

Floor: one read of the cached keys and values; everything else is small beside them.

A program takes one key head of one sequence and a share of its cache: the query heads of the group times the queries are the
rows of its tile, so that every key is read once. The host knows capacities only, so that a CUDA graph may be replayed with
other lengths: it chooses how many shares there are, and a program works out its own from the lengths. New tokens are one more
step of a sequence's last share: it reads them where they are, and stores them into the cache behind all that anybody reads
there, so no program waits for another. Shares write float32 parts with their maxima and sums, and a second kernel adds them up
(not with the sums' logarithms: one near 8 is rounded by 5e-7, and so is its part's weight); where every sequence is one share there
is no second kernel.

A key's channels are two parts where their number is no power of two: 576 is 512 + 64. Values that are the keys' first
channels, in the same memory, are not read again (latent attention).
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trinix.kernels._layout import dense
from trinix.kernels.triton._compile import POINTERS, compile_case
from trinix.kernels.triton._exact import exact_exp, exact_log, exact_tanh
from trinix.kernels.triton._launch import INTERPRETED, Launcher, Repeated

LANES = 64 if torch.version.hip else 32  # threads of a warp
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _load_rows(base, at, live, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Channels FIRST .. FIRST + WIDTH of the rows that begin at ``at``; 0 where a row is not live or a channel is none."""
    d = FIRST + tl.arange(0, WIDTH)
    mask = live[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (d < D)[None, :]
    return tl.load(base + at[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(base, at, live, values, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    d = FIRST + tl.arange(0, WIDTH)
    mask = live[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (d < D)[None, :]
    tl.store(base + at[:, None] + d[None, :], values, mask=mask)


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    return exact_exp(x) if EXACT else tl.exp(x)


@triton.jit
def _normalised(acc, total, EXACT: tl.constexpr):
    """acc / total, and acc where total is 0. EXACT: correctly rounded; ``/`` may be 2 units in the last place off."""
    total = tl.where(total == 0.0, 1.0, total)
    if EXACT:
        y = tl.math.div_rn(acc, total)
    else:
        y = acc / total
    return y


@triton.jit
def _short_chains(q, k):
    """q k^T by a chain of additions for every 64 channels."""
    PARTS: tl.constexpr = q.shape[1] // 64
    q = tl.permute(tl.reshape(q, (q.shape[0], PARTS, 64)), (1, 0, 2))
    k = tl.permute(tl.reshape(k, (k.shape[0], PARTS, 64)), (1, 2, 0))
    return tl.sum(tl.dot(q, k, input_precision="ieee"), 0)


@triton.jit
def _scores(q0, q1, k0, k1, scale, softcap, TAIL: tl.constexpr, SOFTCAP: tl.constexpr, DOUBLE: tl.constexpr):
    HEAD: tl.constexpr = q0.shape[1]
    if DOUBLE:
        s = tl.dot(q0.to(tl.float64), tl.trans(k0).to(tl.float64), out_dtype=tl.float64)
        if TAIL:
            s = tl.dot(q1.to(tl.float64), tl.trans(k1).to(tl.float64), s, out_dtype=tl.float64)
        s = s.to(tl.float32)
    elif q0.dtype == tl.float32 and HEAD >= 128 and HEAD <= 256:
        # without tensor cores one chain runs over all channels, and at 192 its error is twice that of shorter ones
        s = _short_chains(q0, k0)
        if TAIL > 64:
            s += _short_chains(q1, k1)
        elif TAIL:
            s += tl.dot(q1, tl.trans(k1), input_precision="ieee")
    else:
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if TAIL:
            s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
    s *= scale
    if SOFTCAP:
        # lse is float32 whatever the inputs are
        s = softcap * exact_tanh(tl.math.div_rn(s, softcap))
    return s


@triton.jit
def _short_sums(p, v):
    """p v by a chain of additions for every 32 keys, of which none begins with what other tiles gave."""
    PARTS: tl.constexpr = v.shape[0] // 32 if v.shape[0] > 32 else 1
    EACH: tl.constexpr = v.shape[0] // PARTS
    p = tl.permute(tl.reshape(p, (p.shape[0], PARTS, EACH)), (1, 0, 2))
    return tl.sum(tl.dot(p, tl.reshape(v, (PARTS, EACH, v.shape[1])), input_precision="ieee"), 0)


@triton.jit
def _step(
    s, v, acc, m, total, j, live, position, slope, window_left, window_right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ALIBI: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys joins the running maximum m, the sum total and the sum of values acc."""
    allowed = live[None, :]
    if LEFT or RIGHT or ALIBI:
        distance = j[None, :] - position[:, None]
        if LEFT:
            allowed = allowed & (distance >= -window_left)
        if RIGHT:
            allowed = allowed & (distance <= window_right)
        if ALIBI:
            s -= slope[:, None] * tl.abs(distance).to(tl.float32)
    s = tl.where(allowed, s, float("-inf"))
    new_m = tl.maximum(m, tl.max(s, 1))
    base = tl.where(new_m == float("-inf"), 0.0, new_m)
    EXACT: tl.constexpr = v.dtype == tl.float32
    p = _exp(s - base[:, None], EXACT)
    decay = _exp(m - base, EXACT)
    total = total * decay + tl.sum(p, 1)
    if DOUBLE:
        acc = acc * decay[:, None] + tl.dot(p.to(tl.float64), v.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    elif EXACT and v.shape[1] <= 256:
        # one chain over a thousand keys was up to 2.3 times PyTorch's error; the sums of 512 columns would spill
        acc = acc * decay[:, None] + _short_sums(p, v)
    else:
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_m, total


@triton.jit
def _span(
    length, tile, seq, new, window_left, window_right,
    GROUP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """(first, last, tiles of keys between them, one at least) of what any row of this tile of rows may see in the cache."""
    lowest = length + new - seq + tile * ROWS // GROUP
    highest = length + new - seq + tl.minimum((tile * ROWS + ROWS - 1) // GROUP, seq - 1)
    first = length * 0
    last = length
    if LEFT:
        first = tl.maximum(lowest - window_left, 0)
    if RIGHT:
        last = tl.minimum(last, highest + window_right + 1)
    first = first // KEYS * KEYS
    return first, last, tl.maximum(tl.cdiv(tl.maximum(last - first, 0), KEYS), 1)


@triton.jit(do_not_specialize=[
    "seq", "key_heads", "capacity", "page_size", "new", "splits", "entries", "tiles", "window_left",
    "window_right", "table_row", "slopes_row", "qb", "qs", "qh", "kb", "ks", "kh", "vb", "vs", "vh", "kb_new", "ks_new",
    "kh_new", "vb_new", "vs_new", "vh_new",
])  # fmt: skip
def _attend(
    q, k_cache, v_cache, lengths, table, k_new, v_new, slopes, sink, out, lse,
    seq: "i32", key_heads: "i32", capacity: "i32", page_size: "i32", new: "i32", splits: "i32",
    entries: "i32", tiles: "i32",
    window_left: "i32", window_right: "i32", table_row: "i64", slopes_row: "i64",
    qb: "i64", qs: "i64", qh: "i64", kb: "i64", ks: "i64", kh: "i64", vb: "i64", vs: "i64", vh: "i64",
    kb_new: "i64", ks_new: "i64", kh_new: "i64", vb_new: "i64", vs_new: "i64", vh_new: "i64",
    scale: "fp32", softcap: "fp32",
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, PAGES: tl.constexpr,
    NEW: tl.constexpr, SHARED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, SINK: tl.constexpr, PARTS: tl.constexpr, DEPENDENT: tl.constexpr,
    DOUBLE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # the key heads of one token lie side by side in memory, so their programs run side by side
    pid = tl.program_id(0)
    kv = pid % key_heads
    tile = pid // key_heads % tiles
    entry = pid // key_heads // tiles  # one share of one sequence
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()  # the adding kernel may come in when all programs of this one have
    b = (entry // splits).to(tl.int64)
    split = entry % splits
    length = tl.load(lengths + b)
    outside = (length < 0) | (length > capacity - new)  # length + new may pass 2^31
    length = tl.where(outside, 0, length)  # what its pages are nobody knows
    # 0, which the compiler does not know: it would keep addresses of every row in registers, and spill in float32
    zero = (capacity == -2147483648).to(tl.int32)
    row = tile * ROWS + tl.arange(0, ROWS) + zero
    i = row // GROUP
    h = kv * GROUP + row % GROUP
    inside = row < seq * GROUP
    position = length + new - seq + i
    first, last, blocks = _span(length, tile, seq, new, window_left, window_right, GROUP, LEFT, RIGHT, ROWS, KEYS)
    start = (tl.cast(split, tl.int64) * blocks // splits).to(tl.int32)
    stop = (tl.cast(split + 1, tl.int64) * blocks // splits).to(tl.int32)
    last = tl.minimum(last, first + stop * KEYS)
    first += start * KEYS

    q_at = (i * qs + h * qh) * UNIT
    q += b * (qb * UNIT)
    q0 = _load_rows(q, q_at, inside, D, 0, HEAD)
    if TAIL:
        q1 = _load_rows(q, q_at, inside, D, HEAD, TAIL)
    else:
        q1 = q0
    slope = tl.zeros([ROWS], tl.float32)
    if ALIBI:
        slope = tl.load(slopes + b * slopes_row + h, mask=inside, other=0.0).to(tl.float32)

    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    k_head = k_cache + kv * (kh * UNIT)
    v_head = v_cache + kv * (vh * UNIT)
    offset = tl.arange(0, KEYS) + zero
    k_step = offset * (ks * UNIT)
    v_step = offset * (vs * UNIT)
    for start in tl.range(first, last, KEYS):
        j = start + offset
        live = j < last
        k_tile, v_tile, k_at, v_at = k_head, v_head, k_step, v_step
        if PAGES == 0:
            k_tile += (b * kb + start * ks) * UNIT
            v_tile += (b * vb + start * vs) * UNIT
        elif PAGES == 1:  # a tile lies in one page
            page = tl.load(table + b * table_row + start // page_size).to(tl.int64)
            k_tile += (page * kb + start % page_size * ks) * UNIT
            v_tile += (page * vb + start % page_size * vs) * UNIT
        else:
            page = tl.load(table + b * table_row + j // page_size, mask=live, other=0).to(tl.int64)
            k_at = (page * kb + j % page_size * ks) * UNIT
            v_at = (page * vb + j % page_size * vs) * UNIT
        k0 = _load_rows(k_tile, k_at, live, D, 0, HEAD)
        if TAIL:
            k1 = _load_rows(k_tile, k_at, live, D, HEAD, TAIL)
        else:
            k1 = k0
        s = _scores(q0, q1, k0, k1, scale, softcap, TAIL, SOFTCAP, DOUBLE)
        if SHARED:
            v = k0
        else:
            v = _load_rows(v_tile, v_at, live, DV, 0, WIDTH)
        acc, m, total = _step(
            s, v, acc, m, total, j, live, position, slope, window_left, window_right, LEFT, RIGHT, ALIBI, DOUBLE
        )

    if NEW:
        # of the last share only, by an empty loop in the others
        k_new += b * (kb_new * UNIT) + kv * (kh_new * UNIT)
        v_new += b * (vb_new * UNIT) + kv * (vh_new * UNIT)
        for start in tl.range(0, tl.where(stop == blocks, new, 0), KEYS, num_stages=1):
            n = start + offset
            live = n < new
            j = length + n
            k0 = _load_rows(k_new, n * (ks_new * UNIT), live, D, 0, HEAD)
            if TAIL:
                k1 = _load_rows(k_new, n * (ks_new * UNIT), live, D, HEAD, TAIL)
            else:
                k1 = k0
            if SHARED:
                v = k0
            else:
                v = _load_rows(v_new, n * (vs_new * UNIT), live, DV, 0, WIDTH)
            keep = live & (tile == 0) & (outside == 0)
            if PAGES == 0:
                k_at = (b * kb + j * ks) * UNIT
                v_at = (b * vb + j * vs) * UNIT
            else:
                page = tl.load(table + b * table_row + j // page_size, mask=keep, other=0).to(tl.int64)
                k_at = (page * kb + j % page_size * ks) * UNIT
                v_at = (page * vb + j % page_size * vs) * UNIT
            _store_rows(k_head, k_at, keep, k0, D, 0, HEAD)
            if TAIL:
                _store_rows(k_head, k_at, keep, k1, D, HEAD, TAIL)
            if not SHARED:
                _store_rows(v_head, v_at, keep, v, DV, 0, WIDTH)
            s = _scores(q0, q1, k0, k1, scale, softcap, TAIL, SOFTCAP, DOUBLE)
            acc, m, total = _step(
                s, v, acc, m, total, j, live, position, slope, window_left, window_right, LEFT, RIGHT, ALIBI, DOUBLE
            )

    if SINK and not PARTS:
        logit = tl.load(sink + h, mask=inside, other=0.0).to(tl.float32)
        new_m = tl.maximum(m, logit)
        base = tl.where(new_m == float("-inf"), 0.0, new_m)
        EXACT: tl.constexpr = q0.dtype == tl.float32
        decay = _exp(m - base, EXACT)
        total = total * decay + _exp(logit - base, EXACT)
        acc = acc * decay[:, None]
        m = new_m
    heads = key_heads * GROUP
    if PARTS:
        at = (entry * heads + h).to(tl.int64) * seq + i
        rows = tl.cast(entries, tl.int64) * heads * seq
        tl.store(out + rows * DV + at, tl.where(outside, float("nan"), m), mask=inside)  # behind all parts
        tl.store(out + rows * (DV + 1) + at, total, mask=inside)
        _store_rows(out, at * DV, inside & (total != 0.0), acc, DV, 0, WIDTH)
    else:
        acc = _normalised(acc, total[:, None], q0.dtype == tl.float32)
        acc = tl.where(outside, float("nan"), acc)
        log_sum = tl.where(total == 0.0, float("-inf"), m + exact_log(tl.where(total == 0.0, 1.0, total)))
        log_sum = tl.where(outside, float("nan"), log_sum)
        tl.store(lse + (b * heads + h) * seq + i, log_sum, mask=inside)
        _store_rows(out, ((b * seq + i) * heads + h) * DV, inside, acc.to(out.dtype.element_ty), DV, 0, WIDTH)


@triton.jit(do_not_specialize=["entries", "splits", "heads", "seq"])
def _combine(
    parts, sink, out, lse, entries: "i32", splits: "i32", heads: "i32", seq: "i32",
    DV: tl.constexpr, SINK: tl.constexpr, DEPENDENT: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out of one query and head from its parts: each a maximum, a sum and a sum of values, both less that maximum."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()  # a product of one row may come in now, and fetch its weights
    r = tl.program_id(0)
    i = r % seq
    h = r // seq % heads
    b = r // seq // heads
    tops = parts + tl.cast(entries, tl.int64) * heads * seq * DV
    sums = tops + tl.cast(entries, tl.int64) * heads * seq
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    m = float("-inf")
    total = 0.0
    if SINK:
        m = tl.load(sink + h).to(tl.float32)
        total = 1.0
    acc = tl.zeros([WIDTH], tl.float32)
    for start in tl.range(0, splits, CHUNK):
        n = start + tl.arange(0, CHUNK)
        at = ((b * splits + n).to(tl.int64) * heads + h) * seq + i
        top = tl.load(tops + at, mask=n < splits, other=float("-inf"))
        one_sum = tl.load(sums + at, mask=n < splits, other=0.0)
        part = _load_rows(parts, at * DV, n < splits, DV, 0, WIDTH)
        new_m = tl.maximum(m, tl.max(top, 0))
        base = tl.where(new_m == float("-inf"), 0.0, new_m)
        weight = _exp(top - base, True)
        decay = _exp(m - base, True)
        total = total * decay + tl.sum(weight * one_sum, 0)
        # an empty share has written no part
        acc = acc * decay + tl.sum(tl.where((weight == 0.0)[:, None], 0.0, part * weight[:, None]), 0)
        m = new_m
    some = tl.where(total == 0.0, 1.0, total)
    y = _normalised(acc, total, out.dtype.element_ty == tl.float32)
    tl.store(lse + r, tl.where(total == 0.0, float("-inf"), m + exact_log(some)))
    at = ((b.to(tl.int64) * seq + i) * heads + h) * DV
    d = tl.arange(0, WIDTH)
    tl.store(out + at + d, y.to(out.dtype.element_ty), mask=d < DV)


_ATTEND = Launcher(_attend, tensors=11)
_COMBINE = Launcher(_combine, tensors=4)


# ---- choices -----------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    rows: int  # of queries times the heads of a group, in a program
    keys: int  # of a tile
    num_warps: int
    num_stages: int


# Many short sequences: programs that stand side by side on a multiprocessor begin and end at different times (AD-64-1024 107.8 ->
# 106.6 us, PyTorch 105.2; 32 x 1024 63.0 -> 62.2; nothing at 64 x 2048)
SHORT = Config(16, 32, 4, 4)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def channels(d: int) -> tuple[int, int]:
    """(HEAD, TAIL): the two tiles of a key's channels, TAIL 0 where one is enough. A dot takes 16 and more."""
    head = max(16, 1 << (d.bit_length() - 1))
    return head, max(16, _power_of_two(d - head)) if d > head else 0


def _pages(table_shape: tuple | None, page_size: int, keys: int) -> int:
    """0: no pages, 1: a tile of ``keys`` keys lies in one page, 2: it does not."""
    return 0 if not table_shape else 1 if page_size % keys == 0 else 2


def choose_config(
    rows: int, d: int, dv: int, shared: bool, itemsize: int, pages: int, new: bool, lanes: int = LANES,
    load: float = 0.0, roomy: bool = True, longest: float = math.inf,
) -> Config:  # fmt: skip
    """``rows``: queries times the heads of a group; ``pages``: 0: none, 1: a tile of 64 keys lies in one, 2: it may not; ``new``:
    keys to append; ``load``: programs of one share to a multiprocessor, 0 if not ``roomy``: a program may not have 160 KiB of
    shared memory, only 99; ``longest``: how many keys a sequence may have."""
    tile = min(64, max(16, _power_of_two(rows)))
    head, tail = channels(d)
    wide = _power_of_two(dv)
    width = head + tail + (0 if shared else wide)  # channels of a key and its value
    if itemsize == 4:  # no tensor cores at full precision: small tiles, so that registers suffice
        keys, warps = (32, 4) if width <= 128 and pages < 2 and not new else (16, 8)
        config = Config(16, keys, 4 if lanes == 64 else warps, 2)
    elif max(head, wide) > 256:
        config = Config(32, 64, 8, 2) if tile > 16 and roomy else Config(16, 32, 4, 3 if roomy or width <= 576 else 2)
        if lanes == 64:
            config = Config(config.rows, 512 // config.rows, 8, 1)
    elif (
        not pages
        and tile == 16
        and lanes == 32
        and load > {128: 0.9, 256: math.inf if new else 1, 512: 0}.get(width, math.inf)
    ):
        # programs enough without shares: larger tiles, so that few programs on each multiprocessor, or one, read at the card's rate.
        # Appending to 128 channels they spill with four warps, and are slower with eight
        config = Config(16, 64, 8, 3) if width == 512 else Config(16, 128, 4, 3)
        if width == 256 and longest <= 1024 and load > 1.5:
            config = SHORT
    elif pages == 2 and not new and width <= 256:
        config = Config(tile, 128, 8 if tile == 64 else 4, 3)
    else:
        # 64 of 256 channels, or of 320 that are values too, take 104 KiB
        rows = min(tile, 32) if (width > 448 or (shared and width > 256)) and not roomy else tile
        config = Config(rows, 64, 8 if tile == 64 and width > 256 else 4, 3 if width <= 256 else 2)
    if pages and itemsize < 4 and config.keys < 128:  # looking the pages up takes stages of its own
        # two tiles on their way: 16 sequences of 16384 keys in pages of 64 read at a copy's rate, with two shares
        more = 2 if pages == 1 and tile == 16 and width <= 256 and not new else 1
        config = config._replace(num_stages=config.num_stages + more)
    return config._replace(num_stages=1) if lanes == 64 else config


def choose_shares(
    batch: int,
    heads: int,
    keys: int,
    config: Config,
    bytes_of_key: int,
    sm_count: int,
    pages: int = 0,
    new: bool = False,
) -> int:
    """Into how many shares every sequence is cut.

    ``heads``: programs of one share of a sequence, which are key heads times tiles of rows; ``keys``: the most that one may have.
    A card reads as fast from one program on each multiprocessor as from several, where a program's tiles are large. The fewest
    shares that leave few multiprocessors idle in the last wave, as docs/perf/attention_decode.md has it. With ``pages`` half of a
    pipeline's stages wait for the table: one program on each multiprocessor reached 73% of a copy's rate. Where a tile lies in
    several pages (2), or keys are appended (``new``), there are registers for two programs. The second kernel takes longer the
    more shares there are, so that few tiles make 8 at most, n tiles the root of 5 n (AD-1-1024 0.0114 ms with 8, 0.0125 with 15).
    """
    programs = heads * batch
    ahead = max(1, (config.num_stages - 1) // (2 if pages else 1))  # tiles on their way into a program
    loading = ahead * config.keys * bytes_of_key
    wave = sm_count * (1 if loading >= 48 * 1024 and not pages else 2)
    fit = 200 * 1024 // loading
    resident = max(wave, (min(fit, 2) if pages == 2 or new else fit) * sm_count)
    if pages and ahead == 1:
        wave = resident
    tiles = -(-keys // config.keys)
    most = max(1, min(tiles, 4 * resident // programs))

    def busy(shares):
        full = wave if shares * programs <= resident else resident
        return shares * programs / (-(-shares * programs // full) * full)

    # large tiles or short sequences, several waves: the programs that are left for the last one read faster, and one share has no
    # second kernel
    alone = programs > wave and (config.keys > 64 or config == SHORT) and not pages
    enough = (0.6 if alone else 0.92) * max(map(busy, range(1, most + 1)))
    return min(next(n for n in range(1, most + 1) if busy(n) >= enough), max(8, math.isqrt(5 * tiles)))


# ---- launches ----------------------------------------------------------------------------------------------------------


class Flags(NamedTuple):
    """What changes the binary, besides shapes and configuration."""

    pages: int  # as ``_pages``
    new: bool
    shared: bool
    left: bool
    right: bool
    alibi: bool
    softcap: bool
    sink: bool
    parts: bool
    dependent: bool
    double: bool = False  # float32 multiplied as float64, where tensor cores take that (sm_80 and sm_90)


@functools.cache
def attend_launch(d: int, dv: int, group: int, unit: int, flags: Flags, config: Config):
    head, tail = channels(d)
    width = head if flags.shared else max(16, _power_of_two(dv))
    return _ATTEND.bind(
        D=d, DV=dv, GROUP=group, UNIT=unit, PAGES=flags.pages, NEW=flags.new, SHARED=flags.shared, LEFT=flags.left,
        RIGHT=flags.right, ALIBI=flags.alibi, SOFTCAP=flags.softcap, SINK=flags.sink,
        PARTS=flags.parts, DEPENDENT=flags.dependent, DOUBLE=flags.double, ROWS=config.rows, KEYS=config.keys, HEAD=head, TAIL=tail,
        WIDTH=width, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


@functools.cache
def combine_launch(dv: int, sink: bool, dependent: bool, many: bool):
    """``many``: more than 8 parts."""
    width = max(16, _power_of_two(dv))
    return _COMBINE.bind(
        DV=dv, SINK=sink, DEPENDENT=dependent, CHUNK=16 if many else 8, WIDTH=width,
        num_warps=2 if width <= 128 else 4, launch_pdl=dependent,
    )  # fmt: skip


class Plan(NamedTuple):
    """All of a call that follows from shapes, strides and options."""

    attend: Repeated
    combine: Repeated | None  # None with one share
    splits: int
    config: Config
    out: tuple  # shape and strides; lse, parts: the same
    lse: tuple
    parts: tuple  # of each share's sums, behind them their maxima and normalisers


def _unit(dtype, *strides) -> int:
    """How many elements divide every stride, up to 16 bytes of them."""
    return math.gcd(16 // dtype.itemsize, *[s for one in strides for s in one])


@functools.lru_cache(4096)
def plan(
    dtype, q_shape, q_strides, k_shape, k_strides, v_shape, v_strides, new_shape, k_new_strides, v_new_strides,
    table_shape, table_row, slopes_row, options, shared, index, config=None,
) -> Plan:  # fmt: skip
    """``options``: (window_left, window_right, scale, softcap, dtypes of slopes and sink or None, num_splits)."""
    window_left, window_right, scale, softcap, slopes, sink, num_splits = options
    batch, seq, heads, d = q_shape
    key_heads, dv = k_shape[2], v_shape[3]
    group = heads // key_heads
    new = new_shape[1] if new_shape else 0
    page_size = k_shape[1]
    capacity = page_size * (table_shape[1] if table_shape else 1)
    sm_count, dependent, roomy, double = _card(index)
    visible = capacity if window_left < 0 else min(capacity, window_left + seq)
    if not config:
        config = choose_config(
            seq * group, d, dv, shared, dtype.itemsize, _pages(table_shape, page_size, 64), new > 0,
            load=batch * key_heads / sm_count if roomy and visible >= 512 else 0.0, roomy=roomy, longest=visible,
        )  # fmt: skip
    pages = _pages(table_shape, page_size, config.keys)
    tiles = -(-seq * group // config.rows)
    seen = min(capacity, visible + config.keys)
    splits = num_splits
    if not splits:
        width = d if shared else d + dv
        splits = choose_shares(batch, key_heads * tiles, seen, config, width * dtype.itemsize, sm_count, pages, new > 0)
    entries = splits * batch
    parts = splits > 1
    used = [q_strides[:3], k_strides[:3], v_strides[:3]]
    if new:
        used += [k_new_strides[:3], v_new_strides[:3]]
    unit = _unit(dtype, *used)
    dependent = dependent and parts
    flags = Flags(
        pages, new > 0, shared,
        window_left >= 0, window_right >= 0 and seq > 1, slopes is not None, softcap > 0, sink is not None, parts, dependent,
        double and dtype == torch.float32 and max(d, dv) <= 256,
    )  # fmt: skip
    strides = [s // unit for one in (*used, (0,) * 3, (0,) * 3)[:5] for s in one]
    counts = (
        seq, key_heads, capacity, page_size, new, splits, entries, tiles, window_left, window_right, table_row,
        slopes_row, *strides, scale, softcap,
    )  # fmt: skip
    attend = attend_launch(d, dv, group, unit, flags, config)
    rows, wide, int32 = batch * heads * seq, torch.float32, torch.int32
    optional = slopes or dtype, sink or dtype
    read = dtype, dtype, dtype, int32, int32, dtype, dtype, *optional, wide if parts else dtype, wide
    combine = None
    if parts:
        launch = combine_launch(dv, flags.sink, dependent, splits > 8)
        combine = launch.repeated(rows, (entries, splits, heads, seq), index, (wide, optional[1], dtype, wide))
    return Plan(
        attend.repeated(key_heads * tiles * entries, counts, index, read), combine, splits, config,
        dense(batch, seq, heads, dv), dense(batch, heads, seq), dense(splits * rows * (dv + 2)),
    )  # fmt: skip


@functools.cache
def _card(index: int) -> tuple[int, bool, bool, bool]:
    """(multiprocessors, whether a kernel may start before the one it depends on has ended, whether a program may have 160 KiB of
    shared memory, whether tensor cores take float64)."""
    if index < 0:
        return 1, False, False, False
    facts = torch.cuda.get_device_properties(index)
    shared = getattr(facts, "shared_memory_per_block_optin", 0)
    cuda = torch.version.hip is None
    double = cuda and (facts.major, facts.minor) in ((8, 0), (9, 0))
    return facts.multi_processor_count, cuda and facts.major >= 9, shared >= 160 * 1024, double


def unsupported(q, k_cache, v_cache, cache_seqlens, k_new, v_new, page_table, options) -> str | None:
    if q.device.type != "cuda" and not INTERPRETED:
        return f"needs GPU tensors, got {q.device.type}"
    if q.dtype not in DTYPES:
        return f"takes float16, bfloat16 or float32, got {str(q.dtype).removeprefix('torch.')}"
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.stride(3) != 1 and t.shape[3] > 1:
            return f"needs the channels of {name} side by side, got strides {tuple(t.stride())}"
    d, dv = q.shape[3], v_cache.shape[3]
    # torch.compile has no addresses to look at: there the operator asks again, when it runs
    if max(d, dv) > 256 and not (d <= 640 and (torch.compiler.is_compiling() or _shared(k_cache, v_cache))):
        return f"takes head dimensions up to 256, or up to 640 where the values are the keys' first channels, got {d} and {dv}"
    return None


def _shared(k_cache, v_cache) -> bool:
    """Whether the values are the keys' first channels, in the same memory, and in one tile of them."""
    return (
        k_cache.data_ptr() == v_cache.data_ptr()
        and k_cache.stride() == v_cache.stride()
        and v_cache.shape[3] <= channels(k_cache.shape[3])[0]
    )


def _plan(q, k_cache, v_cache, k_new, v_new, page_table, options, config=None) -> Plan:
    slopes = options.alibi_slopes
    return plan(
        q.dtype, q.shape, q.stride(), k_cache.shape, k_cache.stride(), v_cache.shape, v_cache.stride(),
        k_new.shape if k_new is not None else None, k_new.stride() if k_new is not None else None,
        v_new.stride() if k_new is not None else None,
        page_table.shape if page_table is not None else None, page_table.stride(0) if page_table is not None else 0,
        slopes.stride(0) if slopes is not None and slopes.ndim == 2 else 0,
        (options.window_left, options.window_right, options.scale, options.softcap, slopes.dtype if slopes is not None else None,
         options.sink.dtype if options.sink is not None else None, options.num_splits),
        _shared(k_cache, v_cache), q.get_device(), config,
    )  # fmt: skip


def _dense_last(t):
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def forward(q, k_cache, v_cache, cache_seqlens, k_new, v_new, page_table, options, config: Config | None = None):
    """(out [B, Sq, H, Dv], lse [B, H, Sq] float32)."""
    q, k_new, v_new, page_table = _dense_last(q), _dense_last(k_new), _dense_last(v_new), _dense_last(page_table)
    slopes, sink = _dense_last(options.alibi_slopes), _dense_last(options.sink)
    if slopes is not options.alibi_slopes:
        options = options._replace(alibi_slopes=slopes)
    call = _plan(q, k_cache, v_cache, k_new, v_new, page_table, options, config)
    return run(call, q, k_cache, v_cache, cache_seqlens.contiguous(), k_new, v_new, page_table, slopes, sink)


def prepared(q, k_cache, v_cache, cache_seqlens, k_new, v_new, page_table, options) -> Plan | None:
    """What ``run`` needs for all calls of one kind; None where something has to be copied."""
    read = q, cache_seqlens, k_new, v_new, page_table, options.alibi_slopes, options.sink
    if any(_dense_last(t) is not t for t in read):
        return None
    return _plan(q, k_cache, v_cache, k_new, v_new, page_table, options)


def run(call: Plan, q, k_cache, v_cache, cache_seqlens, k_new, v_new, page_table, slopes, sink):
    """``forward`` of tensors that are read as they lie; q stands for those that are not there."""
    # on the path of every eager call: ``empty_strided`` costs the host two thirds of ``empty``, and addresses are asked for once
    device, wide = q.device, torch.float32
    out = torch.empty_strided(*call.out, dtype=q.dtype, device=device)
    lse = torch.empty_strided(*call.lse, dtype=wide, device=device)
    parts = torch.empty_strided(*call.parts, dtype=wide, device=device) if call.combine else out
    at, at_sink = q.data_ptr(), (q if sink is None else sink).data_ptr()
    at_lengths, at_parts, at_lse = cache_seqlens.data_ptr(), parts.data_ptr(), lse.data_ptr()
    pointers = (
        at, k_cache.data_ptr(), v_cache.data_ptr(), at_lengths, at_lengths if page_table is None else page_table.data_ptr(),
        at if k_new is None else k_new.data_ptr(), at if v_new is None else v_new.data_ptr(),
        at if slopes is None else slopes.data_ptr(), at_sink, at_parts, at_lse,
    )  # fmt: skip
    if not call.attend.at(pointers):
        optional = (q if t is None else t for t in (k_new, v_new, slopes, sink))
        table = cache_seqlens if page_table is None else page_table
        call.attend.of(q, k_cache, v_cache, cache_seqlens, table, *optional, parts, lse)
    if call.combine and not call.combine.at((at_parts, at_sink, out.data_ptr(), at_lse)):
        call.combine.of(parts, q if sink is None else sink, out, lse)
    return out, lse


def describe(q, k_cache, v_cache, k_new, v_new, page_table, options) -> str:
    """The configuration of a call, for ``trinix.explain``."""
    call = _plan(q, k_cache, v_cache, k_new, v_new, page_table, options)
    c = call.config
    return (
        f"{call.splits} shares of a sequence, tile {c.rows} x {c.keys} keys, {c.num_warps} warps, {c.num_stages} stages"
    )


def compile_cases(lanes: int = LANES):
    """Each head dimension's plain binary in parts, and one with every option."""
    plain = Flags(0, False, False, False, False, False, False, False, True, False)
    forms = {
        "64": (64, 64, 1, plain),
        "128": (128, 128, 4, plain),
        "128-whole": (128, 128, 4, plain._replace(parts=False)),
        "128-packed": (128, 128, 64, plain),
        "128-pages": (128, 128, 4, plain._replace(pages=2)),
        "128-large-pages": (128, 128, 4, plain._replace(pages=1)),
        "128-append": (128, 128, 4, plain._replace(pages=1, new=True)),
        "256": (256, 256, 8, plain),
        "256-packed": (256, 256, 64, plain),
        "256-packed-99k": (256, 256, 64, plain),
        "64-large-tiles": (64, 64, 4, plain._replace(parts=False)),
        "128-large-tiles": (128, 128, 4, plain._replace(parts=False)),
        "128-short": (128, 128, 4, plain._replace(parts=False)),
        "64-large-tiles-append": (64, 64, 4, plain._replace(new=True)),
        "256-large-tiles": (256, 256, 4, plain),
        "256-large-tiles-append": (256, 256, 4, plain._replace(new=True)),
        "latent": (576, 512, 16, plain._replace(shared=True)),
        "latent-packed": (576, 512, 128, plain._replace(shared=True)),
        "latent-packed-99k": (576, 512, 128, plain._replace(shared=True)),
        "80-options": (80, 80, 5, Flags(2, True, False, True, True, True, True, True, False, False)),
    }
    for dtype in DTYPES:
        suffix = str(dtype).removeprefix("torch.")
        t = POINTERS[suffix]
        for name, (d, dv, rows, flags) in forms.items():
            short = name == "128-short"
            full = short or "large-tiles" in name
            if full and dtype.itemsize == 4:
                continue
            load, longest = 2.0 if full else 0.0, 1024 if short else math.inf
            roomy = "99k" not in name
            config = choose_config(
                rows, d, dv, flags.shared, dtype.itemsize, flags.pages, flags.new, lanes, load, roomy, longest
            )
            launch = attend_launch(d, dv, rows, 16 // dtype.itemsize, flags, config)
            out = "*fp32" if flags.parts else t
            tensors = (t, t, t, "*i32", "*i32", t, t, "*fp32", "*fp32", out, "*fp32")
            bits = 64 if name in ("128-whole", "128-short", "64-large-tiles", "128-large-tiles") else 128
            yield compile_case(f"attention_decode/{name}/{suffix}", launch, 2 * dtype.itemsize, tensors, (), bits)
        for dv in (128, 512):
            launch = combine_launch(dv, True, False, True)
            tensors = ("*fp32", "*fp32", t, "*fp32")
            yield compile_case(f"attention_decode/combine-{dv}/{suffix}", launch, dtype.itemsize, tensors, (), 32)
