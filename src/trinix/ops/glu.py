"""Gated linear units  y = f(gate) * up, elementwise.

=============  =================================================  ======================================================
kind           f(gate)                                            source
=============  =================================================  ======================================================
"swiglu"       silu: gate sigmoid(gate)                           arXiv:2002.05202
"geglu"        gelu: gate Phi(gate), Phi by erf                   arXiv:2002.05202
"geglu_tanh"   gelu's tanh approximation                          arXiv:2002.05202, Gemma
"reglu"        relu: max(gate, 0)                                 arXiv:2002.05202
"quick_geglu"  gate sigmoid(1.702 gate)                           gelu's sigmoid approximation, arXiv:1606.08415
"bilinear"     gate                                               arXiv:1612.08083, arXiv:2002.05202
"glu"          sigmoid(gate)                                      arXiv:1612.08083
=============  =================================================  ======================================================

Which input is activated: always the one called gate.

* two tensors, ``glu(gate, up)``: gate and up are [..., H] each, of one shape, dtype and device.
* one packed tensor, ``glu(x, layout=...)``: x is [..., 2H], H >= 0, and ``layout`` says where gate lies in it:

  ==============  ==================  ==================  ============================================================
  layout          gate                up                  who packs so
  ==============  ==================  ==================  ============================================================
  "gate_first"    x[..., :H]          x[..., H:]          gate_proj and up_proj of LLaMA joined in this order (default)
  "gate_last"     x[..., H:]          x[..., :H]          torch.nn.functional.glu
  "interleaved"   x[..., 0::2]        x[..., 1::2]        GPT-OSS
  ==============  ==================  ==================  ============================================================

  A wrong layout raises nothing and gives other numbers: check which half a checkpoint activates.

y is [..., H] in the inputs' dtype, laid out as ``torch.empty_like(gate)``. Any shape, any strides, 0 elements too.
Arithmetic is float32 inside the kernels, float64 for float64. NaN passes; relu's gradient at 0 is 0.

A packed tensor is read in place, and its gradient is one [..., 2H] tensor that one kernel writes. Backward saves the inputs
(no activation, no product), recomputes, and writes the wanted gradients in one kernel; those of two tensors are both laid
out as y. The one case that copies: views with more than four outer dimensions that do not merge.
A second derivative (``create_graph=True``) goes through the PyTorch formula.

Under ``torch.compile`` "auto" hands the compiler the plain formula, so that it fuses with its neighbours.
"""

import functools
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from trinix import dispatch
from trinix.dispatch import Explanation
from trinix.kernels import _native
from trinix.kernels.torch import glu as reference

_triton_module = None  # kept by hand: torch.compile traces through functools.cache, and says so


def _triton():
    global _triton_module
    if _triton_module is None:
        from trinix.kernels.triton import glu

        _triton_module = glu
    return _triton_module


def _torch():
    return reference


BACKENDS = {"triton": _triton, "torch": _torch}
KINDS = tuple(reference.FORMULAS)
LAYOUTS = reference.LAYOUTS

_ALWAYS, _NEVER = 0, None
# From how many elements of y on "auto" runs the Triton kernel on a GPU: (no gradient, with gradient). PyTorch composes
# every kind but bilinear of several kernels each way; bilinear's forward is one multiplication there too.
_TRITON_FROM = dict.fromkeys(KINDS, (_ALWAYS, _ALWAYS)) | {"bilinear": (_NEVER, 1 << 22)}


def glu(
    gate: Tensor, up: Tensor | None = None, kind: str = "swiglu", *, layout: str = "gate_first", backend: str = "auto"
) -> Tensor:
    """f(gate) * up with the activation f of ``kind``; differentiable.

    Args:
        gate: ``[..., H]``, floating point; without ``up`` the packed tensor ``[..., 2H]``.
        up: ``[..., H]``, of gate's dtype and device.
        kind: "swiglu", "geglu", "geglu_tanh", "reglu", "quick_geglu", "bilinear" or "glu"; see the top of this file.
        layout: "gate_first", "gate_last" or "interleaved": where gate lies in a packed tensor. Two tensors ignore which.
        backend: "auto", "triton" or "torch". A named backend never falls back.

    Returns:
        ``[..., H]`` in gate's dtype.

    Raises:
        TypeError: ``gate`` is not a floating-point tensor, or ``up`` is no tensor of its dtype.
        ValueError: unknown ``kind``, ``layout`` or ``backend``; shapes or devices of gate and up differ; the last dimension
            of a packed tensor is odd.
        Unsupported: the named backend cannot run this call.

    >>> gate, up = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 4.0])
    >>> trinix.ops.glu(gate, up, "reglu").tolist()
    [0.0, 8.0]
    >>> trinix.ops.glu(torch.cat([gate, up]), kind="reglu").tolist()  # the first half is the gate
    [0.0, 8.0]
    """
    if not isinstance(kind, str) or kind not in _TRITON_FROM:
        raise ValueError(f"glu: kind must be one of {list(KINDS)}, got {kind!r}")
    return _glu(gate, up, kind, layout, backend)


