"""The figures of the study, ours and the paper's values in the same axes wherever the paper's are known."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, StrMethodFormatter

from repro.report import plots
from repro.report.statistics import bootstrap_band
from repro.studies.base import Results
from repro.studies.comparing import interval
from repro.studies.gates import ONE_STEP, PRINTED, SNAPSHOTS
from repro.studies.zhu2017 import arithmetic as a
from repro.studies.zhu2017 import comparisons as c
from repro.studies.zhu2017 import quantities as q
from repro.studies.zhu2017.comparisons import paper, per_seed
from repro.studies.zhu2017.profiles import DENSE, GUESSING, NT, THRESHOLDS, TIMED, N, corpus_note, held_name, short, static_name
from repro.studies.zhu2017.speed import by_macs, ideal_speedup, machine_of, measured_speedup

BLUE, RED, GREEN, PINK, ORANGE, SKY = plots.PALETTE

T_COLOURS = {0.0: "black", 1e-8: SKY, 1e-7: BLUE, 1e-6: GREEN, 1e-5: RED}
NORMALISATIONS = {NT: "loss averaged over batch and time (NT)", N: "loss summed over time (N)"}
AT_ZERO = ONE_STEP[1] / 10  # where t = 0 stands on the logarithmic axis


def _threshold_axis(ax) -> None:
    """A logarithmic axis of t, 0 at its left end."""
    ax.set_xscale("log")
    decades = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
    ax.set_xticks([AT_ZERO, *decades], ["0", *(f"$10^{{{round(np.log10(t))}}}$" for t in decades)])
    ax.minorticks_off()
    ax.set_xlabel("threshold t (log scale, 0 at the left)")


def paper_arithmetic(results: Results) -> Figure:
    """The paper's zeros over t, extended to where its zeros at t = 0 would come from; the printed derivative of tanh."""
    figure, (left, right) = plots.new_figure(1, 2, size=(10, 4.2))
    start, slope = a.line_of_zeros()
    exponents = np.array([start, -5.0])
    left.plot(exponents, slope * (exponents - start), color=BLUE, label="straight line through both")
    published = [paper("figure3", "one step", "zeros_percent", t) for t in (1e-8, 1e-6)]
    plots.paper(left, [-8, -6], [p.value for p in published], published[0].known, "paper, one step")
    at_zero = paper("figure3", "one step", "zeros_percent", 0)
    left.axhline(at_zero.value, color=plots.PAPER, linestyle=":", label=plots.paper_label(at_zero.known, "paper, t = 0"))
    ends = [np.log10(paper("causes", "float32", name).value) for name in ("smallest_denormal", "smallest_normal")]
    left.axvspan(*ends, color=RED, alpha=0.2, linewidth=0, label="end of float32's range")
    left.set(xlabel="log10 of the threshold t", ylabel="zeros of dnet, %", title="Zeros over t, as printed", ylim=(0, 100))
    x = np.linspace(-5, 5, 201)
    printed, correct = np.array([a.printed_tanh_derivative(value) for value in x]).T
    right.plot(x, printed, color=RED, label="tanh (1 - tanh), as printed")
    right.plot(x, correct, color=BLUE, label="1 - tanh², right")
    right.set(xlabel="x", ylabel="derivative of tanh", title="The derivative of section 1")
    for ax in (left, right):
        plots.legend_below(ax)
    return figure


def activations(results: Results) -> Figure:
    """Figure 2: histograms of the gates at three snapshots, mean over replicates."""
    figure, axes = plots.new_figure(2, 2, size=(9, 6.4), sharey=True)
    looks = {SNAPSHOTS[0]: (RED, "-"), SNAPSHOTS[1]: (GREEN, "--"), SNAPSHOTS[3]: (SKY, None)}
    for ax, (gate, name) in zip(axes.flat, c.GATES.items(), strict=True):
        for training, (colour, style) in reversed(looks.items()):
            shares = [100 * c.histogram(record, gate, training) for record in results.seeds(DENSE)]
            if not shares:
                continue
            edges = np.linspace(-1 if gate == "g" else 0, 1, len(shares[0]) + 1)
            label = f"{100 * training:g} % of training"
            if style is None:
                ax.stairs(np.mean(shares, axis=0), edges, fill=True, color=colour, label=label)
            else:
                ax.stairs(np.mean(shares, axis=0), edges, color=colour, linestyle=style, linewidth=1.6, label=label)
        ax.set(xlabel=f"activation of the {name}", yscale="log", ylim=(0.02, 100))
        ax.xaxis.set_major_locator(MaxNLocator(5))
    for ax in axes[:, 0]:
        ax.set_ylabel("share of activations, % (log scale)")
    plots.plain_log(axes[0, 0], "y")
    plots.ours_and_paper_legend(axes.flat[0])
    plots.note(figure, f"t = 0, NT, all layers, mean over replicates, 100 bins a gate; {corpus_note(results.profile)}")
    return figure


