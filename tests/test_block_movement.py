"""Block movement pruning (oracle checks 8 to 11): gradients, schedule, penalty, removal without effect, resume."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import padded_batch

from lib.block_scores import shape_summary
from lib.blocks import (
    StraightThrough,
    attention_parts,
    best,
    block_sums,
    ffn_parts,
    needed_heads,
    needed_units,
    remove_empty,
    times_blocks,
)
from lib.compressors import BlockMovement, CompressorSpec, Refill, make_compressor
from lib.config import StudyError
from lib.data import TASKS, load_task
from lib.models import load_model
from lib.surgery import load_compressed, save_compressed
from lib.training import TrainingSettings, encode, fine_tune
from lib.translation import TranslationShape, new_model

VARIANTS = ("block", "hybrid", "struct")
LABELS = {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([3, 2, 1])}


def attached(model: Any, **settings: Any) -> BlockMovement:
    compressor = make_compressor(CompressorSpec(name="block_movement", settings={"block": [4, 4]} | settings))
    compressor.attach(model)
    assert isinstance(compressor, BlockMovement)
    return compressor


def close(compressor: BlockMovement, share: float, seed: int = 0) -> None:
    """Let the scores close a random share of the blocks for good, at any threshold."""
    generator = torch.Generator().manual_seed(seed)
    for scores in compressor.scores.values.values():
        scores.data = torch.where(torch.rand(scores.shape, generator=generator) < share, -9.0, 9.0)
    compressor._renew(1.0)


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Start and end logits of real tokens."""
    with torch.no_grad():
        output = model.eval()(**batch)
    real = batch["attention_mask"].bool()
    return torch.cat([output.start_logits[real], output.end_logits[real]])


# Oracle check 8


@pytest.mark.parametrize("block", [(2, 4), (4, 2), (1, 12), (8, 1), (1, 1), (8, 12)])
def test_straight_through_gradients_are_the_block_sums(block):
    generator = torch.Generator().manual_seed(1)
    weight, upstream = (torch.randn(8, 12, dtype=torch.float64, generator=generator) for _ in range(2))
    rows, columns = 8 // block[0], 12 // block[1]
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    mask.view(-1)[0] = False
    leaf, scores = weight.clone().requires_grad_(), torch.randn(rows, columns, dtype=torch.float64).requires_grad_()
    masked = StraightThrough.apply(leaf, scores, mask)
    (masked * upstream).sum().backward()
    for i in range(rows):
        for j in range(columns):
            inside = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            assert torch.equal(masked[inside], weight[inside] * mask[i, j])
            assert math.isclose(scores.grad[i, j], (weight[inside] * upstream[inside]).sum(), rel_tol=1e-12)
            assert torch.equal(leaf.grad[inside], upstream[inside] * mask[i, j])
    assert scores.grad[0, 0] != 0 and not leaf.grad[: block[0], : block[1]].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_models_scores_learn_from_what_the_masked_weights_do(small_model, variant):
    """The same model with plain weights W' says what dL/dW' is; scores that two matrices share add up."""
    model = small_model("bert").double()
    compressor = attached(model, variant=variant)
    model.double()
    close(compressor, 0.4)
    compressor.scores.double()
    plain = small_model("bert").double()
    parts = list(zip(attention_parts(model), attention_parts(plain), strict=True))
    parts += list(zip(ffn_parts(model), ffn_parts(plain), strict=True))  # type: ignore[arg-type]
    for ours, other in parts:
        for name in ("query", "key", "value", "attention_output", "ffn_in", "ffn_out"):
            if hasattr(other, name):
                getattr(other, name).weight.data = getattr(ours, name).weight.detach().clone()
                getattr(other, name).bias.data = getattr(ours, name).bias.detach().clone()
    batch = padded_batch("bert") | LABELS
    model(**batch).loss.backward()
    plain(**batch).loss.backward()
    places = {(part.place, name): getattr(part, name) for part in (*attention_parts(plain), *ffn_parts(plain))
              for name in vars(part) if name not in ("place", "size")}  # fmt: skip
    expected: dict[str, torch.Tensor] = {}
    for matrix in compressor.matrices:
        original = matrix.linear.parametrizations.weight.original
        gradient = places[matrix.place, matrix.part].weight.grad
        grid = compressor.scores.mask(matrix.scores).shape
        sums = block_sums(original.detach() * gradient, grid[::-1] if matrix.turned else grid)
        expected[matrix.scores] = expected.get(matrix.scores, 0) + (sums.t() if matrix.turned else sums)
        mask = compressor.scores.mask(matrix.scores)
        mask = mask.t() if matrix.turned else mask
        assert torch.allclose(original.grad, times_blocks(gradient, mask), atol=1e-12)
        assert not original.grad[times_blocks(torch.ones_like(gradient), mask) == 0].any()
    moving: dict[str, list[bool]] = {"attention": [], "ffn": []}
    for name, sums in expected.items():
        assert torch.allclose(compressor.scores.values[name].grad, sums, atol=1e-10)
        closed = ~compressor.scores.mask(name)
        moving[compressor.kinds[name]] += (compressor.scores.values[name].grad[closed] != 0).tolist()
    # in a head whose value and output are both closed nothing moves, nor in a unit of two closed blocks
    assert sum(moving["attention"]) > 0.3 * len(moving["attention"]) > 0
    assert sum(moving["ffn"]) > 0.5 * len(moving["ffn"]) > 0
    assert variant == "block" or all(moving["ffn"])


