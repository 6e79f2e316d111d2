"""softmax and log_softmax: every dimension, layout and incoming gradient against float64, the tile, stream and split
kernels, and how the op behaves as a citizen of PyTorch. Backend "triton" runs in Triton's interpreter on the CPU; the tests
marked ``gpu`` run it on the card."""

import importlib
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import trinix
from helpers import Tagged, Watch, captured, dense, right_or_refused, same
from trinix.kernels.triton import _launch
from trinix.kernels.triton import softmax as kernels
from trinix.kernels.triton.softmax import Stream, Tile
from trinix.ops import log_softmax, softmax
from trinix.testing import assert_within_budget, normal, vjp

op = importlib.import_module("trinix.ops.softmax")  # the module: ``trinix.ops.softmax`` is the function

OPS = (softmax, log_softmax)
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)

# name -> (x, dim), from ``new(*shape)`` that gives a contiguous tensor of normal numbers
LAYOUTS = {
    "rows": lambda new: (new(7, 33), -1),
    "rows, whole vectors": lambda new: (new(5, 48), -1),
    "rows, one power of two": lambda new: (new(16, 64), -1),
    "rows, many a program": lambda new: (new(70, 8), -1),
    "rows, one past the warp's": lambda new: (new(2, 1025), -1),
    "rows, each elsewhere between two vectors": lambda new: (new(8, 301), -1),
    "rows, each elsewhere, from an odd element": lambda new: (new(4 * 301 + 1)[1:].view(4, 301), -1),
    "rows, each elsewhere, padded": lambda new: (new(3, 310)[:, 3:-6], -1),
    "a row of less than a vector": lambda new: (new(3), -1),
    "columns": lambda new: (new(7, 33), 0),
    "columns, whole vectors": lambda new: (new(3, 10, 32), 1),
    "columns, one past the block": lambda new: (new(2, 9, 129), -2),
    "columns, few": lambda new: (new(4, 40, 3), 1),
    "columns, slabs an odd distance apart": lambda new: (new(2, 321)[:, :320].view(2, 10, 32), 1),
    "the first of four": lambda new: (new(6, 2, 3, 8), 0),
    "offset by one element": lambda new: (new(241)[1:].view(5, 48), -1),
    "offset, columns": lambda new: (new(241)[1:].view(5, 48), 0),
    "row padded": lambda new: (new(9, 48)[:, :33], -1),
    "row padded, columns": lambda new: (new(9, 48)[:, :33], 0),
    "sliced along the rows": lambda new: (new(9, 40)[:, ::2], -1),
    "sliced across": lambda new: (new(9, 40)[:, ::2], 0),
    "transposed": lambda new: (new(9, 33).t(), -1),
    "transposed, columns": lambda new: (new(9, 33).t(), 0),
    "permuted 4-D": lambda new: (new(3, 4, 5, 6).permute(2, 0, 3, 1), 1),
    "channels last": lambda new: (new(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), 1),
    "channels last, a middle one": lambda new: (new(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), 3),
    "expanded": lambda new: (new(5, 1, 7).expand(5, 4, 7), -1),
    "expanded along dim": lambda new: (new(5, 1, 7).expand(5, 4, 7), 1),
    "overlapping windows": lambda new: (new(40).unfold(0, 8, 4), 1),
    "0-d": lambda new: (new(), -1),
    "0 rows": lambda new: (new(0, 8), -1),
    "0 long": lambda new: (new(3, 0), -1),
    "1 long": lambda new: (new(4, 1, 5), 1),
    "1 long, last": lambda new: (new(9, 1), 1),
    "one element": lambda new: (new(1, 1), 0),
    "one column of many": lambda new: (new(30, 2)[:, 1:], 0),
    "5-D, nothing merges": lambda new: (new(4, 4, 4, 4, 6)[::2, ::2, ::2, ::2, ::2], 2),
    "6-D, nothing merges": lambda new: (new(4, 4, 4, 4, 4, 6)[::2, ::2, ::2, ::2, ::2, ::2], 1),
}

# name -> incoming gradient of the shape of x
GRADIENTS = {
    "like y": lambda new, x, dim: torch.empty_like(x).copy_(new(*x.shape)),
    "contiguous": lambda new, x, dim: new(*x.shape),
    # along dim it varies: the gradient of a constant is 0, which has no error to measure another by
    "stride 0": lambda new, x, dim: new(*(s if i == dim % x.ndim else 1 for i, s in enumerate(x.shape))).expand(
        x.shape
    ),
    "transposed": lambda new, x, dim: new(*reversed(x.shape)).permute(list(reversed(range(x.ndim)))),
    "sliced": lambda new, x, dim: new(*x.shape, 2)[..., 1],
    "padded": lambda new, x, dim: new(*x.shape[:-1], x.shape[-1] + 3)[..., 2:-1],
}

# name -> (shape of x, dim, mask)
MASKS = {
    "full": ((3, 4, 20), -1, lambda new: new(3, 4, 20)),
    "a row for all": ((3, 4, 20), -1, lambda new: new(20)),
    "a number": ((3, 4, 20), -1, lambda new: new()),
    "one per row": ((3, 4, 20), -1, lambda new: new(3, 4, 1)),
    "of attention": ((2, 3, 5, 16), -1, lambda new: new(2, 1, 5, 16)),
    "of keys": ((2, 3, 5, 16), -1, lambda new: new(2, 1, 1, 16)),
    "of attention, over queries": ((2, 3, 5, 16), -2, lambda new: new(2, 1, 5, 16)),
    "columns": ((3, 24, 8), 1, lambda new: new(24, 1)),
    "transposed": ((3, 8, 20), -1, lambda new: new(20, 8).t()),
    "float32": ((3, 4, 20), -1, lambda new: new(3, 4, 20).float()),
    "nothing merges": ((2, 2, 2, 2, 2, 6), -1, lambda new: new(2, 1, 2, 1, 2, 6)),
}


class Numbers:
    """``new(*shape)``: normal numbers, others on every call, the same in every run."""

    def __init__(self, dtype, device, scale=1.0):
        self.dtype, self.device, self.scale, self.seed = dtype, device, scale, 0

    def __call__(self, *shape):
        self.seed += 1
        return normal(shape, self.dtype, seed=self.seed, device=self.device, scale=self.scale)


def make(layout, dtype, device, incoming="like y"):
    new = Numbers(dtype, device)
    x, dim = LAYOUTS[layout](new)
    return x, dim, GRADIENTS[incoming](new, x, dim)


def call(function, dim, backend, **more):
    return lambda x: function(x, dim, backend=backend, **more)


def oracle(function, x, dim, dy, mask=None, ours="triton", **more):
    """THE test: y and dx of our backend within the budget that float64 and PyTorch in the same dtype give, y and dx laid
    out as ``torch.empty_like(x)``."""
    got = vjp(call(function, dim, ours, mask=mask, **more), [x], dy)
    low = vjp(call(function, dim, "torch", mask=mask, **more), [dense(x)], dense(dy))
    mask = mask if mask is None else dense(mask, torch.float64)
    true = vjp(call(function, dim, "torch", mask=mask, **more), [dense(x, torch.float64)], dense(dy, torch.float64))
    assert_within_budget(got, low, true)
    layout = torch.empty_like(x, device="meta").stride()
    assert [t.stride() for t in got] == [layout, layout]
    return got


def gradient(function, x, dim, dy, backend, **more):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(call(function, dim, backend, **more)(x), x, dy)[0]


@pytest.fixture
def no_kept_plans():
    kernels._plan.cache_clear()
    yield
    kernels._plan.cache_clear()