def one_step(results: Results) -> Figure:
    """Figure 3: zeros and cosine of one step against t."""
    figure, (left, right) = plots.new_figure(1, 2, size=(10, 4.4))
    for normalisation, colour in ((NT, BLUE), (N, ORANGE)):
        records = results.seeds(static_name(0.0, normalisation))
        if not records:
            continue
        x = [AT_ZERO, *ONE_STEP[1:]]
        _, zeros, cosines = zip(*map(c.one_step, records), strict=True)
        plots.band(left, x, *bootstrap_band(np.array(zeros)), f"ours, {normalisation}", color=colour, marker=".")
        plots.band(right, x, *bootstrap_band(np.array(cosines)), f"ours, {normalisation}", color=colour, marker=".")
    printed_rule = np.array([q.printed_rule(record) for record in results.seeds(DENSE)])
    if len(printed_rule):
        for ax, values in zip((left, right), printed_rule.T, strict=True):
            bars = np.array([interval(values)]).T
            plots.points(ax, [PRINTED], *bars, "ours, dnet > t as printed, NT", color=PINK, fmt="D")
    for ax, metric, thresholds in ((left, "zeros_percent", (0, 1e-8, 1e-6)), (right, "cosine", (1e-6, 1e-5))):
        published = [paper("figure3", "one step", metric, t) for t in thresholds]
        plots.paper(ax, [t or AT_ZERO for t in thresholds], [p.value for p in published], published[0].known)
        _threshold_axis(ax)
    right.annotate("\u201cclose to 1\u201d", (1e-6, 1), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8)
    left.set(ylabel="zeros of dnet, %", title="Zeros of one step", ylim=(0, 102))
    right.set(ylabel="cosine of dW with the dense one", title="What is left of the gradient's direction")
    plots.ours_and_paper_legend(left, columns=4)
    plots.note(figure, f"weights at half of training, 95 % interval; {corpus_note(results.profile)}")
    return figure


def zeros_over_training(results: Results) -> Figure:
    """Figure 4: zeros of each layer over the training, under both normalisations."""
    layers = results.profile.layers
    figure, axes = plots.new_figure(2, layers, size=(1.6 + 2.9 * layers, 6.4), sharex=True, sharey=True, squeeze=False)
    for row, normalisation in zip(axes, (NT, N), strict=True):
        for t in THRESHOLDS[normalisation]:
            records = results.seeds(static_name(t, normalisation))
            if not records:
                continue
            found = [c.zeros_by_step(record) for record in records]
            for layer, ax in enumerate(row):
                shares = np.array([zeros[layer] for _, zeros in found])
                plots.band(ax, found[0][0], *bootstrap_band(shares), f"t = {short(t)}", color=T_COLOURS[t])
                if t in (0, 1e-7, 1e-6):
                    printed = paper("figure4", "whole training", "zeros_percent", t)
                    plots.paper(ax, [104], [printed.value], printed.known, "paper, all layers", markeredgecolor=T_COLOURS[t])
        plots.say_if_empty(row[0])
        row[0].set_ylabel(f"zeros of dnet, %\n{normalisation}")
    for layer, ax in enumerate(axes[0]):
        ax.set(title=f"layer {layer + 1}", ylim=(0, 102))
    for ax in axes[1]:
        ax.set_xlabel("training, %")
    plots.ours_and_paper_legend(axes[0][0], columns=6)
    words = f"1: nearest the input; N: loss summed over time; {corpus_note(results.profile)}"
    plots.note(figure, words + c.without_records(results))
    return figure


