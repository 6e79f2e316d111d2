"""The contract: one maths, one file, one public function (and its short names)."""

from trinix.dispatch import Explanation
from trinix.ops.activation import (
    KINDS,
    activation,
    gelu,
    identity,
    leaky_relu,
    mish,
    quick_gelu,
    relu,
    sigmoid,
    silu,
    softplus,
    squared_relu,
    tanh,
)
from trinix.ops.activation import explain as _explain_activation

__all__ = [
    "KINDS", "activation", "gelu", "identity", "leaky_relu", "mish", "quick_gelu", "relu", "sigmoid", "silu", "softplus",
    "squared_relu", "tanh",
]  # fmt: skip

_ACTIVATIONS = (
    activation, gelu, identity, leaky_relu, mish, quick_gelu, relu, sigmoid, silu, softplus, squared_relu, tanh,
)  # fmt: skip
EXPLAIN = {op.__name__: (op, _explain_activation) for op in _ACTIVATIONS}


def explain(op, *args, **kwargs) -> Explanation:
    """Which backend ``op(*args, **kwargs)`` would run on, why, and with which configuration. Nothing is run.

    Args:
        op: a function of ``trinix.ops`` or its name.

    Raises:
        ValueError: ``op`` is unknown.
        Unsupported: the arguments name a backend that cannot run them.

    >>> print(trinix.explain("relu", torch.zeros(8)))
    relu -> torch: the first backend that is right and fastest here
      not triton: needs a GPU tensor, got cpu
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name not in EXPLAIN:
        raise ValueError(f"explain: op must be one of {sorted(EXPLAIN)}, got {name!r}")
    function, explainer = EXPLAIN[name]
    return explainer(function, *args, **kwargs)
