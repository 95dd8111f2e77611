"""Exhibits `onlydw` and `precision`: the rule in the weights' gradients alone, and dnet in the numbers of smaller formats."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.engine import Record
from repro.report import plots
from repro.report.statistics import bootstrap_band
from repro.studies.base import Arms, Exhibit, Quantity, Results
from repro.studies.comparing import beside, interval, paired
from repro.studies.gates import QUANTILE, SNAPSHOTS
from repro.studies.zhu2017 import comparisons as c
from repro.studies.zhu2017.comparisons import paper, per_seed, relative_loss
from repro.studies.zhu2017.profiles import DENSE, TRAINING, Profile, arm, corpus_note, held_name, short, static_name

BLUE, RED, GREEN, PINK, ORANGE, SKY = plots.PALETTE

EVERYWHERE = held_name(0.8)
WEIGHTS = f"{EVERYWHERE}, in dW and dU alone"
PAPERS = static_name(1e-6)
ROUNDED, ROUNDED_PAPERS = f"{DENSE}, bfloat16", f"{PAPERS}, bfloat16"

HALF = SNAPSHOTS[2]
AT = [f"{100 * share:g} % of training" for share in SNAPSHOTS]
FORMATS = {
    "float32": {"color": BLUE, "markersize": 11, "markerfacecolor": "none", "linestyle": "-"},  # hollow: bfloat16 hides it
    "bfloat16": {"color": ORANGE, "linestyle": "--"},
    "float16": {"color": RED, "linestyle": "-"},
}


def onlydw_arms(profile: Profile) -> Arms:
    """80 % held before all four products, as in the paper, and before those of the weights alone."""
    return {
        DENSE: arm(profile, "static", 0.0),
        EVERYWHERE: arm(profile, "held", 0.8),
        WEIGHTS: arm(profile, "held", 0.8, weights_only=True),
    }


def precision_arms(profile: Profile) -> Arms:
    """The dense baseline and the paper's threshold, in float32 and with every dnet rounded to bfloat16."""
    return {
        DENSE: arm(profile, "static", 0.0),
        PAPERS: arm(profile, "static", 1e-6),
        ROUNDED: arm(profile, "static", 0.0, precision="bfloat16"),
        ROUNDED_PAPERS: arm(profile, "static", 1e-6, precision="bfloat16"),
    }


# -------------------------------------------------------------------------------------------------------- quantities


def one_step(record: Record, variant: str, column: str, training: float = HALF) -> float:
    """A column of one step under a variant of the method, at a snapshot of a dense training."""
    curve = record.curves["variants"]
    rows = zip(curve["variant"], curve["training"], strict=True)
    (row,) = [i for i, found in enumerate(rows) if found == (variant, training)]
    return curve[column][row]


def zeros_of_format(record: Record, name: str, training: float = HALF) -> float:
    """Percent of zeros of one step without a threshold, dnet rounded to a format."""
    if name == "float32":
        return c.at_threshold(record, 0.0, training)[0]
    return 100 * one_step(record, name, "zeros", training) / one_step(record, name, "entries", training)


def relative_loss_everywhere_to_only_dw(results: Results):
    losses = (results.metric(name, "validation_loss") for name in (EVERYWHERE, WEIGHTS, DENSE))
    return paired(lambda everywhere, weights, dense: 100 * (everywhere - weights) / dense, *losses)


def cosine_only_dw_minus_everywhere(results: Results):
    def difference(record: Record) -> float:
        return one_step(record, "top, weights", "cosine") - one_step(record, "top", "cosine")

    return per_seed(results, DENSE, difference)


def _by_format(name: str) -> Quantity:
    def more(record: Record) -> float:
        return zeros_of_format(record, name) - zeros_of_format(record, "float32")

    return lambda results: per_seed(results, DENSE, more)


def zeros_difference_bfloat16(results: Results):
    rounded, single = (per_seed(results, name, c.training_zeros) for name in (ROUNDED_PAPERS, PAPERS))
    return abs(paired(np.subtract, rounded, single))


