"""Symbols (characters or words) and their indices."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from repro.errors import ReproError


@dataclass(frozen=True)
class Vocabulary:
    """Symbol i of `symbols` has index i. With `unknown`, one of them, every other symbol is read as that one."""

    symbols: tuple[str, ...]
    unknown: str | None = None

    def __len__(self) -> int:
        return len(self.symbols)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {symbol: index for index, symbol in enumerate(self.symbols)}

    def encode(self, symbols: Iterable[str], where: str = "the text") -> list[int]:
        """Indices of `symbols` (of the characters, if it is a string).

        Raises ReproError naming `where` and the symbol, if it is not in the vocabulary and that has no `unknown`.
        """
        if self.unknown is not None:
            fallback = self._index[self.unknown]
            return [self._index.get(symbol, fallback) for symbol in symbols]
        try:
            return [self._index[symbol] for symbol in symbols]
        except KeyError as error:
            known = f"the vocabulary has {len(self)} symbols"
            raise ReproError(f"{where}: unknown symbol {error.args[0]!r}; {known}") from error

    def decode(self, indices: Iterable[int]) -> list[str]:
        return [self.symbols[index] for index in indices]


def by_frequency(symbols: Iterable[str], least: int = 1) -> tuple[str, ...]:
    """The distinct symbols that occur at least `least` times: the most frequent first, equally frequent ones by code."""
    counts = Counter(symbols)
    return tuple(sorted((symbol for symbol, count in counts.items() if count >= least), key=lambda s: (-counts[s], s)))


# Of sentences that are batched with padding and written word by word; at the indices 0 to 3 of `sentence_vocabulary`.
MARKS = PADDING, START, STOP, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"


def sentence_vocabulary(sentences: Iterable[Iterable[str]], least: int = 1) -> Vocabulary:
    """`MARKS`, then the words that occur at least `least` times; others are read as `<unk>`."""
    if least < 1:
        raise ReproError(f"the least count of a word is {least}: it must be at least 1")
    words = by_frequency(chain.from_iterable(sentences), least)
    return Vocabulary((*MARKS, *(word for word in words if word not in MARKS)), unknown=UNKNOWN)
