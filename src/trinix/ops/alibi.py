"""ALiBi, attention with linear biases (arXiv:2108.12409): the heads' slopes, and the bias they make.

``alibi_slopes(H)``: for H a power of two the slope of head h = 1 .. H is 2^(-8 h / H). Otherwise, with C the largest power of
two below H: the C slopes of C heads, then the first H - C of every second slope of 2 C heads.

``alibi_bias``::

    bias[h, i, j] = -slopes[h] |i + Sk - Sq - j|         -inf instead where causal and j > i + Sk - Sq

Aligned at the bottom right: the last query stands at the last key, so that the queries of cached decoding meet the same
numbers as in one long pass. Slopes [H] (any strides), bias [H, Sq, Sk], contiguous; a batch is ``bias.expand(B, ...)``, no copy.
Attention kernels that take slopes need no bias at all: this one is for those that take a mask.

dtype: float16, bfloat16, float32 (float64 through the PyTorch formula); arithmetic is float32. Slopes that require a gradient
get it, the sum over the incoming gradient times the distances (of pairs that are not masked), in PyTorch: backward saves
nothing, makes the distances again, float32 [Sq, Sk], and reads the gradient a head at a time. Second derivatives likewise.
Under ``torch.compile`` "auto" hands the compiler the plain formula.
"""

import functools
import inspect
import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trinix import dispatch
from trinix.dispatch import Explanation
from trinix.kernels.torch import alibi as reference

_triton_module = None  # kept by hand: torch.compile traces through functools.cache, and says so


def _triton():
    global _triton_module
    if _triton_module is None:
        from trinix.kernels.triton import alibi

        _triton_module = alibi
    return _triton_module


def _torch():
    return reference


BACKENDS = {"triton": _triton, "torch": _torch}


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """The slopes of ``num_heads`` heads, float32 ``[H]``; see the top of this file.

    Raises:
        ValueError: ``num_heads`` is no int from 1 on.

    >>> trinix.ops.alibi_slopes(3).tolist()
    [0.0625, 0.00390625, 0.25]
    """
    if type(num_heads) is not int or num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads must be an int from 1 on, got {num_heads!r}")
    whole = 1 << (num_heads.bit_length() - 1)
    exponents = [8.0 * h / whole for h in range(1, whole + 1)]
    exponents += [4.0 * h / whole for h in range(1, 2 * (num_heads - whole), 2)]
    return torch.tensor([math.exp2(-e) for e in exponents], dtype=torch.float32, device=device)


def alibi_bias(
    slopes: Tensor,
    seq_q: int,
    seq_k: int | None = None,
    *,
    causal: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Tensor:
    """The bias of every head, query and key; differentiable in ``slopes``.

    Args:
        slopes: ``[H]``, floating point.
        seq_q, seq_k: Sq, and Sk (Sq if None); the last query stands at the last key.
        causal: -inf for keys after the query.
        dtype: of the result.
        device: where to; the slopes' own if None.
        backend: "auto", "triton" or "torch". A named backend never falls back.

    Returns:
        ``[H, Sq, Sk]``, contiguous.

    Raises:
        TypeError, ValueError: arguments that do not fit; the message says which and what to do.
        Unsupported: the named backend cannot run this call.

    >>> trinix.ops.alibi_bias(torch.tensor([0.5]), 2, 3, causal=True).tolist()
    [[[-0.5, 0.0, -inf], [-1.0, -0.5, 0.0]]]
    """
    seq_k = _check(slopes, seq_q, seq_k, causal, dtype)
    if device is not None:
        slopes = slopes.to(device)
    call = seq_q, seq_k, causal, dtype
    grad = slopes.requires_grad and torch.is_grad_enabled()
    compiling = torch.compiler.is_compiling()
    if backend != "auto" or dispatch.forced is not None:
        module = dispatch.load_named("alibi_bias", BACKENDS, dispatch.resolve(backend), slopes, dtype)
        if module is reference:
            return reference.forward(slopes, *call)
        if compiling or not dispatch.plain(slopes):
            # in forward-mode differentiation the Function refuses, where the bare operator would lose the tangent
            grad = grad or (not compiling and forward_ad._current_level >= 0)
            return _AlibiBias.apply(slopes, _bias_op, *call) if grad else _bias_op(slopes, *call)
        return _AlibiBias.apply(slopes, module.forward, *call) if grad else module.forward(slopes, *call)
    if compiling or not slopes.is_cuda or not dispatch.plain(slopes) or _against_triton(slopes, dtype):
        return reference.forward(slopes, *call)
    return _AlibiBias.apply(slopes, _triton().forward, *call) if grad else _triton().forward(slopes, *call)


def _check(slopes, seq_q, seq_k, causal, dtype) -> int:
    """Sk."""
    dispatch.flags("alibi_bias", causal=causal)
    if not isinstance(slopes, Tensor) or not slopes.is_floating_point():
        got = str(slopes.dtype) if isinstance(slopes, Tensor) else type(slopes).__name__
        raise TypeError(
            f"alibi_bias: slopes must be a floating-point tensor, got {got}; alibi_slopes(num_heads) makes them"
        )
    if slopes.ndim != 1:
        raise ValueError(f"alibi_bias: slopes must be [H], got {list(slopes.shape)}; flatten them")
    seq_k = seq_q if seq_k is None else seq_k
    for name, n in (("seq_q", seq_q), ("seq_k", seq_k)):
        if not isinstance(n, (int, torch.SymInt)) or n < 0:
            raise ValueError(f"alibi_bias: {name} must be an int from 0 on, got {n!r}; pass a length, not a tensor")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"alibi_bias: dtype must be a floating-point dtype, got {dtype!r}")
    return seq_k


