"""Compiled models give what the dense ones give: every layer, shape and state, by windows and by rows, one thread or two."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from repro.errors import ReproError
from repro.models.recurrent import BidirectionalClippedRNN
from repro.models.speech import SpeechConfig, SpeechModel
from repro.sparse import recurrence
from repro.sparse.layers import SparseLinear, SparseRNN
from repro.sparse.runtime import compile
from repro.sparse.simd import has_avx512

CLOSE = 2e-6  # of the largest output, as `compile` promises
MODES = {
    "tanh": (nn.RNN, {"nonlinearity": "tanh"}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "gru": (nn.GRU, {}),
    "lstm": (nn.LSTM, {}),
}
PATHS = ["rows", pytest.param("windows", marks=pytest.mark.skipif(not has_avx512(), reason="needs AVX-512"))]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    if request.param == "rows":
        monkeypatch.setattr(recurrence, "has_avx512", lambda: False)
    return request.param


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


def sparse(module: nn.Module, density: float, seed: int = 0) -> nn.Module:
    """The module in evaluation mode, with weights of which a share `density` is kept at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 2 and "weight" in name:
                p.uniform_(-1, 1, generator=generator).mul_(torch.rand(p.shape, generator=generator) < density)
                p.div_(max(1.0, density * p.shape[1]) ** 0.5)
            elif p.ndim == 1 and "bias" in name:
                p.uniform_(-0.3, 0.3, generator=generator)
    return module.eval()


def in_double(module: nn.Module, *inputs):
    """What the dense module gives in float64."""

    def double(value):
        if isinstance(value, PackedSequence):
            return value._replace(data=value.data.double())
        if isinstance(value, tuple):
            return tuple(map(double, value))
        return value if value is None or not value.is_floating_point() else value.double()

    with torch.no_grad():
        return copy.deepcopy(module).double()(*map(double, inputs))


def flat(outputs) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, PackedSequence):
        return [outputs.data]
    return [tensor for part in outputs for tensor in flat(part)]


def assert_close(found, wanted, largest: float = CLOSE) -> None:
    found, wanted = flat(found), flat(wanted)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == torch.float32
        assert float((a.double() - b).abs().max()) <= largest * float(b.abs().max()) + 1e-30


def states(module: nn.RNNBase, batch: int, seed: int = 1):
    shape = (module.num_layers * (1 + module.bidirectional), batch, module.hidden_size)
    h = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 2
    return (h, 2 * h.flip(2)) if isinstance(module, nn.LSTM) else h


@settings(max_examples=60)
@given(
    mode=st.sampled_from(list(MODES)),
    hidden=st.integers(1, 70),
    features=st.integers(1, 40),
    steps=st.integers(1, 9),
    batch=st.sampled_from([1, 4, 5]),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    with_state=st.booleans(),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    threads=st.integers(1, 2),
    windows=st.booleans(),
)
def test_any_recurrent_layer_is_the_dense_one(
    mode, hidden, features, steps, batch, layers, bidirectional, bias, batch_first, with_state, density, threads, windows
):
    """Outputs and last states, whatever the options; two threads share the units even where one would do."""
    kind, options = MODES[mode]
    module = kind(features, hidden, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, **options)
    sparse(module, density)
    x = torch.randn(*((batch, steps) if batch_first else (steps, batch)), features, generator=torch.Generator().manual_seed(2))
    arguments = (x, states(module, batch)) if with_state else (x,)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrence, "_WORTH_TWO_THREADS", 0)
        if not windows:
            patch.setattr(recurrence, "has_avx512", lambda: False)
        try:
            torch.set_num_threads(threads)
            fast = compile(module, densest=1.0)
            assert isinstance(fast, SparseRNN)
            assert_close(fast(*arguments), in_double(module, *arguments))
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("mode", list(MODES))
def test_packed_sequences_start_and_end_each_at_its_own_step(path, mode, enforce_sorted):
    """More sequences than one pass takes, some as short as one step, in both directions, from given states."""
    kind, options = MODES[mode]
    module = sparse(kind(7, 19, 2, bidirectional=True, **options), 0.3)
    lengths = [6, 4, 4, 2, 1] if enforce_sorted else [2, 6, 1, 4, 4]
    x = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(3))
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)
    fast = compile(module, densest=1.0)
    for arguments in ((packed,), (packed, states(module, 5))):
        found = fast(*arguments)
        assert_close(found, in_double(module, *arguments))
        assert torch.equal(found[0].batch_sizes, packed.batch_sizes)
        assert (found[0].sorted_indices is None) == enforce_sorted


