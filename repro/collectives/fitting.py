"""The constants of the cost model from measured times, and how well they foretell times that were not used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from repro.collectives.costs import Link, cost, terms
from repro.errors import ReproError, one_of

LEVEL, RESAMPLES = 0.95, 1000


class Measurement(NamedTuple):
    """One timing of a collective, lengths in bytes: the arguments of `repro.collectives.costs.terms`, and what it took."""

    collective: str
    algorithm: str
    ranks: int
    nbytes: int
    block: int | None
    seconds: float


class Estimate(NamedTuple):
    """A link, and the ends of the 95 % intervals of alpha, beta and gamma: NaN for a gamma that was not told, and is 0."""

    link: Link
    low: tuple[float, float, float]
    high: tuple[float, float, float]


@dataclass(frozen=True)
class Fit:
    """Estimates of one link for each value of the measurements' field `by`; under None if it is None, one link for all."""

    by: str | None
    estimates: Mapping[Hashable, Estimate]

    def link(self, measurement: Measurement) -> Link:
        """The link of a measurement; ReproError if none was fitted to its like."""
        key = _key(measurement, self.by)
        one_of(f"{self.by} of a fit", key, self.estimates)
        return self.estimates[key].link


class Errors(NamedTuple):
    """Signed relative errors, (predicted - measured) / measured, one a measurement; the median of their absolute values and the
    95 % interval of that median."""

    relative: np.ndarray
    median: float
    low: float
    high: float


def fit(measurements: Iterable[Sequence], by: str | None = None, resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """Estimate alpha, beta and gamma, none negative, by least squares of the relative error (predicted - measured) / measured.

    `measurements`: rows like `Measurement`, repeats as rows of their own. `by`: "algorithm" for one link an algorithm, or
    another field; None for one link. Intervals are percentiles of a seeded bootstrap that draws settings with all their
    repeats, as these have in common what the model gets wrong of them. Noise of a relative size s makes all constants 2 s^2 too
    small, 2 % for 10 %: hand over medians where times are noisy.

    Raises ReproError for no rows, times that are not positive, fewer than two lengths, and rows that do not tell alpha from
    beta, as those of a linear pipeline in equal blocks. Gamma is 0 where rows do not tell it from beta: without reductions, or
    with all bytes reduced in proportion, as in a ring's allreduce alone.
    """
    rows = _rows(measurements)
    groups = defaultdict(list)
    for row in rows:
        groups[_key(row, by)].append(row)
    rng = np.random.default_rng(seed)
    return Fit(by, {key: _estimate(group, resamples, rng) for key, group in groups.items()})


def predict(fit: Fit, measurements: Iterable[Sequence]) -> np.ndarray:
    """Seconds that the fitted model expects for each row; their own `seconds` are not looked at."""
    rows = [Measurement(*row) for row in measurements]
    return np.array([cost(row.collective, row.algorithm, row.ranks, row.nbytes, fit.link(row), row.block) for row in rows])


def prediction_errors(fit: Fit, held_out: Iterable[Sequence], resamples: int = RESAMPLES, seed: int = 0) -> Errors:
    """How far the model is off on rows that it was not fitted to; the interval draws settings, as in `fit`."""
    rows = _rows(held_out)
    measured = np.array([row.seconds for row in rows])
    relative = (predict(fit, rows) - measured) / measured
    drawn = _resampled(rows, resamples, np.random.default_rng(seed))
    medians = [np.median(np.abs(relative[indices])) for indices in drawn]
    low, high = _ends(medians)
    return Errors(relative, float(np.median(np.abs(relative))), float(low), float(high))


def _rows(measurements: Iterable[Sequence]) -> list[Measurement]:
    rows = [Measurement(*row) for row in measurements]
    if not rows:
        raise ReproError("no measurements: give at least one timing")
    if wrong := [row for row in rows if not 0 < row.seconds < np.inf]:
        raise ReproError(f"{len(wrong)} of {len(rows)} times are not positive and finite, as {wrong[0]}: set them apart first")
    return rows


def _key(row: Measurement, by: str | None) -> Hashable:
    if by is None:
        return None
    one_of("field", by, Measurement._fields[:-1])
    return getattr(row, by)


def _estimate(rows: list[Measurement], resamples: int, rng: np.random.Generator) -> Estimate:
    lengths = {row.nbytes for row in rows}
    if len(lengths) < 2:
        raise ReproError(f"all times of a fit are of {lengths.pop()} bytes: give two lengths or more, to tell alpha from beta")
    # Every row of the linear system divided by its time: what is left on the right is 1.
    relative = np.array([terms(*row[:-1]) for row in rows]) / np.array([row.seconds for row in rows])[:, None]
    told = _told(relative)
    best = _least_squares(relative, told)
    drawn = [_least_squares(relative[indices], told) for indices in _resampled(rows, resamples, rng)]
    low, high = _ends(drawn)
    blank = np.where(told, 0.0, np.nan)
    return Estimate(Link(*best.tolist()), tuple((low + blank).tolist()), tuple((high + blank).tolist()))


def _told(relative: np.ndarray) -> np.ndarray:
    """Which constants the rows tell apart: alpha and beta always, or ReproError."""
    scaled = relative / _norms(relative)
    if np.linalg.matrix_rank(scaled[:, :2]) < 2:
        raise ReproError("all times of a fit have as many bytes a message: vary the block size, to tell alpha from beta")
    return np.array([True, True, np.linalg.matrix_rank(scaled) == 3])


def _least_squares(relative: np.ndarray, told: np.ndarray) -> np.ndarray:
    """The constants that come closest to `relative @ constants == 1`, none negative; 0 where not `told`."""
    from scipy.optimize import nnls  # here, since every process of the studies imports this file, and few fit

    columns = relative[:, told]
    constants = np.zeros(3)
    constants[told] = nnls(columns / _norms(columns), np.ones(len(columns)))[0] / _norms(columns)
    return constants


def _norms(columns: np.ndarray) -> np.ndarray:
    """What to divide columns by: seconds and seconds per byte differ by many orders of magnitude. 1 for a column of zeros."""
    norms = np.linalg.norm(columns, axis=0)
    return np.where(norms > 0, norms, 1.0)


def _resampled(rows: list[Measurement], resamples: int, rng: np.random.Generator) -> Iterable[np.ndarray]:
    """Indices of the rows in each resample: as many settings as there are, drawn with replacement, with all of their rows."""
    settings = defaultdict(list)
    for index, row in enumerate(rows):
        settings[row[:-1]].append(index)
    places = [np.array(indices) for indices in settings.values()]
    for _ in range(resamples):
        yield np.concatenate([places[i] for i in rng.integers(len(places), size=len(places))])


def _ends(values: Sequence) -> np.ndarray:
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
