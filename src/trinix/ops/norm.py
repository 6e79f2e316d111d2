"""LayerNorm and RMSNorm over the last dimensions; plain, with a fused residual addition, with an activation behind.

With x [..., *normalized_shape], N the product of normalized_shape, sums over the N elements of a row::

    layer_norm(x)  = (x - mean) / sqrt(var + eps) * weight + bias          var = sum (x - mean)^2 / N    arXiv:1607.06450
    rms_norm(x)    = x / sqrt(sum x^2 / N + eps) * (weight + weight_offset)                              arXiv:1910.07467
    *_residual     : h = dropout(x) + residual,  y = norm(h);  both are returned, both take a gradient
    rms_norm_activation(x) = act(rms_norm(x))

y has x's dtype, whatever the dtypes of weight and bias and with or without ``torch.autocast``, and is dense. (Under autocast x and
residual may differ in dtype: h and y have the wider one, as their sum would.) Statistics and arithmetic are float32 inside the kernels
(float64 for float64), the variance is taken about the mean: large means lose nothing. h is rounded to x's dtype before it is
normalised, as the separate operations would.

Backward saves x (the residual form: h), weight, bias, and the statistics, 4 or 8 bytes a row. dx, dweight and dbias come
from one pass over x and dy; weight gradients are float32 partial sums added in a fixed order: the same bits on every run.
A second derivative (``create_graph=True``) goes through the PyTorch formula. Dropout draws its mask again in backward from a seed.

x and dy may be strided: rows have to be dense, and the dimensions before them may merge into two at most (views of a packed qkv
do); anything else is copied first. "hopper" copies what is not contiguous or does not start at a multiple of 16 bytes. "auto" asks
for each pass anew which kernels run it: both save and read the same. Under ``torch.compile`` "auto" hands the compiler the plain formula.
"""

import functools
import inspect
import operator
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trinix import dispatch
from trinix.dispatch import Explanation
from trinix.kernels import _native
from trinix.kernels.torch import norm as reference
from trinix.ops.activation import KINDS

_hopper_module = _triton_module = None


def _hopper():
    global _hopper_module
    if _hopper_module is None:
        from trinix.kernels.hopper import norm_rows

        _hopper_module = norm_rows
    return _hopper_module


def _triton():
    global _triton_module
    if _triton_module is None:
        from trinix.kernels.triton import norm

        _triton_module = norm
    return _triton_module


def _torch():
    return reference


BACKENDS = {"hopper": _hopper, "triton": _triton, "torch": _torch}

# "auto" asks for clusters from these columns on
_CLUSTERS_FROM = 1 << 14
FUSED_KINDS = tuple(kind for kind in KINDS if kind not in ("leaky_relu", "softplus"))  # of rms_norm_activation


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm over the last dimensions; arguments as ``torch.nn.functional.layer_norm``.

    Args:
        x: ``[..., *normalized_shape]``, floating point.
        normalized_shape: the last dimensions of x, or the last one as an int.
        weight, bias: ``[*normalized_shape]`` or None, of any floating dtype.
        eps: added to the variance.
        backend: "auto", "hopper", "triton" or "torch". A named backend never falls back.

    Returns:
        ``[..., *normalized_shape]`` in ``x.dtype``.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes do not fit, or ``backend`` is unknown.
        Unsupported: the named backend cannot run this call.

    >>> y = trinix.ops.layer_norm(torch.tensor([[1.0, 3.0]]), 2)
    >>> y.round().tolist()
    [[-1.0, 1.0]]
    """
    return _norm("layer_norm", x, normalized_shape, weight, bias, eps, 0.0, True, "", backend)


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """RMSNorm over the last dimensions; arguments as ``torch.nn.functional.rms_norm``.

    Args:
        weight_offset: added to weight; 1 for Gemma, whose weights are stored as differences from 1.
        eps: added to the mean square; None is float32's epsilon (float64's for float64).

    Other arguments, results and errors are ``layer_norm``'s.

    >>> trinix.ops.rms_norm(torch.tensor([[3.0, 4.0]]), 2, torch.ones(2)).square().mean().round().item()
    1.0
    """
    eps = _default_eps(x) if eps is None else eps
    return _norm("rms_norm", x, normalized_shape, weight, None, eps, weight_offset, False, "", backend)


def rms_norm_activation(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    kind: str = "silu",
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """``activation(rms_norm(x), kind)`` in one kernel; ``kind`` as in ``trinix.ops.activation``, with its default parameters.

    Other arguments, results and errors are ``rms_norm``'s. leaky_relu and softplus, which have parameters, are refused.
    """
    _check_kind(kind)
    eps = _default_eps(x) if eps is None else eps
    kind = "" if kind == "none" else kind
    return _norm("rms_norm_activation", x, normalized_shape, weight, None, eps, weight_offset, False, kind, backend)


def layer_norm_residual(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(y, h): h = dropout(x) + residual, y = layer_norm(h).

    Args:
        residual: of x's shape and dtype; under autocast of any floating dtype.
        dropout_p: probability that an element of x is dropped; the others are divided by 1 - dropout_p. Pass 0 in evaluation.

    Other arguments and errors are ``layer_norm``'s.
    """
    name = "layer_norm_residual"
    return _norm_residual(name, x, residual, normalized_shape, weight, bias, eps, 0.0, True, dropout_p, backend)


