"""How large the trials of narang2017 are, profile by profile, and the arms that exhibits compare."""

from __future__ import annotations

from dataclasses import dataclass, replace

from repro.engine import Trial
from repro.studies.base import Arms, check_ranges
from repro.studies.running import PrunedModel, RunningSizes
from repro.studies.speech import ROLES, Pruning, SpeechTrial


@dataclass(frozen=True)
class Profile:
    """Every number of a profile. Widths are the paper's over `rnn_scale` and `gru_scale`, so that their ratios stay.

    `timing_every_batch`: batches above the first are timed for all shapes, not only for one; `timing_backends`: empty for all.
    """

    name: str
    corpus: str
    corpus_size: str
    seeds: int
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    dropout: float
    augment: bool
    speeds: tuple[float, ...]
    rnn_scale: float
    gru_scale: float
    rnn_layers: int
    gru_layers: int
    channels: int
    time_strides: tuple[int, int]
    freq: int
    sparsity: float
    phi: float
    hard_epochs: tuple[float, ...]
    timing_repeats: int
    timing_rounds: int
    timing_scale: int
    timing_batches: tuple[int, ...]
    timing_sparsities: tuple[float, ...]
    timing_every_batch: bool
    timing_backends: tuple[str, ...]
    running: RunningSizes

    def __post_init__(self):
        check_ranges(self, RANGES)


# The sparsity is also the percentile at which q is read off a dense model, which records it from the 50th to the 99th.
RANGES = (
    ("seeds", 1, 100),
    ("epochs", 4, 1000),
    ("sparsity", 0.5, 0.99),
    ("phi", 1.0, 4.0),
    ("freq", 1, 100_000),
    ("rnn_scale", 1, 128),
    ("gru_scale", 1, 128),
    ("timing_repeats", 1, 100),
    ("timing_rounds", 1, 1000),
)

# Of every kind the fastest, and what readers would pick: conversions for the others take longer than the timing.
_QUICK = (
    "torch dense",
    "oneDNN packed",
    "int8 dynamic",
    "OpenBLAS dense",
    "repro dense",
    "torch CSR",
    "MKL CSR",
    "repro sparse",
)

LAPTOP = Profile(
    name="laptop",
    corpus="made",
    corpus_size="laptop",
    seeds=3,
    epochs=8,
    batch=16,
    learning_rate=5e-3,
    weight_decay=0.01,
    dropout=0.0,
    augment=False,
    speeds=(1.0,),
    rnn_scale=16,
    gru_scale=32,
    rnn_layers=3,
    gru_layers=3,
    channels=4,
    time_strides=(4, 1),
    freq=5,
    sparsity=0.9,
    phi=1.5,
    hard_epochs=(5 / 20, 10 / 20, 12 / 20, 15 / 20),
    timing_repeats=3,
    timing_rounds=3,
    timing_scale=1,
    timing_batches=(1, 32),
    timing_sparsities=(0.0, 0.9, 0.95),
    timing_every_batch=False,
    timing_backends=_QUICK,
    running=RunningSizes("laptop", (PrunedModel("rnn", 352, 1, 4, 2e-3),), 20, ("gru",), (1760,), (0.9,), 50, 1),
)

PROFILES = {
    "smoke": replace(
        LAPTOP,
        name="smoke",
        corpus_size="smoke",
        seeds=1,
        epochs=4,
        batch=4,
        rnn_scale=88,
        gru_scale=128,
        rnn_layers=2,
        gru_layers=1,
        channels=2,
        freq=1,
        timing_repeats=1,
        timing_rounds=2,
        timing_scale=8,
        timing_batches=(1, 8),
        timing_sparsities=(0.0, 0.95),
        timing_backends=("torch dense", "torch CSR", "repro sparse"),
        running=RunningSizes("smoke", (PrunedModel("rnn", 24, 1, 4, 1e-2),), 3, ("rnn", "gru", "lstm"), (32,), (0.9,), 10, 1),
    ),
    "laptop": LAPTOP,
    "paper": replace(
        LAPTOP,
        name="paper",
        corpus="an4",
        corpus_size="",
        seeds=5,
        epochs=24,
        learning_rate=3e-3,
        dropout=0.1,
        augment=True,
        speeds=(0.9, 1.0, 1.1),
        rnn_scale=11,
        gru_scale=32,
        channels=8,
        time_strides=(2, 2),
        freq=10,
        hard_epochs=(5 / 20, 7 / 20, 10 / 20, 12 / 20, 15 / 20),
        timing_repeats=3,
        timing_rounds=5,
        timing_batches=(1, 4, 16, 32, 64),
        timing_sparsities=(0.0, 0.8, 0.9, 0.95, 0.98),
        timing_every_batch=True,
        timing_backends=(),
        running=RunningSizes(
            "laptop",
            (PrunedModel("rnn", 1760, 1, 6, 5e-4), PrunedModel("gru", 1280, 1, 4, 1e-3)),
            20,
            ("rnn", "gru", "lstm"),
            (1760, 2560),
            (0.9, 0.95),
            50,
            1,
        ),
    ),
}


