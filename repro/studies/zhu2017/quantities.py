"""The quantities that decide the claims of `data/papers/zhu2017.toml`; each definition stands there beside its ranges."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from repro.engine import Record
from repro.studies.base import Quantity, Results
from repro.studies.comparing import paired
from repro.studies.gates import SNAPSHOTS
from repro.studies.zhu2017 import comparisons as c
from repro.studies.zhu2017 import parts
from repro.studies.zhu2017.arithmetic import EXACT
from repro.studies.zhu2017.comparisons import per_seed, relative_loss
from repro.studies.zhu2017.profiles import DENSE, HELD, NT, THRESHOLDS, N, held_name, static_name

EARLY, TENTH, HALF, END = SNAPSHOTS
HARMLESS_PERCENT = 1.0  # section 4.2
CLOSE_TO_1 = 0.95

# ------------------------------------------------------------------------------------------------ figure 2: activations


def zero_activations_percent(results: Results):
    def percent(record: Record) -> float:
        at_end = c.column(record, "activations", "training") == END
        zeros, entries = (c.column(record, "activations", name)[at_end].sum() for name in ("zeros", "entries"))
        return 100 * zeros / entries

    return per_seed(results, DENSE, percent)


def extreme_percent_sigmoid(results: Results):
    return per_seed(results, DENSE, lambda record: min(c.extreme_percent(record, gate, END) for gate in "ifo"))


def extreme_percent_tanh(results: Results):
    return per_seed(results, DENSE, lambda record: c.extreme_percent(record, "g", END))


def extreme_growth_points(results: Results):
    def growth(record: Record) -> float:
        return float(np.mean([c.extreme_percent(record, g, END) - c.extreme_percent(record, g, EARLY) for g in c.GATES]))

    return per_seed(results, DENSE, growth)


def histogram_distance_10_to_100(results: Results):
    return per_seed(results, DENSE, lambda record: c.histogram_distance(record, TENTH, END))


def histogram_distance_after_10_over_whole(results: Results):
    whole = per_seed(results, DENSE, lambda record: c.histogram_distance(record, EARLY, END))
    return paired(np.divide, histogram_distance_10_to_100(results), whole)


# ----------------------------------------------------------------------------------------------------- figure 3: one step


def _of_step(t: float, which: int, normalisation: str = NT) -> Quantity:
    """`which`: 0 for the zeros of one step, in percent, 1 for its cosine."""
    return lambda results: per_seed(results, static_name(0.0, normalisation), lambda record: c.at_threshold(record, t)[which])


def cosine_step_at_80_percent(results: Results):
    return per_seed(results, DENSE, lambda record: c.cosine_at_percent(record, 80))


def cosine_step_at_80_percent_smallest(results: Results):
    return per_seed(results, DENSE, lambda record: np.min([c.cosine_at_percent(record, 80, at) for at in SNAPSHOTS]))


def decades_of_the_cliff(results: Results):
    def decades(record: Record) -> float:
        return c.log_threshold_of_cosine(record, 0.26) - c.log_threshold_of_cosine(record, CLOSE_TO_1)

    return per_seed(results, DENSE, decades)


def decades_from_45_to_80_percent(results: Results):
    """From the smallest t on where it makes 45 % zero already: then they are more."""

    def decades(record: Record) -> float:
        t, zeros, _ = c.one_step(record)
        start = math.log10(t[1]) if zeros[1] >= 45 else c.log_threshold_for(record, 45)
        return c.log_threshold_for(record, 80) - start

    return per_seed(results, DENSE, decades)


def printed_rule(record: Record) -> tuple[float, float]:
    """(zeros in percent, cosine) of one step under the rule as printed."""
    single = record.curves["single"]
    (i,) = [i for i, row in enumerate(zip(single["rule"], single["training"], strict=True)) if row == ("printed", HALF)]
    return 100 * single["zeros"][i] / single["entries"][i], single["cosine"][i]


def cosine_step_printed_rule(results: Results):
    return per_seed(results, DENSE, lambda record: printed_rule(record)[1])


# ---------------------------------------------------------------------------------------- figure 4: zeros over the training


def _over_training(arm: str) -> Quantity:
    return lambda results: per_seed(results, arm, c.training_zeros)


def printed_zeros_largest_deviation(results: Results):
    found = []
    for normalisation in (NT, N):
        dense = static_name(0.0, normalisation)
        deviations = [
            per_seed(results, dense, lambda record, t=t: c.at_threshold(record, t)[0]) - printed
            for t, printed in ((t, c.paper("figure3", "one step", "zeros_percent", t).value) for t in (1e-8, 1e-6))
        ]
        deviations += [
            per_seed(results, static_name(t, normalisation), c.training_zeros)
            - c.paper("figure4", "whole training", "zeros_percent", t).value
            for t in (1e-7, 1e-6)
        ]
        found.append(np.abs(deviations).max(0))
    return c.of_extreme(found, lambda mean: -mean)


def _farthest_from_80(shares: np.ndarray) -> float:
    return shares[np.argmax(abs(shares - 80))]


def zeros_percent_farthest_layer_1e_6(results: Results):
    return per_seed(results, static_name(1e-6), lambda record: _farthest_from_80(c.zeros_by_layer(record)))


def zeros_percent_farthest_tenth_1e_6(results: Results):
    return per_seed(results, static_name(1e-6), lambda record: _farthest_from_80(c.zeros_by_tenth(record)))


# ------------------------------------------------------------------------------------------------------- figure 5: losses

STATIC = {static_name(t): t for t in THRESHOLDS[NT] if t}


def _harmless(results: Results, arms: dict[str, float]) -> str | None:
    return c.largest(arms, lambda arm: relative_loss(results, arm, DENSE), lambda mean: mean <= HARMLESS_PERCENT, DENSE)


def largest_harmless_threshold(results: Results) -> str | None:
    """The arm of the largest harmless t under NT, the dense one if none is harmless; None while a larger one has no records."""
    return _harmless(results, STATIC)


def largest_harmless_sparsity(results: Results) -> str | None:
    """The same of the wanted sparsities."""
    return _harmless(results, {held_name(s): s for s in HELD[NT]})


def chosen_by_cosine(results: Results) -> str | None:
    """The arm of the largest t whose single step is close to the dense one."""
    return c.largest(STATIC, lambda arm: _of_step(STATIC[arm], 1)(results), lambda mean: mean >= CLOSE_TO_1, DENSE)


def _of_chosen(arm: str | None, function: Callable[[str], np.ndarray]) -> np.ndarray:
    return np.full(1, math.nan) if arm is None else function(arm)


def zeros_percent_largest_harmless_threshold(results: Results):
    return _of_chosen(largest_harmless_threshold(results), lambda arm: per_seed(results, arm, c.training_zeros))


def _relative(t: float, normalisation: str = NT, metric: str = "validation_loss") -> Quantity:
    return lambda results: relative_loss(results, static_name(t, normalisation), static_name(0.0, normalisation), metric)


def relative_validation_loss_1e_6_mean(results: Results):
    def loss_after_tenth(record: Record) -> np.ndarray:
        late = c.column(record, "evaluations", "step") > TENTH * record.spec["steps"]
        return c.column(record, "evaluations", "validation_loss")[late]

    values = []
    for i in range(len(results.arms[DENSE])):
        pair = [results.record(arm, i) for arm in (static_name(1e-6), DENSE)]
        if any(record is None for record in pair):
            values.append(math.nan)
        elif any(record.diverged for record in pair):
            values.append(math.inf)
        else:
            ours, dense = map(loss_after_tenth, pair)
            values.append(100 * float(((ours - dense) / dense).mean()))
    return np.array(values)


def validation_loss_second_half_1e_5(results: Results):
    def change(record: Record) -> float:
        steps, losses = (c.column(record, "evaluations", name) for name in ("step", "validation_loss"))
        half = losses[np.argmin(abs(steps - record.spec["steps"] / 2))]
        return 100 * (losses[-1] - half) / half

    return per_seed(results, static_name(1e-5), change)


def relative_validation_loss_chosen_by_cosine(results: Results):
    return _of_chosen(chosen_by_cosine(results), lambda arm: relative_loss(results, arm, DENSE))


def validation_loss_seed_deviation_percent(results: Results):
    losses = results.metric(DENSE, "validation_loss")
    mean = c.mean_or_nan(losses[~np.isinf(losses)])
    return paired(lambda losses: 100 * abs(losses - mean) / mean, losses)


# -------------------------------------------------------------------------------------------------------------- MACs


def redundant_share(record: Record, outer: tuple[str, ...] = ()) -> float:
    """Share of the MACs of a training that have a zero of dnet as an operand."""
    return parts.accounts(record, outer)["step"].share


def _redundant(arm: str, outer: tuple[str, ...] = ()) -> Quantity:
    return lambda results: per_seed(results, arm, lambda record: 100 * redundant_share(record, outer))


def redundant_macs_percent_harmless(results: Results):
    return _of_chosen(largest_harmless_threshold(results), lambda arm: _redundant(arm)(results))


def simulated_speedup(record: Record) -> float:
    """Of the LSTM layers' training step on the simulated accelerator, by the zeros of all measured steps."""
    return parts.simulated(record)["step"]


