"""Attention on Hopper (sm_90): configurations, plans and launches of the kernels beside this file.

A plan holds everything of a call that its tensors' addresses do not decide: binaries, descriptors' shapes, grids, scalars. It
is made at the first call of its kind; a later call looks it up, allocates its outputs and launches.

Floor: forward 4 Sq Sk D operations a head (half under a causal mask), backward 2.5 times that; docs/perf/attention.md.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from trinix.kernels import LEAST_SCALE, _noting
from trinix.kernels._binary import Binary, Box, raw_stream
from trinix.kernels._binary import multiprocessors as _multiprocessors
from trinix.kernels._layout import dense, side_by_side
from trinix.kernels.hopper import attention_backward as backward_kernels
from trinix.kernels.hopper import attention_backward_short as short_backward_kernels
from trinix.kernels.hopper import attention_backward_wide as wide_kernels
from trinix.kernels.hopper import attention_forward as forward_kernels

LOG2E = math.log2(math.e)
_SHARED = 227 << 10  # bytes of shared memory that the programs of a multiprocessor have
_ONE_WIDTH = triton.__version__.startswith("3.8.")  # whose compiler refuses O in the memory of a Q of another width
_ROWS_LIMIT = 2**31 - 2**12  # coordinates of the copy engine are 32 bits wide


# ---- what runs here ----------------------------------------------------------------------------------------------------


def unsupported(q: Tensor, k: Tensor, v: Tensor, options, backward: bool) -> str | None:
    if not q.is_cuda:
        return f"needs a GPU tensor, got {q.device.type}"
    if torch.version.hip is not None or _capability(q.device) != (9, 0):  # AMD's gfx90a calls itself 9.0 too
        return f"needs a card of compute capability 9.0 (H100, H200), got {_capability(q.device)}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {q.dtype}"
    for name in ("bias", "mask"):
        if getattr(options, name) is not None:
            return f"has no {name}"
    if options.dropout_p:
        return "has no dropout"
    if not options.scale >= LEAST_SCALE:
        return f"needs a scale of 2**-126 or above, got {options.scale}"
    d, dv = q.shape[-1], v.shape[-1]
    if padded(d) is None or padded(dv) is None:
        return f"needs head dimensions up to 256, multiples of 8, got {d} and {dv}"
    if _ONE_WIDTH and padded(d) != padded(dv):
        return f"needs another Triton than {triton.__version__} for values of {dv} channels and keys of {d}"
    if backward and options.sink is not None and options.softcap and q.dtype == torch.float16 and max(d, dv) > 128:
        # P goes from one warpgroup to the other in 11 bits there: up to 2.8 times PyTorch's error of 3e-5
        return "has a sink's gradient with softcap beyond 128 channels in bfloat16 only"
    sequences = None if options.cu_seqlens_q is None else options.cu_seqlens_q.numel() - 1
    if not q.numel() or not k.numel() or not v.numel() or sequences == 0:
        return "needs at least one element"
    if not counts_fit(q.shape, k.shape, sequences):
        return "counts rows of all heads in 32 bits"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not copy_engine_reads(t):
            return f"needs {name} at a multiple of 16 bytes, its last dimension dense and its other strides too"
    return None


def counts_fit(q_shape, k_shape, sequences: int | None) -> bool:
    """Whether all rows, those that pad each sequence too, are fewer than 2**31; ``sequences`` with lengths of their own."""
    batch = q_shape[0] if sequences is None else sequences
    rows, keys = (math.prod(shape[:-2]) for shape in (q_shape, k_shape))
    return (rows + 128 * batch) * q_shape[-2] <= _ROWS_LIMIT and keys <= _ROWS_LIMIT


def copy_engine_reads(t: Tensor) -> bool:
    """Whether a descriptor can describe the tensor."""
    return not t.data_ptr() & 15 and t.stride(-1) == 1 and all(
        n == 1 or (s > 0 and s * t.element_size() % 16 == 0) for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True)
    )  # fmt: skip


def readable(t: Tensor) -> Tensor:
    # clone: a dense tensor at an odd address is contiguous
    return t if copy_engine_reads(t) else t.clone(memory_format=torch.contiguous_format)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# ---- configurations ----------------------------------------------------------------------------------------------------


class ForwardConfig(NamedTuple):
    """rows of a warpgroup, keys of a tile, widths of the tiles of Q and V (powers of two), the part of Q's that is used"""

    m: int
    n: int
    d: int
    d_qk: int
    dv: int
    stages: int
    consumers: int
    registers: int
    q_buffers: int
    pingpong: bool
    lazy: bool = False


# Forward's kernel and the first of backward's begin before the kernel in front has ended, as backward's others do: 1 to 2 us of
# every call behind another kernel (A-MHSA-1's forward 95.0 against 96.0 us, A-MHA-1's 102.9 and 104.6), nothing on an idle stream.
EARLY = True

_IN_CACHE = 34 << 20  # bytes of K and V that stay in the L2 cache while they are read


class ShortConfig(NamedTuple):
    """keys of a tile, width of the tiles, slots for them; a program is one warpgroup with 64 rows. ``batch_last``: one sequence
    is done before the next begins"""

    n: int
    d: int
    stages: int
    batch_last: bool = False


class BackwardConfig(NamedTuple):
    m: int
    n: int
    d: int
    stages: int
    dq_way: int
    copy_sums: bool = False  # whether the copy engine adds dQ up
    k_held: int = 0  # columns of K that stay in registers
    v_held: int = 0
    dv: int = 0  # the width of the tiles of V where it is not Q's
    d_qk: int = 0  # the part of Q's tiles that is used where it is not all
    kv_slots: int = 0  # for K and V of programs that draw several key blocks; 0: a program has one


class ShortBackwardConfig(NamedTuple):
    """queries and keys of a tile; a program has one of either"""

    m: int
    n: int
    num_warps: int
    stages: int


def padded(d: int) -> int | None:
    """The width of the tile that holds a head dimension: what lies behind it reads as zeros."""
    return next((width for width in (64, 128, 256) if d <= width), None) if d % 8 == 0 else None


def choose_forward(d: int, dv: int, causal: bool, keys: int) -> ForwardConfig | None:
    width, out = padded(d), padded(dv)
    if width is None or out is None:
        return None
    if width == out == 64:
        if causal and keys < 4096:  # blocks of 128 rows: less of the diagonal is computed for nothing
            return ForwardConfig(64, 128, 64, 64, 64, 4, 2, 240, 2, False, True)
        # turns: without them some multiprocessors' warpgroups fall into step and are late (AC-mha-1 0.0562 against 0.0596 ms). Under
        # a causal mask the three have unlike numbers of tiles
        return ForwardConfig(64, 128, 64, 64, 64, 3, 3, 160, 2, not causal, True)
    if max(width, out) <= 128:
        return ForwardConfig(64, 128, 128, 128, 128, 2, 2, 240, 2, True, True)
    used = 192 if 128 < d <= 192 else width
    if out <= 128:
        return ForwardConfig(64, 64, 256, used, 128, 2, 2, 240, 1, False, True)
    return ForwardConfig(64, 64, 256, max(used, 192), 256, 2, 2, 240, 1, False, True)


