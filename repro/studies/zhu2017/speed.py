"""Real time: what zeros of dnet are worth in seconds, beside what MACs promise; and the quality of whole columns of zeros."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.engine import Record
from repro.report import plots
from repro.studies.base import Exhibit, Quantity, Results, gpu_of
from repro.studies.comparing import beside, interval
from repro.studies.speeds import COLUMNS, CSR, DENSE, GATHERED, HELD, NN, NO_AVX2, NO_GPU, SCATTERED, TOP
from repro.studies.zhu2017 import parts
from repro.studies.zhu2017.comparisons import paper, per_seed, relative_loss
from repro.studies.zhu2017.profiles import AVX2, COLUMNS_80, ON_GPU, TIMED, TRADED, speed_arms, static_name, step_name
from repro.studies.zhu2017.profiles import DENSE as DENSE_TRAINING

Tables = dict[str, pd.DataFrame]

WORDS = {
    NN: "nn.LSTM",
    DENSE: "this package, threshold 0",
    SCATTERED: "this package, scattered zeros",
    HELD: "this package, scattered zeros, held",
    TOP: "this package, scattered zeros, top-k",
    COLUMNS: "this package, whole columns",
    CSR: "torch's CSR matrices, scattered zeros",
    GATHERED: "torch's dense products, columns gathered",
}

# --------------------------------------------------------------------------------------------------------------- of a record


def _reasons(record: Record) -> list[str]:
    """Why nothing was timed; none if something was."""
    return [record.metrics[name] for name in (NO_GPU, NO_AVX2) if name in record.metrics]


def timed_rows(record: Record) -> pd.DataFrame:
    """Curve "steps" with `speedup`, the time of the faster of nn.LSTM and our dense step over that of each row."""
    rows = pd.DataFrame(record.curves["steps"])
    return rows.assign(speedup=rows.loc[rows["method"].isin((NN, DENSE)), "step"].min() / rows["step"])


def speedup_of(record: Record, method: str, sparsity: float) -> float:
    """NaN where the method was not timed."""
    if _reasons(record):
        return math.nan
    rows = timed_rows(record)
    found = rows.loc[(rows["method"] == method) & (rows["sparsity"] == sparsity), "speedup"]
    return float(found.iloc[0]) if len(found) else math.nan


def by_macs(sparsity: float) -> float:
    """1 / (1 - 2 s / 3), as the number of cells and of inputs are equal."""
    return 1 / (1 - 2 * sparsity / 3)


def measured_speedup(record: Record) -> float:
    """Of the layers of a training with the zeros of its rule, over the faster dense step."""
    return parts.measured(record)["step"]


def ideal_speedup(record: Record) -> float:
    """What the zeros of a training promise, or those of the very step that was timed; LSTM layers."""
    return parts.accounts(record)["step"].ideal


# ------------------------------------------------------------------------------------------------------------------ quantities


def _arm(results: Results, width: int, on: str = "") -> str:
    """The arm of a width at the profile's first batch."""
    return on + step_name(width, results.profile.speed.batches[0])


def _speedup(width: int, method: str, sparsity: float, on: str = "") -> Quantity:
    def quantity(results: Results):
        arm = _arm(results, width, on)
        if arm not in results.arms:
            return np.full(1, math.nan)
        return per_seed(results, arm, lambda record: speedup_of(record, method, sparsity))

    return quantity


def dense_step_over_nn_lstm(results: Results):
    def ratio(record: Record) -> float:
        rows = timed_rows(record).set_index("method")["step"]
        return rows[DENSE] / rows[NN]

    return reduce(np.maximum, (per_seed(results, arm, ratio) for arm in _of_steps(results)))


def structured_over_unstructured_650(results: Results):
    return _speedup(650, COLUMNS, 0.8)(results) / _speedup(650, SCATTERED, 0.8)(results)


def relative_test_loss_structured_80(results: Results):
    return relative_loss(results, COLUMNS_80, DENSE_TRAINING, "test_loss")


def measured_over_ideal_speedup(results: Results):
    timed = static_name(1e-6) + TIMED
    return per_seed(results, timed, lambda record: measured_speedup(record) / ideal_speedup(record))


QUANTITIES: dict[str, Quantity] = {
    function.__name__: function
    for function in (
        dense_step_over_nn_lstm,
        structured_over_unstructured_650,
        relative_test_loss_structured_80,
        measured_over_ideal_speedup,
    )
} | {
    "speedup_80_256": _speedup(256, SCATTERED, 0.8),
    "speedup_80_650": _speedup(650, SCATTERED, 0.8),
    "speedup_90_650": _speedup(650, SCATTERED, 0.9),
    "speedup_80_1500": _speedup(1500, SCATTERED, 0.8),
    "speedup_90_1500": _speedup(1500, SCATTERED, 0.9),
    "speedup_80_650_library": _speedup(650, CSR, 0.8),
    "gpu_speedup_80_unstructured": _speedup(1500, CSR, 0.8, ON_GPU),
    "gpu_speedup_80_structured": _speedup(1500, GATHERED, 0.8, ON_GPU),
}

