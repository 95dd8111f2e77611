"""MAC accounting: against products that are carried out, the paper's two thirds, and where these do not hold."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from repro.errors import ReproError
from repro.gradients.macs import (
    BACKWARD,
    FORWARD,
    OUTER,
    accounts,
    ideal_speedup,
    language_model_products,
    lstm_products,
    redundant_share,
    two_thirds,
)
from repro.models.language import LanguageModel

SIZES = st.integers(1, 2000)
SHARES = st.floats(0.0, 1.0)


def by_name(products):
    return {(product.layer, product.name): product.macs for product in products}


def test_the_products_of_a_layer_by_hand():
    """D 3, H 2, T 5, B 7: 35 frames of 8 gates each."""
    found = {p.name: p.macs for p in lstm_products(3, 2, 5, 7)}
    assert found == {"W x": 840, "U h": 560, "dx": 840, "dh": 560, "dW": 840, "dU": 560}
    assert [p.name for p in lstm_products(3, 2, 5, 7)] == [*FORWARD, *BACKWARD]


def test_redundant_macs_are_those_that_loops_over_the_products_meet():
    """Every MAC of the four products of a small layer, carried out one by one over a random dnet."""
    steps, batch, inputs, hidden = 3, 2, 5, 2
    dnet = np.random.default_rng(0).random((steps, batch, 4 * hidden)) > 0.6
    redundant = 0
    for t, b, j in np.ndindex(dnet.shape):
        for width in (inputs, hidden, inputs, hidden):  # dx, dh, dW, dU
            for _ in range(width):
                redundant += not dnet[t, b, j]
    products = lstm_products(inputs, hidden, steps, batch)
    sparsity = 1 - dnet.mean()
    assert redundant_share(products, sparsity) * sum(p.macs for p in products) == pytest.approx(redundant)


def test_macs_are_those_that_torch_counts_in_forward_and_backward_pass_of_the_cell():
    """`FlopCounterMode` counts nothing in `nn.LSTM`, so a cell of the paper's equations; two operations a MAC."""
    steps, batch, inputs, hidden, symbols = 4, 3, 6, 5, 11
    sizes = [(4 * hidden, inputs), (4 * hidden, hidden), (symbols, hidden), (batch, hidden), (steps, batch, inputs)]
    w, u, v, h, x = (torch.randn(size, requires_grad=True) for size in sizes)
    c, loss = torch.zeros(batch, hidden), 0.0
    with FlopCounterMode(display=False) as counter:
        for t in range(steps):
            i, f, g, o = (x[t] @ w.t() + h @ u.t()).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            loss = loss + (h @ v.t()).square().sum()
        forward = counter.get_total_flops()
        loss.backward()
    products = language_model_products(symbols, inputs, hidden, 1, steps, batch, outer=["output"])
    assert 2 * sum(p.macs for p in products if not p.backward) == forward
    assert 2 * sum(p.macs for p in products) == counter.get_total_flops()


@pytest.mark.parametrize("symbols, width, hidden, layers", [(50, 8, 8, 3), (20, 4, 12, 2)])
def test_each_weight_of_the_model_makes_three_macs_a_token(symbols, width, hidden, layers):
    """One in the forward pass, one in its own gradient, one on the way to the layer below, which the embedding has not."""
    model = LanguageModel(symbols, width, hidden, layers)
    weights = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    products = language_model_products(symbols, width, hidden, layers, steps=6, batch=4, outer=OUTER)
    expected = 3 * sum(weights.values()) - weights["embedding.weight"]
    assert sum(p.macs for p in products) == 6 * 4 * expected


@given(SIZES, SIZES, st.integers(1, 9), st.integers(1, 100), st.integers(1, 64), SHARES)
def test_two_thirds_hold_for_any_widths_and_layers_at_one_sparsity(embedding, hidden, layers, steps, batch, sparsity):
    products = language_model_products(1, embedding, hidden, layers, steps, batch)
    assert redundant_share(products, sparsity) == pytest.approx(two_thirds(sparsity), rel=1e-12)


@given(SIZES, st.lists(SHARES, min_size=1, max_size=9))
def test_two_thirds_hold_for_the_mean_sparsity_of_equal_layers(hidden, shares):
    products = language_model_products(1, hidden, hidden, len(shares), 10, 2)
    assert redundant_share(products, shares) == pytest.approx(two_thirds(math.fsum(shares) / len(shares)), abs=1e-12)


def test_unequal_layers_weigh_by_their_macs():
    """D 12 below H 4: layer 0 has (12 + 4) 4, layer 1 (4 + 4) 4, so 2 : 1."""
    products = language_model_products(1, 12, 4, 2, 10, 2)
    assert redundant_share(products, [0.9, 0.3]) == pytest.approx(two_thirds((2 * 0.9 + 0.3) / 3))
    assert redundant_share(products, np.array([0.3, 0.9])) == pytest.approx(two_thirds((2 * 0.3 + 0.9) / 3))


@given(st.integers(1, 9), SIZES, SHARES)
def test_without_the_lowest_dx_the_share_falls(layers, hidden, sparsity):
    products = language_model_products(1, hidden, hidden, layers, 5, 2, bottom_dx=False)
    assert redundant_share(products, sparsity) == pytest.approx(sparsity * (4 * layers - 1) / (6 * layers - 1))


