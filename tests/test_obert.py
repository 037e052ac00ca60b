"""Unstructured pruning: schedule, ranking, updates, masks that hold, exact resume, bad input; upstream; storage."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithPadding

from lib.batches import TrainingData
from lib.compressors import CompressorSpec, FixedMasks, ObertPruning, make_compressor
from lib.compressors.masked import encoder_linears
from lib.compressors.obert import TEN_EPOCHS, THIRTY_EPOCHS
from lib.config import StudyError
from lib.data import TASKS, load_task
from lib.fisher import BlockFisher, cubic_sparsity
from lib.models import layers, load_model
from lib.training import TrainingSettings, encode, fine_tune, last_checkpoint

TASK = TASKS["world_sentiment"]
SETTINGS = TrainingSettings(epochs=3, batch_size=8, learning_rate=1e-3, max_length=32, precision="fp32", dropout=0.1)
SMALL = {"gradients": 4, "gradient_batch": 4}


@pytest.fixture(scope="module")
def features(tokenizer):
    data = load_task("world_sentiment", "embedded", None, 45, 20)
    return encode(TASK, data["train"], tokenizer, SETTINGS, training=True)


@pytest.fixture(scope="module")
def data(features, tokenizer):
    return TrainingData(
        lambda: features, DataCollatorWithPadding(tokenizer), tokenizer.model_input_names, 3, torch.device("cpu"), False
    )


def model() -> Any:
    return load_model("tiny-bert", "classification", 2, seed=1, dropout=0.1)


def compressor(data: TrainingData | None, cls: type[ObertPruning] = ObertPruning, **settings: Any) -> ObertPruning:
    made = cls(ObertPruning.Settings(**({"sparsity": 0.9} | SMALL | settings)))
    if data is not None:
        made.use_data(data)
    return made


def attached(data: TrainingData | None, **settings: Any) -> tuple[Any, ObertPruning]:
    student, made = model(), compressor(None, **settings)
    made.attach(student)
    if data is not None:
        made.use_data(data)
    return student, made


def zeros(student: Any) -> list[torch.Tensor]:
    return [linear.weight.detach() == 0 for linear in encoder_linears(student)]


def sparsity(student: Any) -> float:
    found = zeros(student)
    return sum(int(zero.sum()) for zero in found) / sum(zero.numel() for zero in found)


def flat(student: Any) -> torch.Tensor:
    return torch.cat([linear.weight.detach().flatten() for linear in encoder_linears(student)])


@pytest.mark.parametrize("importance", ["obert", "magnitude"])
@pytest.mark.parametrize("group", [1, 4])
def test_one_shot_without_a_trainer_reaches_the_sparsity(data, importance, group):
    student, made = attached(data, sparsity=0.8, group=group, importance=importance, prune_at=(), rewind_at=())
    untouched = {name: value.clone() for name, value in student.named_parameters() if ".layer." not in name}
    student.train()
    made.finalize(student)
    groups = flat(student).numel() // group
    assert sparsity(student) == round(0.8 * groups) / groups
    if group == 4:
        runs = flat(student).view(-1, 4) == 0
        assert bool((runs.any(1) == runs.all(1)).all())
    assert all(torch.equal(value, student.get_parameter(name)) for name, value in untouched.items())
    assert not [name for name in student.state_dict() if "study" in name] and student.training
    summary = made.summary()
    assert summary["sparsity"] == pytest.approx(sparsity(student)) and len(summary["per_layer"]) == 4
    assert summary["nonzero"] == int((flat(student) != 0).sum())


def test_ranking_is_global_and_by_saliency(data):
    """The weights that go are those of lowest saliency of all layers together, and the rest move by the update."""
    student, made = attached(data, sparsity=0.3, prune_at=(), width=7)
    before, weights = flat(student), [linear.weight for linear in encoder_linears(student)]
    reference = model().eval()
    fishers = [BlockFisher(weight.numel(), 7, 4, 1e-7) for weight in weights]
    for batch in data.batches(4, 4, 1_000_001):
        loss = reference(**batch).loss
        grads = torch.autograd.grad(loss, [linear.weight for linear in encoder_linears(reference)])
        for fisher, gradient in zip(fishers, grads, strict=True):
            fisher.add(gradient)
    saliency = torch.cat([f.saliency(w) for f, w in zip(fishers, weights, strict=True)])
    gone = torch.zeros(len(saliency), dtype=torch.bool)
    gone[saliency.argsort(stable=True)[: round(0.3 * len(saliency))]] = True
    parts = gone.split([weight.numel() for weight in weights])
    change = torch.cat([f.update(w, part) for f, w, part in zip(fishers, weights, parts, strict=True)])
    made.finalize(student)
    expected = torch.where(gone, 0, before + change)
    torch.testing.assert_close(flat(student), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(flat(student) == 0, gone)
    shares = [float(zero.float().mean()) for zero in zeros(student)]
    assert max(shares) - min(shares) > 0.02  # matrices differ: not a ranking within each


def test_magnitude_removes_the_smallest_weights_and_moves_nothing():
    student, made = attached(None, sparsity=0.5, importance="magnitude", prune_at=())
    before = flat(student)
    made.finalize(student)
    kept = flat(student) != 0
    assert float(before[kept].abs().min()) >= float(before[~kept].abs().max())
    assert torch.equal(flat(student)[kept], before[kept])


def test_updates_lower_the_loss_in_the_order_of_the_theory(data):
    """On the gradients' own quadratic model the joint update costs least, none the most."""
    losses = {}
    for update in ("joint", "sum", "none"):
        student, made = attached(
            data, sparsity=0.5, prune_at=(), update=update, precision="float64", dampening=1e-4, gradients=11
        )
        weights = flat(student).double()
        fishers = made._fishers(1_000_001)
        made.finalize(student)
        change = flat(student).double() - weights
        parts = change.split([linear.weight.numel() for linear in encoder_linears(student)])
        losses[update] = sum(
            float((row * torch.linalg.solve(fisher.inverse, row)).sum())
            for fisher, part in zip(fishers, parts, strict=True)
            for row in [fisher._rows(part)]
        )
    assert losses["joint"] < losses["sum"] < losses["none"]