# Oracle check 9


def test_schedule_at_its_boundaries(small_model):
    compressor = attached(small_model("bert"), final_threshold=0.1, final_lambda=20, begin=0.1, end=0.6)
    for progress in (0.0, 0.05, 0.1):
        assert compressor.threshold(progress) == 0 and compressor.penalty_factor(progress) == 0
        assert compressor.penalty(progress) == 0
    assert compressor.threshold(0.35) == pytest.approx(0.1 * (1 - 0.5**3))
    assert compressor.penalty_factor(0.35) == pytest.approx(20 * (1 - 0.5**3))
    for progress in (0.6, 0.8, 1.0):
        assert compressor.threshold(progress) == 0.1 and compressor.penalty_factor(progress) == 20
    values = [compressor.threshold(i / 100) for i in range(101)]
    assert values == sorted(values)


@pytest.mark.parametrize("variant", VARIANTS)
def test_penalty_in_closed_form(small_model, variant):
    settings = {"final_lambda": 8, "attention_lambda": 0.5, "ffn_lambda": 2}
    compressor = attached(small_model("bert"), variant=variant, **settings)
    assert compressor.penalty(1.0).item() == pytest.approx(8 * (0.5 * 0.5 + 2 * 0.5) / 2)
    generator = torch.Generator().manual_seed(2)
    for scores in compressor.scores.values.values():
        scores.data = torch.randn(scores.shape, generator=generator)
    per_kind = {"attention": [], "ffn": []}
    for matrix in compressor.matrices:  # module by module, as the paper averages
        per_kind[matrix.kind].append(float(torch.sigmoid(compressor.scores.values[matrix.scores]).mean().detach()))
    means = {kind: sum(values) / len(values) for kind, values in per_kind.items()}
    assert compressor.penalty(1.0).item() == pytest.approx(8 * (0.5 * means["attention"] + 2 * means["ffn"]) / 2)


def test_a_block_is_there_while_its_sigmoid_is_above_the_threshold(small_model):
    compressor = attached(small_model("bert"), final_threshold=0.2, begin=0, end=0.5)
    name, scores = next(iter(compressor.scores.values.items()))
    edge = math.log(0.2 / 0.8)
    scores.data.flatten()[:3] = torch.tensor([edge - 0.01, edge + 0.01, -30.0])
    compressor._renew(0.0)
    assert compressor.scores.mask(name).all()
    compressor._renew(1.0)
    assert compressor.scores.mask(name).flatten()[:4].tolist() == [False, True, False, True]


# Oracle checks 10 and 11


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_equals_shrunk(small_model, variant, architecture, attention):
    model, batch = small_model(architecture, attention), padded_batch(architecture)
    dense = logits(model, batch)
    compressor = attached(model, variant=variant)
    close(compressor, 0.6)
    for name in ("attention1_value", *(n for n in compressor.scores.values if n.startswith("ffn2"))):
        compressor.scores.values[name].data.fill_(-9.0)  # a layer without a head, and one without a unit
    compressor._renew(1.0)
    masked = logits(model, batch)
    shrunk = logits(compressor.finalize(model), batch)
    assert (masked - shrunk).abs().max() < 1e-5 < (masked - dense).abs().max()
    summary = compressor.summary()
    assert summary["heads"][1] == 0 and summary["units"][2] == 0
    assert summary["heads"] == summary["history"][-1]["heads"] and summary["units"] == summary["history"][-1]["units"]
    assert summary["density"] <= summary["stored_density"] < 1
    assert not any("study" in name or "parametrizations" in name for name in model.state_dict())


