"""flash-attn-4 (written against 4.0.0b36): CuTe kernels for Hopper and later."""

import importlib.util
import os
from collections.abc import Callable

import torch

from trinix.lab import attention, layers
from trinix.lab.case import Case
from trinix.lab.record import PACKAGES

# It reads this when it is imported: what it compiles stays on disk, where ``trinix bench --warm`` and the next run find it.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")

MODULES = ("flash_attn.cute", "quack", "tvm_ffi", "cutlass")


def lacking() -> str | None:
    """What is not there, in words."""
    for module in MODULES:
        package = PACKAGES[module]
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # of the part before the dot
            found = None
        if found is None and module == "cutlass":
            return (
                f"{package} is not installed, or lies in a folder that pip --target filled: its .pth file has to be processed "
                "by site.addsitedir"
            )
        if found is None:
            return f"{package} is not installed"
    return None


def prepare(case: Case) -> Callable | str | None:
    if case.op not in ("attention", "attention_layers", "attention_decode"):
        return None
    if reason := lacking():
        return reason
    if not torch.cuda.is_available():
        return "timed on a GPU only"
    if case.op == "attention_decode":
        return _decode(case)
    from flash_attn.cute import flash_attn_func

    causal = case.args["causal"]
    if case.op == "attention_layers":
        return layers.of(case, lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal)[0])
    return attention.of(case, lambda q, k, v: flash_attn_func(q, k, v, causal=causal)[0])


def _decode(case: Case) -> Callable | str:
    if "latent" in case.args:
        return "its kernels for latents are Blackwell's"
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    causal = case.shape["queries"][1] > 1
    # 0: as many parts of the keys as it finds best; its kernels for Hopper have no parts
    splits = 0 if torch.cuda.get_device_capability()[0] >= 10 else 1
    if "page" not in case.args:
        return lambda q, k, v: flash_attn_func(q, k, v, causal=causal, num_splits=splits)[0]
    here = torch.device("cuda")
    paged = {"page_table": attention.page_table(case, here), "seqused_k": attention.lengths(case, here)}
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, causal=causal, num_splits=splits, **paged)[0]
