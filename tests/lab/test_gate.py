"""The gate on ops with several inputs and outputs: every tensor is judged, in one piece and in slices."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from helpers import small_layer
from trinix.lab import gate, layers, peers, roofline, run
from trinix.lab.case import Case, load_cases
from trinix.lab.peers import eager

SMALL = {"q": (2, 6, 4, 8), "k": (2, 6, 2, 8), "cos": (9, 4), "sin": (9, 4), "q_weight": (8,), "k_weight": (8,)}
WHOLE, SLICED = 1 << 26, 64


def small(case: Case) -> Case:
    """The case with sizes that a CPU takes: 12 rows of 10."""
    if case.op in layers.OPS:
        return small_layer(case)
    args = dict(case.args)
    if "offset" in args:
        args["offset"] = 3
    if "seq_q" in args:
        args["seq_q"] = 7
    if "latent" in args:
        args["latent"] = 4
    if "page" in args:
        args["page"] = 3
    shape = {}
    for name, size in case.shape.items():
        if case.op == "attention":
            b, s, h, d = (2, 6, 4, 8) if name == "q" else (2, 6, 2, 8)
            shape[name] = (b, h, s, d) if "layout" in args else (b, s, h, d)
        elif case.op == "attention_decode":
            shape[name] = (2, 1, 4, 8) if name == "queries" else (4, 3, 2, 8) if "page" in args else (2, 6, 2, 8)
        elif "q" in case.shape:
            shape[name] = SMALL[name]
        elif name in ("weight", "bias", "slopes"):
            shape[name] = (10,)
        elif name == "mask":
            shape[name] = (6, 10)
        elif name in ("w1", "w2", "w_gate"):
            shape[name] = (2, 10, 10)
        else:
            shape[name] = (*([1] * (len(size) - 3)), *((2, 6)[: len(size) - 1] if len(size) > 2 else (12,)), 10)
    return dataclasses.replace(case, shape=shape, args=args)


def one_of_each() -> list[Case]:
    found = {}
    for case in load_cases("full"):
        if case.op in eager.FORMS and case.op != "activation":
            tiny = small(case)
            found.setdefault((tiny.op, str(tiny.args), tuple(tiny.shape), tiny.dtype), tiny)
    return list(found.values())


EACH = one_of_each()


def case_of(op, dtype=torch.float32, **more):
    return dataclasses.replace(next(c for c in EACH if c.op == op), dtype=dtype, **more)


def judged(case, call=None, **options):
    oracle = gate.Oracle(case, gate.inputs_of(case, "cpu"))
    return gate.gate(oracle, call or eager.prepare(case), **options)


@pytest.mark.parametrize("cut", [WHOLE, SLICED])
@pytest.mark.parametrize("case", EACH, ids=lambda c: c.id)
def test_the_eager_form_of_every_case_passes_the_gate(case, cut, monkeypatch):
    monkeypatch.setattr(gate, "SLICE", cut)
    reason, ratio = judged(case)
    assert reason is None
    assert ratio <= 1.01, "it is its own measure"


@pytest.mark.parametrize("cut", [WHOLE, SLICED])
@pytest.mark.parametrize("case", [c for c in EACH if peers.trinix.is_built(c)], ids=lambda c: c.id)
def test_every_built_op_passes_the_gate_and_says_what_ran(case, cut, monkeypatch):
    monkeypatch.setattr(gate, "SLICE", cut)
    oracle = gate.Oracle(case, gate.inputs_of(case, "cpu"))
    subject = run.admit(case, "trinix", oracle)
    assert subject.reason is None
    assert peers.trinix.backend_of(case, "trinix", *oracle.inputs.tensors) == "torch"


@pytest.mark.parametrize("case", EACH, ids=lambda c: c.id)
def test_every_tensor_that_a_case_derives_has_its_name_and_shape(case):
    inputs = gate.inputs_of(case, "cpu")
    got = gate.derive(eager.prepare(case), inputs)
    outputs = [tuple(t.shape) for name, t in got.items() if name.startswith("y")]
    assert outputs == list(gate.outputs_of(case))
    gradients = {name for name in got if name.startswith("d")}
    assert gradients == {f"d{name}" for name in case.shape if name not in gate.CONSTANT}
    assert all(
        got[f"d{n}"].shape == t.shape for n, t in zip(inputs.names, inputs.tensors, strict=True) if f"d{n}" in got
    )


def spoiled(case, name, change):
    """The eager form, with a fault put into one output or into what flows back to one input."""
    right = eager.prepare(case)

    class Fault(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, d):
            return change(d)

    def call(*xs):
        xs = [Fault.apply(x) if name == f"d{n}" else x for n, x in zip(case.shape, xs, strict=True)]
        ys = right(*xs)
        if not name.startswith("y"):
            return ys
        if not isinstance(ys, tuple):
            return change(ys)
        return tuple(change(y) if name == f"y{i}" else y for i, y in enumerate(ys, 1))

    return call


def last_row(t):
    """Wrong in the last row only, which only the last slice has."""
    t = t.clone(memory_format=torch.contiguous_format)
    t.view(-1, t.shape[-1])[-1] *= 1.01
    return t


TENSORS = [
    ("layer_norm", "y"), ("layer_norm", "dx"), ("layer_norm", "dweight"), ("layer_norm", "dbias"),
    ("rms_norm_residual", "y1"), ("rms_norm_residual", "y2"), ("rms_norm_residual", "dx"),
    ("rms_norm_residual", "dresidual"), ("rms_norm_residual", "dweight"), ("glu", "y"), ("glu", "dup"), ("softmax", "dx"),
    ("log_softmax", "y"), ("rope", "y1"), ("rope", "y2"), ("rope", "dk"), ("qk_norm_rope", "dq_weight"), ("alibi_bias", "y"),
    ("attention", "y"), ("attention", "dq"), ("attention", "dv"), ("attention_decode", "y"),
]  # fmt: skip


@pytest.mark.parametrize("cut", [WHOLE, SLICED])
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_the_gate_sees_a_fault_in_any_tensor_and_names_it(op, name, cut, monkeypatch):
    monkeypatch.setattr(gate, "SLICE", cut)
    case = case_of(op)
    for change in (last_row, lambda t: t * float("nan")):
        reason, _ = judged(case, spoiled(case, name, change))
        assert reason is not None
        assert reason.startswith(f"misses its error budget: {name}: ")


@pytest.mark.parametrize("cut", [WHOLE, SLICED])
def test_an_output_of_another_shape_is_refused_where_no_gradient_would_show_it(cut, monkeypatch):
    monkeypatch.setattr(gate, "SLICE", cut)
    case = case_of("alibi_bias")
    reason, ratio = judged(case, lambda slopes: eager.prepare(case)(slopes)[None])
    assert "shape [1, 10, 7, 7], wanted [10, 7, 7]" in reason
    assert ratio is None


def test_slices_hold_whole_rows_and_lose_none(monkeypatch):
    monkeypatch.setattr(gate, "SLICE", SLICED)
    for op, rows, keep in (
        ("layer_norm_residual", ("x", "residual"), 1),
        ("softmax", ("x",), 2),
        ("glu", ("gate",), 1),
    ):
        case = next(c for c in EACH if c.op == op and (op != "softmax" or c.args["dim"] == -2))
        inputs = gate.inputs_of(case, "cpu")
        parts = [part for part, _ in gate._slices(case, inputs, rows, keep)]
        assert len(parts) > 1
        for at, name in enumerate(inputs.names):
            if name in rows:
                whole = torch.cat([part.tensors[at] for part in parts]).flatten()
                assert torch.equal(whole, inputs.tensors[at].flatten())
            elif op != "glu":
                assert all(part.tensors[at] is inputs.tensors[at] for part in parts)
        assert torch.equal(torch.cat([part.dys[0] for part in parts]).flatten(), inputs.dys[0].flatten())


def test_the_oracle_of_a_case_that_fits_is_computed_once(monkeypatch):
    case = case_of("layer_norm")
    oracle = gate.Oracle(case, gate.inputs_of(case, "cpu"))
    call = eager.prepare(case)
    asked = []
    monkeypatch.setattr(eager, "prepare", lambda case: asked.append(case) or call)
    for _ in range(3):
        assert gate.gate(oracle, call)[0] is None
    assert len(asked) == 1


def test_the_oracle_of_heads_is_computed_once(monkeypatch):
    monkeypatch.setattr(gate, "SLICE", SLICED)
    case = case_of("attention")
    oracle = gate.Oracle(case, gate.inputs_of(case, "cpu"))
    call = eager.prepare(case)
    real, parts = gate._heads, []
    monkeypatch.setattr(gate, "_heads", lambda *of: parts.append(of) or real(*of))
    for _ in range(3):
        assert gate.gate(oracle, call)[0] is None
    assert len(parts) == 1


def test_an_oracle_that_broke_off_is_no_oracle_of_the_heads_before(monkeypatch):
    monkeypatch.setattr(gate, "SLICE", SLICED)
    case = case_of("attention")
    oracle = gate.Oracle(case, gate.inputs_of(case, "cpu"))
    with monkeypatch.context() as patch:
        made = []
        patch.setattr(gate.Inputs, "double", lambda self: made.append(self) or (self if len(made) == 1 else 1 / 0))
        with pytest.raises(ZeroDivisionError):
            gate.gate(oracle, eager.prepare(case))
    reason, _ = gate.gate(oracle, spoiled(case, "y", last_row))
    assert reason is not None
    assert reason.startswith("misses its error budget: y: ")


def test_a_mask_is_causal_and_tables_are_those_of_rope():
    case = case_of("softmax", shape={"x": (2, 4, 6), "mask": (4, 6)}, args={"dim": -1, "scale": 0.5})
    mask = gate.inputs_of(case, "cpu").tensors[1]
    assert [int((row == 0).sum()) for row in mask] == [3, 4, 5, 6]
    assert set(mask.flatten().tolist()) == {0.0, float("-inf")}
    cos, sin = gate.inputs_of(case_of("rope"), "cpu").tensors[2:]
    assert torch.allclose(cos**2 + sin**2, torch.ones(9, 4))
    assert torch.allclose(torch.atan2(sin, cos)[1], 10000.0 ** (-torch.arange(4) / 4))


def test_half_split_and_interleaved_rope_are_the_same_rotation_of_other_pairs():
    case = case_of("rope", args={})
    other = dataclasses.replace(case, args={"interleaved": True})
    q, k, cos, sin = gate.inputs_of(case, "cpu").tensors
    split = eager.prepare(case)(q, k, cos, sin)[0]
    pairs = torch.stack(q.chunk(2, -1), -1).flatten(-2)  # the same pairs, laid out as neighbours
    turned = eager.prepare(other)(pairs, k, cos, sin)[0]
    assert torch.allclose(torch.stack(split.chunk(2, -1), -1).flatten(-2), turned, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in EACH if peers.trinix.is_built(c)], ids=lambda c: c.id)
def test_every_built_op_is_timed_on_a_cpu_in_every_pass_that_it_has(case):
    lines = run.run_cpu(case, tuple(peers.PREPARE))
    timed = [(one["pass"], one["impl"]) for one in lines if one["ok"]]
    for pass_ in ("fwd", "fwd_bwd") if "bwd" in case.passes else ("fwd",):
        assert {(pass_, "trinix"), (pass_, "eager")} <= set(timed)
    assert all(one["ok"] or one["reason"].startswith("skipped: ") for one in lines)
    order = [one["impl"] for one in lines if one["pass"] == "fwd"]
    assert order == [impl for impl in peers.PREPARE if impl in order]


def test_the_size_of_a_case_is_that_of_its_output_where_that_is_larger():
    assert gate.elements(case_of("alibi_bias")) == 10 * 7 * 7
    assert gate.elements(case_of("layer_norm", shape={"x": (12, 10), "weight": (10,), "bias": (10,)})) == 120


# -- implementations that write into what they are given


def test_one_that_overwrites_its_inputs_gets_copies_and_is_still_judged(monkeypatch):
    case = case_of("rms_norm")
    inputs = gate.inputs_of(case, "cpu")
    before = inputs.copy()

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return F.rms_norm(x, weight.shape, weight, case.args["eps"])

        @staticmethod
        def backward(ctx, dy):
            x, weight = ctx.saved_tensors
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (x, weight)]
                y = F.rms_norm(leaves[0], weight.shape, leaves[1], case.args["eps"])
                dx, dw = torch.autograd.grad(y, leaves, dy.clone())
            dy.copy_(dx)
            return dy, dw

    monkeypatch.setitem(peers.PREPARE, "liger", lambda case: InPlace.apply)
    subject = run.admit(case, "liger", gate.Oracle(case, inputs))
    assert subject.reason is None
    assert subject.overwrites
    for pass_ in case.passes:
        run.pass_call(pass_, subject.call, subject.own(inputs))()
    for now, then in zip(inputs.tensors + inputs.dys, before.tensors + before.dys, strict=True):
        assert torch.equal(now, then)
    assert not run.admit(case, "eager", gate.Oracle(case, inputs)).overwrites


# -- the least traffic of every op


N, H = 12, 10
BYTES = {
    "softmax": (2 * N * H, 3 * N * H),
    "log_softmax": (2 * N * H, 3 * N * H),
    "layer_norm": (2 * N * H + 2 * H, 3 * N * H + 3 * H),
    "rms_norm": (2 * N * H + H, 3 * N * H + 2 * H),
    "rms_norm_activation": (2 * N * H + H, 3 * N * H + 2 * H),
    "layer_norm_residual": (4 * N * H + 2 * H, 4 * N * H + 3 * H),
    "rms_norm_residual": (4 * N * H + H, 4 * N * H + 2 * H),
    "glu": (3 * N * H, 5 * N * H),
}


@pytest.mark.parametrize("op", BYTES)
def test_bytes_of_a_row_op_are_tensors_read_and_written_once(op):
    shape = {name: (N, H) if name not in ("weight", "bias") else (H,) for name in case_of(op).shape}
    shape = {"gate": (N, H), "up": (N, H)} if op == "glu" else {n: s for n, s in shape.items() if n != "mask"}
    for dtype in (torch.bfloat16, torch.float32):
        case = case_of(op, dtype, shape=shape)
        forward, backward = (elements * dtype.itemsize for elements in BYTES[op])
        moved = {p: roofline.work(case, p).bytes for p in ("fwd", "bwd", "fwd_bwd")}
        assert moved == {"fwd": forward, "bwd": backward, "fwd_bwd": forward + backward}


def test_bytes_of_a_packed_glu_are_those_of_its_halves():
    packed = case_of("glu", shape={"gate": (N, 2 * H)}, args={"kind": "swiglu", "layout": "gate_last"})
    two = case_of("glu", shape={"gate": (N, H), "up": (N, H)}, args={"kind": "swiglu"})
    for pass_ in ("fwd", "bwd"):
        assert roofline.work(packed, pass_) == roofline.work(two, pass_)


def test_bytes_of_rope_are_q_and_k_twice_and_the_rows_of_the_tables_that_are_used():
    case = case_of("rope", torch.bfloat16)
    heads, tables = (2 * 6 * 4 * 8 + 2 * 6 * 2 * 8) * 2, 2 * 6 * 4 * 4
    assert {roofline.work(case, p).bytes for p in ("fwd", "bwd")} == {2 * heads + tables}
    fused = case_of("qk_norm_rope", torch.bfloat16)
    assert roofline.work(fused, "fwd").bytes == 2 * heads + tables + 2 * 8 * 2
    assert roofline.work(fused, "bwd").bytes == 3 * heads + tables + 2 * 2 * 8 * 2


def test_alibi_only_writes_and_layers_that_share_an_input_have_no_limit():
    assert roofline.work(case_of("alibi_bias", torch.float32), "fwd").bytes == 10 * 7 * 7 * 4
    layers = next(c for c in load_cases("seeds") if "layers" in c.args)
    assert roofline.work(layers, "fwd") is None


def test_every_op_with_an_eager_form_has_a_model_and_a_form_of_ours():
    assert set(eager.FORMS) == set(roofline.WORK) == set(peers.trinix.OPS) | set(layers.OPS)


def test_layers_are_run_as_often_as_the_case_says():
    calls = []
    assert run._layers(lambda x: calls.append(x) or len(calls), 24)("x") == 24
    assert calls == ["x"] * 24
    once = object()
    assert run._layers(once, 1) is once
