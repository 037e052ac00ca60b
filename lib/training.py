"""The one fine-tuning loop: transformers' Trainer with a compressor, a distiller and an exact resume.

What makes it fast on a CPU: batches of similar length, bf16 autocast where the hardware computes in it, no dropout or a
cheap one (``lib.dropout``), frozen embeddings, the eager attention kernel (its backward is faster than sdpa's) and an
allocator that keeps large blocks (``lib.environment``). ``python -m lib.benchmark training`` measures their shares.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from pydantic import Field
from torch import Tensor
from torch.utils.data import Sampler
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_length_grouped_indices

from lib import distributed, qa
from lib.compressors.base import Compressor, Diverged
from lib.config import StudyError
from lib.data import Task
from lib.distillation import Distiller
from lib.dropout import use_byte_dropout
from lib.environment import native_bf16, release_freed_memory
from lib.models import base_model
from lib.progress import Progress
from lib.settings import Strict
from lib.surgery import forget_parameters

STATE_FILE = "trainer_state.json"
RELEASE_SECONDS = 60  # how often freed memory goes back to the system
PAD_TO = 8  # lengths of batches are multiples: with all lengths, glibc's lists of free blocks grow until malloc is slow

logging.getLogger("transformers").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()


class TrainingSettings(Strict):
    """Everything about a fine-tuning run that can change its result. ``epochs`` 0 means no training."""

    epochs: float = Field(ge=0)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    max_length: int
    stride: int = 0
    train_examples: int | None = None
    eval_examples: int | None = None
    dropout: float = 0.0
    attention_dropout: float | None = None  # None: as dropout
    freeze_embeddings: bool = True
    attention: str = "eager"
    precision: str = "auto"
    warmup: float = 0.06
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


class TrainingOutcome(Strict):
    """What a fine-tuning run took: seconds of the loop (all sittings), examples and tokens seen, loss curve.

    ``threads`` are the CPU threads that computed, those of all processes together.
    """

    seconds: float
    threads: int
    steps: int
    examples: int
    tokens: int
    loss: tuple[tuple[int, float], ...]
    precision: str
    resumed: int


def device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_bf16(precision: str) -> bool:
    """Whether ``precision`` ("auto", "bf16", "fp32") means bf16 autocast on this machine."""
    return precision == "bf16" or (precision == "auto" and native_bf16(device().type))


def encode(task: Task, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings,
           training: bool) -> Dataset:  # fmt: skip
    """Tokenise a split into features without padding; a ``length`` column serves the grouping of batches."""
    if task.kind == "qa":
        features = qa.features(dataset, tokenizer, settings.max_length, settings.stride, training)
    else:

        def tokenise(rows: dict[str, list]) -> dict[str, list]:
            texts = [rows[column] for column in task.columns]
            encoded = tokenizer(*texts, truncation=True, max_length=settings.max_length)
            cast = float if task.kind == "regression" else int
            return {**encoded, "labels": [cast(label) for label in rows["label"]]}

        features = dataset.map(tokenise, batched=True, remove_columns=dataset.column_names)
    return features.add_column("length", [len(ids) for ids in features["input_ids"]])


class GroupedSampler(Sampler[int]):
    """Batches of similar length in an order that depends on (seed, epoch) alone, so that a resumed run repeats it."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of every epoch."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class StudyTrainer(Trainer):
    """Trainer plus compressor (own parameters, penalty, schedule) plus distiller (teacher's terms of the loss)."""

    def __init__(self, *args: Any, compressor: Compressor, distiller: Distiller | None, lengths: Sequence[int],
                 **kwargs: Any) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.compressor, self.distiller, self.lengths = compressor, distiller, lengths
        self.model_accepts_loss_kwargs = False

    @property
    def progress(self) -> float:
        """Share of the optimizer steps done, 0 to 1."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        whole_batch = self.args.train_batch_size * distributed.processes()
        return GroupedSampler(self.lengths, whole_batch, self.args.seed)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        for group in self.compressor.parameter_groups():
            forget_parameters(optimizer, group["params"])  # what a compressor put into the model is listed already
            optimizer.add_param_group(group)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The trainer's linear warm-up and decay, or the compressor's own learning rate."""
        factor = self.compressor.learning_rate_factor
        if factor(0.0) is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,  # type: ignore[arg-type]
                lambda step: factor(min(1.0, step / num_training_steps)) or 0.0,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:  # fmt: skip
        needs = self.distiller.needs if self.distiller else {}
        output = model(**inputs, **needs)
        loss: Any = getattr(output, "loss", None)  # a bare encoder has none, and learns from its teacher alone
        if self.distiller:
            with self.accelerator.autocast():
                loss = self.distiller.loss(output, loss, inputs)
        loss = loss + self.compressor.penalty(self.progress)
        return (loss, output) if return_outputs else loss


