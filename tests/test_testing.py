"""The judge itself: what is right passes, every kind of wrong is refused, and nothing depends on luck."""

import math
import weakref

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trinix.testing import assert_within_budget, judge, normal, vjp

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "mish": F.mish,
    "relu": torch.relu,
    "softmax": lambda x: torch.softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "sum": lambda x: x.sum(-1),
    "identity": lambda x: x,
}


def three(function, dtype, shape=(16, 65), seed=1, scale=2.0):
    """(PyTorch's result in ``dtype``, the float64 one): y and dx of each."""
    x = normal(shape, dtype, seed=seed, scale=scale)
    dy = normal(function(x).shape, dtype, seed=seed + 1)
    return vjp(function, [x], dy), vjp(function, [x.double()], dy.double())


def spread(dtype=torch.bfloat16, size=4096):
    """(PyTorch's, float64): numbers rounded to ``dtype`` beside the true ones."""
    true = normal((size,), torch.float64, seed=5)
    return true.to(dtype), true


# -- judge accepts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_pytorchs_own_result_is_accepted_with_a_ratio_of_at_most_one(function, dtype):
    low, true = three(FUNCTIONS[function], dtype)
    for name, p, t in zip(("y", "dx"), low, true, strict=True):
        verdict = judge(name, p, p, t)
        assert verdict.ok
        assert verdict.ratio <= 1.0
    assert_within_budget(low, low, true)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_true_value_rounded_once_is_accepted(function, dtype):
    low, true = three(FUNCTIONS[function], dtype)
    assert_within_budget([t.to(dtype) for t in true], low, true)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 1 << 30),
    size=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
)
def test_one_rounding_passes_and_a_thousand_never_do_whatever_the_numbers(seed, size, dtype, scale):
    true = normal((size,), torch.float64, seed=seed, scale=scale)
    low = true.to(dtype)
    hypothesis.assume(bool(low.isfinite().all()) and float(true.abs().max()) > torch.finfo(dtype).smallest_normal)
    assert judge("y", low, low, true).ok
    far = true.clone()
    far[true.abs().argmax()] *= 1 + 1000 * torch.finfo(dtype).eps
    assert not judge("y", far.to(dtype), low, true).ok


def test_float64_itself_has_a_budget_of_one_rounding():
    true = normal((100,), torch.float64, seed=1)
    assert judge("y", true, true, true).ok
    assert not judge("y", true * (1 + 1e-15), true, true).ok


@pytest.mark.parametrize(("low", "true"), [((1,), torch.float64), ((4,), torch.float32)])
def test_an_oracle_of_another_shape_or_dtype_is_refused(low, true):
    with pytest.raises(ValueError, match=r"low and true must have one shape and true be float64, got \["):
        judge("y", torch.ones(4), torch.ones(low), torch.ones(4, dtype=true))


@pytest.mark.parametrize("shape", [(0,), (3, 0, 5)])
def test_an_empty_tensor_is_accepted(shape):
    empty = torch.empty(shape, dtype=torch.bfloat16)
    verdict = judge("y", empty, empty, empty.double())
    assert (verdict.ok, verdict.error, verdict.ratio) == (True, 0.0, 0.0)


def test_zeros_are_accepted_and_noise_beside_them_is_not():
    zero = torch.zeros(64, dtype=torch.bfloat16)
    assert judge("y", zero, zero, zero.double()).ok
    assert not judge("y", zero + 1e-30, zero, zero.double()).ok


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_infinities_and_nans_are_accepted(dtype):
    true = torch.tensor([1.0, math.inf, -math.inf, math.nan, 2.0], dtype=torch.float64)
    low = true.to(dtype)
    assert judge("y", low, low, true).ok
    only = torch.full((3,), math.nan, dtype=torch.float64)
    assert judge("y", only.to(dtype), only.to(dtype), only).ok


