"""Gated linear units with their projections: one matrix product for gate and up, one call into ``trinix.ops.glu``, and with
``output_dim`` the whole feed-forward block of LLaMA or T5. The elementwise forms are ``trinix.ops.swiglu``, ``geglu``, ``reglu``.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from trinix import dispatch, ops
from trinix.layers.activation import choose_backend
from trinix.layers.arguments import (
    check_entry,
    check_numbers,
    check_state,
    check_use_triton,
    refuse_made_weights,
    refuse_unknown,
    sharded,
)
from trinix.layers.linear import FastLinear, only_multiplies
from trinix.ops.glu import BACKENDS, linear_glu, sums_bias, triton_can_run

# what checkpoints call (gate, up, down)
NAMES = {
    "llama": ("gate_proj", "up_proj", "down_proj"),
    "t5": ("wi_0", "wi_1", "wo"),
}


class _FastGLU(nn.Module):
    """f(x Wg^T + bg) * (x Wu^T + bu), ``[..., input_dim] -> [..., hidden_dim]``; with ``output_dim`` times Wd^T, plus bd.

    ``gate_up_proj`` holds Wg above Wu, so that one product computes both; ``down_proj`` is None without ``output_dim``.

    The arguments are described in ``FastSwiGLU``.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        output_dim: int | None = None,
        bias: bool = True,
        use_triton: bool | None = None,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown,
    ):
        super().__init__()
        name = type(self).__name__
        refuse_unknown(type(self), unknown)
        check_use_triton(name, use_triton)
        dispatch.check_name(name, BACKENDS, backend)
        for argument, size in (("input_dim", input_dim), ("hidden_dim", hidden_dim), ("output_dim", output_dim)):
            if not (size is None and argument == "output_dim") and (type(size) is not int or size < 1):
                raise ValueError(f"{name}: {argument} must be an int from 1 on, got {size!r}; bias goes by name")
        dispatch.flags(name, bias=bias)
        if use_triton is not None and backend != "auto":
            raise ValueError(f"{name}: use_triton={use_triton} and backend={backend!r} both choose; give one of them")
        self.input_dim = input_dim
        self.hidden_dim = hidden_dim
        self.output_dim = output_dim
        self.use_triton = use_triton
        self.backend = backend
        self.gate_up_proj = FastLinear(input_dim, 2 * hidden_dim, bias, device, dtype)
        self.down_proj = FastLinear(hidden_dim, output_dim, bias, device, dtype) if output_dim else None

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: x must be a tensor, got {type(x).__name__}")
        if x.shape[-1:] != (self.input_dim,):
            raise ValueError(
                f"{type(self).__name__}: x must be [..., {self.input_dim}], got {list(x.shape)}; input_dim is the last dimension"
            )
        if self._sums_bias(x):
            hidden = linear_glu(x, self.gate_up_proj.weight, self.gate_up_proj.bias, self.kind)
        else:
            packed = self.gate_up_proj(x)
            hidden = ops.glu(packed, kind=self.kind, backend=self._backend_for(packed))
        return hidden if self.down_proj is None else self.down_proj(hidden)

    def _sums_bias(self, x: Tensor) -> bool:
        """Whether the kernel that writes the product's gradient sums the bias's too: the product then runs without its module,
        which must be one that does nothing else."""
        proj = self.gate_up_proj
        return (
            not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()  # a trace records that the bias was looked at
            and only_multiplies(proj)
            and proj.bias is not None
            and sums_bias(x, proj.weight, proj.bias, self._backend_for(x))
        )

    def _backend_for(self, x: Tensor) -> str:
        return self.backend if self.use_triton is None else choose_backend(self.use_triton, triton_can_run, x)

    def load_checkpoint(self, state: Mapping[str, Tensor], names: str = "llama", prefix: str = "") -> None:
        """Copy the weights (and biases) of separate projections, ``state[prefix + name + ".weight"]``.

        Args:
            state: a state_dict; entries that do not belong to this block are left alone.
            names: "llama" (gate_proj, up_proj, down_proj) or "t5" (wi_0, wi_1, wo).
            prefix: what stands before the names, such as "model.layers.0.mlp.".

        Raises:
            ValueError: an entry is missing, is of another shape, or has no place in this module; a projection's weight is
                no parameter of its own (parametrized, pruned, wrapped).
            TypeError: an entry is no tensor of numbers as they are: 8 bits and integers are codes that a scale belongs to.
        """
        refuse_made_weights(type(self).__name__, self.gate_up_proj, self.down_proj)
        found = _entries(type(self).__name__, state, names, prefix)
        wanted = self.checkpoint(names, prefix)
        if found.keys() != wanted.keys():
            raise ValueError(
                f"{type(self).__name__}: load_checkpoint wanted {sorted(wanted)}, got {sorted(found)} under the prefix "
                f"{prefix!r}; check names, prefix, bias and output_dim"
            )
        for key, place in wanted.items():
            check_entry(type(self).__name__, key, place, found[key])
        with torch.no_grad():
            for key, place in wanted.items():
                place.copy_(found[key])
            if sharded(self.gate_up_proj.weight):
                gate, up, _ = _names(type(self).__name__, names)
                for kind, parameter in self.gate_up_proj.named_parameters():
                    parameter.copy_(torch.cat([wanted[f"{prefix}{one}.{kind}"] for one in (gate, up)]))

    def checkpoint(self, names: str = "llama", prefix: str = "") -> dict[str, Tensor]:
        """The parameters as separate projections under a checkpoint's names: detached views, no copies."""
        gate, up, down = _names(type(self).__name__, names)
        state = {}
        for kind in ("weight", "bias"):
            both = getattr(self.gate_up_proj, kind)
            if both is not None:
                halves = both.detach().chunk(2)
                state |= {f"{prefix}{gate}.{kind}": halves[0], f"{prefix}{up}.{kind}": halves[1]}
                if self.down_proj is not None:
                    state[f"{prefix}{down}.{kind}"] = getattr(self.down_proj, kind).detach()
        return state

    @classmethod
    def from_checkpoint(cls, state: Mapping[str, Tensor], names: str = "llama", prefix: str = "", **more):
        """A module of the sizes, dtype and device of a checkpoint's entries, holding copies of them.

        Args:
            state, names, prefix: as in ``load_checkpoint``.
            more: further arguments of the constructor.

        >>> mlp = torch.nn.ModuleDict({"gate_proj": torch.nn.Linear(4, 6), "up_proj": torch.nn.Linear(4, 6)})
        >>> trinix.FastSwiGLU.from_checkpoint(mlp.state_dict())
        FastSwiGLU(
          4, 6
          (gate_up_proj): FastLinear(in_features=4, out_features=12, bias=True)
        )
        """
        found = _entries(cls.__name__, state, names, prefix)
        gate, _, down = _names(cls.__name__, names)
        weight = found.get(f"{prefix}{gate}.weight")
        if weight is None:
            raise ValueError(f"{cls.__name__}: from_checkpoint found no {prefix}{gate}.weight; check names and prefix")
        for key, value in found.items():
            check_numbers(cls.__name__, key, value)
        if weight.dim() != 2:
            raise ValueError(
                f"{cls.__name__}: {prefix}{gate}.weight must be [hidden_dim, input_dim], got {list(weight.shape)}; reshape it"
            )
        output = found.get(f"{prefix}{down}.weight")
        sizes = weight.shape[1], weight.shape[0], None if output is None else output.shape[0]
        bias = f"{prefix}{gate}.bias" in found
        module = cls(*sizes, bias=bias, **{"device": weight.device, "dtype": weight.dtype} | more)
        module.load_checkpoint(state, names, prefix)
        return module

    def extra_repr(self) -> str:
        sizes = [self.input_dim, self.hidden_dim, *([self.output_dim] if self.output_dim else [])]
        shown = {"use_triton": self.use_triton, "backend": None if self.backend == "auto" else self.backend}
        return ", ".join([*map(str, sizes), *(f"{n}={v}" for n, v in shown.items() if v is not None)])


