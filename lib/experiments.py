"""How each kind of spec is carried out. ``runs.ensure`` decides whether; nothing else calls this module.

Every function takes a spec and the profile (which says only where data and results lie) and returns the record's
``result``.
"""

import shutil
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from lib import benchmark, distributed, engine_quality, engines, importance, training_speed
from lib.agreement import check_agreement, random_batch
from lib.batches import TrainingData
from lib.block_sparse import zero_blocks
from lib.compressors import Compressor, make_compressor
from lib.compressors.layer_dropping import layer_contributions
from lib.config import StudyError
from lib.data import Task, get_task, load_task
from lib.distillation import Distiller, expose_attention_scores
from lib.evaluation import evaluate_model
from lib.fisher_speed import fisher_cost
from lib.gates import head_size
from lib.kronecker_models import factorise
from lib.metrics import score
from lib.models import ARCHITECTURES, count_parameters, layers, load_model, load_tokenizer, random_model
from lib.progress import say
from lib.runs import hold_lock, obtain
from lib.settings import Profile
from lib.sparse_layers import zero_at_random
from lib.specs import (
    ContributionSpec,
    EngineQualitySpec,
    FactorisationSpec,
    FisherCostSpec,
    ImportanceSpec,
    LatencyModel,
    LatencySpec,
    MajoritySpec,
    Spec,
    StockComparisonSpec,
    TextDistillationSpec,
    TrainingSpeedSpec,
    TrainSpec,
    TranslationLatencySpec,
    TranslationSpec,
    UpstreamSpec,
    label,
    spec_hash,
)
from lib.surgery import cut, drop_layers, layer_shapes, load_compressed, save_compressed
from lib.text_distillation import factorisation_errors, run_text_distillation, under_head
from lib.training import TrainingSettings, device, encode, fine_tune, use_bf16
from lib.translation_runs import run_translation
from lib.translation_speed import run_translation_latency
from lib.upstream import run_upstream, upstream_folder


def execute(spec: Spec, profile: Profile) -> dict[str, Any]:
    """Carry out a spec of any kind."""
    if isinstance(spec, TrainSpec):
        return run_training(spec, profile)
    if isinstance(spec, ImportanceSpec):
        return run_importance(spec, profile)
    if isinstance(spec, EngineQualitySpec):
        return run_engine_quality(spec, profile)
    if isinstance(spec, ContributionSpec):
        return run_contribution(spec, profile)
    if isinstance(spec, MajoritySpec):
        return run_majority(spec, profile)
    if isinstance(spec, LatencySpec):
        return run_latency(spec)
    if isinstance(spec, TrainingSpeedSpec):
        return run_training_speed(spec)
    if isinstance(spec, TranslationSpec):
        return run_translation(spec, profile)
    if isinstance(spec, TranslationLatencySpec):
        return run_translation_latency(spec)
    if isinstance(spec, TextDistillationSpec):
        return run_text_distillation(spec, profile)
    if isinstance(spec, UpstreamSpec):
        return run_upstream(spec, profile)
    if isinstance(spec, FisherCostSpec):
        return fisher_cost(spec.weights, spec.width, spec.gradients, spec.threads, spec.rounds, spec.full)
    if isinstance(spec, FactorisationSpec):
        return factorisation_errors(spec)
    assert isinstance(spec, StockComparisonSpec)
    return run_stock_comparison(spec, profile)


def weights_folder(profile: Profile, spec: TrainSpec | TextDistillationSpec | UpstreamSpec) -> Path:
    """Where the weights of a finished run are kept (teachers and models that other runs begin with)."""
    return profile.results / "models" / spec_hash(spec)


