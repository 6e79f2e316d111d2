"""Attention modules: projections, positions and a cache around one call into ``trinix.ops.attention``.

=============================  ==================  ====================================================================
module                         key and value heads  projections
=============================  ==================  ====================================================================
FastMultiHeadSelfAttention     H                   q, k and v in one matrix product, ``qkv_proj``
FastGroupedQueryAttention      Hk, a divisor of H  the same
FastMultiQueryAttention        1                   the same
FastMultiHeadAttention         H                   ``q_proj``, ``k_proj``, ``v_proj``: also for cross-attention
FastMultiHeadLatentAttention   H, from a latent    see ``trinix.layers.latent_attention``
=============================  ==================  ====================================================================

All return one tensor ``[B, S, E]``. (FastMultiHeadAttention returns torch's pair where the call says ``need_weights``.) A cache
is an object of ``trinix.layers.cache`` that the call changes; it is never returned.

Masks: ``attention_mask`` is bool, True where a key is seen, or floating point, added to the scores; [Sq, Sk], [B, Sq, Sk] or
broadcastable to [B, H, Sq, Sk]. ``key_padding_mask`` [B, Sk] and FastMultiHeadAttention's ``attn_mask`` are
``torch.nn.MultiheadAttention``'s, where True means *not* seen. A query that sees no key gives 0 (torch's gives NaN).

Causal attention is aligned at the bottom right: the last query stands at the last key.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from trinix import dispatch, ops
from trinix.layers.arguments import (
    check_dropout,
    check_entry,
    check_scores,
    check_sizes,
    check_state,
    refuse_made_weights,
    refuse_unknown,
    sharded,
)
from trinix.layers.cache import PagedCache, StaticCache
from trinix.layers.embedding import FastALiBiPositionEmbedding, FastRoPEPositionEmbedding
from trinix.layers.linear import HOOKS, FastLinear, projected, unhooked
from trinix.layers.norm import FastLayerNorm, FastRMSNorm
from trinix.ops.attention import BACKENDS
from trinix.ops.linear import slices


class _FastAttention(nn.Module):
    """What the modules share; the arguments are described in ``FastGroupedQueryAttention``."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        /,
        *,
        head_dim: int | None = None,
        causal: bool = False,
        position_method: str | nn.Module = "none",
        max_seq_len: int = 2048,
        rope_base: float = 10000.0,
        rope_scaling: dict | None = None,
        rope_interleaved: bool = False,
        sliding_window_size: int | tuple[int | None, int | None] | None = None,
        qk_norm: bool = False,
        qk_norm_type: str = "rmsnorm",
        norm_eps: float = 1e-6,
        add_zero_attn: bool = False,
        softcap: float = 0.0,
        scale: float | None = None,
        batch_first: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown,
    ):
        super().__init__()
        name = type(self).__name__
        refuse_unknown(type(self), unknown)
        dispatch.flags(
            name, bias=bias, causal=causal, rope_interleaved=rope_interleaved, qk_norm=qk_norm, add_zero_attn=add_zero_attn,
            batch_first=batch_first,
        )  # fmt: skip
        check_sizes(name, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, max_seq_len=max_seq_len)
        check_heads(name, embed_dim, num_heads, head_dim)
        check_dropout(name, dropout)
        check_scores(name, softcap, scale)
        dispatch.check_name(name, BACKENDS, backend)
        if num_heads % num_kv_heads:
            raise ValueError(f"{name}: num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}")
        if qk_norm_type not in ("rmsnorm", "layernorm"):
            raise ValueError(f"{name}: qk_norm_type must be 'rmsnorm' or 'layernorm', got {qk_norm_type!r}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim = embed_dim // num_heads if head_dim is None else head_dim
        check_sizes(name, head_dim=head_dim)
        self.dropout = dropout
        self.causal = causal
        self.position_method = position_method if isinstance(position_method, str) else "module"
        self.position = position_of(
            name, position_method, num_heads, head_dim, max_seq_len, rope_base, rope_scaling, rope_interleaved, device
        )
        self.window = window_of(name, sliding_window_size, causal)
        self.add_zero_attn = add_zero_attn
        self.softcap = softcap
        self.scale = scale
        self.batch_first = batch_first
        self.backend = backend
        norm = {"rmsnorm": FastRMSNorm, "layernorm": FastLayerNorm}[qk_norm_type]
        self.q_norm, self.k_norm = (
            norm(head_dim, norm_eps, device=device, dtype=dtype) if qk_norm else None for _ in range(2)
        )
        self.register_load_state_dict_post_hook(fill_tables)

    def reset_parameters(self) -> None:
        """Weights as Xavier and Glorot draw them, biases 0, as in ``torch.nn.MultiheadAttention``."""
        draw(self)

    def _attend(self, q, k, v, attention_mask, key_padding_mask, position_ids, cache, causal) -> Tensor:
        """Attention of the projected heads ``[B, S, heads, D]``, joined: ``[B, Sq, H D]``."""
        if cache is not None:
            if not isinstance(cache, (StaticCache, PagedCache)):
                raise TypeError(
                    f"{type(self).__name__}: cache must be a StaticCache, DynamicCache or PagedCache, got "
                    f"{type(cache).__name__}; make one of those"
                )
            check_cached_call(self, q, cache, attention_mask, key_padding_mask, causal)
        q, k = self._placed(q, k, position_ids, cache, causal)
        options = self._options(q)
        if cache is not None:
            out = cache.attend(q, k, v, **options)
        else:
            k, v, bias, mask, causal = self._seen(q, k, v, attention_mask, key_padding_mask, causal)
            out = ops.attention(
                q, k, v, causal=causal, bias=bias, mask=mask, dropout_p=self.dropout if self.training else 0.0,
                backend=self.backend, **options,
            )  # fmt: skip
        return out.flatten(2)

    def _seen(self, q, k, v, attention_mask, key_padding_mask, causal) -> tuple:
        """(k, v, bias, mask, causal) of ``trinix.ops.attention``."""
        return k, v, *merged(type(self).__name__, q, k, attention_mask, key_padding_mask), causal

    def _options(self, q: Tensor) -> dict:
        """What attention over new keys and over a cache have in common."""
        return {
            "window": self.window,
            "softcap": self.softcap,
            "scale": self.scale,
            "alibi_slopes": self.position.slopes if self.position_method == "alibi" else None,
            # a zero key scores 0 and a zero value adds nothing: a logit of 0 in the normaliser
            "sink": q.new_zeros(self.num_heads, dtype=torch.float32) if self.add_zero_attn else None,
        }

    def _placed(self, q, k, position_ids, cache, causal) -> tuple[Tensor, Tensor]:
        """q and k after norm and positions."""
        rotates = self.position_method == "rope"
        if position_ids is not None and self.position_method in ("none", "alibi"):
            raise ValueError(
                f"{type(self).__name__}: position_ids need position_method 'rope' or a module, "
                f"this one has {self.position_method!r}"
            )
        offset = cache.lengths if position_ids is None and cache is not None and cache.lengths is not None else 0
        together = q.shape[1] == k.shape[1]
        if rotates or isinstance(self.position, FastRoPEPositionEmbedding):
            longest = max(q.shape[1], k.shape[1]) if cache is None else reach(cache, q.shape[1])
            cos, sin = self.position.grow(longest)  # for position_ids too, which are seldom beyond
        if rotates and together and unhooked(self.position) and _only_scale(self.q_norm, self.k_norm):
            return ops.qk_norm_rope(
                q, k, self.q_norm.weight, self.k_norm.weight, cos, sin, eps=self.q_norm.eps,
                interleaved=self.position.interleaved, position_ids=position_ids, offset=offset,
            )  # fmt: skip
        if self.q_norm is not None:
            # under autocast a norm's weights are wider than q: what leaves must still meet v
            q, k = self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)
        if rotates and not together:
            if position_ids is not None:
                raise ValueError(
                    f"{type(self).__name__}: position_ids name the positions of queries and keys alike, got {q.shape[1]} "
                    f"queries and {k.shape[1]} keys; leave them out, both count from 0 (causal: the last stand together)"
                )
            ahead = k.shape[1] - q.shape[1] if causal else 0
            return self.position(q, offset=max(ahead, 0)), self.position(k, offset=max(-ahead, 0))
        if rotates or self.position_method == "module":
            return self.position(q, k, position_ids=position_ids, offset=offset)
        return q, k

    def extra_repr(self) -> str:
        shown = {
            "num_kv_heads": self.num_kv_heads if self.num_kv_heads != self.num_heads else None,
            "head_dim": self.head_dim,
            "causal": self.causal or None,
            "dropout": self.dropout or None,
            "position_method": None if self.position_method == "none" else self.position_method,
            "window": self.window,
            "add_zero_attn": self.add_zero_attn or None,
            "softcap": self.softcap or None,
            "scale": self.scale,
            "backend": None if self.backend == "auto" else self.backend,
        }
        sizes = f"{self.embed_dim}, {self.num_heads}"
        return ", ".join([sizes, *(f"{n}={v}" for n, v in shown.items() if v is not None)])


