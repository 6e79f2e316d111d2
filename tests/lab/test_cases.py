"""The case files: every row of the five seed documents is there once, and a mistake in a file is refused by name."""

import copy
import math
import re
from collections import Counter

import pytest
import torch

from trinix.lab import case as cases_module
from trinix.lab.case import PASSES, SUITES, UNITS, load_cases, parse

EVERY = load_cases("full")
SEEDS = [c for c in EVERY if c.document.isdigit()]
SEQUENCES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

# document 000 to 004: cases and rows of each op
EXPECTED = {
    ("000", "head_mlp"): (5, 18),
    ("001", "attention"): (4, 8),
    ("001", "layer_norm"): (7, 7),
    ("001", "softmax"): (5, 5),
    ("002", "activation"): (12, 36),
    ("002", "glu"): (12, 36),
    ("003", "activation"): (32, 128),
    ("003", "softmax"): (16, 64),
    ("004", "attention_layers"): (15, 45),
}

GOOD = {
    "id": "Q-1",
    "op": "activation",
    "args": {"kind": "relu"},
    "shape": {"x": [2, 3]},
    "dtype": "float32",
    "passes": ["fwd", "bwd"],
    "document": "trinix",
    "gpu": "",
    "suites": ["quick"],
    "row": [{"id": "Q-1-fwd", "pass": "fwd", "unit": "ms", "published": {"torch": 0.5}}],
}


def by_id(name):
    return next(c for c in EVERY if c.id == name)


def test_the_five_documents_give_108_cases_and_347_rows():
    assert {c.document for c in SEEDS} == {"000", "001", "002", "003", "004"}
    assert len(SEEDS) == 108
    assert sum(len(c.rows) for c in SEEDS) == 347


def test_every_document_has_its_cases_and_rows_under_the_right_op():
    counted = Counter((c.document, c.op) for c in SEEDS)
    rows = Counter((c.document, c.op) for c in SEEDS for _ in c.rows)
    assert {key: (counted[key], rows[key]) for key in counted} == EXPECTED


def test_the_norms_have_every_width_in_both_dtypes_forward_and_backward():
    for op in ("layer_norm", "rms_norm"):
        mine = {(c.shape["x"], c.dtype) for c in EVERY if c.op == op and {"fwd", "bwd"} <= set(c.passes)}
        for width in (256, 768, 1024, 2048, 4096, 8192):
            assert {((16384, width), torch.float32), ((16384, width), torch.bfloat16)} <= mine


def test_activations_are_four_kinds_of_document_003_and_three_of_002_in_every_size():
    mine = [c for c in SEEDS if c.op == "activation"]
    wanted = {f"X-{kind}-{n}" for kind in ("relu", "sigmoid", "silu", "none") for n in SEQUENCES}
    wanted |= {f"G-{kind}-{i}" for kind in ("qg", "sr", "mi") for i in (1, 2, 3, 4)}
    assert len(mine) == 44
    assert {c.id for c in mine} == wanted
    for c in mine:
        if c.document == "003":
            assert (c.shape["x"], c.dtype) == ((12, 12, int(c.id.rpartition("-")[2]), 128), torch.bfloat16)
            assert c.id.split("-")[1] == c.args["kind"]
        else:
            assert c.dtype == torch.float16
            assert math.prod(c.shape["x"]) == (1 << 22, 1 << 23, 1 << 24, 1 << 26)[int(c.id[-1]) - 1]


def test_case_ids_are_unique():
    assert [name for name, times in Counter(c.id for c in EVERY).items() if times > 1] == []


def test_a_case_publishes_a_figure_once():
    twice = [
        (c.id, figure)
        for c in EVERY
        for figure, times in Counter((r.pass_, r.unit, column) for r in c.rows for column in r.published).items()
        if times > 1
    ]
    assert twice == []


@pytest.mark.parametrize("one", EVERY, ids=lambda c: c.id)
def test_a_case_is_whole(one):
    assert one.op == one.op.lower()
    assert (cases_module.FOLDER / f"{one.file}.toml").exists()
    assert isinstance(one.dtype, torch.dtype)
    assert one.passes
    assert set(one.passes) <= set(PASSES)
    assert one.suites
    assert set(one.suites) <= set(SUITES)
    assert all(isinstance(n, int) and n > 0 for size in one.shape.values() for n in size)
    for row in one.rows:
        assert row.pass_ in one.passes, "a published pass that is never run"
        assert row.unit in UNITS
        assert all(math.isfinite(v) and v > 0 for v in row.published.values())
    assert bool(one.gpu) == bool(one.rows), "published figures come from some GPU"


