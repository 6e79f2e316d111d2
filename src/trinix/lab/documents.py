"""The seed documents' own benchmark commands, as arguments of the lab."""

import argparse
import sys
from pathlib import Path

import torch

from trinix.lab.case import Case, load_cases

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
KINDS = ("quick_gelu", "squared_relu", "mish")  # the activations of document 002 that need no projection


def benchmark_activation(argv: list[str] | None = None) -> int:
    """Document 002: its four configurations, or the one that the flags name."""
    parser = argparse.ArgumentParser(
        prog="benchmark_activation.py",
        description="Activations of seed document 002 against PyTorch and torch.compile.",
    )
    parser.add_argument(
        "--hidden_size", type=int, help="last dimension; without it the document's four configurations run"
    )
    parser.add_argument("--seq_len", type=int, default=8192)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument(
        "--kind", action="append", default=[], help=f"an activation (may be repeated; default: {KINDS})"
    )
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_activation"), help="folder of result files")
    flags = parser.parse_args(argv)
    from rich.console import Console

    from trinix.lab import bench
    from trinix.lab.peers import PREPARE
    from trinix.ops import KINDS as ALL_KINDS

    if unknown := set(flags.kind) - set(ALL_KINDS):
        parser.error(f"--kind must be among {list(ALL_KINDS)}, got {sorted(unknown)}")
    if flags.hidden_size is None:
        cases = [c for c in load_cases("seeds") if c.document == "002" and c.args["kind"] in (flags.kind or KINDS)]
        cases += [c for c in load_cases("seeds") if c.document == "002" and c.op == "glu"]
    else:
        sizes = (flags.batch_size, flags.seq_len, flags.hidden_size)
        if min(sizes) < 1:
            parser.error(f"--batch_size, --seq_len and --hidden_size must be positive, got {sizes}")
        cases = [_case(kind, sizes, DTYPES[flags.dtype]) for kind in flags.kind or KINDS]
    console = Console(width=None if sys.stdout.isatty() else 200)
    return bench.bench_cases(cases, tuple(PREPARE), flags.out, console, kernels=False, cpu_elements=1 << 62)


def _case(kind: str, sizes: tuple[int, ...], dtype: torch.dtype) -> Case:
    name = f"{kind}-{'x'.join(map(str, sizes))}"
    passes = ("fwd", "bwd", "fwd_bwd")
    return Case(name, "activation", {"kind": kind}, {"x": sizes}, dtype, passes, "002", "A100-SXM4-80GB", ("full",))
