"""The figures of the study, ours and the paper's values in the same axes wherever the paper's are known."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from repro.report import plots
from repro.report.published import load_published
from repro.report.statistics import bootstrap_band
from repro.sparse.storage import megabytes, units_on_chip
from repro.studies.base import Results, summary
from repro.studies.comparing import interval
from repro.studies.narang2017 import quantities as q
from repro.studies.narang2017.comparisons import STUDY, TABLE3, base_of, paper, relative_cer, table3
from repro.studies.narang2017.profiles import corpus_note

BLUE, RED, GREEN, PINK, ORANGE, SKY = plots.PALETTE


def schedule(results: Results) -> Figure:
    """Epsilon over training for both slopes, in units of q."""
    figure, ax = plots.new_figure()
    for phi, colour in ((1.5, BLUE), (2.0, RED)):
        ramp = q.paper_ramp(phi)
        due = [i for i in range(ramp.end) if ramp.due(i)]
        epochs = [*(np.array(due) / 2750), 20]
        epsilon = [ramp.threshold(i) for i in due]
        ax.step(epochs, [*epsilon, epsilon[-1]], where="post", color=colour, label=f"phi = {phi:g} theta")
    times = q.paper_ramp()
    for name, at in (("start_itr", times.start), ("ramp_itr", times.ramp), ("end_itr", times.end)):
        ax.axvline(at / 2750, color=plots.PAPER, linewidth=0.8, linestyle=":")
        ax.annotate(name, (at / 2750, 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="right", fontsize=8)
    for series, x in (
        ("epsilon at ramp_itr, ramp_slope 1.5", times.ramp),
        ("epsilon at end_itr, ramp_slope 1.5", times.end),
        ("epsilon at end_itr, ramp_slope 2", times.end),
    ):
        value = paper("table1", series, "multiple_of_q")
        plots.paper(ax, [x / 2750], [value.value], value.known, "paper, Equation 1")
    ax.set_xticks(range(0, 21, 5))
    ax.set(xlabel="epoch (20 in all, 55,000 iterations)", ylabel="threshold epsilon / q", title="The ramp of Algorithm 1")
    plots.ours_and_paper_legend(ax)
    return figure


def layer_counts(exhibit: str):
    def draw(results: Results) -> Figure:
        rows = q.layer_counts(exhibit)
        figure, ax = plots.new_figure(size=(6.4, 4.4))
        places = np.arange(len(rows))
        ax.barh(places, [counted / 1e6 for _, counted, _, _ in rows], color=SKY, label="ours, counted")
        plots.paper(ax, [printed / 1e6 for _, _, printed, _ in rows], places, rows[0][3])
        ax.set_yticks(places, [layer for layer, _, _, _ in rows])
        ax.invert_yaxis()
        plots.plain_log(ax, "x")
        ax.set(xlabel="parameters, millions (log scale)", title="Parameters by layer at full size")
        plots.ours_and_paper_legend(ax)
        return figure

    return draw


_COLOURS = {"RNN dense": BLUE, "RNN sparse": RED, "GRU dense": GREEN, "GRU sparse": PINK}
_MARKERS = {"704": "v", "1760": "o", "2560": "s", "3072": "D", "3568": "^"}


def main_results(results: Results) -> Figure:
    """Left: CER against size, ours. Right: relative performance of each row, ours and the paper's."""
    figure, (left, right) = plots.new_figure(1, 2, size=(10, 4.8), width_ratios=(1, 1.2))
    for arm in TABLE3:
        kind, width = arm.rsplit(" ", 1)
        mean, low, high = interval(100 * results.metric(arm, "test_cer"))
        size = summary(results.metric(arm, "nonzero"))["ours"] / 1e3
        plots.points(left, [size], [mean], [low], [high], arm, color=_COLOURS[kind], fmt=_MARKERS[width])
    plots.plain_log(left, "x")
    left.set(xlabel="non-zero parameters, thousands (log scale)", ylabel="test CER, %", title="Error rate and size, ours")
    arms = [arm for arm in TABLE3 if arm != base_of(arm)]
    places = np.arange(len(arms))
    right.axvline(0, color="black", linewidth=0.8)
    for arm, place in zip(arms, places, strict=True):
        _sideways(right, place - 0.12, -relative_cer(results, arm, base_of(arm)))
    published = [table3(arm, "relative_percent") for arm in arms]
    plots.paper(right, [p.value for p in published], places + 0.12, published[0].known)
    right.set_yticks(places, arms)
    right.invert_yaxis()
    right.set(xlabel="% of the dense baseline's CER (right: better)", title="Relative performance")
    plots.legend_below(left, columns=3)
    plots.legend_below(right)
    plots.note(figure, corpus_note(results.profile))
    return figure


