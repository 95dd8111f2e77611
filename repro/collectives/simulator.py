"""Plays the schedule of a collective on a described machine, event by event, and tells when each transfer starts and ends.

The formulas of `repro.collectives.costs` are tested against it, and it goes where they do not: half-duplex ports, switches and
bridges that transfers share, blocks of unequal length, hundreds of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from repro.collectives.costs import Link
from repro.collectives.schedules import Transfer
from repro.errors import ReproError, one_of

DUPLEX = ("full", "half", "mesh")
# Time is counted in whole ticks of 2^-100 s: sums are exact, so that times that are equal on paper are equal, whatever their
# order of summation, and who comes first is never decided by rounding.
_TICK_BITS = 100


@dataclass(frozen=True)
class Machine:
    """Ranks in groups (sockets, switches): what a transfer occupies, and for how long.

    `link`: constants of a transfer within a group; `bridge`: of one between groups, which takes the pace of its slowest part
    (the target adds at the pace of `link`). `groups`: the group of each rank. `duplex`: "full", a rank receives one message
    while it sends one, and so does a group to and from the others; "half", one message in either direction; "mesh", as
    "full", but each rank has a link of its own to every other one, and uses all of them at once.
    """

    link: Link
    bridge: Link
    groups: tuple[int, ...]
    duplex: str = "full"

    def __post_init__(self):
        one_of("duplex", self.duplex, DUPLEX)
        if not self.groups:
            raise ReproError("a machine without ranks: give the group of at least one")

    @classmethod
    def uniform(cls, ranks: int, link: Link, duplex: str = "full") -> Machine:
        """Equal ranks behind one switch that never blocks."""
        return cls(link, link, (0,) * ranks, duplex)

    @classmethod
    def two_sockets(cls, ranks: int, link: Link, bridge: Link, first: int = 4) -> Machine:
        """Ranks below `first` on one socket, the others on a second; what crosses in one direction shares the bridge (QPI)."""
        return cls(link, bridge, tuple(int(rank >= first) for rank in range(ranks)))

    @classmethod
    def switches(cls, ranks: int, link: Link, size: int) -> Machine:
        """Switches of `size` ranks each, with one port up and one down to the others, as fast as the ranks' (section 3.1)."""
        return cls(link, link, tuple(rank // size for rank in range(ranks)))

    @property
    def ranks(self) -> int:
        return len(self.groups)

    def path(self, source: int, target: int) -> tuple[Link, tuple[tuple, ...]]:
        """Constants of a transfer, and the ports and links that it has for itself from its start to its end."""
        here, there = self.groups[source], self.groups[target]
        out, into = ("port", "port") if self.duplex == "half" else ("out", "in")
        mesh = (("link", source, target),)
        ends = mesh if self.duplex == "mesh" else ((out, "rank", source), (into, "rank", target))
        if here == there:
            return self.link, ends
        return self.bridge, (*ends, (out, "group", here), (into, "group", there))


class Entry(NamedTuple):
    """A transfer and the seconds at which it starts and ends; the end is when the target has added what arrived."""

    transfer: Transfer
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Every transfer of a schedule, in the schedule's order."""

    entries: tuple[Entry, ...]

    @property
    def seconds(self) -> float:
        """When the last transfer ends."""
        return max((entry.end for entry in self.entries), default=0.0)


def play(transfers: Sequence[Transfer], machine: Machine, item_bytes: int = 4, overlapped_reduce: bool = False) -> Timeline:
    """Play a schedule, sorted by step, of a message of elements of `item_bytes` bytes each.

    A rank issues its sends in the schedule's order, each once the receives of earlier steps in its span, and all receives
    listed before those, are done (as in `repro.collectives.programs`). An issued transfer starts as soon as all of its path is
    free; of those that wait for the same part, the first in the schedule goes first, as receives are posted in that order.
    It takes alpha + beta n, plus gamma n if it reduces (Wang et al. 2017, Eq. 1), and keeps its path busy meanwhile;
    with `overlapped_reduce` the path is free after alpha + beta n, and the target adds one message while the next one arrives.

    Raises ReproError if the schedule has ranks that the machine has not.
    """
    if outside := next((t for t in transfers if max(t.source, t.target) >= machine.ranks), None):
        raise ReproError(f"{outside} on a machine of {machine.ranks} ranks: describe one with all ranks of the schedule")
    routes = _routes({(t.source, t.target) for t in transfers}, machine)
    gamma = _ticks(machine.link.gamma)
    ranks = _Ranks(transfers, machine.ranks)
    parts = _Parts([routes[t.source, t.target].path for t in transfers])
    starts, ends, adding_until = [0] * len(transfers), [0] * len(transfers), [0] * machine.ranks
    events: list[tuple[int, int, int | None]] = []  # (time, transfer, ticks of adding that are still to come; None: it is over)
    now = 0
    for rank in range(machine.ranks):
        parts.request(ranks.issue(rank))
    while True:
        for index in parts.start():
            t = transfers[index]
            nbytes = (t.stop - t.start) * item_bytes
            route = routes[t.source, t.target]
            wire, adding = route.alpha + route.beta * nbytes, gamma * nbytes if t.reduce else 0
            starts[index] = now
            heappush(events, (now + wire, index, adding) if overlapped_reduce else (now + wire + adding, index, 0))
        if not events:
            break
        now = events[0][0]
        while events and events[0][0] == now:  # all that ends now, before anything starts
            _, index, adding = heappop(events)
            target = transfers[index].target
            if adding is not None:
                parts.release(index)
            if adding:
                adding_until[target] = max(adding_until[target], now) + adding
                heappush(events, (adding_until[target], index, None))
            else:
                ends[index] = now
                ranks.receive(index, target)
                parts.request(ranks.issue(target))
    return Timeline(tuple(map(Entry, transfers, map(_seconds, starts), map(_seconds, ends))))


def _ticks(seconds: float) -> int:
    return int(math.ldexp(seconds, _TICK_BITS))


def _seconds(ticks: int) -> float:
    return math.ldexp(ticks, -_TICK_BITS)


class _Route(NamedTuple):
    """Between two ranks: constants in ticks, and the numbers of the parts of the machine on the way."""

    alpha: int
    beta: int
    path: tuple[int, ...]


def _routes(pairs: set[tuple[int, int]], machine: Machine) -> dict[tuple[int, int], _Route]:
    numbers, routes = {}, {}
    for pair in pairs:
        link, path = machine.path(*pair)
        numbered = tuple(numbers.setdefault(part, len(numbers)) for part in path)
        routes[pair] = _Route(_ticks(link.alpha), _ticks(link.beta), numbered)
    return routes


class _Ranks:
    """Which receives of each rank are done, and which sends it may therefore issue."""

    def __init__(self, transfers: Sequence[Transfer], ranks: int):
        self._needs, self._places = _dependences(transfers, ranks)
        sends = [[] for _ in range(ranks)]
        for index, transfer in enumerate(transfers):
            sends[transfer.source].append(index)
        self._sends = [iter(mine) for mine in sends]
        self._next = [next(mine, None) for mine in self._sends]
        self._done = [0] * ranks  # receives done, up to the first that is not
        self._early = [set() for _ in range(ranks)]  # places of those done after it

    def receive(self, index: int, rank: int) -> None:
        early = self._early[rank]
        early.add(self._places[index])
        while self._done[rank] in early:
            early.remove(self._done[rank])
            self._done[rank] += 1

    def issue(self, rank: int) -> Iterator[int]:
        while (index := self._next[rank]) is not None and self._needs[index] <= self._done[rank]:
            self._next[rank] = next(self._sends[rank], None)
            yield index


class _Parts:
    """Parts of the machine, which are busy, and the transfers that wait for them; none holds a part while it waits."""

    def __init__(self, paths: list[tuple[int, ...]]):
        self._paths = paths
        count = 1 + max((part for path in paths for part in path), default=-1)
        self._busy = [False] * count
        self._waiting = [[] for _ in range(count)]  # heaps of transfers
        self._candidates = []  # (transfer, the part that it was waiting for, or None)

    def request(self, issued: Iterable[int]) -> None:
        for index in issued:
            heappush(self._candidates, (index, None))

    def release(self, index: int) -> None:
        for part in self._paths[index]:
            self._busy[part] = False
            self._call(part)

    def start(self) -> Iterator[int]:
        """The transfers that can start now, each from now on in possession of its path."""
        while self._candidates:
            index, part = heappop(self._candidates)
            for other in self._paths[index]:
                if self._busy[other]:
                    heappush(self._waiting[other], index)
                    break
            else:
                for other in self._paths[index]:
                    self._busy[other] = True
                yield index
            if part is not None and not self._busy[part]:
                self._call(part)

    def _call(self, part: int) -> None:
        """The first that waits for a free part is tried; the one after it, if that one does not take the part."""
        if self._waiting[part]:
            heappush(self._candidates, (heappop(self._waiting[part]), part))


def _dependences(transfers: Sequence[Transfer], ranks: int) -> tuple[list[int], list[int]]:
    """For each transfer, how many receives of its source it waits for, and its place among the receives of its target."""
    cuts = sorted({t.start for t in transfers} | {t.stop for t in transfers})
    cell = {cut: i for i, cut in enumerate(cuts)}
    latest = [[0] * len(cuts) for _ in range(ranks)]  # how many receives, up to the latest into this cell
    counts, needs, places = [0] * ranks, [], []
    for _, group in groupby(transfers, attrgetter("step")):
        step = [(t.source, t.target, cell[t.start], cell[t.stop]) for t in group]
        needs += [max(latest[source][start:stop]) for source, _, start, stop in step]
        for _, target, start, stop in step:
            places.append(counts[target])
            counts[target] += 1
            latest[target][start:stop] = [counts[target]] * (stop - start)
    return needs, places
