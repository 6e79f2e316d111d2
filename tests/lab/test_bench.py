"""``trinix bench`` from cases to files: exit codes, what is kept after Ctrl-C, and what is said about the rest."""

import io
import itertools
import json
import math
import os
import sys

import pytest
import torch
from rich.console import Console

from trinix import device, ops
from trinix.lab import aot, bench, gate, interpret, measure, record, run
from trinix.lab.case import Case, Row, load_cases
from trinix.lab.peers import PREPARE, trinix

H100 = device.Card("NVIDIA H100 80GB HBM3", "sm_90", 132, 79.6)
IMPLS = tuple(PREPARE)


def tiny(name, kind="relu", shape=(4, 8), op="activation"):
    rows = (Row(f"{name}-fwd", "fwd", "ms", {"torch": 1.0}), Row(f"{name}-bwd", "bwd", "ms", {}))
    args = {"kind": kind}
    return Case(name, op, args, {"x": shape}, torch.bfloat16, ("fwd", "fwd_bwd"), "trinix", "", ("full",), rows)


CASES = [
    tiny("relu-tiny"),
    tiny("mish-tiny", "mish"),
    tiny("later-1", op="no_such_op"),
    tiny("later-2", op="no_such_op"),
]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(device, "card", lambda index=0: None)
    record.stamp.cache_clear()  # the card of the tests before
    yield
    record.stamp.cache_clear()


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), width=400)


def bench_cases(cases, out, screen, impls=IMPLS, **options):
    options = {"kernels": False} | options
    return bench.bench_cases(cases, impls, out, screen, **options), screen.file.getvalue()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# -- end to end on a CPU


def test_a_run_on_a_cpu_ends_well_and_leaves_a_whole_readable_file(tmp_path, screen):
    code, said = bench_cases(CASES, tmp_path, screen)
    assert code == 0
    assert names(tmp_path / "cpu") == ["activation.jsonl"]
    lines = record.read(tmp_path / "cpu" / "activation.jsonl")
    timed = [one for one in lines if one["ok"]]
    assert [(one["case"], one["pass"], one["impl"]) for one in timed] == [
        (case, pass_, impl)
        for case in ("relu-tiny", "mish-tiny")
        for pass_ in ("fwd", "fwd_bwd")
        for impl in ("trinix", "eager", "seed_formula")
    ]
    for one in timed:
        assert one["wall_ms"] > 0
        assert one["backend"] == {"trinix": "cpu:torch"}.get(one["impl"], f"cpu:{one['impl']}")
    for one in lines:
        assert one["device_ms"] is None, "a CPU's time is no GPU's"
        assert one["gpu"] is None
        assert one["ok"] or (one["reason"].startswith("skipped: ") and one["wall_ms"] is None)
    assert "No GPU here: PyTorch's CPU times only. They say nothing about a GPU kernel." in said
    assert "Wrote " in said
    assert "All checks passed" in said


def test_ops_that_do_not_exist_are_listed_with_their_cases_and_rows(tmp_path, screen):
    _, said = bench_cases(CASES, tmp_path, screen)
    row = next(line for line in said.splitlines() if "no_such_op" in line)
    assert [c.strip() for c in row.strip(" │").split("│")] == ["no_such_op", "2", "4", "later-1, later-2"]
    assert "Rows whose op does not exist yet" in said


def test_where_everything_is_built_there_is_no_such_table(tmp_path, screen):
    _, said = bench_cases(CASES[:1], tmp_path, screen)
    assert "not built" not in said


@pytest.mark.parametrize("text", ['{"case": \n', '{"case": "mish-tiny"}\n'], ids=["cut off", "fields missing"])
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"kernels": True}])
def test_a_last_result_that_cannot_be_read_is_an_error_before_anything_runs(
    text, options, tmp_path, screen, monkeypatch
):
    asked = three_parts(monkeypatch)
    stopping(monkeypatch, AssertionError("a case ran"), at=0)
    softmax = next(c for c in load_cases("quick", ("softmax",)))
    path = tmp_path / "cpu" / "softmax.jsonl"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"softmax\.jsonl: line 1 is not"):
        bench_cases([*CASES, softmax], tmp_path, screen, **options)
    assert names(path.parent) == ["softmax.jsonl"]
    assert not asked


