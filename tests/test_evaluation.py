"""Evaluation: logits in the order of the features, and the metrics that a task asks for."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from lib import evaluation, experiments, plans
from lib.batches import in_batches
from lib.config import StudyError, load_profile
from lib.data import TASKS, load_task
from lib.evaluation import evaluate_model, predict
from lib.specs import MajoritySpec
from lib.training import TrainingSettings, encode

SETTINGS = TrainingSettings(epochs=1, batch_size=8, learning_rate=1e-3, max_length=32, precision="fp32")


@pytest.fixture(scope="module")
def data():
    return load_task("world_sentiment", "embedded", None, 45, 20)


@pytest.fixture(scope="module")
def features(data, tokenizer):
    return encode(TASKS["world_sentiment"], data["train"], tokenizer, SETTINGS, training=True)


class Echo(nn.Module):
    """Returns what it was given: the sum of a sequence's tokens, or the tokens themselves."""

    def __init__(self, per_token: bool) -> None:
        super().__init__()
        self.per_token = per_token

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        ids = input_ids.float()
        if self.per_token:
            return {"start_logits": ids, "end_logits": -ids}
        return {"logits": (ids * attention_mask).sum(-1, keepdim=True)}


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_predictions_come_in_the_order_of_the_features(features, tokenizer, monkeypatch, batch):
    """Although batches are made by length, and without the padding of the batch."""
    monkeypatch.setattr(evaluation, "EVAL_BATCH", batch)
    assert len(set(features["length"])) > 3
    (sums,) = predict(Echo(per_token=False), tokenizer, features, bf16=False)
    assert [row.tolist() for row in sums] == [[float(sum(ids))] for ids in features["input_ids"]]
    starts, ends = predict(Echo(per_token=True), tokenizer, features, bf16=False)
    assert [row.tolist() for row in starts] == [[float(i) for i in ids] for ids in features["input_ids"]]
    assert [row.tolist() for row in ends] == [[-float(i) for i in ids] for ids in features["input_ids"]]


class Knowing(nn.Module):
    """Returns given logits for given token ids."""

    def __init__(self, known: dict[tuple[int, ...], list[float]]) -> None:
        super().__init__()
        self.known = known

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        rows = zip(input_ids, attention_mask.bool(), strict=True)
        return {"logits": torch.tensor([self.known[tuple(ids[real].tolist())] for ids, real in rows])}


@pytest.mark.parametrize("order", [None, [4, 0, 3, 1, 2]])
def test_batches_come_in_the_order_asked_for_with_their_indices(order):
    rows = Dataset.from_dict({"value": [0, 10, 20, 30, 40]})
    found = list(
        in_batches(rows, lambda chosen: {"value": torch.tensor([row["value"] for row in chosen])}, 2, "cpu", order)
    )
    assert [len(chosen) for chosen, _ in found] == [2, 2, 1]
    assert [index for chosen, _ in found for index in chosen] == (order or [0, 1, 2, 3, 4])
    assert all(batch["value"].tolist() == [10 * index for index in chosen] for chosen, batch in found)


def test_classes_are_the_largest_logits_and_scores_are_percent(data, tokenizer):
    """Every fourth answer is wrong: 15 of 20 are right."""
    task, validation = TASKS["world_sentiment"], data["validation"]
    encoded = encode(task, validation, tokenizer, SETTINGS, training=False)
    guesses = [label if i % 4 else 1 - label for i, label in enumerate(validation["label"])]
    logits = [[2.0, 1.0] if guess == 0 else [-5.0, -4.0] for guess in guesses]
    known = dict(zip(map(tuple, encoded["input_ids"]), logits, strict=True))
    assert len(known) == 20, "two examples with the same tokens would share their logits"
    found = evaluate_model(Knowing(known), tokenizer, task, validation, encoded, SETTINGS)
    assert found["accuracy"] == found["score"] == pytest.approx(75.0)


def test_a_regression_is_judged_by_its_value(tokenizer):
    """Twice the label plus one correlates perfectly with it, its negative perfectly the other way round."""
    task = TASKS["stsb"]
    numbers = range(20)
    rows = Dataset.from_dict({
        "sentence1": ["It rains."] * 20, "sentence2": [str(i) for i in numbers], "label": [float(i) for i in numbers],
    })  # fmt: skip
    encoded = encode(task, rows, tokenizer, SETTINGS, training=False)
    for sign in (1.0, -1.0):
        known = {tuple(ids): [sign * (2 * i + 1.0)] for i, ids in enumerate(encoded["input_ids"])}
        found = evaluate_model(Knowing(known), tokenizer, task, rows, encoded, SETTINGS)
        assert found["score"] == pytest.approx(sign * 100)


def test_one_label_for_all_is_the_most_frequent_one_of_training(profile_file, monkeypatch):
    profile, splits = load_profile(profile_file()), {"train": [0, 1, 1], "validation": [1, 0, 0, 0]}
    data = {name: Dataset.from_dict({"label": labels}) for name, labels in splits.items()}
    monkeypatch.setattr(experiments, "load_task", lambda *_: data)
    (spec,) = plans.majority(profile)
    assert spec.task == "world_sentiment"
    found = experiments.execute(spec, profile)
    assert found == {"label": 1, "score": 25.0, "accuracy": 25.0, "constant_prediction": 1.0}
    with pytest.raises(StudyError, match=r"world_qa.*no labels to count"):
        experiments.execute(MajoritySpec(task="world_qa", data="embedded"), profile)


def test_no_answer_at_all_scores_the_share_of_questions_without_one(profile_file, monkeypatch):
    answers = [{"text": ["yes"], "answer_start": [0]}, *[{"text": [], "answer_start": []}] * 3]
    rows = Dataset.from_dict({"id": list("abcd"), "answers": answers})
    monkeypatch.setattr(experiments, "load_task", lambda *_: {"validation": rows})
    found = experiments.execute(MajoritySpec(task="squad_v2", data="local"), load_profile(profile_file()))
    assert found["score"] == found["f1"] == 75.0 and found["HasAns_f1"] == 0.0