def swiglu(gate: Tensor, up: Tensor | None = None, *, layout: str = "gate_first", backend: str = "auto") -> Tensor:
    """silu(gate) * up; see ``glu``."""
    return _glu(gate, up, "swiglu", layout, backend)


def geglu(
    gate: Tensor,
    up: Tensor | None = None,
    approximate: str = "none",
    *,
    layout: str = "gate_first",
    backend: str = "auto",
) -> Tensor:
    """gelu(gate) * up, gelu's tanh approximation with ``approximate="tanh"``; see ``glu``."""
    return _glu(gate, up, _geglu_kind(approximate), layout, backend)


def reglu(gate: Tensor, up: Tensor | None = None, *, layout: str = "gate_first", backend: str = "auto") -> Tensor:
    """relu(gate) * up; see ``glu``."""
    return _glu(gate, up, "reglu", layout, backend)


def _geglu_kind(approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return "geglu" if approximate == "none" else "geglu_tanh"


_plans = _native.Plans()


def _glu(gate, up, kind, layout, backend):
    # The eager path of small tensors is counted in tenths of a microsecond: what was called before is found first.
    named = None
    if not torch.compiler.is_compiling() and type(layout) is str and type(backend) is str:
        named = kind, layout, backend, dispatch.forced
        table = _plans.of.get(named)
        if table is not None:
            y = _triton_module.by_table(table, gate, up)
            if y is not None:
                return y
    _check(gate, up, layout)
    grad = (gate.requires_grad or (up is not None and up.requires_grad)) and torch.is_grad_enabled()
    if backend != "auto" or dispatch.forced is not None:
        return _named(gate, up, kind, layout, backend, grad, named)
    least = _TRITON_FROM[kind][1 if grad else 0]
    if least is _NEVER or torch.compiler.is_compiling() or not gate.is_cuda or _elements(gate, up) < least:
        return reference.forward(gate, up, kind, layout)
    plain = dispatch.plain(gate) if up is None else dispatch.plain(gate, up)
    if not plain or _against_triton(gate, up):
        return reference.forward(gate, up, kind, layout)
    return _launched(gate, up, kind, layout, grad, named)


def _check(gate, up, layout):
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        raise TypeError(f"glu: gate must be a floating-point tensor, got {_name(gate)}; convert it with gate.float()")
    if layout not in LAYOUTS:
        raise ValueError(f"glu: layout must be one of {list(LAYOUTS)}, got {layout!r}")
    if up is None:
        if not gate.ndim or gate.shape[-1] % 2:
            raise ValueError(
                f"glu: the last dimension of a packed gate must be even, got shape {list(gate.shape)}; "
                "pass up as the second argument if the two are separate tensors"
            )
        return
    if not isinstance(up, Tensor) or up.dtype != gate.dtype:
        raise TypeError(
            f"glu: up must be a tensor of gate's dtype {gate.dtype}, got {_name(up)}; convert it with up.to(gate.dtype)"
        )
    if up.shape != gate.shape:
        raise ValueError(
            f"glu: up must have gate's shape {list(gate.shape)}, got {list(up.shape)}; use up.expand_as(gate) to broadcast"
        )
    if up.device != gate.device:
        raise ValueError(
            f"glu: up must be on gate's device {gate.device}, got {up.device}; move it with up.to(gate.device)"
        )


def _name(value) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _elements(gate, up) -> int:
    return gate.numel() if up is not None else gate.numel() // 2


def _named(gate, up, kind, layout, backend, grad, named):
    backend = dispatch.resolve(backend)
    dispatch.load_named("glu", BACKENDS, backend, gate, up)
    if backend == "torch":
        return reference.forward(gate, up, kind, layout)
    if torch.compiler.is_compiling() or not (dispatch.plain(gate) if up is None else dispatch.plain(gate, up)):
        # in forward-mode differentiation the Function refuses, where the bare operator would lose the tangent
        grad = grad or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)
        return _RegisteredGlu.apply(gate, up, kind, layout) if grad else _forward_op(gate, up, kind, layout)
    return _launched(gate, up, kind, layout, grad, named)


