"""Activations  y = f(x), elementwise.

===============  =====================================================  ==========================================
kind             f(x)                                                   parameters, source
===============  =====================================================  ==========================================
"relu"           max(x, 0)
"sigmoid"        1 / (1 + exp(-x))
"silu"           x sigmoid(x)                                           arXiv:1606.08415, arXiv:1710.05941
"gelu"           x Phi(x), Phi the normal distribution (erf)            arXiv:1606.08415
"gelu_tanh"      x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))             the tanh approximation of gelu
"quick_gelu"     x sigmoid(1.702 x)                                     CLIP
"squared_relu"   max(x, 0)^2                                            Primer, arXiv:2109.08668
"mish"           x tanh(softplus(x))                                    arXiv:1908.08681
"leaky_relu"     x > 0 ? x : negative_slope x                           negative_slope = 0.01
"tanh"           tanh(x)
"softplus"       log(1 + exp(beta x)) / beta, x where beta x > threshold  beta = 1, threshold = 20
"none"           x                                                      returns x itself
===============  =====================================================  ==========================================

x is [...] (any shape, any strides, 0 elements too); y has x's shape, dtype and device, and the strides that
``torch.empty_like(x)`` gives. Arithmetic is float32 inside the kernels, float64 for float64. NaN passes, and gradients at
the kinks are PyTorch's (0 at relu's 0, NaN-transparent).

Backward saves x and recomputes. relu and leaky_relu of a dense x under grad save one bit an element instead (1/16 of a bf16
tensor), in the order that the kernel walks memory; relu of a strided x saves y.
The first derivative runs in one kernel; a second derivative (``create_graph=True``) goes through the PyTorch formula. The
mask keeps no graph to x, so a second derivative of these two alone, which is 0, is an error of autograd's rather than zeros.

Under ``torch.compile`` "auto" hands the compiler the plain formula, so that it fuses with its neighbours.
"""

import functools
import inspect
import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trinix import dispatch
from trinix.dispatch import Explanation
from trinix.kernels import _native
from trinix.kernels.torch import activation as reference

_triton_module = None  # kept by hand: torch.compile traces through functools.cache, and says so


def _triton():
    global _triton_module
    if _triton_module is None:
        from trinix.kernels.triton import activation

        _triton_module = activation
    return _triton_module


def _torch():
    return reference


BACKENDS = {"triton": _triton, "torch": _torch}
KINDS = (
    "none", "relu", "sigmoid", "silu", "gelu", "gelu_tanh", "quick_gelu", "squared_relu", "mish", "leaky_relu", "tanh",
    "softplus",
)  # fmt: skip

_ALWAYS, _NEVER = 0, None
# From how many elements on "auto" runs the Triton kernel on a GPU: (no gradient, with gradient), from the H100's rows.
# Where PyTorch has the kind as one kernel, ours costs 3 us more host time without gradient and 30 to 50 us more with: it
# has to win on the device. At par with eager, so never: relu and leaky_relu without gradient, sigmoid, silu, tanh (X-*, K-*: 0 to 0.8%).
# Faster: mish by a quarter from G-mi-1 on, softplus alike, gelu by 1%; relu's backward by its mask from X-relu-512 on, leaky_relu's alike.
# Kinds that eager composes of several kernels: always.
_TRITON_FROM = dict.fromkeys(KINDS, (_NEVER, _NEVER))
_TRITON_FROM |= dict.fromkeys(("quick_gelu", "squared_relu"), (_ALWAYS, _ALWAYS))
_TRITON_FROM |= dict.fromkeys(("mish", "softplus"), (1 << 21, 1 << 22))
_TRITON_FROM |= dict.fromkeys(("relu", "leaky_relu"), (_NEVER, 1 << 23)) | {"gelu": (1 << 24, 1 << 26)}
# The same with gradient where calls are kernels/_native's, and to below how many: relu's mask from X-relu-256 on (backward 12.0 us on
# the card, torch.compile 13.2, eager 15.2). silu's device time is PyTorch's at X-silu-256 to -2048 (0.98 to 1.01), its host time less. sigmoid
# reads x where PyTorch reads y, which lies in the cache still: both passes 1.04 and 1.10 of it at X-sigmoid-256 and -512, and back to back,
# where the host is what takes time, 112.9 us for 113.2 at -256 (120.2 as PyTorch's own behind our checks).
_NATIVE_RANGE = {
    "relu": (1 << 22, 1 << 23), "leaky_relu": (1 << 22, 1 << 23), "silu": (1 << 22, 1 << 26), "sigmoid": (1 << 22, 1 << 23),
}  # fmt: skip
_PYTORCHS = {kind for kind in KINDS if _TRITON_FROM[kind][0] is _NEVER}  # without gradient, by "auto"


