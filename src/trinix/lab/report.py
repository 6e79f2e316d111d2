"""From result lines to tables: ours beside the rivals of the same run and the documents' published figures."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from trinix.lab import record, roofline, train
from trinix.lab.case import Case, load_cases
from trinix.lab.peers import PREPARE, RIVALS, trinix

PASS_NAMES = {
    "fwd": "forward, no gradient recorded",
    "fwd_grad": "forward while autograd records",
    "bwd": "backward",
    "fwd_bwd": "forward and backward",
}

MOST_SKIPS = 3  # of one implementation for one reason; more share a line


@dataclass
class ResultRow:
    """The lines of one case and pass, by implementation."""

    case: str
    pass_: str
    lines: dict[str, dict] = field(default_factory=dict)

    def line(self, impl: str) -> dict | None:
        return self.lines.get(impl)

    def best_rival(self) -> dict | None:
        timed = [self.lines[i] for i in RIVALS if i in self.lines and self.lines[i]["ok"]]
        return min(timed, key=lambda one: one["device_ms"]["p50"], default=None)

    def speedup(self, impl: str = "trinix") -> float | None:
        """Device time of the best rival over ours; above 1 we are faster."""
        ours, best = self.line(impl), self.best_rival()
        if not ours or not ours["ok"] or not best:
            return None
        if not ours["device_ms"]["p50"]:  # nothing ran on the device
            return None
        return best["device_ms"]["p50"] / ours["device_ms"]["p50"]


def rows(lines: Iterable[dict]) -> list[ResultRow]:
    found: dict[tuple[str, str], ResultRow] = {}
    for one in lines:
        row = found.setdefault((one["case"], one["pass"]), ResultRow(one["case"], one["pass"]))
        row.lines[one["impl"]] = one
    return list(found.values())


def others(lines: Iterable[dict]) -> list[str]:
    """The implementations beside "trinix" that have a column: those of which anything was more than skipped."""
    there = {one["impl"] for one in lines if not record.is_skip(one)}
    return [impl for impl in PREPARE if impl in there and impl != "trinix"]


def write(folder: Path) -> list[Path]:
    """Write ``<file>.md`` beside every ``<file>.jsonl`` below ``folder``; returns what was written."""
    written = []
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*/*.jsonl")]):
        target = path.with_suffix(".md")
        text = markdown(record.read(path), path)
        temporary = target.with_suffix(".md.partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
        written.append(target)
    return written


def markdown(lines: list[dict], path: str | Path) -> str:
    """The report of one result file."""
    source = Path(path).name
    cases = {c.id: c for c in load_cases("full")}
    out = ["# " + _cell(f"{source.removesuffix('.jsonl')}: results"), ""]
    if not lines:
        return "\n".join([*out, "No lines."]) + "\n"
    first = lines[0]
    for number, one in enumerate(lines, 1):  # the head is true of every row
        for name in ("gpu", "versions", "commit"):
            if one[name] != first[name]:
                raise ValueError(
                    f"{path}: line {number} has {name} {one[name]}, the first line {first[name]}; one file is one card, one "
                    "commit and one set of versions: move the others' lines into files of their own"
                )
    versions = ", ".join(f"{name} {value}" for name, value in first["versions"].items() if value)
    out += [
        _cell(f"{first['gpu'] or 'CPU'}; {versions}; commit {first['commit'] or 'unknown'}; {first['time']}.")
        + f" Made by `trinix report` from [{source}]({source}); not edited by hand.",
        "",
    ]
    if first["gpu"] is None:
        return "\n".join([*out, *_cpu_section(lines)]) + "\n"
    columns = others(lines)
    told = any(one["host_relu_us"] is not None for one in lines)
    relu = " (F.relu us: of that op in the same rounds, which tells how slow the host was)" if told else ""
    rivals = [impl for impl in RIVALS if impl in columns]
    out += [
        "Device ms are medians with a cold L2 cache and the host's time hidden, 0 where no kernel ran; wall ms are calls back to back; host us is the "
        f"time to enqueue a call{relu}. *best / trinix* is the best rival's ({', '.join(rivals) or 'none ran'}) device time over ours: above 1 we "
        "are faster. *share* is the device time of a plain copy of the same, fewest bytes over ours (two reads a write run up to 2% faster than a copy). *runs* is the backend "
        'that "auto" chose. MiB are the measured peak over the inputs; *error* is our error against float64 over PyTorch\'s.',
        "",
    ]
    grouped = rows(lines)
    for pass_ in PASS_NAMES:
        mine = [row for row in grouped if row.pass_ == pass_]
        if mine:
            out += [f"## {PASS_NAMES[pass_].capitalize()}", "", *_speed_table(mine, cases, columns), ""]
    steps = [row for row in grouped if any(one["op"] == "train_step" for one in row.lines.values())]
    if steps:
        out += ["## Tokens a second", "", *_tokens_table(steps, columns), ""]
    if memory := _memory_rows(grouped, cases):
        out += ["## Memory beside the documents", "", *_memory_table(memory), ""]
    if counted := _counted_rows(grouped, cases):
        out += ["## What a document counted, not measured", "", *counted, ""]
    failed = [one for one in lines if not one["ok"]]
    if failed:
        out += ["## Not timed", ""]
        out += ["- " + _cell(text) for text in _reasons(failed)]
        out.append("")
    return "\n".join(out)


def _reasons(failed: list[dict]) -> list[str]:
    """A line for each row that was not timed, one for all rows of an implementation skipped for one and the same reason."""
    skips = [(one["impl"], one["reason"]) for one in failed if record.is_skip(one)]
    common = {skip: times for skip in dict.fromkeys(skips) if (times := skips.count(skip)) > MOST_SKIPS}
    texts = [f"{impl}, {times} rows: {reason}" for (impl, reason), times in common.items()]
    rest = [one for one in failed if (one["impl"], one["reason"]) not in common]
    return texts + [f"{one['case']} {one['pass']} {one['impl']}: {one['reason']}" for one in rest]


def _speed_table(mine: list[ResultRow], cases: dict[str, Case], columns: list[str]) -> list[str]:
    relu = ["F.relu us"] if any(_number(row.line("trinix"), "host_relu_us", 1) for row in mine) else []
    head = (
        "case", "what", "trinix", "runs", *(name.replace("_", " ") for name in columns), "best / trinix", "share",
        "wall ms", "best wall", "host us", *relu, "MiB", "error", "published (document's GPU)",
    )  # fmt: skip
    table = [_line(head), _line(["---"] * len(head))]
    for row in mine:
        case, ours = cases.get(row.case), row.line("trinix")
        speedup = row.speedup()
        fine = bool(ours and ours["ok"])
        walls = [one["wall_ms"] for i in RIVALS if (one := row.line(i)) and one["ok"] and one["wall_ms"] is not None]
        share = ours["ceiling_share"] if fine else None
        table.append(
            _line(
                [
                    row.case,
                    f"{case.label} {'x'.join(map(str, next(iter(case.shape.values()))))} {_short(case)}"
                    if case
                    else "",
                    _ms(ours),
                    (ours or {}).get("backend") or "",
                    *(_ms(row.line(i)) for i in columns),
                    "" if speedup is None else f"{speedup:.2f}",
                    f"{share:.1%}" if share else "",
                    _number(ours, "wall_ms", 4),
                    f"{min(walls):.4f}" if walls else "",
                    _number(ours, "host_us", 1),
                    *(_number(ours, "host_relu_us", 1) for _ in relu),
                    _number(ours, "peak_mib", 2),
                    _number(ours, "error_ratio", 2),
                    _published(case, row.pass_, "ms"),
                ]
            )
        )
    return table


def _tokens_table(steps: list[ResultRow], columns: list[str]) -> list[str]:
    """Of training steps: what the wall clock leaves a program that does nothing else, and the peak on top of the parameters."""
    impls = ["trinix", *columns]
    head = ("case", *impls, *(f"{impl} MiB" for impl in impls))
    out = [
        "Tokens of a step over its wall ms: forward, loss and backward, without an optimizer. MiB: the measured peak over the "
        "parameters and the tokens, gradients included. *share*, above, is of a product of matrices with as many operations.",
        "",
        _line(head),
        _line(["---"] * len(head)),
    ]
    for row in steps:
        timed = [row.line(impl) if (row.line(impl) or {}).get("ok") else None for impl in impls]
        rates = [
            f"{train.tokens_of(row.case) / one['wall_ms'] * 1000:.0f}" if one and one["wall_ms"] else ""
            for one in timed
        ]
        out.append(_line([row.case, *rates, *(_number(one, "peak_mib", 0) for one in timed)]))
    return out


def _memory_rows(grouped: list[ResultRow], cases: dict[str, Case]) -> list[str]:
    """Of the cases whose documents published a figure."""
    rows = []
    for row in grouped:
        case = cases.get(row.case)
        if case and any(r.pass_ == row.pass_ and r.unit == "MiB" for r in case.rows):
            totals = [_total_mib(row.line(i)) for i in ("trinix", "trinix:triton", "eager")]
            rows.append(_line([row.case, row.pass_, *totals, _published(case, row.pass_, "MiB")]))
    return rows


def _memory_table(rows: list[str]) -> list[str]:
    out = [
        "The documents count inputs, output and x.grad as they stand (backward: x, output, dy, dx and an accumulated x.grad); ours "
        "is the measured peak over the inputs plus the inputs; backward keeps what forward saved, not its output.",
        "",
    ]
    head = ("case", "pass", "trinix MiB", "trinix:triton MiB", "eager MiB", "published MiB")
    return [*out, _line(head), _line(["---"] * len(head)), *rows]


def _counted_rows(grouped: list[ResultRow], cases: dict[str, Case]) -> list[str]:
    """Published figures in MB: of traffic or savings by hand, which no clock or meter of ours has."""
    found = [
        (row.case, row.pass_, _published(cases[row.case], row.pass_, "MB"), r.note)
        for row in grouped
        if row.case in cases
        for r in cases[row.case].rows
        if r.unit == "MB" and r.pass_ == row.pass_
    ]
    head = ("case", "pass", "published MB", "what")
    return [_line(head), _line(["---"] * len(head)), *map(_line, found)] if found else []


def _cpu_section(lines: list[dict]) -> list[str]:
    head = ("case", "pass", "impl", "runs", "CPU ms")
    out = [
        "PyTorch's times on a CPU. They say nothing about a GPU kernel.",
        "",
        _line(head),
        _line(["---"] * len(head)),
    ]
    for one in lines:
        time = f"{one['wall_ms']:.3f}" if one["ok"] else one["reason"]
        out.append(_line([one["case"], one["pass"], one["impl"], one["backend"] or "", time]))
    return out


def not_built(cases: Iterable[Case]) -> list[Case]:
    return [c for c in cases if not trinix.is_built(c)]


def _published(case: Case | None, pass_: str, unit: str) -> str:
    figures = case.published(pass_, unit) if case else {}
    if figures:
        shown = []
        for name, value in figures.items():
            beyond = unit == "ms" and roofline.published_beyond_its_card(case, pass_, value)
            shown.append(f"{name} {_figure(value)}" + (" (exceeds that card's peak)" if beyond else ""))
        return ", ".join(shown) + f" ({case.gpu})"
    return "TBD in the document" if case and any(r.pass_ == pass_ and r.unit == unit for r in case.rows) else ""


def _figure(value) -> str:
    return f"{value:.10g}" if isinstance(value, int | float) else str(value)


def _short(case: Case) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(case.dtype).removeprefix("torch.")]


def _total_mib(one: dict | None) -> str:
    if not one or not one["ok"] or None in (one["peak_mib"], one["inputs_mib"]):
        return ""
    return f"{one['peak_mib'] + one['inputs_mib']:.2f}"


def _ms(one: dict | None) -> str:
    if not one:
        return ""
    return f"{one['device_ms']['p50']:.4f}" if one["ok"] else "not timed"


def _number(one: dict | None, name: str, digits: int) -> str:
    """Empty for what was not timed, and for what a line does not have: a decoding step has no wall time of its own."""
    return f"{one[name]:.{digits}f}" if one and one["ok"] and one[name] is not None else ""


def _cell(value) -> str:
    """Text from outside (a card's name, an error) cannot break a table or start markup."""
    return " ".join(str(value).split()).replace("&", "&amp;").replace("|", "\\|").replace("<", "&lt;")


def _line(cells: Iterable) -> str:
    return "| " + " | ".join(_cell(c) for c in cells) + " |"
