"""Result lines: one JSON object a line, a file written whole or not at all."""

import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TextIO

import torch

from trinix import __version__, device

_TEXT, _NUMBER = str | None, int | float | None
_TYPES = {
    "case": str, "op": str, "pass": str, "impl": str, "backend": _TEXT, "device_ms": dict | None, "host_us": _NUMBER,
    "wall_ms": _NUMBER, "graph_ms": _NUMBER, "peak_mib": _NUMBER, "inputs_mib": _NUMBER, "bytes": _NUMBER, "flops": _NUMBER,
    "ceiling": _TEXT, "ceiling_share": _NUMBER, "error_ratio": _NUMBER, "ok": bool, "reason": _TEXT, "gpu": _TEXT,
    "versions": dict, "commit": _TEXT, "time": str, "host_relu_us": _NUMBER,
}  # fmt: skip
FIELDS = tuple(_TYPES)
_LATER = ("host_relu_us",)  # fields that older files lack


def line(**known) -> dict:
    """A result line: the given fields, this run's stamp, null for the rest."""
    if unknown := set(known) - set(FIELDS):
        raise KeyError(f"not fields of a result line: {sorted(unknown)}")
    values = {**known, **stamp(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
    return {field: values.get(field) for field in FIELDS}


# What other people's kernels are imported from -> its package, named in the versions where it is installed.
PACKAGES = {
    "liger_kernel": "liger-kernel",
    "quack": "quack-kernels",
    "flashmlp": "flashmlp",
    "flash_attn": "flash-attn",
    "flash_attn.cute": "flash-attn-4",
    "tvm_ffi": "apache-tvm-ffi",
    "cutlass": "nvidia-cutlass-dsl",
}


@cache
def stamp() -> dict:
    """What produced a result: card, versions, commit."""
    card = device.card()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": version_of("triton")}
    versions |= {package: version for package in PACKAGES.values() if (version := version_of(package))}
    if card:
        versions["cudnn"] = str(torch.backends.cudnn.version())
        versions["driver"] = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader,nounits") or None
    commit = _commit()
    if commit is None:  # an installed package
        versions["trinix"] = __version__
    return {"gpu": card.name if card else None, "versions": versions, "commit": commit}


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, and where its sources differ a "+" and which they are: what other sources left is not resumed.
    TRINIX_COMMIT says it of a copy, whose history may be another's."""
    if said := os.environ.get("TRINIX_COMMIT"):
        return said
    here = Path(__file__).resolve()
    git = ("git", "-C", str(here.parents[3]))
    own = here.relative_to(here.parents[3]).as_posix()
    # an installed package may lie inside another project's repository
    ours = _run(*git, "ls-files", "--full-name", own) == own
    commit = _run(*git, "rev-parse", "--short", "HEAD") if ours else None
    if not commit:
        return None
    if not _run(*git, "status", "--porcelain", "--untracked-files=normal", "src"):
        return commit
    digest = hashlib.sha256()
    for path in sorted(p for p in here.parents[1].rglob("*") if p.suffix in (".py", ".cpp", ".toml", ".txt")):
        digest.update(path.relative_to(here.parents[1]).as_posix().encode() + path.read_bytes())
    return f"{commit}+{digest.hexdigest()[:7]}"


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


class ResultFile:
    """Lines of one op. ``add`` appends to ``<op>.jsonl.partial``, which ``finish`` renames: a complete run replaces the
    last result in one step; an interrupted one leaves its finished lines in the partial file and the last result alone.

    ``resume`` keeps what the partial file holds: ``lines``, all of this card, these versions and this commit. Where it holds none,
    what a finished file of such lines holds: of a suite that was interrupted the files before are not run again.

    The partial file is locked from the first line to the last: a second run into it would write into the finished file.
    """

    def __init__(self, folder: Path, op: str, *, resume: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{op}.jsonl"
        self.partial = folder / f"{op}.jsonl.partial"
        self._file = _locked(self.partial)
        self._keep(kept(folder, op) if resume else [])

    def add(self, lines: Iterable[dict]) -> None:
        """The lines of one case, in one write: a run that is killed leaves whole cases."""
        lines = list(lines)
        self._write(lines)
        self.lines += lines

    def _keep(self, lines: list[dict]) -> None:
        """These lines and no others, in one step. The new file is locked before it has the old one's name."""
        rest = self.partial.with_suffix(".rest")
        rest.unlink(missing_ok=True)
        before, self._file, self.lines = self._file, _locked(rest), lines
        self._write(lines)
        os.replace(rest, self.partial)
        before.close()

    def _write(self, lines: list[dict]) -> None:
        self._file.write("".join(json.dumps(one, allow_nan=False) + "\n" for one in lines))
        self._file.flush()

    def put(self, case: str, lines: Iterable[dict]) -> None:
        """As ``add``, in the place of the lines that the case may have."""
        if any(one["case"] == case for one in self.lines):
            self._keep([one for one in self.lines if one["case"] != case])
        self.add(lines)

    def lacks(self) -> set[tuple[str, str]]:
        """(case, implementation) that the last result has and this run does not: finishing would lose them."""
        before, ours = ({(one["case"], one["impl"]) for one in lines} for lines in (last(self.path), self.lines))
        return before - ours

    def finish(self) -> Path:
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self.partial, self.path)
        self._file.close()
        return self.path

    def interrupt(self) -> Path:
        """Close without replacing the last complete result; returns where the finished lines are."""
        self._file.close()
        return self.partial


def _locked(path: Path) -> TextIO:
    """The file, open to append to, and nobody else's until it is closed."""
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samefile(file.fileno(), path)  # or another run has renamed it since it was opened
    except (BlockingIOError, FileNotFoundError):
        ours = False
    if not ours:
        file.close()
        raise OSError(f"{path}: another run is writing it; wait for its end, or use another --out")
    return file


def kept(folder: Path, op: str) -> list[dict]:
    """The lines that a resumed run does not take again."""
    partial = folder / f"{op}.jsonl.partial"
    if partial.exists() and partial.stat().st_size:
        return _resumed(partial)
    return _finished(folder / f"{op}.jsonl")


def last(path: Path) -> list[dict]:
    """The lines of a finished file, none where there is none yet."""
    return read(path) if path.exists() else []


def _resumed(partial: Path) -> list[dict]:
    whole, _, cut = partial.read_bytes().rpartition(b"\n")
    lines = _parsed(partial, whole)
    if cut:  # by a full disk, say; the case of the line before may be half there too
        lines = [one for one in lines if one["case"] != lines[-1]["case"]]
    for one in lines:
        for name, here in stamp().items():
            if one[name] != here:
                raise ValueError(
                    f"{partial}: --resume: its lines have {name} {one[name]}, this run {here}; one file is one card, one "
                    "commit and one set of versions: finish it there, or move it away"
                )
    return lines


def _finished(path: Path) -> list[dict]:
    """The lines of a finished file if they are of this card, these versions and this commit, else none."""
    lines, here = last(path), stamp()
    return lines if all(one[name] == here[name] for one in lines for name in here) else []


def read(path: Path) -> list[dict]:
    """The lines of a result file; an error names the line that is not one."""
    return _parsed(path, path.read_bytes())


_CURE = "mend the line, or move the file away"


def _parsed(path: Path, data: bytes) -> list[dict]:
    lines = []
    for number, text in enumerate(data.splitlines(), 1):
        try:
            one = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}; {_CURE}") from None
        if isinstance(one, dict):
            one |= {field: None for field in _LATER if field not in one}
        if wrong := _wrong(one):
            raise ValueError(f"{path}: line {number} is not a result line: {wrong}; {_CURE}")
        lines.append(one)
    return lines


def _wrong(one) -> str | None:
    """Why a parsed line is no result line."""
    if not isinstance(one, dict) or set(one) != set(FIELDS):
        got = list(one) if isinstance(one, dict) else json.dumps(one)
        return f"it must be an object of {', '.join(FIELDS)}, got {got}"
    clock = "wall_ms" if one["gpu"] is None else "device_ms"
    for field, kind in _TYPES.items():
        if not isinstance(one[field], kind):
            wanted = kind.__name__ if isinstance(kind, type) else kind
            return f"{field} must be {wanted}, got {json.dumps(one[field])}"
    if one["ok"] and one[clock] is None:
        return f"{clock} must be there where ok is true, got null"
    spread = one["device_ms"]
    if spread is not None and (
        set(spread) != {"p20", "p50", "p80"} or not all(isinstance(ms, int | float) for ms in spread.values())
    ):
        return f"device_ms must be numbers p20, p50 and p80, got {json.dumps(spread)}"
    return None


def is_skip(one: dict) -> bool:
    """Whether a line says that its implementation does not do this: not that it failed, or was wrong."""
    return (one["reason"] or "").startswith(("skipped", "Unsupported"))
