"""Tasks of the study, and one call that loads any of them from the hub, a local folder or the embedded corpus.

Every source ends in the same columns, so nothing after this module knows where the examples came from:

- qa: ``id, title, context, question, answers {text: list[str], answer_start: list[int]}``
- classification, regression: ``idx, sentence1[, sentence2], label``
- translation: ``source, target``

Local folders hold the files as their authors ship them: SQuAD JSON (Rajpurkar et al. 2016, 2018), GLUE TSV (Wang et al.
2018) and parallel text with one sentence a line. Whatever is wrong with them is one line naming file and place.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value, load_dataset, load_dataset_builder

from lib import corpus, own_data
from lib.config import StudyError
from lib.local_data import Glue, Rows, read_glue, read_parallel, read_squad
from lib.settings import OwnTask

Kind = Literal["qa", "classification", "regression", "translation"]

QA_FEATURES = Features(
    {
        "id": Value("string"),
        "title": Value("string"),
        "context": Value("string"),
        "question": Value("string"),
        "answers": {"text": [Value("string")], "answer_start": [Value("int32")]},
    }
)
OFFLINE_HINT = (
    "without internet, point STUDY_DATA (or data_dir) at a local copy and set data: local, or use profile quick"
)


@dataclass(frozen=True)
class Task:
    """One task.

    ``metric`` is the key of ``metrics.score`` that "score" repeats. ``num_labels`` is 0 for QA and translation and 1
    for regression. ``hub`` is data set id and configuration, ``hub_columns`` what the hub calls ``columns``. ``local``
    is the path below the data directory. ``embedded`` generates the splits of an invented-world task, ``own`` names the
    files of a user's own.
    """

    name: str
    kind: Kind
    metric: str
    title: str
    num_labels: int = 0
    columns: tuple[str, ...] = ()
    hub: tuple[str, str | None] | None = None
    hub_columns: tuple[str, ...] = ()
    hub_validation: str = "validation"
    local: str | None = None
    glue: Glue | None = None
    unanswerable: bool = False
    embedded: Callable[[], dict[str, Rows]] | None = None
    own: own_data.OwnFiles | None = None


def _glue(name: str, title: str, metric: str, sentences: tuple[str, ...], files: Glue, **rest: Any) -> Task:
    labels = len(files.labels) or 1
    return Task(
        name,
        "classification" if labels > 1 else "regression",
        metric,
        title,
        labels,
        ("sentence1", "sentence2")[: len(sentences)],
        ("nyu-mll/glue", name),
        sentences,
        local=f"glue/{files.folder}",
        glue=files,
        **rest,
    )


PAIR = ("sentence1", "sentence2")
BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
MNLI_LABELS = ("entailment", "neutral", "contradiction")
_TASKS = (
    Task("squad_v1", "qa", "f1", "SQuAD 1.1", hub=("rajpurkar/squad", None), local="squad_v1"),
    Task("squad_v2", "qa", "f1", "SQuAD 2.0", hub=("rajpurkar/squad_v2", None), local="squad_v2", unanswerable=True),
    Task("policyqa", "qa", "f1", "PolicyQA", hub=("alzoubi36/policy_qa", None), local="policyqa"),
    _glue("sst2", "SST-2", "accuracy", ("sentence",), Glue("SST-2", ("sentence",), "label", BINARY)),
    _glue("mrpc", "MRPC", "accuracy", PAIR, Glue("MRPC", ("#1 String", "#2 String"), "Quality", BINARY)),
    _glue("rte", "RTE", "accuracy", PAIR, Glue("RTE", PAIR, "label", ENTAILMENT)),
    _glue("stsb", "STS-B", "pearson_spearman", PAIR, Glue("STS-B", PAIR, "score")),
    _glue("cola", "CoLA", "matthews", ("sentence",), Glue("CoLA", (3,), 1, BINARY)),
    _glue(
        "mnli",
        "MNLI (matched)",
        "accuracy",
        ("premise", "hypothesis"),
        Glue("MNLI", PAIR, "gold_label", MNLI_LABELS, dev="dev_matched.tsv"),
        hub_validation="validation_matched",
    ),
    _glue(
        "qnli",
        "QNLI",
        "accuracy",
        ("question", "sentence"),
        Glue("QNLI", ("question", "sentence"), "label", ENTAILMENT),
    ),
    _glue(
        "qqp",
        "QQP",
        "accuracy",
        ("question1", "question2"),
        # GLUE's own QQP files contain a few rows that break off; the hub's copy leaves them out as well.
        Glue("QQP", ("question1", "question2"), "is_duplicate", BINARY, drop_broken_rows=True),
    ),
    Task("multi30k", "translation", "bleu", "Multi30k En-De", hub=("bentrevett/multi30k", None), local="multi30k"),
    Task("wmt14", "translation", "bleu", "WMT14 En-De", hub=("wmt/wmt14", "de-en"), local="wmt14"),
    Task("world_qa", "qa", "f1", "World QA", embedded=corpus.world_qa),
    Task("world_qa2", "qa", "f1", "World QA 2", unanswerable=True, embedded=corpus.world_qa2),
    Task(
        "world_sentiment", "classification", "accuracy", "World sentiment", 2, PAIR[:1], embedded=corpus.world_sentiment
    ),
    Task("world_pair", "classification", "accuracy", "World pairs", 2, PAIR, embedded=corpus.world_pair),
    Task("world_translation", "translation", "bleu", "World translation (invented)", embedded=corpus.world_translation),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def register(name: str, own: OwnTask) -> None:
    """Make a user's own files a task, called ``name``; once more with the same files changes nothing.

    Raises:
        StudyError: the name is taken, or the files are not what they should be.
    """
    files = own_data.describe(name, own)
    if name in TASKS and TASKS[name].own != files:
        other = "is a task of the study" if TASKS[name].own is None else "was read from other files in this process"
        raise StudyError(f"own task '{name}': '{name}' {other}; choose another name (of the file, or under own_tasks)")
    if files.glue is None:
        TASKS[name] = Task(name, "qa", "f1", name, unanswerable=files.unanswerable, own=files)
    else:
        labels, columns = len(files.glue.labels) or 1, own_data.SENTENCES[: len(files.glue.columns)]
        kind, metric = ("classification", "accuracy") if labels > 1 else ("regression", "pearson_spearman")
        TASKS[name] = Task(name, kind, metric, name, labels, columns, own=files)  # type: ignore[arg-type]


def get_task(name: str) -> Task:
    """The task called ``name``; an unknown name is a StudyError that lists the known ones."""
    if name not in TASKS:
        raise StudyError(f"unknown task '{name}'; allowed: {', '.join(TASKS)}")
    return TASKS[name]


def encoder_task(name: str) -> Task:
    """The task called ``name``, for an encoder under a head; translation has other models.

    Raises:
        StudyError: there is no such task, or it is a translation task.
    """
    task = get_task(name)
    if task.kind == "translation":
        raise StudyError(f"task '{name}' is translation; an encoder is fine-tuned on question answering or sentences")
    return task


def load_task(
    name: str,
    source: str,
    data_dir: Path | str | None = None,
    train_examples: int | None = None,
    eval_examples: int | None = None,
) -> DatasetDict:
    """Splits ``train`` and ``validation`` (and ``test`` for translation) of a task.

    ``world_*`` tasks come from the embedded corpus whatever ``source`` ("hub", "local", "embedded") says.
    ``train_examples`` and ``eval_examples`` take the first so many of one fixed shuffle, the same for every seed; a
    smaller number is a part of a larger one. All splits live in memory or in the hub's own cache: no file is written.

    Raises:
        StudyError: unknown task, unreachable hub, missing or malformed files.
    """
    task = get_task(name)
    splits = _load_splits(task, source, data_dir)
    for split, dataset in splits.items():
        size = train_examples if split == "train" else eval_examples
        if size is not None and size < len(dataset):
            splits[split] = dataset.select(
                np.random.default_rng(0).permutation(len(dataset))[:size], keep_in_memory=True
            )
    return splits


def data_digest(name: str, source: str, data_dir: Path | str | None = None) -> str:
    """12 hex digits that change when the task's data do: over the files' bytes (local), the generated rows (embedded),
    or the hub's data set id, configuration and revision."""
    task = get_task(name)
    digest = hashlib.sha256()
    if task.embedded:
        digest.update(json.dumps(task.embedded(), sort_keys=True).encode())
    elif task.own:
        for file in task.own.files:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    elif source == "hub":
        digest.update(repr((task.hub, _hub(load_dataset_builder, task).hash)).encode())
    else:
        for files in _local_files(task, source, data_dir).values():
            for file in files:
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _load_splits(task: Task, source: str, data_dir: Path | str | None) -> DatasetDict:
    if task.embedded:
        splits = task.embedded()
    elif task.own:
        splits = task.own.read()
    elif source == "hub":
        return _load_hub(task)
    else:
        files = _local_files(task, source, data_dir)
        splits = {split: _read(task, paths) for split, paths in files.items()}
    features = QA_FEATURES if task.kind == "qa" else None
    return DatasetDict({split: Dataset.from_list(rows, features=features) for split, rows in splits.items()})


