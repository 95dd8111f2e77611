"""Padded torch batches of feature utterances, longest first as CTC models with packed sequences want them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from repro.datasets.features import FeatureUtterance
from repro.datasets.speech import encode


@dataclass(frozen=True)
class Batch:
    """`features`: float32 (B, T, bins), zero (the mean) beyond each utterance's `lengths` (B,), which never increase.

    `targets`: the transcripts' indices one after the other, (sum of `target_lengths`,), as
    `torch.nn.functional.ctc_loss` takes them; `texts`: the same as strings.
    """

    features: torch.Tensor
    lengths: torch.Tensor
    targets: torch.Tensor
    target_lengths: torch.Tensor
    texts: list[str]


def collate(utterances: Sequence[FeatureUtterance]) -> Batch:
    """One batch of these utterances, sorted longest first (ties keep their order)."""
    ordered = sorted(utterances, key=lambda utterance: -len(utterance.features))
    codes = [encode(utterance.text) for utterance in ordered]
    lengths = [len(utterance.features) for utterance in ordered]
    features = np.zeros((len(ordered), lengths[0], ordered[0].features.shape[1]), dtype=np.float32)
    for row, utterance in zip(features, ordered, strict=True):
        row[: len(utterance.features)] = utterance.features
    return Batch(
        torch.from_numpy(features),
        torch.tensor(lengths),
        torch.tensor([index for code in codes for index in code]),
        torch.tensor([len(code) for code in codes]),
        [utterance.text for utterance in ordered],
    )


def batches(utterances: Sequence[FeatureUtterance], size: int, rng: np.random.Generator | None = None) -> Iterator[Batch]:
    """One pass over `utterances` in batches of `size` (the last may be smaller), neighbours in length together.

    With `rng` lengths are blurred by about 10 % before sorting and the batches come in random order (training); without,
    they come by length and the same each time (evaluation).
    """
    lengths = np.array([len(utterance.features) for utterance in utterances], dtype=float)
    if rng is not None:
        lengths *= np.exp(0.1 * rng.standard_normal(len(lengths)))
    order = np.argsort(-lengths, kind="stable")
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    if rng is not None:
        rng.shuffle(chunks)
    for chunk in chunks:
        yield collate([utterances[index] for index in chunk])
