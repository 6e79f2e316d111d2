"""Activations: every kind, dtype, memory layout and incoming gradient against float64, and how the op behaves as a citizen
of PyTorch. Backend "triton" runs in Triton's interpreter on the CPU; the tests marked ``gpu`` run it on the card."""

import copy
import importlib
import math
import pickle

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import trinix
from helpers import Tagged, Watch, captured, dense, right_or_refused, same, skip_below
from trinix.kernels.torch import activation as reference
from trinix.kernels.triton import _launch
from trinix.kernels.triton import activation as kernels
from trinix.ops import KINDS, activation
from trinix.testing import assert_within_budget, normal, vjp

op = importlib.import_module("trinix.ops.activation")  # the module: ``trinix.ops.activation`` is the function

FORMULA_KINDS = tuple(k for k in KINDS if k != "none")
MASKED = ("relu", "leaky_relu")
SAVING_X = tuple(k for k in FORMULA_KINDS if k not in MASKED)
PARAMETERS = {"leaky_relu": {"negative_slope": 0.2}, "softplus": {"beta": 1.5, "threshold": 4.0}}
HALF = (torch.bfloat16, torch.float16)
DTYPES = {torch.float32: "triton", torch.bfloat16: "triton", torch.float16: "triton", torch.float64: "torch"}
MASK_TILE = 8 * kernels.MASK_COLS

# name -> x, from ``new(*shape)`` that gives a contiguous tensor of normal numbers
LAYOUTS = {
    "contiguous": lambda new: new(7, 33),
    "offset by one element": lambda new: new(232)[1:],
    "sliced columns": lambda new: new(9, 40)[:, ::2],
    "row padded": lambda new: new(9, 48)[:, :33],
    "transposed": lambda new: new(9, 33).t(),
    "permuted 4-D": lambda new: new(3, 4, 5, 6).permute(2, 0, 3, 1),
    "channels last": lambda new: new(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "expanded": lambda new: new(5, 1, 7).expand(5, 4, 7),
    "overlapping windows": lambda new: new(40).unfold(0, 8, 4),
    "0-d": lambda new: new(),
    "0 rows": lambda new: new(0, 8),
    "0 rows, strided": lambda new: new(0, 16)[:, ::2],
    "one element": lambda new: new(1, 1),
    "one column of many": lambda new: new(300, 2)[:, 1:],
    "one past the mask tile": lambda new: new(MASK_TILE + 1),
    "every second row and column": lambda new: new(9, 41)[::2, ::2],
    "several strided tiles": lambda new: new(3, 2201)[:, ::2],
    "5-D, nothing merges": lambda new: new(4, 4, 4, 4, 6)[::2, ::2, ::2, ::2, ::2],
    "6-D, nothing merges": lambda new: new(4, 4, 4, 4, 4, 6)[::2, ::2, ::2, ::2, ::2, ::2],
}

# name -> incoming gradient of the shape of x
GRADIENTS = {
    "like y": lambda new, x: torch.empty_like(x).copy_(new(*x.shape)),
    "contiguous": lambda new, x: new(*x.shape),
    "stride 0": lambda new, x: new().expand(x.shape),
    "transposed": lambda new, x: new(*reversed(x.shape)).permute(list(reversed(range(x.ndim)))),
    "sliced": lambda new, x: new(*x.shape, 2)[..., 1],
    "padded": lambda new, x: new(*x.shape[:-1], x.shape[-1] + 3)[..., 2:-1],
}


class Numbers:
    """``new(*shape)``: normal numbers, others on every call, the same in every run."""

    def __init__(self, dtype, device, scale=3.0):
        self.dtype, self.device, self.scale, self.seed = dtype, device, scale, 0

    def __call__(self, *shape):
        self.seed += 1
        return normal(shape, self.dtype, seed=self.seed, device=self.device, scale=self.scale)


def make(layout, dtype, device, gradient="like y"):
    new = Numbers(dtype, device)
    x = LAYOUTS[layout](new)
    return x, GRADIENTS[gradient](new, x)


def call(kind, backend, **parameters):
    return lambda x: activation(x, kind, backend=backend, **(parameters or PARAMETERS.get(kind, {})))


def oracle(kind, x, dy, backend="triton", **parameters):
    """THE test: y and dx of ``backend`` within the budget that float64 and PyTorch in the same dtype give, y and dx laid
    out as ``torch.empty_like(x)``."""
    got = vjp(call(kind, backend, **parameters), [x], dy)
    low = vjp(call(kind, "torch", **parameters), [dense(x)], dense(dy))
    true = vjp(call(kind, "torch", **parameters), [dense(x, torch.float64)], dense(dy, torch.float64))
    if x.dtype == torch.float64:  # no oracle above it: the same formula on other strides, within its last digits
        torch.testing.assert_close(got, true, rtol=1e-13, atol=1e-13)
    else:
        assert_within_budget(got, low, true)
    if backend == "triton" and kind != "none":
        layout = torch.empty_like(x, device="meta").stride()
        assert [t.stride() for t in got] == [layout, layout]
    return got


def gradient(kind, x, dy, backend):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(call(kind, backend)(x), x, dy)[0]


# ---- right numbers -----------------------------------------------------------------------------------------------------


def test_the_harness_fills_uninitialised_memory():
    assert torch.empty(3).isnan().all()
    assert torch.empty_strided((2, 2), (1, 2), dtype=torch.bfloat16).isnan().all()
    assert torch.empty_like(torch.zeros(5)).isnan().all()
    assert (torch.empty(3, dtype=torch.uint8) == 255).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_hold_the_float64_budget_in_every_layout(kind, dtype, layout):
    oracle(kind, *make(layout, dtype, "cpu"), backend=DTYPES[dtype])


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "row padded"])
@pytest.mark.parametrize("incoming", [g for g in GRADIENTS if g != "like y"])
@pytest.mark.parametrize("kind", FORMULA_KINDS)
def test_the_incoming_gradient_may_have_any_strides(kind, incoming, layout):
    oracle(kind, *make(layout, torch.float32, "cpu", incoming))


@pytest.mark.parametrize("incoming", ["stride 0", "sliced"])
def test_a_strided_gradient_finds_its_bit_in_every_mask_tile(incoming, device):
    new = Numbers(torch.float32, device)
    x = new(MASK_TILE * 2 + 5)
    oracle("relu", x, GRADIENTS[incoming](new, x))
    x = new(3, 5, 1100)
    oracle("relu", x, GRADIENTS["transposed"](new, x))


