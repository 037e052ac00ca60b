"""Importance of heads and units: per-example gradients by hand, scores lost by hand, and both through records."""

import copy
from typing import Any

import pytest
import torch
from conftest import padded_batch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lib import experiments, importance
from lib.config import StudyError, load_profile
from lib.data import TASKS, load_task
from lib.evaluation import evaluate_model
from lib.gates import Gates
from lib.importance import gate_gradients
from lib.models import layer_parts, layers, load_model
from lib.plans.structured_qa import importance as importance_spec
from lib.plans.structured_qa import pruned
from lib.runs import ensure
from lib.settings import Profile
from lib.surgery import cut
from lib.training import TrainingSettings, encode

LABELS = {"start_positions": torch.tensor([3, 0, 1]), "end_positions": torch.tensor([7, 2, 2])}


def labelled(architecture: str) -> dict[str, torch.Tensor]:
    return padded_batch(architecture) | LABELS


def rows(batch: dict[str, torch.Tensor], *indices: int) -> dict[str, torch.Tensor]:
    return {name: value[list(indices)] for name, value in batch.items()}


def flat(scores: Any) -> torch.Tensor:
    return torch.tensor([value for layer in scores for value in layer], dtype=torch.float64)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_gain_is_the_mean_of_the_absolute_gradients_of_single_examples(small_model, architecture):
    """By hand from the weights: a gate's gradient is the sum of W_o * dL/dW_o over its columns."""
    model, batch = small_model(architecture).double(), labelled(architecture)
    by_hand: dict[str, list[torch.Tensor]] = {"heads": [], "units": []}
    for example in range(3):
        model.zero_grad()
        model(**rows(batch, example)).loss.backward()
        parts = [layer_parts(layer) for layer in layers(model)]
        for kind, name, size in (("heads", "attention_output", 8), ("units", "ffn_out", 1)):
            linears = [getattr(part, name) for part in parts]
            products = [(linear.weight * linear.weight.grad).sum(0).view(-1, size).sum(1) for linear in linears]
            by_hand[kind].append(torch.cat(products))
    found = gate_gradients(model, [batch])
    for kind, values in by_hand.items():
        mean = torch.stack(values).abs().mean(0)
        assert [len(row) for row in found[kind]] == [4 if kind == "heads" else 48] * 4
        torch.testing.assert_close(flat(found[kind]), mean, atol=1e-7, rtol=0)
        later = torch.stack(values).mean(0).abs()
        assert not torch.allclose(mean, later, rtol=0.05), "where the absolute value is taken must matter"


def test_gain_does_not_depend_on_how_examples_are_batched(small_model):
    model, batch = small_model("bert").double(), labelled("bert")
    whole = gate_gradients(model, [batch])
    for parts in ([(0,), (1,), (2,)], [(2, 0), (1,)]):
        again = gate_gradients(model, [rows(batch, *part) for part in parts])
        for kind in whole:
            torch.testing.assert_close(flat(again[kind]), flat(whole[kind]), atol=1e-7, rtol=0)


def test_gain_of_a_head_that_nobody_hears_is_zero(small_model):
    model = small_model("bert")
    with torch.no_grad():
        layer_parts(layers(model)[2]).attention_output.weight[:, 8:16] = 0.0
        layer_parts(layers(model)[1]).ffn_out.weight[:, 7] = 0.0
    found = gate_gradients(model, [labelled("bert")])
    assert found["heads"][2][1] == 0.0 and found["units"][1][7] == 0.0
    assert sum(value == 0.0 for kind in found.values() for row in kind for value in row) == 2


def test_measuring_leaves_the_model_as_it_was(small_model):
    model, batch = small_model("bert").train(), labelled("bert")
    model.base_model.embeddings.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    gate_gradients(model, [batch])
    with pytest.raises(KeyError):
        gate_gradients(model, [{"wrong": batch["input_ids"]}])
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_layers_that_lost_everything_have_no_scores(small_model):
    model = small_model("bert")
    cut(model, heads=[[0, 1], [], [3], [0]], units=[[], range(48), [4], []])
    found = gate_gradients(model, [labelled("bert")])
    assert [len(row) for row in found["heads"]] == [2, 0, 1, 1]
    assert [len(row) for row in found["units"]] == [0, 48, 1, 0]


def test_nothing_to_measure_on_and_xlnet_are_one_line(small_model):
    with pytest.raises(StudyError, match="gain: no examples were given"):
        gate_gradients(small_model("bert"), [])
    with pytest.raises(StudyError, match="xlnet has no heads known here; use BERT or RoBERTa"):
        gate_gradients(small_model("xlnet"), [labelled("xlnet")])


SETTINGS = TrainingSettings(epochs=1, batch_size=8, learning_rate=1e-3, max_length=64, stride=16, precision="fp32")


