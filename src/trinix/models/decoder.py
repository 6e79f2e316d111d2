"""A decoder-only Transformer: GPT, LLaMA or DeepSeek in shape, by its configuration. Small enough to read at one sitting.

Every block adds to the residual stream h what attention and the feed-forward block make of its norm::

    h = h + attention(norm(h))        h = h + feed_forward(norm(h))

The sum and the norm behind it are one kernel, so blocks hand on two tensors: what is still to be added, and h without it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinix import dispatch
from trinix.layers.activation import FastGELU
from trinix.layers.arguments import check_sizes
from trinix.layers.attention import FastGroupedQueryAttention
from trinix.layers.cache import DynamicCache, LatentCache, PagedCache, StaticCache
from trinix.layers.embedding import FastRoPEPositionEmbedding
from trinix.layers.glu import FastSwiGLU
from trinix.layers.latent_attention import FastMultiHeadLatentAttention
from trinix.layers.linear import FastLinear
from trinix.layers.norm import FastFusedResidualLayerNorm, FastFusedResidualRMSNorm


@dataclass(frozen=True)
class Config:
    """What a decoder is made of; ``gpt``, ``llama`` and ``deepseek`` fill it in."""

    vocabulary: int = 256  # bytes
    dim: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    hidden: int = 256  # width of the feed-forward block
    length: int = 128  # the positions of a learned table, and RoPE's first length
    head_dim: int | None = None  # dim / heads
    latent_dim: int | None = None  # latent attention, with this latent
    q_latent_dim: int | None = None
    rope_head_dim: int = 64  # of latent attention
    gated: bool = True  # SwiGLU and RMSNorm; otherwise GELU and LayerNorm, with biases
    learned_positions: bool = False  # a table added to the embeddings; otherwise RoPE
    tied: bool = False  # the output projection is the embedding
    rope_base: float = 10000.0
    sliding_window_size: int | None = None
    dropout: float = 0.0

    def __post_init__(self):
        names = ("vocabulary", "dim", "layers", "heads", "kv_heads", "hidden", "length")
        check_sizes("Config", **{name: getattr(self, name) for name in names})
        dispatch.flags("Config", gated=self.gated, learned_positions=self.learned_positions, tied=self.tied)


def gpt(**sizes) -> Config:
    """LayerNorm, learned positions, GELU, biases, tied embeddings."""
    return Config(**{"gated": False, "learned_positions": True, "tied": True} | sizes)


def llama(**sizes) -> Config:
    """RMSNorm, RoPE, grouped heads, SwiGLU."""
    return Config(**{"kv_heads": 2, "hidden": 176} | sizes)


def deepseek(**sizes) -> Config:
    """RMSNorm, latent attention with a rotated part of its own, SwiGLU; without experts."""
    return Config(**{"latent_dim": 32, "rope_head_dim": 16, "hidden": 176} | sizes)


class Block(nn.Module):
    def __init__(self, config: Config, **place):
        super().__init__()
        norm = FastFusedResidualRMSNorm if config.gated else FastFusedResidualLayerNorm
        self.attention_norm = norm(config.dim, 1e-5, dropout=config.dropout, **place)
        self.attention = _attention(config, **place)
        self.feed_forward_norm = norm(config.dim, 1e-5, dropout=config.dropout, **place)
        self.feed_forward = _feed_forward(config, **place)

    def forward(self, x: Tensor, h: Tensor, cache=None) -> tuple[Tensor, Tensor]:
        """(what is to be added to the stream, the stream without it)."""
        y, h = self.attention_norm(x, h)
        y, h = self.feed_forward_norm(self.attention(y, cache=cache), h)
        return self.feed_forward(y), h


def _attention(config: Config, **place) -> nn.Module:
    options = {
        "causal": True, "bias": not config.gated, "dropout": config.dropout, "head_dim": config.head_dim,
        "position_method": "none" if config.learned_positions else "rope", "rope_base": config.rope_base,
        "max_seq_len": config.length, "sliding_window_size": config.sliding_window_size, **place,
    }  # fmt: skip
    if config.latent_dim is None:
        return FastGroupedQueryAttention(config.dim, config.heads, config.kv_heads, **options)
    return FastMultiHeadLatentAttention(
        config.dim, config.heads, config.latent_dim, q_latent_dim=config.q_latent_dim,
        rope_head_dim=config.rope_head_dim, **options,
    )  # fmt: skip


def _feed_forward(config: Config, **place) -> nn.Module:
    if config.gated:
        return FastSwiGLU(config.dim, config.hidden, config.dim, bias=False, **place)
    up, down = FastLinear(config.dim, config.hidden, **place), FastLinear(config.hidden, config.dim, **place)
    return nn.Sequential(up, FastGELU(approximate="tanh"), down)


class Decoder(nn.Module):
    """Tokens ``[B, S]`` to logits ``[B, S, vocabulary]``.

    >>> model = trinix.models.Decoder(trinix.models.llama())
    >>> model(torch.zeros(1, 5, dtype=torch.int64)).shape
    torch.Size([1, 5, 256])
    """

    def __init__(self, config: Config, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        if not isinstance(config, Config):
            raise TypeError(
                f"Decoder: config must be a Config, got {type(config).__name__}; gpt(), llama() and deepseek() make one"
            )
        place = {"device": device, "dtype": dtype}
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim, **place)
        self.positions = nn.Embedding(config.length, config.dim, **place) if config.learned_positions else None
        self.blocks = nn.ModuleList(Block(config, **place) for _ in range(config.layers))
        norm = FastFusedResidualRMSNorm if config.gated else FastFusedResidualLayerNorm
        self.norm = norm(config.dim, 1e-5, dropout=config.dropout, **place)  # of what the last block adds
        self.output = FastLinear(config.dim, config.vocabulary, False, **place)
        self._draw_tables()
        if config.tied:
            self.output.weight = self.embedding.weight
        self.register_load_state_dict_pre_hook(_note_tied)
        self.register_load_state_dict_post_hook(_tie_again)

    def reset_parameters(self) -> None:
        """New weights for the whole model: after ``to_empty()`` of one that was made on the meta device."""
        for module in reversed([*self.modules()][1:]):  # a layer draws for its projections, after they have
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self._draw_tables()

    def _draw_tables(self) -> None:
        for table in (self.embedding, self.positions):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def _apply(self, fn, recurse=True):
        """to_empty() makes a new parameter for every place."""
        _note_tied(self)
        super()._apply(fn, recurse)
        _tie_again(self)
        return self

    def forward(self, tokens: Tensor, caches: Sequence | None = None, *, last: bool = False) -> Tensor:
        """Logits of every token, or with ``last`` of the last one ``[B, 1, vocabulary]``.

        Args:
            tokens: int64 or int32, from 0 to vocabulary - 1: on a CPU that is checked, on a GPU PyTorch ends the process.
            caches: one a block, from ``self.caches``; the tokens follow what they hold.
        """
        _check_tokens(tokens, self.config.vocabulary)
        dispatch.flags("Decoder", last=last)
        if caches is not None:
            self._check_caches(caches, tokens)
        x = self.embedding(tokens)
        h = torch.zeros_like(x)
        if self.positions is not None:
            self._check_positions(tokens.shape[1] + (0 if caches is None else caches[0].longest))
            at = torch.arange(tokens.shape[1], device=tokens.device)
            if caches is not None and caches[0].lengths is not None:
                at = caches[0].lengths[:, None] + at
            h = h + self.positions(at)
        if caches is None:
            for block in self.blocks:
                x, h = block(x, h, None)
        else:
            x, h = self._cached_blocks(x, h, caches)
        y, _ = self.norm(x, h)
        return self.output(y[:, -1:] if last else y)

    def _cached_blocks(self, x, h, caches):
        held = [cache.longest for cache in caches]
        try:
            for block, cache in zip(self.blocks, caches, strict=True):
                x, h = block(x, h, cache)
        except BaseException:
            # out of memory, say, or Ctrl-C: blocks in front have kept these tokens, those behind have not
            for cache, before in zip(caches, held, strict=True):
                cache.rewind(cache.longest - before)
            raise
        return x, h

    def _check_caches(self, caches: Sequence, tokens: Tensor) -> None:
        kinds = StaticCache, PagedCache, LatentCache
        if not isinstance(caches, Sequence) or not all(isinstance(cache, kinds) for cache in caches):
            got = [type(cache).__name__ for cache in caches] if isinstance(caches, Sequence) else type(caches).__name__
            raise TypeError(
                f"Decoder: caches must be a list of caches, got {got}; self.caches(batch, capacity) makes them"
            )
        if len(caches) != len(self.blocks):
            raise ValueError(
                f"Decoder: caches must be one a block, {len(self.blocks)}, got {len(caches)}; self.caches makes them"
            )
        last = caches[-1]
        if len({*map(id, caches)}) != len(caches) or not all(c.leader is None or c.leader is last for c in caches):
            raise ValueError(
                "Decoder: caches must be one for every block, which count for themselves or follow the last one, got a cache "
                "twice, or one that follows another; give all that one call of self.caches made, in its order"
            )
        caches[0].check(*tokens.shape)  # before its lengths choose positions; the others' blocks ask them

    def _check_positions(self, end: int) -> None:
        if self.positions is not None and end > self.config.length:
            raise ValueError(
                f"Decoder: {end} tokens exceed the table of {self.config.length} learned positions; make a Config with a "
                "larger length"
            )

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of every token given those before it, in float32; tokens are ``[B, S]`` with S from 2 on."""
        _check_tokens(tokens, self.config.vocabulary)
        if tokens.shape[1] < 2:
            raise ValueError(
                f"Decoder: tokens of a loss must be [B, S] with S from 2 on, got {list(tokens.shape)}; the last is what is guessed"
            )
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten().long())

    def caches(self, batch: int, capacity: int, kind: str = "static", page_size: int = 16) -> list:
        """An empty cache for every block: "static", "dynamic" or "paged"; latent attention has its own, which is static."""
        check_sizes("Decoder", page_size=page_size)
        if kind not in ("static", "dynamic", "paged"):
            raise ValueError(f"Decoder: kind must be 'static', 'dynamic' or 'paged', got {kind!r}")
        caches = [self._cache(block.attention, batch, capacity, kind, page_size) for block in self.blocks]
        if kind != "dynamic":
            for cache in caches[:-1]:
                cache.follow(caches[-1])
        return caches

    def _cache(self, layer, batch, capacity, kind, page_size):
        device, dtype = self.embedding.weight.device, self.embedding.weight.dtype
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        place = {"device": device, "dtype": dtype}
        if self.config.latent_dim is not None:
            return LatentCache(batch, capacity, layer.latent_dim, layer.rope_head_dim, **place)
        heads = layer.num_kv_heads, layer.head_dim
        if kind == "static":
            return StaticCache(batch, capacity, *heads, **place)
        if kind == "dynamic":
            return DynamicCache()
        pages = batch * -(-capacity // page_size)
        return PagedCache(batch, pages, page_size, *heads, capacity=capacity, **place)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        steps: int,
        *,
        kind: str | None = "static",
        graph: bool = False,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
    ) -> Tensor:
        """``tokens`` ``[B, S]`` and the ``steps`` likeliest after them, one by one: ``[B, S + steps]``, shorter where all sequences
        end before.

        Args:
            kind: of the caches; None computes the whole sequence again for every token.
            graph: steps are replays of a CUDA graph; not for dynamic caches.
            eos_token_id: the token, or any of the tokens, that ends a sequence and is its last; in ``tokens`` it ends nothing. The
                host waits for every step, to know whether one is left to make. None: every sequence has all ``steps``.
            pad_token_id: what follows an ended sequence while others go on; None is (the first) ``eos_token_id``.
        """
        _check_tokens(tokens, self.config.vocabulary)
        if not tokens.shape[1]:
            raise ValueError(
                f"Decoder: tokens must be [B, S] with a token at least, got {list(tokens.shape)}; begin with one"
            )
        check_sizes("Decoder", 0, steps=steps)
        dispatch.flags("Decoder", graph=graph)
        ends = _ids_of_the_end(eos_token_id, pad_token_id, self.config.vocabulary)
        if self.training and self.config.dropout:
            raise ValueError("Decoder: generate knows no dropout; call eval() first")
        if graph and kind in (None, "dynamic"):
            raise ValueError(
                f"Decoder: graph=True needs kind 'static' or 'paged', whose memory stays in place, got {kind!r}"
            )
        if graph and not tokens.is_cuda:
            raise ValueError(
                f"Decoder: graph=True needs a model and tokens on a CUDA GPU, got {tokens.device}; leave it out"
            )
        caches = None if kind is None else self.caches(tokens.shape[0], tokens.shape[1] + steps, kind)
        step, new = None, tokens
        if ends is not None:
            pad = ends[0] if pad_token_id is None else pad_token_id
            ends = torch.tensor(ends, device=tokens.device)
            ended = torch.zeros(tokens.shape[0], 1, dtype=torch.bool, device=tokens.device)
        for _ in range(steps):
            if step is not None:
                logits = step(new)
            else:
                logits = self(tokens if caches is None else new, caches, last=True)
                step = self.captured(caches) if graph else None
            new = logits.argmax(-1)
            if ends is not None:
                new = new.masked_fill(ended, pad)
                ended |= torch.isin(new, ends)
            tokens = torch.cat((tokens, new), 1)
            if ends is not None and ended.all():
                break
        return tokens

    @torch.no_grad()
    def captured(self, caches: Sequence) -> Callable[[Tensor], Tensor]:
        """A decoding step, tokens ``[B, 1]`` to logits ``[B, 1, vocabulary]``, as a CUDA graph over these caches.

        The caches hold their prompts already, and have room for a token. The logits are overwritten by the next step.
        """
        if not all(cache.longest for cache in caches):
            raise ValueError(
                "Decoder: captured wants caches with their prompts, got an empty one; call the model first"
            )
        device = self.embedding.weight.device
        tokens = torch.zeros(caches[0].lengths.shape[0], 1, dtype=torch.int64, device=device)
        with torch.cuda.device(tokens.get_device()):  # streams are the current card's
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles and chooses what a capture must not
                for _ in range(2):
                    self(tokens, caches, last=True)
                    for cache in caches:
                        cache.rewind(1)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):  # its own default is of the card that first captured
                logits = self(tokens, caches, last=True)
        for cache in caches:
            cache.count(-1)  # capturing ran nothing
            if isinstance(cache, PagedCache):
                cache.reserve(cache.capacity - cache.longest)

        def step(new: Tensor) -> Tensor:
            self._check_positions(caches[0].longest + 1)
            for cache in caches:
                cache.check(len(new), 1)
                if isinstance(cache, PagedCache):
                    cache.reserve(1)  # truncate() gives pages back
                cache.count(1)
            tokens.copy_(new)
            graph.replay()
            return logits

        # the graph reads these, also when a longer prompt has put others in their place
        step.tables = [(m.cos, m.sin) for m in self.modules() if isinstance(m, FastRoPEPositionEmbedding)]
        return step