# ---------------------------------------------------------------------------------------------------------- tables and figure


def _of_steps(results: Results, on: str = "") -> list[str]:
    """The arms that time one layer with all that the CPU has, or `on` a GPU, or by AVX2 alone."""
    elsewhere = () if on else (AVX2, ON_GPU)
    return [arm for arm in results.arms if " cells, batch " in arm and arm.startswith(on) and not arm.startswith(elsewhere)]


def timed(results: Results, arm: str) -> pd.DataFrame:
    """All rows of an arm, `repeat` by repeat, with the `machine` of each; none if nothing was timed."""
    found = [
        timed_rows(r).assign(repeat=r.spec["replicate"], machine=gpu_of(r) or r.provenance.get("cpu"))
        for r in results.seeds(arm)
        if not _reasons(r)
    ]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def steps(results: Results) -> Tables:
    """Milliseconds and speed-up of every method, and the quality of whole columns."""
    rows = []
    for arm in [name for on in ("", AVX2, ON_GPU) for name in _of_steps(results, on)]:
        found = timed(results, arm)
        for (method, share), part in found.groupby(["method", "sparsity"], sort=False) if len(found) else ():
            speedup, low, high = interval(part["speedup"])
            rows.append(
                {
                    "": arm,
                    "method": WORDS[method],
                    "zeros, %": 100 * part["zeros"].mean(),
                    "forward, ms": 1e3 * part["forward"].mean(),
                    "backward, ms": 1e3 * part["backward"].mean(),
                    "step, ms": 1e3 * part["step"].mean(),
                    "speed-up": speedup,
                    "low": low,
                    "high": high,
                    "by MACs": by_macs(share),
                    "n": len(part),
                    "machine": " and ".join(dict.fromkeys(part["machine"].dropna())),
                }
            )
    title = f"Forward and backward pass of one LSTM layer, {results.machine()}; speed-up over the faster dense step"
    quality = []
    for arm in (*TRADED, COLUMNS_80):
        quality += [
            (arm, "test loss against t = 0, %", None, relative_loss(results, arm, DENSE_TRAINING, "test_loss")),
            (arm, "validation loss against t = 0, %", None, relative_loss(results, arm, DENSE_TRAINING)),
        ]
        if arm + TIMED in results.arms:
            machine = machine_of(results, [arm + TIMED])
            quality.append((arm, f"measured speed-up of its LSTM layers, {machine}", None, _measured(results, arm)))
    tables = {title: pd.DataFrame(rows)} if rows else {}
    return tables | _by_processor(results) | _missing(results) | {"Quality against measured time": beside(quality)}


def _by_processor(results: Results) -> Tables:
    """What scattered zeros are worth on each processor that records are of, with what each was made by; none of one alone."""
    rows = []
    for arm in _of_steps(results):
        made = [record for trial in results.arms[arm] for record in results.timings.get(trial.key(), ())]
        for machine in dict.fromkeys(record.provenance.get("cpu") for record in made):
            records = [record for record in made if record.provenance.get("cpu") == machine]
            commits = dict.fromkeys((record.provenance.get("commit") or "none")[:7] for record in records)
            for share in results.profile.speed.compared:
                speedup, low, high = interval([speedup_of(record, SCATTERED, share) for record in records])
                over_nn = np.mean([speedup_of(record, SCATTERED, share) / speedup_of(record, NN, 0.0) for record in records])
                rows.append(
                    {"": arm, "machine": machine, "zeros, %": 100 * share, "speed-up": speedup, "low": low, "high": high}
                    | {"over nn.LSTM": over_nn, "n": len(records), "commit": " and ".join(commits)}
                )
    several = len({row["machine"] for row in rows}) > 1
    return {"Scattered zeros, by processor; speed-up over the faster dense step": pd.DataFrame(rows)} if several else {}


def _measured(results: Results, arm: str) -> np.ndarray:
    return per_seed(results, arm + TIMED, measured_speedup)


def machine_of(results: Results, arms: list[str]) -> str:
    """The processors that some of the arms were timed on."""
    return replace(results, arms={arm: results.arms[arm] for arm in arms if arm in results.arms}).machine()


def _missing(results: Results) -> Tables:
    reasons = sorted({reason for record in results.used() for reason in _reasons(record)})
    return {"Not timed": pd.DataFrame({"reason": reasons})} if reasons else {}


