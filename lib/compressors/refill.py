"""Hybrid filled: the last variant of block movement pruning (Lagunas et al. 2021, section 4)."""

from typing import Any, ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel

from lib.block_scores import linear_weights, shape_summary
from lib.blocks import dense_weights
from lib.compressors.base import Compressor
from lib.settings import Strict


class Refill(Compressor):
    """Hybrid filled: what a finished hybrid model kept becomes dense again, and trains without masks.

    Zeros inside the kept heads and units become small Gaussian noise around the mean of the matrix's weights; how small
    is not printed in the paper.
    """

    class Settings(Strict):
        """``noise``: standard deviation of what is filled in, as a share of that of the weights there."""

        noise: float = Field(default=0.1, ge=0)
        seed: int = 0

    name: ClassVar[str] = "refill"
    settings: Settings

    @torch.no_grad()
    def attach(self, model: PreTrainedModel) -> None:
        generator = torch.Generator().manual_seed(self.settings.seed)
        self.filled = 0
        for _, weight in linear_weights(model):
            there = weight != 0
            mean, spread = 0.0, getattr(model.config, "initializer_range", 0.02)  # where nothing is left to go by
            if there.any():
                mean, spread = float(weight[there].mean()), float(weight[there].std(correction=0))
            noise = torch.randn(weight.shape, generator=generator).to(weight.device)
            weight.copy_(torch.where(there, weight, mean + self.settings.noise * spread * noise))
            self.filled += int((~there).sum())

    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        self.result = shape_summary(model) | {"filled": self.filled / dense_weights(model)}
        return model

    def summary(self) -> dict[str, Any]:
        return self.result
