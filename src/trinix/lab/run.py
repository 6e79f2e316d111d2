"""Run cases: gate, then clocks, then the roofline guard, then a result line for every case, pass and implementation."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from trinix import device
from trinix.lab import gate, measure, peers, record, roofline
from trinix.lab.case import Case
from trinix.lab.gate import Inputs
from trinix.lab.peers import trinix


@dataclass
class Subject:
    """One implementation of one case: its callable once it passed the gate, or why it is not timed."""

    impl: str
    call: Callable | None = None
    reason: str | None = None
    error_ratio: float | None = None
    overwrites: bool = False

    def own(self, inputs: Inputs) -> Inputs:
        """What it may have: the inputs that all share, or copies where it would write into them."""
        return inputs.copy() if self.overwrites else inputs


def reason_of(impl: str, error: Exception) -> str:
    """What an implementation raised, in one line for its row. A mistake of the lab's own is raised again."""
    expected = isinstance(error, RuntimeError | AssertionError)  # out of memory, Unsupported, no gradient
    # Triton's errors have a base class of their own; rivals and trinix may raise anything
    expected |= type(error).__module__.startswith("triton.") or impl in peers.FOREIGN or impl.startswith("trinix")
    if not expected:
        raise error
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def admit(case: Case, impl: str, oracle: gate.Oracle) -> Subject | None:
    """Prepare an implementation and put it through the gate; None where it has no such op."""
    overwrites = peers.overwrites(impl, case)
    try:
        prepared = peers.PREPARE[impl](case)
        if prepared is None:
            return None
        if isinstance(prepared, str):
            return Subject(impl, reason=f"skipped: {prepared}")
        prepared = _layers(prepared, case.args.get("layers", 1))
        if impl.startswith("trinix") and oracle.inputs.tensors[0].is_cuda:
            # what is judged is what is timed: a later call of its kind goes by what the first kept
            gate.derive(prepared, oracle.inputs)
        reason, ratio = gate.gate(oracle, prepared, overwrites=overwrites)
    except Exception as error:
        return Subject(impl, reason=reason_of(impl, error))
    return Subject(impl, None if reason else prepared, reason, ratio, overwrites)


def _layers(call: Callable, layers: int) -> Callable:
    """The call as often as a model has such layers, each on the same input."""
    if layers == 1:
        return call

    def repeated(*xs):
        for _ in range(layers - 1):
            call(*xs)
        return call(*xs)

    return repeated


def subjects_of(case: Case, impls: Sequence[str], inputs: Inputs) -> list[Subject]:
    oracle = gate.Oracle(case, inputs)
    return [subject for impl in impls if (subject := admit(case, impl, oracle))]


def pass_call(pass_: str, call: Callable, inputs: Inputs) -> Callable:
    """A callable without arguments that runs one pass; "bwd" records its forward now and runs only the backward: that of a call
    whose like was made before, as all but the first two of a training run are."""
    xs, dys = inputs.tensors, inputs.dys
    if pass_ == "fwd":
        return lambda: call(*xs)
    leaves, wanting = inputs.leaves()
    if pass_ == "fwd_grad":
        return lambda: call(*leaves)
    if pass_ == "bwd":
        for _ in range(2):
            torch.autograd.grad(call(*leaves), wanting, dys)
        edges = _edges(call(*leaves))
        return lambda: torch.autograd.grad(edges, wanting, dys, retain_graph=True)
    return lambda: torch.autograd.grad(call(*leaves), wanting, dys)


def _edges(ys) -> tuple:
    """Where a backward starts, without the outputs themselves: what forward did not save is free again."""
    return tuple(torch.autograd.graph.get_gradient_edge(y) for y in (ys if isinstance(ys, tuple) else (ys,)))


def peak_mib(clock: measure.Gpu, pass_: str, call: Callable, inputs: Inputs) -> float:
    """The pass's peak over its inputs (and dys). Backward: what forward kept for it, its outputs dropped, and the gradients."""
    if pass_ != "bwd":
        run = pass_call(pass_, call, inputs)
        run()  # torch.compile compiles the form without gradient here, not under the meter
        return clock.peak_mib(run)
    gc.collect()
    before = torch.cuda.memory_allocated()
    leaves, wanting = inputs.leaves()
    edges = _edges(call(*leaves))
    return clock.peak_mib(lambda: torch.autograd.grad(edges, wanting, inputs.dys), before=before)


