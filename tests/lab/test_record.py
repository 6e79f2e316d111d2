"""Result lines and result files: no field is invented, no number is lost, and a file is whole or not there."""

import json
import os
import re
import shutil
import subprocess
from datetime import datetime

import pytest
import torch

import trinix
from trinix.lab import record
from trinix.lab.record import FIELDS, ResultFile, line, read


def some(case="X-relu-256", **known):
    known = {"device_ms": {"p20": 0.1, "p50": 0.2, "p80": 0.3}, "wall_ms": 0.5} | known
    return line(**({"case": case, "op": "activation", "pass": "fwd", "impl": "trinix", "ok": True} | known))


def test_a_line_has_every_field_in_order_and_null_for_what_was_not_said():
    one = some(device_ms=None)
    assert tuple(one) == FIELDS
    assert (one["case"], one["wall_ms"], one["ok"]) == ("X-relu-256", 0.5, True)
    stamped = {"case", "op", "pass", "impl", "ok", "wall_ms", "gpu", "versions", "commit", "time"}
    assert all(one[field] is None for field in FIELDS if field not in stamped)


def test_a_line_is_stamped_with_versions_and_a_time_with_its_zone():
    one = some()
    assert one["versions"]["torch"] == torch.__version__
    assert one["versions"]["python"]
    assert "triton" in one["versions"]
    assert datetime.fromisoformat(one["time"]).utcoffset() is not None


def test_versions_name_the_rivals_that_are_installed(monkeypatch):
    monkeypatch.setattr(record, "version_of", lambda package: "4.0" if package == "flash-attn-4" else None)
    record.stamp.cache_clear()
    versions = record.stamp()["versions"]
    record.stamp.cache_clear()
    assert versions["flash-attn-4"] == "4.0"
    assert "liger-kernel" not in versions


def test_a_line_refuses_fields_that_it_does_not_know():
    with pytest.raises(KeyError, match="device_mss"):
        some(device_mss=1.0)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """``checkout(module)``: the root and the commit of a repository that has a copy of ``record`` there, which is the one that asks."""
    monkeypatch.delenv("TRINIX_COMMIT", raising=False)
    if not shutil.which("git"):
        pytest.skip("needs git")

    def git(*words):
        who = ("-c", "user.name=trinix", "-c", "user.email=trinix@localhost")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    def make(module, ignored=""):
        (tmp_path / module).parent.mkdir(parents=True)
        shutil.copy(record.__file__, tmp_path / module)
        (tmp_path / ".gitignore").write_text(f"__pycache__/\n{ignored}")
        git("init", "-q")
        git("add", ".")
        git("commit", "-q", "-m", "one")
        monkeypatch.setattr(record, "__file__", str(tmp_path / module))
        return tmp_path, git("rev-parse", "--short", "HEAD").strip()

    return make


SOURCE = "src/trinix/lab/record.py"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [(SOURCE, "+"), ("src/trinix/new.py", "+"), ("src/trinix/lab/__pycache__/new.pyc", ""), ("out/new.py", "")],
    ids=["changed", "new", "ignored", "no source"],
)
def test_the_commit_says_whether_the_sources_differ_from_it(name, wanted, checkout):
    root, commit = checkout(SOURCE)
    assert record._commit() == commit
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("new")
    assert re.sub(r"\+[0-9a-f]{7}$", "+", record._commit()) == commit + wanted


def test_sources_that_were_changed_again_are_others(checkout):
    root, commit = checkout(SOURCE)
    said = []
    for text in ("one", "two", "one"):
        (root / "src" / "trinix" / "new.py").write_text(text)
        said.append(record._commit())
    assert said[0] == said[2] != said[1]
    assert all(one.startswith(f"{commit}+") for one in said)


def test_an_installed_package_says_its_version_where_there_is_no_commit(monkeypatch):
    for commit, wanted in ((None, trinix.__version__), ("abc1234", None)):
        monkeypatch.setattr(record, "_commit", lambda commit=commit: commit)
        assert record.stamp.__wrapped__()["versions"].get("trinix") == wanted


