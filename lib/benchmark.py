"""Latency and throughput, measured so that two numbers of one table can be compared.

Dense and compressed models are timed *interleaved*: every round runs each candidate once, in a shuffled order, and a
speed-up is the median over rounds of dense time / compressed time within the same round. Drift of clock speed, heat
or a neighbour on the machine then hits all candidates alike. Medians and quartiles are reported, never the best of
many. Nothing is timed before its outputs agree with PyTorch fp32 (``check_agreement``).

    python -m lib.benchmark latency --encoder base --keep-layers 6 --batch 1 --length 384
    python -m lib.benchmark training --profile study --data-dir FOLDER
    python -m lib.benchmark overhead --profile study
    python -m lib.benchmark fisher --full minilm
"""

import argparse
import contextlib
import gc
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.command_line import Parser, exit_code
from lib.environment import hardware, reexec_with_fast_allocator, usable_cpus

if __name__ == "__main__":
    reexec_with_fast_allocator()  # here, because the imports below take seconds

import numpy as np
import torch
from tabulate import tabulate
from transformers.utils.logging import disable_progress_bar

from lib.agreement import check_agreement, random_batch
from lib.config import StudyError
from lib.engines import ENGINES, Prepared, available_engines, prepare, unavailable_reason
from lib.fisher_speed import fisher_report
from lib.model_cost import flops
from lib.models import SPEED_ARCHITECTURES, architecture_of, layers, load_model, random_model
from lib.onnx_export import evaluation_copy, quiet
from lib.surgery import drop_layers
from lib.training_speed import overhead_report, training_report

LONG_CALL = 1.0  # seconds


