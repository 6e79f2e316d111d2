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


# ---- products of one x, and slices of one product -------------------------------------------------------------------------


def parameters_of(sizes, k, dtype, bias=True):
    made = [normal(shape, dtype, seed=i) for i, shape in enumerate(s for n in sizes for s in ((n, k), (n,)))]
    return [t.requires_grad_() if bias or t.dim() == 2 else None for t in made]


def pairs(parameters):
    return list(zip(parameters[::2], parameters[1::2], strict=True))


def gradients(outputs, given, leaves):
    return torch.autograd.grad(outputs, [t for t in leaves if t is not None], given)


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (2, 0)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_of_one_x_and_all_gradients(dtype, bias, used, frozen):
    """Gradients of every stride; some products unused, one weight frozen."""
    x = normal((2, 7, 24), dtype, seed=9).requires_grad_()
    parameters = parameters_of((8, 40, 1), 24, dtype, bias)
    parameters[2 * frozen].requires_grad_(False)
    outputs = contract.linears(x, pairs(parameters))
    same(outputs, [F.linear(x, w, b) for w, b in pairs(parameters)])
    assert all("Linears" in y.grad_fn.name() for y in outputs)
    given = [normal(y.shape, dtype, seed=20 + i) for i, y in enumerate(outputs)]
    given[0], given[2] = given[0].mT.contiguous().mT, given[2][:1, :1].expand(outputs[2].shape)
    leaves = [x] + [t for i in used for t in parameters[2 * i : 2 * i + 2] if t is not None and t.requires_grad]

    def judged(wide=None):
        copies = {
            id(t): t.detach().to(wide or dtype).requires_grad_(t.requires_grad)
            for t in (x, *parameters)
            if t is not None
        }
        low = [
            F.linear(copies[id(x)], copies[id(w)], None if b is None else copies[id(b)]) for w, b in pairs(parameters)
        ]
        return gradients(
            [low[i] for i in used], [given[i].to(low[i].dtype) for i in used], [copies[id(t)] for t in leaves]
        )

    got = gradients([outputs[i] for i in used], [given[i] for i in used], leaves)
    assert_within_budget(got, judged(), judged(torch.float64))


def test_products_of_one_x_twice_differentiated():
    x = normal((3, 4), torch.float64, seed=0).requires_grad_()
    parameters = parameters_of((2, 5), 4, torch.float64)
    assert torch.autograd.gradgradcheck(lambda x, *p: tuple(contract.linears(x, pairs(p))), (x, *parameters))