@pytest.mark.parametrize(
    ("module", "ignored"),
    [
        ("venv/lib/python3.12/site-packages/trinix/lab/record.py", "venv/"),
        ("venv/lib/python3.12/site-packages/trinix/lab/record.py", ""),
        (SOURCE, "src/"),
    ],
    ids=["installed", "installed and tracked", "a copy that is not tracked"],
)
def test_another_repository_s_commit_is_not_ours(module, ignored, checkout):
    checkout(module, ignored)
    assert record._commit() is None


def test_the_environment_says_the_commit_of_a_copy_and_else_it_may_be_null(monkeypatch):
    monkeypatch.setattr(record, "_run", lambda *command: "")
    monkeypatch.delenv("TRINIX_COMMIT", raising=False)
    assert record._commit() is None
    monkeypatch.setattr(record, "_run", lambda *command: "1234567")  # of the folder that the copy lies in, say
    monkeypatch.setenv("TRINIX_COMMIT", "abc1234")
    assert record._commit() == "abc1234"


def test_what_is_written_is_read_back(tmp_path):
    lines = [
        some(),
        some("X-relu-512", ok=False, reason="a\nb | c é\u2028"),
    ]
    file = ResultFile(tmp_path / "not" / "there", "activation")
    file.add(lines[:1])
    file.add(lines[1:])
    path = file.finish()
    assert path == tmp_path / "not" / "there" / "activation.jsonl"
    assert read(path) == lines


def test_nothing_but_the_partial_file_exists_before_finish_and_nothing_but_the_result_after(tmp_path):
    file = ResultFile(tmp_path, "activation")
    file.add([some()])
    assert [p.name for p in tmp_path.iterdir()] == ["activation.jsonl.partial"]
    file.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["activation.jsonl"]


def test_finished_cases_are_on_disk_before_the_file_is_finished(tmp_path):
    file = ResultFile(tmp_path, "activation")
    file.add([some("A"), some("B")])
    assert [one["case"] for one in read(file.partial)] == ["A", "B"]
    file.interrupt()


