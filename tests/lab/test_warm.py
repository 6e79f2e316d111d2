"""Compiling ahead of the clocks: who is called, what becomes of failures, and that the clocks come after it."""

import io
import pickle
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from rich.console import Console

from trinix import device, dispatch
from trinix.lab import bench, run, warm
from trinix.lab.case import Case


def case(id_="tiny", op="activation", args=None, shape=None):
    return Case(
        id=id_, op=op, args=args or {"kind": "mish"}, shape=shape or {"x": (3, 5)}, dtype=torch.float32,
        passes=("fwd", "bwd"), document="-", gpu="-", suites=("full",),
    )  # fmt: skip


def test_what_compiles_nothing_is_no_job():
    cases = case("a"), case("b")
    assert [(c.id, impl) for c, impl in warm.jobs(cases, ("trinix", "eager", "compile", "cudnn"))] == [
        ("a", "trinix"), ("a", "compile"), ("b", "trinix"), ("b", "compile"),
    ]  # fmt: skip


def test_processes_run_every_pass_and_say_what_failed():
    cases = case("good"), case("bad", args={"kind": "mush"})
    (reason,) = warm.compile_all(cases, ["trinix", "eager"], 1, device="cpu")
    assert reason.startswith("bad trinix: ")
    assert "mush" in reason


def test_a_pass_that_fails_is_told(monkeypatch):
    ran = []

    def pass_call(pass_, call, inputs):
        ran.append(pass_)
        return lambda: call(*inputs.tensors)

    monkeypatch.setattr(run, "pass_call", pass_call)
    assert warm._once(case(), "trinix", "cpu") is None
    assert ran == ["fwd", "bwd"]
    monkeypatch.setitem(warm.PREPARE, "liger", lambda case: 1 / 0)
    assert warm._once(case(), "liger", "cpu") == "tiny liger: ZeroDivisionError: division by zero"
    monkeypatch.setitem(warm.PREPARE, "liger", lambda case: "not installed")
    assert warm._once(case(), "liger", "cpu") is None


def test_a_process_that_is_killed_leaves_the_rest_to_the_clocks(monkeypatch):
    class Pool:
        def __init__(self, *arguments, **more):
            self.killed = Future()
            self.killed.set_exception(BrokenProcessPool("killed"))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, *call):
            return self.killed

    monkeypatch.setattr(warm, "ProcessPoolExecutor", Pool)
    assert warm.compile_all([case()], ["trinix"], 1) == ["a process has ended: killed"]


@pytest.mark.parametrize("helps", [True, False])
def test_what_finds_no_room_beside_the_others_is_called_again_when_they_have_ended(helps, monkeypatch):
    """Six processes with N-rms-6's 14 GiB each filled a card of 80."""
    order = []

    class Pool:
        def __init__(self, *arguments, **more):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, call, case, *more):
            order.append(case.id)
            done = Future()
            done.set_result(call(case, *more))
            return done

    def prepare(case):
        def large(x):
            if case.id == "large" and not (helps and order.count("large") == 2):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return x * 2

        return large

    monkeypatch.setattr(warm, "ProcessPoolExecutor", Pool)
    monkeypatch.setitem(warm.PREPARE, "liger", prepare)
    told = []
    failed = warm.compile_all(
        [case("large"), case("small")], ["liger"], 2, device="cpu", progress=lambda *done: told.append(done)
    )
    assert order == ["large", "small", "large"]
    assert failed == ([] if helps else ["large liger: OutOfMemoryError: CUDA out of memory"])
    assert told == [(1, 2), (2, 2)]


def test_a_reason_of_no_room_comes_back_from_a_process_as_one():
    """By pickle."""
    reason = pickle.loads(pickle.dumps(warm._NoRoom("large")))
    assert isinstance(reason, warm._NoRoom)
    assert reason == "large"


def test_what_a_row_will_say_is_refused_is_no_failure(monkeypatch):
    def refuse(*inputs):
        raise dispatch.Unsupported("op: backend 'hopper' takes long rows, got 8; use backend='auto'")

    monkeypatch.setitem(warm.PREPARE, "trinix:hopper", lambda case: refuse)
    assert warm._once(case(), "trinix:hopper", "cpu") is None


@pytest.mark.parametrize(
    ("processors", "cases", "processes"), [(16, 108, 8), (6, 108, 3), (2, 108, 1), (1, 108, 0), (64, 3, 0), (64, 9, 2)]
)
def test_processes_leave_half_of_the_processors_and_a_few_cases_need_none(processors, cases, processes, monkeypatch):
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda process: range(processors))
    assert bench.processes_for([case()] * cases) == processes


@pytest.mark.parametrize(
    ("asked", "processes"), [({"warm": None}, [4]), ({"warm": 0}, []), ({"warm": 3}, [3]), ({}, [])], ids=str
)
def test_a_bench_on_a_gpu_compiles_ahead_in_the_processes_that_it_is_told(asked, processes, monkeypatch, tmp_path):
    """In none by itself: a script's call may have no main guard. The command line asks for None."""
    seen = []
    monkeypatch.setattr(device, "card", lambda *index: device.Card("Some card", "sm_90", 132, 80.0))
    monkeypatch.setattr(bench, "_compile_ahead", lambda cases, impls, processes, console: seen.append(processes))
    monkeypatch.setattr(bench, "_on_gpu", lambda *call: 0)
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda process: range(8))
    screen = Console(file=io.StringIO(), width=200)
    assert bench.bench(suite="seeds", ops=["activation"], out=tmp_path, console=screen, **asked) == 0
    assert seen == processes


@pytest.mark.parametrize(("ids", "resume"), [((), False), (["b*"], False), ((), True)], ids=str)
def test_clocks_start_after_it_and_what_a_resumed_run_has_is_not_compiled(monkeypatch, tmp_path, ids, resume):
    order = []
    line = {"case": "a", "impl": "trinix"}
    monkeypatch.setattr(bench.record, "kept", lambda folder, name: [line] if folder.parent == tmp_path else [])
    monkeypatch.setattr(device, "card", lambda *index: device.Card("Some card", "sm_90", 132, 80.0))

    def compile_all(cases, impls, processes, *, progress):
        order.append([c.id for c in cases])
        return ["no"]

    monkeypatch.setattr(bench.ahead, "compile_all", compile_all)
    monkeypatch.setattr(bench, "_on_gpu", lambda *call: order.append("clocks") or 0)
    screen = Console(file=io.StringIO(), width=200)
    assert bench.bench_cases([case("a"), case("b")], ["trinix"], tmp_path, screen, ids=ids, resume=resume, warm=4) == 0
    assert order == [["b"] if ids or resume else ["a", "b"], "clocks"]
    assert "1 could not be compiled ahead: no" in screen.file.getvalue()
