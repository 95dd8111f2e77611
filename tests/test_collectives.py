"""Collectives between real processes: against the library's own, and their errors."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from repro.collectives import ALGORITHMS, COLLECTIVES, CollectiveError, allreduce, broadcast, reduce
from repro.collectives.launch import run_ranks
from repro.collectives.schedules import schedule
from repro.collectives.transport import DTYPES, Transport
from repro.errors import ReproError

OPERATIONS = {"broadcast": broadcast, "reduce": reduce, "allreduce": allreduce}
LENGTHS = (0, 1, 2, 4, 7, 1000, 40_001)


def tensor_of(rank: int, length: int, dtype: torch.dtype, case: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * case + rank)
    if dtype is torch.int64:
        return torch.randint(-(2**62), 2**62, (length,), generator=generator)
    return torch.randn(length, generator=generator, dtype=torch.float64).to(dtype)


def compare_with_library(cases: list[tuple]) -> list[str]:
    """On each rank: what differs from the library's result, or between ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    wrong = []
    for number, (collective, algorithm, dtype_index, length, block, root) in enumerate(cases):
        dtype = DTYPES[dtype_index]
        mine = tensor_of(rank, length, dtype, number)
        options = {} if collective == "allreduce" else {"root": root}
        ours = OPERATIONS[collective](mine.clone(), algorithm, block_bytes=block * mine.element_size(), **options)
        theirs = OPERATIONS[collective](mine.clone(), "library", **options)
        if collective == "reduce" and rank != root:
            continue
        # Sums of p terms: the order of summation changes them by rounding, in proportion to the terms' magnitudes.
        terms = sum(tensor_of(r, length, dtype, number).double().abs() for r in range(ranks))
        exact = collective == "broadcast" or dtype is torch.int64
        allowed = torch.zeros(length) if exact else ranks * torch.finfo(dtype).eps * terms
        if not ((ours.double() - theirs.double()).abs() <= allowed).all() or (exact and not torch.equal(ours, theirs)):
            wrong.append(f"{collective} {algorithm} {dtype} {length} block {block} root {root}")
        if collective == "allreduce" and length:
            bits = ours.view(torch.uint8)
            seen = [torch.empty_like(bits) for _ in range(ranks)]
            dist.all_gather(seen, bits)
            wrong += [f"ranks differ: {algorithm} {dtype} {length}"] * (not all(torch.equal(bits, s) for s in seen))
    return wrong


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_results_are_those_of_the_library_and_the_same_bits_everywhere(ranks):
    """Every collective, algorithm and dtype at every length, with block sizes and roots drawn at random."""
    rng = np.random.default_rng(ranks)
    cases = [
        (collective, algorithm, dtype, length, int(rng.integers(1, max(2, length // 3 + 2))), int(rng.integers(ranks)))
        for collective in COLLECTIVES
        for algorithm in ALGORITHMS
        for dtype in range(len(DTYPES))
        for length in LENGTHS
    ]
    # At most some 40 blocks: each is a message.
    cases = [(c, a, d, n, max(b, n // 40), r) for c, a, d, n, b, r in cases]
    assert run_ranks(compare_with_library, ranks, cases) == [[]] * ranks


def agree_on(calls: tuple[str, str]) -> str:
    transport = Transport(dist.group.WORLD, torch.device("cpu"), 20.0, calls[dist.get_rank()])
    return errors_of(lambda: agreed(transport))[0]


def agreed(transport: Transport) -> None:
    with transport.errors():
        transport.agree()


def test_without_tags_neighbours_agree_first():
    """As with NCCL."""
    assert run_ranks(agree_on, 2, ("this", "this")) == ["no error"] * 2
    assert ["rank 1 calls that" in message for message in run_ranks(agree_on, 2, ("this", "that"))] == [True, False]


def in_steps() -> list[str]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    wrong = []
    for collective in COLLECTIVES:
        for algorithm in ALGORITHMS:
            message = tensor_of(rank, 101, torch.int64, 0)
            transport = Transport(dist.group.WORLD, message.device, 20.0, collective)
            transport.play_in_steps(schedule(collective, algorithm, ranks, 101, 10, 0), message)
            theirs = OPERATIONS[collective](tensor_of(rank, 101, torch.int64, 0), "library")
            if not torch.equal(message, theirs) and (collective != "reduce" or rank == 0):
                wrong.append(f"{collective} {algorithm}")
    return wrong


def test_step_by_step_as_for_nccl_gives_the_same():
    assert run_ranks(in_steps, 3) == [[]] * 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each of two ranks, this machine has fewer")
def test_nccl():
    program = "import tests.test_collectives as t; t.on_gpus()"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--no-python",
        sys.executable,
        "-c",
        program,
    ]
    assert subprocess.run(command).returncode == 0


def on_gpus() -> None:
    """By torchrun: all collectives on GPUs against NCCL's own."""
    from repro.collectives.launch import joined_group

    with joined_group() as device:
        for collective in COLLECTIVES:
            for algorithm in ALGORITHMS:
                mine = tensor_of(dist.get_rank(), 100_001, torch.float64, 0).to(device)
                ours = OPERATIONS[collective](mine.clone(), algorithm, block_bytes=2**16)
                theirs = OPERATIONS[collective](mine.clone(), "library")
                assert (collective == "reduce" and dist.get_rank()) or torch.allclose(ours, theirs, rtol=1e-12), algorithm


def test_the_benchmark_of_the_readme_names_every_algorithm_beside_the_library():
    """As the README starts it, with less to do."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "repro.collectives.measure"]
    done = subprocess.run([*command, "--megabytes", "0.25", "--rounds", "2"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for algorithm in (*ALGORITHMS, "library"):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"allreduce  {algorithm}  ")]
        assert float(line.split()[-1].removesuffix("x")) > 0


def errors_of(call) -> tuple[str, float]:
    """The error that a call ends in on this rank, and after how many seconds."""
    started = time.monotonic()
    try:
        call()
    except CollectiveError as error:
        return str(error), time.monotonic() - started
    return "no error", time.monotonic() - started


def call_differently(kind: str) -> tuple[str, float]:
    rank = dist.get_rank()
    odd = rank == 2
    if kind == "length":
        return errors_of(lambda: allreduce(torch.ones(7 if odd else 5), timeout=1))
    if kind == "dtype":
        return errors_of(lambda: allreduce(torch.ones(5, dtype=torch.float64 if odd else torch.float32), timeout=1))
    if kind == "algorithm":
        return errors_of(lambda: allreduce(torch.ones(5), "ring" if odd else "all-to-all", timeout=1))
    if kind == "root":
        return errors_of(lambda: broadcast(torch.ones(5), root=1 if odd else 0, timeout=1))
    return errors_of(lambda: (reduce if odd else allreduce)(torch.ones(5), "ring", timeout=1))


@pytest.mark.parametrize("kind", ["length", "dtype", "algorithm", "root", "collective"])
def test_other_arguments_on_one_rank_are_an_error_on_all(kind):
    """Five ranks, so that some are no neighbours of the one that differs."""
    found = run_ranks(call_differently, 5, kind)
    # The root of a broadcast waits for nobody: it may be done before anything is wrong.
    heard = [place for place in range(5) if kind != "root" or place]
    assert all(found[rank][0].startswith(("allreduce", "broadcast", "reduce")) for rank in heard), found
    assert all("rank 2 calls" in found[rank][0] for rank in heard if rank != 2), found
    assert "rank 1 calls" in found[2][0]
    assert all(seconds < 1 + 2 for _, seconds in found)


def one_is_slow(seconds: float) -> tuple[str, float]:
    if dist.get_rank() == 1:
        time.sleep(seconds)
    return errors_of(lambda: allreduce(torch.ones(100_000), "linear pipeline", timeout=1))


def test_a_slow_rank_is_an_error_on_all_within_the_timeout():
    found = run_ranks(one_is_slow, 3, 2.5)
    assert all("rank 1 is lost, or slower than 1 s" in found[rank][0] for rank in (0, 2)), found
    assert all("lost" in message and seconds < 3 for message, seconds in found), found


def one_is_lost(folder: str) -> None:
    if dist.get_rank() == 1:
        time.sleep(0.3)
        os._exit(9)
    message, seconds = errors_of(lambda: [allreduce(torch.ones(100_000), "ring", timeout=10) for _ in range(10_000)])
    with open(f"{folder}/{dist.get_rank()}", "w") as stream:
        stream.write(f"{seconds}\n{message}")
    time.sleep(20)  # ended by the launcher, not by itself


def test_a_lost_rank_is_an_error_on_all_at_once(tmp_path):
    with pytest.raises(ReproError, match="rank 1 of 4: ended with exit code 9"):
        run_ranks(one_is_lost, 4, str(tmp_path))
    told = {int(path.name): path.read_text().split("\n") for path in tmp_path.iterdir()}
    assert set(told) == {0, 2, 3}
    assert all("lost" in message and float(seconds) < 3 for seconds, message in told.values()), told


def refuse() -> list[str]:
    """The errors of calls that could not work on any rank."""
    found = []
    for call in (
        lambda: allreduce(torch.ones(4, 4).t()),
        lambda: allreduce(torch.ones(4, dtype=torch.float16)),
        lambda: allreduce(torch.ones(4), "rung"),
        lambda: allreduce(torch.ones(4), block_bytes=2),
        lambda: broadcast(torch.ones(4), root=2),
        lambda: allreduce(torch.ones(4), timeout=0),
    ):
        with pytest.raises(ReproError) as caught:
            call()
        found.append(str(caught.value))
    return found


def test_what_cannot_work_is_refused_before_anything_is_sent():
    found = run_ranks(refuse, 2)[0]
    for message, named in zip(
        found, ("strides", "float16", "rung", "block_bytes is 2", "root is 2", "timeout is 0"), strict=True
    ):
        assert named in message
    with pytest.raises(ReproError, match="init_process_group"):
        allreduce(torch.ones(4))
