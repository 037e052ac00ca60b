"""From the records of notebook 03 to its frames: gradual, one-shot, upstream and compound pruning, sparse engines."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from lib.analysis import of_same_seed, training_runs
from lib.compressors.obert import TEN_EPOCHS
from lib.config import StudyError
from lib.data import TASKS
from lib.models import ARCHITECTURES, layer_count
from lib.published import published
from lib.records import Record
from lib.sparse_storage import smallest
from lib.specs import LatencySpec, TrainSpec, UpstreamSpec

# What a run of notebook 03 is.
KINDS = {
    "dense": "dense", "control": "dense, same recipe", "gradual": "gradual", "one-shot": "one-shot",
    "int8": "sparse and INT8", "transfer": "sparse transfer", "dense transfer": "transfer of the dense language model",
    "checkpoint": "published checkpoint",
}  # fmt: skip


def kind_of(spec: TrainSpec) -> str:
    """Which of ``KINDS`` a run is.

    Raises:
        StudyError: a run of another notebook.
    """
    if spec.compressor is None:
        return "dense transfer" if isinstance(spec.start, UpstreamSpec) else "dense"
    name, settings = spec.compressor.name, spec.compressor.settings
    if name == "fixed_masks":
        return "checkpoint" if spec.start is None else "transfer"
    if name == "sparse_int8":
        return "int8"
    if name == "block_movement":
        return "gradual"
    if name == "obert":
        return "control" if not settings["sparsity"] else "gradual" if spec.training.epochs else "one-shot"
    raise StudyError(f"oBERT's frame: a run with compressor '{name}' is none of notebook 03's")


def _pruning(spec: TrainSpec) -> dict[str, Any]:
    """The settings of the pruning that a run is or begins with; {} of a dense one."""
    if spec.compressor is not None and spec.compressor.name == "obert":
        return spec.compressor.settings
    if spec.compressor is not None and spec.compressor.name == "block_movement":
        return {"importance": "movement", "sparsity": round(1 - spec.compressor.settings["density"], 6), "group": 1}
    start = spec.start
    if isinstance(start, UpstreamSpec):
        return start.compressor.settings if start.compressor else {}
    return _pruning(start) if isinstance(start, TrainSpec) else {}


def method_of(spec: TrainSpec) -> str:
    """A name in ``lib.figures.METHODS``."""
    settings = _pruning(spec)
    if not settings.get("sparsity"):
        return "obert" if kind_of(spec) == "checkpoint" else "dense"
    return "obert-block4" if settings["group"] == 4 else settings["importance"]


def budget_of(spec: TrainSpec) -> str:
    """ "short" or "long", by the shape of the schedule; "" of a run that prunes nothing on the way."""
    if method_of(spec) == "movement":
        return "long"
    moments = _pruning(spec).get("prune_at")
    if not moments:
        return ""
    return "short" if len(moments) == len(TEN_EPOCHS["prune_at"]) else "long"


def _zeros(compression: Mapping[str, Any]) -> float:
    """Share of the encoder's linear weights that are gone."""
    return compression.get("sparsity", 1 - compression["density"] if "density" in compression else 0.0)


def _zeros_by_layer(compression: Mapping[str, Any]) -> list[dict[str, float]]:
    """The same for every matrix of every layer; [] of a run that prunes none."""
    densities = compression.get("densities", {})
    layers = range(len(next(iter(densities.values()), ())))
    return compression.get("per_layer") or [
        {part: 1 - densities[part][layer] for part in densities} for layer in layers
    ]


def obert_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per training run: what it is, realised sparsity (percent), score, retained share, bytes as stored.

    ``retained`` refers to the dense score of the same task and seed; ``smaller`` and ``smaller_gzip`` say how many
    times fewer bytes the model takes than the dense one's file, in its smallest encoding or both gzipped.

    Raises:
        StudyError: no run is finished.
    """
    rows = []
    for record in training_runs(records):
        spec: Any = record.spec
        compression, training = record["compression"], record.result.get("training", {})
        settings, storage = _pruning(spec), compression.get("storage", {})
        encoding, size = smallest(storage) if storage else ("", np.nan)
        rows.append({
            "hash": record.hash, "task": spec.task, "title": TASKS[spec.task].title, "seed": spec.seed,
            "kind": kind_of(spec), "method": method_of(spec), "budget": budget_of(spec),
            "layers": record["model"]["layers"], "group": settings.get("group", 1),
            "recomputations": settings.get("recomputations", 1),
            "sparsity": 100 * _zeros(compression), "target": 100 * settings.get("sparsity", 0.0),
            "bits": compression.get("bits", 32), "score": record["score"], "train_s": training.get("seconds", 0.0),
            "dense_bytes": record["model"]["size_bytes"] if spec.compressor is None else np.nan,
            "encoding": encoding, "bytes": size, "gzip_bytes": storage.get("gzip", np.nan),
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    dense = frame[frame["kind"] == "dense"].groupby(["task", "seed"])[["score", "dense_bytes"]].first()
    frame["retained"] = 100 * frame["score"].to_numpy() / of_same_seed(frame, dense["score"])
    frame["smaller"] = of_same_seed(frame, dense["dense_bytes"]) / frame["bytes"].to_numpy()
    control = frame[(frame["kind"] == "control")].groupby(["task", "seed"])["gzip_bytes"].first()
    frame["smaller_gzip"] = of_same_seed(frame, control) / frame["gzip_bytes"].to_numpy()
    return frame


def layer_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Sparsity (percent) of every matrix of every gradually pruned model: task, method, target, layer, part."""
    rows = []
    for record in records:
        spec = record.spec
        if not isinstance(spec, TrainSpec) or kind_of(spec) != "gradual":
            continue
        for number, parts in enumerate(_zeros_by_layer(record["compression"]), start=1):
            for part, share in parts.items():
                rows.append({
                    "task": spec.task, "method": method_of(spec), "budget": budget_of(spec),
                    "target": 100 * _pruning(spec)["sparsity"], "layers": record["model"]["layers"], "seed": spec.seed,
                    "layer": number, "part": part, "sparsity": 100 * share,
                })  # fmt: skip
    columns = ["task", "method", "budget", "target", "layers", "seed", "layer", "part", "sparsity"]
    return pd.DataFrame(rows, columns=columns)