class FastGroupedQueryAttention(_FastAttention):
    """Self-attention whose H query heads share Hk heads of keys and values (arXiv:2305.13245); ``[B, S, E]`` to ``[B, S, E]``.

    Args:
        embed_dim, num_heads, num_kv_heads: E, H and Hk.
        dropout: probability that an attention weight is dropped, in training mode only.
        bias: every projection has one.
        out_bias: o_proj has one; as ``bias`` if None. (Qwen2's checkpoints have biases of q, k and v only.)
        head_dim: D; embed_dim / num_heads if None.
        causal: a query sees no key after it.
        position_method: "none", "rope", "alibi", or a module that is called as
            ``q, k = module(q, k, position_ids=..., offset=...)`` with q ``[B, Sq, H, D]`` and k ``[B, Sk, Hk, D]``; offset, an
            int or a tensor [B], is how many tokens the cache holds.
        max_seq_len: the first length of RoPE's table, which grows.
        rope_base, rope_scaling, rope_interleaved: as in ``trinix.FastRoPEPositionEmbedding``.
        sliding_window_size: (left, right) as in ``trinix.ops.attention``; an int W is the W nearest keys back, the query's
            own among them, and W - 1 keys ahead where attention is not causal.
        qk_norm: every head of q and k is normalised, before positions, by a norm with a weight [D].
        qk_norm_type: "rmsnorm" or "layernorm"; norm_eps: its eps.
        add_zero_attn: softmax sees one more key and value, both 0.
        softcap, scale: as in ``trinix.ops.attention``.
        batch_first: x is ``[B, S, E]``, not ``[S, B, E]``.
        backend: as in ``trinix.ops.attention``; calls with a cache choose by themselves.

    >>> layer = trinix.FastGroupedQueryAttention(64, 8, 2, causal=True, position_method="rope")
    >>> layer(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    # device by name, here and below: torch.nn.utils.skip_init looks for it in the signature
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        out_bias: bool | None = None,
        device: torch.device | str | None = None,
        **options,
    ):
        super().__init__(embed_dim, num_heads, num_kv_heads, dropout, bias, device=device, **options)
        out_bias = bias if out_bias is None else out_bias
        dispatch.flags(type(self).__name__, out_bias=out_bias)
        place = {"device": device, "dtype": options.get("dtype")}
        heads = num_heads + 2 * num_kv_heads
        self.qkv_proj = FastLinear(embed_dim, heads * self.head_dim, bias, **place)
        self.o_proj = FastLinear(num_heads * self.head_dim, embed_dim, out_bias, **place)
        self.reset_parameters()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
    ) -> Tensor:
        """Attention among the tokens of ``hidden_states`` ``[B, S, E]``.

        Args:
            attention_mask, key_padding_mask: see the top of this file.
            position_ids: ``[B, S]``, ``[1, S]`` or ``[S]``, instead of 0 .. S - 1 behind the cache; below max_seq_len, or the
                number of tokens (a cache's too) where that is more.
            cache: of ``trinix.layers.cache``: the tokens are appended to it, and see all that it holds.
        """
        check_input(type(self).__name__, "hidden_states", hidden_states, self.embed_dim)
        x = hidden_states if self.batch_first else hidden_states.transpose(0, 1)
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = slices(heads, (self.num_heads, self.num_kv_heads, self.num_kv_heads), 2)
        out = self._attend(q, k, v, attention_mask, key_padding_mask, position_ids, cache, self.causal)
        out = self.o_proj(out)
        return out if self.batch_first else out.transpose(0, 1)

    def checkpoint(self, prefix: str = "") -> dict[str, Tensor]:
        """Weights and biases under the names that LLaMA's checkpoints use: q_proj, k_proj, v_proj, o_proj; detached views.

        Raises:
            ValueError: a projection or norm has no weight of its own (wrapped, quantised).
        """
        state = {}
        sizes = [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        for module, kind, value in entries(self, _LLAMA):
            if module == "qkv_proj":
                state |= {f"{prefix}{p}_proj.{kind}": t for p, t in zip("qkv", value.split(sizes), strict=True)}
            else:
                state[f"{prefix}{module}.{kind}"] = value
        return state

    def load_checkpoint(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Copy separate projections, under the names of ``checkpoint``, from ``state``; its other entries are left alone.

        Raises:
            ValueError: an entry is missing, has another shape, or has no place here (a bias, a norm of q and k); a weight is
                no parameter (parametrized, pruned, wrapped).
            TypeError: an entry is no tensor of numbers as they are: 8 bits and integers are codes that a scale belongs to.
        """
        refuse_made_weights(type(self).__name__, *weighted(self, _LLAMA).values())
        modules = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        places = self.checkpoint(prefix)
        load_entries(type(self).__name__, state, places, prefix, modules)
        if sharded(self.qkv_proj.weight):
            for kind, parameter in self.qkv_proj.named_parameters():
                parameter.detach().copy_(torch.cat([places[f"{prefix}{p}_proj.{kind}"] for p in "qkv"]))


_LLAMA = ("qkv_proj", "o_proj", "q_norm", "k_norm")


class FastMultiHeadSelfAttention(FastGroupedQueryAttention):
    """Self-attention with as many heads of keys and values as of queries (arXiv:1706.03762), projected by one matrix product.

    Args:
        embed_dim, num_heads: E and H.

    Other arguments are ``trinix.FastGroupedQueryAttention``'s.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        **options,
    ):
        super().__init__(embed_dim, num_heads, num_heads, dropout, bias, device=device, **options)


class FastMultiQueryAttention(FastGroupedQueryAttention):
    """Self-attention whose query heads share one head of keys and values (arXiv:1911.02150).

    Args:
        embed_dim, num_heads: E and H.

    Other arguments are ``trinix.FastGroupedQueryAttention``'s.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        **options,
    ):
        super().__init__(embed_dim, num_heads, 1, dropout, bias, device=device, **options)