def _span(kind, grad) -> tuple[float, float]:
    """From how many elements to below how many "auto" may run the kernel."""
    least, (native, most) = _TRITON_FROM[kind][grad], _NATIVE_RANGE.get(kind, (math.inf, 0)) if grad else (math.inf, 0)
    return (native, most) if least is _NEVER else (min(least, native), math.inf)


_SPANS = tuple({kind: _span(kind, grad) for kind in KINDS} for grad in (False, True))


def activation(
    x: Tensor,
    kind: str,
    *,
    negative_slope: float = 0.01,
    beta: float = 1.0,
    threshold: float = 20.0,
    backend: str = "auto",
) -> Tensor:
    """Apply the activation ``kind`` to every element of ``x``; differentiable.

    Args:
        x: ``[...]``, floating point.
        kind: one of ``trinix.ops.KINDS``; see the table at the top of this file.
        negative_slope: slope of "leaky_relu" for x <= 0; other kinds ignore it.
        beta, threshold: of "softplus"; other kinds ignore them.
        backend: "auto", "triton" or "torch". A named backend never falls back.

    Returns:
        ``[...]`` in ``x.dtype``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: unknown ``kind`` or ``backend``, or ``beta`` is 0.
        Unsupported: the named backend cannot run this call.

    >>> x = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    >>> y = trinix.ops.activation(x, "squared_relu")
    >>> y.tolist()
    [0.0, 0.0, 4.0]
    >>> y.sum().backward(); x.grad.tolist()
    [0.0, 0.0, 4.0]
    """
    if kind == "leaky_relu":
        return leaky_relu(x, negative_slope, backend=backend)
    if kind == "softplus":
        return softplus(x, beta, threshold, backend=backend)
    if kind not in KINDS:
        raise ValueError(f"activation: kind must be one of {list(KINDS)}, got {kind!r}")
    return _activation(x, kind, 0.0, 0.0, backend)


def relu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """max(x, 0); see ``activation``."""
    return _activation(x, "relu", 0.0, 0.0, backend)


def sigmoid(x: Tensor, *, backend: str = "auto") -> Tensor:
    """1 / (1 + exp(-x)); see ``activation``."""
    return _activation(x, "sigmoid", 0.0, 0.0, backend)


def silu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """x sigmoid(x), also called swish; see ``activation``."""
    return _activation(x, "silu", 0.0, 0.0, backend)


def gelu(x: Tensor, approximate: str = "none", *, backend: str = "auto") -> Tensor:
    """x Phi(x), or its tanh approximation with ``approximate="tanh"``; see ``activation``."""
    return _activation(x, _gelu_kind(approximate), 0.0, 0.0, backend)


def quick_gelu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """x sigmoid(1.702 x); see ``activation``."""
    return _activation(x, "quick_gelu", 0.0, 0.0, backend)


def squared_relu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """max(x, 0)^2; see ``activation``."""
    return _activation(x, "squared_relu", 0.0, 0.0, backend)


def mish(x: Tensor, *, backend: str = "auto") -> Tensor:
    """x tanh(softplus(x)); see ``activation``."""
    return _activation(x, "mish", 0.0, 0.0, backend)


def leaky_relu(x: Tensor, negative_slope: float = 0.01, *, backend: str = "auto") -> Tensor:
    """x where x > 0, else ``negative_slope`` x; see ``activation``."""
    if type(negative_slope) is not float:  # asked here, not there: small calls count
        negative_slope = dispatch.number("leaky_relu", "negative_slope", negative_slope)
    # launches are kept by the slope, to which -0.0 is 0.0
    return _activation(x, "leaky_relu", negative_slope + 0.0, 0.0, backend)


def tanh(x: Tensor, *, backend: str = "auto") -> Tensor:
    """tanh(x); see ``activation``."""
    return _activation(x, "tanh", 0.0, 0.0, backend)


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0, *, backend: str = "auto") -> Tensor:
    """log(1 + exp(beta x)) / beta, and x where beta x > threshold; see ``activation``."""
    if type(beta) is not float or type(threshold) is not float or not beta:
        beta, threshold = _softplus_numbers(beta, threshold)
    return _activation(x, "softplus", beta, threshold, backend)


def identity(x: Tensor, *, backend: str = "auto") -> Tensor:
    """x itself (kind "none"); see ``activation``."""
    return _activation(x, "none", 0.0, 0.0, backend)


