"""Profiles: every choice a run of the study makes, in one validated YAML file per scale.

Precedence, highest first: command line or papermill parameter, environment (``STUDY_DATA`` for the data directory),
profile file. An unknown key, a wrong type or an impossible value is one line naming file, key and what is allowed.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ("smoke", "quick", "study", "paper")
ENCODERS = {"minilm": "the packaged all-MiniLM-L6-v2", "tiny-bert": "a small BERT with random weights, for tests"}


class StudyError(Exception):
    """A user's mistake or a missing resource: one line saying what, where and what to do."""


class Strict(BaseModel):
    """Base of everything read from YAML or a record: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskSettings(Strict):
    """How one task is fine-tuned and measured.

    ``epochs`` may be fractional; ``learning_rate`` is the peak of a linear warm-up and decay; ``max_length`` and
    ``stride`` are in tokens (``stride`` is the overlap of two QA windows); ``seeds`` is how many of the profile's
    seeds this task gets.
    """

    epochs: PositiveFloat
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    max_length: int = Field(ge=8, le=512)
    stride: int = Field(default=0, ge=0)
    train_examples: PositiveInt | None = None
    eval_examples: PositiveInt | None = None
    seeds: PositiveInt = 1


class LatencySettings(Strict):
    """Conditions under which speed is measured: every engine, batch and length pair named here.

    ``comparison_examples`` is how many features the comparison with a stock Trainer trains on in each round.
    """

    engines: tuple[str, ...] = Field(min_length=1)
    threads: PositiveInt
    batches: tuple[PositiveInt, ...] = Field(min_length=1)
    lengths: tuple[PositiveInt, ...] = Field(min_length=1)
    rounds: PositiveInt
    comparison_examples: int = Field(ge=8)
    base_shape: Literal["tiny", "base", "large"]


class TrainingDefaults(Strict):
    """Training choices shared by all tasks of a profile.

    ``dropout`` 0 and ``freeze_embeddings`` make a CPU run about twice as fast and change the result slightly;
    ``attention`` only changes speed. ``precision`` "auto" is bf16 where the hardware computes in it, else fp32.
    """

    dropout: float = Field(ge=0, lt=1)
    freeze_embeddings: bool
    attention: Literal["eager", "sdpa"]
    precision: Literal["auto", "bf16", "fp32"]
    warmup: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    max_grad_norm: PositiveFloat
    checkpoint_minutes: PositiveFloat


class Profile(Strict):
    """One scale of the study. ``tasks`` maps a task's name to its settings; the first QA task is the headline one."""

    name: str
    encoder: str = Field(min_length=1)
    data: Literal["embedded", "local", "hub"]
    data_dir: Path | None = None
    results: Path
    seeds: tuple[int, ...] = Field(min_length=1)
    training: TrainingDefaults
    tasks: dict[str, TaskSettings] = Field(min_length=1)
    latency: LatencySettings
    layer_dropping: "LayerDroppingSettings"
    structured_pruning: "StructuredPruningSettings"

    def task_seeds(self, task: str) -> tuple[int, ...]:
        """The seeds that ``task`` runs with under this profile."""
        return self.seeds[: self.tasks[task].seeds]


class LayerDroppingSettings(Strict):
    """The grid of notebook 05. ``k`` lists how many layers to drop; ``None`` means every K the encoder allows.

    ``grid_tasks`` get every strategy and K, ``half_tasks`` only half of the layers dropped from the top.
    """

    k: tuple[PositiveInt, ...] | None
    strategies: tuple[Literal["top", "bottom", "odd", "even", "symmetric", "contribution"], ...] = Field(min_length=1)
    thresholds: tuple[float, ...]
    grid_tasks: tuple[str, ...]
    half_tasks: tuple[str, ...]
    ablation_k: tuple[PositiveInt, ...] = Field(min_length=1)
    ablation_tasks: tuple[str, ...]


Density = Annotated[float, Field(gt=0, le=1)]


