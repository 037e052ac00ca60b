"""Scores and masks over blocks of an encoder's matrices, and what a model so pruned has left.

Parts of block movement pruning (Lagunas et al. 2021, section 3); the compressor itself is
``lib.compressors.block_movement``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from lib.blocks import Block, StraightThrough, attention_parts, dense_weights, ffn_parts

Kind = Literal["attention", "ffn"]
KINDS: tuple[Kind, ...] = ("attention", "ffn")
PARTS = {"attention": ("query", "key", "value", "attention_output"), "ffn": ("ffn_in", "ffn_out")}


class Scores(nn.Module):
    """Scores and masks of all matrices, by name; a module of the model, so that checkpoints carry them."""

    def __init__(self, grids: dict[str, Block], trained: bool) -> None:
        super().__init__()
        zeros = {name: nn.Parameter(torch.zeros(grid)) for name, grid in grids.items()}
        self.values = nn.ParameterDict(zeros if trained else {})
        for name, grid in grids.items():
            self.register_buffer(f"mask_{name}", torch.ones(grid, dtype=torch.bool))

    def mask(self, name: str) -> Tensor:
        """Which blocks are there, boolean, (block rows, block columns)."""
        return self.get_buffer(f"mask_{name}")


@dataclass(frozen=True)
class Matrix:
    """One linear map: its place, its block, and the name of its scores.

    ``turned`` marks the second matrix of a pair that shares scores, where they run along the columns. It alone is
    masked (``masked``) while the model trains, which removes the unit as well as masking both would. With both masked
    neither would get a gradient any more, and a pruned unit's score could not learn.
    """

    kind: Kind
    place: str
    part: str
    linear: nn.Linear
    block: Block
    scores: str
    turned: bool = False
    masked: bool = True


class MaskedWeight(nn.Module):
    """Parametrization of a weight: masked, with gradients straight through to the scores."""

    def __init__(self, owner: Scores, matrix: Matrix) -> None:
        super().__init__()
        self.about = owner, matrix  # in a tuple, or the owner would become a submodule

    def forward(self, weight: Tensor) -> Tensor:
        owner, matrix = self.about
        mask = owner.mask(matrix.scores) if matrix.masked else None
        scores = owner.values.get(matrix.scores)
        if matrix.turned:
            mask, scores = None if mask is None else mask.t(), None if scores is None else scores.t()
        return StraightThrough.apply(weight, scores, mask)


class MaskedBias(nn.Module):
    """Parametrization of a bias: an entry goes when its whole row of the matrix is masked."""

    def __init__(self, owner: Scores, matrix: Matrix) -> None:
        super().__init__()
        self.about = owner, matrix

    def forward(self, bias: Tensor) -> Tensor:
        owner, matrix = self.about
        mask = owner.mask(matrix.scores)
        return bias * (mask.t() if matrix.turned else mask).any(1).repeat_interleave(matrix.block[0])


def put_mask(linear: nn.Linear, name: str, masked: nn.Module) -> None:
    """Make ``masked`` the parametrization of a linear map's ``name``."""
    parametrize.register_parametrization(linear, name, masked, unsafe=True)  # same shape and type: needs no check


def original(linear: Any) -> Tensor:
    """The weight before masking."""
    return linear.parametrizations.weight.original


def linear_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Part and weight of every linear map that can be pruned."""
    for kind, parts in (("attention", attention_parts(model)), ("ffn", ffn_parts(model))):
        for owner in parts:
            yield from ((part, getattr(owner, part).weight) for part in PARTS[kind])


@torch.no_grad()
def shape_summary(model: PreTrainedModel) -> dict[str, Any]:
    """Densities of the layers' linear weights: non-zero (``density``) and stored, both as shares of the dense model's.

    ``weights`` counts those stored, ``nonzero`` those of them that are not zero; ``densities`` is the non-zero share of
    each part, ``heads`` and ``units`` what each place kept.
    """
    total, attention, ffn = dense_weights(model), attention_parts(model), ffn_parts(model)
    square = model.config.hidden_size**2
    dense = {"attention": square, "ffn": (total - 4 * square * len(attention)) // (2 * len(ffn))}
    densities: dict[str, list[float]] = {part: [] for parts in PARTS.values() for part in parts}
    nonzero = stored = 0
    for part, weight in linear_weights(model):
        there = int(weight.count_nonzero())
        nonzero, stored = nonzero + there, stored + weight.numel()
        densities[part].append(there / dense["ffn" if part in PARTS["ffn"] else "attention"])
    return {
        "density": nonzero / total, "stored_density": stored / total, "weights": stored, "nonzero": nonzero,
        "densities": densities,
        "heads": [part.heads for part in attention], "units": [part.units for part in ffn],
        "places": {"attention": [part.place for part in attention], "ffn": [part.place for part in ffn]},
    }  # fmt: skip
