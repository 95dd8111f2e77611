"""Local processes and a Dask cluster run the same payload, and survive the death of a worker."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from toys import Clock, Faulty, Pinned, Toy, Walk, logged

from repro.engine import Store, dask_executor, local_executor, run_trials
from repro.engine.executors import work
from repro.engine.provenance import available_cores
from repro.errors import ReproError

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch):
    """The folder where executions leave their lines; inherited by workers."""
    folder = tmp_path / "log"
    folder.mkdir()
    monkeypatch.setenv("TOYS_LOG", str(folder))
    return folder


def test_threads_are_set_before_numpy_is_loaded(tmp_path, monkeypatch):
    """In the environment and in the library, whatever the parent's own environment says."""
    cores = available_cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with local_executor(1, cores) as executor:
        result = executor.submit(work, Pinned(), tmp_path / "c", cores, (), "local").result()
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert result.outcome.metrics == {"early": False, "blas": cores, "omp": str(cores)}


def test_a_dead_process_takes_only_its_own_trial(tmp_path, log):
    """The neighbour goes on undisturbed, and the next trial gets a new process."""
    with local_executor(2, 1) as executor:
        neighbour = executor.submit(work, Toy(value=5, sleep=1.0), tmp_path / "a", 1, (), "local")
        killed = executor.submit(work, Faulty(how="killed"), tmp_path / "b", 1, (), "local")
        assert isinstance(killed.exception(), BrokenProcessPool)
        after = executor.submit(work, Toy(value=6), tmp_path / "b", 1, (), "local").result()
        assert after.outcome.metrics["square"] == 36
        assert neighbour.result().outcome.metrics["square"] == 25 and logged(log, "toy").count("5") == 1


def test_a_process_runs_one_trial_at_a_time(tmp_path):
    """A Dask worker with two threads must not let two trials share torch's generator and thread count."""
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(work, Clock(number=i), tmp_path / str(i), 1, (), "dask") for i in range(2)]
    first, second = sorted((run.result().outcome.metrics for run in runs), key=lambda metrics: metrics["begin"])
    assert first["end"] <= second["begin"]


def test_without_distributed_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ReproError, match=r"pip install 'repro\[dask\]'"):
        dask_executor("tcp://127.0.0.1:1")


def test_a_silent_scheduler_is_told_within_the_timeout():
    with pytest.raises(ReproError, match=r"no Dask scheduler answered at tcp://127.0.0.1:1 within 1 s"):
        dask_executor("tcp://127.0.0.1:1", timeout=1)


@pytest.fixture
def cluster(tmp_path):
    """A real scheduler and two worker processes on loopback: (address, workers)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(HERE), "DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE": "false"}
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", address, "--no-dashboard", "--no-show"], **options
    )
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    workers = [subprocess.Popen(worker, **options) for _ in range(2)]
    yield address, scheduler, workers
    for process in (*workers, scheduler):
        process.kill()
        process.wait()


def test_a_dask_run_completes_although_a_worker_is_killed(cluster, tmp_path, log):
    """SIGKILL in the middle of a long trial: it goes on from its checkpoint on the other worker, nothing is repeated."""
    address, _, workers = cluster
    store, walk = Store(tmp_path / "store"), Walk(steps=30, seed=4, pause=0.05)
    executor = dask_executor(address)
    end = time.monotonic() + 20
    while executor.slots < 2:
        assert time.monotonic() < end, "the workers did not join"
        time.sleep(0.05)

    def kill_the_walker():
        while len(logged(log, "walk4")) < 5:
            time.sleep(0.02)
        os.kill(int(logged(log, "walkers")[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill_the_walker)
    killer.start()
    trials = [walk, *(Toy(value=i, sleep=0.05) for i in range(8))]
    with executor:
        records = run_trials(trials, store, executor=executor)
    killer.join()
    assert sorted(worker.poll() is None for worker in workers) == [False, True]
    assert [records[Toy(value=i, sleep=0.05).key()].metrics["square"] for i in range(8)] == [i * i for i in range(8)]
    assert Counter(logged(log, "toy")) == Counter("01234567")
    assert 30 <= len(logged(log, "walk4")) <= 31
    assert records[walk.key()].provenance["executor"] == "dask"
    alone = run_trials([walk], Store(tmp_path / "alone"))
    assert records[walk.key()].metrics == alone[walk.key()].metrics


def test_a_lost_scheduler_ends_the_run_with_a_sentence(cluster, tmp_path, log):
    """Nothing hangs, what is recorded stays."""
    address, scheduler, _ = cluster
    executor = dask_executor(address)
    store = Store(tmp_path / "store")

    def kill_the_scheduler():
        while not logged(log, "walk0"):
            time.sleep(0.02)
        scheduler.kill()

    killer = threading.Thread(target=kill_the_scheduler)
    killer.start()
    with executor, pytest.raises(ReproError, match=f"^the Dask scheduler at {address} is gone: start it and run again$"):
        run_trials([Walk(steps=10_000), *(Toy(value=i, sleep=5.0) for i in range(4))], store, executor=executor)
    killer.join()
    assert store.records("toys") == []
