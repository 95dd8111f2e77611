"""Translation and captioning of zhu2017: paired trials that resume, zeros of real words, quantities worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest

from repro.engine import Context, Record, seed_for
from repro.errors import ReproError
from repro.report.verdicts import load_claims
from repro.studies.base import Results
from repro.studies.captioning import CaptionTrial
from repro.studies.sentences import EXAMPLES, Passes
from repro.studies.translating import TranslationTrial
from repro.studies.zhu2017 import comparisons as c
from repro.studies.zhu2017 import tasks
from repro.studies.zhu2017.profiles import PROFILES

# None of these keys should change: committed records are found by them.
GOLDEN = {
    ("laptop", "translation", "t = 0, NT"): "d9fdef58d4895a3e",
    ("laptop", "translation", "attention, 80% held, NT"): "c9358064276a69f0",
    ("laptop", "captioning", "t = 1e-6, NT"): "23a90577a47c8303",
    ("paper", "translation", "t = 0, NT"): "a7827de93f727277",
    ("paper", "captioning", "80% held, NT"): "53f728a9dbe5f134",
}

SIZES = {
    "corpus": "made",
    "corpus_size": "smoke",
    "embedding": 6,
    "hidden": 8,
    "layers": 1,
    "batch": 64,
    "steps": 12,
    "learning_rate": 5e-3,
    "evaluations": 3,
    "measurements": 4,
}
TRANSLATION = TranslationTrial(**SIZES | {"layers": 2})
CAPTIONS = CaptionTrial(**SIZES)
BOTH = pytest.mark.parametrize("trial", [TRANSLATION, CAPTIONS], ids=["translation", "captions"])
EXHIBITS = {exhibit.name: exhibit for exhibit in tasks.EXHIBITS}


@pytest.fixture(autouse=True)
def short_sentences(monkeypatch):
    """Models that have learned nothing write up to the limit."""
    monkeypatch.setattr("repro.studies.translating.LONGEST", 8)
    monkeypatch.setattr("repro.studies.captioning.LONGEST", 8)


def run(trial, folder, **changes):
    return dataclasses.replace(trial, **changes).run(Context(folder / "checkpoint", 1))


@pytest.mark.parametrize(("profile", "exhibit", "arm"), GOLDEN)
def test_keys_are_golden(profile, exhibit, arm):
    """The committed records stay reachable."""
    assert EXHIBITS[exhibit].arms(PROFILES[profile])[arm][0].key()[:16] == GOLDEN[profile, exhibit, arm]


@pytest.mark.parametrize("profile", PROFILES.values(), ids=str)
@pytest.mark.parametrize("exhibit", tasks.EXHIBITS, ids=lambda exhibit: exhibit.name)
def test_arms_differ_in_rule_and_attention_alone(exhibit, profile):
    """Paired: one trial a seed in every arm, all keys differ, everything else is shared."""
    arms = exhibit.arms(profile)
    assert len({trial.key() for trials in arms.values() for trial in trials}) == len(arms) * profile.seeds
    shared = set()
    for trials in arms.values():
        assert [trial.replicate for trial in trials] == list(range(profile.seeds))
        spec = {key: value for key, value in trials[0].describe().items() if key not in ("rule", "value", "attention")}
        shared.add(str(sorted(spec.items())))
    assert len(shared) == 1


def test_the_translator_with_attention_is_trained_once():
    """Other exhibits show the very trials of this one."""
    everything, attention = (find(PROFILES["laptop"]) for find in (tasks.translation_arms, tasks.attention_arms))
    assert list(attention) == [tasks.ATTENTION_DENSE, tasks.ATTENTION_HELD]
    for arm, trials in attention.items():
        assert all(trial.attention for trial in trials)
        assert [trial.key() for trial in trials] == [trial.key() for trial in everything[arm]]


@BOTH
def test_a_training_leaves_all_that_the_exhibits_show(trial, tmp_path):
    """Rows as many as steps and layers say; entries of dnet as many as the measured batches have words; test metrics."""
    outcome = run(trial, tmp_path)
    zeros, layers = outcome.curves["zeros"], 4 if trial is TRANSLATION else 1
    assert zeros["step"] == [step for step in (1, 4, 7, 10) for _ in range(layers)]
    assert zeros["layer"] == list(range(layers)) * 4
    assert outcome.curves["evaluations"]["step"] == [4, 8, 12]
    assert sum(zeros["threshold"]) == 0
    assert {len(column) for column in outcome.curves["examples"].values()} == {EXAMPLES}
    assert 0 <= outcome.metrics["bleu"] <= 100
    assert abs(outcome.metrics["test_loss"] - outcome.metrics["validation_loss"]) < 0.5
    # untrained it is that of guessing among all words
    assert outcome.curves["evaluations"]["train_loss"][0] < math.log(100)

    passes = Passes(lambda rng: trial.task(lambda *sizes: _Nothing()).batches("train", rng), seed_for("zhu2017", 0, "batches"))
    for i, step in enumerate(zeros["step"]):
        batch = passes.at(step)
        words = int((batch[-1][1:] > 0).sum())
        reads = trial is TRANSLATION and zeros["layer"][i] < 2
        expected = int(batch[1].sum()) if reads else words + (len(batch[0]) if trial is CAPTIONS else 0)  # its image, too
        assert zeros["entries"][i] == expected * 4 * trial.hidden


def _Nothing():
    import torch

    return torch.nn.Identity()


@BOTH
def test_the_gates_of_a_dense_training_are_counted(trial, tmp_path):
    """Four gates in a hundred bins, as many activations each; a thresholded training has no such curve."""
    curve = run(trial, tmp_path).curves["histograms"]
    counts = np.array(curve["count"]).reshape(4, 100)
    assert curve["gate"][::100] == list("ifgo") and curve["bin"] == list(range(100)) * 4 and set(curve["training"]) == {1.0}
    assert len(set(counts.sum(1))) == 1 and counts.sum() > 0
    assert "histograms" not in run(trial, tmp_path, value=1e-6).curves


@BOTH
def test_replicates_differ_and_arms_start_alike(trial, tmp_path):
    """Paired: a threshold that removes nothing changes nothing but rounding; a seed changes weights and batches."""
    few = {"steps": 3, "measurements": 3}
    dense, same, other = (run(trial, tmp_path, **few, **changes) for changes in ({}, {}, {"replicate": 1}))
    assert dense.metrics == same.metrics and dense.curves["zeros"] == same.curves["zeros"]
    assert dense.metrics["validation_loss"] != other.metrics["validation_loss"]
    assert dense.curves["zeros"]["entries"] != other.curves["zeros"]["entries"]
    thresholded = run(trial, tmp_path, value=1e-30, **few)
    assert thresholded.metrics["validation_loss"] == pytest.approx(dense.metrics["validation_loss"], abs=1e-6)


def test_a_held_share_of_zeros_is_held(tmp_path):
    """From the second measurement on, in words and image alike."""
    curve = run(CAPTIONS, tmp_path, rule="held", value=0.8).curves["zeros"]
    share = np.array(curve["threshold"]) / np.array(curve["entries"])
    assert share[1:] == pytest.approx(0.8, abs=0.1)


@BOTH
def test_a_killed_run_goes_on_from_its_checkpoint(trial, tmp_path, monkeypatch):
    """The resumed run equals the uninterrupted one: weights, rule, dropout and counted rows are in the checkpoint."""
    import repro.training
    from repro.models import sentences

    monkeypatch.setattr(repro.training, "CHECKPOINT_SECONDS", 0.0)
    held = dataclasses.replace(trial, rule="held", value=0.8, dropout=0.2)
    whole = held.run(Context(tmp_path / "whole", 1))
    calls, evaluate = [], sentences.mean_loss

    def dies_in_the_third_epoch(model, batches):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(model, batches)

    monkeypatch.setattr(sentences, "mean_loss", dies_in_the_third_epoch)
    with pytest.raises(KeyboardInterrupt):
        held.run(Context(tmp_path / "killed", 1))
    monkeypatch.setattr(sentences, "mean_loss", evaluate)
    resumed = held.run(Context(tmp_path / "killed", 1))
    assert resumed.metrics == whole.metrics
    assert resumed.curves["zeros"] == whole.curves["zeros"]
    assert resumed.curves["examples"] == whole.curves["examples"]


def test_a_training_that_diverges_is_a_result(tmp_path):
    """It says what stopped it and keeps what was counted before."""
    outcome = run(CAPTIONS, tmp_path, learning_rate=1e37)
    assert outcome.diverged and "diverged" in outcome.metrics["stopped"]
    assert "zeros" in outcome.curves


def test_passes_see_every_batch_once_in_another_order():
    """A pass depends on its number alone, so that a resumed run sees the same batches."""

    def batches(rng):
        return [(int(i),) for i in rng.permutation(5)]

    passes = Passes(batches, seed=1)
    assert passes.each == 5
    first, second = ([passes.at(step) for step in range(k, k + 5)] for k in (0, 5))
    assert sorted(first) == sorted(second) == [(i,) for i in range(5)]
    assert first != second
    later = Passes(batches, seed=1)
    assert [later.at(step) for step in (7, 2)] == [second[2], first[2]]


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"rule": "rms"}, "unknown rule 'rms': choose one of static, held"),
        ({"evaluations": 13}, "13 evaluations in 12 steps"),
        ({"corpus": "coco"}, "unknown corpus of captions 'coco': choose one of made"),
    ],
)
def test_wrong_sizes_are_refused(changes, complaint):
    with pytest.raises(ReproError, match=complaint):
        dataclasses.replace(CAPTIONS, **changes)


def test_labels_name_what_differs():
    assert TRANSLATION.label() == "translation 2x8 static 0 on made, seed 0"
    attentive = dataclasses.replace(TRANSLATION, attention=True, rule="held", value=0.8)
    assert attentive.label() == "translation with attention 2x8 held 0.8 on made, seed 0"


# ------------------------------------------------------------------------------------------------------------ quantities


def record(trial, metrics=(), curves=(), diverged=False) -> Record:
    return Record(trial.key(), trial.study, trial.kind, trial.describe(), dict(metrics), dict(curves), diverged, {})


def zeros_curve(removed: list[int]) -> dict[str, list]:
    """One step of layers with 1000 entries each, of which some are removed."""
    curve = {"step": [0] * len(removed), "layer": list(range(len(removed))), "entries": [1000] * len(removed)}
    return curve | {cause: [0] * len(removed) for cause in c.CAUSES[:-1]} | {"threshold": removed}


def made_results(exhibit: str, by_arm: dict) -> Results:
    """One record for each seed of the arms: (validation loss, test loss, BLEU) and zeros of two layers."""
    profile = PROFILES["laptop"]
    arms = EXHIBITS[exhibit].arms(profile)
    records = {}
    for arm, (metrics, removed) in by_arm.items():
        for trial, numbers in zip(arms[arm], metrics, strict=False):
            named = dict(zip(("validation_loss", "test_loss", "bleu"), numbers, strict=True))
            records[trial.key()] = record(trial, named, {"zeros": zeros_curve(removed)})
    return Results(profile, arms, records)


@pytest.mark.parametrize("task", EXHIBITS)
def test_quantities_of_made_records(task):
    """Zeros of all layers together; losses paired by seed; BLEU in points; a missing seed is left out."""
    results = made_results(
        task,
        {
            "t = 0, NT": ([(2.0, 4.0, 30.0), (1.0, 5.0, 20.0)], [0, 10]),
            "t = 1e-6, NT": ([(2.1, 4.0, 30.0), (0.9, 5.0, 20.0)], [900, 800]),
            "80% held, NT": ([(2.0, 4.1, 31.5), (1.0, 4.9, 18.0)], [800, 800]),
        },
    )
    found = {
        name.removeprefix(f"{task}_"): quantity(results)
        for name, quantity in tasks.QUANTITIES.items()
        if name.startswith(task) and "extreme" not in name
    }
    assert all(math.isnan(values[2]) for values in found.values())
    expected = {"zeros_1e_6": [85, 85], "relative_loss_1e_6": [5, -10], "relative_test_loss_held_80": [2.5, -2]}
    expected |= {"bleu_difference_held_80": [1.5, -2]} if task == "translation" else {}
    assert {name: pytest.approx(values[:2]) for name, values in found.items()} == expected


def test_the_skew_is_that_of_the_least_skewed_sigmoid_gate():
    """Of i 40 %, f 30 % and o 20 % at the extremes it is o; g, whose bins span two units, counts nowhere."""
    arms = tasks.captioning_arms(PROFILES["laptop"])
    shares = {"i": 40, "f": 30, "g": 90, "o": 20}
    curve = {"training": [], "gate": [], "bin": [], "count": []}
    for gate, percent in shares.items():
        counts = [0] * 100
        counts[0], counts[95], counts[50] = percent, 0, 100 - percent
        curve["training"] += [1.0] * 100
        curve["gate"] += [gate] * 100
        curve["bin"] += list(range(100))
        curve["count"] += counts
    trial = arms["t = 0, NT"][0]
    results = Results(PROFILES["laptop"], arms, {trial.key(): record(trial, curves={"histograms": curve})})
    assert tasks.QUANTITIES["captioning_extreme_percent_sigmoid"](results)[0] == pytest.approx(20)


def test_every_claim_has_a_quantity():
    claims = [claim for claim in load_claims("zhu2017") if claim.exhibit in EXHIBITS]
    assert {claim.quantity for claim in claims if claim.kind != "untestable"} == set(tasks.QUANTITIES)
    assert [claim.id for claim in claims if claim.kind == "untestable"] == ["Z77"]


def test_translators_with_attention_have_their_own_dense_arm():
    assert tasks.base(tasks.ATTENTION_HELD) == tasks.ATTENTION_DENSE
    assert tasks.base(tasks.HELD) == tasks.base(tasks.STATIC) == "t = 0, NT"


@pytest.mark.parametrize("name", EXHIBITS)
def test_exhibits_can_be_shown_before_anything_is_run(name):
    """Without records there are tables and a figure, no error."""
    profile = PROFILES["paper"]
    results = Results(profile, EXHIBITS[name].arms(profile), {})
    EXHIBITS[name].tables(results)
    assert EXHIBITS[name].draw(results).axes


@pytest.mark.parametrize("name", EXHIBITS)
def test_an_exhibit_runs_end_to_end(name, tmp_path):
    """Tiny settings: trials, tables and a figure; the examples stand beside each other by arm."""
    profile = dataclasses.replace(
        PROFILES["smoke"],
        seeds=1,
        translation_hidden=4,
        captioning_hidden=4,
        **{task: dataclasses.replace(getattr(PROFILES["smoke"], task), batch=64, evaluations=1) for task in EXHIBITS},
    )
    arms, records = EXHIBITS[name].arms(profile), {}
    for number, (trial,) in enumerate(arms.values()):
        outcome = trial.run(Context(tmp_path / str(number), 1))
        records[trial.key()] = record(trial, outcome.metrics, outcome.curves, outcome.diverged)
    results = Results(profile, arms, records)
    tables = EXHIBITS[name].tables(results)
    assert all(len(table) for table in tables.values())
    *_, examples = tables.values()
    assert len(examples) == EXAMPLES and set(arms) < set(examples.columns)
    assert EXHIBITS[name].draw(results).axes
    assert all(np.isfinite(quantity(results)).all() for key, quantity in tasks.QUANTITIES.items() if key.startswith(name))
