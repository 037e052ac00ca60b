"""An invented language with rules like German's, and sentence pairs English → that language for the translation task.

Every rule is regular, none is a word-for-word replacement: nouns have a gender that articles and adjectives agree with
in case and number; two nouns in a row fuse into one word with the parts swapped; the finite verb is second in a main
clause and last in a clause after "because" or "when"; the past is an auxiliary in that place and a participle at the
end; a time in front pushes the subject behind the verb; the negation follows the object.
"""

import random
from dataclasses import dataclass
from typing import Literal

Case = Literal["subject", "object", "place"]
LANGUAGE_SEED = 7
PEOPLE = "weaver potter baker shepherd sailor miller dyer guard singer healer".split()
ANIMALS = "heron otter badger falcon hare stag raven crow".split()
THINGS = "basket kettle lantern blanket barrel saddle lock comb drum letter map candle".split()
STUFFS = "wool copper paper oak wax silk iron bone".split()
PLACES = "river tower market bridge mill forest harbour garden meadow gate".split()
ADJECTIVES = "old young red blue heavy small quiet proud broken golden clever tired".split()
VERBS = {"lift": "lifted", "find": "found", "sell": "sold", "paint": "painted", "buy": "bought", "hide": "hid"}
VERBS |= {"see": "saw", "follow": "followed", "repair": "repaired", "bring": "brought", "lose": "lost"}
TIMES = "today|yesterday|in the morning|every winter|at night|after the storm".split("|")
PREPOSITIONS = "near behind under beyond".split()
DETERMINERS = "the this every".split()
CONJUNCTIONS = "because when".split()
OTHER_WORDS = ["not", "have", "and", *DETERMINERS, *PREPOSITIONS, *CONJUNCTIONS, *TIMES]

ARTICLE_ENDINGS: dict[Case, tuple[str, str, str, str]] = {
    "subject": ("er", "a", "os", "i"),
    "object": ("en", "a", "os", "in"),
    "place": ("em", "ar", "om", "im"),
}
"""Endings by gender (three) and plural; adjectives take the same, weakened by a leading n in the plural."""


@dataclass(frozen=True)
class Phrase:
    """A noun phrase of the sentence plan: determiner, adjective or "", material or "", noun, number."""

    determiner: str
    adjective: str
    stuff: str
    noun: str
    plural: bool


@dataclass(frozen=True)
class Clause:
    """Who does what (not) to what, where (preposition and phrase, or None), in the past or the present."""

    subject: Phrase
    verb: str
    object: Phrase
    place: tuple[str, Phrase] | None
    past: bool
    negated: bool


def _lexicon() -> dict[str, str]:
    """Invented stem of each English word, all different."""
    rng = random.Random(LANGUAGE_SEED)
    words = [*PEOPLE, *ANIMALS, *THINGS, *STUFFS, *PLACES, *ADJECTIVES, *VERBS, *OTHER_WORDS]
    stems: dict[str, str] = {}
    for word in words:
        stem = ""
        while not stem or stem in stems.values():
            syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((1, 2)))]
            stem = "".join(syllables) + rng.choice("lmnrskt")
        stems[word] = stem
    return stems


STEMS = _lexicon()
GENDERS = {noun: number % 3 for number, noun in enumerate([*PEOPLE, *ANIMALS, *THINGS, *PLACES])}


def sentence_pairs(rng: random.Random, size: int) -> list[tuple[str, str]]:
    """``size`` different English sentences with their translations."""
    pairs: dict[str, str] = {}
    while len(pairs) < size:
        main = _clause(rng, rng.random() < 0.5)
        time = rng.choice(TIMES) if rng.random() < 0.4 else ""
        conjunction = rng.choice(CONJUNCTIONS) if rng.random() < 0.3 else ""
        side = _clause(rng, main.past, short=True) if conjunction else None
        pairs[_english(main, time, conjunction, side)] = _translated(main, time, conjunction, side)
    return list(pairs.items())


def _phrase(rng: random.Random, nouns: list[str], stuff: bool = False, short: bool = False) -> Phrase:
    determiner = rng.choice(DETERMINERS)
    adjective = rng.choice(ADJECTIVES) if not short and rng.random() < 0.5 else ""
    plural = determiner == "the" and rng.random() < 0.4
    return Phrase(determiner, adjective, rng.choice(STUFFS) if stuff else "", rng.choice(nouns), plural)


def _clause(rng: random.Random, past: bool, short: bool = False) -> Clause:
    subject = _phrase(rng, PEOPLE, short=short)
    things = rng.random() < 0.6
    target = _phrase(rng, THINGS if things else ANIMALS, stuff=things and rng.random() < 0.5, short=short)
    place = (rng.choice(PREPOSITIONS), _phrase(rng, PLACES, short=True)) if not short and rng.random() < 0.5 else None
    return Clause(subject, rng.choice(list(VERBS)), target, place, past, rng.random() < 0.2)


def _english(main: Clause, time: str, conjunction: str, side: Clause | None) -> str:
    return _sentence(time and f"{time},", _english_clause(main), conjunction, _english_clause(side) if side else "")


def _english_clause(clause: Clause) -> str:
    verb = VERBS[clause.verb] if clause.past else clause.verb + ("" if clause.subject.plural else "s")
    if clause.negated:
        verb = f"{'did' if clause.past else 'do' if clause.subject.plural else 'does'} not {clause.verb}"
    place = f"{clause.place[0]} {_english_phrase(clause.place[1])}" if clause.place else ""
    return _join(_english_phrase(clause.subject), verb, _english_phrase(clause.object), place)


def _english_phrase(phrase: Phrase) -> str:
    return _join(phrase.determiner, phrase.adjective, phrase.stuff, phrase.noun + "s" * phrase.plural)


def _translated(main: Clause, time: str, conjunction: str, side: Clause | None) -> str:
    subject, finite, rest, participle = _translated_parts(main)
    front = (STEMS[time], finite, subject) if time else (subject, finite)
    clause = _join(*front, rest, participle)
    if side is None:
        return _sentence(clause)
    subject, finite, rest, participle = _translated_parts(side)
    return _sentence(f"{clause},", STEMS[conjunction], subject, rest, participle, finite)


def _translated_parts(clause: Clause) -> tuple[str, str, str, str]:
    """Subject, finite verb, what stands between (object, negation, place), participle or ""."""
    ending = "en" if clause.subject.plural else "it"
    finite = STEMS["have" if clause.past else clause.verb] + ending
    participle = f"ge{STEMS[clause.verb]}to" if clause.past else ""
    place = f"{STEMS[clause.place[0]]} {_translated_phrase(clause.place[1], 'place')}" if clause.place else ""
    rest = _join(_translated_phrase(clause.object, "object"), STEMS["not"] if clause.negated else "", place)
    return _translated_phrase(clause.subject, "subject"), finite, rest, participle


def _translated_phrase(phrase: Phrase, case: Case) -> str:
    ending = ARTICLE_ENDINGS[case][3 if phrase.plural else GENDERS[phrase.noun]]
    adjective = STEMS[phrase.adjective] + ("n" if phrase.plural else "") + ending if phrase.adjective else ""
    noun = STEMS[phrase.noun] + (f"s{STEMS[phrase.stuff]}" if phrase.stuff else "") + ("une" if phrase.plural else "")
    return _join(STEMS[phrase.determiner] + ending, adjective, noun)


def _join(*words: str) -> str:
    return " ".join(filter(None, words))


def _sentence(*words: str) -> str:
    text = _join(*words)
    return f"{text[0].upper()}{text[1:]}."
