"""The FlashAttention 2 inside PyTorch, by its own operator, without the choosing around it."""

from collections.abc import Callable

import torch

from trinix.lab import attention
from trinix.lab.case import Case


def prepare(case: Case) -> Callable | str | None:
    if case.op != "attention":
        return None
    if not torch.cuda.is_available() or not torch.backends.cuda.is_flash_attention_available():
        return "timed on a GPU only, by a PyTorch that has it"
    if case.shape["q"][-1] != case.shape["v"][-1]:
        return "it has one head dimension"
    run, causal = torch.ops.aten._scaled_dot_product_flash_attention, case.args["causal"]
    return attention.heads_first(case, lambda q, k, v: run(q, k, v, 0.0, causal)[0])