def test_unbatched_and_transposed_inputs(path):
    """Two dimensions mean one sequence, and memory may lie in any order."""
    module = sparse(nn.LSTM(6, 18), 0.3)
    fast = compile(module, densest=1.0)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(4)).t()
    h, c = states(module, 1)
    assert_close(fast(x, (h[:, 0], c[:, 0])), in_double(module, x, (h[:, 0], c[:, 0])))


@pytest.mark.parametrize("mode", list(MODES))
def test_a_stream_in_chunks_is_the_whole(path, mode):
    """State out, state in: chunks of any length continue where the last one ended, up to the order of sums."""
    kind, options = MODES[mode]
    fast = compile(sparse(kind(20, 33, 2, **options), 0.2), densest=1.0)
    x = torch.randn(40, 1, 20, generator=torch.Generator().manual_seed(5))
    whole, last = fast(x)
    state, parts = None, []
    for chunk in x.split([1, 1, 9, 4, 20, 5]):
        part, state = fast(chunk, state)
        parts.append(part)
    assert_close((torch.cat(parts), state), (whole, last), 3e-7)
    state, parts = None, []
    for chunk in x.split(10):  # all products by rows: the same to the last bit
        part, state = fast(chunk, state)
        parts.append(part)
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("steps, batch", [(0, 1), (0, 3), (4, 0), (0, 0)])
def test_nothing_to_do_is_done(path, steps, batch):
    """No steps leave the state as it is; no sequences give none."""
    module = sparse(nn.LSTM(3, 5, 2, bidirectional=True), 0.5)
    fast, first = compile(module, densest=1.0), states(module, batch)
    y, last = fast(torch.zeros(steps, batch, 3), first)
    assert y.shape == (steps, batch, 10)
    assert all(torch.equal(a, b) for a, b in zip(last, first, strict=True))
    assert compile(sparse(nn.Linear(3, 5), 0.5), densest=1.0)(torch.zeros(steps, batch, 3)).shape == (steps, batch, 5)


@pytest.mark.parametrize("where", ["input", "state", "overflow"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["relu", "gru"])
def test_infinity_and_nan_spread_as_in_the_dense_layer(path, mode, bad, where):
    """A zero weight times infinity is NaN, in a dense product; and states of a ReLU layer may grow without bound."""
    kind, options = MODES[mode]
    module = sparse(kind(4, 20, **options), 0.2)
    x, h = torch.ones(30, 1, 4), torch.zeros(1, 1, 20)
    if where == "input":
        x[3, 0, 1] = bad
    elif where == "state":
        h[0, 0, 2] = bad
    else:
        module.weight_hh_l0.data.mul_(200.0)
    with torch.no_grad():
        wanted = module(x, h)
    found = compile(module, densest=1.0)(x, h)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isposinf(), b.isposinf())
        assert torch.allclose(a[b.isfinite()], b[b.isfinite()], rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (8,), (70,), (2, 3)])
def test_linear_takes_any_leading_sizes(path, shape, bias):
    module = sparse(nn.Linear(45, 23, bias=bias), 0.15)
    fast = compile(module, densest=1.0)
    x = torch.randn(*shape, 45, generator=torch.Generator().manual_seed(6))
    assert_close(fast(x), in_double(module, x))
    assert fast(x).is_contiguous()
    assert torch.equal(fast.weight, module.weight)
    x.view(-1)[0] = torch.inf
    assert torch.equal(fast(x).isnan(), module(x).isnan())