class FastMultiHeadAttention(_FastAttention):
    """Attention of queries over keys and values that may come from elsewhere, with the arguments of
    ``torch.nn.MultiheadAttention``; ``from_torch`` takes one over.

    Differences: ``batch_first`` is True unless told otherwise, and a call that does not say ``need_weights`` returns one tensor,
    not torch's pair. (``torch.nn.TransformerEncoderLayer`` and its kin do say it, and take ``[0]``: this module fits in there.
    In a ``torch.nn.TransformerEncoder`` that was made before, set its ``use_nested_tensor`` to False: it would look for torch's
    weights when padding is given.)

    A state_dict of torch's module is loaded as one of its own is.

    Args:
        embed_dim, num_heads: E and H.
        kdim, vdim: widths of key and value; E if None.
        add_bias_kv: every sequence has one more key and value, the parameters ``bias_k`` and ``bias_v`` ``[1, 1, E]``, which
            no mask hides and no norm touches. Not with positions, a window or a cache.

    Other arguments are ``trinix.FastGroupedQueryAttention``'s.

    >>> layer = trinix.FastMultiHeadAttention(8, 2, kdim=6, vdim=6)
    >>> layer(torch.randn(2, 5, 8), torch.randn(2, 3, 6)).shape
    torch.Size([2, 5, 8])
    """

    # what torch.nn.TransformerEncoder asks its attention before it takes its weights: there are none to take
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        add_bias_kv: bool = False,
        device: torch.device | str | None = None,
        **options,
    ):
        super().__init__(embed_dim, num_heads, num_heads, dropout, bias, device=device, **options)
        dispatch.flags("FastMultiHeadAttention", add_bias_kv=add_bias_kv)
        for argument, usual in (("position_method", "none"), ("sliding_window_size", None)):
            if add_bias_kv and options.get(argument, usual) != usual:
                raise ValueError(
                    f"FastMultiHeadAttention: add_bias_kv needs {argument} {usual!r}, for bias_k stands nowhere among the keys, got "
                    f"{options[argument]!r}; leave one of them out"
                )
        place = {"device": device, "dtype": options.get("dtype")}
        width = num_heads * self.head_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        check_sizes("FastMultiHeadAttention", kdim=self.kdim, vdim=self.vdim)
        self.q_proj = FastLinear(embed_dim, width, bias, **place)
        self.k_proj = FastLinear(self.kdim, width, bias, **place)
        self.v_proj = FastLinear(self.vdim, width, bias, **place)
        self.o_proj = FastLinear(width, embed_dim, bias, **place)
        for side in ("bias_k", "bias_v"):
            self.register_parameter(side, nn.Parameter(torch.empty(1, 1, width, **place)) if add_bias_kv else None)
        self.register_load_state_dict_pre_hook(_take_torchs_names)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``torch.nn.MultiheadAttention`` draws: weights of Xavier and Glorot, biases 0, bias_k and bias_v normal."""
        super().reset_parameters()
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Attention of ``query`` ``[B, Sq, E]`` over ``key`` ``[B, Sk, kdim]`` and ``value`` ``[B, Sk, vdim]``.

        Args:
            key, value: the query, and the key, if None.
            key_padding_mask, attn_mask: torch's, True where a key is *not* seen, or floating point to be added; attn_mask is
                [Sq, Sk] or [B * H, Sq, Sk].
            need_weights: None returns out. True returns (out, weights) with weights ``[B, Sq, Sk]``, or ``[B, H, Sq, Sk]``
                without ``average_attn_weights``; they are in memory then. With ``add_bias_kv`` they have one more column, and
                with ``add_zero_attn`` a last one for the zero. False returns (out, None), as torch does.
            is_causal: this call is causal; beside an attn_mask for Sq != Sk it says what that mask is, and adds nothing.
            attention_mask, position_ids, cache: as in ``FastGroupedQueryAttention``.
        """
        dispatch.flags(
            "FastMultiHeadAttention", need_weights=need_weights is not None and need_weights,
            average_attn_weights=average_attn_weights, is_causal=is_causal,
        )  # fmt: skip
        if cache is not None and any(t is not None and t is not query for t in (key, value)):
            raise ValueError("FastMultiHeadAttention: a cache is for self-attention; leave key and value out")
        if cache is not None and self.bias_k is not None:
            raise ValueError("FastMultiHeadAttention: a cache knows no bias_k; make the layer without add_bias_kv")
        key = query if key is None else key
        value = key if value is None else value
        shared = key is query, value is key
        unbatched = isinstance(query, Tensor) and query.dim() == 2
        widths = self.embed_dim, self.kdim, self.vdim
        for argument, x, width in zip(("query", "key", "value"), (query, key, value), widths, strict=True):
            check_input("FastMultiHeadAttention", argument, x, width, unbatched)
        if unbatched:
            query, key, value = query[None], key[None], value[None]
            if isinstance(key_padding_mask, Tensor) and key_padding_mask.dim() == 1:
                key_padding_mask = key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if key.shape[0] != query.shape[0] or value.shape[:2] != key.shape[:2]:
            raise ValueError(
                "FastMultiHeadAttention: key and value must have the query's batch, and value the key's length, got [batch, length] "
                f"{[list(t.shape[:2]) for t in (query, key, value)]}; expand or pad them"
            )
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self._projected(query, key, value, *shared))
        if attn_mask is not None:
            attention_mask = self._as_seen(attn_mask, attention_mask, q, k)
        # torch's masks are aligned at the top left
        causal = self.causal or (is_causal and (attn_mask is None or query.shape[1] == key.shape[1]))
        weights = None
        if need_weights:
            out, weights = self._with_weights(q, k, v, attention_mask, key_padding_mask, position_ids, cache, causal)
        else:
            out = self._attend(q, k, v, attention_mask, key_padding_mask, position_ids, cache, causal)
        out = self.o_proj(out)
        # sequences first: dense as torch's, for callers that view it
        out = out[0] if unbatched else out if self.batch_first else out.transpose(0, 1).contiguous()
        if not need_weights:
            return out if need_weights is None else (out, None)
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights[0] if unbatched else weights

    def _projected(self, query, key, value, one_qk: bool, one_kv: bool) -> list[Tensor]:
        """The three projections; what is one tensor for several of them is read as one."""
        if one_kv and one_qk:
            return projected(query, self.q_proj, self.k_proj, self.v_proj)
        if one_kv:
            return [self.q_proj(query), *projected(key, self.k_proj, self.v_proj)]
        return [self.q_proj(query), self.k_proj(key), self.v_proj(value)]

    def _as_seen(self, attn_mask, attention_mask, q, k) -> Tensor:
        """torch's mask as one of ours."""
        if attention_mask is not None:
            raise ValueError("FastMultiHeadAttention: attn_mask and attention_mask are one thing; give one of them")
        _check_mask("FastMultiHeadAttention", "attn_mask", attn_mask, q)
        shape, (batch, queries), keys = list(attn_mask.shape), q.shape[:2], k.shape[1]
        if attn_mask.dim() == 3 and shape[0] == batch * self.num_heads:
            attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
        if not _broadcasts(attn_mask, q, k):
            raise ValueError(
                f"FastMultiHeadAttention: attn_mask must be [Sq, Sk] = {[queries, keys]} or [B * H, Sq, Sk] = "
                f"{[batch * self.num_heads, queries, keys]}, got {shape}; padding [B, Sk] goes into key_padding_mask"
            )
        return ~attn_mask if attn_mask.dtype == torch.bool else attn_mask

    def _seen(self, q, k, v, attention_mask, key_padding_mask, causal) -> tuple:
        """With ``add_bias_kv`` its key in front of the others: the last query still stands at the last key."""
        k, v, bias, mask, causal = super()._seen(q, k, v, attention_mask, key_padding_mask, causal)
        if self.bias_k is None:
            return k, v, bias, mask, causal
        keys = k.shape[1]
        if causal and q.shape[1] > keys + 1:  # first queries, before all keys and that one
            seen = torch.ones(q.shape[1], keys, dtype=torch.bool, device=q.device).tril(keys - q.shape[1])
            mask, causal = seen if mask is None else mask & seen, False
        bias, mask = (
            t if t is None else nn.functional.pad(t.expand(*t.shape[:-1], keys), (1, 0), value=value)
            for t, value in ((bias, 0.0), (mask, True))
        )
        k, v = (
            torch.cat((extra.to(t.dtype).unflatten(-1, (self.num_heads, -1)).expand(t.shape[0], -1, -1, -1), t), 1)
            for extra, t in ((self.bias_k, k), (self.bias_v, v))
        )
        return k, v, bias, mask, causal

    def _with_weights(self, q, k, v, attention_mask, key_padding_mask, position_ids, cache, causal):
        """(out ``[B, Sq, H D]``, weights ``[B, H, Sq, Sk]``)."""
        if cache is not None:
            raise ValueError("FastMultiHeadAttention: need_weights does not go with a cache; leave one of them out")
        q, k = self._placed(q, k, position_ids, None, causal)
        k, v, bias, mask, causal = self._seen(q, k, v, attention_mask, key_padding_mask, causal)
        # the weights are what attention makes of an identity
        keys = k.shape[1]
        identity = torch.eye(keys, dtype=k.dtype, device=k.device)[:, None].expand(
            k.shape[0], keys, self.num_heads, keys
        )
        weights = ops.attention(
            q, k, identity, causal=causal, bias=bias, mask=mask, backend="torch", **self._options(q)
        ).transpose(1, 2)
        if self.bias_k is not None:  # torch has it behind the keys
            weights, v = weights.roll(-1, -1), v.roll(-1, 1)
        if self.add_zero_attn:
            weights = torch.cat((weights, 1 - weights.sum(-1, keepdim=True)), -1)
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        out = weights[..., :keys] @ v.transpose(1, 2)
        return out.transpose(1, 2).flatten(2), weights

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **options) -> "FastMultiHeadAttention":
        """A module that computes what ``module`` computes, with copies of its parameters, frozen where they are; ``options``
        are added, and go before what ``module`` was made with.

        Raises:
            TypeError: ``module`` has hooks or a forward of its own, which the new one would not run.
            ValueError: ``module`` makes its weights of others (parametrized, pruned); options leave no place for its biases.

        >>> theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        >>> ours, x = trinix.FastMultiHeadAttention.from_torch(theirs), torch.randn(2, 3, 8)
        >>> torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-6)
        True
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(
                f"FastMultiHeadAttention: from_torch wants a torch.nn.MultiheadAttention, got {type(module).__name__}"
            )
        if hooks := [name for name in HOOKS if getattr(module, name)]:
            raise TypeError(
                f"FastMultiHeadAttention: from_torch got a module with hooks ({hooks[0]}), which ours would not run; remove them first"
            )
        if "forward" in module.__dict__:
            raise TypeError(
                "FastMultiHeadAttention: from_torch got a module with a forward of its own, which ours would not run; delete it first"
            )
        out = module.out_proj
        theirs = {
            "embed_dim": module.embed_dim, "num_heads": module.num_heads, "dropout": module.dropout,
            "bias": module.in_proj_bias is not None, "kdim": module.kdim, "vdim": module.vdim,
            "add_bias_kv": module.bias_k is not None, "add_zero_attn": module.add_zero_attn, "batch_first": module.batch_first,
            "device": out.weight.device, "dtype": out.weight.dtype,
        }  # fmt: skip
        ours = cls(**theirs | options)
        state = module.state_dict(keep_vars=True)
        missing, left = ours.load_state_dict(state, strict=False)  # options may have added norms
        if lost := [key for key in missing if "_proj." in key or key in ("bias_k", "bias_v")]:
            raise ValueError(
                f"FastMultiHeadAttention: from_torch found no {lost} in the module's state; remove parametrizations and pruning first"
            )
        if left:
            raise ValueError(
                f"FastMultiHeadAttention: from_torch has no place for the module's {left}; give no options against bias or add_bias_kv"
            )
        _take_torchs_names(ours, state, "")
        for key, parameter in ours.named_parameters():
            if key in state:
                parameter.requires_grad_(state[key].requires_grad)
        return ours.train(module.training)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.bias_k is None else ", add_bias_kv=True")


def _take_torchs_names(layer: FastMultiHeadAttention, state: dict[str, Tensor], prefix: str, *_) -> None:
    """What ``torch.nn.MultiheadAttention`` keeps, under this module's names."""
    for kind in ("weight", "bias"):
        whole = state.get(f"{prefix}in_proj_{kind}")
        if whole is not None and whole.shape[0] % 3 == 0:
            parts = state.pop(f"{prefix}in_proj_{kind}").chunk(3)
            state |= {f"{prefix}{p}_proj.{kind}": t for p, t in zip("qkv", parts, strict=True)}
        for theirs, ours in (
            ("q_proj_", "q_proj."),
            ("k_proj_", "k_proj."),
            ("v_proj_", "v_proj."),
            ("out_proj.", "o_proj."),
        ):
            if prefix + theirs + kind in state:
                state[prefix + ours + kind] = state.pop(prefix + theirs + kind)


