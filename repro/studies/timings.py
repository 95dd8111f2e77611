"""Timing trials of narang2017: products of dense and sparse matrices, and what the pruner adds to a training step."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from repro.engine import Context, Outcome, Record, Trial, seed_for
from repro.files import write_atomically
from repro.sparse.storage import stored_bytes

if TYPE_CHECKING:
    from repro.sparse.bench import Bench
    from repro.sparse.timing import Timing

LEAST_BYTES = 2**16  # smaller working sets cannot be timed; theirs is the rate of the fastest cache anyway


@dataclass(frozen=True, kw_only=True)
class ProductTrial(Trial):
    """y = W x for several `shapes` (rows, columns), by every backend at every sparsity and batch; one repeat of the whole grid.

    `large_batch_shapes` limits the batches above the first to those shapes; `scale` divides all rows and columns (smoke);
    `backends`: names from `repro.sparse.peers`, all if empty.
    A metric `missing <backend>` says why a backend is not in the curve `products`, or not at some sparsity.
    """

    study: ClassVar[str] = "narang2017"
    kind: ClassVar[str] = "products"
    code_version: ClassVar[int] = 2
    timing: ClassVar[bool] = True

    shapes: tuple[tuple[int, int], ...]
    large_batch_shapes: tuple[tuple[int, int], ...]
    sparsities: tuple[float, ...]
    batches: tuple[int, ...]
    rounds: int
    scale: int = 1
    backends: tuple[str, ...] = ()
    replicate: int = 0

    def seconds(self) -> float:
        cells = [*self.shapes, *self.large_batch_shapes * (len(self.batches) - 1)]
        weights = sum(rows * columns for rows, columns in cells) / self.scale**2
        return 15 + len(self.sparsities) * weights * 1e-7 + len(cells) * self.rounds * 0.7

    def label(self) -> str:
        return f"products of {len(self.shapes)} shapes, repeat {self.replicate}"

    def run(self, context: Context, *needed: Record) -> Outcome:
        from repro.sparse.bench import Bench

        cells = [(shape, self.batches[0]) for shape in self.shapes]
        cells += [(shape, batch) for batch in self.batches[1:] for shape in self.large_batch_shapes]
        # A whole grid takes minutes: what is done is kept, cell by cell.
        done = (
            json.loads(context.checkpoint.read_text())
            if context.checkpoint.exists()
            else {"rows": [], "missing": {}, "cells": 0}
        )
        with Bench(context.threads) as bench:
            for shape, batch in cells[done["cells"] :]:
                rows, columns = (n // self.scale for n in shape)
                seed = seed_for(self.study, self.replicate, f"products {rows} x {columns}")
                options = {"backends": self.backends} if self.backends else {}
                products = bench.time_products(rows, columns, self.sparsities, batch, rounds=self.rounds, seed=seed, **options)
                done["rows"] += [asdict(timing) | byte_bound(timing, bench) for timing in products.timings]
                done["missing"] |= products.missing
                done["cells"] += 1
                write_atomically(context.checkpoint, json.dumps(done))
        metrics = {f"missing {name}": reason for name, reason in done["missing"].items()}
        return Outcome(metrics, {"products": {name: [row[name] for row in done["rows"]] for name in done["rows"][0]}})


def byte_bound(timing: Timing, bench: Bench) -> dict[str, float]:
    """The bytes that have to be read at least, positions at their entropy, and the rate at which the machine reads as many."""
    size = timing.rows * timing.columns
    nonzero = size - round(timing.sparsity * size)
    nbytes = stored_bytes(size, nonzero, index="entropy" if timing.sparse else "dense")
    return {"bytes": nbytes, "gbps": bench.bandwidth(max(round(nbytes), LEAST_BYTES))}


@dataclass(frozen=True, kw_only=True)
class StepTrial(Trial):
    """One training step of the speech model with and without the paper's pruning, in turn, on the same made batch.

    Metrics in milliseconds, medians over `steps`: `dense_ms`, `pruned_ms` (optimizer step and pruner in it), and the pruner's
    own `pruner_ms`; `overhead_percent` of the dense step, refreshes of the masks included at their share (one in `freq`).
    """

    study: ClassVar[str] = "narang2017"
    kind: ClassVar[str] = "step"
    code_version: ClassVar[int] = 2
    timing: ClassVar[bool] = True

    hidden: int
    layers: int
    channels: int
    time_strides: tuple[int, int]
    bins: int
    batch: int
    frames: int
    freq: int
    steps: int = 30
    replicate: int = 0

    def seconds(self) -> float:
        return 5 + self.steps * 0.25

    def label(self) -> str:
        return f"training steps of rnn {self.hidden}, repeat {self.replicate}"

    def run(self, context: Context, *needed: Record) -> Outcome:
        import torch

        from repro.models.speech import SpeechConfig, SpeechModel
        from repro.pruning import GradualPruner, Ramp, dense_quantiles

        seed = seed_for(self.study, self.replicate, "weights")
        generator = torch.Generator().manual_seed(seed)
        shape = SpeechConfig("rnn", self.hidden, self.layers, self.channels, self.bins, self.time_strides)
        features = torch.randn(self.batch, self.frames, self.bins, generator=generator)
        lengths = torch.full((self.batch,), self.frames)
        targets = torch.randint(1, shape.outputs, (self.batch, 8), generator=generator)
        arms = {}
        for name in ("dense", "pruned"):
            torch.manual_seed(seed)
            model = SpeechModel(shape)
            arms[name] = (model, torch.optim.AdamW(model.parameters(), 1e-3))
        # The paper's ramp in its middle, where masks are refreshed every `freq` steps.
        pruned = arms["pruned"][0]
        times = {"start": 0, "ramp": self.steps, "end": 4 * self.steps, "freq": self.freq}
        schedule = {role: Ramp(q, **times) for role, q in dense_quantiles(pruned, skip=("ctc",)).items()}
        pruner = GradualPruner(pruned, schedule, skip=("ctc",))

        def step(name: str) -> tuple[float, float]:
            model, optimizer = arms[name]
            begin = time.perf_counter()
            scores, frames = model(features, lengths)
            loss = torch.nn.functional.ctc_loss(scores, targets, frames, torch.full((self.batch,), 8), zero_infinity=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            middle = time.perf_counter()
            if name == "pruned":
                pruner.step()
            end = time.perf_counter()
            return end - begin, end - middle

        for name in arms:
            step(name)
        times = {name: [] for name in arms}
        pruner_times = []
        for index in range(self.steps):
            for name in ("dense", "pruned") if index % 2 else ("pruned", "dense"):
                whole, own = step(name)
                times[name].append(whole)
                if name == "pruned":
                    pruner_times.append(own)
        dense = statistics.median(times["dense"])
        return Outcome(
            {
                "dense_ms": 1e3 * dense,
                "pruned_ms": 1e3 * statistics.median(times["pruned"]),
                "ratio": statistics.median(p / d for p, d in zip(times["pruned"], times["dense"], strict=True)),
                "pruner_ms": 1e3 * statistics.fmean(pruner_times),
                "overhead_percent": 100 * statistics.fmean(pruner_times) / dense,
            }
        )