def _sideways(ax, place: float, values) -> None:
    """A mean with its interval along x."""
    mean, low, high = interval(values)
    error = None if np.isnan(low) else [[max(mean - low, 0)], [max(high - mean, 0)]]
    ax.errorbar([mean], [place], xerr=error, fmt="o", color=BLUE, capsize=3, label="ours, 95 % interval")


def hard_pruning(results: Results) -> Figure:
    figure, ax = plots.new_figure()
    hard = [arm for arm in results.arms if arm.startswith("hard")]
    epochs = [float(arm.split()[-1].split("/")[0]) for arm in hard]
    bars = np.array([interval(-relative_cer(results, arm, "RNN dense 1760")) for arm in hard])
    plots.points(ax, epochs, *bars.T, "ours, hard", color=RED)
    mean, low, high = interval(-relative_cer(results, "RNN sparse 1760", "RNN dense 1760"))
    ax.axhline(mean, color=BLUE, label="ours, gradual")
    if not np.isnan(low):
        ax.axhspan(low, high, color=BLUE, alpha=0.15, linewidth=0)
    rows = load_published(STUDY).query("exhibit == 'table4' and series == 'hard pruning' and metric == 'relative_percent'")
    plots.paper(ax, rows["x"], rows["value"], "remembered", "paper, hard", linestyle="--")
    gradual = paper("table3", "RNN Sparse 1760", "relative_percent")
    ax.axhline(gradual.value, color=plots.PAPER, linestyle=":", label=plots.paper_label(gradual.known, "paper, gradual"))
    ax.set(
        xlabel="epoch of hard pruning (of 20)",
        ylabel="relative performance, %",
        title="Hard against gradual pruning, RNN 1760",
    )
    plots.note(figure, corpus_note(results.profile))
    plots.ours_and_paper_legend(ax, columns=2)
    return figure


