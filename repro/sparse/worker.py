"""The process that prepares and times the backends of one runtime, from outside (`Worker`) and from inside (`serve`).

A request goes through a pipe as the name of a method of `Peers` and its arguments; the answer comes back the same way. The
process sleeps between requests, and ends when the other end of its pipe is closed, so also when its parent is killed.
"""

import os
import signal
import subprocess
import sys
import time
import traceback
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import numpy as np

from repro.errors import ReproError
from repro.sparse.peers import BACKENDS, Backend, Call, missing_reason
from repro.sparse.timing import bandwidth, repetitions, sample, settle

# Making the largest matrix into the slowest format, compilation included, takes some ten seconds.
_ANSWER_SECONDS = 300.0
_WAKE_SECONDS = 0.01
_COMMAND = "from repro.sparse.worker import serve; serve({})"


class Worker:
    """The process of one runtime, with `threads` threads, which its environment says before any library is loaded."""

    def __init__(self, runtime: str, threads: int):
        self.runtime = runtime
        self._pipe, theirs = Pipe()
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
        counts["OPENBLAS_NUM_THREADS"] = str(threads if runtime == "numpy" else 1)
        # Idle threads of OpenBLAS and MKL spin for 0.1 and 0.2 s before they sleep, and the next turn has to wait: some 20 ms
        # (2^26 cycles) do as well for calls that follow each other.
        spin = {"OPENBLAS_THREAD_TIMEOUT": "26", "KMP_BLOCKTIME": "20"}
        # Threads stay on cores of their own: woken together, two of them may share one for a tenth of a second.
        places = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND.format(theirs.fileno())],
                env=os.environ | counts | spin | places,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def ask(self, request: str, *arguments):
        self.send(request, *arguments)
        return self.receive()

    def send(self, request: str, *arguments) -> None:
        self._request = request
        try:
            self._pipe.send((request, *arguments))
        except OSError:
            self._raise_dead()

    def receive(self):
        """The answer to the last request; `ReproError` if that failed, or if the process died or takes too long."""
        try:
            if not self._pipe.poll(_ANSWER_SECONDS):
                raise ReproError(f"the {self.runtime} process gave no answer to {self._request} in {_ANSWER_SECONDS:g} s")
            failure, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._raise_dead()
        if failure:
            raise ReproError(failure)
        return answer

    def _raise_dead(self):
        status = self._process.wait(10)
        raise ReproError(f"the {self.runtime} process ended with status {status} when asked to {self._request}") from None

    def stop(self) -> None:
        """Closing the pipe ends an idle process, and what is still at work is killed."""
        self._pipe.close()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(descriptor: int) -> None:
    """Answer the requests that come through the pipe with that file descriptor until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    pipe, peers = Connection(descriptor), Peers()
    while True:
        try:
            request, *arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            reply = None, getattr(peers, request)(*arguments)
        except ReproError as error:
            reply = str(error), None
        except Exception as error:
            traceback.print_exc()
            reply = f"the request to {request} failed with {type(error).__name__}: {error}", None
        try:
            pipe.send(reply)
        except OSError:
            return


class Peers:
    """The calls that one process has prepared, in the order of preparation."""

    def __init__(self):
        self._calls: list[Call] = []
        self._counts: list[int] = []

    def prepare(self, names: list[str], path: Path, x: np.ndarray, exact: np.ndarray) -> tuple[dict, dict]:
        """Errors of the backends that prepared the matrix in the file, and why the others could not, by name."""
        errors, missing = {}, {}
        for name in names:
            try:
                call = BACKENDS[name].prepare(np.load(path), x)
                answer = call()
            except (ImportError, ReproError) as reason:
                missing[name] = missing_reason(reason)
            except Exception as error:
                traceback.print_exc()
                raise ReproError(f"{name} failed with {type(error).__name__}: {error}") from error
            else:
                errors[name] = checked_error(name, BACKENDS[name], answer, exact)
                self._calls.append(call)
        return errors, missing

    def calibrate(self, min_seconds: float) -> None:
        settle()
        self._counts = [repetitions(call, min_seconds) for call in self._calls]
        settle()

    def sample(self) -> list[float]:
        """Seconds of each call; the process is idle again when this returns, so that the next probe has the machine alone.

        Threads that slept may wake on one and the same processor, and only after milliseconds does the system part them: the
        first call runs for a while before it is timed.
        """
        awake = time.perf_counter() + _WAKE_SECONDS
        while time.perf_counter() < awake:
            self._calls[0]()
        seconds = [sample(call, count) for call, count in zip(self._calls, self._counts, strict=True)]
        settle()
        return seconds

    def clear(self) -> None:
        self._calls.clear()

    def bandwidth(self, nbytes: int) -> float:
        return bandwidth(nbytes)


def checked_error(name: str, backend: Backend, answer: object, exact: np.ndarray) -> float:
    """Largest deviation from `exact` (rows, batch) over its largest entry; `ReproError` above the backend's tolerance."""
    answer = np.asarray(answer)
    exact = exact.T if backend.batch_first else exact
    if answer.size != exact.size:
        raise ReproError(f"{name} returned shape {answer.shape} for a product of shape {exact.shape}: it was not timed")
    error = float(np.abs(answer.reshape(exact.shape) - exact).max() / (np.abs(exact).max() or 1))
    # Written so that nan fails.
    if not error <= backend.tolerance:
        allowed = f"{backend.tolerance:.0e}"
        raise ReproError(f"{name} is off by {error:.1e} of the largest entry, allowed are {allowed}: it was not timed")
    return error
