"""Rotary position embedding (RoFormer, arXiv:2104.09864) of q and k in one launch, its tables, and the same after an
RMSNorm of every head.

A head's first R of D channels are R/2 pairs (a, b); a token at position p turns pair i by the angle p f_i::

    a' = a cos[p, i] - b sin[p, i]        pairs are channels (i, i + R/2)      "half-split", GPT-NeoX, LLaMA
    b' = b cos[p, i] + a sin[p, i]        or channels (2i, 2i + 1)             interleaved=True, GPT-J, RoFormer

The other D - R channels pass. ``qk_norm_rope`` turns x / sqrt(mean(x^2) + eps) * (weight + weight_offset) instead of x, the
mean over a head's D channels.

Shapes: q [B, S, H, D], k [B, S, Hk, D] (Hk may differ from H), or q [T, H, D], k [T, Hk, D]: tokens without a batch.
cos, sin [P, R/2], any floating dtype (float32 is the precise one), row p of position p, from ``rope_table``. Tables [P, D]
whose halves repeat each other, as Hugging Face makes them, are taken for half-split pairs: the first half is read. Every
other width is refused. The Triton kernel copies a table whose rows are not dense in memory.

Position of token s of batch b: ``offset + s``; ``offset[b] + s`` for an int tensor [B] or of no dimensions, which stays on
the device; ``position_ids[b, s]`` ([B, S], [1, S] or [S]; [T] without a batch). With ``cu_seqlens`` [n + 1] (0 first, T last,
never falling) q is [T, H, D] and every sequence counts from ``offset``. A position outside the table is a ValueError where the
host can see it: of an int offset always, of tensors in an eager call of the PyTorch formula on a CPU. Nobody waits for a device to look
at them there: kernel and formula read nothing outside and make the rotated channels NaN (with a norm all channels of the
head's gradient, and the weight's gradient).

q and k: float16, bfloat16, float32 (float64 through the PyTorch formula), any strides; both of one dtype. Arithmetic is
float32, float64 for float64. Results are dense, with the strides of ``torch.empty_like(q)`` (contiguous from the PyTorch
formula). ``inplace=True`` overwrites q and k, and returns them; it needs a call without gradient.

Backward of ``rope`` turns the incoming gradient back; it saves cos, sin and the positions, nothing of q and k. Backward of
``qk_norm_rope`` saves q, k and the weights, takes 1 / rms again, and adds the weights' gradients up in float32 in a fixed order.
cos and sin get no gradient from Triton; under "auto" a call that wants one takes the PyTorch formula. Second derivatives go
through the formula. Under ``torch.compile`` "auto" hands the compiler the plain formula.
"""

import functools
import inspect
import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trinix import dispatch
from trinix.dispatch import Explanation
from trinix.kernels import _native
from trinix.kernels.torch import rope as reference

_triton_module = None  # kept by hand: torch.compile traces through functools.cache, and says so


def _triton():
    global _triton_module
    if _triton_module is None:
        from trinix.kernels.triton import rope

        _triton_module = rope
    return _triton_module


def _torch():
    return reference


BACKENDS = {"triton": _triton, "torch": _torch}
INTEGERS = (torch.int64, torch.int32)
SCALINGS = {  # type -> (keys that must be there, keys that may be)
    "default": ((), ()),
    "linear": (("factor",), ()),
    "ntk": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
}


