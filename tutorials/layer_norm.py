"""LayerNorm, forward and backward, and the trap of padded rows. Run it: ``python tutorials/layer_norm.py``.

The formula, for every row x of N elements, with xhat the normalised row:

    mean = sum(x) / N        var = sum((x - mean)^2) / N        rstd = 1 / sqrt(var + eps)
    xhat = (x - mean) rstd   y = xhat weight + bias

and its gradients, with g = dy weight, which come from nothing but the chain rule through xhat, mean and var:

    dx = rstd (g - mean_of_row(g) - xhat mean_of_row(g xhat))
    dweight = sum over rows (dy xhat)       dbias = sum over rows (dy)

The floor: forward reads x and writes y, 2 n bytes; backward reads x and dy and writes dx, 3 n. Mean and rstd, two
numbers a row, are kept from forward, so that backward need not find them again.

The trap. A row of 768 lies in a block of 1024, and the 256 places behind it are loaded as 0: right for the sum, which
then is that of the row. But once the mean is taken off they are -mean, not 0, and each adds mean^2 to the sum of
squares:

    var' = var + (BLOCK - N) / N * mean^2

At 768 this is a third of mean^2. Nothing shows at powers of two, little shows on data whose mean is near 0, and a
tolerance of 1e-2 shows nothing at all. (The benchmark document that has a tutorial of this name published a "FAIL, max
difference 1.52e-02" of 768 columns and put it down to the order of summation, which makes 1e-6.) So the check below is
against float64, at widths that are no powers of two, on rows whose mean is not 0.

dweight and dbias sum over all rows. A program a row would have to add into one place from everywhere; here few programs
take many rows each, keep the two sums in registers, and write one part each, which PyTorch adds up.
"""

import os

import torch
import torch.nn.functional as F

os.environ.setdefault(
    "TRITON_INTERPRET", str(int(not torch.cuda.is_available()))
)  # 1: on the CPU, in Triton's interpreter

import triton
import triton.language as tl

import trinix
from trinix import device, testing

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
MOST = 8192  # columns: backward keeps five rows in registers
EPS = 1e-5


@triton.jit
def forward_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / columns
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / columns + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * columns + column, centred * rstd * weight + bias, mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def backward_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows, columns, BLOCK: tl.constexpr
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    row = program.to(tl.int64)
    for _ in range(program, rows, programs):
        x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        xhat = tl.where(inside, (x - mean) * rstd, 0.0)
        g = dy * weight
        dx = rstd * (g - tl.sum(g, 0) / columns - xhat * (tl.sum(g * xhat, 0) / columns))
        tl.store(dx_ptr + row * columns + column, dx, mask=inside)
        dweight += dy * xhat
        dbias += dy
        row += programs
    tl.store(dweight_ptr + program.to(tl.int64) * columns + column, dweight, mask=inside)
    tl.store(dbias_ptr + program.to(tl.int64) * columns + column, dbias, mask=inside)


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        rows, columns = x.shape
        y = torch.empty_like(x)
        mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
        forward_kernel[(rows,)](x, weight, bias, y, mean, rstd, columns, EPS, **_launch(columns))
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        rows, columns = x.shape
        programs = min(rows, 2 * device.card().sm_count if x.is_cuda else 4)
        dx = torch.empty_like(x)
        dweight, dbias = (torch.empty(programs, columns, dtype=torch.float32, device=x.device) for _ in range(2))
        backward_kernel[(programs,)](
            dy.contiguous(), x, weight, mean, rstd, dx, dweight, dbias, rows, columns, **_launch(columns)
        )
        return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype)


def _launch(columns: int) -> dict[str, int]:
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}  # 8 to 16 elements for each thread


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """LayerNorm of x ``[rows, columns]``, up to 8192 columns, with weight and bias ``[columns]``; differentiable."""
    if x.dim() != 2 or not x.numel() or x.shape[1] > MOST or weight.shape != x.shape[1:] or bias.shape != weight.shape:
        got = [list(t.shape) for t in (x, weight, bias)]
        raise ValueError(f"layer_norm: must be [rows, columns], [columns], [columns], 1 to {MOST} columns, got {got}")
    return LayerNorm.apply(x.contiguous(), weight.contiguous(), bias.contiguous())


def torch_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def inputs_of(rows: int, columns: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(x, weight, bias), dy; the rows' mean is about 1."""
    sizes = ((rows, columns), (columns,), (columns,), (rows, columns))
    x, weight, bias, dy = (testing.normal(s, torch.float32, seed=i, device=DEVICE) for i, s in enumerate(sizes))
    return [x + 1.0, weight, bias], dy


def check() -> None:
    """y and all gradients against float64, within twice the error of PyTorch in float32; raises AssertionError."""
    for rows, columns in ((6, 768), (9, 1000), (3, 17), (2, 1024)):
        inputs, dy = inputs_of(rows, columns)
        true = testing.vjp(torch_layer_norm, [t.double() for t in inputs], dy.double())
        low, got = (testing.vjp(norm, inputs, dy) for norm in (torch_layer_norm, layer_norm))
        testing.assert_within_budget(got, low, true)
    print("layer_norm: y, dx, dweight and dbias right, 4 shapes")


def measure(rows: int = 16384, columns: int = 768) -> None:
    from trinix.lab.measure import Gpu

    inputs, dy = inputs_of(rows, columns)
    leaves, copied = [t.requires_grad_() for t in inputs], torch.empty_like(dy)
    norms = {
        "torch": torch_layer_norm,
        "torch.compile": torch.compile(torch_layer_norm),
        "trinix.ops.layer_norm": lambda x, weight, bias: trinix.ops.layer_norm(x, weight.shape, weight, bias, EPS),
        "the kernels above": layer_norm,
    }
    forward = {name: (lambda norm=norm: norm(*leaves)) for name, norm in norms.items()}
    both = {name: (lambda call=call: torch.autograd.grad(call(), leaves, dy)) for name, call in forward.items()}
    clock, copy = Gpu(), {"a copy": lambda: copied.copy_(dy)}
    first, second = clock.device_ms(forward | copy), clock.device_ms(both)
    n = dy.nbytes / 1e6
    print(f"{rows} x {columns}, float32; forward has to move {2 * n:.0f} MB, backward {3 * n:.0f} MB more:")
    for name in norms:
        print(f"  {name:22} forward {first[name].p50:.4f} ms, forward and backward {second[name].p50:.4f} ms")
    floor, ours = first["a copy"].p50, "the kernels above"
    shares = floor / first[ours].p50, 2.5 * floor / second[ours].p50  # a copy moves 2 n
    print(f"the kernels run at {shares[0]:.1%} of a copy's rate forward, {shares[1]:.1%} forward and backward")


if __name__ == "__main__":
    check()
    if DEVICE == "cuda":
        measure()
    else:
        print("no GPU: not timed")
