"""Which heads, FFN units or embedding dimensions stay, by a score of each, and how the others are taken out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.config import StudyError
from lib.gates import GateKind, fold_gates, gate_shapes, head_size
from lib.models import layer_parts, layers
from lib.surgery import cut

Scores = list[list[float]]  # per layer, one number per gate; higher stays longer


def keep_best(scores: Scores, density: float) -> list[list[int]]:
    """Indices that stay when the best ``density`` of all gates, ranked over all layers together, are kept.

    The number kept is round(density * gates); among equal scores the earlier layer and index stays.

    Raises:
        StudyError: a density outside 0 to 1, or scores that are not finite numbers.
    """
    check_density(density)
    values = [math.nan if value is None else value for layer in scores for value in layer]  # a record's null
    flat = torch.tensor(values, dtype=torch.float64)
    if not torch.isfinite(flat).all():
        raise StudyError("structured pruning: some scores are not finite; the run that measured them failed")
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[torch.argsort(-flat, stable=True)[: round(density * len(flat))]] = True
    rows = kept.split([len(layer) for layer in scores])
    return [row.nonzero().flatten().tolist() for row in rows]


def check_density(density: float) -> None:
    """Raise unless ``density`` is a share."""
    if not 0 <= density <= 1:
        raise StudyError(f"structured pruning: density {density} is impossible; give 0 (none kept) to 1 (all kept)")


@torch.no_grad()
def magnitude(model: PreTrainedModel, kind: GateKind) -> Scores:
    """Euclidean norm of all weights that belong to a head or unit: the naive baseline."""
    size, result = head_size(model), []
    for layer in layers(model):
        parts = layer_parts(layer)
        inward = [parts.query, parts.key, parts.value] if kind == "heads" else [parts.ffn_in]
        outward = parts.attention_output if kind == "heads" else parts.ffn_out
        squares = sum((linear.weight.square().sum(1) for linear in inward), outward.weight.square().sum(0))
        per_gate = squares.view(-1, size if kind == "heads" else 1).sum(1)
        result.append(per_gate.sqrt().tolist())
    return result


def check_kinds(model: PreTrainedModel, kinds: Sequence[GateKind]) -> None:
    """Raise unless the model has gates of every kind, each in the parts that this study knows."""
    for layer in layers(model):
        layer_parts(layer)
    for kind in kinds:
        gate_shapes(model, kind)


def target_density(progress: float, density: float, reached: float = 0.7) -> float:
    """Density that the penalty aims at: 1 at the start, cubic down to ``density`` at progress ``reached``."""
    remaining = max(0.0, 1 - progress / reached)
    return density + (1 - density) * remaining**3


def kept_masks(kept: Sequence[Sequence[int]], scores: Scores) -> list[Tensor]:
    """1 for what stays and 0 for what goes, per layer (gates,)."""
    masks = [torch.zeros(len(row)) for row in scores]
    for mask, indices in zip(masks, kept, strict=True):
        mask[list(indices)] = 1.0
    return masks


def remove(model: PreTrainedModel, kept: Mapping[str, Sequence[Sequence[int]]],
           factors: Mapping[str, Sequence[Tensor]]) -> None:  # fmt: skip
    """Fold gates into the weights and cut out the heads and units that are not kept; embeddings keep their width."""
    device = next(model.parameters()).device
    fold_gates(model, {kind: [factor.to(device) for factor in rows] for kind, rows in factors.items()})
    cut(model, kept.get("heads"), kept.get("units"))


def density_of(kept: Sequence[Sequence[int]], scores: Scores) -> float:
    """Share of the gates that ``scores`` counts which are kept."""
    return sum(map(len, kept)) / sum(map(len, scores))


def kept_summary(kept: Mapping[str, list[list[int]]]) -> dict[str, Any]:
    """What the record says of the kept gates: which heads, but of the many units only how many per layer."""
    return {kind: rows if kind == "heads" else [len(row) for row in rows] for kind, rows in kept.items()}