def upstream_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per language model: realised sparsity, loss and accuracy on held-out masked tokens (percent)."""
    rows = [
        {"text": TASKS[record.spec.task].title, "sparsity": 100 * record["compression"].get("sparsity", 0.0),
         "loss": record["loss"], "accuracy": record["accuracy"], "training examples": record["train_examples"]}
        for record in records if isinstance(record.spec, UpstreamSpec)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["text", "sparsity", "loss", "accuracy", "training examples"])


def speed_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per timed model and engine: layers, sparsity (percent), group, milliseconds and three ratios.

    ``on engine`` is the dense full model's time on the same engine and in the same run over this one's; ``over fp32``
    that of the plain fp32 engine of the same family, in the same run where both are there; ``over best dense`` the
    fastest dense full model's of any engine under the same conditions, which is what a sparse model has to beat.

    A machine may be faster in one run than in another, and no run holds all engines. So rows of different runs are
    compared by ``anchored ms``: the dense full model's median over all runs on this engine, divided by ``on engine``.
    """
    rows = []
    for record in records:
        spec = record.spec
        if not isinstance(spec, LatencySpec):
            continue
        for row in record["rows"]:
            model = spec.models[row["model"]]
            total = layer_count(ARCHITECTURES[model.architecture])
            rows.append({
                "model": row["model"], "engine": row["engine"], "precision": row["precision"],
                "family": row["engine"].split("-")[0], "layers": total - len(model.drop), "total": total,
                "sparsity": 100 * model.sparsity, "group": model.group, "batch": row["batch"], "length": row["length"],
                "threads": row["threads"], "n": row["n"], "ms": row["median_ms"], "q1_ms": row["q1_ms"],
                "q3_ms": row["q3_ms"], "on engine": row["ratio_to_dense"], "run": record.hash,
                "cpu": record.hardware.get("cpu", ""), "file (MB)": row["size_bytes"] / 1e6,
            })  # fmt: skip
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    condition = ["batch", "length"]
    whole = frame[(frame["layers"] == frame["total"]) & (frame["sparsity"] == 0)]
    anchors = whole.groupby(["engine", *condition])["ms"].median()
    frame["anchored ms"] = _beside(frame, anchors) / frame["on engine"]
    fp32 = whole[whole["engine"] == whole["family"] + "-fp32"]
    near = _beside(frame, fp32.groupby(["run", "family", *condition])["ms"].first()) / frame["ms"]
    far = _beside(frame, fp32.groupby(["family", *condition])["ms"].median()) / frame["anchored ms"]
    frame["over fp32"] = near.fillna(far)
    frame["over best dense"] = _beside(frame, anchors.groupby(condition).min()) / frame["anchored ms"]
    return frame


def _beside(frame: pd.DataFrame, reference: pd.Series) -> np.ndarray:
    """The value of ``reference`` for every row, found by the columns that its index is named after."""
    return reference.reindex(pd.MultiIndex.from_frame(frame[list(reference.index.names)])).to_numpy()


def crossover(sparsity: Iterable[float], ms: Iterable[float], level: float) -> float:
    """Sparsity (percent) from which a curve lies below ``level`` milliseconds; NaN when it never does.

    Between two measured points the time is taken to fall linearly with sparsity.
    """
    points = sorted(zip(sparsity, ms, strict=True))
    if not points:
        return float("nan")
    if points[0][1] <= level:
        return points[0][0]
    for (left, before), (right, after) in itertools.pairwise(points):
        if after <= level < before:
            return left + (right - left) * (before - level) / (before - after)
    return float("nan")


def published_frame(task: str = "squad_v1") -> pd.DataFrame:
    """Published scores with their retained share, and the settings that each belongs to."""
    rows = published("kurtic2022", task=task, metric="score")
    dense = rows[(rows["kind"] == "dense") & (rows["place"] == "Table 1")]["value"].iloc[0]
    columns = ["kind", "method", "sparsity", "epochs", "layers", "bits", "recomputations", "place", "evidence"]
    return rows[columns].assign(score=rows["value"], retained=100 * rows["value"] / dense)
