"""Per-head MLPs on Hopper: what the compiler makes of every binary, without a GPU, the pure choices, and the kernels in NumPy
(gluon_on_cpu.py). On the card: the tests of the op."""

import json
import threading
import types

import numpy as np
import pytest
import torch

import gluon_on_cpu
from trinix.kernels.torch import head_mlp as reference
from trinix.testing import assert_within_budget, normal, vjp

pytest.importorskip("triton")

from trinix.kernels._binary import Box
from trinix.kernels.hopper import early
from trinix.kernels.hopper import head_mlp as hopper

SHARED_LIMIT = 227 * 1024
SPILLS = {"weights/64/mish": 112}  # bytes in all: 5 registers of a formula with two divisions

# Runs in a forked process: here TRITON_INTERPRET may be set.
COMPILE = """
import json, re
from binaries import compiled, given_back_too_early
from trinix.kernels.hopper.head_mlp import compile_cases

for case in compile_cases():
    if not WANTED(case.name):
        continue
    names = case.kernel.arg_names
    signature = dict.fromkeys(names, "i32") | dict.fromkeys(case.constants, "constexpr")
    for name, (rows, columns) in case.blocks.items():
        layout = f"NVMMASharedLayout(swizzle_byte_width={min(128, 2 * columns)}, element_bitwidth=16, rank=3)"
        signature[name] = f"tensordesc<bf16{[1, rows, columns]},{layout}>"
    binary, log = compiled(case.kernel, signature, case.constants, {"num_warps": 4})
    print(json.dumps({
        "name": case.name, "shared": binary.metadata.shared, "warnings": sorted(set(re.findall("C75[0-9]{2}", log))),
        "spills": sum(map(int, re.findall("([0-9]+) bytes spill", log))), "early": given_back_too_early(binary.asm["ptx"]),
    }))
"""


# Every kernel and width; every kind in the kernel that it leaves the fewest registers; --every-binary takes the others.
FEW = "^weights/64/|/silu$|^(forward/64/3|rows/64)/(gelu|mish)$"


@pytest.mark.parametrize("start", ["weights/64", "rows", "forward/64", "(forward|weights|hidden)/(128|256)"])
def test_every_binary_compiles_without_spills_and_no_product_waits_for_itself(start, forked_process, every_binary):
    chosen = "" if every_binary else FEW
    wanted = f"lambda name: re.match({start!r}, name) and re.search({chosen!r}, name)"
    lines = [json.loads(line) for line in forked_process(f"WANTED = {wanted}\n" + COMPILE).splitlines()]
    assert len(lines) >= 3
    for one in lines:
        assert not one["warnings"], one  # C7510 and its like: "wgmma serialized"
        assert one["spills"] <= SPILLS.get(one["name"], 0), one
        assert one["shared"] <= SHARED_LIMIT, one
        assert not one["early"], one


def test_every_kind_has_a_formula_and_halves_mean_the_same():
    from trinix.ops.head_mlp import GATED_KINDS, KINDS

    assert set(hopper.FORMULAS) == set(KINDS) - set(GATED_KINDS)
    assert set(hopper.OF_HALF) <= set(hopper.FORMULAS)


@pytest.mark.parametrize("d", hopper.WIDTHS)
def test_the_choices_fit_shared_memory(d):
    for heads in (1, 8, 12, 16, 32):
        for rows in (1, 512, 1000, 4096, 8192):
            c = hopper.choose_forward(heads, rows, d, 132)
            tiles = c.consumers * (1 + c.x_registers)
            assert 2 * (64 * d * tiles + 2 * d * c.hidden * c.slots) + 1024 <= SHARED_LIMIT
    if d == hopper.STAGED_WIDTH:
        for kind in hopper.FORMULAS:
            c = hopper.choose_hidden(kind)
            assert 2 * (c.rows * d + 2 * d * c.hidden * c.slots + 2 * c.rows * c.hidden) + 1024 <= SHARED_LIMIT
    elif d in hopper.BACKWARD_WIDTHS:
        r, w = hopper.choose_rows(d), hopper.choose_weights(d)
        assert 2 * d * ((2 * r.x_slots + 1) * 64 * r.consumers + 2 * r.hidden * r.slots) + 1024 <= SHARED_LIMIT
        assert 2 * d * (2 * 128 + 2 * w.rows * w.slots) + 1024 <= SHARED_LIMIT