def test_a_file_in_the_folder_s_place_is_an_error_before_anything_runs(tmp_path, screen, monkeypatch):
    asked = three_parts(monkeypatch)
    (tmp_path / "cpu").write_text("")
    with pytest.raises(FileExistsError, match="cpu"):
        bench_cases(CASES, tmp_path, screen, kernels=True)
    assert not asked


def test_only_ops_that_do_not_exist_write_no_file(tmp_path, screen):
    _, said = bench_cases(CASES[2:], tmp_path, screen)
    assert "no_such_op" in said
    assert not list(tmp_path.rglob("*.jsonl*"))


def test_a_run_that_checked_nothing_does_not_say_that_all_checks_passed(tmp_path, screen):
    _, said = bench_cases(CASES[2:], tmp_path, screen)
    assert "All checks passed" not in said
    assert "CPU ms" not in said, "a table without a row"


def test_a_run_of_rivals_alone_checked_nothing_of_ours(tmp_path, screen):
    _, said = bench_cases(CASES, tmp_path, screen, impls=["eager"])
    assert "All checks passed" not in said
    assert "Nothing was checked." in said


def test_where_no_kernel_is_of_the_cases_none_is_checked_and_nothing_is_said_to_have_passed(
    tmp_path, screen, monkeypatch
):
    asked = three_parts(monkeypatch)
    _, said = bench_cases(CASES[2:], tmp_path, screen, kernels=frozenset({"no_such_family"}))
    assert not asked
    assert "All checks passed" not in said
    assert "Nothing was checked." in said


def test_large_cases_are_left_to_a_gpu_and_counted(tmp_path, screen):
    cases = [*CASES[:2], tiny("large", shape=(1 << 12, 1 << 12))]
    code, said = bench_cases(cases, tmp_path, screen, cpu_limits=(1000, 1e12))
    assert code == 0
    assert "Skipped: 1 built cases above 1,000 elements or 1000 GFLOP are timed on a GPU only." in said
    assert {one["case"] for one in record.read(tmp_path / "cpu" / "activation.jsonl")} == {"relu-tiny", "mish-tiny"}


def test_many_operations_on_few_elements_are_left_to_a_gpu_too(tmp_path, screen):
    few = next(c for c in load_cases("seeds", ("head_mlp",)) if c.id == "M-1")
    _, said = bench_cases([*CASES[:1], few], tmp_path, screen, cpu_limits=(1 << 23, 1e9))
    assert "Skipped: 1 built cases above 8,388,608 elements or 1 GFLOP are timed on a GPU only." in said


def test_what_was_not_asked_for_is_not_called_skipped(tmp_path, screen):
    cases = [*CASES[:2], tiny("large", shape=(1 << 12, 1 << 12)), tiny("huge", shape=(1 << 30, 1 << 30))]
    _, said = bench_cases(cases, tmp_path, screen, cpu_limits=(1000, 1e12), ids=("relu-*",))
    assert "relu-tiny" in said
    assert "Skipped" not in said
    _, said = bench_cases(cases, tmp_path, screen, cpu_limits=(1000, 1e12), ids=("relu-*", "large"))
    assert "Skipped: 1 built cases" in said


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_what_no_memory_holds_is_skipped_by_name_and_the_rest_is_run(where, tmp_path, screen, request):
    if where == "gpu":
        request.getfixturevalue("gpu")
    huge = tiny("huge", shape=(1 << 30, 1 << 30))
    code, said = bench_cases([huge, *CASES], tmp_path, screen, cpu_limits=(float("inf"), float("inf")))
    assert code == 0
    assert "Skipped: huge needs 8,589,934,592.0 GiB at least, " in said
    (file,) = tmp_path.glob("*/activation.jsonl")
    assert {one["case"] for one in record.read(file)} == {"relu-tiny", "mish-tiny"}


def test_least_bytes_are_those_of_the_tensors():
    built = sorted(filter(trinix.is_built, load_cases()), key=gate.least_bytes, reverse=True)
    smallest = {c.op: c for c in built}  # the last of each
    for case in smallest.values():
        inputs = gate.inputs_of(case, "cpu")
        outputs = sum(t.nbytes for t in inputs.dys) or sum(map(math.prod, gate.outputs_of(case))) * case.dtype.itemsize
        assert gate.least_bytes(case) == (inputs.nbytes + outputs) * (2 if "bwd" in case.passes else 1), case.id