def loss_curves(results: Results) -> Figure:
    """Figure 1a (RNN) and 1b (GRU): training and validation loss, with the paper's readings at their share of training."""
    figure, axes = plots.new_figure(1, 2, size=(10, 4.8), sharey=True)
    panels = (
        ("figure1a", "a: bidirectional RNN", {"RNN dense 1760": BLUE, "RNN sparse 2560": RED, "RNN sparse 3072": GREEN}),
        ("figure1b", "b: GRU", {"GRU dense 2560": BLUE, "GRU sparse 2560": RED}),
    )
    for ax, (panel, title, arms) in zip(axes, panels, strict=True):
        _paper_losses(ax, panel, results.profile.epochs)
        for arm, colour in arms.items():
            for column, style, name in (("train_loss", "-", "train"), ("validation_loss", "--", "validation")):
                if not results.has(arm):
                    continue
                losses = results.curve(arm, "epochs", column)
                epochs = np.arange(1, losses.shape[1] + 1)
                plots.band(ax, epochs, *bootstrap_band(losses), f"{arm}, {name}", color=colour, linestyle=style)
        end = results.profile.epochs / 2
        ax.axvspan(1, end, color="black", alpha=0.04, linewidth=0)
        ax.annotate("pruning", (end, 0.98), xycoords=("data", "axes fraction"), ha="right", va="top", fontsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(xlabel="epoch", title=title)
        plots.legend_below(ax)
    plots.plain_log(axes[0], "y")
    axes[0].set_ylabel("CTC cost, nats per utterance (log scale)")
    plots.note(figure, corpus_note(results.profile))
    return figure


def _paper_losses(ax, panel: str, epochs: int) -> None:
    """The costs read off the paper's figure (other speech, other lengths); its 20 epochs are stretched to ours."""
    rows = load_published(STUDY)
    rows = rows[(rows["exhibit"] == panel) & rows["metric"].isin(["ctc_cost", "ctc_cost_peak"]) & rows["x"].notna()]
    for kind, marker in (("dense", "o"), ("sparse", "s")):
        found = rows[rows["series"].str.startswith(kind)]
        plots.paper(ax, found["x"] / q.PAPER_EPOCHS * epochs, found["value"], "image", f"paper, {kind}", marker=marker)


def layer_sparsities(results: Results) -> Figure | None:
    """Figure 2a: zeros by recurrent layer. Figure 2b: the pruning schedule of the matrix nearest to 95 %."""
    records = results.seeds("RNN sparse 1760")
    if not records:
        return None
    figure, (left, right) = plots.new_figure(1, 2, size=(10, 4.4))
    shares = {}
    for record in records:
        for layer, direction, share in q.recurrent_layer_sparsities(record):
            shares.setdefault(direction, {}).setdefault(layer, []).append(100 * share)
    for (direction, by_layer), colour, shift in zip(shares.items(), (BLUE, RED), (-0.06, 0.06), strict=True):
        bars = np.array([interval(values) for values in by_layer.values()])
        plots.points(left, np.array(list(by_layer)) + shift, *bars.T, direction, color=colour)
    left.set_xticks(sorted(by_layer))
    left.set_ylim(top=min(left.get_ylim()[1], 100.5))
    left.set(xlabel="recurrent layer (1: nearest the input)", ylabel="zeros, %", title="a: sparsity of the recurrent layers")
    record = records[0]
    table = record.curves["schedule"]
    final = {
        layer: pruned / weights
        for layer, pruned, weights in zip(table["layer"], table["pruned"], table["weights"], strict=True)
    }
    chosen = min(final, key=lambda layer: abs(final[layer] - 0.95))
    total = record.metrics["steps_per_epoch"] * record.spec["epochs"]
    rows = [
        (i / total, 100 * p / w)
        for i, layer, p, w in zip(table["iteration"], table["layer"], table["pruned"], table["weights"], strict=True)
        if layer == chosen
    ]
    at, pruned = zip(*rows, strict=True)
    right.step([0, *at, 1], [0, *pruned, pruned[-1]], where="post", color=BLUE, label="ours, one matrix")
    early = paper("figure2b", "recurrent layer", "weights_pruned", 15_000)
    plots.paper(right, [15 / 55], [100 * early.value / 1760**2], early.known, "paper: nearly 25,000 weights")
    for name in ("start_itr", "end_itr"):
        published = paper("figure2b", "schedule", name).value / 55_000
        right.axvline(published, color=plots.PAPER, linewidth=0.8, linestyle=":")
        right.annotate(
            f"paper {name}", (published, 0.5), xycoords=("data", "axes fraction"), rotation=90, ha="left", fontsize=8
        )
    right.set(xlabel="fraction of training", ylabel="weights pruned, %", title="b: schedule of the matrix nearest to 95 %")
    for ax in (left, right):
        plots.legend_below(ax)
    plots.note(figure, f"RNN sparse 1760, {corpus_note(results.profile)}")
    return figure


def memory_sizes(results: Results) -> Figure:
    figure, ax = plots.new_figure(size=(7.2, 4.2))
    places = np.arange(len(q.MEMORY))
    published = [paper("memory", series, "megabytes") for series in q.MEMORY]
    kinds = [
        ("values only (the paper's count)", "none", SKY),
        ("with a 4-byte index", "csr32", RED),
        ("least possible", "entropy", GREEN),
    ]
    for shift, (label, index, colour) in zip((-0.27, 0, 0.27), kinds, strict=True):
        sizes = []
        for series in q.MEMORY:
            count = q.printed_parameters(series)
            everything = count if "Dense" in series else count / 0.1
            sizes.append(megabytes(everything, count, index="dense" if "Dense" in series else index))
        ax.bar(places + shift, sizes, width=0.25, color=colour, label=label)
    plots.paper(ax, places - 0.27, [p.value for p in published], published[0].known)
    ax.set_xticks(places, q.MEMORY, fontsize=8)
    plots.plain_log(ax, "y")
    ax.set(ylabel="megabytes (log scale)", title="Model size, float32, with and without positions")
    plots.ours_and_paper_legend(ax, columns=2)
    return figure


def onchip_projection(results: Results) -> Figure:
    figure, ax = plots.new_figure()
    capacity = 2 * paper("onchip", "NVIDIA P100, float16", "hidden_units", 0).value ** 2
    percents = np.array([0, 50, 80, 90, 95, 98, 99])
    for index, label, colour in (
        ("none", "values only", BLUE),
        ("entropy", "least possible index", GREEN),
        ("csr16", "2-byte index", RED),
    ):
        units = [units_on_chip(capacity, percent / 100, index="dense" if percent == 0 else index) for percent in percents]
        ax.plot(100 - percents, units, "o-", color=colour, label=label, markersize=4)
    published = [paper("onchip", "NVIDIA P100, float16", "hidden_units", percent) for percent in (0, 90, 99)]
    plots.paper(ax, [100, 10, 1], [p.value for p in published], published[0].known)
    plots.plain_log(ax, "x")
    plots.plain_log(ax, "y")
    ax.set(
        xlabel="density, % (log scale)",
        ylabel="hidden units that fit (log scale)",
        title=f"Widest recurrent layer on the chip (float16, {capacity / 1e6:.1f} MB)",
    )
    ax.invert_xaxis()
    plots.ours_and_paper_legend(ax, columns=2)
    return figure


def paper_arithmetic(results: Results) -> Figure:
    figure, ax = plots.new_figure(size=(7.2, 5))
    rows = q.relative_performances()
    places = np.arange(len(rows))
    differences = [printed - again for _, printed, again in rows]
    colours = [RED if abs(difference) > 0.1 else BLUE for difference in differences]
    ax.barh(places, differences, color=colours)
    for at in (-0.1, 0.1):
        ax.axvline(at, color=plots.PAPER, linestyle=":", linewidth=1)
    ax.set_yticks(places, [row for row, _, _ in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set(
        xlabel="printed minus recomputed, points (dotted: what rounding allows)",
        title="Relative performance in Tables 3 and 4 against their own CERs",
    )
    return figure


def ablations(results: Results) -> Figure:
    figure, ax = plots.new_figure(size=(7.2, 4.8))
    arms = [arm for arm in results.arms if arm != "RNN sparse 1760"]
    bars = np.array([interval(relative_cer(results, arm, "RNN sparse 1760")) for arm in arms])
    places = np.arange(len(arms))
    ax.axvline(0, color="black", linewidth=0.8)
    shown = np.clip(bars[:, 0], -100, 150)
    for place, (mean, low, high), at in zip(places, bars, shown, strict=True):
        inside = mean == at and not np.isnan(low)
        ax.errorbar(
            [at],
            [place],
            xerr=[[max(mean - low, 0)], [max(high - mean, 0)]] if inside else None,
            fmt="o" if mean == at else ">",
            color=BLUE,
            capsize=3,
        )
        if mean != at:
            ax.annotate(f"{mean:+.0f} %", (at, place), textcoords="offset points", xytext=(-8, -3), ha="right", fontsize=8)
    zeros = [100 * summary(results.metric(arm, "sparsity_recurrent"))["ours"] for arm in arms]
    ax.set_yticks(places, [f"{arm}\n{share:.0f} % zeros" for arm, share in zip(arms, zeros, strict=True)], fontsize=8)
    ax.invert_yaxis()
    ax.set(
        xlabel="CER against RNN sparse 1760, % (left: better), 95 % interval",
        title="Ablations and other methods, with the zeros of the recurrent matrices",
    )
    plots.note(figure, corpus_note(results.profile))
    return figure


def pruner_cost(results: Results) -> Figure:
    figure, ax = plots.new_figure(size=(6.4, 3))
    values = results.metric("step", "overhead_percent")
    ax.barh(["GradualPruner"], [summary(values)["ours"]], color=SKY, height=0.4, label="mean over repeats")
    ax.plot(values, np.zeros(len(values)), "o", color=BLUE, label="one repeat")
    ax.axvline(2, color=RED, linestyle="--", label="2 %, our own limit")
    ax.set(xlabel="time of pruner.step(), % of a dense training step", title="Cost of pruning while training", ylim=(-0.6, 0.6))
    ax.set_xlim(0, max(2.4, 1.2 * values.max(initial=0)))
    plots.ours_and_paper_legend(ax)
    return figure
