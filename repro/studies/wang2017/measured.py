"""The measured quantities of `data/papers/wang2017.toml`: what the records say, one value a repeat (NaN where it was not run).

Definitions stand there, beside the ranges.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from repro.collectives.costs import PRINTED_ALGORITHMS, best_block
from repro.collectives.fitting import Errors, Fit, Measurement, fit, prediction_errors
from repro.collectives.schedules import COLLECTIVES
from repro.studies.base import Results
from repro.studies.exchanging import LIBRARY
from repro.studies.replicas import FIXED_ORDER, MULTIPLIED, OWN_ORDER, PAPERS_SYSTEMS

LP, MST, BE = PRINTED_ALGORITHMS
RING = "ring"
SHORT = 12 * 1024  # bytes, below which MPI takes trees (section 3.2)
FITTED = (LP, MST, BE, RING)  # what the cost model knows, and both exhibits time
TARGET = 0.75  # of the iterations: the target loss is the lowest that LP fork-join has reached by then


# ----------------------------------------------------------------------------------------------------------- collectives


def timed(results: Results, arm: str) -> pd.DataFrame:
    """All timings of an arm, one row a case and `repeat`; empty where nothing could be measured."""
    frames = [
        pd.DataFrame(record.curves["times"]).assign(repeat=record.spec["replicate"])
        for record in results.seeds(arm)
        if "times" in record.curves
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def fastest(times: pd.DataFrame) -> pd.DataFrame:
    """Each case in its fastest block: one row a collective, algorithm, number of ranks, size and repeat."""
    if times.empty:
        return times
    cells = ["collective", "algorithm", "ranks", "nbytes", "repeat"]
    return times.loc[times.groupby(cells)["seconds"].idxmin()]


def seconds(results: Results, arm: str, collective: str, algorithm: str, **where: int) -> np.ndarray:
    """(repeats,) median seconds in the fastest block; NaN where there is none.

    `where`: `nbytes`, else of the largest message timed; `ranks`, where an arm has several.
    """
    found = np.full(len(results.arms[arm]), np.nan)
    times = fastest(timed(results, arm))
    if not times.empty:
        wanted = {"collective": collective, "algorithm": algorithm, "nbytes": times["nbytes"].max()} | where
        rows = times[np.logical_and.reduce([times[name] == value for name, value in wanted.items()])]
        found[rows["repeat"]] = rows["seconds"]
    return found


def over_pipeline(collective: str, algorithm: str) -> Callable[[Results], np.ndarray]:
    """Time of another algorithm over that of the linear pipeline, on hosts."""
    return lambda results: seconds(results, "hosts", collective, algorithm) / seconds(results, "hosts", collective, LP)


def growth(collective: str, algorithm: str, many: int, few: int) -> Callable[[Results], np.ndarray]:
    """Time on many hosts over that on few."""

    def ratio(results: Results) -> np.ndarray:
        more, fewer = (seconds(results, "hosts, by ranks", collective, algorithm, ranks=ranks) for ranks in (many, few))
        return more / fewer

    return ratio


def reduce_gain_over_broadcast_gain(results: Results) -> np.ndarray:
    return over_pipeline("reduce", MST)(results) / over_pipeline("broadcast", MST)(results)


def lp_reduce_over_broadcast(results: Results) -> np.ndarray:
    return seconds(results, "hosts", "reduce", LP) / seconds(results, "hosts", "broadcast", LP)


def broadcast_be_over_mst_short(results: Results) -> np.ndarray:
    times = timed(results, "hosts")
    short = times.loc[times["nbytes"] < SHORT, "nbytes"].max() if not times.empty else 0
    exchange, tree = (seconds(results, "hosts", "broadcast", name, nbytes=short) for name in (BE, MST))
    return exchange / tree


def broadcast_mst_over_be_long(results: Results) -> np.ndarray:
    return seconds(results, "hosts", "broadcast", MST) / seconds(results, "hosts", "broadcast", BE)


def broadcast_mst_jumps_over_rest(results: Results) -> np.ndarray:
    def step(many: int) -> np.ndarray:
        return growth("broadcast", MST, many, many - 1)(results)

    return np.minimum(step(3), step(5)) / np.maximum(step(4), step(6))


# ------------------------------------------------------------------------------------------------------------ cost model


def measurements(times: pd.DataFrame) -> list[Measurement]:
    """The rows that the cost model has formulas for."""
    if times.empty:
        return []
    rows = times[times["algorithm"].isin(FITTED)]
    return [Measurement(*row) for row in rows[list(Measurement._fields)].itertuples(index=False)]


def divided(results: Results, repeat: int) -> tuple[list[Measurement], list[Measurement], list[Measurement]]:
    """Rows of one repeat on hosts: those for the fit, those of sizes left out of it, those of numbers of ranks left out.

    Fitted: the largest, and every second size from there down, on the hosts of Figure 3, and Figure 4's size on 2 of them.
    """
    sizes = timed(results, "hosts")
    if sizes.empty:
        return [], [], []
    sizes = sizes[sizes["repeat"] == repeat]
    fitted = sorted(sizes["nbytes"].unique())[::-2]
    used, left_sizes = sizes[sizes["nbytes"].isin(fitted)], sizes[~sizes["nbytes"].isin(fitted)]
    many = timed(results, "hosts, by ranks")
    many = many[many["repeat"] == repeat]
    left_ranks = many[~many["ranks"].isin({2, results.profile.ranks})]
    return measurements(pd.concat([used, many[many["ranks"] == 2]])), measurements(left_sizes), measurements(left_ranks)


def fitted(results: Results, repeat: int) -> Fit | None:
    """One link for all algorithms, from one repeat."""
    used, _, _ = divided(results, repeat)
    return fit(used) if used else None


def held_out(results: Results, repeat: int) -> tuple[Errors | None, Errors | None]:
    """Errors of the prediction for sizes, and for numbers of ranks, that were left out of the fit."""
    link = fitted(results, repeat)
    _, sizes, ranks = divided(results, repeat)
    return tuple(prediction_errors(link, rows) if link and rows else None for rows in (sizes, ranks))


def _held_out_percent(which: int) -> Callable[[Results], np.ndarray]:
    def percent(results: Results) -> np.ndarray:
        errors = [held_out(results, repeat)[which] for repeat in range(len(results.arms["hosts"]))]
        return np.array([100 * found.median if found else np.nan for found in errors])

    return percent


def block_sweep(results: Results, repeat: int) -> pd.Series:
    """Seconds of the LP broadcast of the largest message by block, in one repeat."""
    times = timed(results, "hosts")
    if times.empty:
        return pd.Series(dtype=float)
    rows = times[(times["repeat"] == repeat) & (times["collective"] == "broadcast") & (times["algorithm"] == LP)]
    rows = rows[rows["nbytes"] == rows["nbytes"].max()]
    return rows.set_index("block")["seconds"]


def predicted_block(results: Results, repeat: int) -> int | None:
    """b* of the fitted constants, for the largest message on hosts."""
    link = fitted(results, repeat)
    if link is None:
        return None
    return best_block(int(timed(results, "hosts")["nbytes"].max()), results.profile.ranks, link.estimates[None].link)


def _at_block(choose: Callable[[Results, int], int | None]) -> Callable[[Results], np.ndarray]:
    """Time in the timed block nearest, by ratio, to the chosen one, over that in the fastest."""

    def ratio(results: Results) -> np.ndarray:
        found = []
        for repeat in range(len(results.arms["hosts"])):
            sweep, block = block_sweep(results, repeat), choose(results, repeat)
            if sweep.empty or block is None:
                found.append(np.nan)
            else:
                nearest = min(sweep.index, key=lambda timed_block, b=block: abs(np.log(timed_block / b)))
                found.append(sweep[nearest] / sweep.min())
        return np.array(found)

    return ratio


# -------------------------------------------------------------------------------------------------------------- training


def iterations(results: Results, model: str) -> pd.DataFrame:
    """All iterations of a model's training, one row each, by `system` and `repeat`."""
    rows = _all_iterations(results)
    return rows if rows.empty else rows[rows["model"] == model]