def _gelu_kind(approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return "gelu" if approximate == "none" else "gelu_tanh"


def _softplus_numbers(beta: float, threshold: float) -> tuple[float, float]:
    beta, threshold = dispatch.number("softplus", "beta", beta), dispatch.number("softplus", "threshold", threshold)
    if beta == 0:
        raise ValueError("softplus: beta must not be 0, got 0")
    return beta, threshold


_plans = _native.Plans()


def _activation(x, kind, a, b, backend):
    # The eager path of small tensors is counted in tenths of a microsecond: cheap tests first, few calls.
    if not isinstance(x, Tensor):
        _refuse(x)
    auto = backend == "auto" and dispatch.forced is None
    if auto and kind == "none":
        return x if x.is_floating_point() else _refuse(x)
    grad = x.requires_grad and torch.is_grad_enabled()
    if auto and not grad and kind in _PYTORCHS:
        return reference.FORMULAS[kind](x, a, b) if x.is_floating_point() else _refuse(x)
    compiling = torch.compiler.is_compiling()
    if auto:
        # behind autograd's code a line in front of PyTorch's own costs three times what it does in a loop by itself
        pytorchs = compiling or not x.is_cuda
        if not pytorchs:
            least, most = _SPANS[grad][kind]
            pytorchs = not least <= x.numel() < most
        if pytorchs:
            return reference.FORMULAS[kind](x, a, b) if x.is_floating_point() else _refuse(x)
    if not compiling and _plans.of and type(backend) is str:  # torch.compile would watch a dictionary that grows
        table = _plans.of.get((kind, a, b, backend, dispatch.forced, grad))
        if table is not None:
            y = _triton_module.by_table(table, x)
            if y is not None:
                return y
    if not x.is_floating_point():
        _refuse(x)
    if not auto:
        return _named(x, kind, a, b, backend, grad)
    least = _TRITON_FROM[kind][grad]
    if (least is _NEVER or x.numel() < least) and not (grad and _native_wins(x, kind)):
        return reference.FORMULAS[kind](x, a, b)
    if not dispatch.plain(x) or _against_triton(x):
        return reference.FORMULAS[kind](x, a, b)
    return _launched(x, kind, a, b, backend, grad)


_native_there = None  # whether the module was there when it was first asked for


def _native_wins(x, kind, build=True) -> bool:
    """The same for the whole process: a forward by PyTorch that is computed again for its backward must not go another way, because a
    build has ended in between."""
    global _native_there
    if kind not in _NATIVE_RANGE:
        return False
    least, most = _NATIVE_RANGE[kind]
    if not least <= x.numel() < most:
        return False
    if _native_there is None:
        there = (_native.module or _native.loaded(build)) is not None
        if not build:
            return there
        _native_there = there
    return _native_there


def _refuse(x):
    got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
    raise TypeError(f"activation: x must be a floating-point tensor, got {got}; convert it with x.float()")


def _named(x, kind, a, b, backend, grad):
    backend = dispatch.resolve(backend)
    dispatch.load_named("activation", BACKENDS, backend, x)
    if kind == "none" or backend == "torch":
        return reference.forward(x, kind, a, b)
    if torch.compiler.is_compiling() or not dispatch.plain(x):
        # in forward-mode differentiation the Function refuses, where the bare operator would lose the tangent
        grad = grad or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)
        return _RegisteredActivation.apply(x, kind, a, b) if grad else _forward_op(x, kind, a, b)
    return _launched(x, kind, a, b, backend, grad)


def triton_can_run(x: Tensor) -> bool:
    """Whether ``backend="triton"`` takes ``x``."""
    return _against_triton(x) is None


def _against_triton(x: Tensor) -> str | None:
    return _triton_missing() or _triton().unsupported(x)


@functools.cache
def _triton_missing() -> str | None:
    return dispatch.missing(_triton)


class _Activation(torch.autograd.Function):
    """The Triton kernels under autograd."""

    @staticmethod
    def forward(ctx, x, kind, a, b, pending):
        run = functools.partial(_triton().forward_saving, x, kind, a, b)
        y, saved = run() if pending is None else pending.forward(run)
        ctx.save_for_backward(saved)
        ctx.call, ctx.pending = (kind, a, b, y.stride()), pending
        if pending is not None:
            pending.keeps((y,), (saved,), functools.partial(_pull_back, *ctx.call))
        return y

    @staticmethod
    def backward(ctx, dy):
        return *_pull_back(*ctx.call, *ctx.saved_tensors, dy, pending=ctx.pending), None, None, None, None


