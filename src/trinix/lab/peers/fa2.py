"""The FlashAttention 2 inside PyTorch, by its own operator, without the choosing around it."""

from collections.abc import Callable

import torch

from trinix.lab import attention
from trinix.lab.case import Case


def prepare(case: Case) -> Callable | str | None:
    if case.op not in ("attention", "attention_decode"):
        return None
    if not torch.cuda.is_available() or not torch.backends.cuda.is_flash_attention_available():
        return "timed on a GPU only, by a PyTorch that has it"
    run = torch.ops.aten._scaled_dot_product_flash_attention
    if case.op == "attention_decode":  # its causal mask ends at the last key
        causal = case.shape["queries"][1] > 1
        return attention.decoding(case, lambda q, k, v: run(q, k, v, 0.0, causal)[0])
    if case.shape["q"][-1] != case.shape["v"][-1]:
        return "it has one head dimension"
    causal = case.args["causal"]
    return attention.heads_first(case, lambda q, k, v: run(q, k, v, 0.0, causal)[0])
