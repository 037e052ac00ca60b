"""How speed is measured: latency of models on engines, training steps, and our training loop against a stock Trainer.

Every function takes a spec and returns the record's ``result``, as those of ``lib.experiments`` do.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lib import benchmark, engines, environment, model_cost, training_speed
from lib.agreement import check_agreement, random_batch
from lib.block_sparse import zero_blocks
from lib.config import StudyError
from lib.data import encoder_task, load_task
from lib.kronecker_models import factorise
from lib.models import ARCHITECTURES, load_tokenizer, random_model
from lib.progress import say
from lib.settings import Profile
from lib.sparse_layers import zero_at_random
from lib.specs import LatencyModel, LatencySpec, StockComparisonSpec, TrainingSpeedSpec
from lib.surgery import cut, drop_layers
from lib.training import TrainingSettings, encode


class ExportFolders:
    """Folders for the exports of models that are timed, kept from one run to the next of the same process.

    A plan times the same models on one engine after another, and exporting a model takes far longer than timing it.
    Whether an export found there is of the same weights is for ``engines.prepare`` to check.

    Args:
        limit: bytes that stay after a run, at most; a quarter of the free disk where that is less.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self._used: dict[Path, None] = {}  # the least recently used first

    def folder(self, model: LatencyModel) -> Path:
        """The folder of one model, made where it is missing. It goes with the process."""
        if self._home is None:
            self._home = tempfile.TemporaryDirectory(prefix="exports-", ignore_cleanup_errors=True)
        folder = Path(self._home.name) / hashlib.sha256(model.model_dump_json().encode()).hexdigest()[:12]
        folder.mkdir(exist_ok=True)
        self._used.pop(folder, None)
        self._used[folder] = None
        return folder

    def shrink(self) -> None:
        """Remove the folders that were not used for longest until the rest is within the limit."""
        if self._home is None:
            return
        sizes = {folder: sum(file.stat().st_size for file in folder.rglob("*")) for folder in self._used}
        allowed = min(self.limit, shutil.disk_usage(self._home.name).free // 4)
        for folder in list(self._used):
            if sum(sizes.values()) <= allowed:
                return
            shutil.rmtree(folder, ignore_errors=True)
            del self._used[folder], sizes[folder]


EXPORTS = ExportFolders(limit=8_000_000_000)


def build(model: LatencyModel) -> PreTrainedModel:
    """A model to time, with random weights: latency does not depend on their values."""
    built = random_model(model.architecture, model.head)
    drop_layers(built, model.drop)
    if model.shapes:
        cut(built, [range(heads) for heads, _ in model.shapes], [range(units) for _, units in model.shapes])
    if model.kronecker:
        factorise(built, model.kronecker, "random")
    if model.sparsity:
        zero_at_random(built, model.sparsity, model.group)
    if model.attention_densities:
        zero_blocks(built, model.attention_block, model.attention_densities)
    return built


def run_latency(spec: LatencySpec) -> dict[str, Any]:
    """Every model on every engine at one batch and length, interleaved; engines that are not there are listed."""
    unknown = [model.architecture for model in spec.models.values() if model.architecture not in ARCHITECTURES]
    if unknown or spec.dense not in spec.models:
        raise StudyError(
            f"latency: '{unknown[0]}' is no architecture; known: {', '.join(ARCHITECTURES)}" if unknown
            else f"latency: dense model '{spec.dense}' is not among {', '.join(spec.models)}"
        )  # fmt: skip
    if not environment.offers(spec.instructions):
        kind = spec.instructions.replace("_without_", " and without ")
        raise StudyError(
            f"latency: this run is for a processor with {kind}, which this one is not; make it on one, or take the "
            "name out of latency.also_with"
        )
    candidates: dict[str, Any] = {}
    sizes, agreement, file_bytes, unavailable = {}, {}, {}, {}
    vocabulary = min(ARCHITECTURES[model.architecture].vocab_size for model in spec.models.values())
    longest = min(ARCHITECTURES[model.architecture].max_position_embeddings for model in spec.models.values())
    short = min(24, longest)
    checks = [
        random_batch(2, short, vocabulary, 1, padding=short // 2),
        random_batch(3, short - 7, vocabulary, 2, padding=4),
    ]
    for name, wanted in spec.models.items():
        model = build(wanted)
        sizes[name] = model_cost.describe(model) | {
            "flops": model_cost.flops(model, spec.batch, spec.length),
            "traffic_bytes": model_cost.memory_traffic(model, spec.batch, spec.length),
        }
        for engine in spec.engines:
            if reason := engines.unavailable_reason(engine):
                unavailable[engine] = reason
                continue
            prepared = engines.prepare(engine, model, checks[0], spec.threads, checks, EXPORTS.folder(wanted))
            agreement[f"{name}/{engine}"] = check_agreement(prepared, model, checks)
            file_bytes[f"{name}/{engine}"] = prepared.size_bytes
            candidates[f"{name}/{engine}"] = prepared
        del model
    if not candidates:
        raise StudyError("latency: no engine is available; " + "; ".join(unavailable.values()))
    dense = {name: f"{spec.dense}/{spec.reference or name.partition('/')[2]}" for name in candidates}
    rows = benchmark.latency(
        candidates, spec.batch, spec.length, spec.threads, vocabulary, rounds=spec.rounds, dense=dense
    )
    candidates.clear()  # no engine has a file open any more
    EXPORTS.shrink()
    for row in rows:
        row["model"] = row["name"].partition("/")[0]
        row["size_bytes"] = file_bytes[row["name"]]
    return {"rows": rows, "models": sizes, "agreement": agreement, "unavailable": unavailable}


def run_training_speed(spec: TrainingSpeedSpec) -> dict[str, Any]:
    """Speed of full training steps, interleaved, and peak memory of each model in a process of its own."""
    fields = {"architecture", "drop", "head"}
    asked = {name: set(model.model_dump(exclude_defaults=True)) for name, model in spec.models.items()}
    if other := [name for name, names in asked.items() if names - fields]:
        raise StudyError(f"training speed: '{other[0]}' is more than a model with layers dropped; leave it out")
    models = {name: model.model_dump(mode="json", include=fields) for name, model in spec.models.items()}
    if strangers := sorted(set(spec.compressors) - set(models)):
        raise StudyError(f"training speed: compressor for '{strangers[0]}', which is not among {', '.join(models)}")
    for name, compressor in spec.compressors.items():
        models[name]["compressor"] = compressor.model_dump(mode="json")
    return training_speed.training_steps(
        models, spec.dense, spec.batch, spec.length, spec.threads, spec.rounds, spec.bf16, spec.frozen_embeddings
    )


def run_stock_comparison(spec: StockComparisonSpec, profile: Profile) -> dict[str, Any]:
    """Our loop against a stock Trainer on the same features, setting by setting."""
    task = encoder_task(spec.task)
    data = load_task(spec.task, spec.data, profile.data_dir, train_examples=spec.examples, eval_examples=8)
    settings = TrainingSettings(
        epochs=1, batch_size=spec.batch, learning_rate=1e-4, max_length=spec.max_length, stride=spec.max_length // 4
    )
    features = encode(task, data["train"], load_tokenizer(spec.encoder), settings, training=True)
    return training_speed.training_comparison(
        spec.encoder, task.kind, features, spec.batch, spec.rounds, spec.threads, progress=say
    )
