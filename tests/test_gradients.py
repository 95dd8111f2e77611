"""Thresholded layers against references: autograd, torch's own layers, and BPTT in NumPy written from the paper's equations."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from repro.errors import ReproError
from repro.gradients import (
    CAUSES,
    HeldSparsity,
    RelativeRMS,
    Rounded,
    Static,
    ThresholdedGRU,
    ThresholdedLinear,
    ThresholdedLSTM,
    TopK,
    compiled,
    cosines,
    counting,
    dense,
    dense_gradients,
    record,
    threshold_linears,
)
from repro.gradients.softmax import summed_loss
from repro.gradients.thresholds import Rule
from repro.sparse.simd import has_avx2

NOTHING = RelativeRMS(0.0)  # removes nothing by the way of all rules; with a threshold of 0 torch's own layer may run
KINDS = {"lstm": (ThresholdedLSTM, nn.LSTM), "gru": (ThresholdedGRU, nn.GRU)}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(kind: str, *arguments, seed: int = 0, dtype=torch.float64, threshold=NOTHING, **options):
    """A thresholded layer and torch's, of the same weights."""
    torch.manual_seed(seed)
    ours, torchs = KINDS[kind]
    ours = ours(*arguments, dtype=dtype, threshold=threshold, **options)
    theirs = torchs(*arguments, dtype=dtype, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def states(module, batch: int | None, dtype=torch.float64):
    shape = [len(module.sites)] + [batch] * (batch is not None) + [module.hidden_size]
    h, c = (torch.randn(shape, dtype=dtype, generator=generator(seed)).requires_grad_() for seed in (7, 8))
    return (h, c) if module.mode == "LSTM" else h


def flat(outputs) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [outputs.data] if isinstance(outputs, PackedSequence) else [tensor for part in outputs for tensor in flat(part)]


def results(module, x, hx=None) -> list[torch.Tensor]:
    """Outputs, and the gradients of inputs, states and weights of a loss that weighs all outputs at random."""
    inputs = [*flat(x), *(() if hx is None else flat(hx)), *module.parameters()]
    outputs = flat(module(x, hx))
    loss = sum(
        (tensor * torch.randn(tensor.shape, generator=generator(k)).to(tensor.dtype)).sum() for k, tensor in enumerate(outputs)
    )
    return [tensor.detach() for tensor in outputs] + list(torch.autograd.grad(loss, inputs))


def assert_same(found, wanted, tolerance):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def numpy_lstm_gradients(x, h0, c0, w, u, b, d_h_all, keep, weights_only=False):
    """BPTT of one LSTM layer, sections 2.1 and 3.1 of Zhu et al. 2017; gates in torch's order i, f, g, o.

    x (T, B, D), d_h_all (T, B, H): gradient of each h_t. `keep(dnet)` is the threshold, `weights_only`: for dW, dU, db alone.
    Returns dx, dh0, dc0, dW, dU, db.
    """

    def sigma(v):
        return 1 / (1 + np.exp(-v))

    steps, hidden = len(x), h0.shape[1]
    h, c, gates = [h0], [c0], []
    for t in range(steps):
        net = x[t] @ w.T + h[-1] @ u.T + b
        i, f, g, o = (net[:, k * hidden : (k + 1) * hidden] for k in range(4))
        i, f, g, o = sigma(i), sigma(f), np.tanh(g), sigma(o)
        c.append(f * c[-1] + i * g)
        h.append(o * np.tanh(c[-1]))
        gates.append((i, f, g, o))
    dx, dw, du, db = np.zeros_like(x), np.zeros_like(w), np.zeros_like(u), np.zeros_like(b)
    dh_next, dc_next = np.zeros_like(h0), np.zeros_like(c0)
    for t in reversed(range(steps)):
        i, f, g, o = gates[t]
        dh = d_h_all[t] + dh_next
        dc = dh * (1 - np.tanh(c[t + 1]) ** 2) * o + dc_next
        dnet_g = dc * i * (1 - g**2)
        dnet_o = dh * np.tanh(c[t + 1]) * (1 - o) * o
        dnet_f = dc * c[t] * (1 - f) * f
        dnet_i = dc * g * (1 - i) * i
        dnet = np.concatenate([dnet_i, dnet_f, dnet_g, dnet_o], axis=1)
        kept = keep(dnet)
        carried = dnet if weights_only else kept
        dx[t], dh_next, dc_next, dnet = carried @ w, carried @ u, dc * f, kept
        dw, du, db = dw + dnet.T @ x[t], du + dnet.T @ h[t], db + dnet.sum(0)
    return dx, dh_next, dc_next, dw, du, db


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("t", [0.0, 0.02, 0.1, 10.0])
def test_an_lstm_layer_has_the_gradients_of_the_papers_equations(t, weights_only):
    """At t = 0 nothing is removed, at 0.02 and 0.1 some of dnet, at 10 all of it; before all products or the weights' alone."""
    lstm = ThresholdedLSTM(4, 5, dtype=torch.float64, threshold=t or NOTHING, weights_only=weights_only)
    x = torch.randn(7, 3, 4, dtype=torch.float64, generator=generator(1), requires_grad=True)
    h0, c0 = states(lstm, 3)
    d_out = torch.randn(7, 3, 5, dtype=torch.float64, generator=generator(2))
    inputs = [x, h0, c0, lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0]
    found = torch.autograd.grad((lstm(x, (h0, c0))[0] * d_out).sum(), inputs)
    share = []

    def keep(dnet):
        share.append((np.abs(dnet) > t).mean())
        return np.where(np.abs(dnet) > t, dnet, 0.0)

    w, u, b = (p.detach().numpy() for p in (lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0))
    first = (s[0].detach().numpy() for s in (h0, c0))
    wanted = numpy_lstm_gradients(x.detach().numpy(), *first, w, u, b, d_out.numpy(), keep, weights_only)
    assert {0.0: np.mean(share) == 1.0, 10.0: np.mean(share) == 0.0}.get(t, 0.1 < np.mean(share) < 0.9)
    for a, b in zip(found, wanted, strict=True):
        a = a[0].numpy() if a.ndim == 3 and b.ndim == 2 else a.numpy()
        assert np.abs(a - b).max() <= 1e-12 * max(np.abs(b).max(), 1e-3)


@pytest.mark.parametrize("t", [0.0, 0.03])
def test_a_gru_layer_has_the_gradients_of_its_equations_with_dnet_thresholded_once(t):
    """BPTT of nn.GRU's equations in NumPy: all three of dnet formed, thresholded, and dnet_n times r for the state's side."""
    gru = ThresholdedGRU(4, 5, dtype=torch.float64, threshold=t or NOTHING)
    x = torch.randn(6, 3, 4, dtype=torch.float64, generator=generator(1), requires_grad=True)
    d_out = torch.randn(6, 3, 5, dtype=torch.float64, generator=generator(2))
    weights = [gru.weight_ih_l0, gru.weight_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0]
    found = torch.autograd.grad((gru(x)[0] * d_out).sum(), [x, *weights])
    w, u, b, b2 = (p.detach().numpy() for p in weights)
    xs, h, saved = x.detach().numpy(), [np.zeros((3, 5))], []
    for t_x in xs:
        a, q = t_x @ w.T + b, h[-1] @ u.T + b2
        r, z = (1 / (1 + np.exp(-(a + q)[:, k : k + 5])) for k in (0, 5))
        n = np.tanh(a[:, 10:] + r * q[:, 10:])
        saved.append((r, z, n, q[:, 10:]))
        h.append((1 - z) * n + z * h[-1])
    wanted = [np.zeros_like(part) for part in (xs, w, u, b, b2)]
    dh = np.zeros((3, 5))
    for k in reversed(range(6)):
        r, z, n, q = saved[k]
        dh = dh + d_out[k].numpy()
        dn = dh * (1 - z) * (1 - n * n)
        dnet = np.concatenate([dn * q * r * (1 - r), dh * (h[k] - n) * z * (1 - z), dn], axis=1)
        dnet[np.abs(dnet) <= t] = 0
        of_state = dnet.copy()
        of_state[:, 10:] *= r
        wanted[0][k] = dnet @ w
        dh = of_state @ u + dh * z
        for total, part in zip(wanted[1:], (dnet.T @ xs[k], of_state.T @ h[k], dnet.sum(0), of_state.sum(0)), strict=True):
            total += part
    for a, b in zip(found, wanted, strict=True):
        assert np.abs(a.numpy() - b).max() <= 1e-12 * np.abs(b).max()


@settings(max_examples=40)
@given(
    kind=st.sampled_from(list(KINDS)),
    features=st.integers(1, 5),
    hidden=st.integers(1, 6),
    layers=st.integers(1, 3),
    bias=st.booleans(),
    batch_first=st.booleans(),
    bidirectional=st.booleans(),
    steps=st.integers(1, 5),
    batch=st.sampled_from([None, 1, 3]),
    with_state=st.booleans(),
)
def test_a_rule_that_removes_nothing_leaves_torchs_layer_in_outputs_and_all_gradients(
    kind, features, hidden, layers, bias, batch_first, bidirectional, steps, batch, with_state
):
    options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    ours, theirs = pair(kind, features, hidden, layers, **options)
    shape = (steps,) if batch is None else (batch, steps) if batch_first else (steps, batch)
    x = torch.randn(*shape, features, dtype=torch.float64, generator=generator(1), requires_grad=True)
    hx = states(ours, batch) if with_state else None
    assert_same(results(ours, x, hx), results(theirs, x, hx), 1e-12)


@pytest.mark.parametrize("lengths", [[6, 4, 4, 1], [2, 6, 1, 4], [3, 3, 3, 3]])
@pytest.mark.parametrize("kind", list(KINDS))
def test_packed_sequences_begin_and_end_each_at_its_own_step(kind, lengths):
    ours, theirs = pair(kind, 3, 5, 2, bidirectional=True)
    x = torch.randn(6, 4, 3, dtype=torch.float64, generator=generator(1))
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=lengths == sorted(lengths, reverse=True))
    packed.data.requires_grad_()
    for hx in (None, states(ours, 4)):
        assert_same(results(ours, packed, hx), results(theirs, packed, hx), 1e-12)
    with record(ours):
        found = ours(packed)[0]
    assert torch.equal(found.batch_sizes, packed.batch_sizes)
    assert (found.sorted_indices is None) == (packed.sorted_indices is None)


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradcheck(kind):
    ours, _ = pair(kind, 2, 3, 2, bidirectional=True)
    x = torch.randn(4, 2, 2, dtype=torch.float64, generator=generator(1), requires_grad=True)
    hx = states(ours, 2)
    names = [name for name, _ in ours.named_parameters()]

    def run(x, *rest):
        count = len(flat(hx))
        state, values = rest[:count], dict(zip(names, rest[count:], strict=True))
        out, last = torch.func.functional_call(ours, values, (x, state if count == 2 else state[0]))
        return out, *flat(last)

    assert torch.autograd.gradcheck(run, (x, *flat(hx), *ours.parameters()))


