"""The seed documents' own benchmark commands, as arguments of the lab."""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

from trinix.lab.case import DTYPES, Case, load_cases

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
    if importlib.util.find_spec("rich") is None:
        parser.error("needs the package rich, which is not installed; pip install 'trinix[lab]'")
    from rich.console import Console

    from trinix.lab import bench
    from trinix.lab.peers import PREPARE
    from trinix.ops import KINDS as ALL_KINDS

    if unknown := set(flags.kind) - set(ALL_KINDS):
        parser.error(f"--kind must be among {list(ALL_KINDS)}, got {sorted(unknown)}")
    if flags.hidden_size is None:
        if unknown := set(flags.kind) - set(KINDS):
            parser.error(f"--kind {sorted(unknown)[0]} needs --hidden_size: the document's own table has {list(KINDS)}")
        if given := [n for n in ("seq_len", "batch_size", "dtype") if getattr(flags, n) != parser.get_default(n)]:
            parser.error(f"--{given[0]} needs --hidden_size: without it the document's own configurations run")
        cases = [c for c in load_cases("seeds", ("activation", "glu")) if c.document == "002"]
        cases = [c for c in cases if c.op == "glu" or c.args["kind"] in (flags.kind or KINDS)]
    else:
        sizes = (flags.batch_size, flags.seq_len, flags.hidden_size)
        if min(sizes) < 1:
            parser.error(f"--batch_size, --seq_len and --hidden_size must be positive, got {sizes}")
        cases = [_case(kind, sizes, DTYPES[flags.dtype]) for kind in flags.kind or KINDS]
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        return bench.bench_cases(cases, tuple(PREPARE), flags.out, console, kernels=False, cpu_elements=1 << 62)
    except OSError as error:
        parser.error(f"--out {flags.out}: {error}")


def _case(kind: str, sizes: tuple[int, ...], dtype: torch.dtype) -> Case:
    name = f"{kind}-{'x'.join(map(str, sizes))}"
    passes = ("fwd", "bwd", "fwd_bwd")
    return Case(name, "activation", {"kind": kind}, {"x": sizes}, dtype, passes, "002", "A100-SXM4-80GB", ("full",))
