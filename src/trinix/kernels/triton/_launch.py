"""Launch a compiled Triton kernel without paying for Triton's Python on every call.

The normal path, ``kernel[grid](...)``, rebinds and re-specialises its arguments each time: about 12 us more than the CUDA
launch itself on the H100 machine. Here the first call of each specialisation takes the normal path and keeps the
``CompiledKernel`` that it returns; later calls launch its function directly, through PyTorch's own C launcher for Triton
kernels (4.7 us) where this PyTorch has it. Kernels that may start before the one in front has ended need an attribute that it
lacks: they go through the C function behind Triton's launcher (as fast), or ``CompiledKernel.run`` (a microsecond more).

A kept binary is only right for arguments that Triton would specialise in the same way, so the key holds everything that
Triton looks at: device, the dtype of every tensor, and for every specialised integer whether it is 1, divisible by 16,
and fits int32. Constants and options are fixed in the ``Launch``. Everything else takes the normal path: a pointer that
is not 16-byte aligned, launch or pre-run hooks, the interpreter, drivers other than CUDA, kernels that read globals or
need scratch memory, an unknown argument type. ``TRINIX_FAST_LAUNCH=0`` sends every call there.

Before the first fast launch in a process, a probe kernel is launched both ways and compared; if they differ, the fast
path is off for the process, with a warning, and ``status()`` (shown by ``trinix doctor``) says why.
"""

import contextlib
import functools
import operator
import os
import threading
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trinix.kernels import _native, _noting

INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    from trinix.kernels.triton import _interpreter  # noqa: F401  (corrects its rounding)

_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent from CPU builds
_static_launcher = getattr(torch._C, "_StaticCudaLauncher", None)
_runtime = triton.knobs.runtime
_NO_ENTER_HOOK = _runtime.launch_enter_hook  # chains that are empty until a profiler adds to them
_NO_EXIT_HOOK = _runtime.launch_exit_hook
# Triton sets a new kernel's launcher before it has loaded the function: no thread may see it so
_lock = threading.RLock()


def _initial_reason() -> str | None:
    if os.environ.get("TRINIX_FAST_LAUNCH", "1") == "0":
        return "TRINIX_FAST_LAUNCH=0"
    if INTERPRETED:
        return "TRITON_INTERPRET is set"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is a CPU build"
    if not (hasattr(_runtime.launch_enter_hook, "calls") and hasattr(_runtime.launch_exit_hook, "calls")):
        return "a launch hook stood in the place of Triton's hook chain at import"
    if torch.version.hip is not None:
        return "the HIP driver specialises on storage size"
    if triton.knobs.runtime.debug or triton.knobs.compilation.instrumentation_mode:
        return "Triton's debug or instrumentation mode is on"
    return None


class _State:
    """Why fast launches are off, or None while they may be used; ``checked`` once the probe has agreed."""

    off = _initial_reason()
    checked = False
    static = hasattr(_static_launcher, "_launch_kernel")  # whether to go through PyTorch's C launcher
    many_devices = False


def status() -> str:
    """One line for ``trinix doctor``."""
    if _State.off:
        return f"off: {_State.off}"
    launcher = "PyTorch's launcher" if _State.static else "Triton's launcher"
    return f"on, through {launcher}, self-check {'passed' if _State.checked else 'at the first launch'}"


def _int_class(value) -> int:
    """What Triton specialises an integer on: == 1, % 16 == 0, and its width."""
    return (value == 1) | (value & 15 == 0) << 1 | (-(2**31) <= value < 2**31) << 2


def _is_pinned(param) -> bool:
    """True when an annotation fixes the type and Triton looks at no value of this scalar."""
    kind = param.annotation_type
    return kind.startswith(("fp", "bf")) or bool(kind and param.do_not_specialize)


class Launcher:
    """A jit kernel whose parameters are tensors first, then scalars, then constants.

    Scalars annotated with a type ("i64" with do_not_specialize, "fp32") are passed as they are; other scalars must be
    Python ints and become part of the key.
    """

    def __init__(self, kernel, tensors: int):
        self.kernel = kernel
        self.specialized = ()
        if not INTERPRETED:  # an interpreted function has no parameter records, and never reaches the fast path
            scalars = [p for p in kernel.params if not p.is_constexpr][tensors:]
            self.specialized = tuple(i for i, p in enumerate(scalars) if not _is_pinned(p))

    def bind(
        self, *, num_warps: int = 4, num_stages: int = 1, fp_fusion: bool = True, launch_pdl: bool = False, **constants
    ) -> "Launch":
        """Fix the constants (in the order of the signature) and options; returns the callable that is launched.

        ``launch_pdl``: the kernel may start before the one launched before it has ended (CUDA, from sm_90 on); it calls gdc_wait.
        """
        assert INTERPRETED or tuple(constants) == tuple(p.name for p in self.kernel.params if p.is_constexpr)
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
        if launch_pdl:  # other drivers do not know the option
            options["launch_pdl"] = True
        return Launch(self, constants, options)


