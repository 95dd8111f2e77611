"""Exhibit `sensitivity`: is one threshold as good with other layers, cells, lengths and texts (section 4.2)?"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.report import plots
from repro.studies.base import Arms, Exhibit, Quantity, Results
from repro.studies.comparing import beside
from repro.studies.zhu2017.comparisons import of_extreme, paper, without_records
from repro.studies.zhu2017.profiles import CORPORA, GUESSING, Profile, arm, corpus_note
from repro.studies.zhu2017.variations import (
    BRIEF,
    DENSE,
    HELD,
    PAPERS,
    RULES,
    bars,
    cost,
    cost_axis,
    dense_loss,
    not_learned,
    spread,
    zeros,
)

BLUE, RED, GREEN, PINK, ORANGE, SKY = plots.PALETTE


def settings(profile: Profile) -> dict[str, dict[str, dict]]:
    """Axis -> setting -> fields of the trial that are unlike the main model's."""
    grid = profile.grid
    return {
        "layers": {f"{n} layers": {"layers": n} for n in grid.layers},
        "cells": {f"{n} cells": {"hidden": n} for n in grid.cells},
        "length": {f"length {n}": {"length": n} for n in grid.lengths},
        "corpora": {CORPORA[name]: {"corpus": name} for name in grid.corpora},
    }


def arms(profile: Profile) -> Arms:
    """Every setting dense, with the paper's threshold and with 80 % held; the main model is the same trial on all axes."""
    common = {"steps": profile.sensitivity_steps, "snapshots": (), **BRIEF}
    return {
        f"{setting}, {name}": arm(profile, *rule, **common, **changes)
        for axis in settings(profile).values()
        for setting, changes in axis.items()
        for name, rule in RULES.items()
    }


# -------------------------------------------------------------------------------------------------------- quantities


def _all(results: Results) -> list[str]:
    return [setting for axis in settings(results.profile).values() for setting in axis]


def sensitivity_smallest_zeros_1e_6(results: Results):
    return of_extreme([zeros(results, setting) for setting in _all(results)], lambda mean: -mean)


def sensitivity_largest_relative_loss_1e_6(results: Results):
    return of_extreme([cost(results, setting) for setting in _all(results)], float)


def sensitivity_largest_relative_loss_held_80(results: Results):
    return of_extreme([cost(results, setting, HELD) for setting in _all(results)], float)


def _range_over(axis: str) -> Quantity:
    return lambda results: spread([zeros(results, setting) for setting in settings(results.profile)[axis]])


# --------------------------------------------------------------------------------------------------- table and figure


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """Zeros and losses of every setting, axis by axis; guessing: by each symbol's share of the text."""
    zeros_in_print = paper("sensitivity", "all", "zeros_percent_low")
    loss_in_print = paper("sensitivity", "all", "relative_validation_loss_percent_high")
    found = {}
    for axis, of_axis in settings(results.profile).items():
        rows = []
        for setting in of_axis:
            guessing = GUESSING[results.arms[f"{setting}, {DENSE}"][0].corpus]
            rows += [
                (setting, "t = 1e-6: zeros, % (paper: more)", zeros_in_print, zeros(results, setting)),
                (setting, "t = 1e-6: validation loss against t = 0, % (paper: less)", loss_in_print, cost(results, setting)),
                (setting, "80% held: validation loss against t = 0, %", None, cost(results, setting, HELD)),
                (setting, f"t = 0: validation loss, nats (guessing: {guessing})", None, dense_loss(results, setting)),
            ]
        found[f"Over {axis}"] = beside(rows)
    return found


def figure(results: Results) -> Figure:
    """Above the zeros of every setting, below what they cost; a column for each axis."""
    axes_of = settings(results.profile)
    drawn, panels = plots.new_figure(2, len(axes_of), size=(2.8 * len(axes_of), 6.4), sharex="col", sharey="row")
    looks = {DENSE: ("black", "s", "black"), PAPERS: (GREEN, "o", GREEN), HELD: (BLUE, "D", "none")}
    zeros_in_print = paper("sensitivity", "all", "zeros_percent_low")
    loss_in_print = paper("sensitivity", "all", "relative_validation_loss_percent_high")
    words = f"paper: more than {zeros_in_print.value:g} % of zeros, loss less than {loss_in_print.value:g} % higher"
    for (axis, found), (above, below) in zip(axes_of.items(), panels.T, strict=True):
        x = np.arange(len(found))
        for name, (colour, marker, face) in looks.items():
            look = {"color": colour, "fmt": marker, "markerfacecolor": face}
            plots.points(above, x, *bars(zeros(results, setting, name) for setting in found), name, **look)
            if name != DENSE:
                plots.points(below, x, *bars(cost(results, setting, name) for setting in found), name, **look)
        for ax, printed in ((above, zeros_in_print), (below, loss_in_print)):
            ax.axhline(printed.value, color=plots.PAPER, linestyle=":", label=plots.paper_label(printed.known, words))
        above.set(title=f"over {axis}", ylim=(0, 102))
        below.set_xticks(x, [setting.replace(" ", "\n") for setting in found])
        below.set_xlim(-0.5, len(found) - 0.5)
    panels[0, 0].set_ylabel("zeros of dnet, %")
    cost_axis(panels[1, 0])
    plots.ours_and_paper_legend(panels[0, 0], columns=4)
    steps = results.profile.sensitivity_steps
    words = f"NT, {steps} updates, the rest as the main model, 95 % interval; {corpus_note(results.profile)}"
    plots.note(drawn, words + not_learned(results, _all(results)) + without_records(results))
    return drawn


EXHIBITS = (
    Exhibit(
        "sensitivity",
        "Section 4.2: other sizes, lengths and texts",
        "Layers, cells, length of the sequences and text, varied one at a time: zeros at one threshold, and what they cost.",
        arms,
        tables,
        figure,
        ("seeds", "hidden", "layers", "length", "batch", "learning_rate", "sensitivity_steps"),
    ),
)

QUANTITIES: dict[str, Quantity] = {
    function.__name__: function
    for function in (
        sensitivity_smallest_zeros_1e_6,
        sensitivity_largest_relative_loss_1e_6,
        sensitivity_largest_relative_loss_held_80,
    )
} | {f"sensitivity_zeros_range_{axis}": _range_over(axis) for axis in ("layers", "cells", "length", "corpora")}
