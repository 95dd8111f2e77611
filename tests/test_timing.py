"""The timing harness: answers are checked before they are timed, rounds interleave, noisy rounds go, and the closed forms."""

import itertools
import re
import time

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from repro.errors import ReproError
from repro.sparse import timing
from repro.sparse.timing import (
    BACKENDS,
    Backend,
    Timing,
    bandwidth,
    bound_us,
    crossover_density,
    fastest,
    interleave,
    quiet_rounds,
    random_weights,
    time_products,
)

QUICK = {"rounds": 3, "min_seconds": 1e-3}


def made(backend: str, sparsity: float, median_us: float, *, rows: int = 8) -> Timing:
    sparse = BACKENDS[backend].sparse
    return Timing(
        backend=backend,
        sparse=sparse,
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


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_backends_compute_the_product(name, batch):
    """Against integers, where float32 is exact, with an empty row and an empty column."""
    weights = np.array([[0, 2, 0, -1], [0, 0, 0, 0], [3, 0, 0, 5]], dtype=np.float32)
    x = np.arange(4 * batch, dtype=np.float32).reshape(4, batch)
    expected = np.stack([2 * x[1] - x[3], 0 * x[0], 3 * x[0] + 5 * x[3]])
    untouched = weights.copy(), x.copy()
    answer = np.asarray(BACKENDS[name].prepare(weights, x)())
    answer = answer.T if BACKENDS[name].batch_first else answer
    assert np.array_equal(answer.reshape(3, batch), expected)
    assert np.array_equal(weights, untouched[0]) and np.array_equal(x, untouched[1])


def test_compressed_rows_are_scipys_with_four_byte_indices():
    weights = random_weights(30, 20, 0.8, np.random.default_rng(0))
    expected = scipy.sparse.csr_array(weights)
    parts = timing._csr(weights)
    assert [part.dtype for part in parts] == [np.float32, np.int32, np.int32]
    for part, reference in zip(parts, (expected.data, expected.indices, expected.indptr), strict=True):
        assert np.array_equal(part, reference)


def test_one_timing_per_backend_and_sparsity_that_can_differ():
    """Dense libraries are timed once, on the matrix with the fewest zeros; sparse ones wherever there are zeros."""
    timings = time_products(48, 32, (0.0, 0.5, 0.9), 2, **QUICK)
    dense = [(name, 0.0) for name in ("torch dense", "numpy dense")]
    sparse = list(itertools.product(("torch CSR", "scipy CSR"), (0.5, 0.9)))
    assert [(t.backend, t.sparsity) for t in timings] == dense + sparse
    for t in timings:
        assert (t.rows, t.columns, t.batch, t.sparse) == (48, 32, 2, "CSR" in t.backend)
        assert 0 < t.lower_us <= t.median_us <= t.upper_us
        assert 0 <= t.error < timing.TOLERANCE
        assert t.rounds == 3 and t.probe >= 1 and t.threads == torch.get_num_threads()
    assert any(t.error > 0 for t in timings)


def test_errors_follow_the_seed():
    """The seed fixes weights and input, so the deviation repeats; another seed gives another."""

    def errors(seed):
        return [t.error for t in time_products(40, 40, 0.5, 1, seed=seed, backends=["scipy CSR"], **QUICK)]

    assert errors(1) == errors(1) != errors(2)


def test_skipped_zeros_save_time():
    """A hundredth of the non-zeros takes a small part of the time."""
    full, thin = time_products(1500, 1500, (0.01, 0.99), 1, backends=["scipy CSR"], rounds=5, min_seconds=2e-3)
    assert full.median_us > 5 * thin.median_us


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda w, x: 1.001 * (w @ x), "off by"),
        (lambda w, x: np.nan * (w @ x), "off by nan"),
        (lambda w, x: (w @ x).T, "off by"),
        (lambda w, x: w.T @ x, "off by"),
        (lambda w, x: (w @ x)[:2], "shape"),
    ],
)
def test_a_wrong_backend_is_never_timed(monkeypatch, answer, complaint):
    """Square in every way (6 x 6, batch 6), so that no transposed answer hides behind its shape."""
    calls = []

    def prepare(weights, x):
        def call():
            calls.append(1)
            return answer(weights, x)

        return call

    monkeypatch.setitem(BACKENDS, "wrong", Backend(prepare, sparse=False))
    with pytest.raises(ReproError, match=f"wrong .*{complaint}.*not timed"):
        time_products(6, 6, 0.2, 6, backends=["numpy dense", "wrong"], **QUICK)
    assert len(calls) == 1


