"""oBERT: prune weights by what their removal costs to second order (Kurtic et al. 2022, arXiv:2203.07259).

At each pruning step m gradients of the task loss make the block Fisher's inverse (``lib.fisher``); every weight, or
every run of four, of all encoder layers is ranked by its saliency in one list; the lowest go, and the others in their
block move to make up for them. Between the steps the model trains on, distilled, at a learning rate that is rewound.
Magnitude pruning is the same schedule with another ranking and no update.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from lib.batches import TrainingData
from lib.compressors.masked import Masked
from lib.config import StudyError
from lib.fisher import BlockFisher, LostPrecision, cubic_sparsity, smallest
from lib.progress import Progress
from lib.settings import Strict

# The paper's two budgets, as shares of training. 30 epochs: prune at epochs 2, 6, …, 26, where the learning rate is
# rewound as well. 10 epochs: prune twice an epoch from 2 to 8, and rewind once, when pruning is over.
THIRTY_EPOCHS = {
    "prune_at": tuple(epoch / 30 for epoch in range(2, 27, 4)), "rewind_at": tuple(e / 30 for e in range(2, 27, 4)),
}  # fmt: skip
TEN_EPOCHS = {"prune_at": tuple(half / 20 for half in range(4, 17)), "rewind_at": (0.8,)}
WIDTHS = {1: 50, 4: 32}  # of the Fisher's blocks, for single weights and for runs of four


class ObertPruning(Masked):
    """Prunes to ``sparsity`` while training, or, without a trainer (epochs 0), at once."""

    class Settings(Strict):
        """``sparsity``: share of the encoder's linear weights removed at the end; 0 only follows the learning rate.

        ``group`` 4 removes runs of four weights of a row. ``prune_at`` and ``rewind_at`` are shares of training; no
        ``prune_at`` prunes once, at the end, and no ``rewind_at`` leaves the trainer's own learning rate.
        ``first_step`` is the sparsity of the first pruning. ``recomputations`` splits each pruning into parts with new
        gradients. ``gradients`` is m, each the mean over ``gradient_batch`` examples; ``width`` is B (None: 50, or 32
        for runs of four), ``dampening`` lambda; ``update`` what the other weights do. ``precision`` is of the Fisher's
        inverse: "auto" takes the gradients again in float64 where float32 gives out, and notes it in ``history``.
        """

        sparsity: float = Field(ge=0, lt=1)
        group: Literal[1, 4] = 1
        importance: Literal["obert", "magnitude"] = "obert"
        prune_at: tuple[float, ...] = THIRTY_EPOCHS["prune_at"]
        rewind_at: tuple[float, ...] = THIRTY_EPOCHS["rewind_at"]
        final_factor: float = Field(default=0.1, gt=0, le=1)  # learning rate at a cycle's end, of that at its start
        first_step: float = Field(default=0.7, ge=0, lt=1)
        recomputations: int = Field(default=1, ge=1)
        gradients: int = Field(default=1024, ge=1)
        gradient_batch: int = Field(default=8, ge=1)
        width: int | None = Field(default=None, ge=1)
        dampening: float = Field(default=1e-7, gt=0)
        precision: Literal["auto", "float32", "float64"] = "auto"
        update: Literal["sum", "joint", "none"] = "sum"

    name: ClassVar[str] = "obert"
    settings: Settings

    def attach(self, model: PreTrainedModel) -> None:
        super().attach(model)
        settings = self.settings
        self.width = settings.width or WIDTHS[settings.group]
        self._check_settings()
        steps = cubic_sparsity(settings.first_step, settings.sparsity, max(1, len(settings.prune_at)))
        self.targets = list(zip(settings.prune_at or (1.0,), steps, strict=True)) if settings.sparsity else []
        self.done, self.history = 0, list[dict[str, float]]()
        self.data: TrainingData | None = None

    def _check_settings(self) -> None:
        settings, current = self.settings, self.sparsity
        moments = [*settings.prune_at, *settings.rewind_at]
        if any(not 0 <= moment < 1 for moment in moments) or list(settings.prune_at) != sorted(settings.prune_at):
            raise StudyError("obert: prune_at and rewind_at are shares of training, ascending from 0 to below 1")
        if 0 < settings.sparsity < current:
            raise StudyError(
                f"obert: sparsity {settings.sparsity:g} is below the current one of {current:.3f}; pruned weights "
                "never return: give a higher one, or start from a denser model"
            )
        if len(settings.prune_at) > 1 and settings.sparsity and settings.first_step < current:
            raise StudyError(
                f"obert: the first step to {settings.first_step:g} is below the current sparsity of {current:.3f}; "
                "raise first_step"
            )
        if len(settings.prune_at) > 1 and settings.sparsity and settings.first_step > settings.sparsity:
            raise StudyError(
                f"obert: the first step to {settings.first_step:g} is above the final sparsity {settings.sparsity:g}; "
                "lower first_step"
            )
        uneven = [linear for linear in self.linears if linear.in_features % settings.group]
        if uneven or self.width % settings.group:
            found = f"rows of {uneven[0].in_features} weights" if uneven else f"width {self.width}"
            raise StudyError(f"obert: groups of {settings.group} do not divide {found}; it must be a multiple of them")

    def use_data(self, data: TrainingData) -> None:
        self.data = data

    def learning_rate_factor(self, progress: float) -> float | None:
        """Falls from 1 to ``final_factor`` between rewinds."""
        if not self.settings.rewind_at:
            return None
        cuts = [0.0, *sorted(self.settings.rewind_at), 1.0]
        start = max(cut for cut in cuts[:-1] if cut <= progress)
        end = min(cut for cut in cuts if cut > start)
        return 1 - (1 - self.settings.final_factor) * min(1.0, (progress - start) / (end - start))

    def step(self, progress: float, trainer: Trainer) -> None:
        self.hold()
        due = sum(moment <= progress for moment, _ in self.targets)
        if due > self.done:
            self._prune_to(self.targets[due - 1][1], progress)
            self.done = due

    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        self.hold()
        if self.done < len(self.targets):
            self._prune_to(self.targets[-1][1], 1.0)
            self.done = len(self.targets)
        return super().finalize(model)

    def _prune_to(self, sparsity: float, progress: float) -> None:
        """Close masks until ``sparsity``; with recomputations in parts whose densities fall by the same factor."""
        density, parts = 1 - self.sparsity, self.settings.recomputations
        for part in range(1, parts + 1):
            target = 1 - density * ((1 - sparsity) / density) ** (part / parts) if part < parts else sparsity
            draw = round(1e6 * progress) + part
            fishers = self._fishers(draw) if self.settings.importance == "obert" else []
            self._prune_once(target, fishers)
            doubled = {"float64": 1.0} if fishers and fishers[0].inverse.dtype == torch.float64 else {}
            self.history.append({"progress": progress, "sparsity": self.sparsity} | doubled)

    def _prune_once(self, sparsity: float, fishers: list[BlockFisher]) -> None:
        group = self.settings.group
        scores, alive = [], []
        for index, linear in enumerate(self.linears):
            scores.append(self._score(index, linear.weight.detach(), fishers))
            alive.append(self.masks[index].view(-1, group).any(1))
        ranked = torch.where(torch.cat(alive), torch.cat(scores), -torch.inf)
        count = round(sparsity * len(ranked))
        if count < int((~torch.cat(alive)).sum()):
            raise StudyError(f"obert: sparsity {sparsity:g} is below the current one of {self.sparsity:.3f}")
        gone = smallest(ranked, count).split([len(score) for score in scores])
        for index, linear in enumerate(self.linears):
            self._remove(index, linear, gone[index], fishers)

    def _score(self, index: int, weight: Tensor, fishers: list[BlockFisher]) -> Tensor:
        """What each weight or group is worth, (weights / group,); groups add up."""
        if fishers:
            return fishers[index].saliency(weight, self.settings.group).to(torch.float32)
        return weight.square().reshape(-1, self.settings.group).sum(1)

    @torch.no_grad()
    def _remove(self, index: int, linear: nn.Linear, gone: Tensor, fishers: list[BlockFisher]) -> None:
        settings, group = self.settings, self.settings.group
        closed = gone.repeat_interleave(group).view_as(linear.weight)
        if fishers and settings.update != "none":
            new = (gone & self.masks[index].view(-1, group).any(1)).repeat_interleave(group).view_as(linear.weight)
            change = fishers[index].update(linear.weight, new, group, joint=settings.update == "joint")
            linear.weight.add_(change.view_as(linear.weight))
        self.masks[index] = self.masks[index] & ~closed
        linear.weight.mul_(self.masks[index])

    def _fishers(self, draw: int) -> list[BlockFisher]:
        """One Fisher per linear map, in the precision that the settings ask for or, by default, the gradients need."""
        if self.settings.precision != "float64":
            fishers = self._fishers_in(torch.float32, draw)
            try:
                for fisher in fishers:
                    fisher.check()
            except LostPrecision:
                if self.settings.precision == "float32":
                    raise
            else:
                return fishers
            del fishers
        return self._fishers_in(torch.float64, draw)

    def _fishers_in(self, dtype: torch.dtype, draw: int) -> list[BlockFisher]:
        settings, device = self.settings, self.data.device if self.data else torch.device("cpu")
        fishers = [
            BlockFisher(linear.weight.numel(), self.width, settings.gradients, settings.dampening, dtype, device)
            for linear in self.linears
        ]
        for gradients in self._gradients(draw):
            for fisher, gradient in zip(fishers, gradients, strict=True):
                fisher.add(gradient)
        return fishers

    def _gradients(self, draw: int) -> Iterator[tuple[Tensor, ...]]:
        """Gradients of the labels' loss in eval mode, of each linear map, one mini-batch after the other.

        Those of pruned weights are 0: the hooks see them too.
        """
        settings = self.settings
        if self.data is None:
            raise StudyError(f"obert: importance '{settings.importance}' needs gradients, and no training data came")
        nn.Module.to(self.model, self.data.device)
        training, weights = self.model.training, [linear.weight for linear in self.linears]
        self.model.eval()
        progress = Progress(f"gradients for pruning beyond {self.sparsity:.1%}", settings.gradients)
        try:
            batches = self.data.batches(settings.gradient_batch, settings.gradients, draw)
            for number, batch in enumerate(batches, start=1):
                with self.data.autocast():
                    loss = self.model(**batch).loss
                yield torch.autograd.grad(loss, weights)
                progress.update(number)
        finally:
            progress.close()
            self.model.train(training)

    def summary(self) -> dict[str, Any]:
        return super().summary() | {"group": self.settings.group, "history": self.history}

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "history": self.history}

    def load_state_dict(self, state: dict[str, Any], model: PreTrainedModel) -> None:
        self.done, self.history = state["done"], list(state["history"])