def corpus_note(profile: Profile) -> str:
    """The words beside every number: on which corpus it was measured."""
    corpora = {"an4": "AN4, recorded speech", "made": "made speech corpus"}
    return f"{corpora[profile.corpus]}, {profile.name} profile"


def trial(profile: Profile, cell: str, width: int, replicate: int, pruning: Pruning | None = None) -> SpeechTrial:
    """One training run of the model that stands for the paper's `cell` model of `width` units."""
    gru = cell == "gru"
    return SpeechTrial(
        corpus=profile.corpus,
        corpus_size=profile.corpus_size or None,
        replicate=replicate,
        cell=cell,
        hidden=round(width / (profile.gru_scale if gru else profile.rnn_scale)),
        layers=profile.gru_layers if gru else profile.rnn_layers,
        channels=profile.channels,
        time_strides=profile.time_strides,
        dropout=profile.dropout,
        epochs=profile.epochs,
        batch=profile.batch,
        learning_rate=profile.learning_rate,
        weight_decay=profile.weight_decay,
        augment=profile.augment,
        speeds=profile.speeds,
        pruning=pruning,
    )


# The paper trained no dense 3072 RNN or 3568 GRU: q comes from the widest dense model of the kind.
Q_WIDTH = {("rnn", 1760): 1760, ("rnn", 2560): 2560, ("rnn", 3072): 2560, ("gru", 2560): 2560, ("gru", 3568): 2560}


def ramp(profile: Profile, cell: str, width: int, replicate: int, **changes) -> Pruning:
    """The paper's pruning of that model: q from the dense model of the same seed."""
    dense = trial(profile, cell, Q_WIDTH[cell, width], replicate)
    settings = {"sparsity": profile.sparsity, "freq": profile.freq, "phi": profile.phi, "dense": dense} | changes
    return Pruning(**settings)


def without_dense(profile: Profile, method: str, **changes) -> Pruning:
    """A method that needs no trained dense model."""
    return Pruning(method=method, **({"sparsity": profile.sparsity, "freq": profile.freq, "phi": profile.phi} | changes))


def each_seed(profile: Profile, make) -> list[Trial]:
    return [make(replicate) for replicate in range(profile.seeds)]


def dense_arm(profile: Profile, cell: str, width: int) -> list[Trial]:
    return each_seed(profile, lambda i: trial(profile, cell, width, i))


def sparse_arm(profile: Profile, cell: str, width: int, **changes) -> list[Trial]:
    return each_seed(profile, lambda i: trial(profile, cell, width, i, ramp(profile, cell, width, i, **changes)))


def rnn_arms(profile: Profile) -> Arms:
    """The six RNN rows of Table 3."""
    dense = {f"RNN dense {width}": dense_arm(profile, "rnn", width) for width in (1760, 704, 2560)}
    return dense | {f"RNN sparse {width}": sparse_arm(profile, "rnn", width) for width in (1760, 2560, 3072)}


def gru_arms(profile: Profile) -> Arms:
    """The three GRU rows of Table 3, and the GRU with its recurrent matrices pruned alone (section 5.1, our reading)."""
    return {
        "GRU dense 2560": dense_arm(profile, "gru", 2560),
        "GRU sparse 2560": sparse_arm(profile, "gru", 2560),
        "GRU sparse 3568": sparse_arm(profile, "gru", 3568),
        "GRU recurrent only": sparse_arm(profile, "gru", 2560, roles=("recurrent",)),
    }


def hard_arms(profile: Profile) -> Arms:
    """Hard pruning of the dense 1760 model, one threshold for all weights, at the fractions of training of Table 4."""
    arms = {}
    for fraction in profile.hard_epochs:
        pruning = without_dense(profile, "hard", grouping="all", hard_epoch=round(fraction * profile.epochs))
        arms[f"hard at {20 * fraction:g}/20"] = each_seed(profile, lambda i, p=pruning: trial(profile, "rnn", 1760, i, p))
    return arms


def ablation_arms(profile: Profile) -> Arms:
    """Variations of RNN sparse 1760 where paper and listing disagree, and other pruning methods at the same sparsity."""

    def auto(method: str, **changes):
        pruning = without_dense(profile, method, **changes)
        return each_seed(profile, lambda i: trial(profile, "rnn", 1760, i, pruning))

    return {
        "RNN dense 1760": dense_arm(profile, "rnn", 1760),
        "RNN sparse 1760": sparse_arm(profile, "rnn", 1760),
        "phi = 2 theta": sparse_arm(profile, "rnn", 1760, phi=2.0),
        "printed mask sign": sparse_arm(profile, "rnn", 1760, method="printed sign"),
        "regrowth: listing": sparse_arm(profile, "rnn", 1760, regrowth="listing"),
        "regrowth: copy": sparse_arm(profile, "rnn", 1760, regrowth="copy"),
        "automatic q": auto("auto"),
        "automatic q, per layer": auto("auto", grouping="layer"),
        "cubic (Zhu and Gupta)": auto("cubic"),
    }


__all__ = ["PROFILES", "ROLES", "Profile", "ablation_arms", "corpus_note", "gru_arms", "hard_arms", "rnn_arms"]