@pytest.mark.parametrize(
    ("name", "pass_", "unit", "published"),
    [
        ("M-1", "fwd", "ms", {"torch": 0.019, "triton": 0.036}),
        ("M-4", "fwd_bwd", "ms", {"torch": 1.140, "triton": 0.380}),
        ("M-4", "fwd_bwd", "MiB", {"torch": 418.0, "triton": 52.0}),
        ("S-3", "fwd", "ms", {"torch": 0.177, "triton": 0.169}),
        ("L-3", "fwd", "ms", {"torch": 0.169, "triton": 0.128}),
        ("L-6", "fwd", "ms", {"torch": 0.997, "triton": 0.663}),
        ("G-mi-1", "fwd", "ms", {}),
        ("X-relu-256", "fwd", "ms", {"triton": 0.043131, "torch": 0.014025, "compile": 0.300839}),
        ("X-sigmoid-32768", "fwd", "ms", {"triton": 2.842082, "torch": 0.860860, "compile": 0.795817}),
        ("X-none-8192", "fwd", "ms", {"triton": 0.003798, "torch": 0.003827, "compile": 0.003804}),
        ("A-MHA-1", "fwd_bwd", "ms", {"torch": 3.9123, "triton": 1.1282, "flash": 1.7229}),
        ("N-rms-1", "fwd", "ms", {"torch": 0.1826, "triton": 0.1390}),
        ("N-ln-2", "fwd", "ms", {"torch": 0.0646}),
        ("H-sw-4", "bwd", "ms", {"torch": 46.5908, "triton": 24.7984}),
        ("E-rope-3", "bwd", "ms", {"torch": 5.0667, "triton": 2.0260}),
        ("E-alibi-2", "fwd", "ms", {"torch": 10.3026, "triton": 1.7508}),
        ("A-GQA-2", "bwd", "ms", {"torch": 14.2498, "triton": 0.9140, "flash": 7.7724}),
    ],
)
def test_published_figures_are_the_documents(name, pass_, unit, published):
    assert by_id(name).published(pass_, unit) == published


def test_published_of_a_pass_or_unit_that_no_row_has_is_empty():
    assert by_id("X-relu-256").published("fwd_bwd") == {}
    assert by_id("S-3").published("fwd", "MiB") == {}


def test_seeds_are_the_documents_and_quick_and_seeds_are_parts_of_full():
    seeds, quick, full = (load_cases(s) for s in ("seeds", "quick", "full"))
    assert [c.id for c in seeds] == [c.id for c in SEEDS]
    assert [c.id for c in full] == [c.id for c in EVERY]
    assert {c.id for c in quick} < {c.id for c in full}
    assert {c.op for c in quick} == {c.op for c in full}, "every op has a quick case"
    assert {c.id for c in quick if c.document != "trinix"} < {c.id for c in seeds}


FAMILIES = {path.stem for path in cases_module.FOLDER.glob("*.toml")}


def test_families_and_ops_can_be_chosen_in_any_suite_and_keep_the_order_of_the_files():
    for suite in SUITES:
        whole = load_cases(suite)
        for family in FAMILIES:
            assert load_cases(suite, [family]) == [c for c in whole if c.file == family]
        for op in {c.op for c in whole} - FAMILIES:
            assert [c.id for c in load_cases(suite, [op])] == [c.id for c in whole if c.op == op]
    both = load_cases("full", ["softmax", "glu"])
    assert both == [c for c in EVERY if c.file in ("softmax", "glu")]
    assert {c.op for c in both} == {"softmax", "log_softmax", "glu"}
    assert load_cases("seeds", (name for name in ["glu"])) == load_cases("seeds", ["glu"])


def test_a_part_of_a_family_has_a_result_file_of_its_own():
    assert {c.file for c in load_cases("full", ["rms_norm"])} == {"norm-rms_norm"}
    assert {c.file for c in load_cases("full", ["log_softmax", "glu"])} == {"softmax-log_softmax", "glu"}
    some = load_cases("full", ["layer_norm", "rms_norm"])
    assert {c.file for c in some} == {"norm-layer_norm", "norm-rms_norm"}


