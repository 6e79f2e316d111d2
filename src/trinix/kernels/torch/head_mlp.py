"""Per-head MLPs in plain PyTorch: any device, any floating dtype, differentiable to any order by autograd."""

import torch
from torch import Tensor

from trinix.kernels.torch.activation import FORMULAS

SLOPE, BETA, THRESHOLD = 0.01, 1.0, 20.0  # of leaky_relu and softplus
PARAMETERS = {"leaky_relu": (SLOPE, 0.0), "softplus": (BETA, THRESHOLD)}  # kind -> (a, b), 0 elsewhere


def unsupported(*call) -> str | None:
    return None


def forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    w_gate: Tensor | None,
    kind: str,
    mean: bool,
) -> Tensor:
    activation, (a, b) = FORMULAS[kind], PARAMETERS.get(kind, (0.0, 0.0))
    hidden = torch.matmul(x, w1)
    if b1 is not None:
        hidden = hidden + b1.unsqueeze(-2)
    hidden = activation(hidden, a, b) if w_gate is None else activation(torch.matmul(x, w_gate), a, b) * hidden
    out = torch.matmul(hidden, w2)
    if b2 is not None:
        out = out + b2.unsqueeze(-2)
    return out.mean(0) if mean else out
