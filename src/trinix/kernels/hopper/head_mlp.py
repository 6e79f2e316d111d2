"""Per-head MLPs on Hopper (sm_90) in Gluon: O = act(X W1) W2, and its gradients.

A persistent program per multiprocessor walks over items: a head and 64 rows of it for each consumer warpgroup. A producer
warp streams tiles of W1 and W2 through a ring in shared memory, read by all consumers; each consumer keeps its rows' sums in
registers, and the activation's result is the left operand of the second product without leaving them. While one
warpgroup computes activations the tensor cores work for another.

The copy engine fills with zeros what lies past B or E, and drops what is stored past B: no shape needs a mask.
"""

import functools
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trinix.kernels import _stages
from trinix.kernels._binary import Boxed
from trinix.kernels._binary import multiprocessors as processors
from trinix.kernels.hopper._compat import tma_load, tma_store
from trinix.kernels.hopper.early import let_next_kernel_start, wait_for_kernel_before

# ---- activations: float32 in and out ------------------------------------------------------------------------------------
# sigmoid(x) = (1 + tanh(x / 2)) / 2: one special-function instruction, and at most 2^-12 of error (tanh.approx has 2^-11).


@gluon.jit
def _tanh(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _exp(x):  # gl.exp2 and a division keep denormal numbers, for several instructions each
    y = x * 1.4426950408889634
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _none(x):
    return x


@gluon.jit
def _relu(x):
    return gl.where(x <= 0, 0.0, x)  # not max(x, 0): NaN has to pass


@gluon.jit
def _sigmoid(x):
    return 0.5 * _tanh(0.5 * x) + 0.5


@gluon.jit
def _silu(x):
    h = 0.5 * x
    return h * _tanh(h) + h


# The same of h = x / 2, and derivatives of that with g = dy / 2: a tile that stays is halved once, which is exact, and the
# products then are h and g themselves.


@gluon.jit
def _sigmoid_of_half(h):
    return 0.5 * _tanh(h) + 0.5


@gluon.jit
def _sigmoid_dx_of_half(h, g):
    t = _tanh(h)
    return g * (0.5 - 0.5 * t * t)


@gluon.jit
def _silu_of_half(h):
    return h * _tanh(h) + h


@gluon.jit
def _silu_dx_of_half(h, g):
    t = _tanh(h)
    return g * (h * (1.0 - t * t) + t) + g


@gluon.jit
def _gelu_of_half(h):
    # P(Z < x) = (1 + tanh u) / 2, u = x (c0 + c1 x^2 + c2 x^4) up to |x| = 6 and a line from there on, h = x / 2. Fitted for
    # the least error of x P(Z < x) and of its derivative: 4e-5 and 1e-4, tanh.approx aside.
    q = h * h
    q = gl.where(q > 9.0, 9.0, q)
    t = _tanh(h * (1.5948458129002398 + q * (0.2960349274419079 + q * -0.011132056953053725)))
    return h * t + h


@gluon.jit
def _gelu_dx_of_half(h, g):
    q = h * h
    q = gl.where(q > 9.0, 9.0, q)
    t = _tanh(h * (1.5948458129002398 + q * (0.2960349274419079 + q * -0.011132056953053725)))
    slope = 1.5948458129002398 + q * (0.8881047823257238 + q * -0.05566028476526862)
    return g * (h * (1.0 - t * t) * slope + t) + g


@gluon.jit
def _gelu(x):
    return _gelu_of_half(0.5 * x)


@gluon.jit
def _gelu_tanh(x):
    return 0.5 * x * _tanh(x * (0.7978845608028654 + 0.035677408136300125 * x * x)) + 0.5 * x


@gluon.jit
def _quick_gelu(x):
    return 0.5 * x * _tanh(0.851 * x) + 0.5 * x


@gluon.jit
def _squared_relu(x):
    return gl.where(x <= 0, 0.0, x * x)


@gluon.jit
def _mish(x):
    e = _exp(gl.where(x > 20.0, 20.0, x))
    n = e * (e + 2.0)
    return x * (n * _reciprocal(n + 2.0))


@gluon.jit
def _leaky_relu(x):
    return gl.where(x > 0, x, 0.01 * x)


@gluon.jit
def _softplus(x):
    # log1p(e) = 2 atanh(s), s = e / (2 + e), as the activation does it
    e = _exp(-gl.abs(x))
    s = e * _reciprocal(2.0 + e)
    u = s * s
    p = 0.4002511425427157 + u * (0.279576667899683 + u * 0.2819154276246343)
    p = 2.000000008078691 + u * (0.666663101464273 + u * p)
    return gl.where(x > 20.0, x, gl.where(x <= 0, 0.0, x) + s * p)


@gluon.jit
def _none_dx(x, dy):
    return dy


@gluon.jit
def _relu_dx(x, dy):
    return gl.where(x <= 0, 0.0, dy)


@gluon.jit
def _sigmoid_dx(x, dy):
    t = _tanh(0.5 * x)
    return dy * (0.25 - 0.25 * t * t)


@gluon.jit
def _silu_dx(x, dy):
    h = 0.5 * x
    t = _tanh(h)
    return dy * (0.5 + 0.5 * (t + h * (1.0 - t * t)))


@gluon.jit
def _gelu_dx(x, dy):
    return _gelu_dx_of_half(0.5 * x, 0.5 * dy)


@gluon.jit
def _gelu_tanh_dx(x, dy):
    t = _tanh(x * (0.7978845608028654 + 0.035677408136300125 * x * x))
    slope = x * (0.7978845608028654 + 0.10703222440890037 * x * x)
    return dy * (0.5 + 0.5 * (t + slope * (1.0 - t * t)))


@gluon.jit
def _quick_gelu_dx(x, dy):
    u = 0.851 * x
    t = _tanh(u)
    return dy * (0.5 + 0.5 * (t + u * (1.0 - t * t)))


@gluon.jit
def _squared_relu_dx(x, dy):
    return gl.where(x <= 0, 0.0, 2.0 * x * dy)


@gluon.jit
def _mish_dx(x, dy):
    c = gl.where(x > 20.0, 20.0, x)
    e = _exp(c)
    n = e * (e + 2.0)
    r = _reciprocal(n + 2.0)
    return dy * (n * r + c * (4.0 * (e * (e + 1.0) * r) * r))


@gluon.jit
def _leaky_relu_dx(x, dy):
    return gl.where(x > 0, dy, 0.01 * dy)


@gluon.jit
def _tanh_dx(x, dy):
    t = _tanh(x)
    return dy * (1.0 - t * t)


@gluon.jit
def _softplus_dx(x, dy):
    return dy * _sigmoid(x)


FORMULAS = {  # kind -> (value, dx)
    "none": (_none, _none_dx),
    "relu": (_relu, _relu_dx),
    "sigmoid": (_sigmoid, _sigmoid_dx),
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


OF_HALF = {
    "sigmoid": (_sigmoid_of_half, _sigmoid_dx_of_half),
    "silu": (_silu_of_half, _silu_dx_of_half),
    "gelu": (_gelu_of_half, _gelu_dx_of_half),
}


@gluon.jit
def _operand(tile, layout: gl.constexpr, REGISTERS: gl.constexpr, HALVED: gl.constexpr):
    """A tile of shared memory as a left operand: in registers, or where it is."""
    x = tile
    if REGISTERS or HALVED:
        loaded = tile.load(layout)
        if HALVED:
            loaded = (loaded * 0.5).to(tile.dtype)
        if REGISTERS:
            x = loaded
        else:
            tile.store(loaded)
            fence_async_shared()
    return x


# ---- rings of tiles in shared memory --------------------------------------------------------------------------------------


@gluon.jit
def _ring(SLOTS: gl.constexpr, READERS: gl.constexpr):
    """The two barriers of every slot, (full, empty)."""
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], bar)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return full, empty


