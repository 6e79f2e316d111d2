"""FlashAttention 4, 3 or 2, whichever is installed and can run the call; on compute capability 8.x else the one inside PyTorch.

From 9.0 on PyTorch's FlashAttention 2 is not offered: the portable Triton kernels are mostly faster there (docs/perf/attention_decode.md).

All align a causal mask at the bottom right, as ``trinix.ops.attention`` does. Their private halves are called, forward and
backward apart, so that either may be paired with another backend's.
"""

import functools
import importlib

import torch
from torch import Tensor

from trinix.kernels import LEAST_SCALE

# what each calls itself -> (module, compute capabilities by their first number)
_PACKAGES = {
    "FlashAttention 4": ("flash_attn.cute.interface", (9, 10)),
    "FlashAttention 3": ("flash_attn_interface", (9,)),
    "FlashAttention 2": ("flash_attn.flash_attn_interface", (8, 9, 10, 12)),
}
_BUILT_IN, _BUILT_IN_ON = "PyTorch's FlashAttention 2", (8,)


@functools.cache
def _module(name: str):
    """The package's module, or the reason why it cannot be had."""
    if name == _BUILT_IN:
        return (
            torch.ops.aten if torch.backends.cuda.is_flash_attention_available() else "is not in this build of PyTorch"
        )
    try:
        module = importlib.import_module(_PACKAGES[name][0])
    except ModuleNotFoundError as error:
        return f"needs the package {error.name}, which is not installed"
    except Exception as error:  # built for other versions of what it needs; "auto" must live with it
        return f"cannot be imported: {type(error).__name__}: {error}"
    halves = ("_flash_attn_fwd", "_flash_attn_bwd") if name == "FlashAttention 4" else ("_flash_attn_forward",)
    lacking = [half for half in halves if not hasattr(module, half)]
    return f"is of another version: {module.__name__} has no {lacking[0]}" if lacking else module


def _against(name: str, q, k, v, options, backward: bool) -> str | None:
    """Why this one cannot run the call, or None."""
    major = torch.cuda.get_device_capability(q.device)[0]
    if major not in (_BUILT_IN_ON if name == _BUILT_IN else _PACKAGES[name][1]):
        return f"does not run on compute capability {major}.x"
    if isinstance(_module(name), str):
        return _module(name)
    new, three, two = (name == f"FlashAttention {n}" for n in (4, 3, 2))
    asked = {
        "a bias": options.bias is not None, "a mask": options.mask is not None, "a sink": options.sink is not None,
        # 4's tanh is an approximation, and lse is off by it
        "dropout": options.dropout_p != 0, "softcap": options.softcap != 0 and (new or name == _BUILT_IN),
        "ALiBi slopes": options.alibi_slopes is not None and not (two and options.alibi_slopes.dtype == torch.float32),
        "a scale below 2**-126": not options.scale >= LEAST_SCALE,  # they take the largest score before they scale it
        "a deterministic backward": options.deterministic and backward
        and (name == _BUILT_IN or (three and q.shape[-1] > 192)),
    }  # fmt: skip
    for what, there in asked.items():
        if there:
            return f"does not take {what} here"
    d, dv = q.shape[-1], v.shape[-1]
    if d % 8 or dv % 8 or max(d, dv) > 256:
        return f"takes head dimensions that are multiples of 8, up to 256, got {d} and {dv}"
    if not new and d != dv:
        return f"takes one head dimension, got {d} for keys and {dv} for values"
    ragged = [n for n in (d, dv) if 0 < n % 32 <= 16]
    if new and backward and ragged:
        # silently, at least on Hopper until Dao-AILab/flash-attention#2896: a kernel writes rows of 16s, the next reads 32s
        return f"has wrong gradients for head dimensions of 1 to 16 above a multiple of 32, got {ragged[0]}"
    if new and major == 9 and backward and d != dv and q.shape[-2] != k.shape[-2]:
        return f"has no backward of grouped heads with two head dimensions on this card, got {d} and {dv}"
    if new and major != 9 and max(d, dv) > 128 and (d, dv) != (192, 128):
        return f"takes head dimensions up to 128, or 192 with 128, on this card, got {d} and {dv}"
    return None


def fa4_can_run(q: Tensor, k: Tensor, v: Tensor, options, backward: bool) -> bool:
    """Whether this call would be FlashAttention 4's, as far as only it decides."""
    return _against("FlashAttention 4", q, k, v, options, backward) is None