@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_gradients_as_autograd_makes_them_arrive_right(kind, device):
    losses = {
        "sum": lambda y: y.sum(),
        "cat": lambda y: (torch.cat([y.new_ones(5, 3), y, y.new_ones(5, 4)], 1) * weight).sum(),
        "transposed": lambda y: (y.t().contiguous() * weight.t()[:6]).sum(),
        "sliced": lambda y: y[:, ::2].square().sum(),
        "twice used": lambda y: (y * y.detach()).sum() + y[0].sum(),
    }
    weight = Numbers(torch.float32, device)(5, 13)
    for name, loss in losses.items():
        grads = []
        for backend in ("triton", "torch"):
            x = Numbers(torch.float32, device)(5, 6).requires_grad_()
            loss(call(kind, backend)(x)).backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads, msg=lambda text, name=name: f"{name}: {text}")


OTHER_PARAMETERS = [
    ("leaky_relu", {"negative_slope": 0.01}),
    ("leaky_relu", {"negative_slope": -0.5}),
    ("leaky_relu", {"negative_slope": 0.0}),
    ("leaky_relu", {"negative_slope": 2}),
    ("softplus", {"beta": 1}),
    ("softplus", {"beta": 0.1, "threshold": 20}),
    ("softplus", {"beta": 7.0, "threshold": 1.0}),
    ("softplus", {"beta": -1.5, "threshold": 20.0}),
    ("softplus", {"beta": 2.0, "threshold": -1.0}),
]


@pytest.mark.parametrize(("kind", "parameters"), OTHER_PARAMETERS)
@pytest.mark.parametrize("layout", ["contiguous", "sliced columns"])
def test_parameters_reach_the_kernels(kind, parameters, layout):
    oracle(kind, *make(layout, torch.float32, "cpu"), **parameters)


@st.composite
def views(draw):
    """(shape of a contiguous tensor, its slices, permutation): every view that basic indexing can make, small."""
    ndim = draw(st.integers(0, 5))
    shape = [draw(st.integers(0, 6)) for _ in range(ndim)]
    cuts = [slice(draw(st.integers(0, 2)), None, draw(st.integers(1, 3))) for _ in range(ndim)]
    return shape, cuts, draw(st.permutations(range(ndim)))


@hypothesis.settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(
    view=views(),
    kind=st.sampled_from(FORMULA_KINDS),
    dtype=st.sampled_from([torch.float32, *HALF]),
    incoming=st.sampled_from(["like y", "contiguous", "stride 0", "sliced", "transposed"]),
)
def test_any_view_of_any_shape_is_right(view, kind, dtype, incoming):
    shape, cuts, order = view
    new = Numbers(dtype, "cpu")
    x = new(*shape)[tuple(cuts)].permute(list(order))
    oracle(kind, x, GRADIENTS[incoming](new, x))


