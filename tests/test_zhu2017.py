"""The study of Zhu et al. 2017: its trials are the ones it says, its exact claims come out as worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from repro.engine import Context, Record, seed_for
from repro.errors import ReproError
from repro.gradients import ThresholdedLSTM
from repro.studies.base import Results
from repro.studies.gates import ONE_STEP, SNAPSHOTS, CharacterTrial, Windows
from repro.studies.probing import DenseProbe, probe
from repro.studies.zhu2017 import STUDY
from repro.studies.zhu2017 import comparisons as c
from repro.studies.zhu2017 import quantities as q
from repro.studies.zhu2017.profiles import PROFILES, dynamic_arms, mac_arms, static_name, training_arms

NOTHING = Results(PROFILES["laptop"], {}, {})

# None of these keys should change: committed records are found by them. New fields need defaults; what changes results needs a
# higher code_version, and new records.
GOLDEN = {
    ("laptop", "t = 0, NT"): "eac45a44130cf774",
    ("laptop", "t = 1e-6, N"): "a2f1fd3058f79492",
    ("laptop", "80% held, NT"): "dbb196e9c44c9b6e",
    ("paper", "t = 0, NT"): "f39382b4f179fd3b",
    ("paper", "80% top-k, NT"): "0432f005f49c96e3",
}

TINY = CharacterTrial(
    corpus="made",
    corpus_size="smoke",
    hidden=8,
    layers=2,
    length=10,
    batch=8,
    steps=12,
    learning_rate=5e-3,
    evaluations=3,
    measurements=4,
)


def run(tmp_path, **changes):
    return dataclasses.replace(TINY, **changes).run(Context(tmp_path / "checkpoint", 1))


@pytest.mark.parametrize(("profile", "arm"), GOLDEN)
def test_keys_are_golden(profile, arm):
    """The committed records stay reachable."""
    assert dynamic_arms(PROFILES[profile])[arm][0].key()[:16] == GOLDEN[profile, arm]


@pytest.mark.parametrize("profile", PROFILES.values(), ids=str)
def test_arms_differ_in_rule_and_normalisation_alone(profile):
    """Paired: one trial a seed in every arm, all keys differ, everything but rule, value and normalisation is shared."""
    arms = dynamic_arms(profile)
    assert len({trial.key() for trials in arms.values() for trial in trials}) == len(arms) * profile.seeds
    for trials in arms.values():
        assert [trial.replicate for trial in trials] == list(range(profile.seeds))
    shared = {
        tuple(sorted((k, str(v)) for k, v in trials[0].describe().items() if k not in ("rule", "value", "normalisation")))
        for trials in arms.values()
    }
    assert len(shared) == 1


def test_exhibits_share_their_trainings():
    """One training serves every exhibit that shows it: nothing is run twice under two keys."""
    everything = dynamic_arms(PROFILES["laptop"])
    for name in ("figure2", "figure3", "figure4", "figure5", "macs", "causes", "dynamic", "onlydw", "precision"):
        arms = STUDY.exhibits[name].arms(PROFILES["laptop"])
        shared = arms.keys() & everything.keys()
        assert shared
        for arm in shared:
            assert [trial.key() for trial in arms[arm]] == [trial.key() for trial in everything[arm]]


def test_every_claim_has_an_exhibit_and_a_quantity():
    assert {claim.exhibit for claim in STUDY.claims()} == set(STUDY.exhibits)
    assert {claim.quantity for claim in STUDY.claims() if claim.quantity} == set(STUDY.quantities)


C2 = 0.75 * math.tanh(1)

EXPECTED = {
    "backward_macs_percent": 100 * 4 / 6,
    "backward_macs_percent_other_inputs": 100 * 2 / 3,
    "redundant_macs_percent_at_80": 100 * 0.8 * 4 / 6,
    "redundant_macs_identity_deviation": 0,
    "redundant_macs_percent_fixed_embedding": 100 * 0.8 * 11 / 17,
    # two layers of 8 H^2 weights, three products of them and of the output layer
    "redundant_macs_percent_words_small": 100 * 0.8 * 2 * 16 * 200**2 / (2 * 24 * 200**2 + 3 * 200 * 10_000),
    "redundant_macs_percent_words_medium": 100 * 0.8 * 2 * 16 * 650**2 / (2 * 24 * 650**2 + 3 * 650 * 10_000),
    "macs_bound_speedup_80": 1 / (1 - 1.6 / 3),
    "extrapolated_exponent_of_10_percent": -10,
    "printed_rule_large_removed_percent": 50,
    "printed_tanh_derivative_error": 1 - math.tanh(-5),
    "printed_carry_error_percent": 100 * abs(2 * C2 / (1 - math.tanh(C2) ** 2) - 1),
    "perplexity_percent_of_one_percent_loss": 100 * (114.5**0.01 - 1),
}


def test_exact_claims_are_worked_out_by_hand():
    """Every exact claim has its expected number here."""
    exact = {claim.quantity for claim in STUDY.claims() if claim.kind == "exact"}
    assert exact == set(EXPECTED)
    for name, expected in EXPECTED.items():
        assert STUDY.quantities[name](NOTHING) == pytest.approx(expected, rel=1e-6, abs=1e-12), name


def test_a_dense_training_leaves_all_that_the_exhibits_show(tmp_path):
    """Rows as many as steps, layers, snapshots and thresholds say; counts add up; the dense step is its own reference."""
    outcome = run(tmp_path)
    zeros, single, histograms = (outcome.curves[name] for name in ("zeros", "single", "histograms"))
    assert zeros["step"] == [1, 1, 4, 4, 7, 7, 10, 10]
    assert zeros["layer"] == [0, 1] * 4
    assert set(zeros["entries"]) == {10 * 8 * 4 * 8}
    assert set(zeros["columns"]) == {10 * 4 * 8}
    assert zeros["threshold"] == [0] * 8
    assert len(single["t"]) == len(SNAPSHOTS) * (len(ONE_STEP) + 1)
    at_0 = [i for i, t in enumerate(single["t"]) if t == 0]
    assert [single["cosine"][i] for i in at_0] == pytest.approx([1] * len(SNAPSHOTS))
    assert sum(histograms["count"]) == len(SNAPSHOTS) * 2 * 10 * 8 * 4 * 8
    assert outcome.curves["evaluations"]["step"] == [4, 8, 12]
    assert outcome.metrics["test_bits"] == pytest.approx(outcome.metrics["test_loss"] / math.log(2))


def test_a_training_is_looked_at_within_a_pass(monkeypatch):
    """The first batch of a pass begins with states of zero, as hardly any other does: the one before is looked at."""
    each = TINY.course().windows.each_pass
    course = dataclasses.replace(TINY, steps=2 * each, snapshots=(0.0, 0.25, 0.5, 1.0)).course()
    looked = []
    monkeypatch.setattr(course.snapshots, "add", lambda share, model, loss: looked.append((share, step)))
    for step in range(2 * each + 1):
        course.look(step)
    assert looked == [(0.0, 0), (0.25, round(each / 2)), (0.5, each - 1), (1.0, 2 * each - 1)]


def test_replicates_differ_and_arms_start_alike(tmp_path):
    """Paired: a rule that removes nothing that matters changes nothing; a seed does."""
    dense, same, other = (run(tmp_path, steps=3, measurements=3, **changes) for changes in ({}, {}, {"replicate": 1}))
    assert dense.metrics == same.metrics
    assert dense.metrics["validation_loss"] != other.metrics["validation_loss"]
    thresholded = run(tmp_path, steps=3, measurements=3, value=1e-30)  # removes nothing that matters
    assert thresholded.metrics["validation_loss"] == pytest.approx(dense.metrics["validation_loss"], abs=1e-6)


def test_normalisation_scales_what_a_threshold_means(tmp_path):
    """Summed over time, the first step's gradients are longer by its length: zeros at t (NT) are those at t length (N)."""
    few = {"steps": 3, "measurements": 3, "evaluations": 1}
    averaged = run(tmp_path, value=1e-4, normalisation="NT", **few)
    summed = run(tmp_path, value=1e-3, normalisation="N", **few)
    first = [outcome.curves["zeros"]["threshold"][:2] for outcome in (averaged, summed)]
    assert first[0] == pytest.approx(first[1], abs=3)
    assert min(first[0]) > 0
    assert summed.curves["evaluations"]["train_loss"] == pytest.approx(averaged.curves["evaluations"]["train_loss"], rel=1e-3)


