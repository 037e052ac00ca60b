"""Records: one finished run is one JSON file, which says what was run, with what, and what came out.

A record that cannot be read, or was made with other data than those at hand, is an error and never overwritten. How
missing ones are computed is in ``lib.runs``.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from lib.config import StudyError
from lib.environment import dense_units
from lib.files import sha256
from lib.labels import label
from lib.problems import first_problem
from lib.settings import Profile, Strict
from lib.specs import Spec, needed_runs, needed_weights, spec_hash


class Record(Strict):
    """One finished run. ``result`` depends on the spec's kind; times are in seconds, sizes in bytes, scores in percent.

    ``code`` is a digest of the library without comments and docstrings; ``data`` digests the data read, or is None.
    ``weights`` digests the weights that the run began with or learnt from, by the hash of the run that made them: two
    records compare one model with another only where they name the same. Records of before 30 November 2026 have none.
    """

    format: int = 1
    hash: str
    spec: Spec
    result: dict[str, Any]
    data: str | None
    weights: dict[str, str] = Field(default_factory=dict)
    code: str
    commit: str | None
    created: str
    seconds: float
    hardware: dict[str, Any]
    packages: dict[str, str]

    @property
    def machine(self) -> str:
        """What computed it: the GPU's name, or the processor where there was none."""
        return str(self.hardware.get("gpu") or self.processor)

    @property
    def processor(self) -> str:
        """The CPU's name and what it has for dense matrices, which CPUs of one name differ in; "" without a name."""
        units = dense_units(self.hardware.get("isa", ()))
        return str(self.hardware.get("cpu") or "") + f" ({units})" * bool(units)

    def ran_on(self, engine: str) -> str:
        """What an engine of this run computed on: the GPU for CUDA's, the processor for the others."""
        return self.machine if "cuda" in engine else self.processor

    def __getitem__(self, key: str) -> Any:
        """``record["score"]`` is ``record.result["score"]``."""
        return self.result[key]


class Records(list[Record]):
    """Records in plan order; ``missing`` are the specs that were not computed."""

    def __init__(self, records: Iterable[Record], missing: Sequence[Spec] = ()) -> None:
        super().__init__(records)
        self.missing = list(missing)


def record_path(profile: Profile, spec: Spec) -> Path:
    """Where the record of a spec lies."""
    return profile.results / "runs" / f"{spec.kind}-{label(spec)}-{spec_hash(spec)}.json"


def weights_folder(profile: Profile, spec: Spec) -> Path:
    """Where the weights of a finished run are kept, if others begin with them or learn from them."""
    return profile.results / "models" / spec_hash(spec)


def checkpoints_folder(profile: Profile, spec: Spec) -> Path:
    """Where a run that is under way keeps its checkpoints."""
    return profile.results / "checkpoints" / spec_hash(spec)


def read_record(path: Path) -> Record:
    """Read and validate one record.

    Raises:
        StudyError: not a record; names the file and what is wrong.
    """
    advice = "restore it from version control, or move it away to compute the run again"
    try:
        record = Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise StudyError(f"corrupt record {path}: {first_problem(error)}; {advice}") from None
    except OSError as error:
        raise StudyError(f"cannot read record {path} ({error.strerror})") from None
    if record.hash != spec_hash(record.spec):
        raise StudyError(f"corrupt record {path}: its hash does not belong to its spec; {advice}")
    return record


def cached(profile: Profile, spec: Spec) -> Record | None:
    """The record of a spec if it exists; checked against the data at hand."""
    path = record_path(profile, spec)
    if not path.exists():
        return None
    record = read_record(path)
    if record.hash != spec_hash(spec):
        raise StudyError(f"corrupt record {path}: it holds run {record.hash}; give it back its own name, or remove it")
    current = data_read(profile, spec, or_none=True)
    if record.data and current and record.data != current:
        raise StudyError(
            f"record {path.name} was made with other data ({record.data}, now {current}); "
            "give another results folder, or refresh"
        )
    return record


def data_read(profile: Profile, spec: Spec, or_none: bool = False) -> str | None:
    """Digest of the data that a run reads; None if it reads none, and with ``or_none`` where they are not at hand."""
    from lib.data import data_digest

    task, tasks = getattr(spec, "task", None), getattr(spec, "tasks", ())
    if (task is None and not tasks) or (or_none and spec.data == "hub"):  # type: ignore[union-attr]
        return None
    if or_none and spec.data == "local" and profile.data_dir is None and task not in profile.own_tasks:  # type: ignore[union-attr]
        return None
    names = tasks or (str(task),)
    digests = [data_digest(name, spec.data, profile.data_dir) for name in names]  # type: ignore[union-attr]
    return digests[0] if task else hashlib.sha256(" ".join(digests).encode()).hexdigest()[:12]


def weights_read(profile: Profile, spec: Spec) -> dict[str, str]:
    """Digests of the weights that a run began with or learnt from, by the hash of the run that made them."""
    made = {spec_hash(other): weights_folder(profile, other) for other in needed_weights(spec)}
    return {other: sha256(path)[:12] for other, folder in made.items() for path in folder.glob("*.safetensors")}


def older_than_start(records: Mapping[str, Record]) -> list[Record]:
    """Records made before the run that they begin with, learn from or are informed by, among ``records`` by hash.

    That run was made again, and its model need not be the one that they saw.
    """
    older = []
    for record in records.values():
        before = [records.get(spec_hash(other)) for other in needed_runs(record.spec)]
        if any(other is not None and other.created > record.created for other in before):
            older.append(record)
    return older