def small_stream(chunks_wanted, peel=False):
    """In the place of ``choose``: streams so small that a test's tensor has several steps, panels and blocks."""

    def choose(view, itemsize, inputs, multiprocessors, lanes=32):
        columns = view.along[0] == 1
        rows, cols = (8, 16) if columns else (16, 1)
        needed = -(-view.n // (2 * rows))
        steps = -(-needed // chunks_wanted)
        chunks = -(-needed // steps)
        return Stream(2, rows, cols, 2 if columns else 1, steps, chunks, 4, 4, peel and not columns and inputs == 1)

    return choose


@pytest.fixture
def streams(monkeypatch, no_kept_plans):
    monkeypatch.setattr(kernels, "choose", small_stream(1))


@pytest.fixture
def peeled(monkeypatch, no_kept_plans):
    monkeypatch.setattr(kernels, "choose", small_stream(1, peel=True))


@triton.jit
def _no_wait(arrived, seen, wanted):
    pass


@pytest.fixture
def splits(monkeypatch, no_kept_plans):
    """The split kernels in the interpreter, where one program runs after another and none can wait: two launches on the
    same scratch memory, the first to leave the statistics of all chunks there, the second to find them."""

    def run_twice(call, tensors, scale):
        device = tensors[2].device
        partial = torch.full((max(1, call.partials),), math.nan, device=device)
        arrived = torch.zeros(max(1, call.counters), dtype=torch.int32, device=device)
        for _ in range(2):
            call.launch(call.blocks, (*tensors, partial, arrived), (*call.scalars, scale))
        if call.counters:
            assert (arrived == 2 * call.config.chunks + 1).all()  # every chunk twice, the result once

    monkeypatch.setattr(kernels, "choose", small_stream(3))
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 2)
    monkeypatch.setattr(kernels, "_wait", _no_wait)
    monkeypatch.setattr(kernels, "_run", run_twice)


# ---- right numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", OPS)
def test_value_and_gradient_hold_the_float64_budget_in_every_layout(function, dtype, layout):
    oracle(function, *make(layout, dtype, "cpu"))


@pytest.mark.parametrize("layout", ["rows", "columns", "transposed", "row padded", "columns, whole vectors"])
@pytest.mark.parametrize("incoming", [g for g in GRADIENTS if g != "like y"])
@pytest.mark.parametrize("function", OPS)
def test_the_incoming_gradient_may_have_any_strides(function, incoming, layout):
    oracle(function, *make(layout, torch.float32, "cpu", incoming))


@pytest.mark.parametrize(("n", "dtype"), [(17_001, torch.float32), (40_000, torch.bfloat16)], ids=str)
def test_rows_enough_are_left_whole_in_both_passes(n, dtype, monkeypatch, no_kept_plans):
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 3)
    for inputs in (1, 2):
        config = kernels.choose(kernels.view((3, n), 1, ((n, 1),) * 2), dtype.itemsize, inputs, 3)
        assert isinstance(config, Tile) or config.chunks == 1
    new = Numbers(dtype, "cpu")
    oracle(softmax, new(3, n), -1, new(3, n))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", OPS)
def test_scale_and_mask_of_every_broadcast_shape(function, dtype, mask):
    shape, dim, make_mask = MASKS[mask]
    new = Numbers(dtype, "cpu")
    x, dy = new(*shape), new(*shape)
    oracle(function, x, dim, dy, make_mask(new), scale=0.37)
    oracle(function, x, dim, dy, make_mask(new))


@pytest.mark.parametrize("scale", [0.125, -2, 1, 0.0, 1e-3, 1e-50])
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("function", OPS)
def test_the_scale_reaches_both_passes(function, layout, scale):
    oracle(function, *make(layout, torch.float32, "cpu"), scale=scale)


@pytest.mark.parametrize("scale", [-2, 0.0])
@pytest.mark.parametrize("function", OPS)
def test_scale_and_mask_reach_what_has_to_be_copied_first(function, scale):
    new = Numbers(torch.float32, "cpu")
    x = new(4, 4, 4, 4, 4, 6)[::2, ::2, ::2, ::2, ::2, ::2]
    oracle(function, x, -1, new(*x.shape), scale=scale)
    oracle(function, x, -1, new(*x.shape), new(2, 1, 1, 2, 3)[:, :, :, ::2], scale=scale)


KERNELS = {
    "streams": (log_softmax, torch.bfloat16),
    "peeled": (softmax, torch.bfloat16),
    "splits": (softmax, torch.float32),
}
# of several steps and blocks under ``small_stream``
STREAMED = {
    "rows": lambda new: (new(3, 90), -1),
    "rows, whole steps": lambda new: (new(8, 96), -1),
    "columns": lambda new: (new(40, 21), 0),
    "columns, whole steps": lambda new: (new(48, 32), 0),
    "columns, few": lambda new: (new(2, 40, 3), 1),
    "columns, slabs an odd distance apart": lambda new: (new(2, 513)[:, :512].view(2, 32, 16), 1),
    "offset by one element": lambda new: (new(271)[1:].view(3, 90), -1),
    "row padded": lambda new: (new(3, 100)[:, :90], -1),
    "sliced across": lambda new: (new(40, 42)[:, ::2], 0),
    "transposed": lambda new: (new(3, 90).t(), 0),
    "permuted 4-D": lambda new: (new(2, 40, 2, 3).permute(1, 3, 0, 2), 0),
    "expanded along dim": lambda new: (new(2, 1, 5).expand(2, 40, 5), 1),
    "6-D, nothing merges": lambda new: (new(2, 2, 2, 2, 2, 100)[:, :, :1, :, ::2, ::2].transpose(0, 3), -1),
    "0 long": lambda new: (new(3, 0), -1),
}


@pytest.mark.parametrize("kind", ["streams", "peeled", "splits"])
@pytest.mark.parametrize("layout", STREAMED)
def test_stream_and_split_kernels_hold_the_budget(layout, kind, request):
    request.getfixturevalue(kind)
    function, dtype = KERNELS[kind]
    new = Numbers(dtype, "cpu")
    x, dim = STREAMED[layout](new)
    oracle(function, x, dim, new(*x.shape))


# rows of which each starts elsewhere between two vectors, n long
UNEVEN = {
    "dense": lambda new, n: new(8 if n < 16 else 4, n),  # eight rows begin at every place of a vector
    "offset by one element": lambda new, n: new(4 * n + 1)[1:].view(4, n),
    "padded": lambda new, n: new(12 if n < 16 else 4, n + 7)[:, 3:-4],  # the largest error of 52 numbers is chance
    "of two dimensions": lambda new, n: new(2, 3, n)[:, :2],
    "sliced": lambda new, n: new(4, 2 * n)[:, ::2],
}


@pytest.mark.parametrize("kind", ["streams", "peeled", "splits"])
@pytest.mark.parametrize(  # less than a vector, one step, several, several whole ones
    ("layout", "n"),
    [
        *((layout, n) for layout in UNEVEN for n in (3, 13)),
        ("dense", 59),
        ("dense", 64),
        ("padded", 59),
        ("sliced", 64),
    ],
)
def test_rows_that_start_between_two_vectors(layout, n, kind, request):
    request.getfixturevalue(kind)
    function, dtype = KERNELS[kind]
    new = Numbers(dtype, "cpu")
    x = UNEVEN[layout](new, n)
    oracle(function, x, -1, UNEVEN[layout](new, n), scale=0.7)
    oracle(function, x, -1, new(*x.shape[:-1], n + 5)[..., 1:-4], new(n))


@pytest.mark.parametrize("lanes", [32, 64])
def test_registers_are_bounded_only_in_backward_on_nvidia(lanes):
    """AMD's launches refuse the option; forward with it took 47 registers at 8192 float32 numbers, not 36."""
    for width in (2000, 4097, 8192, 16384):
        view = kernels.view((16384, width), 1, ((width, 1),) * 2)
        for masked in (False, None):
            call = kernels.plan(view, 2, False, masked, 132 if lanes == 32 else 0, lanes=lanes)
            bounded = masked is None and lanes == 32 and call.config.num_warps == 16
            assert call.launch.options.get("maxnreg") == (64 if bounded else None)
            assert bounded == (masked is None and lanes == 32 and width in (4097, 8192))


def test_vectors_of_uneven_rows_are_taken_where_the_tensor_read_first_has_them():
    def vector(n, *strides, masked=False):
        launch = kernels.plan(kernels.view((264, n), 1, strides), 2, False, masked, 132).launch
        return launch.constants["VECTOR"]

    dense, padded, transposed = (50257, 1), (50304, 1), (1, 264)
    for masked in (False, None):
        assert vector(50257, dense, dense, masked=masked) == 8
        assert vector(50257, dense, padded, masked=masked) == 8
        assert vector(50256, (50256, 1), (50256, 1), masked=masked) == 1  # every row starts with a whole one
    assert vector(50257, dense, transposed) == 1
    assert vector(50257, dense, transposed, masked=None) == 8
    assert vector(50258, (50258, 1), (50258, 1)) == 8


@pytest.mark.parametrize("kind", ["streams", "peeled", "splits"])
@pytest.mark.parametrize("function", OPS)
def test_streams_take_scale_and_mask(function, kind, request):
    request.getfixturevalue(kind)
    new = Numbers(torch.float32, "cpu")
    for shape, dim, mask in (((2, 2, 40), -1, new(2, 1, 40)), ((2, 40, 8), 1, new(40, 1))):
        oracle(function, new(*shape), dim, new(*shape), mask, scale=0.5)


@pytest.mark.usefixtures("splits")
def test_more_chunks_than_the_last_program_reads_at_once(monkeypatch):
    monkeypatch.setattr(kernels, "MERGE", 2)
    new = Numbers(torch.float32, "cpu")
    for function in OPS:
        oracle(function, new(3, 90), -1, new(3, 90))
        oracle(function, new(40, 5), 0, new(40, 5))


@pytest.mark.parametrize("shape", [(1, 70_000), (2, 33_000), (9000, 3)])
def test_lengths_that_no_tile_holds(shape):
    new = Numbers(torch.bfloat16, "cpu")
    oracle(softmax, new(*shape), int(shape[0] == 9000) - 1, new(*shape))


@st.composite
def views(draw):
    """(shape of a contiguous tensor, its slices, permutation, dim): every view that basic indexing can make, small."""
    ndim = draw(st.integers(1, 5))
    shape = [draw(st.integers(0, 6)) for _ in range(ndim)]
    cuts = [slice(draw(st.integers(0, 2)), None, draw(st.integers(1, 3))) for _ in range(ndim)]
    return shape, cuts, draw(st.permutations(range(ndim))), draw(st.integers(-ndim, ndim - 1))


@hypothesis.settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(
    view=views(),
    function=st.sampled_from(OPS),
    dtype=st.sampled_from(DTYPES),
    incoming=st.sampled_from(list(GRADIENTS)),
)
def test_any_view_of_any_shape_is_right(view, function, dtype, incoming):
    shape, cuts, order, dim = view
    new = Numbers(dtype, "cpu")
    x = new(*shape)[tuple(cuts)].permute(list(order))
    oracle(function, x, dim, GRADIENTS[incoming](new, x, dim))


def test_the_oracle_itself_is_the_formula_on_the_page_and_its_derivative():
    x = [-7.3, -0.4, 0.3, 1.1, 6.5]
    mask = [0.5, 0.0, -1.0, 2.0, -3.0]
    z = [1.5 * a + b for a, b in zip(x, mask, strict=True)]
    total = sum(math.exp(a - max(z)) for a in z)
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(mask, dtype=torch.float64)
    wanted = torch.tensor([math.exp(a - max(z)) / total for a in z], dtype=torch.float64)
    run = [call(function, 0, "torch", scale=1.5, mask=mask) for function in OPS]
    torch.testing.assert_close(run[0](leaf), wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(run[1](leaf), wanted.log(), rtol=1e-12, atol=1e-14)
    assert all(torch.autograd.gradcheck(one, leaf) for one in run)
    for function, one in zip(OPS, run, strict=True):  # the formula of backward, which a second derivative goes through
        y, dy = one(leaf).detach(), torch.linspace(-1, 2, 5, dtype=torch.float64)
        dx = op.reference.backward(y, dy, 0, 1.5, function is log_softmax)
        torch.testing.assert_close(dx, torch.autograd.grad(one(leaf), leaf, dy)[0], rtol=1e-12, atol=1e-14)


# ---- NaN, infinity, large numbers --------------------------------------------------------------------------------------

INF, NAN = math.inf, math.nan
EDGES = torch.tensor(
    [
        [-INF, -INF, -INF, -INF, -INF], [0.0, -INF, 1.0, -INF, 2.0], [-INF, -INF, -INF, -INF, 3.0],
        [0.0, INF, 1.0, 2.0, 3.0], [NAN, 0.0, 1.0, 2.0, 3.0], [-INF, -INF, NAN, -INF, -INF], [INF, INF, -INF, 0.0, 0.0],
        [1e4, 1e4 - 8, 0.0, -1e4, -6e4], [6e4, 6e4, 6e4, 6e4, 6e4], [-6e4, -6e4, -6e4, -6e4, -6e4],
        [NAN, NAN, NAN, NAN, NAN], [0.0, -0.0, 1e-8, -1e-8, 0.0],
    ]
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "dtype"), [*(("tiles", d) for d in DTYPES), ("streams", torch.float32), ("splits", torch.float32)]
)
@pytest.mark.parametrize("function", OPS)
def test_infinite_and_nan_rows_end_as_in_pytorch(function, dtype, kind, request):
    if kind != "tiles":
        request.getfixturevalue(kind)
    # as rows, as columns, and far apart: a first step that is -inf throughout, a later one that is not
    long = torch.full((12, 70), -INF)
    long[:, 3::14] = EDGES
    for x, dim in ((EDGES, 1), (EDGES.t().contiguous(), 0), (long, 1), (long.flip(1).t().contiguous(), 0)):
        edges_end_as_in_pytorch(function, x.to(dtype), dim)


def edges_end_as_in_pytorch(function, x, dim, ours="triton"):
    dy = normal(x.shape, x.dtype, seed=1, device=x.device)
    ours, theirs, true = (
        vjp(call(function, dim, backend), [x.to(precision)], dy.to(precision))
        for backend, precision in ((ours, x.dtype), ("torch", x.dtype), ("torch", torch.float64))
    )
    for got, pytorchs in zip(ours, theirs, strict=True):
        assert torch.equal(got.isnan(), pytorchs.isnan())
    assert_within_budget(ours, theirs, true)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", OPS)
def test_on_the_card_infinite_and_nan_rows_end_as_in_pytorch(function, dtype):
    long = torch.full((12, 60_000), -INF)
    long[:, 30_003::6000] = EDGES
    for x, dim in ((EDGES, 1), (EDGES.t().contiguous(), 0), (long, 1), (long.flip(1).t().contiguous(), 0)):
        edges_end_as_in_pytorch(function, x.to("cuda", dtype), dim)


@pytest.mark.parametrize("function", OPS)
def test_a_row_that_the_mask_hides_is_nan_and_partly_hidden_rows_sum_to_one(function):
    x = normal((3, 6), torch.float32, seed=1)
    mask = torch.zeros(3, 6)
    mask[0] = -INF
    mask[1, ::2] = -INF
    y = function(x, mask=mask, backend="triton")
    y = y.exp() if function is log_softmax else y
    assert y[0].isnan().all()
    assert (y[1, ::2] == 0).all()
    torch.testing.assert_close(y[1:].sum(1), torch.ones(2))


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("function", OPS)
def test_large_values_hold_the_budget(function, size):
    new = Numbers(torch.float32, "cpu", scale=size)
    x = new(5, 70)
    oracle(function, x, -1, normal(x.shape, x.dtype, seed=9))
    oracle(function, x + 1e5, 0, normal(x.shape, x.dtype, seed=9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["tiles", "streams", "peeled"])
def test_the_largest_numbers_of_a_dtype_do_not_overflow(kind, dtype, request):
    if kind != "tiles":
        request.getfixturevalue(kind)
    x = torch.full((2, 70), -torch.finfo(dtype).max, dtype=dtype)
    x[:, ::7] = torch.finfo(dtype).max
    y = softmax(x, backend="triton")
    torch.testing.assert_close(y.float(), (x > 0).float() / 10, rtol=4e-3, atol=0)


# ---- the choice --------------------------------------------------------------------------------------------------------


def test_the_view_merges_what_it_can():
    contiguous = kernels.view((12, 12, 256, 128), 3, ((393216, 32768, 128, 1),) * 2)
    assert contiguous[:3] == (128, 36864, (1, 1, 1))
    assert contiguous.along == (0, 0)
    columns = kernels.view((12, 12, 256, 128), 2, ((393216, 32768, 128, 1),) * 2)
    assert columns == (256, 128, (1, 1, 144), (1, 1), ((0, 0, 32768, 128, 1),) * 2)
    masked = kernels.view((2, 3, 5, 16), 3, ((240, 80, 16, 1), (240, 80, 16, 1), (80, 0, 16, 1)))
    assert masked[:3] == (16, 5, (1, 2, 3))
    assert masked.strides[2] == (0, 80, 0, 1, 16)
    assert kernels.view((2,) * 6, 5, ((32, 16, 8, 4, 2, 1), (64, 16, 4, 128, 8, 1))) is None


@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_choice_covers_the_tensor_and_fits_the_machine(itemsize, inputs, lanes):
    for multiprocessors in (0, 8, 108, 132):
        for n in (1, 2, 31, 128, 257, 1000, 2048, 5000, 32768, 40000, 131072, 250_000):
            for c in (1, 3, 128, 129, 5000):
                for along in (0, 1):
                    strides = ((0, 0, 0, 1, n) if along == 0 else (0, 0, 0, c, 1),) * 2
                    view = kernels.View(n, c, (1, 1, 1), (along, along), strides)
                    config = kernels.choose(view, itemsize, inputs, multiprocessors, lanes)
                    assert lanes <= config.num_warps * lanes <= 1024
                    if isinstance(config, Tile):
                        assert config.rows >= n
                        values = config.rows * config.cols / (config.num_warps * lanes)
                        assert values * inputs <= 64
                        continue
                    assert config.deep * config.rows * config.steps * config.chunks >= n
                    assert config.rows * config.cols == config.num_warps * lanes * 16 // itemsize  # a vector a thread
                    group = config.chunks * config.panel
                    assert config.chunks == 1 or 2 * group <= multiprocessors * config.per_sm
                    assert config.num_warps * lanes * config.per_sm * 64 <= 65536 or not multiprocessors


def test_one_binary_serves_lengths_of_one_class():
    """A length is a number at run time; only what decides vectors and tiles is compiled in."""

    def launch(n):
        return kernels.plan(kernels.view((64, n), 1, ((n, 1),) * 2), 2, False, False, 0).launch

    assert launch(520) is launch(1000) is launch(904)
    assert launch(1000) is not launch(1001)
    assert launch(1000) is not launch(1024)
    assert launch(1000).constants["UNIT"] == 8
    assert launch(1001).constants["UNIT"] == 1


# ---- what backward keeps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "columns", "transposed", "sliced along the rows"])
@pytest.mark.parametrize("function", OPS)
def test_y_alone_is_saved_and_backward_writes_into_nothing_of_others(function, layout, device):
    x, dim, dy = make(layout, torch.float32, device)
    before = x.clone(), dy.clone()
    leaf = x.detach().requires_grad_()
    y = call(function, dim, "triton")(leaf)
    (saved,) = y.grad_fn.saved_tensors
    assert saved.data_ptr() == y.data_ptr()
    kept = y.detach().clone()
    first = torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]
    bits = first.clone()
    second = torch.autograd.grad(y, leaf, dy)[0]
    same((first, second), (bits, bits))
    same((x, dy), before)
    same(y.detach(), kept)


def test_changing_y_before_backward_raises_and_changing_x_does_not_matter(device):
    leaf = normal((4, 5), torch.float32, seed=1, device=device).requires_grad_()
    x = leaf.clone()
    y = softmax(x, backend="triton")
    x.add_(1)
    y.pow(2).sum().backward(retain_graph=True)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_may_give_y_back_in_another_layout():
    x = normal((6, 5), torch.float32, seed=1).requires_grad_()
    dy = normal((6, 5), torch.float32, seed=2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().t().contiguous(), lambda t: t.t()):
        y = softmax(x, backend="triton")
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], gradient(softmax, x, -1, dy, "torch"))


