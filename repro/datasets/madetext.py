"""A made text: short scenes written by a small probabilistic grammar, with dependencies over dozens of characters.

It needs no file and no network and is the same for the same seed on every machine. What a model can learn, from near to far:
spelling; a or an; number of verb and noun, past a clause nested between them; brackets and quotation marks that close; I and
my in speech; an answer that repeats the object of its question; he or she and his or her, from the name in a scene's first
sentence; the nouns of the scene's place; the name once more in its last sentence, some 300 characters on.

The splits are drawn apart: a few of the shortest scenes of validation and test are in train too.

Each text comes with the information of the draws that made it. The grammar is unambiguous (a text has one derivation), so
that this is also minus the logarithm of the text's probability: per character, what no model beats on long texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from repro.datasets.draws import Draws, check_options

OPTIONS = ("size", "seed")
# Raise `code_version` of the trials that read it when a character of the corpus changes.

# Characters of train, validation, test; each text ends with the scene that reaches its number.
SIZES = {
    "smoke": {"train": 20_000, "validation": 5_000, "test": 5_000},
    "laptop": {"train": 400_000, "validation": 40_000, "test": 40_000},
}

PLACES = {
    "At the harbour": "sailor boat captain net anchor gull island rope pilot barrel lantern oar storm fisher pier whale",
    "On the farm": "farmer horse field orchard goat barn apple cart shepherd plough fence meadow dog bucket hen acre",
    "In the workshop": "smith hammer engine wheel apprentice nail lamp oven carver chisel board bolt drawing tool idea owner",
    "At the court": "king letter judge messenger crown envoy door law queen secret guard carpet mirror ruler answer plot",
}
HEROES = {"Anna": "she", "Peter": "he", "Clara": "she", "Oscar": "he", "Maria": "she", "Victor": "he"}
POSSESSIVES = {"she": "her", "he": "his", "I": "my"}
ADJECTIVES = ("old", "small", "heavy", "empty", "quiet", "angry", "young", "strange", "broken", "early", "dark", "useful")
ADVERBS = ("slowly", "again", "today", "in silence", "all day", "without a word")
TRANSITIVE = (
    "see",
    "hold",
    "find",
    "follow",
    "need",
    "remember",
    "carry",
    "leave",
    "watch",
    "hide",
    "bring",
    "fear",
    "want",
    "move",
    "paint",
)
INTRANSITIVE = ("wait", "sleep", "fall", "turn", "return", "rest", "burn", "appear")
SPEECH = ("say", "whisper", "shout", "answer")
NEAR = ("near", "behind", "above", "under")
JOINTS = ("because", "while", "until", "but")
DEEPEST = 2  # relative clauses within one another


@dataclass(frozen=True)
class MadeText:
    """`nats`: information of the draws, minus the natural logarithm of the probability of `text`."""

    text: str
    nats: float


@dataclass(frozen=True)
class Voice:
    """Who speaks, about what: the nouns of the place and the words for the hero, first person when it is the hero's speech."""

    nouns: Sequence[str]
    pronoun: str
    names: Sequence[str]


def load(size: str = "laptop", seed: int = 0) -> dict[str, MadeText]:
    """The three splits, each from a seed of its own. Raises ReproError for an unknown size or a seed that is not natural."""
    check_options("made text", size, SIZES, seed)
    return {split: write(length, f"{seed} {split}") for split, length in SIZES[size].items()}


def write(length: int, seed: str) -> MadeText:
    """Scenes of one line, until there are at least `length` characters."""
    author, lines, written = Author(seed), [], 0
    while written < length:
        lines.append(author.scene() + "\n")
        written += len(lines[-1])
    return MadeText("".join(lines), author.nats)


