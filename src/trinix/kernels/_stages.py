"""Backward of per-head MLPs by stages: a kernel writes H = act(X W1) and dZ = act'(X W1) dY W2' of some rows of some heads, and
three batched products of PyTorch's make what those add to the gradients, dW1's and dW2's sums in float32. For widths whose sums
over a walk find no place in registers. H and dZ together take ``MOST_BYTES`` at a time, however many rows there are."""

import functools
from collections.abc import Callable

import torch

# M-7's backward, us: all rows at once (512 MiB) 652, 256 MiB 701, 128 MiB 769, 64 MiB 878; PyTorch's 770
MOST_BYTES = 1 << 28


@functools.lru_cache(maxsize=1024)
def choose(rows: int, heads: int, d: int, e: int, processors: int, tile: tuple[int, int]) -> tuple[int, int, int]:
    """(heads at a time, rows of each, programs that share E), where a program owns ``tile[0]`` rows and walks over E in steps of
    ``tile[1]``.

    As few heads as let the products of dW1 and dW2 fill the card, in tiles of 128 x 128, and need hardly more rounds of programs
    than all at once, and no more than have their first tiles of H and dZ within ``MOST_BYTES``, or all of their rows' if the products
    still fill half of the card (M-7: 675 us for 685 by half of the rows; a quarter of the card: 750 for 690); programs for few
    rounds, where one's start takes as long as one and a half of its steps.
    """
    least = max(1, processors // (-(-d // 128) * -(-e // 128)))
    of_head, steps = -(-rows // tile[0]), -(-e // tile[1])

    def rounds(times):
        chunk = -(-heads // times)
        return times * -(-chunk * of_head // processors)

    ways = range(max(1, heads // least), 0, -1)
    enough = 1.05 * min(map(rounds, ways))
    times = next(n for n in ways if rounds(n) <= enough)
    tiles = max(1, MOST_BYTES // (4 * min(rows, tile[0]) * e))  # at a time, of all heads together
    chunk = -(-heads // max(times, -(-heads // tiles)))
    in_turn = -(-heads // max(1, tiles // of_head))  # times, where all rows of some heads are taken
    some = -(-heads // in_turn)
    if 2 * some >= least and rounds(in_turn) <= enough:
        chunk = min(chunk, some)
    portions = -(-of_head // (tiles // chunk))
    portion = -(-of_head // portions)

    def time(splits):
        return -(-chunk * portion * splits // processors) * (-(-steps // splits) + 1.5)

    return chunk, min(rows, portion * tile[0]), min(range(1, steps + 1), key=time)


@torch.no_grad()
def backward(x, w1, w2, dy, wanted: tuple, chunk: int, portion: int, hidden: Callable) -> list:
    """(dx, dw1, dw2), None where ``wanted`` says so; ``hidden(x, w1, w2, dy, h, dz)`` writes H and dZ of some rows of some heads."""
    dx = torch.empty_like(x) if wanted[0] else None
    dw1, dw2 = (w.new_empty(w.shape) if want else None for w, want in zip((w1, w2), wanted[1:], strict=True))
    whole = x, w1, w2, dy, dx, dw1, dw2
    heads = x.shape[0]
    for first in range(0, heads, chunk):
        # views cost the host a microsecond and more each
        some = whole if chunk >= heads else [t if t is None else t[first : first + chunk] for t in whole]
        _of_some(*some, portion, hidden)
    return [dx, dw1, dw2]


def _of_some(x, w1, w2, dy, dx, dw1, dw2, portion, hidden):
    rows = x.shape[1]
    if portion >= rows:
        _of_rows(x, w1, w2, dy, dx, dw1, dw2, torch.bmm, hidden)
        return
    sums = [w if w is None else w.new_empty(w.shape, dtype=torch.float32) for w in (dw1, dw2)]
    for first in range(0, rows, portion):
        xs, dys, dxs = (t if t is None else t[:, first : first + portion] for t in (x, dy, dx))
        _of_rows(xs, w1, w2, dys, dxs, *sums, _add_product if first else _first_product, hidden)
    for dw, total in zip((dw1, dw2), sums, strict=True):
        if dw is not None:
            dw.copy_(total)


def _of_rows(x, w1, w2, dy, dx, dw1, dw2, product, hidden):
    """What it makes is gone before the next rows' is made."""
    h, dz = x.new_empty(2, *x.shape[:2], w1.shape[2]).unbind()
    hidden(x, w1, w2, dy, h, dz)
    if dw2 is not None:
        product(h.mT, dy, out=dw2)
    if dx is not None:
        torch.bmm(dz, w1.mT, out=dx)
    if dw1 is not None:
        product(x.mT, dz, out=dw1)


def _add_product(a, b, out, beta=1):
    """beta out + a b in float32 to out; beta is 0 or 1."""
    if a.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        # the user asks for sums in float16, and PyTorch refuses to give them in float32
        ab = torch.bmm(a, b)
        out.add_(ab) if beta else out.copy_(ab)
    elif a.is_cuda and torch.version.hip is None:
        torch.baddbmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:  # PyTorch has this product for NVIDIA's cards only
        out.baddbmm_(a.float(), b.float(), beta=beta)


_first_product = functools.partial(_add_product, beta=0)
