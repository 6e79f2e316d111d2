"""Every op on a second card while the first one is the current one: the same results there, and nothing left changed."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F

import trinix
from card_calls import CALLS
from helpers import captured, from_threads
from trinix import models, ops
from trinix.models.decoder import Block
from trinix.testing import normal

pytestmark = pytest.mark.gpu
CARDS = "cuda:0", "cuda:1"
CAPTURED = (
    "silu", "softmax, long columns", "softmax, rows in clusters", "softmax, columns on Hopper", "rms_norm, rows in clusters",
    "layer_norm_residual", "swiglu", "attention on Hopper, short", "attention on Hopper, drawn",
    "attention on Hopper, the same bits", "attention by Triton", "head_mlp on Hopper", "head_mlp by Triton",
)  # fmt: skip


@pytest.fixture(autouse=True)
def the_current_card_stays_the_first():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs a second CUDA GPU, this machine has {torch.cuda.device_count()}")
    assert torch.cuda.current_device() == 0
    yield
    assert torch.cuda.current_device() == 0


def alike() -> bool:
    return torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1)


def on_the_first(tensors):
    return tuple(t.to("cuda:0") for t in tensors)


@pytest.mark.parametrize("name", CALLS)
def test_both_cards_in_turn_give_the_same(name):
    if not alike():
        pytest.skip("cards of two kinds round in ways of their own")
    call = CALLS[name]
    runs = {card: call.prepared(card) for card in reversed(CARDS)}
    wanted = on_the_first(runs["cuda:0"]())
    for card in (*CARDS, *CARDS):
        got = runs[card]()
        assert torch.cuda.current_device() == 0
        assert {str(t.device) for t in got} == {card}
        call.check(on_the_first(got), wanted)


@pytest.mark.parametrize("name", CAPTURED)
def test_a_graph_of_the_second_card_replays_while_the_first_is_the_current_one(name):
    call = CALLS[name]
    captured(call.prepared("cuda:0"))  # PyTorch's own stream for captures would be of this card from now on
    run = call.prepared("cuda:1")
    wanted = [t.clone() for t in run()]
    graph, results = captured(run, "cuda:1")
    for _ in range(3):
        for t in results:
            t.zero_()
        graph.replay()
        call.check(results, wanted)


def test_the_second_cards_own_stream_is_used():
    """Also where it is not the default one, and the first card is the current one."""
    values = normal((4096, 768), torch.float32, seed=1).to("cuda:1")
    side = torch.cuda.Stream(1)
    for run in (
        lambda x: ops.silu(x, backend="triton"),
        lambda x: ops.softmax(x, backend="triton"),
        lambda x: ops.attention(*[x.view(2, 2048, 12, 64).bfloat16()] * 3, causal=True),
    ):
        wanted = run(values)
        x = torch.full_like(values, float("nan"))
        torch.cuda.synchronize(1)
        with torch.cuda.stream(side), torch.cuda.device(0):
            with torch.cuda.device(1):
                torch.cuda._sleep(100_000_000)
                x.copy_(values)
            got = run(x)
        side.synchronize()
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["silu", "attention on Hopper, drawn", "head_mlp on Hopper", "rms_norm, rows in clusters"]
)
def test_a_thread_for_each_card(name):
    call = CALLS[name]
    runs = [call.prepared(card) for card in CARDS]
    wanted = [run() for run in runs]
    for results in zip(*from_threads(*[lambda run=run: [run() for _ in range(10)] for run in runs]), strict=True):
        for got, one in zip(results, wanted, strict=True):
            call.check(got, one)


def test_a_thread_for_each_card_compiles_what_nobody_has_yet():
    def calls(card):
        gate, q = (normal(shape, torch.bfloat16, seed=1).to(card) for shape in ((64, 1000), (1, 200, 2, 64)))

        def run():
            return (
                ops.glu(gate, gate, "quick_geglu", backend="triton"),
                ops.attention(q, q, q, window=(37, 5), softcap=11.0),
                ops.softmax(q.float(), 1, scale=0.7, backend="triton"),
            )

        return run

    first, second = from_threads(*[calls(card) for card in CARDS])
    assert {str(t.device) for t in second} == {"cuda:1"}
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu())


def test_a_model_that_lies_on_both_cards_learns():
    """Autograd has a thread for each card, and goes from one to the other."""
    torch.manual_seed(0)
    block = Block(models.llama(dim=128, heads=2, kv_heads=2), device="cuda:0", dtype=torch.bfloat16)
    far = copy.deepcopy(block).to("cuda:1")
    x = normal((2, 300, 128), torch.bfloat16, seed=1).to("cuda:0")

    def gradients(second):
        card = next(second.parameters()).device
        x_, h = block(x, torch.zeros_like(x))
        x_, h = second(x_.to(card), h.to(card))
        parameters = [*block.parameters(), *second.parameters()]
        # the tail goes with the first card's
        return [
            g.to("cuda:0")
            for g in torch.autograd.grad((x_.float() + h.float()).square().mean().to("cuda:0"), parameters)
        ]

    near = gradients(copy.deepcopy(block))
    for got, wanted in zip(gradients(far), near, strict=True):
        rounding = torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(got, wanted, rtol=2 * rounding, atol=2 * rounding * float(wanted.abs().max()))


@pytest.mark.parametrize("shape", ["gpt", "llama", "deepseek"])
def test_dataparallel_learns_what_one_card_does(shape):
    torch.manual_seed(0)
    config = getattr(models, shape)(dim=128, heads=2, kv_heads=2, length=64 if shape == "gpt" else 16)
    model = models.Decoder(config, device="cuda:0")
    tokens = torch.randint(256, (4, 40), generator=torch.Generator().manual_seed(1)).to("cuda:0")
    results = []
    for call in (model, torch.nn.DataParallel(model, [0, 1])):
        for _ in range(2):
            model.zero_grad()
            loss = F.cross_entropy(call(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for got, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["static", "paged"])
@pytest.mark.parametrize("shape", ["gpt", "llama", "deepseek"])
def test_a_captured_step_of_a_model_on_the_second_card(shape, kind):
    torch.manual_seed(0)
    first = models.Decoder(getattr(models, shape)(dim=128, heads=2, kv_heads=2), device="cuda:0")
    second = copy.deepcopy(first).to("cuda:1")
    tokens = torch.randint(256, (2, 5), generator=torch.Generator().manual_seed(1))
    results = [
        model.generate(tokens.to(card), 20, kind=kind, graph=graph).cpu()
        for model, card, graph in ((first, *CARDS[:1], True), (second, *CARDS[1:], True), (second, *CARDS[1:], False))
    ]
    assert torch.equal(results[1], results[2])
    assert torch.equal(results[0], results[1])


# ---- tensors on two cards --------------------------------------------------------------------------------------------------

HEADS = (1, 8, 2, 64)


def _vector(n):
    return lambda card: torch.ones(n, device=card)


def _half(*shape):
    return lambda card: torch.ones(shape, dtype=torch.bfloat16, device=card)


# (op, tensors by name, other arguments): one after the other is put on the second card
SEVERAL = {
    "softmax": (ops.softmax, {"x": _half(4, 64), "mask": _half(4, 64)}, {}),
    "layer_norm": (ops.layer_norm, {"x": _half(4, 64), "weight": _vector(64), "bias": _vector(64)}, {"normalized_shape": 64}),
    "rms_norm_residual": (
        ops.rms_norm_residual, {"x": _half(4, 64), "residual": _half(4, 64), "weight": _vector(64)}, {"normalized_shape": 64},
    ),
    "glu": (ops.glu, {"gate": _half(4, 64), "up": _half(4, 64)}, {}),
    "rope": (ops.rope, {"q": _half(*HEADS), "k": _half(*HEADS), "cos": _half(8, 32), "sin": _half(8, 32)}, {}),
    "qk_norm_rope": (
        ops.qk_norm_rope,
        {"q": _half(*HEADS), "k": _half(*HEADS), "q_weight": _vector(64), "k_weight": _vector(64), "cos": _half(8, 32),
         "sin": _half(8, 32)},
        {},
    ),
    "attention": (
        ops.attention,
        {"q": _half(*HEADS), "k": _half(*HEADS), "v": _half(*HEADS), "bias": _half(1, 1, 8, 8),
         "mask": lambda card: torch.ones(8, 8, dtype=torch.bool, device=card), "alibi_slopes": _vector(2), "sink": _vector(2)},
        {},
    ),
    "attention_decode": (
        ops.attention_decode,
        {"q": _half(1, 1, 2, 64), "k_cache": _half(*HEADS), "v_cache": _half(*HEADS),
         "cache_seqlens": lambda card: torch.ones(1, dtype=torch.int32, device=card), "k_new": _half(1, 1, 2, 64),
         "v_new": _half(1, 1, 2, 64)},
        {},
    ),
    "head_mlp": (
        ops.head_mlp,
        {"x": _half(2, 8, 64), "w1": _half(2, 64, 32), "w2": _half(2, 32, 64), "b1": _half(2, 32), "w_gate": _half(2, 64, 32)},
        {"kind": "swiglu"},
    ),
    "linear": (
        importlib.import_module("trinix.ops.linear").linear,
        {"x": _half(1, 64), "weight": _half(8, 64), "bias": _half(8)}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
@torch.no_grad()
def test_tensors_on_two_cards_are_refused_in_words(name):
    op, tensors, more = SEVERAL[name]
    here = {argument: make("cuda:0") for argument, make in tensors.items()}
    op(**here, **more)
    for argument, make in tensors.items():
        # with q or x alone on the second card it is the next tensor that lies elsewhere
        with pytest.raises((ValueError, RuntimeError), match=r"cuda:[01].*cuda:[01]"):
            op(**here | {argument: make("cuda:1")}, **more)


@pytest.mark.parametrize("name", [n for n in SEVERAL if n != "linear"])
@torch.no_grad()
def test_a_named_backend_refuses_tensors_on_two_cards_too(name):
    op, tensors, more = SEVERAL[name]
    for argument in [*tensors][1:]:
        with pytest.raises((ValueError, trinix.Unsupported), match=r"cuda:[01].*cuda:[01]"):
            op(
                **{n: make("cuda:0" if n == argument else "cuda:1") for n, make in tensors.items()},
                backend="triton",
                **more,
            )
