"""Portable Triton kernels: sm_80 and later, gfx942."""
