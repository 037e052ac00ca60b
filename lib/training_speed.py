"""How fast training is: full steps of several models, and our loop against a stock ``transformers.Trainer``.

Both are interleaved. Steps of different models take turns in one process. The allocator is fixed when a process starts,
so the variants with and without its settings live in two processes, and epochs of all variants take turns.
"""

import contextlib
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tabulate import tabulate
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from lib import environment
from lib.agreement import random_batch
from lib.compressors import Compressor, CompressorSpec, make_compressor
from lib.config import StudyError, load_profile
from lib.memory import peak_memory
from lib.models import load_model, load_tokenizer, random_model
from lib.surgery import drop_layers, forget_parameters
from lib.training import StudyTrainer, device, freeze_embeddings

# Each variant adds one setting to the one before it. The second field: does it change the result, or only the speed?
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "stock Trainer": ({}, "reference"),
    "+ bf16 autocast": ({"bf16": True}, "rounding of activations and gradients"),
    "+ no dropout": ({"dropout": 0.0}, "changes the result: less regularisation"),
    "+ frozen embeddings": ({"frozen": True}, "changes the result: embeddings keep their pre-trained values"),
    "+ eager attention": ({"attention": "eager"}, "speed only"),
    "+ allocator keeps memory": ({"allocator": True}, "speed only"),
    "+ batches of similar length (ours)": ({"grouped": True}, "speed only, apart from which examples share a batch"),
}
STOCK_BF16 = "+ bf16 autocast"
RUN_STEPS = 2000  # of the run that a timed step belongs to: what a compressor does now and then has its share


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run torch on ``count`` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Step:
    """One full training step of a model with random weights: compressor, forward, backward, clipping, AdamW."""

    def __init__(self, architecture: str, drop: list[int], head: str, batch: int, length: int, bf16: bool,
                 frozen_embeddings: bool, compressor: dict[str, Any] | None = None) -> None:  # fmt: skip
        self.model: PreTrainedModel = random_model(architecture, head)  # type: ignore[arg-type]
        drop_layers(self.model, drop)
        self.compressor, self.taken = Compressor(None), 0
        if compressor:
            self.compressor = make_compressor(CompressorSpec.model_validate(compressor))
        self.compressor.attach(self.model)
        self.model.train().to(device())
        if frozen_embeddings:
            freeze_embeddings(self.model)
        self.bf16 = bf16
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        for group in self.compressor.parameter_groups():
            forget_parameters(self.optimizer, group["params"])
            self.optimizer.add_param_group(group)
        arrays = random_batch(batch, length, self.model.config.vocab_size)
        targets = ("labels",) if head == "classification" else ("start_positions", "end_positions")
        inputs = {name: torch.as_tensor(value) for name, value in arrays.items()}
        inputs |= dict.fromkeys(targets, torch.arange(batch) % 2)
        self.inputs = {name: value.to(device()) for name, value in inputs.items()}

    def __call__(self) -> float:
        """Take the step; returns its seconds."""
        progress = 0.5 + self.taken / RUN_STEPS
        start = time.perf_counter()
        self.compressor.step(progress, self)  # type: ignore[arg-type]  # no Trainer, but it has an optimizer too
        with torch.autocast(device().type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(**self.inputs).loss
        (loss + self.compressor.penalty(progress)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if device().type == "cuda":
            torch.cuda.synchronize()
        self.taken += 1
        return time.perf_counter() - start


def one_step(**arguments: Any) -> None:
    """Build a model and take two training steps; what ``peak_memory`` runs in a fresh process."""
    step = Step(**arguments)
    step()
    step()


def training_steps(models: dict[str, dict[str, Any]], dense: str, batch: int, length: int, threads: int, rounds: int,
                   bf16: bool, frozen_embeddings: bool) -> dict[str, Any]:  # fmt: skip
    """Examples per second of full training steps, interleaved step by step, and each model's peak memory.

    Args:
        models: name -> ``architecture``, ``drop``, ``head``, and the ``compressor`` that it trains with, if any.
        dense: the name that ratios refer to.

    Returns:
        ``rows``: name, median_ms, q1_ms, q3_ms, examples_per_s, ratio_to_dense (above 1 is faster; median and
        quartiles over rounds), peak_memory_bytes (fp32 only, the papers' precision).

    Raises:
        StudyError: ``dense`` is not among the models.
    """
    if dense not in models:
        raise StudyError(f"training speed: dense model '{dense}' is not among {', '.join(models)}")
    common: dict[str, Any] = {"batch": batch, "length": length, "bf16": bf16, "frozen_embeddings": frozen_embeddings}
    order, shuffler = list(models), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch_threads(threads):
        steps = {name: Step(**model, **common) for name, model in models.items()}
        for step in steps.values():
            step()
        for _ in range(rounds):
            shuffler.shuffle(order)
            for name in order:
                times[name].append(steps[name]())
        del steps
    rows = []
    for name, model in models.items():
        q1, median, q3 = np.percentile(times[name], (25, 50, 75)) * 1e3
        ratio_q1, ratio, ratio_q3 = np.percentile(np.divide(times[dense], times[name]), (25, 50, 75))
        memory = None if bf16 else peak_memory(one_step, device().type, **model, **common)
        rows.append({
            "name": name, "median_ms": median, "q1_ms": q1, "q3_ms": q3, "n": rounds,
            "examples_per_s": 1e3 * batch / median, "ratio_to_dense": ratio, "ratio_q1": ratio_q1, "ratio_q3": ratio_q3,
            "peak_memory_bytes": memory,
        })  # fmt: skip
    return {"rows": rows, "device": device().type}


class _Clock(TrainerCallback):
    """Seconds of the optimizer steps of one ``train`` call, without its set-up."""

    seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self.start


def _trainer(encoder: str, kind: Any, features: Dataset, batch: int, settings: dict[str, Any], folder: str) -> Trainer:
    """The stock Trainer with its defaults, or ours, for one variant."""
    model = load_model(encoder, kind, attention=settings.get("attention", "sdpa"), dropout=settings.get("dropout"))
    if settings.get("frozen"):
        freeze_embeddings(model)
    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=1, per_device_train_batch_size=batch, bf16=settings.get("bf16", False),
        use_cpu=device().type == "cpu", save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
        dataloader_pin_memory=device().type == "cuda",
    )  # fmt: skip
    common: dict[str, Any] = {
        "model": model, "args": arguments, "train_dataset": features,
        "data_collator": DataCollatorWithPadding(load_tokenizer(encoder)),
    }  # fmt: skip
    if settings.get("grouped"):
        return StudyTrainer(**common, compressor=Compressor(None), distiller=None, lengths=features["length"])
    return Trainer(**common)


def _worker(pipe: Connection, encoder: str, kind: str, columns: dict[str, list], batch: int, threads: int,
            variants: dict[str, dict[str, Any]]) -> None:  # fmt: skip
    """Hold some variants; each time the parent names one, train it for an epoch and send its seconds."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        features, clock = Dataset.from_dict(columns), _Clock()
        trainers = {
            name: _trainer(encoder, kind, features, batch, settings, folder) for name, settings in variants.items()
        }
        for trainer in trainers.values():
            trainer.add_callback(clock)
        pipe.send(True)
        while name := pipe.recv():
            clock.seconds = 0.0
            trainers[name].train()
            pipe.send(clock.seconds)


@contextlib.contextmanager
def _allocator(fast: bool) -> Iterator[None]:
    """Processes started inside have the allocator's variables, or have them not."""
    variables = environment.fast_cpu_environment()
    before = {name: os.environ.get(name) for name in variables}
    for name, value in variables.items():
        os.environ.pop(name, None)
        if fast:
            os.environ[name] = value
    try:
        yield
    finally:
        for name, old in before.items():
            os.environ.pop(name, None)
            if old is not None:
                os.environ[name] = old


def training_comparison(encoder: str, kind: str, features: Dataset, batch: int, rounds: int, threads: int,
                        progress: Any = lambda line: None) -> dict[str, Any]:  # fmt: skip
    """Our training loop against the stock Trainer, setting by setting, epochs of all variants interleaved.

    Args:
        features: from ``training.encode``; every variant trains on all of them in each round.
        rounds: counted epochs of each variant, after one that is not counted.

    Returns:
        ``rows``: variant, what else it changes, examples_per_s (median, quartiles over rounds), ratio to the stock
        bf16 run, and ratio to the variant before.
    """
    context = multiprocessing.get_context("spawn")
    columns = {name: list(features[name]) for name in features.column_names}
    settings: dict[str, Any] = {}
    variants = {name: (settings := settings | change) for name, (change, _) in VARIANTS.items()}
    workers: dict[str, tuple[Any, Connection]] = {}
    for fast in (False, True):
        held = {name: chosen for name, chosen in variants.items() if bool(chosen.get("allocator")) is fast}
        here, there = context.Pipe()
        with _allocator(fast):
            process = context.Process(
                target=_worker, args=(there, encoder, kind, columns, batch, threads, held), daemon=True
            )
            process.start()
        there.close()
        workers |= dict.fromkeys(held, (process, here))
    own = list({id(process): (process, pipe) for process, pipe in workers.values()}.values())
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    try:
        for _, pipe in own:
            pipe.recv()
        for turn in range(rounds + 1):
            for name, (_, pipe) in workers.items():
                progress(f"training speed: round {turn} of {rounds}, {name}")
                pipe.send(name)
                seconds[name].append(pipe.recv())
        for _, pipe in own:
            pipe.send("")
    except EOFError:
        raise StudyError("training comparison: a worker process ended early; is there enough memory?") from None
    finally:
        for process, _ in own:
            process.join(timeout=20)
            process.terminate()
    rates = {name: len(features) / np.array(values[1:]) for name, values in seconds.items()}
    rows, previous = [], None
    for name, (_, changes) in VARIANTS.items():
        q1, median, q3 = np.percentile(rates[name], (25, 50, 75))
        rows.append({
            "variant": name, "also_changes": changes, "examples_per_s": median, "q1": q1, "q3": q3, "n": rounds,
            "ratio_to_stock_bf16": float(np.median(rates[name] / rates[STOCK_BF16])),
            "ratio_to_previous": float(np.median(rates[name] / rates[previous])) if previous else 1.0,
        })  # fmt: skip
        previous = name
    return {"rows": rows, "examples": len(features), "mean_length": float(np.mean(features["length"])),
            "device": device().type}  # fmt: skip


def training_report(options: Any) -> str:
    """Compare under a profile, as ``python -m lib.benchmark training`` asks; returns the printed table.

    Args:
        options: ``profile``, ``data_dir``, ``examples``, ``batch``, ``rounds``, ``threads``.

    Raises:
        StudyError: impossible value, unknown profile, missing data.
    """
    from lib.plans import stock_comparison
    from lib.speed_runs import run_stock_comparison

    for field in ("examples", "batch", "rounds", "threads"):
        if getattr(options, field) < 1:
            raise StudyError(f"--{field}: found {getattr(options, field)}, expected 1 or more")
    profile = load_profile(options.profile, data_dir=options.data_dir)
    changes = {field: getattr(options, field) for field in ("examples", "batch", "rounds", "threads")}
    spec = stock_comparison(profile).model_copy(update=changes)
    result = run_stock_comparison(spec, profile)
    cells = [[
        row["variant"], f"{row['examples_per_s']:.1f}", f"{row['q1']:.1f}–{row['q3']:.1f}",
        f"{row['ratio_to_previous']:.2f}", f"{row['ratio_to_stock_bf16']:.2f}", row["also_changes"],
    ] for row in result["rows"]]  # fmt: skip
    headers = ("setting, added to the row above", "examples/s", "quartiles", "× above", "× stock bf16", "also changes")
    table = tabulate(cells, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 4, "left"))
    return "\n".join([
        f"{profile.encoder} on {result['examples']} features of {spec.task}, {result['mean_length']:.0f} tokens on "
        f"average, batch {spec.batch}, {spec.threads} threads, {spec.rounds} interleaved rounds, "
        f"{environment.hardware()['cpu']}",
        "", table,
    ])  # fmt: skip


