"""quack-kernels (written against 0.6.5): CuTe kernels for Hopper and later. Its GLUs live in matrix products, not alone."""

import importlib.util
from collections.abc import Callable

import torch

from trinix.lab.case import Case


def _softmax(case: Case) -> Callable | str:
    if case.args["dim"] != -1 or "scale" in case.args or "mask" in case.shape:
        return "quack has the last dimension only, without scale and mask"
    from quack.softmax import softmax

    columns = case.shape["x"][-1]
    return lambda x: softmax(x.view(-1, columns)).view(x.shape)


def _layer_norm(case: Case) -> Callable:
    """quack has both passes without an autograd function around them, and takes float32 parameters only."""
    from quack.rmsnorm import layernorm_bwd, layernorm_fwd

    eps, columns = case.args["eps"], case.shape["x"][-1]

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            wide = weight.float()
            needs = any(ctx.needs_input_grad)
            if not needs:
                return layernorm_fwd(x, wide, bias.float(), eps)
            y, rstd, mean = layernorm_fwd(x, wide, bias.float(), eps, True, True)
            ctx.save_for_backward(x, wide, rstd, mean)
            ctx.dtype = weight.dtype
            return y

        @staticmethod
        def backward(ctx, dy):
            x, wide, rstd, mean = ctx.saved_tensors
            dx, dw, db = layernorm_bwd(x, wide, dy, rstd, mean)
            return dx, dw.to(ctx.dtype), db.to(ctx.dtype)

    return lambda x, weight, bias: LayerNorm.apply(x.view(-1, columns), weight, bias).view(x.shape)


def _rms_norm(case: Case) -> Callable:
    from quack import rmsnorm

    eps, offset = case.args["eps"], case.args.get("weight_offset", 0.0)
    return lambda x, weight=None: rmsnorm(x, weight, eps=eps, weight_offset=offset)


def _rms_norm_residual(case: Case) -> Callable:
    from quack import rmsnorm

    eps = case.args["eps"]
    return lambda x, residual, weight: rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)


def _rope(case: Case) -> Callable:
    from quack.rotary import apply_rotary_emb

    interleaved, length, start = case.args.get("interleaved", False), case.shape["q"][1], case.args.get("offset", 0)
    part = case.shape["cos"][0] != length

    def call(q, k, cos, sin):
        if part:
            cos, sin = cos[start : start + length], sin[start : start + length]
        return apply_rotary_emb(q, cos, sin, interleaved), apply_rotary_emb(k, cos, sin, interleaved)

    return call


FORMS: dict[str, Callable[[Case], Callable | str]] = {
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "rms_norm_residual": _rms_norm_residual,
    "rope": _rope,
}


def prepare(case: Case) -> Callable | str | None:
    if case.op not in FORMS:
        return None
    if importlib.util.find_spec("quack") is None:
        return "not installed"
    if not torch.cuda.is_available():
        return "timed on a GPU only"
    return FORMS[case.op](case)