class Launch:
    """One kernel with its constants: ``launch(blocks, tensors, scalars)``, ``blocks`` along the grid's x axis."""

    __slots__ = ("binaries", "constants", "keep", "kernel", "known", "options", "specialized")

    def __init__(self, launcher: Launcher, constants: dict, options: dict):
        self.kernel = launcher.kernel
        self.constants = constants
        self.options = options
        self.specialized = launcher.specialized
        self.keep = {}  # key -> fire(blocks, stream, arguments) of a compiled kernel
        self.binaries = {}  # key -> that kernel
        self.known = set()  # (key, which pointers are aligned) of those that Triton's own path has compiled and loaded

    def __call__(self, blocks: int, tensors: tuple, scalars: tuple) -> None:
        # Written for the clock (a microsecond here is a tenth of an eager call): no helper calls, no generator.
        if len(tensors) == 2:
            first, second = tensors
            pointers = (first.data_ptr(), second.data_ptr())
            bits = pointers[0] | pointers[1]
            device = first.get_device()
            key = (device, first.dtype, second.dtype)
        else:
            pointers = tuple([t.data_ptr() for t in tensors])
            bits = functools.reduce(operator.or_, pointers)
            device = tensors[0].get_device()
            key = (device, *[t.dtype for t in tensors])
        if self.specialized:
            key += tuple([_int_class(scalars[i]) for i in self.specialized])
        if self.again(key, bits, blocks, pointers, scalars):
            return
        kept = key in self.keep
        if kept and _State.many_devices and torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                if self.again(key, bits, blocks, pointers, scalars):
                    return
        self._normal(blocks, tensors, scalars, key, not kept and not bits & 15)

    def repeated(self, blocks: int, scalars: tuple, device: int, dtypes: Sequence[torch.dtype]) -> "Repeated":
        """For a caller that launches many times with the same scalars."""
        key = (device, *dtypes, *[_int_class(scalars[i]) for i in self.specialized])
        return Repeated(self, blocks, scalars, key)

    def again(self, key: tuple, bits: int, blocks: int, pointers: tuple, scalars: tuple) -> bool:
        """Launch the binary kept under ``key``; False where there is none, or Triton's own path has to be taken. ``bits``: those of
        all pointers."""
        fire = self.keep.get(key)
        if (
            fire is None
            or bits & 15
            or _noting.recorders
            or _runtime.launch_enter_hook is not _NO_ENTER_HOOK
            or _NO_ENTER_HOOK.calls
            or _runtime.launch_exit_hook is not _NO_EXIT_HOOK
            or _NO_EXIT_HOOK.calls
            or self.kernel.pre_run_hooks
            or (_State.many_devices and torch._C._cuda_getDevice() != key[0])
        ):
            return False
        # pointers go as integers: nobody then asks the tensor or the driver about them
        fire(blocks, _raw_stream(key[0]), pointers + scalars)
        return True

    def _normal(self, blocks: int, tensors: tuple, scalars: tuple, key: tuple, keep: bool) -> None:
        recorder = _noting.recorder()
        with contextlib.nullcontext() if recorder is None else recorder.noting(self, key, blocks, tensors, scalars):
            self._by_triton(blocks, tensors, scalars, key, keep)

    def _by_triton(self, blocks: int, tensors: tuple, scalars: tuple, key: tuple, keep: bool) -> None:
        """Triton's own path; with ``keep`` it keeps the kernel under ``key`` if later calls may launch it directly."""
        device = tensors[0].device
        known = key, *[not t.data_ptr() & 15 for t in tensors]
        # a launch may wait for room in its queue, behind what another thread has yet to launch: only a new kernel's has the lock
        alone = contextlib.nullcontext() if known in self.known else _lock
        with alone, torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            compiled = self.kernel[(blocks,)](*tensors, *scalars, **self.constants, **self.options)
            self.known.add(known)
            if not keep or _State.off or not _keepable(self.kernel, compiled):
                return
            if not _State.checked and not _self_check(device):
                return
        self.binaries[key] = compiled
        self.keep[key] = _fire(compiled, tuple(self.constants.values()))


def by_table(table, *tensors: torch.Tensor | None):
    """The results of a call that is like one whose plans are in a table of ``trinix.kernels._native``; None where there is none, or
    a launch has to go through Triton: see ``Launch.again``. ``tensors``: anything, the first of them no None.

    What is looked at when forward is called holds for its backward: a hook on launches that comes in between does not see that. Hooks
    on a single kernel (``pre_run_hooks``) see neither."""
    module = _native.module
    if (
        module is None
        or _runtime.launch_enter_hook is not _NO_ENTER_HOOK
        or _NO_ENTER_HOOK.calls
        or _runtime.launch_exit_hook is not _NO_EXIT_HOOK
        or _NO_EXIT_HOOK.calls
    ):
        return None
    return module.again(table, _raw_stream, *tensors)


