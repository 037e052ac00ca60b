"""Structured pruning (oracle checks 6, 10 and 11): masked equals shrunk, gates alone are trained, densities are met."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import padded_batch, random_gates, span_logits
from transformers import PreTrainedModel

from lib import experiments
from lib.agreement import check_agreement, random_batch
from lib.compressors import CompressorSpec, L0Gates, StructuredPruning, make_compressor
from lib.compressors.selection import keep_best, kept_masks, magnitude, remove, target_density
from lib.config import StudyError, load_profile
from lib.data import TASKS, load_task
from lib.engines import prepare
from lib.gates import CLOSED_BELOW, KINDS, Gates, gates_at_test, probability_open
from lib.models import count_parameters, layer_parts, layers, load_model
from lib.plans.structured_qa import gate_training, pruned, structured_qa
from lib.runs import ensure
from lib.settings import Profile
from lib.specs import dense_spec
from lib.surgery import cut, layer_shapes
from lib.training import TrainingSettings, encode, fine_tune, last_checkpoint

ARCHITECTURES = ("bert", "roberta", "distilbert")
ALL = [0, 1, 2, 3]


def test_the_best_of_all_layers_together_are_kept():
    scores = [[0.1, 5.0, 0.3], [0.2, 0.25, 9.0], [], [-1.0]]
    assert keep_best(scores, 3 / 7) == [[1, 2], [2], [], []]
    assert keep_best(scores, 6 / 7) == [[0, 1, 2], [0, 1, 2], [], []]
    assert keep_best(scores, 0.0) == [[], [], [], []] and keep_best(scores, 1.0) == [[0, 1, 2], [0, 1, 2], [], [0]]


def test_among_equals_the_earlier_stays():
    assert keep_best([[1.0, 1.0], [1.0, 2.0]], 0.5) == [[0], [1]]
    assert keep_best([[0.0] * 5] * 4, 0.35) == [[0, 1, 2, 3, 4], [0, 1], [], []]


@pytest.mark.parametrize(
    ("gates", "density", "kept"),
    [(7, 0.5, 4), (5, 0.5, 2), (10, 0.24, 2), (10, 0.26, 3), (384, 1 - 0.443, 214), (98304, 1 - 0.477, 51413)],
)
def test_the_number_kept_is_rounded(gates, density, kept):
    assert sum(map(len, keep_best([[0.5] * gates], density))) == kept


@pytest.mark.parametrize(
    ("scores", "density", "said"),
    [
        ([[1.0]], -0.01, "density -0.01 is impossible; give 0 (none kept) to 1 (all kept)"),
        ([[1.0]], 1.5, "density 1.5 is impossible"),
        ([[1.0]], math.nan, "density nan is impossible"),
        ([[1.0, math.nan]], 0.5, "some scores are not finite"),
        ([[1.0], [math.inf]], 0.5, "some scores are not finite"),
        ([[1.0], [None]], 0.5, "some scores are not finite"),  # how a record holds what is not a number
    ],
)
def test_impossible_densities_and_scores_are_one_line(scores, density, said):
    with pytest.raises(StudyError) as caught:
        keep_best(scores, density)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_density_aimed_at_falls_as_a_cube():
    found = [target_density(progress, 0.2) for progress in (0.0, 0.35, 0.5, 0.7, 0.9, 1.0)]
    assert found == pytest.approx([1.0, 0.2 + 0.8 / 8, 0.2 + 0.8 * (2 / 7) ** 3, 0.2, 0.2, 0.2])
    assert found[3:] == [0.2] * 3, "held, and exactly"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_magnitude_is_the_norm_of_all_weights_of_a_head_or_unit(small_model, architecture):
    model = small_model(architecture)
    heads, units = magnitude(model, "heads"), magnitude(model, "units")
    assert [len(row) for row in heads] == [4] * 4 and [len(row) for row in units] == [48] * 4
    for number, layer in enumerate(layers(model)):
        parts = layer_parts(layer)
        for head in range(4):
            rows = slice(8 * head, 8 * head + 8)
            weights = [parts.query.weight[rows], parts.key.weight[rows], parts.value.weight[rows],
                       parts.attention_output.weight[:, rows]]  # fmt: skip
            squares = sum(value**2 for weight in weights for value in weight.flatten().tolist())
            assert heads[number][head] == pytest.approx(math.sqrt(squares), rel=1e-5)
        for unit in (0, 47):
            both = torch.cat([parts.ffn_in.weight[unit], parts.ffn_out.weight[:, unit]])
            assert units[number][unit] == pytest.approx(both.norm().item(), rel=1e-5)


def test_magnitude_of_layers_that_lost_everything(small_model):
    model = small_model("bert")
    cut(model, heads=[ALL, [], [1], ALL], units=[range(48), [], [3], range(48)])
    assert [len(row) for row in magnitude(model, "heads")] == [4, 0, 1, 4]
    assert [len(row) for row in magnitude(model, "units")] == [48, 0, 1, 48]


KEPT: dict[str, dict[str, list[Any]]] = {
    "heads": {"heads": [ALL, [2], [0, 3], [1, 2, 3]]},
    "no heads in two layers": {"heads": [[1], [], ALL, []]},
    "units": {"units": [range(48), [5, 47], [0], range(0, 48, 2)]},
    "no units in two layers": {"units": [[], range(48), [], [3, 4]]},
    "both": {"heads": [[0, 1], ALL, [], [3]], "units": [range(10, 48), [], range(48), [7]]},
    "nothing left": {"heads": [[]] * 4, "units": [[]] * 4},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fractional", [False, True], ids=["whole", "fractional"])
@pytest.mark.parametrize("kept", KEPT)
def test_masked_equals_shrunk(small_model, architecture, attention, fractional, kept):
    masked, batch, kept = small_model(architecture, attention), padded_batch(architecture), KEPT[kept]
    shrunk, dense = copy.deepcopy(masked), span_logits(masked, batch)
    gates = Gates(masked, list(kept))
    factors = {kind: kept_masks(rows, random_gates(masked, [kind])[kind]) for kind, rows in kept.items()}
    if fractional:
        values = random_gates(masked, list(kept))
        factors = {kind: [a * (b + 0.1) for a, b in zip(rows, values[kind], strict=True)]
                   for kind, rows in factors.items()}  # fmt: skip
    gates.values = factors
    expected = span_logits(masked, batch)
    assert (expected - dense).abs().max() > 1e-2, "what is closed must matter for this test to mean anything"
    remove(shrunk, kept, factors)
    torch.testing.assert_close(span_logits(shrunk, batch), expected, atol=1e-5, rtol=1e-5)
    removed_heads = sum(4 - len(row) for row in kept.get("heads", []))
    removed_units = sum(48 - len(row) for row in kept.get("units", []))
    per_head, per_unit = 3 * (8 * 32 + 8) + 8 * 32, 2 * 32 + 1
    gone = count_parameters(masked) - count_parameters(shrunk)
    assert gone == removed_heads * per_head + removed_units * per_unit


@torch.no_grad()
def empty(linear: torch.nn.Linear, rows: slice, bias: bool = True) -> None:
    linear.weight[rows] = 0.0
    if bias:
        linear.bias[rows] = 0.0


@torch.no_grad()
def with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Initialised biases are 0, trained ones are not."""
    for layer in layers(model):
        for linear in vars(layer_parts(layer)).values():
            linear.bias.normal_(generator=torch.Generator().manual_seed(5))
    return model


