"""Variants of the character model in the study of Zhu et al. 2017: other settings, other recipes, dW alone, half precision."""

import dataclasses
import math

import numpy as np
import pytest

from repro.engine import Context, Record
from repro.errors import ReproError
from repro.report.verdicts import load_claims
from repro.studies.base import Results
from repro.studies.gates import ONE_STEP, QUANTILE, SNAPSHOTS, CharacterTrial
from repro.studies.zhu2017 import comparisons as c
from repro.studies.zhu2017 import recipe, sensitivity, variants
from repro.studies.zhu2017.comparisons import of_extreme
from repro.studies.zhu2017.profiles import GUESSING, PROFILES, dynamic_arms, static_name
from repro.studies.zhu2017.variations import DENSE, HELD, PAPERS, not_learned

MODULES = (sensitivity, recipe, variants)
EXHIBITS = {exhibit.name: exhibit for module in MODULES for exhibit in module.EXHIBITS}
QUANTITIES = {name: quantity for module in MODULES for name, quantity in module.QUANTITIES.items()}

TINY = CharacterTrial(
    corpus="made",
    corpus_size="smoke",
    hidden=8,
    layers=2,
    length=10,
    batch=8,
    steps=6,
    learning_rate=5e-3,
    evaluations=2,
    measurements=3,
    snapshots=(),
)


def run(tmp_path, **changes):
    return dataclasses.replace(TINY, **changes).run(Context(tmp_path / "checkpoint", 1))


def record(trial, metrics=(), curves=()) -> Record:
    return Record(trial.key(), trial.study, trial.kind, trial.describe(), dict(metrics), dict(curves), False, {})


def zeros(share: float) -> dict[str, dict]:
    """Curve "zeros" of one measured step of 1000 entries."""
    causes = {cause: [0] for cause in ("saturated", "arriving", "factor", "underflow")}
    return {"zeros": {"step": [0], "layer": [0], "entries": [1000], "threshold": [round(1000 * share)], **causes}}


def of(results_of: str, profile, made) -> Results:
    """Results of an exhibit whose records `made(arm, trial) -> (metrics, curves)` says; None: there is no record."""
    arms, records = EXHIBITS[results_of].arms(profile), {}
    for arm, trials in arms.items():
        for trial in trials:
            if (found := made(arm, trial)) is not None:
                records[trial.key()] = record(trial, *found)
    return Results(profile, arms, records)


# ------------------------------------------------------------------------------------------------------------ trials


def test_a_gru_is_measured_by_its_own_gates(tmp_path):
    """Three gates a unit; the accelerator's cycles, which are an LSTM's, are left open; snapshots name r, z and n."""
    outcome = run(tmp_path, cell="gru", snapshots=(1.0,))
    curve = outcome.curves["zeros"]
    assert set(curve["entries"]) == {10 * 8 * 3 * 8}
    assert set(curve["columns"]) == {10 * 3 * 8}
    assert set(curve["dense_cycles"]) == set(curve["simulated_cycles"]) == {None}
    assert outcome.curves["activations"]["gate"] == ["r", "z", "n"]
    assert outcome.curves["variants"]["variant"] == ["bfloat16", "float16", "top"]
    held = run(tmp_path, cell="gru", rule="held", value=0.8).curves["zeros"]
    assert np.mean(np.array(held["threshold"]) / held["entries"]) == pytest.approx(0.8, abs=0.03)


def test_whole_columns_are_removed(tmp_path):
    curve = run(tmp_path, rule="columns", value=0.75).curves["zeros"]
    assert np.array(curve["zero_columns"]) / curve["columns"] == pytest.approx(0.75, abs=0.01)


def test_a_rule_for_the_weights_alone_leaves_the_gradient_of_the_embedding(tmp_path):
    """Above all gradients, t leaves the decoder alone to learn; in the weights alone the embedding as well: three trainings."""
    everywhere, weights = (run(tmp_path, value=1e30, weights_only=alone).metrics["train_loss"] for alone in (False, True))
    dense = run(tmp_path).metrics["train_loss"]
    assert len({everywhere, weights, dense}) == 3
    curve = run(tmp_path, rule="top", value=0.8, weights_only=True).curves["zeros"]
    assert np.mean(np.array(curve["threshold"]) / curve["entries"]) == pytest.approx(0.8, abs=0.01)
    assert set(curve["simulated_cycles"]) == {None}


