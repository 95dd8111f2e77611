"""The translator: what it computes, that padding counts nowhere, what attention looks at, how it writes and is scored."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repro.errors import ReproError
from repro.gradients import ThresholdedLSTM, record
from repro.models.sentences import PADDING, START, STOP, bleu, mean_loss, summed_loss, write_greedily
from repro.models.translation import LuongAttention, Read, Translator, reverse

SOURCES, TARGETS = 13, 11
KINDS = pytest.mark.parametrize("attention", [False, True], ids=["plain", "attention"])


def sentences(lengths, symbols, seed=0, marks=False):
    """Random words as padded columns (T, B), with `<s>` and `</s>` around them if `marks`."""
    torch.manual_seed(seed)
    rows = [torch.randint(4, symbols, (length,)) for length in lengths]
    if marks:
        rows = [torch.cat((torch.tensor([START]), row, torch.tensor([STOP]))) for row in rows]
    return nn.utils.rnn.pad_sequence(rows)


def batch():
    """Four pairs, the longest target not that of the longest source."""
    lengths = torch.tensor([6, 5, 5, 2])
    return sentences(lengths, SOURCES), lengths, sentences([3, 7, 1, 4], TARGETS, 1, marks=True)


def translator(attention=False, layers=2, recurrent=nn.LSTM, **more):
    torch.manual_seed(2)
    return Translator(SOURCES, TARGETS, 5, 6, layers, attention, recurrent=recurrent, **more).double()


def gradients(model, *tensors):
    model.zero_grad()
    loss, words = summed_loss(model, *tensors)
    loss.backward()
    return loss.detach(), words, [p.grad.clone() for p in model.parameters()]


@KINDS
def test_every_word_of_the_target_after_the_first_is_foretold(attention):
    source, lengths, target = batch()
    assert translator(attention)(source, lengths, target).shape == (len(target) - 1, 4, TARGETS)
    assert summed_loss(translator(attention), source, lengths, target)[1] == 3 + 7 + 1 + 4 + 4


@KINDS
def test_padding_changes_neither_loss_nor_gradients(attention):
    """More of it behind source and target, and none at all when each pair is on its own."""
    source, lengths, target = batch()
    model = translator(attention)
    loss, words, found = gradients(model, source, lengths, target)
    more = [torch.cat((x, torch.full((3, 4), PADDING))) for x in (source, target)]
    again, same_words, same = gradients(model, more[0], lengths, more[1])
    assert words == same_words
    torch.testing.assert_close([again, *same], [loss, *found])
    alone = 0.0
    for i, length in enumerate(lengths.tolist()):
        own = target[:, i][target[:, i] != PADDING]
        alone += summed_loss(model, source[:length, i : i + 1], lengths[i : i + 1], own[:, None])[0].item()
    assert alone == pytest.approx(loss.item())


def removes_nothing(inputs: int, hidden: int) -> ThresholdedLSTM:
    """By this package's own backward pass; without a threshold it would be torch's."""
    return ThresholdedLSTM(inputs, hidden, threshold=1e-300)


@KINDS
def test_without_a_threshold_gradients_are_those_of_torch(attention):
    """The whole model, encoder and decoder, in float64."""
    plain, ours = translator(attention), translator(attention, recurrent=removes_nothing)
    ours.load_state_dict(plain.state_dict())
    expected, _, reference = gradients(plain, *batch())
    loss, _, found = gradients(ours, *batch())
    torch.testing.assert_close([loss, *found], [expected, *reference])


def test_a_threshold_acts_in_encoder_and_decoder():
    """One above all gradients leaves nothing to either or to what lies below them; what lies above keeps its gradients."""
    model = translator(attention=True, recurrent=lambda inputs, hidden: ThresholdedLSTM(inputs, hidden, threshold=1e30))
    summed_loss(model, *batch())[0].backward()
    for name, parameter in model.named_parameters():
        assert bool(parameter.grad.any()) == name.startswith(("attention", "output")), name


def test_padding_has_no_gate_gradients():
    """dnet has one row for each word that is read and each that is foretold, so that zeros are those of real words."""
    model = translator(recurrent=ThresholdedLSTM)
    source, lengths, target = batch()
    with record(model) as records:
        summed_loss(model, source, lengths, target)[0].backward()
    rows = {name: sum(found.totals) / 6 for name, found in records.items()}
    foretold = int((target[1:] != PADDING).sum())
    expected = {f"{side}.layers.{i}.l0": n for side, n in (("encoder", 6 + 5 + 5 + 2), ("decoder", foretold)) for i in (0, 1)}
    assert rows == expected


def cell(layer, x, h, c):
    """One step of an LSTM by its equations; torch's order of gates: i, f, g, o."""
    net = layer.weight_ih_l0 @ x + layer.bias_ih_l0 + layer.weight_hh_l0 @ h + layer.bias_hh_l0
    i, f, g, o = net.chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


