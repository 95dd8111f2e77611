"""A made speech corpus: short strings of digits, letters and commands, spoken by a source-filter synthesiser in numpy.

It needs no file and no network and is the same for the same seed. The synthesiser follows Klatt, "Software for a
cascade/parallel formant synthesizer", JASA 67 (1980): a glottal pulse train (pulse shape: Klatt and Klatt, JASA 87, 1990)
and noise go through a cascade of resonators whose frequencies move from phone to phone, hiss and bursts through one
resonator of their own. Vowel formants are close to the means of men in Peterson and Barney, JASA 24 (1952). It is hard to
recognise on purpose: half of the words are letters that differ in one short consonant, and speakers differ in pitch,
length of the vocal tract, accent, speed, breathiness, channel and background noise.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import signal

from repro.datasets.utterances import SPLITS, SpeechCorpus, Utterance
from repro.errors import ReproError, one_of

OPTIONS = ("size", "seed")
RATE = 8_000
VERSION = 1  # raise it when a sample of the corpus changes

# Utterances and speakers of (train, validation, test).
SIZES = {
    "smoke": ((40, 10, 10), (8, 4, 4)),
    "laptop": ((600, 100, 200), (24, 6, 12)),  # a large test set, for it decides what differences can be seen
}

HOP = 40  # samples between control frames: 5 ms
FFT = 256  # a window of 2 HOP, and 176 samples for the resonators to die away
BANDWIDTHS = (80.0, 100.0, 200.0)  # Hz, of formants 1 to 3; the fourth is too near to half the sampling rate


class Phone(NamedTuple):
    """Targets of one sound; frequencies in Hz, times in seconds, strengths relative to a vowel's source.

    `start` and `end`: formants 1-3 (no `end`: they stay). `closure`: time before it with the mouth shut, voiced by `murmur`.
    """

    seconds: float
    start: tuple[float, float, float]
    end: tuple[float, float, float] | None = None
    voice: float = 0.0
    breath: float = 0.0
    hiss: float = 0.0
    centre: float = 2000.0
    width: float = 1000.0
    closure: float = 0.0
    murmur: float = 0.0


PHONES = {
    "IY": Phone(0.13, (270, 2290, 3010), voice=1),
    "IH": Phone(0.08, (390, 1990, 2550), voice=1),
    "EH": Phone(0.10, (530, 1840, 2480), voice=1),
    "AA": Phone(0.12, (730, 1090, 2440), voice=1),
    "AO": Phone(0.12, (570, 840, 2410), voice=1),
    "UW": Phone(0.14, (300, 870, 2240), voice=1),
    "AH": Phone(0.08, (640, 1190, 2390), voice=1),
    "EY": Phone(0.15, (500, 1900, 2500), (330, 2200, 2850), voice=1),
    "AY": Phone(0.17, (720, 1150, 2440), (380, 1990, 2550), voice=1),
    "OW": Phone(0.16, (550, 900, 2400), (350, 800, 2250), voice=1),
    "R": Phone(0.07, (310, 1060, 1380), voice=0.7),
    "L": Phone(0.07, (360, 1050, 2800), voice=0.7),
    "W": Phone(0.07, (290, 610, 2150), voice=0.7),
    "Y": Phone(0.06, (260, 2070, 3020), voice=0.7),
    "M": Phone(0.08, (270, 950, 2150), voice=0.35),
    "N": Phone(0.08, (270, 1600, 2600), voice=0.35),
    "F": Phone(0.10, (340, 1100, 2080), hiss=0.15, centre=2600, width=3000),
    "TH": Phone(0.09, (320, 1290, 2540), hiss=0.15, centre=3400, width=1500),
    "S": Phone(0.11, (320, 1390, 2530), hiss=0.80, centre=3700, width=500),
    "V": Phone(0.06, (300, 1100, 2080), voice=0.35, hiss=0.08, centre=2600, width=3000),
    "Z": Phone(0.08, (300, 1390, 2530), voice=0.30, hiss=0.45, centre=3700, width=500),
    "P": Phone(0.03, (350, 900, 2100), breath=0.15, hiss=0.4, centre=700, width=700, closure=0.06),
    "T": Phone(0.03, (350, 1700, 2650), breath=0.10, hiss=0.8, centre=3400, width=1200, closure=0.05),
    "K": Phone(0.04, (350, 1950, 2500), breath=0.12, hiss=0.7, centre=1900, width=600, closure=0.06),
    "B": Phone(0.015, (250, 850, 2100), voice=0.3, hiss=0.3, centre=700, width=700, closure=0.05, murmur=0.12),
    "D": Phone(0.015, (250, 1700, 2650), voice=0.3, hiss=0.5, centre=3300, width=1200, closure=0.04, murmur=0.12),
    "G": Phone(0.020, (250, 1900, 2400), voice=0.3, hiss=0.5, centre=1700, width=600, closure=0.05, murmur=0.12),
    "JH": Phone(0.05, (270, 1800, 2600), voice=0.2, hiss=0.6, centre=2700, width=700, closure=0.04, murmur=0.12),
}

LEXICON = {
    word: pronunciation.split()
    for word, pronunciation in {
        **{"ZERO": "Z IH R OW", "ONE": "W AH N", "TWO": "T UW", "THREE": "TH R IY", "FOUR": "F AO R", "FIVE": "F AY V"},
        **{"SIX": "S IH K S", "SEVEN": "S EH V AH N", "EIGHT": "EY T", "NINE": "N AY N"},
        **{"B": "B IY", "C": "S IY", "D": "D IY", "E": "IY", "G": "JH IY", "P": "P IY", "T": "T IY", "V": "V IY", "Z": "Z IY"},
        **{"A": "EY", "J": "JH EY", "K": "K EY", "F": "EH F", "L": "EH L", "M": "EH M", "N": "EH N", "S": "EH S"},
        **{"YES": "Y EH S", "NO": "N OW", "GO": "G OW", "STOP": "S T AA P", "LEFT": "L EH F T", "RIGHT": "R AY T"},
        **{"UP": "AH P", "ON": "AA N", "OFF": "AO F"},
    }.items()
}


@dataclass(frozen=True)
class Speaker:
    """`tract`: factor on all formants; `accent`: factor on each phone's formants; `slowness`: factor on durations;
    `tilt`: coefficient of the channel's first-order filter; `snr` in dB."""

    name: str
    pitch: float
    tract: float
    accent: dict[str, np.ndarray]
    slowness: float
    breath: float
    tilt: float
    snr: float


