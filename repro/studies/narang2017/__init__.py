"""Narang, Diamos, Sengupta, Elsen, "Exploring Sparsity in Recurrent Neural Networks", ICLR 2017."""

from __future__ import annotations

from repro.studies.base import Arms, Exhibit, Study
from repro.studies.narang2017 import figures, products, profiles, running, tables
from repro.studies.narang2017.profiles import PROFILES, Profile, corpus_note
from repro.studies.narang2017.quantities import GRU, QUANTITIES, RNN, matrix_shape
from repro.studies.timings import ProductTrial, StepTrial

TRAINING = ("seeds", "epochs", "sparsity", "phi", "freq", "rnn_scale", "gru_scale")


def no_trials(profile: Profile) -> Arms:
    return {}


def table3_arms(profile: Profile) -> Arms:
    return profiles.rnn_arms(profile) | profiles.gru_arms(profile)


def table4_arms(profile: Profile) -> Arms:
    rnn = profiles.rnn_arms(profile)
    return {arm: rnn[arm] for arm in ("RNN dense 1760", "RNN sparse 1760")} | profiles.hard_arms(profile)


def figure1_arms(profile: Profile) -> Arms:
    arms = table3_arms(profile)
    wanted = ("RNN dense 1760", "RNN sparse 2560", "RNN sparse 3072", "GRU dense 2560", "GRU sparse 2560")
    return {arm: arms[arm] for arm in wanted}


def sparse_1760_arm(profile: Profile) -> Arms:
    return {"RNN sparse 1760": profiles.sparse_arm(profile, "rnn", 1760)}


def product_arms(profile: Profile) -> Arms:
    widths = ((RNN, 1760), (RNN, 2560), (RNN, 3072), (GRU, 2560), (GRU, 3568))
    shapes = tuple(matrix_shape(cell, width) for cell, width in widths)
    settings = {"rounds": profile.timing_rounds, "scale": profile.timing_scale}
    grid = {
        "shapes": shapes,
        "large_batch_shapes": shapes if profile.timing_every_batch else (shapes[3],),
        "sparsities": profile.timing_sparsities,
        "batches": profile.timing_batches,
        "backends": profile.timing_backends,
    }
    # One shape only, and our kernels only where all are timed: half the weights are many, and packing them takes long.
    libraries = tuple(name for name in profile.timing_backends if name != products.OURS)
    half = {"shapes": (shapes[3],), "large_batch_shapes": (), "sparsities": (0.0, 0.5), "batches": (1,), "backends": libraries}
    return {
        arm: [ProductTrial(replicate=replicate, **cells, **settings) for replicate in range(profile.timing_repeats)]
        for arm, cells in (("products", grid), ("half sparse", half))
    }


def step_arms(profile: Profile) -> Arms:
    return {
        "step": [
            StepTrial(
                hidden=round(1760 / profile.rnn_scale),
                layers=profile.rnn_layers,
                channels=profile.channels,
                time_strides=profile.time_strides,
                bins=161 if profile.corpus == "an4" else 81,
                batch=profile.batch,
                frames=270 if profile.corpus == "an4" else 120,
                freq=profile.freq,
                replicate=replicate,
            )
            for replicate in range(profile.timing_repeats)
        ]
    }


EXHIBITS = (
    Exhibit(
        "table1",
        "Table 1: hyper-parameters of the threshold",
        "Start, ramp and end of pruning by rule; the slope by Equation 1.",
        sparse_1760_arm,
        tables.schedule_heuristics,
        figures.schedule,
        ("seeds", "epochs", "phi", "freq"),
    ),
    Exhibit(
        "table2",
        "Table 2: Deep Speech 2, bidirectional, 1760 units",
        "Parameters of every layer, counted at full size.",
        no_trials,
        tables.layer_counts("table2"),
        figures.layer_counts("table2"),
        (),
    ),
    Exhibit(
        "table3",
        "Table 3: dense and sparse RNN and GRU models",
        "Error rates, sizes and relative performance of nine models, and of a GRU whose recurrent matrices alone are pruned.",
        table3_arms,
        tables.main_results,
        figures.main_results,
        TRAINING,
    ),
    Exhibit(
        "table4",
        "Table 4: hard pruning at one epoch",
        "All weights below one threshold removed once, against gradual pruning.",
        table4_arms,
        tables.hard_pruning,
        figures.hard_pruning,
        TRAINING,
    ),
    Exhibit(
        "table5",
        "Table 5: GRU model, 2560 units",
        "Parameters of every layer, counted at full size.",
        no_trials,
        tables.layer_counts("table5"),
        figures.layer_counts("table5"),
        (),
    ),
    Exhibit(
        "table6",
        "Table 6: times of dense and sparse recurrent layers",
        "Matrix products on this machine's CPU, by libraries and by our kernels, with the bound that reading the bytes sets.",
        product_arms,
        products.tables,
        products.figure,
        ("timing_repeats", "timing_rounds"),
    ),
    Exhibit(
        "figure1",
        "Figure 1: training and validation loss",
        "Dense and sparse RNN (a) and GRU (b) over training.",
        figure1_arms,
        tables.loss_curves,
        figures.loss_curves,
        TRAINING,
    ),
    Exhibit(
        "figure2",
        "Figure 2: sparsity by layer, pruning schedule",
        "Zeros of the recurrent layers (a) and the schedule of one of them (b).",
        sparse_1760_arm,
        tables.layer_sparsities,
        figures.layer_sparsities,
        TRAINING,
    ),
    Exhibit(
        "memory",
        "Section 5.2: model sizes",
        "The printed megabytes count no positions; here they are counted.",
        sparse_1760_arm,
        tables.memory_sizes,
        figures.memory_sizes,
        TRAINING,
    ),
    Exhibit(
        "onchip",
        "Section 6.2: weights on the chip",
        "Widths that fit into on-chip memory, and the projected speed-up.",
        no_trials,
        tables.onchip_projection,
        figures.onchip_projection,
        (),
    ),
    Exhibit(
        "audit",
        "The paper's own arithmetic",
        "Printed numbers recomputed from other printed numbers.",
        no_trials,
        tables.paper_arithmetic,
        figures.paper_arithmetic,
        (),
    ),
    Exhibit(
        "ablations",
        "Ablations and other methods (ours)",
        "Slope, mask sign, regrowth, thresholds by layer, and pruning methods the reviewers asked for.",
        profiles.ablation_arms,
        tables.ablations,
        figures.ablations,
        TRAINING,
    ),
    Exhibit(
        "overhead",
        "What pruning adds to a training step (ours)",
        "GradualPruner on the model of this profile, step by step against dense training.",
        step_arms,
        tables.pruner_cost,
        figures.pruner_cost,
        ("timing_repeats", "freq"),
    ),
    Exhibit(
        "runtime",
        "A pruned model, run and stored sparse (ours)",
        "Really pruned models on sparse kernels: recurrent layers, real-time factor, files; and sequences against libraries.",
        running.arms,
        running.tables,
        running.figure,
        ("timing_rounds",),
    ),
)

STUDY = Study(
    name="narang2017",
    title="Exploring Sparsity in Recurrent Neural Networks",
    citation="Narang, Diamos, Sengupta, Elsen, ICLR 2017, arXiv 1704.05119",
    profiles=PROFILES,
    exhibits={exhibit.name: exhibit for exhibit in EXHIBITS},
    quantities=QUANTITIES,
    corpus_note=corpus_note,
)
