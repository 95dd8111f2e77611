"""The word models of Zaremba et al.: the recipe in closed form, the fused output layer against torch, runs that resume."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repro.engine import Context, Record
from repro.errors import ReproError
from repro.gradients.softmax import summed_loss
from repro.models.language import LanguageModel
from repro.studies import words as trials
from repro.studies.base import Results
from repro.studies.words import MEDIUM, SMALL, WordRecipe, WordTrial
from repro.studies.zhu2017 import words
from repro.studies.zhu2017.profiles import PROFILES

RECIPE = WordRecipe(hidden=8, length=10, epochs=3, constant_epochs=1, decay=2.0, bound=0.1, dropout=0.25)
TINY = WordTrial(corpus="made", corpus_size="smoke", recipe=RECIPE, measurements=5)

# None of these keys should change: committed records are found by them.
GOLDEN = {
    "small, t = 0": "9603ea9877a453ce",
    "small, t = 1e-6": "e959f139c83cc2ad",
    "small, 80% held": "0aed41dd31611af7",
    "medium, t = 0": "77fbd0ac3c28826f",
    "medium, 80% held": "db4d0506a1dbfa06",
}


def run(tmp_path, **changes):
    return dataclasses.replace(TINY, **changes).run(Context(tmp_path / "checkpoint", 1))


# ------------------------------------------------------------------------------------------------------- output layer


def both(n: int, hidden: int, symbols: int, seed: int, dtype=torch.float64, scale: float = 1.0):
    """(loss, gradients of x, weight and bias) by torch's two functions, and by ours."""
    generator = torch.Generator().manual_seed(seed)
    decoder = nn.Linear(hidden, symbols, dtype=dtype)
    with torch.no_grad():
        decoder.weight.normal_(generator=generator)
        decoder.bias.normal_(generator=generator)
    x = (scale * torch.randn(n, hidden, generator=generator, dtype=dtype)).requires_grad_()
    targets = torch.randint(symbols, (n,), generator=generator)
    ways = (lambda: nn.functional.cross_entropy(decoder(x), targets, reduction="sum"), lambda: summed_loss(x, decoder, targets))
    found = []
    for way in ways:
        loss = way()
        found.append((loss.detach(), *torch.autograd.grad(loss / n, (x, decoder.weight, decoder.bias))))
    return found


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), hidden=st.integers(1, 9), symbols=st.integers(1, 30), seed=st.integers(0, 2**16))
def test_the_output_layer_is_torchs(n, hidden, symbols, seed):
    """Loss and all three gradients, whatever the shape."""
    for reference, ours in zip(*both(n, hidden, symbols, seed), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_the_output_layer_with_compiled_products():
    """Wide enough for them, in float32: to rounding of sums over 70 numbers and 300 symbols."""
    for reference, ours in zip(*both(33, 70, 300, 0, torch.float32), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))


def test_a_target_without_a_chance_has_a_finite_loss():
    """Its probability underflows in float32, its logarithm is told all the same."""
    reference, ours = both(4, 8, 20, 0, torch.float32, scale=100.0)
    assert reference[0] > 200
    torch.testing.assert_close(ours[0], reference[0])


# ------------------------------------------------------------------------------------------------------------- recipe


def test_the_rate_of_both_set_ups_in_closed_form():
    """Small: 1 for 4 epochs, then halved before each. Medium: 1 for 6, then divided by 1.2 (Zaremba et al., section 4.1)."""
    assert [SMALL.rate(epoch) for epoch in (1, 4, 5, 6, 13)] == [1, 1, 1 / 2, 1 / 4, 2**-9]
    assert [MEDIUM.rate(epoch) for epoch in (1, 6, 7, 39)] == pytest.approx([1, 1, 1 / 1.2, 1.2**-33])


