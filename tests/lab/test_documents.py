"""The commands of document 002's system: which cases their flags mean, and what they refuse."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trinix.lab import bench, documents, record
from trinix.lab.peers import trinix

ROOT = Path(__file__).parents[2]
COMMANDS = {"normalization": documents.benchmark_normalization, "embeddings": documents.benchmark_embeddings}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """``asked(name, *words)``: the cases that a command would run."""

    def run(name, *words):
        found = []
        monkeypatch.setattr(bench, "bench_cases", lambda cases, *_, **__: found.extend(cases) or 0)
        assert COMMANDS[name]([*map(str, words), "--out", str(tmp_path)]) == 0
        return found

    return run


def test_normalization_without_flags_is_the_documents_table(asked):
    cases = asked("normalization")
    assert [c.id for c in cases] == [f"N-{norm}-{i}" for i in range(1, 7) for norm in ("ln", "rms")]
    assert all(c.dtype == torch.float16 and c.rows for c in cases)
    assert {c.op for c in asked("normalization", "--op", "rms_norm")} == {"rms_norm"}


def test_normalization_takes_the_documents_flags(asked):
    cases = asked("normalization", "--hidden_size", 8192, "--seq_len", 4096, "--batch_size", 1)
    assert [(c.op, c.shape["x"], c.file) for c in cases] == [
        ("layer_norm", (1, 4096, 8192), "norm"),
        ("rms_norm", (1, 4096, 8192), "norm"),
    ]
    assert cases[0].shape["bias"] == (8192,)
    assert "bias" not in cases[1].shape
    (one,) = asked("normalization", "--hidden_size", 64, "--dtype", "bfloat16", "--op", "layer_norm")
    assert (one.dtype, one.shape["x"]) == (torch.bfloat16, (1, 4096, 64))


def test_another_dtype_has_ids_of_its_own(asked):
    (own,) = asked("normalization", "--hidden_size", 64, "--op", "rms_norm", "--dtype", "float16")
    (other,) = asked("normalization", "--hidden_size", 64, "--op", "rms_norm", "--dtype", "bfloat16")
    assert (own.id, other.id) == ("rms_norm-1x4096x64", "rms_norm-1x4096x64-bfloat16")
    rope, alibi = asked("embeddings", "--num_heads", 2, "--head_dim", 8, "--seq_len", 16, "--dtype", "float32")
    assert (rope.id, rope.dtype) == ("rope-1x16x2x8-float32", torch.float32)
    assert (alibi.id, alibi.dtype) == ("alibi_bias-2x16x16", torch.float32), "the slopes' own"


def test_embeddings_without_flags_are_the_documents_rows(asked):
    assert [c.id for c in asked("embeddings")] == [
        *(f"E-rope-{i}" for i in (1, 2, 3, 4)),
        *(f"E-alibi-{i}" for i in (1, 2, 3)),
    ]
    assert {c.op for c in asked("embeddings", "--op", "alibi_bias")} == {"alibi_bias"}


def test_embeddings_take_the_documents_flags(asked):
    rope, alibi = asked("embeddings", "--num_heads", 64, "--head_dim", 128, "--seq_len", 8192)
    assert (rope.shape["q"], rope.shape["k"], rope.shape["cos"]) == ((1, 8192, 64, 128), (1, 8192, 64, 128), (8192, 64))
    assert (rope.dtype, rope.file) == (torch.float16, "rope")
    assert (alibi.shape, alibi.args) == ({"slopes": (64,)}, {"seq_q": 8192, "causal": False})
    assert alibi.passes == ("fwd",)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("normalization", ["--hidden_size", "0"], r"must be positive, got \(1, 4096, 0\)"),
        ("normalization", ["--seq_len", "32"], "--seq_len needs --hidden_size"),
        ("normalization", ["--op", "batch_norm"], "invalid choice: 'batch_norm'"),
        ("normalization", ["--dtype", "float8"], "invalid choice: 'float8'"),
        ("normalization", ["--hidden_size", "9" * 30], r"nothing to run: layer_norm-1x4096x9+ needs .* GiB at least"),
        ("embeddings", ["--num_heads", "9" * 30], r"nothing to run: rope-1x8192x9+x128 needs .* GiB at least"),
        ("embeddings", ["--num_heads", "-1"], "must be positive"),
        ("embeddings", ["--head_dim", "64"], "--head_dim needs --num_heads"),
        ("embeddings", ["--num_heads", "2", "--head_dim", "7"], "--head_dim must be even, got 7"),
        ("embeddings", ["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_flags_that_mean_nothing_are_refused_with_their_name(name, words, message, capsys):
    with pytest.raises(SystemExit) as done:
        COMMANDS[name](words)
    assert done.value.code == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert f"benchmark_{name}.py: error:" in said


@pytest.mark.parametrize(
    ("name", "words", "op"),
    [
        ("normalization", ["--hidden_size", "64", "--seq_len", "16", "--op", "rms_norm"], "rms_norm"),
        ("embeddings", ["--num_heads", "2", "--head_dim", "8", "--seq_len", "16", "--op", "rope"], "rope"),
    ],
)
def test_the_commands_run_from_the_repository_root(name, words, op, tmp_path):
    command = [sys.executable, f"benchmark_{name}.py", *words, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "They say nothing about a GPU kernel" in done.stdout
    built = any(trinix.is_built(c) for c in bench.load_cases("full", [op]))
    if not built:
        assert "Rows whose op does not exist yet" in done.stdout
        return
    family = {"normalization": "norm", "embeddings": "rope"}[name]
    lines = record.read(tmp_path / "out" / "cpu" / f"{family}.jsonl")
    assert {one["op"] for one in lines} == {op}
    assert [one["impl"] for one in lines if one["ok"] and one["pass"] == "fwd"][:2] == ["trinix", "eager"]
    assert all(one["ok"] or one["reason"].startswith("skipped: ") for one in lines)


def test_a_last_result_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.device, "card", lambda index=0: None)
    path = tmp_path / "cpu" / "norm.jsonl"
    path.parent.mkdir()
    path.write_text("nonsense\n")
    with pytest.raises(SystemExit):
        documents.benchmark_normalization(["--hidden_size", "64", "--seq_len", "4", "--out", str(tmp_path)])
    assert f"--out {tmp_path}: {path}: line 1 is not JSON" in capsys.readouterr().err
