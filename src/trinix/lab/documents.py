"""The seed documents' own benchmark commands, as arguments of the lab."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

from trinix.lab.case import DTYPES, Case, load_cases

KINDS = ("quick_gelu", "squared_relu", "mish")  # the activations of document 002 that need no projection
NORMS = ("layer_norm", "rms_norm")
EMBEDDINGS = ("rope", "alibi_bias")
PASSES = ("fwd", "bwd", "fwd_bwd")


def benchmark_activation(argv: list[str] | None = None) -> int:
    """Document 002: its four configurations, or the activations at the one that the flags name."""
    parser = _parser("activation", "Activations of seed document 002 against PyTorch and torch.compile.")
    _add_sizes(
        parser,
        "--hidden_size",
        "last dimension; without it the document's four configurations run, its gated units too",
    )
    _add_choice(parser, "--kind", f"an activation (may be repeated; default: {KINDS})")
    flags = _parse(parser, argv)
    from trinix.ops import KINDS as ALL_KINDS

    if unknown := set(flags.kind) - set(ALL_KINDS):
        parser.error(f"--kind must be among {list(ALL_KINDS)}, got {sorted(unknown)}")
    if flags.hidden_size is None:
        if unknown := set(flags.kind) - set(KINDS):
            parser.error(f"--kind {sorted(unknown)[0]} needs --hidden_size: the document's own table has {list(KINDS)}")
        _refuse_ignored(parser, flags, "hidden_size", ("seq_len", "batch_size", "dtype"))
        cases = [c for c in load_cases("seeds", ("activation", "glu")) if c.document == "002"]
        cases = [c for c in cases if (not flags.kind if c.op == "glu" else c.args["kind"] in (flags.kind or KINDS))]
    else:
        sizes = _sizes(parser, flags, ("batch_size", "seq_len", "hidden_size"))
        cases = [
            _case(f"{kind}-{_times(sizes)}", "activation", {"kind": kind}, {"x": sizes}, flags.dtype)
            for kind in flags.kind or KINDS
        ]
    return _run(parser, flags, cases)


def benchmark_normalization(argv: list[str] | None = None) -> int:
    """NORMALIZATION.md: its six configurations of LayerNorm and RMSNorm, or the one that the flags name."""
    parser = _parser("normalization", "LayerNorm and RMSNorm against PyTorch, torch.compile, liger and quack.")
    _add_sizes(parser, "--hidden_size", "normalised dimension; without it the document's six configurations run", 4096)
    _add_choice(parser, "--op", f"one of {NORMS} (may be repeated; default: both)", NORMS)
    flags = _parse(parser, argv)
    if flags.hidden_size is None:
        _refuse_ignored(parser, flags, "hidden_size", ("seq_len", "batch_size", "dtype"))
        cases = _document("norm", "NORMALIZATION.md", flags.op or NORMS)
    else:
        sizes = _sizes(parser, flags, ("batch_size", "seq_len", "hidden_size"))
        cases = [_norm_case(op, sizes, flags.dtype) for op in flags.op or NORMS]
    return _run(parser, flags, cases)


def benchmark_embeddings(argv: list[str] | None = None) -> int:
    """EMBEDDINGS.md: its configurations of RoPE and ALiBi, or the one that the flags name."""
    parser = _parser(
        "embeddings", "RoPE on q and k, and ALiBi's bias, against PyTorch, torch.compile, liger and quack."
    )
    _add_sizes(parser, "--num_heads", "heads of q and k; without it the document's own configurations run")
    parser.add_argument("--head_dim", type=int, default=128)
    _add_choice(parser, "--op", f"one of {EMBEDDINGS} (may be repeated; default: both)", EMBEDDINGS)
    flags = _parse(parser, argv)
    if flags.num_heads is None:
        _refuse_ignored(parser, flags, "num_heads", ("head_dim", "seq_len", "batch_size", "dtype"))
        cases = _document("rope", "EMBEDDINGS.md", flags.op or EMBEDDINGS)
    else:
        sizes = _sizes(parser, flags, ("batch_size", "seq_len", "num_heads", "head_dim"))
        if flags.head_dim % 2:
            parser.error(f"--head_dim must be even, got {flags.head_dim}")
        cases = [_embedding_case(op, sizes, flags.dtype) for op in flags.op or EMBEDDINGS]
    return _run(parser, flags, cases)


MODELS = {  # name -> cases
    "document": tuple(f"A-{layer}-{i}" for layer in ("MHSA", "MHA", "GQA", "MQA", "MLA") for i in (1, 2, 3)),
    "llama3_70b": ("A-llama3-70b",),
    "llama3_405b": ("A-llama3-405b",),
    "deepseek_v3": ("A-deepseek-v3",),
}


def benchmark_attention(argv: list[str] | None = None) -> int:
    """Document 004: its fifteen layers, and those of the models that ``--models`` names."""
    parser = _parser(
        "attention", "Attention layers of seed document 004 against PyTorch, torch.compile and their own formula."
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["document"], help="whose layers (default: document)"
    )
    parser.add_argument(
        "--num_runs", type=int, help="times that each is timed on a GPU; by default what fits a budget of time"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="instead of the document's float16 and the models' bfloat16")
    parser.add_argument("--causal", action="store_true", help="the document's layers causal; the models' are")
    flags = _parse(parser, argv)
    if flags.num_runs is not None and flags.num_runs < 1:
        parser.error(f"--num_runs must be positive, got {flags.num_runs}")
    chosen = {c.id: c for c in load_cases("full", ("attention_layers",))}
    cases = [chosen[id_] for model in dict.fromkeys(flags.models) for id_ in MODELS[model]]
    if flags.causal:  # the lab has the document's layers so, in bfloat16
        dtype = flags.dtype or "float16"
        cases = [c if c.args["causal"] else _in_dtype(chosen[f"{c.id}-causal"], dtype) for c in cases]
    if flags.dtype:
        cases = [_in_dtype(c, flags.dtype) for c in cases]
    from trinix.lab.bench import CPU_LIMITS

    return _run(parser, flags, cases, runs=flags.num_runs, cpu_limits=CPU_LIMITS)


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"benchmark_{name}.py", description=description)
    parser.add_argument("--out", type=Path, default=Path(f"out/benchmark_{name}"), help="folder of result files")
    return parser


def _add_sizes(parser: argparse.ArgumentParser, flag: str, text: str, seq_len: int = 8192) -> None:
    parser.add_argument(flag, type=int, help=text)
    # no defaults: who gives one without the flag that it needs is told so
    parser.add_argument("--seq_len", type=int, help=f"with {flag} (default: {seq_len})")
    parser.add_argument("--batch_size", type=int, help=f"with {flag} (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, help=f"with {flag} (default: float16)")
    parser.set_defaults(sized={"seq_len": seq_len, "batch_size": 1, "dtype": "float16"})


def _add_choice(parser: argparse.ArgumentParser, flag: str, text: str, choices: Sequence[str] | None = None) -> None:
    parser.add_argument(flag, action="append", default=[], help=text, choices=choices)


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    flags = parser.parse_args(argv)
    if importlib.util.find_spec("rich") is None:
        parser.error("needs the package rich, which is not installed; pip install 'trinix[lab]'")
    return flags


def _refuse_ignored(parser, flags, needed: str, names: Sequence[str]) -> None:
    if given := [n for n in names if getattr(flags, n) != parser.get_default(n)]:
        parser.error(f"--{given[0]} needs --{needed}: without it the document's own configurations run")


def _sizes(parser, flags, names: Sequence[str]) -> tuple[int, ...]:
    """Sizes in this order; in ``flags`` what was not given is filled in."""
    for name, default in flags.sized.items():
        if getattr(flags, name) is None:
            setattr(flags, name, default)
    sizes = tuple(getattr(flags, n) for n in names)
    if min(sizes) < 1:
        parser.error(f"{', '.join(f'--{n}' for n in names)} must be positive, got {sizes}")
    return sizes


def _document(family: str, document: str, ops: Sequence[str]) -> list[Case]:
    return [c for c in load_cases("full", (family,)) if c.document == document and c.op in ops]


def _norm_case(op: str, sizes: tuple[int, ...], dtype: str) -> Case:
    shape = {"x": sizes, "weight": sizes[-1:]} | ({"bias": sizes[-1:]} if op == "layer_norm" else {})
    eps = 1e-5 if op == "layer_norm" else 1e-6
    return _case(f"{op}-{_times(sizes)}", op, {"eps": eps}, shape, dtype, "NORMALIZATION.md", "norm")


def _embedding_case(op: str, sizes: tuple[int, ...], dtype: str) -> Case:
    _, length, heads, width = sizes
    if op == "alibi_bias":
        args, name = {"seq_q": length, "causal": False}, f"{op}-{heads}x{length}x{length}"
        slopes = {"slopes": (heads,)}
        return _case(name, op, args, slopes, "float32", "EMBEDDINGS.md", "rope", ("fwd",), own="float32")
    table = (length, width // 2)
    shape = {"q": sizes, "k": sizes, "cos": table, "sin": table}
    return _case(f"{op}-{_times(sizes)}", op, {}, shape, dtype, "EMBEDDINGS.md", "rope")


def _case(name, op, args, shape, dtype, document="002", family="activation", passes=PASSES, own="float16") -> Case:
    """A case of the flags; ``own`` is the document's dtype."""
    case = Case(name, op, args, shape, DTYPES[own], passes, document, "A100-SXM4-80GB", ("full",), file=family)
    return _in_dtype(case, dtype)


def _in_dtype(case: Case, dtype: str) -> Case:
    """In another dtype than its own a case is another, under an id of its own: no line of it stands beside the document's figures."""
    if case.dtype == DTYPES[dtype]:
        return case
    return replace(case, id=f"{case.id}-{dtype}", dtype=DTYPES[dtype])


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _run(parser: argparse.ArgumentParser, flags: argparse.Namespace, cases: Sequence[Case], **more) -> int:
    from rich.console import Console

    from trinix.lab import bench
    from trinix.lab.peers import PREPARE

    console = Console(width=None if sys.stdout.isatty() else 200)
    beyond = bench.too_large(cases)
    if cases and len(beyond) == len(cases):
        parser.error(f"nothing to run: {cases[0].id} {beyond[cases[0].id]}")
    try:
        return bench.bench_cases(
            cases, tuple(PREPARE), flags.out, console, kernels=False, **{"cpu_limits": (inf, inf)} | more
        )
    except (OSError, ValueError) as error:  # ValueError: a last result that cannot be read
        parser.error(f"--out {flags.out}: {error}")
