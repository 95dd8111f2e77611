"""Trials of wang2017 that train one model on several ranks: the systems of Figure 5, and whether replicas drift apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from repro.engine import Context, Outcome, Record, Trial, seed_for
from repro.studies.exchanging import PIPELINE, HostsTrial, hosts_or_loopback

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# System -> (variant of BSP-SGD, algorithm of its collectives). The first six are those of the paper's Figure 5.
SYSTEMS = {
    "LP fork-join": ("fork-join", PIPELINE),
    "LP allreduce": ("allreduce", PIPELINE),
    "LP overlap": ("overlap", PIPELINE),
    "MST fork-join": ("fork-join", "minimum spanning tree"),
    "BE fork-join": ("fork-join", "bidirectional exchange"),
    "BE overlap": ("overlap", "bidirectional exchange"),
    "LP dependency": ("dependency", PIPELINE),
    "DDP buckets": ("buckets", "ring"),
}
PAPERS_SYSTEMS = tuple(SYSTEMS)[:6]


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained: `kind` "rnn", a character model whose layers are pruned to `sparsity` from the start, or "cnn".

    `corpus` and `corpus_size`: of characters, or of made images; `hidden`, `layers`, `length` (characters) of the RNN; `batch`:
    of each rank; stochastic gradient descent with momentum 0.9 at `rate`.
    """

    kind: str
    corpus: str
    corpus_size: str = ""
    hidden: int = 0
    layers: int = 0
    length: int = 0
    sparsity: float = 0.0
    batch: int
    rate: float


@dataclass(frozen=True, kw_only=True)
class TrainingTrial(HostsTrial):
    """One repeat of training every model by every system, one after the other, from the same weights on the same batches.

    `block_bytes`: of the pipeline. Curve `iterations`: a row for each model, system and
    iteration: `loss` (the mean of the ranks), `seconds` since the start of training at its end, and `waited`, `computing` and
    `communicating` of `repro.collectives.bsp.Seconds`, rank 0's. Curve `spans`: what the ranks' threads did in one iteration of
    each, for the time lines of Figure 1. Metrics `parameters <model>`, and `differs <model> <system>`: in how many parameters
    replicas differ at the end.
    """

    kind: ClassVar[str] = "training"

    models: tuple[Model, ...]
    ranks: int
    block_bytes: int
    iterations: int
    systems: tuple[str, ...] = tuple(SYSTEMS)

    def seconds(self) -> float:
        return 5 + len(self.models) * len(self.systems) * self.iterations * 0.2

    def label(self) -> str:
        models = " and ".join(model.kind for model in self.models)
        return f"{models} on {self.ranks} ranks by {len(self.systems)} systems, repeat {self.replicate}"

    def measure(self) -> Outcome:
        from repro.collectives.launch import run_ranks

        with hosts_or_loopback(self.ranks, self.rate) as hosts:
            rows, spans, metrics = run_ranks(_train_by_all, self.ranks, self, hosts=hosts)[0]
        tables = {"iterations": rows, "spans": spans}
        return Outcome(
            metrics, {name: {key: [row[key] for row in table] for key in table[0]} for name, table in tables.items()}
        )


def _train_by_all(trial: TrainingTrial) -> tuple[list[dict], list[dict], dict[str, int]]:
    """Rows of iterations and of spans, and metrics, as rank 0 sees them."""
    rows, spans, metrics = [], [], {}
    for model in trial.models:
        for system in trial.systems:
            found = _train(trial, model, system)
            name = {"model": model.kind, "system": system}
            rows += [name | row for row in found.rows]
            spans += [name | span for span in found.spans]
            metrics |= {f"parameters {model.kind}": found.parameters, f"differs {model.kind} {system}": found.differing}
    return rows, spans, metrics


class _Found(NamedTuple):
    rows: list[dict]
    spans: list[dict]
    parameters: int
    differing: int


