"""The first stage of KroneckerBERT: learn from the pre-trained encoder on text without labels, then meet the task.

Tahaei et al. 2021 (arXiv:2109.06243, section 3.3) train the factors on a part of Wikipedia before any task: the
outputs of the embeddings and of every layer and the attention scores before the softmax are to be the teacher's. Here
the text is what the profile's tasks ask a model to read.
"""

import copy
from functools import partial
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from lib import model_cost
from lib.batches import in_batches
from lib.compressors import make_compressor
from lib.compressors.kronecker import Kronecker
from lib.config import StudyError
from lib.data import get_task, load_task
from lib.distillation import Distiller, expose_attention_scores
from lib.evaluation import EVAL_BATCH
from lib.kronecker_models import apply_factor_shapes, factor_shapes
from lib.labels import label
from lib.models import base_model, count_parameters, load_model, load_tokenizer
from lib.records import checkpoints_folder
from lib.runs import leave_behind
from lib.settings import Profile
from lib.specs import FactorisationSpec, TextDistillationSpec
from lib.surgery import save_compressed
from lib.training import device, encode, fine_tune, use_bf16


def run_text_distillation(spec: TextDistillationSpec, profile: Profile) -> dict[str, Any]:
    """Compress, train on the teacher alone, measure every term on held-out text; the weights stay behind.

    Returns:
        ``before`` and ``after``: each term of the loss on the tasks' validation text, unweighted; ``training``,
        ``compression`` and ``model`` as in any run.

    Raises:
        StudyError: a distillation that needs labels or logits, which a bare encoder has not.
    """
    settings, distillation = spec.training, spec.distillation
    if distillation.hard or distillation.logits:
        raise StudyError("text distillation: an encoder without a head has no logits; set hard and logits to 0")
    tokenizer = load_tokenizer(spec.encoder)
    rates = (settings.dropout, settings.attention_dropout)
    teacher = load_model(spec.encoder, "encoder", 0, spec.seed, settings.attention, *rates)
    student = copy.deepcopy(teacher)
    compressor = make_compressor(spec.compressor)
    compressor.attach(student)
    if distillation.attention_scores:
        expose_attention_scores(student)
        expose_attention_scores(teacher)
    distiller = Distiller(distillation, teacher)
    train, held_out = (unlabelled(spec, profile, tokenizer, split) for split in ("train", "validation"))
    result: dict[str, Any] = {"train_examples": len(train), "eval_examples": len(held_out)}
    result["before"] = held_out_terms(student, distiller, tokenizer, held_out, settings.precision)
    outcome = fine_tune(
        student, tokenizer, train, settings, spec.seed, checkpoints_folder(profile, spec), compressor, distiller,
        label(spec), profile.training.checkpoint_minutes,
    )  # fmt: skip
    result["after"] = held_out_terms(student, distiller, tokenizer, held_out, settings.precision)
    result["training"] = outcome.model_dump(mode="json")
    student = compressor.finalize(student)
    result["compression"] = compressor.summary()
    result["model"] = {"parameters": count_parameters(student), "size_bytes": model_cost.size_on_disk(student)}
    leave_behind(profile, spec, partial(save_compressed, student, tokenizer))
    return result


def unlabelled(spec: TextDistillationSpec, profile: Profile, tokenizer: PreTrainedTokenizerBase, split: str) -> Dataset:
    """What a split of every task of ``spec`` asks a model to read, without labels, one task after the other."""
    settings, parts = spec.training, []
    for name in spec.tasks:
        task = get_task(name)
        if task.kind == "translation":
            raise StudyError(f"text distillation: task '{name}' is translation; give tasks of one language")
        data = load_task(name, spec.data, profile.data_dir, settings.train_examples, settings.eval_examples)
        features = encode(task, data[split], tokenizer, settings, training=True)
        wanted = [column for column in (*tokenizer.model_input_names, "length") if column in features.column_names]
        parts.append(features.select_columns(wanted))
    return concatenate_datasets(parts)


@torch.no_grad()  # not inference_mode, under which moving a model to a GPU leaves parameters that cannot be trained
def held_out_terms(model: PreTrainedModel, distiller: Distiller, tokenizer: PreTrainedTokenizerBase,
                   features: Dataset, precision: str) -> dict[str, float]:  # fmt: skip
    """Mean of every term of the distillation over ``features``, unweighted."""
    was_training = model.training
    model.eval().to(device())
    distiller.teacher.to(device())
    rows, collate = features.remove_columns("length"), DataCollatorWithPadding(tokenizer)
    totals: dict[str, float] = {}
    for chosen, batch in in_batches(rows, collate, EVAL_BATCH, device()):
        with torch.autocast(device().type, torch.bfloat16, enabled=use_bf16(precision)):
            terms = distiller.terms(model(**batch, **distiller.needs), batch)
        for name, value in terms.items():
            totals[name] = totals.get(name, 0.0) + len(chosen) * float(value)
    model.train(was_training)
    return {name: total / len(rows) for name, total in totals.items()}


def under_head(encoder: PreTrainedModel, model: PreTrainedModel) -> None:
    """Put a trained encoder under the head of ``model``, in place; the pooler stays ``model``'s own.

    Raises:
        StudyError: the encoder's parts are not those of ``model``.
    """
    base = base_model(model)
    apply_factor_shapes(base, factor_shapes(encoder))
    weights = {name: value for name, value in encoder.state_dict().items() if not name.startswith("pooler.")}
    missing, unexpected = base.load_state_dict(weights, strict=False)
    if unexpected or any(not name.startswith("pooler.") for name in missing):
        raise StudyError(f"first stage: {[*unexpected, *missing][0]} does not fit; give both stages one encoder")


def factorisation_errors(spec: FactorisationSpec) -> dict[str, Any]:
    """Per configuration of ``spec``: sizes, factors and mean relative error of every kind of weight."""
    dense = load_model(spec.encoder, "encoder", 0)
    found = {}
    for name, shapes in spec.shapes.items():
        compressor = Kronecker(Kronecker.Settings.model_validate(shapes.model_dump()))
        compressor.attach(copy.deepcopy(dense))
        found[name] = compressor.summary()
    return {"configurations": found}
