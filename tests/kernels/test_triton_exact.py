"""exp, log and tanh of float32 to a unit in the last place."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from trinix.kernels.triton._exact import exact_exp, exact_log, exact_tanh  # noqa: E402
from trinix.kernels.triton._launch import INTERPRETED  # noqa: E402


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("kernels run on the CPU in the interpreter only (TRITON_INTERPRET=1)")
    return request.param


@triton.jit
def _functions_of(x, exponential, logarithm, tanh):
    i = tl.arange(0, 1024)
    tl.store(exponential + i, exact_exp(tl.load(x + i)))
    tl.store(logarithm + i, exact_log(-tl.load(x + i)))
    tl.store(tanh + i, exact_tanh(tl.load(x + i)))


@pytest.mark.parametrize("least", [-80.0, -1.2])
def test_functions_of_float32_are_exact(least, device):
    """tl.exp is not, on the card: at -80 by ten units in the last place; nor is tl.log near 1."""
    x = torch.linspace(least, -1e-3, 1024, device=device)
    x[:3] = torch.tensor([float("-inf"), -300.0, float("nan")])
    exponential, logarithm, tanh = (torch.empty_like(x) for _ in range(3))
    _functions_of[(1,)](x, exponential, logarithm, tanh)
    assert exponential[:2].tolist() == [0, 0]
    assert all(t[2].isnan() for t in (exponential, logarithm, tanh))
    wide = x.double()[3:]
    for got, true, rtol in (
        (exponential, wide.exp(), 1.2e-7),
        (logarithm, (-wide).log(), 1.5e-7),
        (tanh, wide.tanh(), 2.4e-7),
    ):
        torch.testing.assert_close(got[3:].double(), true, rtol=rtol, atol=1e-37)