def identity(cache: Path | None = None, size: str = "laptop", seed: int = 0) -> dict:
    """What decides every sample. `cache` is not used: this corpus has no files."""
    _check(size, seed)
    return {"corpus": "made", "version": VERSION, "size": size, "seed": seed}


def load(cache: Path | None = None, size: str = "laptop", seed: int = 0) -> SpeechCorpus:
    """All three splits of the corpus of this `size`; every utterance has its own generator, so that order plays no part."""
    _check(size, seed)
    splits = {}
    for index, (split, utterances, speakers) in enumerate(zip(SPLITS, *SIZES[size], strict=True)):
        voices = [make_speaker(f"{split}{i:02d}", np.random.default_rng([seed, index, 0, i])) for i in range(speakers)]
        splits[split] = []
        for i in range(utterances):
            rng, voice = np.random.default_rng([seed, index, 1, i]), voices[i % speakers]
            words = [str(word) for word in rng.choice(list(LEXICON), size=rng.integers(2, 6))]
            splits[split].append(Utterance(f"{split}-{i:04d}", voice.name, " ".join(words), speak(words, voice, rng)))
    return SpeechCorpus("made", RATE, splits)


def _check(size, seed):
    one_of("size of the made speech corpus", size, SIZES)
    if not isinstance(seed, int) or seed < 0:
        raise ReproError(f"the seed of the made speech corpus is {seed!r}: a whole number from 0 up would be right")


def make_speaker(name: str, rng: np.random.Generator) -> Speaker:
    """A high or a low voice, each equally likely; high voices come with shorter vocal tracts."""
    pitch, tract = (205.0, 1.15) if rng.random() < 0.5 else (115.0, 1.0)
    return Speaker(
        name=name,
        pitch=pitch * np.exp(0.12 * rng.standard_normal()),
        tract=tract * np.exp(0.04 * rng.standard_normal()),
        accent={phone: np.exp(0.04 * rng.standard_normal(3)) for phone in PHONES},
        slowness=np.exp(0.12 * rng.standard_normal()),
        breath=rng.uniform(0.02, 0.15),
        tilt=rng.uniform(-0.7, 0.3),
        snr=rng.uniform(8.0, 18.0),
    )


def speak(words: list[str], speaker: Speaker, rng: np.random.Generator) -> np.ndarray:
    """float32 samples, exact multiples of 1/32768 as in a 16-bit recording, so that rounding noise of the machine is gone."""
    formants, controls = _tracks(words, speaker, rng)
    speech = _filter(*_sources(len(formants), speaker, rng), formants, controls)
    speech = signal.lfilter([1.0, -speaker.tilt], [1.0], speech)
    snr = np.clip(speaker.snr + 3.0 * rng.standard_normal(), 5.0, 20.0)
    noise = signal.lfilter([1.0], [1.0, -rng.uniform(0.0, 0.9)], rng.standard_normal(len(speech)))
    noise *= speech.std() / noise.std() * 10.0 ** (-snr / 20.0)
    speech += noise
    peak = rng.uniform(0.2, 0.8) / np.abs(speech).max()
    return (np.round(speech * peak * 32768.0) / 32768.0).astype(np.float32)