def simulated_over_ideal_speedup(results: Results):
    return per_seed(results, static_name(1e-6), lambda record: simulated_speedup(record) * (1 - redundant_share(record)))


def zero_columns_percent(record: Record) -> float:
    """Percent of the columns of dnet that are zero for the whole minibatch."""
    return 100 * c.column(record, "zeros", "zero_columns").sum() / c.column(record, "zeros", "columns").sum()


def whole_columns_over_zeros(results: Results):
    return per_seed(results, held_name(0.8), lambda record: zero_columns_percent(record) / c.training_zeros(record))


# ------------------------------------------------------------------------------------------------------------- causes


def cause(record: Record, name: str, training: float = HALF) -> float:
    """A column of curve "causes" at a snapshot."""
    return float(c.column(record, "causes", name)[c.column(record, "causes", "training") == training][0])


def removed_by_gate_derivative_percent(results: Results):
    return per_seed(results, DENSE, lambda record: 100 * cause(record, "lifted") / cause(record, "below"))


def variance_share_derivative_minus_arriving(results: Results):
    return per_seed(results, DENSE, lambda record: cause(record, "derivative_share") - cause(record, "arriving_share"))


def zeros_growth_points(results: Results):
    return per_seed(
        results, DENSE, lambda record: c.at_threshold(record, 1e-6, END)[0] - c.at_threshold(record, 1e-6, EARLY)[0]
    )