class Repeated(NamedTuple):
    """A launch that many calls make: with these scalars, of tensors of the same dtypes on one device."""

    launch: Launch
    blocks: int
    scalars: tuple
    key: tuple  # under which its binary is kept

    def at(self, pointers: tuple) -> bool:
        """Launch the kept binary; False where that cannot be: then ``of`` the tensors."""
        bits = 0
        for one in pointers:
            bits |= one
        return self.launch.again(self.key, bits, self.blocks, pointers, self.scalars)

    def of(self, *tensors: torch.Tensor) -> None:
        self.launch(self.blocks, tensors, self.scalars)


def _keepable(kernel, compiled) -> bool:
    if compiled is None or kernel.used_global_vals:
        return False
    facts = compiled.metadata
    scratch = getattr(facts, "global_scratch_size", 0) or getattr(facts, "profile_scratch_size", 0)
    return not scratch and facts.num_ctas == 1 and not getattr(facts, "launch_cooperative_grid", False)


def _fire(compiled, constants: tuple):
    """A function (blocks, stream, arguments without constants) that launches a compiled kernel, and nothing else."""
    function, facts = compiled.function, compiled.metadata
    types = _argument_types(compiled)
    if _State.static and types and not getattr(facts, "launch_pdl", False):  # PyTorch's launcher has no such attribute
        launch, num_warps, shared = _static_launcher._launch_kernel, facts.num_warps, facts.shared
        # unused scratch pointers are parameters of the binary all the same
        unused = (None,) * sum(hasattr(facts, f"{name}_scratch_size") for name in ("global", "profile"))
        types += "O" * len(unused)

        def fire(blocks, stream, arguments):
            launch(function, blocks, 1, 1, num_warps, shared, types, arguments + unused, stream)

        return fire
    return _tritons_fire(function, compiled.run, compiled.packed_metadata, constants)


def _tritons_fire(function, run, packed, constants):
    """The same through Triton's launcher: the C function behind it where it is known (3.6, 3.7), else as it stands."""
    launch = getattr(run, "launch", None)
    if launch is None or not triton.__version__.startswith(("3.6.", "3.7.")):

        def fire(blocks, stream, arguments):
            run(blocks, 1, 1, stream, function, packed, None, None, None, *arguments, *constants)

    elif hasattr(run, "arg_annotations"):  # 3.7
        pdl, annotations, signature = run.launch_pdl, run.arg_annotations, run.kernel_signature

        def fire(blocks, stream, arguments):
            launch(
                blocks, 1, 1, stream, function, False, pdl, packed, None, None, None, None, None, annotations, signature,
                arguments + constants,
            )  # fmt: skip

    else:
        pdl = run.launch_pdl

        def fire(blocks, stream, arguments):
            launch(
                blocks, 1, 1, stream, function, False, pdl, None, None, packed, None, None, None, *arguments, *constants
            )

    return fire


_TYPE_LETTERS = {"i32": "i", "i64": "l", "fp32": "f"}


def _argument_types(compiled) -> str | None:
    """The static launcher's letter for every parameter that the binary has, or None for a type that it lacks.

    An integer equal to 1 became a constant: Triton's launcher skips it, so the call must not pass it. Rather than build
    argument lists for that, such kernels go through ``CompiledKernel.run``, which does it itself.
    """
    letters = ""
    for kind in compiled.src.signature.values():
        if kind == "constexpr":
            continue
        letter = "O" if kind.startswith("*") else _TYPE_LETTERS.get(kind)
        if letter is None:
            return None
        letters += letter
    return letters if len(letters) == sum(not p.is_constexpr for p in compiled.src.fn.params) else None


@triton.jit
def _probe(src, dst, n, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dst + i, tl.load(src + i, mask=i < n) * FACTOR, mask=i < n)


def _self_check(device: torch.device) -> bool:
    """Launch the probe both ways once in a process. True when fast launches may be used from now on."""
    if torch.cuda.is_current_stream_capturing():
        return False  # comparing needs a synchronisation; the next launch outside the capture checks
    with _lock:
        if _State.checked or _State.off:
            return _State.checked
        reason = _probe_fails(device)
        if reason and _State.static:
            _State.static = False  # this PyTorch's launcher is another one: Triton's then
            reason = _probe_fails(device)
        if reason:
            _State.off = reason
            warnings.warn(
                f"trinix: fast launches are off, every launch takes Triton's normal path: {reason}", stacklevel=2
            )
            return False
        _State.many_devices = torch.cuda.device_count() > 1
        _State.checked = True
        return True


def _probe_fails(device: torch.device) -> str | None:
    src = torch.arange(1, 65, dtype=torch.float32, device=device)
    normal, fast = torch.zeros_like(src), torch.zeros_like(src)
    compiled = _probe[(2,)](src, normal, 48, FACTOR=3, BLOCK=32)
    try:
        _fire(compiled, (3, 32))(2, _raw_stream(device.index), (src.data_ptr(), fast.data_ptr(), 48))
    except (TypeError, AttributeError, SystemError, ValueError) as error:
        return f"the launcher does not take the call: {error}"
    return None if torch.equal(normal, fast) else "the probe kernel gave another result on the fast path"
