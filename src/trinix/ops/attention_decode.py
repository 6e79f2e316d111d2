"""Attention of a few queries over a cache of keys and values: the decoding step of a Transformer. Forward only.

For query i of sequence b and head h, over the first n_b keys of the cache (cache_seqlens[b] and the new ones)::

    z_j = softcap tanh(scale q_i . k_j / softcap)      without softcap: scale q_i . k_j
          - alibi_slopes[h] |j - p|                    p = n_b - Sq + i: the last query stands at the last key
    out_i = sum_j softmax(z)_j v_j                     over the j with p - left <= j <= p + right; causal: right is 0
    lse_i = log(sum_j exp(z_j))                        both with exp(sink[h]) in the sum, where there is a sink

A query that sees no key gives out 0 and lse -inf (with a sink: its logit).

=============  ==============================================  ==========================================================
q              [B, Sq, H, D]                                   any strides; Sq is meant to be small, any number is right
k_cache        [B, Smax, Hk, D] or pages [P, page, Hk, D]      read in place; H is a multiple of Hk
v_cache        [B, Smax, Hk, Dv] or pages [P, page, Hk, Dv]    may be ``k_cache[..., :Dv]``: latent attention, read once
cache_seqlens  [B] int32                                       tokens in the cache before this call
k_new, v_new   [B, Sn, Hk, D], [B, Sn, Hk, Dv]                 tokens to append, in place, before attention sees them
page_table     [B, most pages] int32                           page of tokens ``page * n`` to ``page * (n + 1)``
alibi_slopes   [H] or [B, H]                                   see ``trinix.ops.alibi_slopes``
sink           [H]                                             logits that join the normaliser (GPT-OSS)
out            [B, Sq, H, Dv] in q's dtype, contiguous
lse            [B, H, Sq] float32 (float64 for float64), natural logarithm
=============  ==============================================  ==========================================================

Tensors of values are of one dtype: float16, bfloat16, float32 (float64 through the PyTorch formula); arithmetic is float32.
Pages are of any size; entries of the table behind a sequence's length are not looked at, and what the cache holds there may be
NaN. A batch that picks rows of a larger cache is a page table of one page a sequence: ``page_table=rows[:, None]``. Where v_cache
is k_cache's first channels, v_new has to be k_new's.

Lengths stay on the device: nothing on the host depends on them, so a CUDA graph may be replayed as they grow. A length
that the cache cannot hold (below 0, or with the new tokens above its capacity) makes that sequence's results NaN, and nothing
outside is touched; in an eager call on a CPU it is a ValueError.
An entry of the table that is no page is undefined.

The cache of one sequence is split into shares that run at the same time, ``num_splits`` of them, by default as many as fill
the card for a full cache. Results of different numbers differ by rounding.

Forward only: a call that autograd would have to record is refused, since the cache is written in place. Under
``torch.compile`` a Triton call stays one operator.
Sources: split-KV decoding arXiv:2307.08691 and its "Flash-Decoding", pages arXiv:2309.06180, latent attention arXiv:2405.04434.
"""

import inspect
import math
from typing import NamedTuple

import torch
from torch import Tensor

from trinix import dispatch
from trinix.dispatch import Explanation
from trinix.kernels.torch import attention_decode as reference

_triton_module = None  # kept by hand: torch.compile traces through functools.cache, and says so


def _triton():
    global _triton_module
    if _triton_module is None:
        from trinix.kernels.triton import attention_decode

        _triton_module = attention_decode
    return _triton_module


def _torch():
    return reference


BACKENDS = {"triton": _triton, "torch": _torch}


