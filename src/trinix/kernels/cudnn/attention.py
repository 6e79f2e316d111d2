"""cuDNN's attention, both passes, through the operators behind PyTorch's scaled_dot_product_attention.

It aligns a causal mask at the top left, so with Sq != Sk it is refused.
"""

import warnings

import torch
from torch import Tensor
from torch.backends import cuda as switches

ROWS = 256

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


def unsupported(q: Tensor, k: Tensor, v: Tensor, options, backward: bool) -> str | None:
    if q.device.type != "cuda" or torch.version.cuda is None:
        return f"needs tensors on an NVIDIA GPU, got {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    asked = {
        "variable lengths": options.cu_seqlens_q is not None, "a bias": options.bias is not None,
        "a mask": options.mask is not None, "ALiBi slopes": options.alibi_slopes is not None,
        "a sink": options.sink is not None, "softcap": options.softcap != 0, "dropout": options.dropout_p != 0,
        "a window": options.window_left >= 0 or options.window_right > 0,
        "a deterministic backward": options.deterministic and backward,
        "a causal mask with Sq != Sk": _causal(q, options) and q.shape[1] != k.shape[1],
    }  # fmt: skip
    for name, there in asked.items():
        if there:
            return f"does not take {name} here"
    if any(t.data_ptr() & 15 or t.stride(-1) != 1 or any(s % 8 for s in t.stride()[:-1]) for t in (q, k, v)):
        return "needs rows that begin at multiples of 16 bytes, with the last dimension dense"
    asked = switches.SDPAParams(*_heads_first(q, k, v), None, 0.0, _causal(q, options), q.shape[2] != k.shape[2])
    with torch.cuda.device(q.get_device()):  # it asks the current card
        if switches.can_use_cudnn_attention(asked):
            return None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            switches.can_use_cudnn_attention(asked, debug=True)
    return f"is refused by PyTorch: {'; '.join(str(w.message).partition(' (Triggered')[0] for w in said)}"


def _causal(q, options) -> bool:
    """Whether anything is hidden: the one query of a row at the bottom right sees every key."""
    return options.window_right == 0 and q.shape[1] > 1


def _heads_first(*tensors):
    return [t.transpose(1, 2) for t in tensors]


def forward(q: Tensor, k: Tensor, v: Tensor, options) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _forward(
        *_heads_first(q, k, v), None, True, 0.0, _causal(q, options), False, scale=options.scale
    )  # fmt: skip
    return out.transpose(1, 2), lse.view(lse.shape[:3])


def backward(dout, dlse, q, k, v, out, lse, options, needs):
    call = lse, q.shape[1], k.shape[1], _causal(q, options), options.scale
    dq, dk, dv = _gradients(dout, q, k, v, out, *call)
    if dlse is not None:
        more_dq, more_dk = through_lse(dlse, q, k, lse, options.scale, _causal(q, options))
        dq, dk = (dq + more_dq).to(q.dtype), (dk + more_dk).to(k.dtype)
    return *(g if need else None for g, need in zip((dq, dk, dv), needs, strict=False)), None, None


def through_lse(dlse, q, k, lse, scale, causal) -> tuple[Tensor, Tensor]:
    """What lse's gradient adds to those of q and k, float32: scale (p dlse) k and scale (p dlse)^T q.

    cuDNN takes no such gradient. In PyTorch, ``ROWS`` queries at a time: for the rare call that has one.
    """
    key_heads = k.shape[2]
    keys = k.float()
    dq, dk = torch.empty_like(q, dtype=torch.float32), torch.zeros_like(keys)
    columns = torch.arange(k.shape[1], device=q.device)
    for start in range(0, q.shape[1], ROWS):
        part = slice(start, start + ROWS)
        rows = q[:, part].float().unflatten(2, (key_heads, -1))
        z = torch.einsum("bihgd,bjhd->bhgij", rows, keys) * scale
        if causal:
            z = z.masked_fill(columns > columns[part, None], float("-inf"))
        sums, weights = (t[:, :, part].unflatten(1, (key_heads, -1)).unsqueeze(-1) for t in (lse, dlse))
        p = torch.exp(z - sums) * (weights * scale)
        dq[:, part] = torch.einsum("bhgij,bjhd->bihgd", p, keys).flatten(2, 3)
        dk += torch.einsum("bhgij,bihgd->bjhd", p, rows)
    return dq, dk


def _gradients(dout, q, k, v, out, lse, seq_q, seq_k, causal, scale):
    if dout.stride() != out.stride() or dout.data_ptr() & 15:  # it wants both alike
        dout = torch.empty_like(out).copy_(dout)
    grads = _backward(
        *_heads_first(dout, q, k, v, out), lse.unsqueeze(-1), None, None, None, None, None, seq_q, seq_k, 0.0, causal,
        scale=scale,
    )  # fmt: skip
    return _heads_first(*grads)
