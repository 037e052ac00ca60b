"""From records to the frames that figures, tables and sentences are made of. Nothing here measures anything.

Here is what several notebooks use; a paper's own frames are in the module of its name.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lib.config import StudyError
from lib.data import TASKS
from lib.intervals import bootstrap_interval
from lib.published import published
from lib.records import Record
from lib.specs import LatencySpec, MajoritySpec, TrainingSpeedSpec, TrainSpec

MARGIN = 5.0  # points that a dense score must lie above that of one answer for all for its retained share to say much


def training_runs(records: Iterable[Record]) -> list[Record]:
    """The records of training runs.

    Raises:
        StudyError: there is none.
    """
    found = [record for record in records if isinstance(record.spec, TrainSpec)]
    if not found:
        raise StudyError("no training run is finished yet; run ./run_all.sh for this profile, or raise budget_minutes")
    return found


def one_label_scores(records: Iterable[Record]) -> dict[str, float]:
    """Task -> score (percent) of one answer for all, of the tasks whose record is here."""
    return {record.spec.task: record["score"] for record in records if isinstance(record.spec, MajoritySpec)}


def is_dense(spec: TrainSpec) -> bool:
    """Whether a run makes the model that its task's shares refer to: nothing compressed, fine-tuned without help."""
    return spec.compressor is None and spec.start is None and spec.teacher is None


def uninformative(records: Iterable[Record]) -> set[str]:
    """Tasks whose dense score, mean over seeds, lies less than ``MARGIN`` above that of one answer for all.

    Whatever one does to such a model, nearly all of its score remains. ``records`` hold the dense runs and the floors.
    """
    records, dense = list(records), dict[str, list[float]]()
    for record in records:
        spec = record.spec
        if isinstance(spec, TrainSpec) and is_dense(spec):
            dense.setdefault(spec.task, []).append(record["score"])
    return {
        task
        for task, floor in one_label_scores(records).items()
        if task in dense and np.mean(dense[task]) - floor < MARGIN
    }


def of_same_seed(frame: pd.DataFrame, values: pd.Series) -> np.ndarray:
    """For every row of ``frame`` the entry of ``values``, indexed by (task, seed), that is its own.

    NaN without one, and where it is 0: nothing is a share of a dense model that scores nothing.
    """
    return values.reindex(pd.MultiIndex.from_frame(frame[["task", "seed"]])).replace(0.0, np.nan).to_numpy()


def examples_note(records: Iterable[Record], tasks: Iterable[str] | None = None) -> str:
    """The caption's sentence on how much of each data set stands behind its scores, from the dense runs' own counts.

    A part of a data set is not the whole that a paper trained and scored on; "" without a dense run.

    Args:
        tasks: those that the caption is about; None means all.
    """
    about = None if tasks is None else set(tasks)
    sizes = {
        TASKS[record.spec.task].title: f"{record['train_examples']:,} / {record['eval_examples']:,}"
        for record in records
        if isinstance(record.spec, TrainSpec) and is_dense(record.spec) and (about is None or record.spec.task in about)
    }
    listed = "; ".join(f"{title} {size}" for title, size in sizes.items())
    return f"Examples here, training / scored: {listed}." if sizes else ""


def distinct(rows: pd.DataFrame, column: str) -> str:
    """The values of ``column`` as captions and evidence name them: each once, in order."""
    return " and ".join(str(value) for value in sorted(rows[column].unique()))


def machines(rows: pd.DataFrame) -> str:
    """The processors that ``rows`` (column cpu) were timed on."""
    return distinct(rows, "cpu")


def summarise(frame: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Mean, 95 % bootstrap interval and n of ``value`` for every group."""
    rows = []
    for key, group in frame.groupby(list(by), sort=False):
        interval = bootstrap_interval(group[value])
        names = key if isinstance(key, tuple) else (key,)
        rows.append(dict(zip(by, names, strict=True)) | {value: interval.mean, "low": interval.low,
                                                         "high": interval.high, "n": interval.n})  # fmt: skip
    return pd.DataFrame(rows, columns=[*by, value, "low", "high", "n"])


def latency_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per timed model and engine, with its conditions and the hardware it ran on."""
    rows = [
        row | {"cpu": record.ran_on(row["engine"])} | record["models"][row["model"]]
        | {"file_bytes": row["size_bytes"], "agreement": record["agreement"][row["name"]]["relative_diff"]}
        for record in records
        if isinstance(record.spec, LatencySpec)
        for row in record["rows"]
    ]  # fmt: skip
    return pd.DataFrame(rows)


def training_speed_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per model of a training-speed run, with its conditions."""
    rows = [
        row | {"batch": record.spec.batch, "length": record.spec.length, "threads": record.spec.threads,
               "precision": "bf16" if record.spec.bf16 else "fp32", "cpu": record.machine}
        for record in records
        if isinstance(record.spec, TrainingSpeedSpec)
        for row in record["rows"]
    ]  # fmt: skip
    return pd.DataFrame(rows)


def published_retained(paper: str, layers: int, **filters: Any) -> pd.DataFrame:
    """Published scores as a share (percent) of the same table's dense score, with the share of layers dropped.

    Args:
        layers: of the published model.
        filters: of ``published``; must leave one dense row (K = 0) per task.

    Returns:
        Columns task, method, K, score, retained, dropped_share (0 to 1), evidence.
    """
    rows = published(paper, metric="score", **filters)
    dense = rows[rows["K"] == 0].set_index("task")["value"]
    frame = rows.rename(columns={"value": "score"})[["task", "method", "K", "score", "evidence"]].copy()
    frame["retained"] = 100 * frame["score"] / frame["task"].map(dense)
    frame["dropped_share"] = frame["K"] / layers
    return frame