# ---- shared with latent attention -----------------------------------------------------------------------------------------


def _only_scale(*norms: nn.Module | None) -> bool:
    """Whether their weights and one eps say all that ``norms`` do."""
    return (
        all(type(n) is FastRMSNorm and n.weight is not None and not n.weight_offset and unhooked(n) for n in norms)
        and norms[0].eps is not None
        and all(n.eps == norms[0].eps for n in norms)
    )


def check_heads(name: str, embed_dim: int, num_heads: int, head_dim: int | None) -> None:
    if head_dim is None and embed_dim % num_heads:
        raise ValueError(f"{name}: embed_dim {embed_dim} must be a multiple of num_heads {num_heads}; or give head_dim")


def check_input(name: str, argument: str, x: Tensor, width: int, unbatched: bool = False) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(x).__name__}")
    if x.dim() != (2 if unbatched else 3) or x.shape[-1] != width:
        wanted = (
            f"[S, {width}] beside a query without batch"
            if unbatched
            else f"[B, S, {width}] (S first without batch_first)"
        )
        raise ValueError(f"{name}: {argument} must be {wanted}, got {list(x.shape)}; reshape it, or check the widths")


def fill_tables(layer: nn.Module, _) -> None:
    """Positions, which no state_dict has, leave the meta device with the parameters that ``load_state_dict(assign=True)`` gave."""
    device, ours = next(layer.parameters()).device, (FastRoPEPositionEmbedding, FastALiBiPositionEmbedding)
    if device.type != "meta" and isinstance(layer.position, ours) and any(t.is_meta for t in layer.position.buffers()):
        layer.position.to_empty(device=device)


