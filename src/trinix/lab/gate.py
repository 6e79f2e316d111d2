"""Inputs of a case, and the gate that every implementation passes before a clock sees it.

Outputs and gradients are held against float64 within the budget of ``trinix.testing``. Where the float64 tensors of a whole
case would not fit the card, the case is judged slice by slice: rows of outputs and of row-wise gradients in each slice;
gradients of parameters once, against the sum of the slices' float64 gradients and PyTorch's own gradient of the whole case.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod

import torch
from torch import Tensor

from trinix import testing
from trinix.lab import attention
from trinix.lab.case import Case
from trinix.lab.peers import eager

SLICE = 1 << 26  # elements of the first input or output

CONSTANT = ("cos", "sin", "mask", "slopes", "queries", "k_cache", "v_cache")  # inputs that need no gradient
# op -> the inputs that can be cut into rows, and how many trailing dimensions a row keeps; outputs are cut likewise
ROWS: dict[str, Callable[[Case], tuple[tuple[str, ...], int]]] = {
    "activation": lambda case: (("x",), 0),
    "softmax": lambda case: (("x",), -case.args["dim"]) if "mask" not in case.shape else ((), 0),
    "layer_norm": lambda case: (("x",), 1),
    "rms_norm_activation": lambda case: (("x",), 1),
    "layer_norm_residual": lambda case: (("x", "residual"), 1),
    "glu": lambda case: (tuple(case.shape), 1),
    "alibi_bias": lambda case: (("slopes",), 0),
    "attention_decode": lambda case: (tuple(case.shape), 3) if "page" not in case.args else ((), 0),
}
ROWS |= {
    "log_softmax": ROWS["softmax"],
    "rms_norm": ROWS["layer_norm"],
    "rms_norm_residual": ROWS["layer_norm_residual"],
}


@dataclass(frozen=True)
class Inputs:
    """A case's inputs in the order of its shapes, and one incoming gradient an output."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    dys: tuple[Tensor, ...]

    def leaves(self) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """(what to call with, those of it that need a gradient), on the inputs' own memory."""
        leaves = tuple(
            t if name in CONSTANT else t.detach().requires_grad_()
            for name, t in zip(self.names, self.tensors, strict=True)
        )
        return leaves, [t for t in leaves if t.requires_grad]

    def copy(self) -> "Inputs":
        return Inputs(self.names, tuple(t.clone() for t in self.tensors), tuple(t.clone() for t in self.dys))

    def double(self) -> "Inputs":
        return Inputs(self.names, tuple(t.double() for t in self.tensors), tuple(t.double() for t in self.dys))

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors)


def inputs_of(case: Case, where: str) -> Inputs:
    """Normal numbers, the same on every run on a device; tables, masks and slopes as models have them."""
    tensors = []
    for i, (name, shape) in enumerate(case.shape.items()):
        if name in ("cos", "sin"):
            tensors.append(_table(name, shape, where))
        elif name == "mask":
            allowed = torch.ones(shape, dtype=torch.bool, device=where).tril(shape[-1] - shape[-2])
            tensors.append(torch.zeros(shape, dtype=case.dtype, device=where).masked_fill_(~allowed, float("-inf")))
        elif name == "slopes":
            steps = torch.arange(1, shape[0] + 1, dtype=torch.float32, device=where)
            tensors.append(2.0 ** (-8.0 * steps / shape[0]))
        else:
            # a projection keeps the size of what it projects, as trained ones do
            scale = shape[-1] ** -0.5 if name.endswith("_proj.weight") else 1.0
            if name in ("w1", "w2", "w_gate"):  # [heads, in, out]
                scale = shape[1] ** -0.5
            tensors.append(testing.normal(shape, case.dtype, seed=i, device=where, scale=scale))
    wanted = outputs_of(case) if set(case.shape) - set(CONSTANT) else ()
    dys = [testing.normal(s, case.dtype, seed=99 - i, device=where) for i, s in enumerate(wanted)]
    return Inputs(tuple(case.shape), tuple(tensors), tuple(dys))