def changes(model: PreTrainedModel, architecture: str, **kept: Any) -> float:
    """Largest change of a logit when only ``kept`` stays in the model's second layer."""
    batch, shrunk = padded_batch(architecture), copy.deepcopy(model)
    rows = {kind: [range(4 if kind == "heads" else 48)] * 4 for kind in kept}
    for kind, indices in kept.items():
        rows[kind] = [rows[kind][0], indices, *rows[kind][2:]]
    cut(shrunk, rows.get("heads"), rows.get("units"))
    return (span_logits(model, batch) - span_logits(shrunk, batch)).abs().max().item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_without_query_or_key_still_speaks_and_one_without_value_does_not(small_model, architecture):
    """Scores of 0 leave uniform attention: such a head must be masked before it is cut, a silent one need not be."""
    head, kept = slice(16, 24), [0, 1, 3]
    for silent, names in ((False, ["query"]), (False, ["key"]), (False, ["query", "key"]), (True, ["value"])):
        model = with_biases(small_model(architecture))
        for name in names:
            empty(getattr(layer_parts(layers(model)[1]), name), head)
        found = changes(model, architecture, heads=kept)
        assert found < 1e-5 if silent else found > 1e-2, names
    model = with_biases(small_model(architecture))
    empty(layer_parts(layers(model)[1]).value, head, bias=False)
    assert changes(model, architecture, heads=kept) > 1e-2, "a bias of the value is a contribution"
    with torch.no_grad():
        layer_parts(layers(model)[1]).attention_output.weight[:, head] = 0.0
    assert changes(model, architecture, heads=kept) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_unit_without_input_weights_is_silent_only_without_its_bias(small_model, architecture):
    model, kept = with_biases(small_model(architecture)), [index for index in range(48) if index != 6]
    empty(layer_parts(layers(model)[1]).ffn_in, slice(6, 7), bias=False)
    assert changes(model, architecture, units=kept) > 1e-3
    empty(layer_parts(layers(model)[1]).ffn_in, slice(6, 7))
    assert changes(model, architecture, units=kept) < 1e-5


def l0(**settings: Any) -> L0Gates:
    return make_compressor(CompressorSpec(name="l0_gates", settings=settings))  # type: ignore[return-value]


def attached(model: PreTrainedModel, **settings: Any) -> L0Gates:
    compressor = l0(**settings)
    compressor.attach(model)
    return compressor


def set_gates(compressor: L0Gates, kind: str, values: torch.Tensor) -> None:
    with torch.no_grad():
        compressor.parameters.log_alpha[kind].copy_(values)


