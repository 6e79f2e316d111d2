"""Attention  out = softmax(z) v,  z = scale q k^T and what is added to it or hidden from it; forward and backward.

For batch b, query head h (key head h // (H / Hk)), query i of Sq, key j of Sk::

    z[i, j] = scale q[i] . k[j]
    z       = softcap tanh(z / softcap)                    if softcap > 0                       Gemma 2, arXiv:2408.00118
    z      -= alibi_slopes[h] |i + Sk - Sq - j|            ALiBi                                arXiv:2108.12409
    z      += bias[b, h, i, j]
    z       = -inf                                         where mask[b, h, i, j] is False, or j lies outside the window
    lse[i]  = log(sum_j exp(z[i, j]) + exp(sink[h]))       the last term only with a sink       gpt-oss, arXiv:2508.10925
    out[i]  = sum_j keep[i, j] exp(z[i, j] - lse[i]) v[j]  keep: 1, or dropout's mask over 1 - dropout_p

Query i stands at key i + Sk - Sq: aligned at the bottom right, as cached decoding needs it (the same as flash-attn from 2.1 on;
``torch.nn.functional.scaled_dot_product_attention`` aligns at the top left). ``window=(left, right)`` shows it the keys from
i + Sk - Sq - left to i + Sk - Sq + right, None for no bound; ``causal=True`` means right = 0. A row that sees no key has
out 0 and lse -inf (with a sink: lse = sink).

Shapes: q [B, Sq, H, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv], H a multiple of Hk (grouped heads are read in place, never copied);
out [B, Sq, H, Dv], lse [B, H, Sq]. Variable lengths: q [T, H, D], k [Tk, Hk, D], v [Tk, Hk, Dv], sequence b being the rows
cu_seqlens[b] to cu_seqlens[b + 1]; out [T, H, Dv], lse [H, T]; rows behind the last sequence give 0 and -inf.

dtypes: q, k, v, out of one floating dtype, under ``torch.autocast`` its dtype, to which q, k and v are cast as PyTorch casts
them for its own attention (not float64, and not the options: a bias as low as float32's least number would be -inf in bfloat16);
lse float32 (float64 for float64), the natural logarithm. Scores, softmax and sums are float32 inside the kernels, probabilities
and dz are rounded to the inputs' dtype before they are multiplied; float32 inputs are multiplied as float32, not as TF32.
Differentiable in q, k, v, bias and sink, and through lse.

Backward saves q, k, v, out and lse, and makes z again: memory grows with S, not with S x S. The gradient of a bias has the
bias's own shape. Dropout draws its mask again from a seed; the mask is a function of (seed, b, h, i, j), the same in every
backend of ours. Without ``deterministic=True`` dq may differ in its last bits from run to run. A second derivative
(``create_graph=True``) goes through the PyTorch formula, which holds Sq x Sk scores.

With variable lengths the Hopper kernels read whole tiles, and multiply the rows of the next sequence in them by 0: an infinity
or a NaN in the first rows of a sequence may turn results of the sequence before it into NaN. The Triton kernels read none.

Strides are taken as they are where the last dimension is dense; otherwise that tensor is copied. Under ``torch.compile`` a call
on a GPU stays one operator.
"""

import functools
import inspect
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from trinix import dispatch
from trinix.dispatch import Explanation
from trinix.kernels import _native
from trinix.kernels.torch import attention as reference


class Options(NamedTuple):
    """Everything about a call but q, k and v, checked and in one form: what every kernel module takes."""

    causal: bool = False  # window_right is 0
    window_left: int = -1  # -1: no bound
    window_right: int = -1
    scale: float = 1.0
    softcap: float = 0.0
    bias: Tensor | None = None  # [B|1, H|1, Sq|1, Sk]
    mask: Tensor | None = None  # bool, [B|1, H|1, Sq|1, Sk|1], True where a key is seen
    alibi_slopes: Tensor | None = None  # [H] or [B, H]
    sink: Tensor | None = None  # [H]
    dropout_p: float = 0.0
    seed: Tensor | None = None  # int64 [1] on the device, with dropout
    cu_seqlens_q: Tensor | None = None  # int32 [sequences + 1]
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0  # with cu_seqlens
    max_seqlen_k: int = 0
    deterministic: bool = False


_triton_module = None
_hopper_module = None
_cudnn_module = None
_flash_attn_module = None


def _triton():
    global _triton_module
    if _triton_module is None:
        from trinix.kernels.triton import attention

        _triton_module = attention
    return _triton_module


def _hopper():
    global _hopper_module
    if _hopper_module is None:
        from trinix.kernels.hopper import attention

        _hopper_module = attention
    return _hopper_module


def _cudnn():
    global _cudnn_module
    if _cudnn_module is None:
        from trinix.kernels.cudnn import attention

        _cudnn_module = attention
    return _cudnn_module


def _flash_attn():
    global _flash_attn_module
    if _flash_attn_module is None:
        from trinix.kernels.flash_attn import attention

        _flash_attn_module = attention
    return _flash_attn_module


