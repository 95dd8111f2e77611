"""Exhibit `recipe`: what the paper does not give - learning rate, batch, normalisation of the loss - and what it does to t."""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.report import plots
from repro.studies.base import Arms, Exhibit, Quantity, Results
from repro.studies.comparing import beside, paired
from repro.studies.zhu2017.comparisons import mean_or_nan, of_extreme, paper, per_seed, without_records
from repro.studies.zhu2017.profiles import GUESSING, NT, N, Profile, arm, corpus_note
from repro.studies.zhu2017.variations import (
    BRIEF,
    DENSE,
    HELD,
    RULES,
    bars,
    cost,
    cost_axis,
    dense_loss,
    not_learned,
    spread,
    unlearned,
    zeros,
)

BLUE, RED, GREEN, PINK, ORANGE, SKY = plots.PALETTE

HALF = 0.5  # of training: where one dense step is looked at


class Recipe(NamedTuple):
    """What a threshold may depend on."""

    rate: float
    batch: int
    normalisation: str

    def __str__(self) -> str:
        return f"rate {self.rate:g}, batch {self.batch}, {self.normalisation}"


def recipes(profile: Profile) -> list[Recipe]:
    """All combinations."""
    return [Recipe(*values) for values in product(profile.grid.rates, profile.grid.batches, (NT, N))]


def arms(profile: Profile) -> Arms:
    """Every recipe dense, with the paper's threshold and with a held share; dense ones of the lowest rate are looked at."""
    found = {}
    for recipe in recipes(profile):
        changes = {"learning_rate": recipe.rate, "batch": recipe.batch, "steps": profile.recipe_steps, **BRIEF}
        changes["snapshots"] = (HALF,) if recipe.rate == profile.grid.rates[0] else ()
        for name, rule in RULES.items():
            found[f"{recipe}, {name}"] = arm(profile, *rule, recipe.normalisation, **changes)
    return found


# -------------------------------------------------------------------------------------------------------- quantities


def recipe_zeros_range(results: Results):
    return spread([zeros(results, recipe) for recipe in recipes(results.profile)])


def recipe_zeros_nearest_80(results: Results):
    """NaN while a recipe has no records, or if no dense training learned more than how often each symbol occurs."""
    found = recipes(results.profile)
    learned = [zeros(results, recipe) for recipe in found if not unlearned(results, recipe)]
    if not learned or any(math.isnan(mean_or_nan(dense_loss(results, recipe))) for recipe in found):
        return np.full(results.profile.seeds, math.nan)
    return of_extreme(learned, lambda mean: -abs(mean - 80))


def recipe_largest_relative_loss(results: Results):
    return of_extreme([cost(results, recipe) for recipe in recipes(results.profile)], float)


def threshold_for_80(results: Results, batch: int, normalisation: str) -> np.ndarray:
    """The t that 80 % of |dnet| do not exceed, in one dense step of the training at the lowest rate, by seed."""
    dense = f"{Recipe(results.profile.grid.rates[0], batch, normalisation)}, {DENSE}"
    return per_seed(results, dense, lambda record: record.curves["causes"]["t"][0])


def threshold_for_80_n_over_nt(results: Results):
    largest = results.profile.grid.batches[-1]
    summed, averaged = (threshold_for_80(results, largest, normalisation) for normalisation in (N, NT))
    return paired(np.divide, summed, averaged) / results.profile.length


def threshold_for_80_by_batch(results: Results):
    smallest, largest = results.profile.grid.batches[0], results.profile.grid.batches[-1]
    of_smallest, of_largest = (threshold_for_80(results, batch, NT) for batch in (smallest, largest))
    return paired(np.divide, of_smallest, of_largest) / (largest / smallest)


