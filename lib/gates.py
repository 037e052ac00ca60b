"""Gates on a Transformer's parts: one factor per attention head, per FFN unit and per embedding dimension.

A gate of a head multiplies its context vector before ``attention_output``, a gate of a unit its activation before
``ffn_out`` (McCarley, Chakravarti and Sil 2019, section 3). A gate of an embedding dimension multiplies that dimension
of every state between the layers. No library code is edited: the gates are hooks, and ``remove`` takes them off.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.config import StudyError
from lib.models import base_model, layer_parts, layers

GateKind = Literal["heads", "units", "embedding"]
KINDS: tuple[GateKind, ...] = ("heads", "units", "embedding")

# The hard concrete distribution of Louizos, Welling and Kingma 2018, with their constants.
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
CLOSED_BELOW = math.log(-GAMMA / ZETA)  # -2.398: the test-time gate is exactly 0 up to this log alpha


def sample_gates(log_alpha: Tensor) -> Tensor:
    """Hard concrete samples in [0, 1], of ``log_alpha``'s shape: z = clamp(s (zeta - gamma) + gamma, 0, 1)."""
    u = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6)
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def probability_open(log_alpha: Tensor) -> Tensor:
    """P(z > 0) = sigmoid(log alpha - beta log(-gamma / zeta)), what the L0 penalty adds up."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def gates_at_test(log_alpha: Tensor) -> Tensor:
    """The gate without noise; exactly 0 where log alpha <= ``CLOSED_BELOW``, although P(z > 0) is still 0.31 there."""
    closed = log_alpha <= CLOSED_BELOW
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1).masked_fill(closed, 0)


def head_size(model: PreTrainedModel) -> int:
    """Width of one attention head.

    Raises:
        StudyError: an architecture whose heads cannot be told apart here.
    """
    config = model.config
    heads = getattr(config, "num_attention_heads", None)
    if heads is None or config.model_type == "xlnet":
        raise StudyError(f"structured pruning: {config.model_type} has no heads known here; use BERT or RoBERTa")
    return config.hidden_size // heads


def gate_shapes(model: PreTrainedModel, kind: GateKind) -> list[int]:
    """How many gates of a kind there are: one number per layer for heads and units, one in all for the embedding."""
    size = head_size(model)
    if kind == "embedding":
        return [model.config.hidden_size]
    parts = [layer_parts(layer) for layer in layers(model)]
    return [part.value.out_features // size if kind == "heads" else part.ffn_in.out_features for part in parts]


class Gates:
    """Gates put into a model by hooks; whoever holds this object sets ``values`` before a forward pass.

    ``values[kind]`` is one tensor per layer (one in all for the embedding), each (gates,), or (batch, gates) to
    gate every example for itself. A kind that is not in ``values`` is open.
    """

    def __init__(self, model: PreTrainedModel, kinds: Sequence[GateKind]) -> None:
        self.values: dict[str, Sequence[Tensor]] = {}
        self._handles: list[Any] = []
        size = head_size(model)
        for index, layer in enumerate(layers(model)):
            parts = layer_parts(layer)
            if "heads" in kinds:
                hook = self._hook("heads", index, size)
                self._handles.append(parts.attention_output.register_forward_pre_hook(hook))
            if "units" in kinds:
                self._handles.append(parts.ffn_out.register_forward_pre_hook(self._hook("units", index, 1)))
        if "embedding" in kinds:
            for norm in state_norms(model):
                self._handles.append(norm.register_forward_hook(self._after))

    def _hook(self, kind: GateKind, index: int, repeat: int) -> Callable[..., Any]:
        def gate(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if kind not in self.values:
                return None
            factor = self.values[kind][index]
            return (_times(arguments[0], factor.repeat_interleave(repeat, -1) if repeat > 1 else factor),)

        return gate

    def _after(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return _times(output, self.values["embedding"][0]) if "embedding" in self.values else output

    def remove(self) -> None:
        """Take the hooks off; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _times(states: Tensor, gate: Tensor) -> Tensor:
    """``states`` (batch, length, width) times a gate (width,) or (batch, width)."""
    gate = gate.to(states.dtype)
    return states * (gate if gate.dim() == 1 else gate[:, None])


def state_norms(model: PreTrainedModel) -> list[nn.LayerNorm]:
    """The LayerNorms whose outputs are the states between the parts: the embeddings', and two per layer."""
    inside = [base_model(model).embeddings, *layers(model)]
    return [module for part in inside for module in part.modules() if isinstance(module, nn.LayerNorm)]


@torch.no_grad()
def fold_gates(model: PreTrainedModel, values: Mapping[str, Sequence[Tensor]]) -> None:
    """Multiply gates into the weights behind them, in place, so that the model needs no hooks.

    Args:
        values: as ``Gates.values``, each tensor (gates,).
    """
    size = head_size(model)
    for index, layer in enumerate(layers(model)):
        parts = layer_parts(layer)
        if "heads" in values:
            parts.attention_output.weight.mul_(values["heads"][index].repeat_interleave(size))
        if "units" in values:
            parts.ffn_out.weight.mul_(values["units"][index])
    if "embedding" in values:
        for norm in state_norms(model):
            norm.weight.mul_(values["embedding"][0])
            norm.bias.mul_(values["embedding"][0])
