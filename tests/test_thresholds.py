"""Rules: which entries of dnet they remove, exactly, and what they hold over a training."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repro.errors import ReproError
from repro.gradients import ByRate, HeldSparsity, PrintedSigned, RelativeRMS, Rounded, Static, ThresholdedLSTM, TopK, record
from repro.gradients.structured import ColumnTopK
from repro.gradients.thresholds import as_rule
from repro.gradients.timing import DrawnColumns

DNET = [[-3.0, 1.0, 0.5, -0.5], [0.0, 2.0, -1.0, 0.25]]


def applied(rule, values=DNET):
    dnet = torch.tensor(values)
    assert rule(dnet) is dnet, "a rule works in place"
    return dnet.tolist()


def test_static_keeps_what_is_above_t_in_magnitude_and_drops_what_equals_it():
    assert applied(Static(0.5)) == [[-3.0, 1.0, 0.0, 0.0], [0.0, 2.0, -1.0, 0.0]]


def test_t_0_removes_nothing():
    assert applied(Static(0.0)) == DNET


def test_the_printed_rule_removes_every_negative_gradient_as_well():
    assert applied(PrintedSigned(0.5)) == [[0.0, 1.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]


def test_relative_rms_is_in_units_of_the_root_mean_square():
    rms = math.sqrt(sum(v * v for row in DNET for v in row) / 8)
    largest_removed, smallest_kept = 1.0, 2.0
    assert applied(RelativeRMS((largest_removed + 1e-3) / rms)) == [[-3.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]
    assert applied(RelativeRMS((smallest_kept + 1e-3) / rms)) == [[-3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_threshold_of_top_k_is_torchs_kth_magnitude_also_with_nan_and_infinity(dtype):
    dnet = torch.randn(7, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    dnet[2, 3], dnet[4, 5] = float("nan"), -float("inf")
    for k in (1, 100, 279, 280):
        found = TopK(min(k / 280, 0.999)).threshold(dnet)
        assert torch.equal(found, dnet.abs().flatten().kthvalue(k).values) or (k == 280 and found.isnan())
        assert found.dtype == dtype


@given(st.integers(1, 200), st.floats(0.0, 0.99), st.integers(0, 9))
def test_top_k_leaves_exactly_the_wanted_number_of_distinct_magnitudes(size, sparsity, seed):
    dnet = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).float().add(1.0)
    kept = TopK(sparsity)(dnet.clone())
    assert kept.count_nonzero() == size - round(sparsity * size)
    assert kept.max() == (size if round(sparsity * size) < size else 0)
    assert torch.equal(kept[kept != 0], dnet[kept != 0])


def test_zeros_that_are_there_count_for_the_wanted_sparsity():
    assert applied(TopK(0.5), [[0.0, 0.0, 3.0, 4.0]]) == [[0.0, 0.0, 3.0, 4.0]]


RULES = (Static(1e9), Static(1e39), PrintedSigned(1e9), RelativeRMS(3.0), TopK(0.9), HeldSparsity(0.9), ColumnTopK(0.9))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("others", [[1.0, math.nan], [1.0, 2.0], [math.inf, -1.0]])
def test_divergence_is_not_hidden(rule, others):
    """Neither NaN nor infinity becomes zero, whatever it does to the threshold."""
    before = torch.tensor([[*others, math.inf]])
    after = copy.deepcopy(rule)(before.clone())
    assert torch.equal(after.isnan(), before.isnan())
    assert torch.equal(after.isinf(), before.isinf())


def test_the_root_mean_square_of_numbers_whose_squares_float32_does_not_hold():
    for scale in (1e20, 1e-30):
        assert applied(RelativeRMS(1.0), [[scale, 2 * scale, -3 * scale]]) == [[0.0, 0.0, pytest.approx(-3 * scale)]]


@settings(max_examples=25)
@given(st.floats(1e-12, 1e12), st.integers(0, 5))
def test_rules_that_follow_the_gradient_do_not_depend_on_the_normalisation_of_the_loss(scale, seed):
    dnet = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for make in (lambda: RelativeRMS(0.8), lambda: TopK(0.8), lambda: HeldSparsity(0.8)):
        assert torch.equal(make()(dnet.clone()) != 0, make()(dnet * scale) != 0)
    ours, scaled = ByRate(1e-3), ByRate(1e-3)
    ours.update(0.1, dnet.norm().item())
    scaled.update(0.1, dnet.norm().item() * scale)
    assert scaled.known() == pytest.approx(ours.known() * scale)


def test_by_rate_removes_nothing_before_it_is_told_and_less_at_higher_rates():
    rule = ByRate(0.01)
    assert applied(rule) == DNET
    rule.update(rate=0.5, norm=20.0)
    assert rule.known() == pytest.approx(0.4)
    assert applied(rule) == [[-3.0, 1.0, 0.5, -0.5], [0.0, 2.0, -1.0, 0.0]]
    rule.update(rate=1.0, norm=20.0)
    assert rule.known() == pytest.approx(0.2)
    again = ByRate(0.01)
    again.load_state_dict(rule.state_dict())
    assert again.known() == rule.known()


def held(rule, scales, seed=0) -> list[float]:
    """Sparsity at each step, gradients of the given scales."""
    generator = torch.Generator().manual_seed(seed)
    return [1 - rule(scale * torch.randn(2000, generator=generator)).count_nonzero().item() / 2000 for scale in scales]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.95])
def test_held_sparsity_is_exact_at_first_and_follows_gradients_that_shrink_to_nothing(sparsity):
    """A factor of 10^4 in 1,000 steps; the error of the mean is what the docstring promises, plus the last step's noise."""
    steps = 1000
    rule = HeldSparsity(sparsity)
    found = held(rule, [1e-3 * 10 ** (-4 * k / steps) for k in range(steps)])
    assert found[0] == pytest.approx(sparsity, abs=1e-6)
    assert abs(sum(found) / steps - sparsity) < math.log(1e4) / steps + 1e-3
    assert max(abs(s - sparsity) for s in found) < 0.06