def test_a_head_with_an_empty_query_stays_and_one_with_an_empty_value_goes(small_model):
    model, batch = small_model("bert"), padded_batch("bert")
    part, size = attention_parts(model)[0], 8
    for linear, head in ((part.query, 0), (part.key, 1), (part.value, 2)):
        linear.weight.data[head * size : (head + 1) * size] = 0
        linear.bias.data = torch.randn(32, generator=torch.Generator().manual_seed(head))
    part.query.bias.data[:size] = 0
    assert needed_heads(part) == [0, 1, 2, 3]  # the third adds its value's bias
    part.value.bias.data[2 * size : 3 * size] = 0
    assert needed_heads(part) == [0, 1, 3]
    part.attention_output.weight.data[:, 3 * size :] = 0
    assert needed_heads(part) == [0, 1]
    before = logits(model, batch)
    assert remove_empty(model)[0] == [0, 1]
    assert (logits(model, batch) - before).abs().max() < 1e-5


def test_a_unit_goes_when_nothing_enters_or_nothing_leaves_it(small_model):
    model, batch = small_model("bert"), padded_batch("bert")
    part = ffn_parts(model)[0]
    part.ffn_in.weight.data[[3, 4]] = 0
    part.ffn_in.bias.data[:] = 0.5
    part.ffn_in.bias.data[4] = 0  # unit 3 still hands on the activation of its bias
    part.ffn_out.weight.data[:, 7] = 0
    before = logits(model, batch)
    assert set(range(48)) - set(needed_units(part)) == {4, 7}
    remove_empty(model)
    assert attention_parts(model)[0].heads == 4 and ffn_parts(model)[0].units == 46
    assert (logits(model, batch) - before).abs().max() < 1e-5


def test_a_translation_model_is_masked_and_shrunk_alike():
    shape = TranslationShape(vocabulary=300, hidden_size=16, layers=2, heads=2, units=24)
    model = new_model(shape, 300, 0.0, 0.0, seed=1).eval()
    compressor = attached(model)
    close(compressor, 0.5)
    for name in ("attention0_value", "attention3_value"):  # of the encoder; of the decoder, towards the source
        compressor.scores.values[name].data[:2] = -9.0
    compressor._renew(1.0)
    source, target = torch.randint(3, 300, (2, 7)), torch.randint(3, 300, (2, 5))
    batch = {"input_ids": source, "attention_mask": torch.ones_like(source), "decoder_input_ids": target}
    with torch.no_grad():
        masked = model(**batch).logits
        shrunk = compressor.finalize(model)(**batch).logits
    assert (masked - shrunk).abs().max() < 1e-5
    summary = compressor.summary()
    assert summary["places"]["attention"][3] == "decoder 1, source" and summary["heads"][0] == summary["heads"][3] == 1
    assert sum(summary["units"]) < 4 * 24 and summary["stored_density"] < 1


# Masks of the best k, and the baselines


def test_best_keeps_exactly_so_many_and_the_earlier_of_equals():
    scores = [torch.tensor([[3.0, 1.0], [1.0, 2.0]]), torch.tensor([1.0, 5.0])]
    kept = [[mask.int().flatten().tolist() for mask in best(scores, k)] for k in range(7)]
    assert kept[0] == [[0, 0, 0, 0], [0, 0]] and kept[2] == [[1, 0, 0, 0], [0, 1]]
    assert kept[4] == [[1, 1, 0, 1], [0, 1]] and kept[5] == [[1, 1, 1, 1], [0, 1]]
    assert kept[6] == [[1, 1, 1, 1], [1, 1]]
    generator = torch.Generator().manual_seed(3)
    random = [torch.randint(0, 4, (5, 7), generator=generator).float() for _ in range(3)]
    assert [sum(int(mask.sum()) for mask in best(random, k)) for k in range(106)] == list(range(106))


