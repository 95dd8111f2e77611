"""Speech corpora by name, and the characters that a CTC model reads from them.

`an4` is recorded speech (16 kHz, 48 minutes, must be fetched), `made` is synthesised (8 kHz, nothing to fetch). A number from
one says nothing about the other: always name the corpus beside it.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from rapidfuzz.distance import Levenshtein

from repro.datasets import an4, madespeech
from repro.datasets.utterances import SPLITS, SpeechCorpus, Utterance
from repro.errors import ReproError, one_of

__all__ = ["ALPHABET", "BLANK", "CORPORA", "SPLITS", "SYMBOLS", "SpeechCorpus", "Utterance"]
__all__ += ["character_error_rate", "corpus_identity", "decode", "encode", "load_corpus"]

CORPORA = {"an4": an4, "made": madespeech}

ALPHABET = " 'ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BLANK = 0
SYMBOLS = len(ALPHABET) + 1  # 29 outputs as in Deep Speech 2: the CTC blank is index 0, ALPHABET[i] is index i + 1
_INDEX = {character: index for index, character in enumerate(ALPHABET, start=1)}


def load_corpus(name: str, cache: Path | None = None, **options) -> SpeechCorpus:
    """The corpus `name` ("an4" or "made") with its waveforms.

    `cache`: the folder of fetched corpora (default `data/cache` of the checkout). Options of "made": `size` ("smoke" |
    "laptop") and `seed`; "an4" has none. Raises ReproError for an unknown name or option, or a corpus not fetched.
    """
    return _module(name, options).load(cache, **options)


def corpus_identity(name: str, cache: Path | None = None, **options) -> dict:
    """What decides every sample of the corpus (checksum, or generator version, size and seed), without loading it."""
    return _module(name, options).identity(cache, **options)


def _module(name, options):
    one_of("speech corpus", name, CORPORA)
    for option in options:
        if option not in CORPORA[name].OPTIONS:
            valid = ", ".join(CORPORA[name].OPTIONS) or "no options"
            raise ReproError(f"unknown option {option!r} of the speech corpus {name!r}: it takes {valid}")
    return CORPORA[name]


def encode(text: str) -> list[int]:
    """Indices 1..28 of the characters of `text`. Raises ReproError naming a character outside `ALPHABET`."""
    try:
        return [_INDEX[character] for character in text]
    except KeyError as error:
        raise ReproError(f"character {error.args[0]!r} of {text!r} is not in the alphabet {ALPHABET!r}") from error


def decode(indices: Iterable[int]) -> str:
    """Greedy CTC reading of the best index per frame: collapse repeats, then drop blanks (Graves et al. 2006, section 3.1)."""
    return "".join(ALPHABET[index - 1] for index, _ in groupby(map(int, indices)) if index != BLANK)


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Edit distances of all pairs, summed, over the summed lengths of the references: one division for the whole set.

    A fraction, above 1 when hypotheses are long. Raises ReproError when the lists differ in length or the references
    hold no character.
    """
    if len(references) != len(hypotheses):
        raise ReproError(
            f"{len(references)} references but {len(hypotheses)} hypotheses: one hypothesis per reference is right"
        )
    characters = sum(map(len, references))
    if not characters:
        raise ReproError("the references hold no character: a character error rate needs at least one")
    return sum(map(Levenshtein.distance, references, hypotheses)) / characters
