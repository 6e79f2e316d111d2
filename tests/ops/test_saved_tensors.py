"""What backward reads may come back in another layout: hooks on saved tensors (offloading, compression) are the user's."""

import pytest
import torch

from helpers import same
from trinix import ops
from trinix.testing import normal

ENDS = {name: torch.tensor([0, 7, 20], dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
ANGLES = torch.outer(torch.arange(32.0), 10000 ** -(torch.arange(0, 16, 2) / 16))
TABLES = ANGLES.cos(), ANGLES.sin()
HEADS, PACKED = ((1, 20, 2, 16),) * 3, ((20, 2, 16),) * 3

# name -> (function of the tensors, their shapes)
CALLS = {
    "relu": (lambda x, **how: ops.activation(x, "relu", **how), ((5, 700),)),
    "leaky_relu": (lambda x, **how: ops.activation(x, "leaky_relu", **how), ((5, 700),)),
    "silu": (lambda x, **how: ops.activation(x, "silu", **how), ((5, 70),)),
    "swiglu": (lambda gate, up, **how: ops.glu(gate, up, "swiglu", **how), ((5, 64),) * 2),
    "packed swiglu": (lambda x, **how: ops.glu(x, kind="swiglu", **how), ((5, 128),)),
    "softmax": (lambda x, **how: ops.softmax(x, -1, **how), ((5, 64),)),
    "softmax of columns": (lambda x, **how: ops.softmax(x, 0, **how), ((50, 64),)),
    "log_softmax": (lambda x, **how: ops.log_softmax(x, -1, **how), ((5, 64),)),
    "layer_norm": (lambda x, w, b, **how: ops.layer_norm(x, 64, w, b, **how), ((5, 64), (64,), (64,))),
    "rms_norm": (lambda x, w, **how: ops.rms_norm(x, 64, w, **how), ((5, 64), (64,))),
    "layer_norm_residual": (
        lambda x, r, w, b, **how: ops.layer_norm_residual(x, r, 64, w, b, **how), ((5, 64), (5, 64), (64,), (64,)),
    ),
    "rms_norm_residual": (lambda x, r, w, **how: ops.rms_norm_residual(x, r, 64, w, **how), ((5, 64), (5, 64), (64,))),
    "head_mlp": (
        lambda x, w1, w2, **how: ops.head_mlp(x, w1, w2, "silu", **how), ((2, 20, 16), (2, 16, 32), (2, 32, 16)),
    ),
    "rope": (lambda q, k, **how: ops.rope(q, k, *TABLES, **how), HEADS[:2]),
    "rope of sequences": (
        lambda q, k, **how: ops.rope(q, k, *TABLES, cu_seqlens=ENDS["cu_seqlens_q"], **how), PACKED[:2],
    ),
    "qk_norm_rope": (lambda q, k, a, b, **how: ops.qk_norm_rope(q, k, a, b, *TABLES, **how), (*HEADS[:2], (16,), (16,))),
    "attention": (lambda q, k, v, **how: ops.attention(q, k, v, causal=True, **how), HEADS),
    "attention with a bias and a sink": (
        lambda q, k, v, bias, sink, **how: ops.attention(q, k, v, causal=True, bias=bias, sink=sink, **how),
        (*HEADS, (1, 2, 20, 20), (2,)),
    ),
    "attention with slopes and lse": (
        lambda q, k, v, **how: ops.attention(
            q, k, v, return_lse=True, alibi_slopes=torch.tensor([0.5, 0.25]), **how
        ),
        HEADS,
    ),
    "attention with a mask": (
        lambda q, k, v, **how: ops.attention(q, k, v, mask=torch.ones(1, 1, 20, 20, dtype=torch.bool).tril(), **how), HEADS,
    ),
    "attention of sequences": (
        lambda q, k, v, **how: ops.attention(q, k, v, **ENDS, max_seqlen_q=13, max_seqlen_k=13, **how), PACKED,
    ),
}  # fmt: skip


def every_other_one(t):
    """The same values, with others between them."""
    return torch.stack((t, torch.zeros_like(t)), -1)[..., 0]


def vectors_apart(t):
    """Of a norm the parameters alone: x lies as in the call before, whose launch is kept."""
    return every_other_one(t) if t.ndim == 1 else t


def columns_first(t):
    return t.mT.contiguous().mT if t.ndim > 1 else t


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_the_same_whatever_layout_a_hook_gives_back(name):
    function, shapes = CALLS[name]
    inputs = [normal(shape, torch.float32, seed=i) for i, shape in enumerate(shapes)]

    def gradients(pack):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = function(*leaves, backend="triton")
        out = [y for y in (out if isinstance(out, tuple) else (out,)) if y.requires_grad]
        return torch.autograd.grad(out, leaves, [normal(y.shape, y.dtype, seed=9) for y in out])

    plain = gradients(lambda t: t)
    for pack in (every_other_one, vectors_apart, columns_first):
        for got, wanted in zip(gradients(pack), plain, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, msg=pack.__name__)
    for got, wanted in zip(gradients(lambda t: t), plain, strict=True):
        same(got, wanted)
