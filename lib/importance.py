"""How important each head and unit of a fine-tuned model is, measured with its gates (McCarley et al. 2019).

Gain: mean over examples of |dL/d gate| at gate = 1, which estimates the change of the loss when the gate closes
(Michel, Levy and Neubig 2019, Eq. 2 and following). The absolute value is taken for every example, before the mean:
taken later, effects of opposite sign would cancel and the ranking differ. Leave-one-out: the score that is lost when
one head is closed.
"""

from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from lib.batches import LABELS, in_batches
from lib.config import StudyError
from lib.data import Task
from lib.evaluation import evaluate_model
from lib.gates import GateKind, Gates, gate_shapes
from lib.progress import Progress
from lib.training import TrainingSettings, device, use_bf16

BATCH = 16


def gate_gradients(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], kinds: tuple[GateKind, ...] = ("heads", "units"),
    bf16: bool = False,
) -> dict[str, list[list[float]]]:  # fmt: skip
    """Mean over examples of |dL/d gate|, per layer and gate, of a model in eval mode.

    Args:
        batches: with labels; the loss is the mean over a batch's examples.

    Raises:
        StudyError: no batch was given.
    """
    model.eval()
    gates, shapes = Gates(model, kinds), {kind: gate_shapes(model, kind) for kind in kinds}
    total = {kind: [torch.zeros(size, dtype=torch.float64) for size in sizes] for kind, sizes in shapes.items()}
    examples, trainable = 0, [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)  # the gates' gradients alone
    try:
        for batch in batches:
            size, where = len(batch["input_ids"]), batch["input_ids"].device
            gates.values = {
                kind: [torch.ones(size, n, device=where, requires_grad=True) for n in sizes]
                for kind, sizes in shapes.items()
            }
            with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
                loss = size * model(**batch).loss  # so that each example's share is its own loss
            flat = [gate for kind in kinds for gate in gates.values[kind]]
            sums = iter(gradient.abs().sum(0).double().cpu() for gradient in torch.autograd.grad(loss, flat))
            for kind in kinds:
                for index in range(len(shapes[kind])):
                    total[kind][index] += next(sums)
            examples += size
    finally:
        gates.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
    if not examples:
        raise StudyError("gain: no examples were given; the training set is empty")
    return {kind: [(row / examples).tolist() for row in rows] for kind, rows in total.items()}


def gain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, features: Dataset, precision: str,
         title: str) -> dict[str, Any]:  # fmt: skip
    """Gain of every head and unit on training features; the result of an ``ImportanceSpec``."""
    torch.nn.Module.to(model, device())
    wanted = [name for name in (*tokenizer.model_input_names, *LABELS) if name in features.column_names]
    rows, collate = features.select_columns(wanted), DataCollatorWithPadding(tokenizer)
    progress = Progress(title, len(features))

    def batches() -> Iterable[dict[str, Tensor]]:
        for chosen, batch in in_batches(rows, collate, BATCH, device()):
            yield batch
            progress.update(chosen[-1] + 1)

    found = gate_gradients(model, batches(), bf16=use_bf16(precision))
    progress.close()
    rounded = {kind: [[float(f"{value:.5g}") for value in row] for row in part] for kind, part in found.items()}
    return {"scores": rounded, "examples": len(features)}


def leave_one_out(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, data: Dataset,
                  features: Dataset, settings: TrainingSettings, title: str) -> dict[str, Any]:  # fmt: skip
    """Score lost (points) when one head is closed, for every head; the result of an ``ImportanceSpec``."""
    gates, shapes = Gates(model, ("heads",)), gate_shapes(model, "heads")

    def score(layer: int | None = None, head: int = 0) -> float:
        values = [torch.ones(size, device=device()) for size in shapes]
        if layer is not None:
            values[layer][head] = 0.0
        gates.values = {"heads": values}
        where = "all heads" if layer is None else f"without layer {layer + 1} head {head + 1}"
        return evaluate_model(model, tokenizer, task, data, features, settings, f"{title}, {where}")["score"]

    try:
        full = score()
        lost = [[full - score(layer, head) for head in range(size)] for layer, size in enumerate(shapes)]
    finally:
        gates.remove()
    return {"scores": {"heads": lost}, "full_score": full, "examples": len(data)}
