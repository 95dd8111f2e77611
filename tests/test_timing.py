"""What timings are made of and what is read off them: exact zeros, quiet turns, the fastest, the cross-over, the bounds."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.errors import ReproError
from repro.sparse.peers import BACKENDS
from repro.sparse.timing import (
    Timing,
    bandwidth,
    bound_us,
    crossover_density,
    fastest,
    quiet_turns,
    random_weights,
    repetitions,
    sample,
    settle,
)


def made(backend: str, sparsity: float, median_us: float, *, rows: int = 8) -> Timing:
    return Timing(
        backend=backend,
        runtime=BACKENDS[backend].runtime,
        sparse=BACKENDS[backend].sparse,
        reduced=BACKENDS[backend].reduced,
        rows=rows,
        columns=8,
        sparsity=sparsity,
        batch=1,
        median_us=median_us,
        lower_us=median_us,
        upper_us=median_us,
        rounds=3,
        dropped=0,
        probe=1.0,
        threads=1,
        error=0.0,
    )


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 0.99), st.integers(0, 9))
def test_weights_have_exactly_the_wanted_zeros(rows, columns, sparsity, seed):
    zeros = round(sparsity * rows * columns)
    if zeros == rows * columns:
        with pytest.raises(ReproError, match="keep at least one"):
            random_weights(rows, columns, sparsity, np.random.default_rng(seed))
    else:
        weights = random_weights(rows, columns, sparsity, np.random.default_rng(seed))
        assert weights.shape == (rows, columns) and weights.dtype == np.float32
        assert (weights == 0).sum() == zeros


def test_the_mask_is_unstructured_and_comes_from_the_generator():
    """Zeros per row, and per column, scatter as draws without replacement do: variance 400 * 0.9 * 0.1 (to 10 % or so)."""
    draw = [random_weights(400, 400, 0.9, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(draw[0], draw[1]) and not np.array_equal(draw[0], draw[2])
    for axis in (0, 1):
        assert (draw[0] == 0).sum(axis=axis).var() == pytest.approx(36, rel=0.35)


@pytest.mark.parametrize(("count", "untimed"), [(1, 1), (3, 5), (20, 10)])
def test_a_sample_is_the_mean_of_calls_after_untimed_ones(monkeypatch, count, untimed):
    """With a clock that only calls advance: 3 s each, but 100 s as long as caches are cold."""
    clock, calls = [0.0], []

    def call():
        calls.append(1)
        clock[0] += 3.0 if len(calls) > untimed else 100.0

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert sample(call, count) == 3.0 and len(calls) == untimed + count


@pytest.mark.parametrize(
    ("durations", "expected"),
    [
        ([4, 1, 1, 1], 5),  # 4 ms of cold caches, then 1 ms: 5 calls fill 5 ms
        ([0.1] * 10, 50),
        ([8], 1),  # one look at a slow call is enough
        ([2, 9], 3),
    ],
)
def test_repetitions_fill_the_time(monkeypatch, durations, expected):
    clock, milliseconds = [0.0], iter(durations)

    def call():
        clock[0] += next(milliseconds) / 1e3 * (1 + 1e-9)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert repetitions(call, 5e-3) == expected
    assert next(milliseconds, None) is None or durations[0] == 4


def test_settling_waits_for_busy_threads_but_not_for_ever(monkeypatch):
    """Two looks at a process that works on, one at an idle one; and an end if it never rests."""
    clock, busy = [0.0], [1.0, 2.0, 2.0, 3.0, 3.0]
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "process_time", lambda: busy.pop(0) if len(busy) > 1 else busy[0])
    settle()
    assert clock[0] == pytest.approx(0.03)
    clock[0], count = 0.0, itertools.count()
    monkeypatch.setattr(time, "process_time", lambda: float(next(count)))
    settle(limit=0.1)
    assert clock[0] == pytest.approx(0.1, abs=0.011)


@pytest.mark.parametrize(
    ("slowest", "least", "kept"),
    [
        ([1, 1], 1, [0, 1]),
        ([1.25, 1.26, 1], 0, [0, 2]),
        ([2, 2, 1, 1], 2, [2, 3]),
        ([2, 2.5, 1.5, 1], 3, [0, 2, 3]),
        ([2, 3, 4, 5], 3, [0, 1, 2]),
        ([2], 0, []),
    ],
)
def test_quiet_turns(slowest, least, kept):
    """Probes up to a quarter slower than the fastest (1) pass; failing enough of them, the least slow ones, in order."""
    assert quiet_turns(slowest, 1.0, least=least) == kept


def test_fastest_and_crossover_take_the_best_of_each_kind():
    """Dense 100 us at best; CSR 10 us at 5 % and 190 at 95 %: equal half-way between."""
    timings = [made("torch dense", s, 300) for s in (0.05, 0.95)] + [made("OpenBLAS dense", s, 100) for s in (0.05, 0.95)]
    timings += [
        made("scipy CSR", 0.05, 400),
        made("scipy CSR", 0.95, 10),
        made("torch CSR", 0.05, 190),
        made("torch CSR", 0.95, 20),
    ]
    assert fastest(timings, sparse=False).backend == "OpenBLAS dense"
    assert fastest(timings, sparse=True).backend == "scipy CSR"
    reduced = [made("int8 dynamic", 0.05, 1), made("repro 16-bit", 0.95, 1)]
    assert fastest(timings + reduced, sparse=False).backend == "OpenBLAS dense"
    assert fastest(timings + reduced, sparse=True).backend == "scipy CSR"
    assert crossover_density(timings) == pytest.approx(0.5)


@settings(deadline=None)
@given(st.floats(1, 1e3), st.floats(10, 1e4), st.lists(st.integers(1, 99), min_size=2, max_size=6, unique=True))
def test_crossover_of_a_linear_cost_is_where_it_equals_dense(dense, full, densities):
    """Sparse time `full * density`: equal at dense / full, None when that lies outside the densities measured."""
    densities = [d / 100 for d in densities]
    timings = [made("OpenBLAS dense", 1 - d, dense) for d in densities] + [
        made("torch CSR", 1 - d, full * d) for d in densities
    ]
    exact = dense / full
    if min(densities) * 1.001 < exact < max(densities) * 0.999:
        assert crossover_density(timings) == pytest.approx(exact, rel=1e-6)
    elif not min(densities) * 0.999 < exact < max(densities) * 1.001:
        assert crossover_density(timings) is None


def test_bandwidth_is_bytes_over_the_best_time(monkeypatch):
    """With a clock that advances 1 ms per look, 4 MB read 25 times in 1 ms are 100 GB/s."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * 1e-3)
    assert bandwidth(4_000_000) == pytest.approx(100.0)


def test_bandwidth_of_this_machine_is_plausible():
    assert 0.5 < bandwidth(2**20, seconds=0.02) < 5000


def test_bounds_of_table_6():
    """The paper's dense times as bandwidths: 12.4 MB in 56 us are 221 GB/s, 78.6 MB in 313 us are 251 GB/s."""
    assert bound_us(4 * 1760**2, 221) == pytest.approx(56, rel=0.005)
    assert bound_us(4 * 3 * 2560**2, 251) == pytest.approx(313, rel=0.005)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: fastest([made("OpenBLAS dense", 0.5, 1)], sparse=True), "no sparse"),
        (lambda: crossover_density([made("OpenBLAS dense", 0.5, 1), made("torch CSR", 0.5, 1)]), "two sparsities"),
        (lambda: crossover_density([made("OpenBLAS dense", 0.5, 1), made("torch CSR", 0.5, 1, rows=9)]), "one shape"),
        (lambda: crossover_density([]), "one shape"),
        (lambda: bandwidth(1000), "too small"),
        (lambda: bound_us(1, 0), "positive"),
    ],
)
def test_impossible_requests_are_refused(call, complaint):
    with pytest.raises(ReproError, match=complaint):
        call()
