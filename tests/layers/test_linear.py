"""FastLinear: one row against float64, and that everything else is ``torch.nn.Linear``'s affair."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trinix
from helpers import Tagged, captured, same
from trinix.layers.linear import FastLinear
from trinix.ops import linear as contract
from trinix.testing import assert_within_budget, normal

SIZES = [(64, 1), (8, 5), (72, 130), (3000, 33), (4096, 9)]


def made(k, n, bias=True, dtype=torch.bfloat16, device="cpu"):
    layer = FastLinear(k, n, bias, device=device, dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(parameter.shape, dtype, seed=i, device=device))
    return layer.requires_grad_(False)


def with_(layer, **parameters):
    for name, value in parameters.items():
        setattr(layer, name, None if value is None else nn.Parameter(value.detach(), requires_grad=False))
    return layer


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel ran."""
    kernels = pytest.importorskip("trinix.kernels.triton.linear")
    run, seen = kernels.forward, []

    def watched(*arguments):
        seen.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(kernels, "forward", watched)
    return seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_one_row_holds_the_float64_budget(k, n, bias, dtype, device, calls):
    layer = made(k, n, bias, dtype, device)
    x = normal((1, 1, k), dtype, seed=9, device=device)
    true = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    y = layer(x)
    assert_within_budget([y], [F.linear(x, layer.weight, layer.bias)], [true])
    assert y.shape == (1, 1, n)
    assert len(calls) == 1
    same(layer(x.view(k)), y.view(n))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, x: (layer.float(), x.float()),
        lambda layer, x: (layer, x.expand(1, 2, -1)),
        lambda layer, x: (layer, x[:, :0]),
        lambda layer, x: (layer, x.as_subclass(Tagged)),
        lambda layer, x: (layer.requires_grad_(), x),
        lambda layer, x: (layer, x.clone().requires_grad_()),
        lambda layer, x: (made(20, 3, device=x.device), x[..., :20]),
        lambda layer, x: (layer, torch.stack((x, x), -1)[..., 0]),
        lambda layer, x: (with_(layer, bias=layer.bias[:1]), x),
        lambda layer, x: (with_(layer, bias=None, weight=layer.weight[0]), x),
    ],
    ids=[
        "float32", "two rows", "no row", "subclass", "weights that learn", "x that learns", "K of 20", "strided",
        "bias for all", "one column",
    ],
)  # fmt: skip
def test_other_calls_are_pytorchs(change, device, calls):
    layer = made(64, 5, device=device)
    layer, x = change(layer, normal((1, 1, 64), torch.bfloat16, seed=9, device=device))
    same(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not calls


def test_a_sparse_weight_is_pytorchs(device, calls):
    layer, x = made(64, 8, False, device=device), normal((1, 64), torch.bfloat16, seed=9, device=device)
    with_(layer, weight=layer.weight.to_sparse_csr())
    try:
        want = F.linear(x, layer.weight)
    except RuntimeError:  # not every PyTorch has the product
        with pytest.raises(RuntimeError, match=r"^(?!.*is_contiguous)"):
            layer(x)
    else:
        same(layer(x), want)
    assert not calls


def test_a_layer_on_the_meta_device_gives_shapes():
    place = {"dtype": torch.bfloat16, "device": "meta"}
    with torch.no_grad():
        assert FastLinear(64, 5, **place)(torch.empty(1, 64, **place)).shape == (1, 5)


def test_contexts_that_leave_it_to_pytorch(device, calls):
    layer, x = made(64, 5, device=device), normal((1, 64), torch.bfloat16, seed=9, device=device)
    wanted = F.linear(x, layer.weight, layer.bias)
    with trinix.use_backend("torch"):
        same(layer(x), wanted)
    with torch.autocast(x.device.type, torch.bfloat16):
        same(layer(x), wanted)
    same(torch.vmap(layer)(x), wanted)
    assert not calls
    learning = made(64, 5, device=device).requires_grad_()
    with torch.no_grad():
        learning(x)
    assert len(calls) == 1


def test_a_row_of_another_width_is_refused_as_torch_refuses_it(device):
    layer = made(64, 5, device=device)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(8, 8, dtype=torch.bfloat16, device=device))
    with_(layer, bias=torch.zeros(3, dtype=torch.bfloat16, device=device))
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 64, dtype=torch.bfloat16, device=device))


def test_it_is_a_linear_layer():
    layer = made(64, 5)
    assert isinstance(layer, nn.Linear)
    plain = nn.Linear(64, 5, dtype=torch.bfloat16)
    plain.load_state_dict(layer.state_dict())
    x = normal((3, 64), torch.bfloat16, seed=9)
    for other in (plain, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        same(other(x), layer(x))


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_sees_pytorchs_product():
    layer, x = made(64, 5), normal((1, 64), torch.bfloat16, seed=9)
    same(torch.compile(layer, fullgraph=True, backend="eager")(x), F.linear(x, layer.weight, layer.bias))


def test_without_triton_it_is_pytorchs(monkeypatch):
    monkeypatch.setattr(contract, "_kernels", lambda: None)
    layer, x = made(64, 5), normal((1, 64), torch.bfloat16, seed=9)
    same(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "n"), [(4096, 6144), (4096, 28672), (14336, 4096), (4096, 32000)])
def test_on_the_card_the_sizes_of_a_model_and_a_graph(k, n):
    layer = made(k, n, False, device="cuda")
    x = normal((1, 1, k), torch.bfloat16, seed=9, device="cuda")
    graph, y = captured(lambda: layer(x))
    x.copy_(normal((1, 1, k), torch.bfloat16, seed=10, device="cuda"))
    graph.replay()
    assert_within_budget([y], [F.linear(x, layer.weight)], [F.linear(x.double(), layer.weight.double())])
    first = y.clone()
    for _ in range(20):
        graph.replay()
        same(y, first)


@pytest.mark.gpu
def test_on_the_card_a_product_begun_early_waits_for_what_the_one_before_writes():
    """Every product's row is the one before's result, through a norm that lets it in early; weights change between replays."""
    norm = trinix.FastFusedResidualRMSNorm(4096, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    chain = [made(4096, 4096, False, device="cuda") for _ in range(12)]
    for i, layer in enumerate(chain):
        layer.weight.copy_(normal((4096, 4096), torch.bfloat16, seed=i, device="cuda") * 4096**-0.5)
    x = normal((1, 4096), torch.bfloat16, seed=20, device="cuda")

    def run(pause=lambda: None):
        y, h = x, torch.zeros_like(x)
        for layer in chain:
            pause()
            y, h = norm(layer(y), h)
            pause()
            y = layer(y)
        return y

    with torch.no_grad():
        graph, y = captured(run)
        for i in range(50):
            x.copy_(normal(x.shape, torch.bfloat16, seed=30 + i, device="cuda"))
            chain[i % 12].weight.neg_()  # the product behind must not have fetched the old weight for good
            graph.replay()
            got = y.clone()
            same(got, run(torch.cuda.synchronize))
