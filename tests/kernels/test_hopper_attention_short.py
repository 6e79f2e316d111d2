"""The backward of short calls on Hopper: which calls take it, the kernel in Triton's interpreter, what the compiler makes of it,
and on the card."""

import json

import pytest
import torch

from helpers import captured
from trinix.kernels.torch import attention as reference
from trinix.ops import attention
from trinix.ops.attention import Options
from trinix.testing import judge, normal

pytest.importorskip("triton")

from trinix.kernels.hopper import attention as hopper
from trinix.kernels.hopper.attention_backward_short import attention_backward_short

CAUSAL = {"window_right": 0}
on_card = pytest.mark.gpu
NEEDS = (True, True, True, False, False)


def test_calls_that_take_it():
    def short(batch, rows, heads, d, causal, keys=None):
        return hopper.choose_short_backward(d, d, causal, rows, keys or rows, batch * heads, 132)

    for causal in (False, True):
        assert short(1, 128, 8, 64, causal)
        assert short(4, 256, 8, 64, causal)  # F-1
        assert short(8, 256, 12, 64, causal)
        assert not short(4, 256, 8, 128, causal)
        assert not short(16, 256, 12, 64, causal)  # the card is full
        assert not short(4, 1024, 8, 64, causal)  # F-3
        assert not short(8, 512, 12, 64, causal)
        assert not short(1, 64, 8, 64, causal, 4096)
    assert short(4, 512, 8, 64, True)  # F-2
    assert not short(4, 512, 8, 64, False)
    for batch, rows, heads in ((1, 512, 8), (1, 512, 12), (2, 512, 8), (4, 300, 8)):
        assert short(batch, rows, heads, 64, False)
    assert not short(2, 512, 12, 64, False)
    assert not short(1, 513, 1, 64, False)


