"""The language model: what it computes, where dropout falls, how the state is carried."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from repro.errors import ReproError
from repro.models.language import LanguageModel, detach, initialise_uniform, mean_loss


def tokens(steps=7, batch=3, symbols=11, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(symbols, size=(steps, batch)))


@pytest.mark.parametrize("cell, torch_layers", [("lstm", nn.LSTM), ("gru", nn.GRU)])
def test_layers_in_a_row_equal_torch_with_several_layers(cell, torch_layers):
    """Single-layer modules one after the other compute what torch's own two-layer module computes from their weights."""
    torch.manual_seed(0)
    model = LanguageModel(11, 5, 6, 2, cell)
    reference = torch_layers(5, 6, 2)
    weights = {f"{name[:-1]}{i}": w for i, layer in enumerate(model.layers) for name, w in layer.named_parameters()}
    reference.load_state_dict(weights)
    hidden, _ = reference(model.embedding(tokens()))
    torch.testing.assert_close(model(tokens())[0], hidden @ model.decoder.weight.T + model.decoder.bias)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_text_in_two_windows_is_the_text_in_one(cell):
    """The carried state is all that the past leaves, detached or not."""
    torch.manual_seed(0)
    model, text = LanguageModel(11, 5, 6, 3, cell), tokens()
    whole, _ = model(text)
    first, state = model(text[:4])
    second, _ = model(text[4:], detach(state))
    torch.testing.assert_close(torch.cat((first, second)), whole)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_detached_state_ends_backpropagation(cell):
    """Symbols of the first window get a gradient from the loss of the second only through a state that is not detached."""
    model = LanguageModel(11, 5, 6, 2, cell)
    first, second = torch.full((4, 2), 1), torch.full((3, 2), 2)
    for cut, reached in [(lambda state: state, True), (detach, False)]:
        model.zero_grad()
        _, state = model(first)
        model(second, cut(state))[0].sum().backward()
        assert bool(model.embedding.weight.grad[1].any()) == reached
        assert model.embedding.weight.grad[2].any()


def test_dropout_falls_between_layers_and_never_on_the_recurrence():
    """Of three layers there are four such places: each call sees the output of the part below it, at its full length."""
    torch.manual_seed(0)
    model = LanguageModel(11, 5, 6, 3, dropout=0.5)
    seen, given = [], []
    model.dropout.register_forward_hook(lambda module, x, y: seen.append((x[0], y)))
    for part in (model.embedding, *model.layers):
        part.register_forward_hook(lambda module, x, y: given.append(y[0] if isinstance(y, tuple) else y))
    model(tokens(200, 4))
    assert len(seen) == 4 and all(torch.equal(x, below) for (x, _), below in zip(seen, given, strict=True))
    for x, y in seen:
        dropped = (y == 0).float().mean().item()
        assert abs(dropped - 0.5) < 5 * math.sqrt(0.25 / y.numel())
        torch.testing.assert_close(y[y != 0], 2 * x[y != 0])
    assert all(layer.dropout == 0 for layer in model.layers)


def test_evaluation_drops_nothing():
    model = LanguageModel(11, 5, 6, 2, dropout=0.5).eval()
    assert torch.equal(model(tokens())[0], model(tokens())[0])


def test_tied_decoder_is_the_embedding():
    """One matrix serves both: it is counted once and gets the gradients of both uses."""
    free, tied = LanguageModel(11, 6, 6, 1), LanguageModel(11, 6, 6, 1, tied=True)
    count = [sum(p.numel() for p in model.parameters()) for model in (free, tied)]
    assert count[0] - count[1] == 11 * 6
    tied.load_state_dict(free.state_dict() | {"decoder.weight": free.embedding.weight})
    with torch.no_grad():
        free.decoder.weight.copy_(free.embedding.weight)
    for model in (free, tied):
        model(tokens())[0].square().sum().backward()
    torch.testing.assert_close(tied.embedding.weight.grad, free.embedding.weight.grad + free.decoder.weight.grad)


def test_any_recurrent_module_can_be_exchanged_for_torch():
    """The factory is called with the sizes of each layer, and what it makes is what runs."""
    sizes = []

    class Doubled(nn.GRU):
        def forward(self, x, state=None):
            y, state = super().forward(x, state)
            return 2 * y, state

    def layer(input_size, hidden_size):
        sizes.append((input_size, hidden_size))
        return Doubled(input_size, hidden_size)

    ours, plain = LanguageModel(11, 5, 6, 2, recurrent=layer), LanguageModel(11, 5, 6, 2, "gru")
    assert sizes == [(5, 6), (6, 6)]
    plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        plain.layers[1].weight_ih_l0.mul_(2)
        plain.decoder.weight.mul_(2)
    torch.testing.assert_close(ours(tokens())[0], plain(tokens())[0])


@pytest.mark.parametrize("hidden, parameters", [(200, 4_651_600), (650, 19_775_200)])
def test_zaremba_models_have_their_size(hidden, parameters):
    """Small and medium, 10,000 words, by the equations; torch's LSTM has a second bias, 4H more in each of the two layers."""
    with torch.device("meta"):
        model = LanguageModel(10_000, hidden, hidden, 2)
    assert sum(p.numel() for p in model.parameters()) - 2 * 4 * hidden == parameters


def test_uniform_initialisation_covers_its_interval():
    """All parameters lie within the bound, with the spread of a uniform distribution, bound / sqrt(3)."""
    torch.manual_seed(0)
    model = LanguageModel(50, 40, 40, 2)
    initialise_uniform(model, 0.05)
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert values.abs().max() <= 0.05
    assert abs(values.std().item() / (0.05 / math.sqrt(3)) - 1) < 0.02
    assert all(p.abs().max() > 0.04 for p in model.parameters())


def test_mean_loss_divides_once():
    """Windows of different length count by their symbols; state carried, no dropout, and the mode is given back."""
    torch.manual_seed(0)
    model, text = LanguageModel(11, 5, 6, 2, dropout=0.5), tokens(10)
    expected = nn.functional.cross_entropy(model.eval()(text[:-1])[0].flatten(0, 1), text[1:].flatten()).item()
    model.train()
    loss = mean_loss(model, [(text[:7], text[1:8]), (text[7:9], text[8:10])])
    assert loss == pytest.approx(expected, rel=1e-5) and model.training


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cell": "rnn"}, "unknown cell 'rnn': choose one of lstm, gru"),
        ({"layers": 0}, "layers of the language model is 0: it must be at least 1"),
        ({"dropout": 1.0}, r"dropout of the language model is 1.0: it must lie in \[0, 1\)"),
        ({"dropout": math.nan}, "dropout of the language model is nan"),
        ({"tied": True}, "a tied decoder needs embedding and hidden of one width, not 5 and 6"),
    ],
)
def test_wrong_shapes_are_refused(options, message):
    with pytest.raises(ReproError, match=message):
        LanguageModel(**{"symbols": 11, "embedding": 5, "hidden": 6, "layers": 2} | options)


def test_wrong_bound_and_nothing_to_evaluate_are_refused():
    model = LanguageModel(11, 5, 6, 1)
    for bound in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ReproError, match=f"bound of the uniform initialisation is {bound}"):
            initialise_uniform(model, bound)
    with pytest.raises(ReproError, match="needs at least one"):
        mean_loss(model, [])
