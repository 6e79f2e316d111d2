"""Attention modules: outputs and the gradient of every parameter against float64 twins of plain matrix products, the drop-in
for torch.nn.MultiheadAttention, and what modules must survive. Caches: test_cache.py.
"""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import trinix
from trinix.testing import normal, vjp

LAYERS = {
    "self": lambda **o: trinix.FastMultiHeadSelfAttention(12, 3, **o),
    "grouped": lambda **o: trinix.FastGroupedQueryAttention(16, 4, 2, **o),
    "multi-query": lambda **o: trinix.FastMultiQueryAttention(12, 3, **o),
    "separate": lambda **o: trinix.FastMultiHeadAttention(12, 3, **o),
    "latent": lambda **o: trinix.FastMultiHeadLatentAttention(12, 3, 8, **{"rope_head_dim": 2} | o),
}
HEADED = [name for name in LAYERS if name != "latent"]
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "no bias": {"bias": False},
    "head_dim": {"head_dim": 6},
    "rope": {"position_method": "rope"},
    "rope in pairs": {"position_method": "rope", "rope_interleaved": True},
    "alibi": {"position_method": "alibi", "causal": True},
    "window": {"sliding_window_size": 2, "causal": True},
    "window to both sides": {"sliding_window_size": (1, 2)},
    "softcap and scale": {"softcap": 1.5, "scale": 0.7},
    "sequence first": {"batch_first": False},
}
MORE = {  # what latent attention does not have
    "qk_norm": {"qk_norm": True},
    "qk_norm and rope": {"qk_norm": True, "position_method": "rope"},
    "qk_norm by layernorm": {"qk_norm": True, "qk_norm_type": "layernorm", "position_method": "rope"},
    "zero": {"add_zero_attn": True, "causal": True},
}
LATENT = {
    "no position": {"position_method": "none"},
    "queries without a latent": {"q_latent_dim": 0},
    "no norm": {"latent_norm": False, "q_latent_dim": 6},
    "value width": {"v_head_dim": 6},
}
CASES = (
    [(n, o) for n in LAYERS for o in OPTIONS]
    + [(n, o) for n in HEADED for o in MORE]
    + [("latent", o) for o in (*LATENT, "zero")]
)
BATCH, LENGTH = 2, 5


def filled(layer):
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            scale = 1.0 if parameter.dim() == 1 else 0.4
            parameter.copy_(normal(parameter.shape, parameter.dtype, seed=7 + i, device=parameter.device, scale=scale))
    return layer


# ---- the twin: plain products, softmax written out, a loop over nothing that the layer could share -----------------------------


def turned(x, base, interleaved):
    """RoPE of [B, S, H, R] for positions 0 .. S - 1, with a float32 table as the layer has it."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)[:, None, None] * frequency
    cos, sin = angle.cos().float().to(x.dtype), angle.sin().float().to(x.dtype)
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    return torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)


def softmax_of(layer, q, k, v, causal, more=None):
    """[B, Sq, H Dv] of heads [B, S, H, D]; ``more`` is added to the scores, or False in it hides."""
    keys, group = k.shape[1], q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2).transpose(1, 2) for t in (k, v))
    z = q.transpose(1, 2) @ k.mT * (layer.scale or q.shape[-1] ** -0.5)
    if layer.softcap:
        z = layer.softcap * torch.tanh(z / layer.softcap)
    distance = torch.arange(keys, device=q.device) - torch.arange(keys - q.shape[1], keys, device=q.device)[:, None]
    if layer.position_method == "alibi":
        z = z - trinix.ops.alibi_slopes(q.shape[2], q.device)[:, None, None] * distance.abs()
    left, right = layer.window or (None, None)
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen &= distance <= 0 if causal else seen
    seen &= distance >= -left if left is not None else seen
    seen &= distance <= right if right is not None else seen
    z = z.masked_fill(~seen, float("-inf"))
    if more is not None:
        z = z.masked_fill(~more, float("-inf")) if more.dtype == torch.bool else z + more
    if getattr(layer, "add_zero_attn", False):
        z = torch.cat((z, z.new_zeros(*z.shape[:-1], 1)), -1)
    p = z.softmax(-1)[..., :keys]
    return (p @ v).transpose(1, 2).flatten(2)


def normed(layer, norm, x, weights, name):
    if getattr(layer, norm) is None:
        return x
    eps = getattr(layer, norm).eps
    if isinstance(getattr(layer, norm), nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)
    return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], eps)


def twin(layer, causal=None, more=None):
    """The layer as a function of x and its parameters, or of (query, key, value) and its parameters."""
    names = [name for name, _ in layer.named_parameters()]
    causal = layer.causal if causal is None else causal

    def heads(x, w, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias")).unflatten(-1, (-1, layer.head_dim))

    def placed(x, w, norm):
        x = normed(layer, norm, x, w, norm)
        return turned(x, layer.position.base, layer.position.interleaved) if layer.position_method == "rope" else x

    def latent(x, w):
        rope, n, wide = layer.rope_head_dim, layer.head_dim, layer.latent_dim

        def linear(x, name):
            return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

        down = normed(layer, "q_norm", linear(x, "q_down_proj"), w, "q_norm") if layer.q_latent_dim else x
        q = linear(down, "q_up_proj").unflatten(-1, (layer.num_heads, -1))
        row = linear(x, "kv_down_proj")
        kv = linear(normed(layer, "kv_norm", row[..., :wide], w, "kv_norm"), "kv_up_proj").unflatten(
            -1, (layer.num_heads, -1)
        )
        k, v = kv[..., :n], kv[..., n:]
        if rope:
            base, pairs = layer.position.base, layer.position.interleaved
            k_rope = turned(row[..., None, wide:], base, pairs).expand(-1, -1, layer.num_heads, -1)
            q = torch.cat((turned(q[..., :rope], base, pairs), q[..., rope:]), -1)
            k = torch.cat((k_rope, k), -1)
        return q, k, v

    def call(*inputs):
        count = len(inputs) - len(names)
        xs, w = inputs[:count], dict(zip(names, inputs[count:], strict=True))
        if not layer.batch_first:
            xs = [x.transpose(0, 1) for x in xs]
        query, key, value = xs if count == 3 else xs * 3
        if isinstance(layer, trinix.FastMultiHeadLatentAttention):
            q, k, v = latent(query, w)
        elif isinstance(layer, trinix.FastMultiHeadAttention):
            q, k, v = (heads(x, w, f"{n}_proj") for n, x in (("q", query), ("k", key), ("v", value)))
        else:
            q, k, v = heads(query, w, "qkv_proj").split((layer.num_heads, layer.num_kv_heads, layer.num_kv_heads), 2)
        if not isinstance(layer, trinix.FastMultiHeadLatentAttention):
            q, k = placed(q, w, "q_norm"), placed(k, w, "k_norm")
        out = softmax_of(layer, q, k, v, causal, more)
        out = F.linear(out, w["o_proj.weight"], w.get("o_proj.bias"))
        return out if layer.batch_first else out.transpose(0, 1)

    return call


def called(layer, **arguments):
    names = [name for name, _ in layer.named_parameters()]

    def call(*inputs):
        count = len(inputs) - len(names)
        return torch.func.functional_call(
            layer, dict(zip(names, inputs[count:], strict=True)), inputs[:count], arguments
        )

    return call


def judge(layer, xs, dy, arguments=None, **plain):
    """Output and gradients of the inputs and of every parameter, against the twin's in float64.

    The layer runs in float64 too: exactly the twin, to float64's rounding. In the dtype at hand its root mean square error
    may be twice the twin's plus a rounding, the budget of ``trinix.testing``; the largest of a few hundred errors behind five
    products is luck, and the ops' own tests judge it. A parameter's gradient is a sum over the tokens that may cancel
    (k_proj.bias's does, to 0): it has the roundings of its terms, as large as the largest gradient.
    """
    arguments = arguments or {}
    leaves = [*xs, *(p.detach() for p in layer.parameters())]
    doubles = [t.double() for t in leaves]
    true = vjp(twin(layer, **plain), doubles, dy.double())
    if xs[0].device.type == "cpu":
        exact = copy.deepcopy(layer).double()
        torch.testing.assert_close(vjp(called(exact, **as_double(arguments)), doubles, dy.double()), true)
    got = vjp(called(layer, **arguments), leaves, dy)
    low = vjp(twin(layer, **plain), leaves, dy)
    names = ["y", *(f"dx{i}" for i in range(len(xs))), *(name for name, _ in layer.named_parameters())]
    rounding = torch.finfo(dy.dtype).eps * max(rms(t) for t in true) * (BATCH * LENGTH) ** 0.5
    for name, ours, theirs, exactly in zip(names, got, low, true, strict=True):
        budget = 2 * rms(theirs - exactly) + rounding
        assert ours.dtype == dy.dtype, name
        assert rms(ours - exactly) <= budget, (name, rms(ours - exactly), budget)


def as_double(arguments):
    return {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in arguments.items()}


def rms(t):
    return float(t.double().square().mean().sqrt())


def alike(got, wanted):
    """Equal to float32's rounding of sums that may cancel."""
    size = max(rms(t) for t in wanted)
    assert all(rms(a - b) <= 1e-5 * size for a, b in zip(got, wanted, strict=True))


def made(name, options, dtype=torch.float32, device="cpu"):
    layer = filled(LAYERS[name](**options, dtype=dtype, device=device))
    shape = (BATCH, LENGTH, layer.embed_dim) if layer.batch_first else (LENGTH, BATCH, layer.embed_dim)
    x, dy = (normal(shape, dtype, seed=i, device=device) for i in (1, 2))
    return layer, x, dy


@pytest.mark.parametrize(("name", "option"), CASES)
def test_output_and_every_gradient_are_those_of_plain_products(name, option, device):
    layer, x, dy = made(name, (OPTIONS | MORE | LATENT)[option], device=device)
    judge(layer, [x], dy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("option", ["plain", "causal", "rope"])
@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_is_as_good_as_pytorchs(name, option, dtype, device):
    layer, x, dy = made(name, OPTIONS[option], dtype, device)
    judge(layer, [x], dy)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (lambda **o: trinix.FastMultiHeadSelfAttention(256, 4, **o), ()),
        (lambda **o: trinix.FastGroupedQueryAttention(256, 4, 2, causal=True, **o), ()),
        (lambda **o: trinix.FastMultiQueryAttention(256, 4, **o), ()),
        (lambda **o: trinix.FastMultiHeadAttention(256, 4, **o), ()),
        (lambda **o: trinix.FastMultiHeadLatentAttention(256, 4, 64, position_method="none", **o), ()),
        (lambda **o: trinix.FastMultiHeadSelfAttention(256, 4, position_method="rope", **o), ("aten::cat",)),
    ],
    ids=["self", "grouped", "multi-query", "separate", "latent", "rope has gradients of its own"],
)
def test_backward_on_hopper_joins_no_slices_and_adds_no_gradients_of_x(layer, expected):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a card of compute capability 9.0")
    layer = filled(layer(dtype=torch.bfloat16, device="cuda"))
    x, dy = (normal((2, 200, 256), torch.bfloat16, seed=i, device="cuda") for i in (1, 2))
    judge(layer, [x], dy)
    x.requires_grad_()
    with torch.profiler.profile() as profile:
        torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
    seen = {event.key for event in profile.key_averages()} & {"aten::cat", "aten::add", "aten::add_"}
    assert seen == set(expected)


