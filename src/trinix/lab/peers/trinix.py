"""trinix itself: what "auto" chooses, and each of its own backends by name. An op that is not here is not built."""

from collections.abc import Callable

from trinix import ops
from trinix.lab.case import Case


def _activation(case: Case, backend: str) -> Callable:
    kind = case.args["kind"]
    short = {"none": "identity", "gelu_tanh": None}.get(kind, kind)
    if short is None:
        return lambda x: ops.gelu(x, "tanh", backend=backend)
    op = getattr(ops, short)
    if backend == "auto":
        return op  # as users call it: a wrapper's microsecond would be timed as ours
    return lambda x: op(x, backend=backend)


OPS = {"activation": _activation}


def is_built(case: Case) -> bool:
    return case.op in OPS


def prepare_auto(case: Case) -> Callable | str:
    return OPS[case.op](case, "auto")


def prepare_triton(case: Case) -> Callable | str:
    if case.args.get("kind") == "none":
        return "the identity runs no kernel"
    return OPS[case.op](case, "triton")


def backend_of(case: Case, impl: str, *inputs) -> str:
    """What really runs under an impl's name, asked of trinix for these inputs."""
    if not impl.startswith("trinix"):
        return impl
    backend = impl.partition(":")[2] or "auto"
    return ops.explain("activation", *inputs, case.args["kind"], backend=backend).backend
