"""Attention on Hopper: what the compiler makes of every binary, without a GPU; the pure choices; and on the card, correctness
at odd sizes and the same bits on every run."""

import importlib
import itertools
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gluon_on_cpu
from helpers import captured
from trinix.kernels.torch import attention as reference
from trinix.ops import attention
from trinix.ops.attention import Options
from trinix.testing import judge, normal

pytest.importorskip("triton")

from trinix.kernels._layout import side_by_side
from trinix.kernels.hopper import attention as hopper

contract = importlib.import_module("trinix.ops.attention")  # the package has a function of that name
SHARED_LIMIT = 227 * 1024


@pytest.fixture(autouse=True)
def long_backward(monkeypatch):
    """Small calls here are for the kernels of long ones; those of the short ones' backward: test_hopper_attention_short.py."""
    monkeypatch.setattr(hopper, "choose_short_backward", lambda *_: None)
    monkeypatch.setattr(hopper, "_plans", {})
    monkeypatch.setattr(contract, "_prepared", {})


# binary -> spilling instructions that may stand in a loop over tiles (of 400 to 700): the others have none
SPILLS = {
    "backward/128/window-tail": 1, "backward/128/softcap-varlen": 3, "backward/128/alibi": 2,
    "backward/128/deterministic": 13, "backward/128/sink": 12, "backward/256/sink": 2,
}  # fmt: skip

# Runs in a forked process: here TRITON_INTERPRET may be set.
COMPILE = """
import json, re
from binaries import compiled, disassembled, given_back_too_early
from trinix.kernels.hopper.attention import compile_cases


def loops(sass):
    "innermost loops that hold matrix instructions"
    lines = [(int(a, 16), i.strip()) for a, i in re.findall(r"/\\*([0-9a-f]{4,})\\*/\\s+(.*?);", sass)]
    spans = []
    for at, instruction in lines:
        back = re.match(r"@\\S+ BRA 0x([0-9a-f]+)", instruction)
        if back and int(back[1], 16) < at:
            body = [i for a, i in lines if int(back[1], 16) <= a <= at]
            if sum("HGMMA" in i for i in body) > 2:
                spans.append((int(back[1], 16), at, body))
    return [b for lo, hi, b in spans if not any(lo <= l and h <= hi and (l, h) != (lo, hi) for l, h, _ in spans)]


def hasty(ptx):
    "arrivals at an mbarrier behind a wait for products without a barrier of the warps between"
    waited, count = False, 0
    for line in ptx.splitlines():
        if "wgmma.wait_group" in line or "bar.sync" in line or "barrier.sync" in line:
            waited = "wgmma" in line
        elif "mbarrier.arrive.shared" in line:
            count += waited
    return count


cases = [case for case in compile_cases() if WANTED(case.name)]
binaries = []
for case in cases:
    names = case.kernel.arg_names
    annotated = {p.name: p.annotation_type for p in case.kernel.params}
    signature = {n: "constexpr" if n in case.constants else case.signature.get(n) or annotated[n] or "i32" for n in names}
    aligned = [name for name in ("sums", "pieces") if name in names]
    binaries.append(compiled(case.kernel, signature, case.constants, {"num_warps": 4}, aligned))
for case, (binary, log), lines in zip(cases, binaries, disassembled([binary.asm["cubin"] for binary, _ in binaries])):
    sass = "\\n".join(lines)
    found = loops(sass)
    print(json.dumps({
        "name": case.name, "shared": binary.metadata.shared, "warnings": sorted(set(re.findall("C75[0-9]{2}", log))),
        "loops": len(found), "spills": max(sum("LDL" in i or "STL" in i for i in b) for b in found),
        "reductions": re.findall(r"\\b(?:RED|ATOM|UTMAREDG)[^;]*", sass),
        "hasty": hasty(binary.asm["ptx"]),
        "early": given_back_too_early(binary.asm["ptx"], r"ldmatrix|ld\\.shared\\.v"),  # an item's number is ordinarily stored
        "turns": re.findall(r"relaxed\\.add\\.v4(?:(?!relaxed)[\\s\\S])*?(?:atom|red)\\.global\\.gpu\\.release", binary.asm["ptx"]),
        "waits": binary.asm["ptx"].find("griddepcontrol.wait"),
        "reads": re.search(r"\\b(ld|st|red|atom)\\.global|\\bcp\\.async\\.bulk", binary.asm["ptx"]).start(),
    }))
"""


# Every option at some head dimension, each head dimension both ways, and what spills most; --every-binary takes the others.
FEW = {
    "64": "forward/64/window forward/64/softcap-varlen forward/64/shared short/64/causal short/64/grouped backward/64/full"
    " backward/64/sink",
    "forward": "forward/128/causal forward/128/shared-options short/64/full short/128/window forward/192/full forward/256/causal",
    "backward-128": "backward/128/causal backward/128/window-tail backward/128/softcap-varlen backward/128/alibi"
    " backward/128/deterministic backward/128/sink",
    "backward": "backward/192/window backward/192/deterministic backward/256/causal backward/256/sink",
}


@pytest.mark.parametrize("few", FEW.values(), ids=FEW)
def test_every_binary_compiles_well(few, forked_process, every_binary):
    """No spill in a loop over tiles, no product that waits for itself, sums of dQ 16 bytes at a time."""
    starts = {name.rpartition("/")[0] for name in few.split()}
    wanted = f"lambda name: name.rpartition('/')[0] in {starts}" if every_binary else f"{few.split()}.__contains__"
    lines = [json.loads(line) for line in forked_process(f"WANTED = {wanted}\n" + COMPILE).splitlines()]
    assert {one["name"] for one in lines} >= set(few.split())
    for one in lines:
        assert not one["warnings"], one  # C7510 and its like: "wgmma serialized"
        assert one["shared"] <= SHARED_LIMIT, one
        assert one["loops"] >= (1 if one["name"].startswith("short") else 2), one
        assert one["spills"] <= SPILLS.get(one["name"], 0), one
        sums = [i for i in one["reductions"] if ".F32" in i or i.startswith("UTMAREDG")]
        assert bool(sums) == one["name"].startswith("backward"), one
        assert all(".F32x4" in i or i.startswith("UTMAREDG") for i in sums), one
        assert bool(one["turns"]) == one["name"].endswith("deterministic"), one
        # one thread speaks for all: their sums are added, their products made
        assert all("bar.sync" in between for between in one["turns"]), one
        assert not one["hasty"], one
        # what each warpgroup gives back behind the loads of an item's K and V are the buffers of the item before
        assert len(one["early"]) == 2 * one["name"].startswith("backward/64/"), one
        if not one["name"].startswith("backward"):
            # launched early: no tensor is touched before the kernel in front has ended. In the text of the binary, where roles stand
            # behind the place that hands them out
            assert 0 < one["waits"] < one["reads"], one