def triton_can_run(slopes: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``backend="triton"`` takes these."""
    return _against_triton(slopes, dtype) is None


def _against_triton(slopes, dtype) -> str | None:
    return _triton_missing() or _triton().unsupported(slopes, dtype)


@functools.cache
def _triton_missing() -> str | None:
    return dispatch.missing(_triton)


def _pull_back(dy: Tensor, causal: bool) -> Tensor:
    """The slopes' gradient: the bias is their product with the negative distances."""
    heads, seq_q, seq_k = dy.shape
    unit = torch.ones(1, dtype=torch.promote_types(dy.dtype, torch.float32), device=dy.device)
    distance = reference.forward(unit, seq_q, seq_k, False, unit.dtype)[0]
    if causal:
        distance = distance.tril(seq_k - seq_q)
    if not heads:
        return dy.new_zeros(0, dtype=unit.dtype)
    return torch.stack([(one * distance).sum() for one in dy.unbind()])


class _AlibiBias(torch.autograd.Function):
    """The Triton kernel, launched or as an operator, under autograd."""

    @staticmethod
    def forward(ctx, slopes, run, seq_q, seq_k, causal, dtype):
        ctx.call = causal, slopes.dtype
        return run(slopes, seq_q, seq_k, causal, dtype)

    @staticmethod
    def backward(ctx, dy):
        causal, dtype = ctx.call
        return _pull_back(dy, causal).to(dtype), None, None, None, None, None


# The same kernel as a registered operator, for calls that a raw launch must not see: torch.compile, fake tensors, dispatch
# modes, subclasses.
_bias_op = dispatch.register(
    "alibi_bias(Tensor slopes, SymInt seq_q, SymInt seq_k, bool causal, ScalarType dtype) -> Tensor",
    lambda *call: _triton().forward(*call),
    lambda slopes, seq_q, seq_k, causal, dtype: slopes.new_empty((slopes.shape[0], seq_q, seq_k), dtype=dtype),
)


def explain(op, *args, **kwargs) -> Explanation:
    """Which backend ``op(*args, **kwargs)`` would run on, why, and with which configuration; runs nothing."""
    call = inspect.signature(op).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    slopes, dtype = given["slopes"], given["dtype"]
    seq_k = _check(slopes, given["seq_q"], given["seq_k"], given["causal"], dtype)
    if given["device"] is not None:
        slopes = slopes.to(given["device"])
    backend = dispatch.resolve(given["backend"])
    if backend == "torch":
        return Explanation("alibi_bias", "torch", "named by the caller")
    if backend != "auto":
        module = dispatch.load_named("alibi_bias", BACKENDS, backend, slopes, dtype)
        config = module.describe(slopes, given["seq_q"], seq_k, dtype)
        return Explanation("alibi_bias", backend, "named by the caller", config)
    against = None if slopes.is_cuda else f"needs slopes on a GPU, got {slopes.device.type}"
    against = against or _against_triton(slopes, dtype)
    if not against and not dispatch.plain(slopes):
        against = "a raw launch does not see through a tensor subclass or an active mode"
    if against:
        why = "the first backend that is right and fastest here"
        return Explanation("alibi_bias", "torch", why, rejected={"triton": against})
    config = _triton().describe(slopes, given["seq_q"], seq_k, dtype)
    return Explanation("alibi_bias", "triton", "PyTorch has no kernel for it, only a chain of them", config)
