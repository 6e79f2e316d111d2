"""Attention as cases: how each implementation is called on a case's tensors.

``attention`` has q, k and v, [B, S, heads, D] or with ``layout = "BHSD"`` [B, heads, S, D], as document 001 has them.
``attention_decode`` has queries, k_cache and v_cache, the cache full; with ``page`` the caches are pages in a shuffled order, and
with ``latent`` there is no v_cache: values are the keys' first channels.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from trinix.lab.case import Case


def of(case: Case, core: Callable) -> Callable:
    """``core(q, k, v)`` on [B, S, heads, D] as a function of the case's tensors."""
    if case.args.get("layout") != "BHSD":
        return core

    def call(*tensors):
        y = core(*(t.transpose(1, 2) for t in tensors))
        return y.transpose(1, 2) if isinstance(y, Tensor) else y

    return call


def heads_first(case: Case, core: Callable) -> Callable:
    """``core(q, k, v)`` on [B, heads, S, D] as a function of the case's tensors."""
    return of(case, lambda *tensors: core(*(t.transpose(1, 2) for t in tensors)).transpose(1, 2))


SCORED = ("attention", "attention_layers")  # ops whose formula holds every score


def scores(case: Case) -> int:
    """How many scores a case of ``SCORED`` has, hidden ones too."""
    if case.op == "attention_layers":
        batch, length, _ = case.shape["x"]
        return batch * case.args["heads"] * length**2
    q = case.shape["q"]
    return q[0] * q[1] * q[2] * case.shape["k"][2 if case.args.get("layout") == "BHSD" else 1]


def grouped(case: Case) -> bool:
    axis = 1 if case.args.get("layout") == "BHSD" else 2
    return case.shape["q"][axis] != case.shape["k"][axis]


def sdpa(case: Case) -> Callable:
    """PyTorch's fused attention, whichever of its kernels it chooses; in float64 its formula."""
    causal, gqa = case.args["causal"], grouped(case)
    return heads_first(case, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa))


def naive(case: Case) -> Callable:
    """The documents' formula: scores, mask, softmax, values, each a tensor in memory."""
    causal, gqa = case.args["causal"], grouped(case)

    def core(q, k, v):
        if gqa:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        return torch.softmax(scores, -1) @ v

    return heads_first(case, core)


# ---- decoding ----------------------------------------------------------------------------------------------------------


def lengths(case: Case, device: torch.device) -> Tensor:
    return _lengths(case.shape["queries"][0], keys(case), device)


@cache
def _lengths(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.full((batch,), length, dtype=torch.int32, device=device)


def keys(case: Case) -> int:
    """How many keys a sequence has."""
    pages, length = case.shape["k_cache"][:2]
    return pages // case.shape["queries"][0] * length if "page" in case.args else length


def page_table(case: Case, device: torch.device) -> Tensor | None:
    return _page_table(case.shape["queries"][0], case.shape["k_cache"][0], device) if "page" in case.args else None


@cache
def _page_table(batch: int, pages: int, device: torch.device) -> Tensor:
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    return order.view(batch, -1).to(device, torch.int32)


def decoding(case: Case, core: Callable) -> Callable | str:
    """``core(q, k, v)`` on [B, heads, S, D] over a whole cache as a function of the case's tensors, or why there is none."""
    if "page" in case.args:
        return "it has no page table"
    if "latent" in case.args:
        return "it has no head dimension of its own for values, nor one beyond 256"
    return lambda queries, *caches: core(*(t.transpose(1, 2) for t in (queries, *caches))).transpose(1, 2)


def values(case: Case, caches: tuple[Tensor, ...]) -> Tensor:
    return caches[0][..., : case.args["latent"]] if "latent" in case.args else caches[1]


def sdpa_decode(case: Case) -> Callable:
    """PyTorch's fused attention over the whole cache, of pages over a copy of them; the last query stands at the last key.

    Of latents the query heads of a key head are queries beside each other: no fused kernel has heads so wide with shared keys,
    and the formula would write the keys out for every head, more than a card holds.
    """
    count, heads, key_heads = *case.shape["queries"][1:3], case.shape["k_cache"][2]
    # not in the call: torch.compile would trace how the table is made
    table = page_table(case, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    fold, gqa = "latent" in case.args and count == 1, heads != key_heads
    seen = None
    if count > 1:
        from torch.nn.attention.bias import causal_lower_right  # imports torch.compile's half of PyTorch: seconds

        seen = causal_lower_right(count, keys(case))

    def call(queries, *caches):
        k, v = caches[0], values(case, caches)
        if table is not None:
            k, v = (t[table.to(t.device)].flatten(1, 2) for t in (k, v))
        k, v = (t.transpose(1, 2) for t in (k, v))
        if fold:
            q = queries.view(-1, key_heads, heads // key_heads, queries.shape[-1])
            return F.scaled_dot_product_attention(q, k, v).flatten(1, 2).unsqueeze(1)
        q = queries.transpose(1, 2)
        if seen is None:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa).transpose(1, 2)
        # the bias is for the fused kernel; elsewhere it would warn before it becomes this mask
        mask = seen if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) else _seen(count, k.shape[2], q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa).transpose(1, 2)

    return call


def _seen(count: int, length: int, device: torch.device) -> Tensor:
    return torch.ones(count, length, dtype=torch.bool, device=device).tril(length - count)
