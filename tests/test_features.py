"""Spectrograms, their cache, batches, characters and the error rate."""

import numpy as np
import pytest

from repro.datasets import features, speech
from repro.datasets.batches import batches, collate
from repro.datasets.features import FLOOR, change_speed, load_features, log_spectrogram
from repro.datasets.speech import ALPHABET, BLANK, SYMBOLS, character_error_rate, decode, encode
from repro.errors import ReproError


@pytest.mark.parametrize("rate, bins", [(16_000, 161), (8_000, 81)])
def test_shape_is_one_frame_each_10_ms(rate, bins):
    """n samples give 1 + (n - window) // step frames; a recording shorter than a window gives one."""
    samples = np.random.default_rng(0).standard_normal(rate) * 0.1
    for n in (rate, rate - 1, rate // 50, rate // 50 - 1):
        frames = 1 + max(0, n - rate // 50) // (rate // 100)
        result = log_spectrogram(samples[:n], rate)
        assert result.shape == (frames, bins) and result.dtype == np.float32


@pytest.mark.parametrize("rate", [16_000, 8_000])
def test_tone_is_found_at_its_bin_and_time(rate):
    """A 1 kHz tone from 0.3 s to 0.5 s is loudest in bin 20 (50 Hz each), in the frames whose windows lie inside it."""
    time = np.arange(rate) / rate
    samples = 1e-4 * np.random.default_rng(0).standard_normal(rate)
    samples += np.where((time >= 0.3) & (time < 0.5), 0.3 * np.sin(2 * np.pi * 1000 * time), 0)
    result = log_spectrogram(samples, rate)
    loud = result[:, 20] > result[:, 20].min() + 0.5 * np.ptp(result[:, 20])
    assert (result[31:48].argmax(axis=1) == 20).all()
    # Frame t covers 10 t to 10 t + 20 ms: frames 30-48 are inside, 29 and 49 are half inside.
    assert loud[30:49].all() and not loud[:29].any() and not loud[50:].any()


def test_normalised_and_blind_to_loudness_and_channel():
    """Mean 0 in each bin, deviation 1 in all; a gain or a short filter leaves (almost) the same features."""
    rng = np.random.default_rng(1)
    samples = 0.05 * rng.standard_normal(16_000) * (1.5 + np.sin(np.arange(16_000) / 800))
    result = log_spectrogram(samples, 16_000)
    np.testing.assert_allclose(result.mean(axis=0), 0, atol=1e-5)
    assert result.std() == pytest.approx(1, abs=1e-5)
    assert np.abs(log_spectrogram(samples * 3, 16_000) - result).max() < 0.01
    filtered = samples - 0.5 * np.roll(samples, 1)
    assert np.corrcoef(log_spectrogram(filtered, 16_000).ravel(), result.ravel())[0, 1] > 0.98


def test_agrees_with_the_definition():
    """One frame against a discrete Fourier sum written out."""
    rng = np.random.default_rng(2)
    samples = 0.1 * rng.standard_normal(8_000)
    n = np.arange(160)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / 160)
    table = np.exp(-2j * np.pi * np.outer(n, np.arange(81)) / 160)
    logs = np.log(np.stack([np.abs((samples[80 * t : 80 * t + 160] * hann) @ table) ** 2 for t in range(99)]) + FLOOR)
    logs -= logs.mean(axis=0)
    np.testing.assert_allclose(log_spectrogram(samples, 8_000), logs / logs.std(axis=0), atol=2e-3)


def test_digital_silence_is_finite():
    assert np.array_equal(log_spectrogram(np.zeros(8_000), 8_000), np.zeros((99, 81)))


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_speed_changes_duration_and_pitch(speed):
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    faster = change_speed(tone, speed)
    assert len(faster) == pytest.approx(16_000 / speed, abs=1) and faster.dtype == np.float32
    peak = np.abs(np.fft.rfft(faster)).argmax() * 16_000 / len(faster)
    assert peak == pytest.approx(1000 * speed, abs=2)
    assert np.array_equal(change_speed(tone.astype(np.float32), 1.0), tone.astype(np.float32))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that already holds the smoke corpus' features."""
    folder = tmp_path_factory.mktemp("cache")
    load_features("made", folder, size="smoke")
    return folder


def same(one, other):
    return all(
        (a.name, a.speaker, a.text) == (b.name, b.speaker, b.text) and np.array_equal(a.features, b.features)
        for split in one.splits
        for a, b in zip(one.splits[split], other.splits[split], strict=True)
    )


def test_features_come_from_the_cache_unchanged(cache, monkeypatch):
    """The second call gives what a fresh computation gives, without synthesising anything."""
    corpus = speech.load_corpus("made", size="smoke")
    monkeypatch.setattr(features, "load_corpus", None)
    kept = load_features("made", cache, size="smoke")
    assert (kept.name, kept.bins) == ("made", 81)
    for split, utterances in corpus.splits.items():
        for utterance, row in zip(utterances, kept.splits[split], strict=True):
            assert (utterance.name, utterance.speaker, utterance.text) == (row.name, row.speaker, row.text)
            assert row.features.dtype == np.float16
            np.testing.assert_array_equal(row.features, log_spectrogram(utterance.samples, 8_000).astype(np.float16))


def test_seed_size_speeds_and_version_each_have_their_own_file(cache, monkeypatch):
    """Whatever changes a value changes the file's name; nothing is taken from another setting's file."""
    count = len(list((cache / "features").glob("*.npz")))
    load_features("made", cache, size="smoke", seed=5)
    load_features("made", cache, size="smoke", speeds=(0.9, 1.0))
    monkeypatch.setattr(features, "CODE_VERSION", 0)
    load_features("made", cache, size="smoke")
    assert len(list((cache / "features").glob("*.npz"))) == count + 3


def test_speeds_are_for_training_only(cache):
    plain = load_features("made", cache, size="smoke")
    more = load_features("made", cache, size="smoke", speeds=(0.9, 1.0))
    assert len(more.splits["train"]) == 2 * len(plain.splits["train"])
    slow, normal = more.splits["train"][0], more.splits["train"][40]
    assert (slow.name, slow.text) == (f"{normal.name}@0.9", normal.text)
    assert len(slow.features) == pytest.approx(len(normal.features) / 0.9, abs=2)
    for split in ("validation", "test"):
        assert [u.name for u in more.splits[split]] == [u.name for u in plain.splits[split]]


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign"])
def test_damaged_cache_is_named_set_aside_and_computed_again(tmp_path, damage):
    good = load_features("made", tmp_path, size="smoke")
    (path,) = (tmp_path / "features").glob("*.npz")
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    path.write_bytes({"cut": data[: len(data) // 2], "flip": bytes(flipped), "foreign": b"not an archive"}[damage])
    with pytest.warns(UserWarning, match=f"{path.name} is damaged"):
        assert same(load_features("made", tmp_path, size="smoke"), good)
    assert path.read_bytes() == data and path.with_name(f"{path.name}.damaged").read_bytes() != data


def test_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "features").write_text("a file where a folder belongs")
    with pytest.raises(ReproError, match=r"cannot keep features in .*features"):
        load_features("made", tmp_path, size="smoke")


def test_senseless_speeds_are_refused(cache):
    with pytest.raises(ReproError, match=r"speeds \(90.0,\) must be"):
        load_features("made", cache, size="smoke", speeds=(90,))


def test_batches_hold_every_utterance_once_longest_first(cache):
    """Whatever the order, each utterance comes once, its frames unchanged, zeros after them, its transcript beside it."""
    utterances = load_features("made", cache, size="smoke").splits["train"]
    by_text = {u.text: u for u in utterances}
    for rng in (None, np.random.default_rng(0)):
        passed = list(batches(utterances, 16, rng))
        assert sorted(text for batch in passed for text in batch.texts) == sorted(u.text for u in utterances)
        assert sorted(len(batch.texts) for batch in passed) == [8, 16, 16]
        for batch in passed:
            assert batch.lengths.tolist() == sorted(batch.lengths.tolist(), reverse=True)
            targets = batch.targets.split(batch.target_lengths.tolist())
            for row, length, target, text in zip(batch.features, batch.lengths, targets, batch.texts, strict=True):
                np.testing.assert_array_equal(row[:length].numpy(), by_text[text].features.astype(np.float32))
                assert not row[length:].any() and target.tolist() == encode(text)


def test_batch_order_follows_the_generator(cache):
    """Same generator, same batches; another generator, others; none, the same each time."""
    utterances = load_features("made", cache, size="smoke").splits["train"]

    def texts(seed):
        rng = None if seed is None else np.random.default_rng(seed)
        return [batch.texts for batch in batches(utterances, 8, rng)]

    assert texts(0) == texts(0) != texts(1) != texts(None) == texts(None)
    assert collate(utterances[:1]).features.shape[0] == 1


def test_alphabet_round_trip():
    """29 outputs with the blank; every character comes back, doubled letters when a blank stands between them."""
    assert SYMBOLS == 29 and BLANK == 0 and ALPHABET[:3] == " 'A" and ALPHABET[-1] == "Z"
    assert sorted(encode(ALPHABET)) == list(range(1, 29)) and decode(encode(ALPHABET)) == ALPHABET
    a, b = encode("AB")
    assert decode([0, a, a, 0, a, b, b, b, 0, 0]) == "AAB"
    assert decode([0, 0]) == "" == decode([])
    with pytest.raises(ReproError, match="character 'é'"):
        encode("CAFé")


def test_error_rate_in_closed_form():
    """Substitution, insertion, deletion; summed over the set before the one division; may pass 1."""
    assert character_error_rate(["ABCD"], ["ABCD"]) == 0
    assert character_error_rate(["ABCD"], [""]) == 1
    assert character_error_rate(["ABCD"], ["AXCD"]) == character_error_rate(["ABCD"], ["ABCDE"]) == 0.25
    assert character_error_rate(["KITTEN"], ["SITTING"]) == 3 / 6
    assert character_error_rate(["A", "BCDEFGHIJ"], ["X", "BCDEFGHIJ"]) == 0.1  # not the mean of 1 and 0
    assert character_error_rate(["A"], ["ABCD"]) == 3
    with pytest.raises(ReproError, match="1 references but 2 hypotheses"):
        character_error_rate(["A"], ["A", "B"])
    with pytest.raises(ReproError, match="no character"):
        character_error_rate([""], ["A"])
