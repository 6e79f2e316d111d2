"""A small decoder: what its layers are, what it learns in a few steps, and what a cache saves when it generates.

``trinix.models.Decoder`` is one readable file on trinix's layers. This tutorial asks three questions of it:

1. Are its logits those of plain PyTorch? ``plain`` below is a LLaMA-like block by hand, in twenty lines, on the same weights.
2. Does it learn? A few steps on a text of a few kilobytes; the loss falls.
3. What does generation with a cache compute? Without one, step t computes all t tokens again: T steps are T^2 / 2 tokens. With one, a
   step computes one token and reads the keys and values of the others. How many bytes those are is the cache's shape; of
   DeepSeek's latent attention it is a latent and a rotated part for all heads together.
"""

import math
import time

import torch
import torch.nn.functional as F

from trinix import models

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, GENERATED = 30, 32


def turned(x: torch.Tensor, base: float = 10000.0) -> torch.Tensor:
    """RoPE of ``[B, S, H, D]``: channels i and i + D / 2 are a point in the plane, turned by an angle that grows with the place."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1], device=x.device)[:, None] * base ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def plain(model: models.Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of a LLaMA-like model by PyTorch's own operations, on its weights."""
    h = model.embedding(tokens)
    for block in model.blocks:
        attention, mlp = block.attention, block.feed_forward
        x = F.rms_norm(h, h.shape[-1:], block.attention_norm.weight, 1e-5)
        heads, kv_heads, d = attention.num_heads, attention.num_kv_heads, attention.head_dim
        q, k, v = F.linear(x, attention.qkv_proj.weight).split((heads * d, kv_heads * d, kv_heads * d), -1)
        q, k, v = (t.unflatten(-1, (-1, d)) for t in (q, k, v))
        q, k, v = (t.transpose(1, 2) for t in (turned(q), turned(k), v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        h = h + F.linear(x.transpose(1, 2).flatten(2), attention.o_proj.weight)
        x = F.rms_norm(h, h.shape[-1:], block.feed_forward_norm.weight, 1e-5)
        gate, up = F.linear(x, mlp.gate_up_proj.weight).chunk(2, -1)
        h = h + F.linear(F.silu(gate) * up, mlp.down_proj.weight)
    return F.linear(F.rms_norm(h, h.shape[-1:], model.norm.weight, 1e-5), model.output.weight)


def check() -> None:
    torch.manual_seed(0)
    shapes = ({}, {"heads": 6, "kv_heads": 3, "dim": 48}, {"heads": 2, "kv_heads": 1, "layers": 3, "head_dim": 32})
    for sizes in shapes:
        model = models.Decoder(models.llama(**sizes), device=DEVICE, dtype=torch.float64)
        tokens = torch.randint(256, (2, 21), device=DEVICE)
        torch.testing.assert_close(
            model(tokens), plain(model, tokens), rtol=1e-6, atol=1e-6
        )  # tables of angles are float32
    print(f"logits beside plain PyTorch's: right, {len(shapes)} shapes")


def learn() -> models.Decoder:
    torch.manual_seed(0)
    model = models.Decoder(models.llama(), device=DEVICE)
    losses = models.train(model, models.tiny_text(), STEPS)
    print(f"{STEPS} steps: loss {losses[0]:.2f} -> {losses[-1]:.2f} (a guess among 256 bytes: {math.log(256):.2f})")
    return model


def generate(model: models.Decoder) -> dict[str, float]:
    """Tokens with and without a cache, and the bytes that a token leaves in one."""
    prompt = torch.tensor([list(b"The ")], device=DEVICE)
    seconds, texts = {}, {}
    for kind in (None, "static", "dynamic", "paged"):
        begin = time.perf_counter()
        texts[kind] = model.generate(prompt, GENERATED, kind=kind)
        seconds[str(kind)] = time.perf_counter() - begin
    assert all(torch.equal(text, texts[None]) for text in texts.values())
    computed = sum(range(prompt.shape[1], prompt.shape[1] + GENERATED)), prompt.shape[1] + GENERATED - 1
    print(f"the same {GENERATED} bytes by every cache; {computed[0]} tokens computed without one, {computed[1]} with")
    for name, config in (("llama", models.llama()), ("deepseek", models.deepseek())):
        width = config.dim // config.heads
        kept = 2 * config.kv_heads * width if config.latent_dim is None else config.latent_dim + config.rope_head_dim
        print(f"  {name}: a token leaves {kept * config.layers} numbers in {config.layers} layers")
    return seconds


if __name__ == "__main__":
    check()
    seconds = generate(learn())
    if DEVICE == "cuda":
        print(", ".join(f"{kind}: {1e3 * s:.1f} ms" for kind, s in seconds.items()))
    else:
        print("no GPU: not timed")
