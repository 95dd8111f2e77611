"""How large the trials of zhu2017 are, profile by profile, and the arms that exhibits compare."""

from __future__ import annotations

from dataclasses import dataclass, replace

from repro.studies.base import Arms, check_ranges
from repro.studies.gates import CharacterTrial
from repro.studies.sentences import SentenceSizes
from repro.studies.speeds import SpeedSizes, SpeedTrial, TrainedSpeedTrial
from repro.studies.words import MEDIUM, SMALL, WordRecipe, WordSizes

NT, N = "NT", "N"

# Fields of a profile that notebooks of the character model may change.
TRAINING = ("seeds", "hidden", "layers", "length", "batch", "steps", "learning_rate")

# The paper's thresholds. At 1e-8 it shows one step only; the claims choose among all of them.
THRESHOLDS = {NT: (0.0, 1e-8, 1e-7, 1e-6, 1e-5), N: (0.0, 1e-7, 1e-6, 1e-5)}
HELD = {NT: (0.8, 0.9, 0.95), N: (0.8, 0.9)}


@dataclass(frozen=True)
class Grid:
    """What is varied around the main model, one at a time (`sensitivity`), and what is combined (`recipe`).

    `rates` and `batches` rise, from the main model's rate and to its batch.
    """

    layers: tuple[int, ...]
    cells: tuple[int, ...]
    lengths: tuple[int, ...]
    corpora: tuple[str, ...]
    rates: tuple[float, ...]
    batches: tuple[int, ...]


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
    translation: SentenceSizes
    translation_hidden: int
    translation_steps: int
    captioning: SentenceSizes
    captioning_hidden: int
    captioning_steps: int
    words: WordSizes
    gru_steps: int
    transformer_steps: int
    transformer_rate: float
    multitask_steps: int
    grid: Grid
    sensitivity_steps: int
    recipe_steps: int
    speed: SpeedSizes
    speed_length: int

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
    ("translation_hidden", 1, 4096),
    ("translation_steps", 20, 1_000_000),
    ("captioning_hidden", 1, 4096),
    ("captioning_steps", 20, 1_000_000),
    ("gru_steps", 20, 1_000_000),
    ("transformer_steps", 20, 1_000_000),
    ("transformer_rate", 1e-6, 1.0),
    ("multitask_steps", 20, 1_000_000),
    ("sensitivity_steps", 10, 1_000_000),
    ("recipe_steps", 10, 1_000_000),
    ("speed_length", 1, 1000),
)

MADE_SENTENCES = SentenceSizes(
    corpus="made",
    corpus_size="laptop",
    embedding=64,
    layers=1,
    dropout=0.0,
    batch=32,
    learning_rate=5e-3,
    evaluations=5,
    measurements=10,
)
# The sizes of the first notebook of github.com/bentrevett/pytorch-seq2seq, a small model of Sutskever et al.'s on this corpus.
MULTI30K = SentenceSizes(
    corpus="multi30k",
    corpus_size="",
    embedding=256,
    layers=2,
    dropout=0.5,
    batch=128,
    learning_rate=1e-3,
    evaluations=20,
    measurements=100,
)
# Zaremba et al.'s set-ups for a text with a tenth of the words and a fortieth of the vocabulary.
MADE_WORDS = WordSizes(
    corpus="made",
    corpus_size="laptop",
    small=WordRecipe(hidden=64, length=20, epochs=3, constant_epochs=2, decay=2.0, bound=0.1, dropout=0.0),
    medium=WordRecipe(hidden=64, length=35, epochs=5, constant_epochs=3, decay=1.2, bound=0.05, dropout=0.5),
)
TINY_WORDS = WordRecipe(hidden=16, length=10, epochs=2, constant_epochs=1, decay=2.0, bound=0.1, dropout=0.0)
SMOKE_SENTENCES = {"corpus_size": "smoke", "embedding": 16, "batch": 16, "evaluations": 4, "measurements": 10}

