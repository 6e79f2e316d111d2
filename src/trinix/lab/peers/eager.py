"""PyTorch's best built-in, eager; in float64 it is the oracle too."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trinix.lab import attention, layers
from trinix.lab.case import Case

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "squared_relu": lambda x: F.relu(x).square(),
    "mish": F.mish,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "softplus": F.softplus,
}
GATES = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": ACTIVATIONS["gelu_tanh"],
    "reglu": F.relu,
    "quick_geglu": ACTIVATIONS["quick_gelu"],
    "bilinear": lambda x: x,
}


def softmax_of(case: Case, softmax: Callable) -> Callable:
    dim, scale = case.args["dim"], case.args.get("scale")
    if "mask" in case.shape:
        return lambda x, mask: softmax(x * (1.0 if scale is None else scale) + mask, dim)
    if scale is not None:
        return lambda x: softmax(x * scale, dim)
    return lambda x: softmax(x, dim)


def _layer_norm(case: Case) -> Callable:
    shape, eps = case.shape["x"][-1:], case.args["eps"]
    return lambda x, weight=None, bias=None: F.layer_norm(x, shape, weight, bias, eps)


def _rms_norm(case: Case) -> Callable:
    shape, eps, offset = case.shape["x"][-1:], case.args["eps"], case.args.get("weight_offset", 0.0)
    if offset:
        return lambda x, weight: F.rms_norm(x, shape, weight + offset, eps)
    return lambda x, weight=None: F.rms_norm(x, shape, weight, eps)


def with_residual(norm: Callable) -> Callable:
    def call(x, residual, *parameters):
        total = x + residual
        return norm(total, *parameters), total

    return call


def _rms_norm_activation(case: Case) -> Callable:
    norm, activation = _rms_norm(case), ACTIVATIONS[case.args["kind"]]
    return lambda x, weight: activation(norm(x, weight))


def halves(packed: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """(gate, up), views of a packed tensor."""
    if layout == "interleaved":
        return packed[..., ::2], packed[..., 1::2]
    first, second = packed.chunk(2, -1)
    return (first, second) if layout == "gate_first" else (second, first)


def glu_of(case: Case, gates: dict[str, Callable]) -> Callable:
    activation, layout = gates[case.args["kind"]], case.args.get("layout", "gate_first")
    if "up" in case.shape:
        return lambda gate, up: activation(gate) * up

    def packed(x):
        gate, up = halves(x, layout)
        return activation(gate) * up

    return packed


def _turned(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    width = cos.shape[-1]
    if width == x.shape[-1]:
        return x * cos + _turned(x, interleaved) * sin
    rotary, rest = x[..., :width], x[..., width:]
    return torch.cat((rotary * cos + _turned(rotary, interleaved) * sin, rest), -1)


def _rope(case: Case) -> Callable:
    interleaved = case.args.get("interleaved", False)
    return lambda q, k, cos, sin: (_rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved))


def _qk_norm_rope(case: Case) -> Callable:
    eps = case.args["eps"]

    def call(q, k, q_weight, k_weight, cos, sin):
        q = F.rms_norm(q, q_weight.shape, q_weight, eps)
        k = F.rms_norm(k, k_weight.shape, k_weight, eps)
        return _rotated(q, cos, sin), _rotated(k, cos, sin)

    return call


def _widened(case: Case, function: Callable) -> Callable:
    """``function`` on the tables as models hand them to every layer: full width, the positions' rows, q's dtype.

    Made once for the tables at hand, as a model makes them once for all its layers: not a part of the op's time.
    """
    length, start = case.shape["q"][1], case.args.get("offset", 0)
    interleaved = case.args.get("interleaved", False)
    made: dict = {}

    def widen(table: Tensor) -> Tensor:
        rows = table[start : start + length]
        return rows.repeat_interleave(2, -1) if interleaved else torch.cat((rows, rows), -1)

    def call(q, k, *rest):
        *weights, cos, sin = rest
        if made.get("of") is not cos or made["dtype"] != q.dtype:
            made.update(of=cos, dtype=q.dtype, tables=[widen(t).to(q.dtype).unsqueeze(1) for t in (cos, sin)])
        return function(q, k, *weights, *made["tables"])

    return call


def _alibi_bias(case: Case) -> Callable:
    length, causal = case.args["seq_q"], case.args["causal"]

    def call(slopes):
        at = torch.arange(length, device=slopes.device, dtype=slopes.dtype)
        bias = -slopes[:, None, None] * (at[None, :] - at[:, None]).abs()
        if causal:
            bias = bias.masked_fill(at[None, :] > at[:, None], float("-inf"))
        return bias.to(case.dtype) if slopes.dtype == torch.float32 else bias  # float64 is the oracle's

    return call


def _head_mlp(case: Case) -> Callable:
    if "w_gate" in case.shape:
        activation = GATES[case.args["kind"]]
        return lambda x, w1, w2, w_gate: torch.bmm(activation(torch.bmm(x, w_gate)) * torch.bmm(x, w1), w2)
    activation = ACTIVATIONS[case.args["kind"]]
    return lambda x, w1, w2: torch.bmm(activation(torch.bmm(x, w1)), w2)


def _glu_layer(case: Case) -> Callable:
    activation = GATES[case.args["kind"]]

    def gated(packed):
        gate, up = packed.chunk(2, -1)
        return activation(gate) * up

    return layers.of(case, gated)


FORMS: dict[str, Callable[[Case], Callable]] = {
    "activation": lambda case: ACTIVATIONS[case.args["kind"]],
    "softmax": lambda case: softmax_of(case, F.softmax),
    "log_softmax": lambda case: softmax_of(case, F.log_softmax),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "layer_norm_residual": lambda case: with_residual(_layer_norm(case)),
    "rms_norm_residual": lambda case: with_residual(_rms_norm(case)),
    "rms_norm_activation": _rms_norm_activation,
    "glu": lambda case: glu_of(case, GATES),
    "head_mlp": _head_mlp,
    "rope": _rope,
    "qk_norm_rope": _qk_norm_rope,
    "alibi_bias": _alibi_bias,
    "glu_layers": _glu_layer,
    "attention_layers": lambda case: layers.of(case, layers.sdpa),
    "attention": attention.sdpa,
    "attention_decode": attention.sdpa_decode,
}
AROUND = {"rope": _widened, "qk_norm_rope": _widened}  # what callers prepare once, kept out of the clock


def core(case: Case) -> Callable | None:
    """The op's own work: what torch.compile gets."""
    return FORMS[case.op](case) if case.op in FORMS else None


def around(case: Case, function: Callable) -> Callable:
    return AROUND[case.op](case, function) if case.op in AROUND else function


def prepare(case: Case) -> Callable | None:
    function = core(case)
    return function and around(case, function)
