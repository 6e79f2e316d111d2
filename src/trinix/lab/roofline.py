"""The least that a case has to move or compute, the ceilings of this card, and the guard against impossible results."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from typing import NamedTuple

import torch

from trinix import device
from trinix.lab import layers
from trinix.lab.case import Case

# A result is an error of measurement, not a record, when it beats the best measured ceiling of the same traffic by more
# than equal kernels differ between rounds: 4%, and 2 us for the short ones.
MARGIN, MARGIN_MS = 1.04, 0.002
PROBE_BYTES = 1 << 32
PROBE_SIZE = 8192  # of the square matrices whose product is the ceiling of matrix products
# The vendors' dense figures for 16-bit products, TFLOP/s.
LISTED_TFLOPS = {"sm_80": 312.0, "sm_90": 989.5, "sm_100": 2250.0, "gfx942": 1307.4}


class Projection(NamedTuple):
    """[rows, inputs] times [outputs, inputs]^T forward; its two products of gradients backward."""

    rows: int
    inputs: int
    outputs: int
    passes: tuple[str, ...]
    dtype: torch.dtype


OF_PRODUCTS = ("matmul", "projections")  # ceilings that operations are held against, not bytes


@dataclass(frozen=True)
class Work:
    """Fewest bytes through device memory, floating-point operations, and which ceiling binds.

    For "projections" that ceiling is the bare products, and a copy that moves what the activation between them has to:
    ``epilogue`` bytes.
    """

    bytes: int
    flops: int
    ceiling: str
    projections: tuple[Projection, ...] = ()
    epilogue: int = 0


def _activation(case: Case, pass_: str) -> Work:
    n, size = prod(case.shape["x"]), case.dtype.itemsize
    kind = case.args["kind"]
    forward = 0 if kind == "none" else 2 * n * size
    # what relu and leaky_relu need of x is its sign: one bit an element
    signs = 2 * n * size + n // 8
    return _passes(pass_, forward, {"none": 0, "relu": signs, "leaky_relu": signs}.get(kind, 3 * n * size))


def _softmax(case: Case, pass_: str) -> Work:
    n = _bytes(case, "x")
    return _passes(pass_, 2 * n + _bytes(case, "mask"), 3 * n)


def _norm(case: Case, pass_: str) -> Work:
    """Statistics of a row can be computed again from x: they count for nothing."""
    n, weight, bias = (_bytes(case, name) for name in ("x", "weight", "bias"))
    return _passes(pass_, 2 * n + weight + bias, 3 * n + 2 * weight + bias)


def _norm_residual(case: Case, pass_: str) -> Work:
    """Backward reads both incoming gradients and the sum; one tensor written serves both inputs, whose gradients are equal."""
    n, weight, bias = (_bytes(case, name) for name in ("x", "weight", "bias"))
    return _passes(pass_, 4 * n + weight + bias, 4 * n + 2 * weight + bias)


def _glu(case: Case, pass_: str) -> Work:
    both = sum(_bytes(case, name) for name in case.shape)
    return _passes(pass_, both + both // 2, 2 * both + both // 2)


def _head_mlp(case: Case, pass_: str) -> Work:
    """4 H B D E operations forward; backward 8, without those that compute the hidden values again. A gate adds half."""
    n, weights = _bytes(case, "x"), sum(_bytes(case, name) for name in ("w1", "w2", "w_gate"))
    heads, rows, d = case.shape["x"]
    forward = 2 * heads * rows * d * case.shape["w1"][-1] * (len(case.shape) - 1)
    flops = {"fwd": forward, "fwd_grad": forward, "bwd": 2 * forward, "fwd_bwd": 3 * forward}[pass_]
    return Work(_passes(pass_, 2 * n + weights, 3 * n + 2 * weights).bytes, flops, "bandwidth")


def _rope(case: Case, pass_: str) -> Work:
    n, tables = _bytes(case, "q") + _bytes(case, "k"), _rotary_tables(case)
    return _passes(pass_, 2 * n + tables, 2 * n + tables)


def _qk_norm_rope(case: Case, pass_: str) -> Work:
    n, tables = _bytes(case, "q") + _bytes(case, "k"), _rotary_tables(case)
    weights = _bytes(case, "q_weight") + _bytes(case, "k_weight")
    return _passes(pass_, 2 * n + tables + weights, 3 * n + tables + 2 * weights)


def _rotary_tables(case: Case) -> int:
    """cos and sin in float32: the rows that the sequence's positions name."""
    return 2 * case.shape["q"][1] * case.shape["cos"][1] * 4


