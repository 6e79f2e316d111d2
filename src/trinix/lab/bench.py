"""``trinix bench``: run a suite on this machine, show it, keep it.

With a GPU: every built case through ``run.run_gpu``. Without one: the kernels in the interpreter, PyTorch's CPU times
labelled as such, and the compiler's report for four targets.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from trinix import device
from trinix.kernels import _native
from trinix.lab import aot, gate, interpret, measure, record, report, roofline, run
from trinix.lab import warm as ahead
from trinix.lab.case import Case, load_cases
from trinix.lab.peers import PREPARE, trinix

# Elements, and operations of a forward and a backward pass: larger cases are not timed on a CPU, since their times would be most
# of a run without a GPU. Two cores without bfloat16 instructions need a minute for 10 GFLOP in it.
CPU_LIMITS = (1 << 23, 4e9)


def bench(
    *,
    suite: str = "quick",
    ops: Sequence[str] = (),
    impls: Sequence[str] = (),
    ids: Sequence[str] = (),
    resume: bool = False,
    warm: int | None = 0,
    out: Path,
    console: Console,
) -> int:
    """Run and report; returns the exit status: 0, 1 if a result of trinix failed, 130 after Ctrl-C.

    ``ids`` (patterns of case ids) and ``resume`` are ``_collect``'s; ``warm`` is the number of processes that compile before the
    clocks start, ``processes_for`` the cases where None; a script that asks for them needs a main guard, each imports it again.
    """
    if warm is not None and warm < 0:
        raise ValueError(f"bench: warm must be 0 or a number of processes, got {warm}")
    if unknown := set(impls) - set(PREPARE):
        raise ValueError(f"bench: impl must be among {list(PREPARE)}, got {sorted(unknown)}")
    cases = load_cases(suite, ops)
    for pattern in ids:
        if not any(fnmatchcase(c.id, pattern) for c in cases):
            raise ValueError(
                f"bench: case {pattern!r} matches none of the {len(cases)} cases that --suite and --op leave"
            )
    kernels = frozenset(c.family for c in _chosen(cases, ids)) if ops or ids else True
    return bench_cases(cases, impls or tuple(PREPARE), out, console, kernels=kernels, ids=ids, resume=resume, warm=warm)


def bench_cases(
    cases: Sequence[Case],
    impls: Sequence[str],
    out: Path,
    console: Console,
    *,
    kernels: bool | frozenset[str] = True,
    cpu_limits: tuple[float, float] = CPU_LIMITS,
    runs: int | None = None,
    ids: Sequence[str] = (),
    resume: bool = False,
    warm: int | None = 0,
) -> int:
    """Run cases on the GPU, or without one as ``_without_gpu`` does; ``kernels``: whose are checked there, of which
    families, or all; False leaves only the CPU times.

    ``runs`` is ``measure.Gpu``'s, ``ids`` and ``resume`` are ``_collect``'s, ``warm`` is ``bench``'s.
    """
    chosen = {"ids": ids, "resume": resume}
    card = device.card()
    beyond, asked = too_large(cases), _chosen(cases, ids)
    cases = [c for c in cases if c.id not in beyond]
    beyond = {c.id: beyond[c.id] for c in asked if c.id in beyond}
    folder = out / (card.slug if card else "cpu")
    folder.mkdir(parents=True, exist_ok=True)  # a file in its place is an error now, not after the first hour
    todo = _chosen(cases, ids)
    for name in _files(todo):  # and so is a last result that cannot be read
        record.last(folder / f"{name}.jsonl")
    found = _found(one for name in _files(todo) for one in record.kept(folder, name)) if resume else {}
    if card:
        console.print(f"{card.name}: {card.sm_count} SMs, {card.memory_gib:.0f} GiB, {card.target}")
        _build_native(console)
        left = [c for c in todo if _is_left(c, impls, found)]
        if warm := processes_for(left) if warm is None else warm:
            _compile_ahead(left, impls, warm, console)
        code = _on_gpu(cases, impls, folder, console, runs, chosen)
        _show_skipped(beyond, console)
        return code
    if warm:
        console.print("No GPU here: nothing is compiled ahead (--warm).")
    if kernels:
        console.print(
            "No GPU here: kernels in the interpreter, PyTorch's CPU times, the compilers' report. No GPU speed."
        )
    else:
        console.print("No GPU here: PyTorch's CPU times only. They say nothing about a GPU kernel.")
    code = _without_gpu(cases, impls, folder, console, kernels, cpu_limits, chosen)
    _show_skipped(beyond, console)
    return code


def too_large(cases: Sequence[Case]) -> dict[str, str]:
    """Why built cases cannot be run here, by their ids: what they hold at least is more than the card's memory, or the machine's."""
    card = device.card()
    has = card.memory_gib if card else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    needs = {c.id: gate.least_bytes(c) / 2**30 for c in cases if trinix.is_built(c)}
    where = card.name if card else "this machine"
    return {id_: f"needs {gib:,.1f} GiB at least, {where} has {has:.1f}" for id_, gib in needs.items() if gib > has}


def _show_skipped(reasons: Mapping[str, str], console: Console) -> None:
    for id_, reason in reasons.items():
        console.print(Text(f"Skipped: {id_} {reason}."))


def _chosen(cases: Sequence[Case], ids: Sequence[str]) -> list[Case]:
    """The cases that are run: built, and of one of the patterns where there are any."""
    return [c for c in cases if trinix.is_built(c) and (not ids or any(fnmatchcase(c.id, pattern) for pattern in ids))]


def processes_for(cases: Sequence[Case]) -> int:
    """How many compile what so many cases need: each is a process with half a gigabyte of the card for itself."""
    return min(8, len(os.sched_getaffinity(0)) // 2, len(cases) // 4)


def _compile_ahead(cases: Sequence[Case], impls: Sequence[str], processes: int, console: Console) -> None:
    with _progress(console) as progress:
        task = progress.add_task(f"compiling in {processes} processes", total=None)
        failed = ahead.compile_all(
            cases, impls, processes, progress=lambda done, total: progress.update(task, completed=done, total=total)
        )
    if failed:
        console.print(Text(f"{len(failed)} could not be compiled ahead: {failed[0]}"))


def _build_native(console: Console) -> None:
    """What a user's second process has, ahead of the clocks."""
    try:
        _native.build()
        said = f"C++ launches {_native.describe()}"
    except RuntimeError as error:
        said = str(error)
    console.print(Text(said))