def outputs_of(case: Case) -> tuple[tuple[int, ...], ...]:
    """The outputs' shapes."""
    first, *rest = case.shape.values()
    if case.op == "glu_layers":
        return ((*first[:-1], case.args.get("output_dim", case.args["hidden_dim"])),)
    if case.op in ("layer_norm_residual", "rms_norm_residual", "rope", "qk_norm_rope"):
        return first, rest[0]
    if case.op == "glu" and not rest:
        return ((*first[:-1], first[-1] // 2),)
    if case.op in ("attention", "attention_decode"):
        return ((*first[:-1], case.args.get("latent", rest[-1][-1])),)
    if case.op == "alibi_bias":
        return ((first[0], case.args["seq_q"], case.args["seq_q"]),)
    return (first,)


def least_bytes(case: Case) -> int:
    """Of a case's inputs and outputs, and of as many gradients where there are any: what its widest pass holds at once."""
    wide = ("cos", "sin", "slopes")  # float32, whatever the case's dtype
    sizes = [prod(shape) * (4 if name in wide else case.dtype.itemsize) for name, shape in case.shape.items()]
    held = sum(sizes) + sum(map(prod, outputs_of(case))) * case.dtype.itemsize
    return held if case.passes == ("fwd",) else 2 * held


def _table(name: str, shape: Sequence[int], where: str) -> Tensor:
    """cos or sin of position times frequency, [positions, half the rotary width], float32."""
    positions, half = shape
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=where) / half)
    angle = torch.arange(positions, dtype=torch.float64, device=where)[:, None] * frequency
    return getattr(angle, name)().float()


