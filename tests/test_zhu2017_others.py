"""Other models under the rule: their tasks, their trials, and what the exhibit makes of them."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.datasets.tasks import FARTHEST, character_answers, character_tasks
from repro.datasets.text import TextCorpus
from repro.datasets.vocabulary import Vocabulary
from repro.engine import Context, Record
from repro.errors import ReproError
from repro.gradients import HeldSparsity, Static, ThresholdedLSTM
from repro.gradients.counting import Counted
from repro.models.language import LanguageModel
from repro.models.multitask import MultitaskModel
from repro.studies.base import Results
from repro.studies.texts import MultitaskTrial, TextTrial, TransformerTrial
from repro.studies.zhu2017 import others
from repro.studies.zhu2017.profiles import PROFILES

SIZES = {
    "corpus": "made",
    "corpus_size": "smoke",
    "hidden": 8,
    "layers": 2,
    "length": 10,
    "batch": 8,
    "steps": 12,
    "learning_rate": 5e-3,
    "evaluations": 3,
    "measurements": 4,
}
KINDS = {"transformer": TransformerTrial(**SIZES), "multitask": MultitaskTrial(**SIZES)}

# None of these keys should change: committed records are found by them.
GOLDEN = {
    ("laptop", "Transformer, 80% held, NT"): "7e3e28b02a07f658",
    ("laptop", "Transformer, inner layers 80% held, NT"): "dd29af0fc9801178",
    ("laptop", "multi-task, t = 0, NT"): "f18488e8434c08b0",
    ("paper", "Transformer, 80% held, NT"): "5abd6488797f0323",
    ("paper", "Transformer, inner layers 80% held, NT"): "b0b29e5465670a26",
    ("paper", "multi-task, t = 0, NT"): "d8c781804c710474",
}


def run(trial: TextTrial, tmp_path, **changes):
    return dataclasses.replace(trial, **changes).run(Context(tmp_path / "checkpoint", 1))


# -------------------------------------------------------------------------------------------------------------- tasks


def corpus(text: str) -> TextCorpus:
    vocabulary = Vocabulary(tuple(sorted(set(text))))
    return TextCorpus("test", vocabulary, {"train": np.array(vocabulary.encode(text))})


def test_the_three_questions_of_a_short_text():
    answers = character_answers(corpus('"Go, now"\n'), "train")
    assert answers["kind"].tolist() == [2, 0, 0, 2, 1, 0, 0, 0, 2, 1]
    assert answers["ahead"].tolist() == [0, 1, 0, 0, 0, 2, 1, 0, 0, 0]
    assert character_tasks(corpus("ab c")) == {"character": 4, "kind": 3, "ahead": 8}


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab ,\n", min_size=1, max_size=40))
def test_letters_ahead_are_counted_one_by_one(text):
    """By walking on from every letter until there is no letter; more than the farthest count as that."""
    expected = []
    for place, symbol in enumerate(text):
        end = place
        while symbol.isalpha() and end + 1 < len(text) and text[end + 1].isalpha():
            end += 1
        expected.append(min(end - place, FARTHEST))
    assert character_answers(corpus(text), "train")["ahead"].tolist() == expected


# ------------------------------------------------------------------------------------------------------------- models


def lstm(inputs: int, hidden: int) -> ThresholdedLSTM:
    return ThresholdedLSTM(inputs, hidden)


def test_a_model_of_one_task_is_the_language_model():
    """The same weights give the same logits and carry the same state."""
    single = LanguageModel(9, 5, 5, 2, recurrent=lstm)
    model = MultitaskModel(9, 5, 2, {"character": 9}, lstm)
    model.load_state_dict({name.replace("decoder", "heads.character"): part for name, part in single.state_dict().items()})
    first, second = torch.randint(9, (2, 6, 3), generator=torch.Generator().manual_seed(0))
    state, reference = None, None
    for tokens in (first, second):
        logits, state = model(tokens, state)
        expected, reference = single(tokens, reference)
        torch.testing.assert_close(logits["character"], expected)
    torch.testing.assert_close(state, reference)


@pytest.mark.parametrize(("tasks", "message"), [({}, "none"), ({"kind": 0}, "classes of kind")])
def test_bad_tasks_are_named(tasks, message):
    with pytest.raises(ReproError, match=message):
        MultitaskModel(9, 5, 2, tasks, lstm)


# ----------------------------------------------------------------------------------------------------------- counting


def test_counting_changes_no_entry():
    """The same zeros with and without it, and as many as were counted; nothing is counted while it does not count."""
    generator = torch.Generator().manual_seed(0)
    plain, counted = HeldSparsity(0.7), Counted(HeldSparsity(0.7))
    sites = plain.new_site(), counted.new_site()
    zeros = 0
    for step in range(6):
        counted.counting = step >= 3
        dnet = torch.randn(4, 50, generator=generator)
        expected, found = plain(dnet.clone(), sites[0]), counted(dnet.clone(), sites[1])
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        zeros += int((found == 0).sum()) * (step >= 3)
    assert counted.take() == (3 * 200, zeros)
    assert counted.take() == (0, 0)


def test_counting_sees_compiled_layers_too():
    """The zeros of dnet of a layer wide enough for the compiled loops; in float64 it is not compiled."""
    counts = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        rule = Counted(Static(5e-5))
        layer = ThresholdedLSTM(8, 64, threshold=rule, dtype=torch.float64).to(dtype)
        rule.counting = True
        layer(torch.randn(5, 3, 8, dtype=torch.float64).to(dtype))[0].mean().backward()
        counts.append(rule.take())
    (entries, zeros), (_, reference) = counts
    assert entries == 5 * 3 * 4 * 64
    assert 0 < zeros < entries
    assert zeros == pytest.approx(reference, abs=2)


# ------------------------------------------------------------------------------------------------------------- trials


@pytest.mark.parametrize(("profile", "arm"), GOLDEN)
def test_keys_are_golden(profile, arm):
    assert others.other_arms(PROFILES[profile])[arm][0].key()[:16] == GOLDEN[profile, arm]


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_learns_and_counts(kind, tmp_path):
    """Losses fall, the sum of the tasks' losses is the loss, zeros are held on evenly spread updates."""
    outcome = run(KINDS[kind], tmp_path, steps=40, rule="held", value=0.8)
    losses = outcome.curves["evaluations"]["validation_loss"]
    assert losses[-1] < losses[0]
    tasks = [outcome.metrics[f"test_loss_{task}"] for task in KINDS[kind].tasks]
    assert outcome.metrics["test_loss"] == pytest.approx(sum(tasks))
    zeros = outcome.curves["zeros"]
    assert zeros["step"] == [5, 15, 25, 35]
    assert sum(zeros["zeros"]) / sum(zeros["entries"]) == pytest.approx(0.8, abs=0.1)
    outputs = 2 * (3 + 1 + 4 + 1) * 8 if kind == "transformer" else 2 * 4 * 8
    assert set(zeros["entries"]) == {10 * 8 * outputs}


