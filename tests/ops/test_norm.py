"""LayerNorm and RMSNorm, with residual, dropout and activation: widths, dtypes, memory layouts and incoming gradients against
float64, and how the ops behave as citizens of PyTorch. Backend "triton" runs in Triton's interpreter on the CPU; the tests
marked ``gpu`` run it on the card."""

import importlib
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import trinix
from helpers import Tagged, Watch, captured, dense, right_or_refused, same, skip_below
from trinix import device as cards
from trinix import ops
from trinix.kernels.triton import _launch
from trinix.kernels.triton import norm as kernels
from trinix.testing import judge, normal

op = importlib.import_module("trinix.ops.norm")

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
EPS = 1e-5  # named wherever float64 judges: the default of rms_norm is the dtype's own

# name -> (x, n), from ``new(*shape)`` that gives a contiguous tensor of normal numbers
LAYOUTS = {
    "contiguous": lambda new: (new(7, 33), 33),
    "1-D": lambda new: (new(33), 33),
    "offset by one element": lambda new: (new(7 * 32 + 1)[1:].view(7, 32), 32),
    "row padded": lambda new: (new(9, 49)[:, :33], 33),
    "row padded to whole 16 bytes": lambda new: (new(9, 48)[:, :32], 32),
    "every second row": lambda new: (new(9, 33)[::2], 33),
    "q of a packed qkv": lambda new: (new(2, 3, 3, 2, 16).unbind(2)[0], 16),
    "k of a packed qkv": lambda new: (new(2, 3, 3, 2, 16).unbind(2)[1], 16),
    "batch dimensions transposed": lambda new: (new(3, 4, 17).transpose(0, 1), 17),
    "three outer dimensions, copied": lambda new: (new(2, 5, 3, 16).transpose(1, 2), 16),
    "sliced columns, copied": lambda new: (new(9, 40)[:, ::2], 20),
    "transposed, copied": lambda new: (new(33, 9).t(), 33),
    "one row expanded": lambda new: (new(1, 33).expand(5, 33), 33),
    "expanded between": lambda new: (new(3, 1, 16).expand(3, 4, 16), 16),
    "expanded outside": lambda new: (new(1, 3, 16).expand(4, 3, 16), 16),
    "one element expanded, copied": lambda new: (new(3, 1).expand(3, 8), 8),
    "overlapping windows": lambda new: (new(40).unfold(0, 8, 4), 8),
    "one column of many": lambda new: (new(300, 2)[:, 1:], 1),
    "dimensions of size 1": lambda new: (new(3, 1, 5, 1, 16)[:, :, ::2], 16),
    "0 rows": lambda new: (new(0, 8), 8),
    "0 rows, strided": lambda new: (new(4, 0, 16)[..., ::2], 8),
    "one row": lambda new: (new(1, 130), 130),
}

# name -> incoming gradient of the shape of x
GRADIENTS = {
    "contiguous": lambda new, x: new(*x.shape),
    "stride 0": lambda new, x: new().expand(x.shape),
    "one row for all": lambda new, x: new(x.shape[-1]).expand(x.shape),
    "transposed": lambda new, x: new(*reversed(x.shape)).permute(list(reversed(range(x.ndim)))),
    "padded": lambda new, x: new(*x.shape[:-1], x.shape[-1] + 3)[..., 2:-1],
    "offset by one element": lambda new, x: new(x.numel() + 1)[1:].view(x.shape),
}


class Numbers:
    """``new(*shape)``: normal numbers, others on every call, the same in every run."""

    def __init__(self, dtype, device="cpu", scale=1.0):
        self.dtype, self.device, self.scale, self.seed = dtype, device, scale, 0

    def __call__(self, *shape):
        self.seed += 1
        return normal(shape, self.dtype, seed=self.seed, device=self.device, scale=self.scale)


# name -> (function of (backend, shape) that gives function(x, *parameters), how many parameters)
FORMS = {
    "layer_norm": (lambda b, n: lambda x, w, c: ops.layer_norm(x, n, w, c, EPS, backend=b), 2),
    "layer_norm, no bias": (lambda b, n: lambda x, w: ops.layer_norm(x, n, w, None, EPS, backend=b), 1),
    "layer_norm, no weight": (lambda b, n: lambda x, c: ops.layer_norm(x, n, None, c, EPS, backend=b), 1),
    "layer_norm, bare": (lambda b, n: lambda x: ops.layer_norm(x, n, None, None, EPS, backend=b), 0),
    "rms_norm": (lambda b, n: lambda x, w: ops.rms_norm(x, n, w, EPS, backend=b), 1),
    "rms_norm, bare": (lambda b, n: lambda x: ops.rms_norm(x, n, None, EPS, backend=b), 0),
    "rms_norm, offset 1": (lambda b, n: lambda x, w: ops.rms_norm(x, n, w, EPS, weight_offset=1.0, backend=b), 1),
    "rms_norm_activation": (
        lambda b, n: lambda x, w: ops.rms_norm_activation(x, n, w, "mish", EPS, weight_offset=0.5, backend=b), 1,
    ),
    "layer_norm_residual": (lambda b, n: lambda x, r, w, c: ops.layer_norm_residual(x, r, n, w, c, EPS, backend=b), 2),
    "rms_norm_residual": (
        lambda b, n: lambda x, r, w: ops.rms_norm_residual(x, r, n, w, EPS, weight_offset=1.0, backend=b), 1,
    ),
    "rms_norm_residual, bare": (lambda b, n: lambda x, r: ops.rms_norm_residual(x, r, n, None, EPS, backend=b), 0),
}  # fmt: skip
MAIN = ("layer_norm", "rms_norm", "layer_norm_residual", "rms_norm_residual")


def inputs_of(form, new, x, shape):
    """x, the residual where the form has one, and the parameters."""
    parameters = [new(*shape) for _ in range(FORMS[form][1])]
    return [x, *([new(*x.shape)] if "residual" in form else []), *parameters]


