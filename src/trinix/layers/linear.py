"""``torch.nn.Linear`` for layers that decode."""

from torch import Tensor, nn

from trinix.ops.linear import linear


class FastLinear(nn.Linear):
    """``torch.nn.Linear``: the same arguments, parameters, shapes and errors.

    One row of float16 or bfloat16 on a GPU, where no gradient is wanted, goes to a kernel that reads the weights faster than
    PyTorch's matrix product does. ``torch.compile`` and ``trinix.use_backend("torch")`` leave everything to PyTorch.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
