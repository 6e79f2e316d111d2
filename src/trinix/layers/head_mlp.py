"""Per-head MLP modules and document 000's functions: parameters, one call into ``trinix.ops.head_mlp``."""

import torch
from torch import Tensor, nn

from trinix import dispatch, ops
from trinix.layers.activation import choose_backend
from trinix.layers.arguments import check_sizes, check_use_triton
from trinix.ops.head_mlp import GATED_KINDS, KINDS, triton_can_run


def _kind(name: str, activation: str, known: tuple[str, ...]) -> str:
    """The op's kind; the documents' "" is the identity, and nothing else that is empty or false."""
    kind = "none" if isinstance(activation, str) and not activation else activation
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"{name}: activation must be one of {['', *known]}, got {activation!r}")
    return kind


class FlashMLP(nn.Module):
    """``num_heads`` MLPs side by side, fused: x ``[H, B, hidden_dim]`` -> ``[H, B, hidden_dim]``.

    x of ``[B, hidden_dim]`` goes to every head, and the result is the average over heads, ``[B, hidden_dim]``.

    Args:
        num_heads: H.
        hidden_dim: D, the width of x and of the result.
        intermediate_dim: E, the width between the two projections.
        activation: a kind of ``trinix.ops.head_mlp``; "" is "none". A gated unit's name ("swiglu", "geglu", ...) adds a
            gate's weight.
        dtype, device: of the parameters, by default PyTorch's own (the document's modules are float16 on the GPU). x has
            to have them too.
        bias: add b1 and b2, which begin as zeros.
        use_triton: None lets trinix choose, False means PyTorch, True means trinix's own kernels wherever they can run.

    Weights begin normal with variance 1 / fan_in: 1 / hidden_dim for w1 and w_gate, 1 / intermediate_dim for w2.
    """

    def __init__(
        self,
        num_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        activation: str = "silu",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        bias: bool = False,
        use_triton: bool | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        check_sizes(name, num_heads=num_heads, hidden_dim=hidden_dim, intermediate_dim=intermediate_dim)
        check_use_triton(name, use_triton)
        dispatch.flags(name, bias=bias)
        kind = _kind(name, activation, KINDS)
        self.num_heads, self.hidden_dim, self.intermediate_dim = num_heads, hidden_dim, intermediate_dim
        self.activation, self.use_triton = kind, use_triton

        def parameter(*shape):
            return nn.Parameter(torch.empty(num_heads, *shape, dtype=dtype, device=device))

        self.w1 = parameter(hidden_dim, intermediate_dim)
        self.w2 = parameter(intermediate_dim, hidden_dim)
        gated = kind in GATED_KINDS
        self.register_parameter("w_gate", parameter(hidden_dim, intermediate_dim) if gated else None)
        self.register_parameter("b1", parameter(intermediate_dim) if bias else None)
        self.register_parameter("b2", parameter(hidden_dim) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.w1, self.w2, self.w_gate):
            if weight is not None:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        for bias in (self.b1, self.b2):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x, choose_backend(self.use_triton, triton_can_run, x, self.w1))

    def _call(self, x: Tensor, backend: str) -> Tensor:
        return ops.head_mlp(
            x, self.w1, self.w2, self.activation, b1=self.b1, b2=self.b2, w_gate=self.w_gate,
            reduce="mean" if isinstance(x, Tensor) and x.dim() == 2 else None, backend=backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        shown = f"{self.num_heads}, {self.hidden_dim}, {self.intermediate_dim}, activation={self.activation!r}"
        if self.b1 is not None:
            shown += ", bias=True"
        return shown if self.use_triton is None else f"{shown}, use_triton={self.use_triton}"


class PyTorchMLP(FlashMLP):
    """FlashMLP by PyTorch's own operations: the same arguments, parameters and state_dict, the reference."""

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x, "torch")


_UNGATED = tuple(kind for kind in KINDS if kind not in GATED_KINDS)  # the documents' functions have no gate's weight


def _documents_form(name, x, w1, w2, activation):
    mean = isinstance(x, Tensor) and x.dim() == 2
    return ops.head_mlp(x, w1, w2, _kind(name, activation, _UNGATED), reduce="mean" if mean else None)


class FlashMLPFunction:
    """``FlashMLPFunction.apply(x, w1, w2, activation)``: document 000's differentiable form of ``trinix.ops.head_mlp``."""

    @staticmethod
    def apply(x: Tensor, w1: Tensor, w2: Tensor, activation: str = "") -> Tensor:
        return _documents_form("FlashMLPFunction", x, w1, w2, activation)


def flashmlp_fwd(x: Tensor, w1: Tensor, w2: Tensor, activation: str = "") -> Tensor:
    """O = act(x w1) w2 a head, without a gradient; ``activation`` "" is the identity."""
    with torch.no_grad():
        return _documents_form("flashmlp_fwd", x, w1, w2, activation)


def flashmlp_bwd(x: Tensor, w1: Tensor, w2: Tensor, do: Tensor, activation: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw1, dw2) of ``flashmlp_fwd`` for the incoming gradient ``do``."""
    for name, t in (("x", x), ("w1", w1), ("w2", w2), ("do", do)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = str(t.dtype) if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(
                f"flashmlp_bwd: {name} must be a floating-point tensor, got {got}; convert it with .float()"
            )
    with torch.inference_mode(False), torch.enable_grad():
        # what inference mode has made autograd refuses, but not its copy
        leaves = [(t.clone() if t.is_inference() else t.detach()).requires_grad_() for t in (x, w1, w2)]
        out = _documents_form("flashmlp_bwd", *leaves, activation)
        if do.shape != out.shape:
            wanted = list(out.shape)
            raise ValueError(
                f"flashmlp_bwd: do must be of the output's shape {wanted}, got {list(do.shape)}; reshape it"
            )
        if do.device != out.device:
            raise ValueError(
                f"flashmlp_bwd: do must be on x's device {out.device}, got {do.device}; move it with do.to(x.device)"
            )
        return torch.autograd.grad(out, leaves, do)