def _phi(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


PAGE = {  # the formulas of the op's page, in plain Python
    "none": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * _phi(x),
    "gelu_tanh": lambda x: x / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "squared_relu": lambda x: max(x, 0.0) ** 2,
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "leaky_relu": lambda x: x if x > 0 else 0.2 * x,
    "tanh": math.tanh,
    "softplus": lambda x: x if 1.5 * x > 4 else math.log1p(math.exp(1.5 * x)) / 1.5,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_itself_is_the_formula_on_the_page_and_its_derivative(kind):
    points = [-7.3, -2.0, -0.4, -1e-3, 1e-3, 0.3, 1.1, 2.9, 6.5]
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([PAGE[kind](p) for p in points], dtype=torch.float64)
    torch.testing.assert_close(call(kind, "torch")(x), wanted, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(call(kind, "torch"), x)


# ---- kinks, NaN, infinity ----------------------------------------------------------------------------------------------

EDGE_LAYOUTS = {
    "flat": lambda t: t,
    "strided": lambda t: torch.stack([t, t], 1)[:, 0],
}


@pytest.mark.parametrize("layout", EDGE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", FORMULA_KINDS)
def test_gradients_at_zero_and_nan_are_pytorchs(kind, dtype, layout, device):
    x = EDGE_LAYOUTS[layout](torch.tensor([0.0, -0.0, math.nan, 1.0, -1.0], dtype=dtype, device=device))
    for gradient_layout in EDGE_LAYOUTS.values():
        dy = gradient_layout(torch.tensor([1.5, -2.0, 0.75, 0.0, 0.0], dtype=dtype, device=device))
        ours, theirs = (gradient(kind, x, dy, backend) for backend in ("triton", "torch"))
        if device == "cpu" or kind in ("relu", "leaky_relu", "squared_relu"):
            same(ours, theirs)
        else:  # the card's exp and division are not exactly PyTorch's
            torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", FORMULA_KINDS)
def test_nan_and_huge_inputs_end_as_in_pytorch(kind, dtype, device):
    sizes = [9.7, 9.9, 20.0, 50.0, 87.0, 88.8, 104.0, 1e3, 1e4, 6e4, 1e20, 3e38, math.inf]
    sizes = [s for s in sizes if s <= torch.finfo(dtype).max or s == math.inf]
    x = torch.tensor([s * sign for s in sizes for sign in (1, -1)] + [math.nan], dtype=dtype, device=device)
    ours, theirs, true = (
        vjp(call(kind, backend), [x.to(precision)], torch.ones_like(x, dtype=precision))
        for backend, precision in (("triton", dtype), ("torch", dtype), ("torch", torch.float64))
    )
    for name, got, pytorchs, wanted in zip(("y", "dx"), ours, theirs, true, strict=True):
        where = pytorchs.isfinite()
        torch.testing.assert_close(got[where], wanted[where].to(dtype), msg=lambda text, name=name: f"{name}: {text}")
    assert ours[0][-1].isnan()


@pytest.mark.parametrize("gradient_layout", EDGE_LAYOUTS)
@pytest.mark.parametrize("layout", EDGE_LAYOUTS)
@pytest.mark.parametrize("kind", ["relu", "squared_relu"])
def test_an_infinite_gradient_is_cut_where_relu_is_flat(kind, layout, gradient_layout, device):
    x = EDGE_LAYOUTS[layout](torch.tensor([-1.0, 0.0, -0.0, 2.0], device=device))
    for size in (math.inf, -math.inf, math.nan):
        dy = EDGE_LAYOUTS[gradient_layout](torch.full((4,), size, device=device))
        same(gradient(kind, x, dy, "triton"), torch.tensor([0.0, 0.0, 0.0, size], device=device))


def test_squared_relu_s_gradient_is_as_large_as_float32_holds(device):
    x, dy = (torch.tensor(v, device=device) for v in ([2e38, 3e38], [1e-3, 0.0]))
    torch.testing.assert_close(gradient("squared_relu", x, dy, "triton"), torch.tensor([4e35, 0.0], device=device))


# ---- what backward keeps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, MASK_TILE, 2 * MASK_TILE + 1])
@pytest.mark.parametrize("kind", MASKED)
def test_relu_of_a_dense_x_saves_one_bit_an_element(kind, n, device):
    x = normal((n,), torch.bfloat16, seed=1, device=device).requires_grad_()
    y = call(kind, "triton")(x)
    (mask,) = y.grad_fn.saved_tensors
    tiles = -(-n // MASK_TILE)
    assert mask.dtype == torch.uint8
    assert mask.numel() == tiles * kernels.MASK_COLS
    # bit r of byte [t, c] belongs to element 8 C t + C r + c, C = MASK_COLS
    weights = 2 ** torch.arange(8, device=device).view(1, 8, 1)
    keep = F.pad((x.detach() > 0).long(), (0, tiles * MASK_TILE - n)).view(tiles, 8, kernels.MASK_COLS)
    tail = n - (tiles - 1) * MASK_TILE
    live = torch.ones_like(keep).flatten()
    live[(tiles - 1) * MASK_TILE + tail :] = 0  # the bits beyond n mean nothing
    got = (mask.view(tiles, 1, -1).long() // weights) % 2
    assert torch.equal(got * live.view_as(got), keep)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels last", "offset by one element", "0-d"])
@pytest.mark.parametrize("kind", MASKED)
def test_relu_saves_its_mask_for_every_dense_layout(kind, layout, device):
    x, _ = make(layout, torch.float32, device)
    y = call(kind, "triton")(x.requires_grad_())
    (saved,) = y.grad_fn.saved_tensors
    assert saved.dtype == torch.uint8


@pytest.mark.parametrize("layout", ["sliced columns", "expanded", "6-D, nothing merges"])
def test_relu_of_a_strided_x_saves_y(layout, device):
    x, _ = make(layout, torch.float32, device)
    y = trinix.ops.relu(x.requires_grad_(), backend="triton")
    (saved,) = y.grad_fn.saved_tensors
    assert saved.data_ptr() == y.data_ptr()


@pytest.mark.parametrize(
    ("kind", "layout"),
    [(k, layout) for k in SAVING_X for layout in ("contiguous", "sliced columns")] + [("leaky_relu", "sliced columns")],
)
def test_other_kinds_save_x_itself(kind, layout, device):
    x, _ = make(layout, torch.float32, device)
    y = call(kind, "triton")(x.requires_grad_())
    (saved,) = y.grad_fn.saved_tensors
    assert (saved.data_ptr(), saved.stride()) == (x.data_ptr(), x.stride())


@pytest.mark.parametrize("layout", ["contiguous", "sliced columns"])
@pytest.mark.parametrize("kind", FORMULA_KINDS)
def test_backward_twice_gives_equal_bits_and_writes_into_nothing_of_others(kind, layout, device):
    x, dy = make(layout, torch.float32, device)
    before = x.clone(), dy.clone()
    leaf = x.detach().requires_grad_()
    y = call(kind, "triton")(leaf)
    (saved,) = y.grad_fn.saved_tensors
    kept = saved.detach().clone(), y.detach().clone()
    first = torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]
    bits = first.clone()
    second = torch.autograd.grad(y, leaf, dy)[0]
    same(first, bits)
    same(second, bits)
    same((x, dy), before)
    same((saved.detach(), y.detach()), kept)


@pytest.mark.parametrize("kind", SAVING_X)
def test_changing_x_before_backward_raises_where_x_is_saved(kind, device):
    leaf = normal((4, 5), torch.float32, seed=1, device=device).requires_grad_()
    x = leaf.clone()
    y = call(kind, "triton")(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(("kind", "below"), [("relu", 0.0), ("leaky_relu", 0.2)])
def test_relu_with_a_mask_allows_changing_x_and_y_before_backward(kind, below, device):
    leaf = normal((4, 5), torch.float32, seed=1, device=device).requires_grad_()
    x = leaf.clone()
    y = call(kind, "triton")(x)
    with torch.no_grad():
        x.mul_(-1)
        y.fill_(7)
    y.sum().backward()
    same(leaf.grad, torch.where(leaf.detach() > 0, 1.0, below))


def test_relu_that_saved_y_raises_when_y_was_changed(device):
    x = normal((4, 10), torch.float32, seed=1, device=device)[:, ::2].requires_grad_()
    y = trinix.ops.relu(x, backend="triton")
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- higher derivatives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced columns"])
@pytest.mark.parametrize("kind", FORMULA_KINDS)
def test_the_second_derivative_is_pytorchs(kind, layout, device):
    x, dy = make(layout, torch.float32, device)
    v = Numbers(torch.float32, device)(*x.shape)
    results = []
    for backend in ("triton", "torch"):
        leaf, incoming = x.detach().requires_grad_(), dy.detach().requires_grad_()
        (dx,) = torch.autograd.grad(call(kind, backend)(leaf), leaf, incoming, create_graph=True)
        results.append((dx.detach(), *torch.autograd.grad(dx, (leaf, incoming), v, materialize_grads=True)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", MASKED)
def test_a_gradient_penalty_of_relu_alone_is_refused_its_mask_keeps_no_graph(kind, device):
    x = normal((4, 5), torch.float32, seed=1, device=device).requires_grad_()
    (dx,) = torch.autograd.grad(call(kind, "triton")(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        dx.square().sum().backward()


@pytest.mark.parametrize("kind", SAVING_X)
def test_a_gradient_penalty_can_be_taken_as_in_pytorch(kind, device):
    grads = []
    for backend in ("triton", "torch"):
        x = normal((4, 5), torch.float32, seed=1, device=device).requires_grad_()
        (dx,) = torch.autograd.grad(call(kind, backend)(x).sum(), x, create_graph=True)
        dx.square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


# ---- errors, choice, explanation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "named"),
    [
        (torch.arange(3), "torch.int64"),
        (torch.ones(3, dtype=torch.bool), "torch.bool"),
        (torch.ones(3, dtype=torch.complex64), "torch.complex64"),
        ([1.0, 2.0], "list"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_floating_point_tensor_is_refused_by_type(x, named):
    for backend in ("auto", "triton", "torch"):
        with pytest.raises(TypeError, match=rf"x must be a floating-point tensor, got {named}; .*x\.float\(\)"):
            activation(x, "relu", backend=backend)


def test_an_unknown_kind_is_refused_with_the_list_of_kinds():
    with pytest.raises(ValueError, match="kind") as error:
        activation(torch.ones(3), "swoosh")
    assert "'swoosh'" in str(error.value)
    assert all(repr(kind) in str(error.value) for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_backend_is_refused_with_the_list_of_backends(kind):
    with pytest.raises(ValueError, match=r"\['auto', 'triton', 'torch'\], got 'tritn'"):
        activation(torch.ones(3), kind, backend="tritn")
    with trinix.use_backend("tritn"), pytest.raises(ValueError, match="got 'tritn'"):
        activation(torch.ones(3), kind)


def test_arguments_that_make_no_formula_are_refused():
    for wrong in (
        lambda: trinix.ops.softplus(torch.ones(3), beta=0),
        lambda: activation(torch.ones(3), "softplus", beta=0),
    ):
        with pytest.raises(ValueError, match="beta must not be 0"):
            wrong()
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
        trinix.ops.gelu(torch.ones(3), "erf")
    activation(torch.ones(3), "relu", beta=0)  # other kinds ignore it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_a_dtype_that_triton_does_not_take_is_unsupported_by_name_and_reason(kind, dtype, device):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(trinix.Unsupported, match=f"'triton' needs float16, bfloat16 or float32, got {name}.*auto"):
        activation(torch.ones(3, device=device).to(dtype), kind, backend="triton")


def test_a_meta_tensor_is_unsupported_by_triton_and_goes_through_auto():
    x = torch.ones(3, 4, device="meta")
    with pytest.raises(trinix.Unsupported, match="'triton' needs a GPU tensor, got meta"):
        trinix.ops.silu(x, backend="triton")
    assert trinix.ops.silu(x).shape == (3, 4)


def backend_that_ran(y) -> str:
    return "triton" if "_Activation" in type(y.grad_fn).__name__ else "torch"


def test_use_backend_stands_in_for_auto_only_and_ends_with_its_block(device):
    x = torch.ones(3, device=device, requires_grad=True)
    silu = trinix.ops.silu
    with trinix.use_backend("triton"):
        assert backend_that_ran(silu(x)) == "triton"
        assert backend_that_ran(silu(x, backend="torch")) == "torch"
        with trinix.use_backend("torch"):
            assert backend_that_ran(silu(x)) == "torch"
        assert backend_that_ran(silu(x)) == "triton"
        y = silu(x)
    assert backend_that_ran(silu(x)) == "torch"  # auto, so small
    y.sum().backward()  # where its forward ran
    with pytest.raises(KeyError), trinix.use_backend("triton"):
        raise KeyError
    assert backend_that_ran(silu(x)) == "torch"


def test_no_gradient_is_recorded_where_none_is_wanted(device):
    x = torch.ones(3, device=device)
    for kind in FORMULA_KINDS:
        assert call(kind, "triton")(x).grad_fn is None
        with torch.no_grad():
            assert not call(kind, "triton")(x.requires_grad_()).requires_grad
        x.requires_grad_(False)


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_the_identity_returns_x_itself(backend, device):
    x = torch.ones(3, device=device)
    assert trinix.ops.identity(x, backend=backend) is x
    assert activation(x, "none", backend=backend) is x


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("none", "gelu_tanh")])
def test_the_short_names_are_the_same_op(kind, device):
    x = normal((4, 5), torch.float32, seed=1, device=device)
    same(getattr(trinix.ops, kind)(x, backend="triton"), activation(x, kind, backend="triton"))


def test_gelu_takes_pytorchs_word_for_its_approximation(device):
    x = normal((4, 5), torch.float32, seed=1, device=device)
    same(trinix.ops.gelu(x, approximate="tanh", backend="triton"), activation(x, "gelu_tanh", backend="triton"))


EXPLAINED = {
    "auto on the CPU": (
        lambda x: trinix.explain("relu", x.cpu()),
        "relu -> torch: the first backend that is right and fastest here\n  not triton: needs a GPU tensor, got cpu",
    ),
    "named": (lambda x: trinix.explain(trinix.ops.silu, x, backend="torch"), "silu -> torch: named by the caller"),
    "flat": (
        lambda x: trinix.explain("silu", x, backend="triton"),
        "silu -> triton: named by the caller\n  config: flat kernel, block 512, 4 warps",
    ),
    "flat, half": (
        lambda x: trinix.explain("gelu", x.half(), "tanh", backend="triton"),
        "gelu -> triton: named by the caller\n  config: flat kernel, block 1024, 4 warps",
    ),
    "mask": (
        lambda x: trinix.explain("relu", x.requires_grad_(), backend="triton"),
        "relu -> triton: named by the caller\n"
        "  config: flat kernel with a bit mask for backward, tile 8 x 256",
    ),
    "relu without gradient": (
        lambda x: trinix.explain("relu", x, backend="triton"),
        "relu -> triton: named by the caller\n  config: flat kernel, block 512, 4 warps",
    ),
    "strided": (
        lambda x: trinix.explain("activation", x[:, ::2].t()[1:].t(), "mish", backend="triton"),
        "activation[mish] -> triton: named by the caller\n  config: strided kernel, tile 8 x 32, 4 warps",
    ),
    "identity": (
        lambda x: trinix.explain("identity", x),
        "identity -> torch: the identity returns x itself: nothing runs",
    ),
    "float64": (
        lambda x: trinix.explain("tanh", x.double().cpu()).backend,
        "torch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EXPLAINED)
def test_explain_says_backend_reason_and_configuration(case, device):
    explain, text = EXPLAINED[case]
    assert str(explain(torch.ones(8, 64, device=device))) == text


def test_explain_follows_use_backend_and_refuses_what_the_call_would_refuse(device):
    x = torch.ones(8, device=device)
    with trinix.use_backend("triton"):
        assert trinix.explain("silu", x).backend == "triton"
    with pytest.raises(trinix.Unsupported, match="'triton' needs float16"):
        trinix.explain("silu", x.double(), backend="triton")
    with pytest.raises(ValueError, match="got 'tritn'"):
        trinix.explain("silu", x, backend="tritn")
    with pytest.raises(ValueError, match=r"op must be one of .*'silu'.*got 'swoosh'"):
        trinix.explain("swoosh", x)
    with pytest.raises(ValueError, match="kind must be one of"):
        trinix.explain("activation", x, "swoosh")


@pytest.mark.parametrize("other", [F.relu, torch.softmax, torch.nn.ReLU(), KINDS, None])
def test_explain_says_nothing_of_other_libraries_functions(other):
    with pytest.raises(ValueError, match=r"op must be one of .*, or that function of trinix\.ops, got "):
        trinix.explain(other, torch.ones(3))
    assert trinix.explain(trinix.ops.relu, torch.ones(3)).op == "relu"


# ---- a citizen of PyTorch ----------------------------------------------------------------------------------------------


def compiled_matches_eager(kind, backend, compiler, x):
    """A fullgraph compile, fed twice, against the eager call; returns the targets of the graphs that it made."""
    targets = []

    def recording(graph, example_inputs):
        graphs = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        targets.extend(str(node.target) for one in graphs for node in one.graph.nodes)
        return torch._dynamo.lookup_backend(compiler)(graph, example_inputs)

    function = call(kind, backend)
    compiled = torch.compile(lambda t: function(t * 2) + 1, fullgraph=True, backend=recording)
    for leaf in (x, -x):
        leaf = leaf.detach().requires_grad_()
        eager = function(leaf * 2) + 1
        y = compiled(leaf)
        torch.testing.assert_close(y, eager)
        dy = torch.ones_like(y)
        torch.testing.assert_close(torch.autograd.grad(y, leaf, dy), torch.autograd.grad(eager, leaf, dy))
    return targets


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", KINDS)
def test_compile_takes_auto_whole_and_sees_the_plain_formula(kind):
    targets = compiled_matches_eager(kind, "auto", "aot_eager", normal((4, 6), torch.float32, seed=1))
    assert not any("trinix" in target or "autograd_function" in target for target in targets)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced columns"])
@pytest.mark.parametrize(("kind", "compiler"), [("silu", "aot_eager"), ("relu", "aot_eager"), ("relu", "eager")])
def test_compile_takes_triton_as_one_registered_op(kind, compiler, layout, device):
    targets = compiled_matches_eager(kind, "triton", compiler, make(layout, torch.float32, device)[0])
    assert "trinix.activation.default" in targets


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_follows_use_backend(device):
    x = normal((4, 6), torch.float32, seed=1, device=device)
    with trinix.use_backend("triton"):
        assert "trinix.activation.default" in compiled_matches_eager("silu", "auto", "aot_eager", x)
    torch._dynamo.reset()
    assert "trinix.activation.default" not in compiled_matches_eager("silu", "auto", "aot_eager", x)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_with_dynamic_shapes_and_without_gradient(device):
    compiled = torch.compile(call("mish", "triton"), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5, 9):
        x = normal((rows, 7), torch.float32, seed=rows, device=device)
        same(compiled(x), call("mish", "triton")(x))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced columns", "0 rows"])
def test_the_registered_ops_pass_opcheck(layout, device):
    x, dy = make(layout, torch.float32, device, "contiguous")
    torch.library.opcheck(torch.ops.trinix.activation.default, (x, "silu", 0.0, 0.0))
    torch.library.opcheck(torch.ops.trinix.activation_backward.default, (x, dy, "silu", 0.0, 0.0))


@pytest.mark.parametrize("kind", ["relu", "gelu"])
def test_a_dispatch_mode_sees_one_op_a_pass(kind, device):
    x, dy = make("contiguous", torch.float32, device)
    with Watch() as watch:
        y = call(kind, "triton")(x.detach().requires_grad_())
        y.backward(dy)
    assert [name for name in watch.seen if "trinix" in name] == [
        "trinix.activation.default",
        "trinix.activation_backward.default",
    ]


def test_the_registered_relu_saves_y_and_the_others_x(device):
    x = normal((4, 6), torch.float32, seed=1, device=device).requires_grad_()
    with Watch():
        relu, silu = (call(kind, "triton")(x) for kind in ("relu", "silu"))
    assert relu.grad_fn.saved_tensors[0].data_ptr() == relu.data_ptr()
    assert silu.grad_fn.saved_tensors[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("layout", [k for k in LAYOUTS if k != "one past the mask tile"])
@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_the_registered_ops_hold_the_budget_too(kind, layout):
    x, dy = make(layout, torch.float32, "cpu", "contiguous")
    with Watch():
        oracle(kind, x, dy)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("kind", ["relu", "quick_gelu"])
def test_fake_tensors_pass_with_shape_strides_and_dtype_and_no_kernel(kind, backend, device, monkeypatch):
    monkeypatch.setattr(_launch.Launch, "__call__", lambda *_: pytest.fail("a kernel ran on a fake tensor"))
    with FakeTensorMode():
        x = torch.empty(4, 6, device=device, dtype=torch.bfloat16).t().requires_grad_()
        y = call(kind, backend)(x)
        y.sum().backward()
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("kind", ["relu", "silu", "quick_gelu"])
def test_a_negative_view_is_read_with_its_sign(kind, backend, device):
    x, dy = make("contiguous", torch.float32, device)
    x, dy = torch._neg_view(x), torch._neg_view(dy)
    resolved = x.resolve_neg(), dy.resolve_neg()
    # close, not equal: a negative view goes through PyTorch's formula, its resolved copy through the kernel
    torch.testing.assert_close(call(kind, backend)(x), call(kind, backend)(resolved[0]))
    torch.testing.assert_close(gradient(kind, x, dy, backend), gradient(kind, *resolved, backend))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("kind", ["relu", "silu", "quick_gelu"])
def test_forward_mode_gives_the_tangent_or_an_error(kind, backend, device):
    x, tangent = make("contiguous", torch.float32, device)

    def by_dual_numbers(leaf):
        with torch.autograd.forward_ad.dual_level():
            y = call(kind, backend)(torch.autograd.forward_ad.make_dual(leaf, tangent))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    wanted = gradient(kind, x, tangent, "torch")
    right_or_refused(lambda: by_dual_numbers(x), wanted)
    right_or_refused(lambda: by_dual_numbers(x.detach().requires_grad_()), wanted)
    right_or_refused(lambda: torch.func.jvp(call(kind, backend), (x,), (tangent,))[1], wanted)
    right_or_refused(lambda: torch.func.vmap(call(kind, backend))(x), call(kind, "torch")(x))
    right_or_refused(
        lambda: torch.func.grad(lambda t: call(kind, backend)(t).sum())(x),
        gradient(kind, x, torch.ones_like(x), "torch"),
    )


@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_a_batch_of_gradients_can_be_pulled_back_at_once(kind, device):
    x = normal((5,), torch.float32, seed=1, device=device).requires_grad_()
    jacobians = [
        torch.autograd.grad(call(kind, b)(x), x, torch.eye(5, device=device), is_grads_batched=True)[0]
        for b in ("triton", "torch")
    ]
    torch.testing.assert_close(*jacobians)


@pytest.mark.parametrize("name", ["sparse", "csr", "nested"])
def test_a_tensor_without_strides_is_unsupported_by_triton_and_goes_through_auto(name, device):
    x = torch.eye(3, device=device)
    x = {
        "sparse": x.to_sparse,
        "csr": x.to_sparse_csr,
        "nested": lambda: torch.nested.nested_tensor([x[0], x[1, :2]]),
    }[name]()
    with pytest.raises(trinix.Unsupported, match="'triton' needs"):
        trinix.ops.relu(x, backend="triton")
    trinix.ops.relu(x)


@pytest.mark.parametrize("kind", KINDS)
def test_function_transforms_go_through_auto(kind, device):
    x = normal((5, 3), torch.float32, seed=1, device=device)
    function = call(kind, "auto")
    y, dx = vjp(function, [x], torch.ones_like(x))
    torch.testing.assert_close(torch.func.vmap(function)(x), y)
    torch.testing.assert_close(torch.func.grad(lambda t: function(t).sum())(x), dx)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda t: function(t).sum()))(x), dx)
    torch.testing.assert_close(torch.func.jacrev(function)(x[0]), dx[0].diag())
    torch.testing.assert_close(torch.func.jvp(function, (x,), (torch.ones_like(x),)), (y, dx))


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_no_dtype(kind, dtype, backend, device):
    x = torch.ones(4, dtype=dtype, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = call(kind, backend)(x)
    assert y.dtype == dtype
    assert torch.autograd.grad(y.sum(), x)[0].dtype == dtype


def test_checkpointing_and_anomaly_mode_work(device):
    x = normal((4, 6), torch.float32, seed=1, device=device).requires_grad_()
    function = call("silu", "triton")
    wanted = torch.autograd.grad(function(x).sum(), x)[0]
    y = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
    same(torch.autograd.grad(y.sum(), x)[0], wanted)
    with torch.autograd.detect_anomaly(check_nan=True):
        same(torch.autograd.grad(function(x).sum(), x)[0], wanted)


def test_saved_tensor_hooks_see_what_is_saved(device):
    packed = []
    x = normal((4, 6), torch.float32, seed=1, device=device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.dtype) or t, lambda t: t):
        trinix.ops.relu(x, backend="triton").sum().backward()
    assert packed == [torch.uint8]


def test_a_tensor_subclass_keeps_its_type_and_meets_no_raw_launch(device):
    x = normal((4, 6), torch.float32, seed=1, device=device).as_subclass(Tagged)
    for backend in ("auto", "triton"):
        y = trinix.ops.silu(x, backend=backend)
        assert type(y) is Tagged
        torch.testing.assert_close(y.as_subclass(torch.Tensor), F.silu(x.as_subclass(torch.Tensor)))


def test_a_parameter_goes_as_a_plain_tensor(device):
    x = nn.Parameter(normal((4, 6), torch.float32, seed=1, device=device))
    y = trinix.ops.relu(x, backend="triton")
    assert y.grad_fn.saved_tensors[0].dtype == torch.uint8  # the registered op saves y


# ---- modules -----------------------------------------------------------------------------------------------------------

MODULES = {  # name -> (arguments beyond the common two, PyTorch's own)
    "FastReLU": ({}, nn.ReLU()),
    "FastSigmoid": ({}, nn.Sigmoid()),
    "FastSiLU": ({}, nn.SiLU()),
    "FastGELU": ({"approximate": "tanh"}, nn.GELU(approximate="tanh")),
    "FastQuickGELU": ({}, lambda x: x * torch.sigmoid(1.702 * x)),
    "FastSquaredReLU": ({}, lambda x: F.relu(x).square()),
    "FastMish": ({}, nn.Mish()),
    "FastLeakyReLU": ({"negative_slope": 0.3}, nn.LeakyReLU(0.3)),
    "FastTanh": ({}, nn.Tanh()),
    "FastSoftplus": ({"beta": 2.0, "threshold": 3.0}, nn.Softplus(2.0, 3.0)),
}


def test_a_module_with_an_argument_that_does_not_exist_is_refused_by_its_name():
    with pytest.raises(
        TypeError, match=r"^FastReLU: there is no argument 'inplace'; known are \['hidden_size', 'use_triton'\]"
    ):
        trinix.FastReLU(inplace=True)
    with pytest.raises(TypeError, match="FastMish: use_triton must be None, True or False, got 'no'"):
        trinix.FastMish(use_triton="no")


@pytest.mark.parametrize("common", [{}, {"hidden_size": 512, "use_triton": False}, {"use_triton": True}])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_a_drop_in_for_pytorchs_and_survives_copying(name, common, device):
    extra, theirs = MODULES[name]
    x = normal((4, 6), torch.float32, seed=1, device=device)
    module = getattr(trinix, name)(**common, **extra)
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        y = one(x.requires_grad_())
        torch.testing.assert_close(y, theirs(x))
        ran = {True: ["triton"], False: ["torch"], None: ["torch", "triton"]}[common.get("use_triton")]
        assert backend_that_ran(y) in ran
        assert (one.hidden_size, one.use_triton) == (common.get("hidden_size"), common.get("use_triton"))
        assert not one.state_dict()
    assert repr(module).startswith(name)
    assert all(f"{key}={value}" in repr(module) for key, value in common.items())


def test_module_defaults_are_pytorchs(device):
    x = normal((4, 60), torch.float32, seed=1, device=device, scale=12.0)
    for ours, theirs in (("FastGELU", nn.GELU()), ("FastLeakyReLU", nn.LeakyReLU()), ("FastSoftplus", nn.Softplus())):
        torch.testing.assert_close(getattr(trinix, ours)()(x), theirs(x))
        torch.testing.assert_close(getattr(trinix, ours)(512)(x), theirs(x))


def test_a_module_told_to_use_triton_runs_elsewhere_what_triton_cannot(device):
    x = torch.ones(3, dtype=torch.float64, device=device, requires_grad=True)
    assert trinix.FastSiLU(use_triton=True)(x).dtype == torch.float64
    with pytest.raises(ValueError, match="approximate must be"):
        trinix.FastGELU(approximate="erf")


# ---- the tests can fail ------------------------------------------------------------------------------------------------


@triton.jit
def _value_a_little_high(x, a, b):
    return x / (1.0 + tl.exp(-x)) * 1.001


@triton.jit
def _value_wrong_for_one_sign(x, a, b):
    return tl.where(x < -4.0, 0.0, x / (1.0 + tl.exp(-x)))


@triton.jit
def _gradient_without_its_second_term(x, dy, a, b):
    return dy / (1.0 + tl.exp(-x))


@triton.jit
def _gradient_that_forgets_dy(x, dy, a, b):
    s = 1.0 / (1.0 + tl.exp(-x))
    return s * (1.0 + x * (1.0 - s))


@pytest.fixture
def no_kept_launches():
    caches = kernels.flat_launches, kernels._bound, kernels._dense_forward, kernels._dense_backward
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_call_is_not_launched_as_one_that_lies_otherwise():
    """What is kept of a call goes by all that decides its launch."""
    x = normal((4, 6), torch.float32, seed=1)
    wide = normal((8, 6), torch.float32, seed=2)
    for kind, a in (("silu", 0.0), ("relu", 0.0), ("leaky_relu", 0.1), ("leaky_relu", 0.2)):
        for t in (x, x.half(), x.t(), wide, wide[::2], x[:2], wide.view(2, 4, 6), x[:0]):
            wanted = reference.forward(t.double(), kind, a, 0.0)
            for _ in range(2):
                y, saved = kernels.forward_saving(t, kind, a, 0.0)
                dx = kernels.backward(saved, torch.ones_like(y), kind, a, 0.0, y.stride())
                leaf = t.double().requires_grad_()
                (slope,) = torch.autograd.grad(reference.forward(leaf, kind, a, 0.0).sum(), leaf)
                torch.testing.assert_close(y.double(), wanted, rtol=2e-3, atol=1e-6)
                torch.testing.assert_close(dx.double(), slope, rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("no_kept_launches")
@pytest.mark.parametrize("layout", ["contiguous", "sliced columns"])
@pytest.mark.parametrize(
    ("value", "derivative", "blamed"),
    [
        (_value_a_little_high, None, "y: "),
        (_value_wrong_for_one_sign, None, "y: "),
        (None, _gradient_without_its_second_term, "d0: "),
        (None, _gradient_that_forgets_dy, "d0: "),
    ],
)
def test_a_broken_formula_fails_the_oracle(value, derivative, blamed, layout, device, monkeypatch):
    good = kernels.FORMULAS["silu"]
    x, dy = make(layout, torch.float32, device)
    monkeypatch.setitem(kernels.FORMULAS, "silu", (value or good[0], derivative or good[1]))
    with pytest.raises(AssertionError, match=f"^{blamed}.*OVER BUDGET"):
        oracle("silu", x, dy)


@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_a_program_that_does_not_run_fails_the_oracle(kind, device, monkeypatch):
    run = _launch.Launch.__call__
    monkeypatch.setattr(_launch.Launch, "__call__", lambda self, blocks, *rest: run(self, blocks - 1, *rest))
    monkeypatch.setattr(
        _launch.Repeated, "at", lambda *_: False
    )  # no binary kept by an earlier test, which would run all programs
    x, dy = make("one past the mask tile", torch.float32, device)
    with pytest.raises(AssertionError, match="y: error nan"):
        oracle(kind, x, dy)


def test_a_wrong_bit_in_the_mask_fails_the_oracle(device, monkeypatch):
    good = kernels.forward_saving

    def one_bit_flipped(*arguments):
        y, mask = good(*arguments)
        mask[3] ^= 1
        return y, mask

    monkeypatch.setattr(kernels, "forward_saving", one_bit_flipped)
    with pytest.raises(AssertionError, match=r"^d0: "):
        oracle("relu", *make("contiguous", torch.float32, device))


# ---- on the card -------------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu

GPU_LAYOUTS = {
    "flat, odd": lambda new: new(1031 * 2053),
    "offset by one element": lambda new: new(1_000_004)[1:],
    "row padded": lambda new: new(1000, 1056)[:, :1031],
    "transposed": lambda new: new(1031, 515).t(),
    "sliced columns": lambda new: new(700, 2063)[:, ::2],
    "permuted 4-D": lambda new: new(13, 17, 31, 35).permute(2, 0, 3, 1),
    "channels last": lambda new: new(8, 17, 31, 33).contiguous(memory_format=torch.channels_last),
    "expanded": lambda new: new(513, 1, 7).expand(513, 129, 7),
    "0 rows": lambda new: new(0, 8),
    "5-D, nothing merges": lambda new: new(10, 14, 6, 22, 66)[::2, ::2, ::2, ::2, ::2],
    "6-D, nothing merges": lambda new: new(6, 4, 10, 4, 6, 66)[::2, ::2, ::2, ::2, ::2, ::2],
}


@gpu
@pytest.mark.parametrize("incoming", ["like y", "contiguous"])
@pytest.mark.parametrize("layout", GPU_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", FORMULA_KINDS)
def test_on_the_card_value_and_gradient_hold_the_float64_budget(kind, dtype, layout, incoming):
    new = Numbers(dtype, "cuda")
    x = GPU_LAYOUTS[layout](new)
    dy = GRADIENTS[incoming](new, x)
    for _ in range(2):  # Triton's own path, then the fast launch
        oracle(kind, x, dy)


@gpu
@pytest.mark.parametrize("incoming", ["stride 0", "transposed", "sliced", "padded"])
@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_on_the_card_the_incoming_gradient_may_have_any_strides(kind, incoming):
    for dtype in (torch.float32, *HALF):
        new = Numbers(dtype, "cuda")
        x = new(129, 7, 517)
        oracle(kind, x, GRADIENTS[incoming](new, x))


@gpu
@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_more_than_2_to_the_31_elements_are_right_at_both_ends_and_around_2_to_the_31(kind):
    skip_below(40)
    n, part = 2**31 + 5 * MASK_TILE + 77, 100_000
    x, dy = (normal((n,), torch.bfloat16, seed=seed, device="cuda") for seed in (1, 2))
    y, dx = vjp(call(kind, "triton"), [x], dy)
    for start in (0, 2**31 - part // 2, n - part):
        here = slice(start, start + part)
        results = [
            vjp(call(kind, "torch"), [x[here].to(precision)], dy[here].to(precision))
            for precision in (torch.bfloat16, torch.float64)
        ]
        assert_within_budget((y[here], dx[here]), *results)
        same((y[here], dx[here]), vjp(call(kind, "triton"), [x[here].clone()], dy[here].clone()))


@gpu
@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_a_view_whose_offsets_exceed_2_to_the_31_is_read_right(kind):
    skip_below(24)
    new = Numbers(torch.bfloat16, "cuda")
    rows, width = 2**15 + 3, 2**16
    x, dy = (torch.empty(rows * width, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    views = {
        "rows": lambda t: t.view(rows, width)[:, 7:71],
        "columns apart": lambda t: t.view(rows, width).t()[100:164],
        "a stride beyond int32": lambda t: t.as_strided((2, 64), (2**31 + 16, 1)),
        "a start beyond int32": lambda t: t[2**31 + 5 :: 3],
    }
    for view in views.values():
        for t in (x, dy):
            view(t).copy_(new(*view(t).shape))
        oracle(kind, view(x), view(dy))
        oracle(kind, view(x), new(*view(x).shape))


@gpu
@pytest.mark.parametrize("layout", ["flat, odd", "row padded", "offset by one element"])
@pytest.mark.parametrize("kind", ["relu", "silu", "gelu"])
def test_a_cuda_graph_replays_forward_and_backward_on_new_data(kind, layout):
    new = Numbers(torch.bfloat16, "cuda")
    x = GPU_LAYOUTS[layout](new)
    dy = new(*x.shape)
    function = call(kind, "triton")
    forward, y = captured(lambda: function(x))
    both, results = captured(lambda: vjp(function, [x], dy))
    for _ in range(2):
        x.copy_(new(*x.shape))
        dy.copy_(new(*x.shape))
        forward.replay()
        both.replay()
        wanted = vjp(function, [x], dy)
        same(y, wanted[0])
        same(results, wanted)


@gpu
@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_a_call_on_a_side_stream_waits_for_that_stream(kind):
    x = torch.zeros(1 << 20, device="cuda")
    dy = torch.ones_like(x)
    wanted = vjp(call(kind, "triton"), [normal(x.shape, x.dtype, seed=1, device="cuda")], dy)
    values = normal(x.shape, x.dtype, seed=1, device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.copy_(values)
        got = vjp(call(kind, "triton"), [x], dy)
    side.synchronize()
    same(got, wanted)


@gpu
@pytest.mark.parametrize("kind", FORMULA_KINDS)
def test_twenty_runs_give_the_same_bits(kind):
    new = Numbers(torch.bfloat16, "cuda")
    for layout in ("flat, odd", "row padded"):
        x = GPU_LAYOUTS[layout](new)
        dy = new(*x.shape)
        first = vjp(call(kind, "triton"), [x], dy)
        for _ in range(19):
            same(vjp(call(kind, "triton"), [x], dy), first)


@gpu
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("kind", "backend"), [*((k, "auto") for k in KINDS), ("silu", "triton"), ("relu", "triton")])
def test_inductor_compiles_it_whole(kind, backend):
    compiled_matches_eager(kind, backend, "inductor", normal((64, 130), torch.float32, seed=1, device="cuda"))


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"none"}))
def test_auto_launches_where_its_tables_say(kind, grad, native, monkeypatch):
    """At every edge of both tables, on a card that is not there."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(op, "_native_there", native)
    monkeypatch.setattr(op, "_against_triton", lambda x: None)
    monkeypatch.setattr(op, "_launched", lambda *call: None)
    least, (native_least, native_most) = op._TRITON_FROM[kind][grad], op._NATIVE_RANGE.get(kind, (0, 0))
    for edge in {0, 1000, least or 0, native_least, native_most}:
        for n in {max(edge - 1, 0), edge, edge + 1}:
            x = torch.empty(n, dtype=torch.bfloat16, device="meta", requires_grad=grad)
            wins = (least is not None and n >= least) or (grad and native and native_least <= n < native_most)
            launched = activation(x, kind) is None
            assert launched is wins, n  # no tensor here: printing one that says it is on a card crashes


@gpu
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_auto_gives_the_bits_of_the_backend_that_explain_names(kind, grad):
    threshold = op._TRITON_FROM[kind][grad]
    for n in {1000} if threshold is None else {1000, threshold + 8}:
        x = normal((n,), torch.bfloat16, seed=1, device="cuda").requires_grad_(grad)
        named = trinix.explain("activation", x, kind).backend
        y, wanted = (call(kind, backend)(x) for backend in ("auto", named))
        same(y, wanted)
        if grad:
            assert kind == "none" or backend_that_ran(y) == named
            same(*(torch.autograd.grad(t, x, torch.ones_like(t))[0] for t in (y, wanted)))


@gpu
def test_auto_reaches_triton_on_the_card():
    """Or the tests of auto beside this one say nothing."""
    small = torch.ones(8, device="cuda", requires_grad=True)
    large = torch.ones(op._TRITON_FROM["mish"][True], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert backend_that_ran(trinix.ops.quick_gelu(small)) == "triton"
    assert backend_that_ran(trinix.ops.mish(small)) == "torch"
    assert backend_that_ran(trinix.ops.mish(large)) == "triton"
    assert backend_that_ran(trinix.FastMish()(large)) == "triton"


@gpu
@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_on_the_card_the_registered_ops_hold_the_budget(kind):
    new = Numbers(torch.float32, "cuda")
    for layout in ("flat, odd", "transposed", "sliced columns"):
        x = GPU_LAYOUTS[layout](new)
        with Watch():
            oracle(kind, x, new(*x.shape))


@gpu
@pytest.mark.parametrize(("kind", "parameters"), OTHER_PARAMETERS)
def test_on_the_card_parameters_reach_the_kernels(kind, parameters):
    new = Numbers(torch.float32, "cuda")
    for layout in ("flat, odd", "sliced columns"):
        x = GPU_LAYOUTS[layout](new)
        oracle(kind, x, new(*x.shape), **parameters)


@gpu
@pytest.mark.parametrize("kind", FORMULA_KINDS)
def test_a_0_d_tensor_gives_the_bits_of_its_number_in_a_vector(kind):
    x = normal((9,), torch.float32, seed=1, device="cuda", scale=3.0)
    whole = vjp(call(kind, "triton"), [x], torch.ones_like(x))
    for i in range(9):
        same(vjp(call(kind, "triton"), [x[i]], torch.ones_like(x[i])), tuple(t[i] for t in whole))


@gpu
@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_a_tensor_on_another_card_than_the_current_one_is_served_there(kind):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs a second CUDA GPU, this machine has {torch.cuda.device_count()}")
    assert torch.cuda.current_device() == 0
    for card in ("cuda:1", "cuda:0", "cuda:1"):
        new = Numbers(torch.float32, card)
        for layout in ("flat, odd", "row padded"):
            x = GPU_LAYOUTS[layout](new)
            y, dx = oracle(kind, x, torch.empty_like(x).copy_(new(*x.shape)))
            assert y.device == dx.device == torch.device(card)
    assert torch.cuda.current_device() == 0
