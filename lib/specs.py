"""What can be asked for: specs. A spec names everything that can change a result, and its hash names the record.

No path and no machine is part of a spec, so a record made elsewhere is found here; a latency may name an
instruction set, which several machines have.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from lib.compressors import CompressorSpec
from lib.config import StudyError
from lib.distillation import Distillation
from lib.kronecker_models import KroneckerShapes
from lib.problems import first_problem
from lib.settings import Profile, Strict
from lib.training import TrainingSettings
from lib.translation import TranslationShape

DataSource = Literal["embedded", "local", "hub"]


class UpstreamSpec(Strict):
    """Masked language modelling on a task's unlabelled text, pruned on the way (Kurtic et al. 2022, section 4.2).

    Fields as ``TrainSpec``'s; ``masked`` is the share of tokens to predict. Without a compressor it is the dense
    language model that others start and distil from.
    """

    kind: Literal["upstream"] = "upstream"
    task: str
    data: DataSource
    encoder: str
    seed: int = Field(ge=0)
    training: TrainingSettings
    compressor: CompressorSpec | None = None
    masked: float = Field(gt=0, lt=1)
    start: "UpstreamSpec | None" = None
    distillation: Distillation | None = None
    teacher: "UpstreamSpec | None" = None


class TrainSpec(Strict):
    """Fine-tune an encoder on a task, compress it on the way, and measure its quality.

    ``start`` is the finished run whose weights to begin with (None: the pre-trained encoder; of
    an upstream run the encoder alone, under a fresh head), ``teacher`` the one to distil from, ``informed_by`` the runs
    whose results the compressor decides by. No compressor is the dense baseline; ``training.epochs`` 0 only compresses
    and measures.
    """

    kind: Literal["train"] = "train"
    task: str
    data: DataSource
    encoder: str
    seed: int = Field(ge=0)
    training: TrainingSettings
    compressor: CompressorSpec | None = None
    start: "TrainSpec | TextDistillationSpec | UpstreamSpec | None" = None
    distillation: Distillation | None = None
    teacher: "TrainSpec | None" = None
    informed_by: "tuple[TrainSpec | ImportanceSpec, ...]" = ()


class TextDistillationSpec(Strict):
    """Distil a compressed encoder from the pre-trained one on text without labels (Tahaei et al. 2021, first stage).

    The text is what the training splits of ``tasks`` ask a model to read, ``training.train_examples`` of each at most.
    A run that starts with this one puts the encoder under the head of its own task.
    """

    kind: Literal["text_distillation"] = "text_distillation"
    tasks: tuple[str, ...] = Field(min_length=1)
    data: DataSource
    encoder: str
    seed: int = Field(ge=0)
    training: TrainingSettings
    compressor: CompressorSpec
    distillation: Distillation


class FactorisationSpec(Strict):
    """How near Kronecker products come to a pre-trained encoder's weights, for several shapes; nothing is trained."""

    kind: Literal["factorisation"] = "factorisation"
    encoder: str
    shapes: dict[str, KroneckerShapes]


class ImportanceSpec(Strict):
    """How much a fine-tuned model needs each of its heads and FFN units (McCarley et al. 2019, section 3).

    ``gain`` is the mean over training examples of |dL/d gate|; ``leave_one_out`` (heads alone) the score lost on
    validation examples when one gate is closed.
    """

    kind: Literal["importance"] = "importance"
    task: str
    data: DataSource
    start: TrainSpec
    method: Literal["gain", "leave_one_out"]
    examples: int = Field(ge=1)


class ContributionSpec(Strict):
    """Cosine similarity of each layer's input and output on a task's validation split (Sajjad et al. 2020).

    ``examples`` are the split's first, None its whole. ``start`` None measures the pre-trained encoder, as the paper
    does.
    """

    kind: Literal["contribution"] = "contribution"
    task: str
    data: DataSource
    encoder: str
    max_length: int
    examples: int | None = Field(ge=1)
    start: TrainSpec | None = None


