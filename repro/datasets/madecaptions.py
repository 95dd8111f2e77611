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
VERSION = 1  # raise it when a feature or a caption of the corpus changes
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


def identity(size: str = "laptop", seed: int = 0) -> dict:
    """What decides every feature and caption."""
    check_options("made captions", size, SIZES, seed)
    return {"corpus": "made captions", "version": VERSION, "size": size, "seed": seed}


def load(size: str = "laptop", seed: int = 0) -> dict[str, list[Image]]:
    """Images of train, validation and test. Raises ReproError for an unknown size or a seed that is not natural."""
    check_options("made captions", size, SIZES, seed)
    splits = {}
    for number, (split, images) in enumerate(SIZES[size].items()):
        draws, rng = Draws(f"{seed} {split}"), np.random.default_rng([seed, number])
        splits[split] = [make_image(f"{split}{i}", draws, rng) for i in range(images)]
    return splits


def make_image(name: str, draws: Draws, rng: np.random.Generator) -> Image:
    """`draws` draws what is seen and told, `rng` the noise."""
    first, second = (Group(*(draws.ranked(kind) for kind in (COUNTS, COLOURS, SHAPES))) for _ in range(2))
    relation = draws.ranked(tuple(INVERSE))
    captions = tuple(caption(draws, first, second, relation) for _ in range(CAPTIONS))
    return Image(name, features(first, second, relation) + noise(rng), captions)


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
