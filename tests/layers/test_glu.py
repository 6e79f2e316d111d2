"""GLU modules: projections and activation against a float64 twin of plain linears, checkpoints, and what modules must survive."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import trinix
from trinix.testing import assert_within_budget, normal, vjp

GATES = {"FastSwiGLU": F.silu, "FastGeGLU": F.gelu, "FastReGLU": F.relu}
FORMS = {"projections": {}, "no bias": {"bias": False}, "whole block": {"output_dim": 5}}


def tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


def filled(module, scale=0.5):
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(parameter.shape, parameter.dtype, seed=7 + i, device=parameter.device, scale=scale))
    return module


def twin(gate, hidden):
    """The block of plain operations, on (x, the module's parameters in their order)."""

    def call(x, weight, *rest):
        bias, *down = rest if len(rest) in (1, 3) else (None, *rest)
        g, u = F.linear(x, weight, bias).split(hidden, -1)
        y = gate(g) * u
        return F.linear(y, *down) if down else y

    return call


def called(module):
    """The module as a function of x and its parameters."""
    names = [name for name, _ in module.named_parameters()]
    return lambda x, *p: torch.func.functional_call(module, dict(zip(names, p, strict=True)), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_triton", [None, False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GATES)
def test_output_and_every_gradient_are_those_of_plain_linears(name, form, use_triton, dtype, device):
    module = getattr(trinix, name)(6, 7, use_triton=use_triton, device=device, dtype=dtype, **FORMS[form])
    parameters = [p.detach() for p in filled(module).parameters()]
    x = normal((2, 3, 6), dtype, seed=1, device=device)
    plain = twin(GATES[name], 7)
    dy = normal((2, 3, 5 if "output_dim" in FORMS[form] else 7), dtype, seed=2, device=device)
    got = vjp(called(module), [x, *parameters], dy)
    low = vjp(plain, [x, *parameters], dy)
    true = vjp(plain, [t.double() for t in (x, *parameters)], dy.double())
    assert_within_budget(got, low, true)


def test_geglu_has_the_tanh_form_too():
    module = filled(trinix.FastGeGLU(6, 7, approximate="tanh"))
    x = normal((4, 6), torch.float32, seed=1)
    torch.testing.assert_close(module(x), twin(tanh_gelu, 7)(x, *module.parameters()))
    assert "approximate='tanh'" in repr(module)
    assert copy.deepcopy(module).kind == "geglu_tanh"


def test_the_recipes_of_the_document_run_as_printed():
    from trinix import FastGeGLU, FastReGLU, FastSwiGLU

    with torch.device("meta"):
        for activation, width, hidden in [
            (
                FastSwiGLU(
                    input_dim=4096,
                    hidden_dim=11008,  # Typical 2.7x expansion
                    bias=False,
                    use_triton=True,  # Expected 1.7x speedup
                ),
                4096,
                11008,
            ),
            (FastGeGLU(input_dim=768, hidden_dim=3072, use_triton=True), 768, 3072),
            (FastReGLU(input_dim=2048, hidden_dim=8192, use_triton=True), 2048, 8192),
        ]:
            assert activation(torch.empty(2, 3, width)).shape == (2, 3, hidden)
    activation = FastGeGLU(input_dim=768, hidden_dim=3072, use_triton=True)
    assert activation(torch.randn(1, 2, 768)).shape == (1, 2, 3072)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("names", "keys"), [("llama", ("gate_proj", "up_proj", "down_proj")), ("t5", ("wi_0", "wi_1", "wo"))]
)
def test_a_checkpoint_comes_in_and_goes_out_under_its_own_names(names, keys, whole, bias):
    sizes = [(6, 7), (6, 7), *([(7, 6)] if whole else [])]
    theirs = filled(nn.ModuleDict({k: nn.Linear(*s, bias=bias) for k, s in zip(keys, sizes, strict=False)}))
    state = {f"mlp.{k}": v for k, v in theirs.state_dict().items()} | {"norm.weight": torch.ones(6)}
    module = trinix.FastSwiGLU.from_checkpoint(state, names, prefix="mlp.", use_triton=False)
    assert (module.input_dim, module.hidden_dim, module.output_dim) == (6, 7, 6 if whole else None)
    x = normal((4, 6), torch.float32, seed=1)
    wanted = F.silu(theirs[keys[0]](x)) * theirs[keys[1]](x)
    torch.testing.assert_close(module(x), theirs[keys[2]](wanted) if whole else wanted)
    torch.testing.assert_close(
        module.checkpoint(names, "mlp."), {k: v for k, v in state.items() if "mlp" in k}, rtol=0, atol=0
    )
    back = nn.ModuleDict({k: nn.Linear(*s, bias=bias) for k, s in zip(keys, sizes, strict=False)})
    back.load_state_dict(module.checkpoint(names))


def test_a_checkpoint_holds_detached_views_and_its_module_may_have_another_dtype():
    module = trinix.FastSwiGLU(4, 6, 5)
    state = module.checkpoint()
    assert not any(t.requires_grad for t in state.values())
    found = {t.untyped_storage().data_ptr() for t in state.values()}
    assert found == {p.untyped_storage().data_ptr() for p in module.parameters()}
    made = trinix.FastSwiGLU.from_checkpoint(state, dtype=torch.float64)
    assert {p.dtype for p in made.parameters()} == {torch.float64}


def test_a_checkpoint_is_not_written_into_a_weight_that_is_made_of_others():
    layer = trinix.FastSwiGLU(8, 6, 8)
    state = layer.checkpoint()
    for change in (
        torch.nn.utils.parametrizations.weight_norm,
        lambda proj: prune.random_unstructured(proj, "weight", 0.5),
    ):
        for name in ("gate_up_proj", "down_proj"):
            changed = trinix.FastSwiGLU(8, 6, 8)
            change(getattr(changed, name))
            with pytest.raises(
                ValueError, match=r"FastSwiGLU: load_checkpoint writes parameters, and a \w+ makes its weight"
            ):
                changed.load_checkpoint(state)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name():
    module = trinix.FastSwiGLU(6, 7)
    state = module.checkpoint()
    with pytest.raises(ValueError, match=r"wanted \['gate_proj.bias', .*check names, prefix, bias and output_dim"):
        module.load_checkpoint({k: v for k, v in state.items() if "bias" not in k})
    with pytest.raises(ValueError, match=r"got \['down_proj.weight', "):
        module.load_checkpoint(state | {"down_proj.weight": torch.ones(6, 7)})
    with pytest.raises(ValueError, match=r"up_proj.weight must be \[7, 6\], got \[1, 6\]"):
        module.load_checkpoint(state | {"gate_proj.weight": torch.ones(7, 6), "up_proj.weight": torch.ones(1, 6)})
    assert not bool((state["gate_proj.weight"] == 1).any())  # all of it or nothing
    with pytest.raises(ValueError, match=r"names must be one of \['llama', 't5'\], got 'gpt'"):
        module.load_checkpoint(state, "gpt")
    with pytest.raises(
        ValueError, match=r"wants a module with memory for gate_proj.weight, got one on the meta device"
    ):
        trinix.FastSwiGLU(6, 7, device="meta").load_checkpoint(state)
    with pytest.raises(ValueError, match=r"found no mlp\.gate_proj\.weight"):
        trinix.FastSwiGLU.from_checkpoint(state, prefix="mlp.")
    with pytest.raises(TypeError, match=r"FastSwiGLU: load_checkpoint wants state as a dict .*got FastSwiGLU"):
        module.load_checkpoint(module)
    with pytest.raises(ValueError, match=r"gate_proj\.weight must be \[hidden_dim, input_dim\], got \[42\]"):
        trinix.FastSwiGLU.from_checkpoint({k: t.flatten() for k, t in state.items()})
    for dtype in (torch.float8_e4m3fn, torch.int8):  # codes, which mean nothing without their scales
        codes = state | {"up_proj.weight": state["up_proj.weight"].to(dtype)}
        for load in (module.load_checkpoint, trinix.FastSwiGLU.from_checkpoint):
            with pytest.raises(TypeError, match=rf"FastSwiGLU: a checkpoint's up_proj\.weight must be .*got {dtype}"):
                load(codes)


@pytest.mark.parametrize("name", GATES)
def test_a_module_survives_copying_pickling_loading_and_the_meta_device(name):
    module = filled(getattr(trinix, name)(6, 7, 5))
    x = normal((4, 6), torch.float32, seed=1)
    loaded = getattr(trinix, name)(6, 7, 5, device="meta").to_empty(device="cpu")
    loaded.load_state_dict(module.state_dict())
    for one in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        torch.testing.assert_close(one(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", GATES)
def test_it_compiles_whole_with_the_same_gradients(name, fresh_dynamo, device):
    module = filled(getattr(trinix, name)(6, 7, 5)).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = normal((4, 6), torch.float32, seed=1, device=device)
    grads = [torch.autograd.grad(one(x).square().sum(), list(module.parameters())) for one in (compiled, module)]
    torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", GATES)
def test_two_traces_of_it_are_one_graph(name, device):
    module, x = (
        filled(getattr(trinix, name)(6, 7, 5, device=device)),
        normal((3, 6), torch.float32, seed=1, device=device),
    )
    torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))  # trace compares a second one


@pytest.mark.parametrize("name", GATES)
def test_autocast_gives_the_lower_dtype_and_full_gradients(name, device):
    module = filled(getattr(trinix, name)(6, 7, 5)).to(device)
    with torch.autocast(device, torch.bfloat16):
        y = module(normal((4, 6), torch.float32, seed=1, device=device))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


# ---- the bias whose gradient the activation's kernel sums ---------------------------------------------------------------


@pytest.fixture
def sums(monkeypatch):
    """How often a bias's gradient came out of the activation's kernel."""
    from trinix.kernels.triton import glu as kernels

    seen = []
    run = kernels.backward_sums
    monkeypatch.setattr(kernels, "backward_sums", lambda *a: seen.append(a[-1]) or run(*a))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GATES)
