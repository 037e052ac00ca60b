"""How each kind of spec is carried out. ``runs.ensure`` decides whether; nothing else calls this module.

Every function takes a spec and the profile (which says only where data and results lie) and returns the record's
``result``.
"""

from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from lib import engine_quality, importance, model_cost
from lib.batches import TrainingData
from lib.compressors import Compressor, make_compressor
from lib.compressors.layer_dropping import layer_contributions
from lib.config import StudyError
from lib.data import encoder_task, get_task, load_task
from lib.distillation import Distiller, expose_attention_scores
from lib.evaluation import evaluate_model
from lib.fisher_speed import fisher_cost
from lib.labels import label
from lib.metrics import score
from lib.models import load_model, load_tokenizer
from lib.quantized_layers import is_quantized
from lib.records import checkpoints_folder
from lib.runs import ensure_weights, leave_behind, obtain
from lib.settings import Profile
from lib.specs import (
    ContributionSpec,
    EngineQualitySpec,
    FactorisationSpec,
    FisherCostSpec,
    ImportanceSpec,
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
)
from lib.speed_runs import run_latency, run_stock_comparison, run_training_speed
from lib.surgery import load_compressed, save_compressed
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


def finished_model(
    profile: Profile, spec: TrainSpec | TextDistillationSpec
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that a run ended with; trained again when its weights have not travelled with its record.

    Raises:
        StudyError: what was trained again is another model than the recorded one.
    """

    def run() -> dict[str, Any]:
        if isinstance(spec, TextDistillationSpec):
            return run_text_distillation(spec, profile)
        return run_training(spec, profile, keep_weights=True)

    return load_compressed(ensure_weights(profile, spec, run))


def run_training(spec: TrainSpec, profile: Profile, keep_weights: bool = False) -> dict[str, Any]:
    """Load, compress, fine-tune, cut out, measure. Dense baselines and ``keep_weights`` leave their weights behind."""
    task = encoder_task(spec.task)
    settings = spec.training
    data = _task_data(spec, profile)
    model, tokenizer = _initial(spec, profile)
    informed = [obtain(profile, other).result for other in spec.informed_by]
    compressor = make_compressor(spec.compressor, informed) if spec.compressor else Compressor(None)
    compressor.attach(model)
    compressor.use_data(_training_data(spec, profile, tokenizer))
    result: dict[str, Any] = {"train_examples": len(data["train"]), "eval_examples": len(data["validation"])}
    if settings.epochs:
        distiller = _distiller(spec, profile, model, tokenizer)
        outcome = fine_tune(
            model, tokenizer, _features(spec, profile, "train"), settings, spec.seed,
            checkpoints_folder(profile, spec), compressor, distiller, label(spec), profile.training.checkpoint_minutes,
        )  # fmt: skip
        result["training"] = outcome.model_dump(mode="json")
    model = compressor.finalize(model)
    features = _features(spec, profile, "validation")
    if compressor.evaluation_precision:
        settings = settings.model_copy(update={"precision": compressor.evaluation_precision})
    result |= evaluate_model(
        model, tokenizer, task, data["validation"], features, settings, f"{label(spec)}, evaluating"
    )
    result["model"] = model_cost.describe(model)
    result["compression"] = compressor.summary()
    kept = keep_weights or _worth_keeping(spec, profile)
    leave_behind(profile, spec, partial(save_compressed, model, tokenizer) if kept else None)
    return result


def _worth_keeping(spec: TrainSpec, profile: Profile) -> bool:
    """Whether others need the weights: dense models, what compounds and engines begin with, one seed of every retrained
    model."""
    if spec.compressor is None:
        return True
    name, settings = spec.compressor.name, spec.compressor.settings
    if name == "layer_dropping":
        return spec.teacher is not None and spec.task == profile.frontier.task
    if name == "block_movement":  # the hybrid models that others fill
        wanted = profile.block_movement.block
        hybrid = settings.get("variant", "hybrid") == "hybrid" and "density" not in settings
        return hybrid and spec.teacher is not None and tuple(settings.get("block", ())) == wanted
    if name not in ("structured", "obert", "refill", "kronecker") or not spec.training.epochs:
        return False
    # INT8 compounds begin with runs of weights; models of the frontier's task go to every engine
    others = settings.get("group", 1) > 1 if name == "obert" else spec.task == profile.frontier.task
    return others or spec.seed == profile.seeds[0]


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
    return _with_attention(model, settings.attention), tokenizer


def _with_attention(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """The model with that attention kernel, where it has a choice; XLNet has none, nor has what rounds its softmax."""
    if model.config.model_type != "xlnet" and not is_quantized(model):
        model.set_attn_implementation(attention)
    return model


def _distiller(spec: TrainSpec, profile: Profile, student: PreTrainedModel,
               tokenizer: PreTrainedTokenizerBase) -> Distiller | None:  # fmt: skip
    """The teacher of a run, which reads the same token ids as the student.

    Raises:
        StudyError: teacher and student have different vocabularies.
    """
    if spec.distillation is None or spec.teacher is None:
        return None
    teacher, reads = finished_model(profile, spec.teacher)
    if reads.get_vocab() != tokenizer.get_vocab():
        raise StudyError(
            f"distillation: the teacher '{spec.teacher.encoder}' has another vocabulary than '{spec.encoder}', so the "
            "student's tokens mean something else to it; give a teacher of the same vocabulary (for notebook 04, "
            "block_movement.large_teacher in the profile, or null)"
        )
    if spec.distillation.attention_scores:
        expose_attention_scores(student)
        expose_attention_scores(teacher)
    return Distiller(spec.distillation, teacher)


def run_importance(spec: ImportanceSpec, profile: Profile) -> dict[str, Any]:
    """Scores of the gates of a finished model, ``{"heads": per layer, ...}``; higher is more important."""
    task, start = encoder_task(spec.task), spec.start
    model, tokenizer = finished_model(profile, start)
    _with_attention(model, start.training.attention)
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
        spec.engine, model, tokenizer, encoder_task(spec.task), _task_data(start, profile)["validation"],
        _features(start, profile, "validation"), _features(start, profile, "train"), start.training, spec.threads,
        spec.calibration, label(spec),
    )  # fmt: skip


def run_contribution(spec: ContributionSpec, profile: Profile) -> dict[str, Any]:
    """Similarity of every layer's input and output, (n_layers,), on the first examples of the validation split."""
    task = encoder_task(spec.task)
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

    Where questions may have no answer, the answer is none to all of them.

    Raises:
        StudyError: the task has no such answer.
    """
    task = get_task(spec.task)
    if task.kind != "classification" and not task.unanswerable:
        raise StudyError(
            f"majority: task '{spec.task}' has no labels to count and no question without an answer; "
            "give a classification task or one like SQuAD 2.0"
        )
    data = load_task(spec.task, spec.data, profile.data_dir)
    if task.unanswerable:
        questions = data["validation"]
        return {"label": "", **score(spec.task, dict.fromkeys(questions["id"], ""), questions)}
    counts = Counter(data["train"]["label"])
    answer = min(counts, key=lambda value: (-counts[value], value))
    references = data["validation"]["label"]
    return {"label": answer, **score(spec.task, [answer] * len(references), references)}