class MajoritySpec(Strict):
    """The score of one answer for all, the most frequent training label or none: the floor that a model must leave."""

    kind: Literal["majority"] = "majority"
    task: str
    data: DataSource


class LatencyModel(Strict):
    """A model to time: a named architecture with random weights or an encoder, with layers dropped.

    ``shapes`` gives the (heads, FFN units) that each remaining layer keeps; empty means all of them. ``kronecker`` puts
    random factors in the place of the encoder's weights. ``sparsity`` is the share of the layers' linear weights that a
    random mask sets to zero, singly or in runs of ``group`` along a row. ``attention_densities`` is the share of blocks
    of ``attention_block`` (rows, columns) that are not zero in each layer's attention; empty means all.
    """

    architecture: str
    drop: tuple[int, ...] = ()
    shapes: tuple[tuple[int, int], ...] = ()
    head: Literal["qa", "classification"] = "qa"
    kronecker: KroneckerShapes | None = None
    sparsity: float = Field(default=0.0, ge=0, lt=1)
    group: Literal[1, 4] = 1
    attention_block: tuple[int, int] = (32, 32)
    attention_densities: tuple[float, ...] = ()


class EngineQualitySpec(Strict):
    """Quality of a finished run's model as an engine runs it: what the engine's precision costs.

    ``calibration`` training examples are shown to engines that range activations beforehand.
    """

    kind: Literal["engine_quality"] = "engine_quality"
    task: str
    data: DataSource
    start: TrainSpec
    engine: str
    threads: int = Field(ge=1)
    calibration: int = Field(default=64, ge=1)


class LatencySpec(Strict):
    """Latency of models on engines, all interleaved in one run. ``dense`` names the model that ratios refer to.

    Ratios compare with the dense model on the same engine, or on ``reference`` where one is given. ``instructions``
    names the one kind of processor that the run is made on (``environment.kind_of_processor``), so that each kind has a
    record of its own; without it, whichever machine comes first makes it.
    """

    kind: Literal["latency"] = "latency"
    models: dict[str, LatencyModel]
    dense: str
    engines: tuple[str, ...]
    batch: int = Field(ge=1)
    length: int = Field(ge=1)
    threads: int = Field(ge=1)
    rounds: int = Field(ge=1)
    reference: str | None = None
    instructions: str = ""


class FisherCostSpec(Strict):
    """Cost of oBERT's block Fisher of ``width`` on ``weights`` weights, and on all of the encoder ``full``.

    ``gradients`` is what the projection to BERT-base is for.
    """

    kind: Literal["fisher_cost"] = "fisher_cost"
    weights: int = Field(ge=1)
    width: int = Field(ge=1)
    gradients: int = Field(ge=1)
    threads: int = Field(ge=1)
    rounds: int = Field(ge=1)
    full: str = ""


class TrainingSpeedSpec(Strict):
    """Fine-tuning speed and peak memory of models with random weights, interleaved step by step.

    ``frozen_embeddings`` False trains everything, as the paper does. ``compressors`` names the models that train with
    one.
    """

    kind: Literal["training_speed"] = "training_speed"
    models: dict[str, LatencyModel]
    compressors: dict[str, CompressorSpec] = Field(default_factory=dict)
    dense: str
    batch: int = Field(ge=1)
    length: int = Field(ge=1)
    threads: int = Field(ge=1)
    rounds: int = Field(ge=1)
    bf16: bool
    frozen_embeddings: bool = False


class StockComparisonSpec(Strict):
    """Our training loop against a stock ``transformers.Trainer``, and each setting's share of the difference."""

    kind: Literal["stock_comparison"] = "stock_comparison"
    encoder: str
    task: str
    data: DataSource
    examples: int = Field(ge=8)
    batch: int = Field(ge=1)
    max_length: int
    rounds: int = Field(ge=1)
    threads: int = Field(ge=1)