@KINDS
def test_the_model_is_that_of_the_papers_step_by_step(attention):
    """The source read from its end, the last states handed over layer by layer, Luong's attention: written out for one pair."""
    model = translator(attention)
    source, lengths, target = (x[..., 3:] for x in batch())  # a short pair with padding behind both
    zero = torch.zeros(6, dtype=torch.double)
    states, read = [(zero, zero), (zero, zero)], []

    def run(stack, x):
        for i, layer in enumerate(stack.layers):
            states[i] = cell(layer, x, *states[i])
            x = states[i][0]
        return x

    for word in reversed(source[: int(lengths), 0]):
        read.insert(0, run(model.encoder, model.source_embedding.weight[word]))
    memory, logits = torch.stack(read), []
    for word in target[:5, 0]:
        h = run(model.decoder, model.target_embedding.weight[word])
        if attention:
            weights = torch.softmax(torch.stack([h @ model.attention.score.weight @ s for s in memory]), 0)
            h = torch.tanh(model.attention.combine.weight @ torch.cat((weights @ memory, h)))
        logits.append(model.output.weight @ h + model.output.bias)
    torch.testing.assert_close(model(source, lengths, target)[:5, 0], torch.stack(logits))


def test_attention_weights_sum_to_1_and_ignore_padding():
    """Whatever stands in the padded places of the encoder's outputs."""
    torch.manual_seed(0)
    attention, lengths = LuongAttention(6), torch.tensor([5, 3, 1])
    h, outputs = torch.randn(4, 3, 6), torch.randn(5, 3, 6)
    combined, weights = attention(h, Read(outputs, lengths))
    assert weights.shape == (4, 3, 5)
    torch.testing.assert_close(weights.sum(2), torch.ones(4, 3))
    for i, length in enumerate(lengths.tolist()):
        assert (weights[:, i, :length] > 0).all() and (weights[:, i, length:] == 0).all()
    changed = torch.where(torch.arange(5)[:, None, None] < lengths[:, None], outputs, 1e3)
    torch.testing.assert_close(attention(h, Read(changed, lengths))[0], combined)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_reversing_twice_changes_nothing(lengths, padding):
    """And once, every column is its own reverse; padding stays where it is."""
    x = torch.arange((max(lengths) + padding) * len(lengths)).reshape(-1, len(lengths))
    once = reverse(x, torch.tensor(lengths))
    for i, length in enumerate(lengths):
        assert once[:length, i].tolist() == x[:length, i].tolist()[::-1]
        assert torch.equal(once[length:, i], x[length:, i])
    assert torch.equal(reverse(once, torch.tensor(lengths)), x)


@KINDS
def test_greedy_translation_is_the_likeliest_word_at_every_step(attention):
    """Its words, given back as the target, are the largest logits; sentences in one batch do not touch each other."""
    source, lengths, _ = batch()
    model = translator(attention)
    written = model.translate(source, lengths, longest=9)
    assert model.training and {len(words) for words in written} <= set(range(10))
    for i, words in enumerate(written):
        own = source[: int(lengths[i]), i : i + 1], lengths[i : i + 1]
        assert model.translate(*own, longest=9) == [words]
        target = torch.tensor([START, *words, STOP])[:, None]
        logits = model(*own, target)
        logits[..., [PADDING, START]] = -math.inf
        likeliest = logits.argmax(2)[:, 0].tolist()
        assert likeliest[: len(words)] == words and (len(words) == 9 or likeliest[-1] == STOP)


def test_writing_ends_at_the_mark_or_at_the_longest_length():
    """Three sentences that stop after 0 and 2 words and never; nothing follows a stop."""
    script = torch.tensor([[STOP, 5, 7], [6, 5, 7], [6, STOP, 7], [6, 6, 7]])
    seen = []

    def step(words, place):
        seen.append(words[0].tolist())
        return nn.functional.one_hot(script[place : place + 1], 9).float(), place + 1

    assert write_greedily(step, 0, 3, 4, torch.device("cpu")) == [[], [5, 5], [7, 7, 7, 7]]
    assert seen[0] == [START] * 3 and seen[1] == script[0].tolist()
    with pytest.raises(ReproError, match="longest sentence to write has 0 words"):
        write_greedily(step, 0, 3, 0, torch.device("cpu"))


