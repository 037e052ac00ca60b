"""The contract that every compression method fulfils, so that one fine-tuning loop serves all of them.

``progress`` runs from 0 to 1 over a training run: schedules written in it keep their shape in a short run and survive a
resume. A run without a compressor is the dense baseline.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel, Trainer

from lib.config import StudyError
from lib.settings import Strict

if TYPE_CHECKING:
    from lib.batches import TrainingData


class Diverged(StudyError):
    """Training met numbers that are not finite."""


class Compressor:
    """Base class: does nothing, which is a valid compressor. Override what the method needs.

    Subclasses define ``Settings`` (validated, part of a run's spec and so of its hash).
    """

    class Settings(Strict):
        """No settings."""

    name: ClassVar[str] = "none"
    evaluation_precision: ClassVar[str | None] = None  # in which the finished model is measured; None as it was trained

    def __init__(self, settings: Any, informed: Sequence[dict[str, Any]] = ()) -> None:
        """``informed`` holds the results of the runs that the spec is ``informed_by``, in its order."""
        self.settings, self.informed = settings, informed

    @property
    def divergence(self) -> dict[str, Any]:
        """Where (``place``) and when (``progress``) numbers stopped being finite, if a method is made to show that."""
        return {}

    def attach(self, model: PreTrainedModel) -> None:
        """Put gates, scores, masks or factorised layers into ``model``, in place, before training."""

    def use_data(self, data: "TrainingData") -> None:
        """Receive the training examples, after ``attach``: for methods that look at gradients or calibrate on data."""

    def learning_rate_factor(self, progress: float) -> float | None:
        """Learning rate as a share of the peak, for methods with a schedule of their own; None keeps the trainer's."""
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Own optimizer groups: ``params``, ``lr`` and ``weight_decay`` (0 for gates and scores)."""
        return []

    def penalty(self, progress: float) -> Tensor | float:
        """Scalar added to the task loss."""
        return 0.0

    def step(self, progress: float, trainer: Trainer) -> None:
        """Advance schedules and masks; called before every optimizer step."""

    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        """Cut out, fold, freeze: a model that runs without this compressor."""
        return model

    def summary(self) -> dict[str, Any]:
        """What was realised (sparsity, kept heads, units, layers, bits); stored in the record."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state that a resumed run needs beyond the model's own weights."""
        return {}

    def load_state_dict(self, state: dict[str, Any], model: PreTrainedModel) -> None:
        """Restore what ``state_dict`` returned, on a model that ``attach`` has just seen."""
