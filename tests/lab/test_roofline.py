"""Gate, clocks and guards of the lab on a machine with no GPU: the card and its clock are stand-ins, the results are real."""

import collections
import contextlib
import gc
import itertools
import math
import statistics
import time
import weakref
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import trinix
from trinix import device
from trinix.lab import gate, measure, peers, record, roofline, run
from trinix.lab.case import Case, load_cases

H100 = device.Card("NVIDIA H100 80GB HBM3", "sm_90", 132, 79.6)
UNLISTED = device.Card("A card of tomorrow", "sm_999", 1, 1.0)
ALL_PASSES = ("fwd", "fwd_grad", "bwd", "fwd_bwd")


def case_of(kind="silu", shape=(8, 32), dtype=torch.bfloat16, passes=ALL_PASSES):
    return Case(f"tiny-{kind}", "activation", {"kind": kind}, {"x": shape}, dtype, passes, "trinix", "", ("full",))


# -- the least traffic


@pytest.mark.parametrize(
    ("kind", "dtype", "forward", "backward"),
    [
        ("none", torch.bfloat16, 0, 0),
        ("relu", torch.bfloat16, 4096, 4096 + 128),  # dy in, dx out, one bit an element
        ("relu", torch.float32, 8192, 8192 + 128),
        ("leaky_relu", torch.float16, 4096, 4096 + 128),
        ("silu", torch.bfloat16, 4096, 6144),  # x and dy in, dx out
        ("silu", torch.float32, 8192, 12288),
        ("mish", torch.float16, 4096, 6144),
        ("softplus", torch.float16, 4096, 6144),
    ],
)
def test_bytes_of_every_activation_pass(kind, dtype, forward, backward):
    case = case_of(kind, (4, 2, 128), dtype)
    moved = {p: roofline.work(case, p).bytes for p in ALL_PASSES}
    assert moved == {"fwd": forward, "fwd_grad": forward, "bwd": backward, "fwd_bwd": forward + backward}
    assert {roofline.work(case, p).ceiling for p in ALL_PASSES} == {"bandwidth"}


@pytest.mark.parametrize("kind", sorted(set(trinix.ops.KINDS) - {"none", "relu", "leaky_relu"}))
def test_a_kind_without_a_shorter_way_moves_two_tensors_forward_and_three_backward(kind):
    case = case_of(kind, (1024,), torch.bfloat16)
    assert roofline.work(case, "fwd").bytes == 2 * 1024 * 2
    assert roofline.work(case, "bwd").bytes == 3 * 1024 * 2


def test_an_op_without_a_model_has_no_limit_rather_than_a_guess():
    case = Case("S", "no_such_op", {}, {"x": (2, 2)}, torch.float32, ("fwd",), "trinix", "", ("full",))
    assert roofline.work(case, "fwd") is None


def attention_of(causal, **shape):
    shape = {"q": (2, 64, 8, 32), "k": (2, 128, 4, 32), "v": (2, 128, 4, 16)} | shape
    args = {"causal": causal, "layout": "BHSD"} if shape["q"][1] == 8 else {"causal": causal}
    return Case("A", "attention", args, shape, torch.bfloat16, ALL_PASSES, "trinix", "", ("full",))


def test_attention_multiplies_twice_forward_and_five_times_backward_and_of_causal_scores_the_half():
    pairs = 2 * 8 * 64 * 128
    works = {p: roofline.work(attention_of(False), p) for p in ALL_PASSES}
    assert works["fwd"].flops == works["fwd_grad"].flops == 2 * pairs * (32 + 16)
    assert works["bwd"].flops == 2 * pairs * (3 * 32 + 2 * 16)
    assert works["fwd_bwd"].flops == works["fwd"].flops + works["bwd"].flops
    assert works["fwd"].bytes == 2 * 2 * (64 * 8 * (32 + 16) + 128 * 4 * (32 + 16))
    assert {w.ceiling for w in works.values()} == {"matmul"}
    assert roofline.work(attention_of(True), "fwd").flops == works["fwd"].flops // 2
    turned = {"q": (2, 8, 64, 32), "k": (2, 4, 128, 32), "v": (2, 4, 128, 16)}
    assert roofline.work(attention_of(False, **turned), "bwd") == works["bwd"]


def test_a_glu_layer_is_held_against_its_bare_products_and_what_its_activation_moves(monkeypatch):
    shape = {"x": (2, 3, 8), "gate_up_proj.weight": (20, 8), "down_proj.weight": (8, 10)}
    args = {"kind": "swiglu", "hidden_dim": 10, "output_dim": 8, "bias": False}
    case = Case("G", "glu_layers", args, shape, torch.float32, ALL_PASSES, "trinix", "", ("full",))
    works = {p: roofline.work(case, p) for p in ALL_PASSES}
    assert {w.ceiling for w in works.values()} == {"projections"}
    assert [works[p].epilogue for p in ALL_PASSES] == [n * 6 * 10 * 4 for n in (3, 3, 5, 8)]
    copied = []
    monkeypatch.setattr(roofline, "traffic_probes", lambda moved: ({"copy": partial(copied.append, moved)}, 1.0))
    monkeypatch.setattr(roofline, "_products", partial(roofline._products, device="cpu"))
    for pass_, work in works.items():
        probes, scale = roofline.probes_of(work)
        with FlopCounterMode(display=False) as counter:
            probes["projections"]()
        assert counter.get_total_flops() * scale == work.flops
        assert copied.pop() == work.epilogue, pass_
    assert not copied