def _pull_back(kind, a, b, layout, saved, dy, *, pending=None):
    """(dx,); ``layout``: y's strides."""
    if saved.dtype == torch.uint8:
        saved = saved.contiguous()  # hooks on saved tensors may give others back
    if dispatch.pulled_back_plainly(dy):

        def run():
            return (_triton().backward(saved, dy, kind, a, b, layout),)

        return run() if pending is None else pending.backward(run, (saved,), (dy,))
    # the same derivative from PyTorch's operations: it can be differentiated again, and takes any kind of dy
    again = torch.is_grad_enabled()  # create_graph=True
    if saved.dtype == torch.uint8:
        keep = _triton().unpack_mask(saved, dy.shape, layout)
        return (torch.where(keep, dy, a * dy if kind == "leaky_relu" else 0.0),)
    with torch.enable_grad():
        x = saved if again else saved.detach().requires_grad_()
        y = reference.forward(x, kind, a, b)
    return torch.autograd.grad(y, x, dy, create_graph=again)


_apply = dispatch.apply_of(_Activation)


def _launched(x, kind, a, b, backend, grad):
    """y of a plain tensor. Where there is C++, calls like one that has run are its own."""
    pending = _plans.begin((kind, a, b, backend, dispatch.forced, grad), x)
    if grad:
        return _apply(x, kind, a, b, pending)
    run = functools.partial(_triton().forward, x, kind, a, b)
    return run() if pending is None else pending.alone(run)


# The same kernels as registered operators, for calls that a raw launch must not see: torch.compile, fake tensors, dispatch
# modes, subclasses. relu saves y here, not the mask.


def _backward_run(saved, dy, kind, a, b):
    return _triton().backward(saved, dy, kind, a, b, torch.empty_like(saved, device="meta").stride())


_forward_op = dispatch.register(
    "activation(Tensor x, str kind, float a, float b) -> Tensor",
    lambda x, kind, a, b: _triton().forward(x, kind, a, b),
    lambda x, kind, a, b: torch.empty_like(x),
)
_backward_op = dispatch.register(
    "activation_backward(Tensor saved, Tensor dy, str kind, float a, float b) -> Tensor",
    _backward_run,
    lambda saved, dy, kind, a, b: torch.empty_like(saved),
)


class _RegisteredActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind, a, b):
        y = _forward_op(x, kind, a, b)
        ctx.save_for_backward(y if kind == "relu" else x)
        ctx.call = kind, a, b
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (saved,) = ctx.saved_tensors
        return _backward_op(saved, dy, *ctx.call), None, None, None


def explain(op, x: Tensor, *args, **kwargs) -> Explanation:
    """Which backend ``op(x, *args, **kwargs)`` would run on, why, and with which configuration; runs nothing."""
    call = inspect.signature(op).bind(x, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    if given.get("kind") not in (None, *KINDS):
        raise ValueError(f"explain: kind must be one of {list(KINDS)}, got {given['kind']!r}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        _refuse(x)
    kind = given.get("kind") or {"identity": "none"}.get(op.__name__, op.__name__)
    if "approximate" in given:
        kind = _gelu_kind(given["approximate"])
    if kind == "softplus":
        _softplus_numbers(given["beta"], given["threshold"])
    if kind == "leaky_relu":
        dispatch.number("leaky_relu", "negative_slope", given["negative_slope"])
    name = op.__name__ if op.__name__ != "activation" else f"activation[{kind}]"
    backend = dispatch.resolve(given["backend"])
    dispatch.check_name(op.__name__, BACKENDS, backend)
    grad = x.requires_grad and torch.is_grad_enabled()
    if backend == "torch":
        return Explanation(name, "torch", "named by the caller")
    module = dispatch.load_named(op.__name__, BACKENDS, backend, x) if backend != "auto" else None
    if kind == "none":
        return Explanation(name, "torch", "the identity returns x itself: nothing runs")
    if module:
        return Explanation(name, backend, "named by the caller", module.describe(x, kind, grad))
    rejected = {}
    against = _against_triton(x)
    least = _TRITON_FROM[kind][1 if grad else 0]
    why = f"fastest measured from {least} elements on"
    by_native = x.is_cuda and grad and _native_wins(x, kind, build=False)
    if not x.is_cuda:
        rejected["triton"] = f"needs a GPU tensor, got {x.device.type}"
    elif against:
        rejected["triton"] = against
    elif not dispatch.plain(x):
        rejected["triton"] = f"a raw launch does not see through {type(x).__name__} or an active mode"
    elif by_native:
        least, most = _NATIVE_RANGE[kind]
        why = f"launched from C++, with gradient the least time back to back from {least} to below {most} elements"
    elif least is _NEVER:
        rejected["triton"] = (
            "no faster than PyTorch's own kernel at any size measured, and a launch costs more host time"
        )
    elif x.numel() < least:
        with_grad = "with" if grad else "without"
        rejected["triton"] = f"{x.numel()} elements {with_grad} gradient are bound by host time; faster from {least} on"
    if rejected:
        return Explanation(name, "torch", "the first backend that is right and fastest here", rejected=rejected)
    return Explanation(name, "triton", why, _triton().describe(x, kind, grad))
