"""`GradualPruner` in training loops: what it zeroes and when, what may grow back, saving, and what a step costs."""

import io
import statistics
import time
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from repro.datasets.batches import Batch
from repro.errors import ReproError
from repro.models.ctc import ctc_loss
from repro.models.speech import SpeechConfig, SpeechModel
from repro.pruning import AutoRamp, GradualPruner, HardPrune, PrintedSignPruner, Ramp, prunable_weights

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
REGROWTHS = ["update", "listing", "copy"]


@dataclass(frozen=True)
class At:
    """A schedule by table, iteration -> epsilon: cases small enough to work out by hand."""

    table: dict

    def due(self, iteration):
        return iteration in self.table

    def threshold(self, iteration, magnitudes):
        return self.table[iteration]


class Tagger(nn.Module):
    """A recurrent layer of torch's and a linear one, as anybody writes them."""

    def __init__(self, cell, **options):
        super().__init__()
        self.rnn = cell(5, 8, **options)
        self.fc = nn.Linear(8 * (1 + options.get("bidirectional", False)), 3)

    def forward(self, x):
        return self.fc(self.rnn(x)[0])


def data(device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, 5, generator=generator).to(device), torch.randint(3, (24,), generator=generator).to(device)


def update(model, optimizer):
    """One dense training step, without the pruner."""
    x, target = data(next(model.parameters()).device)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x).flatten(0, 1), target).backward()
    optimizer.step()


def line(*values):
    """A model of one matrix with these weights."""
    layer = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))
    return layer


def push(layer, *updates):
    """What an optimizer step would add to the stored weights."""
    with torch.no_grad():
        layer.weight.add_(torch.tensor([updates]))


