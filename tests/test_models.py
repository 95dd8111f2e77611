"""Layers against plain loops, the speech models against the paper's tables, CTC against counting paths."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

from repro.datasets.batches import Batch
from repro.datasets.speech import encode
from repro.errors import ReproError
from repro.models import speech
from repro.models.ctc import ctc_loss, evaluate
from repro.models.recurrent import CLIP, BidirectionalClippedRNN, RowConvolution, _ClippedRecurrence
from repro.models.speech import PAPER, SpeechConfig, SpeechModel, parameter_table
from repro.report.published import load_published

LENGTHS = [[5, 3, 3, 1], [4, 4], [1, 1, 1], [6], [7, 1]]  # shrinking, equal, single-frame and lone utterances


def utterances(lengths, features, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    return [scale * torch.randn(length, features, generator=generator, dtype=torch.float64) for length in lengths]


def packed(sequences):
    return pack_sequence(sequences)


def unpacked(sequence):
    padded, lengths = pad_packed_sequence(sequence)
    return [padded[:length, i] for i, length in enumerate(lengths.tolist())]


# Recurrent layer


def clip(x):
    return x.clamp(min=0.0).clamp(max=20.0)


def bidirectional_loop(layer, sequences, training):
    """f_t = clip(BN(W x_t) + U f_{t-1}), b_t = clip(BN(W x_t) + V b_{t+1}), f + b, one utterance and frame after the other."""
    frames = torch.cat([layer.weight_ih @ x for sequence in sequences for x in sequence.unsqueeze(-1)], dim=1).t()
    norm = layer.norm
    mean, variance = (frames.mean(0), frames.var(0, unbiased=False)) if training else (norm.running_mean, norm.running_var)
    outputs = []
    for sequence in sequences:
        x = [norm.weight * (layer.weight_ih @ x - mean) / (variance + norm.eps).sqrt() + norm.bias for x in sequence]
        f, b, state = [], [], torch.zeros_like(x[0])
        for x_t in x:
            state = clip(x_t + layer.weight_hh @ state)
            f.append(state)
        state = torch.zeros_like(x[0])
        for x_t in reversed(x):
            state = clip(x_t + layer.weight_hh_reverse @ state)
            b.append(state)
        outputs.append(torch.stack([f_t + b_t for f_t, b_t in zip(f, reversed(b), strict=True)]))
    return outputs


def recurrent_layer(inputs=3, hidden=4):
    """In float64, with batch norm statistics and weights that reach both ends of the clip."""
    torch.manual_seed(0)
    layer = BidirectionalClippedRNN(inputs, hidden).double()
    with torch.no_grad():
        layer.norm.weight.uniform_(5.0, 15.0)
        layer.norm.bias.uniform_(-2.0, 8.0)
        layer.norm.running_mean.normal_()
        layer.norm.running_var.uniform_(0.5, 2.0)
    return layer


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_bidirectional_layer_is_the_loop(lengths, training):
    """Ragged batches give what each utterance gives frame by frame; batch norm sees every real frame once."""
    layer = recurrent_layer().train(training)
    sequences = utterances(lengths, 3)
    expected = bidirectional_loop(layer, sequences, training)
    found = unpacked(layer(packed(sequences)))
    assert [len(y) for y in found] == lengths
    for ours, loop in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-12, atol=1e-12)


def test_bidirectional_layer_takes_unsorted_packs():
    """Utterances packed in any order come back in that order."""
    layer = recurrent_layer().eval()
    sequences = utterances([2, 5, 3], 3)
    found = unpacked(layer(pack_sequence(sequences, enforce_sorted=False)))
    for ours, loop in zip(found, bidirectional_loop(layer, sequences, False), strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-12, atol=1e-12)


def test_an_utterance_alone_gives_what_it_gives_in_a_batch():
    """Neither padding nor batch mates reach an utterance in evaluation."""
    layer = recurrent_layer().eval()
    sequences = utterances([6, 4, 4, 1], 3)
    together = unpacked(layer(packed(sequences)))
    for sequence, y in zip(sequences, together, strict=True):
        torch.testing.assert_close(unpacked(layer(packed([sequence])))[0], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_recurrence_gradients(lengths, backwards):
    """Analytic against numerical derivatives of input and recurrent matrix, with open, closed and clipped units present."""
    sequence = packed(utterances(lengths, 4, scale=15.0))
    sizes = sequence.batch_sizes.tolist()
    x = sequence.data.clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    weight = (0.4 * torch.randn(4, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    h = _ClippedRecurrence.apply(x, weight, sizes, backwards)
    if sum(lengths) > 5:
        assert (h == 0).any() and (h == CLIP).any() and ((h > 0) & (h < CLIP)).any()
    assert gradcheck(lambda x, weight: _ClippedRecurrence.apply(x, weight, sizes, backwards), (x, weight))


def test_layer_gradients():
    """The whole layer, batch norm in training mode included."""
    layer = recurrent_layer()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    sequence = packed(utterances([4, 3, 1], 3))

    def run(x, *values):
        inputs = sequence._replace(data=x)
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (inputs,)).data

    assert set(names) == {"weight_ih", "weight_hh", "weight_hh_reverse", "norm.weight", "norm.bias"}
    assert gradcheck(run, (sequence.data.clone().requires_grad_(), *parameters))


def test_clip_at_twenty():
    """15, then 15 + 15, at most 20: the clipped state is passed on, and no gradient through it."""
    x = torch.tensor([[15.0], [15.0], [-16.0], [-10.0]], requires_grad=True)
    h = _ClippedRecurrence.apply(x, torch.eye(1), [1, 1, 1, 1], False)
    assert h.flatten().tolist() == [15.0, 20.0, 4.0, 0.0]
    h[2].sum().backward()
    assert x.grad.flatten().tolist() == [0.0, 0.0, 1.0, 0.0]


# Row convolution


@pytest.mark.parametrize("order", [[5, 3, 1], [1, 5, 3, 5]])
def test_row_convolution_is_the_loop(order):
    """y_t = sum_j w_j x_{t+j} within the utterance, nothing after its end; a context longer than the utterance too."""
    torch.manual_seed(0)
    row = RowConvolution(3, context=4).double()
    nn.init.normal_(row.weight)
    sequences = utterances(order, 3)
    found = unpacked(row(pack_sequence(sequences, enforce_sorted=False)))
    for x, y in zip(sequences, found, strict=True):
        for t in range(len(x)):
            expected = sum(row.weight[j] * x[t + j] for j in range(4) if t + j < len(x))
            torch.testing.assert_close(y[t], expected, rtol=1e-12, atol=1e-12)


def test_row_convolution_begins_as_the_identity():
    sequence = packed(utterances([4, 2], 3))
    assert torch.equal(RowConvolution(3, 40).double()(sequence).data, sequence.data)


# Deep Speech 2


def table(exhibit):
    """Layer sizes of the paper, in order, and its totals by width."""
    rows = load_published("narang2017").query("exhibit == @exhibit and metric == 'parameters'")
    layers = rows[(rows.x < 20) & (rows.known == "remembered")].sort_values("x")
    totals = rows[rows.series == "total"].set_index("x").value
    return layers.value.astype(int).tolist(), totals.astype(int).to_dict()


def test_table2_parameters():
    """Every layer of the RNN model but the last, whose printed 95,054 is one digit from 54 symbols' 95,094."""
    printed, totals = table("table2")
    ours = [count for _, count in parameter_table(PAPER["rnn1760"])]
    assert len(printed) == 11
    assert ours[:-1] == printed[:-1]
    assert ours[-1] - printed[-1] == 40
    assert sum(ours) - totals[1760] == 40


