"""From the records of notebook 04 to its frames: densities and scores, what died where, scores in training, speed."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lib import engines, figures
from lib.analysis import latency_frame, of_same_seed, one_label_scores, uninformative
from lib.compressors.block_movement import BlockMovement
from lib.data import TASKS
from lib.published import published
from lib.published_shapes import HEADLINE, PublishedShape, published_shapes, shapes_frame
from lib.records import Record
from lib.specs import TrainSpec, TranslationSpec, spec_hash

AnySpec = TrainSpec | TranslationSpec
COLUMNS = ["hash", "task", "title", "seed", "method", "strength", "block", "density", "stored", "heads", "units",
           "score", "size_bytes", "train_s", "constant", "held"]  # fmt: skip
PAIR = ("task", "title", "seed", "strength", "block")  # what two runs have in common that are compared


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


def pruning_of(spec: AnySpec) -> AnySpec:
    """The run that pruned: ``spec`` itself, or the one whose zeros it fills."""
    if spec.compressor is not None and spec.compressor.name == "refill":
        assert isinstance(spec.start, TrainSpec)
        return pruning_of(spec.start)
    return spec


def strength_of(spec: AnySpec) -> tuple[float, tuple[int, int]]:
    """lambda_f or density, and the block, of the pruning behind a run; NaN and (0, 0) for a dense one."""
    compressor = pruning_of(spec).compressor
    if compressor is None:
        return float("nan"), (0, 0)
    settings = BlockMovement.Settings.model_validate(compressor.settings)
    return settings.final_lambda if settings.density is None else settings.density, settings.block


def block_name(block: Sequence[int]) -> str:
    """A block's size as frames and tables have it."""
    return f"{block[0]} × {block[1]}"


def block_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per training run of notebook 04, generation included.

    ``density`` and ``stored`` are percent of the dense model's linear weights: non-zero, and left after removal.
    ``retained`` is the score as a share (percent) of the dense score of the same task and seed, NaN without one or
    where it is 0. ``floor`` is the score of one answer for all where ``records`` hold it, ``informative`` as in
    ``analysis.uninformative``. ``constant`` models answer the same whatever is asked; ``held`` where the penalty would
    have pruned more than the least density let it. Empty when no run is finished.
    """
    records, rows = list(records), []
    runs = [record for record in records if isinstance(record.spec, TrainSpec | TranslationSpec)]
    held = {record.hash for record in runs if record["compression"].get("history", [{}])[-1].get("held")}
    for record in runs:
        spec: AnySpec = record.spec  # type: ignore[assignment]
        summary, method, (strength, block) = record["compression"], method_of(spec), strength_of(spec)
        rows.append({
            "hash": record.hash, "task": spec.task, "title": TASKS[spec.task].title, "seed": spec.seed,
            "method": method, "strength": strength,
            "block": "whole heads" if method == "struct" else block_name(block),
            "density": 100 * summary.get("density", 1.0), "stored": 100 * summary.get("stored_density", 1.0),
            "heads": sum(summary["heads"]) if "heads" in summary else np.nan,
            "units": sum(summary["units"]) if "units" in summary else np.nan,
            "score": record["score"], "size_bytes": record["model"]["size_bytes"],
            "train_s": record.result.get("training", {}).get("seconds", 0.0),
            "constant": bool(record.result.get("constant_prediction")), "held": spec_hash(pruning_of(spec)) in held,
        })  # fmt: skip
    frame = pd.DataFrame(rows, columns=COLUMNS)
    dense = frame[frame["method"] == "dense"].set_index(["task", "seed"])["score"]
    frame["retained"] = 100 * frame["score"].to_numpy() / of_same_seed(frame, dense)
    frame["floor"] = frame["task"].map(one_label_scores(records)).astype(float)
    frame["informative"] = ~frame["task"].isin(uninformative(records))
    return frame.astype({"held": bool})


def held_count(held: pd.Series) -> str:
    """In how many runs the least density held, as "1 of 3"; empty for none."""
    return f"{held.sum()} of {len(held)}" if held.any() else ""


def at_block(frame: pd.DataFrame, block: str) -> pd.DataFrame:
    """The rows of ``block_frame`` without hybrid models of other blocks, which would be averaged with those of this."""
    return frame[(frame["block"] == block) | ~frame["method"].map(lambda name: name.startswith("hybrid")).astype(bool)]


def block_trials(frame: pd.DataFrame, sizes: Sequence[str]) -> pd.DataFrame:
    """Hybrid models of several block ``sizes``: at their task's first strength, of seeds that have all of its sizes."""
    rows = _at_first_strength(frame[(frame["method"] == "hybrid") & frame["block"].isin(sizes)])
    different = rows.groupby("task")["block"].transform("nunique")
    whole = rows.groupby(["task", "seed"])["block"].transform("nunique") == different
    return rows[whole & (different > 1)]


def _at_first_strength(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["strength"] == rows.groupby("task")["strength"].transform("first")]


def paired(frame: pd.DataFrame, one: str, other: str, near: float = np.inf,
           by: Sequence[str] = PAIR) -> pd.DataFrame:  # fmt: skip
    """``lead`` of method ``one`` over ``other`` in points of the retained share, for what agrees in ``by``.

    Pairs whose densities differ by more than ``near`` are left out: the same lambda need not prune as much. ``held``
    where the least density held in either of the two.
    """
    rows = frame[frame["method"].isin([one, other])].dropna(subset=["retained"])
    if {one, other} - set(rows["method"]):
        return pd.DataFrame(columns=[*by, "lead", "held"])
    table = rows.pivot_table(index=list(by), columns="method", values=["retained", "density", "held"]).dropna()
    table = table[(table["density"][one] - table["density"][other]).abs() <= near]
    lead = (table["retained"][one] - table["retained"][other]).rename("lead").to_frame()
    return lead.assign(held=table["held"].gt(0).any(axis=1)).reset_index()


def beside_control(frame: pd.DataFrame, block: str) -> pd.DataFrame:
    """``paired``: hybrid pruning of one block at the first strength against training as long with the same teacher."""
    pruned = _at_first_strength(frame[(frame["method"] == "hybrid") & (frame["block"] == block)])
    both = frame[frame.index.isin(pruned.index) | (frame["method"] == "dense-distilled")]
    return paired(both, "hybrid", "dense-distilled", by=("task", "title", "seed"))


def filled_speed(frame: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """How fast filled models are beside the hybrid ones they were made from (``ratio``), one row per pair and engine.

    Args:
        frame: of ``block_frame``.
        own: ``analysis.latency_frame`` of ``plans.trained_speed``; may be empty.
    """
    if own.empty:
        return own
    timed = own.merge(frame[["hash", "method", *PAIR]], left_on="model", right_on="hash")
    keys = [*PAIR, "engine", "cpu", "batch", "length", "threads"]
    table = timed.pivot_table(index=keys, columns="method", values="median_ms")
    table = table.reindex(columns=["hybrid", "hybrid-filled"]).dropna()
    return (table["hybrid"] / table["hybrid-filled"]).rename("ratio").reset_index()


def not_timed(wanted: Iterable[str], timed: pd.DataFrame) -> str:
    """A sentence on the engines among ``wanted`` that ``timed`` (``latency_frame``) lacks and why; empty for none."""
    seen = set(timed["engine"]) if len(timed) else set()
    absent = [
        f"{figures.METHODS[name][2]} ({engines.unavailable_reason(name) or 'not run yet'})"
        for name in wanted
        if name not in seen
    ]
    return f"Engines left out: {'; '.join(absent)}." if absent else ""


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
