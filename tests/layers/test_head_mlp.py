"""FlashMLP beside the reference module, its initial scales and state_dict, and document 000's functions."""

import re

import pytest
import torch
from torch.nn import functional as F

import trinix
from helpers import same
from trinix.testing import normal


def modules(activation="silu", **more):
    torch.manual_seed(0)
    fused = trinix.FlashMLP(3, 16, 24, activation, use_triton=True, **more)
    reference = trinix.PyTorchMLP(3, 16, 24, activation, **more)
    reference.load_state_dict(fused.state_dict())
    return fused, reference


@pytest.mark.parametrize("shape", [(3, 9, 16), (9, 16)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["", "silu", "gelu", "swiglu"])
def test_the_fused_module_is_the_reference(activation, bias, shape):
    fused, reference = modules(activation, bias=bias)
    x = normal(shape, torch.float32, seed=1)
    results = []
    for module in (fused, reference):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        assert y.shape == x.shape
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*results)


def test_two_dimensional_rows_give_the_average_of_the_heads():
    fused, _ = modules()
    x = normal((5, 16), torch.float32, seed=1)
    torch.testing.assert_close(fused(x), fused(x.expand(3, 5, 16)).mean(0))


def test_weights_begin_with_variance_one_over_fan_in_so_that_the_output_has_the_inputs_scale():
    torch.manual_seed(0)
    module = trinix.FlashMLP(4, 64, 512, "none")
    assert abs(module.w1.std().item() * 64**0.5 - 1) < 0.02
    assert abs(module.w2.std().item() * 512**0.5 - 1) < 0.02
    assert abs(module(torch.randn(4, 256, 64)).std().item() - 1) < 0.1
    assert not trinix.FlashMLP(1, 4, 8, bias=True).b1.any()


def test_the_state_dict_has_only_what_the_form_needs():
    assert list(trinix.FlashMLP(1, 4, 8).state_dict()) == ["w1", "w2"]
    assert list(trinix.FlashMLP(1, 4, 8, "geglu", bias=True).state_dict()) == ["w1", "w2", "w_gate", "b1", "b2"]
    assert trinix.FlashMLP(1, 4, 8, dtype=torch.float16).w1.dtype == torch.float16
    assert repr(trinix.FlashMLP(1, 4, 8, bias=True)) == "FlashMLP(1, 4, 8, activation='silu', bias=True)"


@pytest.mark.parametrize("activation", ["SiLU", "swish", None, False, 0, (), ["silu"]])
def test_an_unknown_activation_is_refused(activation):
    """Only "" is the identity: the document's kernel takes every name that it does not know for it."""
    x, w1, w2 = torch.ones(1, 2, 3), torch.ones(1, 3, 4), torch.ones(1, 4, 3)
    for name, call in (
        ("FlashMLP", lambda: trinix.FlashMLP(1, 4, 8, activation)),
        ("PyTorchMLP", lambda: trinix.PyTorchMLP(1, 4, 8, activation)),
        ("FlashMLPFunction", lambda: trinix.FlashMLPFunction.apply(x, w1, w2, activation)),
        ("flashmlp_fwd", lambda: trinix.flashmlp_fwd(x, w1, w2, activation)),
        ("flashmlp_bwd", lambda: trinix.flashmlp_bwd(x, w1, w2, x, activation)),
    ):
        with pytest.raises(
            ValueError, match=f"^{name}: activation must be one of .* got {re.escape(repr(activation))}$"
        ):
            call()


def test_the_documents_functions_know_no_gated_unit():
    x, w1, w2 = torch.ones(1, 2, 3), torch.ones(1, 3, 4), torch.ones(1, 4, 3)
    with pytest.raises(ValueError, match=r"^flashmlp_fwd: activation must be one of .*'softplus'\], got 'swiglu'"):
        trinix.flashmlp_fwd(x, w1, w2, "swiglu")


def test_sizes_below_one_are_refused():
    for use_triton in (None, True):
        with pytest.raises(TypeError, match="head_mlp: x must be a floating-point tensor, got list"):
            trinix.FlashMLP(2, 4, 4, use_triton=use_triton)([1.0])
        with pytest.raises(ValueError, match=r"head_mlp: x must be .* got shape \[\]"):
            trinix.FlashMLP(2, 4, 4, use_triton=use_triton)(torch.tensor(1.0))
    with pytest.raises(TypeError, match="head_mlp: x must be a floating-point tensor, got list"):
        trinix.flashmlp_fwd([1.0], 1, 2)
    x, w1, w2 = torch.ones(1, 2, 3), torch.ones(1, 3, 4), torch.ones(1, 4, 3)
    with pytest.raises(TypeError, match=r"flashmlp_bwd: do must be a floating-point tensor, got torch.int64"):
        trinix.flashmlp_bwd(x, w1, w2, torch.ones(1, 2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"flashmlp_bwd: do must be of the output's shape \[1, 2, 3\], got \[2\]"):
        trinix.flashmlp_bwd(x, w1, w2, torch.ones(2))
    with pytest.raises(ValueError, match=r"flashmlp_bwd: do must be on x's device cpu, got meta; move it with do.to"):
        trinix.flashmlp_bwd(x, w1, w2, torch.ones(1, 2, 3, device="meta"))
    with pytest.raises(TypeError, match="FlashMLP: bias must be True or False, got 'no'"):
        trinix.FlashMLP(2, 4, 8, bias="no")
    with pytest.raises(TypeError, match="FlashMLP: use_triton must be None, True or False, got 'no'"):
        trinix.FlashMLP(2, 4, 4, use_triton="no")
    with pytest.raises(ValueError, match="num_heads must be an int from 1 on, got 0"):
        trinix.FlashMLP(0, 4, 8)


@pytest.mark.parametrize("activation", ["", "silu", "leaky_relu", "sigmoid"])
def test_the_documents_functions(activation):
    x, w1, w2, do = (
        normal(s, torch.float32, seed=i) for i, s in enumerate([(2, 5, 8), (2, 8, 6), (2, 6, 8), (2, 5, 8)])
    )
    act = {"": lambda t: t, "silu": F.silu, "leaky_relu": F.leaky_relu, "sigmoid": torch.sigmoid}[activation]
    leaves = [t.clone().requires_grad_() for t in (x, w1, w2)]
    wanted = act(leaves[0] @ leaves[1]) @ leaves[2]
    torch.testing.assert_close(trinix.flashmlp_fwd(x, w1, w2, activation), wanted)
    grads = torch.autograd.grad(wanted, leaves, do)
    torch.testing.assert_close(trinix.flashmlp_bwd(x, w1, w2, do, activation), grads)
    y = trinix.FlashMLPFunction.apply(*leaves, activation)
    same(torch.autograd.grad(y, leaves, do), trinix.flashmlp_bwd(x, w1, w2, do, activation))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_the_documents_backward_runs_in_inference_mode_and_on_what_that_has_made(backend):
    given = [normal(s, torch.float32, seed=i) for i, s in enumerate([(2, 5, 8), (2, 8, 6), (2, 6, 8), (2, 5, 8)])]
    with trinix.use_backend(backend):
        wanted = trinix.flashmlp_bwd(*given, "silu")
        with torch.inference_mode():
            same(trinix.flashmlp_bwd(*given, "silu"), wanted)
            made = [t.clone() for t in given]
        same(trinix.flashmlp_bwd(*made, "silu"), wanted)
