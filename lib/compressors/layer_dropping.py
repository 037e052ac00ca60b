"""Poor Man's BERT: drop whole Transformer layers (Sajjad, Dalvi, Durrani and Nakov 2020, section 3).

Layers are numbered 1 … L from the embeddings up, as in the paper. For L = 12 and K = 4 the strategies drop
top {9, 10, 11, 12}, bottom {1, 2, 3, 4}, odd alternate {5, 7, 9, 11}, even alternate {6, 8, 10, 12} and
symmetric {5, 6, 7, 8}; contribution drops the layers that change the [CLS] vector least.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from lib.compressors.base import Compressor
from lib.config import StudyError
from lib.models import base_model, layers
from lib.settings import Strict
from lib.surgery import drop_layers, forget_parameters

STRATEGIES = ("top", "bottom", "odd", "even", "symmetric", "contribution")


def layers_to_drop(
    strategy: str, k: int, n_layers: int, contributions: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Layers (1 … ``n_layers``) that a strategy drops, in ascending order.

    Args:
        strategy: one of ``STRATEGIES``.
        k: how many to drop, 1 … n_layers - 1.
        contributions: for ``contribution``, the similarity of input and output of each layer, (n_layers,);
            the K most similar layers are dropped.

    Raises:
        StudyError: unknown strategy, K out of range, or a K that the strategy cannot make (alternate dropping has
            only every other layer, symmetric dropping needs L - K even).
    """
    if not 1 <= k < n_layers:
        raise StudyError(f"layer dropping: K={k} is impossible with {n_layers} layers; give 1 to {n_layers - 1}")
    everything = range(1, n_layers + 1)
    if strategy == "top":
        return tuple(everything[n_layers - k :])
    if strategy == "bottom":
        return tuple(everything[:k])
    if strategy in ("odd", "even"):
        candidates = [layer for layer in everything if layer % 2 == (strategy == "odd")]
        if k > len(candidates):
            raise StudyError(f"layer dropping: {strategy} alternate has {len(candidates)} layers of {n_layers}, K={k}")
        return tuple(candidates[len(candidates) - k :])
    if strategy == "symmetric":
        if (n_layers - k) % 2:
            raise StudyError(f"layer dropping: symmetric needs L - K even, found L={n_layers}, K={k}")
        side = (n_layers - k) // 2
        return tuple(everything[side : side + k])
    if strategy == "contribution":
        if contributions is None or len(contributions) != n_layers:
            raise StudyError(f"layer dropping: contribution needs one similarity for each of the {n_layers} layers")
        ranked = sorted(everything, key=lambda layer: contributions[layer - 1], reverse=True)
        return tuple(sorted(ranked[:k]))
    raise StudyError(f"layer dropping: unknown strategy '{strategy}'; known: {', '.join(STRATEGIES)}")


def possible(strategy: str, k: int, n_layers: int) -> bool:
    """Whether ``layers_to_drop`` can make this K with this strategy."""
    try:
        layers_to_drop(strategy, k, n_layers, [0.0] * n_layers)
    except StudyError:
        return False
    return True


def above_threshold(contributions: Sequence[float], threshold: float) -> tuple[int, ...]:
    """Layers whose similarity exceeds ``threshold``: the paper's contribution strategy as printed."""
    return tuple(layer for layer, value in enumerate(contributions, start=1) if value > threshold)


@torch.no_grad()
def layer_contributions(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> list[float]:
    """Mean cosine similarity of the classification token's vector before and after each layer.

    A similarity near 1 means that the layer changes little. The token is the first, or XLNet's last.

    Args:
        batches: ``input_ids`` and ``attention_mask``, each (batch, length).

    Returns:
        One value per layer, (n_layers,).
    """
    model.eval()
    encoder = base_model(model)
    last = model.config.model_type == "xlnet"
    total, examples = torch.zeros(len(layers(model)), dtype=torch.float64), 0
    for batch in batches:
        states = encoder(**batch, output_hidden_states=True).hidden_states
        where = batch["attention_mask"].shape[1] - 1 if last else 0
        tokens = [state[:, where].double() for state in states]
        pairs = itertools.pairwise(tokens)
        total += torch.stack([F.cosine_similarity(before, after).sum() for before, after in pairs]).cpu()
        examples += len(tokens[0])
    if not examples:
        raise StudyError("layer contributions: no examples were given; the development set is empty")
    return (total / examples).tolist()


class LayerDropping(Compressor):
    """Drops ``settings.drop`` before training, or one layer at a time during it.

    Iterative dropping removes the topmost layer of the set first, at progress 1/(K+1), 2/(K+1), …, so that the last
    part of training sees the final model (the paper drops one layer every two epochs).
    """

    class Settings(Strict):
        drop: tuple[int, ...] = Field(min_length=1)
        iterative: bool = False

    name: ClassVar[str] = "layer_dropping"
    settings: Settings

    def attach(self, model: PreTrainedModel) -> None:
        self.model, self.n_layers = model, len(layers(model))
        self.dropped: list[int] = []
        wrong = [layer for layer in self.settings.drop if not 1 <= layer <= self.n_layers]
        if len(set(self.settings.drop)) < len(self.settings.drop):
            raise StudyError(f"layer dropping: drop {list(self.settings.drop)} names a layer twice; name each once")
        if wrong or len(set(self.settings.drop)) >= self.n_layers:
            raise StudyError(
                f"layer dropping: cannot drop {sorted(self.settings.drop)} of {self.n_layers} layers; "
                f"give at most {self.n_layers - 1} numbers from 1 to {self.n_layers}"
            )
        if not self.settings.iterative:
            self._drop(self.settings.drop)

    def step(self, progress: float, trainer: Trainer) -> None:
        due = int(progress * (len(self.settings.drop) + 1))
        order = sorted(self.settings.drop, reverse=True)
        pending = [layer for layer in order[:due] if layer not in self.dropped]
        if self.settings.iterative and pending:
            forget_parameters(trainer.optimizer, self._drop(pending))

    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        self._drop([layer for layer in self.settings.drop if layer not in self.dropped])
        return model

    def summary(self) -> dict[str, Any]:
        kept = [layer for layer in range(1, self.n_layers + 1) if layer not in self.dropped]
        return {"dropped_layers": sorted(self.dropped), "kept_layers": kept, "k": len(self.dropped)}

    def state_dict(self) -> dict[str, Any]:
        return {"dropped": self.dropped}

    def load_state_dict(self, state: dict[str, Any], model: PreTrainedModel) -> None:
        self._drop([layer for layer in state["dropped"] if layer not in self.dropped])

    def _drop(self, numbers: Iterable[int]) -> list[nn.Parameter]:
        """Drop layers given by their original numbers; returns the parameters that went."""
        numbers = list(numbers)
        present = [layer for layer in range(1, self.n_layers + 1) if layer not in self.dropped]
        removed = drop_layers(self.model, [present.index(layer) + 1 for layer in numbers])
        self.dropped += numbers
        return [parameter for layer in removed for parameter in layer.parameters()]