def test_decoding_reads_the_cache_once():
    shape = {"queries": (2, 1, 4, 8), "k_cache": (2, 6, 2, 8), "v_cache": (2, 6, 2, 4)}
    case = Case("D", "attention_decode", {}, shape, torch.bfloat16, ("fwd",), "trinix", "", ("full",))
    assert roofline.work(case, "fwd") == roofline.Work(2 * (2 * 6 * 2 * 12 + 2 * 4 * 12), 0, "read bandwidth")
    shape = {"queries": (2, 1, 4, 8), "k_cache": (2, 6, 2, 8)}
    case = Case("D", "attention_decode", {"latent": 4}, shape, torch.bfloat16, ("fwd",), "trinix", "", ("full",))
    assert roofline.work(case, "fwd").bytes == 2 * (2 * 6 * 2 * 8 + 2 * 4 * 12)


def test_a_time_above_the_listed_products_is_refused():
    assert "1000 TFLOP/s is above the listed 990 TFLOP/s" in roofline.too_many_flops(1.0, int(1e12), H100)
    assert roofline.too_many_flops(1.0, int(9.8e11), H100) is None
    assert roofline.too_many_flops(0.0, 1, H100) is not None
    assert roofline.too_many_flops(1.0, int(1e18), UNLISTED) is None


# -- the guard against impossible times


def test_a_time_above_the_listed_bandwidth_is_refused_with_both_rates():
    moved = int(3352e6)  # what an H100 moves in one ms at its listed best
    assert "3386 GB/s is above the listed 3352 GB/s" in roofline.impossible(0.99, moved, 0.5, H100)
    assert H100.name in roofline.impossible(0.99, moved, 0.5, H100)
    assert roofline.impossible(1.001, moved, 0.5, H100) is None


def test_a_time_below_the_measured_ceiling_is_refused_on_any_card():
    for card in (H100, UNLISTED):
        said = roofline.impossible(1.0, 1000, 1.2, card)
        assert "1.0000 ms is faster than this card moves the least bytes (1.2000 ms measured)" in said


@pytest.mark.parametrize("ceiling_ms", [0.0021, 0.01, 0.1, 1.0, 20.0])
def test_the_margin_is_four_percent_and_two_microseconds(ceiling_ms):
    least = (ceiling_ms - 0.002) / 1.04
    assert roofline.impossible(least * 1.001, 1000, ceiling_ms, UNLISTED) is None
    assert roofline.impossible(least * 0.999, 1000, ceiling_ms, UNLISTED)


def test_normal_times_pass():
    moved = 2 * 75497472 * 2  # X-relu-4096
    for ms in (0.10, 0.105, 0.2, 5.0):
        assert roofline.impossible(ms, moved, 0.102, H100) is None
        assert roofline.impossible(ms, moved, 0.102, UNLISTED) is None


def test_a_pass_that_moves_nothing_has_no_limit():
    assert roofline.impossible(0.0, 0, 1.0, H100) is None


def test_no_time_at_all_is_refused_where_bytes_have_to_move():
    assert "0" in roofline.impossible(0.0, 1000, 0.1, H100)


# -- a total against its parts


def timed(pass_, ms, impl="trinix", **known):
    known = {"case": "A", "op": "activation", "bytes": 1000, "ok": True} | known
    return record.line(impl=impl, device_ms={"p20": ms, "p50": ms, "p80": ms}, **known, **{"pass": pass_})


def test_a_total_faster_than_a_part_is_marked_and_names_the_part():
    for part in ("fwd", "bwd"):
        lines = [timed(part, 1.0), timed("fwd_bwd", 0.9)]
        run.check_totals(lines)
        assert not lines[1]["ok"]
        assert "faster than one of them (1.0000 ms)" in lines[1]["reason"]
        assert lines[0]["ok"]


@pytest.mark.parametrize("total", [0.96, 1.0, 1.5, 2.0, 3.0])
def test_a_total_at_least_its_longest_part_passes(total):
    lines = [timed("fwd", 0.5), timed("bwd", 1.0), timed("fwd_bwd", total)]
    run.check_totals(lines)
    assert all(one["ok"] for one in lines)


def test_totals_are_held_against_parts_of_their_own_implementation():
    lines = [timed("bwd", 1.0, "eager"), timed("fwd_bwd", 0.5), timed("fwd_bwd", 0.5, "eager")]
    run.check_totals(lines)
    assert [one["ok"] for one in lines] == [True, True, False]


def test_totals_of_what_was_not_timed_or_moves_nothing_are_left_alone():
    skipped = record.line(
        case="A", op="activation", impl="compile", ok=False, reason="skipped: no", **{"pass": "fwd_bwd"}
    )
    lines = [timed("bwd", 1.0), timed("fwd_bwd", 0.5, bytes=0), timed("fwd_bwd", 0.5, bytes=None, impl="x"), skipped]
    run.check_totals(lines)
    assert [one["reason"] for one in lines] == [None, None, None, "skipped: no"]


# -- the gate


def silu(*, y=lambda t: t, dx=lambda t: t):
    """A silu of our own, with a fault put into its output or its gradient."""

    class Silu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return y(F.silu(x))

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (grad,) = torch.autograd.grad(F.silu(leaf), leaf, dy)
            return dx(grad)

    return Silu.apply


def put(at, value):
    def change(t):
        t = t.clone()
        t.view(-1)[at] = value
        return t

    return change