class Author(Draws):
    """Draws from the grammar."""

    def scene(self) -> str:
        place = self.ranked(tuple(PLACES))
        hero = self.ranked(tuple(HEROES))
        nouns = PLACES[place].split()
        told, said = Voice(nouns, HEROES[hero], (hero,)), Voice(nouns, "I", ())
        sentences = [f"{place}, {hero} {self.predicate(told, plural=False)}."]
        while self.chance(75):
            kind = self.weighted({"told": 50, "said": 30, "asked": 20})
            if kind == "told":
                sentences.append(f"{_capital(self.sentence(told))}{self.bracket(told)}.")
            elif kind == "said":
                verb = _verb(self.ranked(SPEECH), plural=False)
                sentences.append(f'"{_capital(self.sentence(said))}," {verb} {self.hero(told)}.')
            else:
                sentences.append(self.question_and_answer(told))
        sentences.append(f"So ends the day of {hero}.")
        return " ".join(sentences)

    def sentence(self, voice: Voice) -> str:
        clause = self.clause(voice)
        return f"{clause} {self.ranked(JOINTS)} {self.clause(voice)}" if self.chance(25) else clause

    def bracket(self, voice: Voice) -> str:
        return f" ({self.clause(voice)})" if self.chance(15) else ""

    def question_and_answer(self, told: Voice) -> str:
        """The answer repeats the verb, in its own number, and the whole object."""
        verb, (wanted, _) = self.ranked(TRANSITIVE), self.noun_phrase(told)
        knower, plural = self.noun_phrase(told, DEEPEST)
        question = f'"Who {_verb(verb, plural=False)} {wanted}?" asks {self.hero(told)}.'
        return f'{question} "{_capital(knower)} {_verb(verb, plural)} {wanted}."'

    def hero(self, told: Voice) -> str:
        return self.weighted({told.pronoun: 60, told.names[0]: 40})

    def clause(self, voice: Voice) -> str:
        kind = self.weighted({"pronoun": 35, **{name: 15 for name in voice.names}, "noun": 50})
        if kind == "noun":
            subject, plural = self.noun_phrase(voice)
        else:
            subject, plural = (voice.pronoun, voice.pronoun == "I") if kind == "pronoun" else (kind, False)
        return f"{subject} {self.predicate(voice, plural)}"

    def predicate(self, voice: Voice, plural: bool) -> str:
        """A verb with what belongs to it; I takes the verb's plural form."""
        if self.chance(65):
            return f"{_verb(self.ranked(TRANSITIVE), plural)} {self.noun_phrase(voice)[0]}"
        adverb = f" {self.ranked(ADVERBS)}" if self.chance(40) else ""
        return _verb(self.ranked(INTRANSITIVE), plural) + adverb

    def noun_phrase(self, voice: Voice, depth: int = 0) -> tuple[str, bool]:
        """(phrase, whether it is plural): one noun, perhaps near something, perhaps with a relative clause behind."""
        phrase, plural = self.noun(voice)
        if self.chance(12):
            phrase += f" {self.ranked(NEAR)} {self.noun(voice)[0]}"
        if depth < DEEPEST and self.chance(30):
            verb = self.ranked(TRANSITIVE)
            if self.chance(50):
                phrase += f" that {_verb(verb, plural)} {self.noun_phrase(voice, depth + 1)[0]}"
            else:
                other, others = self.noun_phrase(voice, depth + 1)
                phrase += f" that {other} {_verb(verb, others)}"
        return phrase, plural

    def noun(self, voice: Voice) -> tuple[str, bool]:
        plural = self.chance(40)
        article = self.weighted({"the": 50, "some" if plural else "a": 30, POSSESSIVES[voice.pronoun]: 20})
        noun = self.ranked(voice.nouns) + "s" * plural
        words = f"{self.ranked(ADJECTIVES)} {noun}" if self.chance(25) else noun
        return f"{'an' if article == 'a' and words[0] in 'aeiou' else article} {words}", plural


def _verb(stem: str, plural: bool) -> str:
    """The present tense: see, sees; carry, carries; watch, watches."""
    if plural:
        return stem
    return f"{stem[:-1]}ies" if stem.endswith("ry") else f"{stem}{'es' if stem.endswith('ch') else 's'}"


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
