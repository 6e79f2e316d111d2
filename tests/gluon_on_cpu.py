"""Runs the Gluon kernels of attention on the CPU, in NumPy: what Triton's interpreter does for plain Triton.

Every warpgroup is a thread. Barriers, the copy engine's byte counts and the order of matrix products are kept: a product reads
shared memory only when it is waited for, so that a slot given back too early shows up as a wrong result, an arrival too many
as an error, and a wait that nothing ends as a time-out. It knows nothing of layouts, fences and clocks.
"""

import ast
import ctypes
import functools
import itertools
import math
import operator
import random
import re
import threading
import time
import types
from pathlib import Path

import numpy as np
import torch

from trinix.kernels import _noting

WAIT_SECONDS = 20
_NUMPY = {torch.float16: np.float16, torch.float32: np.float32, torch.int32: np.int32, torch.int64: np.int64}
_here = threading.local()  # the program and the warpgroup that this thread is


class Tensor:
    """A value of a kernel: a scalar or a block."""

    type = types.SimpleNamespace(layout=None)

    def __init__(self, a):
        self.a = np.asarray(a)

    shape = property(lambda self: self.a.shape)
    dtype = property(lambda self: types.SimpleNamespace(primitive_bitwidth=8 * self.a.itemsize))

    def to(self, dtype, bitcast=False):
        return Tensor(self.a.view(dtype) if bitcast else self.a.astype(dtype))

    def __getitem__(self, at):
        return Tensor(self.a[at])

    def __index__(self):
        return int(self.a)

    __int__ = __index__

    def __bool__(self):
        return bool(self.a)

    def __neg__(self):
        return Tensor(-self.a)

    def __floordiv__(self, other):  # as in C
        b = raw(other)
        return Tensor(np.trunc(self.a / b).astype(np.result_type(self.a, b)))

    def __mod__(self, other):
        return self - (self // other) * other


def raw(x):
    return x.a if isinstance(x, Tensor) else x


def _operator(function, swapped=False):
    def apply(self, other):
        if isinstance(other, Pointer):
            return NotImplemented
        a, b = (raw(other), self.a) if swapped else (self.a, raw(other))
        return Tensor(function(a, b))

    return apply


_names = ("add", "sub", "mul", "truediv", "and_", "or_", "xor", "lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne")
for _name in _names:
    _plain = _name.rstrip("_")
    setattr(Tensor, f"__{_plain}__", _operator(getattr(operator, _name)))
    setattr(Tensor, f"__r{_plain}__", _operator(getattr(operator, _name), swapped=True))
Tensor.__hash__ = None


class Pointer:
    def __init__(self, address, dtype, offset=0):
        self.address, self.kind, self.offset = address, dtype, offset
        self.dtype = types.SimpleNamespace(element_ty=dtype)

    def __add__(self, n):
        return Pointer(self.address, self.kind, self.offset + np.asarray(raw(n)).astype(np.int64))

    __radd__ = __add__

    @property
    def memory(self):
        offset = np.asarray(self.offset)
        assert offset.min() >= 0, "a negative offset"
        size = (int(offset.max()) + 1) * np.dtype(self.kind).itemsize
        return np.frombuffer((ctypes.c_byte * size).from_address(self.address), self.kind)


_atomic = threading.Lock()


def _broadcast(x, shape):
    """NumPy's takes as long as a copy."""
    return x if np.shape(x) == shape and isinstance(x, np.ndarray) else np.broadcast_to(x, shape)


def load(pointer, mask=None, other=0.0, cache_modifier="", volatile=False):
    if volatile:  # read again and again until another program has written
        if time.monotonic() > _here.program.began + WAIT_SECONDS:
            raise TimeoutError("a word that nobody writes")
        time.sleep(0)
    offset = np.asarray(pointer.offset)
    if mask is None:
        return Tensor(pointer.memory[offset])
    mask = _broadcast(raw(mask), offset.shape) if offset.shape else raw(mask)
    out = np.full(np.broadcast_shapes(offset.shape, np.shape(mask)), other, pointer.kind)
    offset, mask = _broadcast(offset, out.shape), _broadcast(mask, out.shape)
    if mask.any():
        out[mask] = Pointer(pointer.address, pointer.kind, offset[mask]).memory[offset[mask]]
    return Tensor(out)


def store(pointer, value, mask=None):
    offset = np.asarray(pointer.offset)
    shape = np.broadcast_shapes(offset.shape, np.shape(raw(value)))
    offset, value = _broadcast(offset, shape), _broadcast(raw(value), shape)
    keep = _broadcast(True if mask is None else raw(mask), shape)
    if keep.any():
        at = offset[keep] if shape else offset
        Pointer(pointer.address, pointer.kind, at).memory[at] = value[keep] if shape else value


def atomic_add(pointer, value, sem=None):
    if sem == "acquire" and time.monotonic() > _here.program.began + WAIT_SECONDS:  # asked again and again
        raise TimeoutError("a word that nobody adds to")
    with _atomic:
        offset = np.asarray(pointer.offset)
        memory = pointer.memory
        old = memory[offset].copy()
        np.add.at(memory, offset, np.asarray(raw(value)).astype(pointer.kind))
    time.sleep(0)
    return Tensor(old)


# ---- shared memory, barriers, the copy engine --------------------------------------------------------------------------


class Memory:
    def __init__(self, a):
        self.a = a

    dtype = property(lambda self: self.a.dtype.type)

    def index(self, i):
        i = int(i)
        assert 0 <= i < self.a.shape[0]
        return Memory(self.a[i])

    def reshape(self, shape):
        return Memory(self.a.reshape([int(n) for n in shape]))

    def permute(self, order):
        return Memory(self.a.transpose(order))

    def slice(self, start, length, dim=0):
        return Memory(self.a[tuple([slice(None)] * dim + [slice(start, start + length)])])

    def reinterpret(self, shape):
        flat = self.a.reshape(-1)
        return Memory(flat[: math.prod(shape)].reshape(shape))

    def store(self, value):
        assert value.a.shape == self.a.shape
        assert value.a.dtype == self.a.dtype
        self.a[...] = value.a

    def load(self, layout):
        return Tensor(self.a.copy())


class Barrier:
    def __init__(self):
        self.condition = threading.Condition()
        self.count = None

    def set_up(self, count):
        self.count = self.pending = count
        self.bytes = self.done = 0

    def change(self, arrivals=0, more_bytes=0):
        with self.condition:
            self.pending -= arrivals
            self.bytes += more_bytes
            assert self.pending >= 0, "an arrival too many"
            if self.pending == 0 and self.bytes == 0:
                self.pending = self.count
                self.done += 1
                self.condition.notify_all()

    def wait(self, parity):
        with self.condition:
            if not self.condition.wait_for(lambda: self.done & 1 != parity or _here.program.failed, WAIT_SECONDS):
                raise TimeoutError("a barrier that nobody completes")
            if _here.program.failed:
                raise RuntimeError("another warpgroup failed")


class Barriers:
    def __init__(self, n):
        self.all = [Barrier() for _ in range(n)]

    def index(self, i):
        return self.all[int(i)]


class NamedBarrier:
    """Hardware barrier of two warpgroups: complete when 256 threads have come, some to wait and some only to tell."""

    def __init__(self):
        self.condition = threading.Condition()
        self.come = self.done = 0

    def arrive(self, waits):
        with self.condition:
            mine = self.done
            self.come += 1
            if self.come == 2:
                self.come = 0
                self.done += 1
                self.condition.notify_all()
            elif waits and not self.condition.wait_for(lambda: self.done != mine or _here.program.failed, WAIT_SECONDS):
                raise TimeoutError("a named barrier that nobody completes")


class Descriptor:
    def __init__(self, address, box):
        self.dtype = _NUMPY[box.dtype]
        step = np.dtype(self.dtype).itemsize
        size = sum((n - 1) * s for n, s in zip(box.shape, box.strides, strict=True)) + 1
        flat = Pointer(address, self.dtype, np.asarray(size - 1)).memory
        self.a = np.lib.stride_tricks.as_strided(flat, box.shape, [s * step for s in box.strides])
        self.block = box.block
        self.layout = None
        self.block_type = types.SimpleNamespace(nbytes=math.prod(box.block) * step, shape=list(box.block))

    def parts(self, at):
        """(where the box lies in the tensor, and in shared memory), cut at the tensor's ends."""
        at = [int(i) for i in at]
        inside, here = [], []
        for i, n, size in zip(at, self.block, self.a.shape, strict=True):
            lo, hi = max(i, 0), max(min(i + n, size), max(i, 0))
            inside.append(slice(lo, hi))
            here.append(slice(lo - i, hi - i))
        return tuple(inside), tuple(here)


def tma_load(desc, at, barrier, result):
    inside, here = desc.parts(at)
    assert list(result.a.shape) == list(desc.block), (result.a.shape, desc.block)
    result.a[...] = 0
    result.a[here] = desc.a[inside]
    barrier.change(more_bytes=-desc.block_type.nbytes)


def tma_store(desc, at, src):
    inside, here = desc.parts(at)
    desc.a[inside] = src.a[here]


def tma_reduce_add(desc, at, src):
    inside, here = desc.parts(at)
    with _atomic:
        desc.a[inside] += src.a[here]


class CopyGroups:
    """Copies of threads (cp.async): each is done at once or when its group is waited for, so that both a read too early and a slot
    filled too early show up."""

    def __init__(self):
        self.open, self.groups = [], []

    def copy(self, smem, pointer, mask=None):
        def run():
            smem.a[...] = load(pointer, mask=mask).a

        self.open.append(run if random.random() < 0.5 else run() or (lambda: None))

    def commit(self):
        self.groups.append(self.open)
        self.open = []

    def wait(self, outstanding):
        while len(self.groups) > outstanding:
            for run in self.groups.pop(0):
                run()


class Exchange:
    """What warps of a cluster send to all its programs: the programs are one here, so there is one copy of it and of its barriers."""

    def __init__(self):
        self.barriers, self.floats = {}, {}

    def run(self, asm, args):
        what = asm.split("exchange: ")[1].split()
        values = [raw(a) for a in args]
        if what[0] == "open":
            return Tensor(np.int64(0))
        if what[0] == "received":
            return Tensor(np.array([self.floats[at] for at in values[0].reshape(-1).tolist()], np.float32))
        if what[0] == "expect":
            self._barrier(values[0]).change(arrivals=1, more_bytes=int(what[1]))
        elif what[0] == "await":
            self._barrier(values[0]).wait(int(values[1]))
        elif what[0] == "send":
            sent = values[0].reshape(-1).tolist()
            self.floats |= {int(values[1]) + 4 * i: value for i, value in enumerate(sent)}
            self._barrier(values[2]).change(more_bytes=-4 * len(sent))
        return None

    def _barrier(self, at):
        if int(at) not in self.barriers:
            self.barriers[int(at)] = Barrier()
            self.barriers[int(at)].set_up(1)
        return self.barriers[int(at)]


def async_load(smem, pointer, mask=None):
    _here.program.copies.copy(smem, pointer, mask)


def async_copy():
    """Gluon's module of that name."""
    return _namespace(
        commit_group=lambda: _here.program.copies.commit(), wait_group=lambda n: _here.program.copies.wait(n),
    )  # fmt: skip


# ---- matrix products ---------------------------------------------------------------------------------------------------


class Product:
    """A product under way: computed when it is waited for, from what shared memory holds then."""

    def __init__(self, a, b, acc):
        self.a, self.b, self.acc, self.value = a, b, acc, None

    def finish(self):
        if self.value is None:
            acc = self.acc
            if isinstance(acc, Product):
                acc = acc.finish()
            total = self.a.a.astype(np.float64) @ self.b.a.astype(np.float64)  # rounded once, as by our interpreter
            if acc is not None:
                total = total + acc
            self.value = total.astype(np.float32)
        return self.value


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    start = (acc if isinstance(acc, Product) else acc.a) if use_acc else None
    product = Product(a, b, start)
    _here.products.append(product)
    return product


def warpgroup_mma_wait(pending, deps):
    while len(_here.products) > pending:
        _here.products.pop(0).finish()
    for one in deps:
        assert one.value is not None, "a product that is used was not waited for"
    values = tuple(Tensor(one.value) for one in deps)
    return values[0] if len(values) == 1 else values


# ---- the language ------------------------------------------------------------------------------------------------------


def _inline_asm(asm, constraints, args, dtype=None, is_pure=False, pack=1):
    if found := re.match(r"bar\.(sync|arrive) (\d+), 256", asm):
        _here.program.named(int(found[2])).arrive(found[1] == "sync")
        return None
    if "exchange: " in asm:
        return _here.program.exchange.run(asm, args)
    if asm.startswith("ex2.approx"):
        return Tensor(np.exp2(args[0].a))
    if "rcp.approx" in asm:
        return Tensor(np.float32(1) / args[0].a)
    if "vote.sync" in asm:
        return args[0] * args[1]
    if asm.startswith("mov.b32"):
        return args[0]
    # the programs of a cluster run as one, each statement for all of them
    assert asm.startswith(("griddepcontrol", "barrier.cluster")), asm
    return None


def _allocate(dtype, shape, layout):
    if layout == "barriers":
        return Barriers(shape[0]) if len(shape) == 2 else Barrier()
    kind = {"i32": np.int32}.get(dtype, dtype)
    junk = np.full(shape, 77, kind)
    if np.dtype(kind).kind == "f":
        junk[...] = np.nan
    return Memory(junk)


def _binary(function):
    def apply(a, b):
        a, b = raw(a), raw(b)
        return Tensor(function(a, b))

    return apply


def _unary(function):
    def apply(x):
        return Tensor(function(raw(x)))

    return apply


def _where(condition, a, b):
    kind = next((x.a.dtype for x in (a, b) if isinstance(x, Tensor)), None)
    out = np.where(raw(condition), raw(a), raw(b))
    return Tensor(out if kind is None else out.astype(kind))


def _specialize(parts, warps, registers):
    program = _here.program

    def run(function, arguments):
        _here.program, _here.products = program, []
        try:
            with np.errstate(all="ignore"):  # each thread has its own
                function(*arguments)
            assert all(p.value is not None for p in _here.products), "a product that nobody waited for"
        except BaseException as error:
            program.errors.append(error)
            program.fail()

    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
    random.shuffle(threads)
    for one in threads:
        one.start()
    for one in threads:
        one.join()


class Program:
    def __init__(self, place, programs):
        self.place, self.programs = place, programs
        self.names, self.errors, self.failed, self.lock = {}, [], False, threading.Lock()
        self.began = time.monotonic()
        self.copies = CopyGroups()
        self.exchange = Exchange()

    def named(self, i):
        with self.lock:
            return self.names.setdefault(i, NamedBarrier())

    def fail(self):
        self.failed = True


def _layout(*_, **__):
    return None


def _jit(function=None, **_):
    return function if function is not None else (lambda f: f)


def _namespace(**names):
    return types.SimpleNamespace(**names)


def _mbarrier_wait(barrier, phase, pred=True):
    if pred:
        barrier.wait(int(phase))


def language():
    return _namespace(
        jit=_jit, constexpr=lambda x: x, float32=np.float32, bfloat16=None, int32=np.int32, int64=np.int64, static_range=range,
        static_assert=lambda condition: None,
        program_id=lambda axis: Tensor(np.int64(_here.program.place[axis])), num_programs=lambda axis: _here.program.programs,
        cdiv=lambda a, b: (a + (b - 1)) // b, maximum=_binary(np.maximum), minimum=_binary(np.minimum), where=_where,
        full=lambda shape, value, dtype, layout=None: Tensor(np.full(shape, raw(value), dtype)),
        zeros=lambda shape, dtype, layout=None: Tensor(np.zeros(shape, dtype)),
        zeros_like=lambda x: Tensor(np.zeros_like(x.a)),
        arange=lambda a, b, layout=None: Tensor(np.arange(a, b)),
        expand_dims=lambda x, axis: Tensor(np.expand_dims(x.a, axis)), convert_layout=lambda x, layout, assert_trivial=False: x,
        exp2=_unary(np.exp2), log=_unary(np.log), log2=_unary(np.log2), rsqrt=_unary(lambda x: 1 / np.sqrt(x)), abs=_unary(np.abs),
        fma=lambda a, b, c: Tensor((a.a.astype(np.float64) * b.a + c.a).astype(np.float32)),
        div_rn=_binary(np.divide), broadcast=lambda a, b: tuple(map(Tensor, np.broadcast_arrays(a.a, b.a))),
        full_like=lambda x, value: Tensor(np.full_like(x.a, raw(value))),
        sum=lambda x, axis: Tensor(x.a.sum(axis)), max=lambda x, axis: Tensor(x.a.max(axis)),
        reshape=lambda x, shape: Tensor(x.a.reshape(shape)), permute=lambda x, order: Tensor(x.a.transpose(order)),
        load=load, store=store, atomic_add=atomic_add, inline_asm_elementwise=_inline_asm,
        allocate_shared_memory=_allocate, warp_specialize=_specialize, SliceLayout=_layout, BlockedLayout=_layout,
        NVMMADistributedLayout=_layout, NVMMASharedLayout=_layout, DotOperandLayout=_layout, SwizzledSharedLayout=_layout,
    )  # fmt: skip


def hopper() -> dict:
    """What kernels import of Gluon's Hopper module."""
    return {
        "fence_async_shared": lambda: None, "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait,
        "tma": _namespace(store_wait=lambda n: None),
        "mbarrier": _namespace(
            MBarrierLayout=lambda: "barriers", init=lambda b, count: b.set_up(count), wait=_mbarrier_wait,
            arrive=lambda b, count: b.change(arrivals=count), expect=lambda b, n: b.change(arrivals=1, more_bytes=n),
        ),
    }  # fmt: skip


def range_of_tensors(*bounds):
    """A loop of a kernel: its counter is a value of the kernel."""
    return (Tensor(np.int64(i)) for i in range(*map(int, bounds)))


def _is_kernel(node) -> bool:
    return isinstance(node, ast.FunctionDef) and "gluon" in "".join(map(ast.unparse, node.decorator_list))


def _is_no_import(node) -> bool:
    """Imports are bound by hand."""
    return not isinstance(node, (ast.Import, ast.ImportFrom))


@functools.cache
def _code(file: Path, kept):
    """What a module has of one kind, without annotations of parameters, which are Triton's."""
    tree = ast.parse(file.read_text())
    tree.body = list(filter(kept, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
    return compile(ast.fix_missing_locations(tree), file, "exec")


def functions_of(module, **names):
    """A module's kernels as plain Python, among the names that they use."""
    g = language()
    names = {"gl": g, "gluon": g} | names
    exec(_code(Path(module.__file__), _is_kernel), names)
    return names


def kernels(folder: Path, names) -> dict:
    """Everything in the named modules of kernels, each of which may use those before it; their functions are plain Python."""
    g = language()
    own = hopper()
    compat = _namespace(
        tma_load=tma_load, tma_store=tma_store, tma_reduce_add=tma_reduce_add, block_barrier=lambda: None,
        reinterpret=lambda memory, dtype, shape, layout: memory.reinterpret(shape),
    )  # fmt: skip
    tl = types.SimpleNamespace(**vars(g))
    tl.sum = lambda x, axis: Tensor(x.a.astype(np.float32).sum(axis))
    tl.cast = lambda x, d: x.to(d)
    tl.extra = _namespace(cuda=_namespace(gdc_wait=lambda: None, gdc_launch_dependents=lambda: None))
    done = {}
    for name in names:
        space = own | vars(compat) | {"triton": g, "tl": tl, "gluon": g, "gl": g, "__name__": name}
        for other in done.values():
            space = {k: v for k, v in other.items() if not k.startswith("__")} | space
        exec(_code(folder / f"{name}.py", _is_no_import), space)
        done[name] = space
    return {k: v for space in done.values() for k, v in space.items()}


def launch_together(function, programs: int, arguments: tuple, constants: dict):
    """All programs at once, as in a cooperative launch."""
    all_errors = []

    def run(place):
        program = Program((place, 0, 0), programs)
        _here.program, _here.products = program, []
        try:
            with np.errstate(all="ignore"):
                function(*arguments, **constants)
        except BaseException as error:
            program.errors.append(error)
        all_errors.extend(program.errors)

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(programs)]
    random.shuffle(threads)
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    if all_errors:
        raise all_errors[0]


def launch(function, programs: int, arguments: tuple, constants: dict, y: int = 1, z: int = 1):
    for place in itertools.product(range(programs), range(y), range(z)):
        program = Program(place, programs)
        _here.program, _here.products = program, []
        with np.errstate(all="ignore"):
            function(*arguments, **constants)
        if program.errors:
            raise program.errors[0]


class Binary:
    """Takes the place of ``trinix.kernels._binary.Binary``."""

    def __init__(self, functions, kernel, examples, constants, launch_cooperative_grid=False):
        self.together = launch_cooperative_grid
        self.function = functions[kernel.__name__]
        self.constants = constants
        self.boxes = tuple(a[0] for a in examples if isinstance(a, tuple))
        self.kinds = [self._kind(a) for a in examples]
        self.are_tensors = tuple(isinstance(a, (tuple, torch.Tensor)) for a in examples)

    @staticmethod
    def _kind(example):
        if isinstance(example, tuple):
            return lambda value: Descriptor(value[1], value[0])
        if isinstance(example, torch.Tensor):
            return lambda address: Pointer(address, _NUMPY.get(example.dtype))
        return lambda value: value

    def __call__(self, blocks, stream, arguments, y=1, z=1, noted=None):
        recorder = _noting.recorder()
        if recorder is None or noted is None:
            return self.run(blocks, arguments, y, z)
        recorder.launches.append(types.SimpleNamespace(binary=self, grid=(blocks, y, z), arguments=noted))
        recorder.launching = True  # what PyTorch is asked for here does not count
        try:
            self.run(blocks, arguments, y, z)
        finally:
            recorder.launching = False

    def run(self, blocks, arguments, y, z):
        given = [kind(value) for kind, value in zip(self.kinds, arguments, strict=True)]
        if self.together:
            launch_together(self.function, blocks, tuple(given), self.constants)
        else:
            launch(self.function, blocks, tuple(given), self.constants, y, z)


def attention_on_cpu(monkeypatch, hopper, multiprocessors):
    """``hopper.forward`` and ``hopper.backward`` run here, for float16 tensors on the CPU; returns the counter of items."""
    folder = Path(hopper.__file__).parent
    files = ("early", "attention_scores", "attention_forward", "attention_backward", "attention_backward_wide")
    functions = kernels(folder, files)
    counter = torch.zeros(2 + 3 * multiprocessors, dtype=torch.int32)
    monkeypatch.setattr(
        hopper,
        "Binary",
        lambda kernel, device, examples, constants, **_: Binary(functions, kernel, examples, constants),
    )
    monkeypatch.setattr(hopper.Box, "at", lambda self, address: ((self, address),))
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(hopper, "raw_stream", lambda device: 0)
    monkeypatch.setattr(hopper, "choose_short_backward", lambda *_: None)  # plain Triton: its interpreter runs it
    monkeypatch.setattr(hopper, "_counter", lambda device, stream: counter)
    monkeypatch.setattr(hopper, "_plans", {})
    monkeypatch.setattr(hopper, "_binaries", {})
    return counter