# ---- masks ---------------------------------------------------------------------------------------------------------------

SEEN = torch.rand(BATCH, 3, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) > 0.3
SEEN[..., 0] = True


@pytest.mark.parametrize(
    "mask",
    [SEEN[0, 0], SEEN[:, 0], SEEN[:, :1], SEEN, SEEN[:, :, :1]],
    ids=lambda m: "x".join(map(str, m.shape)),
)
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("name", ["self", "separate", "latent"])
def test_a_mask_says_what_is_seen_or_what_is_added(name, mask, additive, device):
    layer, x, dy = made(name, {}, device=device)
    mask = (normal(mask.shape, torch.float32, seed=5) if additive else mask).to(device)
    judge(layer, [x], dy, {"attention_mask": mask}, more=mask[:, None] if mask.dim() == 3 else mask)


@pytest.mark.parametrize("name", LAYERS)
def test_padding_is_hidden_and_goes_with_a_mask(name, device):
    layer, x, dy = made(name, {"causal": True}, device=device)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]], device=device)
    judge(layer, [x], dy, {"key_padding_mask": padding}, more=~padding[:, None, None])
    seen = SEEN[:, :1].to(device)
    judge(layer, [x], dy, {"key_padding_mask": padding, "attention_mask": seen}, more=seen & ~padding[:, None, None])


@pytest.mark.parametrize("name", LAYERS)
def test_a_query_that_sees_nothing_gives_what_o_proj_makes_of_0(name, device):
    layer, x, _ = made(name, {}, device=device)
    nothing = torch.zeros(LENGTH, LENGTH, dtype=torch.bool, device=device)
    y = layer(x, attention_mask=nothing)
    torch.testing.assert_close(y, layer.o_proj.bias.expand_as(y))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


def test_a_mask_of_another_kind_is_refused_by_name():
    layer, x, _ = made("self", {})
    with pytest.raises(TypeError, match=r"attention_mask must be bool or floating point, got torch.int64; convert"):
        layer(x, torch.ones(LENGTH, LENGTH, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"attention_mask must be bool or floating point, got str"):
        layer(x, "causal")
    with pytest.raises(ValueError, match=r"key_padding_mask must be \[B, Sk\] = \[2, 5\], got \[5\]"):
        layer(x, key_padding_mask=torch.zeros(5, dtype=torch.bool))
    layer, x, _ = made("separate", {})
    with pytest.raises(TypeError, match=r"attn_mask must be bool or floating point, got list"):
        layer(x, attn_mask=[[False] * LENGTH] * LENGTH)
    with pytest.raises(TypeError, match=r"key_padding_mask must be bool or floating point, got list"):
        layer(x[0], key_padding_mask=[False] * LENGTH)


# ---- positions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_position_ids_replace_the_count(name, qk_norm, device):
    if name == "latent" and qk_norm:
        pytest.skip("latent attention norms its latents")
    layer, x, _ = made(name, {"position_method": "rope"} | ({"qk_norm": True} if qk_norm else {}), device=device)
    order = torch.tensor([4, 2, 0, 1, 3], device=device)
    shuffled = layer(x[:, order], position_ids=order[None].expand(BATCH, -1))
    torch.testing.assert_close(shuffled, layer(x)[:, order])
    torch.testing.assert_close(layer(x, position_ids=torch.arange(7, 7 + LENGTH, device=device)), layer(x))
    short, _, _ = made(
        name, {"position_method": "rope", "max_seq_len": 2}, device=device
    )  # whose table grows for them too
    shuffled = short(x[:, order], position_ids=order)
    torch.testing.assert_close(shuffled, short(x)[:, order])


def test_a_module_of_ones_own_places_q_and_k(device):
    class Doubling(nn.Module):
        def forward(self, q, k, position_ids=None, offset=0):
            self.given = position_ids, offset
            return q * 2, k

    layer, x, _ = made("grouped", {"position_method": Doubling()}, device=device)
    plain = LAYERS["grouped"](scale=2 * layer.head_dim**-0.5).to(device)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x))
    assert layer.position.given == (None, 0)