@pytest.mark.parametrize("kind", KINDS)
def test_arms_start_alike_and_seeds_differ(kind, tmp_path):
    dense, same, other = (
        run(KINDS[kind], tmp_path, steps=3, measurements=3, **c) for c in ({}, {"value": 1e-30}, {"replicate": 1})
    )
    assert same.metrics["test_loss"] == pytest.approx(dense.metrics["test_loss"], abs=1e-6)
    assert abs(other.metrics["test_loss"] - dense.metrics["test_loss"]) > 1e-4


def test_the_rule_may_act_in_inner_layers_alone(tmp_path):
    """Queries, keys, values and the widened layer: 7 of the 9 widths that a block's layers put out."""
    outcome = run(KINDS["transformer"], tmp_path, inner=True, rule="held", value=0.8)
    assert set(outcome.curves["zeros"]["entries"]) == {10 * 8 * 2 * 7 * 8}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_from_its_checkpoint(kind, tmp_path, monkeypatch):
    """The resumed run equals the uninterrupted one: carried state, rule and counts are in the checkpoint."""
    import repro.training
    from repro.studies.texts import _Course

    monkeypatch.setattr(repro.training, "CHECKPOINT_SECONDS", 0.0)
    held = dataclasses.replace(KINDS[kind], rule="held", value=0.8)
    whole = held.run(Context(tmp_path / "whole", 1))
    evaluate, calls = _Course.mean_losses, []

    def dies_in_the_third_evaluation(course, model, split):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(course, model, split)

    monkeypatch.setattr(_Course, "mean_losses", dies_in_the_third_evaluation)
    with pytest.raises(KeyboardInterrupt):
        held.run(Context(tmp_path / "killed", 1))
    monkeypatch.setattr(_Course, "mean_losses", evaluate)
    resumed = held.run(Context(tmp_path / "killed", 1))
    assert resumed.metrics == whole.metrics
    assert resumed.curves["zeros"] == whole.curves["zeros"]


