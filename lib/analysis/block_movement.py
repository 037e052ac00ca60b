"""From the records of notebook 04 to its frames: densities and scores, what died where, scores in training, speed."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lib.analysis import latency_frame, of_same_seed
from lib.compressors.block_movement import BlockMovement
from lib.data import TASKS
from lib.published import published
from lib.published_shapes import HEADLINE, PublishedShape, published_shapes, shapes_frame
from lib.records import Record
from lib.specs import TrainSpec, TranslationSpec

AnySpec = TrainSpec | TranslationSpec
COLUMNS = ["hash", "task", "title", "seed", "method", "strength", "block", "density", "stored", "heads", "units",
           "score", "size_bytes", "train_s", "constant"]  # fmt: skip


def method_of(spec: AnySpec) -> str:
    """Name in ``lib.figures.METHODS`` of the way a run prunes, "dense" and "dense-distilled" without one."""
    teacher = spec.teacher if isinstance(spec, TrainSpec) else None
    if spec.compressor is None:
        return "dense-distilled" if teacher else "dense"
    if spec.compressor.name == "refill":
        assert isinstance(spec.start, TrainSpec)
        return "hybrid-large-filled" if method_of(spec.start) == "hybrid-large" else "hybrid-filled"
    settings = BlockMovement.Settings.model_validate(spec.compressor.settings)
    if settings.importance == "magnitude":
        return "magnitude"
    if settings.block == (1, 1):
        return "movement"
    if settings.variant != "hybrid":
        return settings.variant
    if settings.mask == "top-k":
        return "hybrid-top-k"
    if teacher is None:
        return "hybrid-alone"
    return "hybrid" if teacher.encoder == spec.encoder else "hybrid-large"  # type: ignore[union-attr]


def strength_of(spec: AnySpec) -> tuple[float, tuple[int, int]]:
    """lambda_f or density, and the block, of the pruning behind a run; NaN and (0, 0) for a dense one."""
    if spec.compressor is not None and spec.compressor.name == "refill":
        assert isinstance(spec.start, TrainSpec)
        return strength_of(spec.start)
    if spec.compressor is None:
        return float("nan"), (0, 0)
    settings = BlockMovement.Settings.model_validate(spec.compressor.settings)
    return settings.final_lambda if settings.density is None else settings.density, settings.block


def block_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per training run of notebook 04, generation included.

    ``density`` and ``stored`` are percent of the dense model's linear weights: non-zero, and left after removal.
    ``retained`` is the score as a share (percent) of the dense score of the same task and seed, NaN without one or
    where it is 0. ``constant`` models answer the same whatever is asked. Empty when no run is finished.
    """
    rows = []
    for record in records:
        spec = record.spec
        if not isinstance(spec, TrainSpec | TranslationSpec):
            continue
        summary, (strength, block) = record["compression"], strength_of(spec)
        rows.append({
            "hash": record.hash, "task": spec.task, "title": TASKS[spec.task].title, "seed": spec.seed,
            "method": method_of(spec), "strength": strength, "block": f"{block[0]} × {block[1]}",
            "density": 100 * summary.get("density", 1.0), "stored": 100 * summary.get("stored_density", 1.0),
            "heads": sum(summary["heads"]) if "heads" in summary else np.nan,
            "units": sum(summary["units"]) if "units" in summary else np.nan,
            "score": record["score"], "size_bytes": record["model"]["size_bytes"],
            "train_s": record.result.get("training", {}).get("seconds", 0.0),
            "constant": bool(record.result.get("constant_prediction")),
        })  # fmt: skip
    frame = pd.DataFrame(rows, columns=COLUMNS)
    dense = frame[frame["method"] == "dense"].set_index(["task", "seed"])["score"]
    frame["retained"] = 100 * frame["score"].to_numpy() / of_same_seed(frame, dense.where(dense > 0))
    return frame


def shown_task(frame: pd.DataFrame, tasks: Sequence[str]) -> str:
    """The task of the figures that show one: the first of ``tasks`` with a pruned run beside a dense one, or the first.

    Args:
        frame: of ``block_frame``.
    """
    pruned = set(frame[(frame["method"] != "dense") & frame["retained"].notna()]["task"])
    return next((task for task in tasks if task in pruned), tasks[0])


