"""Rows, heads or weights that lie more than 2**31 elements apart: no kernel's place may be worked out in int32.

Only the pages that hold numbers are ever touched, so this needs addresses and no memory; tests/footprints.py refuses integers
that wrap.
"""

import numpy as np
import pytest
import torch

from trinix import ops
from trinix.kernels.triton import activation, glu
from trinix.testing import assert_within_budget, normal, vjp

APART = 2**31 + 8  # elements


def far_apart(shape, seed, dim=0):
    """Normal numbers of float16 whose rows along ``dim`` lie ``APART`` elements apart."""
    dense = normal(shape, torch.float16, seed=seed).movedim(dim, 0).contiguous()
    strides = (APART, *dense.stride()[1:])
    try:
        base = torch.from_numpy(np.empty(APART * (len(dense) - 1) + dense[0].numel(), np.float16))
    except MemoryError:
        pytest.skip("this machine gives no process so many addresses")
    return base.as_strided(dense.shape, strides).copy_(dense).movedim(0, dim)


def weight(n):
    return torch.linspace(0.5, 1.5, n).half()


def rope(q, backend):
    cos, sin = ops.rope_table(8, 8)
    return ops.rope(q, cos=cos, sin=sin, backend=backend)


def layer_norm_residual(x, residual, backend):
    return torch.cat(ops.layer_norm_residual(x, residual, x.shape[-1], weight(x.shape[-1]), backend=backend))


def mlp_of_far_weights(w1, w2, backend):
    return ops.head_mlp(normal((2, 5, 16), w1.dtype, seed=8), w1, w2, backend=backend)


def mlp_of_far_rows(x, backend):
    w1, w2 = (normal((x.shape[0], 16, 16), torch.float16, seed=i, scale=0.25).to(x.dtype) for i in (8, 9))
    return ops.head_mlp(x, w1, w2, backend=backend)


ATTENTION = (2, 5, 2, 16)
# function, shapes, which dimension lies far apart
CASES = {
    "gelu": (lambda x, backend: ops.gelu(x, backend=backend), [(3, 40)], 0),
    "relu": (lambda x, backend: ops.relu(x, backend=backend), [(3, 40)], 0),
    "softmax of rows": (lambda x, backend: ops.softmax(x, -1, backend=backend), [(3, 40)], 0),
    "softmax of columns": (lambda x, backend: ops.softmax(x, 0, backend=backend), [(3, 40)], 0),
    "softmax of long rows": (lambda x, backend: ops.softmax(x, -1, backend=backend), [(2, 20000)], 0),
    "layer_norm": (lambda x, backend: ops.layer_norm(x, 40, weight(40), weight(40), backend=backend), [(3, 40)], 0),
    "layer_norm of long rows": (lambda x, backend: ops.layer_norm(x, 17000, weight(17000), backend=backend), [(2, 17000)], 0),
    "rms_norm": (lambda x, backend: ops.rms_norm(x, 40, weight(40), backend=backend), [(3, 40)], 0),
    "layer_norm_residual": (layer_norm_residual, [(3, 40), (3, 40)], 0),
    "rms_norm_activation": (lambda x, backend: ops.rms_norm_activation(x, 40, weight(40), "mish", backend=backend), [(3, 40)], 0),
    "swiglu": (lambda x, up, backend: ops.glu(x, up, "swiglu", backend=backend), [(3, 40), (3, 40)], 0),
    "packed swiglu": (lambda x, backend: ops.glu(x, kind="swiglu", layout="gate_first", backend=backend), [(3, 40)], 0),
    "rope": (rope, [(2, 5, 2, 8)], 0),
    "attention, batches": (lambda *qkv, backend: ops.attention(*qkv, causal=True, backend=backend), [ATTENTION] * 3, 0),
    "attention, heads": (lambda *qkv, backend: ops.attention(*qkv, causal=True, backend=backend), [ATTENTION] * 3, 2),
    "head_mlp, heads": (mlp_of_far_rows, [(2, 5, 16)], 0),
    "head_mlp, rows": (mlp_of_far_rows, [(1, 3, 16)], 1),
    "head_mlp, weights": (mlp_of_far_weights, [(2, 16, 16), (2, 16, 16)], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_both_passes(name):
    function, shapes, dim = CASES[name]
    inputs = [far_apart(shape, seed, dim) for seed, shape in enumerate(shapes)]
    out = function(*inputs, backend="torch").shape
    dy = far_apart(out, 7, dim) if out[dim] == shapes[0][dim] else normal(out, torch.float16, seed=7)
    dense = [t.contiguous() for t in inputs]
    got = vjp(lambda *given: function(*given, backend="triton"), inputs, dy)
    low = vjp(lambda *given: function(*given, backend="torch"), dense, dy.contiguous())
    true = vjp(lambda *given: function(*given, backend="torch"), [t.double() for t in dense], dy.double())
    assert_within_budget(got, low, true)


def test_a_strided_row_of_nearly_2_to_the_31_elements():
    """Its first programs, as rows of such a length launch them."""
    n, rest, apart = 2**31 - 5, (1, 1, 1), (0, 0, 0, 0, 2)
    x, y = normal((4096,), torch.float16, seed=1), torch.empty(1024, dtype=torch.float16)
    tile = {"ROWS": 1, "COLS": 1024}
    value, dx = activation.formula("silu", x.dtype)
    activation._forward_strided[(1,)](x, y, 1, n, *rest, *apart, 0.0, 0.0, VALUE=value, **tile)
    assert_near(y, torch.nn.functional.silu(x[:2048:2]))
    more = {"DX": dx, "MASK_COLS": 0, "LEAKY": False}
    activation._backward_strided[(1,)](x, x, y, 1, n, *rest, *apart, *apart, 0.0, 0.0, **more, **tile)
    assert_near(y, vjp(torch.nn.functional.silu, [x[:2048:2]], x[:2048:2])[1])
    glu._forward_strided[(1,)](x, x, y, 1, n, *rest, *apart, *apart, VALUE=value, **tile)
    assert_near(y, torch.nn.functional.silu(x[:2048:2]) * x[:2048:2])


def assert_near(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)
