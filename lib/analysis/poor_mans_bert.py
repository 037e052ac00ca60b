"""From the records of notebooks 01 and 05 to their frames: scores and retained shares, procedures, strategies."""

from collections.abc import Iterable, Mapping

import pandas as pd

from lib.analysis import of_same_seed, one_label_scores, uninformative
from lib.config import StudyError
from lib.data import TASKS
from lib.records import Record
from lib.specs import ContributionSpec, TrainSpec

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
    ``floor`` is the score of always giving the most frequent label, where ``records`` hold it; a task is
    ``informative`` unless it is among ``analysis.uninformative``.
    """
    records = list(records)
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
    frame["retained"] = 100 * frame["score"].to_numpy() / of_same_seed(frame, dense)
    frame["k"] = frame["drop"].map(len)
    frame["floor"] = frame["task"].map(one_label_scores(records)).astype(float)
    frame["informative"] = ~frame["task"].isin(uninformative(records))
    return frame


def with_most_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the tasks that have as many seeds as any task, so that the mean of every seed is over the same tasks."""
    seeds = rows.groupby("task")["seed"].nunique()
    return rows[rows["task"].isin(seeds[seeds == seeds.max()].index)]


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
