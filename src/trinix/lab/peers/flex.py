"""PyTorch's FlexAttention, compiled, with a block mask where it is causal."""

from collections.abc import Callable
from functools import cache

import torch

from trinix.lab import attention
from trinix.lab.case import Case


@cache
def _compiled() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = (
        1000  # one compilation a case: beyond the limit it would silently run its formula
    )
    torch._functorch.config.donated_buffer = False  # as in compile.py
    return torch.compile(flex_attention, dynamic=False)


@cache
def _causal(queries: int, keys: int):
    from torch.nn.attention.flex_attention import create_block_mask

    hidden = keys - queries  # keys before the first query: the last query stands at the last key
    return create_block_mask(lambda b, h, i, j: i + hidden >= j, None, None, queries, keys, device="cuda")


def prepare(case: Case) -> Callable | str | None:
    if case.op not in ("attention", "attention_decode"):
        return None
    if not torch.cuda.is_available():
        return "timed on a GPU only"
    if case.op == "attention_decode":
        count, heads = case.shape["queries"][1:3]
        mask, gqa = _causal(count, attention.keys(case)) if count > 1 else None, heads != case.shape["k_cache"][2]
        return attention.decoding(case, lambda q, k, v: _compiled()(q, k, v, block_mask=mask, enable_gqa=gqa))
    length = case.shape["q"][2 if case.args.get("layout") == "BHSD" else 1]
    mask = _causal(length, length) if case.args["causal"] else None
    gqa = attention.grouped(case)
    return attention.heads_first(case, lambda q, k, v: _compiled()(q, k, v, block_mask=mask, enable_gqa=gqa))
