"""Activations in plain PyTorch: any device, any floating dtype, differentiable to any order by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _square(r: Tensor) -> Tensor:
    return r * r  # not r.square(): autocast would answer in float32


def _softplus(x: Tensor, beta: float, threshold: float) -> Tensor:
    y = F.softplus(x, beta, threshold)
    return y if y.dtype == x.dtype else y.to(x.dtype)  # autocast answers in float32; the op's contract is x.dtype


FORMULAS = {
    "none": lambda x, a, b: x,
    "relu": lambda x, a, b: torch.relu(x),
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "silu": lambda x, a, b: F.silu(x),
    "gelu": lambda x, a, b: F.gelu(x),
    "gelu_tanh": lambda x, a, b: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x, a, b: x * torch.sigmoid(1.702 * x),
    "squared_relu": lambda x, a, b: _square(torch.relu(x)),
    "mish": lambda x, a, b: F.mish(x),
    "leaky_relu": lambda x, a, b: F.leaky_relu(x, a),
    "tanh": lambda x, a, b: torch.tanh(x),
    "softplus": _softplus,
}


def unsupported(x: Tensor) -> str | None:
    return None


def forward(x: Tensor, kind: str, a: float, b: float) -> Tensor:
    return FORMULAS[kind](x, a, b)