@pytest.mark.parametrize(("rule", "value"), [("held", 0.8), ("top", 0.8), ("rms", 0.5), ("rate", 1e-4)])
def test_every_rule_removes_entries(tmp_path, rule, value):
    outcome = run(tmp_path, rule=rule, value=value)
    removed = np.array(outcome.curves["zeros"]["threshold"]) / np.array(outcome.curves["zeros"]["entries"])
    assert 0.1 < removed[2:].mean() < 1
    if rule in ("held", "top"):
        assert removed[2:].mean() == pytest.approx(value, abs=0.05)


@pytest.mark.parametrize(("rule", "value"), [("static", 0.0), ("held", 0.8), ("rate", 1e-4)])
def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch, rule, value):
    """The resumed run equals the uninterrupted one: carried state, rule, measured rows and what a dense training was looked at
    for are in the checkpoint."""
    import repro.training

    monkeypatch.setattr(repro.training, "CHECKPOINT_SECONDS", 0.0)
    trial = dataclasses.replace(TINY, rule=rule, value=value)
    whole = trial.run(Context(tmp_path / "whole", 1))
    calls = []
    evaluate = repro.models.language.mean_loss

    def dies_in_the_third_epoch(model, batches):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(model, batches)

    monkeypatch.setattr(repro.models.language, "mean_loss", dies_in_the_third_epoch)
    with pytest.raises(KeyboardInterrupt):
        trial.run(Context(tmp_path / "killed", 1))
    monkeypatch.setattr(repro.models.language, "mean_loss", evaluate)
    resumed = trial.run(Context(tmp_path / "killed", 1))
    assert resumed.metrics == whole.metrics
    for curves in (resumed.curves, whole.curves):
        curves["evaluations"].pop("seconds", None)
    assert repr(resumed.curves) == repr(whole.curves), "by their text, as some cosines are not a number"


