"""Gated linear units: every kind, dtype, layout of two tensors and of packed ones against float64, which half is activated,
and how the op behaves as a citizen of PyTorch. Backend "triton" runs in Triton's interpreter on the CPU; the tests marked
``gpu`` run it on the card."""

import importlib
import math

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import trinix
from helpers import Tagged, Watch, dense, right_or_refused, same, skip_below
from trinix.kernels.triton import _launch
from trinix.kernels.triton import glu as kernels
from trinix.ops import geglu, glu, reglu, swiglu
from trinix.testing import assert_within_budget, normal, vjp

op = importlib.import_module("trinix.ops.glu")  # the module: ``trinix.ops.glu`` is the function

KINDS = op.KINDS
LAYOUTS = op.LAYOUTS
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
BLOCK = kernels.choose_flat(4, False, kernels.LANES).block  # of the flat kernel, float32

# name -> (gate, up), from ``new(*shape)`` that gives a contiguous tensor of normal numbers
PAIRS = {
    "contiguous": lambda new: (new(7, 33), new(7, 33)),
    "one past the block": lambda new: (new(BLOCK + 1), new(BLOCK + 1)),
    "offset by one element": lambda new: (new(232)[1:], new(232)[1:]),
    "transposed both": lambda new: (new(9, 33).t(), new(9, 33).t()),
    "transposed up": lambda new: (new(9, 33), new(33, 9).t()),
    "row padded gate": lambda new: (new(9, 48)[:, :33], new(9, 33)),
    "slices of one projection": lambda new: (lambda x: (x[:, :40], x[:, 40:80]))(new(9, 104)),
    "sliced columns": lambda new: (new(9, 40)[:, ::2], new(9, 20)),
    "expanded up": lambda new: (new(5, 4, 7), new(5, 1, 7).expand(5, 4, 7)),
    "channels last": lambda new: tuple(new(2, 3, 4, 5).contiguous(memory_format=torch.channels_last) for _ in "gu"),
    "0-d": lambda new: (new(), new()),
    "0 rows": lambda new: (new(0, 8), new(0, 8)),
    "one element": lambda new: (new(1, 1), new(1, 1)),
    "several rows tiles": lambda new: (new(3, 2 * BLOCK + 8)[:, :-7], new(3, 2 * BLOCK + 1)),
    "5-D, nothing merges": lambda new: (new(4, 4, 4, 4, 6)[::2, ::2, ::2, ::2, ::2], new(2, 2, 2, 2, 3)),
    "6-D, nothing merges": lambda new: (new(4, 4, 4, 4, 4, 6)[::2, ::2, ::2, ::2, ::2, ::2], new(2, 2, 2, 2, 2, 3)),
}
# name -> packed x
PACKED = {
    "contiguous": lambda new: new(5, 48),
    "odd half": lambda new: new(5, 66),
    "H = 1": lambda new: new(9, 2),
    "1-D": lambda new: new(34),
    "0 rows": lambda new: new(0, 8),
    "H = 0": lambda new: new(3, 0),
    "one row past the tile": lambda new: new(BLOCK // 32 + 1, 64),
    "one column past the tile": lambda new: new(2, 2 * (BLOCK + 1)),
    "mostly empty tile": lambda new: new(3, 2 * 137),
    "offset by one element": lambda new: new(241)[1:].view(5, 48),
    "slice of a wider one": lambda new: new(5, 64)[:, 8:56],
    "transposed": lambda new: new(48, 5).t(),
    "sliced columns": lambda new: new(5, 96)[:, ::2],
    "expanded": lambda new: new(1, 48).expand(5, 48),
    "permuted 3-D": lambda new: new(3, 4, 20).permute(1, 0, 2),
    "permuted, packed in the middle": lambda new: new(3, 8, 5).transpose(1, 2),
    "padded, transposed": lambda new: new(48, 7)[:, :5].t(),
    "every second row, transposed": lambda new: new(48, 10)[:, ::2].t(),
    "6-D, nothing merges": lambda new: new(4, 4, 4, 4, 4, 12)[::2, ::2, ::2, ::2, ::2, ::2],
}
# name -> incoming gradient of a shape
GRADIENTS = {
    "contiguous": lambda new, shape: new(*shape),
    "stride 0": lambda new, shape: new().expand(shape),
    "transposed": lambda new, shape: new(*reversed(shape)).permute(list(reversed(range(len(shape))))),
    "sliced": lambda new, shape: new(*shape, 2)[..., 1],
    "padded": lambda new, shape: new(*shape[:-1], shape[-1] + 3)[..., 2:-1] if shape else new(),
}


class Numbers:
    """``new(*shape)``: normal numbers, others on every call, the same in every run."""

    def __init__(self, dtype, device, scale=2.0):
        self.dtype, self.device, self.scale, self.seed = dtype, device, scale, 0

    def __call__(self, *shape):
        self.seed += 1
        return normal(shape, self.dtype, seed=self.seed, device=self.device, scale=self.scale)


def call(kind, backend, layout="gate_first"):
    return lambda *tensors: glu(*tensors, kind=kind, layout=layout, backend=backend)


def oracle(kind, inputs, dy, layout="gate_first"):
    """THE test: y and every gradient of backend "triton" within the budget that float64 and PyTorch in the same dtype give."""
    got = vjp(call(kind, "triton", layout), inputs, dy)
    low = vjp(call(kind, "torch", layout), [dense(t) for t in inputs], dense(dy))
    true = vjp(call(kind, "torch", layout), [dense(t, torch.float64) for t in inputs], dense(dy, torch.float64))
    assert_within_budget(got, low, true)
    like = torch.empty_like(inputs[0], device="meta").stride()
    if len(inputs) == 2:
        assert [t.stride() for t in got] == [like] * 3
    else:
        assert got[1].stride() == like
    return got


def out_shape(inputs):
    shape = tuple(inputs[0].shape)
    return shape if len(inputs) == 2 else (*shape[:-1], shape[-1] // 2)


def make(inputs, dtype, device, incoming="contiguous", layouts=PAIRS):
    new = Numbers(dtype, device)
    made = layouts[inputs](new)
    made = list(made) if isinstance(made, tuple) else [made]
    return made, GRADIENTS[incoming](new, out_shape(made))


# ---- right numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["swiglu", "reglu"])
def test_two_tensors_hold_the_float64_budget_in_every_layout(kind, dtype, layout):
    oracle(kind, *make(layout, dtype, "cpu"))


@pytest.mark.parametrize("memory", PACKED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_tensor_holds_the_float64_budget_in_every_layout(dtype, layout, memory):
    oracle("swiglu", *make(memory, dtype, "cpu", layouts=PACKED), layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_dtype_holds_the_budget_on_every_kernel(kind, dtype):
    for memory in ("contiguous", "row padded gate", "transposed up"):
        oracle(kind, *make(memory, dtype, "cpu"))
    for layout in LAYOUTS:
        oracle(kind, *make("contiguous", dtype, "cpu", layouts=PACKED), layout)


@pytest.mark.parametrize("incoming", [g for g in GRADIENTS if g != "contiguous"])
@pytest.mark.parametrize("memory", ["contiguous", "transposed up", "slices of one projection", "6-D, nothing merges"])
def test_the_incoming_gradient_of_two_tensors_may_have_any_strides(memory, incoming):
    oracle("swiglu", *make(memory, torch.float32, "cpu", incoming))


@pytest.mark.parametrize("incoming", [g for g in GRADIENTS if g != "contiguous"])
@pytest.mark.parametrize("memory", ["contiguous", "slice of a wider one", "transposed", "padded, transposed", "H = 1"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_incoming_gradient_of_a_packed_tensor_may_have_any_strides(layout, memory, incoming):
    oracle("swiglu", *make(memory, torch.float32, "cpu", incoming, PACKED), layout)


@pytest.mark.parametrize("memory", ["contiguous", "row padded gate", "sliced columns", "6-D, nothing merges"])
@pytest.mark.parametrize("wanted", [0, 1])
def test_only_the_wanted_gradient_is_computed_and_it_is_the_same(wanted, memory, device, monkeypatch):
    tensors, dy = make(memory, torch.float32, device)
    both = vjp(call("swiglu", "triton"), tensors, dy)[1:]
    leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    seen = []
    run = kernels.backward
    monkeypatch.setattr(kernels, "backward", lambda *a: seen.append(a[-2:]) or run(*a))
    same(torch.autograd.grad(call("swiglu", "triton")(*leaves), leaves[wanted], dy)[0], both[wanted])
    assert seen[0] == (wanted == 0, wanted == 1)


def _phi(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


PAGE = {  # the formulas of the op's page, in plain Python
    "swiglu": lambda x: x / (1 + math.exp(-x)),
    "geglu": lambda x: x * _phi(x),
    "geglu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "reglu": lambda x: max(x, 0.0),
    "quick_geglu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "bilinear": lambda x: x,
    "glu": lambda x: 1 / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_itself_is_the_formula_on_the_page_and_its_derivative(kind):
    points = [-7.3, -2.0, -0.4, -1e-3, 1e-3, 0.3, 1.1, 2.9, 6.5]
    gate = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    up = torch.linspace(-2, 3, 9, dtype=torch.float64).requires_grad_()
    wanted = torch.tensor([PAGE[kind](p) * u for p, u in zip(points, up.tolist(), strict=True)], dtype=torch.float64)
    torch.testing.assert_close(call(kind, "torch")(gate, up), wanted, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(call(kind, "torch"), (gate, up))


# ---- which half is activated -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_gate_is_where_the_layout_says(backend, device):
    gate, up = torch.tensor([[-1.0, 2.0, 3.0]], device=device), torch.tensor([[10.0, -20.0, 30.0]], device=device)
    wanted = torch.tensor([[0.0, -40.0, 90.0]], device=device)  # relu(gate) * up; relu(up) * gate is [-10, 0, 90]
    packed = {
        "gate_first": torch.cat([gate, up], -1),
        "gate_last": torch.cat([up, gate], -1),
        "interleaved": torch.stack([gate, up], -1).flatten(-2),
    }
    assert set(packed) == set(LAYOUTS)
    same(glu(gate, up, "reglu", backend=backend), wanted)
    for layout, x in packed.items():
        same(glu(x, kind="reglu", layout=layout, backend=backend), wanted)
    same(glu(packed["gate_first"], kind="reglu", backend=backend), wanted)  # the default


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_gate_last_is_the_order_of_pytorchs_glu(backend, device):
    x = normal((4, 10), torch.float32, seed=1, device=device)
    torch.testing.assert_close(glu(x, kind="glu", layout="gate_last", backend=backend), F.glu(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_and_apart_are_the_same_numbers(layout, device):
    x, dy = normal((4, 10), torch.float32, seed=1, device=device), normal((4, 5), torch.float32, seed=2, device=device)
    y, dx = vjp(call("geglu", "triton", layout), [x], dy)
    apart = vjp(call("geglu", "triton"), [t.contiguous() for t in kernels.halves(x, layout)], dy)
    same((y, *kernels.halves(dx, layout)), apart)
    same(kernels.halves(x, layout), op.reference.split(x, layout))


# ---- kinks, NaN, large values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_large_gates_end_as_in_pytorch_and_nan_passes(kind, dtype, device):
    sizes = [0.0, 9.7, 9.9, 20.0, 50.0, 88.8, 104.0, 1e3, 1e4, 6e4]
    gate = torch.tensor([s * sign for s in sizes for sign in (1, -1)], dtype=dtype, device=device)
    up = torch.full_like(gate, 0.5)
    oracle(kind, [gate, up], torch.full_like(gate, 0.25))
    broken = vjp(call(kind, "triton"), [torch.full_like(gate, math.nan), up], torch.ones_like(gate))
    assert broken[0].isnan().all()
    assert broken[2].isnan().all()
    broken = vjp(call(kind, "triton"), [gate.clamp(1, 2), torch.full_like(up, math.nan)], torch.ones_like(gate))
    assert broken[0].isnan().all()
    assert broken[1].isnan().all()
    assert not broken[2].isnan().any()


def test_relus_gradient_is_zero_at_zero_and_cuts_infinities(device):
    gate = torch.tensor([0.0, -0.0, -1.0, 2.0], device=device)
    up = torch.full_like(gate, 3.0)
    _, d_gate, d_up = vjp(call("reglu", "triton"), [gate, up], torch.ones_like(gate))
    same((d_gate, d_up), (torch.tensor([0.0, 0.0, 0.0, 3.0], device=device), gate.relu()))
    for size in (math.inf, math.nan):
        dy = torch.full_like(gate, size)
        same(vjp(call("reglu", "triton"), [gate, up], dy)[1:], vjp(call("reglu", "torch"), [gate, up], dy)[1:])


def test_a_product_beyond_float16_is_cut_only_at_the_end(device):
    gate, up, dy = (torch.full((8,), v, dtype=torch.float16, device=device) for v in (-11.0, 400.0, 400.0))
    _, d_gate, _ = vjp(call("swiglu", "triton"), [gate, up], dy)  # dy * up alone is infinite in float16
    true = vjp(call("swiglu", "torch"), [gate.double(), up.double()], dy.double())[1]
    torch.testing.assert_close(d_gate.double(), true, rtol=1e-3, atol=0)


# ---- what backward keeps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["contiguous", "slices of one projection"])
def test_backward_saves_the_inputs_themselves(memory, device):
    (gate, up), _ = make(memory, torch.float32, device)
    y = swiglu(gate.requires_grad_(), up, backend="triton")
    saved = y.grad_fn.saved_tensors
    assert [t.data_ptr() for t in saved] == [gate.data_ptr(), up.data_ptr()]
    x = normal((4, 10), torch.float32, seed=1, device=device).requires_grad_()
    y = swiglu(x, backend="triton")
    saved = y.grad_fn.saved_tensors
    assert saved[0].data_ptr() == x.data_ptr()
    assert saved[1] is None


@pytest.mark.parametrize("layout", ["two", *LAYOUTS])
def test_backward_twice_gives_equal_bits_and_writes_into_nothing_of_others(layout, device):
    tensors, dy = make("contiguous", torch.float32, device, layouts=PAIRS if layout == "two" else PACKED)
    before = [t.clone() for t in (*tensors, dy)]
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = call("swiglu", "triton", "gate_first" if layout == "two" else layout)(*leaves)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    bits = [t.clone() for t in first]
    second = torch.autograd.grad(y, leaves, dy)
    same(list(first), bits)
    same(list(second), bits)
    same([*tensors, dy], before)


def test_changing_an_input_before_backward_raises(device):
    leaf = normal((4, 5), torch.float32, seed=1, device=device).requires_grad_()
    gate = leaf.clone()
    y = swiglu(gate, leaf.detach(), backend="triton")
    gate.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_one_tensor_may_be_both_inputs(backend, device):
    x = normal((4, 5), torch.float32, seed=1, device=device).requires_grad_()
    y = swiglu(x, x, backend=backend)
    wanted = torch.autograd.grad((F.silu(x) * x).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], wanted)


# ---- higher derivatives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["two", "interleaved"])
def test_the_second_derivative_is_pytorchs(layout, kind, device):
    tensors, dy = make("contiguous", torch.float32, device, layouts=PAIRS if layout == "two" else PACKED)
    results = []
    for backend in ("triton", "torch"):
        leaves, incoming = [t.detach().requires_grad_() for t in tensors], dy.detach().requires_grad_()
        y = call(kind, backend, "gate_first" if layout == "two" else layout)(*leaves)
        grads = torch.autograd.grad(y, leaves, incoming, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        results.append([g.detach() for g in grads] + list(torch.autograd.grad(penalty, [*leaves, incoming])))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "inputs", [lambda x: (x, x), lambda x: (2 * x, x), lambda x: (x, x.exp()), lambda x: (x, x.detach())]
)
def test_a_gradient_penalty_counts_no_path_twice_where_the_inputs_depend_on_each_other(inputs, device):
    results = []
    for backend in ("triton", "torch"):
        x = normal((4, 5), torch.float32, seed=1, device=device).requires_grad_()
        (dx,) = torch.autograd.grad(call("swiglu", backend)(*inputs(x)).sum(), x, create_graph=True)
        results.append((dx.detach(), *torch.autograd.grad(dx.square().sum(), x)))
    torch.testing.assert_close(*results)


def test_a_batch_of_gradients_can_be_pulled_back_at_once(device):
    gate, up = (normal((5,), torch.float32, seed=s, device=device).requires_grad_() for s in (1, 2))
    jacobians = [
        torch.autograd.grad(call("swiglu", b)(gate, up), (gate, up), torch.eye(5, device=device), is_grads_batched=True)
        for b in ("triton", "torch")
    ]
    torch.testing.assert_close(*jacobians)


# ---- errors, choice, explanation ---------------------------------------------------------------------------------------

ONE = torch.ones(2, 4)
REFUSED = {
    "no tensor": (lambda: glu([1.0]), TypeError, r"gate must be a floating-point tensor, got list"),
    "integers": (lambda: glu(torch.ones(2, 4, dtype=torch.int64)), TypeError, r"got torch.int64; .*gate\.float\(\)"),
    "up is no tensor": (lambda: glu(ONE, 2.0), TypeError, r"up must be a tensor of gate's dtype torch.float32, got float"),
    "a kind as up": (lambda: glu(ONE, "swiglu"), TypeError, r"up must be a tensor .* got str"),
    "dtypes": (lambda: glu(ONE, ONE.half()), TypeError, r"got torch.float16; .*up\.to\(gate\.dtype\)"),
    "shapes": (lambda: glu(ONE, ONE[:1]), ValueError, r"up must have gate's shape \[2, 4\], got \[1, 4\]; .*expand_as"),
    "devices": (lambda: glu(ONE, ONE.to("meta")), ValueError, r"up must be on gate's device cpu, got meta; .*up\.to"),
    "odd": (lambda: glu(torch.ones(2, 5)), ValueError, r"last dimension of a packed gate must be even, got shape \[2, 5\]"),
    "0-d packed": (lambda: glu(torch.ones(())), ValueError, r"must be even, got shape \[\]"),
    "kind": (lambda: glu(ONE, kind="silu"), ValueError, r"kind must be one of \['swiglu', .*got 'silu'"),
    "layout of two": (lambda: glu(ONE, ONE, layout="first"), ValueError, "layout must be one of"),
    "layout": (lambda: glu(ONE, layout="first"), ValueError, r"layout must be one of \['gate_first', .*got 'first'"),
    "approximate": (lambda: geglu(ONE, ONE, "erf"), ValueError, r"approximate must be 'none' or 'tanh', got 'erf'"),
    "backend": (lambda: glu(ONE, backend="tritn"), ValueError, r"\['auto', 'triton', 'torch'\], got 'tritn'"),
    "float64": (
        lambda: glu(ONE.double(), backend="triton"),
        trinix.Unsupported,
        "glu: backend 'triton' needs float16, bfloat16 or float32, got float64.*auto",
    ),
    "meta": (lambda: glu(ONE.to("meta"), backend="triton"), trinix.Unsupported, "needs a GPU tensor, got meta"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_computed_is_refused_with_the_cure(case):
    compute, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        compute()


def test_auto_takes_what_triton_does_not():
    assert glu(ONE.double()).dtype == torch.float64
    assert glu(ONE.to("meta")).shape == (2, 2)
    assert op.triton_can_run(ONE, ONE)
    assert not op.triton_can_run(ONE.double())


def backend_that_ran(y) -> str:
    return "triton" if "_Glu" in type(y.grad_fn).__name__ else "torch"


def test_use_backend_stands_in_for_auto_only(device):
    x = torch.ones(4, device=device, requires_grad=True)
    with trinix.use_backend("triton"):
        assert backend_that_ran(swiglu(x)) == "triton"
        assert backend_that_ran(swiglu(x, backend="torch")) == "torch"
    with trinix.use_backend("torch"):
        assert backend_that_ran(swiglu(x)) == "torch"


def test_no_gradient_is_recorded_where_none_is_wanted(device):
    gate, up = torch.ones(4, device=device), torch.ones(4, device=device)
    assert swiglu(gate, up, backend="triton").grad_fn is None
    with torch.no_grad():
        assert swiglu(gate.requires_grad_(), up, backend="triton").grad_fn is None
    assert swiglu(gate.detach(), up.requires_grad_(), backend="triton").grad_fn is not None


def test_the_short_names_are_the_same_op(device):
    x = normal((4, 6), torch.float32, seed=1, device=device)
    gate, up = x.chunk(2, -1)
    for short, kind in (
        (swiglu, "swiglu"),
        (geglu, "geglu"),
        (lambda *t, **k: geglu(*t, approximate="tanh", **k), "geglu_tanh"),
        (reglu, "reglu"),
    ):
        same(short(gate, up, backend="triton"), glu(gate, up, kind, backend="triton"))
        same(
            short(x, layout="interleaved", backend="triton"), glu(x, kind=kind, layout="interleaved", backend="triton")
        )


EXPLAINED = {
    "auto on the CPU": (
        lambda x: trinix.explain("swiglu", x.cpu()),
        "swiglu -> torch: the first backend that is right and fastest here\n  not triton: needs a GPU tensor, got cpu",
    ),
    "named": (lambda x: trinix.explain(glu, x, x, backend="torch"), "glu[swiglu] -> torch: named by the caller"),
    "flat": (
        lambda x: trinix.explain("glu", x, x, "bilinear", backend="triton"),
        "glu[bilinear] -> triton: named by the caller\n  config: flat kernel, block 512, 4 warps",
    ),
    "packed": (
        lambda x: trinix.explain("geglu", x.half(), approximate="tanh", backend="triton"),
        "geglu -> triton: named by the caller\n  config: rows kernel, tile 8 x 32, 4 warps",
    ),
    "pairs": (
        lambda x: trinix.explain("reglu", x, layout="interleaved", backend="triton"),
        "reglu -> triton: named by the caller\n  config: flat kernel, block 256, 4 warps",
    ),
    "strided": (
        lambda x: trinix.explain("swiglu", x[:, ::2], x[:, 1::2], backend="triton"),
        "swiglu -> triton: named by the caller\n  config: strided kernel, tile 1 x 256, 4 warps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EXPLAINED)
def test_explain_says_backend_reason_and_configuration(case, device):
    explain, text = EXPLAINED[case]
    assert str(explain(torch.ones(8, 64, device=device))) == text


def test_explain_refuses_what_the_call_would_refuse():
    with pytest.raises(ValueError, match="must be even"):
        trinix.explain("glu", torch.ones(3))
    with pytest.raises(ValueError, match="kind must be one of"):
        trinix.explain("glu", ONE, kind="silu")
    with pytest.raises(trinix.Unsupported, match="'triton' needs float16"):
        trinix.explain("reglu", ONE.double(), backend="triton")


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("pairs", [False, True])
def test_a_tile_of_rows_is_small_and_under_half_empty(pairs, itemsize):
    block = kernels.choose_flat(itemsize, pairs, 32).block
    for cols in [*range(1, 300), 512, 520, 1000, 1024, 1032, 4096, 11008, 14336]:
        tile = kernels.choose_rows(1 << 20, cols, itemsize, pairs, 32)
        assert tile.rows * tile.cols == block
        width = -(-cols // tile.cols) * tile.cols
        assert width <= cols * 4 / 3 or tile.cols * itemsize <= 128
    assert kernels.choose_rows(1, 64, itemsize, pairs, 32).rows == 1


# ---- a citizen of PyTorch ----------------------------------------------------------------------------------------------


def compiled_matches_eager(function, compiler, leaves):
    """A fullgraph compile against the eager call; returns the targets of the graphs that it made."""
    targets = []

    def recording(graph, example_inputs):
        graphs = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        targets.extend(str(node.target) for one in graphs for node in one.graph.nodes)
        return torch._dynamo.lookup_backend(compiler)(graph, example_inputs)

    compiled = torch.compile(lambda *t: function(*[2 * one for one in t]) + 1, fullgraph=True, backend=recording)
    for sign in (1, -1):
        inputs = [(sign * t).detach().requires_grad_(t.requires_grad) for t in leaves]
        wanted = [t for t in inputs if t.requires_grad]
        eager = function(*[2 * t for t in inputs]) + 1
        y = compiled(*inputs)
        torch.testing.assert_close(y, eager)
        dy = torch.ones_like(y)
        torch.testing.assert_close(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(eager, wanted, dy))
    return targets


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("layout", ["two", *LAYOUTS])
def test_compile_takes_auto_whole_and_sees_the_plain_formula(layout):
    x, y = (normal((4, 6), torch.float32, seed=s).requires_grad_() for s in (1, 2))
    if layout == "two":
        targets = compiled_matches_eager(call("swiglu", "auto"), "aot_eager", [x, y])
    else:
        targets = compiled_matches_eager(call("swiglu", "auto", layout), "aot_eager", [x])
    assert not any("trinix" in target or "autograd_function" in target for target in targets)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("case", ["both", "gate only", "up only", "transposed", *LAYOUTS])
def test_compile_takes_triton_as_one_registered_op(case, device):
    x, y = (normal((4, 6), torch.float32, seed=s, device=device) for s in (1, 2))
    x.requires_grad_(case != "up only")
    y.requires_grad_(case != "gate only")
    if case == "transposed":
        leaves = [x.detach().t().requires_grad_(), y.detach().t().requires_grad_()]
    else:
        leaves = [x] if case in LAYOUTS else [x, y]
    function = call("swiglu", "triton", case if case in LAYOUTS else "gate_first")
    assert "trinix.glu.default" in compiled_matches_eager(function, "aot_eager", leaves)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_with_dynamic_shapes_and_without_gradient(device):
    for layout in LAYOUTS:
        compiled = torch.compile(call("swiglu", "triton", layout), fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (3, 5, 9):
            x = normal((rows, 14), torch.float32, seed=rows, device=device)
            same(compiled(x), call("swiglu", "triton", layout)(x))


@pytest.mark.parametrize("memory", ["contiguous", "transposed up", "slices of one projection", "0 rows"])
def test_the_registered_ops_pass_opcheck_with_two_tensors(memory, device):
    (gate, up), dy = make(memory, torch.float32, device)
    torch.library.opcheck(torch.ops.trinix.glu.default, (gate, up, "swiglu", "gate_first"))
    for wanted in ((True, True), (True, False), (False, True)):
        call_of = (gate, up, dy, "swiglu", "gate_first", *wanted)
        torch.library.opcheck(torch.ops.trinix.glu_backward.default, call_of)


@pytest.mark.parametrize("memory", ["contiguous", "slice of a wider one", "transposed", "H = 1", "0 rows"])
@pytest.mark.parametrize("layout", ["gate_last", "interleaved"])
def test_the_registered_ops_pass_opcheck_with_a_packed_tensor(layout, memory, device):
    (x,), dy = make(memory, torch.float32, device, layouts=PACKED)
    torch.library.opcheck(torch.ops.trinix.glu.default, (x, None, "swiglu", layout))
    torch.library.opcheck(torch.ops.trinix.glu_backward.default, (x, None, dy, "swiglu", layout, True, True))


def test_a_dispatch_mode_sees_one_op_a_pass_that_holds_the_budget(device):
    for layouts, memory in ((PAIRS, "contiguous"), (PACKED, "slice of a wider one")):
        tensors, dy = make(memory, torch.float32, device, layouts=layouts)
        with Watch() as watch:
            oracle("swiglu", tensors, dy)
        assert [n for n in watch.seen if "trinix" in n] == ["trinix.glu.default", "trinix.glu_backward.default"]


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_fake_tensors_pass_with_shape_strides_and_dtype_and_no_kernel(backend, device, monkeypatch):
    monkeypatch.setattr(_launch.Launch, "__call__", lambda *_: pytest.fail("a kernel ran on a fake tensor"))
    with FakeTensorMode():
        gate = torch.empty(4, 6, device=device, dtype=torch.bfloat16).t().requires_grad_()
        y = call("swiglu", backend)(gate, torch.empty_like(gate))
        y.sum().backward()
        assert (y.shape, y.stride(), y.dtype) == (gate.shape, gate.stride(), gate.dtype)
        packed = torch.empty(3, 8, device=device, requires_grad=True)
        y = call("swiglu", backend)(packed)
        y.sum().backward()
    assert y.shape == (3, 4)
    assert packed.grad.shape == packed.shape


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_function_transforms_forward_mode_and_negative_views_are_right_or_refused(backend, device):
    gate, up, tangent = (normal((5, 3), torch.float32, seed=s, device=device) for s in (1, 2, 3))
    ours, theirs = call("swiglu", backend), call("swiglu", "torch")
    wanted = torch.func.jvp(theirs, (gate, up), (tangent, tangent))[1]

    def by_dual_numbers(first, second):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual
            y = ours(dual(first, tangent), dual(second, tangent))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    right_or_refused(lambda: by_dual_numbers(gate, up), wanted)
    right_or_refused(lambda: by_dual_numbers(gate.clone().requires_grad_(), up), wanted)
    right_or_refused(lambda: torch.func.jvp(ours, (gate, up), (tangent, tangent))[1], wanted)
    right_or_refused(lambda: torch.func.vmap(ours)(gate, up), theirs(gate, up))
    right_or_refused(
        lambda: torch.func.grad(lambda t: ours(t, up).sum())(gate), torch.func.grad(lambda t: theirs(t, up).sum())(gate)
    )
    negative = torch._neg_view(gate)
    torch.testing.assert_close(ours(negative, up), theirs(negative.resolve_neg(), up))
    torch.testing.assert_close(ours(up, negative), theirs(up, negative.resolve_neg()))
    if backend == "auto":
        torch.testing.assert_close(torch.func.vmap(ours)(gate, up), theirs(gate, up))
        torch.testing.assert_close(by_dual_numbers(gate, up), wanted)


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_no_dtype(kind, backend, device):
    for dtype in (torch.float32, torch.float16):
        gate = torch.ones(4, dtype=dtype, device=device, requires_grad=True)
        with torch.autocast(device, dtype=torch.bfloat16):
            y = call(kind, backend)(gate, gate.detach())
        assert y.dtype == dtype
        assert torch.autograd.grad(y.sum(), gate)[0].dtype == dtype


def test_checkpointing_works(device):
    x = normal((4, 6), torch.float32, seed=1, device=device).requires_grad_()
    wanted = torch.autograd.grad(swiglu(x, backend="triton").sum(), x)[0]
    y = torch.utils.checkpoint.checkpoint(call("swiglu", "triton"), x, use_reentrant=False)
    same(torch.autograd.grad(y.sum(), x)[0], wanted)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_tensor_subclass_as_either_input_keeps_its_type(backend, device):
    gate, up = (normal((4, 6), torch.float32, seed=s, device=device) for s in (1, 2))
    for first, second in ((gate.as_subclass(Tagged), up), (gate, up.as_subclass(Tagged))):
        y = swiglu(first, second, backend=backend)
        assert type(y) is Tagged
        torch.testing.assert_close(y.as_subclass(torch.Tensor), F.silu(gate) * up)


# ---- the gradient of a bias before ------------------------------------------------------------------------------------


def sums_oracle(kind, x, dy, layout="gate_first"):
    """The gradients of the packed x = F.linear(.., bias) and of bias, against what autograd makes of x + bias."""
    got = kernels.backward_sums(x, dy, kind, layout, x.dtype)
    formula = call(kind, "torch", layout)
    low, true = (
        vjp(lambda x, b: formula(x + b), [dense(x, p), x.new_zeros(x.shape[-1:], dtype=p)], dense(dy, p))
        for p in (None, torch.float64)
    )
    assert_within_budget((formula(x), *got), low, true)
    assert got[0].stride() == torch.empty_like(x, device="meta").stride()
    return got


@pytest.mark.parametrize("memory", PACKED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_column_sums_hold_the_float64_budget_in_every_layout(dtype, layout, memory):
    (x,), dy = make(memory, dtype, "cpu", layouts=PACKED)
    sums_oracle("swiglu", x, dy, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_column_sums_hold_the_budget_with_every_kind_and_dtype(kind, dtype):
    for layout in LAYOUTS:
        (x,), dy = make("contiguous", dtype, "cpu", layouts=PACKED)
        sums_oracle(kind, x, dy, layout)


@pytest.mark.parametrize("incoming", [g for g in GRADIENTS if g != "contiguous"])
@pytest.mark.parametrize("memory", ["contiguous", "slice of a wider one", "one row past the tile"])
def test_with_column_sums_the_incoming_gradient_may_have_any_strides(memory, incoming):
    (x,), dy = make(memory, torch.float32, "cpu", incoming, PACKED)
    sums_oracle("swiglu", x, dy)


@pytest.mark.parametrize("shape", [(70, 48), (600, 6), (19, 2 * (BLOCK + 1))])
def test_column_sums_of_several_groups_rounds_and_tiles(shape, device):
    x, dy = (normal(size, torch.float32, seed=1, device=device) for size in (shape, (shape[0], shape[1] // 2)))
    first = sums_oracle("swiglu", x, dy)
    same(kernels.backward_sums(x, dy, "swiglu", "gate_first", x.dtype), first)


def test_column_sums_come_in_the_biass_dtype_unrounded_and_alone(device):
    (x,), dy = make("one row past the tile", torch.bfloat16, device, layouts=PACKED)
    dx, sums = kernels.backward_sums(x, dy, "swiglu", "gate_first", torch.float32)
    none, alone = kernels.backward_sums(x, dy, "swiglu", "gate_first", torch.float32, False)
    assert none is None
    same(alone, sums)
    same(dx, vjp(call("swiglu", "triton"), [x], dy)[1])
    true = vjp(call("swiglu", "torch"), [x.double()], dy.double())[1].sum(0)
    torch.testing.assert_close(sums.double(), true, rtol=1e-5, atol=1e-5)


def summing(kind, sums):
    """glu of 2 x + bias as a layer calls it, or as autograd has it."""
    if sums:
        return lambda x, bias: op._GluOfSum.apply(2 * x + bias.detach(), bias, kind, None)
    return lambda x, bias: call(kind, "torch")(2 * x + bias)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_the_function_gives_what_is_wanted(wanted, device):
    results = []
    for sums in (True, False):
        x, bias = (normal(s, torch.float32, seed=1, device=device) for s in ((5, 48), (48,)))
        leaves = [t.requires_grad_(want) for t, want in zip((x, bias), wanted, strict=True)]
        y = summing("geglu", sums)(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), [t for t in leaves if t.requires_grad])))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_derivative_by_a_bias_is_pytorchs(kind, device):
    results = []
    for sums in (True, False):
        leaves = [normal(s, torch.float32, seed=1, device=device).requires_grad_() for s in ((5, 48), (48,), (5, 24))]
        *inputs, dy = leaves
        grads = torch.autograd.grad(summing(kind, sums)(*inputs), inputs, dy, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        results.append([g.detach() for g in grads] + list(torch.autograd.grad(penalty, leaves)))
    torch.testing.assert_close(*results)


def test_a_batch_of_gradients_is_pulled_back_to_a_bias_at_once(device):
    x, bias = (normal((10,), torch.float32, seed=s, device=device).requires_grad_() for s in (1, 2))
    eye = torch.eye(5, device=device)
    jacobians = [
        torch.autograd.grad(summing("swiglu", sums)(x, bias), (x, bias), eye, is_grads_batched=True)
        for sums in (True, False)
    ]
    torch.testing.assert_close(*jacobians)


@pytest.mark.parametrize("lost", ["program", "partial"])
def test_a_program_or_a_partial_that_is_left_out_fails_the_oracle_of_the_sums(lost, device, monkeypatch):
    run = _launch.Launch.__call__

    def short(self, blocks, tensors, scalars):
        if lost == "partial" and self.kernel is kernels.norm._add_partials:
            scalars = (scalars[0] - 1,)
        run(self, blocks - (lost == "program" and self.kernel is kernels._backward_sums), tensors, scalars)

    (x,), dy = make("one row past the tile", torch.float32, device, layouts=PACKED)
    sums_oracle("swiglu", x, dy)
    monkeypatch.setattr(_launch.Launch, "__call__", short)
    with pytest.raises(AssertionError, match=r"d1: error .*OVER BUDGET"):
        sums_oracle("swiglu", x, dy)


# ---- the tests can fail ------------------------------------------------------------------------------------------------


@triton.jit
def _value_a_little_high(x, a, b):
    return x / (1.0 + tl.exp(-x)) * 1.002


@triton.jit
def _gradient_without_its_second_term(x, dy, a, b):
    return dy / (1.0 + tl.exp(-x))


CACHED = (
    "backward_sums_launch",
    "forward_flat",
    "backward_flat",
    "forward_rows",
    "backward_rows",
    "forward_strided",
    "backward_strided",
)


@pytest.fixture
def no_kept_launches():
    for name in CACHED:
        getattr(kernels, name).cache_clear()
    yield
    for name in CACHED:
        getattr(kernels, name).cache_clear()


@pytest.mark.usefixtures("no_kept_launches")
@pytest.mark.parametrize("memory", ["contiguous", "slices of one projection", "sliced columns"])
@pytest.mark.parametrize(("broken", "blamed"), [(0, "y"), (1, "d1"), (2, "d0")])
def test_a_broken_formula_fails_the_oracle(broken, blamed, memory, device, monkeypatch):
    good = list(kernels.formula("swiglu", torch.float32))
    good[broken] = _value_a_little_high if broken < 2 else _gradient_without_its_second_term
    monkeypatch.setattr(kernels, "formula", lambda kind, dtype: tuple(good))
    with pytest.raises(AssertionError, match=f"^{blamed}: .*OVER BUDGET"):
        oracle("swiglu", *make(memory, torch.float32, device))


@pytest.mark.parametrize("memory", ["one past the block", "several rows tiles"])
def test_a_program_that_does_not_run_fails_the_oracle(memory, device, monkeypatch):
    run = _launch.Launch.__call__
    monkeypatch.setattr(_launch.Launch, "__call__", lambda self, blocks, *rest: run(self, blocks - 1, *rest))
    with pytest.raises(AssertionError, match="y: error nan"):
        oracle("swiglu", *make(memory, torch.float32, device))


# ---- on the card -------------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu

GPU_PAIRS = {
    "flat, odd": lambda new: (new(1031 * 2053), new(1031 * 2053)),
    "offset by one element": lambda new: (new(1_000_004)[1:], new(1_000_004)[1:]),
    "slices of one projection": lambda new: (lambda x: (x[:, :1000], x[:, 1000:2000]))(new(700, 2056)),
    "odd slices": lambda new: (lambda x: (x[:, :1031], x[:, 1031:2062]))(new(700, 2063)),
    "transposed up": lambda new: (new(515, 1031), new(1031, 515).t()),
    "sliced columns": lambda new: (new(700, 2063)[:, ::2], new(700, 1032)),
    "expanded": lambda new: (new(513, 129, 7), new(513, 1, 7).expand(513, 129, 7)),
    "6-D, nothing merges": lambda new: (new(6, 4, 10, 4, 6, 66)[::2, ::2, ::2, ::2, ::2, ::2], new(3, 2, 5, 2, 3, 33)),
}
GPU_PACKED = {
    "wide": lambda new: new(301, 2 * 4096),
    "odd half": lambda new: new(700, 2 * 1031),
    "divisible by 8 only": lambda new: new(700, 2 * 1000),
    "narrow": lambda new: new(70_001, 2 * 24),
    "H = 1": lambda new: new(70_001, 2),
    "slice of a wider one": lambda new: new(700, 3000)[:, 8:2056],
    "transposed": lambda new: new(1030, 515).t(),
}


@gpu
@pytest.mark.parametrize("memory", GPU_PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_card_two_tensors_hold_the_float64_budget(kind, dtype, memory):
    for incoming in ("contiguous", "stride 0"):
        tensors, dy = make(memory, dtype, "cuda", incoming, GPU_PAIRS)
        for _ in range(2):  # Triton's own path, then the fast launch
            oracle(kind, tensors, dy)


@gpu
@pytest.mark.parametrize("memory", GPU_PACKED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_card_a_packed_tensor_holds_the_float64_budget(dtype, layout, memory):
    for incoming in ("contiguous", "padded"):
        tensors, dy = make(memory, dtype, "cuda", incoming, GPU_PACKED)
        for _ in range(2):
            oracle("swiglu", tensors, dy, layout)


@gpu
@pytest.mark.parametrize("memory", [m for m in GPU_PACKED if m != "transposed"])
@pytest.mark.parametrize("layout", ["gate_first", "gate_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_card_column_sums_hold_the_float64_budget_with_the_same_bits_each_time(dtype, layout, memory):
    for incoming in ("contiguous", "padded"):
        (x,), dy = make(memory, dtype, "cuda", incoming, GPU_PACKED)
        first = sums_oracle("swiglu", x, dy, layout)
        for _ in range(5):
            same(kernels.backward_sums(x, dy, "swiglu", layout, x.dtype), first)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_card_column_sums_hold_the_budget_with_every_kind(kind, dtype):
    for memory in ("wide", "odd half"):
        (x,), dy = make(memory, dtype, "cuda", layouts=GPU_PACKED)
        sums_oracle(kind, x, dy)


@gpu
def test_column_sums_of_more_than_2_to_the_31_elements():
    skip_below(40)
    rows, h = 2**20 + 3, 2**10 + 8
    x = torch.ones(rows, 2 * h, dtype=torch.bfloat16, device="cuda")
    x[-1] = 3  # relu: gate's gradient is up, up's is gate
    dy = torch.ones(1, h, dtype=torch.bfloat16, device="cuda").expand(rows, h)
    dx, sums = kernels.backward_sums(x, dy, "reglu", "gate_first", torch.float32)
    same(sums, torch.full_like(sums, rows + 2))
    same(dx[-1], x[-1])
    same(dx[2**31 // (2 * h)], torch.ones_like(dx[0]))


@gpu
@pytest.mark.parametrize("layout", ["two", *LAYOUTS])
def test_more_than_2_to_the_31_elements_are_right_at_both_ends_and_around_2_to_the_31(layout):
    skip_below(42 if layout == "two" else 30)
    rows, h = 2**20 + 3, 2**11 + 8  # 2 * h * rows > 2**32 bytes
    width = h if layout == "two" else 2 * h
    tensors = [normal((rows, width), torch.bfloat16, seed=s, device="cuda") for s in range(1 + (layout == "two"))]
    dy = normal((1, h), torch.bfloat16, seed=9, device="cuda").expand(rows, h)
    name = "gate_first" if layout == "two" else layout
    y, *grads = vjp(call("swiglu", "triton", name), tensors, dy)
    part = 100
    for start in (0, 2**31 // width - part // 2, 2**31 // h - part // 2, rows - part):
        here = slice(start, start + part)
        if start + part > rows:
            continue
        results = [
            vjp(call("swiglu", "torch", name), [t[here].to(p) for t in tensors], dy[here].to(p))
            for p in (torch.bfloat16, torch.float64)
        ]
        assert_within_budget((y[here], *[g[here] for g in grads]), *results)


@gpu
@pytest.mark.parametrize("layout", ["two", *LAYOUTS])
def test_a_cuda_graph_replays_forward_and_backward_on_new_data(layout):
    new = Numbers(torch.bfloat16, "cuda")
    tensors = [new(300, 520) for _ in range(1 + (layout == "two"))]
    dy = new(*out_shape(tensors))
    function = call("swiglu", "triton", "gate_first" if layout == "two" else layout)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            vjp(function, tensors, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = vjp(function, tensors, dy)
    for t in (*tensors, dy):
        t.copy_(new(*t.shape))
    graph.replay()
    same(results, vjp(function, tensors, dy))


@gpu
@pytest.mark.parametrize("layout", ["two", *LAYOUTS])
def test_twenty_runs_give_the_same_bits(layout):
    new = Numbers(torch.bfloat16, "cuda")
    tensors = [new(301, 2062) for _ in range(1 + (layout == "two"))]
    dy = new(*out_shape(tensors))
    function = call("geglu", "triton", "gate_first" if layout == "two" else layout)
    first = vjp(function, tensors, dy)
    for _ in range(19):
        same(vjp(function, tensors, dy), first)


@gpu
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_inductor_compiles_it_whole(backend):
    leaves = [normal((64, 130), torch.float32, seed=s, device="cuda").requires_grad_() for s in (1, 2)]
    compiled_matches_eager(call("swiglu", backend), "inductor", leaves)
    compiled_matches_eager(call("swiglu", backend, "interleaved"), "inductor", leaves[:1])


@gpu
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_auto_gives_the_bits_of_the_backend_that_explain_names(kind, grad):
    threshold = op._TRITON_FROM[kind][grad]
    for n in {1000} if threshold is None else {1000, threshold + 8}:
        gate, up = (normal((n,), torch.bfloat16, seed=s, device="cuda").requires_grad_(grad) for s in (1, 2))
        named = trinix.explain("glu", gate, up, kind).backend
        y, wanted = (call(kind, backend)(gate, up) for backend in ("auto", named))
        same(y, wanted)
        if grad:
            assert backend_that_ran(y) == named


@gpu
def test_auto_reaches_triton_on_the_card():
    """Or the tests of auto beside this one say nothing."""
    x = torch.ones(8, device="cuda", requires_grad=True)
    assert backend_that_ran(swiglu(x)) == backend_that_ran(swiglu(x, x)) == "triton"
