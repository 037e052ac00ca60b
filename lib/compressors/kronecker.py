"""KroneckerBERT: every matrix of the encoder a Kronecker product (Tahaei et al. 2021, arXiv:2109.06243, section 3).

The factors are put in before training and are what is trained; nothing is cut out at the end. They begin as the nearest
product to the weights that were there, or at random for the ablation. A model that an earlier stage has factorised
keeps its factors. The loss that goes with it is ``lib.distillation``'s.
"""

from typing import Any, ClassVar

from transformers import PreTrainedModel

from lib.compressors.base import Compressor
from lib.config import StudyError
from lib.kronecker_models import (
    KINDS,
    Initialisation,
    KroneckerShapes,
    Wanted,
    dense_parameters,
    factor_shapes,
    factorise,
    wanted_factors,
)
from lib.models import base_model, count_parameters


class Kronecker(Compressor):
    """Replaces the encoder's linear maps and word embeddings by Kronecker factors."""

    class Settings(KroneckerShapes):
        """``seed`` is of random factors alone."""

        initialisation: Initialisation = "nearest"
        seed: int = 0

    name: ClassVar[str] = "kronecker"
    settings: Settings

    def attach(self, model: PreTrainedModel) -> None:
        self.wanted = wanted_factors(model, self.settings)
        self.errors: dict[str, float] = {}
        present = factor_shapes(model)
        if not present:
            self.errors = factorise(model, self.settings, self.settings.initialisation, self.settings.seed)
        elif present != {path: self._saved_shape(factors) for path, factors in self.wanted.items()}:
            raise StudyError("kronecker: the model to begin with has other factors; give the settings of its own run")
        encoder = base_model(model)
        self.parameters, self.dense = count_parameters(encoder), dense_parameters(encoder)

    def _saved_shape(self, factors: Wanted) -> dict[str, list[int]]:
        return {"a": [self.settings.terms, *factors.first], "b": [self.settings.terms, *factors.second]}

    def summary(self) -> dict[str, Any]:
        """Sizes of the encoder without its head; ``error`` is the mean relative error of the nearest products."""
        return {
            "factors": {kind: self._about(kind) for kind in KINDS}, "terms": self.settings.terms,
            "swap": self.settings.swap, "initialisation": self.settings.initialisation,
            "parameters": self.parameters, "dense_parameters": self.dense, "ratio": self.dense / self.parameters,
        }  # fmt: skip

    def _about(self, kind: str) -> dict[str, Any]:
        """How many weights of a kind there are, the first one's factors (the FFN's map in), and the mean error."""
        chosen = {path: factors for path, factors in self.wanted.items() if factors.kind == kind}
        first = next(iter(chosen.values()))
        about = {"a": list(first.first), "b": list(first.second), "weights": len(chosen)}
        errors = [self.errors[path] for path in chosen if path in self.errors]
        return about | ({"error": sum(errors) / len(errors)} if errors else {})
