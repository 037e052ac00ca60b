"""Gates that learn which heads and FFN units stay (McCarley, Chakravarti and Sil 2019, arXiv:1910.06360).

Hard concrete gates z(log alpha) on a frozen fine-tuned model, penalty lambda * mean P(z > 0) per kind of gate; what is
closed at the end is cut out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from lib.compressors.base import Compressor
from lib.compressors.selection import (
    Scores,
    check_kinds,
    density_of,
    keep_best,
    kept_masks,
    kept_summary,
    remove,
    target_density,
)
from lib.config import StudyError
from lib.gates import CLOSED_BELOW, GateKind, Gates, gate_shapes, gates_at_test, probability_open, sample_gates
from lib.settings import Strict

HISTORY_POINTS = 20
BINS = [-12.0, -8.0, -6.0, -5.0, -4.0, -3.0, CLOSED_BELOW, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0]


class _GateParameters(nn.Module):
    """log alpha of every gate, one vector per kind; a module of the model, so that checkpoints carry it."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], start: float) -> None:
        super().__init__()
        self.shapes = {kind: list(sizes) for kind, sizes in shapes.items()}
        vectors = {kind: nn.Parameter(torch.full((sum(sizes),), start)) for kind, sizes in shapes.items()}
        self.log_alpha = nn.ParameterDict(vectors)

    def split(self, kind: str, flat: Tensor) -> Sequence[Tensor]:
        return flat.split(self.shapes[kind])


