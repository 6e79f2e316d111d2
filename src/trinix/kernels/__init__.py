"""The work: one folder for each way of running an op, the same file names as ``trinix.ops``."""