def pull(function, inputs, gradients):
    """(every output, the gradient of every input); an output whose gradient is None takes none."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    used = [(y, g) for y, g in zip(out, gradients, strict=True) if g is not None]
    grads = torch.autograd.grad([y for y, _ in used], leaves, [g for _, g in used], materialize_grads=True)
    return (*(y.detach() for y in out), *grads)


def assert_good(got, low, true):
    verdicts = [judge(str(i), *three) for i, three in enumerate(zip(got, low, true, strict=True))]
    assert all(v.ok for v in verdicts), "; ".join(f"result {v}" for v in verdicts if not v.ok)


def compare(of_backend, inputs, gradients):
    """THE test: every output and every gradient of "triton" within the budget that float64 and PyTorch in the same dtype
    give, outputs and dx dense."""
    got = pull(of_backend("triton"), inputs, gradients)
    plain = of_backend("torch")
    low = pull(plain, [dense(t) for t in inputs], [g if g is None else dense(g) for g in gradients])
    true = pull(
        plain,
        [dense(t, torch.float64) for t in inputs],
        [g if g is None else dense(g, torch.float64) for g in gradients],
    )
    assert_good(got, low, true)
    assert all(t.is_contiguous() for t in got)
    return got


def oracle(form, x, n, new, *gradients):
    shape = (n,) if isinstance(n, int) else n
    inputs = inputs_of(form, new, x, shape)
    gradients = gradients or tuple(new(*x.shape) for _ in range(1 + ("residual" in form)))
    return compare(lambda backend: FORMS[form][0](backend, shape), inputs, gradients)


# ---- right numbers -----------------------------------------------------------------------------------------------------

WIDTHS = (1, 2, 7, 64, 127, 128, 129, 130, 256, 768, 1000, 1001, 4096)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", MAIN)
def test_outputs_and_gradients_hold_the_float64_budget_at_every_width(form, dtype, width):
    new = Numbers(dtype)
    if dtype == torch.float32 and width < 10:
        pytest.skip("in ten widths together below: the largest of few rounding errors is chance, ours or PyTorch's")
    oracle(form, new(32 if dtype == torch.float32 and width < 1001 else 5, width), width, new)


@pytest.mark.parametrize("width", [7, 130, 1001])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_it_in_float16(form, width):
    new = Numbers(torch.float16)
    oracle(form, new(6, width), width, new)


def as_dense(form, n, inputs, gradients):
    """The bits of the dense call: a strided tensor takes other pointers, not another sum."""
    function = FORMS[form][0]("triton", (n,))
    got = pull(function, inputs, gradients)
    same(got, pull(function, [dense(t) for t in inputs], [dense(g) for g in gradients]))
    assert all(t.is_contiguous() for t in got)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["layer_norm", "rms_norm", "rms_norm_residual"])
def test_x_may_have_any_layout(form, layout):
    new = Numbers(torch.bfloat16)
    x, n = LAYOUTS[layout](new)
    oracle(form, x, n, new)
    new = Numbers(torch.float32)
    x, n = LAYOUTS[layout](new)
    as_dense(form, n, inputs_of(form, new, x, (n,)), [new(*x.shape) for _ in range(1 + ("residual" in form))])


@pytest.mark.parametrize("incoming", GRADIENTS)
@pytest.mark.parametrize("layout", ["contiguous", "q of a packed qkv", "row padded", "0 rows"])
def test_the_incoming_gradient_may_have_any_strides(layout, incoming):
    new = Numbers(torch.float16)
    x, n = LAYOUTS[layout](new)
    oracle("layer_norm", x, n, new, GRADIENTS[incoming](new, x))
    oracle("rms_norm_residual", x, n, new, GRADIENTS[incoming](new, x), GRADIENTS[incoming](new, x))
    new = Numbers(torch.float32)
    x, n = LAYOUTS[layout](new)
    gradients = [GRADIENTS[incoming](new, x) for _ in range(2)]
    as_dense("layer_norm_residual", n, inputs_of("layer_norm_residual", new, x, (n,)), gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_residual_may_have_any_layout(layout):
    for dtype in (torch.float32, torch.bfloat16):
        new = Numbers(dtype)
        residual, n = LAYOUTS[layout](new)
        inputs = [new(*residual.shape), residual, new(n), new(n)]
        as_dense("layer_norm_residual", n, inputs, [new(*residual.shape) for _ in range(2)])


@pytest.mark.parametrize("form", ["layer_norm", "rms_norm", "rms_norm_activation", "rms_norm_residual"])
@pytest.mark.parametrize(("rows", "width"), [(203, 128), (77, 200), (23, 1001), (7, 3000)])
def test_a_backward_program_walks_many_tiles(form, rows, width):
    for dtype in (torch.float32, torch.bfloat16):
        new = Numbers(dtype)
        config = kernels.choose_backward(width, dtype.itemsize, kernels.LANES)
        assert rows > 3 * config.rows  # 3 programs in the interpreter
        oracle(form, new(rows, width), width, new)


@pytest.mark.parametrize(
    ("form", "chunks", "dtype"),
    [
        *((form, 2.001, torch.bfloat16) for form in (*MAIN, "layer_norm, bare")),
        ("layer_norm", 3, torch.float16),
        ("layer_norm_residual", 3.001, torch.float32),
        ("layer_norm", 4, torch.bfloat16),
        ("rms_norm", 4, torch.float32),
    ],
    ids=str,
)
def test_rows_of_two_to_four_chunks(form, chunks, dtype):
    new = Numbers(dtype)
    width = int(chunks * kernels.CHUNK)
    oracle(form, new(5, width), width, new)


@pytest.mark.parametrize(
    "form", ["rms_norm, bare", "layer_norm, no weight", "rms_norm_activation", "rms_norm_residual"]
)
def test_a_strided_row_of_chunks(form):
    new = Numbers(torch.float16)
    oracle(form, new(5, 8401)[:, 1:], 8400, new, *(new(5, 8403)[:, 2:-1] for _ in range(1 + ("residual" in form))))


@pytest.mark.parametrize("width", [4097, 5000, 8192])
@pytest.mark.parametrize("form", MAIN)
def test_the_widest_rows_that_fit_in_registers(form, width):
    new = Numbers(torch.bfloat16)
    oracle(form, new(4, width), width, new)


@pytest.mark.parametrize(
    ("form", "width", "dtype"),
    [
        ("layer_norm", 16385, torch.float32),
        ("rms_norm", 16385, torch.bfloat16),
        ("rms_norm_residual", 16385, torch.float32),
        ("layer_norm", 33000, torch.float32),
        ("rms_norm", 33000, torch.float16),
        ("layer_norm_residual", 33000, torch.bfloat16),
    ],
    ids=str,
)
def test_rows_wider_than_registers(form, width, dtype):
    new = Numbers(dtype)
    oracle(form, new(5, width), width, new)


@pytest.mark.parametrize("form", ["rms_norm, bare", "layer_norm, no weight", "rms_norm_activation"])
def test_other_forms_of_rows_wider_than_registers(form):
    new = Numbers(torch.float32)
    oracle(form, new(3, 33001)[:, 1:], 33000, new, new(3, 33003)[:, 2:-1])


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (1e3, 1.0)])
def test_no_small_width_and_no_large_mean_loses_anything(mean, scale):
    """The error that a document printed: a mean subtracted from columns that are not there."""
    of_backend, _ = FORMS["layer_norm"]
    for first in range(1, 131 if mean else 11, 10):
        results = [], [], []
        for width in range(first, first + 10):
            new = Numbers(torch.float32)
            new.seed = width
            apart = 3.0 - 6.0 * (torch.arange(width) % 2)  # no row of two that are nearly equal
            inputs, dy = [(new(6, width) + apart) * scale + mean, new(width), new(width)], new(6, width)
            double = [t.double() for t in inputs]
            results[0].append(pull(of_backend("triton", (width,)), inputs, [dy]))
            results[1].append(pull(of_backend("torch", (width,)), inputs, [dy]))
            results[2].append(pull(of_backend("torch", (width,)), double, [dy.double()]))
        # ten widths are judged as one tensor: the largest of few rounding errors is chance, ours or PyTorch's
        assert_good(*([torch.cat([t.flatten() for t in one]) for one in zip(*r, strict=True)] for r in results))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [1e3, -1e3, 0.0])
def test_hidden_768_with_large_means(mean, dtype):
    new = Numbers(dtype)
    oracle("layer_norm", (normal((9, 768), torch.float32, seed=7) + mean).to(dtype), 768, new)


@pytest.mark.parametrize("width", [4096, 16385, 33000])
def test_large_means_in_wide_rows(width):
    new = Numbers(torch.float32)
    oracle("layer_norm", new(5, width) + 1e3, width, new)
    if width < 33000:
        oracle("layer_norm_residual", new(5, width) + 1e3, width, new)


@pytest.mark.parametrize("width", [4097, 40000])
def test_a_mean_that_drifts_along_the_row(width):
    """Chan's update between blocks: each block's mean is another."""
    new = Numbers(torch.float32)
    oracle("layer_norm", new(2, width) + torch.linspace(-500, 1500, width), width, new)


@pytest.mark.parametrize("size", [1e-12, 1e-4, 1e4])
@pytest.mark.parametrize("form", ["layer_norm", "rms_norm"])
def test_tiny_and_large_values(form, size):
    new = Numbers(torch.float32)
    oracle(form, new(9, 130) * size, 130, new)


def test_constant_rows_have_no_deviation():
    new = Numbers(torch.float32)
    for value in (0.0, 1.0, 1024.0, -7.5):
        oracle("layer_norm", torch.full((4, 96), value), 96, new)
        oracle("rms_norm", torch.full((4, 96), value), 96, new)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "normalized"), [((2, 4, 3, 5), (3, 5)), ((3, 2, 1, 7), (2, 1, 7)), ((3, 5), (3, 5))])
def test_normalized_shape_may_have_several_dimensions(form, shape, normalized):
    new = Numbers(torch.bfloat16)
    oracle(form, new(*shape), normalized, new)


@pytest.mark.parametrize("form", ["layer_norm", "rms_norm_residual"])
def test_several_dimensions_of_a_strided_x(form):
    new = Numbers(torch.float16)
    for x in (new(2, 4, 2, 3, 5)[:, :, 1], new(4, 2, 3, 5).transpose(0, 1), new(2, 4, 5, 3).mT):
        oracle(form, x, (3, 5), new)


MIXED = [
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("form", MAIN)
def test_parameters_may_have_dtypes_of_their_own(form, dtypes, device):
    new = Numbers(dtypes[0], device)
    inputs = inputs_of(form, new, new(6, 70), (70,))
    count = FORMS[form][1]
    inputs[-count:] = [t.to(d) for t, d in zip(inputs[-count:], dtypes[1:], strict=False)]
    gradients = [new(6, 70) for _ in range(1 + ("residual" in form))]
    got = compare(lambda b: FORMS[form][0](b, (70,)), inputs, gradients)
    assert [t.dtype for t in got[len(gradients) :]] == [t.dtype for t in inputs]
    assert {t.dtype for t in got[: len(gradients)]} == {dtypes[0]}


@pytest.mark.parametrize("strides", ["sliced", "expanded", "transposed", "offset by one element"])
@pytest.mark.parametrize("form", MAIN)
def test_parameters_may_have_any_strides(form, strides):
    new = Numbers(torch.float32)
    make = {
        "sliced": lambda: new(6, 10)[:, ::2],
        "expanded": lambda: new(1, 5).expand(6, 5),
        "transposed": lambda: new(5, 6).t(),
        "offset by one element": lambda: new(31)[1:].view(6, 5),
    }[strides]
    inputs = inputs_of(form, new, new(4, 6, 5), (6, 5))
    inputs[-FORMS[form][1] :] = [make() for _ in range(FORMS[form][1])]
    compare(lambda b: FORMS[form][0](b, (6, 5)), inputs, [new(4, 6, 5) for _ in range(1 + ("residual" in form))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", op.FUSED_KINDS)
def test_every_activation_behind_rms_norm(kind, dtype, device):
    new = Numbers(dtype, device)

    def of_backend(backend):
        return lambda x, w: ops.rms_norm_activation(x, 70, w, kind, EPS, weight_offset=1.0, backend=backend)

    compare(of_backend, [new(50, 70), new(70)], [new(50, 70)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["mish", "gelu_tanh", "gelu", "silu"])
def test_large_values_behind_rms_norm_do_not_overflow(kind, dtype, device):
    new = Numbers(dtype, device)
    weight = torch.full((70,), 500.0, dtype=dtype, device=device)  # e^x overflows from 88 on, its square from 44

    def of_backend(backend):
        return lambda x, w: ops.rms_norm_activation(x, 70, w, kind, EPS, backend=backend)

    compare(of_backend, [new(50, 70), weight], [new(50, 70)])


def test_the_activation_none_is_rms_norm_itself(device):
    new = Numbers(torch.bfloat16, device)
    x, w = new(5, 70), new(70)
    for backend in ("triton", "torch"):
        got = ops.rms_norm_activation(x, 70, w, "none", backend=backend)
        same(got, ops.rms_norm(x, 70, w, backend=backend))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_defaults_are_pytorchs(backend, dtype, device):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels are float32")
    x = normal((4, 50), dtype, seed=1, device=device, scale=3e-4)  # x^2 about the default eps
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for ours, theirs in (
        (ops.layer_norm(x, 50, backend=backend), F.layer_norm(x, (50,))),
        (ops.rms_norm(x, (50,), backend=backend), F.rms_norm(x, (50,))),
        (ops.rms_norm_residual(x, x, [50], backend=backend)[0], F.rms_norm(x + x, (50,))),
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)


def page_layer_norm(row, weight, bias):
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in row) / len(row) + EPS)
    return [(v - mean) / deviation * w + b for v, w, b in zip(row, weight, bias, strict=True)]


def page_rms_norm(row, weight):
    size = math.sqrt(sum(v * v for v in row) / len(row) + EPS)
    return [v / size * (w + 1.0) for v, w in zip(row, weight, strict=True)]


def test_the_oracle_itself_is_the_formula_on_the_page_and_its_derivative():
    x, r = (normal((3, 5), torch.float64, seed=s).requires_grad_() for s in (1, 2))
    w, b = (normal((5,), torch.float64, seed=s).requires_grad_() for s in (3, 4))
    layer = [page_layer_norm(row, w.tolist(), b.tolist()) for row in x.tolist()]
    rms = [page_rms_norm(row, w.tolist()) for row in (x + r).tolist()]
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(FORMS["layer_norm"][0]("torch", 5)(x, w, b).tolist(), layer, **close)
    y, h = FORMS["rms_norm_residual"][0]("torch", 5)(x, r, w)
    torch.testing.assert_close(y.tolist(), rms, **close)
    same(h, x + r)
    for form, (of_backend, parameters) in FORMS.items():
        inputs = [x, *([r] if "residual" in form else []), *(w, b)[:parameters]]
        assert torch.autograd.gradcheck(of_backend("torch", 5), inputs), form


@st.composite
def views(draw):
    """(shape of a contiguous tensor, its slices, permutation): every view that basic indexing can make, small."""
    ndim = draw(st.integers(1, 4))
    shape = [draw(st.integers(0, 5)) for _ in range(ndim)]
    shape[-1] = draw(st.integers(1, 20))
    cuts = [slice(draw(st.integers(0, 1)), None, draw(st.integers(1, 2))) for _ in range(ndim)]
    order = draw(st.permutations(range(ndim))) if draw(st.booleans()) else [*range(ndim)]
    return shape, cuts, order, draw(st.integers(1, ndim))


@hypothesis.settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(
    view=views(),
    form=st.sampled_from(["layer_norm", "rms_norm", "layer_norm_residual"]),
    incoming=st.sampled_from(list(GRADIENTS)),
)
def test_any_view_of_any_shape_is_right(view, form, incoming):
    shape, cuts, order, last = view
    new = Numbers(torch.bfloat16)
    x = new(*shape)[tuple(cuts)].permute(list(order))
    gradients = [GRADIENTS[incoming](new, x) for _ in range(1 + ("residual" in form))]
    oracle(form, x, tuple(x.shape[-last:]), new, *gradients)


@pytest.mark.parametrize("backend", ["triton", "torch", "auto"])
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_no_elements(form, backend, device):
    new = Numbers(torch.float32, device)
    inputs = inputs_of(form, new, new(3, 0), (0,))
    got = pull(FORMS[form][0](backend, (0,)), inputs, [new(3, 0) for _ in range(1 + ("residual" in form))])
    assert all(t.numel() == 0 for t in got)


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_zero_weight_gradients(form, device):
    new = Numbers(torch.float32, device)
    got = pull(
        FORMS[form][0]("triton", (9,)),
        inputs_of(form, new, new(0, 9), (9,)),
        [new(0, 9) for _ in range(1 + ("residual" in form))],
    )
    assert all(not t.any() for t in got)
    assert [t.shape for t in got[-FORMS[form][1] :]] == [(9,)] * FORMS[form][1] or not FORMS[form][1]


# ---- NaN, infinity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "value", "width"),
    [
        *itertools.product(("layer_norm", "rms_norm", "layer_norm_residual"), (math.nan, math.inf, -math.inf), (50,)),
        ("layer_norm", math.inf, 17000),
        ("rms_norm", math.nan, 17000),
    ],
)
def test_nan_and_infinity_stay_in_their_row_and_are_pytorchs(form, value, width, device):
    new = Numbers(torch.float32, device)
    x, shape = new(5, width), (width,)
    inputs = inputs_of(form, new, x, shape)
    gradients = [new(5, width) for _ in range(1 + ("residual" in form))]
    clean = pull(FORMS[form][0]("triton", shape), inputs, gradients)
    inputs[0] = x.clone()
    inputs[0][3, 1] = value
    ours = pull(FORMS[form][0]("triton", shape), inputs, gradients)
    # of the formula on a CPU: PyTorch's own CUDA kernels differ from it, and between versions
    theirs = pull(FORMS[form][0]("torch", shape), [t.cpu() for t in inputs], [t.cpu() for t in gradients])
    others = [0, 1, 2, 4]
    for got, pytorchs, before in zip(ours, theirs, clean, strict=True):
        assert torch.equal(got.isnan().cpu(), pytorchs.isnan())
        if got.ndim == 2:
            same(got[others], before[others])


def test_a_nan_gradient_reaches_its_row_and_its_column(device):
    new = Numbers(torch.float32, device)
    x, w, b, dy = new(5, 50), new(50), new(50), new(5, 50)
    dy[2, 7] = math.nan
    _, dx, dw, db = pull(FORMS["layer_norm"][0]("triton", (50,)), [x, w, b], [dy])
    assert dx.isnan().any(1).tolist() == [False, False, True, False, False]
    assert dx[2].isnan().all()
    assert dw.isnan().nonzero().tolist() == db.isnan().nonzero().tolist() == [[7]]


# ---- residual and dropout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [70, 1001])
@pytest.mark.parametrize("wanted", ["y", "h"])
@pytest.mark.parametrize("form", ["layer_norm_residual", "rms_norm_residual"])
def test_a_gradient_for_one_output_only(form, wanted, width, device):
    new = Numbers(torch.float32, device)
    gradient = new(4, width)
    got = oracle(form, new(4, width), width, new, *((gradient, None) if wanted == "y" else (None, gradient)))
    if wanted == "h":
        same(got[2], gradient)
        same(got[3], gradient)


@pytest.mark.parametrize("form", ["layer_norm_residual", "rms_norm_residual"])
def test_the_new_residual_is_the_rounded_sum_and_y_is_its_norm(form, device):
    for dtype in DTYPES:
        new = Numbers(dtype, device)
        inputs = inputs_of(form, new, new(6, 130), (130,))
        y, h = FORMS[form][0]("triton", (130,))(*inputs)
        same(h, inputs[0] + inputs[1])
        alone = form.removesuffix("_residual") if form.startswith("layer") else "rms_norm, offset 1"
        same(y, FORMS[alone][0]("triton", (130,))(h, *inputs[2:]))


def test_leaves_get_gradients_of_their_own(device):
    """Without dropout both gradients are one tensor inside; in-place use of one must not change the other."""
    new = Numbers(torch.float32, device)
    x, r = new(4, 9).requires_grad_(), new(4, 9).requires_grad_()
    y, h = ops.rms_norm_residual(x, r, 9, backend="triton")
    (y.sum() + h.sum()).backward()
    same(x.grad, r.grad)
    kept = r.grad.clone()
    x.grad.zero_()
    same(r.grad, kept)


def test_x_may_be_the_residual(device):
    grads = []
    for backend in ("triton", "torch"):
        x = normal((4, 9), torch.float32, seed=1, device=device).requires_grad_()
        y, h = ops.layer_norm_residual(x, x, 9, backend=backend)
        (y * h).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def with_dropout(x, r, w, b, p, seed, backend="triton"):
    torch.manual_seed(seed)
    return ops.layer_norm_residual(x, r, x.shape[-1], w, b, EPS, dropout_p=p, backend=backend)


@pytest.mark.parametrize(
    ("rows", "width", "p"), [(37, 129, 0.1), (37, 129, 0.5), (37, 129, 0.9), (4, 9000, 0.5), (5, 17000, 0.25)]
)
def test_dropout_forward_and_backward_use_one_mask(rows, width, p, device):
    new = Numbers(torch.float32, device)
    x, r, w, b, dy, dh = new(rows, width), new(rows, width), new(width), new(width), new(rows, width), new(rows, width)
    x += x.sign()  # away from 0, where the mask could not be seen
    _, only_x = with_dropout(x, torch.zeros_like(r), w, b, p, 3)
    mask = only_x != 0
    torch.testing.assert_close(only_x, mask * x / (1 - p))
    got = pull(lambda *inputs: with_dropout(*inputs, p, 3), [x, r, w, b], [dy, dh])

    def formula(x, r, w, b):
        h = x * mask / (1 - p) + r
        return F.layer_norm(h, (width,), w, b, EPS), h

    low = pull(formula, [x, r, w, b], [dy, dh])
    true = pull(formula, [t.double() for t in (x, r, w, b)], [dy.double(), dh.double()])
    assert_good(got, low, true)
    assert torch.equal(got[2] != 0, mask)  # dx
    assert (got[3] != 0).all()  # dr


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_dropout_keeps_the_share_that_it_should_everywhere(p, device):
    x = torch.ones(64, 256, device=device)
    _, h = with_dropout(x, torch.zeros_like(x), None, None, p, 1)
    keep = (h != 0).double()
    same(h, keep.float() / (1 - torch.tensor(p, device=device)))
    for share, count in ((keep.mean(), x.numel()), *((k, 256) for k in keep.mean(1)), *((k, 64) for k in keep.mean(0))):
        assert abs(float(share) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / count)
    assert len({tuple(row) for row in keep.tolist()}) == 64  # no row repeats another


def test_dropout_follows_pytorchs_generator(device):
    new = Numbers(torch.float32, device)
    x, r = new(8, 64), new(8, 64)
    first, again, other = (with_dropout(x, r, None, None, 0.5, seed)[1] for seed in (1, 1, 2))
    next_draw = ops.layer_norm_residual(x, r, 64, dropout_p=0.5, backend="triton")[1]
    same(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(other, next_draw)


@pytest.mark.parametrize("form", [ops.layer_norm_residual, ops.rms_norm_residual])
def test_dropout_of_0_gives_the_bits_of_none_and_draws_nothing(form, device):
    new = Numbers(torch.bfloat16, device)
    x, r, w, dy, dh = new(5, 70), new(5, 70), new(70), new(5, 70), new(5, 70)
    before = torch.get_rng_state()
    with_p, without = (
        pull(lambda x, r, w, p=p: form(x, r, 70, w, backend="triton", **p), [x, r, w], [dy, dh])
        for p in ({"dropout_p": 0.0}, {})
    )
    same(with_p, without)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_of_the_formula_scales_alike():
    x = torch.ones(50, 100)
    torch.manual_seed(0)
    _, h = ops.rms_norm_residual(x, torch.zeros_like(x), 100, dropout_p=0.25, backend="torch")
    assert set(h.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}


def test_a_second_derivative_through_dropout_is_refused(device):
    new = Numbers(torch.float32, device)
    x = new(4, 9).requires_grad_()
    y, _ = ops.rms_norm_residual(x, new(4, 9), 9, dropout_p=0.5, backend="triton")
    with pytest.raises(RuntimeError, match="rms_norm_residual: a second derivative with dropout_p > 0"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="nor is a batch of gradients"):
        torch.autograd.grad(y, x, torch.ones(2, *y.shape, device=device), is_grads_batched=True)


# ---- only what is wanted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "width"),
    [
        *((form, 40) for form in ("layer_norm", "rms_norm_activation", "layer_norm_residual")),
        ("layer_norm", 9000),
        ("layer_norm_residual", 17000),
    ],
)
def test_only_the_wanted_gradients_are_computed_and_they_are_the_same(form, width, device, monkeypatch):
    new = Numbers(torch.float32, device)
    shape = (width,)
    inputs = inputs_of(form, new, new(3, width), shape)
    gradients = [new(3, width) for _ in range(1 + ("residual" in form))]
    everything = pull(FORMS[form][0]("triton", shape), inputs, gradients)[len(gradients) :]
    seen = []
    run = kernels.backward
    monkeypatch.setattr(op, "_kind", lambda *_: None)  # each call is looked at
    monkeypatch.setattr(kernels, "backward", lambda *a: seen.append(a[-1]) or run(*a))
    first_parameter = len(inputs) - FORMS[form][1]
    for wanted in itertools.product((False, True), repeat=len(inputs)):
        if not any(wanted) or (width > 40 and sum(wanted) != 1):
            continue
        leaves = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
        out = FORMS[form][0]("triton", shape)(*leaves)
        grads = iter(torch.autograd.grad(out, [t for t in leaves if t.requires_grad], gradients))
        for whole, w in zip(everything, wanted, strict=True):
            if w and width == 40:
                same(next(grads), whole)
            elif w:  # one column sum more or less may be another kernel
                torch.testing.assert_close(next(grads), whole, rtol=1e-4, atol=1e-5)
        assert seen.pop()[0] == any(wanted[:first_parameter])


@pytest.mark.parametrize("form", MAIN)
def test_no_gradient_is_recorded_where_none_is_wanted(form, device, monkeypatch):
    monkeypatch.setattr(op, "_Norm", None)
    monkeypatch.setattr(op, "_ResidualNorm", None)
    new = Numbers(torch.float32, device)
    inputs = inputs_of(form, new, new(3, 9), (9,))
    out = FORMS[form][0]("triton", (9,))(*inputs)
    with torch.no_grad():
        again = FORMS[form][0]("triton", (9,))(*(t.detach().requires_grad_() for t in inputs))
    same(out, again)
    assert not any(t.requires_grad for t in (*out, *again))


def test_a_call_like_one_before_may_want_other_gradients(device):
    """What wants one is no part of a call's kind, and backward's plans are kept with the kind."""
    x, weight, dy = (normal(shape, torch.float32, seed=1, device=device) for shape in ((3, 8), (8,), (3, 8)))
    found = []
    for backend in ("triton", "torch"):
        grads = []
        for of in ((True, False), (False, True), (True, True), (True, False)) * 2:
            leaves = [t.clone().requires_grad_(need) for t, need in zip((x, weight), of, strict=True)]
            trinix.ops.rms_norm(leaves[0], 8, leaves[1], backend=backend).backward(dy)
            grads.append([t.grad for t in leaves])
        found.append(grads)
    for got, wanted in zip(*found, strict=True):
        assert [g is None for g in got] == [w is None for w in wanted]
        torch.testing.assert_close([g for g in got if g is not None], [w for w in wanted if w is not None])


@pytest.mark.parametrize("layout", ["contiguous", "q of a packed qkv", "sliced columns, copied"])
@pytest.mark.parametrize("form", MAIN)
def test_backward_twice_gives_equal_bits_and_writes_into_nothing_of_others(form, layout, device):
    new = Numbers(torch.float32, device)
    x, n = LAYOUTS[layout](new)
    inputs = inputs_of(form, new, x, (n,))
    gradients = [new(*x.shape) for _ in range(1 + ("residual" in form))]
    before = [t.clone() for t in (*inputs, *gradients)]
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = FORMS[form][0]("triton", (n,))(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    saved = [t for t in out[0].grad_fn.saved_tensors if t is not None]
    kept = [t.detach().clone() for t in (*saved, *out)]
    first = torch.autograd.grad(out, leaves, gradients, retain_graph=True)
    bits = [t.clone() for t in first]
    second = torch.autograd.grad(out, leaves, gradients)
    same([*first], bits)
    same([*second], bits)
    same([*inputs, *gradients], before)
    same([t.detach() for t in (*saved, *out)], kept)


def test_what_is_saved_is_x_itself_or_h_and_4_or_8_bytes_a_row(device):
    new = Numbers(torch.bfloat16, device)
    for form, statistics in (("layer_norm", 2), ("rms_norm", 1), ("layer_norm_residual", 2), ("rms_norm_residual", 1)):
        inputs = [t.requires_grad_() for t in inputs_of(form, new, new(6, 40), (40,))]
        out = FORMS[form][0]("triton", (40,))(*inputs)
        y, kept = out if isinstance(out, tuple) else (out, inputs[0])
        saved = y.grad_fn.saved_tensors
        assert saved[0].data_ptr() == kept.data_ptr()
        assert saved[3].shape == (6 * statistics,)
        assert saved[3].dtype == torch.float32
        allowed = {t.data_ptr() for t in (kept, *inputs)}
        assert all(t is None or t.data_ptr() in allowed for t in (*saved[:3], *saved[4:]))


@pytest.mark.parametrize("form", ["layer_norm", "rms_norm_residual"])
def test_changing_what_is_saved_before_backward_raises(form, device):
    new = Numbers(torch.float32, device)
    inputs = inputs_of(form, new, new(4, 5).requires_grad_() * 1, (5,))
    out = FORMS[form][0]("triton", (5,))(*inputs)
    (inputs[0] if form == "layer_norm" else out[1]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out if form == "layer_norm" else out[0]).sum().backward()


# ---- higher derivatives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [form for form in FORMS if form != "layer_norm, no weight"])  # PyTorch's own fails
def test_the_second_derivative_is_pytorchs(form, device):
    new = Numbers(torch.float32, device)
    x, n = LAYOUTS["q of a packed qkv"](new)
    inputs = inputs_of(form, new, x, (n,))
    gradients = [new(*x.shape) for _ in range(1 + ("residual" in form))]
    directions = [new(*t.shape) for t in inputs]
    results = []
    for backend in ("triton", "torch"):
        leaves = [t.detach().requires_grad_() for t in inputs]
        incoming = [t.detach().requires_grad_() for t in gradients]
        first = torch.autograd.grad(FORMS[form][0](backend, (n,))(*leaves), leaves, incoming, create_graph=True)
        second = torch.autograd.grad(first, [*leaves, *incoming], directions, materialize_grads=True)
        results.append(([t.detach() for t in first], second))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["layer_norm", "rms_norm", "rms_norm_residual"])
def test_parameters_that_depend_on_x_are_counted_once(form, device):
    """create_graph=True differentiates a formula again: x's gradient must not take the way through weight."""
    new = Numbers(torch.float32, device)
    base = new(9)
    results = []
    for backend in ("triton", "torch"):
        x = base.clone().requires_grad_()
        inputs = [x * 1.5, *([x.cos()] if "residual" in form else []), x.sin(), x.exp()]
        count = len(inputs) - 2 + FORMS[form][1]
        out = FORMS[form][0](backend, (9,))(*inputs[:count])
        y = sum(t.square().sum() for t in (out if isinstance(out, tuple) else (out,)))
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        dx.square().sum().backward()
        results.append((dx.detach(), x.grad))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_x_may_be_its_own_weight(device):
    for again in (False, True):
        results = []
        for backend in ("triton", "torch"):
            x = normal((9,), torch.float32, seed=1, device=device).requires_grad_()
            y = ops.rms_norm(x, 9, x, backend=backend).square().sum()
            results.append(torch.autograd.grad(y, x, create_graph=again)[0].detach())
        torch.testing.assert_close(*results)


