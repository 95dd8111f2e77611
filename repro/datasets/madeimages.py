"""Made images: ten textured shapes at any angle, size and place, lighter or darker than a noisy background.

No file and no network; the same for the same seed on every machine. Since a shape is as often lighter than its surroundings
as darker, the mean image of each class is flat, and a linear classifier learns next to nothing.
"""

from dataclasses import dataclass

import numpy as np

from repro.datasets.draws import check_options

OPTIONS = ("size", "seed")
# Raise `code_version` of the trials that read it when a pixel of the corpus changes.

SIDE = 32  # pixels
RADIUS = (8.0, 13.0)  # pixels that are 1 in the coordinates of the shapes
SHIFT = 3.0  # pixels at most, in either direction
WAVELENGTH = (4.0, 12.0)  # pixels
# Brightness: of a shape, lighter or darker; greatest height of the stripes on it and around it; deviation of the noise.
CONTRAST = (0.8, 1.8)
STRIPES = 0.6
NOISE = 0.4
LEVELS = 64  # of brightness in a unit
SIZES = {
    "smoke": {"train": 500, "validation": 100, "test": 100},
    "laptop": {"train": 10_000, "validation": 1_000, "test": 2_000},
}


# Which points (u, v) belong to the shape; it fits into a circle of radius 1 or little more.
SHAPES = {
    "disc": lambda u, v: u * u + v * v < 0.75**2,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.7) < 0.22,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.68,
    "triangle": lambda u, v: np.maximum(-v, 0.866 * abs(u) + 0.5 * v) < 0.5,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.25) & (np.maximum(abs(u), abs(v)) < 0.9),
    "bar": lambda u, v: (abs(u) < 1) & (abs(v) < 0.38),
    "ell": lambda u, v: (np.maximum(abs(u), abs(v)) < 0.75) & (np.minimum(u, v) < -0.2),
    "crescent": lambda u, v: (u * u + v * v < 0.85**2) & ((u - 0.45) ** 2 + v * v > 0.7**2),
    "pair": lambda u, v: (abs(u) - 0.55) ** 2 + v * v < 0.4**2,
    "star": lambda u, v: np.hypot(u, v) < 0.75 * (1 + 0.35 * np.cos(5 * np.arctan2(v, u))),
}


@dataclass(frozen=True)
class MadeImages:
    """`images`: (N, 1, 32, 32), float32, mean about 0 and deviation about 0.7; `labels`: (N,), int64, indices of `SHAPES`."""

    images: np.ndarray
    labels: np.ndarray


def load(size: str = "laptop", seed: int = 0) -> dict[str, MadeImages]:
    """The three splits, each from a seed of its own. Raises ReproError for an unknown size or a seed that is not natural."""
    check_options("made images", size, SIZES, seed)
    return {split: draw(count, (seed, number)) for number, (split, count) in enumerate(SIZES[size].items())}


def draw(count: int, seed: int | tuple[int, ...]) -> MadeImages:
    """`count` images, at least 1, of the classes in turn; 10,000 take half a second."""
    rng = np.random.Generator(np.random.PCG64(seed))
    labels = np.arange(count) % len(SHAPES)
    # A thousand at a time stay in the cache.
    images = [_draw(rng, labels[start : start + 1000]) for start in range(0, count, 1000)]
    return MadeImages(np.concatenate(images)[:, None], labels)


def _draw(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    count = len(labels)
    u, v = _coordinates(rng, count)
    inside = np.empty(u.shape, bool)
    for label, shape in enumerate(SHAPES.values()):
        inside[labels == label] = shape(u[labels == label], v[labels == label])
    contrast = _each(rng.uniform(*CONTRAST, count) * rng.choice((-1, 1), count))
    images = np.where(inside, contrast + _stripes(rng, count), _stripes(rng, count))
    images += NOISE * rng.standard_normal(images.shape)
    # Sines differ between machines in their last bits, which are cut off here.
    return (np.rint(images * LEVELS) / LEVELS).astype(np.float32)


def _each(values: np.ndarray) -> np.ndarray:
    """One value an image, to be broadcast over its pixels."""
    return values[:, None, None]


def _coordinates(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(u, v) of all pixels, (N, 32, 32) each: those of the shape, shifted, turned and scaled."""
    angle, radius = rng.uniform(0, 2 * np.pi, count), rng.uniform(*RADIUS, count)
    right, down = rng.uniform(-SHIFT, SHIFT, (2, count))
    pixel = np.arange(SIDE) - (SIDE - 1) / 2
    x, y = pixel - _each(right), pixel[:, None] - _each(down)
    cos, sin = _each(np.cos(angle) / radius), _each(np.sin(angle) / radius)
    return cos * x + sin * y, cos * y - sin * x


def _stripes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Sine waves of some direction, length, phase and height, (N, 32, 32)."""
    direction, phase = rng.uniform(0, 2 * np.pi, (2, count))
    wave, height = 2 * np.pi / rng.uniform(*WAVELENGTH, count), rng.uniform(0, STRIPES, count)
    pixel = np.arange(SIDE)
    across, down = _each(wave * np.cos(direction)) * pixel, _each(wave * np.sin(direction)) * pixel[:, None]
    return _each(height) * np.sin(across + down + _each(phase))
