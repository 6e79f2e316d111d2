"""Per-head MLPs: every kind, dtype, form and layout against float64, and how the op behaves as a citizen of PyTorch.

Backend "triton" runs in Triton's interpreter on the CPU; the tests marked ``gpu`` run it, and Hopper's, on the card."""

import importlib
import math
import random
import weakref

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

import trinix
from helpers import Tagged, Watch, captured, dense, pooled, right_or_refused, same
from trinix.kernels import _binary, _stages
from trinix.kernels.torch import head_mlp as reference
from trinix.kernels.triton import _launch, glu
from trinix.kernels.triton import head_mlp as kernels
from trinix.ops import head_mlp
from trinix.testing import assert_within_budget, judge, normal, vjp

op = importlib.import_module("trinix.ops.head_mlp")  # the module: ``trinix.ops.head_mlp`` is the function

PLAIN_KINDS = tuple(kind for kind in op.KINDS if kind not in op.GATED_KINDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "w1", "w2", "b1", "b2", "w_gate")


class Numbers:
    """One problem: sizes, form and memory layout; its tensors are the same in every run.

    coarse: few bits, so that float32 adds x w1 + b1 up without rounding and all are on the same side of a kink: of millions of
    numbers one else is not, whose gradient is then another."""

    def __init__(
        self, h, b, d, e, *, dtype=torch.float32, device="cpu", bias=False, gated=False, shared=False, mean=False,
        layout="contiguous", seed=1, coarse=False,
    ):  # fmt: skip
        def new(shape, at, scale=1.0):
            if device == "meta":  # which has no numbers to draw
                return torch.empty(shape, dtype=dtype, device=device)
            drawn = normal(shape, dtype, seed=10 * seed + at, device=device, scale=scale)
            steps = 8 if at == 1 else 256
            return (drawn.float() * steps).round().div(steps).to(dtype) if coarse and at in (1, 2, 4, 5) else drawn

        def weight(at):
            if layout == "transposed":
                return new((h, e, d), at, d**-0.5).transpose(1, 2)
            if layout == "packed":
                return new((h, d, 2 * e + 3), at, d**-0.5)[..., e + 1 : 2 * e + 1]
            return new((h, d, e), at, d**-0.5)

        if shared:
            x = new((b, 2 * d), 1)[:, ::2] if layout == "packed" else new((b, d), 1)
        elif layout in ("transposed", "heads inside"):
            x = new((b, h, d), 1).transpose(0, 1)
        elif layout == "packed":
            x = new((h, b, 3 * d), 1)[..., d : 2 * d]
        else:
            x = new((h, b, d), 1)
        down = new((h, d, e), 3, e**-0.5).transpose(1, 2) if layout == "transposed" else new((h, e, d), 3, e**-0.5)
        biases = (new((h, e), 5), new((h, d), 6)) if bias else (None, None)
        self.slots = (x, weight(2), down, *biases, weight(4) if gated else None)
        self.mean = mean
        shape = (b, d) if mean else (h, b, d)
        self.dy = new((*shape, 2), 7)[..., 0] if layout == "packed" else new(shape, 7)

    @property
    def tensors(self):
        return [t for t in self.slots if t is not None]

    def call(self, kind, backend):
        """The op as a function of the tensors that are there."""
        there = [name for name, t in zip(NAMES, self.slots, strict=True) if t is not None]

        def function(*tensors):
            given = dict(zip(there, tensors, strict=True))
            return head_mlp(**given, kind=kind, reduce="mean" if self.mean else None, backend=backend)

        return function

    def results(self, kind, backend="triton"):
        """y and every gradient: ours, PyTorch's in the same dtype and in float64."""
        got = vjp(self.call(kind, backend), self.tensors, self.dy)
        low = vjp(self.call(kind, "torch"), [dense(t) for t in self.tensors], dense(self.dy))
        wide = [dense(t, torch.float64) for t in self.tensors]
        true = vjp(self.call(kind, "torch"), wide, dense(self.dy, torch.float64))
        return got, low, true

    def oracle(self, kind, backend="triton"):
        """THE test: y and every gradient within the budget that float64 and PyTorch in the same dtype give."""
        got, low, true = self.results(kind, backend)
        assert_within_budget(got, low, true)
        return got


# ---- right numbers -----------------------------------------------------------------------------------------------------

SIZES = {  # name -> H, B, D, E
    "whole tiles": (2, 64, 64, 128),
    "one past the blocks": (2, 65, 65, 65),
    "primes": (3, 37, 29, 41),
    "ones": (1, 1, 1, 1),
    "one row": (2, 1, 16, 33),
    "one column": (2, 33, 1, 16),
    "one hidden column": (2, 33, 16, 1),
    "D above 128": (1, 17, 130, 24),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_holds_the_float64_budget(dtype, sizes):
    Numbers(*SIZES[sizes], dtype=dtype).oracle("silu")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_every_kind_holds_the_budget_plain_and_gated(kind, gated):
    for dtype in (torch.float32, torch.bfloat16):
        Numbers(2, 19, 24, 40, dtype=dtype, gated=gated, bias=True).oracle(kind)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "packed"])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_every_form_and_layout_holds_the_budget(shared, mean, layout):
    for bias, gated in ((False, False), (True, False), (True, True)):
        Numbers(3, 21, 16, 24, bias=bias, gated=gated, shared=shared, mean=mean, layout=layout).oracle("silu")


@pytest.mark.parametrize("kind", op.GATED_KINDS)
def test_a_gated_units_name_is_its_activation(kind):
    problem = Numbers(2, 5, 8, 8, gated=True)
    same(problem.call(kind, "triton")(*problem.tensors), problem.call(op.GATED_KINDS[kind], "triton")(*problem.tensors))


def test_few_heads_split_the_rows_and_sum_the_same_on_every_run(monkeypatch):
    monkeypatch.setattr(kernels, "_card", lambda index: (8, 227, False))
    kernels._backward_plan.cache_clear()
    splits = []
    chosen = kernels.choose_splits
    monkeypatch.setattr(kernels, "choose_splits", lambda *a: splits.append(chosen(*a)) or splits[-1])
    for gated in (False, True):
        problem = Numbers(1, 700, 16, 16, dtype=torch.bfloat16, bias=True, gated=gated)
        first = problem.oracle("silu")
        same(problem.oracle("silu"), first)
    kernels._backward_plan.cache_clear()
    assert all(n > 2 for n in splits)


def test_a_card_with_99_kib_of_shared_memory_has_tiles_of_its_own(monkeypatch):
    def clear():
        kernels._forward_plan.cache_clear()
        kernels._backward_plan.cache_clear()

    clear()
    seen, small, roomy = [], [], []
    for name in ("choose_forward", "choose_backward"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, real=real, **more: seen.append(real(*a, **more)) or seen[-1])
        for d, gated in ((256, False), (256, True), (128, True)):
            small.append(real(70, d, 2, gated, roomy=False))
            roomy.append(real(70, d, 2, gated))
    monkeypatch.setattr(kernels, "_card", lambda index: (80, 99, False))
    for d, gated in ((256, False), (256, True), (128, True)):
        Numbers(1, 70, d, 40, dtype=torch.bfloat16, gated=gated).oracle("silu")
    clear()
    assert set(seen) == set(small)
    assert small[:3] != roomy[:3]
    assert small[3] != roomy[3]


def test_wide_heads_have_a_launch_for_each_gradient_where_they_fill_the_card(monkeypatch):
    configs = {"x": (16, 16), "w1": (16, 32), "w2": (16, 32)}
    monkeypatch.setattr(kernels, "APART", {n: kernels.Config(*c, 4, 1) for n, c in configs.items()})
    monkeypatch.setattr(kernels, "LANES", 32)
    monkeypatch.setattr(kernels, "_card", lambda index: (2, 227, False))
    kernels._backward_plan.cache_clear()
    launches = []
    real = kernels.backward_launch
    monkeypatch.setattr(kernels, "backward_launch", lambda *a: launches.append(a[4:6]) or real(*a))
    for layout in ("contiguous", "transposed"):
        problem = Numbers(2, 40, 136, 48, dtype=torch.bfloat16, layout=layout)
        same(problem.oracle("silu"), problem.oracle("silu"))
    assert launches == 2 * [
        (True, (False,) * 5), (False, (True, False, False, False, False)), (False, (False, False, True, False, False))
    ]  # fmt: skip
    launches.clear()
    x, w1, w2, *_ = problem.slots
    grads = kernels.backward(x, w1, w2, None, None, None, problem.dy, "silu", False, (False, False, True, *[False] * 3))
    assert [t is not None for t in grads] == [False, False, True, False, False, False]
    Numbers(2, 40, 136, 48, dtype=torch.bfloat16, bias=True).oracle("silu")
    Numbers(1, 40, 136, 48, dtype=torch.bfloat16).oracle("silu")
    assert [wanted for _, wanted in launches[1:]] == [
        (True, False, True, True, True),
        (True, False, True, False, False),
    ]
    kernels._backward_plan.cache_clear()


