"""Softmax over any dimension  y = softmax(scale x + mask),  and its logarithm.

softmax:      y[n] = exp(z[n] - max z) / sum_m exp(z[m] - max z),        z = scale x + mask
log_softmax:  y[n] = z[n] - max z - log sum_m exp(z[m] - max z)

with n, m along ``dim`` only. x is [..., N, ...] (any shape, any strides, 0 elements too), N = x.shape[dim] of any length;
mask is additive and broadcasts to x's shape. With ``dtype`` x is converted to it first. y has x's shape, dtype and device, and
the strides that ``torch.empty_like(x)`` gives (contiguous from the PyTorch formula). Nothing is transposed: a dimension that is
not contiguous is reduced where it lies. Arithmetic is float32 inside the kernels, float64 for float64. A row of -inf alone, or
with NaN or +inf in it, is NaN, as in PyTorch.

Backward saves y only:

softmax:      dx = scale y (dy - sum_n y dy)
log_softmax:  dx = scale (dy - exp(y) sum_n dy)

It runs in one kernel; a second derivative (``create_graph=True``) goes through the same formula in PyTorch's operations.
The kernels give no gradient to the mask: "auto" hands a mask that requires one to the PyTorch formula, a named "triton"
raises ``Unsupported``.

A copy of x (of dy in backward) is made only where more than four of the other dimensions do not merge into fewer; "hopper"
copies a dy that is not contiguous, and what does not start at a multiple of 16 bytes.

Under ``torch.compile`` "auto" hands the compiler the plain formula. Source: the running maximum and sum of long rows are
Milakov and Gimelshein, arXiv:1805.02867.
"""

import contextlib
import functools
import inspect
import operator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trinix import dispatch
from trinix.dispatch import Explanation
from trinix.kernels import _native
from trinix.kernels.torch import softmax as reference

_hopper_module = _triton_module = None  # kept by hand: torch.compile traces through functools.cache, and says so


def _hopper():
    global _hopper_module
    if _hopper_module is None:
        from trinix.kernels.hopper import softmax

        _hopper_module = softmax
    return _hopper_module


def _triton():
    global _triton_module
    if _triton_module is None:
        from trinix.kernels.triton import softmax

        _triton_module = softmax
    return _triton_module


def _torch():
    return reference


BACKENDS = {"hopper": _hopper, "triton": _triton, "torch": _torch}

# From how many elements on "auto" runs the Triton kernels on a GPU where PyTorch has one kernel too and its dimension is
# contiguous: S-1, the smallest row of the documents. Elsewhere always: PyTorch walks other dimensions column by column,
# and composes scale and mask of several kernels.
_TRITON_FROM = 1 << 20

# Rows from the second length on go to the kernels however few they are: PyTorch walks one of 65536 for 16 us, a cluster for 3. Clusters are
# asked from the first on.
_CLUSTER_FROM, _LONG_FROM = 1 << 15, 1 << 16


def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale x + mask) over ``dim``; differentiable.

    Args:
        x: ``[..., N, ...]``, floating point; with ``dtype`` integers and bool too.
        dim: the dimension that sums to 1, from -x.ndim to x.ndim - 1.
        scale: a number; None is 1.
        mask: added to scale x; floating point, broadcasts to ``x.shape``, on x's device.
        dtype: what x is converted to before anything else, a floating-point dtype; None leaves it as it is. The conversion is an
            operation of PyTorch's in front of the kernel, with a copy of x in memory, and one of dx behind backward's. Half types
            need none to be exact, since sums are float32 anyway: it saves the rounding of y alone.
        backend: "auto", "hopper", "triton" or "torch". A named backend never falls back.

    Returns:
        ``[..., N, ...]`` in ``dtype``, or ``x.dtype`` without.

    Raises:
        TypeError: ``x`` or ``mask`` is not a floating-point tensor, ``dtype`` not a floating-point dtype, ``dim`` not an int, or
            ``scale`` not a number.
        ValueError: ``dim`` out of range, a mask that does not broadcast or lies on another device, an unknown ``backend``.
        Unsupported: the named backend cannot run this call.

    >>> x = torch.tensor([[0.0, 0.0], [1.0, 1.0]], requires_grad=True)
    >>> y = trinix.ops.softmax(x, dim=0)
    >>> y[0].tolist() == torch.softmax(x, 0)[0].tolist()
    True
    >>> y[0].sum().backward()
    """
    if dtype is not None:
        x = _converted(x, dtype, "softmax")
    return _softmax(x, dim, scale, mask, backend, False)


def log_softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """log softmax(scale x + mask) over ``dim``; see ``softmax``."""
    if dtype is not None:
        x = _converted(x, dtype, "log_softmax")
    return _softmax(x, dim, scale, mask, backend, True)


_plans = _native.Plans()


def _softmax(x, dim, scale, mask, backend, log):
    # The eager path of small tensors is counted in tenths of a microsecond: what was called before is found first.
    named = None
    # numbers by type: a tensor would be found again by its identity, whatever its value has become
    if (
        not torch.compiler.is_compiling()
        and type(dim) is int
        and (scale is None or type(scale) is float)
        and type(backend) is str
    ):
        named = dim, scale, log, backend, dispatch.forced
        table = _plans.of.get(named)
        if table is not None:
            y = _triton_module.by_table(table, x, mask)
            if y is not None:
                return y
    dim, scale = _checked(x, dim, scale, mask, "log_softmax" if log else "softmax")
    grad = x.requires_grad and torch.is_grad_enabled()
    if backend != "auto" or dispatch.forced is not None:
        return _named(x, mask, dim, scale, backend, log, grad, named)
    if (
        not x.is_cuda
        or torch.compiler.is_compiling()
        or _small(x, mask, dim, scale)
        or not (dispatch.plain(x) if mask is None else dispatch.plain(x, mask))
        or _against_triton(x, mask)
    ):
        return reference.forward(x, mask, dim, scale, log)
    backend = "hopper" if _hopper_wins(x, mask, dim, scale) else "triton"
    return _launched(x, mask, dim, scale, log, backend, grad, named)


def _hopper_wins(x, mask, dim, scale) -> bool:
    if not x.ndim or (x.stride(dim) == 1 and x.shape[dim] < _CLUSTER_FROM) or _hopper_missing():
        return False
    return not _hopper().unsupported(x, mask, dim, scale) and _hopper().wins(x, dim)


def _small(x, mask, dim, scale) -> bool:
    """Whether PyTorch's one kernel is no slower, all counted."""
    return (
        x.numel() < _TRITON_FROM
        and mask is None
        and scale == 1.0
        and (not x.ndim or (x.stride(dim) == 1 and x.shape[dim] < _LONG_FROM))
    )