def relative_validation_loss_bfloat16(results: Results):
    return relative_loss(results, ROUNDED_PAPERS, ROUNDED)


# ----------------------------------------------------------------------------------------------------------- tables


def onlydw_tables(results: Results) -> dict[str, pd.DataFrame]:
    """What a held sparsity costs everywhere and in the weights' gradients alone; its cosines in one step."""
    rows = []
    for name in results.arms:
        rows += [
            (name, "zeros, %", None, per_seed(results, name, c.training_zeros)),
            (name, "validation loss, nats a symbol", None, results.metric(name, "validation_loss")),
        ]
        if name != DENSE:
            rows.append((name, "validation loss against t = 0, %", None, relative_loss(results, name, DENSE)))
            rows.append((name, "test loss against t = 0, %", None, relative_loss(results, name, DENSE, "test_loss")))
    cosines = [
        (f"{words}, {at}", "cosine with the dense gradient", None, _cosines(results, variant, share))
        for share, at in zip(SNAPSHOTS, AT, strict=True)
        for variant, words in _WHERE.items()
    ]
    return {"Trainings": beside(rows), f"One step, the smallest {QUANTILE:.0%} of each dnet zero": beside(cosines)}


_WHERE = {"top": "everywhere", "top, weights": "in dW and dU alone"}


def _cosines(results: Results, variant: str, training: float) -> np.ndarray:
    return per_seed(results, DENSE, lambda record: one_step(record, variant, "cosine", training))


def precision_tables(results: Results) -> dict[str, pd.DataFrame]:
    """Zeros of one step in each format; zeros and losses of trainings in float32 and bfloat16. The paper's are of float32."""
    printed = paper("figure3", "one step", "zeros_percent", 0)
    steps = [
        (f"{name}, {at}", "zeros at t = 0, %", printed if name == "float32" else None, _zeros(results, name, share))
        for share, at in zip(SNAPSHOTS, AT, strict=True)
        for name in FORMATS
    ]
    rows = []
    in_print = {base: paper("figure4", "whole training", "zeros_percent", t) for base, t in ((DENSE, 0), (PAPERS, 1e-6))}
    for base, rounded in ((DENSE, ROUNDED), (PAPERS, ROUNDED_PAPERS)):
        for name in (base, rounded):
            rows += [
                (name, "zeros, %", in_print.get(name), per_seed(results, name, c.training_zeros)),
                (name, "validation loss, nats a symbol", None, results.metric(name, "validation_loss")),
            ]
    for name, dense in ((PAPERS, DENSE), (ROUNDED_PAPERS, ROUNDED)):
        rows.append((name, "validation loss against t = 0 in the same format, %", None, relative_loss(results, name, dense)))
    return {"One step, without a threshold": beside(steps), "Trainings": beside(rows)}


def _zeros(results: Results, name: str, training: float) -> np.ndarray:
    return per_seed(results, DENSE, lambda record: zeros_of_format(record, name, training))


# ----------------------------------------------------------------------------------------------------------- figures


def _loss_curves(ax, results: Results, looks: dict[str, dict]) -> None:
    """A line a seed: where some seeds learn under a threshold and others do not, their mean is nobody's curve."""
    for name, look in looks.items():
        if results.has(name):
            steps = results.curve(name, "evaluations", "step")[0]
            losses = results.curve(name, "evaluations", "validation_loss")
            ax.plot(steps, losses.T, label=name, linewidth=1.1, **look)
    ax.set(xlabel="updates", ylabel="validation loss, nats a symbol", title="Validation loss, a line a seed")


def _training_axis(ax) -> None:
    ax.set(xlim=(0.3, 160), xlabel="training, % (log scale)")
    plots.plain_log(ax, "x")