def loud(kind: Any) -> PreTrainedModel:
    """A tiny BERT whose layers change what they are given, so that its answers hang on single heads."""
    model = load_model("tiny-bert", kind, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model.eval()


@pytest.fixture(scope="module")
def sentences():
    return load_task("world_sentiment", "embedded", None, 20, 40)


def test_gain_over_features_pads_them_and_rounds_to_five_digits(tokenizer, monkeypatch):
    monkeypatch.setattr(importance, "BATCH", 4)
    data = load_task("world_qa", "embedded", None, 3, 4)
    features = encode(TASKS["world_qa"], data["train"], tokenizer, SETTINGS, training=True)
    assert len(set(features["length"])) > 1 and len(features) > 4
    model = loud("qa")
    result = importance.gain(model, tokenizer, features, "fp32", "gain")
    batches = []
    for start in range(0, len(features), 4):  # [PAD] is 0, as are its mask and type
        part = features[start : start + 4]
        names = ("input_ids", "attention_mask", "token_type_ids")
        padded = {name: pad_sequence([torch.tensor(row) for row in part[name]], batch_first=True) for name in names}
        batches.append(padded | {name: torch.tensor(part[name]) for name in LABELS})
    expected = gate_gradients(model, batches)
    assert result["examples"] == len(features)
    for kind, scores in result["scores"].items():
        torch.testing.assert_close(flat(scores), flat(expected[kind]), rtol=1e-4, atol=0)
        assert all(value == float(f"{value:.5g}") for row in scores for value in row)


def test_leaving_a_head_out_costs_what_a_model_without_it_loses(tokenizer, sentences):
    task, model = TASKS["world_sentiment"], loud("classification")
    data = sentences["validation"]
    features = encode(task, data, tokenizer, SETTINGS, training=False)
    result = importance.leave_one_out(model, tokenizer, task, data, features, SETTINGS, "test")
    lost = result["scores"]["heads"]
    full = evaluate_model(model, tokenizer, task, data, features, SETTINGS)["score"]
    assert result["full_score"] == full and result["examples"] == 40 and [len(row) for row in lost] == [4] * 4
    assert len({value for row in lost for value in row}) > 3, "heads must matter for this test to mean anything"
    for layer, head in ((0, 0), (1, 3), (3, 2)):
        without = copy.deepcopy(model)
        with torch.no_grad():
            layer_parts(layers(without)[layer]).attention_output.weight[:, 8 * head : 8 * head + 8] = 0.0
        score = evaluate_model(without, tokenizer, task, data, features, SETTINGS)["score"]
        assert lost[layer][head] == pytest.approx(full - score), (layer, head)


def test_hooks_are_taken_off_when_leaving_out_is_interrupted(tokenizer, sentences, monkeypatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importance, "evaluate_model", interrupted)
    model = loud("classification")
    with pytest.raises(KeyboardInterrupt):
        importance.leave_one_out(model, tokenizer, TASKS["world_sentiment"], sentences["validation"],
                                 sentences["validation"], SETTINGS, "test")  # fmt: skip
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def profile(profile_file) -> Profile:
    task = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 64, "stride": 16,
            "train_examples": 8, "eval_examples": 8}  # fmt: skip
    return load_profile(profile_file(tasks={"world_qa": task}, **{"structured_pruning.gain_examples": 3}))


def test_importance_is_recorded_once_and_decides(profile, monkeypatch):
    specs = [importance_spec(profile, "world_qa", 0, method) for method in ("gain", "leave_one_out")]
    runs = [pruned(profile, "world_qa", 0, {"heads": 0.5}, method) for method in ("gain", "leave-one-out")]
    assert [run.informed_by for run in runs] == [(spec,) for spec in specs]
    records = ensure([*runs, *specs], profile)
    gain, left_out = records[2:]
    assert gain.spec.kind == "importance" and set(gain["scores"]) == {"heads", "units"} and gain["examples"] >= 3
    assert [len(row) for row in gain["scores"]["units"]] == [64] * 4 and flat(gain["scores"]["units"]).min() > 0
    assert set(left_out["scores"]) == {"heads"} and left_out["examples"] == 4
    assert 0 <= left_out["full_score"] <= 100 and [len(row) for row in left_out["scores"]["heads"]] == [4] * 4
    chosen = sorted(flat(gain["scores"]["heads"]).argsort(descending=True)[:8].tolist())
    kept = records[0]["compression"]["kept"]["heads"]
    assert [4 * layer + head for layer, heads in enumerate(kept) for head in heads] == chosen
    monkeypatch.setattr(experiments, "execute", lambda *_: pytest.fail("something was computed again"))
    assert list(ensure([*runs, *specs], profile)) == list(records)


@pytest.mark.parametrize("method", ["gain", "leave_one_out"])
def test_importance_of_xlnet_is_one_line(profile, small_model, tokenizer, monkeypatch, method):
    monkeypatch.setattr(experiments, "finished_model", lambda *_: (small_model("xlnet"), tokenizer))
    with pytest.raises(StudyError, match="xlnet has no heads known here; use BERT or RoBERTa") as caught:
        ensure([importance_spec(profile, "world_qa", 0, method)], profile)
    assert "\n" not in str(caught.value)


def test_a_gate_of_one_is_no_gate(small_model):
    """What gain differentiates at: all gates open, one for every example."""
    model, batch = small_model("bert"), padded_batch("bert")
    with torch.no_grad():
        plain = model(**batch).start_logits
        gates = Gates(model, ("heads", "units"))
        gates.values = {"heads": [torch.ones(3, 4)] * 4, "units": [torch.ones(3, 48)] * 4}
        assert torch.equal(model(**batch).start_logits, plain)
