"""Text corpora as arrays of symbols, and their batches for truncated backpropagation through time.

`ptb` is the Penn Treebank in Mikolov's form (10,000 words, rare ones already `<unk>`, one sentence a line), for words and for
characters; `tinyshakespeare` is 1.1 M characters of plays; both must be fetched. `made` is a made text in English, and
`madelanguage` holds the sentences, one a line, of the language that `madepairs` translates into: nothing to fetch.
A number from one says nothing about another: always name the corpus beside it.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repro.datasets import madepairs, madetext, registry
from repro.datasets.vocabulary import Vocabulary, by_frequency
from repro.errors import ReproError, one_of

END = "<eos>"
PTB_FILES = {"train": "ptb.train.txt", "validation": "ptb.valid.txt", "test": "ptb.test.txt"}

# Tiny Shakespeare has no official split. Here: the first 90 % of its characters, the next 5 %, the last 5 %.
SHAKESPEARE_PERCENT = (90, 95)


@dataclass(frozen=True)
class TextCorpus:
    """`splits` maps "train", "validation" and "test" to int64 indices into `vocabulary`, shape (n,), in reading order."""

    name: str
    vocabulary: Vocabulary
    splits: dict[str, np.ndarray]


def load_characters(name: str, cache: Path | None = None, **options) -> TextCorpus:
    """The corpus `name` ("ptb", "tinyshakespeare", "made" or "madelanguage") by characters; a line ends in one newline symbol.

    `cache`: the folder of fetched corpora. Options of the made ones: `size` ("smoke" | "laptop") and `seed`; others have none.
    Raises ReproError for an unknown name or option, a corpus not fetched, an empty file or line, an unknown symbol.
    """
    one_of("character corpus", name, CHARACTERS)
    return CHARACTERS[name](cache, **_known(name, options))


def load_words(name: str, cache: Path | None = None, **options) -> TextCorpus:
    """The corpus `name` ("ptb" or "made") by words, the most frequent with the lowest index; a line of it ends in `<eos>`.

    Arguments and errors as of `load_characters`.
    """
    one_of("word corpus", name, WORDS)
    return WORDS[name](cache, **_known(name, options))


def _known(name: str, options: dict) -> dict:
    takes = MADE[name].OPTIONS if name in MADE else ()
    for option in options:
        if option not in takes:
            valid = ", ".join(takes) or "no options"
            raise ReproError(f"unknown option {option!r} of the text corpus {name!r}: it takes {valid}")
    return options


def read_text(path: Path) -> str:
    """The text of a UTF-8 file (a byte order mark is no part of it), unpacked if its name ends in .gz, line ends as they are.

    Raises ReproError naming the file when it is missing, empty, truncated or not UTF-8.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ReproError(f"{path} is not UTF-8 at byte {error.start}: {error.reason}; fetch it again") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ReproError(f"{path} is truncated or not a gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise ReproError(f"cannot read {path}: {error.strerror}; fetch it again") from error
    if not text.strip():
        raise ReproError(f"{path} is empty: a corpus file holds at least one line of text")
    return text


def read_lines(path: Path) -> list[str]:
    """The sentences of a file that has one a line, stripped.

    Raises ReproError as `read_text`, for an empty line, and for a carriage return within one.
    """
    lines = [line.strip() for line in read_text(path).removesuffix("\n").split("\n")]
    for number, line in enumerate(lines, start=1):
        if not line:
            raise ReproError(f"{path}, line {number} is empty: every line holds one sentence")
        if "\r" in line:
            raise ReproError(f"{path}, line {number} has a carriage return within: lines end in \\n or \\r\\n")
    return lines


def sentence_corpus(name: str, files: dict[str, Path], symbols: Callable[[str], list[str]]) -> TextCorpus:
    """The files of the three splits, one sentence a line, as one corpus; the vocabulary is that of "train".

    `symbols`: of a sentence, with its end: `words` or `characters`. Raises ReproError naming file, line and symbol for a symbol
    that "train" lacks, and as `read_lines`.
    """
    sentences = {split: [symbols(line) for line in read_lines(path)] for split, path in files.items()}
    vocabulary = Vocabulary(by_frequency(chain.from_iterable(sentences["train"])))

    def encode(split: str) -> np.ndarray:
        numbered = enumerate(sentences[split], start=1)
        lines = (vocabulary.encode(sentence, f"{files[split]}, line {number}") for number, sentence in numbered)
        return np.array(list(chain.from_iterable(lines)))

    return TextCorpus(name, vocabulary, {split: encode(split) for split in files})


def words(sentence: str) -> list[str]:
    return [*sentence.split(), END]


def characters(sentence: str) -> list[str]:
    return [*sentence, "\n"]


def contiguous_batches(tokens: np.ndarray, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, targets), each int64 (T, `batch`), of windows that follow each other: the state is carried between them.

    The text is cut into `batch` streams of equal length, whatever is over at its end is left out; targets are the tokens
    one step later (Zaremba et al. 2014, section 4.1). T is `length`, in the last window less, so that all targets occur.
    Raises ReproError for a batch or length below 1 and for a text with fewer than two symbols a stream.
    """
    for name, value in {"batch": batch, "length": length}.items():
        if value < 1:
            raise ReproError(f"{name} of the contiguous batches is {value}: it must be at least 1")
    steps = len(tokens) // batch
    if steps < 2:
        raise ReproError(f"{len(tokens)} symbols are too few for {batch} streams: each needs at least 2")
    streams = torch.from_numpy(tokens[: steps * batch].reshape(batch, steps).T.copy())
    for start in range(0, steps - 1, length):
        stop = min(start + length, steps - 1)
        yield streams[start:stop], streams[start + 1 : stop + 1]


def _ptb(cache: Path | None, symbols: Callable[[str], list[str]]) -> TextCorpus:
    root = registry.locate("ptb", cache)
    return sentence_corpus("ptb", {split: root / file for split, file in PTB_FILES.items()}, symbols)


def _shakespeare(cache: Path | None) -> TextCorpus:
    text = read_text(registry.locate("tinyshakespeare", cache) / "input.txt")
    first, second = (len(text) * percent // 100 for percent in SHAKESPEARE_PERCENT)
    return _corpus("tinyshakespeare", {"train": text[:first], "validation": text[first:second], "test": text[second:]})


def _made_characters(cache: Path | None, **options) -> TextCorpus:
    return _corpus("made", {split: made.text for split, made in madetext.load(**options).items()})


def _made_language(cache: Path | None, **options) -> TextCorpus:
    splits = madepairs.load(**options)
    texts = {split: "".join(" ".join(target) + "\n" for _, target in pairs) for split, pairs in splits.items()}
    return _corpus("madelanguage", texts)


def _made_words(cache: Path | None, **options) -> TextCorpus:
    """Punctuation marks are words of their own."""
    texts = {split: made.text.replace("\n", f" {END} ") for split, made in madetext.load(**options).items()}
    return _corpus("made", {split: re.findall(rf"{END}|\w+|[^\w\s]", text) for split, text in texts.items()})


def _corpus(name: str, splits: dict[str, Sequence[str]]) -> TextCorpus:
    """Of one text cut into splits: the vocabulary is that of the whole."""
    vocabulary = Vocabulary(by_frequency(chain.from_iterable(splits.values())))
    return TextCorpus(name, vocabulary, {split: np.array(vocabulary.encode(symbols)) for split, symbols in splits.items()})


MADE = {"made": madetext, "madelanguage": madepairs}
CHARACTERS = {
    "ptb": partial(_ptb, symbols=characters),
    "tinyshakespeare": _shakespeare,
    "made": _made_characters,
    "madelanguage": _made_language,
}
WORDS = {"ptb": partial(_ptb, symbols=words), "made": _made_words}
