"""Known constants come back from made times, intervals cover them, and what cannot be told is said."""

import itertools
import math

import numpy as np
import pytest

from repro.collectives.costs import Link, cost
from repro.collectives.fitting import Fit, Measurement, fit, predict, prediction_errors
from repro.collectives.schedules import ALGORITHMS, COLLECTIVES
from repro.errors import ReproError

LINK = Link(2e-5, 3e-10, 1e-10)
SIZES = (2**12, 2**16, 2**20, 2**24)


def made(link=LINK, noise=0.0, repeats=1, seed=0, ranks=(2, 4), sizes=SIZES, algorithms=ALGORITHMS, collectives=COLLECTIVES):
    """Times by the model, with relative normal noise; pipelines and rings in one block and in blocks of 64 KiB."""
    rng = np.random.default_rng(seed)
    return [
        Measurement(*setting, cost(*setting[:4], link, setting[4]) * (1 + noise * rng.standard_normal()))
        for setting in itertools.product(collectives, algorithms, ranks, sizes, (None, 2**16))
        for _ in range(repeats)
    ]


def constants(link):
    return np.array([link.alpha, link.beta, link.gamma])


def test_exact_times_give_their_constants():
    """Without noise the constants are exact, the intervals have no width, and nothing is mispredicted."""
    found = fit(made())
    link, low, high = found.estimates[None]
    for values in (constants(link), low, high):
        assert values == pytest.approx(constants(LINK), rel=1e-9)
    errors = prediction_errors(found, made(ranks=(3, 8), sizes=(2**18, 2**26)))
    assert np.abs(errors.relative).max() < 1e-9
    assert errors.high < 1e-9


def test_constants_solve_the_normal_equations():
    """By hand: three algorithms, whose rows over time are known, against numpy's unconstrained least squares."""
    rows = made(noise=0.1, ranks=(4,), algorithms=("minimum spanning tree",))
    columns = {"broadcast": (2, 2, 0), "reduce": (2, 2, 2), "allreduce": (4, 4, 2)}
    system = [np.array(columns[row.collective]) * (1, row.nbytes, row.nbytes) / row.seconds for row in rows]
    scale = np.linalg.norm(system, axis=0)
    expected = np.linalg.lstsq(system / scale, np.ones(len(rows)), rcond=None)[0] / scale
    assert (expected > 0).all()
    assert constants(fit(rows, resamples=10).estimates[None].link) == pytest.approx(expected, rel=1e-9)


def test_intervals_cover_the_constants_as_often_as_they_promise():
    """40 data sets with 3 % noise: of 120 intervals of 95 %, at least 102 hold their constant (99.9 % of such binomials)."""
    covered = 0
    for seed in range(40):
        link, low, high = fit(made(noise=0.03, repeats=2, seed=seed), resamples=200, seed=seed).estimates[None]
        assert constants(link) == pytest.approx(constants(LINK), rel=0.1)
        covered += ((np.array(low) <= constants(LINK)) & (constants(LINK) <= high)).sum()
    assert covered >= 102


def test_no_constant_is_negative():
    """Adding that seems to take less than no time is taken to be free."""
    cheap_reduce = [
        row._replace(seconds=row.seconds * (0.5 if row.collective == "reduce" else 1)) for row in made(Link(1e-5, 1e-9))
    ]
    assert fit(cheap_reduce, resamples=10).estimates[None].link.gamma == 0


def test_one_link_for_each_algorithm():
    """Two algorithms on unlike links: each gets its own back, and one link for both predicts neither."""
    links = {"ring": Link(1e-5, 1e-9, 1e-10), "minimum spanning tree": Link(4e-5, 2e-9, 5e-10)}
    rows = [row for algorithm, link in links.items() for row in made(link, algorithms=(algorithm,))]
    apart, together = fit(rows, by="algorithm", resamples=10), fit(rows, resamples=10)
    for algorithm, link in links.items():
        assert constants(apart.estimates[algorithm].link) == pytest.approx(constants(link), rel=1e-9)
    assert prediction_errors(apart, rows).median < 1e-9 < 0.1 < prediction_errors(together, rows).median
    with pytest.raises(ReproError, match="unknown algorithm of a fit 'all-to-all': choose one of"):
        predict(apart, made(algorithms=("all-to-all",)))


