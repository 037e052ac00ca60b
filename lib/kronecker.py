"""Kronecker products in place of weight matrices (KroneckerBERT, Tahaei et al. 2021, arXiv:2109.06243, section 3).

A weight (m, n) becomes W = sum over i of A_i ⊗ B_i, with A_i (m1, n1), B_i (m2, n2), m = m1 m2 and n = n1 n2; the paper
uses one term. The nearest such sum in the Frobenius norm is the truncated SVD of a rearranged W (Van Loan and Pitsianis
1993). The product is never built: with X the input as a matrix (n1, n2), (A ⊗ B) x is A X Bᵀ, two small products.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.config import StudyError

Shape = tuple[int, int]
INITIAL_STD = 0.02  # of a BERT's weights before pre-training; random factors give their product the same


class Nearest(NamedTuple):
    """``a`` (terms, m1, n1), ``b`` (terms, m2, n2) and the error: |W - product| / |W|, Frobenius norm."""

    a: Tensor
    b: Tensor
    error: float


def rearrange(weight: Tensor, first: Shape) -> Tensor:
    """Van Loan's rearrangement: row (i, j) of the result is block (i, j) of ``weight``, laid out in one row.

    Args:
        weight: (m1 m2, n1 n2).
        first: (m1, n1), shape of the first factor.

    Returns:
        (m1 n1, m2 n2). It has rank 1 exactly when ``weight`` is a Kronecker product.
    """
    (m1, n1), (m2, n2) = first, second_shape(weight.shape, first)
    return weight.reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)


def nearest_kronecker(weight: Tensor, first: Shape, terms: int = 1) -> Nearest:
    """The sum of ``terms`` Kronecker products nearest to ``weight``, computed in float64.

    A_i = sqrt(sigma_i) u_i and B_i = sqrt(sigma_i) v_i, from the largest singular values of the rearranged weight. The
    squared error is the sum of the squares of the singular values that are left out.

    Args:
        weight: (m1 m2, n1 n2).
        first: (m1, n1), shape of the first factor.

    Raises:
        StudyError: the shape does not divide the weight, or more terms than an exact sum needs.
    """
    second = second_shape(weight.shape, first)
    most = min(first[0] * first[1], second[0] * second[1])
    if not 1 <= terms <= most:
        raise StudyError(f"kronecker: {terms} terms of {first} ⊗ {second}; give 1 to {most}, which is exact")
    u, sigma, vh = torch.linalg.svd(rearrange(weight.detach().double(), first), full_matrices=False)
    root = sigma[:terms].sqrt()
    a, b = (root * u[:, :terms]).T.reshape(terms, *first), (root[:, None] * vh[:terms]).reshape(terms, *second)
    error = (sigma[terms:].square().sum() / sigma.square().sum().clamp(min=1e-300)).sqrt().item()
    return Nearest(a.to(weight.dtype), b.to(weight.dtype), error)


def second_shape(shape: torch.Size | Shape, first: Shape, where: str = "weight") -> Shape:
    """Shape of the second factor of a weight.

    Raises:
        StudyError: the first factor's shape does not divide the weight's.
    """
    if min(first) < 1 or shape[0] % first[0] or shape[1] % first[1]:
        raise StudyError(
            f"kronecker: {where}: a first factor of {first[0]} × {first[1]} does not divide {shape[0]} × {shape[1]}; "
            "give divisors of both sizes"
        )
    return shape[0] // first[0], shape[1] // first[1]


def multiply_adds(first: Shape, second: Shape, terms: int, a_first: bool) -> int:
    """Multiply-adds of sum A_i X B_iᵀ for one X (n1, n2) when the A_i, or else the B_i, are applied first."""
    (m1, n1), (m2, n2) = first, second
    return terms * (m1 * n1 * n2 + m1 * n2 * m2 if a_first else n1 * n2 * m2 + m1 * n1 * m2)


class _Factors(nn.Module):
    """A sum of Kronecker products; ``a`` and ``b`` hold all terms of a factor as one matrix.

    A matrix holds its terms one below the other (``stacked``) or side by side, as it is multiplied with: nothing is
    rearranged in a forward pass, and engines find constant matrices to quantise.
    """

    def __init__(self, first: Shape, second: Shape, terms: int, stacked: tuple[bool, bool]) -> None:
        super().__init__()
        self.first, self.second, self.terms, self.stacked = first, second, terms, stacked
        sizes = [
            (terms * m, n) if upright else (m, terms * n)
            for (m, n), upright in zip((first, second), stacked, strict=True)
        ]
        self.a, self.b = (nn.Parameter(torch.empty(size)) for size in sizes)
        self.set_random()

    @property
    def shape(self) -> Shape:
        """Shape of the product."""
        return self.first[0] * self.second[0], self.first[1] * self.second[1]

    def factors(self) -> tuple[Tensor, Tensor]:
        """All A_i, (terms, m1, n1), and all B_i, (terms, m2, n2)."""
        return tuple(
            matrix.unflatten(0, (self.terms, m)) if upright else matrix.unflatten(1, (self.terms, n)).transpose(0, 1)
            for matrix, (m, n), upright in zip((self.a, self.b), (self.first, self.second), self.stacked, strict=True)
        )

    @torch.no_grad()
    def set_factors(self, a: Tensor, b: Tensor) -> None:
        """Take factors as ``factors`` gives them."""
        for matrix, factor, upright in zip((self.a, self.b), (a, b), self.stacked, strict=True):
            matrix.copy_(factor.flatten(0, 1) if upright else factor.transpose(0, 1).flatten(1))

    def product(self) -> Tensor:
        """The dense weight, ``shape``: for checks, and for whoever would rather have speed than memory."""
        return torch.stack([torch.kron(a, b) for a, b in zip(*self.factors(), strict=True)]).sum(0)

    def set_nearest(self, weight: Tensor) -> float:
        """Take the factors nearest to a weight of ``shape``; returns the relative error."""
        a, b, error = nearest_kronecker(weight, self.first, self.terms)
        self.set_factors(a, b)
        return error

    @torch.no_grad()
    def set_random(self, std: float = INITIAL_STD, generator: torch.Generator | None = None) -> None:
        """Draw normal factors, both of one size, so that the product's entries have a deviation of ``std``."""
        size = (std**2 / self.terms) ** 0.25
        for factor in (self.a, self.b):
            factor.copy_(size * torch.randn(factor.shape, generator=generator))

    def extra_repr(self) -> str:
        terms = f"{self.terms} terms of " if self.terms > 1 else ""
        return f"{self.shape[0]} × {self.shape[1]} as {terms}{self.first} ⊗ {self.second}"


