"""Schedules against the paper's formulas, quantiles and sparsity counts against counting by hand."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from repro.errors import ReproError
from repro.pruning import (
    AutoRamp,
    Cubic,
    GradualPruner,
    HardPrune,
    Ramp,
    dense_quantiles,
    magnitude_quantile,
    prunable_weights,
    sparsity,
    table1,
)

PAPER = {"start": 2700, "ramp": 13750, "end": 27500}  # the text rounds the start of the second epoch, 2750, to 2700

properties = settings(deadline=None, derandomize=True, database=None)


@st.composite
def ramps(draw, phi=None):
    start = draw(st.integers(0, 500))
    flat, steep = draw(st.integers(0, 500)), draw(st.integers(0, 500))
    freq = draw(st.integers(1, 200))
    assume((start + flat + steep - 1) // freq * freq > start)  # a refresh falls inside
    return Ramp(
        q=draw(st.floats(1e-3, 10)),
        start=start,
        ramp=start + flat,
        end=start + flat + steep,
        freq=freq,
        phi=draw(st.floats(0.5, 4)) if phi is None else phi,
    )


def shuffled(n, seed=0):
    """n distinct magnitudes, 1/n to 1, in random order."""
    return (torch.randperm(n, generator=torch.Generator().manual_seed(seed)) + 1) / n


# Narang's ramp


def test_theta_is_equation_1():
    """2 q freq / (2 (ramp - start) + 3 (end - ramp)), with the paper's iterations and q = 0.1 worked out by hand."""
    assert Ramp(0.1, **PAPER, freq=100).theta == pytest.approx(2 * 0.1 * 100 / (2 * 11050 + 3 * 13750))
    assert Ramp(0.1, **PAPER, freq=100).theta == pytest.approx(20 / 63350)


@properties
@given(ramps(phi=1.5))
def test_threshold_ends_at_q_for_phi_one_and_a_half(ramp):
    """But for the two "+ 1" of Algorithm 1: epsilon(end) = q (1 + 5 / (2 (ramp - start) + 3 (end - ramp)))."""
    steps = 2 * (ramp.ramp - ramp.start) + 3 * (ramp.end - ramp.ramp)
    assert ramp.threshold(ramp.end) == pytest.approx(ramp.q * (1 + 5 / steps))


@properties
@given(ramps())
def test_threshold_at_the_end_for_any_phi(ramp):
    """epsilon(end) = 2 q (flat + 1 + phi (steep + 1)) / (2 flat + 3 steep): phi counts in thetas."""
    flat, steep = ramp.ramp - ramp.start, ramp.end - ramp.ramp
    expected = 2 * ramp.q * (flat + 1 + ramp.phi * (steep + 1)) / (2 * flat + 3 * steep)
    assert ramp.threshold(ramp.end) == pytest.approx(expected)


def test_paper_s_iterations_give_the_notes_numbers():
    """0.349 q where the ramp begins, q at the end for phi = 1.5, 1.217 q for phi = 2."""
    assert Ramp(1.0, **PAPER).threshold(13750) == pytest.approx(0.349, abs=5e-4)
    assert Ramp(1.0, **PAPER).threshold(27500) == pytest.approx(1.0, abs=1e-4)
    assert Ramp(1.0, **PAPER, phi=2.0).threshold(27500) == pytest.approx(1.217, abs=5e-4)


def listing(q, start, ramp, end, freq, phi):
    """Algorithm 1 transcribed line by line: iteration -> epsilon wherever it is recomputed."""
    theta = (2 * q * freq) / (2 * (ramp - start) + 3 * (end - ramp))
    phi = phi * theta
    found, current_itr = {}, 0
    while current_itr <= end + freq:
        if current_itr > start and current_itr < end and (current_itr % freq) == 0:
            if current_itr < ramp:
                found[current_itr] = theta * (current_itr - start + 1) / freq
            else:
                found[current_itr] = (theta * (ramp - start + 1) + phi * (current_itr - ramp + 1)) / freq
        current_itr += 1
    return found


