"""README's numbers are those of the result files that it links."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(
    r"^\| (\S+) (fwd|bwd|fwd_bwd): [^|]*\| (\S+) \| (\S+) \| ([^|]+?) \| (\d+), (\d+) \| \[\w+\]\((\S+)\.md\) \|$",
    README,
    re.M,
)


def test_every_row_of_the_table_is_found():
    assert len(ROWS) == len(re.findall(r"^\|.*\]\(results/", README, re.M)) >= 6


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_a_row_is_what_was_measured(row):
    case, pass_, ours, eager, compiled, our_mib, eager_mib, file = row
    lines = [json.loads(text) for text in (ROOT / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {one["impl"]: one for one in lines if (one["case"], one["pass"]) == (case, pass_)}
    for impl, shown in (("trinix", ours), ("eager", eager), ("compile", compiled)):
        one = found[impl]
        assert shown == (f"{one['device_ms']['p50']:.4f}" if one["ok"] else "not timed"), impl
    assert [f"{found[impl]['peak_mib']:.0f}" for impl in ("trinix", "eager")] == [our_mib, eager_mib]


def test_the_linked_tables_are_made_from_the_result_files():
    from trinix.lab import record, report

    for path in ROOT.glob("results/*/*.jsonl"):
        assert path.with_suffix(".md").read_text(encoding="utf-8") == report.markdown(record.read(path), path.name)
