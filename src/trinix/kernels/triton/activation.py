"""Portable Triton activations: one flat kernel and one strided kernel a pass, the formula is a constexpr.

All arithmetic is float32, whatever the tensors hold. The flat kernels walk memory in storage order, so any dense tensor
(contiguous, channels-last, transposed) is one straight run; the strided kernels walk [rows, columns] tiles.

Floor: forward 2 * itemsize bytes an element, backward 3 * itemsize; relu with its mask 2 * itemsize + 1/8 both ways.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trinix.kernels.triton._compile import POINTERS, compile_case
from trinix.kernels.triton._launch import (
    INTERPRETED,
    Launch,
    Launcher,
    Repeated,
    by_table,  # noqa: F401  (the op's)
)

# ---- formulas: value(x) and dx(x, dy), float32 in and out; a, b are the kind's parameters ------------------------------


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _relu(x, a, b):
    return tl.where(x <= 0, 0.0, x)  # not max(x, 0): NaN has to pass


@triton.jit
def _relu_dx(x, dy, a, b):
    return tl.where(x <= 0, 0.0, dy)


@triton.jit
def _logistic(x, a, b):
    return _sigmoid(x)


@triton.jit
def _logistic_dx(x, dy, a, b):
    s = _sigmoid(x)
    return dy * s * (1.0 - s)


@triton.jit
def _silu(x, a, b):
    return x * _sigmoid(x)


@triton.jit
def _silu_dx(x, dy, a, b):
    s = _sigmoid(x)
    return dy * s * (1.0 + x * (1.0 - s))


@triton.jit
def _gelu(x, a, b):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_dx(x, dy, a, b):
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    pdf = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return dy * (cdf + x * pdf)


@triton.jit
def _normal_half(x):
    """P(Z < x), Z normal, by one exp2: log2 P(Z > |x|) is a polynomial for |x| <= 6 (P's relative error is below 7e-6, enough
    for half types); beyond, it falls to -inf by its leading coefficients, NaN passes.
    """
    z = tl.abs(x)
    p = 0.008507891528783888 + z * (-0.0009305249869068311 + z * (6.159830960244461e-05 - z * 1.8348121431769063e-06))
    p = -1.1512510457581662 + z * (-0.45846439175153286 + z * (-0.05396007053052453 + z * p))
    tail = tl.exp2(-0.9999952944463834 + z * p)
    return tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def _gelu_half(x, a, b):
    return x * _normal_half(x)


@triton.jit
def _gelu_half_dx(x, dy, a, b):
    return dy * (_normal_half(x) + x * (0.3989422804014327 * tl.exp(-0.5 * x * x)))


@triton.jit
def _gelu_tanh(x, a, b):
    # 0.5 (1 + tanh u) = sigmoid(2u): no overflow, and no cancellation for x << 0
    return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _gelu_tanh_dx(x, dy, a, b):
    # beyond |x| = 9.8 the derivative is 0 or 1 in float32; the clamp keeps exp finite, so that 1 - s = e s without
    # cancellation. where(), not clamp(): NaN has to pass
    x = tl.where(x > 9.8, 9.8, tl.where(x < -9.8, -9.8, x))
    e = tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x))
    s = 1.0 / (1.0 + e)
    slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return dy * (s + x * slope * (e * s) * s)


@triton.jit
def _quick_gelu(x, a, b):
    return x * _sigmoid(1.702 * x)


@triton.jit
def _quick_gelu_dx(x, dy, a, b):
    s = _sigmoid(1.702 * x)
    return dy * (s + x * (1.702 * s * (1.0 - s)))  # s (1 - s) first: 1.702 x may overflow


@triton.jit
def _squared_relu(x, a, b):
    return tl.where(x <= 0, 0.0, x * x)


@triton.jit
def _squared_relu_dx(x, dy, a, b):
    return tl.where(x <= 0, 0.0, 2.0 * (x * dy))  # 2 x may overflow


@triton.jit
def _mish(x, a, b):
    # tanh(log(1 + e)) = n / (n + 2) with e = exp(x), n = e (e + 2): one exp, one division; 1 in float32 from x = 20 on
    e = tl.exp(tl.where(x > 20.0, 20.0, x))
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


@triton.jit
def _mish_dx(x, dy, a, b):
    x = tl.where(x > 20.0, 20.0, x)
    e = tl.exp(x)
    n = e * (e + 2.0)
    r = 1.0 / (n + 2.0)
    return dy * (n * r + x * (4.0 * (e * (e + 1.0) * r) * r))


@triton.jit
def _leaky_relu(x, a, b):
    return tl.where(x > 0, x, a * x)


@triton.jit
def _leaky_relu_dx(x, dy, a, b):
    return tl.where(x > 0, dy, a * dy)


@triton.jit
def tanh_from(x, far):
    """tanh x; ``far``: its size as (1 - e) / (1 + e), e = exp(-2 |x|)."""
    far = tl.where(x < 0, -far, far)
    # 1 - e cancels near 0: there an odd polynomial, relative error below 4e-8 for |x| < 0.55
    u = x * x
    p = -0.05391069905793123 + u * (0.02131609018225192 - u * 0.0066212847471014535)
    near = x + x * u * (-0.33333332081384404 + u * (0.133331214435843 + u * p))
    return tl.where(tl.abs(x) < 0.55, near, far)


@triton.jit
def _tanh(x, a, b):
    e = tl.exp(-2.0 * tl.abs(x))
    return tanh_from(x, (1.0 - e) / (1.0 + e))


@triton.jit
def _tanh_dx(x, dy, a, b):
    e = tl.exp(-2.0 * tl.abs(x))
    h = 2.0 * e / (1.0 + e)  # 1 - |tanh x|; its rounding error vanishes from h (2 - h) near x = 0
    return dy * (h * (2.0 - h))


@triton.jit
def _softplus(x, a, b):
    # log1p(e) = 2 atanh(s), s = e / (2 + e) in (0, 1/3]: relative accuracy for x << 0, where log(1 + e) gives 0
    z = x * a
    e = tl.exp(-tl.abs(z))
    s = e / (2.0 + e)
    u = s * s
    p = 0.4002511425427157 + u * (0.279576667899683 + u * 0.2819154276246343)
    p = 2.000000008078691 + u * (0.666663101464273 + u * p)
    near = (tl.where(z <= 0, 0.0, z) + s * p) * (1.0 / a)  # a scalar division: once a thread
    return tl.where(z > b, x, near)


@triton.jit
def _softplus_dx(x, dy, a, b):
    z = x * a
    return tl.where(z > b, dy, dy * _sigmoid(z))


# ---- kernels ----------------------------------------------------------------------------------------------------------
# n is an unspecialised int64, so one binary serves every size. Whole blocks run unmasked: a masked access loses the
# 128-bit loads whenever n is not a multiple of 16.


@triton.jit(do_not_specialize=["n"])
def _forward_flat(x, y, n: "i64", a: "fp32", b: "fp32", VALUE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    x += start
    y += start
    if start + BLOCK <= n:
        tl.store(y + i, VALUE(tl.load(x + i).to(tl.float32), a, b).to(y.dtype.element_ty))
    else:
        live = i < n - start
        tl.store(y + i, VALUE(tl.load(x + i, mask=live).to(tl.float32), a, b).to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["n"])
def _backward_flat(x, dy, dx, n: "i64", a: "fp32", b: "fp32", DX: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    x += start
    dy += start
    dx += start
    if start + BLOCK <= n:
        v = tl.load(x + i).to(tl.float32)
        g = tl.load(dy + i).to(tl.float32)
        tl.store(dx + i, DX(v, g, a, b).to(dx.dtype.element_ty))
    else:
        live = i < n - start
        v = tl.load(x + i, mask=live).to(tl.float32)
        g = tl.load(dy + i, mask=live).to(tl.float32)
        tl.store(dx + i, DX(v, g, a, b).to(dx.dtype.element_ty), mask=live)


# The mask of relu and leaky_relu: one bit an element. Memory is cut into tiles of 8 x MASK_COLS elements; bit r of byte [t, c] says that
# element t * 8 * MASK_COLS + r * MASK_COLS + c passed as it was. With 8 rows in a thread's registers, packing needs no
# traffic between threads, and a thread writes 8 neighbouring bytes at once. The last tile walks its rows in a loop, which
# keeps its masks from setting the register count of all (56 registers against 168).


@triton.jit
def _relu_and_bit(v, a, LEAKY: tl.constexpr):
    if LEAKY:
        keep = v > 0  # PyTorch's choice: a NaN's gradient is scaled
        v = tl.where(keep, v, a * v)
    else:
        v = tl.where(v <= 0, 0.0, v)  # NaN stays, and counts as not 0: its gradient passes, as in PyTorch
        keep = v != 0
    return v, keep.to(tl.int32)


@triton.jit(do_not_specialize=["n"])
def _relu_forward_mask(x, y, mask, n: "i64", a: "fp32", LEAKY: tl.constexpr, COLS: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    start = tile * (8 * COLS)
    col = tl.arange(0, COLS)
    x += start
    y += start
    if start + 8 * COLS <= n:
        row = tl.arange(0, 8)[:, None]
        i = row * COLS + col[None, :]
        v, keep = _relu_and_bit(tl.load(x + i).to(tl.float32), a, LEAKY)
        tl.store(y + i, v.to(y.dtype.element_ty))
        bits = tl.sum(keep << row, 0)
    else:
        rest = (n - start).to(tl.int32)
        bits = tl.zeros((COLS,), tl.int32)
        for r in range(8):
            i = r * COLS + col
            v, keep = _relu_and_bit(tl.load(x + i, mask=i < rest, other=0.0).to(tl.float32), a, LEAKY)
            tl.store(y + i, v.to(y.dtype.element_ty), mask=i < rest)
            bits += keep << r
    tl.store(mask + tile * COLS + col, bits.to(tl.uint8))


@triton.jit(do_not_specialize=["n"])
def _relu_backward_mask(mask, dy, dx, n: "i64", a: "fp32", LEAKY: tl.constexpr, COLS: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    start = tile * (8 * COLS)
    col = tl.arange(0, COLS)
    dy += start
    dx += start
    at = mask + tile * COLS
    if start + 8 * COLS <= n:
        row = tl.arange(0, 8)[:, None]
        i = row * COLS + col[None, :]
        # loaded as [1, COLS]: a bits[None, :] would go through shared memory to change its layout
        keep = tl.load(at + col[None, :]).to(tl.int32) >> row
        g = tl.load(dy + i).to(tl.float32)
        tl.store(dx + i, tl.where(keep & 1 != 0, g, a * g if LEAKY else 0.0).to(dx.dtype.element_ty))
    else:
        rest = (n - start).to(tl.int32)
        bits = tl.load(at + col).to(tl.int32)
        for r in range(8):
            i = r * COLS + col
            g = tl.load(dy + i, mask=i < rest).to(tl.float32)
            g = tl.where((bits >> r) & 1 != 0, g, a * g if LEAKY else 0.0)
            tl.store(dx + i, g.to(dx.dtype.element_ty), mask=i < rest)


# The strided kernels serve every other layout without a copy. Dimensions come sorted by the output's strides and merged
# where all tensors allow it: the last one is the tile's columns, up to four more form its rows. The output is dense, so
# its offset is the linear index.


@triton.jit
def _row_offsets(row, D1, D2, D3, s0, s1, s2, s3):
    i3 = row % D3
    row = row // D3
    i2 = row % D2
    row = row // D2
    return (row // D1) * s0 + (row % D1) * s1 + i2 * s2 + i3 * s3


@triton.jit
def _forward_strided(
    x, y, rows, cols, D1, D2, D3, s0, s1, s2, s3, s4, a: "fp32", b: "fp32",
    VALUE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    tiles = (cols - 1) // COLS + 1  # cdiv's sum passes 2^31 where cols nearly does
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    live = (row < rows)[:, None] & (col < cols)[None, :]
    at = _row_offsets(row, D1, D2, D3, s0, s1, s2, s3)[:, None] + (col * s4)[None, :]
    v = VALUE(tl.load(x + at, mask=live).to(tl.float32), a, b)
    tl.store(y + (row * cols)[:, None] + col[None, :], v.to(y.dtype.element_ty), mask=live)


@triton.jit
def _backward_strided(
    saved, dy, dx, rows, cols, D1, D2, D3, s0, s1, s2, s3, s4, g0, g1, g2, g3, g4, a: "fp32", b: "fp32",
    DX: tl.constexpr, MASK_COLS: tl.constexpr, LEAKY: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    tiles = (cols - 1) // COLS + 1  # cdiv's sum passes 2^31 where cols nearly does
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    live = (row < rows)[:, None] & (col < cols)[None, :]
    out = (row * cols)[:, None] + col[None, :]
    g = tl.load(dy + _row_offsets(row, D1, D2, D3, g0, g1, g2, g3)[:, None] + (col * g4)[None, :], mask=live)
    if MASK_COLS > 0:  # saved is the bit mask, in the output's order
        byte = out // (8 * MASK_COLS) * MASK_COLS + out % MASK_COLS
        keep = (tl.load(saved + byte, mask=live, other=0).to(tl.int32) >> (out // MASK_COLS % 8).to(tl.int32)) & 1
        g = g.to(tl.float32)
        v = tl.where(keep != 0, g, a * g if LEAKY else 0.0)
    else:
        at = _row_offsets(row, D1, D2, D3, s0, s1, s2, s3)[:, None] + (col * s4)[None, :]
        v = DX(tl.load(saved + at, mask=live).to(tl.float32), g.to(tl.float32), a, b)
    tl.store(dx + out, v.to(dx.dtype.element_ty), mask=live)


# ---- the table, the choice, the launches ------------------------------------------------------------------------------

FORMULAS = {  # kind -> (value, dx)
    "relu": (_relu, _relu_dx),
    "sigmoid": (_logistic, _logistic_dx),
    "silu": (_silu, _silu_dx),
    "gelu": (_gelu, _gelu_dx),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_dx),
    "quick_gelu": (_quick_gelu, _quick_gelu_dx),
    "squared_relu": (_squared_relu, _squared_relu_dx),
    "mish": (_mish, _mish_dx),
    "leaky_relu": (_leaky_relu, _leaky_relu_dx),
    "tanh": (_tanh, _tanh_dx),
    "softplus": (_softplus, _softplus_dx),
}
HALF_FORMULAS = {"gelu": (_gelu_half, _gelu_half_dx)}  # instead, for float16 and bfloat16
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_FORWARD_FLAT = Launcher(_forward_flat, tensors=2)
_BACKWARD_FLAT = Launcher(_backward_flat, tensors=3)
_FORWARD_STRIDED = Launcher(_forward_strided, tensors=2)
_BACKWARD_STRIDED = Launcher(_backward_strided, tensors=3)
_RELU_FORWARD_MASK = Launcher(_relu_forward_mask, tensors=3)
_RELU_BACKWARD_MASK = Launcher(_relu_backward_mask, tensors=3)
LANES = 64 if torch.version.hip else 32  # threads of a warp
MASK_COLS = 8 * LANES  # a 16-byte access of every thread of a warp, for half types


class FlatConfig(NamedTuple):
    block: int  # elements of a program
    num_warps: int


class TileConfig(NamedTuple):
    rows: int
    cols: int
    num_warps: int


def choose_flat(itemsize: int, lanes: int) -> FlatConfig:
    """Elements and warps of one program of the flat kernels: one 16-byte access a thread, 4 warps of ``lanes`` threads.

    Within 0.7% of the best tried (X-*-4096, X-*-16384); two or four accesses a thread gave no more, and mish's
    backward lost 3% to the registers.
    """
    return FlatConfig(block=4 * lanes * 16 // itemsize, num_warps=4)


def choose_tile(rows: int, cols: int) -> TileConfig:
    """Tile of the strided kernels: whole rows up to 1024 columns, about 2048 elements."""
    width = min(1024, _power_of_two(cols))
    return TileConfig(rows=max(1, min(2048 // width, _power_of_two(rows))), cols=width, num_warps=4)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def unsupported(x: torch.Tensor) -> str | None:
    if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        return f"needs a GPU tensor, got {x.device.type}"
    if x.layout != torch.strided or x.is_nested:
        return "needs a strided tensor, got " + ("a nested tensor" if x.is_nested else str(x.layout))
    if x.dtype not in DTYPES:
        return f"needs float16, bfloat16 or float32, got {str(x.dtype).removeprefix('torch.')}"
    return None


def formula(kind: str, dtype: torch.dtype) -> tuple:
    return HALF_FORMULAS.get(kind, FORMULAS[kind]) if dtype.itemsize == 2 else FORMULAS[kind]


@functools.cache
def flat_launches(kind: str, dtype: torch.dtype, lanes: int = LANES) -> tuple[int, Launch, Launch]:
    """(block, forward launch, backward launch)."""
    value, dx = formula(kind, dtype)
    block, num_warps = choose_flat(dtype.itemsize, lanes)
    return (
        block,
        _FORWARD_FLAT.bind(VALUE=value, BLOCK=block, num_warps=num_warps),
        _BACKWARD_FLAT.bind(DX=dx, BLOCK=block, num_warps=num_warps),
    )


@functools.cache
def mask_launches(leaky: bool = False, lanes: int = LANES) -> tuple[Launch, Launch]:
    """(forward launch, backward launch) of relu or leaky_relu with the bit mask, one warp each.

    X-relu-16384: forward 419.7 us against 422.7 with 512 columns and 2 warps. X-relu-4096: backward 108.8 against 108.1.
    """
    shape = {"LEAKY": leaky, "COLS": 8 * lanes, "num_warps": 1}
    return _RELU_FORWARD_MASK.bind(**shape), _RELU_BACKWARD_MASK.bind(**shape)


MASKED = ("relu", "leaky_relu")  # kinds whose backward needs to know one bit of an element


# What follows from how a call's tensors lie is kept, so that a call like one before computes none of it.


@functools.lru_cache(maxsize=4096)
def _is_dense(shape: tuple, strides: tuple) -> bool:
    """Whether the elements lie as those of ``torch.empty_like``: one behind the other."""
    like = torch.empty_strided(shape, strides, device="meta")
    return like.is_contiguous() or strides == torch.empty_like(like).stride()


@functools.lru_cache(maxsize=4096)
def _dense_forward(kind, dtype, shape, strides, a, b, index) -> Repeated | None:
    """None for what is not dense, or empty."""
    n = math.prod(shape)
    if not n or not _is_dense(shape, strides):
        return None
    block, launch, _ = flat_launches(kind, dtype)
    return launch.repeated(-(-n // block), (n, a, b), index, (dtype, dtype))


@functools.lru_cache(maxsize=4096)
def _masked_forward(kind, dtype, shape, strides, a, index) -> tuple[Repeated, int] | None:
    """(the launch, bytes of the mask)."""
    n = math.prod(shape)
    if not n or not _is_dense(shape, strides):
        return None
    tiles = -(-n // (8 * MASK_COLS))
    launch = mask_launches(kind == "leaky_relu")[0]
    return launch.repeated(tiles, (n, a), index, (dtype, dtype, torch.uint8)), tiles * MASK_COLS


@functools.lru_cache(maxsize=4096)
def _dense_backward(kind, saved, dtype, n, a, b, index) -> Repeated:
    """``saved``: the dtype of what forward saved."""
    dtypes = saved, dtype, dtype
    if saved == torch.uint8:
        return mask_launches(kind == "leaky_relu")[1].repeated(-(-n // (8 * MASK_COLS)), (n, a), index, dtypes)
    block, _, launch = flat_launches(kind, dtype)
    return launch.repeated(-(-n // block), (n, a, b), index, dtypes)


def forward(x: torch.Tensor, kind: str, a: float, b: float) -> torch.Tensor:
    """y in the layout ``torch.empty_like(x)`` gives."""
    y = torch.empty_like(x)
    launch = _dense_forward(kind, x.dtype, x.shape, x.stride(), a, b, x.get_device())
    if launch is not None:
        if not launch.at((x.data_ptr(), y.data_ptr())):
            launch.of(x, y)
    elif x.numel():
        _strided(y, (x,), (a, b), _FORWARD_STRIDED, {"VALUE": formula(kind, x.dtype)[0]})
    return y


def forward_saving(x: torch.Tensor, kind: str, a: float, b: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, what backward needs): x itself; for ``MASKED`` kinds of a dense x the bit mask, for relu of a strided x y."""
    if kind not in MASKED:
        return forward(x, kind, a, b), x
    plan = _masked_forward(kind, x.dtype, x.shape, x.stride(), a, x.get_device())
    if plan is None:
        y = forward(x, kind, a, b)
        return y, y if kind == "relu" else x
    launch, mask_bytes = plan
    y = torch.empty_like(x)
    mask = torch.empty(mask_bytes, dtype=torch.uint8, device=x.device)
    if not launch.at((x.data_ptr(), y.data_ptr(), mask.data_ptr())):
        launch.of(x, y, mask)
    return y, mask