def rms_norm_residual(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(y, h): h = dropout(x) + residual, y = rms_norm(h); arguments as in ``rms_norm`` and ``layer_norm_residual``.

    >>> x = torch.zeros(1, 2, requires_grad=True)
    >>> y, h = trinix.ops.rms_norm_residual(x, torch.tensor([[3.0, 4.0]]), 2)
    >>> h.tolist()
    [[3.0, 4.0]]
    """
    eps = _default_eps(x) if eps is None else eps
    name = "rms_norm_residual"
    return _norm_residual(
        name, x, residual, normalized_shape, weight, None, eps, weight_offset, False, dropout_p, backend
    )


def _check_kind(kind) -> None:
    if kind not in FUSED_KINDS:
        raise ValueError(f"rms_norm_activation: kind must be one of {list(FUSED_KINDS)}, got {kind!r}")


def _default_eps(x) -> float:
    return 2.0**-52 if isinstance(x, Tensor) and x.dtype == torch.float64 else 2.0**-23


def _checked_shape(op: str, x, normalized_shape, weight, bias) -> tuple[int, ...]:
    """normalized_shape as a tuple, after the checks. On the path of every eager call: cheap tests, few calls."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: x must be a floating-point tensor, got {got}; convert it with x.float()")
    if isinstance(normalized_shape, int):
        shape = (normalized_shape,)
    elif isinstance(normalized_shape, (tuple, list, Sequence)):  # a tuple is found without asking the abstract class
        shape = tuple(normalized_shape)
        for n in shape:
            if type(n) is not int:
                shape = _whole(op, shape)
                break
    else:
        got = type(normalized_shape).__name__
        raise TypeError(f"{op}: normalized_shape must be an int or a tuple of ints, got {got}; it stands before weight")
    if not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"{op}: normalized_shape must be the last dimensions of x, whose shape is {list(x.shape)}, got {list(shape)}; "
            "for the last one alone pass x.shape[-1]"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor or None, got {type(t).__name__}")
        if t.shape != shape:
            raise ValueError(f"{op}: {name} must have the shape {list(shape)}, got {list(t.shape)}; reshape it")
        if not t.is_floating_point():
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {t.dtype}; convert it with .float()")
        if t.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on x's device {x.device}, got {t.device}; move it with {name}.to(x.device)"
            )
    return shape


def _whole(op: str, shape: tuple) -> tuple[int, ...]:
    """NumPy's integers as ints. A tensor is refused: a call like one before would not see its value change."""
    if not any(isinstance(n, Tensor) for n in shape):
        try:
            return tuple([n if isinstance(n, torch.SymInt) else operator.index(n) for n in shape])
        except TypeError:
            pass
    raise TypeError(f"{op}: normalized_shape must be an int or a tuple of ints, got {shape!r}; convert them with int()")


