"""What the records of a training say, by seed, and the paper's numbers beside them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from repro.engine import Record
from repro.report.published import Published, published_value
from repro.studies.base import Results
from repro.studies.comparing import relative_percent

STUDY = "zhu2017"
CAUSES = ("saturated", "arriving", "factor", "underflow", "threshold")
TENTHS = 10
MOST_NAMED = 8  # arms in a figure's note, which has one line for them
GATES = {"i": "input gate i", "f": "forget gate f", "g": "candidate g", "o": "output gate o"}


def paper(exhibit: str, series: str, metric: str, x: float | None = None) -> Published:
    """One published number of this study."""
    return published_value(STUDY, exhibit, series, metric, x)


def per_seed(results: Results, arm: str, function: Callable[[Record], float]) -> np.ndarray:
    """function(record) by seed; NaN without a record, infinity where the run diverged."""
    values = []
    for i in range(len(results.arms[arm])):
        record = results.record(arm, i)
        values.append(math.nan if record is None else math.inf if record.diverged else function(record))
    return np.array(values)


def column(record: Record, curve: str, name: str) -> np.ndarray:
    return np.array(record.curves[curve][name])


def without_records(results: Results) -> str:
    """For a figure's note: the arms that have no record yet; "" if all have one, or none has."""
    names = [arm for arm in results.arms if not results.seeds(arm)]
    if len(names) in (0, len(results.arms)):
        return ""
    if len(names) <= MOST_NAMED:
        return f"\nno records yet: {'; '.join(names)}"
    rules = {name.rsplit(", ", 1)[-1] for name in names}
    which = f"{len(names)} of {len(results.arms)} arms" + (f", all {rules.pop()}" if len(rules) == 1 else "")
    return f"\nno records yet: {which}"


# ----------------------------------------------------------------------------------------------------------- zeros


def zero_counts(record: Record) -> np.ndarray:
    """Zeros of dnet in each row of curve "zeros", whatever their cause."""
    return sum(column(record, "zeros", cause) for cause in CAUSES)


def zeros_where(record: Record, rows: np.ndarray) -> float:
    """Percent of zeros in the chosen rows of curve "zeros", counted together."""
    return 100 * zero_counts(record)[rows].sum() / column(record, "zeros", "entries")[rows].sum()


def training_zeros(record: Record) -> float:
    """Zeros over the training, percent."""
    return zeros_where(record, np.full(len(record.curves["zeros"]["step"]), True))


def zeros_by_layer(record: Record) -> np.ndarray:
    """(layers,) percent over the training, the lowest layer first."""
    layer = column(record, "zeros", "layer")
    return np.array([zeros_where(record, layer == i) for i in range(layer.max() + 1)])


def zeros_by_tenth(record: Record) -> np.ndarray:
    """(10,) percent in each tenth of training."""
    tenth = column(record, "zeros", "step") * TENTHS // record.spec["steps"]
    return np.array([zeros_where(record, tenth == i) for i in range(TENTHS)])


