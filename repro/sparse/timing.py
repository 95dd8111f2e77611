"""What a timing is made of: samples, quiet turns and their quartiles; then what is read off it, and the bound that bytes set.

`repro.sparse.bench` takes the timings, of the backends in `repro.sparse.peers`.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from repro.errors import ReproError

# A turn counts if the probes around it took at most this many times the fastest probe; a shared core makes it about 1.9.
SLACK = 1.25
_CALLS_TO_STEADY = 10


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One backend's time for one product: median and quartiles over `rounds` kept turns, microseconds per call.

    `reduced`: computed in less than float32. `dropped`: turns thrown away because something else slowed the machine; `probe`:
    slowest probe around a kept turn over the fastest of all, above `SLACK` only if too few turns were quiet. `error`: largest
    |y - exact| over largest |exact|.
    """

    backend: str
    runtime: str
    sparse: bool
    reduced: bool
    rows: int
    columns: int
    sparsity: float
    batch: int
    median_us: float
    lower_us: float
    upper_us: float
    rounds: int
    dropped: int
    probe: float
    threads: int
    error: float


def random_weights(rows: int, columns: int, sparsity: float, generator: np.random.Generator) -> np.ndarray:
    """A float32 `(rows, columns)` matrix with exactly `round(sparsity * rows * columns)` zeros, at random positions."""
    if not 0.0 <= sparsity < 1.0:
        raise ReproError(f"sparsity is {sparsity}: it must lie in [0, 1)")
    size = rows * columns
    kept = size - round(sparsity * size)
    if kept < 1:
        raise ReproError(f"sparsity {sparsity} leaves no weight of a {rows} x {columns} matrix: it must keep at least one")
    weights = np.zeros(size, dtype=np.float32)
    positions = generator.choice(size, kept, replace=False, shuffle=False) if kept < size else slice(None)
    weights[positions] = generator.random(kept, dtype=np.float32) + 0.5  # no drawn weight is itself zero
    return weights.reshape(rows, columns)


def quiet_turns(slowest: Sequence[float], fastest: float, *, least: int) -> list[int]:
    """Indices of the turns to keep; `slowest`: of each turn, the slower of the probes before and after it.

    A turn is quiet if that is at most `SLACK` times the `fastest` probe: two virtual cores may share a physical one for a
    second, which halves every speed. If fewer than `least` turns are quiet, the `least` with the fastest probes are kept.
    """
    quiet = [i for i, seconds in enumerate(slowest) if seconds <= SLACK * fastest]
    return quiet if len(quiet) >= least else sorted(sorted(range(len(slowest)), key=slowest.__getitem__)[:least])


def settle(limit: float = 0.5) -> None:
    """Wait until this process is idle, at most `limit` seconds: threads spin on after their work, libgomp's for 5 ms.

    Systems may bring the time of a running thread up to date at their ticks only, every 4 or 10 ms: look for a whole one.
    """
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.001:
            return


def repetitions(call: Callable[[], object], min_seconds: float) -> int:
    """How many calls take about `min_seconds`, at least one: by the shortest of up to ten calls in as much time."""
    shortest, start = math.inf, time.perf_counter()
    for _ in range(_CALLS_TO_STEADY):
        begin = time.perf_counter()
        call()
        end = time.perf_counter()
        shortest = min(shortest, end - begin)
        if end - start >= min_seconds:
            break
    return math.ceil(min_seconds / shortest)


def sample(call: Callable[[], object], count: int) -> float:
    """Seconds per call, a mean over `count` calls in steady state, that is, after some that are not timed.

    Ten of these, or nearly twice `count`: a matrix that fits a cache takes some eight calls to be back in it.
    """
    for _ in range(min(_CALLS_TO_STEADY, 2 * count - 1)):
        call()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def fastest(timings: Sequence[Timing], *, sparse: bool) -> Timing:
    """The timing with the smallest median among the sparse, or among the dense, backends of full float32 precision."""
    candidates = [timing for timing in timings if timing.sparse == sparse and not timing.reduced]
    if not candidates:
        raise ReproError(f"no {'sparse' if sparse else 'dense'} backend was timed in float32: add one of BACKENDS")
    return min(candidates, key=lambda timing: timing.median_us)


def crossover_density(timings: Sequence[Timing]) -> float | None:
    """The density up to which the best sparse backend is at least as fast as the best dense one.

    `timings`: one shape and batch, sparse backends at two densities (1 - sparsity) or more. Between measured densities sparse
    times are taken as linear, as the bytes of CSR are. None if sparse loses even at the lowest density, or wins at all.
    """
    if len({(timing.rows, timing.columns, timing.batch) for timing in timings}) != 1:
        raise ReproError("a crossover is of one shape and batch: give the timings of exactly one")
    dense = fastest(timings, sparse=False).median_us
    ordered = sorted({timing.sparsity for timing in timings if timing.sparse}, reverse=True)
    if len(ordered) < 2:
        raise ReproError(f"a crossover needs two sparsities or more, only {ordered} was timed")
    gains = [dense - fastest([t for t in timings if t.sparsity == s], sparse=True).median_us for s in ordered]
    if gains[0] < 0:
        return None
    for (sparser, gain), (denser, loss) in itertools.pairwise(zip(ordered, gains, strict=True)):
        if loss < 0:
            return float(np.interp(0.0, (loss, gain), (1 - denser, 1 - sparser)))
    return None


def bandwidth(nbytes: int, *, seconds: float = 0.1) -> float:
    """Read bandwidth in GB/s, measured: the best rate at which all threads together add up an array of `nbytes` bytes.

    They do so over and over, for `seconds`, so that the array stays in whichever cache it fits, as weights do that are read at
    every time step; starting the threads is not counted. Raises `ReproError` below 64 KiB, which registers nearly hold.
    """
    if nbytes < 2**16:
        raise ReproError(f"a working set of {nbytes} bytes is too small to measure: give at least {2**16}")
    from repro.sparse.kernels import read_all
    from repro.sparse.packing import aligned
    from repro.sparse.regions import make_plan, thread_count

    array, sums = aligned(nbytes // 4, np.float32), np.zeros(1, np.float32)
    array += 1  # memory that was never written to is one page of zeros
    threads = thread_count()
    plan = make_plan([array.size * i // threads for i in range(threads + 1)], (array.ctypes.data, array.size))
    passes = max(1, round(1e8 / nbytes))
    settle()
    read_all()(plan, 1, sums)
    best, deadline = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        read_all()(plan, passes, sums)
        best = min(best, time.perf_counter() - start)
    return passes * array.nbytes / best / 1e9


def bound_us(nbytes: float, gbps: float) -> float:
    """Microseconds to read `nbytes` (see `repro.sparse.storage.stored_bytes`) at `gbps` GB/s: what a product takes at least."""
    if not (nbytes >= 0 and gbps > 0):
        raise ReproError(f"{nbytes} bytes at {gbps} GB/s: need a size and a positive bandwidth")
    return nbytes / gbps / 1e3