def _numbers(op: str, eps, offset) -> tuple[float, float]:
    if type(eps) is float and type(offset) is float:
        return eps, offset
    return dispatch.number(op, "eps", eps), dispatch.number(op, "weight_offset", offset)


def _auto_runs_triton(x: Tensor, *others: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or not x.is_cuda:
        return False
    tensors = [t for t in others if t is not None]
    return dispatch.plain(x, *tensors) and _triton_missing() is None and _triton().unsupported(x, *tensors) is None


def triton_can_run(x: Tensor, *others: Tensor | None) -> bool:
    """Whether ``backend="triton"`` takes these tensors."""
    return _triton_missing() is None and _triton().unsupported(x, *others) is None


def _forward_mode() -> bool:
    """Whether a Function, which refuses, has to stand before an operator, which would lose the tangent."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


@functools.cache
def _triton_missing() -> str | None:
    return dispatch.missing(_triton)


@functools.cache
def _hopper_missing() -> str | None:
    return dispatch.missing(_hopper)


def _load(op: str, backend: str, tensors, n: int, kind: str | None, p: float):
    call = (tuple(tensors), n, kind, p) if backend == "hopper" else [t for t in tensors if t is not None]
    return dispatch.load_named(op, BACKENDS, backend, *call)


def _module(backend: str, tensors, n: int, kind: str | None, p: float, backward: bool):
    """The kernels of a pass. ``tensors``: what the pass reads, None where there is none."""
    if backend != "auto":
        return BACKENDS[backend]()
    clusters = n >= _CLUSTERS_FROM and _hopper_missing() is None and _hopper().wins(tensors, n, kind, p, backward)
    return _hopper() if clusters else _triton()


class _Call(NamedTuple):
    """What the calls of one kind share."""

    shape: tuple[int, ...]
    n: int
    eps: float
    offset: float
    norm: tuple
    backend: str
    forward: tuple | None  # the portable kernels' plan, where nothing has to be copied
    backwards: dict  # what backward's tensors look like -> the same
    p: float = 0.0
    numbers: tuple = ()  # what it names besides tensors


_plans = _native.Plans()
_HASHED = frozenset((int, tuple, torch.Size))
_prepared = {}  # kind of a call -> what all of them share; emptied when it has grown


def _kind(x, residual, normalized_shape, weight, bias, eps, offset, center, kind, p, backend) -> tuple | None:
    """All that checks, choice of backend and plans look at; None for a call that needs a look of its own. The last entry: whether
    autograd records."""
    tensors = [t for t in (x, residual, weight, bias) if t is not None]
    # numbers by type: a tensor would be found again by its identity, whatever its value has become
    if (
        x is None
        or not dispatch.plain(*tensors)
        or type(normalized_shape) not in _HASHED
        or type(eps) is not float or type(offset) is not float or type(p) is not float or type(backend) is not str
    ):  # fmt: skip
        return None
    grad, recording = False, torch.is_grad_enabled()
    for t in tensors:
        if t.layout is not torch.strided or t.is_nested:
            return None
        grad |= recording and t.requires_grad
    return (
        x.shape, x.stride(), x.dtype, x.device,
        None if residual is None else (residual.shape, residual.stride(), residual.dtype, residual.device),
        None if weight is None else (weight.shape, weight.stride(), weight.dtype, weight.device),
        None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.device),
        normalized_shape, eps, offset, center, kind, p, backend, dispatch.forced, grad,
    )  # fmt: skip


def _keep(key, call) -> None:
    if len(_prepared) >= 2_000:
        _prepared.clear()
    _prepared[key] = call


def _settled(n: int, backend: str, module) -> bool:
    """Whether calls of this kind are the portable kernels', wherever their tensors lie."""
    return module is _triton() and (n < _CLUSTERS_FROM or backend != "auto")


def _norm(op, x, normalized_shape, weight, bias, eps, offset, center, kind, backend):
    key = numbers = None
    if not torch.compiler.is_compiling():
        if type(normalized_shape) in _HASHED and type(eps) is float and type(offset) is float and type(backend) is str:
            numbers = normalized_shape, eps, offset, center, kind, backend, dispatch.forced
            try:
                table = _plans.of.get(numbers)
            except TypeError:  # a tuple that cannot be hashed is no shape
                _checked_shape(op, x, normalized_shape, weight, bias)
                raise
            if table is not None:
                y = _triton_module.by_table(table, x, weight, bias)
                if y is not None:
                    return y
        key = _kind(x, None, normalized_shape, weight, bias, eps, offset, center, kind, 0.0, backend)
        call = _prepared.get(key)
        if call is not None:
            return _again(x, weight, bias, call, key[-1])
    shape = _checked_shape(op, x, normalized_shape, weight, bias)
    eps, offset = _numbers(op, eps, offset)
    grad = torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    )
    if backend == "auto" and dispatch.forced is None:
        if not _auto_runs_triton(x, weight, bias) or not prod(shape):
            return reference.forward(x, weight, bias, shape, eps, offset, center, kind)
    else:
        backend = dispatch.resolve(backend)
        if not (backend == "hopper" and torch.compiler.is_compiling()):  # there the operator asks, when it has a tensor
            _load(op, backend, (x, weight, bias), prod(shape), kind, 0.0)
        if backend == "torch" or not prod(shape):
            return reference.forward(x, weight, bias, shape, eps, offset, center, kind)
        if torch.compiler.is_compiling() or not dispatch.plain(*(t for t in (x, weight, bias) if t is not None)):
            if grad or _forward_mode():
                return _RegisteredNorm.apply(x, weight, bias, shape, eps, offset, center, kind, backend)
            return _forward_op(x, weight, bias, prod(shape), eps, offset, center, kind, backend)[0]
    n, norm = prod(shape), _triton().Norm(center, kind or None)
    module, plan = _module(backend, (x, weight, bias), n, kind, 0.0, False), None
    if key is not None and _settled(n, backend, module):
        plan = module.forward_plan(x, weight, bias, n, norm, eps, offset, grad)
    call = _Call(shape, n, eps, offset, norm, backend, plan, {}, 0.0, numbers)
    if plan is not None:
        _keep(key, call)
    if grad:
        return _apply_norm(x, weight, bias, call, None)
    y, _ = module.forward(x, weight, bias, n, norm, eps, offset, False)
    return y