def test_chosen_implementations_only(tmp_path, screen):
    bench_cases(CASES, tmp_path, screen, impls=["eager"])
    assert {one["impl"] for one in record.read(tmp_path / "cpu" / "activation.jsonl")} == {"eager"}


@pytest.mark.parametrize(("impl", "wanted"), [("trinix", 1), ("eager", 0)])
def test_a_wrong_result_of_ours_is_a_failure_and_of_a_rival_is_a_line(impl, wanted, tmp_path, screen, monkeypatch):
    monkeypatch.setitem(PREPARE, impl, lambda case: lambda x: torch.relu(x) * 1.05)
    code, said = bench_cases(CASES[:1], tmp_path, screen)
    assert code == wanted
    assert ("FAILED: misses its error budget: y: error" in said) is bool(wanted)
    assert ("not timed: misses its error budget: y: error" in said) is not bool(wanted)
    assert ("2 failed." in said) is bool(wanted)
    lines = record.read(tmp_path / "cpu" / "activation.jsonl")
    assert [one["ok"] for one in lines if one["impl"] == impl] == [False, False]
    assert {one["impl"] for one in lines if one["ok"]} == {"trinix", "eager", "seed_formula"} - {impl}


def test_a_rival_that_gives_infinity_does_not_end_the_run(tmp_path, screen, monkeypatch):
    monkeypatch.setitem(PREPARE, "eager", lambda case: lambda x: torch.relu(x) / 0.0)
    code, _ = bench_cases(CASES[:1], tmp_path, screen)
    assert code == 0


@pytest.mark.parametrize("fault", ["every implementation is for a GPU", "every implementation is wrong"])
def test_where_nothing_is_left_to_time_the_run_still_ends(fault, tmp_path, screen, monkeypatch):
    monkeypatch.setitem(PREPARE, "eager", lambda case: lambda x: torch.relu(x) * 1.05)
    impls = ["compile", "trinix:triton"] if "GPU" in fault else ["eager"]
    code, _ = bench_cases(CASES[:1], tmp_path, screen, impls=impls)
    assert code == 0


# -- Ctrl-C and crashes


def stopping(monkeypatch, error, at=1):
    calls = itertools.count()
    real = run.run_cpu

    def run_cpu(case, impls):
        if next(calls) == at:
            raise error
        return real(case, impls)

    monkeypatch.setattr(run, "run_cpu", run_cpu)


def test_ctrl_c_ends_with_130_and_keeps_the_finished_lines_beside_the_last_result(tmp_path, screen, monkeypatch):
    bench_cases(CASES[:1], tmp_path, screen)
    path = tmp_path / "cpu" / "activation.jsonl"
    before = path.read_bytes()
    stopping(monkeypatch, KeyboardInterrupt())
    code, said = bench_cases(CASES, tmp_path, screen)
    assert code == 130
    assert path.read_bytes() == before
    partial = record.read(tmp_path / "cpu" / "activation.jsonl.partial")
    assert {one["case"] for one in partial} == {"relu-tiny"}
    assert f"Stopped. {len(partial)} finished lines are in " in said
    assert "activation.jsonl.partial" in said


@pytest.mark.parametrize("impls", [["trinix"], ["trinix", "eager"]])
def test_a_smaller_run_does_not_replace_a_result_that_has_more(impls, tmp_path, screen):
    bench_cases(CASES, tmp_path, screen, impls=["trinix", "eager"])
    path = tmp_path / "cpu" / "activation.jsonl"
    before = path.read_bytes()
    cases = CASES if len(impls) == 1 else CASES[:1]
    code, said = bench_cases(cases, tmp_path, screen, impls=impls)
    assert code == 0
    assert path.read_bytes() == before
    assert {one["impl"] for one in record.read(path.with_suffix(".jsonl.partial"))} == set(impls)
    assert "Kept " in said
    assert "Use another --out" in said


def test_ctrl_c_in_the_first_case_leaves_no_result(tmp_path, screen, monkeypatch):
    stopping(monkeypatch, KeyboardInterrupt(), at=0)
    code, _ = bench_cases(CASES, tmp_path, screen)
    assert code == 130
    assert names(tmp_path / "cpu") == ["activation.jsonl.partial"]
    assert record.read(tmp_path / "cpu" / "activation.jsonl.partial") == []


