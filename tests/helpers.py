"""What the tests of several ops share."""

import concurrent.futures
import dataclasses
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trinix.testing import judge


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def dense(t, dtype=None):
    """A contiguous copy, so that the oracle knows nothing of layouts."""
    return t.to(dtype or t.dtype).clone(memory_format=torch.contiguous_format)


class Watch(TorchDispatchMode):
    """Keeps the names of the ops that it sees: what a FLOP counter or a checkpointing policy would see."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def right_or_refused(compute, wanted):
    """A backend may say no; it may not answer wrongly."""
    try:
        got = compute()
    except RuntimeError:
        return
    torch.testing.assert_close(got, wanted)


class Tagged(torch.Tensor):
    """A subclass that only carries its type."""


def skip_below(gib):
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free:.0f} GiB are free")


def captured(run, device=None):
    """(graph, its result): ``run`` warmed up on a side stream of ``device``, by default the current one, then captured."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):  # its default is a stream of the device that first captured
            result = run()
    return graph, result


def from_threads(*calls):
    """What the calls return, each from a thread of its own, all begun at once."""
    start = threading.Barrier(len(calls))

    def run(call):
        start.wait()
        return call()

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [one.result() for one in [pool.submit(run, call) for call in calls]]


def small_layer(case):
    """A lab case of a whole layer in a size for a CPU."""
    from trinix.lab import layers

    args = dict(case.args)
    if case.op == "attention_layers":
        args |= {"heads": 4, "kv_heads": {"gqa": 2, "mqa": 1}.get(args["layer"], 4), "head_dim": 16}
    few = {"latent_dim": 24, "q_latent_dim": 20, "hidden_dim": 48, "output_dim": 32}
    args |= {name: n for name, n in few.items() if name in args}
    case = dataclasses.replace(case, args=args, shape={"x": (2, 10, 32)})
    parameters = {name: tuple(p.shape) for name, p in layers.module_of(case).named_parameters()}
    return dataclasses.replace(case, shape=case.shape | parameters)


def pooled(few):
    """Verdicts on (name, got, low, true) of few numbers, all calls of a dtype together: one call's say little."""
    for dtype in {t.dtype for _, t, _, _ in few}:
        parts = [[t.flatten() for t in four[1:]] for four in few if four[1].dtype == dtype and four[1].numel()]
        largest = [true.masked_fill(~true.isfinite(), 0).abs().max() for _, _, true in parts]
        powers = [2.0 ** n.clamp_min(1e-6).log2().floor() for n in largest]  # exact to divide by
        yield judge(
            "few", *(torch.cat([t / p for t, p in zip(row, powers, strict=True)]) for row in zip(*parts, strict=True))
        )