def rope(
    q: Tensor,
    k: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotate q, and k with it; differentiable in both.

    Args:
        q, k: ``[B, S, H, D]`` and ``[B, S, Hk, D]``, or ``[T, H, D]`` and ``[T, Hk, D]``; k may be None.
        cos, sin: ``[P, R/2]`` as ``rope_table`` makes them; see the top of this file.
        interleaved: pairs are channels (2i, 2i + 1), not (i, i + R/2).
        position_ids, offset, cu_seqlens: where the tokens are; see the top of this file.
        inplace: overwrite q and k; only where no gradient is recorded.
        backend: "auto", "triton" or "torch". A named backend never falls back.

    Returns:
        q' of q's shape and dtype, or (q', k').

    Raises:
        TypeError, ValueError: arguments that do not fit; the message says which and what to do.
        Unsupported: the named backend cannot run this call.

    >>> cos, sin = trinix.ops.rope_table(16, 4)
    >>> q = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    >>> [round(v, 4) for v in trinix.ops.rope(q, cos=cos, sin=sin, offset=3).flatten().tolist()]
    [-0.99, 0.0, 0.1411, 0.0]
    """
    named = None if inplace is not False else _named(offset, backend, "rope", interleaved)
    tensors = q, k, cos, sin, position_ids, offset if isinstance(offset, Tensor) else None, cu_seqlens
    table = None if named is None else _plans.of.get(named)
    if table is not None:
        results = _triton_module.by_table(table, *tensors)
        if results is not None:
            return results
    half = _check("rope", q, k, cos, sin, interleaved, inplace)
    places, mode, first = _positions("rope", q, cos, position_ids, offset, cu_seqlens)
    grad = torch.is_grad_enabled() and (
        q.requires_grad or (k is not None and k.requires_grad) or cos.requires_grad or sin.requires_grad
    )
    if inplace:
        _check_inplace(q, k, grad)
    call = places, mode, first, half, interleaved
    module, raw = _choose("rope", backend, (q, k, cos, sin), places)
    if module is reference:
        _check_places("rope", q, cos, places, mode, first)
        results = _formula(q, k, cos, sin, *call)
    elif not raw:
        results = _registered(q, k, cos, sin, call, grad)
    elif inplace:
        module.rotate(q, k, cos, sin, *call, inplace=True)
        # autograd's checks do not see a raw launch
        torch.autograd.graph.increment_version([t for t in (q, k) if t is not None and not t.is_inference()])
        return q if k is None else (q, k)
    else:
        pending = None if named is None else _plans.begin(named, *tensors)
        if grad:
            results = _apply_rope(q, k, cos, sin, *call, pending)
        else:
            run = functools.partial(module.rotate, q, k, cos, sin, *call)
            results = run() if pending is None else pending.alone(run)
    if inplace:
        results = [t if t is None else t.copy_(y) for t, y in zip((q, k), results, strict=True)]
    return results[0] if k is None else tuple(results)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RMSNorm over every head of q and k, then ``rope``, in one launch; differentiable in q, k and the weights.

    Args:
        q, k, cos, sin, interleaved, position_ids, offset, cu_seqlens, backend: as in ``rope``.
        q_weight, k_weight: ``[D]``, any floating dtype; not contiguous, they are copied.
        eps: added to the mean of squares.
        weight_offset: added to the weights, 1.0 for Gemma's.

    Returns:
        (q', k') of the shapes and dtype of q and k.

    Raises:
        As ``rope``.

    >>> q = k = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    >>> cos, sin = trinix.ops.rope_table(1, 2)
    >>> [round(v, 4) for v in trinix.ops.qk_norm_rope(q, k, torch.ones(2), torch.ones(2), cos, sin)[0].flatten().tolist()]
    [0.8485, 1.1314]
    """
    named = None
    if type(eps) is float and type(weight_offset) is float:
        named = _named(offset, backend, "qk_norm_rope", interleaved, eps, weight_offset)
    tensors = (
        q,
        k,
        q_weight,
        k_weight,
        cos,
        sin,
        position_ids,
        offset if isinstance(offset, Tensor) else None,
        cu_seqlens,
    )
    table = None if named is None else _plans.of.get(named)
    if table is not None:
        results = _triton_module.by_table(table, *tensors)
        if results is not None:
            return results
    half = _check("qk_norm_rope", q, k, cos, sin, interleaved)
    _check_weights(q, k, q_weight, k_weight)
    places, mode, first = _positions("qk_norm_rope", q, cos, position_ids, offset, cu_seqlens)
    inputs = q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    eps = dispatch.number("qk_norm_rope", "eps", eps)
    weight_offset = dispatch.number("qk_norm_rope", "weight_offset", weight_offset)
    call = places, mode, first, half, interleaved, eps, weight_offset
    module, raw = _choose("qk_norm_rope", backend, inputs, places)
    if module is reference:
        _check_places("qk_norm_rope", q, cos, places, mode, first)
        return _norm_formula(*inputs, *call)
    if not raw:
        return _RegisteredQkNormRope.apply(*inputs, *call) if _recorded(grad) else _norm_op(*inputs, *call)
    pending = None if named is None else _plans.begin(named, *tensors)
    if grad:
        return _apply_norm_rope(*inputs, *call, pending)
    run = functools.partial(module.norm_rotate, *inputs, *call)
    return run() if pending is None else pending.alone(run)


_plans = _native.Plans()


def _named(offset, backend, *names) -> tuple | None:
    """What a call names besides tensors, where C++ may have plans of it: an offset that is a number changes from call to call."""
    if (
        torch.compiler.is_compiling()
        or type(backend) is not str
        or not (isinstance(offset, Tensor) or (type(offset) is int and offset == 0))
    ):
        return None
    interleaved = names[1]
    return (*names, backend, dispatch.forced) if interleaved is True or interleaved is False else None


def rope_table(
    positions: int | Tensor,
    rotary_dim: int,
    *,
    base: float = 10000.0,
    scaling: dict | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos, sin), float32 ``[P, rotary_dim / 2]``, of the angles position * base^(-2i / rotary_dim), taken in float64.

    Args:
        positions: P for the positions 0 .. P - 1, or a tensor ``[P]`` of positions, fractions too.
        rotary_dim: R, even: how many channels of a head are rotated.
        base: theta.
        scaling: None, or a dict as the ``rope_scaling`` of a Hugging Face configuration: "rope_type" (or "type") and the keys
            of ``SCALINGS``; a "rope_theta", which newer ones have among them, must be ``base``. "linear": every frequency
            over the factor. "ntk": base * factor^(R / (R - 2)). "yarn" (arXiv:2309.00071): slow pairs interpolated, fast ones
            kept, cos and sin times the attention factor, 0.1 ln(factor) + 1 unless given. "llama3": pairs of less than
            low_freq_factor turns over the original context interpolated, of more than high_freq_factor kept, a ramp between.
        device: where; a tensor's own, or PyTorch's default.

    Raises:
        TypeError, ValueError: a rotary_dim that is odd or below 2, an unknown scaling, a key too many or too few.

    >>> cos, sin = trinix.ops.rope_table(2048, 64, scaling={"type": "linear", "factor": 4.0})
    >>> cos.shape, cos.dtype
    (torch.Size([2048, 32]), torch.float32)
    """
    if type(rotary_dim) is not int or rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rope_table: rotary_dim must be an even int from 2 on, got {rotary_dim!r}")
    base = dispatch.number("rope_table", "base", base)
    scaling = _check_scaling(scaling, base)
    if not 0 < base < math.inf:
        raise ValueError(f"rope_table: base must be positive, got {base}")
    if isinstance(positions, Tensor):
        if positions.ndim != 1:
            raise ValueError(f"rope_table: positions must be an int or [P], got {list(positions.shape)}; flatten them")
        places = positions.to(device or positions.device, torch.float64)
    elif isinstance(positions, (int, torch.SymInt)) and positions >= 0:
        places = torch.arange(positions, dtype=torch.float64, device=device)
    else:
        raise TypeError(f"rope_table: positions must be an int from 0 on or a tensor [P], got {positions!r}")
    try:
        frequency, factor = reference.inverse_frequencies(rotary_dim, base, scaling, places.device)
    except (OverflowError, ZeroDivisionError):
        raise ValueError(
            f"rope_table: base {base} with scaling {scaling} gives no frequencies that float64 holds"
        ) from None
    angle = places[:, None] * frequency
    return (angle.cos() * factor).float(), (angle.sin() * factor).float()


def _check_scaling(scaling: dict | None, base: float) -> dict | None:
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise TypeError(f"rope_table: scaling must be None or a dict with a 'type', got {type(scaling).__name__}")
    rest = dict(scaling)
    kinds = [rest.pop(key) for key in ("rope_type", "type") if key in rest]
    kind = kinds[0] if kinds and kinds[0] == kinds[-1] else None
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(f"rope_table: scaling's 'type' must be one of {list(SCALINGS)}, got {scaling!r}")
    theta = rest.pop("rope_theta", None)
    if theta is not None and dispatch.number("rope_table", "scaling's rope_theta", theta) != base:
        raise ValueError(
            f"rope_table: scaling's rope_theta must be the base, got {theta} and base {base}; give base (a layer's rope_base) {theta}"
        )
    needed, possible = SCALINGS[kind]
    missing, unknown = set(needed) - set(rest), set(rest) - {*needed, *possible}
    if missing or unknown:
        wanted = f"needs {list(needed)}" + (f" and takes {list(possible)}" if possible else "")
        raise ValueError(f"rope_table: scaling {kind!r} {wanted}, got {sorted(rest)}")
    for key, value in rest.items():
        scale = key in ("mscale", "mscale_all_dim")
        if key == "truncate" and not isinstance(value, bool):
            raise TypeError(f"rope_table: scaling's truncate must be True or False, got {value!r}")
        if key == "truncate" or (value is None and (scale or key == "attention_factor")):
            continue
        rest[key] = dispatch.number("rope_table", f"scaling's {key}", value)
        if not 0 < rest[key] < math.inf and not (scale and rest[key] == 0):
            raise ValueError(f"rope_table: scaling's {key} must be positive, got {value!r}")
    if kind == "llama3" and rest["low_freq_factor"] >= rest["high_freq_factor"]:
        raise ValueError(
            f"rope_table: scaling's low_freq_factor must be below its high_freq_factor, got {rest['low_freq_factor']} "
            f"and {rest['high_freq_factor']}"
        )
    return {"type": kind, **rest}


# ---- checks: cheap tests first, few calls; a decoding step is bound by the host --------------------------------------


def _check(op, q, k, cos, sin, interleaved, inplace=False) -> int:
    """R / 2."""
    if type(interleaved) is not bool or type(inplace) is not bool:
        dispatch.flags(op, interleaved=interleaved, inplace=inplace)
    if not isinstance(q, Tensor) or not q.is_floating_point():
        _refuse_type(op, "q", q)
    shape = q.shape
    if len(shape) not in (3, 4):
        raise ValueError(f"{op}: q must be [B, S, H, D] or [T, H, D], got {list(shape)}; add the missing dimension")
    if not isinstance(cos, Tensor) or not isinstance(sin, Tensor):
        got = f"{type(cos).__name__} and {type(sin).__name__}"
        raise TypeError(
            f"{op}: cos and sin must be tensors, got {got}; trinix.ops.rope_table(length, rotary_dim) makes them"
        )
    if not cos.is_floating_point() or not sin.is_floating_point():
        _refuse_type(op, "cos and sin", cos if sin.is_floating_point() else sin)
    device = q.device
    if k is not None:
        if not isinstance(k, Tensor) or not k.is_floating_point():
            _refuse_type(op, "k", k)
        if k.dtype != q.dtype:
            raise TypeError(f"{op}: k must have q's dtype {q.dtype}, got {k.dtype}; convert it with k.to(q.dtype)")
        if k.ndim != len(shape) or k.shape[:-2] != shape[:-2] or k.shape[-1] != shape[-1]:
            wanted = str([*shape[:-2], "Hk", shape[-1]]).replace("'", "")
            raise ValueError(
                f"{op}: k must be {wanted} for q {list(shape)}, got {list(k.shape)}; only the heads may differ"
            )
        if k.device != device:
            _refuse_device(op, "k", k, device)
    if cos.device != device or sin.device != device:
        _refuse_device(op, "cos and sin", sin if cos.device == device else cos, device)
    table, width = cos.shape, shape[-1]
    if len(table) != 2 or sin.shape != table:
        raise ValueError(
            f"{op}: cos and sin must both be [P, R/2], got {list(table)} and {list(sin.shape)}; a table has no batch, and "
            "position_ids says which rows to take"
        )
    half = table[1]
    if half == width and width % 2 == 0 and not interleaved:
        half //= 2  # both halves of Hugging Face's table say the same
    if not 0 < 2 * half <= width:
        repeated = "" if interleaved else f" or, with repeated halves, {width}"
        raise ValueError(
            f"{op}: cos and sin must have R/2 columns, 1 to {width // 2} for heads of {width} channels{repeated}, got {half}; "
            "pass one half of a repeated table, cos[:, : R // 2]"
        )
    if not table[0] and shape[-3]:  # kernels read row 0 for a position outside
        raise ValueError(
            f"{op}: cos and sin must have a row for every position, got none; make them with "
            f"trinix.ops.rope_table({shape[-3]}, rotary_dim)"
        )
    return half


def _refuse_type(op, name, got):
    kind = str(got.dtype) if isinstance(got, Tensor) else type(got).__name__
    raise TypeError(f"{op}: {name} must be floating-point, got {kind}; convert it with .float()")


def _refuse_device(op, name, got, device):
    raise ValueError(f"{op}: {name} must be where q is, on {device}, got {got.device}; move it with .to(q.device)")


def _check_weights(q, k, q_weight, k_weight):
    if k is None:
        raise TypeError("qk_norm_rope: k must be a tensor, got None; for q alone use a norm and trinix.ops.rope")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            _refuse_type("qk_norm_rope", name, weight)
        if weight.shape != q.shape[-1:]:
            raise ValueError(
                f"qk_norm_rope: {name} must be [{q.shape[-1]}], a head's channels, got {list(weight.shape)}"
            )
        if weight.device != q.device:
            _refuse_device("qk_norm_rope", name, weight, q.device)


def _check_inplace(q, k, grad):
    if grad:
        raise ValueError(
            "rope: inplace=True needs a call without gradient, and an input requires one; leave inplace out, or call it "
            "under torch.no_grad()"
        )
    for name, t in (("q", q), ("k", k)):
        if t is not None and not t.is_contiguous() and _laps(t):
            raise ValueError(
                f"rope: inplace=True needs a {name} without expanded dimensions or others that share memory, got strides "
                f"{list(t.stride())}; call {name}.contiguous() first"
            )
    if (
        k is not None and not torch.compiler.is_compiling() and _overlap(q, k)
    ):  # a compiler sees to views of one another itself
        raise ValueError(
            "rope: inplace=True needs q and k that share no memory, got views of one another; pass k.clone()"
        )


def _laps(t: Tensor) -> bool:
    """Whether an element of t may be another one too: a step of a dimension is no longer than what the smaller ones reach."""
    dims = [(n, s) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1]
    return any(s <= sum((m - 1) * r for m, r in dims if r <= s) - (n - 1) * s for n, s in dims)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether an element of one is an element of the other, neither having expanded dimensions. Of tensors with other strides and
    memory between each other's: True."""
    if not a.numel() or not b.numel() or not torch._C._is_alias_of(a, b):
        return False
    ends = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in (a, b)]
    distance = b.storage_offset() - a.storage_offset()
    if distance > ends[0] or -distance > ends[1]:
        return False
    if a.dtype != b.dtype or any(
        s != r and n * m > 1 for n, m, s, r in zip(a.shape, b.shape, a.stride(), b.stride(), strict=True)
    ):
        return True
    steps = [(s, n - 1, m - 1) for n, m, s in zip(a.shape, b.shape, a.stride(), strict=True) if n > 1 or m > 1]
    return _reaches(distance, sorted(steps, reverse=True))


