"""What a collective costs in the alpha-beta-gamma model, as small formulas: ours, exact for our schedules, and the paper's.

The machine is the usual one (Thakur et al. 2005; Chan et al. 2007), and PCIe as Wang et al. 2017 describe it in section 3.1:
each rank sends one message while it receives one, at full speed, whoever the partners are. Formulas are for n bytes, in blocks
of b bytes, over p ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from repro.collectives.schedules import ALGORITHMS, COLLECTIVES
from repro.errors import ReproError, one_of


@dataclass(frozen=True)
class Link:
    """Constants of a message of n bytes, T = alpha + beta n + gamma n (Wang et al. 2017, Eq. 1).

    `alpha`: latency, seconds; `beta`: transfer, seconds per byte; `gamma`: reduction, seconds per byte, only where the target
    adds what arrives.
    """

    alpha: float
    beta: float
    gamma: float = 0.0

    def __post_init__(self):
        if not all(0 <= constant < math.inf for constant in (self.alpha, self.beta, self.gamma)):
            raise ReproError(f"{self}: alpha (s), beta and gamma (s per byte) should be finite and not negative")


class Terms(NamedTuple):
    """What lies one after another on the longest path of a schedule: messages, bytes sent, bytes reduced."""

    messages: float
    sent: float
    reduced: float


def terms(collective: str, algorithm: str, ranks: int, nbytes: float, block: float | None = None) -> Terms:
    """Coefficients of alpha, beta and gamma in the time of `repro.collectives.schedules.schedule`.

    `nbytes` of the message; `block`: bytes in a block of the linear pipeline and of rings, None for one block. Lengths are
    taken as divisible into the parts that the algorithm makes of them; last blocks may be shorter, but for the pipeline's
    allreduce. Then the time is exactly that of the simulator, except where early messages delay others at the one port of a
    rank. There it is a lower bound, which the simulator exceeded by up to a quarter (for up to 17 ranks):
    - linear pipeline, allreduce, gamma > 0, more than 4 ranks and more than 4 blocks;
    - two-way ring, broadcast;
    - bidirectional exchange, reduce and allreduce, where the ranks beyond a power of two are less than half as many as it.

    Raises ReproError for unknown names and numbers out of range.
    """
    _check(collective, ranks, nbytes, block)
    one_of("algorithm", algorithm, ALGORITHMS)
    if ranks == 1 or nbytes == 0:
        return Terms(0, 0, 0)
    found = _TERMS[algorithm](collective, ranks, nbytes, min(block or nbytes, nbytes))
    return found._replace(reduced=0) if collective == "broadcast" else found


def cost(collective: str, algorithm: str, ranks: int, nbytes: float, link: Link, block: float | None = None) -> float:
    """Seconds that our schedule takes; see `terms`."""
    return _seconds(terms(collective, algorithm, ranks, nbytes, block), link)


def _linear_pipeline(collective: str, p: int, n: float, b: float) -> Terms:
    """The last of n/b blocks enters the chain after the others, n bytes in all, and crosses p - 2 more links.

    The paper counts p - 1 + n/b messages, one too many: its Figure 2a has p - 2 + n/b.

    Allreduce: an inner rank gets each block twice, from either side, through its one port: that takes 2 (n/b) messages, and
    before and after them blocks cross the other links. Two ranks have no inner one, and one block meets no other.
    """
    blocks = math.ceil(n / b)
    there = p - 2 + blocks
    if collective != "allreduce":
        return Terms(there, (p - 2) * b + n, (p - 2) * b + n)
    back = p - 3 + blocks if p > 2 and blocks > 1 else p - 1
    return Terms(there + back, (there + back) * n / blocks, there * n / blocks)


def _ring(collective: str, p: int, n: float, b: float) -> Terms:
    """2 (p - 1) turns of n/p bytes (Patarasu and Yuan 2009); half of them as a binomial tree if there is a root."""
    turns = (p - 1) * math.ceil(n / p / b)
    return Terms(2 * turns if collective == "allreduce" else turns + _levels(p), 2 * _others(p) * n, _others(p) * n)


def _two_way_ring(collective: str, p: int, n: float, b: float) -> Terms:
    """Two rings of n/2 bytes that share each rank's port: twice the messages, as many bytes."""
    one = _ring(collective, p, n / 2, b)
    return Terms(2 * one.messages, 2 * one.sent, 2 * one.reduced)


