"""torch.compile of the eager form, one static compilation a case, as its users get it."""

from collections.abc import Callable

import torch

from trinix.lab.case import Case
from trinix.lab.peers import eager


def prepare(case: Case) -> Callable | str | None:
    function = eager.core(case)
    if function is None:
        return None
    if not torch.cuda.is_available():
        return "timed on a GPU only"
    torch._dynamo.reset()
    # the lab runs one backward many times (retain_graph), which donated buffers forbid
    torch._functorch.config.donated_buffer = False
    return eager.around(case, torch.compile(function, dynamic=False, fullgraph=True))
