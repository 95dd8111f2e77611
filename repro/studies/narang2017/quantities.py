"""The quantities that decide the claims of `data/papers/narang2017.toml`; each definition stands there beside its ranges."""

from __future__ import annotations

import math

import numpy as np

from repro.engine import Record
from repro.report.published import load_published
from repro.sparse.storage import stored_bytes
from repro.studies.base import Results
from repro.studies.comparing import paired, relative_percent
from repro.studies.narang2017.comparisons import STUDY, paper, relative_cer, table3

PAPER_ITERATIONS, PAPER_EPOCHS = 55_000, 20


def full_size(name: str) -> list[tuple[str, int]]:
    """(layer, parameters) of one of the paper's models, "rnn1760" or "gru2560", counted at full size."""
    from repro.models.speech import PAPER, parameter_table

    return parameter_table(PAPER[name])


def _full_count(name: str) -> int:
    return sum(count for _, count in full_size(name))


# ------------------------------------------------------------------------------------------------------------ sizes


def size_ratio_rnn_sparse_1760(results: Results) -> float:
    return _full_count("rnn1760") / paper("table3", "RNN Sparse 1760", "parameters").value


def removed_percent_rnn_sparse_1760(results: Results):
    return 100 * results.metric("RNN sparse 1760", "sparsity_total")


def dense_parameters_largest_deviation_percent(results: Results) -> float:
    deviations = []
    for arm, model in {
        "RNN dense 1760": "rnn1760",
        "RNN dense 704": "rnn704",
        "RNN dense 2560": "rnn2560",
        "GRU dense 2560": "gru2560",
    }.items():
        printed = table3(arm, "parameters").value
        deviations.append(100 * abs(_full_count(model) - printed) / printed)
    return max(deviations)


def layer_counts(exhibit: str) -> list[tuple[str, int, float, str]]:
    """(layer, counted, printed, known) of Table 2 or 5, layer by layer."""
    counted = full_size({"table2": "rnn1760", "table5": "gru2560"}[exhibit])
    rows = load_published(STUDY)
    rows = rows[(rows["exhibit"] == exhibit) & (rows["metric"] == "parameters") & (rows["known"] == "remembered")]
    printed = rows.sort_values("x")[["value", "known"]].itertuples(index=False)
    return [(layer, count, row.value, row.known) for (layer, count), row in zip(counted, printed, strict=True)]


def layers_with_other_parameter_count(results: Results) -> int:
    """The CTC cell of Table 2, whose printed digits are doubtful, is left out."""
    rows = layer_counts("table2")[:-1] + layer_counts("table5")
    return sum(counted != printed for _, counted, printed, _ in rows)


def table3_sparsity_largest_deviation(results: Results) -> float:
    deviations = []
    for arm, model in (
        ("RNN sparse 1760", "rnn1760"),
        ("RNN sparse 2560", "rnn2560"),
        ("RNN sparse 3072", "rnn3072"),
        ("GRU sparse 2560", "gru2560"),
        ("GRU sparse 3568", "gru3568"),
    ):
        nonzero = table3(arm, "parameters").value
        said = table3(arm, "sparsity_percent").value
        deviations.append(abs(100 * (1 - nonzero / _full_count(model)) - said))
    return max(deviations)


def _gru_removed_percent(per_layer) -> float:
    h, first = 2560, 1312
    removed = 0.9 * sum(per_layer(h, size) for size in (first, h, h))
    return 100 * removed / _full_count("gru2560")


def gru_layers_only_removed_percent(results: Results) -> float:
    return _gru_removed_percent(lambda h, size: 3 * h * (h + size))


def gru_recurrent_only_removed_percent(results: Results) -> float:
    return _gru_removed_percent(lambda h, size: 3 * h * h)


# --------------------------------------------------------------------------------------------------------- accuracy


def _relative(arm: str, base: str):
    return lambda results: relative_cer(results, arm, base)


def relative_cer_cost_of_sparsity(results: Results):
    pairs = [
        ("RNN sparse 1760", "RNN dense 1760"),
        ("RNN sparse 2560", "RNN dense 2560"),
        ("GRU sparse 2560", "GRU dense 2560"),
    ]
    return np.mean([relative_cer(results, *pair) for pair in pairs], axis=0)


