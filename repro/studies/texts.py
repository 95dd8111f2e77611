"""Trials of zhu2017 on the characters of a text with other models than the paper's: a Transformer, a model of several tasks."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from repro.engine import Context, Outcome, seed_for
from repro.studies.ruled import RuledTrial, evaluations

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from repro.datasets.text import TextCorpus
    from repro.gradients import Rule
    from repro.gradients.counting import Counted

    Answers = dict[str, Tensor]  # of each task: logits (T, B, classes), or classes (T, B)

HALVING = 5  # passes over the text after which the learning rate is halved, as in the recipe of the character model


@dataclass(frozen=True, kw_only=True)
class TextTrial(RuledTrial):
    """One training run on windows of a text, with the recipe of `CharacterTrial`: Adam, its rate halved every 5 passes.

    The loss is averaged over batch and time (NT) and summed over the tasks.
    """

    tasks: ClassVar[tuple[str, ...]]  # of `repro.datasets.tasks`

    hidden: int
    layers: int = 3
    length: int = 100

    def label(self) -> str:
        return f"{self.kind} {self.layers}x{self.hidden} {self.rule} {self.value:g} on {self.corpus}, seed {self.replicate}"

    @abstractmethod
    def model(self, corpus: TextCorpus, rule: Rule) -> nn.Module:
        """A new model whose gradients the rule acts on."""

    @staticmethod
    @abstractmethod
    def predict(model: nn.Module, tokens: Tensor, state) -> tuple[Answers, object]:
        """tokens (T, B) and the state after the window before -> logits of the tasks, state."""

    @staticmethod
    def look(model: nn.Module, tokens: Tensor) -> dict[str, float]:
        """Further metrics of the trained model, on a window (T, B) of the text."""
        return {}

    def run(self, context: Context) -> Outcome:
        import torch

        from repro.gradients.counting import Counted
        from repro.studies.gates import characters
        from repro.training import Diverged

        corpus = characters(self.corpus, self.corpus_size)
        rule = Counted(self.make_rule())
        torch.manual_seed(seed_for(self.study, self.replicate, "weights"))
        model = self.model(corpus, rule)
        optimizer = torch.optim.Adam(model.parameters(), self.learning_rate)
        course = _Course(self, corpus, optimizer, rule)
        try:
            history = self.fit(
                model,
                optimizer,
                course.loss,
                lambda: sum(course.mean_losses(model, "validation").values()),
                after_step=course.after_step,
                stateful=(course, course.rate, rule),
                checkpoint=context.checkpoint,
            )
        except Diverged as stop:
            return Outcome({"stopped": str(stop)}, course.curves(stop.history), diverged=True)
        test = course.mean_losses(model, "test")
        metrics = {
            "train_loss": history[-1]["train_loss"],
            "validation_loss": history[-1]["validation_loss"],
            "test_loss": sum(test.values()),
            **{f"test_loss_{task}": loss for task, loss in test.items()},
            **self.look(model, torch.from_numpy(corpus.splits["train"])[course.windows.at(0)[0]]),
            "symbols": len(corpus.vocabulary),
            "passes": self.steps / course.windows.each_pass,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        return Outcome(metrics, course.curves(history))


@dataclass(frozen=True, kw_only=True)
class TransformerTrial(TextTrial):
    """A causal Transformer; it reads every window by itself, without what came before.

    The rule acts on the gradients of the outputs of the four linear layers of each block; with `inner`, of the two alone whose
    outputs are not added to the stream that all blocks share. Embedding and decoder are left dense, as in the paper's model.
    A share is held by three times the usual feedback, as a linear layer makes one step an update.
    """

    kind: ClassVar[str] = "transformer"
    code_version: ClassVar[int] = 2  # a stronger feedback, as a linear layer makes one step an update
    tasks: ClassVar[tuple[str, ...]] = ("character",)

    heads: int = 4
    inner: bool = False

    def make_rule(self) -> Rule:
        from repro.gradients import HeldSparsity

        return HeldSparsity(self.value, gain=3.0) if self.rule == "held" else super().make_rule()

    def seconds(self) -> float:
        """Fitted by eye to runs on one core; only plans and progress bars depend on it."""
        macs = self.batch * self.length * self.layers * 36 * self.hidden**2
        return 2 + self.steps * macs / 3e10

    def model(self, corpus: TextCorpus, rule: Rule) -> nn.Module:
        from repro.gradients import threshold_linears
        from repro.models.transformer import Transformer

        model = Transformer(len(corpus.vocabulary), self.hidden, self.layers, self.heads, self.length)
        for block in model.blocks:
            for part in [getattr(block, name) for name in block.INNER] if self.inner else [block]:
                threshold_linears(part, rule)
        return model

    @staticmethod
    def predict(model: nn.Module, tokens: Tensor, state) -> tuple[Answers, object]:
        return {"character": model(tokens)}, None

    @staticmethod
    def look(model: nn.Module, tokens: Tensor) -> dict[str, float]:
        """The mean norm of a position's vector where the blocks end."""
        return {"stream_norm": model.stream(tokens).norm(dim=2).mean().item()}


