"""Records as pandas frames: one row per trial, or one row per point of a curve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from repro.engine.store import Record
from repro.errors import ReproError

if TYPE_CHECKING:
    import pandas


def frame(records: Iterable[Record]) -> pandas.DataFrame:
    """One row per record: `key`, `kind`, `diverged`, all spec fields (nested ones with dots), all metrics.

    Raises ReproError when a metric has the name of a field: one column cannot hold what was asked for and what came
    out.
    """
    import pandas

    return pandas.DataFrame([_joined(_described(record), record.metrics, "metric") for record in records])


def curves(records: Iterable[Record], name: str) -> pandas.DataFrame:
    """One row per point of the curve `name` of each record that has it, beside the columns `frame` gives the record's
    spec.

    Raises ReproError, listing the curves there are, when no record has it.
    """
    import pandas

    records = list(records)
    rows = []
    for record in records:
        columns = record.curves.get(name, {})
        for point in zip(*columns.values(), strict=True):
            rows.append(_joined(_described(record), dict(zip(columns, point, strict=True)), "curve column"))
    if not any(name in record.curves for record in records):
        there = sorted({curve for record in records for curve in record.curves})
        raise ReproError(f"no record has a curve {name!r}: these have {', '.join(there) or 'none'}")
    return pandas.DataFrame(rows)


def _described(record: Record) -> dict[str, Any]:
    own = {"key": record.key, "kind": record.kind, "diverged": record.diverged}
    return _joined(own, dict(_flat(record.spec)), "field")


def _flat(spec: Mapping[str, Any], prefix: str = ""):
    for name, value in spec.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", tuple(value) if isinstance(value, list) else value


def _joined(columns: dict[str, Any], more: Mapping[str, Any], what: str) -> dict[str, Any]:
    if both := columns.keys() & more.keys():
        raise ReproError(f"{what} {min(both)!r} has the name of another column of the record: give it a name of its own")
    return {**columns, **more}
