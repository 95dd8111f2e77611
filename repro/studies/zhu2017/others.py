"""Exhibit `others`: models that the paper does not try, each dense and with a held share of zeros."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, StrMethodFormatter

from repro.engine import Record
from repro.report import plots
from repro.report.statistics import bootstrap_band
from repro.studies.base import Arms, Exhibit, Quantity, Results
from repro.studies.comparing import beside, interval
from repro.studies.texts import MultitaskTrial, TextTrial, TransformerTrial
from repro.studies.zhu2017 import comparisons as c
from repro.studies.zhu2017.comparisons import of_extreme, per_seed, relative_loss
from repro.studies.zhu2017.profiles import CORPORA, DENSE, Profile, arm, held_name
from repro.studies.zhu2017.taskfigures import translation_note
from repro.studies.zhu2017.tasks import attention_arms

HELD = held_name(0.8)
INNER = f"inner layers {HELD}"  # of the Transformer: those that do not add to the stream its blocks share
RULES = {DENSE: ("static", 0.0), HELD: ("held", 0.8)}

# The name of each model's arms begins with its key; tasks by their names in the metrics.
MODELS = {"GRU": "GRU", "Transformer": "Transformer", "attention": "translator with attention", "multi-task": "multi-task LSTM"}
TASKS = {"character": "next character", "kind": "kind of it", "ahead": "letters left of the word"}
PARTS = {
    "Transformer": (("rule in inner layers alone", "test_loss", INNER),),
    "multi-task": tuple((name, f"test_loss_{task}", HELD) for task, name in TASKS.items()),
}
COLOURS = dict(zip(MODELS, plots.PALETTE, strict=False))


def _text_arm(kind: type[TextTrial], profile: Profile, name: str, steps: int, learning_rate: float, **more) -> list[TextTrial]:
    """One training run a seed on the text of the character model, under the rule of this name."""
    rule, value = RULES[name]
    return [
        kind(
            corpus=profile.corpus,
            corpus_size=profile.corpus_size or None,
            replicate=replicate,
            hidden=profile.hidden,
            layers=profile.layers,
            length=profile.length,
            batch=profile.batch,
            steps=steps,
            learning_rate=learning_rate,
            rule=rule,
            value=value,
            evaluations=profile.evaluations,
            measurements=profile.measurements,
            **more,
        )
        for replicate in range(profile.seeds)
    ]


def other_arms(profile: Profile) -> Arms:
    """Every model, dense and with a held share of zeros."""
    transformer = (profile.transformer_steps, profile.transformer_rate)
    multitask = (profile.multitask_steps, profile.learning_rate)
    return (
        {f"GRU, {name}": arm(profile, *rule, cell="gru", steps=profile.gru_steps, snapshots=()) for name, rule in RULES.items()}
        | {f"Transformer, {name}": _text_arm(TransformerTrial, profile, name, *transformer) for name in RULES}
        | {f"Transformer, {INNER}": _text_arm(TransformerTrial, profile, HELD, *transformer, inner=True)}
        | attention_arms(profile)
        | {f"multi-task, {name}": _text_arm(MultitaskTrial, profile, name, *multitask) for name in RULES}
    )


def zeros_percent(record: Record) -> float:
    """Zeros over the training, all layers together."""
    zeros = record.curves["zeros"]
    return 100 * sum(zeros["zeros"]) / sum(zeros["entries"]) if "zeros" in zeros else c.training_zeros(record)


def cost(results: Results, model: str, metric: str = "test_loss", rule: str = HELD) -> np.ndarray:
    """(seeds,) percent by which the arm with zeros is worse than its dense one."""
    return relative_loss(results, f"{model}, {rule}", f"{model}, {DENSE}", metric)


def costs(results: Results) -> dict[str, pd.DataFrame]:
    """Losses of every model, dense and with zeros; those of the multi-task model by task."""
    rows = []
    for model, name in MODELS.items():
        for rule in RULES:
            found = f"{model}, {rule}"
            rows.append((f"{name}, {rule}", "zeros, %", None, per_seed(results, found, zeros_percent)))
            rows.append((f"{name}, {rule}", "test loss, nats", None, results.metric(found, "test_loss")))
        rows.append((f"{name}, {HELD}", "validation loss against t = 0, %", None, cost(results, model, "validation_loss")))
        rows.append((f"{name}, {HELD}", "test loss against t = 0, %", None, cost(results, model)))
    tasks = []
    for task, name in TASKS.items():
        metric = f"test_loss_{task}"
        for rule in RULES:
            tasks.append((f"{name}, {rule}", "test loss, nats a symbol", None, results.metric(f"multi-task, {rule}", metric)))
        tasks.append((f"{name}, {HELD}", "test loss against t = 0, %", None, cost(results, "multi-task", metric)))
    stream = []
    for rule in (*RULES, INNER):
        found = f"Transformer, {rule}"
        stream.append((found, "norm where the blocks end", None, results.metric(found, "stream_norm")))
        if rule != DENSE:
            stream.append((found, "zeros, %", None, per_seed(results, found, zeros_percent)))
            stream.append((found, "test loss against t = 0, %", None, cost(results, "Transformer", rule=rule)))
    return {
        "Other models": beside(rows),
        "The multi-task LSTM by task": beside(tasks),
        "The Transformer by the layers that the rule acts on": beside(stream),
    }


def learning(results: Results) -> Figure:
    """Left: validation loss with zeros against that without, over the training. Right: the same of the test loss at its end."""
    figure, (left, right) = plots.new_figure(1, 2, size=(11, 4.8))
    labels = []
    for model, name in MODELS.items():
        if not results.has(f"{model}, {DENSE}", f"{model}, {HELD}"):
            continue
        steps, relative = relative_curves(results, model)
        if len(relative):
            plots.band(left, 100 * steps / steps[-1], *bootstrap_band(relative), name, color=COLOURS[model])
        for label, metric, rule in (name, "test_loss", HELD), *PARTS.get(model, ()):
            mean, low, high = interval(cost(results, model, metric, rule))
            face = {} if label == name else {"markerfacecolor": "none"}
            reach = np.maximum(np.nan_to_num([[mean - low], [high - mean]]), 0)
            right.errorbar([mean], [len(labels)], xerr=reach, fmt="o", capsize=3, color=COLOURS[model], **face)
            labels.append(label)
    left.axhspan(-1, 1, color="black", alpha=0.06, linewidth=0, label="1 % either way")
    right.axvspan(-1, 1, color="black", alpha=0.06, linewidth=0)
    scale = "\n(linear from -2 to 2, then log scale)"
    left.set(xlabel="training, %", ylabel=f"validation loss, 80% held against t = 0, %{scale}", title="While they learn")
    left.set_yscale("symlog", linthresh=2)
    right.set_xscale("symlog", linthresh=2)
    for axis in (left.yaxis, right.xaxis):
        axis.set_major_locator(FixedLocator([-50, -20, -5, -1, 0, 1, 5, 20, 50]))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    right.set_yticks(range(len(labels)), labels)
    right.invert_yaxis()
    right.set(xlabel=f"test loss, 80% held against t = 0, %{scale}", title="At the end")
    plots.legend_below(left, columns=3)
    plots.note(figure, f"95 % interval; NT; {others_note(results.profile)}")
    return figure


def others_note(profile: Profile) -> str:
    return f"{CORPORA[profile.corpus]}, the translator: {translation_note(profile)}"


def relative_curves(results: Results, model: str) -> tuple[np.ndarray, np.ndarray]:
    """(updates (evaluations,), percent (seeds, evaluations)) by which the validation loss is worse, of seeds both arms have."""
    steps, relative = np.zeros(0), []
    for replicate in range(len(results.arms[f"{model}, {DENSE}"])):
        pair = [results.record(f"{model}, {rule}", replicate) for rule in RULES]
        if all(record is not None and not record.diverged for record in pair):
            dense, held = (c.column(record, "evaluations", "validation_loss") for record in pair)
            steps = c.column(pair[0], "evaluations", "step")
            relative.append(100 * (held - dense) / dense)
    return steps, np.array(relative)


def others_held_zeros_deviation(results: Results) -> np.ndarray:
    return of_extreme([abs(per_seed(results, f"{model}, {HELD}", zeros_percent) - 80) for model in MODELS], float)


QUANTITIES: dict[str, Quantity] = {
    "others_held_zeros_deviation": others_held_zeros_deviation,
    "gru_relative_test_loss_held_80": lambda results: cost(results, "GRU"),
    "transformer_relative_test_loss_held_80": lambda results: cost(results, "Transformer"),
    "attention_relative_test_loss_held_80": lambda results: cost(results, "attention"),
    "multitask_relative_test_loss_held_80": lambda results: cost(results, "multi-task"),
}

EXHIBITS: tuple[Exhibit, ...] = (
    Exhibit(
        "others",
        "Other models (ours)",
        "A GRU, a Transformer, a translator with attention and a model of several tasks, dense and with a held share of zeros.",
        other_arms,
        costs,
        learning,
        (
            "seeds",
            "hidden",
            "layers",
            "length",
            "batch",
            "learning_rate",
            "gru_steps",
            "transformer_steps",
            "transformer_rate",
            "multitask_steps",
        ),
        others_note,
    ),
)