@pytest.mark.parametrize("importance", ["movement", "magnitude"])
@pytest.mark.parametrize("variant", ["block", "hybrid"])
def test_top_k_masks_follow_the_density(small_model, variant, importance):
    settings = {"mask": "top-k", "density": 0.25, "importance": importance, "begin": 0.1, "end": 0.6}
    compressor = attached(small_model("bert"), variant=variant, **settings)
    for progress in (0.0, 0.1, 0.35, 0.6, 1.0):
        compressor.step(progress, None)  # type: ignore[arg-type]
        share = 1 if progress <= 0.1 else 0.25 if progress >= 0.6 else 0.25 + 0.75 * 0.5**3
        for kind in ("attention", "ffn"):
            masks = [compressor.scores.mask(name) for name in compressor._of(kind)]
            total = sum(mask.numel() for mask in masks)
            assert sum(int(mask.sum()) for mask in masks) == round(share * total)
    assert compressor.penalty(1.0) == 0
    groups = compressor.parameter_groups()
    assert (groups == []) == (importance == "magnitude")
    assert not groups or (groups[0]["weight_decay"], groups[0]["lr"]) == (0.0, 1e-2)


def test_magnitude_keeps_the_largest_weights(small_model):
    model = small_model("bert")
    compressor = attached(model, variant="block", block=[1, 1], mask="top-k", density=0.3, importance="magnitude")
    weights = torch.cat([linear.flatten() for linear in _matrices(model, "ffn")]).abs()
    compressor.finalize(model)
    after = torch.cat([linear.flatten() for linear in _matrices(model, "ffn")])
    bound = weights.sort(descending=True).values[round(0.3 * len(weights)) - 1]
    assert torch.equal(after != 0, weights >= bound)


def test_per_matrix_every_matrix_keeps_the_same_share(small_model):
    settings = {"mask": "top-k", "density": 0.25, "importance": "magnitude"}
    shares = {}
    for per_matrix in (False, True):
        compressor = attached(small_model("bert"), variant="block", block=[1, 1], per_matrix=per_matrix, **settings)
        compressor._renew(1.0)
        masks = [compressor.scores.mask(name) for kind in ("attention", "ffn") for name in compressor._of(kind)]
        shares[per_matrix] = [int(mask.sum()) - round(0.25 * mask.numel()) for mask in masks]
    assert set(shares[True]) == {0} and len(set(shares[False])) > 1


def _matrices(model: Any, kind: str) -> list[torch.Tensor]:
    parts = attention_parts(model) if kind == "attention" else ffn_parts(model)
    names = ("query", "key", "value", "attention_output") if kind == "attention" else ("ffn_in", "ffn_out")
    return [getattr(part, name).weight.detach().clone() for part in parts for name in names]


def test_variants_cut_the_matrices_as_the_paper_does(small_model):
    grids = {}
    for variant in VARIANTS:
        compressor = attached(small_model("bert"), variant=variant)
        grids[variant] = {m.part: tuple(compressor.scores.mask(m.scores).shape) for m in compressor.matrices}
        shared = [m.scores for m in compressor.matrices if m.part.startswith("ffn")]
        assert len(set(shared)) == (8 if variant == "block" else 4)
    attention = dict.fromkeys(("query", "key", "value", "attention_output"), (8, 8))
    assert grids["block"] == attention | {"ffn_in": (12, 8), "ffn_out": (8, 12)}
    assert grids["hybrid"] == attention | {"ffn_in": (48, 1), "ffn_out": (48, 1)}
    heads = dict.fromkeys(("query", "key", "value"), (4, 1)) | {"attention_output": (1, 4)}
    assert grids["struct"] == heads | {"ffn_in": (48, 1), "ffn_out": (48, 1)}


# Hybrid filled


def test_refill_keeps_what_is_there_and_fills_the_rest(small_model):
    model = small_model("bert")
    compressor = attached(model)
    close(compressor, 0.5)
    compressor.finalize(model)
    empty = attention_parts(model)[2].query.weight
    empty.data.zero_()
    hybrid = copy.deepcopy(model)
    refill = make_compressor(CompressorSpec(name="refill", settings={"noise": 0.5}))
    refill.attach(model)
    assert isinstance(refill, Refill) and refill.finalize(model) is model
    summary = refill.summary()
    assert summary["density"] == summary["stored_density"] == compressor.summary()["stored_density"]
    assert summary["heads"] == compressor.summary()["heads"] and 0 < summary["filled"] < 1
    spreads = []
    for before, after in zip(_matrices(hybrid, "attention"), _matrices(model, "attention"), strict=True):
        there = before != 0
        assert (after != 0).all() and torch.equal(after[there], before[there])
        if 0 < there.sum() < there.numel():
            spreads.append(float(after[~there].std() / before[there].std()))
    assert sum(spreads) / len(spreads) == pytest.approx(0.5, rel=0.1)
    assert float(empty.detach().std()) == pytest.approx(0.5 * model.config.initializer_range, rel=0.2)
    again = copy.deepcopy(hybrid)
    make_compressor(CompressorSpec(name="refill", settings={"noise": 0.5, "seed": 1})).attach(again)
    assert not torch.equal(_matrices(again, "attention")[0], _matrices(model, "attention")[0])


