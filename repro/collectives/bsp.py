"""Synchronous SGD on several ranks: the BSP-SGD variants of Wang et al. 2017, section 3.3, and two that came after.

All compute the same: each rank the gradient of its slice of the minibatch, and everyone's parameters are updated by the mean
of these gradients (Eq. 5). They differ in what waits for what.

    with bsp_sgd("overlap", model, partial(torch.optim.SGD, lr=0.1), "linear pipeline") as training:
        for batch in batches:
            training.step(lambda model: loss(model, batch))
"""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from repro.collectives.communicator import Communicator, Span
from repro.collectives.ddp import average_hook
from repro.collectives.operations import allreduce, reduce
from repro.collectives.parts import Part, divide
from repro.errors import ReproError, one_of

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Seconds:
    """Of one iteration: the computing thread `waited` or was `computing`; the communicator was `communicating` meanwhile."""

    waited: float
    computing: float
    communicating: float


class Training:
    """What the variants share; each says what is to happen before and after the passes of a part through forward and backward.

    `optimizer(parameters)` makes an optimizer, which must treat every parameter by itself, as SGD and AdamW do; `optimizers`
    are those made. `algorithm` and `options`: of the collectives, see `repro.collectives.allreduce`. `layers`: the modules
    that travel one by one, in the order of the forward pass, each with all its submodules; None: all that have parameters
    of their own, in the order of registration. A parameter of several layers belongs to the first. Fork-join, allreduce and
    buckets take the model as one.

    All ranks start from the parameters of rank 0. Leave the `with` block, or call `finish`, before parameters are read or
    optimizers changed. Buffers, such as the statistics of batch normalisation, stay each rank's own.

    `seconds`: an entry an iteration; `spans`: what the last one did. Those of the computing thread follow one another
    ("forward", "loss", "backward", "update", "wait"); the others are the communicator's, as far as they have ended: the rest
    counts in the next iteration. On GPUs they time launches.

    Raises ReproError for parameters that are in no layer, or of different dtypes in one; CollectiveError, or for buckets
    RuntimeError, in `step` or `finish` of all ranks when a rank is lost or leaves the block by an exception.
    """

    by_layer = True
    by_priority = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: MakeOptimizer,
        algorithm: str = "ring",
        *,
        layers: Sequence[nn.Module] | None = None,
        **options,
    ):
        if layers is None:
            layers = [module for module in model.modules() if any(p.requires_grad for p in module.parameters(recurse=False))]
        layers = layers if self.by_layer else [model]
        part_of = divide(model, layers)
        self.called = model
        self.parts = list(dict.fromkeys(part_of.values()))
        self.optimizers = self.make_optimizers(optimizer)
        self.seconds: list[Seconds] = []
        self.spans: list[Span] = []
        self._algorithm, self._options = algorithm, options
        self._entered, self._laps, self._mark = list(self.parts), [], time.perf_counter()
        self._communicator = Communicator(self.by_priority)
        self._ranks, self._is_root = self._communicator.group.size(), self._communicator.group.rank() == 0
        for part in self.parts:
            self.broadcast(part).result()
        self._communicator.spans.clear()
        self._hooks = []
        for module in layers:
            for part in dict.fromkeys(part_of[p] for p in module.parameters() if p in part_of):
                self._hooks.append(module.register_forward_pre_hook(partial(self._enter, part)))
                self._hooks.append(module.register_forward_hook(partial(self._leave, part)))
        for parameter, part in part_of.items():
            self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(self._accumulated, part)))

    def step(self, loss: Callable[[nn.Module], Tensor]) -> float:
        """One iteration; returns `loss(model)`, the mean loss of this rank's slice. Slices of all ranks have the same size.

        Raises ReproError when a layer was not called or got no gradient: every iteration must use all of them.
        """
        self._laps.clear()
        self._entered.clear()
        self._mark = time.perf_counter()
        value = loss(self.called)
        if left := [part.name for part in self.parts if part not in self._entered]:
            raise ReproError(f"the loss did not call {', '.join(left)}: every iteration must call all layers as modules")
        self._lap("loss")
        value.backward()
        if left := [part.name for part in self.parts if part.missing]:
            raise ReproError(f"not all parameters of {', '.join(left)} got a gradient: the loss must depend on all of them")
        self.after_passes()
        ended = self._communicator.spans
        theirs = [ended.popleft() for _ in range(len(ended))]
        waited = _sum(span for span in self._laps if span.what == "wait")
        self.seconds.append(Seconds(waited, _sum(self._laps) - waited, _sum(theirs)))
        self.spans = [*self._laps, *theirs]
        return value.item()

    def make_optimizers(self, optimizer: MakeOptimizer) -> list[torch.optim.Optimizer]:
        return [optimizer([p for part in self.parts for p in part.parameters])]

    def before_forward(self, part: Part) -> None: ...
    def after_forward(self, part: Part) -> None: ...
    def after_backward(self, part: Part) -> None: ...
    def after_passes(self) -> None: ...

    def finish(self) -> None:
        """On all ranks: give every rank's model the parameters that the last step led to."""

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with self._communicator:
            for hook in self._hooks:
                hook.remove()
            if error:
                raise error
            self.finish()

    def submit(self, function: Callable, *arguments, part: Part, priority: int = 0) -> Future:
        arguments = (*arguments, self._algorithm)
        return self._communicator.submit(function, *arguments, where=part.name, priority=priority, **self._options)

    def broadcast(self, part: Part) -> Future:
        return self.submit(part.broadcast, part=part)

    def wait(self, future: Future, part: Part) -> None:
        future.result()
        self._lap("wait", part)

    def update(self, optimizer: torch.optim.Optimizer, *parts: Part) -> None:
        """A step along the mean of the gradients whose sum the parts hold."""
        for part in parts:
            part.gradient /= self._ranks
        optimizer.step()
        self._lap("update", parts[0] if len(parts) == 1 else None)

    def _enter(self, part: Part, *_) -> None:
        self.before_forward(part)
        if part not in self._entered:
            self._entered.append(part)
            part.clear()

    def _leave(self, part: Part, *_) -> None:
        self._lap("forward", part)
        self.after_forward(part)

    def _accumulated(self, part: Part, *_) -> None:
        part.missing -= 1
        if part.missing == 0:
            self._lap("backward", part)
            self.after_backward(part)

    def _lap(self, what: str, part: Part | None = None) -> None:
        """Name what the computing thread did since the last lap."""
        now = time.perf_counter()
        self._laps.append(Span(what, part.name if part else "", self._mark, now))
        self._mark = now


