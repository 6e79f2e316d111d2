"""A training step: the plain decoder is ours, the gate finds what is wrong, and lines and tables hold what was measured."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import trinix
from trinix import models
from trinix.lab import measure, record, report, train
from trinix.models import Decoder

SIZES = {"vocabulary": 97, "dim": 64, "layers": 2, "heads": 4, "length": 64}
TINY = {
    "llama": train.Case("llama", models.llama(**SIZES, kv_heads=2, hidden=96), 2, 32),
    "gpt": train.Case("gpt", models.gpt(**SIZES, hidden=96), 2, 32),
}


@pytest.fixture(params=TINY)
def case(request):
    return TINY[request.param]


def made(case, dtype=torch.bfloat16, seed=0):
    """(model, tokens)"""
    torch.manual_seed(seed)
    return Decoder(case.config, dtype=dtype), torch.randint(case.config.vocabulary, (case.batch, case.length + 1))


def test_the_plain_decoder_is_ours_to_float64(case):
    model, tokens = made(case, torch.float64)
    with trinix.use_backend("torch"):
        calls, parameters = train.prepare(model, case.length), dict(model.named_parameters())
        ours, theirs = (train.step(calls[impl], tokens, parameters) for impl in ("trinix", "eager"))
        loss = model.loss(tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # our rotary table is float32
    torch.testing.assert_close(theirs["loss"].mean().float(), loss.float())
    assert set(theirs) == {"loss", *(f"d{name}" for name in parameters)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ours_and_eager_pass_the_gate(case, dtype):
    found = train.gated(case, *made(case, dtype))
    assert [impl for impl, (call, *_) in found.items() if call] == ["trinix", "eager"]
    assert found["eager"][1:] == (None, 1.0)
    assert found["trinix"][1] is None
    assert 0 < found["trinix"][2] < 3
    assert found["compile"] == (None, "skipped: timed on a GPU only", None)


def test_a_broken_plain_decoder_does_not_pass_as_the_truth(case, monkeypatch):
    rotated = train._rotated
    broken = {"llama": ("_rotated", lambda x, cos, sin: rotated(x, cos, -sin)), "gpt": ("EPS", 1e-2)}
    monkeypatch.setattr(train, *broken[case.name])
    call, reason, _ = train.gated(case, *made(case))["trinix"]
    assert call is None
    assert reason.startswith("misses its error budget: ")


def test_a_wrong_gradient_behind_a_right_loss_is_found(case):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return dx * 1.02

    model, tokens = made(case)
    output = model.blocks[1].attention.o_proj
    output.register_forward_hook(lambda module, args, y: Scaled.apply(y))
    call, reason, _ = train.gated(case, model, tokens)["trinix"]
    assert call is None
    assert reason.startswith("misses its error budget: d")


def test_what_an_implementation_raises_is_its_reason(case, monkeypatch):
    model, tokens = made(case)
    monkeypatch.setattr(Decoder, "forward", lambda *_: (_ for _ in ()).throw(trinix.Unsupported("not today")))
    assert train.gated(case, model, tokens)["trinix"] == (None, "Unsupported: not today", None)


def test_the_oracle_keeps_nothing_of_a_block_but_its_input(case, monkeypatch):
    """Float64 of a whole step fits the card only so."""
    wide = []
    rebuilt = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **k: wide.append(q.dtype) or rebuilt(q, *a, **k)
    )
    train.Oracle(*made(case))
    assert wide.count(torch.float64) == 2 * case.config.layers
    assert wide.count(torch.bfloat16) == case.config.layers


def test_the_least_operations_are_counted():
    case = replace(TINY["llama"], config=models.llama(**SIZES, kv_heads=2, hidden=96, head_dim=8), batch=3)
    model = Decoder(case.config, device="meta")
    products = 2 * (64 * (4 + 2 * 2) * 8 + 4 * 8 * 64 + 3 * 64 * 96) + 64 * 97
    scores = 2 * 4 * (2 * 32 * 32 * 2 * 8) // 2  # layers, heads, two products over the visible half
    assert train.flops(case, model) == 3 * 3 * (2 * 32 * products + scores)
    gpt = Decoder(TINY["gpt"].config, device="meta")  # tied: the embedding is the output's matrix
    products = 2 * (64 * 3 * 64 + 64 * 64 + 2 * 64 * 96) + 64 * 97
    assert train.flops(TINY["gpt"], gpt) == 3 * 2 * (2 * 32 * products + 2 * 4 * 32 * 32 * 2 * 16)


def test_the_sizes_of_the_published_cases():
    assert [case.id for case in train.CASES] == [
        "T-llama-8x2048-1x4096",
        "T-llama-8x2048-4x2048",
        "T-gpt-8x2048-4x2048",
    ]
    assert [train.tokens_of(case.id) for case in train.CASES] == [4096, 8192, 8192]
    sizes = {
        case.name: sum(p.numel() for p in Decoder(case.config, device="meta").parameters()) for case in train.CASES
    }
    assert sizes["llama"] == 2 * 32000 * 2048 + 8 * (2048 * 4096 + 2048 * 2048 + 3 * 2048 * 5632 + 2 * 2048) + 2048


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        train.main([])
    assert "needs a GPU" in capsys.readouterr().err


class Clock:
    """Stands for ``measure.Gpu``: runs every call, and says what it is told."""

    def device_ms(self, calls):
        for impl, call in calls.items():
            if impl != "matmul":
                call()
        return {impl: measure.Spread(1.0, 2.0, 3.0) for impl in calls}

    def wall_ms(self, calls):
        return dict.fromkeys(calls, 4.0)

    def peak_mib(self, call):
        return 100.0 + bool(call())


@pytest.fixture
def lines(case, monkeypatch):
    monkeypatch.setattr(train.roofline, "probes_of", lambda work: ({"matmul": None}, 0.25))
    monkeypatch.setattr(train.roofline, "too_many_flops", lambda ms, flops, card: None)
    model, _ = made(case)
    return train.measured(case, model, Clock())


def test_lines_hold_what_the_clocks_said(case, lines):
    ours, eager, compiled = lines
    assert [one["impl"] for one in lines] == ["trinix", "eager", "compile"]
    assert {(one["op"], one["pass"], one["case"]) for one in lines} == {("train_step", "fwd_bwd", case.id)}
    assert ours["ok"]
    assert eager["ok"]
    shown = ours["device_ms"]["p50"], ours["wall_ms"], ours["peak_mib"], ours["ceiling_share"]
    assert shown == (2.0, 4.0, 101.0, 0.25)
    assert (ours["backend"], eager["backend"]) == ("torch", "eager")
    assert (compiled["ok"], compiled["device_ms"], compiled["reason"]) == (False, None, "skipped: timed on a GPU only")


def test_the_report_shows_tokens_a_second(case, lines):
    card = {"gpu": "NVIDIA H100 80GB HBM3", "versions": {"torch": "2.11.0"}, "commit": "abc1234"}
    compiled = lines[0] | {"impl": "compile", "wall_ms": 8.0, "peak_mib": 50.0}
    text = report.markdown([one | card for one in (*lines[:2], compiled)], "train_step.jsonl")
    assert "## Tokens a second" in text
    assert f"| {case.id} | 16000 | 16000 | 8000 | 101 | 101 | 50 |" in text.splitlines()
    refused = compiled | {"ok": False, "reason": "1200 TFLOP/s is above the listed 990 TFLOP/s of this card"}
    text = report.markdown([one | card for one in (*lines[:2], refused)], "train_step.jsonl")
    assert f"| {case.id} | 16000 | 16000 |  | 101 | 101 |  |" in text.splitlines()


@pytest.mark.gpu
def test_a_step_is_timed_and_recorded(case, tmp_path, capsys, fresh_dynamo):
    assert train.main(["--out", str(tmp_path)], (case,)) == 0
    (path,) = tmp_path.glob("*/train_step.jsonl")
    lines = record.read(path)
    assert [one["impl"] for one in lines] == ["trinix", "eager", "compile"]
    assert all(one["ok"] and one["device_ms"]["p50"] > 0 and one["peak_mib"] > 0 for one in lines)
    assert "tokens/s" in capsys.readouterr().out