# In the training loop


@pytest.fixture(scope="module")
def features(tokenizer):
    data = load_task("world_sentiment", "embedded", None, 48, 8)
    return encode(TASKS["world_sentiment"], data["train"], tokenizer, TRAINING, training=True)


TRAINING = TrainingSettings(epochs=2, batch_size=8, learning_rate=1e-3, max_length=32, precision="fp32")
METHODS: dict[str, dict[str, Any]] = {
    "hybrid": {"final_lambda": 0.05, "score_learning_rate": 1.0},
    "top-k": {"variant": "block", "block": [1, 1], "mask": "top-k", "density": 0.2, "score_learning_rate": 0.1},
    "magnitude": {"variant": "block", "mask": "top-k", "density": 0.2, "importance": "magnitude"},
}


class Stop(KeyboardInterrupt):
    """Ctrl-C, raised where a test wants it."""


class Stopping(BlockMovement):
    """Is interrupted before a given optimizer step."""

    at: int | None = None

    def step(self, progress: float, trainer: Any) -> None:
        if self.at is not None and trainer.state.global_step >= self.at:
            raise Stop
        super().step(progress, trainer)


def train(tokenizer: Any, features: Any, folder: Path, settings: dict[str, Any], stop: int | None = None) -> Any:
    """A model trained and compressed, and the compressor's summary; stopped before step ``stop`` if given."""
    model = load_model("tiny-bert", "classification", 2, seed=1)
    compressor = Stopping(BlockMovement.Settings.model_validate({"block": [4, 4]} | settings))
    compressor.at = stop
    compressor.attach(model)
    minutes = 1e-9 if stop is not None else 60
    fine_tune(model, tokenizer, features, TRAINING, 3, folder, compressor, checkpoint_minutes=minutes)
    return compressor.finalize(model), compressor.summary()


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_as_an_undisturbed_one(features, tokenizer, tmp_path, method):
    """Masks, scores, optimizer moments and history travel with the checkpoint; stopped while the masks are closing."""
    model, summary = train(tokenizer, features, tmp_path / "whole", METHODS[method])
    for stop in (3, 7):
        with pytest.raises(Stop):
            train(tokenizer, features, tmp_path / "run", METHODS[method], stop)
    resumed, again = train(tokenizer, features, tmp_path / "run", METHODS[method])
    assert summary == again and summary["density"] < 0.9
    one, other = model.state_dict(), resumed.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_summary_is_what_the_weights_are_and_the_model_saves(features, tokenizer, tmp_path):
    model, summary = train(tokenizer, features, tmp_path / "run", METHODS["hybrid"])
    weights = [*_matrices(model, "attention"), *_matrices(model, "ffn")]
    total = 4 * (4 * 32 * 32 + 2 * 32 * 64)
    assert summary["density"] == sum(int((weight != 0).sum()) for weight in weights) / total
    assert summary["stored_density"] == sum(weight.numel() for weight in weights) / total
    stored = [parameter for name, parameter in model.named_parameters() if ".layer." in name and parameter.dim() == 2]
    assert summary["weights"] == sum(weight.numel() for weight in stored)
    assert summary["nonzero"] == sum(int(weight.count_nonzero()) for weight in stored)
    assert summary == shape_summary(model) | {key: summary[key] for key in ("kept_heads", "history", "bins")}
    history = summary["history"]
    assert history[0]["density"]["all"] == 1 and history[-1]["progress"] == 1
    assert [point["threshold"] for point in history] == sorted(point["threshold"] for point in history)
    assert sum(history[-1]["score_counts"]["ffn"]) == 4 * 64
    save_compressed(model, tokenizer, tmp_path / "saved")
    loaded, _ = load_compressed(tmp_path / "saved")
    batch = {"input_ids": torch.arange(1000, 1012).view(2, 6)}
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, model.eval()(**batch).logits, atol=1e-6)  # eager and sdpa
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_pruning_everything_is_refused(features, tokenizer, tmp_path):
    with pytest.raises(StudyError, match=r"every (attention|ffn) block is pruned at \d+% of training; lower final_la"):
        train(tokenizer, features, tmp_path / "run", {"final_lambda": 1e4, "score_learning_rate": 3.0})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"block": [5, 4]}, r"layer 1, query: a block of 5 × 4 does not divide a matrix of 32 × 32"),
        ({"variant": "block", "block": [32, 32]}, "layer 1, ffn_in: a block of 32 × 32 does not divide a matrix of 48"),
        ({"block": [0, 4]}, r"setting block.0: Input should be greater than 0, found 0"),
        ({"final_threshold": 0.5}, "setting final_threshold: Input should be less than 0.5, found 0.5"),
        ({"final_threshold": 0}, "setting final_threshold: Input should be greater than 0"),
        ({"final_lambda": -1}, "setting final_lambda: Input should be greater than or equal to 0"),
        ({"begin": 0.6}, "begin 0.6 is not before end 0.5"),
        ({"density": 0.5}, "density belongs to top-k masks"),
        ({"mask": "top-k"}, "density belongs to top-k masks"),
        ({"mask": "top-k", "density": 0}, "setting density: Input should be greater than 0"),
        ({"mask": "top-k", "density": 1.5}, "setting density: Input should be less than or equal to 1"),
        ({"mask": "top-k", "density": 0.5, "least_density": 0.1}, "least_density belongs to threshold masks"),
        ({"per_matrix": True}, "per_matrix belongs to top-k masks; a threshold is one for all"),
        ({"least_density": 1}, "setting least_density: Input should be less than 1"),
        ({"importance": "magnitude"}, "magnitude has no scores for a threshold; give mask top-k and a density"),
        ({"variant": "rows"}, "setting variant: Input should be 'block', 'hybrid' or 'struct'"),
    ],
)
def test_impossible_settings_are_one_line(small_model, settings, said):
    with pytest.raises(StudyError, match=said):
        attached(small_model("bert"), **settings)


