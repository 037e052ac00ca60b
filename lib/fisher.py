"""The empirical block Fisher of oBERT (Kurtic et al. 2022, arXiv:2203.07259, section 3) and what it says about weights.

F = lambda I + (1/m) sum_i g_i g_i^T over m gradients, cut into diagonal blocks of width B along the flattened weights.
Its inverse starts at I / lambda, and every gradient takes a rank-one step (Woodbury, Eq. 5 there):

    F^-1  <-  F^-1 - (F^-1 g)(F^-1 g)^T / (m + g^T F^-1 g)

Removing the weights Q costs rho = w_Q^T ([F^-1]_QQ)^-1 w_Q / 2, and the best reply of the others in the block is
dw = -F^-1[:, Q] ([F^-1]_QQ)^-1 w_Q. All blocks are one tensor (blocks, B, B), handled some blocks at a time so that a
block is still in the processor's cache when its second product comes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lib.config import StudyError

NARROW = 32  # a product of matrices narrower than this is mostly overhead
CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}  # of the inverse, worked on at a time


class LostPrecision(StudyError):
    """The inverse is below its own rounding noise: lambda is too small for the gradients in this precision."""


class BlockFisher:
    """Inverse of the block Fisher of ``size`` weights, one gradient at a time; nothing is kept of a gradient.

    Memory: size * block floats for the inverse; beside the gradient itself, ``add`` takes no more than a chunk's worth.
    """

    def __init__(self, size: int, block: int, gradients: int, dampening: float = 1e-7,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:  # fmt: skip
        """``gradients`` is m, which divides the sum even if fewer come; ``dampening`` is lambda.

        The last block is filled up with weights that have no gradient when ``block`` does not divide ``size``.

        Raises:
            StudyError: no weights, a width or number of gradients below 1, a lambda that is not above 0.
        """
        if size < 1 or block < 1 or gradients < 1 or not dampening > 0:
            raise StudyError(
                f"block Fisher: found {size} weights, width {block}, {gradients} gradients, dampening {dampening:g}; "
                "each must be above 0"
            )
        self.size, self.block, self.gradients, self.dampening = size, min(block, size), gradients, dampening
        self.blocks = -(-size // self.block)
        self.seen = 0
        self.inverse = torch.zeros(self.blocks, self.block, self.block, dtype=dtype, device=device)
        self.inverse.diagonal(dim1=1, dim2=2).fill_(1 / dampening)

    def _rows(self, vector: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A vector (size,) cut into blocks, (blocks, block); zeros fill the last one."""
        flat = vector.detach().reshape(-1)
        if flat.numel() != self.size:
            raise StudyError(f"block Fisher: found a vector of {flat.numel()} values, expected {self.size}")
        if missing := self.blocks * self.block - self.size:
            flat = torch.nn.functional.pad(flat, (0, missing))
        return flat.view(self.blocks, self.block).to(self.inverse.device, dtype or self.inverse.dtype)

    def _chunks(self) -> Iterator[slice]:
        budget = CHUNK_BYTES.get(self.inverse.device.type, CHUNK_BYTES["cpu"])
        step = max(1, budget // (self.block * self.block * self.inverse.element_size()))
        return (slice(start, start + step) for start in range(0, self.blocks, step))

    def add(self, gradient: Tensor) -> None:
        """Take one gradient, (size,) or of the weights' own shape.

        Raises:
            StudyError: more gradients than announced, or values that are not finite.
        """
        if self.seen >= self.gradients:
            raise StudyError(f"block Fisher: more gradients came than the {self.gradients} that were announced")
        rows = self._rows(gradient)
        if not torch.stack(rows.aminmax()).isfinite().all():  # without isfinite's copies of the whole gradient
            raise StudyError(f"block Fisher: gradient {self.seen + 1} is not finite; the loss has diverged")
        for part in self._chunks():
            inverse, g = self.inverse[part], rows[part].unsqueeze(2)
            product = torch.bmm(g.mT, inverse)  # a row, because that product is the faster one on CPUs
            scale = torch.bmm(product, g).add_(self.gradients).clamp_(min=self.gradients)
            product *= scale.rsqrt_()  # on both sides alike: the inverse stays symmetric to the last bit
            if self.block < NARROW:
                inverse.addcmul_(product.mT, product, value=-1)
            else:
                inverse.baddbmm_(product.mT, product, alpha=-1)
        self.seen += 1

    def check(self) -> None:
        """The positive-definiteness guard, which everything that reads the inverse passes first.

        The inverse falls from 1 / lambda to its value by subtraction, so its absolute error is about the rounding of
        1 / lambda. A diagonal entry of that size is noise, and may be negative, long before the others look wrong.

        Raises:
            LostPrecision: the inverse has lost its precision or its positive definiteness.
        """
        smallest = float(self.inverse.diagonal(dim1=1, dim2=2).min()) * self.dampening
        noise = 100 * torch.finfo(self.inverse.dtype).eps
        if not smallest > noise:
            raise LostPrecision(
                f"block Fisher: dampening {self.dampening:g} is too small for these gradients in "
                f"{str(self.inverse.dtype).removeprefix('torch.')}: the smallest entry of the inverse's diagonal is "
                f"{smallest:.2g} of its start, below the rounding noise of {noise:.2g}; raise dampening, or use float64"
            )

    def diagonal(self) -> Tensor:
        """[F^-1]_jj of every weight, (size,).

        Raises:
            LostPrecision: see ``check``.
        """
        self.check()
        return self.inverse.diagonal(dim1=1, dim2=2).reshape(-1)[: self.size]

    def saliency(self, weights: Tensor, group: int = 1) -> Tensor:
        """Increase of the quadratic loss when each weight, or each run of ``group`` weights, is removed (Eq. 3).

        Args:
            weights: (size,) or the weights' own shape.

        Returns:
            (size / group,), never negative.

        Raises:
            StudyError: ``group`` divides neither size nor width, or the guard.
        """
        self._check_group(group)
        if group == 1:
            flat = weights.detach().reshape(-1).to(self.inverse)
            return flat.square() / (2 * self.diagonal())
        solved, rows = self._solved(weights, group), self._rows(weights)
        grouped = (rows * solved).view(self.blocks, -1, group).sum(2)
        return grouped.div_(2).clamp_(min=0).reshape(-1)[: self.size // group]

    def update(self, weights: Tensor, pruned: Tensor, group: int = 1, joint: bool = False) -> Tensor:
        """What to add to the weights so that the pruned ones become 0 and the others make up for it (Eq. 4).

        Args:
            weights: (size,) or the weights' own shape.
            pruned: the weights that go, bool, the same shape; with ``group`` whole runs of them.
            joint: solve for all pruned weights of a block together, which is the optimum; by default the updates for
                single weights (runs) are added up, as the authors' code does.

        Returns:
            (size,); exactly -w where pruned.

        Raises:
            StudyError: see ``saliency``; or a group that is pruned in part.
        """
        self._check_group(group)
        self.check()
        rows = self._rows(weights)
        chosen = self._rows(pruned, torch.bool)
        if group > 1:
            runs = chosen.view(self.blocks, -1, group)
            if bool((runs.any(2) != runs.all(2)).any()):
                raise StudyError(f"block Fisher: a group of {group} is pruned in part; prune whole groups")
        if joint:
            multipliers = self._solved_jointly(rows, chosen)
        elif group == 1:
            multipliers = rows / self.inverse.diagonal(dim1=1, dim2=2)
        else:
            multipliers = self._solved(weights, group)
        multipliers = torch.where(chosen, multipliers, 0)
        change = torch.empty_like(rows)
        for part in self._chunks():
            change[part] = torch.bmm(self.inverse[part], multipliers[part].unsqueeze(2)).squeeze(2).neg_()
        return torch.where(chosen, -rows, change).reshape(-1)[: self.size]

    def _solved(self, weights: Tensor, group: int) -> Tensor:
        """([F^-1]_QQ)^-1 w_Q of every run Q of ``group`` weights, (blocks, block)."""
        self.check()
        rows = self._rows(weights).view(self.blocks, -1, group, 1)
        solved = torch.empty_like(rows)
        number = self.block // group
        for part in self._chunks():
            inverse = self.inverse[part].view(-1, number, group, number, group)
            squares = inverse.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # (chunk, runs, group, group)
            factor, info = torch.linalg.cholesky_ex(squares)
            if info.any():
                raise LostPrecision(
                    f"block Fisher: the inverse is not positive definite for {int((info > 0).sum())} groups of "
                    f"{group}; raise dampening, or use float64"
                )
            solved[part] = torch.cholesky_solve(rows[part], factor)
        return solved.view(self.blocks, self.block)

    def _solved_jointly(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """([F^-1]_PP)^-1 w_P for the set P of all pruned weights of each block, 0 elsewhere, (blocks, block)."""
        solved = torch.empty_like(rows)
        for part in self._chunks():
            both = chosen[part].unsqueeze(2) & chosen[part].unsqueeze(1)
            system = torch.where(both, self.inverse[part], 0)
            system.diagonal(dim1=1, dim2=2)[~chosen[part]] = 1
            factor, info = torch.linalg.cholesky_ex(system)
            if info.any():
                raise LostPrecision(
                    f"block Fisher: the inverse is not positive definite in {int((info > 0).sum())} blocks; "
                    "raise dampening, or use float64"
                )
            right = torch.where(chosen[part], rows[part], 0).unsqueeze(2)
            solved[part] = torch.cholesky_solve(right, factor).squeeze(2)
        return solved

    def _check_group(self, group: int) -> None:
        if group < 1 or self.size % group or self.block % group:
            raise StudyError(
                f"block Fisher: groups of {group} do not divide the {self.size} weights into blocks of {self.block}; "
                f"give a width that is a multiple of {group}, and a matrix whose size is"
            )


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mask of exactly the ``count`` smallest of ``scores`` (n,); among equal ones the earlier goes first."""
    if not 0 <= count <= scores.numel():
        raise StudyError(f"ranking: {count} of {scores.numel()} weights cannot be chosen")
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if count:
        threshold = torch.kthvalue(scores, count).values
        torch.lt(scores, threshold, out=chosen)
        ties = (scores == threshold).nonzero().flatten()
        chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


def cubic_sparsity(first: float, final: float, steps: int) -> list[float]:
    """Sparsity after each of ``steps`` prunings: s_f + (s_0 - s_f)(1 - t)^3, t from 0 to 1 (Zhu and Gupta 2017).

    >>> [round(100 * s, 1) for s in cubic_sparsity(0.7, 0.9, 7)]
    [70.0, 78.4, 84.1, 87.5, 89.3, 89.9, 90.0]
    """
    if steps == 1:
        return [final]
    return [final + (first - final) * (1 - step / (steps - 1)) ** 3 for step in range(steps)]
