"""What attention keeps of earlier tokens: one object a layer, which the layer appends to and attends over.

=============  ==============================================  ===========================================================
cache          memory                                          for
=============  ==============================================  ===========================================================
StaticCache    batch x capacity tokens, taken at once          decode steps in CUDA graphs
DynamicCache   grows with the tokens                           a length that nobody knows before
PagedCache     pages of ``page_size`` tokens from a pool       sequences of very different lengths
LatentCache    one row of L + R numbers a token, no heads      FastMultiHeadLatentAttention
=============  ==============================================  ===========================================================

``lengths``, int32 [B] on the device, counts every sequence's tokens; new tokens go behind them. ``longest`` is the host's own
count of the longest one, for checks that must not wait for the device. A replayed CUDA graph moves ``lengths`` only: tell
the host by ``count``, or by ``sync``. (Behind the capacity results are NaN on a GPU.)

A batch of prompts of different lengths is padded on the right; ``truncate(prompt_lengths)`` after the prefill forgets the
padding. Keys are kept as attention reads them, after norm and rotation. A cache holds no graph: it refuses tensors that want
a gradient.
"""

import torch
from torch import Tensor

from trinix import dispatch, ops
from trinix.layers.arguments import check_sizes


class _Cache:
    """Lengths and what all caches do with them."""

    capacity: int | None  # tokens that a sequence may reach; None: no bound

    def __init__(self, batch: int, capacity: int, device: torch.device | str | None):
        check_sizes(type(self).__name__, 0, batch=batch, capacity=capacity)
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.longest = 0
        self.leader: _Cache | None = None

    def follow(self, leader: "_Cache") -> None:
        """Let ``leader``, the cache of the layer that runs last, count for this one too: a model's layers count alike, and one
        kernel a step does it. Both are empty and of one batch, and neither is a DynamicCache, which makes its lengths as it fills."""
        if not isinstance(leader, _Cache):
            raise TypeError(
                f"{type(self).__name__}: follow wants the cache of the layer that runs last, got {type(leader).__name__}"
            )
        if leader is self or leader.leader is not None:
            raise ValueError(
                f"{type(self).__name__}: follow wants another cache, one that follows none; give the last layer's"
            )
        for cache in (self, leader):
            if cache.lengths is None or cache.longest:
                raise ValueError(
                    f"{type(self).__name__}: follow wants both caches empty and of a fixed batch, got a {type(cache).__name__} of "
                    f"{cache.longest} tokens; follow before the first call, and let a DynamicCache count for itself"
                )
        leader.check(self.lengths.shape[0], 0)
        self.leader, self.lengths = leader, leader.lengths

    def sync(self) -> None:
        """Read ``longest`` from the device, after CUDA graphs have moved ``lengths``."""
        self.longest = int(self.lengths.max()) if self.lengths.numel() else 0

    def truncate(self, lengths: Tensor | int) -> None:
        """Forget the tokens of every sequence from ``lengths`` (int, or int tensor [B]) on."""
        if lengths is not None and not isinstance(lengths, str):  # of which as_tensor would not say the name
            lengths = torch.as_tensor(lengths, device=self.lengths.device)
        lengths = self._integers("truncate", "lengths", lengths).to(self.lengths.device, torch.int64)
        lengths = lengths.clamp(max=2**31 - 1)  # 2^32 would be 0 in int32
        if lengths.shape not in ((), self.lengths.shape) or bool((lengths < 0).any()):
            raise ValueError(
                f"{type(self).__name__}: truncate wants an int or a tensor [B] = {list(self.lengths.shape)}, from 0 on, got "
                f"{lengths.tolist()}; give the tokens to keep, not those to drop (rewind drops)"
            )
        if self.leader is None:
            self.lengths.copy_(torch.minimum(self.lengths, lengths))
            self.sync()
        else:  # the leader, whose turn comes later, may have more to do before it shortens them
            self._shorten(lengths)

    def _shorten(self, lengths: Tensor) -> None:
        """``truncate`` of the host's own count: the longest sequence is at most as long as that."""
        self.longest = min(self.longest, int(lengths.max())) if lengths.numel() else 0

    def count(self, tokens: int) -> None:
        """Note on the host that every sequence has ``tokens`` more, or fewer below 0; ``lengths`` say so already."""
        self.longest += tokens

    def rewind(self, tokens: int) -> None:
        """Take back the last ``tokens`` of every sequence; all have them, and the host does not wait for the device."""
        check_sizes(type(self).__name__, 0, tokens=tokens)
        if tokens > (least := self._shortest()):
            raise ValueError(
                f"{type(self).__name__}: rewind by {tokens} of {least} tokens, where the shortest sequence ends; use "
                "truncate(lengths) for some of them, or reset() for all"
            )
        if tokens and self.leader is None:
            self.lengths.sub_(tokens)
        self.count(-tokens)

    def _shortest(self) -> int:
        """How many tokens the shortest sequence has, at most: a device is not asked, nor a leader whose turn comes later."""
        counted = self.leader is None or self.leader.longest == self.longest
        if self.longest and counted and dispatch.readable(self.lengths) and self.lengths.numel():
            return int(self.lengths.min())
        return self.longest

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self.lengths.zero_()
        self.longest = 0

    def reorder(self, index: Tensor) -> None:
        """Sequence b becomes what sequence ``index[b]`` ([B], integers from 0 to B - 1) was: the step of a beam search. Copies.

        An index on the CPU is checked; one on a GPU, where PyTorch would end the process, is not. Where the longest one goes,
        ``longest`` stays what it was until ``sync`` (not with pages, which the host counts)."""
        self._integers("reorder", "index", index)
        if index.shape != self.lengths.shape:
            raise ValueError(
                f"{type(self).__name__}: reorder wants index [B] = {list(self.lengths.shape)}, got {list(index.shape)}; give every "
                "sequence the number of one"
            )
        if dispatch.readable(index):
            self._check_rows(index.tolist())
        index = index.to(self.lengths.device, torch.int64)
        self._reorder(index)
        if self.leader is None:
            self.lengths.copy_(self.lengths[index])

    def _reorder(self, index: Tensor) -> None:
        raise NotImplementedError

    def _check_rows(self, index: list[int]) -> None:
        batch = self.lengths.shape[0]
        if not all(0 <= row < batch for row in index):
            raise ValueError(
                f"{type(self).__name__}: reorder wants index from 0 to {batch - 1}, got {index}; beams count within the cache's batch"
            )

    def _integers(self, method: str, argument: str, given) -> Tensor:
        if (
            not isinstance(given, Tensor)
            or given.dtype == torch.bool
            or given.is_floating_point()
            or given.is_complex()
        ):
            got = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(
                f"{type(self).__name__}: {method} wants {argument} as integers, got {got}; convert it with .long()"
            )
        return given

    def check(self, batch: int, tokens: int) -> None:
        """Refuse what does not fit."""
        name = type(self).__name__
        if self.lengths is not None and batch != self.lengths.shape[0]:
            raise ValueError(f"{name}: made for a batch of {self.lengths.shape[0]}, got {batch}; make one of that size")
        if self.capacity is not None and self.longest + tokens > self.capacity:
            raise ValueError(
                f"{name}: {self.longest} tokens and {tokens} more exceed its capacity of {self.capacity}; make a larger "
                "one, or reset() it"
            )

    def _admit(self, *tensors: Tensor) -> int:
        """How many tokens come in, once they are found to fit."""
        batch, tokens = tensors[0].shape[:2]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise ValueError(f"{type(self).__name__}: a cache keeps no gradient; call the model under torch.no_grad()")
        self.check(batch, tokens)
        return tokens

    def _check_kind(self, *pairs: tuple[Tensor, Tensor]) -> None:
        """Refuse what an assignment would convert, move or broadcast; a decoding step's op checks by itself."""
        for kept, new in pairs:
            mine, theirs = ((t.dtype, t.device, list(t.shape[2:])) for t in (kept, new))
            if mine != theirs:
                raise ValueError(
                    f"{type(self).__name__}: made for {mine[0]} on {mine[1]} with [heads, channels] {mine[2]}, got {theirs[0]} "
                    f"on {theirs[1]} with {theirs[2]}; make it with the layer's sizes, and the dtype of its keys (autocast's)"
                )

    def _advance(self, tokens: int) -> None:
        if self.leader is None:
            self.lengths.add_(tokens)
        self.count(tokens)