@pytest.mark.parametrize("threshold", [NOTHING, 0.0])
@pytest.mark.parametrize("kind", list(KINDS))
def test_float32_equals_torch_to_rounding(kind, threshold):
    """Measured: 1e-6 of the largest entry, at most; a missing term of any gradient is 1e-2 or more."""
    ours, theirs = pair(kind, 30, 70, 2, dtype=torch.float32, threshold=threshold)
    x = torch.randn(35, 20, 30, generator=generator(1), requires_grad=True)
    assert_same(results(ours, x), results(theirs, x), 5e-6)


@pytest.mark.parametrize("kind", list(KINDS))
def test_state_dict_is_torchs_both_ways(kind):
    ours, theirs = pair(kind, 3, 4, 2, bidirectional=True, threshold=HeldSparsity(0.5))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 2, 3, dtype=torch.float64, generator=generator(1))
    assert torch.equal(ours.eval()(x)[0].detach(), theirs(x)[0].detach()) or torch.allclose(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_copy_goes_on_from_the_thresholds_that_its_rule_holds(kind):
    """Pickled or deep: the same gradients in the next step, under a rule whose state the steps before have changed."""
    (ours, _), x = pair(kind, 3, 4, 2, bidirectional=True, threshold=HeldSparsity(0.5)), torch.randn(4, 2, 3).double()
    started = copy.deepcopy(ours.threshold.state_dict())
    ours(x)[0].square().sum().backward()
    assert ours.threshold.state_dict() != started
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    found = []
    for layer in (ours, torch.load(buffer, weights_only=False), copy.deepcopy(ours)):
        layer.zero_grad()
        layer(x)[0].square().sum().backward()
        found.append(([p.grad for p in layer.parameters()], layer.threshold.state_dict()))
    for gradients, state in found[1:]:
        assert state == found[0][1]
        assert all(map(torch.equal, gradients, found[0][0]))


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_two_gradients_share_their_memory(kind):
    """Who clips `torch.autograd.grad`'s in place would clip twice."""
    ours, _ = pair(kind, 30, 70, dtype=torch.float32)
    found = torch.autograd.grad(ours(torch.randn(5, 4, 30))[0].sum(), list(ours.parameters()))
    assert len({part.untyped_storage().data_ptr() for part in found}) == len(found) == 4


@pytest.mark.parametrize("kind", list(KINDS))
def test_dropout_between_layers_draws_the_masks_of_torch(kind):
    ours, theirs = pair(kind, 3, 6, 3, dropout=0.4)
    x = torch.randn(4, 2, 3, dtype=torch.float64, generator=generator(1), requires_grad=True)
    found = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        found.append(results(module, x))
    assert_same(*found, 1e-12)


def test_the_forward_pass_does_not_depend_on_the_threshold():
    x = torch.randn(5, 2, 3, generator=generator(1))
    lstm = ThresholdedLSTM(3, 4, 2, threshold=1e-9)
    before = lstm(x)[0]
    lstm.threshold = 1e3
    assert torch.equal(lstm(x)[0], before)
    with torch.no_grad():
        assert torch.allclose(lstm(x)[0], before)


def own_layers(tensor: torch.Tensor) -> int:
    """How many layers of this package's a result was made by."""
    todo, found = [tensor.grad_fn], set()
    while todo:
        if (node := todo.pop()) is not None and node not in found:
            found.add(node)
            todo += [before for before, _ in node.next_functions]
    return sum(node.name() == "_LayerBackward" for node in found)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_with_threshold_0_torchs_own_layer_runs_where_there_are_no_faster_kernels(kind, packed):
    """Bit for bit; any other rule, and a record, takes the way of this package."""
    ours, theirs = pair(kind, 3, 5, 2, bidirectional=True, batch_first=True, threshold=0.0)
    x = torch.randn(4, 6, 3, dtype=torch.float64, generator=generator(1))
    x = pack_padded_sequence(x, torch.tensor([2, 6, 1, 4]), True, enforce_sorted=False) if packed else x.requires_grad_()
    hx = states(ours, 4)
    if packed:
        x.data.requires_grad_()
    for found, wanted in zip(results(ours, x, hx), results(theirs, x, hx), strict=True):
        assert torch.equal(found, wanted)
    first, *last = flat(ours(x, hx))
    assert own_layers(first) == 0
    with record(ours), pytest.raises(ReproError, match="recorded in the backward pass alone"):
        first.sum().backward(retain_graph=True)
    with record(ours) as measured:
        assert own_layers(flat(ours(x, hx))[0]) == 4
    assert measured["l1_reverse"].histograms is not None
    ours.threshold = 0.1
    assert own_layers(flat(ours(x, hx))[0]) == 4
    for result in (first, *last):
        with pytest.raises(
            ReproError, match=rf"threshold of {type(ours).__name__} was 0 in the forward pass, now it is Static"
        ):
            result.sum().backward(retain_graph=True)
    frozen, _ = pair(kind, 3, 5, threshold=0.0)
    frozen.requires_grad_(False)
    assert not frozen(torch.zeros(2, 1, 3, dtype=torch.float64))[0].requires_grad


@pytest.mark.parametrize("kind", list(KINDS))
def test_under_autocast_a_layer_computes_in_the_numbers_of_its_weights(kind):
    """In both passes, whatever numbers its input comes in; its gradient has these."""
    ours, _ = pair(kind, 3, 64, 2, dtype=torch.float32, threshold=0.01)
    x, hx = torch.randn(5, 2, 3, generator=generator(1)).bfloat16().requires_grad_(), states(ours, 2, torch.float32)
    wanted = results(ours, x.detach().float().requires_grad_(), hx)
    with torch.autocast("cpu"):
        found = results(ours, x, hx)
        assert torch.equal(flat(ours(x, list(hx) if isinstance(hx, tuple) else hx))[0], found[0])
        ours.threshold = 0.0
        assert flat(ours(x, hx))[0].dtype == torch.float32
        with torch.no_grad():
            assert flat(ours(x, hx))[0].dtype == torch.float32
    outputs = len(flat(hx)) + 1
    wanted[outputs] = wanted[outputs].bfloat16()
    assert found[outputs].dtype == torch.bfloat16
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_the_threshold_in_force_is_that_of_the_backward_pass():
    lstm, x = ThresholdedLSTM(3, 4, threshold=1e-9), torch.randn(5, 2, 3, generator=generator(1))
    loss = lstm(x)[0].sum()
    lstm.threshold = 1e3
    loss.backward()
    assert all(p.grad.count_nonzero() == 0 for p in lstm.parameters())


def test_a_rule_sees_the_whole_dnet_of_each_step_of_each_layer_and_direction_once():
    class Seen(Rule):
        def __init__(self):
            self.shapes, self.sites = [], 0

        def new_site(self):
            self.sites += 1
            return self.sites

        def threshold(self, dnet, site=0):
            self.shapes.append((site, tuple(dnet.shape)))
            return 0.0

    rule = Seen()
    lstm = ThresholdedLSTM(3, 5, 2, bidirectional=True, threshold=rule)
    x = pack_padded_sequence(torch.randn(3, 2, 3, generator=generator(1)), torch.tensor([3, 1]))
    lstm(x)[0].data.sum().backward()
    wanted = {site: [1, 1, 2] if site % 2 else [2, 1, 1] for site in range(1, 5)}
    assert {site: [s[0] for k, s in rule.shapes if k == site] for site in wanted} == wanted
    assert {s[1] for _, s in rule.shapes} == {20}


def test_frozen_weights_and_inputs_get_no_gradient():
    lstm = ThresholdedLSTM(3, 4)
    lstm.weight_ih_l0.requires_grad_(False)
    lstm(torch.randn(5, 2, 3))[0].sum().backward()
    assert lstm.weight_ih_l0.grad is None
    assert lstm.weight_hh_l0.grad.count_nonzero() > 0


class Masked(Rule):
    """Keeps entries at random places, so that rounding cannot change which: the masked dense computation in any precision."""

    def __init__(self, density: float):
        self.density, self.calls = density, 0

    def __call__(self, dnet, site=0):
        self.calls += 1
        return dnet.mul_(torch.rand(dnet.shape, generator=generator(self.calls)) < self.density)


COMPILED = pytest.mark.skipif(not has_avx2(), reason="compiled loops need AVX2")


@COMPILED
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lengths", [None, [9, 9, 7, 3, 1]])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.2, 0.6])
@pytest.mark.parametrize("hidden", [64, 70, 130])
def test_compiled_loops_are_the_masked_dense_computation(hidden, density, lengths, threads, monkeypatch):
    """Against torch's operations in float64, with the same mask; by all of dnet or by its non-zero entries."""
    lengths = torch.tensor(lengths or [9] * 5)
    x = torch.randn(9, 5, 33, generator=generator(1))
    torch.manual_seed(0)
    lstm = ThresholdedLSTM(33, hidden, 2, bidirectional=True, threshold=Masked(density))
    exact = ThresholdedLSTM(33, hidden, 2, bidirectional=True, threshold=Masked(density), dtype=torch.float64)
    exact.load_state_dict(lstm.state_dict())
    monkeypatch.setattr(compiled, "_WORTH_THREADS", 0)
    try:
        torch.set_num_threads(threads)
        found, wanted = (
            results(module, pack_padded_sequence(x.to(dtype).requires_grad_(), lengths))
            for module, dtype in ((lstm, torch.float32), (exact, torch.float64))
        )
    finally:
        torch.set_num_threads(1)
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).abs().max() <= 3e-6 * b.abs().max() + 1e-12


