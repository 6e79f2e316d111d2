"""Backward of per-head MLPs by stages: a kernel writes H = act(X W1) and dZ = act'(X W1) dY W2' of some heads, and three batched
products of PyTorch's make the gradients of those. For widths whose sums over a walk find no place in registers."""

import functools
from collections.abc import Callable

import torch


@functools.lru_cache(maxsize=1024)
def choose(rows: int, heads: int, d: int, e: int, processors: int, tile: tuple[int, int]) -> tuple[int, int]:
    """(heads at a time, programs that share E), where a program owns ``tile[0]`` rows and walks over E in steps of ``tile[1]``.

    As few heads as let the products of dW1 and dW2 fill the card, in tiles of 128 x 128, and need hardly more rounds of programs
    than all at once; programs for few rounds, where one's start takes as long as one and a half of its steps.
    """
    least = max(1, processors // (-(-d // 128) * -(-e // 128)))
    of_head, steps = -(-rows // tile[0]), -(-e // tile[1])

    def rounds(times):
        chunk = -(-heads // times)
        return times * -(-chunk * of_head // processors)

    ways = range(max(1, heads // least), 0, -1)
    enough = 1.05 * min(map(rounds, ways))
    times = next(n for n in ways if rounds(n) <= enough)
    chunk = -(-heads // times)

    def time(splits):
        return -(-chunk * of_head * splits // processors) * (-(-steps // splits) + 1.5)

    return chunk, min(range(1, steps + 1), key=time)


@torch.no_grad()
def backward(x, w1, w2, dy, wanted: tuple, chunk: int, hidden: Callable) -> list:
    """(dx, dw1, dw2), None where ``wanted`` says so; ``hidden(x, w1, w2, dy, h, dz)`` writes H and dZ of some heads."""
    dx = torch.empty_like(x) if wanted[0] else None
    dw1, dw2 = (w.new_empty(w.shape) if want else None for w, want in zip((w1, w2), wanted[1:], strict=True))
    whole = x, w1, w2, dy, dx, dw1, dw2
    heads = x.shape[0]
    for first in range(0, heads, chunk):
        # views cost the host a microsecond and more each
        some = whole if chunk >= heads else [t if t is None else t[first : first + chunk] for t in whole]
        _of_some(*some, hidden)
    return [dx, dw1, dw2]


def _of_some(x, w1, w2, dy, dx, dw1, dw2, hidden):
    """What it makes is gone before the next heads' is made."""
    h, dz = x.new_empty(2, *x.shape[:2], w1.shape[2]).unbind()
    hidden(x, w1, w2, dy, h, dz)
    if dw2 is not None:
        torch.bmm(h.mT, dy, out=dw2)
    if dx is not None:
        torch.bmm(dz, w1.mT, out=dx)
    if dw1 is not None:
        torch.bmm(x.mT, dz, out=dw1)