def _torch():
    return reference


BACKENDS = {
    "hopper": _hopper, "cudnn": _cudnn, "flash_attn": _flash_attn, "triton": _triton, "torch": _torch,
}  # fmt: skip


def order(
    capability: tuple[int, int], d: int, dv: int, causal: bool, backward: bool, keys: int, fa4: bool = False
) -> tuple[str, ...]:
    """Which backends "auto" asks on a card, the fastest first; readings: docs/perf/attention.md.

    ``keys``: of one sequence; ``fa4``: whether FlashAttention 4 can run the call and is faster.
    """
    if capability[0] != 9:
        return "flash_attn", "cudnn", "triton"
    if fa4:
        return "flash_attn", "hopper", "cudnn", "triton"
    if backward:  # 0.63 against 0.85 ms at (1, 4096, 16, 192 and 128)
        cudnn_first = causal and 128 < d < 256
    else:  # 0.63 against 0.67 ms at (2, 2048, 128, 192 and 128)
        cudnn_first = causal and 128 < d <= 192 and dv <= 128 and keys <= 2048
    if cudnn_first:
        return "cudnn", "hopper", "flash_attn", "triton"
    return "hopper", "cudnn", "flash_attn", "triton"


def fa4_is_faster(d: int, dv: int, causal: bool, backward: bool, rows: int, keys: int, group: int = 1) -> bool:
    """Where FlashAttention 4 was measured faster on Hopper than the kernels here, and the card needs longer than its calls: these
    cost the host 0.1 to 0.2 ms. ``group``: heads of q to one of k."""
    scores = rows * keys // (2 if causal else 1)
    if 128 < d <= 192 and dv <= 128:  # (1, 4096, 16, 192 and 128): forward 0.24 against 0.26 ms, causal 0.14 and 0.16
        return scores >= 1 << 27  # backward 0.98 and 1.60, causal 0.57 and 0.84
    if not backward:
        return False
    if d > 64:
        # full and D of 256 0.99 to 1.16; causal AS-128-16384 0.97 on two cards, 1.01 on two before, 4096 and 8192 1.00 to 1.04,
        # AS-128-1024 0.543 against 0.545 and AS-128-2048 0.769 against 0.761, of different runs
        return causal and d <= 128 and group == 1 and scores >= 1 << 28 and keys >= 16384
    # AS-64-*: 8192 full 0.985, causal 1.005, 16384 0.978 and 0.959, 1024 to 4096 1.00 to 1.04; AC-gqa-1-full 1.11
    return scores >= 1 << 28 and group == 1 and keys >= (16384 if causal else 8192)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T + ...) v; differentiable in q, k, v, bias and sink. The formula is at the top of this file.

    Args:
        q: ``[B, Sq, H, D]``; with ``cu_seqlens_q`` ``[T, H, D]``.
        k: ``[B, Sk, Hk, D]`` or ``[Tk, Hk, D]``, Hk a divisor of H.
        v: ``[B, Sk, Hk, Dv]`` or ``[Tk, Hk, Dv]``.
        causal: a query sees no key after it; with Sq != Sk the last query stands at the last key.
        window: (left, right), how many keys before and after its own place a query sees; None: no bound.
        scale: of q k^T; 1 / sqrt(D) if None.
        softcap: the bound that tanh gives to scores, finite; 0 for none.
        bias: added to the scores, floating point, broadcastable to ``[B, H, Sq, Sk]``; gets a gradient of its own shape.
        mask: bool, broadcastable to ``[B, H, Sq, Sk]``, True where a key is seen; ``[B, 1, 1, Sk]`` hides padding.
        alibi_slopes: ``[H]`` or ``[B, H]``; no gradient.
        sink: ``[H]``, a logit of each head that joins the normaliser.
        dropout_p: probability that a softmax weight is dropped; the others are divided by 1 - dropout_p. 0 in evaluation.
        cu_seqlens_q, cu_seqlens_k: int32 ``[sequences + 1]``, from 0 on, not falling, on q's device; cu_seqlens_k is
            cu_seqlens_q if None. Not with bias or mask.
        max_seqlen_q, max_seqlen_k: the greatest lengths, or more; if None they are read from the device, which waits for it. They are
            not compared with cu_seqlens: queries behind a number that is too small are left out. Nor are, where they are given
            on a GPU, cu_seqlens compared with the rows that there are.
        return_lse: return (out, lse).
        deterministic: the same bits on every run, in backward too; also after ``torch.use_deterministic_algorithms(True)``.
        backend: "auto", "hopper", "cudnn", "flash_attn", "triton" or "torch". A named backend never falls back.

    Returns:
        out ``[B, Sq, H, Dv]`` or ``[T, H, Dv]`` in q's dtype; with ``return_lse`` also lse ``[B, H, Sq]`` or ``[H, T]``.

    Raises:
        TypeError: a tensor is missing or of a wrong dtype, or what must be True or False is neither.
        ValueError: shapes, devices or options that do not fit.
        Unsupported: the named backend cannot run this call.

    >>> q = torch.zeros(1, 2, 1, 4)
    >>> v = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> trinix.ops.attention(q, q, v, causal=True).flatten().tolist()
    [1.0, 2.0]
    """
    if type(return_lse) is not bool:
        dispatch.flags("attention", return_lse=return_lse)
    compiling = torch.compiler.is_compiling()
    if compiling or torch._C._is_any_autocast_enabled():
        q, k, v = _cast(q, k, v)
    key = named_call = None
    if (
        not compiling
        and bias is None and mask is None and alibi_slopes is None and sink is None and cu_seqlens_q is None
        and cu_seqlens_k is None and max_seqlen_q is None and max_seqlen_k is None and type(dropout_p) in _NUMBERS and dropout_p == 0
    ):  # fmt: skip
        if not return_lse:
            named_call = _named(causal, window, scale, softcap, deterministic, backend)
            table = _plans.of.get(named_call)
            if table is not None:
                out = _native.launches().by_table(table, q, k, v)
                if out is not None:
                    return out
        key = _kind(q, k, v, causal, window, scale, softcap, deterministic, backend)
        call = _prepared.get(key)
        if call is not None:
            return _run_prepared(call, q, k, v, key[-1], return_lse, named_call)
    options = checked(
        q, k, v, causal, window, scale, softcap, bias, mask, alibi_slopes, sink, dropout_p, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k, deterministic,
    )  # fmt: skip
    grad = torch.is_grad_enabled() and _wants_gradient(q, k, v, options)
    named = dispatch.resolve(backend)
    if named != "auto":
        dispatch.check_name("attention", BACKENDS, named)
        # torch.compile has no addresses to look at: there the operator asks, when it runs
        for backward in () if compiling else (False, True) if grad else (False,):
            dispatch.load_named("attention", BACKENDS, named, q, k, v, options, backward)
    elif not q.is_cuda:
        named = "torch"
    if named == "torch" or not q.numel() or not k.numel() or not v.numel():
        ends = cu_seqlens_q  # which the formula reads: where there is nothing to read, it is an operator
        if ends is None or not (compiling or ends.is_meta or isinstance(ends, FakeTensor)):
            out, lse = reference.forward(q, k, v, options)
            return (out, lse) if return_lse else out
        named = "torch"
    if compiling or named == "torch" or not dispatch.plain(*_tensors(q, k, v, options)):
        out, lse = _registered(q, k, v, options, named, grad, return_lse)
        return (out, lse) if return_lse else out
    pair = (named, named) if named != "auto" else pick(q, k, v, options, grad)
    # the first call of a kind already: its backward may come after many others
    if key is not None and (call := _prepare(key, q, k, v, options, pair)) is not None:
        return _run_prepared(call, q, k, v, grad, return_lse, named_call)
    if grad and pair != _FORMULA:
        return _apply(q, k, v, options.bias, options.sink, options, pair, return_lse)
    if pair[0] == "flash_attn" and not return_lse:
        return _flash_attn().output(q, k, v, options)
    out, lse = BACKENDS[pair[0]]().forward(q, k, v, options)
    return (out, lse) if return_lse else out


# ---- calls like one before -----------------------------------------------------------------------------------------------

_prepared = {}  # kind of a call without optional tensors -> its backend's ``Prepared``; emptied when it has grown
_NUMBERS = (float, int, type(None))
# Calls whose kernels are ours are C++'s from the third on, where there is that.
_plans = _native.Plans()


def _named(causal, window, scale, softcap, deterministic, backend) -> tuple | None:
    """What a call names besides its tensors; None where that is no plain number or name."""
    if (
        type(causal) is not bool or type(deterministic) is not bool or type(backend) is not str
        or type(scale) not in _NUMBERS or type(softcap) not in _NUMBERS
        or not (window is None or (type(window) is tuple and all(type(side) in _SIDES for side in window)))
    ):  # fmt: skip
        return None
    same_bits = deterministic or _pytorch_wants_the_same_bits()
    return causal, window, scale, softcap, same_bits, backend, dispatch.forced


_SIDES = (int, type(None))


def _kind(q, k, v, causal, window, scale, softcap, deterministic, backend) -> tuple | None:
    """All that checks, choice of backend and plans look at in a call without optional tensors; None for a call that needs a
    look of its own. The last entry: whether autograd records."""
    # numbers by type: a tensor would be found again by its identity, whatever its value has become
    if (
        not dispatch.plain(q, k, v)
        or type(causal) is not bool or type(deterministic) is not bool or type(backend) is not str
        or type(scale) not in _NUMBERS or type(softcap) not in _NUMBERS
    ):  # fmt: skip
        return None
    return (
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, k.dtype, v.dtype, q.device, k.device,
        v.device, (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15, causal, None if window is None else repr(window),
        scale, softcap, deterministic or _pytorch_wants_the_same_bits(), backend, dispatch.forced,
        torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
    )  # fmt: skip


def _prepare(key, q, k, v, options, pair):
    """What calls of this kind share, kept, if the backend of both passes offers it; else None."""
    backend = BACKENDS[pair[0]]()
    if pair[0] != pair[1] or not hasattr(backend, "Prepared"):
        return None
    if len(_prepared) >= 2_000:
        _prepared.clear()
    call = _prepared[key] = backend.Prepared(pair[0], q, k, v, options)
    return call


def _run_prepared(call, q, k, v, grad: bool, return_lse: bool, named_call: tuple | None):
    pending = None if named_call is None else _plans.begin(named_call, q, k, v)
    if grad:
        return _apply_prepared(q, k, v, call, return_lse, pending)
    if pending is not None:
        return pending.alone(lambda: call.forward(q, k, v, False)[0])
    results = call.forward(q, k, v, return_lse)
    return results if return_lse else results[0]


class _PreparedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, call, with_lse, pending):
        run = functools.partial(call.forward, q, k, v, True)
        out, lse = run() if pending is None else pending.forward(run)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call, ctx.pending = call, pending
        ctx.set_materialize_grads(False)
        if pending is not None:
            pull_back = functools.partial(_pull_back, call, ctx.needs_input_grad[:3])
            pending.keeps((out,), (q, k, v, out, lse), pull_back)
        return (out, lse) if with_lse else out

    @staticmethod
    def backward(ctx, dout, dlse=None):
        call, saved, pending = ctx.call, ctx.saved_tensors, ctx.pending
        if dlse is None and dout is not None and dispatch.pulled_back_plainly(dout):
            run = functools.partial(call.backward, dout, *saved)
            return *(run() if pending is None else pending.backward(run, saved, (dout,))), None, None, None
        needs = *ctx.needs_input_grad[:3], False, False
        return *_gradients(call.backend, dout, dlse, *saved, call.options, needs)[:3], None, None, None


def _pull_back(call, needs, q, k, v, out, lse, dout) -> tuple:
    """(dq, dk, dv) of a call that is C++'s, where that cannot make them."""
    if dispatch.pulled_back_plainly(dout):
        return call.backward(dout, q, k, v, out, lse)
    return _gradients(call.backend, dout, None, q, k, v, out, lse, call.options, (*needs, False, False))[:3]