def test_rounding_makes_zeros_only_of_what_its_format_cannot_hold(tmp_path):
    """Averaged over batch and time, gradients of this model are below float16's range in part, and all within bfloat16's."""
    single, half, brain = (run(tmp_path, precision=name).curves["zeros"] for name in ("float32", "float16", "bfloat16"))
    assert sum(single["threshold"]) == sum(brain["threshold"]) == 0 < sum(half["threshold"])


def test_one_step_under_variants_of_the_method(tmp_path):
    """Shares of zeros are those asked for, of 320 entries a time step; the recorded t is the quantile of the whole step."""
    outcome = run(tmp_path, snapshots=(0.5, 1.0))
    curve = outcome.curves["variants"]
    assert curve["variant"] == ["bfloat16", "float16", "top", "top, weights"] * 2
    assert curve["training"] == [0.5] * 4 + [1.0] * 4
    shares = np.array(curve["zeros"]) / curve["entries"]
    assert shares[[2, 3, 6, 7]] == pytest.approx(QUANTILE, abs=0.01)
    cosine = np.array(curve["cosine"])
    assert cosine[0] == pytest.approx(1, abs=1e-4) and cosine[0] != 1
    assert (cosine[[2, 3]] < 0.9999).all() and cosine[2] != cosine[3]
    causes = outcome.curves["causes"]
    entries = 2 * 10 * 8 * 4 * 8
    assert causes["below"] == pytest.approx([QUANTILE * entries] * 2, abs=2)
    below = [
        s for t, s, at in zip(*(outcome.curves["single"][n] for n in ("t", "zeros", "training")), strict=True) if at == 0.5
    ]
    rising = np.interp(np.log(causes["t"][0]), np.log(ONE_STEP[1:]), np.array(below[1:-1]) / entries)
    assert rising == pytest.approx(QUANTILE, abs=0.1)


def test_trials_that_are_not_looked_at_leave_no_snapshots(tmp_path):
    assert set(run(tmp_path).curves) == {"evaluations", "zeros"}


def test_wrong_variants_are_named():
    with pytest.raises(ReproError, match="weights_only with cell 'gru'"):
        dataclasses.replace(TINY, cell="gru", weights_only=True)
    with pytest.raises(ReproError, match="precision"):
        dataclasses.replace(TINY, precision="int8")
    with pytest.raises(ReproError, match="cell"):
        dataclasses.replace(TINY, cell="rnn")
    assert dataclasses.replace(TINY, precision="float16", cell="gru").label().startswith("characters 2x8 GRU float16 static 0")


# -------------------------------------------------------------------------------------------------------------- arms


@pytest.mark.parametrize("profile", PROFILES.values(), ids=str)
def test_settings_differ_from_the_main_model_in_one_field(profile):
    """Paired within a setting; the main model stands on every axis and is trained once."""
    arms = sensitivity.arms(profile)
    fields = ("layers", "hidden", "length", "corpus")
    main = {name: getattr(profile, name) for name in fields}
    for axis, field in zip(sensitivity.settings(profile).values(), fields, strict=True):
        assert any(getattr(arms[f"{setting}, {DENSE}"][0], field) == main[field] for setting in axis)
        for setting in axis:
            spec = arms[f"{setting}, {PAPERS}"][0].describe()
            assert {name: spec[name] for name in fields if name != field} == {n: main[n] for n in fields if n != field}
            assert (spec["batch"], spec["learning_rate"]) == (profile.batch, profile.learning_rate)
            of_rules = [arms[f"{setting}, {name}"][0] for name in (DENSE, PAPERS, HELD)]
            assert len({dataclasses.replace(trial, rule="static", value=0.0) for trial in of_rules}) == 1
    trained = {trial.key() for trials in arms.values() for trial in trials}
    settings = sum(len(axis) for axis in sensitivity.settings(profile).values()) - 3
    assert len(trained) == 3 * settings * profile.seeds


