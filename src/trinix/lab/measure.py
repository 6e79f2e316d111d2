"""The only clocks of the lab. Four of them, never mixed:

device_ms   what the GPU spends on a call: events on an idle stream, L2 cold, the host's time hidden behind a spin
host_us     what the CPU spends to enqueue a call, at best
wall_ms     one call after another, as a program that does nothing else sees it
graph_ms    a call of several that one CUDA graph replays, each on inputs of its own, L2 cold

and memory, measured as the allocator's peak over what was there before the call.
"""

import gc
import itertools
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

_NOTHING = "(nothing)"
RELU = "(F.relu)"  # of a small tensor: what a call costs a host, to be compared with
SPIN_GHZ = 2.0  # at least the highest SM clock: the spin is never shorter than asked
_LONGEST_SPIN = int(20_000_000 * SPIN_GHZ)  # clocks: 20 ms
_TRIES = 5  # at a repetition that the GPU begins too early


@dataclass(frozen=True)
class Spread:
    """Quantiles of a sample, in ms."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, sample: list[float]) -> "Spread":
        ordered = sorted(sample)
        at = [ordered[min(len(ordered) - 1, int(len(ordered) * q))] for q in (0.2, 0.5, 0.8)]
        return cls(*(round(v, 6) for v in at))


class Gpu:
    """Clocks for CUDA calls. One instance holds the buffer that clears the L2 cache.

    Args:
        runs: how many times a call is timed for its device_ms, whatever that takes; None lets a budget of seconds decide.
    """

    def __init__(self, l2_bytes: int | None = None, runs: int | None = None):
        self.runs = runs
        self.l2_bytes = l2_bytes or torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(4 * self.l2_bytes, 64 << 20), dtype=torch.int8, device="cuda")

    def device_ms(
        self, calls: Mapping[str, Callable], *, rounds: int = 10, budget_s: float = 0.45
    ) -> dict[str, Spread]:
        """Time several calls interleaved: round by round, each in turn, in an order drawn anew.

        A repetition counts where the host had enqueued the whole call before the GPU began it; another is taken, behind a spin
        twice as long, where not (a host that other work disturbs was seen to add 0.2 ms to a call of 8 us). A call that waits
        for the GPU itself is never enqueued in time: its repetitions all count.

        A call that launches nothing shows the events' own distance (about 1.5 us); it is reported as 0.
        """
        calls = {**calls, _NOTHING: lambda: None}
        spin = {
            n: min(int((2.5 * self._spin_us(call) + 30) * 1000 * SPIN_GHZ), _LONGEST_SPIN) for n, call in calls.items()
        }
        names = list(calls)
        cost = sum(self._once(calls[n], spin[n]) for n in names)
        if self.runs is None:
            # five at least: under a power limit one kernel's medians of three rounds (3 ms a call) were 3% apart
            rounds, reps = _plan(cost, budget_s, rounds, (2, 20), fewest=5)
        else:
            rounds, reps = min(rounds, self.runs), -(-self.runs // min(rounds, self.runs))

        enough, waits = dict(spin), set()

        def repeat(name: str) -> list[float]:
            events = [_events() for _ in range(reps)]
            for start, end in events:
                for _ in range(1 if name in waits else _TRIES):
                    self._record(calls[name], spin[name], start, end)
                    if not start.query():
                        break
                    spin[name] = min(2 * spin[name], _LONGEST_SPIN)
                else:
                    waits.add(name)
                    spin[name] = enough[name]
            torch.cuda.synchronize()
            return [start.elapsed_time(end) for start, end in events]

        loops = _interleave({n: n for n in names}, rounds, repeat)
        sample = {n: [ms for loop in s for ms in loop] for n, s in loops.items()}
        spreads = {n: Spread.of(s) for n, s in sample.items()}
        least = spreads.pop(_NOTHING).p50 * 1.5  # the median: one odd round must not hide a real kernel
        return {n: s if s.p50 > least else Spread(0.0, 0.0, 0.0) for n, s in spreads.items()}

    def _spin_us(self, call: Callable) -> float:
        """Microseconds to enqueue the call, from few calls where each takes the GPU long."""
        few = _loop_ms(call, 1, warm=1) > 1.0
        return statistics.mean(_enqueue_us(call, 2, warm=1) if few else _enqueue_us(call))

    def _record(self, call: Callable, spin: int, start, end) -> None:
        self._flush.zero_()
        # while the GPU spins the host enqueues the whole call; without it a short kernel would be timed as host time
        torch.cuda._sleep(spin)
        start.record()
        call()
        end.record()

    def _once(self, call: Callable, spin: int) -> float:
        """Seconds of one whole repetition, flush and spin included."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self._record(call, spin, *_events())
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    def host_us(self, calls: Mapping[str, Callable], *, rounds: int = 200, budget_s: float = 0.2) -> dict[str, float]:
        """Microseconds to enqueue a call: the best call of many interleaved rounds, the GPU idle before each; and of ``RELU``.

        The best, not the median: what a call costs on a core that nothing else disturbs is the same for every rival. A round
        is 6 calls of each, fewer where the GPU needs long for one, and as many of all: a call costs more behind few than behind
        many. (Of calls of the same code, 20 rounds, the one in loops of 3 took 1.045 of the one in loops of 6, standard
        deviation 0.02 and on a disturbed host 0.03, by the best loops' means; 1.00, 0.014 and 0.02 by the best calls of as
        many.) Rounds are 20 at least, if half a second holds them: the best of 11 read 14.1 us for a call of 11. A host
        can be slow for longer than all rounds of a row, by half and more: ``RELU`` then is so too.
        """
        x = torch.empty(1024, dtype=torch.bfloat16, device="cuda")
        calls = {**calls, RELU: lambda: torch.relu(x)}
        cost = [_loop_ms(call, 1, warm=1) for call in calls.values()]
        count, warm = max(3, min(6, int(2 / max(cost)))), 1 if max(cost) > 0.3 else _WARM
        once = (count + warm) * sum(cost) / 1000
        rounds, _ = _plan(once, budget_s, rounds, (1, 1), fewest=max(3, min(20, int(0.5 / once))))
        sample = _interleave(calls, rounds, lambda call: min(_enqueue_us(call, count, warm)))
        torch.cuda.synchronize()
        return {n: min(s) for n, s in sample.items()}

    def wall_ms(
        self, calls: Mapping[str, Callable], *, rounds: int = 200, loop_ms: float = 0.5, budget_s: float = 0.5
    ) -> dict[str, float]:
        """Milliseconds a call, back to back, one synchronisation at the end of each loop; medians of interleaved rounds, each the
        best of up to ten loops.

        A host that has other work besides adds to some loops and takes from none. Of four rivals that ran the same code, of 20 us, on
        a core that other work had a third of, the first took 1.002 of the best other's time by medians of all loops (standard
        deviation 0.003 to 0.005, 1.014 the most of 25) and 1.001 so (0.001, 1.003). Loops are short for the same reason: by loops
        of 2 ms that deviation was seven times what it was by 0.35. The end of a loop costs each rival the same few
        microseconds, shared by its calls.
        """
        cost = {call: _loop_ms(call, 2, warm=1) for call in calls.values()}
        count = {call: max(2 if ms > 0.5 else 4, min(50, int(loop_ms / ms))) for call, ms in cost.items()}
        warm = {call: 1 if ms > 1.0 else _WARM for call, ms in cost.items()}
        rounds, _ = _plan(sum((count[c] + warm[c]) * cost[c] for c in cost) / 1000, budget_s, rounds, (1, 1))
        sample = _interleave(calls, rounds, lambda call: _loop_ms(call, count[call], warm[call]))
        return {n: _undisturbed(s) for n, s in sample.items()}

    def captured(self, calls: Sequence[Callable]) -> Callable:
        """A replay of all of these, captured one behind the other in one CUDA graph.

        Every call has inputs of its own, so that each finds them outside of the L2 cache.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # of calls that launch nothing, as kind "none"
            with torch.cuda.graph(graph, stream=stream):
                kept = [call() for call in calls]

        # what the graph reads and writes lives as long as it: nothing else holds its addresses
        def replay(kept=(calls, kept)):
            graph.replay()

        return replay

    def graph_ms(self, replays: Mapping[str, Callable], calls: int) -> dict[str, float]:
        """Milliseconds a call of graphs of ``calls`` each, replayed in turn: one after the other, two rivals would find the card at
        two clocks, and under a power limit their ratio was 1.40 in one run and 1.55 in another."""
        spreads = self.device_ms(replays, rounds=5, budget_s=0.05 * len(replays))
        return {name: spread.p50 / calls for name, spread in spreads.items()}

    def peak_mib(self, call: Callable, *, before: int | None = None) -> float:
        """MiB that the allocator's peak rises during a call over ``before`` (bytes; now, if not given)."""
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated() if before is None else before
        torch.cuda.reset_peak_memory_stats()
        kept = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del kept
        return (peak - before) / 2**20


