"""Trials of zhu2017 on words: the language models of Zaremba et al. 2014 (arXiv 1409.2329) with thresholded gate gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from repro.engine import Context, Outcome, Trial, seed_for
from repro.errors import ReproError, one_of
from repro.studies.ruled import RULES, evenly, static_or_held

if TYPE_CHECKING:
    from torch import Tensor, nn

    from repro.studies.probing import Meter

# What the small and the medium set-up share: sequences of a minibatch, LSTM layers, first learning rate, largest gradient norm.
BATCH, LAYERS, RATE, CLIP = 20, 2, 1.0, 5.0


@dataclass(frozen=True)
class WordRecipe:
    """What differs between the set-ups of Zaremba et al. 2014, section 4.1.

    `hidden`: units of the embedding and of both layers; `length`: steps of backpropagation through time. The learning rate is 1
    for `constant_epochs` of the `epochs`, from then on divided by `decay` before each. Parameters start from U(-bound, bound);
    `dropout` acts on the connections that are not recurrent.
    """

    hidden: int
    length: int
    epochs: int
    constant_epochs: int
    decay: float
    bound: float
    dropout: float

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 1."""
        return RATE / self.decay ** max(0, epoch - self.constant_epochs)


SMALL = WordRecipe(hidden=200, length=20, epochs=13, constant_epochs=4, decay=2.0, bound=0.1, dropout=0.0)
MEDIUM = WordRecipe(hidden=650, length=35, epochs=39, constant_epochs=6, decay=1.2, bound=0.05, dropout=0.5)


@dataclass(frozen=True)
class WordSizes:
    """On which words, and how large, the two set-ups are in a profile."""

    corpus: str
    corpus_size: str
    small: WordRecipe
    medium: WordRecipe


@dataclass(frozen=True, kw_only=True)
class WordTrial(Trial):
    """One training run of a word model: embedding, two LSTM layers as wide, linear decoder.

    As in Zaremba's code: plain SGD; 20 streams of text whose state is carried from window to window and is zero when a pass
    begins; the loss is summed over the steps of a window and averaged over the batch (normalisation N), the gradient's norm
    clipped at 5; no forget bias; the test set is read as one stream. Validation reads 20 streams.

    `rule` and `value`: "static" t, or "held", wanted share of zeros. Of `measurements` updates, evenly spread, all zeros are
    counted. `replicate` seeds weights and dropout alike for all arms (paired); the order of the text is the same for all.
    """

    study: ClassVar[str] = "zhu2017"
    kind: ClassVar[str] = "words"

    corpus: str
    corpus_size: str | None = None
    replicate: int = 0
    recipe: WordRecipe
    rule: str = "static"
    value: float = 0.0
    measurements: int = 20

    def __post_init__(self):
        super().__post_init__()
        one_of("rule", self.rule, RULES)
        if self.recipe.epochs < 1:
            raise ReproError(f"{self.recipe.epochs} epochs of the word model: at least 1 is needed")

    def seconds(self) -> float:
        """Fitted by eye to runs on one core; only plans and progress bars depend on it."""
        words, symbols = (929_589, 10_000) if self.corpus == "ptb" else (90_000, 350)
        macs = 3 * (LAYERS * 8 * self.recipe.hidden**2 + self.recipe.hidden * symbols)
        return 2 + self.recipe.epochs * words * macs / 4e10

    def label(self) -> str:
        return f"words {LAYERS}x{self.recipe.hidden} {self.rule} {self.value:g} on {self.corpus}, seed {self.replicate}"

    def run(self, context: Context) -> Outcome:
        import torch

        from repro.datasets.text import contiguous_batches, load_words
        from repro.gradients import ThresholdedLSTM
        from repro.gradients.accelerator import Accelerator
        from repro.models.language import LanguageModel, initialise_uniform, mean_loss
        from repro.studies.gates import MACHINE
        from repro.studies.probing import Meter
        from repro.training import Diverged, fit

        recipe = self.recipe
        corpus = load_words(self.corpus, **({"size": self.corpus_size} if self.corpus_size else {}))
        rule = static_or_held(self.rule, self.value)
        torch.manual_seed(seed_for(self.study, self.replicate, "words"))
        model = LanguageModel(
            len(corpus.vocabulary),
            recipe.hidden,
            recipe.hidden,
            LAYERS,
            dropout=recipe.dropout,
            recurrent=lambda inputs, hidden: ThresholdedLSTM(inputs, hidden, threshold=rule),
        )
        initialise_uniform(model, recipe.bound)
        optimizer = torch.optim.SGD(model.parameters(), RATE)
        windows, validation = (
            list(contiguous_batches(corpus.splits[split], BATCH, recipe.length)) for split in ("train", "validation")
        )
        updates = recipe.epochs * len(windows)
        meter = Meter(model, evenly(updates, self.measurements), Accelerator(*MACHINE))
        course = _Course(recipe, optimizer, windows, meter)
        try:
            history = fit(
                model,
                optimizer,
                course.epoch,
                course.loss,
                epochs=recipe.epochs,
                after_step=meter.end,
                after_epoch=lambda epoch: {"validation_loss": mean_loss(model, validation)},
                clip_norm=CLIP,
                stateful=(rule, meter),
                checkpoint=context.checkpoint,
            )
        except Diverged as stop:
            return Outcome({"stopped": str(stop)}, course.curves(stop.history), diverged=True)
        curves = course.curves(history)
        test = mean_loss(model, contiguous_batches(corpus.splits["test"], 1, 100))
        metrics = {
            "train_loss": curves["evaluations"]["train_loss"][-1],
            "validation_loss": history[-1]["validation_loss"],
            "test_loss": test,
            "test_perplexity": math.exp(test) if test < 709 else math.inf,  # beyond it float64 ends
            "symbols": len(corpus.vocabulary),
            "updates": updates,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        return Outcome(metrics, curves)


class _Course:
    """What happens around the updates: the rate falls by epochs, the state is carried through a pass, updates are measured."""

    def __init__(self, recipe: WordRecipe, optimizer, windows: list[tuple[Tensor, Tensor]], meter: Meter):
        self.recipe, self.optimizer, self.windows, self.meter = recipe, optimizer, windows, meter
        self.state = None

    def epoch(self, epoch: int) -> range:
        """The updates of an epoch, counted over all; state and rate are those of its beginning."""
        self.state = None
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(epoch)
        return range((epoch - 1) * len(self.windows), epoch * len(self.windows))

    def loss(self, model: nn.Module, update: int) -> tuple[Tensor, int]:
        from repro.gradients.softmax import summed_loss
        from repro.models.language import detach

        self.meter.begin(update)
        tokens, targets = self.windows[update % len(self.windows)]
        x, state = model.decoder_input(tokens, self.state)
        self.state = detach(state)
        return summed_loss(x.flatten(0, 1), model.decoder, targets.flatten()), BATCH

    def curves(self, history: list[dict]) -> dict[str, dict[str, list]]:
        """Losses in nats a word, an epoch each, and the zeros."""
        per_word = len(self.windows) * BATCH / sum(targets.numel() for _, targets in self.windows)
        evaluations = {name: [row[name] for row in history] for name in ("epoch", "validation_loss", "seconds")}
        evaluations["train_loss"] = [row["train_loss"] * per_word for row in history]
        evaluations["rate"] = [self.recipe.rate(row["epoch"]) for row in history]
        return {"evaluations": evaluations, "zeros": self.meter.columns}
