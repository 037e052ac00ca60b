"""From the records of notebook 03 to its frames: gradual, one-shot, upstream and compound pruning, sparse engines."""

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
EPOCHS = {"long": 30, "short": 10}  # the paper's schedule whose shape a budget has


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
    times fewer bytes the model takes than the dense one's file, in its smallest encoding or both gzipped (the dense one
    is then the task's control, whose gzipped size hardly depends on the seed). ``constant`` models answer the same
    whatever is asked.

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
            "constant": bool(record.result.get("constant_prediction")),
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    dense = frame[frame["kind"] == "dense"].groupby(["task", "seed"])[["score", "dense_bytes"]].first()
    frame["retained"] = 100 * frame["score"].to_numpy() / of_same_seed(frame, dense["score"])
    frame["smaller"] = of_same_seed(frame, dense["dense_bytes"]) / frame["bytes"].to_numpy()
    control = frame[frame["kind"] == "control"].groupby("task")["gzip_bytes"].mean()
    frame["smaller_gzip"] = frame["task"].map(control) / frame["gzip_bytes"]
    return frame


def full_depth(quality: pd.DataFrame, budget: str) -> pd.DataFrame:
    """Of ``obert_frame`` the gradually pruned models that keep every layer, of one budget."""
    deep = quality["layers"] == quality["layers"].max()
    return quality[(quality["kind"] == "gradual") & (quality["budget"] == budget) & deep]


def compounds(quality: pd.DataFrame) -> pd.DataFrame:
    """Of ``obert_frame`` the models that a compound may be made of: oBERT's, gradual, the long way, INT8 or not.

    Models that were pruned as language models (*transfer*) are none of them, whatever their schedule was.
    """
    made = quality["kind"].isin(["gradual", "int8"]) & quality["method"].isin(["obert", "obert-block4"])
    return quality[made & (quality["budget"] == "long")]


def float64_prunings(records: Iterable[Record]) -> tuple[int, int]:
    """How many of oBERT's prunings took their gradients again in float64, and how many prunings there are."""
    steps = [
        "float64" in step
        for record in records
        if isinstance(record.spec, TrainSpec | UpstreamSpec) and record.spec.compressor is not None
        and record.spec.compressor.name == "obert" and record.spec.compressor.settings["importance"] == "obert"
        for step in record["compression"].get("history", [])
    ]  # fmt: skip
    return sum(steps), len(steps)


def layer_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Sparsity (percent) of every matrix of every gradually pruned model: task, method, target, layer, part.

    ``constant`` models answer the same whatever is asked, so where their zeros are explains little.
    """
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
                    "constant": bool(record.result.get("constant_prediction")),
                })  # fmt: skip
    columns = ["task", "method", "budget", "target", "layers", "seed", "layer", "part", "sparsity", "constant"]
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
    """One row per timed model, engine, batch and length, with its time and what it is compared with.

    A machine may be faster in one run than in another, and no run holds all engines. So every time is carried to the
    median over runs of the dense full model on its engine: ``anchored ms`` is the model's median times that one over
    the dense model's median in the same run. ``low ms`` and ``high ms`` are its quartiles, carried to the fastest and
    the slowest of these runs. All ratios are of these times, with ``… low`` and ``… high``: ``over fp32`` to the dense
    full model on the plain fp32 engine of the same family (NaN where there is none), ``over best dense`` to the dense
    full model on the fastest engine under the same conditions, which is what a sparse model has to beat.

    Times of two machines are never compared: ``instructions`` (of the spec, "" for any processor) tells rows apart
    that were timed for a kind of processor, and of those for any, at each batch and length, the runs of that processor
    are here which has most of them.
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
                "q3_ms": row["q3_ms"], "run": record.hash, "cpu": record.ran_on(row["engine"]),
                "isa": " ".join(record.hardware.get("isa", ())), "instructions": spec.instructions,
                "file (MB)": row["size_bytes"] / 1e6,
            })  # fmt: skip
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    condition = ["instructions", "batch", "length"]
    runs = frame.groupby([*condition, "cpu"])["run"].nunique().sort_values(ascending=False, kind="stable")
    most = runs.reset_index().drop_duplicates(condition).set_index(condition)["cpu"]
    frame = frame[frame["cpu"] == _beside(frame, most)].reset_index(drop=True)
    is_whole = (frame["layers"] == frame["total"]) & (frame["sparsity"] == 0)
    whole = frame[is_whole]
    anchors = whole.groupby(["engine", *condition])["ms"].agg(["median", "min", "max"])
    own = _beside(frame, whole.groupby(["run", "engine", *condition])["ms"].first())
    frame["anchored ms"] = frame["ms"] * _beside(frame, anchors["median"]) / own
    same = [frame[name] for name in ("engine", "layers", "sparsity", "group", *condition)]
    for name, quartile, anchor in (("low ms", "q1_ms", "min"), ("high ms", "q3_ms", "max")):
        carried = frame[quartile] * _beside(frame, anchors[anchor]) / own
        frame[name] = carried.groupby(same).transform(anchor)
    fp32 = frame[is_whole & (frame["engine"] == frame["family"] + "-fp32")].groupby(["family", *condition]).first()
    frame["over fp32"] = _beside(frame, fp32["anchored ms"]) / frame["anchored ms"]
    frame["over fp32 low"] = _beside(frame, fp32["low ms"]) / frame["high ms"]
    frame["over fp32 high"] = _beside(frame, fp32["high ms"]) / frame["low ms"]
    fastest = frame[is_whole].sort_values("anchored ms").groupby(condition).first()
    frame["over best dense"] = _beside(frame, fastest["anchored ms"]) / frame["anchored ms"]
    frame["over best dense low"] = _beside(frame, fastest["low ms"]) / frame["high ms"]
    frame["over best dense high"] = _beside(frame, fastest["high ms"]) / frame["low ms"]
    return frame


