"""Zhu, Rhu, Clemons, Keckler, Xie, "Training Long Short-Term Memory With Sparsified Stochastic Gradient Descent", 2017."""

from __future__ import annotations

from functools import reduce
from operator import or_

from repro.studies.base import Arms, Exhibit, Study
from repro.studies.zhu2017 import figures, others, places, profiles, recipe, sensitivity, speed, tables, tasks, variants, words
from repro.studies.zhu2017.profiles import PROFILES, TRAINING, Profile, corpus_note
from repro.studies.zhu2017.quantities import QUANTITIES


def no_trials(profile: Profile) -> Arms:
    return {}


def dense_arm(profile: Profile) -> Arms:
    return {profiles.DENSE: profiles.dense_arms(profile)[profiles.DENSE]}


MAIN = (
    Exhibit(
        "figure2",
        "Figure 2: activations of the gates",
        "Histograms of i, f, o and g at 0.5 %, 10 % and 100 % of a dense training.",
        dense_arm,
        tables.activations,
        figures.activations,
        TRAINING,
    ),
    Exhibit(
        "figure3",
        "Figure 3: one step against the threshold",
        "Zeros of the gate gradients, and the cosine of the weights' gradient with the dense one.",
        profiles.dense_arms,
        tables.one_step,
        figures.one_step,
        TRAINING,
    ),
    Exhibit(
        "figure4",
        "Figure 4: zeros over the training",
        "Zeros of the gate gradients of every layer, for each threshold and both normalisations of the loss.",
        profiles.training_arms,
        tables.zeros_over_training,
        figures.zeros_over_training,
        TRAINING,
    ),
    Exhibit(
        "figure5",
        "Figure 5: validation loss over the training",
        "What each threshold costs, under both normalisations of the loss, on test data too.",
        profiles.training_arms,
        tables.losses,
        figures.losses,
        TRAINING,
    ),
    Exhibit(
        "macs",
        "Sections 1 and 5: redundant MACs",
        "From zeros to redundant MACs, to the ideal speed-up, to that of a simulated accelerator fed with the real masks.",
        profiles.mac_arms,
        tables.macs,
        figures.macs,
        TRAINING,
    ),
    Exhibit(
        "causes",
        "Why gate gradients are small (ours)",
        "Zeros without a threshold by cause, and what the size of an entry depends on.",
        dense_arm,
        tables.causes,
        figures.causes,
        TRAINING,
    ),
    Exhibit(
        "dynamic",
        "Rules that follow the gradients (ours)",
        "Sparsity held by feedback and thresholds relative to the gradients, against static ones.",
        profiles.dynamic_arms,
        tables.dynamic,
        figures.dynamic,
        (*TRAINING, "rms", "rate"),
    ),
)
AUDIT = (
    Exhibit(
        "audit",
        "The paper's own arithmetic",
        "Printed numbers and equations against each other.",
        no_trials,
        tables.paper_arithmetic,
        figures.paper_arithmetic,
        (),
    ),
)
FAMILIES = (places, sensitivity, recipe, tasks, words, others, variants, speed)
EXHIBITS = (*MAIN, *(exhibit for family in FAMILIES for exhibit in family.EXHIBITS), *AUDIT)

STUDY = Study(
    name="zhu2017",
    title="Training Long Short-Term Memory With Sparsified Stochastic Gradient Descent",
    citation="Zhu, Rhu, Clemons, Keckler, Xie, submitted to ICLR 2017, OpenReview HJWzXsKxx",
    profiles=PROFILES,
    exhibits={exhibit.name: exhibit for exhibit in EXHIBITS},
    quantities=reduce(or_, (family.QUANTITIES for family in FAMILIES), QUANTITIES),
    corpus_note=corpus_note,
)
