"""Correctness of every kernel without a GPU: Triton's interpreter, float64 oracle, both passes, all dtypes and layouts.

The interpreter runs the kernels' own text on the CPU. It proves indexing, masks and formulas; it knows nothing of speed,
races, or the GPU's approximate exp. It has to be chosen before Triton is imported, so ``check`` runs this module in a
process of its own: ``TRITON_INTERPRET=1 python -m trinix.lab.interpret`` prints one JSON object a check.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

LAYOUTS = ("contiguous", "every second column", "transposed", "broadcast row")
DTYPES = ("float32", "bfloat16", "float16")


def check() -> Iterator[dict]:
    """Yield {"kernel", "dtype", "layout", "error_ratio", "ok", "reason"} for every check, as they finish."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "trinix.lab.interpret"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout:
            yield json.loads(text)
    if process.returncode:
        raise RuntimeError(f"the interpreter run ended with exit status {process.returncode}")


def _view(base, layout: str):
    return {
        "contiguous": base,
        "every second column": base[:, ::2],
        "transposed": base.t(),
        "broadcast row": base[:1].expand(base.shape),
    }[layout]


def _activations() -> Iterator[dict]:
    import torch

    from trinix import ops, testing

    for kind in ops.KINDS[1:]:
        for name in DTYPES:
            dtype = getattr(torch, name)
            base = testing.normal((65, 130), dtype, seed=1, scale=3.0)
            for layout in LAYOUTS:
                x = _view(base, layout)
                dy = testing.normal(x.shape, dtype, seed=2)
                ours = partial(ops.activation, kind=kind, backend="triton")
                plain = partial(ops.activation, kind=kind, backend="torch")
                got, low = testing.vjp(ours, [x], dy), testing.vjp(plain, [x], dy)
                true = testing.vjp(plain, [x.double()], dy.double())
                verdicts = [testing.judge(n, g, p, t) for n, g, p, t in zip(("y", "dx"), got, low, true, strict=True)]
                bad = [str(v) for v in verdicts if not v.ok]
                yield {
                    "kernel": f"activation/{kind}",
                    "dtype": name,
                    "layout": layout,
                    "error_ratio": max(v.ratio for v in verdicts),
                    "ok": not bad,
                    "reason": "; ".join(bad) or None,
                }


CHECKS = (_activations,)


def main() -> int:
    for one in CHECKS:
        for result in one():
            print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
