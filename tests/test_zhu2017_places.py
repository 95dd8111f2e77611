"""Exhibit `places`: zeros of one step by layer, gate and place in the sequence."""

import dataclasses

import numpy as np
import pytest

from repro.engine import Context, Record
from repro.errors import ReproError
from repro.gradients import Static
from repro.studies.base import Results
from repro.studies.gates import CharacterTrial
from repro.studies.places import NO_RULE, PLACES, SHARE, STATIC, PlacesTrial
from repro.studies.probing import sites
from repro.studies.zhu2017 import places
from repro.studies.zhu2017.profiles import DENSE, PROFILES

TRAINING = CharacterTrial(
    corpus="made",
    corpus_size="smoke",
    hidden=8,
    layers=2,
    length=25,
    batch=8,
    steps=12,
    learning_rate=5e-3,
    evaluations=1,
    snapshots=(),
)
TRIAL = PlacesTrial(training=TRAINING, after=0.5, t=1e-4, share=0.8)


class Remembered(Static):
    """A static threshold that keeps what it leaves, step after step; told that its t is not known, it is given each dnet."""

    def __init__(self, t):
        super().__init__(t)
        self.left = []

    def known(self, site=0):
        return None

    def __call__(self, dnet, site=0):
        dnet[dnet.abs() <= self.t] = 0
        self.left.append(dnet.clone().numpy())
        return dnet


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    outcome = TRIAL.run(Context(tmp_path_factory.mktemp("places") / "none", 1))
    return {name: np.array(column) for name, column in outcome.curves["places"].items()} | outcome.metrics


def of(curve, rule):
    return curve["rule"] == rule


def test_zeros_are_those_of_each_dnet_counted_by_hand(curve):
    """Gates are quarters of dnet's columns; steps 0, 1, 2 are the first tenth of 25, 3 and 4 the second, and so on."""
    course, step = TRIAL.followed()
    rules = [Remembered(TRIAL.t) for _ in range(TRAINING.layers)]
    for site, rule in zip(sites(course.model), rules, strict=True):
        site.rule = rule
    course.mean_loss(step).backward()
    for layer, rule in enumerate(rules):
        zero = np.array(rule.left[::-1]).reshape(25, 8, 4, 8) == 0
        for place in range(PLACES):
            steps = [step for step in range(25) if place / PLACES <= step / 25 < (place + 1) / PLACES]
            for i, gate in enumerate("ifgo"):
                row = of(curve, STATIC) & (curve["layer"] == layer) & (curve["gate"] == gate) & (curve["place"] == place)
                assert curve["entries"][row] == [len(steps) * 8 * 8]
                assert curve["zeros"][row] == [zero[steps, :, i].sum()]
    assert 0.1 < curve["zeros"][of(curve, STATIC)].sum() / curve["entries"][of(curve, STATIC)].sum() < 0.9


def test_without_a_rule_the_zeros_are_those_the_training_counts_at_that_update(tmp_path, curve):
    """And the t that is found makes the wanted share zero, or a little more: what is removed no longer arrives elsewhere."""
    zeros = dataclasses.replace(TRAINING, measurements=12).run(Context(tmp_path / "training", 1)).curves["zeros"]
    at = [i for i, step in enumerate(zeros["step"]) if step == 6]
    counted = [sum(zeros[cause][i] for cause in ("saturated", "arriving", "factor", "underflow", "threshold")) for i in at]
    assert [curve["zeros"][of(curve, NO_RULE) & (curve["layer"] == layer)].sum() for layer in range(2)] == counted
    share = curve["zeros"][of(curve, SHARE)].sum() / curve["entries"][of(curve, SHARE)].sum()
    assert 0.8 <= share < 0.85
    assert 0 < curve["t_of_share"] < 1


def test_a_sequence_shorter_than_ten_steps_has_fewer_places(tmp_path):
    short = dataclasses.replace(TRIAL, training=dataclasses.replace(TRAINING, length=4))
    assert set(short.run(Context(tmp_path / "none", 1)).curves["places"]["place"]) == {0, 2, 5, 7}


def test_a_share_of_the_training_after_which_nothing_is_left_is_refused():
    with pytest.raises(ReproError, match="share of 1"):
        dataclasses.replace(TRIAL, after=1.0)


def results(zeros_of) -> Results:
    """One layer, 100 entries a gate and place, of which `zeros_of(replicate, gate, place)` are zero under every rule."""
    profile = dataclasses.replace(PROFILES["smoke"], seeds=2, layers=1)
    arms, records = places.EXHIBITS[0].arms(profile), {}
    for trial in arms[DENSE]:
        rows = [
            (rule, 0, gate, place, zeros_of(trial.replicate, gate, place), 100)
            for rule in (NO_RULE, STATIC, SHARE)
            for gate in "ifgo"
            for place in range(PLACES)
        ]
        columns = dict(
            zip(("rule", "layer", "gate", "place", "zeros", "entries"), map(list, zip(*rows, strict=True)), strict=True)
        )
        records[trial.key()] = Record(
            trial.key(), trial.study, trial.kind, trial.describe(), {"t_of_share": 1e-7}, {"places": columns}, False, {}
        )
    return Results(profile, arms, records)


def test_the_gate_and_the_place_that_are_farthest_decide():
    """o has 50 or 52 of 100 zeros, the others 90: all together 80 and 80.5. The last tenth has 10 fewer: 72 and 72.5 of 81."""
    by_gate = results(lambda replicate, gate, place: 50 + 2 * replicate if gate == "o" else 90)
    assert places.gate_zeros_deviation_80(by_gate) == pytest.approx([30, 28.5])
    assert places.place_zeros_deviation_80(by_gate) == pytest.approx([0, 0])
    by_place = results(lambda replicate, gate, place: 80 - 10 * (place == 9))
    assert places.gate_zeros_deviation_80(by_place) == pytest.approx([0, 0])
    assert places.place_zeros_deviation_80(by_place) == pytest.approx([9, 9])


def test_the_table_has_every_gate_layer_and_place_of_each_rule():
    tables = places.tables(results(lambda replicate, gate, place: 50 if gate == "o" else 90))
    (found, of_share) = tables.values()
    assert len(found) == 3 * (1 + 4 + 1 + PLACES)
    ours = dict(zip(found[""], found["ours"], strict=True))
    assert ours["t for 80%, all"] == ours["t = 1e-6, layer 1"] == ours["t = 0, 3. tenth of the sequence"] == 80
    assert ours["t for 80%, output gate o"] == 50
    assert list(of_share["ours"]) == [1e-7]