COMPILE_JOIN = """
import json, re
from triton.compiler import ASTSource
from binaries import compiled
from trinix.kernels.hopper.attention_backward import join as kernel

annotated = {p.name: p.annotation_type for p in kernel.params}
tensors = ["parts_k", "parts_v", "dk", "dv"]
for width, v_width in ((64, 64), (128, 128), (256, 128)):
    constants = {"WIDTH": width, "V_WIDTH": v_width, "SIZE": 2048}
    signature = {n: "constexpr" if n in constants else "*bf16" if n in tensors else annotated[n] or "i32" for n in kernel.arg_names}
    binary, words = compiled(kernel, signature, constants, {"num_warps": 8, "launch_pdl": True}, tensors, source=ASTSource)
    ptx = binary.asm["ptx"]
    print(json.dumps({"accesses": re.findall(r"(?:ld|st)[.]global[.](\\w+)[.](\\w+)", ptx), "spills": re.findall("([0-9]+) bytes spill", words),
                      "waits": ptx.find("griddepcontrol.wait"), "reads": ptx.find("ld.global")}))
"""


def test_the_sums_of_parts_compile_well(forked_process):
    lines = [json.loads(line) for line in forked_process(COMPILE_JOIN).splitlines()]
    assert len(lines) == 3
    for one in lines:
        assert len(one["accesses"]) >= 2, one
        assert all(access == ["v4", "b32"] for access in one["accesses"]), one  # 16 bytes a thread
        assert set(one["spills"]) <= {"0"}, one
        assert 0 < one["waits"] < one["reads"], one


# ---- choices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [100, 100_000])
def test_every_head_dimension_has_configurations_that_fit(causal, keys):
    for d, dv in itertools.product(range(8, 264, 8), repeat=2):
        c = hopper.choose_forward(d, dv, causal, keys)
        assert c.d >= c.d_qk >= d
        assert c.dv >= dv
        shared = 2 * (c.q_buffers * c.consumers * c.m * c.d + c.stages * c.n * (c.d + c.dv))
        assert shared + 2048 <= SHARED_LIMIT
        assert c.consumers * c.registers * 128 <= 65536 - 24 * 128
        # with turns all consumers have the same tiles: none is given back on a diagonal, where blocks of three have some
        assert not (c.pingpong and causal and c.m * c.consumers > c.n)
        if short := hopper.choose_short(d, dv, causal, keys, 1, 1, 1, 132):
            assert short.d >= max(d, dv)
            assert 2 * short.d * (64 + 2 * short.stages * short.n) + 2048 <= SHARED_LIMIT
        for plain in (False, True):
            b = hopper.choose_backward(d, dv, plain)
            assert b.d >= (b.d_qk or b.d) >= d
            assert max(b.d, b.dv) >= dv
    assert hopper.choose_forward(264, 64, causal, keys) is None
    assert hopper.choose_forward(20, 64, causal, keys) is None
    assert hopper.choose_backward(64, 264, True) is None


def test_short_calls_have_a_kernel_of_their_own():
    def short(batch, rows, heads, d, causal, key_heads=None):
        programs = batch * heads * -(-rows // 64)
        return hopper.choose_short(d, d, causal, rows, key_heads or heads, batch, programs, 132)

    assert short(4, 256, 8, 64, True)  # F-1
    assert short(4, 512, 8, 64, True)  # F-2
    assert short(4, 2048, 8, 64, True)  # F-4
    assert short(2, 2048, 12, 64, True)  # AC-mha-1-causal
    assert short(2, 2048, 32, 64, True, 8)  # AC-gqa-1-causal
    assert short(1, 4096, 32, 64, True)
    assert not short(2, 2048, 32, 64, True, 8).batch_last
    # AS-64-*-causal: only one sequence's K and V fit the L2 cache
    for batch, rows in ((16, 1024), (8, 2048), (4, 4096)):
        assert short(batch, rows, 32, 64, True).batch_last
    assert not short(2, 8192, 32, 64, True)
    assert not short(1, 4096, 128, 64, True)
    assert not short(1, 16384, 8, 64, True)
    assert short(4, 1024, 8, 64, False)
    assert not short(2, 2048, 12, 64, False)  # AC-mha-1-full
    assert short(4, 512, 8, 128, True)
    assert not short(4, 1024, 8, 128, True)
    assert not short(4, 512, 8, 128, False)
    assert not short(4, 512, 8, 256, True)


@pytest.mark.parametrize(("batch", "rows"), [(1 << 16, 64), (1, 64 << 16)], ids=["sequences", "blocks of rows"])
def test_short_calls_leave_to_the_other_kernel_what_no_grid_holds(monkeypatch, batch, rows):
    """65535 of each along the grid's second and third axis."""
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 132)
    options = Options(scale=0.125, **CAUSAL)
    for one_less, kind in ((0, hopper.ForwardConfig), (1, hopper.ShortConfig)):
        most = (batch - one_less, rows) if batch > 1 else (batch, rows - 64 * one_less)
        q, k = (torch.empty(most[0], n, 1, 64, device="meta") for n in (most[1], 64))
        assert isinstance(hopper._chosen_forward(hopper._Shape(q, k, k, options), options), kind)


@pytest.mark.parametrize("row_blocks", [4, 8, 9, 16, 24])
@pytest.mark.parametrize("heads", [1, 32, 100, 200])
def test_short_programs_that_share_a_multiprocessor_go_from_both_ends(heads, row_blocks):
    c = hopper.ShortConfig(128, 64, 2)  # three of them fit a multiprocessor
    falling = hopper.choose_falling(c, heads, row_blocks, 132)
    order = [row_blocks - 1 - turn if turn < falling else turn - falling for turn in range(row_blocks)]
    assert sorted(order) == list(range(row_blocks))
    assert (falling < row_blocks) == (132 < heads * row_blocks <= 3 * 132)


