"""What models that write sentences share: layers over padded words, the loss of given sentences, greedy writing, BLEU.

Sentences are the columns of int64 (T, B), from `<s>` to `</s>`, with index 0 (`<pad>`) behind the shorter ones; the marks are
those of `repro.datasets.vocabulary`. Padding is packed away before the recurrent layers: neither states nor gate gradients
have entries for it, so that shares of zeros are shares of real words.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from repro.datasets import vocabulary
from repro.errors import ReproError

PADDING, START, STOP = map(vocabulary.MARKS.index, (vocabulary.PADDING, vocabulary.START, vocabulary.STOP))

Recurrent = Callable[[int, int], nn.Module]  # (input_size, hidden_size) -> a module with the interface of a one-layer nn.LSTM
States = list[tuple[Tensor, Tensor]]  # (h, c) of each layer, each (1, B, hidden)


class Stack(nn.Module):
    """`layers` recurrent layers in a row, as made by `recurrent`; dropout falls into and between them, in training only."""

    def __init__(self, inputs: int, hidden: int, layers: int, dropout: float, recurrent: Recurrent):
        super().__init__()
        self.layers = nn.ModuleList(recurrent(inputs if i == 0 else hidden, hidden) for i in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """x (T, B, inputs), `lengths` (B,) at least 1 -> output (T, B, hidden), 0 beyond the lengths, and the last states."""
        packed, carried = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False), []
        for layer, before in zip(self.layers, states or [None] * len(self.layers), strict=True):
            packed, after = layer(packed._replace(data=self.dropout(packed.data)), before)
            carried.append(after)
        return pad_packed_sequence(packed, total_length=len(x))[0], carried


def check_sizes(model: str, dropout: float, **sizes: int) -> None:
    """Raise ReproError for a size below 1 or a dropout outside [0, 1)."""
    for name, size in sizes.items():
        if size < 1:
            raise ReproError(f"{name} of the {model} is {size}: it must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ReproError(f"dropout of the {model} is {dropout}: it must lie in [0, 1)")


def words_to_say(sentences: Tensor) -> Tensor:
    """(B,) how many words of each sentence (T, B) have to be foretold: all but `<s>`."""
    return (sentences[1:] != PADDING).sum(0)


def summed_loss(model: nn.Module, *batch: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy in nats of the sentences `batch[-1]` under `model(*batch)`, summed over all words, and how many these are.

    The model gives logits (T - 1, B, symbols) for all words but `<s>`; padding counts nowhere.
    """
    logits, words = model(*batch), batch[-1][1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), words.flatten(), ignore_index=PADDING, reduction="sum")
    return loss, int(words_to_say(batch[-1]).sum())


def mean_loss(model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> float:
    """`summed_loss` of all batches, divided once by the number of all words; in evaluation mode."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            loss, words = summed_loss(model, *batch)
            total, count = total + loss.item(), count + words
    if count == 0:
        raise ReproError("no sentence to evaluate the model on: mean_loss needs at least one")
    return total / count


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def write_greedily(
    step: Callable[[Tensor, Any], tuple[Tensor, Any]], state: Any, batch: int, longest: int, device: torch.device
) -> list[list[int]]:
    """The likeliest word at each step, up to `</s>` or `longest` words; the indices of each of `batch` sentences, no marks.

    `step(words (1, B), state) -> logits (1, B, symbols), state`; the first words are `<s>`. Raises ReproError for `longest`
    below 1.
    """
    if longest < 1:
        raise ReproError(f"the longest sentence to write has {longest} words: it must have at least 1")
    words, written = torch.full((1, batch), START, device=device), []
    marks, unfinished = torch.tensor([PADDING, START], device=device), torch.full((batch,), True)
    while unfinished.any() and len(written) < longest:
        logits, state = step(words, state)
        words = logits.index_fill(2, marks, -math.inf).argmax(2)
        unfinished = unfinished & (words[0].cpu() != STOP)
        written.append(words[0])
    rows = torch.stack(written, 1).tolist()
    return [row[: row.index(STOP)] if STOP in row else row for row in rows]


def bleu(written: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """BLEU-4 of a corpus in percent (Papineni et al. 2002), by sacrebleu; one or more references for each sentence.

    The words are scored as they are: the corpora come tokenised, sacrebleu's own tokenisation is off (`tokenize="none"`, and
    `force`, or it would warn of that). Where no n-gram of some order is right, of which Papineni's is 0, sacrebleu smoothes.
    Raises ReproError without sentences, or when a sentence has no reference.
    """
    import sacrebleu

    if not written or len(written) != len(references) or not all(references):
        raise ReproError(f"{len(written)} sentences and references for {len(references)}: one or more for each is needed")
    most = max(map(len, references))
    streams = [[" ".join(own[i]) if i < len(own) else None for own in references] for i in range(most)]
    return sacrebleu.corpus_bleu([" ".join(words) for words in written], streams, tokenize="none", force=True).score