def _names(name: str, names: str) -> tuple[str, str, str]:
    if not isinstance(names, str) or names not in NAMES:
        raise ValueError(f"{name}: names must be one of {list(NAMES)}, got {names!r}")
    return NAMES[names]


def _entries(name: str, state: Mapping[str, Tensor], names: str, prefix: str) -> dict[str, Tensor]:
    """The entries of ``state`` that belong to the block."""
    check_state(name, state)
    wanted = [f"{prefix}{one}.{kind}" for one in _names(name, names) for kind in ("weight", "bias")]
    return {key: state[key] for key in wanted if key in state}


class FastSwiGLU(_FastGLU):
    """silu(gate) * up with its projections, the feed-forward block of LLaMA: ``[..., input_dim] -> [..., hidden_dim]``.

    Args:
        input_dim, hidden_dim: widths of x, and of gate and of up.
        output_dim: width after ``down_proj``; None leaves that projection out.
        bias: every projection has one.
        use_triton: None lets trinix choose, False means PyTorch, True means trinix's own kernels wherever they can run.
        backend: as in ``trinix.ops.glu``, for the activation times up; not together with ``use_triton``.

    >>> trinix.FastSwiGLU(8, 24, bias=False)(torch.ones(2, 5, 8)).shape
    torch.Size([2, 5, 24])
    >>> trinix.FastSwiGLU(8, 24, 8, bias=False)(torch.ones(2, 5, 8)).shape  # with down_proj
    torch.Size([2, 5, 8])
    """

    kind = "swiglu"


class FastGeGLU(_FastGLU):
    """gelu(gate) * up with its projections; other arguments as in ``trinix.FastSwiGLU``.

    Args:
        approximate: "none" for gelu by erf, "tanh" for its tanh approximation, which T5 1.1 and Gemma were trained with.
    """

    kind = "geglu"

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        output_dim: int | None = None,
        bias: bool = True,
        use_triton: bool | None = None,
        *,
        approximate: str = "none",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown,
    ):
        super().__init__(
            input_dim, hidden_dim, output_dim, bias, use_triton, backend=backend, device=device, dtype=dtype, **unknown
        )
        if approximate not in ("none", "tanh"):
            raise ValueError(f"FastGeGLU: approximate must be 'none' or 'tanh', got {approximate!r}")
        self.approximate = approximate
        if approximate == "tanh":
            self.kind = "geglu_tanh"

    def extra_repr(self) -> str:
        return super().extra_repr() + (", approximate='tanh'" if self.approximate == "tanh" else "")


class FastReGLU(_FastGLU):
    """relu(gate) * up with its projections; arguments as in ``trinix.FastSwiGLU``."""

    kind = "reglu"
