"""Whole layers as cases: ``attention_layers`` and ``glu_layers``. A case's shapes are x and every parameter by its name in our
module, so that each one is an input with a gradient of its own; every implementation takes the same tensors.

The rivals' forms of a layer differ in its core alone: the attention, or the activation times up.
"""

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trinix
from trinix import ops
from trinix.lab.case import Case

OPS = ("attention_layers", "glu_layers")
ATTENTION = {
    "mhsa": trinix.FastMultiHeadSelfAttention,
    "mha": trinix.FastMultiHeadAttention,
    "gqa": trinix.FastGroupedQueryAttention,
    "mqa": trinix.FastMultiQueryAttention,
    "mla": trinix.FastMultiHeadLatentAttention,
}
GLUS = {
    "swiglu": trinix.FastSwiGLU,
    "geglu": trinix.FastGeGLU,
    "geglu_tanh": trinix.FastGeGLU,
    "reglu": trinix.FastReGLU,
}


def flops(case: Case, pass_: str) -> int:
    """The least: every product once forward and twice backward, of causal scores the half."""
    args, tokens = case.args, prod(case.shape["x"][:-1])
    forward = sum(2 * tokens * prod(size) for name, size in case.shape.items() if name.endswith("_proj.weight"))
    if case.op == "attention_layers":
        width = 2 * args["head_dim"] + (64 if args["layer"] == "mla" and args.get("position") == "rope" else 0)
        forward += 2 * tokens * case.shape["x"][1] * args["heads"] * width // (2 if args["causal"] else 1)
    return forward * {"fwd": 1, "fwd_grad": 1, "bwd": 2, "fwd_bwd": 3}[pass_]


def module_of(case: Case, backend: str = "auto", device: str = "meta") -> nn.Module:
    """Our layer of a case, its parameters still to be put in place."""
    args, width = case.args, case.shape["x"][-1]
    place = {"bias": args.get("bias", True), "backend": backend, "device": device, "dtype": case.dtype}
    if case.op == "glu_layers":
        more = {"approximate": "tanh"} if args["kind"] == "geglu_tanh" else {}
        return GLUS[args["kind"]](width, args["hidden_dim"], args.get("output_dim"), **more, **place)
    place |= {"causal": args["causal"], "head_dim": args["head_dim"], "position_method": args.get("position", "none")}
    sizes = [width, args["heads"]]
    if args["layer"] == "gqa":
        sizes.append(args["kv_heads"])
    if args["layer"] == "mla":
        sizes.append(args["latent_dim"])
        latent = args.get("latent_norm", False)
        place |= {"q_latent_dim": args.get("q_latent_dim"), "rope_head_dim": 64, "latent_norm": latent}
    return ATTENTION[args["layer"]](*sizes, max_seq_len=case.shape["x"][1], **place)


def ours(case: Case, backend: str = "auto") -> Callable:
    """Our module on the case's own tensors: they are put into its places by every call."""
    module = module_of(case, backend)
    slots = [
        (owner._parameters, name)
        for owner in module.modules()
        for name, p in owner._parameters.items()
        if p is not None
    ]
    names = [name for name, _ in module.named_parameters()]
    if list(case.shape)[1:] != names:
        raise ValueError(f"{case.id}: shape must be x and {names}, got {list(case.shape)}")
    position = getattr(module, "position", None)

    def call(x, *parameters):
        for (place, name), parameter in zip(slots, parameters, strict=True):
            place[name] = parameter
        if position is not None and position.cos.device != x.device:
            position.to_empty(device=x.device)
        return module(x)

    return call


def backend_of(case: Case, backend: str, x: Tensor, *_) -> str:
    """What runs the layer's core."""
    args, rows = case.args, case.shape["x"][:-1]
    like = {"dtype": case.dtype, "device": x.device, "requires_grad": x.requires_grad}
    if case.op == "glu_layers":
        packed = torch.empty(*rows, 2 * args["hidden_dim"], **like)
        return ops.explain("glu", packed, kind=args["kind"], backend=backend).backend
    width = args["head_dim"] + (64 if args["layer"] == "mla" and args.get("position") == "rope" else 0)
    q = torch.empty(*rows, args["heads"], width, **like)
    k = torch.empty(*rows, args["kv_heads"], width, **like)
    v = torch.empty(*rows, args["kv_heads"], args["head_dim"], **like)
    return ops.explain("attention", q, k, v, causal=args["causal"], backend=backend).backend


def of(case: Case, core: Callable) -> Callable:
    """The layer of plain PyTorch around ``core``: attention(q, k, v, causal) on [B, S, heads, D], or activation(packed)."""
    names = list(case.shape)[1:]
    layer = {"glu_layers": _glu, "attention_layers": _latent if case.args.get("layer") == "mla" else _attention}[
        case.op
    ]

    def call(x, *parameters):
        weights = dict(zip(names, parameters, strict=True))

        def linear(x, name):
            return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

        return layer(case, core, x, weights, linear)

    return call


def _glu(case, core, x, weights, linear):
    y = core(linear(x, "gate_up_proj"))
    return linear(y, "down_proj") if "down_proj.weight" in weights else y


def _attention(case, core, x, weights, linear):
    args = case.args
    heads, kv, d = args["heads"], args["kv_heads"], args["head_dim"]
    if args["layer"] == "mha":
        q, k, v = (linear(x, f"{n}_proj").unflatten(-1, (-1, d)) for n in "qkv")
    else:
        q, k, v = linear(x, "qkv_proj").unflatten(-1, (-1, d)).split((heads, kv, kv), 2)
    if args.get("position") == "rope":
        cos, sin = _tables(x, d)
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
    return linear(core(q, k, v, args["causal"]).flatten(2), "o_proj")


def _latent(case, core, x, weights, linear):
    args = case.args
    heads, d, wide = args["heads"], args["head_dim"], args["latent_dim"]

    def norm(x, name):
        weight = weights.get(f"{name}.weight")
        return x if weight is None else F.rms_norm(x, x.shape[-1:], weight, 1e-6)

    q = linear(norm(linear(x, "q_down_proj"), "q_norm"), "q_up_proj").unflatten(-1, (heads, -1))
    row = linear(x, "kv_down_proj")
    k, v = linear(norm(row[..., :wide], "kv_norm"), "kv_up_proj").unflatten(-1, (heads, -1)).split(d, -1)
    if args.get("position") == "rope":
        rope = row.shape[-1] - wide
        cos, sin = _tables(x, rope)
        k_rope = _turned(row[..., None, wide:], cos, sin).expand(-1, -1, heads, -1)
        q = torch.cat((_turned(q[..., :rope], cos, sin), q[..., rope:]), -1)
        k = torch.cat((k_rope, k), -1)
    return linear(core(q, k, v, args["causal"]).flatten(2), "o_proj")


def _tables(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin [S, 1, width] in x's dtype, made once: a model hands one pair to all its layers."""
    key = x.shape[1], width, x.dtype, x.device
    if key not in _made:
        half = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64, device=x.device) / (width // 2))
        angle = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)[:, None, None] * half.repeat(2)
        _made.clear()
        _made[key] = angle.cos().float().to(x.dtype), angle.sin().float().to(x.dtype)
    return _made[key]


_made: dict = {}


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's fused attention."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]).transpose(
        1, 2
    )


def naive(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """What document 004 timed as "PyTorch": products and softmax one by one, keys and values repeated for every head."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)