def _launched(gate, up, kind, layout, grad, named):
    """y of plain tensors. Where there is C++, calls like one that has run are its own."""
    pending = None if named is None else _plans.begin(named, gate, up)
    if grad:
        return _apply(gate, up, kind, layout, pending)
    run = functools.partial(_triton().forward, gate, up, kind, layout)
    return run() if pending is None else pending.alone(run)


def triton_can_run(gate: Tensor, up: Tensor | None = None) -> bool:
    """Whether ``backend="triton"`` takes these tensors."""
    return _against_triton(gate, up) is None


def _against_triton(gate: Tensor, up: Tensor | None) -> str | None:
    return _triton_missing() or _triton().unsupported(gate, up)


@functools.cache
def _triton_missing() -> str | None:
    return dispatch.missing(_triton)


class _Glu(torch.autograd.Function):
    """The Triton kernels under autograd."""

    @staticmethod
    def forward(ctx, gate, up, kind, layout, pending):
        run = functools.partial(_triton().forward, gate, up, kind, layout)
        y = run() if pending is None else pending.forward(run)
        ctx.save_for_backward(gate, up)
        ctx.call, ctx.pending = (kind, layout, ctx.needs_input_grad[:2]), pending
        if pending is not None:
            pending.keeps((y,), (gate, up), functools.partial(_pull_back, *ctx.call))
        return y

    @staticmethod
    def backward(ctx, dy):
        return *_pull_back(*ctx.call, *ctx.saved_tensors, dy, pending=ctx.pending), None, None, None


def _pull_back(kind, layout, wanted, gate, up, dy, *, pending=None) -> tuple:
    """(gate's gradient, up's)."""
    if not dispatch.pulled_back_plainly(dy):
        grads = _formula_gradients(lambda gate, up: reference.forward(gate, up, kind, layout), (gate, up), dy, wanted)
        return _in_place(grads, wanted)[:2]

    def run():
        return _in_place(_triton().backward(gate, up, dy, kind, layout, *wanted), wanted)[:2]

    return run() if pending is None else pending.backward(run, (gate, up), (dy,))


_apply = dispatch.apply_of(_Glu)


def _in_place(grads, wanted):
    """The gradients that were wanted, as (gate's, up's, none for kind and layout)."""
    if wanted[0] and wanted[1]:
        return grads[0], grads[1], None, None
    return (grads[0], None, None, None) if wanted[0] else (None, grads[0], None, None)


