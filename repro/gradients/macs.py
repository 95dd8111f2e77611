"""Multiply-accumulates (MACs) of a training step of an LSTM language model, and how many of them thresholding makes redundant.

A layer of D inputs and H units makes six products for each sequence and time step (Zhu et al. 2017, sections 1 and 5):

    forward     W x              4H D        U h              4H H
    backward    dx = dnet W^T    4H D        dh = dnet U^T    4H H
                dW += x dnet     4H D        dU += h dnet     4H H

The gate gradients dnet are an operand of the four below. Each of their entries meets D entries in dx and dW, H in dh and dU:
of each of the four products the share of MACs with a zero in dnet is exactly the share s of zeros in dnet, wherever they are.

Counted as in the paper: all time steps alike (a U h from a state of zeros and the dh of the first step, which nobody uses,
too), no biases, nothing elementwise.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral
from typing import NamedTuple

from repro.errors import ReproError, one_of

FORWARD = ("W x", "U h")
BACKWARD = ("dx", "dh", "dW", "dU")
OUTER = ("embedding", "output")


class Product(NamedTuple):
    """A product of a training step. `layer`: "l0" is the lowest LSTM layer; `thresholded`: dnet is an operand."""

    layer: str
    name: str
    macs: int
    backward: bool
    thresholded: bool


class Account(NamedTuple):
    """`part`: "forward", "backward" or "step", both together; `redundant`: MACs with a zero in dnet; `share` of all `macs`;
    `ideal`: speed-up if they took no time and the others what they take now."""

    part: str
    macs: int
    redundant: float
    share: float
    ideal: float


def lstm_products(inputs: int, hidden: int, steps: int, batch: int, layer: str = "l0") -> list[Product]:
    """The six products of an LSTM layer with `inputs` D and `hidden` H over `steps` T and `batch` B sequences."""
    check_sizes(inputs=inputs, hidden=hidden, steps=steps, batch=batch)
    names = ((FORWARD, False), (BACKWARD, True))
    widths = {"W x": inputs, "dx": inputs, "dW": inputs, "U h": hidden, "dh": hidden, "dU": hidden}
    return [
        Product(layer, name, steps * batch * 4 * hidden * widths[name], backward, backward)
        for part, backward in names
        for name in part
    ]


def language_model_products(
    symbols: int,
    embedding: int,
    hidden: int,
    layers: int,
    steps: int,
    batch: int,
    *,
    outer: Collection[str] = (),
    bottom_dx: bool = True,
) -> list[Product]:
    """The products of a training step of `repro.models.language.LanguageModel`, whose sizes have the same names.

    `outer`: which of the layers around the LSTM are counted, of `OUTER`. The paper counts neither.
    - "output": logits = V h, dh = dlogits V^T and dV += h dlogits, `symbols * hidden` each. dlogits are not thresholded.
    - "embedding": what a linear layer of one-hot symbols takes (the paper's "word2vec" layer), E x and dE += x dx,
      `symbols * embedding` each. A look-up takes none of them: then leave it out. The zeros of one-hot vectors are not
      dnet's and count as redundant nowhere.

    `bottom_dx`: whether the dx of the lowest layer is counted; it is needed only because the embedding is trained.

    Raises ReproError for sizes below 1 and names not in `OUTER`.
    """
    check_sizes(symbols=symbols, embedding=embedding, hidden=hidden, layers=layers, steps=steps, batch=batch)
    for name in outer:
        one_of("outer layer", name, OUTER)
    products = []
    if "embedding" in outer:
        macs = steps * batch * symbols * embedding
        products += [Product("embedding", name, macs, name == "dE", False) for name in ("E x", "dE")]
    for layer in range(layers):
        products += lstm_products(embedding if layer == 0 else hidden, hidden, steps, batch, f"l{layer}")
    if not bottom_dx:
        products = [product for product in products if (product.layer, product.name) != ("l0", "dx")]
    if "output" in outer:
        macs = steps * batch * symbols * hidden
        products += [Product("output", name, macs, name != "V h", False) for name in ("V h", "dh", "dV")]
    return products


def redundant_share(products: Iterable[Product], sparsity: float | Sequence[float]) -> float:
    """Share of the MACs of `products` that have a zero of dnet as an operand.

    `sparsity`: share of zeros in dnet, of each LSTM layer among the products, the lowest first, or one number for all.

    It is `two_thirds(s)`, the paper's, for any widths D and H and any number of layers if
    - only LSTM layers are counted, and dx in all of them, the lowest too;
    - s is equal in all layers, or their mean weighted with their MACs, (D + H) H.

    Where that is not so (derived here, for L layers with D = H and a vocabulary of V): without the lowest dx the share is
    s (4L - 1) / (6L - 1), 3s/5 for one layer; with the output layer, 2s/3 over 1 + V / (8 L H).

    Raises ReproError for no products, another number of layers, a sparsity outside [0, 1].
    """
    products = list(products)
    return _redundant(products, sparsity) / _total(products)


def two_thirds(sparsity: float) -> float:
    """2s/3, the paper's share of redundant MACs: four products of six have dnet as an operand.

    s = 0.8 gives 53.3 %, and "more than 50 %" needs s > 0.75. The paper's six products "of the same amount" need D = H; the
    share does not, as 2 (D + H) 4H of 3 (D + H) 4H are dnet's (derived here). See `redundant_share` for when it holds.
    """
    _check_sparsity(sparsity)
    return 2 * sparsity / 3


def ideal_speedup(share: float) -> float:
    """1 / (1 - share): if the redundant share of the MACs took no time and all others as long as before; at most 3 for 2s/3."""
    if not 0.0 <= share <= 1.0:
        raise ReproError(f"redundant share is {share}: it must lie in [0, 1]")
    return 1 / (1 - share) if share < 1 else math.inf


def accounts(products: Iterable[Product], sparsity: float | Sequence[float]) -> list[Account]:
    """Forward, backward and both together, as far as `products` are; `sparsity` as in `redundant_share`.

    All redundant MACs are backward.
    """
    products = list(products)
    redundant = _redundant(products, sparsity)
    backward, step = (_total(part) for part in ([p for p in products if p.backward], products))
    counts = {"forward": (step - backward, 0.0), "backward": (backward, redundant), "step": (step, redundant)}
    return [Account(part, macs, zero, zero / macs, ideal_speedup(zero / macs)) for part, (macs, zero) in counts.items() if macs]


def _redundant(products: list[Product], sparsity: float | Sequence[float]) -> float:
    layers = list(dict.fromkeys(product.layer for product in products if product.thresholded))
    if not layers:
        raise ReproError("no product with dnet as an operand: count at least one LSTM layer")
    several = isinstance(sparsity, Iterable) and getattr(sparsity, "ndim", 1) > 0
    shares = list(sparsity) if several else [float(sparsity)] * len(layers)
    if len(shares) != len(layers):
        raise ReproError(f"{len(shares)} sparsities for {len(layers)} LSTM layers: give one for each, or one number")
    for share in shares:
        _check_sparsity(share)
    of = dict(zip(layers, shares, strict=True))
    return math.fsum(product.macs * of[product.layer] for product in products if product.thresholded)


def _total(products: list[Product]) -> int:
    return sum(product.macs for product in products)


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not (isinstance(size, Integral) and size >= 1):
            raise ReproError(f"{name} is {size!r}: it must be an integer, at least 1")


def _check_sparsity(sparsity: float) -> None:
    if not 0.0 <= sparsity <= 1.0:
        raise ReproError(f"sparsity is {sparsity}: as a share of zeros it must lie in [0, 1]")
