"""The command line: parses, calls, prints; no logic. Heavy imports wait inside the commands."""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"trinix: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _stopped()


def document(name: str) -> int:
    """The command of a benchmark document: a function of ``trinix.lab.documents``, by its name."""
    try:
        from trinix.lab import documents

        return getattr(documents, name)()
    except KeyboardInterrupt:  # while PyTorch is imported, say
        return _stopped()


def _stopped() -> int:
    print("Stopped.", file=sys.stderr)
    return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trinix", description="Fused GPU kernels for Transformers, and their laboratory."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    doctor = commands.add_parser("doctor", help="what this machine can run, and why not the rest")
    doctor.set_defaults(run=_doctor)

    ops = commands.add_parser("ops", help="the ops, their backends, and which of them run here")
    ops.set_defaults(run=_ops)

    bench = commands.add_parser("bench", help="correctness, then timings, of a suite of cases")
    bench.add_argument("--op", action="append", default=[], help="only this op (may be repeated)")
    bench.add_argument("--suite", default="quick", help="quick, seeds or full (default: quick)")
    bench.add_argument(
        "--case",
        action="append",
        default=[],
        help="only cases whose id matches this pattern, as 'AS-64-*' (may be repeated); a file that lacks cases of the suite stays "
        "<family>.jsonl.partial",
    )
    bench.add_argument(
        "--resume",
        action="store_true",
        help="keep the finished cases of <family>.jsonl.partial, or else of <family>.jsonl, of this card, commit and versions only, and "
        "run the others, and those that lack an --impl of this run",
    )
    bench.add_argument("--impl", action="append", default=[], help="only this implementation (may be repeated)")
    bench.add_argument(
        "--warm",
        type=int,
        metavar="N",
        help="compile what the cases need in N processes before the clocks start; 0: each when it is its turn (default: half of "
        "the processors, at most 8 and one for every four cases)",
    )
    bench.add_argument("--out", type=Path, default=Path("out"), help="folder of result files (default: out)")
    bench.set_defaults(run=_bench)

    report = commands.add_parser("report", help="Markdown tables beside the result files")
    report.add_argument(
        "--results", type=Path, default=Path("results"), help="folder of result files (default: results)"
    )
    report.set_defaults(run=_report)
    return parser


def _doctor(_) -> int:
    from trinix.lab import doctor

    print(doctor.report())
    return 0


def _ops(_) -> int:
    from trinix.lab import doctor

    print(doctor.ops_table())
    return 0


def _bench(arguments) -> int:
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        raise ValueError("bench: needs the package rich, which is not installed; pip install 'trinix[lab]'") from None
    from trinix.lab import bench

    console = Console(width=None if sys.stdout.isatty() else 200)
    return bench.bench(
        suite=arguments.suite,
        ops=arguments.op,
        impls=arguments.impl,
        ids=arguments.case,
        resume=arguments.resume,
        warm=arguments.warm,
        out=arguments.out,
        console=console,
    )


def _report(arguments) -> int:
    from trinix.lab import report

    written = report.write(arguments.results)
    if not written:
        raise ValueError(f"report: no result files in {arguments.results}; `trinix bench --out` writes them")
    print("\n".join(f"Wrote {path}" for path in written))
    return 0
