"""The one training loop of the study: a hook after each optimizer step, checkpoints that resume bit-identically."""

import io
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from repro.errors import ReproError
from repro.files import write_atomically

CHECKPOINT_SECONDS = 5.0  # at most one checkpoint in this time: it bounds what a kill loses without slowing short runs


class Stateful(Protocol):
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> Any: ...


class Diverged(ReproError):
    """The loss became NaN or infinite; `history` holds the epochs before. A result of the study, not a failure of it."""

    def __init__(self, message: str, history: list[dict]):
        super().__init__(message)
        self.history = history


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Iterable],
    loss: Callable[[nn.Module, Any], tuple[Tensor, int]],
    *,
    epochs: int,
    after_step: Callable[[], None] = lambda: None,
    after_epoch: Callable[[int], dict] = lambda epoch: {},
    clip_norm: float = math.inf,
    stateful: tuple[Stateful, ...] = (),
    checkpoint: Path | None = None,
) -> list[dict]:
    """Train for `epochs`; returns one row an epoch: epoch (1..), train_loss, seconds, and what `after_epoch` adds.

    `batches(epoch)`: the batches of an epoch; must depend on the epoch number alone (seed a generator with it), so that a
    resumed run sees the same ones. `loss(model, batch)`: the *summed* loss of a batch and how many items it sums; the step
    descends its mean, the row reports sum over items divided once. `after_step()`: called after each optimizer step (learning
    rate, pruner). `after_epoch(epoch)`: evaluation; the model is put in training mode again afterwards.

    `stateful`: whatever else changes over training (scheduler, pruner). With `checkpoint`, state and torch's RNG are
    written there after an epoch and read back at the start: the resumed run equals the uninterrupted one bit for bit.

    Raises Diverged when a loss, or what `after_epoch` adds, is not finite; ReproError for a checkpoint that cannot be read.
    """
    parts = {"model": model, "optimizer": optimizer} | {f"stateful{i}": part for i, part in enumerate(stateful)}
    history = _resume(checkpoint, parts)
    last_saved = time.monotonic()
    for epoch in range(len(history) + 1, epochs + 1):
        started = time.monotonic()
        model.train()
        total, items = 0.0, 0
        for batch in batches(epoch):
            batch_sum, batch_items = loss(model, batch)
            value = batch_sum.item()
            if not math.isfinite(value):
                raise Diverged(f"loss is {value} in epoch {epoch}: training diverged", history)
            optimizer.zero_grad(set_to_none=True)
            (batch_sum / batch_items).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            if not torch.isfinite(norm):
                raise Diverged(f"gradient norm is {norm.item()} in epoch {epoch}: training diverged", history)
            optimizer.step()
            after_step()
            total, items = total + value, items + batch_items
        row = {"epoch": epoch, "train_loss": total / items, "seconds": time.monotonic() - started}
        row |= after_epoch(epoch)
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise Diverged(f"{name} is {value} after epoch {epoch}: training diverged", history)
        history.append(row)
        if checkpoint is not None and (time.monotonic() - last_saved > CHECKPOINT_SECONDS):
            _save(checkpoint, parts, history)
            last_saved = time.monotonic()
    return history


def _save(path: Path, parts: dict[str, Stateful], history: list[dict]) -> None:
    buffer = io.BytesIO()
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"parts": state, "history": history, "rng": torch.get_rng_state()}, buffer)
    write_atomically(path, buffer.getvalue())


def _resume(path: Path | None, parts: dict[str, Stateful]) -> list[dict]:
    if path is None or not Path(path).exists():
        return []
    try:
        saved = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved["parts"][name])
    except Exception as error:
        what = str(error).partition("\n")[0]
        raise ReproError(f"checkpoint {path} cannot be read ({what}): delete it to train from the start") from error
    torch.set_rng_state(saved["rng"])
    return saved["history"]
