"""Keys and values of latent attention: the kernels move the very bits that PyTorch's cat and split move."""

import pytest
import torch

import trinix
from helpers import captured, same
from trinix.ops import latent as contract
from trinix.testing import assert_within_budget, normal

SHAPES = [
    (2, 5, 3, 16, 8, 8),
    (1, 1, 1, 8, 8, 8),
    (3, 7, 130, 24, 40, 16),
    (1, 33, 17, 128, 128, 64),
    (2, 3, 4, 96, 192, 32),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def keys_and_values(both, k_rope, n):
    return contract.keys_and_values(both, k_rope, n, "triton")


def plain(both, k_rope, n):
    k, v = both.split((n, both.shape[-1] - n), -1)
    return torch.cat((k_rope.expand(-1, -1, both.shape[2], -1), k), -1), v


def inputs(shape, dtype, device="cpu"):
    b, s, h, n, v, r = shape
    both = normal((b, s, h, n + v), dtype, seed=1, device=device).requires_grad_()
    k_rope = normal((b, s, 1, r), dtype, seed=2, device=device).requires_grad_()
    return (
        both,
        k_rope,
        normal((b, s, h, r + n), dtype, seed=3, device=device),
        normal((b, s, h, v), dtype, seed=4, device=device),
    )


@pytest.fixture
def calls(monkeypatch):
    """Which kernels ran."""
    kernels = pytest.importorskip("trinix.kernels.triton.latent")
    seen = []
    for name in ("forward", "backward"):
        run = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, run=run: seen.append(name) or run(*a))
    return seen


def judged(both, k_rope, dk, dv, n):
    """Both passes: moved bits are equal, the sum over heads is within its budget."""
    k, v = keys_and_values(both, k_rope, n)
    want_k, want_v = plain(both, k_rope, n)
    same(k, want_k)
    same(v, want_v)
    assert v.data_ptr() == both[..., n:].data_ptr(), "v is a view"
    d_both, d_rope = torch.autograd.grad((k, v), (both, k_rope), (dk, dv))
    want_both, want_rope = torch.autograd.grad((want_k, want_v), (both, k_rope), (dk, dv))
    same(d_both, want_both)
    exact = dk[..., : k_rope.shape[-1]].double().sum(2, keepdim=True)
    assert_within_budget([d_rope], [want_rope], [exact])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keys_values_and_gradients(shape, dtype, device, calls):
    both, k_rope, dk, dv = inputs(shape, dtype, device)
    judged(both, k_rope, dk, dv, shape[3])
    assert calls == ["forward", "backward"]


def test_gradients_of_any_strides(device, calls):
    both, k_rope, dk, dv = inputs((2, 5, 3, 16, 8, 8), torch.float32, device)
    for d in (dk, dv):
        for other in (
            d.transpose(1, 2).contiguous().transpose(1, 2), d[:, :1].expand_as(d), d.mT.contiguous().mT,
            torch.nn.functional.pad(d, (1, 2))[..., 1:-2], d.repeat_interleave(2, -1)[..., ::2],
        ):  # fmt: skip
            judged(both, k_rope, *((other, dv) if d is dk else (dk, other)), 16)
    assert calls.count("backward") == 10


@pytest.mark.parametrize("alone", [0, 1])
def test_half_the_outputs_and_half_the_inputs(alone, device, calls):
    both, k_rope, dk, dv = inputs((2, 5, 3, 16, 8, 8), torch.float32, device)
    out, want = keys_and_values(both, k_rope, 16)[alone], plain(both, k_rope, 16)[alone]
    d = (dk, dv)[alone]
    same(*(torch.autograd.grad(y, both, d)[0] for y in (out, want)))
    leaves = [both.detach(), k_rope.detach()]
    leaves[alone].requires_grad_()
    outs, wants = keys_and_values(*leaves, 16), plain(*leaves, 16)
    grads = [torch.autograd.grad(ys[0], leaves[alone], dk)[0] for ys in (outs, wants)]
    torch.testing.assert_close(*grads)


def test_what_the_kernel_does_not_take_is_pytorchs(device, calls):
    both, k_rope, *_ = inputs((2, 5, 3, 16, 8, 8), torch.float32, device)
    with torch.no_grad():
        for change in (
            lambda b, r: (b.double(), r.double(), 16), lambda b, r: (b, r.double(), 16), lambda b, r: (b, r, 15),
            lambda b, r: (b[:, :, ::2], r, 16), lambda b, r: (b[..., :20], r, 16), lambda b, r: (b, r[..., :5], 16),
            lambda b, r: (b[:0], r[:0], 16),
        ):  # fmt: skip
            call = change(both, k_rope)
            for got, want in zip(keys_and_values(*call), plain(*call), strict=True):
                same(got, want)
        contract.keys_and_values(both, k_rope, 16, "torch")
        with trinix.use_backend("torch"):
            contract.keys_and_values(both, k_rope, 16)
        assert not calls
        contract.keys_and_values(both, k_rope, 16)
    assert calls == ["forward"] * both.is_cuda, "on a CPU only a call that asks for it runs in the interpreter"


def test_a_second_derivative_and_transforms(device):
    both, k_rope, *_ = inputs((1, 2, 3, 8, 8, 8), torch.float32, device)

    def loss(function, both, k_rope):
        k, v = function(both, k_rope, 8)
        return (k**3).sum() + (v**3 * k[..., 8:]).sum()

    found = []
    for function in (keys_and_values, plain):
        first = torch.autograd.grad(loss(function, both, k_rope), (both, k_rope), create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), (both, k_rope))
        mapped = torch.func.grad(lambda b, r, f=function: loss(f, b, r), (0, 1))(both.detach(), k_rope.detach())
        found.append((*first, *second, *mapped))
    torch.testing.assert_close(*found)


def test_a_batch_of_gradients_of_the_values_alone(device):
    """dk is then of zeros, and no batch."""
    both, k_rope, *_ = inputs((1, 2, 3, 8, 8, 8), torch.float32, device)
    dv = normal((4, 1, 2, 3, 8), torch.float32, seed=5, device=device)
    got, want = (
        torch.autograd.grad(function(both, k_rope, 8)[1], both, dv, is_grads_batched=True)[0]
        for function in (keys_and_values, plain)
    )
    same(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 2048, 128, 128, 128, 64), (1, 4096, 16, 128, 128, 64)], ids=str)
def test_on_the_card_the_sizes_of_deepseek_v3(shape):
    both, k_rope, dk, dv = inputs(shape, torch.bfloat16, "cuda")
    judged(both, k_rope, dk, dv, shape[3])
    with torch.no_grad():
        graph, (k, v) = captured(lambda: keys_and_values(both, k_rope, shape[3]))
        both.copy_(normal(both.shape, torch.bfloat16, seed=9, device="cuda"))
        graph.replay()
        for got, want in zip((k, v), plain(both, k_rope, shape[3]), strict=True):
            same(got, want)