def test_a_module_that_makes_a_bias_places_nothing():
    for name in HEADED:
        with pytest.raises(TypeError, match=r"got FastALiBiPositionEmbedding, which makes a bias; give 'alibi'"):
            LAYERS[name](position_method=trinix.FastALiBiPositionEmbedding(4))


def test_positions_that_nobody_reads_are_refused():
    layer, x, _ = made("self", {"position_method": "alibi"})
    with pytest.raises(ValueError, match="position_ids need position_method 'rope' or a module, this one has 'alibi'"):
        layer(x, position_ids=torch.arange(LENGTH))


def test_a_window_of_one_number_is_the_nearest_keys_back_with_ones_own():
    for causal, wanted in ((True, (2, 0)), (False, (2, 2))):
        assert trinix.FastMultiHeadSelfAttention(12, 3, causal=causal, sliding_window_size=3).window == wanted
    layer, x, _ = made("self", {"causal": True, "sliding_window_size": 3})
    back = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    layer.window, wanted = None, layer(x)
    torch.testing.assert_close(layer(x, attention_mask=back < 3), wanted)


# ---- torch.nn.MultiheadAttention ---------------------------------------------------------------------------------------------


def cross(device, **options):
    layer = filled(trinix.FastMultiHeadAttention(12, 3, kdim=6, vdim=7, device=device, **options))
    xs = [normal(s, torch.float32, seed=i, device=device) for i, s in enumerate([(2, 5, 12), (2, 4, 6), (2, 4, 7)])]
    return layer, xs, normal((2, 5, 12), torch.float32, seed=9, device=device)


@pytest.mark.parametrize("options", [{}, {"causal": True, "bias": False}, {"qk_norm": True}, {"add_zero_attn": True}])
def test_cross_attention_has_widths_lengths_and_gradients_of_its_own(options, device):
    layer, xs, dy = cross(device, **options)
    if options.get("causal"):
        xs[0], dy = xs[0][:, :3], dy[:, :3]
    judge(layer, xs, dy)
    few = [xs[0][:, :3], *xs[1:]]  # a first query sees a key
    judge(layer, few, dy[:, :3], {"is_causal": True}, causal=True)


def test_queries_and_keys_of_different_lengths_count_their_positions_from_0(device):
    layer, xs, dy = cross(device, position_method="rope")
    judge(layer, xs, dy)
    with pytest.raises(ValueError, match="got 5 queries and 4 keys"):
        layer(*xs, position_ids=torch.arange(5, device=device))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"kdim": 6, "vdim": 7},
        {"add_zero_attn": True},
        {"add_bias_kv": True},
    ],
)
def test_it_takes_over_torchs_module_and_all_its_arguments(options, device):
    theirs = filled(nn.MultiheadAttention(12, 3, **options, device=device))
    ours = trinix.FastMultiHeadAttention.from_torch(theirs)
    first = options.get("batch_first", False)
    shapes = [(2, 5, 12), (2, 4, options.get("kdim", 12)), (2, 4, options.get("vdim", 12))]
    xs = [normal(s, torch.float32, seed=i, device=device) for i, s in enumerate(shapes)]
    xs = xs if first else [x.transpose(0, 1).contiguous() for x in xs]
    padding = torch.tensor([[False] * 4, [False, False, True, True]], device=device)
    masks = [
        {},
        {"key_padding_mask": padding},
        {"attn_mask": torch.ones(5, 4, dtype=torch.bool, device=device).triu(1)},
        {"attn_mask": normal((6, 5, 4), torch.float32, seed=5, device=device)},
        {"attn_mask": normal((5, 4), torch.float32, seed=5, device=device), "key_padding_mask": padding.float() * -3},
    ]
    for arguments in masks:
        for average in (True, False):
            wanted = theirs(*xs, **arguments, average_attn_weights=average)
            torch.testing.assert_close(ours(*xs, **arguments, need_weights=True, average_attn_weights=average), wanted)
        torch.testing.assert_close(ours(*xs, **arguments), wanted[0])
        assert ours(*xs, **arguments).is_contiguous()
    alone = [x[0] if first else x[:, 0] for x in xs]
    torch.testing.assert_close(ours(*alone, need_weights=True), theirs(*alone))
    for one in (ours, theirs):
        y = one(*xs, need_weights=True)[0]
        one.zero_grad()
        y.square().sum().backward()
    alike([ours.o_proj.weight.grad], [theirs.out_proj.weight.grad])


def our_names(theirs):
    """Gradients of torch's module under the names of ours."""
    found = {name: p.grad for name, p in theirs.named_parameters()}
    for kind in ("weight", "bias"):
        if (whole := found.pop(f"in_proj_{kind}", None)) is not None:
            found |= {f"{p}_proj.{kind}": t for p, t in zip("qkv", whole.chunk(3), strict=True)}
    return {n.replace("_proj_weight", "_proj.weight").replace("out_", "o_"): g for n, g in found.items()}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"kdim": 6, "vdim": 7}, {"add_zero_attn": True}, {"add_zero_attn": True, "kdim": 6}],
)
def test_a_bias_of_keys_and_values_is_torchs_with_every_gradient(options, need_weights, batch_first, device):
    options = options | {"add_bias_kv": True, "batch_first": batch_first, "device": device}
    theirs = filled(nn.MultiheadAttention(12, 3, **options))
    ours = trinix.FastMultiHeadAttention(12, 3, **options)
    ours.load_state_dict(theirs.state_dict())
    assert "add_bias_kv=True" in repr(ours)
    widths = 12, options.get("kdim", 12), options.get("vdim", 12)
    xs = [normal((2, n, w), torch.float32, seed=n, device=device) for n, w in zip((5, 4, 4), widths, strict=True)]
    xs = [(x if batch_first else x.transpose(0, 1).contiguous()).requires_grad_() for x in xs]
    padding = torch.tensor([[False] * 4, [False, True, True, True]], device=device)
    hidden = torch.ones(5, 4, dtype=torch.bool, device=device).triu(1)
    added = normal((6, 5, 4), torch.float32, seed=5, device=device).requires_grad_()
    calls = [
        {}, {"key_padding_mask": padding}, {"attn_mask": hidden}, {"attn_mask": hidden, "key_padding_mask": padding},
        {"attn_mask": added}, {"key_padding_mask": padding.float() * -3, "attn_mask": added},
    ]  # fmt: skip
    for call in calls:
        leaves = [*xs, *([added] if call.get("attn_mask") is added else [])]
        results = []
        for layer in (ours, theirs):
            for leaf in (*leaves, *layer.parameters()):
                leaf.grad = None
            out, weights = layer(*xs, **call, need_weights=need_weights, average_attn_weights=False)
            dy = normal(out.shape, torch.float32, seed=3, device=device)
            (out * dy).sum().backward()
            grads = {n: p.grad for n, p in layer.named_parameters()} if layer is ours else our_names(layer)
            results.append((out, weights, [x.grad for x in leaves], grads))
        (out, weights, dxs, grads), (their_out, their_weights, their_dxs, their_grads) = results
        torch.testing.assert_close((out, weights), (their_out, their_weights))
        assert grads.keys() == their_grads.keys()
        names = sorted(grads)
        alike([*dxs, *(grads[n] for n in names)], [*their_dxs, *(their_grads[n] for n in names)])
        alike([grads["bias_k"], grads["bias_v"]], [their_grads["bias_k"], their_grads["bias_v"]])


