"""Poor Man's BERT (oracle checks 10 and 13): the paper's layer sets; dropping a layer equals making it the identity."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import padded_batch

from lib.compressors import CompressorSpec, LayerDropping, make_compressor
from lib.compressors.layer_dropping import (
    STRATEGIES,
    above_threshold,
    layer_contributions,
    layers_to_drop,
    possible,
)
from lib.config import StudyError
from lib.models import base_model, layer_parts, layers
from lib.surgery import drop_layers

ARCHITECTURES = ("bert", "roberta", "distilbert", "xlnet")
# Sajjad et al. 2020, section 3, for 12 layers.
PAPER = {
    "top": {2: {11, 12}, 4: {9, 10, 11, 12}, 6: {7, 8, 9, 10, 11, 12}},
    "bottom": {2: {1, 2}, 4: {1, 2, 3, 4}, 6: {1, 2, 3, 4, 5, 6}},
    "odd": {2: {9, 11}, 4: {5, 7, 9, 11}, 6: {1, 3, 5, 7, 9, 11}},
    "even": {2: {10, 12}, 4: {6, 8, 10, 12}, 6: {2, 4, 6, 8, 10, 12}},
    "symmetric": {2: {6, 7}, 4: {5, 6, 7, 8}, 6: {4, 5, 6, 7, 8, 9}},
}


@pytest.mark.parametrize("strategy", PAPER)
@pytest.mark.parametrize("k", [2, 4, 6])
def test_sets_are_the_papers(strategy, k):
    assert layers_to_drop(strategy, k, 12) == tuple(sorted(PAPER[strategy][k]))


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 12, 24])
def test_every_possible_set_has_k_different_layers_of_the_model(n):
    scores = [(7 * layer % 5) / 10 for layer in range(n)]
    for strategy in STRATEGIES:
        for k in range(1, n):
            if possible(strategy, k, n):
                chosen = layers_to_drop(strategy, k, n, scores)
                assert len(set(chosen)) == k and list(chosen) == sorted(chosen) and set(chosen) <= set(range(1, n + 1))
    assert [k for k in range(1, n) if not possible("top", k, n)] == []
    assert [k for k in range(1, n) if possible("even", k, n)] == list(range(1, min(n // 2, n - 1) + 1))
    assert [k for k in range(1, n) if possible("symmetric", k, n)] == [k for k in range(1, n) if (n - k) % 2 == 0]


def test_contribution_drops_the_most_similar_layers():
    similarity = [0.5, 0.99, 0.8, 0.97, 0.8, 0.1]
    assert [layers_to_drop("contribution", k, 6, similarity) for k in (1, 2, 3)] == [(2,), (2, 4), (2, 3, 4)]
    assert above_threshold(similarity, 0.95) == (2, 4) and above_threshold(similarity, 0.8) == (2, 4)
    assert above_threshold(similarity, 1.0) == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("top", 12, 12), "K=12 is impossible with 12 layers; give 1 to 11"),
        (("top", 0, 12), "K=0 is impossible"),
        (("bottom", -1, 12), "K=-1 is impossible"),
        (("odd", 7, 12), "odd alternate has 6 layers of 12, K=7"),
        (("even", 3, 5), "even alternate has 2 layers of 5, K=3"),
        (("symmetric", 3, 12), "symmetric needs L - K even, found L=12, K=3"),
        (("contribution", 2, 12), "one similarity for each of the 12 layers"),
        (("contribution", 2, 12, [0.5] * 6), "one similarity for each of the 12 layers"),
        (("middle", 2, 12), "unknown strategy 'middle'; known: top, bottom, odd, even, symmetric, contribution"),
    ],
)
def test_impossible_requests_are_one_line(arguments, said):
    with pytest.raises(StudyError, match=said):
        layers_to_drop(*arguments)


def make_identity(layer) -> None:
    """Let a layer hand on its input, whatever it computes."""

    def pass_through(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        if not isinstance(output, tuple):
            return hidden
        return (hidden, *output[1:])

    layer.register_forward_hook(pass_through, with_kwargs=True)


@torch.no_grad()
def span_logits(model, batch) -> torch.Tensor:
    """Start and end logits at the real tokens."""
    output = model(**batch)
    real = batch["attention_mask"].bool()
    return torch.stack([output.start_logits[real], output.end_logits[real]])


CASES = [(name, kind) for name in ARCHITECTURES for kind in ("eager", "sdpa") if (name, kind) != ("xlnet", "sdpa")]


@pytest.mark.parametrize(("architecture", "attention"), CASES)
@pytest.mark.parametrize("dropped", [{4}, {1}, {2, 3}, {1, 2, 4}])
def test_shrunk_equals_the_original_with_identity_layers(small_model, architecture, attention, dropped):
    original = small_model(architecture, attention)
    shrunk = copy.deepcopy(original)
    assert len(drop_layers(shrunk, dropped)) == len(dropped) and len(layers(shrunk)) == 4 - len(dropped)
    batch = padded_batch(architecture)
    dense = span_logits(original, batch)
    for number in dropped:
        make_identity(layers(original)[number - 1])
    expected, found = span_logits(original, batch), span_logits(shrunk, batch)
    assert (dense - expected).abs().max() > 1e-2, "the dropped layers must matter for this test to mean anything"
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_does_not_reach_a_shrunk_models_real_tokens(small_model, architecture):
    model = small_model(architecture)
    drop_layers(model, {2})
    batch = padded_batch(architecture)
    real = batch["attention_mask"][2].bool()
    alone = {name: value[2:3, real] for name, value in batch.items()}
    torch.testing.assert_close(
        span_logits(model, alone), span_logits(model, {name: value[2:3] for name, value in batch.items()}),
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_says_how_many_layers_are_left(small_model, architecture):
    model = small_model(architecture)
    drop_layers(model, {1, 3})
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("numbers", [{0}, {5}, {1, 2, 3, 4}])
def test_layers_that_cannot_go_are_refused_and_the_model_stays(tiny_bert, numbers):
    with pytest.raises(StudyError, match="cannot drop layers"):
        drop_layers(tiny_bert, numbers)
    assert len(layers(tiny_bert)) == 4 == tiny_bert.config.num_hidden_layers


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_a_hand_built_identity_layer_has_contribution_one(small_model, architecture):
    """Without attention and FFN output a layer only normalises again what is normalised already."""
    model = small_model(architecture)
    parts = layer_parts(layers(model)[2])
    for linear in (parts.attention_output, parts.ffn_out):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    similarity = layer_contributions(model, [padded_batch(architecture)])
    assert similarity[2] == pytest.approx(1.0, abs=1e-6)
    assert all(value < 0.999 for layer, value in enumerate(similarity) if layer != 2)
    assert above_threshold(similarity, 0.999) == (3,) == layers_to_drop("contribution", 1, 4, similarity)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_contributions_are_the_mean_over_examples_at_the_classification_token(small_model, architecture):
    model, batch = small_model(architecture), padded_batch(architecture)
    with torch.no_grad():
        states = base_model(model)(**batch, output_hidden_states=True).hidden_states
    place = 8 if architecture == "xlnet" else 0
    by_hand = [
        sum(
            torch.dot(before[row, place], after[row, place]) / before[row, place].norm() / after[row, place].norm()
            for row in range(3)
        ) / 3
        for before, after in itertools.pairwise(states)
    ]  # fmt: skip
    assert len(states) == 5
    whole = layer_contributions(model, [batch])
    torch.testing.assert_close(torch.tensor(whole), torch.stack(by_hand), atol=1e-5, rtol=0, check_dtype=False)
    uneven = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 3))]
    assert layer_contributions(model, uneven) == pytest.approx(whole, abs=1e-6)


def test_contributions_of_nothing_are_refused(tiny_bert):
    with pytest.raises(StudyError, match="development set is empty"):
        layer_contributions(tiny_bert, [])


def dropping(**settings) -> LayerDropping:
    return make_compressor(CompressorSpec(name="layer_dropping", settings=settings))


def test_dropping_before_training_and_its_summary(tiny_bert):
    kept = [layer for number, layer in enumerate(layers(tiny_bert), 1) if number in (1, 3)]
    compressor = dropping(drop=[4, 2])
    compressor.attach(tiny_bert)
    assert list(layers(tiny_bert)) == kept
    assert compressor.summary() == {"dropped_layers": [2, 4], "kept_layers": [1, 3], "k": 2}
    assert compressor.finalize(tiny_bert) is tiny_bert and list(layers(tiny_bert)) == kept


def test_iterative_dropping_takes_the_topmost_first_and_forgets_its_optimizer_state(tiny_bert):
    original = list(layers(tiny_bert))
    compressor = dropping(drop=[2, 4], iterative=True)
    compressor.attach(tiny_bert)
    optimizer = torch.optim.AdamW(tiny_bert.parameters(), lr=1e-3)
    trainer = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))  # wrapped, as accelerate does
    ids = torch.tensor([[101, 2000, 102]])
    tiny_bert(input_ids=ids, start_positions=torch.tensor([1]), end_positions=torch.tensor([1])).loss.backward()
    optimizer.step()

    def known(layer) -> bool:
        listed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        there = {id(parameter) in listed for parameter in layer.parameters()}
        assert there == {parameter in optimizer.state for parameter in layer.parameters()} and len(there) == 1
        return there.pop()

    for progress, kept in ((0.0, [1, 2, 3, 4]), (0.33, [1, 2, 3, 4]), (0.34, [1, 2, 3]), (0.66, [1, 2, 3]),
                           (0.67, [1, 3]), (0.99, [1, 3]), (1.0, [1, 3])):  # fmt: skip
        compressor.step(progress, trainer)
        assert list(layers(tiny_bert)) == [original[number - 1] for number in kept], progress
        assert [known(layer) for layer in original] == [number in kept for number in (1, 2, 3, 4)], progress
    assert compressor.summary()["dropped_layers"] == [2, 4]


def test_what_a_schedule_did_not_reach_goes_at_the_end(tiny_bert):
    compressor = dropping(drop=[2, 3], iterative=True)
    compressor.attach(tiny_bert)
    assert len(layers(compressor.finalize(tiny_bert))) == 2


def test_state_restores_what_was_dropped(tiny_bert):
    fresh = copy.deepcopy(tiny_bert)
    compressor = dropping(drop=[1, 4], iterative=True)
    compressor.attach(tiny_bert)
    compressor.step(0.5, SimpleNamespace(optimizer=torch.optim.SGD(tiny_bert.parameters(), lr=0.1)))
    resumed = dropping(drop=[1, 4], iterative=True)
    resumed.attach(fresh)
    resumed.load_state_dict(compressor.state_dict(), fresh)
    assert len(layers(fresh)) == 3 and resumed.summary() == compressor.summary()
    same = zip(layers(fresh)[0].parameters(), layers(tiny_bert)[0].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in same)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"drop": []}, "setting drop"),
        ({}, "setting drop: Field required"),
        ({"drop": [1], "itertive": True}, "setting itertive"),
        ({"drop": [5]}, r"cannot drop \[5\] of 4 layers; give at most 3 numbers from 1 to 4"),
        ({"drop": [1, 2, 3, 4], "iterative": True}, r"cannot drop \[1, 2, 3, 4\] of 4 layers"),
    ],
)
def test_impossible_settings_are_one_line(tiny_bert, settings, said):
    with pytest.raises(StudyError, match=said):
        dropping(**settings).attach(tiny_bert)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("layer_droping", "unknown compressor 'layer_droping'; known: layer_dropping, "),
        ("no_such_module:Thing", "compressor 'no_such_module:Thing' cannot be imported"),
        ("lib.config:NoSuchClass", "cannot be imported"),
    ],
)
def test_unknown_compressors_are_one_line(name, said):
    with pytest.raises(StudyError, match=said):
        make_compressor(CompressorSpec(name=name))