def backward(saved: torch.Tensor, dy: torch.Tensor, kind: str, a: float, b: float, layout: tuple) -> torch.Tensor:
    """dx with the strides ``layout``, which are y's; ``saved`` as ``forward_saving`` gave it."""
    masked = saved.dtype == torch.uint8
    n = dy.numel()
    if dy.stride() == layout and (masked or saved.stride() == layout):
        dx = torch.empty_like(dy)
        if n:
            launch = _dense_backward(kind, saved.dtype, dy.dtype, n, a, b, dy.get_device())
            if not launch.at((saved.data_ptr(), dy.data_ptr(), dx.data_ptr())):
                launch.of(saved, dy, dx)
        return dx
    dx = torch.empty_strided(dy.shape, layout, dtype=dy.dtype, device=dy.device)
    if n:
        constants = {
            "DX": formula(kind, dy.dtype)[1],
            "MASK_COLS": MASK_COLS if masked else 0,
            "LEAKY": kind == "leaky_relu",
        }
        _strided(dx, (saved, dy), (a, b), _BACKWARD_STRIDED, constants)
    return dx


def unpack_mask(mask: torch.Tensor, shape: tuple, layout: tuple) -> torch.Tensor:
    """The mask as a bool tensor of a shape and its dense strides, in plain PyTorch."""
    bits = torch.arange(8, device=mask.device, dtype=torch.uint8)[:, None]
    keep = (mask.view(-1, 1, MASK_COLS) >> bits) & 1
    return keep.bool().flatten().as_strided(shape, layout)