def run_gpu(case: Case, impls: Sequence[str], clock: measure.Gpu) -> list[dict]:
    """All result lines of one case on this machine's GPU."""
    torch.cuda.empty_cache()
    inputs = gate.inputs_of(case, "cuda")
    subjects = subjects_of(case, impls, inputs)
    gc.collect()
    gc.freeze()  # the meter collects before each reading: it need not walk through every import each time
    lines = []
    try:
        for pass_ in case.passes:
            torch.cuda.empty_cache()
            lines += _time_pass(case, pass_, subjects, inputs, clock)
        # after a fault that no later call of this process survives, every reason is that of another: not one line is kept
        torch.cuda.synchronize()
    except RuntimeError as error:
        fell = [(s.impl, s.reason) for s in subjects if s.reason] + [(one["impl"], one["reason"]) for one in lines]
        fell = [f"{impl}: {reason}" for impl, reason in fell if reason and not reason.startswith("skipped")]
        error.add_note(f"{case.id}; the first to fail: {fell[0] if fell else 'none'}")
        raise
    gc.unfreeze()
    check_totals(lines)
    return lines


@dataclass
class _Times:
    device_ms: Mapping[str, measure.Spread]
    wall_ms: Mapping[str, float]
    host_us: Mapping[str, float]


def _time_pass(case, pass_, subjects, inputs, clock) -> list[dict]:
    calls, peaks, failed = {}, {}, {}
    shared = inputs.dys if "bwd" in pass_ else ()
    inputs_mib = (inputs.nbytes + sum(t.untyped_storage().nbytes() for t in shared)) / 2**20
    for subject in (s for s in subjects if s.call):
        try:
            own = subject.own(inputs)
            peaks[subject.impl] = peak_mib(clock, pass_, subject.call, own)
            calls[subject.impl] = pass_call(pass_, subject.call, own)
            calls[subject.impl]()
            calls[subject.impl]()  # a backward that runs once only fails here
        except Exception as error:
            failed[subject.impl] = reason_of(subject.impl, error)
            calls.pop(subject.impl, None)
            torch.cuda.empty_cache()
    work = roofline.work(case, pass_)
    probes, scale = roofline.probes_of(work) if work and work.bytes else ({}, 1.0)
    times, fell = _clocked(clock, calls, probes)
    failed |= fell
    reached = {name: times.device_ms[name].p50 * scale for name in probes if name in times.device_ms}
    copy_ms, ceiling_ms = next(iter(reached.values()), None), min(reached.values(), default=None)
    timed = [s for s in subjects if s.call and s.impl not in failed]
    graphs = _graphs_ms(clock, pass_, timed, inputs, inputs_mib) if pass_ in ("fwd", "fwd_bwd") else {}
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
        if subject.call is None or subject.impl in failed:
            reason = failed.get(subject.impl, subject.reason)
            lines.append(record.line(**known, ok=False, reason=reason))
            continue
        spread = times.device_ms[subject.impl]
        # a backward right after its forward finds what that left in the cache
        cached = clock.l2_bytes if pass_ == "fwd_bwd" else 0
        wrong = None
        if ceiling_ms and work.flops:
            wrong = roofline.too_many_flops(spread.p50, work.flops, device.card())
        if ceiling_ms and not wrong and work.ceiling not in roofline.OF_PRODUCTS:
            wrong = roofline.impossible(spread.p50, work.bytes, ceiling_ms, device.card(), cached)
        leaves = inputs.tensors if pass_ == "fwd" else inputs.leaves()[0]
        lines.append(
            record.line(
                **known,
                backend=trinix.backend_of(case, subject.impl, *leaves),
                device_ms=asdict(spread),
                host_us=round(times.host_us[subject.impl], 2),
                host_relu_us=round(times.host_us[measure.RELU], 2),
                wall_ms=round(times.wall_ms[subject.impl], 6),
                graph_ms=graphs.get(subject.impl),
                peak_mib=round(peaks[subject.impl], 4),
                inputs_mib=round(inputs_mib, 4),
                ceiling_share=round(copy_ms / spread.p50, 4) if copy_ms and spread.p50 else None,
                ok=wrong is None,
                reason=wrong,
            )
        )
    return lines