def onlydw_figure(results: Results) -> Figure:
    """Left: cosine of one step over the training. Right: validation loss."""
    figure, (left, right) = plots.new_figure(1, 2, size=(10, 4.6))
    for (variant, words), colour, beside_it in zip(_WHERE.items(), (BLUE, ORANGE), (1.0, 1.08), strict=True):
        values = np.array([interval(_cosines(results, variant, share)) for share in SNAPSHOTS]).T
        plots.points(left, 100 * beside_it * np.array(SNAPSHOTS), *values, words, color=colour, linestyle="-")
    _training_axis(left)
    left.set(ylabel="cosine with the dense gradient", title=f"One step, the smallest {100 * QUANTILE:g} % of each dnet zero")
    looks = {DENSE: {"color": "black", "linestyle": "--"}, EVERYWHERE: {"color": BLUE}, WEIGHTS: {"color": ORANGE}}
    _loss_curves(right, results, looks)
    for ax in (left, right):
        plots.legend_below(ax)
    plots.note(figure, f"NT, 95 % interval; {corpus_note(results.profile)}" + c.without_records(results))
    return figure


def precision_figure(results: Results) -> Figure:
    """Zeros of one step by format; zeros over the training, and the validation loss, in float32 and bfloat16."""
    figure, (left, middle, right) = plots.new_figure(1, 3, size=(13, 4.6))
    for name, look in FORMATS.items():
        values = np.array([interval(_zeros(results, name, share)) for share in SNAPSHOTS]).T
        plots.points(left, 100 * np.array(SNAPSHOTS), *values, f"dnet in {name}", **look)
    printed = paper("figure3", "one step", "zeros_percent", 0)
    left.axhline(printed.value, color=plots.PAPER, linestyle=":", label=plots.paper_label(printed.known))
    for t, style in ((0, ":"), (1e-6, "-.")):
        printed = paper("figure4", "whole training", "zeros_percent", t)
        label = plots.paper_label(printed.known, f"paper, t = {short(t)}, whole training")
        middle.axhline(printed.value, color=plots.PAPER, linestyle=style, linewidth=1.2, label=label)
    _training_axis(left)
    left.set(ylabel="zeros of dnet, %", title="One step, t = 0", ylim=(0, 102))
    looks = {
        DENSE: {"color": "black"},
        ROUNDED: {"color": "black", "linestyle": "--"},
        PAPERS: {"color": GREEN},
        ROUNDED_PAPERS: {"color": GREEN, "linestyle": "--"},
    }
    tenths = 100 * (np.arange(c.TENTHS) + 0.5) / c.TENTHS
    for name, look in looks.items():
        if results.has(name):
            shares = np.array([c.zeros_by_tenth(record) for record in results.seeds(name)])
            plots.band(middle, tenths, *bootstrap_band(shares), name, **look)
    middle.set(xlabel="training, %", ylabel="zeros of dnet, %", title="Zeros by tenth of training", ylim=(0, 102))
    _loss_curves(right, results, looks)
    for ax in (left, middle, right):
        plots.legend_below(ax)
    plots.note(figure, f"NT, 95 % interval; {corpus_note(results.profile)}" + c.without_records(results))
    return figure


EXHIBITS = (
    Exhibit(
        "onlydw",
        "The rule in the weights' gradients alone (ours)",
        "What it costs that thresholded gradients are carried back through time and layers.",
        onlydw_arms,
        onlydw_tables,
        onlydw_figure,
        TRAINING,
    ),
    Exhibit(
        "precision",
        "Gate gradients in half precision (ours)",
        "Zeros that rounding makes without a threshold, and what the threshold does to rounded gradients.",
        precision_arms,
        precision_tables,
        precision_figure,
        TRAINING,
    ),
)

QUANTITIES: dict[str, Quantity] = {
    function.__name__: function
    for function in (
        relative_loss_everywhere_to_only_dw,
        cosine_only_dw_minus_everywhere,
        zeros_difference_bfloat16,
        relative_validation_loss_bfloat16,
    )
} | {f"zeros_points_step_{name}": _by_format(name) for name in ("bfloat16", "float16")}
