"""Decoding over a cache: every form of cache and every option against float64, appending, lengths that stay on the device,
and how the op behaves as a citizen of PyTorch. Backend "triton" runs in Triton's interpreter on the CPU; the tests marked
``gpu`` run it on the card."""

import importlib
import itertools

import pytest
import torch

import trinix
from helpers import Watch, captured, pooled, same
from trinix import dispatch
from trinix.dispatch import Unsupported
from trinix.kernels.triton import attention_decode as kernels
from trinix.kernels.triton._launch import Launch
from trinix.ops import attention, attention_decode
from trinix.testing import judge, normal

op = importlib.import_module(
    "trinix.ops.attention_decode"
)  # the module: ``trinix.ops.attention_decode`` is the function

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case:
    """Inputs of one call, from its shapes; ``run`` makes its own copies, since a cache may be written."""

    def __init__(
        self, device="cpu", dtype=torch.float32, *, batch=2, seq=1, heads=4, key_heads=2, d=16, dv=None, capacity=100,
        lengths=(70, 3), new=0, page=0, latent=False, layout="plain", **options,
    ):  # fmt: skip
        self.options, self.latent, dv = options, latent, dv or d
        seeds = iter(range(1, 20))

        def numbers(*shape):
            return normal(shape, dtype, seed=next(seeds), device=device)

        shape = (batch, capacity, key_heads)
        self.table = None
        if page:
            most = -(-capacity // page)
            pages = batch * most + 1
            shape = (pages, page, key_heads)
            order = torch.randperm(pages, generator=torch.Generator().manual_seed(7))
            self.table = order[: batch * most].view(batch, most).to(torch.int32).to(device)
        if layout == "heads first":
            self.k, self.v = (numbers(shape[0], key_heads, shape[1], n).transpose(1, 2) for n in (d, dv))
        elif layout == "one tensor":
            joined = numbers(*shape, d + dv)
            self.k, self.v = joined[..., :d], joined[..., d:]
        else:
            self.k, self.v = numbers(*shape, d), numbers(*shape, dv)
        if latent:
            self.v = self.k[..., :dv]
        self.q = (
            numbers(batch, heads, seq, d).transpose(1, 2) if layout == "heads first" else numbers(batch, seq, heads, d)
        )
        self.k_new = numbers(batch, new, key_heads, d) if new else None
        self.v_new = None if not new else self.k_new[..., :dv] if latent else numbers(batch, new, key_heads, dv)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)

    def run(self, backend, dtype=None, q=None):
        """(out, lse, the keys and the values of the cache afterwards)."""

        def cast(t):
            return t if t is None or dtype is None or not t.is_floating_point() else t.to(dtype)

        k = cast(self.k).clone()
        v = k[..., : self.v.shape[-1]] if self.latent else cast(self.v).clone()
        options = {n: cast(o) if isinstance(o, torch.Tensor) else o for n, o in self.options.items()}
        out, lse = attention_decode(
            cast(self.q if q is None else q), k, v, self.lengths, k_new=cast(self.k_new), v_new=cast(self.v_new),
            page_table=self.table, return_lse=True, backend=backend, **options,
        )  # fmt: skip
        return out, lse, k, v

    def results(self):
        """(name, the kernels', PyTorch's, the float64 one) of all four."""
        got, low, true = self.run("triton"), self.run("torch"), self.run("torch", torch.float64)
        assert all(out.is_contiguous() for out in (got[0], low[0]))
        assert got[1].dtype == torch.float32
        return list(zip(("out", "lse", "keys", "values"), got, low, true, strict=True))

    def check(self):
        """THE test: all four within the budget that float64 and PyTorch in the same dtype give."""
        assert not faults(self.results())


def faults(results):
    return [str(v) for v in (judge(*one) for one in results) if not v.ok]


# ---- right numbers -----------------------------------------------------------------------------------------------------

