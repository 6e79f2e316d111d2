"""Launches of kernels with tensor descriptors (Gluon's, or Triton's own), without Triton's Python on the way.

``kernel[grid](...)`` binds and specialises its arguments on every call, and makes every tensor descriptor anew: far more host
time than a short attention takes on the card. Here a ``Binary`` is compiled once; a call passes it plain numbers and
descriptors out of a cache, straight to the launcher that Triton built for this binary. Where a Triton hides that launcher,
its own path runs, and descriptors are made anew.
"""

import ctypes
import functools
import threading
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from triton.backends.nvidia import driver
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from trinix.kernels import _noting

_MOST = 256  # descriptors kept for one place in one plan: as many addresses as its tensors take in turn

raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent from CPU builds
# Triton sets a new kernel's launcher before it has loaded the function: no thread may see it so
_lock = threading.Lock()


@functools.cache
def is_hopper(index: int) -> bool:
    """Whether a CUDA device is of compute capability 9.0; AMD's gfx90a calls itself that too."""
    return torch.version.hip is None and torch.cuda.get_device_capability(index) == (9, 0)


@functools.cache
def multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


class Box:
    """What a kernel reads or writes at a time of tensors of one shape: ``at(address)`` is the descriptor.

    ``swizzled``: how a tile lies in shared memory, which in Gluon is the kernel's to say; Triton's own compiler (not ``gluon``)
    finds that itself."""

    def __init__(self, shape, strides, block, dtype, swizzled=True, gluon=True):
        # no step is ever taken along a dimension of 1, but the strides of all must be multiples of 16 bytes
        unit = 16 // dtype.itemsize
        self.shape = [int(n) for n in shape]
        self.strides = [s if n > 1 else unit for n, s in zip(shape[:-1], strides[:-1], strict=True)] + [1]
        self.block = list(block)
        self.layout = None
        if gluon:
            bits = 8 * dtype.itemsize
            swizzle = min(128, block[-1] * dtype.itemsize) if swizzled and len(block) > 1 else 0
            self.layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=len(block))
        self.dtype = dtype
        self.metadata = None  # how this binary's descriptor looks; set by Binary
        self.kept = {}

    def example(self, tensor) -> TensorDescriptor | GluonDescriptor:
        if self.layout is None:
            return TensorDescriptor(tensor, self.shape, self.strides, self.block)
        return GluonDescriptor(tensor, self.shape, self.strides, self.block, self.layout)

    def at(self, address: int) -> tuple:
        found = self.kept.get(address)
        if found is None:
            if len(self.kept) >= _MOST:
                self.kept.clear()
            found = self.kept[address] = tuple(driver.make_tensordesc_arg(self._described(address), self.metadata))
        return found

    def shaped(self, address: int) -> tuple:
        """For Triton's own path."""
        return (self._described(address),)

    def map_at(self, address: int) -> bytes | None:
        """What the copy engine finds a tensor at ``address`` by, as Triton's launcher passes it; None where that cannot be read, or
        the map of another address, moved here, is another one."""
        here, elsewhere = (
            _bytes_of(driver.make_tensordesc_arg(self._described(a), self.metadata)[0]) for a in (address, address + 4096)
        )  # fmt: skip
        return here if here is not None and _moved(elsewhere, address) == here else None

    def _described(self, address):
        base = SimpleNamespace(data_ptr=lambda: address)
        return SimpleNamespace(
            base=base, shape=self.shape, strides=self.strides, padding="zero", round_f32_to_tf32=False
        )


_MAP_BYTES = 128  # of a CUtensorMap


def _bytes_of(triton_map) -> bytes | None:
    """Of Triton's PyCUtensorMap: a Python object's head, and the map at the next multiple of 128."""
    kind = type(triton_map)
    if kind.__name__ != "PyCUtensorMap" or kind.__basicsize__ != 2 * _MAP_BYTES:
        return None
    return ctypes.string_at(id(triton_map) + _MAP_BYTES, _MAP_BYTES)


def _moved(described: bytes, address: int) -> bytes | None:
    room = ctypes.create_string_buffer(2 * _MAP_BYTES)
    at = -ctypes.addressof(room) % 64
    ctypes.memmove(ctypes.addressof(room) + at, described, _MAP_BYTES)
    failed = _cuda().cuTensorMapReplaceAddress(ctypes.byref(room, at), ctypes.c_void_p(address))
    return None if failed else room.raw[at : at + _MAP_BYTES]


@functools.cache
def _cuda():
    return ctypes.CDLL("libcuda.so.1")