class StudyCallback(TrainerCallback, ExportableState):
    """Schedules the compressor, reports progress, asks for a checkpoint every so many minutes, stops at NaN."""

    def __init__(self, compressor: Compressor, progress: Progress, checkpoint_minutes: float) -> None:
        self.compressor, self.reporter = compressor, progress
        self.interval = checkpoint_minutes * 60
        self.trainer: StudyTrainer | None = None
        self.saved = self.started = self.released = time.monotonic()
        self.seconds_before = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of training in this and all earlier sittings."""
        return self.seconds_before + time.monotonic() - self.started

    def state(self) -> dict[str, Any]:
        """Goes into the checkpoint's ``trainer_state.json``, which is written last."""
        return {"args": {}, "attributes": {"seconds": self.seconds, "compressor": self.compressor.state_dict()}}

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.trainer is not None
        self.compressor.step(self.trainer.progress, self.trainer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.reporter.update(state.global_step)
        due = time.monotonic() - self.saved > self.interval and state.global_step < state.max_steps
        if distributed.agree(due):
            control.should_save = True
            self.saved = time.monotonic()
        if time.monotonic() - self.released > RELEASE_SECONDS:
            release_freed_memory()
            self.released = time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None,
               **_: Any) -> None:  # fmt: skip
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise Diverged(f"training diverged: loss {logs['loss']} at step {state.global_step}; lower learning_rate")


def last_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint and its trainer state; one cut off while being written is passed over."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in found:
        with contextlib.suppress(OSError, json.JSONDecodeError):
            return checkpoint, json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return None


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    features: Dataset,
    settings: TrainingSettings,
    seed: int,
    folder: Path,
    compressor: Compressor | None = None,
    distiller: Distiller | None = None,
    title: str = "training",
    checkpoint_minutes: float = 5.0,
    collator: Any = None,
) -> TrainingOutcome:
    """Train ``model`` in place, resuming from ``folder``'s last checkpoint when there is one.

    Args:
        features: from ``encode``.
        folder: for checkpoints; the caller removes it once what it makes of the model is safe.
        compressor: already attached to ``model``.
        checkpoint_minutes: minutes between checkpoints.
        collator: rows of ``features`` -> padded batch; None pads what the tokenizer knows.

    Raises:
        Diverged: the loss stopped being finite.
    """
    compressor = compressor or Compressor(None)
    if settings.freeze_embeddings:
        freeze_embeddings(model)
    use_byte_dropout(model)
    steps = max(1, math.ceil(len(features) / settings.batch_size * settings.epochs))
    bf16 = use_bf16(settings.precision)
    distributed.join()
    callback = StudyCallback(compressor, Progress(title, steps), checkpoint_minutes)
    checkpoint = last_checkpoint(folder)
    if checkpoint:
        attributes = checkpoint[1]["stateful_callbacks"]["StudyCallback"]["attributes"]
        compressor.load_state_dict(attributes["compressor"], model)
        callback.seconds_before = attributes["seconds"]
        callback.reporter.resumed_at(checkpoint[1]["global_step"])
    if distiller:
        distiller.teacher.to(device())
    arguments = _arguments(folder, settings, steps, seed, bf16)
    if distributed.processes() > 1:
        arguments.ddp_find_unused_parameters = type(compressor) is not Compressor  # it may close parts of the model
    trainer = StudyTrainer(
        model=model,
        args=arguments,
        train_dataset=features,
        data_collator=collator or DataCollatorWithPadding(tokenizer, pad_to_multiple_of=PAD_TO),
        compressor=compressor,
        distiller=distiller,
        lengths=features["length"],
        callbacks=[callback],
    )
    for unwanted in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(unwanted)
    callback.trainer = trainer
    callback.started = callback.saved = time.monotonic()
    trainer.train(resume_from_checkpoint=str(checkpoint[0]) if checkpoint else None)
    seconds = callback.seconds
    callback.reporter.close()
    distributed.check_equal(model.parameters(), title)
    history = [(int(entry["step"]), entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return TrainingOutcome(
        seconds=seconds, threads=torch.get_num_threads() * distributed.processes(), steps=steps,
        examples=steps * settings.batch_size, tokens=round(sum(features["length"]) * settings.epochs),
        loss=tuple(history), precision="bf16 autocast" if bf16 else "fp32",
        resumed=checkpoint[1]["global_step"] if checkpoint else 0,
    )  # fmt: skip


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Stop training word, position and type embeddings and their LayerNorm (XLNet has word embeddings only)."""
    base = base_model(model)
    embeddings = getattr(base, "embeddings", None) or getattr(base, "word_embedding", None)
    if embeddings is None:
        raise StudyError(f"{type(model).__name__}: embeddings not found; set training.freeze_embeddings to false")
    embeddings.requires_grad_(False)


def _arguments(folder: Path, settings: TrainingSettings, steps: int, seed: int, bf16: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=distributed.share_of(settings.batch_size),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(steps * settings.warmup),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=bf16,
        use_cpu=device().type == "cpu",
        seed=seed,
        optim="adamw_torch_fused",
        save_strategy="no",
        save_total_limit=1,
        eval_strategy="no",
        logging_steps=max(1, steps // 40),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device().type == "cuda",
        remove_unused_columns=True,
    )
    # One process on a machine with several GPUs would otherwise train on all of them, with as many times the batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