@pytest.mark.parametrize("profile", PROFILES.values(), ids=str)
def test_recipes_are_all_combinations_and_the_main_one_is_among_them(profile):
    arms = recipe.arms(profile)
    grid = profile.grid
    assert len({trial.key() for trials in arms.values() for trial in trials}) == len(arms) * profile.seeds
    assert len(arms) == 3 * len(grid.rates) * len(grid.batches) * 2
    assert (grid.rates[0], grid.batches[-1]) == (profile.learning_rate, profile.batch)
    assert list(grid.rates) == sorted(grid.rates) and list(grid.batches) == sorted(grid.batches)


def test_variants_share_the_main_trainings():
    """What the other exhibits train already is not trained again."""
    profile = PROFILES["laptop"]
    everything = {trial.key() for trials in dynamic_arms(profile).values() for trial in trials}
    for arms, own in ((variants.onlydw_arms(profile), 1), (variants.precision_arms(profile), 2)):
        new = [name for name, trials in arms.items() if not {trial.key() for trial in trials} <= everything]
        assert len(new) == own


# -------------------------------------------------------------------------------------------------------- quantities


def test_every_quantity_decides_a_claim_of_its_exhibit():
    claims = {claim.exhibit: set() for claim in load_claims("zhu2017")}
    for claim in load_claims("zhu2017"):
        claims[claim.exhibit].add(claim.quantity)
    for module in MODULES:
        wanted = set().union(*(claims[exhibit.name] for exhibit in module.EXHIBITS))
        assert wanted == set(module.QUANTITIES)


def test_the_extreme_setting_is_chosen_by_its_mean_and_only_once_all_have_one():
    first, second = np.array([1.0, 5.0]), np.array([2.0, 3.0])
    assert of_extreme([first, second], float) is first
    assert of_extreme([first, second], lambda mean: -abs(mean - 2.5)) is second
    assert np.isnan(of_extreme([first, np.array([math.nan, math.nan])], float)).all()
    assert of_extreme([first, np.array([math.inf, 1.0])], float)[0] == math.inf, "a diverged run is the worst"


def test_sensitivity_by_hand():
    """Zeros fall by 2 points a layer and by 1 point for each 10 steps less; the loss is 2, and 3 % higher at 6 layers."""
    profile = PROFILES["paper"]

    def made(arm, trial):
        share = 0.9 - 0.02 * (trial.layers - 3) - 0.001 * (100 - trial.length) + 0.01 * trial.replicate
        higher = 0.03 * (trial.layers == 6) * (trial.rule != "static") + 0.01 * (trial.value == 1e-6)
        return {"validation_loss": 2.0 * (1 + higher)}, zeros(share)

    results = of("sensitivity", profile, made)
    seeds = np.arange(5)
    expected = {
        "sensitivity_smallest_zeros_1e_6": 78 + seeds,
        "sensitivity_largest_relative_loss_1e_6": np.full(5, 1.0),
        "sensitivity_largest_relative_loss_held_80": np.full(5, 3.0),
        "sensitivity_zeros_range_layers": np.full(5, 14.0),
        "sensitivity_zeros_range_cells": np.zeros(5),
        "sensitivity_zeros_range_length": np.full(5, 7.5),
        "sensitivity_zeros_range_corpora": np.zeros(5),
    }
    for name, values in expected.items():
        assert QUANTITIES[name](results) == pytest.approx(values), name


def test_one_missing_setting_leaves_the_claims_over_all_undecided():
    profile = PROFILES["paper"]

    def made(arm, trial):
        return None if trial.layers == 9 else ({"validation_loss": 2.0}, zeros(0.9))

    results = of("sensitivity", profile, made)
    for name in ("smallest_zeros_1e_6", "largest_relative_loss_1e_6", "zeros_range_layers"):
        assert np.isnan(QUANTITIES[f"sensitivity_{name}"](results)).all(), name
    assert QUANTITIES["sensitivity_zeros_range_cells"](results) == pytest.approx(np.zeros(5))


