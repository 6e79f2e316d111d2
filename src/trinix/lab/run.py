"""Run cases: gate, then clocks, then the roofline guard, then a result line for every case, pass and implementation."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isfinite

import torch
from torch import Tensor

from trinix import device, testing
from trinix.lab import measure, peers, record, roofline
from trinix.lab.case import Case
from trinix.lab.peers import eager, trinix

ELEMENTWISE = {"activation"}  # judged slice by slice: the float64 tensors of a whole case may not fit the card
SLICE = 1 << 26


@dataclass
class Subject:
    """One implementation of one case: its callable once it passed the gate, or why it is not timed."""

    impl: str
    call: Callable | None = None
    reason: str | None = None
    error_ratio: float | None = None


def inputs_of(case: Case, where: str) -> tuple[list[Tensor], Tensor]:
    """(inputs, incoming gradient) of a case, normal, the same on every run on a device."""
    xs = [testing.normal(s, case.dtype, seed=i, device=where) for i, s in enumerate(case.shape.values())]
    return xs, testing.normal(xs[0].shape, case.dtype, seed=99, device=where)


def gate(case: Case, call: Callable, xs: Sequence[Tensor], dy: Tensor) -> tuple[str | None, float | None]:
    """(why the output or a gradient misses its budget or None, the worst error ratio if it is finite)."""
    got = testing.vjp(call, xs, dy)
    oracle = eager.prepare(case)
    worst, reason = 0.0, None
    for part in _slices(case, xs, dy, got):
        part_xs, part_dy, part_got = part
        low = testing.vjp(oracle, part_xs, part_dy)
        true = testing.vjp(oracle, [t.double() for t in part_xs], part_dy.double())
        names = ("y", *(f"d{name}" for name in case.shape))
        for name, g, p, t in zip(names, part_got, low, true, strict=True):
            verdict = testing.judge(name, g, p, t)
            # a wrong NaN, infinity or shape has no finite ratio: null in the result line
            worst = max(worst, verdict.ratio) if worst is not None and isfinite(verdict.ratio) else None
            reason = reason or (None if verdict.ok else f"misses its error budget: {verdict}")
    return reason, worst


def _slices(case, xs, dy, got) -> Iterator[tuple]:
    if case.op not in ELEMENTWISE or dy.numel() <= SLICE:
        yield xs, dy, got
        return
    for start in range(0, dy.numel(), SLICE):
        cut = slice(start, start + SLICE)
        yield [t.flatten()[cut] for t in xs], dy.flatten()[cut], [t.flatten()[cut] for t in got]


def admit(case: Case, impl: str, xs: Sequence[Tensor], dy: Tensor) -> Subject:
    """Prepare an implementation and put it through the gate. One that raises is a failed row, not the end of the run."""
    try:
        prepared = peers.PREPARE[impl](case)
        if isinstance(prepared, str):
            return Subject(impl, reason=f"skipped: {prepared}")
        reason, ratio = gate(case, prepared, xs, dy)
    except Exception as error:
        # out of memory, a compiler that fails, Unsupported, no gradient; Triton's errors have a base class of their own
        if not isinstance(error, RuntimeError | AssertionError) and not type(error).__module__.startswith("triton."):
            raise
        return Subject(impl, reason=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    return Subject(impl, None if reason else prepared, reason, ratio)


def pass_call(pass_: str, call: Callable, xs: Sequence[Tensor], dy: Tensor) -> Callable:
    """A callable without arguments that runs one pass; "bwd" records its forward now and runs only the backward."""
    if pass_ == "fwd":
        return lambda: call(*xs)
    leaves = [t.detach().requires_grad_() for t in xs]
    if pass_ == "fwd_grad":
        return lambda: call(*leaves)
    if pass_ == "bwd":
        y = call(*leaves)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
    return lambda: torch.autograd.grad(call(*leaves), leaves, dy)


def peak_mib(clock: measure.Gpu, pass_: str, call: Callable, xs: Sequence[Tensor], dy: Tensor) -> float:
    """The pass's peak over its inputs (and dy). Backward: what forward kept for it, its output dropped, and the gradients."""
    if pass_ != "bwd":
        run = pass_call(pass_, call, xs, dy)
        run()  # torch.compile compiles the form without gradient here, not under the meter
        return clock.peak_mib(run)
    gc.collect()
    before = torch.cuda.memory_allocated()
    leaves = [t.detach().requires_grad_() for t in xs]
    y = call(*leaves)
    edge = torch.autograd.graph.get_gradient_edge(y)
    del y
    return clock.peak_mib(lambda: torch.autograd.grad(edge, leaves, dy), before=before)