class StaticCache(_Cache):
    """Keys ``[B, capacity, Hk, D]`` and values ``[B, capacity, Hk, Dv]`` at addresses that never change.

    Args:
        batch, capacity: B, and the tokens that a sequence may reach.
        kv_heads, head_dim, v_head_dim: Hk, D and Dv (D if None) of the layer.

    >>> layer = trinix.FastMultiHeadSelfAttention(8, 2, causal=True)
    >>> x = torch.randn(1, 5, 8)
    >>> cache = trinix.StaticCache(1, capacity=16, kv_heads=2, head_dim=4)
    >>> with torch.no_grad():
    ...     steps = [layer(x[:, :4], cache=cache), layer(x[:, 4:], cache=cache)]
    >>> torch.allclose(torch.cat(steps, 1), layer(x), atol=1e-5)
    True
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(batch, capacity, device)
        wide = head_dim if v_head_dim is None else v_head_dim
        check_sizes(type(self).__name__, kv_heads=kv_heads, head_dim=head_dim, v_head_dim=wide)
        shape = batch, capacity, kv_heads
        self.keys = torch.zeros(*shape, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros(*shape, wide, device=device, dtype=dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        """Append k and v ``[B, S, Hk, D]``; causal attention of q ``[B, S, H, D]`` over all that is kept."""
        tokens = self._admit(q, k, v)
        if self.longest:
            out = ops.attention_decode(q, self.keys, self.values, self.lengths, k_new=k, v_new=v, **options)
        else:  # nothing is kept yet: the new tokens attend among themselves
            self._check_kind((self.keys, k), (self.values, v))
            self.keys[:, :tokens] = k
            self.values[:, :tokens] = v
            out = ops.attention(q, k, v, causal=True, **options)
        self._advance(tokens)
        return out

    def _reorder(self, index: Tensor) -> None:
        for kept in (self.keys, self.values):
            kept[:, : self.longest] = kept[index, : self.longest]


class DynamicCache(StaticCache):
    """Keys and values that grow by a half whenever they are full; shapes, dtype and device are the first tokens'."""

    def __init__(self):
        self.capacity = self.leader = self.lengths = self.keys = self.values = None
        self.longest = 0

    def _admit(self, q: Tensor, k: Tensor, v: Tensor) -> int:
        tokens = super()._admit(q, k, v)
        self._grow(k, v)
        return tokens

    def _grow(self, k: Tensor, v: Tensor) -> None:
        batch, tokens = k.shape[:2]
        if self.lengths is None:
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=k.device)
            self.keys, self.values = (t.new_empty(batch, 0, *t.shape[2:]) for t in (k, v))
        room = self.keys.shape[1]
        if self.longest + tokens > room:
            room = max(self.longest + tokens, room * 3 // 2)
            self.keys, self.values = (self._enlarged(t, room) for t in (self.keys, self.values))

    def _enlarged(self, kept: Tensor, room: int) -> Tensor:
        larger = kept.new_zeros(kept.shape[0], room, *kept.shape[2:])
        larger[:, : self.longest] = kept[:, : self.longest]
        return larger

    def sync(self) -> None:
        if self.lengths is not None:
            super().sync()

    def truncate(self, lengths: Tensor | int) -> None:
        if self.lengths is not None:
            super().truncate(lengths)

    def reorder(self, index: Tensor) -> None:
        if self.lengths is not None:
            super().reorder(index)

    def reset(self) -> None:
        self.__init__()


class PagedCache(_Cache):
    """Keys ``[pages, page_size, Hk, D]`` and values of a pool; ``page_table``, int32 ``[B, max_pages]``, says whose they are.

    Every sequence takes a page when its last one is full, and ``truncate`` gives pages back. Before a CUDA graph is captured,
    ``reserve`` the pages that its replays will fill.

    Args:
        batch, pages, page_size: B, and the pool.
        kv_heads, head_dim, v_head_dim: as in ``StaticCache``.
        capacity: tokens that a sequence may reach; all pages if None.
    """

    def __init__(
        self,
        batch: int,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        wide = head_dim if v_head_dim is None else v_head_dim
        check_sizes(type(self).__name__, 0, pages=pages)
        sizes = {"page_size": page_size, "kv_heads": kv_heads, "head_dim": head_dim, "v_head_dim": wide}
        check_sizes(type(self).__name__, **sizes)
        super().__init__(batch, pages * page_size if capacity is None else capacity, device)
        self.page_size = page_size
        shape = pages, page_size, kv_heads
        self.keys = torch.zeros(*shape, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros(*shape, wide, device=device, dtype=dtype)
        self.page_table = torch.zeros(batch, -(-self.capacity // page_size), dtype=torch.int32, device=device)
        self._free = list(range(pages - 1, -1, -1))
        self._owned: list[list[int]] = [[] for _ in range(batch)]
        self._counts = [0] * batch  # the host's own copy of lengths

    def reserve(self, tokens: int) -> None:
        """Take the pages that ``tokens`` more of every sequence will need.

        Raises:
            ValueError: the pool has too few, or a sequence would pass the capacity.
        """
        most = max([0, *self._counts])  # torch.compile knows no default=
        whole = isinstance(tokens, (int, torch.SymInt)) and tokens is not True
        if not whole or tokens < 0 or most + tokens > self.capacity:
            raise ValueError(
                f"PagedCache: reserve wants from 0 to {self.capacity - most} tokens, got {tokens!r}; make a cache of a larger "
                "capacity, or reset() it"
            )
        missing = [
            max(0, -(-(count + tokens) // self.page_size) - len(owned))
            for count, owned in zip(self._counts, self._owned, strict=True)
        ]
        if sum(missing) > len(self._free):
            raise ValueError(
                f"PagedCache: {tokens} more tokens need {sum(missing)} pages, {len(self._free)} are free; make a larger "
                "pool, or truncate() it"
            )
        if any(missing):
            for owned, pages in zip(self._owned, missing, strict=True):
                owned.extend(self._free.pop() for _ in range(pages))
            self._write_table()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        """As ``StaticCache.attend``."""
        tokens = self._admit(q, k, v)
        self.reserve(tokens)
        if self.longest:
            out = ops.attention_decode(
                q, self.keys, self.values, self.lengths, k_new=k, v_new=v, page_table=self.page_table, **options
            )
        else:
            self._check_kind((self.keys, k), (self.values, v))
            page, row = self._places(torch.arange(tokens, device=k.device))
            self.keys[page, row], self.values[page, row] = k, v
            out = ops.attention(q, k, v, causal=True, **options)
        self._advance(tokens)
        return out

    def count(self, tokens: int) -> None:
        super().count(tokens)
        self._counts = [count + tokens for count in self._counts]

    def _shortest(self) -> int:
        return min(self._counts, default=self.longest)

    def sync(self) -> None:
        self._counts = self.lengths.tolist()
        self.longest = max(self._counts, default=0)

    def truncate(self, lengths: Tensor | int) -> None:
        super().truncate(lengths)
        self._release()

    def _shorten(self, lengths: Tensor) -> None:
        self._counts = list(map(min, self._counts, lengths.expand_as(self.lengths).tolist()))
        self.longest = max(self._counts, default=0)

    def reset(self) -> None:
        self.truncate(0)

    def _release(self) -> None:
        """Give back the pages behind every sequence's last one."""
        for owned, count in zip(self._owned, self._counts, strict=True):
            kept = -(-count // self.page_size)
            self._free += owned[kept:]
            del owned[kept:]

    def _write_table(self) -> None:
        width = self.page_table.shape[1]
        rows = [owned + [0] * (width - len(owned)) for owned in self._owned]
        self.page_table.copy_(torch.tensor(rows, dtype=torch.int32, device="cpu"))

    def _places(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """(page [B, tokens], row in it) of the tokens at ``at``."""
        return self.page_table[:, at // self.page_size].long(), at % self.page_size

    def _reorder(self, index: Tensor) -> None:
        rows = index.tolist()
        self._check_rows(rows)
        counts = [self._counts[i] for i in rows]
        needed, pages = sum(-(-count // self.page_size) for count in counts), len(self.keys)
        if needed > pages:
            raise ValueError(
                f"PagedCache: reorder makes sequences that need {needed} pages, the pool has {pages}; make a larger pool"
            )
        page, row = self._places(torch.arange(self.longest, device=index.device))
        kept = [pool[page[index], row] for pool in (self.keys, self.values)]  # gathered before any page changes hands
        self._counts = counts
        self._release()
        self.reserve(0)
        page, row = self._places(torch.arange(self.longest, device=index.device))
        mine = torch.arange(self.longest, device=index.device) < torch.tensor(counts, device=index.device)[:, None]
        for pool, rows in zip((self.keys, self.values), kept, strict=True):
            pool[page[mine], row.expand_as(page)[mine]] = rows[mine]
        self.longest = max(counts, default=0)


class LatentCache(_Cache):
    """Rows ``[B, capacity, 1, L + R]``: a token's latent, which is key and value of every head, and its rotated key channels.

    Args:
        batch, capacity: as in ``StaticCache``.
        latent_dim, rope_head_dim: L and R of the layer, R being 0 without RoPE.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        latent_dim: int,
        rope_head_dim: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(batch, capacity, device)
        check_sizes(type(self).__name__, latent_dim=latent_dim)
        check_sizes(type(self).__name__, 0, rope_head_dim=rope_head_dim)
        self.latent_dim = latent_dim
        self.rows = torch.zeros(batch, capacity, 1, latent_dim + rope_head_dim, device=device, dtype=dtype)

    def append(self, rows: Tensor) -> None:
        """Keep the rows ``[B, S, 1, L + R]`` of a prompt; the cache is empty."""
        if self.longest:
            raise ValueError(
                f"LatentCache: append wants an empty cache, this one holds {self.longest} tokens; attend adds to it, or reset() it"
            )
        if not isinstance(rows, Tensor) or rows.dim() != 4:
            got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(
                f"LatentCache: append wants rows [B, S, 1, {self.rows.shape[-1]}], got {got}; attention makes them"
            )
        tokens = self._admit(rows)
        self._check_kind((self.rows, rows))
        self.rows[:, :tokens] = rows
        self._advance(tokens)

    def attend(self, q: Tensor, rows: Tensor, **options) -> Tensor:
        """Append rows ``[B, S, 1, L + R]``; causal attention of q ``[B, S, H, L + R]`` over all rows: ``[B, S, H, L]``."""
        tokens = self._admit(q, rows)
        width = self.latent_dim
        out = ops.attention_decode(
            q, self.rows, self.rows[..., :width], self.lengths, k_new=rows, v_new=rows[..., :width], **options
        )
        self._advance(tokens)
        return out

    def _reorder(self, index: Tensor) -> None:
        self.rows[:, : self.longest] = self.rows[index, : self.longest]