class Binary:
    """A kernel compiled for one device: ``binary(blocks, stream, arguments)``, arguments without the constants; ``y`` and ``z``
    are the grid's other axes.

    ``examples`` are arguments as Triton would bind them; only their types count. A ``Box`` among them is a descriptor of the
    tensor that stands beside it: (box, tensor).
    """

    def __init__(self, kernel, device: int, examples: tuple, constants: dict, **options):
        boxes = [a[0] for a in examples if isinstance(a, tuple)]
        bound = [a[0].example(a[1]) if isinstance(a, tuple) else a for a in examples]
        with _lock, torch.cuda.device(device):
            self.compiled = kernel.run(*bound, grid=(1,), warmup=True, **constants, **options)
            run = self.compiled.run  # loads it
        self.device = device
        self.alone = torch.cuda.device_count() == 1
        self.boxes = tuple(boxes)
        self.are_tensors = tuple(isinstance(a, (tuple, torch.Tensor)) for a in examples)
        self.constants = tuple(constants.values())
        self.launch = _direct(self.compiled, run, self.constants)
        for box, facts in zip(boxes, getattr(self.compiled.metadata, "tensordesc_meta", None) or (), strict=True):
            box.metadata = facts
        self.direct = self.launch is not None
        if not self.direct:
            for box in boxes:
                box.at = box.shaped
            self.launch = self._slow

    def __call__(self, blocks: int, stream: int, arguments: tuple, y=1, z=1, noted: tuple | None = None) -> None:
        """``noted``: the arguments for a recorder; a call without has no plan."""
        if _noting.recorders:
            self._note((blocks, y, z), noted)
        if self.alone or torch._C._cuda_getDevice() == self.device:
            self.launch(blocks, y, z, stream, arguments)
        else:
            with torch.cuda.device(self.device):
                self.launch(blocks, y, z, stream, arguments)

    def _note(self, grid, noted):
        recorder = _noting.recorder()
        if recorder is not None and noted is None:
            recorder.other = "a launch that is not noted"
        elif recorder is not None:
            recorder.launches.append(Noted(self, grid, noted))

    def _slow(self, blocks, y, z, stream, arguments):
        compiled = self.compiled
        compiled.run(
            blocks, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments,
            *self.constants,
        )  # fmt: skip


class Noted(NamedTuple):
    """A launch as a recorder has it: a tensor among the arguments is its address, or (box, address)."""

    binary: Binary
    grid: tuple[int, int, int]
    arguments: tuple


_binaries = {}


class Boxed:
    """A launch all of whose tensors are read or written in boxes, (1, *block) of each: ``boxed(*tensors)`` for tensors that are
    laid out as those given here."""

    def __init__(self, kernel, tensors, blocks, programs, integers, constants, gluon=True, **options):
        self.index, self.programs, self.integers = tensors[0].get_device(), programs, integers
        boxes = [
            Box(t.shape, t.stride(), (1, *block), t.dtype, gluon=gluon)
            for t, block in zip(tensors, blocks, strict=True)
        ]
        key = kernel, self.index, tensors[0].dtype, *constants.values(), *options.values()
        binary = _binaries.get(key)
        if binary is None:
            examples = (*zip(boxes, tensors, strict=True), *integers)
            binary = _binaries[key] = Binary(kernel, self.index, examples, constants, **options)
        else:  # the boxes of a further launch learn from it how descriptors look
            for box, like in zip(boxes, binary.boxes, strict=True):
                box.metadata = like.metadata
                if "at" in vars(like):
                    box.at = box.shaped
        self.binary, self.boxes = binary, boxes

    def __call__(self, *tensors):
        noted = None
        if _noting.recorders:
            noted = *zip(self.boxes, [t.data_ptr() for t in tensors], strict=True), *self.integers
        arguments = ()
        for box, t in zip(self.boxes, tensors, strict=True):
            arguments += box.at(t.data_ptr())
        self.binary(self.programs, raw_stream(self.index), arguments + self.integers, noted=noted)


def _direct(compiled, run, constants):
    """(blocks, y, z, stream, arguments) -> launch, descriptors being among the arguments as the binary takes them; or None."""
    if not triton.__version__.startswith(("3.6.", "3.7.")):  # whose launchers were read
        return None
    facts = compiled.metadata
    if facts.global_scratch_size or getattr(facts, "profile_scratch_size", 0):
        return None
    launch = getattr(run, "launch", None)
    if getattr(facts, "tensordesc_meta", None):  # behind a function that makes descriptors of all such arguments
        names = launch.__code__.co_freevars if hasattr(launch, "__code__") else ()
        if "launcher" not in names:
            return None
        launch = launch.__closure__[names.index("launcher")].cell_contents
    if launch is None:
        return None
    function, packed = compiled.function, compiled.packed_metadata
    together, pdl = run.launch_cooperative_grid, run.launch_pdl
    if hasattr(run, "arg_annotations"):  # Triton 3.7
        annotations, signature = run.arg_annotations, run.kernel_signature

        def direct(blocks, y, z, stream, arguments):
            launch(
                blocks, y, z, stream, function, together, pdl, packed, None, None, None, None, None, annotations,
                signature, arguments + constants,
            )  # fmt: skip

    else:  # Triton 3.6

        def direct(blocks, y, z, stream, arguments):
            launch(
                blocks, y, z, stream, function, together, pdl, None, None, packed, None, None, None, *arguments,
                *constants,
            )  # fmt: skip

    return direct