def _hub(load: Callable[..., Any], task: Task) -> Any:
    assert task.hub is not None
    try:
        return load(*task.hub)
    except Exception as error:  # datasets, huggingface_hub and httpx share no base class for "cannot be reached"
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise StudyError(
            f"{task.title}: the hub data set '{task.hub[0]}' cannot be loaded ({reason}); {OFFLINE_HINT}"
        ) from None


def _load_hub(task: Task) -> DatasetDict:
    """The hub's splits, mapped to the study's columns."""
    raw = _hub(load_dataset, task)
    names = {"train": "train", "validation": task.hub_validation}
    if task.kind == "translation":
        names["test"] = "test"
    missing = [name for name in names.values() if name not in raw]
    if missing:
        raise StudyError(
            f"{task.title}: hub data set has splits {', '.join(raw)}, expected '{missing[0]}'; use a local copy"
        )
    return DatasetDict({split: _rename(task, raw[name]) for split, name in names.items()})


def _rename(task: Task, dataset: Dataset) -> Dataset:
    wanted = {"qa": tuple(QA_FEATURES), "translation": ()}.get(task.kind, (*task.hub_columns, "label"))
    missing = [column for column in wanted if column not in dataset.column_names]
    if missing:
        found = ", ".join(dataset.column_names)
        raise StudyError(f"{task.title}: hub data set has columns {found}, expected '{missing[0]}'; use a local copy")
    if task.kind == "qa":
        return dataset.select_columns(list(wanted))
    if task.kind == "translation":
        if "translation" in dataset.column_names:
            dataset = dataset.flatten().rename_columns({"translation.en": "en", "translation.de": "de"})
        return dataset.select_columns(["en", "de"]).rename_columns({"en": "source", "de": "target"})
    dataset = dataset.rename_columns(
        {old: new for old, new in zip(task.hub_columns, task.columns, strict=True) if old != new}
    )
    if "idx" not in dataset.column_names:
        dataset = dataset.add_column("idx", list(range(len(dataset))))
    return dataset.select_columns(["idx", *task.columns, "label"])