def test_recomputations_end_at_the_same_sparsity_with_other_weights(data):
    once, many = attached(data, sparsity=0.8, prune_at=()), attached(data, sparsity=0.8, prune_at=(), recomputations=3)
    for student, made in (once, many):
        made.finalize(student)
    assert sparsity(once[0]) == sparsity(many[0]) and not torch.equal(flat(once[0]), flat(many[0]))
    history = [entry["sparsity"] for entry in many[1].history]
    assert history == pytest.approx([1 - 0.2 ** (1 / 3), 1 - 0.2 ** (2 / 3), 0.8], abs=1e-4)


class Watching(ObertPruning):
    """Notes masks, sparsity and learning rate at every step, and may be interrupted."""

    at: int | None = None

    def attach(self, student: Any) -> None:
        super().attach(student)
        self.seen: list[tuple[float, float, float]] = []
        self.zeros: list[list[torch.Tensor]] = []

    def step(self, progress: float, trainer: Any) -> None:
        if self.at is not None and trainer.state.global_step >= self.at:
            raise KeyboardInterrupt
        super().step(progress, trainer)
        self.seen.append((progress, sparsity(self.model), trainer.optimizer.param_groups[0]["lr"]))
        self.zeros.append(zeros(self.model))


def train(tokenizer: Any, features: Any, data: TrainingData, folder: Path, at: int | None = None,
          **settings: Any) -> tuple[Any, Any]:  # fmt: skip
    student, made = model(), compressor(data, Watching, **settings)
    made.attach(student)
    made.use_data(data)
    made.at = at
    fine_tune(
        student, tokenizer, features, SETTINGS, 3, folder, made, checkpoint_minutes=1e-9 if at is not None else 60
    )
    return student, made


