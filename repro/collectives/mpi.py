"""The collectives of an MPI library as one more opponent: where mpi4py is installed, for ranks that mpiexec started."""

import os
import socket

import torch
from torch import Tensor

from repro.errors import ReproError

_STARTED = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")  # by MPICH or Intel MPI, by Open MPI


def started_by_mpiexec() -> bool:
    return any(name in os.environ for name in _STARTED)


def rendezvous() -> dict[str, str]:
    """What torchrun would have put into the environment, agreed on over MPI by all ranks.

    Raises ReproError when mpi4py is not installed.
    """
    world, mpi = _world()
    neighbours = world.Split_type(mpi.COMM_TYPE_SHARED)
    place = None
    if world.rank == 0:
        alone = neighbours.size == world.size
        address = "127.0.0.1" if alone else socket.gethostbyname(socket.gethostname())
        with socket.create_server((address, 0)) as free:
            place = {"MASTER_ADDR": address, "MASTER_PORT": str(free.getsockname()[1])}
    place = world.bcast(place)
    return {"RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(neighbours.rank)} | place


def play(collective: str, message: Tensor, root: int, ranks: int) -> None:
    """The library's own `collective` of a message on a CPU, in place; MPI has no timeout, a lost rank ends in its own errors.

    Raises ReproError when ranks were not started by mpiexec, the group is not all of them, or MPI does not know the dtype.
    """
    if not started_by_mpiexec():
        raise ReproError("the algorithm MPI needs ranks that mpiexec started: `mpiexec -n 2 python ...`")
    world, mpi = _world()
    if world.size != ranks:
        raise ReproError(f"the algorithm MPI works on all {world.size} ranks of mpiexec, not on a group of {ranks}")
    if message.device.type != "cpu" or message.dtype is torch.bfloat16:
        raise ReproError(f"the algorithm MPI needs float32, float64 or int64 on a CPU, not {message.dtype} on {message.device}")
    values = message.numpy()
    if collective == "allreduce":
        world.Allreduce(mpi.IN_PLACE, values)
    elif collective == "broadcast":
        world.Bcast(values, root)
    elif world.rank == root:
        world.Reduce(mpi.IN_PLACE, values, root=root)
    else:
        world.Reduce(values, None, root=root)


def _world():
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ReproError("mpiexec started this rank, but mpi4py is not there: `pip install mpi4py mpich`") from error
    return MPI.COMM_WORLD, MPI