def test_the_last_round_is_shared_where_that_saves_time():
    def shared(batch, rows, heads, d, programs=132):
        c = hopper.choose_forward(d, d, False, rows)
        items = batch * heads * -(-rows // (c.m * c.consumers))
        return hopper.choose_shared(items, programs, -(-rows // c.n))

    assert shared(1, 4096, 32, 64) == shared(2, 2048, 32, 64) == 44
    assert not shared(2, 2048, 16, 64)
    assert not shared(4, 4096, 32, 64)
    assert not shared(1, 4096, 32, 128)
    assert not shared(1, 8192, 32, 128)
    assert not shared(1, 4096, 33, 128)  # 8 whole rounds
    assert not shared(1, 4096, 30, 64)
    assert not shared(1, 4096, 6, 64)  # 132 items
    assert not shared(1, 4096, 4, 128)  # not one whole round
    assert not hopper.choose_shared(2 * 132 + 66, 132, 7)
    assert not hopper.choose_shared(2 * 132 + 1, 132, 512)  # less than 4 tiles a program
    assert not hopper.choose_shared(2 * 132 + 66, 132, 1 << 17)  # units of all programs are counted in 32 bits


@pytest.mark.parametrize(
    ("rest", "programs", "tiles"), [(44, 132, 32), (100, 132, 32), (131, 132, 8), (1, 132, 530), (3, 4, 10), (1, 4, 16)]
)
def test_shares_have_every_tile_once(rest, programs, tiles):
    """Each in at most two segments. The owner of an item has drawn its number after all that leave it pieces: it waits for nobody
    who has yet to begin; and it has left its own piece."""
    kernels = gluon_on_cpu.kernels(Path(hopper.__file__).parent, ("attention_scores", "attention_forward"))
    whole = 2 * programs
    drawn = iter(range(whole, whole + programs))
    seen = {}  # (item, tile) -> (number, share)

    def program():
        number = next(drawn)
        for idx in (number, number + programs, number + 2 * programs):
            item, begin, end, share = map(
                int, kernels["_segment"](gluon_on_cpu.Tensor(idx), programs, whole, whole + rest, tiles)
            )
            assert begin < end or idx != number
            assert begin == 0 or idx == number
            assert end <= 0 or idx < number + 2 * programs
            for tile in range(begin, end):
                assert (item, tile) not in seen
                seen[item, tile] = number, share

    gluon_on_cpu.launch(program, programs, (), {})
    assert sorted(seen) == [(whole + i, tile) for i in range(rest) for tile in range(tiles)]
    for i in range(rest):
        numbers, shares = zip(*[seen[whole + i, tile] for tile in range(tiles)], strict=True)
        assert sorted(numbers, reverse=True) == list(numbers)
        assert sorted(shares) == list(shares)
        assert len(set(shares)) == shares[-1] - shares[0] + 1


def test_sections_of_heads_are_nearly_equal():
    for heads, mib in itertools.product((1, 3, 7, 16, 24, 40, 64, 1000), (0.01, 1, 2, 16, 100)):
        section = hopper.choose_section(heads, int(mib * 2**20), 34 * 2**20)
        last = heads % section or section
        assert 1 <= section <= heads
        assert last >= 0.75 * section
        assert section == 1 or section * mib <= 34 + mib


def test_many_heads_go_in_sections_of_a_program_for_each_multiprocessor():
    def choose(batch, rows, heads, d):
        return hopper.choose_causal_section(batch * heads, rows * d * 8, 34 << 20, rows // 128, 132)

    # measured: AS-128-1024-causal, AS-128-2048-causal, AS-128-4096-causal's and longer ones' shape, AS-64-2048-causal
    assert choose(16, 1024, 16, 128) == choose(8, 2048, 16, 128) == choose(8, 2048, 32, 64) == 8
    assert (choose(1, 4096, 32, 128), choose(2, 8192, 16, 128)) == (4, 2)
    # few such sections: as many heads as the L2 cache holds
    assert (choose(1, 2048, 40, 128), choose(2, 2048, 12, 64)) == (14, 24)
    assert choose(1, 2048, 129, 128) == 5  # 26 nearly equal ones, not 16 of 8 and one of 1


def test_forwards_sections_of_heads():
    def choose(batch, rows, heads, d, dv):
        return hopper.choose_causal_section(batch * heads, 2 * rows * (d + dv), 20 << 20, rows // 128, 132)

    # measured: AS-128-1024-causal, AS-128-2048-causal, (2, 2048, 40), (4, 4096, 16) and AS-128-4096-causal, AS-128-8192-causal
    assert choose(16, 1024, 16, 128, 128) == choose(8, 2048, 16, 128, 128) == choose(2, 2048, 40, 128, 128) == 8
    assert choose(4, 4096, 16, 128, 128) == choose(1, 4096, 32, 128, 128) == choose(2, 4096, 16, 256, 256) == 4
    assert choose(2, 8192, 16, 128, 128) == 2
    # AC-mha-2-causal: two sections
    assert choose(1, 2048, 40, 128, 128) == 20


def test_few_key_heads_are_split_until_the_card_is_full():
    assert hopper.choose_parts(16 * 2, 16, 132, True) == 16  # 528 programs are wanted, 512 are all there can be
    assert hopper.choose_parts(16 * 8, 5, 132, True) == 5  # any part, not only halves
    assert hopper.choose_parts(600, 8, 132, True) == 1
    assert hopper.choose_parts(1, 1, 132, True) == 1
    assert hopper.choose_parts(16 * 8, 5, 132, False) == 1  # 128 of one length: all at once
    assert hopper.choose_parts(32, 32, 132, False) == 4
    assert hopper.choose_parts(140, 4, 132, False) == 4  # 560 in 5 turns of a quarter, not 2 whole ones


def test_the_copy_engine_reads_what_is_aligned():
    x = torch.zeros(2, 8, 3, 64, dtype=torch.bfloat16)
    assert hopper.copy_engine_reads(x)
    assert hopper.copy_engine_reads(x.transpose(1, 2))
    assert not hopper.copy_engine_reads(x.transpose(2, 3))
    assert not hopper.copy_engine_reads(x[..., 4:60])
    assert not hopper.copy_engine_reads(x[:1, :1, :1].expand(2, 8, 3, 64))
    assert hopper.copy_engine_reads(x[:1, :, 1:2])  # strides of single rows do not matter


def test_gradients_that_lie_askew_are_copied():
    flat = torch.arange(73, dtype=torch.bfloat16)
    for t in (flat[:72].view(1, 4, 2, 9)[..., :8], flat[1:65].view(1, 4, 2, 8), flat[:1].expand(1, 4, 2, 8)):
        assert not hopper.copy_engine_reads(t)
        assert hopper.copy_engine_reads(hopper.readable(t))
        torch.testing.assert_close(hopper.readable(t), t)
    fine = flat[:64].view(1, 4, 2, 8)
    assert hopper.readable(fine) is fine


def test_rows_are_counted_in_32_bits():
    assert hopper.counts_fit((2**21, 16, 128), (2**21, 16, 128), 64)  # sequences one behind the other
    assert hopper.counts_fit((4, 2**21, 16, 128), (4, 2**21, 16, 128), None)
    assert not hopper.counts_fit((4, 2**21, 256, 8), (4, 2**21, 256, 8), None)
    assert not hopper.counts_fit((2**20, 16, 128), (2**20, 16, 128), 2**20)  # each is padded
    assert not hopper.counts_fit((2**20, 16, 128), (2**31, 1, 128), 64)


def test_a_cpu_tensor_is_refused_with_the_reason():
    x = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
    assert "needs a GPU tensor" in hopper.unsupported(x, x, x, Options(scale=1.0), False)


def test_triton_38_is_not_given_values_narrower_than_keys(monkeypatch):
    monkeypatch.setattr(hopper, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(hopper, "copy_engine_reads", lambda t: True)
    q, v = (
        SimpleNamespace(is_cuda=True, device=None, dtype=torch.bfloat16, shape=(1, 8, 2, d), numel=lambda: 1)
        for d in (192, 128)
    )
    for version, refused in ((False, False), (True, True)):
        monkeypatch.setattr(hopper, "_ONE_WIDTH", version)
        assert (hopper.unsupported(q, q, v, Options(scale=1.0), False) is not None) == refused
        assert hopper.unsupported(v, v, v, Options(scale=1.0), False) is None


# ---- the kernels themselves, in NumPy: warpgroups as threads, real barriers (gluon_on_cpu.py) -------------------------------

CAUSAL = {"causal": True, "window_right": 0}
WINDOW = CAUSAL | {"window_left": 100}
BOTH_SIDES = {"window_left": 30, "window_right": 50}


def emulated(monkeypatch, q, k, v, options, multiprocessors=1):
    counter = gluon_on_cpu.attention_on_cpu(monkeypatch, hopper, multiprocessors)
    dout = normal((*q.shape[:-1], v.shape[-1]), q.dtype, seed=7)
    out, lse = hopper.forward(q, k, v, options)
    dlse = normal(lse.shape, torch.float32, seed=8, scale=0.3)
    grads = hopper.backward(dout, dlse, q, k, v, out, lse, options, (True,) * 5)
    assert not counter.any()
    judge_all((out, lse, *grads[:3]), q, k, v, options, dout, dlse)
    return dout, dlse, grads[4]


def results(forward, q, k, v, options, dout, dlse, wide=None):
    """(out, lse, dq, dk, dv) of the formula."""
    leaves = [t.detach().to(wide or t.dtype).requires_grad_() for t in (q, k, v)]
    out, lse = forward(*leaves, options)
    grads = torch.autograd.grad([out, lse], leaves, [dout.to(out.dtype), dlse.to(lse.dtype)])
    return out.detach(), lse.detach(), *grads


def judge_all(ours, q, k, v, options, dout, dlse):
    true = results(reference.forward, q, k, v, options, dout, dlse, torch.float64)
    low = results(reference.forward, q, k, v, options, dout, dlse)
    for name, got, base, want in zip(("out", "lse", "dq", "dk", "dv"), ours, low, true, strict=True):
        if name == "lse":
            check_lse(got, want)
        else:
            verdict = judge(name, got, base, want)
            assert verdict.ok, str(verdict)


def check_lse(got, want):
    """Scores are in units of log2 here: each is rounded once more than by the formula, at the size that it has."""
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize(
    ("d", "dv", "options"),
    [
        (64, 64, {}),
        (64, 64, WINDOW),
        (64, 64, CAUSAL | {"softcap": 20.0}),
        (64, 40, BOTH_SIDES | {"deterministic": True}),
        (128, 128, {}),
        (128, 128, CAUSAL),
        (128, 96, BOTH_SIDES),
        (128, 128, {"deterministic": True, "softcap": 5.0}),
        (192, 128, CAUSAL),
        (192, 128, WINDOW | {"softcap": 20.0, "deterministic": True}),
        (64, 64, {"window_left": 100}),  # three warpgroups in turns, of which each skips the same tiles
        (160, 200, BOTH_SIDES),
        (256, 256, BOTH_SIDES),
    ],
    ids=str,
)
def test_emulated(monkeypatch, d, dv, options):
    forced(monkeypatch, short=False)
    shapes = [(1, 210, 2, d), (1, 180, 1, d), (1, 180, 1, dv)]
    q, k, v = [normal(shape, torch.float16, seed=i) for i, shape in enumerate(shapes)]
    emulated(monkeypatch, q, k, v, Options(scale=d**-0.5, **options))


@pytest.mark.parametrize(
    ("d", "rows", "keys", "key_heads", "options"),
    [
        (64, 210, 180, 1, {}),
        (64, 600, 600, 2, CAUSAL),  # more tiles than slots
        (64, 130, 300, 1, CAUSAL),  # lengths that do not go together
        (64, 70, 30, 1, CAUSAL),  # rows without a key
        (40, 500, 500, 1, WINDOW),
        (64, 500, 400, 2, BOTH_SIDES),
        (128, 340, 400, 1, CAUSAL),
        (96, 300, 500, 1, BOTH_SIDES),
    ],
    ids=str,
)
def test_emulated_short_sequences(monkeypatch, d, rows, keys, key_heads, options):
    shapes = [(1, rows, 2, d), (1, keys, key_heads, d), (1, keys, key_heads, d)]
    q, k, v = [normal(shape, torch.float16, seed=i) for i, shape in enumerate(shapes)]
    for multiprocessors in (132, 10):  # with 10 the later blocks of rows go from the shortest up
        emulated(monkeypatch, q, k, v, Options(scale=d**-0.5, **options), multiprocessors)
        assert any(isinstance(plan, hopper._ShortPlan) for plan in hopper._plans.values())


def test_emulated_short_sequences_one_after_the_other(monkeypatch):
    one_after_the_other(monkeypatch)
    shapes = (2, 130, 4, 64), (2, 150, 2, 64), (2, 150, 2, 64)
    q, k, v = [normal(shape, torch.float16, seed=i) for i, shape in enumerate(shapes)]
    for multiprocessors in (132, 10):
        emulated(monkeypatch, q, k, v, Options(scale=0.125, **CAUSAL), multiprocessors)
        assert any(getattr(plan, "grid", None) == (4, 3, 2) for plan in hopper._plans.values())


@pytest.mark.parametrize("short", [True, False], ids=["short", "any-length"])
@pytest.mark.parametrize("d", [64, 128])
def test_emulated_prepared_calls_are_the_same(monkeypatch, d, short):
    """For new addresses, gradients of any strides, grouped heads whose parts are added up; without lse too."""
    forced(monkeypatch, short)
    gluon_on_cpu.attention_on_cpu(monkeypatch, hopper, 4)
    options = Options(scale=d**-0.5, **CAUSAL)
    shapes = (1, 70, 4, d), (1, 90, 2, d), (1, 90, 2, d)
    prepared = None
    for step in range(2 if d == 64 else 1):
        q, k, v = [normal(shape, torch.float16, seed=3 * step + i) for i, shape in enumerate(shapes)]
        prepared = prepared or hopper.Prepared("hopper", q, k, v, options)
        want, want_lse = hopper.forward(q, k, v, options)
        assert torch.equal(prepared.forward(q, k, v, False)[0], want)
        out, lse = prepared.forward(q, k, v, True)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
        dout = normal(q.shape, torch.float16, seed=7 + step)
        turned = dout.transpose(1, 2).contiguous().transpose(1, 2)
        askew = torch.cat([dout.new_zeros(1), dout.flatten()])[1:].view(dout.shape)
        true = hopper.backward(dout, None, q, k, v, out, lse, options, (True,) * 5)[:3]
        for given in (dout, turned, askew, dout[..., :1].expand(dout.shape)):
            if given.stride(-1) != 1:
                true = hopper.backward(given.contiguous(), None, q, k, v, out, lse, options, (True,) * 5)[:3]
            grads = prepared.backward(given, q, k, v, out, lse)
            assert all(a.shape == t.shape and a.is_contiguous() for a, t in zip(grads, (q, k, v), strict=True))
            for a, b in zip(grads, true, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)  # dq's sums come in any order


def test_emulated_gradients_of_saved_tensors_that_a_hook_has_packed(monkeypatch):
    """q, k and v out of one product come back dense, as torch.autograd.graph.save_on_cpu leaves them, or in any other way."""
    gluon_on_cpu.attention_on_cpu(monkeypatch, hopper, 4)
    q, k, v = normal((1, 70, 3, 2, 64), torch.float16, seed=0).unbind(2)
    dout = normal(q.shape, torch.float16, seed=1)
    prepared = hopper.Prepared("hopper", q, k, v, Options(scale=0.125))
    out, lse = prepared.forward(q, k, v, True)
    true = hopper.backward(dout, None, q, k, v, out, lse, prepared.options, (True,) * 5)[:3]
    ways = {
        "as they were": lambda t: t,
        "dense": lambda t: t.contiguous(),
        "every other one": lambda t: torch.stack((t, t + 1), -1)[..., 0],
        "at an odd address": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
        "columns first": lambda t: t.mT.contiguous().mT,
    }
    for name in [*ways, *ways]:
        saved = [ways[name](t) for t in (q, k, v, out, lse)]
        for a, b in zip(prepared.backward(dout, *saved), true, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3, msg=name)
        again = hopper.backward(dout, None, *saved, prepared.options, (True,) * 5)[:3]
        for a, b in zip(again, true, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3, msg=f"{name}, not prepared")


@pytest.mark.parametrize(
    ("d", "heads", "how"),
    [(64, (3, 3, 3), "heads"), (128, (4, 2, 2), "heads"), (64, (2, 2, 2), "halves"), (192, (2, 2, 2), "halves"),
     (40, (2, 1, 1), "halves"), (64, (2, 2, 2), "overlapping")],
    ids=str,
)  # fmt: skip
def test_emulated_gradients_are_slices_of_one_tensor_where_q_k_and_v_are(monkeypatch, d, heads, how):
    """The same bits as for q, k and v apart, grouped heads added up in parts among them."""
    gluon_on_cpu.attention_on_cpu(monkeypatch, hopper, 4)
    h, hk, _ = heads
    rows, dv = 70, 128 if d == 192 else d
    if how == "heads":
        q, k, v = normal((2, rows, sum(heads), d), torch.float16, seed=0).split(heads, 2)
    elif how == "halves":
        q = normal((2, rows, h, d), torch.float16, seed=0)
        k, v = normal((2, rows, hk, d + dv), torch.float16, seed=1).split((d, dv), 3)
    else:  # at the distances of slices, but with more behind
        q, k, v = normal((2, rows, 4 * h, d), torch.float16, seed=0).split(h, 2)[:3]
    options = Options(scale=d**-0.5, deterministic=True, **CAUSAL)
    prepared = hopper.Prepared("hopper", q, k, v, options)
    out, lse = prepared.forward(q, k, v, True)
    dout = normal(out.shape, torch.float16, seed=2)
    apart = [t.contiguous() for t in (q, k, v)]
    want = hopper.backward(dout, None, *apart, out, lse, options, (True,) * 5)[:3]
    for q_k_v in ((q, k, v), apart, (q, k, v)):
        got = prepared.backward(dout, *q_k_v, out, lse)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        together = q_k_v is not apart and how != "overlapping"
        assert (side_by_side(got if how == "heads" else got[1:], 2 if how == "heads" else 3) is not None) == together
    assert len(prepared.backward_plans) == 2
    if (d, how) == (128, "heads"):
        assert all(plan.parts > 1 for plan, *_ in prepared.backward_plans.values())


@pytest.mark.parametrize("d", [64, 128, 192, 256])
def test_emulated_lengths_slopes_and_sink(monkeypatch, d):
    queries, keys = [70, 140, 1, 0], [70, 160, 5, 30]
    dv = 128 if d == 192 else d
    shapes = [(sum(queries) + 3, 2, d), (sum(keys), 1, d), (sum(keys), 1, dv)]
    q, k, v = [normal(shape, torch.float16, seed=i) for i, shape in enumerate(shapes)]
    ends = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (queries, keys)]
    slopes, sink = (normal((2,), torch.float32, seed=i) for i in (5, 6))
    options = Options(
        scale=d**-0.5, alibi_slopes=slopes.abs(), sink=sink, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1],
        max_seqlen_q=140, max_seqlen_k=160, **WINDOW,
    )  # fmt: skip
    dout, dlse, dsink = emulated(monkeypatch, q, k, v, options, multiprocessors=3)
    true = gradient_of_sink(q, k, v, options, dout, dlse, torch.float64)
    torch.testing.assert_close(dsink.double(), true, rtol=1e-5, atol=1e-5)


def gradient_of_sink(q, k, v, options, dout, dlse, dtype):
    """The formula's."""
    leaf = options.sink.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    results = reference.forward(*(t.to(dtype) for t in (q, k, v)), options._replace(sink=leaf))
    return torch.autograd.grad(results, leaf, [dout.to(dtype), dlse.to(leaf.dtype)])[0]


@pytest.mark.parametrize(
    ("d", "dv", "seed", "options"),
    [
        (64, 64, 3, {}),
        (64, 64, 5, WINDOW | {"deterministic": True}),
        (128, 128, 29, CAUSAL),
        (128, 96, 28, BOTH_SIDES | {"softcap": 5.0}),
        (192, 128, 4, {}),
        (256, 256, 7, CAUSAL),
        (160, 200, 3, {"deterministic": True}),
    ],
    ids=str,
)
def test_emulated_the_rounding_of_out_stays_out_of_a_sinks_gradient(monkeypatch, d, dv, seed, options):
    """With delta in place of the sum of p dp each of these is over its budget. The same bits on every run; and a call that does not
    want it does not decide what the next one does."""
    gluon_on_cpu.attention_on_cpu(monkeypatch, hopper, 3)
    shapes = (1, 70, 4, d), (1, 150, 2, d), (1, 150, 2, dv)
    q, k, v = [normal(shape, torch.float16, seed=10 * seed + i) for i, shape in enumerate(shapes)]
    sink = normal((4,), torch.float32, seed=10 * seed + 3)
    options = Options(scale=d**-0.5, sink=sink, **options)
    out, lse = hopper.forward(q, k, v, options)
    dout = normal(out.shape, torch.float16, seed=10 * seed + 4)
    dlse = normal(lse.shape, torch.float32, seed=10 * seed + 5, scale=0.3)
    low, true = (gradient_of_sink(q, k, v, options, dout, dlse, dtype) for dtype in (q.dtype, torch.float64))
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2) - dlse
    assert not judge("by delta", -(torch.exp(sink[:, None] - lse) * delta).sum((0, 2)), low, true).ok
    call = dout, dlse, q, k, v, out, lse, options
    assert hopper.backward(*call, (True, True, True, False, False))[4] is None
    dsink = hopper.backward(*call, (True,) * 5)[4]
    verdict = judge("dsink", dsink, low, true)
    assert verdict.ok, str(verdict)
    assert torch.equal(hopper.backward(*call, (True,) * 5)[4], dsink)


@pytest.mark.parametrize("left", [-1, 90])
@pytest.mark.parametrize("d", [64, 128, 192, 256])
def test_emulated_no_row_sees_the_next_sequence_through_a_window_to_the_right(monkeypatch, d, left):
    shapes = [(65 + 70, 1, d), (65 + 80, 1, d), (65 + 80, 1, d)]
    q, k, v = [normal(shape, torch.float16, seed=i) for i, shape in enumerate(shapes)]
    ends = [torch.tensor([0, 65, 65 + n], dtype=torch.int32) for n in (70, 80)]
    options = Options(
        scale=d**-0.5, window_left=left, window_right=75, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], max_seqlen_q=70,
        max_seqlen_k=80,
    )  # fmt: skip
    emulated(monkeypatch, q, k, v, options)


def test_emulated_the_tile_behind_the_last_key_adds_nothing(monkeypatch):
    """With a window to the right, and with sums so small that a probability of a score of 0 would be infinite."""
    q = torch.full((1, 200, 1, 64), 4.0, dtype=torch.float16) + normal(
        (1, 200, 1, 64), torch.float16, seed=0, scale=0.1
    )
    v = normal(q.shape, torch.float16, seed=1)
    emulated(monkeypatch, q, -q, v, Options(scale=0.125, window_right=150))


def shares_all(monkeypatch):
    """Every last round is shared that is not full."""
    monkeypatch.setattr(hopper, "choose_short", lambda *_: None)
    monkeypatch.setattr(hopper, "choose_shared", lambda items, programs, tiles: items % programs)
    monkeypatch.setattr(hopper, "_plans", {})


def notes_writes(monkeypatch):
    """A list of where each block of O and each float elsewhere is written."""
    writes = []
    block, floats = gluon_on_cpu.tma_store, gluon_on_cpu.store

    def tma_store(desc, at, src):
        writes.append(tuple(map(int, at)))
        block(desc, at, src)

    def store(pointer, value, mask=None):
        if pointer.kind is np.float32:
            at = pointer.address + 4 * pointer.offset
            writes.extend(at.ravel() if mask is None else at[mask.a])
        floats(pointer, value, mask)

    monkeypatch.setattr(gluon_on_cpu, "tma_store", tma_store)
    monkeypatch.setattr(gluon_on_cpu, "store", store)
    return writes


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
@pytest.mark.parametrize(
    ("d", "heads", "keys", "programs", "options"),
    [
        (64, (5, 5), 256, 3, {}),  # a share ends one item and begins the next
        (64, (8, 2), 300, 7, {"sink": 1, "softcap": 20.0}),  # an item of seven pieces, one tile or two
        (128, (7, 1), 200, 4, {"softcap": 5.0}),
        (128, (9, 3), 170, 4, {"sink": 1, "alibi_slopes": 1}),  # four pieces, the owner's own the smallest
    ],
    ids=str,
)
def test_emulated_last_round_that_programs_share(monkeypatch, d, heads, keys, programs, options, together):
    """Whoever is first: the same bits, nothing written twice, and a counter of zeros."""
    writes = notes_writes(monkeypatch)
    counter = gluon_on_cpu.attention_on_cpu(monkeypatch, hopper, programs)
    shares_all(monkeypatch)
    choose = hopper.choose_forward
    monkeypatch.setattr(
        hopper, "choose_forward", lambda *call: choose(*call)._replace(m=16, n=32)
    )  # what is faster here
    h, key_heads = heads
    shapes = [(1, 30, h, d), (1, keys, key_heads, d), (1, keys, key_heads, d)]
    q, k, v = [normal(shape, torch.float16, seed=i) for i, shape in enumerate(shapes)]
    for i, name in enumerate(("sink", "alibi_slopes")):
        if name in options:
            options = options | {name: normal((h,), torch.float32, seed=5 + i).abs()}
    options = Options(scale=d**-0.5, **options)
    calls = [hopper.forward(q, k, v, options)]
    assert not counter.any()
    assert len(writes) == len(set(writes)) > 0
    if together:
        monkeypatch.setattr(gluon_on_cpu, "launch", lambda *call: gluon_on_cpu.launch_together(*call[:4]))
    calls.append(hopper.forward(q, k, v, options))
    assert not counter.any()
    if options.sink is None and options.alibi_slopes is None:
        calls.append(hopper.Prepared("hopper", q, k, v, options).forward(q, k, v, True))
        assert not counter.any()
    (plan,) = hopper._plans.values()
    assert plan.pieces is not None
    true = reference.forward(*(t.double() for t in (q, k, v)), options)
    low = reference.forward(q, k, v, options)
    verdict = judge("out", calls[0][0], low[0], true[0])
    assert verdict.ok, str(verdict)
    check_lse(calls[0][1], true[1])
    for got in calls[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, calls[0], strict=True))


@pytest.mark.parametrize("options", [CAUSAL, {"window_left": 20}, {"window_right": 20}, "lengths"], ids=str)
def test_emulated_items_of_unlike_length_are_not_shared(monkeypatch, options):
    gluon_on_cpu.attention_on_cpu(monkeypatch, hopper, 2)
    shares_all(monkeypatch)
    q = normal((1, 64, 3, 64), torch.float16, seed=0)
    if options == "lengths":
        ends = torch.tensor([0, 64], dtype=torch.int32)
        options = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), ends) | {"max_seqlen_q": 64, "max_seqlen_k": 64}
        q = q[0]
    hopper.forward(q, q, q, Options(scale=0.125, **options))
    assert all(plan.pieces is None for plan in hopper._plans.values())


