"""A compressor of one's own: LayerDrop (Fan, Grave and Joulin 2020), which skips random layers while it trains.

A model that has learned to do without any layer then loses few points when every other one is cut out for good.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from lib.compressors import Compressor
from lib.models import layers
from lib.settings import Strict
from lib.surgery import drop_layers


class LayerDrop(Compressor):
    class Settings(Strict):
        rate: float = Field(default=0.2, ge=0, lt=1)  # share of layers that a training step skips

    settings: Settings

    def attach(self, model: PreTrainedModel) -> None:
        self.n_layers, self.skipped = len(layers(model)), torch.zeros(len(layers(model)), dtype=torch.bool)
        self.hooks = [layer.register_forward_hook(self.pass_by(i)) for i, layer in enumerate(layers(model))]

    def pass_by(self, i: int) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return inputs[0] if layer.training and self.skipped[i] else output

        return hook

    def step(self, progress: float, trainer: Trainer) -> None:
        generator = torch.Generator().manual_seed(trainer.state.global_step)  # a resumed run draws the same again
        self.skipped = torch.rand(self.n_layers, generator=generator) < self.settings.rate

    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        for hook in self.hooks:
            hook.remove()
        drop_layers(model, range(2, self.n_layers + 1, 2))
        return model

    def summary(self) -> dict[str, Any]:
        return {"rate": self.settings.rate, "kept_layers": list(range(1, self.n_layers + 1, 2))}
