"""Knowledge distillation: what a student copies from its teacher.

Logits: KL(teacher || student) of the tempered distributions times T^2 (Hinton et al. 2015, section 2), so that its
gradient keeps its size when T changes. Hidden states and attention scores: mean squared error, layer by layer, the
scores taken *before* the softmax (KroneckerBERT, Tahaei et al. 2021, section 3.3).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.models.bert.modeling_bert import eager_attention_forward

from lib.batches import LABELS
from lib.config import StudyError
from lib.quantized_layers import is_quantized
from lib.settings import Strict

SCORES = "study_scores"


class Distillation(Strict):
    """Weights of the terms of the loss; ``hard`` multiplies the labels' cross-entropy.

    ``temperature`` applies to the logits alone. ``hidden_states``, ``attention_scores`` and ``embedding`` need a
    teacher of the student's width and number of heads; layers are matched from the last one backwards at equal spacing.
    ``hidden_states`` compares the outputs of the layers, which are the FFNs' after residual sum and LayerNorm;
    ``embedding`` the output of the embedding layer. Terms that have one value per layer are means over the layers.
    """

    hard: float = Field(default=0.1, ge=0)
    logits: float = Field(default=0.9, ge=0)
    temperature: float = Field(default=2.0, gt=0)
    hidden_states: float = Field(default=0.0, ge=0)
    attention_scores: float = Field(default=0.0, ge=0)
    embedding: float = Field(default=0.0, ge=0)


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch.

    Args:
        student, teacher: (batch, classes), or (batch, 1) for regression, where it is the mean squared error.
    """
    if student.shape[-1] == 1:
        return F.mse_loss(student.float(), teacher.float())
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def masked_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the positions where ``mask`` (broadcastable, 1 = real token) is set."""
    mask = mask.expand_as(student).to(torch.float32)
    return ((student.float() - teacher.float()).square() * mask).sum() / mask.sum().clamp(min=1)


def matched_layers(student: int, teacher: int) -> list[int]:
    """Index of the teacher layer that each student layer copies, last to last, equally spaced.

    Raises:
        StudyError: the teacher has fewer layers than the student.
    """
    if teacher < student:
        raise StudyError(
            f"distillation: the student's {student} layers cannot copy a teacher of {teacher}; "
            "give a teacher with at least as many layers, or distil logits only"
        )
    return [(i + 1) * teacher // student - 1 for i in range(student)]


def _scores_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Eager attention that hands out the scores before the softmax where others hand out probabilities."""
    output, _ = eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    return output, torch.matmul(query, key.transpose(2, 3)) * scale


def expose_attention_scores(model: PreTrainedModel) -> None:
    """Make ``output_attentions=True`` return pre-softmax scores, (batch, heads, length, length) per layer.

    Raises:
        StudyError: an architecture (XLNet) whose attention cannot be exchanged.
    """
    if model.config.model_type == "xlnet":
        raise StudyError("attention-score distillation: XLNet's attention cannot be exchanged; use hidden states")
    if is_quantized(model):
        raise StudyError("attention-score distillation: a quantised model has its own; use hidden states")
    AttentionInterface.register(SCORES, _scores_forward)
    AttentionMaskInterface.register(SCORES, eager_mask)
    model.set_attn_implementation(SCORES)


class Distiller:
    """Runs the teacher beside the student and adds up the terms of ``Distillation``."""

    def __init__(self, settings: Distillation, teacher: nn.Module) -> None:
        self.settings = settings
        self.teacher = teacher.eval().requires_grad_(False)

    @property
    def needs(self) -> dict[str, bool]:
        """Keyword arguments that the student's forward pass has to be called with."""
        return {
            "output_hidden_states": self.settings.hidden_states > 0 or self.settings.embedding > 0,
            "output_attentions": self.settings.attention_scores > 0,
        }

    def loss(self, student_output, hard_loss: Tensor | None, inputs: dict[str, Tensor]) -> Tensor:
        """Total loss of one batch.

        Args:
            student_output: the student's output, called with ``needs``.
            hard_loss: scalar, the task loss on the labels; None where there are none (``hard`` is 0 then).
            inputs: what the student was called with; labels are not shown to the teacher.
        """
        hard = {} if hard_loss is None else {"hard": hard_loss}
        terms = hard | self.terms(student_output, inputs)
        return sum(getattr(self.settings, name) * value for name, value in terms.items())

    def terms(self, student_output, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms of one batch that have a weight, before it is applied, by their names in ``Distillation``."""
        settings, terms = self.settings, dict[str, Tensor]()
        unlabelled = {k: v for k, v in inputs.items() if k not in LABELS}
        with torch.no_grad():
            teacher_output = self.teacher(**unlabelled, **self.needs)
        if settings.logits:
            pairs = [
                logit_loss(student_output[name], teacher_output[name], settings.temperature)
                for name in ("logits", "start_logits", "end_logits")
                if name in student_output
            ]
            terms["logits"] = sum(pairs) / len(pairs)  # type: ignore[assignment]
        mask = inputs["attention_mask"]
        if settings.hidden_states:
            states = student_output.hidden_states[1:], teacher_output.hidden_states[1:]
            terms["hidden_states"] = _layerwise(*states, mask[:, :, None])
        if settings.attention_scores:
            both = mask[:, None, :, None] * mask[:, None, None, :]
            terms["attention_scores"] = _layerwise(student_output.attentions, teacher_output.attentions, both)
        if settings.embedding:
            first = student_output.hidden_states[:1], teacher_output.hidden_states[:1]
            terms["embedding"] = _layerwise(*first, mask[:, :, None])
        return terms


def _layerwise(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    matched = matched_layers(len(student), len(teacher))
    if student[0].shape != teacher[0].shape:
        raise StudyError(
            f"distillation: student states {tuple(student[0].shape)} and teacher states {tuple(teacher[0].shape)} "
            "differ in shape; distil logits only"
        )
    return sum(masked_mse(s, teacher[j], mask) for s, j in zip(student, matched, strict=True)) / len(student)  # type: ignore[return-value]