_apply_prepared = dispatch.apply_of(_PreparedAttention)


def _cast(*tensors):
    """q, k and v in autocast's dtype where it is on for q's device; it knows no meta device."""
    q = tensors[0]
    if not isinstance(q, Tensor) or q.is_meta or not torch.is_autocast_enabled(q.device.type):
        return tensors
    dtype, wide = torch.get_autocast_dtype(q.device.type), torch.float64
    return [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != wide else t for t in tensors]


def _wants_gradient(q, k, v, options) -> bool:
    return (
        q.requires_grad or k.requires_grad or v.requires_grad
        or (options.bias is not None and options.bias.requires_grad)
        or (options.sink is not None and options.sink.requires_grad)
    )  # fmt: skip


def _tensors(q, k, v, options) -> list[Tensor]:
    more = (
        options.bias, options.mask, options.alibi_slopes, options.sink, options.cu_seqlens_q, options.cu_seqlens_k,
    )  # fmt: skip
    return [q, k, v, *(t for t in more if t is not None)]


# ---- checks ------------------------------------------------------------------------------------------------------------


def checked(
    q, k, v, causal, window, scale, softcap, bias, mask, alibi_slopes, sink, dropout_p, cu_seqlens_q, cu_seqlens_k,
    max_seqlen_q, max_seqlen_k, deterministic,
) -> Options:  # fmt: skip
    """The call's options in one form. On the path of every eager call: options that are not there cost nothing."""
    if type(causal) is not bool or type(deterministic) is not bool:
        dispatch.flags("attention", causal=causal, deterministic=deterministic)
    if (
        not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor) and q.is_floating_point())
        or not q.dtype == k.dtype == v.dtype
        or not q.device == k.device == v.device
    ):
        _refuse_tensors(q, k, v)
    if cu_seqlens_q is None and (cu_seqlens_k is not None or max_seqlen_q is not None or max_seqlen_k is not None):
        raise ValueError("attention: cu_seqlens_k, max_seqlen_q and max_seqlen_k need cu_seqlens_q; pass it as well")
    dims = 4 if cu_seqlens_q is None else 3
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if (
        not len(q_shape) == len(k_shape) == len(v_shape) == dims
        or k_shape[:-1] != v_shape[:-1]
        or q_shape[-1] != k_shape[-1]
        or not q_shape[-1]
        or (dims == 4 and q_shape[0] != k_shape[0])
    ):
        _refuse_shapes(q_shape, k_shape, v_shape, dims)
    heads, key_heads = q_shape[-2], k_shape[-2]
    if heads and (not key_heads or heads % key_heads):
        raise ValueError(f"attention: the {heads} heads of q must be a multiple of k's {key_heads} heads")
    left, right = (-1, -1) if window is None else _window(window)
    if causal:
        right = 0
    if softcap is None or not 0 <= dispatch.number("attention", "softcap", softcap) < math.inf:
        raise ValueError(f"attention: softcap must be at least 0 (0 for none) and finite, got {softcap}")
    if dropout_p is None or not 0 <= dispatch.number("attention", "dropout_p", dropout_p) < 1:
        raise ValueError(f"attention: dropout_p must be at least 0 and below 1, got {dropout_p}")
    if bias is not None:
        bias = _broadcastable("bias", bias, q, k, dims)
    if mask is not None:
        mask = _broadcastable("mask", mask, q, k, dims)
    if alibi_slopes is not None:
        _check_slopes(alibi_slopes, q, heads, dims, cu_seqlens_q)
    if sink is not None:
        _check_vector("sink", sink, q)
        if sink.shape != (heads,):
            raise ValueError(f"attention: sink must be [H] = [{heads}], got shape {list(sink.shape)}; reshape it")
    if cu_seqlens_q is not None:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        _check_ends(cu_seqlens_q, cu_seqlens_k, q)
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        max_seqlen_q = _longest("q", max_seqlen_q, cu_seqlens_q, q_shape[0])
        max_seqlen_k = _longest("k", max_seqlen_k, cu_seqlens_k, k_shape[0])
    seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=q.device) if dropout_p else None
    scale = q.shape[-1] ** -0.5 if scale is None else dispatch.number("attention", "scale", scale)
    return Options(
        right == 0, left, right, scale, float(softcap), bias, mask,
        alibi_slopes, sink, float(dropout_p), seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, max_seqlen_k or 0,
        bool(deterministic) or (not torch.compiler.is_compiling() and _pytorch_wants_the_same_bits()),
    )  # fmt: skip


