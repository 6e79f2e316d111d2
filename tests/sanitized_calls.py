"""Small calls of the attention kernels, both passes, for compute-sanitizer: ``tests/kernels/test_sanitizer.py`` starts it.

``python sanitized_calls.py GROUP [broken]``: a group of ``GROUPS``; "broken": the Hopper forward's producer tells the consumers
an item before it has written its number, which racecheck has to see. Prints a line a call.
"""

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from trinix.kernels.hopper import attention as hopper
from trinix.kernels.hopper import attention_forward
from trinix.ops import attention, attention_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the portable groups, in the interpreter
CAUSAL = {"causal": True}
OPTIONS = {
    "full": {}, "causal": CAUSAL, "window": {"window": (100, 20)}, "softcap": {"softcap": 20.0} | CAUSAL, "alibi": CAUSAL,
    "varlen": CAUSAL, "deterministic": {"deterministic": True} | CAUSAL, "gqa": CAUSAL,
    "sink": {}, "sink and softcap": {"softcap": 20.0},
}  # fmt: skip
PORTABLE = OPTIONS | {"bias": {}, "mask": {}, "dropout": {"dropout_p": 0.1}}
# group -> (head dimensions of QK and V, options, queries, keys)
GROUPS = {
    "64": ([(64, 64)], OPTIONS, 200, 330),
    "128": ([(128, 128)], OPTIONS, 200, 330),
    "192": ([(192, 128)], OPTIONS, 200, 330),
    "256": ([(256, 256)], OPTIONS, 200, 330),
    "short": ([(64, 64), (128, 128)], ("full", "causal", "gqa"), 200, 330),  # the kernels of short calls
    "few": ([(64, 64), (128, 128)], ("full", "causal"), 520, 1100),  # programs that draw items, and share the last ones
    "portable": ([(64, 64), (128, 128)], PORTABLE, 200, 330),
    "decode": ([(64, 64), (128, 128)], ("contiguous", "paged", "appended", "four queries"), 1, 300),
}


@gluon.jit
def told_too_early(idx, t, work_s, work_full, work_empty):
    """``attention_scores.publish``, in the wrong order."""
    each: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    w = t % 2
    mbarrier.wait(work_empty.index(w), ((t // 2) & 1) ^ 1)
    mbarrier.arrive(work_full.index(w), count=1)
    work_s.index(w).store(gl.full([128], idx, gl.int32, each).to(gl.int64))


def number(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def call(d: int, dv: int, option: str, queries: int, keys: int, backend: str) -> list[torch.Tensor]:
    """The results and the gradients of one call."""
    batch = () if option == "varlen" else (1,)
    key_heads = 1 if option == "gqa" else 2
    leaves = number(*batch, queries, 2, d), number(*batch, keys, key_heads, d), number(*batch, keys, key_heads, dv)
    more = dict(PORTABLE[option])
    if option == "varlen":
        ends = [[0, queries // 3, queries // 3, queries], [0, keys // 3, keys // 2, keys]]
        of_q, of_k = (torch.tensor(e, dtype=torch.int32, device=DEVICE) for e in ends)
        more |= {"cu_seqlens_q": of_q, "cu_seqlens_k": of_k, "max_seqlen_q": queries, "max_seqlen_k": keys}
    elif option == "alibi":
        more["alibi_slopes"] = torch.rand(2, device=DEVICE)
    elif option == "mask":
        more["mask"] = torch.rand(1, 1, queries, keys, device=DEVICE) < 0.7
    elif option == "bias":
        more["bias"] = number(1, 2, queries, keys)
    elif "sink" in option:
        more["sink"] = torch.randn(2, device=DEVICE)
    leaves = [*leaves, *(more[name] for name in ("bias", "sink") if name in more)]
    for leaf in leaves:
        leaf.requires_grad_()
    out = attention(*leaves[:3], backend=backend, **more)
    return [out, *torch.autograd.grad(out, leaves, torch.randn_like(out))]


def decode(d: int, dv: int, option: str, queries: int, keys: int) -> list[torch.Tensor]:
    lengths = torch.tensor([keys - 7, keys // 2], dtype=torch.int32, device=DEVICE)
    caches, more = (number(2, keys, 2, d), number(2, keys, 2, dv)), {}
    if option == "paged":
        pages = -(-keys // 16)
        caches = number(2 * pages, 16, 2, d), number(2 * pages, 16, 2, dv)
        order = torch.randperm(2 * pages, device=DEVICE)
        more["page_table"] = order.to(torch.int32).reshape(2, pages)
    elif option == "appended":
        more |= {"k_new": number(2, 1, 2, d), "v_new": number(2, 1, 2, dv)}
    q = number(2, 4 if option == "four queries" else queries, 8, d)
    return [attention_decode(q, *caches, lengths, num_splits=4, backend="triton", **more)]


def main(group: str, broken: bool) -> None:
    torch.manual_seed(0)
    if group in ("64", "128", "192", "256", "few"):
        hopper.choose_short = hopper.choose_short_backward = lambda *call: None
    if group == "few":
        hopper._multiprocessors = lambda device: 3
    if broken:
        attention_forward.publish = told_too_early
    dims, options, *lengths = GROUPS[group]
    for d, dv in dims:
        for option in options:
            if group == "decode":
                results = decode(d, dv, option, *lengths)
            else:
                results = call(d, dv, option, *lengths, "triton" if group == "portable" else "hopper")
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            assert all(t.isfinite().all() for t in results)
            print(f"ran {d} {dv} {option}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], "broken" in sys.argv[2:])
