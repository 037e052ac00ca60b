"""The fully quantised Transformer (Prato, Charlaix and Rezagholizadeh 2020, arXiv:1910.10485).

*Quantisation-aware*: train with every operation rounded (``lib.quantized_layers``), after a delay in which only the
ranges are followed. *Post-training*: follow the ranges over a few batches of a finished model and train nothing. Both
end in a model whose weights are integers on disk (``lib.quantized_storage``) and whose rounding is simulated in
fp32: it shows what quantisation costs in quality, never what it gains in speed.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel, Trainer

from lib.compressors.base import Compressor, Diverged
from lib.config import StudyError
from lib.quantized_layers import (
    QuantizedLayerNorm,
    Quantizing,
    freeze_weights,
    quantize_model,
    quantized_weights,
    ranges,
)
from lib.quantized_storage import keep_grids, stored_bytes
from lib.quantizers import Switch

if TYPE_CHECKING:
    from lib.batches import TrainingData


class Quantization(Compressor):
    """Rounds everything to ``bits``: while training, from ``delay`` on, or after calibration, without training."""

    class Settings(Quantizing):
        """``delay``: share of training before anything is rounded. ``recalibration_batches``: take the ranges anew
        after training, from so many batches; those that training followed are too wide where dropout was on, which
        scales up what it leaves. ``watch``: a run that meets numbers that are not finite stops, and its record says
        where they appeared first."""

        delay: float = Field(default=0.0, ge=0, le=1)
        calibration_batches: int = Field(default=0, ge=0)
        recalibration_batches: int = Field(default=0, ge=0)
        calibration_batch_size: int = Field(default=32, ge=1)
        watch: bool = False

    name: ClassVar[str] = "quantization"
    evaluation_precision: ClassVar[str | None] = "fp32"  # bf16 would round the simulated grids again
    settings: Settings

    def attach(self, model: PreTrainedModel) -> None:
        settings = self.settings
        self.switch = Switch(watching=settings.watch)
        self.model, self.progress = model, 0.0
        quantize_model(model, Quantizing(**settings.model_dump(include=set(Quantizing.model_fields))), self.switch)

    def use_data(self, data: "TrainingData") -> None:
        """Post-training: show the model its calibration batches, unrounded, in fp32 and eval mode.

        Raises:
            StudyError: there are no training examples, or fewer than will be asked for.
        """
        self.data = data
        settings, size = self.settings, self.settings.calibration_batch_size
        count = max(settings.calibration_batches, settings.recalibration_batches)
        if count and len(data) < size * count:
            raise StudyError(
                f"quantization: calibration asks for {count} batches of {size} examples, there are {len(data)} "
                "examples; give more data, or lower calibration_batches or recalibration_batches"
            )
        self._follow(settings.calibration_batches)

    def _follow(self, count: int) -> None:
        """Let the ranges follow ``count`` batches of training data without dropout; none asks for nothing."""
        if not count:
            return
        training = self.model.training
        self.model.eval().to(self.data.device)
        self.switch.observing = True
        with torch.no_grad():
            for batch in self.data.batches(self.settings.calibration_batch_size, count):
                self.model(**batch)
        self.switch.observing = False
        self.model.train(training)

    def step(self, progress: float, trainer: Trainer) -> None:
        self.switch.quantizing = progress >= self.settings.delay
        if self.switch.first_bad:
            raise Diverged(f"quantization: numbers are not finite from {self.switch.first_bad} on")
        self.progress = progress

    @property
    def divergence(self) -> dict[str, Any]:
        return {"place": self.switch.first_bad, "progress": self.progress} if self.switch.first_bad else {}

    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        """Take the ranges anew where asked for, everything rounded; then round the weights for good.

        Raises:
            StudyError: some activation was never seen, so its range is unknown.
        """
        if self.settings.recalibration_batches:
            for one in ranges(model):
                one.seen.zero_()
            self._follow(self.settings.recalibration_batches)
        unseen = [one.name for one in ranges(model) if one.seen == 0]
        if unseen:
            raise StudyError(
                f"quantization: no calibration data reached {unseen[0]} and {len(unseen) - 1} other places; "
                "train, or set calibration_batches to 1 or more"
            )
        keep_grids(model, freeze_weights(model))
        self.bytes = stored_bytes(model)
        return model.eval()

    def summary(self) -> dict[str, Any]:
        rounded = sum(weight.numel() for _, weight in quantized_weights(self.model))
        everything = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "bits": self.settings.bits, "parts": list(self.settings.parts), "ranges": len(list(ranges(self.model))),
            "quantized_weights": rounded, "float_weights": everything - rounded, "stored_bytes": self.bytes,
            "denominator_spread": self._denominator_spread(), "norms": self._norms(),
        }  # fmt: skip

    def _guarded_norms(self) -> dict[str, QuantizedLayerNorm]:
        named = self.model.named_modules()
        return {name: module for name, module in named if isinstance(module, QuantizedLayerNorm) and module.guarded}

    def _denominator_spread(self) -> float | None:
        """Largest over smallest LayerNorm denominator in the widest of their ranges; None where none is followed."""
        norms = self._guarded_norms().values()
        return max((float(norm.denominator.high / norm.denominator.low) for norm in norms), default=None)

    def _norms(self) -> dict[str, dict[str, list[float]]]:
        """Ends of the ranges of each LayerNorm's numerator and denominator, in the model's order."""
        steps = ("numerator", "denominator")
        return {
            name: {step: [float(end) for end in (getattr(norm, step).low, getattr(norm, step).high)] for step in steps}
            for name, norm in self._guarded_norms().items()
        }