def overhead_report(options: Any) -> str:
    """Cost of training with blocks' scores and masks, as ``python -m lib.benchmark overhead`` asks; the printed table.

    Args:
        options: ``profile``, ``batch``, ``length``, ``rounds``, ``threads``, each but the first None for the profile's.

    Raises:
        StudyError: impossible value, unknown profile.
    """
    from lib.plans import training_overhead
    from lib.speed_runs import run_training_speed

    fields = ("batch", "length", "rounds", "threads")
    changes = {field: value for field in fields if (value := getattr(options, field)) is not None}
    for field, value in changes.items():
        if value < 1:
            raise StudyError(f"--{field}: found {value}, expected 1 or more")
    spec = training_overhead(load_profile(options.profile)).model_copy(update=changes)
    cells = [[
        row["name"], f"{row['median_ms']:.0f}", f"{row['q1_ms']:.0f}–{row['q3_ms']:.0f}",
        f"{1 / row['ratio_to_dense']:.2f} ({1 / row['ratio_q3']:.2f}–{1 / row['ratio_q1']:.2f})",
    ] for row in run_training_speed(spec)["rows"]]  # fmt: skip
    headers = ("trained with", "ms per step", "quartiles", "× dense (quartiles)")
    table = tabulate(cells, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 3))
    return "\n".join([
        f"{spec.models['dense'].architecture}, batch {spec.batch}, {spec.length} tokens, {spec.threads} threads, "
        f"{spec.rounds} interleaved rounds, bf16 autocast, {environment.hardware()['cpu']}",
        "", table,
    ])  # fmt: skip
