"""Norm modules: drop-in for torch.nn's in both directions, and ``fuse``, which must lose nothing of the module it replaces."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trinix
from trinix.ops.norm import FUSED_KINDS
from trinix.testing import normal

RESIDUAL = ("FastFusedResidualLayerNorm", "FastFusedResidualRMSNorm")
NAMES = ("FastLayerNorm", "FastRMSNorm", *RESIDUAL, "FastFusedRMSNormActivation")


def theirs_of(name, **arguments):
    return (nn.LayerNorm if "LayerNorm" in name else nn.RMSNorm)(6, **arguments)


def fill(module, seed=5):
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(parameter.shape, torch.float32, seed=seed + i))
    return module


def numbers(device, *shape, seed=1):
    return normal(shape or (4, 6), torch.float32, seed=seed, device=device)


def wanted_of(name, theirs, x, residual):
    h = x + residual if name in RESIDUAL else x
    y = theirs(h)
    if name in RESIDUAL:
        return y, h
    return F.silu(y) if "Activation" in name else y


def call(module, x, residual):
    return module(x, residual) if type(module).__name__ in RESIDUAL else module(x)


def ran(out) -> str:
    node = (out[0] if isinstance(out, tuple) else out).grad_fn.name()
    return "triton" if node in ("_NormBackward", "_ResidualNormBackward") else "torch"


@pytest.mark.parametrize("affine", [{}, {"elementwise_affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("use_triton", [None, False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_module_is_a_drop_in_for_pytorchs_and_survives_copying(name, use_triton, affine, device):
    theirs = fill(theirs_of(name, **affine)).to(device)
    module = getattr(trinix, name)(6, use_triton=use_triton, **affine).to(device)
    module.load_state_dict(theirs.state_dict())
    x, residual = numbers(device).requires_grad_(), numbers(device, seed=2)
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        out = call(one, x, residual)
        torch.testing.assert_close(out, wanted_of(name, theirs, x, residual))
        assert ran(out) in {True: ["triton"], False: ["torch"], None: ["torch", "triton"]}[use_triton]
        assert one.use_triton is use_triton
        back = theirs_of(name, **affine)
        back.load_state_dict(one.state_dict())
        assert [*back.state_dict()] == [*one.state_dict()]
    assert isinstance(module, type(theirs))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter_and_input(name, device):
    theirs = fill(theirs_of(name)).to(device)
    module = getattr(trinix, name)(6, use_triton=True).to(device)
    module.load_state_dict(theirs.state_dict())
    grads = []
    for one in (module, theirs):
        x, residual = numbers(device).requires_grad_(), numbers(device, seed=2).requires_grad_()
        out = call(one, x, residual) if one is module else wanted_of(name, one, x, residual)
        sum((t * t.cos()).sum() for t in (out if isinstance(out, tuple) else (out,))).backward()
        grads.append([x.grad, *([residual.grad] if name in RESIDUAL else []), *(p.grad for p in one.parameters())])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_module_has_pytorchs_parameters(name):
    ours, theirs = getattr(trinix, name)((2, 3)), type(theirs_of(name))((2, 3))
    assert [(k, v.shape, v.dtype) for k, v in ours.named_parameters()] == [
        (k, v.shape, v.dtype) for k, v in theirs.named_parameters()
    ]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert (ours.eps, ours.normalized_shape) == (theirs.eps, theirs.normalized_shape)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_begins_on_the_meta_device_and_is_filled_later(name):
    module = getattr(trinix, name)(6, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())
    x = torch.ones(4, 6, device="meta", dtype=torch.bfloat16)
    out = call(module, x, x)
    assert (out[0] if isinstance(out, tuple) else out).shape == (4, 6)
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert module.weight.eq(1).all()
    module.load_state_dict(theirs_of(name, dtype=torch.bfloat16).state_dict())


def test_layer_norm_without_bias():
    module = trinix.FastLayerNorm(6, bias=False)
    assert [*module.state_dict()] == ["weight"]
    x = numbers("cpu")
    torch.testing.assert_close(module(x), F.layer_norm(x, (6,), module.weight))
    assert trinix.FastFusedResidualLayerNorm(6, bias=False).bias is None


@pytest.mark.parametrize("name", ["FastRMSNorm", "FastFusedResidualRMSNorm", "FastFusedRMSNormActivation"])
def test_a_weight_offset_starts_as_the_identity(name, device):
    module = getattr(trinix, name)(6, weight_offset=1.0, use_triton=True).to(device)
    assert module.weight.eq(0).all()
    x, residual = numbers(device), numbers(device, seed=2)
    torch.testing.assert_close(call(module, x, residual), wanted_of(name, theirs_of(name).to(device), x, residual))
    assert "weight_offset=1.0" in repr(module)


@pytest.mark.parametrize("kind", FUSED_KINDS)
def test_every_activation_has_its_module(kind, device):
    module = trinix.FastFusedRMSNormActivation(6, kind, use_triton=True).to(device)
    x = numbers(device)
    torch.testing.assert_close(module(x), trinix.ops.activation(F.rms_norm(x, (6,)), kind, backend="torch"))


@pytest.mark.parametrize("name", RESIDUAL)
def test_dropout_acts_in_training_only(name, device):
    module = getattr(trinix, name)(64, dropout=0.5, use_triton=True).to(device)
    x, zeros = torch.ones(8, 64, device=device), torch.zeros(8, 64, device=device)
    _, h = module(x, zeros)
    assert set(h.unique().tolist()) == {0.0, 2.0}
    _, h = module.eval()(x, zeros)
    assert torch.equal(h, x)


@pytest.mark.parametrize("use_triton", [None, False, True])
@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_products_of_the_lower_dtype_come_in(name, use_triton, device):
    module = getattr(trinix, name)(6, use_triton=use_triton).to(device)
    x, residual = numbers(device), numbers(device, seed=2)
    with torch.autocast(device, torch.bfloat16):
        out = call(module, x.bfloat16(), residual)
    first = out[0] if isinstance(out, tuple) else out
    assert first.dtype == (torch.float32 if name in RESIDUAL else torch.bfloat16)
    first.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_wrong_arguments_are_refused():
    for name in RESIDUAL:
        with pytest.raises(ValueError, match=f"{name}: dropout must be at least 0 and below 1, got 1.5"):
            getattr(trinix, name)(6, dropout=1.5)
        with pytest.raises(ValueError, match=r"dropout must be at least 0 and below 1, got \[0.1\]"):
            getattr(trinix, name)(6, dropout=[0.1])
    with pytest.raises(ValueError, match=r"FastFusedRMSNormActivation: activation must be one of .*got 'swoosh'"):
        trinix.FastFusedRMSNormActivation(6, "swoosh")
    with pytest.raises(ValueError, match="normalized_shape"):
        trinix.FastLayerNorm(6)(torch.ones(3, 5))
    for name in NAMES:
        for wrong in (True, 6.0, -6, "6", None, [], [3, 2.0]):
            with pytest.raises(ValueError, match=f"{name}: normalized_shape must be an int or several, from 0 on, got"):
                getattr(trinix, name)(wrong)
        for wrong in (-1.0, "1e-5", [1e-5]):
            with pytest.raises(ValueError, match=f"{name}: eps must be a number from 0 on, got"):
                getattr(trinix, name)(6, eps=wrong)
        with pytest.raises(TypeError, match=f"{name}: use_triton must be None, True or False, got 1"):
            getattr(trinix, name)(6, use_triton=1)
        with pytest.raises(TypeError, match="argument 'bogus'"):
            getattr(trinix, name)(6, bogus=1)


def test_what_is_shown_is_what_matters():
    assert repr(trinix.FastLayerNorm(6)) == repr(nn.LayerNorm(6)).replace("LayerNorm", "FastLayerNorm")
    assert repr(trinix.FastRMSNorm(6)) == repr(nn.RMSNorm(6)).replace("RMSNorm", "FastRMSNorm")
    assert "use_triton=True, dropout=0.1" in repr(trinix.FastFusedResidualRMSNorm(6, dropout=0.1, use_triton=True))
    assert "activation=mish" in repr(trinix.FastFusedRMSNormActivation(6, "mish"))


@pytest.mark.parametrize("name", NAMES)
def test_told_to_use_triton_it_runs_elsewhere_what_triton_cannot(name, device):
    module = getattr(trinix, name)(6, use_triton=True, dtype=torch.float64, device=device)
    x = numbers(device).double()
    out = call(module, x, x)
    assert (out[0] if isinstance(out, tuple) else out).dtype == torch.float64


# ---- fuse --------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": (nn.ReLU, trinix.FastReLU),
    "sigmoid": (nn.Sigmoid, trinix.FastSigmoid),
    "silu": (nn.SiLU, trinix.FastSiLU),
    "gelu": (nn.GELU, trinix.FastGELU),
    "gelu_tanh": (lambda: nn.GELU("tanh"), lambda: trinix.FastGELU(approximate="tanh")),
    "quick_gelu": (trinix.FastQuickGELU,),
    "squared_relu": (trinix.FastSquaredReLU,),
    "mish": (nn.Mish, trinix.FastMish),
    "tanh": (nn.Tanh, trinix.FastTanh),
    "none": (nn.Identity,),
}


@pytest.mark.parametrize("norm", [nn.RMSNorm, trinix.FastRMSNorm])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_fuse_finds_the_activation(kind, norm):
    for make in ACTIVATIONS[kind]:
        trained = fill(norm(6, eps=0.1))
        fused = trinix.fuse(trained, make())
        assert type(fused) is trinix.FastFusedRMSNormActivation
        assert fused.activation == kind
        x = numbers("cpu")
        torch.testing.assert_close(fused(x), make()(trained(x)))


def test_every_activation_that_can_be_fused_is_found():
    assert set(ACTIVATIONS) == set(FUSED_KINDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("make", "behind", "type_of_result"),
    [
        (nn.LayerNorm, [], "FastLayerNorm"),
        (nn.RMSNorm, [], "FastRMSNorm"),
        (nn.RMSNorm, [nn.SiLU()], "FastFusedRMSNormActivation"),
        (trinix.FastRMSNorm, [nn.SiLU()], "FastFusedRMSNormActivation"),
    ],
)
def test_fuse_keeps_the_very_parameters_and_all_that_belongs_to_them(
    make, behind, type_of_result, affine, frozen, dtype, device
):
    norm = fill(make((2, 3), eps=0.1, elementwise_affine=affine, dtype=dtype, device=device)).eval()
    norm.requires_grad_(not frozen)
    fused = trinix.fuse(norm, *behind)
    assert type(fused) is getattr(trinix, type_of_result)
    assert [*fused.state_dict()] == [*norm.state_dict()]
    assert all(a is b for a, b in zip(fused.parameters(), norm.parameters(), strict=True))
    assert all(p.requires_grad is not frozen and p.dtype == dtype for p in fused.parameters())
    assert (fused.eps, fused.normalized_shape, fused.elementwise_affine) == (0.1, (2, 3), affine)
    assert not fused.training
    x = numbers(device, 4, 2, 3).to(dtype)
    torch.testing.assert_close(fused(x), nn.Sequential(norm, *behind)(x))
    if affine and not frozen:  # an optimizer that holds the norm's parameters moves the fused module
        optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
        before = fused.weight.clone()
        fused(x).float().square().sum().backward()
        optimizer.step()
        assert not torch.equal(fused.weight, before)
        torch.testing.assert_close(fused(x), nn.Sequential(norm, *behind)(x))
    pickle.loads(pickle.dumps(copy.deepcopy(fused))).load_state_dict(norm.state_dict())


def test_fuse_keeps_what_only_ours_has():
    norm = fill(trinix.FastRMSNorm(6, weight_offset=1.0, use_triton=False))
    fused = trinix.fuse(norm, trinix.FastMish())
    assert (fused.weight_offset, fused.use_triton, fused.eps) == (1.0, False, None)
    without_bias = trinix.fuse(nn.LayerNorm(6, bias=False))
    assert without_bias.bias is None
    assert [*without_bias.state_dict()] == ["weight"]
    for one in (trinix.FastRMSNorm(6), trinix.FastLayerNorm(6)):
        assert trinix.fuse(one) is one


def test_fuse_works_on_the_meta_device():
    fused = trinix.fuse(nn.RMSNorm(6, device="meta"), nn.ReLU())
    assert fused.weight.is_meta


class MyNorm(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x) * 2


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


def replaced(module):
    module.forward = torch.zeros_like
    return module


def more(norm, what):
    if what == "buffer":
        norm.register_buffer("extra", torch.ones(1))
    elif what == "module":
        norm.extra = nn.Linear(2, 2)
    else:
        norm.register_load_state_dict_post_hook(lambda *_: None)
    return norm


REFUSED = {
    "nothing": ((), r"no fused form for \(\)"),
    "no norm": ((nn.SiLU(),), r"no fused form for \(SiLU\)"),
    "layer norm and activation": ((nn.LayerNorm(6), nn.SiLU()), r"\(LayerNorm, SiLU\); known are"),
    "the wrong order": ((nn.SiLU(), nn.RMSNorm(6)), r"\(SiLU, RMSNorm\)"),
    "an activation with parameters": ((nn.RMSNorm(6), nn.LeakyReLU()), r"\(RMSNorm, LeakyReLU\)"),
    "softplus": ((nn.RMSNorm(6), trinix.FastSoftplus()), r"\(RMSNorm, FastSoftplus\)"),
    "three": ((nn.RMSNorm(6), nn.SiLU(), nn.SiLU()), r"\(RMSNorm, SiLU, SiLU\)"),
    "a subclass": ((MyNorm(6), nn.SiLU()), r"\(MyNorm, SiLU\)"),
    "a fused one": ((trinix.FastFusedResidualRMSNorm(6), nn.SiLU()), "FastFusedResidualRMSNorm, SiLU"),
    "a hook": ((hooked(nn.RMSNorm(6)), nn.SiLU()), "RMSNorm has hooks"),
    "a hook behind": ((nn.RMSNorm(6), hooked(nn.SiLU())), "SiLU has hooks"),
    "a buffer": ((more(nn.RMSNorm(6), "buffer"),), "RMSNorm has more than its own parameters \\('extra'\\)"),
    "a child": ((more(nn.RMSNorm(6), "module"),), "RMSNorm has more than its own parameters \\('extra'\\)"),
    "a hook on loading": ((more(nn.RMSNorm(6), "hook"),), "RMSNorm has hooks"),
    "a forward of its own": ((replaced(nn.RMSNorm(6)),), "RMSNorm has a forward of its own"),
    "a function": ((nn.RMSNorm(6), F.silu), "modules must be torch.nn modules, got function"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fuse_refuses_what_it_cannot_fuse(case):
    modules, text = REFUSED[case]
    with pytest.raises(TypeError, match=text):
        trinix.fuse(*modules)


def test_fuse_refuses_a_parametrized_norm():
    norm = nn.utils.parametrizations.weight_norm(nn.RMSNorm((2, 3)))
    with pytest.raises(TypeError, match="ParametrizedRMSNorm"):
        trinix.fuse(norm, nn.SiLU())


def test_without_triton_every_norm_runs_on_the_cpu(forked_process):
    code = """
        import sys
        sys.modules |= dict.fromkeys([name for name in sys.modules if name.partition(".")[0] == "triton"])
        import torch, trinix
        x = torch.randn(3, 6, requires_grad=True)
        for name in ("FastLayerNorm", "FastRMSNorm", "FastFusedRMSNormActivation"):
            getattr(trinix, name)(6, use_triton=True)(x).sum().backward()
        for name in ("FastFusedResidualLayerNorm", "FastFusedResidualRMSNorm"):
            getattr(trinix, name)(6, use_triton=True)(x, x)[0].sum().backward()
        try:
            trinix.ops.rms_norm(x, 6, backend="triton")
        except trinix.Unsupported as error:
            print(error)
    """
    assert "needs the package triton, which is not installed" in forked_process(code)