LAPTOP = Profile(
    name="laptop",
    corpus="made",
    corpus_size="laptop",
    seeds=3,
    hidden=64,
    layers=3,
    length=100,
    batch=16,
    steps=160,
    learning_rate=2e-3,
    evaluations=5,
    measurements=10,
    rms=0.25,
    rate=1e-8,
    translation=MADE_SENTENCES,
    translation_hidden=128,
    translation_steps=320,
    captioning=MADE_SENTENCES,
    captioning_hidden=128,
    captioning_steps=400,
    words=MADE_WORDS,
    gru_steps=60,
    transformer_steps=60,
    transformer_rate=1e-3,
    multitask_steps=300,
    grid=Grid(
        layers=(2, 3, 6, 9),
        cells=(32, 64, 128),
        lengths=(25, 50, 100),
        corpora=("made", "madelanguage"),
        rates=(2e-3, 8e-3),
        batches=(4, 16),
    ),
    sensitivity_steps=60,
    recipe_steps=50,
    speed=SpeedSizes(
        widths=(256, 650, 1500),
        batches=(20,),
        rounds=(12, 6, 3),
        sparsities=(0.5, 0.8, 0.9),
        compared=(0.8,),
        compared_width=650,
        avx2_widths=(650,),
        gpu_width=1500,
        after=0.1,
        trained_rounds=10,
    ),
    speed_length=35,
)

PROFILES = {
    "smoke": replace(
        LAPTOP,
        name="smoke",
        corpus_size="smoke",
        seeds=1,
        hidden=16,
        length=25,
        batch=8,
        steps=20,
        learning_rate=5e-3,
        evaluations=4,
        measurements=10,
        translation=replace(MADE_SENTENCES, **SMOKE_SENTENCES),
        translation_hidden=16,
        translation_steps=20,
        captioning=replace(MADE_SENTENCES, **SMOKE_SENTENCES),
        captioning_hidden=16,
        captioning_steps=20,
        words=WordSizes(corpus="made", corpus_size="smoke", small=TINY_WORDS, medium=replace(TINY_WORDS, dropout=0.5)),
        gru_steps=20,
        transformer_steps=20,
        multitask_steps=20,
        grid=Grid(
            layers=(2, 3),
            cells=(8, 16),
            lengths=(10, 25),
            corpora=("made", "madelanguage"),
            rates=(5e-3, 2e-2),
            batches=(4, 8),
        ),
        sensitivity_steps=10,
        recipe_steps=10,
        speed=SpeedSizes(
            widths=(16,),
            batches=(20,),
            rounds=(3,),
            sparsities=(0.5, 0.8, 0.9),
            compared=(0.8,),
            compared_width=16,
            avx2_widths=(16,),
            gpu_width=16,
            after=0.1,
            trained_rounds=3,
        ),
        speed_length=5,
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
        steps=2000,  # ten passes over the text, up to the second halving of the rate
        evaluations=20,
        measurements=100,
        translation=MULTI30K,
        translation_hidden=512,
        translation_steps=2270,
        captioning=replace(
            MADE_SENTENCES, embedding=512, dropout=0.3, batch=64, learning_rate=1e-3, evaluations=20, measurements=100
        ),
        captioning_hidden=512,
        captioning_steps=1570,
        words=WordSizes(corpus="ptb", corpus_size="", small=SMALL, medium=MEDIUM),
        gru_steps=2000,
        transformer_steps=2000,
        multitask_steps=2000,
        grid=Grid(
            layers=(2, 3, 6, 9),
            cells=(128, 256, 512),
            lengths=(25, 50, 100),
            corpora=("tinyshakespeare", "ptb"),
            rates=(2e-3, 8e-3),
            batches=(10, 50),
        ),
        sensitivity_steps=400,
        recipe_steps=400,
        speed=SpeedSizes(
            widths=(256, 650, 1024, 1500),
            batches=(20, 32, 50),
            rounds=(40, 20, 12, 9),
            sparsities=(0.5, 0.65, 0.8, 0.9, 0.95),
            compared=(0.8, 0.9),
            compared_width=650,
            avx2_widths=(256, 650, 1024, 1500),
            gpu_width=1500,
            after=0.1,
            trained_rounds=20,
        ),
    ),
}