def _pytorch_wants_the_same_bits() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _name(value) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _check_device(name, t, q):
    if t.device != q.device:
        raise ValueError(
            f"attention: {name} must be on q's device {q.device}, got {t.device}; move it with {name}.to(q.device)"
        )


def _refuse_tensors(q, k, v):
    if not isinstance(q, Tensor) or not q.is_floating_point():
        raise TypeError(f"attention: q must be a floating-point tensor, got {_name(q)}; convert it with q.float()")
    for name, t in (("k", k), ("v", v)):
        if not isinstance(t, Tensor) or t.dtype != q.dtype:
            raise TypeError(f"attention: {name} must be a tensor of q's dtype {q.dtype}, got {_name(t)}; convert it")
        _check_device(name, t, q)


def _refuse_shapes(q, k, v, dims):
    wanted = "[B, S, heads, D]" if dims == 4 else "[T, heads, D] with cu_seqlens_q"
    for name, shape in (("q", q), ("k", k), ("v", v)):
        if len(shape) != dims:
            raise ValueError(f"attention: {name} must be {wanted}, got shape {list(shape)}; unflatten or transpose it")
    if k[:-1] != v[:-1]:
        raise ValueError(f"attention: k and v must agree in all but their last dimension, got {list(k)} and {list(v)}")
    if q[-1] != k[-1] or not q[-1]:
        raise ValueError(f"attention: q and k must have one head dimension D > 0, got {q[-1]} and {k[-1]}")
    raise ValueError(f"attention: q and k must have one batch size, got {q[0]} and {k[0]}; expand the smaller one")