def test_more_warpgroups_only_where_they_leave_none_idle():
    assert hopper.choose_forward(12, 4096, 64, 132).consumers == 3  # M-5: two rounds of three
    assert hopper.choose_forward(16, 2048, 64, 132).consumers == 2  # M-3: two rounds of two


def test_what_it_cannot_run_has_a_reason():
    x, w1, w2 = torch.ones(1, 2, 64), torch.ones(1, 64, 8), torch.ones(1, 8, 64)
    assert "needs a GPU tensor, got cpu" in hopper.unsupported(x, w1, w2, None, None, None)


def test_gradients_of_weights_with_room_behind_each_row_are_refused_where_their_own_rows_begin_anywhere(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(hopper, "_capability", lambda index: (9, 0))
    x, room = torch.ones(2, 3, 64, dtype=torch.float16), torch.ones(2, 64, 104, dtype=torch.float16)
    for e, refused in ((100, True), (96, False)):
        w1, w2 = room[..., :e], torch.ones(2, e, 64, dtype=torch.float16)
        assert hopper.unsupported(x, w1, w2, None, None, None) is None
        reason = hopper.unsupported(x, w1, w2, None, None, None, grad=True)
        assert reason == ("needs E to be a multiple of 8 for gradients, got 100" if refused else None)


# ---- the kernels themselves, in NumPy: warpgroups as threads, real barriers ---------------------------------------------------


class Order:
    """What a launch before the kernel in front has ended may not do: each role waits before anything else."""

    def __init__(self):
        self.early = False  # whether this launch is one
        self.role = threading.local()

    def wait(self):
        self.role.waited = True

    def check(self):
        assert not self.early or getattr(self.role, "waited", False), "a role went ahead of the kernel in front"

    def behind(self, access):
        def checked(*arguments):
            self.check()
            access(*arguments)

        return checked


def _functions(order: Order) -> dict:
    """The kernels as plain Python."""

    instructions = {"tanh": np.tanh, "ex2": np.exp2, "rcp": np.reciprocal}

    def assembly(text, constraints, args, **_):
        if text.startswith("griddepcontrol"):  # launches come one after the other here
            order.wait() if text.startswith("griddepcontrol.wait") else order.check()
            return None
        return gluon_on_cpu.Tensor(instructions[text.split(".")[0]](args[0].a))

    language = gluon_on_cpu.language()
    language.inline_asm_elementwise = assembly
    mbarrier = types.SimpleNamespace(
        MBarrierLayout=lambda: "barriers",
        init=lambda b, count: b.set_up(count),
        wait=lambda b, phase, pred=True: b.wait(int(phase)) if pred else None,
        arrive=lambda b, count: b.change(arrivals=count),
        expect=lambda b, n: b.change(arrivals=1, more_bytes=n),
    )
    names = {name: getattr(gluon_on_cpu, name) for name in ("warpgroup_mma", "warpgroup_mma_wait")}
    names |= {name: order.behind(getattr(gluon_on_cpu, name)) for name in ("tma_load", "tma_store")}
    names |= {"gl": language, "gluon": language, "mbarrier": mbarrier, "fence_async_shared": lambda: None}
    names["tma"] = types.SimpleNamespace(store_wait=lambda n: None)
    return gluon_on_cpu.functions_of(hopper, **gluon_on_cpu.functions_of(early, **names))


@pytest.fixture
def on_cpu(monkeypatch):
    """The backend's launches run here, for float16 tensors, on two multiprocessors."""
    order = Order()
    functions = _functions(order)

    class OnCpu(hopper._Plan):
        def __init__(self, kernel, tensors, blocks, items, integers, constants):
            self.kernel = functions[kernel.__name__]
            self.blocks, self.programs, self.integers = blocks, min(items, 2), integers
            self.constants = {k: functions[v.__name__] if hasattr(v, "__name__") else v for k, v in constants.items()}

        def __call__(self, *tensors):
            boxes = [Box(t.shape, t.stride(), (1, *b), t.dtype) for t, b in zip(tensors, self.blocks, strict=True)]
            there = [gluon_on_cpu.Descriptor(t.data_ptr(), box) for t, box in zip(tensors, boxes, strict=True)]
            # the rows' kernel follows the weights', which it does not need
            order.early = self.constants["DEPENDENT"] and self.kernel is not functions["_backward_rows"]
            gluon_on_cpu.launch(self.kernel, self.programs, (*there, *self.integers), self.constants)

    monkeypatch.setattr(hopper, "EARLY", True)
    monkeypatch.setattr(hopper, "_Plan", OnCpu)
    monkeypatch.setattr(hopper, "_plans", {})
    monkeypatch.setattr(hopper, "processors", lambda index: 2)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ((2, 200, 64, 200), "silu"),
        ((3, 130, 64, 72), "gelu"),
        ((1, 1, 64, 8), "softplus"),
        ((2, 400, 64, 264), "sigmoid"),
        ((5, 400, 64, 72), "relu"),  # ten items a program, of one tile each
        ((1, 193, 128, 136), "mish"),
        ((1, 70, 256, 72), "tanh"),
        ((3, 130, 256, 264), "silu"),
        ((5, 400, 256, 136), "relu"),
        ((1, 1, 256, 8), "gelu"),
    ],
    ids=str,
)
def test_the_kernels_hold_the_budget_at_odd_sizes(sizes, kind):
    h, b, d, e = sizes
    x = normal((b, h, d), torch.float16, seed=1).transpose(0, 1)
    w1 = normal((h, d, e), torch.float16, seed=2, scale=d**-0.5)
    w2 = normal((h, e, d), torch.float16, seed=3, scale=e**-0.5)
    dy = normal((h, b, d), torch.float16, seed=4)
    inputs = x, w1, w2, None, None, None
    backward = d in hopper.BACKWARD_WIDTHS
    got = [hopper.forward(*inputs, kind, False)]
    if backward:
        got += hopper.backward(*inputs, dy, kind, False, (True, True, True, False, False, False))[:3]

    def formula(*tensors):
        return reference.forward(*tensors, None, None, None, kind, False)

    low = vjp(formula, (x, w1, w2), dy)
    true = vjp(formula, [t.double() for t in (x, w1, w2)], dy.double())
    assert_within_budget(got, low[: len(got)], true[: len(got)])


