"""Compiling ahead of the clocks: what a run needs is compiled in several processes, each of which leaves it in the caches on
disk (Triton's, inductor's, CuTe's). Nothing is judged or timed here; what fails here fails again in its row, with its reason.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from trinix import dispatch
from trinix.lab import gate, run
from trinix.lab.case import Case
from trinix.lab.peers import PREPARE

READY = ("eager", "cudnn", "fa2", "seed_formula")  # implementations that compile nothing


def jobs(cases: Sequence[Case], impls: Sequence[str]) -> list[tuple[Case, str]]:
    """Who has to compile what. Neighbours are of different implementations, so that no process gets only the slow ones."""
    return [(case, impl) for case in cases for impl in impls if impl not in READY]


class _NoRoom(str):
    """A reason that the other processes may be: the card's memory was theirs."""


def compile_all(
    cases: Sequence[Case],
    impls: Sequence[str],
    processes: int,
    *,
    device: str = "cuda",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Call every implementation of every case once a pass, spread over processes; the reasons of those that could not be. What
    found no room on the card beside the others is called again by itself."""
    todo = jobs(cases, impls)
    failed, alone = [], []
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            calls = {pool.submit(_once, case, impl, device): (case, impl) for case, impl in todo}
            for done, call in enumerate(as_completed(calls), start=1):
                progress(done, len(todo))
                if isinstance(call.result(), _NoRoom):
                    alone.append(calls[call])
                elif reason := call.result():
                    failed.append(reason)
            for case, impl in alone:
                if reason := pool.submit(_once, case, impl, device).result():
                    failed.append(reason)
        except BrokenProcessPool as error:  # killed for memory, say: the rest compiles when it is its turn
            failed.append(f"a process has ended: {error}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _once(case: Case, impl: str, device: str) -> str | None:
    reason = None
    try:
        _every_pass(case, impl, device)
    except dispatch.Unsupported:  # a refusal: the row says so
        pass
    except Exception as error:
        kind = _NoRoom if isinstance(error, torch.OutOfMemoryError) else str
        reason = kind(f"{case.id} {impl}: {run.reason_of(impl, error)}")
    if device == "cuda":
        torch.cuda.empty_cache()  # now that its tensors are gone: the other processes need the room
    return reason


def _every_pass(case: Case, impl: str, device: str) -> None:
    call = PREPARE[impl](case)
    if not callable(call):
        return
    inputs = gate.inputs_of(case, device)
    for pass_ in case.passes:
        run.pass_call(pass_, call, inputs)()
    if device == "cuda":
        torch.cuda.synchronize()
