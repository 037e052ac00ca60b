"""Gates (oracle checks 6 and 7): hard concrete against samples, gradients against weights, folding against hooks."""

import copy
import itertools
import math

import pytest
import torch
from conftest import padded_batch, random_gates, span_logits

from lib.config import StudyError
from lib.gates import (
    CLOSED_BELOW,
    KINDS,
    Gates,
    fold_gates,
    gate_shapes,
    gates_at_test,
    probability_open,
    sample_gates,
    state_norms,
)
from lib.models import layer_parts, layers
from lib.surgery import cut

ARCHITECTURES = ("bert", "roberta", "distilbert")
LABELS = {"start_positions": torch.tensor([3, 0, 1]), "end_positions": torch.tensor([7, 2, 2])}
SAMPLES = 400_000


def cumulative(z: float, log_alpha: float) -> float:
    """P(gate <= z) for 0 <= z < 1: the sigmoid is undone, and log u - log(1 - u) of a uniform u is logistic."""
    s = (z + 0.1) / 1.2
    return 1 / (1 + math.exp(-(2 / 3 * math.log(s / (1 - s)) - log_alpha)))


@pytest.mark.parametrize("log_alpha", [-5.0, -2.398, -1.0, 0.0, 0.7, 2.0, 4.0])
def test_samples_are_hard_concrete(log_alpha):
    torch.manual_seed(0)
    drawn = sample_gates(torch.full((SAMPLES,), log_alpha))
    assert drawn.min() >= 0 and drawn.max() <= 1
    for z in (0.0, 0.1, 0.5, 0.9, 1 - 1e-6):  # the last: 1 - P(z = 1)
        expected = cumulative(z, log_alpha)
        error = 4.5 * math.sqrt(expected * (1 - expected) / SAMPLES)
        assert (drawn <= z).double().mean().item() == pytest.approx(expected, abs=error), z


def test_the_probability_to_be_open_is_the_closed_form():
    log_alpha = torch.linspace(-8, 8, 33, dtype=torch.float64)
    found = probability_open(log_alpha)
    assert found.tolist() == pytest.approx([1 - cumulative(0.0, x) for x in log_alpha.tolist()], abs=1e-12)
    assert found.tolist() == pytest.approx(torch.sigmoid(log_alpha + 1.5986).tolist(), abs=1e-5)
    ones = [1 - cumulative(1.0 - 1e-12, x) for x in log_alpha.tolist()]
    assert ones == pytest.approx(torch.sigmoid(log_alpha - 1.5986).tolist(), abs=1e-5), "the distribution is symmetric"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_test_time_a_gate_closes_while_it_is_still_open_in_a_third_of_the_samples(dtype):
    assert CLOSED_BELOW == -math.log(11) == pytest.approx(-2.398, abs=2e-4)
    edge = torch.tensor([-50.0, -3.0, CLOSED_BELOW], dtype=dtype)
    assert gates_at_test(edge).tolist() == [0.0, 0.0, 0.0]
    assert 0 < gates_at_test(edge[2:] + 1e-4).item() < 1e-4
    assert probability_open(edge[2:]).item() == pytest.approx(0.31, abs=2e-3)
    opened = gates_at_test(torch.tensor([2.39, 2.398, 60.0], dtype=dtype))
    assert opened.tolist() == pytest.approx([0.9993, 1, 1], abs=5e-5) and opened[0] < 1
    assert gates_at_test(torch.zeros(1, dtype=dtype)).item() == pytest.approx(0.5)


def test_extreme_gates_have_finite_samples_and_gradients():
    log_alpha = torch.tensor([-1e4, -80.0, 80.0, 1e4]).repeat(1000).requires_grad_()
    drawn = sample_gates(log_alpha)
    (drawn.sum() + probability_open(log_alpha).sum()).backward()
    assert drawn.view(-1, 4).mean(0).tolist() == [0.0, 0.0, 1.0, 1.0]
    assert torch.isfinite(log_alpha.grad).all()


def labelled(architecture: str) -> dict[str, torch.Tensor]:
    return padded_batch(architecture) | LABELS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["heads", "units"])
