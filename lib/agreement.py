"""Does an engine still compute the same model? Asked before anything is timed.

A graph that lost its attention mask, baked in the batch size of its example or quantised a layer to nonsense runs as
fast as a correct one, so every engine's logits are compared with PyTorch fp32 on batches of several shapes.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from lib.config import StudyError
from lib.engines import Batch, Prepared
from lib.onnx_export import evaluation_copy, logits_of

# fp32 engines only reorder sums: largest difference, relative to the largest logit where that is above 1. The others
# round, so their bound is on the length of the error vector over that of the logits; 0.14 means a cosine above 0.99
# and 0.31 one above 0.95. A lost mask, a swapped input or a wrong layer is far outside all of them.
FP32_BOUND = 1e-3
ROUNDING_BOUNDS = {"bf16": 0.14, "fp16": 0.14, "int8": 0.31}


def check_agreement(
    prepared: Prepared, model: nn.Module, batches: Iterable[Batch], bound: float | None = None
) -> dict[str, float]:
    """Compare an engine with ``model`` in PyTorch fp32 on all logits of real tokens (padding is left out).

    Args:
        batches: should differ in batch size, length and padding, so that a graph with a baked-in shape is caught.
        bound: replaces the precision's own, for a model whose quantisation loss is itself the finding.

    Returns:
        ``max_abs_diff``, ``relative_diff`` (norm of the error / norm of the logits), ``cosine``, and
        ``argmax_agreement``: share of rows where both pick the same position or class.

    Raises:
        StudyError: the difference is above the bound; names the engine and the difference.
    """
    reference = evaluation_copy(model, "eager", torch.float32, "cpu")
    expected_parts, found_parts, same = [], [], []
    for batch in batches:
        tensors = {name: torch.as_tensor(batch[name], device="cpu") for name in prepared.names}
        with torch.inference_mode():
            expected = [logits.numpy() for logits in logits_of(reference(**tensors))]
        found = prepared.run(batch)
        shapes = [array.shape for array in expected], [array.shape for array in found]
        if shapes[0] != shapes[1]:
            raise StudyError(f"{prepared.engine}: outputs of shapes {shapes[1]}, PyTorch's are {shapes[0]}; not timed")
        for want, got in zip(expected, found, strict=True):
            real = _real_tokens(want, tensors.get("attention_mask"))
            expected_parts.append(want[real])
            found_parts.append(got[real])
            same.append(np.where(real, want, -np.inf).argmax(-1) == np.where(real, got, -np.inf).argmax(-1))
    want, got = (np.concatenate(parts).astype(np.float64) for parts in (expected_parts, found_parts))
    size = max(float(np.linalg.norm(want)), 1e-12)
    result = {
        "max_abs_diff": float(np.abs(got - want).max()),
        "relative_diff": float(np.linalg.norm(got - want)) / size,
        "cosine": float(want @ got) / (size * max(float(np.linalg.norm(got)), 1e-12)),
        "argmax_agreement": float(np.concatenate(same).mean()),
    }
    exact = prepared.precision == "fp32"
    measured = result["max_abs_diff"] / max(1.0, float(np.abs(want).max())) if exact else result["relative_diff"]
    allowed = bound if bound is not None else FP32_BOUND if exact else ROUNDING_BOUNDS[prepared.precision]
    if not measured <= allowed:
        raise StudyError(
            f"{prepared.engine}: logits differ from PyTorch fp32 by {result['max_abs_diff']:.3g} at most, "
            f"{result['relative_diff']:.3g} relative (allowed {allowed:g} for {prepared.precision}); not timed"
        )
    return result


def _real_tokens(logits: np.ndarray, attention_mask: Tensor | None) -> np.ndarray:
    """Which logits count: those of unmasked positions for (batch, length) outputs, all of any other."""
    if attention_mask is not None and attention_mask.shape == logits.shape:
        return attention_mask.numpy().astype(bool)
    return np.ones(logits.shape, dtype=bool)


def random_batch(batch: int, length: int, vocab_size: int, seed: int = 0, padding: int = 0) -> dict[str, np.ndarray]:
    """Random tokens, (batch, length) int64; ``padding`` masks that many last positions of the first row.

    Latency depends on the shape only, so no text is needed to measure it.
    """
    ids = np.random.default_rng(seed).integers(0, vocab_size, (batch, length), dtype=np.int64)
    mask = np.ones_like(ids)
    mask[0, length - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
