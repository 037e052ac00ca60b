"""Dropout from bytes: rate, scale, gradient, and when it steps aside."""

import pytest
import torch
from torch import nn

from lib.dropout import ByteDropout, use_byte_dropout
from lib.models import load_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rate", "dropped"), [(0.1, 26 / 256), (0.3, 77 / 256), (0.5, 0.5)])
def test_rate_and_scale(rate, dropped, dtype):
    torch.manual_seed(0)
    states = torch.ones(1000, 1003, dtype=dtype)  # not a multiple of four elements
    found = ByteDropout(rate)(states)
    share = (found == 0).float().mean().item()
    assert share == pytest.approx(dropped, abs=5 * (dropped * (1 - dropped) / states.numel()) ** 0.5)
    kept = found[found != 0].unique()
    assert kept.tolist() == [pytest.approx(1 / (1 - dropped), rel=torch.finfo(dtype).eps)]
    for side in (found.float().mean(0), found.float().mean(1)):  # no row or column is special
        assert side.std().item() == pytest.approx((dropped / (1 - dropped) / 1000) ** 0.5, rel=0.15)


def test_the_gradient_goes_where_the_values_went():
    states = torch.randn(50, 40, dtype=torch.float64, requires_grad=True)
    found = ByteDropout(0.25)(states)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    torch.testing.assert_close(states.grad, torch.where(found == 0, 0, upstream / 0.75))


def test_it_follows_the_seed():
    states, layer = torch.ones(64, 64), ByteDropout(0.4)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(layer(states))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("layer", [ByteDropout(0.5).eval(), ByteDropout(0.0)])
def test_nothing_is_dropped_in_eval_mode_or_at_rate_zero(layer):
    states = torch.randn(8, 8)
    assert torch.equal(layer(states), states)
    assert not ByteDropout(1.0)(states).any()


def test_a_model_gets_it_everywhere_and_stays_the_same_otherwise():
    model = load_model("tiny-bert", "classification", dropout=0.2, attention_dropout=0.0)
    state = model.state_dict()
    use_byte_dropout(model)
    found = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert found and all(isinstance(module, ByteDropout) for module in found)
    assert {module.p for module in found} == {0.0, 0.2}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    torch.manual_seed(0)
    one, other = model.train()(**batch).logits, model(**batch).logits
    assert not torch.equal(one, other) and torch.equal(model.eval()(**batch).logits, model(**batch).logits)
