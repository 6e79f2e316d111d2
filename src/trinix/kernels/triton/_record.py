"""What a call launches, read off while it runs, as plans of ``trinix.kernels._native``.

The kernels of a pass and the memory that they write follow from how its tensors lie and from what the call names besides; so the
launches of one call are those of every call like it. A pass that does anything else, an addition by PyTorch for one, has no plan.
"""

import contextlib
import itertools
import struct
from collections.abc import Callable
from typing import NamedTuple

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


class Launched(NamedTuple):
    """A call of a ``_launch.Launch``, and the key of its binary."""

    launch: object
    key: tuple
    blocks: int
    tensors: tuple
    scalars: tuple


class Recorder(TorchDispatchMode):
    """Notes this thread's launches while it is entered, and all else that PyTorch is asked for."""

    def __init__(self):
        super().__init__()
        self.launches = []  # of Launched, or ``trinix.kernels._binary.Noted``
        self.fixed = {}  # address of memory that is not the call's -> whether it is the default stream's
        self.made = []  # memory in the order in which it was asked for; kept, so that no address comes twice
        self.other = None  # what no plan has
        self.launching = False

    @contextlib.contextmanager
    def noting(self, *launch):
        """Around a launch; what Triton asks PyTorch for in it does not count."""
        self.launches.append(Launched(*launch))
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


class _Places:
    """Addresses of a pass as its plan has them: of a tensor and so many bytes behind its first."""

    def __init__(self, inputs: list[Tensor], made: list[Tensor], fixed: dict):
        self.known = [*inputs, *(t for t in made if t.device == inputs[0].device)]
        self.first = {t.data_ptr(): number for number, t in enumerate(self.known)}
        # two tensors at one address: another call's need not be; nor has it inputs at odd addresses
        self.ambiguous = len(self.first) < len(self.known) or any(
            not t.numel() or t.data_ptr() & 15 for t in self.known
        )
        self.inputs, self.fixed = len(inputs), fixed

    def of(self, address: int) -> int | tuple[int, int] | bytes | None:
        number = self.first.get(address)
        if number is not None:
            return number
        if address in self.fixed:
            return struct.pack("Q", address)
        around = [number for number, one in enumerate(self.known) if address in _bytes(one)]
        return (around[0], address - self.known[around[0]].data_ptr()) if len(around) == 1 else None


def step(launch, key: tuple, blocks: int, tensors: tuple, scalars: tuple, places: tuple) -> tuple | None:
    """A launch as a plan has it, ``places`` being where its tensors are; None where no binary of it is kept."""
    compiled = launch.binaries.get(key)
    return None if compiled is None else _step(compiled, (blocks, 1, 1), (*places, *scalars))


def step_of_binary(noted, places: list) -> tuple | None:
    """The same of a ``trinix.kernels._binary.Noted``."""
    if not noted.binary.direct or _launch._State.off:
        return None
    given, places = [], iter(places)
    for argument, is_tensor in zip(noted.arguments, noted.binary.are_tensors, strict=True):
        place = next(places) if is_tensor else argument
        if isinstance(argument, tuple):
            box, address = argument
            described = None if box.metadata is None else box.map_at(address)
            if described is None:  # Triton passes something else, or the copy engine does not read it
                return None
            place = place, described, box
        given.append(place)
    return _step(noted.binary.compiled, noted.grid, given)


def _step(compiled, grid: tuple, arguments) -> tuple | None:
    facts, source = compiled.metadata, compiled.src
    kinds = [source.signature[p.name] for p in source.fn.params if not p.is_constexpr]
    given = []
    for kind, value in zip(kinds, arguments, strict=True):
        if kind.startswith("*"):
            given.append(value)
        elif kind.startswith("tensordesc"):
            place, described, box = value
            given.append((place, described))
            given += [struct.pack("i", n) for n in box.shape] + [struct.pack("q", s) for s in box.strides]
        elif kind in _FORMATS:
            given.append(struct.pack(_FORMATS[kind], value))
        elif kind != "constexpr":  # an integer equal to 1 is no parameter of the binary
            return None
    # unused scratch pointers are parameters of the binary all the same
    given += [bytes(8) for name in ("global", "profile") if hasattr(facts, f"{name}_scratch_size")]
    early = bool(getattr(facts, "launch_pdl", False))
    return compiled.function, grid, 32 * facts.num_warps, facts.shared, early, tuple(given)


def _plan(recorder: Recorder, inputs: list[Tensor], out: list[Tensor | None], views: bool) -> tuple | None:
    """((made, steps, whether only the default stream may run it), where each of ``out`` is, -1 for None) of a pass that ran; None
    where it has no plan. ``views``: whether ``out`` may be parts of what was made."""
    places = _Places(inputs, recorder.made, recorder.fixed)
    if recorder.other or places.ambiguous or not recorder.launches:
        return None
    touched, steps = set(), []
    for noted in recorder.launches:
        of_binary = not isinstance(noted, Launched)
        if of_binary:
            tensors = itertools.compress(noted.arguments, noted.binary.are_tensors)
            addresses = [a[1] if isinstance(a, tuple) else a for a in tensors]
        else:
            addresses = [t.data_ptr() for t in noted.tensors]
        found = [places.of(a) for a in addresses]
        if None in found or any(a & 15 for a in addresses):
            return None
        touched.update(found)
        steps.append(step_of_binary(noted, found) if of_binary else step(*noted, tuple(found)))
    if None in steps:
        return None
    made, found = [layout(t) for t in places.known[places.inputs :]], []
    for t in out:
        place = -1 if t is None else places.of(t.data_ptr())
        if place == -1:
            found.append(-1)
            continue
        number, behind = place if isinstance(place, tuple) else (place, 0)
        if type(number) is not int or (number >= places.inputs and place not in touched):
            return None  # memory that nothing wrote to
        whole = places.known[number]
        if behind or layout(t) != layout(whole):
            if not views or number < places.inputs or t.dtype != whole.dtype:
                return None
            made.append((*layout(t), number, behind // t.element_size()))
            number = places.inputs + len(made) - 1
        found.append(number)
    only_default = any(recorder.fixed.values())
    return (tuple(made), tuple(steps), only_default), tuple(found)


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
        plan, inputs = _plan(self.recorder, self.inputs, [*results, *saved], views=False), len(self.inputs)
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
        plan = _plan(recorder, read, [t for t, given in zip(out, self.given, strict=True) if given], views=True)
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
