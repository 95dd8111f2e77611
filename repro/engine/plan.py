"""What a run would do: which trials are recorded, which are missing, and how long the missing ones take."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from repro.engine.store import Record, Store
from repro.engine.trial import Trial
from repro.errors import ReproError


@dataclass(frozen=True)
class Row:
    """One trial of a plan. `state`: "hit" (recorded), "miss", or "resumable" (a miss with a checkpoint to go on from);
    `seconds`: its own estimate for one core, 0 for a hit."""

    key: str
    trial: Trial
    state: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """`asked`: keys in the order they were asked for, once each; `rows`: those trials and, for what is missing, the
    trials it needs, every trial after its needs; `records`: the hits; `needs`: per missing trial the keys it needs.
    """

    asked: tuple[str, ...]
    rows: tuple[Row, ...]
    records: dict[str, Record]
    needs: dict[str, tuple[str, ...]]

    @property
    def missing(self) -> tuple[Row, ...]:
        """The rows that would be run."""
        return tuple(row for row in self.rows if row.state != "hit")

    def seconds(self, jobs: int = 1) -> float:
        """Estimated wall time with `jobs` at once: longest first among the ready, timing trials alone at the end. What
        checkpoints save is not known here and not subtracted.
        """
        free, ends = [0.0] * jobs, {key: 0.0 for key in self.records}
        waiting = [row for row in self.missing if not row.trial.timing]
        alone = [row for row in self.missing if row.trial.timing]
        while ready := longest_first([row for row in waiting if all(key in ends for key in self.needs[row.key])]):
            row = ready[0]
            begin = max([heapq.heappop(free), *(ends[key] for key in self.needs[row.key])])
            ends[row.key] = begin + row.seconds
            heapq.heappush(free, ends[row.key])
            waiting.remove(row)
        # What is left of `waiting` needs a timing trial first; it is rare enough to be counted one after the other.
        return max(free) + sum(row.seconds for row in [*waiting, *alone])


def longest_first(rows: Sequence[Row]) -> list[Row]:
    """The order in which ready trials are started: a long one started last would keep the others' workers idle."""
    return sorted(rows, key=lambda row: -row.seconds)


def plan(trials: Iterable[Trial], store: Store) -> Plan:
    """Look up the trials, and for every missing one the trials it needs; equal trials count once.

    Raises ReproError when trials need each other in a circle.
    """
    rows: dict[str, Row] = {}
    records: dict[str, Record] = {}
    needs: dict[str, tuple[str, ...]] = {}

    def visit(trial: Trial) -> str:
        key = trial.key()
        if key in rows:
            return key
        if (record := store.get(trial)) is not None:
            records[key] = record
            rows[key] = Row(key, trial, "hit", 0.0)
            return key
        needs[key] = tuple(visit(needed) for needed in trial.needs())
        state = "resumable" if store.checkpoint(trial).exists() else "miss"
        rows[key] = Row(key, trial, state, trial.seconds())
        return key

    try:
        asked = tuple(dict.fromkeys(visit(trial) for trial in trials))
    except RecursionError as error:
        raise ReproError(
            "these trials need each other in a circle: a trial may only need trials that do not need it"
        ) from error
    return Plan(asked, tuple(rows.values()), records, needs)