def test_products_of_one_x_pulled_back_under_autocast():
    """Which came on after forward, as around a layer that was kept out of it; of the same precision as without."""
    x = normal((3, 4), torch.float32, seed=0).requires_grad_()
    parameters = parameters_of((2, 5), 4, torch.float32)
    outputs = contract.linears(x, pairs(parameters))
    given = [normal(y.shape, torch.float32, seed=i) for i, y in enumerate(outputs)]
    want = torch.autograd.grad(outputs, [x, *parameters], given, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(outputs, [x, *parameters], given)
    same(got, want)


class Constant(torch.autograd.Function):
    """Its gradient is ones, whatever came in: no batch even where that was one."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return torch.ones(dy.shape, dtype=dy.dtype)


@pytest.mark.parametrize("alone", [None, 0, 1], ids=["all batched", "first not", "second not"])
@pytest.mark.parametrize("functorch", [True, False])
def test_products_of_one_x_of_batched_gradients(alone, functorch):
    x = normal((3, 4), torch.float64, seed=0).requires_grad_()
    parameters = parameters_of((2, 5), 4, torch.float64)
    leaves = [x, *parameters]

    def judged(outputs):
        outputs = [Constant.apply(y) if i == alone else y for i, y in enumerate(outputs)]
        given = [normal((6, *y.shape), torch.float64, seed=i) for i, y in enumerate(outputs)]
        if functorch:
            return torch.vmap(lambda *dy: torch.autograd.grad(outputs, leaves, dy, retain_graph=True))(*given)
        return torch.autograd.grad(outputs, leaves, given, is_grads_batched=True)

    want = judged([F.linear(x, w, b) for w, b in pairs(parameters)])
    torch.testing.assert_close(judged(contract.linears(x, pairs(parameters))), want)


@pytest.mark.parametrize("of_x", [True, False])
def test_products_of_one_x_are_separate_where_somebody_looks_on(of_x):
    x = normal((3, 4), torch.float32, seed=0).requires_grad_(of_x)
    parameters = parameters_of((2, 5), 4, torch.float32)

    def joined(x):
        return any("Linears" in y.grad_fn.name() for y in contract.linears(x, pairs(parameters)))

    assert joined(x) == of_x
    with torch.autocast("cpu", torch.bfloat16):
        assert not joined(x)
    assert not joined(x.as_subclass(Tagged))
    sparse = [(w.detach().to_sparse_csr(), b) for w, b in pairs(parameters)]
    same(contract.linears(x, sparse), [F.linear(x, w, b) for w, b in sparse])


def test_products_of_a_complex_x_are_pytorchs():
    x, weight = (torch.randn(n, 4, dtype=torch.complex128, requires_grad=True) for n in (3, 2))
    y, z = contract.linears(x, [(weight, None), (weight, None)])
    got = torch.autograd.grad((y + z).abs().sum(), (x, weight))
    same(got, torch.autograd.grad((F.linear(x, weight) + F.linear(x, weight)).abs().sum(), (x, weight)))


def test_a_hooked_projection_is_called():
    layer = trinix.FastMultiHeadAttention(8, 2)
    seen = []
    layer.k_proj.register_forward_hook(lambda *_: seen.append(1))
    layer(torch.randn(1, 3, 8, requires_grad=True)).sum().backward()
    assert seen == [1]


def test_projections_are_called_under_a_hook_on_all_modules():
    layer, seen = trinix.FastMultiHeadAttention(8, 2), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        layer(torch.randn(1, 3, 8, requires_grad=True))
    finally:
        handle.remove()
    assert {layer.q_proj, layer.k_proj, layer.v_proj} < {*seen}


class Doubled(FastLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_projection_of_a_class_of_its_own_is_called():
    layer, x = trinix.FastMultiHeadAttention(8, 2, bias=False), torch.randn(1, 3, 8, requires_grad=True)
    double = Doubled(8, 8, False)
    with torch.no_grad():
        double.weight.copy_(layer.v_proj.weight / 2)
    want = layer(x)
    layer.v_proj = double
    torch.testing.assert_close(layer(x), want)


class InPlace(torch.autograd.Function):
    """Passes slices on; their gradients come as ``given``."""

    @staticmethod
    def forward(ctx, given, *parts):
        ctx.given = given
        return tuple(t.clone() for t in parts)

    @staticmethod
    def backward(ctx, *_):
        return None, *ctx.given


@pytest.mark.parametrize("dim", [2, 3])
def test_gradients_that_are_slices_of_one_tensor_are_passed_on_as_it(dim):
    packed = normal((2, 3, 6, 8), torch.float32, seed=0).requires_grad_()
    sizes = (3, 1, 2) if dim == 2 else (3, 5)
    whole = normal(packed.shape, torch.float32, seed=1)
    parts = whole.split(sizes, dim)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in parts]
    swapped = [whole.flip(dim).split(sizes[::-1], dim)[::-1][i].flip(dim) for i in range(len(sizes))]
    wider = torch.cat((whole, whole), dim).split((*sizes, whole.shape[dim]), dim)[:-1]
    for given, kept in (
        (parts, True),
        ([t.clone() for t in parts], False),
        (turned, False),
        (swapped, False),
        (wider, False),
    ):
        outputs = contract.slices(packed, sizes, dim)
        same(list(outputs), list(packed.split(sizes, dim)))
        gradient = torch.autograd.grad(InPlace.apply(given, *outputs), packed, parts)[0]
        same(gradient, torch.cat(list(given), dim))
        assert (gradient.data_ptr() == whole.data_ptr()) == kept


def test_slices_in_the_wrong_order_or_unused_are_put_together():
    packed = normal((2, 3, 4, 8), torch.float32, seed=0).requires_grad_()
    whole = normal(packed.shape, torch.float32, seed=1)
    first, second = whole.split(2, 2)
    a, b = contract.slices(packed, (2, 2), 2)
    same(torch.autograd.grad(InPlace.apply((second, first), a, b), packed, (a, b))[0], torch.cat((second, first), 2))
    a, _ = contract.slices(packed, (2, 2), 2)
    same(torch.autograd.grad(a.sum(), packed)[0], torch.cat((torch.ones_like(first), torch.zeros_like(second)), 2))


def test_gradients_that_are_neighbours_by_chance_are_put_together():
    """One storage ends where the next begins: no tensor can have the memory of both."""
    packed = normal((4, 8), torch.float32, seed=0).requires_grad_()
    memory = bytearray(normal((32,), torch.float32, seed=1).numpy().tobytes())
    given = [torch.frombuffer(memory, dtype=torch.float32, count=16, offset=at).view(2, 8) for at in (0, 64)]
    outputs = contract.slices(packed, (2, 2), 0)
    same(torch.autograd.grad(InPlace.apply(given, *outputs), packed, given)[0], torch.cat(given))


def test_slices_twice_differentiated_and_batched():
    packed = normal((2, 3, 4, 2), torch.float64, seed=0).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: tuple(s.square() for s in contract.slices(t, (1, 3), 2)), (packed,))
    outputs = contract.slices(packed, (1, 3), 2)
    given = [normal((5, *y.shape), torch.float64, seed=i) for i, y in enumerate(outputs)]
    got = torch.autograd.grad(outputs, packed, given, is_grads_batched=True)[0]
    same(got, torch.cat(given, 3))
