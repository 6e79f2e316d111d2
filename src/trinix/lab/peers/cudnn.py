"""cuDNN's attention through PyTorch's own operator, without the choosing around it."""

from collections.abc import Callable

import torch

from trinix.lab import attention, layers
from trinix.lab.case import Case


def prepare(case: Case) -> Callable | str | None:
    if case.op not in ("attention", "attention_layers", "attention_decode"):
        return None
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "timed on an NVIDIA GPU only"
    run, causal = torch.ops.aten._scaled_dot_product_cudnn_attention, case.args.get("causal", False)

    def core(q, k, v):
        grad = torch.is_grad_enabled() and q.requires_grad
        return run(q, k, v, None, grad, 0.0, causal)[0]

    if case.op == "attention_decode":
        if case.shape["queries"][1] > 1:
            return "its causal mask begins at the first key"
        return attention.decoding(case, core)
    if case.op == "attention_layers":
        return layers.of(case, lambda q, k, v, _: core(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2))
    return attention.heads_first(case, core)
