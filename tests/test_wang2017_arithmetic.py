"""The third paper's numbers and claims are complete, and what is computed from them is what a pencil gives."""

import itertools
import re
from math import log2, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.report.published import load_published
from repro.report.verdicts import load_claims
from repro.studies.wang2017 import arithmetic as a

PUBLISHED = {"table1", "table2", "figure2", "figure3", "figure4", "figure5", "audit", "prose"}
EXHIBITS = {
    "table1", "table2", "figure1", "figure2", "figure3", "figure4", "figure5",
    "audit", "model", "drift", "overlap", "sparse", "scaling",
}  # fmt: skip

# b = 64 KB in bytes, and n = 200 MB, alpha = 0.1 us, beta = 1 ns; LP broadcast: (p - 1 + n/b) alpha + (b (p - 1) + n) beta.
B, N = 65_536, 200e6


def pipeline(p, b=B, n=N, alpha=1e-7, beta=1e-9):
    return (p - 1 + n / b) * alpha + (b * (p - 1) + n) * beta


# Most communication over computation that rounding leaves LP-Alg.1 on GoogLeNet: 6.5% of BE-Alg.1's, from 1.65x.
LP = 0.065 * 0.65 / (1 - 1.65 * 0.065)

# Name of an exact quantity -> the number, worked out by hand.
BY_HAND = {
    "be_over_lp_limit_many_ranks": 2,  # 2 (p - 1) / p
    "broadcast_be_over_lp_limit": 1.5,  # 2 * 3 / 4
    "allreduce_be_over_lp_limit": 0.75,  # 3 / 4
    "mst_over_lp_limit_smallest": 2,  # log2 4
    "eq3_ratio_at_12_kilobytes": 2 / (64 * 3 / 12 + 1),
    "lp_broadcast_8_over_2": pipeline(8) / pipeline(2),
    # allreduce: twice everything, broadcast and reduce: once; the same ratio
    "lp_20_over_2_largest": pipeline(20) / pipeline(2),
    "lp_broadcast_256_over_2": pipeline(256) / pipeline(2),
    "be_broadcast_limit_6_over_2": 5 / 3,
    "block_64_kilobytes_over_best": pipeline(4) / pipeline(4, b=81_649.66),  # sqrt(200e6 * 1e-7 / 3e-9)
    "block_64_kilobytes_over_best_slow_start": pipeline(4, alpha=1e-5) / pipeline(4, b=816_496.6, alpha=1e-5),
    "start_up_percent": 100 / 655.36,  # 0.1 us against the 65.536 us of a block
    "mst_be_switch_kilobytes": 600 / 1024,  # 2 alpha + 2 n beta = 5 alpha + 1.5 n beta: n = 6 alpha / beta
    "alexnet_megabytes": 244,
    "broadcast_lp_over_lower_bound": 1,
    "allreduce_lp_over_lower_bound": 4 / 3,  # 2 n beta over 1.5 n beta
    "pipeline_steps": 5,  # Figure 2b: d'' is finished in step 5
    "broadcast_and_reduce_steps": 10,
    "figure2_allreduce_steps": 9,
    "figure2_first_spread_step": 5,
    "printed_allreduce_steps": 12,  # 2 (3 - 1 + 4)
    "lp_over_ring_busiest_rank_bytes": 4 / 3,  # an inner rank passes n bytes either way; on a ring 2 n 3/4
    "mst_numbers_of_steps_that_differ": 0,
    "listing_layers_not_reduced": 1,
    "listing_layers_that_do_not_exist": 1,
    "be_collision_smallest": 10
    / 7,  # 8 ranks: n 7/8 out, and back n (1/8 + 1/4 + 1/2), of which 1/4 and 1/2 take twice as long
    "mst_collision_smallest": 1,
    "broadcast_mst_over_lp_printed_over_theory": 2.3 / 2,
    "be_over_lp_printed_over_theory_smallest": 29.2 / 1.5,
    "mst_over_lp_printed_over_theory_smallest": 7.9 / 2,
    "smallest_printed_factor_over_open_mpi": 29.2,
    "largest_printed_factor_over_open_mpi": 360.55,
    "devices_of_figure3": 4,
    "googlenet_printed_speedup_over_mst": 1.1,
    "alexnet_best_overlap_gain": 1 + 0.915 / (1 - 1.915 * 0.105),
    "googlenet_best_overlap_gain": 1 + 0.65 / (1 - 1.65 * 0.065),
    "googlenet_printed_overlap_gain": 2.19 / 1.6,
    "alexnet_lp_over_mst_nearest": 1.74,  # 1.73 to 1.91 are possible
    "googlenet_lp_over_mst_nearest": (1 + LP / 0.425) / (1 + LP),  # 1.04 to 1.06 are possible
    "algorithms_with_two_numbers": 3,
}