def test_emulated_rows_without_a_key_and_a_sink_of_minus_infinity(monkeypatch):
    shapes = (1, 70, 2, 64), (1, 30, 2, 64), (1, 30, 2, 64)
    q, k, v = [normal(shape, torch.float16, seed=i) for i, shape in enumerate(shapes)]
    options = Options(scale=0.125, sink=torch.tensor([float("-inf"), 0.5]), **CAUSAL)
    _, _, dsink = emulated(monkeypatch, q, k, v, options)
    assert dsink[0] == 0
    assert dsink[1].isfinite()


# ---- on the card -------------------------------------------------------------------------------------------------------


def hopper_card():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def on_card(test):
    return pytest.mark.gpu(pytest.mark.skipif(not hopper_card(), reason="needs a card of compute capability 9.0")(test))


def made(shapes, dtype):
    return [normal(shape, dtype, seed=i, device="cuda") for i, shape in enumerate(shapes)]


def forced(monkeypatch, short):
    """The kernel of short sequences, or the one for any length, whatever would be chosen."""
    choose = hopper.choose_short

    def chosen(d, dv, causal, *_):
        return choose(d, dv, causal or max(d, dv) > 64, 1, 1, 1, 1, 132) if short else None

    monkeypatch.setattr(hopper, "choose_short", chosen)
    monkeypatch.setattr(hopper, "_plans", {})