def _local_files(task: Task, source: str, data_dir: Path | str | None) -> dict[str, list[Path]]:
    """Files of each split below ``data_dir``, all of them checked to exist."""
    if source != "local":
        advice = "take a world_* task, or data: local or hub" if source == "embedded" else "use embedded, local or hub"
        raise StudyError(f"{task.title}: cannot come from data source '{source}'; {advice}")
    if data_dir is None:
        raise StudyError(f"{task.title}: data: local needs a data directory; set STUDY_DATA or data_dir to its folder")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise StudyError(f"data directory {root} does not exist; set STUDY_DATA or data_dir to an existing folder")
    try:
        empty = not any(root.iterdir())
    except OSError as error:
        raise StudyError(f"data directory {root} cannot be read ({error.strerror}); check its permissions") from None
    if empty:
        raise StudyError(f"data directory {root} is empty; expected folders such as squad_v1, glue, multi30k")
    folder = root / str(task.local)
    if task.kind == "translation":
        splits = {split: [f"{split}.en", f"{split}.de"] for split in ("train", "validation", "test")}
    elif task.glue:
        splits = {"train": ["train.tsv"], "validation": [task.glue.dev]}
    else:
        splits = {split: [f"{split}.json"] for split in ("train", "validation")}
    if not folder.is_dir():
        names = ", ".join(name for files in splits.values() for name in files)
        raise StudyError(f"{task.title}: folder {folder} does not exist; expected it with the files {names}")
    missing = [folder / name for files in splits.values() for name in files if not (folder / name).is_file()]
    if missing:
        raise StudyError(f"{task.title}: file {missing[0]} does not exist; copy it there")
    return {split: [folder / name for name in files] for split, files in splits.items()}


def _read(task: Task, files: list[Path]) -> Rows:
    if task.kind == "translation":
        return read_parallel(*files)
    if task.glue:
        return read_glue(files[0], task.glue, task.columns)
    return read_squad(files[0], task.unanswerable)
