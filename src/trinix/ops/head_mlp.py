"""Per-head MLPs  O_h = f(X_h W1_h + b1_h) W2_h + b2_h, and gated  O_h = (f(X_h Wg_h) * (X_h W1_h + b1_h)) W2_h + b2_h.

==========  =========================================  ==================================================================
argument    shape                                      what
==========  =========================================  ==================================================================
x           [H, B, D], or [B, D] for all heads         the rows of each head
w1          [H, D, E]                                  up projection
w2          [H, E, D]                                  down projection
b1, b2      [H, E], [H, D], or None                    biases; b1 is of the projection by w1, not of the gate's
w_gate      [H, D, E], or None                         with it the gated form
result      [H, B, D]; [B, D] with reduce="mean"       "mean": the average over the heads of what else were the result
==========  =========================================  ==================================================================

``kind`` names f: any kind of ``ops.activation``, leaky_relu with slope 0.01 and softplus with beta 1 and threshold 20. With
w_gate also by the gated units' names of ``ops.glu``: "swiglu" (silu), "geglu" (gelu), "geglu_tanh", "reglu",
"quick_geglu", "bilinear" (none), "glu" (sigmoid).

The hidden values, [H, B, E], are computed a tile at a time and not stored. Backward saves the inputs only and computes
them again; beyond D = 128, in plain calls on Hopper, it holds those of some rows and heads at a time and their gradients,
256 MiB at most, and where the rows take more than that, float32 sums of those heads' weights' gradients. It writes the wanted
gradients, each laid out as its input where that is dense for x, contiguous for the rest.
Kernels: D up to 256; float16, bfloat16 and float32; any H, B, E (0 too) and strides, so that [B, H, D] data is passed as
``x.transpose(0, 1)`` without a copy. Sums are float32, and hidden values are rounded to the dtype between the two products, as
PyTorch's are. float32 is never tf32: float64 inside where tensor cores take it (sm_80, sm_90), else float32 with sums over
tiles in float64. Gradients are the same bits on every run. Where the heads and E are few, the weights' gradients are summed in
float32 parts, which need at most twice dO's size of memory.
A second derivative (``create_graph=True``) goes through the PyTorch formula.

"auto" takes PyTorch's formula, which stores the hidden values, for CPU tensors, for float32 and float64, and for
D > 256: an ordinary two-layer MLP is a case for large matrix products, not for this op. With gradients it does so for
D > 128, but for plain calls on Hopper from D = 192 and 4 H B D E = 2^32 on.
Backend "hopper" (compute capability 9.0): plain calls with x [H, B, D], D of 64, 128 or 256, without
biases and gate, in half types, rows at multiples of 16 bytes; "auto" takes it from sizes on where it is the fastest.
Under ``torch.autocast`` all tensors are cast to its dtype first, as for PyTorch's matrix products. Under ``torch.compile``
the op stays whole on a GPU.

Source: a fused per-head MLP with recomputation in backward, after arXiv:2205.14135 (tiles, recomputation) and
arXiv:2002.05202 (gated MLPs).
"""

import functools
import inspect
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trinix import dispatch
from trinix.dispatch import Explanation
from trinix.kernels import _native
from trinix.kernels.torch import head_mlp as reference
from trinix.kernels.torch.activation import FORMULAS

_triton_module = None  # kept by hand: torch.compile traces through functools.cache, and says so
_hopper_module = None


def _triton():
    global _triton_module
    if _triton_module is None:
        from trinix.kernels.triton import head_mlp

        _triton_module = head_mlp
    return _triton_module


def _hopper():
    global _hopper_module
    if _hopper_module is None:
        from trinix.kernels.hopper import head_mlp

        _hopper_module = head_mlp
    return _hopper_module


def _torch():
    return reference


BACKENDS = {"hopper": _hopper, "triton": _triton, "torch": _torch}
GATED_KINDS = {
    "swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu", "quick_geglu": "quick_gelu",
    "bilinear": "none", "glu": "sigmoid",
}  # fmt: skip
KINDS = (*FORMULAS, *GATED_KINDS)
_FUSED_DTYPES = (torch.float16, torch.bfloat16)  # of "auto"
# Of "auto". Beyond, backward in one kernel is slower than PyTorch's (M-7: 1.7 times); by stages, where that can be, it is not
MOST_D, MOST_D_WITH_GRADIENT = 256, 128


