"""Arms against each other, seed by seed: a seed that diverged or was not run is never taken for a result."""

import math

import numpy as np
import pytest

from repro.engine import Record
from repro.studies import STUDIES
from repro.studies.base import Results
from repro.studies.comparing import paired, relative_percent

# Two whose values are of what did not diverge: recipes that learned something, and the replicas within one record.
OF_OTHERS = {"recipe_zeros_nearest_80", "loss_difference_percent"}


def test_pairs_with_and_without_a_result():
    ours, base = np.array([(3, 2), (math.nan, 2), (3, math.nan), (math.inf, 2), (3, math.inf), (math.inf, math.inf)]).T
    lost = [math.nan, math.nan, math.inf, math.inf, math.inf]
    np.testing.assert_array_equal(paired(np.subtract, ours, base), [1, *lost])
    np.testing.assert_array_equal(paired(np.divide, ours, base), [1.5, *lost])
    np.testing.assert_array_equal(relative_percent(ours, base), [50, *lost])


@pytest.mark.parametrize("study", STUDIES.values(), ids=list(STUDIES))
def test_a_seed_that_diverged_under_all_arms_decides_no_claim(study):
    """Infinity less infinity is not a number, which would pass for a seed that was not run."""
    profile = study.profile("paper")
    claims = [claim for claim in study.claims() if claim.kind == "substituted" and claim.quantity not in OF_OTHERS]
    assert claims
    for claim in claims:
        arms = study.exhibit(claim.exhibit).arms(profile)
        trials = {trial.key(): trial for trials in arms.values() for trial in trials}
        records = {key: Record(key, t.study, t.kind, t.describe(), {}, {}, True, {}) for key, t in trials.items()}
        assert np.isinf(study.quantities[claim.quantity](Results(profile, arms, records))).all(), claim.id
