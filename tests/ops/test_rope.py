"""Rotary position embedding, alone and after a norm: every pair form, width, layout and source of positions against float64,
the tables against formulas written here, and how the ops behave as citizens of PyTorch. Backend "triton" runs in Triton's
interpreter on the CPU; the tests marked ``gpu`` run it on the card."""

import copy
import functools
import importlib
import itertools
import math
import pickle

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

import trinix
from helpers import Tagged, Watch, dense, right_or_refused, same
from trinix.kernels.triton import _launch
from trinix.kernels.triton import rope as kernels
from trinix.ops import qk_norm_rope, rope, rope_table
from trinix.testing import assert_within_budget, normal

op = importlib.import_module("trinix.ops.rope")  # the module: ``trinix.ops.rope`` is the function

HALF = (torch.bfloat16, torch.float16)
ROWS = 24  # of the tables

# (B, S, H, Hk, D, R)
SIZES = {
    "usual": (2, 2, 4, 3, 16, 16),
    "one head of one token": (1, 1, 1, 1, 2, 2),
    "heads past the tile": (1, 2, 9, 12, 16, 16),
    "odd width of pairs": (1, 2, 3, 9, 20, 20),
    "partial": (2, 1, 4, 3, 16, 4),
    "partial, odd": (1, 2, 5, 3, 13, 6),
    "0 tokens": (2, 0, 4, 2, 16, 16),
    "0 heads of q": (1, 2, 0, 5, 8, 8),
}

# name -> x, from ``new(*shape)`` and its sizes B, S, H, D
LAYOUTS = {
    "contiguous": lambda new, b, s, h, d: new(b, s, h, d),
    "packed qkv": lambda new, b, s, h, d: new(b, s, 3, h, d)[:, :, 1],
    "heads before tokens": lambda new, b, s, h, d: new(b, h, s, d).transpose(1, 2),
    "offset by one element": lambda new, b, s, h, d: new(b * s * h * d + 1)[1:].view(b, s, h, d),
    "sliced channels": lambda new, b, s, h, d: new(b, s, h, 2 * d)[..., ::2],
    "padded heads": lambda new, b, s, h, d: new(b, s, h, d + 3)[..., 1 : d + 1],
    "channels outermost": lambda new, b, s, h, d: new(d, b, s, h).permute(1, 2, 3, 0),
    "one head for all": lambda new, b, s, h, d: new(b, s, 1, d).expand(b, s, h, d),
    "everything expanded": lambda new, b, s, h, d: new(1).expand(b, s, h, d),
}


class Numbers:
    """``new(*shape)``: normal numbers, others on every call, the same in every run."""

    def __init__(self, dtype, device, scale=1.0):
        self.dtype, self.device, self.scale, self.seed = dtype, device, scale, 0

    def __call__(self, *shape):
        self.seed += 1
        return normal(shape, self.dtype, seed=self.seed, device=self.device, scale=self.scale)


def table(rotary_dim, device, rows=ROWS):
    return rope_table(rows, rotary_dim, device=device)


def make(size, dtype, device, layout="contiguous", gradient="contiguous", scale=1.0, wider=1):
    """(q, k, gradients of both, cos, sin), heads ``wider`` times as wide as the size says."""
    b, s, h, hk, d, r = SIZES[size]
    d, r = wider * d, wider * r
    new = Numbers(dtype, device, scale)
    q, k = (LAYOUTS[layout](new, b, s, heads, d) for heads in (h, hk))
    gradients = tuple(LAYOUTS[gradient](new, b, s, heads, d) for heads in (h, hk))
    return q, k, gradients, *table(r, device)