def check(q, k, v, options):
    dout = normal((*q.shape[:-1], v.shape[-1]), q.dtype, seed=7, device="cuda")
    dlse = normal(hopper.forward(q, k, v, options)[1].shape, torch.float32, seed=8, device="cuda", scale=0.3)
    kept = [t.clone() for t in (q, k, v, dout, dlse)]
    out, lse = hopper.forward(q, k, v, options)
    grads = hopper.backward(dout, dlse, q, k, v, out, lse, options, (True, True, True, False, False))
    judge_all((out, lse, *grads[:3]), q, k, v, options, dout, dlse)
    for before, after in zip(kept, (q, k, v, dout, dlse), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, CAUSAL, WINDOW, {"window_left": 30, "window_right": 50}], ids=str)
@pytest.mark.parametrize("d", [40, 64, 96, 128])
@pytest.mark.parametrize("seq", [(960, 960), (1, 700), (300, 1000), (1000, 300), (65, 65)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("short", [True, False], ids=["short", "any-length"])
@on_card
def test_out_lse_and_gradients(monkeypatch, options, d, seq, dtype, short):
    forced(monkeypatch, short)
    q, k, v = made([(2, seq[0], 6, d), (2, seq[1], 3, d), (2, seq[1], 3, d)], dtype)
    check(q, k, v, Options(scale=d**-0.5, **options))


def one_after_the_other(monkeypatch):
    choose = hopper.choose_short
    monkeypatch.setattr(hopper, "choose_short", lambda *call: choose(*call)._replace(batch_last=True))
    monkeypatch.setattr(hopper, "_plans", {})


@on_card
def test_short_sequences_one_after_the_other(monkeypatch):
    one_after_the_other(monkeypatch)
    check(*made([(3, 700, 6, 64), (3, 900, 3, 64), (3, 900, 3, 64)], torch.bfloat16), Options(scale=0.125, **CAUSAL))


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    "options",
    [CAUSAL | {"softcap": 20.0}, {"softcap": 5.0}, {"alibi_slopes": 1}, CAUSAL | {"alibi_slopes": 1}],
    ids=str,
)
@on_card
def test_softcap_and_alibi(options, d):
    q, k, v = made([(2, 500, 4, d), (2, 700, 2, d), (2, 700, 2, d)], torch.bfloat16)
    if "alibi_slopes" in options:
        options = options | {"alibi_slopes": normal((4,), torch.float32, seed=5, device="cuda").abs()}
    check(q, k, v, Options(scale=d**-0.5, **options))


@pytest.mark.parametrize("d", [64, 128, 192])
@pytest.mark.parametrize("options", [{}, CAUSAL, WINDOW, {"window_left": 90, "window_right": 100}], ids=str)
@on_card
def test_lengths_of_their_own(options, d):
    queries, keys = [100, 257, 1, 384, 0, 63], [100, 300, 5, 384, 70, 200]
    q, k, v = made([(sum(queries) + 9, 4, d), (sum(keys), 2, d), (sum(keys), 2, d)], torch.bfloat16)
    ends = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device="cuda") for n in (queries, keys)]
    lengths = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), ends, strict=True)) | {
        "max_seqlen_q": 384,
        "max_seqlen_k": 384,
    }
    check(q, k, v, Options(scale=d**-0.5, **options, **lengths))