@properties
@given(ramps())
def test_ramp_is_algorithm_1(ramp):
    """Same refreshes, at multiples of freq strictly between start and end only, and the same epsilons as the listing."""
    expected = listing(ramp.q, ramp.start, ramp.ramp, ramp.end, ramp.freq, ramp.phi)
    due = [i for i in range(ramp.end + ramp.freq + 1) if ramp.due(i)]
    assert due == list(expected)
    assert [ramp.threshold(i) for i in due] == pytest.approx(list(expected.values()))
    if due:
        assert ramp.last_update() == due[-1]


@properties
@given(ramps(), st.integers(1, 1000))
def test_freq_cancels(ramp, freq):
    """freq decides when epsilon is updated, not its value."""
    assume((ramp.end - 1) // freq * freq > ramp.start)
    other = Ramp(ramp.q, ramp.start, ramp.ramp, ramp.end, freq, ramp.phi)
    for iteration in range(ramp.start, ramp.end + 1, 7):
        assert ramp.threshold(iteration) == pytest.approx(other.threshold(iteration))


@properties
@given(ramps())
def test_threshold_rises_and_is_proportional_to_q(ramp):
    """Epsilon never falls between start and end, is positive, and doubles with q."""
    values = [ramp.threshold(i) for i in range(ramp.start, ramp.end + 1)]
    assert values[0] > 0
    assert all(later > earlier for earlier, later in pairwise(values))
    doubled = Ramp(2 * ramp.q, ramp.start, ramp.ramp, ramp.end, ramp.freq, ramp.phi)
    assert doubled.threshold(ramp.end) == pytest.approx(2 * values[-1])


def test_table1_heuristics():
    """20 epochs of 2,750 iterations: the second epoch, 25 % and 50 % of all epochs."""
    assert table1(20, 2750) == {"start": 2750, "ramp": 13750, "end": 27500}


@pytest.mark.parametrize(
    "wrong, told",
    [
        (dict(start=-1), "start -1"),
        (dict(start=21), "start 21"),
        (dict(ramp=101), "ramp 101"),
        (dict(start=100, ramp=100), "start < end"),
        (dict(freq=0), "freq is 0"),
        (dict(q=0.0), "q is 0"),
        (dict(q=float("nan")), "q is nan"),
        (dict(phi=0.0), "phi is 0"),
    ],
)
def test_ramp_refuses_bad_input(wrong, told):
    with pytest.raises(ReproError, match=told):
        Ramp(**(dict(q=0.1, start=10, ramp=20, end=100, freq=5) | wrong))


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_range_is_refused(share):
    """A wrong share is told when the schedule is made, not at the first refresh hours later."""
    makers = [
        lambda: magnitude_quantile(torch.ones(3), share),
        lambda: AutoRamp(share, 0, 5, 10, freq=1),
        lambda: HardPrune(share, 5),
        lambda: Cubic(share, 0, 10),
    ]
    for make in makers:
        with pytest.raises(ReproError, match=r"must lie in \[0, 1\)"):
            make()


# Quantiles


@properties
@given(st.integers(1, 300), st.floats(0, 1, exclude_max=True), st.integers(0, 10))
def test_quantile_counts_exactly_without_ties(n, share, seed):
    """round(share n) distinct magnitudes lie strictly below the threshold; the largest always stays."""
    magnitudes = shuffled(n, seed)
    threshold = magnitude_quantile(magnitudes, share)
    assert int((magnitudes < threshold).sum()) == min(round(share * n), n - 1)
    assert threshold in magnitudes.tolist()


def test_quantile_keeps_ties_and_everything_at_zero():
    """Equal magnitudes at the threshold all stay; a share of 0 prunes nothing."""
    tied = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0])
    for share, below in ((0.2, 1), (0.4, 1), (0.6, 1), (0.8, 4), (0.0, 0)):
        assert int((tied < magnitude_quantile(tied, share)).sum()) == below