def pull(function, inputs, gradients):
    """(results, gradients of the inputs)."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    results = function(*leaves)
    return (*[y.detach() for y in results], *torch.autograd.grad(results, leaves, gradients))


def judged(function, inputs, gradients, backend="triton"):
    """THE test: results and gradients of ``backend`` within the budget that float64 and PyTorch in the same dtype give;
    ``function(backend, *inputs)``."""

    def run(name, dtype=None):
        values = [t if dtype == "as is" else dense(t, dtype) for t in (*inputs, *gradients)]
        return pull(lambda *leaves: function(name, *leaves), values[: len(inputs)], values[len(inputs) :])

    got, low, true = run(backend, "as is"), run("torch"), run("torch", torch.float64)
    if (
        inputs[0].dtype == torch.float64
    ):  # no oracle above it: the same formula on other strides, within its last digits
        torch.testing.assert_close(got, true, rtol=1e-13, atol=1e-13)
    else:
        assert_within_budget(got, low, true)
    if backend == "triton":
        layouts = [torch.empty_like(t, device="meta").stride() for t in inputs[:2]]
        assert [t.stride() for t in (*got[:2], *got[2:4])] == layouts * 2
    return got


def oracle(q, k, gradients, cos, sin, backend="triton", **options):
    return judged(lambda name, q, k: rope(q, k, cos, sin, backend=name, **options), (q, k), gradients, backend)


def norm_oracle(q, k, gradients, cos, sin, backend="triton", weight_dtype=None, **options):
    new = Numbers(weight_dtype or q.dtype, q.device.type)
    weights = new(q.shape[-1]), new(q.shape[-1])
    function = lambda name, *inputs: qk_norm_rope(*inputs, cos, sin, backend=name, **options)  # noqa: E731
    return judged(function, (q, k, *weights), gradients, backend)


# ---- right numbers -----------------------------------------------------------------------------------------------------


def by_complex_numbers(x, positions, rotary_dim, base, interleaved):
    """x [S, H, D] rotated channel by channel, in Python."""
    y = x.clone()
    half = rotary_dim // 2
    for s, position in enumerate(positions):
        for h in range(x.shape[1]):
            for i in range(half):
                one, two = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
                angle = position * base ** (-2 * i / rotary_dim)
                z = complex(x[s, h, one], x[s, h, two]) * complex(math.cos(angle), math.sin(angle))
                y[s, h, one], y[s, h, two] = z.real, z.imag
    return y


@pytest.mark.parametrize("rotary_dim", [8, 6])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_oracle_itself_is_the_rotation_on_the_page_and_its_derivative(interleaved, rotary_dim):
    q, k = (normal((1, 3, heads, 8), torch.float64, seed=heads) for heads in (2, 1))
    cos, sin = (t.double() for t in rope_table(ROWS, rotary_dim, base=100.0))
    run = lambda q, k: rope(q, k, cos, sin, interleaved=interleaved, offset=5, backend="torch")  # noqa: E731
    for x, y in zip((q, k), run(q, k), strict=True):
        wanted = by_complex_numbers(x[0], (5, 6, 7), rotary_dim, 100.0, interleaved)
        torch.testing.assert_close(y[0], wanted, rtol=1e-6, atol=1e-6)  # the table is float32
    assert torch.autograd.gradcheck(run, (q.requires_grad_(), k.requires_grad_()))


def test_the_oracle_of_the_norm_is_pytorchs_rms_norm_then_the_rotation():
    q, k = (normal((1, 3, heads, 8), torch.float64, seed=heads) for heads in (2, 1))
    weights = [normal((8,), torch.float64, seed=seed) for seed in (3, 4)]
    cos, sin = (t.double() for t in table(8, "cpu"))
    options = {"offset": 2, "interleaved": True, "backend": "torch"}
    got = qk_norm_rope(q, k, *weights, cos, sin, eps=1e-3, weight_offset=1.0, **options)
    normed = [torch.nn.functional.rms_norm(x, (8,), w + 1.0, 1e-3) for x, w in zip((q, k), weights, strict=True)]
    torch.testing.assert_close(got, rope(*normed, cos, sin, **options))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_results_and_gradients_hold_the_float64_budget(interleaved, size):
    oracle(*make(size, torch.float32, "cpu"), interleaved=interleaved, offset=7)
    # wider, for a largest error of float32 sums that chance does not make
    norm_oracle(*make(size, torch.float32, "cpu", wider=5), interleaved=interleaved, offset=7, weight_offset=1.0)


@pytest.mark.parametrize("size", ["usual", "partial, odd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype_holds_the_budget(dtype, size):
    backend = "torch" if dtype == torch.float64 else "triton"
    for interleaved in (False, True):
        made = make(size, dtype, "cpu")
        oracle(*made, backend=backend, interleaved=interleaved)
        norm_oracle(*made, backend=backend, interleaved=interleaved)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "interleaved"), [("usual", True), ("partial", False)])
def test_q_and_k_may_have_any_strides(size, interleaved, layout):
    made = make(size, torch.bfloat16, "cpu", layout)
    oracle(*made, interleaved=interleaved)
    if not interleaved:
        norm_oracle(*made)


@pytest.mark.parametrize("gradient", [name for name in LAYOUTS if name != "contiguous"])
def test_the_incoming_gradient_may_have_any_strides(gradient):
    made = make("partial", torch.bfloat16, "cpu", "packed qkv", gradient)
    oracle(*made)
    norm_oracle(*made)


def test_q_and_k_may_lie_differently(device):
    q, _, (gq, _), cos, sin = make("usual", torch.bfloat16, device, "heads before tokens")
    _, k, (_, gk), _, _ = make("usual", torch.bfloat16, device, "sliced channels")
    oracle(q, k, (gq, gk), cos, sin)
    norm_oracle(q, k, (gq, gk), cos, sin)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_large_and_small_values_keep_the_budget(scale):
    made = make("usual", torch.float32, "cpu", scale=scale, wider=5)
    oracle(*made)
    norm_oracle(*made, weight_dtype=torch.bfloat16)


def test_a_wide_head_and_a_narrow_one_of_many(device):
    for b, s, h, hk, d, r in ((1, 2, 2, 1, 256, 256), (1, 1, 2, 2, 192, 64), (1, 1, 40, 8, 4, 4)):
        new = Numbers(torch.bfloat16, device)
        q, k, gq, gk = (new(b, s, heads, d) for heads in (h, hk, h, hk))
        oracle(q, k, (gq, gk), *table(r, device, 64))
        norm_oracle(q, k, (gq, gk), *table(r, device, 64))


def test_weights_may_have_any_strides(device):
    q, k, gradients, cos, sin = make("usual", torch.float32, device)
    weights = Numbers(torch.float32, device)(16, 2).unbind(-1)
    judged(lambda name, *inputs: qk_norm_rope(*inputs, cos, sin, backend=name), (q, k, *weights), gradients)


@pytest.mark.parametrize("heads", [(20, 3), (16, 8), (3, 17)], ids=str)
@pytest.mark.parametrize("tokens", [(2, 1), (1, 2), (2, 2)], ids=str)
def test_several_tiles_of_heads_where_q_and_k_differ(heads, tokens, device):
    new = Numbers(torch.bfloat16, device)
    q, k, gq, gk = (new(*tokens, n, 256) for n in heads * 2)
    assert kernels.choose_rotation(max(heads), 256, 2, 32).parts > 1
    oracle(q, k, (gq, gk), *table(64, device), offset=3)


def test_more_tokens_than_programs(device):
    new = Numbers(torch.bfloat16, device)
    for heads in ((9, 3), (1, 64)):  # the second: by its elements, q's share of the programs is none
        q, k, gq, gk = (new(2, 4, n, 4) for n in heads * 2)
        oracle(q, k, (gq, gk), *table(4, device))
        norm_oracle(q, k, (gq, gk), *table(4, device))


@pytest.mark.parametrize("interleaved", [False, True])
def test_an_eps_of_0_leaves_heads_that_are_none_out_of_the_weights_gradients(interleaved, device):
    # tiles of 4 and 8 heads for 3 and 5: 1 / rms of those beyond is 1 / 0
    new = Numbers(torch.float32, device)
    for heads in ((3, 3), (5, 2)):
        q, k, gq, gk = (new(1, 3, n, 12) for n in heads * 2)
        norm_oracle(q, k, (gq, gk), *table(8, device), eps=0.0, interleaved=interleaved)


def test_nan_and_infinity_stay_in_their_pair(device):
    q = torch.ones(1, 1, 2, 8, device=device)
    q[0, 0, 0, 1], q[0, 0, 1, 2] = math.nan, math.inf
    cos, sin = table(8, device)
    for interleaved in (False, True):
        ours, theirs = (
            rope(q, None, cos, sin, offset=1, interleaved=interleaved, backend=b) for b in ("triton", "torch")
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert int(ours.isfinite().sum()) == 12


@pytest.mark.parametrize("size", ["usual", "partial", "0 tokens"])
def test_q_alone(size, device):
    q, _, (gq, _), cos, sin = make(size, torch.float32, device, "packed qkv")
    results = []
    for backend in ("triton", "torch"):
        leaf = q.detach().requires_grad_()
        y = rope(leaf, cos=cos, sin=sin, offset=2, backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, gq)))
        same(rope(q, cos=cos, sin=sin, offset=2, backend=backend), results[-1][0])
    torch.testing.assert_close(*results)


# ---- positions and tables ----------------------------------------------------------------------------------------------


def sources(device, dtype=torch.int64):
    """name -> (options, the positions [B, S] that they mean), for B = S = 2."""
    ids = torch.tensor([[5, 0], [2, 23]], device=device, dtype=dtype)
    token = torch.arange(2, device=device)
    offsets = torch.tensor([4, 19], device=device, dtype=dtype)
    return {
        "offset": ({"offset": 9}, (9 + token).expand(2, 2)),
        "offsets": ({"offset": offsets}, offsets[:, None] + token),
        "strided offsets": ({"offset": offsets.repeat_interleave(2)[::2]}, offsets[:, None] + token),
        "one offset on the device": ({"offset": offsets[1]}, (offsets[1] + token).expand(2, 2)),
        "ids": ({"position_ids": ids}, ids),
        "transposed ids": ({"position_ids": ids.t().contiguous().t()}, ids),
        "ids of one batch": ({"position_ids": ids[:1]}, ids[:1].expand(2, 2)),
        "ids without a batch": ({"position_ids": ids[1]}, ids[1].expand(2, 2)),
        "one id for all": ({"position_ids": ids[:1, :1].expand(2, 2)}, ids[:1, :1].expand(2, 2)),
    }


@pytest.mark.parametrize(
    ("source", "dtype"),
    [*((source, torch.int64) for source in sources("cpu")), ("ids", torch.int32), ("offsets", torch.int32)],
)
def test_every_source_of_positions_means_what_the_page_says(source, dtype, device):
    options, positions = sources(device, dtype)[source]
    q, k, gradients, cos, sin = make("usual", torch.float32, device)
    wanted = torch.stack(
        [by_complex_numbers(x, p.tolist(), 16, 10000.0, False) for x, p in zip(q, positions, strict=True)]
    )
    for backend in ("triton", "torch"):
        torch.testing.assert_close(rope(q, k, cos, sin, backend=backend, **options)[0], wanted)
    oracle(q, k, gradients, cos, sin, **options)
    if source in ("offset", "offsets", "ids"):
        norm_oracle(*make("usual", torch.bfloat16, device), **options)


@pytest.mark.parametrize(
    ("edges", "dtype"), [([0, 2, 2, 3, 5], torch.int32), ([0, 5], torch.int64), ([0, 0, 5], torch.int32)]
)
def test_packed_sequences_count_from_their_own_start(edges, dtype, device):
    new = Numbers(torch.bfloat16, device)
    q, k, gq, gk = (new(5, heads, 8) for heads in (5, 3, 5, 3))
    cos, sin = table(8, device)
    cu_seqlens = torch.tensor(edges, dtype=dtype, device=device)
    oracle(q, k, (gq, gk), cos, sin, cu_seqlens=cu_seqlens, offset=2)
    norm_oracle(q, k, (gq, gk), cos, sin, cu_seqlens=cu_seqlens)
    alone = [rope(q[None, a:b], k[None, a:b], cos, sin, offset=2) for a, b in itertools.pairwise(edges)]
    wanted = [torch.cat([one[side][0] for one in alone]) for side in (0, 1)]
    torch.testing.assert_close(list(rope(q, k, cos, sin, cu_seqlens=cu_seqlens, offset=2, backend="triton")), wanted)


def test_more_sequences_than_one_look_at_their_starts(device):
    q = Numbers(torch.float32, device)(7, 1, 4)
    cos, sin = table(4, device)
    cu_seqlens = torch.tensor([0] * 300 + [2] * 300 + [3, 7], device=device)
    ours, theirs = (rope(q, cos=cos, sin=sin, cu_seqlens=cu_seqlens, backend=b) for b in ("triton", "torch"))
    torch.testing.assert_close(ours, theirs)


def test_tokens_without_a_batch_are_one_sequence_or_follow_their_ids(device):
    new = Numbers(torch.float32, device)
    q, k, gq, gk = (new(3, heads, 8) for heads in (5, 3, 5, 3))
    cos, sin = table(8, device)
    batched = rope(q[None], k[None], cos, sin, offset=4, backend="torch")
    for offset in (4, torch.tensor(4, device=device), torch.tensor([4], device=device)):
        oracle(q, k, (gq, gk), cos, sin, offset=offset)
        for backend in ("triton", "torch"):
            torch.testing.assert_close(
                [t[None] for t in rope(q, k, cos, sin, offset=offset, backend=backend)], [*batched]
            )
    oracle(q, k, (gq, gk), cos, sin, position_ids=torch.tensor([3, 1, 4], device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_tables_of_any_dtype_and_strides_are_read(dtype, device):
    q, k, gradients, cos, sin = make("partial", torch.bfloat16, device)
    wide = torch.stack([cos, sin], -1).to(dtype)
    for one, two in ((wide[..., 0].contiguous(), wide[..., 1].contiguous()), wide.unbind(-1)):
        oracle(q, k, gradients, one, two, offset=3)
        norm_oracle(q, k, gradients, one, two, offset=3)
    joined = torch.cat([cos, sin], 1)
    oracle(q, k, gradients, joined[:, : cos.shape[1]], joined[:, cos.shape[1] :])


def test_cos_and_sin_may_lie_differently(device):
    q, k, gradients, cos, sin = make("usual", torch.float32, device)
    one_more = torch.cat([sin, sin[:, :1]], 1)[:, :-1]  # rows of cos begin at whole vectors, those of sin do not
    apart = torch.stack([sin, cos], -1)[..., 0]
    for other in (one_more, apart):
        oracle(q, k, gradients, cos, other, offset=3)
        norm_oracle(q, k, gradients, cos, other, offset=3)


def test_tables_with_repeated_halves_are_taken_for_half_split_pairs_only(device):
    q, k, gradients, cos, sin = make("usual", torch.float32, device)
    repeated = [torch.cat([t, t], 1) for t in (cos, sin)]
    for backend in ("triton", "torch"):
        same(rope(q, k, *repeated, backend=backend), rope(q, k, cos, sin, backend=backend))
    oracle(q, k, gradients, *repeated)
    with pytest.raises(ValueError, match=r"R/2 columns, 1 to 8 for heads of 16 channels, got 16; .*one half"):
        rope(q, k, *repeated, interleaved=True)


@pytest.mark.parametrize(("position", "interleaved"), [(-1, True), (ROWS, False), (2**40, True)])
def test_a_position_outside_the_table_gives_nan_where_only_the_device_knows_it(position, interleaved, device):
    q, k, gradients, cos, sin = make("partial", torch.float32, device)
    ids = torch.tensor([[ROWS - 1], [position]], device=device)
    inside = torch.tensor([[True], [False]], device=device)
    wanted = rope(q, k, cos, sin, position_ids=ids * inside, interleaved=interleaved, backend="torch")
    for y, right in zip(
        rope(q, k, cos, sin, position_ids=ids, interleaved=interleaved, backend="triton"), wanted, strict=True
    ):
        torch.testing.assert_close(y[inside], right[inside])
        assert y[~inside][..., :4].isnan().all()
        same(y[~inside][..., 4:], right[~inside][..., 4:])
    weight = torch.ones(16, device=device)
    leaves = [t.detach().requires_grad_() for t in (q, k)]
    results = qk_norm_rope(
        *leaves, weight, weight, cos, sin, position_ids=ids, interleaved=interleaved, backend="triton"
    )
    for dx in torch.autograd.grad(results, leaves, gradients):
        assert dx[inside].isfinite().all()
        assert dx[~inside].isnan().all()


def test_a_position_outside_the_table_is_an_error_where_the_host_sees_it():
    q, k, _, cos, sin = make("usual", torch.float32, "cpu")
    for backend in ("auto", "torch", "triton"):
        message = r"offset \+ S must be within the table's 24 rows, got 23 \+ 2; .*rope_table\(25, rotary_dim\)"
        with pytest.raises(ValueError, match=message):
            rope(q, k, cos, sin, offset=23, backend=backend)
        with pytest.raises(ValueError, match="offset must not be negative, got -1"):
            rope(q, k, cos, sin, offset=-1, backend=backend)
    weight, edges = torch.ones(16), torch.tensor([0, 1, 1, ROWS + 2])
    calls = (
        lambda q, k, **o: rope(q, k, cos, sin, backend="torch", **o),
        lambda q, k, **o: qk_norm_rope(q, k, weight, weight, cos, sin, **o),
        lambda q, k, **o: trinix.FastRoPEPositionEmbedding(16, ROWS)(q, k, **o),
    )
    flat = [t[0, :1].expand(ROWS + 2, -1, -1) for t in (q, k)]
    for call in calls:
        for name in ("position_ids", "offset"):
            for dtype in (torch.int32, torch.int64):
                low, high = (torch.tensor([1, bad], dtype=dtype) for bad in (-1, ROWS))
                with pytest.raises(
                    ValueError, match=f"rope: {name} must not name positions below 0, got -1; position 0 is"
                ):
                    call(q, k, **{name: low})
                most = ROWS + (name == "offset")  # every offset counts two tokens
                text = (
                    f"rope: {name} must name positions within the table's 24 rows, got {most}; .*grow\\({most + 1}\\)"
                )
                with pytest.raises(ValueError, match=text):
                    call(q, k, **{name: high})
                call(q, k, **{name: (high - 2).clamp(min=0)})
        if call is not calls[-1]:  # whose table grows
            with pytest.raises(ValueError, match=r"rope: cu_seqlens must name positions .* table's 24 rows, got 24"):
                call(*flat, cu_seqlens=edges)
        with pytest.raises(
            ValueError, match="rope: cu_seqlens must begin with 0 and end with the 26 tokens of q, got 2 and 26"
        ):
            call(*flat, cu_seqlens=torch.tensor([2, ROWS + 2]))
    with pytest.raises(ValueError, match="rope: position_ids must name positions within the table's 24 rows, got 24"):
        rope(q[:, :, :0], k, cos, sin, position_ids=torch.full((2,), ROWS))
    with pytest.raises(ValueError, match="cos and sin must have a row for every position, got none"):
        rope(q, k, cos[:0], sin[:0], position_ids=torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_formula_gives_nan_for_a_position_that_nobody_looked_at(interleaved, fresh_dynamo, device):
    """On a GPU an index outside would end the process; under torch.compile no device's values are looked at."""
    q, k, gradients, cos, sin = make("partial", torch.float32, device)
    weight = torch.ones(16, device=device)

    @functools.partial(torch.compile, backend="eager", fullgraph=True)
    def both(q, k, ids):
        turned = rope(q, k, cos, sin, position_ids=ids, interleaved=interleaved, backend="torch")
        return *turned, *qk_norm_rope(
            q, k, weight, weight, cos, sin, position_ids=ids, interleaved=interleaved, backend="torch"
        )

    for position in (-1, ROWS, 2**40):
        ids = torch.tensor([[ROWS - 1], [position]], device=device)
        inside = torch.tensor([[True], [False]], device=device)
        leaves = [t.detach().requires_grad_() for t in (q, k)]
        got, wanted = both(*leaves, ids), both(q, k, ids * inside)
        for y, right in zip(got, wanted, strict=True):
            same(y[inside].detach(), right[inside])
            assert y[~inside][..., :4].isnan().all()
            same(y[~inside][..., 4:].detach(), right[~inside][..., 4:])
        for dx in torch.autograd.grad(got, leaves, gradients * 2):
            assert dx[inside].isfinite().all()
            assert dx[~inside][..., :4].isnan().all()