def choose_shared(items: int, programs: int, tiles: int) -> int:
    """How many items at the end all programs share, tile by tile; ``tiles``: of an item, which all take the same time.

    A part-filled last round takes as long as a full one: of 30, 32 and 36 heads of (1, 4096, H, 64), 5.00, 5.33 and 6.00 rounds,
    239.5, 280.3 and 283.0 us. Sharing it costs about five tiles' time (a second segment's beginning, the pieces' way through memory,
    waiting for them) and 2% of the call, by what is not known: it gains 6% at 32 heads and 2% at (2, 2048, 32 on 8, 64), nothing at
    (4, 4096, 32, 64), and loses 2% at (2, 2048, 16 on 1, 64) and 1 to 2% at (1, 4096, 32, 128)."""
    shared = items % programs
    if items < programs or tiles < 8 or shared * tiles < 4 * programs or tiles * programs**2 >= 2**31:
        return 0
    saved = tiles - shared * tiles / programs - 5 - 0.02 * tiles * items / programs
    return shared if saved >= 0.015 * tiles * _cdiv(items, programs) else 0


def choose_short(
    d: int, dv: int, causal: bool, keys: int, key_heads: int, batch: int, programs: int, multiprocessors: int
) -> ShortConfig | None:
    """Of the kernel of short calls, where it is the faster one; ``programs``: blocks of 64 rows of all heads, ``key_heads``: of
    one sequence.

    Causal F-1 0.0088 against 0.0118 ms, F-2 0.0124 and 0.0161, F-4 0.0490 and 0.0539, AC-mha-1 0.0397 and 0.0437, AC-gqa-1 0.0850
    and 0.0952, (1, 4096, 32, 64) 0.157 and 0.163. The K and V that it walks through at once must fit the L2 cache: those of all
    sequences (AS-64-1024 0.460 and 0.228), else of one after the other (AS-64-1024 0.210 and 0.227, -2048 0.325 and 0.355, -4096
    0.595 and 0.617). Without a mask (4, 1024, 8, 64) 0.0298 and 0.0350, but AC-mha-1 0.0632 and 0.0595.
    """
    width = max(padded(d), padded(dv))
    if width == 64:
        if programs <= 4 * multiprocessors:
            # without a mask smaller tiles, by more programs at a time: (4, 512, 8) 0.0097 for 0.0106 ms, (4, 1024, 8) 0.0233 for 0.0261
            # (cuDNN 0.0253)
            return ShortConfig(128 if causal else 64, 64, 2)
        of_one = key_heads * keys * (d + dv) * 2
        if causal and keys <= 4096 and of_one <= _IN_CACHE:
            together = batch * of_one <= _IN_CACHE and programs <= 16 * multiprocessors
            return ShortConfig(128, 64, 2, batch_last=not together)
    elif width == 128 and causal and programs <= 2 * multiprocessors:
        # (4, 512, 8, 128) 0.0172 and 0.0188, level without a mask; with twice the rows 0.0325 and 0.0296
        return ShortConfig(64, 128, 2)
    return None


