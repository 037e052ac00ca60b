"""The block Fisher (oracle checks 1 to 5): against plain linear algebra in float64, and where float32 gives out."""

import pytest
import torch

from lib import fisher
from lib.config import StudyError
from lib.fisher import BlockFisher, cubic_sparsity, smallest
from lib.fisher_speed import one_gradient
from lib.memory import peak_memory

LAMBDA, M = 1e-2, 12


def gradients(size: int, count: int = M, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(rows: torch.Tensor, block: int, m: int = M, dampening: float = LAMBDA, **options) -> BlockFisher:
    found = BlockFisher(rows.shape[1], block, m, dampening, **({"dtype": torch.float64} | options))
    for row in rows:
        found.add(row)
    return found


def explicit(rows: torch.Tensor, block: int, m: int = M, dampening: float = LAMBDA) -> torch.Tensor:
    """The block-diagonal Fisher as one dense matrix."""
    full = rows.T @ rows / m + dampening * torch.eye(rows.shape[1], dtype=torch.float64)
    number = torch.arange(rows.shape[1]) // block
    return full * (number[:, None] == number[None, :])


def weights(size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rise(matrix: torch.Tensor, change: torch.Tensor) -> float:
    """Increase of the quadratic loss."""
    return float(change @ matrix @ change / 2)


@pytest.mark.parametrize(("size", "block"), [(20, 5), (23, 5), (7, 7), (6, 50), (9, 1)])
@pytest.mark.parametrize("count", [M, 5])
def test_recursion_equals_the_inverse_of_every_block(size, block, count, monkeypatch):
    """Width not dividing the size; five gradients are still divided by twelve; one block at a time or all at once."""
    rows = gradients(size, count)
    inverse = torch.linalg.inv(explicit(rows, block))
    for chunk in (1, 1 << 20):
        monkeypatch.setitem(fisher.CHUNK_BYTES, "cpu", chunk)
        found = made(rows, block)
        width = min(block, size)
        for start in range(0, size, width):
            part = inverse[start : start + width, start : start + width]
            n = len(part)
            small = 1e-9 * float(part.abs().max())
            torch.testing.assert_close(found.inverse[start // width][:n, :n], part, rtol=1e-9, atol=small)
        torch.testing.assert_close(found.diagonal(), inverse.diagonal(), rtol=1e-9, atol=0)
    assert torch.equal(found.inverse, found.inverse.mT)


def test_a_gradient_may_have_the_weights_own_shape_and_nothing_of_it_is_kept():
    rows, one, other = gradients(24), made(gradients(24), 6), BlockFisher(24, 6, M, LAMBDA, torch.float64)
    for row in rows:
        matrix = row.clone().view(4, 6)
        other.add(matrix)
        matrix.zero_()
    assert torch.equal(one.inverse, other.inverse)
    assert other.inverse.nbytes == 24 * 6 * 8


@pytest.mark.parametrize("group", [1, 4])
def test_large_gradients_and_a_tiny_lambda_are_refused_in_float32_and_right_in_float64(group):
    rows, w = 30 * gradients(32, 64), weights(32)
    said = r"dampening 1e-07 is too small for these gradients in float32.*raise dampening"
    with pytest.raises(StudyError, match=said):
        made(rows, 16, 64, 1e-7, dtype=torch.float32).saliency(w, group)
    with pytest.raises(StudyError, match="too small"):
        made(rows, 16, 64, 1e-7, dtype=torch.float32).update(w, torch.ones(32, dtype=torch.bool), group)
    inverse = torch.linalg.inv(explicit(rows, 16, 64, 1e-7))
    found = made(rows, 16, 64, 1e-7).saliency(w, group)
    assert bool((found > 0).all())
    if group == 1:
        torch.testing.assert_close(found, w**2 / (2 * inverse.diagonal()), rtol=1e-4, atol=0)


def test_gradients_of_a_real_size_keep_float32_accurate():
    rows = 1e-4 * gradients(64, 64)
    exact, rough = made(rows, 32, 64, 1e-7).diagonal(), made(rows, 32, 64, 1e-7, dtype=torch.float32).diagonal()
    torch.testing.assert_close(rough.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("index", [0, 7, 11])
def test_removing_one_weight_is_the_constrained_optimum(index):
    """minimise dw' F dw / 2 subject to dw_q = -w_q: its KKT system solved as it stands."""
    rows, w = gradients(12), weights(12)
    matrix, found = explicit(rows, 6), made(rows, 6)
    pruned = torch.zeros(12, dtype=torch.bool)
    pruned[index] = True
    system = torch.zeros(13, 13, dtype=torch.float64)
    system[:12, :12], system[12, index], system[index, 12] = matrix, 1, 1
    right = torch.cat([torch.zeros(12, dtype=torch.float64), -w[index : index + 1]])
    optimum = torch.linalg.solve(system, right)[:12]
    change = found.update(w, pruned)
    torch.testing.assert_close(change, optimum, rtol=1e-12, atol=1e-12)
    assert (w + change)[index] == 0
    assert rise(matrix, change) == pytest.approx(float(found.saliency(w)[index]), rel=1e-12)


def test_a_group_of_four_is_the_constrained_optimum():
    rows, w = gradients(24), weights(24)
    matrix, found = explicit(rows, 8), made(rows, 8)
    saliency = found.saliency(w, 4)
    assert saliency.shape == (6,)
    for group in range(6):
        chosen = slice(4 * group, 4 * group + 4)
        select = torch.eye(24, dtype=torch.float64)[chosen]
        system = torch.zeros(28, 28, dtype=torch.float64)
        system[:24, :24], system[24:, :24], system[:24, 24:] = matrix, select, select.T
        optimum = torch.linalg.solve(system, torch.cat([torch.zeros(24, dtype=torch.float64), -w[chosen]]))[:24]
        pruned = torch.zeros(24, dtype=torch.bool)
        pruned[chosen] = True
        for joint in (False, True):
            change = found.update(w, pruned, 4, joint)
            torch.testing.assert_close(change, optimum, rtol=1e-11, atol=1e-12)
        assert rise(matrix, optimum) == pytest.approx(float(saliency[group]), rel=1e-11)


def test_joint_update_beats_the_sum_which_beats_none():
    rows, w = gradients(40, 64, seed=4), weights(40)
    matrix, found = explicit(rows, 10, 64), made(rows, 10, 64)
    pruned = smallest(found.saliency(w), 16)
    joint, summed = found.update(w, pruned, joint=True), found.update(w, pruned)
    none = torch.where(pruned, -w, 0)
    assert rise(matrix, joint) < rise(matrix, summed) < rise(matrix, none)
    for change in (joint, summed):
        assert bool(((w + change)[pruned] == 0).all()) and bool((change[~pruned] != 0).any())
    # the joint one is the optimum: no other reply of the living weights is better
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        step = torch.where(pruned, 0, 1e-3 * torch.randn(40, dtype=torch.float64, generator=generator))
        assert rise(matrix, joint + step) > rise(matrix, joint)


def test_adding_a_gradient_takes_no_memory_beside_it():
    """The inverse (width 4) and the gradient: five floats a weight, and a chunk."""
    weights = 4_000_000
    found = peak_memory(one_gradient, weights=weights, width=4)
    assert found == pytest.approx(4 * weights * 5, rel=0.05)


def test_width_one_is_magnitude_weighted_by_mean_squared_gradients():
    rows, w = gradients(9), weights(9)
    found = made(rows, 1)
    torch.testing.assert_close(found.saliency(w), w**2 * (LAMBDA + rows.square().mean(0)) / 2, rtol=1e-10, atol=0)
    pruned = torch.arange(9) % 2 == 0
    assert torch.equal(found.update(w, pruned), torch.where(pruned, -w, 0))


def test_masked_gradients_leave_pruned_weights_alone():
    """A weight without gradient has no influence on the others: their saliency is that of a smaller problem."""
    rows, w = gradients(8), weights(8)
    rows[:, 3], w[3] = 0, 0
    rest = [i for i in range(8) if i != 3]
    found, smaller = made(rows, 8).saliency(w), made(rows[:, rest], 7).saliency(w[rest])
    torch.testing.assert_close(found[rest], smaller, rtol=1e-10, atol=0)
    assert found[3] == 0


def test_schedule_is_the_papers():
    steps = [round(100 * s, 1) for s in cubic_sparsity(0.7, 0.9, 7)]
    assert steps == [70.0, 78.4, 84.1, 87.5, 89.3, 89.9, 90.0]
    assert cubic_sparsity(0.7, 0.9, 1) == [0.9]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 6, 7])
def test_exactly_count_are_chosen_also_among_equals(count):
    scores = torch.tensor([2.0, 1.0, 1.0, -torch.inf, 1.0, 0.0, 5.0])
    chosen = smallest(scores, count)
    order = [3, 5, 1, 2, 4, 0, 6]
    assert sorted(chosen.nonzero().flatten().tolist()) == sorted(order[:count])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda f: BlockFisher(0, 5, 3), "found 0 weights"),
        (lambda f: BlockFisher(9, 5, 3, dampening=0.0), "dampening 0; each must be above 0"),
        (lambda f: f.add(torch.zeros(7)), "found a vector of 7 values, expected 12"),
        *(
            (lambda f, bad=bad: f.add(torch.tensor(11 * [1.0] + [bad])), "gradient 1 is not finite")
            for bad in (torch.nan, torch.inf, -torch.inf)
        ),
        (lambda f: [f.add(torch.zeros(12)) for _ in range(4)], "more gradients came than the 3"),
        (lambda f: f.saliency(torch.ones(12), 4), "groups of 4 do not divide"),
        (lambda f: f.update(torch.ones(12), torch.arange(12) == 0, 3), "a group of 3 is pruned in part"),
        (lambda f: smallest(torch.ones(3), 4), "4 of 3 weights"),
    ],
)
def test_impossible_requests_are_one_line(call, said):
    with pytest.raises(StudyError, match=said):
        call(BlockFisher(12, 6, 3, LAMBDA))