@pytest.mark.parametrize("importance", ["obert", "magnitude"])
def test_gradual_pruning_follows_the_schedule_and_is_final(features, data, tokenizer, tmp_path, importance):
    student, made = train(tokenizer, features, data, tmp_path, importance=importance)
    targets = list(zip(THIRTY_EPOCHS["prune_at"], cubic_sparsity(0.7, 0.9, 7), strict=True))
    for progress, found, _ in made.seen:
        due = [target for moment, target in targets if moment <= progress]
        assert found == pytest.approx(due[-1] if due else 0.0, abs=1e-4)
    for earlier, later in itertools.pairwise(made.zeros):
        assert all(bool((now | ~before).all()) for before, now in zip(earlier, later, strict=True))
    assert sum(entry["sparsity"] for entry in made.history) == pytest.approx(sum(s for _, s in targets), abs=1e-3)
    pairs = zip(encoder_linears(student), made.zeros[-1], strict=True)
    moved = [bool((linear.weight[zero] != 0).any()) for linear, zero in pairs]
    made.finalize(student)
    assert any(moved)  # by the optimizer's moments in its last step: what finalize is there for
    assert all(torch.equal(one, other) for one, other in zip(made.zeros[-1], zeros(student), strict=True))


def test_learning_rate_is_rewound(features, data, tokenizer, tmp_path):
    _, made = train(tokenizer, features, data, tmp_path, importance="magnitude")
    for progress, _, rate in made.seen:
        cuts = [0.0, *THIRTY_EPOCHS["rewind_at"], 1.0]
        start = max(cut for cut in cuts if cut <= progress)
        end = min(cut for cut in cuts if cut > start)
        assert rate == pytest.approx(1e-3 * (1 - 0.9 * (progress - start) / (end - start)), rel=1e-6)
    assert made.learning_rate_factor(1.0) == pytest.approx(0.1)
    assert compressor(data, rewind_at=()).learning_rate_factor(0.3) is None
    ten = compressor(data, **TEN_EPOCHS)
    assert ten.learning_rate_factor(0.8) == 1 and ten.learning_rate_factor(0.4) == pytest.approx(0.55)


@pytest.mark.parametrize("importance", ["obert", "magnitude"])
@pytest.mark.parametrize("stops", [(2,), (9, 14)])
def test_a_resumed_run_ends_as_an_undisturbed_one(features, data, tokenizer, tmp_path, importance, stops):
    expected, whole = train(tokenizer, features, data, tmp_path / "whole", importance=importance)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train(tokenizer, features, data, tmp_path / "run", at=stop, importance=importance)
        assert last_checkpoint(tmp_path / "run")[1]["global_step"] == stop
    resumed, made = train(tokenizer, features, data, tmp_path / "run", importance=importance)
    for student, one in ((expected, whole), (resumed, made)):
        one.finalize(student)
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())
    assert made.history == whole.history and made.summary() == whole.summary()


def test_fixed_masks_keep_exactly_the_zeros_that_a_model_begins_with(features, tokenizer, tmp_path):
    student, pruning = attached(None, sparsity=0.6, importance="magnitude", prune_at=())
    pruning.finalize(student)
    before, held = zeros(student), make_compressor(CompressorSpec(name="fixed_masks"))
    weights = flat(student)
    held.attach(student)
    fine_tune(student, tokenizer, features, SETTINGS, 3, tmp_path, held)
    held.finalize(student)
    assert all(torch.equal(one, other) for one, other in zip(before, zeros(student), strict=True))
    assert not torch.equal(weights, flat(student)) and held.summary()["sparsity"] == pytest.approx(0.6, abs=1e-4)


def test_dense_control_only_follows_the_learning_rate(features, data, tokenizer, tmp_path):
    student, made = train(tokenizer, features, data, tmp_path, sparsity=0.0)
    made.finalize(student)
    assert sparsity(student) == 0 and made.history == [] and {found for _, found, _ in made.seen} == {0.0}