def test_dense_quantiles_take_the_matrices_of_a_role_together():
    """q is the 90th percentile over both layers' weights, biases excluded and skipped modules left out."""
    model = nn.ModuleDict({"rnn": nn.RNN(1, 2, num_layers=2), "fc": nn.Linear(5, 2), "ctc": nn.Linear(5, 2)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(100.0)
        model["rnn"].weight_hh_l0.copy_(torch.tensor([[1.0, -2.0], [3.0, -4.0]]))
        model["rnn"].weight_hh_l1.copy_(torch.tensor([[5.0, -6.0], [-7.0, 8.0]]))
        model["fc"].weight.copy_(-torch.arange(1.0, 11.0).reshape(2, 5))
    found = dense_quantiles(model, 0.5, skip=("ctc",))
    assert found == {"input": 100.0, "recurrent": 5.0, "output": 6.0}
    assert dense_quantiles(model, skip=("ctc",))["output"] == 10.0


# Schedules with a wanted sparsity


def test_autoramp_keeps_the_ramp_s_shape():
    """On weights that do not change, its epsilons are in the proportions of Algorithm 1 and end at the quantile."""
    magnitudes = shuffled(1000)
    auto, ramp = AutoRamp(0.9, 20, 50, 103, freq=10, phi=2.0), Ramp(1.0, 20, 50, 103, freq=10, phi=2.0)
    due = [i for i in range(200) if auto.due(i)]
    assert due == [i for i in range(200) if ramp.due(i)] == list(range(30, 110, 10))
    ours = [auto.threshold(i, magnitudes) for i in due]
    assert ours[-1] == magnitude_quantile(magnitudes, 0.9)
    assert [value / ours[-1] for value in ours] == pytest.approx([ramp.threshold(i) / ramp.threshold(due[-1]) for i in due])


@properties
@given(st.integers(2, 400), st.floats(0, 0.99), st.integers(1, 7), st.integers(0, 5))
def test_autoramp_meets_the_wanted_sparsity_on_frozen_weights(n, share, freq, start):
    """The last refresh leaves exactly round(share n) zeros of n distinct weights; none is pruned too early."""
    layer = nn.Linear(n, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(shuffled(n))
    schedule = AutoRamp(share, start, start + 10, start + 20, freq)
    pruner = GradualPruner(layer, schedule)
    wanted = min(round(share * n), n - 1)
    for iteration in range(start + 25):
        pruner.step()
        zeros = n - int(layer.weight.count_nonzero())
        assert zeros <= wanted
        if iteration >= max(i for i in range(start + 20) if schedule.due(i)):
            assert zeros == wanted


@pytest.mark.parametrize("regrowth", ["update", "listing", "copy"])
def test_autoramp_meets_the_wanted_sparsity_in_training(regrowth):
    """Weights move under it, masked ones grow back and go again; after the last refresh each role has its exact share."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.LSTM(6, 12), "fc": nn.Linear(12, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    shares = {"recurrent": 0.9, "input": 0.75, "output": 0.5}
    pruner = GradualPruner(
        model, {role: AutoRamp(share, 3, 12, 32, freq=5) for role, share in shares.items()}, regrowth=regrowth
    )
    x, target = torch.randn(7, 8, 6), torch.randint(3, (7, 8))
    for iteration in range(40):
        loss = nn.functional.cross_entropy(model["fc"](model["rnn"](x)[0]).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
        zeros = {role: count - nonzero for role, (nonzero, count) in sparsity(model).roles.items()}
        wanted = {role: round(shares[role] * count) for role, (_, count) in sparsity(model).roles.items()}
        if iteration < 5:
            assert not any(zeros.values())
        elif iteration < 30:
            assert all(zeros[role] < wanted[role] for role in shares)
        else:  # 30 is the last multiple of 5 before 32
            assert zeros == wanted


def test_autoramp_refuses_a_span_without_update():
    """Between 10 and 90 lies no multiple of 100: the wanted sparsity could never be met."""
    with pytest.raises(ReproError, match="no multiple of freq 100 between start 10 and end 90"):
        AutoRamp(0.9, 10, 20, 90, freq=100)


def test_hard_pruning_happens_once():
    """At its iteration exactly the wanted share goes; later weights may become small and stay."""
    layer = nn.Linear(100, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(shuffled(100))
    pruner = GradualPruner(layer, HardPrune(0.9, at=3))
    for iteration in range(8):
        with torch.no_grad():
            layer.weight.mul_(0.5)
        pruner.step()
        assert int(layer.weight.count_nonzero()) == (100 if iteration < 3 else 10)
        if iteration == 3:
            mask = pruner.masks["weight"]
    assert pruner.masks["weight"] is mask


def test_cubic_is_zhu_and_gupta_s_closed_form():
    """Zeros after each refresh are s (1 - (1 - (t - start) / (end - start))^3), the last one at `end` itself."""
    schedule, n = Cubic(0.8, start=10, end=45, freq=10), 1000
    magnitudes = shuffled(n)
    due = [i for i in range(100) if schedule.due(i)]
    assert due == [10, 20, 30, 40, 45]
    zeros = [int((magnitudes < schedule.threshold(i, magnitudes)).sum()) for i in due]
    assert zeros == [round(n * 0.8 * (1 - (1 - (i - 10) / 35) ** 3)) for i in due]
    assert (zeros[0], zeros[-1]) == (0, 800)


# Counts by role


MODELS = {  # module, then the sizes of its roles and of everything, by hand
    "rnn": (lambda: nn.RNN(4, 6), {"recurrent": 36, "input": 24}, 72),
    "gru": (
        lambda: nn.GRU(4, 6, num_layers=2, bidirectional=True),
        {"recurrent": 4 * 18 * 6, "input": 2 * 18 * (4 + 12)},
        1152,
    ),
    "lstm": (
        lambda: nn.LSTM(5, 7, num_layers=2, bidirectional=True, proj_size=3),
        {"recurrent": 4 * (28 * 3 + 3 * 7), "input": 2 * 28 * (5 + 6)},
        420 + 616 + 224,
    ),
    "linear": (lambda: nn.Linear(8, 3), {"output": 24}, 27),
    "mixed": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.LSTMCell(4, 5), nn.Linear(5, 2)),
        {"recurrent": 20 * 5, "input": 20 * 4, "output": 10},
        28 + 8 + (100 + 80 + 40) + 12,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_sparsity_counts_are_exact(name):
    """Zeros put in by hand come back by role, by matrix and in total; biases and norms count in the total, dense."""
    make, sizes, total = MODELS[name]
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    assert sparsity(model).roles == {role: (count, count) for role, count in sizes.items()}
    assert list(sparsity(model).roles) == [role for role in ("recurrent", "input", "output") if role in sizes]

    expected, layers = {role: [count, count] for role, count in sizes.items()}, {}
    with torch.no_grad():
        for i, (matrix, (role, parameter)) in enumerate(prunable_weights(model).items()):
            parameter.view(-1)[torch.randperm(parameter.numel())[: i + 3]] = 0.0
            expected[role][0] -= i + 3
            layers[matrix] = (parameter.numel() - i - 3, parameter.numel())
    found = sparsity(model)
    zeros = sum(count - nonzero for nonzero, count in expected.values())
    assert found.roles == {role: tuple(counts) for role, counts in expected.items()}
    assert found.layers == layers
    assert found.total == (total - zeros, total)
    shares = {role: 1 - nonzero / count for role, (nonzero, count) in found.roles.items()}
    assert found.by_role() == shares | {"total": 1 - (total - zeros) / total}


def test_tied_weights_are_counted_once():
    """Two layers that share one matrix hold its zeros once, as `parameters()` does."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.fill_(1.0)[0] = 0.0
    assert sparsity(model).roles == {"output": (12, 16)}
    assert sparsity(model).total == (12, 16)
