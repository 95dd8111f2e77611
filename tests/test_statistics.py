"""The bootstrap agrees with enumeration, with the normal limit and with itself; pairing never mixes seeds."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from repro.errors import ReproError
from repro.report.statistics import bootstrap_band, bootstrap_interval, paired, relative_percent


def test_interval_agrees_with_enumerating_every_resample():
    """For 4 seeds all 256 resamples can be listed: the sampled quantiles are among the neighbouring exact means."""
    values = np.array([1.0, 2.0, 4.0, 9.0])
    means = np.sort([np.mean(resample) for resample in itertools.product(values, repeat=4)])
    mean, low, high = bootstrap_interval(values, level=0.8)
    assert mean == values.mean()
    for bound, level in ((low, 0.1), (high, 0.9)):
        assert np.quantile(means, level - 0.02) <= bound <= np.quantile(means, level + 0.02)


def test_three_seeds_give_their_range():
    """1 resample in 27 repeats the smallest of three values, more than 2.5 %: the 95 % interval is the range."""
    assert bootstrap_interval([3.0, 1.0, 2.0]) == pytest.approx((2, 1, 3))


@pytest.mark.parametrize("seeds, covered", [(3, 0.75), (5, 0.83)])
def test_few_seeds_cover_less_than_the_level(seeds, covered):
    """The mean of normal samples, as the docstring says."""
    _, low, high = bootstrap_band(np.random.default_rng(1).standard_normal((seeds, 5000)), resamples=2000)
    assert ((low <= 0) & (high >= 0)).mean() == pytest.approx(covered, abs=0.02)


def test_many_seeds_approach_the_normal_interval():
    """With 400 normal values the half width is 1.96 standard errors, to the 3 % that resampling leaves."""
    values = np.random.default_rng(1).normal(size=400)
    mean, low, high = bootstrap_interval(values)
    standard_error = values.std() / math.sqrt(400)
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error, rel=0.03)
    assert low < mean < high


def test_same_seed_same_interval():
    """The interval is a function of the values and the seed, and the seed is used."""
    values = np.random.default_rng(2).normal(size=7)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_one_value_has_no_interval():
    """One seed: a mean, and NaN for the bounds; equal seeds: an interval of no width."""
    mean, low, high = bootstrap_interval([5.0])
    assert mean == 5 and math.isnan(low) and math.isnan(high)
    mean, low, high = bootstrap_interval([0.1, 0.1, 0.1])
    assert low == high == pytest.approx(0.1)


def test_band_is_the_interval_at_each_point():
    """Column by column the band is the interval: the same whole seeds are drawn at every point."""
    curves = np.random.default_rng(3).normal(size=(5, 4))
    band = np.array(bootstrap_band(curves)).T
    assert band == pytest.approx(np.array([bootstrap_interval(column) for column in curves.T]))


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [1.0, math.inf]])
def test_nothing_is_averaged_away(values):
    """No seeds, or a seed that is not finite, is an error and not a quiet mean of the rest."""
    with pytest.raises(ReproError):
        bootstrap_interval(values)


def test_pairs_match_seeds_whatever_the_row_order():
    """Rows are matched by replicate; a replicate that only one arm has is left out."""
    sparse = pd.DataFrame({"replicate": [2, 0, 1], "cer": [14.0, 11.0, 12.0]})
    dense = pd.DataFrame({"replicate": [0, 1, 3], "cer": [10.0, 10.0, 1.0]})
    ours, base = paired(sparse, dense, "cer")
    assert ours.tolist() == [11, 12] and base.tolist() == [10, 10]
    assert relative_percent(ours, base) == pytest.approx([10, 20])


def test_pairing_refuses_mixed_settings():
    """Two rows for one seed mean two settings in one arm; a missing column is named."""
    arm = pd.DataFrame({"replicate": [0, 0], "cer": [1.0, 2.0]})
    with pytest.raises(ReproError, match="several rows for one replicate"):
        paired(arm, arm.head(1), "cer")
    with pytest.raises(ReproError, match=r"no column 'wer': it has replicate, cer"):
        paired(arm.head(1), arm.head(1), "wer")