def losses(results: Results) -> Figure:
    """Figure 5: validation loss over the training, a line a seed: some learn under a threshold that keeps others from it."""
    figure, axes = plots.new_figure(1, 2, size=(10, 4.4), sharey=True)
    for ax, (normalisation, title) in zip(axes, NORMALISATIONS.items(), strict=True):
        for t in THRESHOLDS[normalisation]:
            arm = static_name(t, normalisation)
            if results.has(arm):
                found = results.curve(arm, "evaluations", "validation_loss")
                steps = results.curve(arm, "evaluations", "step")[0]
                look = {"color": T_COLOURS[t], "linestyle": "--" if t == 0 else "-", "linewidth": 1.1}
                label = f"t = {short(t)}, {len(found)} {'seed' if len(found) == 1 else 'seeds'}"
                ax.plot(steps, found.T, label=label, zorder=3 if t == 0 else 2, **look)
        plots.say_if_empty(ax)
        ax.axhline(GUESSING[results.profile.corpus], color="black", linestyle=":", linewidth=1, label="guessing by frequency")
        ax.set(xlabel="updates", title=title[0].upper() + title[1:])
        plots.legend_below(ax, columns=3)
    axes[0].set_ylabel("validation loss, nats a symbol")
    words = f"a line a seed; the paper's curves could not be seen; {corpus_note(results.profile)}"
    plots.note(figure, words + c.without_records(results))
    return figure


def causes(results: Results) -> Figure:
    """Left: zeros without a threshold by cause and layer. Right: what the variance of log |dnet| is made of."""
    figure, (left, right) = plots.new_figure(1, 2, size=(10, 4.4))
    records = results.seeds(DENSE)
    bottom = np.zeros(results.profile.layers)
    names = {
        "saturated": "gate's derivative is 0",
        "arriving": "arriving gradient is 0",
        "factor": "other factor is 0",
        "underflow": "product underflows",
    }
    for (cause, label), colour in zip(names.items(), (RED, BLUE, GREEN, ORANGE), strict=True):
        shares = np.mean([_percent_by_layer(record, cause) for record in records], axis=0) if records else bottom
        left.bar(np.arange(len(bottom)) + 1, shares, bottom=bottom, color=colour, width=0.6, label=label)
        bottom = bottom + shares
    printed = paper("figure4", "whole training", "zeros_percent", 0)
    left.axhline(printed.value, color=plots.PAPER, linestyle=":", label=plots.paper_label(printed.known, "paper, all layers"))
    left.set_xticks(np.arange(len(bottom)) + 1)
    left.set_ylim(0, 1.1 * max(*bottom, 1))
    left.set(xlabel="layer (1: nearest the input)", ylabel="zeros of dnet, %", title="Zeros at t = 0, by cause")
    for name, label, colour in (
        ("derivative_share", "gate's derivative", RED),
        ("arriving_share", "arriving gradient", BLUE),
    ):
        bars = np.array([interval(per_seed(results, DENSE, lambda r, s=s, n=name: q.cause(r, n, s))) for s in SNAPSHOTS])
        plots.points(right, 100 * np.array(SNAPSHOTS), *bars.T, label, color=colour, linestyle="-")
    plots.plain_log(right, "x")
    right.set(xlabel="training, % (log scale)", ylabel="share of the variance of log |dnet|", title="What makes entries small")
    for ax in (left, right):
        plots.legend_below(ax)
    plots.note(figure, f"NT; {corpus_note(results.profile)}")
    return figure


def _percent_by_layer(record, cause: str) -> np.ndarray:
    layer, zeros, entries = (c.column(record, "zeros", name) for name in ("layer", cause, "entries"))
    return np.array([100 * zeros[layer == i].sum() / entries[layer == i].sum() for i in range(layer.max() + 1)])


