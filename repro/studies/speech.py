"""The trial behind most of narang2017: train one speech model, dense or pruned, and say how well it reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from repro.engine import Context, Outcome, Record, Trial, seed_for

if TYPE_CHECKING:
    from repro.models.speech import SpeechModel
    from repro.pruning import GradualPruner

ROLES = ("recurrent", "input", "output")
OUTPUT_LAYER = "ctc"  # stays dense: it is not in the paper's list of pruned layers
EVALUATION_BATCH = 64  # larger than in training, which only makes it faster
STEP_SECONDS = 0.010  # one frame of the spectrogram
PERCENTILES = tuple(i / 100 for i in range(50, 100))  # at which a dense trial records q, by role


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """How a model is pruned while it trains. Fractions of an epoch follow Table 1 of the paper.

    `method`: "ramp" (the paper: q from the dense trial `dense`), "auto" (q from the weights in training, ours), "hard" (once,
    after `hard_epoch`), "cubic" (Zhu and Gupta 2017) or "printed sign" (Algorithm 1 as printed). `sparsity`: wanted share of
    zeros in the pruned matrices, or the percentile that gives q. `freq` in iterations, `phi` in thetas; `grouping` and
    `regrowth` as in `GradualPruner`; `roles`: which matrices are pruned.
    """

    method: str = "ramp"
    sparsity: float = 0.9
    freq: int = 100
    phi: float = 1.5
    grouping: str = "type"
    regrowth: str = "update"
    roles: tuple[str, ...] = ROLES
    hard_epoch: int | None = None
    dense: SpeechTrial | None = None


@dataclass(frozen=True, kw_only=True)
class SpeechTrial(Trial):
    """One training run. `replicate` seeds weights, batches and dropout alike for all arms of a comparison (paired)."""

    study: ClassVar[str] = "narang2017"
    kind: ClassVar[str] = "speech"

    corpus: str
    corpus_size: str | None = None
    replicate: int = 0
    cell: str = "rnn"
    hidden: int
    layers: int
    channels: int
    time_strides: tuple[int, int]
    dropout: float = 0.0
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.0
    clip_norm: float = 10.0
    augment: bool = False
    speeds: tuple[float, ...] = (1.0,)
    pruning: Pruning | None = None
    arm: ClassVar[str] = ""

    def needs(self) -> tuple[Trial, ...]:
        dense = self.pruning.dense if self.pruning else None
        return (dense,) if dense else ()

    def seconds(self) -> float:
        """Fitted by eye to runs on one core; only plans and progress bars depend on it."""
        audio = {"an4": 2290.0, "laptop": 738.0, "smoke": 60.0}[self.corpus_size or self.corpus]
        frames = audio / STEP_SECONDS / math.prod(self.time_strides)
        bins = 41 if self.corpus == "an4" else 21
        gates, directions = (3, 1) if self.cell == "gru" else (1, 2)
        macs = (
            self.layers * gates * (1 + directions) * self.hidden**2 + bins * 250 * self.channels**2 + bins * 900 * self.channels
        )
        return 3 + self.epochs * frames * (3 * macs / 2.8e10 + (1e-4 if self.cell == "gru" else 4e-5))

    def label(self) -> str:
        how = "dense" if self.pruning is None else f"{self.pruning.method} {self.pruning.sparsity:.0%}"
        return f"{self.cell} {self.hidden} {how} on {self.corpus}, seed {self.replicate}"

    def run(self, context: Context, *needed: Record) -> Outcome:
        import numpy as np
        import torch

        from repro.datasets.augment import draw_variants, spec_augment
        from repro.datasets.batches import batches
        from repro.datasets.features import load_features
        from repro.models.ctc import ctc_loss, evaluate
        from repro.models.speech import SpeechConfig, SpeechModel
        from repro.pruning import sparsity
        from repro.training import Diverged, fit

        options = {"size": self.corpus_size} if self.corpus_size else {}
        features = load_features(self.corpus, speeds=self.speeds, **options)
        train = features.splits["train"]
        shape = SpeechConfig(
            self.cell, self.hidden, self.layers, self.channels, features.bins, self.time_strides, dropout=self.dropout
        )
        torch.manual_seed(seed_for(self.study, self.replicate, "weights"))
        model = SpeechModel(shape)
        steps = math.ceil(len(train) / len(self.speeds) / self.batch)  # an epoch
        optimizer = torch.optim.AdamW(model.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        rate = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=steps * self.epochs, pct_start=0.15, cycle_momentum=False
        )
        pruner = self._pruner(model, steps, needed) if self.pruning else None
        trace = _Trace(pruner)
        batch_seed = seed_for(self.study, self.replicate, "batches")

        def epoch_batches(epoch):
            rng = np.random.default_rng([batch_seed, epoch])
            drawn = draw_variants(train, len(self.speeds), rng)
            return batches([spec_augment(u, rng) for u in drawn] if self.augment else drawn, self.batch, rng)

        def after_step():
            rate.step()
            if pruner is not None:
                pruner.step()
                trace.step()

        validation = list(batches(features.splits["validation"], EVALUATION_BATCH))

        def after_epoch(epoch):
            found = evaluate(model, validation)
            zeros = sparsity(model).by_role()
            return {f"validation_{k}": v for k, v in found.items()} | {f"sparsity_{r}": zeros[r] for r in (*ROLES, "total")}

        stateful = (rate,) if pruner is None else (rate, pruner, trace)
        torch.manual_seed(seed_for(self.study, self.replicate, "dropout"))
        try:
            history = fit(
                model,
                optimizer,
                epoch_batches,
                ctc_loss,
                epochs=self.epochs,
                after_step=after_step,
                after_epoch=after_epoch,
                clip_norm=self.clip_norm,
                stateful=stateful,
                checkpoint=context.checkpoint,
            )
        except Diverged as stop:
            return Outcome({"stopped": str(stop)}, _columns(stop.history), diverged=True)
        test_batches = list(batches(features.splits["test"], EVALUATION_BATCH))
        test = {f"test_{name}": value for name, value in evaluate(model, test_batches).items()}
        outcome = self._outcome(model, history, trace, test, steps)
        # Rounded in place, after everything else has been counted: section 5.2 expects float16 to cost nothing.
        half = evaluate(model.half().float(), test_batches)
        return Outcome(outcome.metrics | {"test_cer_float16": half["cer"]}, outcome.curves)

    def _pruner(self, model: SpeechModel, steps: int, needed: tuple[Record, ...]) -> GradualPruner:
        import numpy as np

        from repro.pruning import AutoRamp, Cubic, GradualPruner, HardPrune, PrintedSignPruner, Ramp, table1

        p = self.pruning
        times = table1(self.epochs, steps)
        if p.method in ("ramp", "printed sign"):
            grid = needed[0].curves["quantiles"]
            q = {role: float(np.interp(p.sparsity, grid["percentile"], grid[role])) for role in p.roles}
            schedule = {role: Ramp(q[role], **times, freq=p.freq, phi=p.phi) for role in p.roles}
        elif p.method == "auto":
            schedule = {role: AutoRamp(p.sparsity, **times, freq=p.freq, phi=p.phi) for role in p.roles}
        elif p.method == "cubic":
            schedule = {role: Cubic(p.sparsity, times["start"], times["end"], p.freq) for role in p.roles}
        else:
            schedule = HardPrune(p.sparsity, p.hard_epoch * steps)
        kind = PrintedSignPruner if p.method == "printed sign" else GradualPruner
        return kind(model, schedule, grouping=p.grouping, skip=(OUTPUT_LAYER,), regrowth=p.regrowth)

    def _outcome(self, model, history, trace, test, steps) -> Outcome:
        from repro.pruning import dense_quantiles, sparsity

        zeros = sparsity(model)
        last = history[-1]
        metrics = test | {
            "train_loss": last["train_loss"],
            "validation_loss": last["validation_loss"],
            "validation_cer": last["validation_cer"],
            "parameters": zeros.total[1],
            "nonzero": zeros.total[0],
            "epoch_seconds": sum(row["seconds"] for row in history) / len(history),
            "steps_per_epoch": steps,
        }
        metrics |= {f"sparsity_{role}": share for role, share in zeros.by_role().items()}
        curves = _columns(history)
        if self.pruning is None:
            found = [dense_quantiles(model, percentile, skip=(OUTPUT_LAYER,)) for percentile in PERCENTILES]
            curves["quantiles"] = {"percentile": list(PERCENTILES)} | {role: [q[role] for q in found] for role in ROLES}
        else:
            metrics["regrown"] = trace.regrown()
            metrics["prunable"] = sum(mask.numel() for mask in trace.pruner.masks.values())
            layers = [(name, count, nonzero) for name, (nonzero, count) in zeros.layers.items()]
            curves["layers"] = {
                "layer": [name for name, _, _ in layers],
                "weights": [count for _, count, _ in layers],
                "sparsity": [1 - nonzero / count for _, count, nonzero in layers],
            }
            curves["schedule"] = trace.columns
        return Outcome(metrics, curves)


def _columns(history: list[dict]) -> dict[str, dict[str, list]]:
    return {"epochs": {name: [row[name] for row in history] for name in history[0]}} if history else {}


class _Trace:
    """What the pruner did: a row per recurrent matrix and refresh (Figure 2b is drawn from them), and what came back."""

    def __init__(self, pruner: GradualPruner | None):
        self.pruner = pruner
        self.columns: dict[str, list] = {name: [] for name in ("iteration", "layer", "threshold", "weights", "pruned")}
        self._masks = dict(pruner.masks) if pruner else {}
        self._returned: dict = {}

    def step(self) -> None:
        """Call after the pruner's step; a refresh replaces the mask, which is how it is noticed."""
        for name, mask in self.pruner.masks.items():
            before = self._masks[name]
            if mask is before:
                continue
            self._masks[name] = mask
            back = mask & ~before
            self._returned[name] = self._returned[name] | back if name in self._returned else back
            if "weight_hh" in name:
                weights = mask.numel()
                row = (
                    self.pruner.iteration - 1,
                    name,
                    self.pruner.threshold_of(name),
                    weights,
                    weights - int(mask.count_nonzero()),
                )
                for column, value in zip(self.columns.values(), row, strict=True):
                    column.append(value)

    def regrown(self) -> int:
        """Weights that were masked at one refresh and not at a later one, each counted once."""
        return sum(int(back.count_nonzero()) for back in self._returned.values())

    def state_dict(self) -> dict:
        return {"columns": self.columns, "returned": self._returned}

    def load_state_dict(self, state: dict) -> None:
        """After the pruner's own state has been loaded."""
        self.columns, self._returned = state["columns"], state["returned"]
        self._masks = dict(self.pruner.masks)