def percent_of(record: Record, part: tuple[str, float], whole: tuple[str, float]) -> float:
    """Of two counts of curve "causes", each at a share of training; NaN of none."""
    count = cause(record, *whole)
    return 100 * cause(record, *part) / count if count else math.nan


def full_percent_of_dead_cells(results: Results):
    return per_seed(results, DENSE, lambda record: percent_of(record, ("dead_full_cells", HALF), ("dead_cells", HALF)))


def _of_zeros(name: str) -> Quantity:
    return lambda results: per_seed(results, DENSE, lambda record: c.zeros_by_cause(record)[name])


# ------------------------------------------------------------------------------------------------------ dynamic rules


def _held(share: float) -> Quantity:
    return lambda results: relative_loss(results, held_name(share), DENSE, "test_loss")


def _held_deviation(results: Results, zeros):
    deviations = [
        per_seed(results, held_name(share, normalisation), lambda record, s=share: np.abs(zeros(record) - 100 * s).max())
        for share in (0.8, 0.9)
        for normalisation in (NT, N)
    ]
    return np.max(deviations, axis=0)


def held_zeros_deviation(results: Results):
    return _held_deviation(results, c.training_zeros)


def held_zeros_deviation_tenths(results: Results):
    return _held_deviation(results, c.zeros_by_tenth)


def static_zeros_deviation_tenths(results: Results):
    return per_seed(results, static_name(1e-6), lambda record: np.ptp(c.zeros_by_tenth(record)) / 2)


def _between_normalisations(first: str, second: str) -> Quantity:
    return lambda results: abs(paired(np.subtract, _over_training(second)(results), _over_training(first)(results)))


