"""Tables from result lines: what won, what lost, what was not timed and why, and the documents' figures beside ours."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from trinix.lab import bench, record, report
from trinix.lab.case import load_cases
from trinix.lab.peers import PREPARE

CPU = {"gpu": None}
CARD = {"gpu": "NVIDIA H100 80GB HBM3", "versions": {"torch": "2.13.0", "triton": None}, "commit": "abc1234"}
NASTY = "a | b\n| c | <script>alert(1)</script>"


def gpu_line(case, pass_, impl, ms=None, *, reason=None, **more):
    """A line of a GPU run; without ``ms`` one that was not timed."""
    known = {"case": case, "op": "activation", "pass": pass_, "impl": impl, "ok": reason is None, "reason": reason}
    if ms is not None:
        known |= {
            "backend": impl.partition(":")[2] or impl,
            "device_ms": {"p20": ms, "p50": ms, "p80": ms},
            "host_us": 10.0,
            "wall_ms": ms * 1.5,
            "peak_mib": 9.0,
            "inputs_mib": 9.0,
            "bytes": 1000,
            "flops": 0,
            "ceiling": "bandwidth",
            "ceiling_share": 0.875,
            "error_ratio": 1.0,
        }
    return record.line(**known) | CARD | more


def cpu_line(case, pass_, impl, ms, **more):
    known = {
        "case": case,
        "op": "activation",
        "pass": pass_,
        "impl": impl,
        "ok": True,
        "wall_ms": ms,
        "error_ratio": 1.0,
    }
    return record.line(**(known | more)) | CPU


def cells(line):
    return [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables(text):
    """Every table of a Markdown text as a list of {heading: cell}; a broken row fails."""
    found, lines = [], text.split("\n")
    for number, line in enumerate(lines):
        if re.fullmatch(r"\|( --- \|)+", line):
            head, rows = cells(lines[number - 1]), []
            assert len(cells(line)) == len(head)
            for row in lines[number + 1 :]:
                if not row.startswith("|"):
                    assert row == "", f"text runs into the table: {row!r}"
                    break
                assert len(cells(row)) == len(head), row
                rows.append(dict(zip(head, cells(row), strict=True)))
            found.append(rows)
    return found


def speed(lines):
    return tables(report.markdown(lines, "activation.jsonl"))[0]


# -- speed


def test_a_row_shows_every_implementation_and_the_best_rival_over_ours():
    (row,) = speed(
        [
            # what is compared is the median: not the luckiest repetitions, nor those that something disturbed
            gpu_line(
                "X-relu-256", "fwd", "trinix", 0.5, backend="triton", device_ms={"p20": 0.1, "p50": 0.5, "p80": 5.0}
            ),
            gpu_line("X-relu-256", "fwd", "trinix:triton", 0.625),
            gpu_line("X-relu-256", "fwd", "eager", 1.5, device_ms={"p20": 0.2, "p50": 1.5, "p80": 1.6}),
            gpu_line("X-relu-256", "fwd", "compile", 1.0, device_ms={"p20": 0.9, "p50": 1.0, "p80": 9.0}),
            gpu_line("X-relu-256", "fwd", "seed_formula", 0.25),
        ]
    )
    assert row["case"] == "X-relu-256"
    assert row["what"] == "activation relu 12x12x256x128 bf16"
    assert (row["trinix"], row["runs"], row["trinix:triton"]) == ("0.5000", "triton", "0.6250")
    assert (row["eager"], row["compile"], row["seed formula"]) == ("1.5000", "1.0000", "0.2500")
    assert row["best / trinix"] == "2.00", "compile is the best rival; the seed formula is no rival"
    assert (row["share"], row["wall ms"], row["best wall"]) == ("87.5%", "0.7500", "1.5000")
    assert (row["host us"], row["MiB"], row["error"]) == ("10.0", "9.00", "1.00")


def test_a_line_with_some_clocks_only_shows_those():
    clocks = dict.fromkeys(("backend", "host_us", "wall_ms", "peak_mib", "error_ratio"))
    (row,) = speed([gpu_line("D-32x4096-b1-8192", "fwd", "trinix", 0.5, **clocks)])
    assert (row["trinix"], row["share"]) == ("0.5000", "87.5%")
    assert {row[name] for name in ("runs", "best / trinix", "wall ms", "host us", "MiB", "error")} == {""}


def test_a_loss_is_shown_as_one():
    lines = [gpu_line("X-relu-256", "fwd", "trinix", 2.0), gpu_line("X-relu-256", "fwd", "eager", 1.0)]
    assert speed(lines)[0]["best / trinix"] == "0.50"
    said = str(bench.verdict(lines))
    assert "1 slower than the best rival by more than 3%" in said
    assert "slower: X-relu-256 fwd: 0.50 x eager" in said


def test_a_loss_against_a_rival_that_launches_nothing_is_shown():
    lines = [gpu_line("X-none-256", "fwd", "trinix", 0.01), gpu_line("X-none-256", "fwd", "eager", 0.0)]
    assert speed(lines)[0]["best / trinix"] == "0.00"
    assert "1 slower" in str(bench.verdict(lines))


def test_where_ours_launches_nothing_there_is_no_ratio():
    lines = [gpu_line("X-none-256", "fwd", "trinix", 0.0), gpu_line("X-none-256", "fwd", "eager", 0.0)]
    assert speed(lines)[0]["best / trinix"] == ""
    assert report.rows(lines)[0].speedup() is None
    assert "0 slower" in str(bench.verdict(lines))


def test_a_rival_that_was_not_timed_is_no_rival():
    lines = [
        gpu_line("X-relu-256", "fwd", "trinix", 0.5),
        gpu_line("X-relu-256", "fwd", "eager", 1.0),
        gpu_line("X-relu-256", "fwd", "compile", 0.1, reason="0.1 ms is faster than this card"),
    ]
    (row,) = speed(lines)
    assert (row["compile"], row["best / trinix"]) == ("not timed", "2.00")
    assert row["best wall"] == "1.5000"


@pytest.mark.parametrize("missing", ["trinix", "eager", "compile"])
def test_an_implementation_without_a_line_leaves_its_cells_empty(missing):
    lines = [gpu_line("X-relu-256", "fwd", impl, 1.0) for impl in ("trinix", "eager", "compile") if impl != missing]
    (row,) = speed(lines)
    assert row.get(missing, "") == ""
    assert (missing in row) is (missing == "trinix"), "what took no part has no column"
    assert bool(row["best / trinix"]) is (missing != "trinix")


def test_each_pass_has_its_own_table_under_its_own_heading():
    text = report.markdown([gpu_line("X-relu-256", p, "trinix", 1.0) for p in ("bwd", "fwd_grad", "fwd")], "a.jsonl")
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == [
        "Forward, no gradient recorded",
        "Forward while autograd records",
        "Backward",
        "Memory beside the documents",
    ]


def test_the_head_names_card_versions_commit_and_source():
    text = report.markdown([gpu_line("X-relu-256", "fwd", "trinix", 1.0)], "activation.jsonl")
    assert text.startswith("# activation: results\n"), "the file's name"
    assert "NVIDIA H100 80GB HBM3; torch 2.13.0; commit abc1234; " in text
    assert "[activation.jsonl](activation.jsonl)" in text
    assert text.endswith("\n")


def test_a_file_without_lines_says_so():
    assert "No lines." in report.markdown([], "activation.jsonl")


# -- what was not timed


def test_what_failed_or_was_skipped_is_listed_with_its_reason():
    lines = [
        gpu_line("X-relu-256", "fwd", "trinix", reason="misses its error budget: y: error 1"),
        gpu_line("X-relu-256", "fwd", "eager", 1.0),
        gpu_line("X-relu-256", "fwd", "compile", reason="skipped: timed on a GPU only"),
    ]
    text = report.markdown(lines, "activation.jsonl")
    (row,) = tables(text)[0]
    assert (row["trinix"], row["best / trinix"], row["error"]) == ("not timed", "", "")
    assert "compile" not in row
    after = text.partition("## Not timed\n")[2]
    assert "- X-relu-256 fwd trinix: misses its error budget: y: error 1" in after
    assert "- X-relu-256 fwd compile: skipped: timed on a GPU only" in after
    assert "eager" not in after
    said = str(bench.verdict(lines))
    assert said.startswith("1 rows of trinix, 1 failed, 0 slower")
    assert "failed: X-relu-256 fwd trinix: misses its error budget" in said
    assert "compile" not in said


def test_many_skips_for_one_reason_share_a_line_and_failures_never_do():
    skipped = [gpu_line(f"X-relu-{n}", "fwd", "quack", reason="skipped: not installed") for n in range(5)]
    failed = [gpu_line(f"X-relu-{n}", "fwd", "eager", reason="RuntimeError: no") for n in range(5)]
    one = [gpu_line("X-relu-1", "fwd", "liger", reason="skipped: no such form")]
    text = report.markdown([gpu_line("X-relu-1", "fwd", "trinix", 1.0), *skipped, *failed, *one], "a.jsonl")
    after = text.partition("## Not timed\n")[2]
    assert "- quack, 5 rows: skipped: not installed" in after
    assert after.count("quack") == 1
    assert after.count("RuntimeError: no") == 5
    assert "- X-relu-1 fwd liger: skipped: no such form" in after


def test_rivals_have_columns_in_one_order_and_the_best_of_them_counts():
    times = {"quack": 0.75, "trinix": 0.5, "compile": 1.5, "liger": 1.0, "seed_formula": 0.1}
    lines = [gpu_line("X-relu-256", "fwd", impl, ms) for impl, ms in times.items()]
    (row,) = speed(lines)
    assert list(row)[2:8] == ["trinix", "runs", "compile", "liger", "quack", "seed formula"]
    assert row["best / trinix"] == "1.50", "quack's"
    assert "the best rival's (compile, liger, quack) device time" in report.markdown(lines, "a.jsonl")
    assert "0.7500" in shown(bench.summary(lines))


def test_without_failures_there_is_no_such_section():
    assert "Not timed" not in report.markdown([gpu_line("X-relu-256", "fwd", "trinix", 1.0)], "activation.jsonl")


# -- the documents


def test_published_figures_stand_beside_ours_with_the_documents_gpu():
    (row,) = speed([gpu_line("X-relu-256", "fwd", "trinix", 1.0)])
    assert row["published (document's GPU)"] == "triton 0.043131, torch 0.014025, compile 0.300839 (H100)"


def test_no_published_figure_loses_a_digit():
    for case in load_cases("seeds"):
        for row in case.rows:
            shown = report._published(case, row.pass_, row.unit)
            for value in row.published.values():
                assert value in [float(n) for n in re.findall(r" (\d+\.?\d*)", shown)], (case.id, shown)


def test_a_figure_that_the_document_owes_is_tbd_and_one_that_it_never_promised_is_empty():
    passes = ("fwd", "bwd", "fwd_bwd")
    text = report.markdown([gpu_line("G-mi-1", p, "trinix", 1.0) for p in passes], "a.jsonl")
    shown = [table[0]["published (document's GPU)"] for table in tables(text)[:3]]
    assert shown == ["TBD in the document", "TBD in the document", ""]


def test_a_case_that_no_file_knows_is_shown_without_figures():
    (row,) = speed([gpu_line("a case of yesterday", "fwd", "trinix", 1.0)])
    assert (row["case"], row["what"], row["published (document's GPU)"]) == ("a case of yesterday", "", "")


def test_memory_counts_the_inputs_as_the_documents_do():
    lines = [
        gpu_line("X-relu-256", "fwd", "trinix", 1.0, peak_mib=9.0, inputs_mib=9.0),
        gpu_line("X-relu-256", "fwd", "trinix:triton", 1.0, peak_mib=10.0, inputs_mib=9.0),
        gpu_line("X-relu-256", "fwd", "eager", reason="misses its error budget"),
        gpu_line("X-relu-256", "fwd_grad", "trinix", 1.0),
        gpu_line("X-relu-256", "bwd", "trinix", 1.0, peak_mib=9.5, inputs_mib=18.0),
    ]
    fwd, bwd = tables(report.markdown(lines, "a.jsonl"))[-1]
    assert fwd == {
        "case": "X-relu-256",
        "pass": "fwd",
        "trinix MiB": "18.00",
        "trinix:triton MiB": "19.00",
        "eager MiB": "",
        "published MiB": "triton 18, torch 18, compile 18 (H100)",
    }
    assert (bwd["pass"], bwd["trinix MiB"]) == ("bwd", "27.50")
    assert bwd["published MiB"].startswith("triton 44.55, torch 44.55")


def test_memory_that_the_document_owes_is_tbd():
    rows = tables(report.markdown([gpu_line("G-mi-1", "fwd", "trinix", 1.0)], "a.jsonl"))[-1]
    assert [row["published MiB"] for row in rows] == ["TBD in the document"]


# -- a CPU's lines


def test_cpu_times_are_labelled_and_have_no_ratio():
    lines = [
        cpu_line("X-relu-256", "fwd", "trinix", 1.25, backend="cpu:torch"),
        cpu_line("X-relu-256", "fwd", "eager", 2.0),
    ]
    text = report.markdown(lines, "activation.jsonl")
    assert "CPU; python " in text
    assert "They say nothing about a GPU kernel." in text
    ours, eager = tables(text)[0]
    assert ours == {"case": "X-relu-256", "pass": "fwd", "impl": "trinix", "runs": "cpu:torch", "CPU ms": "1.250"}
    assert eager["CPU ms"] == "2.000"


def test_a_failure_on_a_cpu_is_shown_with_its_reason_and_without_a_time():
    bad = cpu_line("X-relu-256", "fwd", "trinix", None, ok=False, reason="misses its error budget")
    text = report.markdown([bad, cpu_line("X-relu-256", "fwd", "eager", 2.0)], "activation.jsonl")
    assert not re.search(r"\d", tables(text)[0][0]["CPU ms"])
    assert "misses its error budget" in text


# -- nothing from outside breaks the page


@pytest.mark.parametrize("field", ["case", "backend", "reason", "gpu"])
@pytest.mark.parametrize("make", [gpu_line, cpu_line])
def test_text_from_outside_breaks_no_table_and_starts_no_markup(make, field):
    lines = [make("X-relu-256", "fwd", "trinix", 1.0), make("X-relu-256", "fwd", "eager", 1.0)]
    lines += [make("X-relu-256", "fwd", "compile", 1.0)]
    if field == "case":
        lines = [one | {"case": NASTY} for one in lines]
    elif field == "reason":
        lines[0] |= {"ok": False, "reason": NASTY}
    elif field == "backend" or make is gpu_line:
        lines = [one | {field: NASTY} for one in lines]
    text = report.markdown(lines, "activation.jsonl")
    assert "<script" not in text
    assert tables(text)[0]
    assert not [line for line in re.split(r"\r\n|\r|\n", text) if line.startswith("| c |")], "a cell became a row"


@pytest.mark.parametrize("field", ["case", "impl", "commit", "op", "reason"])
def test_text_from_outside_breaks_nothing_outside_tables_either(field):
    text = "x\r## New heading <script>" if field == "reason" else "x\n## New heading <script>"
    lines = [gpu_line("X-relu-256", "fwd", "compile", reason="skipped") | {field: text}]
    page = report.markdown(lines, "activation.jsonl")
    assert "<script" not in page
    assert not [line for line in re.split(r"\r\n|\r|\n", page) if line.startswith("## New heading")]


# -- files


def save(folder, op, lines):
    file = record.ResultFile(folder, op)
    file.add(lines)
    return file.finish()


def test_write_puts_a_table_beside_every_result_file_and_leaves_nothing_else(tmp_path):
    lines = [gpu_line("X-relu-256", "fwd", "trinix", 1.0)]
    save(tmp_path / "h100", "activation", lines)
    save(tmp_path / "cpu", "softmax", [cpu_line("S-1", "fwd", "eager", 1.0)])
    record.ResultFile(tmp_path / "h100", "glu").interrupt()
    written = report.write(tmp_path)
    assert written == [tmp_path / "cpu" / "softmax.md", tmp_path / "h100" / "activation.md"]
    assert written[1].read_text() == report.markdown(lines, "activation.jsonl")
    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*"))
    assert names == [
        "cpu/softmax.jsonl",
        "cpu/softmax.md",
        "h100/activation.jsonl",
        "h100/activation.md",
        "h100/glu.jsonl.partial",
    ]


def test_write_twice_is_the_same_file(tmp_path):
    save(tmp_path / "h100", "activation", [gpu_line("X-relu-256", "fwd", "trinix", 1.0)])
    (path,) = report.write(tmp_path)
    before = path.read_bytes()
    report.write(tmp_path)
    assert path.read_bytes() == before


def test_a_broken_result_file_is_named_and_its_last_table_stays(tmp_path):
    path = save(tmp_path / "h100", "activation", [gpu_line("X-relu-256", "fwd", "trinix", 1.0)])
    (table,) = report.write(tmp_path)
    before = table.read_bytes()
    path.write_text(path.read_text() + "{half a li")
    with pytest.raises(ValueError, match=r"activation\.jsonl: line 2 is not JSON"):
        report.write(tmp_path)
    assert table.read_bytes() == before
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("name", "other"), [("commit", "0000000"), ("gpu", "NVIDIA H200"), ("gpu", None), ("versions", {"torch": "0"})]
)
def test_a_file_of_two_cards_commits_or_versions_has_no_one_head(name, other, tmp_path):
    lines = [gpu_line("X-relu-256", "fwd", impl, 1.0) for impl in ("trinix", "eager", "compile")]
    path = save(tmp_path / "h100", "activation", [*lines[:2], lines[2] | {name: other}])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: line 3 has {name} .*, the first line .*one card"):
        report.write(tmp_path)
    assert not list(tmp_path.rglob("*.md*"))


def test_what_a_host_was_worth_stands_beside_what_a_call_cost_it():
    lines = [gpu_line("X-relu-256", "fwd", impl, 1.0) for impl in ("trinix", "eager")]
    (row,) = tables(report.markdown([one | {"host_relu_us": 6.54} for one in lines], "a.jsonl"))[0]
    assert (row["host us"], row["F.relu us"]) == ("10.0", "6.5")
    text = report.markdown(lines, "a.jsonl")
    assert "F.relu us" not in text
    assert tables(text)[0][0]["host us"] == "10.0"


@pytest.mark.parametrize("field", ["host_us", "wall_ms", "peak_mib", "inputs_mib", "ceiling_share", "error_ratio"])
@pytest.mark.parametrize("op", ["activation", "train_step"])
def test_a_field_that_does_not_apply_is_an_empty_cell(field, op):
    case = "X-relu-256" if op == "activation" else "T-small-8x2048-1x4096"
    lines = [gpu_line(case, "fwd", impl, 1.0, op=op) for impl in ("trinix", "eager", "compile")]
    assert tables(report.markdown([lines[0] | {field: None}, lines[1] | {field: None}, lines[2]], "a.jsonl"))


def test_a_table_that_cannot_be_written_whole_leaves_the_last_one(tmp_path, monkeypatch):
    save(tmp_path / "h100", "activation", [gpu_line("X-relu-256", "fwd", "trinix", 1.0)])
    (table,) = report.write(tmp_path)
    before = table.read_bytes()

    def write_text(self, text, **_):
        self.write_bytes(text.encode()[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(OSError, match="no space left"):
        report.write(tmp_path)
    assert table.read_bytes() == before


def test_nothing_to_write_is_an_empty_list(tmp_path):
    assert report.write(tmp_path) == []
    assert report.write(tmp_path / "not there") == []


# -- the terminal's summary


def shown(*things):
    console = Console(file=io.StringIO(), width=250)
    for thing in things:
        console.print(thing)
    return console.file.getvalue()


MIXTURE = [
    gpu_line("X-relu-256", "fwd", "trinix", 0.5),
    gpu_line("X-relu-256", "fwd", "trinix:triton", reason="misses its error budget: y"),
    gpu_line("X-relu-256", "fwd", "eager", 1.0),
    gpu_line("X-relu-256", "fwd", "compile", reason="skipped: timed on a GPU only"),
    gpu_line("X-relu-256", "bwd", "eager", 1.0),
    gpu_line("X-relu-512", "bwd", "trinix", 0.5),
    gpu_line("X-none-256", "fwd", "trinix", 0.0, ceiling_share=None),
    gpu_line("X-none-256", "fwd", "trinix:triton", reason="skipped: the identity runs no kernel"),
    gpu_line("X-none-256", "fwd", "eager", 0.0),
    gpu_line("X-silu-256", "fwd", "trinix", 0.1, reason="0.1 ms is faster than this card"),
    gpu_line("X-silu-256", "fwd", "eager", reason="misses its error budget: dx"),
    gpu_line("X-silu-512", "fwd", "compile", 0.5),
    gpu_line("X-silu-512", "fwd", "seed_formula", 0.5),
]


def test_summary_and_verdict_take_any_mixture_of_lines():
    text = shown(bench.summary(MIXTURE), bench.verdict(MIXTURE))
    assert "4 rows of trinix, 2 failed, 0 slower" in text
    relu = next(line for line in text.splitlines() if "X-relu-256" in line and " fwd " in line)
    for said in ("0.5000", "FAILED", "1.0000", "skipped", "2.00", "88%"):
        assert said in relu
    silu = next(line for line in text.splitlines() if "X-silu-256" in line)
    assert "FAILED" in silu
    assert "not timed" in silu
    assert tables(report.markdown(MIXTURE, "activation.jsonl"))


@pytest.mark.parametrize("size", range(len(MIXTURE)))
def test_summary_and_verdict_take_every_single_line_and_none(size):
    for lines in (MIXTURE[:size], MIXTURE[size : size + 1]):
        shown(bench.summary(lines), bench.verdict(lines))


@pytest.mark.parametrize("width", [20, 80, 250, 400])
def test_a_narrow_terminal_costs_no_number_of_a_table(width):
    failed = cpu_line("X-relu-256", "fwd", "trinix", None, ok=False, reason="word " * 100)
    for table in (bench.summary(MIXTURE), bench._cpu_table([failed, cpu_line("X-relu-256", "bwd", "eager", 1.0)])):
        console = Console(file=io.StringIO(), width=width)
        bench.show(console, table)
        text = console.file.getvalue()
        assert "X-relu-256" in text
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= max(width, bench.WIDEST)


def test_the_rivals_are_known_implementations():
    assert set(report.RIVALS) <= set(PREPARE)
    assert not any(impl.startswith("trinix") or impl == "seed_formula" for impl in report.RIVALS)


@pytest.fixture(scope="module")
def all_cases():
    return load_cases()


RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*/*.jsonl")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_published_figure_of_a_measured_case_is_in_its_report(file, all_cases):
    measured = {json.loads(line)["case"] for line in file.read_text().splitlines()}
    text = file.with_suffix(".md").read_text()
    rows = [row for case in all_cases if case.id in measured for row in case.rows]
    lost = [
        (row.id, name, value) for row in rows for name, value in row.published.items() if f"{value:.10g}" not in text
    ]
    assert not lost


def test_the_widest_table_of_all_loses_no_number_either():
    console = Console(file=io.StringIO(), width=80)
    bench.show(console, bench.summary(record.read(RESULTS / "h100" / "attention.jsonl")))
    assert "…" not in console.file.getvalue()


@pytest.mark.parametrize("reason", ["needs quack; pip install 'trinix[peers]'", "pass [/x] failed"])
def test_brackets_in_a_reason_are_printed_as_they_are(reason):
    lines = [gpu_line("X-relu-256", "fwd", "trinix", reason=reason)]
    assert reason in shown(bench.verdict(lines))


def test_brackets_in_a_reason_are_printed_as_they_are_in_the_cpu_table():
    bad = cpu_line("X-relu-256", "fwd", "trinix", None, ok=False, reason="needs trinix[peers]")
    assert "trinix[peers]" in shown(bench._cpu_table([bad]))
