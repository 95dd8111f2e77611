"""What a product y = W x costs, dense and sparse: the harness behind Table 6 of Narang et al. 2017.

W is `(rows, columns)` with a random, unstructured mask, x is `(columns, batch)`. Every backend's answer is checked against the
float64 product before anything is timed. Then all of them are timed in the same interleaved rounds, in steady state: each
sample follows an untimed call, so caches are as repeated calls leave them. Times are per call from Python, dispatch
included, on `torch.get_num_threads()` threads, to which OpenBLAS is held too. A backend takes x in the layout it likes best.
"""

import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from threadpoolctl import threadpool_limits
from torch.nn import functional

from repro.errors import ReproError, one_of

# Largest |y - exact| over largest |exact| that passes; the libraries below reach 3e-6, dense at 3,568 columns.
TOLERANCE = 1e-5
# A round counts if the probes around it took at most this many times the fastest probe; a shared core makes it about 1.9.
SLACK = 1.25
_LEAST_ROUNDS = 3
_LEAST_SECONDS = 1e-4

Call = Callable[[], object]


@dataclass(frozen=True)
class Backend:
    """One way to compute y = W x.

    `prepare(weights, x)` does what is done once per matrix (conversion, packing) and returns the call to be timed; it gets
    float32 arrays `(rows, columns)` and `(columns, batch)`, which it must not change. The call returns y, anything
    `numpy.asarray` reads, as `(rows, batch)` or, if `batch_first`, `(batch, rows)`. `sparse`: whether zeros are skipped.
    """

    prepare: Callable[[np.ndarray, np.ndarray], Call]
    sparse: bool
    batch_first: bool = False


def _torch_dense(weights, x) -> Call:
    weights, x = torch.from_numpy(weights), torch.from_numpy(x.T.copy())
    return lambda: functional.linear(x, weights)


def _numpy_dense(weights, x) -> Call:
    x = _vector_at_batch_1(x)
    return lambda: weights @ x


def _torch_csr(weights, x) -> Call:
    values, column, pointers = (torch.from_numpy(part) for part in _csr(weights))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        matrix = torch.sparse_csr_tensor(pointers, column, values, size=weights.shape, check_invariants=True)
    x = torch.from_numpy(_vector_at_batch_1(x))
    return lambda: matrix @ x


def _scipy_csr(weights, x) -> Call:
    matrix, x = scipy.sparse.csr_array(_csr(weights), shape=weights.shape), _vector_at_batch_1(x)
    return lambda: matrix @ x