class StructuredPruningSettings(Strict):
    """The runs of notebook 02. Densities are shares kept; a point is (heads, units).

    The first task of ``tasks`` gets every selection and density, the others the operating points. Speed is measured at
    ``speed_shape`` with ``speed_length`` tokens.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    head_densities: tuple[Density, ...]
    unit_densities: tuple[Density, ...]
    operating_points: tuple[tuple[Density, Density], ...]
    embedding_densities: tuple[Density, ...]
    gate_epochs: PositiveFloat
    gate_batch_size: PositiveInt
    retrain_epochs: PositiveFloat
    retrain_learning_rate: PositiveFloat
    gain_examples: PositiveInt
    leave_one_out_examples: PositiveInt
    speed_shape: Literal["tiny", "base", "large"]
    speed_points: tuple[tuple[Density, Density], ...]
    speed_batches: tuple[PositiveInt, ...]
    speed_length: PositiveInt


def load_profile(profile: str | Path, **overrides: Any) -> Profile:
    """Read a profile by name or path and apply ``overrides`` (``None`` and "" mean "as in the profile").

    Dotted keys reach inside: ``load_profile("study", **{"training.dropout": 0.1})``. ``tasks`` may be a list that
    selects among the profile's tasks; ``seeds`` a count or a list.

    Raises:
        StudyError: unknown profile or key, wrong type, impossible value, missing data directory.
    """
    path = _profile_path(profile)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"profile file {path} cannot be read ({error}); give a YAML file in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise StudyError(f"{path.name}{line}: not valid YAML ({getattr(error, 'problem', error)}); fix it") from None
    if not isinstance(values, dict):
        raise StudyError(f"{path.name}: expected 'key: value' lines, found a {type(values).__name__}")
    values.setdefault("name", path.stem)
    values.setdefault("results", str(ROOT / "results" / path.stem))
    if os.environ.get("STUDY_DATA"):
        values["data_dir"] = os.environ["STUDY_DATA"]
    for key, value in overrides.items():
        if value not in (None, "", (), []):
            _override(values, key, value, path.name)
    return _validated(values, path.name)


def _profile_path(profile: str | Path) -> Path:
    path = Path(profile)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise StudyError(f"profile file {path} does not exist; give one of {', '.join(PROFILES)} or a YAML file")
        return path
    if str(profile) not in PROFILES:
        raise StudyError(f"unknown profile '{profile}'; allowed: {', '.join(PROFILES)}, or the path of a YAML file")
    return ROOT / "config" / f"{profile}.yaml"


def _override(values: dict[str, Any], key: str, value: Any, file: str) -> None:
    """Set one (dotted) key in place."""
    if key in ("tasks", "seeds") and not _holds_tasks(values):
        raise StudyError(f"{file}: tasks: expected the settings of each task, as in config/quick.yaml")
    if key == "tasks" and isinstance(value, list | tuple):
        missing = [task for task in value if task not in values["tasks"]]
        if missing:
            raise StudyError(f"tasks: '{missing[0]}' has no settings in {file}; it has {', '.join(values['tasks'])}")
        value = {task: values["tasks"][task] for task in value}
    if key == "seeds" and isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise StudyError(f"seeds: found {value}, expected how many seeds (1 or more) or a list of them")
        value = list(range(value))
    if key == "seeds" and isinstance(value, list | tuple):
        for settings in values["tasks"].values():
            settings["seeds"] = len(value)
    if key in ("data_dir", "results"):
        value = Path(value).expanduser().absolute()
    target, *rest = key.split(".")
    if target not in Profile.model_fields:
        raise StudyError(f"unknown setting '{key}'; the settings of {file} are {', '.join(Profile.model_fields)}")
    node: Any = values
    for part in rest:
        node, target = node.get(target), part
        if not isinstance(node, dict):
            raise StudyError(f"unknown setting '{key}'; {file} has nothing above '{part}' to put it in")
    node[target] = value


def _holds_tasks(values: dict[str, Any]) -> bool:
    tasks = values.get("tasks")
    return isinstance(tasks, dict) and all(isinstance(settings, dict) for settings in tasks.values())


def _validated(values: dict[str, Any], file: str) -> Profile:
    try:
        profile = Profile.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            parent = ".".join(str(part) for part in first["loc"][:-1]) or "the profile"
            raise StudyError(f"{file}: unknown key '{key}' in {parent}; remove it or correct its spelling") from None
        found = "" if first["type"] == "missing" else f", found {first['input']!r}"
        raise StudyError(f"{file}: {key}: {first['msg'][0].lower()}{first['msg'][1:]}{found}") from None
    negative = [seed for seed in profile.seeds if seed < 0]
    if negative:
        raise StudyError(f"{file}: seeds: found {negative[0]}, expected integers of 0 or more")
    if profile.data_dir is not None and not profile.data_dir.is_dir():
        raise StudyError(f"data directory {profile.data_dir} does not exist; set STUDY_DATA or data_dir to a folder")
    for task, settings in profile.tasks.items():
        if settings.stride >= settings.max_length - 8:
            raise StudyError(f"{file}: tasks.{task}.stride: found {settings.stride}, expected well under max_length")
        if settings.seeds > len(profile.seeds):
            raise StudyError(f"{file}: tasks.{task}.seeds: found {settings.seeds}, only {len(profile.seeds)} listed")
    return profile


Profile.model_rebuild()