def head_mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    kind: str = "silu",
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    w_gate: Tensor | None = None,
    reduce: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """One MLP a head, fused; differentiable in every tensor. See the top of this file for shapes.

    Args:
        x: ``[H, B, D]``, or ``[B, D]`` shared by all heads.
        w1, w2: ``[H, D, E]`` and ``[H, E, D]``, of x's dtype and device.
        kind: the activation; with ``w_gate`` also the name of a gated unit.
        b1, b2: ``[H, E]`` and ``[H, D]``.
        w_gate: ``[H, D, E]``: the gated form f(x w_gate) * (x w1 + b1).
        reduce: None, or "mean" for the average over heads, ``[B, D]``.
        backend: "auto", "hopper", "triton" or "torch". A named backend never falls back.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not of x's dtype (outside of autocast).
        ValueError: unknown ``kind``, ``reduce`` or ``backend``; a gated unit's name without ``w_gate``; shapes or devices
            that do not fit x's.
        Unsupported: the named backend cannot run this call.

    >>> x, w1, w2 = torch.ones(2, 3, 4), torch.ones(2, 4, 8), torch.ones(2, 8, 4)
    >>> trinix.ops.head_mlp(x, w1, w2, "relu").shape, float(trinix.ops.head_mlp(x, w1, w2, "relu")[0, 0, 0])
    (torch.Size([2, 3, 4]), 32.0)
    """
    what = key = None
    if (
        not torch.compiler.is_compiling()
        and type(kind) is str
        and (reduce is None or type(reduce) is str)
        and type(backend) is str
        and isinstance(x, Tensor)
        and not _autocast(x)
    ):
        what = kind, reduce, backend, dispatch.forced
        table = _plans.of.get(what)
        if table is not None:
            o = _native.launches().by_table(table, x, w1, w2, b1, b2, w_gate)
            if o is not None:
                return o
        if b1 is None and b2 is None and w_gate is None and reduce is None:
            key = _key(x, w1, w2, kind, backend)
            call = _prepared.get(key)
            if call is not None:
                pending = _plans.begin(what, x, w1, w2, None, None, None) if call.planned else None
                if pending is not None:
                    named = dispatch.resolve(backend)
                    return _planned(x, w1, w2, None, None, None, call.kind, False, named, key[-1], pending)
                if key[-1]:
                    return _apply_prepared(x, w1, w2, call)
                return call.forward.forward(x, w1, w2, None, None, None, call.kind, False)
    activation = _activation(kind, w_gate is not None)
    mean = _is_mean(reduce)
    inputs = _cast(x, w1, w2, b1, b2, w_gate)
    _check(*inputs)
    given = [t for t in inputs if t is not None]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    named = dispatch.resolve(backend)
    if named != "auto":
        dispatch.load_named("head_mlp", BACKENDS, named, *inputs, activation, mean, grad)
    elif _against_auto(inputs, mean, grad):
        named = "torch"
    if named == "torch":
        return reference.forward(*inputs, activation, mean)
    call = activation, mean, named
    if torch.compiler.is_compiling() or not dispatch.plain(*given):
        if named == "auto" and not torch.compiler.is_compiling():
            return reference.forward(*inputs, activation, mean)
        # in forward-mode differentiation the Function refuses, where the bare operator would lose the tangent
        grad = grad or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)
        return (_RegisteredHeadMLP.apply if grad else _forward_op)(*inputs, *call)
    modules = [_module(named, inputs, activation, mean, backward) for backward in (False, grad)]
    planned = what is not None and not (grad and modules[1].by_stages(*inputs, mean))
    if key is not None:
        _prepare(key, activation, modules, planned)
    pending = _plans.begin(what, *inputs) if planned else None
    return _planned(*inputs, *call, grad, pending)


# Calls like one that has run are C++'s, where there is that.
_plans = _native.Plans()


