"""Three questions about every character of a text, for a model that answers them together, one character ahead."""

import numpy as np

from repro.datasets.text import TextCorpus

KINDS = ("letter", "white space", "other")
FARTHEST = 7  # letters ahead that are told apart; more count as this many


def character_tasks(corpus: TextCorpus) -> dict[str, int]:
    """Number of classes of each task, by name.

    "character": which one it is; "kind": its place in `KINDS`; "ahead": how many letters follow it before its word ends, up to
    `FARTHEST`, 0 of what is no letter. The last one cannot be read off the character: it asks which word is being written.
    """
    return {"character": len(corpus.vocabulary), "kind": len(KINDS), "ahead": FARTHEST + 1}


def character_answers(corpus: TextCorpus, split: str) -> dict[str, np.ndarray]:
    """The class of each character of a split in each task, int64 (n,)."""
    tokens = corpus.splits[split]
    kinds = np.array([0 if s.isalpha() else 1 if s.isspace() else 2 for s in corpus.vocabulary.symbols])[tokens]
    return {"character": tokens, "kind": kinds, "ahead": np.minimum(_letters_ahead(kinds == 0), FARTHEST)}


def _letters_ahead(letters: np.ndarray) -> np.ndarray:
    """Of each place, letters that follow without a gap, 0 where there is none."""
    ahead = np.zeros(len(letters), np.int64)
    bounds = np.flatnonzero(np.diff(np.concatenate(([False], letters, [False])).astype(np.int8)))
    for start, stop in bounds.reshape(-1, 2):
        ahead[start:stop] = np.arange(stop - start)[::-1]
    return ahead
