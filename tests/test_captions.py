"""Captions: made images can be read back from their features; files in MS-COCO's format, and what is wrong with bad ones."""

import hashlib
import json
import re

import numpy as np
import pytest

from repro.datasets import madecaptions
from repro.datasets.captions import caption_batches, caption_vocabulary, read_coco
from repro.datasets.madecaptions import CODES, COLOURS, COUNTS, INVERSE, NOISE, PLURALS, SHAPES
from repro.errors import ReproError


@pytest.fixture(scope="module")
def smoke():
    return madecaptions.load("smoke")


def test_images_are_pinned(smoke):
    """Features are multiples of 2^-10, for machines to agree. A change here must raise the `code_version` of `CaptionTrial`."""
    images = [image for split in smoke.values() for image in split]
    assert all(np.array_equal(image.features * 1024, np.round(image.features * 1024)) for image in images)
    digest = hashlib.sha256(b"".join(" / ".join(i.captions).encode() + i.features.astype("<f4").tobytes() for i in images))
    assert digest.hexdigest()[:16] == "9f22f96f5a45d214"


def test_no_scene_is_in_two_images_and_no_noise_is_a_code(smoke):
    """The most that any caption tells is the scene; two images of one scene would have the same codes up to their noise."""
    images = [image for split in smoke.values() for image in split]
    basis = np.stack(list(CODES.values())).T
    scenes = [frozenset(np.argsort(-np.linalg.lstsq(basis, image.features, rcond=None)[0])[:7].tolist()) for image in images]
    assert len(set(scenes)) == len(images)
    norms = np.linalg.norm(basis, axis=0)
    for image, scene in zip(images, scenes, strict=True):
        noise = image.features - basis[:, sorted(scene)].sum(1)
        assert (abs(basis.T @ noise) / norms / np.linalg.norm(noise)).max() < 0.6


def test_the_seed_decides_everything(smoke):
    again, other = madecaptions.load("smoke"), madecaptions.load("smoke", seed=1)
    for split, images in smoke.items():
        assert len(images) == madecaptions.SIZES["smoke"][split]
        assert all(np.array_equal(a.features, b.features) for a, b in zip(images, again[split], strict=True))
        assert [image.captions for image in images] == [image.captions for image in again[split]]
        assert not np.array_equal(images[0].features, other[split][0].features)


def facts(caption):
    """(group, relation, group) of a caption; a group is (count, colour or None, shape)."""
    number = "|".join(COUNTS)
    match = re.fullmatch(rf"({number}) (?:(\w+) )?(\w+) ({'|'.join(INVERSE)}) ({number}) (?:(\w+) )?(\w+)", caption)
    singular = {PLURALS.get(shape, f"{shape}s"): shape for shape in SHAPES}
    first = (match[1], match[2], match[3] if match[1] == "a" else singular[match[3]])
    second = (match[5], match[6], match[7] if match[5] == "a" else singular[match[7]])
    return first, match[4], second


def agrees(told, seen):
    """A caption may leave out a colour, and nothing else."""
    return told[1] == seen[1] and all(a in (None, b) for a, b in zip(told[0] + told[2], seen[0] + seen[2], strict=True))


def test_features_tell_what_the_captions_say(smoke):
    """Least squares on the codes finds each attribute that a caption names, in either order of groups; the rest is noise."""
    basis, left = np.stack(list(CODES.values())).T, []
    for image in smoke["test"]:
        solution = np.linalg.lstsq(basis, image.features, rcond=None)[0]
        left.append(image.features - basis @ solution)
        weights = dict(zip(CODES, solution, strict=True))
        first, second = (
            tuple(max(kind, key=lambda name: weights[group, name]) for kind in (COUNTS, COLOURS, SHAPES)) for group in (1, 2)
        )
        relation = max(INVERSE, key=lambda name: weights[0, name])
        readings = [(first, relation, second), (second, INVERSE[relation], first)]
        assert all(any(agrees(facts(caption), reading) for reading in readings) for caption in image.captions), image
    assert np.concatenate(left).std() == pytest.approx(NOISE * np.sqrt(1 - len(CODES) / len(basis)), rel=0.1)


def test_one_pass_holds_every_caption_with_its_features(smoke):
    images = smoke["validation"]
    vocabulary = caption_vocabulary(smoke["train"])
    expected = sorted((caption, image.features.tobytes()) for image in images for caption in image.captions)
    for rng in (None, np.random.default_rng(0)):
        found = []
        for batch in caption_batches(images, vocabulary, 32, rng):
            for features, column in zip(batch.features, batch.captions.T.tolist(), strict=True):
                words = vocabulary.decode(column)
                assert words[0] == "<s>" and set(words[words.index("</s>") + 1 :]) <= {"<pad>"}
                found.append((" ".join(words[1 : words.index("</s>")]), features.numpy().tobytes()))
        assert sorted(found) == expected
    with pytest.raises(ReproError, match="the size of the batches is 0"):
        next(caption_batches(images, vocabulary, 0))


