"""The training loop: resuming bit for bit, dividing once, clipping, and stopping when it diverges."""

import math

import pytest
import torch
from torch import nn

from repro import training
from repro.datasets.batches import Batch
from repro.errors import ReproError
from repro.models.ctc import ctc_loss
from repro.models.speech import SpeechConfig, SpeechModel
from repro.pruning import AutoRamp, GradualPruner
from repro.training import Diverged, fit

EPOCHS = 5


class Session:
    """A small speech model with everything that has state: dropout, AdamW, a rate schedule, a pruner."""

    def __init__(self, seed=0, regrowth="update", dropout=1):
        torch.manual_seed(seed)
        self.model = SpeechModel(SpeechConfig("rnn", hidden=8, layers=2, channels=2, bins=41, dropout=0.3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1)
        self.rate = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.01, total_steps=3 * EPOCHS, cycle_momentum=False)
        self.pruner = GradualPruner(self.model, AutoRamp(0.6, 2, 5, 11, freq=2), skip=("ctc",), regrowth=regrowth)
        torch.manual_seed(dropout)

    def batches(self, epoch):
        generator = torch.Generator().manual_seed(epoch)
        for size in (3, 2, 3):
            lengths = torch.randint(25, 40, (size,), generator=generator).sort(descending=True).values
            features = torch.randn(size, int(lengths[0]), 41, generator=generator)
            features *= (torch.arange(int(lengths[0])) < lengths[:, None])[:, :, None]
            targets = torch.randint(1, 29, (4 * size,), generator=generator)
            yield Batch(features, lengths, targets, torch.full((size,), 4), ["----"] * size)

    def after_step(self):
        self.rate.step()
        self.pruner.step()

    def run(self, checkpoint=None, after_epoch=lambda epoch: {}):
        return fit(
            self.model,
            self.optimizer,
            self.batches,
            ctc_loss,
            epochs=EPOCHS,
            after_step=self.after_step,
            after_epoch=after_epoch,
            clip_norm=5.0,
            stateful=(self.rate, self.pruner),
            checkpoint=checkpoint,
        )


def left_behind(session, history):
    """Everything a run leaves, as bytes and numbers; wall-clock seconds aside."""
    weights = {name: tensor.numpy().tobytes() for name, tensor in session.model.state_dict().items()}
    moments = [
        (i, name, value.numpy().tobytes())
        for i, state in session.optimizer.state_dict()["state"].items()
        for name, value in state.items()
    ]
    masks = {name: mask.numpy().tobytes() for name, mask in session.pruner.masks.items()}
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in history]
    rest = (session.rate.get_last_lr(), session.pruner.thresholds, session.pruner.iteration)
    return weights, moments, masks, rows, rest, torch.get_rng_state().numpy().tobytes()


def run(checkpoint=None, after_epoch=lambda epoch: {}, **options):
    session = Session(**options)
    return left_behind(session, session.run(checkpoint, after_epoch))


def observed(epoch):
    """Draws from torch's generator, as an evaluation might."""
    return {"drawn": torch.rand(()).item()}


class Killed(Exception):
    pass


@pytest.mark.parametrize("regrowth", ["update", "listing", "copy"])
@pytest.mark.parametrize("killed_in", [2, 4])
def test_resuming_is_bit_identical(tmp_path, monkeypatch, killed_in, regrowth):
    """Killed in an evaluation, resumed with fresh objects: weights, moments, masks, history and RNG as if it had never been."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    expected = run(after_epoch=observed, regrowth=regrowth)

    def kill(epoch):
        if epoch == killed_in:
            raise Killed
        return observed(epoch)

    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Killed):
        Session(regrowth=regrowth).run(checkpoint, kill)
    epochs = []  # resumed from other weights and another place in the random numbers
    resumed = run(checkpoint, lambda epoch: epochs.append(epoch) or observed(epoch), seed=77, dropout=78, regrowth=regrowth)
    assert epochs == list(range(killed_in, EPOCHS + 1))
    for ours, theirs in zip(resumed, expected, strict=True):
        assert ours == theirs


def test_two_runs_leave_the_same_bytes_and_seeds_matter():
    """Same seeds, same bytes; another dropout seed alone gives other weights."""
    first = run()
    assert run() == first
    assert run(dropout=99)[0] != first[0]


def test_writing_checkpoints_changes_nothing(tmp_path, monkeypatch):
    """A run that saves after each epoch equals one that never saves; a finished checkpoint is not trained further."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    expected, epochs = run(), []
    assert run(tmp_path / "run.pt") == expected
    assert run(tmp_path / "run.pt", lambda epoch: epochs.append(epoch) or {}, seed=3) == expected
    assert not epochs


def test_checkpoints_are_rare(tmp_path):
    """Epochs shorter than CHECKPOINT_SECONDS write none: short runs are not slowed."""
    Session().run(tmp_path / "run.pt")
    assert not (tmp_path / "run.pt").exists()


