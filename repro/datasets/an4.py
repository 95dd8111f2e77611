"""CMU AN4 ("census"): 948 training and 130 test utterances of 74 + 10 speakers spelling words, numbers, commands; 16 kHz.

Acero, "Acoustical and Environmental Robustness in Automatic Speech Recognition", Kluwer 1993. Free for any purpose with
its notice.
"""

import re
from pathlib import Path

import numpy as np

from repro.datasets import registry
from repro.datasets.utterances import SpeechCorpus, Utterance
from repro.errors import ReproError

OPTIONS = ()
RATE = 16_000

# Validation: every ninth speaker of the sorted training list, counted from the fifth. Eight speakers (2 women, 6 men; 100
# utterances), none of them one of a pair like mdcs/mdcs2 that may be the same person.
VALIDATION_SPEAKERS = slice(4, None, 9)


def identity(cache: Path | None = None) -> dict:
    """The checksum of the fetched files, and the version of the validation rule."""
    return {"corpus": "an4", "content": registry.content(registry.locate("an4", cache)), "rule": 1}


def load(cache: Path | None = None) -> SpeechCorpus:
    """All three splits. Raises ReproError when AN4 was not fetched or its lists and recordings disagree."""
    root = registry.locate("an4", cache)
    train = _read_list(root, "train")
    held_out = set(sorted({utterance.speaker for utterance in train})[VALIDATION_SPEAKERS])
    return SpeechCorpus(
        name="an4",
        rate=RATE,
        splits={
            "train": [utterance for utterance in train if utterance.speaker not in held_out],
            "validation": [utterance for utterance in train if utterance.speaker in held_out],
            "test": _read_list(root, "test"),
        },
    )


def _read_list(root: Path, split: str) -> list[Utterance]:
    """Line i of the transcription belongs to line i of the fileids, `folder/speaker/name`."""
    try:
        files = (root / "etc" / f"an4_{split}.fileids").read_text().split()
        lines = (root / "etc" / f"an4_{split}.transcription").read_text().splitlines()
    except OSError as error:
        raise ReproError(f"cannot read {error.filename}: {error.strerror}; delete {root} and run `make data`") from error
    if len(files) != len(lines):
        raise ReproError(f"{root}/etc: {len(files)} files but {len(lines)} transcripts of an4_{split}; they must be equal")
    utterances = []
    for file, line in zip(files, lines, strict=True):
        name, text = parse_transcript(line)
        if name != Path(file).name:
            raise ReproError(f"{root}/etc/an4_{split}.transcription: {name!r} stands where {Path(file).name!r} belongs")
        utterances.append(Utterance(name, Path(file).parent.name, text, read_audio(root / "wav" / file)))
    return utterances


def parse_transcript(line: str) -> tuple[str, str]:
    """(utterance id, words) of `<s> WORDS </s> (id)`; test lines come without the `<s>` marks."""
    match = re.fullmatch(r"(?:<s>)?\s*([A-Z' ]*?)\s*(?:</s>)?\s*\((\S+)\)\s*", line)
    if not match:
        raise ReproError(f"not an AN4 transcript: {line!r}; `WORDS (utterance-id)` would be right")
    return match[2], " ".join(match[1].split())


def read_audio(stem: Path) -> np.ndarray:
    """float32 samples in [-1, 1) of `stem`.raw (no header, 16-bit) or `stem`.sph (NIST SPHERE, uncompressed 16-bit).

    The raw files are big-endian although AN4's README says little-endian: read the other way round all of them are noise.
    """
    raw, sphere = Path(f"{stem}.raw"), Path(f"{stem}.sph")
    try:
        if raw.exists():
            return _pcm(raw.read_bytes(), ">i2", raw)
        return read_sphere(sphere)
    except FileNotFoundError as error:
        raise ReproError(f"{raw} is missing: delete the an4 folder above it and run `make data`") from error


def read_sphere(path: Path) -> np.ndarray:
    """Samples of a NIST SPHERE file: an ASCII header that tells its own length in line 2, then the recording."""
    data = path.read_bytes()
    head = data[:16].split()
    if len(head) < 2 or head[0] != b"NIST_1A" or not head[1].isdigit():
        raise ReproError(f"{path} is not a NIST SPHERE file: it must begin with NIST_1A")
    length = int(head[1])
    fields = dict(re.findall(r"^(\S+) -\S+ (.*?)\s*$", data[:length].decode("ascii", "replace"), flags=re.MULTILINE))
    expected = {"sample_rate": str(RATE), "sample_n_bytes": "2", "sample_coding": "pcm", "channel_count": "1"}
    for field, value in expected.items():
        if fields.get(field, value) != value:
            raise ReproError(f"{path}: {field} is {fields[field]!r}, only {value!r} can be read")
    order = {"10": ">i2", "01": "<i2"}.get(fields.get("sample_byte_format", ""))
    if order is None:
        raise ReproError(f"{path}: sample_byte_format is {fields.get('sample_byte_format')!r}; '10' or '01' would be right")
    return _pcm(data[length:], order, path)


def _pcm(data: bytes, order: str, path: Path) -> np.ndarray:
    if not data or len(data) % 2:
        raise ReproError(f"{path} holds {len(data)} bytes: 16-bit speech has an even number above 0; run `make data` again")
    return np.frombuffer(data, dtype=order).astype(np.float32) / np.float32(32768)
