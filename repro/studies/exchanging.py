"""Trials of wang2017 that exchange messages between real processes: collectives timed, on loopback or on emulated hosts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

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


@cache
def _why_not() -> str | None:
    from repro.collectives.hosts import why_not

    return why_not()


@dataclass(frozen=True, kw_only=True)
class HostsTrial(Trial):
    """A timing between ranks, on emulated hosts whose links have `rate` bytes/s in either direction, or on loopback if it is 0.

    A subclass says in `measure()` what is done, and returns the outcome. Where hosts cannot be emulated the outcome is a metric
    that says why, under a key of its own: once they can be, the trial is run.
    """

    study: ClassVar[str] = "wang2017"
    timing: ClassVar[bool] = True

    rate: float = 0.0
    replicate: int = 0

    def identity(self) -> dict[str, Any]:
        return super().identity() | ({NOT_PERMITTED: True} if self.rate and _why_not() else {})

    @abstractmethod
    def measure(self) -> Outcome: ...

    def run(self, context: Context, *needed: Record) -> Outcome:
        if self.rate and (reason := _why_not()):
            return Outcome({NOT_PERMITTED: reason})
        return self.measure()


@dataclass(frozen=True, kw_only=True)
class CollectivesTrial(HostsTrial):
    """The time of every collective by every algorithm at every size, for each number of `ranks`; one repeat.

    `sizes` in bytes; the linear pipeline in each of `blocks` that is no larger than the message, rings in blocks of the
    package's default; `rounds` interleaved. Curve `times`: one row a case, median and quartiles over the rounds in seconds.
    """

    kind: ClassVar[str] = "collectives"

    ranks: tuple[int, ...]
    collectives: tuple[str, ...] = ("broadcast", "reduce", "allreduce")
    algorithms: tuple[str, ...]
    sizes: tuple[int, ...]
    blocks: tuple[int, ...]
    rounds: int

    def seconds(self) -> float:
        a_byte = 1.6 / self.rate if self.rate else 4e-9
        cases = len(self.ranks) * len(self.collectives) * (len(self.algorithms) + len(self.blocks))
        return 4 + (self.rounds + 1) * cases * sum(2e-3 + a_byte * size for size in self.sizes)

    def label(self) -> str:
        where = "hosts" if self.rate else "ranks on loopback"
        return f"collectives on {', '.join(map(str, self.ranks))} {where}, repeat {self.replicate}"

    def measure(self) -> Outcome:
        import numpy as np

        from repro.collectives.launch import run_ranks

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
                        yield Case(collective, algorithm, nbytes, block)


def _measure(cases: list[Case], rounds: int) -> np.ndarray:
    from repro.collectives.measure import measure

    return measure(cases, rounds)
