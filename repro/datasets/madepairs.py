"""Made sentence pairs: small English and its translation into a made language, which has one right answer.

Nothing to fetch, the same for the same seed. What a translator must learn of the made language beside its words:

- order: adverb, subject, object, verb; adjective behind its noun; `near the barn` before the noun that it belongs to;
- but after a joint (`because`) the verb stands between subject and object;
- gender: each noun is light or dark; article and adjective end in -i or -o as their noun does, plurals in -n;
- the verb ends as its subject does in number, wherever that stands;
- `hold` and `see` have two translations each: the object decides, a living being or a thing.
"""

from dataclasses import dataclass

from repro.datasets.draws import Draws, check_options

OPTIONS = ("size", "seed")
# Raise `code_version` of the trials that read it when a sentence of the corpus changes.

SIZES = {
    "smoke": {"train": 500, "validation": 100, "test": 100},
    "laptop": {"train": 5_000, "validation": 500, "test": 500},
}

Pair = tuple[tuple[str, ...], tuple[str, ...]]  # words of the source and of the target sentence


@dataclass(frozen=True)
class Noun:
    english: str
    made: str
    dark: bool
    living: bool


NOUNS = (
    Noun("sailor", "melat", True, True),
    Noun("girl", "sunel", False, True),
    Noun("horse", "tarup", True, True),
    Noun("goat", "biret", False, True),
    Noun("judge", "kodam", False, True),
    Noun("farmer", "pelur", True, True),
    Noun("boat", "lomin", False, False),
    Noun("barn", "varok", True, False),
    Noun("letter", "ditas", True, False),
    Noun("lamp", "fenir", False, False),
    Noun("apple", "gulem", False, False),
    Noun("wheel", "nabuk", True, False),
)
ADJECTIVES = {"old": "ras", "small": "tev", "heavy": "gom", "empty": "lun", "quiet": "sib", "strange": "dak"}
ADVERBS = {"today": "hopa", "again": "reka", "slowly": "muda"}
NEAR = {"near": "ze", "behind": "fu", "under": "ka"}
JOINTS = {"because": "oro", "while": "isi"}
# In the made language: with a thing as object, and with a living being.
VERBS = {
    "hold": ("karem", "bosun"),
    "see": ("vidal", "okuet"),
    "find": ("jusep", "jusep"),
    "follow": ("rilan", "rilan"),
    "need": ("wetor", "wetor"),
    "carry": ("pomak", "pomak"),
}


@dataclass(frozen=True)
class NounPhrase:
    noun: Noun
    plural: bool
    definite: bool
    adjective: str | None
    near: tuple[str, "NounPhrase"] | None


@dataclass(frozen=True)
class Clause:
    subject: NounPhrase
    verb: str
    object: NounPhrase
    adverb: str | None


def load(size: str = "laptop", seed: int = 0) -> dict[str, list[Pair]]:
    """Pairs of train, validation and test; no source sentence occurs twice.

    Raises ReproError for an unknown size or a seed that is not natural.
    """
    check_options("made pairs", size, SIZES, seed)
    seen, splits = set(), {}
    for split, wanted in SIZES[size].items():
        draws, splits[split] = Draws(f"{seed} {split}"), []
        while len(splits[split]) < wanted:
            source, target = pair(draws)
            if source not in seen:
                seen.add(source)
                splits[split].append((source, target))
    return splits


def pair(draws: Draws) -> Pair:
    """One sentence in both languages, of one clause or of two with a joint."""
    main = _draw_clause(draws)
    if draws.chance(70):
        return (*english(main), "."), (*made(main), ".")
    joint, second = draws.ranked(tuple(JOINTS)), _draw_clause(draws)
    source = (*english(main), joint, *english(second), ".")
    return source, (*made(main), JOINTS[joint], *made(second, verb_last=False), ".")


def _draw_clause(draws: Draws) -> Clause:
    adverb = draws.ranked(tuple(ADVERBS)) if draws.chance(30) else None
    return Clause(_draw_phrase(draws), draws.ranked(tuple(VERBS)), _draw_phrase(draws), adverb)


def _draw_phrase(draws: Draws, alone: bool = False) -> NounPhrase:
    adjective = draws.ranked(tuple(ADJECTIVES)) if draws.chance(40) else None
    near = None if alone or draws.chance(75) else (draws.ranked(tuple(NEAR)), _draw_phrase(draws, alone=True))
    return NounPhrase(draws.ranked(NOUNS), draws.chance(40), draws.chance(60), adjective, near)


def english(clause: Clause) -> list[str]:
    verb = clause.verb if clause.subject.plural else {"carry": "carries"}.get(clause.verb, f"{clause.verb}s")
    adverb = [clause.adverb] if clause.adverb else []
    return [*_english_phrase(clause.subject), verb, *_english_phrase(clause.object), *adverb]


def _english_phrase(phrase: NounPhrase) -> list[str]:
    words = [phrase.adjective] if phrase.adjective else []
    words.append(phrase.noun.english + "s" * phrase.plural)
    article = "the" if phrase.definite else "some" if phrase.plural else "an" if words[0][0] in "aeiou" else "a"
    near = [phrase.near[0], *_english_phrase(phrase.near[1])] if phrase.near else []
    return [article, *words, *near]


def made(clause: Clause, verb_last: bool = True) -> list[str]:
    """The clause in the made language; `verb_last`: as in main clauses."""
    verb = VERBS[clause.verb][clause.object.noun.living] + ("en" if clause.subject.plural else "a")
    adverb = [ADVERBS[clause.adverb]] if clause.adverb else []
    subject, thing = _made_phrase(clause.subject), _made_phrase(clause.object)
    return [*adverb, *subject, *thing, verb] if verb_last else [*adverb, *subject, verb, *thing]


def _made_phrase(phrase: NounPhrase) -> list[str]:
    ending = ("o" if phrase.noun.dark else "i") + "n" * phrase.plural
    near = [NEAR[phrase.near[0]], *_made_phrase(phrase.near[1])] if phrase.near else []
    adjective = [ADJECTIVES[phrase.adjective] + ending] if phrase.adjective else []
    return [*near, ("l" if phrase.definite else "m") + ending, phrase.noun.made + "u" * phrase.plural, *adjective]
