"""Captions of images by an LSTM (Vinyals et al. 2015, "Show and Tell", arXiv 1411.4555)."""

import torch
from torch import Tensor, nn

from repro.errors import ReproError
from repro.models.sentences import Recurrent, Stack, check_sizes, evaluating, words_to_say, write_greedily


class Captioner(nn.Module):
    """`forward(features (B, d), captions (T, B)) -> logits (T - 1, B, symbols)`: of the captions' words after `<s>`.

    The image is the LSTM's first input and never shown again: x_{-1} = W_i features, x_t = W_e S_t and
    p_{t+1} = softmax(LSTM(x_t)) (Eqs. 10 to 12), S_0 being `<s>`. `features`: d; `symbols`: size of the vocabulary;
    `embedding`: units of W_i and W_e; `hidden`: of each of the `layers`. `dropout`: training only, into and between layers and
    before the output. `recurrent(input_size, hidden_size)`: makes each layer, as `nn.LSTM` does.

    Raises ReproError for a size below 1 and a dropout outside [0, 1).
    """

    def __init__(
        self,
        features: int,
        symbols: int,
        embedding: int,
        hidden: int,
        layers: int = 1,
        dropout: float = 0.0,
        recurrent: Recurrent = nn.LSTM,
    ):
        super().__init__()
        sizes = {"features": features, "symbols": symbols, "embedding": embedding, "hidden": hidden, "layers": layers}
        check_sizes("captioner", dropout, **sizes)
        self.image = nn.Linear(features, embedding)
        self.embedding = nn.Embedding(symbols, embedding)
        self.decoder = Stack(embedding, hidden, layers, dropout, recurrent)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, symbols)

    def forward(self, features: Tensor, captions: Tensor) -> Tensor:
        self._check(features)
        if captions.ndim != 2 or captions.shape[1] != len(features):
            raise ReproError(f"captions of {len(features)} images are {tuple(captions.shape)}: (words, images) is needed")
        x = torch.cat((self.image(features)[None], self.embedding(captions[:-1])))
        h, _ = self.decoder(x, 1 + words_to_say(captions))
        return self.output(self.dropout(h[1:]))

    def _check(self, features: Tensor) -> None:
        wanted = self.image.weight
        if features.ndim != 2 or features.shape[1] != wanted.shape[1] or features.dtype != wanted.dtype:
            found = f"{tuple(features.shape)} {features.dtype}"
            raise ReproError(f"features of images are {found}: (images, {wanted.shape[1]}) {wanted.dtype} is needed")

    def describe(self, features: Tensor, longest: int) -> list[list[int]]:
        """The greedy caption of each image, as indices without marks, at most `longest` words."""
        self._check(features)
        one = torch.ones(len(features), dtype=torch.long)
        with evaluating(self):
            _, states = self.decoder(self.image(features)[None], one)

            def step(words, before):
                h, after = self.decoder(self.embedding(words), one, before)
                return self.output(h), after

            return write_greedily(step, states, len(features), longest, features.device)
