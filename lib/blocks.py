"""Blocks of a weight matrix: masks that training can move, and what of a model is empty afterwards.

A block has a score S. Its weights take part where the mask M is 1, and the score learns as if the mask were S itself:
straight through the threshold and the sigmoid (Lagunas, Charlaix, Sanh and Rush 2021, section 3; Sanh, Wolf and Rush
2020, Eq. 3)::

    W'_ij = W_ij M_b                    dL/dW_ij = M_b dL/dW'_ij            dL/dS_b = sum over ij in b of W_ij dL/dW'_ij

So a pruned block's weights rest while its score goes on learning, and it may return.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.config import StudyError
from lib.gates import head_size
from lib.models import layer_parts, layers
from lib.surgery import cut, cut_between
from lib.translation import Attention, TranslationModel

Block = tuple[int, int]  # rows and columns of a block


def grid_of(shape: tuple[int, ...], block: Block, where: str) -> Block:
    """How many blocks a matrix of ``shape`` (rows, columns) has in each direction.

    Raises:
        StudyError: the block does not divide the matrix.
    """
    (rows, columns), (height, width) = shape, block
    if height < 1 or width < 1 or rows % height or columns % width:
        raise StudyError(
            f"{where}: a block of {height} × {width} does not divide a matrix of {rows} × {columns}; "
            "give rows and columns that do"
        )
    return rows // height, columns // width


def times_blocks(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight`` (rows, columns) with every block multiplied by its entry of ``mask`` (block rows, block columns)."""
    mask = mask.to(weight.dtype)
    if mask.shape == weight.shape:
        return weight * mask
    height, width = weight.shape[0] // mask.shape[0], weight.shape[1] // mask.shape[1]
    blocks = weight.reshape(mask.shape[0], height, mask.shape[1], width)
    return (blocks * mask[:, None, :, None]).view(weight.shape)


def block_sums(values: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Sum of ``values`` (rows, columns) over each block of ``grid``, in its shape."""
    if tuple(values.shape) == tuple(grid):
        return values
    height, width = values.shape[0] // grid[0], values.shape[1] // grid[1]
    return values.reshape(grid[0], height, grid[1], width).sum(3).sum(1)


class StraightThrough(torch.autograd.Function):
    """W' of a weight, its blocks' scores and their mask (boolean), with the gradients above.

    Without a mask W' is W: for the first matrix of a pair whose second one is masked.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor | None, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.grid = None if scores is None else scores.shape
        return weight.view_as(weight) if mask is None else times_blocks(weight, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight, mask), gradient = ctx.saved_tensors, gradients[0]
        to_scores = block_sums(gradient * weight, ctx.grid) if ctx.needs_input_grad[1] else None
        return gradient if mask is None else times_blocks(gradient, mask), to_scores, None


def best(scores: list[Tensor], kept: int) -> list[Tensor]:
    """Boolean masks of the ``kept`` highest of all scores together; among equals the earlier tensor and place stays."""
    flat = torch.cat([score.detach().flatten() for score in scores])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    if kept:
        bound = flat.kthvalue(len(flat) - kept + 1).values
        mask = flat > bound
        mask[(flat == bound).nonzero().flatten()[: kept - int(mask.sum())]] = True
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


@dataclass(frozen=True)
class AttentionPart:
    """The linear maps of one attention; ``size`` is the width of a head, ``place`` where it is ("layer 1")."""

    place: str
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    size: int

    @property
    def heads(self) -> int:
        return self.value.out_features // self.size


@dataclass(frozen=True)
class FfnPart:
    """The linear maps of one feed-forward network."""

    place: str
    ffn_in: nn.Linear
    ffn_out: nn.Linear

    @property
    def units(self) -> int:
        return self.ffn_in.out_features


def attention_parts(model: PreTrainedModel) -> list[AttentionPart]:
    """Every attention of an encoder, or of a translation model: the encoder's, then two of each decoder layer."""
    if isinstance(model, TranslationModel):
        found: list[tuple[str, Any]] = []
        for i, layer in enumerate(model.encoder_layers, start=1):
            found.append((f"encoder {i}", layer.attention))
        for i, layer in enumerate(model.decoder_layers, start=1):
            found += [(f"decoder {i}", layer.attention), (f"decoder {i}, source", layer.cross)]
        return [AttentionPart(place, a.query, a.key, a.value, a.output, a.head_size) for place, a in found]
    size, stack = head_size(model), [layer_parts(layer) for layer in layers(model)]
    return [
        AttentionPart(f"layer {i}", parts.query, parts.key, parts.value, parts.attention_output, size)
        for i, parts in enumerate(stack, start=1)
    ]


def ffn_parts(model: PreTrainedModel) -> list[FfnPart]:
    """Every feed-forward network of an encoder, or of a translation model (the encoder's first)."""
    if isinstance(model, TranslationModel):
        sides: dict[str, Any] = {"encoder": model.encoder_layers, "decoder": model.decoder_layers}
        return [
            FfnPart(f"{side} {i}", layer.ffn.ffn_in, layer.ffn.ffn_out)
            for side, stack in sides.items()
            for i, layer in enumerate(stack, start=1)
        ]
    stack = [layer_parts(layer) for layer in layers(model)]
    return [FfnPart(f"layer {i}", parts.ffn_in, parts.ffn_out) for i, parts in enumerate(stack, start=1)]


@torch.no_grad()
def needed_heads(part: AttentionPart) -> list[int]:
    """The heads (from 0) that cannot go: removing any other changes no output.

    A head has no influence when its value weights and biases are all zero, or its columns of the attention's output
    map. A head whose query or key alone is zero attends to every token alike, and stays.
    """
    value = part.value.weight.ne(0).any(1)
    if part.value.bias is not None:
        value = value | part.value.bias.ne(0)
    output = part.attention_output.weight.ne(0).any(0)
    needed = value.view(-1, part.size).any(1) & output.view(-1, part.size).any(1)
    return needed.nonzero().flatten().tolist()


@torch.no_grad()
def needed_units(part: FfnPart) -> list[int]:
    """The units that cannot go: one is empty when all weights and the bias into it are zero, or all weights out of it.

    The activation of 0 must be 0, as GELU's and ReLU's is.
    """
    inward = part.ffn_in.weight.ne(0).any(1)
    if part.ffn_in.bias is not None:
        inward = inward | part.ffn_in.bias.ne(0)
    return (inward & part.ffn_out.weight.ne(0).any(0)).nonzero().flatten().tolist()


def remove_empty(model: PreTrainedModel) -> list[list[int]]:
    """Remove heads and units without influence, in place; the outputs stay the same. Returns the heads that stay."""
    attention, ffn = attention_parts(model), ffn_parts(model)
    heads, units = [needed_heads(part) for part in attention], [needed_units(part) for part in ffn]
    if not isinstance(model, TranslationModel):
        cut(model, heads, units)
        return heads
    for one, kept in zip(attention, heads, strict=True):
        cut_between((one.query, one.key, one.value), one.attention_output, kept, one.size, f"{one.place}, heads")
    for other, kept in zip(ffn, units, strict=True):
        cut_between((other.ffn_in,), other.ffn_out, kept, 1, f"{other.place}, units")
    for module in model.modules():
        if isinstance(module, Attention):
            module.heads = module.value.out_features // module.head_size
    return heads


def dense_weights(model: PreTrainedModel) -> int:
    """Weights of the layers' linear maps before anything was cut: what every density refers to."""
    attentions, ffns, config = len(attention_parts(model)), len(ffn_parts(model)), model.config
    units = config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size
    return attentions * 4 * config.hidden_size**2 + ffns * 2 * config.hidden_size * units
