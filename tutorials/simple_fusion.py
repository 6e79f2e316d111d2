"""Fusing a softmax: memory is crossed once, not five times. Run it: ``python tutorials/simple_fusion.py``.

The formula, for every row x of a matrix (the largest element is taken off first, or exp would overflow):

    y_i = exp(x_i - max(x)) / sum_j exp(x_j - max(x))

Written as one PyTorch operation after the other it is five kernels, and each one fetches its input from memory and puts
its result back. For a matrix of n bytes (what there is one of a row counts for nothing):

    operation         reads   writes
    max(x)              n
    x - max             n       n
    exp                 n       n
    sum                 n
    divide              n       n
    together            5 n     3 n

The floor is lower: x has to be read once and y written once, 2 n. There is next to nothing to compute (five operations
an element, where an H100 has time for about 160 while memory carries the element there and back), so time is bytes, and
one kernel that keeps the row in registers can be 4 times as fast as the five. It cannot be faster than
``torch.softmax``, except by details: that is one such kernel already. A comparison that leaves it out shows fusion
against no fusion, nothing else.

The kernel: one program takes one row. Blocks in Triton have powers of two as sizes, so a row of 1000 lies in a block of
1024, and what fills the other 24 places is part of the maths. Minus infinity it has to be: no maximum takes it, and its
exp adds 0 to the sum. (0 would be the maximum of a row of negative numbers, and each 0 would add exp(0 - max).)
"""

import os

import torch

os.environ.setdefault(
    "TRITON_INTERPRET", str(int(not torch.cuda.is_available()))
)  # 1: on the CPU, in Triton's interpreter

import triton
import triton.language as tl

import trinix
from trinix import testing

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
MOST = 16384  # columns: a longer row does not fit the registers of one program


@triton.jit
def softmax_kernel(x_ptr, y_ptr, columns, x_row_stride, x_column_stride, y_row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row * stride passes 2**31 in large matrices
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * x_row_stride + column * x_column_stride, mask=inside, other=float("-inf")).to(tl.float32)
    power = tl.exp(x - tl.max(x, 0))
    share = tl.div_rn(
        1.0, tl.sum(power, 0)
    )  # one division a row, rounded as PyTorch's; Triton's / is up to 2 units off
    tl.store(y_ptr + row * y_row_stride + column, power * share, mask=inside)


def softmax(x: torch.Tensor) -> torch.Tensor:
    """Softmax of the rows of ``x``, ``[rows, columns]`` of any strides, up to 16384 columns; forward only."""
    if x.dim() != 2 or not 0 < x.shape[1] <= MOST:
        raise ValueError(f"softmax: x must be [rows, columns] with 1 to {MOST} columns, got {list(x.shape)}")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    warps = min(16, max(1, block // 512))  # 16 elements for each thread
    softmax_kernel[(len(x),)](x, y, x.shape[1], *x.stride(), y.stride(0), BLOCK=block, num_warps=warps)
    return y


def unfused(x: torch.Tensor) -> torch.Tensor:
    power = (x - x.max(-1, keepdim=True).values).exp()
    return power / power.sum(-1, keepdim=True)


def check() -> None:
    """Against float64, within twice the error of PyTorch in float32; raises AssertionError."""
    for shape in ((5, 1024), (4, 1000), (3, 17), (2, 1025)):
        x = testing.normal(shape, torch.float32, seed=0, device=DEVICE) - 5.0  # negative: padding with 0 would show
        x[0, : shape[1] // 2] = float("-inf")  # as a mask puts it
        for one in (x, x.t().contiguous().t()):  # rows whose neighbours lie apart in memory, too
            testing.assert_within_budget([softmax(one)], [one.softmax(-1)], [one.double().softmax(-1)])
    print("softmax: right, 4 shapes in 2 layouts")


def measure(size: int = 4096) -> None:
    from trinix.lab.measure import Gpu

    x, y = testing.normal((size, size), torch.float32, seed=0, device=DEVICE), torch.empty(size, size, device=DEVICE)
    calls = {
        "one operation after the other": lambda: unfused(x),
        "torch.compile of these": (lambda compiled: lambda: compiled(x))(torch.compile(unfused)),
        "torch.softmax": lambda: x.softmax(-1),
        "trinix.ops.softmax": lambda: trinix.ops.softmax(x),
        "the kernel above": lambda: softmax(x),
        "a copy: the floor": lambda: y.copy_(x),
    }
    times = {name: spread.p50 for name, spread in Gpu().device_ms(calls).items()}
    print(f"{size} x {size}, float32, {2 * x.nbytes / 1e6:.0f} MB have to move:")
    for name, ms in times.items():
        print(f"  {name:30} {ms:.4f} ms, {2 * x.nbytes / ms / 1e6:5.0f} GB/s of these bytes")
    print(f"the kernel runs at {times['a copy: the floor'] / times['the kernel above']:.1%} of a copy's rate")


if __name__ == "__main__":
    check()
    if DEVICE == "cuda":
        measure()
    else:
        print("no GPU: not timed")