def _on_gpu(cases, impls, folder: Path, console: Console, runs: int | None, chosen: dict) -> int:
    clock = measure.Gpu(runs=runs)
    lines, interrupted = _collect(
        cases, impls, folder, console, lambda case, impls: run.run_gpu(case, impls, clock), **chosen
    )
    show(console, summary(lines))
    _show_not_built(cases, console)
    console.print(verdict(lines))
    if interrupted:
        return 130
    return int(any(not one["ok"] and _is_ours(one) and not record.is_skip(one) for one in lines))


def _collect(
    cases: Sequence[Case],
    impls: Sequence[str],
    folder: Path,
    console: Console,
    run_case: Callable[[Case, Sequence[str]], list[dict]],
    *,
    ids: Sequence[str] = (),
    resume: bool = False,
) -> tuple[list[dict], bool]:
    """Run the built cases file by file into their result files; (lines, whether Ctrl-C ended it).

    With ``ids``, only cases whose id matches one of these patterns are run. With ``resume``, cases that
    ``record.kept`` has with every implementation asked for are not run again; others are, with all that either run names,
    since only what was interleaved can be compared. A file is finished once it has every case of ``cases``; until then it stays partial.
    """
    built = _chosen(cases, ())
    chosen = _chosen(cases, ids)
    lines: list[dict] = []
    with _progress(console) as progress:
        task = progress.add_task("", total=len(chosen))
        for name in _files(chosen):
            wanted = {c.id for c in built if (c.file or c.op) == name}
            file = record.ResultFile(folder, name, resume=resume)
            found = _found(file.lines)
            try:
                for case in (c for c in chosen if c.id in wanted):
                    progress.update(task, description=case.id)
                    if _is_left(case, impls, found):
                        found[case.id] = {*found.get(case.id, ()), *impls}
                        file.put(case.id, run_case(case, [impl for impl in PREPARE if impl in found[case.id]]))
                    progress.advance(task)
            except KeyboardInterrupt:
                lines += file.lines
                console.print(f"Stopped. {len(lines)} finished lines are in {file.interrupt()}")
                return lines, True
            except BaseException:
                console.print(f"Failed. The finished lines are in {file.interrupt()}")
                raise
            lines += file.lines
            if missing := wanted - found.keys():
                console.print(
                    f"{len(missing)} of {len(wanted)} cases are still to run with --resume: {file.interrupt()}"
                )
            elif lacks := file.lacks():
                console.print(
                    f"Kept {file.path}: it has {len(lacks)} rows that this run lacks, {' '.join(min(lacks))} the first; "
                    f"this run is in {file.interrupt()}. Use another --out, or --suite full and every --impl"
                )
            else:
                console.print(f"Wrote {file.finish()}")
    return lines, False


