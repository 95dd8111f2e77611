"""Connectionist temporal classification for the speech models: loss, greedy decoding, evaluation of a whole set."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from repro.datasets.batches import Batch
from repro.datasets.speech import character_error_rate, decode


def ctc_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Summed CTC cost of a batch in nats, and its number of utterances. A transcript longer than its frames costs zero."""
    scores, lengths = model(batch.features, batch.lengths)
    cost = nn.functional.ctc_loss(scores, batch.targets, lengths, batch.target_lengths, reduction="sum", zero_infinity=True)
    return cost, len(batch.texts)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """`loss`: CTC cost in nats an utterance; `cer`: character error rate of greedy decoding over the whole set."""
    model.eval()
    total, references, hypotheses = 0.0, [], []
    for batch in batches:
        scores, lengths = model(batch.features, batch.lengths)
        cost = nn.functional.ctc_loss(scores, batch.targets, lengths, batch.target_lengths, reduction="sum", zero_infinity=True)
        total += cost.item()
        best = scores.argmax(-1).t()
        hypotheses += [decode(best[i, :length].tolist()) for i, length in enumerate(lengths.tolist())]
        references += batch.texts
    return {"loss": total / len(references), "cer": character_error_rate(references, hypotheses)}