# ---- rope_table --------------------------------------------------------------------------------------------------------


def angles(got):
    """The angle a position of every pair, from the table's row of position 1."""
    cos, sin = got
    return torch.atan2(sin[1].double(), cos[1].double())


def plain_frequencies(rotary_dim, base):
    return [base ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]


def test_a_table_is_float32_of_angles_taken_in_float64():
    cos, sin = rope_table(100_000, 8, base=500.0)
    assert (cos.dtype, cos.shape) == (torch.float32, (100_000, 4))
    for position in (0, 1, 77, 99_999):
        for i, f in enumerate(plain_frequencies(8, 500.0)):
            assert cos[position, i].item() == pytest.approx(math.cos(position * f), abs=6e-8)
            assert sin[position, i].item() == pytest.approx(math.sin(position * f), abs=6e-8)


def test_a_table_of_given_positions_has_their_rows(device):
    cos, sin = rope_table(50, 8, device=device)
    places = torch.tensor([3, 0, 49], device=device)
    same(rope_table(places, 8), (cos[places], sin[places]))
    half = rope_table(torch.tensor([0.5], device=device), 8)
    torch.testing.assert_close(half[1], torch.tensor(plain_frequencies(8, 10000.0), device=device).mul(0.5).sin()[None])
    assert rope_table(0, 8)[0].shape == (0, 4)


def test_linear_and_ntk_scaling():
    frequencies = torch.tensor(plain_frequencies(16, 10000.0), dtype=torch.float64)
    torch.testing.assert_close(
        angles(rope_table(2, 16, scaling={"type": "linear", "factor": 4.0})).float(), (frequencies / 4).float()
    )
    stretched = torch.tensor(plain_frequencies(16, 10000.0 * 4.0 ** (16 / 14)), dtype=torch.float64)
    ntk = angles(rope_table(2, 16, scaling={"rope_type": "ntk", "factor": 4.0}))
    torch.testing.assert_close(ntk.float(), stretched.float())
    assert ntk[0].item() == pytest.approx(1.0)  # the fastest pair stays
    assert ntk[-1].item() == pytest.approx(frequencies[-1].item() / 4)  # the slowest is interpolated
    same(rope_table(5, 16, scaling={"type": "default"}), rope_table(5, 16))


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}


def test_llama3_scaling_pair_by_pair():
    wanted = []
    for f in plain_frequencies(128, 500000.0):
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4.0:
            wanted.append(f)
        elif wavelength > 8192 / 1.0:
            wanted.append(f / 8.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            wanted.append((1 - smooth) * f / 8.0 + smooth * f)
    got = angles(rope_table(2, 128, base=500000.0, scaling=LLAMA3))
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    assert len({round(g / f, 6) for g, f in zip(wanted, plain_frequencies(128, 500000.0), strict=True)}) > 3


@pytest.mark.parametrize(
    ("more", "attention"),
    [
        ({}, 0.1 * math.log(40.0) + 1.0),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, (0.0707 * math.log(40.0) + 1.0) / (0.1 * math.log(40.0) + 1.0)),
        ({"mscale": 0.707}, 0.1 * math.log(40.0) + 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 0.0}, 0.1 * math.log(40.0) + 1.0),
        ({"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}, 0.1 * math.log(40.0) + 1.0),
        # no pair turns as seldom as once, or as often as 32 times
        ({"original_max_position_embeddings": 131072}, 0.1 * math.log(40.0) + 1.0),
        ({"original_max_position_embeddings": 128}, 0.1 * math.log(40.0) + 1.0),
    ],
)
def test_yarn_scaling_pair_by_pair(more, attention):
    scaling = {**YARN, **more}
    fast, slow = more.get("beta_fast", 32.0), more.get("beta_slow", 1.0)

    def pair_with(turns):
        context = scaling["original_max_position_embeddings"]
        return 64 * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(10000.0))

    low, high = pair_with(fast), pair_with(slow)
    if more.get("truncate", True):
        low, high = max(math.floor(low), 0), min(math.ceil(high), 63)
    wanted = []
    for i, f in enumerate(plain_frequencies(64, 10000.0)):
        ramp = min(1.0, max(0.0, (i - low) / (high - low)))
        wanted.append(f / 40.0 * ramp + f * (1 - ramp))
    cos, sin = rope_table(2, 64, scaling=scaling)
    torch.testing.assert_close(angles((cos, sin)), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(cos[0], torch.full((32,), attention))
    torch.testing.assert_close(torch.hypot(cos[1], sin[1]), torch.full((32,), attention))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((4, 7), ValueError, "rotary_dim must be an even int from 2 on, got 7"),
        ((4, 0), ValueError, "got 0"),
        ((4, 8.0), ValueError, "got 8.0"),
        ((-1, 8), TypeError, "positions must be an int from 0 on or a tensor"),
        (("4", 8), TypeError, "got '4'"),
        ((torch.zeros(2, 2), 8), ValueError, r"got \[2, 2\]; flatten"),
        ((4, 8, ("linear", 2.0)), TypeError, "scaling must be None or a dict with a 'type', got tuple"),
        (
            (4, 8, {"factor": 2.0}),
            ValueError,
            r"'type' must be one of \['default', 'linear', 'ntk', 'yarn', 'llama3'\]",
        ),
        ((4, 8, {"type": "dynamic", "factor": 2.0}), ValueError, "'dynamic'"),
        ((4, 8, {"type": "linear"}), ValueError, r"scaling 'linear' needs \['factor'\], got \[\]"),
        ((4, 8, {"type": "linear", "factor": 2.0, "beta": 1}), ValueError, r"got \['beta', 'factor'\]"),
        ((4, 8, {"type": "linear", "factor": -2.0}), ValueError, "factor must be positive, got -2.0"),
        ((4, 8, {"type": "linear", "factor": float("nan")}), ValueError, "factor must be positive, got nan"),
        ((4, 8, {"type": "linear", "factor": "4"}), TypeError, "scaling's factor must be a number, got '4'"),
        ((4, 8, {"type": "ntk", "factor": 1e300}), ValueError, "gives no frequencies that float64 holds"),
        (
            (4, 8, {**YARN, "original_max_position_embeddings": None}),
            TypeError,
            "position_embeddings must be a number, got None",
        ),
        ((4, 8, {"type": ["linear"], "factor": 2.0}), ValueError, "'type' must be one of"),
        ((4, 8, {"type": "linear", "rope_type": "ntk", "factor": 2.0}), ValueError, "'type' must be one of"),
        ((4, 8, {**YARN, "truncate": "no"}), TypeError, "truncate must be True or False, got 'no'"),
        ((4, 8, {**YARN, "beta_fast": 0}), ValueError, "beta_fast must be positive, got 0"),
        ((4, 8, YARN, 1.0), ValueError, "base 1.0 with scaling .* gives no frequencies"),
        (
            (4, 8, {**LLAMA3, "low_freq_factor": 4}),
            ValueError,
            "low_freq_factor must be below its high_freq_factor, got 4.0 and 4.0",
        ),
        ((4, 8, None, -1.0), ValueError, "base must be positive, got -1.0"),
    ],
)
def test_a_table_that_cannot_be_made_says_what_is_wanted(arguments, error, text):
    with pytest.raises(error, match=text):
        rope_table(*arguments[:2], **dict(zip(("scaling", "base"), arguments[2:], strict=False)))


