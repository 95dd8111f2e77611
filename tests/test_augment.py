"""Augmentation: what SpecAugment may and may not do, and drawing one speed of each utterance."""

import numpy as np
import pytest

from repro.datasets.augment import draw_variants, spec_augment
from repro.datasets.features import FeatureUtterance


def utterance(frames=120, bins=81, value=50.0, name="u"):
    return FeatureUtterance(name, "speaker", "TEN", np.full((frames, bins), value, dtype=np.float16))


@pytest.mark.parametrize("frames, bins", [(120, 81), (300, 161), (9, 6), (1, 1)])
def test_spec_augment_zeroes_bounded_bands(frames, bins):
    """Shape, names and the input stay; zeros are whole bins or frames, at most twice 15 % and 10 %; each bound is reached."""
    widest = [0, 0]
    for seed in range(200):
        before = utterance(frames, bins)
        after = spec_augment(before, np.random.default_rng(seed))
        assert after.features.shape == (frames, bins) and after.features.dtype == np.float32
        assert (after.name, after.speaker, after.text) == (before.name, before.speaker, before.text)
        assert (before.features == 50.0).all()
        zero = after.features == 0
        columns, rows = zero.all(axis=0), zero.all(axis=1)
        assert (zero == (columns[None, :] | rows[:, None])).all()
        widest = [max(widest[0], columns.sum()), max(widest[1], rows.sum())]
    limits = [2 * int(0.15 * bins), 2 * int(0.10 * frames)]
    assert all(found <= limit for found, limit in zip(widest, limits, strict=True))
    assert all(found > 0.7 * limit for found, limit in zip(widest, limits, strict=True) if limit)


def test_spec_augment_adds_noise_of_a_tenth():
    """Outside the bands Gaussian noise of standard deviation 0.1 around the features; inside them exact zeros."""
    after = spec_augment(utterance(2000, 81), np.random.default_rng(0)).features
    kept = after[after != 0] - 50.0
    assert kept.std() == pytest.approx(0.1, rel=0.01)
    assert abs(kept.mean()) < 0.001


def test_spec_augment_is_its_generator_s():
    """The same generator state gives the same bytes, another one others."""
    first, same, other = (spec_augment(utterance(), np.random.default_rng(seed)).features for seed in (1, 1, 2))
    assert first.tobytes() == same.tobytes()
    assert first.tobytes() != other.tobytes()


def test_draw_variants_takes_one_version_of_each():
    """Of three speeds, version after version, every utterance comes once, in order, at each speed about as often."""
    names = [f"u{i}" for i in range(300)]
    versions = [utterance(2, 2, name=f"{name}@{speed}") for speed in ("0.9", "1", "1.1") for name in names]
    drawn = [u.name.split("@") for u in draw_variants(versions, 3, np.random.default_rng(0))]
    assert [name for name, _ in drawn] == names
    counts = [sum(speed == wanted for _, speed in drawn) for wanted in ("0.9", "1", "1.1")]
    assert sum(counts) == 300 and min(counts) > 70
    assert drawn == [u.name.split("@") for u in draw_variants(versions, 3, np.random.default_rng(0))]
    assert drawn != [u.name.split("@") for u in draw_variants(versions, 3, np.random.default_rng(1))]


def test_one_version_is_the_list_itself():
    versions = [utterance(2, 2, name=f"u{i}") for i in range(5)]
    assert draw_variants(versions, 1, np.random.default_rng(0)) == versions