def _formula_gradients(formula, inputs, dy, wanted):
    """The same derivative from PyTorch's operations: it can be differentiated again, and takes any kind of dy."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases: gate and up may be one tensor, or one be computed from the other
        inputs = [
            None if t is None else t.view_as(t) if again else t.detach().requires_grad_(want)
            for t, want in zip(inputs, wanted, strict=True)
        ]
        y = formula(*inputs)
    leaves = [t for t, want in zip(inputs, wanted, strict=True) if want]
    return torch.autograd.grad(y, leaves, dy, create_graph=again)


# A bias added before: the gradient of packed = F.linear(x, weight, bias) and its column sums, bias's gradient, come from one
# kernel, where autograd would read the whole gradient once more for the sums. The bias stays in the product: added to the
# rounded product instead, it would turn the sign of a gate near 0, and with it relu's gradient.


def sums_bias(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> bool:
    """Whether ``linear_glu`` runs this eager call: a gradient of the bias is wanted, and Triton takes it."""
    backend = dispatch.resolve(backend)
    return (
        bias.requires_grad
        and torch.is_grad_enabled()
        and bias.shape == weight.shape[:1]  # F.linear broadcasts others
        and (backend == "triton" or (backend == "auto" and x.is_cuda))
        and dispatch.plain(x, weight, bias)
        and not _against_triton(x, bias)
    )


def linear_glu(x: Tensor, weight: Tensor, bias: Tensor, kind: str) -> Tensor:
    """``glu(F.linear(x, weight, bias), kind=kind)`` where ``sums_bias``."""
    packed = F.linear(x, weight, bias.detach())
    named = "sum", kind
    table = _plans.of.get(named)
    if table is not None:
        y = _triton_module.by_table(table, packed, bias)
        if y is not None:
            return y
    return _apply_of_sum(packed, bias, kind, _plans.begin(named, packed, bias))


class _GluOfSum(torch.autograd.Function):
    """``_Glu`` of a packed tensor that holds a bias already, whose gradient this gives too."""

    @staticmethod
    def forward(ctx, packed, bias, kind, pending):
        run = functools.partial(_triton().forward, packed, None, kind, "gate_first")
        y = run() if pending is None else pending.forward(run)
        ctx.save_for_backward(packed, bias)
        ctx.call, ctx.pending = (kind, ctx.needs_input_grad[:2]), pending
        if pending is not None:
            pending.keeps((y,), (packed, bias), functools.partial(_pull_back_sum, *ctx.call))
        return y

    @staticmethod
    def backward(ctx, dy):
        return *_pull_back_sum(*ctx.call, *ctx.saved_tensors, dy, pending=ctx.pending), None, None


def _pull_back_sum(kind, wanted, packed, bias, dy, *, pending=None) -> tuple:
    """(packed's gradient, bias's)."""
    if not dispatch.pulled_back_plainly(dy):

        def formula(packed, bias):  # the bias changes y, and its value counts once
            shift = bias - bias.detach()
            return reference.forward(packed + shift.to(packed.dtype), None, kind, "gate_first")

        return _in_place(_formula_gradients(formula, (packed, bias), dy, wanted), wanted)[:2]

    def run():
        if wanted[1]:
            return _triton().backward_sums(packed, dy, kind, "gate_first", bias.dtype, wanted[0])
        return _triton().backward(packed, None, dy, kind, "gate_first")[0], None

    return run() if pending is None else pending.backward(run, (packed, bias), (dy,))


_apply_of_sum = dispatch.apply_of(_GluOfSum)


# The same kernels as registered operators, for calls that a raw launch must not see: torch.compile, fake tensors, dispatch
# modes, subclasses.


def _fake_forward(gate, up, kind, layout):
    # not _triton: torch.compile traces that, and what it keeps must stay as it was seen
    from trinix.kernels.triton import glu

    return glu.empty_output(gate, up, layout)


def _fake_backward(gate, up, dy, kind, layout, want_gate, want_up):
    return [torch.empty_like(gate) for _ in range(1 if up is None else want_gate + want_up)]


_forward_op = dispatch.register(
    "glu(Tensor gate, Tensor? up, str kind, str layout) -> Tensor",
    lambda gate, up, kind, layout: _triton().forward(gate, up, kind, layout),
    _fake_forward,
)
_backward_op = dispatch.register(
    "glu_backward(Tensor gate, Tensor? up, Tensor dy, str kind, str layout, bool want_gate, bool want_up) -> Tensor[]",
    lambda *call: _triton().backward(*call),
    _fake_backward,
)


class _RegisteredGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, kind, layout):
        ctx.save_for_backward(gate, up)
        ctx.call = kind, layout
        return _forward_op(gate, up, kind, layout)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        want_gate, want_up = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grads = _backward_op(gate, up, dy, *ctx.call, want_gate, want_up)
        return _in_place(grads, (want_gate, want_up))


def explain(op, gate: Tensor, *args, **kwargs) -> Explanation:
    """Which backend ``op(gate, *args, **kwargs)`` would run on, why, and with which configuration; runs nothing."""
    call = inspect.signature(op).bind(gate, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    up, layout = given["up"], given["layout"]
    kind = given.get("kind", op.__name__)
    if kind not in KINDS:
        raise ValueError(f"explain: kind must be one of {list(KINDS)}, got {kind!r}")
    if "approximate" in given:
        kind = _geglu_kind(given["approximate"])
    _check(gate, up, layout)
    name = op.__name__ if op.__name__ != "glu" else f"glu[{kind}]"
    backend = dispatch.resolve(given["backend"])
    dispatch.check_name(op.__name__, BACKENDS, backend)
    tensors = (gate,) if up is None else (gate, up)
    grad = any(t.requires_grad for t in tensors) and torch.is_grad_enabled()
    if backend == "torch":
        return Explanation(name, "torch", "named by the caller")
    if backend != "auto":
        module = dispatch.load_named(op.__name__, BACKENDS, backend, gate, up)
        return Explanation(name, backend, "named by the caller", module.describe(gate, up, layout))
    rejected = {}
    against = _against_triton(gate, up)
    least = _TRITON_FROM[kind][1 if grad else 0]
    if not gate.is_cuda:
        rejected["triton"] = f"needs a GPU tensor, got {gate.device.type}"
    elif against:
        rejected["triton"] = against
    elif not dispatch.plain(*tensors):
        rejected["triton"] = f"a raw launch does not see through {type(gate).__name__} or an active mode"
    elif least is _NEVER:
        rejected["triton"] = "PyTorch's own is one kernel too, and a launch costs more host time"
    elif _elements(gate, up) < least:
        with_grad = "with" if grad else "without"
        rejected["triton"] = (
            f"{_elements(gate, up)} elements {with_grad} gradient are bound by host time; faster from {least} on"
        )
    if rejected:
        return Explanation(name, "torch", "the first backend that is right and fastest here", rejected=rejected)
    return Explanation(name, "triton", "one kernel where PyTorch runs several", _triton().describe(gate, up, layout))
