"""The study of Wang et al. 2017: its claims, the identity of its trials, and what is made of records."""

import numpy as np
import pytest
import torch

from repro.collectives.compaction import KeptGradients
from repro.collectives.costs import Link, cost
from repro.collectives.launch import run_ranks
from repro.studies import STUDIES
from repro.studies.base import Results
from repro.studies.replicas import DRIFTS, FIXED_ORDER, MULTIPLIED, OWN_ORDER, SYSTEMS, DriftTrial, Model, kept_weights
from repro.studies.wang2017 import measured
from repro.studies.wang2017.arithmetic import BE, LP, MST
from repro.studies.wang2017.profiles import EVERY, PROFILES, size_arms
from repro.studies.wires import ZerosTrial

STUDY = STUDIES["wang2017"]
PROFILE = PROFILES["laptop"]


def test_every_claim_has_an_exhibit_and_a_quantity_and_every_quantity_a_claim():
    claimed = {claim.quantity for claim in STUDY.claims() if claim.kind != "untestable"}
    assert claimed == set(STUDY.quantities)


@pytest.mark.parametrize("name", PROFILES)
def test_arms_are_paired_and_timed_alone(name):
    profile = PROFILES[name]
    for exhibit in STUDY.exhibits.values():
        for arm, trials in exhibit.arms(profile).items():
            assert [trial.replicate for trial in trials] == list(range(profile.seeds)), arm
            assert len({trial.key() for trial in trials}) == profile.seeds


def made_times(profile, link: Link) -> dict:
    """What a machine that obeys the cost model would have recorded."""
    rows = []
    for nbytes in profile.sizes:
        for collective in ("broadcast", "reduce", "allreduce"):
            for algorithm in EVERY:
                blocks = [b for b in profile.blocks if b <= nbytes] if algorithm == LP else [nbytes]
                for block in blocks or [nbytes]:
                    known = "ring" if algorithm == "library" else algorithm
                    seconds = cost(collective, known, profile.ranks, nbytes, link, block)
                    rows.append((collective, algorithm, profile.ranks, nbytes, block, seconds, seconds, seconds))
    names = ("collective", "algorithm", "ranks", "nbytes", "block", "seconds", "lower", "upper")
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


class Made:
    """A record as far as quantities look at it."""

    def __init__(self, replicate: int, curves: dict):
        self.spec, self.curves, self.metrics = {"replicate": replicate}, curves, {}
        self.diverged, self.provenance = False, {"threads": 2}


def test_ratios_of_a_machine_that_obeys_the_cost_model_are_those_of_the_costs():
    link = Link(1e-4, 2e-8, 1e-9)
    arms = {"hosts": size_arms(PROFILE)["hosts"]}
    times = made_times(PROFILE, link)
    results = Results(PROFILE, arms, {t.key(): Made(t.replicate, {"times": times}) for t in arms["hosts"]})
    largest = max(PROFILE.sizes)

    def best(collective: str) -> float:
        return min(cost(collective, LP, 4, largest, link, block) for block in PROFILE.blocks if block <= largest)

    for collective in ("broadcast", "reduce", "allreduce"):
        for name, algorithm in (("be", BE), ("mst", MST)):
            expected = cost(collective, algorithm, 4, largest, link) / best(collective)
            found = STUDY.quantities[f"{collective}_{name}_over_lp"](results)
            assert found == pytest.approx([expected] * PROFILE.seeds)
    short = cost("broadcast", BE, 4, 8192, link) / cost("broadcast", MST, 4, 8192, link)
    assert STUDY.quantities["broadcast_be_over_mst_short"](results) == pytest.approx([short] * PROFILE.seeds)


def test_a_machine_that_obeys_the_cost_model_is_predicted_exactly_and_its_best_block_found():
    link = Link(1e-4, 2e-8, 1e-9)
    arms = STUDY.exhibit("model").arms(PROFILE)
    times, more = made_times(PROFILE, link), {}
    for ranks in PROFILE.many_ranks:
        for collective in ("broadcast", "reduce", "allreduce"):
            for algorithm in (LP, MST, BE, "ring"):
                size, block = PROFILE.ranks_size, 65536 if algorithm == LP else PROFILE.ranks_size
                seconds = cost(collective, algorithm, ranks, size, link, block)
                row = (collective, algorithm, ranks, size, block, seconds, seconds, seconds)
                for name, value in zip(times, row, strict=True):
                    more.setdefault(name, []).append(value)
    made = {"hosts": times, "hosts, by ranks": more}
    records = {t.key(): Made(t.replicate, {"times": made[arm]}) for arm, trials in arms.items() for t in trials}
    results = Results(PROFILE, arms, records)
    assert STUDY.quantities["heldout_size_error_percent"](results) == pytest.approx([0] * PROFILE.seeds, abs=1e-6)
    assert STUDY.quantities["heldout_ranks_error_percent"](results) == pytest.approx([0] * PROFILE.seeds, abs=1e-6)
    assert STUDY.quantities["time_predicted_block_over_best_block"](results) == pytest.approx([1] * PROFILE.seeds, rel=0.05)