@pytest.mark.parametrize(("name", "expected"), BY_HAND.items())
def test_quantity_is_what_a_pencil_gives(name, expected):
    """Each exact quantity against its closed form, with the numbers of the paper typed here."""
    assert a.EXACT[name]() == pytest.approx(expected, rel=2e-5)


def test_simulated_times_follow_from_the_slowest_link():
    """A chain fills a bridge of half the rate to the last: the jump is 2 less the start of the pipeline, and flat elsewhere."""
    assert a.EXACT["lp_bridge_jump"]() == pytest.approx(2, rel=1e-3)
    assert a.EXACT["lp_change_away_from_bridge"]() == pytest.approx(1 + 1 / 3052, rel=1e-4)
    assert a.EXACT["lp_collision_largest"]() == pytest.approx(1, abs=0.01)
    assert set(a.EXACT) - set(BY_HAND) == {"lp_bridge_jump", "lp_change_away_from_bridge", "lp_collision_largest"}


def test_exact_claims_and_quantities_are_the_same():
    """A claim without its number would stop the study, a number without its claim would be dead."""
    assert {claim.quantity for claim in load_claims("wang2017") if claim.kind == "exact"} == set(a.EXACT)


@pytest.mark.parametrize(
    ("value", "low", "high"), [(1.91, 1.905, 1.915), (1.6, 1.55, 1.65), (10, 9.5, 10.5), (360.55, 360.545, 360.555)]
)
def test_rounding_is_half_a_unit_of_the_last_printed_digit(value, low, high):
    """The digits printed say how well a number is known."""
    assert a.rounding(value) == pytest.approx((low, high), abs=1e-12)


@given(c=st.floats(0.01, 20), percent=st.floats(0, 90))
@settings(max_examples=50)
def test_communication_inverts_the_speed_up(c, percent):
    """From a speed-up made with a known share of communication that share comes back."""
    assert a.communication((1 + c) / (1 + percent / 100 * c), percent) == pytest.approx(c, rel=1e-6)


@pytest.mark.parametrize(
    ("model", "speedup", "be_percent", "mst_percent"), [("AlexNet", 1.91, 10, 11), ("GoogLeNet", 1.6, 6, 43)]
)
def test_intervals_hold_all_that_rounding_allows(model, speedup, be_percent, mst_percent):
    """The ends of the intervals are those of a search over all unrounded numbers, not of a guess which end is larger."""
    ends = [
        (v - half, v, v + half)
        for v, half in ((speedup, 10.0 ** -len(str(speedup)[2:]) / 2), (be_percent, 0.5), (mst_percent, 0.5))
    ]
    gains, trees = [], []
    for s, r, q in itertools.product(*ends):
        c = (s - 1) / (1 - s * r / 100)
        lp = c * r / 100
        gains.append(1 + c)
        trees.append((1 + 100 * lp / q) / (1 + lp))
    for found, all_values in ((a.best_overlap_gain(model, "BE-Alg.1"), gains), (a.lp_over_mst(model), trees)):
        assert (found.low, found.high) == pytest.approx((min(all_values), max(all_values)), rel=1e-9)
        assert found.low < found.value < found.high


@pytest.mark.parametrize("layers", [1, 2, 9])
def test_the_listing_forgets_layer_0_and_invents_one(layers):
    """Whatever the number of layers: the loops as printed reduce 1 to max_layers and broadcast one layer too many."""
    broadcast, reduced = a.listing_layers(layers)
    assert reduced == set(range(1, layers))
    assert broadcast == set(range(layers + 1))