def describe(x: torch.Tensor, kind: str, grad: bool) -> str:
    """The configuration of a call, for ``trinix.explain``."""
    layout = torch.empty_like(x, device="meta").stride()
    if not (x.is_contiguous() or x.stride() == layout):
        sizes, _ = merge_dims(x.shape, layout, [x.stride()])
        tile = choose_tile(x.numel() // sizes[-1], sizes[-1])
        return f"strided kernel, tile {tile.rows} x {tile.cols}, {tile.num_warps} warps"
    if kind in MASKED and grad:
        return f"flat kernel with a bit mask for backward, tile 8 x {MASK_COLS}"
    config = choose_flat(x.dtype.itemsize, LANES)
    return f"flat kernel, block {config.block}, {config.num_warps} warps"


def _strided(out, inputs, scalars, launcher, constants):
    """Launch a strided kernel on ``out`` (dense) and inputs of its shape; an input that is a bit mask has no strides."""
    views = [None if t.dtype == torch.uint8 else t.stride() for t in inputs]
    sizes, strides = merge_dims(out.shape, out.stride(), [v or (0,) * out.ndim for v in views])
    if len(sizes) > 5:  # the one case that copies: more than four outer dimensions that do not merge
        inputs = [t if v is None else torch.empty_like(out).copy_(t) for t, v in zip(inputs, views, strict=True)]
        _strided(out, inputs, scalars, launcher, constants)
        return
    pad = 5 - len(sizes)
    d = (1,) * pad + tuple(sizes)
    rows, cols = out.numel() // d[4], d[4]
    tile = choose_tile(rows, cols)
    blocks = -(-rows // tile.rows) * -(-cols // tile.cols)
    flat = [s for one in strides for s in (0,) * pad + one]
    launch = _bound(launcher, tile, *constants.items())
    launch(blocks, (*inputs, out), (rows, cols, *d[1:4], *flat, *scalars))


@functools.cache
def _bound(launcher, tile, *constants):
    return launcher.bind(**dict(constants), ROWS=tile.rows, COLS=tile.cols, num_warps=tile.num_warps)


def merge_dims(shape, order, strides):
    """Drop size-1 dimensions, sort the rest by ``order`` (largest first), merge neighbours that every tensor allows.

    Pure; ``order`` is the dense output's strides. Returns (sizes, one stride tuple a tensor).
    """
    dims = sorted((i for i in range(len(shape)) if shape[i] != 1), key=lambda i: -order[i])
    sizes, merged = [], [[] for _ in strides]
    for i in dims:
        if sizes and all(m[-1] == s[i] * shape[i] for m, s in zip(merged, strides, strict=True)):
            sizes[-1] *= shape[i]
            for m, s in zip(merged, strides, strict=True):
                m[-1] = s[i]
        else:
            sizes.append(shape[i])
            for m, s in zip(merged, strides, strict=True):
                m.append(s[i])
    if not sizes:
        return [1], [(0,) for _ in strides]
    return sizes, [tuple(m) for m in merged]


def compile_cases(lanes: int = LANES):
    """Every flat and mask binary; of the strided kernels what one half of a tensor's last dimension launches."""

    def case(name, launch, bytes_per_element, tensors, integers=()):
        return compile_case(f"activation/{name}", launch, bytes_per_element, tensors, integers)

    rows = cols = 4096
    sizes, dense, half, none = (rows, cols, 1, 1, rows), (0, 0, 0, cols, 1), (0, 0, 0, 2 * cols, 1), (0,) * 5
    tile = choose_tile(rows, cols)
    for dtype in DTYPES:
        size, suffix = dtype.itemsize, str(dtype).removeprefix("torch.")
        t = POINTERS[suffix]
        for kind in FORMULAS:
            _, fwd, bwd = flat_launches(kind, dtype, lanes)
            yield case(f"{kind}/fwd/{suffix}", fwd, 2 * size, (t, t))
            yield case(f"{kind}/bwd/{suffix}", bwd, 3 * size, (t, t, t))
        with_mask = 2 * size + 1 / 8
        for kind in MASKED:
            mask_forward, mask_backward = mask_launches(kind == "leaky_relu", lanes)
            yield case(f"{kind}/fwd-mask/{suffix}", mask_forward, with_mask, (t, t, "*u8"))
            yield case(f"{kind}/bwd-mask/{suffix}", mask_backward, with_mask, ("*u8", t, t))
        value, dx = formula("silu", dtype)
        fwd = _bound(_FORWARD_STRIDED, tile, ("VALUE", value))
        bwd = _bound(_BACKWARD_STRIDED, tile, ("DX", dx), ("MASK_COLS", 0), ("LEAKY", False))
        bwd_mask = _bound(_BACKWARD_STRIDED, tile, ("DX", _relu_dx), ("MASK_COLS", 8 * lanes), ("LEAKY", False))
        yield case(f"silu/fwd-strided/{suffix}", fwd, 2 * size, (t, t), sizes + half)
        yield case(f"silu/bwd-strided/{suffix}", bwd, 3 * size, (t, t, t), sizes + half + dense)
        yield case(f"relu/bwd-mask-strided/{suffix}", bwd_mask, with_mask, ("*u8", t, t), sizes + none + half)
