"""A verdict is what the rule and the interval allow, and never kinder."""

import math

import pytest

from repro.errors import ReproError
from repro.report.verdicts import FAILS, HOLDS, NOT_TESTABLE, TREND, UNDECIDED, Claim, decide, prefer


def claim(kind="substituted", holds=(5.0, 15.0), trend=(0.0, math.inf)):
    return Claim(
        study="toy", id="T1", topic="Accuracy", text="It is worse.", where="Table 1", exhibit="table1", paper="10%",
        kind=kind, quantity="relative_cer", definition="ours over theirs", unit="%", holds=holds, trend=trend,
    )  # fmt: skip


@pytest.mark.parametrize(("value", "word"), [(5, HOLDS), (15, HOLDS), (15.001, FAILS), (-1, FAILS)])
def test_exact_claims_hold_or_fail(value, word):
    """Arithmetic holds inside the range, bounds included, and fails outside; there is nothing between."""
    decided = decide(claim("exact", trend=None), value)
    assert (decided.verdict, decided.value, decided.n) == (word, value, 1)
    assert "between 5 and 15" in decided.reason


@pytest.mark.parametrize("values", [[1.0, 2.0], math.nan])
def test_exact_claims_take_one_number(values):
    """Several numbers, or none, for an exact claim is a mistake of the study, not a verdict."""
    with pytest.raises(ReproError, match="one finite number"):
        decide(claim("exact", trend=None), values)


@pytest.mark.parametrize(
    ("values", "word", "said"),
    [
        ([8, 9, 10, 12], TREND, "also between 5 and 15"),
        ([1, 2, 3], TREND, "none of it between 5 and 15"),
        ([4, 9, 10], TREND, "not all of it"),
        ([-3, -2, -1], FAILS, "above 0"),
        ([-1, 5, 6], UNDECIDED, "reaches the bound 0"),
        ([0, 5, 6], UNDECIDED, "reaches the bound 0"),
        ([0, 0, 0], UNDECIDED, "reaches the bound 0"),
        ([8, 9], UNDECIDED, "2 of at least 3 seeds"),
        ([-8], UNDECIDED, "1 of at least 3 seeds"),
    ],
)
def test_measured_claims_are_decided_by_their_interval(values, word, said):
    """Inside the trend range: a trend; outside: fails; on a bound or with too few seeds: undecided, saying which."""
    decided = decide(claim(), values, "made speech")
    assert decided.verdict == word and said in decided.reason and "made speech" in decided.reason
    assert decided.n == len(values)


@pytest.mark.parametrize("kind", ["substituted", "machine"])
def test_other_data_never_holds_outright(kind):
    """However well the numbers agree, other data or another machine makes a trend at best, and the reason names which."""
    decided = decide(claim(kind), [9.9, 10, 10.1])
    assert decided.verdict == TREND
    assert {"substituted": "data other than the paper's", "machine": "another machine"}[kind] in decided.reason


def test_own_data_may_hold_but_another_machine_may_not():
    """On the paper's own corpus the paper's range decides; a time stays a time of another machine."""
    assert decide(claim(), [9, 10, 11], papers_own_data=True).verdict == HOLDS
    assert decide(claim(), [1, 2, 3], papers_own_data=True).verdict == TREND
    assert decide(claim("machine"), [9, 10, 11], papers_own_data=True).verdict == TREND


def test_both_bounds_are_named():
    """An interval wider than the range is undecided and says both bounds."""
    assert "bound 8 and 12" in decide(claim(holds=(9.0, 11.0), trend=(8.0, 12.0)), [1, 10, 20]).reason


def test_diverged_seeds_are_counted_and_never_help():
    """A NaN seed is told, cannot be averaged away into a trend, and does not hide a failure."""
    nan = math.nan
    decided = decide(claim(), [8, 9, nan, 10, 12])
    assert decided.verdict == UNDECIDED and decided.n == 4 and "1 of 5 seeds diverged" in decided.reason
    assert decide(claim(), [-8, -9, -10, nan]).verdict == FAILS
    assert decide(claim(), [nan, nan, nan]).verdict == UNDECIDED


def test_a_narrower_range_is_named_where_there_is_one():
    """Where the paper gives only a direction, the reason speaks of no other range."""
    assert "which holding takes" not in decide(claim(holds=(0.0, math.inf)), [8, 9, 10]).reason
    assert "none of it between 8 and 12, which holding takes" in decide(claim(holds=(8.0, 12.0)), [1, 2, 3]).reason


def test_without_records_or_test():
    """Nothing run: undecided. Untestable: says why and what is shown instead."""
    for nothing in (None, []):
        assert decide(claim(), nothing).verdict == UNDECIDED
    untestable = Claim(
        study="toy", id="T2", topic="Speed", text="It is fast.", where="abstract", exhibit="table1", paper="146x",
        kind="untestable", reason="No such card.", instead="sizes are recomputed.",
    )  # fmt: skip
    decided = decide(untestable)
    assert decided.verdict == NOT_TESTABLE and decided.reason == "No such card. Instead: sizes are recomputed."


def test_a_larger_profile_with_too_few_seeds_does_not_silence_a_smaller_one():
    """Two seeds decide nothing, three or more do; where the smaller profile has no more, the larger one speaks."""
    of = {n: decide(claim(), [1.0, 2.0, 3.0, 4.0][:n]) for n in range(5)}
    for larger, smaller, chosen in ((0, 3, 3), (2, 3, 3), (3, 3, 3), (3, 4, 3), (4, 3, 4), (1, 0, 1), (2, 2, 2)):
        found = prefer(of[larger], of[smaller] if larger != smaller else decide(claim(), [9.0] * smaller))
        assert found is of[chosen]
