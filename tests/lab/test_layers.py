"""Layers as cases: every implementation computes the same layer, the least operations are the document's, and its command."""

import math
import re
from dataclasses import replace

import pytest
import torch

from helpers import small_layer
from trinix.lab import bench, documents, layers, record, report, run
from trinix.lab.case import load_cases
from trinix.lab.peers import PREPARE

CASES = load_cases("full", layers.OPS)
FORMS = {}
for one in CASES:  # of the cases that differ in sizes only the first
    kind = {n: v for n, v in one.args.items() if isinstance(v, (str, bool)) or n in ("q_latent_dim", "output_dim")}
    FORMS.setdefault((one.op, *kind.items()), one)


def small(case):
    return replace(small_layer(case), dtype=torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_a_case_names_the_parameters_of_its_layer(case):
    named = {name: tuple(p.shape) for name, p in layers.module_of(case).named_parameters()}
    assert list(case.shape.items())[1:] == list(named.items())


def test_the_largest_mlp_fits_a_card_of_79_gib():
    (case,) = [c for c in CASES if c.id == "R-llama3-405b-mlp"]
    weights = sum(math.prod(shape) for name, shape in case.shape.items() if name != "x")
    tokens, hidden = math.prod(case.shape["x"][:-1]), case.args["hidden_dim"]
    assert (case.shape["x"][-1], hidden, case.args["output_dim"]) == (16384, 53248, 16384)
    # the gate's oracle: weights and two gradients in bfloat16, weights and gradients in float64, and what eager's float64 keeps and
    # makes of tokens: packed, gate, product and gradients of them, with slices padded again to packed's width
    oracle = weights * (3 * 2 + 2 * 8) + 12 * tokens * hidden * 8
    # the judge of the largest gradient: those of float64, one more of it, three more in bfloat16 or bool
    judge = weights * (3 * 2 + 8) + 2 * hidden * case.shape["x"][-1] * (8 + 8)
    assert max(oracle, judge) < 79 * 2**30


@pytest.mark.parametrize("case", FORMS.values(), ids=lambda c: c.id)
def test_every_implementation_is_the_same_layer_with_the_same_gradients(case):
    lines = run.run_cpu(small(case), tuple(PREPARE))
    ran = {one["impl"] for one in lines if one["ok"] and one["error_ratio"] is not None}
    assert ran == {"trinix", "eager"} | ({"seed_formula"} if case.op == "attention_layers" else set())
    assert all(one["ok"] or one["reason"].startswith("skipped: ") for one in lines), lines
    assert {one["backend"] for one in lines if one["impl"] == "trinix"} == {"cpu:torch"}


def test_a_wrong_layer_is_found(monkeypatch):
    case = small(next(c for c in CASES if c.id == "A-GQA-1"))
    monkeypatch.setitem(layers.ATTENTION, "gqa", lambda *sizes, **o: ATTENTION_OF_GQA(*sizes, **o | {"causal": True}))
    (ours,) = [one for one in run.run_cpu(case, ("trinix",)) if one["pass"] == "fwd"]
    assert "misses its error budget" in ours["reason"]


ATTENTION_OF_GQA = layers.ATTENTION["gqa"]


def test_a_case_whose_shapes_are_not_the_layers_is_refused():
    case = next(c for c in CASES if c.id == "A-MQA-1")
    with pytest.raises(ValueError, match=r"A-MQA-1: shape must be x and \['qkv_proj.weight', .*, got \['x'\]"):
        layers.ours(replace(case, shape={"x": case.shape["x"]}))


@pytest.mark.parametrize(
    ("name", "projections", "attention"),
    [("A-MHSA-2", 549.8, 274.9), ("A-MHA-1", 19.3, 25.8), ("A-GQA-3", 257.7, 85.9), ("A-MQA-2", 283.5, 274.9), ("A-MLA-1", 223.3, 137.4)],
)  # fmt: skip
def test_the_least_operations_are_counted(name, projections, attention):
    case = next(c for c in CASES if c.id == name)
    causal = next(c for c in CASES if c.id == f"{name}-causal")
    assert layers.flops(case, "fwd") / 1e9 == pytest.approx(projections + attention, rel=2e-3)
    assert layers.flops(causal, "fwd") / 1e9 == pytest.approx(projections + attention / 2, rel=2e-3)
    assert layers.flops(case, "bwd") == 2 * layers.flops(case, "fwd")


def test_the_documents_backward_times_beyond_its_card_are_marked():
    seeds = [c for c in CASES if c.document == "004"]
    marked = [c.id for c in seeds if "exceeds that card's peak" in report._published(c, "bwd", "ms")]
    assert len(marked) == 12
    assert {"A-MHSA-1", "A-MHA-1", "A-MQA-1"} == {c.id for c in seeds} - set(marked)
    shown = report._published(next(c for c in seeds if c.id == "A-GQA-2"), "bwd", "ms")
    assert "triton 0.914 (exceeds that card's peak), flash 7.7724" in shown
    assert not any("exceeds" in report._published(c, "fwd", "ms") for c in seeds)
    assert all(
        bool(re.search("exceeds", r.note)) == (c.id in marked) for c in seeds for r in c.rows if r.pass_ == "bwd"
    )


# ---- benchmark_attention.py --------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """``asked(*words)``: the cases that the command would run, and with what."""

    def ask(*words):
        found = []
        monkeypatch.setattr(bench, "bench_cases", lambda cases, *_, **more: found.append((cases, more)) or 0)
        assert documents.benchmark_attention([*map(str, words), "--out", str(tmp_path)]) == 0
        return found[0]

    return ask


def test_without_flags_it_runs_the_documents_table(asked):
    cases, more = asked()
    assert [c.id for c in cases] == [c.id for c in CASES if c.document == "004"]
    assert len(cases) == 15
    assert more["runs"] is None


def test_it_takes_models_runs_and_a_dtype(asked):
    cases, more = asked("--models", "deepseek_v3", "llama3_70b", "--num_runs", 200, "--dtype", "float16")
    assert [(c.id, c.dtype) for c in cases] == [
        ("A-deepseek-v3-float16", torch.float16),
        ("A-llama3-70b-float16", torch.float16),
    ]
    assert more["runs"] == 200


@pytest.mark.parametrize(
    ("words", "ending", "dtype"),
    [
        (["--causal"], "-causal-float16", torch.float16),
        (["--dtype", "float32"], "-float32", torch.float32),
        (["--causal", "--dtype", "float32"], "-causal-float32", torch.float32),
        (["--causal", "--dtype", "bfloat16"], "-causal", torch.bfloat16),  # as the lab's own
        (["--dtype", "float16"], "", torch.float16),
    ],
)
def test_what_is_not_the_documents_has_ids_of_its_own(words, ending, dtype, asked):
    cases, _ = asked(*words)
    own = {c.id: c for c in CASES}
    assert [c.id for c in cases] == [f"{c.id}{ending}" for c in CASES if c.document == "004"]
    assert all(c.dtype == dtype and c.args["causal"] is ("--causal" in words) for c in cases)
    assert all(c == own.get(c.id, c) for c in cases), "an id of a file is that case, as the report describes it"


def test_a_model_s_layer_as_the_model_has_it_keeps_its_id(asked):
    assert [c.id for c in asked("--models", "llama3_70b", "--causal", "--dtype", "bfloat16")[0]] == ["A-llama3-70b"]


def test_the_report_does_not_call_a_causal_layer_the_documents(asked):
    ((case, *_), _) = asked("--causal", "--dtype", "float32")
    known = {
        "case": case.id,
        "op": case.op,
        "pass": "fwd",
        "impl": "trinix",
        "ok": True,
        "host_us": 1.0,
        "wall_ms": 1.0,
    }
    known |= {"device_ms": {"p20": 1.0, "p50": 1.0, "p80": 1.0}, "peak_mib": 1.0, "inputs_mib": 1.0, "error_ratio": 1.0}
    text = report.markdown([record.line(**known) | {"gpu": "NVIDIA H100 80GB HBM3"}], "attention_layers.jsonl")
    assert f"| {case.id} |" in text
    assert "causal=False" not in text
    assert "fp16" not in text
    assert "(A100" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "gpt5"], "invalid choice: 'gpt5'"),
        (["--num_runs", "0"], "--num_runs must be positive, got 0"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
    ],
)
def test_flags_that_mean_nothing_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as done:
        documents.benchmark_attention(words)
    assert done.value.code == 2
    assert message in capsys.readouterr().err


def test_large_layers_are_not_timed_on_a_cpu(tmp_path, capsys):
    assert documents.benchmark_attention(["--models", "llama3_405b", "--out", str(tmp_path)]) == 0
    assert "Skipped: 1 built cases above" in re.sub(r"\s+", " ", capsys.readouterr().out)