class KroneckerLinear(_Factors):
    """A linear map whose weight is a sum of Kronecker products; takes the place of an ``nn.Linear``.

    A X Bᵀ is computed from the side that needs fewer multiply-adds. The terms share two matrix products, since
    sum A_i X B_iᵀ = [A_1 … A_r] [X B_1ᵀ; …; X B_rᵀ].
    """

    def __init__(self, first: Shape, second: Shape, terms: int = 1, bias: bool = True,
                 a_first: bool | None = None) -> None:  # fmt: skip
        """``a_first`` None takes the cheaper order."""
        if a_first is None:
            a_first = multiply_adds(first, second, terms, True) <= multiply_adds(first, second, terms, False)
        super().__init__(first, second, terms, (a_first, not a_first))
        self.a_first = a_first
        self.out_features, self.in_features = self.shape
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if bias else None

    @classmethod
    def like(cls, linear: nn.Linear, first: Shape, terms: int = 1, where: str = "weight") -> "KroneckerLinear":
        """A map of ``linear``'s size with its bias; the factors are still random."""
        made = cls(first, second_shape(linear.weight.shape, first, where), terms, linear.bias is not None)
        made.to(linear.weight.device, linear.weight.dtype)
        if made.bias is not None:
            made.bias = linear.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., n1 n2) to (..., m1 m2)."""
        x = x.unflatten(-1, (self.first[1], self.second[1]))
        if self.a_first:
            inner = F.linear(x.transpose(-1, -2), self.a)  # (..., n2, terms m1)
            y = F.linear(_terms_last(inner, self.terms), self.b)
        else:
            inner = F.linear(x, self.b)  # (..., n1, terms m2)
            y = F.linear(_terms_last(inner, self.terms), self.a).transpose(-1, -2)
        y = y.flatten(-2)
        return y if self.bias is None else y + self.bias


def _terms_last(inner: Tensor, terms: int) -> Tensor:
    """(..., n, terms m) to (..., m, terms n)."""
    if terms == 1:
        return inner.transpose(-1, -2)
    return inner.unflatten(-1, (terms, -1)).movedim(-3, -1).transpose(-3, -2).flatten(-2)


class KroneckerEmbedding(_Factors):
    """An embedding table that is a sum of Kronecker products; takes the place of an ``nn.Embedding``.

    Row i of A ⊗ B is A's row i // v2 times B's row i % v2, each entry of the one with each of the other, so a lookup
    reads two short rows. The paper's B has one row (v2 = 1).
    """

    def __init__(self, first: Shape, second: Shape, terms: int = 1) -> None:
        super().__init__(first, second, terms, (False, False))
        self.num_embeddings, self.embedding_dim = self.shape

    @classmethod
    def like(cls, table: nn.Embedding, first: Shape, terms: int = 1, where: str = "table") -> "KroneckerEmbedding":
        """A table of another's size; the factors are still random."""
        made = cls(first, second_shape(table.weight.shape, first, where), terms)
        return made.to(table.weight.device, table.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (...) to vectors (..., d1 d2)."""
        upper, lower = self.first[0], self.second[0]
        a = _rows(self.a, ids if lower == 1 else ids // lower).unflatten(-1, (self.terms, -1))
        b = _rows(self.b, ids if upper == 1 else ids % lower).unflatten(-1, (self.terms, -1))
        vectors = a.unsqueeze(-1) * b.unsqueeze(-2)  # (..., terms, d1, d2)
        return (vectors.squeeze(-3) if self.terms == 1 else vectors.sum(-3)).flatten(-2)


def _rows(factor: Tensor, ids: Tensor) -> Tensor:
    """Rows of a factor (v, d) by number, (..., d); a single row serves every number."""
    return factor if len(factor) == 1 else F.embedding(ids, factor)