def dynamic(results: Results) -> Figure:
    """Left: zeros by tenth of training under each rule. Right: zeros against what they cost on test data."""
    figure, (left, right) = plots.new_figure(1, 2, size=(10.5, 4.6))
    shown = {
        static_name(1e-7): (GREEN, ":"),
        static_name(1e-6): (GREEN, "-"),
        static_name(1e-6, N): (GREEN, "--"),
        held_name(0.8): (BLUE, "-"),
        held_name(0.8, N): (BLUE, "--"),
        "RMS, NT": (PINK, "-"),
        "RMS, N": (PINK, "--"),
        "rate, NT": (ORANGE, "-"),
        "rate, N": (ORANGE, "--"),
        "80% top-k, NT": (SKY, "-"),
    }
    tenths = 100 * (np.arange(c.TENTHS) + 0.5) / c.TENTHS
    for arm, (colour, style) in shown.items():
        if results.has(arm):
            found = np.array([c.zeros_by_tenth(record) for record in results.seeds(arm)])
            plots.band(left, tenths, *bootstrap_band(found), arm, color=colour, linestyle=style)
    left.set(xlabel="training, %", ylabel="zeros of dnet, %", title="Zeros by tenth of training", ylim=(0, 102))
    families = {"static": (GREEN, "o"), "held": (BLUE, "s"), "rms": (PINK, "D"), "rate": (ORANGE, "^"), "top": (SKY, "v")}
    names = {"static": "static t", "held": "held", "rms": "t over RMS", "rate": "t over norm / rate", "top": "top-k"}
    right.axhspan(-1, 1, color="black", alpha=0.06, linewidth=0, label="1 % either way")
    for arm, trials in results.arms.items():
        base = static_name(0.0, trials[0].normalisation)
        cost, zeros = c.relative_loss(results, arm, base, "test_loss"), per_seed(results, arm, c.training_zeros)
        if arm == base or not np.isfinite(cost).any():
            continue
        colour, marker = families[trials[0].rule]
        face = {} if trials[0].normalisation == NT else {"markerfacecolor": "none", "zorder": 4}  # hollow: shows what is below
        label = f"{names[trials[0].rule]}{'' if trials[0].normalisation == NT else ', N'}"
        plots.points(right, [interval(zeros)[0]], *np.array([interval(cost)]).T, label, color=colour, fmt=marker, **face)
        right.plot(zeros, cost, ".", color=colour, markersize=4, alpha=0.7)
        if trials[0].rule == "static":
            place = (interval(zeros)[0], interval(cost)[0])
            lower = {"xytext": (-5, -9) if face else (-5, 5), "textcoords": "offset points", "ha": "right", "fontsize": 8}
            right.annotate(short(trials[0].value), place, color=colour, **lower)
    right.set_yscale("symlog", linthresh=2)
    right.yaxis.set_major_locator(FixedLocator([-10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100, 200]))
    right.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    right.set(xlabel="zeros over the training, %", title="What zeros cost")
    right.set_ylabel("test loss against t = 0, %\n(linear from -2 to 2, then log scale)")
    for ax in (left, right):
        plots.legend_below(ax, columns=3)
    plots.note(figure, f"95 % interval, a dot a seed; {corpus_note(results.profile)}" + c.without_records(results))
    return figure


def macs(results: Results) -> Figure:
    """The ideal speed-up of our zeros, the simulated one and the measured one, on the paper's curve 1 / (1 - 2 s / 3)."""
    figure, ax = plots.new_figure(size=(6.8, 4.6))
    zeros = np.linspace(0, 100, 101)
    ax.plot(zeros, by_macs(zeros / 100), color="black", linewidth=1, label="1 / (1 - 2 s / 3)")
    trained = [arm for arm in results.arms if not arm.endswith(TIMED)]
    for arm, colour in zip(trained, (GREEN, ORANGE, BLUE), strict=True):
        share = interval(per_seed(results, arm, c.training_zeros))[0]
        kinds = (
            ("ideal", per_seed(results, arm, ideal_speedup), "o", {"markerfacecolor": "none"}),
            ("simulated", per_seed(results, arm, q.simulated_speedup), "s", {}),
        )
        for kind, values, marker, face in kinds:
            plots.points(ax, [share], *np.array([interval(values)]).T, f"{arm}: {kind}", color=colour, fmt=marker, **face)
        if arm + TIMED in results.arms:
            of_step = interval(per_seed(results, arm + TIMED, lambda r: 100 * c.column(r, "zeros", "zeros").mean()))[0]
            measured = np.array([interval(per_seed(results, arm + TIMED, measured_speedup))]).T
            plots.points(ax, [of_step], *measured, f"{arm}: measured", color=colour, fmt="^")
    ax.axhline(1, color="black", linestyle=":", linewidth=1)
    bounds = [paper("macs", "sparsified", "speedup_bound", percent) for percent in (80, 90, 100)]
    plots.paper(ax, [80, 90, 100], [p.value for p in bounds], bounds[0].known)
    ax.set(xlabel="zeros of dnet, %", ylabel="speed-up of the training step", title="From zeros to speed, LSTM layers")
    plots.ours_and_paper_legend(ax, columns=2)
    machine = machine_of(results, [arm for arm in results.arms if arm.endswith(TIMED)])
    after = f"measured after {100 * results.profile.speed.after:g} % of training: {machine}"
    plots.note(figure, f"95 % interval; {corpus_note(results.profile)}; {after}")
    return figure
