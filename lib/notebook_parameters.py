"""The parameters of notebooks: what they declare, and what a command line gives them."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml

from lib.config import StudyError
from lib.own_data import is_path
from lib.problems import first_line

PATH_PARAMETERS = ("results", "data_dir")  # relative to where the command was given, not to the notebook


def parameters_of(path: Path) -> dict[str, dict[str, str]]:
    """A notebook's parameters in order: name to ``inferred_type_name``, ``default`` and ``help``."""
    try:
        return papermill.inspect_notebook(str(path))
    except (ValueError, nbformat.reader.NotJSONError) as error:
        raise StudyError(f"{path.name}: not a readable notebook ({first_line(error, 120)})") from None


def assign(paths: Sequence[Path], given: Sequence[tuple[str, str]], profile: str) -> dict[Path, dict[str, Any]]:
    """Each notebook's parameters: those of ``given`` that it declares, and the profile.

    Raises:
        StudyError: a parameter that no notebook has, or a value of the wrong type.
    """
    declared = {path: parameters_of(path) for path in paths}
    known = list(dict.fromkeys(name for parameters in declared.values() for name in parameters))
    for name, _ in given:
        if name == "profile":
            raise StudyError("parameter 'profile' is the command's first argument; leave -p profile out")
        if name not in known:
            where = paths[0].name if len(paths) == 1 else "any notebook"
            raise StudyError(f"unknown parameter '{name}' in {where}; known: {', '.join(known) or 'none'}")
    chosen: dict[Path, dict[str, Any]] = {}
    for path, parameters in declared.items():
        values = {name: parse(name, text, parameters[name]) for name, text in given if name in parameters}
        chosen[path] = ({"profile": profile} if "profile" in parameters else {}) | values
    return chosen


def parse(name: str, text: str, parameter: dict[str, str]) -> Any:
    """A value as YAML, held to the notebook's annotation where that is str, int, float or bool."""
    kind = parameter["inferred_type_name"]
    if name in PATH_PARAMETERS and text:
        return str(Path(text).expanduser().absolute())
    if kind == "str":
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise StudyError(
            f"parameter '{name}': cannot read {text!r} as YAML; write 3, 0.5, true, [1, 2] or text"
        ) from None
    if kind == "float" and isinstance(value, str):  # YAML 1.1 takes 1e-4 for text
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind == "float" and type(value) is int:
        value = float(value)
    if name == "tasks" and isinstance(value, list):
        value = [str(Path(item).expanduser().absolute()) if is_path(item) else item for item in value]
    expected = {"int": int, "float": float, "bool": bool}.get(kind)
    if expected and type(value) is not expected:
        raise StudyError(f"parameter '{name}': found {text!r}, expected {kind} ({parameter['help'] or 'no help'})")
    return value


def help_parameters(paths: Sequence[Path]) -> str:
    """Every parameter once: type, default, meaning and the notebooks that have it."""
    lines: dict[str, list[str]] = {}
    for path in paths:
        for name, parameter in parameters_of(path).items():
            text = f"  {name}: {parameter['inferred_type_name']} = {parameter['default']}\n      {parameter['help']}"
            lines.setdefault(text, []).append(path.stem[:2])
    return "\n".join(f"{text}  [{', '.join(where)}]" for text, where in lines.items())