def test_the_copy_engine_is_given_no_gradient_at_an_odd_address_or_of_stride_0(monkeypatch):
    given = []
    monkeypatch.setattr(hopper, "_planned", lambda key, make: lambda *tensors: given.append(tensors[1]))
    x, w1, w2 = (torch.zeros(s, dtype=torch.float16) for s in ((2, 3, 64), (2, 64, 8), (2, 8, 64)))
    wanted = True, True, True, False, False, False
    for dy in (
        torch.arange(1 + x.numel()).half()[1:].view(x.shape),
        torch.arange(2 * x.numel()).half().view(2, 3, 64, 2)[..., 1],
        torch.arange(8 + x.numel()).half()[8:].view(x.shape),
        torch.arange(3 * 64).half().view(1, 3, 64).expand(x.shape),  # of a sum over the heads
        torch.arange(2 * 64).half().view(2, 1, 64).expand(x.shape),
    ):
        hopper.backward(x, w1, w2, None, None, None, dy, "silu", False, wanted)
        rows, weights = given.pop(), given.pop()
        assert rows is weights
        assert not rows.data_ptr() % 16
        assert rows.stride(-1) == 1
        assert 0 not in rows.stride()
        assert torch.equal(rows, dy)


def test_every_gradient_has_its_memory_before_a_kernel_is_launched(monkeypatch):
    """The rows' kernel begins beside the weights': what another thread frees in between may still be read."""
    order = []
    monkeypatch.setattr(hopper, "_planned", lambda key, make: lambda *tensors: order.append("launch"))
    x, w1, w2 = (torch.zeros(s, dtype=torch.float16) for s in ((2, 3, 64), (2, 64, 8), (2, 8, 64)))
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: order.append("memory") or make(*a, **k))
    hopper.backward(x, w1, w2, None, None, None, x, "silu", False, (True, True, True, False, False, False))
    assert order == ["memory"] * 3 + ["launch"] * 2


@pytest.mark.usefixtures("on_cpu")
def test_three_warpgroups_hold_the_budget_too(monkeypatch):
    monkeypatch.setattr(hopper, "choose_forward", lambda *_: hopper.ForwardConfig(64, 3, 6, True))
    test_the_kernels_hold_the_budget_at_odd_sizes((2, 400, 64, 200), "silu")