@pytest.mark.parametrize("dims", [(256, 256), (192, 128), (160, 96), (128, 256)], ids=str)
@pytest.mark.parametrize("options", [{}, CAUSAL, WINDOW], ids=str)
@on_card
def test_wide_heads_forward(options, dims):
    d, dv = dims
    q, k, v = made([(2, 700, 4, d), (2, 900, 2, d), (2, 900, 2, dv)], torch.bfloat16)
    options = Options(scale=d**-0.5, **options)
    true = reference.forward(*(t.double() for t in (q, k, v)), options)
    low = reference.forward(q, k, v, options)
    out, lse = hopper.forward(q, k, v, options)
    verdict = judge("out", out, low[0], true[0])
    assert verdict.ok, str(verdict)
    check_lse(lse, true[1])


@pytest.mark.parametrize("dims", [(256, 256), (192, 128), (160, 96), (128, 256), (136, 256), (160, 200)], ids=str)
@pytest.mark.parametrize("options", [{}, CAUSAL, WINDOW, CAUSAL | {"deterministic": True}], ids=str)
@on_card
def test_wide_heads_backward(options, dims):
    d, dv = dims
    q, k, v = made([(2, 700, 4, d), (2, 900, 2, d), (2, 900, 2, dv)], torch.bfloat16)
    check(q, k, v, Options(scale=d**-0.5, **options))


