"""Text corpora: vocabulary, splits, errors that name file and line, and batches whose windows follow each other."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro.datasets import madepairs, registry, text
from repro.datasets.text import contiguous_batches, load_characters, load_words, sentence_corpus
from repro.datasets.vocabulary import Vocabulary, by_frequency
from repro.errors import ReproError
from repro.studies.zhu2017.profiles import GUESSING

FILES = {
    "ptb.train.txt": " the cat sat \n the dog sat on the <unk> \n",
    "ptb.valid.txt": " the dog sat \n",
    "ptb.test.txt": " the cat sat on <unk> \n on the dog \n",
}


@pytest.fixture
def ptb(tmp_path, monkeypatch):
    """A Penn Treebank of three small files."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(registry, "locate", lambda *arguments: tmp_path)
    return tmp_path


def test_words_are_numbered_by_frequency_and_lines_end(ptb):
    corpus = load_words("ptb")
    assert corpus.vocabulary.symbols == ("the", "<eos>", "sat", "<unk>", "cat", "dog", "on")
    assert " ".join(corpus.vocabulary.decode(corpus.splits["test"])) == "the cat sat on <unk> <eos> on the dog <eos>"
    assert {split: len(tokens) for split, tokens in corpus.splits.items()} == {"train": 11, "validation": 4, "test": 10}
    assert all(tokens.dtype == np.int64 for tokens in corpus.splits.values())


def test_characters_are_those_of_the_stripped_lines(ptb):
    corpus = load_characters("ptb")
    assert "".join(corpus.vocabulary.decode(corpus.splits["validation"])) == "the dog sat\n"
    assert set(corpus.vocabulary.symbols) == set("".join(FILES.values())) and corpus.vocabulary.symbols[0] == " "


@pytest.mark.parametrize(
    "load, line, message",
    [
        (load_words, "the bird sat", r"ptb\.test\.txt, line 2: unknown symbol 'bird'; the vocabulary has 7 symbols"),
        (load_characters, "the zebra", r"ptb\.test\.txt, line 2: unknown symbol 'z'"),
        (load_words, " ", r"ptb\.test\.txt, line 2 is empty: every line holds one sentence"),
    ],
)
def test_a_wrong_line_is_named(ptb, load, line, message):
    (ptb / "ptb.test.txt").write_text(f"the cat\n{line}\nthe dog\n")
    with pytest.raises(ReproError, match=message):
        load("ptb")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """Missing, empty, cut off, not gzip, not UTF-8: each says which file and what is wrong."""
    packed = gzip.compress(b"the cat\n" * 100)
    cases = {
        "empty.txt": (b"", "is empty"),
        "blank.txt": (b" \n\n", "is empty"),
        "cut.txt.gz": (packed[:-9], "truncated or not a gzip file"),
        "plain.txt.gz": (b"the cat\n", "truncated or not a gzip file"),
        "damaged.txt.gz": (packed[:12] + b"\xff\xff" + packed[14:], "truncated or not a gzip file"),
        "latin.txt": (b"caf\xe9\n", "not UTF-8 at byte 3"),
        "absent.txt": (None, "cannot read .*: No such file"),
    }
    for name, (data, message) in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ReproError, match=message) as error:
            text.read_lines(tmp_path / name)
        assert name in str(error.value)


def test_packed_and_plain_files_read_alike(tmp_path):
    """Only a newline ends a line: other separators of Unicode stay inside it."""
    content = "ein satz\u2028mit zeichen\nnoch \x85 einer\n"
    (tmp_path / "a.txt").write_text(content)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    assert text.read_lines(tmp_path / "a.txt") == text.read_lines(tmp_path / "a.txt.gz") == content[:-1].split("\n")