def test_the_kernels_sum_the_bias_gradient_and_all_gradients_hold_the_budget(name, dtype, device, sums):
    module = filled(getattr(trinix, name)(40, 72, use_triton=True, device=device, dtype=dtype))
    parameters = [p.detach() for p in module.parameters()]
    x, dy = normal((2, 33, 40), dtype, seed=1, device=device), normal((2, 33, 72), dtype, seed=2, device=device)
    got = vjp(called(module), [x, *parameters], dy)
    assert sums == [True]
    plain = twin(GATES[name], 72)
    low = vjp(plain, [x, *parameters], dy)
    assert_within_budget(got, low, vjp(plain, [t.double() for t in (x, *parameters)], dy.double()))


def _weights_alone(module, x):
    module.gate_up_proj.bias.requires_grad_(False)
    return module, x


def _hooked(module, x):
    module.gate_up_proj.register_forward_hook(lambda _, __, y: 2 * y)
    return module, x


def _other_class(module, x):
    proj = nn.Linear(40, 144, device=x.device)
    proj.load_state_dict(module.gate_up_proj.state_dict())
    module.gate_up_proj = proj
    return module, x


class _Wrapped(nn.Module):
    """What says nothing of its widths, as a LoRA of one's own."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return 2 * self.base(x)


def _wrapped(module, x):
    module.gate_up_proj = _Wrapped(module.gate_up_proj)
    return module, x


def _own_forward(module, x):
    forward = module.gate_up_proj.forward
    module.gate_up_proj.forward = lambda x: 3 * forward(x)
    return module, x


def _one_bias_for_all(module, x):
    module.gate_up_proj.bias = nn.Parameter(module.gate_up_proj.bias.detach()[:1].clone())
    return module, x


@pytest.mark.parametrize("change", [_one_bias_for_all, _weights_alone, _hooked, _other_class, _wrapped, _own_forward])
def test_a_projection_that_does_more_or_learns_no_bias_is_called_as_it_is(change, device, sums):
    module = filled(trinix.FastSwiGLU(40, 72, use_triton=True, device=device))
    module, x = change(module, normal((5, 40), torch.float32, seed=1, device=device))
    g, u = module.gate_up_proj(x).chunk(2, -1)
    y = module(x)
    torch.testing.assert_close(y, F.silu(g) * u)
    y.sum().backward()
    assert not sums
    assert module.gate_up_proj.weight.grad is not None


def test_only_a_wanted_bias_gradient_leaves_the_product(device, sums):
    module = filled(trinix.FastSwiGLU(40, 72, use_triton=True, device=device))
    x = normal((5, 40), torch.float32, seed=1, device=device)
    kept = module(x)
    with torch.no_grad():
        torch.testing.assert_close(module(x), kept)
    module.gate_up_proj.weight.requires_grad_(False)
    module(x).sum().backward()
    assert sums == [False]
    with trinix.use_backend("torch"):
        filled(trinix.FastSwiGLU(40, 72, device=device))(x).sum().backward()
    assert len(sums) == 1


def test_autocast_gives_the_bias_a_full_gradient_through_the_kernels(device, sums):
    module = filled(trinix.FastSwiGLU(40, 72, use_triton=True, device=device))
    x, dy = (
        normal((33, 40), torch.float32, seed=1, device=device),
        normal((33, 72), torch.bfloat16, seed=2, device=device),
    )
    grads = []
    for use_triton in (True, False):
        module.use_triton = use_triton
        with torch.autocast(device, torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        grads.append(torch.autograd.grad(y, list(module.parameters()), dy))
    assert sums == [True]
    assert all(g.dtype == torch.float32 for g in grads[0])
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.2)


def test_a_gradient_penalty_through_the_bias_is_pytorchs(device, sums):
    results = []
    for use_triton in (True, False):
        module = filled(trinix.FastSwiGLU(6, 7, use_triton=use_triton, device=device))
        x = normal((4, 6), torch.float32, seed=1, device=device).requires_grad_()
        grads = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()], create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        results.append(torch.autograd.grad(penalty, [x, *module.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-3)
    assert len(sums) == 1  # of the penalty's own way through y


def test_no_row_at_all_gives_zero_gradients(device):
    module = trinix.FastReGLU(6, 7, use_triton=True, device=device)
    module(torch.empty(0, 6, device=device)).sum().backward()
    assert not any(p.grad.any() for p in module.parameters())


@pytest.mark.gpu
def test_auto_sums_the_bias_gradient_on_the_card(sums):
    module = trinix.FastReGLU(64, 96, device="cuda", dtype=torch.bfloat16)
    module(torch.ones(4, 64, device="cuda", dtype=torch.bfloat16)).sum().backward()
    assert sums == [True]


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="FastReGLU: hidden_dim must be an int from 1 on, got 0"):
        trinix.FastReGLU(6, 0)
    with pytest.raises(ValueError, match="output_dim must be an int from 1 on, got False; bias goes by name"):
        trinix.FastSwiGLU(6, 7, False)
    for chosen in (True, False):
        with pytest.raises(ValueError, match="both choose"):
            trinix.FastSwiGLU(6, 7, use_triton=chosen, backend="torch")
    with pytest.raises(ValueError, match="approximate must be"):
        trinix.FastGeGLU(6, 7, approximate="erf")
    with pytest.raises(ValueError, match="FastSwiGLU: backend must be one of"):
        trinix.FastSwiGLU(6, 7, backend="cuda")
    with pytest.raises(ValueError, match=r"input_dim must be an int from 1 on, got \[6\]"):
        trinix.FastGeGLU([6], 7)
    for wrong in ("yes", 1, None):
        with pytest.raises(
            TypeError, match=f"^FastSwiGLU: bias must be True or False, got {wrong!r}; convert it with bool"
        ):
            trinix.FastSwiGLU(4, 8, bias=wrong)
    with pytest.raises(TypeError, match=r"^FastGeGLU: bias must be True or False, got 'yes'"):
        trinix.FastGeGLU(4, 8, 4, "yes")
    with pytest.raises(TypeError, match="FastReGLU: use_triton must be None, True or False, got 'no'"):
        trinix.FastReGLU(6, 7, use_triton="no")
    with pytest.raises(
        TypeError, match=r"^FastReGLU: there is no argument 'output'; known are \['input_dim', .*'dtype'\]"
    ):
        trinix.FastReGLU(6, 7, output=3)


def test_an_input_of_another_width_is_named():
    with pytest.raises(TypeError, match="FastSwiGLU: x must be a tensor, got list"):
        trinix.FastSwiGLU(16, 32)([1.0])
    with pytest.raises(ValueError, match=r"FastSwiGLU: x must be \[\.\.\., 16\], got \[2, 17\]; input_dim"):
        trinix.FastSwiGLU(16, 32)(torch.ones(2, 17))
    with pytest.raises(ValueError, match=r"FastSwiGLU: x must be \[\.\.\., 16\], got \[\]; input_dim"):
        trinix.FastSwiGLU(16, 32)(torch.ones(()))