def _alibi_bias(case: Case, pass_: str) -> Work:
    """Nothing to read: the writes alone, which are faster than a copy."""
    written = case.shape["slopes"][0] * case.args["seq_q"] ** 2 * case.dtype.itemsize
    return Work(_passes(pass_, written, 0).bytes, 0, "write bandwidth")


def _attention(case: Case, pass_: str) -> Work:
    """Two products forward, five backward, of causal scores the half; q, k, v and out once, and as often their gradients."""
    token = 2 if case.args.get("layout") == "BHSD" else 1
    q, k, v = case.shape["q"], case.shape["k"], case.shape["v"]
    scores = q[0] * q[3 - token] * q[token] * k[token] // (2 if case.args["causal"] else 1)
    forward = 2 * scores * (q[-1] + v[-1])
    backward = 2 * scores * (3 * q[-1] + 2 * v[-1])
    out = _bytes(case, "q") // q[-1] * v[-1]
    moved = sum(_bytes(case, name) for name in "qkv") + out
    flops = {"fwd": forward, "fwd_grad": forward, "bwd": backward, "fwd_bwd": forward + backward}[pass_]
    return Work(_passes(pass_, moved, 2 * moved).bytes, flops, "matmul")


def _attention_decode(case: Case, pass_: str) -> Work:
    """The cache once: reads alone, which are faster than a copy."""
    queries = _bytes(case, "queries")
    out = queries // case.shape["queries"][-1] * case.args.get("latent", case.shape.get("v_cache", (0,))[-1])
    return Work(_bytes(case, "k_cache") + _bytes(case, "v_cache") + queries + out, 0, "read bandwidth")


def _layer(case: Case, pass_: str) -> Work:
    """A layer's products; its input, output and parameters once, and as often their gradients."""
    moved = sum(_bytes(case, name) for name in case.shape) + _bytes(case, "x")
    return Work(_passes(pass_, moved, 2 * moved).bytes, layers.flops(case, pass_), "matmul")


def _glu_layer(case: Case, pass_: str) -> Work:
    """Forward the activation reads gate and up and writes one; backward it reads three and writes two."""
    least, rows = _layer(case, pass_), prod(case.shape["x"][:-1])
    passes = ("forward",) * (pass_ != "bwd") + ("backward",) * ("bwd" in pass_)
    weights = [size for name, size in case.shape.items() if name.endswith("_proj.weight")]
    products = tuple(Projection(rows, inputs, outputs, passes, case.dtype) for outputs, inputs in weights)
    between = rows * case.args["hidden_dim"] * case.dtype.itemsize
    epilogue = sum({"forward": 3, "backward": 5}[one] for one in passes) * between
    return Work(least.bytes, least.flops, "projections", products, epilogue)


def _bytes(case: Case, name: str) -> int:
    return prod(case.shape[name]) * case.dtype.itemsize if name in case.shape else 0


def _passes(pass_: str, forward: int, backward: int) -> Work:
    moved = {"fwd": forward, "fwd_grad": forward, "bwd": backward, "fwd_bwd": forward + backward}[pass_]
    return Work(moved, 0, "bandwidth")


WORK = {
    "activation": _activation,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "rms_norm_activation": _norm,
    "layer_norm_residual": _norm_residual,
    "rms_norm_residual": _norm_residual,
    "glu": _glu,
    "head_mlp": _head_mlp,
    "rope": _rope,
    "qk_norm_rope": _qk_norm_rope,
    "alibi_bias": _alibi_bias,
    "attention": _attention,
    "attention_decode": _attention_decode,
    "attention_layers": _layer,
    "glu_layers": _glu_layer,
}


def work(case: Case, pass_: str) -> Work | None:
    """What a pass of a case must do at least, or None without a model: an op that has none yet, or layers that find their
    input in the cache."""
    return WORK[case.op](case, pass_) if case.op in WORK and "layers" not in case.args else None


