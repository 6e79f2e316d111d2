"""Attention under other libraries' names: each argument means there what it means here."""

import inspect

import pytest
import torch

import trinix
from helpers import skip_below
from trinix import ops
from trinix.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, triton_attn_func
from trinix.testing import normal


def numbers(*shape, seed=0):
    return normal(shape, torch.float32, seed=seed)


Q, K, V = numbers(2, 6, 4, 8), numbers(2, 9, 2, 8, seed=1), numbers(2, 9, 2, 8, seed=2)


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_they_are_public_names():
    for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, triton_attn_func):
        assert getattr(trinix, function.__name__) is function


def test_the_order_of_arguments_is_the_other_libraries():
    names = {function: list(inspect.signature(function).parameters) for function in (flash_attn_func, triton_attn_func)}
    assert names[flash_attn_func][3:8] == ["dropout_p", "softmax_scale", "causal", "window_size", "softcap"]
    assert names[triton_attn_func][3:] == [
        "attn_mask", "dropout_p", "softmax_scale", "causal", "window_size", "alibi_slopes",
    ]  # fmt: skip


def test_flash_attn_func():
    slopes = torch.rand(4)
    same(flash_attn_func(Q, K, V), ops.attention(Q, K, V))
    same(
        flash_attn_func(Q, K, V, 0.0, 0.3, True, (3, -1), 5.0, slopes, True),
        ops.attention(Q, K, V, causal=True, scale=0.3, window=(3, None), softcap=5.0, alibi_slopes=slopes),
    )
    out, lse, probabilities = flash_attn_func(Q, K, V, return_attn_probs=True)
    same((out, lse), ops.attention(Q, K, V, return_lse=True))
    assert probabilities is None
    with pytest.raises(ValueError, match="return_attn_probs must be False with dropout_p"):
        flash_attn_func(Q, K, V, 0.1, return_attn_probs=True)


def test_flash_attn_varlen_func():
    ends_q, ends_k = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
    q, k, v = Q[0], K[0], V[0]
    got = flash_attn_varlen_func(q, k, v, ends_q, ends_k, 4, 5, causal=True)
    each = [
        flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], causal=True)[0]
        for a, b, c, d in ((0, 2, 0, 4), (2, 6, 4, 9))
    ]
    torch.testing.assert_close(got, torch.cat(each))
    with pytest.raises(ValueError, match="block_table must be None"):
        flash_attn_varlen_func(q, k, v, ends_q, ends_k, 4, 5, block_table=torch.zeros(2, 1, dtype=torch.int32))


def test_triton_attn_func_takes_masks_of_two_three_and_four_dimensions():
    numbers_to_add = numbers(2, 1, 6, 9, seed=4)
    for mask in (numbers_to_add[0, 0], numbers_to_add[:, 0], numbers_to_add):
        wide = mask if mask.ndim != 3 else mask[:, None]
        same(triton_attn_func(Q, K, V, mask), ops.attention(Q, K, V, bias=wide))
    seen = torch.ones(6, 9, dtype=torch.bool).tril(3)
    torch.testing.assert_close(triton_attn_func(Q, K, V, seen), ops.attention(Q, K, V, causal=True))
    slopes = torch.rand(1, 4)
    same(triton_attn_func(Q, K, V, alibi_slopes=slopes), ops.attention(Q, K, V, alibi_slopes=slopes[0]))
    same(
        triton_attn_func(Q, K, V, None, 0.0, 0.5, False, (2, 1)),
        ops.attention(Q, K, V, scale=0.5, window=(2, 1)),
    )


def test_triton_attn_func_has_a_gradient():
    leaves = [t.clone().requires_grad_() for t in (Q, K, V)]
    triton_attn_func(*leaves, causal=True).sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)


# ---- the cache ---------------------------------------------------------------------------------------------------------


def test_a_cache_without_lengths_is_full_and_an_int_is_everybody_s():
    whole = flash_attn_func(Q, K, V, causal=True)
    torch.testing.assert_close(flash_attn_with_kvcache(Q, K, V, causal=True), whole)
    torch.testing.assert_close(
        flash_attn_with_kvcache(Q, K, V, cache_seqlens=7), flash_attn_func(Q, K[:, :7], V[:, :7])
    )
    out, lse = flash_attn_with_kvcache(Q, K, V, softmax_scale=0.3, num_splits=2, return_softmax_lse=True)
    torch.testing.assert_close((out, lse), ops.attention(Q, K, V, scale=0.3, return_lse=True))


def test_new_tokens_are_written_and_seen():
    k_cache, v_cache = K.clone(), V.clone()
    new = numbers(2, 2, 2, 8, seed=5)
    got = flash_attn_with_kvcache(Q, k_cache, v_cache, new, new, cache_seqlens=torch.tensor([3, 7], dtype=torch.int32))
    same((k_cache[0, 3:5], v_cache[1, 7:9]), (new[0], new[1]))
    torch.testing.assert_close(got[1:], flash_attn_func(Q[1:], k_cache[1:], v_cache[1:]))


