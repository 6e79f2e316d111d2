"""Multi-head latent attention of DeepSeek-V2 and V3 (arXiv:2405.04434, section 2.1): keys and values of all heads come from one
latent of L channels, and only that is cached.

For a token x, with R rotated channels that all heads share and N that are not (D = R + N)::

    c        = norm(x Wdkv[:L])            k_rope = rope(x Wdkv[L:])            kv_down_proj  [L + R, E]
    k_h      = [k_rope, c Wk_h]            v_h    = c Wv_h                      kv_up_proj    [H (N + Dv), L]
    q_h      = rope(norm(x Wdq) Wq_h)      its first R channels turn            q_down_proj   [Lq, E], q_up_proj [H D, Lq]
    out      = concat_h(attention(q_h, k_h, v_h)) Wo                            o_proj        [E, H Dv]

With a cache that holds tokens, Wk moves to the query, since q_h . c Wk_h = q_h Wk_h^T . c, and Wv behind the sum: attention reads
the cached rows [c, k_rope], the same for every head, and never makes keys and values again.

``kv_up_proj`` has no bias: in a key it would add the same number to all scores of a query, which softmax does not see. (What is
put in its place may add one.)
Rotated channels come first in a head here; DeepSeek's checkpoints have them last: ``load_checkpoint`` knows. Those rotate
neighbouring channels: give ``rope_interleaved=True``.
"""

import math

import torch
from torch import Tensor, nn

from trinix import dispatch, ops
from trinix.layers.arguments import check_dropout, check_scores, check_sizes, refuse_made_weights, refuse_unknown
from trinix.layers.attention import (
    check_cached_call,
    check_heads,
    check_input,
    draw,
    entries,
    fill_tables,
    load_entries,
    merged,
    position_of,
    reach,
    weighted,
    window_of,
)
from trinix.layers.cache import LatentCache
from trinix.layers.linear import FastLinear, only_multiplies, projected
from trinix.layers.norm import FastRMSNorm
from trinix.ops.attention import BACKENDS
from trinix.ops.latent import keys_and_values
from trinix.ops.linear import slices

DEEPSEEK = {  # our names: theirs
    "q_down_proj": "q_a_proj", "q_norm": "q_a_layernorm", "q_up_proj": "q_b_proj",
    "kv_down_proj": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up_proj": "kv_b_proj", "o_proj": "o_proj",
}  # fmt: skip


