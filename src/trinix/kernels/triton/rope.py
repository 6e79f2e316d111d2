"""Rotary position embedding of q and k in one launch, with or without an RMSNorm of every head before it.

A program of the rotation takes one tile of [HEADS, COLS] pairs, heads of q or of k at one token, and the token's row of cos
and sin; with the norm it takes a token, and walks the heads of q, then of k, in such tiles. In the half-split form a tile is two
loads and two stores of half a head each; in the interleaved form one load, split in registers. All arithmetic is float32.

All strides are runtime numbers, so one binary serves dense tensors, views of a packed qkv and transposed heads. Divided and
multiplied by the constant VEC they show the compiler that every row starts at a 16-byte boundary.

Floor: a read and a write of q and k; backward of the rotation the same; backward through the norm two reads and a write.
"""

import functools
import operator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trinix.kernels.triton import norm
from trinix.kernels.triton._compile import POINTERS, compile_case
from trinix.kernels.triton._launch import INTERPRETED, Launch, Launcher, by_table  # noqa: F401  (by_table: the op's)

# ---- positions and the table ------------------------------------------------------------------------------------------


@triton.jit
def _place_of(token, length, ONE: tl.constexpr):
    """(batch, place in the sequence) of a token; a short call would notice the division, so it is left out where it can be."""
    if ONE == "batch":
        b = tl.zeros((), tl.int64)
        at = token.to(tl.int64)
    elif ONE == "token":
        b = token.to(tl.int64)
        at = tl.zeros((), tl.int64)
    else:
        b = (token // length).to(tl.int64)
        at = (token % length).to(tl.int64)
    return b, at


@triton.jit
def _position(places, token, b, s, first, count, places_b, places_s, MODE: tl.constexpr):
    if MODE == "offset":
        place = first + s
    elif MODE == "offsets":
        place = tl.load(places + b * places_b).to(tl.int64) + s
    elif MODE == "sequences":  # the last start that is not after the token; a binary search would wait for every load
        start = 0
        for i in range(0, count, 256):
            at = i + tl.arange(0, 256)
            edge = tl.load(places + at, mask=at < count, other=0).to(tl.int32)
            start = tl.maximum(start, tl.max(tl.where(edge <= token, edge, 0), 0))
        place = token - start + first
    else:
        place = tl.load(places + b * places_b + s * places_s).to(tl.int64)
    return place


@triton.jit
def _row(
    table,
    place,
    rows,
    stride,
    col,
    HALF: tl.constexpr,
    COLS: tl.constexpr,
    CHECKED: tl.constexpr,
    TABLE_VEC: tl.constexpr,
):
    """A row of cos or sin as [1, COLS]; NaN for a position that the table does not have, where the host could not check."""
    inside = (place >= 0) & (place < rows)
    at = tl.where(inside, place, 0) * (stride // TABLE_VEC * TABLE_VEC) + col
    if COLS == HALF:
        v = tl.load(table + at).to(tl.float32)
    else:
        v = tl.load(table + at, mask=col < HALF, other=0.0).to(tl.float32)
    if CHECKED:
        v = tl.where(inside, v, float("nan"))
    return v


# ---- tiles of a token: the pairs to rotate [HEADS, COLS] twice, the channels beyond them [HEADS, REST] -----------------


@triton.jit
def _load(x, at, live, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    return tl.load(x + at).to(tl.float32)


@triton.jit
def _store(y, at, v, live, MASKED: tl.constexpr):
    if MASKED:
        tl.store(y + at, v.to(y.dtype.element_ty), mask=live)
    else:
        tl.store(y + at, v.to(y.dtype.element_ty))


@triton.jit
def _load_pairs(
    x, head, col, x_h, x_d, heads, HALF: tl.constexpr, COLS: tl.constexpr, INTERLEAVED: tl.constexpr,
    DENSE: tl.constexpr, HEADS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if INTERLEAVED:
        both = tl.arange(0, 2 * COLS)[None, :]
        at = head * x_h + (both if DENSE else both * x_d)
        v = _load(x, at, (head < heads) & (both < 2 * HALF), MASKED)
        first, second = tl.split(tl.reshape(v, (HEADS, COLS, 2)))
    else:
        live = (head < heads) & (col < HALF)
        first = _load(x, head * x_h + (col if DENSE else col * x_d), live, MASKED)
        second = _load(x, head * x_h + (HALF + col if DENSE else (HALF + col) * x_d), live, MASKED)
    return first, second


@triton.jit
def _store_pairs(
    y, first, second, head, col, y_h, y_d, heads,
    HALF: tl.constexpr, COLS: tl.constexpr, INTERLEAVED: tl.constexpr, DENSE: tl.constexpr, HEADS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    if INTERLEAVED:
        both = tl.arange(0, 2 * COLS)[None, :]
        at = head * y_h + (both if DENSE else both * y_d)
        v = tl.reshape(tl.join(first, second), (HEADS, 2 * COLS))
        _store(y, at, v, (head < heads) & (both < 2 * HALF), MASKED)
    else:
        live = (head < heads) & (col < HALF)
        _store(y, head * y_h + (col if DENSE else col * y_d), first, live, MASKED)
        _store(y, head * y_h + (HALF + col if DENSE else (HALF + col) * y_d), second, live, MASKED)


@triton.jit
def _rest(head, x_h, x_d, heads, D: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, DENSE: tl.constexpr):
    """Where the channels that are not rotated lie, and which of them exist."""
    col = tl.arange(0, REST)[None, :]
    at = head * x_h + (2 * HALF + col if DENSE else (2 * HALF + col) * x_d)
    return at, (head < heads) & (col < D - 2 * HALF)


@triton.jit(
    do_not_specialize=[
        "first", "rows", "count", "places_b", "places_s", "length", "cos_row", "sin_row",
        "q_b", "q_s", "q_h", "q_d", "k_b", "k_s", "k_h", "k_d",
        "yq_b", "yq_s", "yq_h", "yq_d", "yk_b", "yk_s", "yk_h", "yk_d",
    ]
)  # fmt: skip
def _rotate(
    q, k, yq, yk, cos, sin, places,
    first: "i64", rows: "i64", count: "i32", places_b: "i64", places_s: "i64",
    length: "i32", cos_row: "i64", sin_row: "i64",
    q_b: "i64", q_s: "i64", q_h: "i64", q_d: "i64", k_b: "i64", k_s: "i64", k_h: "i64", k_d: "i64",
    yq_b: "i64", yq_s: "i64", yq_h: "i64", yq_d: "i64", yk_b: "i64", yk_s: "i64", yk_h: "i64", yk_d: "i64",
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, MODE: tl.constexpr, DENSE: tl.constexpr, VEC: tl.constexpr,
    TABLE_VEC: tl.constexpr, ONE: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, PARTS_K: tl.constexpr,
):  # fmt: skip
    # q's and k's tiles are programs of their own: in one program k's loads would wait for q's stores, which may lie in the same
    # place. Which of them it is are data, not branches: half the instructions to fetch, and a short call is mostly that.
    MASKED: tl.constexpr = (H % HEADS != 0) or (HK % HEADS != 0) or (COLS != HALF)
    part = tl.program_id(0) % (PARTS + PARTS_K)
    token = tl.program_id(0) // (PARTS + PARTS_K)
    col = tl.arange(0, COLS)[None, :]  # a row from the start: a [COLS] would change its layout through shared memory
    b, at = _place_of(token, length, ONE)
    place = _position(places, token, b, at, first, count, places_b, places_s, MODE)
    c = _row(cos, place, rows, cos_row, col, HALF, COLS, MODE != "offset", TABLE_VEC)
    s = _row(sin, place, rows, sin_row, col, HALF, COLS, MODE != "offset", TABLE_VEC)
    if INVERSE:
        s = -s
    of_q = part < PARTS
    heads = tl.where(of_q, H, HK)
    head = tl.where(of_q, part, part - PARTS) * HEADS + tl.arange(0, HEADS)[:, None]
    x_h, x_d = tl.where(of_q, q_h, k_h) // VEC * VEC, tl.where(of_q, q_d, k_d)
    x = tl.where(of_q, q, k)
    x += b * (tl.where(of_q, q_b, k_b) // VEC * VEC) + at * (tl.where(of_q, q_s, k_s) // VEC * VEC)
    u, v = _load_pairs(x, head, col, x_h, x_d, heads, HALF, COLS, INTERLEAVED, DENSE, HEADS, MASKED)
    if REST > 0:
        rest, live = _rest(head, x_h, x_d, heads, D, HALF, REST, DENSE)
        passed = tl.load(x + rest, mask=live)
    y_h, y_d = tl.where(of_q, yq_h, yk_h) // VEC * VEC, tl.where(of_q, yq_d, yk_d)
    y = tl.where(of_q, yq, yk)
    y += b * (tl.where(of_q, yq_b, yk_b) // VEC * VEC) + at * (tl.where(of_q, yq_s, yk_s) // VEC * VEC)
    _store_pairs(
        y, u * c - v * s, v * c + u * s, head, col, y_h, y_d, heads, HALF, COLS, INTERLEAVED, DENSE, HEADS, MASKED
    )
    if REST > 0:
        to, _ = _rest(head, y_h, y_d, heads, D, HALF, REST, DENSE)
        tl.store(y + to, passed, mask=live)


# ---- RMSNorm of every head, then the rotation -------------------------------------------------------------------------


@triton.jit
def _weights(w, col, shift, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """weight + weight_offset of the pairs' two sides, [1, COLS] each."""
    live = col < HALF
    first = tl.load(w + (2 * col if INTERLEAVED else col), mask=live, other=0.0).to(tl.float32)
    second = tl.load(w + (2 * col + 1 if INTERLEAVED else HALF + col), mask=live, other=0.0).to(tl.float32)
    return first + shift, second + shift


@triton.jit
def _norm_rotate_heads(
    x, y, w, c, s, col, part, eps, shift, x_h, x_d, y_h, y_d,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, DENSE: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = (H % HEADS != 0) or (COLS != HALF)
    wa, wb = _weights(w, col, shift, HALF, INTERLEAVED)
    for start in range(part * HEADS, H, PARTS * HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        a, b = _load_pairs(x, head, col, x_h, x_d, H, HALF, COLS, INTERLEAVED, DENSE, HEADS, MASKED)
        squares = tl.sum(a * a + b * b, 1)[:, None]
        if REST > 0:
            at, live = _rest(head, x_h, x_d, H, D, HALF, REST, DENSE)
            rest = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, 1)[:, None]
        scale = 1.0 / tl.sqrt_rn(squares / D + eps)
        a = a * scale * wa
        b = b * scale * wb
        _store_pairs(
            y, a * c - b * s, b * c + a * s, head, col, y_h, y_d, H, HALF, COLS, INTERLEAVED, DENSE, HEADS, MASKED
        )
        if REST > 0:
            more = tl.arange(0, REST)[None, :]
            wr = tl.load(w + 2 * HALF + more, mask=more < D - 2 * HALF, other=0.0).to(tl.float32) + shift
            to, _ = _rest(head, y_h, y_d, H, D, HALF, REST, DENSE)
            tl.store(y + to, (rest * scale * wr).to(y.dtype.element_ty), mask=live)


@triton.jit(
    do_not_specialize=[
        "first", "rows", "count", "places_b", "places_s", "length", "cos_row", "sin_row",
        "q_b", "q_s", "q_h", "q_d", "k_b", "k_s", "k_h", "k_d",
        "yq_b", "yq_s", "yq_h", "yq_d", "yk_b", "yk_s", "yk_h", "yk_d",
    ]
)  # fmt: skip
def _norm_rotate(
    q, k, yq, yk, qw, kw, cos, sin, places, eps: "fp32", shift: "fp32",
    first: "i64", rows: "i64", count: "i32", places_b: "i64", places_s: "i64",
    length: "i32", cos_row: "i64", sin_row: "i64",
    q_b: "i64", q_s: "i64", q_h: "i64", q_d: "i64", k_b: "i64", k_s: "i64", k_h: "i64", k_d: "i64",
    yq_b: "i64", yq_s: "i64", yq_h: "i64", yq_d: "i64", yk_b: "i64", yk_s: "i64", yk_h: "i64", yk_d: "i64",
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, MODE: tl.constexpr, DENSE: tl.constexpr, VEC: tl.constexpr, TABLE_VEC: tl.constexpr,
    HEADS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % PARTS
    token = tl.program_id(0) // PARTS
    col = tl.arange(0, COLS)[None, :]
    b = (token // length).to(tl.int64)
    at = (token % length).to(tl.int64)
    place = _position(places, token, b, at, first, count, places_b, places_s, MODE)
    c = _row(cos, place, rows, cos_row, col, HALF, COLS, MODE != "offset", TABLE_VEC)
    s = _row(sin, place, rows, sin_row, col, HALF, COLS, MODE != "offset", TABLE_VEC)
    _norm_rotate_heads(
        q + b * (q_b // VEC * VEC) + at * (q_s // VEC * VEC),
        yq + b * (yq_b // VEC * VEC) + at * (yq_s // VEC * VEC),
        qw, c, s, col, part, eps, shift, q_h // VEC * VEC, q_d, yq_h // VEC * VEC, yq_d,
        H, D, HALF, COLS, REST, INTERLEAVED, DENSE, HEADS, PARTS,
    )  # fmt: skip
    _norm_rotate_heads(
        k + b * (k_b // VEC * VEC) + at * (k_s // VEC * VEC),
        yk + b * (yk_b // VEC * VEC) + at * (yk_s // VEC * VEC),
        kw, c, s, col, part, eps, shift, k_h // VEC * VEC, k_d, yk_h // VEC * VEC, yk_d,
        HK, D, HALF, COLS, REST, INTERLEAVED, DENSE, HEADS, PARTS,
    )  # fmt: skip


# Backward takes 1 / rms again from x, which it reads anyway. A fixed number of programs share the tiles of q, the others
# those of k; each keeps its weight's gradients in registers, writes them once, and a second kernel adds them up in a fixed
# order.


@triton.jit
def _norm_rotate_backward_side(
    x, dy, dx, w, partial, program, programs, cos, sin, places, eps, shift, first, rows, count, places_b, places_s,
    tokens, length, cos_row, sin_row, x_b, x_s, x_h, x_d, dy_b, dy_s, dy_h, dy_d, dx_b, dx_s, dx_h, dx_d,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, MODE: tl.constexpr, DENSE: tl.constexpr, VEC: tl.constexpr, TABLE_VEC: tl.constexpr,
    HEADS: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = (H % HEADS != 0) or (COLS != HALF)
    TILES: tl.constexpr = (H + HEADS - 1) // HEADS  # of a token
    col = tl.arange(0, COLS)[None, :]
    wa, wb = _weights(w, col, shift, HALF, INTERLEAVED)
    dwa = tl.zeros((HEADS, COLS), tl.float32)
    dwb = tl.zeros((HEADS, COLS), tl.float32)
    if REST > 0:
        more = tl.arange(0, REST)[None, :]
        wr = tl.load(w + 2 * HALF + more, mask=more < D - 2 * HALF, other=0.0).to(tl.float32) + shift
        dwr = tl.zeros((HEADS, REST), tl.float32)
    for tile in tl.range(program, tokens * TILES, programs, num_stages=STAGES):
        token = tile // TILES
        batch = (token // length).to(tl.int64)
        at = (token % length).to(tl.int64)
        place = _position(places, token, batch, at, first, count, places_b, places_s, MODE)
        c = _row(cos, place, rows, cos_row, col, HALF, COLS, MODE != "offset", TABLE_VEC)
        s = _row(sin, place, rows, sin_row, col, HALF, COLS, MODE != "offset", TABLE_VEC)
        x_token = x + batch * (x_b // VEC * VEC) + at * (x_s // VEC * VEC)
        dy_token = dy + batch * (dy_b // VEC * VEC) + at * (dy_s // VEC * VEC)
        dx_token = dx + batch * (dx_b // VEC * VEC) + at * (dx_s // VEC * VEC)
        head = tile % TILES * HEADS + tl.arange(0, HEADS)[:, None]
        a, b = _load_pairs(x_token, head, col, x_h // VEC * VEC, x_d, H, HALF, COLS, INTERLEAVED, DENSE, HEADS, MASKED)
        ga, gb = _load_pairs(
            dy_token, head, col, dy_h // VEC * VEC, dy_d, H, HALF, COLS, INTERLEAVED, DENSE, HEADS, MASKED
        )
        squares = tl.sum(a * a + b * b, 1)[:, None]
        if REST > 0:
            from_x, live = _rest(head, x_h // VEC * VEC, x_d, H, D, HALF, REST, DENSE)
            from_dy, _ = _rest(head, dy_h // VEC * VEC, dy_d, H, D, HALF, REST, DENSE)
            r = tl.load(x_token + from_x, mask=live, other=0.0).to(tl.float32)
            gr = tl.load(dy_token + from_dy, mask=live, other=0.0).to(tl.float32)
            squares += tl.sum(r * r, 1)[:, None]
        scale = 1.0 / tl.sqrt_rn(squares / D + eps)
        if H % HEADS != 0:  # of a head that is none it may be 1 / 0, and dw adds up all heads of the tile
            scale = tl.where(head < H, scale, 0.0)
        a *= scale
        b *= scale
        ha = ga * c + gb * s
        hb = gb * c - ga * s
        dwa += ha * a
        dwb += hb * b
        ha *= wa
        hb *= wb
        along = tl.sum(ha * a + hb * b, 1)[:, None]
        if REST > 0:
            r *= scale
            dwr += gr * r
            gr *= wr
            along += tl.sum(gr * r, 1)[:, None]
        if DX:
            along = along / D
            _store_pairs(
                dx_token, (ha - a * along) * scale, (hb - b * along) * scale, head, col, dx_h // VEC * VEC, dx_d,
                H, HALF, COLS, INTERLEAVED, DENSE, HEADS, MASKED,
            )  # fmt: skip
            if REST > 0:
                to, _ = _rest(head, dx_h // VEC * VEC, dx_d, H, D, HALF, REST, DENSE)
                tl.store(dx_token + to, ((gr - r * along) * scale).to(dx.dtype.element_ty), mask=live)
    if DW:
        one = tl.arange(0, COLS)
        partial += program * D
        tl.store(partial + (2 * one if INTERLEAVED else one), tl.sum(dwa, 0), mask=one < HALF)
        tl.store(partial + (2 * one + 1 if INTERLEAVED else HALF + one), tl.sum(dwb, 0), mask=one < HALF)
        if REST > 0:
            beyond = tl.arange(0, REST)
            tl.store(partial + 2 * HALF + beyond, tl.sum(dwr, 0), mask=beyond < D - 2 * HALF)


@triton.jit(
    do_not_specialize=[
        "first", "rows", "count", "places_b", "places_s", "split", "tokens", "length", "cos_row", "sin_row",
        "q_b", "q_s", "q_h", "q_d", "k_b", "k_s", "k_h", "k_d",
        "gq_b", "gq_s", "gq_h", "gq_d", "gk_b", "gk_s", "gk_h", "gk_d",
        "dq_b", "dq_s", "dq_h", "dq_d", "dk_b", "dk_s", "dk_h", "dk_d",
    ]
)  # fmt: skip
def _norm_rotate_backward(
    q, k, gq, gk, dq, dk, qw, kw, partials, cos, sin, places, eps: "fp32", shift: "fp32",
    first: "i64", rows: "i64", count: "i32", places_b: "i64", places_s: "i64",
    split: "i32", tokens: "i32", length: "i32", cos_row: "i64", sin_row: "i64",
    q_b: "i64", q_s: "i64", q_h: "i64", q_d: "i64", k_b: "i64", k_s: "i64", k_h: "i64", k_d: "i64",
    gq_b: "i64", gq_s: "i64", gq_h: "i64", gq_d: "i64", gk_b: "i64", gk_s: "i64", gk_h: "i64", gk_d: "i64",
    dq_b: "i64", dq_s: "i64", dq_h: "i64", dq_d: "i64", dk_b: "i64", dk_s: "i64", dk_h: "i64", dk_d: "i64",
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, MODE: tl.constexpr, DENSE: tl.constexpr, VEC: tl.constexpr, TABLE_VEC: tl.constexpr,
    HEADS: tl.constexpr, HEADS_K: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr, STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < split:
        _norm_rotate_backward_side(
            q, gq, dq, qw, partials, program, split, cos, sin, places, eps, shift, first, rows, count, places_b,
            places_s, tokens, length, cos_row, sin_row, q_b, q_s, q_h, q_d, gq_b, gq_s, gq_h, gq_d, dq_b, dq_s, dq_h,
            dq_d, H, D, HALF, COLS, REST, INTERLEAVED, MODE, DENSE, VEC, TABLE_VEC, HEADS, DX, DW, STAGES,
        )  # fmt: skip
    else:
        _norm_rotate_backward_side(
            k, gk, dk, kw, partials + split.to(tl.int64) * D, program - split, tl.num_programs(0) - split, cos, sin,
            places, eps, shift, first, rows, count, places_b, places_s, tokens, length, cos_row, sin_row, k_b, k_s, k_h,
            k_d, gk_b, gk_s, gk_h, gk_d, dk_b, dk_s, dk_h, dk_d, HK, D, HALF, COLS, REST, INTERLEAVED, MODE, DENSE, VEC,
            TABLE_VEC, HEADS_K, DX, DW, STAGES,
        )  # fmt: skip
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()  # the adding kernel may come in now; it waits for the end of this one


@triton.jit(do_not_specialize=["split", "programs"])
def _sum_partials(partials, dqw, dkw, split: "i32", programs: "i32", D: tl.constexpr, DEPENDENT: tl.constexpr,
                  ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Sums of the first ``split`` rows of D, and of those from there to ``programs``."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    BLOCKS: tl.constexpr = (D + COLS - 1) // COLS
    side = tl.program_id(0) // BLOCKS
    col = tl.program_id(0) % BLOCKS * COLS + tl.arange(0, COLS)[None, :]
    end = tl.where(side == 0, split, programs)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(tl.where(side == 0, 0, split), end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        live = (row < end) & (col < D)
        total += tl.load(partials + row * D + col, mask=live, other=0.0)
    v = tl.sum(total, 0)[None, :]
    if side == 0:
        tl.store(dqw + col, v.to(dqw.dtype.element_ty), mask=col < D)
    else:
        tl.store(dkw + col, v.to(dkw.dtype.element_ty), mask=col < D)


# ---- the choice, the launches -----------------------------------------------------------------------------------------

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_D = 512
LANES = 64 if torch.version.hip else 32  # threads of a warp

_ROTATE = Launcher(_rotate, tensors=7)
_NORM_ROTATE = Launcher(_norm_rotate, tensors=9)
_NORM_ROTATE_BACKWARD = Launcher(_norm_rotate_backward, tensors=12)
_SUM_PARTIALS = Launcher(_sum_partials, tensors=3)


class Config(NamedTuple):
    heads: int  # of a tile
    parts: int  # tiles of the larger of q and k at a token
    num_warps: int


class BackwardConfig(NamedTuple):
    heads: int  # of a tile of q
    heads_k: int
    split: int  # programs for q
    programs: int  # for q and k
    num_warps: int
    num_stages: int  # tiles under way, through shared memory from 2 on


def choose_rotation(heads: int, width: int, itemsize: int, lanes: int) -> Config:
    """The configuration of the forward kernels and of the plain rotation's backward; ``heads`` is the larger of q's and k's.

    Tiles of 2048 channels, each tile of a token a program of its own: best or within 1% on E-rope-1 to 4 and K-rope-gqa; half of
    it, or twice the warps, gains nothing on K-rope-decode either. Two warps at least: with one, cos and sin of 32 pairs change
    their layout through shared memory (K-rope-gqa-512 backward 5.70 -> 5.34 us).
    """
    width = _power_of_two(width)
    tile = min(max(1, 2048 // width), _power_of_two(heads))
    num_warps = min(8, max(2, tile * width * itemsize // (32 * lanes)))
    return Config(tile, -(-heads // tile), num_warps)


def choose_norm_backward(
    tokens: int, heads: int, heads_k: int, width: int, itemsize: int, lanes: int, processors: int
) -> BackwardConfig:
    """Whole tiles where that leaves 8 heads; programs for q and for k as either has elements.

    Half types: tiles of 1024 channels on 4 warps, three programs on a multiprocessor with four tiles under way each, K-qkrope-gqa
    113.1 -> 98.0 us (a copy 87.6); a tile of half as many is one warp's, K-qkrope-512 10.3 us, two warps 11.9.
    """
    width = _power_of_two(width)
    most = max(heads, heads_k)
    staged = lanes == 32 and itemsize == 2
    tile = min(max(1, (1024 if staged else 2048) // width), _power_of_two(most))
    while tile > 8 and most % tile and tile * width * itemsize > 32 * lanes:
        tile //= 2
    full = staged and tile * width == 1024
    num_warps = 4 if full else min(8, max(1, tile * width * itemsize // (32 * lanes)))
    of_q, of_k = (min(tile, _power_of_two(n)) for n in (heads, heads_k))
    tiles_q, tiles_k = (max(1, tokens * -(-n // size)) for n, size in ((heads, of_q), (heads_k, of_k)))
    programs = min(tiles_q + tiles_k, (3 if full else 4) * processors)
    share = round(programs * tiles_q * of_q / (tiles_q * of_q + tiles_k * of_k))
    num_stages = 4 if full else 3 if staged else 1  # two are worse than one
    return BackwardConfig(of_q, of_k, min(max(1, share), programs - 1), programs, num_warps, num_stages)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def _processors(device: torch.device) -> int:
    return 3 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def unsupported(q: torch.Tensor, k: torch.Tensor | None, *others: torch.Tensor) -> str | None:
    """``others``: cos and sin, with a norm the weights before them."""
    if not (q.is_cuda or (INTERPRETED and q.device.type == "cpu")):
        return f"needs a GPU tensor, got {q.device.type}"
    if q.dtype not in DTYPES:
        return f"needs float16, bfloat16 or float32, got {str(q.dtype).removeprefix('torch.')}"
    for t in (q, k, *others):
        if t is not None and (t.layout != torch.strided or t.is_nested):
            return "needs strided tensors, got " + ("a nested tensor" if t.is_nested else str(t.layout))
    if q.shape[-1] > LARGEST_D:
        return f"needs at most {LARGEST_D} channels a head, got {q.shape[-1]}"
    cos, sin = others[-2:]
    if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():
        return "gives cos and sin no gradient, and they require one"
    return None


class _Plan(NamedTuple):
    """What depends on shapes and strides only."""

    launch: Launch
    blocks: int
    scalars: tuple
    split: int = 0


def _strides(stride: tuple) -> tuple:
    return stride if len(stride) == 4 else (0, *stride)


def _layout(itemsize: int, tables: tuple, views: tuple) -> tuple[dict, tuple]:
    """(constants, scalars) of the strides of tensors ``(shape, stride)``, all of the same rank, and of two tables."""
    used = [s for shape, stride in views for n, s in zip(shape[:-1], stride[:-1], strict=True) if n > 1]
    dense = all(stride[-1] == 1 for _, stride in views)
    vec = 16 // itemsize
    aligned = dense and functools.reduce(operator.or_, used, 0) % vec == 0
    constants = {
        "DENSE": dense,
        "VEC": vec if aligned else 1,
        "TABLE_VEC": 4 if (tables[0] | tables[1]) % 4 == 0 else 1,
    }
    return constants, tables + tuple(s for _, stride in views for s in _strides(stride))


def _sizes(shape: tuple, heads_k: int, half: int) -> dict:
    rest = shape[-1] - 2 * half
    sizes = {"H": shape[-2], "HK": heads_k, "D": shape[-1], "HALF": half}
    return sizes | {"COLS": _power_of_two(half), "REST": _power_of_two(rest) if rest else 0}


@functools.lru_cache(maxsize=512)
def _plan(dtype, views, heads_k, half, tables, interleaved, inverse, mode, inplace, lanes=LANES) -> _Plan:
    """Of the rotation (``inverse`` True or False) or of norm and rotation (None)."""
    shape = views[0][0]
    sizes = _sizes(shape, heads_k, half)
    if inplace:
        sizes["REST"] = 0  # those channels are where they belong
    layout, scalars = _layout(dtype.itemsize, tables, views)
    tokens = shape[:-2].numel()
    c = choose_rotation(max(shape[-2], heads_k), shape[-1], dtype.itemsize, lanes)
    constants = sizes | {"INTERLEAVED": interleaved, "INVERSE": inverse, "MODE": mode} | layout
    if inverse is None:
        launcher, programs = _NORM_ROTATE, c.parts
        del constants["INVERSE"]
        constants |= {"HEADS": c.heads, "PARTS": c.parts}
    else:
        of_q, of_k = -(-shape[-2] // c.heads), -(-heads_k // c.heads)
        launcher, programs = _ROTATE, of_q + of_k
        one = "batch" if tokens == shape[-3] else "token" if shape[-3] == 1 else None
        constants |= {"ONE": one, "HEADS": c.heads, "PARTS": of_q, "PARTS_K": of_k}
    launch = _bound(launcher, c.num_warps, *constants.items())
    return _Plan(launch, tokens * programs, (shape[-3], *scalars))


@functools.lru_cache(maxsize=512)
def _backward_plan(
    dtype, views, half, tables, interleaved, mode, dx, dw, processors, dependent, lanes=LANES, config=None
) -> _Plan:  # fmt: skip
    shape, heads_k = views[0][0], views[1][0][-2]
    sizes = _sizes(shape, heads_k, half)
    layout, scalars = _layout(dtype.itemsize, tables, views)
    tokens = shape[:-2].numel()
    c = config or choose_norm_backward(tokens, shape[-2], heads_k, shape[-1], dtype.itemsize, lanes, processors)
    constants = sizes | {"INTERLEAVED": interleaved, "MODE": mode} | layout
    constants |= {"HEADS": c.heads, "HEADS_K": c.heads_k, "DX": dx, "DW": dw, "STAGES": c.num_stages}
    launch = _bound(_NORM_ROTATE_BACKWARD, c.num_warps, *(constants | {"DEPENDENT": dependent}).items())
    return _Plan(launch, c.programs, (c.split, tokens, shape[-3], *scalars), c.split)


@functools.cache
def _bound(launcher, num_warps, *constants) -> Launch:
    return launcher.bind(**dict(constants), num_warps=num_warps)


def _place_scalars(places: torch.Tensor | None, mode: str) -> tuple:
    """(number of sequence edges, stride over the batch, stride over the tokens)."""
    if mode == "offset":
        return 0, 0, 0
    if mode == "sequences":
        return places.numel(), 0, 0
    if mode == "offsets":
        return 0, places.stride(0), 0
    if places.ndim == 1:
        return 0, 0, places.stride(0)
    return 0, places.stride(0) if places.shape[0] > 1 else 0, places.stride(1)


def _tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple:
    """(cos, sin, their row strides), rows dense."""
    (cos_row, cos_col), (sin_row, sin_col) = cos.stride(), sin.stride()
    if cos_col == 1 and sin_col == 1:
        return cos, sin, (cos_row, sin_row)
    cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, (cos.stride(0), sin.stride(0))


def rotate(
    q, k, cos, sin, places, mode: str, first: int, half: int, interleaved: bool,
    inverse: bool = False, inplace: bool = False, layouts: tuple = (None, None),
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(q', k' or None), laid out as ``layouts`` or as ``torch.empty_like``; ``inverse``: by the opposite angle."""
    yq = q if inplace else _like(q, layouts[0])
    views = ((q.shape, q.stride()), (yq.shape, yq.stride()))
    if k is None:
        yk = None
        views, heads_k = (views[0], views[0], views[1], views[1]), 0
    else:
        yk = k if inplace else _like(k, layouts[1])
        views, heads_k = (views[0], (k.shape, k.stride()), views[1], (yk.shape, yk.stride())), k.shape[-2]
    cos, sin, tables = _tables(cos, sin)
    if not q.numel() and (k is None or not k.numel()):
        return yq, yk
    plan = _plan(q.dtype, views, heads_k, half, tables, interleaved, inverse, mode, inplace)
    tensors = (q, q, yq, yq) if k is None else (q, k, yq, yk)
    plan.launch(
        plan.blocks,
        (*tensors, cos, sin, cos if places is None else places),
        (first, cos.shape[0], *_place_scalars(places, mode), *plan.scalars),
    )
    return yq, yk


def _like(t: torch.Tensor, layout: tuple | None) -> torch.Tensor:
    if layout is None or t.stride() == layout:
        return torch.empty_like(t)
    return torch.empty_strided(t.shape, layout, dtype=t.dtype, device=t.device)


def norm_rotate(
    q, k, qw, kw, cos, sin, places, mode: str, first: int, half: int, interleaved: bool, eps: float, shift: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q', k'), laid out as ``torch.empty_like``."""
    yq, yk = torch.empty_like(q), torch.empty_like(k)
    if not q.numel() and not k.numel():
        return yq, yk
    views = tuple((t.shape, t.stride()) for t in (q, k, yq, yk))
    cos, sin, tables = _tables(cos, sin)
    plan = _plan(q.dtype, views, k.shape[-2], half, tables, interleaved, None, mode, False)
    plan.launch(
        plan.blocks,
        (q, k, yq, yk, qw, kw, cos, sin, cos if places is None else places),
        (eps, shift, first, cos.shape[0], *_place_scalars(places, mode), *plan.scalars),
    )
    return yq, yk


def norm_rotate_backward(
    q, k, gq, gk, qw, kw, cos, sin, places, mode: str, first: int, half: int, interleaved: bool, eps: float, shift: float,
    dx: bool = True, dw: bool = True, layouts: tuple = (None, None),
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """(dq, dk, dqw, dkw) for the incoming gradients gq, gk; dq and dk are None without ``dx``, dqw and dkw without ``dw``."""
    dq, dk = (_like(gq, layouts[0]), _like(gk, layouts[1])) if dx else (gq, gk)
    dqw, dkw = (torch.empty_like(qw), torch.empty_like(kw)) if dw else (None, None)
    if not q.numel() and not k.numel():
        if dw:
            dqw.zero_(), dkw.zero_()
        return (dq, dk, dqw, dkw) if dx else (None, None, dqw, dkw)
    views = tuple((t.shape, t.stride()) for t in (q, k, gq, gk, dq, dk))
    cos, sin, tables = _tables(cos, sin)
    dependent = dw and q.is_cuda and norm.dependent_launch(q.get_device())
    plan = _backward_plan(q.dtype, views, half, tables, interleaved, mode, dx, dw, _processors(q.device), dependent)
    width = q.shape[-1]
    partials = torch.empty(plan.blocks * width if dw else 1, dtype=torch.float32, device=q.device)
    plan.launch(
        plan.blocks,
        (q, k, gq, gk, dq, dk, qw, kw, partials, cos, sin, cos if places is None else places),
        (eps, shift, first, cos.shape[0], *_place_scalars(places, mode), *plan.scalars),
    )
    if dw:
        blocks, launch = sum_launch(width, dependent)
        launch(blocks, (partials, dqw, dkw), (plan.split, plan.blocks))
    return (dq, dk, dqw, dkw) if dx else (None, None, dqw, dkw)


@functools.cache
def sum_launch(width: int, dependent: bool) -> tuple[int, Launch]:
    """(programs, launch) that adds up both weights' partial gradients of ``width`` channels, most of a column at once."""
    return 2 * -(-width // 8), _SUM_PARTIALS.bind(
        D=width, DEPENDENT=dependent, ROWS=512, COLS=8, num_warps=4, launch_pdl=dependent
    )


def describe(q: torch.Tensor, k: torch.Tensor | None, half: int) -> str:
    """The configuration of a call's forward kernel, for ``trinix.explain``."""
    heads = max(q.shape[-2], 0 if k is None else k.shape[-2])
    c = choose_rotation(heads, q.shape[-1], q.dtype.itemsize, LANES)
    return f"tile {c.heads} heads x {half} pairs, {c.num_warps} warps"


CASES = {  # name -> (H, Hk, D, half, interleaved)
    "32x128": (32, 32, 128, 64, False),
    "gqa-32-8x128": (32, 8, 128, 64, False),
    "40x80": (40, 40, 80, 40, False),
    "12x64": (12, 12, 64, 32, False),
    "partial-64-of-192": (16, 16, 192, 32, False),
    "interleaved-32x128": (32, 8, 128, 64, True),
}


def compile_cases(lanes: int = LANES):
    """The usual head counts and widths at 4096 tokens; backward of the rotation alone is the same text with -sin."""
    for name, (heads, heads_k, width, half, interleaved) in CASES.items():
        for dtype in DTYPES:
            suffix = str(dtype).removeprefix("torch.")
            size, t, f = dtype.itemsize, POINTERS[suffix], "*fp32"
            q, k = torch.Size((1, 4096, heads, width)), torch.Size((1, 4096, heads_k, width))
            dense = [(s, (4096 * s[2] * width, s[2] * width, width, 1)) for s in (q, k)]
            tables = half, half
            common = dtype, tuple(dense * 2), heads_k, half, tables, interleaved
            for kind, inverse, mode in (("fwd", False, "offset"), ("fwd-ids", False, "ids"), ("bwd", True, "offset")):
                launch = _plan(*common, inverse, mode, False, lanes).launch
                places = "*i64" if mode == "ids" else f
                yield compile_case(f"rope/{name}/{kind}/{suffix}", launch, 2 * size, (t, t, t, t, f, f, places))
            launch = _plan(*common, None, "offset", False, lanes).launch
            yield compile_case(f"rope/norm-{name}/fwd/{suffix}", launch, 2 * size, (t, t, t, t, t, t, f, f, f))
            launch = _backward_plan(
                dtype, tuple(dense * 3), half, tables, interleaved, "offset", True, True, 132, False, lanes
            ).launch
            tensors = (t, t, t, t, t, t, t, t, f, f, f, f)
            # half a head of a tile of 1024 channels, on 4 warps
            bits = 64 if size == 2 and width > 64 and not interleaved else 128
            yield compile_case(f"rope/norm-{name}/bwd/{suffix}", launch, 3 * size, tensors, access_bits=bits)
    launch = _plan(
        torch.bfloat16, tuple(dense * 2), heads_k, half, tables, interleaved, False, "sequences", False, lanes
    ).launch
    yield compile_case("rope/sequences/fwd/bfloat16", launch, 4, ("*bf16",) * 4 + (f, f, "*i32"))
    yield compile_case("rope/weights/bwd/float32", sum_launch(128, False)[1], 4, ("*fp32",) * 3, access_bits=32)
