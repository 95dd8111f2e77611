"""What most trials of zhu2017 share: a training of so many updates under a rule for the gate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from repro.engine import Trial
from repro.errors import ReproError, one_of

if TYPE_CHECKING:
    from torch import nn

    from repro.gradients import Rule

RULES = ("static", "held")


@dataclass(frozen=True, kw_only=True)
class RuledTrial(Trial):
    """One training run of `steps` updates on a corpus, in minibatches of `batch`.

    `rule` and `value`: "static" t, or "held", wanted share of zeros, and what a subclass adds. Of `measurements` updates,
    evenly spread, all zeros of dnet are counted; the validation loss is taken `evaluations` times. `replicate` seeds weights
    and batches alike for all arms (paired).
    """

    study: ClassVar[str] = "zhu2017"
    rules: ClassVar[tuple[str, ...]] = RULES

    corpus: str
    corpus_size: str | None = None
    replicate: int = 0
    batch: int
    steps: int
    learning_rate: float
    rule: str = "static"
    value: float = 0.0
    evaluations: int = 20
    measurements: int = 20

    def __post_init__(self):
        super().__post_init__()
        one_of("rule", self.rule, self.rules)
        if self.batch < 1:
            raise ReproError(f"batch of a training is {self.batch}: it must be at least 1")
        if self.learning_rate <= 0:
            raise ReproError(f"learning rate of a training is {self.learning_rate}: it must be above 0")
        if not 1 <= self.evaluations <= self.steps:
            raise ReproError(
                f"{self.evaluations} evaluations in {self.steps} steps: there must be at least 1, at most one a step"
            )

    def make_rule(self) -> Rule:
        return static_or_held(self.rule, self.value)

    def measured_steps(self) -> set[int]:
        return evenly(self.steps, self.measurements)

    def fit(self, model: nn.Module, optimizer, loss: Callable, validation_loss: Callable[[], float], **options) -> list[dict]:
        """`repro.training.fit`, an evaluation an epoch; its rows say after which `step`, and the `validation_loss`."""
        from repro.training import fit

        bounds = [round(self.steps * i / self.evaluations) for i in range(self.evaluations + 1)]
        return fit(
            model,
            optimizer,
            lambda epoch: range(bounds[epoch - 1], bounds[epoch]),
            loss,
            epochs=self.evaluations,
            after_epoch=lambda epoch: {"step": bounds[epoch], "validation_loss": validation_loss()},
            **options,
        )


def static_or_held(rule: str, value: float) -> Rule:
    from repro.gradients import HeldSparsity, Static

    return {"static": Static, "held": HeldSparsity}[rule](value)


def evenly(updates: int, count: int) -> set[int]:
    """`count` of the updates, evenly spread."""
    return {int((i + 0.5) * updates / count) for i in range(count)}


def evaluations(history: list[dict], per_item: float = 1.0) -> dict[str, list[Any]]:
    """Curve "evaluations" of what `RuledTrial.fit` returned; the training loss times `per_item`."""
    rows = [row | {"train_loss": row["train_loss"] * per_item} for row in history]
    return {name: [row[name] for row in rows] for name in ("step", "train_loss", "validation_loss", "seconds")}