@dataclass(frozen=True, kw_only=True)
class MultitaskTrial(TextTrial):
    """Shared LSTM layers and a head for each task: the next character, its kind, and how many letters its word has left.

    The forget gate's bias is 1 at first, as the character model's.
    """

    kind: ClassVar[str] = "multitask"
    code_version: ClassVar[int] = 2  # with the forget bias
    tasks: ClassVar[tuple[str, ...]] = ("character", "kind", "ahead")

    def seconds(self) -> float:
        """Fitted by eye to runs on one core; only plans and progress bars depend on it."""
        macs = self.batch * self.length * self.layers * 24 * self.hidden**2
        return 2 + self.steps * macs / 3e10

    def model(self, corpus: TextCorpus, rule: Rule) -> nn.Module:
        from repro.datasets.tasks import character_tasks
        from repro.gradients import ThresholdedLSTM
        from repro.models.multitask import MultitaskModel
        from repro.studies.gates import forget_bias_1

        def layer(inputs: int, hidden: int) -> nn.Module:
            return ThresholdedLSTM(inputs, hidden, threshold=rule)

        model = MultitaskModel(len(corpus.vocabulary), self.hidden, self.layers, character_tasks(corpus), layer)
        forget_bias_1(model)
        return model

    @staticmethod
    def predict(model: nn.Module, tokens: Tensor, state) -> tuple[Answers, object]:
        return model(tokens, state)


class _Course:
    """What happens around the updates: state is carried through a pass, zeros are counted, the rate falls; and evaluation."""

    def __init__(self, trial: TextTrial, corpus: TextCorpus, optimizer: torch.optim.Optimizer, rule: Counted):
        import numpy as np
        import torch

        from repro.datasets.tasks import character_answers
        from repro.studies.gates import Windows

        self.trial, self.rule = trial, rule
        self.answers = {
            split: {task: torch.from_numpy(classes) for task, classes in character_answers(corpus, split).items()}
            for split in corpus.splits
        }
        places = np.arange(len(corpus.splits["train"]))
        self.windows = Windows(places, trial.batch, trial.length, seed_for(trial.study, trial.replicate, "windows"))
        self.rate = torch.optim.lr_scheduler.StepLR(optimizer, HALVING * self.windows.each_pass, 0.5)
        self.measured = trial.measured_steps()
        self.zeros: dict[str, list] = {"step": [], "entries": [], "zeros": []}
        self.state = None

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, int]:
        self.step = step
        self.rule.counting = step in self.measured
        if self.windows.starts_pass(step):
            self.state = None
        losses, self.state = self._summed_losses(model, "train", *self.windows.at(step), self.state)
        return sum(losses.values()), self.trial.batch * self.trial.length

    def after_step(self) -> None:
        if self.rule.counting:
            for column, value in zip(self.zeros.values(), (self.step, *self.rule.take()), strict=True):
                column.append(value)
        self.rate.step()

    def mean_losses(self, model: nn.Module, split: str) -> dict[str, float]:
        """Nats a symbol of each task over a whole split, divided once."""
        import numpy as np
        import torch

        from repro.datasets.text import contiguous_batches

        places = np.arange(len(self.answers[split]["character"]))
        totals, count, state = dict.fromkeys(self.trial.tasks, 0.0), 0, None
        model.eval()
        with torch.no_grad():
            for before, after in contiguous_batches(places, self.trial.batch, self.trial.length):
                losses, state = self._summed_losses(model, split, before, after, state)
                totals = {task: total + losses[task].item() for task, total in totals.items()}
                count += after.numel()
        return {task: total / count for task, total in totals.items()}

    def _summed_losses(self, model: nn.Module, split: str, before: Tensor, after: Tensor, state) -> tuple[Answers, object]:
        """Of each task, over a window given by the places (T, B) of its symbols and of those to be predicted; and the state."""
        from torch.nn.functional import cross_entropy

        from repro.models.language import detach

        answers = self.answers[split]
        logits, state = self.trial.predict(model, answers["character"][before], state)
        losses = {
            task: cross_entropy(logits[task].flatten(0, 1), answers[task][after].flatten(), reduction="sum")
            for task in self.trial.tasks
        }
        return losses, None if state is None else detach(state)

    def curves(self, history: list[dict]) -> dict[str, dict[str, list]]:
        return {"evaluations": evaluations(history), "zeros": self.zeros}

    def state_dict(self) -> dict:
        return {"state": self.state, "zeros": self.zeros}

    def load_state_dict(self, state: dict) -> None:
        self.state, self.zeros = state["state"], state["zeros"]
