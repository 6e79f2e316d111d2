"""Inputs, the float64 oracle, and error budgets: shared by the tests, the lab's gate and tutorials.

The budget of a tensor is derived, never set by hand: its error against float64 may be twice the error that PyTorch makes in
the same dtype, plus one rounding to that dtype. It holds for the largest error (one wrong element) and for the
root mean square (a bias everywhere).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def normal(shape: Sequence[int], dtype: torch.dtype, *, seed: int, device: str = "cpu", scale: float = 1.0) -> Tensor:
    """``scale`` times standard normal numbers, the same for a seed on every call (not across devices)."""
    generator = torch.Generator(device).manual_seed(seed)
    # drawn in float32 whatever the dtype, in one allocation of the final size where that is possible
    if dtype in (torch.float16, torch.bfloat16):
        return torch.empty(tuple(shape), dtype=dtype, device=device).normal_(0.0, scale, generator=generator)
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype) * scale


def vjp(function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """(y, gradient of every floating input) for y = function(*inputs) with incoming gradient ``dy``."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    y = function(*leaves)
    if y.grad_fn is None and all(y is not leaf for leaf in leaves):
        raise AssertionError("the function's output carries no gradient")
    grads = torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy)
    return (y.detach(), *grads)


@dataclass(frozen=True)
class Verdict:
    """How one tensor compares with its budget."""

    name: str
    error: float
    budget: float
    ratio: float  # our error over PyTorch's in the same dtype (with half a rounding as its least)
    ok: bool
    detail: str = ""

    def __str__(self) -> str:
        state = "ok" if self.ok else "OVER BUDGET"
        return f"{self.name}: error {self.error:.3g}, budget {self.budget:.3g} ({state}) {self.detail}".rstrip()


def judge(name: str, got: Tensor, low: Tensor, true: Tensor) -> Verdict:
    """Compare ``got`` with the float64 ``true``; ``low`` is PyTorch's result in the dtype of ``got``.

    Where ``true`` rounded to the dtype is NaN or infinite, ``got`` has to be the same NaN or infinity, or what PyTorch
    gives there.
    """
    if low.shape != true.shape or true.dtype != torch.float64:  # they would broadcast, or be no oracle, without a word
        raise ValueError(
            f"judge: low and true must have one shape and true be float64, got {list(low.shape)} and {list(true.shape)} "
            f"{true.dtype}; make true by the same call on float64 inputs"
        )
    if got.shape != true.shape or got.dtype != low.dtype:
        detail = f"shape {list(got.shape)} {got.dtype}, wanted {list(true.shape)} {low.dtype}"
        return Verdict(name, float("inf"), 0.0, float("inf"), False, detail)
    rounded = true.to(got.dtype)
    finite = rounded.isfinite() & low.isfinite()
    same = ((got == rounded) | (got.isnan() & rounded.isnan()) | (got == low) | (got.isnan() & low.isnan())) | finite
    if not bool(same.all()):
        return Verdict(name, float("inf"), 0.0, float("inf"), False, f"{int((~same).sum())} wrong NaN or infinity")
    if not got.numel() or not bool(finite.any()):
        return Verdict(name, 0.0, 0.0, 0.0, True)
    del rounded, same  # of a weight with 1.7e9 elements every tensor counts: one in float64 at a time
    ours, theirs, sizes = _measured(got - true, finite), _measured(low - true, finite), _measured(true.clone(), finite)
    rounding = torch.finfo(got.dtype).eps / 2
    worst = Verdict(name, 0.0, 0.0, 0.0, True)
    for detail, error, base, size in zip(("largest", "rms"), ours, theirs, sizes, strict=True):
        one_rounding = rounding * size + torch.finfo(got.dtype).smallest_normal * 2 * rounding
        budget = 2 * base + one_rounding
        ratio = error / max(base, one_rounding / 2)
        ok = error <= budget
        if not ok or ratio >= worst.ratio:
            worst = Verdict(name, error, budget, ratio, ok and worst.ok, detail)
        if not ok:
            break
    return worst


def _measured(t: Tensor, finite: Tensor) -> tuple[float, float]:
    """(the largest, the root mean square) of what is finite in ``t``, which is overwritten."""
    t.masked_fill_(~finite, 0.0).abs_()
    return float(t.max()), float(t.square_().mean().sqrt())


def assert_within_budget(got: Sequence[Tensor], low: Sequence[Tensor], true: Sequence[Tensor]) -> None:
    """Judge y and every gradient, in the order that ``vjp`` gives them; raises AssertionError naming the worst."""
    names = ["y", *(f"d{i}" for i in range(len(got) - 1))]
    verdicts = [judge(n, g, p, t) for n, g, p, t in zip(names, got, low, true, strict=True)]
    bad = [str(v) for v in verdicts if not v.ok]
    if bad:
        raise AssertionError("; ".join(bad))
