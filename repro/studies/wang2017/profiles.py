"""How large the trials of wang2017 are, profile by profile, and the arms that exhibits compare."""

from __future__ import annotations

from dataclasses import dataclass, replace

from repro.studies.base import Arms, check_ranges
from repro.studies.exchanging import LIBRARY, PIPELINE, CollectivesTrial
from repro.studies.replicas import SYSTEMS, DriftTrial, Model, TrainingTrial
from repro.studies.wires import KeptTrial, ZerosTrial

RING, TWO_WAY, TREE, EXCHANGE, DIRECT = (
    "ring",
    "two-way ring",
    "minimum spanning tree",
    "bidirectional exchange",
    "all-to-all",
)
EVERY = (PIPELINE, TREE, EXCHANGE, RING, TWO_WAY, DIRECT, LIBRARY)
KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Profile:
    """Every number of a profile. Sizes and blocks in bytes, `megabytes_per_second` of each host's link in either direction.

    `seeds`: repeats of every measurement; `rounds`: interleaved, within a repeat. `ranks`: of Figure 3 and of training;
    `many_ranks`: those of Figure 4, at `ranks_size`. `target`: share of gate gradients set to zero.
    """

    name: str
    seeds: int
    rounds: int
    megabytes_per_second: float
    ranks: int
    sizes: tuple[int, ...]
    blocks: tuple[int, ...]
    many_ranks: tuple[int, ...]
    ranks_size: int
    rank_blocks: tuple[int, ...]
    loopback_ranks: tuple[int, ...]
    loopback_sizes: tuple[int, ...]
    loopback_blocks: tuple[int, ...]
    rnn: Model
    cnn: Model
    iterations: int
    drift_iterations: int
    gates: Model
    target: float
    gate_steps: int
    kept_elements: int
    kept_sparsities: tuple[float, ...]

    def __post_init__(self):
        check_ranges(self, RANGES)

    @property
    def rate(self) -> float:
        """Bytes per second of a link."""
        return self.megabytes_per_second * 1e6


RANGES = (
    ("seeds", 1, 100),
    ("rounds", 1, 1000),
    ("megabytes_per_second", 1.0, 1000.0),
    ("iterations", 4, 100_000),
    ("drift_iterations", 1, 100_000),
    ("target", 0.0, 0.99),
    ("gate_steps", 3, 1_000_000),
)

_LAPTOP = Profile(
    name="laptop",
    seeds=3,
    rounds=3,
    megabytes_per_second=50.0,
    ranks=4,
    sizes=(8 * KIB, 64 * KIB, 512 * KIB),
    blocks=(16 * KIB, 64 * KIB, 256 * KIB),
    many_ranks=(2, 3, 4, 5, 6),
    ranks_size=512 * KIB,
    rank_blocks=(64 * KIB,),
    loopback_ranks=(2, 4),
    loopback_sizes=(64 * KIB, MIB, 4 * MIB, 16 * MIB),
    loopback_blocks=(64 * KIB, 4 * MIB),
    rnn=Model(
        kind="rnn", corpus="made", corpus_size="smoke", hidden=160, layers=2, length=32, sparsity=0.9, batch=16, rate=0.5
    ),
    cnn=Model(kind="cnn", corpus="made", corpus_size="smoke", batch=32, rate=0.05),
    iterations=6,
    drift_iterations=10,
    gates=Model(kind="rnn", corpus="made", corpus_size="smoke", hidden=128, layers=2, length=32, batch=16, rate=0.005),
    target=0.8,
    gate_steps=30,
    kept_elements=MIB // 4,
    kept_sparsities=(0.0, 0.8, 0.9),
)

PROFILES = {
    "smoke": replace(
        _LAPTOP,
        name="smoke",
        seeds=1,
        rounds=1,
        ranks=3,
        sizes=(8 * KIB, 16 * KIB, 64 * KIB),
        blocks=(16 * KIB, 64 * KIB),
        many_ranks=(2, 3),
        ranks_size=64 * KIB,
        rank_blocks=(16 * KIB,),
        loopback_ranks=(2,),
        loopback_sizes=(64 * KIB, 256 * KIB),
        rnn=replace(_LAPTOP.rnn, hidden=32, length=8, batch=2),
        cnn=replace(_LAPTOP.cnn, batch=2),
        iterations=4,
        drift_iterations=4,
        gates=replace(_LAPTOP.gates, hidden=16, length=8, batch=4),
        gate_steps=6,
        kept_elements=16 * KIB,
    ),
    "laptop": _LAPTOP,
    "paper": replace(
        _LAPTOP,
        name="paper",
        seeds=5,
        sizes=(8 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB),
        blocks=(16 * KIB, 64 * KIB, 256 * KIB, MIB),
        ranks_size=2 * MIB,
        rank_blocks=(64 * KIB, 256 * KIB),
        loopback_ranks=(2, 3, 4, 6),
        loopback_sizes=(64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB),
        rnn=replace(_LAPTOP.rnn, corpus="tinyshakespeare", corpus_size="", hidden=256),
        cnn=replace(_LAPTOP.cnn, corpus_size="laptop"),
        iterations=15,
        drift_iterations=40,
        gates=replace(_LAPTOP.gates, corpus="tinyshakespeare", corpus_size="", hidden=256, layers=3, length=100),
        gate_steps=120,
        kept_elements=MIB,
        kept_sparsities=(0.0, 0.5, 0.8, 0.9, 0.95),
    ),
}