def test_all_ops_of_a_family_are_the_family():
    ops = {c.op for c in load_cases("full", ["norm"])}
    assert len(ops) == 5
    assert load_cases("full", ops) == load_cases("full", ["norm"])
    assert {c.file for c in load_cases("seeds", ["layer_norm"])} == {"norm"}, "the documents time no other norm"
    assert {c.file for c in load_cases("full", ["norm", "rms_norm"])} == {"norm"}


def test_an_unknown_suite_or_op_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"suite must be one of \['quick', 'seeds', 'full'\], got 'nonsense'"):
        load_cases("nonsense")
    with pytest.raises(ValueError, match=r"op must be among \['activation', .*'softmax'\], got \['reluu'\]"):
        load_cases("quick", ["activation", "reluu"])


def test_a_good_table_parses_and_is_left_as_it_was():
    table = copy.deepcopy(GOOD)
    case = parse(table, "some.toml")
    assert table == GOOD
    assert (case.id, case.shape, case.dtype, case.label) == ("Q-1", {"x": (2, 3)}, torch.float32, "activation relu")
    assert case.published("fwd") == {"torch": 0.5}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": "red"}, ["Q-1", "colour"]),
        ({"passes": ["fwd", "sideways"]}, ["Q-1", "sideways"]),
        ({"suites": ["nightly"]}, ["Q-1", "nightly"]),
        ({"dtype": None}, ["lacks", "dtype"]),
        ({"suites": None}, ["lacks", "suites"]),
    ],
)
def test_a_case_that_is_not_understood_is_refused_with_file_and_id(change, words):
    table = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=r"some\.toml") as refused:
        parse(table, "some.toml")
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pass": "sideways"}, ["Q-1-fwd", "sideways"]),
        ({"unit": "s"}, ["Q-1-fwd", "'s'"]),
        ({"publishd": {}}, ["Q-1-fwd", "publishd"]),
    ],
)
def test_a_row_that_is_not_understood_is_refused_with_file_and_id(change, words):
    table = {**GOOD, "row": [{**GOOD["row"][0], **change}]}
    with pytest.raises(ValueError, match=r"some\.toml") as refused:
        parse(table, "some.toml")
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize("key", ["unit", "published"])
def test_a_row_that_lacks_a_key_is_refused_with_file_and_key(key):
    table = {**GOOD, "row": [{k: v for k, v in GOOD["row"][0].items() if k != key}]}
    with pytest.raises(ValueError, match=rf"some\.toml.*Q-1.*{key}"):
        parse(table, "some.toml")


@pytest.mark.parametrize("dtype", ["flaot32", "nn"])
def test_an_unknown_dtype_is_refused_with_file_and_id(dtype):
    with pytest.raises(ValueError, match=rf"some\.toml: case Q-1: dtype must be one of .*, got '{dtype}'"):
        parse({**GOOD, "dtype": dtype}, "some.toml")


def test_all_files_are_read_and_a_mistake_in_one_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(cases_module, "FOLDER", tmp_path)
    text = """[[case]]
id = "{id}"
op = "{op}"
args = {{ kind = "relu" }}
shape = {{ x = [2] }}
dtype = "float32"
passes = ["fwd"]
document = "trinix"
gpu = ""
suites = ["{suite}"]
"""
    tmp_path.joinpath("b.toml").write_text(text.format(id="B", op="b", suite="quick"))
    tmp_path.joinpath("a.toml").write_text(text.format(id="A", op="a", suite="seeds"))
    assert [c.id for c in load_cases("full")] == ["A", "B"]
    assert [c.id for c in load_cases("quick")] == ["B"]
    tmp_path.joinpath("c.toml").write_text(text.format(id="C", op="c", suite="quik"))
    with pytest.raises(ValueError, match=re.escape("c.toml: case C:")):
        load_cases("quick")


def test_two_cases_of_one_id_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cases_module, "FOLDER", tmp_path)
    text = (cases_module.Path(cases_module.__file__).parent / "cases" / "head_mlp.toml").read_text()
    tmp_path.joinpath("head_mlp.toml").write_text(text)
    tmp_path.joinpath("again.toml").write_text(text)
    with pytest.raises(ValueError, match="M-1"):
        load_cases("full")
