"""Ranks of a process group: started here (`run_ranks`), or joined by a process of torchrun or mpiexec (`joined_group`)."""

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from repro.collectives.hosts import Hosts
from repro.errors import ReproError

# torch is loaded where it is needed: by the server of the ranks, not by the process that only waits for them.
if TYPE_CHECKING:
    import torch

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
# Forked from a server that has loaded torch already, two ranks start in 0.06 s; in 1.9 s where each has to load it.
_context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
# Ranks that fail because of another do so soon, and may be heard of before it.
_HEARING_SECONDS = 1.0
_ENDING_SECONDS = 2.0


@dataclass(frozen=True)
class _Failed:
    """Why a rank has no result; `seconds`: when, on the machine's monotonic clock."""

    seconds: float
    sentence: str
    traceback: str


def run_ranks(
    function: Callable, ranks: int, *arguments: Any, hosts: Hosts | None = None, timeout: float = 60.0, threads: int = 1
) -> list:
    """Call `function(*arguments)` in `ranks` new processes joined by gloo, and return the results in order of rank.

    `function`: of a module, since processes import it; it finds its rank and the world size in `torch.distributed`. Arguments
    and results travel by pickle. `hosts`: rank r runs on host r, else all are on loopback. `timeout`: seconds for an operation
    of the process group. `threads`: torch's, in each rank. The environment is that of the first call in this process.

    Raises ReproError with the last line of every failed rank's traceback, the rank that failed first in front (its whole
    traceback is a note of the error). A rank that died without one is named with its signal or exit code. No rank is left
    when this returns or raises, nor when this process is killed.
    """
    if ranks < 1:
        raise ReproError(f"ranks is {ranks}: at least one is needed")
    if hosts is not None and hosts.count < ranks:
        raise ReproError(f"{ranks} ranks need a host each, there are {hosts.count}")
    try:
        call = pickle.dumps((function, arguments))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ReproError(f"ranks need a function of a module and arguments that can be pickled: {error}") from error
    _context.set_forkserver_preload([__name__, "torch.distributed", function.__module__])  # heard by a server that starts now
    processes, pipes = [], []
    with tempfile.TemporaryDirectory(prefix="repro-ranks-") as folder:
        try:
            for rank in range(ranks):
                ours, theirs = _context.Pipe(duplex=False)
                pipes.append(ours)
                with theirs:
                    setting = rank, ranks, os.path.join(folder, "store"), hosts, timeout, threads
                    process = _context.Process(target=_be_rank, args=(call, theirs, *setting))
                    processes.append(process)
                    process.start()
            outcomes = _collect(processes, pipes)
        finally:
            _end([process for process in processes if process.pid])
    failures = {rank: outcome for rank, outcome in outcomes.items() if isinstance(outcome, _Failed)}
    if failures:
        raise _error(failures, ranks)
    return [outcomes[rank] for rank in range(ranks)]


@contextmanager
def joined_group(timeout: float = 60.0) -> Iterator["torch.device"]:
    """The process group that torchrun or mpiexec started, the default group within the block; yields the device.

    NCCL and a GPU for each rank where there is CUDA, else gloo. `timeout`: seconds for an operation of the group.
    Raises ReproError when the process was not started by either, or its machine has fewer GPUs than ranks.
    """
    from repro.collectives import mpi

    if "RANK" not in os.environ and mpi.started_by_mpiexec():
        os.environ.update(mpi.rendezvous())
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ReproError(f"{', '.join(missing)} not set in the environment: start with `torchrun --nproc-per-node=2 ...`")
    import torch

    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ReproError(f"local rank {local} needs a GPU of its own, there are {gpus}: CUDA_VISIBLE_DEVICES= runs on CPUs")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    with _group("gloo" if device.type == "cpu" else "nccl", timeout):
        yield device


@contextmanager
def _group(backend: str, timeout: float, **rendezvous) -> Iterator[None]:
    import torch.distributed as dist

    # Groups wait until all ranks are connected: one that has nothing to say would leave while others still try to reach it.
    os.environ.setdefault("TORCH_DIST_INIT_BARRIER", "1")
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **rendezvous)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _be_rank(
    call: bytes, pipe: Connection, rank: int, ranks: int, store: str, hosts: Hosts | None, timeout: float, threads: int
) -> None:
    """The life of a rank's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import torch
        import torch.distributed as dist

        function, arguments = pickle.loads(call)
        os.environ["GLOO_SOCKET_IFNAME"] = hosts.enter(rank) if hosts else _LOOPBACK
        torch.set_num_threads(threads)
        # A file is seen from all hosts, an address is not.
        with _group("gloo", timeout, store=dist.FileStore(store, ranks), rank=rank, world_size=ranks):
            try:
                answer = pickle.dumps(function(*arguments))
            except Exception as error:
                answer = _told(error)
            # Before the group is left: whoever fails because this rank is gone shall do so later.
            pipe.send_bytes(answer)
    except Exception as error:
        pipe.send_bytes(_told(error))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _told(error: Exception) -> bytes:
    sentence = str(error) if isinstance(error, ReproError) else traceback.format_exception_only(error)[-1].strip()
    return pickle.dumps(_Failed(time.monotonic(), sentence, "".join(traceback.format_exception(error))))


def _collect(processes: list[BaseProcess], pipes: list[Connection]) -> dict[int, Any]:
    """Results and failures by rank: of all, or of those heard of soon after the first failure."""
    outcomes, deadline = {}, None
    while len(outcomes) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in outcomes}
        ready = wait(waiting, None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not ready:
            return outcomes
        for pipe in ready:
            rank = waiting[pipe]
            try:
                outcomes[rank] = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                outcomes[rank] = _silent(processes[rank])
            if deadline is None and isinstance(outcomes[rank], _Failed):
                deadline = time.monotonic() + _HEARING_SECONDS
    _join(processes)
    return outcomes


def _silent(process: BaseProcess) -> _Failed:
    """The failure of a rank that died without a word: before all others', since for this rank those are exceptions."""
    process.join()
    code = process.exitcode
    sentence = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return _Failed(0.0, sentence, "it left no traceback")


def _error(failures: dict[int, _Failed], ranks: int) -> ReproError:
    """One error for all, what failed first in front."""
    order = sorted(failures, key=lambda rank: failures[rank].seconds)
    error = ReproError("\n".join(f"rank {rank} of {ranks}: {failures[rank].sentence}" for rank in order))
    error.add_note(f"rank {order[0]}: {failures[order[0]].traceback}")
    return error


def _join(processes: list[BaseProcess]) -> None:
    """Wait until all have ended, but not for long."""
    deadline = time.monotonic() + _ENDING_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    _join(processes)
    for process in processes:
        process.kill()
        process.join()
