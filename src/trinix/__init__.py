"""Fused GPU kernels for Transformers behind plain functions and drop-in modules, and the laboratory that proves them.

The names below load on first use; ``import trinix`` itself imports nothing.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "ops": "trinix.ops",
    "explain": "trinix.ops",
    "use_backend": "trinix.dispatch",
    "Unsupported": "trinix.dispatch",
} | dict.fromkeys(
    (
        "FastReLU", "FastSigmoid", "FastSiLU", "FastGELU", "FastQuickGELU", "FastSquaredReLU", "FastMish", "FastLeakyReLU",
        "FastTanh", "FastSoftplus",
    ),
    "trinix.layers.activation",
) | dict.fromkeys(("FastRoPEPositionEmbedding", "FastALiBiPositionEmbedding"), "trinix.layers.embedding") | dict.fromkeys(
    (
        "FastLayerNorm", "FastRMSNorm", "FastFusedResidualLayerNorm", "FastFusedResidualRMSNorm",
        "FastFusedRMSNormActivation", "fuse",
    ),
    "trinix.layers.norm",
)  # fmt: skip

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'trinix' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    value = home if _HOMES[name] == f"trinix.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
