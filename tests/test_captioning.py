"""The captioner: an image that is shown once, words that padding does not touch, captions that are the likeliest words."""

import pytest
import torch
from torch import nn

from repro.errors import ReproError
from repro.gradients import ThresholdedLSTM, record
from repro.models.captioning import Captioner
from repro.models.sentences import PADDING, START, STOP, summed_loss

FEATURES, SYMBOLS = 7, 11


def batch(seed=0):
    """Three images, captions of 3, 1 and 5 words."""
    torch.manual_seed(seed)
    rows = [torch.cat((torch.tensor([START]), torch.randint(4, SYMBOLS, (n,)), torch.tensor([STOP]))) for n in (3, 1, 5)]
    return torch.randn(3, FEATURES, dtype=torch.double), nn.utils.rnn.pad_sequence(rows)


def captioner(layers=1, recurrent=nn.LSTM, **more):
    torch.manual_seed(1)
    return Captioner(FEATURES, SYMBOLS, 5, 6, layers, recurrent=recurrent, **more).double()


def gradients(model, *tensors):
    model.zero_grad()
    loss, words = summed_loss(model, *tensors)
    loss.backward()
    return loss.detach(), words, [p.grad.clone() for p in model.parameters()]


def test_every_word_of_the_caption_after_the_first_is_foretold():
    features, captions = batch()
    assert captioner()(features, captions).shape == (len(captions) - 1, 3, SYMBOLS)
    assert summed_loss(captioner(), features, captions)[1] == 3 + 1 + 5 + 3


def test_features_and_captions_that_do_not_fit_are_named():
    features, captions = batch()
    for wrong in (features[:, 1:], features.float(), features[0]):
        with pytest.raises(ReproError, match=r"features of images are .*: \(images, \d+\) torch.float64 is needed"):
            captioner()(wrong, captions)
        with pytest.raises(ReproError, match="features of images"):
            captioner().describe(wrong, 3)
    with pytest.raises(ReproError, match="captions of 3 images are"):
        captioner()(features, captions[:, 1:])


def test_padding_changes_neither_loss_nor_gradients():
    """More of it behind the captions, and none at all when each caption is on its own."""
    features, captions = batch()
    model = captioner(layers=2)
    loss, words, found = gradients(model, features, captions)
    again, same_words, same = gradients(model, features, torch.cat((captions, torch.full((4, 3), PADDING))))
    assert words == same_words
    torch.testing.assert_close([again, *same], [loss, *found])
    own = [captions[:, i][captions[:, i] != PADDING] for i in range(3)]
    alone = sum(summed_loss(model, features[i : i + 1], own[i][:, None])[0].item() for i in range(3))
    assert alone == pytest.approx(loss.item())


def removes_nothing(inputs: int, hidden: int) -> ThresholdedLSTM:
    """By this package's own backward pass; without a threshold it would be torch's."""
    return ThresholdedLSTM(inputs, hidden, threshold=1e-300)


def test_without_a_threshold_gradients_are_those_of_torch():
    plain, ours = captioner(2), captioner(2, removes_nothing)
    ours.load_state_dict(plain.state_dict())
    expected, _, reference = gradients(plain, *batch())
    loss, _, found = gradients(ours, *batch())
    torch.testing.assert_close([loss, *found], [expected, *reference])


def test_padding_has_no_gate_gradients():
    """dnet has a row for the image and one for each word that is foretold."""
    model, (features, captions) = captioner(recurrent=ThresholdedLSTM), batch()
    with record(model) as records:
        summed_loss(model, features, captions)[0].backward()
    assert sum(records["decoder.layers.0.l0"].totals) / 6 == 3 + int((captions[1:] != PADDING).sum())


def test_the_model_is_that_of_show_and_tell_step_by_step():
    """The image is the first input, `<s>` the second; the output at the image is used nowhere (Eqs. 10 to 12)."""
    model, (features, captions) = captioner(), batch()
    layer, h, c, logits = model.decoder.layers[0], *torch.zeros(2, 6, dtype=torch.double), []
    inputs = [model.image.weight @ features[2] + model.image.bias, *(model.embedding.weight[word] for word in captions[:-1, 2])]
    for x in inputs:
        net = layer.weight_ih_l0 @ x + layer.bias_ih_l0 + layer.weight_hh_l0 @ h + layer.bias_hh_l0
        i, f, g, o = net.chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        logits.append(model.output.weight @ h + model.output.bias)
    torch.testing.assert_close(model(features, captions)[:, 2], torch.stack(logits[1:]))


def test_a_greedy_caption_is_the_likeliest_word_at_every_step():
    """Its words, given back as the caption, are the largest logits."""
    model, (features, _) = captioner(2), batch()
    written = model.describe(features, longest=8)
    assert model.training
    for image, words in zip(features, written, strict=True):
        target = torch.tensor([START, *words, STOP])[:, None]
        likeliest = model(image[None], target).argmax(2)[:, 0].tolist()
        assert likeliest[: len(words)] == words and (len(words) == 8 or likeliest[-1] == STOP)


def test_a_captioner_learns_by_heart_what_images_show():
    """Only the image tells the captions apart: three are written as they are."""
    features, captions = batch(5)
    torch.manual_seed(0)
    model = Captioner(FEATURES, SYMBOLS, 16, 32).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss, words = summed_loss(model, features, captions)
        (loss / words).backward()
        optimizer.step()
    assert model.describe(features, longest=8) == [row[1 : row.index(STOP)] for row in captions.T.tolist()]


def test_sizes_below_1_and_dropout_of_1_are_refused():
    with pytest.raises(ReproError, match="features of the captioner is 0: it must be at least 1"):
        Captioner(0, 5, 5, 5)
    with pytest.raises(ReproError, match=r"dropout of the captioner is 1\.0"):
        Captioner(5, 5, 5, 5, dropout=1.0)