def speed(results: Results) -> Figure:
    """Left: speed-up over zeros for every width, under the bound by MACs, and by AVX2 alone (dashed); then every method at one
    width; then quality."""
    figure, (left, middle, right) = plots.new_figure(1, 3, size=(15, 4.6))
    zeros = np.linspace(0, 100, 101)
    left.plot(zeros, by_macs(zeros / 100), color="black", linewidth=1, label="1 / (1 - 2 s / 3)")
    batch = results.profile.speed.batches[0]
    for width, colour in zip(results.profile.speed.widths, plots.PALETTE, strict=False):
        for on, style in (("", "-"), (AVX2, "--")):
            arm = on + step_name(width, batch)
            rows = timed(results, arm) if arm in results.arms else pd.DataFrame()
            if rows.empty:
                continue
            groups = rows[rows["method"] == SCATTERED].groupby("sparsity")
            bars = np.array([interval(part["speedup"]) for _, part in groups]).T
            label = f"{width} cells, AVX2 alone" if on else f"{width} cells"
            plots.points(left, 100 * groups["zeros"].mean(), *bars, label, color=colour, linestyle=style, linewidth=1)
    bounds = [paper("macs", "sparsified", "speedup_bound", percent) for percent in (80, 90)]
    plots.paper(left, [80, 90], [bound.value for bound in bounds], bounds[0].known)
    left.axhline(1, color="black", linestyle=":", linewidth=1)
    left.set(xlabel="zeros of dnet, %", ylabel="speed-up over the faster dense step", title=f"Scattered zeros, batch {batch}")
    left.set(xlim=(40, 100))
    _bars(middle, results)
    _traded(right, results)
    plots.legend_below(left, columns=3)
    layer, model = machine_of(results, _of_steps(results)), machine_of(results, [arm + TIMED for arm in TRADED])
    after = f"right: a step after {100 * results.profile.speed.after:g} % of training, {model}"
    plots.note(figure, f"forward and backward; left and middle: one layer, {layer}; {after}")
    return figure


def _bars(ax, results: Results) -> None:
    """The speed-up of every method at the largest share of zeros that all are timed at."""
    sizes = results.profile.speed
    share = sizes.compared[0]
    rows = timed(results, step_name(sizes.compared_width, sizes.batches[0]))
    methods = [GATHERED, CSR, COLUMNS, TOP, HELD, SCATTERED, DENSE, NN]
    for place, method in enumerate(methods):
        part = rows[(rows["method"] == method) & rows["sparsity"].isin((0.0, share))] if len(rows) else rows
        if part.empty:
            continue
        mean, low, high = interval(part["speedup"])
        ax.barh(place, mean, height=0.6, color=plots.PALETTE[0] if method in (DENSE, NN) else plots.PALETTE[2])
        ax.text(max(mean, high if high == high else mean) + 0.03, place, f"{mean:.2f}", va="center", fontsize=9)
        if low == low:
            ax.plot([low, high], [place, place], color="black", linewidth=1.2)
    ax.axvline(by_macs(share), color="black", linewidth=1)
    ax.annotate(
        "by MACs", (by_macs(share), len(methods) - 0.55), ha="right", fontsize=8, xytext=(-3, 0), textcoords="offset points"
    )
    ax.axvline(1, color="black", linestyle=":", linewidth=1)
    ax.set_yticks(range(len(methods)), [WORDS[method] for method in methods])
    ax.set(xlabel="speed-up over the faster dense step", xlim=(0, None), ylim=(-0.5, len(methods) - 0.3))
    ax.set_title(f"{share:.0%} of zeros, {step_name(sizes.compared_width, sizes.batches[0])}")


def _traded(ax, results: Results) -> None:
    """What a rule costs on test data over what it gains in measured time, of the layers of that very model."""
    for arm, colour in zip(TRADED, plots.PALETTE[3:], strict=False):
        gained = interval(_measured(results, arm))
        cost = interval(relative_loss(results, arm, DENSE_TRAINING, "test_loss"))
        if not np.isnan(gained[0] + cost[0]):
            plots.points(ax, [gained[0]], *np.array([cost]).T, arm, color=colour)
            ax.plot(gained[1:], [cost[0]] * 2, color=colour, linewidth=1.2)
    plots.say_if_empty(ax)
    ax.plot(1, 0, "o", color="black", markerfacecolor="none", label="t = 0")
    ax.axhline(0, color="black", linestyle=":", linewidth=1)
    ax.axvline(1, color="black", linestyle=":", linewidth=1)
    ax.set(xlabel="speed-up of the model's LSTM layers", ylabel="test loss against t = 0, %")
    ax.set_title(f"Quality against time, {results.profile.layers} x {results.profile.hidden} cells")
    plots.legend_below(ax, columns=3)


EXHIBITS = (
    Exhibit(
        "speed",
        "Real time (ours)",
        "Seconds of a training step with half of dnet zero or more, scattered or in columns, beside what the MACs promise.",
        speed_arms,
        steps,
        speed,
        ("seeds", "speed_length", "hidden", "layers", "length", "batch", "steps", "learning_rate"),
    ),
)
