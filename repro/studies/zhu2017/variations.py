"""What exhibits that vary the character model share: three rules for every setting, its zeros and what they cost."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from repro.studies.base import Results
from repro.studies.comparing import interval, paired
from repro.studies.zhu2017 import comparisons as c
from repro.studies.zhu2017.profiles import GUESSING

DENSE, PAPERS, HELD = "t = 0", "t = 1e-6", "80% held"
RULES = {DENSE: ("static", 0.0), PAPERS: ("static", 1e-6), HELD: ("held", 0.8)}

BRIEF = {"evaluations": 2, "measurements": 4}  # there are hundreds of these trainings


def zeros(results: Results, setting: str, rule: str = PAPERS) -> np.ndarray:
    """Zeros over the training, percent, by seed."""
    return c.per_seed(results, f"{setting}, {rule}", c.training_zeros)


def cost(results: Results, setting: str, rule: str = PAPERS) -> np.ndarray:
    """Validation loss against that of the same setting at t = 0, percent, by seed."""
    return c.relative_loss(results, f"{setting}, {rule}", f"{setting}, {DENSE}")


def dense_loss(results: Results, setting: str) -> np.ndarray:
    """Validation loss at t = 0, nats a symbol, by seed."""
    return results.metric(f"{setting}, {DENSE}", "validation_loss")


def unlearned(results: Results, setting: str) -> int:
    """How many seeds' dense training ends within 1 % of guessing by frequency."""
    return int((dense_loss(results, setting) > 0.99 * GUESSING[results.arms[f"{setting}, {DENSE}"][0].corpus]).sum())


def not_learned(results: Results, found: Iterable[str]) -> str:
    """For a figure's note: settings of which a dense training ends within 1 % of guessing by frequency; "" if all learned."""
    names = []
    for setting in found:
        failed, seeds = unlearned(results, setting), np.count_nonzero(~np.isnan(dense_loss(results, setting)))
        if failed:
            names.append(str(setting) if failed == seeds else f"{setting} ({failed} of {seeds} seeds)")
    return f"\nno better than guessing by frequency, even at t = 0: {'; '.join(names)}" if names else ""


def spread(found: list[np.ndarray]) -> np.ndarray:
    """Largest - smallest over settings, by seed."""
    return paired(lambda *settings: np.ptp(settings, axis=0), *found)


def bars(found: Iterable[np.ndarray]) -> np.ndarray:
    """(3, settings) mean, low and high."""
    return np.array([interval(values) for values in found]).T


def cost_axis(ax) -> None:
    """A vertical axis for percents of loss: linear within 1 either way, logarithmic beyond."""
    ax.set_yscale("symlog", linthresh=1)
    ax.margins(y=0.1)
    ax.yaxis.set_major_locator(FixedLocator([-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100, 200]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.set_ylabel("validation loss against t = 0, %\n(linear from -1 to 1, then log scale)")