def corpus_note(profile: Profile) -> str:
    """What the numbers were measured on."""
    text = "made text" if profile.rnn.corpus == "made" else "tiny Shakespeare"
    return f"{text} and made images, {profile.name} profile"


def hosts(profile: Profile) -> list[CollectivesTrial]:
    """Every algorithm at every size, on emulated hosts."""
    return [
        CollectivesTrial(
            ranks=(profile.ranks,),
            rate=profile.rate,
            algorithms=EVERY,
            sizes=profile.sizes,
            blocks=profile.blocks,
            rounds=profile.rounds,
            replicate=replicate,
        )
        for replicate in range(profile.seeds)
    ]


def size_arms(profile: Profile) -> Arms:
    """Figure 3: on hosts, and on loopback between two ranks."""
    loopback = [
        CollectivesTrial(
            ranks=(2,),
            algorithms=EVERY,
            sizes=profile.loopback_sizes,
            blocks=profile.loopback_blocks,
            rounds=profile.rounds,
            replicate=replicate,
        )
        for replicate in range(profile.seeds)
    ]
    return {"hosts": hosts(profile), "loopback": loopback}


def rank_arms(profile: Profile) -> Arms:
    """Figure 4: one size, on 2 to 6 hosts, and on loopback, where they share the machine's cores."""
    places = {
        "hosts": {
            "ranks": profile.many_ranks,
            "rate": profile.rate,
            "algorithms": (PIPELINE, TREE, EXCHANGE, RING),
            "blocks": profile.rank_blocks,
        },
        "loopback": {
            "ranks": profile.loopback_ranks,
            "collectives": ("allreduce",),
            "algorithms": (PIPELINE, TREE, EXCHANGE, RING, LIBRARY),
            "blocks": profile.loopback_blocks,
        },
    }
    return {
        f"{where}, by ranks": [
            CollectivesTrial(
                sizes=(profile.ranks_size,),
                rounds=profile.rounds,
                replicate=replicate,
                **settings,
            )
            for replicate in range(profile.seeds)
        ]
        for where, settings in places.items()
    }


def model_arms(profile: Profile) -> Arms:
    """What the cost model is fitted to, and tested on."""
    return {"hosts": hosts(profile), "hosts, by ranks": rank_arms(profile)["hosts, by ranks"]}


def training_arms(profile: Profile) -> Arms:
    """Both models by every system, on hosts."""
    return {
        "training": [
            TrainingTrial(
                models=(profile.rnn, profile.cnn),
                ranks=profile.ranks,
                rate=profile.rate,
                block_bytes=64 * KIB,
                iterations=profile.iterations,
                replicate=replicate,
            )
            for replicate in range(profile.seeds)
        ]
    }


def drift_arms(profile: Profile) -> Arms:
    """Replicas of the RNN, never resynchronised."""
    return {
        "drift": [
            DriftTrial(model=profile.rnn, ranks=profile.ranks, iterations=profile.drift_iterations, replicate=replicate)
            for replicate in range(profile.seeds)
        ]
    }


def sparse_arms(profile: Profile) -> Arms:
    """Zeros in gradients of a thresholded LSTM; and gradients of a pruned model on the wire."""
    zeros = {"model": profile.gates, "target": profile.target, "ranks": profile.ranks, "steps": profile.gate_steps}
    kept = {"elements": profile.kept_elements, "tensors": 4, "sparsities": profile.kept_sparsities, "ranks": profile.ranks}
    return {
        "zeros": [ZerosTrial(**zeros, every=profile.gate_steps // 3, replicate=r) for r in range(profile.seeds)],
        "kept": [KeptTrial(**kept, rate=profile.rate, rounds=profile.rounds, replicate=r) for r in range(profile.seeds)],
    }


__all__ = ["PROFILES", "SYSTEMS", "Profile", "corpus_note"]
