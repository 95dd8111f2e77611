"""The papers' own numbers, kept as data in `data/papers/<study>.csv`, each with how it is known."""

import csv
import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from repro.errors import ReproError
from repro.files import repository_root

COLUMNS = ("exhibit", "series", "x", "metric", "value", "unit", "known", "where")

# read: in the paper's text; image: on a picture of its table or figure; remembered: from memory of the paper, unverified;
# derived: by arithmetic from the others, not printed in the paper.
KNOWN = ("read", "image", "remembered", "derived")


class Published(NamedTuple):
    """One published number, its unit, how it is `known` (see `KNOWN`) and where in the paper it stands."""

    value: float
    unit: str
    known: str
    where: str


def papers_file(study: str, suffix: str):
    """The path of `data/papers/<study>.<suffix>`; an unknown study is an error that lists the studies there are."""
    folder = repository_root() / "data" / "papers"
    path = folder / f"{study}.{suffix}"
    if not path.is_file():
        present = ", ".join(sorted(p.stem for p in folder.glob(f"*.{suffix}"))) or "none"
        raise ReproError(f"no {path}: the studies with a .{suffix} file there are {present}")
    return path


def load_published(study: str) -> pd.DataFrame:
    """All published numbers of `study`, one row each, columns `COLUMNS`; `x` is NaN where the number has none.

    Raises ReproError, naming file and line, for a wrong header, a missing cell, an `x` or `value` that is no number, an
    unknown tag or a second row for the same (exhibit, series, x, metric).
    """
    path = papers_file(study, "csv")
    return _read(path, path.stat().st_mtime_ns).copy()


@lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> pd.DataFrame:
    """Read once for all the numbers that are asked for, until the file changes."""
    rows, lines = [], {}
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.reader(stream)
        header = next(reader, [])
        if tuple(header) != COLUMNS:
            raise ReproError(f"{path}, line 1: the header is {','.join(header)!r}, it should be {','.join(COLUMNS)!r}")
        for cells in reader:
            row = _row(cells, f"{path}, line {reader.line_num}")
            identity = (row["exhibit"], row["series"], str(row["x"]), row["metric"])
            if identity in lines:
                raise ReproError(f"{path}, line {reader.line_num}: {' / '.join(identity)} is already on line {lines[identity]}")
            lines[identity] = reader.line_num
            rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def published_value(study: str, exhibit: str, series: str, metric: str, x: float | None = None) -> Published:
    """The one published number at (exhibit, series, metric, x); without `x` the only one, whatever its `x`.

    Raises ReproError when nothing or more than one row matches; the error lists what exists at the first name that fails.
    """
    rows = load_published(study)
    asked = {"exhibit": exhibit, "series": series, "metric": metric} | ({} if x is None else {"x": float(x)})
    for column, wanted in asked.items():
        present = rows[column].unique()
        rows = rows[rows[column] == wanted]
        if rows.empty:
            path = " / ".join(str(asked[name]) for name in list(asked)[: list(asked).index(column)]) or study
            raise ReproError(f"no published {column} {wanted!r} for {path}: there is {' | '.join(map(str, sorted(present)))}")
    if len(rows) > 1:
        choices = ", ".join(f"{value:g}" for value in rows["x"])
        raise ReproError(f"{study} {exhibit} / {series} / {metric} has {len(rows)} values: give x, one of {choices}")
    row = rows.iloc[0]
    return Published(float(row["value"]), row["unit"], row["known"], row["where"])


def _row(cells: list[str], where: str) -> dict:
    if len(cells) != len(COLUMNS):
        raise ReproError(f"{where}: {len(cells)} cells, there should be {len(COLUMNS)}: {','.join(COLUMNS)}")
    row = dict(zip(COLUMNS, cells, strict=True))
    if empty := [name for name in COLUMNS if name != "x" and not row[name].strip()]:
        raise ReproError(f"{where}: {', '.join(empty)} is empty")
    if row["known"] not in KNOWN:
        raise ReproError(f"{where}: known is {row['known']!r}, it should be one of {', '.join(KNOWN)}")
    row["value"] = _number(row["value"], f"{where}: value")
    row["x"] = _number(row["x"], f"{where}: x") if row["x"] else math.nan
    return row


def _number(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ReproError(f"{where} is {text!r}, it should be a finite number")
    return number
