"""The formulas that the seed documents timed as "PyTorch", op by op. Named apart: beating them proves little."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from trinix import device
from trinix.lab import attention, layers
from trinix.lab.case import Case
from trinix.lab.peers import eager

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,  # document 003's "to" column: PyTorch's own
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "squared_relu": lambda x: F.relu(x) ** 2,
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
}


def _activation(case: Case) -> Callable | str:
    return ACTIVATIONS.get(case.args["kind"], "no document times this kind")


def _softmax(case: Case) -> Callable | None:
    if case.document != "003":
        return None
    # document 003: in float32 and back, whatever the dtype
    return eager.softmax_of(case, lambda x, dim: F.softmax(x, dim, dtype=torch.float32).to(x.dtype))


def _rms_norm(case: Case) -> Callable | None:
    if case.document == "trinix":
        return None
    eps = case.args["eps"]
    return lambda x, weight: weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def _head_mlp(case: Case) -> Callable | None:
    if case.document != "000":
        return None
    # two products of all heads around PyTorch's own silu, as eager's: its memory after forward is z, h and o
    return lambda x, w1, w2: torch.bmm(ACTIVATIONS[case.args["kind"]](torch.bmm(x, w1)), w2)


# Ops that are not here were timed as PyTorch's own call: the documents' column is "eager".
FORMS: dict[str, Callable[[Case], Callable | str | None]] = {
    "activation": _activation,
    "softmax": _softmax,
    "rms_norm": _rms_norm,
    "head_mlp": _head_mlp,
    "attention_layers": lambda case: layers.of(case, layers.naive),
    "attention": attention.naive,
}


# of the scores that the formula holds at its peak: what softmax kept, its two gradients, one more; with a mask the masked ones too
COPIES = {False: 4, True: 5}


def prepare(case: Case) -> Callable | str | None:
    card = device.card()
    if case.op in attention.SCORED and card:
        gib = COPIES[case.args.get("causal", False)] * attention.scores(case) * case.dtype.itemsize / 2**30
        if gib > card.memory_gib * 0.9:
            return f"its scores would take {gib:.0f} GiB of this card's {card.memory_gib:.0f}"
    return FORMS[case.op](case) if case.op in FORMS else None
