"""Exhibit `words`: the word models of Zaremba et al. 2014, whose dense perplexities are published."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from repro.engine import Record
from repro.report import plots
from repro.report.statistics import bootstrap_band
from repro.studies.base import Arms, Exhibit, Quantity, Results
from repro.studies.comparing import beside, interval
from repro.studies.words import WordTrial
from repro.studies.zhu2017 import comparisons as c
from repro.studies.zhu2017.comparisons import paper, per_seed, relative_loss

# (rule, value) of the arms of each set-up.
RULES = {
    "small": {"t = 0": ("static", 0.0), "t = 1e-6": ("static", 1e-6), "80% held": ("held", 0.8)},
    "medium": {"t = 0": ("static", 0.0), "80% held": ("held", 0.8)},
}
COLOURS = {"t = 0": "black", "t = 1e-6": plots.PALETTE[2], "80% held": plots.PALETTE[0]}


def word_arms(profile) -> Arms:
    """Both set-ups, dense and thresholded, one training run a seed."""
    sizes = profile.words
    return {
        f"{setup}, {name}": [
            WordTrial(
                corpus=sizes.corpus,
                corpus_size=sizes.corpus_size or None,
                replicate=replicate,
                recipe=getattr(sizes, setup),
                rule=rule,
                value=value,
                measurements=profile.measurements,
            )
            for replicate in range(profile.seeds)
        ]
        for setup, rules in RULES.items()
        for name, (rule, value) in rules.items()
    }


def words_note(profile) -> str:
    """On which words the numbers were measured."""
    corpora = {"made": "words of the made text", "ptb": "Penn Treebank"}
    return f"{corpora[profile.words.corpus]}, {profile.name} profile"


def published_perplexity(results: Results, setup: str):
    """Zaremba's test perplexity of the dense model, None on any other text than his."""
    return paper("words", f"Zaremba {setup}", "test_perplexity") if results.profile.words.corpus == "ptb" else None


def deviation_percent(results: Results, setup: str) -> np.ndarray:
    """(seeds,) of the dense model's test perplexity from the published one; NaN on any other text than Penn Treebank."""
    ours, published = results.metric(f"{setup}, t = 0", "test_perplexity"), published_perplexity(results, setup)
    return np.full(len(ours), np.nan) if published is None else 100 * (ours - published.value) / published.value


def perplexities(results: Results) -> dict[str, pd.DataFrame]:
    """Test perplexity, what a rule costs, and the zeros it leaves."""
    rows, layers = [], []
    for setup, rules in RULES.items():
        base = f"{setup}, t = 0"
        for name in rules:
            arm = f"{setup}, {name}"
            published = published_perplexity(results, setup) if arm == base else None
            rows.append((arm, "test perplexity", published, results.metric(arm, "test_perplexity")))
            rows.append((arm, "zeros, %", None, per_seed(results, arm, c.training_zeros)))
            if published is not None:
                rows.append((arm, "test perplexity against the published one, %", None, deviation_percent(results, setup)))
            if arm != base:
                rows.append(
                    (arm, "test perplexity against t = 0, %", None, relative_loss(results, arm, base, "test_perplexity"))
                )
                rows.append((arm, "validation loss against t = 0, %", None, relative_loss(results, arm, base)))
            for layer in range(2):
                values = per_seed(results, arm, lambda record, i=layer: c.zeros_by_layer(record)[i])
                layers.append((f"{arm}, layer {layer + 1}", "zeros, %", None, values))
    return {"Word models": beside(rows), "Zeros by layer (1: nearest the input)": beside(layers)}


def learning(results: Results) -> Figure:
    """Validation perplexity by epoch of both set-ups, test perplexity at the end, and zeros over the training."""
    figure, axes = plots.new_figure(1, 3, size=(13, 4.4))
    for setup, ax in zip(RULES, axes[:2], strict=True):
        for name in RULES[setup]:
            arm = f"{setup}, {name}"
            if results.has(arm):
                epochs = results.curve(arm, "evaluations", "epoch")[0]
                found = np.exp(results.curve(arm, "evaluations", "validation_loss"))
                plots.band(ax, epochs, *bootstrap_band(found), name, color=COLOURS[name], **_style(name))
                test = np.array([interval(results.metric(arm, "test_perplexity"))]).T
                plots.points(ax, [epochs[-1]], *test, f"{name}, test", color=COLOURS[name], markerfacecolor="none")
        plots.say_if_empty(ax)
        published = published_perplexity(results, setup)
        if published is not None:
            label = plots.paper_label(published.known, "Zaremba et al., test")
            ax.axhline(published.value, color=plots.PAPER, linestyle=":", label=label)
        plots.plain_log(ax, "y")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(
            xlabel="epoch", ylabel="perplexity (log scale; lines: validation)", title=f"{setup[0].upper()}{setup[1:]} set-up"
        )
    for arm in results.arms:
        if results.has(arm):
            setup, name = arm.split(", ")
            found = [zeros_by_update(record) for record in results.seeds(arm)]
            style = {"color": COLOURS[name], "linestyle": "-" if setup == "small" else "--"}
            plots.band(axes[2], found[0][0], *bootstrap_band(np.array([zeros for _, zeros in found])), arm, **style)
    axes[2].set(xlabel="training, %", ylabel="zeros of dnet, %", ylim=(-2, 102), title="Zeros over the training")
    for ax in axes:
        plots.legend_below(ax)
    words = f"95 % interval; loss summed over time (N); {words_note(results.profile)}"
    plots.note(figure, words + c.without_records(results))
    return figure


def _style(name: str) -> dict:
    """The dense line is dashed and on top: where a rule costs nothing, both are seen."""
    return {"linestyle": "--", "zorder": 3} if name == "t = 0" else {}


def zeros_by_update(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """(percent of training, percent of zeros) of the measured updates, both layers counted together."""
    update = c.column(record, "zeros", "step")
    measured = np.unique(update)
    return 100 * measured / record.metrics["updates"], np.array([c.zeros_where(record, update == u) for u in measured])


QUANTITIES: dict[str, Quantity] = {
    "words_small_baseline_deviation_percent": lambda results: deviation_percent(results, "small"),
    "words_medium_baseline_deviation_percent": lambda results: deviation_percent(results, "medium"),
    "words_small_relative_perplexity_held_80": lambda results: relative_loss(
        results, "small, 80% held", "small, t = 0", "test_perplexity"
    ),
    "words_medium_relative_perplexity_held_80": lambda results: relative_loss(
        results, "medium, 80% held", "medium, t = 0", "test_perplexity"
    ),
    "words_small_zeros_1e_6": lambda results: per_seed(results, "small, t = 1e-6", c.training_zeros),
    "words_small_relative_loss_1e_6": lambda results: relative_loss(results, "small, t = 1e-6", "small, t = 0"),
}

EXHIBITS: tuple[Exhibit, ...] = (
    Exhibit(
        "words",
        "Word models with a published baseline (ours)",
        "The small and medium language models of Zaremba et al. 2014, dense and with thresholded gate gradients.",
        word_arms,
        perplexities,
        learning,
        corpus_note=words_note,
    ),
)