def run_gpu(case: Case, impls: Sequence[str], clock: measure.Gpu) -> list[dict]:
    """All result lines of one case on this machine's GPU."""
    xs, dy = inputs_of(case, "cuda")
    subjects = [admit(case, impl, xs, dy) for impl in impls]
    inputs_mib = sum(t.untyped_storage().nbytes() for t in xs) / 2**20
    lines = []
    for pass_ in case.passes:
        torch.cuda.empty_cache()
        here = inputs_mib + (dy.untyped_storage().nbytes() / 2**20 if "bwd" in pass_ else 0)
        lines += _time_pass(case, pass_, subjects, xs, dy, clock, here)
    check_totals(lines)
    return lines


def _time_pass(case, pass_, subjects, xs, dy, clock, inputs_mib) -> list[dict]:
    live = {s.impl: s.call for s in subjects if s.call}
    peaks = {impl: peak_mib(clock, pass_, call, xs, dy) for impl, call in live.items()}
    calls = {impl: pass_call(pass_, call, xs, dy) for impl, call in live.items()}
    work = roofline.work(case, pass_)
    probes = roofline.traffic_probes(work.bytes) if work and work.bytes else {}
    device_ms = clock.device_ms(calls | probes)
    copy_ms = device_ms["copy"].p50 if probes else None
    ceiling_ms = min((device_ms[p].p50 for p in probes), default=None)
    wall_ms, host_us = clock.wall_ms(calls), clock.host_us(calls)
    card = device.card()
    lines = []
    for subject in subjects:
        known = {
            "case": case.id,
            "op": case.op,
            "pass": pass_,
            "impl": subject.impl,
            "error_ratio": subject.error_ratio,
        }
        known |= {"bytes": work.bytes, "flops": work.flops, "ceiling": work.ceiling} if work else {}
        if subject.call is None:
            lines.append(record.line(**known, ok=False, reason=subject.reason))
            continue
        spread = device_ms[subject.impl]
        wrong = roofline.impossible(spread.p50, work.bytes, ceiling_ms, card) if work and ceiling_ms else None
        leaves = xs if pass_ == "fwd" else [t.detach().requires_grad_() for t in xs]
        lines.append(
            record.line(
                **known,
                backend=trinix.backend_of(case, subject.impl, *leaves),
                device_ms=asdict(spread),
                host_us=round(host_us[subject.impl], 2),
                wall_ms=round(wall_ms[subject.impl], 6),
                graph_ms=round(clock.graph_ms(calls[subject.impl]), 6) if pass_ in ("fwd", "fwd_bwd") else None,
                peak_mib=round(peaks[subject.impl], 4),
                inputs_mib=round(inputs_mib, 4),
                ceiling_share=round(copy_ms / spread.p50, 4) if copy_ms and spread.p50 else None,
                ok=wrong is None,
                reason=wrong,
            )
        )
    return lines


def check_totals(lines: list[dict]) -> None:
    """Mark a forward-and-backward that is faster than its own forward or backward: it cannot have run both."""
    times = {(one["impl"], one["pass"]): one["device_ms"]["p50"] for one in lines if one["device_ms"]}
    for one in lines:
        if one["pass"] != "fwd_bwd" or not one["ok"] or not one["bytes"]:
            continue
        part = max(times.get((one["impl"], p), 0.0) for p in ("fwd", "bwd"))
        if one["device_ms"]["p50"] * roofline.MARGIN + roofline.MARGIN_MS < part:
            one |= {"ok": False, "reason": f"forward and backward together are faster than one of them ({part:.4f} ms)"}


def run_cpu(case: Case, impls: Sequence[str]) -> list[dict]:
    """PyTorch CPU times of a case: gated like any other, and no statement about a kernel."""
    xs, dy = inputs_of(case, "cpu")
    subjects = [
        Subject(impl, reason="skipped: a kernel's backend has no CPU time")
        if ":" in impl
        else admit(case, impl, xs, dy)
        for impl in impls
    ]
    lines = []
    for pass_ in ("fwd", "fwd_bwd"):
        calls = {s.impl: pass_call(pass_, s.call, xs, dy) for s in subjects if s.call}
        times = measure.cpu_ms(calls)
        for s in subjects:
            known = {"case": case.id, "op": case.op, "pass": pass_, "impl": s.impl, "error_ratio": s.error_ratio}
            if s.call is None:
                lines.append(record.line(**known, ok=False, reason=s.reason))
                continue
            lines.append(
                record.line(
                    **known,
                    backend=f"cpu:{trinix.backend_of(case, s.impl, *xs)}",
                    wall_ms=times[s.impl].p50,
                    ok=True,
                )
            )
    return lines