def test_a_crash_is_not_swallowed_and_keeps_the_finished_lines(tmp_path, screen, monkeypatch):
    stopping(monkeypatch, RuntimeError("the driver fell over"))
    with pytest.raises(RuntimeError, match="the driver fell over"):
        bench_cases(CASES, tmp_path, screen)
    assert "Failed. The finished lines are in " in screen.file.getvalue()
    assert names(tmp_path / "cpu") == ["activation.jsonl.partial"]
    assert {one["case"] for one in record.read(tmp_path / "cpu" / "activation.jsonl.partial")} == {"relu-tiny"}


def test_the_next_run_replaces_what_an_interrupted_one_left(tmp_path, screen, monkeypatch):
    with monkeypatch.context() as patch:
        stopping(patch, KeyboardInterrupt())
        bench_cases(CASES, tmp_path, screen)
    code, _ = bench_cases(CASES, tmp_path, screen)
    assert code == 0
    assert names(tmp_path / "cpu") == ["activation.jsonl"]


# -- some cases now, the others later


def cases_in(path):
    return list(dict.fromkeys(one["case"] for one in record.read(path)))


def test_a_run_of_some_cases_stays_partial_and_a_resumed_one_makes_it_whole(tmp_path, screen, monkeypatch):
    path, partial = (tmp_path / "cpu" / f"activation.jsonl{end}" for end in ("", ".partial"))
    code, said = bench_cases(CASES, tmp_path, screen, ids=["mish-*"])
    assert code == 0
    assert names(tmp_path / "cpu") == ["activation.jsonl.partial"]
    assert cases_in(partial) == ["mish-tiny"]
    assert "1 of 2 cases are still to run with --resume: " in said
    ran = []
    real = run.run_cpu
    monkeypatch.setattr(run, "run_cpu", lambda case, impls: ran.append(case.id) or real(case, impls))
    bench_cases(CASES, tmp_path, screen, ids=["mish-*"], resume=True)
    assert ran == []
    assert names(tmp_path / "cpu") == ["activation.jsonl.partial"]
    bench_cases(CASES, tmp_path, screen, resume=True)
    assert ran == ["relu-tiny"]
    assert names(tmp_path / "cpu") == ["activation.jsonl"]
    assert cases_in(path) == ["mish-tiny", "relu-tiny"]


def test_a_run_of_some_cases_leaves_the_last_whole_result_alone(tmp_path, screen):
    bench_cases(CASES, tmp_path, screen)
    before = (tmp_path / "cpu" / "activation.jsonl").read_bytes()
    bench_cases(CASES, tmp_path, screen, ids=["mish-*"])
    assert (tmp_path / "cpu" / "activation.jsonl").read_bytes() == before


def test_patterns_that_leave_no_case_missing_write_a_whole_file(tmp_path, screen):
    bench_cases(CASES, tmp_path, screen, ids=["mish-*", "relu*"])
    assert names(tmp_path / "cpu") == ["activation.jsonl"]


def test_after_ctrl_c_a_resumed_run_does_the_rest_only(tmp_path, screen, monkeypatch):
    with monkeypatch.context() as patch:
        stopping(patch, KeyboardInterrupt())
        bench_cases(CASES, tmp_path, screen)
    stopping(monkeypatch, AssertionError("the finished case ran again"), at=1)
    code, _ = bench_cases(CASES, tmp_path, screen, resume=True)
    assert code == 0
    assert cases_in(tmp_path / "cpu" / "activation.jsonl") == ["relu-tiny", "mish-tiny"]


def test_a_resumed_suite_does_not_measure_finished_files_again(tmp_path, screen, monkeypatch):
    bench_cases(CASES, tmp_path, screen)
    path = tmp_path / "cpu" / "activation.jsonl"
    before = path.read_bytes()
    stopping(monkeypatch, AssertionError("a finished case ran again"), at=0)
    code, said = bench_cases(CASES, tmp_path, screen, resume=True)
    assert code == 0
    assert "mish-tiny" in said
    assert path.read_bytes() == before