class L0Gates(Compressor):
    """Trains gates on a frozen model; ``finalize`` closes, folds and cuts.

    With ``densities`` lambda is found on the way, by the augmented Lagrangian of Wang, Wohlwend and Lei 2020
    (arXiv:1910.04732, section 4.2): with e = expected density - target, which falls from 1 to the wanted density, the
    penalty is lambda e + stiffness e^2, and lambda rises with e. It may be negative, which opens gates again. At the
    end exactly the best gates by log alpha stay. With ``penalties`` lambda is fixed, as in the paper, and the gates
    whose test-time value is above 0 stay.
    """

    class Settings(Strict):
        """Per kind of gate, either a density (share kept) or a fixed lambda.

        ``fractional`` folds the gates' test-time values into the weights instead of rounding open ones up to 1.
        """

        densities: dict[GateKind, float] = Field(default_factory=dict)
        penalties: dict[GateKind, float] = Field(default_factory=dict)
        learning_rate: float = Field(default=0.1, gt=0)
        start_log_alpha: float = 2.0
        adaptation: float = Field(default=1.0, gt=0)  # of lambda, per step and unit of e
        stiffness: float = Field(default=10.0, ge=0)
        fractional: bool = False

    name: ClassVar[str] = "l0_gates"
    settings: Settings

    def attach(self, model: PreTrainedModel) -> None:
        settings = self.settings
        both = sorted(set(settings.densities) & set(settings.penalties))
        if both or not (settings.densities or settings.penalties):
            found = f"both for {both[0]}" if both else "neither"
            raise StudyError(f"l0_gates: found {found}; give a density or a penalty for each kind of gate")
        for kind, density in settings.densities.items():
            if not 0 < density < 1:
                raise StudyError(f"l0_gates: density {density} for {kind} is impossible; give more than 0, less than 1")
        for kind, value in settings.penalties.items():
            if not 0 <= value < float("inf"):
                raise StudyError(f"l0_gates: penalty {value} for {kind} is impossible; give 0 or more")
        self.kinds: list[GateKind] = [*settings.densities, *settings.penalties]
        check_kinds(model, self.kinds)
        model.requires_grad_(False)
        shapes: dict[str, Sequence[int]] = {kind: gate_shapes(model, kind) for kind in self.kinds}
        self.model, self.gates = model, Gates(model, self.kinds)
        self.parameters = _GateParameters(shapes, settings.start_log_alpha)
        model.add_module("study_gates", self.parameters)
        self._sampler = model.register_forward_pre_hook(self._set_gates, with_kwargs=True)
        self.lambdas: dict[str, float] = {kind: value for kind, value in settings.penalties.items()}
        self.lambdas |= dict.fromkeys(settings.densities, 0.0)
        self.history: list[dict[str, Any]] = []

    def _set_gates(self, model: nn.Module, arguments: Any, keywords: Any) -> None:
        value = sample_gates if model.training else gates_at_test
        self.gates.values = {
            kind: self.parameters.split(kind, value(vector)) for kind, vector in self.parameters.log_alpha.items()
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        vectors = list(self.parameters.log_alpha.values())
        return [{"params": vectors, "lr": self.settings.learning_rate, "weight_decay": 0.0}]

    def penalty(self, progress: float) -> Tensor:
        total = torch.zeros(())
        for kind, vector in self.parameters.log_alpha.items():
            expected = probability_open(vector).mean()
            if kind in self.settings.densities:
                error = expected - target_density(progress, self.settings.densities[kind])
                term = self.lambdas[kind] * error + self.settings.stiffness * error.square()
            else:
                term = self.lambdas[kind] * expected
            total = total.to(term.device) + term
        return total

    @torch.no_grad()
    def step(self, progress: float, trainer: Trainer) -> None:
        for kind, density in self.settings.densities.items():
            expected = float(probability_open(self.parameters.log_alpha[kind]).mean())
            self.lambdas[kind] += self.settings.adaptation * (expected - target_density(progress, density))
        self._refuse_nothing(progress)
        if len(self.history) <= progress * HISTORY_POINTS:
            self.history.append({"progress": progress} | {kind: self._state(kind) for kind in self.kinds})

    def _refuse_nothing(self, progress: float) -> None:
        """Raise when a fixed penalty left no gate of its kind open."""
        for kind, value in self.settings.penalties.items():
            if value and not self.realised(kind):
                raise StudyError(
                    f"l0_gates: penalty {value:g} closed all {len(self.parameters.log_alpha[kind])} {kind} at "
                    f"{progress:.0%} of training; give a smaller one, or a density"
                )

    def _state(self, kind: str) -> dict[str, Any]:
        vector = self.parameters.log_alpha[kind].detach().cpu()
        counts = torch.histogram(vector.float().clamp(BINS[0], BINS[-1]), torch.tensor(BINS)).hist
        return {
            "lambda": self.lambdas[kind], "expected_density": float(probability_open(vector).mean()),
            "density": self.realised(kind), "log_alpha_counts": [int(count) for count in counts],
        }  # fmt: skip

    def realised(self, kind: str) -> float:
        """Share of gates whose test-time value is above 0."""
        return float((self.parameters.log_alpha[kind] > CLOSED_BELOW).float().mean())

    @torch.no_grad()
    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        self._refuse_nothing(1.0)
        self.history.append({"progress": 1.0} | {kind: self._state(kind) for kind in self.kinds})
        self.scores: dict[str, Scores] = {}
        self.kept: dict[str, list[list[int]]] = {}
        factors: dict[str, Sequence[Tensor]] = {}
        for kind in self.kinds:
            log_alpha = self.parameters.log_alpha[kind].detach().cpu()
            if not torch.isfinite(log_alpha).all():
                raise StudyError(f"l0_gates: the gates of {kind} are not finite; lower learning_rate or the penalty")
            parts = self.parameters.split(kind, log_alpha)
            self.scores[kind] = [[round(value, 4) for value in part.tolist()] for part in parts]
            if kind in self.settings.densities:
                self.kept[kind] = keep_best(self.scores[kind], self.settings.densities[kind])
            else:
                self.kept[kind] = [(part > CLOSED_BELOW).nonzero().flatten().tolist() for part in parts]
            factors[kind] = kept_masks(self.kept[kind], self.scores[kind])
            if self.settings.fractional:
                tested = self.parameters.split(kind, gates_at_test(log_alpha))
                factors[kind] = [mask * value for mask, value in zip(factors[kind], tested, strict=True)]
        self._sampler.remove()
        self.gates.remove()
        del model.study_gates
        model.requires_grad_(True)
        remove(model, self.kept, factors)
        return model

    def summary(self) -> dict[str, Any]:
        densities = {kind: density_of(self.kept[kind], self.scores[kind]) for kind in self.kept}
        return {
            "density": densities, "kept": kept_summary(self.kept), "scores": self.scores, "history": self.history,
            "bins": BINS, "lambda": dict(self.lambdas),
            "natural_density": {kind: self.history[-1][kind]["density"] for kind in self.kinds},
            "expected_density": {kind: self.history[-1][kind]["expected_density"] for kind in self.kinds},
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"lambdas": self.lambdas, "history": self.history}

    def load_state_dict(self, state: dict[str, Any], model: PreTrainedModel) -> None:
        self.lambdas, self.history = dict(state["lambdas"]), list(state["history"])