def _reaches(distance: int, steps: list) -> bool:
    """Whether ``distance`` is a sum of strides, each taken at most so many times forward (in a) and backward (in b)."""
    if not steps:
        return distance == 0
    (stride, forward, backward), *rest = steps
    most = sum(s * f for s, f, _ in rest)
    least = -sum(s * b for s, _, b in rest)
    first = max(-backward, -((most - distance) // stride))
    last = min(forward, (distance - least) // stride)
    return any(_reaches(distance - n * stride, rest) for n in range(first, last + 1))


def _positions(op, q, cos, position_ids, offset, cu_seqlens) -> tuple[Tensor | None, str, int]:
    """(places, mode, first) as the kernels take them."""
    shape = q.shape
    if position_ids is None and cu_seqlens is None:
        if isinstance(offset, Tensor):
            batch = shape[0] if len(shape) == 4 else 1
            _check_integers(op, "offset", offset, q)
            if offset.ndim > 1 or (offset.ndim == 1 and offset.shape[0] != batch):
                raise ValueError(f"{op}: offset must be an int, [{batch}] or [], got {list(offset.shape)}")
            return (offset if offset.ndim else offset.expand(batch)), "offsets", 0
        _check_offset(op, offset)
        if offset + shape[-3] > cos.shape[0]:
            end = offset + shape[-3]
            raise ValueError(
                f"{op}: offset + S must be within the table's {cos.shape[0]} rows, got {offset} + {shape[-3]}; make a longer "
                f"one with trinix.ops.rope_table({end}, rotary_dim)"
            )
        return None, "offset", offset
    if position_ids is not None:
        if cu_seqlens is not None or isinstance(offset, Tensor) or offset != 0:
            raise ValueError(
                f"{op}: position_ids say everything; leave offset and cu_seqlens out, or add them to the ids"
            )
        _check_integers(op, "position_ids", position_ids, q)
        fits = ((shape[-3],),) if len(shape) == 3 else ((shape[0], shape[1]), (1, shape[1]), (shape[1],))
        if tuple(position_ids.shape) not in fits:
            wanted = " or ".join(str(list(f)) for f in dict.fromkeys(fits))
            raise ValueError(f"{op}: position_ids must be {wanted} for q {list(shape)}, got {list(position_ids.shape)}")
        return position_ids, "ids", 0
    _check_integers(op, "cu_seqlens", cu_seqlens, q)
    _check_offset(op, offset)
    if len(shape) != 3 or cu_seqlens.ndim != 1 or not cu_seqlens.shape[0]:
        got = f"q {list(shape)} and cu_seqlens {list(cu_seqlens.shape)}"
        raise ValueError(f"{op}: cu_seqlens must be [n + 1] and q [T, H, D] with it, got {got}; flatten the batch")
    return cu_seqlens.contiguous(), "sequences", offset


def _check_places(op, q, cos, places, mode, first):
    """Positions that are known without waiting for a device."""
    if places is None or torch.compiler.is_compiling():
        return
    name = {"ids": "position_ids", "offsets": "offset", "sequences": "cu_seqlens"}[mode]
    rows, least, most = cos.shape[0], 0, 0
    if dispatch.readable(places) and places.numel() and q.shape[-3]:
        if mode == "sequences" and (int(places[0]) or int(places[-1]) != q.shape[-3]):
            raise ValueError(
                f"{op}: cu_seqlens must begin with 0 and end with the {q.shape[-3]} tokens of q, got {int(places[0])} and "
                f"{int(places[-1])}"
            )
        least, most = map(int, reference.positions(q.shape, places, mode, first).aminmax())
    elif not (q.numel() and places.numel()):
        return
    if least < 0:
        raise ValueError(
            f"{op}: {name} must not name positions below 0, got {least}; position 0 is the table's first row"
        )
    if most >= rows:
        raise ValueError(
            f"{op}: {name} must name positions within the table's {rows} rows, got {most}; make a longer one with "
            f"trinix.ops.rope_table({most + 1}, rotary_dim), or call grow({most + 1}) of the module that holds it"
        )


def _check_offset(op, offset):
    if not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(
            f"{op}: offset must be an int (with cu_seqlens nothing else), an int tensor [B] or [], "
            f"got {type(offset).__name__}; convert it with int(), or pass position_ids"
        )
    if offset < 0:
        raise ValueError(f"{op}: offset must not be negative, got {offset}; position 0 is the table's first row")


def _check_integers(op, name, t, q):
    if not isinstance(t, Tensor) or t.dtype not in INTEGERS:
        got = str(t.dtype) if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{op}: {name} must be an int64 or int32 tensor, got {got}; convert it with .long()")
    if t.device != q.device:
        _refuse_device(op, name, t, q.device)


# ---- the choice ------------------------------------------------------------------------------------------------------


def _choose(op, backend, tensors, places):
    """(module, whether its kernels may be launched directly)."""
    compiling = torch.compiler.is_compiling()
    if backend != "auto" or dispatch.forced is not None:
        module = dispatch.load_named(op, BACKENDS, dispatch.resolve(backend), *tensors)
        if module is reference or compiling:
            return module, module is reference
        return module, dispatch.plain(*[t for t in (*tensors, places) if t is not None])
    if compiling or not tensors[0].is_cuda:
        return reference, True
    if not dispatch.plain(*[t for t in (*tensors, places) if t is not None]) or _against_triton(*tensors):
        return reference, True
    return _triton(), True


def triton_can_run(q: Tensor, k: Tensor | None, *others: Tensor) -> bool:
    """Whether ``backend="triton"`` takes these; ``others``: the weights if there are any, cos, sin."""
    return _against_triton(q, k, *others) is None


def _against_triton(*tensors) -> str | None:
    return _triton_missing() or _triton().unsupported(*tensors)


@functools.cache
def _triton_missing() -> str | None:
    return dispatch.missing(_triton)


def _recorded(grad: bool) -> bool:
    """In forward-mode differentiation the Function refuses, where the bare operator would lose the tangent."""
    return grad or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)


# ---- rope ------------------------------------------------------------------------------------------------------------


def _formula(q, k, cos, sin, places, mode, first, half, interleaved, inverse=False):
    given = q if q is not None else k
    table = reference.gather(cos, sin, given.shape, places, mode, first, half)
    return tuple(t if t is None else reference.rotate(t, *table, interleaved, inverse) for t in (q, k))


class _Rope(torch.autograd.Function):
    """The Triton kernel under autograd: backward is the same kernel with the opposite angle."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, *call):
        *call, pending = call
        run = functools.partial(_triton().rotate, q, k, cos, sin, *call)
        yq, yk = run() if pending is None else pending.forward(run)
        saved = cos, sin, call[0]
        ctx.save_for_backward(*saved)
        ctx.call = ctx.needs_input_grad[:2], (yq.stride(), None if k is None else yk.stride()), *call[1:]
        ctx.pending = pending
        ctx.set_materialize_grads(False)
        if pending is not None:
            pending.keeps((yq,) if k is None else (yq, yk), saved, functools.partial(_turn_back, *ctx.call))
        return yq, yk

    @staticmethod
    def backward(ctx, gq, gk):
        return *_turn_back(*ctx.call, *ctx.saved_tensors, gq, gk, pending=ctx.pending), None, None, None


def _turn_back(
    needed, layouts, mode, first, half, interleaved, cos, sin, places, gq, gk=None, *, pending=None
) -> tuple:
    """The gradients of (q, k, cos, sin, positions in three forms)."""
    places = _in_a_row(places)
    gradients = [g if n else None for g, n in zip((gq, gk), needed, strict=True)]
    given = [g for g in gradients if g is not None]
    call, none = (cos, sin, places, mode, first, half, interleaved), (None,) * 5
    if not given:
        return None, None, *none
    if not dispatch.pulled_back_plainly(*given):
        return *_formula(*gradients, *call, inverse=True), *none
    layouts = [layout for g, layout in zip(gradients, layouts, strict=True) if g is not None]

    def run():
        results = iter(
            _triton().rotate(*given, *[None] * (2 - len(given)), *call, inverse=True, layouts=(*layouts, None))
        )
        return *[None if g is None else next(results) for g in gradients], *none

    return run() if pending is None else pending.backward(run, (cos, sin, places), (gq, gk))


_apply_rope = dispatch.apply_of(_Rope)


def _in_a_row(t: Tensor | None) -> Tensor | None:
    """Edges of sequences and weights as kernels read them, whatever hooks on saved tensors gave back."""
    return t.contiguous() if t is not None and t.ndim == 1 else t


# The same kernels as registered operators, for calls that a raw launch must not see: torch.compile, fake tensors, dispatch
# modes, subclasses.


def _run(q, k, cos, sin, places, mode, first, half, interleaved, inverse):
    results = _triton().rotate(q, k, cos, sin, places, mode, first, half, interleaved, inverse)
    return [t for t in results if t is not None]


_rope_op = dispatch.register(
    "rope(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? places, str mode, SymInt first, int half, bool interleaved, "
    "bool inverse) -> Tensor[]",
    _run,
    lambda q, k, *call: [torch.empty_like(t) for t in (q, k) if t is not None],
)


def _registered(q, k, cos, sin, call, grad):
    if _recorded(grad):
        results = _RegisteredRope.apply(q, k, cos, sin, *call)
    else:
        results = _rope_op(q, k, cos, sin, *call, False)
    return results[0], None if k is None else results[1]


class _RegisteredRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, *call):
        ctx.save_for_backward(cos, sin, call[0])
        ctx.call = call[1:]
        return tuple(_rope_op(q, k, cos, sin, *call, False))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gq, gk=None):
        cos, sin, places = ctx.saved_tensors
        results = _rope_op(gq, gk, cos, sin, _in_a_row(places), *ctx.call, True)
        return (results[0], None if gk is None else results[1], *(None,) * 7)


# ---- norm and rope ----------------------------------------------------------------------------------------------------


def _norm_formula(q, k, q_weight, k_weight, cos, sin, places, mode, first, half, interleaved, eps, weight_offset):
    table = reference.gather(cos, sin, q.shape, places, mode, first, half)
    return tuple(
        reference.rotate(reference.normed(t, weight, eps, weight_offset), *table, interleaved).to(t.dtype)
        for t, weight in ((q, q_weight), (k, k_weight))
    )


class _QkNormRope(torch.autograd.Function):
    """The Triton kernels under autograd."""

    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, *call):
        *call, pending = call
        run = functools.partial(_triton().norm_rotate, q, k, q_weight, k_weight, cos, sin, *call)
        results = run() if pending is None else pending.forward(run)
        saved = q, k, q_weight, k_weight, cos, sin, call[0]
        ctx.save_for_backward(*saved)
        ctx.call = ctx.needs_input_grad[:4], tuple([t.stride() for t in results]), call[1:]
        ctx.pending = pending
        if pending is not None:
            pending.keeps(results, saved, functools.partial(_norm_turn_back, *ctx.call))
        return results

    @staticmethod
    def backward(ctx, gq, gk):
        return *_norm_turn_back(*ctx.call, *ctx.saved_tensors, gq, gk, pending=ctx.pending), *(None,) * 5


def _norm_turn_back(
    needed, layouts, call, q, k, q_weight, k_weight, cos, sin, places, gq, gk, *, pending=None
) -> tuple:
    """The gradients of (q, k, q_weight, k_weight, cos, sin, positions in three forms)."""
    saved = q, k, q_weight, k_weight, cos, sin, places
    gq, gk = (torch.zeros_like(t) if g is None else g for t, g in ((q, gq), (k, gk)))
    inputs, places = [q, k, _in_a_row(q_weight), _in_a_row(k_weight)], _in_a_row(places)
    none = (None,) * 5
    if dispatch.pulled_back_plainly(gq, gk):

        def run():
            gradients = _triton().norm_rotate_backward(
                q, k, gq, gk, *inputs[2:], cos, sin, places, *call,
                dx=needed[0] or needed[1], dw=needed[2] or needed[3], layouts=layouts,
            )  # fmt: skip
            return *[g if n else None for g, n in zip(gradients, needed, strict=True)], *none

        return run() if pending is None else pending.backward(run, saved, (gq, gk))
    again = torch.is_grad_enabled()  # create_graph=True
    with torch.enable_grad():
        # aliases: two of the inputs may be one tensor, or one be computed from another
        inputs = [t.view_as(t) if again else t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
        results = _norm_formula(*inputs, cos, sin, places, *call)
    wanted = [t for t, n in zip(inputs, needed, strict=True) if n]
    # a side that no wanted input feeds has no graph
    pairs = [(y, g) for y, g in zip(results, (gq, gk), strict=True) if y.requires_grad]
    outputs, incoming = zip(*pairs, strict=True)
    gradients = iter(torch.autograd.grad(outputs, wanted, incoming, create_graph=again))
    return *[next(gradients) if n else None for n in needed], *none


_apply_norm_rope = dispatch.apply_of(_QkNormRope)
_NORM_ARGUMENTS = (
    "Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor? places, str mode, SymInt first, int half, "
    "bool interleaved, float eps, float weight_offset"
)
_norm_op = dispatch.register(
    f"qk_norm_rope(Tensor q, Tensor k, {_NORM_ARGUMENTS}) -> (Tensor, Tensor)",
    lambda *call: _triton().norm_rotate(*call),
    lambda q, k, *call: (torch.empty_like(q), torch.empty_like(k)),
)
_norm_backward_op = dispatch.register(
    f"qk_norm_rope_backward(Tensor q, Tensor k, Tensor gq, Tensor gk, {_NORM_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda *call: _triton().norm_rotate_backward(*call),
    lambda q, k, gq, gk, qw, kw, *call: tuple([torch.empty_like(t) for t in (gq, gk, qw, kw)]),
)


class _RegisteredQkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, *call):
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, call[0])
        ctx.call = call[1:]
        return _norm_op(q, k, q_weight, k_weight, cos, sin, *call)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gq, gk):
        q, k, *others = ctx.saved_tensors
        return (*_norm_backward_op(q, k, gq, gk, *map(_in_a_row, others), *ctx.call), *(None,) * 9)


def explain(op, *args, **kwargs) -> Explanation:
    """Which backend ``op(*args, **kwargs)`` would run on, why, and with which configuration; runs nothing."""
    call = inspect.signature(op).bind(*args, **kwargs)
    call.apply_defaults()
    given, name = call.arguments, op.__name__
    q, k = given["q"], given["k"]
    half = _check(name, q, k, given["cos"], given["sin"], given["interleaved"], given.get("inplace", False))
    places, _, _ = _positions(name, q, given["cos"], given["position_ids"], given["offset"], given["cu_seqlens"])
    weights = [given[w] for w in ("q_weight", "k_weight") if w in given]
    if weights:
        _check_weights(q, k, *weights)
        for argument in ("eps", "weight_offset"):
            dispatch.number(name, argument, given[argument])
    tensors = (q, k, *weights, given["cos"], given["sin"])
    backend = dispatch.resolve(given["backend"])
    if backend != "auto":
        module = dispatch.load_named(name, BACKENDS, backend, *tensors)
        config = "" if module is reference else module.describe(q, k, half)
        return Explanation(name, backend, "named by the caller", config)
    if not q.is_cuda:
        against = f"needs a GPU tensor, got {q.device.type}"
    else:
        against = _against_triton(*tensors)
        if not against and not dispatch.plain(*[t for t in (*tensors, places) if t is not None]):
            against = "a raw launch does not see through a tensor subclass or an active mode"
    if against:
        return Explanation(
            name, "torch", "the first backend that is right and fastest here", rejected={"triton": against}
        )
    return Explanation(
        name, "triton", "PyTorch has no kernel for it, only a chain of them", _triton().describe(q, k, half)
    )
