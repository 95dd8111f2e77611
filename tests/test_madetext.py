"""The made text: the same for the same seed, its information known exactly, and structure that reaches far."""

import hashlib
import math
import re
from collections import Counter, defaultdict
from itertools import chain

import pytest
import torch
from torch import nn

from repro.datasets import madetext
from repro.datasets.draws import Draws
from repro.datasets.madetext import Author, Voice
from repro.datasets.text import contiguous_batches, load_characters, load_words
from repro.errors import ReproError
from repro.models.language import LanguageModel, detach, mean_loss


@pytest.fixture(scope="module")
def smoke():
    return madetext.load("smoke")


@pytest.fixture(scope="module")
def laptop():
    return madetext.load("laptop")


def test_text_is_pinned(smoke):
    """A change here must raise the `code_version` of the trials that read it."""
    digest = hashlib.sha256("".join(made.text for made in smoke.values()).encode()).hexdigest()
    assert digest[:16] == "d756fe6e4b996543"


def test_the_seed_decides_everything(smoke):
    other = madetext.load("smoke", seed=1)
    texts = [made.text for corpus in (smoke, other) for made in corpus.values()]
    assert madetext.load("smoke") == smoke and len(set(texts)) == 6


def test_splits_have_their_sizes_and_share_few_scenes(laptop):
    """They end with a scene, and what the test split asks for was not simply seen before: long scenes are all new."""
    for split, made in laptop.items():
        assert 0 <= len(made.text) - madetext.SIZES["laptop"][split] < 3000 and made.text.endswith(".\n")
    seen = set(laptop["train"].text.split("\n"))
    repeated = [line for line in laptop["test"].text.split("\n") if line in seen and len(line) > 120]
    assert repeated == []


class Enumerated(Author):
    """An author who draws what the script says, then the first option, and notes which options were left."""

    def __init__(self, script):
        self.nats, self.script, self.drawn = 0.0, list(script), []

    def weighted(self, weights):
        place = len(self.drawn)
        index = self.script[place] if place < len(self.script) else 0
        self.drawn.append((index, len(weights)))
        option = list(weights)[index]
        self.nats += math.log(sum(weights.values()) / weights[option])
        return option


def derivations(part):
    """(text, probability) of everything that `part(author)` can write."""
    script = []
    while script is not None:
        author = Enumerated(script)
        yield part(author), math.exp(-author.nats)
        drawn = author.drawn
        while drawn and drawn[-1][0] + 1 == drawn[-1][1]:
            drawn.pop()
        script = [index for index, _ in drawn[:-1]] + [drawn[-1][0] + 1] if drawn else None


@pytest.fixture
def small_grammar(monkeypatch):
    """One word of each kind, relative clauses one deep: few enough sentences to write all of them."""
    for name in ("ADJECTIVES", "ADVERBS", "TRANSITIVE", "INTRANSITIVE", "NEAR", "JOINTS"):
        monkeypatch.setattr(madetext, name, getattr(madetext, name)[:1])
    monkeypatch.setattr(madetext, "DEEPEST", 1)
    monkeypatch.setattr(Author, "noun", lambda self, voice: ("gulls", True) if self.chance(40) else ("gull", False))
    return Voice(("gull",), "she", ("Anna",))


def test_every_clause_has_one_derivation(small_grammar):
    """So minus the logarithm of a text's probability is the information of its draws; all probabilities add up to one."""
    for part in (lambda author: author.clause(small_grammar), lambda author: author.noun_phrase(small_grammar)[0]):
        texts, probabilities = zip(*derivations(part), strict=True)
        assert len(set(texts)) == len(texts) > 50
        assert sum(probabilities) == pytest.approx(1.0)


def test_nouns_have_one_derivation():
    voice = Voice(tuple(madetext.PLACES["In the workshop"].split()), "he", ("Peter",))
    texts, probabilities = zip(*derivations(lambda author: author.noun(voice)[0]), strict=True)
    assert len(set(texts)) == len(texts) == 2 * 3 * 16 * 13
    assert sum(probabilities) == pytest.approx(1.0)


def test_draws_follow_their_weights():
    draws = Draws("0")
    counts = Counter(draws.weighted({"a": 1, "b": 2, "c": 7}) for _ in range(20_000))
    for option, share in {"a": 0.1, "b": 0.2, "c": 0.7}.items():
        assert abs(counts[option] / 20_000 - share) < 5 * math.sqrt(share * (1 - share) / 20_000)
    assert draws.nats / 20_000 == pytest.approx(-sum(p * math.log(p) for p in (0.1, 0.2, 0.7)), rel=0.02)