def test_rows_and_pages_of_a_cache():
    rows = torch.tensor([1, 0])
    flipped = flash_attn_with_kvcache(Q, K.flip(0), V.flip(0), cache_batch_idx=rows, causal=True)
    torch.testing.assert_close(flipped, flash_attn_func(Q, K, V, causal=True))
    pages = [t.reshape(6, 3, 2, 8) for t in (K, V)]
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    torch.testing.assert_close(flash_attn_with_kvcache(Q, *pages, block_table=table), flash_attn_func(Q, K, V))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_rotation_by_the_places_in_the_cache(causal, interleaved):
    cos, sin = ops.rope_table(20, 8)
    new_k, new_v = numbers(2, 6, 2, 8, seed=5), numbers(2, 6, 2, 8, seed=6)
    k_cache, v_cache = torch.zeros(2, 20, 2, 8), torch.zeros(2, 20, 2, 8)
    k_cache[:, :9], v_cache[:, :9] = K, V
    lengths = torch.tensor([9, 4], dtype=torch.int32)
    got = flash_attn_with_kvcache(
        Q,
        k_cache,
        v_cache,
        new_k,
        new_v,
        cos,
        sin,
        cache_seqlens=lengths,
        causal=causal,
        rotary_interleaved=interleaved,
    )
    for b, n in enumerate(lengths.tolist()):
        places = torch.arange(n, n + 6) if causal else torch.full((6,), n)
        q = ops.rope(Q[b : b + 1], cos=cos, sin=sin, interleaved=interleaved, position_ids=places)
        k = ops.rope(new_k[b : b + 1], cos=cos, sin=sin, interleaved=interleaved, offset=n)
        keys, values = torch.cat([K[b : b + 1, :n], k], 1), torch.cat([V[b : b + 1, :n], new_v[b : b + 1]], 1)
        torch.testing.assert_close(got[b : b + 1], flash_attn_func(q, keys, values, causal=causal))
        torch.testing.assert_close(k_cache[b : b + 1, : n + 6], keys)


def rows(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("cache_leftpad must be None", {"cache_leftpad": torch.zeros(2)}),
        ("does not go with block_table", {"cache_batch_idx": torch.zeros(2), "block_table": torch.zeros(2, 1)}),
        ("must say where k goes", {"k": K, "v": V}),
        ("rotary_cos, rotary_sin and k go together", {"rotary_cos": torch.ones(9, 4), "rotary_sin": torch.ones(9, 4)}),
        (
            "rotary_cos, rotary_sin and k go together",
            {"k": K, "v": V, "rotary_sin": torch.ones(9, 4), "cache_seqlens": 0},
        ),
        ("cache_seqlens must be from 0 to 9, with 0 new tokens in a cache of 9, got 10", {"cache_seqlens": 10}),
        ("cache_seqlens must be from 0 to 0, with 9 new tokens", {"k": K, "v": V, "cache_seqlens": 1}),
        (r"window_size must be \(left, right\), -1 for no bound, got 3", {"window_size": 3}),
        ("window_size must hold ints, -1 for no bound, got .'a', 0.", {"window_size": ("a", 0)}),
        ("cache_batch_idx must name rows 0 to 1 of the cache, got 0 to 2", {"cache_batch_idx": rows(0, 2)}),
        ("cache_batch_idx must name rows 0 to 1 of the cache, got -1 to 1", {"cache_batch_idx": rows(1, -1)}),
    ],
)
def test_what_does_not_fit_is_refused_in_words(words, arguments):
    with pytest.raises(ValueError, match=words):
        flash_attn_with_kvcache(Q, K, V, **arguments)


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (
            r"cache_batch_idx must be an int32 tensor \[B\], got torch.float32",
            lambda: flash_attn_with_kvcache(Q, K, V, cache_batch_idx=torch.zeros(2)),
        ),
        (
            r"cache_batch_idx must be an int32 tensor \[B\], got torch.int64 \[\]",
            lambda: flash_attn_with_kvcache(Q, K, V, cache_batch_idx=torch.tensor(1)),
        ),
        (
            "alibi_slopes must be a floating-point tensor, got list",
            lambda: triton_attn_func(Q, K, V, alibi_slopes=[0.5]),
        ),
        (
            "cache_seqlens must be an int or an int32 tensor .*, got float",
            lambda: flash_attn_with_kvcache(Q, K, V, cache_seqlens=1.5),
        ),
        ("k_cache must be a tensor .B, Smax, Hk, D., got NoneType", lambda: flash_attn_with_kvcache(Q, None, V)),
        ("q must be a tensor .*, got NoneType", lambda: flash_attn_with_kvcache(None, K, V, cache_seqlens=1)),
        ("k must be a tensor .*, got list", lambda: flash_attn_with_kvcache(Q, K, V, [K], V, cache_seqlens=1)),
        (
            r"block_table must be a tensor .*, got \[2\]",
            lambda: flash_attn_with_kvcache(Q, K, V, block_table=rows(0, 1)),
        ),
        ("return_attn_probs must be True or False, got 'no'", lambda: flash_attn_func(Q, K, V, return_attn_probs="no")),
        ("attn_mask must be a bool or floating-point tensor, got list", lambda: triton_attn_func(Q, K, V, [[True]])),
        (
            "attn_mask must be a bool or floating-point tensor, got torch.int64",
            lambda: triton_attn_func(Q, K, V, torch.ones(6, 9, dtype=torch.int64)),
        ),
    ],
)
def test_what_is_of_a_wrong_type_is_refused_in_words(words, call):
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.gpu
def test_memory_grows_with_the_length_and_not_with_its_square():
    skip_below(12)
    shape = (1, 32768, 32, 128)
    leaves = [torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in "qkv"]
    dout = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(flash_attn_func(*leaves, causal=True), leaves, dout)
    output_and_gradients = 4 * dout.nbytes
    assert torch.cuda.max_memory_allocated() - before - output_and_gradients < 4 * 2**30