def test_a_scaling_may_say_its_base_as_newer_configurations_do():
    """There every one has it: ours must not be of another."""
    for scaling in ({"rope_type": "default"}, YARN, LLAMA3):
        same(
            rope_table(4, 8, base=500000.0, scaling=scaling | {"rope_theta": 500000}),
            rope_table(4, 8, base=500000.0, scaling=scaling),
        )
        with pytest.raises(
            ValueError, match=r"rope_theta must be the base, got 500000\.0 and base 10000\.0; give base"
        ):
            rope_table(4, 8, scaling=scaling | {"rope_theta": 500000.0})
    with pytest.raises(TypeError, match="scaling's rope_theta must be a number, got '1e4'"):
        rope_table(4, 8, scaling=YARN | {"rope_theta": "1e4"})


def test_optional_keys_of_yarn_may_be_none():
    same(rope_table(4, 8, scaling={**YARN, "attention_factor": None, "mscale": None}), rope_table(4, 8, scaling=YARN))


def test_a_table_that_has_grown_keeps_its_base_and_scaling():
    module = trinix.FastRoPEPositionEmbedding(8, 4, base=500.0, scaling=YARN)
    same(module.table(9), rope_table(9, 8, base=500.0, scaling=YARN))
    assert module.cos.shape[0] >= 9


# ---- which gradients, what is saved --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_only_the_gradients_that_are_wanted(which, backend, device):
    q, k, (gq, gk), cos, sin = make("usual", torch.float32, device)
    leaf, g = (q, gq) if which == "q" else (k, gk)
    leaf.requires_grad_()
    y = rope(q, k, cos, sin, backend=backend)["qk".index(which)]
    (wanted,) = torch.autograd.grad(rope(leaf, None, cos, sin, backend="torch"), leaf, g)
    (got,) = torch.autograd.grad(y, leaf, g)
    torch.testing.assert_close(got, wanted)
    assert got.stride() == wanted.stride()  # not as the other one would lie
    assert (q if which == "k" else k).grad is None


def test_a_result_that_is_not_used_costs_no_gradient(device, monkeypatch):
    q, k, (_, gk), cos, sin = make("usual", torch.float32, device)
    leaves = q.requires_grad_(), k.requires_grad_()
    results = rope(q, k, cos, sin, backend="triton")
    rotate, seen = kernels.rotate, []
    monkeypatch.setattr(kernels, "rotate", lambda q, k, *rest, **more: seen.append(k) or rotate(q, k, *rest, **more))
    dq, dk = torch.autograd.grad(results[1], leaves, gk, allow_unused=True)
    assert dq is None
    assert seen == [None]
    torch.testing.assert_close(dk, torch.autograd.grad(rope(k, None, cos, sin, backend="torch"), k, gk)[0])


@pytest.mark.parametrize("wanted", ["1000", "0100", "0010", "0001", "1010", "0110", "0011"])
def test_the_norms_gradients_are_those_wanted(wanted, device):
    q, k, gradients, cos, sin = make("partial", torch.float32, device)
    new = Numbers(torch.float32, device)
    inputs = [t.requires_grad_(w == "1") for t, w in zip((q, k, new(16), new(16)), wanted, strict=True)]
    leaves = [t for t in inputs if t.requires_grad]
    found = []
    for backend in ("triton", "torch"):
        results = qk_norm_rope(*inputs, cos, sin, backend=backend)
        pairs = [(y, g) for y, g in zip(results, gradients, strict=True) if y.requires_grad]
        outputs, incoming = zip(*pairs, strict=True)
        found.append(torch.autograd.grad(outputs, leaves, incoming))
    torch.testing.assert_close(*found)


def test_rope_saves_the_table_and_positions_and_the_norm_its_inputs(device):
    q, k, _, cos, sin = make("usual", torch.float32, device)
    ids = torch.tensor([1, 2], device=device)
    y, _ = rope(q.requires_grad_(), k, cos, sin, position_ids=ids, backend="triton")
    saved = y.grad_fn.saved_tensors
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (cos, sin, ids)]
    weight = torch.ones(16, device=device)
    y, _ = qk_norm_rope(q, k, weight, weight, cos, sin, backend="triton")
    saved = y.grad_fn.saved_tensors
    assert [t.data_ptr() for t in saved if t is not None] == [t.data_ptr() for t in (q, k, weight, weight, cos, sin)]


@pytest.mark.parametrize("layout", ["contiguous", "packed qkv"])
def test_backward_twice_gives_equal_bits_and_writes_into_nothing_of_others(layout, device):
    q, k, gradients, cos, sin = make("usual", torch.float32, device, layout)
    weights = [t.requires_grad_() for t in (torch.ones(16, device=device), torch.ones(16, device=device))]
    others = (q, k, *gradients, cos, sin)
    before = [t.clone() for t in others]
    leaves = q.detach().requires_grad_(), k.detach().requires_grad_()
    for results, inputs in (
        (rope(*leaves, cos, sin, backend="triton"), leaves),
        (qk_norm_rope(*leaves, *weights, cos, sin, backend="triton"), (*leaves, *weights)),
    ):
        first = torch.autograd.grad(results, inputs, gradients, retain_graph=True)
        bits = [t.clone() for t in first]
        second = torch.autograd.grad(results, inputs, gradients)
        same(first, tuple(bits))
        same(second, first)
    same(list(others), before)


