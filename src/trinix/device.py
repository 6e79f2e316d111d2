"""Facts of the cards: what this machine has, and the listed peaks that no measurement may pass.

Peaks are the vendors' dense figures; ``trinix.lab.roofline`` measures what a card really reaches.
"""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Limits:
    """Per-architecture limits that a compiled kernel has to respect, and the listed peaks of its usual card."""

    target: str  # what the compiler calls it
    card: str
    shared_kib: int  # the most shared memory (LDS) one block may ask for
    bandwidth_gbs: float  # listed memory bandwidth, GB/s


LIMITS = {
    "sm_80": Limits("sm_80", "A100 80GB SXM", 163, 2039.0),
    "sm_90": Limits("sm_90", "H100 SXM", 227, 3352.0),
    "sm_100": Limits("sm_100", "B200", 227, 8000.0),
    "gfx942": Limits("gfx942", "MI300X", 64, 5300.0),
}

# Listed bandwidth (GB/s) by a part of the device name, for cards whose memory differs from their architecture's usual card.
_BANDWIDTH_BY_NAME = {"H200": 4800.0, "H100 NVL": 3900.0, "H100 PCIe": 2000.0, "A100-SXM4-40GB": 1555.0}


@dataclass(frozen=True)
class Card:
    """One GPU as PyTorch reports it."""

    name: str
    target: str
    sm_count: int
    memory_gib: float

    @property
    def limits(self) -> Limits | None:
        return LIMITS.get(self.target)

    @property
    def bandwidth_gbs(self) -> float | None:
        """Listed memory bandwidth in GB/s, or None for a card that is not listed."""
        for part, listed in _BANDWIDTH_BY_NAME.items():
            if f" {part} " in f" {self.name} ":
                return listed
        return self.limits.bandwidth_gbs if self.limits else None

    @property
    def slug(self) -> str:
        """The folder name under ``results/``: "NVIDIA H100 80GB HBM3" -> "h100"."""
        words = self.name.lower().replace("-", " ").split()
        return next((w for w in words if any(c.isdigit() for c in w)), words[-1] if words else "gpu")


@cache
def card(index: int = 0) -> Card | None:
    """The GPU with this index, or None where PyTorch sees none."""
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    facts = torch.cuda.get_device_properties(index)
    arch = getattr(facts, "gcnArchName", "").partition(":")[0]
    target = arch if torch.version.hip else f"sm_{facts.major}{facts.minor}"
    return Card(facts.name, target, facts.multi_processor_count, facts.total_memory / 2**30)
