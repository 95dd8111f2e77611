"""Collectives as schedules: who sends which part of the message to whom, in time steps. Real ranks and the simulator play them.

A rank issues its sends of a step once the receives of earlier steps that they depend on are done, and adds what arrives to its
own part where `reduce`. In a step each rank sends at most one transfer in a direction, so on equal, full-duplex links without
contention a schedule takes one message time a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from repro.errors import ReproError, one_of

COLLECTIVES = ("broadcast", "reduce", "allreduce")


class Transfer(NamedTuple):
    """Elements [start, stop) of the message go from rank `source` to `target` in time step `step`, never empty.

    `reduce`: the target adds them to its own; otherwise they replace its own.
    """

    step: int
    source: int
    target: int
    start: int
    stop: int
    reduce: bool


Transfers = Iterator[Transfer]


@lru_cache(maxsize=256)
def schedule(
    collective: str, algorithm: str, ranks: int, length: int, block: int | None = None, root: int = 0
) -> tuple[Transfer, ...]:
    """The transfers of a collective over a message of `length` elements, by time step.

    `block`: elements in a block of the linear pipeline and of rings, at least 1; None: whole messages. Other algorithms have
    none. `root`: where a broadcast starts and a reduce ends. Raises ReproError for unknown names and numbers out of range.
    """
    one_of("collective", collective, COLLECTIVES)
    one_of("algorithm", algorithm, ALGORITHMS)
    if ranks < 1 or length < 0 or (block is not None and block < 1) or not 0 <= root < ranks:
        raise ReproError(
            f"{collective} over {ranks} ranks of {length} elements, block {block}, root {root}: it takes at least 1 rank, 0 or "
            "more elements, a block of at least 1 and a root among the ranks"
        )
    found = _BUILDERS[algorithm](collective, ranks, length, block)
    # Builders call the root 0; a ring or chain may begin anywhere.
    moved = (t._replace(source=(t.source + root) % ranks, target=(t.target + root) % ranks) for t in found if t.start < t.stop)
    return tuple(sorted(moved, key=lambda transfer: transfer.step))


def steps(transfers: tuple[Transfer, ...]) -> int:
    """How many time steps a schedule takes."""
    return max((transfer.step for transfer in transfers), default=-1) + 1


def figure2_allreduce(ranks: int, blocks: int) -> tuple[Transfer, ...]:
    """The allreduce of the paper's Figure 2c, an element a block: 9 steps for 4 blocks on 3 ranks.

    Blocks are summed along 0 -> 1 -> ... -> p-1 -> 0; what arrives at rank 0 goes round once more, as soon as rank 0 has sent
    its own last block and its link is free.
    """
    summed = [
        Transfer(k + hop, hop, (hop + 1) % ranks, k, k + 1, reduce=hop + 1 < ranks)
        for k in range(blocks)
        for hop in range(ranks)
    ]
    first = max(blocks, ranks)
    spread = [Transfer(first + k + hop, hop, hop + 1, k, k + 1, False) for k in range(blocks) for hop in range(ranks - 1)]
    return tuple(sorted(summed + spread, key=lambda transfer: transfer.step))


def _parts(length: int, count: int) -> list[tuple[int, int]]:
    """`count` contiguous parts of nearly equal size, some empty if there are more than elements."""
    return [(i * length // count, (i + 1) * length // count) for i in range(count)]


def _blocks(start: int, stop: int, block: int | None) -> list[tuple[int, int]]:
    return [(at, min(at + block, stop)) for at in range(start, stop, block)] if block else [(start, stop)]


def _linear_pipeline(collective: str, ranks: int, length: int, block: int | None) -> Transfers:
    """Wang et al. 2017, section 3: a chain in which a rank receives a block while it sends the one before.

    Allreduce: each block is summed up to the last rank and comes back along the same links in the other direction.
    """
    for k, (start, stop) in enumerate(_blocks(0, length, block)):
        for hop in range(ranks - 1):
            far = ranks - 1 - hop
            if collective == "broadcast":
                yield Transfer(k + hop, hop, hop + 1, start, stop, False)
            elif collective == "reduce":
                yield Transfer(k + hop, far, far - 1, start, stop, True)
            else:
                yield Transfer(k + hop, hop, hop + 1, start, stop, True)
                yield Transfer(k + ranks - 1 + hop, far, far - 1, start, stop, False)


def _ring(collective: str, ranks: int, length: int, block: int | None) -> Transfers:
    """Ring reduce-scatter and ring allgather (Patarasu and Yuan 2009); scatter and gather of rooted collectives by a tree."""
    yield from _ring_within(collective, ranks, 0, length, block)


def _two_way_ring(collective: str, ranks: int, length: int, block: int | None) -> Transfers:
    """Two rings at once, each with half of the message: one turns forwards, one backwards."""
    yield from _ring_within(collective, ranks, 0, length // 2, block)
    for t in _ring_within(collective, ranks, length // 2, length, block):
        yield t._replace(source=-t.source % ranks, target=-t.target % ranks)


def _ring_within(collective: str, ranks: int, first: int, last: int, block: int | None) -> Transfers:
    parts = [(first + start, first + stop) for start, stop in _parts(last - first, ranks)]
    levels = (ranks - 1).bit_length()
    if collective == "broadcast":
        yield from _tree_scatter(parts, 0)
        yield from _turns(parts, levels, 0, False, block)
    else:
        turns = (ranks - 1) * max(len(_blocks(start, stop, block)) for start, stop in parts)
        yield from _turns(parts, 0, 1, True, block)
        if collective == "reduce":
            yield from _tree_gather(parts, turns)
        else:
            yield from _turns(parts, turns, 0, False, block)


def _turns(parts: list[tuple[int, int]], step: int, ahead: int, reduce: bool, block: int | None) -> Transfers:
    """p - 1 turns of a ring, in which rank r first sends part r - `ahead`; at the end of a reduce-scatter r owns part r."""
    ranks = len(parts)
    most = max(len(_blocks(start, stop, block)) for start, stop in parts)
    for turn in range(ranks - 1):
        for source in range(ranks):
            for j, span in enumerate(_blocks(*parts[(source - ahead - turn) % ranks], block)):
                yield Transfer(step + turn * most + j, source, (source + 1) % ranks, *span, reduce)


def _minimum_spanning_tree(collective: str, ranks: int, length: int, block: int | None) -> Transfers:
    """Binomial tree, whole messages (Chan et al. 2007; Caffe's trees): allreduce is reduce, then broadcast."""
    levels = (ranks - 1).bit_length()
    for level in range(levels):
        near = 1 << level
        for rank in range(0, ranks - near, 2 * near):
            if collective != "broadcast":
                yield Transfer(level, rank + near, rank, 0, length, True)
            if collective != "reduce":
                step = levels - 1 - level + (levels if collective == "allreduce" else 0)
                yield Transfer(step, rank, rank + near, 0, length, False)


def _bidirectional_exchange(collective: str, ranks: int, length: int, block: int | None) -> Transfers:
    """Recursive halving and doubling (Thakur et al. 2005; Chan et al. 2007).

    Ranks beyond the largest power of two hand their message to a partner first, and get the result from it at the end.
    """
    paired = 1 << (ranks.bit_length() - 1)
    levels, extra = paired.bit_length() - 1, range(paired, ranks)
    parts = _parts(length, paired)
    step = 0
    if collective == "broadcast":
        yield from _tree_scatter(parts, 0)
        step = levels
    else:
        for rank in extra:
            yield Transfer(0, rank, rank - paired, 0, length, True)
        step = 1 if extra else 0
        for level in reversed(range(levels)):
            half = 1 << level
            for rank in range(paired):
                first = (rank ^ half) & -half
                yield Transfer(step, rank, rank ^ half, parts[first][0], parts[first + half - 1][1], True)
            step += 1
    if collective == "reduce":
        yield from _tree_gather(parts, step)
        return
    for level in range(levels):
        half = 1 << level
        for rank in range(paired):
            first = rank & -half
            yield Transfer(step + level, rank, rank ^ half, parts[first][0], parts[first + half - 1][1], False)
    for rank in extra:
        yield Transfer(step + levels, rank - paired, rank, 0, length, False)


def _all_to_all(collective: str, ranks: int, length: int, block: int | None) -> Transfers:
    """Every rank sends each other one its part directly, in an order in which no two have the same target."""
    parts = _parts(length, ranks)
    step = 0
    for distance in range(1, ranks):
        if collective == "broadcast":
            yield Transfer(step, 0, distance, *parts[distance], False)
        else:
            for rank in range(ranks):
                target = (rank + distance) % ranks
                yield Transfer(step, rank, target, *parts[target], True)
        step += 1
    for distance in range(1, ranks):
        if collective == "reduce":
            yield Transfer(step, distance, 0, *parts[distance], False)
        else:
            for rank in range(ranks):
                yield Transfer(step, rank, (rank + distance) % ranks, *parts[rank], False)
        step += 1


def _tree_scatter(parts: list[tuple[int, int]], step: int) -> Transfers:
    """Binomial tree: rank 0 hands out one part a rank."""
    for t in _tree_gather(parts, 0):
        levels = (len(parts) - 1).bit_length()
        yield t._replace(step=step + levels - 1 - t.step, source=t.target, target=t.source)


def _tree_gather(parts: list[tuple[int, int]], step: int) -> Transfers:
    """Binomial tree: rank 0 collects one part a rank."""
    ranks = len(parts)
    for level in range((ranks - 1).bit_length()):
        near = 1 << level
        for rank in range(near, ranks, 2 * near):
            last = min(rank + near, ranks) - 1
            yield Transfer(step + level, rank, rank - near, parts[rank][0], parts[last][1], False)


_BUILDERS = {
    "linear pipeline": _linear_pipeline,
    "ring": _ring,
    "two-way ring": _two_way_ring,
    "minimum spanning tree": _minimum_spanning_tree,
    "bidirectional exchange": _bidirectional_exchange,
    "all-to-all": _all_to_all,
}
ALGORITHMS = tuple(_BUILDERS)