def _files(cases: Sequence[Case]) -> list[str]:
    """The result files that cases go to, each once."""
    return list(dict.fromkeys(c.file or c.op for c in cases))


def _found(lines: Iterable[dict]) -> dict[str, set[str]]:
    """case -> the implementations that these lines have of it."""
    found = {}
    for one in lines:
        found.setdefault(one["case"], set()).add(one["impl"])
    return found


def _is_left(case: Case, impls: Sequence[str], found: dict[str, set[str]]) -> bool:
    """Whether a case is still to run."""
    return case.id not in found or _missing(case, impls, found[case.id])


def _missing(case: Case, impls: Sequence[str], there: set[str]) -> bool:
    """Whether one of these implementations has this op and no line of the case yet."""
    for impl in impls:
        try:
            if impl not in there and PREPARE[impl](case) is not None:
                return True
        except Exception:  # it gets a line that says so
            return True
    return False


def _without_gpu(cases, impls, folder: Path, console: Console, kernels, cpu_limits, chosen: dict) -> int:
    failed, kernels = 0, _kernels_of(kernels)
    if kernels:
        failed += _interpret(console, kernels)
        console.rule("2 of 3: PyTorch on this CPU (not a GPU kernel's speed)")
    small = [c for c in cases if _fits_cpu(c, *cpu_limits)]
    lines, interrupted = _collect(small, impls, folder, console, lambda *call: run.run_cpu(*call), **chosen)
    if lines:
        show(console, _cpu_table(lines))
    if interrupted:
        return 130
    failed += sum(not one["ok"] and _is_ours(one) and not record.is_skip(one) for one in lines)
    if skipped := len(_chosen(cases, chosen["ids"])) - len(_chosen(small, chosen["ids"])):
        elements, flops = cpu_limits
        console.print(
            f"Skipped: {skipped} built cases above {elements:,} elements or {flops / 1e9:g} GFLOP are timed on a GPU only."
        )
    if kernels:
        failed += _compile(console, kernels)
    _show_not_built(cases, console)
    checked = (kernels and importlib.util.find_spec("triton")) or any(one["ok"] and _is_ours(one) for one in lines)
    passed = "All checks passed. The speed of a kernel needs a GPU." if checked else "Nothing was checked."
    console.print(f"{failed} failed." if failed else passed)
    return int(failed > 0)


def _fits_cpu(case: Case, elements: float, flops: float) -> bool:
    least = roofline.work(case, "fwd_bwd")
    return gate.elements(case) <= elements and (least is None or least.flops <= flops)