def _planned(x, w1, w2, b1, b2, w_gate, kind, mean, named, grad, pending):
    """O of plain tensors."""
    call = x, w1, w2, b1, b2, w_gate, kind, mean, named
    if grad:
        return _apply(*call, pending)
    return _run_forward(*call) if pending is None else pending.alone(functools.partial(_run_forward, *call))


# ---- calls like one before: without biases, gate and mean ----------------------------------------------------------------

_prepared = {}  # key -> what calls of one kind share; emptied when it has grown


def _key(x, w1, w2, kind, backend) -> tuple | None:
    """All that checks, choice of backend and plans look at; None for a call that needs a look of its own. The last entry:
    whether autograd records."""
    if (
        not dispatch.plain(x, w1, w2) or type(kind) is not str or type(backend) is not str
        or _autocast(x)
    ):  # fmt: skip
        return None
    return (
        x.shape, x.stride(), w1.shape, w1.stride(), w2.shape, w2.stride(), x.dtype, w1.dtype, w2.dtype, x.device, w1.device,
        w2.device, (x.data_ptr() | w1.data_ptr() | w2.data_ptr()) & 15, kind, backend, dispatch.forced,
        torch.is_grad_enabled() and (x.requires_grad or w1.requires_grad or w2.requires_grad),
    )  # fmt: skip


class _Prepared(NamedTuple):
    kind: str
    forward: ModuleType
    backward: ModuleType
    planned: bool  # whether its launches may have plans: products by PyTorch among them have none


def _prepare(key, kind, modules, planned):
    """Keep what calls of this kind share."""
    if len(_prepared) >= 10_000:
        _prepared.clear()
    _prepared[key] = _Prepared(kind, *modules, planned)


class _PreparedHeadMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, w2, call):
        ctx.save_for_backward(x, w1, w2)
        ctx.call = call
        return call.forward.forward(x, w1, w2, None, None, None, call.kind, False)

    @staticmethod
    def backward(ctx, dy):
        x, w1, w2 = ctx.saved_tensors
        call, inputs = ctx.call, (x, w1, w2, None, None, None)
        wanted = *ctx.needs_input_grad[:3], False, False, False
        if dispatch.pulled_back_plainly(dy):
            grads = call.backward.backward(*inputs, dy, call.kind, False, wanted)
        else:
            grads = _formula_gradients(inputs, dy, call.kind, False, wanted)
        return *grads[:3], None


_apply_prepared = dispatch.apply_of(_PreparedHeadMLP)


def _module(named, inputs, kind, mean, backward):
    """The kernels of one pass."""
    if named == "triton" or (named == "auto" and _against_hopper(inputs, kind, mean, backward)):
        return _triton()
    return _hopper()


def _run_forward(x, w1, w2, b1, b2, w_gate, kind, mean, named):
    inputs = x, w1, w2, b1, b2, w_gate
    return _module(named, inputs, kind, mean, False).forward(*inputs, kind, mean)


def _run_backward(x, w1, w2, b1, b2, w_gate, dy, kind, mean, named, wanted):
    inputs = x, w1, w2, b1, b2, w_gate
    return _module(named, inputs, kind, mean, True).backward(*inputs, dy, kind, mean, tuple(wanted))


def _activation(kind: str, gated: bool) -> str:
    """The activation that a kind means."""
    if not isinstance(kind, str):
        raise ValueError(f"head_mlp: kind must be one of {list(KINDS)}, got {kind!r}")
    if gated and kind in GATED_KINDS:
        return GATED_KINDS[kind]
    if kind in FORMULAS:
        return kind
    if kind in GATED_KINDS:
        raise ValueError(f"head_mlp: kind {kind!r} is a gated unit and needs w_gate; pass it, or name an activation")
    raise ValueError(f"head_mlp: kind must be one of {list(KINDS)}, got {kind!r}")


def _is_mean(reduce: str | None) -> bool:
    if reduce not in (None, "mean"):
        raise ValueError(f"head_mlp: reduce must be None or 'mean', got {reduce!r}")
    return reduce is not None


def _autocast(x) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # which knows no meta device


