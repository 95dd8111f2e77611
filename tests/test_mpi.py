"""The MPI library beside the others: its results, and what it cannot be used for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from repro.collectives import allreduce
from repro.collectives.launch import run_ranks
from repro.errors import ReproError

MPIEXEC = Path(sys.executable).with_name("mpiexec")
needs_mpi = pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this Python: `pip install mpi4py mpich`")

COMPARED = """
import itertools, torch, torch.distributed as dist
from repro.collectives import allreduce, broadcast, reduce
from repro.collectives.launch import joined_group
from repro.errors import ReproError
with joined_group(timeout=20):
    rank = dist.get_rank()
    for operation, length, dtype in itertools.product(
        (broadcast, reduce, allreduce), (0, 1, 5, 1000), (torch.float32, torch.float64, torch.int64)
    ):
        mine = (torch.arange(length) + 10 * rank).to(dtype)
        theirs = operation(mine.clone(), "library")
        found = operation(mine.clone(), "MPI")
        assert torch.equal(found, theirs) or (operation is reduce and rank), (operation, length, dtype)
    try:
        allreduce(torch.ones(2, dtype=torch.bfloat16), "MPI")
    except ReproError as error:
        print(f"rank {rank} of {dist.get_world_size()}: {error}\\n", end="", flush=True)
"""


def mpiexec(*command) -> list[str]:
    done = subprocess.run([MPIEXEC, "-n", "2", sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_mpi
def test_ranks_of_mpiexec_find_the_same_sums_by_mpi_and_by_gloo(tmp_path):
    """Small whole numbers, so that no order of summation rounds; what MPI cannot add is refused."""
    script = tmp_path / "compared.py"
    script.write_text(COMPARED)
    refused = "the algorithm MPI needs float32, float64 or int64 on a CPU, not torch.bfloat16 on cpu"
    assert sorted(filter(None, mpiexec(script))) == [f"rank {rank} of 2: {refused}" for rank in (0, 1)]


@needs_mpi
def test_the_benchmark_lists_mpi_beside_the_others():
    lines = mpiexec("-m", "repro.collectives.measure", "--megabytes", "0.1", "--rounds", "2")
    assert {"library", "MPI", "ring"} <= {line.split()[1] for line in lines if line.startswith("allreduce")}


def by_mpi() -> None:
    allreduce(torch.ones(3), "MPI")


@pytest.mark.skipif("PMI_RANK" in os.environ, reason="these tests were started by mpiexec")
def test_ranks_that_mpiexec_did_not_start_are_told_how():
    with pytest.raises(ReproError, match="needs ranks that mpiexec started"):
        run_ranks(by_mpi, 2)
