"""The made images and the small network that learns them: pinned, balanced, and not to be learned by a linear classifier."""

import hashlib
import time

import numpy as np
import pytest
import torch
from torch import nn

from repro.datasets.madeimages import SHAPES, SIZES, draw, load
from repro.errors import ReproError
from repro.models.vision import SmallCNN, accuracy


def test_images_are_pinned():
    """A change here must raise the `code_version` of the trials that read it."""
    digest = hashlib.sha256()
    for split in load("smoke").values():
        digest.update(split.images.tobytes() + split.labels.tobytes())
    assert digest.hexdigest()[:16] == "ca1874fa805be3cc"


def test_the_seed_decides_everything():
    splits = [split for seed in (0, 1) for split in load("smoke", seed).values()]
    assert len({split.images[:100].tobytes() for split in splits}) == 6
    assert all(np.array_equal(a.images, b.images) for a, b in zip(splits, load("smoke").values(), strict=False))


def test_splits_have_their_sizes_and_all_classes_equally_often():
    for split, made in load("smoke").items():
        count = SIZES["smoke"][split]
        assert made.images.shape == (count, 1, 32, 32) and made.images.dtype == np.float32
        assert made.labels.dtype == np.int64 and np.bincount(made.labels).tolist() == [count // len(SHAPES)] * len(SHAPES)


def test_unknown_sizes_and_seeds_are_refused():
    with pytest.raises(ReproError, match="smoke, laptop"):
        load("huge")
    with pytest.raises(ReproError, match="natural"):
        load("smoke", seed=-1)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_differ(name):
    """They are of a size, and no other, however turned, covers the same pixels."""
    u, v = np.meshgrid(np.linspace(-1.5, 1.5, 301), np.linspace(-1.5, 1.5, 301))
    inside = SHAPES[name](u, v)
    assert 0.5 < inside.mean() * 9 < 2.2
    assert np.hypot(u, v)[inside].max() < 1.1
    turned = [np.hypot(u, v) * np.exp(1j * (np.arctan2(v, u) + angle)) for angle in np.linspace(0, 2 * np.pi, 24)]
    for other in SHAPES.keys() - {name}:
        common = max((inside & (shape := SHAPES[other](z.real, z.imag))).sum() / (inside | shape).sum() for z in turned)
        assert common < 0.85, other


def test_lighter_as_often_as_darker():
    """The mean image of a class is flat: there is nothing for a linear classifier."""
    made = draw(4000, seed=0)
    for label in range(len(SHAPES)):
        mean = made.images[made.labels == label, 0].mean(0)
        assert abs(mean).max() < 5 * 1.5 / np.sqrt(400)  # five standard errors of the strongest pixels


def test_ten_thousand_images_are_quick():
    start = time.process_time()
    draw(10_000, seed=0)
    assert time.process_time() - start < 2


def test_the_network_has_the_stated_size():
    model = SmallCNN()
    assert sum(p.numel() for p in model.parameters()) == 61_130
    multiply_adds = 0

    def count(module, _, output):
        nonlocal multiply_adds
        multiply_adds += module.weight.numel() * output[0].numel() // len(module.weight)

    for module in model.modules():
        if hasattr(module, "weight"):
            module.register_forward_hook(count)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    assert round(multiply_adds / 1e6, 1) == 4.8 and round(multiply_adds / 61_130) == 79
    with pytest.raises(ReproError, match="at least one"):
        SmallCNN(0)


def learned(model, epochs, rate):
    """Accuracy on new images after training on 2,000."""
    train, test = draw(2_000, seed=1), draw(500, seed=2)
    x, y = torch.from_numpy(train.images), torch.from_numpy(train.labels)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return accuracy(model, torch.from_numpy(test.images), torch.from_numpy(test.labels), batch=100)


def test_the_network_learns_what_a_linear_classifier_does_not():
    torch.manual_seed(0)
    assert learned(nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)), epochs=6, rate=1e-3) < 0.2
    assert learned(SmallCNN(), epochs=6, rate=2e-3) > 0.3


def test_accuracy_divides_once_and_leaves_the_mode():
    """Batches of unequal size count by their items."""
    model = nn.Sequential(nn.Dropout(1.0), nn.Identity())
    labels = torch.tensor([0, 1, 1, 1, 1])
    images = torch.eye(2)[[0, 1, 1, 1, 0]]
    assert model.training and accuracy(model, images, labels, batch=4) == 0.8 and model.training
    assert accuracy(model.eval(), images, labels) == 0.8 and not model.training