def test_errors_are_signed_and_summed_up_by_their_median():
    """A fit of constants twice too large is 100 % above; half of the rows 10 % slower are predicted 9.1 % too fast."""
    exact = fit(made(), resamples=10)
    halves = [row._replace(seconds=row.seconds / 2) for row in made()]
    assert prediction_errors(exact, halves).relative == pytest.approx(np.ones(len(halves)))
    slower = [row._replace(seconds=row.seconds * 1.1) if row.ranks == 4 else row for row in made()]
    errors = prediction_errors(exact, slower)
    assert sorted(set(errors.relative.round(6))) == pytest.approx([1 / 1.1 - 1, 0], abs=1e-6)
    assert 0 <= errors.low <= errors.median <= errors.high <= 0.1 / 1.1 + 1e-9


def test_predictions_are_costs():
    """And need no times."""
    (row,) = made(ranks=(4,), sizes=(2**20,), algorithms=("ring",), collectives=("reduce",))[:1]
    expected = cost("reduce", "ring", 4, 2**20, fit(made(), resamples=10).estimates[None].link)
    assert predict(fit(made(), resamples=10), [row._replace(seconds=math.nan)]) == pytest.approx([expected])


def test_the_bootstrap_is_seeded():
    rows = made(noise=0.1)
    assert fit(rows, resamples=50) == fit(rows, resamples=50)
    assert fit(rows, resamples=50).estimates[None].low != fit(rows, resamples=50, seed=1).estimates[None].low


def test_repeats_of_a_setting_are_drawn_together():
    """Copies of every row add no knowledge: the interval is as wide as without them."""
    rows = made(noise=0.1)
    assert fit(rows * 5, resamples=50).estimates[None].low == pytest.approx(fit(rows, resamples=50).estimates[None].low)


@pytest.mark.parametrize(
    ("collectives", "algorithms"), [(("broadcast",), ALGORITHMS), (("allreduce",), ("ring", "all-to-all"))]
)
def test_gamma_is_0_where_it_is_not_told(collectives, algorithms):
    """Nothing is added in a broadcast; in a ring's allreduce half of all bytes are: beta then stands for both."""
    rows = made(collectives=collectives, algorithms=algorithms)
    link, low, high = fit(rows, resamples=50).estimates[None]
    both = LINK.beta + (LINK.gamma / 2 if collectives == ("allreduce",) else 0)
    assert constants(link) == pytest.approx([LINK.alpha, both, 0], rel=1e-9)
    assert math.isnan(low[2]) and math.isnan(high[2])
    assert prediction_errors(Fit(None, {None: fit(rows, resamples=10).estimates[None]}), rows).median < 1e-9


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no measurements"),
        ([made()[0]._replace(seconds=0.0), made()[1]], "1 of 2 times are not positive and finite"),
        ([made()[0]._replace(seconds=math.nan), made()[1]], "1 of 2 times are not positive and finite"),
        (made(sizes=(4096,)), "all times of a fit are of 4096 bytes: give two lengths or more"),
        ([("broadcast", "linear pipeline", 4, size, 1024, 1.0) for size in SIZES], "as many bytes a message"),
    ],
)
def test_times_that_tell_too_little_are_told(rows, message):
    with pytest.raises(ReproError, match=message):
        fit(rows)


def test_unknown_fields_are_told():
    with pytest.raises(ReproError, match="unknown field 'colour': choose one of collective, algorithm, ranks, nbytes, block"):
        fit(made(), by="colour")
