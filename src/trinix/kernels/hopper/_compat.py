"""The names of Gluon's Hopper operations that differ between the Triton versions we run on (3.6, 3.7 and 3.9)."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
# a thread's own copies, not the copy engine's
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
block_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@_core.builtin
def reinterpret(memory, dtype, shape, layout, _semantic=None):
    """Shared memory as that of another type, shape or layout."""
    method = getattr(memory, "reinterpret", None) or memory._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


if hasattr(tma, "async_atomic_add"):
    tma_reduce_add = tma.async_atomic_add
else:  # the operation is there, only its Python name is not
    from triton._C.libtriton import ir

    @_core.builtin
    def tma_reduce_add(tensor_desc, coord, src, _semantic=None):
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)