def probes_of(work: Work) -> tuple[dict[str, Callable], float]:
    """(calls that show what the card can do, what to multiply their times by): products of matrices, or traffic."""
    if work.ceiling == "projections":
        calls = [call for one in work.projections for call in _products(one)]
        between, scale = traffic_probes(work.epilogue)
        calls += [between["copy"]] * ceil(scale)
        return {"projections": lambda: [call() for call in calls]}, 1.0
    if work.ceiling != "matmul":
        return traffic_probes(work.bytes, work.ceiling)
    a, b = (torch.empty(PROBE_SIZE, PROBE_SIZE, dtype=torch.bfloat16, device="cuda").normal_() for _ in "ab")
    c = torch.empty_like(a)
    return {"matmul": lambda: torch.mm(a, b, out=c)}, work.flops / (2 * PROBE_SIZE**3)


def _products(one: Projection, device: str = "cuda") -> list[Callable]:
    """Every product into memory of its own, the gradients' as a layer's backward computes them."""
    (rows, inputs, outputs), place = one[:3], {"dtype": one.dtype, "device": device}
    x, weight, y = (torch.empty(s, **place).normal_() for s in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    calls = []
    if "forward" in one.passes:
        calls.append(partial(torch.mm, x, weight.t(), out=torch.empty_like(y)))
    if "backward" in one.passes:
        calls.append(partial(torch.mm, y, weight, out=torch.empty_like(x)))
        calls.append(partial(torch.mm, y.t(), x, out=torch.empty_like(weight)))
    return calls


def traffic_probes(moved: int, ceiling: str = "bandwidth") -> tuple[dict[str, Callable], float]:
    """(calls that move ``moved`` bytes at the card's best, what to multiply their times by).

    The first one is the ceiling that shares are of: a copy (one read, one write), or for "write bandwidth" a fill. A sum
    (two reads, one write) is up to 2% faster than a copy. For "read bandwidth" shares are of a copy too. Above
    ``PROBE_BYTES`` the rate no longer changes: the probes move that much, and leave the memory to the case.
    """
    scale = max(1.0, moved / PROBE_BYTES)
    moved = min(moved, PROBE_BYTES)
    if ceiling == "write bandwidth":
        whole = torch.empty(moved // 2, dtype=torch.bfloat16, device="cuda")
        return {"fill": lambda: whole.fill_(1.0)}, scale
    half, third = moved // 2 // 2, moved // 3 // 2
    a = torch.empty(half, dtype=torch.bfloat16, device="cuda").normal_()
    b = torch.empty_like(a)
    if ceiling == "read bandwidth":
        whole = torch.empty(moved // 4, dtype=torch.float32, device="cuda").normal_()
        return {"copy": lambda: b.copy_(a), "sum": whole.sum}, scale
    x, y, z = (torch.empty(third, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(3))
    return {"copy": lambda: b.copy_(a), "add": lambda: torch.add(x, y, out=z)}, scale


def impossible(ms: float, moved: int, ceiling_ms: float, card: device.Card, cached: int = 0) -> str | None:
    """Why a time cannot be true, or None. ``cached``: bytes that may have come from the L2 cache after all."""
    if not moved:
        return None
    if not ms:
        return f"no kernel was seen, but {moved} bytes have to move"
    if cached >= moved:
        return None
    rate = (moved - cached) / ms / 1e6
    if card.bandwidth_gbs and rate > card.bandwidth_gbs:
        return f"{rate:.0f} GB/s is above the listed {card.bandwidth_gbs:.0f} GB/s of {card.name}"
    ceiling_ms *= (moved - cached) / moved
    if ms * MARGIN + MARGIN_MS < ceiling_ms:
        return f"{ms:.4f} ms is faster than this card moves the least bytes ({ceiling_ms:.4f} ms measured)"
    return None


def too_many_flops(ms: float, flops: int, card: device.Card) -> str | None:
    """Why a time cannot be true of so many operations, or None. The measured product is no bound: attention has passed it."""
    listed = LISTED_TFLOPS.get(card.target)
    rate = flops / ms / 1e9 if ms else float("inf")
    if listed and rate > listed:
        return f"{rate:.0f} TFLOP/s is above the listed {listed:.0f} TFLOP/s of {card.name}"
    return None


_TARGETS = {"A100": "sm_80", "H100": "sm_90"}  # of the documents' cards


def published_beyond_its_card(case: Case, pass_: str, ms: float) -> bool:
    """Whether a document's figure is less than its card's listed rate leaves for the products alone."""
    target, least = _TARGETS.get(case.gpu[:4]), work(case, pass_)
    if target is None or least is None or least.ceiling not in OF_PRODUCTS:
        return False
    return least.flops / ms / 1e9 > LISTED_TFLOPS[target]