@pytest.mark.parametrize("need_weights", [None, True])
@pytest.mark.parametrize("queries", [2, 4, 6, 7])
def test_every_query_of_a_causal_layer_sees_the_bias_of_keys(queries, need_weights, device):
    layer = filled(trinix.FastMultiHeadAttention(12, 3, causal=True, add_bias_kv=True, device=device))
    x, y = (normal((2, n, 12), torch.float32, seed=n, device=device) for n in (queries, 4))
    later = torch.ones(queries, 4, dtype=torch.bool, device=device).triu(4 - queries + 1)
    theirs = nn.MultiheadAttention(12, 3, add_bias_kv=True, batch_first=True, device=device)
    parts = layer.state_dict()
    state = {k: parts[k] for k in ("bias_k", "bias_v")} | {
        f"out_proj.{k}": parts[f"o_proj.{k}"] for k in ("weight", "bias")
    }
    state |= {f"in_proj_{k}": torch.cat([parts[f"{p}_proj.{k}"] for p in "qkv"]) for k in ("weight", "bias")}
    theirs.load_state_dict(state)
    wanted = theirs(x, y, y, attn_mask=later)
    got = layer(x, y, y, need_weights=need_weights)
    torch.testing.assert_close(got, wanted if need_weights else wanted[0])
    narrow = torch.zeros(
        2, 1, 1, 1, dtype=torch.bool, device=device
    )  # a mask of one column hides every key but that one
    torch.testing.assert_close(layer(x, y, y, attention_mask=narrow), layer(x, y[:, :0], y[:, :0]))


@pytest.mark.parametrize("queries", [2, 4, 7])
def test_the_last_rotated_query_of_a_causal_layer_stands_at_the_last_key(queries, device):
    """So that the pairs of both agree with those of as many queries as keys."""
    layer = filled(trinix.FastMultiHeadAttention(12, 3, causal=True, position_method="rope", device=device))
    x, y = (normal((2, n, 12), torch.float32, seed=n, device=device) for n in (7, 4))
    both = min(queries, 4)
    torch.testing.assert_close(layer(x[:, -queries:], y)[:, -both:], layer(x[:, -4:], y)[:, -both:])


def test_a_bias_of_keys_begins_as_torchs_and_is_refused_with_a_cache():
    layer = trinix.FastMultiHeadAttention(64, 4, causal=True, add_bias_kv=True)
    for extra in (layer.bias_k, layer.bias_v):
        assert extra.shape == (1, 1, 64)
        assert 0.5 < float(extra.detach().std()) * 64**0.5 < 2
    with pytest.raises(ValueError, match="FastMultiHeadAttention: a cache knows no bias_k; make the layer without"):
        layer(torch.ones(1, 1, 64), cache=trinix.DynamicCache())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, 2, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 7}, {"add_bias_kv": True}])
