"""The least that a case has to move or compute, the ceilings of this card, and the guard against impossible results."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from trinix import device
from trinix.lab.case import Case

# A result is an error of measurement, not a record, when it beats the best measured ceiling of the same traffic by more
# than equal kernels differ between rounds: 4%, and 2 us for the short ones.
MARGIN, MARGIN_MS = 1.04, 0.002


@dataclass(frozen=True)
class Work:
    """Fewest bytes through device memory, floating-point operations, and which ceiling binds."""

    bytes: int
    flops: int
    ceiling: str


def _activation(case: Case, pass_: str) -> Work:
    n, size = prod(case.shape["x"]), case.dtype.itemsize
    kind = case.args["kind"]
    forward = 0 if kind == "none" else 2 * n * size
    # what relu and leaky_relu need of x is its sign: one bit an element
    signs = 2 * n * size + n // 8
    backward = {"none": 0, "relu": signs, "leaky_relu": signs}.get(kind, 3 * n * size)
    moved = {"fwd": forward, "fwd_grad": forward, "bwd": backward, "fwd_bwd": forward + backward}[pass_]
    return Work(moved, 0, "bandwidth")


WORK = {"activation": _activation}


def work(case: Case, pass_: str) -> Work | None:
    """What a pass of a case must do at least, or None for an op without a model yet."""
    return WORK[case.op](case, pass_) if case.op in WORK else None


def traffic_probes(moved: int) -> dict[str, Callable]:
    """Calls that move ``moved`` bytes at the card's best: a copy (one read, one write), the ceiling that shares are of, and
    a sum (two reads, one write), which is up to 2% faster."""
    half, third = moved // 2 // 2, moved // 3 // 2
    a = torch.empty(half, dtype=torch.bfloat16, device="cuda").normal_()
    b = torch.empty_like(a)
    x, y, z = (torch.empty(third, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(3))
    return {"copy": lambda: b.copy_(a), "add": lambda: torch.add(x, y, out=z)}


def impossible(ms: float, moved: int, ceiling_ms: float, card: device.Card) -> str | None:
    """Why a time cannot be true, or None."""
    if not moved:
        return None
    if not ms:
        return f"no kernel was seen, but {moved} bytes have to move"
    rate = moved / ms / 1e6
    if card.bandwidth_gbs and rate > card.bandwidth_gbs:
        return f"{rate:.0f} GB/s is above the listed {card.bandwidth_gbs:.0f} GB/s of {card.name}"
    if ms * MARGIN + MARGIN_MS < ceiling_ms:
        return f"{ms:.4f} ms is faster than this card moves the least bytes ({ceiling_ms:.4f} ms measured)"
    return None
