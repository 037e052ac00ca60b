"""Training with weights that are held at zero, which every unstructured method shares (``Masked``).

``FixedMasks`` keeps the zeros that a model begins with, which is sparse transfer (Kurtic et al. 2022, section 4.2):
a model pruned upstream is fine-tuned on a task and stays exactly as sparse. Masks are buffers of the model, so they
travel with its checkpoints.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from lib.compressors.base import Compressor
from lib.config import StudyError
from lib.models import layer_parts, layers
from lib.sparse_storage import storage

PARTS = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")


def encoder_linears(model: nn.Module) -> list[nn.Linear]:
    """The linear maps of all encoder layers, in order: what the paper prunes, and what its sparsities refer to.

    Embeddings, pooler and task head are not among them.
    """
    return [getattr(layer_parts(layer), part) for layer in layers(model) for part in PARTS]


class _Masks(nn.Module):
    """One bool mask per linear map, True where the weight lives; a module of the model, so checkpoints carry it."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        for index, weight in enumerate(weights):
            self.register_buffer(f"mask_{index}", weight != 0)

    def __getitem__(self, index: int) -> Tensor:
        return getattr(self, f"mask_{index}")

    def __setitem__(self, index: int, mask: Tensor) -> None:
        getattr(self, f"mask_{index}").copy_(mask)


class Masked(Compressor):
    """Holds at zero what is zero when training starts, and whatever a subclass closes later.

    A pruned weight gets no gradient, and is set back to zero before every step, because the optimizer's moments would
    still move it.
    """

    def attach(self, model: PreTrainedModel) -> None:
        self.model, self.linears = model, encoder_linears(model)
        self.masks = _Masks([linear.weight.detach() for linear in self.linears])
        model.add_module("study_masks", self.masks)
        self.hooks = [
            linear.weight.register_hook(self._on_gradient(index))
            for index, linear in enumerate(self.linears)
            if linear.weight.requires_grad
        ]
        if len(self.hooks) < len(self.linears):
            raise StudyError(f"{self.name}: some of the encoder's linear weights are frozen; masks need all trained")

    def _on_gradient(self, index: int) -> Callable[[Tensor], Tensor]:
        def mask(gradient: Tensor) -> Tensor:
            return gradient * self.masks[index]

        return mask

    @property
    def sparsity(self) -> float:
        """Share of the encoder's linear weights whose mask is closed."""
        weights = sum(linear.weight.numel() for linear in self.linears)
        return 1 - sum(int(self.masks[index].sum()) for index in range(len(self.linears))) / weights

    @torch.no_grad()
    def hold(self) -> None:
        """Set every pruned weight to exactly zero."""
        for index, linear in enumerate(self.linears):
            linear.weight.mul_(self.masks[index])

    def step(self, progress: float, trainer: Trainer) -> None:
        self.hold()

    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        self.hold()
        for hook in self.hooks:
            hook.remove()
        del model.study_masks
        return model

    def summary(self) -> dict[str, Any]:
        """Realised zeros, counted in the weights themselves, and the bytes that they save."""
        zeros = [int((linear.weight == 0).sum()) for linear in self.linears]
        sizes = [linear.weight.numel() for linear in self.linears]
        shares = [round(zero / size, 6) for zero, size in zip(zeros, sizes, strict=True)]
        starts = range(0, len(shares), len(PARTS))
        per_layer = [dict(zip(PARTS, shares[start : start + len(PARTS)], strict=True)) for start in starts]
        return {
            "sparsity": sum(zeros) / sum(sizes), "weights": sum(sizes), "nonzero": sum(sizes) - sum(zeros),
            "per_layer": per_layer, "storage": storage(self.model, self.linears),
        }  # fmt: skip


class FixedMasks(Masked):
    """Keeps the zeros of the model that a run begins with, and prunes nothing."""

    name: ClassVar[str] = "fixed_masks"

    def attach(self, model: PreTrainedModel) -> None:
        super().attach(model)
        if self.sparsity == 0:
            raise StudyError("fixed_masks: the model to begin with has no zero weight to hold; start from a pruned one")
