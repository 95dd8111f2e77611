"""Sentence pairs for translation, and their padded batches.

`multi30k` is task 1 of Elliott et al. 2016 (arXiv 1605.00459), English to German, lower-cased and tokenised by its authors; it
must be fetched. `made` is a small made language, nothing to fetch. A number from one says nothing about the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from repro.datasets import madepairs, registry
from repro.datasets.madepairs import Pair
from repro.datasets.text import read_lines
from repro.datasets.vocabulary import PADDING, START, STOP, Vocabulary, sentence_vocabulary
from repro.errors import ReproError, one_of

MULTI30K_FILES = {"train": "train", "validation": "val", "test": "test_2016_flickr"}


@dataclass(frozen=True)
class PairCorpus:
    """`splits` maps "train", "validation" and "test" to pairs of word tuples; the vocabularies are those of "train"."""

    name: str
    source: Vocabulary
    target: Vocabulary
    splits: dict[str, list[Pair]]


@dataclass(frozen=True)
class PairBatch:
    """`source` (S, B) without marks, its `lengths` (B,) never increasing; `target` (T, B) from `<s>` to `</s>`.

    int64, padded with index 0. `references`: the target words as they are written, unknown ones too, to score against.
    """

    source: Tensor
    lengths: Tensor
    target: Tensor
    references: list[tuple[str, ...]]


def load_pairs(name: str, cache: Path | None = None, least: int = 2, **options) -> PairCorpus:
    """The corpus `name` ("multi30k" or "made"). `least`: how often a word of "train" occurs to be in the vocabulary.

    `cache`: the folder of fetched corpora. Options of "made": `size` ("smoke" | "laptop") and `seed`; "multi30k" has none.
    Raises ReproError for an unknown name or option, a corpus not fetched, files of different length, an empty line.
    """
    one_of("corpus of pairs", name, ("multi30k", "made"))
    takes = madepairs.OPTIONS if name == "made" else ()
    for option in options:
        if option not in takes:
            raise ReproError(f"unknown option {option!r} of the pairs {name!r}: it takes {', '.join(takes) or 'no options'}")
    splits = madepairs.load(**options) if name == "made" else _multi30k(registry.locate("multi30k", cache))
    sources, targets = zip(*splits["train"], strict=True)
    return PairCorpus(name, sentence_vocabulary(sources, least), sentence_vocabulary(targets, least), splits)


def read_pairs(source: Path, target: Path) -> list[Pair]:
    """Line i of one file translates line i of the other; words are apart by spaces.

    Raises ReproError when the numbers of lines differ, for a word that is a mark of padded sentences (`</s>`, ...), and as
    `repro.datasets.text.read_lines`.
    """
    first, second = read_lines(source), read_lines(target)
    for path, lines in ((source, first), (target, second)):
        for number, line in enumerate(lines, start=1):
            if found := {PADDING, START, STOP}.intersection(line.split()):
                raise ReproError(f"{path}, line {number} has the word {found.pop()}: it is a mark of this package, replace it")
    if len(first) != len(second):
        raise ReproError(f"{source} has {len(first)} lines but {target} has {len(second)}: they must be equal")
    return [(tuple(one.split()), tuple(other.split())) for one, other in zip(first, second, strict=True)]


def _multi30k(root: Path) -> dict[str, list[Pair]]:
    def file(name: str, language: str) -> Path:
        plain = root / "tok" / f"{name}.lc.norm.tok.{language}"
        return plain if plain.exists() else plain.with_name(f"{plain.name}.gz")

    return {split: read_pairs(file(name, "en"), file(name, "de")) for split, name in MULTI30K_FILES.items()}


def collate(corpus: PairCorpus, pairs: Sequence[Pair]) -> PairBatch:
    """One batch of these pairs, the longest source first (ties keep their order)."""
    ordered = sorted(pairs, key=lambda pair: -len(pair[0]))
    return PairBatch(
        pad([corpus.source.encode(source) for source, _ in ordered]),
        torch.tensor([len(source) for source, _ in ordered]),
        pad([corpus.target.encode((START, *target, STOP)) for _, target in ordered]),
        [target for _, target in ordered],
    )


def pad(rows: Sequence[list[int]]) -> Tensor:
    """int64 (T, B): the rows as columns, with index 0 (`<pad>`) behind the shorter ones."""
    return pad_sequence([torch.tensor(row) for row in rows])


def pair_batches(corpus: PairCorpus, split: str, size: int, rng: np.random.Generator | None = None) -> Iterator[PairBatch]:
    """One pass over a split in batches of `size` (the last may be smaller), neighbours in length together.

    With `rng` pairs of equal source length and the batches come in random order (training); without, they come by length and
    the same each time (evaluation).
    """
    one_of("split", split, corpus.splits)
    if size < 1:
        raise ReproError(f"the size of the batches is {size}: it must be at least 1")
    pairs = corpus.splits[split]
    order = np.arange(len(pairs)) if rng is None else rng.permutation(len(pairs))
    order = order[np.argsort([-len(pairs[index][0]) for index in order], kind="stable")]
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    if rng is not None:
        rng.shuffle(chunks)
    for chunk in chunks:
        yield collate(corpus, [pairs[index] for index in chunk])
