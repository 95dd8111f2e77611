"""The study of Narang et al. 2017: its trials are the ones it says, its exact claims come out as worked out by hand."""

import math

import pytest

from repro.engine import Record, seed_for
from repro.studies import STUDIES
from repro.studies.base import Results
from repro.studies.narang2017 import quantities as q
from repro.studies.narang2017.profiles import PROFILES, ablation_arms, gru_arms, hard_arms, rnn_arms
from repro.studies.speech import Pruning, SpeechTrial

STUDY = STUDIES["narang2017"]
NOTHING = Results(PROFILES["laptop"], {}, {})

# None of these keys should change: committed records are found by them. New fields need defaults; what changes results needs a
# higher code_version, and new records.
GOLDEN = {
    ("laptop", "RNN dense 1760"): "339077cefbb7c1d7",
    ("laptop", "RNN sparse 1760"): "bfaef02e6e3267f5",
    ("laptop", "hard at 10/20"): "8ee9e40418d45ebe",
    ("laptop", "automatic q, per layer"): "fa3e7acf7ef105f9",
    ("paper", "RNN dense 1760"): "553336d35204a5ca",
    ("paper", "RNN sparse 1760"): "187fb33a86c0ade7",
}


def arms(profile):
    return rnn_arms(profile) | gru_arms(profile) | hard_arms(profile) | ablation_arms(profile)


@pytest.mark.parametrize(("profile", "arm"), GOLDEN)
def test_keys_are_golden(profile, arm):
    """The committed records stay reachable."""
    assert arms(PROFILES[profile])[arm][0].key()[:16] == GOLDEN[profile, arm]


@pytest.mark.parametrize("profile", PROFILES.values(), ids=str)
def test_arms_differ_in_what_they_compare_and_share_the_rest(profile):
    """Every arm has one trial a seed, all keys within it differ, and data, length and optimizer are equal across RNN arms."""
    for trials in arms(profile).values():
        assert [trial.replicate for trial in trials] == list(range(profile.seeds))
        assert len({trial.key() for trial in trials}) == profile.seeds
    shared = ("corpus", "corpus_size", "epochs", "batch", "learning_rate", "weight_decay", "layers", "channels")
    for name in shared:
        assert len({getattr(trials[0], name) for arm, trials in arms(profile).items() if "GRU" not in arm}) == 1


def test_widths_keep_the_papers_ratios():
    """704 : 1760 : 2560 : 3072 and 2560 : 3568, to the rounding of a whole unit."""
    for profile in (PROFILES["laptop"], PROFILES["paper"]):
        for arm, trials in (rnn_arms(profile) | gru_arms(profile)).items():
            if arm.split()[-1].isdigit():
                scale = profile.gru_scale if arm.startswith("GRU") else profile.rnn_scale
                assert abs(trials[0].hidden - int(arm.split()[-1]) / scale) <= 0.5


def test_seeds_do_not_depend_on_the_arm():
    """Arms are paired: weights and batches of a replicate come from the same seeds whatever the method."""
    dense, sparse = (rnn_arms(PROFILES["laptop"])[f"RNN {kind} 1760"][1] for kind in ("dense", "sparse"))
    assert dense.replicate == sparse.replicate
    assert seed_for(dense.study, dense.replicate, "weights") == seed_for(sparse.study, sparse.replicate, "weights")
    assert sparse.needs() == (dense,)


EXPECTED = {
    "size_ratio_rnn_sparse_1760": 67_740_758 / 8.3e6,
    "dense_parameters_largest_deviation_percent": 100 * (67_740_758 - 67e6) / 67e6,
    "layers_with_other_parameter_count": 0,
    "table3_sparsity_largest_deviation": 88 - 100 * (1 - 8.3e6 / 67_740_758),
    "gru_layers_only_removed_percent": 90 * (3 * 2560 * (5 * 2560 + 1312)) / 115_425_533,
    "gru_recurrent_only_removed_percent": 90 * 9 * 2560**2 / 115_425_533,
    "table3_dense_medium_recomputed": 100 * (10.67 - 9.43) / 10.67,
    "relative_performance_largest_deviation": 3.95 - 100 * (10.67 - 10.25) / 10.67,
    "schedule_start_iteration": 2750,
    "schedule_end_iteration": 27500,
    # the last multiple of 100 before 27,500, by Algorithm 1
    "threshold_end_over_q": 2 * (11_001 + 1.5 * (27_400 - 13_750 + 1)) / (2 * 11_000 + 3 * 13_750),
    "table4_gain_as_cer_ratio": 100 * (1 - 12.88 / 13.63),
    "epochs_at_iteration_15000": 15_000 / 2_750,
    "table6_smallest_speedup": 56 / 48,
    "table6_speedup_largest_deviation": 313 / 89 - 3.5,
    "bandwidth_bound_speedup_with_indices": 10,
    "memory_largest_deviation_percent": 100 * (66.8 - 64) / 64,
    "memory_ratio_with_indices": 268 / 66.4,
    "onchip_largest_deviation_percent": 100 * (26_000 - 24_000) / 24_000,
    "onchip_units_with_indices": 2600 / math.sqrt(0.2),
}


