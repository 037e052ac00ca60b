"""Conventions of the official SQuAD scripts (worked by hand), GLUE's measures, and BLEU."""

import math
from typing import Any

import numpy as np
import pytest

from lib.metrics import Bleu, Glue, Squad, SquadV2, answer_f1, normalize_answer, score, signature


def gold(name: str, *texts: str) -> dict[str, Any]:
    return {"id": name, "answers": {"text": list(texts), "answer_start": [0] * len(texts)}}


def test_normalisation() -> None:
    assert normalize_answer("  The  Old-Mill, of a 'town'! ") == "oldmill of town"
    assert normalize_answer("theatre another") == "theatre another"


def test_token_f1_counts_repeated_tokens() -> None:
    # 2 common tokens of 3 predicted and 4 expected: F1 = 2 * 2 / 7
    assert answer_f1("red red mill", "red mill blue hill", empty_matches=False) == pytest.approx(4 / 7)
    assert answer_f1("red", "blue", empty_matches=True) == 0


@pytest.mark.parametrize(("task", "f1"), [("squad_v1", 0.0), ("squad_v2", 100.0)])
def test_answers_of_articles_only(task: str, f1: float) -> None:
    """Oracle 17: gold "the", prediction "a": EM 1 in both, F1 0 in v1.1 and 1 in v2.0."""
    result = score(task, {"q": "a"}, [gold("q", "the")])
    assert result["exact_match"] == 100.0 and result["f1"] == f1 == result["score"]


@pytest.mark.parametrize("task", ["squad_v1", "squad_v2"])
def test_missing_prediction_scores_zero(task: str) -> None:
    references = [gold("a", "the old mill"), gold("b", "1871")]
    assert score(task, {"a": "old mill"}, references)["f1"] == 50.0
    assert score(task, {}, references)["score"] == 0.0
    if task == "squad_v2":
        assert score(task, {}, [gold("n")])["score"] == 0.0
        assert score(task, {"n": ""}, [gold("n")])["score"] == 100.0


def test_best_of_several_golds() -> None:
    result = score("squad_v1", {"a": "Anna Krell"}, [gold("a", "Krell", "Anna Krell", "nobody")])
    assert result["f1"] == 100.0 and result["exact_match"] == 100.0
    # 1 common token of 2 and 3: F1 2/5; of 2 and 1: 2/3
    result = score("squad_v1", {"a": "Anna Krell"}, [gold("a", "old Anna Berg", "Krell")])
    assert result["f1"] == pytest.approx(200 / 3) and result["exact_match"] == 0.0


def test_squad_v2_groups_and_empty_answers() -> None:
    references = [gold("a", "1871"), gold("b", "Krell"), gold("n"), gold("m")]
    result = score("squad_v2", {"a": "in 1871", "b": "", "n": "", "m": "1871"}, references)
    assert result["HasAns_f1"] == pytest.approx(100 / 3) and result["HasAns_exact"] == 0.0
    assert result["NoAns_f1"] == result["NoAns_exact"] == 50.0
    assert result["f1"] == pytest.approx(100 * (2 / 3 + 0 + 1 + 0) / 4)


def test_squad_v2_threshold_and_search() -> None:
    references = [gold("a", "1871"), gold("b", "Krell"), gold("n"), gold("m")]
    answers = {"a": "1871", "b": "Krell", "n": "mill", "m": "hill"}
    nulls = {"a": -3.0, "b": 1.0, "n": 0.5, "m": 2.0}
    result = score("squad_v2", answers, references, null_scores=nulls)
    # Threshold 0: only "a" keeps its answer, "b" loses it, both unanswerable questions are right.
    assert result["f1"] == 75.0 and result["HasAns_f1"] == 50.0 and result["NoAns_f1"] == 100.0
    # Answering in order a, n, b, m from 2 right: 3, 2, 3, 2; the first best is kept, at a's own difference.
    assert result["best_f1"] == 75.0 and result["best_f1_thresh"] == -3.0
    nulls["n"] = 1.5
    result = score("squad_v2", answers, references, null_scores=nulls)
    assert result["best_f1"] == 100.0 and result["best_f1_thresh"] == 1.0
    assert score("squad_v2", answers, references, null_scores=nulls, null_threshold=1.0)["f1"] == 100.0
    assert score("squad_v2", answers, references, null_scores=nulls, null_threshold=math.inf)["f1"] == 50.0


def test_search_keeps_everything_unanswered_when_that_is_best() -> None:
    result = score("squad_v2", {"n": "mill", "m": "hill"}, [gold("n"), gold("m")], null_scores={"n": -1.0, "m": -2.0})
    assert result["f1"] == 0.0 and result["best_f1"] == 100.0 and result["best_f1_thresh"] == 0.0


def test_accuracy_and_f1() -> None:
    assert score("sst2", [1, 0, 1, 1], [1, 0, 0, 1])["score"] == 75.0
    result = score("mrpc", np.array([1, 0, 1, 1]), [1, 0, 0, 1])
    assert result["score"] == result["accuracy"] == 75.0 and result["f1"] == pytest.approx(80.0)
    assert score("world_pair", [1, 0], [1, 1])["accuracy"] == 50.0


def test_matthews() -> None:
    # 2 true and 1 false positive, 2 true and 1 false negative: (4 - 1) / 9
    assert score("cola", [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1])["score"] == pytest.approx(100 / 3)
    constant = score("cola", [1, 1, 1], [1, 0, 1])
    assert constant["score"] == 0.0 and constant["constant_prediction"] == 1.0


def test_correlations() -> None:
    result = score("stsb", [1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    # Pearson: covariance 3 over sqrt(14/3 * 2)
    assert result["pearson"] == pytest.approx(100 * 3 / math.sqrt(28 / 3)) and result["spearman"] == pytest.approx(100)
    assert result["score"] == pytest.approx((result["pearson"] + result["spearman"]) / 2)
    assert "constant_prediction" not in result
    constant = score("stsb", np.full(3, 2.5, np.float32), [1.0, 2.0, 3.0])
    assert constant["score"] == constant["pearson"] == 0.0 and constant["constant_prediction"] == 1.0
    broken = score("stsb", [1.0, math.nan, 2.0], [1.0, 2.0, 3.0])
    assert broken["score"] == 0.0 and broken["non_finite_prediction"] == 1.0


def test_bleu() -> None:
    sentences = ["Ein Hund läuft über die Wiese.", "Zwei Männer warten auf den Bus."]
    assert score("multi30k", sentences, sentences)["score"] == pytest.approx(100.0)
    partly = score("world_translation", ["Ein Hund läuft über die Straße.", sentences[1]], sentences)
    assert 50 < partly["bleu"] < 100
    assert "tok:13a" in signature() and signature() == Bleu().compute(predictions=["a"], references=["a"])["signature"]


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="Mismatch"):
        score("sst2", [1, 0], [1, 0, 1])


def test_metric_classes_need_no_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    cache = tmp_path / "cache"
    for metric in (
        Squad(cache_dir=cache),
        SquadV2(cache_dir=cache),
        Glue("rte", cache_dir=cache),
        Bleu(cache_dir=cache),
    ):
        assert metric.keep_in_memory
    assert Glue("rte", cache_dir=cache).compute(predictions=[1, 0], references=[1, 1]) == {"accuracy": 50.0}
    assert not cache.exists()
