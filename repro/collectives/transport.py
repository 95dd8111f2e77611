"""Point-to-point messages of a process group, with checks and errors instead of hangs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from repro.collectives.programs import Program
from repro.collectives.schedules import Transfer
from repro.errors import ReproError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
_WINDOW = 8  # receives posted ahead: gloo sends a message once its receive is posted
_REASON = "repro collective failed"
_NEEDS_NO_RECEIPT = 2**16  # bytes; two such messages at once delay each other by less than a receipt takes
_DATA, _RECEIPT, _NEVER_SENT = range(3)  # tags


class CollectiveError(ReproError):
    """A collective that could not be finished: a rank was lost, too slow, or called with other arguments.

    What is left of messages may still be under way, so the group is of no more use: leave it, and make a new one.
    """


class Transport:
    """The messages of one call of a collective, `what`, in a process group; `timeout` in seconds for each message."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: float, what: str):
        if not timeout > 0:
            raise ReproError(f"timeout is {timeout}: it should be a number of seconds above 0")
        self.group, self.device, self.timeout, self.what = group, device, timeout, what
        self.rank, self.ranks = group.rank(), group.size()
        self._wait = timedelta(seconds=timeout)
        self._partner = (self.rank + 1) % self.ranks  # whom this rank waited for last

    def agree(self, arguments: tuple[int, ...]) -> None:
        """Compare the arguments of a call with both neighbours in rank order: CollectiveError where they differ.

        Ranks further away learn of it when a message stays away, at the latest after the timeout.
        """
        mine = torch.tensor(arguments, dtype=torch.int64, device=self.device)
        neighbours = sorted({(self.rank - 1) % self.ranks, (self.rank + 1) % self.ranks} - {self.rank})
        theirs = {rank: torch.empty_like(mine) for rank in neighbours}
        self._exchange([(rank, mine) for rank in neighbours], list(theirs.items()))
        for rank in neighbours:
            if not torch.equal(theirs[rank], mine):
                self._fail(f"rank {self.rank} calls it with {list(arguments)}, rank {rank} with {theirs[rank].tolist()}")

    def play(self, steps: Program, message: Tensor) -> None:
        """Do one rank's part of a schedule on `message` (contiguous, one-dimensional), in place."""
        scratch = _scratch(message, min(_WINDOW, len(steps.receives)), steps.longest_reduce)
        posted, done, pending = [], 0, []
        token = torch.empty(1, dtype=torch.uint8)

        def long(start: int, stop: int) -> bool:
            return (stop - start) * message.element_size() > _NEEDS_NO_RECEIPT

        def post_receives() -> None:
            # Before sends: gloo's news that a receive is posted would wait behind the data of a send to the same rank.
            while len(posted) < min(done + _WINDOW, len(steps.receives)):
                source, start, stop, reduce, _ = steps.receives[len(posted)]
                room = scratch[len(posted) % _WINDOW][: stop - start] if reduce else message[start:stop]
                posted.append((self.group.recv([room], source, _DATA), room))

        def receive_until(count: int) -> None:
            nonlocal done
            while done < count:
                work, room = posted[done]
                source, start, stop, reduce, receipt = steps.receives[done]
                self._finish(work, source)
                if receipt and long(start, stop):
                    pending.append((source, self.group.send([token], source, _RECEIPT)))
                if reduce:
                    message[start:stop] += room
                done += 1
                post_receives()

        post_receives()
        before = None
        for send in steps.sends:
            receive_until(send.after)
            if send.receipt and long(before.start, before.stop):
                self._finish(self.group.recv([token.clone()], before.target, _RECEIPT), before.target)
            pending.append((send.target, self.group.send([message[send.start : send.stop]], send.target, _DATA)))
            before = send
        receive_until(len(steps.receives))
        for partner, work in pending:
            self._finish(work, partner)

    def play_in_steps(self, transfers: tuple[Transfer, ...], message: Tensor) -> None:
        """The same, step by step: NCCL has to be given at once what is to be sent and received at once."""
        for _, step in groupby(transfers, lambda transfer: transfer.step):
            ours = [t for t in step if self.rank in (t.source, t.target)]
            sends = [(t.target, message[t.start : t.stop]) for t in ours if t.source == self.rank]
            receives = [t for t in ours if t.target == self.rank]
            rooms = [message[t.start : t.stop] for t in receives]
            rooms = [torch.empty_like(room) if t.reduce else room for t, room in zip(receives, rooms, strict=True)]
            self._exchange(sends, [(t.source, room) for t, room in zip(receives, rooms, strict=True)])
            for t, room in zip(receives, rooms, strict=True):
                if t.reduce:
                    message[t.start : t.stop] += room

    def _exchange(self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> None:
        """Send to and receive from (rank, tensor), all at once."""
        operations = [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=rank) for rank, tensor in sends]
        operations += [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=rank) for rank, tensor in receives]
        if operations:
            # NCCL returns one handle for all of them.
            for (rank, _), work in zip(sends + receives, dist.batch_isend_irecv(operations), strict=False):
                self._finish(work, rank)

    def library(self, collective: str, message: Tensor, root: int) -> None:
        """The process group's own collective."""
        if collective == "allreduce":
            work = self.group.allreduce([message])
        elif collective == "reduce":
            options = dist.ReduceOptions()
            options.rootRank = root
            work = self.group.reduce([message], options)
        else:
            options = dist.BroadcastOptions()
            options.rootRank = root
            work = self.group.broadcast([message], options)
        self._finish(work, root)

    def _finish(self, work: dist.Work, rank: int) -> None:
        self._partner = rank
        work.wait(self._wait)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What the process group raises inside becomes a CollectiveError that says why, here and on the other ranks."""
        try:
            yield
        except RuntimeError as error:
            why = self._told() or str(error).partition("\n")[0]
            self._fail(f"rank {self._partner} is lost, or slower than {self.timeout:g} s ({why})", error)

    def _fail(self, message: str, cause: Exception | None = None) -> None:
        """Tell the other ranks why, close the connections so that none goes on waiting for this one, and raise."""
        message = f"{self.what}: {message}"
        # The store may have gone down with the rank that kept it: then the others see closed connections only.
        with suppress(RuntimeError):
            store = self.group.get_group_store()
            if not store.check([_REASON]):
                store.set(_REASON, f"rank {self.rank}: {message}")
        self._close()
        raise CollectiveError(message) from cause

    def _close(self) -> None:
        if self.device.type != "cpu":
            self.group.abort()
            return
        # gloo closes the connections of a group when an operation in it times out, and by no other call.
        with suppress(RuntimeError):
            self.group.recv([torch.empty(1)], (self.rank + 1) % self.ranks, _NEVER_SENT).wait(timedelta(milliseconds=1))

    def _told(self) -> str | None:
        """Why the first rank failed, if it could still say so."""
        with suppress(RuntimeError):
            store = self.group.get_group_store()
            return store.get(_REASON).decode() if store.check([_REASON]) else None


_kept = threading.local()


def _scratch(message: Tensor, count: int, longest: int) -> list[Tensor]:
    """`count` rooms of `longest` elements, kept by each thread between calls: fresh memory costs as much as a message."""
    nbytes = count * longest * message.element_size()
    if getattr(_kept, "bytes", None) is None or _kept.bytes.numel() < nbytes:
        _kept.bytes = torch.empty(nbytes, dtype=torch.uint8)
    return list(_kept.bytes[:nbytes].view(message.dtype).split(longest)) if nbytes else []