@COMPILED
@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 6, 2]])
@pytest.mark.parametrize("density", [0.1, 0.7])
def test_compiled_loops_keep_a_rule_to_the_gradients_of_the_weights(density, lengths):
    """Inputs and first states get the dense gradient, weights that of the masked dnet, all as torch's operations in float64."""
    x = torch.randn(9, 3, 20, generator=generator(1))
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        lstm = ThresholdedLSTM(20, 70, threshold=Masked(density), weights_only=True)
        plain = nn.LSTM(20, 70)
        plain.load_state_dict(lstm.state_dict())
        found.append(results(lstm.to(dtype), pack_padded_sequence(x.to(dtype).requires_grad_(), lengths)))
    dense = results(plain.double(), pack_padded_sequence(x.double().requires_grad_(), lengths))
    for a, b in zip(*found, strict=True):
        assert (a.double() - b).abs().max() <= 3e-6 * b.abs().max()
    assert (found[1][3] - dense[3]).abs().max() <= 1e-12, "of the input"
    assert (found[1][4] - dense[4]).abs().max() > 1e-3, "of W"


def test_what_is_recorded_of_a_rule_for_the_weights_are_its_zeros():
    """The record counts the dnet of the weights; a gradient that is carried back stays as it was formed."""
    torch.manual_seed(0)
    lstm, x = ThresholdedLSTM(3, 6, threshold=TopK(0.75), weights_only=True), torch.randn(5, 4, 3, requires_grad=True)
    with record(lstm) as measured:
        lstm(x)[0].square().sum().backward()
    assert measured["l0"].overall()["sparsity"] == pytest.approx(0.75)
    carried = x.grad.clone()
    x.grad = None
    with dense(lstm):
        lstm(x)[0].square().sum().backward()
    assert (carried - x.grad).abs().max() <= 1e-6 * carried.abs().max()


