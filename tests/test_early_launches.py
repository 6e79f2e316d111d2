"""Kernels that begin before the one in front has ended: calls that read what the call before wrote, back to back and in a graph,
give the bits that they give one at a time. (Without its wait one kernel of head_mlp got 39 of 50 such chains wrong.)"""

import pytest
import torch

from helpers import captured
from trinix import ops
from trinix.testing import normal

pytestmark = pytest.mark.gpu
REPEATS = 100
SHAPE = (4, 300, 64)  # heads or sequences, rows, channels


def drawn(*shape, seed=0, scale=1.0):
    return normal(shape, torch.bfloat16, seed=seed, device="cuda", scale=scale)


def head_mlp(backend):
    w1, w2 = drawn(4, 64, 128, seed=1, scale=0.2), drawn(4, 128, 64, seed=2, scale=0.2)
    return lambda x: ops.head_mlp(x, w1, w2, "silu", backend=backend)


def attention(backend, **options):
    def call(x):
        q = x.unflatten(-1, (1, -1))  # one head
        return ops.attention(q, q, q, deterministic=True, backend=backend, **options).flatten(2)

    return call


def mixed():
    """Kernels of several ops, PyTorch's among them: not all begin early, and some let the next one in before they wait."""
    mlp, attend = head_mlp("auto"), attention("auto", causal=True)

    def call(x):
        x = attend(ops.rms_norm(mlp(x), 64))
        return ops.softmax(torch.mul(x, 1.25), -2) + ops.layer_norm(x, 64)

    return call


def gated(x):
    """glu's rows read what a norm writes that lets them in at its start."""
    y = ops.glu(ops.rms_norm(x, 64), kind="swiglu")
    return torch.cat((y, -y), -1)


CALLS = {
    "glu behind a norm": lambda: gated,
    "head_mlp on Hopper": lambda: head_mlp("hopper"),
    "head_mlp by Triton": lambda: head_mlp("triton"),
    "attention on Hopper, all at once": lambda: attention("hopper", causal=True),
    "attention on Hopper, any length": lambda: attention("hopper", softcap=20.0),
    "attention by Triton": lambda: attention("triton"),
    "several ops": mixed,
}


def gradient(call):
    """The gradient of ``call`` by its input, as a call of its own."""

    def run(x):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(call(leaf), leaf, x)[0]

    return run


def chain(call, x, wait=False):
    results = []
    for _ in range(4):
        x = call(x)
        results.append(x)
        if wait:
            torch.cuda.synchronize()
    return results


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize("name", CALLS)
def test_chains_read_what_was_written_before_them(name, pass_):
    call = CALLS[name]()
    if pass_ == "backward":
        call = gradient(call)
    x = drawn(*SHAPE, seed=5)
    wanted = chain(call, x, wait=True)
    for _ in range(REPEATS):
        torch.testing.assert_close(chain(call, x), wanted, rtol=0, atol=0)
    graph, results = captured(lambda: chain(call, x))
    for _ in range(REPEATS):
        for one in results:
            one.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(results, wanted, rtol=0, atol=0)
