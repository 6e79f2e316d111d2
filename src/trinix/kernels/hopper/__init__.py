"""Kernels in Gluon for Hopper (sm_90): warp-specialised, fed by the copy engine, multiplied by warpgroups."""