def cpu_ms(calls: Mapping[str, Callable], *, budget_s: float = 0.4) -> dict[str, Spread]:
    """Wall time of calls on the CPU, interleaved. PyTorch on a CPU: it says nothing about a GPU kernel."""
    for call in calls.values():
        call()
    cost = sum(_one_ms(call) for call in calls.values()) / 1000
    rounds = max(3, min(50, int(budget_s / max(cost, 1e-6))))
    return {n: Spread.of(s) for n, s in _interleave(calls, rounds, _one_ms).items()}


def _interleave(calls: Mapping, rounds: int, measure: Callable) -> dict[str, list]:
    """Measure each in turn, round by round, in an order drawn anew each time (the same in every run): a kernel behind one that
    heats the card is slower, and none always follows the same."""
    names = list(calls)
    sample = {n: [] for n in names}
    draw = random.Random(0)
    for _ in range(rounds):
        for name in draw.sample(names, len(names)):
            sample[name].append(measure(calls[name]))
    return sample


def _undisturbed(sample: Sequence[float]) -> float:
    """The median of rounds' best; few are rounds by themselves."""
    loops = max(1, min(10, len(sample) // 5))
    return statistics.median(min(sample[i : i + loops]) for i in range(0, len(sample), loops))


def _plan(cost_s: float, budget_s: float, rounds: int, reps: tuple[int, int], *, fewest: int = 3) -> tuple[int, int]:
    """(rounds, repetitions a round) for a budget, where one repetition of everything costs ``cost_s``.

    Fewer repetitions first, down to the least; then fewer rounds, ``fewest`` at least.
    """
    least, most = reps
    fit = budget_s / max(cost_s, 1e-6)
    return max(min(rounds, fewest), min(rounds, int(fit / least))), max(least, min(most, int(fit / rounds)))


_WARM = 2  # calls before a loop's clock starts: the loop before it ran other code, and its caches hold that


def _enqueue_us(call: Callable, calls: int = 10, warm: int = 5) -> list[float]:
    """Of each call."""
    for _ in range(warm):
        call()
    torch.cuda.synchronize()
    times = [time.perf_counter()]
    for _ in range(calls):
        call()
        times.append(time.perf_counter())
    return [(end - begin) * 1e6 for begin, end in itertools.pairwise(times)]


def _loop_ms(call: Callable, count: int, warm: int = _WARM) -> float:
    for _ in range(warm):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count * 1000


def _one_ms(call: Callable) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1000


def _events():
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