def test_the_penalty_and_its_gradient(small_model):
    """lambda * mean P(z > 0) where lambda is fixed, lambda e + stiffness e^2 for a density; central differences."""
    compressor = attached(small_model("bert"), penalties={"heads": 0.7}, densities={"units": 0.5}, stiffness=4.0)
    compressor.lambdas["units"] = 3.0
    compressor.parameters.double()
    vectors = compressor.parameters.log_alpha
    for vector in vectors.values():
        torch.nn.init.normal_(vector, std=3, generator=torch.Generator().manual_seed(7))
    found = compressor.penalty(0.4)
    by_hand = {
        kind: [1 / (1 + math.exp(-x - 2 / 3 * math.log(11))) for x in vector.tolist()]
        for kind, vector in vectors.items()
    }
    assert found.dim() == 0 and len(by_hand["heads"]) == 16 and len(by_hand["units"]) == 192
    e = sum(by_hand["units"]) / 192 - target_density(0.4, 0.5)
    assert found.item() == pytest.approx(0.7 * sum(by_hand["heads"]) / 16 + 3.0 * e + 4.0 * e**2)
    found.backward()
    for kind, index in (("heads", 0), ("heads", 15), ("units", 0), ("units", 191)):
        shifted = []
        for shift in (1e-5, -2e-5):
            with torch.no_grad():
                vectors[kind][index] += shift
            shifted.append(compressor.penalty(0.4).item())
        assert vectors[kind].grad[index].item() == pytest.approx((shifted[0] - shifted[1]) / 2e-5, rel=1e-6), kind


def test_training_draws_gates_and_testing_does_not(small_model):
    model, batch = small_model("bert"), padded_batch("bert")
    compressor = attached(model, densities={"heads": 0.5, "units": 0.5, "embedding": 0.5})
    for kind in KINDS:
        set_gates(compressor, kind, torch.zeros(len(compressor.parameters.log_alpha[kind])))
    assert torch.equal(span_logits(model, batch), span_logits(model, batch))
    assert compressor.gates.values["heads"][0].tolist() == [0.5] * 4
    model.train()
    assert not torch.equal(span_logits(model, batch), span_logits(model, batch))
    assert len({float(gate) for row in compressor.gates.values["units"] for gate in row}) > 100


def test_lambda_follows_the_density_that_is_aimed_at(small_model):
    compressor = attached(small_model("bert"), densities={"units": 0.2}, penalties={"heads": 0.5})

    def pull(log_alpha: float, before: float) -> tuple[float, float]:
        """Change of lambda in one step at progress 0.8, and the gradient that the gates then feel."""
        compressor.lambdas["units"] = before
        set_gates(compressor, "units", torch.full((192,), log_alpha))
        compressor.step(0.8, None)
        vector = compressor.parameters.log_alpha["units"]
        (gradient,) = torch.autograd.grad(compressor.penalty(0.8), vector)
        return compressor.lambdas["units"] - before, float(gradient.sum())

    at_target = math.log(0.2 / 0.8) - 2 / 3 * math.log(11)
    assert pull(at_target, 2.0)[0] == pytest.approx(0.0, abs=1e-6)
    change, gradient = pull(4.0, 0.0)
    assert change == pytest.approx(float(probability_open(torch.tensor(4.0))) - 0.2, abs=1e-6) and gradient > 0
    change, gradient = pull(at_target - 1.0, 0.0)
    assert change < 0 and gradient < 0, "too few are open: the penalty opens gates again"
    assert compressor.lambdas["heads"] == 0.5, "a fixed one stays as it is"


