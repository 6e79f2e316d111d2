"""Fused GPU kernels for Transformers behind plain functions and drop-in modules, and the laboratory that proves them.

The names below load on first use; ``import trinix`` itself imports nothing.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "ops": "trinix.ops",
    "models": "trinix.models",
    "explain": "trinix.ops",
    "use_backend": "trinix.dispatch",
    "Unsupported": "trinix.dispatch",
} | dict.fromkeys(
    (
        "FastReLU", "FastSigmoid", "FastSiLU", "FastGELU", "FastQuickGELU", "FastSquaredReLU", "FastMish", "FastLeakyReLU",
        "FastTanh", "FastSoftplus",
    ),
    "trinix.layers.activation",
) | dict.fromkeys(
    ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache", "triton_attn_func"), "trinix.flash_attn"
) | dict.fromkeys(("FastRoPEPositionEmbedding", "FastALiBiPositionEmbedding"), "trinix.layers.embedding") | dict.fromkeys(
    (
        "FastLayerNorm", "FastRMSNorm", "FastFusedResidualLayerNorm", "FastFusedResidualRMSNorm",
        "FastFusedRMSNormActivation", "fuse",
    ),
    "trinix.layers.norm",
) | dict.fromkeys(("FastSwiGLU", "FastGeGLU", "FastReGLU"), "trinix.layers.glu") | dict.fromkeys(
    ("FlashMLP", "PyTorchMLP", "FlashMLPFunction", "flashmlp_fwd", "flashmlp_bwd"), "trinix.layers.head_mlp"
) | dict.fromkeys(
    (
        "FastMultiHeadSelfAttention", "FastMultiHeadAttention", "FastGroupedQueryAttention", "FastMultiQueryAttention",
    ),
    "trinix.layers.attention",
) | dict.fromkeys(("FastMultiHeadLatentAttention",), "trinix.layers.latent_attention") | dict.fromkeys(
    ("StaticCache", "DynamicCache", "PagedCache", "LatentCache"), "trinix.layers.cache"
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
