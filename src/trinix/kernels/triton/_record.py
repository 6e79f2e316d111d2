"""What a call launches, read off while it runs, as plans of ``trinix.kernels._native``.

The kernels of a pass and the memory that they write follow from how its tensors lie and from what the call names besides; so the
launches of one call are those of every call like it. A pass that does anything else, an addition by PyTorch for one, has no plan.
"""

import contextlib
import struct
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trinix.kernels import _native, _noting
from trinix.kernels.triton import _launch

_aten = torch.ops.aten
_MEMORY = {  # operators that leave their result unwritten
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
}  # fmt: skip

_FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}


class Recorder(TorchDispatchMode):
    """Notes this thread's launches while it is entered, and all else that PyTorch is asked for."""

    def __init__(self):
        super().__init__()
        self.launches = []  # (launch, key, blocks, tensors, scalars); of a ``Boxed`` no key
        self.made = []  # memory in the order in which it was asked for; kept, so that no address comes twice
        self.other = None  # what no plan has
        self.launching = False

    @contextlib.contextmanager
    def noting(self, *launch):
        """Around a launch; what Triton asks PyTorch for in it does not count."""
        self.launches.append(launch)
        self.launching = True
        try:
            yield
        finally:
            self.launching = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if self.launching:
            return out
        if function in _MEMORY:
            self.made.append(out)
        elif not function.is_view:
            self.other = str(function)
        return out


@contextlib.contextmanager
def recording():
    with Recorder() as recorder, _noting.noted_by(recorder):
        yield recorder


def layout(t: Tensor) -> tuple:
    """A tensor as a plan has it."""
    return tuple(t.shape), t.stride(), t.dtype


