"""Attention in plain PyTorch: any device, any floating dtype, every option, differentiable to any order by autograd.

Scores and softmax are float32 (float64 for float64), probabilities are rounded to v's dtype before they meet v. The whole
Sq x Sk matrix is in memory, several times over: this is the oracle, and the way out where no kernel runs.
"""

import itertools

import torch
from torch import Tensor

_ROUND = 0xD2511F53, 0xCD9E8D57
_KEY = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
PHILOX_ROUNDS = 7  # the fewest that pass BigCrush (Salmon et al., 2011)


def unsupported(q: Tensor, k: Tensor, v: Tensor, options, backward: bool) -> str | None:
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, options) -> tuple[Tensor, Tensor]:
    """(out, lse); ``options`` is ``trinix.ops.attention.Options``."""
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):  # which would round scores to its dtype
        with torch.autocast(q.device.type, enabled=False):
            return forward(q, k, v, options)
    if options.cu_seqlens_q is None:
        return _dense(q, k, v, options, 0)
    ends_q, ends_k = options.cu_seqlens_q.tolist(), options.cu_seqlens_k.tolist()
    check_ends("cu_seqlens_q", ends_q, q.shape[0])
    check_ends("cu_seqlens_k", ends_k, k.shape[0])
    outs, sums = [], []
    for b in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        slopes = options.alibi_slopes
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[b]
        out, lse = _dense(q[None, rows], k[None, keys], v[None, keys], options._replace(alibi_slopes=slopes), b)
        outs.append(out[0])
        sums.append(lse[0])
    # rows behind the last sequence belong to nobody, and see nothing
    no_keys = options._replace(alibi_slopes=None, sink=None)
    out, lse = _dense(q[None, ends_q[-1] :], k[None, :0], v[None, :0], no_keys, 0)
    outs.append(out[0])
    sums.append(lse[0])
    return torch.cat(outs), torch.cat(sums, 1)


def check_ends(name, ends, rows):
    if ends[0] or ends[-1] > rows or any(a > b for a, b in itertools.pairwise(ends)):
        raise ValueError(
            f"attention: {name} must go from 0 to at most {rows}, the rows that there are, without falling, got {ends}; "
            "it holds the sums of the lengths, beginning with 0"
        )


def wide_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _dense(q, k, v, options, first_batch):
    wide = wide_dtype(q)
    group = q.shape[2] // max(k.shape[2], 1)  # there may be no heads
    queries = q.transpose(1, 2).to(wide)
    keys = k.repeat_interleave(group, 2).transpose(1, 2).to(wide)
    values = v.repeat_interleave(group, 2).transpose(1, 2)
    z = _products(queries, keys) * options.scale
    if options.softcap:
        z = options.softcap * torch.tanh(z / options.softcap)
    distance = key_distance(q.shape[1], k.shape[1], q.device)
    if options.alibi_slopes is not None:
        z = z - options.alibi_slopes.to(wide)[..., None, None] * distance.abs()
    if options.bias is not None:
        z = z + options.bias.to(wide)
    if options.mask is not None:
        z = z.masked_fill(~options.mask, float("-inf"))
    hidden = hidden_by_window(distance, options)
    if hidden is not None:
        z = z.masked_fill(hidden, float("-inf"))
    p, lse = _softmax(z, options.sink)
    if options.dropout_p:
        keep = keep_mask(options.seed, *z.shape, options.dropout_p, first_batch * q.shape[2])
        p = torch.where(keep, p / (1.0 - options.dropout_p), 0.0)
    return (p.to(v.dtype) @ values).transpose(1, 2), lse


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    return queries @ keys.transpose(-1, -2)


def key_distance(seq_q: int, seq_k: int, device: torch.device) -> Tensor:
    """[Sq, Sk]: how far a key stands to the right of its query; the last query stands at the last key."""
    return torch.arange(seq_k, device=device) - torch.arange(seq_k - seq_q, seq_k, device=device)[:, None]


def hidden_by_window(distance: Tensor, options) -> Tensor | None:
    hidden = None
    if options.window_right >= 0:
        hidden = distance > options.window_right
    if options.window_left >= 0:
        left = distance < -options.window_left
        hidden = left if hidden is None else hidden | left
    return hidden


def _softmax(z: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """(probabilities, logarithm of the normaliser); a row of -inf gives zeros and -inf, and no NaN in its gradient."""
    with torch.no_grad():
        most = z.amax(-1, keepdim=True) if z.shape[-1] else z.new_full((*z.shape[:-1], 1), float("-inf"))
        if sink is not None:
            most = torch.maximum(most, sink.to(z.dtype)[:, None, None])
        most = most.masked_fill(most == float("-inf"), 0.0)
    total = torch.exp(z - most).sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink.to(z.dtype)[:, None, None] - most)
    empty = total == 0
    log = torch.log(total.masked_fill(empty, 1.0))
    lse = most + log
    # through lse, as the page has it and as every attention that saves lse for backward computes it; but where a bias hides a
    # whole row with numbers as low as finfo.min, rounding has left nothing of log(total) in lse
    lost = lse.abs() > 1024
    p = torch.exp(z - torch.where(lost, most, lse) - torch.where(lost, log, 0.0))
    return p, lse.masked_fill(empty, float("-inf")).squeeze(-1)


def keep_mask(seed: Tensor, batch: int, heads: int, seq_q: int, seq_k: int, p: float, first_plane: int = 0) -> Tensor:
    """Dropout's mask [B, H, Sq, Sk], True where kept: word j % 4 of Philox-4x32 at counter (j // 4, i, b H + h, 0)."""
    device = seed.device
    counter = [
        torch.arange(-(-seq_k // 4), device=device).expand(batch * heads, seq_q, -1),
        torch.arange(seq_q, device=device)[:, None],
        torch.arange(first_plane, first_plane + batch * heads, device=device)[:, None, None],
        torch.zeros((), dtype=torch.int64, device=device),
    ]
    words = torch.stack(_philox(*counter, seed & _WORD, seed >> 32 & _WORD), -1)
    return words.flatten(2).unflatten(0, (batch, heads))[..., :seq_k] >= drop_below(p)


def drop_below(p: float) -> int:
    """An element is dropped when its 32-bit random word is below this."""
    return min(round(p * 2**32), 2**32 - 1)


def _philox(c0, c1, c2, c3, k0, k1):
    for _ in range(PHILOX_ROUNDS):
        before = c0
        c0 = _high(c2, _ROUND[1]) ^ c1 ^ k0
        c1 = c2 * _ROUND[1] & _WORD
        c2 = _high(before, _ROUND[0]) ^ c3 ^ k1
        c3 = before * _ROUND[0] & _WORD
        k0, k1 = k0 + _KEY[0] & _WORD, k1 + _KEY[1] & _WORD
    return torch.broadcast_tensors(c0, c1, c2, c3)


def _high(a: Tensor, b: int) -> Tensor:
    """The upper word of a 64-bit product of two words, without leaving int64."""
    return a * (b >> 16) + (a * (b & 0xFFFF) >> 16) >> 16
