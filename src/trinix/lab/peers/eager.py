"""PyTorch's best built-in, eager; in float64 it is the oracle too."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

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


def prepare(case: Case) -> Callable | str:
    if case.op == "activation":
        return ACTIVATIONS[case.args["kind"]]
    return f"no eager form of {case.op}"
