"""The embedded corpus: question answering, classification and translation in an invented world, generated from a seed.

It exists so that the study runs without internet. Nothing in it can be known beforehand, so a model has to read: a
passage says the same kinds of things about two entities, often of similar names and partly through "the town" and the
like, in shuffled order; questions use other words than the passage. Sentiment turns on negation and contrast, pairs on
what is said of whom. Training and validation share no invented name.
"""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

from lib.language import sentence_pairs
from lib.world import KINDS, Kind, Names, Relation

Rows = list[dict[str, Any]]
SEED = 2024
OPENINGS = ("It is said that ", "By all accounts ", "As the records show, ", "No one doubts that ", "In truth, ")
FILLERS = (
    "Few travellers stop long enough to learn more.",
    "The old songs tell a different story.",
    "Not all of this can be proved today.",
    "Most of the papers were lost in the flood.",
    "Children learn these things at school.",
    "A visitor should ask in the nearest inn.",
)
Fact = tuple[Kind, str, Relation, str]
"""Kind and name of the entity, relation, value."""


@cache
def world_qa() -> dict[str, Rows]:
    """SQuAD-like questions that all have an answer: 1,800 for training, 300 for validation."""
    return _qa_splits(1800, 300, unanswerable=0.0)


@cache
def world_qa2() -> dict[str, Rows]:
    """The same with a third of the questions unanswerable: the passage says it of the other entity only."""
    return _qa_splits(1800, 300, unanswerable=1 / 3)


def _qa_splits(train: int, validation: int, unanswerable: float) -> dict[str, Rows]:
    splits = {}
    for split, size in {"train": train, "validation": validation}.items():
        names = Names(random.Random(f"{SEED} qa {unanswerable:.2f} {split}"), unseen=split == "validation")
        splits[split] = _questions(names, size, unanswerable)
        for number, row in enumerate(splits[split]):
            row["id"] = f"world-{split}-{number:04d}"
    return splits


def _questions(names: Names, size: int, unanswerable: float) -> Rows:
    """``size`` questions, four to a passage; each relation's last question is left for validation."""
    rng = names.rng
    rows: Rows = []
    while len(rows) < size:
        facts, missing = _facts(names)
        context, spans = _passage(rng, facts)
        for fact in rng.sample(facts, 4):
            answer: dict[str, list[Any]] = {"text": [], "answer_start": []}
            if rng.random() < unanswerable:
                fact = rng.choice(missing)
            else:
                begin, end = spans[facts.index(fact)]
                answer = {"text": [context[begin:end]], "answer_start": [begin]}
            _, entity, relation, _ = fact
            template = rng.choice(names.known(relation.questions))
            rows.append(
                {
                    "id": "",
                    "title": entity.removeprefix("the "),
                    "context": context,
                    "question": template.replace("{e}", entity),
                    "answers": answer,
                }
            )
    return rows[:size]


def _facts(names: Names) -> tuple[list[Fact], list[Fact]]:
    """What a passage says of two entities of a kind, and what it leaves open for one while it says it of the other."""
    rng = names.rng
    kind = rng.choice(KINDS)
    first = names.entity(kind.name)
    second = names.entity(kind.name, like=first if rng.random() < 0.25 else None)
    relations = rng.sample(kind.relations, 5)
    shared, own, other = relations[:3], relations[3:4], relations[4:]
    facts = [(kind, first, relation, names.value(relation.value)) for relation in shared + own]
    facts += [(kind, second, relation, names.value(relation.value)) for relation in shared + other]
    missing = [(kind, first, relation, "") for relation in other] + [(kind, second, relation, "") for relation in own]
    return facts, missing


def _passage(rng: random.Random, facts: list[Fact]) -> tuple[str, list[tuple[int, int]]]:
    """A text that states the facts, and the characters (begin, end) of each fact's value in it.

    Either entity by entity, where a later sentence may say "the town" instead of the name, or all mixed.
    """
    order = list(range(len(facts)))
    rng.shuffle(order)
    grouped = rng.random() < 0.6
    if grouped:
        entities = [facts[order[0]][1]]
        order.sort(key=lambda index: facts[index][1] not in entities)
    text, spans, previous = "", [(0, 0)] * len(facts), ""
    for index in order:
        kind, entity, relation, value = facts[index]
        name = kind.noun if grouped and entity == previous and rng.random() < 0.5 else entity
        previous = entity
        sentence, offset = _state(rng, rng.choice(relation.statements), name, value)
        spans[index] = (len(text) + offset, len(text) + offset + len(value))
        text += f"{sentence}. "
        if rng.random() < 0.08:
            text += f"{rng.choice(FILLERS)} "
    return text.rstrip(), spans


def _state(rng: random.Random, template: str, entity: str, value: str) -> tuple[str, int]:
    """A sentence without its full stop, and where the value begins in it."""
    opening = rng.choice(OPENINGS) if rng.random() < 0.1 else ""
    before, after = template.split("{v}")
    if opening and not template.startswith("{"):
        before = before[0].lower() + before[1:]
    before = (opening + before).replace("{e}", entity)
    sentence = before + value + after.replace("{e}", entity)
    return sentence[0].upper() + sentence[1:], len(before)


