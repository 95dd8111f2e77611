"""Times every library at the product y = W x: one process per runtime, in turns, between probes of the machine's speed.

W is `(rows, columns)`, x is `(columns, batch)`. Every answer is checked against the float64 product before it is timed. Then
the processes take turns, in an order drawn afresh for every round; the others sleep meanwhile. In its turn a process takes
one sample of each of its calls, in steady state: the caches are as repeated calls leave them. Between turns a probe, a small
matrix product per core, tells whether the machine runs at full speed; a turn next to a slow probe is dropped and taken
again. Times are per call from Python, dispatch included. A backend takes x in the layout it likes best.
"""

import math
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from repro.errors import ReproError, one_of
from repro.sparse.peers import BACKENDS
from repro.sparse.timing import SLACK, Timing, quiet_turns, random_weights, sample
from repro.sparse.worker import Worker

_LEAST_TURNS = 3
_LEAST_SECONDS = 1e-4
# How long to wait for a quiet machine before turns of one product, in all, and between looks.
_PATIENCE = 2.0
_PAUSE = 0.02


@dataclass(frozen=True)
class Products:
    """Timings by backend, then sparsity; `missing`: why a backend was not timed, or not at some sparsity, by name."""

    timings: list[Timing]
    missing: dict[str, str]


def time_products(
    rows: int, columns: int, sparsity: float | Sequence[float], batch: int, *, threads: int | None = None, **options
) -> Products:
    """`Bench.time_products`, with processes started (some seconds) and ended for this one product."""
    with Bench(threads) as bench:
        return bench.time_products(rows, columns, sparsity, batch, **options)


class Bench:
    """The processes that time products, one per runtime, started when first needed and kept from product to product.

    `threads` of each: by default `OMP_NUM_THREADS`, or one per processor. A context manager; `close` ends the processes.
    """

    def __init__(self, threads: int | None = None):
        if threads is None:
            threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
        if threads < 1:
            raise ReproError(f"threads is {threads}: it must be at least 1")
        self.threads = threads
        self._workers: dict[str, Worker] = {}
        self._fastest_probe = math.inf
        self._bandwidths: dict[int, float] = {}

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        while self._workers:
            self._workers.popitem()[1].stop()

    def time_products(
        self, rows: int, columns: int, sparsity: float | Sequence[float], batch: int, *, seed: int = 0, **options
    ) -> Products:
        """Check and time products with random weights (see `random_weights`), for one or several sparsities.

        `options`: as `time_weights` takes them. Raises `ReproError` also for an impossible size or sparsity.
        """
        if min(rows, columns, batch) < 1:
            raise ReproError(f"rows {rows}, columns {columns}, batch {batch}: each must be at least 1")
        sparsities = np.atleast_1d(sparsity).tolist()
        generator = np.random.default_rng(seed)
        weights = (random_weights(rows, columns, s, generator) for s in sparsities)
        return self._time(weights, sparsities, columns, batch, seed=seed, **options)

    def time_weights(self, weights: Sequence[np.ndarray], batch: int, **options) -> Products:
        """Check and time products with the given matrices, all `(rows, columns)`, such as one layer pruned more and more.

        Of several, dense backends get the one with the fewest zeros only (zeros cost them the same), sparse ones all but
        those without zeros. Options:

        - `backends`: names from `repro.sparse.peers.BACKENDS`, by default all;
        - `rounds`: quiet turns wanted of every process; up to twice as many are taken, and if fewer than three were quiet the
          three next to the fastest probes are kept;
        - `min_seconds`: per sample, about; a round costs this per call (or twice a call that takes longer), and some
          milliseconds for each process;
        - `budget`: no round after the third starts later than this many seconds after the first;
        - `seed`: of x and of the order of turns.

        Raises `ReproError` for an unknown backend, for one that is off by more than its tolerance or fails, and for a process
        that dies or does not answer.
        """
        weights = [np.asarray(matrix, dtype=np.float32) for matrix in weights]
        if len({matrix.shape for matrix in weights}) != 1 or weights[0].ndim != 2 or not weights[0].size or batch < 1:
            raise ReproError("give matrices of one and the same shape (rows, columns), and a batch of at least 1")
        sparsities = [1 - np.count_nonzero(matrix) / matrix.size for matrix in weights]
        return self._time(weights, sparsities, weights[0].shape[1], batch, **options)

    def bandwidth(self, nbytes: int) -> float:
        """`repro.sparse.timing.bandwidth`, measured by the process of our own kernels, whose threads keep to their cores."""
        if nbytes not in self._bandwidths:
            (worker,) = self._start({"repro"})
            self._bandwidths[nbytes] = worker.ask("bandwidth", nbytes)
        return self._bandwidths[nbytes]

    def _time(
        self,
        weights: Iterable[np.ndarray],
        sparsities: list[float],
        columns: int,
        batch: int,
        *,
        backends: Sequence[str] = tuple(BACKENDS),
        rounds: int = 7,
        min_seconds: float = 0.005,
        budget: float = math.inf,
        seed: int = 0,
    ) -> Products:
        backends = list(dict.fromkeys(backends))
        for name in backends:
            one_of("backend", name, BACKENDS)
        if not backends or not sparsities:
            raise ReproError("nothing to time: give at least one backend and one sparsity")
        if rounds < 1 or not min_seconds >= _LEAST_SECONDS:
            raise ReproError(f"rounds {rounds}, min_seconds {min_seconds}: need at least 1 and {_LEAST_SECONDS} s per sample")
        turns_generator, x_generator = np.random.default_rng(seed).spawn(2)
        x = x_generator.standard_normal((columns, batch), dtype=np.float32)
        workers = self._start({BACKENDS[name].runtime for name in backends})
        try:
            # This process multiplies on one thread: a pool of its own would spin between the workers' turns.
            with threadpool_limits(1, user_api="blas"):
                prepared, missing, shape = _prepare(workers, weights, sparsities, x, backends)
                workers = [worker for worker in workers if prepared[worker.runtime]]
                turns = self._take_turns(workers, rounds, min_seconds, budget, turns_generator)
            for worker in workers:
                worker.ask("clear")
        except BaseException:
            self.close()
            raise
        timings = []
        for worker in workers:
            slowest, samples = zip(*turns[worker.runtime], strict=True)
            kept = quiet_turns(slowest, self._fastest_probe, least=min(_LEAST_TURNS, rounds))
            quartiles = 1e6 * np.percentile([samples[i] for i in kept], (25, 50, 75), axis=0).T
            for (name, s, error), (lower, median, upper) in zip(prepared[worker.runtime], quartiles.tolist(), strict=True):
                timings.append(
                    Timing(
                        backend=name,
                        runtime=worker.runtime,
                        sparse=BACKENDS[name].sparse,
                        reduced=BACKENDS[name].reduced,
                        rows=shape[0],
                        columns=columns,
                        sparsity=s,
                        batch=batch,
                        median_us=median,
                        lower_us=lower,
                        upper_us=upper,
                        rounds=len(kept),
                        dropped=len(samples) - len(kept),
                        probe=max(slowest[i] for i in kept) / self._fastest_probe,
                        threads=self.threads,
                        error=error,
                    )
                )
        timings.sort(key=lambda timing: backends.index(timing.backend))
        return Products(timings, missing)

    def _start(self, runtimes: set[str]) -> list[Worker]:
        for runtime in sorted(runtimes - self._workers.keys()):
            self._workers[runtime] = Worker(runtime, self.threads)
        return [self._workers[runtime] for runtime in sorted(runtimes)]

    def _take_turns(self, workers, rounds, min_seconds, budget, generator) -> dict[str, list[tuple[float, list[float]]]]:
        """By runtime, its turns: (slower of the probes around it, seconds per call of each of its calls)."""
        for worker in workers:
            worker.ask("calibrate", min_seconds)
        turns = {worker.runtime: [] for worker in workers}
        before = self._probe()
        deadline, patience = time.perf_counter() + budget, _PATIENCE
        for taken in range(2 * rounds):
            waiting = []
            for worker in workers:
                slowest = [probe for probe, _ in turns[worker.runtime]]
                if len(quiet_turns(slowest, self._fastest_probe, least=0)) < rounds:
                    waiting.append(worker)
            if not waiting or (taken >= _LEAST_TURNS and time.perf_counter() > deadline):
                break
            for index in generator.permutation(len(waiting)):
                while before > SLACK * self._fastest_probe and patience > 0:
                    time.sleep(_PAUSE)
                    patience -= _PAUSE
                    before = self._probe()
                samples = waiting[index].ask("sample")
                after = self._probe()
                turns[waiting[index].runtime].append((max(before, after), samples))
                before = after
        return turns

    def _probe(self) -> float:
        seconds = probe(self.threads)
        self._fastest_probe = min(self._fastest_probe, seconds)
        return seconds