def judged(call, shape=(8, 125), dtype=torch.bfloat16):
    case = case_of("silu", shape, dtype)
    return gate.gate(gate.Oracle(case, gate.inputs_of(case, "cpu")), call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cut", [1 << 26, 64])
def test_the_gate_lets_a_right_implementation_through(cut, dtype, monkeypatch):
    monkeypatch.setattr(gate, "SLICE", cut)
    reason, ratio = judged(silu(), dtype=dtype)
    assert reason is None
    assert 0.0 < ratio <= 3.0


FAULTS = {
    "wrong gradient": ("dx", {"dx": lambda t: t * 1.02}),
    "no gradient at all": ("dx", {"dx": torch.zeros_like}),
    "gradient of the wrong sign": ("dx", {"dx": torch.neg}),
    "output off by 2%": ("y", {"y": lambda t: t * 1.02}),
    "one wrong element": ("y", {"y": put(437, 1.0)}),
    "one wrong element of the gradient": ("dx", {"dx": put(437, 1.0)}),
    "one NaN": ("y", {"y": put(437, math.nan)}),
    "one NaN in the gradient": ("dx", {"dx": put(437, math.nan)}),
    "one infinity": ("y", {"y": put(437, math.inf)}),
    "other dtype": ("y", {"y": lambda t: t.float()}),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("cut", [1 << 26, 64])
def test_the_gate_refuses_a_broken_implementation_and_names_the_tensor(cut, fault, monkeypatch):
    monkeypatch.setattr(gate, "SLICE", cut)
    name, change = FAULTS[fault]
    reason, _ = judged(silu(**change))
    assert reason is not None
    assert reason.startswith(f"misses its error budget: {name}: ")


@pytest.mark.parametrize("at", [0, 63, 64, 500, 959, 960, 999])  # slices of 64, the last one of 40
@pytest.mark.parametrize("name", ["y", "dx"])
def test_the_gate_sees_a_single_wrong_slice(name, at, monkeypatch):
    monkeypatch.setattr(gate, "SLICE", 64)
    reason, _ = judged(silu(**{name: put(at, 3.0)}))
    assert reason is not None
    assert f" {name}: " in reason


def test_the_gate_slices_what_is_above_the_limit_only_and_loses_nothing(monkeypatch):
    case = case_of("silu", (8, 125))
    inputs = gate.inputs_of(case, "cpu")
    monkeypatch.setattr(gate, "SLICE", 64)
    parts = list(gate._slices(case, inputs, ("x",), 0))
    assert len(parts) == 16
    assert torch.equal(torch.cat([part.tensors[0] for part, _ in parts]), inputs.tensors[0].flatten())
    assert torch.equal(torch.cat([part.dys[0] for part, _ in parts]), inputs.dys[0].flatten())
    assert torch.equal(torch.cat([cut(inputs.dys[0]) for _, cut in parts]), inputs.dys[0].flatten())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_line_of_a_refused_implementation_can_be_written(value, tmp_path):
    reason, ratio = judged(silu(y=put(437, value)))
    file = record.ResultFile(tmp_path, "activation")
    known = {"case": "A", "op": "activation", "pass": "fwd", "impl": "eager"}
    file.add([record.line(**known, ok=False, reason=reason, error_ratio=ratio)])
    (one,) = record.read(file.finish())
    assert one["error_ratio"] is None, "an infinite ratio is no number, and a smaller one would be a lie"


def admitted(prepare, monkeypatch):
    monkeypatch.setitem(peers.PREPARE, "eager", prepare)
    case = case_of("silu")
    return run.admit(case, "eager", gate.Oracle(case, gate.inputs_of(case, "cpu")))


def test_what_passes_the_gate_is_admitted_with_its_call(monkeypatch):
    subject = admitted(lambda case: F.silu, monkeypatch)
    assert subject.call is F.silu
    assert subject.reason is None
    assert subject.error_ratio > 0


def out_of_memory(x):
    raise torch.OutOfMemoryError("CUDA out of memory.\nMore lines.")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: F.silu(x).flatten(), "shape"),
        (lambda x: F.silu(x)[:-1], "shape"),
        (out_of_memory, "OutOfMemoryError: CUDA out of memory."),
        (lambda x: F.silu(x.detach()), "carries no gradient"),
    ],
    ids=["other shape", "other size", "out of memory", "no gradient"],
)
def test_an_implementation_that_raises_is_a_row_with_a_reason_in_one_line(call, said, monkeypatch):
    subject = admitted(lambda case: call, monkeypatch)
    assert subject.call is None
    assert said in subject.reason
    assert "\n" not in subject.reason


def test_a_mistake_of_our_own_is_not_taken_for_a_reason(monkeypatch):
    def broken(case):
        raise AttributeError("no such thing")

    with pytest.raises(AttributeError):
        admitted(broken, monkeypatch)


# -- the whole run, with a card and a clock that are not there


class Clock:
    """Runs every call it is given and says the times it was told, by pass and name; half a ms for the rest."""

    l2_bytes = 0

    def __init__(self, **ms):
        self.ms, self.asked, self.replayed, self.graphs, self.metered = ms, [], [], 0, 0

    def device_ms(self, calls):
        self.asked.append(list(calls))
        for call in calls.values():
            call()
        told = [self.ms.get(f"{name}@{len(self.asked)}", self.ms.get(name, 0.5)) for name in calls]
        return {name: measure.Spread(ms * 0.9, ms, ms * 1.1) for name, ms in zip(calls, told, strict=True)}

    def wall_ms(self, calls):
        return dict.fromkeys(calls, 0.625)

    def host_us(self, calls):
        return dict.fromkeys(calls, 12.346) | {measure.RELU: 6.174}

    def captured(self, calls):
        self.graphs += 1
        self.in_graph = calls
        return calls[0]

    def graph_ms(self, replays, calls):
        self.replayed.append(list(replays))
        return dict.fromkeys(replays, 3.0 / calls)

    def peak_mib(self, call, *, before=None):
        self.metered += 1
        call()
        return 1.5