CASES = {
    "plain": {},
    "three shares": {"num_splits": 3},
    "more shares than keys": {"num_splits": 9, "lengths": (70, 1)},
    "every head its own": {"heads": 3, "key_heads": 3},
    "one head for all": {"heads": 5, "key_heads": 1},
    "more heads than a tile": {"heads": 20, "key_heads": 1, "seq": 2},
    "several queries": {"seq": 5},
    "several queries, all keys": {"seq": 5, "causal": False},
    "more queries than keys": {"seq": 6, "lengths": (4, 70)},
    "empty and full": {"lengths": (0, 100), "num_splits": 2},
    "all empty": {"lengths": (0, 0)},
    "one past the tile": {"lengths": (65, 64)},
    "cache without room": {"capacity": 0, "lengths": (0, 0)},
    "one sequence": {"batch": 1, "lengths": (81,)},
    "channels 24 and 40": {"d": 24, "dv": 40, "num_splits": 2},
    "channels 72": {"d": 72},
    "channels 192": {"d": 192, "new": 1},
    "channels 200": {"d": 200, "dv": 40, "num_splits": 2},
    "channels 5": {"d": 5},
    "heads first": {"layout": "heads first", "num_splits": 2},
    "keys beside values": {"layout": "one tensor", "new": 1},
    "latent": {"d": 40, "dv": 32, "latent": True, "key_heads": 1, "new": 2, "num_splits": 2},
    "append one": {"new": 1},
    "one low score, shares": {"scale": 200.0, "lengths": (1, 1), "num_splits": 2},
    "append, values wider than keys": {"d": 16, "dv": 40, "new": 3, "num_splits": 2},
    "append to an empty cache": {"new": 3, "seq": 3, "lengths": (0, 97), "num_splits": 2},
    "append more than a tile": {"new": 70, "seq": 2, "lengths": (3, 30)},
    "pages of 16": {"page": 16, "num_splits": 2},
    "pages of 10, append": {"page": 10, "new": 2, "seq": 2},
    "pages of 128": {"page": 128, "new": 1, "capacity": 256, "lengths": (200, 127)},
    "pages of 1": {"page": 1, "capacity": 30, "lengths": (29, 3)},
    "window": {"window": (10, None), "seq": 5, "num_splits": 2},
    "window from the end of a tile": {"window": (6, None)},
    "window to both sides": {"window": (10, 1), "causal": False, "seq": 5},
    "window without an end": {"window": (2**31 - 1, 2**31 - 1), "causal": False, "seq": 5},
    "window, append": {"window": (20, 0), "new": 4, "seq": 4, "num_splits": 2},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": 0.5},
    "ALiBi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]), "seq": 2},
    "ALiBi of every sequence": {"alibi_slopes": torch.linspace(0.1, 0.8, 8).view(2, 4)},
    "sink": {"sink": torch.tensor([1.0, -1.0, 3.0, 0.0]), "lengths": (70, 0)},
    "sink of minus infinity": {
        "sink": torch.tensor([1.0, float("-inf"), 3.0, 0.0]),
        "lengths": (70, 0),
        "num_splits": 1,
    },
    "sink, shares": {"sink": torch.tensor([1.0, -1.0, 3.0, 0.0]), "lengths": (70, 0), "num_splits": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_out_lse_and_cache_hold_the_float64_budget(case, dtype):
    Case(dtype=dtype, **CASES[case]).check()


@pytest.mark.parametrize("case", ["plain", "three shares", "append one", "latent", "softcap", "sink, shares"])
def test_float16_holds_it_too(case):
    Case(dtype=torch.float16, **CASES[case]).check()


@pytest.mark.parametrize(
    "case", ["plain", "three shares", "channels 72", "channels 192", "window, append", "sink, shares"]
)
def test_float32_as_float64_is_closer_than_pytorch(case, monkeypatch):
    """As on cards whose tensor cores take float64."""
    caches = [f for f in vars(kernels).values() if hasattr(f, "cache_clear")]
    asked = []
    monkeypatch.setattr(kernels, "_card", lambda index: (1, False, False, asked.append(index) or True))
    monkeypatch.setattr(op, "_prepared", {})
    for f in caches:
        f.cache_clear()
    try:
        (_, out, low, true), (_, lse, _, true_lse) = Case(**CASES[case]).results()[:2]
    finally:
        for f in caches:
            f.cache_clear()
    assert asked
    assert (out - true).abs().max() <= max((low - true).abs().max(), 1.5e-7)
    torch.testing.assert_close(lse.double(), true_lse, rtol=2e-7, atol=2e-7)


SHORT = {
    "plain": {"lengths": (600, 513)},
    "empty and one": {"lengths": (0, 1)},
    "several queries": {"seq": 3, "lengths": (600, 33)},
    "sink": {"sink": torch.tensor([1.0, -1.0, 3.0, 0.0]), "lengths": (577, 64)},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SHORT)
def test_many_short_sequences_hold_the_budget(case, dtype, monkeypatch):
    """As on a card that has fewer multiprocessors than there are programs."""
    caches = [f for f in vars(kernels).values() if hasattr(f, "cache_clear")]
    monkeypatch.setattr(kernels, "_card", lambda index: (1, False, True, False))
    monkeypatch.setattr(op, "_prepared", {})
    chosen, real = [], kernels.choose_config
    monkeypatch.setattr(kernels, "choose_config", lambda *a, **more: chosen.append(real(*a, **more)) or chosen[-1])
    for f in caches:
        f.cache_clear()
    try:
        Case(dtype=dtype, d=128, capacity=600, **SHORT[case]).check()
    finally:
        for f in caches:
            f.cache_clear()
    assert kernels.SHORT in chosen


@pytest.mark.gpu
def test_many_short_sequences_hold_the_budget_on_the_card():
    lengths = tuple(range(0, 1024, 16))
    assert len(lengths) * 8 > 1.5 * torch.cuda.get_device_properties(0).multi_processor_count
    Case(
        "cuda", torch.bfloat16, d=128, batch=len(lengths), heads=32, key_heads=8, capacity=1024, lengths=lengths
    ).check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_case_holds_the_budget_on_the_card(dtype):
    for name, case in CASES.items():
        case = {n: o.cuda() if isinstance(o, torch.Tensor) else o for n, o in case.items()}
        try:
            Case("cuda", dtype, **case).check()
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def multiply_on_tensor_cores(monkeypatch, dtype):
    """PyTorch's scores of ``dtype`` by PyTorch's product of that dtype, whose sums are the tensor cores': the formula's float32
    products would be an oracle for lse, and no measure of what a low precision costs."""
    einsum = torch.einsum

    def product(equation, a, b):
        if equation != "bihd,bjhd->bhij" or a.dtype != torch.float32:
            return einsum(equation, a, b)
        q, k = (t.to(dtype).transpose(1, 2).flatten(0, 1) for t in (a, b))  # exact: they come from it
        return torch.bmm(q, k.mT, out_dtype=torch.float32).unflatten(0, (a.shape[0], -1))

    monkeypatch.setattr(torch, "einsum", product)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_calls_hold_the_budget_on_the_card(dtype, monkeypatch):
    if dtype != torch.float32:
        multiply_on_tensor_cores(monkeypatch, dtype)
    generator, few = torch.Generator().manual_seed(0), []

    def one_of(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    for _ in range(40):
        batch, key_heads, group = one_of(1, 2, 5), one_of(1, 2, 3), one_of(1, 2, 4, 5, 8)
        d, latent = one_of(16, 64, 72, 80, 96, 128, 192, 256), one_of(False, False, False, True)
        d, dv = one_of((576, 512), (96, 64), (128, 128)) if latent else (d, one_of(d, d, 40))
        room, new = one_of(1, 50, 300, 1000), one_of(0, 0, 1, 3)
        heads = key_heads * group
        slopes = torch.rand(heads, generator=generator).cuda() if one_of(False, False, True) else None
        sink = torch.randn(heads, generator=generator).cuda() if one_of(False, False, True) else None
        case = {
            "batch": batch, "key_heads": key_heads, "heads": heads, "d": d, "dv": dv, "latent": latent,
            "seq": one_of(1, 1, 1, 2, 5, 17), "new": new, "capacity": room + new, "page": one_of(0, 0, 1, 16, 48, 64, 256),
            "lengths": torch.randint(0, room + 1, (batch,), generator=generator).tolist(), "alibi_slopes": slopes,
            "sink": sink, "causal": one_of(True, False), "window": one_of(None, None, (100, 0), (7, 3), (None, 2)),
            "softcap": one_of(0.0, 0.0, 5.0), "num_splits": one_of(None, 1, 2, 7),
        }  # fmt: skip
        results = Case("cuda", dtype, **case).results()
        few.append(results.pop(1))  # lse: with one key a single product of q and k, whose order of adding is chance
        assert not faults(results), case
    assert not [str(v) for v in pooled(few) if not v.ok]


def test_what_lies_behind_a_length_is_not_looked_at(device):
    case = Case(device, page=16, new=1, num_splits=2)
    clean = case.run("triton")
    used = torch.zeros(case.k.shape[:2], dtype=torch.bool, device=device)
    for b, n in enumerate(case.lengths.tolist()):
        for token in range(n):
            used[case.table[b, token // 16].long(), token % 16] = True
        case.table[b, -(-(n + 1) // 16) :] = -(2**30)
    case.k, case.v = (t.masked_fill(~used[:, :, None, None], float("nan")) for t in (case.k, case.v))
    for backend in ("triton", "torch"):
        if backend == "triton":
            same(case.run(backend)[:2], clean[:2])
        else:
            torch.testing.assert_close(case.run(backend)[:2], clean[:2])


def test_it_is_the_last_rows_of_one_long_pass(device):
    heads, d, n = 4, 16, 40
    q, k, v = (normal((2, n, h, d), torch.float32, seed=i, device=device) for i, h in enumerate((heads, 2, 2)))
    whole = attention(q, k, v, causal=True, window=(17, None), backend="torch")
    k_cache, v_cache = torch.zeros_like(k), torch.zeros_like(v)
    outs, at = [], 0
    for step in (5, 1, 1, 20, 3, 10):
        piece = slice(at, at + step)
        lengths = torch.full((2,), at, dtype=torch.int32, device=device)
        new = {"k_new": k[:, piece], "v_new": v[:, piece]}
        outs.append(
            attention_decode(q[:, piece], k_cache, v_cache, lengths, **new, window=(17, None), backend="triton")
        )
        at += step
    same(k_cache, k)
    same(v_cache, v)
    torch.testing.assert_close(torch.cat(outs, 1), whole)


@pytest.mark.parametrize("options", [{}, {"new": 1}, {"new": 1, "page": 16}, {"new": 1, "num_splits": 3}], ids=str)
def test_a_length_that_cannot_be_is_nan_and_nothing_outside_is_touched(options, device):
    room = 96
    case = Case(device, capacity=room, batch=5, lengths=(-1, room, room + 1, 20, 2**31 - 1), **options)
    out, lse, k, _ = case.run("triton")
    new = options.get("new", 0)
    bad = [True, room + new > room, True, False, True]
    assert out.isnan().all((1, 2, 3)).tolist() == out.isnan().any((1, 2, 3)).tolist() == bad
    assert lse.isnan().all((1, 2)).tolist() == bad
    if new and case.table is None:
        changed = (k != case.k).any(-1).any(-1)
        assert changed[1:].nonzero().tolist() == [[2, 20]]
    elif not new:
        same(k, case.k)


@pytest.mark.parametrize("page", [0, 16])
def test_the_formula_takes_no_length_that_cannot_be(page):
    for lengths, new in (((-1, 3), 1), ((3, 96), 1), ((-1, 3), 0), ((97, 3), 0)):
        text = (
            f"within the cache's 96, got {max(lengths)} and {new}; make a" if max(lengths) > 90 else "from 0 on, got -1"
        )
        with pytest.raises(ValueError, match=text):
            Case(capacity=96, lengths=lengths, new=new, page=page).run("torch")


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize(("lengths", "new"), [((-1, 3), 1), ((96, 3), 1), ((-40, 3), 0), ((97, 3), 0)])
def test_where_nobody_looks_at_lengths_the_formula_gives_nan_and_touches_nothing_else(lengths, new, page, monkeypatch):
    """As under torch.compile, and on a GPU."""
    monkeypatch.setattr(dispatch, "readable", lambda t: False)
    case, right = (Case(capacity=96, lengths=some, new=new, page=page) for some in (lengths, (5, 3)))
    (out, lse, k, _), (good_out, good_lse, good_k, _) = case.run("torch"), right.run("torch")
    assert out[0].isnan().all()
    assert lse[0].isnan().all()
    torch.testing.assert_close((out[1], lse[1]), (good_out[1], good_lse[1]))
    # of both sequences only the second one's token was written
    assert (k != case.k).sum() * 2 == (good_k != right.k).sum() == 2 * new * 2 * 16


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("lengths", [(3, -1), (3, 8), (-1, 3), (7, 0), (2**31 - 1, 0), (0, 2**31 - 1), (-1, 9)])
def test_new_tokens_of_a_length_that_cannot_be_go_nowhere(lengths, new, backend, device, monkeypatch):
    """Not into a page of the other sequence, and not beside the cache: no entry of the table is looked at."""
    monkeypatch.setattr(dispatch, "readable", lambda t: False)
    room = 8  # two pages a sequence
    fit = [0 <= length <= room - new for length in lengths]
    good = torch.tensor([[2, 1], [0, 3]], dtype=torch.int32, device=device)
    for elsewhere in ([2, 1], [0, 3], [0, 0], [-1, -1], [9, 9]):
        table = torch.tensor([elsewhere] * 2, dtype=torch.int32, device=device)
        table[torch.tensor(fit)] = good[torch.tensor(fit)]
        buffers = k, v = [normal((8, 4, 2, 16), torch.float32, seed=i, device=device) for i in (1, 2)]
        k_new, v_new = (normal((2, new, 2, 16), torch.float32, seed=i, device=device) for i in (3, 4))
        wanted = k.clone(), v.clone()
        for b, n in itertools.product(range(2), range(new)):
            if fit[b]:
                page, token = divmod(lengths[b] + n, 4)
                for buffer, tokens in zip(wanted, (k_new, v_new), strict=True):
                    buffer[2 + good[b, page], token] = tokens[b, n]
        out = attention_decode(
            normal((2, 1, 4, 16), torch.float32, seed=5, device=device), k[2:6], v[2:6],
            torch.tensor(lengths, dtype=torch.int32, device=device), k_new=k_new, v_new=v_new, page_table=table, backend=backend,
        )  # fmt: skip
        same(buffers, wanted)
        assert out.isnan().all((1, 2, 3)).tolist() == out.isnan().any((1, 2, 3)).tolist() == [not one for one in fit]


def test_views_of_a_cache_are_taken_as_they_are(device):
    base = normal((3, 4, 90, 48), torch.float32, seed=1, device=device)
    q = normal((3, 1, 4, 24), torch.float32, seed=2, device=device)
    lengths = torch.tensor([80, 5, 33, 7], dtype=torch.int32, device=device)[:3]
    k, v = base[..., 1:25].transpose(1, 2), base[..., 24:].transpose(1, 2)
    got = attention_decode(q, k, v, lengths, backend="triton")
    torch.testing.assert_close(got, attention_decode(q, k.contiguous(), v.contiguous(), lengths, backend="torch"))


def test_rows_of_a_larger_cache_are_pages(device):
    k, v = (normal((5, 50, 2, 16), torch.float32, seed=i, device=device) for i in (1, 2))
    q = normal((2, 1, 4, 16), torch.float32, seed=3, device=device)
    rows = torch.tensor([4, 1], dtype=torch.int32, device=device)
    lengths = torch.tensor([50, 20], dtype=torch.int32, device=device)
    got = attention_decode(q, k, v, lengths, page_table=rows[:, None], backend="triton")
    torch.testing.assert_close(got, attention_decode(q, k[rows.long()], v[rows.long()], lengths, backend="torch"))


# ---- choices -----------------------------------------------------------------------------------------------------------


def shares_of(batch, heads, keys, d=128, config=kernels.Config(16, 64, 4, 3)):  # noqa: B008
    return kernels.choose_shares(batch, heads, keys, config, 4 * d, 132)


def test_the_fewest_shares_that_fill_the_card():
    assert shares_of(1, 8, 131072) == 16
    assert shares_of(16, 8, 32768) == 1
    assert shares_of(8, 8, 8192) == 2
    assert shares_of(8, 32, 8192) == 1
    assert shares_of(64, 8, 8192) == 3, "512 programs would be a wave and a third"
    assert shares_of(16, 8, 16384, 64) == 2, "small tiles: two programs on each multiprocessor"
    assert shares_of(5, 8, 16384) == 3
    assert shares_of(16, 1, 16384, 288, kernels.Config(16, 32, 4, 3)) == 8
    assert shares_of(2, 8, 0) == 1
    assert shares_of(2, 8, 100) == 2
    assert shares_of(4096, 32, 32768) == 1


def test_a_short_cache_has_few_shares():
    """They are added up one after the other, which takes longer than another tile (docs/perf/attention_decode.md)."""
    assert [shares_of(1, 8, keys) for keys in (64, 512, 1024, 2048, 4096, 8192)] == [1, 8, 8, 12, 16, 16]
    assert shares_of(1, 2, 1024) == 8
    assert shares_of(1, 2, 4096) == 17
    assert shares_of(2, 8, 1024) == 8
    assert shares_of(1, 1, 131072) > 90


def test_large_tiles_go_through_whole_caches():
    """Where there are programs enough without shares, as the card's reading has it (docs/perf/attention_decode.md)."""

    def chosen(batch, heads, keys, d, new=False):
        config = kernels.choose_config(4, d, d, False, 2, 0, new, load=batch * heads / 132, longest=keys)
        return tuple(config)[1:], kernels.choose_shares(batch, heads, keys, config, 4 * d, 132, 0, new)

    assert chosen(64, 8, 1024, 128) == chosen(32, 8, 1024, 128) == chosen(40, 8, 1024, 128) == ((32, 4, 4), 1)
    assert chosen(16, 8, 1024, 128) == ((64, 4, 3), 1)
    assert chosen(64, 8, 8192, 128) == ((128, 4, 3), 1)
    assert chosen(40, 8, 2048, 128) == ((128, 4, 3), 1)
    assert chosen(8, 32, 8192, 128) == ((128, 4, 3), 1)
    assert chosen(16, 8, 32768, 128) == ((64, 4, 3), 1)
    assert chosen(8, 8, 8192, 128) == ((64, 4, 3), 2)
    assert chosen(64, 8, 1024, 128, new=True) == ((64, 4, 3), 1)
    assert chosen(64, 8, 8192, 128, new=True) == ((64, 4, 3), 1)
    assert chosen(16, 8, 4096, 128, new=True) == ((64, 4, 3), 1)
    for new in (False, True):
        assert chosen(16, 8, 8192, 256, new) == ((64, 8, 3), 1)
        assert chosen(2, 8, 8192, 256, new) == ((64, 8, 3), 8)
        assert chosen(16, 8, 16384, 64, new) == ((128, 4, 3), 1)
        assert chosen(64, 8, 2048, 64, new) == ((128, 4, 3), 1)
        assert chosen(1, 8, 8192, 64, new)[0] == (64, 4, 3)


def test_of_pages_as_many_programs_as_fit():
    for page_size, shares in ((64, 2), (16, 2)):
        pages = kernels._pages((16, 1), page_size, 64)
        config = kernels.choose_config(4, 128, 128, False, 2, pages, False)
        assert kernels.choose_shares(16, 8, 16384, config, 512, 132, pages) == shares
    assert kernels.choose_shares(64, 8, 2048, config, 512, 132, 2) == 1


@pytest.mark.parametrize("lanes", [32, 64])
def test_a_tile_of_every_head_dimension_fits_into_shared_memory(lanes):
    for itemsize in (2, 4):
        for d in (8, 16, 64, 96, 128, 192, 256):
            for rows in (1, 20, 1000):
                for pages, load in itertools.product((0, 1, 2), (0.0, 1.0, 2.0)):
                    c = kernels.choose_config(rows, d, d, False, itemsize, pages, False, lanes, load)
                    loads = c.keys * sum(kernels.channels(d)) * 2 * itemsize * max(1, c.num_stages - 1)
                    assert loads <= (64 if lanes == 64 else 160) * 1024
                    assert c.rows * c.keys >= 256


# ---- a citizen of PyTorch ----------------------------------------------------------------------------------------------


def arguments(device="cpu", **changed):
    case = Case(device)
    return {"q": case.q, "k_cache": case.k, "v_cache": case.v, "cache_seqlens": case.lengths} | changed


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (TypeError, "q must be a floating-point tensor", {"q": [1.0]}),
        (TypeError, "attention_decode: causal must be True or False, got 'no'; convert it", {"causal": "no"}),
        (TypeError, "attention_decode: return_lse must be True or False, got 1", {"return_lse": 1}),
        (ValueError, r"q must be \[B, Sq, H, D\]", {"q": torch.zeros(2, 4, 16)}),
        (TypeError, "k_cache must be a tensor of q's dtype", {"k_cache": torch.zeros(2, 100, 2, 16).half()}),
        (ValueError, "k_cache must have q's 16 channels", {"k_cache": torch.zeros(2, 100, 2, 8)}),
        (ValueError, "v_cache must be", {"v_cache": torch.zeros(2, 99, 2, 16)}),
        (ValueError, "heads must be a multiple", {"q": torch.zeros(2, 1, 3, 16)}),
        (ValueError, "k_cache must have q's batch", {"q": torch.zeros(3, 1, 4, 16), "cache_seqlens": torch.zeros(3).int()}),
        (TypeError, "cache_seqlens must be an int32 tensor", {"cache_seqlens": torch.tensor([1, 2])}),
        (ValueError, "cache_seqlens must have shape", {"cache_seqlens": torch.zeros(3).int()}),
        (TypeError, "page_table must be an int32 tensor", {"page_table": torch.zeros(2, 1)}),
        (ValueError, "page_table must have shape", {"page_table": torch.zeros(3, 1).int()}),
        (ValueError, "k_new and v_new go together", {"k_new": torch.zeros(2, 1, 2, 16)}),
        (ValueError, "k_new and v_new must be", {"k_new": torch.zeros(2, 1, 2, 16), "v_new": torch.zeros(2, 2, 2, 16)}),
        (ValueError, "window must be", {"window": (-1, 0)}),
        (ValueError, "window must be", {"window": 5}),
        (ValueError, "softcap must be", {"softcap": -1.0}),
        (ValueError, "softcap must be", {"softcap": None}),
        (ValueError, "softcap must be .* finite, got inf", {"softcap": float("inf")}),
        (ValueError, "num_splits must be", {"num_splits": 0}),
        (ValueError, r"sink must be \[4\]", {"sink": torch.zeros(3)}),
        (TypeError, "alibi_slopes must be a floating-point", {"alibi_slopes": torch.zeros(4).int()}),
        (ValueError, "must be on q's device", {"cache_seqlens": torch.zeros(2, device="meta").int()}),
        (ValueError, "backend must be one of", {"backend": "cudnn"}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_words(error, words, changed):
    with pytest.raises(error, match=words) as caught:
        attention_decode(**arguments(**changed))
    assert str(caught.value).startswith("attention_decode: ")


def test_a_gradient_is_refused_unless_it_is_off():
    call = arguments(q=torch.zeros(2, 1, 4, 16, requires_grad=True))
    with pytest.raises(RuntimeError, match="forward only"):
        attention_decode(**call)
    with torch.no_grad():
        attention_decode(**call)


def test_what_triton_cannot_read_is_unsupported():
    call = arguments()
    call["k_cache"] = torch.zeros(2, 100, 16, 2).transpose(2, 3)
    with pytest.raises(Unsupported, match="channels of k_cache side by side"):
        attention_decode(**call, backend="triton")
    attention_decode(**call)
    with pytest.raises(Unsupported, match="float64"):
        attention_decode(
            **{n: t.double() if t.is_floating_point() else t for n, t in arguments().items()}, backend="triton"
        )


KINDS = {
    "plain": {}, "no mask": {"causal": False}, "window": {"window": (5, 0)}, "wider window": {"window": (6, 0)},
    "softcap": {"softcap": 2.0}, "scale": {"scale": 0.5}, "one share": {"num_splits": 1}, "two shares": {"num_splits": 2},
    "sink": {"sink": torch.tensor([0.5, -1.0, 2.0, 0.0])}, "slopes": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "slopes of each sequence": {"alibi_slopes": torch.tensor([[0.5, 0.25, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4]])},
    "queries, heads first": {"q": normal((2, 4, 3, 16), torch.float32, seed=30).transpose(1, 2)}, "queries": {"q": normal((2, 3, 4, 16), torch.float32, seed=30)},
    "other heads": {"q": normal((2, 1, 2, 16), torch.float32, seed=31)},
    "keys, heads first": {"k_cache": normal((2, 2, 100, 16), torch.float32, seed=32).transpose(1, 2)},
    "values, heads first": {"v_cache": normal((2, 2, 100, 16), torch.float32, seed=33).transpose(1, 2)},
    "a row of lengths": {"cache_seqlens": torch.tensor([[70, 0], [3, 0]], dtype=torch.int32)[:, 0]},
    "one token": {"k_new": normal((2, 1, 2, 16), torch.float32, seed=34), "v_new": normal((2, 1, 2, 16), torch.float32, seed=35)},
    "two tokens": {"k_new": normal((2, 2, 2, 16), torch.float32, seed=34), "v_new": normal((2, 2, 2, 16), torch.float32, seed=35)},
    "rows": {"page_table": torch.tensor([[1], [0]], dtype=torch.int32)},
}  # fmt: skip


def test_a_call_like_one_before_is_not_looked_at_again_and_every_other_one_is(monkeypatch):
    monkeypatch.setattr(op, "_prepared", {})
    calls = {name: arguments(**changed) for name, changed in KINDS.items()}
    keys = calls["plain"]["k_cache"]
    calls["the keys are the values"] = arguments(k_cache=keys, v_cache=keys)
    for call in calls.values():
        call["k_cache"], call["v_cache"] = (
            [call["k_cache"].clone()] * 2
            if call["k_cache"] is call["v_cache"]
            else (call["k_cache"].clone(), call["v_cache"].clone())
        )

    def run(name, backend):
        call = calls[name]
        if "k_new" in call:  # what another backend has written must not be there already
            call = call | {"k_cache": call["k_cache"].clone(), "v_cache": call["v_cache"].clone()}
        return *attention_decode(**call, backend=backend, return_lse=True), call["k_cache"], call["v_cache"]

    wanted = {name: run(name, "torch") for name in calls}
    for name in calls:
        run(name, "triton")
    copied = {"a row of lengths"}  # it is read as a copy, made anew for every call
    assert len(op._prepared) == len(calls) - len(copied)
    monkeypatch.setattr(op, "_check", lambda *_: pytest.fail("looked at again"))
    for name in calls.keys() - copied:
        for got, true in zip(run(name, "triton"), wanted[name], strict=True):
            torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5, msg=name)


def test_a_backend_for_all_calls_holds_for_one_like_one_before(monkeypatch):
    call = arguments()
    with trinix.use_backend("triton"):
        wanted = attention_decode(**call)
    monkeypatch.setattr(op._triton(), "run", lambda *_: pytest.fail("the kernel ran"))
    with trinix.use_backend("torch"):
        torch.testing.assert_close(attention_decode(**call), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_binaries_are_asked_for_as_the_launcher_keeps_them(dtype, monkeypatch):
    """``run`` knows keys and addresses beforehand: they are what the launcher makes of the tensors, call by call."""
    asked = []
    monkeypatch.setattr(Launch, "again", lambda self, *more: asked.append((self.kernel, *more)))
    monkeypatch.setattr(Launch, "_normal", lambda *_: None)
    launches = 0
    for name, case in CASES.items():
        for other in (torch.float32, torch.bfloat16):
            case = {n: o.to(other) if isinstance(o, torch.Tensor) else o for n, o in case.items()}
            try:
                Case("cpu", dtype, **case).run("triton")
            except Unsupported:
                continue
        assert asked[::2] == asked[1::2], name
        launches += len(asked) // 2
        asked.clear()
    assert launches > 2 * len(CASES)


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (RuntimeError, "forward only", {"q": torch.zeros(2, 1, 4, 16, requires_grad=True)}),
        (TypeError, "k_cache must be a tensor", {"k_cache": None}),
        (TypeError, "cache_seqlens must be an int32 tensor", {"cache_seqlens": torch.tensor([70, 3])}),
        (ValueError, "num_splits must be", {"num_splits": 2.0}),
        (ValueError, "window must be", {"window": (5.0, 0)}),
        (ValueError, "backend must be one of", {"backend": "hopper"}),
    ],
)
def test_what_does_not_fit_is_refused_behind_a_call_like_it_too(error, words, changed):
    good = {"q": torch.zeros(2, 1, 4, 16), "num_splits": 2, "window": (5, 0), "backend": "triton"}
    attention_decode(**arguments(**good))
    with pytest.raises(error, match=words):
        attention_decode(**arguments(**good | changed))


def test_explain_says_what_would_run():
    assert trinix.explain("attention_decode", **arguments()).backend == "torch"
    told = trinix.explain("attention_decode", **arguments(), backend="triton")
    assert (told.backend, "shares of a sequence" in told.config) == ("triton", True)


def test_no_sequence_no_query():
    for batch, seq in ((0, 1), (2, 0)):
        shape = (batch, seq, 4, 16)
        call = arguments(
            q=torch.zeros(shape), k_cache=torch.zeros(batch, 9, 2, 16), v_cache=torch.zeros(batch, 9, 2, 8),
            cache_seqlens=torch.zeros(batch, dtype=torch.int32),
        )  # fmt: skip
        for backend in ("torch", "triton"):
            out, lse = attention_decode(**call, return_lse=True, backend=backend)
            assert out.shape == (batch, seq, 4, 8)
            assert lse.shape == (batch, 4, seq)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("seq", "heads"), [(0, 2), (1, 0)])
def test_without_a_query_tokens_are_appended_all_the_same(seq, heads, backend):
    k, v, new = torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4), torch.ones(1, 1, 1, 4)
    lengths = torch.tensor([2], dtype=torch.int32)
    attention_decode(torch.zeros(1, seq, heads, 4), k, v, lengths, k_new=new, v_new=new, backend=backend)
    assert k[0, :, 0, 0].tolist() == v[0, :, 0, 0].tolist() == [0, 0, 1]


def test_a_dispatch_mode_sees_one_operator():
    case = Case(new=1)
    with Watch() as watch:
        case_run = case.run("triton")
    assert [name for name in watch.seen if name.startswith("trinix")] == ["trinix.attention_decode_append.default"]
    same(case_run[:2], case.run("triton")[:2])


@pytest.mark.parametrize("new", [0, 1])
def test_compiled_whole_with_the_cache_written(new, fresh_dynamo):
    case = Case(new=new, page=16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k, v, lengths, k_new, v_new, table):
        return 2 * attention_decode(q, k, v, lengths, k_new=k_new, v_new=v_new, page_table=table, backend="triton")

    wanted, _, k_wanted, v_wanted = case.run("triton")
    k, v = case.k.clone(), case.v.clone()
    same(step(case.q, k, v, case.lengths, case.k_new, case.v_new, case.table), 2 * wanted)
    same((k, v), (k_wanted, v_wanted))


@pytest.mark.parametrize("new", [0, 1])
def test_latent_attention_is_compiled_whole(new, fresh_dynamo):
    case = Case(new=new, d=320, dv=256, heads=2, key_heads=1, capacity=40, lengths=(20, 3), latent=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k, lengths, k_new):
        v_new = None if k_new is None else k_new[..., :256]
        return attention_decode(q, k, k[..., :256], lengths, k_new=k_new, v_new=v_new, backend="triton")

    wanted, _, k_wanted, _ = case.run("triton")
    k = case.k.clone()
    torch.testing.assert_close(step(case.q, k, case.lengths, case.k_new), wanted)
    same(k, k_wanted)


@pytest.mark.gpu
def test_a_graph_is_replayed_with_other_lengths():
    case = Case("cuda", torch.bfloat16, capacity=9000, lengths=(5, 7), new=1, d=128)
    k, v = case.k.clone(), case.v.clone()

    def run():
        return attention_decode(case.q, k, v, case.lengths, k_new=case.k_new, v_new=case.v_new)

    graph, got = captured(run)
    for lengths in ((8999, 1), (0, 4000)):
        case.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        same(got, run())


@pytest.mark.gpu
def test_the_same_bits_a_thousand_times():
    case = Case("cuda", torch.bfloat16, batch=3, heads=32, key_heads=8, d=128, capacity=9000, lengths=(9000, 40, 2500))
    first = attention_decode(case.q, case.k, case.v, case.lengths, return_lse=True)
    for _ in range(1000):
        again = attention_decode(case.q, case.k, case.v, case.lengths, return_lse=True)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.gpu
def test_a_cache_beyond_two_to_the_31_elements():
    k = torch.zeros(3, 1 << 16, 44, 256, dtype=torch.float16, device="cuda")
    assert k.stride(0) * 3 > 2**31
    k[2, -1] = 1.0
    q = torch.full((3, 1, 44, 256), 10.0, dtype=torch.float16, device="cuda")
    lengths = torch.full((3,), 1 << 16, dtype=torch.int32, device="cuda")
    out = attention_decode(q, k, k, lengths)
    assert (out[2] > 0.99).all()
    assert (out[:2] == 0).all()


@pytest.mark.parametrize(
    ("d", "dv", "shared", "wanted"),
    [(256, 256, False, (32, 64, 8, 2)), (320, 256, True, (32, 64, 8, 2)), (640, 512, True, (16, 32, 4, 2)),
     (576, 512, True, (16, 32, 4, 3)), (192, 192, False, (64, 64, 8, 2))],
)  # fmt: skip
def test_many_rows_of_wide_heads_fit_99_kib_of_shared_memory(d, dv, shared, wanted):
    """By the compiler: with the tiles of other cards the first three take 101 to 104 KiB."""
    config = kernels.choose_config(64, d, dv, shared, 2, 0, True, 32, roomy=False)
    assert config == kernels.Config(*wanted)
