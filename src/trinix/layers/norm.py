"""Norm modules: drop-in for ``torch.nn``'s and loading their state_dicts, one call into ``trinix.ops`` each; ``fuse``."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from trinix import ops
from trinix.layers import activation
from trinix.layers.activation import choose_backend
from trinix.layers.arguments import check_dropout, check_use_triton
from trinix.ops.norm import FUSED_KINDS, triton_can_run

Shape = int | Sequence[int]


class FastLayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` on trinix's kernels: the same arguments, parameters and state_dict.

    Args:
        use_triton: None lets trinix choose, False means PyTorch, True means trinix's own kernels wherever they can run.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        use_triton: bool | None = None,
    ):
        _check(type(self).__name__, normalized_shape, eps, use_triton)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.use_triton = use_triton

    def forward(self, x: Tensor) -> Tensor:
        backend = choose_backend(self.use_triton, triton_can_run, x, self.weight, self.bias)
        return ops.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, backend=backend)

    def extra_repr(self) -> str:
        return super().extra_repr() + _shown(use_triton=self.use_triton)


class FastRMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` on trinix's kernels: the same arguments, parameters and state_dict.

    Args:
        weight_offset: added to weight; 1 for Gemma's checkpoints. A new weight is 1 - weight_offset.
        use_triton: None lets trinix choose, False means PyTorch, True means trinix's own kernels wherever they can run.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
        use_triton: bool | None = None,
    ):
        _check(type(self).__name__, normalized_shape, 0.0 if eps is None else eps, use_triton)
        self.weight_offset = weight_offset  # reset_parameters, called from super().__init__, reads it
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.use_triton = use_triton

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        backend = choose_backend(self.use_triton, triton_can_run, x, self.weight)
        return ops.rms_norm(
            x, self.normalized_shape, self.weight, self.eps, weight_offset=self.weight_offset, backend=backend
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + _shown(weight_offset=self.weight_offset or None, use_triton=self.use_triton)


class FastFusedResidualLayerNorm(FastLayerNorm):
    """``y, residual = norm(x, residual)``: the new residual is dropout(x) + residual, y its LayerNorm.

    Args:
        dropout: probability that an element of x is dropped, in training mode only.

    Other arguments are ``FastLayerNorm``'s.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout: float = 0.0,
        use_triton: bool | None = None,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype, use_triton)
        check_dropout(type(self).__name__, dropout)
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        backend = choose_backend(self.use_triton, triton_can_run, x, residual, self.weight, self.bias)
        return ops.layer_norm_residual(
            x, residual, self.normalized_shape, self.weight, self.bias, self.eps,
            dropout_p=self.dropout if self.training else 0.0, backend=backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + _shown(dropout=self.dropout or None)


class FastFusedResidualRMSNorm(FastRMSNorm):
    """``y, residual = norm(x, residual)``: the new residual is dropout(x) + residual, y its RMSNorm.

    Args:
        dropout: probability that an element of x is dropped, in training mode only.

    Other arguments are ``FastRMSNorm``'s.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout: float = 0.0,
        weight_offset: float = 0.0,
        use_triton: bool | None = None,
    ):
        super().__init__(
            normalized_shape, eps, elementwise_affine, device, dtype, weight_offset=weight_offset, use_triton=use_triton
        )
        check_dropout(type(self).__name__, dropout)
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        backend = choose_backend(self.use_triton, triton_can_run, x, residual, self.weight)
        return ops.rms_norm_residual(
            x, residual, self.normalized_shape, self.weight, self.eps, weight_offset=self.weight_offset,
            dropout_p=self.dropout if self.training else 0.0, backend=backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + _shown(dropout=self.dropout or None)


class FastFusedRMSNormActivation(FastRMSNorm):
    """activation(rms_norm(x)) in one kernel.

    Args:
        activation: a kind of ``trinix.ops.rms_norm_activation``.

    Other arguments are ``FastRMSNorm``'s.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        activation: str = "silu",
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
        use_triton: bool | None = None,
    ):
        if activation not in FUSED_KINDS:
            raise ValueError(
                f"FastFusedRMSNormActivation: activation must be one of {list(FUSED_KINDS)}, got {activation!r}"
            )
        super().__init__(
            normalized_shape, eps, elementwise_affine, device, dtype, weight_offset=weight_offset, use_triton=use_triton
        )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        backend = choose_backend(self.use_triton, triton_can_run, x, self.weight)
        return ops.rms_norm_activation(
            x, self.normalized_shape, self.weight, self.activation, self.eps, weight_offset=self.weight_offset,
            backend=backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + _shown(activation=self.activation)


def _shown(**fields) -> str:
    return "".join(f", {name}={value}" for name, value in fields.items() if value is not None)


def _check(name: str, normalized_shape: Shape, eps: float, use_triton: bool | None) -> None:
    sizes = normalized_shape if isinstance(normalized_shape, Sequence) else [normalized_shape]
    if not sizes or not all(isinstance(n, Integral) and not isinstance(n, bool) and n >= 0 for n in sizes):
        raise ValueError(f"{name}: normalized_shape must be an int or several, from 0 on, got {normalized_shape!r}")
    if isinstance(eps, bool) or not isinstance(eps, int | float) or eps < 0:
        raise ValueError(f"{name}: eps must be a number from 0 on, got {eps!r}")
    check_use_triton(name, use_triton)


# Exact types only: a subclass may compute something else.
_ACTIVATION_KINDS = {
    nn.Identity: "none", nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.SiLU: "silu", nn.Mish: "mish", nn.Tanh: "tanh",
    **{
        one: one.kind
        for one in (
            activation.FastReLU, activation.FastSigmoid, activation.FastSiLU, activation.FastQuickGELU,
            activation.FastSquaredReLU, activation.FastMish, activation.FastTanh,
        )
    },
}  # fmt: skip


def fuse(*modules: nn.Module) -> nn.Module:
    """The fused form of a norm, or of an RMSNorm and the activation behind it.

    ``fuse(nn.LayerNorm(n))`` is a FastLayerNorm, ``fuse(nn.RMSNorm(n))`` a FastRMSNorm,
    ``fuse(nn.RMSNorm(n), nn.SiLU())`` a FastFusedRMSNormActivation. The new module owns the very parameters of the norm, so
    values, dtype, device, requires_grad and optimizers that hold them stay; the state_dict is the norm's, and so are eps and
    the training mode.

    Raises:
        TypeError: no fused form is known for these modules; subclasses, parametrized modules and modules with hooks are
            refused, since they may compute something else.

    >>> norm = torch.nn.RMSNorm(8)
    >>> trinix.fuse(norm, torch.nn.SiLU()).weight is norm.weight
    True
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"fuse: modules must be torch.nn modules, got {type(module).__name__}")
        if hooks := [name for name in _HOOKS if getattr(module, name)]:
            raise TypeError(f"fuse: {type(module).__name__} has hooks ({hooks[0]}), which a fused module would not run")
        if more := [*module._buffers, *module._modules]:
            raise TypeError(
                f"fuse: {type(module).__name__} has more than its own parameters ({more[0]!r}), which a fused module would not "
                "keep; take it out first"
            )
        if "forward" in module.__dict__:
            raise TypeError(
                f"fuse: {type(module).__name__} has a forward of its own, which a fused module would not run; delete it first"
            )
    types = [type(module) for module in modules]
    norm = modules[0] if modules else None
    if types in ([FastLayerNorm], [FastRMSNorm]):
        return norm
    if types == [nn.LayerNorm]:
        return _of_norm(FastLayerNorm(norm.normalized_shape, norm.eps, False), norm)
    if types == [nn.RMSNorm]:
        return _of_norm(FastRMSNorm(norm.normalized_shape, norm.eps, False), norm)
    if len(types) == 2 and types[0] in (nn.RMSNorm, FastRMSNorm) and (kind := _kind_of(modules[1])):
        chosen = {"weight_offset": norm.weight_offset, "use_triton": norm.use_triton} if types[0] is FastRMSNorm else {}
        return _of_norm(FastFusedRMSNormActivation(norm.normalized_shape, kind, norm.eps, False, **chosen), norm)
    raise TypeError(
        "fuse: no fused form for (" + ", ".join(one.__name__ for one in types) + "); known are LayerNorm, RMSNorm, and "
        f"RMSNorm with an activation of {list(FUSED_KINDS)}, each of exactly torch.nn's or trinix's type"
    )


_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def _kind_of(module: nn.Module) -> str | None:
    if type(module) in (nn.GELU, activation.FastGELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _ACTIVATION_KINDS.get(type(module))


def _of_norm(fused: nn.Module, norm: nn.Module) -> nn.Module:
    """``fused``, made without parameters, with the parameters and the mode of ``norm``."""
    for name, parameter in norm._parameters.items():
        fused.register_parameter(name, parameter)
    fused.elementwise_affine = norm.elementwise_affine
    return fused.train(norm.training)