def _window(window) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"attention: window must be (left, right) or None, got {window!r}; None in it means no bound")
    for side in window:
        if side is not None and (not isinstance(side, (int, torch.SymInt)) or side < 0):
            raise ValueError(f"attention: window must hold ints from 0 on or None, got {window!r}; None means no bound")
    # a bound beyond any length is none: kernels add it to 32-bit positions
    return tuple(-1 if side is None or side >= 2**30 else side for side in window)


def _broadcastable(name, t, q, k, dims):
    """``t`` in four dimensions."""
    if dims == 3:
        raise ValueError(f"attention: {name} does not go with cu_seqlens_q; use causal, window or alibi_slopes")
    if name == "bias":
        _check_vector(name, t, q)
    elif not isinstance(t, Tensor) or t.dtype != torch.bool:
        raise TypeError(
            f"attention: mask must be a bool tensor, True where a key is seen, got {_name(t)}; "
            "numbers to add to the scores are passed as bias"
        )
    _check_device(name, t, q)
    full = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    if t.ndim > 4 or any(n not in (1, m) for n, m in zip(reversed(t.shape), reversed(full), strict=False)):
        raise ValueError(
            f"attention: {name} must be broadcastable to [B, H, Sq, Sk] = {list(full)}, got shape {list(t.shape)}"
        )
    t = t.reshape((1,) * (4 - t.ndim) + t.shape) if t.ndim < 4 else t
    # its gradient is made for every key, and autograd adds them up
    return t.expand(-1, -1, -1, full[-1]) if name == "bias" and t.shape[-1] != full[-1] else t


