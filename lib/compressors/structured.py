"""Structured pruning by a score (McCarley, Chakravarti and Sil 2019, arXiv:1910.06360): the least important heads and
FFN units go, at once or while training. The score is the L0 gates', a measured importance (``lib.importance``), the
weights' magnitude, or chance.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from lib.compressors.base import Compressor
from lib.compressors.selection import (
    Scores,
    check_density,
    check_kinds,
    density_of,
    keep_best,
    kept_masks,
    kept_summary,
    magnitude,
    remove,
    target_density,
)
from lib.config import StudyError
from lib.gates import KINDS, GateKind, Gates, gate_shapes
from lib.settings import Strict


class StructuredPruning(Compressor):
    """Keeps the best heads and units by a score, at once before training or step by step during it.

    With ``importance`` "given" the scores come from the runs that the spec is ``informed_by``, the later one first
    where two know the same kind of gate.
    """

    class Settings(Strict):
        """``densities``: share kept per kind of gate. ``seed`` is of the random importance alone."""

        densities: dict[GateKind, float] = Field(min_length=1)
        importance: Literal["given", "magnitude", "random"] = "given"
        seed: int = 0
        iterative: bool = False

    name: ClassVar[str] = "structured"
    settings: Settings

    def attach(self, model: PreTrainedModel) -> None:
        check_kinds(model, list(self.settings.densities))
        for density in self.settings.densities.values():
            check_density(density)
        self.model = model
        self.kept: dict[str, list[list[int]]] = {}
        self.scores: dict[str, Scores] = {}
        self.gates: Gates | None = None
        if self.settings.iterative:
            if self.settings.importance == "given":
                raise StudyError("structured: iterative pruning scores the weights as they change; use magnitude")
            self.gates = Gates(model, list(self.settings.densities))
        else:
            self._choose(1.0)
            remove(model, self.kept, self._masks())

    def step(self, progress: float, trainer: Trainer) -> None:
        """Iterative: close gates along the cubic schedule; what is closed stays closed."""
        if self.gates is None:
            return
        self._choose(progress)
        device = next(self.model.parameters()).device
        self.gates.values = {kind: [mask.to(device) for mask in masks] for kind, masks in self._masks().items()}

    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.gates is not None:
            self._choose(1.0)
            self.gates.remove()
            remove(model, self.kept, self._masks())
        return model

    def summary(self) -> dict[str, Any]:
        realised = {kind: density_of(self.kept[kind], self.scores[kind]) for kind in self.kept}
        return {"density": realised, "kept": kept_summary(self.kept)}

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any], model: PreTrainedModel) -> None:
        if self.gates is not None:
            self.kept = state["kept"]

    def _choose(self, progress: float) -> None:
        for kind, density in self.settings.densities.items():
            scores = self._score(kind)
            if kind in self.kept:  # closed gates never open again
                scores = [
                    [value if index in alive else -1e30 for index, value in enumerate(row)]
                    for row, alive in zip(scores, map(set, self.kept[kind]), strict=True)
                ]
            self.scores[kind] = scores
            self.kept[kind] = keep_best(scores, target_density(progress, density))

    def _score(self, kind: GateKind) -> Scores:
        shapes = gate_shapes(self.model, kind)
        if self.settings.importance == "magnitude":
            if kind == "embedding":
                raise StudyError("structured: embedding dimensions have no magnitude here; use l0_gates, or random")
            return magnitude(self.model, kind)
        if self.settings.importance == "random":
            generator = torch.Generator().manual_seed(1009 * self.settings.seed + KINDS.index(kind))
            return [torch.rand(size, generator=generator).tolist() for size in shapes]
        for result in reversed(self.informed):
            scores = result.get("scores") or result.get("compression", {}).get("scores", {})
            if kind in scores:
                if [len(row) for row in scores[kind]] != shapes:
                    raise StudyError(f"structured: the scores of {kind} were measured on a model of another shape")
                return scores[kind]
        raise StudyError(f"structured: no run that this one is informed by scores {kind}; name one, or use magnitude")

    def _masks(self) -> dict[str, list[Tensor]]:
        return {kind: kept_masks(self.kept[kind], self.scores[kind]) for kind in self.kept}
