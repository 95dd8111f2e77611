"""Images as feature vectors with their captions, and padded batches of them.

MS-COCO's captions come as its annotation files (Chen et al. 2015, arXiv 1504.00325); the features are the user's own, of any
network, in an .npz file. `repro.datasets.madecaptions` makes images that need neither.
"""

import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repro.datasets.madecaptions import Image
from repro.datasets.pairs import pad
from repro.datasets.vocabulary import START, STOP, Vocabulary, sentence_vocabulary
from repro.errors import ReproError
from repro.files import DAMAGED


@dataclass(frozen=True)
class CaptionBatch:
    """`features`: float32 (B, d); `captions`: int64 (T, B) from `<s>` to `</s>`, padded with index 0."""

    features: Tensor
    captions: Tensor


def read_coco(annotations: Path, features: Path) -> list[Image]:
    """The images of an annotation file `captions_*.json` that have captions, by image id.

    `features`: an .npz file with `ids`, integers (n,), and `features`, floats (n, d), of at least these images. Captions
    become words of lower-case letters of any script with their marks, digits and apostrophes. Raises ReproError for a file that
    cannot be read or lacks a field, and naming the image id for a caption without features or without words, and for features
    that are not finite.
    """
    vectors = _read_features(features)
    captions = defaultdict(list)
    for row in _read_annotations(annotations):
        words = _words(row["caption"])
        if not words:
            raise ReproError(f"{annotations}: a caption of image {row['image_id']} has no words: {row['caption']!r}")
        captions[row["image_id"]].append(" ".join(words))
    for image in captions:
        if image not in vectors:
            raise ReproError(f"image {image} has captions in {annotations} but no features in {features}: add its row")
        if not np.isfinite(vectors[image]).all():
            raise ReproError(f"{features}: the features of image {image} are not finite")
    return [Image(str(image), vectors[image], tuple(captions[image])) for image in sorted(captions)]


def _words(caption: str) -> list[str]:
    text = unicodedata.normalize("NFC", caption.lower()).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    kept = (c if c.isalnum() or c == "'" or unicodedata.category(c).startswith("M") else " " for c in text)
    return [word for word in "".join(kept).split() if any(map(str.isalnum, word))]


def _read_annotations(path: Path) -> list[dict]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        if not all({"image_id", "caption"} <= row.keys() for row in rows):
            raise ReproError(f"{path}: every annotation needs image_id and caption; is it a captions_*.json of MS-COCO?")
        for row in rows:
            if not (type(row["image_id"]) is int and isinstance(row["caption"], str)):
                raise ReproError(f"{path}: {row} has no integer as image_id, or no text as caption")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReproError(f"cannot read {path} ({error!r}): a captions_*.json of MS-COCO would be right") from error
    if not rows:
        raise ReproError(f"{path} holds no captions")
    return rows


def _read_features(path: Path) -> dict[int, np.ndarray]:
    try:
        with np.load(path) as arrays:
            ids, features = arrays["ids"], arrays["features"]
    except DAMAGED as error:
        raise ReproError(f"cannot read {path} ({error}): an .npz file with `ids` and `features` would be right") from error
    if (
        ids.dtype.kind not in "iu"
        or features.dtype.kind not in "fiu"
        or ids.ndim != 1
        or features.ndim != 2
        or 0 in features.shape
        or len(ids) != len(features)
        or len(set(ids.tolist())) != len(ids)
    ):
        shapes = f"ids {ids.dtype} {ids.shape} and features {features.shape}"
        raise ReproError(f"{path} has {shapes}: integers (n,), none twice, and (n, d) would be right, n and d at least 1")
    return dict(zip(ids.tolist(), features.astype(np.float32), strict=True))


def caption_vocabulary(images: Sequence[Image], least: int = 1) -> Vocabulary:
    """Of the words that occur at least `least` times in the captions, behind the marks."""
    return sentence_vocabulary((caption.split() for image in images for caption in image.captions), least)


def caption_batches(
    images: Sequence[Image], vocabulary: Vocabulary, size: int, rng: np.random.Generator | None = None
) -> Iterator[CaptionBatch]:
    """One pass over all captions in batches of `size` (the last may be smaller); in random order with `rng`."""
    if size < 1:
        raise ReproError(f"the size of the batches is {size}: it must be at least 1")
    rows = [(image, caption) for image in images for caption in image.captions]
    order = np.arange(len(rows)) if rng is None else rng.permutation(len(rows))
    for start in range(0, len(rows), size):
        chunk = [rows[index] for index in order[start : start + size]]
        captions = pad([vocabulary.encode((START, *caption.split(), STOP)) for _, caption in chunk])
        yield CaptionBatch(torch.from_numpy(np.stack([image.features for image, _ in chunk])), captions)