def _check_tokens(tokens: Tensor, vocabulary: int) -> None:
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        got = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(
            f"Decoder: tokens must be a tensor [B, S], got {got}; one sequence is a batch of 1, tokens[None]"
        )
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"Decoder: tokens must be int64 or int32, got {tokens.dtype}; convert them with .long()")
    if dispatch.readable(tokens) and tokens.numel():
        least, most = map(int, tokens.aminmax())
        if least < 0 or most >= vocabulary:
            raise ValueError(
                f"Decoder: tokens must be from 0 to {vocabulary - 1}, the vocabulary, got some from {least} to {most}; make a "
                "Config with the tokenizer's vocabulary"
            )


def _ids_of_the_end(end, pad, vocabulary: int) -> list[int] | None:
    """The tokens that end a sequence, None where none does."""
    if end is None and pad is not None:
        raise ValueError(
            f"Decoder: pad_token_id follows the end of a sequence, got {pad!r} and no end; give an eos_token_id too"
        )
    if end is None:
        return None
    ends = [*end] if isinstance(end, list | tuple) else [end]
    if not ends:
        raise ValueError(
            "Decoder: eos_token_id must be a token or some, got none; None is for sequences without an end"
        )
    for name, ids in (("eos_token_id", ends), ("pad_token_id", [] if pad is None else [pad])):
        for one in ids:
            if type(one) is not int or not 0 <= one < vocabulary:
                raise ValueError(
                    f"Decoder: {name} must be an int from 0 to {vocabulary - 1}, the vocabulary, got {one!r}; take the tokenizer's"
                )
    return ends