def held_minus_static_harmless_zeros(results: Results):
    chosen = (largest_harmless_sparsity(results), largest_harmless_threshold(results))
    held, static = (_of_chosen(arm, lambda arm: per_seed(results, arm, c.training_zeros)) for arm in chosen)
    return paired(np.subtract, held, static)


def _exact(name: str) -> Quantity:
    return lambda results: EXACT[name]()


QUANTITIES: dict[str, Quantity] = (
    {name: _exact(name) for name in EXACT}
    | {
        function.__name__: function
        for function in (
            zero_activations_percent,
            extreme_percent_sigmoid,
            extreme_percent_tanh,
            extreme_growth_points,
            histogram_distance_10_to_100,
            histogram_distance_after_10_over_whole,
            cosine_step_at_80_percent,
            cosine_step_at_80_percent_smallest,
            decades_of_the_cliff,
            decades_from_45_to_80_percent,
            cosine_step_printed_rule,
            printed_zeros_largest_deviation,
            zeros_percent_farthest_layer_1e_6,
            zeros_percent_farthest_tenth_1e_6,
            zeros_percent_largest_harmless_threshold,
            relative_validation_loss_1e_6_mean,
            validation_loss_second_half_1e_5,
            relative_validation_loss_chosen_by_cosine,
            validation_loss_seed_deviation_percent,
            redundant_macs_percent_harmless,
            simulated_over_ideal_speedup,
            whole_columns_over_zeros,
            removed_by_gate_derivative_percent,
            variance_share_derivative_minus_arriving,
            zeros_growth_points,
            full_percent_of_dead_cells,
            held_zeros_deviation,
            held_zeros_deviation_tenths,
            static_zeros_deviation_tenths,
            held_minus_static_harmless_zeros,
        )
    }
    | {
        "zeros_percent_step_0": _of_step(0.0, 0),
        "zeros_percent_step_1e_8": _of_step(1e-8, 0),
        "zeros_percent_step_1e_6": _of_step(1e-6, 0),
        "cosine_step_1e_6": _of_step(1e-6, 1),
        "cosine_step_1e_5": _of_step(1e-5, 1),
        "zeros_percent_step_1e_8_n": _of_step(1e-8, 0, N),
        "zeros_percent_step_1e_6_n": _of_step(1e-6, 0, N),
        "cosine_step_1e_6_n": _of_step(1e-6, 1, N),
        "cosine_step_1e_5_n": _of_step(1e-5, 1, N),
        "zeros_percent_training_0": _over_training(DENSE),
        "zeros_percent_training_1e_7": _over_training(static_name(1e-7)),
        "zeros_percent_training_1e_6": _over_training(static_name(1e-6)),
        "zeros_percent_training_1e_7_n": _over_training(static_name(1e-7, N)),
        "zeros_percent_training_1e_6_n": _over_training(static_name(1e-6, N)),
        "relative_validation_loss_1e_6": _relative(1e-6),
        "relative_validation_loss_1e_7": _relative(1e-7),
        "relative_validation_loss_1e_5": _relative(1e-5),
        "relative_validation_loss_1e_5_n": _relative(1e-5, N),
        "relative_test_loss_1e_6": _relative(1e-6, metric="test_loss"),
        "redundant_macs_percent": _redundant(static_name(1e-6)),
        "redundant_macs_percent_n": _redundant(static_name(1e-6, N)),
        "redundant_macs_percent_whole_model": _redundant(static_name(1e-6), ("output",)),
        "underflow_percent_of_zeros": _of_zeros("underflow"),
        "saturated_percent_of_zeros": _of_zeros("saturated"),
        "relative_test_loss_held_80": _held(0.8),
        "relative_test_loss_held_90": _held(0.9),
        "static_zeros_difference_n": _between_normalisations(static_name(1e-6), static_name(1e-6, N)),
        "rms_zeros_difference_n": _between_normalisations("RMS, NT", "RMS, N"),
        "rate_zeros_difference_n": _between_normalisations("rate, NT", "rate, N"),
    }
)
