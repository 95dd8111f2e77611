"""Random draws for the made text corpora: the same on every machine, with their information summed."""

import math
import random
from bisect import bisect
from collections.abc import Container, Sequence
from itertools import accumulate
from typing import TypeVar

from repro.errors import ReproError, one_of

Option = TypeVar("Option")


class Draws:
    """`nats` is the information of all draws so far: the sum of minus the natural logarithms of their probabilities.

    Only `random.Random.random` is drawn from, whose sequence Python keeps the same over versions and machines.
    """

    def __init__(self, seed: str):
        self._random = random.Random(seed)
        self.nats = 0.0

    def chance(self, percent: int) -> bool:
        """True with this probability."""
        return self.weighted({True: percent, False: 100 - percent})

    def weighted(self, weights: dict[Option, int]) -> Option:
        """An option, as often as its weight says."""
        options, bounds = list(weights), list(accumulate(weights.values()))
        drawn = options[bisect(bounds, int(self._random.random() * bounds[-1]))]
        self.nats += math.log(bounds[-1] / weights[drawn])
        return drawn

    def ranked(self, options: Sequence[Option]) -> Option:
        """The first option most often, the n-th about 1 / n as often, as words in a text are."""
        return self.weighted({option: 60 // rank for rank, option in enumerate(options, start=1)})


def check_options(corpus: str, size: str, sizes: Container[str], seed: int) -> None:
    """Raise ReproError unless `size` is one of `sizes` and `seed` a natural number."""
    one_of(f"size of the {corpus} corpus", size, sizes)
    if not isinstance(seed, int) or seed < 0:
        raise ReproError(f"the seed of the {corpus} corpus is {seed}: it must be a natural number")