def _check_vector(name, t, q):
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"attention: {name} must be a floating-point tensor, got {_name(t)}; convert it with .float()")
    _check_device(name, t, q)


def _check_slopes(slopes, q, heads, dims, ends):
    _check_vector("alibi_slopes", slopes, q)
    batch = q.shape[0] if dims == 4 else ends.shape[0] - 1
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"attention: alibi_slopes must be [H] = [{heads}] or [B, H] = [{batch}, {heads}], got {list(slopes.shape)}"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "attention: alibi_slopes gets no gradient; pass bias=alibi_bias(alibi_slopes, Sq, Sk), or detach it"
        )


def _check_ends(ends_q, ends_k, q):
    for name, t in (("cu_seqlens_q", ends_q), ("cu_seqlens_k", ends_k)):
        if not isinstance(t, Tensor) or t.dtype != torch.int32:
            raise TypeError(f"attention: {name} must be an int32 tensor, got {_name(t)}; convert it with .int()")
        _check_device(name, t, q)
        if t.ndim != 1 or not t.shape[0] or t.shape != ends_q.shape:
            raise ValueError(
                f"attention: cu_seqlens_q and cu_seqlens_k must both be [sequences + 1], got {list(ends_q.shape)} and "
                f"{list(ends_k.shape)}"
            )


def _longest(side, given, ends, rows) -> int:
    """max_seqlen of ``side``; the ends are compared with the rows that there are where nobody has to wait for them."""
    name = f"max_seqlen_{side}"
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
            raise TypeError(f"attention: {name} must be an int, got {_name(given)}; convert it with int()")
        if isinstance(given, int) and given < 0:
            raise ValueError(
                f"attention: {name} must be the greatest length, got {given}; leave it out to have it read"
            )
        if not dispatch.readable(ends):
            return given
    elif torch.compiler.is_compiling():
        raise ValueError(f"attention: pass {name} under torch.compile, which cannot read it from cu_seqlens")
    ends = ends.tolist()
    reference.check_ends(f"cu_seqlens_{side}", ends, rows)
    return max((b - a for a, b in itertools.pairwise(ends)), default=0) if given is None else given


# ---- which backend -----------------------------------------------------------------------------------------------------

_FORMULA = "torch", "torch"
_picked = {}  # key -> pair; emptied when it has grown


def pick(q: Tensor, k: Tensor, v: Tensor, options: Options, grad: bool) -> tuple[str, str]:
    """The backends of "auto" (forward, backward); ``_FORMULA`` where no kernel can run."""
    key = (
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, q.get_device(),
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15, grad, options.window_left, options.window_right,
        options.scale, options.softcap, options.dropout_p, options.deterministic,
    )  # fmt: skip
    more = options.bias, options.mask, options.alibi_slopes, options.sink, options.cu_seqlens_q
    if any(t is not None for t in more):
        key += options.max_seqlen_q, options.max_seqlen_k
        key += tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.requires_grad) for t in more)
    pair = _picked.get(key)
    if pair is None:
        if len(_picked) > 10_000:
            _picked.clear()
        forward = _first(q, k, v, options, False, {})
        backward = _first(q, k, v, options, True, {}) if grad and forward else forward
        pair = _picked[key] = (forward, backward) if forward and backward else _FORMULA
    return pair