def _converted(x, dtype, op, convert=Tensor.to) -> Tensor:
    """x in ``dtype``."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(
            f"{op}: dtype must be a floating-point dtype or None, got {dtype!r}; name one, as torch.float32"
        )
    if not isinstance(x, Tensor) or x.is_complex():  # a conversion would drop what is imaginary
        _refuse(op, "x", x, "convert it with x.float()")
    return x if x.dtype == dtype else convert(x, dtype=dtype)


def _checked(x, dim, scale, mask, op) -> tuple[int, float]:
    """(dim from 0 on, scale) of arguments that make sense."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        _refuse(op, "x", x, "convert it with x.float()")
    if type(dim) is not int:
        dim = _whole(op, dim)
    ndim = x.ndim or 1
    if not -ndim <= dim < ndim:
        raise ValueError(f"{op}: dim must be from {-ndim} to {ndim - 1} for x of shape {list(x.shape)}, got {dim}")
    if scale is None:
        scale = 1.0
    elif isinstance(scale, Tensor):
        raise TypeError(f"{op}: scale must be a number, got a tensor; multiply x by it, or pass scale.item()")
    if mask is not None:
        _check_mask(x, mask, op)
    return dim % ndim, dispatch.number(op, "scale", scale)


def _whole(op, dim) -> int:
    """NumPy's integers as ints, which PyTorch takes too; it refuses a bool."""
    if not isinstance(dim, (bool, Tensor)):
        with contextlib.suppress(TypeError):
            return operator.index(dim)
    raise TypeError(f"{op}: dim must be an int, got {type(dim).__name__}; name one dimension")


def _check_mask(x, mask, op):
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        cure = "it is added: make 0 of what stays and -inf of what is masked out"
        _refuse(op, "mask", mask, cure)
    if mask.device != x.device:
        raise ValueError(f"{op}: mask must be on {x.device} as x is, got {mask.device}; move it with mask.to(x.device)")
    sizes = tuple(mask.shape)
    if len(sizes) > x.ndim or any(m not in (1, s) for m, s in zip(sizes[::-1], tuple(x.shape)[::-1], strict=False)):
        raise ValueError(
            f"{op}: mask must broadcast to x's shape {list(x.shape)}, got {list(sizes)}; give it size 1 or x's in every dimension"
        )


def _refuse(op, name, got, cure):
    got = str(got.dtype) if isinstance(got, Tensor) else type(got).__name__
    raise TypeError(f"{op}: {name} must be a floating-point tensor, got {got}; {cure}")


def _named(x, mask, dim, scale, backend, log, grad, named):
    backend = dispatch.resolve(backend)
    if not (backend == "hopper" and torch.compiler.is_compiling()):  # there the operator asks, when it has a tensor
        _load(x, mask, dim, scale, log, backend)
    if backend == "torch":
        return reference.forward(x, mask, dim, scale, log)
    if torch.compiler.is_compiling() or not (dispatch.plain(x) if mask is None else dispatch.plain(x, mask)):
        # in forward-mode differentiation the Function refuses, where the bare operator would lose the tangent
        grad = grad or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)
        if grad:
            return _RegisteredSoftmax.apply(x, mask, dim, scale, log, backend)
        return _forward_op(x, mask, dim, scale, log, backend)
    return _launched(x, mask, dim, scale, log, backend, grad, named)


