"""The product bench: answers are checked before they are timed, processes take turns, noisy turns go, and nothing hangs."""

import itertools
import json
import os
import subprocess
import sys
from math import log2
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from toy_peers import TOYS

from repro.engine import Context
from repro.errors import ReproError
from repro.sparse import bench as bench_module
from repro.sparse import worker as worker_module
from repro.sparse.bench import Bench, probe, time_products
from repro.sparse.peers import BACKENDS, TOLERANCE, Backend, csr
from repro.sparse.timing import random_weights
from repro.sparse.worker import Peers, Worker, checked_error
from repro.studies.timings import ProductTrial

QUICK = {"rounds": 2, "min_seconds": 2e-4}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """A machine that is always quiet: these tests wait for nothing."""
    monkeypatch.setattr(bench_module, "probe", lambda threads: 1.0)


@pytest.fixture(scope="module")
def bench():
    with Bench(1) as bench:
        yield bench


@pytest.fixture
def toys(monkeypatch):
    """Processes that know the backends of `toy_peers`, as does this one."""
    monkeypatch.setattr(bench_module, "BACKENDS", BACKENDS | TOYS)
    monkeypatch.setattr(worker_module, "_COMMAND", "from toy_peers import serve; serve({})")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    with Bench(1) as bench:
        yield bench


def scripted_probe(monkeypatch, *seconds):
    """Probes of these durations, the last one for ever, and no waiting for better times."""
    script = itertools.chain(seconds, itertools.repeat(seconds[-1]))
    monkeypatch.setattr(bench_module, "probe", lambda threads: next(script))
    monkeypatch.setattr(bench_module, "_PATIENCE", 0.0)


# ---------------------------------------------------------------------------------------------------------- the backends


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_backends_compute_the_product(bench, batch):
    """Every backend at hand, each in its process, with an empty row and an empty column; float32 libraries to float32."""
    weights = random_weights(37, 50, 0.8, np.random.default_rng(batch))
    weights[5] = weights[:, 7] = 0
    products = bench.time_weights([weights], batch, **QUICK)
    timed = {timing.backend: timing for timing in products.timings}
    assert timed.keys() | products.missing.keys() == BACKENDS.keys() and not timed.keys() & products.missing.keys()
    assert {"torch dense", "torch CSR", "scipy CSR", "repro sparse"} <= timed.keys()
    for name, timing in timed.items():
        assert timing.error <= (BACKENDS[name].tolerance if timing.reduced else 2e-6), name
        assert timing.error > 1e-5 or not timing.reduced, name


def test_only_int8_and_16_bit_count_as_reduced():
    assert {name for name, backend in BACKENDS.items() if backend.reduced} == {"int8 dynamic", "repro 16-bit"}


def test_a_missing_library_or_operation_is_named(monkeypatch, tmp_path):
    """What cannot be imported, and what this torch or this numpy does not have, is no error but a reason."""
    import torch

    for module in ("onnxruntime", "sparse_dot_mkl"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("repro.sparse.peers._mkl_library", lambda: "libmkl_rt.so")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr("threadpoolctl.threadpool_info", lambda: [])
    monkeypatch.delenv("MKL_RT", raising=False)
    np.save(tmp_path / "w.npy", np.ones((3, 2), np.float32))
    names = ["onnxruntime dense", "MKL CSR", "oneDNN packed", "OpenBLAS dense", "scipy CSR"]
    errors, missing = Peers().prepare(names, tmp_path / "w.npy", np.ones((2, 1), np.float32), np.full((3, 1), 2.0))
    assert errors == {"scipy CSR": 0.0}
    assert missing == {
        "onnxruntime dense": "onnxruntime is not installed",
        "MKL CSR": "sparse_dot_mkl is not installed",
        "oneDNN packed": "this torch has no mkldnn._linear_pointwise",
        "OpenBLAS dense": "numpy is linked with another BLAS here",
    }


def test_compressed_rows_are_scipys_with_four_byte_indices():
    weights = random_weights(30, 20, 0.8, np.random.default_rng(0))
    expected = scipy.sparse.csr_array(weights)
    parts = csr(weights)
    assert [part.dtype for part in parts] == [np.float32, np.int32, np.int32]
    for part, reference in zip(parts, (expected.data, expected.indices, expected.indptr), strict=True):
        assert np.array_equal(part, reference)


# ------------------------------------------------------------------------------------------------------ checks and timings


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda y: 1.001 * y, "off by 1.0e-03"),
        (lambda y: np.nan * y, "off by nan"),
        (lambda y: y.T, "off by"),
        (lambda y: y[:2], "shape"),
    ],
)
def test_a_wrong_answer_is_refused(answer, complaint):
    """Square, so that no transposed answer hides behind its shape."""
    exact = np.random.default_rng(0).standard_normal((6, 6))
    backend = Backend("toy", None, sparse=False)
    assert checked_error("toy", backend, exact + 1e-6 * np.abs(exact).max(), exact) == pytest.approx(1e-6)
    assert checked_error("toy", Backend("toy", None, sparse=False, batch_first=True), exact.T, exact) == 0
    with pytest.raises(ReproError, match=f"toy .*{complaint}.*not timed"):
        checked_error("toy", backend, answer(exact), exact)


