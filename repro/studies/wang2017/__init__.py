"""Wang, Wu, Bosilca, Vuduc, Xu, "Efficient Communications in Training Large Scale Neural Networks", 2016, arXiv 1611.04255."""

from __future__ import annotations

from repro.studies.base import Arms, Exhibit, Quantity, Study
from repro.studies.wang2017 import figures, profiles, tables
from repro.studies.wang2017.arithmetic import EXACT
from repro.studies.wang2017.arithmetic import STUDY as NAME
from repro.studies.wang2017.measured import MEASURED
from repro.studies.wang2017.profiles import PROFILES, Profile, corpus_note

TIMING = ("seeds", "rounds", "megabytes_per_second")
TRAINING = ("seeds", "iterations", "megabytes_per_second")


def no_trials(profile: Profile) -> Arms:
    return {}


def _exact(value) -> Quantity:
    return lambda results: value()


EXHIBITS = (
    Exhibit(
        "table1",
        "Table 1: costs of the collectives, and their limits",
        "Linear pipeline, spanning tree and bidirectional exchange by the printed formulas and by our schedules.",
        no_trials,
        tables.costs,
        figures.costs,
        (),
    ),
    Exhibit(
        "table2",
        "Table 2: communication and computation of an iteration",
        "Measured on emulated hosts, for every system.",
        profiles.training_arms,
        tables.iteration_profile,
        figures.iteration_profile,
        TRAINING,
    ),
    Exhibit(
        "figure1",
        "Figure 1: time lines of synchronous SGD",
        "One iteration of each variant as it ran.",
        profiles.training_arms,
        tables.time_lines,
        figures.time_lines,
        TRAINING,
    ),
    Exhibit(
        "figure2",
        "Figure 2: data flow of the linear pipeline",
        "Which block is on which link in which time step; the paper's allreduce takes 9 steps.",
        no_trials,
        tables.data_flow,
        figures.data_flow,
        (),
    ),
    Exhibit(
        "figure3",
        "Figure 3: time against message size",
        "Three collectives by every algorithm over one transport, on emulated hosts and on loopback.",
        profiles.size_arms,
        tables.sizes,
        figures.sizes,
        TIMING,
    ),
    Exhibit(
        "figure4",
        "Figure 4: time against the number of ranks",
        "One message on 2 to 6 emulated hosts, and on loopback, where ranks share cores.",
        profiles.rank_arms,
        tables.ranks,
        figures.ranks,
        TIMING,
    ),
    Exhibit(
        "figure5",
        "Figure 5: loss against time",
        "A pruned character RNN and a small CNN trained by six systems.",
        profiles.training_arms,
        tables.convergence,
        figures.convergence,
        TRAINING,
    ),
    Exhibit(
        "audit",
        "The paper's own arithmetic",
        "Printed numbers recomputed from other printed numbers.",
        no_trials,
        tables.audit,
        figures.audit,
        (),
    ),
    Exhibit(
        "model",
        "The cost model, fitted and tested (ours)",
        "Alpha, beta and gamma with intervals, times it has not seen, and the best block.",
        profiles.model_arms,
        tables.cost_model,
        figures.cost_model,
        TIMING,
    ),
    Exhibit(
        "overlap",
        "Schedules that overlap (ours)",
        "The paper's overlap, a schedule driven by dependencies, and DistributedDataParallel's buckets.",
        profiles.training_arms,
        tables.overlaps,
        figures.overlaps,
        TRAINING,
    ),
    Exhibit(
        "drift",
        "Why replicas drift apart (ours)",
        "The order of summation, not the multiplication.",
        profiles.drift_arms,
        tables.drifts,
        figures.drifts,
        ("seeds", "drift_iterations"),
    ),
    Exhibit(
        "sparse",
        "Sparse gradients on the wire (ours)",
        "Whether thresholded gate gradients leave zeros to save, and what a pruned model saves.",
        profiles.sparse_arms,
        tables.sparse,
        figures.sparse,
        ("seeds", "rounds", "target", "gate_steps", "megabytes_per_second"),
    ),
    Exhibit(
        "scaling",
        "Beyond this machine (ours)",
        "Simulated: a bridge between sockets, hundreds of hosts, switches with one link up.",
        no_trials,
        tables.scaling,
        figures.scaling,
        (),
    ),
)

STUDY = Study(
    name=NAME,
    title="Efficient Communications in Training Large Scale Neural Networks",
    citation="Wang, Wu, Bosilca, Vuduc, Xu, 2016, arXiv 1611.04255",
    profiles=PROFILES,
    exhibits={exhibit.name: exhibit for exhibit in EXHIBITS},
    quantities={name: _exact(value) for name, value in EXACT.items()} | MEASURED,
    corpus_note=corpus_note,
)