# --------------------------------------------------------------------------------------------------- table and figure


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """Zeros and losses of every recipe (guessing: by each symbol's share), and the threshold that 80 % of zeros would need."""
    rows, thresholds, guessing = [], [], GUESSING[results.profile.corpus]
    in_print = paper("figure4", "whole training", "zeros_percent", 1e-6)
    for recipe in recipes(results.profile):
        name = str(recipe)
        rows += [
            (name, "t = 1e-6: zeros, %", in_print, zeros(results, recipe)),
            (name, "t = 1e-6: validation loss against t = 0, %", None, cost(results, recipe)),
            (name, "80% held: zeros, %", None, zeros(results, recipe, HELD)),
            (name, "80% held: validation loss against t = 0, %", None, cost(results, recipe, HELD)),
            (name, f"t = 0: validation loss, nats (guessing: {guessing})", None, dense_loss(results, recipe)),
        ]
        if recipe.rate == results.profile.grid.rates[0]:
            at_80 = threshold_for_80(results, recipe.batch, recipe.normalisation)
            thresholds.append((name, "t that 80 % of |dnet| do not exceed, in 1e-6", None, 1e6 * at_80))
    return {"Zeros and losses": beside(rows), "One dense step at half of training": beside(thresholds)}


def figure(results: Results) -> Figure:
    """Zeros and their cost over the rate, by batch and normalisation, and held; the t that 80 % need, over the batch."""
    drawn, (left, middle, right) = plots.new_figure(1, 3, size=(12, 4.6))
    grid = results.profile.grid
    for normalisation, colour, style in ((NT, BLUE, "-"), (N, ORANGE, "--")):
        for batch, face in zip(grid.batches, ("none", colour), strict=True):
            found = [Recipe(rate, batch, normalisation) for rate in grid.rates]
            look = {"label": f"{normalisation}, batch {batch}", "color": colour, "linestyle": style, "markerfacecolor": face}
            plots.points(left, grid.rates, *bars(zeros(results, recipe) for recipe in found), **look)
            plots.points(middle, grid.rates, *bars(cost(results, recipe) for recipe in found), **look)
        at_80 = bars(threshold_for_80(results, batch, normalisation) for batch in grid.batches)
        plots.points(right, grid.batches, *at_80, normalisation, color=colour, linestyle=style)
    for ax, found in ((left, zeros), (middle, cost)):
        held = [
            np.concatenate([found(results, recipe, HELD) for recipe in recipes(results.profile) if recipe.rate == rate])
            for rate in grid.rates
        ]
        plots.points(ax, grid.rates, *bars(held), "80% held, all four", color=GREEN, linestyle=":")
    printed, chosen = paper("figure4", "whole training", "zeros_percent", 1e-6), paper("figure5", "medium", "threshold")
    left.axhline(printed.value, color=plots.PAPER, linestyle=":", label=plots.paper_label(printed.known))
    right.axhline(chosen.value, color=plots.PAPER, linestyle=":", label=plots.paper_label(chosen.known, "paper, chosen t"))
    left.set(ylabel="zeros of dnet, %", title="Zeros at t = 1e-6, and held", ylim=(0, 102))
    middle.set_title("What they cost")
    cost_axis(middle)
    right.set(
        xlabel="sequences of a minibatch (log scale)", ylabel="t (log scale)", title="t that 80 % of |dnet| do not exceed"
    )
    right.set_yscale("log")
    for ax, ticks in ((left, grid.rates), (middle, grid.rates), (right, grid.batches)):
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        plots.legend_below(ax)
    for ax in (left, middle):
        ax.set_xlabel("learning rate of Adam (log scale)")
    words = f"{results.profile.recipe_steps} updates, 95 % interval; {corpus_note(results.profile)}"
    plots.note(drawn, words + not_learned(results, recipes(results.profile)) + without_records(results))
    return drawn


EXHIBITS = (
    Exhibit(
        "recipe",
        "Learning rate, batch and normalisation of the loss (ours)",
        "What the paper does not give, and what it does to a threshold: zeros, losses, and the t that 80 % of zeros need.",
        arms,
        tables,
        figure,
        ("seeds", "hidden", "layers", "length", "recipe_steps"),
    ),
)

QUANTITIES: dict[str, Quantity] = {
    function.__name__: function
    for function in (
        recipe_zeros_range,
        recipe_zeros_nearest_80,
        recipe_largest_relative_loss,
        threshold_for_80_n_over_nt,
        threshold_for_80_by_batch,
    )
}