def test_finish_replaces_the_last_result_in_one_step_after_everything_is_on_disk(tmp_path, monkeypatch):
    old = ResultFile(tmp_path, "activation")
    old.add([some("old")])
    old.finish()
    new = ResultFile(tmp_path, "activation")
    seen = []

    def fsync(number, real=os.fsync):
        seen.append("fsync")
        real(number)

    def replace(source, target, real=os.replace):
        seen.append(f"replace {read(target)[0]['case']} with {read(source)[0]['case']}")
        real(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    new.add([some("new")])
    assert [one["case"] for one in read(new.path)] == ["old"]
    new.finish()
    assert seen == ["fsync", "replace old with new"]
    assert [one["case"] for one in read(new.path)] == ["new"]


def test_a_case_that_is_measured_again_takes_no_line_of_another_off_the_disk(tmp_path, monkeypatch):
    file = ResultFile(tmp_path, "activation")
    file.add([some("A")])
    file.add([some("B")])

    def replace(source, target, real=os.replace):
        assert [one["case"] for one in read(source)] == ["A"]
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    file.put("B", [some("B")])
    assert [one["case"] for one in read(file.interrupt())] == ["A", "B"]


def test_an_interrupted_run_keeps_the_last_result_and_its_own_finished_lines(tmp_path):
    first = ResultFile(tmp_path, "activation")
    first.add([some("old")])
    path = first.finish()
    before = path.read_bytes(), path.stat().st_mtime_ns
    second = ResultFile(tmp_path, "activation")
    second.add([some("A"), some("B")])
    partial = second.interrupt()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert [one["case"] for one in read(partial)] == ["A", "B"]
    assert partial.read_text().endswith("\n")


def test_a_run_that_dies_without_a_word_keeps_the_last_result(tmp_path):
    first = ResultFile(tmp_path, "activation")
    first.add([some("old")])
    path = first.finish()
    second = ResultFile(tmp_path, "activation")
    second.add([some("new")])
    second._file.close()
    assert [one["case"] for one in read(path)] == ["old"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_into_a_file_is_refused_and_spoils_no_line(resume, tmp_path):
    first = ResultFile(tmp_path, "activation")
    first.add([some("A")])
    first.put("A", [some("A")])  # the lock goes on to the file that takes the partial one's place
    with pytest.raises(OSError, match=r"activation\.jsonl\.partial: another run is writing it; wait .* another --out"):
        ResultFile(tmp_path, "activation", resume=resume)
    ResultFile(tmp_path, "softmax").interrupt()
    first.add([some("B")])
    assert [one["case"] for one in read(first.finish())] == ["A", "B"]
    ResultFile(tmp_path, "activation").interrupt()


@pytest.mark.parametrize("step", [ResultFile.finish, lambda file: file.put("A", [some("A")])], ids=["finish", "put"])
def test_a_file_that_is_renamed_while_a_second_run_opens_it_is_not_the_second_s(step, tmp_path, monkeypatch):
    first = ResultFile(tmp_path, "activation")
    first.add([some("A")])
    real = record.fcntl.flock

    def flock(file, how):  # the first run's step falls between the second's opening and its lock
        monkeypatch.setattr(record.fcntl, "flock", real)
        step(first)
        real(file, how)

    monkeypatch.setattr(record.fcntl, "flock", flock)
    with pytest.raises(OSError, match="another run is writing it"):
        ResultFile(tmp_path, "activation")
    (path,) = tmp_path.iterdir()
    assert [one["case"] for one in read(path)] == ["A"]


@pytest.mark.parametrize(("name", "other"), [("commit", "0000000"), ("gpu", "another"), ("versions", {"torch": "0"})])
def test_what_another_card_commit_or_version_left_is_neither_resumed_nor_lost(name, other, tmp_path):
    record.ResultFile(tmp_path, "activation").add([some() | {name: other}])
    before = (tmp_path / "activation.jsonl.partial").read_bytes()
    with pytest.raises(ValueError, match=f"--resume: its lines have {name} .*finish it there, or move it away"):
        record.ResultFile(tmp_path, "activation", resume=True)
    assert (tmp_path / "activation.jsonl.partial").read_bytes() == before


def test_what_this_run_s_like_left_is_resumed(tmp_path):
    one, two = some("one"), some("two")
    record.ResultFile(tmp_path, "activation").add([one])
    file = record.ResultFile(tmp_path, "activation", resume=True)
    file.add([two])
    assert file.lines == [one, two]
    assert record.read(file.finish()) == [one, two]
    assert record.ResultFile(tmp_path, "activation").lines == []
    (tmp_path / "activation.jsonl.partial").unlink()
    again = record.ResultFile(tmp_path, "activation", resume=True)  # of a suite that was interrupted later
    assert again.lines == [one, two]
    again.add([some("three")])
    assert [line["case"] for line in record.read(again.finish())] == ["one", "two", "three"]
    record.ResultFile(tmp_path, "activation").interrupt()  # in its first case
    assert len(record.ResultFile(tmp_path, "activation", resume=True).lines) == 3


@pytest.mark.parametrize(("name", "other"), [("commit", "0000000"), ("gpu", "another"), ("versions", {"torch": "0"})])
def test_a_finished_file_of_another_card_commit_or_version_is_measured_anew(name, other, tmp_path):
    file = record.ResultFile(tmp_path, "activation")
    file.add([some("one"), some("two") | {name: other}])
    path = file.finish()
    before = path.read_bytes()
    again = record.ResultFile(tmp_path, "activation", resume=True)
    assert again.lines == []
    again.interrupt()
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [1, 20])
def test_of_a_file_that_was_cut_off_the_whole_cases_are_resumed(cut, tmp_path):
    file = ResultFile(tmp_path, "activation")
    file.add([some("A"), some("A", impl="eager")])
    file.add([some("B"), some("B", impl="eager")])
    partial = file.interrupt()
    partial.write_bytes(partial.read_bytes()[:-cut])
    again = ResultFile(tmp_path, "activation", resume=True)
    assert [one["case"] for one in again.lines] == ["A", "A"], "B's other implementations may be lost, it is run again"
    again.add([some("B")])
    assert [one["case"] for one in read(again.finish())] == ["A", "A", "B"]


def test_of_a_file_that_was_cut_off_in_its_first_line_nothing_is_resumed(tmp_path):
    (tmp_path / "activation.jsonl.partial").write_text('{"case": "A"')
    assert ResultFile(tmp_path, "activation", resume=True).lines == []


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_refused_and_spoils_no_line(number, tmp_path):
    file = ResultFile(tmp_path, "activation")
    file.add([some("A")])
    with pytest.raises(ValueError, match="JSON"):
        file.add([some("B"), some("B", wall_ms=number), some("B")])
    assert [one["case"] for one in read(file.interrupt())] == ["A"], (
        "and no half of a case, which --resume would take as done"
    )


@pytest.mark.parametrize(
    "text",
    [
        '{"case": "X-re',
        "",
        "null",
        "[1, 2]",
        '{"case": "X-relu-256"}',
        json.dumps({**dict.fromkeys(FIELDS), "extra": 1}),
    ],
    ids=["cut off", "empty line", "null", "a list", "fields missing", "a field too many"],
)
def test_read_names_the_file_and_the_line_that_is_none(text, tmp_path):
    path = tmp_path / "activation.jsonl"
    path.write_text(f"{json.dumps(some())}\n{text}\n{json.dumps(some())}\n")
    with pytest.raises(ValueError, match=r"activation\.jsonl: line 2 is not"):
        read(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("versions", None, "versions must be dict, got null"),
        ("reason", 5, r"reason must be str \| None, got 5"),
        ("case", None, "case must be str, got null"),
        ("ok", None, "ok must be bool, got null"),
        ("host_us", "12", r"host_us must be int \| float \| None, got \"12\""),
        ("device_ms", None, "device_ms must be there where ok is true, got null"),
        ("device_ms", {"p20": 0.1, "p50": None, "p80": 0.3}, "device_ms must be numbers p20, p50 and p80, got .*null"),
        ("device_ms", {"p20": 0.1}, "device_ms must be numbers p20, p50 and p80"),
        ("device_ms", {}, "device_ms must be numbers p20, p50 and p80"),
    ],
)
def test_read_names_the_field_that_is_none_of_a_result_line(field, value, message, tmp_path):
    path = tmp_path / "activation.jsonl"
    good = some() | {"gpu": "NVIDIA H100 80GB HBM3"}
    path.write_text(f"{json.dumps(good)}\n{json.dumps(good | {field: value})}\n")
    with pytest.raises(
        ValueError,
        match=rf"activation\.jsonl: line 2 is not a result line: {message}.*; mend the line, or move the file",
    ):
        read(path)