@gluon.jit
def _fill(slot, use, full, empty, a_desc, a_at, a_s, b_desc, b_at, b_s):
    """Tiles of A and B into a slot, as soon as those of its use before this one have been read."""
    mbarrier.wait(empty.index(slot), (use & 1) ^ 1)
    mbarrier.expect(full.index(slot), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
    tma_load(a_desc, a_at, full.index(slot), a_s.index(slot))
    tma_load(b_desc, b_at, full.index(slot), b_s.index(slot))


# Every role waits for the kernel before this one ahead of its first access to global memory; the next may come in only behind the
# wait, for rows' reads without one.


# ---- forward ------------------------------------------------------------------------------------------------------------


@gluon.jit
def _forward_producer(
    x_desc, w1_desc, w2_desc, x_s, w1_s, w2_s, x_full, x_empty, w_full, w_empty, items, per_head, tiles,
    N: gl.constexpr, CONSUMERS: gl.constexpr, W_SLOTS: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        wait_for_kernel_before()
    let_next_kernel_start()
    it = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head = item // per_head
        row = (item % per_head) * (64 * CONSUMERS)
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(x_empty.index(c), (turn & 1) ^ 1)
            mbarrier.expect(x_full.index(c), x_desc.block_type.nbytes)
            tma_load(x_desc, [head, row + c * 64, 0], x_full.index(c), x_s.index(c))
        turn = turn + 1
        for j in range(tiles):
            slot, use = it % W_SLOTS, it // W_SLOTS
            _fill(slot, use, w_full, w_empty, w1_desc, [head, 0, j * N], w1_s, w2_desc, [head, j * N, 0], w2_s)
            it += 1


@gluon.jit
def _forward_consumer(
    me: gl.constexpr, o_desc, x_s, w1_s, w2_s, o_s, x_full, x_empty, w_full, w_empty, items, per_head, tiles,
    VALUE: gl.constexpr, N: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr,
    W_SLOTS: gl.constexpr, X_REGISTERS: gl.constexpr, HALVED: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        wait_for_kernel_before()
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    x_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    dtype: gl.constexpr = x_s.dtype
    zero = gl.zeros([64, N], gl.float32, s_layout)
    tile = x_s.index(me).reshape([64, D])
    it = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head = item // per_head
        row = (item % per_head) * (64 * CONSUMERS) + me * 64
        mbarrier.wait(x_full.index(me), turn & 1)
        turn = turn + 1
        x = _operand(tile, x_layout, X_REGISTERS, HALVED)
        if X_REGISTERS:
            fence_async_shared()  # see _hidden_rows
            mbarrier.arrive(x_empty.index(me), count=1)
        o = gl.zeros([64, D], gl.float32, o_layout)
        slot = it % W_SLOTS
        mbarrier.wait(w_full.index(slot), (it // W_SLOTS) & 1)
        s = warpgroup_mma(x, w1_s.index(slot).reshape([D, N]), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        for _ in range(1, tiles):
            p = gl.convert_layout(VALUE(s).to(dtype), a_layout)
            before = slot
            it += 1
            slot = it % W_SLOTS
            mbarrier.wait(w_full.index(slot), (it // W_SLOTS) & 1)
            o_token = warpgroup_mma(p, w2_s.index(before).reshape([N, D]), o, is_async=True)
            s_token = warpgroup_mma(x, w1_s.index(slot).reshape([D, N]), zero, use_acc=False, is_async=True)
            o = warpgroup_mma_wait(1, deps=(o_token,))
            mbarrier.arrive(w_empty.index(before), count=1)
            s = warpgroup_mma_wait(0, deps=(s_token,))
        p = gl.convert_layout(VALUE(s).to(dtype), a_layout)
        o_token = warpgroup_mma(p, w2_s.index(slot).reshape([N, D]), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=(o_token,))
        mbarrier.arrive(w_empty.index(slot), count=1)
        it += 1
        if X_REGISTERS:
            tma.store_wait(0)  # the tile before has left
            o_s.index(me).reshape([64, D]).store(o.to(dtype))
            fence_async_shared()
            tma_store(o_desc, [head, row, 0], o_s.index(me))
        else:  # X's own slot carries O out
            tile.store(o.to(dtype))
            fence_async_shared()
            tma_store(o_desc, [head, row, 0], x_s.index(me))
            tma.store_wait(0)
            mbarrier.arrive(x_empty.index(me), count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["items", "per_head", "tiles"])
def _forward(
    x_desc, w1_desc, w2_desc, o_desc, items, per_head, tiles,
    VALUE: gl.constexpr, N: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr,
    W_SLOTS: gl.constexpr, X_REGISTERS: gl.constexpr, HALVED: gl.constexpr, DEPENDENT: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    x_s = gl.allocate_shared_memory(x_desc.dtype, [CONSUMERS, 1, 64, D], x_desc.layout)
    w1_s = gl.allocate_shared_memory(x_desc.dtype, [W_SLOTS, 1, D, N], w1_desc.layout)
    w2_s = gl.allocate_shared_memory(x_desc.dtype, [W_SLOTS, 1, N, D], w2_desc.layout)
    if X_REGISTERS:
        o_s = gl.allocate_shared_memory(x_desc.dtype, [CONSUMERS, 1, 64, D], o_desc.layout)
    else:
        o_s = x_s
    x_full, x_empty = _ring(CONSUMERS, 1)
    w_full, w_empty = _ring(W_SLOTS, CONSUMERS)
    fence_async_shared()
    # Part 0 is the producer, the others are consumers. The arguments must be written out in the call: through a variable, or
    # behind a +, constexprs would turn into tensors.
    gl.warp_specialize([
        (_forward_producer, (x_desc, w1_desc, w2_desc, x_s, w1_s, w2_s, x_full, x_empty, w_full, w_empty, items, per_head,
                             tiles, N, CONSUMERS, W_SLOTS, DEPENDENT))
        if part == 0 else
        (_forward_consumer, (part - 1, o_desc, x_s, w1_s, w2_s, o_s, x_full, x_empty, w_full, w_empty, items, per_head,
                             tiles, VALUE, N, D, CONSUMERS, W_SLOTS, X_REGISTERS, HALVED, DEPENDENT))
        for part in (0, 1, 2, 3)[:1 + CONSUMERS]
    ], [4] * CONSUMERS, [REGISTERS] * CONSUMERS)  # fmt: skip


# ---- backward -----------------------------------------------------------------------------------------------------------
# Two kernels that do not need each other: the rows' starts where the weights' leaves multiprocessors idle, before that has
# ended. At its own end it waits for the other's, so that whatever comes after it comes after both.


# ---- backward: rows -----------------------------------------------------------------------------------------------------
# dX of 64 rows a consumer, as in forward: S = X W1 and dH = dY W2' of the next tile of E are multiplied while this one's
# dZ goes into dX += dZ W1'. Here that next tile may be the next item's first, whose X and dY have been fetched ahead.


@gluon.jit
def _rows_producer(
    x_desc, y_desc, w1_desc, w2_desc, x_s, y_s, w1_s, w2_s, x_full, x_empty, w_full, w_empty, items, per_head, tiles,
    N: gl.constexpr, CONSUMERS: gl.constexpr, W_SLOTS: gl.constexpr, X_SLOTS: gl.constexpr,
):  # fmt: skip
    let_next_kernel_start()
    it = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head = item // per_head
        row = (item % per_head) * (64 * CONSUMERS)
        slot, use = turn % X_SLOTS, turn // X_SLOTS
        for c in gl.static_range(CONSUMERS):
            at = row + c * 64
            _fill(c * X_SLOTS + slot, use, x_full, x_empty, x_desc, [head, at, 0], x_s, y_desc, [head, at, 0], y_s)
        turn = turn + 1
        for j in range(tiles):
            slot, use = it % W_SLOTS, it // W_SLOTS
            _fill(slot, use, w_full, w_empty, w1_desc, [head, 0, j * N], w1_s, w2_desc, [head, j * N, 0], w2_s)
            it += 1


@gluon.jit
def _rows_hidden(x, y, w1_tile, w2_tile, zero):
    """S = X W1 and dH = dY W2' under way."""
    s = warpgroup_mma(x, w1_tile, zero, use_acc=False, is_async=True)
    dh = warpgroup_mma(y, w2_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    return s, dh


@gluon.jit
def _rows_consumer(
    me: gl.constexpr, dx_desc, x_s, y_s, w1_s, w2_s, dx_s, x_full, x_empty, w_full, w_empty, items, per_head, tiles,
    DX: gl.constexpr, N: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr, W_SLOTS: gl.constexpr,
    X_SLOTS: gl.constexpr, X_REGISTERS: gl.constexpr, HALVED: gl.constexpr,
):  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    x_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    dtype: gl.constexpr = x_s.dtype
    zero = gl.zeros([64, N], gl.float32, s_layout)
    it = 0
    turn = 0
    slot = 0
    at = me * X_SLOTS
    mbarrier.wait(x_full.index(at), 0)
    x = _operand(x_s.index(at).reshape([64, D]), x_layout, X_REGISTERS, HALVED)
    y = _operand(y_s.index(at).reshape([64, D]), x_layout, False, HALVED)
    mbarrier.wait(w_full.index(0), 0)
    s, dh = _rows_hidden(x, y, w1_s.index(0).reshape([D, N]), w2_s.index(0).reshape([N, D]), zero)
    s, dh = warpgroup_mma_wait(0, deps=(s, dh))
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head = item // per_head
        row = (item % per_head) * (64 * CONSUMERS) + me * 64
        if not X_REGISTERS:
            x = x_s.index(at).reshape([64, D])
        y = y_s.index(at).reshape([64, D])
        dx = gl.zeros([64, D], gl.float32, o_layout)
        for _ in range(1, tiles):
            dz = gl.convert_layout(DX(s, dh).to(dtype), a_layout)
            last = slot
            it += 1
            slot = it % W_SLOTS
            mbarrier.wait(w_full.index(slot), (it // W_SLOTS) & 1)
            dx_token = warpgroup_mma(dz, w1_s.index(last).reshape([D, N]).permute((1, 0)), dx, is_async=True)
            s_token, dh_token = _rows_hidden(
                x, y, w1_s.index(slot).reshape([D, N]), w2_s.index(slot).reshape([N, D]), zero
            )
            dx = warpgroup_mma_wait(2, deps=(dx_token,))
            mbarrier.arrive(w_empty.index(last), count=1)
            s, dh = warpgroup_mma_wait(0, deps=(s_token, dh_token))
        # The item's last tile is multiplied together with the next item's first. After the last item that is one more
        # product of what lies in the slots, and nobody reads it.
        mbarrier.arrive(x_empty.index(at), count=1)
        more = item + gl.num_programs(0) < items
        turn = turn + 1
        at = me * X_SLOTS + turn % X_SLOTS
        mbarrier.wait(x_full.index(at), (turn // X_SLOTS) & 1, pred=more)
        x = _operand(x_s.index(at).reshape([64, D]), x_layout, X_REGISTERS, HALVED)
        y = _operand(y_s.index(at).reshape([64, D]), x_layout, False, HALVED)
        dz = gl.convert_layout(DX(s, dh).to(dtype), a_layout)
        last = slot
        it += 1
        slot = it % W_SLOTS
        mbarrier.wait(w_full.index(slot), (it // W_SLOTS) & 1, pred=more)
        dx_token = warpgroup_mma(dz, w1_s.index(last).reshape([D, N]).permute((1, 0)), dx, is_async=True)
        s_token, dh_token = _rows_hidden(x, y, w1_s.index(slot).reshape([D, N]), w2_s.index(slot).reshape([N, D]), zero)
        dx = warpgroup_mma_wait(2, deps=(dx_token,))
        mbarrier.arrive(w_empty.index(last), count=1)
        tma.store_wait(0)  # the tile before has left
        dx_s.index(me).reshape([64, D]).store(dx.to(dtype))
        fence_async_shared()
        tma_store(dx_desc, [head, row, 0], dx_s.index(me))
        s, dh = warpgroup_mma_wait(0, deps=(s_token, dh_token))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["items", "per_head", "tiles"])
def _backward_rows(
    x_desc, y_desc, w1_desc, w2_desc, dx_desc, items, per_head, tiles,
    DX: gl.constexpr, N: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr, W_SLOTS: gl.constexpr,
    X_SLOTS: gl.constexpr, X_REGISTERS: gl.constexpr, HALVED: gl.constexpr, DEPENDENT: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    x_s = gl.allocate_shared_memory(x_desc.dtype, [CONSUMERS * X_SLOTS, 1, 64, D], x_desc.layout)
    y_s = gl.allocate_shared_memory(x_desc.dtype, [CONSUMERS * X_SLOTS, 1, 64, D], y_desc.layout)
    dx_s = gl.allocate_shared_memory(x_desc.dtype, [CONSUMERS, 1, 64, D], dx_desc.layout)
    w1_s = gl.allocate_shared_memory(x_desc.dtype, [W_SLOTS, 1, D, N], w1_desc.layout)
    w2_s = gl.allocate_shared_memory(x_desc.dtype, [W_SLOTS, 1, N, D], w2_desc.layout)
    x_full, x_empty = _ring(CONSUMERS * X_SLOTS, 1)
    w_full, w_empty = _ring(W_SLOTS, CONSUMERS)
    fence_async_shared()
    gl.warp_specialize([
        (_rows_producer, (x_desc, y_desc, w1_desc, w2_desc, x_s, y_s, w1_s, w2_s, x_full, x_empty, w_full, w_empty, items,
                          per_head, tiles, N, CONSUMERS, W_SLOTS, X_SLOTS))
        if part == 0 else
        (_rows_consumer, (part - 1, dx_desc, x_s, y_s, w1_s, w2_s, dx_s, x_full, x_empty, w_full, w_empty, items, per_head,
                          tiles, DX, N, D, CONSUMERS, W_SLOTS, X_SLOTS, X_REGISTERS, HALVED))
        for part in (0, 1, 2, 3)[:1 + CONSUMERS]
    ], [4] * CONSUMERS, [REGISTERS] * CONSUMERS)  # fmt: skip
    if DEPENDENT:
        wait_for_kernel_before()


# ---- backward: weights --------------------------------------------------------------------------------------------------
# A consumer owns 64 columns of E of a head, and its weights stay with it while tiles of X and dY stream past. The hidden
# tile is transposed, so that H' and dZ' are left operands as they come: dW2 += H' dY, dW1' += dZ' X.


@gluon.jit
def _weights_producer(
    x_desc, y_desc, w1_desc, w2_desc, x_s, y_s, w1_s, w2_s, x_full, x_empty, w_full, w_empty, items, per_head, tiles,
    N: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        wait_for_kernel_before()
    let_next_kernel_start()
    it = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head = item // per_head
        column = (item % per_head) * (64 * CONSUMERS)
        for c in gl.static_range(CONSUMERS):
            at = column + c * 64
            _fill(c, turn, w_full, w_empty, w1_desc, [head, 0, at], w1_s, w2_desc, [head, at, 0], w2_s)
        turn = turn + 1
        for j in range(tiles):
            slot, use = it % SLOTS, it // SLOTS
            _fill(slot, use, x_full, x_empty, x_desc, [head, j * N, 0], x_s, y_desc, [head, j * N, 0], y_s)
            it += 1


@gluon.jit
def _weights_consumer(
    me: gl.constexpr, dw1_desc, dw2_desc, x_s, y_s, w1_s, w2_s, x_full, x_empty, w_full, w_empty, items, per_head, tiles,
    VALUE: gl.constexpr, DX: gl.constexpr, N: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr,
    SLOTS: gl.constexpr, W1_REGISTERS: gl.constexpr, HALVED: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        wait_for_kernel_before()
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    w_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    dtype: gl.constexpr = x_s.dtype
    zero = gl.zeros([64, N], gl.float32, s_layout)
    it = 0
    turn = 0
    w1_tile = w1_s.index(me).reshape([D, 64])
    w2_tile = w2_s.index(me).reshape([64, D])
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head = item // per_head
        column = (item % per_head) * (64 * CONSUMERS) + me * 64
        mbarrier.wait(w_full.index(me), turn & 1)
        turn = turn + 1
        up = _operand(w1_tile.permute((1, 0)), w_layout, W1_REGISTERS, HALVED)
        down = _operand(w2_tile, w_layout, False, HALVED)
        dw1 = gl.zeros([64, D], gl.float32, o_layout)  # transposed
        dw2 = gl.zeros([64, D], gl.float32, o_layout)
        slot = it % SLOTS
        mbarrier.wait(x_full.index(slot), (it // SLOTS) & 1)
        s = warpgroup_mma(up, x_s.index(slot).reshape([N, D]).permute((1, 0)), zero, use_acc=False, is_async=True)
        dh = warpgroup_mma(down, y_s.index(slot).reshape([N, D]).permute((1, 0)), zero, use_acc=False, is_async=True)
        s, dh = warpgroup_mma_wait(0, deps=(s, dh))
        for _ in range(1, tiles):
            h = gl.convert_layout(VALUE(s).to(dtype), a_layout)
            dz = gl.convert_layout(DX(s, dh).to(dtype), a_layout)
            last = slot
            it += 1
            slot = it % SLOTS
            mbarrier.wait(x_full.index(slot), (it // SLOTS) & 1)
            dw2_token = warpgroup_mma(h, y_s.index(last).reshape([N, D]), dw2, is_async=True)
            dw1_token = warpgroup_mma(dz, x_s.index(last).reshape([N, D]), dw1, is_async=True)
            s_token = warpgroup_mma(
                up, x_s.index(slot).reshape([N, D]).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            dh_token = warpgroup_mma(
                down, y_s.index(slot).reshape([N, D]).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            dw2, dw1 = warpgroup_mma_wait(2, deps=(dw2_token, dw1_token))
            mbarrier.arrive(x_empty.index(last), count=1)
            s, dh = warpgroup_mma_wait(0, deps=(s_token, dh_token))
        h = gl.convert_layout(VALUE(s).to(dtype), a_layout)
        dz = gl.convert_layout(DX(s, dh).to(dtype), a_layout)
        dw2_token = warpgroup_mma(h, y_s.index(slot).reshape([N, D]), dw2, is_async=True)
        dw1_token = warpgroup_mma(dz, x_s.index(slot).reshape([N, D]), dw1, is_async=True)
        dw2, dw1 = warpgroup_mma_wait(0, deps=(dw2_token, dw1_token))
        mbarrier.arrive(x_empty.index(slot), count=1)
        it += 1
        w1_tile.permute((1, 0)).store(dw1.to(dtype))  # the weights' own slots carry their gradients out
        w2_tile.store(dw2.to(dtype))
        fence_async_shared()
        tma_store(dw1_desc, [head, 0, column], w1_s.index(me))
        tma_store(dw2_desc, [head, column, 0], w2_s.index(me))
        tma.store_wait(0)
        mbarrier.arrive(w_empty.index(me), count=1)


@gluon.jit(do_not_specialize=["items", "per_head", "tiles"])
def _backward_weights(
    x_desc, y_desc, w1_desc, w2_desc, dw1_desc, dw2_desc, items, per_head, tiles,
    VALUE: gl.constexpr, DX: gl.constexpr, N: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
    W1_REGISTERS: gl.constexpr, HALVED: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    CONSUMERS: gl.constexpr = 2
    x_s = gl.allocate_shared_memory(x_desc.dtype, [SLOTS, 1, N, D], x_desc.layout)
    y_s = gl.allocate_shared_memory(x_desc.dtype, [SLOTS, 1, N, D], y_desc.layout)
    w1_s = gl.allocate_shared_memory(x_desc.dtype, [CONSUMERS, 1, D, 64], w1_desc.layout)
    w2_s = gl.allocate_shared_memory(x_desc.dtype, [CONSUMERS, 1, 64, D], w2_desc.layout)
    w_full, w_empty = _ring(CONSUMERS, 1)
    x_full, x_empty = _ring(SLOTS, CONSUMERS)
    fence_async_shared()
    gl.warp_specialize([
        (_weights_producer, (x_desc, y_desc, w1_desc, w2_desc, x_s, y_s, w1_s, w2_s, x_full, x_empty, w_full, w_empty,
                             items, per_head, tiles, N, CONSUMERS, SLOTS, DEPENDENT))
        if part == 0 else
        (_weights_consumer, (part - 1, dw1_desc, dw2_desc, x_s, y_s, w1_s, w2_s, x_full, x_empty, w_full, w_empty, items,
                             per_head, tiles, VALUE, DX, N, D, CONSUMERS, SLOTS, W1_REGISTERS, HALVED, DEPENDENT))
        for part in (0, 1, 2)
    ], [4] * CONSUMERS, [240] * CONSUMERS)  # fmt: skip


# ---- backward: hidden values ----------------------------------------------------------------------------------------------
# At D = 256 sums of weights' gradients find no registers. H and dZ of 64 rows a consumer are written instead: S = X W1 and
# dH = dY W2' from X and dY in registers, while tiles of W1 and W2 stream past, and PyTorch's products do the rest. H is computed
# and stored while dH is multiplied.


@gluon.jit
def _fill_one(slot, use, full, empty, desc, at, s):
    mbarrier.wait(empty.index(slot), (use & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma_load(desc, at, full.index(slot), s.index(slot))


@gluon.jit
def _hidden_item(item, per_head, splits, share, tiles, CONSUMERS: gl.constexpr):
    """(head, row, first tile of E, the one behind the last) of an item."""
    block = item // splits
    first = (item % splits) * share
    return block // per_head, (block % per_head) * (64 * CONSUMERS), first, gl.minimum(first + share, tiles)


@gluon.jit
def _hidden_producer(
    x_desc, y_desc, w1_desc, w2_desc, r_s, w1_s, w2_s, r_full, r_empty, w1_full, w1_empty, w2_full, w2_empty,
    items, per_head, splits, share, tiles,
    N: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        wait_for_kernel_before()
    let_next_kernel_start()
    it = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head, row, first, last = _hidden_item(item, per_head, splits, share, tiles, CONSUMERS)
        for c in gl.static_range(CONSUMERS):
            _fill_one(c, 2 * turn, r_full, r_empty, x_desc, [head, row + c * 64, 0], r_s)
        for j in range(first, last):
            slot, use = it % SLOTS, it // SLOTS
            _fill_one(slot, use, w1_full, w1_empty, w1_desc, [head, 0, j * N], w1_s)
            if j == first:  # each consumer's dY takes the place of its X
                for c in gl.static_range(CONSUMERS):
                    _fill_one(c, 2 * turn + 1, r_full, r_empty, y_desc, [head, row + c * 64, 0], r_s)
            _fill_one(slot, use, w2_full, w2_empty, w2_desc, [head, j * N, 0], w2_s)
            it += 1
        turn = turn + 1


@gluon.jit
def _hidden_rows(slot, use, full, empty, s, layout: gl.constexpr, D: gl.constexpr, HALVED: gl.constexpr):
    """A tile of X or dY in registers, and its slot free."""
    mbarrier.wait(full.index(slot), use & 1)
    x = s.index(slot).reshape([64, D]).load(layout)
    fence_async_shared()  # an arrival does not wait for a load under way, and the copy engine may overtake it
    mbarrier.arrive(empty.index(slot), count=1)
    if HALVED:
        x = (x * 0.5).to(s.dtype)
    return x


@gluon.jit
def _hidden_products(
    x, y, it, w1_s, w2_s, w1_full, w2_full, zero, N: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr
):
    """S = X W1 and dH = dY W2' of tile number ``it`` under way."""
    slot, phase = it % SLOTS, (it // SLOTS) & 1
    mbarrier.wait(w1_full.index(slot), phase)
    s = warpgroup_mma(x, w1_s.index(slot).reshape([D, N]), zero, use_acc=False, is_async=True)
    mbarrier.wait(w2_full.index(slot), phase)
    w2_tile = w2_s.index(slot).reshape([N, D]).permute((1, 0))
    dh = warpgroup_mma(y, w2_tile, zero, use_acc=False, is_async=True)
    return s, dh


@gluon.jit
def _hidden_store(desc, values, head, row, column, place, N: gl.constexpr):
    """H's and dZ's tiles take turns: all but the last store have left their places."""
    tma.store_wait(1)
    place.reshape([64, N]).store(values)
    fence_async_shared()
    tma_store(desc, [head, row, column], place)


@gluon.jit
def _hidden_consumer(
    me: gl.constexpr, h_desc, dz_desc, r_s, w1_s, w2_s, h_s, dz_s, r_full, r_empty, w1_full, w1_empty, w2_full, w2_empty,
    items, per_head, splits, share, tiles,
    VALUE: gl.constexpr, DX: gl.constexpr, N: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr,
    SLOTS: gl.constexpr, HALVED: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        wait_for_kernel_before()
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    x_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    dtype: gl.constexpr = r_s.dtype
    zero = gl.zeros([64, N], gl.float32, s_layout)
    it = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head, row, first, last = _hidden_item(item, per_head, splits, share, tiles, CONSUMERS)
        x = _hidden_rows(me, 2 * turn, r_full, r_empty, r_s, x_layout, D, HALVED)
        y = _hidden_rows(me, 2 * turn + 1, r_full, r_empty, r_s, x_layout, D, HALVED)
        turn = turn + 1
        for j in range(first, last):
            s_token, dh_token = _hidden_products(x, y, it, w1_s, w2_s, w1_full, w2_full, zero, N, D, SLOTS)
            s = warpgroup_mma_wait(1, deps=(s_token,))
            mbarrier.arrive(w1_empty.index(it % SLOTS), count=1)
            _hidden_store(h_desc, VALUE(s).to(dtype), head, row + me * 64, j * N, h_s.index(me), N)
            dh = warpgroup_mma_wait(0, deps=(dh_token,))
            mbarrier.arrive(w2_empty.index(it % SLOTS), count=1)
            _hidden_store(dz_desc, DX(s, dh).to(dtype), head, row + me * 64, j * N, dz_s.index(me), N)
            it += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["items", "per_head", "splits", "share", "tiles"])
def _backward_hidden(
    x_desc, y_desc, w1_desc, w2_desc, h_desc, dz_desc, items, per_head, splits, share, tiles,
    VALUE: gl.constexpr, DX: gl.constexpr, N: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr, HALVED: gl.constexpr,
    DEPENDENT: gl.constexpr,
):  # fmt: skip
    CONSUMERS: gl.constexpr = 2
    r_s = gl.allocate_shared_memory(x_desc.dtype, [CONSUMERS, 1, 64, D], x_desc.layout)
    w1_s = gl.allocate_shared_memory(x_desc.dtype, [SLOTS, 1, D, N], w1_desc.layout)
    w2_s = gl.allocate_shared_memory(x_desc.dtype, [SLOTS, 1, N, D], w2_desc.layout)
    h_s = gl.allocate_shared_memory(x_desc.dtype, [CONSUMERS, 1, 64, N], h_desc.layout)
    dz_s = gl.allocate_shared_memory(x_desc.dtype, [CONSUMERS, 1, 64, N], dz_desc.layout)
    r_full, r_empty = _ring(CONSUMERS, 1)
    w1_full, w1_empty = _ring(SLOTS, CONSUMERS)
    w2_full, w2_empty = _ring(SLOTS, CONSUMERS)
    fence_async_shared()
    gl.warp_specialize([
        (_hidden_producer, (x_desc, y_desc, w1_desc, w2_desc, r_s, w1_s, w2_s, r_full, r_empty, w1_full, w1_empty, w2_full,
                            w2_empty, items, per_head, splits, share, tiles, N, CONSUMERS, SLOTS, DEPENDENT))
        if part == 0 else
        (_hidden_consumer, (part - 1, h_desc, dz_desc, r_s, w1_s, w2_s, h_s, dz_s, r_full, r_empty, w1_full, w1_empty,
                            w2_full, w2_empty, items, per_head, splits, share, tiles, VALUE, DX, N, D, CONSUMERS, SLOTS,
                            HALVED, DEPENDENT))
        for part in (0, 1, 2)
    ], [4] * CONSUMERS, [240] * CONSUMERS)  # fmt: skip


# ---- the choice, the launches -------------------------------------------------------------------------------------------

DTYPES = (torch.float16, torch.bfloat16)
WIDTHS = (64, 128, 256)
STAGED_WIDTH = 256  # whose sums of weights' gradients would fill the registers: by stages
BACKWARD_WIDTHS = (64, 128, STAGED_WIDTH)
EARLY = True  # forward and the weights' kernel begin before the kernel in front has ended


class ForwardConfig(NamedTuple):
    hidden: int  # columns of E a tile
    consumers: int  # warpgroups of 64 rows
    slots: int  # of tiles of W1 and W2
    x_registers: bool  # X moves to registers, and its slot is free at once


class RowsConfig(NamedTuple):
    hidden: int  # columns of E a tile
    consumers: int  # warpgroups of 64 rows
    slots: int
    x_slots: int  # of tiles of X and dY, each warpgroup's
    x_registers: bool  # X is read from registers, dY from shared memory


class WeightsConfig(NamedTuple):
    rows: int  # a tile
    slots: int
    w1_registers: bool  # W1' is read from registers, W2 from shared memory


class HiddenConfig(NamedTuple):
    rows: int  # of two warpgroups
    hidden: int  # columns of E a tile
    slots: int  # of tiles of W1, and of W2


def choose_forward(heads: int, rows: int, d: int, processors: int) -> ForwardConfig:
    """The fastest of up to eleven tried at M-1 to M-7."""
    if d == 128:
        return ForwardConfig(64, 2, 4, True)
    if d == 256:
        return ForwardConfig(32, 2, 3, False)

    def rounds(consumers):
        """Tiles that the warpgroups of the busiest multiprocessor multiply, one after the other."""
        return -(-heads * -(-rows // (64 * consumers)) // processors) * consumers

    if rounds(3) <= 1.08 * rounds(2):  # M-5: three hide more of each other's latency, where none is left idle for it
        return ForwardConfig(64, 3, 6, True)
    return ForwardConfig(128, 2, 4, True)


def choose_rows(d: int) -> RowsConfig:
    return RowsConfig(128, 2, 3, 2, False) if d == 64 else RowsConfig(64, 2, 3, 1, True)


def choose_weights(d: int) -> WeightsConfig:
    """At D = 128 tiles are narrow, to leave registers for the sums, and shared memory is as busy as the tensor cores."""
    return WeightsConfig(64, 4, False) if d == 64 else WeightsConfig(32, 5, True)


# whose derivatives need more registers than tiles of 64 columns leave
_LONG_FORMULAS = frozenset({"gelu", "quick_gelu", "mish", "leaky_relu", "softplus"})


def choose_hidden(kind: str) -> HiddenConfig:
    """M-7 in silu: 655.8 us by tiles of 64 columns for 669.2 of 32, (64, 4096, 256, 512) 869.5 for 885.9; both with no spills."""
    return HiddenConfig(128, 32, 4) if kind in _LONG_FORMULAS else HiddenConfig(128, 64, 2)


def unsupported(x, w1, w2, b1, b2, w_gate, kind: str = "silu", mean: bool = False, grad: bool = False) -> str | None:
    if not x.is_cuda:
        return f"needs a GPU tensor, got {x.device.type}"
    if torch.version.hip is not None or _capability(x.get_device()) != (9, 0):  # AMD's gfx90a calls itself 9.0 too
        return "needs a GPU of compute capability 9.0 (Hopper)"
    if x.dtype not in DTYPES:
        return f"has no kernel for {x.dtype}"
    if b1 is not None or b2 is not None or w_gate is not None or mean or x.dim() == 2:
        return "has no biases, no gate, no x for all heads and no mean over them"
    widths = BACKWARD_WIDTHS if grad else WIDTHS
    if x.shape[-1] not in widths:
        return f"needs D among {list(widths)}{' for gradients' if grad else ''}, got {x.shape[-1]}"
    if not x.numel() or not w1.numel():
        return "needs at least one element in every tensor"
    for name, t in (("x", x), ("w1", w1), ("w2", w2)):
        if not _fits(t):
            return f"needs rows of {name} of their own that begin at multiples of 16 bytes, got strides {t.stride()}"
    if grad and w1.shape[-1] & 7:  # w1's rows may lie farther apart; its gradient's are dense
        return f"needs E to be a multiple of 8 for gradients, got {w1.shape[-1]}"
    return None


def _fits(t: torch.Tensor) -> bool:
    """Whether the copy engine takes it: no heads or rows that are one and the same in memory."""
    head, row, last = t.stride()
    apart = row > 0 and (head > 0 or t.shape[0] == 1)
    return last == 1 and not (head | row) & 7 and apart and not t.data_ptr() & 15


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


_plans = {}
_MOST_PLANS = 4096


class _Plan(Boxed):
    """A launch for tensors of one shape, each read or written in blocks."""

    def __init__(self, kernel, tensors, blocks, items, integers, constants):
        options = {"launch_pdl": True} if constants.get("DEPENDENT") else {}
        programs = min(items, processors(tensors[0].get_device()))
        super().__init__(kernel, tensors, blocks, programs, integers, constants, num_warps=4, **options)


def _planned(key, make) -> _Plan:
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = make()
    return plan


def _key(kind, x, w1, w2, *more):
    return kind, x.shape, x.stride(), w1.shape, w1.stride(), w2.stride(), x.dtype, x.get_device(), *more


def _forward_constants(kind: str, d: int, c: ForwardConfig) -> dict:
    halved = kind in OF_HALF
    return {
        "VALUE": (OF_HALF if halved else FORMULAS)[kind][0], "N": c.hidden, "D": d, "CONSUMERS": c.consumers,
        "W_SLOTS": c.slots, "X_REGISTERS": c.x_registers, "HALVED": halved, "DEPENDENT": EARLY,
        "REGISTERS": 240 if c.consumers == 2 else 160,
    }  # fmt: skip


def _forward_blocks(d: int, c: ForwardConfig) -> tuple:
    return (64, d), (d, c.hidden), (c.hidden, d), (64, d)


def _forward_plan(kind, x, w1, w2, o):
    (h, d, e), b = w1.shape, x.shape[1]
    c = choose_forward(h, b, d, processors(x.get_device()))
    per_head = -(-b // (64 * c.consumers))
    items = h * per_head
    integers = items, per_head, -(-e // c.hidden)
    blocks = _forward_blocks(d, c)
    return _Plan(_forward, (x, w1, w2, o), blocks, items, integers, _forward_constants(kind, d, c))


def forward(x, w1, w2, b1, b2, w_gate, kind: str, mean: bool) -> torch.Tensor:
    o = torch.empty_like(x)
    _planned(_key(kind, x, w1, w2), lambda: _forward_plan(kind, x, w1, w2, o))(x, w1, w2, o)
    return o


def _rows_constants(kind: str, d: int, c: RowsConfig, dependent: bool) -> dict:
    """``dependent``: the weights' kernel was launched right before."""
    halved = kind in OF_HALF
    return {
        "DX": (OF_HALF if halved else FORMULAS)[kind][1], "N": c.hidden, "D": d, "CONSUMERS": c.consumers,
        "W_SLOTS": c.slots, "X_SLOTS": c.x_slots, "X_REGISTERS": c.x_registers, "HALVED": halved,
        "DEPENDENT": dependent, "REGISTERS": 240 if c.consumers == 2 else 160,
    }  # fmt: skip


def _rows_blocks(d: int, c: RowsConfig) -> tuple:
    return (64, d), (64, d), (d, c.hidden), (c.hidden, d), (64, d)


def _rows_plan(kind, x, w1, w2, dy, dx, dependent):
    (h, d, e), b = w1.shape, x.shape[1]
    c = choose_rows(d)
    per_head = -(-b // (64 * c.consumers))
    integers = h * per_head, per_head, -(-e // c.hidden)
    constants = _rows_constants(kind, d, c, dependent)
    return _Plan(_backward_rows, (x, dy, w1, w2, dx), _rows_blocks(d, c), h * per_head, integers, constants)


def _weights_constants(kind: str, d: int, c: WeightsConfig) -> dict:
    halved = kind in OF_HALF
    value, dx = (OF_HALF if halved else FORMULAS)[kind]
    return {
        "VALUE": value, "DX": dx, "N": c.rows, "D": d, "SLOTS": c.slots, "W1_REGISTERS": c.w1_registers,
        "HALVED": halved, "DEPENDENT": EARLY,
    }  # fmt: skip


def _weights_blocks(d: int, c: WeightsConfig) -> tuple:
    return (c.rows, d), (c.rows, d), (d, 64), (64, d), (d, 64), (64, d)


def _weights_plan(kind, x, w1, w2, dy, dw1, dw2):
    (h, d, e), b = w1.shape, x.shape[1]
    c = choose_weights(d)
    per_head = -(-e // 128)
    integers = h * per_head, per_head, -(-b // c.rows)
    constants = _weights_constants(kind, d, c)
    tensors = x, dy, w1, w2, dw1, dw2
    return _Plan(_backward_weights, tensors, _weights_blocks(d, c), h * per_head, integers, constants)


def _hidden_constants(kind: str, c: HiddenConfig) -> dict:
    halved = kind in OF_HALF
    value, dx = (OF_HALF if halved else FORMULAS)[kind]
    return {
        "VALUE": value, "DX": dx, "N": c.hidden, "D": STAGED_WIDTH, "SLOTS": c.slots, "HALVED": halved, "DEPENDENT": EARLY,
    }  # fmt: skip


def _hidden_blocks(c: HiddenConfig) -> tuple:
    d, n = STAGED_WIDTH, c.hidden
    return (64, d), (64, d), (d, n), (n, d), (64, n), (64, n)


def _hidden_plan(kind, x, dy, w1, w2, h, dz, splits):
    heads, b, e = h.shape
    c = choose_hidden(kind)
    per_head, tiles = -(-b // c.rows), -(-e // c.hidden)
    share = -(-tiles // splits)
    splits = -(-tiles // share)  # of which none is empty
    items = heads * per_head * splits
    integers = items, per_head, splits, share, tiles
    return _Plan(
        _backward_hidden, (x, dy, w1, w2, h, dz), _hidden_blocks(c), items, integers, _hidden_constants(kind, c)
    )


def by_stages(x, w1, w2, b1, b2, w_gate, mean: bool) -> bool:
    """Whether backward of a call goes by stages."""
    return x.shape[-1] == STAGED_WIDTH


def _backward_by_stages(x, w1, w2, dy, kind, wanted):
    (heads, d, e), b = w1.shape, x.shape[1]
    c = choose_hidden(kind)
    chunk, portion, splits = _stages.choose(b, heads, d, e, processors(x.get_device()), (c.rows, c.hidden))

    def hidden(xs, w1s, w2s, dys, h, dz):
        key = _key(kind, xs, w1s, w2s, dys.stride(), splits, "hidden")
        _planned(key, lambda: _hidden_plan(kind, xs, dys, w1s, w2s, h, dz, splits))(xs, dys, w1s, w2s, h, dz)

    return _stages.backward(x, w1, w2, dy, wanted, chunk, portion, hidden)


def backward(x, w1, w2, b1, b2, w_gate, dy, kind: str, mean: bool, wanted: tuple) -> list[torch.Tensor | None]:
    """The gradients of (x, w1, w2, b1, b2, w_gate), None where ``wanted`` says so."""
    dw1 = dw2 = None
    # clone: a dense gradient at an odd address, as of torch.cat, is contiguous; hooks on saved tensors may give others back
    x, w1, w2, dy = (t if _fits(t) else t.clone(memory_format=torch.contiguous_format) for t in (x, w1, w2, dy))
    if by_stages(x, w1, w2, b1, b2, w_gate, mean):
        return [*_backward_by_stages(x, w1, w2, dy, kind, wanted[:3]), None, None, None]
    # made first: the rows' kernel overlaps with what other threads launch behind the weights', and with what they free
    dx = torch.empty_like(x) if wanted[0] else None
    key = _key(kind, x, w1, w2, dy.stride())
    weights = wanted[1] or wanted[2]
    if weights:
        dw1, dw2 = (torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in (w1, w2))
        plan = _planned((*key, "weights"), lambda: _weights_plan(kind, x, w1, w2, dy, dw1, dw2))
        plan(x, dy, w1, w2, dw1, dw2)
    if wanted[0]:
        plan = _planned((*key, "rows", weights), lambda: _rows_plan(kind, x, w1, w2, dy, dx, weights))
        plan(x, dy, w1, w2, dx)
    return [dx, dw1 if wanted[1] else None, dw2 if wanted[2] else None, None, None, None]


def describe(x, w1, w2, b1, b2, w_gate, kind: str, mean: bool) -> str:
    """The configuration of a forward call, for ``trinix.explain``."""
    c = choose_forward(w1.shape[0], x.shape[-2], x.shape[-1], processors(x.get_device()))
    return f"{c.consumers} warpgroups of 64 rows, tiles of {c.hidden} hidden columns, {c.slots} slots"


class CompileCase(NamedTuple):
    """A binary that the library launches, as it can be compiled without a GPU."""

    name: str
    kernel: object
    blocks: dict  # descriptor -> what it reads or writes at a time
    constants: dict


def compile_cases() -> list[CompileCase]:
    """Every kernel and width in silu, every kind at D = 64."""
    cases = []

    def add(name, kernel, blocks, constants):
        descriptors = [n for n in kernel.arg_names if n.endswith("_desc")]
        cases.append(CompileCase(name, kernel, dict(zip(descriptors, blocks, strict=True)), constants))

    for kind, d in (*((kind, 64) for kind in FORMULAS), ("silu", 128), ("silu", 256), ("gelu", 256), ("mish", 256)):
        # rows of which three warpgroups, and two, leave the fewest idle
        for b in (64 * 3 * 132, 64 * 2 * 132) if d == 64 else (4096,):
            c = choose_forward(1, b, d, 132)
            add(f"forward/{d}/{c.consumers}/{kind}", _forward, _forward_blocks(d, c), _forward_constants(kind, d, c))
        if d == STAGED_WIDTH:
            c = choose_hidden(kind)
            add(f"hidden/{d}/{kind}", _backward_hidden, _hidden_blocks(c), _hidden_constants(kind, c))
        elif d in BACKWARD_WIDTHS:
            r, w = choose_rows(d), choose_weights(d)
            add(f"rows/{d}/{kind}", _backward_rows, _rows_blocks(d, r), _rows_constants(kind, d, r, True))
            add(f"weights/{d}/{kind}", _backward_weights, _weights_blocks(d, w), _weights_constants(kind, d, w))
    return cases
