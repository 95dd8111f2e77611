"""Sentence pairs: the made language keeps its own rules, files that disagree are refused, batches are padded right."""

import gzip
import hashlib
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from repro.datasets import madepairs, registry
from repro.datasets.draws import Draws
from repro.datasets.madepairs import NOUNS, Clause, NounPhrase, english, made
from repro.datasets.pairs import PairCorpus, collate, load_pairs, pair_batches, read_pairs
from repro.datasets.vocabulary import MARKS, sentence_vocabulary
from repro.errors import ReproError

SAILOR, GIRL, BOAT, BARN = (next(noun for noun in NOUNS if noun.english == word) for word in ("sailor", "girl", "boat", "barn"))


@pytest.fixture(scope="module")
def smoke():
    return madepairs.load("smoke")


def test_pairs_are_pinned(smoke):
    """A change here must raise the `code_version` of the trials that read it."""
    lines = [" ".join(source) + "\t" + " ".join(target) for pairs in smoke.values() for source, target in pairs]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest[:16] == "be2ac6ad7d879ce5"


def test_the_seed_decides_everything_and_no_source_occurs_twice(smoke):
    assert madepairs.load("smoke") == smoke != madepairs.load("smoke", seed=1)
    assert {split: len(pairs) for split, pairs in smoke.items()} == madepairs.SIZES["smoke"]
    sources = [source for pairs in smoke.values() for source, _ in pairs]
    assert len(set(sources)) == len(sources)


def test_translations_written_by_hand():
    """Order, gender, number and the two words for `see`, each as the module's page says."""
    old_boats = NounPhrase(BOAT, True, True, "old", None)
    sailor_near_barn = NounPhrase(SAILOR, False, False, None, ("near", NounPhrase(BARN, False, True, None, None)))
    girl = NounPhrase(GIRL, False, True, "small", None)
    one = Clause(sailor_near_barn, "see", old_boats, "today")
    assert " ".join(english(one)) == "a sailor near the barn sees the old boats today"
    assert " ".join(made(one)) == "hopa ze lo varok mo melat lin lominu rasin vidala"
    assert " ".join(made(one, verb_last=False)) == "hopa ze lo varok mo melat vidala lin lominu rasin"
    other = Clause(old_boats, "see", girl, None)
    assert " ".join(english(other)) == "the old boats see the small girl"
    assert " ".join(made(other)) == "lin lominu rasin li sunel tevi okueten"
    an = NounPhrase(SAILOR, False, False, "old", None)
    assert " ".join(english(Clause(an, "carry", an, None))) == "an old sailor carries an old sailor"


def test_rules_of_the_made_language_hold(smoke):
    """Articles agree with their noun; one target for one source, and the words of both are as many as its clauses say."""
    made_nouns = {noun.made: noun for noun in NOUNS} | {noun.made + "u": noun for noun in NOUNS}
    english_nouns = {noun.english for noun in NOUNS} | {noun.english + "s" for noun in NOUNS}
    for source, target in (pair for pairs in smoke.values() for pair in pairs):
        assert sum(word in english_nouns for word in source) == sum(word in made_nouns for word in target)
        assert len(source) == len(target)
        for article, noun in pairwise(target):
            if noun in made_nouns:
                assert article[1:] == ("o" if made_nouns[noun].dark else "i") + "n" * noun.endswith("u")


def test_a_word_by_word_translator_is_not_enough(smoke):
    """The best single translation of each word, in the source's order, gets few sentences right: order and context matter."""
    dictionary = {noun.english: noun.made for noun in NOUNS} | {"the": "li", ".": "."}
    dictionary |= {f"{noun.english}s": noun.made + "u" for noun in NOUNS}
    dictionary |= {f"{verb}s": words[0] + "a" for verb, words in madepairs.VERBS.items()} | {"carries": "pomaka"}
    guesses = [(tuple(dictionary.get(word, word) for word in source), target) for source, target in smoke["test"]]
    assert sum(sorted(guess) == sorted(target) for guess, target in guesses) < len(guesses) / 4
    assert not any(guess == target for guess, target in guesses)


@pytest.fixture
def toy():
    pairs = [(("a", "b"), ("x",)), (("a", "b", "c"), ("x", "y")), (("a",), ("y", "y", "z")), (("c", "a"), ("z",))]
    sources, targets = zip(*pairs, strict=True)
    return PairCorpus("toy", sentence_vocabulary(sources), sentence_vocabulary(targets), {"train": pairs, "test": pairs})


def test_batch_is_sorted_marked_and_padded(toy):
    """Sources longest first without marks, targets between <s> and </s>, 0 beyond; references are the words."""
    assert toy.source.symbols == (*MARKS, "a", "b", "c") and toy.target.symbols == (*MARKS, "y", "x", "z")
    batch = collate(toy, toy.splits["train"])
    assert batch.source.T.tolist() == [[4, 5, 6], [4, 5, 0], [6, 4, 0], [4, 0, 0]]
    assert batch.lengths.tolist() == [3, 2, 2, 1] and batch.source.dtype == torch.int64
    assert batch.target.T.tolist() == [[1, 5, 4, 2, 0], [1, 5, 2, 0, 0], [1, 6, 2, 0, 0], [1, 4, 4, 6, 2]]
    assert batch.references == [("x", "y"), ("x",), ("z",), ("y", "y", "z")]


def test_one_pass_holds_every_pair_once():
    """Sorted and the same each time without a generator, in another order with one, by the generator alone."""
    corpus = load_pairs("made", size="smoke")
    expected = sorted(target for _, target in corpus.splits["train"])

    def passed(rng):
        return [batch.references for batch in pair_batches(corpus, "train", 64, rng)]

    plain, shuffled = passed(None), passed(np.random.default_rng(0))
    for batches in (plain, shuffled):
        assert sorted(reference for batch in batches for reference in batch) == expected
    assert plain == passed(None) != shuffled == passed(np.random.default_rng(0)) != passed(np.random.default_rng(1))