def test_a_resumed_run_measures_the_implementations_that_are_missing(tmp_path, screen, monkeypatch):
    path = tmp_path / "cpu" / "activation.jsonl"
    bench_cases(CASES, tmp_path, screen, impls=["trinix"], ids=["mish-*"])
    ran = []
    real = run.run_cpu
    monkeypatch.setattr(run, "run_cpu", lambda case, impls: ran.append((case.id, *impls)) or real(case, impls))
    bench_cases(CASES, tmp_path, screen, impls=["eager", "quack"], ids=["mish-*"], resume=True)
    assert ran == [("mish-tiny", "trinix", "eager", "quack")], "all that either run named; quack has no such op"
    assert [p.name for p in path.parent.iterdir()] == ["activation.jsonl.partial"]
    bench_cases(CASES, tmp_path, screen, impls=["quack", "eager"], resume=True)
    assert ran[1:] == [("relu-tiny", "eager", "quack")]
    kept = [(one["case"], one["pass"], one["impl"]) for one in record.read(path)]
    assert sorted(kept) == sorted(set(kept))
    assert {(case, impl) for case, _, impl in kept} == {
        ("mish-tiny", "trinix"), ("mish-tiny", "eager"), ("relu-tiny", "eager")
    }  # fmt: skip


def test_a_pattern_that_matches_nothing_is_refused(tmp_path, screen):
    with pytest.raises(
        ValueError, match=r"case 'nonsense\*' matches none of the \d+ cases that --suite and --op leave"
    ):
        bench.bench(out=tmp_path / "out", console=screen, ids=["X-relu-*", "nonsense*"], suite="full")
    assert not (tmp_path / "out").exists()


# -- the three parts without a GPU


def three_parts(monkeypatch, *, kernel_ok=True, binary_ok=True):
    check = {"kernel": "activation/relu", "dtype": "float32", "layout": "contiguous", "error_ratio": 1.0}
    good = check | {"ok": True, "reason": None}
    bad = check | {"ok": kernel_ok, "reason": None if kernel_ok else "y: error 3"}
    fine = aot.Report("relu/bfloat16", "sm_90", None, 32, 0, 0, 128, 128, 128, 4.0, 0.1)
    spilling = aot.Report("relu/bfloat16", "sm_80", None, 255, 0 if binary_ok else 64, 0, 128, 128, 128, 4.0, 0.1)
    asked = []
    monkeypatch.setattr(interpret, "check", lambda names: iter([asked.append(names), good, bad][1:]))
    monkeypatch.setattr(aot, "first_cases", lambda: ("relu/bfloat16",))
    monkeypatch.setattr(aot, "report", lambda cases, progress: [progress(1, 2), progress(2, 2), fine, spilling][2:])
    return asked


def test_kernels_are_those_of_the_cases_that_were_asked_for(screen, tmp_path, monkeypatch):
    asked = three_parts(monkeypatch)
    monkeypatch.setattr(bench, "_collect", lambda *call, **options: ([], False))
    part = {"ops": ("alibi_bias",), "suite": "full"}  # of a family, with a result file of its own
    for more in ({"ops": ("softmax",)}, {"ids": ("A-MHSA-1",), "suite": "full"}, part, {}):
        bench.bench(**{"suite": "quick", "impls": ("eager",), "out": tmp_path, "console": screen} | more)
    assert asked == [["softmax"], ["rope", "attention", "linear"], ["rope"], list(interpret.CHECKS)]
    for op in sorted({c.op for c in load_cases()}):
        families = frozenset(c.family for c in load_cases("full", (op,)))
        assert {name.partition("/")[0] for name in aot.case_names()}.intersection(bench._kernels_of(families)), op
    kernels = {name.partition("/")[0] for name in aot.case_names()}
    assert kernels == set(bench._FAMILIES_OF)
    assert set(interpret.CHECKS) <= kernels
    assert {family for mine in bench._FAMILIES_OF.values() for family in mine} == {c.family for c in load_cases()}


@pytest.mark.parametrize(("kernel_ok", "binary_ok"), [(True, True), (False, True), (True, False), (False, False)])
def test_the_three_parts_without_a_gpu_each_count_their_failures(kernel_ok, binary_ok, tmp_path, screen, monkeypatch):
    three_parts(monkeypatch, kernel_ok=kernel_ok, binary_ok=binary_ok)
    code, said = bench_cases(CASES[:1], tmp_path, screen, kernels=True)
    failed = (not kernel_ok) + (not binary_ok)
    assert code == int(failed > 0)
    assert said.index("1 of 3") < said.index("2 of 3") < said.index("3 of 3")
    assert (f"{failed} failed." in said) is (failed > 0)
    assert ("float32 contiguous: y: error 3" in said) is not kernel_ok
    assert ("FAILED: spills 64 bytes a thread" in said) is not binary_ok


