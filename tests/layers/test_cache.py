"""Caches: prompt and steps give what the whole sequence gives at once, for every layer, cache and option; and what a cache does
to its sequences."""

import copy
import re

import pytest
import torch
from torch import nn

import trinix
from helpers import captured
from trinix.layers.linear import FastLinear
from trinix.testing import normal

LAYERS = {
    "self": lambda **o: trinix.FastMultiHeadSelfAttention(16, 4, **o),
    "grouped": lambda **o: trinix.FastGroupedQueryAttention(16, 4, 2, **o),
    "multi-query": lambda **o: trinix.FastMultiQueryAttention(16, 4, **o),
    "separate": lambda **o: trinix.FastMultiHeadAttention(16, 4, **o),
    "latent": lambda **o: trinix.FastMultiHeadLatentAttention(16, 4, 16, **{"rope_head_dim": 4} | o),
}
KINDS = ("static", "dynamic", "paged")
OPTIONS = {
    "plain": {},
    "rope": {"position_method": "rope"},
    "alibi": {"position_method": "alibi"},
    "window": {"sliding_window_size": 3},
    "softcap": {"softcap": 2.0, "scale": 0.4},
    "sequence first": {"batch_first": False},
}
MORE = {"qk_norm": {"qk_norm": True, "position_method": "rope"}, "zero": {"add_zero_attn": True}}
CASES = [(n, o, k) for n in LAYERS if n != "latent" for o in OPTIONS | MORE for k in KINDS]
CASES += [("latent", o, "latent") for o in (*OPTIONS, "zero")]
BATCH, LENGTH = 3, 9


def made(name, options, device="cpu", dtype=torch.float32):
    layer = LAYERS[name](causal=True, device=device, dtype=dtype, **options)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(normal(p.shape, dtype, seed=20 + i, device=device, scale=1.0 if p.dim() == 1 else 0.4))
    return layer, normal((BATCH, LENGTH, 16), dtype, seed=1, device=device)