def test_batches_hold_little_padding():
    """Neighbours in length go together: under a third of the padding of the pairs as they come."""
    corpus = load_pairs("made", size="smoke")
    pairs = corpus.splits["train"]
    sorted_batches = pair_batches(corpus, "train", 64, np.random.default_rng(0))
    as_they_come = [collate(corpus, pairs[start : start + 64]) for start in range(0, len(pairs), 64)]

    def padding(batches):
        return sum((batch.source == 0).sum().item() for batch in batches)

    assert 0 < padding(sorted_batches) < padding(as_they_come) / 3


def test_rare_words_are_unknown():
    """With a least count, words of train below it and words train lacks are read as <unk>; references keep them."""
    pairs = [(("a", "a"), ("x",)), (("b",), ("x",))]
    sources, targets = zip(*pairs, strict=True)
    corpus = PairCorpus("toy", sentence_vocabulary(sources, 2), sentence_vocabulary(targets, 2), {"train": pairs})
    batch = collate(corpus, [(("a", "b", "<pad>"), ("x", "q"))])
    assert batch.source.T.tolist() == [[4, 3, 0]] and batch.target.T.tolist() == [[1, 4, 3, 2]]
    assert batch.references == [("x", "q")]


FILES = {("train", "en"): "two men\na dog\n", ("train", "de"): "zwei männer\nein hund\n"}
FILES |= {(split, language): "a dog\n" for split in ("val", "test_2016_flickr") for language in ("en", "de")}


@pytest.fixture(params=["", ".gz"], ids=["plain", "packed"])
def multi30k(request, tmp_path, monkeypatch):
    (tmp_path / "tok").mkdir()
    for (split, language), content in FILES.items():
        data = gzip.compress(content.encode()) if request.param else content.encode()
        (tmp_path / f"tok/{split}.lc.norm.tok.{language}{request.param}").write_bytes(data)
    monkeypatch.setattr(registry, "locate", lambda *arguments: tmp_path)
    return tmp_path / f"tok/train.lc.norm.tok.de{request.param}"


def test_multi30k_is_read_from_either_edition(multi30k):
    corpus = load_pairs("multi30k", least=1)
    assert corpus.splits["train"] == [(("two", "men"), ("zwei", "männer")), (("a", "dog"), ("ein", "hund"))]
    assert list(corpus.splits) == ["train", "validation", "test"]


def test_files_that_disagree_are_refused(multi30k):
    """A missing line would pair every later sentence with the wrong one."""
    content = "zwei männer\n".encode()
    multi30k.write_bytes(gzip.compress(content) if multi30k.suffix == ".gz" else content)
    with pytest.raises(ReproError, match=r"train\.lc\.norm\.tok\.en\S* has 2 lines but \S+\.de\S* has 1"):
        load_pairs("multi30k")


@pytest.mark.parametrize("mark", ["<pad>", "<s>", "</s>"])
def test_a_word_that_is_a_mark_is_named(tmp_path, mark):
    (tmp_path / "a.en").write_text("a dog\na cat\n")
    (tmp_path / "a.de").write_text(f"ein hund\neine {mark} katze\n")
    with pytest.raises(ReproError, match=f"a.de, line 2 has the word {mark}"):
        read_pairs(tmp_path / "a.en", tmp_path / "a.de")


def test_truncated_gzip_is_named(tmp_path):
    (tmp_path / "a.en").write_text("a dog\n")
    (tmp_path / "a.de.gz").write_bytes(gzip.compress(b"ein hund\n")[:-6])
    with pytest.raises(ReproError, match=r"a\.de\.gz is truncated"):
        read_pairs(tmp_path / "a.en", tmp_path / "a.de.gz")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: load_pairs("wmt15"), "unknown corpus of pairs 'wmt15': choose one of multi30k, made"),
        (lambda: load_pairs("multi30k", seed=1), "unknown option 'seed' of the pairs 'multi30k': it takes no options"),
        (lambda: load_pairs("made", size="huge"), "unknown size of the made pairs corpus 'huge'"),
        (lambda: load_pairs("made", size="smoke", least=0), "the least count of a word is 0"),
        (lambda: next(pair_batches(load_pairs("made", size="smoke"), "dev", 3)), "unknown split 'dev'"),
        (lambda: next(pair_batches(load_pairs("made", size="smoke"), "test", 0)), "the size of the batches is 0"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ReproError, match=message):
        call()


def test_real_multi30k_has_its_published_counts(tmp_path):
    """Sentences and words as its authors' page counts them."""
    mirror = os.environ.get(registry.MIRROR)
    if not mirror or not (Path(mirror) / "multi30k").is_dir():
        pytest.skip(f"{registry.MIRROR} names no folder with multi30k/")
    corpus = load_pairs("multi30k", tmp_path)
    assert {split: len(pairs) for split, pairs in corpus.splits.items()} == {
        "train": 29_000,
        "validation": 1_014,
        "test": 1_000,
    }
    assert [sum(len(pair[side]) for pair in corpus.splits["train"]) for side in (0, 1)] == [377_534, 360_706]
    everything = load_pairs("multi30k", tmp_path, least=1)
    assert [len(everything.source) - len(MARKS), len(everything.target) - len(MARKS)] == [10_210, 18_722]


def test_draws_of_both_languages_are_one(smoke):
    """A pair drawn alone from its own seed is the first pair of the corpus."""
    assert madepairs.pair(Draws("0 train")) == smoke["train"][0]
