"""What the trials of zhu2017 that write sentences share: train with thresholded gate gradients, then write the test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from repro.engine import Context, Outcome, Trial, seed_for
from repro.errors import ReproError, one_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from repro.models.sentences import Recurrent

RULES = ("static", "held")
INITIAL = 0.08  # bound of the uniform initialisation, Sutskever et al. 2014, section 3.4
LONGEST = 50  # words that are written for one sentence
EXAMPLES = 6  # sentences of the test set that a record shows


@dataclass(frozen=True)
class SentenceSizes:
    """Of the trials of one task; `corpus_size` is empty where the corpus has one size only."""

    corpus: str
    corpus_size: str
    embedding: int
    layers: int
    dropout: float
    batch: int
    learning_rate: float
    evaluations: int
    measurements: int


class Written(NamedTuple):
    """One sentence of the test set: what was `given`, as text, the words of its `references`, and those the model wrote."""

    given: str
    references: list[tuple[str, ...]]
    words: list[str]


@dataclass(frozen=True)
class Task:
    """`batches(split, rng)`: a pass over a split, in random order with `rng`; `written()`: the test set in greedy writing."""

    model: nn.Module
    batches: Callable[[str, np.random.Generator | None], Iterable[tuple[Tensor, ...]]]
    written: Callable[[], Iterator[Written]]


@dataclass(frozen=True, kw_only=True)
class SentenceTrial(Trial):
    """One training run of a model that writes sentences; a subclass says which model, on what, by `task`.

    The loss is averaged over all words of the batch (NT). Adam at a constant rate. Weights start uniform in [-0.08, 0.08], as
    in Sutskever et al. 2014; their clipping is left out, as its bound belongs to another normalisation. `rule` and `value`:
    "static" t, or "held", wanted share of zeros. `steps`: updates; of `measurements` of them, evenly spread, all zeros of dnet
    are counted; padding has no dnet. `replicate` seeds weights and batches alike for all arms (paired).
    """

    study: ClassVar[str] = "zhu2017"
    words: ClassVar[int]  # LSTM steps a sentence, about

    corpus: str
    corpus_size: str | None = None
    replicate: int = 0
    embedding: int
    hidden: int
    layers: int
    dropout: float = 0.0
    batch: int
    steps: int
    learning_rate: float
    rule: str = "static"
    value: float = 0.0
    evaluations: int = 10
    measurements: int = 20

    def __post_init__(self):
        super().__post_init__()
        one_of("rule", self.rule, RULES)
        if not 1 <= self.evaluations <= self.steps:
            raise ReproError(
                f"{self.evaluations} evaluations in {self.steps} steps: there must be at least 1, at most one a step"
            )

    def task(self, recurrent: Recurrent) -> Task:
        """The model, its layers made by `recurrent`, and its corpus."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it is trained on")

    def options(self) -> dict[str, str]:
        """Of the corpus."""
        return {"size": self.corpus_size} if self.corpus_size else {}

    def seconds(self) -> float:
        """Fitted by eye to runs on one core; only plans and progress bars depend on it."""
        macs = self.batch * self.words * self.layers * 24 * self.hidden**2
        return 2 + self.steps * (macs / 2.5e10 + 2e-3)

    def label(self) -> str:
        rule = f"{self.rule} {self.value:g}"
        return f"{self.kind} {self.layers}x{self.hidden} {rule} on {self.corpus}, seed {self.replicate}"

    def run(self, context: Context) -> Outcome:
        import torch

        from repro.gradients import HeldSparsity, Static, ThresholdedLSTM
        from repro.models.language import initialise_uniform
        from repro.models.sentences import mean_loss, summed_loss
        from repro.training import Diverged, fit

        rule = {"static": Static, "held": HeldSparsity}[self.rule](self.value)
        torch.manual_seed(seed_for(self.study, self.replicate, "weights"))
        task = self.task(partial(ThresholdedLSTM, threshold=rule))
        initialise_uniform(task.model, INITIAL)
        passes = Passes(partial(task.batches, "train"), seed_for(self.study, self.replicate, "batches"))
        meter = ZeroMeter(task.model, {int((i + 0.5) * self.steps / self.measurements) for i in range(self.measurements)})
        bounds = [round(self.steps * i / self.evaluations) for i in range(self.evaluations + 1)]

        def loss(model: nn.Module, step: int) -> tuple[Tensor, int]:
            meter.begin(step)
            return summed_loss(model, *passes.at(step))

        def evaluate(epoch: int) -> dict:
            return {"step": bounds[epoch], "validation_loss": mean_loss(task.model, task.batches("validation", None))}

        try:
            history = fit(
                task.model,
                torch.optim.Adam(task.model.parameters(), self.learning_rate),
                lambda epoch: range(bounds[epoch - 1], bounds[epoch]),
                loss,
                epochs=self.evaluations,
                after_step=meter.end,
                after_epoch=evaluate,
                stateful=(rule, meter),
                checkpoint=context.checkpoint,
            )
        except Diverged as stop:
            return Outcome({"stopped": str(stop)}, _evaluations(stop.history) | {"zeros": meter.columns}, diverged=True)
        curves = _evaluations(history) | {"zeros": meter.columns}
        if self.rule == "static" and self.value == 0:
            curves["histograms"] = histograms(task.model, passes.at(self.steps))
        metrics = {
            "train_loss": history[-1]["train_loss"],
            "validation_loss": history[-1]["validation_loss"],
            "test_loss": mean_loss(task.model, task.batches("test", None)),
            "passes": self.steps / passes.each,
            "parameters": sum(p.numel() for p in task.model.parameters()),
        }
        written = _score(list(task.written()))
        return Outcome(metrics | written.metrics, curves | written.curves)