def _all_iterations(results: Results) -> pd.DataFrame:
    frames = [
        pd.DataFrame(record.curves["iterations"]).assign(repeat=record.spec["replicate"])
        for record in results.seeds("training")
        if "iterations" in record.curves
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def per_iteration(results: Results, model: str, system: str) -> pd.DataFrame:
    """By repeat, the mean seconds of an iteration: `iteration`, `waited`, `computing`, `communicating`."""
    rows = iterations(results, model)
    columns = ["waited", "computing", "communicating"]
    index = range(len(results.arms["training"]))
    if rows.empty:
        return pd.DataFrame(np.nan, index=index, columns=["iteration", *columns])
    groups = rows[rows["system"] == system].groupby("repeat")
    found = groups[columns].mean()
    found.insert(0, "iteration", groups["seconds"].max() / groups["iteration"].max())
    return found.reindex(index)


def time_to_target(results: Results, model: str, system: str) -> np.ndarray:
    """(repeats,) seconds until the loss first reaches the target: the lowest of LP fork-join in its first three quarters."""
    rows, found = iterations(results, model), np.full(len(results.arms["training"]), np.nan)
    if rows.empty:
        return found
    for repeat, part in rows.groupby("repeat"):
        base = part[part["system"] == "LP fork-join"]
        target = base.loc[base["iteration"] <= TARGET * base["iteration"].max(), "loss"].min()
        own = part[part["system"] == system]
        # The same descent, but for rounding: a loss a hair above the target is the target.
        reached = own.loc[own["loss"] <= target * (1 + 1e-4), "seconds"]
        found[repeat] = reached.min()
    return found


def speedup(model: str, slow: str, quick: str) -> Callable[[Results], np.ndarray]:
    """Time to the target loss of one system over that of another."""
    return lambda results: time_to_target(results, model, slow) / time_to_target(results, model, quick)


def _communication_percent(model: str, other: str) -> Callable[[Results], np.ndarray]:
    def percent(results: Results) -> np.ndarray:
        ours, theirs = (per_iteration(results, model, name)["communicating"] for name in ("LP fork-join", other))
        return 100 * (ours / theirs).to_numpy()

    return percent


MODELS = ("rnn", "cnn")


def _over_models(combine: Callable, quantity: Callable[[Results, str], np.ndarray]) -> Callable[[Results], np.ndarray]:
    """One quantity of both models, combined repeat by repeat."""
    return lambda results: combine([quantity(results, model) for model in MODELS], axis=0)


def _iteration(results: Results, model: str, system: str) -> np.ndarray:
    return per_iteration(results, model, system)["iteration"].to_numpy()


def forkjoin_over_sum(results: Results, model: str) -> np.ndarray:
    """Seconds of a fork-join iteration over its communication and computation."""
    found = per_iteration(results, model, "LP fork-join")
    return (found["iteration"] / (found["communicating"] + found["computing"])).to_numpy()


def hidden_share(model: str) -> Callable[[Results], np.ndarray]:
    """How much of the shorter of communication and computation the overlap hides: 1 all, 0 nothing."""

    def share(results: Results) -> np.ndarray:
        found = per_iteration(results, model, "LP fork-join")
        parts = found[["communicating", "computing"]]
        saved = parts.sum(axis=1) - per_iteration(results, model, "LP overlap")["iteration"]
        return (saved / parts.min(axis=1)).to_numpy()

    return share


def _variants_spread(results: Results, model: str) -> np.ndarray:
    found = [_iteration(results, model, system) for system in ("LP fork-join", "LP allreduce", "LP overlap")]
    return np.max(found, axis=0) / np.min(found, axis=0)


def _overlap_over(system: str) -> Callable[[Results, str], np.ndarray]:
    return lambda results, model: _iteration(results, model, "LP overlap") / _iteration(results, model, system)


def _gain_in_order(results: Results, model: str) -> np.ndarray:
    steps = ("LP fork-join", "LP allreduce"), ("LP allreduce", "LP overlap")
    return np.min([speedup(model, *pair)(results) for pair in steps], axis=0)


def _loss_difference(results: Results, model: str) -> np.ndarray:
    rows, found = iterations(results, model), np.full(len(results.arms["training"]), np.nan)
    if not rows.empty:
        last = rows[(rows["iteration"] == rows["iteration"].max()) & rows["system"].isin(PAPERS_SYSTEMS)]
        losses = last.groupby("repeat")["loss"]
        found[losses.min().index] = 100 * (losses.max() - losses.min()) / losses.min()
    return found


# ------------------------------------------------------------------------------------------------------ drift and sparse


def drift(way: str) -> Callable[[Results], np.ndarray]:
    """Largest difference between replicas at the end, over the largest absolute parameter."""
    return lambda results: results.metric("drift", f"drift, {way}")


def zeros(results: Results, column: str) -> np.ndarray:
    """(seeds,) a column of the zeros of gradients, at the end of training."""
    return np.array([record.curves["zeros"][column][-1] for record in results.seeds("zeros")])


def _survive(column: str) -> Callable[[Results], np.ndarray]:
    return lambda results: zeros(results, column) / zeros(results, "gates")


def kept_times(results: Results) -> pd.DataFrame:
    """Times of dense and compacted exchanges, one row a sparsity and repeat."""
    return timed(results, "kept")


def pruned_exchange_speedup(results: Results) -> np.ndarray:
    found, times = np.full(len(results.arms["kept"]), np.nan), kept_times(results)
    if not times.empty:
        rows = times[np.isclose(times["sparsity"], 0.9)]
        found[rows["repeat"]] = rows["dense_median"] / rows["kept_median"]
    return found


MEASURED: dict[str, Callable[[Results], np.ndarray]] = {
    **{f"{name}_be_over_lp": over_pipeline(name, BE) for name in COLLECTIVES},
    **{f"{name}_mst_over_lp": over_pipeline(name, MST) for name in COLLECTIVES},
    **{f"{name}_library_over_lp": over_pipeline(name, LIBRARY) for name in COLLECTIVES},
    "allreduce_ring_over_lp": over_pipeline("allreduce", RING),
    "reduce_gain_over_broadcast_gain": reduce_gain_over_broadcast_gain,
    "lp_reduce_over_broadcast": lp_reduce_over_broadcast,
    "broadcast_be_over_mst_short": broadcast_be_over_mst_short,
    "broadcast_mst_over_be_long": broadcast_mst_over_be_long,
    **{f"{name}_lp_6_over_2": growth(name, LP, 6, 2) for name in COLLECTIVES},
    "broadcast_mst_6_over_2": growth("broadcast", MST, 6, 2),
    "broadcast_be_4_over_2": growth("broadcast", BE, 4, 2),
    "broadcast_mst_jumps_over_rest": broadcast_mst_jumps_over_rest,
    "heldout_size_error_percent": _held_out_percent(0),
    "heldout_ranks_error_percent": _held_out_percent(1),
    "time_64_kilobytes_over_best_block": _at_block(lambda results, repeat: 64 * 1024),
    "time_predicted_block_over_best_block": _at_block(predicted_block),
    "forkjoin_iteration_over_sum": _over_models(np.mean, forkjoin_over_sum),
    "hidden_share_rnn": hidden_share("rnn"),
    "hidden_share_cnn": hidden_share("cnn"),
    "lp_variants_slowest_over_fastest": _over_models(np.max, _variants_spread),
    "overlap_over_dependency": _over_models(np.min, _overlap_over("LP dependency")),
    "overlap_over_buckets": _over_models(np.min, _overlap_over("DDP buckets")),
    **{f"communication_percent_lp_of_be_{model}": _communication_percent(model, "BE fork-join") for model in MODELS},
    **{f"communication_percent_lp_of_mst_{model}": _communication_percent(model, "MST fork-join") for model in MODELS},
    **{f"speedup_lp_over_be_{model}": speedup(model, "BE fork-join", "LP fork-join") for model in MODELS},
    **{f"speedup_lp_over_mst_{model}": speedup(model, "MST fork-join", "LP fork-join") for model in MODELS},
    **{f"speedup_overlap_over_be_{model}": speedup(model, "BE fork-join", "LP overlap") for model in MODELS},
    "smallest_gain_in_order": _over_models(np.min, _gain_in_order),
    "gain_overlap_over_allreduce": _over_models(np.max, lambda r, m: speedup(m, "LP allreduce", "LP overlap")(r)),
    "loss_difference_percent": _over_models(np.max, _loss_difference),
    "drift_by_multiplication": drift(MULTIPLIED),
    "drift_by_order_of_summation": drift(OWN_ORDER),
    "drift_with_fixed_order": drift(FIXED_ORDER),
    "zeros_sequence_over_gates": _survive("sequence"),
    "zeros_minibatch_over_gates": _survive("minibatch"),
    "sparse_bytes_over_dense": lambda results: zeros(results, "bytes"),
    "pruned_exchange_speedup": pruned_exchange_speedup,
}
