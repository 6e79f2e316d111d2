"""compute-sanitizer over small calls of the attention kernels, on a card.

The tool is the one that ``COMPUTE_SANITIZER`` names, or else the first on the PATH. Before 2026.4 its racecheck reports what
Triton's ``warp_specialize`` hands its warps, which hardware barriers order (docs/perf/attention.md): older ones run memcheck only.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import sanitized_calls
from sanitized_calls import GROUPS

CALLS = Path(__file__).parents[1] / "sanitized_calls.py"
FOLLOWS_MBARRIERS = (2026, 4)


def tool() -> str | None:
    return os.environ.get("COMPUTE_SANITIZER") or shutil.which("compute-sanitizer")


@functools.cache
def version() -> tuple[int, int]:
    said = subprocess.run([tool(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"Version (\d+)\.(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


def sanitized(check: str, group: str, *arguments: str) -> subprocess.CompletedProcess:
    portable = group in ("portable", "decode")
    if not portable and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are Hopper's")
    if not tool():
        pytest.skip("compute-sanitizer is not there: neither COMPUTE_SANITIZER nor the PATH names it")
    if check == "racecheck" and version() < FOLLOWS_MBARRIERS:
        pytest.skip(
            f"racecheck of {version()} reports right hand-overs; {FOLLOWS_MBARRIERS} is the first seen to follow them"
        )
    ours = [f"--kernel-name={name}" for name in ("kns=attention", "kne=before", "kne=after")]
    if portable:
        ours = ["--kernel-name-exclude=kns=at6native"]
    command = [tool(), f"--tool={check}", "--error-exitcode=9", *ours, sys.executable, str(CALLS), group, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.gpu
@pytest.mark.timeout(420)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_nothing_is_read_or_written_out_of_bounds_or_out_of_turn(check, group):
    done = sanitized(check, group)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    dims, options, *_ = GROUPS[group]
    assert done.stdout.count("ran ") == len(dims) * len(options)


@pytest.mark.gpu
@pytest.mark.timeout(420)
def test_racecheck_sees_an_item_that_is_told_before_it_is_written():
    done = sanitized("racecheck", "few", "broken")
    assert done.returncode == 9, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"Race reported .*told_too_early|Race reported .*attention_forward", done.stdout)


@pytest.mark.parametrize("group", ["portable", "decode"])
def test_the_portable_calls_are_calls_that_run(group, monkeypatch, capsys):
    dims, options, *_ = GROUPS[group]
    monkeypatch.setitem(GROUPS, group, (dims[:1], options, 1 if group == "decode" else 30, 40))
    sanitized_calls.main(group, False)
    assert capsys.readouterr().out.count("ran ") == len(options)