def _first(q, k, v, options, backward, rejected) -> str | None:
    """The first backend in ``order`` that can run; the reasons of those before it go into ``rejected``."""
    card = torch.cuda.get_device_capability(q.device)
    call = q.shape[-1], v.shape[-1], options.causal, backward, math.prod(q.shape[:-1]), k.shape[-3]
    timed = (  # windows, lengths and the rest were not: there FlashAttention 4 waits for its turn
        options.window_left < 0 and options.window_right <= 0 and not options.softcap and not options.deterministic
        and options.cu_seqlens_q is None
    )  # fmt: skip
    fa4 = (
        card[0] == 9 and timed and fa4_is_faster(*call, q.shape[-2] // k.shape[-2]) and _missing("flash_attn") is None
        and _flash_attn().fa4_can_run(q, k, v, options, backward)
    )  # fmt: skip
    for name in order(card, *call[:4], k.shape[-3], fa4):
        reason = _missing(name) or BACKENDS[name]().unsupported(q, k, v, options, backward)
        if reason is None:
            return name
        rejected[name] = reason
    return None


@functools.cache
def _missing(name: str) -> str | None:
    return dispatch.missing(BACKENDS[name])


def triton_can_run(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether ``backend="triton"`` takes these tensors."""
    options = Options(scale=1.0)
    return _missing("triton") is None and _triton().unsupported(q, k, v, options, True) is None


# ---- autograd ----------------------------------------------------------------------------------------------------------


_NO_TENSORS = dict.fromkeys(("bias", "mask", "alibi_slopes", "sink", "seed", "cu_seqlens_q", "cu_seqlens_k"))


class _Attention(torch.autograd.Function):
    """Kernels under autograd: forward and backward may be of different backends."""

    @staticmethod
    def forward(ctx, q, k, v, bias, sink, options, pair, with_lse):
        out, lse = BACKENDS[pair[0]]().forward(q, k, v, options)
        # the others too: a mask or ends that are overwritten before backward are an error then, not a wrong gradient
        more = options.mask, options.alibi_slopes, options.seed, options.cu_seqlens_q, options.cu_seqlens_k
        ctx.save_for_backward(q, k, v, bias, sink, out, lse, *more)
        ctx.call = options._replace(**_NO_TENSORS), pair[1]
        ctx.set_materialize_grads(False)
        return (out, lse) if with_lse else out

    @staticmethod
    def backward(ctx, dout, dlse=None):
        q, k, v, bias, sink, out, lse, mask, slopes, seed, ends_q, ends_k = ctx.saved_tensors
        options, backend = ctx.call
        options = options._replace(
            bias=bias, mask=mask, alibi_slopes=slopes, sink=sink, seed=seed, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k
        )
        grads = _gradients(backend, dout, dlse, q, k, v, out, lse, options, ctx.needs_input_grad[:5])
        return *grads, None, None, None


_apply = dispatch.apply_of(_Attention)


def _gradients(backend, dout, dlse, q, k, v, out, lse, options, needs):
    """Those of (q, k, v, bias, sink), whatever came in."""
    given = [t for t in (dout, dlse) if t is not None]
    if not given:
        return (None,) * 5
    if backend == "torch" or not dispatch.pulled_back_plainly(*given):
        return _formula_gradients(q, k, v, options, dout, dlse, needs, torch.is_grad_enabled())
    dout = torch.zeros_like(out) if dout is None else dout
    return BACKENDS[backend]().backward(dout, dlse, q, k, v, out, lse, options, needs)


def _formula_gradients(q, k, v, options, dout, dlse, needs, again):
    """The same derivatives from PyTorch's operations: they can be differentiated again, and take any kind of gradient."""
    inputs = q, k, v, options.bias, options.sink
    with torch.enable_grad():
        # aliases: one of q, k, v may be computed from another
        inputs = [
            t if t is None else t.view_as(t) if again else t.detach().requires_grad_(need)
            for t, need in zip(inputs, needs, strict=True)
        ]
        q, k, v, bias, sink = inputs
        results = reference.forward(q, k, v, options._replace(bias=bias, sink=sink))
    pairs = [(y, dy) for y, dy in zip(results, (dout, dlse), strict=True) if dy is not None and y.requires_grad]
    leaves = [t for t, need in zip(inputs, needs, strict=True) if need]
    if not pairs:  # lse does not depend on v
        return [torch.zeros_like(t) if need else None for t, need in zip(inputs, needs, strict=True)]
    outputs, given = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(outputs, leaves, given, create_graph=again, materialize_grads=True))
    return [next(grads) if need else None for need in needs]


# The same kernels as registered operators, for calls that a raw launch must not see: torch.compile, fake tensors, dispatch
# modes. Subclasses and functorch take the formula under "auto".

_ARGUMENTS = (
    "Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sink, Tensor? seed, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, SymInt window_left, SymInt window_right, float scale, float softcap, float dropout_p, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, bool deterministic, str backend"
)


def _flat(options: Options, backend: str) -> tuple:
    return (
        options.bias, options.mask, options.alibi_slopes, options.sink, options.seed, options.cu_seqlens_q,
        options.cu_seqlens_k, options.window_left, options.window_right, options.scale, options.softcap,
        options.dropout_p, options.max_seqlen_q, options.max_seqlen_k, options.deterministic, backend,
    )  # fmt: skip


def _unflat(
    bias, mask, slopes, sink, seed, ends_q, ends_k, left, right, scale, softcap, p, max_q, max_k, deterministic, backend
) -> Options:  # fmt: skip
    return Options(
        right == 0, left, right, scale, softcap, bias, mask, slopes, sink, p, seed, ends_q, ends_k, max_q, max_k,
        deterministic or _pytorch_wants_the_same_bits(),
    )  # fmt: skip


def _chosen(q, k, v, options, backend, backward) -> str:
    if backend == "auto":
        return pick(q, k, v, options, backward)[backward]
    dispatch.load_named("attention", BACKENDS, backend, q, k, v, options, backward)
    return backend


def _run_forward(q, k, v, *flat):
    options = _unflat(*flat)
    out, lse = BACKENDS[_chosen(q, k, v, options, flat[-1], False)]().forward(q, k, v, options)
    return out.contiguous(), lse.contiguous()


def _fake_forward(q, k, v, *flat):
    lse = (q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(lse, dtype=reference.wide_dtype(q))


def _run_backward(dout, dlse, q, k, v, out, lse, *rest):
    *flat, needs = rest
    options = _unflat(*flat)
    backend = _chosen(q, k, v, options, flat[-1], True)
    if backend == "torch":
        grads = _formula_gradients(q, k, v, options, dout, dlse, needs, False)
    else:
        grads = BACKENDS[backend]().backward(dout, dlse, q, k, v, out, lse, options, tuple(needs))
    return [g.contiguous() for g, need in zip(grads, needs, strict=True) if need]


def _fake_backward(dout, dlse, q, k, v, out, lse, bias, mask, slopes, sink, *rest):
    return [t.new_empty(t.shape) for t, need in zip((q, k, v, bias, sink), rest[-1], strict=True) if need]


_forward_op = dispatch.register(
    f"attention(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor)", _run_forward, _fake_forward
)
_backward_op = dispatch.register(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ARGUMENTS}, "
    "bool[] needs) -> Tensor[]",
    _run_backward,
    _fake_backward,
)


def _registered(q, k, v, options, backend, grad, with_lse):
    if backend == "auto" and not torch.compiler.is_compiling() and not _operator_sees(_tensors(q, k, v, options)):
        return reference.forward(q, k, v, options)
    # in forward-mode differentiation the Function refuses, where the bare operator would lose the tangent
    if grad or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0):
        flat = _flat(options, backend)
        results = _RegisteredAttention.apply(with_lse, *_apart(q, k, v, *flat[:7]), *flat[7:])
        return results if with_lse else (results, None)
    return _forward_op(q, k, v, *_flat(options, backend))