def test_dependencies_hold_over_a_scene(laptop):
    """Name, pronoun and possessive of the first sentence stay, the last names the hero again, every mark closes."""
    scenes = laptop["test"].text.splitlines()
    for scene in scenes:
        hero = re.match(r"(?:At|On|In) the \w+, (\w+) ", scene)[1]
        other = {"she": "he", "he": "she"}[madetext.HEROES[hero]]
        words = set(re.findall(r"\w+", scene.lower()))
        assert scene.endswith(f"So ends the day of {hero}.")
        assert other not in words and madetext.POSSESSIVES[other] not in words
        assert set(madetext.HEROES) & set(re.findall(r"\w+", scene)) == {hero}
        assert scene.count("(") == scene.count(")") and scene.count('"') % 2 == 0
        told = re.sub(r'"[^"]*"', "", scene)
        assert "my" not in re.findall(r"\w+", told) and "I" not in re.findall(r"\w+", told)
    assert sum(len(scene) > 300 for scene in scenes) > len(scenes) / 4


def test_the_verb_agrees_past_a_nested_clause(laptop):
    """`The sailor that the boats need waits`: the number of the far noun decides, the near one misleads."""
    adjectives, more = "|".join(madetext.ADJECTIVES), "|".join(("that", *madetext.NEAR))
    noun = rf"(?:the|an?|some|his|her|my) (?:(?:{adjectives}) )?(\w+)"
    found = re.findall(rf'(?:[.:] |"){noun} that {noun} (?!{more})\w+ (\w+)', laptop["train"].text, flags=re.IGNORECASE)
    misled = [(noun, verb) for noun, near, verb in found if noun.endswith("s") != near.endswith("s")]
    assert len(misled) > 40
    assert all(noun.endswith("s") != verb.endswith("s") for noun, verb in misled)


def test_answers_repeat_the_object_of_the_question(laptop):
    asked = re.findall(r'"Who \w+ ([^?]*)\?" asks \w+\. "([^"]*)\."', laptop["test"].text)
    assert len(asked) > 30 and all(answer.endswith(f" {wanted}") for wanted, answer in asked)


def ngram_loss(train, test, n, symbols):
    """Nats per symbol of an n-gram model with Witten and Bell's interpolation, the last resort being uniform."""
    followers = [defaultdict(Counter) for _ in range(n)]
    for k in range(n):
        for i in range(k, len(train)):
            followers[k][tuple(train[i - k : i])][train[i]] += 1
    total = 0.0
    for i in range(n - 1, len(test)):
        probability = 1 / symbols
        for k in range(n):
            seen = followers[k][tuple(test[i - k : i])]
            kinds = len(seen)
            if kinds:
                probability = (seen[test[i]] + kinds * probability) / (seen.total() + kinds)
        total -= math.log(probability)
    return total / (len(test) - n + 1)


def test_more_context_helps_down_to_the_bound(smoke):
    """Nats per character: 2.95 without context, 2.05 with one character, 1.21 with two, 0.33 is the text's own information.

    A small LSTM falls well below the trigram within a second: a model that learns is told from one that counts.
    """
    corpus = load_characters("made", size="smoke")
    train, test = corpus.splits["train"], corpus.splits["test"]
    unigram, bigram, trigram = (ngram_loss(train.tolist(), test.tolist(), n, len(corpus.vocabulary)) for n in (1, 2, 3))
    bound = smoke["test"].nats / len(smoke["test"].text)
    assert 0.3 < bound < 0.36 and 1.1 < trigram < 1.3 and 1.9 < bigram < 2.2 and 2.8 < unigram < 3.1
    torch.manual_seed(0)
    model = LanguageModel(len(corpus.vocabulary), 96, 96, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(4):
        state = None
        for tokens, targets in contiguous_batches(train, 10, 25):
            logits, state = model(tokens, state)
            state = detach(state)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert 2 * bound < mean_loss(model, contiguous_batches(test, 5, 100)) < trigram - 0.2


def test_words_are_the_same_text():
    """Words and marks of a line in order, then <eos>; joined again they are the characters but for the spaces."""
    by_word, by_character = load_words("made", size="smoke"), load_characters("made", size="smoke")
    for split, tokens in by_word.splits.items():
        joined = "".join(by_word.vocabulary.decode(tokens)).replace("<eos>", "\n")
        assert joined == "".join(by_character.vocabulary.decode(by_character.splits[split])).replace(" ", "")
    assert {"<eos>", "sees", '"', "(", "I"} <= set(by_word.vocabulary.symbols)


def test_words_of_the_grammar_fit_it():
    """Regular plurals and verbs: no noun that ends in s or in a sound that wants es, none in two places."""
    nouns = list(chain.from_iterable(nouns.split() for nouns in madetext.PLACES.values()))
    assert len(set(nouns)) == len(nouns) == 4 * 16
    assert not [noun for noun in nouns if re.search("(s|x|ch|sh|man|[^aeiou]y)$", noun)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": "huge"}, "unknown size of the made text corpus 'huge': choose one of smoke, laptop"),
        ({"seed": -1}, "the seed of the made text corpus is -1: it must be a natural number"),
        ({"seed": 0.5}, "the seed of the made text corpus is 0.5"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ReproError, match=message):
        madetext.load(**options)
