"""A user's own data as a task: a SQuAD-format or TSV file named where a task is, or described under ``own_tasks``.

``-p tasks '["tickets.json"]'`` gives the file the settings and the place of the profile's first task of its kind, in
every list of the profile. A ``.json`` file is SQuAD 1.1, or 2.0 when questions without an answer occur; a ``.tsv`` file
has a header with one or two text columns and a column ``label`` (any names, at most 100) or ``score`` (0 to 5). Without
a validation file every tenth context or row is held out. ``lib.data.register`` makes tasks of what is described here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lib.config import StudyError
from lib.local_data import Glue, Rows, header_of, read_glue, read_squad
from lib.settings import OwnTask

HELD_OUT = 10  # one context or row of so many
MOST_LABELS = 100
NOT_TEXT = ("id", "idx", "index")
SENTENCES = ("sentence1", "sentence2")


@dataclass(frozen=True)
class OwnFiles:
    """Where a task's examples are; ``glue`` is the layout of a TSV file, ``unanswerable`` what a JSON file holds."""

    train: Path
    validation: Path | None
    glue: Glue | None
    unanswerable: bool
    stamp: tuple[tuple[int, int], ...]

    @property
    def files(self) -> list[Path]:
        """The files that there are."""
        return [path for path in (self.train, self.validation) if path]

    def read(self) -> dict[str, Rows]:
        """Rows of the splits ``train`` and ``validation``, in the columns of ``lib.data``.

        Raises:
            StudyError: too few examples to hold any out.
        """
        rows = self._rows(self.train)
        if self.validation:
            return {"train": rows, "validation": self._rows(self.validation)}
        groups = [row["context"] if self.glue is None else row["idx"] for row in rows]
        held_out = set(list(dict.fromkeys(groups))[HELD_OUT - 1 :: HELD_OUT])
        if not held_out:
            what = "contexts" if self.glue is None else "rows"
            raise StudyError(f"{self.train}: fewer than {HELD_OUT} {what}; give a validation file of its own")
        parts: dict[str, Rows] = {"train": [], "validation": []}
        for row, group in zip(rows, groups, strict=True):
            parts["validation" if group in held_out else "train"].append(row)
        return parts

    def _rows(self, path: Path) -> Rows:
        if self.glue is None:
            return _squad_rows(path, path.stat().st_mtime_ns)
        return read_glue(path, self.glue, SENTENCES[: len(self.glue.columns)])


@lru_cache(maxsize=4)
def _squad_rows(path: Path, changed: int) -> Rows:
    return read_squad(path, unanswerable=True)


def describe(name: str, own: OwnTask) -> OwnFiles:
    """Look into the files of an own task.

    Raises:
        StudyError: a file is missing or not of a known kind, or a TSV file has columns or labels that are no task.
    """
    train, validation = _file(name, own.train), own.validation and _file(name, own.validation)
    paths = [path for path in (train, validation) if path]
    if len({path.suffix for path in paths}) > 1:
        raise StudyError(f"own task '{name}': {train.name} and {paths[1].name} differ in kind; give two of one kind")
    stamp = tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
    if train.suffix == ".json":
        rows = [row for path in paths for row in _squad_rows(path, path.stat().st_mtime_ns)]
        return OwnFiles(train, validation, None, any(not row["answers"]["text"] for row in rows), stamp)
    return OwnFiles(train, validation, _layout(name, train, own), False, stamp)


def _file(name: str, path: Path) -> Path:
    path = path.expanduser().absolute()
    if path.suffix not in (".json", ".tsv"):
        raise StudyError(f"own task '{name}': {path.name} is neither .json (SQuAD format) nor .tsv; convert it to one")
    if not path.is_file():
        raise StudyError(f"own task '{name}': file {path} does not exist; correct the path")
    return path


def _layout(name: str, path: Path, own: OwnTask) -> Glue:
    header = header_of(path)
    label = own.label or next((column for column in ("label", "score") if column in header), "")
    texts = own.columns or tuple(column for column in header if column not in (label, *NOT_TEXT))
    if not label or label not in header or not 1 <= len(texts) <= 2 or not set(texts) <= set(header):
        raise StudyError(
            f"{path} line 1: found columns {', '.join(header)[:120]}; expected one or two text columns and 'label' or "
            f"'score', or say which they are under own_tasks.{name} (columns, label)"
        )
    if label == "score":
        return Glue("", texts, label)
    at = header.index(label)
    lines = path.read_text(encoding="utf-8-sig").split("\n")[1:]
    labels = sorted({cells[at] for line in lines if len(cells := line.rstrip("\r").split("\t")) == len(header)})
    if not 2 <= len(labels) <= MOST_LABELS:
        raise StudyError(f"{path}: found {len(labels)} labels in column '{label}', expected 2 to {MOST_LABELS}")
    return Glue("", texts, label, tuple(labels))


def is_path(item: Any) -> bool:
    """Whether an entry of a list of tasks names a file or folder."""
    return isinstance(item, str) and (item.endswith((".json", ".tsv")) or "/" in item or "\\" in item)