def test_settings_that_have_learned_nothing_are_named():
    """A dense loss within 1 % of guessing each symbol by its frequency, of the setting's own text."""
    profile = PROFILES["paper"]

    def made(arm, trial):
        nothing = trial.layers == 9 or (trial.hidden == 512 and trial.replicate < 2)
        return {"validation_loss": GUESSING[trial.corpus] * (0.995 if nothing else 0.985)}, zeros(0.9)

    words = not_learned(of("sensitivity", profile, made), ("9 layers", "3 layers", "512 cells", "Penn Treebank"))
    assert words == "\nno better than guessing by frequency, even at t = 0: 9 layers; 512 cells (2 of 5 seeds)"
    assert not_learned(of("sensitivity", profile, made), ("3 layers",)) == ""
    assert not_learned(of("sensitivity", profile, lambda arm, trial: None), ("3 layers",)) == ""


def test_arms_without_records_are_named_or_counted():
    profile = PROFILES["paper"]

    def some(lacking):
        return of("sensitivity", profile, lambda arm, trial: None if lacking(arm) else ({"validation_loss": 2.0}, zeros(0.9)))

    assert c.without_records(some(lambda arm: False)) == c.without_records(some(lambda arm: True)) == ""
    assert c.without_records(some(lambda arm: arm.startswith("2 layers, t"))) == (
        "\nno records yet: 2 layers, t = 0; 2 layers, t = 1e-6"
    )
    words = c.without_records(some(lambda arm: arm.endswith(HELD)))
    assert words == "\nno records yet: 12 of 36 arms, all 80% held"


def test_a_loss_against_one_that_diverged_is_infinite_and_against_none_unknown():
    pairs = [(2.0, 1.0), (None, 1.0), (2.0, None), (math.inf, 1.0), (2.0, math.inf), (math.inf, math.inf)]

    class Made:
        def metric(self, arm, name):
            return np.array([math.nan if pair[arm] is None else pair[arm] for pair in pairs])

    found = c.relative_loss(Made(), 0, 1)
    np.testing.assert_array_equal(found, [100.0, math.nan, math.nan, math.inf, math.inf, math.inf])


def test_recipe_by_hand():
    """Under N all entries are 100 times larger, of half the batch twice as large, and zeros fall with them."""
    profile = PROFILES["paper"]

    def made(arm, trial):
        scale = (100 if trial.normalisation == "N" else 1) * 50 / trial.batch
        share = 0.9 - 0.1 * math.log10(scale) + 0.05 * (trial.learning_rate > 2e-3)
        curves = zeros(share) | {"causes": {"training": [0.5], "t": [1.5e-7 * scale * (1 + trial.replicate)]}}
        return {"validation_loss": 2.0 + 0.5 * (trial.value > 0 and trial.normalisation == "NT")}, curves

    def unlearned(arm, trial):
        metrics, curves = made(arm, trial)
        dull = trial.batch == 10 and trial.normalisation == "NT"
        return {"validation_loss": GUESSING[trial.corpus] if dull else metrics["validation_loss"]}, curves

    results = of("recipe", profile, made)
    assert QUANTITIES["recipe_zeros_range"](results) == pytest.approx(
        np.full(5, 100 * (0.95 - 0.7 + 0.1 * math.log10(5))), abs=0.1
    )
    assert QUANTITIES["recipe_zeros_nearest_80"](results) == pytest.approx(np.full(5, 83.0), abs=0.1)
    assert QUANTITIES["recipe_zeros_nearest_80"](of("recipe", profile, unlearned)) == pytest.approx(np.full(5, 75.0), abs=0.1)
    assert QUANTITIES["recipe_largest_relative_loss"](results) == pytest.approx(np.full(5, 25.0))
    assert QUANTITIES["threshold_for_80_n_over_nt"](results) == pytest.approx(np.ones(5))
    assert QUANTITIES["threshold_for_80_by_batch"](results) == pytest.approx(np.ones(5))


