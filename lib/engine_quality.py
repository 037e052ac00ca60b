"""Quality of a model as an inference engine runs it: what bf16 or int8 cost in score, not only what they save in time.

An engine's rounding is part of a compression recipe, so a recipe's score is measured through the engine that its
latency is measured on.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from lib.batches import in_batches
from lib.data import Task
from lib.engines import Batch, Prepared, prepare
from lib.evaluation import evaluate_model
from lib.training import TrainingSettings

CALIBRATION_BATCH = 8


class OnEngine(nn.Module):
    """A prepared engine in a model's clothes: called with a batch, it returns logits by their transformers names."""

    def __init__(self, prepared: Prepared, names: Sequence[str]) -> None:
        super().__init__()
        self.prepared, self.names = prepared, tuple(names)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        arrays = self.prepared.run({name: inputs[name] for name in self.prepared.names})
        return {name: torch.from_numpy(array) for name, array in zip(self.names, arrays, strict=True)}


def calibration_batches(tokenizer: PreTrainedTokenizerBase, features: Dataset, examples: int) -> list[Batch]:
    """The first training features as padded batches, for engines that range activations beforehand."""
    wanted = [name for name in tokenizer.model_input_names if name in features.column_names]
    rows, collate = features.select_columns(wanted), DataCollatorWithPadding(tokenizer)
    first = range(min(examples, len(rows)))
    return [batch for _, batch in in_batches(rows, collate, CALIBRATION_BATCH, order=first)]


def quality_on_engine(
    engine: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, data: Dataset,
    features: Dataset, training_features: Dataset, settings: TrainingSettings, threads: int, calibration: int,
    title: str,
) -> dict[str, Any]:  # fmt: skip
    """Metrics of ``model`` on a split, run by ``engine``; with the bytes of the engine's files and what it runs on.

    Args:
        calibration: training examples that engines with calibrated activations see.

    Raises:
        StudyError: the engine is not available, or cannot run the model.
    """
    batches = calibration_batches(tokenizer, training_features, calibration)
    names = ("start_logits", "end_logits") if task.kind == "qa" else ("logits",)
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        prepared = prepare(engine, model, batches[0], threads, batches, Path(folder))
        fp32 = settings.model_copy(update={"precision": "fp32"})  # the engine chooses its own precision
        scores = evaluate_model(OnEngine(prepared, names), tokenizer, task, data, features, fp32, title)
    return scores | {"size_bytes": prepared.size_bytes, "runs_on": prepared.runs_on, "eval_examples": len(data)}
