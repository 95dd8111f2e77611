"""The quantities of zhu2017 that need no training: closed forms, and the paper's numbers against each other."""

from __future__ import annotations

import math

import numpy as np

from repro.studies.zhu2017.comparisons import paper

INPUTS_ELSEWHERE = 64  # torch-rnn's embedding


def dnet_percent(inputs: int, hidden: int) -> float:
    """Percent of the MACs of an LSTM layer that belong to the four products with dnet."""
    from repro.gradients.macs import lstm_products, redundant_share

    return 100 * redundant_share(lstm_products(inputs, hidden, 1, 1), 1.0)


def cells() -> int:
    return round(paper("prose", "model", "cells").value)


def printed_zeros() -> float:
    """The share of zeros that the paper claims for dnet."""
    return paper("macs", "sparsified", "zeros_percent_low").value / 100


def backward_macs_percent() -> float:
    return dnet_percent(cells(), cells())


def backward_macs_percent_other_inputs() -> float:
    return dnet_percent(INPUTS_ELSEWHERE, cells())


def redundant_macs_percent_at_80() -> float:
    products, with_dnet = (paper("macs", "training iteration", name).value for name in ("products", "products_with_dnet"))
    return 100 * printed_zeros() * with_dnet / products


def redundant_macs_identity_deviation() -> float:
    """Largest over drawn patterns of zeros, each MAC of the six products looked at, on a case small enough for it."""
    from repro.gradients.macs import two_thirds

    samples, inputs, hidden = 3, 5, 4
    gates, found = 4 * hidden, []
    for seed in range(10):
        zero = np.random.default_rng(seed).random((samples, gates)) < 0.1 * seed
        macs = redundant = 0
        for features in (inputs, hidden):
            forward = np.zeros((samples, gates, features), bool)  # net = x W^T: no operand is dnet
            before = np.broadcast_to(zero[:, None, :], (samples, features, gates))  # dx = dnet W
            weights = np.broadcast_to(zero.T[:, None, :], (gates, features, samples))  # dW = dnet^T x
            for product in (forward, before, weights):
                macs += product.size
                redundant += product.sum()
        found.append(abs(redundant / macs - two_thirds(zero.mean())))
    return max(found)


def redundant_macs_percent_fixed_embedding() -> float:
    from repro.gradients.macs import language_model_products, redundant_share

    layers = round(paper("prose", "model", "layers").value)
    products = language_model_products(1, cells(), cells(), layers, 1, 1, bottom_dx=False)
    return 100 * redundant_share(products, printed_zeros())


def words_percent(setup: str) -> float:
    """Percent of redundant MACs in Zaremba's word model, the output layer counted."""
    from repro.gradients.macs import language_model_products, redundant_share

    hidden, layers = (round(paper("words", setup, metric).value) for metric in ("cells", "layers"))
    symbols = round(paper("words", "Penn Treebank", "symbols").value)
    products = language_model_products(symbols, hidden, hidden, layers, 1, 1, outer=("output",))
    return 100 * redundant_share(products, printed_zeros())


def macs_bound_speedup_80() -> float:
    from repro.gradients.macs import ideal_speedup, two_thirds

    return ideal_speedup(two_thirds(printed_zeros()))


def line_of_zeros() -> tuple[float, float]:
    """(exponent of t at 0 %, points a decade) of the straight line through the paper's two thresholds of one step."""
    low, high = (paper("figure3", "one step", "zeros_percent", t).value for t in (1e-8, 1e-6))
    slope = (high - low) / 2
    return -8 - low / slope, slope


def extrapolated_exponent_of_10_percent() -> float:
    start, slope = line_of_zeros()
    return start + paper("figure3", "one step", "zeros_percent", 0).value / slope


def printed_rule_large_removed_percent() -> float:
    import torch

    from repro.gradients import PrintedSigned

    dnet, t = torch.arange(-10, 11) / 10, 0.05
    large = dnet.abs() > t
    left = PrintedSigned(t)(dnet.clone())
    return 100 * ((left == 0) & large).sum().item() / large.sum().item()


def printed_tanh_derivative(x: float) -> tuple[float, float]:
    """(as printed in section 1, right)."""
    return math.tanh(x) * (1 - math.tanh(x)), 1 - math.tanh(x) ** 2


def printed_tanh_derivative_error() -> float:
    pairs = (printed_tanh_derivative(i / 100) for i in range(-500, 501))
    return max(abs(printed - right) for printed, right in pairs)


def carries() -> tuple[float, float]:
    """dc of the first of two steps with i = f = o = 1/2, g = tanh 1, U = 0 and loss h_2: (as printed, right)."""
    g = math.tanh(1)
    c1 = g / 2
    c2 = c1 / 2 + g / 2
    dc2 = (1 - math.tanh(c2) ** 2) / 2
    return c2 / 2, dc2 / 2


def printed_carry_error_percent() -> float:
    printed, right = carries()
    return 100 * abs(printed - right) / abs(right)


def perplexity_percent_of_one_percent_loss() -> float:
    perplexity = paper("words", "Zaremba small", "test_perplexity").value
    return 100 * (perplexity**1.01 / perplexity - 1)


EXACT = {
    function.__name__: function
    for function in (
        backward_macs_percent,
        backward_macs_percent_other_inputs,
        redundant_macs_percent_at_80,
        redundant_macs_identity_deviation,
        redundant_macs_percent_fixed_embedding,
        macs_bound_speedup_80,
        extrapolated_exponent_of_10_percent,
        printed_rule_large_removed_percent,
        printed_tanh_derivative_error,
        printed_carry_error_percent,
        perplexity_percent_of_one_percent_loss,
    )
} | {f"redundant_macs_percent_words_{name}": (lambda s=name: words_percent(f"Zaremba {s}")) for name in ("small", "medium")}
