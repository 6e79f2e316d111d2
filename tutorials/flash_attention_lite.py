"""Attention without the matrix of scores, forward and backward. Run it: ``python tutorials/flash_attention_lite.py``.

The formula (arXiv:2205.14135, 2307.08691), for one head with q, k, v of S rows and D channels each:

    scores = q k^T / sqrt(D)      p = softmax of its rows      out = p v

Causal: a query sees the keys up to its own place, all other scores are minus infinity.

Floors. q, k, v and out are 4 S D numbers; the scores are S^2. Kept whole they are the larger part from S = 4 D on: 256
MiB for each copy at 4 x 8 heads of 2048, in float16, written and read several times. Never stored, they cost what their
products take on the tensor cores: two products forward, 4 S^2 D operations (the half if causal), and five backward,
which computes the scores again.

How softmax goes by blocks of keys: a row needs its maximum and its sum before the first p is known. So keep both as
they are so far, and the output that goes with them; when a block brings a larger maximum, what was added up before
shrinks by exp(old - new):

    top' = max(top, max(scores))    total' = total exp(top - top') + sum(exp(scores - top'))
    acc' = acc exp(top - top') + exp(scores - top') v          and at the end out = acc / total

Backward needs p again; p = exp(scores - lse) with one number a row kept from forward, lse = top + log(total). (The sum
alone would not do.) With delta = sum of a row of (out * dout):

    dv = p^T dout     dscores = p (dout v^T - delta)     dq = dscores k / sqrt(D)     dk = dscores^T q / sqrt(D)

A program for each block of queries makes dq; one for each block of keys makes dk and dv: each adds up what is its
own, and none has to wait.

Traps: ``causal`` must not only hide the later keys but leave their blocks out, or half of the work is for nothing. Rows
and channels that only fill a block up must be 0 where they are multiplied, keys that fill up must be minus infinity.
exp2 is what the card has, so scores and lse are in base 2 here, with log2(e) in the scale. And a "lite" kernel need not
be slow: its products have to run on the tensor cores, and its tiles have to stay in registers (a tile that does not fit
is spilled to memory and costs a factor, not a share; the sizes below fit sm_90's).
"""

import os
from math import e, log2

import torch
import torch.nn.functional as F

os.environ.setdefault(
    "TRITON_INTERPRET", str(int(not torch.cuda.is_available()))
)  # 1: on the CPU, in Triton's interpreter

import triton
import triton.language as tl

import trinix
from trinix import testing

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"


@triton.jit
def load_rows(ptr, rows, channels, length, width):
    """A tile [rows, channels] of a matrix [length, width]; 0 outside."""
    inside = (rows[:, None] < length) & (channels[None, :] < width)
    return tl.load(ptr + rows[:, None] * width + channels[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, tile, rows, channels, length, width):
    inside = (rows[:, None] < length) & (channels[None, :] < width)
    tl.store(ptr + rows[:, None] * width + channels[None, :], tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, length, width, scale,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64) * length  # its first row
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, WIDTH)
    q = load_rows(q_ptr + head * width, rows, channels, length, width)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    end = tl.minimum(length, (tl.program_id(0) + 1) * ROWS) if CAUSAL else length
    for start in range(0, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr + head * width, keys, channels, length, width)
        scores = tl.dot(q, tl.trans(k)) * scale
        visible = keys[None, :] < length
        if CAUSAL:
            visible = visible & (keys[None, :] <= rows[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: every row sees key 0, which is in the first block
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        v = load_rows(v_ptr + head * width, keys, channels, length, width)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        top = new_top
    store_rows(out_ptr + head * width, acc / total[:, None], rows, channels, length, width)
    tl.store(lse_ptr + head + rows, top + tl.log2(total), mask=rows < length)


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, length, width, scale, dq_scale,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64) * length
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, WIDTH)
    q = load_rows(q_ptr + head * width, rows, channels, length, width)
    dout = load_rows(dout_ptr + head * width, rows, channels, length, width)
    lse = tl.load(lse_ptr + head + rows, mask=rows < length, other=0.0)
    delta = tl.load(delta_ptr + head + rows, mask=rows < length, other=0.0)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    end = tl.minimum(length, (tl.program_id(0) + 1) * ROWS) if CAUSAL else length
    for start in range(0, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr + head * width, keys, channels, length, width)
        v = load_rows(v_ptr + head * width, keys, channels, length, width)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * scale - lse[:, None])
        if CAUSAL:
            p = tl.where(keys[None, :] <= rows[:, None], p, 0.0)
        dscores = p * (tl.dot(dout, tl.trans(v)) - delta[:, None])
        dq += tl.dot(dscores.to(k.dtype), k)  # keys behind the last are rows of 0 in k: they add nothing
    store_rows(dq_ptr + head * width, dq * dq_scale, rows, channels, length, width)