class Passes:
    """The batches of a training, pass by pass: pass i comes from `batches(rng)` with a generator of (seed, i)."""

    def __init__(self, batches: Callable[[np.random.Generator], Iterable[tuple[Tensor, ...]]], seed: int):
        self._batches, self._seed = batches, seed
        self._load(0)
        self.each = len(self._now)

    def at(self, step: int) -> tuple[Tensor, ...]:
        """The batch of a step, counted over all passes."""
        number, place = divmod(step, self.each)
        if number != self._number:
            self._load(number)
        return self._now[place]

    def _load(self, number: int) -> None:
        import numpy as np

        self._number, self._now = number, list(self._batches(np.random.default_rng([self._seed, number])))


class ZeroMeter:
    """Counts the zeros of some steps: call `begin` before the forward pass of each step and `end` after its update.

    `columns`, a row for each measured step and layer (in the order of the model's modules): `entries` of dnet and how many are
    zero, by cause.
    """

    def __init__(self, model: nn.Module, steps: set[int]):
        from repro.gradients import CAUSES

        self.model, self.steps = model, steps
        self.columns: dict[str, list] = {name: [] for name in ("step", "layer", "entries", *CAUSES)}
        self._recording = ExitStack()
        self._step, self._records = None, {}

    def begin(self, step: int) -> None:
        from repro.gradients import record

        if step in self.steps:
            self._step, self._records = step, self._recording.enter_context(record(self.model))

    def end(self) -> None:
        import torch

        self._recording.close()
        for layer, found in enumerate(self._records.values()):
            zeros = torch.stack(found.zeros).sum((0, 1)).tolist()
            row = (self._step, layer, sum(found.totals) * len(found.gates), *zeros)
            for column, value in zip(self.columns.values(), row, strict=True):
                column.append(value)
        self._records = {}

    def state_dict(self) -> dict:
        return self.columns

    def load_state_dict(self, state: dict) -> None:
        self.columns = state


def histograms(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, list]:
    """Curve "histograms" at the end of training: gate activations of all layers on a batch, in evaluation mode."""
    from repro.gradients import record
    from repro.models.sentences import evaluating

    with record(model) as records, evaluating(model):
        model(*batch)
    layers = list(records.values())
    gates, counts = layers[0].gates, sum(layer.histograms for layer in layers).long()
    bins = counts.shape[1]
    return {
        "training": [1.0] * (bins * len(gates)),
        "gate": [gate for gate in gates for _ in range(bins)],
        "bin": list(range(bins)) * len(gates),
        "count": counts.flatten().tolist(),
    }


def _evaluations(history: list[dict]) -> dict[str, dict[str, list]]:
    names = ("step", "train_loss", "validation_loss", "seconds")
    return {"evaluations": {name: [row[name] for row in history] for name in names}}


def _score(written: list[Written]) -> Outcome:
    """BLEU of the test set, and some of its sentences, evenly spread."""
    from repro.models.sentences import bleu

    score = bleu([one.words for one in written], [one.references for one in written])
    shown = written[:: max(1, len(written) // EXAMPLES)][:EXAMPLES]
    examples = {
        "given": [one.given for one in shown],
        "reference": [" ".join(one.references[0]) for one in shown],
        "written": [" ".join(one.words) for one in shown],
    }
    return Outcome({"bleu": score}, {"examples": examples})