# ---- errors, choice, explanation ---------------------------------------------------------------------------------------

x33 = torch.ones(3, 3)
WRONG = {
    "x is no tensor": (lambda b: ops.layer_norm([1.0], 1, backend=b), TypeError, "layer_norm: x must be a floating-point tensor, got list; .*x.float"),
    "x is None": (lambda b: ops.layer_norm(None, 1, backend=b), TypeError, "layer_norm: x must be a floating-point tensor, got NoneType"),
    "weight's device": (lambda b: ops.rms_norm(x33, 3, torch.ones(3, device="meta"), backend=b), ValueError, "rms_norm: weight must be on x's device cpu, got meta; .*weight.to"),
    "x is integer": (lambda b: ops.rms_norm(x33.int(), 3, backend=b), TypeError, "rms_norm: x must be a floating-point tensor, got torch.int32"),
    "x is complex": (lambda b: ops.layer_norm(x33.cfloat(), 3, backend=b), TypeError, "got torch.complex64"),
    "another width": (lambda b: ops.layer_norm(x33, 4, backend=b), ValueError, r"layer_norm: normalized_shape must be the last dimensions of x, whose shape is \[3, 3\], got \[4\]"),
    "too many dimensions": (lambda b: ops.rms_norm(x33, (3, 3, 3), backend=b), ValueError, r"normalized_shape .* got \[3, 3, 3\]"),
    "no dimension": (lambda b: ops.rms_norm(x33, (), backend=b), ValueError, r"normalized_shape .* got \[\]"),
    "0-d x": (lambda b: ops.rms_norm(torch.ones(()), 1, backend=b), ValueError, r"whose shape is \[\], got \[1\]"),
    "weight's shape": (lambda b: ops.rms_norm(x33, 3, torch.ones(4), backend=b), ValueError, r"rms_norm: weight must have the shape \[3\], got \[4\]; reshape it"),
    "bias's shape": (lambda b: ops.layer_norm(x33, 3, torch.ones(3), torch.ones(1, 3), backend=b), ValueError, r"bias must have the shape \[3\], got \[1, 3\]"),
    "weight's dtype": (lambda b: ops.layer_norm(x33, 3, torch.ones(3).int(), backend=b), TypeError, "layer_norm: weight must be a floating-point tensor, got torch.int32"),
    "a weight in the place of the shape": (lambda b: ops.rms_norm(x33, torch.ones(3), backend=b), TypeError, "rms_norm: normalized_shape must be an int or a tuple of ints, got Tensor; it stands before weight"),
    "a shape within a shape": (lambda b: ops.rms_norm(x33, ([3],), backend=b), TypeError, r"rms_norm: normalized_shape must be .* got \(\[3\],\)"),
    "a shape within a residual's": (lambda b: ops.layer_norm_residual(x33, x33, ([3],), backend=b), TypeError, r"layer_norm_residual: normalized_shape must be .* got \(\[3\],\)"),
    "a shape of floats": (lambda b: ops.rms_norm(x33, (3.0,), backend=b), TypeError, r"rms_norm: normalized_shape must be an int or a tuple of ints, got \(3.0,\)"),
    "a shape of tensors": (lambda b: ops.rms_norm(x33, (torch.tensor(3),), backend=b), TypeError, r"got \(tensor\(3\),\); convert them with int\(\)"),
    "a shape of no numbers": (lambda b: ops.layer_norm(x33, None, backend=b), TypeError, "layer_norm: normalized_shape must be .* got NoneType"),
    "weight is a list": (lambda b: ops.rms_norm(x33, 3, [1.0, 1.0, 1.0], backend=b), TypeError, "rms_norm: weight must be a tensor or None, got list"),
    "dropout is text": (lambda b: ops.rms_norm_residual(x33, x33, 3, dropout_p="a", backend=b), TypeError, "dropout_p must be a number, got 'a'"),
    "residual's shape": (lambda b: ops.rms_norm_residual(x33, x33[:2], 3, backend=b), ValueError, r"rms_norm_residual: residual must have x's shape and dtype, \[3, 3\] torch.float32, got \[2, 3\]"),
    "residual's dtype": (lambda b: ops.layer_norm_residual(x33, x33.half(), 3, backend=b), ValueError, "layer_norm_residual: residual .* got .*torch.float16"),
    "no residual": (lambda b: ops.layer_norm_residual(x33, None, 3, backend=b), ValueError, "residual .* got NoneType"),
    "dropout of 1": (lambda b: ops.layer_norm_residual(x33, x33, 3, dropout_p=1.0, backend=b), ValueError, "layer_norm_residual: dropout_p must be at least 0 and below 1, got 1.0"),
    "dropout below 0": (lambda b: ops.rms_norm_residual(x33, x33, 3, dropout_p=-0.1, backend=b), ValueError, "dropout_p .* got -0.1"),
    "unknown kind": (lambda b: ops.rms_norm_activation(x33, 3, None, "swoosh", backend=b), ValueError, r"rms_norm_activation: kind must be one of \['none', 'relu'.*\], got 'swoosh'"),
    "a kind with parameters": (lambda b: ops.rms_norm_activation(x33, 3, None, "softplus", backend=b), ValueError, "kind must be one of .* got 'softplus'"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named_with_what_was_wanted_and_got(case, backend):
    call, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        call(backend)


def test_numpy_s_integers_are_a_shape():
    x, shape = normal((3, 8), torch.float32, seed=1), np.array([8])
    for backend in ("auto", "triton", "torch"):
        same(ops.rms_norm(x, tuple(shape), backend=backend), ops.rms_norm(x, 8, backend=backend))
        ours, wanted = (ops.layer_norm_residual(x, x, n, backend=backend) for n in (list(shape), 8))
        same(ours, wanted)


def test_numpy_s_numbers_are_a_share_of_dropout():
    x, p = normal((3, 8), torch.float32, seed=1), np.float32(0.5)
    for backend in ("auto", "triton", "torch"):
        torch.manual_seed(0)
        ours = ops.rms_norm_residual(x, x, 8, dropout_p=p, backend=backend)
        torch.manual_seed(0)
        same(ours, ops.rms_norm_residual(x, x, 8, dropout_p=0.5, backend=backend))


CALLS = {
    "layer_norm": lambda x, b: ops.layer_norm(x, x.shape[-1], backend=b),
    "rms_norm": lambda x, b: ops.rms_norm(x, x.shape[-1], backend=b),
    "rms_norm_activation": lambda x, b: ops.rms_norm_activation(x, x.shape[-1], backend=b),
    "layer_norm_residual": lambda x, b: ops.layer_norm_residual(x, x, x.shape[-1], backend=b)[0],
    "rms_norm_residual": lambda x, b: ops.rms_norm_residual(x, x, x.shape[-1], backend=b)[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_backend_is_refused_with_the_list_of_backends(name):
    with pytest.raises(ValueError, match=rf"{name}: .*\['auto', 'hopper', 'triton', 'torch'\], got 'tritn'"):
        CALLS[name](x33, "tritn")
    with trinix.use_backend("tritn"), pytest.raises(ValueError, match="got 'tritn'"):
        CALLS[name](x33, "auto")


@pytest.mark.parametrize("name", CALLS)
def test_what_triton_does_not_take_is_unsupported_by_name_and_reason_and_goes_through_auto(name, device):
    x = torch.ones(3, 4, dtype=torch.float64, device=device)
    with pytest.raises(trinix.Unsupported, match=f"{name}: backend 'triton' needs float16.*, got float64.*'auto'"):
        CALLS[name](x, "triton")
    assert CALLS[name](x, "auto").dtype == torch.float64
    x = torch.ones(3, 4, device="meta")
    with pytest.raises(trinix.Unsupported, match="'triton' needs a GPU tensor, got meta"):
        CALLS[name](x, "triton")
    assert CALLS[name](x, "auto").shape == (3, 4)


def test_parameters_decide_too_whether_triton_can_run(device):
    x = torch.ones(3, 4, device=device)
    with pytest.raises(trinix.Unsupported, match="got float64"):
        ops.rms_norm(x, 4, torch.ones(4, dtype=torch.float64, device=device), backend="triton")
    with pytest.raises(trinix.Unsupported, match=r"on one device, got .* and meta"):
        ops.rms_norm_residual(x, torch.ones(3, 4, device="meta"), 4, backend="triton")
    y = ops.rms_norm(x, 4, torch.ones(4, dtype=torch.float64, device=device))
    assert y.dtype == torch.float32


def backend_that_ran(y) -> str:
    return "triton" if y.grad_fn.name() in ("_NormBackward", "_ResidualNormBackward") else "torch"


@pytest.mark.parametrize("name", CALLS)
def test_use_backend_stands_in_for_auto_only_and_ends_with_its_block(name):
    x = torch.ones(3, 4, requires_grad=True)
    call = CALLS[name]
    with trinix.use_backend("triton"):
        y = call(x, "auto")
        assert backend_that_ran(y) == "triton"
        assert backend_that_ran(call(x, "torch")) == "torch"
    assert backend_that_ran(call(x, "auto")) == "torch"
    y.sum().backward()


def config_of(n):
    config = kernels.choose_forward(n, 4, kernels.LANES)
    return f"{config.rows} rows of {n} a program, {config.num_warps} warps"


EXPLAINED = {
    "auto on the CPU": (
        lambda x: trinix.explain("rms_norm", x.cpu(), 64),
        "rms_norm -> torch: the first backend that can run here\n  not triton: needs a GPU tensor, got cpu",
    ),
    "named torch": (
        lambda x: trinix.explain(ops.layer_norm, x, 64, backend="torch"),
        "layer_norm -> torch: named by the caller",
    ),
    "narrow": (
        lambda x: trinix.explain("layer_norm", x, 64, backend="triton"),
        f"layer_norm -> triton: named by the caller\n  config: {config_of(64)}",
    ),
    "several dimensions": (
        lambda x: trinix.explain("layer_norm", x, (8, 64), backend="triton"),
        f"layer_norm -> triton: named by the caller\n  config: {config_of(512)}",
    ),
    "residual": (
        lambda x: trinix.explain("rms_norm_residual", x, x, 64, backend="triton"),
        f"rms_norm_residual -> triton: named by the caller\n  config: {config_of(64)}",
    ),
    "wide": (
        lambda x: trinix.explain("rms_norm", x.new_ones(2, 33000), 33000, backend="triton").config.split(",")[0],
        "wide kernel",
    ),
    "rows of no elements": (
        lambda x: trinix.explain("rms_norm", x.new_ones(2, 0), 0, backend="triton").backend,
        "triton",
    ),
    "float64": (lambda x: trinix.explain("rms_norm_activation", x.double().cpu(), 64).backend, "torch"),
}


@pytest.mark.parametrize("case", EXPLAINED)
def test_explain_says_backend_reason_and_configuration(case, device):
    explain, text = EXPLAINED[case]
    assert str(explain(torch.ones(8, 64, device=device))) == text


@pytest.mark.parametrize("case", WRONG)
def test_explain_refuses_what_the_call_would_refuse(case, monkeypatch):
    call, error, text = WRONG[case]
    for name in CALLS:
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, real=real, **kwargs: trinix.explain(real, *args, **kwargs))
    with pytest.raises(error, match=text):
        call("triton")


def test_explain_follows_use_backend():
    with trinix.use_backend("triton"):
        assert trinix.explain("rms_norm", x33, 3).backend == "triton"
    with pytest.raises(trinix.Unsupported, match="'triton' needs float16"):
        trinix.explain("rms_norm", x33.double(), 3, backend="triton")
    with pytest.raises(ValueError, match="got 'tritn'"):
        trinix.explain("rms_norm", x33, 3, backend="tritn")


# ---- pure functions ----------------------------------------------------------------------------------------------------

BLOCKS = [1 << i for i in range(17)]


@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_forward_configuration_fits_a_program(itemsize, lanes):
    for block in BLOCKS:
        for n in {block, block - 1, block // 2 + 1} - {0}:
            config = kernels.choose_forward(n, itemsize, lanes)
            assert (config is None) == (n > 32768)
            if config:
                assert config.num_warps * lanes <= 1024
                assert config.rows & (config.rows - 1) == 0
                assert config.num_warps & (config.num_warps - 1) == 0
                assert config.rows * kernels._power_of_two(n) <= 64 * config.num_warps * lanes


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("lanes", "target"), [(32, "sm_80"), (32, "sm_90"), (64, "gfx942")])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_backward_configuration_fits_a_program_and_a_multiprocessor(itemsize, lanes, target, residual):
    for block in BLOCKS:
        for n in {block, block - 1, block // 2 + 1} - {0}:
            config = kernels.choose_backward(n, itemsize, lanes, residual)
            assert (config is None) == (n > 8192)
            if not config:
                continue
            width = kernels._power_of_two(n)
            assert config.num_warps * lanes <= 1024
            assert all(v & (v - 1) == 0 for v in (config.rows, config.num_warps))
            assert config.rows * width <= 64 * config.num_warps * lanes
            # x and dy wait in shared memory from two stages on
            staged = 2 * config.rows * width * itemsize * (config.num_stages if config.num_stages > 1 else 0)
            assert staged <= cards.LIMITS[target].shared_kib * 1024
            if target == "sm_90":
                assert config.programs_per_sm * config.num_warps * lanes <= 2048
                assert config.programs_per_sm * staged <= 228 * 1024


ROW_VIEWS = [
    # shape, strides, n -> (inner, outer stride, inner stride)
    ((5, 33), (33, 1), 33, (5, 0, 33)),
    ((5, 33), (48, 1), 33, (5, 0, 48)),
    ((33,), (1,), 33, (1, 0, 0)),
    ((1, 33), (7, 1), 33, (1, 0, 0)),
    ((2, 3, 2, 16), (288, 96, 16, 1), 16, (2, 96, 16)),
    ((4, 3, 17), (17, 68, 1), 17, (3, 17, 68)),
    ((2, 3, 5, 16), (240, 16, 48, 1), 16, None),
    ((5, 20), (40, 2), 20, None),
    ((5, 1), (2, 1), 1, (5, 0, 2)),
    ((5, 1, 1), (2, 9, 9), 1, (5, 0, 2)),
    ((5, 33), (0, 1), 33, (5, 0, 0)),
    ((3, 8), (1, 0), 8, None),
    ((4, 3, 16), (0, 16, 1), 16, (3, 0, 16)),
    ((3, 4, 16), (16, 0, 1), 16, (4, 16, 0)),
    ((2, 4, 3, 5), (120, 30, 5, 1), 15, (8, 0, 30)),
    ((2, 4, 3, 5), (60, 15, 1, 3), 15, None),
    ((2, 4, 3, 5), (60, 15, 5, 1), 60, (2, 0, 60)),
    ((2, 1, 3, 5), (15, 77, 5, 1), 15, (2, 0, 15)),
    ((9, 8), (4, 1), 8, (9, 0, 4)),
]


@pytest.mark.parametrize(("shape", "strides", "n", "wanted"), ROW_VIEWS)
def test_row_view(shape, strides, n, wanted):
    assert kernels.row_view(torch.empty_strided(shape, strides), n) == wanted


@hypothesis.settings(max_examples=200, derandomize=True, deadline=None)
@hypothesis.given(view=views())
def test_a_row_view_finds_every_row(view):
    shape, cuts, order, last = view
    t = torch.arange(math.prod(shape)).view(shape)[tuple(cuts)].permute(list(order))
    n = math.prod(t.shape[-last:])
    if not t.numel() or (found := kernels.row_view(t, n)) is None:
        return
    inner, outer, step = found
    rows = t.numel() // n
    assert rows % inner == 0
    starts = t.storage_offset() + torch.tensor([r // inner * outer + r % inner * step for r in range(rows)])
    flat = torch.arange(math.prod(shape))
    assert torch.equal(flat[starts[:, None] + torch.arange(n)], t.reshape(rows, n))


@pytest.mark.parametrize(
    ("strides", "unit", "view"),
    [((8, 24, 1), 8, (3, 1, 3)), ((8, 20, 1), 1, (3, 8, 20)), ((24, 8, 1), 0, (1, 1, 1)), ((0, 8, 1), 8, (3, 0, 1))],
)
def test_strides_travel_in_units_of_16_bytes_where_they_can(strides, unit, view):
    t = torch.empty_strided((4, 3, 8), strides, dtype=torch.bfloat16)
    got, *rest = kernels._rows_of(t, 8)
    assert got is t
    assert rest == [unit, view]


@pytest.mark.parametrize(
    ("rows", "tile", "programs"), [(1, 1, 1), (3, 1, 3), (4, 1, 2), (5, 1, 3), (7, 2, 2), (100, 4, 3), (100, 32, 2)]
)
def test_programs_are_no_more_than_an_even_share_needs(rows, tile, programs):
    config = kernels.BackwardConfig(rows=tile, num_warps=4, num_stages=1, programs_per_sm=1)
    got = kernels._programs(torch.empty(1), rows, config)  # 3 at a time on the CPU
    assert got == programs
    tiles = -(-rows // tile)
    assert got <= 3
    assert -(-tiles // got) == -(-tiles // 3)


def test_the_adding_kernel_covers_every_partial():
    for programs in (1, 2, 3, 7, 132, 264, 528, 700):
        cols, launch = kernels.add_partials_launch(1000, True, True, programs, False)
        assert launch.constants["ROWS"] >= min(programs, 512)
        assert launch.constants["COLS"] == cols
        assert launch.constants["ROWS"] * cols <= 128 * 32 * launch.options["num_warps"]
    assert not launch.options.get("launch_pdl")


# ---- a citizen of PyTorch ----------------------------------------------------------------------------------------------

COMPILED = ("layer_norm", "rms_norm, offset 1", "rms_norm_activation", "layer_norm_residual", "rms_norm_residual, bare")


def total(out):
    return sum((t * t.cos()).sum() for t in (out if isinstance(out, tuple) else (out,)))


def compiled_matches_eager(form, backend, compiler, x, shape):
    """A fullgraph compile, fed twice, against the eager call; returns the targets of the graphs that it made."""
    targets = []

    def recording(graph, example_inputs):
        graphs = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        targets.extend(str(node.target) for one in graphs for node in one.graph.nodes)
        return torch._dynamo.lookup_backend(compiler)(graph, example_inputs)

    function = FORMS[form][0](backend, shape)
    compiled = torch.compile(lambda t, *others: function(t * 2, *others), fullgraph=True, backend=recording)
    new = Numbers(x.dtype, x.device.type)
    others = inputs_of(form, new, x, shape)[1:]
    for first in (x, x.flip(0)):
        results = []
        for run in (compiled, lambda t, *others: function(t * 2, *others)):
            leaves = [t.detach().requires_grad_() for t in (first, *others)]
            out = run(*leaves)
            results.append((out, torch.autograd.grad(total(out), leaves)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    return targets


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", COMPILED)
def test_compile_takes_auto_whole_and_sees_the_plain_formula(form):
    targets = compiled_matches_eager(form, "auto", "aot_eager", normal((4, 6), torch.float32, seed=1), (6,))
    assert not any("trinix" in target or "autograd_function" in target for target in targets)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", COMPILED)
def test_compile_takes_triton_as_one_registered_op(form, device):
    targets = compiled_matches_eager(
        form, "triton", "aot_eager", normal((4, 6), torch.float32, seed=1, device=device), (6,)
    )
    assert f"trinix.norm{'_residual' if 'residual' in form else ''}.default" in targets


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", ["layer_norm", "layer_norm_residual"])
def test_compile_takes_strided_x_and_several_dimensions(form, device):
    x = normal((4, 3, 2, 5), torch.float32, seed=1, device=device).transpose(0, 1)
    compiled_matches_eager(form, "triton", "aot_eager", x, (2, 5))


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_dropout_has_one_mask_too(device):
    compiled = torch.compile(with_dropout_of_half, fullgraph=True, backend="aot_eager")
    x = torch.ones(8, 64, device=device, requires_grad=True)
    r = torch.zeros(8, 64, device=device, requires_grad=True)
    for _ in range(2):
        _, h = compiled(x, r)
        dx, dr = torch.autograd.grad(h.sum(), (x, r))
        assert 100 < (h != 0).sum() < 412
        same(dx, h)
        same(dr, torch.ones_like(r))


def with_dropout_of_half(x, r):
    return ops.rms_norm_residual(x, r, 64, dropout_p=0.5, backend="triton")


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_with_dynamic_shapes_and_without_gradient(device):
    compiled = torch.compile(CALLS["layer_norm"], fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5, 9):
        x = normal((rows, 7), torch.float32, seed=rows, device=device)
        # the operator's forward saves statistics, this one does not: two binaries
        torch.testing.assert_close(compiled(x, "triton"), CALLS["layer_norm"](x, "triton"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["q of a packed qkv", "0 rows"])
def test_the_registered_ops_pass_opcheck(layout, device):
    new = Numbers(torch.float32, device)
    x, n = LAYOUTS[layout](new)
    r, w, b, dy = new(*x.shape), new(n), new(n), new(*x.shape)
    seed = torch.tensor([5], device=device)
    names = torch.ops.trinix
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")

    def check(one, *arguments):
        torch.library.opcheck(one.default, arguments, test_utils=checks)

    check(names.norm, x, w, b, n, EPS, 0.0, True, "")
    check(names.norm, x, None, None, n, EPS, 0.0, False, "silu")
    check(names.norm_residual, x, r, w, None, seed, n, EPS, 1.0, False, 0.5)
    check(names.norm_residual, x, r, w, b, None, n, EPS, 0.0, True, 0.0)
    stats = names.norm(x, w, b, n, EPS, 0.0, True, "")[1]
    for wanted in ([True, True, True], [True, False, False], [False, True, False]):
        check(names.norm_backward, x, dy, None, w, b, stats, None, n, 0.0, True, "", 0.0, wanted)
        check(names.norm_backward, x, dy, r, w, b, stats, seed, n, 0.0, True, "", 0.5, wanted)


@pytest.mark.parametrize("form", ["layer_norm", "rms_norm_residual"])
def test_a_dispatch_mode_sees_one_op_a_pass(form, device):
    new = Numbers(torch.float32, device)
    inputs = inputs_of(form, new, new(4, 6), (6,))
    gradients = [new(4, 6) for _ in range(1 + ("residual" in form))]
    with Watch() as watch:
        pull(FORMS[form][0]("triton", (6,)), inputs, gradients)
    forward = "trinix.norm_residual.default" if "residual" in form else "trinix.norm.default"
    assert [name for name in watch.seen if "trinix" in name] == [forward, "trinix.norm_backward.default"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["layer_norm", "rms_norm_residual"])
def test_the_registered_ops_give_the_same_bits(form, layout):
    new = Numbers(torch.float32)
    x, n = LAYOUTS[layout](new)
    inputs = inputs_of(form, new, x, (n,))
    gradients = [new(*x.shape) for _ in range(1 + ("residual" in form))]
    wanted = pull(FORMS[form][0]("triton", (n,)), inputs, gradients)
    with Watch():
        same(pull(FORMS[form][0]("triton", (n,)), inputs, gradients), wanted)


def test_the_registered_ops_take_subsets_of_gradients_and_several_dimensions(device):
    new = Numbers(torch.float32, device)
    x, w, b, dy = new(2, 3, 5), new(3, 5), new(3, 5), new(2, 3, 5)
    everything = pull(FORMS["layer_norm"][0]("triton", (3, 5)), [x, w, b], [dy])[1:]
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [t.detach().requires_grad_(need) for t, need in zip((x, w, b), wanted, strict=True)]
        with Watch():
            y = FORMS["layer_norm"][0]("triton", (3, 5))(*leaves)
            assert y.requires_grad == any(wanted)
            if any(wanted):
                y.backward(dy)
        for leaf, need, whole in zip(leaves, wanted, everything, strict=True):
            if need:
                same(leaf.grad, whole)
            else:
                assert leaf.grad is None


def test_eager_and_registered_dropout_draw_the_same_mask(device):
    new = Numbers(torch.float32, device)
    inputs = [new(8, 64), new(8, 64), new(64), new(64)]
    gradients = [new(8, 64), new(8, 64)]
    wanted = pull(lambda *t: with_dropout(*t, 0.3, 9), inputs, gradients)
    torch.manual_seed(9)
    with Watch():
        got = pull(lambda x, r, w, b: ops.layer_norm_residual(x, r, 64, w, b, EPS, dropout_p=0.3, backend="triton"),
                   inputs, gradients)  # fmt: skip
    same(got, wanted)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("form", MAIN)
def test_fake_tensors_pass_with_shape_strides_and_dtype_and_no_kernel(form, backend, device, monkeypatch):
    monkeypatch.setattr(_launch.Launch, "__call__", lambda *_: pytest.fail("a kernel ran on a fake tensor"))
    with FakeTensorMode():
        x = torch.empty(6, 2, 5, device=device, dtype=torch.bfloat16).transpose(0, 1).requires_grad_()
        others = [torch.empty(2, 6, 5, device=device, dtype=torch.bfloat16, requires_grad=True)] * ("residual" in form)
        others += [torch.empty(5, device=device, requires_grad=True) for _ in range(FORMS[form][1])]
        out = FORMS[form][0](backend, (5,))(x, *others)
        out = out if isinstance(out, tuple) else (out,)
        sum(t.sum() for t in out).backward()
    assert all((y.shape, y.dtype) == (x.shape, x.dtype) for y in out)
    assert backend == "auto" or all(y.is_contiguous() for y in out)
    assert all((t.grad.shape, t.grad.dtype) == (t.shape, t.dtype) for t in (x, *others))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_and_transforms_give_the_right_answer_or_an_error(name, backend, device):
    x, tangent = (normal((5, 6), torch.float32, seed=s, device=device) for s in (1, 2))

    def function(t):
        return CALLS[name](t, backend)

    def plain(t):
        return CALLS[name](t, "torch")

    def by_dual_numbers(leaf):
        with torch.autograd.forward_ad.dual_level():
            y = function(torch.autograd.forward_ad.make_dual(leaf, tangent))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    wanted = torch.func.jvp(plain, (x,), (tangent,))[1]
    gradient = torch.func.grad(lambda t: plain(t).square().sum())(x)
    attempts = [
        (lambda: by_dual_numbers(x), wanted),
        (lambda: by_dual_numbers(x.detach().requires_grad_()), wanted),
        (lambda: torch.func.jvp(function, (x,), (tangent,))[1], wanted),
        (lambda: torch.func.vmap(function)(x), plain(x)),
        (lambda: torch.func.grad(lambda t: function(t).square().sum())(x), gradient),
    ]
    for compute, answer in attempts:
        if backend == "auto":
            torch.testing.assert_close(compute(), answer)
        else:
            right_or_refused(compute, answer)


@pytest.mark.parametrize("form", MAIN)
def test_a_batch_of_gradients_can_be_pulled_back_at_once(form, device):
    new = Numbers(torch.float32, device)
    inputs = inputs_of(form, new, new(2, 5), (5,))
    gradients = [new(3, 2, 5) for _ in range(1 + ("residual" in form))]
    results = []
    for backend in ("triton", "torch"):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = FORMS[form][0](backend, (5,))(*leaves)
        results.append(torch.autograd.grad(out, leaves, gradients, is_grads_batched=True))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_negative_view_is_read_with_its_sign(backend, device):
    new = Numbers(torch.float32, device)
    x, w, dy = (torch._neg_view(new(*shape)) for shape in ((4, 6), (6,), (4, 6)))
    got, wanted = (
        pull(FORMS["rms_norm"][0](backend, (6,)), [a, b], [c])
        for a, b, c in ((x, w, dy), [t.resolve_neg() for t in (x, w, dy)])
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", [*MAIN, "rms_norm_activation"])
def test_autocast_changes_no_dtype(form, dtype, backend, device):
    new = Numbers(dtype, device)
    inputs = [t.requires_grad_() for t in inputs_of(form, new, new(4, 6), (6,))]
    with torch.autocast(device, dtype=torch.bfloat16):
        out = FORMS[form][0](backend, (6,))(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    assert all(t.dtype == dtype for t in out)
    grads = torch.autograd.grad(sum(t.sum() for t in out), inputs)
    assert [g.dtype for g in grads] == [t.dtype for t in inputs]


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("low_residual", [False, True])
@pytest.mark.parametrize("op", [ops.layer_norm_residual, ops.rms_norm_residual])
def test_under_autocast_a_product_meets_a_stream_of_another_dtype(op, low_residual, backend, device):
    new = Numbers(torch.float32, device)
    x, r, w = (new(*shape).requires_grad_() for shape in ((4, 6), (4, 6), (6,)))
    results = []
    for fused in (True, False):
        low = [t.bfloat16() if (t is r) == low_residual else t for t in (x, r)]
        with torch.autocast(device, dtype=torch.bfloat16):
            if fused:
                y, h = op(*low, 6, w, backend=backend)
            else:
                y, h = op(low[0] + low[1], torch.zeros_like(r), 6, w, backend="torch")
        assert (y.dtype, h.dtype) == (torch.float32, torch.float32)
        results.append([y, h, *torch.autograd.grad((y * y.cos()).sum() + h.sin().sum(), (x, r, w))])
    torch.testing.assert_close(*results)
    low = x.bfloat16(), r
    with torch.autocast(device, dtype=torch.bfloat16):
        assert trinix.explain(op, *low, 6, w, backend=backend).backend
    with pytest.raises(ValueError, match=r"_residual: residual must have x's shape and dtype, .*; convert one of them"):
        op(*low, 6, w, backend=backend)


def test_checkpointing_draws_the_same_dropout_again(device):
    new = Numbers(torch.float32, device)
    x, r = new(8, 64).requires_grad_(), new(8, 64)

    def function(t):
        return with_dropout_of_half(t, r)[0]

    torch.manual_seed(4)
    wanted = torch.autograd.grad(function(x).square().sum(), x)[0]
    torch.manual_seed(4)
    y = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
    same(torch.autograd.grad(y.square().sum(), x)[0], wanted)
    with torch.autograd.detect_anomaly(check_nan=True):
        torch.manual_seed(4)
        same(torch.autograd.grad(function(x).square().sum(), x)[0], wanted)


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_subclass_keeps_its_type_and_meets_no_raw_launch(name, device):
    x = normal((4, 6), torch.float32, seed=1, device=device)
    for backend in ("auto", "triton"):
        y = CALLS[name](x.as_subclass(Tagged), backend)
        assert type(y) is Tagged
        torch.testing.assert_close(y.as_subclass(torch.Tensor), CALLS[name](x, "torch"))


def test_a_parameter_goes_as_a_plain_tensor(device):
    x = torch.ones(3, 4, device=device)
    y = ops.rms_norm(x, 4, nn.Parameter(torch.ones(4, device=device)), backend="triton")
    assert backend_that_ran(y) == "triton"


def test_a_tensor_without_strides_is_unsupported_by_triton(device):
    with pytest.raises(trinix.Unsupported, match=r"needs strided tensors, got torch.sparse_coo"):
        ops.rms_norm(torch.eye(3, device=device).to_sparse(), 3, backend="triton")


# ---- the tests can fail ------------------------------------------------------------------------------------------------


def refused(form="layer_norm", rows=9, width=130):
    new = Numbers(torch.float32)
    with pytest.raises(AssertionError, match="OVER BUDGET"):
        oracle(form, new(rows, width) + 1.0, width, new)


@pytest.mark.parametrize("which", ["forward_launch", "backward_launch"])
def test_a_program_that_does_not_run_fails_the_oracle(which, monkeypatch):
    run = _launch.Launch.__call__
    which = {"forward_launch": kernels._forward, "backward_launch": kernels._backward}[which]

    def one_less(self, blocks, *rest):
        run(self, blocks - (self.kernel is which), *rest)

    monkeypatch.setattr(_launch.Launch, "__call__", one_less)
    refused(rows=30, width=600)


def test_a_partial_sum_that_is_forgotten_fails_the_oracle(monkeypatch):
    run = _launch.Launch.__call__

    def one_row_less(self, blocks, tensors, scalars):
        if self.kernel is kernels._add_partials:
            scalars = (scalars[0] - 1,)
        run(self, blocks, tensors, scalars)

    monkeypatch.setattr(_launch.Launch, "__call__", one_row_less)
    refused(rows=30, width=600)


@pytest.mark.parametrize("factor", [1.0001, 0.9999])
def test_statistics_a_little_off_fail_the_oracle(factor, monkeypatch):
    real = kernels.backward

    def with_bad_statistics(*call):
        call = [*call]
        call[5] = call[5] * factor
        return real(*call)

    monkeypatch.setattr(op, "_kind", lambda *_: None)
    monkeypatch.setattr(kernels, "backward", with_bad_statistics)
    refused()
    refused("rms_norm_residual")


def test_eps_in_the_wrong_place_fails_the_oracle(monkeypatch):
    real = kernels.forward
    monkeypatch.setattr(op, "_kind", lambda *_: None)
    monkeypatch.setattr(kernels, "forward", lambda *a: real(*a[:5], a[5] * 3, *a[6:]))
    refused("rms_norm")


def test_a_mask_that_is_drawn_anew_fails(monkeypatch):
    real = kernels.backward
    monkeypatch.setattr(op, "_kind", lambda *_: None)
    monkeypatch.setattr(kernels, "backward", lambda *a: real(*a[:6], None if a[6] is None else a[6] + 1, *a[7:]))
    with pytest.raises(AssertionError):
        test_dropout_forward_and_backward_use_one_mask(37, 129, 0.5, "cpu")


# ---- calls like one before ---------------------------------------------------------------------------------------------


def kinds() -> dict[str, tuple]:
    """name -> (op, arguments): each another kind of call."""
    x, w, b = (
        normal((6, 32), torch.float32, seed=1),
        normal((32,), torch.float32, seed=2),
        normal((32,), torch.float32, seed=3),
    )
    wide = normal((6, 64), torch.float32, seed=4)
    return {
        "plain": (ops.rms_norm, x, 32, w), "no weight": (ops.rms_norm, x, 32), "offset": (ops.rms_norm, x, 32, w, 1e-3, 1.0),
        "eps": (ops.rms_norm, x, 32, w, 1e-2), "other eps": (ops.rms_norm, x, 32, w, 1e-1),
        "as a tuple": (ops.rms_norm, x, (32,), w), "two dimensions": (ops.rms_norm, x.view(6, 4, 8), (4, 8), w.view(4, 8)),
        "one of two": (ops.rms_norm, x.view(6, 4, 8), 8, w[:8]), "fewer rows": (ops.rms_norm, x[:5], 32, w),
        "other strides": (ops.rms_norm, wide[:, :32], 32, w), "rows turned": (ops.rms_norm, x.view(2, 3, 32).transpose(0, 1), 32, w),
        "bfloat16": (ops.rms_norm, x.bfloat16(), 32, w.bfloat16()), "float32 weight": (ops.rms_norm, x.bfloat16(), 32, w),
        "layer norm": (ops.layer_norm, x, 32, w, b), "no bias": (ops.layer_norm, x, 32, w), "bias alone": (ops.layer_norm, x, 32, None, b),
        "float16 bias": (ops.layer_norm, x, 32, w, b.half()), "mish": (ops.rms_norm_activation, x, 32, w, "mish"),
        "quick_gelu": (ops.rms_norm_activation, x, 32, w, "quick_gelu"),
        "residual": (ops.rms_norm_residual, x, wide[:, :32].contiguous(), 32, w),
        "strided residual": (ops.rms_norm_residual, x, wide[:, :32], 32, w),
        "layer norm of a residual": (ops.layer_norm_residual, x, x.flip(0), 32, w, b),
        "residual without parameters": (ops.layer_norm_residual, x, x.flip(0), 32),
    }  # fmt: skip


def called(call, backend, grad):
    function, *arguments = call
    arguments = [t.detach().requires_grad_(grad) if isinstance(t, torch.Tensor) else t for t in arguments]
    leaves = [t for t in arguments if isinstance(t, torch.Tensor)]
    more = {"kind": arguments.pop()} if function is ops.rms_norm_activation else {}
    if function is ops.rms_norm and len(arguments) == 5:
        more["weight_offset"] = arguments.pop()
    out = function(*arguments, **more, backend=backend)
    out = out if isinstance(out, tuple) else (out,)
    ones = [torch.ones_like(y) for y in out]
    return [*(y.detach() for y in out), *(torch.autograd.grad(out, leaves, ones) if grad else ())]


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "with gradients"])
def test_a_call_like_one_before_is_not_looked_at_again_and_every_other_one_is(grad, monkeypatch):
    monkeypatch.setattr(op, "_prepared", {})
    calls = kinds()
    wanted = {name: called(call, "torch", grad) for name, call in calls.items()}
    for call in calls.values():
        called(call, "triton", grad)
    assert len(op._prepared) == len(calls)
    monkeypatch.setattr(op, "_checked_shape", lambda *_: pytest.fail("looked at again"))
    for name, call in calls.items():
        for got, true in zip(called(call, "triton", grad), wanted[name], strict=True):
            assert got.dtype == true.dtype
            loose = 2e-2 if true.dtype == torch.bfloat16 or "float16" in name else 2e-5
            torch.testing.assert_close(got.float(), true.float(), rtol=loose, atol=loose * 8, msg=name)
    monkeypatch.undo()
    x, w = calls["plain"][1], calls["plain"][3]
    assert called((ops.rms_norm, x, 32, w), "triton", not grad), "whether autograd records makes another kind"


@pytest.mark.parametrize("form", MAIN)
def test_gradients_in_another_layout_behind_a_call_like_it(form, monkeypatch):
    monkeypatch.setattr(op, "_prepared", {})
    new = Numbers(torch.float32)
    inputs = inputs_of(form, new, new(6, 32), (32,))
    ways = {
        "dense": lambda t: t,
        "columns first": lambda t: t.T.contiguous().T,
        "every other row": lambda t: torch.stack((t, t + 1), 1)[:, 0],
        "every other column": lambda t: torch.stack((t, t + 1), -1)[..., 0],
        "one row": lambda t: t[:1].expand(t.shape),
        "one number": lambda t: t[:1, :1].expand(t.shape),
    }
    for names in itertools.product([*ways, "dense"], repeat=1 + ("residual" in form)):
        gradients = [ways[name](new(6, 32)) for name in names]
        got, true = (pull(FORMS[form][0](backend, (32,)), inputs, gradients) for backend in ("triton", "torch"))
        for ours, other in zip(got, true, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5, msg=str(names))
    assert len(op._prepared) == 1


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "with gradients"])
def test_parameters_in_another_layout_behind_a_call_like_it(grad):
    x, w, b, wide = (normal(shape, torch.float32, seed=i) for i, shape in enumerate(((6, 32), (32,), (32,), (64,))))
    for parameters in ((w, b), (wide[::2], b), (w, wide[::2]), (w, b)):
        for call in ((ops.layer_norm, x, 32, *parameters), (ops.layer_norm_residual, x, x.flip(0), 32, *parameters)):
            results = zip(called(call, "triton", grad), called(call, "torch", grad), strict=True)
            for got, true in results:
                torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (ValueError, "normalized_shape must be the last dimensions", {"normalized_shape": 16}),
        (ValueError, "normalized_shape must be the last dimensions", {"x": torch.ones(2, 16)}),
        (TypeError, "weight must be a tensor", {"weight": [1.0] * 32}),
        (ValueError, "weight must have the shape", {"weight": torch.ones(16)}),
        (TypeError, "x must be a floating-point tensor", {"x": torch.ones(2, 32).int()}),
        (TypeError, "eps must be a number", {"eps": "1e-5"}),
        (
            TypeError,
            "weight_offset is a number and gets no gradient",
            {"weight_offset": torch.ones((), requires_grad=True)},
        ),
        (ValueError, "backend must be one of", {"backend": "cudnn"}),
    ],
)
def test_what_does_not_fit_is_refused_behind_a_call_like_it_too(error, words, changed):
    good = {"x": torch.ones(2, 32), "normalized_shape": 32, "weight": torch.ones(32), "eps": 1e-5, "backend": "triton"}
    ops.rms_norm(**good)
    with pytest.raises(error, match=words):
        ops.rms_norm(**good | changed)


def test_a_kept_binary_is_asked_for_as_the_launcher_keeps_it(monkeypatch):
    """Keys and addresses that the plan knows are what the launcher makes of the tensors."""
    asked = []
    monkeypatch.setattr(op, "_prepared", {})
    monkeypatch.setattr(_launch.Launch, "again", lambda self, *more: asked.append((self.kernel, *more)))
    monkeypatch.setattr(_launch.Launch, "_normal", lambda *_: None)
    for grad in (False, True):
        for name, call in kinds().items():
            called(call, "triton", grad)
            assert asked[::2] == asked[1::2], name
            assert len(asked) in ((4, 6) if grad else (2,)), name
            asked.clear()


# ---- on the card -------------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("width", [1, 7, 64, 128, 130, 256, 768, 1001, 4096, 8192, 12289, 16385, 33000])
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("layer_norm", torch.float32),
        ("layer_norm", torch.bfloat16),
        ("rms_norm", torch.bfloat16),
        ("layer_norm_residual", torch.bfloat16),
        ("rms_norm_residual", torch.float32),
    ],
    ids=str,
)
def test_on_the_card_the_float64_budget_holds(form, dtype, width):
    # float32: the largest rounding error of a weight gradient of few elements is chance
    new = Numbers(torch.bfloat16 if width < 64 else dtype, "cuda")
    rows = 3001 if width <= 4096 else 301
    for _ in range(2):  # Triton's own path, then the fast launch
        oracle(form, new(rows, width), width, new)


@gpu
@pytest.mark.parametrize("width", [130, 33000])
@pytest.mark.parametrize("form", FORMS)
def test_on_the_card_every_form_holds_it_in_float16(form, width):
    new = Numbers(torch.float16, "cuda")
    oracle(form, new(301, width), width, new)


@gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_the_card_every_layout(layout):
    new = Numbers(torch.bfloat16, "cuda")
    x, n = LAYOUTS[layout](new)
    as_dense("layer_norm", n, inputs_of("layer_norm", new, x, (n,)), [GRADIENTS["padded"](new, x)])
    oracle("rms_norm_residual", x, n, new, GRADIENTS["stride 0"](new, x), GRADIENTS["transposed"](new, x))


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_card_qk_norm_reads_the_packed_projection_in_place(dtype):
    new = Numbers(dtype, "cuda")
    for head in (64, 128, 256):
        for x in new(4, 257, 3, 12, head).unbind(2):
            assert kernels._rows_of(x, head)[0] is x
            oracle("rms_norm", x, head, new)


@gpu
def test_on_the_card_large_means_lose_nothing():
    for width in (1, 2, 3, 7, 31, 33, 64, 96, 127, 128, 129, 130, 768, 4096, 16385, 33000):
        new = Numbers(torch.float32, "cuda")
        oracle("layer_norm", new(500, width) + 1e3, width, new)


@gpu
@pytest.mark.parametrize("form", FORMS)
def test_two_runs_give_the_same_bits(form):
    for rows, width in ((16384, 256), (4099, 1001), (65, 33000)):
        new = Numbers(torch.bfloat16, "cuda")
        inputs = inputs_of(form, new, new(rows, width), (width,))
        gradients = [new(rows, width) for _ in range(1 + ("residual" in form))]
        first = pull(FORMS[form][0]("triton", (width,)), inputs, gradients)
        for _ in range(5):
            same(pull(FORMS[form][0]("triton", (width,)), inputs, gradients), first)


@gpu
@pytest.mark.parametrize("width", [128, 1001, 33000])
@pytest.mark.parametrize("form", MAIN)
def test_a_cuda_graph_replays_forward_and_backward_on_new_data(form, width):
    new = Numbers(torch.bfloat16, "cuda")
    inputs = inputs_of(form, new, new(257, width), (width,))
    gradients = [new(257, width) for _ in range(1 + ("residual" in form))]
    function = FORMS[form][0]("triton", (width,))
    graph, results = captured(lambda: pull(function, inputs, gradients))
    for _ in range(2):
        for t in (*inputs, *gradients):
            t.copy_(new(*t.shape))
        graph.replay()
        same(results, pull(function, inputs, gradients))


@gpu
def test_dropout_draws_another_mask_in_every_replay_and_backward_follows():
    x = torch.ones(64, 1024, device="cuda")
    zeros, w = torch.zeros_like(x), torch.ones(1024, device="cuda")

    def run():
        return pull(
            lambda x, r: ops.rms_norm_residual(x, r, 1024, w, dropout_p=0.5, backend="triton"),
            [x, zeros], [None, torch.ones_like(x)],
        )  # fmt: skip

    graph, (_, h, dx, _) = captured(run)
    masks = []
    for _ in range(3):
        graph.replay()
        same(dx, h)
        masks.append(h.clone())
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


@gpu
@pytest.mark.parametrize("form", ["layer_norm", "rms_norm_residual"])
def test_more_than_2_to_the_31_elements_are_right_at_both_ends_and_around_2_to_the_31(form):
    skip_below(60)
    width, rows = 4096, 2**31 // 4096 + 1
    new = Numbers(torch.bfloat16, "cuda")
    inputs = inputs_of(form, new, new(rows, width), (width,))
    gradients = [new(rows, width) for _ in range(1 + ("residual" in form))]
    parameters = FORMS[form][1]
    leaves = [t.requires_grad_() for t in inputs]
    function = FORMS[form][0]
    out = function("triton", (width,))(*leaves)
    grads = torch.autograd.grad(out, leaves, gradients)
    out = out if isinstance(out, tuple) else (out,)
    for start in (0, rows // 2, rows - 3):
        here = slice(start, start + 3)
        few = [t.detach()[here] if i < len(inputs) - parameters else t.detach() for i, t in enumerate(inputs)]
        dys = [g[here] for g in gradients]
        low = pull(function("torch", (width,)), few, dys)
        true = pull(function("torch", (width,)), [t.double() for t in few], [g.double() for g in dys])
        count = len(out) + len(inputs) - parameters
        got = [t.detach()[here] for t in (*out, *grads[: len(inputs) - parameters])]
        assert_good(got, low[:count], true[:count])
    # dW of all rows: the sum of two halves that fit below 2**31
    halves = []
    for here in (slice(0, rows // 2), slice(rows // 2, rows)):
        few = [t.detach()[here] if i < len(inputs) - parameters else t.detach() for i, t in enumerate(inputs)]
        halves.append(pull(function("triton", (width,)), few, [g[here] for g in gradients])[-parameters:])
    for whole, one, other in zip(grads[-parameters:], *halves, strict=True):
        torch.testing.assert_close(whole.float(), one.float() + other.float(), rtol=2e-2, atol=8.0)


@gpu
def test_a_view_whose_offsets_exceed_2_to_the_31_is_read_right():
    skip_below(24)
    new = Numbers(torch.bfloat16, "cuda")
    rows, pitch = 2**15 + 3, 2**16
    base = torch.empty(rows * pitch, dtype=torch.bfloat16, device="cuda")
    for view in (
        base.view(rows, pitch)[:, 7:71],
        base.view(rows, pitch)[:, 64:128],
        base.as_strided((2, 64), (2**31 + 16, 1)),
    ):
        view.copy_(new(*view.shape))
        oracle("layer_norm", view, 64, new)
        oracle("layer_norm", view, 64, new, view)


@gpu
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("form", COMPILED)
def test_inductor_compiles_it_whole(form, backend):
    x = normal((64, 130), torch.float32, seed=1, device="cuda")
    compiled_matches_eager(form, backend, "inductor", x, (130,))


@gpu
@pytest.mark.parametrize("name", CALLS)
def test_auto_reaches_triton_on_the_card(name):
    x = torch.ones(3, 64, device="cuda", requires_grad=True)
    assert backend_that_ran(CALLS[name](x, "auto")) == "triton"
    arguments = (x, x, 64) if "residual" in name else (x, 64)
    assert trinix.explain(name, *arguments).backend == "triton"
    same(CALLS[name](x, "auto").detach(), CALLS[name](x, "triton").detach())


@gpu
def test_a_call_on_a_side_stream_waits_for_that_stream():
    values = normal((4096, 768), torch.float32, seed=1, device="cuda")
    w = torch.ones(768, device="cuda")
    dy = torch.ones_like(values)
    wanted = pull(FORMS["rms_norm"][0]("triton", (768,)), [values, w], [dy])
    x = torch.zeros_like(values)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.copy_(values)
        got = pull(FORMS["rms_norm"][0]("triton", (768,)), [x, w], [dy])
    side.synchronize()
    same(got, wanted)


@gpu
@pytest.mark.parametrize("form", MAIN)
def test_a_tensor_on_another_card_than_the_current_one_is_served_there(form):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs a second CUDA GPU, this machine has {torch.cuda.device_count()}")
    assert torch.cuda.current_device() == 0
    for card in ("cuda:1", "cuda:0", "cuda:1"):
        new = Numbers(torch.float32, card)
        got = oracle(form, new(1000, 768), 768, new)
        assert {t.device for t in got} == {torch.device(card)}
    assert torch.cuda.current_device() == 0


# ---- on the card, Hopper -----------------------------------------------------------------------------------------------------


def hopper_oracle(form, x, n, new, *gradients, ours="hopper"):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    inputs = inputs_of(form, new, x, (n,))
    gradients = gradients or tuple(new(*x.shape) for _ in range(1 + ("residual" in form)))
    return compare(lambda backend: FORMS[form][0](ours if backend == "triton" else backend, (n,)), inputs, gradients)


@gpu
@pytest.mark.parametrize("shape", [(1, 65_536), (3, 2, 16_384), (47, 20_008), (301, 33_000), (600, 65_536)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", MAIN)
def test_hopper_holds_the_float64_budget(form, dtype, shape):
    new = Numbers(dtype, "cuda")
    hopper_oracle(form, new(*shape), shape[-1], new)


@gpu
@pytest.mark.parametrize("form", [f for f in FORMS if "activation" not in f])
def test_hopper_every_form_of_the_longest_rows(form):
    for dtype, n in ((torch.float16, 131_072), (torch.float32, 60_004)):
        new = Numbers(dtype, "cuda")
        hopper_oracle(form, new(150, n), n, new)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hopper_large_means_lose_nothing(dtype):
    for n in (16_384, 40_000, 65_536):
        new = Numbers(dtype, "cuda")
        hopper_oracle("layer_norm", new(70, n) + 1e3, n, new)
    new = Numbers(torch.float32, "cuda")
    hopper_oracle("layer_norm", new(70, 65_536) + torch.linspace(-500, 1500, 65_536, device="cuda"), 65_536, new)


@gpu
@pytest.mark.parametrize("form", ["layer_norm", "rms_norm_residual"])
def test_hopper_takes_any_strides_and_parameters_of_another_dtype(form):
    n, new = 33_000, Numbers(torch.bfloat16, "cuda")
    for x in (new(9, n), new(9, n + 8)[:, :n], new(9 * n + 1)[1:].view(9, n)):
        for incoming in ("stride 0", "one row for all", "padded", "offset by one element"):
            gradients = [GRADIENTS[incoming](new, x) for _ in range(1 + ("residual" in form))]
            hopper_oracle(form, x, n, new, *gradients)
    x, w = new(9, n), Numbers(torch.float32, "cuda")(n)

    def of_backend(backend):
        return lambda x, w: ops.rms_norm(x, n, w, EPS, backend="hopper" if backend == "triton" else backend)

    compare(of_backend, [x, w], [new(9, n)])


@gpu
def test_hopper_computes_only_what_is_wanted_and_the_same():
    new = Numbers(torch.bfloat16, "cuda")
    inputs, dy = [new(50, 65_536), new(65_536), new(65_536)], new(50, 65_536)
    function = FORMS["layer_norm"][0]("hopper", (65_536,))
    everything = pull(function, inputs, [dy])[1:]
    for wanted in itertools.product((False, True), repeat=3):
        if any(wanted):
            leaves = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
            grads = torch.autograd.grad(function(*leaves), [t for t in leaves if t.requires_grad], dy)
            same(grads, [t for t, w in zip(everything, wanted, strict=True) if w])


@gpu
@pytest.mark.parametrize("form", MAIN)
@pytest.mark.parametrize(("rows", "n"), [(2048, 65_536), (700, 20_008)])
def test_hopper_gives_the_same_bits_every_time_in_a_cuda_graph_and_on_every_stream(form, rows, n):
    new = Numbers(torch.bfloat16, "cuda")
    inputs = inputs_of(form, new, new(rows, n), (n,))
    gradients = [new(rows, n) for _ in range(1 + ("residual" in form))]
    function = FORMS[form][0]("hopper", (n,))
    first = pull(function, inputs, gradients)
    for _ in range(20):
        same(pull(function, inputs, gradients), first)
    graph, results = captured(lambda: pull(function, inputs, gradients))
    for _ in range(3):
        graph.replay()
        same(results, first)
    torch.cuda.synchronize()
    results = []
    for stream in [torch.cuda.Stream() for _ in range(2)]:
        with torch.cuda.stream(stream):
            results.append(pull(function, inputs, gradients))
    torch.cuda.synchronize()
    for got in results:
        same(got, first)


@gpu
@pytest.mark.parametrize("form", MAIN)
def test_auto_reaches_hopper_pass_by_pass_on_the_card(form):
    for rows, n, dtype, forward, backward in (
        (70, 65_536, torch.bfloat16, "hopper", "hopper"),
        (70, 32_768, torch.bfloat16, "triton", "hopper"),
        (70, 16_384, torch.bfloat16, "triton", "triton"),
        (70, 65_537, torch.bfloat16, "triton", "triton"),
    ):
        new = Numbers(dtype, "cuda")
        x = new(rows, n)
        hopper_oracle(form, x, n, new, ours="auto")
        name = form.partition(",")[0]
        told = trinix.explain(name, *((x, x) if "residual" in form else (x,)), n)
        assert told.backend == forward
        assert ("backward on hopper" in told.config) == (backward == "hopper" and forward == "triton")


@gpu
def test_hopper_refuses_by_name_and_reason():
    x = torch.ones(4, 65_536, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(trinix.Unsupported, match="rms_norm_activation: backend 'hopper' takes no activation"):
        ops.rms_norm_activation(x, 65_536, backend="hopper")
    with pytest.raises(trinix.Unsupported, match="'hopper' takes no dropout"):
        ops.rms_norm_residual(x, x, 65_536, dropout_p=0.1, backend="hopper")
    with pytest.raises(trinix.Unsupported, match="'hopper' takes rows of 32768 bytes and more, got 2048"):
        ops.layer_norm(x[:, :1024], 1024, backend="hopper")
    with pytest.raises(trinix.Unsupported, match="'hopper' needs a GPU tensor, got cpu"):
        ops.layer_norm(x.cpu(), 65_536, backend="hopper")


@gpu
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", ["layer_norm", "rms_norm_residual, bare"])
def test_inductor_compiles_hopper_whole(form):
    x = normal((64, 16_384), torch.float32, seed=1, device="cuda")
    compiled_matches_eager(form, "hopper", "inductor", x, (16_384,))
