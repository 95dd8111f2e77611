"""What a speech corpus is made of."""

from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Utterance:
    """One recording. `samples`: float32 in [-1, 1], shape (n,); `text`: capital letters, apostrophes and single spaces."""

    name: str
    speaker: str
    text: str
    samples: np.ndarray


@dataclass(frozen=True)
class SpeechCorpus:
    """`splits` maps each of `SPLITS` to its utterances; no speaker is in two splits. `rate` in Hz."""

    name: str
    rate: int
    splits: dict[str, list[Utterance]]
