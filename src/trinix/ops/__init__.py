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
from trinix.ops.alibi import alibi_bias, alibi_slopes
from trinix.ops.alibi import explain as _explain_alibi
from trinix.ops.attention import attention
from trinix.ops.attention import explain as _explain_attention
from trinix.ops.attention_decode import attention_decode
from trinix.ops.attention_decode import explain as _explain_attention_decode
from trinix.ops.glu import explain as _explain_glu
from trinix.ops.glu import geglu, glu, reglu, swiglu
from trinix.ops.head_mlp import explain as _explain_head_mlp
from trinix.ops.head_mlp import head_mlp
from trinix.ops.norm import explain as _explain_norm
from trinix.ops.norm import layer_norm, layer_norm_residual, rms_norm, rms_norm_activation, rms_norm_residual
from trinix.ops.rope import explain as _explain_rope
from trinix.ops.rope import qk_norm_rope, rope, rope_table
from trinix.ops.softmax import explain as _explain_softmax
from trinix.ops.softmax import log_softmax, softmax

__all__ = [
    "KINDS", "activation", "alibi_bias", "alibi_slopes", "attention", "attention_decode", "geglu", "gelu", "glu", "head_mlp", "identity",
    "layer_norm", "layer_norm_residual", "leaky_relu", "log_softmax", "mish", "qk_norm_rope", "quick_gelu", "reglu", "relu",
    "rms_norm", "rms_norm_activation", "rms_norm_residual", "rope", "rope_table", "sigmoid", "silu", "softmax",
    "softplus", "squared_relu", "swiglu", "tanh",
]  # fmt: skip

_ACTIVATIONS = (
    activation, gelu, identity, leaky_relu, mish, quick_gelu, relu, sigmoid, silu, softplus, squared_relu, tanh,
)  # fmt: skip
EXPLAIN = {op.__name__: (op, _explain_activation) for op in _ACTIVATIONS}
EXPLAIN |= {op.__name__: (op, _explain_glu) for op in (geglu, glu, reglu, swiglu)}
EXPLAIN |= {
    op.__name__: (op, _explain_norm)
    for op in (layer_norm, layer_norm_residual, rms_norm, rms_norm_activation, rms_norm_residual)
}
EXPLAIN |= {op.__name__: (op, _explain_rope) for op in (qk_norm_rope, rope)}
EXPLAIN |= {op.__name__: (op, _explain_softmax) for op in (log_softmax, softmax)}
EXPLAIN["alibi_bias"] = alibi_bias, _explain_alibi
EXPLAIN["head_mlp"] = head_mlp, _explain_head_mlp
EXPLAIN["attention"] = attention, _explain_attention
EXPLAIN["attention_decode"] = attention_decode, _explain_attention_decode


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
    function, explainer = EXPLAIN.get(name, (None, None))
    if function is None or op not in (name, function):  # another library's function of the same name
        raise ValueError(f"explain: op must be one of {sorted(EXPLAIN)}, or that function of trinix.ops, got {op!r}")
    return explainer(function, *args, **kwargs)