def draw(layer: nn.Module) -> None:
    """New weights for a layer's projections and norms."""
    for module in layer.children():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()


def check_cached_call(layer: nn.Module, x: Tensor, cache, attention_mask, key_padding_mask, causal: bool) -> None:
    """Refuse what a call with a cache cannot do; x is ``[B, S, ...]``."""
    name = type(layer).__name__
    if attention_mask is not None or key_padding_mask is not None:
        raise ValueError(f"{name}: a cache takes no mask; pad prompts on the right, then cache.truncate(their lengths)")
    if not causal:
        raise ValueError(f"{name}: a cache needs causal attention; make the layer with causal=True")
    if layer.training and layer.dropout:
        raise ValueError(f"{name}: a cache knows no dropout; call eval() first")
    cache.check(*x.shape[:2])


def window_of(name: str, size, causal: bool) -> tuple[int | None, int | None] | None:
    """``sliding_window_size`` as attention's window."""
    if size is None or (
        isinstance(size, tuple) and len(size) == 2 and all(s is None or (type(s) is int and s >= 0) for s in size)
    ):
        return size
    if type(size) is not int or size < 1:
        raise ValueError(
            f"{name}: sliding_window_size must be an int from 1 on, (left, right) of ints from 0 on or None, or None, got {size!r}"
        )
    return size - 1, 0 if causal else size - 1