class FastMultiHeadLatentAttention(nn.Module):
    """Self-attention over a latent, ``[B, S, E] -> [B, S, E]``; the formulas are at the top of this file.

    Args:
        embed_dim, num_heads: E and H.
        latent_dim: L; max(16, E / 8) if None.
        dropout, bias, causal, max_seq_len, rope_base, rope_scaling, rope_interleaved, sliding_window_size, add_zero_attn,
            softcap, batch_first, backend: as in ``trinix.FastGroupedQueryAttention``.
        q_latent_dim: Lq; L if None, and 0 projects queries from x at once by ``q_up_proj``.
        head_dim: N, channels of a head that no position turns; E / H if None.
        v_head_dim: Dv; N if None.
        position_method: "rope" (R = ``rope_head_dim``), "none" (R = 0) or "alibi" (R = 0).
        rope_head_dim: R, even.
        scale: 1 / sqrt(R + N) if None; with a ``rope_scaling`` that has YaRN's ``mscale_all_dim`` times
            (0.1 mscale_all_dim log(factor) + 1)^2, as DeepSeek's models have it.
        latent_norm: RMSNorm of both latents.
        norm_eps: its eps.

    >>> layer = trinix.FastMultiHeadLatentAttention(64, 4, latent_dim=16, causal=True)
    >>> layer(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        latent_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        q_latent_dim: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        causal: bool = False,
        position_method: str = "rope",
        rope_head_dim: int = 64,
        max_seq_len: int = 2048,
        rope_base: float = 10000.0,
        rope_scaling: dict | None = None,
        rope_interleaved: bool = False,
        sliding_window_size: int | tuple[int | None, int | None] | None = None,
        latent_norm: bool = True,
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
            name, bias=bias, causal=causal, rope_interleaved=rope_interleaved, latent_norm=latent_norm,
            add_zero_attn=add_zero_attn, batch_first=batch_first,
        )  # fmt: skip
        check_sizes(name, embed_dim=embed_dim, num_heads=num_heads, max_seq_len=max_seq_len)
        check_heads(name, embed_dim, num_heads, head_dim)
        check_dropout(name, dropout)
        check_scores(name, softcap, scale)
        dispatch.check_name(name, BACKENDS, backend)
        if position_method not in ("none", "rope", "alibi"):
            raise ValueError(f"{name}: position_method must be 'none', 'rope' or 'alibi', got {position_method!r}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.latent_dim = max(16, embed_dim // 8) if latent_dim is None else latent_dim
        self.q_latent_dim = self.latent_dim if q_latent_dim is None else q_latent_dim
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.v_head_dim = self.head_dim if v_head_dim is None else v_head_dim
        self.rope_head_dim = rope_head_dim if position_method == "rope" else 0
        check_sizes(name, latent_dim=self.latent_dim, head_dim=self.head_dim, v_head_dim=self.v_head_dim)
        if self.q_latent_dim != 0:
            check_sizes(name, q_latent_dim=self.q_latent_dim)
        if position_method == "rope" and (type(rope_head_dim) is not int or rope_head_dim < 2 or rope_head_dim % 2):
            raise ValueError(
                f"{name}: rope_head_dim must be an even int from 2 on, got {rope_head_dim!r}; without rotated channels give "
                "position_method='none'"
            )
        self.dropout = dropout
        self.causal = causal
        self.position_method = position_method
        self.position = position_of(
            name,
            position_method,
            num_heads,
            rope_head_dim,
            max_seq_len,
            rope_base,
            rope_scaling,
            rope_interleaved,
            device,
        )
        self.window = window_of(name, sliding_window_size, causal)
        self.add_zero_attn = add_zero_attn
        self.softcap = softcap
        if scale is None:
            scale = (self.rope_head_dim + self.head_dim) ** -0.5
            if (
                self.rope_head_dim
                and rope_scaling
                and rope_scaling.get("mscale_all_dim")
                and rope_scaling["factor"] > 1
            ):
                scale *= (0.1 * rope_scaling["mscale_all_dim"] * math.log(rope_scaling["factor"]) + 1) ** 2
        self.scale = scale
        self.batch_first = batch_first
        self.backend = backend

        place = {"device": device, "dtype": dtype}
        rows = num_heads * (self.rope_head_dim + self.head_dim)
        if self.q_latent_dim:
            self.q_down_proj = FastLinear(embed_dim, self.q_latent_dim, bias, **place)
        self.q_up_proj = FastLinear(self.q_latent_dim or embed_dim, rows, bias, **place)
        self.kv_down_proj = FastLinear(embed_dim, self.latent_dim + self.rope_head_dim, bias, **place)
        self.kv_up_proj = FastLinear(self.latent_dim, num_heads * (self.head_dim + self.v_head_dim), False, **place)
        self.o_proj = FastLinear(num_heads * self.v_head_dim, embed_dim, bias, **place)
        normed = latent_norm and self.q_latent_dim
        self.q_norm = FastRMSNorm(self.q_latent_dim, norm_eps, **place) if normed else None
        self.kv_norm = FastRMSNorm(self.latent_dim, norm_eps, **place) if latent_norm else None
        self.register_load_state_dict_post_hook(fill_tables)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``FastGroupedQueryAttention``'s."""
        draw(self)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LatentCache | None = None,
    ) -> Tensor:
        """As ``FastGroupedQueryAttention``'s; the cache is a ``LatentCache``."""
        check_input(type(self).__name__, "hidden_states", hidden_states, self.embed_dim)
        x = hidden_states if self.batch_first else hidden_states.transpose(0, 1)
        if cache is not None:
            if not isinstance(cache, LatentCache):
                raise TypeError(f"{type(self).__name__}: cache must be a LatentCache, got {type(cache).__name__}")
            if cache.latent_dim != self.latent_dim:
                raise ValueError(
                    f"{type(self).__name__}: cache must have this layer's latent_dim {self.latent_dim}, got {cache.latent_dim}; make "
                    "it with the layer's latent_dim and rope_head_dim"
                )
            check_cached_call(self, x, cache, attention_mask, key_padding_mask, self.causal)
        q, latent, k_rope = self._projected(x, position_ids, cache)
        options = {
            "window": self.window,
            "softcap": self.softcap,
            "scale": self.scale,
            "alibi_slopes": self.position.slopes if self.position_method == "alibi" else None,
            "sink": q.new_zeros(self.num_heads, dtype=torch.float32) if self.add_zero_attn else None,
        }
        if cache is None:
            bias, mask = merged(type(self).__name__, q, latent, attention_mask, key_padding_mask)
            dropout_p = self.dropout if self.training else 0.0
            more = {"causal": self.causal, "bias": bias, "mask": mask, "dropout_p": dropout_p, "backend": self.backend}
            out = ops.attention(q, *self._keys_and_values(latent, k_rope), **more, **options)
        else:
            rows = (latent if k_rope is None else torch.cat((latent, k_rope[:, :, 0]), -1))[:, :, None]
            if cache.longest:
                out = self._absorbed(q, rows, cache, options)
            else:
                cache.append(rows)
                out = ops.attention(q, *self._keys_and_values(latent, k_rope), causal=True, **options)
        out = self.o_proj(out.flatten(2))
        return out if self.batch_first else out.transpose(0, 1)

    def _projected(self, x, position_ids, cache) -> tuple[Tensor, Tensor, Tensor | None]:
        """(q ``[B, S, H, R + N]``, latent ``[B, S, L]``, k_rope ``[B, S, 1, R]``), normed and rotated."""
        q, row = projected(x, self.q_down_proj if self.q_latent_dim else self.q_up_proj, self.kv_down_proj)
        if self.q_latent_dim:
            q = q if self.q_norm is None else self.q_norm(q).to(q.dtype)
            q = self.q_up_proj(q)
        q = q.unflatten(-1, (self.num_heads, -1))
        latent, k_rope = row, None
        if self.rope_head_dim:
            latent, k_rope = row.split((self.latent_dim, self.rope_head_dim), -1)
        if self.kv_norm is not None:
            latent = self.kv_norm(latent).to(latent.dtype)
        if not self.rope_head_dim:
            if position_ids is not None:
                raise ValueError(
                    f"{type(self).__name__}: position_ids need position_method 'rope', this one has {self.position_method!r}"
                )
            return q, latent, None
        self.position.grow(x.shape[1] if cache is None else reach(cache, x.shape[1]))
        offset = cache.lengths if position_ids is None and cache is not None else 0
        places = {"position_ids": position_ids, "offset": offset}
        return self.position(q, **places), latent, self.position(k_rope[:, :, None], **places)

    def _keys_and_values(self, latent: Tensor, k_rope: Tensor | None) -> tuple[Tensor, Tensor]:
        """k ``[B, S, H, R + N]`` and v ``[B, S, H, Dv]`` of every head."""
        both = self.kv_up_proj(latent).unflatten(-1, (self.num_heads, -1))
        if k_rope is not None:
            return keys_and_values(both, k_rope, self.head_dim, self.backend)
        return slices(both, (self.head_dim, self.v_head_dim), 3)

    def _absorbed(self, q: Tensor, rows: Tensor, cache: LatentCache, options: dict) -> Tensor:
        """Attention over the cached rows, ``[B, S, H, Dv]``: Wk goes to the query, Wv behind the sum."""
        up, bias = self._multiplied(rows)
        w_key, w_value = up.split((self.head_dim, self.v_head_dim), 1)
        rotated, plain = q.split((self.rope_head_dim, self.head_dim), -1)
        seen = torch.einsum("bshn,hnl->bshl", plain, w_key)
        out = cache.attend(torch.cat((seen, rotated), -1), rows, **options)
        out = torch.einsum("bshl,hvl->bshv", out, w_value)
        return out if bias is None else out + bias[:, self.head_dim :]  # the weights of the values add up to 1

    def _multiplied(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """What ``kv_up_proj`` multiplies by, ``[H, N + Dv, L]``, and what it adds, ``[H, N + Dv]``."""
        proj = self.kv_up_proj
        if only_multiplies(proj):
            up, bias = proj.weight, proj.bias
        else:  # LoRA, quantised, hooked: what it makes of an identity and of zeros
            up = proj(torch.eye(self.latent_dim + 1, self.latent_dim, dtype=rows.dtype, device=rows.device)).T
            up, bias = up[:, :-1] - up[:, -1:], up[:, -1]
        if bias is None:
            return up.unflatten(0, (self.num_heads, -1)), None
        if self.softcap or self.add_zero_attn:  # which see what is added to all scores of a query
            known = getattr(proj, "bias", None) is not None
            if known or (dispatch.readable(bias) and bool(bias.any())):
                raise ValueError(
                    f"{type(self).__name__}: over a cache softcap and add_zero_attn want a kv_up_proj that adds nothing, got a "
                    f"{type(proj).__name__} that does; leave its bias out, or the cache"
                )
        return up.unflatten(0, (self.num_heads, -1)), bias.unflatten(0, (self.num_heads, -1))

    def checkpoint(self, prefix: str = "") -> dict[str, Tensor]:
        """Weights and biases under the names of DeepSeek's checkpoints and in their order of channels; detached.

        Raises:
            ValueError: a projection or norm has no weight of its own (wrapped, quantised).
        """
        known = DEEPSEEK | ({} if self.q_latent_dim else {"q_up_proj": "q_proj"})
        return {
            f"{prefix}{known[module]}.{kind}": self._rotated_last(value) if module == "q_up_proj" else value
            for module, kind, value in entries(self, DEEPSEEK)
        }

    def load_checkpoint(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Copy an attention of DeepSeek-V2 or V3, under the names of ``checkpoint``, from ``state``.

        Raises:
            ValueError: an entry is missing, has another shape, or has no place here; a weight is no parameter
                (parametrized, pruned, wrapped).
            TypeError: an entry is no tensor of numbers as they are: the 8 bits of DeepSeek-V3's published files want
                their ``weight_scale_inv`` first.
        """
        refuse_made_weights(type(self).__name__, *weighted(self, DEEPSEEK).values())
        places = self.checkpoint(prefix)
        load_entries(type(self).__name__, state, places, prefix, (*DEEPSEEK.values(), "q_proj"))
        up = "q_b_proj" if self.q_latent_dim else "q_proj"
        with torch.no_grad():
            for kind, parameter in self.q_up_proj.named_parameters():
                parameter.copy_(self._rotated_first(places[f"{prefix}{up}.{kind}"]))

    def _rotated_last(self, rows: Tensor) -> Tensor:
        """Rows of ``q_up_proj`` with every head's R rotated channels behind the others."""
        rope, plain = rows.unflatten(0, (self.num_heads, -1)).split((self.rope_head_dim, self.head_dim), 1)
        return torch.cat((plain, rope), 1).flatten(0, 1)

    def _rotated_first(self, rows: Tensor) -> Tensor:
        plain, rope = rows.unflatten(0, (self.num_heads, -1)).split((self.head_dim, self.rope_head_dim), 1)
        return torch.cat((rope, plain), 1).flatten(0, 1)

    def extra_repr(self) -> str:
        shown = {
            "latent_dim": self.latent_dim,
            "q_latent_dim": self.q_latent_dim,
            "head_dim": self.head_dim,
            "rope_head_dim": self.rope_head_dim,
            "v_head_dim": self.v_head_dim,
            "causal": self.causal or None,
            "dropout": self.dropout or None,
            "window": self.window,
            "add_zero_attn": self.add_zero_attn or None,
        }
        sizes = f"{self.embed_dim}, {self.num_heads}"
        return ", ".join([sizes, *(f"{n}={v}" for n, v in shown.items() if v is not None)])