def _again(x, weight, bias, call: _Call, recorded: bool):
    """y of a call whose like was made before. Where there is C++, later ones are its own."""
    inputs = x, weight, bias
    pending = _plans.begin(call.numbers, *inputs)
    if recorded:
        return _apply_norm(*inputs, call, pending)

    def run():
        return _triton_module.run_forward(call.forward, *inputs)[0]

    return run() if pending is None else pending.alone(run)


class _Norm(torch.autograd.Function):
    """The kernels under autograd."""

    @staticmethod
    def forward(ctx, x, weight, bias, call, pending):
        if call.forward is not None:
            run = functools.partial(_triton_module.run_forward, call.forward, x, weight, bias)
            y, stats = run() if pending is None else pending.forward(run)
        else:
            module = _module(call.backend, (x, weight, bias), call.n, call.norm.kind, 0.0, False)
            y, stats = module.forward(x, weight, bias, call.n, call.norm, call.eps, call.offset, True)
        saved = x, weight, bias, stats
        ctx.save_for_backward(*saved)
        ctx.call, ctx.pending = call, pending
        if pending is not None:
            pending.keeps((y,), saved, functools.partial(_pull_back, call, ctx.needs_input_grad[:3]))
        return y

    @staticmethod
    def backward(ctx, dy):
        grads = _pull_back(ctx.call, ctx.needs_input_grad[:3], *ctx.saved_tensors, dy, pending=ctx.pending)
        return *grads, None, None


