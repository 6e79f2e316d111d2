"""Attention over a cache in plain PyTorch: any device, any floating dtype, no host reads of the lengths."""

import torch
from torch import Tensor


def unsupported(*arguments) -> str | None:
    return None


def append(k_cache, v_cache, cache_seqlens, k_new, v_new, page_table) -> None:
    """Write the new tokens behind the cached ones, in place; none of a sequence whose length the cache cannot hold."""
    batch, new = k_new.shape[:2]
    pages, page = k_cache.shape[:2]
    room = page * (1 if page_table is None else page_table.shape[1])
    if not (batch and pages and room):
        return
    rows = torch.arange(batch, device=k_new.device)
    fits = (cache_seqlens >= 0) & (cache_seqlens <= room - new)  # their sum may pass 2^31
    # a sequence that does not fit writes what one that does writes, in the same place: the old value there, or elsewhere, might
    # come after a new one
    rows = torch.where(fits, rows, torch.where(fits, rows, 0).amax())
    # no index outside ever reaches PyTorch: on a GPU that would end the process
    at = (cache_seqlens[rows, None] + torch.arange(new, device=k_new.device)).clamp(0, room - 1)
    where = rows[:, None], at
    if page_table is not None:
        where = page_table[rows[:, None], at // page].clamp(0, pages - 1), at % page
    for cache, tokens in ((k_cache, k_new), (v_cache, v_new)):
        cache[where] = torch.where(fits.any(), tokens[rows], cache[where])


def forward(q, k_cache, v_cache, cache_seqlens, k_new, v_new, page_table, options) -> tuple[Tensor, Tensor]:
    """(out, lse); NaN for a sequence whose length the cache cannot hold."""
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):  # which would round scores to its dtype
        with torch.autocast(q.device.type, enabled=False):
            return forward(q, k_cache, v_cache, cache_seqlens, k_new, v_new, page_table, options)
    length, new = cache_seqlens, 0
    if k_new is not None:
        append(k_cache, v_cache, cache_seqlens, k_new, v_new, page_table)
        new = k_new.shape[1]
        length = cache_seqlens + new
    keys, values = k_cache, v_cache
    if page_table is not None:
        pages = page_table.clamp(0, max(k_cache.shape[0] - 1, 0)).long()  # entries behind a length may hold anything
        keys, values = k_cache[pages].flatten(1, 2), v_cache[pages].flatten(1, 2)
    seq, heads = q.shape[1:3]
    group = heads // keys.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    j = torch.arange(keys.shape[1], device=q.device)
    cached = j < length[:, None]  # [B, Smax]
    impossible = (cache_seqlens < 0) | (cache_seqlens > keys.shape[1] - new)  # length may have passed 2^31
    impossible = impossible[:, None, None]
    # what lies behind a length may be NaN: 0 times it is not 0
    keys, values = (t.masked_fill(~cached[:, :, None, None], 0).repeat_interleave(group, 2) for t in (keys, values))
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), keys.to(wide)) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    position = length[:, None] - seq + torch.arange(seq, device=q.device)
    distance = j - position[:, :, None]  # [B, Sq, Smax]
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.to(wide).expand(q.shape[0], heads)
        scores = scores - slopes[:, :, None, None] * distance.abs()[:, None]
    allowed = cached[:, None].expand_as(distance)
    if options.window_left >= 0:
        allowed = allowed & (distance >= -options.window_left)
    if options.window_right >= 0:
        allowed = allowed & (distance <= options.window_right)
    scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    joined = scores
    if options.sink is not None:
        sink = options.sink.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)
        joined = torch.cat([scores, sink], -1)
    if joined.shape[-1]:
        lse = joined.logsumexp(-1)
    else:
        lse = scores.new_full(scores.shape[:3], float("-inf"))
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp().to(q.dtype)
    out = torch.einsum("bhij,bjhd->bihd", weights, values).contiguous()
    return out.masked_fill_(impossible[..., None], float("nan")), lse.masked_fill(impossible, float("nan"))