def test_the_paper_profile_is_zarembas():
    """2 layers of 200 for 13 epochs of windows of 20 steps, 2 of 650 for 39 of 35, both on Penn Treebank, 5 seeds an arm."""
    arms = words.word_arms(PROFILES["paper"])
    small, medium = (arms[f"{setup}, t = 0"][0] for setup in ("small", "medium"))
    assert (small.recipe.hidden, small.recipe.length, small.recipe.epochs, small.recipe.bound) == (200, 20, 13, 0.1)
    assert (medium.recipe.hidden, medium.recipe.length, medium.recipe.epochs, medium.recipe.bound) == (650, 35, 39, 0.05)
    assert (small.recipe.dropout, medium.recipe.dropout) == (0, 0.5)
    assert {trial.corpus for trials in arms.values() for trial in trials} == {"ptb"}
    assert all([trial.replicate for trial in trials] == list(range(5)) for trials in arms.values())


@pytest.mark.parametrize("arm", GOLDEN)
def test_keys_are_golden(arm):
    assert words.word_arms(PROFILES["paper"])[arm][0].key()[:16] == GOLDEN[arm]


def test_a_run_is_the_recipe_step_by_step(tmp_path, monkeypatch):
    """The same losses as plain SGD written out here: nn.LSTM, torch's cross-entropy, clipping and rates by hand.

    The gradients of this small model are below Zaremba's 5: they are clipped at 1.
    """
    from repro.datasets.text import contiguous_batches, load_words
    from repro.engine import seed_for

    assert trials.CLIP == 5
    monkeypatch.setattr(trials, "CLIP", 1.0)
    recipe = dataclasses.replace(RECIPE, epochs=2, dropout=0.0)
    outcome = run(tmp_path, recipe=recipe)
    corpus = load_words("made", size="smoke")
    torch.manual_seed(seed_for("zhu2017", 0, "words"))
    model = LanguageModel(len(corpus.vocabulary), 8, 8, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1)
    losses, norms = [], []
    for rate in (1.0, 0.5):
        state, total, count = None, 0.0, 0
        for tokens, targets in contiguous_batches(corpus.splits["train"], 20, 10):
            logits, state = model(tokens, state)
            state = [(h.detach(), c.detach()) for h, c in state]
            summed = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            gradients = torch.autograd.grad(summed / 20, list(model.parameters()))
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
            norms.append(norm)
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= rate * gradient * min(1.0, 1 / norm)
            total, count = total + summed.item(), count + targets.numel()
        losses.append(total / count)
    assert max(norms) > 2
    assert outcome.curves["evaluations"]["train_loss"] == pytest.approx(losses, rel=1e-3)
    assert outcome.curves["evaluations"]["rate"] == [1, 0.5]


def test_arms_start_alike_and_seeds_differ(tmp_path):
    """Paired, dropout too: a rule that removes nothing that matters changes nothing; a seed does."""
    short = dataclasses.replace(RECIPE, epochs=1)
    dense, same, other = (run(tmp_path, recipe=short, **changes) for changes in ({}, {"value": 1e-30}, {"replicate": 1}))
    assert same.metrics["test_loss"] == pytest.approx(dense.metrics["test_loss"], abs=1e-6)
    assert abs(other.metrics["test_loss"] - dense.metrics["test_loss"]) > 1e-4


