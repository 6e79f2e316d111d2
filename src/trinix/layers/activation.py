"""Activation modules: drop-in for ``torch.nn``'s, whose own arguments go by name; one call into ``trinix.ops.activation`` each."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from trinix import dispatch, ops
from trinix.layers.arguments import check_use_triton, refuse_unknown
from trinix.ops.activation import triton_can_run


class _FastActivation(nn.Module):
    """y = f(x), elementwise on ``[..., hidden_size]`` or any shape.

    Args:
        hidden_size: accepted for the sake of the seed documents' signature; an int or None, which changes nothing.
        use_triton: None lets trinix choose, False means PyTorch, True means trinix's own kernels wherever they can run.
    """

    kind: ClassVar[str]
    own: ClassVar[tuple[str, ...]] = ()  # arguments of this kind alone

    def __init__(self, hidden_size: int | None = None, use_triton: bool | None = None, **unknown):
        super().__init__()
        refuse_unknown(type(self), unknown)
        check_use_triton(type(self).__name__, use_triton)
        if hidden_size is not None and type(hidden_size) is not int:
            name, other = type(self).__name__, "negative_slope, approximate, beta and threshold go by name"
            raise TypeError(f"{name}: hidden_size must be an int or None, got {hidden_size!r}; {other}")
        self.hidden_size = hidden_size
        self.use_triton = use_triton

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_kind(x, choose_backend(self.use_triton, triton_can_run, x))

    def _apply_kind(self, x: Tensor, backend: str) -> Tensor:
        return ops.activation(x, self.kind, backend=backend)

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name) for name in ("hidden_size", "use_triton", *self.own)}
        return ", ".join(f"{name}={value}" for name, value in shown.items() if value is not None)


def choose_backend(use_triton: bool | None, can_run: Callable[..., bool], *tensors: Tensor | None) -> str:
    """What a module's ``use_triton`` means for a call; ``can_run`` is the op's ``triton_can_run``."""
    if use_triton is None:
        return "auto"
    if not use_triton:
        return "torch"
    if not all(t is None or isinstance(t, Tensor) for t in tensors):  # "auto" says of which argument it is
        return "auto"
    return "triton" if can_run(*tensors) else "auto"


class FastReLU(_FastActivation):
    kind = "relu"


class FastSigmoid(_FastActivation):
    kind = "sigmoid"


class FastSiLU(_FastActivation):
    kind = "silu"


class FastGELU(_FastActivation):
    """GELU with erf, or with ``approximate="tanh"`` its tanh approximation; arguments as in ``trinix.FastReLU``."""

    own = ("approximate",)

    def __init__(
        self, hidden_size: int | None = None, use_triton: bool | None = None, *, approximate: str = "none", **unknown
    ):
        super().__init__(hidden_size, use_triton, **unknown)
        if approximate not in ("none", "tanh"):
            raise ValueError(f"FastGELU: approximate must be 'none' or 'tanh', got {approximate!r}")
        self.approximate = approximate

    def _apply_kind(self, x: Tensor, backend: str) -> Tensor:
        return ops.gelu(x, self.approximate, backend=backend)


class FastQuickGELU(_FastActivation):
    kind = "quick_gelu"


class FastSquaredReLU(_FastActivation):
    kind = "squared_relu"


class FastMish(_FastActivation):
    kind = "mish"


class FastLeakyReLU(_FastActivation):
    """x where x > 0, else ``negative_slope`` x; other arguments as in ``trinix.FastReLU``.

    ``torch.nn.LeakyReLU(0.2)`` is ``FastLeakyReLU(negative_slope=0.2)``: the first argument is ``hidden_size`` here too.
    """

    own = ("negative_slope",)

    def __init__(
        self,
        hidden_size: int | None = None,
        use_triton: bool | None = None,
        *,
        negative_slope: float = 0.01,
        **unknown,
    ):
        super().__init__(hidden_size, use_triton, **unknown)
        self.negative_slope = dispatch.number("FastLeakyReLU", "negative_slope", negative_slope)

    def _apply_kind(self, x: Tensor, backend: str) -> Tensor:
        return ops.leaky_relu(x, self.negative_slope, backend=backend)


class FastTanh(_FastActivation):
    kind = "tanh"


class FastSoftplus(_FastActivation):
    """log(1 + exp(beta x)) / beta, x where beta x > threshold; other arguments as in ``trinix.FastReLU``.

    ``torch.nn.Softplus(2)`` is ``FastSoftplus(beta=2)``: the first argument is ``hidden_size`` here too.
    """

    own = ("beta", "threshold")

    def __init__(
        self,
        hidden_size: int | None = None,
        use_triton: bool | None = None,
        *,
        beta: float = 1.0,
        threshold: float = 20.0,
        **unknown,
    ):
        super().__init__(hidden_size, use_triton, **unknown)
        self.beta = dispatch.number("FastSoftplus", "beta", beta)
        self.threshold = dispatch.number("FastSoftplus", "threshold", threshold)
        if self.beta == 0:
            raise ValueError("FastSoftplus: beta must not be 0, got 0")

    def _apply_kind(self, x: Tensor, backend: str) -> Tensor:
        return ops.softplus(x, self.beta, self.threshold, backend=backend)