def _train(trial: TrainingTrial, spec: Model, system: str) -> _Found:
    import time

    import torch
    import torch.distributed as dist

    from repro.collectives.bsp import bsp_sgd

    variant, algorithm = SYSTEMS[system]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, batches, optimizer = prepare(spec, trial.study, trial.replicate, rank, ranks)
    rows = []
    with bsp_sgd(variant, model, optimizer, algorithm, block_bytes=trial.block_bytes) as training:
        training.step(next(batches))  # connects, and fills caches
        dist.barrier()
        begin = time.perf_counter()
        for index in range(trial.iterations):
            loss = training.step(next(batches))
            row = {"iteration": index + 1, "loss": loss, "seconds": time.perf_counter() - begin}
            rows.append(row | vars(training.seconds[-1]))
        spans = training.spans
    losses = torch.tensor([row["loss"] for row in rows], dtype=torch.float64)
    dist.all_reduce(losses)
    for row, loss in zip(rows, losses / ranks, strict=True):
        row["loss"] = loss.item()
    first = min(span.start for span in spans)
    spans = [{"what": s.what, "where": s.where, "start": s.start - first, "end": s.end - first} for s in spans]
    return _Found(rows, spans, sum(p.numel() for p in model.parameters()), differing(model))


def prepare(spec: Model, study: str, replicate: int, rank: int, ranks: int) -> tuple[nn.Module, Iterator[Callable], Callable]:
    """The model, this rank's slices of the minibatches as loss functions of the model, and a maker of its optimizer."""
    import torch

    torch.manual_seed(seed_for(study, replicate, "weights"))
    model, batches = _PREPARED[spec.kind](spec, seed_for(study, replicate, "batches"), rank, ranks)
    return model, batches, partial(_pruned_sgd, masks=kept_weights(model, spec.sparsity), rate=spec.rate)


def kept_weights(model: nn.Module, sparsity: float) -> dict[Tensor, Tensor]:
    """Masks of the matrices of recurrent layers: the largest of the first weights are kept, the others are 0 from the start."""
    import torch

    masks = {}
    for name, parameter in model.named_parameters():
        if sparsity and ("weight_ih" in name or "weight_hh" in name):
            magnitudes = parameter.detach().abs()
            removed = round(sparsity * magnitudes.numel())
            masks[parameter] = magnitudes > magnitudes.flatten().kthvalue(removed).values
            with torch.no_grad():
                parameter.mul_(masks[parameter])
    return masks


def _pruned_sgd(parameters: list[nn.Parameter], masks: dict[Tensor, Tensor], rate: float) -> torch.optim.Optimizer:
    """Stochastic gradient descent that keeps removed weights at 0, as `repro.pruning` does: masks after each step."""
    import torch

    optimizer = torch.optim.SGD(parameters, rate, momentum=0.9)

    def mask(*_):
        with torch.no_grad():
            for parameter in parameters:
                if parameter in masks:
                    parameter.mul_(masks[parameter])

    optimizer.register_step_post_hook(mask)
    return optimizer


@cache
def characters(corpus: str, size: str) -> tuple[Tensor, int]:
    """Training characters and the number of symbols."""
    import torch

    from repro.datasets.text import load_characters

    found = load_characters(corpus, **({"size": size} if size else {}))
    return torch.from_numpy(found.splits["train"]), len(found.vocabulary)


@cache
def _pictures(size: str) -> tuple[Tensor, Tensor]:
    import torch

    from repro.datasets import madeimages

    split = madeimages.load(size)["train"]
    return torch.from_numpy(split.images), torch.from_numpy(split.labels)


def _characters(spec: Model, seed: int, rank: int, ranks: int) -> tuple[nn.Module, Iterator[Callable]]:
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    from repro.models.language import LanguageModel

    tokens, symbols = characters(spec.corpus, spec.corpus_size)
    model = LanguageModel(symbols, spec.hidden, spec.hidden, spec.layers, cell="gru")
    rng = np.random.default_rng(seed)

    def losses():
        while True:
            starts = rng.integers(len(tokens) - spec.length - 1, size=ranks * spec.batch)
            mine = starts[rank * spec.batch : (rank + 1) * spec.batch]
            window = torch.stack([tokens[at : at + spec.length + 1] for at in mine], dim=1)
            yield lambda model, w=window: cross_entropy(model(w[:-1])[0].flatten(0, 1), w[1:].flatten())

    return model, losses()


