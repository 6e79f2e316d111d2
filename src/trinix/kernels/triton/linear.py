"""A large matrix times one row, as in every step of decoding one sequence: y = W x + b. Forward only.

Every weight is used once, so a call takes as long as reading W does. A program makes COLS elements of y: it walks along
their rows of W, DEPTH weights of each at a time, and adds up in registers, in an order that depends on the shape alone.

Floor: one read of W.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trinix.kernels.triton import norm
from trinix.kernels.triton._compile import POINTERS, compile_case
from trinix.kernels.triton._launch import INTERPRETED, Launch, Launcher

LANES = 64 if torch.version.hip else 32  # threads of a warp
AHEAD = 64  # lines of 128 bytes that a program fetches before its turn; more of them are slower (docs/perf/layers.md)
DTYPES = (torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=["n"])
def _one_row(
    x, weight, bias, y, n: "i32", K: tl.constexpr, BIAS: tl.constexpr, DEPENDENT: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = tl.minimum(col, n - 1)  # those past the end read the last row and store nothing
    k = tl.arange(0, DEPTH)
    rows = weight + inside[:, None].to(tl.int64) * K + k[None, :]
    if DEPENDENT:  # the weights come into the L2 cache while the kernel before this one makes x
        tl.extra.cuda.gdc_launch_dependents()
        ahead = inside[:, None].to(tl.int64) * K + tl.minimum(tl.arange(0, LINES) * 64, K - 1)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [(weight + ahead).to(tl.int64)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((COLS, DEPTH), tl.float32)
    for start in tl.range(0, K, DEPTH):
        if K % DEPTH == 0:
            w = tl.load(rows + start, eviction_policy="evict_first")
            v = tl.load(x + start + k)
        else:
            w = tl.load(rows + start, mask=(k < K - start)[None, :], other=0.0, eviction_policy="evict_first")
            v = tl.load(x + start + k, mask=k < K - start, other=0.0)
        total += w.to(tl.float32) * v.to(tl.float32)[None, :]
    out = tl.sum(total, 1)
    if BIAS:
        out += tl.load(bias + inside).to(tl.float32)
    tl.store(y + col, out.to(y.dtype.element_ty), mask=col < n)


class Config(NamedTuple):
    cols: int
    depth: int
    num_warps: int


def choose_config(k: int, lanes: int = LANES) -> Config:
    """docs/perf/layers.md: 8192 weights at a time, in rows as long as possible up to 2048."""
    depth = min(2048, max(64, triton.next_power_of_2(k)))
    return Config(8192 // depth, depth, 256 // lanes)


_ONE_ROW = Launcher(_one_row, tensors=4)


@functools.cache
def one_row_launch(k: int, bias: bool, dependent: bool, config: Config) -> Launch:
    return _ONE_ROW.bind(
        K=k, BIAS=bias, DEPENDENT=dependent, COLS=config.cols, DEPTH=config.depth,
        LINES=max(1, min(triton.next_power_of_2(k) // 64, AHEAD // config.cols)), num_warps=config.num_warps, launch_pdl=dependent,
    )  # fmt: skip


def unsupported(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> str | None:
    """Why this kernel does not compute ``F.linear(x, weight, bias)``, or None."""
    if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        return f"needs a GPU tensor, got {x.device.type}"
    if (
        x.layout is not torch.strided
        or weight.layout is not torch.strided
        or weight.dim() != 2
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        return "takes a dense weight [N, K] and a bias [N]"  # PyTorch broadcasts a bias of [1], and refuses others
    n, k = weight.shape
    if x.numel() != k or x.shape[-1:] != (k,):
        return f"takes one row of {k}, got shape {list(x.shape)}"
    if x.dtype not in DTYPES or weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return f"takes tensors of one dtype, float16 or bfloat16, got {x.dtype} and {weight.dtype}"
    if weight.device != x.device or (bias is not None and bias.device != x.device):
        return f"needs all on one device, got {x.device} and {weight.device}"
    if k % 8 or not n or not (x.is_contiguous() and weight.is_contiguous() and (bias is None or bias.is_contiguous())):
        return f"needs dense tensors, rows of a multiple of 8, got {k}"
    return None


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    n, k = weight.shape
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    config = choose_config(k)
    launch = one_row_launch(k, bias is not None, x.is_cuda and norm.dependent_launch(x.get_device()), config)
    launch(-(-n // config.cols), (x, weight, weight if bias is None else bias, y), (n,))
    return y


def compile_cases(lanes: int = LANES):
    for dtype in DTYPES:
        suffix = str(dtype).removeprefix("torch.")
        for name, k, bias in (("4096", 4096, False), ("14336-bias", 14336, True), ("3000", 3000, False)):
            launch = one_row_launch(k, bias, False, choose_config(k, lanes))
            tensors = (POINTERS[suffix],) * 4
            yield compile_case(f"linear/{name}/{suffix}", launch, dtype.itemsize, tensors, (), 16)  # y is small
