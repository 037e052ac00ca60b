"""Quality of a model on a split: its logits for every feature, and the task's metrics of them."""

import math
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lib import metrics, qa
from lib.batches import in_batches
from lib.data import Task
from lib.progress import Progress
from lib.training import TrainingSettings, device, use_bf16

EVAL_BATCH = 64


@torch.no_grad()  # not inference_mode, under which moving a model to a GPU leaves parameters that cannot be trained
def predict(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, features: Dataset, bf16: bool,
            title: str = "evaluating") -> list[list[np.ndarray]]:  # fmt: skip
    """All logits of a model, in the order of ``features``: one list of (tokens or labels,) arrays per output.

    Batches are made of features of similar length, so padding costs little.
    """
    model.eval().to(device())
    wanted = [name for name in tokenizer.model_input_names if name in features.column_names]
    rows = features.select_columns(wanted)
    order = np.argsort(features["length"], kind="stable")[::-1].tolist()
    collate, progress = DataCollatorWithPadding(tokenizer), Progress(title, len(features))
    outputs: list[list[np.ndarray | None]] = []
    done = 0
    for chosen, batch in in_batches(rows, collate, EVAL_BATCH, device(), order):
        with torch.autocast(device().type, torch.bfloat16, enabled=bf16):
            output = model(**batch)
        logits = [output[k] for k in ("logits", "start_logits", "end_logits") if k in output]
        outputs = outputs or [[None] * len(features) for _ in logits]
        masks = batch["attention_mask"].cpu().numpy().astype(bool)
        per_token = "start_logits" in output
        for store, values in zip(outputs, logits, strict=True):
            for i, row, real in zip(chosen, values.float().cpu().numpy(), masks, strict=True):
                store[i] = row[real] if per_token else row
        done += len(chosen)
        progress.update(done)
    progress.close()
    return outputs  # type: ignore[return-value]


def evaluate_model(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, dataset: Dataset,
                   features: Dataset, settings: TrainingSettings,
                   title: str = "evaluating") -> dict[str, Any]:  # fmt: skip
    """Metrics of a model on a split, in percent; ``score`` is the task's main one.

    Args:
        features: ``encode`` of ``dataset``, with ``training=False``.
    """
    logits = predict(model, tokenizer, features, use_bf16(settings.precision), title)
    if task.kind == "qa":
        starts, ends = logits
        answers, null_scores = qa.extract_answers(
            dataset, features, starts, ends, null_threshold=math.inf, unanswerable=task.unanswerable
        )
        return metrics.score(task.name, answers, dataset, null_scores if task.unanswerable else None)
    values = np.stack(logits[0])
    predictions = values[:, 0] if task.kind == "regression" else values.argmax(-1)
    return metrics.score(task.name, predictions.tolist(), dataset["label"])
