"""Seeded bootstrap intervals and seed-paired comparisons, vectorised."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from repro.errors import ReproError


class Interval(NamedTuple):
    """A mean and its bootstrap interval; `low` and `high` are NaN where one value allows no interval."""

    mean: float
    low: float
    high: float


def bootstrap_band(values, level: float = 0.95, resamples: int = 10_000, seed: int = 0):
    """Mean over seeds and its percentile bootstrap interval at every point of a curve.

    values: `(seeds, points)`, finite. Returns `(mean, low, high)`, each `(points,)`; a resample draws whole seeds, so
    neighbouring points stay together. With one seed there is no interval: low and high are NaN. (Efron 1979; with three
    seeds the 95 % interval is exactly their range. Of normal samples it covers the mean in 75 % of cases with three seeds
    and in 83 % with five.)

    Raises ReproError for no seeds, or a value that is not finite: count those and say so, they are not to be averaged away.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or len(values) == 0:
        raise ReproError(f"a bootstrap needs a (seeds, points) array with at least one seed, not shape {values.shape}")
    if not np.isfinite(values).all():
        raise ReproError(f"{(~np.isfinite(values)).sum()} of {values.size} values are not finite: set them apart first")
    mean = values.mean(axis=0)
    seeds = len(values)
    if seeds == 1:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    # How often each seed is drawn says all about a resample; its mean is then one matrix product.
    counts = np.random.default_rng(seed).multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    # Resampling the deviations, not the values, keeps equal values exactly equal to their mean.
    deviations = counts @ (values - mean) / seeds
    low, high = np.quantile(deviations, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return mean, mean + low, mean + high


def bootstrap_interval(values, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean of one value per seed and its percentile bootstrap interval; see `bootstrap_band`."""
    mean, low, high = bootstrap_band(np.asarray(values, dtype=float).reshape(-1, 1), level, resamples, seed)
    return Interval(float(mean[0]), float(low[0]), float(high[0]))


def paired(ours: pd.DataFrame, base: pd.DataFrame, metric: str, on: str = "replicate") -> tuple[np.ndarray, np.ndarray]:
    """The values of `metric` in two arms, matched by the seed column `on`, in its order; unmatched seeds are left out.

    Raises ReproError when a column is missing or one arm has two rows for one seed (then the arm holds two settings).
    """
    columns = []
    for name, frame in (("first", ours), ("second", base)):
        if absent := [column for column in (on, metric) if column not in frame]:
            raise ReproError(f"the {name} arm has no column {absent[0]!r}: it has {', '.join(map(str, frame.columns))}")
        if frame[on].duplicated().any():
            raise ReproError(f"the {name} arm has several rows for one {on}: narrow it to one setting before pairing")
        columns.append(frame.set_index(on)[metric])
    both = pd.concat(columns, axis=1, join="inner").sort_index()
    return both.iloc[:, 0].to_numpy(float), both.iloc[:, 1].to_numpy(float)


def relative_percent(ours, base) -> np.ndarray:
    """`100 (ours - base) / base`, elementwise: positive where ours is larger. Pair the seeds first (`paired`)."""
    ours, base = np.asarray(ours, dtype=float), np.asarray(base, dtype=float)
    return 100 * (ours - base) / base