def _pull_back(call: _Call, wanted: tuple, x, weight, bias, stats, dy, *, pending=None) -> tuple:
    """(dx, dw, db)."""
    stats = stats.contiguous()  # hooks on saved tensors may give others back
    if not dispatch.pulled_back_plainly(dy):
        return _formula_gradients(
            lambda x, w, b: reference.forward(x, w, b, call.shape, call.eps, call.offset, call.norm.center, call.norm.kind),
            (x, weight, bias), wanted, dy,
        )  # fmt: skip

    def run():
        dx, _, dw, db = _backward(call, x, dy, None, weight, bias, stats, None, wanted)
        return dx, dw, db

    return run() if pending is None else pending.backward(run, (x, weight, bias, stats), (dy,))


def _looks(x, dy, dh, weight, bias, wanted: tuple) -> tuple:
    """What a backward's plan depends on; hooks on saved tensors may have given others back."""
    return (
        x.stride(), x.dtype, dy.stride(), dy.dtype, None if dh is None else (dh.stride(), dh.dtype),
        None if weight is None else (weight.stride(), weight.dtype),
        None if bias is None else (bias.stride(), bias.dtype), wanted,
    )  # fmt: skip


def _backward(call: _Call, x, dy, dh, weight, bias, stats, seed, wanted: tuple) -> tuple:
    """(dx, d_residual, dw, db)."""
    plan = key = None
    if call.forward is not None:
        key = _looks(x, dy, dh, weight, bias, wanted)
        plan = call.backwards.get(key)
        if plan is not None:
            return _triton_module.run_backward(plan, x, dy, dh, weight, bias, stats, seed)
    n, norm, offset, p, wanted = call.n, call.norm, call.offset, call.p, _triton().Wanted(*wanted)
    module = _module(call.backend, (x, dy, dh, weight, bias), n, norm.kind, p, True)
    if key is not None and module is _triton():
        plan = module.backward_plan(x, dy, dh, weight, bias, seed, n, norm, offset, p, wanted)
        if plan is not None and len(call.backwards) < 100:
            call.backwards[key] = plan
    return module.backward(x, dy, dh, weight, bias, stats, seed, n, norm, offset, p, wanted)


_apply_norm = dispatch.apply_of(_Norm)


