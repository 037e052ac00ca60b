"""From records to the frames that figures, tables and sentences are made of. Nothing here measures anything."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from lib.config import StudyError
from lib.data import TASKS
from lib.figures import bootstrap_interval
from lib.published import published
from lib.runs import Record
from lib.specs import ContributionSpec, LatencySpec, TrainingSpeedSpec, TrainSpec

PROCEDURES = {
    "dense": "dense",
    "before": "drop, then fine-tune",
    "distilled": "drop, then distil",
    "iterative": "drop while fine-tuning",
    "after": "fine-tune, drop, fine-tune",
    "untrained": "fine-tune, drop",
}


def procedure(spec: TrainSpec) -> str:
    """Which of ``PROCEDURES`` a run is."""
    if spec.compressor is None:
        return "dense"
    if spec.start is not None:
        return "after" if spec.training.epochs else "untrained"
    if spec.compressor.settings.get("iterative"):
        return "iterative"
    return "distilled" if spec.teacher else "before"


def quality_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per training run: task, seed, procedure, dropped layers, score (percent) and retained share.

    ``retained`` is the score as a share (percent) of the dense score of the same task and seed; NaN without one.
    """
    rows = []
    for record in records:
        spec = record.spec
        if not isinstance(spec, TrainSpec):
            continue
        training = record.result.get("training", {})
        rows.append({
            "hash": record.hash, "task": spec.task, "title": TASKS[spec.task].title, "seed": spec.seed,
            "procedure": procedure(spec), "drop": tuple(record["compression"].get("dropped_layers", ())),
            "score": record["score"], "layers": record["model"]["layers"],
            "parameters": record["model"]["parameters"], "size_bytes": record["model"]["size_bytes"],
            "train_s": training.get("seconds", 0.0),
            "examples_per_s": training["examples"] / training["seconds"] if training else float("nan"),
        })  # fmt: skip
    if not rows:
        raise _nothing_yet("training run")
    frame = pd.DataFrame(rows)
    dense = frame[frame["procedure"] == "dense"].set_index(["task", "seed"])["score"]
    keys = pd.MultiIndex.from_frame(frame[["task", "seed"]])
    frame["retained"] = 100 * frame["score"].to_numpy() / dense.reindex(keys).to_numpy()
    frame["k"] = frame["drop"].map(len)
    return frame


def _nothing_yet(what: str) -> StudyError:
    return StudyError(
        f"no {what} is finished yet; give the data that the profile wants (data_dir) and leave budget_minutes out"
    )


def contribution_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per task and layer (1 is the lowest): the similarity of what goes into it and what comes out.

    Raises:
        StudyError: nothing is measured yet.
    """
    rows = [
        {"task": record.spec.task, "layer": layer, "similarity": similarity}
        for record in records
        if isinstance(record.spec, ContributionSpec)
        for layer, similarity in enumerate(record["similarity"], start=1)
    ]
    if not rows:
        raise _nothing_yet("layer contribution")
    return pd.DataFrame(rows)


def strategy_frame(quality: pd.DataFrame, sets: Mapping[str, Mapping[tuple[str, str], tuple[int, ...]]],
                   kind: str = "before") -> pd.DataFrame:  # fmt: skip
    """Rows of one procedure under the name of every strategy that drops just those layers; one run may serve several.

    Args:
        sets: task -> (strategy, variant) -> layers, from ``plans.layer_sets``.
    """
    chosen = quality[quality["procedure"] == kind]
    parts = []
    for task, variants in sets.items():
        rows = chosen[chosen["task"] == task]
        for (strategy, variant), drop in variants.items():
            part = rows[rows["drop"] == drop]
            parts.append(part.assign(strategy=strategy, variant=variant))
    return pd.concat(parts, ignore_index=True) if parts else chosen.assign(strategy="", variant="")


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
        row | {"cpu": record.hardware.get("cpu", "")} | record["models"][row["model"]]
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
               "precision": "bf16" if record.spec.bf16 else "fp32", "cpu": record.hardware.get("cpu", "")}
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