def test_a_field_that_came_later_is_null_in_older_files(tmp_path):
    path = tmp_path / "activation.jsonl"
    old = {field: value for field, value in some().items() if field != "host_relu_us"}
    path.write_text(f"{json.dumps(old)}\n{json.dumps(some() | {'host_relu_us': 6.5})}\n")
    assert [one["host_relu_us"] for one in read(path)] == [None, 6.5]


def test_a_timed_line_of_a_cpu_has_a_wall_time(tmp_path):
    path = tmp_path / "activation.jsonl"
    path.write_text(json.dumps(some(wall_ms=None) | {"gpu": None}) + "\n")
    with pytest.raises(ValueError, match="line 1 is not a result line: wall_ms must be there"):
        read(path)


def test_read_names_the_line_that_is_not_utf_8(tmp_path):
    path = tmp_path / "activation.jsonl"
    path.write_bytes(json.dumps(some()).encode() + b'\n{"case": "\xff"}\n')
    with pytest.raises(ValueError, match=r"activation\.jsonl: line 2 is not JSON: .*0xff"):
        read(path)


@pytest.mark.parametrize(
    ("reason", "skip"),
    [("skipped: no", True), ("Unsupported: no", True), ("misses its error budget", False), (None, False)],
)
def test_what_an_implementation_does_not_do_is_no_failure(reason, skip):
    assert record.is_skip(some(ok=reason is None, reason=reason)) is skip