def test_a_new_backend_is_one_entry(monkeypatch):
    monkeypatch.setitem(BACKENDS, "einsum", Backend(lambda w, x: lambda: np.einsum("ij,jb->ib", w, x), sparse=False))
    (only,) = time_products(10, 20, 0.5, 2, backends=["einsum"], **QUICK)
    assert only.backend == "einsum" and not only.sparse


def test_openblas_is_held_to_torch_threads_only_meanwhile(monkeypatch):
    def blas():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    before, seen = blas(), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setitem(BACKENDS, "spy", Backend(lambda w, x: seen.append(blas()) or (lambda: w @ x), sparse=False))
    assert time_products(4, 4, 0.0, 1, backends=["spy"], **QUICK)[0].threads == 2
    assert seen == [{2}] and blas() == before


def test_interleaved_rounds_time_what_they_call(monkeypatch):
    """Every round visits every call once: one untimed repetition, then as many as fill `min_seconds`; times are per call."""
    log = []
    monkeypatch.setattr(timing, "_probe", lambda: log.append("|") or 1.0)

    def sleeper(name, seconds):
        return lambda: (log.append(name), time.sleep(seconds))

    samples = interleave([[sleeper("a", 1e-3), sleeper("b", 3e-3)], [sleeper("c", 8e-3)]], rounds=6, min_seconds=4e-3)
    assert samples.seconds.shape == (6, 3) and samples.dropped == 0 and samples.probe == 1
    assert (samples.seconds >= [1e-3, 3e-3, 8e-3]).all()
    assert samples.seconds[:, 0].min() < 4e-3
    rounds = "".join(log).split("|")[1:-1]
    assert len(rounds) == 6 and all(re.fullmatch("(a{2,5}b{2,3}c{2})|(c{2}a{2,5}b{2,3})", visit) for visit in rounds)
    assert len({visit[0] for visit in rounds}) == 2


@pytest.mark.parametrize(("wanted", "budget", "expected"), [(5, float("inf"), 5), (9, 0.0, 3), (2, 0.0, 2)])
def test_a_budget_stops_new_rounds(monkeypatch, wanted, budget, expected):
    monkeypatch.setattr(timing, "_probe", lambda: 1.0)
    assert len(interleave([[int]], rounds=wanted, min_seconds=1e-3, budget=budget).seconds) == expected


@pytest.mark.parametrize(
    ("probes", "least", "kept"),
    [
        ([1, 1, 1], 1, [0, 1]),
        ([1, 1.25, 1.26, 1], 0, [0]),
        ([1, 2, 1, 1, 1], 2, [2, 3]),
        ([1, 2, 1, 1.5, 1], 3, [0, 2, 3]),
        ([1, 2, 3, 4, 5], 3, [0, 1, 2]),
        ([1, 2], 0, []),
    ],
)
def test_quiet_rounds(probes, least, kept):
    """Both neighbours must be within a quarter of the fastest; failing that, the least slow ones, in order."""
    assert quiet_rounds(probes, least=least) == kept


def test_noisy_rounds_are_run_again(monkeypatch):
    """Rounds 1 and 2 touch a slow probe: five are run, three kept."""
    script = iter([1.0, 1.0, 2.0, 1.0, 1.0, 1.2])
    monkeypatch.setattr(timing, "_probe", lambda: next(script))
    samples = interleave([[int]], rounds=3, min_seconds=1e-3)
    assert samples.seconds.shape == (3, 1) and samples.dropped == 2 and samples.probe == 1.2