@pytest.fixture
def gpu(monkeypatch):
    """A machine that believes it has an H100; tensors stay on the CPU."""
    real = gate.inputs_of
    monkeypatch.setattr(gate, "inputs_of", lambda case, where: real(case, "cpu"))
    monkeypatch.setattr(device, "card", lambda index=0: H100)
    probes = {"copy": lambda: None, "add": lambda: None}
    monkeypatch.setattr(roofline, "traffic_probes", lambda moved, ceiling: (probes, 1.0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(run.gc, "collect", lambda: 0)  # a tenth of a second each
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(record, "_run", lambda *command: "")
    record.stamp.cache_clear()
    yield
    record.stamp.cache_clear()


def lines_of(lines, **wanted):
    return [one for one in lines if all(one[k] == v for k, v in wanted.items())]


IMPLS = tuple(impl for impl, prepare in peers.PREPARE.items() if prepare(case_of("silu")) is not None)


def test_a_fault_that_no_later_call_survives_ends_the_run_and_names_who_failed_first(gpu, monkeypatch):
    def fallen(*_):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setitem(peers.PREPARE, "eager", lambda case: fallen)
    assert len(run.run_gpu(case_of("silu", passes=("fwd",)), ["trinix", "eager"], Clock())) == 2
    monkeypatch.setattr(torch.cuda, "synchronize", fallen)
    with pytest.raises(RuntimeError, match="illegal") as failed:
        run.run_gpu(case_of("silu", passes=("fwd",)), ["trinix", "eager"], Clock())
    assert failed.value.__notes__[0].endswith("; the first to fail: eager: RuntimeError: an illegal memory access")


def test_every_pass_gives_a_line_for_every_implementation_in_order(gpu):
    lines = run.run_gpu(case_of("silu"), tuple(peers.PREPARE), Clock())  # some have no activations: no line
    assert [(one["pass"], one["impl"]) for one in lines] == [(p, i) for p in ALL_PASSES for i in IMPLS]
    assert {one["case"] for one in lines} == {"tiny-silu"}
    assert {one["gpu"] for one in lines} == {H100.name}


def test_a_timed_line_has_all_four_clocks_memory_share_and_error(gpu):
    clock = Clock(copy=0.25, add=0.24)
    lines = run.run_gpu(case_of("silu"), ["trinix", "eager"], clock)
    for one in lines:
        assert one["ok"] is True
        assert one["reason"] is None
        assert one["device_ms"] == {"p20": 0.45, "p50": 0.5, "p80": 0.55}
        assert (one["wall_ms"], one["host_us"], one["host_relu_us"], one["peak_mib"]) == (0.625, 12.35, 6.17, 1.5)
        assert one["graph_ms"] == (0.375 if one["pass"] in ("fwd", "fwd_bwd") else None)
        assert one["inputs_mib"] == round(512 * (2 if "bwd" in one["pass"] else 1) / 2**20, 4)
        assert one["bytes"] == {"fwd": 1024, "fwd_grad": 1024, "bwd": 1536, "fwd_bwd": 2560}[one["pass"]]
        assert one["ceiling_share"] == 0.5, "the copy's time over ours"
        assert 0 < one["error_ratio"] <= 3
    assert clock.asked == [["trinix", "eager", "copy", "add"]] * 4, "interleaved, with the ceiling's probes"
    assert clock.graphs == 4
    assert clock.replayed == [["trinix", "eager"]] * 2, "in turn, too"
    assert clock.metered == 8


def test_the_backend_that_really_ran_is_recorded(gpu):
    lines = run.run_gpu(case_of("silu"), ["trinix", "trinix:triton", "eager", "seed_formula"], Clock())
    ran = {one["impl"]: one["backend"] for one in lines}
    assert ran == {"trinix": "torch", "trinix:triton": "triton", "eager": "eager", "seed_formula": "seed_formula"}
    with trinix.use_backend("triton"):
        (one,) = run.run_gpu(case_of("silu", passes=("fwd",)), ["trinix"], Clock())
    assert one["backend"] == "triton"


def test_a_skipped_rival_says_why_and_is_not_timed(gpu):
    clock = Clock()
    lines = run.run_gpu(case_of("silu"), ["trinix", "compile"], clock)
    skipped = lines_of(lines, impl="compile")
    assert [one["pass"] for one in skipped] == list(ALL_PASSES)
    assert {one["reason"] for one in skipped} == {"skipped: timed on a GPU only"}
    assert all(one["ok"] is False and one["device_ms"] is None and one["backend"] is None for one in skipped)
    assert all("compile" not in asked for asked in clock.asked)


@pytest.mark.parametrize("impl", ["trinix", "eager"])
@pytest.mark.parametrize("fault", ["wrong gradient", "output off by 2%", "one wrong element"])
def test_an_implementation_that_misses_its_budget_is_not_timed_and_says_why(impl, fault, gpu, monkeypatch):
    name, change = FAULTS[fault]
    monkeypatch.setitem(peers.PREPARE, impl, lambda case: silu(**change))
    clock = Clock()
    lines = run.run_gpu(case_of("silu", (8, 125)), ["trinix", "eager"], clock)
    bad, good = lines_of(lines, impl=impl), [one for one in lines if one["impl"] != impl]
    assert [one["pass"] for one in bad] == list(ALL_PASSES)
    for one in bad:
        assert one["ok"] is False
        assert one["reason"].startswith(f"misses its error budget: {name}: error ")
        assert (one["device_ms"], one["wall_ms"], one["host_us"], one["peak_mib"]) == (None,) * 4
        assert one["error_ratio"] > 1
    assert len(good) == 4
    assert all(one["ok"] for one in good)
    assert all(impl not in asked for asked in clock.asked)


def test_a_time_faster_than_the_card_is_an_error_and_not_a_record(gpu):
    lines = run.run_gpu(case_of("silu", passes=("fwd",)), ["trinix", "eager"], Clock(trinix=0.3, copy=0.5, add=0.5))
    assert [one["ok"] for one in lines] == [False, True]
    assert "0.3000 ms is faster than this card" in lines[0]["reason"]
    assert lines[0]["device_ms"]["p50"] == 0.3, "the impossible figure stays visible"


@pytest.mark.parametrize("l2_bytes", [0, 1 << 20])
def test_only_a_backward_behind_its_forward_may_have_found_its_bytes_in_the_cache(l2_bytes, gpu):
    clock = Clock(copy=0.25, add=0.25, trinix=0.1)
    clock.l2_bytes = l2_bytes
    lines = run.run_gpu(case_of("silu"), ["trinix"], clock)
    assert [one["pass"] for one in lines if one["ok"]] == (["fwd_bwd"] if l2_bytes else [])


@pytest.mark.parametrize(("ms", "ok"), [(0.3, True), (0.1, False)])
def test_more_products_than_listed_are_an_error_where_bytes_are_the_ceiling_too(ms, ok, gpu, monkeypatch):
    shape = {"x": (2, 8, 16), "w1": (2, 16, 8), "w2": (2, 8, 16)}
    case = Case("tiny-mlp", "head_mlp", {"kind": "silu"}, shape, torch.bfloat16, ("fwd",), "trinix", "", ("full",))
    least = roofline.Work(1000, int(2e11), "bandwidth")
    monkeypatch.setattr(roofline, "work", lambda case, pass_: least)
    (one,) = run.run_gpu(case, ["trinix"], Clock(trinix=ms, copy=0.01, add=0.01))
    assert one["ok"] is ok
    assert ok or "2000 TFLOP/s is above the listed 990 TFLOP/s" in one["reason"]


def test_the_fastest_probe_is_the_limit_and_the_copy_is_what_shares_are_of(gpu):
    (one,) = run.run_gpu(case_of("silu", passes=("fwd",)), ["trinix"], Clock(trinix=0.46, copy=0.5, add=0.47))
    assert one["ok"]
    assert one["ceiling_share"] == round(0.5 / 0.46, 4)


def test_a_total_faster_than_its_backward_is_an_error_in_the_whole_run_too(gpu):
    clock = Clock(copy=0.1, add=0.1, **{"trinix@3": 0.9})  # its third pass: bwd
    lines = run.run_gpu(case_of("silu"), ["trinix", "eager"], clock)
    wrong = [(one["pass"], one["impl"]) for one in lines if not one["ok"]]
    assert wrong == [("fwd_bwd", "trinix")]


def test_an_implementation_that_launches_nothing_is_an_error_line(gpu):
    (one,) = run.run_gpu(case_of("silu", passes=("fwd",)), ["trinix"], Clock(trinix=0.0))
    assert not one["ok"]


def test_the_identity_has_no_probes_no_share_and_no_kernel(gpu):
    clock = Clock(trinix=0.0, eager=0.0)
    lines = run.run_gpu(case_of("none"), ["trinix", "trinix:triton", "eager"], clock)
    assert clock.asked == [["trinix", "eager"]] * 4
    for one in lines:
        assert one["ceiling_share"] is None
        assert one["ok"] is (one["impl"] != "trinix:triton")
    assert {one["reason"] for one in lines_of(lines, impl="trinix:triton")} == {"skipped: the identity runs no kernel"}


def test_an_op_without_a_model_is_timed_without_a_limit(gpu, monkeypatch):
    monkeypatch.delitem(roofline.WORK, "activation")
    lines = run.run_gpu(case_of("silu"), ["trinix"], Clock(trinix=1e-9))
    assert all(one["ok"] and one["bytes"] is None and one["ceiling"] is None for one in lines)


@pytest.mark.parametrize("pass_", ALL_PASSES)
def test_a_pass_runs_what_its_name_says(pass_, gpu):
    calls = {"forward": 0, "recorded": 0, "backward": 0}

    def call(x):
        calls["forward"] += 1
        calls["recorded"] += x.requires_grad
        y = x * 2
        if y.requires_grad:
            y.register_hook(lambda _: calls.__setitem__("backward", calls["backward"] + 1))
        return y

    inputs = gate.inputs_of(case_of(), "cpu")
    timed_call = run.pass_call(pass_, call, inputs)
    before = dict(calls)
    assert before == dict.fromkeys(calls, 0) | ({"forward": 3, "recorded": 3, "backward": 2} if pass_ == "bwd" else {})
    result = timed_call()
    done = {k: calls[k] - before[k] for k in calls}
    forward, recorded, backward = {"fwd": (1, 0, 0), "fwd_grad": (1, 1, 0), "bwd": (0, 0, 1), "fwd_bwd": (1, 1, 1)}[
        pass_
    ]
    assert done == {"forward": forward, "recorded": recorded, "backward": backward}
    if backward:
        assert torch.equal(result[0], inputs.dys[0] * 2)
        assert torch.equal(timed_call()[0], inputs.dys[0] * 2), "nothing accumulates from call to call"
    assert inputs.tensors[0].grad is None
    assert not inputs.tensors[0].requires_grad


def test_inputs_are_the_same_on_every_run_and_differ_from_each_other():
    shape = {"gate": (64,), "up": (64,)}
    case = Case("two", "glu", {"kind": "swiglu"}, shape, torch.bfloat16, ("fwd",), "trinix", "", ("full",))
    first, again = gate.inputs_of(case, "cpu"), gate.inputs_of(case, "cpu")
    tensors = [*first.tensors, *first.dys]
    assert len(tensors) == 3
    assert all(torch.equal(a, b) for a, b in zip(tensors, [*again.tensors, *again.dys], strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(tensors, 2))
    assert {t.dtype for t in tensors} == {torch.bfloat16}


# -- the clocks' own arithmetic


def test_quantiles_of_a_sample():
    assert measure.Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == measure.Spread(2.0, 3.0, 5.0)
    assert measure.Spread.of([7.0]) == measure.Spread(7.0, 7.0, 7.0)


def test_cpu_times_are_of_the_right_call():
    a = torch.randn(400, 400)
    times = measure.cpu_ms({"small": lambda: a[:2, :2].sum(), "large": lambda: a @ a @ a}, budget_s=0.05)
    assert 0 < times["small"].p50 < times["large"].p50


def test_no_calls_have_no_times():
    assert measure.cpu_ms({}) == {}
    assert measure._interleave({}, 3, lambda call: 1.0) == {}


def test_loops_that_were_disturbed_leave_ratios_alone():
    """Of two that differ by 3% the medians of these loops differ by 22% the other way."""
    host = [1.0, 2.0, 3.0, 2.1] * 50
    ours, theirs = [1.03 * h for h in host], [h * (0.8 if h > 1.5 else 1.0) for h in host]
    assert statistics.median(ours) > 1.2 * statistics.median(theirs)
    assert measure._undisturbed(ours) / measure._undisturbed(theirs) == pytest.approx(1.03)
    assert measure._undisturbed([3.0, 1.0, 2.0]) == 2.0
    rounds = [loop for best in (5.0, 1.0, 4.0, 2.0, 3.0) for loop in [9.0] * 9 + [best]]
    assert measure._undisturbed(rounds) == 3.0, "the median of rounds, not the best of all"


def test_calls_are_interleaved_in_an_order_drawn_anew():
    order = []
    calls = {name: name for name in "abc"}
    sample = measure._interleave(calls, 40, lambda call: order.append(call) or len(order))
    rounds = ["".join(order[i : i + 3]) for i in range(0, 120, 3)]
    assert len(set(rounds)) == 6, "every order, each of all three"
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert {name: [i + 1 for i, n in enumerate(order) if n == name] for name in "abc"} == sample
    again = []
    measure._interleave(calls, 40, again.append)
    assert again == order, "the same in every run"


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("NVIDIA H100 80GB HBM3", 3352.0),
        ("NVIDIA H200", 4800.0),
        ("NVIDIA H100 NVL", 3900.0),
        ("NVIDIA H100 PCIe", 2000.0),
    ],
)
def test_the_listed_bandwidth_follows_the_cards_name(name, listed):
    assert device.Card(name, "sm_90", 1, 1.0).bandwidth_gbs == listed


def test_an_unlisted_card_has_no_listed_bandwidth():
    assert UNLISTED.bandwidth_gbs is None


def test_an_error_of_tritons_is_a_failed_row_and_any_other_ends_the_run(monkeypatch):
    from triton.runtime.errors import OutOfResources

    case = case_of("silu")
    oracle = gate.Oracle(case, gate.inputs_of(case, "cpu"))

    def raising(error):
        def call(x):
            raise error

        return lambda case: call

    monkeypatch.setitem(run.peers.PREPARE, "eager", raising(OutOfResources(300000, 232448, "shared memory")))
    assert "OutOfResources" in run.admit(case, "eager", oracle).reason
    monkeypatch.setitem(run.peers.PREPARE, "eager", raising(KeyError("a bug of ours")))
    with pytest.raises(KeyError):
        run.admit(case, "eager", oracle)


@pytest.mark.parametrize("op", ["layer_norm_residual", "glu", "rope", "alibi_bias"])
def test_ops_with_several_inputs_and_outputs_run_as_any_other(op, gpu):
    shape, args = {
        "layer_norm_residual": (
            dict.fromkeys(("x", "residual"), (6, 8)) | {"weight": (8,), "bias": (8,)},
            {"eps": 1e-5},
        ),
        "glu": ({"gate": (6, 8), "up": (6, 8)}, {"kind": "swiglu"}),
        "rope": ({"q": (1, 6, 2, 8), "k": (1, 6, 1, 8), "cos": (6, 4), "sin": (6, 4)}, {}),
        "alibi_bias": ({"slopes": (4,)}, {"seq_q": 6, "causal": True}),
    }[op]
    passes = ("fwd",) if op == "alibi_bias" else ("fwd", "bwd", "fwd_bwd")
    case = Case(f"tiny-{op}", op, args, shape, torch.bfloat16, passes, "trinix", "", ("full",))
    lines = run.run_gpu(case, ["eager"], Clock(copy=0.01, add=0.01))
    assert [(one["pass"], one["ok"]) for one in lines] == [(p, True) for p in passes]
    assert all(one["bytes"] and one["ceiling_share"] and one["peak_mib"] for one in lines)
    inputs = gate.inputs_of(case, "cpu")
    assert lines[0]["inputs_mib"] == round(inputs.nbytes / 2**20, 4)


# -- what raises after the gate


class Once(torch.autograd.Function):
    """silu whose backward frees what it saved: the second run of one recorded forward fails."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return F.silu(x)

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            leaf = ctx.x.detach().requires_grad_()
            (dx,) = torch.autograd.grad(F.silu(leaf), leaf, dy)
        del ctx.x
        return dx


class Fake(Clock):
    """Raises for a call that raises, as a clock would, without naming it."""

    def captured(self, calls):
        for call in calls:
            call()
        return super().captured(calls)


def failing_from(at, error):
    """silu that raises from its ``at``-th call on."""
    count = itertools.count(1)

    def call(x):
        if next(count) >= at:
            raise error
        return F.silu(x)

    return call


def test_a_backward_that_runs_once_only_fails_its_own_row(gpu, monkeypatch):
    monkeypatch.setitem(peers.PREPARE, "liger", lambda case: Once.apply)
    lines = run.run_gpu(case_of("silu"), ["trinix", "eager", "liger"], Clock())
    states = {(one["pass"], one["impl"]): one["ok"] for one in lines}
    assert states.pop(("bwd", "liger")) is False
    assert all(states.values()), "its other passes and everybody else are timed"
    (bad,) = lines_of(lines, impl="liger", ok=False)
    assert bad["reason"].startswith("AttributeError: ")
    assert bad["device_ms"] is None
    assert bad["error_ratio"] is not None, "it did pass the gate"


@pytest.mark.parametrize("at", range(2, 9))
@pytest.mark.parametrize("impl", ["trinix", "eager"])
def test_one_that_runs_out_of_memory_at_any_time_fails_its_own_row(impl, at, gpu, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory.\nMore lines.")
    monkeypatch.setitem(peers.PREPARE, impl, lambda case: failing_from(at, error))
    other = {"trinix": "eager", "eager": "trinix"}[impl]
    lines = run.run_gpu(case_of("silu", passes=("fwd",)), ["trinix", "eager"], Fake())
    states = {one["impl"]: one for one in lines}
    assert states[other]["ok"]
    assert states[other]["device_ms"]
    if at <= 5:  # gate, meter twice, rehearsal; the clocks' calls follow
        assert states[impl]["reason"] == "OutOfMemoryError: CUDA out of memory."
        assert states[impl]["ceiling"] == "bandwidth"


def test_a_failure_that_shows_only_when_all_run_together_fails_all_that_ran(gpu):
    class Full(Clock):
        def device_ms(self, calls):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    lines = run.run_gpu(case_of("silu", passes=("fwd",)), ["trinix", "eager"], Full())
    assert [one["reason"] for one in lines] == ["OutOfMemoryError: CUDA out of memory."] * 2


def test_a_graph_holds_calls_on_inputs_of_their_own_where_these_are_small(gpu, monkeypatch):
    seen = []
    monkeypatch.setitem(peers.PREPARE, "liger", lambda case: lambda x: (seen.append(x.data_ptr()), F.silu(x))[1])
    for limit, count in ((64, 8), (0, 1)):
        monkeypatch.setattr(gate.Inputs, "nbytes", property(lambda self, limit=limit: (65 - limit) << 20))
        clock = Clock()
        run.run_gpu(case_of("silu", passes=("fwd",)), ["liger"], clock)
        seen.clear()
        for call in clock.in_graph:
            call()
        assert len(clock.in_graph) == len(set(seen)) == count


def test_what_cannot_be_captured_has_no_graph_time_and_keeps_the_rest(gpu):
    class NoGraphs(Clock):
        def captured(self, calls):
            if not self.graphs:
                self.graphs += 1
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().captured(calls)

    one, other = run.run_gpu(case_of("silu", passes=("fwd",)), ["trinix", "eager"], NoGraphs())
    assert one["ok"]
    assert one["graph_ms"] is None
    assert one["wall_ms"] == 0.625
    assert other["graph_ms"] == 0.375


def test_a_graph_that_fails_when_it_is_replayed_costs_only_its_own_time(gpu):
    class Fails(Clock):
        def captured(self, calls):
            first = not self.graphs
            call = super().captured(calls)

            def replay():
                if first:
                    raise RuntimeError("CUDA error")
                call()

            return replay

    one, other = run.run_gpu(case_of("silu", passes=("fwd",)), ["trinix", "eager"], Fails())
    assert (one["graph_ms"], other["graph_ms"]) == (None, 0.375)


def test_a_replay_that_no_later_call_survives_is_named(gpu):
    class Faults(Clock):
        def captured(self, calls):
            def replay(of=self.graphs):
                if of:
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")

            self.graphs += 1
            return replay

        def graph_ms(self, replays, calls):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access") as error:
        run.run_gpu(case_of("silu", passes=("fwd",)), ["trinix", "eager", "seed_formula"], Faults())
    assert "graphs that could not be replayed: eager, seed_formula" in error.value.__notes__


def test_graphs_that_do_not_fit_beside_each_other_are_timed_in_several_goes(gpu):
    class Small(Clock):
        held = 0

        def captured(self, calls):
            if self.held == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            self.held += 1
            return super().captured(calls)

        def graph_ms(self, replays, calls):
            self.held = 0
            return super().graph_ms(replays, calls)

    clock = Small()
    lines = run.run_gpu(case_of("silu", passes=("fwd",)), ["trinix", "eager", "seed_formula"], clock)
    assert clock.replayed == [["trinix", "eager"], ["seed_formula"]]
    assert [one["graph_ms"] for one in lines] == [0.375] * 3


@pytest.mark.parametrize("impl", ["trinix", "trinix:triton", "compile", "liger", "quack"])
def test_whatever_a_rival_or_trinix_raises_is_a_failed_row(impl, monkeypatch):
    case = case_of("silu")
    monkeypatch.setitem(peers.PREPARE, impl, lambda case: failing_from(1, KeyError("no such kernel")))
    subject = run.admit(case, impl, gate.Oracle(case, gate.inputs_of(case, "cpu")))
    assert subject.call is None
    assert subject.reason == "KeyError: 'no such kernel'"


def test_an_implementation_that_has_no_such_op_has_no_line(gpu):
    lines = run.run_gpu(case_of("silu", passes=("fwd",)), ["trinix", "liger", "quack"], Clock())
    assert [one["impl"] for one in lines] == ["trinix"]


@pytest.mark.parametrize("impl", ["liger", "quack"])
def test_a_rival_that_is_not_installed_says_so(impl, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None)
    case = next(c for c in load_cases("full", ["rms_norm"]))
    assert peers.PREPARE[impl](case) == "not installed"


# -- budgets of time


@pytest.mark.parametrize(
    ("cost_s", "wanted"),
    [(1e-6, (10, 20)), (0.003, (10, 20)), (0.006, (10, 10)), (0.03, (10, 2)), (0.06, (5, 2)), (1.0, (3, 2))],
)
def test_a_budget_cuts_repetitions_first_and_rounds_then(cost_s, wanted):
    assert measure._plan(cost_s, 0.6, 10, (2, 20)) == wanted
    assert measure._plan(cost_s, 0.6, 10, (2, 20), fewest=5) == (max(5, wanted[0]), wanted[1])


def test_a_total_may_find_in_the_cache_what_its_forward_left():
    moved = 100 << 20
    assert roofline.impossible(0.6, moved, 1.0, UNLISTED)
    assert roofline.impossible(0.6, moved, 1.0, UNLISTED, cached=50 << 20) is None
    assert roofline.impossible(0.4, moved, 1.0, UNLISTED, cached=50 << 20)
    assert roofline.impossible(1e-6, moved, 1.0, H100, cached=moved) is None
    assert "no kernel" in roofline.impossible(0.0, moved, 1.0, H100, cached=moved)


class Event:
    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return (other.at - self.at) * 1000

    def query(self):
        return False


@pytest.fixture
def clock(monkeypatch):
    """The real clocks, with the host's time in the place of the GPU's."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(measure, "_events", lambda: (Event(), Event()))
    monkeypatch.setattr(torch, "empty", lambda *_, real=torch.empty, **more: real(1, dtype=more["dtype"]))  # on the CPU
    return measure.Gpu(l2_bytes=1)


def test_every_clock_tells_a_long_call_from_a_short_one_within_its_budget(clock):
    seconds = {"short": 0.0005, "long": 0.005}
    calls = {name: lambda s=s: time.sleep(s) for name, s in seconds.items()}
    for read, unit in ((clock.device_ms, 1000), (clock.wall_ms, 1000), (clock.host_us, 1e6)):
        begin = time.perf_counter()
        found = read(calls, budget_s=0.1)
        assert time.perf_counter() - begin < 1.5
        times = {name: t.p50 if isinstance(t, measure.Spread) else t for name, t in found.items()}
        relu = times.pop(measure.RELU, None)
        assert (relu is not None) == (read == clock.host_us)
        assert relu is None or 0 < relu < 400
        assert times.keys() == seconds.keys()
        assert all(0.9 * seconds[name] * unit < t < 4 * seconds[name] * unit for name, t in times.items())


def test_host_times_are_the_best_of_twenty_rounds_or_of_half_a_second(clock, monkeypatch):
    rounds, costs = [], {}
    monkeypatch.setattr(measure, "_loop_ms", lambda call, *_, **__: costs.get(call, 0.01))
    monkeypatch.setattr(measure, "_interleave", lambda calls, n, _: rounds.append(n) or {name: [0.0] for name in calls})
    for ms in (0.01, 2.0, 20.0, 200.0):  # of one call: four make a round, beside F.relu's
        costs.clear()
        calls = {"one": lambda: None}
        costs[calls["one"]] = ms
        clock.host_us(calls, budget_s=0.01)
    assert rounds == [62, 20, 6, 3]


def test_a_host_time_is_the_best_of_as_many_calls_of_each(clock, monkeypatch):
    """A call behind few others costs more than one behind many."""
    now, made = [0.0], collections.Counter()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def call(name, costs):
        now[0] += costs[made[name] % len(costs)]
        made[name] += 1

    monkeypatch.setattr(torch, "relu", lambda x: call(measure.RELU, [3e-6, 2e-6]))
    calls = {"short": lambda: call("short", [8e-6, 5e-6, 8e-6]), "long": lambda: call("long", [5e-3])}
    found = clock.host_us(calls, budget_s=0.01)
    assert found == {"short": pytest.approx(5), "long": pytest.approx(5000), measure.RELU: pytest.approx(2)}
    assert len(set(made.values())) == 1


class Graph:
    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


def test_a_captured_graph_keeps_what_its_calls_read(clock, monkeypatch):
    """A rival that writes into its inputs has copies of its own, which nothing but its call holds: freed, they were unmapped by the
    next capture, and the replay read them."""
    monkeypatch.setattr(torch.cuda, "Stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph := mock.Mock(side_effect=Graph))
    read, written = torch.ones(3), []

    def call(x=read):
        written.append(weakref.ref(y := x + 1))
        return y

    seen = weakref.ref(read)
    replay = clock.captured([call])
    del read, call
    gc.collect()
    assert seen() is not None
    assert written[-1]() is not None
    assert written[0]() is None  # of the calls before the capture
    replay()
    del replay
    gc.collect()
    assert seen() is None
    assert written[-1]() is None
    assert graph.call_count == 1


def test_a_call_that_launches_nothing_has_no_device_time(clock):
    assert clock.device_ms({"nothing": lambda: None})["nothing"].p50 < 0.001


def test_a_repetition_that_the_gpu_began_before_the_host_was_done_does_not_count(clock, monkeypatch):
    spins, late = [], iter([False] * 8 + [True] * 2 + [False] * 1000)
    real = clock._record
    monkeypatch.setattr(Event, "query", lambda self: next(late))
    monkeypatch.setattr(clock, "_record", lambda call, spin, *events: [spins.append(spin), real(call, spin, *events)])
    monkeypatch.setattr(clock, "_spin_us", lambda call: 0.0)
    clock.runs = 20
    clock.device_ms({"one": lambda: None})
    timed = spins[2:]  # the first two ask what a repetition costs
    assert len(timed) == 2 * 20 + 2, "two repetitions were taken again"
    assert timed[8:11] == [timed[0], 2 * timed[0], 4 * timed[0]], "each behind a longer spin"


def test_a_call_that_waits_for_the_gpu_is_timed_as_it_is(clock, monkeypatch):
    calls = []
    monkeypatch.setattr(Event, "query", lambda self: True)
    monkeypatch.setattr(clock, "_spin_us", lambda call: 0.0)
    clock.runs = 10
    assert clock.device_ms({"one": lambda: [calls.append(1), time.sleep(0.001)]})["one"].p50 >= 1.0
    assert len(calls) == 1 + 5 + 9, "once for its cost, five tries at the first repetition, one at each of the others"


def test_a_call_that_no_budget_pays_is_timed_in_five_rounds(clock, monkeypatch):
    calls = []
    monkeypatch.setattr(clock, "_spin_us", lambda call: 1.0)
    monkeypatch.setattr(clock, "_once", lambda call, spin: 1.0)
    clock.device_ms({"long": lambda: calls.append("one")})
    assert len(calls) == 5 * 2
