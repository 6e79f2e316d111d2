"""Portable Triton gated linear units: y = act(gate) * up, and both gradients in one kernel.

Three kernels a pass, by the memory layout:

flat     gate, up and dy are dense with equal strides, or one dense interleaved tensor: memory in storage order
rows     [rows, columns] with a stride between rows: packed halves, slices of a wider projection
strided  everything else, without a copy

``backward_sums`` adds a fourth to backward, for dense packed halves: the gradient's column sums, which are the gradient of a bias
before. Its programs are persistent, each walks rows of its columns and leaves a float32 row of sums; the norms' second kernel
adds those in a fixed order.

The formulas are the activations' own, constants of the kernel. Backward calls value(gate) and dx(gate, dy * up) side by
side; the compiler computes what they share (the sigmoid, the erf, the exp) once. All arithmetic is float32.

Floor: forward 3 * itemsize bytes an element of y, backward 5 * itemsize (4 where only gate's gradient is wanted and 3
where only up's is).
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trinix.kernels.triton import activation, norm
from trinix.kernels.triton._compile import POINTERS, compile_case
from trinix.kernels.triton._launch import Launch, Launcher, by_table  # noqa: F401  (by_table: the op's)
from trinix.kernels.triton.activation import FlatConfig, TileConfig, _row_offsets, merge_dims

# ---- formulas: value(x) and dx(x, dy), float32 in and out; the activations' a and b mean nothing here -------------------


@triton.jit
def _identity(x, a, b):
    return x


@triton.jit
def _identity_dx(x, dy, a, b):
    return dy


@triton.jit
def _gelu_tanh_clamped(x, a, b):
    """gelu_tanh's value from the clamped exp that its derivative needs, so that backward computes one exp."""
    c = tl.where(x > 9.8, 9.8, tl.where(x < -9.8, -9.8, x))
    e = tl.exp(-1.5957691216057308 * (c + 0.044715 * c * c * c))
    s = 1.0 / (1.0 + e)
    return tl.where(x < -9.8, 0.0, x * s)  # below -9.8 the value is less than 2e-35


# ---- kernels -----------------------------------------------------------------------------------------------------------
# Integers are unspecialised int64, so one binary serves every size. PAIRS: gate and up alternate in one tensor, which
# stands in gate's place; up's pointer is not read.


@triton.jit
def _load_both(gate, up, live, PAIRED: tl.constexpr, PAIRS: tl.constexpr, POLICY: tl.constexpr):
    """gate and up in float32 from blocks of pointers; PAIRED is the shape of a block of pairs."""
    g = tl.load(gate, mask=live, eviction_policy=POLICY)
    if PAIRS:
        g, u = tl.split(tl.reshape(g, PAIRED))
    else:
        u = tl.load(up, mask=live, eviction_policy=POLICY)
    return g.to(tl.float32), u.to(tl.float32)


@triton.jit
def _gradients(
    gate, up, dy, d_gate, d_up, live, live_dy, VALUE: tl.constexpr, DX: tl.constexpr, PAIRED: tl.constexpr,
    PAIRS: tl.constexpr, WANT_GATE: tl.constexpr, WANT_UP: tl.constexpr, DONE: tl.constexpr,
):  # fmt: skip
    """Backward between blocks of pointers. It reads all three for the last time; DONE: how long the cache should hold them."""
    g, u = _load_both(gate, up, live, PAIRED, PAIRS, DONE)
    d = tl.load(dy, mask=live_dy, eviction_policy=DONE).to(tl.float32)
    out = d_gate.dtype.element_ty
    if PAIRS:
        both = tl.join(DX(g, d * u, 0.0, 0.0).to(out), (d * VALUE(g, 0.0, 0.0)).to(out))
        tl.store(d_gate, tl.reshape(both, d_gate.shape), mask=live)
    else:
        if WANT_GATE:
            tl.store(d_gate, DX(g, d * u, 0.0, 0.0).to(out), mask=live)
        if WANT_UP:
            tl.store(d_up, (d * VALUE(g, 0.0, 0.0)).to(out), mask=live)


@triton.jit(do_not_specialize=["n"])
def _forward_flat(gate, up, y, n: "i64", VALUE: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    WIDTH: tl.constexpr = 2 if PAIRS else 1
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, WIDTH * BLOCK)
    gate += start * WIDTH
    up += start
    y += start
    if (
        start + BLOCK <= n
    ):  # whole blocks run unmasked: a mask by an n that is no multiple of 16 costs the wide accesses
        g, u = _load_both(gate + j, up + j, None, (BLOCK, 2), PAIRS, "")
        tl.store(y + i, (VALUE(g, 0.0, 0.0) * u).to(y.dtype.element_ty))
    else:
        rest = n - start
        g, u = _load_both(gate + j, up + j, j < rest * WIDTH, (BLOCK, 2), PAIRS, "")
        tl.store(y + i, (VALUE(g, 0.0, 0.0) * u).to(y.dtype.element_ty), mask=i < rest)