def test_held_sparsity_survives_a_jump_of_the_gradients():
    rule = HeldSparsity(0.8)
    found = held(rule, [1.0] * 20 + [1e-6] * 100 + [1.0] * 100)
    assert abs(sum(found[60:120]) / 60 - 0.8) < 0.02
    assert abs(sum(found[180:]) / 40 - 0.8) < 0.02


@pytest.mark.parametrize("batch", [8, 1])
def test_held_sparsity_survives_a_jump_after_a_batch_that_was_larger(batch):
    """A new start takes as many entries removed as two of the largest steps have, not steps of that size."""
    rule, generator = HeldSparsity(0.8), torch.Generator().manual_seed(0)
    zeros = []
    for step in range(600):
        scale, rows = (1.0 if step < 200 else 1e-4), (64 if step == 0 else batch)
        zeros.append(float((rule(scale * torch.randn(rows, 100, generator=generator)) == 0).double().mean()))
    assert sum(zeros[500:]) / 100 == pytest.approx(0.8, abs=0.03)


def test_a_dnet_of_zeros_changes_no_held_threshold():
    rule = HeldSparsity(0.5)
    rule(torch.zeros(8))
    assert rule.known() is None
    rule(torch.arange(1.0, 9.0))
    before = rule.known()
    rule(torch.zeros(8))
    assert rule.known() == before


def test_a_gain_of_thousands_loses_the_threshold_and_not_the_training():
    rule, dnet = HeldSparsity(0.5, gain=5000.0), torch.arange(1.0, 9.0)
    rule(dnet.clone())
    for kept in (8, 0, 8, 0):  # everything stays: log t grows by 2500; nothing does: it falls as far
        rule.observe(0, kept, 8, 8)
        assert rule.known() is None or 0.0 < rule.known() < math.inf


def test_a_rule_that_is_assigned_again_keeps_its_sites():
    rule = HeldSparsity(0.8)
    lstm = ThresholdedLSTM(3, 4, 2, threshold=rule)
    state = rule.state_dict()
    lstm.threshold = rule
    rule.load_state_dict(state)
    lstm.threshold = 0.0
    lstm.threshold = rule
    assert len(rule.state_dict()["logs"]) == len(state["logs"]) + 2, "after another one it starts anew"


def test_held_thresholds_are_one_a_site_and_survive_a_restart():
    rule = HeldSparsity(0.5)
    sites = [rule.new_site(), rule.new_site()]
    for site, scale in zip(sites, (1.0, 100.0), strict=True):
        rule(scale * torch.arange(1.0, 9.0), site)
    low, high = (rule.known(site) for site in sites)
    assert high == pytest.approx(100 * low)
    again = HeldSparsity(0.5)
    with pytest.raises(ReproError, match="state of 2 layers and directions: this rule has 0"):
        again.load_state_dict(rule.state_dict())
    again.new_site(), again.new_site()
    again.load_state_dict(rule.state_dict())
    assert [again.known(site) for site in sites] == [low, high]


# Spacing of numbers from 1 to 2, and the smallest number above 0, of IEEE 754 half precision and of bfloat16.
@pytest.mark.parametrize(("dtype", "spacing", "smallest"), [(torch.float16, 2**-10, 2**-24), (torch.bfloat16, 2**-7, 2**-133)])
def test_rounding_is_to_the_nearest_number_of_the_format_in_float32(dtype, spacing, smallest):
    dnet = torch.tensor([1 + 0.4 * spacing, 1 + 0.6 * spacing, -1.6 * smallest, 0.6 * smallest, 0.4 * smallest])
    rounded = Rounded(0.0, dtype)(dnet.clone())
    assert rounded.dtype == torch.float32
    assert rounded.tolist() == [1.0, 1.0 + spacing, -2 * smallest, smallest, 0.0]


