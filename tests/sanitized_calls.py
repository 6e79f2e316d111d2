"""Small calls of the Hopper attention kernels, both passes, for compute-sanitizer: ``tests/kernels/test_sanitizer.py`` starts it.

``python sanitized_calls.py GROUP [BROKEN]``: a group of ``GROUPS``; with BROKEN the forward's producer tells the consumers an
item before it has written its number, which racecheck has to see. Prints a line a call, "done" at the end.
"""

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from trinix.kernels.hopper import attention as hopper
from trinix.kernels.hopper import attention_forward
from trinix.ops import attention

CAUSAL = {"causal": True}
OPTIONS = {
    "full": {}, "causal": CAUSAL, "window": {"window": (100, 20)}, "softcap": {"softcap": 20.0} | CAUSAL, "alibi": CAUSAL,
    "varlen": CAUSAL, "deterministic": {"deterministic": True} | CAUSAL, "gqa": CAUSAL,
    "sink": {}, "sink and softcap": {"softcap": 20.0},
}  # fmt: skip
# group -> (head dimensions of QK and V, options, queries, keys)
GROUPS = {
    "64": ([(64, 64)], OPTIONS, 200, 330),
    "128": ([(128, 128)], OPTIONS, 200, 330),
    "192": ([(192, 128)], OPTIONS, 200, 330),
    "256": ([(256, 256)], OPTIONS, 200, 330),
    "short": ([(64, 64), (128, 128)], ("full", "causal", "gqa"), 200, 330),  # the kernel of short calls
    "few": ([(64, 64), (128, 128)], ("full", "causal"), 520, 1100),  # programs that draw items, and share the last ones
}


@gluon.jit
def told_too_early(idx, t, work_s, work_full, work_empty):
    """``attention_scores.publish``, in the wrong order."""
    each: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    w = t % 2
    mbarrier.wait(work_empty.index(w), ((t // 2) & 1) ^ 1)
    mbarrier.arrive(work_full.index(w), count=1)
    work_s.index(w).store(gl.full([128], idx, gl.int32, each).to(gl.int64))


def call(d: int, dv: int, option: str, queries: int, keys: int) -> None:
    def tensor(rows, heads, width):
        batch = () if option == "varlen" else (1,)
        shape = (*batch, rows, heads, width)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    more = dict(OPTIONS[option])
    if option == "varlen":
        ends = [[0, 70, 70, queries], [0, 100, 130, keys]]
        of_q, of_k = (torch.tensor(e, dtype=torch.int32, device="cuda") for e in ends)
        more |= {"cu_seqlens_q": of_q, "cu_seqlens_k": of_k, "max_seqlen_q": queries, "max_seqlen_k": keys}
    elif option == "alibi":
        more["alibi_slopes"] = torch.rand(2, device="cuda")
    elif "sink" in option:
        more["sink"] = torch.randn(2, device="cuda")
    q, k, v = (tensor(queries, 2, d), *(tensor(keys, 1 if option == "gqa" else 2, width) for width in (d, dv)))
    out = attention(q, k, v, backend="hopper", **more)
    out.backward(torch.randn_like(out))
    torch.cuda.synchronize()
    assert all(torch.isfinite(t).all() for t in (out, q.grad, k.grad, v.grad))
    print(f"ran {d} {dv} {option}", flush=True)


def main(group: str, broken: bool) -> None:
    torch.manual_seed(0)
    if group != "short":
        hopper.choose_short = lambda *call: None
    if group == "few":
        hopper._multiprocessors = lambda device: 3
    if broken:
        attention_forward.publish = told_too_early
    dims, options, queries, keys = GROUPS[group]
    for d, dv in dims:
        for option in options:
            call(d, dv, option, queries, keys)
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], "broken" in sys.argv[2:])
