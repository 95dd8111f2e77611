"""Translation by an LSTM that reads and one that writes (Sutskever et al. 2014, arXiv 1409.3215), with or without attention."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from repro.models.sentences import Recurrent, Stack, States, check_sizes, evaluating, words_to_say, write_greedily


class Read(NamedTuple):
    """What the encoder leaves: `outputs` (S, B, hidden) at the words of the source, in its order, and their `lengths` (B,)."""

    outputs: Tensor
    lengths: Tensor


class LuongAttention(nn.Module):
    """Global attention of Luong et al. 2015 (arXiv 1508.04025), score "general": h' = tanh(W_c [c; h]) (Eq. 5).

    c is the mean of the encoder's outputs s, weighted by softmax over h^T W_a s (Eqs. 7 and 8). Without their input feeding
    (section 3.3): the decoder's LSTM does not see h', so that it still runs over all words in one call.
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.score = nn.Linear(hidden, hidden, bias=False)
        self.combine = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, h: Tensor, read: Read) -> tuple[Tensor, Tensor]:
        """h (T, B, hidden) -> h' (T, B, hidden) and the weights (T, B, S), 0 on padding."""
        outputs = read.outputs.transpose(0, 1)
        scores = h.transpose(0, 1) @ self.score(outputs).transpose(1, 2)
        beyond = torch.arange(outputs.shape[1], device=h.device) >= read.lengths.to(h.device)[:, None]
        weights = scores.masked_fill(beyond[:, None], -torch.inf).softmax(2)
        context = (weights @ outputs).transpose(0, 1)
        return torch.tanh(self.combine(torch.cat((context, h), 2))), weights.transpose(0, 1)


class Translator(nn.Module):
    """`forward(source (S, B), lengths (B,), target (T, B)) -> logits (T - 1, B, targets)`: of the target's words after `<s>`.

    The encoder reads the source backwards (Sutskever et al., section 3.3); each layer of the decoder starts from the last state
    of the encoder's. `sources`, `targets`: sizes of the vocabularies; `embedding`, `hidden`: units of both embeddings, of each
    of the `layers` on either side. `attention`: a `LuongAttention` stands between decoder and output layer. `dropout`: training
    only, into and between layers and before the output. `recurrent(input_size, hidden_size)`: makes each layer, as `nn.LSTM`
    does.

    Raises ReproError for a size below 1 and a dropout outside [0, 1).
    """

    def __init__(
        self,
        sources: int,
        targets: int,
        embedding: int,
        hidden: int,
        layers: int,
        attention: bool = False,
        dropout: float = 0.0,
        recurrent: Recurrent = nn.LSTM,
    ):
        super().__init__()
        sizes = {"sources": sources, "targets": targets, "embedding": embedding, "hidden": hidden, "layers": layers}
        check_sizes("translator", dropout, **sizes)
        self.source_embedding = nn.Embedding(sources, embedding)
        self.encoder = Stack(embedding, hidden, layers, dropout, recurrent)
        self.target_embedding = nn.Embedding(targets, embedding)
        self.decoder = Stack(embedding, hidden, layers, dropout, recurrent)
        self.attention = LuongAttention(hidden) if attention else None
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, targets)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        states, read = self.encode(source, lengths)
        return self._decode(target[:-1], words_to_say(target), states, read)[0]

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[States, Read]:
        """The last states of the encoder's layers, and what attention looks at."""
        outputs, states = self.encoder(self.source_embedding(reverse(source, lengths)), lengths)
        return states, Read(reverse(outputs, lengths), lengths)

    def translate(self, source: Tensor, lengths: Tensor, longest: int) -> list[list[int]]:
        """The greedy translation of each source sentence, as indices without marks, at most `longest` words."""
        with evaluating(self):
            states, read = self.encode(source, lengths)
            one = torch.ones_like(lengths)

            def step(words, before):
                return self._decode(words, one, before, read)

            return write_greedily(step, states, len(lengths), longest, source.device)

    def _decode(self, words: Tensor, lengths: Tensor, states: States, read: Read) -> tuple[Tensor, States]:
        h, states = self.decoder(self.target_embedding(words), lengths, states)
        if self.attention is not None:
            h, _ = self.attention(h, read)
        return self.output(self.dropout(h)), states


def reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """Each column of x (S, B, ...) in reverse up to its length; padding stays behind."""
    steps = torch.arange(len(x), device=x.device)[:, None]
    lengths = lengths.to(x.device)
    places = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x[places, torch.arange(x.shape[1], device=x.device)]