def _images(spec: Model, seed: int, rank: int, ranks: int) -> tuple[nn.Module, Iterator[Callable]]:
    import numpy as np
    from torch.nn.functional import cross_entropy

    from repro.models.vision import SmallCNN

    images, labels = _pictures(spec.corpus_size)
    rng = np.random.default_rng(seed)

    def losses():
        while True:
            chosen = rng.integers(len(labels), size=ranks * spec.batch)[rank * spec.batch : (rank + 1) * spec.batch]
            yield lambda model, c=chosen: cross_entropy(model(images[c]), labels[c])

    return SmallCNN(), losses()


_PREPARED = {"rnn": _characters, "cnn": _images}


def differing(model: nn.Module) -> int:
    """Of how many parameters the replicas differ in any bit."""
    import torch
    import torch.distributed as dist

    values = torch.cat([p.detach().flatten() for p in model.parameters()]).view(torch.int32)
    least, most = values.clone(), values.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int((least != most).sum())


FIXED_ORDER, MULTIPLIED, OWN_ORDER = DRIFTS = (
    "sums by the linear pipeline",
    "one sum for all, multiplied by each rank",
    "sums in an order of each rank",
)


@dataclass(frozen=True, kw_only=True)
class DriftTrial(Trial):
    """Do replicas that add up the same gradients drift apart, and why? Every rank updates for itself, never resynchronised.

    Three ways to the sum of the gradients: allreduce by the linear pipeline; rank 0's sum broadcast, so that ranks do nothing
    but multiply and add it for themselves; all gradients gathered, and added in an order of each rank, beginning with its own.
    Curve `drift`: a row for each way and iteration, the largest difference of replicas over the largest absolute parameter.
    """

    study: ClassVar[str] = "wang2017"
    kind: ClassVar[str] = "drift"

    model: Model
    ranks: int
    iterations: int
    replicate: int = 0

    def seconds(self) -> float:
        return 5 + len(DRIFTS) * self.iterations * 0.1

    def label(self) -> str:
        return f"drift of {self.ranks} replicas, seed {self.replicate}"

    def run(self, context: Context, *needed: Record) -> Outcome:
        from repro.collectives.launch import run_ranks

        rows = []
        for way, found in zip(DRIFTS, run_ranks(_drift_by_all, self.ranks, self)[0], strict=True):
            rows += [{"way": way, "iteration": index + 1, "drift": drift} for index, drift in enumerate(found)]
        last = {f"drift, {row['way']}": row["drift"] for row in rows if row["iteration"] == self.iterations}
        return Outcome(last, {"drift": {key: [row[key] for row in rows] for key in rows[0]}})


def _drift_by_all(trial: DriftTrial) -> list[list[float]]:
    return [_drift(trial, way) for way in DRIFTS]


def _drift(trial: DriftTrial, way: str) -> list[float]:
    import torch
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, batches, optimizer = prepare(trial.model, trial.study, trial.replicate, rank, ranks)
    optimizer = optimizer(list(model.parameters()))
    found = []
    for _ in range(trial.iterations):
        optimizer.zero_grad()
        next(batches)(model).backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        total = _sum(flat, way) / ranks
        for parameter, gradient in zip(model.parameters(), total.split([p.numel() for p in model.parameters()]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        optimizer.step()
        values = torch.cat([p.detach().flatten() for p in model.parameters()])
        least, most = values.clone(), values.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        found.append(((most - least).max() / values.abs().max()).item())
    return found


def _sum(flat: Tensor, way: str) -> Tensor:
    """The sum of all ranks' gradients, by one of `DRIFTS`."""
    import torch
    import torch.distributed as dist

    from repro.collectives import allreduce

    if way == FIXED_ORDER:
        return allreduce(flat, PIPELINE)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    gathered = [torch.empty_like(flat) for _ in range(ranks)]
    dist.all_gather(gathered, flat)
    first = 0 if way == MULTIPLIED else rank
    total = gathered[first].clone()
    for further in range(1, ranks):
        total += gathered[(first + further) % ranks]
    if way == MULTIPLIED:
        dist.broadcast(total, 0)
    return total