class ForkJoin(Training):
    """Algorithm 2: forward and backward, reduce to the root, the root's update, broadcast, barrier; all in one message."""

    by_layer = False

    def after_passes(self) -> None:
        (model,) = self.parts
        self.wait(self.submit(reduce, model.gradient, part=model), model)
        if self._is_root:
            self.update(*self.optimizers, model)
        self.wait(self.broadcast(model), model)
        self.wait(self._communicator.submit(dist.barrier), model)


class AllReduce(Training):
    """Algorithm 3: allreduce in one message, everyone's update; the parameters of rank 0 again every `resync` iterations.

    `resync`: 5 in the paper, against the drift of replicas. Where they are bit-identical, as here, None, never, does as well.
    """

    by_layer = False

    def __init__(self, *arguments, resync: int | None = 5, **options):
        super().__init__(*arguments, **options)
        self._resync = resync

    def after_passes(self) -> None:
        (model,) = self.parts
        self.wait(self.submit(allreduce, model.gradient, part=model), model)
        self.update(*self.optimizers, model)
        if self._resync and (len(self.seconds) + 1) % self._resync == 0:
            self.wait(self.broadcast(model), model)


class Overlap(Training):
    """Algorithm 1: the parameters of the next layer travel during a layer's forward, the gradient of the layer above during its
    backward; then the root's update. The listing never reduces the gradient of layer 0, which is added here.

    Raises ReproError when layers are called in another order than that of `layers`.
    """

    _travelling: Future | None = None

    def before_forward(self, part: Part) -> None:
        if part in self._entered:
            return
        index = len(self._entered)
        if part is not self.parts[index]:
            raise ReproError(f"{part.name} is called before {self.parts[index].name}: `layers` must be in the order of calls")
        if index == 0:
            self.wait(self.broadcast(part), part)
        self._travelling = self.broadcast(self.parts[index + 1]) if part is not self.parts[-1] else None

    def after_forward(self, part: Part) -> None:
        if self._travelling:
            self.wait(self._travelling, part)

    def after_backward(self, part: Part) -> None:
        if self._travelling:
            self.wait(self._travelling, part)
        self._travelling = self.submit(reduce, part.gradient, part=part)

    def after_passes(self) -> None:
        self.wait(self._travelling, self.parts[0])
        if self._is_root:
            self.update(*self.optimizers, *self.parts)

    def finish(self) -> None:
        for part in self.parts:
            self.broadcast(part).result()
        self._communicator.spans.clear()


class Dependency(Training):
    """Nothing waits but the forward pass of a layer, for its own update.

    The gradient of a layer is summed as soon as it is formed. Of those that wait for the network the layer nearest to the
    input goes first, since it is needed first; by the order of backpropagation it would come last, and all would wait for it.
    """

    by_priority = True

    def __init__(self, *arguments, **options):
        self._sums: dict[Part, Future] = {}
        super().__init__(*arguments, **options)

    def make_optimizers(self, optimizer: MakeOptimizer) -> list[torch.optim.Optimizer]:
        return [optimizer(part.parameters) for part in self.parts]

    def before_forward(self, part: Part) -> None:
        if part in self._sums:
            self._lap("forward", part)
            self.wait(self._sums.pop(part), part)
            self.update(self.optimizers[self.parts.index(part)], part)

    def after_backward(self, part: Part) -> None:
        self._sums[part] = self.submit(allreduce, part.gradient, part=part, priority=self.parts.index(part))

    def finish(self) -> None:
        for part in self.parts:
            self.before_forward(part)


class Buckets(Training):
    """torch's DistributedDataParallel: buckets of some `megabytes` are averaged while backpropagation goes on.

    "wait" is here what follows the last gradient: DDP then waits for its buckets, and copies them back.
    """

    by_layer = False

    def __init__(self, model: nn.Module, optimizer: MakeOptimizer, algorithm: str = "ring", megabytes: float = 25, **options):
        super().__init__(model, optimizer, algorithm, **options)
        self.called = DistributedDataParallel(model, bucket_cap_mb=megabytes, forward_sync_buffers=False)
        self.called.register_comm_hook(None, average_hook(algorithm, self._communicator, **self._options))

    def after_passes(self) -> None:
        self._lap("wait")
        self.optimizers[0].step()
        self._lap("update")


VARIANTS = {"fork-join": ForkJoin, "allreduce": AllReduce, "overlap": Overlap, "dependency": Dependency, "buckets": Buckets}


def bsp_sgd(variant: str, model: nn.Module, optimizer: MakeOptimizer, algorithm: str = "ring", **options) -> Training:
    """The variant of this name, to be used in a `with` block on all ranks; arguments and options as in `Training`."""
    one_of("variant of BSP-SGD", variant, VARIANTS)
    return VARIANTS[variant](model, optimizer, algorithm, **options)


def _sum(spans: Iterable[Span]) -> float:
    return sum(span.end - span.start for span in spans)