def test_own_files_can_be_read(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.txt").write_text("a b\nb a\n")
    files = {split: tmp_path / f"{split}.txt" for split in ("train", "validation", "test")}
    corpus = sentence_corpus("own", files, text.words)
    assert corpus.splits["test"].tolist() == [1, 2, 0, 2, 1, 0]


def test_shakespeare_is_cut_at_90_and_95_percent(tmp_path, monkeypatch):
    """Nothing is lost or used twice, empty lines stay, and a symbol may be new in the last part."""
    content = "ab\n\n" * 24 + "xyzw"
    (tmp_path / "input.txt").write_text(content)
    monkeypatch.setattr(registry, "locate", lambda *arguments: tmp_path)
    corpus = load_characters("tinyshakespeare")
    parts = ["".join(corpus.vocabulary.decode(corpus.splits[split])) for split in ("train", "validation", "test")]
    assert "".join(parts) == content and list(map(len, parts)) == [90, 5, 5]


def test_the_made_language_is_the_target_side_of_the_made_pairs():
    """One sentence a line, letter by letter, without a symbol of English alone."""
    corpus = load_characters("madelanguage", size="smoke")
    lines = "".join(corpus.vocabulary.decode(corpus.splits["test"])).splitlines()
    assert lines == [" ".join(target) for _, target in madepairs.load("smoke")["test"]]
    assert "q" not in corpus.vocabulary.symbols


def test_unknown_symbols_are_read_as_unknown_only_on_request():
    known = Vocabulary(("a", "<unk>"))
    with pytest.raises(ReproError, match="the text: unknown symbol 'b'"):
        known.encode(["a", "b"])
    assert Vocabulary(("a", "<unk>"), unknown="<unk>").encode(["a", "b"]) == [0, 1]
    assert by_frequency("abracadabra", least=2) == ("a", "b", "r")


@given(n=st.integers(2, 200), batch=st.integers(1, 7), length=st.integers(1, 40))
def test_windows_follow_each_other(n, batch, length):
    """Column b of all windows, end to end, is the b-th part of the text; its targets are the same one step later."""
    tokens = np.random.default_rng(0).integers(1000, size=n)
    steps = n // batch
    if steps < 2:
        with pytest.raises(ReproError, match=f"{n} symbols are too few for {batch} streams"):
            next(contiguous_batches(tokens, batch, length))
        return
    windows = list(contiguous_batches(tokens, batch, length))
    assert all(len(inputs) == length for inputs, _ in windows[:-1]) and 1 <= len(windows[-1][0]) <= length
    inputs, targets = (np.concatenate([part.numpy() for part in side]) for side in zip(*windows, strict=True))
    for column in range(batch):
        stream = tokens[column * steps : (column + 1) * steps]
        np.testing.assert_array_equal(inputs[:, column], stream[:-1])
        np.testing.assert_array_equal(targets[:, column], stream[1:])


@pytest.mark.parametrize("options", [{"batch": 0, "length": 5}, {"batch": 2, "length": -1}])
def test_wrong_batches_are_refused(options):
    with pytest.raises(ReproError, match=r"of the contiguous batches is (0|-1): it must be at least 1"):
        next(contiguous_batches(np.arange(20), **options))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: load_words("tinyshakespeare"), "unknown word corpus 'tinyshakespeare': choose one of ptb, made"),
        (lambda: load_characters("wiki"), "unknown character corpus 'wiki': choose one of ptb, tinyshakespeare, made"),
        (lambda: load_words("ptb", seed=1), "unknown option 'seed' of the text corpus 'ptb': it takes no options"),
        (lambda: load_words("made", length=1), "unknown option 'length' of the text corpus 'made': it takes size, seed"),
    ],
)
def test_unknown_names_list_the_known(call, message):
    with pytest.raises(ReproError, match=message):
        call()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def reachable(corpus):
    mirror = os.environ.get(registry.MIRROR)
    if not mirror or not (Path(mirror) / corpus).is_dir():
        pytest.skip(f"{registry.MIRROR} names no folder with {corpus}/")


def test_real_penn_treebank_has_the_published_counts(cache):
    """Mikolov's counts: 929,589 + 73,760 + 82,430 words of 10,000 kinds; 50 characters."""
    reachable("ptb")
    by_word, by_character = load_words("ptb", cache), load_characters("ptb", cache)
    assert [len(tokens) for tokens in by_word.splits.values()] == [929_589, 73_760, 82_430]
    assert [len(tokens) for tokens in by_character.splits.values()] == [5_017_482, 393_042, 442_423]
    assert (len(by_word.vocabulary), len(by_character.vocabulary)) == (10_000, 50)
    assert " ".join(by_word.vocabulary.decode(by_word.splits["test"][:8])) == "no it was n't black monday <eos> but"


def test_a_byte_order_mark_is_no_letter_and_a_lone_carriage_return_no_line_end(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffthe cat\r\nthe dog\r\n".encode())
    assert text.read_lines(path) == ["the cat", "the dog"]
    path.write_bytes(b"the cat\rthe dog\r")
    with pytest.raises(ReproError, match="line 1 has a carriage return within"):
        text.read_lines(path)


@pytest.mark.parametrize("corpus", GUESSING)
def test_the_loss_of_guessing_by_frequency(corpus, cache):
    """What a training is held against that may have learned nothing: shares of the training split, on the validation split."""
    made = corpus.startswith("made")
    if not made:
        reachable(corpus)
    found = load_characters(corpus, size="laptop") if made else load_characters(corpus, cache)
    counts = np.bincount(found.splits["train"], minlength=len(found.vocabulary))
    shares = np.maximum(counts, 1) / counts.sum()
    assert -np.log(shares[found.splits["validation"]]).mean() == pytest.approx(GUESSING[corpus], abs=6e-4)


def test_real_tiny_shakespeare_has_its_65_characters(cache):
    reachable("tinyshakespeare")
    corpus = load_characters("tinyshakespeare", cache)
    assert [len(tokens) for tokens in corpus.splits.values()] == [1_003_854, 55_770, 55_770]
    assert len(corpus.vocabulary) == 65 == len(set(corpus.splits["train"]))
    assert "".join(corpus.vocabulary.decode(corpus.splits["train"][:14])) == "First Citizen:"
