"""Scores of the study's tasks, as ``evaluate.Metric`` classes that need neither hub nor cache folder.

SQuAD follows the official scripts ``evaluate-v1.1.py`` (Rajpurkar et al. 2016) and ``evaluate-v2.0.py`` (2018), GLUE
the measures of Wang et al. (2018) through scikit-learn and SciPy, translation sacrebleu (Post 2018). All in percent.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from sacrebleu.metrics import BLEU
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lib.data import get_task
from lib.qa import best_null_threshold

ANSWERS = {"text": [Value("string")], "answer_start": [Value("int32")]}
QA_REFERENCE = {"id": Value("string"), "answers": ANSWERS}


class _Local(evaluate.Metric):
    """A metric whose inputs stay in memory, so that it also works where the home directory is read-only."""

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        super().__init__(config_name=config_name, **{"keep_in_memory": True, **kwargs})

    def _build_data_dir(self) -> str:
        return str(self._data_dir_root)

    @staticmethod
    def _describe(description: str, citation: str, features: dict[str, Any]) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=description, citation=citation, features=Features(features))


def normalize_answer(text: str) -> str:
    """Lower case without punctuation, articles and superfluous white space, as both official SQuAD scripts do."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_f1(prediction: str, gold: str, empty_matches: bool) -> float:
    """Token F1 of two answers, 0 to 1.

    Where one of them has no tokens left after normalisation the overlap is 0 in v1.1; v2.0 (``empty_matches``) gives 1
    if both have none.
    """
    found, expected = normalize_answer(prediction).split(), normalize_answer(gold).split()
    if empty_matches and not (found and expected):
        return float(found == expected)
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected)) if common else 0.0


def _best(measure: Callable[[str, str], float], prediction: str | None, golds: Sequence[str]) -> float:
    """The best score over all gold answers; a missing prediction scores 0, also on an unanswerable question."""
    return 0.0 if prediction is None else max((measure(prediction, gold) for gold in golds), default=0.0)


def _exact(prediction: str, gold: str) -> float:
    return float(normalize_answer(prediction) == normalize_answer(gold))


def _percent(scores: Sequence[float]) -> float:
    return 100.0 * float(np.mean(scores)) if len(scores) else 0.0


class Squad(_Local):
    """SQuAD 1.1: ``exact_match`` and ``f1``. A question whose id no prediction carries is missing and scores 0."""

    def _info(self) -> evaluate.MetricInfo:
        prediction = {"id": Value("string"), "prediction_text": Value("string")}
        return self._describe(
            "SQuAD 1.1", "Rajpurkar et al. 2016", {"predictions": prediction, "references": QA_REFERENCE}
        )

    def _compute(self, predictions: list[dict[str, Any]], references: list[dict[str, Any]]) -> dict[str, float]:
        texts = {row["id"]: row["prediction_text"] for row in predictions}
        pairs = [(texts.get(row["id"]), row["answers"]["text"]) for row in references]
        return {
            "exact_match": _percent([_best(_exact, *pair) for pair in pairs]),
            "f1": _percent([_best(lambda a, b: answer_f1(a, b, empty_matches=False), *pair) for pair in pairs]),
        }


class SquadV2(_Local):
    """SQuAD 2.0: ``exact``, ``f1``, both for questions with (``HasAns_``) and without answer (``NoAns_``).

    With ``null_threshold`` an answer whose ``no_answer_probability`` (any score that grows with "no answer") exceeds it
    counts as "". ``search`` adds ``best_f1``, ``best_f1_thresh``, ``best_exact`` and ``best_exact_thresh``, for which
    the predictions should be the best spans, not thresholded already.
    """

    def _info(self) -> evaluate.MetricInfo:
        prediction = {
            "id": Value("string"),
            "prediction_text": Value("string"),
            "no_answer_probability": Value("float64"),
        }
        return self._describe(
            "SQuAD 2.0", "Rajpurkar et al. 2018", {"predictions": prediction, "references": QA_REFERENCE}
        )

    def _compute(
        self,
        predictions: list[dict[str, Any]],
        references: list[dict[str, Any]],
        null_threshold: float | None = None,
        search: bool = False,
    ) -> dict[str, float]:
        texts = {row["id"]: row["prediction_text"] for row in predictions}
        nulls = {row["id"]: row["no_answer_probability"] for row in predictions}
        has_answer = {row["id"]: bool(row["answers"]["text"]) for row in references}
        golds = {row["id"]: [a for a in row["answers"]["text"] if normalize_answer(a)] or [""] for row in references}
        measures = {"exact": _exact, "f1": lambda a, b: answer_f1(a, b, empty_matches=True)}
        result: dict[str, float] = {}
        for key, measure in measures.items():
            raw = {name: _best(measure, texts.get(name), golds[name]) for name in golds}
            scores = dict(raw)
            for name, null in nulls.items():
                if name in scores and null_threshold is not None and null > null_threshold:
                    scores[name] = float(not has_answer[name])
            result[key] = _percent(list(scores.values()))
            for group, wanted in (("HasAns", True), ("NoAns", False)):
                part = [score for name, score in scores.items() if has_answer[name] is wanted]
                if part:
                    result[f"{group}_{key}"] = _percent(part)
            if search:
                given = {name: text or "" for name, text in texts.items()}
                best = best_null_threshold(given, raw, nulls, has_answer)
                result[f"best_{key}"], result[f"best_{key}_thresh"] = best
        return result