def _beside(frame: pd.DataFrame, reference: pd.Series) -> np.ndarray:
    """The value of ``reference`` for every row, found by the columns that its index is named after."""
    return reference.reindex(pd.MultiIndex.from_frame(frame[list(reference.index.names)])).to_numpy()


def crossover(curve: pd.DataFrame, level: Mapping[str, float] | pd.Series) -> tuple[float, float]:
    """Measured sparsities (percent) up to which a curve is slower than a level, and from which on it is faster.

    Where quartiles overlap it is neither. NaN where nothing that was measured is slower, or faster.

    Args:
        curve: columns sparsity, ``low ms`` and ``high ms``.
        level: a row with ``low ms`` and ``high ms``.
    """
    points = curve.sort_values("sparsity")
    slower = np.logical_and.accumulate((points["low ms"] > level["high ms"]).to_numpy())
    faster = np.logical_and.accumulate((points["high ms"] < level["low ms"]).to_numpy()[::-1])[::-1]
    return float(points["sparsity"][slower].max()), float(points["sparsity"][faster].min())


def checkpoint_frame(records: Iterable[Record], quality: pd.DataFrame) -> pd.DataFrame:
    """The authors' checkpoints as evaluated here, beside their printed scores and our own runs of the same sparsity.

    Args:
        records: of the plan ``published_checkpoints``.
        quality: ``obert_frame``; may be empty.

    Returns:
        One row per checkpoint: task, checkpoint, sparsity (percent), score, printed (30 epochs; NaN without one),
        ours (mean score of the long gradual runs at full depth), seeds.
    """
    theirs = published("kurtic2022", place="Table 1", kind="gradual", method="obert", epochs=30)
    printed = theirs.set_index(["task", "sparsity"])["value"]
    long = full_depth(quality, "long").query("method == 'obert'") if len(quality) else quality
    own = long.groupby(["task", long["target"].round()])["score"].agg(["mean", "size"]) if len(long) else pd.DataFrame()
    rows = []
    for record in records:
        spec: Any = record.spec
        sparsity = 100 * _zeros(record["compression"])
        which = spec.task, round(sparsity)
        mean, seeds = own.loc[which] if which in own.index else (np.nan, 0)
        rows.append({
            "task": TASKS[spec.task].title, "checkpoint": spec.encoder.split("/")[-1], "sparsity": sparsity,
            "score": record["score"], "printed": printed.get(which, np.nan),
            "ours": mean, "seeds": int(seeds),
        })  # fmt: skip
    return pd.DataFrame(rows)


def against_published(quality: pd.DataFrame) -> pd.DataFrame:
    """Retained share of gradually pruned models of full depth beside the paper's after 30 epochs and after 10.

    Returns:
        One row per title, method, target and budget: mean, sd, seeds, constant (how many answer the same whatever is
        asked), a column for each of ``EPOCHS``, and the difference of the runs that are not constant to the one whose
        shape the budget has (NaN where all are).
    """
    theirs = published_frame()
    theirs = theirs[(theirs["kind"] == "gradual") & (theirs["layers"] == 12)]
    printed = theirs.groupby(["method", "sparsity", "epochs"])["retained"].mean()  # tables repeat each other's numbers
    rows = pd.concat([full_depth(quality, budget) for budget in EPOCHS]).dropna(subset=["retained"])
    ours = rows.groupby(["title", "method", "target", "budget"], sort=False).agg(
        mean=("retained", "mean"), sd=("retained", "std"), seeds=("seed", "nunique"), constant=("constant", "sum")
    ).reset_index()  # fmt: skip
    for epochs in EPOCHS.values():
        ours[epochs] = [printed.get((row.method, row.target, epochs), np.nan) for row in ours.itertuples()]
    key = ["title", "method", "target", "budget"]
    own = _beside(ours, rows[~rows["constant"].astype(bool)].groupby(key)["retained"].mean())
    ours["difference"] = own - [row[EPOCHS[row["budget"]]] for _, row in ours.iterrows()]
    return ours


def published_frame(task: str = "squad_v1") -> pd.DataFrame:
    """Published scores with their retained share, and the settings that each belongs to."""
    rows = published("kurtic2022", task=task, metric="score")
    dense = rows[(rows["kind"] == "dense") & (rows["place"] == "Table 1")]["value"].iloc[0]
    columns = ["kind", "method", "sparsity", "epochs", "layers", "bits", "recomputations", "place", "evidence"]
    return rows[columns].assign(score=rows["value"], retained=100 * rows["value"] / dense)
