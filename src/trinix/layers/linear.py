"""``torch.nn.Linear`` for layers that decode."""

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from trinix.ops.linear import linear, linears

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FastLinear(nn.Linear):
    """``torch.nn.Linear``: the same arguments, parameters, shapes and errors.

    One row of float16 or bfloat16 on a GPU, where no gradient is wanted, goes to a kernel that reads the weights faster than
    PyTorch's matrix product does. ``torch.compile`` and ``trinix.use_backend("torch")`` leave everything to PyTorch.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def only_multiplies(proj: nn.Module) -> bool:
    """Whether a call of ``proj`` does nothing that its weight and bias do not say: no LoRA, quantisation, hook or shard."""
    return type(proj) is FastLinear and unhooked(proj)


def projected(x: Tensor, *projections: nn.Module) -> list[Tensor]:
    """What each of the projections makes of x."""
    if all(map(only_multiplies, projections)):
        return linears(x, [(p.weight, p.bias) for p in projections])
    return [p(x) for p in projections]


def unhooked(module: nn.Module) -> bool:
    """Whether a call of ``module`` is its class's forward and nothing else."""
    return (
        "forward" not in module.__dict__
        and not any(getattr(module, name) for name in HOOKS)
        and not torch_module._has_any_global_hook()
    )