def test_variants_by_hand():
    """Snapshots are taken from the middle of training, differences are paired and of the right sign."""
    profile = PROFILES["laptop"]
    rows = [(name, at) for at in SNAPSHOTS for name in ("bfloat16", "float16", "top", "top, weights")]

    def made(arm, trial):
        shares = {"bfloat16": 0.1, "float16": 0.6, "top": 0.8, "top, weights": 0.8}
        cosines = {"bfloat16": 1.0, "float16": 1.0, "top": 0.9 - 0.01 * trial.replicate, "top, weights": 0.95}
        later = [100 * (at != 0.5) for _, at in rows]
        curve = {
            "variant": [name for name, _ in rows],
            "training": [at for _, at in rows],
            "entries": [1000] * len(rows),
            "zeros": [round(1000 * shares[name]) + more for (name, _), more in zip(rows, later, strict=True)],
            "cosine": [cosines[name] - more for (name, _), more in zip(rows, later, strict=True)],
        }
        losses = {variants.DENSE: 2.0, variants.EVERYWHERE: 2.1, variants.WEIGHTS: 2.0, variants.PAPERS: 3.0}
        losses |= {variants.ROUNDED: 4.0, variants.ROUNDED_PAPERS: 5.0}
        share = 0.8 + 0.03 * (trial.precision != "float32")
        single = {"training": [0.5], "rule": ["static"], "t": [0], "entries": [100], "zeros": [4], "cosine": [1]}
        return {"validation_loss": losses[arm]}, zeros(share) | {"variants": curve, "single": single}

    dw, halves = (of(name, profile, made) for name in ("onlydw", "precision"))
    assert QUANTITIES["relative_loss_everywhere_to_only_dw"](dw) == pytest.approx(np.full(3, 5.0))
    assert QUANTITIES["cosine_only_dw_minus_everywhere"](dw) == pytest.approx([0.05, 0.06, 0.07])
    assert QUANTITIES["zeros_points_step_bfloat16"](halves) == pytest.approx(np.full(3, 10.0 - 4.0))
    assert QUANTITIES["zeros_points_step_float16"](halves) == pytest.approx(np.full(3, 60.0 - 4.0))
    assert QUANTITIES["zeros_difference_bfloat16"](halves) == pytest.approx(np.full(3, 3.0))
    assert QUANTITIES["relative_validation_loss_bfloat16"](halves) == pytest.approx(np.full(3, 25.0))


# ---------------------------------------------------------------------------------------------------------- exhibits


@pytest.mark.parametrize("name", EXHIBITS)
def test_an_exhibit_can_be_shown_before_anything_is_run(name):
    profile = PROFILES["paper"]
    results = Results(profile, EXHIBITS[name].arms(profile), {})
    assert all(len(table) for table in EXHIBITS[name].tables(results).values())
    assert EXHIBITS[name].draw(results).axes
    for module in MODULES:
        if EXHIBITS[name] in module.EXHIBITS and len(module.EXHIBITS) == 1:
            assert all(np.isnan(quantity(results)).all() for quantity in module.QUANTITIES.values())


@pytest.mark.parametrize("name", EXHIBITS)
def test_an_exhibit_runs_end_to_end(name, tmp_path):
    """Tiny settings: all trials, tables, figure; every quantity of its claims is a number."""
    small = dataclasses.replace(PROFILES["smoke"].grid, layers=(1, 2), cells=(4, 8), lengths=(5,), batches=(4, 8))
    profile = dataclasses.replace(PROFILES["smoke"], seeds=1, hidden=8, layers=1, length=5, grid=small)
    exhibit = EXHIBITS[name]
    arms, records = exhibit.arms(profile), {}
    for trial in {trial.key(): trial for trials in arms.values() for trial in trials}.values():
        outcome = trial.run(Context(tmp_path / trial.key(), 1))
        records[trial.key()] = record(trial, outcome.metrics, outcome.curves)
    results = Results(profile, arms, records)
    assert all(len(table) for table in exhibit.tables(results).values())
    assert exhibit.draw(results).axes
    for claim in load_claims("zhu2017"):
        if claim.exhibit == name:
            nothing_learned = claim.quantity == "recipe_zeros_nearest_80"  # which is of recipes that learn
            assert nothing_learned or np.isfinite(QUANTITIES[claim.quantity](results)).all(), claim.quantity
    assert static_name(0.0) == variants.DENSE