def test_exact_claims_are_worked_out_by_hand():
    """Every exact claim has its expected number here, and gets it from the paper's own printed numbers."""
    exact = {claim.quantity for claim in STUDY.claims() if claim.kind == "exact"}
    assert exact == set(EXPECTED)
    for name, expected in EXPECTED.items():
        assert STUDY.quantities[name](NOTHING) == pytest.approx(expected, rel=1e-6), name


def record(trial, metrics=(), curves=(), diverged=False) -> Record:
    return Record(trial.key(), trial.study, trial.kind, trial.describe(), dict(metrics), dict(curves), diverged, {})


def test_paired_quantities_leave_out_missing_seeds_and_keep_diverged_ones():
    """Relative CER by seed: a seed without a record is NaN, one that diverged is infinite, the others are 100 (a - b) / b."""
    found = rnn_arms(PROFILES["paper"])
    chosen = {name: found[name] for name in ("RNN dense 1760", "RNN sparse 1760")}
    dense, sparse = chosen.values()
    records = {t.key(): record(t, {"test_cer": 0.10}) for t in dense}
    records[sparse[0].key()] = record(sparse[0], {"test_cer": 0.12})
    records[sparse[1].key()] = record(sparse[1], diverged=True)
    results = Results(PROFILES["paper"], chosen, records)
    values = STUDY.quantities["relative_cer_rnn_sparse_1760"](results)
    assert values[0] == pytest.approx(20)
    assert values[1] == math.inf
    assert all(math.isnan(value) for value in values[2:])


def test_curve_quantities_on_made_records():
    """Bump, early removal, layers: each from a record small enough to check by hand."""
    trial = rnn_arms(PROFILES["laptop"])["RNN sparse 1760"][0]
    losses = [50, 40, 30, 20, 22, 12, 10, 9, 8, 7]
    layers = {f"recurrent.{i}.weight_hh{side}": share for i, side, share in ((0, "", 0.9), (0, "_reverse", 0.8), (2, "", 0.6))}
    schedule = {
        "iteration": [10, 10, 80, 84],
        "layer": ["a", "b", "a", "a"],
        "pruned": [1, 2, 5, 9],
        "weights": [10, 10, 10, 10],
    }
    made = record(
        trial,
        {"steps_per_epoch": 38},
        {
            "epochs": {"train_loss": losses},
            "layers": {"layer": list(layers), "sparsity": list(layers.values())},
            "schedule": schedule,
        },
    )
    # epochs 2 and 3 of 10 lie in 20..35 %, epochs 4 and 5 in 40..57.5 %
    assert q.loss_bump(made) == pytest.approx(100 * (22 - 30) / 30)
    assert q.early_minus_late(made) == pytest.approx(0.85 - 0.6)
    # 15/55 of 8 epochs of 38 steps is step 83: a has lost 5 of 10, b 2 of 10
    assert q.removed_at(made, 15 / 55) == pytest.approx((50 + 20) / 2)


def test_label_and_estimate_are_for_people():
    """Progress lines name cell, width, method, corpus and seed; a wider model is expected to take longer."""
    small = SpeechTrial(
        corpus="made",
        corpus_size="laptop",
        hidden=44,
        layers=3,
        channels=4,
        time_strides=(4, 1),
        epochs=10,
        batch=16,
        learning_rate=1e-3,
        pruning=Pruning(method="auto"),
    )
    assert small.label() == "rnn 44 auto 90% on made, seed 0"
    wide = rnn_arms(PROFILES["laptop"])["RNN dense 2560"][0]
    assert wide.seconds() > small.seconds() > 0
