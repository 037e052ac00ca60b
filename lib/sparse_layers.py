"""Linear maps whose zeros are really left out: what torch itself can do with an unstructured sparse model.

CSR keeps single weights. BSR keeps tiles; torch multiplies square ones only (through MKL), so a tile of 4×4 is kept as
soon as one of its weights lives, also where the weights were pruned in runs of four along a row. (``lib.block_sparse``
stores matrices whose zeros are whole square blocks.)
"""

import warnings

import torch
from torch import Tensor, nn

from lib.compressors.masked import encoder_linears
from lib.config import StudyError
from lib.models import layer_parts, layers

TILE = 4


@torch.no_grad()
def zero_at_random(model: nn.Module, sparsity: float, group: int = 1, seed: int = 0) -> None:
    """Set round(sparsity * n) of each encoder matrix's n weights, or runs of ``group`` along a row, to zero in place.

    Raises:
        StudyError: ``group`` does not divide a row.
    """
    generator = torch.Generator().manual_seed(seed)
    for linear in encoder_linears(model):
        if linear.in_features % group:
            raise StudyError(f"random masks: groups of {group} do not divide rows of {linear.in_features} weights")
        runs = linear.weight.view(-1, group)
        gone = torch.randperm(len(runs), generator=generator)[: round(sparsity * len(runs))]
        runs[gone] = 0


class SparseLinear(nn.Module):
    """A linear map whose weight is stored in CSR ("csr"), or in BSR with tiles of 4×4 ("tiles")."""

    def __init__(self, linear: nn.Linear, layout: str) -> None:
        super().__init__()
        weight = linear.weight.detach()
        if layout == "tiles" and not _divides(weight, TILE):
            raise StudyError(f"BSR: tiles of {TILE}×{TILE} do not divide a matrix of {tuple(weight.shape)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # both layouts are marked as beta
            self.weight = weight.to_sparse_bsr((TILE, TILE)) if layout == "tiles" else weight.to_sparse_csr()
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.out_features = linear.out_features

    def forward(self, states: Tensor) -> Tensor:
        """``states`` (…, in_features) -> (…, out_features)."""
        # weight first: with the states first, torch's sparse product fails in inference mode
        rows = states.flatten(0, -2)
        output = (self.weight @ rows.T).T if rows.shape[1] else rows.new_zeros(len(rows), self.out_features)
        if self.bias is not None:
            output = output + self.bias
        return output.reshape(*states.shape[:-1], self.out_features)

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices (64-bit, as torch makes them)."""
        parts = (self.weight.values(), self.weight.crow_indices(), self.weight.col_indices())
        return sum(part.nbytes for part in parts) + (0 if self.bias is None else self.bias.nbytes)


def _divides(weight: Tensor, side: int) -> bool:
    return weight.shape[0] % side == 0 and weight.shape[1] % side == 0


def make_sparse(model: nn.Module, layout: str) -> int:
    """Put ``SparseLinear`` in the place of the encoder's linear maps, in place; returns the model's bytes.

    What cannot be stored so stays dense: a map without any weight, and one that tiles do not divide.
    """
    side = TILE if layout == "tiles" else 1
    for layer in layers(model):
        linears: list[nn.Linear] = list(vars(layer_parts(layer)).values())
        wanted = {id(linear) for linear in linears if linear.weight.numel() and _divides(linear.weight, side)}
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if id(child) in wanted:
                    setattr(parent, name, SparseLinear(child, layout))  # type: ignore[arg-type]
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    return sum(module.nbytes for module in sparse) + sum(parameter.nbytes for parameter in model.parameters())