def test_finalize_keeps_the_asked_number_by_log_alpha_and_whole_weights(small_model):
    model = small_model("roberta")
    dense, compressor = copy.deepcopy(model), attached(model, densities={"heads": 0.3, "units": 0.1})
    for kind in ("heads", "units"):
        vector = compressor.parameters.log_alpha[kind]
        set_gates(compressor, kind, torch.randn(len(vector), generator=torch.Generator().manual_seed(8)) - 2)
    heads = compressor.parameters.log_alpha["heads"].detach().clone()
    shrunk = compressor.finalize(model)
    summary = compressor.summary()
    best = sorted(heads.argsort(descending=True)[:5].tolist())
    assert summary["kept"]["heads"] == [[i - 4 * layer for i in best if i // 4 == layer] for layer in range(4)]
    assert summary["density"] == {"heads": 5 / 16, "units": 19 / 192} and sum(summary["kept"]["units"]) == 19
    assert summary["natural_density"]["heads"] == (heads > CLOSED_BELOW).float().mean().item()
    kept = {kind: compressor.kept[kind] for kind in ("heads", "units")}
    gates = Gates(dense, ["heads", "units"])
    gates.values = {kind: kept_masks(rows, compressor.scores[kind]) for kind, rows in kept.items()}
    batch = padded_batch("roberta")
    torch.testing.assert_close(span_logits(shrunk, batch), span_logits(dense, batch), atol=1e-5, rtol=1e-5)
    assert not any("study_gates" in name for name in shrunk.state_dict())
    assert all(parameter.requires_grad for parameter in shrunk.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fractional_gates_leave_the_gated_model_as_it_is(small_model, architecture):
    """With a fixed penalty what is cut is what is closed at test time, so the cut changes nothing at all."""
    model, batch = small_model(architecture), padded_batch(architecture)
    dense = span_logits(model, batch)
    compressor = attached(model, penalties=dict.fromkeys(KINDS, 0.1), fractional=True)
    for kind in KINDS:
        vector = compressor.parameters.log_alpha[kind]
        set_gates(compressor, kind, torch.randn(len(vector), generator=torch.Generator().manual_seed(9)) * 2 - 1)
    gated = span_logits(model, batch)
    open_at_test = {kind: gates_at_test(vector) > 0 for kind, vector in compressor.parameters.log_alpha.items()}
    found = span_logits(compressor.finalize(model), batch)
    torch.testing.assert_close(found, gated, atol=1e-5, rtol=1e-5)
    assert (gated - dense).abs().max() > 1e-2
    for kind in KINDS:
        share = open_at_test[kind].float().mean().item()
        assert 0 < share < 1 and compressor.summary()["density"][kind] == pytest.approx(share), kind
    assert [shape["units"] for shape in layer_shapes(model)] == compressor.summary()["kept"]["units"]


def test_fractional_gates_under_a_density_close_what_is_not_kept(small_model):
    model = small_model("bert")
    dense = copy.deepcopy(model.bert.embeddings.LayerNorm)
    compressor = attached(model, densities={"embedding": 0.25}, fractional=True)
    values = torch.linspace(-2, 1, 32)
    set_gates(compressor, "embedding", values)
    found = compressor.finalize(model).bert.embeddings.LayerNorm.weight
    assert not found[:24].any() and torch.equal(found[24:], dense.weight[24:] * gates_at_test(values)[24:])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "found neither; give a density or a penalty for each kind of gate"),
        ({"densities": {"heads": 0.5}, "penalties": {"heads": 0.1}}, "found both for heads; give a density or"),
        ({"densities": {"heads": 0.0}}, "density 0.0 for heads is impossible; give more than 0, less than 1"),
        ({"densities": {"units": 1.0}}, "density 1.0 for units is impossible"),
        ({"densities": {"units": -0.5}}, "density -0.5 for units is impossible"),
        ({"densities": {"embedding": math.nan}}, "density nan for embedding is impossible"),
        ({"penalties": {"heads": -1.0}}, "penalty -1.0 for heads is impossible; give 0 or more"),
        ({"penalties": {"heads": math.inf}}, "penalty inf for heads is impossible"),
        ({"penalties": {"heads": math.nan}}, "penalty nan for heads is impossible"),
        ({"densities": {"haeds": 0.5}}, "setting densities.haeds"),
        ({"densities": {"heads": 0.5}, "learning_rate": 0}, "setting learning_rate"),
        ({"densities": {"heads": 0.5}, "lambda": 1}, "setting lambda"),
    ],
)
def test_impossible_gate_settings_are_one_line_and_leave_the_model_alone(tiny_bert, settings, said):
    with pytest.raises(StudyError) as caught:
        attached(tiny_bert, **settings)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert all(parameter.requires_grad for parameter in tiny_bert.parameters())


TASK = TASKS["world_qa"]
SETTINGS = TrainingSettings(
    epochs=1, batch_size=8, learning_rate=1e-3, max_length=64, stride=16, precision="fp32", dropout=0.1
)


@pytest.fixture(scope="module")
def features(tokenizer):
    data = load_task("world_qa", "embedded", None, 20, 4)
    return encode(TASK, data["train"], tokenizer, SETTINGS, training=True).select(range(48))


def model() -> PreTrainedModel:
    return load_model("tiny-bert", "qa", seed=1, dropout=0.1)


def train(student: PreTrainedModel, compressor: Any, tokenizer: Any, features: Any, folder: Path,
          checkpoint_minutes: float = 60.0, **changes: Any) -> Any:  # fmt: skip
    compressor.attach(student)
    settings = SETTINGS.model_copy(update=changes)
    return fine_tune(
        student, tokenizer, features, settings, 3, folder, compressor, checkpoint_minutes=checkpoint_minutes
    )


