"""Trials of wang2017 that exchange messages between real processes: collectives timed, on loopback or on emulated hosts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from repro.engine import Context, Outcome, Record, Trial

if TYPE_CHECKING:
    import numpy as np

    from repro.collectives.hosts import Hosts
    from repro.collectives.measure import Case

PIPELINE, LIBRARY = "linear pipeline", "library"
NOT_PERMITTED = "hosts not emulated"  # a metric that says why


@contextmanager
def hosts_or_loopback(ranks: int, rate: float) -> Iterator[Hosts | None]:
    """`ranks` emulated hosts with links of `rate` bytes/s; None, for loopback, if the rate is 0."""
    from repro.collectives.hosts import Hosts

    if rate:
        with Hosts(ranks, rate) as hosts:
            yield hosts
    else:
        yield None


def not_permitted(rate: float) -> Outcome | None:
    """The outcome of a trial that needs emulated hosts where there can be none."""
    from repro.collectives.hosts import why_not

    reason = why_not() if rate else None
    return Outcome({NOT_PERMITTED: reason}) if reason else None


@dataclass(frozen=True, kw_only=True)
class CollectivesTrial(Trial):
    """The time of every collective by every algorithm at every size, for each number of `ranks`; one repeat.

    `rate`: of each host's link, bytes/s in either direction; 0: all ranks on loopback. `sizes` in bytes; the linear pipeline in
    each of `blocks` that is no larger than the message, rings in blocks of the package's default; `rounds` interleaved;
    `check`: as in `repro.collectives.measure`. Curve `times`: one row a case, median and quartiles over the rounds in seconds.
    """

    study: ClassVar[str] = "wang2017"
    kind: ClassVar[str] = "collectives"
    timing: ClassVar[bool] = True

    ranks: tuple[int, ...]
    rate: float = 0.0
    collectives: tuple[str, ...] = ("broadcast", "reduce", "allreduce")
    algorithms: tuple[str, ...]
    sizes: tuple[int, ...]
    blocks: tuple[int, ...]
    rounds: int
    check: bool = False
    replicate: int = 0

    def seconds(self) -> float:
        a_byte = 1.6 / self.rate if self.rate else 4e-9
        cases = len(self.ranks) * len(self.collectives) * (len(self.algorithms) + len(self.blocks))
        return 4 + (self.rounds + 1) * cases * sum(2e-3 + a_byte * size for size in self.sizes)

    def label(self) -> str:
        where = "hosts" if self.rate else "ranks on loopback"
        return f"collectives on {', '.join(map(str, self.ranks))} {where}, repeat {self.replicate}"

    def run(self, context: Context, *needed: Record) -> Outcome:
        import numpy as np

        from repro.collectives.launch import run_ranks

        if refused := not_permitted(self.rate):
            return refused
        cases = list(self._cases())
        rows = []
        for ranks in self.ranks:
            with hosts_or_loopback(ranks, self.rate) as hosts:
                seconds = run_ranks(_measure, ranks, cases, self.rounds, hosts=hosts)[0]
            for case, (lower, median, upper) in zip(cases, np.quantile(seconds, [0.25, 0.5, 0.75], axis=1).T, strict=True):
                row = {"collective": case.collective, "algorithm": case.algorithm, "ranks": ranks}
                row |= {"nbytes": case.nbytes, "block": case.block_bytes}
                rows.append(row | {"seconds": median, "lower": lower, "upper": upper})
        return Outcome({}, {"times": {name: [row[name] for row in rows] for name in rows[0]}})

    def _cases(self) -> Iterator[Case]:
        from repro.collectives.measure import Case
        from repro.collectives.operations import BLOCK_BYTES

        for nbytes in self.sizes:
            for collective in self.collectives:
                for algorithm in self.algorithms:
                    blocks = [block for block in self.blocks if block <= nbytes] if algorithm == PIPELINE else []
                    for block in blocks or [min(BLOCK_BYTES, nbytes)]:
                        yield Case(collective, algorithm, nbytes, block, self.check)


def _measure(cases: list[Case], rounds: int) -> np.ndarray:
    from repro.collectives.measure import measure

    return measure(cases, rounds)
