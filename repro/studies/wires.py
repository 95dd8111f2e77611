"""Trials of wang2017 on sparse gradients: whether thresholded gate gradients save bytes on the wire, and what pruning saves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from repro.engine import Context, Outcome, Record, Trial, seed_for
from repro.studies.exchanging import HostsTrial, hosts_or_loopback
from repro.studies.replicas import Model, characters

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = ("weight_ih", "weight_hh")


@dataclass(frozen=True, kw_only=True)
class ZerosTrial(Trial):
    """Train a character LSTM with thresholded gate gradients (zhu2017) and count zeros, every `every` steps.

    Of each time step's gate gradients the smallest are set to zero, a share of `target`, so that no loss normalisation matters.
    Curve `zeros`, a row each time: the share of exact zeros in dnet, `gates`; in the layers' weight gradients dW and dU of one
    `sequence`, of a rank's `minibatch`, and of the minibatches of `ranks` of them, `exchanged`; and `bytes`, those of a
    minibatch's non-zero values with their positions (a bitmap or 4-byte columns, whichever is less) over dense ones.
    """

    study: ClassVar[str] = "wang2017"
    kind: ClassVar[str] = "zeros"

    model: Model
    target: float
    ranks: int
    steps: int
    every: int
    replicate: int = 0

    def seconds(self) -> float:
        return 3 + self.steps * self.model.batch * self.model.length * self.model.hidden**2 * 1e-9

    def label(self) -> str:
        return f"zeros in gradients, {self.target:.0%} of the gates', seed {self.replicate}"

    def run(self, context: Context, *needed: Record) -> Outcome:
        import torch
        from torch.nn.functional import cross_entropy

        from repro.gradients import ThresholdedLSTM, TopK, record
        from repro.models.language import LanguageModel
        from repro.sparse.storage import stored_bytes

        spec = self.model
        tokens, symbols = characters(spec.corpus, spec.corpus_size)
        torch.manual_seed(seed_for(self.study, self.replicate, "weights"))
        layer = partial(ThresholdedLSTM, threshold=TopK(self.target))
        model = LanguageModel(symbols, spec.hidden, spec.hidden, spec.layers, recurrent=layer)
        optimizer = torch.optim.Adam(model.parameters(), spec.rate)
        generator = torch.Generator().manual_seed(seed_for(self.study, self.replicate, "batches"))

        def draw(sequences: int) -> Tensor:
            starts = torch.randint(len(tokens) - spec.length - 1, (sequences,), generator=generator)
            return torch.stack([tokens[at : at + spec.length + 1] for at in starts.tolist()], dim=1)

        def loss(window: Tensor) -> Tensor:
            return cross_entropy(model(window[:-1])[0].flatten(0, 1), window[1:].flatten())

        rows = []
        for step in range(1, self.steps + 1):
            optimizer.zero_grad()
            value = loss(draw(spec.batch))
            value.backward()
            optimizer.step()
            if step % self.every == 0:
                window = draw(self.ranks * spec.batch)
                with record(model) as records:
                    shares = {"sequence": _zeros(model, [loss(window[:, :1])])}
                    shares["minibatch"] = _zeros(model, [loss(window[:, : spec.batch])])
                    shares["exchanged"] = _zeros(model, [loss(part) for part in window.split(spec.batch, dim=1)])
                sizes, kept = shares["minibatch"]
                fewest = min(stored_bytes(sizes, kept, index=index) for index in ("bitmap", "csr32"))
                gates = [found.overall()["sparsity"] for found in records.values()]
                row = {"step": step, "loss": value.item(), "gates": sum(gates) / len(gates)}
                row |= {name: 1 - sum(kept) / sum(sizes) for name, (sizes, kept) in shares.items()}
                rows.append(row | {"bytes": fewest / (4 * sum(sizes))})
        return Outcome({"loss": rows[-1]["loss"]}, {"zeros": {key: [row[key] for row in rows] for key in rows[0]}})


def _zeros(model: nn.Module, losses: list[Tensor]) -> tuple[list[int], list[int]]:
    """Sizes and non-zero counts of the layers' weight gradients, summed over the losses."""
    import torch

    named = [(name, p) for name, p in model.named_parameters() if any(kind in name for kind in WEIGHTS)]
    totals = [torch.zeros_like(p) for _, p in named]
    for value in losses:
        for total, gradient in zip(totals, torch.autograd.grad(value, [p for _, p in named]), strict=True):
            total += gradient
    return [t.numel() for t in totals], [int(t.count_nonzero()) for t in totals]


@dataclass(frozen=True, kw_only=True)
class KeptTrial(HostsTrial):
    """Allreduce of the gradients of a pruned model: all of them, or the kept ones alone, whose places all ranks know.

    `elements` in all, in `tensors` of equal size. Curve `times`: a row for each
    sparsity, median and quartiles of the seconds of the dense and of the compacted exchange, packing included, in turn.
    """

    kind: ClassVar[str] = "kept"

    elements: int
    tensors: int
    sparsities: tuple[float, ...]
    ranks: int
    rounds: int

    def seconds(self) -> float:
        return 3 + len(self.sparsities) * self.rounds * 4 * 2 * self.elements / (self.rate or 1e9)

    def label(self) -> str:
        return f"gradients of a pruned model on {self.ranks} ranks, repeat {self.replicate}"

    def measure(self) -> Outcome:
        import numpy as np

        from repro.collectives.launch import run_ranks

        with hosts_or_loopback(self.ranks, self.rate) as hosts:
            seconds = np.max(run_ranks(_exchange_kept, self.ranks, self, hosts=hosts), axis=0)
        columns = {"sparsity": list(self.sparsities)}
        for way, values in zip(("dense", "kept"), np.moveaxis(seconds, 1, 0), strict=True):
            for name, share in (("lower", 0.25), ("median", 0.5), ("upper", 0.75)):
                columns[f"{way}_{name}"] = np.quantile(values, share, axis=1)
        return Outcome({}, {"times": columns})


def _exchange_kept(trial: KeptTrial) -> list[list[list[float]]]:
    """Seconds by sparsity, way (dense, kept) and round, on this rank."""
    import time

    import torch
    import torch.distributed as dist

    from repro.collectives import allreduce
    from repro.collectives.compaction import KeptGradients

    generator = torch.Generator().manual_seed(seed_for(trial.study, trial.replicate, "masks"))
    gradients = [torch.randn(trial.elements // trial.tensors, generator=generator) for _ in range(trial.tensors)]

    def dense() -> None:
        message = allreduce(torch.cat(gradients))
        for gradient, part in zip(gradients, message.split([len(g) for g in gradients]), strict=True):
            gradient.copy_(part)

    found = []
    for sparsity in trial.sparsities:
        kept = KeptGradients([torch.rand(g.shape, generator=generator) >= sparsity for g in gradients])
        ways = dense, partial(kept.allreduce, gradients)
        seconds = [[], []]
        for turn in range(trial.rounds + 1):
            for gradient in gradients:
                gradient.normal_()
            for index, way in enumerate(ways):
                dist.barrier()
                begin = time.perf_counter()
                way()
                if turn:
                    seconds[index].append(time.perf_counter() - begin)
        found.append(seconds)
    return found
