"""Attention under the names of other libraries, so that switching to trinix is an import.

``flash_attn_func``, ``flash_attn_varlen_func`` and ``flash_attn_with_kvcache`` take the arguments of flash-attn 2, and
``triton_attn_func`` those of the library that the seed documents describe. They call ``trinix.ops.attention`` and
``trinix.ops.attention_decode``, and so run on any GPU, and on a CPU. What differs:

- q, k and v may be float32 too, head dimensions are any, v's may differ from k's.
- A row that sees no key has lse -inf (flash-attn 2 says inf).
- Dropout draws other random numbers. ``return_attn_probs=True`` returns None for the probabilities, which no kernel here
  forms; with dropout it is refused, since they would have carried the mask.
- ``flash_attn_with_kvcache`` refuses a call that would record a gradient, where flash-attn silently drops it.

``triton_attn_func`` here has a backward, and takes Sq != Sk, key heads fewer than query heads, and a bool mask.
"""

from numbers import Integral

import torch
from torch import Tensor

from trinix import dispatch
from trinix.ops import attention, attention_decode, rope

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache", "triton_attn_func"]


def _sides(window_size) -> tuple[int | None, int | None] | None:
    """-1 (or any negative number) is no bound there, None here."""
    if window_size is None:
        return None
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"flash_attn: window_size must be (left, right), -1 for no bound, got {window_size!r}")
    left, right = window_size
    if not all(side is None or isinstance(side, (int, torch.SymInt, Integral)) for side in (left, right)):
        raise ValueError(f"flash_attn: window_size must hold ints, -1 for no bound, got {window_size!r}")
    return None if left is None or left < 0 else left, None if right is None or right < 0 else right