def test_the_error_is_that_of_the_float64_product(bench):
    """scipy's own float32 product of the same weights and input, against float64, made here."""
    (timing,) = bench.time_products(40, 30, 0.5, 1, backends=["scipy CSR"], seed=3, **QUICK).timings
    weights = random_weights(40, 30, 0.5, np.random.default_rng(3))
    x = np.random.default_rng(3).spawn(2)[1].standard_normal(30, dtype=np.float32)
    exact = weights.astype(np.float64) @ x
    expected = np.abs(scipy.sparse.csr_array(weights) @ x - exact).max() / np.abs(exact).max()
    assert timing.error == pytest.approx(expected, rel=1e-9) and 0 < expected < TOLERANCE


def test_one_timing_per_backend_and_sparsity_that_can_differ(bench):
    """Dense libraries are timed once, on the matrix with the fewest zeros; sparse ones wherever there are zeros."""
    names = ["torch dense", "scipy CSR", "torch CSR"]
    timings = bench.time_products(48, 32, (0.0, 0.5, 0.9), 2, backends=names, **QUICK).timings
    sparse = list(itertools.product(("scipy CSR", "torch CSR"), (0.5, 0.9)))
    assert [(t.backend, t.sparsity) for t in timings] == [("torch dense", 0.0), *sparse]
    for t in timings:
        assert (t.rows, t.columns, t.batch, t.threads) == (48, 32, 2, 1)
        assert (t.sparse, t.runtime) == (BACKENDS[t.backend].sparse, BACKENDS[t.backend].runtime)
        assert 0 < t.lower_us <= t.median_us <= t.upper_us
        assert 0 <= t.error < TOLERANCE
        assert t.rounds == 2 and t.dropped >= 0 and t.probe >= 1


def test_given_matrices_are_timed_at_their_own_sparsity(bench):
    weights = np.ones((4, 5), np.float32)
    pruned = np.where(np.arange(20).reshape(4, 5) < 15, 0, weights)
    timings = bench.time_weights([weights, pruned], 1, backends=["scipy CSR", "torch dense"], **QUICK).timings
    assert [(t.backend, t.sparsity) for t in timings] == [("scipy CSR", 0.75), ("torch dense", 0.0)]
    (empty,) = bench.time_weights([0 * weights], 1, backends=["scipy CSR"], **QUICK).timings
    assert empty.sparsity == 1 and empty.error == 0


def test_errors_follow_the_seed(bench):
    """The seed fixes weights and input, so the deviation repeats; another seed gives another."""

    def errors(seed):
        return [t.error for t in bench.time_products(40, 40, 0.5, 1, seed=seed, backends=["scipy CSR"], **QUICK).timings]

    assert errors(1) == errors(1) != errors(2)


def test_skipped_zeros_save_time(bench):
    """A hundredth of the non-zeros takes a small part of the time."""
    options = {"backends": ["scipy CSR"], "rounds": 3, "min_seconds": 2e-3}
    full, thin = bench.time_products(1500, 1500, (0.01, 0.99), 1, **options).timings
    assert full.median_us > 5 * thin.median_us


def test_times_are_per_call_in_microseconds(toys, monkeypatch):
    """Two turns whose calls took 1 and 3 ms: median 2, quartiles 1.5 and 2.5."""
    samples = iter([[1e-3], [3e-3]])
    ask = Worker.ask

    def asked(self, request, *arguments):
        return next(samples) if request == "sample" else ask(self, request, *arguments)

    monkeypatch.setattr(Worker, "ask", asked)
    (timing,) = toys.time_products(4, 4, 0.5, 1, backends=["right"], rounds=2).timings
    assert (timing.lower_us, timing.median_us, timing.upper_us) == pytest.approx((1500, 2000, 2500))


# ------------------------------------------------------------------------------------------------------------ turns


def test_every_process_has_its_turn_in_every_round_in_changing_order(bench, monkeypatch):
    log, ask = [], Worker.ask
    monkeypatch.setattr(bench_module, "probe", lambda threads: log.append("|") or 1.0)

    def asked(self, request, *arguments):
        log.extend([self.runtime] * (request == "sample"))
        return ask(self, request, *arguments)

    monkeypatch.setattr(Worker, "ask", asked)
    bench.time_products(8, 8, 0.5, 1, backends=["torch dense", "scipy CSR"], rounds=6, min_seconds=2e-4)
    assert log[0::2] == ["|"] * 13
    rounds = [tuple(log[1::2][i : i + 2]) for i in range(0, 12, 2)]
    assert set(rounds) == {("numpy", "torch"), ("torch", "numpy")}


