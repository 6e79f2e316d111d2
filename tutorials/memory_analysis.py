"""A chain that waits for memory: count, predict, measure. Run it: ``python tutorials/memory_analysis.py``.

The chain stands twice in every block of a LLaMA: the residual sum, and the RMSNorm behind it,

    z = x + residual        y = z / sqrt(mean of the row's z^2 + eps) * weight

Two questions decide how fast it can be. How many operations for each byte? Five an element (one sum, a square and its
sum, two products) on 8 bytes (x and residual read, z and y written, float16): 0.6 operations a byte. An H100 computes
67e12 float32 operations a second outside of its tensor cores while memory brings 3.35e12 bytes: 20 a byte. So memory is
what the chain waits for, thirty times over, and that quotient is all that 0.6 / 20 says: it is no "utilisation of the
GPU". That is bytes a second over what a copy reaches.

How many bytes? The floor is 4 n, n being the bytes of one tensor. What a program really moves is not guessed here but
counted: PyTorch shows every operation that it runs to a ``TorchDispatchMode``, and in eager mode an operation is a
kernel that reads its inputs from memory and writes its outputs there. (Caches: a tensor that an L2 cache of 50 MB can
hold may be read from there. Ours are larger.) One operation can be several kernels, so the count of launches is a
least.

Bytes over the rate of a copy predict the time, and the clock says how well. torch.compile is not seen by the counter,
but shows by its time what it moves. The peak of memory is the allocator's, measured.

The kernel: one program takes a row, keeps it in registers, and writes both results. 4 n bytes, one launch. Two things
to look at: z is rounded to float16 before the norm, as the stream will be for whoever reads it next; and the mean
divides by the columns that there are, not by the power of two that the block has.
"""

import os
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

os.environ.setdefault(
    "TRITON_INTERPRET", str(int(not torch.cuda.is_available()))
)  # 1: on the CPU, in Triton's interpreter

import triton
import triton.language as tl

import trinix
from trinix import testing

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
MOST = 16384  # columns: a longer row does not fit the registers of one program
EPS = 1e-5


@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, y_ptr, z_ptr, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    stored = (x + residual).to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + row + column, stored, mask=inside)
    z = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(z * z, 0) / columns + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row + column, z * scale * weight, mask=inside)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, z) of ``[rows, columns]`` tensors, up to 16384 columns, and ``weight`` ``[columns]``; forward only."""
    if x.dim() != 2 or not 0 < x.shape[1] <= MOST or residual.shape != x.shape or weight.shape != x.shape[1:]:
        got = [list(t.shape) for t in (x, residual, weight)]
        raise ValueError(f"add_rms_norm: must be [rows, columns] twice and [columns], 1 to {MOST} columns, got {got}")
    y, z = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    add_rms_norm_kernel[(len(x),)](
        x.contiguous(), residual.contiguous(), weight.contiguous(), y, z, x.shape[1], EPS,
        BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return y, z


def one_by_one(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = x + residual
    square = z * z
    return z * (square.mean(-1, keepdim=True) + EPS).rsqrt() * weight, z


def add_then_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = x + residual
    return torch.nn.functional.rms_norm(z, weight.shape, weight, EPS), z


@dataclass(frozen=True)
class Step:
    """One operation that ran, and the bytes of its inputs and outputs."""

    name: str
    read: int
    written: int


class Traffic(TorchDispatchMode):
    """Writes down every operation that makes new memory or writes into old; views move nothing."""

    def __init__(self):
        super().__init__()
        self.steps: list[Step] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        if not function.is_view:
            self.steps.append(Step(function.overloadpacket.__name__, _bytes(inputs), _bytes(outputs)))
        return made


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Each tensor once (z * z reads z once), and what expand() repeats once."""
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in {id(t): t for t in tensors}.values())


def traffic(function, *inputs: torch.Tensor) -> list[Step]:
    """The operations of ``function(*inputs)`` in eager mode."""
    with Traffic() as seen, torch.no_grad():
        function(*inputs)
    return seen.steps


def inputs_of(rows: int, columns: int) -> list[torch.Tensor]:
    sizes = ((rows, columns), (rows, columns), (columns,))
    return [testing.normal(size, torch.float16, seed=i, device=DEVICE) for i, size in enumerate(sizes)]


def check() -> None:
    """y and z against float64, within twice the error of PyTorch in float16; raises AssertionError."""
    for rows, columns in ((4, 1024), (3, 1000), (2, 17)):
        inputs = inputs_of(rows, columns)
        true = add_then_norm(*(t.double() for t in inputs))
        testing.assert_within_budget(add_rms_norm(*inputs), add_then_norm(*inputs), true)
    print("add_rms_norm: y and z right, 3 shapes")


def count(rows: int, columns: int) -> dict[str, int]:
    """Print what every form moves; the bytes by form."""
    inputs = inputs_of(rows, columns)
    n = inputs[0].nbytes
    found = {}
    for name, function in (("one operation after the other", one_by_one), ("add, then F.rms_norm", add_then_norm)):
        steps = traffic(function, *inputs)
        found[name] = sum(step.read + step.written for step in steps)
        print(f"{name}: {len(steps)} operations, {found[name] / n:.2f} n")
        for step in steps:
            print(f"  {step.name:20} reads {step.read / n:.2f} n, writes {step.written / n:.2f} n")
    found["the kernel above"] = 4 * n + inputs[2].nbytes
    print(f"the kernel above: 1 launch, {found['the kernel above'] / n:.2f} n")
    return found


def measure(rows: int = 16384, columns: int = 4096) -> None:
    from trinix.lab.measure import Gpu

    moved, inputs = count(rows, columns), inputs_of(rows, columns)
    copied, clock = torch.empty_like(inputs[0]), Gpu()
    functions = {
        "one operation after the other": one_by_one,
        "add, then F.rms_norm": add_then_norm,
        "torch.compile of the first": torch.compile(one_by_one),
        "trinix.ops.rms_norm_residual": lambda x, residual, weight: trinix.ops.rms_norm_residual(
            x, residual, weight.shape, weight, EPS
        ),
        "the kernel above": add_rms_norm,
    }
    calls = {name: (lambda f=f: f(*inputs)) for name, f in functions.items()}
    times = clock.device_ms(calls | {"a copy": lambda: copied.copy_(inputs[0])})
    rate = 2 * copied.nbytes / times["a copy"].p50 / 1e6  # GB/s
    print(f"{rows} x {columns}, float16; a copy runs at {rate:.0f} GB/s:")
    for name, call in calls.items():
        ms = times[name].p50
        predicted = f", predicted {moved[name] / rate / 1e6:.4f}" if name in moved else ""
        print(f"  {name:30} {ms:.4f} ms{predicted}; {clock.peak_mib(call):.0f} MiB over the inputs")
    share = moved["the kernel above"] / rate / 1e6 / times["the kernel above"].p50
    print(f"the kernel runs at {share:.1%} of a copy's rate")


if __name__ == "__main__":
    check()
    if DEVICE == "cuda":
        measure()
    else:
        count(256, 4096)
        print("no GPU: not timed")
