"""What the simulator says beyond this machine: Figure 2's time steps, a bridge between sockets, hundreds of hosts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pandas as pd

from repro.collectives.costs import Link, best_block
from repro.collectives.schedules import Transfer, figure2_allreduce, schedule, steps
from repro.collectives.simulator import Machine, play
from repro.report.published import Published, published_value
from repro.studies.wang2017 import arithmetic
from repro.studies.wang2017.arithmetic import BE, LP, MST, STUDY

RANKS, BLOCKS = 3, 4  # of Figure 2
RING, TWO_WAY, DIRECT = "ring", "two-way ring", "all-to-all"

# Ours: a cluster of 100 Gbit/s links with the latency of a good network stack, and switches of 16 hosts with one such link up.
CLUSTER = Link(20e-6, 8e-11)
SWITCH = 16
MESSAGE = 256 * 10**6  # bytes
CLUSTER_RANKS = (4, 16, 64, 256)
CLUSTER_ALGORITHMS = (LP, RING, TWO_WAY, MST, BE, DIRECT)
SOCKET_RANKS = range(2, 9)


def figure2() -> dict[str, tuple[Transfer, ...]]:
    """The data flows of Figure 2, an element a block; the paper reduces to the last GPU."""
    return {
        "a: broadcast": schedule("broadcast", LP, RANKS, BLOCKS, 1),
        "b: reduce": tuple(_mirrored(schedule("reduce", LP, RANKS, BLOCKS, 1))),
        "c: allreduce, as in the paper": figure2_allreduce(RANKS, BLOCKS),
        "d: allreduce, there and back (ours)": schedule("allreduce", LP, RANKS, BLOCKS, 1),
    }


def _mirrored(transfers: tuple[Transfer, ...]) -> Iterator[Transfer]:
    """With ranks counted from the other end: the paper's chain leads to the last GPU."""
    for t in transfers:
        yield t._replace(source=RANKS - 1 - t.source, target=RANKS - 1 - t.target)


def figure2_steps() -> Iterator[tuple[str, Published | None, int]]:
    """(data flow, the paper's steps, steps of our schedule)."""
    printed = {
        "a: broadcast": ("one collective", "steps"),
        "b: reduce": ("one collective", "steps"),
        "c: allreduce, as in the paper": ("allreduce", "steps"),
    }
    for name, transfers in figure2().items():
        found = published_value(STUDY, "figure2", *printed[name]) if name in printed else None
        yield name, found, steps(transfers)


@lru_cache(maxsize=512)
def cluster_seconds(algorithm: str, ranks: int, switch: int | None) -> float:
    """Simulated seconds of an allreduce of `MESSAGE` bytes in the cluster, behind switches of `switch` hosts if given."""
    # Elements of 1 KB keep numbers small; sizes divide.
    kilobytes = MESSAGE // 1000
    block = max(1, best_block(MESSAGE, ranks, CLUSTER) // 1000) if algorithm == LP else None
    machine = Machine.switches(ranks, CLUSTER, switch) if switch else Machine.uniform(ranks, CLUSTER)
    return play(schedule("allreduce", algorithm, ranks, kilobytes, block), machine, item_bytes=1000).seconds


def cluster_table() -> pd.DataFrame:
    """Milliseconds by algorithm, switches and number of ranks."""
    return pd.DataFrame(
        [
            {"algorithm": algorithm, "network": f"switches of {switch}" if switch else "one switch"}
            | {f"{ranks} hosts": 1e3 * cluster_seconds(algorithm, ranks, switch) for ranks in CLUSTER_RANKS}
            for switch in (None, SWITCH)
            for algorithm in CLUSTER_ALGORITHMS
        ]
    )


@lru_cache(maxsize=64)
def socket_seconds(algorithm: str, ranks: int) -> float:
    """Simulated seconds of a broadcast of the paper's message, four ranks a socket, a bridge twice as slow as the links."""
    link = arithmetic.paper_link()
    machine = Machine.two_sockets(ranks, link, Link(2 * link.alpha, 2 * link.beta))
    kilobytes = arithmetic.paper_message() // 1000
    block = arithmetic.paper_block() // 1000 if algorithm == LP else None
    return play(schedule("broadcast", algorithm, ranks, kilobytes, block), machine, item_bytes=1000).seconds


def socket_table() -> pd.DataFrame:
    """Milliseconds of a broadcast by number of GPUs."""
    return pd.DataFrame(
        [
            {"algorithm": algorithm} | {f"{ranks} GPUs": 1e3 * socket_seconds(algorithm, ranks) for ranks in SOCKET_RANKS}
            for algorithm in (LP, MST, BE)
        ]
    )