def test_an_architecture_without_known_heads_is_refused(small_model):
    with pytest.raises(StudyError, match="xlnet"):
        attached(small_model("xlnet"))


def test_a_density_that_rounds_to_nothing_is_refused(small_model):
    compressor = attached(small_model("bert"), variant="struct", mask="top-k", density=0.005)
    with pytest.raises(StudyError, match=r"every attention block is pruned at 100% of training.*raise density"):
        compressor._renew(1.0)


def test_scores_that_are_not_finite_are_refused(small_model):
    model = small_model("bert")
    compressor = attached(model)
    next(iter(compressor.scores.values.values())).data[0, 0] = float("nan")
    with pytest.raises(StudyError, match="not finite; lower score_learning_rate"):
        compressor.finalize(model)


def test_a_least_density_holds_against_any_lambda(features, tokenizer, tmp_path):
    settings = {"final_lambda": 1e4, "score_learning_rate": 3.0, "least_density": 0.3}
    _, summary = train(tokenizer, features, tmp_path / "run", settings)
    last = summary["history"][-1]
    assert last["held"] == ["attention", "ffn"] and summary["history"][0]["held"] == []
    attention = sum(last["density"][part] for part in ("query", "key", "value", "attention_output")) / 4
    assert attention == pytest.approx(0.3, abs=1e-3) and last["density"]["ffn_in"] == pytest.approx(0.3, abs=2e-3)


def test_a_least_density_changes_nothing_while_more_is_above_the_threshold(small_model):
    compressor = attached(small_model("bert"), least_density=0.3)
    close(compressor, 0.5)
    assert compressor.held == []
    names = compressor._of("ffn")
    kept = sum(int(compressor.scores.mask(name).sum()) for name in names)
    assert kept == sum(int((compressor.scores.values[name] > 0).sum()) for name in names)
    close(compressor, 0.9)
    assert compressor.held == ["attention", "ffn"]
    assert sum(int(compressor.scores.mask(name).sum()) for name in names) == round(0.3 * 4 * 48)
