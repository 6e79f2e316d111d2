"""Which backend runs a call: the named one or an error, or for "auto" the first that can, with every reason kept."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

forced: str | None = None  # what "auto" means at present: set by ``use_backend`` only; torch.compile guards it


class Unsupported(RuntimeError):
    """A named backend cannot run this call. The message says which backend and why."""


@dataclass(frozen=True)
class Explanation:
    """What ``trinix.explain`` returns; ``print`` it, or read the fields."""

    op: str
    backend: str
    why: str
    config: str = ""
    rejected: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op} -> {self.backend}: {self.why}"]
        if self.config:
            lines.append(f"  config: {self.config}")
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, ``backend="auto"`` means ``name``, in the whole process (as PyTorch's own backend switches do).

    >>> with trinix.use_backend("torch"):
    ...     y = trinix.ops.silu(torch.randn(8))

    A backward pass runs where its forward ran.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"use_backend: name must be 'auto' or a backend's name, got {name!r}")
    global forced
    before, forced = forced, None if name == "auto" else name
    try:
        yield
    finally:
        forced = before


def resolve(backend: str) -> str:
    """``backend``, or what ``use_backend`` put in the place of "auto"."""
    return forced or backend if backend == "auto" else backend


def missing(load: Callable[[], ModuleType]) -> str | None:
    """The package that a backend lacks, in words, or None. A broken module of our own is an error, not a reason."""
    try:
        load()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "trinix":
            raise
        return f"needs the package {error.name}, which is not installed"
    return None


def check_name(op: str, backends: Mapping, backend: str) -> None:
    if backend != "auto" and (not isinstance(backend, str) or backend not in backends):
        raise ValueError(f"{op}: backend must be one of {['auto', *backends]}, got {backend!r}")


def number(op: str, name: str, value) -> float:
    """``value`` as a float. What is none is refused by the argument's name; Python's own message would not have it."""
    if type(value) is float:  # nearly always, and small calls count
        return value
    tensor = isinstance(value, Tensor)
    if tensor and value.requires_grad:
        raise TypeError(
            f"{op}: {name} is a number and gets no gradient, got a tensor that requires one; pass {name}.item()"
        )
    # float() reads texts, and of tensors raises what a fault of the device raises too
    if not isinstance(value, (str, bytes, bytearray)) and not (tensor and (value.is_complex() or value.numel() != 1)):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{op}: {name} must be a number that a float holds, got one beyond 1.8e308") from None
        except (TypeError, ValueError):
            pass
    raise TypeError(f"{op}: {name} must be a number, got {value!r}; convert it with float()")


def flags(op: str, **values: bool) -> None:
    """Refuse what is no bool: a text is true whatever it says."""
    for name, value in values.items():
        if not isinstance(value, (bool, torch.SymBool)):
            raise TypeError(f"{op}: {name} must be True or False, got {value!r}; convert it with bool()")


def load_named(op: str, backends: Mapping[str, Callable[[], ModuleType]], backend: str, *call) -> ModuleType:
    """The module of a named backend, or ``Unsupported`` with its reason."""
    check_name(op, backends, backend)
    reason = missing(backends[backend]) or backends[backend]().unsupported(*call)
    if reason:
        raise Unsupported(f"{op}: backend {backend!r} {reason}; use backend='auto' to run it where it can")
    return backends[backend]()


def plain(*tensors: Tensor) -> bool:
    """True when a raw launch sees what it thinks it sees: no subclass, mode, transform, dual or lazily negated tensor."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for t in tensors:  # noqa: SIM110  (no generator: this is on the path of every eager call)
        if (type(t) is not Tensor and type(t) is not Parameter) or t.is_neg():
            return False
    return True


def readable(t: Tensor) -> bool:
    """Whether the host may look at ``t``'s values: no wait for a device, nobody who traces the look."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and plain(t)


def pulled_back_plainly(*gradients: Tensor) -> bool:
    """Whether backward may launch kernels on these: no create_graph=True, no batch of gradients, nothing unusual."""
    if torch.is_grad_enabled() or not plain(*gradients):
        return False
    for g in gradients:  # noqa: SIM110  (as in ``plain``)
        if torch._C._functorch.is_legacy_batchedtensor(g):
            return False
    return True


def apply_of(function: type[torch.autograd.Function]) -> Callable:
    """``function.apply`` for tensors that ``plain`` has passed: without the Python layer that serves functorch (3 us a call)."""
    return super(torch.autograd.function._SingleLevelFunction, function).apply


_library = torch.library.Library("trinix", "FRAGMENT")


def register(schema: str, run: Callable, fake: Callable):
    """Register kernels as the operator ``trinix::<schema>`` for calls that a raw launch must not see; returns its overload.

    ``run`` serves CUDA tensors, and CPU tensors for Triton's interpreter: nothing else reaches it, ``unsupported`` is asked first.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for device in ("CUDA", "CPU"):
        _library.impl(name, run, device)
    torch.library.register_fake(f"trinix::{name}", fake, lib=_library)
    return getattr(torch.ops.trinix, name).default