def _tracks(words, speaker, rng):
    """One frame each HOP: formants (frames, 3) in Hz; voice, breath, hiss, the hiss' centre and width, (frames, 5)."""

    def piece(seconds, voice=0.0, breath=0.0, hiss=0.0, centre=2000.0, width=1000.0):
        nonlocal now
        pieces.append((seconds, voice, breath, hiss, centre, width))
        now += seconds

    pieces, times, targets, now = [], [], [], 0.0
    piece(rng.uniform(0.05, 0.12))
    for word in words:
        for name in LEXICON[word]:
            phone = PHONES[name]
            if phone.closure:
                piece(phone.closure * speaker.slowness, phone.murmur, 0.0, 0.0, phone.centre, phone.width)
            seconds = phone.seconds * speaker.slowness * np.exp(0.12 * rng.standard_normal())
            breath = phone.breath + speaker.breath * phone.voice
            hiss = phone.hiss * np.exp(0.2 * rng.standard_normal())
            factor = speaker.tract * speaker.accent[name] * np.exp(0.02 * rng.standard_normal(3))
            # Targets are held over the middle of the phone.
            times += [now + 0.3 * seconds, now + 0.7 * seconds]
            targets += [np.array(phone.start) * factor, np.array(phone.end or phone.start) * factor]
            piece(seconds, phone.voice, breath, hiss, phone.centre * speaker.tract**0.5, phone.width)
        piece(max(0.0, rng.uniform(-0.05, 0.12)))  # about one word in three runs into the next
    piece(rng.uniform(0.05, 0.12))
    pieces = np.array(pieces)
    ends = np.cumsum(pieces[:, 0])
    clock = np.arange(0.0, ends[-1], HOP / RATE)
    controls = pieces[np.searchsorted(ends, clock, side="right"), 1:]
    # Lips and glottis need some 10 ms to open.
    controls[:, :3] = signal.convolve(np.pad(controls[:, :3], ((1, 1), (0, 0)), "edge"), [[0.25], [0.5], [0.25]], "valid")
    # Straight lines between the targets of neighbouring phones: every sound leans towards those beside it.
    formants = np.stack([np.interp(clock, times, column) for column in np.array(targets).T], axis=1)
    return np.minimum(formants, 3500.0), controls


def _sources(frames, speaker, rng):
    """Glottal pulses and white noise, (frames + 1) * HOP samples each, of about unit size."""
    length = (frames + 1) * HOP
    knots = np.linspace(0.0, length, 2 + frames // 40)  # a melody with a knot each 0.2 s, falling towards the end
    melody = np.interp(np.arange(length), knots, 0.08 * rng.standard_normal(len(knots))) + np.linspace(0.1, -0.1, length)
    jitter = np.repeat(0.02 * rng.standard_normal(frames + 1), HOP)
    phase = np.cumsum(speaker.pitch * np.exp(melody + jitter) / RATE) % 1.0
    opening = phase / 0.6  # the glottis is open for 0.6 of each period
    pulses = np.where(opening < 1.0, 2.0 * opening - 3.0 * opening**2, 0.0)
    return 2.0 * pulses, rng.standard_normal(length)


_Z = np.exp(-2j * np.pi * np.arange(FFT // 2 + 1) / FFT)


def _resonator(frequency, bandwidth):
    """Denominator 1 - B z^-1 - C z^-2 of Klatt's resonator (1980) on the FFT's grid, and its value at z = 1; (frames, .)."""
    radius = np.exp(-np.pi * bandwidth / RATE)[:, None]
    b = 2.0 * radius * np.cos(2.0 * np.pi * frequency / RATE)[:, None]
    return 1.0 - b * _Z + radius**2 * _Z**2, 1.0 - b + radius**2


def _filter(pulses, noise, formants, controls):
    """Frame by frame in the frequency domain; Hann windows that overlap by half add up to one."""
    window = signal.get_window("hann", 2 * HOP)
    frames = len(formants)
    spectra = [
        np.fft.rfft(np.lib.stride_tricks.sliding_window_view(source, 2 * HOP)[::HOP][:frames] * window, FFT, axis=1)
        for source in (pulses, noise)
    ]
    voice, breath, hiss = controls[:, :3].T[:, :, None]
    tract = 1.0
    for frequency, bandwidth in zip(formants.T, BANDWIDTHS, strict=True):
        denominator, gain = _resonator(frequency, np.full(frames, bandwidth))
        tract = tract * gain / denominator
    denominator, _ = _resonator(controls[:, 3], controls[:, 4])
    fricative = np.abs(denominator).min(axis=1, keepdims=True) / denominator  # gain 1 at its peak
    spectrum = tract * (voice * spectra[0] + breath * spectra[1]) + hiss * fricative * spectra[1]
    tails = -(-FFT // HOP)
    parts = np.pad(np.fft.irfft(spectrum, FFT, axis=1), ((0, 0), (0, tails * HOP - FFT))).reshape(frames, tails, HOP)
    out = np.zeros((frames + tails, HOP))
    for k in range(tails):
        out[k : k + frames] += parts[:, k]
    return out.ravel()
