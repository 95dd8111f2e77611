"""The trial behind most of zhu2017: train a character model with thresholded gate gradients, and say what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

from repro.engine import Context, Outcome, Trial, seed_for
from repro.errors import ReproError, one_of
from repro.studies.ruled import RULES, RuledTrial, evaluations

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from repro.datasets.text import TextCorpus
    from repro.gradients import Rule

NORMALISATIONS = ("NT", "N")
CELLS = ("lstm", "gru")
PRECISIONS = ("float32", "bfloat16", "float16")

# At these shares of training the dense arms are looked at: early, the paper's 10 %, one step of Figure 3, the end.
SNAPSHOTS = (0.005, 0.1, 0.5, 1.0)
ONE_STEP = (0.0, *(10 ** (k / 2) for k in range(-20, -3)))  # thresholds of one step: half decades
PRINTED = 1e-6  # at which the rule as printed, without bars, is tried
QUANTILE = 0.8  # of |dnet|, where the causes are asked for; the share of zeros of one step under variants of the method

HALVING = 5  # passes over the text after which torch-rnn halves its learning rate
MACHINE = (8, 32, 16)  # lanes, width and scanned entries of the simulated accelerator


@dataclass(frozen=True, kw_only=True)
class CharacterTrial(RuledTrial):
    """One training run of the paper's character model: embedding, LSTM layers of the same width, linear decoder.

    The paper says "SGD" and no rate. This is the recipe of torch-rnn, which the paper's "word2vec layer" points to: Adam, rate
    halved every 5 passes, forget bias 1, state carried from window to window. Its clipping of elements at 5 would act under N
    alone and is left out. `normalisation`: "NT", the loss is averaged over batch and time as in torch-rnn, or "N", summed over
    time and averaged over the batch as in char-rnn. Adam is blind to the scale of the gradient (but for its epsilon), so that
    the two differ in what a threshold means and in little else.

    `rule` and `value` also: "top", wanted share of zeros; "columns", wanted share of whole columns; "rms", t over the root mean
    square of dnet; "rate", t over gradient norm / learning rate. `weights_only`: it acts in the gradients of the weights alone.
    `precision`: to which numbers dnet is rounded where it is formed. `snapshots`: shares of training at which a dense arm in
    float32 is looked at: at the update that comes next, or the one before if that is the first of a pass, with states of zero.
    """

    kind: ClassVar[str] = "characters"
    rules: ClassVar[tuple[str, ...]] = (*RULES, "rms", "rate", "top", "columns")

    hidden: int
    layers: int = 3
    cell: str = "lstm"
    length: int = 100
    normalisation: str = "NT"
    weights_only: bool = False
    precision: str = "float32"
    snapshots: tuple[float, ...] = SNAPSHOTS

    def __post_init__(self):
        super().__post_init__()
        one_of("normalisation", self.normalisation, NORMALISATIONS)
        one_of("cell", self.cell, CELLS)
        one_of("precision", self.precision, PRECISIONS)
        if self.weights_only and self.cell != "lstm":
            raise ReproError(f"weights_only with cell {self.cell!r}: only the LSTM can keep the rule to the weights' gradients")

    @property
    def dense(self) -> bool:
        return self.rule == "static" and self.value == 0 and self.precision == "float32"

    def identity(self) -> dict[str, Any]:
        """Where a training is looked at, this says how: others keep the keys of their records."""
        return super().identity() | ({"looked_at": "within a pass"} if self.dense and self.snapshots else {})

    def seconds(self) -> float:
        """Fitted by eye to runs on one core; only plans and progress bars depend on it."""
        cells = self.layers * self.length  # one after the other, in every step
        reads = self.rule in ("top", "rms", "columns") or self.precision != "float32" or self.weights_only
        each = 2.5e-4 if self.cell == "gru" else 1e-4 if self.hidden < 64 else 5e-5 if reads else 1e-5
        step = cells * (each + 24 * self.batch * self.hidden**2 / 5e10)
        measured = self.measurements * cells * (1e-4 + self.batch * self.hidden * 1.6e-7)
        evaluated = (self.evaluations + 1) * self.layers * self.hidden**2 * 6e-6
        return 0.3 + (self.steps + 60 * self.dense * len(self.snapshots)) * step + measured + evaluated

    def label(self) -> str:
        variant = " GRU" * (self.cell == "gru") + f" {self.precision}" * (self.precision != "float32")
        rule = f"{self.rule} {self.value:g}" + " in dW alone" * self.weights_only
        return (
            f"characters {self.layers}x{self.hidden}{variant} {rule} {self.normalisation} on {self.corpus}, "
            f"{self.batch} by {self.length}, rate {self.learning_rate:g}, seed {self.replicate}"
        )

    def run(self, context: Context) -> Outcome:
        from repro.datasets.text import contiguous_batches
        from repro.models.language import mean_loss
        from repro.training import Diverged

        corpus = characters(self.corpus, self.corpus_size)
        course = self.course()
        model = course.model
        held_out = {
            split: list(contiguous_batches(corpus.splits[split], self.batch, self.length)) for split in ("validation", "test")
        }
        try:
            history = self.fit(
                model,
                course.optimizer,
                course.loss,
                lambda: mean_loss(model, held_out["validation"]),
                after_step=course.after_step,
                stateful=course.stateful(),
                checkpoint=context.checkpoint,
            )
        except Diverged as stop:
            return Outcome({"stopped": str(stop)}, self._curves(stop.history, course), diverged=True)
        course.look(self.steps)
        test = mean_loss(model, held_out["test"])
        curves = self._curves(history, course)
        metrics = {
            "train_loss": curves["evaluations"]["train_loss"][-1],
            "validation_loss": history[-1]["validation_loss"],
            "test_loss": test,
            "test_bits": test / math.log(2),
            "symbols": len(corpus.vocabulary),
            "passes": self.steps / course.windows.each_pass,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        return Outcome(metrics, curves)

    def course(self) -> Course:
        """The training before its first step."""
        import torch

        from repro.models.language import LanguageModel

        corpus, rule = characters(self.corpus, self.corpus_size), self.make_rule()
        torch.manual_seed(seed_for(self.study, self.replicate, "weights"))
        model = LanguageModel(len(corpus.vocabulary), self.hidden, self.hidden, self.layers, recurrent=self._layer(rule))
        if self.cell == "lstm":
            forget_bias_1(model)
        optimizer = torch.optim.Adam(model.parameters(), self.learning_rate)
        windows = Windows(corpus.splits["train"], self.batch, self.length, seed_for(self.study, self.replicate, "windows"))
        return Course(self, model, optimizer, rule, windows)

    def updates(self, share: float) -> int:
        """How many updates a share of the training is."""
        return round(share * self.steps)

    def make_rule(self) -> Rule:
        from repro.gradients import ByRate, RelativeRMS, TopK
        from repro.gradients.structured import ColumnTopK

        kinds = {"rms": RelativeRMS, "rate": ByRate, "top": TopK, "columns": ColumnTopK}
        return kinds[self.rule](self.value) if self.rule in kinds else super().make_rule()

    def _layer(self, rule: Rule) -> Callable[[int, int], nn.Module]:
        """What makes a recurrent layer of so many inputs and units."""
        import torch

        from repro.gradients import Rounded, ThresholdedGRU, ThresholdedLSTM

        if self.precision != "float32":
            rule = Rounded(rule, getattr(torch, self.precision))
        if self.cell == "gru":
            return partial(ThresholdedGRU, threshold=rule)
        return partial(ThresholdedLSTM, threshold=rule, weights_only=self.weights_only)

    def items(self) -> int:
        """By how much the summed loss of a batch is divided."""
        return self.batch * (self.length if self.normalisation == "NT" else 1)

    def _curves(self, history: list[dict], course: Course) -> dict[str, dict[str, list]]:
        per_symbol = self.items() / (self.batch * self.length)
        return {"evaluations": evaluations(history, per_symbol)} | course.curves()


@dataclass(frozen=True, kw_only=True)
class FollowedTrial(Trial):
    """What is asked of one step within a `training`, which is followed for a share `after` of its updates."""

    study: ClassVar[str] = "zhu2017"

    training: CharacterTrial
    after: float

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.after < 1:
            raise ReproError(f"the training is followed for a share of {self.after}: it must lie in [0, 1)")

    @property
    def replicate(self) -> int:
        return self.training.replicate

    def followed(self) -> tuple[Course, int]:
        """The training, of which nothing was measured, and the step that comes next."""
        course, updates = replace(self.training, snapshots=(), measurements=0).course(), self.training.updates(self.after)
        for step in range(updates):
            course.optimizer.zero_grad()
            summed, items = course.loss(course.model, step)
            (summed / items).backward()
            course.optimizer.step()
            course.after_step()
        return course, updates


@lru_cache(maxsize=2)
def characters(name: str, size: str | None = None) -> TextCorpus:
    """A corpus by characters, kept for the next trial of this process: hundreds of short ones train on one text."""
    from repro.datasets.text import load_characters

    return load_characters(name, **({"size": size} if size else {}))


class Windows:
    """Contiguous windows (tokens, targets), each (`length`, `batch`), in passes over a text that start at drawn offsets.

    Raises ReproError for a text too short for one window.
    """

    def __init__(self, tokens: np.ndarray, batch: int, length: int, seed: int):
        self.tokens, self.batch, self.length, self.seed = tokens, batch, length, seed
        self.each_pass = ((len(tokens) - length) // batch - 1) // length
        if self.each_pass < 1:
            raise ReproError(f"{len(tokens)} symbols are too few for {batch} windows of {length}")
        self._pass, self._windows = -1, []

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """The window of a step, counted over all passes."""
        import numpy as np

        from repro.datasets.text import contiguous_batches

        number, place = divmod(step, self.each_pass)
        if number != self._pass:
            offset = np.random.default_rng([self.seed, number]).integers(self.length)
            found = contiguous_batches(self.tokens[offset:], self.batch, self.length)
            self._pass, self._windows = number, list(found)
        return self._windows[place]

    def starts_pass(self, step: int) -> bool:
        return step % self.each_pass == 0


class Course:
    """What happens around the steps of a training: state is carried, steps are measured, the rate falls, rules are told."""

    def __init__(self, trial: CharacterTrial, model: nn.Module, optimizer, rule: Rule, windows: Windows):
        import torch

        from repro.gradients.accelerator import Accelerator
        from repro.studies.probing import Meter

        self.trial, self.model, self.optimizer, self.rule, self.windows = trial, model, optimizer, rule, windows
        self.meter = Meter(model, trial.measured_steps(), Accelerator(*MACHINE))
        self.rate = torch.optim.lr_scheduler.StepLR(optimizer, HALVING * windows.each_pass, 0.5)
        self.snapshots = _Snapshots()
        self.carried = _Carried()

    def stateful(self) -> tuple:
        return self.rate, self.rule, self.meter, self.snapshots, self.carried

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, int]:
        self.look(step)
        self.meter.begin(step)
        summed, self.carried.state = self._summed_loss(step)
        return summed, self.trial.items()

    def after_step(self) -> None:
        self.meter.end()
        self.rate.step()
        if self.trial.rule == "rate":
            norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in self.model.parameters()))
            self.rule.update(self.rate.get_last_lr()[0], norm)

    def look(self, step: int) -> None:
        """At a snapshot of a dense arm: one step on the weights before this update, on the batch that comes next."""
        if not self.trial.dense:
            return
        for share in self.trial.snapshots:
            if step == self._within_pass(self.trial.updates(share)):
                self.snapshots.add(share, self.model, lambda: self.mean_loss(step))

    def _within_pass(self, step: int) -> int:
        """The step, or the one before if it is the first of a pass: states of zero are not what most steps begin with."""
        return step - 1 if step and self.windows.starts_pass(step) else step

    def curves(self) -> dict[str, dict[str, list]]:
        return {"zeros": self.meter.columns} | self.snapshots.curves

    def minibatch(self, step: int) -> tuple[Tensor, Tensor, list | None]:
        """(tokens, targets, states of the layers or None) of a step, the updates before which were made."""
        return *self.windows.at(step), None if self.windows.starts_pass(step) else self.carried.state

    def mean_loss(self, step: int) -> Tensor:
        """The normalised loss of a step, which is not taken."""
        return self._summed_loss(step)[0] / self.trial.items()

    def _summed_loss(self, step: int) -> tuple[Tensor, list]:
        from torch.nn.functional import cross_entropy

        from repro.models.language import detach

        tokens, targets, before = self.minibatch(step)
        logits, state = self.model(tokens, before)
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), detach(state)


class _Carried:
    """The state of the layers after the last window, in checkpoints too."""

    state: list | None = None

    def state_dict(self) -> dict:
        return {"state": self.state}

    def load_state_dict(self, state: dict) -> None:
        self.state = state["state"]


class _Snapshots:
    """Curves of the dense arms, a few rows for each snapshot; `training` is its share of training."""

    def __init__(self):
        self.curves: dict[str, dict[str, list]] = {}

    def add(self, training: float, model: nn.Module, loss) -> None:
        from repro.studies.probing import SingleStep, probe

        step = SingleStep(model, loss)
        self._extend("single", training, step.thresholds(ONE_STEP, PRINTED))
        self._extend("variants", training, step.variants(QUANTILE))
        found = probe(model, loss)
        self._extend(
            "activations",
            training,
            {
                "gate": list(found.gates),
                "zeros": found.exact_zeros.tolist(),
                "entries": [found.activations] * len(found.gates),
            },
        )
        bins = found.histograms.shape[1]
        self._extend(
            "histograms",
            training,
            {
                "gate": [gate for gate in found.gates for _ in range(bins)],
                "bin": list(range(bins)) * len(found.gates),
                "count": found.histograms.long().flatten().tolist(),
            },
        )
        below, lifted = found.lifted(QUANTILE)
        derivative, arriving = found.variance_shares()
        shares = {"t": found.quantile(QUANTILE), "below": below, "lifted": lifted}
        shares |= {"derivative_share": derivative, "arriving_share": arriving}
        shares |= {name: getattr(found, name) for name in ("cells", "full_cells", "dead_cells", "dead_full_cells")}
        self._extend("causes", training, {name: [share] for name, share in shares.items()})

    def _extend(self, name: str, training: float, columns: dict[str, list]) -> None:
        curve = self.curves.setdefault(name, {column: [] for column in ("training", *columns)})
        curve["training"] += [training] * len(next(iter(columns.values())))
        for column, values in columns.items():
            curve[column] += values

    def state_dict(self) -> dict:
        return self.curves

    def load_state_dict(self, state: dict) -> None:
        self.curves = state


def forget_bias_1(model: nn.Module) -> None:
    """As in both recipes; torch keeps two biases, the one of the state stays small."""
    import torch

    with torch.no_grad():
        for layer in model.layers:
            layer.bias_ih_l0[layer.hidden_size : 2 * layer.hidden_size] = 1.0
