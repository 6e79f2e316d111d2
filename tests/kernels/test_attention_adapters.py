"""The adapters to cuDNN's and FlashAttention's kernels: what they refuse and why, and on the card the same numbers as ours."""

import contextlib
import importlib
import sys
import types

import pytest
import torch

from trinix.dispatch import Unsupported
from trinix.kernels.cudnn import attention as cudnn
from trinix.kernels.flash_attn import attention as flash
from trinix.kernels.torch import attention as reference
from trinix.ops import attention
from trinix.ops.attention import Options
from trinix.testing import assert_within_budget, judge, normal

BACKENDS = ("cudnn", "flash_attn")
contract = importlib.import_module("trinix.ops.attention")


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_gpu_both_are_refused(backend):
    q = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(Unsupported, match="needs tensors on an NVIDIA GPU, got cpu"):
        attention(q, q, q, backend=backend)


# ---- FlashAttention's packages, of which none is here: their halves, from what their sources say about them ----------------


def _formula(q, k, v, scale, left, right, softcap=0.0, slopes=None, ends_q=None, ends_k=None):
    sides = (-1 if side is None else side for side in (left, right))
    options = Options(right == 0, *sides, scale, softcap, alibi_slopes=slopes, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k)
    return reference.forward(q, k, v, options)


def _two_and_three(kind, calls):
    """FlashAttention 2's and 3's halves: -1 is no bound, rows that see nothing have lse inf."""

    def run(q, k, v, softmax_scale, causal, left, right, softcap, slopes=None, ends_q=None, ends_k=None):
        out, lse = _formula(q, k, v, softmax_scale, left, 0 if causal else right, softcap, slopes, ends_q, ends_k)
        return out, lse.masked_fill(lse == float("-inf"), float("inf"))

    def grads_of(dout, q, k, v, out, lse, dq, dk, dv, *call):
        assert not (lse == float("-inf")).any()
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            results = run(*leaves, *call)
        # delta is made of the out that is given: p (dout v^T - delta) differs by p times this from what autograd makes
        more = ((results[0].detach() - out).to(lse.dtype) * dout).sum(-1).transpose(-1, -2)
        for into, grad in zip((dq, dk, dv), torch.autograd.grad(results, leaves, (dout, more)), strict=True):
            into.copy_(grad)

    module = types.ModuleType(kind)
    if kind == "flash_attn_interface":

        def _flash_attn_forward(
            q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, *, softmax_scale, causal,
            window_size_left, window_size_right, softcap,
        ):  # fmt: skip
            calls.append("forward")
            ends = cu_seqlens_q, cu_seqlens_k
            sides = window_size_left, window_size_right
            return *run(q, k, v, softmax_scale, causal, *sides, softcap, None, *ends), None, None

        def _flash_attn_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, *,
            dq, dk, dv, softmax_scale, is_causal, window_size_left, window_size_right, softcap, deterministic,
        ):  # fmt: skip
            calls.append("backward")
            sides = window_size_left, window_size_right
            call = softmax_scale, is_causal, *sides, softcap, None, cu_seqlens_q, cu_seqlens_k
            grads_of(dout, q, k, v, out, softmax_lse, dq, dk, dv, *call)

    else:

        def _flash_attn_forward(
            q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
            return_softmax, ends=(),
        ):  # fmt: skip
            calls.append("forward")
            sides = window_size_left, window_size_right
            return *run(q, k, v, softmax_scale, causal, *sides, softcap, alibi_slopes, *ends), None, None

        def _flash_attn_backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
            window_size_right, softcap, alibi_slopes, deterministic, rng_state=None, ends=(),
        ):  # fmt: skip
            calls.append("backward")
            sides = window_size_left, window_size_right
            call = softmax_scale, causal, *sides, softcap, alibi_slopes, *ends
            grads_of(dout, q, k, v, out, softmax_lse, dq, dk, dv, *call)

        def _flash_attn_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *rest, **named):
            return _flash_attn_forward(q, k, v, *rest, **named, ends=(cu_seqlens_q, cu_seqlens_k))

        def _flash_attn_varlen_backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **named
        ):
            ends = cu_seqlens_q, cu_seqlens_k
            return _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, **named, ends=ends)

        module._flash_attn_varlen_forward = _flash_attn_varlen_forward
        module._flash_attn_varlen_backward = _flash_attn_varlen_backward
    module._flash_attn_forward, module._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    return module