def test_table5_parameters():
    """Every layer of the GRU model."""
    printed, totals = table("table5")
    ours = parameter_table(PAPER["gru2560"])
    assert [count for _, count in ours] == printed
    assert [name for name, _ in ours][5:] == ["row convolution", "fully connected", "ctc"]
    assert sum(count for _, count in ours) == totals[2560]


@pytest.mark.parametrize(
    "name, millions",
    [("rnn1760", 67.74), ("rnn704", 11.64), ("rnn2560", 141.42), ("gru2560", 115.43), ("gru3568", 218.32)],
)
def test_totals_of_the_paper_s_widths(name, millions):
    """The layer formulas at the other widths give the sizes of Table 3, counted over all parameters of the model."""
    with torch.device("meta"):
        model = SpeechModel(PAPER[name])
    total = sum(parameter.numel() for parameter in model.parameters())
    assert round(total / 1e6, 2) == millions
    assert total == sum(count for _, count in model.parameter_table())


def test_parameter_table_allocates_nothing(monkeypatch):
    """800 MB of weights are counted on torch's meta device."""
    devices, counted = set(), SpeechModel.parameter_table

    def spy(model):
        devices.update(tensor.device.type for tensor in itertools.chain(model.parameters(), model.buffers()))
        return counted(model)

    monkeypatch.setattr(speech.SpeechModel, "parameter_table", spy)
    assert parameter_table(PAPER["rnn3072"])
    assert devices == {"meta"}


