"""Upstream pruning: prune during masked language modelling, then transfer to tasks (Kurtic et al. 2022, section 4.2).

The text is a task's own, without its labels: contexts of a question-answering task, sentences of any other. Masks are
drawn once per copy of the text (static masking, Devlin et al. 2018, section 3.1), so a resumed run sees the same ones.
The language model's head is evaluated at masked positions alone, which is where its loss is.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, DataCollatorForTokenClassification, PreTrainedTokenizerBase
from transformers.modeling_outputs import MaskedLMOutput

from lib import model_cost
from lib.batches import TrainingData, in_batches
from lib.compressors import Compressor, make_compressor
from lib.config import StudyError
from lib.data import Task, get_task, load_task
from lib.distillation import Distiller, logit_loss
from lib.evaluation import EVAL_BATCH
from lib.labels import label
from lib.models import encoder_source, load_config, load_tokenizer
from lib.problems import first_line
from lib.records import checkpoints_folder
from lib.runs import ensure_weights, leave_behind
from lib.settings import Profile
from lib.specs import UpstreamSpec
from lib.training import TrainingSettings, device, fine_tune, use_bf16

IGNORED = -100


class MaskedLM(BertForMaskedLM):
    """BERT under its language-modelling head; logits are (masked tokens, vocabulary)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor,
                token_type_ids: Tensor | None = None, **_: Any) -> MaskedLMOutput:  # fmt: skip
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[0]
        masked = labels != IGNORED
        logits = self.cls(states[masked])
        return MaskedLMOutput(loss=F.cross_entropy(logits.float(), labels[masked]), logits=logits)


