"""The commands as a user types them, each in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trinix import cli, ops
from trinix.lab import record

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(tmp_path):
    """``command(*words)``: (exit status, output, errors) of a Python command, without a GPU."""

    def run(*words, cwd=tmp_path):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=cwd,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    return run


def trinix(command, *words):
    return command("-m", "trinix", *words)


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """As ``trinix(command, *words)`` in this process: a new one takes seconds to import PyTorch."""

    def run(*words):
        monkeypatch.chdir(tmp_path)
        return cli.main([str(word) for word in words]), *capsys.readouterr()

    return run


def test_help_lists_every_command(command):
    code, said, _ = trinix(command, "--help")
    assert code == 0
    for name in ("doctor", "ops", "bench", "report"):
        assert re.search(rf"^ +{name} +\w+", said, re.M), f"{name} has no line of help"


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("doctor", []),
        ("ops", []),
        ("bench", ["--op", "--suite", "--case", "--resume", "--impl", "--warm", "--out"]),
        ("report", ["--results"]),
    ],
)
def test_help_of_a_command_lists_its_flags(name, flags, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([name, "--help"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in flags)


def test_help_waits_for_no_heavy_import(fresh_process):
    code = """
        import sys
        from trinix import cli
        try:
            cli.main(["--help"])
        except SystemExit:
            print([name for name in ("torch", "triton", "rich") if name in sys.modules])
    """
    assert fresh_process(code).endswith("[]")


@pytest.mark.parametrize("words", [[], ["nonsense"], ["bench", "--nonsense"], ["doctor", "now"]])
def test_a_command_that_does_not_exist_is_refused_with_the_usage(words, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(words)
    assert done.value.code == 2
    assert "usage: trinix" in capsys.readouterr().err


def test_doctor_says_what_runs_here_and_why_the_rest_does_not(command):
    code, said, _ = trinix(command, "doctor")
    assert code == 0
    head, *facts = said.splitlines()
    assert head.startswith("trinix ")
    assert all(re.match(r"(ok|no)  \w", fact) for fact in facts), said
    assert f"ok  torch {torch.__version__}" in said
    assert re.search(r"^no  GPU: .+; ops run through PyTorch", said, re.M)
    assert re.search(r"^(ok|no)  triton", said, re.M)
    assert re.search(r"^no  fast launches: ", said, re.M)
    assert re.search(r"^no  C\+\+ launches: ", said, re.M)
    for fact in facts:
        assert fact.startswith("ok") or ":" in fact, f"no reason: {fact}"


def test_doctor_without_triton_says_so(forked_process):
    code = """
        import importlib.util, sys
        real = importlib.util.find_spec
        sys.modules |= dict.fromkeys([name for name in sys.modules if name.partition(".")[0] == "triton"])
        importlib.util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
        from trinix import cli
        print(cli.main(["doctor"]), cli.main(["ops"]))
    """
    said = forked_process(code)
    assert "no  triton: not installed; every op runs through PyTorch" in said
    assert "no  fast launches: triton is not installed" in said
    assert "triton: needs the package triton, which is not installed" in said
    assert said.endswith("0 0")


def test_ops_lists_every_op_with_each_backend(here):
    code, said, _ = here("ops")
    assert code == 0
    assert [line.split()[0] for line in said.splitlines()] == sorted(ops.EXPLAIN)
    for line in said.splitlines():
        name, states = line.split(maxsplit=1)
        backends = sys.modules[ops.EXPLAIN[name][0].__module__].BACKENDS
        assert re.fullmatch("; ".join(rf"{backend}: \w.*" for backend in backends), states), line
        assert line.endswith("; torch: runs here")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "nonsense"], "trinix: bench: suite must be one of ['quick', 'seeds', 'full'], got 'nonsense'"),
        (["--op", "reluu"], "trinix: bench: op must be among ['activation', "),
        (["--impl", "eagle"], "trinix: bench: impl must be among ['trinix', "),
        (["--case", "eagle"], "trinix: bench: case 'eagle' matches none of the "),
        (["--warm", "-1"], "trinix: bench: warm must be 0 or a number of processes, got -1"),
    ],
)
def test_bench_refuses_what_it_does_not_know_and_lists_what_it_does(words, message, capsys, tmp_path):
    assert cli.main(["bench", "--out", str(tmp_path / "out"), *words]) == 2
    said, errors = capsys.readouterr()
    assert said == ""
    assert errors.startswith(message)
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "Stopped.\n"),
        (ValueError("bench: no"), 2, "trinix: bench: no\n"),
        (FileExistsError(17, "File exists", "a file"), 2, "trinix: [Errno 17] File exists: 'a file'\n"),
    ],
)
def test_what_a_user_can_cause_ends_in_one_line(error, code, said, monkeypatch, capsys):
    from trinix.lab import bench

    def stop(**_):
        raise error

    monkeypatch.setattr(bench, "bench", stop)
    assert cli.main(["bench"]) == code
    assert capsys.readouterr().err == said


def test_a_mistake_of_our_own_keeps_its_traceback(monkeypatch):
    from trinix.lab import bench

    def stop(**_):
        raise RuntimeError("the driver fell over")

    monkeypatch.setattr(bench, "bench", stop)
    with pytest.raises(RuntimeError):
        cli.main(["bench"])


def test_bench_without_rich_says_how_to_get_it(forked_process):
    code = """
        import sys
        sys.modules["rich"] = sys.modules["rich.console"] = None
        sys.stderr = sys.stdout
        from trinix import cli
        print(cli.main(["bench"]))
    """
    said = forked_process(code)
    assert "needs the package rich, which is not installed; pip install 'trinix[lab]'" in said
    assert said.endswith("2")


def test_report_without_results_is_an_error_that_says_where_it_looked(here, tmp_path):
    code, said, errors = here("report", "--results", tmp_path / "nothing")
    assert (code, said) == (2, "")
    assert errors == f"trinix: report: no result files in {tmp_path / 'nothing'}; `trinix bench --out` writes them\n"
    code, _, errors = here("report")
    assert code == 2
    assert "no result files in results;" in errors


def result_in(folder):
    file = record.ResultFile(folder, "activation")
    known = {"case": "X-relu-256", "op": "activation", "pass": "fwd", "impl": "eager", "wall_ms": 1.0}
    file.add([record.line(**known, device_ms={"p20": 1.0, "p50": 1.0, "p80": 1.0}, ok=True)])
    return file.finish()


def test_report_names_what_it_wrote(command, tmp_path):
    result_in(tmp_path / "results" / "cpu")
    code, said, _ = trinix(command, "report")
    assert code == 0
    assert said == f"Wrote {Path('results', 'cpu', 'activation.md')}\n"
    assert (tmp_path / "results" / "cpu" / "activation.md").read_text().startswith("# activation: results")


def test_report_of_a_broken_result_file_names_the_line(here, tmp_path):
    path = result_in(tmp_path / "results" / "cpu")
    path.write_text("nonsense\n")
    code, _, errors = here("report")
    assert code == 2
    assert "activation.jsonl: line 1 is not JSON" in errors


def test_ctrl_c_in_a_terminal_is_not_the_interpreter_s_affair(tmp_path):
    """The terminal sends it to the whole group of a command, to a child that imports PyTorch just then, say."""
    code = "from trinix.lab import interpret; print('begun', flush=True); list(interpret.check())"
    words = [sys.executable, "-c", f"import sys\ntry: exec({code!r})\nexcept KeyboardInterrupt: sys.exit('Stopped.')"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=tmp_path, start_new_session=True, **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        time.sleep(1.0)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert errors == "Stopped.\n"


# -- the documents' own command


def benchmark(command, *words):
    return command("benchmark_activation.py", *words, cwd=ROOT)


def test_the_documents_command_runs_from_the_repository_root(command, tmp_path):
    out = tmp_path / "out"
    code, said, _ = benchmark(command, "--hidden_size", 64, "--seq_len", 32, "--kind", "mish", "--out", out)
    assert code == 0
    assert "They say nothing about a GPU kernel" in said
    rows = [line for line in said.splitlines() if "mish-1x32x64" in line]
    assert [[c.strip() for c in re.split("[│┃]", row)[2:4]] for row in rows] == [
        [pass_, impl] for pass_ in ("fwd", "fwd_bwd") for impl in ("trinix", "eager", "seed_formula")
    ]
    lines = record.read(out / "cpu" / "activation.jsonl")
    assert sum(one["ok"] for one in lines) == 6
    assert all(one["ok"] or one["reason"].startswith("skipped: ") for one in lines)


def test_the_documents_command_takes_dtype_batch_and_several_kinds(tmp_path):
    from trinix.lab.documents import benchmark_activation

    words = "--hidden_size 8 --seq_len 4 --batch_size 3 --dtype float32 --kind mish --kind relu --out"
    assert benchmark_activation([*words.split(), str(tmp_path)]) == 0
    lines = record.read(tmp_path / "cpu" / "activation.jsonl")
    assert {one["case"] for one in lines} == {"mish-3x4x8-float32", "relu-3x4x8-float32"}


@pytest.mark.parametrize("name", ["activation", "normalization", "embeddings", "attention"])
def test_ctrl_c_before_the_documents_command_has_begun_ends_in_one_line(name, tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    )  # while it is imported
    paths = os.pathsep.join([str(tmp_path), str(Path(record.__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, ROOT / f"benchmark_{name}.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Stopped.\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kind", "mush"], r"--kind must be among \['none', 'relu', .*\], got \['mush'\]"),
        (["--hidden_size", "0"], r"must be positive, got \(1, 8192, 0\)"),
        (["--hidden_size", "8", "--seq_len", "-4"], r"must be positive, got \(1, -4, 8\)"),
        (["--hidden_size", "many"], r"--hidden_size: invalid int value: 'many'"),
        (["--dtype", "float8"], r"--dtype: invalid choice: 'float8'"),
        (["--colour", "red"], r"unrecognized arguments: --colour red"),
    ],
)
def test_the_documents_command_refuses_bad_flags_clearly(words, message, capsys):
    from trinix.lab.documents import benchmark_activation

    with pytest.raises(SystemExit) as done:
        benchmark_activation(words)
    assert done.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "words", [["--kind", "gelu"], ["--seq_len", "32"], ["--dtype", "float32"], ["--batch_size", "4"]]
)
def test_a_flag_that_would_be_ignored_is_refused(words, monkeypatch, tmp_path):
    from trinix.lab import bench, documents

    monkeypatch.setattr(bench, "bench_cases", lambda *call, **options: 0)
    with pytest.raises(SystemExit):
        documents.benchmark_activation([*words, "--out", str(tmp_path)])