def made_training(seconds: dict[str, float]) -> dict:
    """Iterations of given length, the same losses for all systems, half of the time communication."""
    rows = {name: [] for name in ("model", "system", "iteration", "loss", "seconds", "waited", "computing", "communicating")}
    for model in measured.MODELS:
        for system in SYSTEMS:
            for iteration in range(1, 9):
                each = seconds[system]
                row = (model, system, iteration, 5.0 - iteration / 4, each * iteration, 0.0, each / 2, each / 2)
                for name, value in zip(rows, row, strict=True):
                    rows[name].append(value)
    return rows


def test_speed_ups_are_ratios_of_the_times_to_the_same_loss():
    arms = STUDY.exhibit("figure5").arms(PROFILE)
    each = {system: 0.1 * (index + 1) for index, system in enumerate(SYSTEMS)}
    records = {t.key(): Made(t.replicate, {"iterations": made_training(each)}) for t in arms["training"]}
    results = Results(PROFILE, arms, records)
    ratio = each["BE fork-join"] / each["LP fork-join"]
    assert STUDY.quantities["speedup_lp_over_be_rnn"](results) == pytest.approx([ratio] * PROFILE.seeds)
    assert STUDY.quantities["communication_percent_lp_of_be_rnn"](results) == pytest.approx([100 / ratio] * PROFILE.seeds)
    assert STUDY.quantities["forkjoin_iteration_over_sum"](results) == pytest.approx([1] * PROFILE.seeds)
    assert STUDY.quantities["loss_difference_percent"](results) == pytest.approx([0] * PROFILE.seeds)


def test_without_records_quantities_are_nan_and_nothing_is_decided():
    for exhibit in ("figure3", "figure4", "figure5", "model"):
        arms = STUDY.exhibit(exhibit).arms(PROFILE)
        refused = {t.key(): Made(t.replicate, {}) for trials in arms.values() for t in trials}
        for verdict in STUDY.verdicts(exhibit, Results(PROFILE, arms, refused)):
            assert verdict.claim.kind in ("untestable", "exact") or verdict.verdict == "undecided", verdict


SMALL = Model(kind="rnn", corpus="made", corpus_size="smoke", hidden=16, layers=1, length=8, sparsity=0.5, batch=2, rate=0.5)


KEYS = ["d062eb3b4997e4cb", "7f2456c1b5949a9b"]


def test_keys_do_not_change():
    """Records are found by these: a new field needs a default, other code a new code_version."""
    drift = DriftTrial(model=SMALL, ranks=3, iterations=6)
    zeros = ZerosTrial(model=SMALL, target=0.8, ranks=2, steps=6, every=2, replicate=1)
    assert [trial.key()[:16] for trial in (drift, zeros)] == KEYS


def test_only_an_own_order_of_summation_lets_replicas_drift():
    """Three replicas, so that sums have an order."""
    outcome = DriftTrial(model=SMALL, ranks=3, iterations=6).run(None)
    assert outcome.metrics[f"drift, {FIXED_ORDER}"] == outcome.metrics[f"drift, {MULTIPLIED}"] == 0
    assert 0 < outcome.metrics[f"drift, {OWN_ORDER}"] < 1e-4
    assert set(outcome.curves["drift"]["way"]) == set(DRIFTS)


def test_pruning_from_the_start_keeps_the_largest_weights():
    torch.manual_seed(0)
    layer = torch.nn.GRU(8, 8)
    before = layer.weight_hh_l0.detach().clone()
    (mask, *_), zeros = list(kept_weights(layer, 0.75).values()), layer.weight_hh_l0 == 0
    assert int(zeros.sum()) == round(0.75 * before.numel())
    assert before.abs()[zeros].max() <= before.abs()[~zeros].min()
    assert mask.shape == layer.weight_ih_l0.shape


def exchange_kept() -> tuple[list[np.ndarray], list[np.ndarray]]:
    rank = torch.distributed.get_rank()
    masks = [torch.tensor([True, False, True]), torch.tensor([[False, True]])]
    gradients = [torch.arange(3.0) + rank, torch.ones(1, 2) * rank]
    KeptGradients(masks).allreduce(gradients)
    return [g.numpy() for g in gradients]


def test_kept_gradients_are_summed_and_the_others_are_zero():
    for first, second in run_ranks(exchange_kept, 2):
        assert first.tolist() == [1.0, 0.0, 5.0]
        assert second.tolist() == [[0.0, 1.0]]