def _four(kind, calls):
    """FlashAttention 4's halves: None is no bound, lse -inf, a gradient of lse is taken."""
    module = types.ModuleType(kind)

    def run(q, k, v, softmax_scale, causal, left, right, ends_q, ends_k):
        return _formula(q, k, v, softmax_scale, left, 0 if causal else right, ends_q=ends_q, ends_k=ends_k)

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
        causal=False, window_size_left=None, window_size_right=None, return_lse=False,
    ):  # fmt: skip
        calls.append("forward")
        sides = window_size_left, window_size_right
        out, lse = run(q, k, v, softmax_scale, causal, *sides, cu_seqlens_q, cu_seqlens_k)
        return out, lse if return_lse else None, None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        deterministic=False, dlse=None,
    ):  # fmt: skip
        calls.append("backward")
        sides = window_size_left, window_size_right
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            y = run(*leaves, softmax_scale, causal, *sides, cu_seqlens_q, cu_seqlens_k)
        given = [dout] if dlse is None else [dout, dlse]
        return torch.autograd.grad(y[: len(given)], leaves, given)

    module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    return module


@pytest.fixture(params=[2, 3, 4])
def package(request, monkeypatch):
    """A stand-in for one package, on a card that is not there."""
    name = f"FlashAttention {request.param}"
    path = flash._PACKAGES[name][0]
    calls = []
    module = (_four if request.param == 4 else _two_and_three)(path, calls)
    parts = path.split(".")
    for n in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(parts[n - 1]))
    monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    flash._module.cache_clear()
    yield name, calls
    flash._module.cache_clear()


SHAPES = {
    "full": {},
    "causal": {"window_right": 0},
    "fewer keys than queries": {"window_right": 0, "sk": 5},
    "more keys than queries": {"window_right": 0, "sk": 12},
    "window": {"window_left": 3, "window_right": 1},
    "softcap": {"softcap": 2.0},
    "lengths": {"lengths": True, "window_right": 0},
}


def test_lse_is_asked_for_where_somebody_wants_it(monkeypatch):
    """FlashAttention 4's kernel that stores it is the slower one (AC-mla-192-full: 263 us for 240)."""
    asked = []
    monkeypatch.setattr(flash, "forward", lambda q, k, v, options: asked.append("both") or (v, v[..., 0]))
    monkeypatch.setattr(flash, "output", lambda q, k, v, options: asked.append("output") or v)
    monkeypatch.setattr(contract, "pick", lambda *call: ("flash_attn", "flash_attn"))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    q = normal((1, 4, 2, 8), torch.float16, seed=1)
    contract.attention(q, q, q)
    contract.attention(q, q, q, return_lse=True)
    contract.attention(q.clone().requires_grad_(), q, q)
    assert asked == ["output", "both", "both"]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_package_is_called_as_it_wants(shape, package):
    name, calls = package
    asked = dict(SHAPES[shape])
    sk, varlen = asked.pop("sk", 8), asked.pop("lengths", False)
    q, k, v = (normal((2, n, h, 32), torch.float32, seed=n + h) for n, h in ((8, 4), (sk, 2), (sk, 2)))
    if varlen:  # 14 of 16 rows of queries belong to somebody
        ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 5, 5, 14], [0, 4, 8, 16]))
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        asked |= {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, "max_seqlen_q": 9, "max_seqlen_k": 8}
    options = Options(causal=asked.get("window_right") == 0, scale=0.3, **asked)
    if "4" in name and options.softcap:
        for backward in (False, True):
            runs, reasons = flash._names(q, k, v, options, backward)
            assert runs is None
            assert reasons[name] == "does not take softcap here"
        return
    assert flash._names(q, k, v, options, True)[0] == name
    assert flash.describe(q, k, v, options, True) == name
    leaves = [t.requires_grad_() for t in (q, k, v)]
    wanted = reference.forward(*leaves, options)
    with torch.no_grad():
        got = flash.forward(q, k, v, options)
        assert torch.equal(flash.output(q, k, v, options), got[0])
    torch.testing.assert_close(got, tuple(t.detach() for t in wanted))
    dout, dlse = (normal(t.shape, torch.float32, seed=9) for t in wanted)
    for with_lse in (False, True):
        given = [dout, dlse][: 1 + with_lse]
        true = torch.autograd.grad(wanted[: 1 + with_lse], leaves, given, retain_graph=True)
        with torch.no_grad():
            grads = flash.backward(dout, dlse if with_lse else None, q, k, v, *got, options, (True,) * 3)
        torch.testing.assert_close(grads[:3], true)
        assert grads[3:] == (None, None)
    assert set(calls) == {"forward", "backward"}
    with torch.no_grad():
        some = flash.backward(dout, None, q, k, v, *got, options, (False, True, False))
    assert [g is None for g in some] == [True, False, True, True, True]