def test_q_and_k_may_change_before_the_backward_of_rope_but_not_of_the_norm(device):
    q, k, gradients, cos, sin = make("usual", torch.float32, device)
    leaves = q.requires_grad_(), k.requires_grad_()
    copies = [t.clone() for t in leaves]
    results = rope(*copies, cos, sin, backend="triton")
    for t in copies:
        t.data_ptr()
        with torch.no_grad():
            t.fill_(7)
    wanted = torch.autograd.grad(rope(*leaves, cos, sin, backend="torch"), leaves, gradients)
    torch.testing.assert_close(torch.autograd.grad(results, leaves, gradients), wanted)
    copies = [t.clone() for t in leaves]
    weight = torch.ones(16, device=device)
    results = qk_norm_rope(*copies, weight, weight, cos, sin, backend="triton")
    copies[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(results, leaves, gradients)


@pytest.mark.parametrize("norm", [False, True])
def test_the_second_derivative_is_pytorchs(norm, device):
    q, k, gradients, cos, sin = make("partial", torch.float32, device)
    new = Numbers(torch.float32, device)
    weights = (new(16), new(16)) if norm else ()
    found = []
    for backend in ("triton", "torch"):
        leaves = [t.detach().requires_grad_() for t in (q, k, *weights)]
        incoming = [g.detach().requires_grad_() for g in gradients]
        results = (qk_norm_rope if norm else rope)(*leaves, cos, sin, offset=2, backend=backend)
        first = torch.autograd.grad(results, leaves, incoming, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(penalty, [*leaves, *incoming], materialize_grads=True))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "inputs",
    [
        lambda q, k, w: (q, q, w, w.detach()),
        lambda q, k, w: (q, k, w, w),
        lambda q, k, w: (q, 2 * q, w, w.exp()),
        lambda q, k, w: (q, k, w * q.mean(), w),
    ],
    ids=["q is k", "one weight", "computed", "weight of q"],
)
def test_a_gradient_penalty_counts_no_path_twice_where_the_inputs_depend_on_each_other(inputs, device):
    q, k, gradients, cos, sin = make("partial", torch.float32, device)
    q, k = q[:, :, :1], k[:, :, :1]
    weight = Numbers(torch.float32, device)(16)
    found = []
    for backend in ("triton", "torch"):
        leaves = [t.detach().requires_grad_() for t in (q, k, weight)]
        results = qk_norm_rope(*inputs(*leaves), cos, sin, backend=backend)
        incoming = [g[:, :, :1] for g in gradients]
        first = torch.autograd.grad(results, leaves, incoming, create_graph=True, materialize_grads=True)
        penalty = sum(g.square().sum() for g in first)
        found.append([*first, *torch.autograd.grad(penalty, leaves, materialize_grads=True)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_a_batch_of_gradients_can_be_pulled_back_at_once(norm, interleaved, device):
    cos, sin = table(4, device)
    new = Numbers(torch.float32, device)
    q, k, gq, gk = (new(*shape) for shape in ((1, 2, 1, 4), (1, 2, 1, 4), (3, 1, 2, 1, 4), (3, 1, 2, 1, 4)))
    weights = (new(4), new(4)) if norm else ()
    found = []
    for backend in ("triton", "torch"):
        leaves = [t.detach().requires_grad_() for t in (q, k, *weights)]
        results = (qk_norm_rope if norm else rope)(*leaves, cos, sin, interleaved=interleaved, backend=backend)
        found.append(torch.autograd.grad(results, leaves, (gq, gk), is_grads_batched=True))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_half_type_that_is_not_autocasts_own_is_rotated_in_part(interleaved):
    cos, sin = table(4, "cpu")
    q = torch.randn(1, 3, 2, 6).half()
    wanted = rope(q, None, cos, sin, interleaved=interleaved)
    with torch.autocast("cpu", torch.bfloat16):
        got = rope(q, None, cos, sin, interleaved=interleaved)
    assert got.dtype == torch.float16
    assert torch.equal(got, wanted)
    assert torch.equal(got[..., 4:], q[..., 4:])


# ---- in place ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["partial", "odd width of pairs", "0 tokens"])
@pytest.mark.parametrize("layout", ["contiguous", "packed qkv", "sliced channels"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_inplace_overwrites_q_and_k_and_tells_autograd(backend, layout, size, device):
    q, k, _, cos, sin = make(size, torch.bfloat16, device, layout)
    for interleaved in (False, True):
        wanted = [dense(t) for t in rope(q, k, cos, sin, offset=3, interleaved=interleaved, backend=backend)]
        versions = q._version, k._version
        results = rope(q, k, cos, sin, offset=3, interleaved=interleaved, inplace=True, backend=backend)
        assert results[0] is q
        assert results[1] is k
        same([dense(t) for t in results], wanted)
        assert q._version > versions[0]
        assert k._version > versions[1]
    alone = rope(q, cos=cos, sin=sin, inplace=True, backend=backend)
    assert alone is q


def test_inplace_changes_nothing_beside_a_view(device):
    qkv = Numbers(torch.float32, device)(2, 3, 3, 2, 8)
    before = qkv.clone()
    cos, sin = table(4, device)
    rope(*qkv.unbind(2)[:2], cos, sin, offset=1, inplace=True, backend="triton")
    same(qkv[:, :, 2], before[:, :, 2])
    same(qkv[..., 4:], before[..., 4:])
    assert not torch.equal(qkv[:, :, :2, :, :4], before[:, :, :2, :, :4])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_inplace_wants_q_and_k_of_their_own(backend, device):
    cos, sin = rope_table(9, 8, device=device)
    buffer = torch.randn(2, 5, 3, 6, 8, device=device)  # q, k and v of a token are packed in one way or another
    for q, k in (
        (buffer[:, :, 0], buffer[:, :, 0]), (buffer[:, :, 0, :4], buffer[:, :, 0, 3:]), (buffer[:, :4, 0], buffer[:, 1:, 0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"q and k that share no memory.*k\.clone\(\)"):
            rope(q, k, cos, sin, inplace=True, backend=backend)
    heads = buffer.transpose(2, 3)  # a head's q, k and v side by side
    for q, k in (
        (buffer[:, :, 0], buffer[:, :, 1]), (buffer[:, :, 0, :4], buffer[:, :, 0, 4:]), (heads[..., 0, :], heads[..., 1, :]),
        (buffer[0:1, :, 0], buffer[1:2, :, 0]),
    ):  # fmt: skip
        wanted = rope(q, k, cos, sin, backend="torch")
        got = rope(q, k, cos, sin, inplace=True, backend=backend)
        torch.testing.assert_close(got, wanted)


def test_inplace_sees_the_one_element_that_q_and_k_share(device):
    cos, sin = table(2, device)
    three = torch.ones(3, device=device)
    ends = three[:2].view(1, 1, 1, 2), three[1:].view(1, 1, 1, 2)
    for q, k in (ends, ends[::-1]):
        with pytest.raises(ValueError, match="share no memory"):
            rope(q, k, cos, sin, inplace=True)


def test_inplace_knows_q_from_k_where_they_have_no_memory(fresh_dynamo):
    cos, sin = rope_table(9, 8)
    q, k = torch.randn(2, 1, 5, 2, 8).unbind()
    compiled = torch.compile(lambda q, k: rope(q, k, cos, sin, inplace=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q.clone(), k.clone()), rope(q, k, cos, sin))
    on_meta = [t.to("meta") for t in (q.clone(), k.clone(), cos, sin)]
    assert rope(*on_meta, inplace=True)[1].shape == k.shape
    own = q.clone(), k.clone(), cos, sin
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in own]
        assert rope(*fakes, inplace=True)[1].shape == k.shape


def test_inplace_is_refused_where_a_gradient_or_memory_would_break(device):
    q, k, _, cos, sin = make("usual", torch.float32, device)
    for backend in ("auto", "triton", "torch"):
        with pytest.raises(ValueError, match=r"inplace=True needs a call without gradient.*no_grad"):
            rope(q, k.detach().requires_grad_(), cos, sin, inplace=True, backend=backend)
        with pytest.raises(ValueError, match=r"needs a k without expanded dimensions.*call k\.contiguous\(\) first"):
            rope(q, k[:, :, :1].expand_as(k), cos, sin, inplace=True, backend=backend)
        overlapping = torch.randn(40, device=device).as_strided((1, 3, 1, 16), (24, 4, 16, 1))
        with pytest.raises(
            ValueError, match=r"needs a q without .*others that share memory, got strides \[24, 4, 16, 1\]"
        ):
            rope(overlapping, None, cos, sin, inplace=True, backend=backend)
        one_step = torch.randn(64, device=device).as_strided(
            (1, 3, 2, 16), (64, 16, 16, 1)
        )  # token 0's head 1 is token 1's 0
        with pytest.raises(ValueError, match=r"needs a q without .*got strides \[64, 16, 16, 1\]"):
            rope(one_step, None, cos, sin, inplace=True, backend=backend)
        with pytest.raises(TypeError, match="rope: inplace must be True or False, got 'no'"):
            rope(q, k, cos, sin, inplace="no", backend=backend)
        with torch.no_grad():
            rope(q.clone(), k.detach().clone().requires_grad_(), cos, sin, inplace=True, backend=backend)
    saved = q.clone().requires_grad_()
    y = saved.exp()  # saves y
    with torch.no_grad():
        rope(y, None, cos, sin, inplace=True, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.inference_mode():
        rope(q.clone(), None, cos, sin, inplace=True, backend="triton")


# ---- errors, choice, explanation ---------------------------------------------------------------------------------------


def refusals():
    q, k = torch.ones(2, 3, 4, 16), torch.ones(2, 3, 2, 16)
    cos, sin = rope_table(ROWS, 16)
    ids, edges = torch.arange(3), torch.tensor([0, 3])
    here = (q, k, cos, sin)
    return {
        "q no tensor": (([1.0], k, cos, sin), {}, TypeError, "q must be floating-point, got list"),
        "q of integers": ((q.int(), k, cos, sin), {}, TypeError, r"q must be floating-point, got torch.int32; .*\.float\(\)"),
        "q of two dimensions": ((q[0, 0], None, cos, sin), {}, ValueError, r"q must be \[B, S, H, D\] or \[T, H, D\], got \[4, 16\]"),
        "no tables": ((q, k), {}, TypeError, r"cos and sin must be tensors, got NoneType and NoneType; .*rope_table"),
        "integer tables": ((q, k, cos.int(), sin), {}, TypeError, "cos and sin must be floating-point, got torch.int32"),
        "tables with a batch": ((q, k, cos[None], sin[None]), {}, ValueError, r"both be \[P, R/2\], got \[1, 24, 8\].*position_ids"),
        "unequal tables": ((q, k, cos, sin[:3]), {}, ValueError, r"got \[24, 8\] and \[3, 8\]"),
        "tables too wide": ((q, k, *rope_table(ROWS, 18)), {}, ValueError, "R/2 columns, 1 to 8 for heads of 16 channels or, with repeated halves, 16, got 9"),
        "empty tables": ((q, k, cos[:, :0], sin[:, :0]), {}, ValueError, "got 0"),
        "tables without rows": ((q, k, cos[:0], sin[:0]), {"position_ids": ids}, ValueError, r"cos and sin must have a row for every position, got none; .*rope_table\(3, "),
        "a text for a bool": (here, {"interleaved": "no"}, TypeError, r"interleaved must be True or False, got 'no'; convert it with bool\(\)"),
        "k of another dtype": ((q, k.half(), cos, sin), {}, TypeError, r"k must have q's dtype torch.float32, got torch.float16; .*k\.to"),
        "k of another length": ((q, k[:, :2], cos, sin), {}, ValueError, r"k must be \[2, 3, Hk, 16\] for q \[2, 3, 4, 16\], got \[2, 2, 2, 16\]"),
        "k of another width": ((q, k[..., :8], cos, sin), {}, ValueError, r"got \[2, 3, 2, 8\]; only the heads may differ"),
        "k elsewhere": ((q, k.to("meta"), cos, sin), {}, ValueError, "k must be where q is, on cpu, got meta"),
        "tables elsewhere": ((q, k, cos.to("meta"), sin), {}, ValueError, "cos and sin must be where q is, on cpu, got meta"),
        "float offset": (here, {"offset": 1.0}, TypeError, "offset must be an int .*got float"),
        "offsets of floats": (here, {"offset": torch.ones(2)}, TypeError, r"offset must be an int64 or int32 tensor, got torch.float32; .*\.long"),
        "offsets of another batch": (here, {"offset": ids}, ValueError, r"offset must be an int, \[2\] or \[\], got \[3\]"),
        "ids and offset": (here, {"position_ids": ids, "offset": 1}, ValueError, "position_ids say everything"),
        "ids and sequences": (here, {"position_ids": ids, "cu_seqlens": edges}, ValueError, "position_ids say everything"),
        "ids of another shape": (here, {"position_ids": ids[:2]}, ValueError, r"position_ids must be \[2, 3\] or \[1, 3\] or \[3\] for q \[2, 3, 4, 16\], got \[2\]"),
        "ids of floats": (here, {"position_ids": ids.float()}, TypeError, "position_ids must be an int64 or int32 tensor"),
        "ids elsewhere": (here, {"position_ids": ids.to("meta")}, ValueError, "position_ids must be where q is"),
        "sequences of a batch": (here, {"cu_seqlens": edges}, ValueError, r"cu_seqlens must be \[n \+ 1\] and q \[T, H, D\].*flatten the batch"),
        "sequences with offsets": ((q[0], k[0], cos, sin), {"cu_seqlens": edges, "offset": ids}, TypeError, "offset must be an int"),
        "unknown backend": (here, {"backend": "tritn"}, ValueError, r"\['auto', 'triton', 'torch'\], got 'tritn'"),
    }  # fmt: skip


@pytest.mark.parametrize("case", refusals())
def test_arguments_that_do_not_fit_are_refused_with_the_cure(case):
    arguments, options, error, text = refusals()[case]
    with pytest.raises(error, match=text):
        rope(*arguments, **options)
    if len(arguments) == 4 and arguments[1] is not None:
        weight = torch.ones(16)
        with pytest.raises(error, match=text):
            qk_norm_rope(*arguments[:2], weight, weight, *arguments[2:], **options)
        with pytest.raises(error, match=text):
            trinix.explain("rope", *arguments, **options)


def test_the_norm_refuses_weights_that_do_not_fit():
    q, k, _, cos, sin = make("usual", torch.float32, "cpu")
    weight = torch.ones(16)
    for weights, error, text in (
        ((weight[:8], weight), ValueError, r"q_weight must be \[16\], a head's channels, got \[8\]"),
        ((weight, weight[None]), ValueError, r"k_weight must be \[16\], a head's channels, got \[1, 16\]"),
        ((weight, None), TypeError, "k_weight must be floating-point, got NoneType"),
        ((weight.to("meta"), weight), ValueError, "q_weight must be where q is"),
    ):
        with pytest.raises(error, match=text):
            qk_norm_rope(q, k, *weights, cos, sin)
    with pytest.raises(TypeError, match="k must be a tensor, got None"):
        qk_norm_rope(q, None, weight, weight, cos, sin)


def test_a_named_triton_says_why_it_cannot_run(device):
    q, k, _, cos, sin = make("usual", torch.float32, device)
    with pytest.raises(trinix.Unsupported, match=r"'triton' needs float16, bfloat16 or float32, got float64.*auto"):
        rope(q.double(), k.double(), cos, sin, backend="triton")
    with pytest.raises(trinix.Unsupported, match="gives cos and sin no gradient"):
        rope(q, k, cos.clone().requires_grad_(), sin, backend="triton")
    with torch.no_grad():
        rope(q, k, cos.clone().requires_grad_(), sin, backend="triton")
    wide = torch.ones(1, 1, 1, 514, device=device)
    with pytest.raises(trinix.Unsupported, match="at most 512 channels a head, got 514"):
        rope(wide, None, *table(514, device), backend="triton")
    assert rope(wide, None, *table(514, device)).shape == wide.shape
    meta = [t.to("meta") for t in (q, k, cos, sin)]
    with pytest.raises(trinix.Unsupported, match="'triton' needs a GPU tensor, got meta"):
        rope(*meta, backend="triton")
    assert rope(*meta)[1].shape == k.shape


def test_auto_gives_cos_and_sin_their_gradient_through_the_formula(device):
    q, k, gradients, cos, sin = make("partial", torch.float32, device)
    cos.requires_grad_()
    results = rope(q, k, cos, sin, offset=1)
    (dcos,) = torch.autograd.grad(results, cos, gradients)
    assert (dcos != 0).any()


def backend_that_ran(y) -> str:
    return "triton" if type(y.grad_fn).__name__ in ("_RopeBackward", "_QkNormRopeBackward") else "torch"


def test_use_backend_stands_in_for_auto(device):
    q, k, _, cos, sin = make("usual", torch.float32, device)
    q.requires_grad_()
    with trinix.use_backend("triton"):
        assert backend_that_ran(rope(q, k, cos, sin)[0]) == "triton"
        assert backend_that_ran(rope(q, k, cos, sin, backend="torch")[0]) == "torch"
    with trinix.use_backend("torch"):
        assert backend_that_ran(rope(q, k, cos, sin)[0]) == "torch"
    assert backend_that_ran(rope(q, k, cos, sin)[0]) == ("triton" if device == "cuda" else "torch")


def test_no_gradient_is_recorded_where_none_is_wanted(device):
    q, k, _, cos, sin = make("usual", torch.float32, device)
    weight = torch.ones(16, device=device)
    assert all(t.grad_fn is None for t in rope(q, k, cos, sin, backend="triton"))
    assert all(t.grad_fn is None for t in qk_norm_rope(q, k, weight, weight, cos, sin, backend="triton"))
    with torch.no_grad():
        assert not rope(q.requires_grad_(), k, cos, sin, backend="triton")[0].requires_grad


def test_explain_says_backend_reason_and_configuration(device):
    q, k, _, cos, sin = make("usual", torch.float32, device)
    weight = torch.ones(16, device=device)
    assert str(trinix.explain("rope", q.cpu(), k.cpu(), cos.cpu(), sin.cpu())) == (
        "rope -> torch: the first backend that is right and fastest here\n  not triton: needs a GPU tensor, got cpu"
    )
    assert str(trinix.explain(rope, q, k, cos, sin, backend="triton")) == (
        "rope -> triton: named by the caller\n  config: tile 4 heads x 8 pairs, 2 warps"
    )
    named = trinix.explain("qk_norm_rope", q, k, weight, weight, cos, sin, backend="torch")
    assert str(named) == "qk_norm_rope -> torch: named by the caller"
    with pytest.raises(trinix.Unsupported, match="needs float16"):
        trinix.explain("rope", q.double(), None, cos, sin, backend="triton")


@pytest.mark.parametrize("lanes", [32, 64])
def test_configurations_fit_their_tensors(lanes):
    for heads in (1, 3, 8, 12, 32, 40, 64, 128):
        for width in (2, 16, 64, 80, 128, 192, 256, 512):
            for itemsize in (2, 4):
                for tokens in (1, 511, 512, 100_000):
                    c = kernels.choose_rotation(heads, width, itemsize, lanes)
                    assert c.heads & (c.heads - 1) == 0
                    assert c.heads < 2 * heads
                    assert c.heads * width <= 4096
                    assert 1 <= c.num_warps <= 8
                    assert c.parts == -(-heads // c.heads)
                    assert c.parts * c.heads < heads + c.heads * max(1, c.parts)
                    for heads_k in {1, heads}:
                        back = kernels.choose_norm_backward(tokens, heads, heads_k, width, itemsize, lanes, 132)
                        assert 1 <= back.split < back.programs <= max(2, 4 * 132)
                        # neither side's programs have much more to do than the other's
                        tiles = (tokens * -(-heads // back.heads), tokens * -(-heads_k // back.heads_k))
                        turns = [-(-tiles[0] // back.split), -(-tiles[1] // (back.programs - back.split))]
                        work = (turns[0] - 1) * back.heads, (turns[1] - 1) * back.heads_k
                        assert abs(work[0] - work[1]) <= 0.1 * max(work) + 2 * max(back.heads, back.heads_k)


# ---- a citizen of PyTorch ----------------------------------------------------------------------------------------------


def compiled_matches_eager(function, compiler, inputs, gradients):
    """A fullgraph compile against the eager call; returns the targets of the graphs that it made."""
    targets = []

    def recording(graph, example_inputs):
        graphs = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        targets.extend(str(node.target) for one in graphs for node in one.graph.nodes)
        return torch._dynamo.lookup_backend(compiler)(graph, example_inputs)

    compiled = torch.compile(function, fullgraph=True, backend=recording)
    for factor in (1, -1):
        leaves = [(factor * t).detach().requires_grad_() for t in inputs]
        eager, ours = function(*leaves), compiled(*leaves)
        torch.testing.assert_close(ours, eager)
        torch.testing.assert_close(*(torch.autograd.grad(y, leaves, gradients) for y in (ours, eager)))
    return targets


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("source", ["offset", "offsets", "ids", "cu_seqlens", "alone"])
def test_compile_takes_rope_whole(source, backend, device):
    q, k, gradients, cos, sin = make("partial", torch.float32, device)
    options = {
        "offset": {"offset": 3},
        "offsets": {"offset": torch.tensor([2, 5], device=device)},
        "ids": {"position_ids": torch.tensor([4], device=device), "interleaved": True},
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 0, 1], device=device)},
        "alone": {},
    }[source]
    inputs = (q[0], k[0]) if source == "cu_seqlens" else (q,) if source == "alone" else (q, k)
    gradients = tuple(g[0] for g in gradients) if source == "cu_seqlens" else gradients[: len(inputs)]

    def function(*inputs):
        results = rope(*[t * 2 for t in inputs], *[None] * (2 - len(inputs)), cos, sin, backend=backend, **options)
        return results if len(inputs) == 2 else (results,)

    targets = compiled_matches_eager(function, "aot_eager", inputs, gradients)
    assert ("trinix.rope.default" in targets) == (backend == "triton")
    assert backend == "triton" or not any("trinix" in t or "autograd_function" in t for t in targets)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compile_takes_the_norm_whole(backend, device):
    q, k, gradients, cos, sin = make("usual", torch.float32, device)
    new = Numbers(torch.float32, device)
    function = lambda *inputs: qk_norm_rope(*inputs, cos, sin, backend=backend, weight_offset=1.0)  # noqa: E731
    targets = compiled_matches_eager(function, "aot_eager", (q, k, new(16), new(16)), gradients)
    assert ("trinix.qk_norm_rope.default" in targets) == (backend == "triton")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compile_with_dynamic_shapes_and_in_place(backend, device):
    cos, sin = table(8, device)
    function = lambda q, start: rope(q, None, cos, sin, offset=start, inplace=True, backend=backend)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 5, 9):
        q = normal((1, tokens, 2, 8), torch.float32, seed=tokens, device=device)
        wanted = rope(q, None, cos, sin, offset=tokens)
        assert compiled(q, tokens) is q
        torch.testing.assert_close(q, wanted)


@pytest.mark.parametrize("size", ["usual", "partial", "0 tokens"])
def test_the_registered_ops_pass_opcheck(size, device):
    q, k, gradients, cos, sin = make(size, torch.float32, device, "packed qkv")
    weight = torch.ones(16, device=device)
    ids = torch.tensor([0] * q.shape[1], device=device)
    half = cos.shape[1]
    opcheck = torch.library.opcheck
    opcheck(torch.ops.trinix.rope.default, (q, k, cos, sin, ids, "ids", 0, half, True, False))
    opcheck(torch.ops.trinix.rope.default, (q, None, cos, sin, None, "offset", 1, half, False, True))
    common = weight, weight, cos, sin, None, "offset", 1, half, False, 1e-6, 0.0
    opcheck(torch.ops.trinix.qk_norm_rope.default, (q, k, *common))
    opcheck(torch.ops.trinix.qk_norm_rope_backward.default, (q, k, *gradients, *common))


def test_a_dispatch_mode_sees_one_op_a_pass(device):
    q, k, gradients, cos, sin = make("partial", torch.float32, device)
    with Watch() as watch:
        oracle(q, k, gradients, cos, sin)
        norm_oracle(q, k, gradients, cos, sin)
    names = ["rope.default", "rope.default", "qk_norm_rope.default", "qk_norm_rope_backward.default"]
    assert [name.removeprefix("trinix.") for name in watch.seen if "trinix" in name] == names
    with Watch() as watch:
        rope(q, k, cos, sin, inplace=True, backend="triton")
    assert "trinix.rope.default" in watch.seen


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_fake_tensors_pass_with_shape_and_dtype_and_no_kernel(backend, device, monkeypatch):
    monkeypatch.setattr(_launch.Launch, "__call__", lambda *_: pytest.fail("a kernel ran on a fake tensor"))
    with FakeTensorMode():
        q, k = (torch.empty(2, 3, h, 16, device=device, dtype=torch.bfloat16, requires_grad=True) for h in (4, 2))
        cos = sin = torch.empty(ROWS, 8, device=device)
        weight = torch.ones(16, device=device, requires_grad=True)
        results = rope(q, k, cos, sin, backend=backend)
        normed = qk_norm_rope(q, k, weight, weight, cos, sin, backend=backend)
        sum(t.sum() for t in (*results, *normed)).backward()
    assert [(t.shape, t.dtype) for t in results] == [(t.shape, t.dtype) for t in (q, k)]
    assert q.grad.shape == q.shape
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_transforms_and_lazily_negated_views_are_right_or_refused(backend, device):
    q, _, (gq, _), cos, sin = make("usual", torch.float32, device)
    function = lambda x, name=backend: rope(x, None, cos, sin, backend=name)  # noqa: E731
    formula = lambda x: function(x, "torch")  # noqa: E731
    torch.testing.assert_close(function(torch._neg_view(q)), formula(-q))
    right_or_refused(lambda: torch.func.jvp(function, (q,), (gq,))[1], formula(gq))
    right_or_refused(lambda: torch.func.vmap(function)(q[None])[0], formula(q))
    right_or_refused(
        lambda: torch.func.grad(lambda x: (function(x) * gq).sum())(q), torch.func.vjp(formula, q)[1](gq)[0]
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, gq)
        right_or_refused(lambda: torch.autograd.forward_ad.unpack_dual(function(dual)).tangent, formula(gq))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_tensor_subclass_keeps_its_type(backend, device):
    q, _, _, cos, sin = make("usual", torch.float32, device)
    y = rope(q.as_subclass(Tagged), None, cos, sin, backend=backend)
    assert type(y) is Tagged
    torch.testing.assert_close(y.as_subclass(torch.Tensor), rope(q, None, cos, sin, backend="torch"))


# ---- the module --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_triton", [None, False, True])
def test_the_module_rotates_as_the_op_and_survives_copying(use_triton, device):
    q, k, _, cos, sin = make("usual", torch.float32, device)
    module = trinix.FastRoPEPositionEmbedding(16, ROWS, use_triton=use_triton).to(device)
    wanted = rope(q, k, cos, sin, offset=3, backend="torch")
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        results = one(q.requires_grad_(), k, offset=3)
        torch.testing.assert_close(results, wanted)
        expected = {True: ["triton"], False: ["torch"], None: ["torch", "triton"]}[use_triton]
        assert backend_that_ran(results[0]) in expected
        assert not one.state_dict()
    torch.testing.assert_close(module(q), rope(q, None, cos, sin, backend="torch"))
    torch.testing.assert_close(module(q, k, torch.tensor([5, 4], device=device))[1].shape, k.shape)
    torch.testing.assert_close(
        module.apply_rotary_pos_emb(q, k, *module.table(2)), rope(q, k, cos, sin, backend="torch")
    )
    torch.testing.assert_close(
        module(q[0], k[0], cu_seqlens=torch.tensor([0, 1, 2], device=device))[0].shape, q[0].shape
    )


def test_the_modules_table_grows_keeps_float32_and_moves(device):
    q = torch.ones(1, 10, 1, 8, device=device)
    module = trinix.FastRoPEPositionEmbedding(8, 4).to(device)
    torch.testing.assert_close(module(q), rope(q, None, *table(8, device), backend="torch"))
    assert module.cos.shape == (10, 4)
    module(q, offset=1)
    assert module.cos.shape == (15, 4)
    before = module.cos.clone()
    for moved in (module.half(), module.to(torch.float64), module.bfloat16()):
        assert moved.cos.dtype == torch.float32
        same(moved.cos, before)
    with torch.device("meta"):
        lazy = trinix.FastRoPEPositionEmbedding(8, 15)
    same(lazy.to_empty(device=device).cos, before)
    same(module.to_empty(device=device).sin, lazy.sin)


def test_the_module_passes_on_what_it_is_called_with(device):
    module = trinix.FastRoPEPositionEmbedding(16, 2).to(device)
    q, k, _, cos, sin = make("usual", torch.float32, device)
    ids = torch.tensor([[5, 1], [0, 3]], device=device)
    same(module.apply_rotary_pos_emb(q, k, cos, sin, ids), rope(q, k, cos, sin, position_ids=ids))
    pairs = trinix.FastRoPEPositionEmbedding(16, 2, interleaved=True, use_triton=True).to(device)
    same(pairs.apply_rotary_pos_emb(q, k, cos, sin), rope(q, k, cos, sin, interleaved=True, backend="triton"))
    wide = q.double()  # not Triton's: PyTorch runs it
    same((pairs(wide),), (rope(wide, None, cos, sin, interleaved=True, backend="torch"),))
    flat = normal((5, 2, 16), torch.float32, seed=1, device=device)
    edges = torch.tensor([0, 5], device=device)
    same((module(flat, cu_seqlens=edges),), (rope(flat, None, *module.table(5), cu_seqlens=edges),))
    wanted = rope(q, k, cos, sin)
    assert all(y is t for y, t in zip(module(q, k, inplace=True), (q, k), strict=True))
    same((q, k), wanted)


def test_a_table_that_grows_without_autograd_serves_with_it(device):
    module = trinix.FastRoPEPositionEmbedding(8, 4).to(device)
    q = torch.ones(1, 10, 1, 8, device=device)
    with torch.inference_mode():
        module(q)
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(module(q).sum(), q)
    same(gradient, torch.autograd.grad(rope(q, None, *table(8, device), backend="torch").sum(), q)[0])


TRANSFORMS = {
    "grad": lambda f, q: torch.func.grad(lambda a: f(a).sum())(q),
    "jvp": lambda f, q: torch.func.jvp(f, (q,), (q,)),
    "vmap": lambda f, q: torch.func.vmap(f)(q[None]),
    "fake tensors": lambda f, q: _without_values(f, q),
}


def _without_values(function, q):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return function(q)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_table_that_grows_in_a_transform_is_one_like_others(transform, device):
    module, q = trinix.FastRoPEPositionEmbedding(8, 4).to(device), torch.ones(1, 10, 1, 8, device=device)
    transform(module, q)
    same(copy.deepcopy(module).cos, table(8, device)[0][:10])
    torch.testing.assert_close(module(q), rope(q, None, *table(8, device), backend="torch"))


@pytest.mark.parametrize("compiled_again", [False, True])
def test_a_table_that_a_compiled_evaluation_grew_serves_training(compiled_again, fresh_dynamo, device):
    module, q = trinix.FastRoPEPositionEmbedding(8, 4).to(device), torch.ones(1, 10, 1, 8, device=device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        compiled(q)
    q.requires_grad_()
    (gradient,) = torch.autograd.grad((compiled if compiled_again else module)(q).sum(), q)
    same(gradient, torch.autograd.grad(rope(q, None, *table(8, device), backend="torch").sum(), q)[0])
    kept = module.longer
    module(q)
    assert module.longer is kept


def test_a_module_leaves_what_is_no_query_to_the_op():
    module = trinix.FastRoPEPositionEmbedding(8)
    with pytest.raises(TypeError, match="rope: q must be floating-point, got list"):
        module([1.0])
    with pytest.raises(ValueError, match=r"rope: q must be \[B, S, H, D\] or \[T, H, D\], got \[2, 8\]"):
        module(torch.ones(2, 8))
    with pytest.raises(TypeError, match="rope: offset must be an int"):
        module(torch.ones(1, 2, 1, 8), offset=None)
    for offset in ("1", 1.5):
        with pytest.raises(TypeError, match="rope: offset must be an int"):
            module(torch.ones(1, 2, 1, 8), offset=offset)
    with pytest.raises(ValueError, match="rope: offset must not be negative, got -20"):
        module(torch.ones(1, 2, 1, 8), offset=-20)


def test_a_module_with_wrong_arguments_is_refused_by_its_name():
    for wrong in (7, 0, -2, 8.0, True, [8]):
        with pytest.raises(ValueError, match="FastRoPEPositionEmbedding: dim must be an even int from 2 on, got"):
            trinix.FastRoPEPositionEmbedding(wrong)
    for wrong in (0, -1, 8.0, True, [8], None):
        with pytest.raises(
            ValueError, match="FastRoPEPositionEmbedding: max_position_embeddings must be an int from 1 on"
        ):
            trinix.FastRoPEPositionEmbedding(8, wrong)
    for wrong in (0.0, -1.0, "10000", None):
        with pytest.raises(ValueError, match="FastRoPEPositionEmbedding: base must be a number above 0, got"):
            trinix.FastRoPEPositionEmbedding(8, base=wrong)
    with pytest.raises(TypeError, match="FastRoPEPositionEmbedding: interleaved must be True or False, got 'no'"):
        trinix.FastRoPEPositionEmbedding(8, interleaved="no")
    with pytest.raises(TypeError, match="FastRoPEPositionEmbedding: use_triton must be None, True or False, got 'no'"):
        trinix.FastRoPEPositionEmbedding(8, use_triton="no")


def test_the_module_shows_its_arguments_and_refuses_the_documents_old_call():
    scaling = {"type": "linear", "factor": 2.0}
    module = trinix.FastRoPEPositionEmbedding(8, 16, 500.0, interleaved=True, scaling=scaling, use_triton=False)
    assert repr(module) == (
        "FastRoPEPositionEmbedding(8, max_position_embeddings=16, base=500.0, interleaved=True, "
        f"scaling={scaling}, use_triton=False)"
    )
    same(module.table(16), rope_table(16, 8, base=500.0, scaling=scaling))
    for wrong in (-1, 3.0, "3"):
        with pytest.raises(
            ValueError, match=f"FastRoPEPositionEmbedding: length must be an int from 0 on, got {wrong!r}"
        ):
            module.table(wrong)
    with pytest.raises(TypeError, match=r"k must be a tensor or None, got 512; \.table\(length\) returns cos and sin"):
        module(torch.ones(1, 3, 1, 8), 512)


# ---- the tests can fail ------------------------------------------------------------------------------------------------


@triton.jit
def _row_of_the_next_position(
    table,
    place,
    rows,
    stride,
    col,
    HALF: tl.constexpr,
    COLS: tl.constexpr,
    CHECKED: tl.constexpr,
    TABLE_VEC: tl.constexpr,
):
    return tl.load(table + (place + 1) * stride + col, mask=col < HALF, other=0.0).to(tl.float32)


@triton.jit
def _rest_forgotten(
    head, x_h, x_d, heads, D: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, DENSE: tl.constexpr
):
    col = tl.arange(0, REST)[None, :]
    return head * x_h + 2 * HALF + col, (head < heads) & (col < D - 2 * HALF - 1)


@pytest.mark.parametrize(("name", "broken"), [("_row", _row_of_the_next_position), ("_rest", _rest_forgotten)])
def test_a_broken_kernel_fails_the_oracle(name, broken, monkeypatch):
    monkeypatch.setattr(kernels, name, broken)
    made = make("partial", torch.float32, "cpu")
    for judge in (oracle, norm_oracle):
        with pytest.raises(AssertionError, match=r"^y: error"):
            judge(*made)


def test_a_program_that_does_not_run_fails_the_oracle(monkeypatch):
    run = _launch.Launch.__call__
    monkeypatch.setattr(_launch.Launch, "__call__", lambda self, blocks, *rest: run(self, blocks - 1, *rest))
    for judge in (oracle, norm_oracle):
        with pytest.raises(AssertionError, match="error"):
            judge(*make("usual", torch.float32, "cpu"))


# ---- on the card -------------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(
    "size",
    [
        (2, 700, 32, 8, 128, 128),
        (1, 513, 40, 40, 80, 80),
        (3, 65, 12, 1, 64, 16),
        (1, 600, 7, 5, 192, 64),
        (1, 33, 2, 2, 256, 256),
    ],
)
def test_on_the_card_results_and_gradients_hold_the_budget(size, dtype, interleaved):
    b, s, h, hk, d, r = size
    new = Numbers(dtype, "cuda")
    tables = rope_table(800, r, device="cuda")
    for layout in ("contiguous", "packed qkv", "heads before tokens", "padded heads"):
        q, k, gq, gk = (LAYOUTS[layout](new, b, s, heads, d) for heads in (h, hk, h, hk))
        for _ in range(2):  # Triton's own path, then the fast launch
            oracle(q, k, (gq, gk), *tables, interleaved=interleaved, offset=50)
            norm_oracle(q, k, (gq, gk), *tables, interleaved=interleaved, offset=50)
        ids = torch.randint(0, 800, (b, s), device="cuda")
        oracle(q, k, (gq, gk), *tables, interleaved=interleaved, position_ids=ids)


@gpu
def test_on_the_card_packed_sequences_and_expanded_gradients():
    new = Numbers(torch.bfloat16, "cuda")
    q, k = new(3000, 32, 128), new(3000, 8, 128)
    edges = torch.tensor([0, 5, 5, 1029, 2999, 3000], dtype=torch.int32, device="cuda")
    tables = rope_table(3000, 128, device="cuda")
    gradients = new(1).expand_as(q), new(1).expand_as(k)
    oracle(q, k, gradients, *tables, cu_seqlens=edges)
    norm_oracle(q, k, gradients, *tables, cu_seqlens=edges)


@gpu
def test_twenty_runs_give_the_same_bits():
    new = Numbers(torch.bfloat16, "cuda")
    q, k, gq, gk = (new(2, 2000, heads, 128) for heads in (32, 8, 32, 8))
    tables, weights = rope_table(2000, 128, device="cuda"), (new(128), new(128))
    run = lambda: pull(lambda *t: qk_norm_rope(*t, *tables), (q, k, *weights), (gq, gk))  # noqa: E731
    first = run()
    for _ in range(19):
        same(run(), first)


@gpu
def test_offsets_beyond_2_to_the_31_are_read_right():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    memory = torch.empty(2**31 + 2**21, dtype=torch.bfloat16, device="cuda")
    q = memory.as_strided((2, 3, 4, 64), (2**31, 1024, 128, 1))
    q.copy_(Numbers(torch.bfloat16, "cuda")(2, 3, 4, 64))
    gq = Numbers(torch.bfloat16, "cuda")(2, 3, 4, 64)
    oracle(q, q[:, :, :1], (gq, gq[:, :, :1]), *table(64, "cuda"))


@gpu
def test_a_cuda_graph_follows_an_offset_on_the_device():
    new = Numbers(torch.bfloat16, "cuda")
    q, k = new(16, 1, 32, 128), new(16, 1, 8, 128)
    tables = rope_table(4096, 128, device="cuda")
    offset = torch.zeros(16, dtype=torch.int32, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            rope(q, k, *tables, offset=offset)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = rope(q, k, *tables, offset=offset)
    for start in (0, 17, 4095):
        offset.fill_(start)
        graph.replay()
        same(list(results), list(rope(q, k, *tables, offset=offset)))
        torch.testing.assert_close(list(results), list(rope(q, k, *tables, offset=start, backend="torch")))


@gpu
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_inductor_compiles_it_whole(backend):
    q, k, gradients, cos, sin = make("usual", torch.float32, "cuda")
    function = lambda q, k: rope(q, k, cos, sin, offset=3, backend=backend)  # noqa: E731
    compiled_matches_eager(function, "inductor", (q, k), gradients)


def test_a_table_of_a_dynamic_length_is_exported():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.position = trinix.FastRoPEPositionEmbedding(8, 32)

        def forward(self, x):
            return x + self.position.table(x.shape[1])[0]

    x, lengths = torch.zeros(2, 6, 4), {1: torch.export.Dim("s", min=2, max=30)}
    exported = torch.export.export(Layer(), (x,), dynamic_shapes=(lengths,), strict=False).module()
    longer = torch.zeros(2, 9, 4)
    assert torch.equal(exported(longer), Layer()(longer))
    for length in (-1, 2.0, "3"):
        with pytest.raises(ValueError, match="FastRoPEPositionEmbedding: length must be an int from 0 on"):
            Layer().position.table(length)
        with pytest.raises(ValueError, match="FastRoPEPositionEmbedding: length must be an int from 0 on"):
            Layer().position.grow(length)


@pytest.mark.parametrize("strict", [False, True])
def test_a_table_that_grows_with_a_dynamic_length_is_exported_and_not_kept(strict, fresh_dynamo):
    module, q = trinix.FastRoPEPositionEmbedding(8, 4), torch.ones(1, 6, 1, 8)
    lengths = {"q": {1: torch.export.Dim("s", min=5, max=30)}}
    exported = torch.export.export(module, (q,), dynamic_shapes=lengths, strict=strict).module()
    assert module.longer is None
    for length in (5, 6, 20):
        longer = torch.ones(1, length, 1, 8)
        torch.testing.assert_close(exported(longer), rope(longer, None, *table(8, "cpu"), backend="torch"))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_table_that_grows_is_traced():
    module, q = trinix.FastRoPEPositionEmbedding(8, 4), torch.ones(1, 6, 1, 8)
    traced = torch.jit.trace(module, (q,))
    torch.testing.assert_close(traced(q), rope(q, None, *table(8, "cpu"), backend="torch"))