def _csr(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, column of each, row pointers. Indices have 4 bytes: torch's default of 8 makes its product 1.5 times slower."""
    mask = weights != 0
    pointers = np.zeros(len(weights) + 1, dtype=np.int32)
    np.cumsum(mask.sum(axis=1), out=pointers[1:])
    column = np.broadcast_to(np.arange(weights.shape[1], dtype=np.int32), weights.shape)[mask]
    return weights[mask], column, pointers


def _vector_at_batch_1(x: np.ndarray) -> np.ndarray:
    """Libraries take their matrix-vector path for a vector only."""
    return x[:, 0] if x.shape[1] == 1 else x


# numpy's OpenBLAS is the best ready-made dense product at batch 1 on AMD processors: a speed-up over torch alone flatters.
BACKENDS: dict[str, Backend] = {
    "torch dense": Backend(_torch_dense, sparse=False, batch_first=True),
    "numpy dense": Backend(_numpy_dense, sparse=False),
    "torch CSR": Backend(_torch_csr, sparse=True),
    "scipy CSR": Backend(_scipy_csr, sparse=True),
}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One backend's time for one product: median and quartiles over `rounds` kept rounds, microseconds per call.

    `dropped`: rounds thrown away because something else slowed the machine; `probe`: slowest probe around a kept round over the
    fastest of all, above `SLACK` only if too few rounds were quiet. `error`: largest |y - exact| over largest |exact|.
    """

    backend: str
    sparse: bool
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


def time_products(
    rows: int,
    columns: int,
    sparsity: float | Sequence[float],
    batch: int,
    *,
    backends: Sequence[str] = tuple(BACKENDS),
    rounds: int = 7,
    min_seconds: float = 0.005,
    budget: float = math.inf,
    seed: int = 0,
) -> list[Timing]:
    """Check and time y = W x by every backend, all in the same rounds, for one or several sparsities (fractions of zeros).

    Of several, dense backends get the lowest only (zeros cost them the same), sparse ones all but a matrix without zeros.
    `rounds`, `min_seconds`, `budget`: see `interleave`, which says what rounds cost; making and checking the matrices comes on
    top (about 0.1 s per sparsity at 1760 x 1760, 0.5 s at 7680 x 2560). Timings come by backend, then sparsity. Raises
    `ReproError` for an unknown backend, an impossible size or sparsity, and a backend that is off by more than `TOLERANCE`.
    """
    for name in backends:
        one_of("backend", name, BACKENDS)
    if min(rows, columns, batch) < 1:
        raise ReproError(f"rows {rows}, columns {columns}, batch {batch}: each must be at least 1")
    sparsities = np.atleast_1d(sparsity).tolist()
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((columns, batch), dtype=np.float32)
    threads = torch.get_num_threads()
    groups, errors = {name: [] for name in backends}, {}
    with_zeros = [s for s in sparsities if s > 0] or sparsities
    cells = {name: with_zeros if BACKENDS[name].sparse else [min(sparsities)] for name in backends}
    with threadpool_limits(threads, user_api="blas"):
        for s in sparsities:
            weights = random_weights(rows, columns, s, generator)
            exact = weights.astype(np.float64) @ x.astype(np.float64)
            for name in groups:
                if s in cells[name]:
                    call = BACKENDS[name].prepare(weights, x)
                    errors[name, s] = _checked_error(name, call(), exact)
                    groups[name].append(call)
        samples = interleave(list(groups.values()), rounds=rounds, min_seconds=min_seconds, budget=budget, seed=seed)
    quartiles = 1e6 * np.percentile(samples.seconds, (25, 50, 75), axis=0)
    return [
        Timing(
            backend=name,
            sparse=BACKENDS[name].sparse,
            rows=rows,
            columns=columns,
            sparsity=s,
            batch=batch,
            median_us=float(median),
            lower_us=float(lower),
            upper_us=float(upper),
            rounds=len(samples.seconds),
            dropped=samples.dropped,
            probe=samples.probe,
            threads=threads,
            error=errors[name, s],
        )
        for (name, s), (lower, median, upper) in zip(
            [(name, s) for name in groups for s in cells[name]], quartiles.T, strict=True
        )
    ]


def _checked_error(name: str, answer: object, exact: np.ndarray) -> float:
    """Largest deviation from `exact` (rows, batch) over its largest entry; `ReproError` above `TOLERANCE`."""
    answer = np.asarray(answer)
    exact = exact.T if BACKENDS[name].batch_first else exact
    if answer.size != exact.size:
        raise ReproError(f"{name} returned shape {answer.shape} for a product of shape {exact.shape}: it was not timed")
    error = float(np.abs(answer.reshape(exact.shape) - exact).max() / np.abs(exact).max())
    # Written so that nan fails.
    if not error <= TOLERANCE:
        raise ReproError(f"{name} is off by {error:.1e} of the largest entry, allowed are {TOLERANCE:.0e}: it was not timed")
    return error


@dataclass(frozen=True)
class Samples:
    """`seconds`: time per call, `(kept rounds, calls)`; `dropped` and `probe` as in `Timing`."""

    seconds: np.ndarray
    dropped: int
    probe: float


def interleave(
    groups: Sequence[Sequence[Call]], *, rounds: int, min_seconds: float, budget: float = math.inf, seed: int = 0
) -> Samples:
    """Time all calls round by round: every call has one sample, of at least about `min_seconds`, per round.

    Calls of one group share a thread pool; groups are visited in an order drawn afresh for each round. A probe, a small matrix
    product, is timed between rounds; rounds next to a slow probe are dropped (see `quiet_rounds`) and run again, up to
    `2 * rounds` in all. No round starts more than `budget` seconds after the first one, but three (or `rounds`, if fewer)
    always do. A round costs `min_seconds` per call (or twice a call that takes longer), some milliseconds for the probe,
    and with several threads 0.1 s for OpenBLAS to fall asleep. Raises `ReproError` if there is nothing to time.
    """
    if rounds < 1 or not min_seconds >= _LEAST_SECONDS:
        raise ReproError(f"rounds {rounds}, min_seconds {min_seconds}: need at least 1 round and {_LEAST_SECONDS} s per sample")
    if not groups or not all(groups):
        raise ReproError("nothing to time: give at least one call per group")
    inner = []
    for group in groups:
        _settle()
        inner.append([_repetitions(call, min_seconds) for call in group])
    generator = np.random.default_rng(seed)
    least, taken, probes = min(_LEAST_ROUNDS, rounds), [], [_probe()]
    deadline = time.perf_counter() + budget
    while True:
        sampled = [[] for _ in groups]
        for g in generator.permutation(len(groups)):
            _settle()
            sampled[g] = [_sample(call, count) for call, count in zip(groups[g], inner[g], strict=True)]
        taken.append([seconds for group in sampled for seconds in group])
        probes.append(_probe())
        enough = len(quiet_rounds(probes, least=0)) >= rounds or len(taken) >= 2 * rounds
        if enough or (len(taken) >= least and time.perf_counter() > deadline):
            break
    kept = quiet_rounds(probes, least=least)
    slowest = max(max(probes[i], probes[i + 1]) for i in kept)
    return Samples(np.array([taken[i] for i in kept]), len(taken) - len(kept), slowest / min(probes))


def quiet_rounds(probes: Sequence[float], *, least: int) -> list[int]:
    """Indices of the rounds to keep; `probes` are seconds, round i ran between `probes[i]` and `probes[i + 1]`.

    A round is quiet if both took at most `SLACK` times the fastest of all: two virtual cores may share a physical one for a
    second, which halves every speed. If fewer than `least` rounds are quiet, the `least` with the fastest probes are kept.
    """
    worst = [max(pair) for pair in itertools.pairwise(probes)]
    quiet = [i for i, seconds in enumerate(worst) if seconds <= SLACK * min(probes)]
    return quiet if len(quiet) >= least else sorted(sorted(range(len(worst)), key=worst.__getitem__)[:least])


def _probe() -> float:
    """Seconds of a fixed matrix product on all threads, a mean over some 5 ms: the speed of the cores and who else uses them.

    Crowded caches or memory it does not see.
    """
    _settle()
    square = torch.ones(256, 256)
    return _sample(lambda: square @ square, 20)


def _settle(limit: float = 0.25) -> None:
    """Wait until this process is idle, at most `limit` seconds.

    Worker threads spin after their work is done, libgomp's for 5 ms and OpenBLAS's for 0.1 s, in the next library's way.
    """
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.002)
        if time.process_time() - before < 0.0005:
            return


def _repetitions(call: Call, min_seconds: float) -> int:
    return math.ceil(min_seconds / min(_sample(call, 1) for _ in range(3)))


def _sample(call: Call, count: int) -> float:
    call()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def fastest(timings: Sequence[Timing], *, sparse: bool) -> Timing:
    """The timing with the smallest median among the sparse, or among the dense, backends."""
    candidates = [timing for timing in timings if timing.sparse == sparse]
    if not candidates:
        raise ReproError(f"no {'sparse' if sparse else 'dense'} backend was timed: add one of BACKENDS")
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
    """Read bandwidth in GB/s, measured: the best rate at which an array of `nbytes` bytes is reduced, over and over.

    The array stays in whichever cache it fits, as weights do that are read at every time step. Two reductions are tried for
    `seconds` together, torch's sum (all threads) and numpy's maximum (one). Hand-written loads could be faster: a lower
    bound. Raises `ReproError` below 64 KiB, where the cost of the call itself would be measured.
    """
    if nbytes < 2**16:
        raise ReproError(f"a working set of {nbytes} bytes is too small to measure: give at least {2**16}")
    array = np.ones(nbytes // 4, dtype=np.float32)
    tensor = torch.from_numpy(array)
    _settle()
    best = math.inf
    for read in (tensor.sum, array.max):
        read()
        deadline = time.perf_counter() + seconds / 2
        while time.perf_counter() < deadline:
            start = time.perf_counter()
            read()
            best = min(best, time.perf_counter() - start)
    return array.nbytes / best / 1e9


def bound_us(nbytes: float, gbps: float) -> float:
    """Microseconds to read `nbytes` (see `repro.sparse.storage.stored_bytes`) at `gbps` GB/s: what a product takes at least."""
    if not (nbytes >= 0 and gbps > 0):
        raise ReproError(f"{nbytes} bytes at {gbps} GB/s: need a size and a positive bandwidth")
    return nbytes / gbps / 1e3
