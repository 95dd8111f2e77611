"""What one rank does in a schedule: its receives in order, and its sends, each with the receives that it waits for."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from repro.collectives.schedules import Transfer, schedule

_BOTH_WAYS = ("linear pipeline", "two-way ring")  # keep the links to both neighbours busy at once


class Receive(NamedTuple):
    """Elements [start, stop) from rank `source`, to be added or stored; `receipt`: the source waits to hear of it."""

    source: int
    start: int
    stop: int
    reduce: bool
    receipt: bool


class Send(NamedTuple):
    """Elements [start, stop) to rank `target`, once the first `after` receives are done; `receipt`: of the send before it, too.

    A rank that turns from one partner to another waits for the receipt of the first: two messages at once would share its
    link, and the first, on which others wait, would come as late as the second.
    """

    target: int
    start: int
    stop: int
    after: int
    receipt: bool


class Program(NamedTuple):
    """One rank's part of a schedule. Messages between two ranks arrive in the order in which they are sent."""

    receives: tuple[Receive, ...]
    sends: tuple[Send, ...]
    longest_reduce: int  # elements; the room that a receive needs which is to be added


@lru_cache(maxsize=256)
def program(
    rank: int, collective: str, algorithm: str, ranks: int, length: int, block: int | None = None, root: int = 0
) -> Program:
    """The program of `rank` in `schedule(collective, algorithm, ranks, length, block, root)`."""
    transfers = schedule(collective, algorithm, ranks, length, block, root)
    turns = set() if algorithm in _BOTH_WAYS else _last_before_a_turn(transfers)
    arriving = [t for t in transfers if t.target == rank]
    receives = tuple(Receive(t.source, t.start, t.stop, t.reduce, t in turns) for t in arriving)
    sends, before = [], None
    for t in transfers:
        if t.source == rank:
            turned = before in turns
            # A send waits for what arrives in earlier steps in its own span, and for nothing else, so that blocks follow each
            # other closely. After a turn it waits for all of the step before: who wants a receipt must have given those due.
            after = 0
            for count, a in enumerate(arriving, start=1):
                if (a.step < t.step and a.start < t.stop and t.start < a.stop) or (turned and a.step <= before.step):
                    after = count
            sends.append(Send(t.target, t.start, t.stop, after, turned))
            before = t
    return Program(receives, tuple(sends), max((r.stop - r.start for r in receives if r.reduce), default=0))


def _last_before_a_turn(transfers: tuple[Transfer, ...]) -> set[Transfer]:
    """The transfers after which their source sends to another rank."""
    by_source = defaultdict(list)
    for t in transfers:
        by_source[t.source].append(t)
    return {t for sent in by_source.values() for t, following in pairwise(sent) if t.target != following.target}
