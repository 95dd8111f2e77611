"""What the trials of zhu2017 that write sentences share: train with thresholded gate gradients, then write the test set."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from repro.engine import Context, Outcome, seed_for
from repro.studies.ruled import RuledTrial, evaluations

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from repro.models.sentences import Recurrent

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
class SentenceTrial(RuledTrial):
    """One training run of a model that writes sentences; a subclass says which model, on what, by `task`.

    The loss is averaged over all words of the batch (NT). Adam at a constant rate. Weights start uniform in [-0.08, 0.08], as
    in Sutskever et al. 2014; their clipping is left out, as its bound belongs to another normalisation. Padding has no
    dnet.
    """

    words: ClassVar[int]  # LSTM steps a sentence, about

    embedding: int
    hidden: int
    layers: int
    dropout: float = 0.0

    @abstractmethod
    def task(self, recurrent: Recurrent) -> Task:
        """The model, its layers made by `recurrent`, and its corpus."""

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

        from repro.gradients import ThresholdedLSTM
        from repro.models.language import initialise_uniform
        from repro.models.sentences import mean_loss, summed_loss
        from repro.studies.probing import ZeroMeter
        from repro.training import Diverged

        rule = self.make_rule()
        torch.manual_seed(seed_for(self.study, self.replicate, "weights"))
        task = self.task(partial(ThresholdedLSTM, threshold=rule))
        initialise_uniform(task.model, INITIAL)
        passes = Passes(partial(task.batches, "train"), seed_for(self.study, self.replicate, "batches"))
        meter = ZeroMeter(task.model, self.measured_steps())

        def loss(model: nn.Module, step: int) -> tuple[Tensor, int]:
            meter.begin(step)
            return summed_loss(model, *passes.at(step))

        try:
            history = self.fit(
                task.model,
                torch.optim.Adam(task.model.parameters(), self.learning_rate),
                loss,
                lambda: mean_loss(task.model, task.batches("validation", None)),
                after_step=meter.end,
                stateful=(rule, meter),
                checkpoint=context.checkpoint,
            )
        except Diverged as stop:
            return Outcome(
                {"stopped": str(stop)}, {"evaluations": evaluations(stop.history), "zeros": meter.columns}, diverged=True
            )
        curves = {"evaluations": evaluations(history), "zeros": meter.columns}
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