# ---- higher derivatives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "columns", "transposed", "sliced along the rows"])
@pytest.mark.parametrize("function", OPS)
def test_the_second_derivative_is_pytorchs(function, layout, device):
    x, dim, dy = make(layout, torch.float32, device)
    v = Numbers(torch.float32, device)(*x.shape)
    results = []
    for backend in ("triton", "torch"):
        leaf, incoming = x.detach().requires_grad_(), dy.detach().requires_grad_()
        run = call(function, dim, backend, scale=0.7)
        (dx,) = torch.autograd.grad(run(leaf), leaf, incoming, create_graph=True)
        results.append((dx.detach(), *torch.autograd.grad(dx, (leaf, incoming), v, materialize_grads=True)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", OPS)
def test_a_batch_of_gradients_can_be_pulled_back_at_once(function, device):
    x = normal((5,), torch.float32, seed=1, device=device).requires_grad_()
    jacobians = [
        torch.autograd.grad(call(function, 0, b)(x), x, torch.eye(5, device=device), is_grads_batched=True)[0]
        for b in ("triton", "torch")
    ]
    torch.testing.assert_close(*jacobians)


@pytest.mark.parametrize("function", OPS)
@pytest.mark.parametrize("dtype", HALF)
def test_a_batch_of_gradients_of_half_types_is_rounded_once(dtype, function, device):
    """Gradients that have much in common: of a rounded sum little but its error is left."""
    x, dy = normal((3, 300), dtype, seed=1, device=device), normal((2, 3, 300), dtype, seed=2, device=device) + 100

    def pulled(wide, backend):
        leaf = x.detach().to(wide).requires_grad_()
        return torch.autograd.grad(call(function, -1, backend)(leaf), leaf, dy.to(wide), is_grads_batched=True)

    got, low, true = pulled(dtype, "triton"), pulled(dtype, "torch"), pulled(torch.float64, "torch")
    assert_within_budget(got, low, true)


# ---- dtype -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("wanted", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("function", OPS)
def test_dtype_is_what_x_is_converted_to_as_by_pytorchs(function, given, wanted, backend, device):
    theirs = getattr(torch.nn.functional, function.__name__)
    if backend == "triton" and wanted == torch.float64:
        with pytest.raises(trinix.Unsupported, match="'triton' needs float16"):
            function(torch.ones(3, dtype=given, device=device), dtype=wanted, backend=backend)
        return
    x, dy = normal((5, 33), given, seed=1, device=device), normal((5, 33), wanted, seed=2, device=device)
    mask = normal((33,), given, seed=3, device=device)
    for dim in (0, -1):
        ours = vjp(lambda x, dim=dim: function(x, dim, dtype=wanted, backend=backend), [x], dy)
        assert [t.dtype for t in ours] == [wanted, given]
        converted = vjp(lambda x, dim=dim: function(x, dim, backend=backend), [x.to(wanted)], dy)
        same(ours, [converted[0], converted[1].to(given)])
        if wanted not in HALF:  # whose rounding is the budget's to judge
            torch.testing.assert_close(ours, vjp(lambda x, dim=dim: theirs(x, dim, dtype=wanted), [x], dy))
        more = {"scale": 0.5, "mask": mask, "backend": backend}
        same(function(x, dim, dtype=wanted, **more), function(x.to(wanted), dim, **more))


@pytest.mark.parametrize("x", [torch.arange(6).view(2, 3), torch.tensor([True, False])], ids=["integers", "bool"])
@pytest.mark.parametrize("function", OPS)
def test_with_a_dtype_x_may_be_of_whole_numbers(function, x):
    theirs = getattr(torch, function.__name__)
    torch.testing.assert_close(function(x, dtype=torch.float32), theirs(x, -1, dtype=torch.float32))


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_a_dtype_holds_under_autocast_and_the_dtype_of_x_copies_nothing(backend, device):
    x = normal((4, 6), torch.float16, seed=1, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert softmax(x, dtype=torch.float32, backend=backend).dtype == torch.float32
        assert log_softmax(x.float(), dtype=torch.float16, backend=backend).dtype == torch.float16
    with Watch() as watch:
        softmax(x, dtype=torch.float16, backend=backend)
    assert not any("copy" in str(op) for op in watch.seen)


@pytest.mark.parametrize("function", OPS)
def test_a_dtype_that_makes_no_sense_is_refused(function):
    name, x = function.__name__, torch.ones(3)
    for wrong in (torch.int64, torch.complex64, "float32", float):
        for ask in (function, lambda x, function=function, **more: trinix.explain(function, x, **more)):
            with pytest.raises(
                TypeError, match=f"^{name}: dtype must be a floating-point dtype or None, got .*; name one"
            ):
                ask(x, dtype=wrong)
    for wrong, got in ((x.to(torch.complex64), "torch.complex64"), ([1.0], "list")):
        with pytest.raises(TypeError, match=f"^{name}: x must be a floating-point tensor, got {got}"):
            function(wrong, dtype=torch.float32)


# ---- errors, choice, explanation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("function", OPS)
def test_arguments_that_make_no_sense_are_refused_with_the_cure(function, backend):
    x, name = torch.ones(3, 4), function.__name__
    for wrong, error, text in (
        (lambda: function(torch.arange(3), backend=backend), TypeError, "x must be a floating-point tensor, got torch.int64"),
        (lambda: function([1.0], backend=backend), TypeError, "x must be a floating-point tensor, got list"),
        (lambda: function(x, None, backend=backend), TypeError, "dim must be an int, got NoneType"),
        (lambda: function(x, True, backend=backend), TypeError, "dim must be an int, got bool"),
        (lambda: function(x, torch.tensor(1), backend=backend), TypeError, "dim must be an int, got Tensor"),
        (lambda: function(x, 2, backend=backend), ValueError, r"dim must be from -2 to 1 for x of shape \[3, 4\], got 2"),
        (lambda: function(x, -3, backend=backend), ValueError, "dim must be from -2 to 1"),
        (lambda: function(torch.ones(()), 1, backend=backend), ValueError, "dim must be from -1 to 0"),
        (lambda: function(x, scale=torch.ones(()), backend=backend), TypeError, "scale must be a number, got a tensor"),
        (lambda: function(x, mask=x > 0, backend=backend), TypeError, "mask must be a floating-point tensor, got torch.bool.*-inf"),
        (lambda: function(x, mask=torch.ones(3), backend=backend), ValueError, r"mask must broadcast to x's shape \[3, 4\], got \[3\]"),
        (lambda: function(x, mask=torch.ones(2, 3, 4), backend=backend), ValueError, "mask must broadcast"),
        (lambda: function(x, mask=x.to("meta"), backend=backend), ValueError, "mask must be on cpu as x is, got meta"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^{name}: {text}"):
            wrong()


@pytest.mark.parametrize("function", OPS)
def test_an_integer_of_numpys_is_a_dimension(function):
    x = normal((3, 4), torch.float32, seed=0)
    for backend in ("auto", "triton"):
        assert torch.equal(function(x, np.int64(0), backend=backend), function(x, 0, backend=backend))


def test_an_unknown_backend_is_refused_with_the_list_of_backends():
    with pytest.raises(ValueError, match=r"\['auto', 'hopper', 'triton', 'torch'\], got 'tritn'"):
        softmax(torch.ones(3), backend="tritn")
    with trinix.use_backend("tritn"), pytest.raises(ValueError, match=r"log_softmax.*got 'tritn'"):
        log_softmax(torch.ones(3))


def test_what_triton_cannot_run_is_unsupported_by_name_and_goes_through_auto():
    x = torch.ones(3, 4)
    learned = torch.zeros(4, requires_grad=True)
    for arguments, reason in (
        ({"x": x.double()}, "needs float16, bfloat16 or float32, got float64"),
        ({"x": x, "mask": x.double()}, "needs float16, bfloat16 or float32, got float64"),
        ({"x": x.to("meta")}, "needs a GPU tensor, got meta"),
        ({"x": x, "mask": learned}, "gives no gradient to mask"),
    ):
        with pytest.raises(trinix.Unsupported, match=f"softmax: backend 'triton' {reason}.*auto"):
            softmax(**arguments, backend="triton")
        assert softmax(**arguments).shape == (3, 4)
    with torch.no_grad():
        softmax(x, mask=learned, backend="triton")
    (softmax(x, mask=learned) * torch.arange(4)).sum().backward()
    assert learned.grad.abs().sum() > 0


def backend_that_ran(y) -> str:
    return getattr(y.grad_fn, "call", ("torch",))[-1]


def test_use_backend_stands_in_for_auto_only(device):
    x = torch.ones(3, device=device, requires_grad=True)
    with trinix.use_backend("triton"):
        assert backend_that_ran(softmax(x)) == "triton"
        assert backend_that_ran(softmax(x, backend="torch")) == "torch"
    assert backend_that_ran(softmax(x)) == "torch"  # auto, so small


def test_no_gradient_is_recorded_where_none_is_wanted(device):
    x = torch.ones(3, device=device)
    for function in OPS:
        assert function(x, backend="triton").grad_fn is None
        with torch.no_grad():
            assert not function(x.clone().requires_grad_(), backend="triton").requires_grad


EXPLAINED = {
    "auto on the CPU": (
        lambda x: trinix.explain("softmax", x.cpu()),
        "softmax -> torch: the first backend that is right and fastest here\n  not triton: needs a GPU tensor, got cpu",
    ),
    "named": (
        lambda x: trinix.explain(log_softmax, x, backend="torch"),
        "log_softmax -> torch: named by the caller",
    ),
    "rows": (
        lambda x: trinix.explain("softmax", x, backend="triton"),
        "softmax -> triton: named by the caller\n  config: tile kernel, 64 x 8, 4 warps",
    ),
    "columns": (
        lambda x: trinix.explain("log_softmax", x.half(), 0, mask=x[:1], backend="triton"),
        "log_softmax -> triton: named by the caller\n  config: tile kernel, 8 x 64, 1 warps",
    ),
    "converted": (
        lambda x: trinix.explain("softmax", x.double().t(), 0, dtype=torch.float32, backend="triton"),
        "softmax -> triton: named by the caller\n  config: tile kernel, 64 x 8, 4 warps",
    ),
    "copy": (
        lambda x: trinix.explain("softmax", x.view((2,) * 9)[:, ::2, :, :1].expand((2,) * 9), backend="triton").backend,
        "triton",
    ),
}


@pytest.mark.parametrize("case", EXPLAINED)
def test_explain_says_backend_reason_and_configuration(case, device):
    explain, text = EXPLAINED[case]
    assert str(explain(torch.ones(8, 64, device=device))) == text


def test_explain_refuses_what_the_call_would_refuse():
    x = torch.ones(8)
    with pytest.raises(trinix.Unsupported, match="'triton' needs float16"):
        trinix.explain("softmax", x.double(), backend="triton")
    with pytest.raises(ValueError, match="got 'tritn'"):
        trinix.explain("softmax", x, backend="tritn")
    with pytest.raises(ValueError, match="softmax: dim must be"):
        trinix.explain("softmax", x, 1)
    with pytest.raises(ValueError, match="log_softmax: mask must broadcast"):
        trinix.explain("log_softmax", x, mask=torch.ones(7))


# ---- a citizen of PyTorch ----------------------------------------------------------------------------------------------


def compiled_matches_eager(function, backend, compiler, x, dim, **more):
    """A fullgraph compile, fed twice, against the eager call; returns the targets of the graphs that it made."""
    targets = []

    def recording(graph, example_inputs):
        graphs = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        targets.extend(str(node.target) for one in graphs for node in one.graph.nodes)
        return torch._dynamo.lookup_backend(compiler)(graph, example_inputs)

    run = call(function, dim, backend, **more)
    compiled = torch.compile(lambda t: run(t * 2) + 1, fullgraph=True, backend=recording)
    for leaf in (x, -x):
        leaf = leaf.detach().requires_grad_()
        eager = run(leaf * 2) + 1
        y = compiled(leaf)
        torch.testing.assert_close(y, eager)
        dy = normal(y.shape, y.dtype, seed=5, device=y.device)
        torch.testing.assert_close(torch.autograd.grad(y, leaf, dy), torch.autograd.grad(eager, leaf, dy))
    return targets


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("function", OPS)
def test_compile_takes_auto_whole_and_sees_the_plain_formula(function):
    x = normal((4, 6), torch.float32, seed=1)
    targets = compiled_matches_eager(function, "auto", "aot_eager", x, -1)
    assert not any("trinix" in target or "autograd_function" in target for target in targets)
    compiled_matches_eager(function, "auto", "aot_eager", x, 0, scale=0.5, mask=normal((6,), torch.float32, seed=2))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("layout", ["rows", "columns", "transposed"])
@pytest.mark.parametrize("function", OPS)
def test_compile_takes_triton_as_one_registered_op(function, layout, device):
    x, dim, _ = make(layout, torch.float32, device)
    assert "trinix.softmax.default" in compiled_matches_eager(function, "triton", "aot_eager", x, dim)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_takes_triton_with_a_mask_and_follows_use_backend(device):
    x, mask = (normal((4, 6), torch.float32, seed=s, device=device) for s in (1, 2))
    with trinix.use_backend("triton"):
        targets = compiled_matches_eager(softmax, "auto", "aot_eager", x, -1, scale=0.3, mask=mask)
    assert "trinix.softmax.default" in targets


@pytest.mark.parametrize("layout", ["rows", "columns", "sliced along the rows", "0 rows"])
def test_the_registered_ops_pass_opcheck(layout, device):
    x, dim, dy = make(layout, torch.float32, device, "contiguous")
    dim %= x.ndim
    torch.library.opcheck(torch.ops.trinix.softmax.default, (x, None, dim, 0.5, False, "triton"))
    torch.library.opcheck(
        torch.ops.trinix.softmax.default,
        (x, x[:1], dim, 0.5, True, "triton") if len(x) else (x, None, dim, 1.0, True, "triton"),
    )
    y = torch.empty_like(x).copy_(x)
    torch.library.opcheck(torch.ops.trinix.softmax_backward.default, (y, dy, dim, 0.5, False, "triton"))


@pytest.mark.parametrize("function", OPS)
def test_a_dispatch_mode_sees_one_op_a_pass_and_it_holds_the_budget(function, device):
    x, dim, dy = make("transposed", torch.float32, device)
    with Watch() as watch:
        y = call(function, dim, "triton")(x.detach().requires_grad_())
        y.backward(dy)
    wanted = ["trinix.softmax.default", "trinix.softmax_backward.default"]
    assert [name for name in watch.seen if "trinix" in name] == wanted
    with Watch():
        oracle(function, x, dim, dy)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_fake_tensors_pass_with_shape_strides_and_dtype_and_no_kernel(backend, device, monkeypatch):
    monkeypatch.setattr(_launch.Launch, "__call__", lambda *_: pytest.fail("a kernel ran on a fake tensor"))
    with FakeTensorMode():
        x = torch.empty(4, 6, device=device, dtype=torch.bfloat16).t().requires_grad_()
        y = softmax(x, 0, scale=2.0, mask=torch.empty(4, device=device), backend=backend)
        y.sum().backward()
    assert (y.shape, y.dtype, x.grad.shape) == (x.shape, x.dtype, x.shape)
    assert backend == "auto" or y.stride() == x.stride()


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("function", OPS)
def test_forward_mode_and_transforms_give_the_right_answer_or_an_error(function, backend, device):
    x, dim, tangent = make("rows", torch.float32, device)
    run, plain = call(function, dim, backend), call(function, dim, "torch")
    wanted = torch.func.jvp(plain, (x,), (tangent,))[1]

    def by_dual_numbers(leaf):
        with torch.autograd.forward_ad.dual_level():
            y = run(torch.autograd.forward_ad.make_dual(leaf, tangent))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    right_or_refused(lambda: by_dual_numbers(x), wanted)
    right_or_refused(lambda: by_dual_numbers(x.detach().requires_grad_()), wanted)
    right_or_refused(lambda: torch.func.jvp(run, (x,), (tangent,))[1], wanted)
    right_or_refused(lambda: torch.func.vmap(run)(x), plain(x))
    right_or_refused(
        lambda: torch.func.grad(lambda t: (run(t) * tangent).sum())(x), gradient(function, x, dim, tangent, "torch")
    )


@pytest.mark.parametrize("function", OPS)
def test_function_transforms_go_through_auto(function, device):
    x = normal((5, 3), torch.float32, seed=1, device=device)
    torch.testing.assert_close(torch.func.vmap(call(function, -1, "auto"))(x), call(function, -1, "torch")(x))
    jacobian = torch.func.jacrev(call(function, -1, "auto"))(x[0])
    torch.testing.assert_close(jacobian, torch.func.jacfwd(call(function, -1, "auto"))(x[0]))


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", OPS)
def test_autocast_changes_no_dtype(function, dtype, backend, device):
    x = torch.ones(4, dtype=dtype, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = function(x, mask=torch.zeros(4, device=device), backend=backend)
    assert y.dtype == dtype
    assert torch.autograd.grad(y.sum(), x)[0].dtype == dtype


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_negative_view_is_read_with_its_sign(backend, device):
    x, dim, dy = make("rows", torch.float32, device)
    resolved, x, mask = -x, torch._neg_view(x), torch._neg_view(dy)
    torch.testing.assert_close(call(softmax, dim, backend)(x), call(softmax, dim, "torch")(resolved))
    torch.testing.assert_close(call(softmax, dim, backend, mask=mask)(dy), call(softmax, dim, "torch", mask=-dy)(dy))
    got = gradient(softmax, x, dim, torch._neg_view(dy), backend)
    torch.testing.assert_close(got, gradient(softmax, resolved, dim, -dy, "torch"))


def test_a_tensor_subclass_keeps_its_type_and_a_parameter_is_plain(device):
    x = normal((4, 6), torch.float32, seed=1, device=device)
    for backend in ("auto", "triton"):
        y = softmax(x.as_subclass(Tagged), backend=backend)
        assert type(y) is Tagged
        torch.testing.assert_close(y.as_subclass(torch.Tensor), torch.softmax(x, -1))
    assert "Registered" not in type(softmax(nn.Parameter(x), backend="triton").grad_fn).__name__


def test_checkpointing_and_anomaly_mode_work(device):
    x = normal((4, 6), torch.float32, seed=1, device=device).requires_grad_()
    run = lambda t: call(softmax, 0, "triton")(t).square()  # noqa: E731
    wanted = torch.autograd.grad(run(x).sum(), x)[0]
    y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    same(torch.autograd.grad(y.sum(), x)[0], wanted)
    with torch.autograd.detect_anomaly(check_nan=True):
        same(torch.autograd.grad(run(x).sum(), x)[0], wanted)


# ---- the tests can fail ------------------------------------------------------------------------------------------------


def test_a_program_that_does_not_run_fails_the_oracle(monkeypatch):
    run = _launch.Launch.__call__
    monkeypatch.setattr(_launch.Launch, "__call__", lambda self, blocks, *rest: run(self, blocks - 1, *rest))
    with pytest.raises(AssertionError, match="y: error nan"):
        oracle(softmax, *make("rows, many a program", torch.float32, "cpu"))


@pytest.mark.parametrize("kind", ["streams", "splits"])
def test_a_step_that_is_left_out_fails_the_oracle(kind, request, monkeypatch):
    request.getfixturevalue(kind)
    choose = kernels.choose
    monkeypatch.setattr(kernels, "choose", lambda *a: (lambda c: c._replace(steps=c.steps - 1))(choose(*a)))
    for layout in ("rows", "columns"):
        new = Numbers(torch.float32, "cpu")
        x, dim = STREAMED[layout](new)
        with pytest.raises(AssertionError, match="y: "):
            oracle(softmax, x, dim, x)


@triton.jit
def _combines_nothing(line, chunks, scale, LATE, MERGE, COLS):
    pass


@triton.jit
def _combines_without_the_largest(line, chunks, scale, LATE, MERGE, COLS):
    tl.store(line + tl.arange(0, COLS), 0.0)
    total = tl.zeros((COLS,), tl.float32)
    for chunk in range(1, chunks + 1):
        total += tl.load(line + chunk * 2 * COLS + COLS + tl.arange(0, COLS))
    tl.store(line + COLS + tl.arange(0, COLS), total)


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("broken", [_combines_nothing, _combines_without_the_largest])
def test_chunks_that_are_not_combined_fail_the_oracle(broken, monkeypatch):
    monkeypatch.setattr(kernels, "_combine", broken)
    with pytest.raises(AssertionError, match="y: error"):
        oracle(softmax, *make("columns, few", torch.float32, "cpu"))


# ---- on the card -------------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu

GPU_LAYOUTS = {
    **{f"rows {n}": (lambda new, n=n: (new(301, n), -1)) for n in (1, 7, 64, 128, 130, 512, 1000, 1001, 4096, 20000)},
    **{f"columns {n}": (lambda new, n=n: (new(5, n, 136), 1)) for n in (1, 5, 64, 256, 513, 1024, 4099)},
    "long rows": lambda new: (new(9, 131072), -1),
    "long rows, odd": lambda new: (new(3, 200_001), -1),
    "long rows, odd, whole": lambda new: (new(150, 50257), -1),
    "long rows, odd, offset": lambda new: (new(150 * 40_001 + 1)[1:].view(150, 40_001), -1),
    "long rows, odd, padded": lambda new: (new(150, 50304)[:, :50257], -1),
    "one long row": lambda new: (new(1, 262144), -1),
    "long columns": lambda new: (new(3, 32768, 128), 1),
    "long columns, odd": lambda new: (new(2, 9001, 77), 1),
    "long columns, many": lambda new: (new(3000, 1024), 0),
    "longer than all programs hold": lambda new: (new(600_000, 16), 0),
    "show-piece": lambda new: (new(12, 12, 1024, 128), -2),
    "show-piece, long": lambda new: (new(3, 4, 8192, 128), -2),
    "offset by one element": lambda new: (new(1_000_001)[1:].view(1000, 1000), -1),
    "offset, columns": lambda new: (new(1_000_001)[1:].view(1000, 1000), 0),
    "transposed": lambda new: (new(1031, 515).t(), -1),
    "row padded": lambda new: (new(1000, 1056)[:, :1031], -1),
    "sliced columns": lambda new: (new(700, 2063)[:, ::2], -1),
    "permuted 4-D": lambda new: (new(13, 17, 31, 35).permute(2, 0, 3, 1), 1),
    "channels last": lambda new: (new(8, 17, 31, 33).contiguous(memory_format=torch.channels_last), 1),
    "6-D, nothing merges": lambda new: (new(6, 4, 10, 4, 6, 66)[::2, ::2, ::2, ::2, ::2, ::2], 2),
}


@gpu
@pytest.mark.parametrize("layout", GPU_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", OPS)
def test_on_the_card_value_and_gradient_hold_the_float64_budget(function, dtype, layout):
    new = Numbers(dtype, "cuda")
    x, dim = GPU_LAYOUTS[layout](new)
    dy = GRADIENTS["like y"](new, x, dim)
    for _ in range(2):  # Triton's own path, then the fast launch
        oracle(function, x, dim, dy)


@gpu
@pytest.mark.parametrize("incoming", [g for g in GRADIENTS if g != "like y"])
@pytest.mark.parametrize("layout", ["rows 1000", "rows 20000", "columns 256", "columns 4099", "long columns, odd"])
def test_on_the_card_the_incoming_gradient_may_have_any_strides(layout, incoming):
    for dtype in (torch.float32, torch.bfloat16):
        new = Numbers(dtype, "cuda")
        x, dim = GPU_LAYOUTS[layout](new)
        oracle(softmax, x, dim, GRADIENTS[incoming](new, x, dim))


@gpu
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("shape", [(2, 5, 129, 256), (2, 3, 1100, 4096), (1, 2, 64, 70_000), (1, 2, 80, 50257)])
def test_on_the_card_masks_of_attention(shape, dim):
    new = Numbers(torch.bfloat16, "cuda")
    b, _, q, k = shape
    for mask in (new(b, 1, q, k), new(b, 1, 1, k), new(q, k).float()):
        oracle(softmax, new(*shape), dim, new(*shape), mask, scale=0.125)


@gpu
@pytest.mark.parametrize("layout", ["long columns", "show-piece, long", "longer than all programs hold"])
def test_the_split_kernels_run_where_they_should_and_give_the_same_bits_every_time(layout):
    new = Numbers(torch.bfloat16, "cuda")
    x, dim = GPU_LAYOUTS[layout](new)
    assert "chunks of" in trinix.explain("softmax", x, dim, backend="triton").config
    dy = new(*x.shape)
    first = vjp(call(softmax, dim, "triton"), [x], dy)
    for _ in range(19):
        same(vjp(call(softmax, dim, "triton"), [x], dy), first)


@gpu
def test_split_kernels_on_two_streams_at_once_do_not_wait_for_each_other():
    new = Numbers(torch.bfloat16, "cuda")
    xs = [new(4, 16384, 128) for _ in range(4)]
    wanted = [softmax(x, 1, backend="triton") for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    for _ in range(5):
        got = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(softmax(x, 1, backend="triton"))
        torch.cuda.synchronize()
        same(got, wanted)


@gpu
@pytest.mark.parametrize("layout", ["rows 1000", "columns 256", "columns 4099", "long rows"])
def test_a_cuda_graph_replays_forward_and_backward_on_new_data(layout):
    new = Numbers(torch.bfloat16, "cuda")
    x, dim = GPU_LAYOUTS[layout](new)
    dy = new(*x.shape)
    run = call(softmax, dim, "triton")
    graph, results = captured(lambda: vjp(run, [x], dy))
    for _ in range(3):
        x.copy_(new(*x.shape))
        dy.copy_(new(*x.shape))
        graph.replay()
        same(results, vjp(run, [x], dy))


@gpu
def test_more_than_2_to_the_31_elements_are_right_at_both_ends():
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < 24:
        pytest.skip(f"needs 24 GiB of free GPU memory, {free:.0f} GiB are free")
    rows, width = 2**15 + 3, 2**16
    for shape, dim in (((rows, width), -1), ((rows, width), 0)):
        x = normal(shape, torch.bfloat16, seed=1, device="cuda")
        y = softmax(x, dim, backend="triton")
        for here in ((slice(0, 2), slice(None)), (slice(-2, None), slice(None))):
            here = here if dim == -1 else here[::-1]
            wanted = torch.softmax(x[here].double(), dim)
            assert_within_budget((y[here],), (torch.softmax(x[here], dim),), (wanted,))


@gpu
def test_auto_reaches_triton_on_the_card():
    """Or the tests of auto say nothing."""
    small = torch.ones(8, 8, device="cuda", requires_grad=True)
    large = torch.ones(1024, 1024, device="cuda", requires_grad=True)
    assert backend_that_ran(softmax(small)) == "torch"
    assert backend_that_ran(softmax(small, 0)) == "triton"
    assert backend_that_ran(softmax(small, scale=0.5)) == "triton"
    assert backend_that_ran(softmax(large)) == "triton"
    for x, dim in ((small, -1), (small, 0), (large, -1)):
        assert trinix.explain("softmax", x, dim).backend == backend_that_ran(softmax(x, dim))


@gpu
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("function", OPS)
def test_inductor_compiles_it_whole(function, backend):
    x = normal((64, 130), torch.float32, seed=1, device="cuda")
    compiled_matches_eager(function, backend, "inductor", x, 0)


# ---- on the card, Hopper ------------------------------------------------------------------------------------------------

HOPPER_SHAPES = [
    (144, 512, 128), (12, 1024, 128), (3, 1000, 120), (2, 4097, 8), (5, 1, 64), (7, 129, 1000), (1, 60_000, 64), (1, 130, 24),
    (2, 3, 2049, 5, 16), (1, 257, 70_000), (40_000, 3, 8), (9, 65_536, 128),
]  # fmt: skip


@pytest.fixture
def hopper():
    from trinix.kernels.hopper import softmax as module

    return module


@gpu
@pytest.mark.parametrize("shape", HOPPER_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", OPS)
def test_hopper_holds_the_float64_budget(function, dtype, shape):
    new, dim = Numbers(dtype, "cuda"), 2 if len(shape) == 5 else 1
    for scale in (1.0, 0.3):
        oracle(function, new(*shape), dim, new(*shape), ours="hopper", scale=scale)
    oracle(function, new(*shape), dim, new(*shape).transpose(0, 1).contiguous().transpose(0, 1), ours="hopper")


HOPPER_ROWS = [
    (3, 131_072), (140, 65_544), (17, 100_000), (16, 151_936), (2, 2, 33_000), (3, 32_768), (2, 202_048, 1), (40, 262_144),
]  # fmt: skip


@gpu
@pytest.mark.parametrize("shape", HOPPER_ROWS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", OPS)
def test_hopper_holds_the_float64_budget_in_long_rows(function, dtype, shape):
    new, dim = Numbers(dtype, "cuda"), 1 if shape[-1] == 1 else len(shape) - 1
    for scale in (1.0, 0.3):
        oracle(function, new(*shape), dim, new(*shape), ours="hopper", scale=scale)
    oracle(function, new(*shape), dim, new(*shape[:-1], 1).expand(shape), ours="hopper")


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", OPS)
def test_hopper_infinite_and_nan_rows_end_as_in_pytorch(function, dtype):
    for n in (33_000, 70_000):
        x = torch.full((EDGES.shape[0], n), -INF)
        x[:, n // 3 : n // 3 + EDGES.shape[1]] = EDGES
        edges_end_as_in_pytorch(function, x.to("cuda", dtype), 1, "hopper")


@gpu
@pytest.mark.parametrize("rows", [3, 600])
def test_hopper_rows_give_the_same_bits_every_time_and_in_a_cuda_graph(rows):
    new = Numbers(torch.bfloat16, "cuda")
    x, dy = new(rows, 128_256), new(rows, 128_256)
    first = vjp(call(softmax, 1, "hopper"), [x], dy)
    for _ in range(50):
        same(vjp(call(softmax, 1, "hopper"), [x], dy), first)
    graph, results = captured(lambda: vjp(call(softmax, 1, "hopper"), [x], dy))
    graph.replay()
    same(results, first)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", OPS)
def test_hopper_infinite_and_nan_columns_end_as_in_pytorch(function, dtype):
    edges = EDGES.t().contiguous()
    pad = torch.zeros(edges.shape[0], -edges.shape[1] % 8)
    long = torch.full((9000, 16), -INF)
    long[4000::900, : edges.shape[1]] = edges[0]
    for x in (torch.cat([edges, pad], 1), long):
        edges_end_as_in_pytorch(function, x.to("cuda", dtype), 0, "hopper")


@gpu
def test_hopper_gives_the_same_bits_every_time_on_every_stream():
    new = Numbers(torch.bfloat16, "cuda")
    x, dy = new(20, 8192, 128), new(20, 8192, 128)
    first = vjp(call(softmax, 1, "hopper"), [x], dy)
    for _ in range(50):
        same(vjp(call(softmax, 1, "hopper"), [x], dy), first)
    torch.cuda.synchronize()
    results = []
    for stream in [torch.cuda.Stream() for _ in range(4)]:
        with torch.cuda.stream(stream):
            results += [vjp(call(softmax, 1, "hopper"), [x], dy) for _ in range(3)]
    torch.cuda.synchronize()
    for got in results:
        same(got, first)


@gpu
@pytest.mark.parametrize("n", [1024, 4096])
def test_hopper_replays_in_a_cuda_graph(n):
    new = Numbers(torch.bfloat16, "cuda")
    x, dy = new(12, n, 128), new(12, n, 128)
    graph, results = captured(lambda: vjp(call(softmax, 1, "hopper"), [x], dy))
    for _ in range(3):
        x.copy_(new(*x.shape))
        dy.copy_(new(*x.shape))
        graph.replay()
        same(results, vjp(call(softmax, 1, "hopper"), [x], dy))


@gpu
def test_auto_reaches_hopper_on_the_card(hopper):
    if not hopper._is_hopper(0):
        pytest.skip("needs a GPU of compute capability 9.0")
    x = torch.ones(144, 512, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    long = torch.ones(2, 131_072, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    other = torch.ones(2, 131_071, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    calls = ((x, 1, "hopper"), (x, 2, "triton"), (x, 0, "triton"), (long, 1, "hopper"), (other, 1, "triton"))
    for tensor, dim, wanted in calls:
        assert backend_that_ran(softmax(tensor, dim)) == wanted
        assert trinix.explain("softmax", tensor, dim).backend == wanted


@gpu
@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_compiles_hopper_whole():
    x = normal((64, 130, 8), torch.float32, seed=1, device="cuda")
    compiled_matches_eager(softmax, "hopper", "inductor", x, 1)
