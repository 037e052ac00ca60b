"""The training loop: same seed, same result; a stopped run ends as an undisturbed one; the compressor's contract."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lib import training
from lib.compressors import Compressor, LayerDropping
from lib.config import StudyError
from lib.data import TASKS, load_task
from lib.distillation import Distillation, Distiller
from lib.dropout import ByteDropout
from lib.evaluation import evaluate_model
from lib.models import base_model, layers, load_model
from lib.training import GroupedSampler, TrainingSettings, encode, fine_tune, last_checkpoint

EVERY_STEP = 1e-9  # minutes
TASK = TASKS["world_sentiment"]
SETTINGS = TrainingSettings(
    epochs=2, batch_size=8, learning_rate=1e-3, max_length=32, precision="fp32", dropout=0.1, freeze_embeddings=True
)


@pytest.fixture(scope="module")
def data():
    return load_task("world_sentiment", "embedded", None, 45, 20)


@pytest.fixture(scope="module")
def features(data, tokenizer):
    return encode(TASK, data["train"], tokenizer, SETTINGS, training=True)


def model(dropout: float = 0.1) -> Any:
    return load_model("tiny-bert", "classification", 2, seed=1, dropout=dropout)


def train(student: Any, tokenizer: Any, features: Any, folder: Path, **changes: Any) -> Any:
    arguments = {"seed": 3, "checkpoint_minutes": 60, "settings": SETTINGS} | changes
    compressor = arguments.get("compressor")
    if compressor:
        compressor.attach(student)
    return fine_tune(student, tokenizer, features, folder=folder, **arguments)


def weights(student: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in student.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_sampler_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    lengths = [(13 * i) % 29 for i in range(101)]

    def order(seed: int, epoch: int) -> list[int]:
        sampler = GroupedSampler(lengths, 8, seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == 101
        torch.rand(seed + 1)  # the global generator plays no part
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(101))
    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


def test_sampler_puts_similar_lengths_into_a_batch():
    lengths = [(37 * i) % 101 for i in range(800)]
    order = list(GroupedSampler(lengths, 8, 0))
    spread = [max(group) - min(group) for i in range(0, 800, 8) if (group := [lengths[j] for j in order[i : i + 8]])]
    assert sum(spread) / len(spread) < 15  # about 80 when shuffled


def test_the_same_seed_gives_the_same_weights_and_metrics_and_another_does_not(data, features, tokenizer, tmp_path):
    validation = encode(TASK, data["validation"], tokenizer, SETTINGS, training=False)
    results, states, losses = [], [], []
    for turn, seed in enumerate((3, 3, 4)):
        torch.manual_seed(len(results))  # what happened before plays no part
        student = model()
        outcome = train(student, tokenizer, features, tmp_path / str(turn), seed=seed)
        results.append(evaluate_model(student, tokenizer, TASK, data["validation"], validation, SETTINGS))
        states.append(weights(student))
        losses.append(outcome.loss)
        assert outcome.steps == 12 and outcome.resumed == 0 and outcome.precision == "fp32"
        assert outcome.examples == 96 and outcome.tokens == 2 * sum(features["length"])
    assert results[0] == results[1] and losses[0] == losses[1] and same(states[0], states[1])
    assert losses[0] != losses[2] and not same(states[0], states[2])


def test_batches_are_padded_to_multiples_and_dropout_is_the_cheap_one(features, tokenizer, tmp_path):
    student, widths, dropouts = model(), [], set()

    def look(module: nn.Module, _: Any, inputs: dict[str, Any]) -> None:
        widths.append(inputs["input_ids"].shape[1])
        dropouts.update(type(part) for part in module.modules() if isinstance(part, nn.Dropout))

    student.register_forward_pre_hook(look, with_kwargs=True)
    train(student, tokenizer, features, tmp_path)
    assert len(widths) == 12 and {width % training.PAD_TO for width in widths} == {0}
    assert max(features["length"]) <= max(widths) < max(features["length"]) + training.PAD_TO
    assert dropouts == {ByteDropout}


class Stop(KeyboardInterrupt):
    """Ctrl-C, raised where a test wants it."""


class Stopping(Compressor):
    """Is interrupted before a given optimizer step."""

    def __init__(self, step: int | None) -> None:
        super().__init__(None)
        self.at = step

    def step(self, progress: float, trainer: Any) -> None:
        if self.at is not None and trainer.state.global_step >= self.at:
            raise Stop


@pytest.mark.parametrize("stops", [(1,), (4, 5), (6, 9, 11)])
def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(features, tokenizer, tmp_path, stops):
    """With dropout, so that the random numbers must go on where they were; in the first and the second epoch."""
    undisturbed = model()
    expected = train(undisturbed, tokenizer, features, tmp_path / "whole", compressor=Stopping(None))
    for stop in stops:
        with pytest.raises(Stop):
            train(model(), tokenizer, features, tmp_path / "run", compressor=Stopping(stop),
                  checkpoint_minutes=EVERY_STEP)  # fmt: skip
        assert last_checkpoint(tmp_path / "run")[1]["global_step"] == stop
    resumed = model()
    outcome = train(resumed, tokenizer, features, tmp_path / "run", compressor=Stopping(None))
    assert outcome.resumed == stops[-1]
    assert same(weights(resumed), weights(undisturbed))
    assert outcome.loss == expected.loss and outcome.steps == expected.steps == 12


def test_seconds_of_earlier_sittings_are_counted(features, tokenizer, tmp_path):
    with pytest.raises(Stop):
        train(model(), tokenizer, features, tmp_path, compressor=Stopping(2), checkpoint_minutes=EVERY_STEP)
    path, state = last_checkpoint(tmp_path)
    state["stateful_callbacks"]["StudyCallback"]["attributes"]["seconds"] = 5000.0
    (path / "trainer_state.json").write_text(json.dumps(state))
    outcome = train(model(), tokenizer, features, tmp_path, compressor=Stopping(None))
    assert outcome.resumed == 2 and outcome.seconds > 5000


class StoppingDropper(LayerDropping):
    """Drops layers while training, and is interrupted before a given step."""

    at: int | None = None

    def step(self, progress: float, trainer: Any) -> None:
        if self.at is not None and trainer.state.global_step >= self.at:
            raise Stop
        super().step(progress, trainer)


@pytest.mark.parametrize("stop", [3, 4, 5, 9])
def test_resuming_is_exact_while_layers_are_dropped(features, tokenizer, tmp_path, stop):
    """Layers go before steps 4 and 8 of 12."""

    def dropper(at: int | None) -> StoppingDropper:
        made = StoppingDropper(LayerDropping.Settings(drop=(2, 4), iterative=True))
        made.at = at
        return made

    undisturbed, resumed = model(), model()
    train(undisturbed, tokenizer, features, tmp_path / "whole", compressor=dropper(None))
    with pytest.raises(Stop):
        train(model(), tokenizer, features, tmp_path / "run", compressor=dropper(stop), checkpoint_minutes=EVERY_STEP)
    last = dropper(None)
    outcome = train(resumed, tokenizer, features, tmp_path / "run", compressor=last)
    assert outcome.resumed == stop and last.summary()["kept_layers"] == [1, 3]
    assert len(layers(resumed)) == 2 and same(weights(resumed), weights(undisturbed))


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None
    for step, content in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (11, '{"global_'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content:
            (folder / "trainer_state.json").write_text(content)
    path, state = last_checkpoint(tmp_path)
    assert path.name == "checkpoint-10" and state == {"global_step": 10}


class Gate(Compressor):
    """One parameter of its own, pulled to 3 by the penalty."""

    strength = 1.0

    def __init__(self) -> None:
        super().__init__(None)
        self.gate = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(1))
        self.seen: list[float] = []
        self.groups: list[dict[str, Any]] = []

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.gate, self.unused], "lr": 0.5, "weight_decay": 0.0}]

    def penalty(self, progress: float) -> torch.Tensor:
        return self.strength * (self.gate - 3).square().sum() + 0 * self.unused.sum()

    def step(self, progress: float, trainer: Any) -> None:
        self.seen.append(progress)
        self.groups = [dict(group) for group in trainer.optimizer.param_groups]


def test_a_compressors_parameters_are_trained_in_a_group_of_their_own(features, tokenizer, tmp_path):
    gate = Gate()
    train(model(), tokenizer, features, tmp_path, compressor=gate)
    assert gate.seen == [step / 12 for step in range(12)]
    own = gate.groups[-1]
    assert own["params"][0] is gate.gate and own["initial_lr"] == 0.5 and own["weight_decay"] == 0.0
    assert {group["weight_decay"] for group in gate.groups[:-1]} == {0.0, 0.01}
    assert abs(gate.gate.item() - 3) < 1 and gate.unused.item() == 1.0


class Constant(Compressor):
    def penalty(self, progress: float) -> float:
        return 5.0


def test_the_penalty_is_added_to_the_loss_and_nothing_else(features, tokenizer, tmp_path):
    plain, penalised = model(), model()
    before = train(plain, tokenizer, features, tmp_path / "a")
    after = train(penalised, tokenizer, features, tmp_path / "b", compressor=Constant(None))
    differences = [b - a for (_, a), (_, b) in zip(before.loss, after.loss, strict=True)]
    assert differences == pytest.approx([5.0] * 12, abs=1e-3)
    assert same(weights(plain), weights(penalised))


def test_the_distiller_changes_what_is_learnt(features, tokenizer, tmp_path):
    teacher = model(dropout=0.0)
    student, alone = model(dropout=0.0), model(dropout=0.0)
    settings = SETTINGS.model_copy(update={"dropout": 0.0})
    soft = Distiller(Distillation(hard=0.0, logits=1.0), teacher)
    outcome = train(student, tokenizer, features, tmp_path / "a", settings=settings, distiller=soft)
    train(alone, tokenizer, features, tmp_path / "b", settings=settings)
    assert max(loss for _, loss in outcome.loss) < 1e-3, "a student that equals its teacher has nothing to learn"
    assert not same(weights(student), weights(alone))


class Exploding(Compressor):
    def penalty(self, progress: float) -> float:
        return math.nan if progress >= 0.5 else 0.0


def test_divergence_is_one_line(features, tokenizer, tmp_path):
    with pytest.raises(StudyError, match=r"training diverged: loss nan at step 7; lower learning_rate") as caught:
        train(model(), tokenizer, features, tmp_path, compressor=Exploding(None))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_embeddings_do_not_move_and_everything_else_does(features, tokenizer, tmp_path, frozen):
    student = model()
    before = weights(student)
    train(student, tokenizer, features, tmp_path, settings=SETTINGS.model_copy(update={"freeze_embeddings": frozen}))
    after = weights(student)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    embeddings = {name for name in before if ".embeddings." in name}
    assert len(embeddings) == 5 and (moved & embeddings == (set() if frozen else embeddings))
    assert before.keys() - embeddings <= moved


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "xlnet"])
def test_embeddings_are_found_in_every_architecture(small_model, architecture):
    student = small_model(architecture)
    training.freeze_embeddings(student)
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen and all("embedding" in name for name in frozen)
    with pytest.raises(StudyError, match=r"embeddings not found; set training\.freeze_embeddings to false"):
        training.freeze_embeddings(SimpleNamespace(base_model_prefix="none"))  # type: ignore[arg-type]
    assert base_model(student) is not student


def test_encoding_truncates_and_casts_labels(data, tokenizer):
    short = SETTINGS.model_copy(update={"max_length": 8})
    features = encode(TASK, data["train"], tokenizer, short, training=True)
    assert max(features["length"]) == 8 and features["labels"] == data["train"]["label"]
    assert features["length"] == [len(ids) for ids in features["input_ids"]]


def test_precision_is_what_was_asked_for(monkeypatch):
    for hardware in (True, False):
        monkeypatch.setattr(training, "native_bf16", lambda kind, answer=hardware: answer)
        assert [training.use_bf16(name) for name in ("auto", "bf16", "fp32")] == [hardware, True, False]
