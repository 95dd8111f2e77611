"""Made images with captions: each image is a feature vector, as a convolutional network would give, and five sentences.

Nothing to fetch, the same for the same seed. An image shows two groups of things in a relation; its features are the sum of a
fixed random vector for each attribute of each group (and for the relation) and of noise. Captions differ in how much they
tell and from which group they start, so that several sentences are right, as in MS-COCO.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from repro.datasets.draws import Draws, check_options

OPTIONS = ("size", "seed")
# Raise `code_version` of `CaptionTrial` when a feature or a caption of the corpus changes.
FEATURES = 64
CAPTIONS = 5
NOISE = 0.25  # standard deviation; that of an attribute's vector is 1

SIZES = {
    "smoke": {"train": 200, "validation": 50, "test": 50},
    "laptop": {"train": 2_000, "validation": 300, "test": 300},
}

COUNTS = ("a", "two", "three")
COLOURS = ("red", "green", "blue", "white", "black")
SHAPES = ("box", "ring", "star", "ball", "cone", "bell")
PLURALS = {"box": "boxes"}
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of", "near": "near"}


@dataclass(frozen=True)
class Image:
    """`features`: float32, shape (d,); `captions`: sentences in lower case, words apart by single spaces."""

    name: str
    features: np.ndarray
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    count: str
    colour: str
    shape: str


def load(size: str = "laptop", seed: int = 0) -> dict[str, list[Image]]:
    """Images of train, validation and test; no scene occurs twice, also not with its groups the other way round.

    Raises ReproError for an unknown size or a seed that is not natural.
    """
    check_options("made captions", size, SIZES, seed)
    seen, splits = set(), {}
    for number, (split, wanted) in enumerate(SIZES[size].items()):
        # 1: zeros at the end of a seed do not count, so that [0, 0] would draw the noise of the numbers of `CODES`.
        draws, rng, splits[split] = Draws(f"{seed} {split}"), np.random.default_rng([seed, number, 1]), []
        while len(splits[split]) < wanted:
            first, second, relation = scene = _draw_scene(draws)
            if scene not in seen:
                seen |= {scene, (second, first, INVERSE[relation])}
                captions = tuple(caption(draws, *scene) for _ in range(CAPTIONS))
                splits[split].append(Image(f"{split}{len(splits[split])}", features(*scene) + noise(rng), captions))
    return splits


def _draw_scene(draws: Draws) -> tuple[Group, Group, str]:
    first, second = (Group(*(draws.ranked(kind) for kind in (COUNTS, COLOURS, SHAPES))) for _ in range(2))
    return first, second, draws.ranked(tuple(INVERSE))


def features(first: Group, second: Group, relation: str) -> np.ndarray:
    """Without noise: the sum of seven rows of `CODES`, whose order is that of the attributes' names."""
    seen = [(1, first.count), (1, first.colour), (1, first.shape), (2, second.count), (2, second.colour), (2, second.shape)]
    return sum(CODES[part] for part in [*seen, (0, relation)])


def noise(rng: np.random.Generator) -> np.ndarray:
    return _rounded(NOISE * rng.standard_normal(FEATURES))


def caption(draws: Draws, first: Group, second: Group, relation: str) -> str:
    """From either group to the other, each with or without its colour."""
    if draws.chance(40):
        first, second, relation = second, first, INVERSE[relation]
    return f"{_words(draws, first)} {relation} {_words(draws, second)}"


def _words(draws: Draws, group: Group) -> str:
    shape = group.shape if group.count == "a" else PLURALS.get(group.shape, f"{group.shape}s")
    return f"{group.count} {group.colour} {shape}" if draws.chance(70) else f"{group.count} {shape}"


def _rounded(values: np.ndarray) -> np.ndarray:
    """To multiples of 2^-10, whose sums are exact in float32: the same bytes on every machine."""
    return (np.round(values * 1024) / 1024).astype(np.float32)


def _codes(parts: Sequence[tuple[int, str]]) -> dict[tuple[int, str], np.ndarray]:
    rng = np.random.default_rng(0)
    return {part: _rounded(rng.standard_normal(FEATURES)) for part in parts}


CODES = _codes(
    [(group, attribute) for group in (1, 2) for attribute in (*COUNTS, *COLOURS, *SHAPES)] + [(0, name) for name in INVERSE]
)
