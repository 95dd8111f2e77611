"""The paper's number beside ours, row by row, our values as mean and interval, and arms against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from repro.report.published import Published
from repro.studies.base import summary


def interval(values) -> tuple[float, float, float]:
    """Mean, low and high of values by seed."""
    found = summary(values)
    return found["ours"], found["low"], found["high"]


def paired(function: Callable[..., np.ndarray], *operands: np.ndarray) -> np.ndarray:
    """function(*operands) by seed; NaN where one has no record, infinity where one diverged, also where all did."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(sum(operands)), np.inf, function(*operands))


def relative_percent(ours: np.ndarray, base: np.ndarray) -> np.ndarray:
    """100 (ours - base) / base, `paired`."""
    return paired(lambda ours, base: 100 * (ours - base) / base, ours, base)


def beside(rows: Iterable[tuple[str, str, Published | None, object]]) -> pd.DataFrame:
    """(row, quantity, the paper's number or None, our value or values by seed) -> frame with interval and number of seeds."""
    table = []
    for name, quantity, published, values in rows:
        ours = summary(np.atleast_1d(np.asarray(values, dtype=float)))
        table.append(
            {
                "": name,
                "quantity": quantity,
                "paper": published.value if published else np.nan,
                "known": published.known if published else "",
                **ours,
            }
        )
    return pd.DataFrame(table)