def _minimum_spanning_tree(collective: str, p: int, n: float, b: float) -> Terms:
    """Whole messages on each level of a binomial tree, up and down it for allreduce (Chan et al. 2007)."""
    trips = 2 if collective == "allreduce" else 1
    return Terms(trips * _levels(p), trips * _levels(p) * n, _levels(p) * n)


def _bidirectional_exchange(collective: str, p: int, n: float, b: float) -> Terms:
    """Recursive halving and doubling over the largest power of two (Thakur et al. 2005), whole messages for the rest."""
    paired = 2 ** math.floor(math.log2(p))
    trips = (2 if collective == "allreduce" else 1) if p > paired else 0
    reduced = (n if trips else 0) + _others(paired) * n
    return Terms(2 * _levels(paired) + trips, 2 * _others(paired) * n + trips * n, reduced)


def _all_to_all(collective: str, p: int, n: float, b: float) -> Terms:
    """p - 1 parts to or from each other rank, twice."""
    return Terms(2 * (p - 1), 2 * _others(p) * n, _others(p) * n)


_TERMS = {
    "linear pipeline": _linear_pipeline,
    "ring": _ring,
    "two-way ring": _two_way_ring,
    "minimum spanning tree": _minimum_spanning_tree,
    "bidirectional exchange": _bidirectional_exchange,
    "all-to-all": _all_to_all,
}


def _levels(p: int) -> int:
    """Levels of a binomial tree of p ranks: log2 p, rounded up."""
    return math.ceil(math.log2(p))


def _others(p: int) -> float:
    """The part of a message that is not a rank's own."""
    return (p - 1) / p


PRINTED_ALGORITHMS = ("linear pipeline", "minimum spanning tree", "bidirectional exchange")


def printed_cost(collective: str, algorithm: str, ranks: int, nbytes: float, link: Link, block: float | None = None) -> float:
    """Seconds by Table 1 of Wang et al. 2017, for its three algorithms; log is log2, without ceilings, as there.

    The body of the table is not known to us. Its linear pipeline and tree, and the parts of the bidirectional exchange, stand
    in the text of the proof of Proposition 1; the sums of those parts, and the tree's allreduce as broadcast plus reduce, are
    ours. The paper takes allgather as p - 1 messages in a broadcast, but as log p in an allreduce.
    """
    _check(collective, ranks, nbytes, block)
    one_of("algorithm", algorithm, PRINTED_ALGORITHMS)
    p, n, b, log = ranks, nbytes, min(block or nbytes, nbytes), math.log2(ranks)
    if p == 1 or n == 0:
        return 0.0
    if algorithm == "linear pipeline":
        pipeline = Terms(p - 1 + n / b, b * (p - 1) + n, b * (p - 1) + n)
        trips = 2 if collective == "allreduce" else 1
        found = Terms(trips * pipeline.messages, trips * pipeline.sent, pipeline.reduced)
    elif algorithm == "minimum spanning tree":
        trips = 2 if collective == "allreduce" else 1
        found = Terms(trips * log, trips * log * n, log * n)
    else:
        found = Terms(log + p - 1 if collective == "broadcast" else 2 * log, 2 * _others(p) * n, _others(p) * n)
    return _seconds(found._replace(reduced=0) if collective == "broadcast" else found, link)