def adopt(values: dict[str, Any], item: str) -> str:
    """Enter a file, or a folder with train and validation files, into a profile's plain ``values``; its task name.

    The new task stands wherever the profile's first task of its kind stood, with its settings, those that a section
    gives single tasks included. A file that the profile describes keeps its description.

    Raises:
        StudyError: no such file, another one has its name, or the profile has no task of its kind.
    """
    from lib.data import TASKS

    own = _found(Path(item).expanduser().absolute())
    name = re.sub(r"\W+", "_", own["train"].parent.name if own["train"].stem == "train" else own["train"].stem).lower()
    kinds = ("qa",) if own["train"].suffix == ".json" else ("classification", "regression")
    own_tasks = values.setdefault("own_tasks", {})
    if not isinstance(own_tasks, dict):
        raise StudyError(f"own_tasks: found {own_tasks!r}, expected a name and its files for every task; or remove it")
    known = [task for task in values["tasks"] if task in TASKS and TASKS[task].kind in kinds and task not in own_tasks]
    if name not in own_tasks:
        if not known:
            raise StudyError(f"tasks: the profile has no {kinds[0]} task whose place {item} could take; add own_tasks")
        values["tasks"][name] = dict(values["tasks"][known[0]])
        for section in set(values) - {"tasks", "own_tasks"}:
            values[section] = _replaced(values[section], known[0], name)
    described = own_tasks[name] if isinstance(own_tasks.get(name), dict) else {}
    for split, path in own.items():
        other = described.get(split)
        if isinstance(other, str | Path) and Path(other).expanduser().resolve() != path.resolve():
            raise StudyError(
                f"tasks: {other} and {path} would both be task '{name}'; rename one of them (train.json and train.tsv "
                "are called like their folder), or describe both under own_tasks"
            )
    own_tasks[name] = {split: str(path) for split, path in own.items()} | described
    return name


def stand_in(values: dict[str, Any], dropped: Sequence[str], kept: Sequence[str]) -> None:
    """Let plans whose tasks are all ``dropped`` from a profile's plain ``values`` work on one that is ``kept``.

    It is the first of the same kind, else the first of all; where only question answering will do (notebook 02 and
    settings that begin with ``qa_``), the names stay and the plan is left out. What the section gives single tasks, it
    gets of those of its kind, where it has nothing of its own.
    """
    for section, settings in values.items():
        if not isinstance(settings, dict) or section in ("tasks", "translation", "own_tasks"):
            continue
        for key, named in settings.items():
            if key != "text_tasks" and (key.endswith(("task", "tasks")) and isinstance(named, str | list)):
                needs_kind = section == "structured_pruning" or key.startswith("qa_")
                settings[key] = _among(values, named, dropped, kept, needs_kind)
                if settings[key] != named:
                    _inherit(values, settings, _names(settings[key])[0], _names(named))


def _inherit(values: dict[str, Any], settings: dict[str, Any], task: str, others: Sequence[str]) -> None:
    """Give ``task`` what ``settings`` say under the name of the first of ``others`` that is of its kind."""
    alike = [other for other in others if _is_qa(values, other) == _is_qa(values, task)]
    for key, by_task in settings.items():
        if isinstance(by_task, dict) and not key.endswith("tasks"):  # those say which tasks, not how
            for other in alike:
                if other in by_task:
                    by_task.setdefault(task, by_task[other])


def _among(values: dict[str, Any], named: Any, dropped: Sequence[str], kept: Sequence[str], needs_kind: bool) -> Any:
    """``named``, or what stands in for it: a name for a name, a list of one for a list."""
    names = _names(named)
    if not names or not kept or not all(name in dropped for name in names):
        return named
    alike = [task for task in kept if _is_qa(values, task) == _is_qa(values, names[0])]
    if needs_kind and not alike:
        return named
    chosen = (alike or list(kept))[0]
    return chosen if isinstance(named, str) else [chosen]


def _names(named: str | list[str]) -> list[str]:
    return [named] if isinstance(named, str) else named


def _is_qa(values: dict[str, Any], task: str) -> bool:
    from lib.data import get_task

    own = values.get("own_tasks", {}).get(task)
    return get_task(task).kind == "qa" if own is None else str(own["train"]).endswith(".json")


def _found(path: Path) -> dict[str, Path]:
    """The files of the splits that a path stands for."""
    if not path.is_dir():
        return {"train": path}
    found = {split: path / f"{split}{suffix}" for suffix in (".tsv", ".json") for split in ("train", "validation")
             if (path / f"{split}{suffix}").is_file()}  # fmt: skip
    if "train" not in found:
        raise StudyError(f"tasks: folder {path} has no train.json or train.tsv; name the file itself")
    return found


def _replaced(node: Any, old: str, new: str) -> Any:
    """``node`` with ``new`` in place of ``old``; what is said under the name of ``old`` holds for ``new`` as well."""
    if isinstance(node, dict):
        replaced = {key: _replaced(value, old, new) for key, value in node.items()}
        if old in replaced:
            replaced.setdefault(new, replaced[old])
        return replaced
    if isinstance(node, list | tuple):
        return [_replaced(value, old, new) for value in node]
    return new if node == old else node