def _launched(x, mask, dim, scale, log, backend, grad, named):
    """y of plain tensors. Where there is C++, calls of the portable kernels like one that has run are its own."""
    pending = _plans.begin(named, x, mask) if backend == "triton" and named is not None else None
    if grad:
        return _apply(x, mask, dim, scale, log, backend, pending)
    run = functools.partial(BACKENDS[backend]().forward, x, mask, dim, scale, log)
    return run() if pending is None else pending.alone(run)


def _load(x, mask, dim, scale, log, backend):
    return dispatch.load_named("log_softmax" if log else "softmax", BACKENDS, backend, x, mask, dim, scale)


def _against_triton(x: Tensor, mask: Tensor | None) -> str | None:
    return _triton_missing() or _triton().unsupported(x, mask, 0, 1.0)


@functools.cache
def _hopper_missing() -> str | None:
    return dispatch.missing(_hopper)


@functools.cache
def _triton_missing() -> str | None:
    return dispatch.missing(_triton)


class _Softmax(torch.autograd.Function):
    """The kernels of one backend under autograd."""

    @staticmethod
    def forward(ctx, x, mask, dim, scale, log, backend, pending):
        run = functools.partial(BACKENDS[backend]().forward, x, mask, dim, scale, log)
        y = run() if pending is None else pending.forward(run)
        ctx.save_for_backward(y)
        ctx.call, ctx.pending = (dim, scale, log, backend), pending
        if pending is not None:
            pending.keeps((y,), (y,), functools.partial(_pull_back, *ctx.call))
        return y

    @staticmethod
    def backward(ctx, dy):
        dx, _ = _pull_back(*ctx.call, *ctx.saved_tensors, dy, pending=ctx.pending)
        return dx, None, None, None, None, None, None


def _pull_back(dim, scale, log, backend, y, dy, *, pending=None) -> tuple:
    """(dx, None for the mask)."""
    if not dispatch.pulled_back_plainly(y, dy):  # else y carries the graph to x
        return reference.backward(y, dy, dim, scale, log), None

    def run():
        return BACKENDS[backend]().backward(y, dy, dim, scale, log), None

    return run() if pending is None else pending.backward(run, (y,), (dy,))


_apply = dispatch.apply_of(_Softmax)


# The same kernels as registered operators, for calls that a raw launch must not see: torch.compile, fake tensors, dispatch
# modes, subclasses.

_forward_op = dispatch.register(
    "softmax(Tensor x, Tensor? mask, int dim, float scale, bool log, str backend) -> Tensor",
    lambda x, mask, dim, scale, log, backend: _load(x, mask, dim, scale, log, backend).forward(
        x, mask, dim, scale, log
    ),
    lambda x, mask, dim, scale, log, backend: torch.empty_like(x),
)
_backward_op = dispatch.register(
    "softmax_backward(Tensor y, Tensor dy, int dim, float scale, bool log, str backend) -> Tensor",
    lambda y, dy, dim, scale, log, backend: BACKENDS[backend]().backward(y, dy, dim, scale, log),
    lambda y, dy, dim, scale, log, backend: torch.empty_like(y),
)


class _RegisteredSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, dim, scale, log, backend):
        y = _forward_op(x, mask, dim, scale, log, backend)
        ctx.save_for_backward(y)
        ctx.call = dim, scale, log, backend
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return _backward_op(y, dy, *ctx.call), None, None, None, None, None


def explain(op, x: Tensor, *args, **kwargs) -> Explanation:
    """Which backend ``op(x, *args, **kwargs)`` would run on, why, and with which configuration; runs nothing."""
    call = inspect.signature(op).bind(x, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    name, mask, log = op.__name__, given["mask"], op is log_softmax
    if given["dtype"] is not None:
        x = _converted(x, given["dtype"], name, torch.empty_like)
    dim, scale = _checked(x, given["dim"], given["scale"], mask, name)
    backend = dispatch.resolve(given["backend"])
    dispatch.check_name(name, BACKENDS, backend)
    if backend == "torch":
        return Explanation(name, "torch", "named by the caller")
    if backend != "auto":
        module = dispatch.load_named(name, BACKENDS, backend, x, mask, dim, scale)
        return Explanation(name, backend, "named by the caller", module.describe(x, mask, dim, log))
    against = _against_triton(x, mask)
    if not x.is_cuda:
        against = f"needs a GPU tensor, got {x.device.type}"
    elif not against and not (dispatch.plain(x) if mask is None else dispatch.plain(x, mask)):
        against = f"a raw launch does not see through {type(x).__name__} or an active mode"
    elif not against and _small(x, mask, dim, scale):
        against = f"{x.numel()} elements are bound by host time; it starts at {_TRITON_FROM}"
    if against:
        why = "the first backend that is right and fastest here"
        return Explanation(name, "torch", why, rejected={"triton": against})
    if _hopper_wins(x, mask, dim, scale):
        return Explanation(name, "hopper", "one read and one write", _hopper().describe(x, mask, dim, log))
    return Explanation(
        name, "triton", "one read and one write, over any dimension", _triton().describe(x, mask, dim, log)
    )