def _formula_gradients(formula, inputs, wanted, dy):
    """The same derivatives from PyTorch's operations, which can be differentiated again; None where not wanted."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: a weight that was computed from x must not count again in x's gradient
        inputs = [t if t is None else t.view_as(t) if again else t.detach().requires_grad_() for t in inputs]
        y = formula(*inputs)
    leaves = [t for t, w in zip(inputs, wanted, strict=True) if w]
    grads = iter(torch.autograd.grad(y, leaves, dy, create_graph=again))
    return [next(grads) if w else None for w in wanted]


def _checked_residual(op: str, x: Tensor, residual, p: float) -> tuple[Tensor, Tensor, float]:
    """(x, residual, p) after the checks, the tensors in one dtype."""
    p = dispatch.number(op, "dropout_p", p)
    if not 0 <= p < 1:
        raise ValueError(f"{op}: dropout_p must be at least 0 and below 1, got {p!r}")
    if isinstance(residual, Tensor) and residual.shape == x.shape:
        if residual.dtype == x.dtype:
            return x, residual, p
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)  # which knows no meta device
        if autocast and residual.is_floating_point():
            wide = torch.promote_types(x.dtype, residual.dtype)
            return x.to(wide), residual.to(wide), p
    got = f"{list(residual.shape)} {residual.dtype}" if isinstance(residual, Tensor) else type(residual).__name__
    raise ValueError(
        f"{op}: residual must have x's shape and dtype, {list(x.shape)} {x.dtype}, got {got}; convert one of them"
    )


def _norm_residual(op, x, residual, normalized_shape, weight, bias, eps, offset, center, p, backend):
    key = numbers = None
    compiling = torch.compiler.is_compiling()
    if (
        not compiling
        and type(normalized_shape) in _HASHED and type(eps) is float and type(offset) is float and type(backend) is str
        and type(p) is float and not p  # the seed of dropout is drawn by PyTorch, which no plan has
    ):  # fmt: skip
        numbers = "residual", normalized_shape, eps, offset, center, backend, dispatch.forced
        try:
            table = _plans.of.get(numbers)
        except TypeError:
            _checked_shape(op, x, normalized_shape, weight, bias)
            raise
        if table is not None:
            results = _triton_module.by_table(table, x, residual, weight, bias)
            if results is not None:
                return results
    if not compiling and isinstance(residual, Tensor) and residual.dtype == getattr(x, "dtype", None):
        key = _kind(x, residual, normalized_shape, weight, bias, eps, offset, center, "", p, backend)
        call = _prepared.get(key)
        if call is not None:
            pending = _plans.begin(call.numbers, x, residual, weight, bias) if call.numbers else None
            if key[-1]:
                return _apply_residual_norm(x, residual, weight, bias, call, pending)
            seed = _seed(x) if p else None

            def run():
                return _triton_module.run_residual(call.forward, x, residual, weight, bias, seed)[:2]

            return run() if pending is None else pending.alone(run)
    shape = _checked_shape(op, x, normalized_shape, weight, bias)
    eps, offset = _numbers(op, eps, offset)
    x, residual, p = _checked_residual(op, x, residual, p)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight, bias))
    tensors = [t for t in (x, residual, weight, bias) if t is not None]
    if backend == "auto" and dispatch.forced is None:
        if not _auto_runs_triton(x, residual, weight, bias) or not prod(shape):
            return reference.forward_residual(x, residual, weight, bias, shape, eps, offset, center, p)
    else:
        backend = dispatch.resolve(backend)
        if not (backend == "hopper" and torch.compiler.is_compiling()):
            _load(op, backend, tensors, prod(shape), None, p)
        if backend == "torch" or not prod(shape):
            return reference.forward_residual(x, residual, weight, bias, shape, eps, offset, center, p)
        if torch.compiler.is_compiling() or not dispatch.plain(*tensors):
            seed = _seed(x) if p else None
            call = (x, residual, weight, bias, seed)
            if grad or _forward_mode():
                return _RegisteredResidualNorm.apply(*call, shape, eps, offset, center, p, backend)
            return _residual_op(*call, prod(shape), eps, offset, center, p, backend)[:2]
    n, norm = prod(shape), _triton().Norm(center)
    module, plan = _module(backend, tensors, n, None, p, False), None
    if key is not None and _settled(n, backend, module):
        plan = module.residual_plan(x, residual, weight, bias, p > 0, n, norm, eps, offset, p, grad)
    call = _Call(shape, n, eps, offset, norm, backend, plan, {}, p, numbers)
    if plan is not None:
        _keep(key, call)
    if grad:
        return _apply_residual_norm(x, residual, weight, bias, call, None)
    seed = _seed(x) if p else None
    return module.forward_residual(x, residual, weight, bias, seed, n, norm, eps, offset, p, False)[:2]


def _seed(x: Tensor) -> Tensor:
    """Drawn on the device by PyTorch's generator: follows torch.manual_seed, and moves on in every replay of a CUDA graph."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=x.device)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, call, pending):
        seed = _seed(x) if call.p else None
        if call.forward is not None:
            run = functools.partial(_triton_module.run_residual, call.forward, x, residual, weight, bias, seed)
            y, h, stats = run() if pending is None else pending.forward(run)
        else:
            n, norm, p = call.n, call.norm, call.p
            module = _module(call.backend, (x, residual, weight, bias), n, None, p, False)
            y, h, stats = module.forward_residual(
                x, residual, weight, bias, seed, n, norm, call.eps, call.offset, p, True
            )
        saved = h, weight, bias, stats, seed
        ctx.save_for_backward(*saved)
        ctx.call, ctx.pending = call, pending
        if pending is not None:
            pending.keeps((y, h), saved, functools.partial(_pull_back_residual, call, ctx.needs_input_grad[:4]))
        return y, h

    @staticmethod
    def backward(ctx, dy, dh):
        grads = _pull_back_residual(ctx.call, ctx.needs_input_grad[:4], *ctx.saved_tensors, dy, dh, pending=ctx.pending)
        return *grads, None, None