def _cast(*tensors):
    """The tensors in autocast's dtype where it is on for x's device, as PyTorch casts the operands of a matrix product."""
    x = tensors[0]
    if not isinstance(x, Tensor) or not _autocast(x):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    wide = torch.float64
    return tuple(
        [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != wide else t for t in tensors]
    )


def _check(x, w1, w2, b1, b2, w_gate):
    if not isinstance(x, Tensor) or not x.is_floating_point():
        cure = "x.float()" if isinstance(x, Tensor) else "torch.as_tensor(x)"
        raise TypeError(f"head_mlp: x must be a floating-point tensor, got {_name(x)}; convert it with {cure}")
    if x.dim() not in (2, 3):
        raise ValueError(
            f"head_mlp: x must be [H, B, D], or [B, D] for all heads, got shape {list(x.shape)}; reshape it"
        )
    if not isinstance(w1, Tensor):
        raise TypeError(f"head_mlp: w1 must be a tensor [H, D, E], got {_name(w1)}; make it one")
    if w1.dim() != 3:
        cure = "add the missing dimension with w1.unsqueeze(0)" if w1.dim() == 2 else "reshape it"
        raise ValueError(f"head_mlp: w1 must be [H, D, E], got {list(w1.shape)}; {cure}")
    h, d, e = w1.shape
    if x.shape[-1] != d or (x.dim() == 3 and x.shape[0] != h):
        wanted = f"[{h}, B, {d}] or [B, {d}]"
        raise ValueError(
            f"head_mlp: x must be {wanted} for w1 of shape {[h, d, e]}, got {list(x.shape)}; x's last dimension is w1's second"
        )
    dtype, device = x.dtype, x.device
    for name, t, shape in (
        ("w1", w1, (h, d, e)), ("w2", w2, (h, e, d)), ("b1", b1, (h, e)), ("b2", b2, (h, d)), ("w_gate", w_gate, (h, d, e)),
    ):  # fmt: skip
        if t is None and name not in ("w1", "w2"):
            continue
        if not isinstance(t, Tensor) or t.dtype != dtype:
            cure = f"convert it with {name}.to(x.dtype)" if isinstance(t, Tensor) else "make it one"
            raise TypeError(f"head_mlp: {name} must be a tensor of x's dtype {dtype}, got {_name(t)}; {cure}")
        if t.shape != shape:
            raise ValueError(
                f"head_mlp: {name} must be {list(shape)} for w1 of shape {[h, d, e]}, got {list(t.shape)}; "
                "w1 is [H, D, E], w2 is [H, E, D]"
            )
        if t.device != device:
            raise ValueError(
                f"head_mlp: {name} must be on x's device {device}, got {t.device}; move it with {name}.to(x.device)"
            )


def _name(value) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def triton_can_run(x: Tensor, w1: Tensor) -> bool:
    """Whether ``backend="triton"`` takes these tensors."""
    return x.dim() > 0 and (_triton_missing() or _triton().unsupported(x, w1)) is None


@functools.cache
def _triton_missing() -> str | None:
    return dispatch.missing(_triton)


@functools.cache
def _hopper_missing() -> str | None:
    return dispatch.missing(_hopper)


def _against_hopper(inputs, kind, mean, backward) -> str | None:
    """Why "auto" takes the portable kernels for a pass, or None."""
    reason = _hopper_missing() or _hopper().unsupported(*inputs, kind, mean, backward)
    if reason:
        return reason
    heads, d, e = inputs[1].shape
    processors = _hopper().processors(inputs[0].get_device())
    wins = hopper_wins(heads, inputs[0].shape[1], d, e, backward, processors)
    return None if wins else "the portable kernels are faster at this size"


