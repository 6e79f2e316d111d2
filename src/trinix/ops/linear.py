"""y = x W^T + b as ``torch.nn.functional.linear`` has it, with a kernel of its own for a single row of x: what ``FastLinear`` calls.

Not one of the public ops: it has one kernel, for the decoding of one sequence, and everything else is PyTorch's product.

``linears`` and ``slices`` are what layers put around products when they train. The values are PyTorch's; backward leaves out
two passes over memory: the sum of what several products give to one x, and the joining of slices' gradients.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trinix import dispatch
from trinix.kernels._layout import side_by_side


def _load():
    from trinix.kernels.triton import linear

    return linear


@functools.cache
def _kernels():
    return None if dispatch.missing(_load) else _load()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x ``[..., K]``, weight ``[N, K]`` and bias ``[N]`` to ``[..., N]``; all errors are those of ``F.linear``."""
    if not torch.compiler.is_compiling() and x.numel() == weight.shape[-1] and _one_row(x, weight, bias):
        return _kernels().forward(x, weight, bias)
    return F.linear(x, weight, bias)


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel runs this call."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        dispatch.plain(*tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and dispatch.resolve("auto") in ("auto", "triton")
        and _kernels() is not None
        and _kernels().unsupported(*tensors) is None
        and not torch.is_autocast_enabled(x.device.type)  # last: it knows no meta device
    )


# ---- several products of one x -------------------------------------------------------------------------------------------


def linears(x: Tensor, projections: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """``[linear(x, weight, bias) for weight, bias in projections]``.

    In backward the products add their parts of x's gradient up themselves: PyTorch adds them in passes of their own.
    """
    if _trains(x, *(t for pair in projections for t in pair if t is not None)):
        return list(_apply_linears(x, *(t for pair in projections for t in pair)))
    return [linear(x, weight, bias) for weight, bias in projections]


def _trains(x: Tensor, *others: Tensor) -> bool:
    """Whether autograd records x's part in a call of strided tensors of one dtype and device, and nothing else looks on."""
    return (
        torch.is_grad_enabled()
        and x.requires_grad
        and x.is_floating_point()  # complex products have conjugates in backward
        and not torch.compiler.is_compiling()
        and dispatch.plain(x, *others)
        and not any(t.layout != torch.strided or t.is_nested or t.is_meta for t in (x, *others))
        and all(t.dtype == x.dtype and t.device == x.device for t in others)
        and not torch.is_autocast_enabled(x.device.type)
    )


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        weights, biases = parameters[::2], parameters[1::2]
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1::2]) else None, *weights)
        ctx.shape, ctx.kind = x.shape, x.device.type
        ctx.set_materialize_grads(False)
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_autocast_enabled(ctx.kind):  # since forward, which ran without: dx.addmm_ takes one dtype only
            with torch.autocast(ctx.kind, enabled=False):
                return _Linears.backward(ctx, *gradients)
        x, *weights = ctx.saved_tensors
        dx, rest = None, []
        in_place = dispatch.pulled_back_plainly(*(dy for dy in gradients if dy is not None))
        needs = ctx.needs_input_grad
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        for i, (dy, weight) in enumerate(zip(gradients, weights, strict=True)):
            if dy is None:
                rest += (None, None)
                continue
            dy = dy.reshape(-1, weight.shape[0])
            if needs[0]:
                if dx is None:
                    dx = dy @ weight
                else:
                    dx = dx.addmm_(dy, weight) if in_place else torch.addmm(dx, dy, weight)
            rest.append(dy.mT @ rows if needs[1 + 2 * i] else None)
            rest.append(dy.sum(0) if needs[2 + 2 * i] else None)
        return None if dx is None else dx.view(ctx.shape), *rest


_apply_linears = dispatch.apply_of(_Linears)


# ---- slices of one product -----------------------------------------------------------------------------------------------


def slices(packed: Tensor, sizes: Sequence[int], dim: int) -> Sequence[Tensor]:
    """``packed.split(sizes, dim)``, dim from the front.

    Where the slices' gradients come as slices of one tensor, as Hopper's attention leaves them, that tensor is packed's
    gradient. PyTorch copies.
    """
    if _trains(packed):
        return _apply_slices(packed, sizes, dim)
    return packed.split_with_sizes(sizes, dim)


class _Slices(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, sizes, dim):
        ctx.layout = tuple(packed.shape), dim
        return packed.split_with_sizes(sizes, dim)

    @staticmethod
    def backward(ctx, *gradients):
        shape, dim = ctx.layout
        first = gradients[0]
        if dispatch.pulled_back_plainly(*gradients):
            memory = first.untyped_storage().data_ptr()
            whole = side_by_side(gradients, dim)
            # of one allocation: two of their own may be neighbours
            if whole and whole[0] == shape and all(g.untyped_storage().data_ptr() == memory for g in gradients):
                return first.as_strided(*whole), None, None
        return torch.cat(gradients, dim), None, None


_apply_slices = dispatch.apply_of(_Slices)