def test_whole_columns_and_cycles_follow_the_masks(tmp_path):
    """A threshold above all gradients leaves little more than the forward pass; without one only c_0 = 0 makes columns zero."""
    curve = run(tmp_path, value=1e30).curves["zeros"]
    assert curve["zero_columns"] == curve["columns"]
    assert [sum(causes) for causes in zip(*(curve[cause] for cause in c.CAUSES), strict=True)] == curve["entries"]
    dense = run(tmp_path, steps=3, measurements=3).curves["zeros"]
    # the forget gates of the very first step, whose factor c_0 is 0; later windows start from the state of the one before
    assert dense["zero_columns"] == [8, 8, 0, 0, 0, 0]
    assert dense["factor"] == [8 * 8, 8 * 8, 0, 0, 0, 0]
    assert dense["dense_cycles"][0] == curve["dense_cycles"][0] > 2 * curve["simulated_cycles"][0]


def test_the_probe_finds_the_factor_that_varies():
    """Entries that differ in their gate's derivative alone: its share of the variance is 1, the other's 0."""
    probe = DenseProbe()
    derivatives = torch.tensor([0.25, 0.125, 0.0625, 0.25]).expand(4, 4)[:, :, None]
    arriving, factors = torch.ones(4, 4, 1), torch.full((4, 4, 1), 2.0)
    dnet = arriving * factors * derivatives
    probe.add_step(0, dnet, derivatives, arriving, factors, dnet)
    assert probe.variance_shares() == pytest.approx((1, 0))
    # half of the entries lie at or below t = 2 / 8, and with their largest derivative, 1/4 or 1 for g, all of them above it
    assert probe.lifted(0.5) == (8, 8)
    assert probe.lifted(0.25) == (4, 4)


def test_a_dead_network_has_no_variance_to_share():
    probe = DenseProbe()
    assert all(map(math.isnan, probe.variance_shares()))
    zeros = torch.zeros(4, 4, 1)
    probe.add_step(0, zeros, zeros, zeros, zeros, zeros)
    assert all(map(math.isnan, probe.variance_shares()))