def hopper_wins(heads: int, rows: int, d: int, e: int, backward: bool, processors: int) -> bool:
    """Whether Hopper's kernels of a pass are the faster ones, by measurement: from M-3 on, not at M-1 and M-2.

    In forward its programs own 128 rows and more, the portable ones 64: where those do not fill the card, (1, 8192, 128, 2048) takes 22.2
    us for 19.0, and (1, 8192, 256, 4096) 96.7 for 57.2. At D = 256 it takes many rounds to gain anything: M-7 234.1 for 236.6, (8, 2048,
    256, 1024) 31.4 for 31.2. In backward a program owns 128 columns of E, and there must be enough of them for the card (M-5 leaves half of it idle);
    by stages, at D = 256, it owns rows, and few rows are shared.
    """
    if 4 * heads * rows * d * e < 1 << 32:
        return False
    if not backward:
        programs = heads * -(-rows // 64)
        return d == 64 or programs > (processors if d == 128 else 4 * processors)
    if d == 256:
        return True
    programs = heads * -(-e // 128)
    return programs >= 0.8 * processors * -(-programs // processors)


def _against_auto(inputs: tuple, mean: bool, grad: bool) -> str | None:
    """Why "auto" takes PyTorch, or None. Shapes of B and E play no part under torch.compile, where they may be symbols."""
    x = inputs[0]
    if not x.is_cuda:
        return f"needs a GPU tensor, got {x.device.type}"
    if x.dtype not in _FUSED_DTYPES:
        return f"{x.dtype} has no tensor cores of full accuracy: PyTorch's products are faster, and store the hidden values"
    most = MOST_D_WITH_GRADIENT if grad else MOST_D
    if x.shape[-1] > most and not (grad and _by_stages(inputs, mean)):
        with_grad = " with gradient" if grad else ""
        return f"D = {x.shape[-1]} is more than {most}{with_grad}: large matrix products keep the tensor cores busy by themselves"
    return _triton_missing()


def stages_win(heads: int, d: int, e: int, rows: int) -> bool:
    """Whether forward and a backward by stages take less time than PyTorch's: 1.29 times at M-7, 1.24 at (8, 2048, 256, 1024), 1.14
    at (32, 512, 256, 256), 1.04 at (16, 4096, 192, 1024); 0.99 at (4, 1024, 256, 512), 0.94 at (16, 2048, 160, 640)."""
    return 192 <= d <= MOST_D and 4 * heads * rows * d * e >= 1 << 32


def _by_stages(inputs: tuple, mean: bool) -> bool:
    """Whether backward of a call beyond D = 128 is the kernels' after all."""
    if torch.compiler.is_compiling() or not stages_win(*inputs[1].shape, inputs[0].shape[-2]) or _triton_missing():
        return False
    return dispatch.plain(*[t for t in inputs if t is not None]) and _triton().by_stages(*inputs, mean)


class _HeadMLP(torch.autograd.Function):
    """The kernels under autograd."""

    @staticmethod
    def forward(ctx, x, w1, w2, b1, b2, w_gate, kind, mean, named, pending):
        inputs, call, wanted = (x, w1, w2, b1, b2, w_gate), (kind, mean, named), ctx.needs_input_grad[:6]
        run = functools.partial(_run_forward, *inputs, *call)
        o = run() if pending is None else pending.forward(run)
        ctx.save_for_backward(*inputs)
        ctx.call, ctx.pending = (call, wanted), pending
        if pending is not None:
            pending.keeps((o,), inputs, functools.partial(_pull_back, call, wanted))
        return o

    @staticmethod
    def backward(ctx, dy):
        return *_pull_back(*ctx.call, *ctx.saved_tensors, dy, pending=ctx.pending), None, None, None, None


def _pull_back(call, wanted, x, w1, w2, b1, b2, w_gate, dy, *, pending=None):
    """The inputs' gradients."""
    inputs = x, w1, w2, b1, b2, w_gate
    if not dispatch.pulled_back_plainly(dy):
        return _formula_gradients(inputs, dy, *call[:2], wanted)
    run = functools.partial(_run_backward, *inputs, dy, *call, wanted)
    return run() if pending is None else pending.backward(run, inputs, (dy,))


_apply = dispatch.apply_of(_HeadMLP)


def _formula_gradients(inputs, dy, kind, mean, wanted):
    """The same derivative from PyTorch's operations: it can be differentiated again, and takes any kind of dy."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases: two inputs may be one tensor, or one be computed from another
        inputs = [
            None if t is None else t.view_as(t) if again else t.detach().requires_grad_(want)
            for t, want in zip(inputs, wanted, strict=True)
        ]
        y = reference.forward(*inputs, kind, mean)
    leaves = [t for t, want in zip(inputs, wanted, strict=True) if want]
    grads = iter(torch.autograd.grad(y, leaves, dy, create_graph=again))
    return [next(grads) if want else None for want in wanted]


# The same kernels as registered operators, for calls that a raw launch must not see: torch.compile, fake tensors, dispatch
# modes, subclasses.

_INPUTS = "Tensor x, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2, Tensor? w_gate"


def _fake_forward(x, w1, w2, b1, b2, w_gate, kind, mean, named):
    # not _triton: torch.compile traces that, and what it keeps must stay as it was seen
    from trinix.kernels.triton import head_mlp

    return head_mlp.empty_output(x, w1, mean)


def _fake_backward(x, w1, w2, b1, b2, w_gate, dy, kind, mean, named, wanted):
    h, d, e = w1.shape
    shapes = (None, (h, d, e), (h, e, d), (h, e), (h, d), (h, d, e))
    return [
        torch.empty_like(x) if shape is None else w1.new_empty(shape)
        for shape, want in zip(shapes, wanted, strict=True)
        if want
    ]


_forward_op = dispatch.register(
    f"head_mlp({_INPUTS}, str kind, bool mean, str backend) -> Tensor",
    _run_forward,
    _fake_forward,
)
_backward_op = dispatch.register(
    f"head_mlp_backward({_INPUTS}, Tensor dy, str kind, bool mean, str backend, bool[] wanted) -> Tensor[]",
    lambda *call: [t for t in _run_backward(*call) if t is not None],
    _fake_backward,
)


class _RegisteredHeadMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, w2, b1, b2, w_gate, *call):
        ctx.save_for_backward(x, w1, w2, b1, b2, w_gate)
        ctx.call = call
        return _forward_op(x, w1, w2, b1, b2, w_gate, *call)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        wanted = [ctx.needs_input_grad[i] for i in range(6)]
        grads = iter(_backward_op(*ctx.saved_tensors, dy, *ctx.call, wanted))
        return *[next(grads) if want else None for want in wanted], None, None, None


def explain(op, x: Tensor, *args, **kwargs) -> Explanation:
    """Which backend ``head_mlp(x, *args, **kwargs)`` would run on, why, and with which configuration; runs nothing."""
    call = inspect.signature(op).bind(x, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    inputs = _cast(*[given[name] for name in ("x", "w1", "w2", "b1", "b2", "w_gate")])
    _check(*inputs)
    gated = inputs[5] is not None
    kind, mean = _activation(given["kind"], gated), _is_mean(given["reduce"])
    name = f"head_mlp[{kind}{', gated' if gated else ''}]"
    backend = dispatch.resolve(given["backend"])
    dispatch.check_name("head_mlp", BACKENDS, backend)
    tensors = [t for t in inputs if t is not None]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if backend == "torch":
        return Explanation(name, "torch", "named by the caller")
    if backend != "auto":
        module = dispatch.load_named("head_mlp", BACKENDS, backend, *inputs, kind, mean, grad)
        return Explanation(name, backend, "named by the caller", module.describe(*inputs, kind, mean))
    against = _against_auto(inputs, mean, grad)
    if not against and not dispatch.plain(*tensors):
        against = f"a raw launch does not see through {type(x).__name__} or an active mode"
    if against:
        rejected = {"hopper": against, "triton": against}
        return Explanation(name, "torch", "the first backend that is right and fastest here", rejected=rejected)
    if grad and inputs[0].shape[-1] > MOST_D_WITH_GRADIENT:
        why = "one kernel forward; backward by stages, which writes hidden values of some rows at a time"
    else:
        why = "one kernel a pass, hidden values never stored"
    reasons = [_against_hopper(inputs, kind, mean, backward) for backward in (False, True)]
    chosen = "triton" if reasons[0] else "hopper"
    if grad:
        why += f"; backward {'triton' if reasons[1] else 'hopper'}"
    rejected = {"hopper": reasons[0]} if reasons[0] else {}
    return Explanation(name, chosen, why, BACKENDS[chosen]().describe(*inputs, kind, mean), rejected)
