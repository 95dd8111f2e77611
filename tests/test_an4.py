"""AN4: byte order, transcripts, splits."""

import os
from pathlib import Path

import numpy as np
import pytest

from repro.datasets import an4, registry
from repro.datasets.speech import ALPHABET, load_corpus
from repro.errors import ReproError

TONE = np.round(12000 * np.sin(2 * np.pi * 300 * np.arange(4000) / an4.RATE)).astype(int)


def roughness(samples):
    """Mean step between neighbours over mean size: small for speech, above 1 for noise."""
    return np.abs(np.diff(samples)).mean() / np.abs(samples).mean()


def sphere(samples, order, **fields):
    lines = {"sample_rate": "-i 16000", "sample_n_bytes": "-i 2", "channel_count": "-i 1", "sample_coding": "-s3 pcm"}
    lines |= {"sample_byte_format": f"-s2 {'10' if order == '>i2' else '01'}"} | fields
    header = "NIST_1A\n   1024\n" + "".join(f"{name} {value}\n" for name, value in lines.items()) + "end_head\n"
    return header.encode().ljust(1024) + samples.astype(order).tobytes()


def test_raw_audio_is_read_big_endian(tmp_path):
    """A tone stored big-endian comes back exactly, as floats; the other byte order would be noise."""
    (tmp_path / "a.raw").write_bytes(TONE.astype(">i2").tobytes())
    samples = an4.read_audio(tmp_path / "a")
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, TONE / 32768)
    assert roughness(samples) < 0.2 < 1 < roughness(TONE.astype(">i2").view("<i2").astype(float))


@pytest.mark.parametrize("order", [">i2", "<i2"])
def test_sphere_tells_its_own_byte_order(tmp_path, order):
    (tmp_path / "a.sph").write_bytes(sphere(TONE, order))
    np.testing.assert_array_equal(an4.read_audio(tmp_path / "a"), TONE / 32768)


@pytest.mark.parametrize(
    "data, message",
    [
        (sphere(TONE, "<i2", sample_coding="-s25 pcm,embedded-shorten-v2.00"), "sample_coding is 'pcm,embedded-shorten"),
        (sphere(TONE, "<i2", sample_rate="-i 8000"), "sample_rate is '8000'"),
        (sphere(TONE, "<i2", sample_byte_format="-s1 1"), "sample_byte_format is '1'"),
        (sphere(TONE, "<i2")[:-1], "7999 bytes"),
        (b"RIFF", "not a NIST SPHERE file"),
    ],
)
def test_sphere_that_cannot_be_read_says_why(tmp_path, data, message):
    (tmp_path / "a.sph").write_bytes(data)
    with pytest.raises(ReproError, match=message):
        an4.read_audio(tmp_path / "a")


def test_transcripts_with_and_without_marks():
    assert an4.parse_transcript("<s> ENTER  FOUR </s> (an1-fash-b)\n") == ("an1-fash-b", "ENTER FOUR")
    assert an4.parse_transcript("RUBOUT G M E F THREE NINE (an406-fcaw-b)") == ("an406-fcaw-b", "RUBOUT G M E F THREE NINE")
    with pytest.raises(ReproError, match="not an AN4 transcript"):
        an4.parse_transcript("enter four (an1-fash-b)")


@pytest.fixture
def made_tree(tmp_path, monkeypatch):
    """A tree like AN4's with 20 training speakers of two utterances and one test speaker."""
    lists = {"train": [(f"an4_clstk/m{i:02d}", f"an{i}{j}") for i in range(20) for j in range(2)]}
    lists["test"] = [("an4test_clstk/zz", "an99")]
    (tmp_path / "etc").mkdir()
    for split, rows in lists.items():
        (tmp_path / f"etc/an4_{split}.fileids").write_text("".join(f"{folder}/{name}\n" for folder, name in rows))
        (tmp_path / f"etc/an4_{split}.transcription").write_text("".join(f"<s> GO </s> ({name})\n" for _, name in rows))
        for folder, name in rows:
            (tmp_path / "wav" / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / "wav" / folder / f"{name}.raw").write_bytes(TONE.astype(">i2").tobytes())
    monkeypatch.setattr(registry, "locate", lambda *arguments: tmp_path)
    return tmp_path


def test_validation_is_every_ninth_speaker(made_tree):
    splits = load_corpus("an4").splits
    assert {u.speaker for u in splits["validation"]} == {"m04", "m13"}
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [36, 4, 1]


def test_lists_that_disagree_are_refused(made_tree):
    """A transcript moved by a line would train on wrong words; it must not pass."""
    path = made_tree / "etc/an4_train.transcription"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(ReproError, match="'an01' stands where 'an00' belongs"):
        load_corpus("an4")
    path.write_text("".join(lines[1:]))
    with pytest.raises(ReproError, match="40 files but 39 transcripts"):
        load_corpus("an4")


def test_missing_recording_is_named(made_tree):
    (made_tree / "wav/an4test_clstk/zz/an99.raw").unlink()
    with pytest.raises(ReproError, match=r"zz/an99\.raw is missing"):
        load_corpus("an4")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    mirror = os.environ.get(registry.MIRROR)
    if not mirror or not (Path(mirror) / "an4").is_dir():
        pytest.skip(f"{registry.MIRROR} names no folder with an4/")
    return load_corpus("an4", tmp_path_factory.mktemp("cache"))


def test_real_splits(real):
    """Known sizes, no speaker twice, and only characters that the model can write."""
    assert {split: len(utterances) for split, utterances in real.splits.items()} == {
        "train": 848,
        "validation": 100,
        "test": 130,
    }
    speakers = [{u.speaker for u in utterances} for utterances in real.splits.values()]
    assert [len(names) for names in speakers] == [66, 8, 10]
    assert len(set.union(*speakers)) == 84
    assert sum(len(u.text) for u in real.splits["test"]) == 2565
    assert set("".join(u.text for split in real.splits.values() for u in split)) <= set(ALPHABET)


def test_real_audio_is_speech_in_this_byte_order(real):
    """Every recording is smoother as read than with its bytes swapped, and typically by far: 0.33 against 1.10."""
    utterances = [u for split in real.splits.values() for u in split]
    as_read = np.array([roughness(u.samples) for u in utterances])
    swapped = [np.round(u.samples * 32768).astype("<i2").byteswap().astype(float) for u in utterances]
    other = np.array([roughness(samples) for samples in swapped])
    assert (as_read < other).all()
    assert np.median(as_read) < 0.5 < 1 < np.median(other)
