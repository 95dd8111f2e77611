"""Exhibits `translation` and `captioning`: the other tasks of section 4.2, for which the paper gives no numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd

from repro.studies.base import Arms, Exhibit, Quantity, Results
from repro.studies.captioning import CaptionTrial
from repro.studies.comparing import beside, paired
from repro.studies.sentences import SentenceSizes, SentenceTrial
from repro.studies.translating import TranslationTrial
from repro.studies.zhu2017 import comparisons as c
from repro.studies.zhu2017 import taskfigures as figures
from repro.studies.zhu2017.comparisons import paper, per_seed, relative_loss
from repro.studies.zhu2017.profiles import DENSE, Profile, held_name, static_name
from repro.studies.zhu2017.quantities import extreme_percent_sigmoid

STATIC, HELD = static_name(1e-6), held_name(0.8)
ATTENTION = "attention, "
ATTENTION_DENSE, ATTENTION_HELD = ATTENTION + DENSE, ATTENTION + HELD
RULES = {DENSE: ("static", 0.0), STATIC: ("static", 1e-6), HELD: ("held", 0.8)}

Tables = dict[str, pd.DataFrame]


# ------------------------------------------------------------------------------------------------------------------ arms


def _arm(kind: type[SentenceTrial], profile: Profile, sizes: SentenceSizes, name: str, **more) -> list[SentenceTrial]:
    """One training run a seed under the rule of this name."""
    rule, value = RULES[name]
    return [
        kind(
            corpus=sizes.corpus,
            corpus_size=sizes.corpus_size or None,
            replicate=replicate,
            embedding=sizes.embedding,
            layers=sizes.layers,
            dropout=sizes.dropout,
            batch=sizes.batch,
            learning_rate=sizes.learning_rate,
            rule=rule,
            value=value,
            evaluations=sizes.evaluations,
            measurements=sizes.measurements,
            **more,
        )
        for replicate in range(profile.seeds)
    ]


def _translator(profile: Profile, name: str, attention: bool) -> list[SentenceTrial]:
    sizes = {"hidden": profile.translation_hidden, "steps": profile.translation_steps}
    return _arm(TranslationTrial, profile, profile.translation, name, attention=attention, **sizes)


def attention_arms(profile: Profile) -> Arms:
    """The translator with attention, dense and with a held share of zeros."""
    return {ATTENTION + name: _translator(profile, name, True) for name in (DENSE, HELD)}


def translation_arms(profile: Profile) -> Arms:
    """The translator without attention, then with it."""
    return {name: _translator(profile, name, False) for name in RULES} | attention_arms(profile)


def captioning_arms(profile: Profile) -> Arms:
    sizes = {"hidden": profile.captioning_hidden, "steps": profile.captioning_steps}
    return {name: _arm(CaptionTrial, profile, profile.captioning, name, **sizes) for name in RULES}


def base(arm: str) -> str:
    """The dense arm of the same model."""
    return ATTENTION_DENSE if arm.startswith(ATTENTION) else DENSE


# ---------------------------------------------------------------------------------------------------------------- tables


def _costs(results: Results) -> pd.DataFrame:
    """Zeros, losses and BLEU of every arm, and what they lose against the dense arm of their model."""
    rows = []
    for arm in results.arms:
        printed = paper("macs", "sparsified", "zeros_percent_low") if arm == STATIC else None
        rows.append((arm, "zeros, %", printed, per_seed(results, arm, c.training_zeros)))
        rows.append((arm, "validation loss, nats a word", None, results.metric(arm, "validation_loss")))
        rows.append((arm, "test loss, nats a word", None, results.metric(arm, "test_loss")))
        rows.append((arm, "BLEU of the test set", None, results.metric(arm, "bleu")))
        if arm != base(arm):
            rows.append((arm, "validation loss against t = 0, %", None, relative_loss(results, arm, base(arm))))
            rows.append((arm, "test loss against t = 0, %", None, relative_loss(results, arm, base(arm), "test_loss")))
            rows.append((arm, "BLEU against t = 0, points", None, _bleu_difference(results, arm)))
    return beside(rows)


def _by_layer(results: Results, names: list[str]) -> pd.DataFrame:
    """`names`: of the layers, in the order in which they are counted."""
    rows = []
    for arm in results.arms:
        for layer, name in enumerate(names):
            values = per_seed(results, arm, lambda record, i=layer: c.zeros_by_layer(record)[i])
            rows.append((f"{arm}, {name}", "zeros, %", None, values))
    return beside(rows)


def _examples(results: Results, given: str | None) -> pd.DataFrame:
    """Sentences of the test set, as the first seed of every arm writes them; `given`: the title of what the model was given."""
    columns = {}
    for arm in results.arms:
        record = results.record(arm, 0)
        if record is not None and not record.diverged:
            shown = record.curves["examples"]
            columns |= ({given: shown["given"]} if given else {}) | {"reference": shown["reference"], arm: shown["written"]}
    return pd.DataFrame(columns)


def translation_tables(results: Results) -> Tables:
    layers = range(1, results.profile.translation.layers + 1)
    names = [f"{side} layer {i}" for side in ("encoder", "decoder") for i in layers]
    return {
        "Zeros, losses and BLEU": _costs(results),
        "Zeros by layer (1: nearest the words)": _by_layer(results, names),
        "Translations of the test set, first seed": _examples(results, "source"),
    }


def captioning_tables(results: Results) -> Tables:
    gates = [(name, "extreme activations, %", None, figures.extreme(results, DENSE, gate)) for gate, name in c.GATES.items()]
    return {
        "Zeros, losses and BLEU": _costs(results),
        "Gates at the end of dense training (below 0.1 or above 0.9; g: below -0.9 or above 0.9)": beside(gates),
        "Captions of the test set, first seed": _examples(results, None),
    }


# ------------------------------------------------------------------------------------------------------------ quantities


def _bleu_difference(results: Results, arm: str):
    return paired(np.subtract, results.metric(arm, "bleu"), results.metric(base(arm), "bleu"))


def _zeros(arm: str) -> Quantity:
    return lambda results: per_seed(results, arm, c.training_zeros)


def _relative(arm: str, metric: str) -> Quantity:
    return lambda results: relative_loss(results, arm, base(arm), metric)


QUANTITIES: dict[str, Quantity] = {
    f"{task}_{name}": quantity
    for task in ("translation", "captioning")
    for name, quantity in (
        ("zeros_1e_6", _zeros(STATIC)),
        ("relative_loss_1e_6", _relative(STATIC, "validation_loss")),
        ("relative_test_loss_held_80", _relative(HELD, "test_loss")),
    )
} | {
    "captioning_extreme_percent_sigmoid": extreme_percent_sigmoid,
    "translation_bleu_difference_held_80": lambda results: _bleu_difference(results, HELD),
}

# -------------------------------------------------------------------------------------------------------------- exhibits

EXHIBITS = (
    Exhibit(
        "translation",
        "Section 4.2: translation",
        "A translator with and without attention, thresholded in encoder and decoder: zeros, losses, BLEU.",
        translation_arms,
        translation_tables,
        figures.translation,
        ("seeds", "translation_hidden", "translation_steps"),
        figures.translation_note,
    ),
    Exhibit(
        "captioning",
        "Section 4.2: image captioning",
        "An LSTM that is shown an image once and writes its caption: zeros, losses, BLEU, activations of its gates.",
        captioning_arms,
        captioning_tables,
        figures.captioning,
        ("seeds", "captioning_hidden", "captioning_steps"),
        figures.captioning_note,
    ),
)