def test_scaled_configurations():
    """Another width is the same model; small ones follow the same formulas (channels c, 81 bins: 21 c inputs)."""
    assert PAPER["rnn1760"].scaled(704) == PAPER["rnn704"]
    assert PAPER["gru2560"].scaled(3568) == PAPER["gru3568"]
    h, c = 110, 4
    found = parameter_table(SpeechConfig("rnn", 1760, layers=3, channels=c, bins=81, time_strides=(4, 1)).scaled(h))
    assert found == [
        ("conv0", c * 41 * 11 + 2 * c * 41),
        ("conv1", c * c * 21 * 11 + 2 * c * 21),
        ("recurrent0", 2 * h * h + 21 * c * h + 2 * h),
        ("recurrent1", 3 * h * h + 2 * h),
        ("recurrent2", 3 * h * h + 2 * h),
        ("fully connected", h * h + 2 * h),
        ("ctc", 29 * (h + 1)),
    ]


@pytest.mark.parametrize(
    "wrong, told",
    [(dict(cell="lstm"), "unknown cell 'lstm': choose one of rnn, gru"), (dict(hidden=0), "SpeechConfig.hidden is 0")],
)
def test_wrong_configurations_are_told(wrong, told):
    with pytest.raises(ReproError, match=told):
        SpeechConfig(**wrong)


def small_model(cell, strides=(2, 1)):
    torch.manual_seed(0)
    model = SpeechModel(SpeechConfig(cell, hidden=6, layers=2, channels=2, bins=41, time_strides=strides)).double()
    with torch.no_grad():  # as after training: statistics and row convolution that do something
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.bias.normal_()
            if isinstance(module, RowConvolution):
                module.weight.normal_()
    return model


def padded(lengths, bins=41, extra=0):
    features = pad_sequence(utterances(lengths, bins), batch_first=True)
    return nn.functional.pad(features, (0, 0, 0, extra)), torch.tensor(lengths)


@pytest.mark.parametrize("strides", [(2, 1), (4, 1), (3, 2)])
@pytest.mark.parametrize("cell", ["rnn", "gru"])
def test_model_output_shapes(cell, strides):
    """Frames are divided by both time strides, rounded up, for each utterance; outputs are log-probabilities."""
    lengths = [40, 33, 32, 9, 1]
    scores, shortened = small_model(cell, strides)(*padded(lengths))
    assert shortened.tolist() == [math.ceil(math.ceil(length / strides[0]) / strides[1]) for length in lengths]
    assert scores.shape == (shortened[0], 5, 29)
    for i, length in enumerate(shortened.tolist()):
        torch.testing.assert_close(scores[:length, i].exp().sum(-1), torch.ones(length, dtype=torch.float64))


@pytest.mark.parametrize("cell", ["rnn", "gru"])
def test_model_reads_an_utterance_alone_as_in_a_batch(cell):
    """In evaluation its scores depend on nothing but itself."""
    model = small_model(cell).eval()
    lengths = [30, 21, 20, 5, 1]
    features, _ = padded(lengths)
    scores, shortened = model(features, torch.tensor(lengths))
    for i, length in enumerate(lengths):
        alone, frames = model(features[i : i + 1, :length], torch.tensor([length]))
        assert frames.tolist() == [shortened[i]]
        torch.testing.assert_close(alone[:, 0], scores[: frames[0], i], rtol=1e-9, atol=1e-12)
    assert scores[:10, 0].std(0).max() > 1e-3  # and the scores do vary


@pytest.mark.parametrize("cell", ["rnn", "gru"])
def test_padding_does_not_enter_training(cell):
    """More zero frames behind the longest utterance change neither outputs nor batch norm's statistics."""
    lengths = [30, 21, 5]
    results = []
    for extra in (0, 17):
        model = small_model(cell).train()
        scores, _ = model(*padded(lengths, extra=extra))
        results.append([scores, *(buffer.double() for buffer in model.buffers())])
    for tight, loose in zip(*results, strict=True):
        torch.testing.assert_close(tight, loose, rtol=1e-9, atol=1e-12)


def test_gru_model_looks_ahead_only_by_row_convolution():
    """Forward-only: without look-ahead weights a later frame cannot change an earlier score, with them it does."""
    features, lengths = padded([40])
    changed = features.clone()
    changed[:, 30:] += 1.0
    for context, ahead in ((1, False), (8, True)):
        model = small_model("gru").eval()
        with torch.no_grad():
            model.row.weight[context:] = 0.0
        before, after = model(features, lengths)[0], model(changed, lengths)[0]
        early = slice(0, 8)  # frames 0..15 of 40, further from frame 30 than both convolutions reach
        assert torch.equal(before[early], after[early]) is not ahead
        assert not torch.equal(before[16:], after[16:])