def limit(collective: str, algorithm: str, ranks: int, gamma_over_beta: float = 0.0) -> float:
    """The limit, for long messages, of the time of `algorithm` over that of the linear pipeline, by the paper's own costs.

    Bytes only: alpha -> 0 at n >> b, or n -> infinity with b growing more slowly, as `best_block` does. The paper drops gamma.
    By Proposition 1 the limit is "up to 2" for the bidirectional exchange. It is 2 (p - 1) / p for broadcast and reduce,
    but (p - 1) / p for allreduce, which the pipeline loses; against the tree it is log2 p for all three.
    `cost` has the same limits for powers of two, but 1 for allreduce between two ranks: no port there takes a block twice.
    """
    _check(collective, ranks, 1, None)
    one_of("algorithm", algorithm, PRINTED_ALGORITHMS)
    if ranks == 1:
        raise ReproError("one rank exchanges nothing: a ratio of times needs at least 2")
    link = Link(0.0, 1.0, gamma_over_beta)
    # In the limit a pipeline is filled at no cost, which is what its formula says for empty blocks.
    pipeline = {"broadcast": 1, "reduce": 1 + gamma_over_beta, "allreduce": 2 + gamma_over_beta}[collective]
    return 1.0 if algorithm == "linear pipeline" else printed_cost(collective, algorithm, ranks, 1, link) / pipeline


def best_block(nbytes: int, ranks: int, link: Link) -> int:
    """The block b* = sqrt(n alpha / ((p - 1) beta)) of the linear pipeline, in whole bytes from 1 to n.

    It is the minimum over b of the paper's broadcast, (p - 1 + n/b) alpha + (b (p - 1) + n) beta: the derivative,
    -n alpha / b^2 + (p - 1) beta, is 0 there. The paper does not derive it, and takes 64 KB. For a reduce, put beta + gamma for
    beta; for allreduce, 2 alpha and 2 beta + gamma, which is the same b* if gamma is 0. Our schedules cross one link less:
    p - 2 for p - 1.
    """
    if nbytes < 1 or ranks < 1:
        raise ReproError(f"the best block of {nbytes} bytes over {ranks} ranks: it takes at least 1 of each")
    if ranks == 1 or link.beta == 0:
        return nbytes
    return max(1, min(nbytes, round(math.sqrt(nbytes * link.alpha / ((ranks - 1) * link.beta)))))


def algorithm_bandwidth(nbytes: int, seconds: float) -> float:
    """n / t in bytes per second: what the caller sees ("algbw" of nccl-tests)."""
    if not (nbytes >= 0 and seconds > 0):
        raise ReproError(f"{nbytes} bytes in {seconds} s: need a size and a positive time")
    return nbytes / seconds


def bus_bandwidth(collective: str, ranks: int, nbytes: int, seconds: float) -> float:
    """Bytes per second and port that the best algorithm would need to be as fast ("busbw" of nccl-tests).

    It is comparable with a link's 1 / beta for any number of ranks. With B bytes per second in and out of each rank:
    - allreduce: every element is added p - 1 times, so p - 1 ranks' values leave their rank, and the sum has p - 1 ranks to
      reach, 2 (p - 1) n bytes through p ports: t >= 2 (p - 1) / p * n / B, busbw = algbw * 2 (p - 1) / p;
    - broadcast, reduce: n bytes leave, or reach, the root: t >= n / B, busbw = algbw.
    """
    _check(collective, ranks, nbytes, None)
    factor = 2 * _others(ranks) if collective == "allreduce" else 1.0
    return algorithm_bandwidth(nbytes, seconds) * factor


def _seconds(path: Terms, link: Link) -> float:
    return path.messages * link.alpha + path.sent * link.beta + path.reduced * link.gamma


def _check(collective: str, ranks: int, nbytes: float, block: float | None) -> None:
    one_of("collective", collective, COLLECTIVES)
    if ranks < 1 or not 0 <= nbytes < math.inf or (block is not None and not block > 0):
        raise ReproError(
            f"{collective} of {nbytes} bytes over {ranks} ranks, block {block}: it takes at least 1 rank, 0 or more bytes and "
            "a positive block"
        )