def published_curves() -> pd.DataFrame:
    """SQuAD 1.1 on BERT-base as printed (Table 2): method, teacher, density in percent, speed-up, F1, retained."""
    rows = published("lagunas2021", place="v1 Table 2", model="BERT-base", task="squad_v1")
    frame = rows.pivot_table(index=["method", "teacher", "weights"], columns="metric", values="value").reset_index()
    dense = frame[frame["method"] == "dense"].iloc[0]
    frame["density"] = 100 / frame["compression"]
    frame["retained"] = 100 * frame["score"] / dense["score"]
    return frame.rename_axis(columns=None)


def find(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Training records whose method, task, seed, strength or block equal ``wanted``, in order."""
    found = []
    for record in records:
        if isinstance(record.spec, TrainSpec | TranslationSpec):
            strength, block = strength_of(record.spec)
            about = {"method": method_of(record.spec), "task": record.spec.task, "seed": record.spec.seed,
                     "strength": strength, "block": block}  # fmt: skip
            if all(about[key] == value for key, value in wanted.items()):
                found.append(record)
    return found


def survivors(record: Record) -> pd.DataFrame:
    """What one run kept: kind ("heads", "units"), place, index of the place from 1, and how many."""
    summary = record["compression"]
    return pd.DataFrame([
        {"kind": kind, "place": place, "index": index, "kept": kept}
        for kind, part in (("heads", "attention"), ("units", "ffn"))
        for index, (place, kept) in enumerate(zip(summary["places"][part], summary[kind], strict=True), start=1)
    ])  # fmt: skip


def part_densities(record: Record) -> pd.DataFrame:
    """Share of non-zero weights (percent) of each of the six matrices, (parts, layers)."""
    densities = record["compression"]["densities"]
    frame = pd.DataFrame(densities).T * 100
    frame.columns = [f"layer {i}" for i in range(1, frame.shape[1] + 1)]
    return frame


def history_frame(record: Record) -> pd.DataFrame:
    """The schedule and what it did, one row per point of training: threshold, lambda, densities in percent, heads and
    units alive in all."""
    return pd.DataFrame([
        {
            "progress": point["progress"], "threshold": point["threshold"], "lambda": point["lambda"],
            **{f"{part} density": 100 * share for part, share in point["density"].items()},
            "heads": sum(point["heads"]), "units": sum(point["units"]),
        }
        for point in record["compression"]["history"]
    ])  # fmt: skip


def alive(record: Record, kind: str) -> tuple[np.ndarray, list[float]]:
    """Heads or units alive, (points, places), and the progress of each point."""
    history = record["compression"]["history"]
    return np.array([point[kind] for point in history]), [point["progress"] for point in history]


def score_counts(record: Record, kind: str) -> tuple[np.ndarray, list[float], list[float]]:
    """Histogram of the scores over training: counts (points, bins), progress of each point, bin edges."""
    history = record["compression"]["history"]
    counts = np.array([point["score_counts"][kind] for point in history])
    return counts, [point["progress"] for point in history], record["compression"]["bins"]


def shape_speed_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Our speed-ups of the published shapes beside the published ones: one row per checkpoint, engine and batch.

    ``ours`` is against dense BERT-base on the same engine in the same run, as ``speedup`` is on the authors' GPU.
    Empty when nothing is timed.
    """
    timed = latency_frame(records)
    if timed.empty:
        return timed
    timed = timed[~timed["model"].str.startswith("dense")]
    columns = {"model": "shape", "ratio_to_dense": "ours"}
    kept = ["engine", "model", "ratio_to_dense", "ratio_q1", "ratio_q3", "median_ms", "batch", "length", "threads", "n",
            "cpu"]  # fmt: skip
    return shapes_frame().merge(timed[kept].rename(columns=columns), on="shape")


def speed_summary(frame: pd.DataFrame) -> pd.DataFrame:
    """How published speed-ups carry over: per engine the median ratio of ours to theirs, and the rank correlation.

    Args:
        frame: ``shape_speed_frame``; one row per shape counts, so a shape that two checkpoints share is not doubled.
    """
    rows = []
    for (batch, engine), part in frame.groupby(["batch", "engine"], sort=False):
        single = part.drop_duplicates("shape")
        ranks = single[["ours", "speedup"]].rank()
        rows.append({
            "engine": engine, "batch": batch, "shapes": len(single),
            "ours / published": (single["ours"] / single["speedup"]).median(),
            "rank correlation": ranks["ours"].corr(ranks["speedup"]) if len(single) > 2 else np.nan,
            "fastest, ours": single["ours"].max(), "fastest, published": single["speedup"].max(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def headline_shape() -> PublishedShape:
    """The published checkpoint behind "2.4 times faster, 74 % smaller, 1 F1 lost"."""
    return next(shape for shape in published_shapes() if shape.checkpoint == HEADLINE)