def _names(q, k, v, options, backward) -> tuple[str | None, dict]:
    """(the one that runs, or None; the reasons of those before it)."""
    reasons = {}
    for name in (*_PACKAGES, _BUILT_IN):
        reason = _against(name, q, k, v, options, backward)
        if reason is None:
            return name, reasons
        reasons[name] = reason
    return None, reasons


def unsupported(q: Tensor, k: Tensor, v: Tensor, options, backward: bool) -> str | None:
    if q.device.type != "cuda" or torch.version.cuda is None:
        return f"needs tensors on an NVIDIA GPU, got {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    if not all(_rows_are_aligned(t) for t in (q, k, v)):
        return "needs rows that begin at multiples of 16 bytes, with the last dimension dense"
    name, reasons = _names(q, k, v, options, backward)
    return None if name else "; ".join(f"{one} {reason}" for one, reason in reasons.items())


def _rows_are_aligned(t: Tensor) -> bool:
    return not t.data_ptr() & 15 and t.stride(-1) == 1 and not any(s % 8 for s in t.stride()[:-1])


def describe(q, k, v, options, grad: bool) -> str:
    name = _names(q, k, v, options, grad)[0]
    return name or "none of them can run this"


# ---- the four ----------------------------------------------------------------------------------------------------------


def _lengths(q, k, options):
    """(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), without variable lengths the first two None."""
    if options.cu_seqlens_q is None:
        return None, None, q.shape[1], k.shape[1]
    return options.cu_seqlens_q, options.cu_seqlens_k, options.max_seqlen_q, options.max_seqlen_k


def _sides(options):
    return tuple(None if side < 0 else side for side in (options.window_left, options.window_right))


def _forward(name, q, k, v, options, with_lse=True):
    module, causal = _module(name), options.window_right == 0
    ends_q, ends_k, most_q, most_k = _lengths(q, k, options)
    if name == _BUILT_IN:
        left, right = _sides(options)
        return module._flash_attention_forward(
            q, k, v, ends_q, ends_k, most_q, most_k, 0.0, causal, False, scale=options.scale, window_size_left=left,
            window_size_right=right,
        )[:2]  # fmt: skip
    if name == "FlashAttention 4":
        left, right = _sides(options)
        return module._flash_attn_fwd(
            q, k, v, softmax_scale=options.scale, causal=causal, window_size_left=left, window_size_right=right,
            return_lse=with_lse, **_given(ends_q, ends_k, most_q, most_k),
        )[:2]  # fmt: skip
    shared = {
        "softmax_scale": options.scale, "causal": causal, "window_size_left": options.window_left,
        "window_size_right": options.window_right, "softcap": options.softcap,
    }  # fmt: skip
    if name == "FlashAttention 3":
        return module._flash_attn_forward(q, k, v, **shared, **_given(ends_q, ends_k, most_q, most_k))[:2]
    shared |= {"dropout_p": 0.0, "alibi_slopes": options.alibi_slopes, "return_softmax": False}
    if ends_q is None:
        return module._flash_attn_forward(q, k, v, **shared)[:2]
    return module._flash_attn_varlen_forward(q, k, v, ends_q, ends_k, most_q, most_k, **shared)[:2]


def _given(ends_q, ends_k, most_q, most_k) -> dict:
    if ends_q is None:
        return {}
    return {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, "max_seqlen_q": most_q, "max_seqlen_k": most_k}


def _backward(name, dout, q, k, v, out, lse, options, dlse=None):
    module, causal = _module(name), options.window_right == 0
    ends_q, ends_k, most_q, most_k = _lengths(q, k, options)
    if name == _BUILT_IN:
        left, right = _sides(options)
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that is off
        return module._flash_attention_backward(
            dout, q, k, v, out, lse, ends_q, ends_k, most_q, most_k, 0.0, causal, unused, unused, scale=options.scale,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
    if name == "FlashAttention 4":
        left, right = _sides(options)
        return module._flash_attn_bwd(
            q, k, v, out, dout, lse, softmax_scale=options.scale, causal=causal, window_size_left=left,
            window_size_right=right, deterministic=options.deterministic, dlse=dlse, **_given(ends_q, ends_k, most_q, most_k),
        )[:3]  # fmt: skip
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    shared = {
        "dq": grads[0], "dk": grads[1], "dv": grads[2], "softmax_scale": options.scale,
        "window_size_left": options.window_left, "window_size_right": options.window_right, "softcap": options.softcap,
        "deterministic": options.deterministic,
    }  # fmt: skip
    if name == "FlashAttention 3":
        lengths = _given(ends_q, ends_k, most_q, most_k)
        module._flash_attn_backward(dout, q, k, v, out, lse, is_causal=causal, **shared, **lengths)
        return grads
    shared |= {"dropout_p": 0.0, "causal": causal, "alibi_slopes": options.alibi_slopes}
    if ends_q is None:
        module._flash_attn_backward(dout, q, k, v, out, lse, **shared)
    else:
        lengths = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, "max_seqlen_q": most_q, "max_seqlen_k": most_k}
        module._flash_attn_varlen_backward(dout, q, k, v, out, lse, **shared, **lengths)
    return grads