CORPORA = {
    "made": "made text",
    "madelanguage": "made language",
    "tinyshakespeare": "tiny Shakespeare",
    "ptb": "Penn Treebank",
}

# Validation loss, nats a symbol, of guessing each by its share of the training split (made ones: of the laptop profile).
GUESSING = {"made": 2.959, "madelanguage": 2.766, "tinyshakespeare": 3.333, "ptb": 3.006}


def corpus_note(profile: Profile) -> str:
    """The words beside every number: on which corpus it was measured."""
    return f"{CORPORA[profile.corpus]}, {profile.name} profile"


def arm(profile: Profile, rule: str, value: float, normalisation: str = NT, **changes) -> list[CharacterTrial]:
    """One training run a seed of the character model under a rule; `changes`: fields of the trial unlike the profile's."""
    first = CharacterTrial(
        corpus=profile.corpus,
        corpus_size=profile.corpus_size or None,
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
    return [replace(first, replicate=replicate, **changes) for replicate in range(profile.seeds)]


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


TIMED = ", timed"
TRADED = (static_name(1e-6), held_name(0.8))  # of these trainings a step is timed: quality against measured time


def mac_arms(profile: Profile) -> Arms:
    """The trainings whose zeros are turned into MACs and cycles; of the paper's own, and of a held share, a step is timed."""
    arms = {static_name(1e-6, normalisation): arm(profile, "static", 1e-6, normalisation) for normalisation in (NT, N)}
    arms[held_name(0.8)] = arm(profile, "held", 0.8)
    for name in TRADED:
        arms[name + TIMED] = [
            TrainedSpeedTrial(training=trial, after=profile.speed.after, rounds=profile.speed.trained_rounds)
            for trial in arms[name]
        ]
    return arms


def step_name(width: int, batch: int) -> str:
    return f"{width} cells, batch {batch}"


AVX2, ON_GPU = "AVX2: ", "GPU: "


def speed_arms(profile: Profile) -> Arms:
    """Steps of one layer by width and batch, on the CPU and on a GPU; and trainings, for what zeros cost in quality."""
    sizes, arms = profile.speed, {}
    for width, rounds in zip(sizes.widths, sizes.rounds, strict=True):
        for batch in sizes.batches:
            name, steps = step_name(width, batch), {"sparsities": sizes.sparsities, "rounds": rounds}
            compared = sizes.compared if width == sizes.compared_width else ()
            arms[name] = _step_trials(profile, width, batch, compared=compared, **steps)
            if width in sizes.avx2_widths:
                arms[AVX2 + name] = _step_trials(profile, width, batch, compared=(), avx2=True, **steps)
    batch = sizes.batches[0]
    arms[ON_GPU + step_name(sizes.gpu_width, batch)] = _step_trials(
        profile, sizes.gpu_width, batch, sparsities=(), compared=sizes.compared, rounds=sizes.rounds[0], device="cuda"
    )
    quality = {DENSE: arm(profile, "static", 0.0), COLUMNS_80: arm(profile, "columns", 0.8)}
    quality |= {name: trials for name, trials in mac_arms(profile).items() if name.removesuffix(TIMED) in TRADED}
    return arms | quality


COLUMNS_80 = "80% of the columns, NT"


def _step_trials(profile: Profile, width: int, batch: int, **more) -> list[SpeedTrial]:
    return [
        SpeedTrial(hidden=width, batch=batch, length=profile.speed_length, replicate=replicate, **more)
        for replicate in range(profile.seeds)
    ]
