"""cuDNN's kernels, through PyTorch."""