@given(st.integers(1, 9), SIZES, st.integers(1, 20_000), SHARES)
def test_the_output_layer_dilutes_the_share(layers, hidden, symbols, sparsity):
    products = language_model_products(symbols, hidden, hidden, layers, 5, 2, outer=["output"])
    expected = two_thirds(sparsity) / (1 + symbols / (8 * layers * hidden))
    assert redundant_share(products, sparsity) == pytest.approx(expected)


def test_more_than_half_of_a_word_models_macs_are_not_redundant_once_its_output_is_counted():
    """Zaremba's small and medium models of 10,000 words, 80 % of dnet zero."""
    shares = [
        redundant_share(language_model_products(10_000, width, width, 2, 20, 20, outer=["output"]), 0.8) for width in (200, 650)
    ]
    assert shares == pytest.approx([8 / 15 / 4.125, 8 / 15 / (1 + 10_000 / 10_400)])
    assert max(shares) < 0.28


def test_the_numbers_of_the_paper():
    assert two_thirds(0.8) == pytest.approx(0.5333, abs=1e-4)
    assert ideal_speedup(two_thirds(0.8)) == pytest.approx(2.143, abs=1e-3)
    assert ideal_speedup(two_thirds(0.9)) == pytest.approx(2.5)
    assert ideal_speedup(two_thirds(1.0)) == pytest.approx(3.0)


def test_accounts_of_the_character_model_forward_and_backward_apart():
    products = language_model_products(65, 256, 256, 3, 100, 50)
    forward, backward, step = accounts(products, 0.8)
    tokens = 100 * 50
    assert (forward.part, forward.macs, forward.redundant, forward.ideal) == ("forward", tokens * 6 * 4 * 256**2, 0.0, 1.0)
    assert (backward.part, backward.macs) == ("backward", tokens * 12 * 4 * 256**2)
    assert backward.share == pytest.approx(0.8)
    assert backward.ideal == pytest.approx(5.0)
    assert (step.part, step.macs) == ("step", forward.macs + backward.macs)
    assert step.redundant == backward.redundant == pytest.approx(0.8 * backward.macs)
    assert step.ideal == pytest.approx(15 / 7)


def test_products_of_one_pass_alone_make_no_account_of_the_other():
    backward, step = accounts([product for product in lstm_products(3, 4, 5, 2) if product.backward], 0.5)
    assert (backward.part, backward.share, step.share) == ("backward", 0.5, 0.5)


def test_all_zeros_make_an_infinitely_fast_backward_pass_if_nothing_else_is_counted():
    _, backward, step = accounts(lstm_products(7, 5, 3, 2), 1.0)
    assert backward.ideal == math.inf
    assert step.ideal == pytest.approx(3.0)


def test_outer_layers_are_as_named_and_counted_only_where_wanted():
    sizes = (10, 3, 4, 1, 2, 5)
    lstm = by_name(language_model_products(*sizes))
    both = by_name(language_model_products(*sizes, outer=OUTER))
    assert {layer for layer, _ in lstm} == {"l0"}
    assert {key: both[key] for key in both.keys() - lstm.keys()} == {
        **{("embedding", name): 10 * 10 * 3 for name in ("E x", "dE")},
        **{("output", name): 10 * 10 * 4 for name in ("V h", "dh", "dV")},
    }
    assert redundant_share(language_model_products(*sizes, outer=OUTER), 1.0) < 2 / 3


@settings(max_examples=20)
@given(st.permutations(range(6)), SHARES)
def test_the_order_of_products_does_not_matter(order, sparsity):
    products = lstm_products(5, 3, 4, 2)
    assert redundant_share([products[i] for i in order], sparsity) == pytest.approx(two_thirds(sparsity))


def test_wrong_sizes_names_and_shares_are_named():
    for share in (np.float32(0.75), np.array(0.75)):
        assert redundant_share(lstm_products(3, 4, 5, 2), share) == two_thirds(0.75)
    with pytest.raises(ReproError, match=r"inputs is 2\.5: it must be an integer"):
        lstm_products(2.5, 4, 5, 2)
    with pytest.raises(ReproError, match="hidden is 0: it must be an integer, at least 1"):
        lstm_products(5, 0, 4, 2)
    with pytest.raises(ReproError, match="layers is 0"):
        language_model_products(5, 5, 5, 0, 4, 2)
    with pytest.raises(ReproError, match="unknown outer layer 'softmax': choose one of embedding, output"):
        language_model_products(5, 5, 5, 1, 4, 2, outer=["softmax"])
    with pytest.raises(ReproError, match="3 sparsities for 1 LSTM layers"):
        redundant_share(lstm_products(5, 5, 4, 2), [0.1, 0.2, 0.3])
    with pytest.raises(ReproError, match="count at least one LSTM layer"):
        redundant_share([], 0.8)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ReproError, match=r"sparsity is .*must lie in \[0, 1\]"):
            redundant_share(lstm_products(5, 5, 4, 2), wrong)
        with pytest.raises(ReproError, match=r"sparsity is .*must lie in \[0, 1\]"):
            two_thirds(wrong)
        with pytest.raises(ReproError, match=r"redundant share is .*must lie in \[0, 1\]"):
            ideal_speedup(wrong)