def test_derived_numbers_follow_from_the_others():
    """Every number tagged as derived in the paper's file comes out again, to the digits given there: a typing check."""
    frame = load_published("wang2017")
    derived = {
        (r.exhibit, r.series, r.metric, None if r.x != r.x else r.x): r.value
        for r in frame[frame["known"] == "derived"].itertuples()
    }
    expected = {}
    for p in (2, 3, 4, 6, 8):
        expected["table1", "BE over LP, broadcast and reduce", "speedup", p] = round(a.equation2(p), 2)
    for p in (2, 4, 6):
        expected["table1", "BE over LP, allreduce", "speedup_limit", p] = round((p - 1) / p, 2)
    expected["table1", "best block, 200 MB", "kilobytes", 4] = round(sqrt(200e6 * 1e-7 / 3e-9) / 1024)
    expected["table1", "best block, 200 MB", "kilobytes", 6] = round(sqrt(200e6 * 1e-7 / 5e-9) / 1024)
    expected["table1", "best block, 50 MB", "kilobytes", 4] = round(sqrt(50e6 * 1e-7 / 3e-9) / 1024)
    expected["table1", "best block, alpha of 10 us", "multiple", None] = 10
    expected["table1", "message of Figure 4, 64 KB blocks", "blocks", None] = round(N / B)
    expected["table1", "BE broadcast over 2 GPUs", "growth", 6] = 1.67
    expected["table1", "constants", "beta_seconds_per_byte", None] = 1e-9
    expected["table1", "constants, sockets", "alpha_seconds", None] = 1e-5
    expected["table1", "AlexNet", "megabytes_recomputed", None] = 244
    expected["figure2", "allreduce", "sum_back_on_gpu0", None] = 3
    expected["figure2", "one collective", "steps", None] = a.lp_steps("broadcast")
    expected["figure2", "one collective, Table 1", "steps", None] = 3 - 1 + 4
    expected["figure2", "both collectives, Table 1", "steps", None] = 2 * (3 - 1 + 4)
    expected["figure3", "reduce over broadcast", "mst_speedup_ratio", None] = round(8.7 / 2.3, 2)
    for model, digits in (("AlexNet", 3), ("GoogLeNet", 2)):
        c, gain = a.be_communication(model), a.best_overlap_gain(model, "BE-Alg.1")
        names = {"": 0} if model == "AlexNet" else {"": 0, "_low": 1, "_high": 2}
        for name, i in names.items():
            expected["audit", model, f"be_communication_over_computation{name}", None] = round(c[i], digits)
            expected["audit", model, f"best_overlap_over_be{name}", None] = round(gain[i], digits)
        expected["audit", model, "lp_over_mst", None] = round(a.lp_over_mst(model).value, 2)
    expected["audit", "broadcast and reduce", "number_in_section_4_2", None] = 1
    expected["audit", "allreduce", "number_in_section_4_2", None] = 2
    assert derived == expected


def test_equations_2_and_3_are_the_ratios_of_the_printed_costs():
    """Without alpha and gamma the simplified equations are the table's own ratios, at any number of GPUs."""
    link = a.Link(0.0, a.paper_link().beta)
    for p in (2, 3, 4, 8):
        lp, mst, be = (
            a.printed_cost("reduce", name, p, a.paper_message(), link, a.paper_block()) for name in (a.LP, a.MST, a.BE)
        )
        assert be / lp == pytest.approx(a.equation2(p))
        assert mst / lp == pytest.approx(a.equation3(p, a.paper_message()))
        assert a.equation3(p, 1e12) == pytest.approx(log2(p), rel=1e-5)


def test_the_audit_shows_where_printed_numbers_disagree():
    """GoogLeNet's overlap is out of reach of its own ratios, and even further over LP-Alg.1; AlexNet's is not."""
    rows = {row.statement: row for row in a.paper_arithmetic()}
    assert len(rows) == len(a.paper_arithmetic())
    over_be, over_lp = (rows[f"GoogLeNet, overlap over {base}, at most"] for base in ("BE-Alg.1", "LP-Alg.1"))
    assert (over_be.printed, round(over_be.recomputed, 2)) == (2.19, 1.66)
    assert (round(over_lp.printed, 2), round(over_lp.recomputed, 2)) == (1.37, 1.04)
    fits = rows["AlexNet, overlap over BE-Alg.1, at most"]
    assert fits.printed == pytest.approx(fits.recomputed, abs=0.006)
    assert rows["steps of the allreduce, chain"].recomputed == 7  # 2 p - 3 + n/b
    assert all(row.note for row in rows.values())


def test_published_numbers_are_complete():
    """Every table and figure with numbers in it has rows; nothing is read off an image."""
    frame = load_published("wang2017")
    assert set(frame["exhibit"]) == PUBLISHED
    assert set(frame["known"]) == {"read", "remembered", "derived"}


def test_claims_are_in_order_and_name_their_exhibits():
    """Ids count on, references between claims exist, all kinds occur, and a reader meets 5 to 7 headlines."""
    claims = load_claims("wang2017")
    assert [claim.id for claim in claims] == [f"W{i}" for i in range(1, len(claims) + 1)]
    assert {claim.exhibit for claim in claims} == EXHIBITS
    assert {claim.kind for claim in claims} == {"exact", "substituted", "machine", "untestable"}
    assert 5 <= sum(claim.headline for claim in claims) <= 7
    ids = {claim.id for claim in claims}
    assert all(set(re.findall(r"W\d+", claim.instead)) <= ids - {claim.id} for claim in claims)


def test_the_range_of_a_factor_is_the_papers_number_and_20_percent():
    """A measured claim whose paper's number is a factor or percentage holds within 20 % of it, cut only at its direction."""
    for claim in load_claims("wang2017"):
        number = re.match(r"(?:approximately )?([\d.]+)(x|%)", claim.paper)
        if claim.kind == "machine" and number and claim.holds != claim.trend:
            value = float(number[1])
            expected = [max(0.8 * value, claim.trend[0]), min(1.2 * value, claim.trend[1])]
            assert list(claim.holds) == pytest.approx(expected, abs=1e-9), claim.id