def test_zeros_are_counted_on_evenly_spread_updates(tmp_path):
    outcome = run(tmp_path, rule="held", value=0.8)
    zeros, updates = outcome.curves["zeros"], outcome.metrics["updates"]
    assert zeros["step"][::2] == [int((i + 0.5) * updates / 5) for i in range(5)]
    assert zeros["layer"] == [0, 1] * 5
    assert set(zeros["entries"]) <= {steps * 20 * 4 * 8 for steps in range(1, 11)}
    assert np.sum(zeros["threshold"]) / np.sum(zeros["entries"]) == pytest.approx(0.8, abs=0.05)


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    """The resumed run equals the uninterrupted one: weights, dropout's draws, rule and measured rows are in the checkpoint."""
    import repro.training

    monkeypatch.setattr(repro.training, "CHECKPOINT_SECONDS", 0.0)
    held = dataclasses.replace(TINY, rule="held", value=0.8)
    whole = held.run(Context(tmp_path / "whole", 1))
    evaluate, calls = repro.models.language.mean_loss, []

    def dies_in_the_second_epoch(model, batches):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(model, batches)

    monkeypatch.setattr(repro.models.language, "mean_loss", dies_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        held.run(Context(tmp_path / "killed", 1))
    monkeypatch.setattr(repro.models.language, "mean_loss", evaluate)
    resumed = held.run(Context(tmp_path / "killed", 1))
    assert resumed.metrics == whole.metrics
    assert resumed.curves["zeros"] == whole.curves["zeros"]


def test_a_diverged_run_is_a_result(tmp_path):
    outcome = run(tmp_path, recipe=dataclasses.replace(RECIPE, bound=1e38, epochs=1))
    assert outcome.diverged and "diverged" in outcome.metrics["stopped"]
    large = run(tmp_path, recipe=dataclasses.replace(RECIPE, bound=1e4, epochs=1))
    assert not large.diverged and 709 < large.metrics["test_loss"] < math.inf
    assert large.metrics["test_perplexity"] == math.inf, "a loss may be a number whose perplexity is none"


def test_bad_settings_are_named():
    with pytest.raises(ReproError, match="0 epochs"):
        dataclasses.replace(TINY, recipe=dataclasses.replace(RECIPE, epochs=0))
    with pytest.raises(ReproError, match="'top'"):
        dataclasses.replace(TINY, rule="top")


# --------------------------------------------------------------------------------------------------------- quantities


def record(trial: WordTrial, metrics=(), curves=()) -> Record:
    return Record(trial.key(), trial.study, trial.kind, trial.describe(), dict(metrics), dict(curves), False, {})


def results(profile: str, perplexities: dict[str, list[float]]) -> Results:
    arms = words.word_arms(PROFILES[profile])
    records = {
        trial.key(): record(trial, {"test_perplexity": value, "validation_loss": math.log(value)})
        for arm, values in perplexities.items()
        for trial, value in zip(arms[arm], values, strict=False)
    }
    return Results(PROFILES[profile], arms, records)


def test_the_deviation_from_the_published_perplexity():
    """115.645 is 1 % above 114.5; on other words than Penn Treebank's there is nothing to compare."""
    found = words.QUANTITIES["words_small_baseline_deviation_percent"](results("paper", {"small, t = 0": [115.645, 114.5]}))
    assert found[:2] == pytest.approx([1, 0]) and np.isnan(found[2:]).all()
    assert np.isnan(words.deviation_percent(results("laptop", {"small, t = 0": [7.0, 7.0, 7.0]}), "small")).all()


def test_costs_are_paired_by_seed():
    made = results("paper", {"small, t = 0": [100, 110], "small, 80% held": [101, 110], "small, t = 1e-6": [100, 121]})
    assert words.QUANTITIES["words_small_relative_perplexity_held_80"](made)[:2] == pytest.approx([1, 0])
    expected = [0, 100 * (math.log(121) - math.log(110)) / math.log(110)]
    assert words.QUANTITIES["words_small_relative_loss_1e_6"](made)[:2] == pytest.approx(expected)
    assert np.isnan(words.QUANTITIES["words_medium_relative_perplexity_held_80"](made)).all()


def test_the_exhibit_runs_end_to_end(tmp_path):
    """Smoke profile: trials, tables and figure of all arms."""
    profile = dataclasses.replace(PROFILES["smoke"], seeds=1)
    (exhibit,) = words.EXHIBITS
    arms = exhibit.arms(profile)
    records = {}
    for number, (trial,) in enumerate(arms.values()):
        outcome = trial.run(Context(tmp_path / str(number), 1))
        records[trial.key()] = record(trial, outcome.metrics, outcome.curves)
    found = Results(profile, arms, records)
    tables = exhibit.tables(found)
    assert list(tables["Word models"][""].unique()) == list(arms)
    assert len(exhibit.draw(found).axes) == 3