def choose_falling(c: ShortConfig, heads: int, row_blocks: int, multiprocessors: int) -> int:
    """How many blocks of rows start from the longest down. Where all programs run at once, each on a multiprocessor of its own
    as long as there are any, those that come to a second one's side start from the shortest up (F-2: 0.0125 against 0.0127 ms)."""
    shared = 2 * c.d * (64 + 2 * c.stages * c.n) + 2048
    if multiprocessors < heads * row_blocks <= multiprocessors * (_SHARED // shared):
        return max(1, round(multiprocessors / heads))
    return row_blocks


def choose_backward(d: int, dv: int, plain: bool) -> BackwardConfig | None:
    """``plain``: neither softcap nor ALiBi, which take registers, nor ``deterministic``."""
    width, out = padded(d), padded(dv)
    if width is None or out is None:
        return None
    if max(width, out) > 128:
        used = 192 if d <= 192 else 256
        return BackwardConfig(64, 64, 256, 2, backward_kernels.WIDE.value, dv=max(out, 128), d_qk=used)
    if width == out == 64:
        return BackwardConfig(64, 128, 64, 4, backward_kernels.TURNS.value, k_held=64, v_held=64, kv_slots=2)
    return BackwardConfig(64, 128, 128, 2, backward_kernels.COLUMNS.value, copy_sums=True, v_held=64 if plain else 0)


def choose_short_backward(
    d: int, dv: int, causal: bool, seq_q: int, seq_k: int, planes: int, multiprocessors: int
) -> ShortBackwardConfig | None:
    """Where one kernel that computes more is faster than three, ``planes``: heads of all sequences. In a CUDA graph, short and long:
    (1, 128, 8, 64) 5.1 and 10.5 us, (4, 256, 8) 11.1 and 16.1, causal 11.7 and 16.5, (8, 256, 12) 23.9 and 25.2, causal 21.8 and 26.0,
    (4, 512, 8) causal 21.9 and 23.1, but (8, 512, 12) causal 53.6 and 49.9. Without a mask (1, 512, 8) 11.5 and 17.0, (1, 512, 12) 15.5
    and 17.5, (2, 512, 8) 15.6 and 18.1, (4, 300, 8) 14.5 and 17.0, (4, 384, 8) 17.6 and 18.2, but (2, 512, 12) 21.5 and 20.3, (4, 512, 8)
    23.9 and 22.2. At 128 channels 24.1 and 23.0 for (4, 256, 8)."""
    c = ShortBackwardConfig(64, 64, 4, 3)
    key_tiles, query_tiles = _cdiv(seq_k, c.n), _cdiv(seq_q, c.m)
    most = max(key_tiles, query_tiles)
    rounds = 6 if most <= 4 else 0 if most > 8 else 4 if causal else 2.5
    fits = (key_tiles + query_tiles) * planes <= rounds * multiprocessors
    return c if max(d, dv) <= 64 and fits else None


def _chosen_forward(shape: "_Shape", options) -> ShortConfig | ForwardConfig:
    row_blocks = _cdiv(shape.seq_q, 64)
    fits = max(shape.batch, row_blocks) < 1 << 16  # a grid's axes but the first
    plain = fits and not (shape.varlen or shape.softcap or shape.alibi or options.sink is not None)
    programs = shape.batch * shape.heads * row_blocks
    call = shape.d, shape.dv, options.window_right >= 0, shape.seq_k
    more = shape.key_heads, shape.batch, programs, _multiprocessors(shape.device)
    short = choose_short(*call, *more) if plain else None
    return short or choose_forward(*call)


def _chosen_short_backward(shape: "_Shape", options, needs_sink: bool) -> ShortBackwardConfig | None:
    bounded = shape.right > 0 or shape.left >= 0
    if shape.varlen or shape.softcap or shape.alibi or needs_sink or bounded or shape.heads != shape.key_heads:
        return None
    call = shape.d, shape.dv, shape.right == 0, shape.seq_q, shape.seq_k, shape.batch * shape.heads
    return choose_short_backward(*call, _multiprocessors(shape.device))


def _chosen_backward(d, dv, options):
    plain = not (options.softcap or options.alibi_slopes is not None or options.deterministic)
    return choose_backward(d, dv, plain)


def describe(q: Tensor, k: Tensor, v: Tensor, options, grad: bool) -> str:
    text = f"forward {_chosen_forward(_Shape(q, k, v, options), options)}"
    if not grad:
        return text
    needs_sink = options.sink is not None and options.sink.requires_grad
    short = _chosen_short_backward(_Shape(q, k, v, options), options, needs_sink)
    return f"{text}; backward {short or _chosen_backward(q.shape[-1], v.shape[-1], options)}"


def forward_constants(
    c: ForwardConfig, *, left=False, right=False, tail=False, one_mask=True, softcap=False, alibi=False, sink=False,
    varlen=False, shared=False,
) -> dict:  # fmt: skip
    """The constants of the forward kernel, in its order."""
    return {
        "M": c.m, "N": c.n, "D": c.d, "D_QK": c.d_qk, "DV": c.dv, "STAGES": c.stages, "CONSUMERS": c.consumers,
        "REGISTERS": c.registers, "Q_BUFFERS": c.q_buffers, "LEFT": left, "RIGHT": right, "TAIL": tail,
        "ONE_MASK": one_mask, "SOFTCAP": softcap, "ALIBI": alibi, "SINK": sink, "VARLEN": varlen,
        "SHARED": shared, "PINGPONG": c.pingpong, "LAZY": c.lazy, "DEPENDENT": EARLY,
    }  # fmt: skip


def short_constants(c: ShortConfig, *, left=False, right=False, tail=False, one_mask=True, grouped=False) -> dict:
    """The constants of the forward kernel of short sequences, in its order."""
    return {
        "M": 64, "N": c.n, "D": c.d, "STAGES": c.stages, "BATCH_LAST": c.batch_last, "LEFT": left, "RIGHT": right,
        "TAIL": tail, "ONE_MASK": one_mask, "GROUPED": grouped, "DEPENDENT": EARLY,
    }  # fmt: skip


def backward_constants(
    c: BackwardConfig, *, left=False, right=False, tail=False, softcap=False, alibi=False, varlen=False,
    deterministic=False, sink=False,
) -> dict:  # fmt: skip
    """The constants of the backward kernel, in its order."""
    wide = c.dq_way == backward_kernels.WIDE.value
    narrow = {
        "COPY_SUMS": c.copy_sums and not deterministic, "K_HELD": c.k_held, "V_HELD": c.v_held,
        "KV_SLOTS": 0 if deterministic else c.kv_slots,
    }  # fmt: skip
    return {
        "M": c.m, "N": c.n, "D": c.d, **({"USED": c.d_qk, "DV": c.dv} if wide else {}), "STAGES": c.stages,
        **({} if wide else {"DQ_WAY": c.dq_way}), "BLOCK": backward_kernels.BLOCK, "LEFT": left, "RIGHT": right,
        "TAIL": tail, "SOFTCAP": softcap, "ALIBI": alibi, "VARLEN": varlen, "DETERMINISTIC": deterministic,
        **({} if wide else narrow), "SINK": sink,
    }  # fmt: skip


# ---- plans -------------------------------------------------------------------------------------------------------------


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


class _Shape:
    """Sizes that both passes need. A tensor of a call with lengths of its own stands as one batch of T rows."""

    def __init__(self, q, k, v, options):
        self.varlen = options.cu_seqlens_q is not None
        self.heads, self.d = q.shape[-2:]
        self.key_heads, self.dv = v.shape[-2:]
        self.dtype, self.device = q.dtype, q.get_device()
        if self.varlen:
            self.batch = options.cu_seqlens_q.numel() - 1
            self.seq_q, self.seq_k = max(options.max_seqlen_q, 1), max(options.max_seqlen_k, 1)
            self.rows = q.shape[0]
        else:
            self.batch, self.seq_q = q.shape[:2]
            self.seq_k = k.shape[1]
            self.rows = self.batch * self.seq_q
        # a bound that hides nothing is none
        left, right = options.window_left, options.window_right
        self.left = left if 0 <= left < max(self.seq_q, self.seq_k) else -1
        self.right = right if 0 <= right < max(self.seq_q, self.seq_k) else -1
        self.slopes_batch = 0
        if options.alibi_slopes is not None and options.alibi_slopes.ndim == 2:
            self.slopes_batch = self.heads
        self.softcap, self.alibi = options.softcap > 0, options.alibi_slopes is not None
        # the kernels work in powers of two; tanh x is 1 - 2 / (2^(2 x log2 e) + 1)
        self.scale = options.scale * LOG2E * (2 / options.softcap if self.softcap else 1)
        self.cap = options.softcap * LOG2E

    def one_mask(self, rows: int, keys: int) -> bool:
        """Whether only the first visited tile of a block's keys needs a mask: without a window to the left, where nothing hides
        keys but the end, or where tiles are square and lengths go together."""
        return self.left < 0 and (
            self.right < 0 or (not self.varlen and self.right == 0 and rows <= keys and self.seq_k >= self.seq_q
                               and (self.seq_k - self.seq_q) % keys == 0)
        )  # fmt: skip

    def box(self, t, block, width):
        shape, strides = t.shape, t.stride()
        if self.varlen:
            shape, strides = (1, *shape), (8, *strides)
        return Box(shape, strides, (1, block, 1, width), t.dtype)


class _ForwardPlan:
    """``counts``: whether its kernel draws work from a counter; ``pieces``: None, or the layout of the float32 that its programs
    leave each other pieces in."""

    counts = True

    def __init__(self, shape, c, q, k, v, options, out, lse, counter, ends_q, ends_k, slopes, sink):
        s = shape
        bounded = s.right >= 0
        rows = c.m * c.consumers
        row_blocks = _cdiv(s.seq_q, rows)
        heads = s.batch * s.heads
        items = heads * row_blocks
        self.blocks = min(_multiprocessors(s.device), items)
        # items that take the same time; of wider heads the loop over tiles would be longer by 5 to 10 instructions of 330 to 415
        alike = not (bounded or s.left >= 0 or s.varlen) and c.d <= 128
        shared = choose_shared(items, self.blocks, _cdiv(s.seq_k, c.n)) if alike else 0
        self.pieces = dense(self.blocks * rows * (c.dv + 2)) if shared else None
        head_bytes = 2 * s.seq_k * (s.d + s.dv)
        section = 1
        if bounded and c.d > 64:
            section = choose_causal_section(heads, head_bytes, 20 << 20, row_blocks, self.blocks)
        elif bounded:  # few heads a section are slower here: AS-64-16384-causal 2.08 ms for 2.05
            section = choose_section(heads, head_bytes, 20 << 20)
        constants = forward_constants(
            c, left=s.left >= 0, right=bounded, tail=s.varlen or s.seq_k % c.n != 0, one_mask=s.one_mask(rows, c.n),
            softcap=s.softcap, alibi=s.alibi, sink=options.sink is not None, varlen=s.varlen, shared=shared > 0,
        )  # fmt: skip
        self.q, self.k, self.v = s.box(q, c.m, c.d), s.box(k, c.n, c.d), s.box(v, c.n, c.dv)
        self.out = s.box(out, c.m, c.dv)
        self.scalars = (
            items, items - shared, heads, s.heads, s.heads // s.key_heads, row_blocks, section, s.seq_q, s.seq_k, s.rows,
            max(s.left, 0), max(s.right, 0), s.slopes_batch, s.dv, s.scale, s.cap,
        )  # fmt: skip
        examples = (
            (self.q, q), (self.k, k), (self.v, v), (self.out, out), out, lse, counter, ends_q, ends_k, slopes, sink,
            lse, *self.scalars,
        )  # fmt: skip
        self.binary = _binary(forward_kernels.attention_forward, s.device, examples, constants, launch_pdl=EARLY)

    def launch(self, stream: int, *addresses: int) -> None:
        noted = self.arguments(_noted, *addresses) if _noting.recorders else None
        given = _arguments.get((self, *addresses)) or _made(self, *addresses)
        self.binary(self.blocks, stream, given, noted=noted)

    def arguments(self, at, q, k, v, out, *more) -> tuple:
        return at(self.q, q) + at(self.k, k) + at(self.v, v) + at(self.out, out) + (out, *more) + self.scalars


class _ShortPlan:
    counts = False
    pieces = None

    def __init__(self, shape, c, q, k, v, out, lse):
        s = shape
        row_blocks = _cdiv(s.seq_q, 64)
        heads = s.batch * s.heads
        self.grid = (s.heads, row_blocks, s.batch) if c.batch_last else (s.heads, s.batch, row_blocks)
        falling = choose_falling(c, heads, row_blocks, _multiprocessors(s.device))
        self.q, self.k, self.v = s.box(q, 64, c.d), s.box(k, c.n, c.d), s.box(v, c.n, c.d)
        self.out = s.box(out, 64, c.d)
        self.scalars = (
            s.heads, s.heads // s.key_heads, row_blocks, falling, s.seq_q, s.seq_k, max(s.left, 0), max(s.right, 0), s.scale,
        )  # fmt: skip
        constants = short_constants(
            c, left=s.left >= 0, right=s.right >= 0, tail=s.seq_k % c.n != 0, one_mask=s.one_mask(64, c.n),
            grouped=s.heads != s.key_heads,
        )  # fmt: skip
        examples = (self.q, q), (self.k, k), (self.v, v), (self.out, out), lse, *self.scalars
        self.binary = _binary(forward_kernels.attention_forward_short, s.device, examples, constants, launch_pdl=EARLY)

    def launch(self, stream: int, *addresses: int) -> None:
        x, y, z = self.grid
        noted = self.arguments(_noted, *addresses) if _noting.recorders else None
        self.binary(x, stream, _arguments.get((self, *addresses)) or _made(self, *addresses), y, z, noted=noted)

    def arguments(self, at, q, k, v, out, lse, *_) -> tuple:
        return at(self.q, q) + at(self.k, k) + at(self.v, v) + at(self.out, out) + (lse,) + self.scalars


def _forward_plan(q, k, v, options, out, lse, counter, *more):
    shape = _Shape(q, k, v, options)
    c = _chosen_forward(shape, options)
    if isinstance(c, ShortConfig):
        return _ShortPlan(shape, c, q, k, v, out, lse)
    return _ForwardPlan(shape, c, q, k, v, options, out, lse, counter, *more)


_arguments = {}  # (plan, addresses) -> what its kernels are called with: an allocator gives the same addresses again and again
_MOST_ARGUMENTS = 1 << 14  # about 1 KB each


def _made(plan, *addresses: int) -> tuple:
    if len(_arguments) >= _MOST_ARGUMENTS:
        _arguments.clear()
    made = _arguments[plan, *addresses] = plan.arguments(_described, *addresses)
    return made


def _described(box: Box, address: int) -> tuple:
    return box.at(address)


def _noted(box: Box, address: int) -> tuple:
    """The same for a recorder."""
    return ((box, address),)


_binaries = {}


def _binary(kernel, device, examples, constants, **options) -> Binary:
    """One binary for all plans that want the same; the boxes of a further plan learn from it how descriptors look."""
    types = tuple(a[0].dtype if isinstance(a, tuple) else getattr(a, "dtype", None) for a in examples)
    key = kernel, device, types, tuple(constants.values()), tuple(options.values())
    found = _binaries.get(key)
    if found is None:
        found = _binaries[key] = Binary(
            kernel, device, examples, constants, **{"num_warps": 4, "enable_fp_fusion": True} | options
        )
    else:
        for box, like in zip((a[0] for a in examples if isinstance(a, tuple)), found.boxes, strict=True):
            box.metadata = like.metadata
            if "at" in vars(like):
                box.at = box.shaped
    return found


_plans = {}
_MOST_PLANS = 4096


def _key(q, k, v, options) -> tuple:
    slopes = options.alibi_slopes
    ends = options.cu_seqlens_q
    return (
        q.shape, k.shape, v.shape[-1], q.stride(), k.stride(), v.stride(), q.dtype, q.get_device(), options.window_left,
        options.window_right, options.scale, options.softcap,
        None if slopes is None else (slopes.ndim, slopes.dtype),
        None if options.sink is None else options.sink.dtype,
        None if ends is None else (ends.shape, options.max_seqlen_q, options.max_seqlen_k),
    )  # fmt: skip


def _keep(key, plan):
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


_counters = {}  # of each device's default stream


def _counter(device: int, stream: int) -> Tensor:
    """Zeros that the forward kernel leaves as zeros: which item is next, how many programs are done, and of each item that programs
    share, fewer than there are programs, how many pieces have come for each of at most three warpgroups.

    Kernels of the default stream run one after the other and share them. A captured graph may run beside its stream and gets its
    own, and so does every call on another stream: torch.compile's graphs warm up on one of theirs, where nothing may be kept."""
    length = 2 + 3 * _multiprocessors(device)
    if stream or torch.cuda.is_current_stream_capturing():
        return torch.zeros(length, dtype=torch.int32, device=torch.device("cuda", device))
    found = _counters.get(device)
    if found is None:
        found = _counters[device] = torch.zeros(length, dtype=torch.int32, device=torch.device("cuda", device))
    return found


# ---- forward -----------------------------------------------------------------------------------------------------------


def forward(q: Tensor, k: Tensor, v: Tensor, options) -> tuple[Tensor, Tensor]:
    """(out, lse); ``options`` is ``trinix.ops.attention.Options``."""
    device = q.get_device()
    stream = raw_stream(device)
    key = _key(q, k, v, options)
    plan = _plans.get(key)
    out_shape = q.shape[:-1] + v.shape[-1:]
    if options.cu_seqlens_q is None:
        out = torch.empty(out_shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    else:  # rows behind the last sequence are nobody's
        out = torch.zeros(out_shape, dtype=q.dtype, device=q.device)
        lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32, device=q.device)
    if plan is None:
        counter = _counter(device, stream)
        plan = _keep(key, _forward_plan(q, k, v, options, out, lse, counter, *_vectors(options, counter)))
    counter = _counter(device, stream) if plan.counts else lse
    more = _vectors(options, counter)
    pieces = lse if plan.pieces is None else torch.empty_strided(*plan.pieces, dtype=torch.float32, device=q.device)
    plan.launch(stream, *[t.data_ptr() for t in (q, k, v, out, lse, counter, *more, pieces)])
    return out, lse


def _vectors(options, stand_in: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ends of queries and of keys, slopes, sink; ``stand_in``, which nobody reads, for what is not there."""
    if options.cu_seqlens_q is None and options.alibi_slopes is None and options.sink is None:
        return stand_in, stand_in, stand_in, stand_in
    given = options.cu_seqlens_q, options.cu_seqlens_k, options.alibi_slopes, options.sink
    return tuple(stand_in if t is None else t.contiguous() for t in given)


# ---- backward ----------------------------------------------------------------------------------------------------------


def _backward_plan(tensors, gradients, options, needs_dlse, needs_sink, *more):
    q, k, v, out, dout, *_ = tensors
    shape = _Shape(q, k, v, options)
    c = _chosen_short_backward(shape, options, needs_sink)
    rows = max(shape.seq_q, shape.seq_k)  # offsets in a head have 32 bits
    if c and all(t.stride(1) * rows < 2**31 for t in (q, k, v, out, dout, *gradients)):
        return _ShortBackwardPlan(shape, c, tensors, gradients, needs_dlse)
    return _BackwardPlan(tensors, gradients, options, needs_dlse, needs_sink, *more)


class _ShortBackwardPlan:
    parts = 1
    space = 0

    def __init__(self, shape, c, tensors, gradients, needs_dlse):
        s = shape
        q, k, v, out, dout, lse, dlse = tensors
        key_tiles, query_tiles = _cdiv(s.seq_k, c.n), _cdiv(s.seq_q, c.m)
        planes = s.batch * s.heads
        self.programs = (key_tiles + query_tiles) * planes
        steps = [n // 8 for t in (q, k, v, out, dout, *gradients) for n in t.stride()[:3]]
        self.scalars = (
            *steps, s.heads, s.seq_q, s.seq_k, key_tiles, query_tiles, key_tiles * planes, s.scale, s.scale / LOG2E,
        )  # fmt: skip
        constants = short_backward_constants(
            c, s.d, s.dv, causal=s.right >= 0, even=s.seq_q % c.m == s.seq_k % c.n == 0, dlse=needs_dlse
        )
        self.binary = _binary(
            short_backward_kernels.attention_backward_short, s.device,
            (q, k, v, out, lse, dout, dlse, *gradients, *self.scalars), constants,
            num_warps=c.num_warps, num_stages=c.stages, launch_pdl=EARLY,
        )  # fmt: skip

    def launch(self, stream: int, q, k, v, out, lse, dout, dlse, dq, dk, dv, *_) -> None:
        given = q, k, v, out, lse, dout, dlse, dq, dk, dv, *self.scalars
        self.binary(self.programs, stream, given, noted=given)


def short_backward_constants(c: ShortBackwardConfig, d: int, dv: int, *, causal: bool, even: bool, dlse: bool) -> dict:
    """The constants of the kernel of short calls, in its order."""
    return {
        "D": d, "DV": dv, "WIDTH": padded(d), "V_WIDTH": padded(dv), "M": c.m, "N": c.n, "CAUSAL": causal, "EVEN": even,
        "DLSE": dlse, "STAGES": c.stages, "DEPENDENT": EARLY, "UPCAST": False,
    }  # fmt: skip


class _BackwardPlan:
    """``gradients`` (dq, dk, dv) lie as those of every call will."""

    def __init__(self, tensors, gradients, options, needs_dlse, needs_sink, ends_q, ends_k, slopes, sink):
        q, k, v, out, dout, lse, dlse = tensors
        dq, dk, dv = gradients
        self.shape = s = _Shape(q, k, v, options)
        bounded = s.right >= 0
        c = _chosen_backward(s.d, s.dv, options)
        block = backward_kernels.BLOCK
        group = s.heads // s.key_heads
        self.key_blocks = key_blocks = _cdiv(s.seq_k, c.n)
        programs = key_blocks * s.batch * s.key_heads
        processors = _multiprocessors(s.device)
        self.parts = parts = choose_parts(programs, group, processors, bounded)
        if s.varlen:
            self.padded = _cdiv(s.rows + s.batch * block, block) * block
            self.padded_rows = s.heads * self.padded
        else:
            self.padded = _cdiv(s.seq_q, block) * block
            self.padded_rows = s.batch * s.heads * self.padded
        wide = c.dq_way == backward_kernels.WIDE.value
        sums = c.d_qk or c.d  # columns of dQ that are added up
        width = 64 if wide else c.d // 2 if c.dq_way == backward_kernels.COLUMNS.value else c.d
        keys, dv_width = (c.n, c.dv) if wide else (c.n // 2, c.d)  # rows of K's tiles, columns of V's
        self.small = _cdiv(s.seq_q, block) * s.batch * s.heads
        self.deterministic = options.deterministic
        blocks = _cdiv(s.seq_q, block)
        out_heads = s.batch * s.key_heads * parts
        self.grid = key_blocks * out_heads
        drawn = c.kv_slots > 0 and not self.deterministic
        if drawn:  # not deterministic programs: those wait for one another, and all of these need not be there at once
            self.grid = min(self.grid, processors)
        # a head that fills the card alone goes alone (AS-64-16384-causal, AS-128-16384-causal)
        several = bounded and 4 * key_blocks < 3 * processors
        head_bytes = s.seq_q * c.d * 8 * (group // parts)
        section = choose_causal_section(out_heads, head_bytes, 34 << 20, key_blocks, processors) if several else 1
        device = q.device
        self.dk_shape = (*k.shape[:-2], s.key_heads * parts, s.d)
        self.dv_shape = (*v.shape[:-2], s.key_heads * parts, s.dv)
        wholes = dk, dv
        if parts > 1:
            dk, dv = (torch.empty(shape, dtype=q.dtype, device=device) for shape in (self.dk_shape, self.dv_shape))
        line = torch.empty(4, dtype=torch.float32, device=device)
        turns = torch.empty(4, dtype=torch.int32, device=device)
        self.q, self.dout = s.box(q, c.m, c.d), s.box(dout, c.m, dv_width)
        self.k, self.v = s.box(k, keys, c.d), s.box(v, keys, dv_width)
        self.dk, self.dv = s.box(dk, keys, c.d), s.box(dv, keys, dv_width)
        square = torch.empty(4, 256, dtype=torch.float32, device=device)
        # 64 rows of ``width`` columns, as they lie in memory
        self.dq = Box((self.padded_rows * sums // 256, 256), (256, 1), (width // 4, 256), torch.float32, swizzled=False)
        self.lines = 4 if needs_sink else 3  # lse, delta, the sink's shares of rows if its gradient is wanted, turns
        self.lse = Box((self.padded_rows,), (1,), (c.m,), torch.float32)
        self.delta = Box(((self.lines - 2) * self.padded_rows,), (1,), (c.m,), torch.float32)

        def steps(t):  # batch, row, head, in units of 8 elements: so the compiler knows how they are aligned
            strides = (0, *t.stride()) if s.varlen else t.stride()
            return [n // 8 for n in strides[:-1]]

        self.before_scalars = (
            s.heads, s.seq_q, self.padded, s.rows, blocks, *steps(out), *steps(dout), s.dv // 8,
        )  # fmt: skip
        self.before = _binary(
            backward_kernels.before, s.device,
            (out, dout, lse, dlse, line, line, line, turns, sink, line, ends_q, *self.before_scalars),
            {
                "D": sums, "DV_PADDED": padded(s.dv), "BLOCK": block, "VARLEN": s.varlen, "DLSE": needs_dlse,
                "SINK": needs_sink, "DETERMINISTIC": self.deterministic,
                "DRAWN": drawn, "DEPENDENT": EARLY,
            },
            num_warps=16 if max(c.d, dv_width) == 256 else 8, launch_pdl=EARLY,
        )  # fmt: skip
        self.scalars = (
            key_blocks, out_heads, section, s.key_heads, parts, group // parts, s.seq_q, s.seq_k, self.padded,
            max(s.left, 0), max(s.right, 0), s.slopes_batch, s.d, s.dv, s.scale, s.cap, options.scale,
        )  # fmt: skip
        self.sink_parts = blocks + key_blocks * (1 if wide else 2) if needs_sink else 0
        # a bound of 0 hides the keys behind the end from every row; a greater one lets the last rows see them
        tail = s.right != 0 and (s.varlen or s.seq_k % c.n != 0)
        constants = backward_constants(
            c, left=s.left >= 0, right=bounded, tail=tail, softcap=s.softcap, alibi=s.alibi, varlen=s.varlen,
            deterministic=self.deterministic, sink=needs_sink,
        )  # fmt: skip
        self.wide = wide
        self.binary = _binary(
            wide_kernels.attention_backward_wide if wide else backward_kernels.attention_backward, s.device,
            (
                (self.q, q), (self.dout, dout), (self.k, k), (self.v, v), (self.dk, dk), (self.dv, dv),
                *([] if wide else [(self.dq, square)]), (self.lse, line), (self.delta, line), dk, dv, line, turns, ends_q,
                ends_k, slopes, *self.scalars, line,
            ),
            constants, launch_pdl=True,
        )  # fmt: skip
        self.after_scalars = (s.heads, s.seq_q, self.padded, 2 * blocks, *steps(dq), s.d // 8, options.scale)
        self.after = _binary(
            backward_kernels.after, s.device, (line, dk, ends_q, *self.after_scalars),
            {"D": sums, "WIDTH": width, "BLOCK": block, "VARLEN": s.varlen},
            num_warps=8, launch_pdl=True,
        )  # fmt: skip
        self.after_blocks = 2 * self.small * (sums // width)
        if parts > 1:
            tokens = dk.shape[0] if s.varlen else s.batch * s.seq_k
            sizes = {"WIDTH": padded(s.d), "V_WIDTH": padded(s.dv), "SIZE": 2048}
            blocks_k, blocks_v = (_cdiv(tokens * s.key_heads, sizes["SIZE"] // sizes[n]) for n in ("WIDTH", "V_WIDTH"))
            self.join_blocks = blocks_k + blocks_v
            self.join_scalars = (
                tokens, tokens if s.varlen else s.seq_k, s.key_heads, parts, *steps(wholes[0]), *steps(wholes[1]), s.d // 8,
                s.dv // 8, blocks_k,
            )  # fmt: skip
            self.join = _binary(
                backward_kernels.join, s.device, (dk, dv, *wholes, *self.join_scalars), sizes, num_warps=8, launch_pdl=True,
            )  # fmt: skip
        self.sums = self.padded_rows * sums
        # the sums of dQ, and behind them lse, delta, turns and parts of the sink's gradient: one allocation
        self.space = self.sums + self.lines * self.padded_rows + self.sink_parts * s.batch * s.heads

    def launch(self, stream: int, *addresses: int) -> None:
        noted = self.arguments(_noted, *addresses) if _noting.recorders else (None,) * 4
        before, main, after, join = _arguments.get((self, *addresses)) or _made(self, *addresses)
        self.before(self.small, stream, before, noted=noted[0])
        self.binary(self.grid, stream, main, noted=noted[1])
        self.after(self.after_blocks, stream, after, noted=noted[2])
        if self.parts > 1:
            self.join(self.join_blocks, stream, join, noted=noted[3])

    def arguments(
        self, at, q, k, v, out, lse, dout, dlse, dq, dk, dv, space, end_q, end_k, slopes, sink, whole_k, whole_v
    ) -> tuple:
        """``dk`` and ``dv``: of each program, so parts of ``whole_k`` and ``whole_v`` where several share a head."""
        rows = 4 * self.padded_rows
        lse2 = space + 4 * self.sums
        delta, turns, d_sinks = (lse2 + n * rows for n in (1, self.lines - 1, self.lines))
        more_d_sinks = d_sinks + 4 * self.small
        if not self.sink_parts:  # nobody reads it, and nothing lies behind the turns
            d_sinks = more_d_sinks = space
        boxes = (
            at(self.q, q) + at(self.dout, dout) + at(self.k, k) + at(self.v, v) + at(self.dk, dk) + at(self.dv, dv)
            + (() if self.wide else at(self.dq, space)) + at(self.lse, lse2) + at(self.delta, delta)
        )  # fmt: skip
        return (
            (out, dout, lse, dlse, lse2, delta, space, turns, sink, d_sinks, end_q, *self.before_scalars),
            (*boxes, dk, dv, space, turns, end_q, end_k, slopes, *self.scalars, more_d_sinks),
            (space, dq, end_q, *self.after_scalars),
            (dk, dv, whole_k, whole_v, *self.join_scalars) if self.parts > 1 else None,
        )


def choose_section(heads: int, head_bytes: int, most: int) -> int:
    """How many heads go side by side, longest blocks first: about as many as the L2 cache holds, in sections of nearly equal
    size (a small last section would start its longest blocks last)."""
    sections = min(heads, max(1, _cdiv(heads * head_bytes, most)))
    while 4 * (_cdiv(heads, sections) * sections - heads) > _cdiv(heads, sections):
        sections += 1
    return _cdiv(heads, sections)


def choose_causal_section(heads: int, head_bytes: int, most: int, blocks: int, multiprocessors: int) -> int:
    """Of many heads as few as give every multiprocessor one of their ``blocks``: who has had a short block begins the next section
    with a long one, and half of the L2 cache holds it (AS-128-1024-causal forward 168.8 -> 154.9 us, backward 588.6 -> 544.7;
    AS-128-2048-causal 247.7 -> 242.2, 780.6 -> 761.2). Few such sections would end on long blocks: 40 heads of 2048 rows forward
    85.5 in sections of 20, 91.2 of 8, 90.8 of 40, backward 258.2 of 14, 273.5 of 8."""
    held = choose_section(heads, head_bytes, most)
    one_each = min(8, max(1, multiprocessors // blocks))
    return choose_section(heads, 1, one_each) if one_each < held and heads >= 8 * one_each else held


def choose_parts(programs: int, group: int, multiprocessors: int, bounded: bool) -> int:
    """Into how many parts to split the query heads of a key head, each then a program whose dK and dV are added up afterwards."""
    ways = [parts for parts in range(1, group + 1) if group % parts == 0]
    if bounded:  # programs of unlike length: several on each multiprocessor, to even out
        return next((parts for parts in ways if programs * parts >= 4 * multiprocessors), group)
    # of one length: the fewest parts whose last turn of programs leaves about as little idle as any
    turns = {parts: _cdiv(programs * parts, multiprocessors) / parts for parts in ways}
    return next(parts for parts in ways if turns[parts] <= 1.03 * min(turns.values()))


def backward(dout: Tensor, dlse: Tensor | None, q, k, v, out, lse, options, needs) -> tuple:
    """(dq, dk, dv, None, dsink); those of q, k and v come out of one pass over the tiles."""
    device = q.get_device()
    stream = raw_stream(device)
    lse = lse.contiguous()
    given_dlse = lse if dlse is None else dlse.contiguous()
    more = _vectors(options, lse)
    needs_sink = options.sink is not None and needs[4]
    key = _key(q, k, v, options), dout.stride(), out.stride(), dlse is None, options.deterministic, needs_sink
    plan = _plans.get(key)
    make = torch.empty if options.cu_seqlens_q is None else torch.zeros  # rows behind the last sequence are nobody's
    dq, dk, dv = (make(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, v))
    if plan is None or (dout.data_ptr() | out.data_ptr() | q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15:
        # q, k and v too: hooks on saved tensors may give others back
        dout, out, q, k, v = (readable(t) for t in (dout, out, q, k, v))
        key = _key(q, k, v, options), dout.stride(), out.stride(), *key[3:]
        plan = _plans.get(key)
        if plan is None:
            tensors = q, k, v, out, dout, lse, given_dlse
            plan = _keep(key, _backward_plan(tensors, (dq, dk, dv), options, dlse is not None, needs_sink, *more))
    parts_k, parts_v = dk, dv
    if plan.parts > 1:
        parts_k, parts_v = (make(shape, dtype=q.dtype, device=q.device) for shape in (plan.dk_shape, plan.dv_shape))
    space = torch.empty(plan.space, dtype=torch.float32, device=q.device)
    plan.launch(
        stream,
        *[t.data_ptr() for t in (q, k, v, out, lse, dout, given_dlse, dq, parts_k, parts_v, space, *more, dk, dv)],
    )
    dsink = None
    if needs_sink:
        parts = space[-plan.sink_parts * plan.shape.batch * plan.shape.heads :].view(-1, plan.shape.heads)
        dsink = -parts.sum(0).to(options.sink.dtype)
    return dq, dk, dv, None, dsink


# ---- calls without optional tensors ----------------------------------------------------------------------------------------


class Prepared:
    """All calls of one kind, which q, k, v and the options decide; the caller knows that the kind is the same.

    What ``forward`` and ``backward`` above look up for each call is here an attribute. Results by ``empty_strided``, which
    costs the host two thirds of ``empty``.
    """

    def __init__(self, backend: str, q: Tensor, k: Tensor, v: Tensor, options):
        self.backend, self.options = backend, options
        self.dtype, self.device, self.index = q.dtype, q.device, q.get_device()
        batch, rows, heads, _ = q.shape
        self.out_shape = dense(*q.shape[:-1], v.shape[-1])
        self.lse_shape = dense(batch, heads, rows)
        # one place for all that is written and never read, and no allocation, where the host's time counts
        self.unread_lse = _unread(self.device) if batch * heads * rows <= _UNREAD else None
        self.plan = None
        self.backward_plans = {}  # strides of dout, q, k and v, whether these are slices of one -> plan, how gradients lie
        # bytes from q to k and from k to v where all three are heads of one tensor, from k to v where a head's lie together
        self.slices = k.element_size() * heads * k.shape[-1], k.element_size() * k.shape[-2] * k.shape[-1]
        self.halves = k.element_size() * k.shape[-1]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, wants_lse: bool) -> tuple[Tensor, Tensor]:
        """(out, lse); without ``wants_lse`` nobody may read lse."""
        stream = raw_stream(self.index)
        out = torch.empty_strided(*self.out_shape, dtype=self.dtype, device=self.device)
        lse = self.unread_lse
        if lse is None or wants_lse:
            lse = torch.empty_strided(*self.lse_shape, dtype=torch.float32, device=self.device)
        plan = self.plan
        if plan is None:
            counter = _counter(self.index, stream)
            plan = self.plan = _forward_plan(q, k, v, self.options, out, lse, counter, *(counter,) * 4)
        counter = _counter(self.index, stream) if plan.counts else lse
        at = counter.data_ptr()
        pieces = lse
        if plan.pieces is not None:
            pieces = torch.empty_strided(*plan.pieces, dtype=torch.float32, device=self.device)
        if _noting.recorders and (recorder := _noting.recorder()) is not None:
            # memory of all calls: what nobody reads, and the default stream's counter (another's is made for the call)
            recorder.fixed |= {lse.data_ptr(): False} if lse is self.unread_lse else {}
            recorder.fixed |= {at: True} if plan.counts else {}
        plan.launch(
            stream, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(), at, at, at, at, at,
            pieces.data_ptr(),
        )  # fmt: skip
        return out, lse

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple:
        """(dq, dk, dv) of dout, ``out`` and ``lse`` being ``forward``'s."""
        stream = raw_stream(self.index)
        # hooks on saved tensors may give others back, packed densely (torch.autograd.graph.save_on_cpu) or in any other way
        if out.stride() != self.out_shape[1]:
            out = out.contiguous()
        lse = lse.contiguous()
        found = None
        if not (q.data_ptr() | k.data_ptr() | v.data_ptr() | out.data_ptr() | dout.data_ptr()) & 15:
            found = self.backward_plans.get(self._backward_kind(dout, q, k, v))
        if found is None:
            dout, q, k, v, out = (readable(t) for t in (dout, q, k, v, out))
            kind = self._backward_kind(dout, q, k, v)
            found = self.backward_plans.get(kind)
            if found is None:
                if len(self.backward_plans) >= _MOST_PLANS:
                    self.backward_plans.clear()
                found = self.backward_plans[kind] = self._backward_plan(dout, q, k, v, out, lse)
        plan, places, parts, space_shape = found
        place = {"dtype": self.dtype, "device": self.device}
        dq, dk, dv = _empty(places, place)
        parts_k, parts_v = dk, dv
        if parts:
            parts_k, parts_v = (torch.empty_strided(*shape, **place) for shape in parts)
        space = lse
        if plan.space:
            space = torch.empty_strided(*space_shape, dtype=torch.float32, device=self.device)
        at = lse.data_ptr()
        plan.launch(
            stream, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), at, dout.data_ptr(), at, dq.data_ptr(),
            parts_k.data_ptr(), parts_v.data_ptr(), space.data_ptr(), at, at, at, at, dk.data_ptr(), dv.data_ptr(),
        )  # fmt: skip
        return dq, dk, dv

    def _backward_kind(self, dout, q, k, v) -> tuple:
        steps = k.data_ptr() - q.data_ptr(), v.data_ptr() - k.data_ptr()
        return dout.stride(), q.stride(), k.stride(), v.stride(), steps == self.slices, steps[1] == self.halves

    def _backward_plan(self, dout, q, k, v, out, lse) -> tuple:
        """(plan, places of dq, dk and dv, shapes of the parts that these are sums of, shape of the space for all else)."""
        places = _places(q, k, v)
        gradients = _empty(places, {"dtype": self.dtype, "device": self.device})
        plan = _backward_plan((q, k, v, out, dout, lse, lse), gradients, self.options, False, False, *(lse,) * 4)
        parts = (dense(*plan.dk_shape), dense(*plan.dv_shape)) if plan.parts > 1 else None
        return plan, places, parts, dense(plan.space)


def _places(q: Tensor, k: Tensor, v: Tensor) -> tuple:
    """Where dq, dk and dv go, for ``_empty``: (shape and strides, None or sizes and the dimension that they cut) of each tensor.

    Where q, k and v are slices of one tensor the gradients are too: what made that tensor takes its gradient without a copy
    (``trinix.ops.linear.slices``; a copy was 2.5% of A-MHSA-2's backward)."""
    if one := side_by_side((q, k, v), 2):
        return ((one, ((q.shape[2], k.shape[2], v.shape[2]), 2)),)
    if both := side_by_side((k, v), 3):
        return (dense(*q.shape), None), (both, ((k.shape[3], v.shape[3]), 3))
    return tuple((dense(*t.shape), None) for t in (q, k, v))


def _empty(places: tuple, place: dict) -> list[Tensor]:
    tensors = []
    for layout, cut in places:
        t = torch.empty_strided(*layout, **place)
        tensors += (t,) if cut is None else t.split_with_sizes(*cut)
    return tensors


_UNREAD = 1 << 18  # rows of all heads: 1 MiB


@functools.cache
def _unread(device: torch.device) -> Tensor:
    return torch.empty(_UNREAD, dtype=torch.float32, device=device)


# ---- for the compiler's test -------------------------------------------------------------------------------------------


class CompileCase(NamedTuple):
    """A binary that the library launches, as it can be compiled without a GPU."""

    name: str
    kernel: object
    signature: dict  # of what is no constant; missing: i32
    constants: dict


def compile_cases() -> list[CompileCase]:
    """The main kernels in bfloat16, with every option once."""
    causal = {"right": True}
    both = {
        "full": {}, "causal": causal, "window": causal | {"left": True}, "alibi": causal | {"alibi": True},
        "softcap-varlen": causal | {"softcap": True, "varlen": True},
    }  # fmt: skip
    few = {name: both[name] for name in ("full", "causal")}
    shared = {
        "shared": {"shared": True},
        "shared-options": dict.fromkeys(("shared", "softcap", "alibi", "sink", "tail"), True),
    }
    cases = []
    for d, dv, ways in ((64, 64, both | shared), (128, 128, both | shared), (192, 128, few), (256, 256, few)):
        for name, options in ways.items():
            c = choose_forward(d, dv, "right" in options, 4096)
            given = {"tail": "varlen" in options} | options
            given["one_mask"] = "right" not in options or (name == "causal" and c.m * c.consumers <= c.n)
            boxes = {"q_desc": (c.m, c.d), "k_desc": (c.n, c.d), "v_desc": (c.n, c.dv), "o_desc": (c.m, c.dv)}
            pointers = {"o_ptr": "*bf16"} | dict.fromkeys(("lse_ptr", "slopes", "sinks", "pieces"), "*fp32")
            signature = _descriptors(boxes) | pointers | dict.fromkeys(("counter", "cu_q", "cu_k"), "*i32")
            constants = forward_constants(c, **given)
            cases.append(CompileCase(f"forward/{d}/{name}", forward_kernels.attention_forward, signature, constants))
    short = {name: both[name] for name in ("full", "causal", "window")} | {"grouped": {"grouped": True}}
    for d in (64, 128):
        for name, options in short.items():
            c = choose_short(d, d, d > 64 or "right" in options, 128, 1, 1, 1, 132)
            boxes = {"q_desc": (64, c.d), "k_desc": (c.n, c.d), "v_desc": (c.n, c.d), "o_desc": (64, c.d)}
            signature = _descriptors(boxes) | {"lse_ptr": "*fp32"}
            constants = short_constants(c, **options, one_mask="left" not in options)
            cases.append(
                CompileCase(f"short/{d}/{name}", forward_kernels.attention_forward_short, signature, constants)
            )
    sink = {"sink": causal | {"sink": True}}
    both |= {"window-tail": both["window"] | {"tail": True}} | sink
    more = both | {"deterministic": {"deterministic": True}}
    for d, dv, ways in ((64, 64, both), (128, 128, more), (192, 128, more), (256, 256, few | sink)):
        for name, options in ways.items():
            plain = name in ("full", "causal", "window", "window-tail", "sink")
            c = choose_backward(d, dv, plain)
            wide = c.dq_way == backward_kernels.WIDE.value
            keys = c.n if wide else c.n // 2
            width = c.d // 2 if c.dq_way == backward_kernels.COLUMNS.value else c.d
            boxes = {"q_desc": (c.m, c.d), "do_desc": (c.m, c.dv or c.d)}
            boxes |= dict.fromkeys(("k_desc", "dk_desc"), (keys, c.d)) | dict.fromkeys(
                ("v_desc", "dv_desc"), (keys, c.dv or c.d)
            )
            line = f"tensordesc<fp32[{c.m}],NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)>"
            square = f"tensordesc<fp32[{width // 4}, 256],NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)>"
            signature = _descriptors(boxes) | {"dq_desc": square, "lse_desc": line, "delta_desc": line}
            signature |= {"dk_ptr": "*bf16", "dv_ptr": "*bf16"} | dict.fromkeys(("sums", "slopes", "d_sinks"), "*fp32")
            signature |= dict.fromkeys(("turns", "cu_q", "cu_k"), "*i32")
            kernel = wide_kernels.attention_backward_wide if wide else backward_kernels.attention_backward
            cases.append(CompileCase(f"backward/{d}/{name}", kernel, signature, backward_constants(c, **options)))
    return cases


def _descriptors(boxes: dict) -> dict:
    layout = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)"
    return {name: f"tensordesc<bf16[1, {rows}, 1, {width}],{layout}>" for name, (rows, width) in boxes.items()}