def test_of_launches_apart_one_at_a_time_has_partial_sums(monkeypatch):
    """Those of one need at most dO's size of memory."""
    monkeypatch.setattr(kernels, "APART", {n: kernels.Config(16, 32, 4, 1) for n in kernels.APART})
    monkeypatch.setattr(kernels, "LANES", 32)
    monkeypatch.setattr(kernels, "_card", lambda index: (8, 227, False))
    kernels._backward_plan.cache_clear()
    problem = Numbers(1, 400, 136, 32, dtype=torch.bfloat16)
    problem.oracle("silu")
    made, alive, empty = [], [], torch.empty

    def counted(*size, **more):
        t = empty(*size, **more)
        if more.get("dtype") == torch.float32 and t.numel():
            alive.append(sum(one() is not None for one in made))
            made.append(weakref.ref(t))
        return t

    monkeypatch.setattr(torch, "empty", counted)
    x, w1, w2, *_ = problem.slots
    kernels.backward(x, w1, w2, None, None, None, problem.dy, "silu", False, (True, True, True, *[False] * 3))
    kernels._backward_plan.cache_clear()
    assert alive == [0, 0]  # of dW1, of dW2


def test_what_fills_a_processor_is_split_into_full_rounds():
    """M-7: 64 programs of dW1, 132 processors; five splits would be three rounds of a fifth, two are one of a half."""
    assert kernels.choose_splits(64, 16384, 32, 8 * 256 * 1024, 8 * 16384 * 256 * 2, 132, alone=True) == 2
    assert kernels.choose_splits(64, 16384, 32, 8 * 256 * 1024, 8 * 16384 * 256 * 2, 132) == 5
    assert kernels.choose_splits(300, 16384, 32, 8 * 256 * 1024, 8 * 16384 * 256 * 2, 132, alone=True) == 1


def test_few_programs_walk_over_e_in_wider_steps(monkeypatch):
    monkeypatch.setattr(kernels, "_card", lambda index: (1, 227, False))
    kernels._forward_plan.cache_clear()
    seen = []
    real = kernels.choose_forward
    monkeypatch.setattr(kernels, "choose_forward", lambda *a, **more: seen.append(real(*a, **more)) or seen[-1])
    for h, e in ((2, 512), (2, 200), (3, 512)):
        Numbers(h, 64, 64, e, dtype=torch.bfloat16).oracle("silu")
    kernels._forward_plan.cache_clear()
    assert [c.hidden for c in seen] == [128, 64, 64]


def test_what_is_read_along_d_has_wide_accesses_though_e_is_odd():
    def units(d, e, w1=lambda t: t, w2=lambda t: t):
        x, up, down = torch.empty(2, 5, d), w1(torch.empty(2, d, e)), w2(torch.empty(2, e, d))
        strides = x.stride(), up.stride(), kernels._strides(None, up), down.stride(), x.stride()
        layout, scaled = kernels.layout_of(2, e, strides)
        along_d = layout.d_unit * scaled[1]  # x's rows
        assert along_d == d
        return layout.e_unit, layout.d_unit, layout.wide

    def turned(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    assert units(80, 336) == (8, 8, True)
    assert units(80, 333) == (1, 8, False)  # M-odd
    assert units(81, 336) == (8, 1, False)  # rows of W1 begin at multiples of 336, x's do not
    assert units(80, 333, w1=turned) == (1, 8, False)
    assert units(80, 333, w2=turned) == (1, 8, False)
    assert units(80, 333, w1=lambda t: t.expand(2, 80, 333)[:, :, ::2]) == (1, 1, False)


class Boxed:
    """``trinix.kernels._binary.Boxed`` in the interpreter."""

    launched = 0

    def __init__(self, kernel, tensors, blocks, programs, integers, constants, gluon, **options):
        assert not gluon
        self.kernel, self.blocks, self.programs = kernel, blocks, programs
        self.integers, self.constants = integers, constants

    def __call__(self, *tensors):
        assert not any(t.data_ptr() & 15 for t in tensors)  # as the copy engine wants it
        boxes = [
            TensorDescriptor(t, list(t.shape), list(t.stride()), [1, *block])
            for t, block in zip(tensors, self.blocks, strict=True)
        ]
        self.kernel[(self.programs,)](*boxes, *self.integers, **self.constants)
        Boxed.launched += 1


@pytest.fixture
def boxed(monkeypatch, no_kept_plans):
    """Forward as on Hopper; a function that tells whether a call's tiles came by descriptors."""
    monkeypatch.setattr(kernels, "_takes_boxes", lambda index: True)
    monkeypatch.setattr(_launch._State, "off", None)  # the interpreter's reason
    monkeypatch.setattr(_binary, "Boxed", Boxed)

    def forward(*inputs, kind="silu", mean=False):
        before = Boxed.launched
        y = kernels.forward(*inputs, kind, mean)
        assert ("descriptors" in kernels.describe(*inputs, kind, mean)) == (Boxed.launched > before)
        return y, Boxed.launched > before

    return forward


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [
        ((2, 64, 128, 64), "contiguous"),
        ((2, 65, 128, 72), "contiguous"),  # one row and eight columns past a tile
        ((3, 200, 144, 136), "heads inside"),
        ((1, 33, 168, 8), "contiguous"),
        ((2, 150, 256, 40), "heads inside"),
        ((2, 70, 136, 24), "room behind"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["silu", "sigmoid", "none"])
def test_tiles_by_descriptors_hold_the_budget_at_odd_sizes_and_strides(kind, sizes, layout, boxed):
    h, b, d, e = sizes
    room = 8 if layout == "room behind" else 0
    x = normal((h, b, d + room), torch.bfloat16, seed=1)[..., :d]
    if layout == "heads inside":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    w1 = normal((h, d, e + 2 * room), torch.bfloat16, seed=2, scale=d**-0.5)[..., :e]
    w2 = normal((h, e + room, d), torch.bfloat16, seed=3, scale=e**-0.5)[:, :e]
    inputs = x, w1, w2, None, None, None
    for _ in range(2):  # a plan's first call, and another with other tensors
        y, by_boxes = boxed(*inputs, kind=kind)
        assert by_boxes
        wide = [t.double() for t in (x, w1, w2)]
        low = reference.forward(*inputs, kind, False)
        assert_within_budget([y], [low], [reference.forward(*wide, None, None, None, kind, False)])
        if layout == "contiguous":
            x, w1, w2 = (t.clone() for t in (x, w1, w2))
            inputs = x, w1, w2, None, None, None


STAGED_SIZES = [
    ((2, 64, 136, 64), "contiguous"),
    ((3, 129, 256, 72), "contiguous"),  # one row and eight columns past a tile
    ((3, 130, 200, 264), "heads inside"),
    ((1, 1, 160, 8), "contiguous"),
    ((2, 70, 192, 24), "room behind"),
]


def staged_problem(sizes, layout, dtype=torch.bfloat16):
    """(x, w1, w2), dy of a call whose backward goes by stages."""
    h, b, d, e = sizes
    room = 8 if layout == "room behind" else 0
    x, dy = (normal((h, b, d + room), dtype, seed=seed)[..., :d] for seed in (1, 4))
    if layout == "heads inside":
        x, dy = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, dy))
    w1 = normal((h, d, e + 2 * room), dtype, seed=2, scale=d**-0.5)[..., :e]
    w2 = normal((h, e + room, d), dtype, seed=3, scale=e**-0.5)[:, :e]
    return (x, w1, w2), dy


def judge_stages(tensors, dy, kind="silu"):
    def call(x, w1, w2):
        return reference.forward(x, w1, w2, None, None, None, kind, False)

    got = kernels.backward(*tensors, None, None, None, dy, kind, False, (True, True, True, False, False, False))
    assert got[3:] == [None, None, None]
    true = vjp(call, [t.double() for t in tensors], dy.double())[1:]
    low = vjp(call, tensors, dy)[1:]
    assert_within_budget(got[:3], low, true)
    return got[:3]


def at_an_odd_address(t):
    return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)


@pytest.fixture
def staged(boxed, monkeypatch):
    """Backward as on Hopper; how often a kernel with descriptors ran."""
    monkeypatch.setattr(kernels, "STAGED", kernels.Config(32, 16, 4, 2))
    monkeypatch.setattr(kernels, "_card", lambda index: (5, 227, False))
    kernels._hidden_plan.cache_clear()
    before = Boxed.launched
    yield lambda: Boxed.launched - before
    kernels._hidden_plan.cache_clear()