def test_a_state_of_torchs_module_is_loaded(options, assign):
    theirs = nn.ModuleDict({"attn": filled(nn.MultiheadAttention(12, 3, batch_first=True, **options))})
    with torch.device("meta" if assign else "cpu"):
        ours = nn.ModuleDict({"attn": trinix.FastMultiHeadAttention(12, 3, **options)})
    state = theirs.state_dict()
    names = list(state)
    ours.load_state_dict(state, assign=assign)
    assert list(state) == names
    xs = [normal((2, n, options.get(w, 12)), torch.float32, seed=n) for n, w in ((5, ""), (4, "kdim"), (4, "vdim"))]
    torch.testing.assert_close(ours["attn"](*xs), theirs["attn"](*xs)[0])
    same = trinix.FastMultiHeadAttention(12, 3, **options)
    same.load_state_dict(ours["attn"].state_dict())
    torch.testing.assert_close(same(*xs), ours["attn"](*xs), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj.weight", "bias_v"])
def test_torchs_module_is_not_taken_over_without_its_weights(name):
    theirs = nn.MultiheadAttention(12, 3, add_bias_kv=name == "bias_v")
    owner, _, weight = name.rpartition(".")
    parametrize.register_parametrization(theirs.get_submodule(owner), weight, nn.Identity())
    with pytest.raises(ValueError, match=r"from_torch found no \['.*(weight|bias_v)'\] in the module's state"):
        trinix.FastMultiHeadAttention.from_torch(theirs)


@pytest.mark.parametrize("kdim", [None, 12, 7])
def test_options_go_before_what_torchs_module_was_made_with(kdim):
    theirs = nn.MultiheadAttention(12, 3, dropout=0.5, kdim=kdim)
    ours = trinix.FastMultiHeadAttention.from_torch(theirs, batch_first=True, dropout=0.1, qk_norm=True)
    assert (ours.batch_first, ours.dropout, ours.kdim) == (True, 0.1, kdim or 12)
    torch.testing.assert_close(ours.o_proj.weight, theirs.out_proj.weight)
    with pytest.raises(ValueError, match=r"from_torch has no place for the module's \['.*bias'\]; give no options"):
        trinix.FastMultiHeadAttention.from_torch(theirs, bias=False)


@pytest.mark.parametrize("kdim", [None, 7])
def test_what_is_frozen_in_torchs_module_stays_frozen(kdim):
    theirs = nn.MultiheadAttention(12, 3, kdim=kdim, add_bias_kv=True)
    (theirs.in_proj_weight if kdim is None else theirs.k_proj_weight).requires_grad_(False)
    theirs.out_proj.bias.requires_grad_(False)
    theirs.bias_v.requires_grad_(False)
    ours = trinix.FastMultiHeadAttention.from_torch(theirs, qk_norm=True)
    frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
    rows = ["k_proj.weight"] if kdim else [f"{p}_proj.weight" for p in "qkv"]
    assert frozen == {*rows, "o_proj.bias", "bias_v"}


@pytest.mark.parametrize("training", [True, False])
def test_torchs_module_is_taken_over_in_its_mode(training):
    assert trinix.FastMultiHeadAttention.from_torch(nn.MultiheadAttention(8, 2).train(training)).training == training


def test_torchs_module_is_not_taken_over_without_its_hooks():
    theirs = nn.MultiheadAttention(12, 3)
    handle = theirs.register_forward_hook(lambda _, __, y: y)
    with pytest.raises(
        TypeError, match=r"from_torch got a module with hooks \(_forward_hooks\), which ours would not run"
    ):
        trinix.FastMultiHeadAttention.from_torch(theirs)
    handle.remove()
    theirs.forward = lambda x: x
    with pytest.raises(TypeError, match="from_torch got a module with a forward of its own, which ours would not run"):
        trinix.FastMultiHeadAttention.from_torch(theirs)


def test_a_state_of_torchs_module_that_does_not_fit_is_refused_as_torch_does():
    ours = trinix.FastMultiHeadAttention(12, 3)
    for module, text in (
        (nn.MultiheadAttention(12, 3, add_bias_kv=True), r'Unexpected key\(s\) in state_dict: "bias_k", "bias_v"'),
        (nn.MultiheadAttention(12, 3, bias=False), r'Missing key\(s\) in state_dict: "q_proj.bias"'),
        (nn.MultiheadAttention(9, 3), r"size mismatch for q_proj.weight"),
    ):
        with pytest.raises(RuntimeError, match=text):
            ours.load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "in_proj_weight"'):
        ours.load_state_dict(ours.state_dict() | {"in_proj_weight": torch.ones(2, 2)})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_torchs_own_layers_may_hold_it(batch_first, training, device):
    options = {"dropout": 0.0, "batch_first": batch_first, "device": device}
    encoder = nn.TransformerEncoder(filled(nn.TransformerEncoderLayer(12, 3, 24, **options)), 2).train(training)
    decoder = filled(nn.TransformerDecoderLayer(12, 3, 24, **options)).train(training)
    ours = copy.deepcopy(encoder), copy.deepcopy(decoder)
    for layer in (*ours[0].layers, ours[1]):
        for name, module in list(layer.named_children()):
            if isinstance(module, nn.MultiheadAttention):
                setattr(layer, name, trinix.FastMultiHeadAttention.from_torch(module))
    x = normal((2, 2, 12), torch.float32, seed=1, device=device)  # lengths as the batch: nothing stops a wrong [0]
    torch.testing.assert_close(ours[0](x), encoder(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours[1](x, x.flip(0)), decoder(x, x.flip(0)), atol=1e-5, rtol=1e-4)


def test_saying_need_weights_asks_for_torchs_pair():
    layer, xs, _ = cross("cpu")
    out, weights = layer(*xs, need_weights=False)
    assert weights is None
    torch.testing.assert_close(out, layer(*xs), rtol=0, atol=0)


def test_the_hint_is_causal_adds_nothing_to_a_mask_of_torchs():
    theirs = filled(nn.MultiheadAttention(12, 3, batch_first=True))
    x, memory = normal((2, 6, 12), torch.float32, seed=1), normal((2, 4, 12), torch.float32, seed=2)
    arguments = {"attn_mask": torch.ones(6, 4, dtype=torch.bool).triu(1), "is_causal": True}
    wanted = theirs(x, memory, memory, **arguments)[0]
    torch.testing.assert_close(trinix.FastMultiHeadAttention.from_torch(theirs)(x, memory, memory, **arguments), wanted)


@pytest.mark.parametrize("need_weights", [None, True])
@pytest.mark.parametrize("method", ["none", "rope", "alibi"])
def test_the_last_queries_of_a_causal_layer_stand_at_the_last_keys(method, need_weights, device):
    layer, x, _ = made("separate", {"causal": True, "position_method": method}, device=device)
    out = layer(x[:, 3:], x, x, need_weights=need_weights)
    torch.testing.assert_close(out if need_weights is None else out[0], layer(x)[:, 3:])


def test_weights_and_output_share_one_dropout(device):
    layer, xs, _ = cross(device, dropout=0.5)
    out, weights = layer(*xs, need_weights=True, average_attn_weights=False)
    assert bool((weights == 0).any())
    value = layer.v_proj(xs[2]).unflatten(-1, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(out, layer.o_proj((weights @ value).transpose(1, 2).flatten(2)))


def test_masks_of_torch_and_ours_are_not_given_together():
    layer, xs, _ = cross("cpu")
    mask = torch.zeros(5, 4)
    with pytest.raises(ValueError, match="attn_mask and attention_mask are one thing"):
        layer(*xs, attn_mask=mask, attention_mask=mask)
    with pytest.raises(TypeError, match=r"from_torch wants a torch\.nn\.MultiheadAttention, got Linear"):
        trinix.FastMultiHeadAttention.from_torch(nn.Linear(12, 3))


# ---- what modules must survive --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_is_for_training_and_keeps_the_mean(name, device):
    layer, x, _ = made(name, {"dropout": 0.4, "position_method": "none"}, device=device)
    many = x[:1].expand(400, -1, -1)
    assert not torch.equal(layer(x), layer(x))
    samples = layer(many)
    layer.eval()
    error, spread = (samples.mean(0) - layer(x[:1])[0]).abs(), samples.std(0) / len(samples) ** 0.5
    assert bool((error <= 6 * spread + 1e-6).all())
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", ["none", "rope", "alibi"])
def test_a_layer_survives_copying_pickling_loading_and_the_meta_device(name, method):
    layer, x, _ = made(name, {"position_method": method} | ({} if name == "latent" else {"qk_norm": True}))
    with torch.device("meta"):
        empty = LAYERS[name](position_method=method, **({} if name == "latent" else {"qk_norm": True}))
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    loaded = empty.to_empty(device="cpu")
    loaded.reset_parameters()
    assert all(p.isfinite().all() for p in loaded.parameters())
    assert loaded(x).isfinite().all()
    assert loaded.state_dict().keys() == layer.state_dict().keys()
    loaded.load_state_dict(layer.state_dict())
    for one in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        torch.testing.assert_close(one(x), layer(x), rtol=0, atol=0)
    assert type(layer).__name__ in repr(layer)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", ["none", "rope", "alibi"])
def test_torch_s_skip_init_makes_a_layer_to_load_into(name, method):
    layer, x, _ = made(name, {"position_method": method})
    sizes = {"grouped": (16, 4, 2), "latent": (12, 3, 8)}.get(name, (12, 3))
    more = {"rope_head_dim": 2} if name == "latent" else {}
    empty = torch.nn.utils.skip_init(type(layer), *sizes, position_method=method, **more)
    assert not any(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    empty.load_state_dict(layer.state_dict())
    torch.testing.assert_close(empty(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", ["none", "rope", "alibi"])
def test_a_layer_on_the_meta_device_takes_the_tensors_of_a_state(name, method):
    layer, x, _ = made(name, {"position_method": method})
    with torch.device("meta"):
        empty = LAYERS[name](position_method=method)
    model = torch.nn.Sequential(empty)
    model.load_state_dict({f"0.{key}": value for key, value in layer.state_dict().items()}, assign=True)
    assert empty.o_proj.weight.data_ptr() == layer.o_proj.weight.data_ptr()
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), layer(x), rtol=0, atol=0)


def _norm_hook(norm):
    norm.register_forward_hook(lambda _, __, y: 1.5 * y)
    return norm


def _norm_offset(norm):
    changed = trinix.FastRMSNorm(norm.weight.shape[0], norm.eps, weight_offset=1.0)
    changed.load_state_dict(norm.state_dict())
    return changed


def _norm_eps(norm):
    norm.eps = 1.0
    return norm


@pytest.mark.parametrize("change", [_norm_hook, _norm_offset, _norm_eps, lambda norm: torch.nn.Identity()])
@pytest.mark.parametrize("which", ["q_norm", "k_norm"])
def test_a_norm_that_does_more_than_scale_is_called(which, change):
    layer, x, _ = made("grouped", {"position_method": "rope", "qk_norm": True})
    setattr(layer, which, change(getattr(layer, which)))
    y = layer(x)
    layer.position_method, layer.position = (
        "module",
        layer.position,
    )  # the same positions, never in one kernel with the norms
    torch.testing.assert_close(y, layer(x))


def test_norm_and_rotation_in_one_turn_the_same_pairs_as_apart():
    layer, x, _ = made("grouped", {"position_method": "rope", "rope_interleaved": True, "qk_norm": True})
    together = layer(x)
    layer.position.register_forward_hook(lambda _, __, qk: qk)  # which the kernel of both would not run
    torch.testing.assert_close(layer(x), together)


def test_a_hook_of_the_positions_runs():
    layer, x, _ = made("grouped", {"position_method": "rope", "qk_norm": True})
    layer.position.register_forward_hook(lambda module, args, qk: (qk[0] * 0, qk[1]))
    (bias, heads) = layer.o_proj.bias, layer.qkv_proj(x).unflatten(-1, (-1, layer.head_dim))
    v = heads[:, :, -layer.num_kv_heads :].repeat_interleave(layer.num_heads // layer.num_kv_heads, 2)
    mean = v.mean(1, keepdim=True).expand_as(v).flatten(2) @ layer.o_proj.weight.T + bias
    torch.testing.assert_close(layer(x), mean)  # queries of 0 see all keys alike


def test_an_eps_of_none_is_that_of_the_norms():
    options = {"position_method": "rope", "qk_norm": True}
    (layer, x, _), (other, _, _) = (made("grouped", options | {"norm_eps": eps}) for eps in (None, 2.0**-23))
    torch.testing.assert_close(layer(x), other(x))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", ["none", "rope"])
def test_it_compiles_whole_with_the_same_gradients(name, method, fresh_dynamo, device):
    layer, x, _ = made(name, {"position_method": method, "causal": True}, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    alike(*(torch.autograd.grad(one(x).square().sum(), list(layer.parameters())) for one in (compiled, layer)))


def test_it_compiles_whole_for_any_length(fresh_dynamo, device):
    layer, x, _ = made("grouped", {"position_method": "rope", "causal": True}, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for given in (x, x[:, :-2].contiguous()):
        torch.testing.assert_close(compiled(given), layer(given))


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_gives_the_lower_dtype_and_full_gradients(name, device):
    options = {"position_method": "rope"} | ({} if name == "latent" else {"qk_norm": True})
    layer, x, _ = made(name, options, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.3, rtol=0.1)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("name", ["self", "grouped", "multi-query"])
def test_separate_projections_of_a_checkpoint_come_in_and_go_out(name):
    layer, x, _ = made(name, {"qk_norm": True})
    state = layer.checkpoint("layers.0.self_attn.")
    kv = layer.num_kv_heads * layer.head_dim
    assert state["layers.0.self_attn.k_proj.weight"].shape == (kv, layer.embed_dim)
    assert {k.removeprefix("layers.0.self_attn.") for k in state} == {
        *(f"{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")), "q_norm.weight", "k_norm.weight",
    }  # fmt: skip
    other = LAYERS[name](qk_norm=True)
    other.load_checkpoint(copy.deepcopy(state) | {"other": x}, "layers.0.self_attn.")
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"found no q_\w+\.weight; check the prefix"):
        other.load_checkpoint(state)
    for options, lost in (({"bias": False, "qk_norm": True}, r"q_proj\.bias"), ({}, r"q_norm\.weight")):
        with pytest.raises(
            ValueError, match=rf"load_checkpoint has no place for \['{lost}', .*check how the layer is made"
        ):
            LAYERS[name](**options).load_checkpoint(layer.checkpoint())
    with pytest.raises(ValueError, match=r"k_proj.weight must be \[\d+, \d+\], got \[1\]"):
        other.load_checkpoint(layer.checkpoint() | {"k_proj.weight": torch.ones(1)})


@pytest.mark.parametrize("name", ["self", "grouped", "multi-query"])
def test_an_attention_of_qwen2_has_biases_of_queries_keys_and_values_alone(name):
    layer, x, _ = made(name, {"causal": True, "out_bias": False})
    state = copy.deepcopy(layer.checkpoint())
    assert {key for key in state if key.endswith(".bias")} == {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    q, k, v = (F.linear(x, state[f"{p}_proj.weight"], state[f"{p}_proj.bias"]) for p in "qkv")
    heads = (t.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), out @ state["o_proj.weight"].T)
    other = LAYERS[name](causal=True, out_bias=False)
    other.load_checkpoint(state)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"found no o_proj\.bias"):
        LAYERS[name](causal=True).load_checkpoint(state)
    assert LAYERS[name](bias=False, out_bias=True).o_proj.bias is not None
    assert LAYERS[name](bias=False).o_proj.bias is None


@pytest.mark.parametrize("option", ["plain", "queries without a latent"])
def test_an_attention_of_deepseek_comes_in_and_goes_out(option):
    """Against the published form: q_b_proj's heads are [not rotated, rotated], pairs are neighbours."""
    layer, x, _ = made("latent", (OPTIONS | LATENT)[option] | {"causal": True, "rope_interleaved": True, "bias": False})
    heads, n, rope, wide = layer.num_heads, layer.head_dim, layer.rope_head_dim, layer.latent_dim
    state = copy.deepcopy(layer.checkpoint("attn."))
    w = {name.removeprefix("attn."): t for name, t in state.items()}
    down = F.rms_norm(x @ w["q_a_proj.weight"].T, (wide,), w["q_a_layernorm.weight"], 1e-6) if layer.q_latent_dim else x
    q = (down @ w["q_b_proj.weight" if layer.q_latent_dim else "q_proj.weight"].T).unflatten(-1, (heads, n + rope))
    row = x @ w["kv_a_proj_with_mqa.weight"].T
    latent = F.rms_norm(row[..., :wide], (wide,), w["kv_a_layernorm.weight"], 1e-6)
    kv = (latent @ w["kv_b_proj.weight"].T).unflatten(-1, (heads, 2 * n))
    q = torch.cat((q[..., :n], turned(q[..., n:], 10000.0, True)), -1)
    k_rope = turned(row[..., None, wide:], 10000.0, True).expand(-1, -1, heads, -1)
    heads_of = q, torch.cat((kv[..., :n], k_rope), -1), kv[..., n:]
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in heads_of), is_causal=True)
    out = out.transpose(1, 2).flatten(2) @ w["o_proj.weight"].T
    torch.testing.assert_close(layer(x), out)
    other = LAYERS["latent"](**(OPTIONS | LATENT)[option], causal=True, rope_interleaved=True, bias=False)
    other.load_checkpoint(state | {"mlp.weight": x}, "attn.")
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"load_checkpoint has no place for \['attn\.o_proj\.bias'\]"):
        other.load_checkpoint(state | {"attn.o_proj.bias": x}, "attn.")
    with pytest.raises(ValueError, match=r"FastMultiHeadLatentAttention: load_checkpoint found no q_\w+\.weight"):
        other.load_checkpoint(state)


@pytest.mark.parametrize("name", ["grouped", "latent"])
def test_a_checkpoint_has_no_place_in_a_weight_made_of_others_or_without_memory(name):
    layer, _, _ = made(name, {})
    state = layer.checkpoint()
    with pytest.raises(ValueError, match=r"wants a module with memory for \w+.weight, got one on the meta device"):
        LAYERS[name](device="meta").load_checkpoint(state)
    parametrize.register_parametrization(layer.o_proj, "weight", nn.Identity())
    with pytest.raises(
        ValueError, match=r"a ParametrizedFastLinear makes its weight of others; load before it is param"
    ):
        layer.load_checkpoint(state)


@pytest.mark.parametrize("name", ["grouped", "latent"])
def test_what_is_no_weight_by_itself_is_no_part_of_a_checkpoint(name):
    """A quantised file's codes have no meaning without their scales; what fails does so before anything is written."""
    layer, _, _ = made(name, {})
    before, state = copy.deepcopy(layer.state_dict()), copy.deepcopy(layer.checkpoint())
    key = "o_proj.weight"  # the last one
    for wrong, said in (
        (
            lambda t: t.to(torch.float8_e4m3fn),
            r"floating point of 16 bits or more, got torch\.float8_e4m3fn; a quantised",
        ),
        (lambda t: (t * 50).to(torch.int8), r"got torch\.int8; .*multiply them by their scales first"),
        (lambda t: t > 0, r"got torch\.bool"),
        (lambda t: t.to(torch.complex64), r"got torch\.complex64"),
        (lambda t: t.tolist(), "a tensor, got list; convert it"),
        (lambda t: None, "a tensor, got NoneType"),
    ):
        with pytest.raises(
            TypeError, match=rf"{type(layer).__name__}: a checkpoint's o_proj\.weight must be (.*)?{said}"
        ):
            layer.load_checkpoint({n: wrong(t) if n == key else t + 1 for n, t in state.items()})
    for wrong, said in (("to_sparse", r"layout torch\.sparse_coo"), ("meta", "a meta tensor")):
        bad = state[key].to("meta") if wrong == "meta" else state[key].to_sparse()
        with pytest.raises(ValueError, match=rf"wants o_proj\.weight as a dense tensor with memory, got {said}"):
            layer.load_checkpoint({n: t + 1 for n, t in state.items()} | {key: bad})
    with pytest.raises(
        TypeError, match=r"wants state as a dict of names and tensors, got \w+; a module's is state_dict"
    ):
        layer.load_checkpoint(layer)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


class Wrapped(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base


@pytest.mark.parametrize("name", ["grouped", "latent"])
def test_a_checkpoint_has_the_weights_that_the_projections_work_with(name):
    layer, _, _ = made(name, {} if name == "latent" else {"qk_norm": True})
    state = layer.checkpoint("a.")
    for module in layer.children():
        if isinstance(module, nn.Linear):
            nn.utils.parametrizations.weight_norm(module)
    torch.testing.assert_close(layer.checkpoint("a."), state)
    prune.random_unstructured(layer.q_norm, "weight", 0.5)
    key = f"a.{'q_a_layernorm' if name == 'latent' else 'q_norm'}.weight"
    assert layer.checkpoint("a.").keys() == state.keys()
    torch.testing.assert_close(layer.checkpoint("a.")[key], layer.q_norm.weight.detach())
    layer.q_norm = nn.Identity()
    assert layer.checkpoint("a.").keys() == state.keys() - {key}
    layer.o_proj = Wrapped(layer.o_proj)
    with pytest.raises(ValueError, match="o_proj is a Wrapped, which has no weight to be named; merge or unwrap"):
        layer.checkpoint()


def test_a_checkpoint_is_without_the_positions_parameters():
    layer, _, _ = made("grouped", {})
    other = LAYERS["grouped"](position_method=nn.Linear(4, 4))
    assert other.checkpoint().keys() == layer.checkpoint().keys()
    other.load_checkpoint(layer.checkpoint())
    torch.testing.assert_close(other.o_proj.weight, layer.o_proj.weight)


def test_a_stretched_context_scales_deepseeks_scores():
    scaling = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0}
    plain = LAYERS["latent"](rope_scaling=scaling)
    stretched = LAYERS["latent"](rope_scaling=scaling | {"mscale_all_dim": 1.0})
    assert plain.scale == 6**-0.5
    assert stretched.scale == pytest.approx(6**-0.5 * 1.8738, rel=1e-4)  # 1.3689 twice, as V3's configuration gives it
    shorter = LAYERS["latent"](rope_scaling=scaling | {"mscale_all_dim": 1.0, "factor": 0.5})
    assert shorter.scale == plain.scale


def test_parameters_may_be_a_checkpoint():
    """A dict of parameters, not of tensors: what named_parameters() gives."""
    for name in ("grouped", "latent"):
        layer, x, _ = made(name, {})
        other = LAYERS[name]()
        other.load_checkpoint({k: nn.Parameter(t.clone()) for k, t in layer.checkpoint().items()})
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
        assert all(p.is_leaf and p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("max_seq_len", [64, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_it_exports_for_any_length(name, max_seq_len):
    qk_norm = {} if name == "latent" else {"qk_norm": True}
    layer, x, _ = made(name, {"position_method": "rope", "causal": True, "max_seq_len": max_seq_len} | qk_norm)
    first = "query" if name == "separate" else "hidden_states"
    exported = torch.export.export(layer, (x,), dynamic_shapes={first: {1: torch.export.Dim("length", min=3, max=64)}})
    longer = torch.cat((x, x), 1)
    torch.testing.assert_close(exported.module()(longer), layer(longer))


REFUSED = {
    "embed_dim": (
        lambda: trinix.FastMultiHeadSelfAttention(10, 3),
        "embed_dim 10 must be a multiple of num_heads 3; or give",
    ),
    "kv heads": (
        lambda: trinix.FastGroupedQueryAttention(12, 4, 3),
        "num_heads 4 must be a multiple of num_kv_heads 3",
    ),
    "no heads": (lambda: trinix.FastMultiQueryAttention(12, 0), "num_heads must be an int from 1 on, got 0"),
    "dropout": (lambda: trinix.FastMultiHeadAttention(12, 3, 1.0), "dropout must be at least 0 and below 1, got 1.0"),
    "position": (
        lambda: trinix.FastMultiHeadAttention(12, 3, position_method="rotary"),
        "must be 'none', 'rope', 'alibi' or a",
    ),
    "odd rope": (lambda: trinix.FastMultiQueryAttention(9, 3, position_method="rope"), "needs an even head_dim, got 3"),
    "norm": (lambda: trinix.FastMultiQueryAttention(9, 3, qk_norm_type="l2"), "'rmsnorm' or 'layernorm', got 'l2'"),
    "window": (
        lambda: trinix.FastMultiQueryAttention(9, 3, sliding_window_size=0),
        "sliding_window_size must be an int from 1",
    ),
    "window of three": (
        lambda: trinix.FastMultiQueryAttention(9, 3, sliding_window_size=(1, 2, 3)),
        r"sliding_window_size must be an int from 1 on, .*, got \(1, 2, 3\)",
    ),
    "window below 0": (
        lambda: trinix.FastMultiQueryAttention(9, 3, sliding_window_size=(-1, 2)),
        r"sliding_window_size must be .*, got \(-1, 2\)",
    ),
    "a table's length": (
        lambda: trinix.FastMultiHeadSelfAttention(12, 3, max_seq_len=[16]),
        r"FastMultiHeadSelfAttention: max_seq_len must be an int from 1 on, got \[16\]",
    ),
    "backend": (
        lambda: trinix.FastMultiHeadAttention(12, 3, backend="cuda"),
        r"FastMultiHeadAttention: backend must be one of \['auto', .*got 'cuda'",
    ),
    "backend of a latent": (
        lambda: trinix.FastMultiHeadLatentAttention(12, 3, backend="cuda"),
        r"FastMultiHeadLatentAttention: backend must be one of \['auto', .*got 'cuda'",
    ),
    "dropout as text": (lambda: trinix.FastMultiHeadAttention(12, 3, "0.1"), "dropout must be .*, got '0.1'"),
    "a bias for k and positions": (
        lambda: trinix.FastMultiHeadAttention(12, 3, add_bias_kv=True, position_method="rope"),
        "FastMultiHeadAttention: add_bias_kv needs position_method 'none', .*, got 'rope'; leave one",
    ),
    "a bias for k and a window": (
        lambda: trinix.FastMultiHeadAttention(12, 3, add_bias_kv=True, sliding_window_size=2),
        "FastMultiHeadAttention: add_bias_kv needs sliding_window_size None, .*, got 2; leave one",
    ),
    "position of a latent": (
        lambda: trinix.FastMultiHeadLatentAttention(12, 3, position_method=None),
        "position_method must be 'none', 'rope' or 'alibi', got None",
    ),
    "latent": (lambda: trinix.FastMultiHeadLatentAttention(12, 3, 0), "latent_dim must be an int from 1 on, got 0"),
    "latent of queries": (
        lambda: trinix.FastMultiHeadLatentAttention(12, 3, q_latent_dim=-1),
        "q_latent_dim must be an int from 1 on, got -1",
    ),
    "softcap": (lambda: trinix.FastMultiHeadAttention(12, 3, softcap=-1.0), "softcap must be .*, got -1.0"),
    "softcap without an end": (
        lambda: trinix.FastMultiHeadAttention(12, 3, softcap=float("inf")),
        "softcap must be a finite number .*, got inf",
    ),
    "softcap of a latent": (lambda: trinix.FastMultiHeadLatentAttention(12, 3, softcap=None), "softcap must be .*None"),
    "scale": (lambda: trinix.FastMultiQueryAttention(12, 3, scale="0.1"), "scale must be a number or None, got '0.1'"),
    "odd rope of a latent": (
        lambda: trinix.FastMultiHeadLatentAttention(12, 3, rope_head_dim=7),
        "rope_head_dim must be an even int from 2 on, got 7",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_named(case):
    make, text = REFUSED[case]
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("name", LAYERS)
def test_an_argument_that_does_not_exist_is_named_with_those_that_do(name):
    called = type(LAYERS[name]()).__name__
    with pytest.raises(
        TypeError, match=rf"^{called}: there is no argument 'bogus'; known are \['embed_dim', .*'rope_base'"
    ):
        LAYERS[name](bogus=1)


@pytest.mark.parametrize("name", LAYERS)
def test_inputs_that_do_not_fit_are_named(name):
    layer, x, _ = made(name, {})
    padding = torch.zeros(BATCH, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"key_padding_mask must be \[B, Sk\] = \[2, 5\], got \[2, 1\]"):
        layer(x, key_padding_mask=padding)
    with pytest.raises(TypeError, match=rf"^{type(layer).__name__}: \w+ must be a tensor, got list"):
        layer([[1.0]])
    for wrong in (x[..., :-1], x[None], *([] if name == "separate" else [x[0]])):
        with pytest.raises(ValueError, match=rf"must be \[B, S, {layer.embed_dim}\] .*, got \[{wrong.shape[0]}, "):
            layer(wrong)


@pytest.mark.parametrize("wrong", ["no", 1, None])
@pytest.mark.parametrize("name", LAYERS)
def test_what_must_be_true_or_false_is_named(name, wrong):
    called = type(LAYERS[name]()).__name__
    own = {"latent": ["latent_norm"], "separate": ["qk_norm", "add_bias_kv"]}.get(name, ["qk_norm"])
    for argument in ("bias", "causal", "rope_interleaved", "add_zero_attn", "batch_first", *own):
        with pytest.raises(TypeError, match=f"^{called}: {argument} must be True or False, got {wrong!r}; convert it"):
            LAYERS[name](**{argument: wrong})


def test_what_a_call_says_must_be_true_or_false():
    layer, x, _ = made("separate", {})
    for argument in ("need_weights", "average_attn_weights", "is_causal"):
        with pytest.raises(
            TypeError, match=f"^FastMultiHeadAttention: {argument} must be True or False, got 'no'; conv"
        ):
            layer(x, **{argument: "no"})


@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (2, 5), (3, 5, 5), (2, 4, 5), (2, 2, 5, 5), (1, 1, 1, 1, 5), (0, 5)])
@pytest.mark.parametrize("name", LAYERS)
def test_a_mask_of_a_wrong_shape_is_named_as_it_was_given(name, shape):
    layer, x, _ = made(name, {})
    called, full = type(layer).__name__, [2, layer.num_heads, 5, 5]
    padding = torch.zeros(2, 5, dtype=torch.bool)
    text = rf"^{called}: attention_mask must be \[Sq, Sk\], .* = {re.escape(str(full))}, got {re.escape(str([*shape]))}; padding"
    for mask in (torch.ones(shape, dtype=torch.bool), torch.zeros(shape)):
        for more in ({}, {"key_padding_mask": padding}):  # with which it is joined
            with pytest.raises(ValueError, match=text):
                layer(x, attention_mask=mask, **more)


@pytest.mark.parametrize("name", LAYERS)
def test_a_mask_elsewhere_is_named(name):
    layer, x, _ = made(name, {})
    called, seen = type(layer).__name__, torch.ones(5, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"^{called}: attention_mask must be on cpu, where q is, got meta; move it"):
        layer(x, attention_mask=seen.to("meta"))
    with pytest.raises(ValueError, match=f"^{called}: key_padding_mask must be on cpu, where q is, got meta; move it"):
        layer(x, attention_mask=seen, key_padding_mask=torch.zeros(2, 5, device="meta"))


def test_what_torchs_arguments_do_not_fit_is_named():
    layer, x, _ = made("separate", {})
    for shape in ((4, 5), (2, 5), (3, 5, 5), (6, 5, 4), (2, 2, 5, 5)):
        text = rf"attn_mask must be \[Sq, Sk\] = \[5, 5\] or .* = \[6, 5, 5\], got {re.escape(str([*shape]))}; padding"
        for weights in (None, True):
            with pytest.raises(ValueError, match=text):
                layer(x, attn_mask=torch.zeros(shape), need_weights=weights)
    for shapes in ([(3, 5), (3, 5)], [(1, 5), (1, 5)], [(2, 5), (2, 4)]):
        text = rf"have the query's batch, .* got \[batch, length\] {re.escape(str([[2, 5], *map(list, shapes)]))}"
        with pytest.raises(ValueError, match=text):
            layer(x, *(torch.zeros(*shape, 12) for shape in shapes))
    alone = layer(x[0], key_padding_mask=torch.tensor([False] * 4 + [True]))
    torch.testing.assert_close(alone, layer(x[0], key_padding_mask=torch.tensor([[False] * 4 + [True]])))
    with pytest.raises(ValueError, match=r"key_padding_mask must be \[B, Sk\] = \[1, 5\], got \[2, 5\]"):
        layer(x[0], key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))


@pytest.mark.parametrize("name", LAYERS)
def test_a_named_backend_is_the_ops(name):
    layer, x, _ = made(name, {"backend": "torch"})
    assert layer(x).shape == x.shape
    layer.backend = "no such"
    with pytest.raises(ValueError, match="backend must be one of"):
        layer(x)


def test_without_triton_every_layer_and_cache_runs_on_the_cpu(forked_process):
    code = """
        import sys
        sys.modules |= dict.fromkeys([name for name in sys.modules if name.partition(".")[0] == "triton"])
        import torch, trinix
        from trinix import models
        x = torch.randn(2, 5, 16)
        for layer in (
            trinix.FastMultiHeadSelfAttention(16, 4, causal=True, position_method="rope", qk_norm=True),
            trinix.FastGroupedQueryAttention(16, 4, 2, causal=True, position_method="alibi"),
            trinix.FastMultiQueryAttention(16, 4, causal=True, add_zero_attn=True),
            trinix.FastMultiHeadAttention(16, 4, causal=True),
            trinix.FastMultiHeadLatentAttention(16, 4, 8, causal=True, rope_head_dim=2),
            trinix.FastSwiGLU(16, 24, 16, use_triton=True),
        ):
            layer(x).sum().backward()
            assert all(p.grad is not None for p in layer.parameters()), type(layer)
        for shape in (models.gpt, models.llama, models.deepseek):
            for kind in ("static", "dynamic", "paged"):
                models.Decoder(shape(layers=1)).generate(torch.zeros(1, 2, dtype=torch.int64), 2, kind=kind)
        print("done")
    """
    assert forked_process(code) == "done"