def test_turns_next_to_a_slow_probe_are_taken_again(toys, monkeypatch):
    """The third probe is slow, so that turns 2 and 3 go: five are taken, three kept."""
    scripted_probe(monkeypatch, 1.0, 1.0, 2.0, 1.0, 1.2)
    (timing,) = toys.time_products(4, 4, 0.5, 1, backends=["right"], rounds=3, min_seconds=2e-4).timings
    assert (timing.rounds, timing.dropped, timing.probe) == (3, 2, 1.2)


def test_a_machine_never_quiet_yields_what_it_can_and_says_so(toys, monkeypatch):
    """All but the first probe take twice as long: it ends after twice the rounds, three are kept, and the probe tells."""
    scripted_probe(monkeypatch, 1.0, 2.0)
    (timing,) = toys.time_products(4, 4, 0.5, 1, backends=["right"], rounds=4, min_seconds=2e-4).timings
    assert (timing.rounds, timing.dropped, timing.probe) == (3, 5, 2.0)


def test_a_slow_moment_is_waited_out(toys, monkeypatch):
    """The probe after the first turn and the next two are slow: only that turn is lost, the second waits for a quiet probe."""
    scripted_probe(monkeypatch, 1.0, 2.0, 2.0, 2.0, 1.0)
    monkeypatch.setattr(bench_module, "_PATIENCE", 1.0)
    (timing,) = toys.time_products(4, 4, 0.5, 1, backends=["right"], rounds=3, min_seconds=2e-4).timings
    assert (timing.rounds, timing.dropped, timing.probe) == (3, 1, 1.0)


@pytest.mark.parametrize(("wanted", "budget", "expected"), [(5, float("inf"), 5), (9, 0.0, 3), (2, 0.0, 2)])
def test_a_budget_stops_new_rounds(toys, wanted, budget, expected):
    products = toys.time_products(4, 4, 0.5, 1, backends=["right"], rounds=wanted, budget=budget, min_seconds=2e-4)
    assert products.timings[0].rounds == expected


def test_the_probe_measures_every_thread_and_leaves_no_trace():
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    assert 1e-5 < probe(1) < 0.1 and 1e-5 < probe(3) < 0.5
    assert before is None or os.sched_getaffinity(0) == before


# --------------------------------------------------------------------------------------------------------- processes


def test_missing_backends_come_with_their_reason_and_the_others_are_timed(toys):
    names = ["absent", "unable", "unable when sparse", "right"]
    products = toys.time_products(8, 8, (0.5, 0.9), 1, backends=names, **QUICK)
    assert products.missing == {
        "absent": "a_library_that_nobody_has is not installed",
        "unable": "this processor is too old",
        "unable when sparse": "too many zeros",
    }
    assert [(t.backend, t.sparsity) for t in products.timings] == [
        ("unable when sparse", 0.5),
        ("right", 0.5),
        ("right", 0.9),
    ]
    assert toys.time_products(8, 8, 0.5, 1, backends=["absent"], **QUICK).timings == []


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("dying", "frail process ended with status 3 when asked to prepare"),
        ("dying later", "frail process ended with status 4 when asked to calibrate"),
        ("hanging", "slow process gave no answer to prepare in 1 s"),
        ("failing", "failing failed with ValueError: no such matrix"),
        ("wrong", "wrong is off by"),
    ],
)
def test_a_broken_process_is_an_error_and_the_bench_goes_on(toys, monkeypatch, name, complaint):
    """Never a hang; and whatever was under way in other processes, the next product starts afresh."""
    monkeypatch.setattr(worker_module, "_ANSWER_SECONDS", 1.0)
    with pytest.raises(ReproError, match=complaint):
        toys.time_products(4, 4, 0.5, 1, backends=["right", name], **QUICK)
    monkeypatch.setattr(worker_module, "_ANSWER_SECONDS", 60.0)
    assert len(toys.time_products(4, 4, 0.5, 1, backends=["right"], **QUICK).timings) == 1


def test_a_process_killed_between_products_is_an_error(toys):
    toys.time_products(4, 4, 0.5, 1, backends=["right"], **QUICK)
    process = toys._workers["toy"]._process
    process.kill()
    process.wait()
    with pytest.raises(ReproError, match=r"toy process ended with status -9"):
        toys.time_products(4, 4, 0.5, 1, backends=["right"], **QUICK)


