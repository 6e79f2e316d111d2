"""liger-kernel (written against 0.8.5), by its autograd functions, as its own modules call them.

Some write where they must not for our clock, which runs one backward many times: the GLUs' backward into gate and up, the
norm's into the incoming gradient, rope into q and k and their gradients. That is how liger is used and its fastest form
(its norm fills a tensor with zeros first otherwise), so it is timed so, on copies of its own: the gate sees fresh values,
the clocks see what the call before left.
"""

import importlib.util
from collections.abc import Callable

import torch

from trinix.lab import layers
from trinix.lab.case import Case

OVERWRITES = ("rms_norm", "glu", "rope")


def _softmax(ops, case: Case) -> Callable | str:
    if case.args["dim"] != -1 or "scale" in case.args or "mask" in case.shape:
        return "liger has the last dimension only, without scale and mask"
    return ops.LigerSoftmaxFunction.apply


def _layer_norm(ops, case: Case) -> Callable | str:
    if "bias" not in case.shape:
        return "liger needs weight and bias"
    apply, eps = ops.LigerLayerNormFunction.apply, case.args["eps"]
    return lambda x, weight, bias: apply(x, weight, bias, eps)


def _rms_norm(ops, case: Case) -> Callable:
    apply, eps, offset = ops.LigerRMSNormFunction.apply, case.args["eps"], case.args.get("weight_offset", 0.0)
    return lambda x, weight=None: apply(x, weight, eps, offset, "gemma", True)  # "gemma": float32 until the output


def _rms_norm_residual(ops, case: Case) -> Callable:
    apply, eps = ops.LigerFusedAddRMSNormFunction.apply, case.args["eps"]
    return lambda x, residual, weight: apply(x, residual, weight, eps, 0.0, "gemma", False)


def _glu(ops, case: Case) -> Callable | str:
    kind = case.args["kind"]
    if "up" in case.shape:
        functions = {"swiglu": ops.LigerSiLUMulFunction, "geglu_tanh": ops.LigerGELUMulFunction}
        return functions[kind].apply if kind in functions else f"liger has {list(functions)} only"
    if kind == "swiglu" and case.args.get("layout", "gate_first") == "gate_first":
        return ops.LigerFusedGateUpSiLUMulFunction.apply
    return "liger's packed form is swiglu with the gate first"


def _glu_layer(ops, case: Case) -> Callable | str:
    """One product for gate and up around liger's activation, its fastest MLP."""
    functions = {"swiglu": ops.LigerSiLUMulFunction, "geglu_tanh": ops.LigerGELUMulFunction}
    if case.args["kind"] == "swiglu":
        apply = ops.LigerFusedGateUpSiLUMulFunction.apply  # takes rows: its gradient has two dimensions
        return layers.of(case, lambda packed: apply(packed.flatten(0, -2)).unflatten(0, packed.shape[:-1]))
    if case.args["kind"] not in functions:
        return f"liger has {list(functions)} only"
    apply = functions[case.args["kind"]].apply
    return layers.of(case, lambda packed: apply(*packed.chunk(2, -1)))


def _rope(ops, case: Case) -> Callable | str:
    if case.args.get("interleaved"):
        return "liger has the half-split form only"
    apply, width = ops.LigerRopeFunction.apply, 2 * case.shape["cos"][-1]
    length, start = case.shape["q"][1], case.args.get("offset", 0)
    part = case.shape["cos"][0] != length

    def call(q, k, cos, sin):
        if part:
            cos, sin = cos[start : start + length], sin[start : start + length]
        q, k = apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin, None, 1, width)
        return q.transpose(1, 2), k.transpose(1, 2)

    return call


FORMS: dict[str, Callable] = {
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "rms_norm_residual": _rms_norm_residual,
    "glu": _glu,
    "rope": _rope,
    "glu_layers": _glu_layer,
}


def prepare(case: Case) -> Callable | str | None:
    if case.op not in FORMS:
        return None
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed"
    if not torch.cuda.is_available():
        return "timed on a GPU only"
    import liger_kernel.ops

    return FORMS[case.op](liger_kernel.ops, case)
