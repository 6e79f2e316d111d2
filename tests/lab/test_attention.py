"""Attention's cases and rivals: every implementation is called on the same tensors, and says why it is not there."""

import importlib.machinery
import importlib.util

import pytest
import torch

from trinix import device
from trinix.lab import attention, doctor, gate, record, run
from trinix.lab.case import Case, load_cases
from trinix.lab.peers import PREPARE, fa4

CASES = {c.id: c for c in load_cases("full", ["attention"])}


def tiny(layout="BSHD", causal=True, key_heads=2):
    b, s, h, d = 2, 6, 4, 8
    shape = {n: (b, s, heads, d) for n, heads in (("q", h), ("k", key_heads), ("v", key_heads))}
    args = {"causal": causal}
    if layout == "BHSD":
        shape = {n: (b, heads, s, d) for n, (b, s, heads, d) in shape.items()}
        args["layout"] = layout
    return Case("T", "attention", args, shape, torch.float32, ("fwd", "bwd"), "trinix", "", ("full",))


@pytest.mark.parametrize("causal", [False, True])
def test_both_layouts_and_both_formulas_are_one_attention(causal):
    case, turned = tiny(causal=causal), tiny("BHSD", causal)
    inputs = gate.inputs_of(case, "cpu").tensors
    wanted = attention.sdpa(case)(*inputs)
    for form in (attention.sdpa, attention.naive):
        torch.testing.assert_close(form(case)(*inputs), wanted)
        got = form(turned)(*(t.transpose(1, 2) for t in inputs))
        torch.testing.assert_close(got.transpose(1, 2), wanted)


@pytest.mark.parametrize("impl", ["cudnn", "fa2", "flex"])
@pytest.mark.parametrize("case", [tiny(), CASES["AD-1-1024"]], ids=["attention", "decode"])
def test_without_a_gpu_every_rival_says_so(impl, case, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU" in PREPARE[impl](case)


def test_hopper_is_a_line_of_attention_only_where_the_card_is_one():
    assert PREPARE["trinix:hopper"](CASES["AD-1-1024"]) is None
    assert PREPARE["trinix:hopper"](tiny()) in (None, "runs on sm_90 only")


def test_fa4_names_the_package_that_it_lacks(monkeypatch):
    there = set()

    def find_spec(name):
        if name == "flash_attn.cute" and name not in there:
            raise ModuleNotFoundError(name="flash_attn")
        return importlib.machinery.ModuleSpec(name, None) if name in there else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    said = []
    for module in fa4.MODULES:
        said.append(fa4.prepare(tiny()))
        assert f"no  peer flash-attn-4: {said[-1]}" in "\n".join(doctor._peers())
        there.add(module)
    assert [s.partition(" ")[0] for s in said] == [record.PACKAGES[module] for module in fa4.MODULES]
    assert "site.addsitedir" in said[-1]
    there.add("flash_attn")  # the folder of both
    assert fa4.lacking() is None
    assert "ok  peer flash-attn-4" in doctor._peers()
    assert "no  peer flash-attn: not installed" in "\n".join(doctor._peers())
    assert fa4.prepare(tiny()) == "timed on a GPU only"
    assert fa4.prepare(CASES["AD-1-1024"]) == "timed on a GPU only"


def test_the_cases_are_the_issue_s():
    for d in (64, 128, 256):
        for s in (1024, 2048, 4096, 8192, 16384):
            for form in ("full", "causal"):
                q = CASES[f"AS-{d}-{s}-{form}"].shape["q"]
                assert (q[0] * q[1], q[2] * q[3], q[3]) == (16384, 2048, d)
    batches = {(c.shape["queries"][0], attention.keys(c)) for c in CASES.values() if c.op == "attention_decode"}
    assert {(1, 1024), (1, 131072), (16, 32768), (64, 1024), (64, 8192)} <= batches
    assert len([c for c in CASES if c.startswith("AC-") and c.endswith("-causal")]) == 13


DECODING = {
    "plain": ({}, (2, 1, 4, 8), (2, 6, 2, 8)),
    "four queries": ({}, (2, 4, 4, 8), (2, 6, 2, 8)),
    "pages": ({"page": 3}, (2, 1, 4, 8), (4, 3, 2, 8)),
    "latents": ({"latent": 4}, (2, 1, 4, 8), (2, 6, 1, 8)),
}


@pytest.mark.parametrize("form", DECODING)
def test_every_form_of_decoding_is_ours(form):
    args, queries, cache = DECODING[form]
    shape = {"queries": queries, "k_cache": cache} | ({} if "latent" in args else {"v_cache": cache})
    case = Case("D", "attention_decode", args, shape, torch.float32, ("fwd",), "trinix", "", ("full",))
    subject = run.admit(case, "trinix", gate.Oracle(case, gate.inputs_of(case, "cpu")))
    assert subject.reason is None


def test_every_case_of_decoding_has_a_form_that_was_compared():
    for case in CASES.values():
        if case.op == "attention_decode":
            several = case.shape["queries"][1] > 1
            assert any(
                set(case.args) == set(args) and several == (queries[1] > 1) for args, queries, _ in DECODING.values()
            )


def test_the_formula_is_skipped_in_words_on_a_card_that_cannot_hold_its_scores(monkeypatch):
    case = CASES["AS-64-16384-causal"]
    assert attention.scores(case) == 32 * 16384**2
    monkeypatch.setattr(device, "card", lambda index=0: device.Card("NVIDIA A100-SXM4-40GB", "sm_80", 108, 39.4))
    assert PREPARE["seed_formula"](case) == "its scores would take 80 GiB of this card's 39"
    assert callable(PREPARE["seed_formula"](CASES["AC-mla-2-causal"]))
    # seen on this card: the formula with a mask runs out of memory, without one it runs
    monkeypatch.setattr(device, "card", lambda index=0: device.Card("NVIDIA H100 80GB HBM3", "sm_90", 132, 79.2))
    assert "80 GiB" in PREPARE["seed_formula"](case)
    assert callable(PREPARE["seed_formula"](CASES["AS-64-16384-full"]))


def test_pages_and_latents_are_the_same_keys():
    where = torch.device("cpu")
    shape = {"queries": (2, 1, 4, 8), "k_cache": (6, 3, 2, 8), "v_cache": (6, 3, 2, 8)}
    case = Case("P", "attention_decode", {"page": 3}, shape, torch.float32, ("fwd",), "trinix", "", ("full",))
    table = attention.page_table(case, where)
    assert attention.keys(case) == 9
    assert sorted(table.flatten().tolist()) == list(range(6))
    queries, k, v = gate.inputs_of(case, "cpu").tensors
    plain = Case("P", "attention_decode", {}, shape, torch.float32, ("fwd",), "trinix", "", ("full",))
    flat = (t[table].flatten(1, 2) for t in (k, v))
    torch.testing.assert_close(attention.sdpa_decode(case)(queries, k, v), attention.sdpa_decode(plain)(queries, *flat))
    assert attention.lengths(case, where).tolist() == [9, 9]
    latent = Case("L", "attention_decode", {"latent": 4}, shape, torch.float32, ("fwd",), "trinix", "", ("full",))
    assert attention.values(latent, (k,)).data_ptr() == k.data_ptr()
    assert attention.values(latent, (k,)).shape[-1] == 4
