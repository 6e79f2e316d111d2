"""Every address that an interpreted kernel touches has to be an element of one of the tensors that it was given, and no sum or
product of its integers may be beyond their type.

A kernel that reads or writes beside its tensors must not pass because what lies there did no harm. ``install`` is called once,
before tests run.
"""

import operator

import numpy as np
import torch
from triton.runtime import interpreter

# of the running kernel: a storage's address -> which of its bytes an element begins at
_given: dict[int, np.ndarray] = {}
_bases = np.zeros(0, np.uint64)  # these addresses, sorted


def install() -> None:
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    arguments = executor._init_args_hst
    load, store, add = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def noted(self, given, named):
        given, named = arguments(self, given, named)
        tensors = [getattr(t, "base", t) for t in (*given, *named.values())]  # what a descriptor describes
        _note([t for t in tensors if isinstance(t, torch.Tensor) and t.numel()])
        return given, named

    def checked_load(self, at, mask, *rest, **more):
        _check("loads from", at, mask)
        return load(self, at, mask, *rest, **more)

    def checked_store(self, at, value, mask, *rest, **more):
        _check("stores to", at, mask)
        return store(self, at, value, mask, *rest, **more)

    def checked_add(self, op, at, value, mask, *rest):
        _check("adds to", at, mask)
        return add(self, op, at, value, mask, *rest)

    executor._init_args_hst = noted
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_rmw = checked_add
    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = _check_range


def _check_range(a, b, operation) -> None:
    """Triton's own check, in NumPy: there it is written in the kernel's language, slower than the kernel itself."""
    kind = a.type.scalar
    if kind.int_bitwidth < 64:
        exact = getattr(operator, operation.__name__)(a.handle.data.astype(np.int64), b.handle.data.astype(np.int64))
        if exact.size and not (kind.get_int_min_value() <= exact.min() and exact.max() <= kind.get_int_max_value()):
            raise AssertionError(f"{kind} overflow: {operation.__name__} gives {exact.min()} to {exact.max()}")


def _note(tensors) -> None:
    global _bases
    _given.clear()
    for t in tensors:
        storage, size = t.untyped_storage(), t.element_size()
        begins = _given.setdefault(storage.data_ptr(), np.zeros(storage.nbytes(), np.bool_))
        first = t.storage_offset() * size
        if t.is_contiguous():
            begins[first : first + t.numel() * size : size] = True
        else:
            at = torch.zeros((), dtype=torch.int64)
            for n, stride in zip(t.shape, t.stride(), strict=True):
                at = at[..., None] + torch.arange(n) * (stride * size)
            begins[first + at.flatten().numpy()] = True
    _bases = np.array(sorted(_given), np.uint64)


def _check(does, at, mask) -> None:
    places = np.ravel(at.data)
    if mask is not None:
        places = places[np.ravel(np.broadcast_to(mask.data, at.data.shape)).astype(bool)]
    if not places.size or not _bases.size:  # a kernel that a test gave numbers for pointers
        return
    whose = np.searchsorted(_bases, places, side="right") - 1
    for one in range(whose.min(), whose.max() + 1):
        mine = places[whose == one].astype(np.uint64)
        if not mine.size:
            continue
        if one < 0:
            raise AssertionError(f"footprint: a kernel {does} memory below all of its tensors")
        begins = _given[int(_bases[one])]
        offset = (mine - _bases[one]).astype(np.int64)
        if offset.max() >= begins.size:
            raise AssertionError(
                f"footprint: a kernel {does} what lies {offset.max() - begins.size} bytes behind a tensor's memory"
            )
        if not begins[offset].all():
            raise AssertionError(f"footprint: a kernel {does} what lies between a tensor's elements")
