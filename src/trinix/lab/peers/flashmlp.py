"""flashmlp (dtadpole/flashMLP), the kernel behind document 000: one file without a package, timed where it can be imported.

It chooses among its tiles by trying them, on the first call of a shape.
"""

import importlib.util
from collections.abc import Callable

import torch

from trinix.lab.case import Case

# of any other name it computes "none"
KINDS = {"none": "", "silu": "silu", "leaky_relu": "leaky_relu", "sigmoid": "sigmoid"}
# its largest tile, of rows and of hidden columns; forward reads and writes past an end inside of one
ROWS, HIDDEN = 128, 64


def refuses(case: Case) -> str | None:
    """Why it cannot do a case. It would not say so, but give a wrong result."""
    if case.args["kind"] not in KINDS:
        return f"flashmlp has {list(KINDS)} only"
    if set(case.shape) != {"x", "w1", "w2"} or len(case.shape["x"]) != 3:
        return "flashmlp has x of every head, and neither gates nor biases"
    if case.dtype not in (torch.float16, torch.bfloat16):
        return "flashmlp multiplies in float16, bfloat16 and tf32"
    _, rows, d = case.shape["x"]
    hidden = case.shape["w1"][-1]
    if rows % ROWS or hidden % HIDDEN:
        return f"flashmlp reads past the end unless B is a multiple of {ROWS} and E of {HIDDEN}"
    if d < 16 or d & (d - 1):
        return "flashmlp needs a D that is a power of two from 16 on"
    return None


def prepare(case: Case) -> Callable | str | None:
    if case.op != "head_mlp":
        return None
    if importlib.util.find_spec("flashmlp") is None:
        return "not installed"
    if reason := refuses(case):
        return reason
    if not torch.cuda.is_available():
        return "timed on a GPU only"
    from flashmlp import FlashMLPFunction

    kind = KINDS[case.args["kind"]]
    return lambda x, w1, w2: FlashMLPFunction.apply(x, w1, w2, kind)