@triton.jit
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, length, width, scale, dk_scale,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64) * length
    keys = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    channels = tl.arange(0, WIDTH)
    k = load_rows(k_ptr + head * width, keys, channels, length, width)
    v = load_rows(v_ptr + head * width, keys, channels, length, width)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    begin = tl.program_id(0) * KEYS // ROWS * ROWS if CAUSAL else 0
    for start in range(begin, length, ROWS):
        rows = start + tl.arange(0, ROWS)
        q = load_rows(q_ptr + head * width, rows, channels, length, width)
        dout = load_rows(dout_ptr + head * width, rows, channels, length, width)
        lse = tl.load(lse_ptr + head + rows, mask=rows < length, other=0.0)
        delta = tl.load(delta_ptr + head + rows, mask=rows < length, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q)) * scale - lse[None, :])  # [keys, rows]
        if CAUSAL:
            p = tl.where(keys[:, None] <= rows[None, :], p, 0.0)
        dv += tl.dot(p.to(dout.dtype), dout)  # rows behind the last are 0 in dout, and so is their dscores
        dscores = p * (tl.dot(v, tl.trans(dout)) - delta[None, :])
        dk += tl.dot(dscores.to(q.dtype), q)
    store_rows(dk_ptr + head * width, dk * dk_scale, keys, channels, length, width)
    store_rows(dv_ptr + head * width, dv, keys, channels, length, width)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal):
        batch, heads, length, width = q.shape
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        tiles = {"CAUSAL": causal, "WIDTH": max(16, triton.next_power_of_2(width))}
        rows = 128
        forward_kernel[(triton.cdiv(length, rows), batch * heads)](
            q, k, v, out, lse, length, width, width**-0.5 * log2(e),
            ROWS=rows, KEYS=64, num_warps=8, num_stages=3, **tiles,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        batch, heads, length, width = q.shape
        dout = dout.contiguous()
        delta = (out.float() * dout.float()).sum(-1)
        dq, dk, dv = (torch.empty_like(q) for _ in "qkv")
        size = 64
        launch = {"ROWS": size, "KEYS": size, "num_warps": 4 if width <= 64 else 8, "num_stages": 2, **ctx.tiles}
        grid = (triton.cdiv(length, size), batch * heads)
        given = q, k, v, dout, lse, delta
        scale, channel_scale = width**-0.5 * log2(e), width**-0.5
        dq_kernel[grid](*given, dq, length, width, scale, channel_scale, **launch)
        dkv_kernel[grid](*given, dk, dv, length, width, scale, channel_scale, **launch)
        return dq, dk, dv, None


def flash_attention_lite(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, all ``[B, H, S, D]``, D up to 128, float16 or bfloat16; differentiable."""
    if not (q.shape == k.shape == v.shape) or q.dim() != 4 or not q.numel() or q.shape[-1] > 128:
        raise ValueError(
            f"flash_attention_lite: q, k, v must be [B, H, S, D], D up to 128, got {[*map(list, (q.shape, k.shape, v.shape))]}"
        )
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"flash_attention_lite: dtype must be float16 or bfloat16, got {q.dtype}")
    return Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), causal)


def whole_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """The formula, product by product."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1) @ v


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def check() -> None:
    """out, dq, dk and dv against float64, within twice the error of PyTorch's own fused attention; raises AssertionError."""
    for heads, length, width in ((2, 150, 64), (1, 70, 40)):
        shape = 1, heads, length, width
        *inputs, dout = (testing.normal(shape, torch.float16, seed=i, device=DEVICE) for i in range(4))
        for causal in (False, True):
            true = testing.vjp(lambda *t, c=causal: whole_scores(*t, c), [t.double() for t in inputs], dout.double())
            low = testing.vjp(lambda *t, c=causal: sdpa(*t, c), inputs, dout)
            got = testing.vjp(lambda *t, c=causal: flash_attention_lite(*t, c), inputs, dout)
            testing.assert_within_budget(got, low, true)
    print("flash_attention_lite: out, dq, dk and dv right, 2 shapes, whole and causal")


def measure(batch: int = 4, heads: int = 8, length: int = 2048, width: int = 64) -> None:
    from trinix.lab.measure import Gpu

    q, k, v, dout = (
        testing.normal((batch, heads, length, width), torch.float16, seed=i, device=DEVICE) for i in range(4)
    )
    leaves = [t.requires_grad_() for t in (q, k, v)]
    functions = {
        "products and softmax": whole_scores,
        "torch.compile of these": torch.compile(whole_scores),
        "PyTorch's fused attention": sdpa,
        "trinix.ops.attention": lambda q, k, v, causal: trinix.ops.attention(
            *(t.transpose(1, 2) for t in (q, k, v)), causal=causal
        ).transpose(1, 2),
        "the kernels above": flash_attention_lite,
    }
    clock = Gpu()
    forward = {name: (lambda f=f: f(*leaves, True)) for name, f in functions.items()}
    both = {name: (lambda call=call: torch.autograd.grad(call(), leaves, dout)) for name, call in forward.items()}
    first, second = clock.device_ms(forward), clock.device_ms(both)
    flops = 2 * batch * heads * length**2 * width  # causal: the half of two products
    print(
        f"{batch} x {heads} heads, {length} rows, {width} channels, float16, causal; forward, then forward and backward:"
    )
    for name in functions:
        rates = flops / first[name].p50 / 1e9, 3.5 * flops / second[name].p50 / 1e9
        print(
            f"  {name:26} {first[name].p50:.4f} ms, {rates[0]:3.0f} TFLOP/s; {second[name].p50:.4f} ms, {rates[1]:3.0f} TFLOP/s; "
            f"{clock.peak_mib(both[name]):5.0f} MiB over the inputs"
        )
    share = second["PyTorch's fused attention"].p50 / second["the kernels above"].p50
    print(f"the kernels run at {share:.2f} of the speed of PyTorch's fused attention, forward and backward")


if __name__ == "__main__":
    check()
    if DEVICE == "cuda":
        measure()
    else:
        print("no GPU: not timed")
