"""A recurrent language model: embedding, LSTM or GRU layers, linear decoder (Zaremba et al. 2014, arXiv 1409.2329).

The character model of Zhu et al. 2017 (section 4.1) is the same with an embedding as wide as its layers and no dropout.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from repro.errors import ReproError, one_of

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}

State = list  # of each layer what its module returns: (h, c) of an LSTM, h of a GRU, each (1, B, hidden)


class LanguageModel(nn.Module):
    """`forward(tokens (T, B), state) -> logits (T, B, symbols), state`; without a state the layers start from zeros.

    `symbols`: size of the vocabulary; `embedding`, `hidden`: units of the embedding and of each of the `layers`. `cell`:
    "lstm" or "gru". `recurrent(input_size, hidden_size)` makes each layer instead, as a module with the interface of a
    one-layer `nn.LSTM` or `nn.GRU`. `dropout`: training only, on the connections that are not recurrent, which are those
    into the first layer, between layers and into the decoder (Zaremba et al., Figure 2). `tied`: the decoder's matrix is the
    embedding's (Press and Wolf 2017); both must then be equally wide. `layers` lists the recurrent modules.

    Raises ReproError for an unknown cell, a size below 1, a dropout outside [0, 1), tied layers of different width.
    """

    def __init__(
        self,
        symbols: int,
        embedding: int,
        hidden: int,
        layers: int,
        cell: str = "lstm",
        dropout: float = 0.0,
        tied: bool = False,
        recurrent: Callable[[int, int], nn.Module] | None = None,
    ):
        super().__init__()
        one_of("cell", cell, CELLS)
        for name, size in {"symbols": symbols, "embedding": embedding, "hidden": hidden, "layers": layers}.items():
            if size < 1:
                raise ReproError(f"{name} of the language model is {size}: it must be at least 1")
        if not 0.0 <= dropout < 1.0:
            raise ReproError(f"dropout of the language model is {dropout}: it must lie in [0, 1)")
        if tied and embedding != hidden:
            raise ReproError(f"a tied decoder needs embedding and hidden of one width, not {embedding} and {hidden}")
        layer = recurrent or CELLS[cell]
        self.embedding = nn.Embedding(symbols, embedding)
        self.layers = nn.ModuleList(layer(embedding if i == 0 else hidden, hidden) for i in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Linear(hidden, symbols)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        x, carried = self.decoder_input(tokens, state)
        return self.decoder(x), carried

    def decoder_input(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the decoder makes logits of, (T, B, hidden), and the state."""
        x = self.embedding(tokens)
        carried = []
        for layer, before in zip(self.layers, state or [None] * len(self.layers), strict=True):
            x, after = layer(self.dropout(x), before)
            carried.append(after)
        return self.dropout(x), carried


def detach(state: State) -> State:
    """The same numbers without their history: truncated backpropagation through time ends here."""
    return [tuple(map(Tensor.detach, part)) if isinstance(part, tuple) else part.detach() for part in state]


def initialise_uniform(model: nn.Module, bound: float) -> None:
    """Draw every parameter, biases too, from U(-bound, bound): 0.1 in Zaremba et al.'s small set-up, 0.05 in the medium."""
    if not (bound > 0 and math.isfinite(bound)):
        raise ReproError(f"the bound of the uniform initialisation is {bound}: it must be positive")
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -bound, bound)


@torch.no_grad()
def mean_loss(model: LanguageModel, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Cross-entropy in nats per token over contiguous `batches` of (tokens, targets), each (T, B), the state carried.

    Divided once, by the number of all targets; perplexity is its exponential. The model is left in the mode it was in.
    """
    training = model.training
    model.eval()
    state, total, count = None, 0.0, 0
    for tokens, targets in batches:
        logits, state = model(tokens, state)
        total += nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    model.train(training)
    if count == 0:
        raise ReproError("no batch to evaluate the language model on: mean_loss needs at least one")
    return total / count
