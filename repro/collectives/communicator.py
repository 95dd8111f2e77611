"""A thread of each rank that runs collectives while the rank goes on computing."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from repro.collectives.operations import TIMEOUT, broadcast
from repro.errors import ReproError


class Span(NamedTuple):
    """What was done, `where` (a layer, for instance), from `start` to `end`: seconds of the machine's monotonic clock."""

    what: str
    where: str
    start: float
    end: float


@dataclass(frozen=True)
class _Task:
    priority: int
    what: str
    where: str
    call: Callable
    future: Future = field(default_factory=Future)


class Communicator:
    """Runs what is submitted, one after the other, in a thread and a process group of its own.

    All ranks create it, submit the same functions in the same order and close it. Nothing else may use `group`; collectives
    on other groups, those of DistributedDataParallel among them, may go on at the same time. torch and gloo release the
    interpreter's lock, so that the thread really works beside the computation.

    `by_priority`: of what waits, the lowest priority runs next, not what was submitted first. Rank 0 chooses, since ranks may
    be at different points, and tells the others in a message of 8 bytes.

    `spans`: one for each function run, for the user to take away. After an error everything submitted fails with it. A `with`
    block that is left by an exception drops what waits and closes the connections, so that other ranks get an error too.
    """

    def __init__(self, by_priority: bool = False):
        if not dist.is_initialized():
            raise ReproError("a communicator needs a process group: call torch.distributed.init_process_group first")
        self.group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
        self.spans: deque[Span] = deque()
        self._by_priority = by_priority
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="communicator")
        self._changed = threading.Condition()
        self._tasks: dict[int, _Task] = {}  # those that wait, by the number of their submission
        self._count = 0
        self._error: Exception | None = None

    def submit(self, function: Callable, *arguments, where: str = "", priority: int = 0, **options) -> Future:
        """Have `function(*arguments, group=self.group, **options)` run; its result, or its error, is that of the future.

        `function`: `broadcast`, `reduce`, `allreduce`, or anything else that takes a group. `where`: for `spans`.
        """
        task = _Task(priority, function.__name__, where, partial(function, *arguments, group=self.group, **options))
        with self._changed:
            if self._error:
                raise self._error
            self._tasks[self._count] = task
            self._count += 1
            self._changed.notify_all()
        self._thread.submit(self._run_one)
        return task.future

    def close(self) -> None:
        """Run what was submitted, then end the thread and close the connections."""
        self._thread.shutdown()
        # gloo closes them with the last reference to the group.
        group, self.group = self.group, None
        dist.destroy_process_group(group)

    def __enter__(self) -> "Communicator":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None:
            self._fail(ReproError(f"communicator closed after an error: {error}"))
        self.close()

    def _run_one(self) -> None:
        task = None
        try:
            task = self._next()
            start = time.perf_counter()
            result = task.call()
            self.spans.append(Span(task.what, task.where, start, time.perf_counter()))
            task.future.set_result(result)
        except Exception as error:
            self._fail(error)
            if task is not None:
                task.future.set_exception(self._error)

    def _next(self) -> _Task:
        with self._changed:
            if self._error:
                raise self._error
            number = min(self._tasks, key=lambda number: (self._tasks[number].priority * self._by_priority, number))
        if self._by_priority:
            chosen = torch.tensor([number])
            number = broadcast(chosen, "minimum spanning tree", group=self.group).item()
        with self._changed:
            if not self._changed.wait_for(lambda: number in self._tasks or self._error, TIMEOUT):
                raise ReproError(f"rank 0 runs submission {number}, which this rank has not made within {TIMEOUT:g} s")
            if self._error:
                raise self._error
            return self._tasks.pop(number)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            for task in self._tasks.values():
                task.future.set_exception(self._error)
            self._tasks.clear()
            self._changed.notify_all()