CELLS = [
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
    (nn.GRU, {"num_layers": 2}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cell, options", CELLS)
def test_three_lines_keep_the_fused_path(cell, options, device):
    """Parameters keep identity and memory, the layer runs the same kernels without torch's warning about scattered weights."""
    torch.manual_seed(0)
    model = Tagger(cell, **options).to(device)
    x, _ = data(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flat, places = list(model.rnn._flat_weights), [p.data_ptr() for p in model.parameters()]
    parameters, kernels = list(model.parameters()), operators(model, x)
    pruner = GradualPruner(model, AutoRamp(0.5, 0, 2, 4, freq=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            update(model, optimizer)
            pruner.step()
    assert all(0.3 < share < 0.7 for share in pruner.layer_sparsity().values())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert places == [p.data_ptr() for p in model.parameters()]
    assert all(a is b for a, b in zip(flat, model.rnn._flat_weights, strict=True))
    assert operators(model, x) == kernels
    assert any(name in kernels for name in ("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"))


def operators(model, x):
    with torch.profiler.profile() as profile, torch.no_grad():
        model(x)
    return {event.key for event in profile.key_averages() if event.key.startswith("aten::")}


@pytest.mark.parametrize("cell, options", CELLS)
def test_masks_of_ones_change_nothing(cell, options):
    """A refresh that keeps every weight leaves the output bit for bit as it was."""
    torch.manual_seed(0)
    model = Tagger(cell, **options)
    x, _ = data()
    before = model(x)
    pruner = GradualPruner(model, At({0: 0.0, 1: 0.0}))
    pruner.step()
    pruner.step()
    assert torch.equal(model(x), before)
    assert not any(pruner.layer_sparsity().values())


@pytest.mark.parametrize("regrowth", REGROWTHS)
def test_pruned_weights_are_zero_though_their_gradients_are_not(regrowth):
    """The forward pass sees exact zeros at every step; back-propagation is not masked, as the paper has it."""
    torch.manual_seed(0)
    model = Tagger(nn.GRU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = GradualPruner(model, AutoRamp(0.8, 2, 6, 12, freq=3), regrowth=regrowth)
    for iteration in range(20):
        update(model, optimizer)
        moved = [(w[~pruner.masks[name]] != 0).any() for name, w in pruner.weights.items()]
        pruner.step()
        for name, weight in pruner.weights.items():
            assert torch.equal(weight != 0, pruner.masks[name])
            if iteration >= 3:
                assert weight.grad[~pruner.masks[name]].count_nonzero() > 0
        if iteration > 3:
            assert all(moved)  # the optimizer does move them: it is the pruner that zeroes


def test_masks_freeze_after_the_end_and_stay_applied():
    """After end_itr no mask is refreshed, while every step still multiplies by it."""
    torch.manual_seed(0)
    model = Tagger(nn.LSTM)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    pruner = GradualPruner(model, Ramp(0.3, 0, 2, 6, freq=2))
    for _ in range(5):
        update(model, optimizer)
        pruner.step()
    masks = dict(pruner.masks)
    for _ in range(10):
        update(model, optimizer)
        pruner.step()
        assert all(pruner.masks[name] is mask for name, mask in masks.items())
        assert all(torch.equal(pruner.weights[name] != 0, mask) for name, mask in masks.items())
    assert all(0 < share < 1 for share in pruner.layer_sparsity().values())


def test_nothing_changes_before_the_start():
    """Up to the first multiple of freq above start_itr the weights are those of training without a pruner, bit for bit."""
    runs = []
    for prune in (False, True):
        torch.manual_seed(0)
        model = Tagger(nn.RNN)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = GradualPruner(model, Ramp(0.5, start=6, ramp=8, end=20, freq=3))
        trace = []
        for _ in range(11):
            update(model, optimizer)
            if prune:
                pruner.step()
            trace.append([p.detach().clone() for p in model.parameters()])
        runs.append(trace)
    same = [all(torch.equal(a, b) for a, b in zip(*rows, strict=True)) for rows in zip(*runs, strict=True)]
    assert same == [True] * 9 + [False] * 2  # iteration 9 is the first after 6 that 3 divides


# Which weights share a threshold


def grouped():
    """rnn: input 1 2, recurrent 3 4 5 6; two linear layers 7 8 and 70 80; signs alternate."""
    model = nn.ModuleDict({"rnn": nn.RNN(1, 2, bias=False), "a": nn.Linear(2, 1, bias=False), "b": nn.Linear(2, 1, bias=False)})
    values = {"rnn.weight_ih_l0": [1, -2], "rnn.weight_hh_l0": [3, -4, 5, -6], "a.weight": [7, -8], "b.weight": [70, -80]}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(values[name], dtype=torch.float).view_as(parameter))
    return model


@pytest.mark.parametrize(
    "grouping, thresholds, kept",
    [
        ("type", {"input": 2, "recurrent": 5, "output": 70}, {2, 5, 6, 70, 80}),
        ("layer", {"rnn.weight_ih_l0": 2, "rnn.weight_hh_l0": 5, "a.weight": 8, "b.weight": 80}, {2, 5, 6, 8, 80}),
        ("all", {"all": 6}, {6, 7, 8, 70, 80}),
    ],
)
def test_grouping(grouping, thresholds, kept):
    """Half of the weights of each group go: medians by hand, by role, by matrix and over everything."""
    model = grouped()
    pruner = GradualPruner(model, HardPrune(0.5, at=0), grouping=grouping)
    assert set(pruner.thresholds.values()) == {0.0}
    pruner.step()
    assert pruner.thresholds == thresholds
    left = torch.cat([p.detach().abs().flatten() for p in model.parameters()])
    assert set(left[left > 0].tolist()) == kept
    assert pruner.threshold_of("b.weight") == thresholds.get("b.weight", thresholds.get("output", thresholds.get("all")))


def test_roles_left_out_and_skipped_layers_stay_dense():
    """Only what is named is pruned, and thresholds are taken without what is skipped."""
    model = grouped()
    pruner = GradualPruner(model, {"recurrent": HardPrune(0.5, 0), "output": HardPrune(0.5, 0)}, skip=("b",))
    pruner.step()
    assert list(pruner.masks) == ["rnn.weight_hh_l0", "a.weight"]
    assert pruner.thresholds == {"recurrent": 5, "output": 8}
    assert pruner.layer_sparsity() == {"rnn.weight_hh_l0": 0.5, "a.weight": 0.5}
    assert model["b"].weight.tolist() == [[70, -80]]
    assert model["rnn"].weight_ih_l0.tolist() == [[1], [-2]]


def test_skip_takes_parameters_and_modules():
    model = grouped()
    assert list(prunable_weights(model, ("rnn",))) == ["a.weight", "b.weight"]
    assert list(prunable_weights(model, ("rnn.weight_ih_l0", "a"))) == ["rnn.weight_hh_l0", "b.weight"]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (dict(skip=("c",)), "nothing to skip under 'c': prunable weights are rnn.weight_ih_l0, .*, b.weight"),
        (dict(skip=("rnn.weight",)), "nothing to skip under 'rnn.weight'"),
        (dict(skip=("rnn", "a", "b")), "nothing to prune"),
        (dict(schedule={"recurent": HardPrune(0.5, 0)}), "unknown role 'recurent': choose one of input, output, recurrent"),
        (dict(schedule={"input": HardPrune(0.5, 0)}, grouping="all"), "takes one schedule for all weights"),
        (dict(grouping="matrix"), "unknown grouping 'matrix': choose one of type, layer, all"),
        (dict(regrowth="none"), "unknown regrowth 'none': choose one of update, listing, copy"),
    ],
)
def test_wrong_arguments_are_told(arguments, told):
    """Nothing is skipped silently: what does not match is named beside what would."""
    with pytest.raises(ReproError, match=told):
        GradualPruner(grouped(), **({"schedule": HardPrune(0.5, 0)} | arguments))


def test_a_model_without_such_weights_is_told():
    with pytest.raises(ReproError, match="nothing to prune"):
        GradualPruner(nn.Conv1d(2, 2, 3), HardPrune(0.5, 0))


# Regrowth: epsilon is 0.5, the first weight (0.25) is pruned at iteration 0


def test_update_regrows_when_one_update_reaches_epsilon():
    """The update of the refreshing step decides, counted from zero: 0.5 is enough, less is not, older updates are gone."""
    layer = line(0.25, 0.25, 0.25, 2.0)
    pruner = GradualPruner(layer, At({0: 0.5, 2: 0.5}), regrowth="update")
    pruner.step()
    assert layer.weight.tolist() == [[0, 0, 0, 2]]
    push(layer, 9.0, 0.25, -0.25, 0.0)
    pruner.step()  # no refresh: lost
    assert layer.weight.tolist() == [[0, 0, 0, 2]]
    push(layer, 0.25, 0.5, -0.625, 0.0)
    pruner.step()
    assert layer.weight.tolist() == [[0, 0.5, -0.625, 2]]


def test_listing_never_regrows():
    """Algorithm 1 masks before it measures, so no update is large enough."""
    layer = line(0.25, -0.25, 2.0)
    pruner = GradualPruner(layer, At({0: 0.5, 1: 0.5, 2: 0.0}), regrowth="listing")
    for _ in range(4):
        pruner.step()
        assert layer.weight.tolist() == [[0, 0, 2]]
        push(layer, 100.0, -100.0, 0.0)


def test_listing_refreshes_on_the_updated_weights_it_kept():
    """Masking first must not lose the update of a weight that is not masked."""
    layer = line(0.25, 1.0, 2.0)
    pruner = GradualPruner(layer, At({0: 0.5, 1: 0.5}), regrowth="listing")
    pruner.step()
    push(layer, 0.0, -0.75, 0.5)
    pruner.step()
    assert layer.weight.tolist() == [[0, 0, 2.5]]


def test_copy_regrows_from_the_unmasked_copy():
    """Updates add up to the value a weight was pruned with; it returns as that sum and counts as zero until then."""
    layer = line(0.25, 0.25, 2.0)
    pruner = GradualPruner(layer, At({0: 0.5, 3: 0.5, 6: 0.5}), regrowth="copy")
    pruner.step()
    for _ in range(3):  # iterations 1, 2 and the refresh at 3: 0.25 + 3 * 0.125 = 0.625, 0.25 - 3 * 0.125 = -0.125
        assert layer.weight.tolist() == [[0, 0, 2]]
        push(layer, 0.125, -0.125, 0.0)
        pruner.step()
    assert layer.weight.tolist() == [[0.625, 0, 2]]
    for _ in range(3):  # the first is an ordinary weight again and shrinks to 0.25; the second's copy reaches -0.5
        push(layer, -0.125, -0.125, 0.0)
        pruner.step()
    assert layer.weight.tolist() == [[0, -0.5, 2]]


def test_zero_weights_never_count_as_kept():
    """A threshold of zero keeps every weight but those that are zero already."""
    layer = line(0.0, 1e-30, -1.0)
    pruner = GradualPruner(layer, At({0: 0.0}))
    pruner.step()
    assert pruner.masks["weight"].tolist() == [[False, True, True]]


def test_printed_sign_keeps_the_small_weights():
    """`mask = |w| < epsilon` as printed: the strongest weights go, a weight at epsilon too."""
    layer = line(0.25, -0.4, 0.5, -2.0)
    PrintedSignPruner(layer, At({0: 0.5})).step()
    assert layer.weight.tolist() == [[0.25, pytest.approx(-0.4), 0, 0]]


# Saving


def session(seed, regrowth):
    torch.manual_seed(seed)
    model = Tagger(nn.LSTM)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    pruner = GradualPruner(model, AutoRamp(0.7, 1, 8, 20, freq=3), regrowth=regrowth)
    return model, optimizer, pruner


def train(parts, steps):
    model, optimizer, pruner = parts
    for _ in range(steps):
        update(model, optimizer)
        pruner.step()


@pytest.mark.parametrize("steps", [2, 8, 10, 22])
@pytest.mark.parametrize("regrowth", REGROWTHS)
def test_save_and_load_continue_bit_for_bit(regrowth, steps):
    """Before the start, between refreshes, right after one and after the end: the loaded run equals the uninterrupted one."""
    whole = session(0, regrowth)
    train(whole, 30)
    first, buffer = session(0, regrowth), io.BytesIO()
    train(first, steps)
    torch.save([part.state_dict() for part in first], buffer)
    buffer.seek(0)
    second = session(5, regrowth)  # other weights, all to be replaced
    for part, state in zip(second, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(second, 30 - steps)
    for name, weight in whole[0].state_dict().items():
        assert torch.equal(weight, second[0].state_dict()[name]), name
    assert whole[2].thresholds == second[2].thresholds
    for name, mask in whole[2].masks.items():
        assert torch.equal(mask, second[2].masks[name])
    assert whole[2].iteration == second[2].iteration == 30


@pytest.mark.parametrize("regrowth", REGROWTHS)
def test_loading_zeroes_dense_weights(regrowth):
    """Masks alone are enough: loaded over dense weights they apply at once."""
    pruned = session(0, regrowth)
    train(pruned, 25)
    _, _, pruner = session(1, regrowth)
    pruner.load_state_dict(pruned[2].state_dict())
    for name, weight in pruner.weights.items():
        assert torch.equal(weight != 0, pruned[2].masks[name])


def test_loading_an_early_state_lifts_later_masks():
    """A pruner that has gone on and is set back to before the start masks nothing."""
    layer = line(0.25, 1.0)
    pruner = GradualPruner(layer, At({1: 0.5}))
    early = pruner.state_dict()
    pruner.step()
    pruner.step()
    assert pruner.layer_sparsity() == {"weight": 0.5}
    pruner.load_state_dict(early)
    assert pruner.layer_sparsity() == {"weight": 0.0}
    push(layer, 0.125, 0.0)
    pruner.step()
    assert layer.weight.tolist() == [[0.125, 1.0]]


def test_masks_of_another_model_are_refused():
    """Other names or another width: told before anything is changed."""
    pruner = GradualPruner(Tagger(nn.LSTM), HardPrune(0.5, 0))
    pruner.step()
    before = {name: weight.detach().clone() for name, weight in pruner.weights.items()}
    other = GradualPruner(nn.Linear(3, 3), HardPrune(0.5, 0))
    with pytest.raises(ReproError, match=r"masks are of weight, this model prunes rnn\.weight_ih_l0"):
        pruner.load_state_dict(other.state_dict())
    wider = GradualPruner(Tagger(nn.LSTM, num_layers=1), HardPrune(0.9, 0))
    state = wider.state_dict() | {"iteration": 7}
    state["masks"]["fc.weight"] = torch.zeros(3, 1, dtype=torch.bool)  # would broadcast
    with pytest.raises(ReproError, match=r"the mask of fc.weight has shape \(3, 1\), this model's has \(3, 8\)"):
        pruner.load_state_dict(state)
    assert pruner.iteration == 1
    assert all(torch.equal(weight, before[name]) for name, weight in pruner.weights.items())


def test_loading_moves_masks_and_copies_to_the_weights():
    """A state from the CPU goes on another device (torch's meta device stands for it)."""
    source, target = line(0.25, 1.0), nn.Linear(2, 1, bias=False, device="meta")
    pruner = GradualPruner(source, At({0: 0.5, 1: 0.5}), regrowth="copy")
    pruner.step()
    moved = GradualPruner(target, At({0: 0.5, 1: 0.5}), regrowth="copy")
    moved.load_state_dict(pruner.state_dict())
    state = moved.state_dict()
    assert {tensor.device.type for part in ("masks", "hidden") for tensor in state[part].values()} == {"meta"}
    moved.step()


# Cost


def laptop_step():
    """The laptop profile's model with a batch of 16 utterances around 1.2 s, and one training step of it."""
    torch.manual_seed(0)
    model = SpeechModel(SpeechConfig("rnn", hidden=110, layers=3, channels=4, bins=81, time_strides=(4, 1)))
    lengths = torch.linspace(130, 110, 16).long()
    features = torch.randn(16, 130, 81) * (torch.arange(130) < lengths[:, None])[:, :, None]
    batch = Batch(features, lengths, torch.randint(1, 29, (16 * 6,)), torch.full((16,), 6), ["------"] * 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        cost, count = ctc_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        (cost / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()

    return model, step


def seconds(work):
    """Processor time of this process: a busy machine does not add to it as it adds to the clock on the wall."""
    started = time.process_time()
    work()
    return time.process_time() - started


@pytest.mark.parametrize(
    "schedule, regrowth",
    [
        (Ramp(0.02, 0, 50, 1000, freq=5), "update"),
        (Ramp(0.02, 0, 50, 1000, freq=5), "copy"),
        (AutoRamp(0.9, 0, 50, 1000, freq=5), "update"),
    ],
    ids=["ramp", "ramp with copy", "autoramp"],
)
def test_a_step_costs_under_two_percent_of_training(schedule, regrowth):
    """Refreshes every 5 steps, as the laptop profile has them (the paper: 100), interleaved with training; median of ratios."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, train_step = laptop_step()
        pruner = GradualPruner(model, schedule, skip=("ctc",), regrowth=regrowth)
        for _ in range(2):  # first calls allocate
            train_step()
            pruner.step()
        while not schedule.due(pruner.iteration):
            pruner.step()
        ratios = []
        for _ in range(15):
            training = seconds(train_step)
            pruning = seconds(lambda: [pruner.step() for _ in range(5)])  # one of them a refresh
            ratios.append(pruning / (5 * training))
        assert any(pruner.layer_sparsity().values())
    finally:
        torch.set_num_threads(threads)
    share = statistics.median(ratios)
    print(f"pruner.step() costs {share:.2%} of a training step ({min(ratios):.2%} to {max(ratios):.2%})")  # pytest -rP shows it
    assert 0 < share < 0.02