# CTC


class Fixed(nn.Module):
    """A model that always says the same."""

    def __init__(self, scores, lengths):
        super().__init__()
        self.scores, self.lengths = scores, lengths

    def forward(self, features, lengths):
        return self.scores, self.lengths


def batch_of(texts):
    codes = [encode(text) for text in texts]
    targets = torch.tensor([index for code in codes for index in code], dtype=torch.long)
    return Batch(torch.zeros(len(texts), 1, 1), torch.ones(len(texts)), targets, torch.tensor([*map(len, codes)]), texts)


def path_cost(scores, target):
    """-log of the summed probability of all paths that collapse to `target`: repeats first, blanks then."""
    total = 0.0
    for path in itertools.product(range(scores.shape[1]), repeat=len(scores)):
        kept = [symbol for i, symbol in enumerate(path) if symbol and (i == 0 or symbol != path[i - 1])]
        if kept == target:
            total += math.exp(sum(scores[t, symbol].item() for t, symbol in enumerate(path)))
    return -math.log(total)


def test_ctc_loss_sums_over_all_paths():
    """Utterances of 4 and 3 frames, a doubled letter among them, against every path; the sum, not a mean."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 2, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    batch = batch_of([" ' ", "AA"])
    assert batch.targets.tolist() == [1, 2, 1, 3, 3]
    cost, count = ctc_loss(Fixed(scores, torch.tensor([4, 3])), batch)
    assert cost.item() == pytest.approx(path_cost(scores[:4, 0], [1, 2, 1]) + path_cost(scores[:3, 1], [3, 3]))
    assert count == 2


def test_transcripts_longer_than_their_frames_cost_nothing():
    """An impossible alignment neither makes the loss infinite nor moves the weights."""
    scores = torch.zeros(2, 1, 29, dtype=torch.float64).log_softmax(-1).requires_grad_()
    cost, _ = ctc_loss(Fixed(scores, torch.tensor([2])), batch_of(["ABC"]))
    cost.backward()
    assert cost.item() == 0.0
    assert not scores.grad.any()


def test_evaluation_decodes_greedily_within_each_length():
    """Repeats collapse, blanks separate, padding is not read; errors and cost are divided once over the set."""
    a, b, c = encode("ABC")
    batches = []
    for paths, texts in (([[a, a, 0, a, b, b], [c, 0, 0]], ["AAB", "B"]), ([[0, c, c, 0]], ["CABC"])):
        scores = torch.full((len(paths[0]), len(paths), 29), -10.0, dtype=torch.float64)
        scores[:, :, c] = -1.0  # what padding would read
        for i, path in enumerate(paths):
            for t, symbol in enumerate(path):
                scores[t, i] = -10.0
                scores[t, i, symbol] = 0.0
        batches.append((scores.log_softmax(-1), torch.tensor([*map(len, paths)]), batch_of(texts)))

    class InTurn(nn.Module):
        def forward(self, features, lengths):
            return next(answers)

    answers = iter([(scores, lengths) for scores, lengths, _ in batches])
    model = InTurn()
    found = evaluate(model, [batch for _, _, batch in batches])
    # AAB is read as AAB, B as C (1 error), CABC as C (3 errors), of 8 characters
    assert found["cer"] == 4 / 8
    cost = sum(
        path_cost(scores[:length, i][:, [0, *encode("ABC")]], ["ABC".index(x) + 1 for x in batch.texts[i]])
        for scores, lengths, batch in batches
        for i, length in enumerate(lengths.tolist())
    )
    assert found["loss"] == pytest.approx(cost / 3)
    assert not model.training


def test_evaluation_uses_neither_dropout_nor_gradients():
    """Twice the same number with dropout configured, and autograd is off."""
    torch.manual_seed(0)
    model = SpeechModel(SpeechConfig("rnn", hidden=6, layers=2, channels=2, bins=41, dropout=0.5))
    features, lengths = padded([40, 30])
    batch = batch_of(["AB", "C"])
    batch = Batch(features.float(), lengths, batch.targets, batch.target_lengths, batch.texts)
    recording = []
    model.register_forward_pre_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    first = evaluate(model.train(), [batch])
    assert evaluate(model.train(), [batch]) == first
    assert recording == [False, False]


def test_packs_of_the_layers_are_torch_s_own():
    """A layer's output is a pack like its input: `pad_packed_sequence` and torch's own layers take it."""
    sequence = pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 2]))
    out = BidirectionalClippedRNN(3, 4)(sequence)
    assert nn.GRU(4, 2)(out)[0].batch_sizes.tolist() == sequence.batch_sizes.tolist()