def _apart(*tensors):
    """The tensors, each of them once: torch.compile refuses a Function that is given one twice, as both ends of lengths often are."""
    return [
        t.view_as(t) if any(t is other for other in tensors[:i] if t is not None) else t for i, t in enumerate(tensors)
    ]


def _operator_sees(tensors) -> bool:
    """Whether only a dispatch mode or fake tensors stand between the call and the kernels."""
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and all(type(t) in (Tensor, Parameter, FakeTensor) and not t.is_neg() for t in tensors)
    )


class _RegisteredAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, with_lse, q, k, v, *flat):
        out, lse = _forward_op(q, k, v, *flat)
        ctx.save_for_backward(q, k, v, out, lse, *flat[:7])
        ctx.call = flat[7:]
        # an lse that nobody has asked for would bring zeros as its gradient, which not every backend takes for nothing
        return (out, lse) if with_lse else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse=None):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        at = 1, 2, 3, 4, 7  # q, k, v, bias, sink
        needs = [ctx.needs_input_grad[i] for i in at]
        grads = iter(_backward_op(dout, dlse, q, k, v, out, lse, *tensors, *ctx.call, needs))
        given = [None] * 20
        for i, need in zip(at, needs, strict=True):
            given[i] = next(grads) if need else None
        return tuple(given)


def explain(op, q: Tensor, *args, **kwargs) -> Explanation:
    """Which backends ``op(q, *args, **kwargs)`` would run on, why, and with which configuration; runs nothing."""
    call = inspect.signature(op).bind(q, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    given["q"], given["k"], given["v"] = _cast(q, given["k"], given["v"])
    backend, _ = given.pop("backend"), given.pop("return_lse")
    with torch.random.fork_rng([q.device] if q.is_cuda else []):  # dropout draws a seed
        options = checked(*given.values())
    q, k, v = given["q"], given["k"], given["v"]
    backend = dispatch.resolve(backend)
    dispatch.check_name("attention", BACKENDS, backend)
    grad = torch.is_grad_enabled() and _wants_gradient(q, k, v, options)
    passes = (False, True) if grad else (False,)
    if backend == "torch":
        return Explanation("attention", "torch", "named by the caller")
    if backend != "auto":
        for backward in passes:
            module = dispatch.load_named("attention", BACKENDS, backend, q, k, v, options, backward)
        return Explanation("attention", backend, "named by the caller", _described(module, q, k, v, options, grad))
    if not q.is_cuda:
        rejected = {name: f"needs a GPU tensor, got {q.device.type}" for name in BACKENDS if name != "torch"}
    elif not (q.numel() and k.numel() and v.numel()):
        rejected = {name: "no elements" for name in BACKENDS if name != "torch"}
    elif not dispatch.plain(*_tensors(q, k, v, options)) and not _operator_sees(_tensors(q, k, v, options)):
        against = f"a raw launch does not see through {type(q).__name__} or an active mode"
        rejected = {name: against for name in BACKENDS if name != "torch"}
    else:
        rejected = {}
        forward = _first(q, k, v, options, False, rejected)
        reasons = {}
        backward = _first(q, k, v, options, True, reasons) if grad and forward else forward
        rejected |= {f"{name} (backward)": reason for name, reason in reasons.items() if reasons is not rejected}
        if forward and backward:
            why = "the fastest measured that can run this" + (
                f"; backward on {backward}" if backward != forward else ""
            )
            config = _described(BACKENDS[forward](), q, k, v, options, grad and forward == backward)
            return Explanation("attention", forward, why, config, rejected)
    return Explanation("attention", "torch", "the first backend that can run here", rejected=rejected)


def _described(module, q, k, v, options, grad) -> str:
    return module.describe(q, k, v, options, grad) if hasattr(module, "describe") else ""