def test_full_cells_and_those_that_pass_nothing_on():
    """A unit whose gates are open and whose candidate is 1 counts the steps: from c = 10 on tanh(c) is 1, and dc is 0."""
    torch.manual_seed(0)
    lstm = ThresholdedLSTM(1, 2, threshold=0.0)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
        lstm.bias_ih_l0[::2] = 100.0  # unit 0: i = f = g = o = 1; unit 1 stays at c = 0
    found = probe(nn.ModuleList([lstm]), lambda: lstm(torch.zeros(14, 1, 1))[0].sum())
    assert (found.cells, found.full_cells, found.dead_cells, found.dead_full_cells) == (28, 5, 5, 5)


def test_windows_follow_each_other_and_passes_start_elsewhere():
    """Within a pass the targets of one window lead into the next; another seed starts at another symbol."""
    tokens = np.arange(1000)
    windows = Windows(tokens, batch=4, length=10, seed=1)
    assert windows.each_pass == ((1000 - 10) // 4 - 1) // 10
    (first, targets), (second, _) = windows.at(0), windows.at(1)
    assert (targets == first + 1).all()
    assert (second[0] == targets[-1]).all()
    starts = {int(Windows(tokens, 4, 10, seed).at(0)[0][0, 0]) for seed in range(8)}
    assert len(starts) > 1 and max(starts) < 10
    with pytest.raises(ReproError, match="too few"):
        Windows(tokens[:40], 4, 10, 0)


def record(trial, metrics=(), curves=(), diverged=False) -> Record:
    return Record(trial.key(), trial.study, trial.kind, trial.describe(), dict(metrics), dict(curves), diverged, {})


def zeros_curve(shares: list[list[float]], steps: list[int]) -> dict[str, list]:
    """Curve "zeros" with 1000 entries a layer and the given shares, (steps, layers), all removed by the rule."""
    rows = [(step, layer, share) for step, row in zip(steps, shares, strict=True) for layer, share in enumerate(row)]
    empty = [0] * len(rows)
    return {
        "step": [step for step, _, _ in rows],
        "layer": [layer for _, layer, _ in rows],
        "entries": [1000] * len(rows),
        **{cause: list(empty) for cause in c.CAUSES[:-1]},
        "threshold": [round(1000 * share) for _, _, share in rows],
    }


def test_zeros_of_made_records():
    """Over the training, by layer, by tenth: counted together and divided once."""
    trial = dataclasses.replace(TINY, steps=100)
    shares = [[0.5, 0.7], *([[0.8, 0.9]] * 9)]
    made = record(trial, curves={"zeros": zeros_curve(shares, [10 * i + 5 for i in range(10)])})
    assert c.training_zeros(made) == pytest.approx(100 * (0.6 + 9 * 0.85) / 10)
    assert c.zeros_by_layer(made) == pytest.approx([77, 88])
    assert c.zeros_by_tenth(made) == pytest.approx([60, *[85] * 9])


def test_the_threshold_for_a_share_is_interpolated_in_its_logarithm():
    """80 % lie half-way between 70 % at 1e-7 and 90 % at 1e-6; the cosine there is half-way as well."""
    single = {
        "training": [0.5] * 5,
        "rule": ["static"] * 4 + ["printed"],
        "t": [0, 1e-8, 1e-7, 1e-6, 1e-6],
        "entries": [100] * 5,
        "zeros": [10, 45, 70, 90, 95],
        "cosine": [1, 1, 0.98, 0.2, 0.1],
    }
    made = record(TINY, curves={"single": single})
    assert c.log_threshold_for(made, 80) == pytest.approx(-6.5)
    assert c.cosine_at_percent(made, 80) == pytest.approx(0.59)
    assert c.log_threshold_of_cosine(made, 0.59) == pytest.approx(-6.5)
    assert math.isnan(c.log_threshold_for(made, 95))
    assert q.printed_rule(made) == (95, 0.1)


def test_the_largest_harmless_threshold_is_chosen_by_the_mean():
    """1e-6 costs 1 % in the mean although one seed loses 2 %; 1e-5 costs more; a diverged seed is not harmless."""
    arms = training_arms(PROFILES["paper"])
    chosen = {static_name(t): arms[static_name(t)] for t in (0, 1e-8, 1e-7, 1e-6, 1e-5)}
    losses = {0: [1, 1, 1], 1e-8: [1, 1, 1], 1e-7: [1, 1, 1], 1e-6: [1.02, 1.0, 1.0], 1e-5: [1.5, 1.5, 1.5]}
    records = {
        trial.key(): record(trial, {"validation_loss": loss})
        for t, by_seed in losses.items()
        for trial, loss in zip(chosen[static_name(t)], by_seed, strict=False)
    }
    results = Results(PROFILES["paper"], chosen, records)
    assert q.largest_harmless_threshold(results) == "t = 1e-6, NT"
    gone = chosen["t = 1e-6, NT"][0]
    records[gone.key()] = record(gone, diverged=True)
    assert q.largest_harmless_threshold(Results(PROFILES["paper"], chosen, records)) == "t = 1e-7, NT"


def test_what_larger_arms_lack_cannot_be_called_harmful():
    """The largest harmless t is not known before all larger ones have records; of smaller ones none are needed."""
    arms = training_arms(PROFILES["paper"])
    chosen = {static_name(t): arms[static_name(t)] for t in (0, 1e-8, 1e-7, 1e-6, 1e-5)}

    def found(losses):
        records = {}
        for t, loss in losses.items():
            trial = chosen[static_name(t)][0]
            records[trial.key()] = record(trial, {"validation_loss": loss})
        return q.largest_harmless_threshold(Results(PROFILES["paper"], chosen, records))

    assert found({0: 1, 1e-5: 1.5, 1e-6: 1.0}) == "t = 1e-6, NT"
    assert found({0: 1, 1e-6: 1.0}) is None
    assert found({0: 1, 1e-5: 1.5, 1e-6: 1.5, 1e-7: 1.5, 1e-8: 1.5}) == "t = 0, NT"


def test_decades_count_from_the_smallest_threshold_where_it_is_beyond():
    """45 % lie between two thresholds, or below all of them; then the decades are counted from the first."""

    def decades(zeros):
        single = {
            "training": [0.5] * 4,
            "rule": ["static"] * 4,
            "t": [0, 1e-10, 1e-8, 1e-6],
            "entries": [100] * 4,
            "zeros": zeros,
            "cosine": [1] * 4,
        }
        (trial, *_) = trials = training_arms(PROFILES["paper"])["t = 0, NT"]
        results = Results(PROFILES["paper"], {"t = 0, NT": trials}, {trial.key(): record(trial, curves={"single": single})})
        return STUDY.quantities["decades_from_45_to_80_percent"](results)[0]

    assert decades([10, 40, 50, 80]) == pytest.approx(3)
    assert decades([10, 50, 60, 80]) == pytest.approx(4)


def test_neither_normalisation_speaks_while_the_other_has_no_records():
    """NT's deviation from the printed shares is not "the smaller one" before N's is known."""
    profile = PROFILES["paper"]
    arms = training_arms(profile)
    printed = {t: c.paper("figure3", "one step", "zeros_percent", t).value for t in (1e-8, 1e-6)}
    of_training = {t: c.paper("figure4", "whole training", "zeros_percent", t).value for t in (1e-7, 1e-6)}
    records = {}

    def add(normalisation, off):
        for t in (0, 1e-7, 1e-6):
            trial = arms[static_name(t, normalisation)][0]
            single = {"training": [0.5] * 3, "rule": ["static"] * 3, "t": [0, *printed], "entries": [100] * 3}
            single |= {"zeros": [10, *(value + off for value in printed.values())], "cosine": [1] * 3}
            curves = {"zeros": zeros_curve([[(of_training.get(t, 20) + off) / 100]], [0]), "single": single}
            records[trial.key()] = record(trial, curves=curves)
        return STUDY.quantities["printed_zeros_largest_deviation"](Results(profile, arms, records))

    assert all(map(math.isnan, add("NT", 7)))
    assert add("N", 4)[0] == pytest.approx(4)


def test_paired_quantities_leave_out_missing_seeds_and_keep_diverged_ones():
    arms = mac_arms(PROFILES["paper"])
    base = training_arms(PROFILES["paper"])["t = 0, NT"]
    ours = arms["t = 1e-6, NT"]
    records = {trial.key(): record(trial, {"test_loss": 2.0}) for trial in base}
    records[ours[0].key()] = record(ours[0], {"test_loss": 2.1})
    records[ours[1].key()] = record(ours[1], diverged=True)
    results = Results(PROFILES["paper"], {"t = 0, NT": base, "t = 1e-6, NT": ours}, records)
    values = STUDY.quantities["relative_test_loss_1e_6"](results)
    assert values[0] == pytest.approx(5)
    assert values[1] == math.inf
    assert all(math.isnan(value) for value in values[2:])


def test_a_seed_that_diverged_leaves_the_deviations_of_the_others():
    """Losses of 2.0, 2.2 and 1.8: 0, 10 and 10 % from their mean; the fifth was not run."""
    trials = training_arms(PROFILES["paper"])["t = 0, NT"]
    records = {trials[i].key(): record(trials[i], {"validation_loss": loss}) for i, loss in ((0, 2.0), (1, 2.2), (3, 1.8))}
    records[trials[2].key()] = record(trials[2], diverged=True)
    results = Results(PROFILES["paper"], {"t = 0, NT": trials}, records)
    found = STUDY.quantities["validation_loss_seed_deviation_percent"](results)
    np.testing.assert_allclose(found, [0, 10, math.inf, 10, math.nan], atol=1e-9)


@pytest.mark.parametrize("name", ["figure2", "macs"])
def test_an_exhibit_runs_end_to_end(name, tmp_path):
    """Tiny settings: trials, tables, figure and verdicts of all its claims."""
    profile = STUDY.profile("smoke", hidden=8, layers=2, length=5, batch=8)
    exhibit = STUDY.exhibit(name)
    arms = exhibit.arms(profile)
    records = {}
    for number, trial in enumerate(trial for trials in arms.values() for trial in trials):
        outcome = trial.run(Context(tmp_path / str(number), 1))
        records[trial.key()] = record(trial, outcome.metrics, outcome.curves, outcome.diverged)
    results = Results(profile, arms, records)
    assert all(len(table) for table in exhibit.tables(results).values())
    assert exhibit.draw(results).axes
    verdicts = STUDY.verdicts(name, results)
    assert {v.claim.id for v in verdicts} == {claim.id for claim in STUDY.claims() if claim.exhibit == name}
    assert all(np.isfinite(v.value) for v in verdicts if v.claim.kind != "untestable")


@pytest.mark.parametrize("exhibit", STUDY.exhibits.values(), ids=lambda exhibit: exhibit.name)
def test_exhibits_can_be_shown_before_anything_is_run(exhibit):
    """Without records there are tables, a figure or none, and undecided verdicts: no error."""
    profile = PROFILES["paper"]
    results = Results(profile, exhibit.arms(profile), {})
    exhibit.tables(results)
    exhibit.draw(results)
    STUDY.verdicts(exhibit.name, results)


def test_trainings_without_a_batch_or_a_rate_are_refused():
    for field, value in (("batch", 0), ("learning_rate", -1.0)):
        with pytest.raises(ReproError, match=f"{field.replace('_', ' ')} of a training is {value}"):
            dataclasses.replace(TINY, **{field: value})


def test_seeds_and_labels():
    """Seeds name the purpose, not the arm; progress lines name width, rule, normalisation, corpus and seed."""
    assert seed_for("zhu2017", 0, "weights") != seed_for("zhu2017", 0, "windows")
    assert TINY.label() == "characters 2x8 static 0 NT on made, 8 by 10, rate 0.005, seed 0"
    assert dataclasses.replace(TINY, hidden=512).seconds() > TINY.seconds() > 0
    with pytest.raises(ReproError, match="normalisation"):
        dataclasses.replace(TINY, normalisation="T")
    with pytest.raises(ReproError, match="evaluations"):
        dataclasses.replace(TINY, evaluations=13)


def test_claims_are_numbered_without_a_gap():
    """None got lost on its way from the notes, and none stands twice."""
    ids = [claim.id for claim in STUDY.claims()]
    assert sorted(ids, key=lambda name: int(name[1:])) == [f"Z{number}" for number in range(1, len(ids) + 1)]