def test_processes_are_kept_until_the_end(toys):
    options = {"backends": ["right"], **QUICK}
    toys.time_products(4, 4, 0.5, 1, **options)
    process = toys._workers["toy"]._process
    toys.time_products(5, 3, 0.5, 2, **options)
    assert toys._workers["toy"]._process is process and process.poll() is None
    toys.close()
    assert process.poll() == 0


def test_processes_end_with_their_parent():
    """Even if that is killed: the pipe that both write to reaches its end when the last of them has gone."""
    script = (
        "from repro.sparse.bench import Bench; import time; bench = Bench(1)\n"
        "print(bench._start({'numpy'})[0].ask('clear'), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "None\n"
        parent.kill()
        assert parent.communicate(timeout=30)[0] == ""


def test_threads_are_set_before_libraries_load(toys, monkeypatch):
    """All pools get the wanted count but OpenBLAS, which has work in its own process only."""
    assert toys.time_products(4, 4, 0.5, 1, backends=["telling threads"], **QUICK).missing == {"telling threads": "1 1 1 1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    products = time_products(4, 4, 0.5, 1, backends=["telling threads", "right"], **QUICK)
    assert products.missing == {"telling threads": "2 2 2 1"} and products.timings[0].threads == 2


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda bench: bench.time_products(4, 4, 0.5, 1, backends=["cuSPARSE"]), "torch CSR"),
        (lambda bench: bench.time_products(4, 0, 0.5, 1), "at least 1"),
        (lambda bench: bench.time_products(4, 4, 1.0, 1, backends=["scipy CSR"]), r"\[0, 1\)"),
        (lambda bench: bench.time_products(2, 2, 0.9, 1, backends=["scipy CSR"]), "at least one"),
        (lambda bench: bench.time_products(4, 4, 0.5, 1, backends=[]), "at least one backend"),
        (lambda bench: bench.time_products(4, 4, [], 1), "one sparsity"),
        (lambda bench: bench.time_products(4, 4, 0.5, 1, rounds=0), "at least 1"),
        (lambda bench: Bench(0), "threads is 0"),
        (lambda bench: bench.time_products(4, 4, 0.5, 1, min_seconds=1e-6), "per sample"),
        (lambda bench: bench.time_weights([np.ones((2, 3)), np.ones((3, 2))], 1), "same shape"),
        (lambda bench: bench.time_weights([np.ones(3)], 1), "same shape"),
        (lambda bench: bench.time_weights([], 1), "same shape"),
    ],
)
def test_impossible_requests_are_refused(bench, call, complaint):
    with pytest.raises(ReproError, match=complaint):
        call(bench)


# ---------------------------------------------------------------------------------------------------------- the trial


def test_the_trial_times_its_cells_and_names_what_is_missing(monkeypatch, tmp_path):
    """Two shapes at batch 1, one of them at batch 4, dense at 0 and sparse at 90 %, each row with its bytes."""
    wanted = {name: BACKENDS[name] for name in ("torch dense", "scipy CSR")} | {"absent": TOYS["absent"]}
    monkeypatch.setattr(bench_module, "BACKENDS", wanted)
    monkeypatch.setitem(Bench._time.__kwdefaults__, "backends", tuple(wanted))
    monkeypatch.setattr(worker_module, "_COMMAND", "from toy_peers import serve; serve({})")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    shapes = ((64, 32), (96, 32))
    trial = ProductTrial(shapes=shapes, large_batch_shapes=shapes[1:], sparsities=(0.0, 0.9), batches=(1, 4), rounds=1)
    outcome = trial.run(Context(tmp_path / "checkpoint", 1))
    assert outcome.metrics == {"missing absent": "a_library_that_nobody_has is not installed"}
    curve = outcome.curves["products"]
    cells = list(zip(curve["rows"], curve["batch"], curve["backend"], curve["sparsity"], curve["bytes"], strict=True))
    # 4 bytes a weight dense; sparse 4 for each that is left and n H(k / n) bits for the positions of all.
    small, large = (
        4 * k - n * (k / n * log2(k / n) + (1 - k / n) * log2(1 - k / n)) / 8 for n, k in ((2048, 205), (3072, 307))
    )
    expected = [
        (64, 1, "torch dense", 0.0, 8192),
        (64, 1, "scipy CSR", 0.9, small),
        (96, 1, "torch dense", 0.0, 12288),
        (96, 1, "scipy CSR", 0.9, large),
        (96, 4, "torch dense", 0.0, 12288),
        (96, 4, "scipy CSR", 0.9, large),
    ]
    assert [cell[:4] for cell in cells] == [cell[:4] for cell in expected]
    assert [cell[4] for cell in cells] == pytest.approx([cell[4] for cell in expected])
    assert json.loads((tmp_path / "checkpoint").read_text())["cells"] == 3  # kept as they were timed
    assert {"sparse", "median_us", "lower_us", "upper_us", "dropped", "error", "gbps"} <= curve.keys()