def test_a_rule_it_does_not_know_is_named():
    with pytest.raises(ReproError, match="'top'"):
        dataclasses.replace(KINDS["transformer"], rule="top")


# ------------------------------------------------------------------------------------------------------------ exhibit


def record(trial, metrics=(), curves=()) -> Record:
    return Record(trial.key(), trial.study, trial.kind, trial.describe(), dict(metrics), dict(curves), False, {})


@pytest.mark.parametrize("profile", PROFILES.values(), ids=str)
def test_arms_of_a_model_differ_in_the_rule_alone(profile):
    """Paired: what else a trial is described by is shared; every trial has its own key."""
    arms = others.other_arms(profile)
    assert len({trial.key() for trials in arms.values() for trial in trials}) == len(arms) * profile.seeds
    for model in others.MODELS:
        shared = {
            str({k: v for k, v in arms[f"{model}, {rule}"][0].describe().items() if k not in ("rule", "value")})
            for rule in others.RULES
        }
        assert len(shared) == 1


def test_costs_are_relative_to_the_dense_arm_of_the_same_seed():
    profile = PROFILES["laptop"]
    arms = others.other_arms(profile)
    records = {}
    for model, (dense, held) in {"GRU": (2.0, 2.2), "Transformer": (2.0, 1.9), "multi-task": (4.0, 4.0)}.items():
        for rule, loss in ((others.DENSE, dense), (others.HELD, held)):
            trial = arms[f"{model}, {rule}"][1]
            records[trial.key()] = record(trial, {"test_loss": loss})
    results = Results(profile, arms, records)
    expected = {"gru": 10, "transformer": -5, "multitask": 0}
    for name, percent in expected.items():
        values = others.QUANTITIES[f"{name}_relative_test_loss_held_80"](results)
        assert values[1] == pytest.approx(percent) and np.isnan(values[[0, 2]]).all()
    assert np.isnan(others.QUANTITIES["attention_relative_test_loss_held_80"](results)).all()


def test_zeros_of_both_kinds_of_records():
    """Counted as a whole, or by cause."""
    trial = KINDS["multitask"]
    assert others.zeros_percent(record(trial, curves={"zeros": {"step": [0, 1], "entries": [4, 4], "zeros": [1, 3]}})) == 50
    causes = {cause: [1, 0] for cause in ("saturated", "arriving", "factor", "underflow", "threshold")}
    assert others.zeros_percent(record(trial, curves={"zeros": {"step": [0, 1], "entries": [5, 5], **causes}})) == 50


def test_models_start_and_rules_follow_as_their_trials_say():
    """A linear layer makes one step an update: its feedback is stronger. Forget gates start open, as the character model's."""
    assert [dataclasses.replace(KINDS[kind], rule="held", value=0.8).make_rule().gain for kind in KINDS] == [3.0, 1.0]
    assert KINDS["transformer"].make_rule().known() == KINDS["transformer"].value
    for layer in KINDS["multitask"].model(corpus("ab c"), HeldSparsity(0.8)).layers:
        hidden = layer.hidden_size
        assert (layer.bias_ih_l0[hidden : 2 * hidden] == 1).all() and not (layer.bias_ih_l0[:hidden] == 1).any()


def test_the_exhibit_runs_end_to_end(tmp_path):
    """Smoke profile, one seed: trials, tables and figure of every model."""
    profile = dataclasses.replace(PROFILES["smoke"], seeds=1, hidden=8, layers=1, length=5)
    (exhibit,) = others.EXHIBITS
    arms = exhibit.arms(profile)
    records = {}
    for number, (trial,) in enumerate(arms.values()):
        outcome = trial.run(Context(tmp_path / str(number), 1))
        records[trial.key()] = record(trial, outcome.metrics, outcome.curves)
    found = Results(profile, arms, records)
    tables = exhibit.tables(found)
    assert tables["Other models"]["ours"].notna().all()
    labels = [text.get_text() for text in exhibit.draw(found).axes[1].get_yticklabels()]
    assert labels[:2] == ["GRU", "Transformer"] and len(labels) == 8