@pytest.mark.parametrize("options", [WINDOW, {"deterministic": True}, {"softcap": 20.0}], ids=str)
@pytest.mark.parametrize("d", [64, 128, 192, 256])
@on_card
def test_a_sink_and_its_gradient(d, options):
    q, k, v = made([(2, 300, 4, d), (2, 300, 2, d), (2, 300, 2, d)], torch.bfloat16)
    sink = normal((4,), torch.float32, seed=5, device="cuda")
    options = Options(scale=d**-0.5, sink=sink, **options)
    dout = normal(q.shape, q.dtype, seed=7, device="cuda")

    def formula(wide):
        leaves = [t.detach().to(wide).requires_grad_() for t in (q, k, v, sink)]
        out, _ = reference.forward(*leaves[:3], options._replace(sink=leaves[3]))
        grads = torch.autograd.grad(out, leaves, dout.to(out.dtype))
        return [out.detach(), *grads[:3], grads[3].to(torch.float32 if wide != torch.float64 else wide)]

    out, lse = hopper.forward(q, k, v, options)
    dq, dk, dv, _, dsink = hopper.backward(dout, None, q, k, v, out, lse, options, (True,) * 5)
    ours = out, dq, dk, dv, dsink
    names = "out", "dq", "dk", "dv", "dsink"
    for name, got, low, true in zip(names, ours, formula(q.dtype), formula(torch.float64), strict=True):
        verdict = judge(name, got, low, true)
        assert verdict.ok, str(verdict)
    for _ in range(20):
        assert torch.equal(hopper.backward(dout, None, q, k, v, out, lse, options, (True,) * 5)[4], dsink)


