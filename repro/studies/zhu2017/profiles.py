"""How large the trials of zhu2017 are, profile by profile, and the arms that exhibits compare."""

from __future__ import annotations

from dataclasses import dataclass, replace

from repro.studies.base import Arms, check_ranges
from repro.studies.gates import CharacterTrial

NT, N = "NT", "N"

# The paper's thresholds. At 1e-8 it shows one step only; the claims choose among all of them.
THRESHOLDS = {NT: (0.0, 1e-8, 1e-7, 1e-6, 1e-5), N: (0.0, 1e-7, 1e-6, 1e-5)}
HELD = {NT: (0.8, 0.9, 0.95), N: (0.8, 0.9)}


@dataclass(frozen=True)
class Profile:
    """Every number of a profile. `rms` and `rate`: factors of the rules of these names, for about 80 % of zeros."""

    name: str
    corpus: str
    corpus_size: str
    seeds: int
    hidden: int
    layers: int
    length: int
    batch: int
    steps: int
    learning_rate: float
    evaluations: int
    measurements: int
    rms: float
    rate: float

    def __post_init__(self):
        check_ranges(self, RANGES)


# Ten measurements or more, as zeros are shown by tenths of training.
RANGES = (
    ("seeds", 1, 100),
    ("hidden", 1, 4096),
    ("layers", 1, 20),
    ("length", 2, 1000),
    ("batch", 1, 1000),
    ("steps", 20, 1_000_000),
    ("learning_rate", 1e-6, 1.0),
    ("evaluations", 2, 1000),
    ("measurements", 10, 1000),
    ("rms", 0.0, 1000.0),
    ("rate", 0.0, 1.0),
)

LAPTOP = Profile(
    name="laptop",
    corpus="made",
    corpus_size="laptop",
    seeds=3,
    hidden=64,
    layers=3,
    length=100,
    batch=16,
    steps=400,
    learning_rate=2e-3,
    evaluations=10,
    measurements=20,
    rms=0.25,
    rate=1e-8,
)

PROFILES = {
    "smoke": replace(
        LAPTOP,
        name="smoke",
        corpus_size="smoke",
        seeds=2,
        hidden=16,
        length=25,
        batch=8,
        steps=20,
        learning_rate=5e-3,
        evaluations=4,
        measurements=10,
    ),
    "laptop": LAPTOP,
    "paper": replace(
        LAPTOP,
        name="paper",
        corpus="tinyshakespeare",
        corpus_size="",
        seeds=5,
        hidden=256,
        batch=50,
        steps=4000,
        evaluations=40,
        measurements=100,
    ),
}


def corpus_note(profile: Profile) -> str:
    """The words beside every number: on which corpus it was measured."""
    corpora = {"made": "made text", "tinyshakespeare": "tiny Shakespeare"}
    return f"{corpora[profile.corpus]}, {profile.name} profile"


def arm(profile: Profile, rule: str, value: float, normalisation: str = NT) -> list[CharacterTrial]:
    """One training run a seed of the character model under a rule."""
    return [
        CharacterTrial(
            corpus=profile.corpus,
            corpus_size=profile.corpus_size or None,
            replicate=replicate,
            hidden=profile.hidden,
            layers=profile.layers,
            length=profile.length,
            batch=profile.batch,
            steps=profile.steps,
            learning_rate=profile.learning_rate,
            normalisation=normalisation,
            rule=rule,
            value=value,
            evaluations=profile.evaluations,
            measurements=profile.measurements,
        )
        for replicate in range(profile.seeds)
    ]


def short(t: float) -> str:
    """A threshold as the paper writes it: 1e-6."""
    return f"{t:g}".replace("e-0", "e-")


def static_name(t: float, normalisation: str = NT) -> str:
    return f"t = {short(t)}, {normalisation}"


def held_name(sparsity: float, normalisation: str = NT) -> str:
    return f"{sparsity:.0%} held, {normalisation}"


DENSE = static_name(0.0)


def static_arms(profile: Profile, normalisation: str) -> Arms:
    """The dense baseline and the paper's thresholds, under one normalisation of the loss."""
    values = THRESHOLDS[normalisation]
    return {static_name(t, normalisation): arm(profile, "static", t, normalisation) for t in values}


def training_arms(profile: Profile) -> Arms:
    """Figures 4 and 5: every threshold under both normalisations."""
    return static_arms(profile, NT) | static_arms(profile, N)


def dense_arms(profile: Profile) -> Arms:
    """The dense baselines, which carry the snapshots."""
    return {static_name(0.0, normalisation): arm(profile, "static", 0.0, normalisation) for normalisation in (NT, N)}


def held_arms(profile: Profile) -> Arms:
    """Wanted sparsities held by feedback."""
    return {
        held_name(share, normalisation): arm(profile, "held", share, normalisation)
        for normalisation, shares in HELD.items()
        for share in shares
    }


def dynamic_arms(profile: Profile) -> Arms:
    """Rules that follow the gradients, against the static thresholds."""
    relative = {
        f"{name}, {normalisation}": arm(profile, rule, value, normalisation)
        for name, rule, value in (("RMS", "rms", profile.rms), ("rate", "rate", profile.rate))
        for normalisation in (NT, N)
    }
    top = {"80% top-k, NT": arm(profile, "top", 0.8)}
    return training_arms(profile) | held_arms(profile) | relative | top


def mac_arms(profile: Profile) -> Arms:
    """The trainings whose zeros are turned into MACs and cycles."""
    held = held_arms(profile)
    static = {static_name(1e-6, normalisation): arm(profile, "static", 1e-6, normalisation) for normalisation in (NT, N)}
    return static | {held_name(0.8): held[held_name(0.8)]}