@pytest.mark.parametrize(
    "options",
    [
        {"window_left": 5}, {"window_right": 3}, {"softcap": 9.0}, {"alibi_slopes": torch.ones(2)}, {"sink": torch.ones(2)},
        {"cu_seqlens_q": torch.tensor([0, 9]), "cu_seqlens_k": torch.tensor([0, 9]), "max_seqlen_q": 9, "max_seqlen_k": 9},
        {"grouped": True},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_calls_that_it_does_not_know_go_to_the_others(options, monkeypatch):
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 132)
    options = dict(options)
    q = torch.zeros((1, 9, 2, 64) if "cu_seqlens_q" not in options else (9, 2, 64), dtype=torch.float16)
    k = q[..., :1, :] if options.pop("grouped", None) else q
    options = Options(scale=0.125, **options)
    shape = hopper._Shape(q, k, k, options)
    assert hopper._chosen_short_backward(shape, options, options.sink is not None) is None
    plain = Options(scale=0.125, deterministic=True, window_right=0)
    q = torch.zeros(1, 9, 2, 64, dtype=torch.float16)
    assert hopper._chosen_short_backward(hopper._Shape(q, q, q, plain), plain, False)


def test_offsets_beyond_32_bits_go_to_the_others(monkeypatch):
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(hopper, "_BackwardPlan", lambda *call: "long")
    monkeypatch.setattr(hopper, "_ShortBackwardPlan", lambda *call: "short")
    near = torch.empty(1, 9, 2, 64, dtype=torch.float16, device="meta")
    far = torch.empty_strided((1, 9, 2, 64), (0, 2**28, 64, 1), dtype=torch.float16, device="meta")
    for q, wanted in ((near, "short"), (far, "long")):
        tensors = q, near, near, near, near, near, near
        assert hopper._backward_plan(tensors, (near, near, near), Options(scale=0.125), False, False) == wanted


def gradients(q, k, v, options, dout, dlse, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    out, lse = reference.forward(*leaves, options)
    wanted = [(out, dout.to(dtype))] + [(lse, g.to(lse.dtype)) for g in [dlse] if g is not None]
    return torch.autograd.grad([y for y, _ in wanted], leaves, [g for _, g in wanted])


def judge_gradients(got, q, k, v, options, dout, dlse):
    low, true = (gradients(q, k, v, options, dout, dlse, dtype) for dtype in (q.dtype, torch.float64))
    for name, ours, theirs, right in zip(("dq", "dk", "dv"), got, low, true, strict=True):
        verdict = judge(name, ours, theirs, right)
        assert verdict.ok, str(verdict)


@pytest.fixture
def interpreted(monkeypatch):
    """``hopper.backward`` runs the kernel in the interpreter, whatever it would choose."""

    def binary(kernel, device, examples, constants, **_):
        assert kernel is attention_backward_short
        tensors, scalars = examples[:10], examples[10:]

        def run(programs, stream, arguments, noted):
            assert noted == arguments == (*(t.data_ptr() for t in tensors), *scalars)
            kernel[(programs,)](*examples, **constants | {"DEPENDENT": False, "UPCAST": True})

        return run

    made = []
    plan = hopper._backward_plan
    monkeypatch.setattr(hopper, "_backward_plan", lambda *call: made.append(plan(*call)) or made[-1])
    monkeypatch.setattr(hopper, "_binary", binary)
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(hopper, "raw_stream", lambda device: 0)
    monkeypatch.setattr(hopper, "_plans", {})
    yield
    assert [type(one) for one in made] == [hopper._ShortBackwardPlan]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("options", [{}, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("queries", "keys", "d", "dv", "dlse"),
    [
        (128, 128, 64, 64, False),
        (1, 40, 64, 64, False),
        (70, 65, 40, 64, True),
        (63, 129, 64, 24, True),
        (130, 66, 8, 8, False),
    ],
)
def test_the_kernel_holds_the_float64_budget(queries, keys, d, dv, dlse, options):
    """In float16: the interpreter cuts off what bfloat16 cannot hold. Causal queries that see no key are among them, where there are
    more of them than keys."""
    dtype = torch.float16
    q, dout = (normal((2, queries, 2, n), dtype, seed=i) for i, n in ((1, d), (4, dv)))
    k, v = normal((2, 2, keys, d), dtype, seed=2).transpose(1, 2), normal((2, keys, 2, dv), dtype, seed=3)
    options = Options(scale=d**-0.5, **options)
    out, lse = reference.forward(q, k, v, options)
    dlse = normal(lse.shape, torch.float32, seed=5, scale=0.3) if dlse else None
    got = hopper.backward(dout, dlse, q, k, v, out, lse, options, NEEDS)[:3]
    judge_gradients(got, q, k, v, options, dout, dlse)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("options", [{}, CAUSAL], ids=["full", "causal"])
def test_keys_behind_the_end_are_nothing_beside_low_scores(options):
    """Against an lse of -128 the score of a key that is not there, 0, is an infinite probability."""
    q, k, v, dout = (normal((1, 70, 1, 64), torch.float16, seed=i) for i in range(4))
    q, k = q * 0.1 + 4, k * 0.1 - 4
    options = Options(scale=0.125, **options)
    out, lse = reference.forward(q, k, v, options)
    assert lse.max() < -90
    got = hopper.backward(dout, None, q, k, v, out, lse, options, NEEDS)[:3]
    # dq and dk are sums that cancel here
    torch.testing.assert_close(
        got, gradients(q, k, v, options, dout, None, torch.float32), atol=4e-3, rtol=0, check_dtype=False
    )


COMPILE = """
import itertools, json, re
from triton.compiler import ASTSource
from binaries import compiled
from trinix.kernels.hopper import attention as hopper
from trinix.kernels.hopper.attention_backward_short import attention_backward_short as kernel

c = hopper.choose_short_backward(64, 64, True, 64, 64, 1, 132)
annotated = {p.name: p.annotation_type for p in kernel.params}
flags = itertools.product((64, 40), (False, True), (False, True), (False, True))
for d, causal, even, dlse in (list(flags) if EVERY else [(64, True, False, True), (64, False, True, False)]):
    constants = hopper.short_backward_constants(c, d, d, causal=causal, even=even, dlse=dlse)
    tensors = {name: "*fp32" if "lse" in name else "*bf16" for name in ("q", "k", "v", "out", "lse", "dout", "dlse", "dq", "dk", "dv")}
    signature = {n: "constexpr" if n in constants else tensors.get(n) or annotated[n] for n in kernel.arg_names}
    options = {"num_warps": c.num_warps, "num_stages": c.stages}
    binary, words = compiled(kernel, signature, constants, options, list(tensors), source=ASTSource)
    ptx = binary.asm["ptx"]
    print(json.dumps({"name": str((d, causal, even, dlse)), "spills": sum(map(int, re.findall("([0-9]+) bytes spill", words))),
                      "warnings": re.findall("C75[0-9]{2}", words), "products": ptx.count("wgmma.mma_async"),
                      "loads": ptx.count("cp.async.cg.shared.global"), "shared": binary.metadata.shared,
                      "waits": ptx.find("griddepcontrol.wait"), "reads": re.search("(ld|st|async.c[ag].shared).global", ptx).start()}))
"""


def test_every_binary_compiles_well(forked_process, every_binary):
    lines = [json.loads(line) for line in forked_process(f"EVERY = {every_binary}\n" + COMPILE).splitlines()]
    assert len(lines) == (16 if every_binary else 2)
    for one in lines:
        assert one["spills"] == 0, one
        assert not one["warnings"], one  # C7515 and its like: products that wait for one another
        assert one["products"] == 7 * 4, one  # seven products of 64 channels or rows, 16 at a time
        assert one["loads"] > 0, one
        assert 2 * (one["shared"] + 1024) <= 228 << 10, one  # registers are for two programs too
        assert 0 < one["waits"] < one["reads"], one  # launched early


@on_card
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "d", "dv"),
    [(4, 256, 256, 8, 64, 64), (1, 1, 40, 1, 64, 64), (2, 200, 230, 3, 64, 64), (3, 230, 130, 2, 40, 64), (2, 65, 129, 5, 16, 24),
     (1, 250, 256, 8, 64, 64)],
)  # fmt: skip
def test_on_the_card(batch, queries, keys, heads, d, dv, dtype, causal):
    q, dout = (normal((batch, queries, heads, n), dtype, seed=i, device="cuda") for i, n in ((1, d), (4, dv)))
    k, v = (normal((batch, keys, heads, n), dtype, seed=i, device="cuda") for i, n in ((2, d), (3, dv)))
    options = Options(scale=d**-0.5, **(CAUSAL if causal else {}))
    assert "ShortBackwardConfig" in hopper.describe(q, k, v, options, True)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = attention(*leaves, causal=causal, return_lse=True, backend="hopper")
    dlse = normal(lse.shape, torch.float32, seed=5, scale=0.3, device="cuda")
    judge_gradients(
        torch.autograd.grad([out, lse], leaves, [dout, dlse], retain_graph=True), q, k, v, options, dout, dlse
    )
    got = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    judge_gradients(got, q, k, v, options, dout, None)
    for _ in range(1000):
        assert all(
            torch.equal(a, b)
            for a, b in zip(got, torch.autograd.grad(out, leaves, dout, retain_graph=True), strict=True)
        )


@on_card
def test_a_graph_replays_it_behind_other_kernels():
    """It begins before the kernel in front has ended, which makes its incoming gradient here."""
    q, k, v = (normal((4, 250, 8, 64), torch.bfloat16, seed=i, device="cuda").requires_grad_() for i in (1, 2, 3))
    x = normal((4, 250, 8, 64), torch.bfloat16, seed=4, device="cuda")

    def both():
        return torch.autograd.grad(attention(q, k, v, causal=True, backend="hopper"), (q, k, v), x * 2)

    graph, results = captured(both)
    for i, t in enumerate((q.detach(), k.detach(), v.detach(), x)):
        t.copy_(normal(t.shape, t.dtype, seed=50 + i, device="cuda"))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, both(), strict=True))
