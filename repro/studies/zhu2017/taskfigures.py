"""The figures of the exhibits `translation` and `captioning`."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repro.report import plots
from repro.report.statistics import bootstrap_band
from repro.studies.base import Results
from repro.studies.comparing import interval
from repro.studies.zhu2017 import comparisons as c
from repro.studies.zhu2017.comparisons import paper, per_seed
from repro.studies.zhu2017.profiles import DENSE, Profile

CORPORA = {"multi30k": "Multi30k, English to German", "made": "made sentence pairs"}
GATE_COLOURS = dict(zip("ifgo", plots.PALETTE, strict=False))


def _style(arm: str) -> dict[str, str]:
    """Colours tell rules apart, broken lines the models with attention."""
    colour = "black" if "t = 0" in arm else plots.PALETTE[0] if "held" in arm else plots.PALETTE[2]
    return {"color": colour, "linestyle": "--" if arm.startswith("attention") else "-"}


def _losses(ax: Axes, results: Results) -> None:
    for arm in results.arms:
        if results.has(arm):
            steps = results.curve(arm, "evaluations", "step")[0]
            found = results.curve(arm, "evaluations", "validation_loss")
            plots.band(ax, steps, *bootstrap_band(found), arm, **_style(arm))
    ax.set(xlabel="updates", ylabel="validation loss, nats a word", title="Loss")


def _zeros(ax: Axes, results: Results) -> None:
    for arm in results.arms:
        if results.has(arm):
            found = np.array([c.zeros_by_tenth(record) for record in results.seeds(arm)])
            tenths = 100 * (np.arange(c.TENTHS) + 0.5) / c.TENTHS
            plots.band(ax, tenths, *bootstrap_band(found), arm, **_style(arm))
    printed = paper("macs", "sparsified", "zeros_percent_low")
    label = plots.paper_label(printed.known, "paper: more than this")
    ax.axhline(printed.value, color=plots.PAPER, linestyle=":", label=label)
    ax.set(xlabel="training, %", ylabel="zeros of dnet, %", title="Zeros by tenth of training", ylim=(-2, 102))


def _bleu(ax: Axes, results: Results) -> None:
    for place, arm in enumerate(results.arms):
        bars = np.array([interval(results.metric(arm, "bleu"))]).T
        open_marker = {"markerfacecolor": "none"} if arm.startswith("attention") else {}
        plots.points(ax, [place], *bars, arm, color=_style(arm)["color"], **open_marker)
    ax.set_xticks(range(len(results.arms)), [arm.replace("attention, ", "attention,\n") for arm in results.arms], rotation=30)
    ax.update_datalim([(0, 0)])  # the axis begins at 0, and the margin above is of all of it
    ax.autoscale_view()
    ax.set(ylabel="BLEU of the test set", title="What is written", xlim=(-0.5, len(results.arms) - 0.5), ylim=(0, None))


def _gates(ax: Axes, results: Results) -> None:
    for gate, colour in GATE_COLOURS.items():
        shares = [100 * c.histogram(record, gate, 1.0) for record in results.seeds(DENSE)]
        if shares:
            edges = np.linspace(-1 if gate == "g" else 0, 1, len(shares[0]) + 1)
            density = np.mean(shares, axis=0) / (100 * np.diff(edges))  # g's bins are wider
            ax.stairs(density, edges, color=colour, linewidth=1.6, label=c.GATES[gate])
    plots.plain_log(ax, "y")
    ax.set(xlabel="activation", ylabel="activations in a range of 0.01, % (log scale)", title="Gates, t = 0, end of training")
    plots.legend_below(ax)


def extreme(results: Results, arm: str, gate: str) -> np.ndarray:
    """(seeds,) percent of a gate's activations at the extremes, at the end of training."""
    return per_seed(results, arm, lambda record: c.extreme_percent(record, gate, 1.0))


def translation(results: Results) -> Figure:
    """Loss and zeros over the training, BLEU at its end."""
    figure, (left, middle, right) = plots.new_figure(1, 3, size=(13, 4.6))
    _losses(left, results)
    _zeros(middle, results)
    _bleu(right, results)
    plots.ours_and_paper_legend(middle, columns=6)
    plots.note(figure, f"NT, 95 % interval; {translation_note(results.profile)}" + c.without_records(results))
    return figure


def captioning(results: Results) -> Figure:
    """Loss and zeros over the training, BLEU and the gates at its end."""
    figure, axes = plots.new_figure(2, 2, size=(10, 8))
    _losses(axes[0][0], results)
    _zeros(axes[0][1], results)
    _bleu(axes[1][0], results)
    _gates(axes[1][1], results)
    plots.ours_and_paper_legend(axes[0][1], columns=4)
    plots.note(figure, f"NT, 95 % interval; {captioning_note(results.profile)}" + c.without_records(results))
    return figure


def translation_note(profile: Profile) -> str:
    """On which sentences the numbers were measured."""
    return f"{CORPORA[profile.translation.corpus]}, {profile.name} profile"


def captioning_note(profile: Profile) -> str:
    """On which images the numbers were measured."""
    return f"made images and captions, {profile.name} profile"
