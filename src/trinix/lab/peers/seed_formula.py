"""The formulas that the seed documents timed as "PyTorch", op by op. Named apart: beating them proves little."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from trinix.lab.case import Case

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,  # document 003's "to" column: PyTorch's own
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "squared_relu": lambda x: F.relu(x) ** 2,
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
}


def prepare(case: Case) -> Callable | str:
    if case.op == "activation":
        return ACTIVATIONS.get(case.args["kind"], "no document times this kind")
    return f"no formula of {case.op} yet"