@pytest.mark.parametrize("cell", ["rnn", "gru"])
def test_the_speech_model_as_a_whole(path, threads, cell):
    """A whole 90 % sparse model on utterances of different lengths; batch norm has seen data, so that no layer is silent."""
    torch.manual_seed(7)
    model = sparse(SpeechModel(SpeechConfig(cell, hidden=50, layers=3, channels=4)), 0.1)
    features, lengths = torch.randn(3, 60, 161), torch.tensor([60, 50, 31])
    model.train()
    with torch.no_grad():
        for _ in range(30):
            model(features, lengths)
    model.eval()
    threads(2)
    fast = compile(model, densest=1.0)
    assert {choice.runs for choice in fast.choices} == {"sparse"}
    assert [choice.name for choice in fast.choices] == [*(f"recurrent.{i}" for i in range(3)), "fully_connected.linear", "ctc"]
    found, found_lengths = fast(features, lengths)
    wanted, wanted_lengths = in_double(model, features, lengths)
    assert torch.equal(found_lengths, wanted_lengths)
    assert float(wanted.std(0).mean()) > 0.05  # frames differ
    assert_close(found, wanted)


def test_the_clipped_layer_clips_and_falls_back(path):
    """States that reach 20, and NaN in one utterance, which spreads as in the dense layer."""
    module = sparse(BidirectionalClippedRNN(6, 21), 0.5)
    module.weight_hh.data.abs_().mul_(3.0)
    module.norm.running_mean.uniform_(-1, 1)
    module.norm.running_var.uniform_(0.5, 2)
    packed = pack_padded_sequence(torch.ones(9, 2, 6), torch.tensor([9, 5]))
    fast = compile(module, densest=1.0)
    wanted = in_double(module, packed)
    assert float(wanted.data.max()) > 20
    assert_close(fast(packed), wanted)
    packed.data[3, 2] = torch.nan
    with torch.no_grad():
        wanted = module(packed)
    assert torch.equal(fast(packed).data.isnan(), wanted.data.isnan())
    assert wanted.data.isnan().any() and not wanted.data.isnan().all()


def test_compile_decides_by_density_and_says_so():
    """Denser layers stay as they are, subclasses too, shared layers stay shared, and the model given is not touched."""

    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    shared = sparse(nn.Linear(8, 8), 0.1)
    model = nn.Sequential(shared, sparse(nn.Linear(8, 8), 0.9), shared, Doubling(8, 8), nn.GRU(8, 8))
    fast = compile(model, densest=0.5)
    assert [(c.name, c.layer, c.runs) for c in fast.choices] == [
        ("0", "Linear", "sparse"),
        ("1", "Linear", "dense"),
        ("4", "GRU", "dense"),
    ]
    assert fast.choices[0].density == shared.weight.count_nonzero() / 64
    assert fast[0] is fast[2] and type(fast[0]) is SparseLinear
    assert type(fast[3]) is Doubling
    assert not any(p.requires_grad for p in fast.parameters()) and all(p.requires_grad for p in model.parameters())
    assert type(model[0]) is nn.Linear
    assert "density=" in repr(fast)


def test_by_default_small_and_dense_layers_stay_dense():
    """Below the measured cross-over torch's own layers are faster."""
    runs = {}
    for name, size, density in (("small", 32, 0.1), ("large", 1024, 0.05), ("full", 1024, 1.0)):
        (choice,) = compile(sparse(nn.Linear(size, size), density), batch=16).choices
        runs[name] = choice.runs
    assert runs == {"small": "dense", "large": "sparse", "full": "dense"}