@COMPILED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_gradients_go_through_the_compiled_loops(dtype, monkeypatch):
    """The gradients of the torch path, up to entries that rounding moves by one unit of the format, and not the exact ones."""
    x, gradients = torch.randn(12, 6, 20, generator=generator(1)), []
    for compiled_loops, rule in ((True, Rounded(0.0, dtype)), (False, Rounded(0.0, dtype)), (False, Static(0.0))):
        monkeypatch.setattr(compiled, "has_avx2", lambda is_there=compiled_loops: is_there)
        torch.manual_seed(0)
        lstm = ThresholdedLSTM(20, 100, threshold=rule)
        lstm(x)[0].pow(2).sum().backward()
        gradients.append(lstm.weight_hh_l0.grad)
    ours, torchs, exact = gradients
    largest = exact.abs().max()
    assert (ours - torchs).norm() < 0.3 * (torchs - exact).norm()
    assert 1e-5 * largest < (ours - exact).abs().max() < 1e-2 * largest


class MaskedInTurns(Masked):
    """Every fourth step keeps half of its entries, the others few: some steps by all of dnet, all of them together by lists."""

    def __call__(self, dnet, site=0):
        self.density = 0.5 if self.calls % 4 == 1 else 0.05
        return super().__call__(dnet, site)