def test_drawing_batches_depends_on_seed_and_draw_alone_and_disturbs_no_random_numbers(data):
    state = torch.get_rng_state()
    one, again, other = ([b["input_ids"] for b in data.batches(4, 3, draw)] for draw in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_gradients_leave_the_model_in_its_mode_and_without_stored_gradients(data):
    student, made = attached(data, prune_at=())
    for training in (True, False):
        student.train(training)
        made._fishers(1)
        assert student.training is training and all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 0.5}, "first step to 0.7 is above the final sparsity 0.5; lower first_step"),
        ({"group": 4, "width": 50}, "groups of 4 do not divide width 50"),
        ({"prune_at": (0.5, 0.2)}, "shares of training, ascending from 0"),
        ({"rewind_at": (1.0,)}, "shares of training, ascending from 0"),
    ],
)
def test_bad_settings_are_one_line(data, settings, said):
    with pytest.raises(StudyError, match=said) as raised:
        attached(data, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("obert", {"sparsity": 1.0}, "setting sparsity"),
        ("obert", {"sparsity": 0.9, "group": 3}, "setting group"),
        ("obert", {"sparsity": 0.9, "dampening": 0}, "setting dampening"),
        ("obert", {"sparsity": 0.9, "gradients": 0}, "setting gradients"),
    ],
)
def test_impossible_settings_are_refused_when_the_spec_is_read(name, settings, said):
    with pytest.raises(StudyError, match=said):
        make_compressor(CompressorSpec(name=name, settings=settings))


def test_sparsity_below_the_current_one_is_refused(data):
    student, made = attached(None, sparsity=0.8, importance="magnitude", prune_at=())
    made.finalize(student)
    with pytest.raises(StudyError, match=r"sparsity 0\.75 is below the current one of 0\.800; pruned weights never"):
        compressor(data, sparsity=0.75).attach(student)


def test_fewer_examples_than_gradients_need_is_one_line(data):
    student, made = attached(data, gradients=12, prune_at=())
    with pytest.raises(StudyError, match="12 gradients of 4 examples each, but there are 45 training examples"):
        made.finalize(student)


def test_no_data_is_one_line():
    student, made = attached(None, prune_at=())
    with pytest.raises(StudyError, match="needs gradients, and no training data came"):
        made.finalize(student)


def test_a_tiny_lambda_is_refused_with_advice(data):
    student, made = attached(data, dampening=1e-16, width=2, gradients=8, prune_at=(), precision="float32")
    with pytest.raises(StudyError, match="dampening 1e-16 is too small for these gradients in float32"):
        made.finalize(student)


def test_float64_takes_over_where_float32_gives_out_and_the_record_says_so(data):
    """The same weights as in float64 from the start; a lambda that float32 can bear stays in float32."""
    small = {"width": 2, "gradients": 8, "prune_at": ()}
    found = {}
    for precision in ("auto", "float64"):
        student, made = attached(data, dampening=1e-14, precision=precision, **small)
        made.finalize(student)
        found[precision] = flat(student)
        assert made.history[0]["float64"] == 1
    assert torch.equal(found["auto"], found["float64"])
    student, made = attached(data, **small)
    made.finalize(student)
    assert "float64" not in made.history[0]


def test_rows_that_groups_do_not_divide_are_refused():
    student = model()
    linear = encoder_linears(student)[0]
    linear.weight, linear.in_features = torch.nn.Parameter(linear.weight[:, :30].clone()), 30
    with pytest.raises(StudyError, match="groups of 4 do not divide rows of 30 weights"):
        compressor(None, group=4).attach(student)


def test_fixed_masks_of_a_dense_model_and_frozen_weights_are_refused():
    with pytest.raises(StudyError, match="no zero weight to hold"):
        FixedMasks(None).attach(model())
    student = model()
    layers(student)[0].requires_grad_(False)
    with pytest.raises(StudyError, match="frozen"):
        FixedMasks(None).attach(student)