def test_without_triton_two_parts_are_skipped_and_say_so(tmp_path, screen, monkeypatch):
    real = bench.importlib.util.find_spec
    monkeypatch.setattr(
        bench.importlib.util, "find_spec", lambda name, *more: None if name == "triton" else real(name, *more)
    )
    code, said = bench_cases(CASES[:1], tmp_path, screen, kernels=True)
    assert code == 0
    assert said.count("Skipped: triton is not installed.") == 2
    assert {one["impl"] for one in record.read(tmp_path / "cpu" / "activation.jsonl") if one["ok"]} >= {
        "trinix",
        "eager",
    }


def test_after_ctrl_c_no_further_part_starts(tmp_path, screen, monkeypatch):
    three_parts(monkeypatch)
    stopping(monkeypatch, KeyboardInterrupt(), at=0)
    code, said = bench_cases(CASES[:1], tmp_path, screen, kernels=True)
    assert code == 130
    assert "3 of 3" not in said


def test_a_compiler_error_is_shown_in_the_table(screen):
    screen.print(bench._compiler_table([aot.Report("relu/bfloat16", "sm_90", error="RuntimeError: pass failed")]))
    assert "FAILED: RuntimeError: pass failed" in screen.file.getvalue()


# -- a GPU, as far as it can be had without one


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(device, "card", lambda index=0: H100)
    monkeypatch.setattr(measure, "Gpu", lambda **_: "a clock")
    reasons = {}

    def run_gpu(case, impls, clock):
        assert clock == "a clock"
        lines = []
        for impl in impls:
            known = {"case": case.id, "op": case.op, "pass": "fwd", "impl": impl, "error_ratio": 1.0}
            if impl in reasons:
                lines.append(record.line(**known, ok=False, reason=reasons[impl]))
                continue
            known |= {
                "device_ms": {"p20": 1.0, "p50": 1.0, "p80": 1.0},
                "host_us": 1.0,
                "wall_ms": 1.0,
                "peak_mib": 1.0,
            }
            lines.append(record.line(**known, backend=impl, inputs_mib=1.0, ok=True))
        return lines

    monkeypatch.setattr(run, "run_gpu", run_gpu)
    return reasons


def test_a_run_on_a_gpu_writes_into_the_cards_folder_and_sums_up(gpu, tmp_path, screen):
    gpu["compile"] = "skipped: no compiler"
    code, said = bench_cases(CASES, tmp_path, screen)
    assert code == 0
    assert names(tmp_path) == ["h100"]
    assert len(record.read(tmp_path / "h100" / "activation.jsonl")) == 2 * len(IMPLS)
    assert "NVIDIA H100 80GB HBM3: 132 SMs, 80 GiB, sm_90" in said
    assert "2 rows of trinix, 0 failed, 0 slower" in said
    assert "no_such_op" in said


@pytest.mark.parametrize(
    ("impl", "reason", "wanted"),
    [
        ("trinix", "misses its error budget: y", 1),
        ("trinix:triton", "faster than this card", 1),
        ("trinix:triton", "skipped: the identity runs no kernel", 0),
        ("eager", "misses its error budget: y", 0),
    ],
)
def test_only_a_failure_of_ours_fails_a_run_on_a_gpu(impl, reason, wanted, gpu, tmp_path, screen):
    gpu[impl] = reason
    code, said = bench_cases(CASES[:1], tmp_path, screen)
    assert code == wanted
    assert (f"failed: relu-tiny fwd {impl}: {reason}" in said) is bool(wanted)


