"""Profiles: every choice a run of the study makes, in one validated YAML file per scale.

Precedence, highest first: command line or papermill parameter, environment (``STUDY_DATA`` for the data directory),
profile file. An unknown key, a wrong type or an impossible value is one line naming file, key and what is allowed.
"""

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lib.settings import Profile

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ("smoke", "quick", "study", "paper")
OWN_SEEDS = ("structured_pruning", "frontier")  # sections whose tasks may have seeds of their own


class StudyError(Exception):
    """A user's mistake or a missing resource: one line saying what, where and what to do."""


class NothingToDo(StudyError):
    """What was chosen leaves a notebook nothing to do; a series goes on with the next one."""


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
    _resolve_own_files(values.get("own_tasks"), path.parent.absolute())
    for key, value in overrides.items():
        if value not in (None, "", (), []):
            _override(values, key, value, path.name)
    return _validated(values, path.name)


def _resolve_own_files(own_tasks: Any, folder: Path) -> None:
    """Paths in a profile file are relative to it; what is not a path is left for the validation to name."""
    for own in own_tasks.values() if isinstance(own_tasks, dict) else ():
        for split in ("train", "validation"):
            if isinstance(own, dict) and isinstance(own.get(split), str):
                own[split] = folder / Path(own[split]).expanduser()


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
    if key.endswith("tasks") and isinstance(value, list | tuple) and _holds_tasks(values):
        value = _with_own_data(values, value)
    if key in ("tasks", "seeds") and not _holds_tasks(values):
        raise StudyError(f"{file}: tasks: expected the settings of each task, as in config/quick.yaml")
    if key == "tasks" and isinstance(value, list | tuple):
        missing = [task for task in value if task not in values["tasks"]]
        if missing:
            raise StudyError(f"tasks: '{missing[0]}' has no settings in {file}; it has {', '.join(values['tasks'])}")
        from lib import own_data  # here, because it imports this module

        own_data.stand_in(values, [task for task in values["tasks"] if task not in value], value)
        value = {task: values["tasks"][task] for task in value}
    if key == "seeds" and isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise StudyError(f"seeds: found {value}, expected how many seeds (1 or more) or a list of them")
        value = list(range(value))
    if key == "seeds" and isinstance(value, list | tuple):
        for settings in (*values["tasks"].values(), *(values.get("translation") or {}).values()):
            settings["seeds"] = len(value)
        for section in OWN_SEEDS:
            if isinstance(values.get(section), dict):
                values[section]["seeds"] = {}
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


def _with_own_data(values: dict[str, Any], tasks: list[str] | tuple[str, ...]) -> list[str]:
    """A list of tasks, in which files became tasks of the profile."""
    if not all(isinstance(task, str) for task in tasks):
        raise StudyError(f"tasks: found {list(tasks)!r}, expected names of tasks or files of your own")
    from lib import own_data  # here, because it imports this module

    return [own_data.adopt(values, task) if own_data.is_path(task) else task for task in tasks]


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
    if profile.own_tasks:
        from lib.data import register  # here, because it imports this module

        for name, own in profile.own_tasks.items():
            register(name, own)
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
    for task, model in profile.translation.items():
        if model.hidden_size % model.heads:
            raise StudyError(
                f"{file}: translation.{task}.hidden_size: found {model.hidden_size}, expected a multiple of "
                f"{model.heads} heads"
            )
        if model.seeds > len(profile.seeds):
            raise StudyError(f"{file}: translation.{task}.seeds: found {model.seeds}, only {len(profile.seeds)} listed")
    for section in OWN_SEEDS:
        for task, number in getattr(profile, section).seeds.items():
            if number > len(profile.seeds):
                listed = f"only {len(profile.seeds)} listed"
                raise StudyError(f"{file}: {section}.seeds.{task}: found {number}, {listed}")
    quantized = profile.fully_quantized
    for task in (*quantized.tasks, *quantized.scratch, quantized.ablation_task, quantized.speed_task):
        if task not in profile.translation:
            known = ", ".join(profile.translation)
            raise StudyError(f"{file}: fully_quantized: '{task}' has no settings in translation; it has {known}")
    for task in (*quantized.tasks, quantized.ablation_task):
        if task not in quantized.epochs:
            raise StudyError(f"{file}: fully_quantized.epochs: '{task}' is missing; give its share")
    return profile