@cache
def world_sentiment() -> dict[str, Rows]:
    """Reviews, label 1 where the verdict is good: 1,500 for training, 300 for validation."""
    return _single_splits("sentiment", _review)


@cache
def world_pair() -> dict[str, Rows]:
    """Two sentences, label 1 where they say the same: 1,500 for training, 300 for validation."""
    return _single_splits("pair", _pair)


@cache
def world_translation() -> dict[str, Rows]:
    """English and ``lib.language``: 3,000 sentences for training, 200 for validation, 200 for test, none twice."""
    pairs = [{"source": source, "target": target} for source, target in sentence_pairs(random.Random(SEED), 3400)]
    return {"train": pairs[:3000], "validation": pairs[3000:3200], "test": pairs[3200:]}


def _single_splits(task: str, make: Callable[[Names, int], dict[str, Any]]) -> dict[str, Rows]:
    """Splits with as many rows of each label; no text occurs twice."""
    splits: dict[str, Rows] = {}
    seen: set[str] = set()
    for split, size in {"train": 1500, "validation": 300}.items():
        names = Names(random.Random(f"{SEED} {task} {split}"), unseen=split == "validation")
        splits[split] = []
        while len(splits[split]) < size:
            row = make(names, len(splits[split]) % 2)
            text = str(list(row.values()))
            if text not in seen:
                seen.add(text)
                splits[split].append({**row, "label": len(splits[split]) % 2})
        names.rng.shuffle(splits[split])
        splits[split] = [{"idx": number, **row} for number, row in enumerate(splits[split])]
    return splits


GOOD = "lovely warm generous splendid charming comfortable excellent fine perfect pleasant superb brilliant".split()
BAD = "dreadful cold stingy shabby boring cramped horrible poor ruined tedious awful miserable".split()
ASPECTS = "bread|soup|music|bed|host|view|ferry ride|story|garden|room|market|guide|wine|play|welcome".split("|")
PLAIN = (
    "{x} was {a}",
    "{x} proved {a}",
    "we found {x} {a}",
    "I would call {x} {a}",
    "{x} seemed {a} from first to last",
)
TURNED = (
    "{x} was not {a}",
    "{x} was anything but {a}",
    "{x} was far from {a}",
    "nobody could call {x} {a}",
    "we had been told that {x} was {a}, which was a lie",
    "{x} never once seemed {a}",
)
CONTRAST = (
    "although {weak}, {strong}",
    "{weak}, but {strong}",
    "{strong}, even if {weak}",
    "it is true that {weak}, yet {strong}",
    "that {weak} does not change the fact that {strong}",
)
SETTINGS = ("We stayed at {e}.", "Last spring I went to {e}.", "This is about {e}.", "They sent us to {e}.")


def _review(names: Names, label: int) -> dict[str, Any]:
    """A verdict that the words alone do not give away: the opposite adjective negated, the weaker clause conceded."""
    rng = names.rng
    setting = rng.choice(SETTINGS).replace("{e}", names.entity("town"))
    first, second = rng.sample(ASPECTS, 2)
    verdict = _opinion(names, first, label)
    if rng.random() < 0.7:
        verdict = rng.choice(names.known(CONTRAST)).format(strong=verdict, weak=_opinion(names, second, 1 - label))
    elif rng.random() < 0.5:
        verdict += f", and {_opinion(names, second, label)}"
    return {"sentence1": f"{setting} {verdict[0].upper()}{verdict[1:]}."}


def _opinion(names: Names, aspect: str, good: int) -> str:
    """Some adjectives and wordings occur in validation only."""
    turned = names.rng.random() < 0.4
    adjective = names.rng.choice(names.known(GOOD if bool(good) != turned else BAD, held_out=5))
    return names.rng.choice(names.known(TURNED if turned else PLAIN)).format(x=f"the {aspect}", a=adjective)


def _pair(names: Names, label: int) -> dict[str, Any]:
    """Both sentences share most words. A false second one says another thing of the same entity and value ("pays for"
    instead of "founded"), or swaps pupil and teacher, or carries another value."""
    rng = names.rng
    kind = rng.choice(KINDS)
    relation = rng.choice(kind.relations)
    entity, value = names.entity(kind.name), names.value(relation.value)
    first, second = rng.sample(relation.statements, 2)
    sentence = _fill(first, entity, value)
    if not label:
        others = [other for other in kind.relations if other.value == relation.value and other is not relation]
        if relation.key == "teacher" and rng.random() < 0.5:
            entity, value = value, entity
        elif others and rng.random() < 0.8:
            second = rng.choice(rng.choice(others).statements)
        else:
            value = names.value(relation.value)
    return {"sentence1": f"{sentence}.", "sentence2": f"{_fill(second, entity, value)}."}


def _fill(template: str, entity: str, value: str) -> str:
    text = template.replace("{e}", entity).replace("{v}", value)
    return text[0].upper() + text[1:]
