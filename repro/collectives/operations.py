"""broadcast, reduce and allreduce of tensors by any of the algorithms, in place, over a process group of torch.distributed."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from repro.collectives import mpi
from repro.collectives.programs import program
from repro.collectives.schedules import ALGORITHMS, schedule
from repro.collectives.transport import DTYPES, Transport
from repro.errors import ReproError, one_of

LIBRARY = "library"  # the process group's own collective: gloo's or NCCL's
MPI = "MPI"  # an MPI library's, between the ranks of mpiexec
TIMEOUT = 60.0
BLOCK_BYTES = 2**22  # measured on gloo: below, messages cost more than their bytes; above, sums leave the cache


def broadcast(tensor: Tensor, algorithm: str = "linear pipeline", *, root: int = 0, **options) -> Tensor:
    """Copy the tensor of rank `root` to all ranks; options as in `allreduce`."""
    return _run("broadcast", tensor, algorithm, root, **options)


def reduce(tensor: Tensor, algorithm: str = "linear pipeline", *, root: int = 0, **options) -> Tensor:
    """Sum the tensors of all ranks in that of rank `root`; others hold partial sums afterwards. Options as in `allreduce`."""
    return _run("reduce", tensor, algorithm, root, **options)


def allreduce(tensor: Tensor, algorithm: str = "ring", **options) -> Tensor:
    """Sum the tensors of all ranks in each of them, bit-identical on all ranks; returns `tensor`, changed in place.

    `tensor`: contiguous, float32, float64, bfloat16 or int64, of the same shape on all ranks, empty ones too. `algorithm`: one
    of `repro.collectives.ALGORITHMS`; or "library", the group's own; or "MPI", the one of mpiexec, which has no timeout.

    Options, the same on all ranks: `block_bytes`, of pipelined algorithms (4 MiB); `group`, a process group (the default one);
    `timeout`, seconds that a rank waits for a message (60).

    Raises CollectiveError on every rank, within the timeout, when a rank is lost, too slow or calls with other arguments (the
    root of a broadcast, which waits for nobody, in its next call); ReproError for what cannot be used at all.
    """
    return _run("allreduce", tensor, algorithm, 0, **options)


def _run(
    collective: str,
    tensor: Tensor,
    algorithm: str,
    root: int,
    *,
    block_bytes: int = BLOCK_BYTES,
    group: dist.ProcessGroup | None = None,
    timeout: float = TIMEOUT,
) -> Tensor:
    one_of("algorithm", algorithm, (*ALGORITHMS, LIBRARY, MPI))
    one_of("dtype", tensor.dtype, DTYPES)
    if not dist.is_initialized():
        raise ReproError(f"{collective} needs a process group: call torch.distributed.init_process_group first")
    group = group or dist.group.WORLD
    if not tensor.is_contiguous():
        raise ReproError(f"{collective} works in place on contiguous tensors; one of strides {tensor.stride()} needs a copy")
    if block_bytes < tensor.element_size():
        raise ReproError(f"block_bytes is {block_bytes}: a block holds at least one element of {tensor.element_size()} bytes")
    if not 0 <= root < group.size():
        raise ReproError(f"root is {root}: it should be one of the ranks 0 to {group.size() - 1}")
    if group.size() == 1:
        return tensor
    message = tensor.view(-1)
    if algorithm == MPI:
        mpi.play(collective, message, root, group.size())
        return tensor
    shape = (collective, algorithm, group.size(), message.numel(), block_bytes // tensor.element_size(), root)
    kind = str(tensor.dtype).removeprefix("torch.")
    call = f"{collective} by {algorithm} of {message.numel()} x {kind}, block {block_bytes} bytes, root {root}"
    transport = Transport(group, tensor.device, timeout, call)
    with transport.errors():
        if algorithm == LIBRARY:
            transport.play_own(collective, message, root)
        elif tensor.device.type == "cpu":
            transport.play(program(group.rank(), *shape), message)
        else:
            transport.agree()
            transport.play_in_steps(schedule(*shape), message)
    return tensor