def test_each_package_runs_with_its_tensors_card_as_the_current_one(package, monkeypatch):
    _, calls = package

    @contextlib.contextmanager
    def switch(index):
        calls.append(index)
        yield
        calls.append("back")

    monkeypatch.setattr(torch.cuda, "device", switch)
    q = normal((1, 4, 1, 32), torch.float32, seed=1)
    options = Options(scale=0.3)
    out, lse = flash.forward(q, q, q, options)
    flash.backward(out, None, q, q, q, out, lse, options, (True,) * 3)
    card = q.get_device()
    assert calls == [card, "forward", "back", card, "backward", "back"]


@pytest.mark.parametrize("takes", [True, False])
def test_cudnn_is_asked_on_its_tensors_card(takes, monkeypatch):
    """And no filter of warnings, which are the whole process's, is changed for a call that it takes."""
    asked, inside = [], []

    @contextlib.contextmanager
    def within(place):
        inside.append(place)
        yield []
        inside.pop()

    def can_use(parameters, debug=False):
        asked.append((debug, *inside))
        return takes

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device", within)
    monkeypatch.setattr(cudnn.switches, "SDPAParams", lambda *parameters: parameters)
    monkeypatch.setattr(cudnn.switches, "can_use_cudnn_attention", can_use)
    monkeypatch.setattr(cudnn, "_heads_first", lambda *tensors: tensors)
    q = types.SimpleNamespace(
        device=torch.device("cuda", 1), dtype=torch.float16, shape=(1, 128, 2, 64), data_ptr=lambda: 256,
        stride=lambda *at: 1 if at else (16384, 128, 64, 1), get_device=lambda: 1,
    )  # fmt: skip
    if takes:
        filters = types.SimpleNamespace(catch_warnings=lambda record: within("filters"))
        monkeypatch.setattr(cudnn, "warnings", filters)
    reason = cudnn.unsupported(q, q, q, Options(scale=1.0), False)
    assert asked == ([(False, 1)] if takes else [(False, 1), (True, 1)])
    assert reason is None if takes else reason.startswith("is refused by PyTorch: ")