class TranslationSpec(Strict):
    """Train an encoder-decoder on a translation task, compress it on the way, and measure BLEU on its test split.

    ``start`` is the finished run whose weights and vocabulary to begin with (None: random weights and a vocabulary
    trained on the training split). ``beams`` and ``length_penalty`` are of the search that "score" is measured with;
    greedy search is measured beside it.
    """

    kind: Literal["translation"] = "translation"
    task: str
    data: DataSource
    seed: int = Field(ge=0)
    shape: TranslationShape
    training: TrainingSettings
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    beams: int = Field(default=5, ge=1)
    length_penalty: float = Field(default=1.0, ge=0)
    compressor: CompressorSpec | None = None
    start: "TranslationSpec | None" = None


class TranslationLatencySpec(Strict):
    """Latency of one teacher-forced pass of a translation model with random weights, source and target ``length``
    tokens each, on engines in their own precision, all interleaved in one run. Ratios compare with the first engine.
    """

    kind: Literal["translation_latency"] = "translation_latency"
    shape: TranslationShape
    engines: tuple[str, ...] = Field(min_length=1)
    batch: int = Field(ge=1)
    length: int = Field(ge=1)
    threads: int = Field(ge=1)
    rounds: int = Field(ge=1)


Spec = (
    TrainSpec
    | UpstreamSpec
    | FisherCostSpec
    | ImportanceSpec
    | EngineQualitySpec
    | ContributionSpec
    | MajoritySpec
    | LatencySpec
    | TrainingSpeedSpec
    | StockComparisonSpec
    | TranslationSpec
    | TranslationLatencySpec
    | TextDistillationSpec
    | FactorisationSpec
)
_ADAPTER: TypeAdapter[Spec] = TypeAdapter(Annotated[Spec, Field(discriminator="kind")])


def parse_spec(values: Any) -> Spec:
    """Validate a spec read from JSON.

    Raises:
        pydantic.ValidationError: unknown kind or key, wrong type.
    """
    return _ADAPTER.validate_python(values)


def spec_hash(spec: Spec) -> str:
    """12 hex digits of the spec's canonical JSON.

    Fields at their default are left out, so that a field added later leaves every older record's name as it is. A
    default must therefore never change its meaning.
    """
    values = spec.model_dump(mode="json", exclude_defaults=True) | {"kind": spec.kind}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def needed_weights(spec: Spec) -> list[Spec]:
    """The runs that a run starts from or learns from: it needs the models that they end with."""
    others = [getattr(spec, "start", None), getattr(spec, "teacher", None)]
    return [other for other in others if other is not None]


def needed_runs(spec: Spec) -> list[Spec]:
    """The runs that a run starts from, learns from or is informed by."""
    return [*needed_weights(spec), *getattr(spec, "informed_by", ())]


def training_settings(profile: Profile, task: str, **changes: Any) -> TrainingSettings:
    """The profile's way to fine-tune ``task``, with ``changes``.

    Raises:
        StudyError: the profile has no such task, or a change is impossible.
    """
    if task not in profile.tasks:
        raise StudyError(f"profile {profile.name} has no task '{task}'; it has {', '.join(profile.tasks)}")
    defaults = profile.training.model_dump(exclude={"checkpoint_minutes"})
    values = defaults | profile.tasks[task].model_dump(exclude={"seeds"}, exclude_none=True)
    try:
        return TrainingSettings.model_validate(values | changes)
    except ValidationError as error:
        raise StudyError(f"training.{first_problem(error)}") from None


def dense_spec(profile: Profile, task: str, seed: int) -> TrainSpec:
    """The dense baseline of a task: the teacher, and the 100 % of every retained share."""
    return TrainSpec(
        task=task, data=data_source(profile, task), encoder=profile.encoder, seed=seed,
        training=training_settings(profile, task),
    )  # fmt: skip


def data_source(profile: Profile, task: str) -> DataSource:
    """Where a task's data come from: the embedded corpus for ``world_*`` tasks, files for a user's own, else what the
    profile says."""
    if task in profile.own_tasks:
        return "local"
    if task.startswith("world_"):
        return "embedded"
    if profile.data == "embedded":
        raise StudyError(f"task '{task}' is not in the embedded corpus; set data to local or hub")
    return profile.data