def test_where_pytorch_overflows_its_infinity_or_the_rounded_truth_is_accepted():
    true = torch.tensor([1.0, 60000.0], dtype=torch.float64)
    low = torch.tensor([1.0, math.inf], dtype=torch.float16)  # an intermediate square overflowed, say
    assert judge("y", low, low, true).ok
    assert judge("y", true.half(), low, true).ok
    assert not judge("y", torch.tensor([1.0, -math.inf], dtype=torch.float16), low, true).ok


def test_what_overflows_the_dtype_has_to_be_infinite():
    true = torch.tensor([1.0, 1e6], dtype=torch.float64)
    low = true.half()
    assert low[1].isinf()
    assert judge("y", low, low, true).ok
    assert not judge("y", torch.tensor([1.0, 65504.0], dtype=torch.float16), low, true).ok


# -- judge refuses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 1000, 4095])
def test_a_single_wrong_element_among_thousands_is_refused(dtype, at):
    low, true = spread(dtype)
    got = low.clone()
    got[at] += 0.5
    verdict = judge("y", got, low, true)
    assert not verdict.ok
    assert verdict.detail == "largest"
    assert verdict.error == pytest.approx(0.5, rel=0.05)
    assert verdict.ratio > 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_of_three_roundings_everywhere_is_refused_by_the_root_mean_square(dtype):
    low, true = spread(dtype)
    rounding = torch.finfo(dtype).eps / 2
    unit = true.square().mean().sqrt()
    biased = (true + 3 * rounding * unit).to(dtype)
    verdict = judge("y", biased, low, true)
    assert not verdict.ok
    assert verdict.detail == "rms"
    assert "OVER BUDGET" in str(verdict)
    assert judge("y", (true + 0.25 * rounding * unit).to(dtype), low, true).ok


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_or_infinity_where_the_truth_is_finite_is_refused(dtype, value):
    low, true = spread(dtype)
    got = low.clone()
    got[7] = value
    assert not judge("y", got, low, true).ok
    assert not judge("y", torch.full_like(low, value), low, true).ok


@pytest.mark.parametrize(
    ("there", "got"),
    [(math.nan, 1.0), (math.inf, 1.0), (math.inf, -math.inf), (math.nan, math.inf), (math.inf, math.nan)],
)
def test_anything_else_where_the_truth_is_nan_or_infinite_is_refused_and_counted(there, got):
    true = torch.tensor([1.0, there, there], dtype=torch.float64)
    low = true.bfloat16()
    wrong = low.clone()
    wrong[1:] = got
    verdict = judge("y", wrong, low, true)
    assert not verdict.ok
    assert "2 wrong NaN or infinity" in str(verdict)


def test_another_shape_or_dtype_is_refused_and_named():
    low, true = spread()
    for got, said in ((low.view(64, 64), "shape [64, 64]"), (low[:-1], "shape [4095]"), (low.float(), "torch.float32")):
        verdict = judge("y", got, low, true)
        assert not verdict.ok
        assert said in str(verdict)
        assert "wanted [4096] torch.bfloat16" in str(verdict)


@pytest.mark.parametrize("wrong", ["zeros", "negated", "shuffled", "half"])
def test_wholly_wrong_results_are_refused(wrong):
    low, true = spread()
    got = {"zeros": low * 0, "negated": -low, "shuffled": low.roll(1), "half": low / 2}[wrong]
    assert not judge("y", got, low, true).ok


def test_the_budget_follows_pytorchs_own_error():
    _, true = spread(torch.float32)
    exact = true.float()
    rough = (true * (1 + 1e-4)).float()
    middle = (true * (1 + 1.5e-4)).float()
    assert judge("y", middle, rough, true).ok
    assert not judge("y", middle, exact, true).ok


def test_assert_within_budget_names_every_bad_tensor_and_no_good_one():
    low, true = three(F.silu, torch.bfloat16)
    with pytest.raises(AssertionError, match=r"^d0: error .*OVER BUDGET"):
        assert_within_budget([low[0], low[1] * 1.1], low, true)
    with pytest.raises(AssertionError, match=r"y: .*; d0: "):
        assert_within_budget([low[0] * 1.1, low[1] * 1.1], low, true)
    with pytest.raises(ValueError, match="zip"):
        assert_within_budget(low, low[:1], true)


