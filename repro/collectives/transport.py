"""Point-to-point messages of a process group, with checks and errors instead of hangs."""

from __future__ import annotations

import threading
import time
import zlib
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
_CALLED = "repro collective that failed on rank"
_HEARING_SECONDS = 0.5  # until the others have failed, too, and said what they called
_NEEDS_NO_RECEIPT = 2**16  # bytes; two such messages at once delay each other by less than a receipt takes
_DATA, _RECEIPT, _NEVER_SENT = range(3)  # tags


class CollectiveError(ReproError):
    """A collective that could not be finished: a rank was lost, too slow, or called with other arguments.

    What is left of messages may still be under way, so the group is of no more use: leave it, and make a new one.
    """


class Transport:
    """The messages of one call of a collective in a process group.

    `call`: the collective with all its arguments, in words that are the same on all ranks; messages carry a tag made of them,
    so that ranks that call something else exchange nothing. `timeout`: seconds for each message.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: float, call: str):
        if not timeout > 0:
            raise ReproError(f"timeout is {timeout}: it should be a number of seconds above 0")
        self.group, self.device, self.timeout, self.call = group, device, timeout, call
        self.rank, self.ranks = group.rank(), group.size()
        self._wait = timedelta(seconds=timeout)
        self._number = zlib.crc32(call.encode()) >> 4  # two bits are left for the kind of message, and two for the sign

    def agree(self) -> None:
        """Where messages have no tags, with NCCL: compare the call with both neighbours in rank order before it begins."""
        mine = torch.tensor([self._number], device=self.device)
        neighbours = sorted({(self.rank - 1) % self.ranks, (self.rank + 1) % self.ranks} - {self.rank})
        theirs = {rank: torch.empty_like(mine) for rank in neighbours}
        self._exchange([(rank, mine) for rank in neighbours], list(theirs.items()))
        if not all(torch.equal(number, mine) for number in theirs.values()):
            raise RuntimeError("a neighbour calls something else")

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
                posted.append((self.group.recv([room], source, self._tag(_DATA)), room))

        def receive_until(count: int) -> None:
            nonlocal done
            while done < count:
                work, room = posted[done]
                source, start, stop, reduce, receipt = steps.receives[done]
                work.wait(self._wait)
                if receipt and long(start, stop):
                    pending.append(self.group.send([token], source, self._tag(_RECEIPT)))
                if reduce:
                    message[start:stop] += room
                done += 1
                post_receives()

        post_receives()
        before = None
        for send in steps.sends:
            receive_until(send.after)
            if send.receipt and long(before.start, before.stop):
                self.group.recv([token.clone()], before.target, self._tag(_RECEIPT)).wait(self._wait)
            pending.append(self.group.send([message[send.start : send.stop]], send.target, self._tag(_DATA)))
            before = send
        receive_until(len(steps.receives))
        for work in pending:
            work.wait(self._wait)

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
            for work in dist.batch_isend_irecv(operations):
                work.wait(self._wait)

    def play_own(self, collective: str, message: Tensor, root: int) -> None:
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
        work.wait(self._wait)

    def _tag(self, kind: int) -> int:
        return 4 * self._number + kind

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What the process group raises inside becomes a CollectiveError that says why, here and on the other ranks."""
        try:
            yield
        except RuntimeError as error:
            raise CollectiveError(f"{self.call}: {self._diagnosis()} ({str(error).partition(chr(10))[0]})") from error

    def _diagnosis(self) -> str:
        """Leave the group, so that no rank goes on waiting for this one; say what was called here, hear what was elsewhere."""
        calls = {}
        # The store may have gone down with the rank that kept it.
        with suppress(RuntimeError):
            store = self.group.get_group_store()
            store.set(f"{_CALLED} {self.rank}", self.call)
            self._close()
            deadline = time.monotonic() + _HEARING_SECONDS
            while len(calls) < self.ranks and time.monotonic() < deadline:
                calls |= {r: store.get(name).decode() for r in range(self.ranks) if store.check([name := f"{_CALLED} {r}"])}
                time.sleep(0.01)
        self._close()
        if others := [f"rank {rank} calls {call}" for rank, call in calls.items() if call != self.call]:
            return ", ".join(others)
        silent = [str(rank) for rank in range(self.ranks) if rank not in calls]
        return f"rank {', '.join(silent) or 'unknown'} is lost, or slower than {self.timeout:g} s"

    def _close(self) -> None:
        if self.device.type != "cpu":
            self.group.abort()
            return
        # gloo closes the connections of a group when an operation in it times out, and by no other call.
        with suppress(RuntimeError):
            never = self.group.recv([torch.empty(1)], (self.rank + 1) % self.ranks, self._tag(_NEVER_SENT))
            never.wait(timedelta(milliseconds=1))


_kept = threading.local()


def _scratch(message: Tensor, count: int, longest: int) -> list[Tensor]:
    """`count` rooms of `longest` elements, kept by each thread between calls: fresh memory costs as much as a message."""
    nbytes = count * longest * message.element_size()
    if getattr(_kept, "bytes", None) is None or _kept.bytes.numel() < nbytes:
        _kept.bytes = torch.empty(nbytes, dtype=torch.uint8)
    return list(_kept.bytes[:nbytes].view(message.dtype).split(longest)) if nbytes else []