def _pull_back_residual(call: _Call, wanted: tuple, h, weight, bias, stats, seed, dy, dh, *, pending=None) -> tuple:
    """(dx, d_residual, dw, db)."""
    saved = h, weight, bias, stats, seed
    dy, dh = (torch.zeros_like(h) if g is None else g for g in (dy, dh))
    stats = stats.contiguous()
    need_x, need_r, *of_parameters = wanted
    if not dispatch.pulled_back_plainly(dy, dh):
        center = call.norm.center
        if call.p:
            raise RuntimeError(
                f"{'layer' if center else 'rms'}_norm_residual: a second derivative with dropout_p > 0 is not supported, nor is a "
                "batch of gradients, or one that a mode or subclass watches; use backend='torch'"
            )
        d, dw, db = _formula_gradients(
            lambda h, w, b: reference.forward(h, w, b, call.shape, call.eps, call.offset, center),
            (h, weight, bias), (True, *of_parameters), dy,
        )  # fmt: skip
        d = d + dh
        return d if need_x else None, d if need_r else None, dw, db

    def run():
        dx, dr, dw, db = _backward(call, h, dy, dh, weight, bias, stats, seed, (need_x or need_r, *of_parameters))
        return dx if need_x else None, dr if need_r else None, dw, db

    return run() if pending is None else pending.backward(run, saved, (dy, dh))


_apply_residual_norm = dispatch.apply_of(_ResidualNorm)


# The same kernels as registered operators, for calls that a raw launch must not see: torch.compile, fake tensors, dispatch
# modes, subclasses.


def _forward_run(x, weight, bias, n, eps, offset, center, kind, backend="triton"):
    module = _load("norm", backend, (x, weight, bias), n, kind, 0.0)
    return module.forward(x, weight, bias, n, _triton().Norm(center, kind or None), eps, offset, True)


def _statistics_like(x, n, center):
    return x.new_empty(x.numel() // n * (1 + center), dtype=torch.float32)


_forward_op = dispatch.register(
    "norm(Tensor x, Tensor? weight, Tensor? bias, int n, float eps, float offset, bool center, str kind,"
    ' str backend="triton") -> (Tensor, Tensor)',
    _forward_run,
    lambda x, weight, bias, n, eps, offset, center, kind, backend="triton": (
        x.new_empty(x.shape),
        _statistics_like(x, n, center),
    ),
)


def _residual_run(x, residual, weight, bias, seed, n, eps, offset, center, p, backend="triton"):
    module = _load("norm_residual", backend, (x, residual, weight, bias), n, None, p)
    return module.forward_residual(x, residual, weight, bias, seed, n, _triton().Norm(center), eps, offset, p, True)


_residual_op = dispatch.register(
    "norm_residual(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, int n, float eps, "
    'float offset, bool center, float p, str backend="triton") -> (Tensor, Tensor, Tensor)',
    _residual_run,
    lambda x, residual, weight, bias, seed, n, eps, offset, center, p, backend="triton": (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
        _statistics_like(x, n, center),
    ),
)


def _backward_run(x, dy, dh, weight, bias, stats, seed, n, offset, center, kind, p, wanted, backend="triton"):
    norm = _triton().Norm(center, kind or None)
    wanted = _triton().Wanted(*wanted)
    out = BACKENDS[backend]().backward(x, dy, dh, weight, bias, stats.contiguous(), seed, n, norm, offset, p, wanted)
    dx, dr, dw, db = (x.new_empty(0) if t is None else t for t in out)
    return dx, dr if seed is not None else x.new_empty(0), dw, db  # an operator must not return a tensor twice


def _backward_fake(x, dy, dh, weight, bias, stats, seed, n, offset, center, kind, p, wanted, backend="triton"):
    dx, dw, db = wanted
    return (
        x.new_empty(x.shape if dx else 0),
        x.new_empty(x.shape if dx and seed is not None else 0),
        weight.new_empty(weight.shape) if dw else x.new_empty(0),
        bias.new_empty(bias.shape) if db else x.new_empty(0),
    )


_backward_op = dispatch.register(
    "norm_backward(Tensor x, Tensor dy, Tensor? dh, Tensor? weight, Tensor? bias, Tensor stats, Tensor? seed, int n, "
    'float offset, bool center, str kind, float p, bool[] wanted, str backend="triton") -> (Tensor, Tensor, Tensor, Tensor)',
    _backward_run,
    _backward_fake,
)


class _RegisteredNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, shape, eps, offset, center, kind, backend):
        y, stats = _forward_op(x, weight, bias, prod(shape), eps, offset, center, kind, backend)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.call = shape, offset, center, kind, backend
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, bias, stats = ctx.saved_tensors
        shape, offset, center, kind, backend = ctx.call
        wanted = list(ctx.needs_input_grad[:3])
        dx, _, dw, db = _backward_op(
            x, dy, None, weight, bias, stats, None, prod(shape), offset, center, kind, 0.0, wanted, backend
        )
        dx, dw, db = (t if w else None for t, w in zip((dx, dw, db), wanted, strict=True))
        return dx, dw, db, *(None,) * 6


