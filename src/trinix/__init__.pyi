"""What type checkers and editors see of the names that ``__init__.py`` loads on first use."""

from trinix import models as models
from trinix import ops as ops
from trinix.dispatch import Unsupported as Unsupported
from trinix.dispatch import use_backend as use_backend
from trinix.flash_attn import flash_attn_func as flash_attn_func
from trinix.flash_attn import flash_attn_varlen_func as flash_attn_varlen_func
from trinix.flash_attn import flash_attn_with_kvcache as flash_attn_with_kvcache
from trinix.flash_attn import triton_attn_func as triton_attn_func
from trinix.layers.activation import FastGELU as FastGELU
from trinix.layers.activation import FastLeakyReLU as FastLeakyReLU
from trinix.layers.activation import FastMish as FastMish
from trinix.layers.activation import FastQuickGELU as FastQuickGELU
from trinix.layers.activation import FastReLU as FastReLU
from trinix.layers.activation import FastSigmoid as FastSigmoid
from trinix.layers.activation import FastSiLU as FastSiLU
from trinix.layers.activation import FastSoftplus as FastSoftplus
from trinix.layers.activation import FastSquaredReLU as FastSquaredReLU
from trinix.layers.activation import FastTanh as FastTanh
from trinix.layers.attention import FastGroupedQueryAttention as FastGroupedQueryAttention
from trinix.layers.attention import FastMultiHeadAttention as FastMultiHeadAttention
from trinix.layers.attention import FastMultiHeadSelfAttention as FastMultiHeadSelfAttention
from trinix.layers.attention import FastMultiQueryAttention as FastMultiQueryAttention
from trinix.layers.cache import DynamicCache as DynamicCache
from trinix.layers.cache import LatentCache as LatentCache
from trinix.layers.cache import PagedCache as PagedCache
from trinix.layers.cache import StaticCache as StaticCache
from trinix.layers.embedding import FastALiBiPositionEmbedding as FastALiBiPositionEmbedding
from trinix.layers.embedding import FastRoPEPositionEmbedding as FastRoPEPositionEmbedding
from trinix.layers.glu import FastGeGLU as FastGeGLU
from trinix.layers.glu import FastReGLU as FastReGLU
from trinix.layers.glu import FastSwiGLU as FastSwiGLU
from trinix.layers.head_mlp import FlashMLP as FlashMLP
from trinix.layers.head_mlp import FlashMLPFunction as FlashMLPFunction
from trinix.layers.head_mlp import PyTorchMLP as PyTorchMLP
from trinix.layers.head_mlp import flashmlp_bwd as flashmlp_bwd
from trinix.layers.head_mlp import flashmlp_fwd as flashmlp_fwd
from trinix.layers.latent_attention import FastMultiHeadLatentAttention as FastMultiHeadLatentAttention
from trinix.layers.norm import FastFusedResidualLayerNorm as FastFusedResidualLayerNorm
from trinix.layers.norm import FastFusedResidualRMSNorm as FastFusedResidualRMSNorm
from trinix.layers.norm import FastFusedRMSNormActivation as FastFusedRMSNormActivation
from trinix.layers.norm import FastLayerNorm as FastLayerNorm
from trinix.layers.norm import FastRMSNorm as FastRMSNorm
from trinix.layers.norm import fuse as fuse
from trinix.ops import explain as explain

__version__: str