@pytest.mark.parametrize(("sizes", "layout"), STAGED_SIZES, ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu", "none"])
def test_backward_by_stages_holds_the_budget_at_odd_sizes_and_strides(kind, sizes, layout, staged):
    tensors, dy = staged_problem(sizes, layout)
    # three that have no descriptor
    for dy_here in (dy, dy[:, :1, :1].expand(dy.shape), dy[..., :1].expand(dy.shape), at_an_odd_address(dy)):
        dx, *_ = judge_stages(tensors, dy_here, kind)
        assert dx.stride() == torch.empty_like(tensors[0]).stride()
    chunk, _, _ = _stages.choose(*(sizes[i] for i in (1, 0, 2, 3)), 5, kernels.STAGED[:2])
    assert staged() == 4 * -(-sizes[0] // chunk)


@pytest.fixture
def pairs_made(monkeypatch):
    """The elements of each pair of H and dZ that was made."""
    made, empty = [], torch.Tensor.new_empty

    def new_empty(t, *size, **more):
        if size[0] == 2:
            made.append(math.prod(size))
        return empty(t, *size, **more)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    _stages.choose.cache_clear()
    yield made
    _stages.choose.cache_clear()


@pytest.mark.parametrize("heads", ["every head", "one head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("sizes", "layout"), STAGED_SIZES, ids=str)
def test_backward_by_stages_adds_up_the_rows_portions(sizes, layout, dtype, heads, staged, pairs_made, monkeypatch):
    """With room for H and dZ of one tile of rows, as of a million rows on the card."""
    (h, b, d, e), rows = sizes, kernels.STAGED.rows
    elements = 2 * min(rows, b) * e * (h if heads == "every head" else 1)
    monkeypatch.setattr(_stages, "MOST_BYTES", 2 * elements)
    tensors, dy = staged_problem(sizes, layout, dtype)
    everything = judge_stages(tensors, dy)
    chunk, portion, _ = _stages.choose(b, h, d, e, 5, kernels.STAGED[:2])
    assert portion == min(rows, b) or chunk < h
    assert staged() == len(pairs_made) == -(-h // chunk) * -(-b // portion)
    assert max(pairs_made) <= elements
    for i in range(3):
        wanted = [i == j for j in range(3)]
        got = kernels.backward(*tensors, None, None, None, dy, "silu", False, (*wanted, False, False, False))
        assert [t is not None for t in got] == [*wanted, False, False, False]
        same([got[i]], [everything[i]])


@pytest.fixture
def sums_in_float16():
    """Calls with whether PyTorch may."""
    setting = torch.backends.cuda.matmul
    before = setting.allow_fp16_accumulation
    yield lambda allowed: setattr(setting, "allow_fp16_accumulation", allowed)
    setting.allow_fp16_accumulation = before  # which monkeypatch would delete


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("accumulation", [False, True])
def test_portions_add_up_where_float16_is_summed_in_float16(accumulation, dtype, sums_in_float16, monkeypatch):
    """PyTorch refuses float32 sums of float16 on a card where its user has allowed float16's."""

    def baddbmm(out, a, b, *, out_dtype, beta, out_):
        assert not (accumulation and a.dtype == torch.float16)
        assert out is out_
        return out.copy_(beta * out + a.to(out_dtype) @ b.to(out_dtype) if beta else a.to(out_dtype) @ b.to(out_dtype))

    a, b = normal((2, 5, 7), dtype, seed=1), normal((2, 7, 3), dtype, seed=2)
    wanted, total = a.double() @ b.double(), torch.full((2, 5, 3), math.nan)
    sums_in_float16(accumulation)
    with monkeypatch.context() as card:
        card.setattr(torch.Tensor, "is_cuda", True)
        card.setattr(torch, "baddbmm", lambda *call, out, **more: baddbmm(*call, out_=out, **more))
        _stages._first_product(a, b, out=total)
        _stages._add_product(a, b, out=total)
    torch.testing.assert_close(total.double(), 2 * wanted, atol=1e-2, rtol=1e-2)


def test_of_backward_by_stages_only_the_wanted_is_made(staged):
    tensors, dy = staged_problem((2, 40, 136, 32), "contiguous")
    everything = judge_stages(tensors, dy)
    for i in range(3):
        wanted = [i == j for j in range(3)]
        got = kernels.backward(*tensors, None, None, None, dy, "silu", False, (*wanted, False, False, False))
        assert [t is not None for t in got] == [*wanted, False, False, False]
        same([got[i]], [everything[i]])
    leaves = [t.requires_grad_() for t in tensors]  # grad mode is on in here
    same(kernels.backward(*leaves, None, None, None, dy, "silu", False, (True,) * 3 + (False,) * 3)[:3], everything)


def test_auto_goes_by_stages_where_they_win(staged, monkeypatch):
    assert op.stages_win(8, 256, 1024, 16384)
    assert op.stages_win(32, 256, 256, 512)
    assert op.stages_win(16, 192, 1024, 4096)
    assert not (op.stages_win(4, 256, 512, 1024))
    assert not (op.stages_win(16, 160, 640, 2048))
    assert not (op.stages_win(8, 512, 1024, 4096))
    (x, w1, w2), _ = staged_problem((2, 40, 192, 32), "contiguous")
    inputs = x, w1, w2, None, None, None
    monkeypatch.setattr(op, "_triton_missing", lambda: None)
    assert not op._by_stages(inputs, False)
    monkeypatch.setattr(op, "stages_win", lambda *sizes: True)
    assert op._by_stages(inputs, False)
    assert not op._by_stages(inputs, True)


def test_what_does_not_go_by_stages(staged, monkeypatch):
    (x, w1, w2), _dy = staged_problem((2, 40, 136, 32), "contiguous")
    assert kernels.by_stages(x, w1, w2, None, None, None, False)
    b1, b2 = torch.zeros(2, 32, dtype=x.dtype), torch.zeros(2, 136, dtype=x.dtype)
    odd = normal((x.numel() + 1,), torch.bfloat16, seed=1)[1:].view(x.shape)  # begins at no multiple of 16 bytes
    for call in (
        (x[0], w1, w2, None, None, None, False), (x, w1, w2, None, None, None, True), (x, w1, w2, b1, None, None, False),
        (x, w1, w2, None, b2, None, False), (x, w1, w2, None, None, w1, False), (odd, w1, w2, None, None, None, False),
        (x.float(), w1.float(), w2.float(), None, None, None, False), (x, w1[..., :20], w2[:, :20], None, None, None, False),
        (x[..., :128], w1[:, :128], w2[..., :128], None, None, None, False), (x, w1[..., :0], w2[:, :0], None, None, None, False),
        (x[:1].expand(x.shape), w1, w2, None, None, None, False),
        (x, w1.transpose(1, 2).contiguous().transpose(1, 2), w2, None, None, None, False),
    ):  # fmt: skip
        assert not kernels.by_stages(*call)
    monkeypatch.setattr(_launch._State, "off", "TRINIX_FAST_LAUNCH=0")
    assert not kernels.by_stages(x, w1, w2, None, None, None, False)


def test_a_wrong_stage_fails_the_budget(staged, monkeypatch):
    tensors, dy = staged_problem((2, 70, 136, 40), "contiguous")
    good = Boxed.__call__

    def without_a_share(self, *boxes):
        self.programs -= 1
        good(self, *boxes)

    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *size, **more: empty(t, *size, **more).fill_(math.nan))
    monkeypatch.setattr(Boxed, "__call__", without_a_share)
    with pytest.raises(AssertionError, match="nan"):
        judge_stages(tensors, dy)


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ((16_384, 8, 256, 1024), (4, 16_384, 1)),  # M-7
        ((16_384, 6, 256, 1024), (6, 8192, 1)),  # three heads' products would have 48 tiles for 132 processors
        ((16_384, 16, 256, 512), (8, 16_384, 1)),
        ((16_384, 64, 256, 1024), (4, 16_384, 1)),
        ((32_768, 4, 256, 1024), (4, 16_384, 1)),
        ((65_536, 8, 256, 1024), (8, 8192, 1)),
        ((2048, 8, 256, 1024), (8, 2048, 1)),  # 128 programs
        ((1024, 4, 256, 512), (4, 1024, 4)),
        ((4096, 64, 256, 512), (16, 4096, 1)),  # 17 at a time it would be 20 rounds for 16
        ((2048, 16, 160, 640), (16, 2048, 1)),
        ((4096, 16, 192, 1024), (8, 4096, 1)),
        ((50_000, 1, 256, 4096), (1, 12_544, 4)),
        ((1, 1, 136, 8), (1, 1, 1)),
    ],
)
def test_stages_fill_the_card_with_few_heads_and_share_e_among_programs_where_rows_are_few(sizes, wanted):
    """Portions of the rows are added up in float32: rather all rows of some heads, where their products fill half of the card."""
    chunk, portion, _ = found = _stages.choose(*sizes, 132, (128, 64))
    assert found == wanted
    assert 4 * chunk * portion * sizes[3] <= _stages.MOST_BYTES


@pytest.mark.parametrize("rows", [1, 127, 129, 384, 512, 700, 4096, 100000])
@pytest.mark.parametrize("heads", [1, 8, 42, 1024])
@pytest.mark.parametrize("e", [8, 1024, 8192, 16384])
def test_stages_hold_no_more_than_they_say(rows, heads, e):
    chunk, portion, _ = _stages.choose(rows, heads, 256, e, 132, (128, 64))
    assert 1 <= chunk <= heads
    assert 1 <= portion <= rows
    assert 2 * 2 * chunk * portion * e <= _stages.MOST_BYTES


def test_what_has_no_descriptor_takes_pointers(boxed, monkeypatch):
    def new(*shape, seed=1):
        return normal(shape, torch.bfloat16, seed=seed)

    h, b, d, e = 2, 64, 128, 24
    x, w1, w2, b1, b2 = new(h, b, d), new(h, d, e, seed=2), new(h, e, d, seed=3), new(h, e, seed=4), new(h, d, seed=5)
    assert boxed(x, w1, w2, None, None, None)[1]
    odd = new(x.numel() + 1)[1:].view(x.shape)  # begins at no multiple of 16 bytes
    narrow = new(h, b, 120), new(h, 120, e), new(h, e, 120)
    for call in (
        (odd, w1, w2, None, None, None),
        (x, w1, w2, b1, None, None),
        (x, w1, w2, None, b2, None),
        (x, w1, w2, None, None, w1),
        (x[0], w1, w2, None, None, None),  # for all heads
        (x[:1].expand(h, b, d), w1, w2, None, None, None),
        (x[:, :1].expand(h, b, d), w1, w2, None, None, None),
        (x, w1[:1].expand(h, d, e), w2, None, None, None),
        (x, w1.transpose(1, 2).contiguous().transpose(1, 2), w2, None, None, None),
        (x[:, :32], w1, w2, None, None, None),  # fewer rows than tensor cores take
        (x, w1[..., :20], w2[:, :20].contiguous(), None, None, None),
        (x[..., ::2], w1[:, ::2], w2[..., ::2], None, None, None),
        (*narrow, None, None, None),
        (*[t.float() for t in (x, w1, w2)], None, None, None),
        (x, w1[..., :0], w2[:, :0], None, None, None),
    ):
        y, by_boxes = boxed(*call)
        assert not by_boxes
        wide = [t if t is None else t.double() for t in call]
        low = reference.forward(*call, "silu", False)
        assert_within_budget([y], [low], [reference.forward(*wide, "silu", False)])
    assert not boxed(x, w1, w2, None, None, None, mean=True)[1]
    monkeypatch.setattr(_launch._State, "off", "TRINIX_FAST_LAUNCH=0")
    assert not boxed(x, w1, w2, None, None, None)[1]


@pytest.mark.usefixtures("no_kept_plans")
@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_float32_as_float64_is_right_to_one_rounding(kind, monkeypatch):
    monkeypatch.setattr(kernels, "_card", lambda index: (1, 227, True))
    forms = {
        (2, 21, 16, 24): {"gated": True, "bias": True},
        (3, 33, 24, 40): {"bias": True, "shared": True, "mean": True},
        (2, 70, 40, 33): {"layout": "transposed"},
        (2, 5, 1, 129): {},
    }
    tried = 4 if kind in ("silu", "gelu") else 1  # a kind differs in its formula only
    for sizes, more in list(forms.items())[:tried]:
        problem = Numbers(*sizes, **more)
        got = problem.oracle(kind)
        wide = [dense(t, torch.float64) for t in problem.tensors]
        true = vjp(problem.call(kind, "torch"), wide, dense(problem.dy, torch.float64))
        for ours, exact in zip(got, true, strict=True):
            # a mean's factor has a rounding of its own, and so have sums over splits
            roundings = 3 if problem.mean else 1.01
            assert float((ours - exact).abs().max()) <= roundings * 2.0**-24 * float(exact.abs().max()) + 1e-37


def test_plans_of_ever_other_numbers_of_rows_do_not_pile_up():
    assert kernels._forward_plan.cache_info().maxsize
    assert kernels._backward_plan.cache_info().maxsize
    assert glu.choose_rows.cache_info().maxsize


def test_splits_need_no_more_memory_than_dy():
    for h, b, d, e in ((8, 512, 64, 512), (12, 1024, 64, 768), (16, 2048, 64, 1024), (1, 1 << 16, 64, 256)):
        splits = kernels.choose_splits(h * -(-e // 64), b, 64, 2 * h * d * e, h * b * d * 2, 132)
        assert splits == 1 or splits * 2 * h * d * e * 4 <= h * b * d * 2
    assert kernels.choose_splits(4, 1 << 16, 64, 2 * 64 * 256, (1 << 16) * 64 * 2, 132) > 30


@pytest.mark.parametrize("sizes", [(2, 0, 8, 8), (2, 3, 8, 0), (2, 3, 0, 8), (0, 3, 8, 8)], ids=str)
def test_empty_sizes_give_empty_or_zero_results(sizes, device):
    problem = Numbers(1, 1, 1, 1, bias=True)  # for its call
    h, b, d, e = sizes
    shapes = ((h, b, d), (h, d, e), (h, e, d), (h, e), (h, d))
    tensors = [torch.ones(s, device=device) for s in shapes]
    results = []
    for backend in ("triton", "torch"):
        results.append(vjp(problem.call("silu", backend), tensors, torch.ones(h, b, d, device=device)))
    same(*results)


def _phi(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


PAGE = {  # kind -> f, in plain Python
    "none": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * _phi(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "squared_relu": lambda x: max(x, 0.0) ** 2,
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "tanh": math.tanh,
    "softplus": lambda x: math.log1p(math.exp(x)),
}


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_the_oracle_itself_is_the_formula_on_the_page(kind):
    h, b, d, e = 2, 2, 3, 2
    problem = Numbers(h, b, d, e, dtype=torch.float64, bias=True, gated=True)
    x, w1, w2, b1, b2, w_gate = (t.tolist() for t in problem.slots)
    wanted = torch.zeros(h, b, d, dtype=torch.float64)
    for i in range(h):
        for j in range(b):
            for k in range(d):
                wanted[i, j, k] = b2[i][k]
                for m in range(e):
                    up = sum(x[i][j][n] * w1[i][n][m] for n in range(d)) + b1[i][m]
                    gate = sum(x[i][j][n] * w_gate[i][n][m] for n in range(d))
                    wanted[i, j, k] += PAGE[kind](gate) * up * w2[i][m][k]
    torch.testing.assert_close(problem.call(kind, "torch")(*problem.tensors), wanted, rtol=1e-12, atol=1e-13)
    plain = Numbers(h, b, d, e, dtype=torch.float64)
    hidden = (plain.slots[0] @ plain.slots[1]).apply_(PAGE[kind])
    torch.testing.assert_close(
        plain.call(kind, "torch")(*plain.tensors), hidden @ plain.slots[2], rtol=1e-12, atol=1e-13
    )


def test_tanh_approx_keeps_the_sigmoid_within_2_to_the_minus_12():
    """tanh.approx errs by at most 2^-11 of its value (PTX ISA): whatever the sign of the error, (1 + tanh) / 2 by 2^-12."""
    x = torch.linspace(-40, 40, 200_001, dtype=torch.float64)
    for sign in (1, -1):
        approximate = 0.5 + 0.5 * torch.tanh(0.5 * x) * (1 + sign * 2.0**-11)
        assert (approximate - torch.sigmoid(x)).abs().max() <= 2.0**-12 * (1 + 1e-9)


def test_the_polynomial_of_gelu_errs_less_than_tanh_approx():
    """(1 + tanh u) / 2 in place of P(Z < x), with the coefficients of both files of kernels and an exact tanh."""
    x = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    h, q = 0.5 * x, (0.25 * x * x).clamp(max=9.0)
    t = torch.tanh(h * (1.5948458129002398 + q * (0.2960349274419079 + q * -0.011132056953053725)))
    slope = 1.5948458129002398 + q * (0.8881047823257238 + q * -0.05566028476526862)
    cdf, pdf = torch.special.ndtr(x), torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    assert (h * t + h - x * cdf).abs().max() < 4e-5
    assert (0.5 * (t + h * (1 - t * t) * slope) + 0.5 - (cdf + x * pdf)).abs().max() < 1e-4


# ---- gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", NAMES)
def test_only_the_wanted_gradient_is_computed_and_it_is_the_same(wanted, device, monkeypatch):
    problem = Numbers(2, 33, 16, 40, bias=True, gated=True, device=device)
    everything = dict(zip(NAMES, vjp(problem.call("silu", "triton"), problem.tensors, problem.dy)[1:], strict=True))
    seen = []
    run = kernels.backward
    monkeypatch.setattr(kernels, "backward", lambda *a: seen.append(a[-1]) or run(*a))
    leaves = [t.detach().requires_grad_(n == wanted) for n, t in zip(NAMES, problem.slots, strict=True)]
    leaf = leaves[NAMES.index(wanted)]
    got = torch.autograd.grad(problem.call("silu", "triton")(*leaves), leaf, problem.dy)[0]
    if device == "cpu":
        same(got, everything[wanted])
    else:  # another binary, whose sums may be contracted otherwise
        torch.testing.assert_close(got, everything[wanted])
    assert seen == [tuple(n == wanted for n in NAMES)]


def test_backward_saves_the_inputs_alone_and_writes_into_nothing_of_others(device):
    problem = Numbers(2, 33, 16, 40, bias=True, device=device)
    before = [t.clone() for t in (*problem.tensors, problem.dy)]
    leaves = [t.detach().requires_grad_() for t in problem.tensors]
    y = problem.call("silu", "triton")(*leaves)
    saved = [t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None]
    assert saved == [t.data_ptr() for t in problem.tensors]
    first = torch.autograd.grad(y, leaves, problem.dy, retain_graph=True)
    bits = [t.clone() for t in first]
    same(torch.autograd.grad(y, leaves, problem.dy), bits)
    same(list(first), bits)
    same([*problem.tensors, problem.dy], before)


def test_without_a_gradient_no_function_is_recorded(device):
    problem = Numbers(1, 3, 16, 16, device=device)
    y = problem.call("silu", "triton")(*problem.tensors)
    assert y.grad_fn is None
    with torch.no_grad():
        assert problem.call("silu", "triton")(*[t.requires_grad_() for t in problem.tensors]).grad_fn is None


def test_results_lie_as_their_inputs(device):
    problem = Numbers(3, 9, 16, 24, layout="transposed", device=device)
    y, dx, *_ = vjp(problem.call("silu", "triton"), problem.tensors, problem.dy)
    assert y.stride() == dx.stride() == problem.slots[0].stride()


def test_an_expanded_gradient_is_read_as_it_is(device):
    problem = Numbers(2, 9, 16, 24, device=device)
    problem.dy = torch.full((), 0.5, device=device).expand(2, 9, 16)
    problem.oracle("gelu")


@pytest.mark.parametrize("kind", ["silu", "swiglu", "mish"])
def test_the_second_derivative_is_pytorchs(kind, device):
    problem = Numbers(2, 3, 4, 5, bias=True, gated=kind == "swiglu", device=device)
    results = []
    for backend in ("triton", "torch"):
        leaves = [t.detach().requires_grad_() for t in problem.tensors]
        incoming = problem.dy.detach().requires_grad_()
        y = problem.call(kind, backend)(*leaves)
        grads = torch.autograd.grad(y, leaves, incoming, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        second = torch.autograd.grad(penalty, [*leaves, incoming], materialize_grads=True)  # b2 plays no part
        results.append([g.detach() for g in grads] + list(second))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_one_tensor_may_be_two_inputs(backend, device):
    w = normal((2, 8, 8), torch.float32, seed=1, device=device).requires_grad_()
    x = normal((2, 5, 8), torch.float32, seed=2, device=device)
    wanted = torch.autograd.grad((F.silu(x @ w) @ w).sum(), w)[0]
    torch.testing.assert_close(torch.autograd.grad(head_mlp(x, w, w, backend=backend).sum(), w)[0], wanted)


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": 3}, TypeError, "x must be a floating-point tensor, got int"),
        ({"x": torch.ones(2, 3, 4, dtype=torch.int32)}, TypeError, "got torch.int32"),
        ({"x": torch.ones(4)}, ValueError, r"x must be \[H, B, D\]"),
        ({"x": torch.ones(2, 3, 5)}, ValueError, r"x must be \[2, B, 4\] or \[B, 4\] .* got \[2, 3, 5\]"),
        ({"x": torch.ones(3, 3, 4)}, ValueError, r"got \[3, 3, 4\]"),
        ({"w1": torch.ones(4, 6)}, ValueError, r"w1 must be \[H, D, E\], got \[4, 6\]; .*unsqueeze"),
        ({"w1": torch.ones(1, 2, 4, 6)}, ValueError, r"w1 must be \[H, D, E\], got \[1, 2, 4, 6\]; reshape it"),
        ({"w1": None}, TypeError, r"w1 must be a tensor \[H, D, E\], got NoneType"),
        ({"w2": torch.ones(2, 4, 6)}, ValueError, r"w2 must be \[2, 6, 4\] .* got \[2, 4, 6\]"),
        (
            {"w2": torch.ones(2, 6, 4).half()},
            TypeError,
            r"w2 must be a tensor of x's dtype torch.float32, got torch.float16",
        ),
        ({"w2": None}, TypeError, r"w2 must be a tensor of x's dtype torch.float32, got NoneType; make it one"),
        ({"b2": 0.0}, TypeError, r"b2 must be a tensor of x's dtype torch.float32, got float; make it one"),
        ({"b1": torch.ones(6)}, ValueError, r"b1 must be \[2, 6\]"),
        ({"b2": torch.ones(2, 6)}, ValueError, r"b2 must be \[2, 4\]"),
        ({"w_gate": torch.ones(2, 6, 4)}, ValueError, r"w_gate must be \[2, 4, 6\]"),
        ({"kind": "SiLU"}, ValueError, "kind must be one of .* got 'SiLU'"),
        ({"kind": "swiglu"}, ValueError, "gated unit and needs w_gate"),
        ({"reduce": "sum"}, ValueError, "reduce must be None or 'mean', got 'sum'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_arguments_say_what_was_wanted(change, error, text):
    call = {"x": torch.ones(2, 3, 4), "w1": torch.ones(2, 4, 6), "w2": torch.ones(2, 6, 4)} | change
    with pytest.raises(error, match=text):
        head_mlp(**call)


def test_a_named_backend_that_cannot_run_says_why():
    x, w1, w2 = torch.ones(1, 2, 300), torch.ones(1, 300, 4), torch.ones(1, 4, 300)
    with pytest.raises(trinix.Unsupported, match="D is at most 256, got 300"):
        head_mlp(x, w1, w2, backend="triton")
    with pytest.raises(trinix.Unsupported, match=r"no kernel for torch\.float64"):
        head_mlp(*[t.double() for t in Numbers(1, 2, 3, 4).tensors], backend="triton")


def test_hopper_is_named_only_on_a_hopper_gpu():
    x, w1, w2 = torch.ones(1, 2, 64), torch.ones(1, 64, 4), torch.ones(1, 4, 64)
    with pytest.raises(trinix.Unsupported, match="needs a GPU tensor, got cpu"):
        head_mlp(x, w1, w2, backend="hopper")


def test_hopper_wins_where_it_was_measured_to_be_faster():
    rows = {
        (8, 512, 64, 512): (False, False), (12, 1024, 64, 768): (False, False), (16, 2048, 64, 1024): (True, True),
        (32, 4096, 64, 512): (True, True), (12, 4096, 64, 768): (True, False), (16, 8192, 128, 2048): (True, True),
        (8, 16384, 256, 1024): (True, True), (4, 1024, 256, 512): (False, False), (8, 2048, 256, 1024): (False, True),
        (1, 8192, 256, 4096): (False, True), (1, 8192, 128, 2048): (False, False),
    }  # fmt: skip
    for (h, b, d, e), wanted in rows.items():
        assert tuple(op.hopper_wins(h, b, d, e, backward, 132) for backward in (False, True)) == wanted


def test_the_mean_of_no_heads_has_gradients_of_zero():
    x = torch.ones(3, 4, requires_grad=True)
    head_mlp(x, torch.ones(0, 4, 6), torch.ones(0, 6, 4), reduce="mean", backend="triton").sum().backward()
    assert not x.grad.any()


def test_explain_says_which_backend_and_why():
    x, w1, w2 = torch.ones(1, 2, 16), torch.ones(1, 16, 4), torch.ones(1, 4, 16)
    text = str(trinix.explain("head_mlp", x, w1, w2))
    assert text.startswith("head_mlp[silu] -> torch")
    assert "needs a GPU tensor, got cpu" in text
    assert trinix.explain("head_mlp", x, w1, w2, "swiglu", w_gate=w1, backend="triton").op == "head_mlp[silu, gated]"
    assert "rows x" in trinix.explain("head_mlp", x, w1, w2, backend="triton").config
    x, *wide = (torch.ones(2, 64, n, dtype=torch.bfloat16) for n in (64, 512, 512))
    wide[1] = wide[1].mT  # few programs have a wide tile, a mean over heads has not
    assert "x 128 hidden" in trinix.explain("head_mlp", x, *wide, backend="triton").config
    assert "x 64 hidden" in trinix.explain("head_mlp", x, *wide, reduce="mean", backend="triton").config
    x, w1, w2 = (torch.ones(s, dtype=torch.bfloat16) for s in ((5, 103, 80), (5, 80, 333), (5, 333, 80)))
    assert "8 warps" in trinix.explain("head_mlp", x, w1, w2, backend="triton").config  # accesses of one element


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("d", "e"), [(257, 64), (1024, 4096), (4096, 11008)])
def test_auto_gives_an_ordinary_mlp_to_pytorch_and_says_so(d, e, grad, monkeypatch):
    """One head of a width beyond the kernels': a case for large matrix products."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(op, "_triton", lambda: pytest.fail("asked for a kernel"))
    shapes = (1, 8, d), (1, d, e), (1, e, d)
    explanation = trinix.explain(head_mlp, *(torch.empty(s, dtype=torch.bfloat16, requires_grad=grad) for s in shapes))
    assert explanation.backend == "torch"
    for name in ("hopper", "triton"):
        assert f"D = {d} is more than " in explanation.rejected[name]
        assert "large matrix products" in explanation.rejected[name]


# ---- a citizen of PyTorch ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", ["plain", "gated with biases", "mean"])
def test_compile_keeps_the_op_whole(form, device):
    problem = Numbers(2, 9, 16, 24, bias="bias" in form, gated="gated" in form, mean=form == "mean", device=device)
    leaves = [t.requires_grad_() for t in problem.tensors]
    targets = []

    def recording(graph, example_inputs):
        targets.extend(str(node.target) for m in graph.modules() for node in m.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    function = problem.call("silu", "triton")
    y = torch.compile(function, fullgraph=True, backend=recording)(*leaves)
    same(y, function(*leaves))
    grads = [torch.autograd.grad(f, leaves, problem.dy) for f in (y, function(*leaves))]
    same(*grads)
    assert "trinix.head_mlp.default" in targets


def test_the_registered_ops_pass_opcheck(device):
    for form in ({}, {"bias": True, "gated": True}, {"shared": True, "mean": True}):
        problem = Numbers(2, 5, 8, 16, device=device, **form)
        torch.library.opcheck(torch.ops.trinix.head_mlp.default, (*problem.slots, "silu", problem.mean, "triton"))
        wanted = [t is not None for t in problem.slots]
        call = (*problem.slots, problem.dy, "silu", problem.mean, "triton", wanted)
        torch.library.opcheck(torch.ops.trinix.head_mlp_backward.default, call)


def test_a_dispatch_mode_sees_one_op_a_pass(device):
    problem = Numbers(2, 5, 8, 16, device=device)
    with Watch() as watch:
        problem.oracle("silu")
    assert [n for n in watch.seen if "trinix" in n] == ["trinix.head_mlp.default", "trinix.head_mlp_backward.default"]


def test_fake_tensors_pass_with_shape_strides_and_dtype_and_no_kernel(device, monkeypatch):
    monkeypatch.setattr(_launch.Launch, "__call__", lambda *_: pytest.fail("a kernel ran on a fake tensor"))
    with FakeTensorMode():
        x = torch.empty(5, 2, 8, device=device, dtype=torch.bfloat16).transpose(0, 1).requires_grad_()
        w1, w2 = (torch.empty(2, *s, device=device, dtype=torch.bfloat16) for s in ((8, 16), (16, 8)))
        y = head_mlp(x, w1, w2, backend="triton")
        y.sum().backward()
        assert (y.shape, y.stride(), y.dtype, x.grad.shape) == (x.shape, x.stride(), x.dtype, x.shape)
        assert head_mlp(x[0], w1, w2, reduce="mean", backend="triton").shape == (5, 8)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_function_transforms_forward_mode_and_negative_views_are_right_or_refused(backend, device):
    problem = Numbers(2, 3, 4, 8, device=device)
    x, w1, w2 = problem.tensors
    ours, theirs = problem.call("silu", backend), problem.call("silu", "torch")
    tangent = torch.ones_like(x)
    wanted = torch.func.jvp(lambda t: theirs(t, w1, w2), (x,), (tangent,))[1]
    right_or_refused(lambda: torch.func.jvp(lambda t: ours(t, w1, w2), (x,), (tangent,))[1], wanted)
    gradient = torch.func.grad(lambda t: theirs(t, w1, w2).sum())(x)
    right_or_refused(lambda: torch.func.grad(lambda t: ours(t, w1, w2).sum())(x), gradient)
    torch.testing.assert_close(ours(torch._neg_view(x), w1, w2), theirs(-x, w1, w2))


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_autocast_casts_as_a_matrix_product(backend, device):
    problem = Numbers(2, 5, 8, 16, device=device)
    leaves = [t.requires_grad_() for t in problem.tensors]
    with torch.autocast(device, dtype=torch.bfloat16):
        y = problem.call("silu", backend)(*leaves)
        assert y.dtype == torch.bfloat16
        assert head_mlp(leaves[0].bfloat16(), *leaves[1:], backend=backend).dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), leaves)
    assert [g.dtype for g in grads] == [torch.float32] * 3


def test_checkpointing_works(device):
    problem = Numbers(2, 5, 8, 16, device=device)
    x, *weights = problem.tensors
    x.requires_grad_()
    wanted = torch.autograd.grad(head_mlp(x, *weights, backend="triton").sum(), x)[0]
    y = torch.utils.checkpoint.checkpoint(problem.call("silu", "triton"), x, *weights, use_reentrant=False)
    same(torch.autograd.grad(y.sum(), x)[0], wanted)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_tensor_subclass_keeps_its_type(backend, device):
    x, w1, w2 = Numbers(2, 5, 8, 16, device=device).tensors
    assert type(head_mlp(x.as_subclass(Tagged), w1, w2, backend=backend)) is Tagged


def test_meta_tensors_give_shapes():
    x, w1, w2 = (torch.empty(shape, device="meta", requires_grad=True) for shape in ((2, 5, 8), (2, 8, 16), (2, 16, 8)))
    y = head_mlp(x, w1, w2)
    assert (y.shape, y.device.type) == (x.shape, "meta")
    assert [g.shape for g in torch.autograd.grad(y.sum(), (x, w1, w2))] == [x.shape, w1.shape, w2.shape]


# ---- calls like one before ---------------------------------------------------------------------------------------------


class Counting:
    """Kernels that compute the formula, and count."""

    def __init__(self):
        self.forwards, self.backwards = 0, 0

    @staticmethod
    def unsupported(*call):
        return None

    @staticmethod
    def by_stages(*call):
        return False

    def forward(self, *call):
        self.forwards += 1
        return reference.forward(*call)

    def backward(self, x, w1, w2, b1, b2, w_gate, dy, kind, mean, wanted):
        self.backwards += 1
        return op._formula_gradients((x, w1, w2, b1, b2, w_gate), dy, kind, mean, wanted)


@pytest.fixture
def counting(monkeypatch):
    counting = Counting()
    monkeypatch.setitem(op.BACKENDS, "triton", lambda: counting)
    monkeypatch.setattr(op, "_triton", lambda: counting)
    monkeypatch.setattr(op, "_prepared", {})
    return counting


def test_a_call_like_one_before_takes_what_was_kept(counting, monkeypatch):
    problem = Numbers(2, 5, 8, 16)
    ours = problem.call("silu", "triton")
    ours(*problem.tensors)
    monkeypatch.setattr(op, "_check", None)  # nobody asks it again
    leaves = [(t + 1).requires_grad_() for t in problem.tensors]
    with torch.no_grad():
        assert torch.equal(ours(*leaves), reference.forward(*leaves, None, None, None, "silu", False))
    assert (counting.forwards, len(op._prepared)) == (2, 1)


def test_no_call_is_served_by_what_was_kept_for_another(counting):
    """Forms, layouts, dtypes, kinds, gradients, autocast, use_backend: each after all others, and again."""
    problems = [
        Numbers(2, 5, 8, 16, **form)
        for form in (
            {}, {"layout": "transposed"}, {"layout": "packed"}, {"dtype": torch.bfloat16}, {"shared": True}, {"bias": True},
            {"gated": True}, {"mean": True},
        )
    ]  # fmt: skip
    problems += [Numbers(2, 6, 8, 16), Numbers(2, 5, 8, 12), Numbers(1, 5, 8, 16)]
    for _ in range(3):
        for problem in problems:
            for kind in ("silu", "relu"):
                for wanted in ([], [0], [1, 2], range(len(problem.tensors))):
                    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(problem.tensors)]
                    y, true = (problem.call(kind, backend)(*leaves) for backend in ("triton", "torch"))
                    assert torch.equal(y, true)
                    if wanted:
                        leaves = [leaves[i] for i in wanted]
                        ours, theirs = (torch.autograd.grad(o, leaves, problem.dy) for o in (y, true))
                        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    x, w1, w2 = problems[0].tensors
    head_mlp(x, w1, w2, backend="triton")
    before = counting.forwards
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head_mlp(x, w1, w2, backend="triton").dtype == torch.bfloat16
    assert counting.forwards == before + 1
    head_mlp(x, w1, w2)
    with trinix.use_backend("torch"):
        head_mlp(x, w1, w2)
    assert counting.forwards == before + 1
    with trinix.use_backend("triton"):
        head_mlp(x, w1, w2)
    assert counting.forwards == before + 2
    for wrong, error in (
        ({"kind": "swiglu"}, ValueError),
        ({"reduce": "sum"}, ValueError),
        ({"backend": "trit"}, ValueError),
    ):
        with pytest.raises(error, match="head_mlp: "):
            head_mlp(x, w1, w2, **({"backend": "triton"} | wrong))
    for wrong, error in (
        ((x, w1, w2.bfloat16()), TypeError),
        ((x, w1, w2.to("meta")), ValueError),
        ((x, w1, None), TypeError),
    ):
        with pytest.raises(error, match="head_mlp: "):
            head_mlp(*wrong, backend="triton")


@pytest.mark.parametrize("which", range(3), ids=["x", "w1", "w2"])
def test_what_was_kept_does_not_answer_for_a_layout_that_a_backend_refuses(counting, which, monkeypatch):
    """Strides and odd addresses, which tensor descriptors cannot have."""
    dense = Numbers(2, 8, 8, 8).tensors
    others = (
        lambda t: torch.stack((t, t), -1)[..., 0],
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    )
    head_mlp(*dense, backend="triton")
    asked = []
    monkeypatch.setattr(counting, "unsupported", lambda *call: asked.append(call) or "cannot", raising=False)
    head_mlp(*dense, backend="triton")
    assert not asked
    for other in others:
        given = [other(t) if i == which else t for i, t in enumerate(dense)]
        with pytest.raises(trinix.Unsupported, match="cannot"):
            head_mlp(*given, backend="triton")


def test_gradients_of_kept_calls(counting):
    """A second derivative, a batch of gradients, an expanded one: as without what was kept."""
    problem = Numbers(2, 5, 8, 16, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in problem.tensors]

    def everything(backend):
        y = problem.call("silu", backend)(*leaves)
        first = torch.autograd.grad(y, leaves, problem.dy, create_graph=True)
        yield torch.autograd.grad(sum(g.square().sum() for g in first), leaves, retain_graph=True)
        yield torch.autograd.grad(
            y, leaves, torch.stack([problem.dy, -problem.dy]), is_grads_batched=True, retain_graph=True
        )
        yield torch.autograd.grad(y.sum(), leaves)

    for _ in range(2):
        for ours, theirs in zip(everything("triton"), everything("torch"), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b)
    assert counting.backwards == 2


# ---- the tests can fail ------------------------------------------------------------------------------------------------


@triton.jit
def _value_a_little_high(x, a, b):
    return x / (1.0 + tl.exp(-x)) * 1.01


@triton.jit
def _gradient_without_its_second_term(x, dy, a, b):
    return dy / (1.0 + tl.exp(-x))


def forget_plans():
    for name in ("forward_launch", "backward_launch", "_forward_plan", "_backward_plan", "_hidden_plan"):
        getattr(kernels, name).cache_clear()


@pytest.fixture
def no_kept_plans():
    forget_plans()
    yield
    forget_plans()


@pytest.mark.usefixtures("no_kept_plans")
@pytest.mark.parametrize(("broken", "blamed"), [(0, "y"), (1, "d0")])
def test_a_broken_formula_fails_the_oracle(broken, blamed, device, monkeypatch):
    good = list(kernels.formula("silu", torch.float32, 32))
    good[broken] = _value_a_little_high if broken == 0 else _gradient_without_its_second_term
    monkeypatch.setattr(kernels, "formula", lambda kind, dtype, lanes: tuple(good))
    with pytest.raises(AssertionError, match=f"^{blamed}: .*OVER BUDGET"):
        Numbers(2, 33, 16, 40, device=device).oracle("silu")


def test_a_program_that_does_not_run_fails_the_oracle(device, monkeypatch):
    run = _launch.Launch.__call__
    monkeypatch.setattr(_launch.Launch, "__call__", lambda self, blocks, *rest: run(self, blocks - 1, *rest))
    with pytest.raises(AssertionError, match="y: error nan"):
        Numbers(2, 100, 16, 40, device=device).oracle("silu")


# ---- random problems -----------------------------------------------------------------------------------------------------

SEEDS = range(200)
FEW = 64  # numbers of a tensor, of which chance decides: those of all calls are judged together, of several draws each
KINKED = {"relu", "leaky_relu", "reglu"}


def random_problem(seed, device, again=0):
    """(kind, problem): of five in a row one gated and two of any form, with sizes of 1, primes and one past each block, and two
    that tensor descriptors take, of which the second is as large as those that "auto" gives to Hopper's kernels. ``again``: the
    same with other numbers in it."""
    draw = random.Random(seed)
    form = seed % 5
    kinds = op.KINDS if form == 0 else PLAIN_KINDS
    kind = kinds[seed // 5 % len(kinds)]
    coarse = kind in KINKED
    b = draw.choice([1, 2, 3, 7, 16, 17, 31, 64, 65, 97, 128, 129, 200, 257])
    if form < 3:
        e = draw.choice([1, 5, 16, 17, 32, 33, 61, 64, 65, 96, 127, 128, 129, 200])
        d = draw.choice([1, 3, 8, 16, 17, 24, 31, 32, 40, 64, 65, 80, 96, 127, 128, 129, 192, 256])
        return kind, Numbers(
            draw.choice([1, 2, 3, 5]), b, d, e, dtype=draw.choice([*DTYPES, torch.bfloat16]), device=device,
            bias=draw.random() < 0.4, gated=form == 0, shared=draw.random() < 0.25, mean=draw.random() < 0.2,
            layout=draw.choice(["contiguous", "contiguous", "transposed", "packed"]), seed=seed + 1000 * again, coarse=coarse,
        )  # fmt: skip
    d = draw.choice([64, 64, 64, 128, 128, 128, 136, 192, 256, 256])
    layouts = ["contiguous", "heads inside"]
    if form == 3:
        h, e = draw.choice([1, 2, 3, 5]), draw.choice([8, 64, 72, 136, 200, 520])
    else:
        h, e = draw.choice([(1, 72), (3, 1032), (8, 72), (16, 1000), (16, 1000), (40, 1024)])
        b = -(-(1 << 30) // (h * d * e)) + draw.choice([0, 1, 37])
        layouts = [*layouts, *layouts, "transposed"]
    dtype = draw.choice([torch.bfloat16, torch.float16])
    layout = draw.choice(layouts)
    return kind, Numbers(h, b, d, e, dtype=dtype, device=device, layout=layout, seed=seed + 1000 * again, coarse=coarse)


PASSES = (False, True)


def judged(kind, problem):
    """The backends that a problem is for: besides the portable kernels Hopper's where they can run, and "auto" where it takes them."""
    inputs, mean = problem.slots, problem.mean
    call = *inputs, op._activation(kind, inputs[5] is not None), mean
    can = op._hopper_missing() is None and not any(op._hopper().unsupported(*call, backward) for backward in PASSES)
    by_auto = op._against_auto(inputs, mean, True) is None
    wins = by_auto and any(op._against_hopper(inputs, *call[6:], backward) is None for backward in PASSES)
    return ["triton", *["hopper"] * can, *["auto"] * wins]


def choose_as_on_an_h100(patch):
    """Every choice of the library's is that of an H100, wherever the tensors are."""
    hopper = op._hopper()
    for module, name, there in (
        (kernels, "_takes_boxes", lambda index: True), (kernels, "_card", lambda index: (132, 227, True)),
        (_launch._State, "off", None), (hopper, "_capability", lambda index: (9, 0)),
        (hopper, "processors", lambda index: 132), (hopper, "_plans", {}),
    ):  # fmt: skip
        patch.setattr(module, name, there)


PATHS = {
    # portable: by pointers, of 128 columns where programs are few, by descriptors; backward in one launch, with parts to add, in a
    # launch each, by stages, with E shared among programs
    "_forward", "_forward of 128", "_forward_boxed 128", "_forward_boxed 256, 3 stages", "_forward_boxed 256, 5 stages",
    "_backward", "_add_partials", "_backward apart", "_hidden_boxed", "_hidden_boxed shared",
    *[f"{of} {kernel}" for of in ("hopper", "auto") for kernel in (
        "_forward 64 by 2", "_forward 64 by 3", "_forward 128 by 2", "_forward 256 by 2", "_backward_rows 64",
        "_backward_rows 128", "_backward_weights 64", "_backward_weights 128", "_backward_hidden 256",
    )],
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn():
    """path -> [(size, seed)] of the problems that take it on an H100: launches of tensors without numbers, which are noted."""
    seen, paths = [], {}

    def portable(launch, blocks, tensors, scalars):
        wide = launch.kernel is kernels._forward and launch.constants["BE"] == 128
        seen.append(launch.kernel.__name__ + (" of 128" if wide else ""))

    def boxed(plan, programs, *tensors):
        kernel, _, integers, constants = plan.call
        more = " shared" if kernel is kernels._hidden_boxed and integers[-1] > 1 else ""
        if kernel is kernels._forward_boxed:
            more = f" {constants['BD']}" + (f", {plan.config.num_stages} stages" if constants["BD"] == 256 else "")
        seen.append(kernel.__name__ + more)

    class Plan:
        def __init__(self, kernel, tensors, blocks, items, integers, constants):
            self.name = f"{kernel.__name__} {constants['D']}"
            if kernel.__name__ == "_forward":
                self.name += f" by {constants['CONSUMERS']}"

        def __call__(self, *tensors):
            seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        choose_as_on_an_h100(patch)
        patch.setattr(torch.Tensor, "is_cuda", True)
        patch.setattr(_launch.Launch, "__call__", portable)
        patch.setattr(kernels._BoxedLaunch, "launch", boxed)
        patch.setattr(op._hopper(), "_Plan", Plan)
        forget_plans()
        for seed in SEEDS:
            kind, problem = random_problem(seed, "meta")
            activation = op._activation(kind, problem.slots[5] is not None)
            wanted = tuple(t is not None for t in problem.slots)
            size = problem.slots[0].shape[-2] * problem.slots[1].numel()
            for backend in judged(kind, problem):
                seen.clear()
                op._run_forward(*problem.slots, activation, problem.mean, backend)
                op._run_backward(*problem.slots, problem.dy, activation, problem.mean, backend, wanted)
                if seen.count("_backward") > 1:
                    seen.append("_backward apart")
                for one in {one if isinstance(one, str) else f"{backend} {one.name}" for one in seen}:
                    paths.setdefault(one, []).append((size, seed))
        forget_plans()
    return paths


def test_the_random_problems_take_every_path_of_an_h100_and_have_every_kind_and_size(drawn):
    assert set(drawn) == PATHS
    problems = [random_problem(seed, "meta") for seed in SEEDS]
    assert {kind for kind, _ in problems} == set(op.KINDS)
    shapes = [(p.slots[0].shape[-2], *p.slots[1].shape[1:]) for _, p in problems]
    for sizes, prime in zip(zip(*shapes, strict=True), (31, 31, 61), strict=True):
        assert {1, 17, prime, 65, 129} <= set(sizes)  # one past each block


@pytest.mark.parametrize(
    "path",
    [
        "_forward", "_forward_boxed 128", "_forward_boxed 256, 5 stages", "_backward", "_add_partials", "_hidden_boxed",
        "_hidden_boxed shared",
    ],
)  # fmt: skip
def test_random_problems_of_a_path_hold_the_budget(path, drawn, boxed, monkeypatch):
    """The largest that are soon done; of the other paths all are larger."""
    choose_as_on_an_h100(monkeypatch)
    for _, seed in sorted(one for one in drawn[path] if one[0] < 1 << 22)[-3:]:
        before = Boxed.launched
        kind, problem = random_problem(seed, "cpu")
        problem.oracle(kind)
        assert (Boxed.launched > before) >= ("boxed" in path)


# ---- on the card -------------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("batch", range(0, len(SEEDS), 20))
def test_on_the_card_random_problems_hold_the_float64_budget(batch):
    bad, few = [], []
    for seed in SEEDS[batch : batch + 20]:
        kind, problem = random_problem(seed, "cuda")
        for backend in judged(kind, problem):
            before = len(few)
            for _ in range(2):  # Triton's own path, then the fast launch
                for i, three in enumerate(zip(*problem.results(kind, backend), strict=True)):
                    if three[0].numel() < FEW:
                        few.append(("few", *three))
                    elif not (verdict := judge(f"d{i - 1}" if i else "y", *three)).ok:
                        bad.append(f"{seed} {kind} {backend}: {verdict}")
            if len(few) > before:
                for again in range(1, 8):
                    results = random_problem(seed, "cuda", again)[1].results(kind, backend)
                    few += [("few", *three) for three in zip(*results, strict=True) if three[0].numel() < FEW]
    bad += [str(verdict) for verdict in pooled(few) if not verdict.ok]
    assert not bad, "\n".join(bad)


ON_HOPPER = (
    *[("hopper", sizes) for sizes in ((3, 500, 64, 512), (40, 700, 64, 72), (2, 1000, 128, 200), (1, 1, 128, 8))],
    # by tensor descriptors
    *[("triton", sizes) for sizes in ((3, 500, 128, 512), (40, 700, 128, 72), (2, 1000, 256, 200), (1, 33, 136, 8))],
)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("backend", "sizes"), ON_HOPPER, ids=str)
def test_what_only_hopper_runs_holds_the_float64_budget_with_the_same_bits(backend, sizes, dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    for kind in PLAIN_KINDS:
        for layout in ("contiguous", "heads inside"):
            problem = Numbers(*sizes, dtype=dtype, device="cuda", layout=layout)
            explanation = trinix.explain(head_mlp, *problem.slots[:3], kind, backend=backend)
            assert backend == "hopper" or "descriptors" in str(explanation)
            first = problem.oracle(kind, backend)
            same(problem.oracle(kind, backend), first)


@gpu
@pytest.mark.parametrize(
    "sizes", [(1, 58255, 256, 72), (4, 20000, 256, 24), (8, 30000, 128, 40), (8, 60000, 64, 40)], ids=str
)
def test_on_the_card_many_rows_of_few_hidden_columns_have_the_same_bits(sizes):
    """The next rows' X is asked for while this one is still read."""
    problem = Numbers(*sizes, dtype=torch.bfloat16, device="cuda")
    first = problem.oracle("sigmoid", "hopper")
    for _ in range(200):
        same(vjp(problem.call("sigmoid", "hopper"), problem.tensors, problem.dy), first)


@gpu
@pytest.mark.parametrize("sizes", [(8, 4300, 256, 264), (16, 4200, 192, 136)], ids=str)
def test_on_the_card_launches_apart_hold_the_budget_with_the_same_bits(sizes, monkeypatch):
    monkeypatch.setattr(kernels, "by_stages", lambda *call: False)
    h, b, d, _ = sizes
    if not kernels.choose_apart(b, h, d, 2, True, *kernels._card(0)[:2]):
        pytest.skip("this card takes one launch")
    problem = Numbers(*sizes, dtype=torch.bfloat16, device="cuda")
    first = problem.oracle("silu")
    same(problem.oracle("silu"), first)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes", [(8, 4300, 256, 264), (3, 500, 192, 1032), (40, 1000, 136, 512), (1, 1, 256, 8)], ids=str
)
def test_on_the_card_stages_hold_the_budget_with_the_same_bits(sizes, dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    problem = Numbers(*sizes, dtype=dtype, device="cuda")
    x, w1, w2, *_ = problem.slots
    assert kernels.by_stages(x, w1, w2, None, None, None, False)
    for kind in PLAIN_KINDS:
        first = problem.oracle(kind, "triton")
        same(problem.oracle(kind, "triton"), first)
    function = problem.call("silu", "triton")
    graph, results = captured(lambda: vjp(function, problem.tensors, problem.dy))
    for t in (*problem.tensors, problem.dy):
        t.detach().normal_()
    graph.replay()
    same(results, vjp(function, problem.tensors, problem.dy))


@gpu
def test_on_the_card_portions_run_where_float16_is_summed_in_float16(sums_in_float16, monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setattr(_stages, "MOST_BYTES", 1 << 22)
    sums_in_float16(True)
    _stages.choose.cache_clear()
    try:
        problem = Numbers(8, 4300, 256, 264, dtype=torch.float16, device="cuda")
        got = vjp(problem.call("silu", "triton"), problem.tensors, problem.dy)
    finally:
        _stages.choose.cache_clear()
    assert all(t.isfinite().all() for t in got)


@gpu
@pytest.mark.parametrize("sizes", [(8, 512, 64, 512), (2, 4096, 128, 512), (1, 5000, 256, 300)], ids=str)
def test_on_the_card_larger_sizes_hold_the_budget_with_the_same_bits(sizes):
    problem = Numbers(*sizes, dtype=torch.bfloat16, device="cuda")
    first = problem.oracle("silu", "auto")
    for _ in range(20):
        same(vjp(problem.call("silu", "auto"), problem.tensors, problem.dy), first)


@gpu
def test_a_cuda_graph_replays_both_passes_on_new_data():
    problem = Numbers(4, 300, 64, 200, dtype=torch.bfloat16, device="cuda")
    function = problem.call("silu", "auto")
    graph, results = captured(lambda: vjp(function, problem.tensors, problem.dy))
    for t in (*problem.tensors, problem.dy):
        t.normal_()
    graph.replay()
    same(results, vjp(function, problem.tensors, problem.dy))


@gpu
def test_auto_runs_our_kernels_and_keeps_memory_within_the_documents_figures():
    """Document 000's peak of forward and backward: O, dO, dX, dW1 and dW2."""
    for h, b, d, e in ((8, 512, 64, 512), (16, 2048, 64, 1024), (32, 4096, 64, 512)):
        problem = Numbers(h, b, d, e, dtype=torch.bfloat16, device="cuda")
        leaves = [t.requires_grad_() for t in problem.tensors]
        for _ in range(2):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated() - problem.dy.nbytes
            torch.cuda.reset_peak_memory_stats()
            y = problem.call("silu", "auto")(*leaves)
            assert torch.cuda.memory_allocated() - before == 2 * y.nbytes
            grads = torch.autograd.grad(y, leaves, problem.dy)
            peak = torch.cuda.max_memory_allocated() - before
            assert peak <= 3 * y.nbytes + 2 * leaves[1].nbytes
            del y, grads