def triton_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention of q ``[B, Sq, H, D]`` over k and v ``[B, Sk, Hk, D]``.

    Args:
        attn_mask: ``[Sq, Sk]``, ``[B, Sq, Sk]`` or ``[B, 1 or H, Sq, Sk]``: numbers to add to the scores, or bool, True where
            a key is seen. Nothing is expanded.
        alibi_slopes: ``[H]``, ``[1, H]`` or ``[B, H]``.

    >>> q = torch.zeros(1, 2, 1, 4)
    >>> v = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> trinix.triton_attn_func(q, q, v, causal=True).flatten().tolist()
    [1.0, 2.0]
    """
    if attn_mask is not None and not (
        isinstance(attn_mask, Tensor) and (attn_mask.dtype == torch.bool or attn_mask.is_floating_point())
    ):
        got = attn_mask.dtype if isinstance(attn_mask, Tensor) else type(attn_mask).__name__
        raise TypeError(
            f"triton_attn_func: attn_mask must be a bool or floating-point tensor, got {got}; convert it, to bool if it says "
            "which keys are seen"
        )
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unsqueeze(1)
    where = "mask" if attn_mask is not None and attn_mask.dtype == torch.bool else "bias"
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.ndim == 2 and alibi_slopes.shape[0] == 1:
        alibi_slopes = alibi_slopes[0]
    return attention(
        q, k, v, causal=causal, window=_sides(window_size), scale=softmax_scale, alibi_slopes=alibi_slopes,
        dropout_p=dropout_p, **{where: attn_mask},
    )  # fmt: skip


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of q ``[B, Sq, H, D]`` over k and v ``[B, Sk, Hk, D]``; with ``return_attn_probs`` (out, lse, None).

    >>> q = torch.zeros(1, 2, 1, 4)
    >>> trinix.flash_attn_func(q, q, q, causal=True).shape
    torch.Size([1, 2, 1, 4])
    """
    return _flash(
        q, k, v, return_attn_probs, dropout_p=dropout_p, scale=softmax_scale, causal=causal, window=_sides(window_size),
        softcap=softcap, alibi_slopes=alibi_slopes, deterministic=deterministic,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """The same for sequences one behind the other: q ``[T, H, D]``, k and v ``[Tk, Hk, D]``; lse is ``[H, T]``."""
    if block_table is not None:
        raise ValueError(
            "flash_attn_varlen_func: block_table must be None here, got a tensor; "
            "flash_attn_with_kvcache reads pages, for one number of queries a sequence"
        )
    return _flash(
        q, k, v, return_attn_probs, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, dropout_p=dropout_p, scale=softmax_scale, causal=causal, window=_sides(window_size),
        softcap=softcap, alibi_slopes=alibi_slopes, deterministic=deterministic,
    )  # fmt: skip


def _flash(q, k, v, return_attn_probs, **options):
    if type(return_attn_probs) is not bool:
        dispatch.flags("flash_attn", return_attn_probs=return_attn_probs)
    if not return_attn_probs:
        return attention(q, k, v, **options)
    if options["dropout_p"]:
        raise ValueError(
            f"flash_attn_func: return_attn_probs must be False with dropout_p={options['dropout_p']}, got True; "
            "the mask that the probabilities would carry is never in memory"
        )
    return *attention(q, k, v, **options, return_lse=True), None


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q ``[B, Sq, H, D]`` over a cache, with k and v ``[B, Sn, Hk, D]`` written behind its tokens first.

    Args:
        k_cache, v_cache: ``[B, Smax, Hk, D]``, or pages ``[P, page, Hk, D]`` with ``block_table``.
        rotary_cos, rotary_sin: ``[P, R / 2]``; q and k are rotated by their positions in a launch of their own. Needs k.
        cache_seqlens: how many tokens the cache holds before this call; int32 ``[B]``, one int for all, or None for all of it.
        cache_batch_idx: int32 ``[B]``, the row of the cache that each sequence has. Not with ``block_table``.
        cache_leftpad: None; padding on the left is refused.
        num_splits: 0 chooses.
    """
    if cache_leftpad is not None:
        raise ValueError(
            "flash_attn_with_kvcache: cache_leftpad must be None here, got a tensor; keep sequences at the front of the cache"
        )
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError(
                "flash_attn_with_kvcache: cache_batch_idx does not go with block_table, got both; pick rows of the table"
            )
        given = isinstance(cache_batch_idx, Tensor)
        if not given or cache_batch_idx.dtype not in (torch.int32, torch.int64) or cache_batch_idx.ndim != 1:
            got = f"{cache_batch_idx.dtype} {list(cache_batch_idx.shape)}" if given else type(cache_batch_idx).__name__
            raise TypeError(
                f"flash_attn_with_kvcache: cache_batch_idx must be an int32 tensor [B], got {got}; convert it"
            )
        _check_rows(cache_batch_idx, k_cache)
        block_table = cache_batch_idx.to(torch.int32)[:, None]
    if not isinstance(cache_seqlens, Tensor):
        if cache_seqlens is not None and not isinstance(cache_seqlens, (int, torch.SymInt)):
            raise TypeError(
                "flash_attn_with_kvcache: cache_seqlens must be an int or an int32 tensor [B], got "
                f"{type(cache_seqlens).__name__}; convert it"
            )
        for name, t, shape in (
            ("q", q, "[B, Sq, H, D]"), ("k_cache", k_cache, "[B, Smax, Hk, D]"), ("k", k, "[B, Sn, Hk, D]"),
            ("block_table", block_table, "[B, pages]"),
        ):  # fmt: skip
            if not (isinstance(t, Tensor) and t.ndim == shape.count(",") + 1) and (
                t is not None or name in ("q", "k_cache")
            ):
                got = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
                raise TypeError(
                    f"flash_attn_with_kvcache: {name} must be a tensor {shape}, got {got}; reshape or convert it"
                )
        capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        if cache_seqlens is None:
            if k is not None:
                raise ValueError(
                    "flash_attn_with_kvcache: cache_seqlens must say where k goes, got None; pass the lengths before this call"
                )
            cache_seqlens = capacity
        new = 0 if k is None else k.shape[1]
        if not 0 <= cache_seqlens <= capacity - new:
            raise ValueError(
                f"flash_attn_with_kvcache: cache_seqlens must be from 0 to {capacity - new}, with {new} new tokens in a cache of "
                f"{capacity}, got {cache_seqlens}; make a larger cache"
            )
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    window = _sides(window_size)
    if rotary_cos is not None or rotary_sin is not None:
        if k is None or rotary_cos is None or rotary_sin is None:
            raise ValueError(
                "flash_attn_with_kvcache: rotary_cos, rotary_sin and k go together, got None; pass all three"
            )
        table = {"cos": rotary_cos, "sin": rotary_sin, "interleaved": rotary_interleaved}
        k = rope(k, **table, offset=cache_seqlens)
        if causal or window not in (None, (None, None)):
            q = rope(q, **table, offset=cache_seqlens)
        else:  # flash-attn takes all queries to be at one position there
            places = cache_seqlens[:, None].expand(-1, q.shape[1])
            q = rope(q, **table, position_ids=places)
    return attention_decode(
        q, k_cache, v_cache, cache_seqlens, k_new=k, v_new=v, page_table=block_table, causal=causal, window=window,
        softcap=softcap, alibi_slopes=alibi_slopes, scale=softmax_scale, num_splits=num_splits or None,
        return_lse=return_softmax_lse,
    )  # fmt: skip


def _check_rows(rows: Tensor, k_cache: Tensor) -> None:
    """Where the host can see it, a row that the cache has not is named: another sequence's would be read, and written."""
    if not rows.numel() or not isinstance(k_cache, Tensor) or not k_cache.ndim or not dispatch.readable(rows):
        return
    least, most = map(int, rows.aminmax())
    if least < 0 or most >= k_cache.shape[0]:
        raise ValueError(
            f"flash_attn_with_kvcache: cache_batch_idx must name rows 0 to {k_cache.shape[0] - 1} of the cache, got {least} to "
            f"{most}; make a larger cache"
        )
