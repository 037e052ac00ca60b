"""Distillation (oracle check 16): the terms against hand sums, padding left out, scores before the softmax."""

import copy
import math

import pytest
import torch
from conftest import padded_batch

from lib.config import StudyError
from lib.distillation import (
    Distillation,
    Distiller,
    expose_attention_scores,
    logit_loss,
    masked_mse,
    matched_layers,
)
from lib.models import layers
from lib.surgery import drop_layers


def softened(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.5])
def test_logit_loss_is_the_hand_sum(temperature):
    student = [[1.0, -2.0, 0.5], [0.0, 3.0, 3.0]]
    teacher = [[2.0, 0.0, -1.0], [1.0, 1.0, -4.0]]
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        q, p = softened(ours, temperature), softened(theirs, temperature)
        total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    found = logit_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    assert found.item() == pytest.approx(total / 2 * temperature**2, rel=1e-5)


def test_logit_loss_is_zero_only_for_equal_distributions():
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    assert logit_loss(logits, logits, 2.0).item() == pytest.approx(0, abs=1e-7)
    assert logit_loss(logits, logits + 3, 2.0).item() == pytest.approx(0, abs=1e-6)
    assert logit_loss(logits, logits.flip(1), 2.0).item() > 0.1


def test_the_gradient_keeps_its_size_when_the_temperature_grows():
    teacher, sizes = torch.tensor([[0.3, -0.2, 0.1]]), []
    for temperature in (10.0, 100.0):
        student = torch.zeros(1, 3, requires_grad=True)
        logit_loss(student, teacher, temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_regression_is_the_mean_squared_error():
    assert logit_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [1.0]]), 2.0).item() == pytest.approx(2.5)


def test_masked_mse_ignores_padding():
    student, teacher = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    teacher[0, 0], teacher[1, 2] = 2.0, 1e9
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])[:, :, None]
    assert masked_mse(student, teacher, mask).item() == pytest.approx(4 * 4 / (5 * 4))
    assert masked_mse(student, teacher, torch.zeros(2, 3, 1)).item() == 0


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (6, 12, [1, 3, 5, 7, 9, 11]),
        (4, 12, [2, 5, 8, 11]),
        (1, 4, [3]),
        (5, 6, [0, 1, 2, 3, 5]),
    ],
)
def test_layers_are_matched_last_to_last(student, teacher, expected):
    assert matched_layers(student, teacher) == expected


def test_a_teacher_with_fewer_layers_is_one_line(small_model):
    with pytest.raises(StudyError, match=r"student's 6 layers cannot copy a teacher of 5; .*distil logits only"):
        matched_layers(6, 5)
    student, teacher, batch = small_model("bert"), small_model("bert"), padded_batch("bert")
    drop_layers(teacher, {4})
    with pytest.raises(StudyError, match="student's 4 layers cannot copy a teacher of 3"):
        total(Distillation(hidden_states=1.0), student, teacher, batch)
    assert total(Distillation(hard=0.0), student, teacher, batch).item() > 1e-3, "logits need no matching layers"


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_exposed_scores_are_those_before_the_softmax(small_model, architecture):
    plain, batch = small_model(architecture), padded_batch(architecture)
    exposed = copy.deepcopy(plain)
    expose_attention_scores(exposed)
    with torch.no_grad():
        expected, found = plain(**batch, output_attentions=True), exposed(**batch, output_attentions=True)
    torch.testing.assert_close(found.start_logits, expected.start_logits, atol=1e-6, rtol=1e-6)
    assert len(found.attentions) == 4 and found.attentions[0].shape == (3, 4, 9, 9)
    for scores, probabilities in zip(found.attentions, expected.attentions, strict=True):
        assert (scores.sum(-1) - 1).abs().max() > 0.5, "these are probabilities already"
        for row, length in enumerate((9, 6, 3)):
            torch.testing.assert_close(
                scores[row, :, :length, :length].softmax(-1), probabilities[row, :, :length, :length],
                atol=1e-6, rtol=1e-5,
            )  # fmt: skip


