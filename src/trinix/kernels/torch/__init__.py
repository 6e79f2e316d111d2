"""The formulas in plain PyTorch: the oracle (in float64) and the CPU path."""
