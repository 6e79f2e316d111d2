"""Cases are data: ``cases/<family>.toml`` holds every row of the five seed documents, and the lab's own.

A case is one op on one set of shapes; its rows are the documents' published figures for it, by pass and unit. The ops of
one file are a family, and share a result file.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "cases"
PASSES = ("fwd", "fwd_grad", "bwd", "fwd_bwd")
SUITES = ("quick", "seeds", "full")
UNITS = ("ms", "MiB", "MB")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Row:
    """One published row: figures by column ("torch", "triton", "compile", "flash"), empty where the document says TBD."""

    id: str
    pass_: str
    unit: str
    published: dict[str, float]
    note: str = ""


@dataclass(frozen=True)
class Case:
    id: str
    op: str
    args: dict[str, Any]
    shape: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    passes: tuple[str, ...]
    document: str
    gpu: str
    suites: tuple[str, ...]
    rows: tuple[Row, ...] = ()
    file: str = ""  # the result file's stem: the family, or "<family>-<op>" where that op of it was chosen alone

    @property
    def label(self) -> str:
        """The op with the arguments that name a variant: "activation relu", "softmax dim=-2"."""
        named = (str(v) if isinstance(v, str) else f"{k}={v}" for k, v in self.args.items() if k != "eps")
        return " ".join((self.op, *named))

    @property
    def family(self) -> str:
        return self.file.partition("-")[0]

    def published(self, pass_: str, unit: str = "ms") -> dict[str, float]:
        """The document's figures for a pass, all rows together."""
        return {k: v for row in self.rows if row.pass_ == pass_ and row.unit == unit for k, v in row.published.items()}


def _row(where: str, table: dict) -> Row:
    table = dict(table)
    row = Row(
        id=table.pop("id"),
        pass_=table.pop("pass"),
        unit=table.pop("unit"),
        published=table.pop("published"),
        note=table.pop("note", ""),
    )
    if table or row.pass_ not in PASSES or row.unit not in UNITS:
        wanted = f"passes {PASSES}, units {UNITS}"
        raise ValueError(
            f"{where}: row {row.id}: unknown keys {list(table)}, pass {row.pass_!r} or unit {row.unit!r}; {wanted}"
        )
    return row


def _dtype(name: str, where: str, id_: str | None) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"{where}: case {id_}: dtype must be one of {list(DTYPES)}, got {name!r}")
    return DTYPES[name]


def parse(table: dict, where: str) -> Case:
    """One ``[[case]]`` table; refuses what it does not know."""
    table = dict(table)
    id_ = table.pop("id", "without an id")
    try:
        rows = tuple(_row(where, r) for r in table.pop("row", ()))
        case = Case(
            id=id_,
            op=table.pop("op"),
            args=table.pop("args"),
            shape={name: tuple(size) for name, size in table.pop("shape").items()},
            dtype=_dtype(table.pop("dtype"), where, id_),
            passes=tuple(table.pop("passes")),
            document=table.pop("document"),
            gpu=table.pop("gpu"),
            suites=tuple(table.pop("suites")),
            rows=rows,
        )
    except KeyError as missing:
        raise ValueError(f"{where}: case {id_}: lacks {missing}") from None
    if table or not set(case.passes) <= set(PASSES) or not set(case.suites) <= set(SUITES):
        raise ValueError(
            f"{where}: case {case.id}: unknown keys {list(table)}, passes {case.passes} or suites {case.suites}"
        )
    return case


def load_cases(suite: str = "full", ops: Iterable[str] = ()) -> list[Case]:
    """All cases of a suite ("full" is everything), in the order of the files; of some families or ops only, if named.

    A name that is both ("softmax") is the family. Ops that are a part of their family get result files of their own, so
    that a run of the part never replaces the whole.
    """
    if suite not in SUITES:
        raise ValueError(f"bench: suite must be one of {list(SUITES)}, got {suite!r}")
    families: dict[str, list[Case]] = {}
    files = {}
    for path in sorted(FOLDER.glob("*.toml")):
        with path.open("rb") as file:
            tables = tomllib.load(file)["case"]
        for case in (parse(table, path.name) for table in tables):
            if case.id in files:
                raise ValueError(f"{path.name}: case {case.id}: the id is taken in {files[case.id]}")
            files[case.id] = path.name
            families.setdefault(path.stem, []).append(replace(case, file=path.stem))
    asked = set(ops)
    known = set(families) | {c.op for cases in families.values() for c in cases}
    if unknown := asked - known:
        raise ValueError(f"bench: op must be among {sorted(known)}, got {sorted(unknown)}")
    chosen = []
    for family, cases in families.items():
        mine = [c for c in cases if suite == "full" or suite in c.suites]
        if asked and family not in asked and not {c.op for c in mine} <= asked:
            mine = [replace(c, file=f"{family}-{c.op}") for c in mine if c.op in asked]
        chosen += mine
    return chosen