def test_the_gradient_of_a_gate_follows_from_its_weights_and_from_its_input(small_model, architecture, kind):
    """Sum of W_o * dL/dW_o over the gate's columns, and of context * dL/dcontext: Michel et al. 2019, section 4.1."""
    model = small_model(architecture).double()
    gates, contexts = Gates(model, [kind]), []
    gates.values = {
        kind: [torch.ones(n, dtype=torch.float64, requires_grad=True) for n in gate_shapes(model, kind)],
    }
    outputs = [getattr(layer_parts(layer), "attention_output" if kind == "heads" else "ffn_out")
               for layer in layers(model)]  # fmt: skip

    def keep(module, arguments) -> None:
        arguments[0].retain_grad()
        contexts.append(arguments[0])

    for linear in outputs:
        linear.register_forward_pre_hook(keep)
    model(**labelled(architecture)).loss.backward()
    size = 8 if kind == "heads" else 1
    for gate, linear, context in zip(gates.values[kind], outputs, contexts, strict=True):
        by_weights = (linear.weight * linear.weight.grad).sum(0).view(-1, size).sum(1)
        by_context = (context * context.grad).sum((0, 1)).view(-1, size).sum(1)
        assert gate.grad.abs().max() > 1e-4
        torch.testing.assert_close(gate.grad, by_weights, atol=1e-7, rtol=0)
        torch.testing.assert_close(gate.grad, by_context, atol=1e-7, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_of_a_gate_is_a_central_difference(small_model, architecture):
    model, batch = small_model(architecture).double(), labelled(architecture)
    model.requires_grad_(False)
    gates = Gates(model, KINDS)
    values = {kind: [row.double() for row in rows] for kind, rows in random_gates(model, KINDS).items()}
    gates.values = values

    def loss() -> torch.Tensor:
        return model(**batch).loss

    for kind, row, index in itertools.product(KINDS, (0, -1), (0, 3)):
        gate, step = values[kind][row], 1e-5
        gate.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(), gate)
        gate.requires_grad_(False)
        shifted = []
        for sign in (1, -1):
            gate[index] += sign * step
            shifted.append(loss().item())
            gate[index] -= sign * step
        assert gradient[index].item() == pytest.approx((shifted[0] - shifted[1]) / (2 * step), abs=1e-7), (kind, row)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kinds", [("heads",), ("units",), ("embedding",), KINDS])
def test_folded_gates_equal_gates_in_hooks(small_model, architecture, kinds):
    """The embedding's go into weight and bias of every LayerNorm, the others into the columns behind them."""
    gated, batch = small_model(architecture), padded_batch(architecture)
    folded, dense = copy.deepcopy(gated), span_logits(gated, batch)
    gates = Gates(gated, kinds)
    assert torch.equal(span_logits(gated, batch), dense), "without values every gate is open"
    gates.values = random_gates(gated, kinds)
    expected = span_logits(gated, batch)
    assert (expected - dense).abs().max() > 1e-2
    fold_gates(folded, gates.values)
    torch.testing.assert_close(span_logits(folded, batch), expected, atol=1e-5, rtol=1e-5)
    gates.remove()
    assert torch.equal(span_logits(gated, batch), dense)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_gate_scales_its_own_context_alone(small_model, architecture):
    model, batch, seen = small_model(architecture), padded_batch(architecture), []
    linear = layer_parts(layers(model)[1]).attention_output
    linear.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    gates = Gates(model, ["heads"])
    span_logits(model, batch)
    gates.values = {"heads": [torch.ones(4), torch.tensor([1.0, 0.0, 0.5, 1.0]), torch.ones(4), torch.ones(4)]}
    span_logits(model, batch)
    dense, gated = (context.unflatten(-1, (4, 8)) for context in seen)
    torch.testing.assert_close(gated, dense * torch.tensor([1.0, 0.0, 0.5, 1.0])[:, None])


@pytest.mark.parametrize("kinds", [("heads", "units"), ("embedding",)])
def test_every_example_may_have_gates_of_its_own(small_model, kinds):
    model, batch = small_model("bert"), padded_batch("bert")
    gates = Gates(model, kinds)
    alone = [random_gates(model, kinds, seed) for seed in (3, 4, 5)]
    expected = []
    for row, values in enumerate(alone):
        gates.values = values
        expected.append(span_logits(model, {name: value[row : row + 1] for name, value in batch.items()}))
    gates.values = {
        kind: [torch.stack(rows) for rows in zip(*(values[kind] for values in alone), strict=True)] for kind in kinds
    }
    torch.testing.assert_close(span_logits(model, batch), torch.cat(expected, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gates_are_counted_layer_by_layer(small_model, architecture):
    model = small_model(architecture)
    assert gate_shapes(model, "heads") == [4] * 4 and gate_shapes(model, "units") == [48] * 4
    assert gate_shapes(model, "embedding") == [32] and len(state_norms(model)) == 1 + 2 * 4
    cut(model, heads=[[0, 1, 2], [], [3], [0, 1, 2, 3]], units=[range(48), range(5), [], [7]])
    assert gate_shapes(model, "heads") == [3, 0, 1, 4] and gate_shapes(model, "units") == [48, 5, 0, 1]
    gates = Gates(model, KINDS)
    gates.values = random_gates(model, KINDS)
    assert torch.isfinite(span_logits(model, padded_batch(architecture))).all()


def test_xlnet_is_one_line(small_model):
    with pytest.raises(StudyError, match="xlnet has no heads known here; use BERT or RoBERTa") as caught:
        Gates(small_model("xlnet"), ["heads"])
    assert "\n" not in str(caught.value)
