"""Run what is missing: one coordinator hands trials to an executor and writes each record the moment its trial is
finished.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import suppress
from typing import TextIO

from filelock import FileLock

from repro.engine import locks
from repro.engine.executors import Failed, local_executor, work
from repro.engine.plan import Plan, Row, longest_first, plan
from repro.engine.progress import Progress
from repro.engine.provenance import available_cores
from repro.engine.store import Record, Store
from repro.engine.trial import Trial
from repro.errors import ReproError
from repro.files import write_atomically

DEATHS_ALLOWED = 3
POLL = 0.5  # seconds between looks at the clock and at trials other runs are working on


def run_trials(
    trials: Iterable[Trial],
    store: Store,
    *,
    jobs: int = 1,
    executor: Executor | None = None,
    progress: TextIO | None = None,
) -> dict[str, Record]:
    """The records of `trials`, by key, in the order asked for; what the store lacks is run first, with all it needs.

    `jobs`: local processes at once, one thread each (all cores when there is only one). `executor`: a place to run them
    instead, such as `dask_executor(address)`; the caller shuts it down. Timing trials always run here, alone, each in a
    fresh process with all cores. `progress`: a text stream for the progress bar.

    A trial that fails, or whose process dies `DEATHS_ALLOWED` times, does not stop the others: ReproError at the end
    names each with its reason. Ctrl-C stops the work and raises KeyboardInterrupt saying what has been kept. Trials
    that another run on the same store is working on are left to it, and waited for.
    """
    if jobs < 1:
        raise ReproError(f"jobs is {jobs}: give the number of trials to run at once, 1 or more")
    work_plan = plan(trials, store)
    missing = work_plan.missing
    if not missing:
        return {key: work_plan.records[key] for key in work_plan.asked}
    if store.read_only:
        raise ReproError(
            f"{len(missing)} trials have no record in {store.root}, which is opened read-only, the first of them "
            f"{missing[0].trial.label()}: run them in another store"
        )
    own = local_executor(jobs, 1 if jobs > 1 else available_cores()) if executor is None else None
    run = _Run(work_plan, store, own or executor, jobs, progress)
    try:
        run.to_the_end()
    except BaseException as error:
        run.abandon()
        if own:
            own.stop()
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(run.interrupted()) from None
        raise
    finally:
        run.release()
    if own:
        own.shutdown()
    run.raise_failures()
    return {key: run.records[key] for key in work_plan.asked}


class _Run:
    """The state of one run: what is to do, what is flying, what has landed."""

    def __init__(self, work_plan: Plan, store: Store, executor: Executor, jobs: int, stream: TextIO | None):
        self.store = store
        self.executor = executor
        self.jobs = jobs
        self.needs = work_plan.needs
        self.todo = {row.key: row for row in work_plan.missing}
        self.total = len(self.todo)
        self.records = dict(work_plan.records)
        self.flying: dict[Future, Row] = {}
        self.locks: dict[str, FileLock] = {}
        self.deaths: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self.recorded = 0
        self.waiting = False
        self.progress = Progress(stream, {row.key: row.seconds for row in work_plan.missing}, self.slots)
        if self.records:
            self.progress.say(f"{len(self.records)} of {len(work_plan.rows)} trials are already recorded")

    @property
    def slots(self) -> int:
        return getattr(self.executor, "slots", self.jobs)

    def to_the_end(self) -> None:
        """Run everything that can be run."""
        while self.todo or self.flying:
            landed = self._launch()
            if self.flying:
                self._land()
            elif landed:
                continue
            elif self._ready(timing=False):
                self._wait_for_others()
            elif timing := self._ready(timing=True):
                if not self._time_alone(timing):
                    self._wait_for_others()
            else:
                break  # what is left needs a trial that failed

    def _ready(self, *, timing: bool) -> list[Row]:
        return longest_first(
            [
                row
                for row in self.todo.values()
                if row.trial.timing == timing and all(key in self.records for key in self.needs[row.key])
            ]
        )

    def _launch(self) -> bool:
        """Fill the executor's slots; True if another run turned out to have recorded a trial meanwhile."""
        landed = False
        for row in self._ready(timing=False):
            if len(self.flying) >= self.slots:
                break
            if self._claim(row):
                self._submit(row, self.executor)
            landed |= row.key in self.records
        return landed

    def _claim(self, row: Row) -> bool:
        """Whether the trial is ours to run: nobody else is at it, and nobody has recorded it since we looked."""
        lock = locks.take(self.store, row.trial)
        if lock is None:
            return False
        self.locks[row.key] = lock
        if (record := self.store.get(row.trial)) is not None:
            self._settle(row, record)
            return False
        self.store.tidy(row.trial, finished=False)
        return True

    def _submit(self, row: Row, executor: Executor) -> None:
        threads = getattr(executor, "threads", 1)
        needed = tuple(self.records[key] for key in self.needs[row.key])
        name = getattr(executor, "name", type(executor).__name__)
        self.todo.pop(row.key, None)
        self.flying[executor.submit(work, row.trial, self.store.checkpoint(row.trial), threads, needed, name)] = row
        self.progress.start(row.key)

    def _land(self) -> None:
        """Wait a moment for trials to end; record those that have."""
        done, _ = wait(self.flying, timeout=POLL, return_when=FIRST_COMPLETED)
        for future in done:
            self._receive(self.flying.pop(future), future, self.executor)
        self.progress.tick()

    def _receive(self, row: Row, future: Future, executor: Executor) -> None:
        """`work` returns even the trial's own failures, so an exception here means that its process or its message was
        lost.
        """
        error = ReproError("the cluster has cancelled it") if future.cancelled() else future.exception()
        if isinstance(error, BrokenExecutor):
            self.deaths[row.key] += 1
            if self.deaths[row.key] < DEATHS_ALLOWED:
                self._submit(row, executor)
            else:
                self._fail(row, f"its process was killed {DEATHS_ALLOWED} times; is there enough memory for it?")
        elif error is not None:
            self._fail(row, f"its worker was lost ({type(error).__name__}: {error})")
        elif isinstance(result := future.result(), Failed):
            self._fail(row, result.sentence, result.traceback)
        else:
            self._settle(row, self.store.put(row.trial, result.outcome, result.provenance))
            self.recorded += 1

    def _time_alone(self, timing: list[Row]) -> bool:
        """Run the first timing trial that is free in a fresh process with all cores; False if other runs keep us from
        it.
        """
        for row in timing:
            if not self._claim(row):
                if row.key in self.records:
                    return True
                continue
            executor = local_executor(1, available_cores())
            try:
                self._submit(row, executor)
                while self.flying:
                    done, _ = wait(self.flying, timeout=POLL)
                    for future in done:
                        self._receive(self.flying.pop(future), future, executor)
                    self.progress.tick()
            finally:
                executor.stop()
            return True
        return False

    def _wait_for_others(self) -> None:
        if not self.waiting:
            self.waiting = True
            self.progress.say("waiting for trials that another run on this store is working on")
        time.sleep(POLL)

    def _settle(self, row: Row, record: Record) -> None:
        self.records[row.key] = record
        self.todo.pop(row.key, None)
        self.store.tidy(row.trial, finished=True)
        locks.give_back(self.locks.pop(row.key), finished=True)
        self.progress.finish(row.key, row.trial.label())

    def _fail(self, row: Row, sentence: str, traceback: str | None = None) -> None:
        if traceback is not None:
            path = self.store.failure(row.trial)
            with suppress(ReproError):  # a full disk must not hide why the trial failed
                write_atomically(path, f"{row.trial.label()}\n{row.key}\n\n{traceback}")
                sentence = f"{sentence} (traceback in {path})"
        self.failures[row.key] = f"{row.trial.label()}: {sentence}"
        locks.give_back(self.locks.pop(row.key), finished=False)
        self.progress.finish(row.key, f"{row.trial.label()} FAILED")

    def abandon(self) -> None:
        """Forget what is flying."""
        for future in self.flying:
            future.cancel()

    def release(self) -> None:
        """Let go of every lock and of the terminal's line."""
        for lock in self.locks.values():
            locks.give_back(lock, finished=False)
        self.progress.close()

    def interrupted(self) -> str:
        """What a user who pressed Ctrl-C wants to know."""
        return (
            f"interrupted: {self.recorded} of {self.total} missing trials were recorded and kept; "
            "the same command goes on from there"
        )

    def raise_failures(self) -> None:
        """ReproError naming every failed trial, if there is one."""
        if self.failures:
            skipped = f", {len(self.todo)} that need them were not run" if self.todo else ""
            reasons = "".join(f"\n  {failure}" for failure in self.failures.values())
            raise ReproError(f"{len(self.failures)} of {self.total} trials failed{skipped}, all others are recorded:{reasons}")