def weights(student: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in student.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def all_finite(values: Any) -> bool:
    """Whether every number in a JSON-able value is finite."""
    if isinstance(values, dict):
        return all(map(all_finite, values.values()))
    if isinstance(values, list | tuple):
        return all(map(all_finite, values))
    return not isinstance(values, float) or math.isfinite(values)


@pytest.mark.parametrize("densities", [{"heads": 0.5}, {"heads": 0.25, "units": 0.4}, {"embedding": 0.75}])
def test_only_the_gates_are_trained_and_the_density_is_exact(features, tokenizer, tmp_path, densities):
    student, compressor = model(), l0(densities=densities, learning_rate=0.5)
    before = weights(student)
    outcome = train(student, compressor, tokenizer, features, tmp_path)
    after = weights(student)
    gates = {name: after.pop(name) for name in list(after) if name.startswith("study_gates")}
    assert same(after, before) and len(gates) == len(densities) and outcome.steps == 6
    for vector in gates.values():
        assert (vector != 2.0).all(), "a gate was not trained"
    shrunk, summary = compressor.finalize(student), compressor.summary()
    total = {"heads": 16, "units": 256, "embedding": 32}
    assert summary["density"] == {kind: round(value * total[kind]) / total[kind] for kind, value in densities.items()}
    assert sum(shape["attention"] for shape in layer_shapes(shrunk)) == 8 * round(16 * densities.get("heads", 1))
    assert sum(shape["units"] for shape in layer_shapes(shrunk)) == round(256 * densities.get("units", 1))
    if "embedding" in densities:
        kept = set(compressor.kept["embedding"][0])
        closed = [index for index in range(32) if index not in kept]
        assert len(closed) == 8 and not weights(shrunk)["bert.embeddings.LayerNorm.weight"][closed].any()


def test_the_history_says_how_the_gates_went(features, tokenizer, tmp_path):
    compressor, student = l0(densities={"heads": 0.5}, penalties={"units": 2.0}), model()
    train(student, compressor, tokenizer, features, tmp_path, batch_size=1)
    compressor.finalize(student)
    history, bins = compressor.summary()["history"], compressor.summary()["bins"]
    progress = [point["progress"] for point in history]
    assert progress == sorted(progress) and progress[0] == 0.0 and progress[-1] == 1.0 and 20 <= len(history) <= 22
    for point in history:
        for kind, total in (("heads", 16), ("units", 256)):
            counts = point[kind]["log_alpha_counts"]
            assert sum(counts) == total and len(bins) == len(counts) + 1
            assert point[kind]["density"] == pytest.approx(sum(counts[bins.index(CLOSED_BELOW) :]) / total)
    assert {point["units"]["lambda"] for point in history} == {2.0}
    assert len({point["heads"]["lambda"] for point in history}) > 5
    assert history[-1]["units"]["expected_density"] < history[0]["units"]["expected_density"]


def test_a_penalty_that_closes_everything_is_named(features, tokenizer, tmp_path):
    compressor = l0(penalties={"heads": 500.0, "units": 0.0}, learning_rate=3.0)
    said = r"penalty 500 closed all 16 heads at \d\d% of training; give a smaller one, or a density"
    with pytest.raises(StudyError, match=said) as caught:
        train(model(), compressor, tokenizer, features, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_penalty_that_closes_everything_in_the_last_step_is_named_too(features, tokenizer, tmp_path):
    compressor, student = l0(penalties={"units": 500.0}, learning_rate=9.0), model()
    train(student, compressor, tokenizer, features, tmp_path, batch_size=48, warmup=0.0)
    with pytest.raises(StudyError, match="penalty 500 closed all 256 units at 100% of training"):
        compressor.finalize(student)


def test_a_penalty_of_nothing_closes_nothing(features, tokenizer, tmp_path):
    compressor, student = l0(penalties={"heads": 0.0}), model()
    train(student, compressor, tokenizer, features, tmp_path)
    compressor.finalize(student)
    assert compressor.summary()["density"] == {"heads": 1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_a_density_is_met_without_a_nan_even_when_all_gates_close_on_the_way(features, tokenizer, tmp_path, kind):
    compressor = l0(densities={kind: 0.25}, learning_rate=20.0)
    compressor.settings = compressor.settings.model_copy(update={"stiffness": 0.0, "adaptation": 1000.0})
    student = model()
    outcome = train(student, compressor, tokenizer, features, tmp_path)
    assert compressor.realised(kind) == 0.0
    shrunk = compressor.finalize(student)
    assert compressor.summary()["density"] == {kind: 0.25}
    assert all_finite(outcome.model_dump()) and all_finite(compressor.summary())
    assert torch.isfinite(span_logits(shrunk.eval(), padded_batch("bert"))).all()


def test_gates_that_are_no_numbers_are_one_line(tiny_bert):
    compressor = attached(tiny_bert, densities={"heads": 0.5})
    set_gates(compressor, "heads", torch.full((16,), math.nan))
    with pytest.raises(StudyError, match="gates of heads are not finite; lower learning_rate or the penalty"):
        compressor.finalize(tiny_bert)


class Stop(KeyboardInterrupt):
    """Ctrl-C, raised where a test wants it."""


def stopping(compressor: Any, at: int) -> Any:
    """The compressor, interrupted before an optimizer step."""
    original = compressor.step

    def step(progress: float, trainer: Any) -> None:
        if trainer.state.global_step >= at:
            raise Stop
        original(progress, trainer)

    compressor.step = step
    return compressor


RESUMED = {
    "gates": lambda: l0(densities={"heads": 0.5, "units": 0.3}, learning_rate=0.5),
    "gates with fixed penalties": lambda: l0(penalties={"embedding": 0.2, "heads": 0.1}, fractional=True),
    "magnitude": lambda: structured(densities={"heads": 0.5, "units": 0.25}, importance="magnitude", iterative=True),
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("stops", [(1,), (3, 5)], ids=str)
def test_a_resumed_run_ends_as_an_undisturbed_one(features, tokenizer, tmp_path, name, stops):
    """With dropout and noise in the gates, so that the random numbers must go on where they were."""
    whole, last = RESUMED[name](), RESUMED[name]()
    undisturbed, resumed = model(), model()
    expected = train(undisturbed, whole, tokenizer, features, tmp_path / "whole")
    for stop in stops:
        with pytest.raises(Stop):
            train(model(), stopping(RESUMED[name](), stop), tokenizer, features, tmp_path / "run", 1e-9)
        assert last_checkpoint(tmp_path / "run")[1]["global_step"] == stop
    outcome = train(resumed, last, tokenizer, features, tmp_path / "run")
    assert outcome.resumed == stops[-1] and outcome.loss == expected.loss
    assert same(weights(resumed), weights(undisturbed))
    assert same(weights(last.finalize(resumed)), weights(whole.finalize(undisturbed)))
    assert last.summary() == whole.summary()


def structured(informed: Any = (), **settings: Any) -> StructuredPruning:
    return make_compressor(CompressorSpec(name="structured", settings=settings), informed)  # type: ignore[return-value]


def scores_of(kind: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {kind: [torch.rand(4 if kind == "heads" else 48, generator=generator).tolist() for _ in range(4)]}


def test_given_scores_decide_and_the_weights_that_stay_are_the_models_own(small_model):
    model, scores = small_model("bert"), scores_of("heads", 1) | scores_of("units", 2)
    dense, compressor = copy.deepcopy(model), structured([{"scores": scores}], densities={"heads": 0.5, "units": 0.75})
    compressor.attach(model)
    kept = {kind: keep_best(scores[kind], density) for kind, density in (("heads", 0.5), ("units", 0.75))}
    assert compressor.finalize(model) is model
    assert compressor.summary() == {
        "density": {"heads": 0.5, "units": 0.75},
        "kept": {"heads": kept["heads"], "units": [len(row) for row in kept["units"]]},
    }
    for layer, original, heads, units in zip(layers(model), layers(dense), kept["heads"], kept["units"], strict=True):
        parts, whole = layer_parts(layer), layer_parts(original)
        columns = [8 * head + i for head in heads for i in range(8)]
        assert torch.equal(parts.query.weight, whole.query.weight[columns])
        assert torch.equal(parts.value.bias, whole.value.bias[columns])
        assert torch.equal(parts.attention_output.weight, whole.attention_output.weight[:, columns])
        assert torch.equal(parts.ffn_in.bias, whole.ffn_in.bias[units])
        assert torch.equal(parts.ffn_out.weight, whole.ffn_out.weight[:, units])


def test_the_later_run_decides_where_two_know_the_same_gates(small_model):
    first, second = scores_of("heads", 1) | scores_of("units", 2), scores_of("heads", 3)
    informed = [{"scores": first}, {"compression": {"scores": second}}, {"score": 50.0}]  # importance, gates, neither
    compressor = structured(informed, densities={"heads": 0.5, "units": 0.5})
    compressor.attach(small_model("bert"))
    assert compressor.kept["heads"] == keep_best(second["heads"], 0.5) != keep_best(first["heads"], 0.5)
    assert compressor.kept["units"] == keep_best(first["units"], 0.5)


def test_random_pruning_depends_on_its_seed_alone(small_model):
    def chosen(seed: int, **densities: float) -> Any:
        torch.manual_seed(len(densities))
        compressor = structured(densities=densities, importance="random", seed=seed)
        compressor.attach(small_model("bert"))
        return compressor.kept

    one, other = chosen(0, heads=0.5, units=0.5), chosen(1, heads=0.5, units=0.5)
    assert one["heads"] == chosen(0, heads=0.5)["heads"] != other["heads"] and one["units"] != other["units"]
    assert chosen(0, units=0.25)["units"] != one["units"]
    smaller = chosen(0, units=0.25)["units"]
    assert all(set(few) <= set(many) for few, many in zip(smaller, one["units"], strict=True)), "nested"


@pytest.mark.parametrize(
    ("informed", "settings", "said"),
    [
        ([], {"densities": {"heads": 0.5}}, "no run that this one is informed by scores heads; name one, or use"),
        ([{"scores": scores_of("heads", 1)}], {"densities": {"units": 0.5}}, "informed by scores units"),
        ([{"scores": {"heads": [[1.0] * 4] * 3}}], {"densities": {"heads": 0.5}}, "measured on a model of another"),
        ([{"scores": {"heads": [[1.0] * 3] * 4}}], {"densities": {"heads": 0.5}}, "measured on a model of another"),
        ([{"scores": {"heads": [[1.0] * 4] * 3 + [[None] * 4]}}], {"densities": {"heads": 0.5}}, "are not finite"),
        ([], {"densities": {}}, "setting densities"),
        ([], {}, "setting densities: Field required"),
        ([], {"densities": {"layers": 0.5}}, "setting densities.layers"),
        ([], {"densities": {"heads": 0.5}, "importance": "magnitdue"}, "setting importance"),
        ([], {"densities": {"heads": 1.5}, "importance": "magnitude"}, "density 1.5 is impossible"),
        ([], {"densities": {"heads": -0.5}, "importance": "magnitude", "iterative": True}, "density -0.5 is"),
        ([], {"densities": {"heads": 1.5}, "importance": "magnitude", "iterative": True}, "density 1.5 is"),
        ([], {"densities": {"embedding": 0.5}, "importance": "magnitude"}, "embedding dimensions have no magnitude"),
        ([{"scores": scores_of("heads", 1)}], {"densities": {"heads": 0.5}, "iterative": True},
         "iterative pruning scores the weights as they change; use magnitude"),
    ],
)  # fmt: skip
def test_impossible_requests_are_one_line(small_model, informed, settings, said):
    with pytest.raises(StudyError) as caught:
        structured(informed, **settings).attach(small_model("bert"))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("compressor", [
    lambda: l0(densities={"heads": 0.5}), lambda: structured(densities={"units": 0.5}, importance="magnitude"),
    lambda: structured(densities={"heads": 0.5}, importance="random", iterative=True),
])  # fmt: skip
def test_xlnet_is_one_line(small_model, compressor):
    model = small_model("xlnet")
    before = weights(model)
    with pytest.raises(StudyError, match=r"XLNetLayer has no query/key/value/FFN linear maps; use BERT") as caught:
        compressor().attach(model)
    assert "\n" not in str(caught.value) and same(weights(model), before)


def test_iterative_pruning_never_opens_a_gate_again_and_ends_at_the_density(small_model):
    model, batch = small_model("bert"), padded_batch("bert")
    compressor = structured(densities={"heads": 0.25, "units": 0.5}, importance="magnitude", iterative=True)
    compressor.attach(model)
    before: dict[str, Any] = {}
    counts = []
    for step in range(21):
        compressor.step(step / 20, SimpleNamespace())
        kept = copy.deepcopy(compressor.kept)
        counts.append([sum(map(len, kept[kind])) for kind in ("heads", "units")])
        assert counts[-1] == [round(total * target_density(step / 20, density)) for total, density in
                              ((16, 0.25), (192, 0.5))]  # fmt: skip
        for kind in before:
            assert all(set(now) <= set(then) for now, then in zip(kept[kind], before[kind], strict=True))
        before = kept
        with torch.no_grad():  # training turns the ranking upside down: what is closed has the largest weights
            for layer, heads in zip(layers(model), kept["heads"], strict=True):
                for head in set(range(4)) - set(heads):
                    layer_parts(layer).query.weight[8 * head : 8 * head + 8] *= 2
                layer_parts(layer).ffn_in.weight.copy_(layer_parts(layer).ffn_in.weight.flip(0))
    assert counts[0] == [16, 192] and counts[-1] == [4, 96] and len({tuple(count) for count in counts}) > 8
    gated = span_logits(model, batch)
    shrunk = compressor.finalize(model)
    assert sum(shape["attention"] for shape in layer_shapes(shrunk)) == 4 * 8
    torch.testing.assert_close(span_logits(shrunk, batch), gated, atol=1e-5, rtol=1e-5)
    assert compressor.summary()["density"] == {"heads": 0.25, "units": 0.5}


def test_iterative_pruning_that_was_not_trained_cuts_at_once(small_model):
    iterative = structured(densities={"units": 0.5}, importance="magnitude", iterative=True)
    at_once = structured(densities={"units": 0.5}, importance="magnitude")
    models = [small_model("bert"), small_model("bert")]
    for compressor, model in zip((iterative, at_once), models, strict=True):
        compressor.attach(model)
        compressor.finalize(model)
    assert same(weights(models[0]), weights(models[1])) and iterative.summary() == at_once.summary()


def test_a_pruned_model_may_be_pruned_again(small_model):
    model = small_model("bert")
    cut(model, heads=[ALL, [], [1], ALL], units=[range(48), [], [3], range(47)])
    compressor = structured(densities={"heads": 5 / 9, "units": 0.5}, importance="magnitude")
    compressor.attach(model)
    assert sum(shape["attention"] for shape in layer_shapes(model)) == 5 * 8
    assert sum(shape["units"] for shape in layer_shapes(model)) == 48
    assert torch.isfinite(span_logits(model, padded_batch("bert"))).all()


def test_engines_agree_on_a_model_with_empty_layers(small_model, tmp_path):
    model = small_model("bert", "sdpa")
    scores = {"heads": [[9.0] * 4, [0.0] * 4, [1.0, 9.0, 9.0, 1.0], [9.0] * 4],
              "units": [[0.0] * 48, [1.0] * 48, [9.0] * 48, [float(i) for i in range(48)]]}  # fmt: skip
    compressor = structured([{"scores": scores}], densities={"heads": 10 / 16, "units": 0.5})
    compressor.attach(model)
    assert [shape["attention"] for shape in layer_shapes(model)] == [32, 0, 16, 32]
    assert layer_shapes(model)[0]["units"] == 0
    batches = [random_batch(2, 16, 60, 1, padding=5), random_batch(1, 30, 60, 2), random_batch(5, 7, 60, 3, padding=3)]
    for engine in ("onnxruntime-fp32", "openvino-fp32"):  # one export serves both
        found = check_agreement(prepare(engine, model, batches[0], 1, batches, tmp_path), model, batches)
        assert found["max_abs_diff"] < 1e-4 and found["argmax_agreement"] == 1, engine


@pytest.fixture
def profile(profile_file) -> Profile:
    task = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 64, "stride": 16,
            "train_examples": 16, "eval_examples": 8}  # fmt: skip
    return load_profile(profile_file(tasks={"world_qa": task}))


def test_dense_gates_pruned_and_distilled(profile, monkeypatch):
    """Asking for the last run of the chain makes the others; asking again, and for the others, computes nothing."""
    both = {"heads": 0.5, "units": 0.25}
    distilled = pruned(profile, "world_qa", 0, both, "l0", "retrain and distil")
    heads, units = (gate_training(profile, "world_qa", 0, {kind: value}) for kind, value in both.items())
    assert distilled.informed_by == (heads, units) and distilled.teacher == dense_spec(profile, "world_qa", 0)
    (last,) = ensure([distilled], profile)
    plain = pruned(profile, "world_qa", 0, both, "l0")
    joint = pruned(profile, "world_qa", 0, both, "l0-joint")
    plan = [dense_spec(profile, "world_qa", 0), heads, units, plain, joint, distilled]
    first = ensure(plan, profile)
    dense, by_heads, by_units, cut_only, together, _ = first

    assert len(list((profile.results / "runs").iterdir())) == 7  # and the gates that were trained together
    kept = keep_best(by_heads["compression"]["scores"]["heads"], 0.5)
    assert by_heads["compression"]["kept"] == {"heads": kept} and by_units["compression"]["density"] == {"units": 0.25}
    for record in (cut_only, last):
        assert record["compression"]["kept"]["heads"] == kept
        assert record["compression"]["kept"]["units"] == by_units["compression"]["kept"]["units"]
    for record in (cut_only, together, last):
        assert record["compression"]["density"] == both and all_finite(record.result)
        gone = 8 * (3 * (8 * 32 + 8) + 8 * 32) + 192 * (2 * 32 + 1)
        assert record["model"]["parameters"] == dense["model"]["parameters"] - gone
        assert 0 <= record["score"] <= 100
    assert "training" not in cut_only.result and last["training"]["steps"] > 0
    weights_left = {path.name for path in (profile.results / "models").iterdir()}
    assert weights_left == {dense.hash, last.hash}, "the teacher, and what was trained after pruning"

    monkeypatch.setattr(experiments, "execute", lambda *_: pytest.fail("something was computed again"))
    assert list(ensure(plan, profile)) == list(first)


def test_a_run_may_begin_with_a_pruned_one(profile):
    short = pruned(profile, "world_qa", 0, {"heads": 0.5, "units": 0.25}, "magnitude")
    onward = dense_spec(profile, "world_qa", 0).model_copy(update={"start": short})
    pruned_record, record = ensure([short, onward], profile)
    assert record["model"] == pruned_record["model"] and record["training"]["steps"] > 0
    shapes = layer_shapes(experiments.finished_model(profile, onward)[0])
    assert [shape["units"] for shape in shapes] == pruned_record["compression"]["kept"]["units"]


def test_a_task_may_have_seeds_of_its_own_here_unless_all_are_given():
    study = load_profile("study", tasks=["squad_v1", "squad_v2"])
    changes = {"seeds": {"squad_v1": 2}, "tasks": ("squad_v1", "squad_v2")}
    more = study.model_copy(update={"structured_pruning": study.structured_pruning.model_copy(update=changes)})
    found = {task: {spec.seed for spec in structured_qa(more) if spec.task == task} for task in study.tasks}
    assert found == {"squad_v1": {0, 1}, "squad_v2": {0}} and study.task_seeds("squad_v1") == (0,)
    one = load_profile("study", tasks=["squad_v1"], seeds=[5])
    assert {spec.seed for spec in structured_qa(one)} == {5}


def test_every_selection_gives_a_model_of_the_asked_size(profile):
    choices = ("magnitude", "random", "magnitude-iterative")  # the measured ones are tested with their measurements
    plan = [pruned(profile, "world_qa", 0, {"heads": 0.5}, name, "retrain" if "iter" in name else None)
            for name in choices]  # fmt: skip
    records = ensure(plan, profile)
    assert {record["compression"]["density"]["heads"] for record in records} == {0.5}
    assert len({record["model"]["parameters"] for record in records}) == 1
    assert len({record.hash for record in records}) == 3 and "training" in records[2].result