def test_neither_padding_nor_a_start_is_written():
    """Though they are the likeliest: the next likeliest is."""
    logits = torch.zeros(1, 1, 9)
    logits[..., [PADDING, START, 6]] = torch.tensor([3.0, 2.0, 1.0])
    assert write_greedily(lambda words, state: (logits, state), None, 1, 2, torch.device("cpu")) == [[6, 6]]


def test_a_translator_learns_by_heart():
    """Enough capacity, no bug between the loss and the words it writes: six pairs are written as they are."""
    lengths = torch.tensor([5, 5, 4, 4, 3, 3])
    source, target = sentences(lengths, SOURCES, 3), sentences([3, 5, 2, 4, 1, 2], TARGETS, 4, marks=True)
    torch.manual_seed(0)
    model = Translator(SOURCES, TARGETS, 16, 32, 1, attention=True)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss, words = summed_loss(model, source, lengths, target)
        (loss / words).backward()
        optimizer.step()
    expected = [row[1 : row.index(STOP)] for row in target.T.tolist()]
    assert model.translate(source, lengths, longest=9) == expected


def test_mean_loss_is_divided_once_and_leaves_the_mode():
    """Of equal logits it is ln of the vocabulary, whatever the batches; a sentence is needed."""
    model = translator(dropout=0.5)
    nn.init.zeros_(model.output.weight), nn.init.zeros_(model.output.bias)
    source, lengths, target = batch()
    halves = [(source[:, part], lengths[part], target[:, part]) for part in (slice(0, 1), slice(1, 4))]
    assert mean_loss(model, halves) == pytest.approx(math.log(TARGETS))
    assert model.training
    with pytest.raises(ReproError, match="no sentence"):
        mean_loss(model, [])


def test_dropout_acts_in_training_alone():
    model, pairs = translator(dropout=0.5), batch()
    assert not torch.equal(model(*pairs), model(*pairs))
    model.eval()
    assert torch.equal(model(*pairs), model(*pairs))


@pytest.mark.parametrize(
    "sizes, complaint",
    [
        ((0, 5, 5, 5, 1), "sources of the translator is 0"),
        ((5, 5, 5, 5, 0), "layers of the translator is 0: it must be at least 1"),
    ],
)
def test_sizes_below_1_are_refused(sizes, complaint):
    with pytest.raises(ReproError, match=complaint):
        Translator(*sizes)
    with pytest.raises(ReproError, match=r"dropout of the translator is 1.0: it must lie in \[0, 1\)"):
        Translator(5, 5, 5, 5, 1, dropout=1.0)


# ------------------------------------------------------------------------------------------------------------------ BLEU


def test_bleu_worked_out_by_hand():
    """Four of five words, three of four pairs, two of three triples, one of two quadruples are right, lengths agree."""
    written, reference = list("abcde"), list("abcdf")
    assert bleu([written], [[reference]]) == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # all of four words right, but one short of five: the brevity penalty alone
    assert bleu([list("abcd")], [[written]]) == pytest.approx(100 * math.exp(1 - 5 / 4))


def test_bleu_is_of_the_corpus_not_the_mean_of_its_sentences():
    """Matches are added up before they are divided: 5 + 4 of 10 words, and so on."""
    right, reference = list("abcde"), list("abcdf")
    shares = [(5 + 4) / 10, (4 + 3) / 8, (3 + 2) / 6, (2 + 1) / 4]
    assert bleu([right, right], [[right], [reference]]) == pytest.approx(100 * math.prod(shares) ** 0.25)


def test_bleu_takes_any_number_of_references_and_words_as_they_are():
    """The better reference counts; one sentence may have fewer than another; nothing is split or put in lower case."""
    first, second = list("abcde"), list("vwxyz")
    assert bleu([first, second], [[second, first], [second]]) == pytest.approx(100)
    words = ["it", "'s", "two-fold", ",", "Sir"]
    assert bleu([words], [[["it's", "two", "-", "fold,", "sir"]]]) < 10
    assert bleu([words], [[words]]) == pytest.approx(100)


@pytest.mark.parametrize("written, references", [([], []), ([["a"]], []), ([["a"]], [[]])], ids=["none", "fewer", "empty"])
def test_bleu_needs_a_reference_for_each_sentence(written, references):
    with pytest.raises(ReproError, match="one or more for each is needed"):
        bleu(written, references)