def cache_of(layer, kind, capacity=LENGTH, device="cpu", dtype=torch.float32):
    place = {"device": device, "dtype": dtype}
    if kind == "latent":
        return trinix.LatentCache(BATCH, capacity, layer.latent_dim, layer.rope_head_dim, **place)
    heads = layer.num_kv_heads, layer.head_dim
    if kind == "paged":
        return trinix.PagedCache(BATCH, BATCH * -(-capacity // 2), 2, *heads, **place)
    return trinix.StaticCache(BATCH, capacity, *heads, **place) if kind == "static" else trinix.DynamicCache()


def in_parts(layer, x, cache, *sizes):
    first = layer.batch_first
    parts = [layer(part if first else part.transpose(0, 1), cache=cache) for part in x.split(sizes, 1)]
    return torch.cat([part if first else part.transpose(0, 1) for part in parts], 1)


def at_once(layer, x):
    return layer(x) if layer.batch_first else layer(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize(("name", "option", "kind"), CASES)
@torch.no_grad()
def test_prompt_and_steps_give_what_the_whole_gives(name, option, kind, device):
    layer, x = made(name, (OPTIONS | MORE)[option], device)
    wanted = at_once(layer, x)
    for sizes in [(4, 1, 1, 3), (1,) * LENGTH, (LENGTH,)]:
        cache = cache_of(layer, kind, device=device)
        torch.testing.assert_close(in_parts(layer, x, cache, *sizes), wanted, atol=1e-4, rtol=1e-4)
        assert cache.longest == LENGTH
        assert cache.lengths.tolist() == [LENGTH] * BATCH


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "kind"), [("grouped", k) for k in KINDS] + [("latent", "latent")])
@torch.no_grad()
def test_half_precision_agrees_to_its_rounding(name, kind, dtype, device):
    layer, x = made(name, {"position_method": "rope"}, device, dtype)
    got = in_parts(layer, x, cache_of(layer, kind, device=device, dtype=dtype), 5, 1, 1, 2)
    true = layer.double()(x.double())
    assert float((got - true).square().mean().sqrt() / true.square().mean().sqrt()) < 8 * torch.finfo(dtype).eps


WITH_CACHE = [("grouped", k) for k in KINDS] + [("latent", "latent")]


@pytest.mark.parametrize(("name", "kind"), WITH_CACHE)
@torch.no_grad()
def test_prompts_of_different_lengths_are_padded_and_the_padding_is_forgotten(name, kind, device):
    layer, x = made(name, {"position_method": "rope"}, device)
    lengths = [2, 5, 3]
    cache = cache_of(layer, kind, device=device)
    layer(x[:, :5], cache=cache)
    cache.truncate(torch.tensor(lengths, device=device))
    assert cache.longest == 5
    steps = in_parts(layer, x[:, 5:8], cache, 1, 1, 1)
    for b, n in enumerate(lengths):
        alone = torch.cat((x[b : b + 1, :n], x[b : b + 1, 5:8]), 1)
        torch.testing.assert_close(steps[b], layer(alone)[0, n:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("index", [[2, 0, 0], [1, 2, 0], [0, 1, 2]])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("name", "kind"), WITH_CACHE)
@torch.no_grad()
def test_beams_change_places_with_their_lengths(name, kind, ragged, index, device):
    layer, x = made(name, {"position_method": "rope"}, device)
    lengths = [2, 5, 3] if ragged else [5, 5, 5]
    cache = cache_of(layer, kind, device=device)
    layer(x[:, :5], cache=cache)
    cache.truncate(torch.tensor(lengths, device=device))
    cache.reorder(torch.tensor(index, device=device))
    steps = in_parts(layer, x[:, 5:7], cache, 1, 1)
    for b, origin in enumerate(index):
        alone = torch.cat((x[origin : origin + 1, : lengths[origin]], x[b : b + 1, 5:7]), 1)
        torch.testing.assert_close(steps[b], layer(alone)[0, lengths[origin] :], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"index \[B\] = \[3\], got \[2\]"):
        cache.reorder(torch.tensor([0, 1], device=device))


@pytest.mark.parametrize(("name", "kind"), WITH_CACHE)
@torch.no_grad()
def test_a_cache_starts_again_and_goes_back(name, kind, device):
    layer, x = made(name, {"position_method": "rope"}, device)
    wanted, cache = layer(x), cache_of(layer, kind, device=device)
    layer(x.flip(1), cache=cache)
    cache.reset()
    assert cache.longest == 0
    torch.testing.assert_close(in_parts(layer, x, cache, 4, 5), wanted, atol=1e-4, rtol=1e-4)
    cache.truncate(6)
    assert cache.lengths.tolist() == [6] * BATCH
    torch.testing.assert_close(in_parts(layer, x[:, 6:], cache, 1, 2), wanted[:, 6:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "kind"), WITH_CACHE)
@torch.no_grad()
def test_the_last_tokens_are_taken_back(name, kind, device):
    layer, x = made(name, {"position_method": "rope"}, device)
    wanted, cache = layer(x), cache_of(layer, kind, capacity=LENGTH + 1, device=device)
    layer(x[:, :6], cache=cache)
    layer(x[:, :2], cache=cache)
    cache.rewind(2)
    assert (cache.longest, cache.lengths.tolist()) == (6, [6] * BATCH)
    torch.testing.assert_close(in_parts(layer, x[:, 6:], cache, 1, 2), wanted[:, 6:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "kind"), WITH_CACHE)
@torch.no_grad()
def test_no_more_is_taken_back_than_the_shortest_sequence_has(name, kind):
    layer, x = made(name, {})
    cache, follower = (cache_of(layer, kind) for _ in range(2))
    if kind != "dynamic":
        follower.follow(cache)
    for one in (follower, cache):
        layer(x[:, :5], cache=one)
    for one in (follower, cache):
        one.truncate(torch.tensor([1, 5, 2]))
    for one in (follower, cache):
        with pytest.raises(
            ValueError, match=r"rewind by 3 of 1 tokens, where the shortest sequence ends; use truncate"
        ):
            one.rewind(3)
    for one in (follower, cache):
        one.rewind(1)
        assert one.longest == 4
    assert cache.lengths.tolist() == follower.lengths.tolist() == [0, 4, 1]


@pytest.mark.parametrize(("name", "kind"), WITH_CACHE)
@torch.no_grad()
def test_there_is_room_again_where_the_longest_sequence_is_gone(name, kind, device):
    layer, x = made(name, {}, device)
    cache = cache_of(layer, kind, device=device)
    layer(x[:, :8], cache=cache)
    cache.truncate(torch.tensor([2, 8, 3], device=device))
    cache.reorder(torch.tensor([0, 2, 0], device=device))
    if kind != "paged":
        assert cache.longest == 8
        cache.sync()
    assert cache.longest == 3
    steps = layer(x[:, :6], cache=cache)
    for b, (origin, n) in enumerate([(0, 2), (2, 3), (0, 2)]):
        alone = torch.cat((x[origin : origin + 1, :n], x[b : b + 1, :6]), 1)
        torch.testing.assert_close(steps[b], layer(alone)[0, n:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pages_are_taken_as_needed_and_given_back():
    layer, x = made("grouped", {})
    cache = trinix.PagedCache(BATCH, 8, 2, 2, 4, capacity=16)
    layer(x[:, :3], cache=cache)
    assert len(cache._free) == 2
    cache.truncate(torch.tensor([1, 3, 2]))
    assert len(cache._free) == 4
    owned = cache._owned
    assert len({page for pages in owned for page in pages}) == 4
    assert all(cache.page_table[b, : len(pages)].tolist() == pages for b, pages in enumerate(owned))
    with pytest.raises(ValueError, match=r"5 more tokens need 7 pages, 4 are free"):
        cache.reserve(5)  # no sequence needs as many by itself
    for tokens in (-1, 14, 2.5, True, None, "x"):
        with pytest.raises(
            ValueError, match=f"reserve wants from 0 to 13 tokens, got {tokens!r}; make a cache of a larger"
        ):
            cache.reserve(tokens)
    assert len(cache._free) == 4
    cache.reset()
    assert len(cache._free) == 8


@torch.no_grad()
def test_pages_that_a_reorder_frees_are_the_ones_it_needs():
    layer, x = made("grouped", {})
    cache = trinix.PagedCache(BATCH, 4, 2, 2, 4)
    layer(x[:, :1], cache=cache)
    cache.truncate(torch.tensor([1, 0, 0]))
    layer(x[:, :1], cache=cache)
    cache.truncate(torch.tensor([2, 0, 1]))
    layer(x[:, 1:2], cache=cache)  # 3, 1 and 2 tokens fill the pool
    assert cache._free == []
    cache.reorder(torch.tensor([1, 0, 2]))
    assert cache._counts == cache.lengths.tolist() == [1, 3, 2]
    pages = [page for owned in cache._owned for page in owned]
    assert len(pages) == len(set(pages)) == 4
    with pytest.raises(ValueError, match="reorder makes sequences that need 6 pages, the pool has 4"):
        cache.reorder(torch.tensor([1, 1, 1]))
    assert cache._counts == cache.lengths.tolist() == [1, 3, 2]


@pytest.mark.parametrize(("name", "kind"), WITH_CACHE)
def test_what_a_cache_cannot_do_is_refused_by_name(name, kind):
    layer, x = made(name, {"dropout": 0.1})
    cache = cache_of(layer, kind)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"a cache knows no dropout; call eval\(\) first"):
            layer(x, cache=cache)
        layer.eval()
        with pytest.raises(ValueError, match="a cache takes no mask; pad prompts on the right"):
            layer(x, torch.zeros(LENGTH, LENGTH), cache=cache)
        layer(x, cache=cache)
        cache.capacity = LENGTH
        with pytest.raises(ValueError, match="9 tokens and 1 more exceed its capacity of 9; make a larger one"):
            layer(x[:, :1], cache=cache)
        cache.capacity = 2 * LENGTH
        with pytest.raises(ValueError, match="made for a batch of 3, got 2"):
            layer(x[:2, :1], cache=cache)
        layer.causal = False
        with pytest.raises(ValueError, match="a cache needs causal attention; make the layer with causal=True"):
            layer(x, cache=cache)
        layer.causal = True
    cache.reset()
    with pytest.raises(ValueError, match=r"a cache keeps no gradient; call the model under torch\.no_grad\(\)"):
        layer(x, cache=cache)


@pytest.mark.parametrize(("name", "kind"), WITH_CACHE)
@torch.no_grad()
def test_lengths_that_no_cache_has_are_refused(name, kind):
    layer, x = made(name, {})
    cache = cache_of(layer, kind)
    layer(x, cache=cache)
    for lengths in (-1, torch.tensor([2]), torch.tensor([1, -1, 2])):
        with pytest.raises(ValueError, match=r"truncate wants an int or a tensor \[B\] = \[3\], from 0 on, got"):
            cache.truncate(lengths)
    cache.truncate(2**32)  # which int32 would take for 0
    assert cache.lengths.tolist() == [LENGTH] * BATCH
    for lengths in (2.5, torch.tensor([1.0, 2.0, 3.0]), True):
        with pytest.raises(
            TypeError, match=r"truncate wants lengths as integers, got torch\.\w+; convert it with .long"
        ):
            cache.truncate(lengths)
    for index in (torch.tensor([2.0, 1.0, 0.0]), torch.tensor([True, False, True]), [2, 1, 0]):
        with pytest.raises(TypeError, match=r"reorder wants index as integers, got [\w.]+; convert it with .long"):
            cache.reorder(index)
    for index in (torch.tensor([0, 1, 3]), torch.tensor([0, -1, 2])):
        with pytest.raises(
            ValueError, match=rf"reorder wants index from 0 to 2, got {re.escape(str(index.tolist()))}; beams"
        ):
            cache.reorder(index)
    with pytest.raises(ValueError, match=r"reorder wants index \[B\] = \[3\], got \[1\]; give every"):
        cache.reorder(torch.tensor([0]))
    for lengths in ("2", None):
        with pytest.raises(
            TypeError, match=r"Cache: truncate wants lengths as integers, got \w+; convert it with .long"
        ):
            cache.truncate(lengths)
    for tokens in (-1, 1.5, True):
        with pytest.raises(ValueError, match="tokens must be an int from 0 on, got"):
            cache.rewind(tokens)
    with pytest.raises(ValueError, match="rewind by 10 of 9 tokens"):
        cache.rewind(10)
    assert cache.lengths.tolist() == [LENGTH] * BATCH


@pytest.mark.parametrize(
    "cache",
    [
        trinix.StaticCache(BATCH, LENGTH, 2, 4, dtype=torch.float16),
        trinix.StaticCache(BATCH, LENGTH, 4, 4),
        trinix.PagedCache(BATCH, 8, 2, 2, 8),
    ],
)
@torch.no_grad()
def test_a_prompt_is_neither_converted_nor_broadcast(cache):
    layer = trinix.FastGroupedQueryAttention(16, 4, 2 if cache.keys.shape[2] == 2 else 1, causal=True)
    with pytest.raises(
        ValueError, match=r"made for torch.float\d\d on cpu with \[heads, channels\] .*, got torch.float32"
    ):
        layer(torch.zeros(BATCH, 2, 16), cache=cache)


def test_a_dynamic_cache_keeps_nothing_of_a_call_that_it_refused():
    layer, x = made("grouped", {})
    cache = trinix.DynamicCache()
    with pytest.raises(ValueError, match="a cache keeps no gradient"):
        layer(x, cache=cache)
    with torch.no_grad():
        torch.testing.assert_close(layer(x[:2], cache=cache), layer(x[:2]))


def test_a_dynamic_cache_without_tokens_has_none_to_move():
    cache = trinix.DynamicCache()
    cache.reorder(torch.tensor([1, 0]))
    cache.truncate(0)
    cache.rewind(0)
    cache.sync()
    assert cache.lengths is None


@torch.no_grad()
def test_a_dynamic_cache_grows_by_a_half():
    """By less it would copy itself at every step, by more it would hold memory that nobody asked for."""
    layer, cache, rooms = LAYERS["grouped"](causal=True), trinix.DynamicCache(), []
    for tokens in (4, 1, 1, 1, 2, 7):
        layer(torch.zeros(BATCH, tokens, 16), cache=cache)
        rooms.append((cache.keys.shape[1], cache.values.shape[1]))
    assert rooms == [(n, n) for n in (4, 6, 6, 9, 9, 16)]


@torch.no_grad()
def test_a_latent_cache_is_for_latent_attention():
    layer, x = made("grouped", {})
    for cache in (trinix.LatentCache(BATCH, 8, 16), (x, x)):
        with pytest.raises(TypeError, match="cache must be a StaticCache, DynamicCache or PagedCache, got"):
            layer(x, cache=cache)


@torch.no_grad()
def test_a_cache_is_for_self_attention():
    layer, x = made("separate", {})
    with pytest.raises(ValueError, match="a cache is for self-attention; leave key and value out"):
        layer(x, x[:, :1], cache=trinix.DynamicCache())
    with pytest.raises(ValueError, match="a cache is for self-attention; leave key and value out"):
        layer(x, value=x[:, :1], cache=trinix.DynamicCache())


def test_a_cache_follows_only_what_counts_for_it():
    one, other = (trinix.StaticCache(BATCH, 4, 1, 2) for _ in range(2))
    with pytest.raises(ValueError, match="follow wants another cache, one that follows none"):
        one.follow(one)
    with pytest.raises(ValueError, match="made for a batch of 2, got 3"):
        one.follow(trinix.StaticCache(2, 4, 1, 2))
    for cache, leader in ((trinix.DynamicCache(), one), (one, trinix.DynamicCache())):
        with pytest.raises(ValueError, match="got a DynamicCache of 0 tokens"):
            cache.follow(leader)
    with pytest.raises(TypeError, match="StaticCache: follow wants the cache of the layer that runs last, got str"):
        one.follow("x")
    one.follow(other)
    with pytest.raises(ValueError, match="follow wants another cache, one that follows none"):
        trinix.StaticCache(BATCH, 4, 1, 2).follow(one)
    other.longest = 2
    with pytest.raises(ValueError, match="got a StaticCache of 2 tokens; follow before the first call"):
        trinix.StaticCache(BATCH, 4, 1, 2).follow(other)


def test_rows_go_to_an_empty_latent_cache_of_the_layers_widths():
    cache = trinix.LatentCache(BATCH, 8, 4)
    for wrong, got in ((None, "NoneType"), (torch.ones(BATCH, 4), r"\[3, 4\]")):
        with pytest.raises(ValueError, match=rf"append wants rows \[B, S, 1, 4\], got {got}; attention makes them"):
            cache.append(wrong)
    cache.append(torch.ones(BATCH, 2, 1, 4))
    with pytest.raises(ValueError, match="append wants an empty cache, this one holds 2 tokens"):
        cache.append(torch.zeros(BATCH, 1, 1, 4))
    layer, x = made("latent", {})
    wrong = trinix.LatentCache(BATCH, 8, layer.latent_dim + 2, 2)  # rows of the layer's width all the same
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=f"cache must have this layer's latent_dim {layer.latent_dim}, got"),
    ):
        layer(x[:, :2], cache=wrong)


@pytest.mark.parametrize(("name", "kind"), WITH_CACHE)
@torch.no_grad()
def test_positions_may_be_named_with_a_cache_too(name, kind, device):
    layer, x = made(name, {"position_method": "rope"}, device)
    short = copy.deepcopy(layer)
    short.position = trinix.FastRoPEPositionEmbedding(layer.position.dim, 2).to(device)  # it grows for them too
    cache, at = cache_of(short, kind, device=device), torch.arange(LENGTH, device=device)
    parts = [short(t, position_ids=n, cache=cache) for t, n in zip(x.split(4, 1), at.split(4), strict=True)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), atol=1e-4, rtol=1e-4)
    cache, at = cache_of(layer, kind, device=device), torch.arange(3, 3 + LENGTH, device=device)
    parts = [
        layer(part, position_ids=where, cache=cache) for part, where in zip(x.split(4, 1), at.split(4), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x, position_ids=at), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_latent_attention_wants_its_own_cache():
    layer, x = made("latent", {})
    with pytest.raises(TypeError, match="cache must be a LatentCache, got DynamicCache"):
        layer(x, cache=trinix.DynamicCache())


class LoRA(nn.Module):
    """A projection with a trained product of rank 2 beside it, as fine-tuning puts one in its place."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        place = {"device": base.weight.device, "scale": 0.4}
        self.down = nn.Parameter(normal((2, base.in_features), torch.float32, seed=50, **place))
        self.up = nn.Parameter(normal((base.out_features, 2), torch.float32, seed=51, **place))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def _with_lora(layer):
    for name, module in list(layer.named_children()):
        if isinstance(module, nn.Linear):
            setattr(layer, name, LoRA(module))


def _hooked(layer):
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, y: 1.5 * y)


@pytest.mark.parametrize("change", [_with_lora, _hooked])
@pytest.mark.parametrize(("name", "kind"), WITH_CACHE)
@torch.no_grad()
def test_steps_go_through_projections_that_do_more_than_multiply(name, kind, change, device):
    layer, x = made(name, {"position_method": "rope"}, device)
    change(layer)
    torch.testing.assert_close(
        in_parts(layer, x, cache_of(layer, kind, device=device), 4, 1, 4), layer(x), atol=1e-4, rtol=1e-4
    )


def _with_bias(layer):
    layer.kv_up_proj = FastLinear(layer.kv_up_proj.in_features, layer.kv_up_proj.out_features)


def _with_a_hidden_bias(layer):
    layer.kv_up_proj = nn.Sequential(nn.Linear(layer.kv_up_proj.in_features, layer.kv_up_proj.out_features))


@pytest.mark.parametrize("change", [_with_bias, _with_a_hidden_bias])
@torch.no_grad()
def test_a_bias_of_latent_keys_and_values_is_added(change, device):
    layer, x = made("latent", {"v_head_dim": 6}, device)
    change(layer)
    layer.kv_up_proj.to(device)
    got = in_parts(layer, x, cache_of(layer, "latent", device=device), 4, 1, 4)
    torch.testing.assert_close(got, layer(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", [_with_bias, _with_a_hidden_bias])
@pytest.mark.parametrize("option", ["softcap", "zero"])
@torch.no_grad()
def test_a_bias_of_latent_keys_is_refused_where_it_is_seen(change, option):
    layer, x = made("latent", (OPTIONS | MORE)[option])
    change(layer)
    cache = cache_of(layer, "latent")
    layer(x[:, :4], cache=cache)
    with pytest.raises(ValueError, match="softcap and add_zero_attn want a kv_up_proj that adds nothing, got a"):
        layer(x[:, 4:5], cache=cache)
    assert cache.longest == 4


@torch.no_grad()
def test_a_table_of_positions_reaches_as_far_as_the_cache():
    layer, x = made("grouped", {"position_method": "rope", "max_seq_len": 2})
    cache = cache_of(layer, "static", capacity=40)
    layer(x, cache=cache)
    assert layer.position.cos.shape[0] >= 40
    torch.testing.assert_close(in_parts(layer, x, cache_of(layer, "dynamic"), 1, 8), layer(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_a_table_of_positions_that_was_given_reaches_as_far_as_the_cache(kind, qk_norm, device):
    layer, x = made("grouped", {"position_method": trinix.FastRoPEPositionEmbedding(4, 2), "qk_norm": qk_norm}, device)
    got = in_parts(layer, x, cache_of(layer, kind, device=device), 1, 7, 1)
    torch.testing.assert_close(got, layer(x), atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "kind"), [("grouped", "static"), ("grouped", "paged"), ("latent", "latent")])
@torch.no_grad()
def test_a_captured_step_runs_as_the_cache_grows(name, kind):
    layer, x = made(name, {"position_method": "rope"}, "cuda", torch.bfloat16)
    x = normal((BATCH, 32, 16), torch.bfloat16, seed=1, device="cuda")
    cache = cache_of(layer, kind, capacity=32, device="cuda", dtype=torch.bfloat16)
    wanted = in_parts(layer, x, cache_of(layer, kind, 32, "cuda", torch.bfloat16), 8, *(1,) * 24)
    layer(x[:, :8], cache=cache)
    if kind == "paged":
        cache.reserve(24)
    step = x[:, 8:9].clone()
    graph, y = captured(lambda: layer(step, cache=cache))
    cache.truncate(8)
    if kind == "paged":
        cache.reserve(24)
    for at in range(8, 32):
        step.copy_(x[:, at : at + 1])
        graph.replay()
        torch.testing.assert_close(y[:, 0], wanted[:, at], atol=0.05, rtol=0.05)
    assert cache.lengths.tolist() == [32] * BATCH
    cache.sync()
    assert cache.longest == 32


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: trinix.StaticCache(0, -1, 2, 4), "StaticCache: capacity must be an int from 0 on, got -1"),
        (lambda: trinix.StaticCache(1, 8, 0, 4), "StaticCache: kv_heads must be an int from 1 on, got 0"),
        (lambda: trinix.StaticCache(1, 8, 2, 4.0), "StaticCache: head_dim must be an int from 1 on, got 4.0"),
        (lambda: trinix.PagedCache(2, 4, 0, 2, 4), "PagedCache: page_size must be an int from 1 on, got 0"),
        (lambda: trinix.StaticCache(None, 8, 2, 4), "StaticCache: batch must be an int from 0 on, got None"),
        (lambda: trinix.StaticCache(1, 8, 2, 4, 0), "StaticCache: v_head_dim must be an int from 1 on, got 0"),
        (lambda: trinix.PagedCache(2, None, 4, 2, 4), "PagedCache: pages must be an int from 0 on, got None"),
        (lambda: trinix.LatentCache(1, None, 16), "LatentCache: capacity must be an int from 0 on, got None"),
        (lambda: trinix.LatentCache(1, 8, 16, -8), "LatentCache: rope_head_dim must be an int from 0 on, got -8"),
    ],
)
def test_sizes_that_no_cache_has_are_refused_by_name(make, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        make()