def _note_tied(model: Decoder, *_) -> None:
    """Before every parameter may become another: which modules of the output have the embedding's, if still one has."""
    weight = model.embedding._parameters.get("weight")
    output = model.output.modules()
    model._tied = [m for m in output if weight is not None and m._parameters.get("weight") is weight]


def _tie_again(model: Decoder, *_) -> None:
    for module in model.__dict__.pop("_tied"):
        module.weight = model.embedding.weight


def tiny_text() -> str:
    """Three sonnets of Shakespeare."""
    return (Path(__file__).parent / "tiny.txt").read_text(encoding="utf-8")


def train(
    model: Decoder, text: str, steps: int, *, length: int = 64, batch: int = 16, rate: float = 3e-3, seed: int = 0
) -> list[float]:
    """AdamW on random pieces of ``text``, a token a byte; the loss of every step."""
    if not isinstance(text, str):
        raise TypeError(f"train: text must be a str, got {type(text).__name__}; tiny_text() is one")
    check_sizes("train", 0, steps=steps)
    check_sizes("train", length=length, batch=batch)
    data = torch.tensor(list(text.encode()), dtype=torch.int64, device="cpu")
    if len(data) <= length:
        raise ValueError(f"train: text must have more than length = {length} bytes, got {len(data)}; give a longer one")
    device = model.embedding.weight.device
    generator = torch.Generator("cpu").manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(data) - length, (batch, 1), generator=generator, device="cpu")
        loss = model.loss(data[starts + torch.arange(length + 1, device="cpu")].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
