"""The embedded corpus: deterministic, answers at their offsets, disjoint splits, no shortcut to a label."""

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from lib import corpus, language
from lib.config import ROOT
from lib.world import BEASTS, BUILDINGS, EVENTS, GROUPS, KINDS, Names

TASKS = ("world_qa", "world_qa2", "world_sentiment", "world_pair", "world_translation")


def splits(task: str) -> dict[str, list[dict[str, Any]]]:
    return getattr(corpus, task)()


def test_another_process_generates_the_same() -> None:
    """Neither hash randomisation nor call order may change the corpus: records name its digest."""
    code = (
        "import hashlib, json; from lib import corpus; "
        f"print(*[hashlib.sha256(json.dumps(getattr(corpus, t)()).encode()).hexdigest() for t in {TASKS[::-1]}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    here = [hashlib.sha256(json.dumps(splits(task)).encode()).hexdigest() for task in TASKS[::-1]]
    assert done.stdout.split() == here


@pytest.mark.parametrize(
    ("task", "sizes"),
    [
        ("world_qa", {"train": 1800, "validation": 300}),
        ("world_qa2", {"train": 1800, "validation": 300}),
        ("world_sentiment", {"train": 1500, "validation": 300}),
        ("world_pair", {"train": 1500, "validation": 300}),
        ("world_translation", {"train": 3000, "validation": 200, "test": 200}),
    ],
)
def test_sizes(task: str, sizes: dict[str, int]) -> None:
    assert {split: len(rows) for split, rows in splits(task).items()} == sizes


@pytest.mark.parametrize("task", ["world_qa", "world_qa2"])
def test_answers_stand_at_their_offsets(task: str) -> None:
    for rows in splits(task).values():
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            assert "{" not in row["context"] + row["question"]
            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
                assert row["context"][start : start + len(text)] == text


def test_passages_are_of_moderate_length_and_varied() -> None:
    rows = splits("world_qa")["train"]
    words = [len(row["context"].split()) for row in rows]
    assert min(words) >= 40 and max(words) <= 120 and 55 <= sum(words) / len(words) <= 100
    assert len({row["question"] for row in rows}) > 0.9 * len(rows)
    assert sum(" " in row["answers"]["text"][0] for row in rows) > 0.4 * len(rows)


def test_questions_differ_from_the_statement_that_answers_them() -> None:
    for kind in KINDS:
        for relation in kind.relations:
            assert len(relation.questions) == 4 and len(relation.statements) == 3
            texts = [*relation.questions, *relation.statements]
            assert len(set(texts)) == len(texts) and all(text.count("{e}") == 1 for text in texts)
            assert all(text.count("{v}") == 1 for text in relation.statements)
            assert not any("{v}" in text for text in relation.questions)


def test_every_answer_has_a_rival_of_its_kind() -> None:
    """Three relations are told of both entities, so the kind of an answer alone seldom finds it."""
    for seed in range(20):
        names = Names(random.Random(seed), unseen=False)
        facts, missing = corpus._facts(names)
        told = Counter(relation.key for _, _, relation, _ in facts)
        assert sorted(told.values()) == [1, 1, 2, 2, 2]
        stated = {(entity, relation.key) for _, entity, relation, _ in facts}
        for _, entity, relation, _ in missing:
            assert (entity, relation.key) not in stated and told[relation.key] == 1


def test_unanswerable_share() -> None:
    for rows in splits("world_qa2").values():
        assert 0.25 < sum(not row["answers"]["text"] for row in rows) / len(rows) < 0.42
    assert all(row["answers"]["text"] for rows in splits("world_qa").values() for row in rows)


def test_splits_share_no_passage_and_no_invented_name() -> None:
    for task in ("world_qa", "world_qa2"):
        train, validation = splits(task).values()
        assert not {row["context"] for row in train} & {row["context"] for row in validation}
        names = [{word for row in rows for word in row["title"].split()} for rows in (train, validation)]
        ordinary = {"Upper", "Lower", "New", "Old", *GROUPS, *EVENTS, *BUILDINGS, *BEASTS}
        assert not names[0] & names[1] - ordinary


def test_validation_asks_questions_that_training_never_asks() -> None:
    last = [re.escape(r.questions[-1]).replace(r"\{e\}", ".+") for kind in KINDS for r in kind.relations]
    held_out = re.compile("|".join(f"^{pattern}$" for pattern in last))
    train, validation = splits("world_qa").values()
    assert sum(bool(held_out.match(row["question"])) for row in validation) > 0.1 * len(validation)
    assert not any(held_out.match(row["question"]) for row in train)


@pytest.mark.parametrize("task", ["world_sentiment", "world_pair"])
def test_labels_are_balanced_and_texts_unique(task: str) -> None:
    seen: set[str] = set()
    for rows in splits(task).values():
        assert sum(row["label"] for row in rows) * 2 == len(rows)
        assert [row["idx"] for row in rows] == list(range(len(rows)))
        texts = {str([value for key, value in row.items() if key.startswith("sentence")]) for row in rows}
        assert len(texts) == len(rows) and not texts & seen
        seen |= texts


def word_count_accuracy(train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> float:
    """Accuracy of word counts alone."""

    def text(row: dict[str, Any]) -> str:
        return row["sentence1"] + " / " + row.get("sentence2", "")

    vectorizer = CountVectorizer()
    model = LogisticRegression(max_iter=500).fit(
        vectorizer.fit_transform(map(text, train)), [row["label"] for row in train]
    )
    return model.score(vectorizer.transform(map(text, validation)), [row["label"] for row in validation])


@pytest.mark.parametrize(("task", "bound"), [("world_sentiment", 0.75), ("world_pair", 0.6)])
def test_word_counts_do_not_give_the_label_away(task: str, bound: float) -> None:
    assert word_count_accuracy(*splits(task).values()) < bound


def test_translation_rules_by_hand() -> None:
    stem, article = language.STEMS, language.ARTICLE_ENDINGS
    subject = language.Phrase("the", "old", "", "weaver", False)
    thing = language.Phrase("the", "", "oak", "barrel", True)
    clause = language.Clause(subject, "sell", thing, None, past=True, negated=True)
    english = language._english(clause, "today", "", None)
    assert english == "Today, the old weaver did not sell the oak barrels."
    he = article["subject"][language.GENDERS["weaver"]]
    expected = [
        stem["today"].capitalize(),
        f"{stem['have']}it",
        f"{stem['the']}{he} {stem['old']}{he} {stem['weaver']}",
        f"{stem['the']}{article['object'][3]} {stem['barrel']}s{stem['oak']}une",
        stem["not"],
        f"ge{stem['sell']}to.",
    ]
    assert language._translated(clause, "today", "", None) == " ".join(expected)
    side = language.Clause(thing, "find", subject, ("near", subject), past=False, negated=False)
    words = language._translated(clause, "", "because", side).split()
    assert words[-1] == f"{stem['find']}en." and f"ge{stem['sell']}to," in words
    assert words[words.index(f"ge{stem['sell']}to,") + 1] == stem["because"]


def test_translation_is_regular_and_splits_are_disjoint() -> None:
    assert len(set(language.STEMS.values())) == len(language.STEMS)
    rows = [row for part in splits("world_translation").values() for row in part]
    assert len({row["source"] for row in rows}) == len({row["target"] for row in rows}) == len(rows)
    known = {word.lower().strip(".,") for row in splits("world_translation")["train"] for word in row["target"].split()}
    asked = [word.lower().strip(".,") for row in splits("world_translation")["test"] for word in row["target"].split()]
    assert sum(word not in known for word in asked) < 0.02 * len(asked)
