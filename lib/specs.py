"""What can be asked for: specs. A spec names everything that can change a result, and its hash names the record.

No path and no machine is part of a spec, so a record made elsewhere is found here.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from lib.compressors import CompressorSpec
from lib.config import Profile, Strict, StudyError
from lib.distillation import Distillation
from lib.training import TrainingSettings

DataSource = Literal["embedded", "local", "hub"]


class TrainSpec(Strict):
    """Fine-tune an encoder on a task, compress it on the way, and measure its quality.

    ``start`` is the finished run whose weights to begin with (None: the pre-trained encoder), ``teacher`` the one to
    distil from, ``informed_by`` the runs whose results the compressor decides by. No compressor is the dense baseline;
    ``training.epochs`` 0 only compresses and measures.
    """

    kind: Literal["train"] = "train"
    task: str
    data: DataSource
    encoder: str
    seed: int = Field(ge=0)
    training: TrainingSettings
    compressor: CompressorSpec | None = None
    start: "TrainSpec | None" = None
    distillation: Distillation | None = None
    teacher: "TrainSpec | None" = None
    informed_by: "tuple[TrainSpec | ImportanceSpec, ...]" = ()


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

    ``start`` None measures the pre-trained encoder, as the paper does.
    """

    kind: Literal["contribution"] = "contribution"
    task: str
    data: DataSource
    encoder: str
    max_length: int
    examples: int = Field(ge=1)
    start: TrainSpec | None = None


class LatencyModel(Strict):
    """A model to time: a named architecture with random weights or an encoder, with layers dropped.

    ``shapes`` gives the (heads, FFN units) that each remaining layer keeps; empty means all of them.
    """

    architecture: str
    drop: tuple[int, ...] = ()
    shapes: tuple[tuple[int, int], ...] = ()
    head: Literal["qa", "classification"] = "qa"


class LatencySpec(Strict):
    """Latency of models on engines, all interleaved in one run. ``dense`` names the model that ratios refer to."""

    kind: Literal["latency"] = "latency"
    models: dict[str, LatencyModel]
    dense: str
    engines: tuple[str, ...]
    batch: int = Field(ge=1)
    length: int = Field(ge=1)
    threads: int = Field(ge=1)
    rounds: int = Field(ge=1)


class TrainingSpeedSpec(Strict):
    """Fine-tuning speed and peak memory of models with random weights, interleaved step by step.

    ``frozen_embeddings`` False trains everything, as the paper does.
    """

    kind: Literal["training_speed"] = "training_speed"
    models: dict[str, LatencyModel]
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


Spec = TrainSpec | ImportanceSpec | ContributionSpec | LatencySpec | TrainingSpeedSpec | StockComparisonSpec
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


def label(spec: Spec) -> str:
    """A short human name, used in file names and progress lines."""
    if isinstance(spec, TrainSpec):
        parts = [spec.task, spec.compressor.name.rpartition(":")[2] if spec.compressor else "dense"]
        settings = spec.compressor.settings if spec.compressor else {}
        if "drop" in settings:
            parts.append("-".join(map(str, settings["drop"])))
        parts += [f"{kind}{density:g}" for kind, density in settings.get("densities", {}).items()]
        if spec.compressor and spec.compressor.name == "structured":
            sources = [getattr(source, "method", "l0") for source in spec.informed_by[:1]]
            parts += [settings.get("importance", ""), *sources, "trained" if spec.training.epochs else ""]
        return "_".join([*filter(None, parts), f"seed{spec.seed}"])
    if isinstance(spec, ImportanceSpec):
        return f"{spec.task}_{spec.method}_seed{spec.start.seed}"
    if isinstance(spec, ContributionSpec | StockComparisonSpec):
        return spec.task
    return f"{spec.dense}_batch{spec.batch}_length{spec.length}"


def training_settings(profile: Profile, task: str, **changes: Any) -> TrainingSettings:
    """The profile's way to fine-tune ``task``, with ``changes``.

    Raises:
        StudyError: the profile has no such task, or a change is impossible.
    """
    if task not in profile.tasks:
        raise StudyError(f"profile {profile.name} has no task '{task}'; it has {', '.join(profile.tasks)}")
    values = profile.tasks[task].model_dump(exclude={"seeds"}) | profile.training.model_dump(
        exclude={"checkpoint_minutes"}
    )
    try:
        return TrainingSettings.model_validate(values | changes)
    except ValidationError as error:
        first = error.errors()[0]
        raise StudyError(f"training.{first['loc'][0]}: {first['msg']}, found {first['input']!r}") from None


def dense_spec(profile: Profile, task: str, seed: int) -> TrainSpec:
    """The dense baseline of a task: the teacher, and the 100 % of every retained share."""
    return TrainSpec(
        task=task, data=data_source(profile, task), encoder=profile.encoder, seed=seed,
        training=training_settings(profile, task),
    )  # fmt: skip


def data_source(profile: Profile, task: str) -> DataSource:
    """Where a task's data come from: the embedded corpus for ``world_*`` tasks, else what the profile says."""
    if task.startswith("world_"):
        return "embedded"
    if profile.data == "embedded":
        raise StudyError(f"task '{task}' is not in the embedded corpus; set data to local or hub")
    return profile.data
