"""Exhibit `places`: zeros of one step by layer, gate and place in the sequence."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.engine import Record
from repro.report import plots
from repro.studies.base import Arms, Exhibit, Quantity, Results
from repro.studies.comparing import beside, interval, paired
from repro.studies.gates import PRINTED, QUANTILE
from repro.studies.places import NO_RULE, PLACES, SHARE, STATIC, PlacesTrial
from repro.studies.zhu2017 import comparisons as c
from repro.studies.zhu2017.comparisons import of_extreme, per_seed
from repro.studies.zhu2017.profiles import DENSE, TRAINING, Profile, arm, corpus_note, short

BLUE, RED, GREEN, PINK, ORANGE, SKY = plots.PALETTE

AFTER = 0.15  # of training: from a tenth on gates hardly change, says section 2.2, and there a pass begins, with states of zero
RULES = {NO_RULE: "t = 0", SHARE: f"t for {QUANTILE:.0%}", STATIC: f"t = {short(PRINTED)}"}


def arms(profile: Profile) -> Arms:
    """Steps of the dense training."""
    return {
        DENSE: [PlacesTrial(training=trial, after=AFTER, t=PRINTED, share=QUANTILE) for trial in arm(profile, "static", 0.0)]
    }


def zeros(record: Record, rule: str, **where) -> float:
    """Percent of zeros of one step under a rule, where columns of curve "places" have these values; NaN where none has."""
    chosen = c.column(record, "places", "rule") == rule
    for name, value in where.items():
        chosen &= c.column(record, "places", name) == value
    entries = c.column(record, "places", "entries")[chosen].sum()
    return 100 * c.column(record, "places", "zeros")[chosen].sum() / entries if entries else math.nan


def by_seed(results: Results, rule: str, **where) -> np.ndarray:
    return per_seed(results, DENSE, lambda record: zeros(record, rule, **where))


# -------------------------------------------------------------------------------------------------------- quantities


def _farthest(results: Results, settings: list[dict]) -> np.ndarray:
    """|zeros there - zeros of all|, in points, by seed, of the setting with the largest mean."""
    whole = by_seed(results, SHARE)
    found = [abs(paired(np.subtract, by_seed(results, SHARE, **where), whole)) for where in settings]
    return of_extreme(found, order=float)


def gate_zeros_deviation_80(results: Results):
    return _farthest(results, [{"gate": gate} for gate in c.GATES])


def place_zeros_deviation_80(results: Results):
    return _farthest(results, [{"place": place} for place in range(PLACES)])


# ------------------------------------------------------------------------------------------------- table and figure


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """By gate, by layer, by place; and the t that makes the wanted share."""
    layers = {f"layer {layer + 1}": {"layer": layer} for layer in range(results.profile.layers)}
    gates = {name: {"gate": gate} for gate, name in c.GATES.items()}
    places = {f"{place + 1}. tenth of the sequence": {"place": place} for place in range(PLACES)}
    rows = [
        (f"{words}, {what}", "zeros, %", None, by_seed(results, rule, **where))
        for rule, words in RULES.items()
        for what, where in ({"all": {}} | gates | layers | places).items()
    ]
    of_share = [(RULES[SHARE], "t", None, results.metric(DENSE, "t_of_share"))]
    return {
        f"Zeros of one step, {100 * AFTER:g} % of training (layer 1: nearest the input)": beside(rows),
        "The threshold below which the wanted share of the dense dnet lies": beside(of_share),
    }


def figure(results: Results) -> Figure:
    """A column for each threshold. Above: zeros by layer and gate. Below: by layer and place in the sequence."""
    layers = results.profile.layers
    figure, axes = plots.new_figure(2, len(RULES), size=(10.5, 7), sharey=True)
    for (rule, words), upper, lower in zip(RULES.items(), *axes, strict=True):
        for i, ((gate, name), colour) in enumerate(zip(c.GATES.items(), (BLUE, RED, GREEN, ORANGE), strict=True)):
            found = np.array([interval(by_seed(results, rule, gate=gate, layer=layer)) for layer in range(layers)])
            plots.points(upper, np.arange(layers) + 1 + 0.14 * (i - 1.5), *found.T, name, color=colour, fmt="os^D"[i])
        upper.set(title=words, xlabel="layer (1: nearest the input)", xlim=(0.5, layers + 0.5), ylim=(-3, 103))
        upper.set_xticks(np.arange(layers) + 1)
        for layer in range(layers):
            found = np.array([interval(by_seed(results, rule, place=place, layer=layer)) for place in range(PLACES)])
            colour = plots.PALETTE[layer % len(plots.PALETTE)]
            plots.band(lower, np.arange(PLACES) + 1, *found.T, f"layer {layer + 1}", color=colour, marker=".")
        lower.set(xlabel="tenth of the sequence", xlim=(0.5, PLACES + 0.5))
    for row in axes:
        row[0].set_ylabel("zeros of dnet, %")
        plots.legend_below(row[1])
    words = f"one step after {100 * AFTER:g} % of a dense training, NT, 95 % interval; {corpus_note(results.profile)}"
    plots.note(figure, words)
    return figure


EXHIBITS = (
    Exhibit(
        "places",
        "Where the zeros are (ours)",
        "Zeros of one step by layer, gate and place in the sequence: does one threshold serve all?",
        arms,
        tables,
        figure,
        TRAINING,
    ),
)

QUANTITIES: dict[str, Quantity] = {
    function.__name__: function for function in (gate_zeros_deviation_80, place_zeros_deviation_80)
}