def test_refusals_name_the_layer_and_the_remedy():
    """What cannot be compiled or run is refused in one sentence, before any memory is touched."""
    pruned = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    parametrized = nn.Linear(4, 4)
    parametrize.register_parametrization(parametrized, "weight", nn.ReLU())
    infinite = nn.Linear(2, 2)
    infinite.bias.data[0] = torch.inf
    for model, message in (
        (pruned, "weights of 0 are computed.*prune.remove"),
        (parametrized, "remove_parametrizations"),
        (nn.LSTM(4, 4, proj_size=2), "LSTM has proj_size 2"),
        (nn.Sequential(nn.Linear(2, 2).double()), "0.weight is torch.float64"),
        (nn.Linear(2, 2, device="meta"), "meta"),
        (infinite, "Linear.bias holds an infinity"),
    ):
        with pytest.raises(ReproError, match=message):
            compile(model)
    for options in ({"batch": 0}, {"densest": 1.5}):
        with pytest.raises(ReproError):
            compile(nn.Linear(2, 2), **options)
    linear, gru = compile(nn.Linear(4, 4), densest=1.0), compile(nn.GRU(4, 4), densest=1.0)
    lstm = compile(nn.LSTM(4, 4), densest=1.0)
    for call in (
        lambda: linear(torch.zeros(3, 5)),
        lambda: linear(torch.zeros(3, 4).double()),
        lambda: linear(torch.zeros(3, 4, requires_grad=True)),
        lambda: linear(np.zeros((3, 4), np.float32)),
        lambda: linear(torch.tensor(1.0)),
        lambda: gru(torch.zeros(3, 1, 5)),
        lambda: gru(torch.zeros(2, 3, 1, 4)),
        lambda: gru(torch.zeros(3, 1, 4), torch.zeros(1, 2, 4)),
        lambda: gru(torch.zeros(3, 1, 4), torch.zeros(1, 4)),
        lambda: lstm(torch.zeros(3, 1, 4), (torch.zeros(1, 1, 4),)),
        lambda: lstm(torch.zeros(3, 1, 4), (torch.zeros(1, 1, 4), torch.zeros(1, 1, 4).double())),
        lambda: gru(PackedSequence(torch.zeros(5, 4), torch.tensor([4, 3]))),
        lambda: gru(PackedSequence(torch.zeros(5, 4), torch.tensor([2, 3]))),
        lambda: copy.deepcopy(linear),
        lambda: pickle.dumps(gru),
    ):
        with pytest.raises(ReproError):
            call()
    with torch.no_grad():
        assert linear(torch.zeros(3, 4, requires_grad=True)).shape == (3, 4)


@pytest.mark.skipif(not has_avx512(), reason="needs AVX-512")
def test_gates_are_exact_near_zero_and_saturate():
    """sigmoid and tanh of the compiled cells over the whole range: to 4e-7 of themselves, and finite at the ends."""
    sums = np.concatenate([-np.logspace(2, -12, 400), [0.0], np.logspace(-12, 2, 400), *np.linspace([-10, 8], [-8, 10], 400).T])
    module = nn.RNN(1, len(sums))
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.bias_ih_l0.copy_(torch.from_numpy(sums))
    found = compile(module, densest=1.0)(torch.zeros(1, 1, 1))[0].flatten().double().numpy()
    expected = np.tanh(np.float32(sums).astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=4e-7)
    np.testing.assert_array_equal(abs(found) == 1, abs(np.float32(expected)) == 1)
    lstm = nn.LSTM(1, len(sums))
    with torch.no_grad():
        for p in lstm.parameters():
            p.zero_()
        lstm.bias_ih_l0[len(sums) : 2 * len(sums)] = torch.from_numpy(sums)
    c = torch.full((1, 1, len(sums)), 3.0)
    found = compile(lstm, densest=1.0)(torch.zeros(1, 1, 1), (torch.zeros_like(c), c))[1][1].flatten().double().numpy()
    np.testing.assert_allclose(found, 3 / (1 + np.exp(-np.float32(sums).astype(np.float64))), rtol=4e-7, atol=1e-37)
