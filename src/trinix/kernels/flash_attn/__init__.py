"""FlashAttention's own kernels, from whichever of its packages is installed."""