def latency(
    candidates: Mapping[str, Prepared | Callable[[dict[str, np.ndarray]], Any]],
    batch: int,
    length: int,
    threads: int,
    vocab_size: int,
    rounds: int = 10,
    warmup: int = 2,
    min_seconds: float = 0.05,
    dense: str | Mapping[str, str] | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Time candidates against each other on one batch shape without padding.

    A candidate's turn is one untimed call, which brings its weights back into the caches and its threads out of
    sleep, then timed calls until ``min_seconds`` are spent; the turn's value is their median. Calls that take longer
    than ``LONG_CALL`` are warmed up once and timed at once: waking up costs them less than a hundredth.

    Args:
        candidates: name -> prepared engine, or any function of a batch.
        threads: must be what the engines were prepared with.
        rounds: turns of every candidate; the n of the quartiles.
        warmup: untimed calls of every candidate before the first round.
        dense: the candidate that ratios are taken against, or one per name; the first candidate by default.
        clock: seconds; for tests.

    Returns:
        One row per candidate, in order: name, engine, precision, runs_on, batch, length, threads, median_ms, q1_ms,
        q3_ms, n, throughput_per_s (examples), dense, ratio_to_dense (above 1 is faster than dense), ratio_q1, ratio_q3.

    Raises:
        StudyError: impossible value, unknown dense candidate, an engine prepared for other threads.
    """
    for field, value in (("batch", batch), ("length", length), ("threads", threads), ("rounds", rounds)):
        if value < 1:
            raise StudyError(f"latency: {field}: found {value}, expected 1 or more")
    names = list(candidates)
    against = {name: dense.get(name, name) if isinstance(dense, Mapping) else dense or names[0] for name in names}
    unknown = [name for name in against.values() if name not in candidates]
    if unknown:
        raise StudyError(f"latency: dense candidate '{unknown[0]}' is not among the candidates {', '.join(names)}")
    for name, candidate in candidates.items():
        if isinstance(candidate, Prepared) and candidate.threads != threads:
            raise StudyError(f"latency: '{name}' was prepared for {candidate.threads} threads, not for {threads}")
    inputs = random_batch(batch, length, vocab_size, seed)
    calls = {name: c.run if isinstance(c, Prepared) else c for name, c in candidates.items()}
    turns: dict[str, list[float]] = {name: [] for name in names}
    order, shuffler = list(names), random.Random(seed)
    long: set[str] = set()
    with _undisturbed(threads):
        for name in names:
            for _ in range(warmup):
                start = clock()
                calls[name](inputs)
                if clock() - start > LONG_CALL:
                    long.add(name)
                    break
        for _ in range(rounds):
            shuffler.shuffle(order)
            for name in order:
                turns[name].append(_turn(calls[name], inputs, min_seconds, clock, wake=name not in long))
    conditions = {"batch": batch, "length": length, "threads": threads}
    return [_row(name, candidates[name], turns, against[name], conditions) for name in names]


def _turn(call: Callable[[Any], Any], inputs: Any, min_seconds: float, clock: Callable[[], float], wake: bool) -> float:
    """Median milliseconds of one candidate's timed calls in one round, an untimed one before them to ``wake`` it."""
    if wake:
        call(inputs)
    times: list[float] = []
    while not times or sum(times) < min_seconds:
        start = clock()
        call(inputs)
        times.append(clock() - start)
    return 1e3 * float(np.median(times))


def _row(
    name: str, candidate: Any, turns: Mapping[str, list[float]], dense: str, conditions: dict[str, int]
) -> dict[str, Any]:
    q1, median, q3 = np.percentile(turns[name], (25, 50, 75))
    ratio_q1, ratio, ratio_q3 = np.percentile(np.divide(turns[dense], turns[name]), (25, 50, 75))
    known = isinstance(candidate, Prepared)
    return {
        "name": name,
        "engine": candidate.engine if known else "",
        "precision": candidate.precision if known else "",
        "runs_on": candidate.runs_on if known else "",
        **conditions,
        "median_ms": float(median),
        "q1_ms": float(q1),
        "q3_ms": float(q3),
        "n": len(turns[name]),
        "throughput_per_s": 1e3 * conditions["batch"] / float(median),
        "dense": dense,
        "ratio_to_dense": float(ratio),
        "ratio_q1": float(ratio_q1),
        "ratio_q3": float(ratio_q3),
    }


@contextlib.contextmanager
def _undisturbed(threads: int) -> Iterator[None]:
    """No garbage collection between two clock readings; torch's thread count is put back afterwards."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def _encoder(name: str) -> Any:
    """A QA model for ``--encoder``: any encoder that the study can load, or a published shape.

    The weights of a shape are random, which latency does not notice.
    """
    shape = SPEED_ARCHITECTURES.get(name) or architecture_of(name)
    if shape is not None and shape != "minilm":
        return random_model(shape)
    disable_progress_bar()
    with quiet():
        return load_model(name, "qa").eval()


def _positions(config: Any) -> int:
    """Longest input of a model; RoBERTa spends two positions on padding, XLNet has no limit."""
    limit = getattr(config, "max_position_embeddings", 0)
    return (limit - 2 if config.model_type == "roberta" else limit) if limit > 0 else 1 << 20


def _versions(options: argparse.Namespace) -> dict[str, Any]:
    """The models to time against each other: the full one, and the one of ``--keep-layers``."""
    model = _encoder(options.encoder)
    limit, total = _positions(model.config), len(layers(model))
    if options.length > limit:
        raise StudyError(f"--length: found {options.length}, but '{options.encoder}' has {limit} positions")
    if options.keep_layers is None:
        return {"": model}
    if not 1 <= options.keep_layers < total:
        raise StudyError(f"--keep-layers: found {options.keep_layers}, expected 1 to {total - 1} for {options.encoder}")
    smaller = evaluation_copy(model, "sdpa", torch.float32, "cpu")
    drop_layers(smaller, range(options.keep_layers + 1, total + 1))
    return {f" {total} layers": model, f" {options.keep_layers} layers": smaller}


def _latency_command(options: argparse.Namespace) -> str:
    """Prepare, check and time; returns the printed table."""
    for field in ("batch", "length", "threads", "rounds"):
        if getattr(options, field) < 1:
            raise StudyError(f"--{field}: found {getattr(options, field)}, expected 1 or more")
    engines = options.engine or [name for name in ENGINES if "cuda" not in name] + available_engines("cuda")
    missing = {engine: reason for engine in engines if (reason := unavailable_reason(engine))}
    if len(missing) == len(set(engines)):
        raise StudyError("; ".join(f"{engine} is {reason}" for engine, reason in missing.items()))
    versions = _versions(options)
    full = next(iter(versions.values()))
    vocab, short = full.config.vocab_size, min(24, _positions(full.config))
    checks = [random_batch(2, short, vocab, 1, padding=short // 2), random_batch(3, short - 7, vocab, 2, padding=4)]
    candidates, dense, errors = {}, {}, {}
    with tempfile.TemporaryDirectory(prefix="latency-") as folder:
        for engine in dict.fromkeys(engines):
            if engine in missing:
                continue
            for suffix, model in versions.items():
                name = f"{engine}{suffix}"
                candidates[name] = prepare(
                    engine, model, checks[0], options.threads, checks, Path(folder) / suffix.strip()
                )
                errors[name] = check_agreement(candidates[name], model, checks)["relative_diff"]
                dense[name] = f"{engine}{next(iter(versions))}" if len(versions) > 1 else next(iter(candidates))
        rows = latency(
            candidates, options.batch, options.length, options.threads, vocab,
            rounds=options.rounds, dense=dense, seed=options.seed,
        )  # fmt: skip
    cells = [[
        row["name"], f"{row['median_ms']:.1f}", f"{row['q1_ms']:.1f}–{row['q3_ms']:.1f}",
        f"{row['throughput_per_s']:.1f}", f"{row['ratio_to_dense']:.2f} ({row['ratio_q1']:.2f}–{row['ratio_q3']:.2f})",
        f"{candidates[row['name']].size_bytes / 1e6:.1f}", f"{errors[row['name']]:.0e}",
    ] for row in rows]  # fmt: skip
    headers = ("engine", "median ms", "quartiles", "examples/s", "× dense (quartiles)", "MB", "error")
    table = tabulate(cells, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 6))
    machine, work = hardware(), flops(full, options.batch, options.length)
    return "\n".join([
        f"{options.encoder}, batch {options.batch}, {options.length} tokens, {options.threads} threads, "
        f"{options.rounds} rounds, {work / 1e9:.3g} GFLOP per call",
        f"{machine['cpu']}, {machine['threads']} CPUs, {' '.join(machine['isa']) or 'instruction sets unknown'}",
        f"dense: {'the full model on the same engine' if len(versions) > 1 else rows[0]['name']}; "
        "error: of the logits, relative to PyTorch fp32",
        "", table, *(f"{engine}  {reason}" for engine, reason in missing.items()),
    ])  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m lib.benchmark", description="Measure speed on this machine.")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=Parser)
    command = commands.add_parser("latency", help="time one encoder on every engine")
    add = command.add_argument
    add("--encoder", default="minilm", help="minilm, tiny, base, large, a folder or a hub name (default minilm)")
    add("--engine", action="append", choices=ENGINES, metavar="NAME", help=f"repeatable: {', '.join(ENGINES)}")
    add("--keep-layers", type=int, metavar="N", help="also time the model cut to its first N layers")
    add("--batch", type=int, default=1, help="examples per call (default 1)")
    add("--length", type=int, default=128, help="tokens per example (default 128)")
    add("--threads", type=int, default=usable_cpus(), help="CPU threads (default: all usable)")
    add("--rounds", type=int, default=10, help="turns per engine (default 10)")
    add("--seed", type=int, default=0, help="of the tokens and of the order within a round")
    command.set_defaults(run=_latency_command)
    command = commands.add_parser("training", help="compare this study's training loop with a stock Trainer")
    add = command.add_argument
    add("--profile", default="quick", help="its encoder, first QA task and settings are used (default quick)")
    add("--data-dir", help="folder of local data sets (default: STUDY_DATA)")
    add("--examples", type=int, default=256, help="features per epoch and variant (default 256)")
    add("--batch", type=int, default=32, help="examples per step (default 32)")
    add("--rounds", type=int, default=3, help="counted epochs per variant (default 3)")
    add("--threads", type=int, default=usable_cpus(), help="CPU threads (default: all usable)")
    command.set_defaults(run=training_report)
    command = commands.add_parser("overhead", help="training steps with block movement pruning against dense ones")
    add = command.add_argument
    add("--profile", default="quick", help="its encoder's shape and blocks are used (default quick)")
    for name, meaning in {"batch": "examples per step", "length": "tokens per example", "rounds": "steps"}.items():
        add(f"--{name}", type=int, help=f"{meaning} (default: the profile's)")
    add("--threads", type=int, default=usable_cpus(), help="CPU threads (default: all usable)")
    command.set_defaults(run=overhead_report)
    command = commands.add_parser("fisher", help="compare oBERT's block Fisher with a loop over its blocks")
    add = command.add_argument
    add("--weights", type=int, default=1_000_000, help="weights of the slice that both are measured on (default 1e6)")
    add("--width", type=int, default=50, help="width of a block (default 50)")
    add("--gradients", type=int, default=1024, help="gradients that the projection is for (default 1024)")
    add("--rounds", type=int, default=5, help="counted turns of each (default 5)")
    add("--threads", type=int, default=usable_cpus(), help="CPU threads (default: all usable)")
    add("--full", default="", metavar="NAME", help="also measure all encoder weights of an architecture, e.g. minilm")
    command.set_defaults(run=fisher_report)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""

    def run() -> None:
        options = _parser().parse_args(arguments)
        print(options.run(options))

    return exit_code(run, "stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