def finished_model(
    profile: Profile, spec: TrainSpec | TextDistillationSpec
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that a run ended with; trained again when only its record travelled, not its weights.

    Two processes that miss the same weights train them once.
    """
    folder = weights_folder(profile, spec)
    if not distributed.agree(folder.is_dir()):
        with hold_lock(profile, spec):
            if not distributed.agree(folder.is_dir()):
                if isinstance(spec, TextDistillationSpec):
                    run_text_distillation(spec, profile)
                else:
                    run_training(spec, profile, keep_weights=True)
        distributed.agree(True)  # the first process has written them
    return load_compressed(folder)


def run_training(spec: TrainSpec, profile: Profile, keep_weights: bool = False) -> dict[str, Any]:
    """Load, compress, fine-tune, cut out, measure. Dense baselines and ``keep_weights`` leave their weights behind."""
    task = _language_understanding(spec.task)
    settings = spec.training
    data = _task_data(spec, profile)
    checkpoints = profile.results / "checkpoints" / spec_hash(spec)
    model, tokenizer = _initial(spec, profile)
    informed = [obtain(profile, other).result for other in spec.informed_by]
    compressor = make_compressor(spec.compressor, informed) if spec.compressor else Compressor(None)
    compressor.attach(model)
    compressor.use_data(_training_data(spec, profile, tokenizer))
    result: dict[str, Any] = {"train_examples": len(data["train"]), "eval_examples": len(data["validation"])}
    if settings.epochs:
        distiller = _distiller(spec, profile, model)
        outcome = fine_tune(
            model, tokenizer, _features(spec, profile, "train"), settings, spec.seed,
            checkpoints, compressor, distiller, label(spec), profile.training.checkpoint_minutes,
        )  # fmt: skip
        result["training"] = outcome.model_dump(mode="json")
    model = compressor.finalize(model)
    features = _features(spec, profile, "validation")
    if compressor.evaluation_precision:
        settings = settings.model_copy(update={"precision": compressor.evaluation_precision})
    result |= evaluate_model(
        model, tokenizer, task, data["validation"], features, settings, f"{label(spec)}, evaluating"
    )
    result["model"] = describe(model)
    result["compression"] = compressor.summary()
    if keep_weights or _worth_keeping(spec, profile):
        _keep(model, tokenizer, weights_folder(profile, spec))
    shutil.rmtree(checkpoints, ignore_errors=True)
    return result


def _worth_keeping(spec: TrainSpec, profile: Profile) -> bool:
    """Whether others need the weights: dense models, what compounds start with, one seed of every retrained model."""
    if spec.compressor is None:
        return True
    if spec.compressor.name == "layer_dropping":
        return spec.teacher is not None and spec.task == profile.frontier.task
    if spec.compressor.name == "block_movement":  # the hybrid models that others fill
        settings, wanted = spec.compressor.settings, profile.block_movement.block
        hybrid = settings.get("variant", "hybrid") == "hybrid" and "density" not in settings
        return hybrid and spec.teacher is not None and tuple(settings.get("block", ())) == wanted
    pruned = spec.compressor.name in ("structured", "obert", "refill")
    return pruned and spec.training.epochs > 0 and spec.seed == profile.seeds[0]


def _language_understanding(name: str) -> Task:
    """The task called ``name``, for an encoder under a head; translation has other models."""
    task = get_task(name)
    if task.kind == "translation":
        raise StudyError(f"task '{name}' is translation; an encoder is fine-tuned on question answering or sentences")
    return task


def _task_data(spec: TrainSpec, profile: Profile) -> DatasetDict:
    settings = spec.training
    return _load(spec.task, spec.data, profile.data_dir, settings.train_examples, settings.eval_examples)


def _training_data(spec: TrainSpec, profile: Profile, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """The training examples for compressors that look at gradients."""
    return TrainingData(
        lambda: _features(spec, profile, "train"), DataCollatorWithPadding(tokenizer), tokenizer.model_input_names,
        spec.seed, device(), use_bf16(spec.training.precision),
    )  # fmt: skip


def _features(spec: TrainSpec, profile: Profile, split: str) -> Dataset:
    """A split's features; runs that follow each other often share them."""
    names = ("max_length", "stride", "train_examples", "eval_examples")
    settings = tuple((name, getattr(spec.training, name)) for name in names)
    return _encoded(spec.task, spec.data, profile.data_dir, spec.encoder, settings, split)


@lru_cache(maxsize=4)
def _load(task: str, source: str, data_dir: Path | None, train: int | None, evaluation: int | None) -> DatasetDict:
    return load_task(task, source, data_dir, train, evaluation)


@lru_cache(maxsize=4)
def _encoded(task: str, source: str, data_dir: Path | None, encoder: str, settings: tuple[tuple[str, Any], ...],
             split: str) -> Dataset:  # fmt: skip
    values = dict(settings)
    data = _load(task, source, data_dir, values["train_examples"], values["eval_examples"])[split]
    lengths = TrainingSettings(epochs=1, batch_size=1, learning_rate=1, **values)
    return encode(get_task(task), data, load_tokenizer(encoder), lengths, training=split == "train")


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """Size of a model: parameters in all and in the encoder's layers, and bytes as safetensors.

    ``shapes`` is the (heads, FFN units) of every layer, None where layers are not made of plain linear maps.
    """
    stack = layers(model)
    return {
        "layers": len(stack),
        "parameters": count_parameters(model),
        "layer_parameters": count_parameters(stack),
        "size_bytes": benchmark.size_on_disk(model),
        "shapes": _heads_and_units(model),
    }


def _heads_and_units(model: PreTrainedModel) -> list[list[int]] | None:
    try:
        size = head_size(model)
        return [[shape["attention"] // size, shape["units"]] for shape in layer_shapes(model)]
    except StudyError:
        return None


def _initial(spec: TrainSpec, profile: Profile) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    settings, task = spec.training, get_task(spec.task)
    if spec.start is None or isinstance(spec.start, TextDistillationSpec | UpstreamSpec):
        kind: Any = task.kind
        encoder = upstream_folder(profile, spec.start) if isinstance(spec.start, UpstreamSpec) else spec.encoder
        rates = (settings.dropout, settings.attention_dropout)
        model = load_model(encoder, kind, task.num_labels, spec.seed, settings.attention, *rates)
        if isinstance(spec.start, TextDistillationSpec):
            under_head(finished_model(profile, spec.start)[0], model)
        return model, load_tokenizer(spec.encoder)
    model, tokenizer = finished_model(profile, spec.start)
    if model.config.model_type != "xlnet":
        model.set_attn_implementation(settings.attention)
    return model, tokenizer


def _distiller(spec: TrainSpec, profile: Profile, student: PreTrainedModel) -> Distiller | None:
    if spec.distillation is None or spec.teacher is None:
        return None
    teacher, _ = finished_model(profile, spec.teacher)
    if spec.distillation.attention_scores:
        expose_attention_scores(student)
        expose_attention_scores(teacher)
    return Distiller(spec.distillation, teacher)


def _keep(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save under a temporary name and rename, so that a folder that exists is whole."""
    if not distributed.is_main():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".saving-"))
    try:
        save_compressed(model, tokenizer, temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def run_importance(spec: ImportanceSpec, profile: Profile) -> dict[str, Any]:
    """Scores of the gates of a finished model, ``{"heads": per layer, ...}``; higher is more important."""
    task, start = _language_understanding(spec.task), spec.start
    model, tokenizer = finished_model(profile, start)
    model.set_attn_implementation(start.training.attention)
    settings = start.training
    split = "train" if spec.method == "gain" else "validation"
    data = _task_data(start, profile)[split]
    data = data.shuffle(seed=0).select(range(min(spec.examples, len(data))))
    features = encode(task, data, tokenizer, settings, training=spec.method == "gain")
    if spec.method == "gain":
        return importance.gain(model, tokenizer, features, settings.precision, label(spec))
    return importance.leave_one_out(model, tokenizer, task, data, features, settings, label(spec))


def run_engine_quality(spec: EngineQualitySpec, profile: Profile) -> dict[str, Any]:
    """Metrics of a finished model as an engine runs it, on the validation split."""
    start = spec.start
    model, tokenizer = finished_model(profile, start)
    return engine_quality.quality_on_engine(
        spec.engine, model, tokenizer, _language_understanding(spec.task), _task_data(start, profile)["validation"],
        _features(start, profile, "validation"), _features(start, profile, "train"), start.training, spec.threads,
        spec.calibration, label(spec),
    )  # fmt: skip


def run_contribution(spec: ContributionSpec, profile: Profile) -> dict[str, Any]:
    """Similarity of every layer's input and output, (n_layers,), on the first examples of the validation split."""
    task = _language_understanding(spec.task)
    data = load_task(spec.task, spec.data, profile.data_dir, eval_examples=spec.examples)
    if spec.start:
        model, tokenizer = finished_model(profile, spec.start)
    else:
        kind: Any = task.kind
        model = load_model(spec.encoder, kind, task.num_labels)
        tokenizer = load_tokenizer(spec.encoder)
    columns = ("question", "context") if task.kind == "qa" else task.columns
    rows = [data["validation"][column] for column in columns]
    texts = list(zip(*rows, strict=True))
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in tokenizer.model_input_names]

    def batches() -> Any:
        for start in range(0, len(texts), 32):
            columns_of_batch = [list(column) for column in zip(*texts[start : start + 32], strict=True)]
            encoded = tokenizer(
                *columns_of_batch, truncation=True, max_length=spec.max_length, padding=True, return_tensors="pt"
            )
            yield {name: encoded[name] for name in names}

    return {"similarity": layer_contributions(model, batches()), "examples": len(texts)}


def run_majority(spec: MajoritySpec, profile: Profile) -> dict[str, Any]:
    """Scores (percent) on the validation split of always answering the most frequent training label.

    Raises:
        StudyError: the task is not a classification.
    """
    if get_task(spec.task).kind != "classification":
        raise StudyError(f"majority: task '{spec.task}' has no labels to count; give a classification task")
    data = load_task(spec.task, spec.data, profile.data_dir)
    counts = Counter(data["train"]["label"])
    answer = min(counts, key=lambda value: (-counts[value], value))
    references = data["validation"]["label"]
    return {"label": answer, **score(spec.task, [answer] * len(references), references)}


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
    candidates: dict[str, Any] = {}
    sizes, agreement, file_bytes, unavailable = {}, {}, {}, {}
    vocabulary = min(ARCHITECTURES[model.architecture].vocab_size for model in spec.models.values())
    longest = min(ARCHITECTURES[model.architecture].max_position_embeddings for model in spec.models.values())
    short = min(24, longest)
    checks = [
        random_batch(2, short, vocabulary, 1, padding=short // 2),
        random_batch(3, short - 7, vocabulary, 2, padding=4),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, wanted in spec.models.items():
            model = build(wanted)
            sizes[name] = describe(model) | {
                "flops": benchmark.flops(model, spec.batch, spec.length),
                "traffic_bytes": benchmark.memory_traffic(model, spec.batch, spec.length),
            }
            for engine in spec.engines:
                if reason := engines.unavailable_reason(engine):
                    unavailable[engine] = reason
                    continue
                where = Path(folder) / name
                prepared = engines.prepare(engine, model, checks[0], spec.threads, checks, where)
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
    task = _language_understanding(spec.task)
    data = load_task(spec.task, spec.data, profile.data_dir, train_examples=spec.examples, eval_examples=8)
    settings = TrainingSettings(
        epochs=1, batch_size=spec.batch, learning_rate=1e-4, max_length=spec.max_length, stride=spec.max_length // 4
    )
    features = encode(task, data["train"], load_tokenizer(spec.encoder), settings, training=True)
    return training_speed.training_comparison(
        spec.encoder, task.kind, features, spec.batch, spec.rounds, spec.threads, progress=say
    )