@on_card
def test_a_sinks_gradient_that_float16_would_round_is_not_made_here():
    for dtype, d, softcap, refused in (
        (torch.float16, 192, 20.0, True), (torch.bfloat16, 192, 20.0, False), (torch.float16, 128, 20.0, False),
        (torch.float16, 192, 0.0, False),
    ):  # fmt: skip
        q, k, v = made([(1, 30, 4, d), (1, 30, 2, d), (1, 30, 2, d)], dtype)
        options = Options(scale=d**-0.5, softcap=softcap, sink=torch.zeros(4, device="cuda"))
        assert (hopper.unsupported(q, k, v, options, True) is not None) == refused
        assert hopper.unsupported(q, k, v, options, False) is None


@on_card
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize(("d", "key_heads"), [(64, 32), (128, 32), (64, 4), (128, 8)])
def test_a_shared_last_round_has_the_same_bits_beside_another_stream(monkeypatch, d, key_heads, sink):
    shares_all(monkeypatch)
    q, k, v = made([(1, 4096, 32, d), (1, 4096, key_heads, d), (1, 4096, key_heads, d)], torch.bfloat16)
    sinks = normal((32,), torch.float32, seed=5, device="cuda") if sink else None
    options = Options(scale=d**-0.5, sink=sinks)
    out, lse = hopper.forward(q, k, v, options)
    assert all(plan.pieces is not None for plan in hopper._plans.values())
    one = 32 // key_heads
    for head in range(0, 32, max(one, 4)):  # of all at once float64 would not fit
        heads = slice(head, head + max(one, 4))
        keys = slice(head // one, (head + max(one, 4)) // one)
        part = q[:, :, heads], k[:, :, keys], v[:, :, keys]
        some = options._replace(sink=sinks[heads] if sink else None)
        true = reference.forward(*(t.double() for t in part), some)
        verdict = judge("out", out[:, :, heads], reference.forward(*part, some)[0], true[0])
        assert verdict.ok, str(verdict)
        check_lse(lse[:, heads], true[1])
    a = normal((4096, 4096), torch.bfloat16, seed=6, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for i in range(200):
        with torch.cuda.stream(stream):  # takes some multiprocessors, now more and now fewer
            a[: 128 * (i % 32 + 1)] @ a
            beside = hopper.forward(q, k, v, options) if i % 10 == 0 else (out, lse)
        again = hopper.forward(q, k, v, options)
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip((out, lse, *beside), (*again, out, lse), strict=True))


@on_card
@pytest.mark.parametrize("options", [{}, CAUSAL], ids=str)
@pytest.mark.parametrize(
    ("d", "dv", "short"),
    [(64, 64, True), (128, 128, True), (64, 64, False), (128, 128, False), (192, 128, False), (256, 256, False)],
)
def test_the_same_bits_a_thousand_times(monkeypatch, options, d, dv, short):
    """The backward of short calls: test_hopper_attention_short.py."""
    forced(monkeypatch, short)
    q, k, v, dout = made([(2, 960, 6, d), (2, 960, 3, d), (2, 960, 3, dv), (2, 960, 6, dv)], torch.bfloat16)
    options = Options(scale=d**-0.5, deterministic=True, **options)
    out, lse = hopper.forward(q, k, v, options)
    needs = (True, True, True, False, False)
    first = (out, lse, *hopper.backward(dout, None, q, k, v, out, lse, options, needs)[:3])
    for _ in range(1000):
        again = hopper.forward(q, k, v, options)
        again += hopper.backward(dout, None, q, k, v, *again, options, needs)[:3]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_only_the_default_stream_keeps_a_counter(monkeypatch):
    """What another stream allocates may belong to a pool of torch.compile's graphs, which is not to outlive the call."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: zeros(n, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(hopper, "_counters", {})
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 132)
    kept = hopper._counter(0, 0)
    assert hopper._counter(0, 0) is kept
    assert hopper._counter(1, 0) is not kept
    assert hopper._counter(0, 1234) is not hopper._counter(0, 1234)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert hopper._counter(0, 0) is not kept
    assert list(hopper._counters) == [0, 1]


@on_card
@pytest.mark.parametrize("length", [256, 2048])
def test_compile_with_graphs(length):
    q, k, v = made([(1, length, 8, 128)] * 3, torch.bfloat16)

    def call(q, k, v):
        return attention(q, k, v, causal=True, backend="hopper")

    compiled = torch.compile(call, mode="reduce-overhead", fullgraph=True)
    for i in range(4):
        q.copy_(normal(q.shape, q.dtype, seed=60 + i, device="cuda"))
        assert torch.equal(compiled(q, k, v), call(q, k, v))


@on_card
def test_two_streams_and_a_graph_do_not_share_a_counter():
    q, k, v = made([(4, 1500, 16, 64), (4, 1500, 16, 64), (4, 1500, 16, 64)], torch.bfloat16)
    options = Options(scale=0.125, **CAUSAL)
    want = hopper.forward(q, k, v, options)[0]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outs = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(hopper.forward(q, k, v, options)[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hopper.forward(q, k, v, options)[0]
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(want, out) for out in (*outs, captured))


@pytest.mark.parametrize("d", [64, 128, 256])
@on_card
def test_a_graph_replays_both_passes_on_new_data(d):
    """The backward's kernels let each other in early, in a graph too."""
    q, k, v, dout = made([(2, 500, 4, d), (2, 700, 2, d), (2, 700, 2, d), (2, 500, 4, d)], torch.bfloat16)
    options = Options(scale=d**-0.5, deterministic=True, **CAUSAL)

    def both():
        out, lse = hopper.forward(q, k, v, options)
        return out, lse, *hopper.backward(dout, None, q, k, v, out, lse, options, (True, True, True, False, False))[:3]

    graph, results = captured(both)
    for i, t in enumerate((q, k, v, dout)):
        t.copy_(normal(t.shape, t.dtype, seed=50 + i, device="cuda"))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, both(), strict=True))


@on_card
@pytest.mark.parametrize("d", [64, 128])
def test_calls_of_one_kind_share_what_was_prepared(d):
    """New addresses, another stream, another thread, a graph: the bits of the first call, and gradients within the budget."""
    q, k, v, dout = made([(2, 960, 6, d), (2, 960, 3, d), (2, 960, 3, d), (2, 960, 6, d)], torch.bfloat16)
    options = Options(scale=d**-0.5, deterministic=True, **CAUSAL)

    def call():
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = attention(*leaves, causal=True, deterministic=True, return_lse=True)
        grads = torch.autograd.grad(out, leaves, dout)
        again = attention(*[t.detach() for t in leaves], causal=True, deterministic=True)
        return [t.detach() for t in (out, lse, *grads, again)]

    out, lse = hopper.forward(q, k, v, options)
    want = [out, lse, *hopper.backward(dout, None, q, k, v, out, lse, options, (True,) * 5)[:3], out]
    got = [call() for _ in range(3)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got.append(call())
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: got.append(call()))
    thread.start()
    thread.join()
    graph, replayed = captured(call)
    graph.replay()
    got.append(replayed)
    torch.cuda.synchronize()
    assert len(got) == 6
    for results in got:
        assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))