def test_xlnets_scores_cannot_be_had(small_model):
    with pytest.raises(StudyError, match="XLNet's attention cannot be exchanged; use hidden states"):
        expose_attention_scores(small_model("xlnet"))


def total(settings: Distillation, student, teacher, batch, hard: float = 2.0) -> torch.Tensor:
    distiller = Distiller(settings, teacher)
    return distiller.loss(student(**batch, **distiller.needs), torch.tensor(hard), batch)


def test_only_the_hard_loss_is_left_when_student_and_teacher_agree(small_model):
    teacher = small_model("bert")
    expose_attention_scores(teacher)
    student = copy.deepcopy(teacher)
    settings = Distillation(hard=0.5, logits=0.9, hidden_states=3.0, attention_scores=7.0)
    assert total(settings, student, teacher, padded_batch("bert")).item() == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():
        layers(student)[3].output.dense.weight *= -1
    for only in ({"logits": 1.0}, {"hidden_states": 1.0}):
        settings = Distillation(**{"hard": 0.0, "logits": 0.0, **only})
        assert total(settings, student, teacher, padded_batch("bert")).item() > 1e-3, only


def test_terms_are_the_weighted_hand_sum(small_model):
    """A student of layers 2 and 4: its states are compared with those of the teacher's layers 2 and 4."""
    teacher, batch = small_model("bert"), padded_batch("bert")
    expose_attention_scores(teacher)
    student = copy.deepcopy(teacher)
    drop_layers(student, {1, 3})
    settings = Distillation(hard=0.25, logits=0.5, temperature=3.0, hidden_states=2.0, attention_scores=0.125)
    with torch.no_grad():
        flags = {"output_hidden_states": True, "output_attentions": True}
        ours, theirs = student(**batch, **flags), teacher(**batch, **flags)
        soft = (logit_loss(ours.start_logits, theirs.start_logits, 3.0)
                + logit_loss(ours.end_logits, theirs.end_logits, 3.0)) / 2  # fmt: skip
        mask, hidden, scores = batch["attention_mask"].float(), 0.0, 0.0
        for mine, other in ((0, 1), (1, 3)):
            squares = (ours.hidden_states[mine + 1] - theirs.hidden_states[other + 1]).square().mean(-1)
            hidden += (squares * mask).sum() / mask.sum() / 2
            pairs = mask[:, :, None] * mask[:, None, :]
            squares = (ours.attentions[mine] - theirs.attentions[other]).square().mean(1)
            scores += (squares * pairs).sum() / pairs.sum() / 2
        expected = 0.25 * 2.0 + 0.5 * soft + 2.0 * hidden + 0.125 * scores
        assert min(soft, hidden, scores) > 1e-3
        assert total(settings, student, teacher, batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_teacher_learns_nothing_and_sees_no_labels(small_model):
    teacher, student = small_model("bert").train(), small_model("bert")
    drop_layers(student, {4})
    seen = {}
    teacher.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    batch = padded_batch("bert") | dict.fromkeys(("start_positions", "end_positions"), torch.ones(3, dtype=torch.long))
    total(Distillation(), student, teacher, batch).backward()
    assert set(seen) == {"input_ids", "attention_mask", "output_hidden_states", "output_attentions"}
    assert not teacher.training and all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())


def test_states_of_another_width_are_one_line(small_model, tiny_bert):
    student, teacher = small_model("bert"), tiny_bert
    narrow = copy.deepcopy(student.config)
    narrow.hidden_size, narrow.num_attention_heads = 16, 2
    student = type(student)(narrow)
    with pytest.raises(StudyError, match=r"student states \(3, 9, 16\) and teacher states \(3, 9, 32\) differ"):
        total(Distillation(hidden_states=1.0), student, teacher, padded_batch("bert"))


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"hard": -1}, {"logit": 1}])
def test_impossible_settings(settings):
    with pytest.raises(ValueError, match="1 validation error"):
        Distillation(**settings)