def position_of(name, method, num_heads, rotary_dim, length, base, scaling, interleaved, device) -> nn.Module | None:
    """The module behind a ``position_method``."""
    if isinstance(method, FastALiBiPositionEmbedding):
        raise TypeError(
            f"{name}: position_method must be a module that places q and k, got FastALiBiPositionEmbedding, which makes a bias; "
            "give 'alibi'"
        )
    if isinstance(method, nn.Module) or method == "none":
        return method if isinstance(method, nn.Module) else None
    if method == "rope":
        if rotary_dim % 2:
            raise ValueError(f"{name}: position_method 'rope' needs an even head_dim, got {rotary_dim}")
        made = FastRoPEPositionEmbedding(rotary_dim, length, base, interleaved=interleaved, scaling=scaling)
    elif method == "alibi":
        made = FastALiBiPositionEmbedding(num_heads)
    else:
        raise ValueError(f"{name}: position_method must be 'none', 'rope', 'alibi' or a module, got {method!r}")
    return made.to(device) if device is not None else made


def reach(cache, tokens: int) -> int:
    """How many positions a table must have for ``tokens`` behind a cache, and for all that a static one will ever hold."""
    return cache.longest + tokens if cache.capacity is None else cache.capacity


def merged(name: str, q: Tensor, k: Tensor, attention_mask: Tensor | None, key_padding_mask: Tensor | None):
    """(bias, mask) of ``trinix.ops.attention``; q is ``[B, Sq, H, ...]``, k ``[B, Sk, ...]``."""
    bias = mask = None
    for argument, given in (("attention_mask", attention_mask), ("key_padding_mask", key_padding_mask)):
        if given is None:
            continue
        _check_mask(name, argument, given, q)
        if argument == "key_padding_mask":
            if given.shape != k.shape[:2]:
                raise ValueError(
                    f"{name}: key_padding_mask must be [B, Sk] = {list(k.shape[:2])}, got {list(given.shape)}; give every "
                    "sequence a row, every key a column"
                )
            given = (~given if given.dtype == torch.bool else given)[:, None, None]
        elif not _broadcasts(given, q, k):
            raise ValueError(
                f"{name}: attention_mask must be [Sq, Sk], [B, Sq, Sk] or [B, H, Sq, Sk], or 1 in their places, with [B, H, Sq, Sk] = "
                f"{[q.shape[0], q.shape[2], q.shape[1], k.shape[1]]}, got {list(given.shape)}; padding [B, Sk] goes into "
                "key_padding_mask"
            )
        elif given.dim() == 3:
            given = given[:, None]
        if given.dtype == torch.bool:
            mask = given if mask is None else mask & given
        else:
            bias = given if bias is None else bias + given
    return bias, mask