def derive(call: Callable, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs ("y", or "y1" and "y2") and gradients ("d" and the input's name) of a call."""
    leaves, wanting = inputs.leaves()
    ys = call(*leaves)
    ys = ys if isinstance(ys, tuple) else (ys,)
    found = {"y" if len(ys) == 1 else f"y{i}": y.detach() for i, y in enumerate(ys, 1)}
    if not wanting:
        return found
    if not all(y.requires_grad for y in ys):
        raise AssertionError("an output carries no gradient")
    grads = torch.autograd.grad(ys, wanting, inputs.dys)
    names = (f"d{name}" for name in inputs.names if name not in CONSTANT)
    return found | dict(zip(names, grads, strict=True))


@dataclass
class Oracle:
    """What PyTorch gives for a case, in its dtype and in float64; computed once where the whole case fits."""

    case: Case
    inputs: Inputs
    _whole: tuple[dict, dict] | None = field(default=None, init=False)
    _parameters: tuple[dict, dict] | None = field(default=None, init=False)
    _of_heads: list[tuple[Callable, dict, dict]] = field(default_factory=list, init=False)

    def judge(self, got: dict[str, Tensor]) -> Iterator[testing.Verdict]:
        shapes = dict(zip((n for n in got if n.startswith("y")), outputs_of(self.case), strict=True))
        shapes |= {f"d{n}": tuple(t.shape) for n, t in zip(self.inputs.names, self.inputs.tensors, strict=True)}
        for name, t in got.items():
            if tuple(t.shape) != shapes[name]:
                detail = f"shape {list(t.shape)}, wanted {list(shapes[name])}"
                yield testing.Verdict(name, float("inf"), 0.0, float("inf"), False, detail)
                return
        if self.case.op == "attention" and elements(self.case) > SLICE:
            yield from self._judge_heads(got)
            return
        rows, keep = ROWS[self.case.op](self.case) if self.case.op in ROWS else ((), 0)
        if not rows or elements(self.case) <= SLICE:
            yield from self._judge_whole(got)
        else:
            yield from self._judge_slices(got, rows, keep)

    def _judge_whole(self, got):
        if self._whole is None:
            call = eager.prepare(self.case)
            self._whole = derive(call, self.inputs), derive(call, self.inputs.double())
        low, true = self._whole
        for name, t in got.items():
            yield testing.judge(name, t, low[name], true[name])

    def _judge_heads(self, got):
        if not self._of_heads:  # float64 scores are large and slow, what they give is small: made once, kept
            call = eager.prepare(self.case)
            self._of_heads = [
                (cut, derive(call, part), derive(call, part.double())) for part, cut in _heads(self.case, self.inputs)
            ]
        for cut, low, true in self._of_heads:
            for name, t in true.items():
                yield testing.judge(name, cut(got[name]), low[name], t)

    def _judge_slices(self, got, rows, keep):
        call = eager.prepare(self.case)
        parameters = [f"d{n}" for n in self.inputs.names if n not in rows and f"d{n}" in got]
        sums = {}
        for part, cut in _slices(self.case, self.inputs, rows, keep):
            low, true = derive(call, part), derive(call, part.double())
            for name, t in true.items():
                if name not in parameters:
                    yield testing.judge(name, cut(got[name]).reshape(t.shape), low[name], t)
                elif self._parameters is None:
                    sums[name] = sums.get(name, 0.0) + t
        if parameters and self._parameters is None:
            whole = derive(call, self.inputs)
            self._parameters = {name: whole[name] for name in parameters}, sums
        for name in parameters:
            low, true = self._parameters
            yield testing.judge(name, got[name], low[name], true[name])


def elements(case: Case) -> int:
    """Of the first input or output, whichever is larger; of attention's scores, which the oracle holds."""
    if case.op in attention.SCORED:
        return attention.scores(case)
    if case.op == "attention_decode":  # the keys, once for every query head
        return prod(case.shape["k_cache"]) * case.shape["queries"][2] // case.shape["k_cache"][2]
    return max(prod(next(iter(case.shape.values()))), prod(outputs_of(case)[0]))


def _slices(case: Case, inputs: Inputs, rows: Sequence[str], keep: int) -> Iterator[tuple[Inputs, Callable]]:
    """(inputs of one slice, a function that cuts the same slice out of a whole output or gradient)."""
    first = inputs.tensors[0]
    count = prod(first.shape[: first.dim() - keep])
    step = max(1, SLICE // (elements(case) // count))
    for start in range(0, count, step):

        def cut(t: Tensor, start=start) -> Tensor:
            trailing = t.shape[t.dim() - keep :] if keep else (t.numel() // count,) if t.numel() > count else ()
            return t.reshape(count, *trailing)[start : start + step]

        tensors = (cut(t) if n in rows else t for n, t in zip(inputs.names, inputs.tensors, strict=True))
        yield Inputs(inputs.names, tuple(tensors), tuple(cut(dy) for dy in inputs.dys)), cut


def _heads(case: Case, inputs: Inputs) -> Iterator[tuple[Inputs, Callable]]:
    """As ``_slices``: some key heads of one sequence, with the query heads that are theirs."""
    axis = 1 if case.args.get("layout") == "BHSD" else 2
    batch, key_heads = case.shape["k"][0], case.shape["k"][axis]
    step = max(1, SLICE // (elements(case) // (batch * key_heads)))
    for b in range(batch):
        for start in range(0, key_heads, step):

            def cut(t: Tensor, b=b, start=start) -> Tensor:
                group = t.shape[axis] // key_heads
                count = min(step, key_heads - start) * group
                return t[b : b + 1].narrow(axis, start * group, count)

            yield Inputs(inputs.names, tuple(map(cut, inputs.tensors)), tuple(map(cut, inputs.dys))), cut


def gate(oracle: Oracle, call: Callable, *, overwrites: bool = False) -> tuple[str | None, float | None]:
    """(why an output or a gradient misses its budget or None, the worst error ratio if it is finite)."""
    got = derive(call, oracle.inputs.copy() if overwrites else oracle.inputs)
    worst, reason = 0.0, None
    for verdict in oracle.judge(got):
        # a wrong NaN, infinity or shape has no finite ratio: null in the result line
        worst = max(worst, verdict.ratio) if worst is not None and isfinite(verdict.ratio) else None
        reason = reason or (None if verdict.ok else f"misses its error budget: {verdict}")
    return reason, worst