ANNOTATIONS = {
    "images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg"}, {"id": 25, "file_name": "x.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 25, "caption": "A naïve giraffe, eating  food."},
        {"id": 2, "image_id": 9, "caption": "Two dogs' bowls"},
        {"id": 3, "image_id": 25, "caption": "A giraffe eats"},
    ],
}
FEATURES = {"ids": np.array([25, 9, 4]), "features": np.arange(6.0).reshape(3, 2)}


@pytest.fixture
def coco(tmp_path):
    """Writes the two files, with what the test changes in them, and reads them."""

    def read(annotations=ANNOTATIONS, **arrays):
        path = tmp_path / "captions_val2014.json"
        path.write_text(annotations if isinstance(annotations, str) else json.dumps(annotations))
        np.savez(tmp_path / "features.npz", **FEATURES | arrays)
        return read_coco(path, tmp_path / "features.npz")

    return read


def test_coco_files_are_joined_by_image_id(coco):
    images = coco()
    assert [(image.name, image.features.tolist(), image.captions) for image in images] == [
        ("9", [2.0, 3.0], ("two dogs' bowls",)),
        ("25", [0.0, 1.0], ("a naïve giraffe eating food", "a giraffe eats")),
    ]
    assert images[0].features.dtype == np.float32


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("Cafe\u0301 nai\u0308ve", "caf\u00e9 na\u00efve"),
        ("\u0939\u093f\u0928\u094d\u0926\u0940 \u0915\u0940", "\u0939\u093f\u0928\u094d\u0926\u0940 \u0915\u0940"),
        ("The man\u2019s 2 dogs' ' bowls_here", "the man's 2 dogs' bowls here"),
    ],
)
def test_a_word_keeps_its_marks_and_apostrophes(coco, caption, words):
    """Marks apart from their letters are joined to them; Hindi has vowels that are marks."""
    (image,) = coco({"annotations": [{"image_id": 25, "caption": caption}]})
    assert image.captions == (words,)


def test_bad_coco_files_are_refused(coco, tmp_path):
    """A caption without its features names the image, and so on for every field."""
    empty, apostrophe = ({"annotations": [{"image_id": 25, "caption": text}]} for text in (" ... ", " ' "))
    for change, message in [
        ({"ids": np.array([25, 8, 4])}, "image 9 has captions in .*json but no features in .*npz: add its row"),
        ({"features": np.array([[1, 2], [np.nan, 0], [0, 0]])}, "the features of image 9 are not finite"),
        ({"ids": np.array([25, 9])}, r"ids int64 \(2,\) and features \(3, 2\)"),
        ({"ids": np.array([25, 9, 9])}, "none twice"),
        ({"ids": np.array(["25", "9", "4"])}, "ids <U2 .*: integers"),
        ({"features": np.zeros((3, 0))}, r"features \(3, 0\): .*n and d at least 1"),
        ({"annotations": {"annotations": [{"image_id": "9", "caption": "Two"}]}}, "'9'.* has no integer as image_id"),
        ({"annotations": {"annotations": [{"image_id": [9], "caption": "Two"}]}}, "has no integer as image_id"),
        ({"annotations": {"annotations": [{"image_id": 9, "caption": None}]}}, "or no text as caption"),
        ({"annotations": {"annotations": [{"image_id": True, "caption": "Two"}]}}, "has no integer as image_id"),
        ({"annotations": empty}, r"a caption of image 25 has no words: ' ... '"),
        ({"annotations": apostrophe}, "a caption of image 25 has no words"),
        ({"annotations": {"annotations": []}}, "holds no captions"),
        ({"annotations": {"annotations": [{"id": 1}]}}, "every annotation needs image_id and caption"),
        ({"annotations": {"images": []}}, "cannot read .*json .*KeyError.*a captions_"),
        ({"annotations": '{"annotations": [{"image_id"'}, "cannot read .*json .*JSONDecodeError"),
    ]:
        with pytest.raises(ReproError, match=message):
            coco(**change)
    for data, message in [(b"", "features"), (b"PK\3\4 cut", "features"), (None, "No such file")]:
        (tmp_path / "features.npz").unlink()
        if data is not None:
            (tmp_path / "features.npz").write_bytes(data)
        with pytest.raises(ReproError, match=rf"cannot read .*features\.npz .*{message}"):
            read_coco(tmp_path / "captions_val2014.json", tmp_path / "features.npz")


@pytest.mark.parametrize("options, message", [({"size": "huge"}, "unknown size of the made captions"), ({"seed": -1}, "is -1")])
def test_wrong_options_are_named(options, message):
    with pytest.raises(ReproError, match=message):
        madecaptions.load(**options)