@pytest.mark.parametrize("damage", ["truncated", "no checkpoint", "of another model"])
def test_damaged_checkpoints_are_named(tmp_path, monkeypatch, damage):
    """One sentence with the path and what to do, never a silent fresh start."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    checkpoint = tmp_path / "run.pt"
    Session().run(checkpoint)
    session = Session()
    if damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    elif damage == "no checkpoint":
        checkpoint.write_text("epoch 3")
    else:
        session.model.ctc = nn.Linear(8, 3)
    with pytest.raises(ReproError, match=rf"(?s)checkpoint .*{checkpoint.name} cannot be read .*: delete it"):
        session.run(checkpoint)


# What is optimised and reported, on one weight: loss is the sum of w x over a batch


def scalar(batches, **options):
    """SGD with rate 1 from w = 0; its gradient is the mean of x over each batch."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []

    def loss(model, batch):
        x = torch.tensor(batch).unsqueeze(1)
        return model(x).sum(), len(batch)

    history = fit(
        model,
        optimizer,
        lambda epoch: batches,
        loss,
        **({"epochs": 1, "after_step": lambda: seen.append(model.weight.item())} | options),
    )
    return history, seen


def test_the_mean_is_divided_once():
    """Steps descend each batch's mean; the row divides the summed loss of unequal batches by all items."""
    history, weights = scalar([[1.0, 1.0, 1.0, 5.0], [3.0]])
    assert weights == [-2.0, -5.0]
    assert history[0]["train_loss"] == (0.0 + -2.0 * 3.0) / 5  # the mean of batch means would be -3
    assert history[0]["epoch"] == 1 and history[0]["seconds"] >= 0


def test_epochs_hooks_and_rows():
    """`after_epoch` sees epochs 1, 2, 3 and adds to the rows; the model is in training mode whenever it trains."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    modes, numbers = [], []

    def loss(model, batch):
        modes.append(model.training)
        return model(torch.ones(2, 1)).sum(), 2

    def after_epoch(epoch):
        model.eval()
        return {"square": epoch**2}

    def batches(epoch):
        numbers.append(epoch)
        return [0]

    history = fit(model, torch.optim.SGD(model.parameters(), 0.1), batches, loss, epochs=3, after_epoch=after_epoch)
    assert [(row["epoch"], row["square"]) for row in history] == [(1, 1), (2, 4), (3, 9)]
    assert numbers == [1, 2, 3]
    assert modes == [True] * 3


def test_gradient_clipping():
    """A gradient of norm 100 moves by clip_norm, a smaller one as it is, and by default nothing is clipped."""
    _, weights = scalar([[100.0]], clip_norm=0.5)
    assert weights == [pytest.approx(-0.5, rel=1e-5)]
    assert scalar([[0.25]], clip_norm=0.5)[1] == [-0.25]
    assert scalar([[100.0]])[1] == [-100.0]


@pytest.mark.parametrize("bad, told", [(math.nan, "loss is nan in epoch 3"), (math.inf, "loss is -?inf in epoch 3")])
def test_divergence_carries_the_history(bad, told):
    """NaN or infinite loss stops at once, keeps the finished epochs, and steps no further."""
    model = nn.Linear(1, 1, bias=False)
    before = []

    def loss(model, batch):
        before.append(model.weight.item())
        return model(torch.ones(1, 1)).sum() * batch, 1

    with pytest.raises(Diverged, match=told) as stop:
        fit(model, torch.optim.SGD(model.parameters(), 0.1), lambda epoch: [1.0, bad if epoch == 3 else 1.0], loss, epochs=9)
    assert [row["epoch"] for row in stop.value.history] == [1, 2]
    assert all(math.isfinite(row["train_loss"]) for row in stop.value.history)
    assert len(before) == 6
    assert model.weight.item() == before[-1]
    assert isinstance(stop.value, ReproError)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_breaks_with_the_last_update_is_seen_by_its_evaluation(bad):
    model, losses = nn.Linear(1, 1), iter([1.0, bad])
    with pytest.raises(Diverged, match=f"validation_loss is {bad} after epoch 2") as stop:
        fit(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            lambda epoch: [0],
            lambda model, batch: (model(torch.ones(1, 1)).sum(), 1),
            epochs=2,
            after_epoch=lambda epoch: {"validation_loss": next(losses)},
        )
    assert [row["validation_loss"] for row in stop.value.history] == [1.0]


def test_infinite_gradients_diverge_too():
    """A finite loss with an infinite gradient (a square root at zero) must not put NaN into the weights."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    with pytest.raises(Diverged, match="gradient norm is inf in epoch 1") as stop:
        fit(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            lambda epoch: [0],
            lambda model, batch: (model(torch.ones(1, 1)).sqrt().sum(), 1),
            epochs=2,
        )
    assert stop.value.history == []
    assert model.weight.item() == 0.0