# Kernels by the names of the interpreter's checks and of the compiler's cases -> the families of what they are in.
_FAMILIES_OF = {
    "activation": ("activation",), "norm": ("norm",), "glu": ("glu", "glu_layers"), "softmax": ("softmax",), "log_softmax": ("softmax",),
    "rope": ("rope", "attention_layers"), "alibi": ("rope",), "attention": ("attention", "attention_layers"),
    "attention_decode": ("attention",), "head_mlp": ("head_mlp",), "linear": ("glu_layers", "attention_layers"),
    "latent_keys": ("attention_layers",),
}  # fmt: skip


def _kernels_of(families: bool | frozenset[str]) -> list[str]:
    """Of these families, or all, or none."""
    if isinstance(families, bool):
        return list(_FAMILIES_OF) if families else []
    return [kernel for kernel, mine in _FAMILIES_OF.items() if families.intersection(mine)]


def _interpret(console: Console, kernels: Sequence[str]) -> int:
    whose = "every portable kernel" if len(kernels) == len(_FAMILIES_OF) else "these cases' portable kernels"
    console.rule(f"1 of 3: {whose} in Triton's interpreter, against float64")
    if _triton_missing(console):
        return 0
    checks = []
    with _progress(console) as progress:
        task = progress.add_task("", total=None)
        for one in interpret.check([name for name in interpret.CHECKS if name in kernels]):
            checks.append(one)
            progress.update(task, description=one["kernel"], completed=len(checks))
    show(console, _interpreter_table(checks))
    return sum(not one["ok"] for one in checks)


def _compile(console: Console, kernels: Sequence[str]) -> int:
    console.rule("3 of 3: compiled ahead of time (the last column is an estimate: least bytes over listed bandwidth)")
    if _triton_missing(console):
        return 0
    with _progress(console) as progress:
        task = progress.add_task("compiling", total=None)
        reports = aot.report(
            [case for case in aot.first_cases() if case.partition("/")[0] in kernels],
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    show(console, _compiler_table(reports))
    console.print(
        f"One case a kernel of {len(aot.case_names())} in all; python -m trinix.lab.aot compiles the others too."
    )
    return sum(not one.ok for one in reports)


def _triton_missing(console: Console) -> bool:
    missing = importlib.util.find_spec("triton") is None
    if missing:
        console.print("Skipped: triton is not installed.")
    return missing


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True)


WIDEST = 250  # columns of a table, whatever a terminal has; with every rival attention takes 212


def show(console: Console, table: Table) -> None:
    """Print a table with all its numbers: in a narrower terminal its lines wrap, where Rich by itself would cut every cell short."""
    widest = max(WIDEST, console.width)
    table.width = console.measure(table, options=console.options.update(width=widest)).maximum
    console.print(table, crop=False)


def _is_ours(one: dict) -> bool:
    return one["impl"].startswith("trinix")


def _show_not_built(cases: Sequence[Case], console: Console) -> None:
    missing = report.not_built(cases)
    if not missing:
        return
    table = Table("not built", "cases", "rows", "ids", title="Rows whose op does not exist yet", title_justify="left")
    for op in dict.fromkeys(c.op for c in missing):
        mine = [c for c in missing if c.op == op]
        table.add_row(op, str(len(mine)), str(sum(len(c.rows) for c in mine)), ", ".join(c.id for c in mine))
    show(console, table)