def _clocked(clock, calls: Mapping[str, Callable], probes: Mapping[str, Callable]) -> tuple[_Times, dict[str, str]]:
    """(times of all calls that can be timed, why the others cannot). Who raised is found by calling each alone."""
    failed: dict[str, str] = {}
    while live := {impl: call for impl, call in calls.items() if impl not in failed}:
        try:
            return _Times(clock.device_ms(live | probes), clock.wall_ms(live), clock.host_us(live)), failed
        except Exception as error:
            # raised again if nobody who may raise it takes part
            together = reason_of(max(live, key=lambda impl: impl.startswith("trinix") or impl in peers.FOREIGN), error)
        torch.cuda.empty_cache()
        alone = {impl: why for impl, call in live.items() if (why := _fault(impl, call))}
        failed |= alone or dict.fromkeys(live, together)
    return _Times({}, {}, {}), failed


def _fault(impl: str, call: Callable) -> str | None:
    try:
        call()
        torch.cuda.synchronize()
    except Exception as error:
        return reason_of(impl, error)
    return None


# Of one graph, on at most 64 MiB of inputs each: launching it is then a small share of a short call's time.
_GRAPH_CALLS = 8


def _graphs_ms(clock, pass_: str, subjects, inputs: Inputs, inputs_mib: float) -> dict[str, float]:
    """Without those whose calls cannot be captured: that wait for the GPU, or whose copies of their memory do not fit. Where memory
    does not do for all graphs, those so far are timed before the next is captured."""
    count = _GRAPH_CALLS if inputs_mib <= 64 else 1
    times, replays = {}, {}

    def time_them():
        broken = [impl for impl, replay in replays.items() if _fault(impl, replay)]
        live = {impl: replay for impl, replay in replays.items() if impl not in broken}
        try:
            found = clock.graph_ms(live, count) if live else {}
        except RuntimeError as error:
            error.add_note(f"graphs that could not be replayed: {', '.join(broken) or 'none'}")
            raise
        times.update({impl: round(ms, 6) for impl, ms in found.items()})
        replays.clear()
        torch.cuda.empty_cache()

    try:
        sets = [inputs, *(inputs.copy() for _ in range(count - 1))]
    except torch.OutOfMemoryError:
        return times
    for subject in subjects:
        for _ in range(2):
            try:
                replays[subject.impl] = clock.captured([pass_call(pass_, subject.call, subject.own(s)) for s in sets])
                break
            except Exception as error:
                reason_of(subject.impl, error)
                if not replays or not isinstance(error, torch.OutOfMemoryError):
                    break
                time_them()
    if replays:
        time_them()
    return times


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
    inputs = gate.inputs_of(case, "cpu")
    subjects = subjects_of(case, [impl for impl in impls if ":" not in impl], inputs)
    kernels = [Subject(i, reason="skipped: a kernel's backend has no CPU time") for i in impls if ":" in i]
    subjects = sorted([*subjects, *kernels], key=lambda s: impls.index(s.impl))
    lines = []
    for pass_ in ("fwd", "fwd_bwd") if inputs.dys else ("fwd",):
        calls = {s.impl: pass_call(pass_, s.call, s.own(inputs)) for s in subjects if s.call}
        times = measure.cpu_ms(calls)
        for s in subjects:
            known = {"case": case.id, "op": case.op, "pass": pass_, "impl": s.impl, "error_ratio": s.error_ratio}
            if s.call is None:
                lines.append(record.line(**known, ok=False, reason=s.reason))
                continue
            lines.append(
                record.line(
                    **known,
                    backend=f"cpu:{trinix.backend_of(case, s.impl, *inputs.tensors)}",
                    wall_ms=times[s.impl].p50,
                    ok=True,
                )
            )
    return lines