GLUE_MEASURES: dict[str, tuple[str, ...]] = {
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "cola": ("matthews",),
}


class Glue(_Local):
    """GLUE's measures for the task named by ``config_name``; accuracy for a task not listed in ``GLUE_MEASURES``.

    A correlation with a constant is undefined: it is reported as 0, with ``constant_prediction`` 1; so is one with
    predictions that are not finite, with ``non_finite_prediction`` 1.
    """

    def _info(self) -> evaluate.MetricInfo:
        kind = Value("float64" if "pearson" in GLUE_MEASURES.get(self.config_name, ()) else "int64")
        return self._describe("GLUE", "Wang et al. 2018", {"predictions": kind, "references": kind})

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        measures = GLUE_MEASURES.get(self.config_name, ("accuracy",))
        if "pearson" in measures:
            return _correlations(np.asarray(predictions), np.asarray(references))
        functions = {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef}
        result = {name: 100.0 * float(functions[name](references, predictions)) for name in measures}
        return result | ({"constant_prediction": 1.0} if len(set(predictions)) == 1 else {})


def _correlations(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation, and their mean, which is GLUE's score of STS-B."""
    note = {}
    pearson = spearman = 0.0
    if not np.isfinite(predictions).all():
        note = {"non_finite_prediction": 1.0}
    elif np.ptp(predictions) == 0 or np.ptp(references) == 0:
        note = {"constant_prediction": 1.0}
    else:
        pearson = 100.0 * float(pearsonr(predictions, references).statistic)
        spearman = 100.0 * float(spearmanr(predictions, references).statistic)
    return {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2, **note}


class Bleu(_Local):
    """Corpus BLEU of detokenised sentences, one reference each, and sacrebleu's ``signature``."""

    def _info(self) -> evaluate.MetricInfo:
        sentence = Value("string")
        return self._describe("sacrebleu", "Post 2018", {"predictions": sentence, "references": sentence})

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | str]:
        bleu = BLEU()
        score = bleu.corpus_score(predictions, [references]).score
        return {"bleu": float(score), "signature": str(bleu.get_signature())}


def score(
    task_name: str,
    predictions: Mapping[str, str] | Sequence[Any] | np.ndarray,
    references: Any,
    null_scores: Mapping[str, float] | None = None,
    null_threshold: float = 0.0,
) -> dict[str, float]:
    """All scores of a task in percent; "score" repeats the main one (``Task.metric``).

    QA takes answers by question id and a data set (or rows) with ``id`` and ``answers``, and gives ``exact_match`` and
    ``f1``; the other tasks take class ids, numbers or sentences in order. ``null_scores`` (``qa.extract_answers``'
    second value, for best spans extracted with ``null_threshold=math.inf``) adds the threshold search of SQuAD 2.0, and
    answers above ``null_threshold`` then count as "". Notes such as ``constant_prediction`` are 1 where they hold.
    """
    task = get_task(task_name)
    if task.kind == "qa":
        assert isinstance(predictions, Mapping)
        result = _score_qa(task.unanswerable, predictions, references, null_scores, null_threshold)
    elif task.kind == "translation":
        result = Bleu().compute(predictions=predictions, references=list(references))
        del result["signature"]
    else:
        metric = Glue("stsb" if task.kind == "regression" else task_name)
        result = metric.compute(predictions=predictions, references=list(references))
    return {"score": result[task.metric], **result}


def _score_qa(
    unanswerable: bool,
    answers: Mapping[str, str],
    references: Any,
    null_scores: Mapping[str, float] | None,
    null_threshold: float,
) -> dict[str, float]:
    golds = [{"id": row["id"], "answers": row["answers"]} for row in references]
    # evaluate wants as many predictions as references: a missing one becomes a row without an id.
    asked = [row["id"] if row["id"] in answers else "" for row in golds]
    rows: list[dict[str, Any]] = [{"id": name, "prediction_text": answers.get(name, "")} for name in asked]
    if not unanswerable:
        return Squad().compute(predictions=rows, references=golds)
    for row in rows:
        row["no_answer_probability"] = (null_scores or {}).get(row["id"], 0.0)
    options = {} if null_scores is None else {"null_threshold": null_threshold, "search": True}
    result = SquadV2().compute(predictions=rows, references=golds, **options)
    return {"exact_match": result.pop("exact"), **result}


def signature() -> str:
    """sacrebleu's description of how ``bleu`` was computed, to be printed beside every BLEU score."""
    return str(Bleu().compute(predictions=["a"], references=["a"])["signature"])