def summary(lines: Iterable[dict]) -> Table:
    """One row a case and pass: trinix beside the rivals that took part."""
    lines = list(lines)
    others = report.others(lines)
    table = Table(title="Device time, cold L2, medians (ms); share: of a copy of the same, fewest bytes")
    for name in ("case", "pass", "trinix", "runs", *others):
        table.add_column(name, justify="right" if name not in ("case", "pass", "runs") else "left")
    for name in ("best/trinix", "share", "host us", "MiB", "error"):
        table.add_column(name, justify="right")
    for row in report.rows(lines):
        ours = row.line("trinix")
        cells = [row.case, row.pass_, _ms(ours), (ours or {}).get("backend") or "-"]
        cells += [_ms(row.line(i)) for i in others]
        if ours and ours["ok"]:
            ratio = row.speedup()
            share = ours["ceiling_share"]
            cells += [
                "-" if ratio is None else f"{ratio:.2f}",
                f"{share:.0%}" if share else "-",
                f"{ours['host_us']:.1f}",
                f"{ours['peak_mib']:.1f}",
                _ratio(ours),
            ]
        else:
            cells += ["-"] * 5
        table.add_row(*cells)
    return table


def _ratio(one: dict) -> str:
    return "-" if one["error_ratio"] is None else f"{one['error_ratio']:.2f}"


def _ms(one: dict | None) -> str:
    if not one:
        return "-"
    if not one["ok"]:
        return "skipped" if record.is_skip(one) else "FAILED" if _is_ours(one) else "not timed"
    return f"{one['device_ms']['p50']:.4f}"


def verdict(lines: Sequence[dict]) -> Text:
    """Counts, and every failure of trinix with its reason; as plain text, since reasons may hold brackets."""
    ours = [one for one in lines if one["impl"] == "trinix"]
    failures = [one for one in lines if _is_ours(one) and not one["ok"] and not record.is_skip(one)]
    slow = [row for row in report.rows(lines) if row.speedup() is not None and row.speedup() < 1 / 1.03]
    text = [
        f"{len(ours)} rows of trinix, {len(failures)} failed, {len(slow)} slower than the best rival by more than 3%."
    ]
    text += [f"  failed: {one['case']} {one['pass']} {one['impl']}: {one['reason']}" for one in failures]
    text += [f"  slower: {row.case} {row.pass_}: {row.speedup():.2f} x {row.best_rival()['impl']}" for row in slow]
    return Text("\n".join(text))


def _interpreter_table(checks: Sequence[dict]) -> Table:
    table = Table("kernel", "checks", "passed", "worst error / PyTorch's", "failures")
    for kernel in dict.fromkeys(one["kernel"] for one in checks):
        mine = [one for one in checks if one["kernel"] == kernel]
        bad = [f"{one['dtype']} {one['layout']}: {one['reason']}" for one in mine if not one["ok"]]
        passed = str(len(mine) - len(bad))
        worst = f"{max(one['error_ratio'] for one in mine):.2f}"
        table.add_row(kernel, str(len(mine)), passed, worst, escape("; ".join(bad)))
    return table


def _cpu_table(lines: Sequence[dict]) -> Table:
    table = Table("case", "pass", "impl", "runs", "CPU ms", "error / PyTorch's")
    for one in lines:
        if record.is_skip(one):
            continue
        failed = "FAILED" if _is_ours(one) else "not timed"
        time = f"{one['wall_ms']:.2f}" if one["ok"] else escape(f"{failed}: {one['reason']}")
        table.add_row(one["case"], one["pass"], one["impl"], one["backend"] or "-", time, _ratio(one))
    return table


def _compiler_table(reports: Sequence) -> Table:
    table = Table(
        title=f"estimate: for {aot.ELEMENTS / 1e6:.1f} M elements (X-*-4096); nothing was run", title_justify="left"
    )
    for name in ("kernel", "target", "registers", "spills", "shared B", "load bits", "store bits", "estimate ms", ""):
        table.add_column(name, justify="left" if name in ("kernel", "target", "") else "right")
    for one in reports:
        facts = (one.registers, one.spills, one.shared_bytes, one.load_bits, one.store_bits)
        estimate = f"{one.estimate_ms:.3f}" if one.estimate_ms else "-"
        table.add_row(
            one.case, one.target, *map(str, facts), estimate, "ok" if one.ok else escape(f"FAILED: {one.reason}")
        )
    return table