def test_a_machine_never_quiet_yields_what_it_can_and_says_so(monkeypatch):
    """Every round touches a probe of 2: it ends after twice the rounds, three are kept, and the probe tells."""
    script = itertools.cycle([1.0, 2.0])
    monkeypatch.setattr(timing, "_probe", lambda: next(script))
    samples = interleave([[int]], rounds=4, min_seconds=1e-3)
    assert samples.seconds.shape == (3, 1) and samples.dropped == 5 and samples.probe == 2.0


def test_fastest_and_crossover_take_the_best_of_each_kind():
    """Dense 100 us at best; CSR 10 us at 5 % and 190 at 95 %: equal half-way between."""
    timings = [made("torch dense", s, 300) for s in (0.05, 0.95)] + [made("numpy dense", s, 100) for s in (0.05, 0.95)]
    timings += [
        made("scipy CSR", 0.05, 400),
        made("scipy CSR", 0.95, 10),
        made("torch CSR", 0.05, 190),
        made("torch CSR", 0.95, 20),
    ]
    assert fastest(timings, sparse=False).backend == "numpy dense"
    assert fastest(timings, sparse=True).backend == "scipy CSR"
    assert crossover_density(timings) == pytest.approx(0.5)


@settings(deadline=None)
@given(st.floats(1, 1e3), st.floats(10, 1e4), st.lists(st.integers(1, 99), min_size=2, max_size=6, unique=True))
def test_crossover_of_a_linear_cost_is_where_it_equals_dense(dense, full, densities):
    """Sparse time `full * density`: equal at dense / full, None when that lies outside the densities measured."""
    densities = [d / 100 for d in densities]
    timings = [made("numpy dense", 1 - d, dense) for d in densities] + [made("torch CSR", 1 - d, full * d) for d in densities]
    exact = dense / full
    if min(densities) * 1.001 < exact < max(densities) * 0.999:
        assert crossover_density(timings) == pytest.approx(exact, rel=1e-6)
    elif not min(densities) * 0.999 < exact < max(densities) * 1.001:
        assert crossover_density(timings) is None


def test_bandwidth_is_bytes_over_the_best_time(monkeypatch):
    """With a clock that advances 1 ms per look, 4 MB read in 1 ms are 4 GB/s."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * 1e-3)
    assert bandwidth(4_000_000) == pytest.approx(4.0)


def test_bandwidth_of_this_machine_is_plausible():
    assert 0.5 < bandwidth(2**20, seconds=0.02) < 5000


def test_bounds_of_table_6():
    """The paper's dense times as bandwidths: 12.4 MB in 56 us are 221 GB/s, 78.6 MB in 313 us are 251 GB/s."""
    assert bound_us(4 * 1760**2, 221) == pytest.approx(56, rel=0.005)
    assert bound_us(4 * 3 * 2560**2, 251) == pytest.approx(313, rel=0.005)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: time_products(4, 4, 0.5, 1, backends=["cuSPARSE"]), "torch CSR"),
        (lambda: time_products(4, 0, 0.5, 1), "at least 1"),
        (lambda: time_products(4, 4, 1.0, 1), r"\[0, 1\)"),
        (lambda: time_products(2, 2, 0.9, 1), "at least one"),
        (lambda: time_products(4, 4, 0.5, 1, backends=[]), "at least one call"),
        (lambda: time_products(4, 4, 0.5, 1, rounds=0), "1 round"),
        (lambda: time_products(4, 4, 0.5, 1, min_seconds=1e-6), "per sample"),
        (lambda: fastest([made("numpy dense", 0.5, 1)], sparse=True), "no sparse"),
        (lambda: crossover_density([made("numpy dense", 0.5, 1), made("torch CSR", 0.5, 1)]), "two sparsities"),
        (lambda: crossover_density([made("numpy dense", 0.5, 1), made("torch CSR", 0.5, 1, rows=9)]), "one shape"),
        (lambda: crossover_density([]), "one shape"),
        (lambda: bandwidth(1000), "too small"),
        (lambda: bound_us(1, 0), "positive"),
    ],
)
def test_impossible_requests_are_refused(call, complaint):
    with pytest.raises(ReproError, match=complaint):
        call()