def table3_dense_medium_recomputed(results: Results) -> float:
    base, ours = (table3(f"RNN dense {h}", "cer_percent").value for h in (1760, 2560))
    return 100 * (base - ours) / base


def relative_performances() -> list[tuple[str, float, float]]:
    """(row, printed, recomputed from the CERs) of Tables 3 and 4."""
    rows = load_published(STUDY)
    found = []
    for exhibit in ("table3", "table4"):
        for (series, x), group in rows[rows["exhibit"] == exhibit].groupby(["series", "x"], sort=False):
            cells = group.set_index("metric")["value"]
            if {"cer_percent", "relative_percent"} <= set(cells.index):
                base = paper("table3", "GRU Dense" if series.startswith("GRU") else "RNN Dense Baseline", "cer_percent").value
                again = 100 * (base - cells["cer_percent"]) / base
                name = f"{series}, epoch {x:g}" if exhibit == "table4" else series
                found.append((name, cells["relative_percent"], again))
    return found


def relative_performance_largest_deviation(results: Results) -> float:
    return max(abs(printed - again) for row, printed, again in relative_performances() if row != "RNN Dense Medium")


# --------------------------------------------------------------------------------------------------------- schedule


def paper_ramp(phi: float = 1.5):
    """The ramp at the paper's 20 epochs and 55,000 iterations, q = 1."""
    from repro.pruning import Ramp, table1

    return Ramp(1.0, **table1(PAPER_EPOCHS, PAPER_ITERATIONS // PAPER_EPOCHS), freq=100, phi=phi)


def schedule_start_iteration(results: Results) -> int:
    return paper_ramp().start


def schedule_end_iteration(results: Results) -> int:
    return paper_ramp().end


def threshold_end_over_q(results: Results) -> float:
    ramp = paper_ramp()
    return ramp.threshold(ramp.last_update())


def gaussian_share_below(fraction_of_q: float) -> float:
    """Share of Gaussian weights below that fraction of their own 90th percentile of magnitude."""
    from statistics import NormalDist

    normal = NormalDist()
    return 2 * normal.cdf(fraction_of_q * normal.inv_cdf(0.95)) - 1


def epochs_at_iteration_15000(results: Results) -> float:
    return 15_000 / (PAPER_ITERATIONS / PAPER_EPOCHS)


def _regrown_percent(arm: str):
    return lambda results: 100 * paired(np.divide, results.metric(arm, "regrown"), results.metric(arm, "prunable"))


def early_removed_percent(results: Results):
    """At 15,000 / 55,000 of training; nothing is pruned before the first refresh."""
    return _per_seed(results, "RNN sparse 1760", lambda record: removed_at(record, 15_000 / PAPER_ITERATIONS))


def removed_at(record: Record, fraction: float) -> float:
    """Percent of zeros in the recurrent matrices, mean over matrices, at that fraction of training."""
    schedule = record.curves["schedule"]
    until = fraction * record.metrics["steps_per_epoch"] * record.spec["epochs"]
    latest = {}
    for iteration, layer, pruned, weights in zip(
        *(schedule[name] for name in ("iteration", "layer", "pruned", "weights")), strict=True
    ):
        if iteration <= until:
            latest[layer] = 100 * pruned / weights
    return sum(latest.values()) / len(set(schedule["layer"]))


def _per_seed(results: Results, arm: str, function):
    """function(record) by seed; NaN without a record, infinity where the run diverged."""
    values = []
    for i in range(len(results.arms[arm])):
        record = results.record(arm, i)
        values.append(math.nan if record is None else math.inf if record.diverged else function(record))
    return np.array(values)


# ----------------------------------------------------------------------------------------------- training and layers


def training_time_ratio_sparse_to_dense(results: Results):
    return results.metric("step", "ratio")


def _hard_points(results: Results, arm: str, base: str):
    rates = (results.metric(name, "test_cer") for name in (arm, base, "RNN dense 1760"))
    return paired(lambda ours, other, dense: 100 * (ours - other) / dense, *rates)


def hard_pruning_points(results: Results):
    return np.mean([_hard_points(results, f"hard at {epoch}/20", "RNN sparse 1760") for epoch in (5, 12)], axis=0)


def hard_pruning_late_points(results: Results):
    return _hard_points(results, "hard at 15/20", "hard at 10/20")


def table4_gain_as_cer_ratio(results: Results) -> float:
    ours = paper("table3", "RNN Sparse 1760", "cer_percent").value
    return min(100 * (1 - ours / paper("table4", "hard pruning", "cer_percent", x).value) for x in (5, 12))


def loss_bump(record: Record) -> float:
    """Percent by which the training loss rises late in the ramp over its minimum early in it."""
    losses = np.array(record.curves["epochs"]["train_loss"])
    at = np.arange(1, len(losses) + 1) / len(losses)
    before = losses[(at >= 0.20) & (at <= 0.35)].min()
    return 100 * (losses[(at >= 0.40) & (at <= 0.575)].max() - before) / before


def generalisation_gap_difference(results: Results):
    def difference(sparse_validation, sparse_train, dense_validation, dense_train):
        return 100 * (sparse_validation - sparse_train - (dense_validation - dense_train)) / dense_validation

    arms, losses = ("RNN sparse 2560", "RNN dense 1760"), ("validation_loss", "train_loss")
    return paired(difference, *(results.metric(arm, loss) for arm in arms for loss in losses))


def recurrent_layer_sparsities(record: Record) -> list[tuple[int, str, float]]:
    """(layer from 1, direction, share of zeros) of the recurrent matrices, nearest the input first."""
    layers = record.curves["layers"]
    found = []
    for name, share in zip(layers["layer"], layers["sparsity"], strict=True):
        if "weight_hh" in name:
            direction = "backward" if name.endswith("reverse") else "forward"
            found.append((int(name.split(".")[1]) + 1, direction, share))
    return found


def early_minus_late(record: Record) -> float:
    shares = recurrent_layer_sparsities(record)
    half = max(layer for layer, _, _ in shares) // 2
    last = max(layer for layer, _, _ in shares)
    early = np.mean([share for layer, _, share in shares if layer <= half])
    return float(early - np.mean([share for layer, _, share in shares if layer > last - half]))


# ---------------------------------------------------------------------------------------------------- products, bytes


def table6_rows() -> list[tuple[str, int, float, float, float]]:
    """(series, units, printed speed-up, its dense time over its own time, own time) of the sparse rows of Table 6."""
    found = []
    for kind, base, widths in (("RNN", 1760, (1760, 2560, 3072)), ("GRU", 2560, (2560, 3568))):
        dense = paper("table6", f"{kind} dense", "time_us", base).value
        for width in widths:
            own = paper("table6", f"{kind} sparse", "time_us", width).value
            printed = paper("table6", f"{kind} sparse", "speedup", width).value
            found.append((f"{kind} {width}", width, printed, dense / own, own))
    return found


def table6_smallest_speedup(results: Results) -> float:
    return min(again for _, _, _, again, _ in table6_rows())


def table6_speedup_largest_deviation(results: Results) -> float:
    return max(abs(printed - again) for _, _, printed, again, _ in table6_rows())


RNN, GRU = "RNN", "GRU"


def matrix_shape(cell: str, width: int) -> tuple[int, int]:
    """(rows, columns) of the recurrent matrix that one row of Table 6 times."""
    return (width if cell == RNN else 3 * width, width)


def timed_shape(record: Record, shape: tuple[int, int]) -> tuple[int, int]:
    """The rows and columns that stand for a layer in this record: the layer's own, over the scale of a smoke run."""
    return tuple(n // record.spec["scale"] for n in shape)


def median_us(
    record: Record, shape: tuple[int, int], sparsity: float, batch: int = 1, sparse: bool | None = None, own: bool = False
) -> float:
    """Median time of the fastest float32 library: dense ones at sparsity 0, sparse ones above, unless `sparse` says otherwise.

    `own`: of this package's sparse kernels instead, which are no library that a claim of the paper could mean. Among the dense
    ones ours counts: a speed-up is quoted against the best.
    """
    sparse = sparsity > 0 if sparse is None else sparse
    shape = timed_shape(record, shape)
    c = record.curves["products"]
    names = ("rows", "columns", "sparsity", "batch", "sparse", "runtime", "reduced", "median_us")
    found = []
    for r, k, s, b, is_sparse, runtime, reduced, us in zip(*(c[name] for name in names), strict=True):
        wanted = not is_sparse or (runtime == "repro") == own
        if wanted and not reduced and ((r, k), s, b, is_sparse) == (shape, sparsity, batch, sparse):
            found.append(us)
    return min(found)


def speedup(
    record: Record,
    cell: str,
    width: int,
    sparsity: float = 0.95,
    batch: int = 1,
    base: int | None = None,
    own: bool = False,
) -> float:
    """Dense time of the paper's smaller baseline (or of `base` units) over the sparse time of `width` units."""
    base = base or (1760 if cell == RNN else 2560)
    dense = median_us(record, matrix_shape(cell, base), 0.0, batch)
    return dense / median_us(record, matrix_shape(cell, width), sparsity, batch, own=own)


def _speedup(cell: str, width: int, sparsity: float = 0.95, own: bool = False, arm: str = "products"):
    return lambda results: _per_seed(results, arm, lambda record: speedup(record, cell, width, sparsity, own=own))


def dense_bandwidth_fraction(results: Results):
    def fraction(record: Record) -> float:
        rows, columns = timed_shape(record, matrix_shape(GRU, 2560))
        c = record.curves["products"]
        cells = zip(c["rows"], c["columns"], c["bytes"], c["gbps"], strict=True)
        rate = next(gbps for r, k, nbytes, gbps in cells if (r, k, nbytes) == (rows, columns, 4 * rows * columns))
        return 4 * rows * columns / median_us(record, matrix_shape(GRU, 2560), 0.0) / 1e3 / rate

    return _per_seed(results, "products", fraction)


def bandwidth_bound_speedup_with_indices(results: Results) -> float:
    return 4 / (0.05 * (4 + 4))


def speedup_fraction_of_bound(results: Results):
    return _speedup(GRU, 2560)(results) / 20


def own_kernels_over_best_library(results: Results):
    def ratio(record: Record) -> float:
        shape = matrix_shape(GRU, 2560)
        return median_us(record, shape, 0.95) / median_us(record, shape, 0.95, own=True)

    return _per_seed(results, "products", ratio)


def speedup_ratio_large_batch(results: Results):
    def ratio(record: Record) -> float:
        largest = max(record.curves["products"]["batch"])
        return speedup(record, GRU, 2560, batch=largest) / speedup(record, GRU, 2560)

    return _per_seed(results, "products", ratio)


def speedup_over_bytes_ratio(results: Results):
    rows, columns = matrix_shape(GRU, 2560)
    size = rows * columns
    held = stored_bytes(size, size - round(0.95 * size), index="csr32", rows=rows)
    return _speedup(GRU, 2560)(results) / (4 * size / held)


# The five models of section 5.2, as Table 3 calls them, and their units.
MEMORY = {"RNN Dense Baseline": 1760, "RNN Sparse 1760": 1760, "RNN Sparse Big": 3072, "GRU Dense": 2560, "GRU Sparse": 2560}


def printed_parameters(series: str) -> float:
    """The parameters that Table 3 prints for one of them."""
    return paper("table3", series, "parameters", MEMORY[series]).value


def memory_largest_deviation_percent(results: Results) -> float:
    deviations = []
    for series in MEMORY:
        count, printed = printed_parameters(series), paper("memory", series, "megabytes").value
        deviations.append(100 * abs(stored_bytes(count, count) / 1e6 - printed) / printed)
    return max(deviations)


def memory_ratio_with_indices(results: Results) -> float:
    dense, sparse = map(printed_parameters, ("RNN Dense Baseline", "RNN Sparse 1760"))
    return stored_bytes(dense, dense, index="dense") / stored_bytes(dense, sparse, index="csr32")


def relative_cer_float16(results: Results):
    whole, half = (results.metric("RNN sparse 1760", name) for name in ("test_cer", "test_cer_float16"))
    return relative_percent(half, whole)


def onchip_largest_deviation_percent(results: Results) -> float:
    dense, *sparse = (paper("onchip", "NVIDIA P100, float16", "hidden_units", x).value for x in (0, 90, 99))
    expected = [dense / math.sqrt(1 - share) for share in (0.90, 0.99)]
    return max(100 * abs(units - printed) / printed for units, printed in zip(expected, sparse, strict=True))


def onchip_units_with_indices(results: Results) -> float:
    return paper("onchip", "NVIDIA P100, float16", "hidden_units", 0).value / math.sqrt(2 * (1 - 0.9))


_NAMED = (
    size_ratio_rnn_sparse_1760,
    removed_percent_rnn_sparse_1760,
    dense_parameters_largest_deviation_percent,
    layers_with_other_parameter_count,
    table3_sparsity_largest_deviation,
    gru_layers_only_removed_percent,
    gru_recurrent_only_removed_percent,
    relative_cer_cost_of_sparsity,
    table3_dense_medium_recomputed,
    relative_performance_largest_deviation,
    schedule_start_iteration,
    schedule_end_iteration,
    threshold_end_over_q,
    epochs_at_iteration_15000,
    early_removed_percent,
    training_time_ratio_sparse_to_dense,
    hard_pruning_points,
    hard_pruning_late_points,
    table4_gain_as_cer_ratio,
    generalisation_gap_difference,
    table6_smallest_speedup,
    table6_speedup_largest_deviation,
    dense_bandwidth_fraction,
    bandwidth_bound_speedup_with_indices,
    speedup_fraction_of_bound,
    speedup_ratio_large_batch,
    own_kernels_over_best_library,
    speedup_over_bytes_ratio,
    memory_largest_deviation_percent,
    memory_ratio_with_indices,
    relative_cer_float16,
    onchip_largest_deviation_percent,
    onchip_units_with_indices,
)

QUANTITIES = {function.__name__: function for function in _NAMED} | {
    "relative_cer_rnn_sparse_1760": _relative("RNN sparse 1760", "RNN dense 1760"),
    "relative_cer_rnn_dense_704_to_sparse_1760": _relative("RNN dense 704", "RNN sparse 1760"),
    "relative_cer_rnn_sparse_2560": _relative("RNN sparse 2560", "RNN dense 1760"),
    "relative_cer_rnn_sparse_3072": _relative("RNN sparse 3072", "RNN dense 1760"),
    "relative_cer_rnn_dense_2560": _relative("RNN dense 2560", "RNN dense 1760"),
    "relative_cer_rnn_sparse_2560_to_dense_2560": _relative("RNN sparse 2560", "RNN dense 2560"),
    "relative_cer_gru_sparse_2560": _relative("GRU sparse 2560", "GRU dense 2560"),
    "relative_cer_gru_sparse_3568": _relative("GRU sparse 3568", "GRU dense 2560"),
    "relative_cer_gru_recurrent_only": _relative("GRU recurrent only", "GRU dense 2560"),
    "relative_cer_phi_2": _relative("phi = 2 theta", "RNN sparse 1760"),
    "relative_cer_printed_mask": _relative("printed mask sign", "RNN sparse 1760"),
    "removed_percent_printed_mask": lambda results: 100 * results.metric("printed mask sign", "sparsity_recurrent"),
    "relative_cer_equal_layer_sparsity": _relative("automatic q, per layer", "automatic q"),
    "regrown_percent_listing": _regrown_percent("regrowth: listing"),
    "regrown_percent_prose": _regrown_percent("RNN sparse 1760"),
    "loss_bump_rnn_sparse_2560": lambda results: _per_seed(results, "RNN sparse 2560", loss_bump),
    "loss_bump_gru_sparse_2560": lambda results: _per_seed(results, "GRU sparse 2560", loss_bump),
    "early_minus_late_sparsity": lambda results: _per_seed(results, "RNN sparse 1760", early_minus_late),
    "speedup_rnn_1760": _speedup(RNN, 1760),
    "speedup_rnn_3072": _speedup(RNN, 3072),
    "speedup_gru_2560": _speedup(GRU, 2560),
    "speedup_gru_3568": _speedup(GRU, 3568),
    "speedup_gru_2560_own_kernels": _speedup(GRU, 2560, own=True),
    "speedup_at_half_sparsity": _speedup(GRU, 2560, 0.5, arm="half sparse"),
}
