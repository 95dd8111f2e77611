"""Augmentation of training utterances on their spectrograms: one of several speeds, SpecAugment, a little noise."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from repro.datasets.features import FeatureUtterance


def draw_variants(utterances: Sequence[FeatureUtterance], variants: int, rng: np.random.Generator) -> list[FeatureUtterance]:
    """One version of each utterance, of a list that holds `variants` versions of all (speeds), version after version."""
    count = len(utterances) // variants
    return [utterances[version * count + i] for i, version in enumerate(rng.integers(variants, size=count))]


def spec_augment(utterance: FeatureUtterance, rng: np.random.Generator) -> FeatureUtterance:
    """SpecAugment (Park et al. 2019) without time warping, on features (frames, bins) normalised to mean zero.

    Two bands of up to 15 % of the bins and two stretches of up to 10 % of the frames are set to zero; Gaussian noise of
    standard deviation 0.1 is added before.
    """
    frames, bins = utterance.features.shape
    y = utterance.features + 0.1 * rng.standard_normal(utterance.features.shape, dtype=np.float32)
    for _ in range(2):
        width = rng.integers(0, int(0.15 * bins) + 1)
        start = rng.integers(0, bins - width + 1)
        y[:, start : start + width] = 0.0
        width = rng.integers(0, int(0.10 * frames) + 1)
        start = rng.integers(0, frames - width + 1)
        y[start : start + width] = 0.0
    return replace(utterance, features=y)
