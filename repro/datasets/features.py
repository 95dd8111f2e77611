"""Log spectrograms of a speech corpus, computed once and kept in one file."""

import hashlib
import io
import json
import warnings
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from filelock import FileLock
from scipy import fft, signal

from repro.datasets.registry import cache_folder
from repro.datasets.speech import SPLITS, SpeechCorpus, corpus_identity, load_corpus
from repro.errors import ReproError
from repro.files import DAMAGED, write_atomically

CODE_VERSION = 2  # raise it when a feature's value changes: old caches are then computed anew
WINDOW_SECONDS = 0.020
STEP_SECONDS = 0.010
# Power that 16-bit quantisation noise has in one bin, (1/32768)^2 / 12 times the window's energy (about 120 at 16 kHz):
# what is quieter carries nothing, and digital silence stays finite.
FLOOR = 1e-8


@dataclass(frozen=True)
class FeatureUtterance:
    """`features`: float16 (frames, bins), one frame each 10 ms; normalised values, a few units around 0."""

    name: str
    speaker: str
    text: str
    features: np.ndarray


@dataclass(frozen=True)
class SpeechFeatures:
    """The log spectrograms of the corpus `name`, with `bins` values a frame, in the corpus' splits and order."""

    name: str
    bins: int
    splits: dict[str, list[FeatureUtterance]]


def log_spectrogram(samples: np.ndarray, rate: int) -> np.ndarray:
    """float32 (frames, bins): log power in 20 ms Hann windows each 10 ms, normalised over the utterance.

    `samples` (n,) in [-1, 1] at `rate` Hz give 1 + (n - window) // step frames (at least one: zeros are added to shorter
    ones) of window // 2 + 1 bins: 161 at 16 kHz, 81 at 8 kHz; bin k is at 50 k Hz.

    Each bin has mean 0 and standard deviation 1 over the utterance: the mean removes microphone and channel (a fixed filter
    adds a constant to each log bin), and Deep Speech 2's first convolution sees all bins at one scale.
    """
    window, step = round(WINDOW_SECONDS * rate), round(STEP_SECONDS * rate)
    samples = np.asarray(samples, dtype=np.float32)
    samples = np.pad(samples, (0, max(0, window - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(samples, window)[::step]
    spectrum = fft.rfft(frames * signal.get_window("hann", window).astype(np.float32), axis=1)
    logs = np.log(np.square(np.abs(spectrum)) + np.float32(FLOOR))
    logs -= logs.mean(axis=0, dtype=np.float64).astype(np.float32)
    return logs / np.maximum(logs.std(axis=0), np.float32(1e-3))


def change_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """Play `samples` `speed` times as fast: 1 / speed as long, pitch and formants moved with it (Ko et al. 2015)."""
    ratio = Fraction(speed).limit_denominator(100)
    return signal.resample_poly(samples, ratio.denominator, ratio.numerator).astype(np.float32)


def load_features(corpus_name: str, cache: Path | None = None, *, speeds=(1.0,), **options) -> SpeechFeatures:
    """Features of `load_corpus(corpus_name, cache, **options)`, from `cache`/features when they were computed before.

    `speeds`: the training split in each of these speeds, "@0.9" after the name of those that are not 1; validation and test are
    left as they are. A damaged file in the cache is named in a warning, set aside as `.damaged` and computed again.
    """
    speeds = tuple(float(speed) for speed in speeds)
    if not speeds or not all(0.5 <= speed <= 2 for speed in speeds):
        raise ReproError(f"speeds {speeds} must be at least one number between 0.5 and 2, for instance (0.9, 1.0, 1.1)")
    cache = cache_folder(cache)
    identity = {"features": CODE_VERSION, "speeds": speeds, **corpus_identity(corpus_name, cache, **options)}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = cache / "features" / f"{corpus_name}-{key[:16]}.npz"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # of several processes one computes, the others wait and read
            if path.exists():
                try:
                    return _read(path, corpus_name)
                except DAMAGED as error:
                    aside = path.with_suffix(".npz.damaged")
                    path.replace(aside)
                    told = f"{path} is damaged ({error}); set aside as {aside.name} and computed again"
                    warnings.warn(told, stacklevel=2)
            features = _compute(load_corpus(corpus_name, cache, **options), speeds)
            _write(path, features)
            return features
    except OSError as error:
        raise ReproError(f"cannot keep features in {path.parent}: {error}; free space or choose another folder") from error


def _compute(corpus: SpeechCorpus, speeds: tuple[float, ...]) -> SpeechFeatures:
    splits = {}
    for split, utterances in corpus.splits.items():
        splits[split] = [
            FeatureUtterance(
                utterance.name if speed == 1 else f"{utterance.name}@{speed:g}",
                utterance.speaker,
                utterance.text,
                log_spectrogram(change_speed(utterance.samples, speed), corpus.rate).astype(np.float16),
            )
            for speed in (speeds if split == "train" else (1.0,))
            for utterance in utterances
        ]
    return SpeechFeatures(corpus.name, splits["train"][0].features.shape[1], splits)


def _write(path: Path, features: SpeechFeatures) -> None:
    arrays = {}
    for split, utterances in features.splits.items():
        arrays[f"{split}.table"] = np.array([[u.name, u.speaker, u.text] for u in utterances])
        arrays[f"{split}.frames"] = np.array([len(u.features) for u in utterances])
        arrays[f"{split}.features"] = np.concatenate([u.features for u in utterances])
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getbuffer())


def _read(path: Path, name: str) -> SpeechFeatures:
    """Raises one of the errors above when the archive's checksums or the arrays' shapes are wrong."""
    splits = {}
    with np.load(path, allow_pickle=False) as arrays:
        for split in SPLITS:
            table, frames = arrays[f"{split}.table"], arrays[f"{split}.frames"]
            features = arrays[f"{split}.features"]
            if frames.sum() != len(features) or len(frames) != len(table):
                raise ValueError(f"{frames.sum()} frames listed, {len(features)} found")
            parts = np.split(features, np.cumsum(frames)[:-1])
            splits[split] = [FeatureUtterance(*map(str, row), part) for row, part in zip(table, parts, strict=True)]
    return SpeechFeatures(name, features.shape[1], splits)