class _RegisteredResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, seed, shape, eps, offset, center, p, backend):
        y, h, stats = _residual_op(x, residual, weight, bias, seed, prod(shape), eps, offset, center, p, backend)
        ctx.save_for_backward(h, weight, bias, stats, seed)
        ctx.call = shape, offset, center, p, backend
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh):
        h, weight, bias, stats, seed = ctx.saved_tensors
        shape, offset, center, p, backend = ctx.call
        need_x, need_r, *wanted = ctx.needs_input_grad[:4]
        wanted = [need_x or need_r, *wanted]
        dx, dr, dw, db = _backward_op(
            h, dy, dh, weight, bias, stats, seed, prod(shape), offset, center, "", p, wanted, backend
        )
        dr = dx if seed is None else dr
        dw, db = (t if w else None for t, w in zip((dw, db), wanted[1:], strict=True))
        return dx if need_x else None, dr if need_r else None, dw, db, *(None,) * 7


def explain(op, x: Tensor, *args, **kwargs) -> Explanation:
    """Which backend ``op(x, *args, **kwargs)`` would run on, why, and with which configuration; runs nothing."""
    call = inspect.signature(op).bind(x, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    name = op.__name__
    weight, bias, residual = given.get("weight"), given.get("bias"), given.get("residual")
    shape = _checked_shape(name, x, given["normalized_shape"], weight, bias)
    _numbers(
        name, 0.0 if given["eps"] is None and name.startswith("rms") else given["eps"], given.get("weight_offset", 0.0)
    )
    if "kind" in given:
        _check_kind(given["kind"])
    if "residual" in given:
        x, residual, given["dropout_p"] = _checked_residual(name, x, residual, given["dropout_p"])
    tensors = [t for t in (x, residual, weight, bias) if t is not None]
    backend = dispatch.resolve(given["backend"])
    n, p = prod(shape), given.get("dropout_p", 0.0)
    kind = None if given.get("kind", "none") == "none" else given["kind"]
    if backend != "auto":
        module = _load(name, backend, tensors, n, kind, p)
        config = module.describe(x, n) if backend != "torch" and n else ""
        return Explanation(name, backend, "named by the caller", config)
    if not x.is_cuda:
        against = f"needs a GPU tensor, got {x.device.type}"
    elif not dispatch.plain(*tensors):
        against = f"a raw launch does not see through {type(x).__name__} or an active mode"
    else:
        against = _triton_missing() or _triton().unsupported(*tensors)
    if not n:
        against = against or "rows of 0 elements"
    if against:
        return Explanation(name, "torch", "the first backend that can run here", rejected={"triton": against})
    forward, backward = (_module("auto", tensors, n, kind, p, way) for way in (False, True))
    config = forward.describe(x, n)
    if backward is not forward:
        config += f"; backward on hopper: {backward.describe(x, n, True, residual is not None)}"
    backend = "hopper" if forward is not _triton() else "triton"
    return Explanation(name, backend, "the fastest measured at every size", config)