def test_ctrl_c_on_a_gpu_ends_with_130_and_still_sums_up(gpu, tmp_path, screen, monkeypatch):
    real, calls = run.run_gpu, itertools.count()

    def run_gpu(*call):
        if next(calls):
            raise KeyboardInterrupt
        return real(*call)

    monkeypatch.setattr(run, "run_gpu", run_gpu)
    code, said = bench_cases(CASES, tmp_path, screen)
    assert code == 130
    assert names(tmp_path / "h100") == ["activation.jsonl.partial"]
    assert "1 rows of trinix, 0 failed" in said


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("AMD Instinct MI300X", "mi300x"),
        ("", "gpu"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA RTX A6000", "a6000"),
    ],
)
def test_the_folder_of_a_cards_results(name, slug):
    assert device.Card(name, "sm_80", 1, 1.0).slug == slug


# -- what is asked for


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"impls": ["eagle"]}, r"impl must be among \['trinix', .*'eager'.*\], got \['eagle'\]"),
        ({"suite": "nonsense"}, r"suite must be one of \['quick', 'seeds', 'full'\], got 'nonsense'"),
        ({"ops": ["reluu"]}, r"op must be among \['activation'.*\], got \['reluu'\]"),
    ],
)
def test_an_unknown_implementation_suite_or_op_is_refused_before_anything_runs(asked, message, tmp_path, screen):
    with pytest.raises(ValueError, match=message):
        bench.bench(out=tmp_path / "out", console=screen, **asked)
    assert not (tmp_path / "out").exists()
    assert screen.file.getvalue() == ""


def test_suite_ops_and_implementations_reach_the_run(tmp_path, screen, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "bench_cases", lambda cases, impls, *_, **__: asked.append((cases, tuple(impls))) or 0)
    bench.bench(suite="seeds", ops=["softmax"], impls=["eager"], out=tmp_path, console=screen)
    bench.bench(out=tmp_path, console=screen)
    assert {c.op for c in asked[0][0]} == {"softmax"}
    assert asked[0][1] == ("eager",)
    assert asked[1][1] == IMPLS
    assert all("quick" in c.suites for c in asked[1][0])


# -- every kernel in the interpreter


FIELDS = {"kernel", "dtype", "layout", "error_ratio", "ok", "reason"}


# Each dtype and each layout once a kernel: all twelve pairs are the bench's, and what the ops' own tests hold.
PAIRS = {"float32": ("contiguous", "transposed"), "bfloat16": ("every second column",), "float16": ("broadcast row",)}


def test_every_kernel_passes_in_the_interpreter(monkeypatch, capsys):
    for dtype, layouts in PAIRS.items():
        monkeypatch.setattr(interpret, "DTYPES", (dtype,))
        monkeypatch.setattr(interpret, "LAYOUTS", layouts)
        assert interpret.main() == 0
    checks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(set(one) == FIELDS for one in checks)
    assert [one for one in checks if not one["ok"]] == []
    seen = {(one["kernel"], one["dtype"], one["layout"]) for one in checks}
    assert {one["kernel"].partition("/")[0] for one in checks} == {m.rpartition(".")[2] for m in aot.KERNEL_MODULES}
    kernels = {f"activation/{kind}" for kind in ops.KINDS if kind != "none"}
    pairs = [(dtype, layout) for dtype, layouts in PAIRS.items() for layout in layouts]
    assert seen >= {(kernel, *pair) for kernel in kernels for pair in pairs}


def test_the_interpreter_check_fails_for_a_broken_kernel(monkeypatch):
    from trinix.kernels.triton import activation as kernels

    real = kernels.backward
    monkeypatch.setattr(kernels, "backward", lambda *call: real(*call) * 1.05)
    one = next(interpret._activations())
    assert not one["ok"]
    assert one["reason"].startswith("dx: error ")
    assert one["error_ratio"] > 1


def test_the_interpreter_check_has_a_process_of_its_own_and_may_be_left_early(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    checks = interpret.check()
    first = list(itertools.islice(checks, 3))
    checks.close()
    assert "TRITON_INTERPRET" not in os.environ
    assert [set(one) for one in first] == [FIELDS] * 3
    assert all(one["ok"] for one in first)


def test_an_interpreter_process_that_dies_is_an_error(tmp_path, monkeypatch):
    dying = tmp_path / "dying"
    dying.write_text(f"#!{sys.executable}\nraise SystemExit(3)\n")
    dying.chmod(0o755)
    monkeypatch.setattr(interpret.sys, "executable", str(dying))
    with pytest.raises(RuntimeError, match="exit status 3"):
        list(interpret.check())