# -- vjp


def test_vjp_gives_the_output_and_the_gradient_of_every_floating_input():
    x, w = normal((3, 4), torch.float64, seed=1), normal((4,), torch.float64, seed=2)
    rows, dy = torch.tensor([2, 0]), normal((2, 4), torch.float64, seed=3)
    y, dx, dw = vjp(lambda x, rows, w: (x * w)[rows], [x, rows, w], dy)
    assert torch.equal(y, (x * w)[rows])
    assert not y.requires_grad
    wanted = torch.zeros_like(x)
    wanted[rows] = dy * w
    assert torch.allclose(dx, wanted)
    assert torch.allclose(dw, (dy * x[rows]).sum(0))


def test_vjp_leaves_its_inputs_as_they_were():
    x, dy = torch.ones(3, requires_grad=True), torch.ones(3)
    vjp(torch.exp, [x], dy)
    plain = torch.ones(3)
    vjp(torch.exp, [plain], dy)
    assert x.grad is None
    assert plain.grad is None
    assert not plain.requires_grad


def test_vjp_takes_a_function_that_returns_its_input():
    x, dy = normal((5,), torch.float32, seed=1), normal((5,), torch.float32, seed=2)
    y, dx = vjp(lambda x: x, [x], dy)
    assert torch.equal(y, x)
    assert torch.equal(dx, dy)


@pytest.mark.parametrize("function", [lambda x: x.detach() * 2, torch.zeros_like, torch.Tensor.detach])
@pytest.mark.parametrize("shape", [(4,), (3, 2)])
def test_vjp_says_that_an_output_carries_no_gradient(function, shape):
    with pytest.raises(AssertionError, match="the function's output carries no gradient"):
        vjp(function, [torch.ones(shape)], torch.ones(shape))


# -- normal


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_normal_is_the_same_for_a_seed_and_another_for_another(dtype):
    a = normal((33, 7), dtype, seed=3)
    assert (a.shape, a.dtype) == ((33, 7), dtype)
    torch.manual_seed(0)
    assert torch.equal(a, normal((33, 7), dtype, seed=3))
    assert not torch.equal(a, normal((33, 7), dtype, seed=4))


def test_normal_leaves_the_global_generator_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    normal((10,), torch.float32, seed=3)
    normal((10,), torch.bfloat16, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_normal_is_normal_and_scaled(dtype):
    one, three = (normal((40000,), dtype, seed=9, scale=s).double() for s in (1.0, 3.0))
    assert float(one.mean()) == pytest.approx(0, abs=0.02)
    assert float(one.std()) == pytest.approx(1, abs=0.02)
    assert float(three.std()) == pytest.approx(3, abs=0.06)
    assert float((one.abs() < 1).double().mean()) == pytest.approx(0.683, abs=0.02)


def test_normal_takes_any_sequence_as_a_shape():
    assert normal([2, 3], torch.float32, seed=1).shape == (2, 3)
    assert normal(torch.Size(()), torch.bfloat16, seed=1).shape == ()
    assert normal((0, 4), torch.float16, seed=1).shape == (0, 4)


class _Peak(TorchDispatchMode):
    """The most tensors of float64 that lived at once among those made within."""

    def __init__(self):
        super().__init__()
        self.made, self.most = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64 and out.numel() > 1:
            self.made.append(weakref.ref(out))
        alive = {t.data_ptr() for t in (ref() for ref in self.made) if t is not None}
        self.most = max(self.most, len(alive))
        return out


def test_the_judge_of_a_large_gradient_holds_one_tensor_of_float64_beside_it():
    """A weight of LLaMA-3-405B's has 1.7e9 elements: 13 GiB each, where inputs and gradients take 34 of 79 already."""
    true = normal((999,), torch.float64, seed=1)
    low = true.bfloat16()
    with _Peak() as peak:
        assert judge("dw", low.clone(), low, true).ok
    assert peak.most == 1