def probe(threads: int) -> float:
    """Seconds per small matrix product, the slowest of `threads` threads that make some each, 8 ms in all.

    It tells how fast the processors are and who else uses them: two virtual ones may share a physical one for a second, which
    doubles it. Crowded caches or memory it does not see. Threads are tied to one processor each where the system allows it:
    new ones often start on the same, which would say nothing about the machine.
    """
    everywhere = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    seconds, start = [], threading.Barrier(threads)

    def run(index: int) -> None:
        if everywhere:
            os.sched_setaffinity(0, {everywhere[index % len(everywhere)]})
        square = np.ones((256, 256), dtype=np.float32)
        product = np.empty_like(square)
        start.wait()
        seconds.append(sample(lambda: np.matmul(square, square, out=product), 20))

    others = [threading.Thread(target=run, args=(index,)) for index in range(1, threads)]
    for thread in others:
        thread.start()
    run(0)
    if everywhere:
        os.sched_setaffinity(0, everywhere)
    for thread in others:
        thread.join()
    return max(seconds)


def _prepare(workers, weights, sparsities, x, backends):
    """By runtime, its (backend, sparsity, error) in the order of its calls; what is missing and why; the shape of W."""
    with_zeros = [i for i, s in enumerate(sparsities) if s > 0] or range(len(sparsities))
    cells = {name: with_zeros if BACKENDS[name].sparse else [int(np.argmin(sparsities))] for name in backends}
    prepared, missing = {worker.runtime: [] for worker in workers}, {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.npy"
        for index, matrix in enumerate(weights):
            np.save(path, matrix)
            exact = _exact(matrix, x)
            asked = []
            for worker in workers:
                names = [name for name in backends if index in cells[name] and BACKENDS[name].runtime == worker.runtime]
                if names:
                    worker.send("prepare", names, path, x, exact)
                    asked.append(worker)
            for worker in asked:
                errors, reasons = worker.receive()
                prepared[worker.runtime] += [(name, sparsities[index], error) for name, error in errors.items()]
                missing |= reasons
    return prepared, missing, matrix.shape


def _exact(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The product in float64, some rows at a time: of a whole matrix the copy would take twice its space."""
    x = x.astype(np.float64)
    parts = np.array_split(weights, math.ceil(weights.size / 2**20))
    return np.concatenate([part.astype(np.float64) @ x for part in parts])