def _broadcasts(mask: Tensor, q: Tensor, k: Tensor) -> bool:
    """Whether a mask, ``[B, Sq, Sk]`` if of three dimensions, is broadcastable to ``[B, H, Sq, Sk]``."""
    shape = (mask.shape[0], 1, *mask.shape[1:]) if mask.dim() == 3 else mask.shape
    full = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    return len(shape) <= 4 and all(n in (1, m) for n, m in zip(reversed(shape), reversed(full), strict=False))


def _check_mask(name: str, argument: str, given, q: Tensor) -> None:
    if not isinstance(given, Tensor) or (given.dtype != torch.bool and not given.is_floating_point()):
        got = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(
            f"{name}: {argument} must be bool or floating point, got {got}; convert numbers 0 and 1 with .bool()"
        )
    if given.device != q.device:
        raise ValueError(
            f"{name}: {argument} must be on {q.device}, where q is, got {given.device}; move it there with .to()"
        )


def weighted(layer: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The layer's projections and norms of those names: not what it was made without, and no norm without parameters."""
    found = {name: getattr(layer, name, None) for name in names}
    return {
        name: module
        for name, module in found.items()
        if module is not None and (name.endswith("_proj") or any(True for _ in module.parameters()))
    }


def entries(layer: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, str, Tensor]]:
    """(module, "weight" or "bias", value) of what they multiply by and add, detached."""
    for name, module in weighted(layer, names).items():
        for kind in ("weight", "bias"):
            value = getattr(module, kind, None)
            if isinstance(value, Tensor):
                yield name, kind, value.detach()
            elif kind == "weight":
                raise ValueError(
                    f"{type(layer).__name__}: {name} is a {type(module).__name__}, which has no weight to be named; merge or unwrap "
                    "it first"
                )


def load_entries(name: str, state: dict[str, Tensor], places: dict[str, Tensor], prefix: str, modules) -> None:
    """Copy ``state``'s entries into the views ``places``, all of them or none; those of ``modules`` must all have a place."""
    check_state(name, state)
    known = [f"{prefix}{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    if lost := [key for key in known if key in state and key not in places]:
        raise ValueError(
            f"{name}: load_checkpoint has no place for {lost}; check how the layer is made: bias, norms, latents"
        )
    for key, place in places.items():
        if key not in state:
            raise ValueError(f"{name}: load_checkpoint found no {key}; check the prefix, bias and qk_norm")
        check_entry(name, key, place, state[key])
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(state[key])
