"""How long collectives take between the ranks of a group, all cases in turn; a benchmark when started by torchrun.

torchrun --nproc-per-node=2 -m repro.collectives.measure --megabytes 4 16 64
mpiexec -n 2 python -m repro.collectives.measure    # an MPI library's collectives beside them, where mpi4py is installed
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from repro.collectives.costs import algorithm_bandwidth, bus_bandwidth
from repro.collectives.launch import joined_group
from repro.collectives.mpi import started_by_mpiexec
from repro.collectives.operations import BLOCK_BYTES, LIBRARY, MPI, allreduce, broadcast, reduce
from repro.collectives.schedules import ALGORITHMS, COLLECTIVES
from repro.errors import ReproError

_OPERATIONS = {"broadcast": broadcast, "reduce": reduce, "allreduce": allreduce}


@dataclass(frozen=True)
class Case:
    """A collective to be timed: of a float32 message of `nbytes`, in blocks of `block_bytes` where the algorithm has blocks."""

    collective: str
    algorithm: str
    nbytes: int
    block_bytes: int = BLOCK_BYTES


def measure(cases: Sequence[Case], rounds: int, device: torch.device | str = "cpu") -> np.ndarray:
    """Seconds of every case in every round, (cases, rounds), on each rank of the default group.

    Cases take turns, in the other direction every other round, so that a slow spell of the machine hits all of them; a first
    round is not counted. A collective begins at a barrier and takes as long as its slowest rank. Raises ReproError when a
    result is wrong, which is checked once a case.
    """
    ranks = dist.get_world_size()
    message = torch.empty(max(case.nbytes for case in cases) // 4, device=device)
    seconds = torch.zeros(len(cases), rounds + 1, dtype=torch.float64)
    for turn in range(rounds + 1):
        for index in range(len(cases)) if turn % 2 else reversed(range(len(cases))):
            case = cases[index]
            tensor = message[: case.nbytes // 4].fill_(dist.get_rank() + 1)
            seconds[index, turn] = _seconds(case, tensor)
            if turn == 0:
                _check(case, tensor, ranks)
    seconds = seconds.to(device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds[:, 1:].cpu().numpy()


def _seconds(case: Case, tensor: torch.Tensor) -> float:
    dist.barrier()
    _synchronise(tensor)
    begin = time.perf_counter()
    _OPERATIONS[case.collective](tensor, case.algorithm, block_bytes=case.block_bytes)
    _synchronise(tensor)
    return time.perf_counter() - begin


def _synchronise(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def _check(case: Case, tensor: torch.Tensor, ranks: int) -> None:
    expected = 1 if case.collective == "broadcast" else ranks * (ranks + 1) / 2
    if (case.collective != "reduce" or dist.get_rank() == 0) and not (tensor == expected).all():
        raise ReproError(f"{case} is wrong on rank {dist.get_rank()}: {tensor.tolist()[:4]}... should be {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[4.0, 16.0, 64.0], help="MiB of a message")
    parser.add_argument("--collectives", nargs="+", choices=COLLECTIVES, default=["allreduce"])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with joined_group() as device:
        theirs = [LIBRARY] + [MPI] * (started_by_mpiexec() and device.type == "cpu")
        ranks = dist.get_world_size()
        if dist.get_rank() == 0:
            print(f"{ranks} ranks on {device}; medians and quartiles of {arguments.rounds} rounds; GB/s as in nccl-tests")
            print("collective algorithm                   MiB       ms         quartiles  algbw  busbw  vs library")
        for megabytes in arguments.megabytes:
            nbytes = 4 * round(megabytes * 2**18)
            cases = [Case(name, way, nbytes) for name in arguments.collectives for way in (*theirs, *ALGORITHMS)]
            seconds = measure(cases, arguments.rounds, device)
            for case, times in zip(cases, seconds, strict=True):
                lower, median, upper = np.quantile(times, [0.25, 0.5, 0.75])
                library = seconds[cases.index(Case(case.collective, LIBRARY, nbytes))]
                rates = algorithm_bandwidth(nbytes, median), bus_bandwidth(case.collective, ranks, nbytes, median)
                if dist.get_rank() == 0:
                    print(
                        f"{case.collective:10} {case.algorithm:24} {megabytes:6g} {1e3 * median:8.2f} {1e3 * lower:8.2f} "
                        f"{1e3 * upper:8.2f} {rates[0] / 1e9:6.2f} {rates[1] / 1e9:6.2f}  {np.median(library / times):.2f}x"
                    )


if __name__ == "__main__":
    main()
