"""The made speech corpus: the same for the same seed, and made the way its page says."""

import hashlib

import numpy as np
import pytest
from scipy import signal

from repro.datasets import madespeech
from repro.datasets.madespeech import HOP, LEXICON, PHONES, RATE
from repro.datasets.speech import ALPHABET, corpus_identity, load_corpus
from repro.errors import ReproError


@pytest.fixture(scope="module")
def smoke():
    return load_corpus("made", size="smoke")


def pcm(samples):
    return np.round(samples * 32768).astype("<i2")


def test_waveforms_are_pinned(smoke):
    """Samples are whole 16-bit steps, so that machines agree. A change here must raise `madespeech.VERSION`."""
    utterances = [u for split in smoke.splits.values() for u in split]
    assert all(np.array_equal(pcm(u.samples) / 32768, u.samples) for u in utterances)
    digest = hashlib.sha256(b"".join(u.text.encode() + pcm(u.samples).tobytes() for u in utterances)).hexdigest()
    assert (madespeech.VERSION, digest[:16]) == (1, "03909b31d8a1f47c")


def test_the_seed_decides_everything(smoke):
    """The same seed gives the same corpus; another seed other words, speakers and noise."""
    again, other = load_corpus("made", size="smoke"), load_corpus("made", size="smoke", seed=1)
    for split, utterances in smoke.splits.items():
        assert all(np.array_equal(a.samples, b.samples) for a, b in zip(utterances, again.splits[split], strict=True))
        assert [u.text for u in utterances] != [u.text for u in other.splits[split]]
    assert corpus_identity("made", seed=1) != corpus_identity("made") != corpus_identity("made", size="smoke")


def test_utterances_do_not_depend_on_each_other(smoke):
    """Utterance 3 alone, from its own generator, is utterance 3 of the corpus."""
    speaker = madespeech.make_speaker("x", np.random.default_rng([0, 0, 0, 3]))
    rng = np.random.default_rng([0, 0, 1, 3])
    words = [str(word) for word in rng.choice(list(LEXICON), size=rng.integers(2, 6))]
    assert " ".join(words) == smoke.splits["train"][3].text
    np.testing.assert_array_equal(madespeech.speak(words, speaker, rng), smoke.splits["train"][3].samples)


def test_splits_have_their_sizes_and_their_own_speakers(smoke):
    assert [len(smoke.splits[split]) for split in ("train", "validation", "test")] == [40, 10, 10]
    speakers = [{u.speaker for u in utterances} for utterances in smoke.splits.values()]
    assert [len(names) for names in speakers] == [8, 4, 4] and len(set.union(*speakers)) == 16


def test_utterances_are_short_strings_of_lexicon_words(smoke):
    """Two to five words, audible, not clipped, and longer than the characters that CTC must fit in at 20 ms a step."""
    for utterances in smoke.splits.values():
        for u in utterances:
            words = u.text.split(" ")
            assert 2 <= len(words) <= 5 and set(words) <= set(LEXICON)
            assert u.samples.dtype == np.float32 and 0.19 < np.abs(u.samples).max() < 0.81
            repeats = sum(a == b for a, b in zip(u.text, u.text[1:], strict=False))
            assert len(u.samples) / RATE / 0.02 > len(u.text) + repeats


def test_lexicon_is_spoken_in_known_phones_and_written_in_the_alphabet():
    assert {phone for phones in LEXICON.values() for phone in phones} == set(PHONES)
    assert set("".join(LEXICON)) <= set(ALPHABET)
    assert len({tuple(phones) for phones in LEXICON.values()}) == len(LEXICON)


def test_filter_is_a_cascade_of_resonators():
    """With steady formants the frame-wise filter equals Klatt's recursion y = A x + B y[-1] + C y[-2], three times."""
    rng = np.random.default_rng(0)
    frames, formants = 60, np.array([500.0, 1500.0, 2500.0])
    noise = rng.standard_normal((frames + 1) * HOP)
    controls = np.tile([0.0, 1.0, 0.0, 2000.0, 1000.0], (frames, 1))
    ours = madespeech._filter(np.zeros_like(noise), noise, np.tile(formants, (frames, 1)), controls)
    theirs = noise
    for frequency, bandwidth in zip(formants, madespeech.BANDWIDTHS, strict=True):
        c = -np.exp(-2 * np.pi * bandwidth / RATE)
        b = 2 * np.exp(-np.pi * bandwidth / RATE) * np.cos(2 * np.pi * frequency / RATE)
        theirs = signal.lfilter([1 - b - c], [1, -b, -c], theirs)
    inner = slice(10 * HOP, (frames - 1) * HOP)
    # The FFT cuts the first resonator's response after 176 samples, at exp(-pi 80 Hz 176 / 8000 Hz) = 0.4 %.
    assert np.abs(ours[inner] - theirs[inner]).max() < 0.02 * np.abs(theirs[inner]).max()


def test_pulses_have_the_speakers_pitch():
    """The strongest line of the source's spectrum lies at the pitch, within its melody and jitter."""
    for seed in range(4):
        speaker = madespeech.make_speaker("x", np.random.default_rng(seed))
        pulses, _ = madespeech._sources(200, speaker, np.random.default_rng(seed))
        power = np.square(np.abs(np.fft.rfft(pulses)))
        frequency = np.fft.rfftfreq(len(pulses), 1 / RATE)
        band = (frequency > 0.5 * speaker.pitch) & (frequency < 1.5 * speaker.pitch)
        assert abs(np.log(frequency[band][power[band].argmax()] / speaker.pitch)) < 0.25


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": "huge"}, "unknown size of the made speech corpus 'huge': choose one of smoke, laptop"),
        ({"seed": -1}, "the seed of the made speech corpus is -1"),
        ({"speakers": 3}, "unknown option 'speakers' of the speech corpus 'made': it takes size, seed"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ReproError, match=message):
        load_corpus("made", **options)


def test_unknown_corpus_lists_the_known():
    with pytest.raises(ReproError, match="unknown speech corpus 'timit': choose one of an4, made"):
        load_corpus("timit")
