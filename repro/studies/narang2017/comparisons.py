"""The paper's number beside ours, row by row."""

from __future__ import annotations

import numpy as np

from repro.report.published import Published, published_value
from repro.studies.base import Results
from repro.studies.comparing import relative_percent

STUDY = "narang2017"

# The arms of Table 3, in its order, and the series that holds the paper's numbers.
TABLE3 = {
    "RNN dense 1760": "RNN Dense Baseline",
    "RNN dense 704": "RNN Dense Small",
    "RNN dense 2560": "RNN Dense Medium",
    "RNN sparse 1760": "RNN Sparse 1760",
    "RNN sparse 2560": "RNN Sparse Medium",
    "RNN sparse 3072": "RNN Sparse Big",
    "GRU dense 2560": "GRU Dense",
    "GRU sparse 2560": "GRU Sparse",
    "GRU sparse 3568": "GRU Sparse Medium",
}


def paper(exhibit: str, series: str, metric: str, x: float | None = None) -> Published:
    """One published number of this study."""
    return published_value(STUDY, exhibit, series, metric, x)


def table3(arm: str, metric: str) -> Published:
    """The paper's number for one of our arms."""
    return paper("table3", TABLE3[arm], metric, int(arm.split()[-1]))


def base_of(arm: str) -> str:
    """The dense model that Table 3 compares an arm with."""
    return "GRU dense 2560" if arm.startswith("GRU") else "RNN dense 1760"


def relative_cer(results: Results, arm: str, base: str) -> np.ndarray:
    """100 (CER(arm) - CER(base)) / CER(base) of the test set, paired by seed; positive where the arm reads worse."""
    return relative_percent(results.metric(arm, "test_cer"), results.metric(base, "test_cer"))
