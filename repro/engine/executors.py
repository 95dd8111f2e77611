"""Where trials are run: local processes, or a Dask cluster. Both take the same payload, `work`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from repro.engine.provenance import measured
from repro.engine.store import Record
from repro.engine.trial import Context, Outcome, Trial
from repro.errors import ReproError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

# A trial may seed torch's global generator and sets the process's threads, so a process never runs two at once: a Dask
# worker with several threads would.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Finished:
    """A trial's outcome and the provenance measured where it ran."""

    outcome: Outcome
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """Why a trial has no outcome: one sentence, and the traceback unless the sentence was meant for the user."""

    sentence: str
    traceback: str | None


def work(trial: Trial, checkpoint: Path, threads: int, needed: tuple[Record, ...], executor: str) -> Finished | Failed:
    """Run one trial in this process; never raises what the trial raises, since an exception may not survive the way
    home.
    """
    with _one_at_a_time:
        pin_threads(threads)
        started, clock = datetime.now(UTC), time.perf_counter()
        try:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            outcome = trial.run(Context(checkpoint, threads), *needed)
            if not isinstance(outcome, Outcome):
                raise TypeError(f"{type(trial).__name__}.run returned a {type(outcome).__name__}, not an Outcome")
        except ReproError as error:
            return Failed(str(error), None)
        except (Exception, SystemExit) as error:
            return Failed(f"{type(error).__name__}: {error}", traceback.format_exc())
        seconds = time.perf_counter() - clock
        return Finished(outcome, measured(started=started, seconds=seconds, threads=threads, executor=executor))


def pin_threads(threads: int) -> None:
    """Give this process `threads` threads: libraries not loaded yet read the environment, loaded ones are told."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    if "numba" not in sys.modules:  # numba refuses another value once its threads run
        os.environ["NUMBA_NUM_THREADS"] = str(threads)
    threadpool_limits(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


class LocalProcesses(Executor):
    """`slots` spawned processes of `threads` threads each, started when first needed.

    Every process is a pool of its own: when the system kills one, only its own trial is lost, and the next `submit`
    replaces it.
    """

    name = "local"

    def __init__(self, slots: int, threads: int):
        self.slots = slots
        self.threads = threads
        self._workers = [_Worker(threads) for _ in range(slots)]

    def submit(self, fn, /, *args, **kwargs) -> Future:
        """Hand the call to the process with the least to do."""
        index = min(range(self.slots), key=lambda i: self._workers[i].unfinished())
        try:
            return self._workers[index].submit(fn, *args, **kwargs)
        except BrokenProcessPool:
            self._workers[index].stop()
            self._workers[index] = _Worker(self.threads)
            return self._workers[index].submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the processes finish what they have (nothing that waits, if `cancel_futures`) and end."""
        for worker in self._workers:
            worker.pool.shutdown(wait=wait, cancel_futures=cancel_futures)

    def stop(self) -> None:
        """End the processes now, in the middle of their trials."""
        for worker in self._workers:
            worker.stop()


class _Worker:
    """A pool of one process on a leash: a pipe whose far end the process watches, to end itself when this end closes.

    It closes on `stop` and when the coordinator dies, even of SIGKILL; without it orphans would go on working on their
    trials.
    """

    def __init__(self, threads: int):
        context = multiprocessing.get_context("spawn")
        far_end, self._leash = context.Pipe(duplex=False)
        self._futures: list[Future] = []
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker, initargs=(threads, far_end))

    def unfinished(self) -> int:
        self._futures = [future for future in self._futures if not future.done()]
        return len(self._futures)

    def submit(self, fn, *args, **kwargs) -> Future:
        future = self.pool.submit(fn, *args, **kwargs)
        self._futures.append(future)
        return future

    def stop(self) -> None:
        self._leash.close()
        self.pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(threads: int, leash: Connection) -> None:
    """Ctrl-C is the coordinator's business; threads are pinned before a trial loads torch or NumPy."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(leash,), daemon=True).start()
    pin_threads(threads)


def _watch(leash: Connection) -> None:
    try:
        leash.recv()
    except (EOFError, OSError):
        os._exit(1)


class DaskCluster(Executor):
    """The workers of a running Dask scheduler, one trial per worker thread; start workers with one thread each.

    Dask itself starts a trial again elsewhere when its worker dies. Workers need this package and the store's folder.
    """

    name = "dask"
    threads = 1

    def __init__(self, client):
        self._client = client
        self._address = client.scheduler.address
        self._executor = client.get_executor(pure=False)

    @property
    def slots(self) -> int:
        """How many trials the cluster can run at once now; 1 while it has no worker, so that one trial waits for the first.

        Raises ReproError, as `submit` does, when the scheduler is gone.
        """
        self._require_scheduler()
        return max(1, sum(self._client.nthreads().values()))

    def submit(self, fn, /, *args, **kwargs) -> Future:
        """Send the call to the cluster."""
        self._require_scheduler()
        return self._executor.submit(fn, *args, **kwargs)

    def _require_scheduler(self) -> None:
        if self._client.status != "running":
            raise ReproError(f"the Dask scheduler at {self._address} is gone: start it and run again")

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster (it goes on without us)."""
        self._executor.shutdown(wait=wait and not cancel_futures)
        self._client.close()

    def stop(self) -> None:
        """Cancel what has not started, forget what has, leave the cluster."""
        self.shutdown(wait=False, cancel_futures=True)


def local_executor(jobs: int, threads: int) -> LocalProcesses:
    """`jobs` local worker processes with `threads` threads each."""
    return LocalProcesses(jobs, threads)


def dask_executor(address: str, *, timeout: float = 20.0) -> DaskCluster:
    """The cluster whose scheduler is at `address` (`tcp://host:8786`).

    Raises ReproError when `distributed` is not installed or the scheduler does not answer within `timeout` seconds.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ReproError("the dask executor needs `distributed`: pip install 'repro[dask]'") from error
    try:
        client = Client(address, timeout=timeout, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise ReproError(
            f"no Dask scheduler answered at {address} within {timeout:g} s: start one with `dask scheduler`, "
            "or give the address it prints (tcp://host:8786)"
        ) from error
    if not client.nthreads():
        print(f"warning: the Dask scheduler at {address} has no worker yet; trials wait until one joins", file=sys.stderr)
    return DaskCluster(client)