class MaskedDistiller(Distiller):
    """KL to the teacher at the masked positions, which the teacher, too, knows by the labels."""

    def terms(self, student_output: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        return {"logits": logit_loss(student_output.logits, teacher_logits, self.settings.temperature)}


def load_masked_lm(encoder: str, seed: int, settings: TrainingSettings) -> MaskedLM:
    """The encoder under a language-modelling head, fresh where the checkpoint has none.

    Raises:
        StudyError: an encoder that is not a BERT, or cannot be loaded.
    """
    config = load_config(encoder)
    if not isinstance(config, BertConfig):
        raise StudyError(f"upstream pruning: encoder '{encoder}' is of type '{config.model_type}'; it handles bert")
    config.hidden_dropout_prob, rate = settings.dropout, settings.attention_dropout
    config.attention_probs_dropout_prob = settings.dropout if rate is None else rate
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if encoder == "tiny-bert":
            return MaskedLM._from_config(config, attn_implementation=settings.attention)
        try:
            return MaskedLM.from_pretrained(
                encoder_source(encoder), config=config, attn_implementation=settings.attention, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise StudyError(f"encoder '{encoder}' could not be loaded ({first_line(error)})") from None


def texts(task: Task, split: Dataset) -> list[str]:
    """The different texts of a split in their order, labels and questions left out."""
    columns = [split[column] for column in (("context",) if task.kind == "qa" else task.columns)]
    return list(dict.fromkeys(text for row in zip(*columns, strict=True) for text in row))


def masked_features(lines: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, copies: int,
                    masked: float, seed: int) -> Dataset:  # fmt: skip
    """Windows of at most ``max_length`` tokens, each ``copies`` times with different masks.

    Of the ``masked`` share of a window's tokens, one at least, 80 % become [MASK], 10 % another token, 10 % stay;
    ``labels`` holds the true token there and -100 elsewhere.

    Raises:
        StudyError: no text.
    """
    if not lines:
        raise StudyError("upstream pruning: the task has no text to learn from")
    encoded = tokenizer(
        lines, truncation=True, max_length=max_length, return_overflowing_tokens=True, return_special_tokens_mask=True
    )
    generator, rows = np.random.default_rng(seed), []
    for _ in range(copies):
        for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            places = np.flatnonzero(np.array(special) == 0)
            if not len(places):
                continue
            chosen = generator.permutation(places)[: max(1, round(masked * len(places)))]
            tokens, labels = np.array(ids), np.full(len(ids), IGNORED)
            labels[chosen] = tokens[chosen]
            kind = generator.random(len(chosen))
            tokens[chosen[kind < 0.8]] = tokenizer.mask_token_id
            other = chosen[kind >= 0.9]
            tokens[other] = generator.integers(0, len(tokenizer), len(other))
            rows.append({"input_ids": tokens.tolist(), "attention_mask": [1] * len(ids), "labels": labels.tolist(),
                         "length": len(ids)})  # fmt: skip
    return Dataset.from_list(rows)


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForTokenClassification:
    """Pads inputs, and labels with -100."""
    return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)


def copies_needed(settings: TrainingSettings) -> int:
    """One set of masks per epoch."""
    return max(1, math.ceil(settings.epochs))


@torch.inference_mode()
def evaluate(model: MaskedLM, tokenizer: PreTrainedTokenizerBase, features: Dataset,
             precision: str) -> dict[str, float]:  # fmt: skip
    """``loss`` (nats per masked token) and ``accuracy`` (percent of masked tokens) on held-out text."""
    torch.nn.Module.to(model, device())
    model.eval()
    pad, names = collator(tokenizer), ["input_ids", "attention_mask", "labels"]
    rows, loss, right, total = features.select_columns(names), 0.0, 0, 0
    for _, batch in in_batches(rows, pad, EVAL_BATCH, device()):
        with torch.autocast(device().type, torch.bfloat16, enabled=use_bf16(precision)):
            output = model(**batch)
        truth = batch["labels"][batch["labels"] != IGNORED]
        loss += float(output.loss) * len(truth)
        right += int((output.logits.argmax(-1) == truth).sum())
        total += len(truth)
    return {"loss": loss / total, "accuracy": 100 * right / total}


def run_upstream(spec: UpstreamSpec, profile: Profile) -> dict[str, Any]:
    """Train (and prune) the language model, measure it on held-out text, and keep its weights for sparse transfer."""
    settings, task = spec.training, get_task(spec.task)
    if task.kind == "translation":
        raise StudyError(f"upstream pruning: task '{spec.task}' is translation; take one of an encoder's tasks")
    data = load_task(spec.task, spec.data, profile.data_dir, settings.train_examples, settings.eval_examples)
    tokenizer = load_tokenizer(spec.encoder)
    copies, length = copies_needed(settings), settings.max_length
    train = masked_features(texts(task, data["train"]), tokenizer, length, copies, spec.masked, spec.seed)
    held_out = masked_features(texts(task, data["validation"]), tokenizer, length, 1, spec.masked, 0)
    start = spec.start
    model = finished_upstream(profile, start) if start else load_masked_lm(spec.encoder, spec.seed, settings)
    compressor = make_compressor(spec.compressor) if spec.compressor else Compressor(None)
    compressor.attach(model)
    names = ["input_ids", "attention_mask"]
    compressor.use_data(
        TrainingData(lambda: train, collator(tokenizer), names, spec.seed, device(), use_bf16(settings.precision))
    )
    distiller = None
    if spec.distillation and spec.teacher:
        distiller = MaskedDistiller(spec.distillation, finished_upstream(profile, spec.teacher))
    # ``train`` holds every epoch's masks one after the other, so one pass over it is all of training
    outcome = fine_tune(
        model, tokenizer, train, settings.model_copy(update={"epochs": settings.epochs / copies}),
        spec.seed, checkpoints_folder(profile, spec), compressor, distiller, label(spec),
        profile.training.checkpoint_minutes, collator=collator(tokenizer),
    )  # fmt: skip
    compressor.finalize(model)
    result: dict[str, Any] = {"train_examples": len(train) // copies, "eval_examples": len(held_out)}
    result |= {"training": outcome.model_dump(mode="json")} | evaluate(model, tokenizer, held_out, settings.precision)
    result |= {"model": model_cost.describe(model), "compression": compressor.summary()}

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    leave_behind(profile, spec, save)
    return result


def finished_upstream(profile: Profile, spec: UpstreamSpec) -> MaskedLM:
    """The language model that a run ended with; trained again when its weights have not travelled with its record."""
    return MaskedLM.from_pretrained(upstream_folder(profile, spec), attn_implementation=spec.training.attention)


def upstream_folder(profile: Profile, spec: UpstreamSpec) -> str:
    """Folder of a run's weights, made when missing; ``lib.models.load_model`` puts its encoder under a task head."""
    return str(ensure_weights(profile, spec, lambda: run_upstream(spec, profile)))