@COMPILED
def test_lists_of_single_steps_serve_all_steps_only_if_every_step_has_them():
    x = torch.randn(9, 5, 33, generator=generator(1))
    torch.manual_seed(0)
    lstm = ThresholdedLSTM(33, 70, threshold=MaskedInTurns(0.0))
    exact = ThresholdedLSTM(33, 70, threshold=MaskedInTurns(0.0), dtype=torch.float64)
    exact.load_state_dict(lstm.state_dict())
    found = []
    for module, dtype in ((lstm, torch.float32), (exact, torch.float64)):
        given = x.detach().to(dtype).requires_grad_()
        module(given)[0].pow(2).sum().backward()
        found.append([given.grad.double(), *(p.grad.double() for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 3e-6 * b.abs().max()


class Counted(Rule):
    """A static threshold that remembers what it is told."""

    feedback = True

    def __init__(self, t: float, signed: bool):
        self.t, self.signed, self.counts = t, signed, []

    def known(self, site=0):
        return self.t

    def observe(self, site, kept, alive, total):
        self.counts.append((kept, alive, total))


@COMPILED
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("t", [0.0, 0.01, 0.1])
def test_compiled_threshold_removes_what_the_rule_in_torch_does(t, signed, monkeypatch):
    """As many entries at every step, up to the few that rounding moves over the threshold."""
    torch.manual_seed(0)
    lstm, x = ThresholdedLSTM(20, 100), torch.randn(12, 6, 20, generator=generator(1))
    weight = torch.randn(12, 6, 100, generator=generator(2))
    counts, gradients = [], []
    for compiled_loops in (True, False):
        monkeypatch.setattr(compiled, "has_avx2", lambda is_there=compiled_loops: is_there)
        rule = lstm.threshold = Counted(t, signed)
        lstm.zero_grad()
        (lstm(x)[0] * weight).sum().backward()
        counts.append(torch.tensor(rule.counts))
        gradients.append(lstm.weight_hh_l0.grad)
    assert (counts[0] - counts[1]).abs().max() <= 2
    assert {(0.0, False): (counts[0][:, 0] == counts[0][:, 1]).all()}.get((t, signed), (counts[0][:, 0] < 2350).all())
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-3 * gradients[1].abs().max()


@COMPILED
@pytest.mark.parametrize("rule", [Static(0.02), HeldSparsity(0.8), TopK(0.8), RelativeRMS(0.5)])
def test_every_kind_of_rule_goes_through_the_compiled_loops(rule, monkeypatch):
    """t known before the pass, before the step, or from dnet itself: the gradients are those of the torch path, but for entries
    at the threshold. Without a rule, or with other shares, the cosine is below 0.999."""
    x, gradients = torch.randn(12, 6, 20, generator=generator(1)), []
    for compiled_loops in (True, False):
        monkeypatch.setattr(compiled, "has_avx2", lambda is_there=compiled_loops: is_there)
        torch.manual_seed(0)
        lstm = ThresholdedLSTM(20, 100, threshold=copy.deepcopy(rule))
        for _ in range(3):
            lstm.zero_grad()
            lstm(x)[0].pow(2).sum().backward()
        gradients.append(lstm.weight_hh_l0.grad.flatten())
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.9999


@COMPILED
@pytest.mark.parametrize("library", [False, True])
def test_large_dense_products_are_torchs_by_either_way(library, monkeypatch):
    """A machine takes one of them; the other is that of other machines."""
    monkeypatch.setattr(compiled, "_library_is_faster", lambda: library)
    ours, theirs = pair("lstm", 30, 70, 2, dtype=torch.float32, threshold=0.0)
    x = torch.randn(9, 20, 30, generator=generator(1), requires_grad=True)
    assert_same(results(ours, x), results(theirs, x), 5e-6)


@COMPILED
def test_a_signed_threshold_may_depend_on_all_of_dnet(monkeypatch):
    """The compiled loops must not remove what the rule has not seen."""

    class SignedRMS(RelativeRMS):
        signed = True

    x, found = torch.randn(6, 4, 20, generator=generator(1)), []
    for compiled_loops in (True, False):
        monkeypatch.setattr(compiled, "has_avx2", lambda is_there=compiled_loops: is_there)
        torch.manual_seed(0)
        lstm = ThresholdedLSTM(20, 70, threshold=SignedRMS(1.0))
        lstm(x)[0].pow(2).sum().backward()
        found.append(lstm.weight_hh_l0.grad)
    assert_same(found[:1], found[1:], 1e-5)


@COMPILED
@pytest.mark.parametrize("library", [False, True])
def test_an_input_of_one_feature_may_be_a_view(library, monkeypatch):
    monkeypatch.setattr(compiled, "_library_is_faster", lambda: library)
    ours, theirs = pair("lstm", 1, 70, dtype=torch.float32, threshold=0.0)
    x = torch.randn(7, 20, 5, generator=generator(1)).permute(1, 2, 0)[:, :, :1].requires_grad_()
    assert_same(results(ours, x), results(theirs, x), 5e-6)


@pytest.mark.parametrize("hidden", [8, 64])
def test_torch_compile_leaves_layers_and_their_rules_as_they_are(hidden):
    """The rule is that of the backward pass also within a compiled model, and a dense pass is dense."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": ThresholdedLSTM(4, hidden, threshold=1e-3), "linear": ThresholdedLinear(hidden, 2)})
    x, found = torch.randn(5, 3, 4, generator=generator(1)), []
    for run in (torch.compile(lambda x: model["linear"](model["lstm"](x)[0]), backend="eager"), None):
        out = run(x) if run else model["linear"](model["lstm"](x)[0])
        loss = out.pow(2).sum()
        dense = dense_gradients(model, loss)
        model["linear"].threshold = 0.1
        model.zero_grad()
        loss.backward()
        found.append([*dense.values(), *(p.grad for p in model.parameters())])
        model["linear"].threshold = 0.0
    assert_same(*found, 1e-6)
    assert not torch.equal(found[0][0], found[0][len(dense)])


@COMPILED
def test_compiled_loops_run_with_threshold_0_too_and_look_the_rule_up_in_the_backward_pass():
    lstm, x = ThresholdedLSTM(8, 64), torch.randn(4, 3, 8, generator=generator(1))
    out = lstm(x)[0]
    assert own_layers(out) == 1
    lstm.threshold = 1e3
    out.sum().backward()
    assert all(p.grad.count_nonzero() == 0 for p in lstm.parameters())


@COMPILED
def test_compiled_loops_pass_nan_on():
    lstm, x = ThresholdedLSTM(8, 64, threshold=0.5), torch.randn(4, 3, 8, generator=generator(1))
    out = lstm(x)[0]
    weight = torch.ones_like(out)
    weight[3, 1, 5] = float("nan")
    (out * weight).sum().backward()
    assert lstm.weight_hh_l0.grad[5].isnan().any()
    assert lstm.weight_hh_l0.grad[0].isnan().any(), "through dh, to all gates of the step before"


def test_linear_thresholds_the_gradient_of_its_output_before_both_products():
    layer = ThresholdedLinear(3, 4, threshold=0.5)
    x = torch.randn(6, 3, generator=generator(1), requires_grad=True)
    d_y = torch.randn(6, 4, generator=generator(2))
    kept = d_y * (d_y.abs() > 0.5)
    assert 0 < kept.count_nonzero() < kept.numel()
    found = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], d_y)
    assert_same(found, [kept @ layer.weight.detach(), kept.t() @ x.detach(), kept.sum(0)], 1e-6)


def test_what_follows_a_linear_layer_may_change_its_output_in_place():
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    ours, x = copy.deepcopy(plain), torch.randn(3, 4, generator=generator(1))
    threshold_linears(ours, 0.0)
    for model in (plain, ours):
        model(x).pow(2).sum().backward()
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in plain.parameters()], 1e-6)


@pytest.mark.parametrize("hidden", [20, 70])
@pytest.mark.parametrize("bias", [False, True])
def test_summed_loss_is_torchs(hidden, bias):
    """With and without a bias, and under autocast in the numbers of the weights."""
    torch.manual_seed(0)
    decoder, x = nn.Linear(hidden, 90, bias=bias), torch.randn(12, hidden, generator=generator(1), requires_grad=True)
    targets, wanted = torch.arange(12) * 7, [x, *decoder.parameters()]
    theirs = nn.functional.cross_entropy(decoder(x), targets, reduction="sum")
    expected = [theirs, *torch.autograd.grad(theirs, wanted)]
    ours = summed_loss(x, decoder, targets)
    assert_same([ours, *torch.autograd.grad(ours, wanted)], expected, 1e-5)
    with torch.autocast("cpu"):
        ours = summed_loss(x.bfloat16(), decoder, targets)
        assert ours.dtype == torch.float32
        assert_same([ours, *torch.autograd.grad(ours, wanted)], expected, 3e-2)
    with pytest.raises(ReproError, match="the decoder is a ThresholdedLinear, whose rule would not act here"):
        summed_loss(x, ThresholdedLinear(hidden, 90), targets)
    for wrong in (targets[:1], targets[:5], targets[:, None]):
        with pytest.raises(ReproError, match="targets"):
            summed_loss(x, decoder, wrong)


def test_the_linear_layers_of_a_block_keep_their_parameters():
    block = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3))
    plain, x = copy.deepcopy(block), torch.randn(5, 3, generator=generator(1))
    assert threshold_linears(block, TopK(0.5)) == ["0", "2"]
    assert torch.equal(block(x), plain(x))
    assert list(block.state_dict()) == list(plain.state_dict())
    block(x).pow(2).sum().backward()
    plain(x).pow(2).sum().backward()
    assert 0.5 < nn.functional.cosine_similarity(block[0].weight.grad.flatten(), plain[0].weight.grad.flatten(), dim=0) < 0.9999
    threshold_linears(block, 1e3)  # again: another rule
    block.zero_grad()
    block(x).pow(2).sum().backward()
    assert not block[0].weight.grad.any()
    assert threshold_linears(nn.TransformerEncoderLayer(4, 2), 0.1) == ["linear1", "linear2"]
    with pytest.raises(ReproError, match=r"has no nn\.Linear"):
        threshold_linears(nn.GELU(), 0.1)


def test_every_zero_has_one_cause_and_the_right_one():
    """Saturated by a bias of 200, arriving where no loss reaches, factor at c_0 = 0, underflow of 1e-44, threshold."""
    torch.manual_seed(0)
    lstm = ThresholdedLSTM(1, 5, threshold=0.0)
    x = torch.randn(3, 2, 1, generator=generator(1))
    with torch.no_grad():
        lstm.bias_ih_l0[5] = 200.0  # the forget gate of unit 0 is exactly 1
    weight = torch.ones(3, 2, 5)
    weight[:, 0] = 0.0  # no loss for sequence 0
    weight[:, 1, 1] = 1e-44  # a subnormal gradient for unit 1 ...
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()  # ... and none through the other units
    with record(lstm) as measured:
        (lstm(x)[0] * weight).sum().backward()
    layer = measured["l0"]
    shares = {cause: layer.by_cause()[:, :, k] for k, cause in enumerate(CAUSES)}
    assert shares["saturated"][:, 1].tolist() == [0.2] * 3
    assert shares["saturated"][:, [0, 2, 3]].count_nonzero() == 0
    assert torch.allclose(shares["arriving"][:, [0, 2, 3]], torch.tensor(0.5, dtype=torch.float64))
    assert torch.allclose(shares["factor"][0, 1], torch.tensor(0.4, dtype=torch.float64)), "c_0 = 0 for the forget gate"
    assert shares["factor"][1:].count_nonzero() == 0
    left = shares["underflow"][:, [0, 3]]  # of i and o, whose derivatives are at most 1/4: unit 1 of sequence 1; g's is near 1
    assert torch.allclose(left, torch.tensor(0.1, dtype=torch.float64)) and not shares["underflow"][:, 2].any()
    assert shares["underflow"][:, 1].tolist() == [0.0, 0.1, 0.1], "at the first step c_0 = 0 comes before"
    assert shares["threshold"].count_nonzero() == 0
    lstm.threshold = 1e3
    with record(lstm) as measured:
        (lstm(x)[0] * weight).sum().backward()
    assert torch.equal(measured["l0"].sparsity(), torch.ones(3, 4, dtype=torch.float64))
    assert measured["l0"].overall()["sparsity"] == 1.0
    for cause in CAUSES[:4]:
        assert torch.equal(measured["l0"].by_cause()[:, :, CAUSES.index(cause)], shares[cause])


@pytest.mark.parametrize("kind", list(KINDS))
def test_recorded_sparsity_is_that_of_the_dnet_the_rule_left_and_recording_changes_nothing(kind):
    ours, _ = pair(kind, 3, 5, 2, bidirectional=True, threshold=Static(0.01), dtype=torch.float32)
    x = torch.randn(4, 2, 3, generator=generator(1), requires_grad=True)
    without = results(ours, x)
    with record(ours) as measured:
        found = results(ours, x)
        results(ours, x)
    assert_same(found, without, 2e-6)
    assert list(measured) == ["l0", "l0_reverse", "l1", "l1_reverse"]
    gates = 4 if kind == "lstm" else 3
    assert measured["l0"].totals == [2 * 2 * 5] * 4
    assert measured["l1"].sparsity().shape == (4, gates)
    assert 0 < measured["l1"].overall()["threshold"] < 1
    assert measured["l1"].histograms.sum(1).tolist() == [2 * 4 * 2 * 5] * gates
    assert all(site.record is None for site in ours.sites)
    with pytest.raises(ReproError, match="nothing to record"), record(nn.LSTM(2, 2)):
        pass


@pytest.mark.skipif(not has_avx2(), reason="needs AVX2")
def test_a_recorded_step_has_the_zeros_of_the_steps_that_train():
    """Of compiled kernels too: full cells, tanh(c) = 1, make zeros, and another tanh would round others to it."""
    torch.manual_seed(0)
    ours = ThresholdedLSTM(64, 64, threshold=NOTHING)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter *= 40
    x = torch.randn(40, 8, 64, generator=generator(1))
    ours.threshold = counted = counting.Counted(Static(0.0))
    ours(x)[0].sum().backward()
    entries, zeros = counted.take()
    ours.threshold = NOTHING
    with record(ours) as measured:
        ours(x)[0].sum().backward()
    assert 0.1 < zeros / entries < 0.9
    assert measured["l0"].overall()["sparsity"] * entries == pytest.approx(zeros, rel=2e-3)


def test_what_was_not_recorded_is_refused():
    lstm = ThresholdedLSTM(3, 4)
    with record(lstm) as measured:
        lstm(torch.ones(2, 1, 3))
    for ask in (measured["l0"].sparsity, measured["l0"].by_cause, measured["l0"].overall):
        with pytest.raises(ReproError, match="no backward pass of this layer ran"):
            ask()


def test_cosine_is_1_without_a_threshold_and_that_of_the_dense_gradient_with_one():
    model = nn.Sequential(ThresholdedLSTM(3, 6, 2, threshold=TopK(0.7)))
    x = torch.randn(5, 4, 3, generator=generator(1))
    loss = model(x)[0].pow(2).sum()
    reference = dense_gradients(model, loss)
    with pytest.raises(ReproError, match=r"0\.weight_ih_l0 has no gradient: call `loss\.backward\(\)` first"):
        cosines(model, reference)
    loss.backward()
    found = cosines(model, reference)
    plain = nn.LSTM(3, 6, 2)
    plain.load_state_dict(model[0].state_dict())
    plain(x)[0].pow(2).sum().backward()
    for name, parameter in plain.named_parameters():
        cosine = nn.functional.cosine_similarity(model[0].get_parameter(name).grad.flatten(), parameter.grad.flatten(), dim=0)
        assert found[f"0.{name}"] == pytest.approx(cosine.item(), abs=1e-5)
        assert cosine < 0.9999
    model.zero_grad()
    with dense(model):
        model(x)[0].pow(2).sum().backward()
    assert cosines(model, reference)["all"] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("hidden", [8, 64])
def test_a_dense_pass_is_not_recorded_and_records_may_be_nested(hidden):
    """What `dense_gradients` does within a block adds nothing to the zeros of the pass that the rule acts on."""
    lstm, x, found = ThresholdedLSTM(8, hidden, threshold=TopK(0.8)), torch.randn(6, 4, 8, generator=generator(1)), []
    for dense_pass in (False, True):
        with record(lstm) as outer:
            loss = lstm(x)[0].square().sum()
            if dense_pass:
                dense_gradients(lstm, loss)
                with record(lstm) as inner:
                    lstm(x)[0].square().sum().backward()
                assert inner["l0"].totals == found[0].totals
            loss.backward()
        found.append(outer["l0"])
    assert found[0].totals == found[1].totals
    assert torch.equal(found[0].sparsity(), found[1].sparsity())


def test_a_dense_pass_tells_a_rule_nothing():
    rule = HeldSparsity(0.5)
    lstm = ThresholdedLSTM(3, 4, threshold=rule)
    dense_gradients(lstm, lstm(torch.randn(5, 2, 3))[0].sum())
    assert rule.known(lstm.sites[0].number) is None


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_minibatch_of_nobody_gives_what_torch_gives(kind):
    ours, torchs = pair(kind, 3, 4, dtype=torch.float32, batch_first=True)
    for x in (torch.zeros(0, 5, 3), torch.zeros(0, 5, 3, requires_grad=True)):
        (out, _), (wanted, _) = ours(x), torchs(x)
        assert out.shape == wanted.shape == (0, 5, 4)
        out.sum().backward()


@pytest.mark.parametrize("layer", [*KINDS, "linear", "summed loss"])
def test_gradients_of_gradients_are_refused(layer):
    """They would lack what the rule's gradients depend on, in silence: a penalty on gradients would do nothing."""
    x = torch.randn(5, 2, 3, generator=generator(1), requires_grad=True)
    if layer == "summed loss":
        loss = summed_loss(x.flatten(0, 1), nn.Linear(3, 4), torch.zeros(10, dtype=torch.long))
    else:
        made = (
            ThresholdedLinear(3, 4, threshold=0.1)(x) if layer == "linear" else pair(layer, 3, 4, dtype=torch.float32)[0](x)[0]
        )
        loss = made.sum()
    with pytest.raises(ReproError, match="create_graph=True"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("kind", list(KINDS))
def test_wrong_input_is_named(kind):
    ours, _ = pair(kind, 3, 4, dtype=torch.float32)
    name = type(ours).__name__
    for x, message in (
        (torch.zeros(5, 2, 4), f"input of {name} has 4 features: input_size is 3"),
        (torch.zeros(3), f"input of {name} has 1 dimensions"),
        (torch.zeros(0, 2, 3), f"input of {name} has no frames"),
        (torch.zeros(5, 2, 3, dtype=torch.float64), f"input of {name} is torch.float64, its weights are torch.float32"),
    ):
        with pytest.raises(ReproError, match=message):
            ours(x)
    x = torch.zeros(5, 2, 3)
    for hx in (states(ours, 3, torch.float32), states(ours, 2, torch.float64), states(ours, 2, torch.bfloat16), 0.0):
        with pytest.raises(ReproError, match=rf"states of {name} are .*of \(1, 2, 4\) torch.float32 on cpu needed"):
            ours(x, hx)
    for half in (torch.bfloat16, torch.float16):
        with pytest.raises(ReproError, match=f"{name} in {half} on the CPU: float32 or float64 is needed there"):
            copy.deepcopy(ours).to(half)(torch.zeros(5, 2, 3, dtype=half))


def test_projections_are_refused():
    with pytest.raises(ReproError, match="proj_size is 2"):
        ThresholdedLSTM(3, 4, proj_size=2)
