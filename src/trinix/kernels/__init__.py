"""The work: one folder for each way of running an op, the same file names as ``trinix.ops``."""

# of scores: a positive one below may be 0 in float32, and the -inf of a place that is hidden, or none, times that is NaN
LEAST_SCALE = 2.0**-126