class Options(NamedTuple):
    """What a kernel is told besides its tensors of queries, keys and values. Causal is a window's right side of 0."""

    window_left: int = -1  # -1: unbounded
    window_right: int = -1
    scale: float = 1.0
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sink: Tensor | None = None
    num_splits: int | None = None


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    page_table: Tensor | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q over the cache, with the new keys and values appended to it first; see the top of this file.

    Args:
        q: ``[B, Sq, H, D]``.
        k_cache: ``[B, Smax, Hk, D]``, or with ``page_table`` ``[P, page, Hk, D]``.
        v_cache: the same with Dv channels.
        cache_seqlens: int32 ``[B]``: how many tokens the cache holds before this call.
        k_new: ``[B, Sn, Hk, D]``, written into the cache at ``cache_seqlens[b]``. ``cache_seqlens`` is left as it is.
        v_new: ``[B, Sn, Hk, Dv]``.
        page_table: int32 ``[B, most pages]``.
        causal: query i sees no key behind its own position; the last query stands at the last key.
        window: (left, right), how far a query sees to either side; None is unbounded.
        softcap: bound of the logits, finite, 0 for none.
        alibi_slopes: ``[H]`` or ``[B, H]``.
        sink: ``[H]``.
        scale: of the logits, by default 1 / sqrt(D).
        return_lse: return (out, lse).
        num_splits: into how many shares a sequence is split, 1 to 1024.
        backend: "auto", "triton" or "torch". A named backend never falls back.

    Raises:
        TypeError: an argument is no tensor of its dtype, or no bool.
        ValueError: shapes or devices do not fit, ``k_new`` without ``v_new``, a negative window or softcap, unknown backend.
        RuntimeError: a gradient is wanted.
        Unsupported: the named backend cannot run this call.

    >>> q, cache = torch.ones(1, 1, 4, 8), torch.ones(1, 16, 2, 8)
    >>> trinix.ops.attention_decode(q, cache, cache, torch.tensor([5], dtype=torch.int32)).shape
    torch.Size([1, 1, 4, 8])
    """
    if type(causal) is not bool or type(return_lse) is not bool:
        dispatch.flags("attention_decode", causal=causal, return_lse=return_lse)
    tensors = q, k_cache, v_cache, cache_seqlens, k_new, v_new, page_table, alibi_slopes, sink
    kind = plan = None
    if not torch.compiler.is_compiling():
        kind = _kind(tensors, causal, window, softcap, scale, num_splits, backend)
        plan = _prepared.get(kind)
    if plan is not None:
        out, lse = _triton_module.run(plan, *tensors)
    else:
        _check(*tensors)
        options = _options(q, causal, window, softcap, alibi_slopes, sink, scale, num_splits)
        out, lse = _run((*tensors[:7], options), backend, kind)
    return (out, lse) if return_lse else out


_prepared = {}  # kind of a call -> what its kernels share; emptied when it has grown
_NUMBERS = (float, int, type(None))


def _kind(tensors, causal, window, softcap, scale, num_splits, backend) -> tuple | None:
    """All that checks, choice of backend and plans look at; None for a call that needs a look of its own."""
    given = [t for t in tensors if t is not None]
    # numbers by type: a tensor would be found again by its identity, whatever its value has become
    if (
        not dispatch.plain(*given)
        or tensors[1] is None or tensors[2] is None
        or type(causal) is not bool or type(backend) is not str or type(scale) not in _NUMBERS
        or type(softcap) not in _NUMBERS or type(num_splits) not in (int, type(None))
    ):  # fmt: skip
        return None
    if torch.is_grad_enabled():
        for t in given:
            if t.requires_grad:
                return None
    return (
        *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors],
        tensors[1].data_ptr() == tensors[2].data_ptr(), causal, None if window is None else repr(window), softcap, scale,
        num_splits, backend, dispatch.forced,
    )  # fmt: skip


def _prepare(kind, call) -> None:
    plan = _triton().prepared(*call)
    if plan is not None:
        if len(_prepared) >= 2_000:
            _prepared.clear()
        _prepared[kind] = plan


def _tensors(call) -> list[Tensor]:
    return [t for t in (*call[:7], call[7].alibi_slopes, call[7].sink) if t is not None]


def _run(call, backend, kind):
    if torch.is_grad_enabled():
        for t in _tensors(call):
            if t.requires_grad:
                raise RuntimeError(
                    "attention_decode: forward only, but an argument requires a gradient; call it under torch.no_grad(), "
                    "or use attention, which has a backward"
                )
    backend = dispatch.resolve(backend)
    if backend == "auto":
        backend = "triton" if call[0].is_cuda and _against_triton(call) is None else "torch"
        compiling = torch.compiler.is_compiling()
        if backend == "triton" and not compiling and not dispatch.plain(*_tensors(call)):
            backend = "torch"
    else:
        dispatch.load_named("attention_decode", BACKENDS, backend, *call)
    if backend == "torch" or not call[0].numel():  # without a query there may be tokens to append all the same
        _check_lengths(*call[1:2], *call[3:7])
        return reference.forward(*call)
    if torch.compiler.is_compiling() or not dispatch.plain(*_tensors(call)):
        return (_append_op if call[4] is not None else _read_op)(*call[:7], *call[7])
    if kind is not None:
        _prepare(kind, call)
    return _triton().forward(*call)


def _against_triton(call) -> str | None:
    return dispatch.missing(_triton) or _triton().unsupported(*call)


def _check(q, k_cache, v_cache, cache_seqlens, k_new, v_new, page_table, alibi_slopes, sink):
    # on the path of every eager call: one comparison where all is well, words where it is not
    if not isinstance(q, Tensor) or not q.is_floating_point():
        raise TypeError(
            f"attention_decode: q must be a floating-point tensor, got {_name(q)}; convert it with q.float()"
        )
    if q.ndim != 4:
        raise ValueError(
            f"attention_decode: q must be [B, Sq, H, D], got shape {list(q.shape)}; add the missing dimension"
        )
    batch, _, heads, d = q.shape
    if not d:
        raise ValueError(f"attention_decode: D must be 1 or more, got q of shape {list(q.shape)}; give q its channels")
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache), ("k_new", k_new), ("v_new", v_new)):
        if t is None and name.endswith("new"):
            continue
        if not isinstance(t, Tensor) or t.dtype != q.dtype:
            raise TypeError(
                f"attention_decode: {name} must be a tensor of q's dtype {q.dtype}, got {_name(t)}; "
                "keep the cache in the dtype of the queries"
            )
        if t.ndim != 4:
            raise ValueError(
                f"attention_decode: {name} must have 4 dimensions, [batch or pages, tokens, key heads, channels], got shape "
                f"{list(t.shape)}; use unflatten or unsqueeze"
            )
    pages, _, key_heads, _ = k_cache.shape
    if k_cache.shape[3] != d:
        raise ValueError(
            f"attention_decode: k_cache must have q's {d} channels, got shape {list(k_cache.shape)}; check the head dimension"
        )
    if v_cache.shape[:3] != k_cache.shape[:3] or not v_cache.shape[3]:
        raise ValueError(
            f"attention_decode: v_cache must be {[*k_cache.shape[:3], 'Dv']} as k_cache is, got shape {list(v_cache.shape)}; "
            "keep both caches in one layout"
        )
    if not key_heads or heads % key_heads:
        raise ValueError(
            f"attention_decode: q's {heads} heads must be a multiple of the cache's {key_heads}, got k_cache of shape "
            f"{list(k_cache.shape)}; the layout is [batch, tokens, heads, channels]"
        )
    _check_int("cache_seqlens", cache_seqlens, (batch,))
    if page_table is not None:
        _check_int("page_table", page_table, (batch, None))
        if not k_cache.shape[1]:
            raise ValueError(
                f"attention_decode: a page must hold a token, got k_cache of shape {list(k_cache.shape)}; "
                "leave page_table out for an empty cache"
            )
    elif pages != batch:
        raise ValueError(
            f"attention_decode: k_cache must have q's batch {batch}, got shape {list(k_cache.shape)}; "
            "pass page_table if these are pages, or page_table=rows[:, None] to pick rows"
        )
    if (k_new is None) != (v_new is None):
        raise ValueError(
            f"attention_decode: k_new and v_new go together, got {_name(k_new)} and {_name(v_new)}; pass both or neither"
        )
    if k_new is not None:
        wanted = [batch, k_new.shape[1], key_heads]
        if list(k_new.shape) != [*wanted, d] or list(v_new.shape) != [*wanted, v_cache.shape[3]]:
            raise ValueError(
                f"attention_decode: k_new and v_new must be {[batch, 'Sn', key_heads, d]} and "
                f"{[batch, 'Sn', key_heads, v_cache.shape[3]]}, got shapes {list(k_new.shape)} and {list(v_new.shape)}; "
                "give every sequence the same number of new tokens"
            )
    for name, t in (("alibi_slopes", alibi_slopes), ("sink", sink)):
        if t is None:
            continue
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise TypeError(
                f"attention_decode: {name} must be a floating-point tensor, got {_name(t)}; convert it with .float()"
            )
        if t.shape != (heads,) and not (name == "alibi_slopes" and t.shape == (batch, heads)):
            raise ValueError(
                f"attention_decode: {name} must be [{heads}], one number a head, got shape {list(t.shape)}; flatten or select it"
            )
    named = {
        "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": cache_seqlens, "k_new": k_new, "v_new": v_new,
        "page_table": page_table, "alibi_slopes": alibi_slopes, "sink": sink,
    }  # fmt: skip
    for name, t in named.items():
        if t is not None and t.device != q.device:
            raise ValueError(
                f"attention_decode: {name} must be on q's device {q.device}, got {t.device}; move it with .to(q.device)"
            )


def _check_lengths(k_cache, cache_seqlens, k_new, v_new, page_table):
    """Lengths that are known without waiting for a device."""
    if not cache_seqlens.numel() or not dispatch.readable(cache_seqlens):
        return
    room = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    new = 0 if k_new is None else k_new.shape[1]
    least, most = map(int, cache_seqlens.aminmax())
    if least < 0:
        raise ValueError(
            f"attention_decode: cache_seqlens must be from 0 on, got {least}; they count the cached tokens"
        )
    if most + new > room:
        raise ValueError(
            f"attention_decode: cache_seqlens and the new tokens must be within the cache's {room}, got {most} and {new}; make a "
            "larger cache"
        )


def _check_int(name, t, shape):
    if not isinstance(t, Tensor) or t.dtype != torch.int32:
        raise TypeError(
            f"attention_decode: {name} must be an int32 tensor, got {_name(t)}; convert it with .to(torch.int32)"
        )
    if t.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, t.shape, strict=True)):
        words = ["any" if n is None else n for n in shape]
        raise ValueError(
            f"attention_decode: {name} must have shape {words} for q's batch of {shape[0]}, got {list(t.shape)}; "
            "give it one row a sequence"
        )


def _name(value) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _options(q, causal, window, softcap, alibi_slopes, sink, scale, num_splits) -> Options:
    left = right = -1
    if window is not None:
        if (
            not isinstance(window, (tuple, list))
            or len(window) != 2
            or any(w is not None and (type(w) is not int or w < 0) for w in window)
        ):
            raise ValueError(
                f"attention_decode: window must be (left, right) of ints from 0 on or None, got {window!r}; "
                "None is unbounded"
            )
        # a bound beyond any length is none: the kernel adds it to 32-bit positions
        left, right = (-1 if w is None or w >= 2**30 else w for w in window)
    if causal:
        right = 0
    if softcap is None or not 0 <= dispatch.number("attention_decode", "softcap", softcap) < math.inf:
        raise ValueError(
            f"attention_decode: softcap must be 0 (none) or above, and finite, got {softcap!r}; leave it out for none"
        )
    if num_splits is not None and (type(num_splits) is not int or not 1 <= num_splits <= 1024):
        raise ValueError(
            f"attention_decode: num_splits must be an int from 1 to 1024 or None, got {num_splits!r}; None lets the op choose"
        )
    scale = q.shape[3] ** -0.5 if scale is None else dispatch.number("attention_decode", "scale", scale)
    return Options(left, right, scale, float(softcap), alibi_slopes, sink, num_splits)


# The same kernels as registered operators, for calls that a raw launch must not see: torch.compile, fake tensors, dispatch
# modes, subclasses. Two, because a schema says what is written.


def _run_registered(*flat):
    call = *flat[:7], Options(*flat[7:])
    # torch.compile may have parted values from the keys whose channels they are
    out, lse = (reference if _triton().unsupported(*call) else _triton()).forward(*call)
    return out.contiguous(), lse


def _fake(q, k_cache, v_cache, *rest):
    batch, seq, heads, _ = q.shape
    return q.new_empty(batch, seq, heads, v_cache.shape[3]), q.new_empty(batch, heads, seq, dtype=torch.float32)


_REST = (
    "Tensor? page_table, int window_left, int window_right, float scale, float softcap, Tensor? alibi_slopes, Tensor? sink, "
    "int? num_splits) -> (Tensor, Tensor)"
)
_read_op = dispatch.register(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? k_new, Tensor? v_new, "
    + _REST,
    _run_registered,
    _fake,
)
_append_op = dispatch.register(
    "attention_decode_append(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? k_new, "
    "Tensor? v_new, " + _REST,
    _run_registered,
    _fake,
)


def explain(op, *args, **kwargs) -> Explanation:
    """Which backend ``op(*args, **kwargs)`` would run on, why, and with which configuration; runs nothing."""
    bound = inspect.signature(op).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    tensors = [given[name] for name in ("q", "k_cache", "v_cache", "cache_seqlens", "k_new", "v_new", "page_table")]
    _check(*tensors, given["alibi_slopes"], given["sink"])
    options = _options(
        *[given[n] for n in ("q", "causal", "window", "softcap", "alibi_slopes", "sink", "scale", "num_splits")]
    )
    call = *tensors, options
    backend = dispatch.resolve(given["backend"])
    dispatch.check_name("attention_decode", BACKENDS, backend)
    if backend == "torch":
        return Explanation("attention_decode", "torch", "named by the caller")

    def config():
        return _triton().describe(*tensors[:3], *tensors[4:], options)

    if backend != "auto":
        dispatch.load_named("attention_decode", BACKENDS, backend, *call)
        return Explanation("attention_decode", backend, "named by the caller", config())
    if not tensors[0].is_cuda:
        against = f"needs a GPU tensor, got {tensors[0].device.type}"
    elif not tensors[0].numel():
        against = "no elements"
    else:
        against = _against_triton(call)
        if not against and not dispatch.plain(*_tensors(call)):
            against = f"a raw launch does not see through {type(tensors[0]).__name__} or an active mode"
    if against:
        return Explanation("attention_decode", "torch", "the one that is right here", "", {"triton": against})
    return Explanation("attention_decode", "triton", "reads the cache once, in place", config())