# ---- the contract ------------------------------------------------------------------------------------------------------


def _empty_rows(q, k, options) -> bool:
    """Whether a row may see no key: FlashAttention 2 calls its lse inf."""
    if options.cu_seqlens_q is not None:
        return options.cu_seqlens_q is not options.cu_seqlens_k
    return options.window_right >= 0 and q.shape[1] > k.shape[1] + options.window_right


def _without_tail(t, ends, value=0.0, dim=0):
    """Rows behind the last sequence, which no kernel writes, are ``value``."""
    behind = torch.arange(t.shape[dim], device=t.device) >= ends[-1]
    return t.masked_fill_(behind.view(*(1,) * dim, -1, *(1,) * (t.ndim - dim - 1)), value)


def _on_its_card(run):
    """``run`` with the card of its first tensor as the current one: FlashAttention 4 launches on the current card's stream."""

    @functools.wraps(run)
    def there(*call):
        with torch.cuda.device(call[0].get_device()):
            return run(*call)

    return there


@_on_its_card
def forward(q: Tensor, k: Tensor, v: Tensor, options) -> tuple[Tensor, Tensor]:
    out, lse = _forward(_names(q, k, v, options, False)[0], q, k, v, options)
    if _empty_rows(q, k, options):
        lse = lse.masked_fill(lse == float("inf"), float("-inf"))
    if options.cu_seqlens_q is not None:
        out = _without_tail(out, options.cu_seqlens_q)
        lse = _without_tail(lse, options.cu_seqlens_q, float("-inf"), 1)
    return out, lse


@_on_its_card
def output(q: Tensor, k: Tensor, v: Tensor, options) -> Tensor:
    """``forward`` for those who want no lse: FlashAttention 4 then has a kernel that stores none."""
    out = _forward(_names(q, k, v, options, False)[0], q, k, v, options, with_lse=False)[0]
    return out if options.cu_seqlens_q is None else _without_tail(out, options.cu_seqlens_q)


def _through_lse(name, dlse, q, k, v, out, lse, options) -> tuple[Tensor, Tensor]:
    """What lse's gradient adds to those of q and k, by a kernel that takes none.

    It makes dz = p (dout v^T - delta) times the softcap's slope, delta = rowsum(dout out): that is p dlse, if out is 0 and
    dout v^T dlse. In two channels: the second has what the first rounds away, at weights that float16's range is wide enough for.
    """
    weight = dlse.transpose(-1, -2)
    dout, ones = torch.zeros_like(out), torch.zeros_like(v)
    dout[..., 0] = weight / 64
    dout[..., 1] = (weight - dout[..., 0].float() * 64) * 16
    ones[..., 0], ones[..., 1] = 64, 1 / 16
    return _backward(name, dout, q, k, ones, torch.zeros_like(out), lse, options)[:2]


@_on_its_card
def backward(dout, dlse, q, k, v, out, lse, options, needs):
    name = _names(q, k, v, options, True)[0]
    if _empty_rows(q, k, options):
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))  # exp(z - inf) is 0, exp(z + inf) is not
    if not _rows_are_aligned(dout) or 0 in dout.stride():  # the copy engine takes no stride of 0
        dout = dout.clone(memory_format=torch.contiguous_format)  # a dense tensor at an odd address is contiguous
    takes_dlse = name == "FlashAttention 4"
    dq, dk, dv = _backward(
        name, dout, q, k, v, out, lse, options, dlse.contiguous() if dlse is not None and takes_dlse else None
    )
    if dlse is not None and not takes_dlse and (needs[0] or needs[1]):
        more = _through_lse(name, dlse, q, k, v, out, lse, options)
        dq, dk = dq + more[0], dk + more[1]
    if options.cu_seqlens_q is not None:
        dq = _without_tail(dq, options.cu_seqlens_q)
        dk, dv = (_without_tail(g, options.cu_seqlens_k) for g in (dk, dv))
    return *(g if need else None for g, need in zip((dq, dk, dv), needs, strict=False)), None, None