@triton.jit(do_not_specialize=["n"])
def _backward_flat(
    gate, up, dy, d_gate, d_up, n: "i64", VALUE: tl.constexpr, DX: tl.constexpr, PAIRS: tl.constexpr,
    WANT_GATE: tl.constexpr, WANT_UP: tl.constexpr, DONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = 2 if PAIRS else 1
    # from the end, which forward read last: of small tensors it lies in the cache still (docs/perf/glu.md)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, WIDTH * BLOCK)
    gate += start * WIDTH
    up += start
    dy += start
    d_gate += start * WIDTH
    d_up += start
    if start + BLOCK <= n:
        _gradients(
            gate + j, up + j, dy + i, d_gate + j, d_up + j, None, None,
            VALUE, DX, (BLOCK, 2), PAIRS, WANT_GATE, WANT_UP, DONE,
        )  # fmt: skip
    else:
        rest = n - start
        _gradients(
            gate + j, up + j, dy + i, d_gate + j, d_up + j, j < rest * WIDTH, i < rest,
            VALUE, DX, (BLOCK, 2), PAIRS, WANT_GATE, WANT_UP, DONE,
        )  # fmt: skip


# The rows kernels count columns, strides and offsets in UNITs, a common divisor of all of them: with the product of an
# argument and a constant the compiler proves the alignment that wide accesses need, whatever the argument is. gate and up
# of a packed tensor are one pointer with two offsets, so that the pointer stays aligned.


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(row, first column) of this program's tile."""
    tiles = tl.cast((width - 1) // COLS + 1, tl.int32)  # cdiv's sum passes 2^31 where an int32 width nearly does
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, (tl.program_id(0) % tiles).to(tl.int64) * COLS


@triton.jit(do_not_specialize=["rows", "cols", "gate_row", "up_row", "gate_at", "up_at"])
def _forward_rows(
    gate, up, y, rows: "i64", cols: "i64", gate_row: "i64", up_row: "i64", gate_at: "i64", up_at: "i64",
    VALUE: tl.constexpr, PAIRS: tl.constexpr, UNIT: tl.constexpr, DEPENDENT: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:  # begun before the product in front has ended
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # a product of one row may come in now, and fetch its weights
    WIDTH: tl.constexpr = 2 if PAIRS else 1
    width = cols * UNIT
    row, first = _tile(rows, width, ROWS, COLS)
    i = first + tl.arange(0, COLS)
    j = first * WIDTH + tl.arange(0, WIDTH * COLS)
    live = (row < rows)[:, None] & (i < width)[None, :]
    live_in = (row < rows)[:, None] & (j < width * WIDTH)[None, :]
    gate += gate_at * UNIT + ((row * (gate_row * UNIT))[:, None] + j[None, :])
    up += up_at * UNIT + ((row * (up_row * UNIT))[:, None] + j[None, :])
    g, u = _load_both(gate, up, live_in, (ROWS, COLS, 2), PAIRS, "")
    out = (row * width)[:, None] + i[None, :]
    tl.store(y + out, (VALUE(g, 0.0, 0.0) * u).to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows", "cols", "gate_row", "up_row", "dy_row", "out_row", "gate_at", "up_at"])
def _backward_rows(
    gate, up, dy, d_gate, d_up, rows: "i64", cols: "i64", gate_row: "i64", up_row: "i64", dy_row: "i64",
    out_row: "i64", gate_at: "i64", up_at: "i64", VALUE: tl.constexpr, DX: tl.constexpr, PAIRS: tl.constexpr,
    WANT_GATE: tl.constexpr, WANT_UP: tl.constexpr, DONE: tl.constexpr, UNIT: tl.constexpr, DEPENDENT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    WIDTH: tl.constexpr = 2 if PAIRS else 1
    width = cols * UNIT
    row, first = _tile(rows, width, ROWS, COLS)
    i = first + tl.arange(0, COLS)
    j = first * WIDTH + tl.arange(0, WIDTH * COLS)
    live = (row < rows)[:, None] & (i < width)[None, :]
    live_in = (row < rows)[:, None] & (j < width * WIDTH)[None, :]
    out = (row * (out_row * UNIT))[:, None] + j[None, :]
    _gradients(
        gate + (gate_at * UNIT + ((row * (gate_row * UNIT))[:, None] + j[None, :])),
        up + (up_at * UNIT + ((row * (up_row * UNIT))[:, None] + j[None, :])),
        dy + ((row * (dy_row * UNIT))[:, None] + i[None, :]),
        d_gate + (gate_at * UNIT + out), d_up + (up_at * UNIT + out), live_in, live,
        VALUE, DX, (ROWS, COLS, 2), PAIRS, WANT_GATE, WANT_UP, DONE,
    )  # fmt: skip


# The strided kernels: dimensions sorted by y's strides and merged where all tensors allow it, the last one is the tile's
# columns, up to four more form its rows. y is dense, so its offset is the linear index.


@triton.jit
def _forward_strided(
    gate, up, y, rows, cols, D1, D2, D3, g0, g1, g2, g3, g4, u0, u1, u2, u3, u4,
    VALUE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, first = _tile(rows, cols, ROWS, COLS)
    col = first + tl.arange(0, COLS)
    live = (row < rows)[:, None] & (col < cols)[None, :]
    g_at = _row_offsets(row, D1, D2, D3, g0, g1, g2, g3)[:, None] + (col * g4)[None, :]
    u_at = _row_offsets(row, D1, D2, D3, u0, u1, u2, u3)[:, None] + (col * u4)[None, :]
    g, u = _load_both(gate + g_at, up + u_at, live, None, False, "")
    tl.store(y + (row * cols)[:, None] + col[None, :], (VALUE(g, 0.0, 0.0) * u).to(y.dtype.element_ty), mask=live)


@triton.jit
def _backward_strided(
    gate, up, dy, d_gate, d_up, rows, cols, D1, D2, D3, g0, g1, g2, g3, g4, u0, u1, u2, u3, u4,
    y0, y1, y2, y3, y4, o0, o1, o2, o3, o4, VALUE: tl.constexpr, DX: tl.constexpr,
    WANT_GATE: tl.constexpr, WANT_UP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, first = _tile(rows, cols, ROWS, COLS)
    col = first + tl.arange(0, COLS)
    live = (row < rows)[:, None] & (col < cols)[None, :]
    out = _row_offsets(row, D1, D2, D3, o0, o1, o2, o3)[:, None] + (col * o4)[None, :]
    _gradients(
        gate + (_row_offsets(row, D1, D2, D3, g0, g1, g2, g3)[:, None] + (col * g4)[None, :]),
        up + (_row_offsets(row, D1, D2, D3, u0, u1, u2, u3)[:, None] + (col * u4)[None, :]),
        dy + (_row_offsets(row, D1, D2, D3, y0, y1, y2, y3)[:, None] + (col * y4)[None, :]),
        d_gate + out, d_up + out, live, live, VALUE, DX, None, False, WANT_GATE, WANT_UP, "",
    )  # fmt: skip


# x and dx are dense, [rows, 2 * width]. The tile's height is kept in the sums, so that threads meet once, at the end.


@triton.jit(do_not_specialize=["rows", "cols"])
def _backward_sums(
    x, dy, dx, partial, rows: "i64", cols: "i64", VALUE: tl.constexpr, DX: tl.constexpr, GATE_LAST: tl.constexpr,
    WANT_X: tl.constexpr, UNIT: tl.constexpr, DEPENDENT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    width = cols * UNIT
    tiles = tl.cast(tl.cdiv(width, COLS), tl.int32)
    group = tl.program_id(0) // tiles
    groups = tl.num_programs(0) // tiles
    col = (tl.program_id(0) % tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    gate_at = width if GATE_LAST else 0
    up_at = 0 if GATE_LAST else width
    g_sum = tl.zeros((ROWS, COLS), tl.float32)
    u_sum = tl.zeros((ROWS, COLS), tl.float32)
    for i in tl.range(0, tl.cdiv(rows, groups.to(tl.int64) * ROWS).to(tl.int32), num_stages=STAGES):
        row = (i * groups + group).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        live = (row < rows)[:, None] & (col < width)[None, :]
        at = (row * (2 * width))[:, None] + col[None, :]
        # zeros where there is nothing: they add nothing to the sums
        g = tl.load(x + gate_at + at, mask=live, other=0.0).to(tl.float32)
        u = tl.load(x + up_at + at, mask=live, other=0.0).to(tl.float32)
        d = tl.load(dy + ((row * width)[:, None] + col[None, :]), mask=live, other=0.0).to(tl.float32)
        dg = DX(g, d * u, 0.0, 0.0)
        du = d * VALUE(g, 0.0, 0.0)
        if WANT_X:
            tl.store(dx + gate_at + at, dg.to(dx.dtype.element_ty), mask=live)
            tl.store(dx + up_at + at, du.to(dx.dtype.element_ty), mask=live)
        g_sum += dg
        u_sum += du
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()  # the adding kernel may come in now; it waits for the end of this one
    mine = partial + group.to(tl.int64) * (2 * width) + col
    tl.store(mine + gate_at, tl.sum(g_sum, 0), mask=col < width)
    tl.store(mine + up_at, tl.sum(u_sum, 0), mask=col < width)


# ---- the table, the choice, the launches -------------------------------------------------------------------------------

ACTIVATIONS = {
    "swiglu": "silu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "reglu": "relu",
    "quick_geglu": "quick_gelu",
    "glu": "sigmoid",
}
DTYPES = activation.DTYPES
LANES = activation.LANES

_FORWARD_FLAT = Launcher(_forward_flat, tensors=3)
_BACKWARD_FLAT = Launcher(_backward_flat, tensors=5)
_FORWARD_ROWS = Launcher(_forward_rows, tensors=3)
_BACKWARD_ROWS = Launcher(_backward_rows, tensors=5)
_FORWARD_STRIDED = Launcher(_forward_strided, tensors=3)
_BACKWARD_STRIDED = Launcher(_backward_strided, tensors=5)
_BACKWARD_SUMS = Launcher(_backward_sums, tensors=4)

SUMS_PROGRAMS = 4  # a multiprocessor; R-efficient: 2 to 8 of them and 1 to 4 stages read the same within 4%
SUMS_STAGES = 3


def formula(kind: str, dtype: torch.dtype) -> tuple:
    """(value in forward, value in backward, dx)."""
    if kind == "bilinear":
        return _identity, _identity, _identity_dx
    value, dx = activation.formula(ACTIVATIONS[kind], dtype)
    return value, _gelu_tanh_clamped if kind == "geglu_tanh" else value, dx


def choose_flat(itemsize: int, pairs: bool, lanes: int) -> FlatConfig:
    """Elements of y and warps of one program: one 16-byte access a thread and tensor, 4 warps of ``lanes`` threads.

    Interleaved, the 16 bytes hold half as many of gate.
    """
    return FlatConfig(block=4 * lanes * 16 // itemsize // (2 if pairs else 1), num_warps=4)


def choose_strided(rows: int, cols: int, lanes: int) -> TileConfig:
    """Tile of the strided kernels: whole rows up to 512 columns, 8 elements a thread (backward keeps four addresses each)."""
    width = min(512, _power_of_two(cols))
    return TileConfig(rows=max(1, min(32 * lanes // width, _power_of_two(rows))), cols=width, num_warps=4)


@functools.lru_cache(maxsize=4096)
def choose_rows(rows: int, cols: int, itemsize: int, pairs: bool, lanes: int) -> TileConfig:
    """Tile of the rows kernels: as many elements as the flat kernel's block, so wide that under a quarter of it is empty."""
    block = choose_flat(itemsize, pairs, lanes).block
    width = min(block, _power_of_two(cols))
    while width * itemsize > 128 and -(-cols // width) * width * 3 > cols * 4:
        width //= 2
    return TileConfig(rows=max(1, min(block // width, _power_of_two(rows))), cols=width, num_warps=4)


_SMALL = 16 << 20  # bytes of dy: 8 MiB gain (G-sw-1), 64 MiB lose 2% (H-re-1)


def choose_done(elements: int, itemsize: int) -> str:
    """Backward's hint to the cache: what small tensors push out of it was written by the call in front, and has to go to DRAM."""
    return "evict_first" if elements * itemsize <= _SMALL else ""


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def unsupported(gate: torch.Tensor, up: torch.Tensor | None) -> str | None:
    return activation.unsupported(gate) or (None if up is None else activation.unsupported(up))


@functools.cache
def forward_flat(kind: str, dtype: torch.dtype, pairs: bool, lanes: int = LANES) -> tuple[int, Launch]:
    """(block, launch)."""
    block, num_warps = choose_flat(dtype.itemsize, pairs, lanes)
    value, _, _ = formula(kind, dtype)
    return block, _FORWARD_FLAT.bind(VALUE=value, PAIRS=pairs, BLOCK=block, num_warps=num_warps)


@functools.cache
def backward_flat(
    kind: str, dtype: torch.dtype, pairs: bool, want_gate: bool, want_up: bool, lanes: int = LANES, done: str = ""
) -> tuple[int, Launch]:
    """(block, launch)."""
    block, num_warps = choose_flat(dtype.itemsize, pairs, lanes)
    _, value, dx = formula(kind, dtype)
    return block, _BACKWARD_FLAT.bind(
        VALUE=value, DX=dx, PAIRS=pairs, WANT_GATE=want_gate, WANT_UP=want_up, DONE=done, BLOCK=block,
        num_warps=num_warps,
    )  # fmt: skip


@functools.cache
def forward_rows(kind: str, dtype: torch.dtype, pairs: bool, unit: int, dependent: bool, tile: TileConfig) -> Launch:
    value, _, _ = formula(kind, dtype)
    return _FORWARD_ROWS.bind(
        VALUE=value, PAIRS=pairs, UNIT=unit, DEPENDENT=dependent, ROWS=tile.rows, COLS=tile.cols,
        num_warps=tile.num_warps, launch_pdl=dependent,
    )  # fmt: skip


@functools.cache
def backward_rows(
    kind: str, dtype: torch.dtype, pairs: bool, want_gate: bool, want_up: bool, unit: int, dependent: bool,
    tile: TileConfig, done: str = "",
) -> Launch:  # fmt: skip
    _, value, dx = formula(kind, dtype)
    return _BACKWARD_ROWS.bind(
        VALUE=value, DX=dx, PAIRS=pairs, WANT_GATE=want_gate, WANT_UP=want_up, DONE=done, UNIT=unit, DEPENDENT=dependent,
        ROWS=tile.rows, COLS=tile.cols, num_warps=tile.num_warps, launch_pdl=dependent,
    )  # fmt: skip


@functools.cache
def forward_strided(kind: str, dtype: torch.dtype, tile: TileConfig) -> Launch:
    value, _, _ = formula(kind, dtype)
    return _FORWARD_STRIDED.bind(VALUE=value, ROWS=tile.rows, COLS=tile.cols, num_warps=tile.num_warps)


@functools.cache
def backward_strided(kind: str, dtype: torch.dtype, want_gate: bool, want_up: bool, tile: TileConfig) -> Launch:
    _, value, dx = formula(kind, dtype)
    return _BACKWARD_STRIDED.bind(
        VALUE=value, DX=dx, WANT_GATE=want_gate, WANT_UP=want_up,
        ROWS=tile.rows, COLS=tile.cols, num_warps=tile.num_warps,
    )  # fmt: skip


@functools.cache
def backward_sums_launch(
    kind: str, dtype: torch.dtype, layout: str, want_x: bool, unit: int, dependent: bool, tile: TileConfig,
    lanes: int = LANES,
) -> Launch:  # fmt: skip
    _, value, dx = formula(kind, dtype)
    return _BACKWARD_SUMS.bind(
        VALUE=value, DX=dx, GATE_LAST=layout == "gate_last", WANT_X=want_x, UNIT=unit, DEPENDENT=dependent,
        ROWS=tile.rows, COLS=tile.cols, STAGES=SUMS_STAGES if lanes == 32 else 1, num_warps=tile.num_warps,
    )  # fmt: skip


def empty_output(gate: torch.Tensor, up: torch.Tensor | None, layout: str) -> torch.Tensor:
    """y, unwritten: laid out as gate."""
    if up is not None:
        return torch.empty_like(gate)
    if gate.is_contiguous():
        return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2))
    return torch.empty_like(halves(gate, layout)[0])


def halves(x: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate, up), views of a packed x."""
    h = x.shape[-1] // 2
    if layout == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    first, second = x[..., :h], x[..., h:]
    return (first, second) if layout == "gate_first" else (second, first)


def forward(gate: torch.Tensor, up: torch.Tensor | None, kind: str, layout: str) -> torch.Tensor:
    y = empty_output(gate, up, layout)
    n = y.numel()
    if not n:
        return y
    if up is None:
        if not gate.is_contiguous():
            _forward_any(gate, None, y, kind, layout)
        elif layout == "interleaved":
            block, launch = forward_flat(kind, gate.dtype, True)
            launch(-(-n // block), (gate, gate, y), (n,))
        else:
            h = y.shape[-1]
            _forward_rows_launch(gate, gate, y, kind, False, (n // h, h), 2 * h, 2 * h, *_offsets(h, layout))
    elif (gate.is_contiguous() and up.is_contiguous()) or gate.stride() == up.stride() == y.stride():
        block, launch = forward_flat(kind, gate.dtype, False)
        launch(-(-n // block), (gate, up, y), (n,))
    else:
        _forward_any(gate, up, y, kind, layout)
    return y


def backward(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    dy: torch.Tensor,
    kind: str,
    layout: str,
    want_gate: bool = True,
    want_up: bool = True,
) -> list[torch.Tensor]:
    """The gradients that are wanted: of gate and up, laid out as y, or of the packed tensor, laid out as that."""
    if up is None:
        dx = torch.empty_like(gate)
        n = dy.numel()
        if not n:
            return [dx]
        if not (gate.is_contiguous() and dy.is_contiguous()):
            _backward_any(gate, None, dy, dx, dx, kind, layout, True, True)
        elif layout == "interleaved":
            block, launch = backward_flat(kind, gate.dtype, True, True, True, done=choose_done(n, dy.itemsize))
            launch(-(-n // block), (gate, gate, dy, dx, dx), (n,))
        else:
            h = dy.shape[-1]
            _backward_rows_launch(
                (gate, gate, dy, dx, dx), kind, False, True, True, (n // h, h), (2 * h, 2 * h, h, 2 * h),
                _offsets(h, layout),
            )  # fmt: skip
        return [dx]
    d_gate = torch.empty_like(gate)
    d_up = torch.empty_like(gate) if want_gate and want_up else d_gate  # one of them stands in for what is not written
    n = dy.numel()
    if n:
        contiguous = gate.is_contiguous() and up.is_contiguous() and dy.is_contiguous()
        if contiguous or gate.stride() == up.stride() == dy.stride() == d_gate.stride():
            done = choose_done(n, dy.itemsize)
            block, launch = backward_flat(kind, gate.dtype, False, want_gate, want_up, done=done)
            launch(-(-n // block), (gate, up, dy, d_gate, d_up), (n,))
        else:
            _backward_any(gate, up, dy, d_gate, d_up, kind, layout, want_gate, want_up)
    return [d_gate, d_up] if want_gate and want_up else [d_gate]


def backward_sums(
    x: torch.Tensor, dy: torch.Tensor, kind: str, layout: str, sums: torch.dtype, want_x: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(gradient of the packed x if wanted, its sums over all rows, [2H] of dtype ``sums``)."""
    h = x.shape[-1] // 2
    if not x.is_contiguous() or layout == "interleaved" or not dy.numel():
        (dx,) = backward(x, None, dy, kind, layout)
        return dx if want_x else None, dx.reshape(x.shape[:-1].numel(), 2 * h).sum(0, dtype=torch.float32).to(sums)
    rows, dtype = dy.numel() // h, x.dtype
    unit = math.gcd(h, 16 // dtype.itemsize)
    tile = choose_rows(rows, h, dtype.itemsize, False, LANES)
    tiles, steps = -(-h // tile.cols), -(-rows // tile.rows)
    most = max(1, (norm.sm_count(x.get_device()) * SUMS_PROGRAMS if x.is_cuda else 3) // tiles)
    groups = -(-steps // -(-steps // most))
    dependent = _dependent(x)
    dx = torch.empty_like(x) if want_x else None
    partial = x.new_empty(groups * 2 * h, dtype=torch.float32)
    launch = backward_sums_launch(kind, dtype, layout, want_x, unit, dependent, tile)
    launch(groups * tiles, (x, dy.contiguous(), x if dx is None else dx, partial), (rows, h // unit))
    total = x.new_empty(2 * h, dtype=sums)
    cols, launch = norm.add_partials_launch(2 * h, True, False, groups, dependent)
    launch(-(-2 * h // cols), (partial, total, partial), (groups,))
    return dx, total


# Where the card can, the kernels of rows are launched before the one in front, mostly a product, has ended.
EARLY = True


def _dependent(t: torch.Tensor) -> bool:
    return EARLY and t.is_cuda and norm.dependent_launch(t.get_device())


def _offsets(h, layout):
    """Where gate and up begin in a row of a packed tensor."""
    return (0, h) if layout == "gate_first" else (h, 0)


def _forward_rows_launch(gate, up, y, kind, pairs, size, gate_row, up_row, gate_at, up_at):
    rows, cols = size
    itemsize = gate.dtype.itemsize
    unit = math.gcd(cols, gate_row, up_row, gate_at, up_at, 16 // itemsize)
    tile = choose_rows(rows, cols, itemsize, pairs, LANES)
    launch = forward_rows(kind, gate.dtype, pairs, unit, _dependent(gate), tile)
    blocks = -(-rows // tile.rows) * -(-cols // tile.cols)
    counts = (rows, cols // unit, gate_row // unit, up_row // unit, gate_at // unit, up_at // unit)
    launch(blocks, (gate, up, y), counts)


def _backward_rows_launch(tensors, kind, pairs, want_gate, want_up, size, row_strides, offsets):
    rows, cols = size
    dtype = tensors[0].dtype
    unit = math.gcd(cols, *row_strides, *offsets, 16 // dtype.itemsize)
    tile = choose_rows(rows, cols, dtype.itemsize, pairs, LANES)
    done = choose_done(rows * cols, dtype.itemsize)
    launch = backward_rows(kind, dtype, pairs, want_gate, want_up, unit, _dependent(tensors[0]), tile, done)
    blocks = -(-rows // tile.rows) * -(-cols // tile.cols)
    launch(blocks, tensors, (rows, *[v // unit for v in (cols, *row_strides, *offsets)]))


class Route(NamedTuple):
    """How a call that is not plainly contiguous runs."""

    way: str  # "flat", "rows" or "strided"
    sizes: list  # merged dimensions
    strides: list  # of gate, up[, dy, gradients] over them
    pairs: bool
    offsets: tuple  # of gate and up in their tensors
    order: tuple  # y's strides


def route(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    layout: str,
    dy: torch.Tensor | None = None,
    d_gate: torch.Tensor | None = None,
) -> Route:
    """Which kernel serves these tensors; in forward without ``dy`` and the gradient's tensor."""
    g, u = halves(gate, layout) if up is None else (gate, up)
    pairs = up is None and layout == "interleaved" and gate.stride(-1) == 1
    outputs = ()
    offsets = (0, 0)
    movable = True  # gate and up begin in the gradient where they begin in the packed tensor
    if up is None:
        offsets = _distances(gate, g, u)
    if dy is not None:
        out = d_gate
        if up is None:
            out, other = halves(d_gate, layout)
            movable = offsets == _distances(d_gate, out, other)
        outputs = (dy, out)
    order = torch.empty_like(g, device="meta").stride()
    sizes, strides = merge_dims(g.shape, order, [t.stride() for t in (g, u, *outputs)])
    wide = 2 if pairs else 1
    columns = [s[-1] for s in strides]
    way = "flat" if len(sizes) == 1 and (pairs or up is not None) else "rows"
    if columns != [wide, wide, 1, wide][: len(columns)] or not movable or len(sizes) != (1 if way == "flat" else 2):
        way = "strided"
    return Route(way, sizes, strides, pairs, (0, 0) if pairs else offsets, order)


def _distances(x, *views):
    return tuple(t.storage_offset() - x.storage_offset() for t in views)


def _forward_any(gate, up, y, kind, layout):
    way, sizes, strides, pairs, offsets, _ = route(gate, up, layout)
    base = (gate, gate if up is None else up)
    g, u = halves(gate, layout) if up is None else (gate, up)
    if way == "flat":
        block, launch = forward_flat(kind, y.dtype, pairs)
        launch(-(-sizes[0] // block), (*base, y), (sizes[0],))
    elif way == "rows":
        _forward_rows_launch(*base, y, kind, pairs, sizes, *[s[0] for s in strides], *offsets)
    elif len(sizes) > 5:  # copies, as activations do: more than four outer dimensions that do not merge
        _forward_any(*[torch.empty_like(y).copy_(t) for t in (g, u)], y, kind, layout)
    else:
        blocks, tile, counts = _strided_counts(sizes, strides)
        forward_strided(kind, y.dtype, tile)(blocks, (g, u, y), counts)


def _backward_any(gate, up, dy, d_gate, d_up, kind, layout, want_gate, want_up):
    way, sizes, strides, pairs, offsets, order = route(gate, up, layout, dy, d_gate)
    base = (gate, gate if up is None else up, dy, d_gate, d_up)
    g, u, dg, du = (*halves(gate, layout), *halves(d_gate, layout)) if up is None else (gate, up, d_gate, d_up)
    if way == "flat":
        block, launch = backward_flat(kind, dy.dtype, pairs, want_gate, want_up)
        launch(-(-sizes[0] // block), base, (sizes[0],))
    elif way == "rows":
        _backward_rows_launch(base, kind, pairs, want_gate, want_up, sizes, [s[0] for s in strides], offsets)
    elif len(sizes) > 5:
        dense = [torch.empty_strided(t.shape, order, dtype=t.dtype, device=t.device).copy_(t) for t in (g, u, dy)]
        grads = backward(*dense, kind, layout, want_gate, want_up)
        for out, grad in zip([t for t, want in ((dg, want_gate), (du, want_up)) if want], grads, strict=True):
            out.copy_(grad)
    else:
        blocks, tile, counts = _strided_counts(sizes, strides)
        launch = backward_strided(kind, dy.dtype, want_gate, want_up, tile)
        launch(blocks, (g, u, dy, dg, du), counts)


def _strided_counts(sizes, strides):
    """(blocks, tile, integers of a strided kernel)."""
    pad = 5 - len(sizes)
    d = (1,) * pad + tuple(sizes)
    rows, cols = math.prod(d[:4]), d[4]
    tile = choose_strided(rows, cols, LANES)
    blocks = -(-rows // tile.rows) * -(-cols // tile.cols)
    return blocks, tile, (rows, cols, *d[1:4], *[s for one in strides for s in (0,) * pad + one])


def describe(gate: torch.Tensor, up: torch.Tensor | None, layout: str) -> str:
    """The configuration of a forward call, for ``trinix.explain``."""
    way, sizes, _, pairs, _, _ = route(gate, up, layout)
    if up is None and not pairs and gate.is_contiguous():
        way, sizes = "rows", [gate[..., 0].numel(), gate.shape[-1] // 2]
    if way == "flat":
        block, num_warps = choose_flat(gate.dtype.itemsize, pairs, LANES)
        return f"flat kernel, block {block}, {num_warps} warps"
    if way == "rows":
        tile = choose_rows(*sizes, gate.dtype.itemsize, pairs, LANES)
    else:
        tile = choose_strided(math.prod(sizes[:-1]), sizes[-1], LANES)
    return f"{way} kernel, tile {tile.rows} x {tile.cols}, {tile.num_warps} warps"


def compile_cases(lanes: int = LANES):
    """Every flat and rows binary of both passes; strided ones for two transposed tensors; sums of three kinds."""
    rows = cols = 4096
    sizes, dense, halved = (rows, cols, 1, 1, rows), (0, 0, 0, cols, 1), (0, 0, 0, 2 * cols, 2)

    for dtype in DTYPES:
        size, suffix = dtype.itemsize, str(dtype).removeprefix("torch.")
        t = POINTERS[suffix]
        unit = 16 // size

        def case(name, launch, bytes_per_element, tensors, integers=(), *, suffix=suffix):
            # of pairs in 16 bytes y is 8: the store of forward is half as wide
            bits = 64 if name.startswith("swiglu/fwd") and name.endswith("pairs") else 128
            return compile_case(f"glu/{name}/{suffix}", launch, bytes_per_element, tensors, integers, bits)

        for kind in (*ACTIVATIONS, "bilinear"):
            yield case(f"{kind}/fwd", forward_flat(kind, dtype, False, lanes)[1], 3 * size, (t,) * 3)
            yield case(f"{kind}/bwd", backward_flat(kind, dtype, False, True, True, lanes)[1], 5 * size, (t,) * 5)
        kind = "swiglu"
        yield case("swiglu/bwd-gate", backward_flat(kind, dtype, False, True, False, lanes)[1], 4 * size, (t,) * 5)
        yield case("swiglu/bwd-up", backward_flat(kind, dtype, False, False, True, lanes)[1], 3 * size, (t,) * 5)
        yield case("swiglu/fwd-pairs", forward_flat(kind, dtype, True, lanes)[1], 3 * size, (t,) * 3)
        yield case("swiglu/bwd-pairs", backward_flat(kind, dtype, True, True, True, lanes)[1], 5 * size, (t,) * 5)
        for name, pairs, columns in (("rows", False, cols), ("rows-short", False, 520), ("rows-pairs", True, cols)):
            tile = choose_rows(rows, columns, size, pairs, lanes)
            yield case(f"swiglu/fwd-{name}", forward_rows(kind, dtype, pairs, unit, False, tile), 3 * size, (t,) * 3)
            launch = backward_rows(kind, dtype, pairs, True, True, unit, False, tile)
            yield case(f"swiglu/bwd-{name}", launch, 5 * size, (t,) * 5)
        tile = choose_strided(rows, cols, lanes)
        launch = forward_strided(kind, dtype, tile)
        yield case("swiglu/fwd-strided", launch, 3 * size, (t,) * 3, sizes + dense + halved)
        launch = backward_strided(kind, dtype, True, True, tile)
        yield case("swiglu/bwd-strided", launch, 5 * size, (t,) * 5, sizes + dense + halved + dense + dense)
        tile = choose_rows(rows, cols, size, False, lanes)
        for kind in ("swiglu", "geglu", "reglu"):
            launch = backward_sums_launch(kind, dtype, "gate_first", True, unit, False, tile, lanes)
            yield case(f"{kind}/bwd-sums", launch, 5 * size, (t, t, t, "*fp32"))
