"""exp, log and tanh of float32 to a unit in the last place, for every card: the hardware's exponential and logarithm are two
units off by themselves, and ``/`` is not correctly rounded."""

import triton
import triton.language as tl

from trinix.kernels.triton.activation import tanh_from


@triton.jit
def exact_exp(x):
    """Of numbers up to 0. tl.exp rounds x log2(e), at x = -10 by 5e-7 of the result."""
    x = tl.where(x < -200.0, -200.0, x)  # where it is 0; NaN stays
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - n * 0.693359375) + n * 2.12194440e-4  # less n log(2), the first product exact
    # (exp(rest) - 1 - rest) / rest^2 to 3e-9 of exp(rest), rest in -log(2)/2 .. log(2)/2
    tail = 0.49999993 + rest * (0.16666515 + rest * (0.041668457 + rest * (0.008369419 + rest * 0.0013813145)))
    return tl.exp2(n) * (1.0 + (rest + rest * rest * tail))


@triton.jit
def exact_tanh(x):
    e = exact_exp(-2.0 * tl.abs(x))
    return tanh_from(x, tl.math.div_rn(1.0 - e, 1.0 + e))


@triton.jit
def exact_log(x):
    """Of a normal number above 0; the hardware's is off near 1."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # of the power of two that leaves sqrt(1/2) .. sqrt(2)
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    s = tl.math.div_rn(m - 1.0, m + 1.0)
    u = s * s
    tail = u * (0.6666666666666735 + u * (0.3999999999940942 + u * (0.2857142874366239 + u * 0.2222219843214978)))
    y = exponent.to(tl.float32) * 0.6931471805599453 + (2.0 * s + s * tail)
    return tl.where(x == x, y, x)  # NaN stays