def _bytes(t: Tensor) -> range:
    """The addresses between a tensor's first element and its last."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return range(t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size())


class _Numbers:
    """Addresses of a pass as its plan has them: of a tensor and so many bytes behind its first."""

    def __init__(self, inputs: list[Tensor], made: list[Tensor]):
        self.known = [*inputs, *(t for t in made if t.device == inputs[0].device)]
        self.first = {t.data_ptr(): number for number, t in enumerate(self.known)}
        # two tensors at one address: another call's need not be; nor has it inputs at odd addresses
        self.ambiguous = len(self.first) < len(self.known) or any(
            not t.numel() or t.data_ptr() & 15 for t in self.known
        )
        self.inputs = len(inputs)

    def of(self, t: Tensor) -> int | tuple[int, int] | None:
        address = t.data_ptr()
        number = self.first.get(address)
        if number is not None:
            return number
        around = [number for number, one in enumerate(self.known) if address in _bytes(one)]
        return (around[0], address - self.known[around[0]].data_ptr()) if len(around) == 1 else None


def step(launch, key: tuple | None, blocks: int, tensors: tuple, scalars: tuple, parameters: tuple) -> tuple | None:
    """A launch as a plan has it, ``parameters`` being where its tensors are; None where no binary of it is kept."""
    boxes = iter(())
    if key is not None:
        compiled = launch.binaries.get(key)
    else:
        compiled = launch.binary.compiled if launch.binary.direct and not _launch._State.off else None
        boxes = zip(launch.boxes, tensors, strict=True)
    if compiled is None:
        return None
    facts, source = compiled.metadata, compiled.src
    kinds = [source.signature[p.name] for p in source.fn.params if not p.is_constexpr]
    given = []
    for kind, value in zip(kinds, (*parameters, *scalars), strict=True):
        if kind.startswith("*"):
            given.append(value)
        elif kind.startswith("tensordesc"):
            box, t = next(boxes)
            described = None if box.metadata is None else box.map_at(t.data_ptr())
            if described is None:  # Triton passes something else, or the copy engine does not read it
                return None
            given.append((value, described))
            given += [struct.pack("i", n) for n in box.shape] + [struct.pack("q", s) for s in box.strides]
        elif kind in _FORMATS:
            given.append(struct.pack(_FORMATS[kind], value))
        elif kind != "constexpr":  # an integer equal to 1 is no parameter of the binary
            return None
    # unused scratch pointers are parameters of the binary all the same
    given += [bytes(8) for name in ("global", "profile") if hasattr(facts, f"{name}_scratch_size")]
    early = bool(getattr(facts, "launch_pdl", False))
    return compiled.function, blocks, 32 * facts.num_warps, facts.shared, early, tuple(given)


def _plan(recorder: Recorder, inputs: list[Tensor], out: list[Tensor | None]) -> tuple | None:
    """((made, steps), where each of ``out`` is, -1 for None) of a pass that ran; None where it has no plan."""
    numbers = _Numbers(inputs, recorder.made)
    if recorder.other or numbers.ambiguous or not recorder.launches:
        return None
    touched, steps = set(), []
    for launch, key, blocks, tensors, scalars in recorder.launches:
        parameters = tuple([numbers.of(t) for t in tensors])
        if None in parameters or any(t.data_ptr() & 15 for t in tensors):
            return None
        touched.update(parameters)
        steps.append(step(launch, key, blocks, tensors, scalars, parameters))
    if None in steps:
        return None
    found = []
    for t in out:
        number = -1 if t is None else numbers.of(t)
        if number == -1:
            found.append(-1)
        elif (
            type(number) is int
            and layout(t) == layout(numbers.known[number])
            and (number < numbers.inputs or number in touched)
        ):
            found.append(number)
        else:  # a view, or memory that nothing wrote to
            return None
    return (tuple([layout(t) for t in numbers.known[numbers.inputs :]]), tuple(steps)), tuple(found)


class Pending:
    """A call that runs in Python once more, so that those like it are C++'s."""

    def __init__(self, inputs: tuple, add: Callable):
        self.given = [t is not None for t in inputs]
        self.inputs = [t for t in inputs if t is not None]  # until forward has run
        self.add = add  # of a pair, to the table of the op's calls
        self.forward_plan = self.recorder = None

    def alone(self, run: Callable):
        """The results, which ``run`` gives, None among them, of a call that autograd does not record."""
        out = self.forward(run)
        self.keeps(tuple([t for t in out if t is not None]) if isinstance(out, tuple) else (out,))
        return out

    def forward(self, run: Callable):
        """What ``run`` gives: the kernels' side of forward."""
        with recording() as self.recorder:
            return run()

    def keeps(self, results: tuple, saved: tuple = (), otherwise: Callable | None = None) -> None:
        """Called behind ``forward`` with the call's results and, of one that autograd records, what backward will read, None among it.

        ``otherwise(*saved, *the results' gradients)``: the inputs' gradients, for all that is not as the plan has it.
        """
        there = [t is not None for t in saved]
        saved = [t for t in saved if t is not None]
        plan, inputs = _plan(self.recorder, self.inputs, [*results, *saved]), len(self.inputs)
        if plan is not None and min(plan[1][: len(results)]) >= inputs:  # else an input is given back
            self.forward_plan, numbers = plan
            self.results, self.saved = numbers[: len(results)], numbers[len(results) :]
            self.layouts = [*map(layout, saved), *map(layout, results)]
            if otherwise is None:
                self.add(self._pair(self.inputs[0], self.forward_plan, ((), ()), (), (), None))
            else:
                self.otherwise = _without_nones(otherwise, there, self.given)
        self.inputs = self.recorder = None

    def backward(self, run: Callable, saved: tuple, gradients: tuple) -> tuple:
        """What ``run`` gives: the inputs' gradients from what was saved and the results' gradients, None for what is not wanted."""
        read = [t for t in (*saved, *gradients) if t is not None]
        # hooks on saved tensors may have given others back; and most gradients lie as the results do
        if self.forward_plan is None or [*map(layout, read)] != self.layouts:
            return run()
        with recording() as recorder:
            out = run()
        plan = _plan(recorder, read, [t for t, given in zip(out, self.given, strict=True) if given])
        forward, self.forward_plan = self.forward_plan, None  # another thread may be at the same graph
        if plan is not None and forward is not None:
            self.add(self._pair(read[0], forward, plan[0], tuple(self.layouts), plan[1], self.otherwise))
        elif forward is not None:
            self.forward_plan = forward
        return out

    def _pair(self, example, forward, backward, given, gradients, otherwise):
        # a pair has the context of its device, which need not be the current one
        with torch.cuda.device(example.device) if example.is_cuda else contextlib.nullcontext():
            return _native.module.make_pair(
                example.detach(), forward, backward, self.results, self.saved, given, gradients, otherwise
            )


def _without_nones(function: Callable, there: list[bool], given: list[bool]) -> Callable:
    """``function`` as the module calls it: Nones left out of what was saved, and of the gradients those of inputs that are None."""

    def otherwise(*tensors):
        rest = iter(tensors)
        saved = [next(rest) if one else None for one in there]
        out = function(*saved, *rest)
        return tuple(t for t, one in zip(out, given, strict=True) if one)

    return otherwise
