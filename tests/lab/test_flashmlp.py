"""flashmlp as a rival: called on the lab's own tensors where it can be imported and is right, refused in words elsewhere."""

import dataclasses
import importlib.machinery
import sys
import types

import pytest
import torch

from trinix.lab import doctor, gate, run
from trinix.lab.case import Case, load_cases
from trinix.lab.peers import FOREIGN, PREPARE, RIVALS, eager, flashmlp

CASES = {c.id: c for c in load_cases("full", ["head_mlp"])}


def case_of(kind="silu", h=2, b=128, d=16, e=64, dtype=torch.bfloat16, **more):
    shape = {"x": (h, b, d), "w1": (h, d, e), "w2": (h, e, d), **more}
    return Case("T", "head_mlp", {"kind": kind}, shape, dtype, ("fwd", "bwd", "fwd_bwd"), "trinix", "", ("full",))


@pytest.fixture
def installed(monkeypatch):
    """A module of that name, PyTorch's formula in the kernel's place, on a machine that says that it has a GPU."""
    module = types.ModuleType("flashmlp")
    module.__spec__ = importlib.machinery.ModuleSpec("flashmlp", None)
    module.scale, module.asked = 1.0, []

    class FlashMLPFunction:
        @staticmethod
        def apply(x, w1, w2, activation=""):
            module.asked.append(activation)
            act = eager.ACTIVATIONS[activation or "none"]
            return torch.bmm(act(torch.bmm(x, w1)), w2) * module.scale

    module.FlashMLPFunction = FlashMLPFunction
    monkeypatch.setitem(sys.modules, "flashmlp", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return module


def admit(case):
    return run.admit(case, "flashmlp", gate.Oracle(case, gate.inputs_of(case, "cpu")))


def test_it_is_a_rival_and_foreign():
    assert "flashmlp" in RIVALS
    assert "flashmlp" in FOREIGN


@pytest.mark.parametrize("kind", ["none", "silu", "leaky_relu", "sigmoid"])
def test_it_is_called_by_its_own_names_and_passes_the_gate(kind, installed):
    subject = admit(case_of(kind))
    assert subject.reason is None
    assert subject.error_ratio <= 1.0
    assert set(installed.asked) == {"" if kind == "none" else kind}


def test_a_wrong_result_is_a_failed_row_and_so_is_whatever_it_raises(installed):
    installed.scale = 1.05
    assert admit(case_of()).reason.startswith("misses its error budget: y: ")

    def apply(*_):
        raise KeyError("no tile fits")

    installed.FlashMLPFunction.apply = apply
    assert admit(case_of()).reason == "KeyError: 'no tile fits'"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kind": "gelu"}, "has ['none', 'silu', 'leaky_relu', 'sigmoid'] only"),
        ({"w_gate": (2, 16, 64)}, "gates"),
        ({"b": 64}, "reads past the end unless B is a multiple of 128"),
        ({"e": 96}, "reads past the end unless B is a multiple of 128 and E of 64"),
        ({"d": 80}, "power of two"),
        ({"d": 8}, "power of two"),
        ({"dtype": torch.float32}, "tf32"),
    ],
)
def test_what_its_kernel_cannot_do_is_skipped_in_words(change, why, installed):
    subject = admit(case_of(**change))
    assert subject.reason.startswith("skipped: flashmlp ")
    assert why in subject.reason
    assert not installed.asked


def test_it_does_every_case_of_the_document_and_none_of_the_odd_ones(installed):
    refused = {name for name, case in CASES.items() if flashmlp.refuses(case)}
    assert refused == {"M-odd", "M-gelu", "M-gated"}
    assert PREPARE["flashmlp"](next(iter(load_cases("full", ["softmax"])))) is None


def mib_after_forward(function, tensors):
    """Of a call's result and of what autograd keeps beside the inputs."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t):
        made = [function(*tensors), *kept.values()]
    return sum(t.nbytes for t in made if all(t is not one for one in tensors)) / 2**20


def test_what_the_document_timed_as_pytorch_has_a_line_at_each_of_its_cases_and_needs_the_memory_that_it_says():
    timed = {name: case for name, case in CASES.items() if PREPARE["seed_formula"](case)}
    assert set(timed) == {f"M-{n}" for n in range(1, 6)} == {n for n, case in CASES.items() if case.document == "000"}
    for case in timed.values():
        tensors = [torch.empty(s, dtype=case.dtype, device="meta", requires_grad=True) for s in case.shape.values()]
        (published,) = [row.published["torch"] for row in case.rows if row.note == "after forward"]
        assert round(mib_after_forward(PREPARE["seed_formula"](case), tensors), 1) == published
    case = dataclasses.replace(case_of(), document="000")
    tensors = gate.inputs_of(case, "cpu").tensors
    assert torch.equal(PREPARE["seed_formula"](case)(*tensors), PREPARE["eager"](case)(*tensors))


def test_where_it_is_not_there_it_says_so(monkeypatch, installed):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert PREPARE["flashmlp"](case_of()) == "timed on a GPU only"
    assert "ok  peer flashmlp" in doctor.report()
    monkeypatch.delitem(sys.modules, "flashmlp")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None)
    assert PREPARE["flashmlp"](case_of()) == "not installed"
    assert "no  peer flashmlp: not installed" in "\n".join(doctor._peers())
