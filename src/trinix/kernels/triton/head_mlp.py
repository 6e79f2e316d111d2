"""Portable Triton per-head MLPs: O = act(X W1) W2 in one kernel, and all gradients in one kernel.

Nothing of size [H, B, E] is written. A forward program owns a tile of rows of one head and walks over E. Backward has two
kinds of programs in one launch, both of which compute the hidden tile again:

weights  own a tile of E of one head and walk over rows: Z' = W1' X', dH' = W2 dY', dW2 += H dY, dW1' += dZ' X
rows     own a tile of rows and walk over E: Z = X W1, dH = dY W2', dX += dZ W1'

That is 7 matrix products where 5 would do, and it needs no sum across programs: no atomics, no workspace, the same bits on
every run. In the weights programs the hidden tile is transposed, so that H' and dZ' are left operands as they come out of
the products before: they never leave the registers.

Where the heads and E give too few weights programs for the card, rows are split among them; each split then writes float32
partial sums, no more of them than dY is large, and a second kernel adds them up in a fixed order.

All sums and the activation are float32; the hidden values are rounded to the tensors' dtype for the next product. float32
tensors are never multiplied as tf32: on sm_80 and sm_90, whose tensor cores take float64, all is float64 up to the result's one
rounding ("double"); elsewhere products are float32 and sums over tiles float64 ("ieee").

On Hopper, backward of plain calls beyond D = 128 goes by stages: one kernel writes H and dZ of some heads, and three batched
products of PyTorch's make the gradients of them. That many channels leave no registers for sums that live through a walk.

On Hopper, forward of plain calls from D = 128 on has its tiles fetched by the copy engine, through tensor descriptors: one thread asks
for a whole tile. Where X comes halved, for an activation of z / 2, and beyond D = 128 always, it is an operand in registers and
leaves shared memory to W1 and W2.

Floor: 4 H B D E FLOPs forward, 10 backward (14 as done here); one special-function instruction a hidden element and pass
over it where the activation is a sigmoid, by tanh.approx (float16 and bfloat16 on NVIDIA).
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trinix.kernels import _stages
from trinix.kernels.triton import activation, norm
from trinix.kernels.triton._compile import POINTERS, compile_case
from trinix.kernels.triton._launch import INTERPRETED, Launch, Launcher, _State
from trinix.kernels.triton.activation import DTYPES, LANES

MOST_D = 256  # a tile holds whole rows of X

# ---- formulas: value(x) and dx(x, dy) as in the activations -------------------------------------------------------------
# sigmoid(x) = (1 + tanh(x / 2)) / 2. The largest relative error of tanh.approx is 2^-11 (PTX ISA), so that of this sigmoid
# is 2^-12 absolute: half a rounding of float16 just below 1, a sixteenth of one of bfloat16.


@triton.jit
def _tanh_approx(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _approx_sigmoid_of_half(h, a, b):
    return 0.5 + 0.5 * _tanh_approx(h)


@triton.jit
def _approx_sigmoid(x, a, b):
    return _approx_sigmoid_of_half(0.5 * x, a, b)


@triton.jit
def _approx_sigmoid_dx(x, dy, a, b):
    t = _tanh_approx(0.5 * x)
    return dy * (0.25 - 0.25 * t * t)


@triton.jit
def _approx_silu_of_half(h, a, b):
    return h * _tanh_approx(h) + h


@triton.jit
def _approx_silu(x, a, b):
    return _approx_silu_of_half(0.5 * x, a, b)


@triton.jit
def _approx_silu_dx(x, dy, a, b):
    h = 0.5 * x
    t = _tanh_approx(h)
    return dy * (0.5 + 0.5 * (t + h * (1.0 - t * t)))


@triton.jit
def _approx_quick_gelu(x, a, b):
    return 0.5 * x * _tanh_approx(0.851 * x) + 0.5 * x


@triton.jit
def _approx_quick_gelu_dx(x, dy, a, b):
    u = 0.851 * x
    t = _tanh_approx(u)
    return dy * (0.5 + 0.5 * (t + u * (1.0 - t * t)))


@triton.jit
def _gelu_argument(q):
    """(u / h, du / dh) for P(Z < x) = (1 + tanh u) / 2, h = x / 2, q = h^2: u = x (c0 + c1 x^2 + c2 x^4), fitted for the
    least error of x P(Z < x) and of its derivative (4e-5 and 1e-4, tanh.approx aside); a line beyond |x| = 6, where tanh is 1."""
    q = tl.where(q > 9.0, 9.0, q)
    u = 1.5948458129002398 + q * (0.2960349274419079 + q * -0.011132056953053725)
    return u, 1.5948458129002398 + q * (0.8881047823257238 + q * -0.05566028476526862)


@triton.jit
def _approx_gelu_of_half(h, a, b):
    u, _ = _gelu_argument(h * h)
    return h * _tanh_approx(h * u) + h


@triton.jit
def _approx_gelu(x, a, b):
    return _approx_gelu_of_half(0.5 * x, a, b)


@triton.jit
def _approx_gelu_dx(x, dy, a, b):
    h = 0.5 * x
    u, slope = _gelu_argument(h * h)
    t = _tanh_approx(h * u)
    return dy * (0.5 + 0.5 * (t + h * (1.0 - t * t) * slope))


@triton.jit
def _approx_gelu_tanh(x, a, b):
    return 0.5 * x * _tanh_approx(x * (0.7978845608028654 + 0.035677408136300125 * x * x)) + 0.5 * x


@triton.jit
def _approx_gelu_tanh_dx(x, dy, a, b):
    t = _tanh_approx(x * (0.7978845608028654 + 0.035677408136300125 * x * x))
    slope = x * (0.7978845608028654 + 0.10703222440890037 * x * x)
    return dy * (0.5 + 0.5 * (t + slope * (1.0 - t * t)))


@triton.jit
def _approx_tanh(x, a, b):
    return _tanh_approx(x)


@triton.jit
def _approx_tanh_dx(x, dy, a, b):
    t = _tanh_approx(x)
    return dy * (1.0 - t * t)


@triton.jit
def _identity(x, a, b):
    return x


@triton.jit
def _identity_dx(x, dy, a, b):
    return dy


OF_HALF = {"sigmoid": _approx_sigmoid_of_half, "silu": _approx_silu_of_half, "gelu": _approx_gelu_of_half}  # of z / 2
APPROXIMATE = {  # instead, for float16 and bfloat16 on NVIDIA
    "sigmoid": (_approx_sigmoid, _approx_sigmoid_dx),
    "silu": (_approx_silu, _approx_silu_dx),
    "gelu": (_approx_gelu, _approx_gelu_dx),
    "quick_gelu": (_approx_quick_gelu, _approx_quick_gelu_dx),
    "gelu_tanh": (_approx_gelu_tanh, _approx_gelu_tanh_dx),
    "tanh": (_approx_tanh, _approx_tanh_dx),
}
PARAMETERS = {"leaky_relu": (0.01, 0.0), "softplus": (1.0, 20.0)}  # kind -> (a, b)


def formula(kind: str, dtype: torch.dtype, lanes: int) -> tuple:
    """(value, dx, a, b) of a kind."""
    if kind == "none":
        pair = _identity, _identity_dx
    elif kind in APPROXIMATE and dtype != torch.float32 and lanes == 32 and not INTERPRETED:
        pair = APPROXIMATE[kind]
    else:
        pair = activation.formula(kind, dtype)
    return *pair, *PARAMETERS.get(kind, (0.0, 0.0))


# ---- kernels ----------------------------------------------------------------------------------------------------------
# Sizes and strides are unspecialised, so that one binary serves every size and the launch key stays short. E and the outer
# strides of what is read along E come in E_UNITs, those of what is read along D in D_UNITs, common divisors: from the product
# with a constant the compiler proves the alignment that wide accesses need. INNER: the inner strides are all 1. EVEN: E is a
# multiple of BE. Rows past B are loaded as zeros: their dY is 0, so they add nothing to any gradient; so do columns past E,
# since the rows of W2 there are 0.
# A weight comes as (outer, inner) strides of its matrix; W1_T, W2_T: the matrix lies transposed in memory, [E, D] for W1 and
# its gate, [D, E] for W2, as the weight of a linear layer does, and is read along its rows as they lie.


@triton.jit
def _load(at, row_live, column_live, ROW_MASK: tl.constexpr, COLUMN_MASK: tl.constexpr):
    if ROW_MASK and COLUMN_MASK:
        return tl.load(at, mask=row_live[:, None] & column_live[None, :], other=0.0)
    if ROW_MASK:
        return tl.load(at, mask=row_live[:, None], other=0.0)
    if COLUMN_MASK:
        return tl.load(at, mask=column_live[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _weight_at(w, d, e, outer, inner, E_ROWS: tl.constexpr):
    """Pointers of a tile of a weight as it lies: [E, D] if E_ROWS, else [D, E]."""
    if E_ROWS:
        at = w + e[:, None] * outer + d[None, :] * inner
    else:
        at = w + d[:, None] * outer + e[None, :] * inner
    return at


@triton.jit
def _weight(
    at, d_live, e_live, E_ROWS: tl.constexpr, WANT_E_ROWS: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr
):
    """The tile at such pointers, as [E, D] if WANT_E_ROWS, else [D, E]; FULL: D fills the tile."""
    if E_ROWS:
        tile = _load(at, e_live, d_live, not EVEN, not FULL)
    else:
        tile = _load(at, d_live, e_live, not FULL, not EVEN)
    if E_ROWS != WANT_E_ROWS:
        tile = tl.trans(tile)
    return tile


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "double":
        acc = tl.dot(a.to(tl.float64), b.to(tl.float64), acc, out_dtype=tl.float64)
    elif PRECISION == "ieee":  # acc is float64: one long chain in float32 has a larger error than PyTorch's products
        acc += tl.dot(a, b, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """What sums over tiles start from."""
    return tl.zeros([ROWS, COLUMNS], tl.float32 if PRECISION is None else tl.float64)


@triton.jit
def _operand(h, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Hidden values as the next product takes them."""
    if PRECISION == "double":
        y = h
    else:
        y = h.to(dtype)
    return y


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """a b, with "ieee" as sums over 32 terms each that are added up then in float64, for the same reason."""
    M: tl.constexpr = a.shape[0]
    K: tl.constexpr = a.shape[1]
    N: tl.constexpr = b.shape[1]
    if PRECISION == "double":
        c = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
    elif PRECISION == "ieee" and K > 32:
        parts = tl.permute(tl.reshape(a, (M, K // 32, 32)), (1, 0, 2))
        parts = tl.dot(parts, tl.reshape(b, (K // 32, 32, N)), input_precision="ieee")
        c = tl.sum(parts.to(tl.float64), 0).to(tl.float32)
    else:
        c = tl.dot(a, b, input_precision=PRECISION)
    return c


@triton.jit
def _forward_head(
    acc, x, w1, wg, w2, b1, E, w1_o, w1_i, wg_o, wg_i, w2_o, w2_i,
    VALUE: tl.constexpr, A: tl.constexpr, B_: tl.constexpr, GATED: tl.constexpr, HAS_B1: tl.constexpr,
    W1_T: tl.constexpr, W2_T: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + act(x W1) W2 of one head."""
    FULL: tl.constexpr = D == BD
    d = tl.arange(0, BD)
    d_live = d < D
    e = tl.arange(0, BE)
    wide = d.to(tl.int64)
    w1 = _weight_at(w1, wide, e, w1_o, w1_i, W1_T)
    w2 = _weight_at(w2, wide, e, w2_o, w2_i, not W2_T)
    if GATED:
        wg = _weight_at(wg, wide, e, wg_o, wg_i, W1_T)
    for start in range(0, E, BE):
        e_live = e < E - start
        up = _weight(w1, d_live, e_live, W1_T, False, EVEN, FULL)
        down = _weight(w2, d_live, e_live, not W2_T, True, EVEN, FULL)
        if GATED:
            gate = _weight(wg, d_live, e_live, W1_T, False, EVEN, FULL)
        z = _product(x, up, PRECISION)
        if HAS_B1:
            z += tl.load(b1 + start + e, mask=e_live, other=0.0).to(tl.float32)[None, :]
        if GATED:
            h = VALUE(_product(x, gate, PRECISION), A, B_) * z
            wg += BE * (wg_o if W1_T else wg_i)
        else:
            h = VALUE(z, A, B_)
        acc = _dot(_operand(h, x.dtype, PRECISION), down, acc, PRECISION)
        w1 += BE * (w1_o if W1_T else w1_i)
        w2 += BE * (w2_i if W2_T else w2_o)
    return acc


@triton.jit(
    do_not_specialize=[
        "H", "B", "E", "x_h", "x_b", "x_d", "w1_h", "w1_o", "w1_i", "wg_h", "wg_o", "wg_i", "w2_h", "w2_o", "w2_i",
        "o_h", "o_b", "o_d",
    ]
)  # fmt: skip
def _forward(
    x, w1, wg, w2, b1, b2, o,
    H: "i32", B: "i32", E: "i32", x_h: "i64", x_b: "i64", x_d: "i64", w1_h: "i64", w1_o: "i64", w1_i: "i64",
    wg_h: "i64", wg_o: "i64", wg_i: "i64", w2_h: "i64", w2_o: "i64", w2_i: "i64", o_h: "i64", o_b: "i64", o_d: "i64",
    VALUE: tl.constexpr, A: tl.constexpr, B_: tl.constexpr, GATED: tl.constexpr, HAS_B1: tl.constexpr,
    HAS_B2: tl.constexpr, MEAN: tl.constexpr, W1_T: tl.constexpr, W2_T: tl.constexpr, EVEN: tl.constexpr, INNER: tl.constexpr,
    E_UNIT: tl.constexpr, D_UNIT: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BB: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:  # it touches no tensor before all work in front has ended, and what that wrote can be read
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    W1_UNIT: tl.constexpr = D_UNIT if W1_T else E_UNIT
    W2_UNIT: tl.constexpr = E_UNIT if W2_T else D_UNIT
    E *= E_UNIT
    x_h, x_b, o_h, o_b = x_h * D_UNIT, x_b * D_UNIT, o_h * D_UNIT, o_b * D_UNIT
    w1_h, w1_o, wg_h, wg_o = w1_h * W1_UNIT, w1_o * W1_UNIT, wg_h * W1_UNIT, wg_o * W1_UNIT
    w2_h, w2_o = w2_h * W2_UNIT, w2_o * W2_UNIT
    if INNER:
        x_d, w1_i, wg_i, w2_i, o_d = 1, 1, 1, 1, 1
    tiles = tl.cdiv(B, BB)
    pid = tl.program_id(0)
    first = (pid // tiles).to(tl.int64)
    rows = (pid % tiles) * BB + tl.arange(0, BB)
    live = rows < B
    d = tl.arange(0, BD)
    x += rows.to(tl.int64)[:, None] * x_b + d[None, :] * x_d
    acc = _zeros(BB, BD, PRECISION)
    for one in range(H if MEAN else 1):
        head = first + one
        acc = _forward_head(
            acc, _load(x + head * x_h, live, d < D, True, BD != D), w1 + head * w1_h, wg + head * wg_h,
            w2 + head * w2_h, b1 + head * E, E, w1_o, w1_i, wg_o, wg_i, w2_o, w2_i,
            VALUE, A, B_, GATED, HAS_B1, W1_T, W2_T, EVEN, D, BD, BE, PRECISION,
        )  # fmt: skip
        if HAS_B2:
            acc += tl.load(b2 + head * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if MEAN:
        acc = acc / H
    at = o + first * o_h + rows.to(tl.int64)[:, None] * o_b + d[None, :] * o_d
    tl.store(at, acc.to(o.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


# The copy engine gives zeros for what lies past B, D or E, and drops what is stored past B or D: nothing is masked.


@triton.jit(do_not_specialize=["B", "E"])
def _forward_boxed(
    x_desc, w1_desc, w2_desc, o_desc, B: "i32", E: "i32",
    VALUE: tl.constexpr, A: tl.constexpr, B_: tl.constexpr, HALVED: tl.constexpr, REGISTERS: tl.constexpr, BD: tl.constexpr,
    BB: tl.constexpr, BE: tl.constexpr, W2_FIRST: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tiles = tl.cdiv(B, BB)
    head = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * BB
    x = x_desc.load([head, row, 0]).reshape(BB, BD)
    if HALVED:
        x = (x * 0.5).to(x_desc.dtype)
    elif REGISTERS:
        x = _in_registers(x)
    acc = tl.zeros([BB, BD], tl.float32)
    for start in range(0, E, BE):
        if W2_FIRST:
            down = w2_desc.load([head, start, 0]).reshape(BE, BD)
            up = w1_desc.load([head, 0, start]).reshape(BD, BE)
        else:
            up = w1_desc.load([head, 0, start]).reshape(BD, BE)
            down = w2_desc.load([head, start, 0]).reshape(BE, BD)
        h = VALUE(tl.dot(x, up), A, B_)
        acc = tl.dot(h.to(x_desc.dtype), down, acc)
    o_desc.store([head, row, 0], acc.to(x_desc.dtype).reshape(1, BB, BD))


@triton.jit
def _in_registers(x):
    """x behind an instruction that the compiler does not see through: an operand in registers, which leaves shared memory free."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)


@triton.jit(do_not_specialize=["B", "E", "splits"])
def _hidden_boxed(
    x_desc, w1_desc, w2_desc, dy_desc, h_desc, dz_desc, B: "i32", E: "i32", splits: "i32",
    VALUE: tl.constexpr, DX: tl.constexpr, A: tl.constexpr, B_: tl.constexpr, BD: tl.constexpr, BB: tl.constexpr,
    BE: tl.constexpr, REGISTERS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """H = act(X W1) and dZ = act'(X W1) dY W2' of some rows, and of one of the ``splits`` of E."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    tiles = tl.cdiv(B, BB)
    head = pid // splits // tiles
    row = pid // splits % tiles * BB
    share = tl.cdiv(tl.cdiv(E, BE), splits) * BE
    first = pid % splits * share
    x = x_desc.load([head, row, 0]).reshape(BB, BD)
    dy = dy_desc.load([head, row, 0]).reshape(BB, BD)
    if REGISTERS:
        x = _in_registers(x)
        dy = _in_registers(dy)
    for start in range(first, tl.minimum(first + share, E), BE):
        z = tl.dot(x, w1_desc.load([head, 0, start]).reshape(BD, BE))
        dh = tl.dot(dy, tl.trans(w2_desc.load([head, start, 0]).reshape(BE, BD)))
        h_desc.store([head, row, start], VALUE(z, A, B_).to(x_desc.dtype).reshape(1, BB, BE))
        dz_desc.store([head, row, start], DX(z, dh, A, B_).to(x_desc.dtype).reshape(1, BB, BE))


@triton.jit
def _row_gradient(
    acc, x, dy, w1, wg, w2, b1, scale, E, w1_o, w1_i, wg_o, wg_i, w2_o, w2_i,
    VALUE: tl.constexpr, DX: tl.constexpr, A: tl.constexpr, B_: tl.constexpr, GATED: tl.constexpr, HAS_B1: tl.constexpr,
    MEAN: tl.constexpr, W1_T: tl.constexpr, W2_T: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + dX that one head gives to a tile of rows."""
    FULL: tl.constexpr = D == BD
    d = tl.arange(0, BD)
    d_live = d < D
    e = tl.arange(0, BE)
    wide = d.to(tl.int64)
    w1 = _weight_at(w1, wide, e, w1_o, w1_i, W1_T)
    w2 = _weight_at(w2, wide, e, w2_o, w2_i, not W2_T)
    if GATED:
        wg = _weight_at(wg, wide, e, wg_o, wg_i, W1_T)
    for start in range(0, E, BE):
        e_live = e < E - start
        up = _weight(w1, d_live, e_live, W1_T, False, EVEN, FULL)
        down = _weight(w2, d_live, e_live, not W2_T, False, EVEN, FULL)
        if GATED:
            gate = _weight(wg, d_live, e_live, W1_T, False, EVEN, FULL)
        z = _product(x, up, PRECISION)
        dh = _product(dy, down, PRECISION)
        if MEAN:
            dh *= scale
        if HAS_B1:
            z += tl.load(b1 + start + e, mask=e_live, other=0.0).to(tl.float32)[None, :]
        if GATED:
            g = _product(x, gate, PRECISION)
            dz = dh * VALUE(g, A, B_)
            dg = DX(g, dh * z, A, B_)
            acc = _dot(_operand(dg, x.dtype, PRECISION), tl.trans(gate), acc, PRECISION)
            wg += BE * (wg_o if W1_T else wg_i)
        else:
            dz = DX(z, dh, A, B_)
        acc = _dot(_operand(dz, x.dtype, PRECISION), tl.trans(up), acc, PRECISION)
        w1 += BE * (w1_o if W1_T else w1_i)
        w2 += BE * (w2_i if W2_T else w2_o)
    return acc


@triton.jit
def _weights_program(
    pid, x, w1, wg, w2, b1, dy, dw1, dwg, dw2, db1, db2, splits, H, B, E, x_h, x_b, x_d, w1_h, w1_o, w1_i, wg_h, wg_o,
    wg_i, w2_h, w2_o, w2_i, y_h, y_b, y_d, part, scale,
    VALUE: tl.constexpr, DX: tl.constexpr, A: tl.constexpr, B_: tl.constexpr, GATED: tl.constexpr, HAS_B1: tl.constexpr,
    WANT_W1: tl.constexpr, WANT_WG: tl.constexpr, WANT_W2: tl.constexpr, WANT_B1: tl.constexpr, WANT_B2: tl.constexpr,
    MEAN: tl.constexpr, W1_T: tl.constexpr, W2_T: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BB: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums over rows that belong to a tile of E of one head: dW1, dWg, dW2 and the biases'."""
    d = tl.arange(0, BD)
    d_live = d < D
    e = tl.arange(0, BE)
    b = tl.arange(0, BB)
    wide_b, wide_d = b.to(tl.int64), d.to(tl.int64)
    e_tiles = tl.cdiv(tl.maximum(E, 1), BE)  # without any hidden column b2 still has a gradient
    start = (pid % e_tiles) * BE
    head = (pid // e_tiles % H).to(tl.int64)
    split = (pid // e_tiles // H).to(tl.int64)
    e_live = e < E - start
    columns = head * E + start + e  # of all heads' hidden columns
    from_e = (start + e).to(tl.int64)
    w1 = _weight_at(w1 + head * w1_h, wide_d, from_e, w1_o, w1_i, W1_T)
    w2 = _weight_at(w2 + head * w2_h, wide_d, from_e, w2_o, w2_i, not W2_T)
    up = _weight(w1, d_live, e_live, W1_T, True, EVEN, D == BD)
    down = _weight(w2, d_live, e_live, not W2_T, True, EVEN, D == BD)
    if HAS_B1:
        bias = tl.load(b1 + columns, mask=e_live, other=0.0).to(tl.float32)
    if GATED:
        wg = _weight_at(wg + head * wg_h, wide_d, from_e, wg_o, wg_i, W1_T)
        gate = _weight(wg, d_live, e_live, W1_T, True, EVEN, D == BD)
    sum_w1 = _zeros(BE, BD, PRECISION)
    sum_wg = _zeros(BE, BD, PRECISION)
    sum_w2 = _zeros(BE, BD, PRECISION)
    sum_b1 = tl.zeros([BE], tl.float64 if PRECISION == "double" else tl.float32)
    sum_b2 = tl.zeros([BD], tl.float64 if PRECISION == "double" else tl.float32)
    tiles = tl.cdiv(B, BB)
    first = (split * tiles // splits).to(tl.int32) * BB
    last = ((split + 1) * tiles // splits).to(tl.int32) * BB
    x += head * x_h + first.to(tl.int64) * x_b + wide_b[:, None] * x_b + d[None, :] * x_d
    dy += head * y_h + first.to(tl.int64) * y_b + wide_b[:, None] * y_b + d[None, :] * y_d
    for row in range(first, last, BB):
        live = b < B - row
        rows = _load(x, live, d_live, True, BD != D)
        dys = _load(dy, live, d_live, True, BD != D)
        z = _product(up, tl.trans(rows), PRECISION)
        dh = _product(down, tl.trans(dys), PRECISION)
        if MEAN:
            dh *= scale
        if HAS_B1:
            z += bias[:, None]
        if GATED:
            g = _product(gate, tl.trans(rows), PRECISION)
            f = VALUE(g, A, B_)
            h = f * z
            dz = dh * f
            if WANT_WG:
                dg = _operand(DX(g, dh * z, A, B_), rows.dtype, PRECISION)
                sum_wg = _dot(dg, rows, sum_wg, PRECISION)
        else:
            h = VALUE(z, A, B_)
            dz = DX(z, dh, A, B_)
        if WANT_W2:
            sum_w2 = _dot(_operand(h, rows.dtype, PRECISION), dys, sum_w2, PRECISION)
        if WANT_W1:
            sum_w1 = _dot(_operand(dz, rows.dtype, PRECISION), rows, sum_w1, PRECISION)
        if WANT_B1:
            sum_b1 += tl.sum(dz, 1)
        if WANT_B2:
            sum_b2 += tl.sum(dys.to(sum_b2.dtype), 0)
        x += BB * x_b
        dy += BB * y_b
    if MEAN:
        sum_w2 *= scale
        sum_b2 *= scale
    store = e_live[None, :] & d_live[:, None]
    if WANT_W1:
        at = dw1 + split * part + head * (D * E) + wide_d[:, None] * E + from_e[None, :]
        tl.store(at, tl.trans(sum_w1).to(dw1.dtype.element_ty), mask=store)
    if WANT_WG:
        at = dwg + split * part + head * (D * E) + wide_d[:, None] * E + from_e[None, :]
        tl.store(at, tl.trans(sum_wg).to(dwg.dtype.element_ty), mask=store)
    if WANT_W2:
        at = dw2 + split * part + head * (D * E) + from_e[:, None] * D + d[None, :]
        tl.store(at, sum_w2.to(dw2.dtype.element_ty), mask=e_live[:, None] & d_live[None, :])
    if WANT_B1:
        tl.store(db1 + split * part + columns, sum_b1.to(db1.dtype.element_ty), mask=e_live)
    if WANT_B2 and start == 0:
        tl.store(db2 + split * part + head * D + d, sum_b2.to(db2.dtype.element_ty), mask=d_live)


@triton.jit
def _rows_program(
    pid, x, w1, wg, w2, b1, dy, dx, H, B, E, x_h, x_b, x_d, w1_h, w1_o, w1_i, wg_h, wg_o, wg_i, w2_h, w2_o, w2_i,
    y_h, y_b, y_d, dx_h, dx_b, dx_d, scale,
    VALUE: tl.constexpr, DX: tl.constexpr, A: tl.constexpr, B_: tl.constexpr, GATED: tl.constexpr, HAS_B1: tl.constexpr,
    SHARED: tl.constexpr, MEAN: tl.constexpr, W1_T: tl.constexpr, W2_T: tl.constexpr, EVEN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BB: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX of a tile of rows of one head, or of all heads where they share x."""
    d = tl.arange(0, BD)
    d_live = d < D
    b = tl.arange(0, BB)
    wide_b = b.to(tl.int64)
    tiles = tl.cdiv(B, BB)
    row = (pid % tiles) * BB
    first = (pid // tiles).to(tl.int64)
    live = b < B - row
    x += (row + wide_b)[:, None] * x_b + d[None, :] * x_d
    dy += (row + wide_b)[:, None] * y_b + d[None, :] * y_d
    acc = _zeros(BB, BD, PRECISION)
    rows = _load(x if SHARED else x + first * x_h, live, d_live, True, BD != D)
    for one in range(H if SHARED else 1):
        head = first + one
        acc = _row_gradient(
            acc, rows, _load(dy + head * y_h, live, d_live, True, BD != D), w1 + head * w1_h, wg + head * wg_h,
            w2 + head * w2_h, b1 + head * E, scale, E, w1_o, w1_i, wg_o, wg_i, w2_o, w2_i,
            VALUE, DX, A, B_, GATED, HAS_B1, MEAN, W1_T, W2_T, EVEN, D, BD, BE, PRECISION,
        )  # fmt: skip
    at = dx + first * dx_h + (row + wide_b)[:, None] * dx_b + d[None, :] * dx_d
    tl.store(at, acc.to(dx.dtype.element_ty), mask=live[:, None] & d_live[None, :])


@triton.jit(
    do_not_specialize=[
        "weight_programs", "splits", "H", "B", "E", "x_h", "x_b", "x_d", "w1_h", "w1_o", "w1_i", "wg_h", "wg_o", "wg_i",
        "w2_h", "w2_o", "w2_i", "y_h", "y_b", "y_d", "dx_h", "dx_b", "dx_d", "part", "scale",
    ]
)  # fmt: skip
def _backward(
    x, w1, wg, w2, b1, dy, dx, dw1, dwg, dw2, db1, db2,
    weight_programs: "i32", splits: "i32", H: "i32", B: "i32", E: "i32", x_h: "i64", x_b: "i64", x_d: "i64",
    w1_h: "i64", w1_o: "i64", w1_i: "i64", wg_h: "i64", wg_o: "i64", wg_i: "i64", w2_h: "i64", w2_o: "i64", w2_i: "i64",
    y_h: "i64", y_b: "i64", y_d: "i64", dx_h: "i64", dx_b: "i64", dx_d: "i64", part: "i64", scale: "fp32",
    VALUE: tl.constexpr, DX: tl.constexpr, A: tl.constexpr, B_: tl.constexpr, GATED: tl.constexpr, HAS_B1: tl.constexpr,
    WANT_X: tl.constexpr, WANT_W1: tl.constexpr, WANT_WG: tl.constexpr, WANT_W2: tl.constexpr, WANT_B1: tl.constexpr,
    WANT_B2: tl.constexpr, SHARED: tl.constexpr, MEAN: tl.constexpr, W1_T: tl.constexpr, W2_T: tl.constexpr,
    EVEN: tl.constexpr, INNER: tl.constexpr, E_UNIT: tl.constexpr, D_UNIT: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BB: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:  # it touches no tensor before all work in front has ended, and what that wrote can be read
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    W1_UNIT: tl.constexpr = D_UNIT if W1_T else E_UNIT
    W2_UNIT: tl.constexpr = E_UNIT if W2_T else D_UNIT
    E *= E_UNIT
    x_h, x_b, dx_h, dx_b = x_h * D_UNIT, x_b * D_UNIT, dx_h * D_UNIT, dx_b * D_UNIT
    y_h, y_b = y_h * D_UNIT, y_b * D_UNIT
    w1_h, w1_o, wg_h, wg_o = w1_h * W1_UNIT, w1_o * W1_UNIT, wg_h * W1_UNIT, wg_o * W1_UNIT
    w2_h, w2_o = w2_h * W2_UNIT, w2_o * W2_UNIT
    if INNER:
        x_d, w1_i, wg_i, w2_i, y_d, dx_d = 1, 1, 1, 1, 1, 1
    pid = tl.program_id(0)
    # with one kind of programs no question: in a branch the compiler spills where it does not outside of one
    WEIGHTS: tl.constexpr = WANT_W1 or WANT_WG or WANT_W2 or WANT_B1 or WANT_B2
    if WEIGHTS and (not WANT_X or pid < weight_programs):
        _weights_program(
            pid, x, w1, wg, w2, b1, dy, dw1, dwg, dw2, db1, db2, splits, H, B, E, x_h, x_b, x_d, w1_h, w1_o, w1_i,
            wg_h, wg_o, wg_i, w2_h, w2_o, w2_i, y_h, y_b, y_d, part, scale, VALUE, DX, A, B_, GATED, HAS_B1,
            WANT_W1, WANT_WG, WANT_W2, WANT_B1, WANT_B2, MEAN, W1_T, W2_T, EVEN, D, BD, BB, BE, PRECISION,
        )  # fmt: skip
    if WANT_X and (not WEIGHTS or pid >= weight_programs):
        _rows_program(
            pid - weight_programs, x, w1, wg, w2, b1, dy, dx, H, B, E, x_h, x_b, x_d, w1_h, w1_o, w1_i,
            wg_h, wg_o, wg_i, w2_h, w2_o, w2_i, y_h, y_b, y_d, dx_h, dx_b, dx_d, scale,
            VALUE, DX, A, B_, GATED, HAS_B1, SHARED, MEAN, W1_T, W2_T, EVEN, D, BD, BB, BE, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "n0", "n1", "n2", "n3", "n4"])
def _add_partials(
    partials, out0, out1, out2, out3, out4,
    splits: "i32", n0: "i64", n1: "i64", n2: "i64", n3: "i64", n4: "i64", BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Five sums over the splits, one behind the other in ``partials`` [splits, n0 + .. + n4]."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = n0 + n1 + n2 + n3 + n4
    live = i < total
    s = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        s += tl.load(partials + split * total + i, mask=live, other=0.0)
    y = s.to(out0.dtype.element_ty)
    tl.store(out0 + i, y, mask=i < n0)
    i -= n0
    tl.store(out1 + i, y, mask=(i >= 0) & (i < n1))
    i -= n1
    tl.store(out2 + i, y, mask=(i >= 0) & (i < n2))
    i -= n2
    tl.store(out3 + i, y, mask=(i >= 0) & (i < n3))
    i -= n3
    tl.store(out4 + i, y, mask=(i >= 0) & (i < n4))


# ---- the choice, the launches -----------------------------------------------------------------------------------------

_FORWARD = Launcher(_forward, tensors=7)
_BACKWARD = Launcher(_backward, tensors=12)
_ADD_PARTIALS = Launcher(_add_partials, tensors=6)
PARTIAL_BLOCK = 1024


class Config(NamedTuple):
    rows: int
    hidden: int  # columns of E
    num_warps: int
    num_stages: int


class BoxedConfig(NamedTuple):
    rows: int
    hidden: int  # columns of E
    num_warps: int
    num_stages: int
    w2_first: bool  # a tile of W2 is asked for before W1's


def _tile_of(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


def choose_forward(
    rows: int, d: int, itemsize: int, gated: bool, wide: bool = True, lanes: int = LANES, roomy: bool = True,
    few: bool = False,
) -> Config:  # fmt: skip
    """Tile of a forward program; ``rows`` is B, ``wide`` whether accesses are, ``roomy`` whether a program may have 160 KiB of
    shared memory; without, 99. ``few``: no more programs than two a multiprocessor, so that one's walk over a long E is what
    takes time. The fastest of up to fifteen tried."""
    width = _tile_of(d)
    if itemsize == 4:
        return Config(32 if width <= 64 else 16, 32 if width <= 128 else 16, 4, 2)
    most = max(16, triton.next_power_of_2(rows))
    if lanes == 64:  # half the shared memory, twice the threads a warp
        return Config(min(64, most), 32, 4, 1)
    if not roomy and width == 256:
        return Config(min(64, most), 32, 8, 2)
    if width == 128 and gated and not (few and roomy):
        # two programs a multiprocessor, where three stages leave room for one
        return Config(min(64, most), 64, 4 if wide else 8, 2)
    if width == 64 and few and wide and roomy and not gated and rows >= 64:
        return Config(64, 128, 4, 3)
    if width <= 128:
        return Config(min(64, most), 64, 4 if wide or width <= 64 else 8, 3)
    return Config(min(128, most), 32 if gated else 64, 8, 2)


def choose_boxed(
    config: Config, heads: int, rows: int, d: int, itemsize: int, layout: "Layout", processors: int
) -> BoxedConfig | None:
    """Tile of a plain forward program whose tiles Hopper's copy engine fetches, None for those that go by pointers, for which
    ``config`` is chosen: M-6 233.8 us for 269.8; at D = 64 (M-4) it gains nothing, and of 80 columns it copies 128 (39.0 us for 33.2).
    Rows have to begin at multiples of 16 bytes, and tensor cores want 64 of them.

    Beyond D = 128 X stays in registers, in tiles so small that there is room for it. Two such programs fill a multiprocessor (M-7
    236.6 us; of 128 x 64, by one, 255.9; by pointers 264), one that has it for itself fetches further ahead ((4, 1024, 256, 512) 11.0
    us, as those of two 13.5).

    W2 first, two cards: M-6, 15 programs a multiprocessor, 231.0 us for 236.4 and 240.5 for 246.8; with one (1, 8192, 128, 2048) 21.0 for
    19.0, (4, 2048, 128, 512) 8.2 for 7.2. From four on, between the two, by no measurement."""
    if itemsize != 2 or d < 128 or config.rows < 64 or not layout.in_boxes:
        return None
    if _tile_of(d) == 128:
        return BoxedConfig(*config, w2_first=-(-rows // config.rows) * heads >= 4 * processors)
    return BoxedConfig(64, 32, 4, 5 if -(-rows // 64) * heads <= processors else 3, w2_first=False)


def choose_backward(
    rows: int, d: int, itemsize: int, gated: bool, wide: bool = True, lanes: int = LANES, roomy: bool = True
) -> Config:
    """Tile of both kinds of backward programs. At D = 128 four warps spill 232 bytes a thread, and are the fastest (M-6)."""
    width = _tile_of(d)
    if itemsize == 4:
        return Config(16, 16, 4 if width <= 64 else 8, 1)
    most = max(16, triton.next_power_of_2(rows))
    if lanes == 64:
        return Config(min(32, most), 32, 4, 1)
    if width <= 64:
        return Config(min(64, most), 32 if gated else 64, 4, 3)
    if width == 128:
        return Config(min(64, most), 32, 8, 2) if gated else Config(min(64, most), 64, 4 if wide else 8, 2)
    return Config(min(32, most), 32, 8, 1) if gated or not roomy else Config(min(64, most), 64, 8, 1)


# Each gradient in a launch of its own, at D above 128: 8 products where one launch for all has 7, but tiles that fit the
# registers. A program fills a multiprocessor. M-7: rows 519 us, dW1 515, dW2 262, all in one launch 2248.
APART = {"x": Config(128, 32, 8, 2), "w1": Config(32, 128, 8, 2), "w2": Config(32, 128, 8, 3)}
APART_KIB = 227  # of shared memory: sm_90 and sm_100


def choose_apart(rows: int, heads: int, d: int, itemsize: int, plain: bool, processors: int, kib: int) -> bool:
    """Whether the launches are apart. ``heads``: that have a dX of their own; ``plain``: wide accesses, no gate, no gradient of
    a bias. M-7 has 1024 programs for dX; where there are 32 (4 heads of 1024 rows) one launch is the faster."""
    fits = itemsize == 2 and _tile_of(d) == 256 and plain and LANES == 32 and kib >= APART_KIB
    return fits and -(-rows // APART["x"].rows) * heads >= 2 * processors


def choose_splits(
    programs: int, rows: int, tile: int, weight_elements: int, dy_bytes: int, processors: int, alone: bool = False
) -> int:
    """Among how many programs the rows of one tile of E are split, while partial sums fit dY's size: two a processor, or if one
    fills it (``alone``) as many as make the least time, which goes by full rounds of programs."""
    programs = max(1, programs)
    most = min(-(-rows // tile), dy_bytes // (4 * max(1, weight_elements)), -(-2 * processors // programs))
    if alone and most > 1:
        return min(range(1, most + 1), key=lambda splits: (-(-programs * splits // processors) / splits, splits))
    return max(1, most)


def unsupported(x: torch.Tensor, w1: torch.Tensor, *rest) -> str | None:
    if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        return f"needs a GPU tensor, got {x.device.type}"
    if x.dtype not in DTYPES:
        return f"has no kernel for {x.dtype}"
    if x.shape[-1] > MOST_D:
        return f"keeps whole rows of x in a tile: D is at most {MOST_D}, got {x.shape[-1]}"
    return None


@functools.cache
def forward_launch(
    kind: str, dtype: torch.dtype, gated: bool, has_b1: bool, has_b2: bool, mean: bool, even: bool, layout: "Layout",
    d: int, config: Config, precision: str | None, lanes: int = LANES, dependent: bool = False,
) -> Launch:  # fmt: skip
    value, _, a, b = formula(kind, dtype, lanes)
    return _FORWARD.bind(
        num_warps=config.num_warps, num_stages=config.num_stages,
        VALUE=value, A=a, B_=b, GATED=gated, HAS_B1=has_b1, HAS_B2=has_b2, MEAN=mean, W1_T=layout.w1_transposed,
        W2_T=layout.w2_transposed, EVEN=even, INNER=layout.inner, E_UNIT=layout.e_unit, D_UNIT=layout.d_unit,
        D=d, BD=_tile_of(d), BB=config.rows, BE=config.hidden, PRECISION=precision, DEPENDENT=dependent, launch_pdl=dependent,
    )  # fmt: skip


@functools.cache
def backward_launch(
    kind: str, dtype: torch.dtype, gated: bool, has_b1: bool, want_x: bool, wanted: tuple, shared: bool, mean: bool,
    even: bool, layout: "Layout", d: int, config: Config, precision: str | None, lanes: int = LANES, dependent: bool = False,
) -> Launch:  # fmt: skip
    """``wanted``: of W1, the gate's weight, W2, b1, b2."""
    value, dx, a, b = formula(kind, dtype, lanes)
    want = dict(zip(("WANT_W1", "WANT_WG", "WANT_W2", "WANT_B1", "WANT_B2"), wanted, strict=True))
    return _BACKWARD.bind(
        num_warps=config.num_warps, num_stages=config.num_stages,
        VALUE=value, DX=dx, A=a, B_=b, GATED=gated, HAS_B1=has_b1, WANT_X=want_x, **want, SHARED=shared, MEAN=mean,
        W1_T=layout.w1_transposed, W2_T=layout.w2_transposed, EVEN=even, INNER=layout.inner, E_UNIT=layout.e_unit, D_UNIT=layout.d_unit,
        D=d, BD=_tile_of(d), BB=config.rows, BE=config.hidden, PRECISION=precision, DEPENDENT=dependent, launch_pdl=dependent,
    )  # fmt: skip


@functools.cache
def partials_launch(dependent: bool = False) -> Launch:
    return _ADD_PARTIALS.bind(num_warps=4, BLOCK=PARTIAL_BLOCK, DEPENDENT=dependent, launch_pdl=dependent)


EARLY = True  # where the card can, kernels are launched before the one in front has ended


def _dependent(index: int) -> bool:
    return EARLY and index >= 0 and norm.dependent_launch(index)


@functools.cache
def _card(index: int) -> tuple[int, int, bool]:
    """(multiprocessors, KiB of shared memory that a program may have, whether Triton multiplies float64 on tensor cores)."""
    if index < 0:
        return 1, 227, False
    facts = torch.cuda.get_device_properties(index)
    double = torch.version.hip is None and (facts.major, facts.minor) in ((8, 0), (9, 0))
    return facts.multi_processor_count, getattr(facts, "shared_memory_per_block_optin", 0) // 1024, double


def precision_of(dtype: torch.dtype, double: bool) -> str | None:
    """How float32 is multiplied: "double", all of it float64 up to the last rounding, or "ieee", sums of 32 terms in float32."""
    return None if dtype != torch.float32 else "double" if double else "ieee"


ROOMY_KIB = 160


class Layout(NamedTuple):
    """What the kernels are told at compile time of where their tensors lie."""

    inner: bool  # all inner strides are 1
    e_unit: int  # the common divisor in which E and the outer strides of what is read along E are counted
    d_unit: int  # the same of what is read along D
    w1_transposed: bool
    w2_transposed: bool

    @property
    def wide(self) -> bool:
        return self.e_unit > 1 and self.d_unit > 1

    @property
    def in_boxes(self) -> bool:
        """Whether the copy engine reads these tensors, if none of their rows is repeated."""
        return self.wide and not (self.w1_transposed or self.w2_transposed)


def layout_of(itemsize: int, e: int, strides: tuple) -> tuple[Layout, tuple]:
    """(the layout, all strides in the kernel's order and units) for the strides of x, W1, the gate's weight, W2 and others."""
    x, w1, wg, w2, *others = strides
    turned = [s[2] != 1 and s[1] == 1 for s in (w1, w2)]
    w1, wg = ((s[0], s[2], s[1]) if turned[0] else s for s in (w1, wg))
    w2 = (w2[0], w2[2], w2[1]) if turned[1] else w2
    ordered = (x, w1, wg, w2, *others)
    along_e = (False, not turned[0], not turned[0], turned[1], *[False] * len(others))
    inner = all(s[2] == 1 for s in ordered)

    def unit(*numbers):
        wide = 16 // itemsize
        return 1 if not inner or any(n % wide for n in numbers) else wide

    e_unit = unit(e, *(n for s, along in zip(ordered, along_e, strict=True) for n in s[:2] if along))
    d_unit = unit(*(n for s, along in zip(ordered, along_e, strict=True) for n in s[:2] if not along))
    units = [e_unit if along else d_unit for along in along_e]
    scaled = tuple(n for s, one in zip(ordered, units, strict=True) for n in (s[0] // one, s[1] // one, s[2]))
    return Layout(inner, e_unit, d_unit, *turned), scaled


def _strides(t: torch.Tensor | None, like: torch.Tensor | None = None) -> tuple[int, int, int]:
    """(head, row, column), of an absent tensor strides that stand in no way."""
    if t is None:
        return (0, 0, 1) if like is None or like.stride(2) == 1 or like.stride(1) != 1 else (0, 1, 0)
    s = t.stride()
    return s if len(s) == 3 else (0, *s)


def _forward_config(h, b, d, e, itemsize, gated, wide, mean, index) -> Config:
    processors, kib, _ = _card(index)
    few = e >= 512 and not mean and -(-b // 64) * h <= 2 * processors
    return choose_forward(b, d, itemsize, gated, wide, roomy=kib >= ROOMY_KIB, few=few)


@functools.cache
def _takes_boxes(index: int) -> bool:
    return index >= 0 and torch.version.hip is None and torch.cuda.get_device_capability(index) == (9, 0)


def boxed_constants(kind: str, dtype: torch.dtype, d: int, config: BoxedConfig, dependent: bool) -> dict:
    value, _, a, b = formula(kind, dtype, LANES)
    halved = kind in OF_HALF and not INTERPRETED
    return {
        "VALUE": OF_HALF[kind] if halved else value, "A": a, "B_": b, "HALVED": halved,
        "REGISTERS": _tile_of(d) == 256 and not INTERPRETED, "BD": _tile_of(d), "BB": config.rows, "BE": config.hidden,
        "W2_FIRST": config.w2_first, "DEPENDENT": dependent,
    }  # fmt: skip


def boxed_blocks(d: int, config: BoxedConfig) -> tuple:
    """What a program reads of x, W1 and W2 at a time, and writes of O."""
    rows, hidden, width = config.rows, config.hidden, _tile_of(d)
    return (rows, width), (width, hidden), (hidden, width), (rows, width)


class _BoxedLaunch:
    """A kernel whose tensors are all read and written in boxes, launched on tensors that lie as those of its first call."""

    def __init__(self, kernel, blocks, integers, constants, config):
        self.call = kernel, blocks, integers, constants
        self.config = config
        self.options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        if constants["DEPENDENT"]:
            self.options["launch_pdl"] = True
        self.boxed = None

    def launch(self, programs, *tensors):
        if self.boxed is None:
            from trinix.kernels._binary import Boxed  # where Triton has no part for NVIDIA, nobody comes here

            kernel, blocks, integers, constants = self.call
            self.boxed = Boxed(kernel, tensors, blocks, programs, integers, constants, gluon=False, **self.options)
        self.boxed(*tensors)


class _BoxedForward(_BoxedLaunch):
    """A plan of ``_forward_boxed``; launched as a ``Launch`` of ``_forward`` is."""

    def __init__(self, kind, dtype, b, d, e, config, index):
        constants = boxed_constants(kind, dtype, d, config, _dependent(index))
        super().__init__(_forward_boxed, boxed_blocks(d, config), (b, e), constants, config)

    def __call__(self, programs, tensors, scalars):
        x, w1, _, w2, _, _, o = tensors
        self.launch(programs, x, w1, w2, o)


def _none_repeated(*strides) -> bool:
    """Not x for all heads, nor a row that is repeated."""
    return all(s[0] > 0 and s[1] > 0 for s in strides)


# H and dZ in tiles of 128 rows, M-7 392 us; 128 x 128 of a whole product, 3 stages: 398 (persistent), 461, by pointers 486
STAGED = Config(128, 64, 8, 3)


def hidden_constants(kind: str, dtype: torch.dtype, dependent: bool) -> dict:
    value, dx, a, b = formula(kind, dtype, LANES)
    return {
        "VALUE": value, "DX": dx, "A": a, "B_": b, "BD": 256, "BB": STAGED.rows, "BE": STAGED.hidden,
        "REGISTERS": not INTERPRETED, "DEPENDENT": dependent,
    }  # fmt: skip


def hidden_blocks() -> tuple:
    """What a program reads of x, W1, W2 and dY at a time, and writes of H and dZ."""
    rows, hidden = STAGED.rows, STAGED.hidden
    return (rows, 256), (256, hidden), (hidden, 256), (rows, 256), (rows, hidden), (rows, hidden)


@functools.lru_cache(maxsize=1024)
def _hidden_plan(kind, dtype, heads, b, d, e, splits, strides, index) -> tuple[_BoxedLaunch, int]:
    """(a plan of ``_hidden_boxed``, programs); by ``d`` and the ``strides`` of x, w1, w2, dy the tensors' descriptors differ."""
    constants = hidden_constants(kind, dtype, _dependent(index))
    plan = _BoxedLaunch(_hidden_boxed, hidden_blocks(), (b, e, splits), constants, STAGED)
    return plan, heads * -(-b // STAGED.rows) * splits


@functools.lru_cache(maxsize=4096)
def _describable(itemsize, e, x, w1, w2) -> bool:
    """Whether the copy engine reads tensors of these strides."""
    return _none_repeated(x, w1, w2) and layout_of(itemsize, e, (x, w1, (0, 0, 1), w2))[0].in_boxes


def by_stages(x, w1, w2, b1, b2, w_gate, mean: bool) -> bool:
    """Whether backward of a call goes by stages."""
    d, e = w1.shape[1:]
    return (
        x.dim() == 3 and x.dtype.itemsize == 2 and _tile_of(d) == 256 and e > 0 and not mean
        and b1 is None and b2 is None and w_gate is None
        and _takes_boxes(x.get_device()) and not _State.off
        and not (x.data_ptr() | w1.data_ptr() | w2.data_ptr()) & 15
        and _describable(x.dtype.itemsize, e, x.stride(), w1.stride(), w2.stride())
    )  # fmt: skip


def _backward_by_stages(x, w1, w2, dy, kind, wanted):
    h, d, e = w1.shape
    b, index = x.shape[1], x.get_device()
    if dy.data_ptr() & 15 or not _describable(x.dtype.itemsize, e, dy.stride(), w1.stride(), w2.stride()):
        # not contiguous(), which gives a dense gradient at an odd address, as of torch.cat, back as it is
        dy = dy.clone(memory_format=torch.contiguous_format)
    chunk, portion, splits = _stages.choose(b, h, d, e, _card(index)[0], (STAGED.rows, STAGED.hidden))

    def hidden(*tensors):
        strides = tuple(t.stride() for t in tensors[:4])
        heads, rows = tensors[0].shape[:2]
        plan, programs = _hidden_plan(kind, x.dtype, heads, rows, d, e, splits, strides, index)
        plan.launch(programs, *tensors)

    return _stages.backward(x, w1, w2, dy, wanted, chunk, portion, hidden)


@functools.lru_cache(maxsize=4096)
def _forward_plan(kind, dtype, h, b, d, e, gated, has_b1, has_b2, mean, strides, index, describable):
    """(launch, blocks, scalars) of a forward call; ``strides`` of x, w1, w_gate, w2, o; ``describable``: fast launches are on,
    which descriptors need, and all tensors begin at multiples of 16 bytes."""
    boxed = describable and not (gated or has_b1 or has_b2 or mean) and _takes_boxes(index)
    x, w1, _, w2, o = strides
    boxed = boxed and _none_repeated(x, w1, w2, o)
    layout, strides = layout_of(dtype.itemsize, e, strides)
    config = _forward_config(h, b, d, e, dtype.itemsize, gated, layout.wide, mean, index)
    in_boxes = choose_boxed(config, h, b, d, dtype.itemsize, layout, _card(index)[0]) if boxed and e else None
    if in_boxes:
        return _BoxedForward(kind, dtype, b, d, e, in_boxes, index), -(-b // in_boxes.rows) * h, ()
    precision = precision_of(dtype, _card(index)[2])
    even = e % config.hidden == 0
    blocks = -(-b // config.rows) * (1 if mean else h)
    launch = forward_launch(
        kind, dtype, gated, has_b1, has_b2, mean, even, layout, d, config, precision, LANES, _dependent(index)
    )
    return launch, blocks, (h, b, e // layout.e_unit, *strides)


def _pointers(x, e, *tensors):
    """x and the tensors, x again in the place of those that are absent, or without hidden columns empty: never read."""
    if e:
        return x, *[x if t is None else t for t in tensors]
    return x, *[x if t is None or not t.numel() else t for t in tensors]


def empty_output(x: torch.Tensor, w1: torch.Tensor, mean: bool) -> torch.Tensor:
    if x.dim() == 3 and not mean:
        return torch.empty_like(x)
    return x.new_empty(x.shape[-2:] if mean else (w1.shape[0], *x.shape))


def _plan_of(x, w1, w2, b1, b2, w_gate, kind, mean, o):
    h, d, e = w1.shape
    return _forward_plan(
        kind, x.dtype, h, x.shape[-2], d, e, w_gate is not None, b1 is not None, b2 is not None, mean,
        (_strides(x), w1.stride(), _strides(w_gate, w1), w2.stride(), _strides(o)), x.get_device(),
        not _State.off and not (x.data_ptr() | w1.data_ptr() | w2.data_ptr()) & 15,
    )  # fmt: skip


def forward(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, b1: torch.Tensor | None, b2: torch.Tensor | None,
    w_gate: torch.Tensor | None, kind: str, mean: bool,
) -> torch.Tensor:  # fmt: skip
    """O, laid out as x where it has x's shape."""
    o = empty_output(x, w1, mean)
    if not o.numel():
        return o
    b1 = None if b1 is None else b1.contiguous()
    b2 = None if b2 is None else b2.contiguous()
    launch, blocks, scalars = _plan_of(x, w1, w2, b1, b2, w_gate, kind, mean, o)
    launch(blocks, _pointers(x, w1.shape[2], w1, w_gate, w2, b1, b2, o), scalars)
    return o


@functools.lru_cache(maxsize=4096)
def _backward_plan(kind, dtype, h, b, d, e, gated, has_b1, want_x, wanted, shared, mean, strides, index):
    """The launches of a backward call."""
    layout, strides = layout_of(dtype.itemsize, e, strides)
    processors, kib, double = _card(index)
    wide = layout.wide
    plain = wide and not gated and not any(wanted[3:])
    alone = choose_apart(b, 1 if shared else h, d, dtype.itemsize, plain, processors, kib)
    parts = [(choose_backward(b, d, dtype.itemsize, gated, wide, roomy=kib >= ROOMY_KIB), want_x, wanted)]
    if alone:
        nothing = (False,) * 5
        parts = [(APART["x"], True, nothing)] if want_x else []
        parts += [(APART["w1"], False, (True, *nothing[1:]))] if wanted[0] else []
        parts += [(APART["w2"], False, (False, False, True, False, False))] if wanted[2] else []
    launches = []
    for config, with_x, of_weights in parts:
        even = e > 0 and e % config.hidden == 0  # a weights program runs for b2 without any column to read
        launch = backward_launch(
            kind, dtype, gated, has_b1, with_x, of_weights, shared, mean, even, layout, d, config, precision_of(dtype, double),
            LANES, _dependent(index),
        )  # fmt: skip
        programs = h * -(-max(e, 1) // config.hidden) if any(of_weights) else 0
        elements = h * d * e * sum(of_weights[:3]) + h * e * of_weights[3] + h * d * of_weights[4]
        dy_bytes = b * d * dtype.itemsize * (1 if mean else h)
        splits = choose_splits(programs, b, config.rows, elements, dy_bytes, processors, alone)
        rows = -(-b // config.rows) * (1 if shared else h) if with_x else 0
        scalars = (programs * splits, splits, h, b, e // layout.e_unit, *strides)
        launches.append((launch, programs * splits + rows, splits, scalars, of_weights))
    return tuple(launches)


def backward(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, b1: torch.Tensor | None, b2: torch.Tensor | None,
    w_gate: torch.Tensor | None, dy: torch.Tensor, kind: str, mean: bool, wanted: tuple,
) -> list[torch.Tensor | None]:  # fmt: skip
    """The gradients of (x, w1, w2, b1, b2, w_gate), None where ``wanted`` says so."""
    h, d, e = w1.shape
    b = x.shape[-2]
    want_x, want_w1, want_w2, want_b1, want_b2, want_wg = wanted
    if by_stages(x, w1, w2, b1, b2, w_gate, mean) and x.numel():
        return [*_backward_by_stages(x, w1, w2, dy, kind, wanted[:3]), None, None, None]
    b1 = None if b1 is None else b1.contiguous()
    dx = torch.empty_like(x) if want_x else None
    shapes = ((h, d, e), (h, d, e), (h, e, d), (h, e), (h, d))
    of_weights = (want_w1, want_wg, want_w2, want_b1, want_b2)
    new = w1.new_empty if d else w1.new_zeros  # without any column of X no kernel runs
    sums = [new(s) if want else None for s, want in zip(shapes, of_weights, strict=True)]
    y = _strides(dy) if dy.dim() == 3 else (0, *dy.stride())
    launches = _backward_plan(
        kind, x.dtype, h, b, d, e, w_gate is not None, b1 is not None, want_x, of_weights, x.dim() == 2, mean,
        (_strides(x), w1.stride(), _strides(w_gate, w1), w2.stride(), y, _strides(dx)),
        x.get_device(),
    )  # fmt: skip
    for launch, blocks, splits, scalars, wanted_here in launches:
        into = [t if want else None for t, want in zip(sums, wanted_here, strict=True)]
        counts = [0 if t is None else t.numel() for t in into]
        outputs, total = into, sum(counts)
        if splits > 1:
            partials = torch.empty(splits * total, dtype=torch.float32, device=x.device)
            into, at = [], 0
            for count in counts:
                into.append(partials[at:] if count else None)
                at += count
        if blocks and d:
            arguments = (*scalars, total, 1.0 / h if mean and h else 1.0)
            launch(blocks, _pointers(x, e, w1, w_gate, w2, b1, dy, dx, *into), arguments)
        if splits > 1 and total:
            outputs = tuple([x if t is None else t for t in outputs])
            add = partials_launch(_dependent(x.get_device()))
            add(-(-total // PARTIAL_BLOCK), (partials, *outputs), (splits, *counts))
        partials = into = None  # before the next launch's are made: of one at a time there is memory
    dw1, dwg, dw2, db1, db2 = sums
    return [dx, dw1, dw2, db1, db2, dwg]


def describe(x, w1, w2, b1, b2, w_gate, kind: str, mean: bool) -> str:
    """The configuration of a forward call, for ``trinix.explain``."""
    h, d, e = w1.shape
    gated = w_gate is not None
    like = torch.empty_like(x, device="meta")  # laid out as O is, where descriptors come in question
    launch = _plan_of(x, w1, w2, b1, b2, w_gate, kind, mean, like)[0]
    boxed = isinstance(launch, _BoxedForward)
    strides = _strides(x), w1.stride(), _strides(w_gate, w1), w2.stride(), _strides(like)
    wide = layout_of(x.dtype.itemsize, e, strides)[0].wide
    config = _forward_config(h, x.shape[-2], d, e, x.dtype.itemsize, gated, wide, mean, x.get_device())
    config = launch.config if boxed else config
    text = f"tile {config.rows} rows x {config.hidden} hidden, {config.num_warps} warps, {config.num_stages} stages"
    return f"{text}, by tensor descriptors" if boxed else text


def compile_cases(lanes: int = LANES):
    """Every kind at D = 64 in bfloat16; the widths, gates, transposed weights and odd sizes in silu; silu in other dtypes."""
    b = 2048

    def pair(name, kind, d, dtype, gated=False, bias=False, mean=False, w_transposed=False, even=True, roomy=True):
        """Forward's case and backward's."""
        precision = precision_of(dtype, False)
        suffix, unit = str(dtype).removeprefix("torch."), 16 // dtype.itemsize
        layout = Layout(True, unit if even else 1, 1 if d % unit else unit, w_transposed, w_transposed)
        t, wanted = POINTERS[suffix], (True, gated, True, bias, bias)
        config = choose_forward(b, d, dtype.itemsize, gated, even, lanes, roomy)
        fwd = forward_launch(kind, dtype, gated, bias, bias, mean, even, layout, d, config, precision, lanes)
        config = choose_backward(b, d, dtype.itemsize, gated, even, lanes, roomy)
        bwd = backward_launch(
            kind, dtype, gated, bias, True, wanted, mean, mean, even, layout, d, config, precision, lanes
        )
        # an odd D leaves accesses of one element; narrow tiles and AMD's stores of products are no wider than this
        bits = 8 * dtype.itemsize if d % unit else 32 if d < 64 else 64
        yield compile_case(f"head_mlp/{name}/fwd/{suffix}", fwd, 0.0, (t,) * 7, (), bits)
        yield compile_case(f"head_mlp/{name}/bwd/{suffix}", bwd, 0.0, (t,) * 12, (), bits)

    for kind in ("none", *activation.FORMULAS):
        yield from pair(kind, kind, 64, torch.bfloat16)
    for d in (16, 128, 256):
        yield from pair(f"silu-{d}", "silu", d, torch.bfloat16)
    for d in (64, 128, 256):
        yield from pair(f"silu-gated-{d}", "silu", d, torch.bfloat16, gated=True)
    for gate in ("", "gated-"):
        yield from pair(f"silu-{gate}256-99k", "silu", 256, torch.bfloat16, gated=bool(gate), roomy=False)
    yield from pair("silu-bias-mean", "silu", 64, torch.bfloat16, bias=True, mean=True)
    yield from pair("silu-transposed", "silu", 64, torch.bfloat16, w_transposed=True)
    for name, d in (("odd", 80), ("odd-32", 32), ("odd-both", 81)):
        yield from pair(f"silu-{name}", "silu", d, torch.bfloat16, even=False)
    yield from pair("silu", "silu", 64, torch.float16)
    for d in (64, 128, 256):
        yield from pair(f"silu-{d}", "silu", d, torch.float32)
    yield compile_case("head_mlp/add-partials/bwd/float32", partials_launch(), 0.0, ("*fp32",) * 6, (), 32)