def zeros_by_step(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """(percent of training, (layers, points) percent of zeros) of the measured steps."""
    step, layer = column(record, "zeros", "step"), column(record, "zeros", "layer")
    measured = np.unique(step)
    shares = [[zeros_where(record, (step == s) & (layer == i)) for s in measured] for i in range(layer.max() + 1)]
    return 100 * measured / record.spec["steps"], np.array(shares)


def zeros_by_cause(record: Record) -> dict[str, float]:
    """Percent of the zeros over the training that have each cause; 0 if there are no zeros."""
    counts = {cause: int(column(record, "zeros", cause).sum()) for cause in CAUSES}
    return {cause: 100 * count / max(1, sum(counts.values())) for cause, count in counts.items()}


# ---------------------------------------------------------------------------------------------------------- losses


def relative_loss(results: Results, arm: str, base: str, metric: str = "validation_loss") -> np.ndarray:
    """100 (loss(arm) - loss(base)) / loss(base), paired by seed; positive where the arm is worse.

    NaN where either has no record, infinity where either diverged.
    """
    return relative_percent(results.metric(arm, metric), results.metric(base, metric))


def mean_or_nan(values: np.ndarray) -> float:
    """Mean over the seeds that were run; infinity if one of them diverged."""
    found = values[~np.isnan(values)]
    return float(found.mean()) if len(found) else math.nan


def largest(arms: dict[str, float], of_arm: Callable[[str], np.ndarray], accepts: Callable[[float], bool], otherwise: str):
    """Of arms with the value that orders them, the one of largest value where `accepts` takes the mean of `of_arm` by seed.

    None where an arm above it has no records: it might be that one.
    """
    for arm in sorted(arms, key=arms.get, reverse=True):
        mean = mean_or_nan(of_arm(arm))
        if math.isnan(mean):
            return None
        if accepts(mean):
            return arm
    return otherwise


def of_extreme(found: list[np.ndarray], order: Callable[[float], float]) -> np.ndarray:
    """Of the values by seed of several arms those whose mean has the largest `order`; NaN while an arm has none."""
    means = [mean_or_nan(values) for values in found]
    if any(map(math.isnan, means)):
        return np.full(len(found[0]), math.nan)
    return found[max(range(len(found)), key=lambda i: order(means[i]))]


# -------------------------------------------------------------------------------------------------------- one step


def one_step(record: Record, training: float = 0.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(t, zeros in percent, cosine) of the static thresholds at a snapshot, t rising; the cosine is 0 where nothing is left."""
    curve = record.curves["single"]
    chosen = (np.array(curve["rule"]) == "static") & (np.array(curve["training"]) == training)
    t, zeros, entries, cosine = (np.array(curve[name], dtype=float)[chosen] for name in ("t", "zeros", "entries", "cosine"))
    return t, 100 * zeros / entries, np.nan_to_num(cosine)


def at_threshold(record: Record, t: float, training: float = 0.5) -> tuple[float, float]:
    """(zeros in percent, cosine) of one step at one of its thresholds."""
    thresholds, zeros, cosine = one_step(record, training)
    i = int(np.argmin(abs(thresholds - t)))
    return zeros[i], cosine[i]


def log_threshold_for(record: Record, percent: float, training: float = 0.5) -> float:
    """log10 of the t with `percent` of zeros in one step, interpolated in log t; NaN where the thresholds do not reach it."""
    t, zeros, _ = one_step(record, training)
    return first_crossing(np.log10(t[1:]), zeros[1:], percent, rising=True)


def log_threshold_of_cosine(record: Record, cosine: float, training: float = 0.5) -> float:
    """log10 of the t where the cosine of one step first falls to `cosine`."""
    t, _, cosines = one_step(record, training)
    return first_crossing(np.log10(t[1:]), cosines[1:], cosine, rising=False)


def cosine_at_percent(record: Record, percent: float, training: float = 0.5) -> float:
    """Cosine of one step at the t with `percent` of zeros."""
    at = log_threshold_for(record, percent, training)
    t, _, cosines = one_step(record, training)
    return math.nan if math.isnan(at) else float(np.interp(at, np.log10(t[1:]), cosines[1:]))


def first_crossing(x: np.ndarray, y: np.ndarray, level: float, rising: bool) -> float:
    """x where the straight lines through the points first reach `level`; NaN if they start beyond it or never do."""
    beyond = y >= level if rising else y <= level
    if beyond[0] or not beyond.any():
        return math.nan
    i = int(np.argmax(beyond))
    return float(x[i - 1] + (level - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


# ----------------------------------------------------------------------------------------------------- activations


def histogram(record: Record, gate: str, training: float) -> np.ndarray:
    """(bins,) shares of a gate's activations at a snapshot, all layers together."""
    curve = record.curves["histograms"]
    chosen = (np.array(curve["gate"]) == gate) & (np.array(curve["training"]) == training)
    counts = np.array(curve["count"], dtype=float)[chosen]
    return counts / counts.sum()


def extreme_percent(record: Record, gate: str, training: float) -> float:
    """Percent of activations below 0.1 or above 0.9; of g below -0.9 or above 0.9."""
    shares = histogram(record, gate, training)
    edge = round(len(shares) * (0.05 if gate == "g" else 0.1))
    return 100 * float(shares[:edge].sum() + shares[-edge:].sum())


def histogram_distance(record: Record, first: float, second: float) -> float:
    """Total variation distance of the histograms at two snapshots, mean over the gates."""
    distances = [abs(histogram(record, gate, first) - histogram(record, gate, second)).sum() / 2 for gate in GATES]
    return float(np.mean(distances))