@pytest.mark.parametrize("package", [2, 3], indirect=True)  # 4 takes no softcap
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_has_a_gradient_through_lse_with_softcap(dtype, package, monkeypatch):
    for module in ("hopper", "cudnn"):
        monkeypatch.setattr(contract.BACKENDS[module](), "unsupported", lambda *call: "is not here")
    monkeypatch.setattr(flash, "unsupported", lambda *call: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(contract, "_picked", {})
    tensors = [normal((2, 24, heads, 16), dtype, seed=heads + i) for i, heads in enumerate((4, 2, 2))]
    dout, dlse = normal((2, 24, 4, 16), dtype, seed=9), normal((2, 4, 24), torch.float32, seed=10)

    def run(wide, backend):
        leaves = [t.to(wide).requires_grad_() for t in tensors]
        out, lse = attention(*leaves, causal=True, softcap=2.0, return_lse=True, backend=backend)
        return out.detach(), *torch.autograd.grad((out, lse), leaves, (dout.to(wide), dlse.to(lse.dtype)))

    got = run(dtype, "auto")
    assert set(package[1]) == {"forward", "backward"}
    assert_within_budget(got, run(dtype, "torch"), run(torch.float64, "torch"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_of_lse_s_gradient_nothing_is_rounded_away(dtype, package, monkeypatch):
    if "4" in package[0]:
        pytest.skip("it takes one")
    given = {}
    monkeypatch.setattr(flash, "_backward", lambda _, dout, q, k, v, *more: given.update(dout=dout, v=v) or (dout,) * 3)
    q = torch.zeros(1, 300, 1, 8, dtype=dtype)
    dlse = normal((1, 1, 300), torch.float32, seed=1) * torch.logspace(-6, 6, 300)  # float16 ends at 65504
    flash.backward(q, dlse, q, q, q, q, dlse, Options(scale=1.0, softcap=3.0), (True,) * 3)
    made = (given["dout"].float() * given["v"].float()).sum(-1)
    torch.testing.assert_close(made, dlse.mT, rtol=2**-16, atol=2**-28)


def test_rows_of_a_gradient_that_lie_askew_are_copied(package, monkeypatch):
    given = []
    monkeypatch.setattr(flash, "_backward", lambda name, dout, *_: given.append(dout) or (dout,) * 3)
    q, lse = torch.zeros(1, 4, 1, 8), torch.zeros(1, 1, 4)
    for dout in (torch.randn(1, 4, 1, 9)[..., :8], torch.randn(40)[1:33].view(q.shape), torch.randn(8).expand(q.shape)):
        flash.backward(dout, None, q, q, q, q, lse, Options(scale=1.0), (True,) * 3)
        assert flash._rows_are_aligned(given[-1])
        assert 0 not in given[-1].stride()
        torch.testing.assert_close(given[-1], dout)


def test_grouped_heads_of_two_head_dimensions_have_no_backward_in_4_on_hopper(package):
    q, k, v = (torch.zeros(1, 4, heads, d) for heads, d in ((4, 64), (2, 64), (2, 32)))
    if "4" not in package[0]:
        pytest.skip("takes one head dimension")
    options = Options(scale=1.0)
    assert flash._names(q, k, v, options, False)[0] == package[0]
    assert flash._names(q, k[:, :, :1].expand_as(q), v[:, :, :1].expand(1, 4, 4, 32), options, True)[0] == package[0]
    assert "no backward of grouped heads" in flash._names(q, k, v, options, True)[1][package[0]]


@pytest.mark.parametrize("package", [4], indirect=True)
@pytest.mark.parametrize(
    ("d", "dv"), [(8, 8), (16, 16), (40, 40), (80, 80), (64, 80), (136, 128), (24, 24), (64, 64), (96, 96)]
)
def test_4_has_no_backward_of_head_dimensions_that_it_gets_wrong(d, dv, package):
    """4.0.0b36 on an H100: 19 of its 60 random calls, of 16, 40, 72 and 80 channels; none of 32, 64, 96 and more."""
    q, v = torch.zeros(1, 4, 2, d), torch.zeros(1, 4, 2, dv)
    options = Options(scale=1.0)
    assert flash._names(q, q, v, options, False)[0] == package[0]
    name, reasons = flash._names(q, q, v, options, True)
    wrong = any(n % 32 in (8, 16) for n in (d, dv))
    assert name == (None if wrong else package[0])
    assert not wrong or "has wrong gradients" in reasons[package[0]]
    assert flash.fa4_can_run(q, q, v, options, True) is not wrong


FA4_FIRST = {"plain": {}, "causal": {"causal": True, "window_right": 0}}
FA4_LATER = {  # was slower, was not timed, or cannot run
    "grouped heads": {"key_heads": 4},
    "window": {"window_left": 512, "window_right": 0, "causal": True}, "softcap": {"softcap": 20.0},
    "slopes": {"alibi_slopes": torch.ones(16)}, "the same bits": {"deterministic": True},
    "lengths": {"cu_seqlens_q": torch.tensor([0, 9, 16384], dtype=torch.int32), "max_seqlen_k": 16375},
    "two dimensions of grouped heads": {"key_heads": 4, "dv": 32}, "a short call": {"length": 64},
}  # fmt: skip


@pytest.mark.parametrize("asked", FA4_FIRST | FA4_LATER)
def test_4_goes_first_on_hopper_only_where_it_was_faster_and_can_run(asked, package, monkeypatch):
    """Another package may take the call, and is not asked before our own kernels."""
    for module in ("flash_attn", "hopper", "cudnn"):
        monkeypatch.setattr(contract.BACKENDS[module](), "unsupported", lambda *call: None)
    options = (FA4_FIRST | FA4_LATER)[asked].copy()
    heads, dv, length = options.pop("key_heads", 16), options.pop("dv", 64), options.pop("length", 16384)
    shapes = [(1, length, 16, 64), (1, length, heads, 64), (1, length, heads, dv)]
    tensors = [torch.empty(shape[1 if asked == "lengths" else 0 :], device="meta") for shape in shapes]
    first = contract._first(*tensors, Options(**({"scale": 1.0} | options)), True, {})
    assert first == ("flash_attn" if "4" in package[0] and asked in FA4_FIRST else "hopper")


def test_only_a_scale_above_zero_is_taken(package):
    q = torch.zeros(1, 4, 1, 8)
    name, reasons = flash._names(q, q, q, Options(scale=-1.0), False)
    assert name is None
    assert reasons[package[0]] == "does not take a scale below 2**-126 here"


def test_a_package_of_another_version_is_passed_over(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("flash_attn_interface"))
    flash._module.cache_clear()
    assert flash._module("FlashAttention 3") == "is of another version: flash_attn_interface has no _flash_attn_forward"
    flash._module.cache_clear()


@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_s_gradients_through_lse(causal, monkeypatch):
    monkeypatch.setattr(cudnn, "ROWS", 3)
    q, k, v = (normal((2, 8, h, 16), torch.float32, seed=h).requires_grad_() for h in (4, 2, 2))
    options = Options(scale=0.3, window_right=0 if causal else -1)
    _, lse = reference.forward(q, k, v, options)
    dlse = normal(lse.shape, torch.float32, seed=9)
    wanted = torch.autograd.grad(lse, (q, k), dlse)
    with torch.no_grad():
        torch.testing.assert_close(cudnn.through_lse(dlse, q, k, lse, 0.3, causal), wanted)


# ---- on the card -------------------------------------------------------------------------------------------------------

CARD = {
    "full": {},
    "causal": {"causal": True},
    "grouped heads": {"heads": 8, "key_heads": 2, "causal": True},
    "one query": {"sq": 1, "causal": True, "heads": 32, "key_heads": 32},  # of 8 numbers chance decides
    "odd lengths": {"sq": 333, "sk": 333},
    "keys of another length": {"sq": 100, "sk": 257},
    "head dimension 64": {"d": 64},
    "head dimension 256": {"d": 256, "causal": True},
    "head dimension 72": {"d": 72},
    "scale": {"scale": 0.3},
    "fewer keys than queries": {"sq": 200, "sk": 77, "causal": True},
    "causal, more keys": {"sq": 100, "sk": 257, "causal": True},
    "window": {"window": (50, 20), "sq": 300, "sk": 300},
    "two dimensions": {"d": 128, "dv": 64},
    "lengths": {"ends": ([0, 100, 100, 256], [0, 30, 60, 250])},
    "lengths, causal": {"ends": ([0, 100, 100, 256], [0, 30, 60, 250]), "causal": True},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CARD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_both_passes_hold_the_budget_or_say_why_not(backend, case, dtype, monkeypatch):
    monkeypatch.setattr(flash, "_BUILT_IN_ON", (8, 9))
    asked = dict(CARD[case])
    sq, sk, d = asked.pop("sq", 256), asked.pop("sk", 256), asked.pop("d", 128)
    heads, key_heads, dv = asked.pop("heads", 4), asked.pop("key_heads", 4), asked.pop("dv", d)
    shapes = ((2, sq, heads, d), (2, sk, key_heads, d), (2, sk, key_heads, dv))
    q, k, v = (normal(s, dtype, seed=i, device="cuda") for i, s in enumerate(shapes))
    if ends := asked.pop("ends", None):
        q, k, v = q[0], k[0], v[0]
        ends = [torch.tensor(e, dtype=torch.int32, device="cuda") for e in ends]
        asked |= {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}

    def run(backend, wide):
        leaves = [t.to(wide).requires_grad_() for t in (q, k, v)]
        y = attention(*leaves, **asked, return_lse=True, backend=backend)
        gradients = [normal(t.shape, dtype, seed=7, device="cuda").to(t.dtype) for t in y]
        dlse = gradients[1].masked_fill(y[1] == float("-inf"), 0)
        gradients[0] = gradients[0].transpose(0, 1).contiguous().transpose(0, 1)  # of other strides than out
        without = torch.autograd.grad(y[0], leaves, gradients[0], retain_graph=True)
        return *(t.detach() for t in y), *without, *torch.autograd.grad(y, leaves, [gradients[0], dlse])

    try:
        got = run(backend, dtype)
    except Unsupported as error:
        pytest.skip(str(error))
    names = ("out", "lse", "dq", "dk", "dv", "dq with dlse", "dk with dlse", "dv with dlse")
    verdicts = [judge(*one) for one in zip(names, got, run("torch", dtype), run("torch", torch.float64), strict=True)]
    assert not [str(v) for v in verdicts if not v.ok]


@pytest.mark.gpu
def test_what_the_card_s_own_kernels_take(monkeypatch):
    monkeypatch.setattr(flash, "_BUILT_IN_ON", (8, 9))
    q = torch.zeros(1, 128, 2, 64, dtype=torch.bfloat16, device="cuda")
    options = Options(scale=1.0)
    if torch.cuda.get_device_capability()[0] == 9:
        assert cudnn.unsupported(q, q, q, options, True) is None
    assert flash.unsupported(q, q, q, options, True) is None
    assert "does not take a sink" in cudnn.unsupported(q, q, q, options._replace(sink=q[0, 0, :, 0]), False)
    assert "takes float16 and bfloat16" in flash.unsupported(q.float(), q.float(), q.float(), options, False)