def test_a_rule_sees_what_rounding_has_left():
    """9 entries of float16's smallest numbers, 0 to 4 of them once rounded: the rule counts and removes these."""
    dnet = torch.arange(9.0) * 2**-25
    held = HeldSparsity(0.5)
    rule = Rounded(held, torch.float16)
    site = rule.new_site()
    left = rule(dnet.clone(), site) * 2**24
    assert set(left.tolist()) <= {0.0, 3.0, 4.0}
    assert held.known(site) is not None
    again = Rounded(HeldSparsity(0.5), torch.float16)
    again.new_site()
    again.load_state_dict(rule.state_dict())
    assert again.rule.known(site) == held.known(site)
    with pytest.raises(ReproError, match=r"dtype of Rounded is torch.int8: it must be torch.bfloat16 or torch.float16"):
        Rounded(0.0, torch.int8)


@pytest.mark.parametrize("divisor", [1, 200, 1e6])
def test_a_training_keeps_the_wanted_sparsity_within_two_points_at_any_normalisation_of_the_loss(divisor):
    """Two layers learn to recall the input of the step before, SGD with momentum at a rate that undoes the normalisation."""
    torch.manual_seed(0)
    rule = HeldSparsity(0.8)
    lstm, head = ThresholdedLSTM(8, 24, 2, threshold=rule), nn.Linear(24, 8)
    parameters = [*lstm.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.003 * divisor, momentum=0.9)
    sparsities, losses = [], []
    for _ in range(150):
        symbols = torch.randint(8, (20, 10))
        with record(lstm) as measured:
            out = head(lstm(nn.functional.one_hot(symbols, 8).float())[0][1:])
            loss = nn.functional.cross_entropy(out.flatten(0, 1), symbols[:-1].flatten(), reduction="sum") / divisor
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.item() * divisor / 190)
        sparsities.append([measured[name].overall()["sparsity"] for name in ("l0", "l1")])
    assert losses[-1] < 0.5 * losses[0], "it learns"
    found = torch.tensor(sparsities)
    assert (found.mean(0) - 0.8).abs().max() < 0.005
    assert (found.unfold(0, 10, 10).mean(2) - 0.8).abs().max() < 0.02


def test_a_number_is_a_static_threshold_and_nothing_else_is_a_rule():
    assert as_rule(1e-6).known() == 1e-6
    assert as_rule(np.float32(0.5)).t == 0.5
    for wrong in (None, "0.1", True, torch.tensor(0.1)):
        with pytest.raises(ReproError, match="give a number t >= 0 or a rule"):
            as_rule(wrong)


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, "1", None, True])
@pytest.mark.parametrize("kind", [Static, PrintedSigned, RelativeRMS, ByRate])
def test_thresholds_are_finite_and_not_negative(kind, value):
    with pytest.raises(ReproError, match=r"it must be a finite number, at least 0"):
        kind(value)


def test_a_held_share_is_one_of_entries_where_sequences_end_early():
    """The last of ten steps are of few sequences, with gradients a thousand times smaller: 80 % of all entries are zero."""
    rule, generator = HeldSparsity(0.8), torch.Generator().manual_seed(0)
    zeros = entries = 0
    for _ in range(100):
        for sequences in (1, 3, 16, *[32] * 7):
            scale = 1e-3 if sequences < 16 else 1.0
            kept = rule(scale * torch.randn(sequences, 64, generator=generator))
            entries, zeros = entries + kept.numel(), zeros + int((kept == 0).sum())
    assert zeros / entries == pytest.approx(0.8, abs=0.01)


def test_a_small_step_in_every_pass_does_not_spoil_a_held_share():
    """Every tenth step of equally many sequences has gradients 10,000 times smaller, and is removed as a whole."""
    rule, generator = HeldSparsity(0.8), torch.Generator().manual_seed(0)
    zeros = [(rule((1e-4 if step % 10 == 9 else 1.0) * torch.randn(32, 64, generator=generator)) == 0) for step in range(1000)]
    assert all(zeros[9::10][k].all() for k in range(1, 100))
    assert torch.stack(zeros).double().mean() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan, "0.8", None])
@pytest.mark.parametrize("kind", [TopK, HeldSparsity, partial(DrawnColumns, seed=0)])
def test_a_wanted_sparsity_lies_in_0_to_1(kind, value):
    with pytest.raises(ReproError, match=r"sparsity is .*: it must be a number in \[0, 1\)"):
        kind(value)


def test_wrong_gains_rates_and_norms_are_named():
    with pytest.raises(ReproError, match="gain is 0"):
        HeldSparsity(0.8, gain=0)
    with pytest.raises(ReproError, match="learning rate is 0"):
        ByRate(1.0).update(0, 1.0)
    with pytest.raises(ReproError, match="gradient norm is nan"):
        ByRate(1.0).update(0.1, math.nan)
