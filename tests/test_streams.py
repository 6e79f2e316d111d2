"""Several streams and several threads of one card at once: no kernel's counters, sums or waiting programs meet another's."""

import pytest
import torch

from card_calls import CALLS
from helpers import captured, from_threads
from trinix import ops
from trinix.testing import normal

pytestmark = pytest.mark.gpu
ROUNDS = 12


@pytest.mark.parametrize("name", CALLS)
def test_streams_at_once_give_what_each_gives_alone(name):
    """The default stream among them: it keeps what others get anew."""
    call = CALLS[name]
    runs = [call.prepared("cuda", seed=1000 * i) for i in range(3)]
    wanted = [run() for run in runs]
    torch.cuda.synchronize()
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    torch.cuda._sleep(20_000_000)  # on the default stream: there is work for all when it ends
    for _ in range(ROUNDS):
        for run, stream, one in zip(runs, streams, wanted, strict=True):
            with torch.cuda.stream(stream):
                results.append((run(), one))
    torch.cuda.synchronize()
    for got, one in results:
        call.check(got, one)


HOPPER = [name for name in CALLS if "Hopper" in name or "clusters" in name]
BESIDE = [name for name in HOPPER if "lengths" not in name] + ["softmax, long columns"]  # lengths come from the host


@pytest.mark.parametrize("name", BESIDE)
def test_a_graph_beside_its_streams_gives_what_it_gives_alone(name):
    call = CALLS[name]
    runs = [call.prepared("cuda", seed=1000 * i) for i in range(2)]
    wanted = [[t.clone() for t in run()] for run in runs]
    graph, replayed = captured(runs[0])
    side, results = torch.cuda.Stream(), []
    torch.cuda.synchronize()
    for _ in range(ROUNDS):
        with torch.cuda.stream(side):
            graph.replay()
        results.append(runs[1]())
    torch.cuda.synchronize()
    call.check(replayed, wanted[0])
    for got in results:
        call.check(got, wanted[1])


@pytest.mark.parametrize("own_streams", [False, True], ids=["one stream", "a stream each"])
@pytest.mark.parametrize("name", ["silu", "softmax, long columns", "attention by Triton", "swiglu", *HOPPER])
def test_threads_at_once_give_what_each_gives_alone(name, own_streams):
    call = CALLS[name]
    runs = [call.prepared("cuda", seed=1000 * i) for i in range(3)]
    wanted = [run() for run in runs]
    torch.cuda.synchronize()

    def several(run):
        with torch.cuda.stream(torch.cuda.Stream() if own_streams else torch.cuda.default_stream()):
            return [run() for _ in range(ROUNDS)]

    results = from_threads(*[lambda run=run: several(run) for run in runs])
    torch.cuda.synchronize()
    for all_of_one, one in zip(results, wanted, strict=True):
        for got in all_of_one:
            call.check(got, one)


def test_threads_that_need_a_kernel_which_nobody_has_compiled():
    q = normal((1, 200, 2, 64), torch.bfloat16, seed=1, device="cuda")
    gate = normal((64, 1000), torch.bfloat16, seed=2, device="cuda")
    w = normal((2, 64, 96), torch.bfloat16, seed=3, device="cuda", scale=0.1)
    calls = (
        lambda: ops.attention(q, q, q, window=(41, 3), softcap=13.0),
        lambda: ops.glu(gate, gate, "quick_geglu", backend="triton"),
        lambda: ops.head_mlp(q[0].transpose(0, 1), w, w.mT, "mish", backend="triton"),
        lambda: ops.layer_norm(gate, 1000, backend="triton"),
    )
    for call in calls:
        first, *others = from_threads(*[call] * 4)
        assert bool(first.isfinite().all())
        for other in others:
            assert torch.equal(first, other)
        assert torch.equal(first, call())
