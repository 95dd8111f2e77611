"""Gradients of torch's DistributedDataParallel averaged by the allreduce of this package, in one line."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from repro.collectives.communicator import Communicator
from repro.collectives.operations import allreduce


def average(tensor: Tensor, algorithm: str = "ring", *, group: dist.ProcessGroup, **options) -> Tensor:
    """The mean over all ranks, in place and bit-identical on all of them; options as in `allreduce`."""
    return allreduce(tensor, algorithm, group=group, **options).div_(group.size())


def average_hook(algorithm: str = "ring", communicator: Communicator | None = None, **options) -> Callable:
    """A communication hook: `ddp.register_comm_hook(None, average_hook("ring"))`, on all ranks.

    Each bucket is averaged by a thread while backpropagation goes on; options as in `allreduce`. `communicator`: whose thread,
    otherwise one that stays until the process group is destroyed. When a collective fails, `backward` raises a RuntimeError
    that contains the message of the CollectiveError.
    """
    communicator = communicator or Communicator()

    def averaged(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        task = communicator.submit(average, bucket.buffer(), algorithm, where=f"bucket {bucket.index()}", **options)
        ended = torch.futures.Future()
        # A torch future tells C++ of an error only if a callback raises it.
        result = ended.then(lambda _: task.result())
        task.add_done_callback(lambda _: ended.set_result(None))
        return result

    return averaged
