"""Ranks return in order, fail in one sentence that names the first of them, and leave nothing behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from repro.collectives.hosts import Hosts
from repro.collectives.launch import joined_group, run_ranks
from repro.errors import ReproError

JOINING = """
import torch, torch.distributed as dist
from repro.collectives.launch import joined_group
with joined_group(timeout=20) as device:
    total = torch.full((2,), dist.get_rank() + 1.0, device=device)
    dist.all_reduce(total)
    print(f"rank {dist.get_rank()}: {dist.get_backend()} {total.tolist()}\\n", end="", flush=True)
print(f"left: {not dist.is_initialized()}\\n", end="", flush=True)
"""
SLEEPING = """
from test_launch import sleep_and_tell
from repro.collectives.launch import run_ranks
if __name__ == "__main__":
    run_ranks(sleep_and_tell, 2, {folder!r})
"""


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """No process and no temporary file outlives a test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert multiprocessing.active_children() == []
    assert list(tmp_path.glob("repro-ranks-*")) == []


def facts(offset: int) -> dict:
    total = torch.full((3,), dist.get_rank() + 1.0)
    dist.all_reduce(total)
    return {
        "rank": dist.get_rank(),
        "ranks": dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "total": total.numpy() + offset,
    }


def fail(failing: list[int], action: str) -> None:
    """Some ranks fail while the others wait for them."""
    if dist.get_rank() in failing:
        if action == "raise":
            raise ZeroDivisionError("nothing to divide by")
        if action == "explain":
            raise ReproError("the block is too large")
        if action == "exit":
            os._exit(7)
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "lambda":
            return lambda: None
    dist.barrier()


def stay(failing: int) -> None:
    """One rank fails, the others neither notice nor let themselves be asked to end."""
    if dist.get_rank() == failing:
        raise ZeroDivisionError("nothing to divide by")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def late() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def sleep_and_tell(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_results_come_in_order_of_rank(ranks):
    """With the group, the threads and the arguments that were asked for."""
    for rank, found in enumerate(run_ranks(facts, ranks, 10, threads=2)):
        expected = ranks * (ranks + 1) / 2 + 10
        assert found.pop("total").tolist() == [expected] * 3
        assert found == {"rank": rank, "ranks": ranks, "threads": 2}


@pytest.mark.parametrize(
    "action, sentence",
    [
        ("raise", "ZeroDivisionError: nothing to divide by"),
        ("explain", "the block is too large"),
        ("exit", "ended with exit code 7"),
        ("kill", "killed by SIGKILL"),
    ],
)
def test_the_rank_that_failed_first_is_named_first(action, sentence):
    """Although its neighbours fail at once, of its closed connections; they are named too."""
    start = time.monotonic()
    with pytest.raises(ReproError) as caught:
        run_ranks(fail, 3, [1], action)
    lines = str(caught.value).split("\n")
    assert lines[0] == f"rank 1 of 3: {sentence}"
    assert {line[:11] for line in lines[1:]} <= {"rank 0 of 3", "rank 2 of 3"}
    assert time.monotonic() - start < 30  # of the 60 that an operation may take


def test_all_that_fail_are_named():
    with pytest.raises(ReproError) as caught:
        run_ranks(fail, 2, [0, 1], "explain")
    assert sorted(str(caught.value).split("\n")) == [f"rank {rank} of 2: the block is too large" for rank in (0, 1)]


def test_the_first_traceback_is_a_note():
    with pytest.raises(ReproError) as caught:
        run_ranks(fail, 2, [1], "raise")
    (note,) = caught.value.__notes__
    assert (
        note.startswith("rank 1: Traceback")
        and "in fail\n" in note
        and note.endswith("ZeroDivisionError: nothing to divide by\n")
    )


def test_ranks_that_will_not_end_are_killed():
    start = time.monotonic()
    with pytest.raises(ReproError) as caught:
        run_ranks(stay, 2, 0)
    assert str(caught.value) == "rank 0 of 2: ZeroDivisionError: nothing to divide by"
    assert time.monotonic() - start < 20


def test_an_operation_ends_at_its_timeout():
    with pytest.raises(ReproError, match=r"rank 0 of 2: .*[Tt]imed out .*1000ms"):
        run_ranks(late, 2, timeout=1.0)


def test_a_result_that_cannot_be_sent_is_a_failure_of_its_rank():
    with pytest.raises(ReproError, match=r"rank 0 of 1: .*[Pp]ickle.*lambda"):
        run_ranks(fail, 1, [0], "lambda")


@pytest.mark.parametrize(
    "ranks, options, message",
    [
        (0, {}, "ranks is 0: at least one"),
        (3, {"hosts": Hosts(2, 1e6)}, "3 ranks need a host each, there are 2"),
    ],
)
def test_impossible_numbers_are_refused(ranks, options, message):
    with pytest.raises(ReproError, match=message):
        run_ranks(facts, ranks, 0, **options)


def test_a_function_that_processes_cannot_import_is_refused():
    with pytest.raises(ReproError, match=r"a function of a module .*lambda"):
        run_ranks(lambda: None, 2)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(ask, enough, seconds: float = 60.0):
    """The first answer that is enough, or the last one after `seconds`."""
    deadline = time.monotonic() + seconds
    while not enough(answer := ask()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return answer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_the_process_that_started_them(tmp_path, tmp_path_factory, number):
    """Ctrl-C in the middle, and a kill that leaves no time to tidy up the folder."""
    script, told = tmp_path / "script.py", tmp_path / "told"
    temporary = tmp_path_factory.mktemp("t")  # a socket lies in it, whose path must be short
    script.write_text(SLEEPING.format(folder=str(told)))
    told.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TMPDIR": str(temporary)}
    # A shell's background jobs, such as this suite may be, ignore Ctrl-C.
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, script], env=environment, **heeding) as starter:
        pids = until(lambda: [int(path.name) for path in told.iterdir()], lambda pids: len(pids) == 2)
        starter.send_signal(number)
        error = starter.stderr.read()
    assert len(pids) == 2, error
    assert until(lambda: [pid for pid in pids if alive(pid)], lambda left: not left) == []
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in error
        assert list(temporary.glob("repro-ranks-*")) == []


def test_two_runs_at_once_do_not_meet():
    """From two threads: each group has a rendezvous of its own."""
    found = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: run_ranks(facts, n, 0)})) for n in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: [answer["total"][0] for answer in found[n]] for n in found} == {2: [3.0] * 2, 3: [6.0] * 3}


def test_processes_of_torchrun_join_their_group(tmp_path):
    """With the backend of the machine; the group is left with the block."""
    script = tmp_path / "joining.py"
    script.write_text(JOINING)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", script]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    expected = ["left: True", "left: True", "rank 0: gloo [3.0, 3.0]", "rank 1: gloo [3.0, 3.0]"]
    assert sorted(filter(None, done.stdout.split("\n"))) == expected, done.stderr


def test_without_torchrun_a_sentence_says_how_to_start(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ReproError, match=r"RANK.* not set .*torchrun"), joined_group():
        pass


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ReproError, match="local rank 1 needs a GPU of its own, there are 1"), joined_group():
        pass
