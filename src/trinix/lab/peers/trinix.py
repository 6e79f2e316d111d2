"""trinix itself: what "auto" chooses, and each of its own backends by name. An op that is not here is not built."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

from trinix import device, ops
from trinix.lab import attention, layers
from trinix.lab.case import Case

# Every form is ``form(case, op, **more)``: the op with the case's arguments, still to be called on its inputs. ``op`` is the
# function of ``trinix.ops``, or ``explain`` bound to its name; ``more`` is empty or names a backend.


def _activation(case: Case, op: Callable, **more) -> Callable:
    return partial(op, kind=case.args["kind"], **more)


def _softmax(case: Case, op: Callable, **more) -> Callable:
    call = partial(op, **case.args, **more)
    return (lambda x, mask: call(x, mask=mask)) if "mask" in case.shape else call


def _layer_norm(case: Case, op: Callable, **more) -> Callable:
    shape, eps = case.shape["x"][-1:], case.args["eps"]
    return lambda x, weight=None, bias=None: op(x, shape, weight, bias, eps, **more)


def _rms_norm(case: Case, op: Callable, **more) -> Callable:
    shape, call = case.shape["x"][-1:], partial(op, eps=case.args["eps"], **more)
    if offset := case.args.get("weight_offset"):
        call = partial(call, weight_offset=offset)
    return lambda x, weight=None: call(x, shape, weight)


def _layer_norm_residual(case: Case, op: Callable, **more) -> Callable:
    shape, eps = case.shape["x"][-1:], case.args["eps"]
    return lambda x, residual, weight=None, bias=None: op(x, residual, shape, weight, bias, eps, **more)


def _rms_norm_residual(case: Case, op: Callable, **more) -> Callable:
    shape, eps = case.shape["x"][-1:], case.args["eps"]
    return lambda x, residual, weight=None: op(x, residual, shape, weight, eps, **more)


def _rms_norm_activation(case: Case, op: Callable, **more) -> Callable:
    shape, kind, eps = case.shape["x"][-1:], case.args["kind"], case.args["eps"]
    return lambda x, weight: op(x, shape, weight, kind, eps, **more)


def _glu(case: Case, op: Callable, **more) -> Callable:
    return partial(op, **case.args, **more)


def _head_mlp(case: Case, op: Callable, **more) -> Callable:
    call = partial(op, kind=case.args["kind"], **more)
    return lambda x, w1, w2, w_gate=None: call(x, w1, w2, w_gate=w_gate)


def _rope(case: Case, op: Callable, **more) -> Callable:
    return partial(op, **case.args, **more)


def _alibi_bias(case: Case, op: Callable, **more) -> Callable:
    return partial(op, seq_q=case.args["seq_q"], causal=case.args["causal"], dtype=case.dtype, **more)


def _attention(case: Case, op: Callable, **more) -> Callable:
    return attention.of(case, partial(op, causal=case.args["causal"], **more))


def _attention_decode(case: Case, op: Callable, **more) -> Callable:
    def call(queries, *caches):
        where, v_cache = queries.device, attention.values(case, caches)
        table = attention.page_table(case, where)
        return op(queries, caches[0], v_cache, attention.lengths(case, where), page_table=table, **more)

    return call


OPS: dict[str, Callable] = {
    "activation": _activation,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "layer_norm_residual": _layer_norm_residual,
    "rms_norm_residual": _rms_norm_residual,
    "rms_norm_activation": _rms_norm_activation,
    "glu": _glu,
    "head_mlp": _head_mlp,
    "rope": _rope,
    "qk_norm_rope": _rope,
    "alibi_bias": _alibi_bias,
    "attention": _attention,
    "attention_decode": _attention_decode,
}


def is_built(case: Case) -> bool:
    return case.op in layers.OPS or (case.op in OPS and case.op in ops.EXPLAIN)


def prepare_auto(case: Case) -> Callable:
    if case.op in layers.OPS:
        return layers.ours(case)
    if case.op == "activation":  # as users call it: the short names
        kind = case.args["kind"]
        if kind == "gelu_tanh":
            return partial(ops.gelu, approximate="tanh")
        return getattr(ops, {"none": "identity"}.get(kind, kind))
    return OPS[case.op](case, getattr(ops, case.op))


def prepare_triton(case: Case) -> Callable | str:
    if case.op in layers.OPS:
        return layers.ours(case, "triton")
    if case.args.get("kind") == "none":
        return "the identity runs no kernel"
    if case.op == "activation":
        return partial(prepare_auto(case), backend="triton")
    return OPS[case.op](case, getattr(ops, case.op), backend="triton")


def prepare_hopper(case: Case) -> Callable | str | None:
    if case.op in layers.OPS or "hopper" not in import_module(ops.EXPLAIN[case.op][0].__module__).BACKENDS:
        return None
    if device.card() is None or device.card().target != "sm_90":
        return "runs on sm_90 only"
    return OPS[case.op](case, getattr(ops, case.op), backend="hopper")


def backend_of(case: Case, impl: str, *inputs) -> str:
    """What really runs under an impl's name, asked of trinix for these inputs."""
    if not impl.startswith("trinix"):
        return impl
    more = {"backend": impl.partition(":")[2]} if ":" in impl else {}
    if case.op in layers.OPS:
        return layers.backend_of(case, more.get("backend", "auto"), *inputs)
    return OPS[case.op](case, partial(ops.explain, case.op), **more)(*inputs).backend
