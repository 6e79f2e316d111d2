"""Gated linear units in plain PyTorch: any device, any floating dtype, differentiable to any order by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

FORMULAS = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "geglu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "reglu": lambda gate, up: torch.relu(gate) * up,
    "quick_geglu": lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up,
    "bilinear": lambda gate, up: gate * up,
    "glu": lambda gate, up: torch.sigmoid(gate) * up,
}
LAYOUTS = ("gate_first", "gate_last", "interleaved")


def split(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """(gate, up), views of the packed x [..., 2H]."""
    if layout == "interleaved":
        return x.unflatten(-1, (x.shape[-1] // 2, 2)).unbind(-1)
    first, second = x.chunk(2, -1)
    return (first, second) if layout == "gate_first" else (second, first)


def unsupported(gate: Tensor, up: Tensor | None) -> str | None:
    return None


def forward(gate: Tensor, up: Tensor | None, kind: str, layout: str) -> Tensor:
    if up is None:
        gate, up = split(gate, layout)
    return FORMULAS[kind](gate, up)
