"""Block-sparse execution in PyTorch (BSR on the CPU, by MKL): stores and multiplies only the blocks that are not empty.

It is here to be measured: a dense product of the same matrix uses the hardware so much better that most blocks have to
be gone before BSR wins, and it knows fp32 alone.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.blocks import Block, attention_parts, grid_of, times_blocks
from lib.config import StudyError

BLOCK_SIZES = (64, 32, 16, 8, 4)  # square blocks that are looked for, the largest first


@torch.no_grad()
def zero_blocks(model: PreTrainedModel, block: Block, densities: Sequence[float], seed: int = 0) -> None:
    """Set random blocks of the attention matrices to zero, in place; ``densities`` of each layer's blocks stay.

    Raises:
        StudyError: not one density per layer, or a block that does not divide a matrix.
    """
    parts = attention_parts(model)
    if len(densities) != len(parts):
        raise StudyError(f"blocks: {len(densities)} densities for {len(parts)} layers; give one for each")
    generator = torch.Generator().manual_seed(seed)
    for part, density in zip(parts, densities, strict=True):
        linears = (part.query, part.key, part.value, part.attention_output)
        grids = [grid_of(linear.weight.shape, block, part.place) for linear in linears]
        chosen = torch.rand(sum(rows * columns for rows, columns in grids), generator=generator).argsort()
        kept = chosen < round(density * len(chosen))
        for linear, grid, mask in zip(linears, grids, kept.split([r * c for r, c in grids]), strict=True):
            linear.weight.copy_(times_blocks(linear.weight, mask.view(grid)))


def empty_block(weight: Tensor) -> int | None:
    """Side of the largest square blocks in which all of a matrix's zeros lie; None where there are none."""
    zeros = int((weight == 0).sum())
    if not zeros:
        return None
    for size in BLOCK_SIZES:
        if weight.shape[0] % size == 0 and weight.shape[1] % size == 0:
            blocks = weight.reshape(weight.shape[0] // size, size, weight.shape[1] // size, size)
            if int((blocks == 0).all(3).all(1).sum()) * size**2 == zeros:
                return size
    return None


def to_block_sparse(model: nn.Module) -> tuple[int, int]:
    """Store every linear weight whose zeros are whole blocks as BSR, in place; returns how many of how many."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    converted = 0
    for linear in linears:
        if size := empty_block(linear.weight):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # BSR is marked as beta
                sparse: Any = linear.weight.detach().to_sparse_bsr((size, size))
            linear.weight = nn.Parameter(sparse, requires_grad=False)
            converted += 1
    return converted, len(linears)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all weights, sparse ones as blocks and their indices."""
    total = 0
    for tensor in model.state_dict().values():
        stored = [tensor]
        if tensor.layout == torch.sparse_bsr:
            stored = [tensor.values(), tensor.crow_indices(), tensor.col_indices()]
        total += sum(part.numel() * part.element_size() for part in stored)
    return total
