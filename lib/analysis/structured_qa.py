"""From the records of notebook 02 to its frames: selections, operating points, what survives, the gates in training."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModel

from lib.analysis import of_same_seed, one_label_scores, summarise, training_runs, uninformative
from lib.data import TASKS
from lib.models import ARCHITECTURES
from lib.published import published
from lib.records import Record
from lib.specs import ImportanceSpec, TrainSpec
from lib.surgery import cut, even_shapes

NEAR = 0.02  # difference of a density that rounding to whole heads and units may make
NONE = "none"


def selection(spec: TrainSpec) -> str:
    """How the gates were chosen: a name in ``lib.figures.METHODS``, "dense" without a compressor."""
    if spec.compressor is None:
        return "dense"
    settings = spec.compressor.settings
    if spec.compressor.name == "l0_gates":
        return "l0" if len(settings["densities"]) == 1 else "l0-joint"
    if settings.get("importance", "given") != "given":
        return settings["importance"] + ("-iterative" if settings.get("iterative") else "")
    source = spec.informed_by[0]
    return source.method.replace("_", "-") if isinstance(source, ImportanceSpec) else selection(source)


def recovery(spec: TrainSpec) -> str:
    """What training followed the pruning: "none", "retrain", "distil" or "retrain and distil"."""
    if spec.start is None or not spec.training.epochs or (spec.compressor and spec.compressor.name == "l0_gates"):
        return NONE
    if spec.distillation is None:
        return "retrain"
    return "retrain and distil" if spec.distillation.hard else "distil"


def structured_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per training run of notebook 02.

    ``heads``, ``units`` and ``embedding`` are realised densities (shares kept, 1 where untouched), ``kind`` says which
    were pruned ("heads", "units", "both", "embedding" or "none"). ``retained`` is the score as a share (percent) of the
    dense score of the same task and seed. ``floor`` is the score of no answer to all questions where ``records`` hold
    it, ``informative`` as in ``analysis.uninformative``.

    Raises:
        StudyError: no run is finished.
    """
    rows, records = [], list(records)
    for record in training_runs(records):
        spec: Any = record.spec
        density = record["compression"].get("density", {})
        rows.append({
            "hash": record.hash, "task": spec.task, "title": TASKS[spec.task].title, "seed": spec.seed,
            "selection": selection(spec), "recovery": recovery(spec), "kind": _kind(density),
            **{kind: density.get(kind, 1.0) for kind in ("heads", "units", "embedding")},
            "score": record["score"], "layer_parameters": record["model"]["layer_parameters"],
            "size_bytes": record["model"]["size_bytes"],
            "train_s": record.result.get("training", {}).get("seconds", 0.0),
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    dense = frame[(frame["selection"] == "dense") & (frame["recovery"] == NONE)].set_index(["task", "seed"])
    frame["retained"] = 100 * frame["score"].to_numpy() / of_same_seed(frame, dense["score"])
    full = of_same_seed(frame, dense["layer_parameters"])
    frame["layers kept"] = frame["layer_parameters"].to_numpy() / full
    frame["floor"] = frame["task"].map(one_label_scores(records)).astype(float)
    frame["informative"] = ~frame["task"].isin(uninformative(records))
    return frame


def _kind(density: dict[str, float]) -> str:
    kinds = sorted(density)
    return "both" if kinds == ["heads", "units"] else kinds[0] if kinds else NONE


def published_curves() -> pd.DataFrame:
    """Figures 2 and 3 of the paper (BERT-base, digitised) as retained share: kind, selection, density, retained."""
    dense = published("mccarley2019", place="v1 sec. 4", metric="score")["value"].item()
    rows = published("mccarley2019", place=["v1 Figure 2", "v1 Figure 3"], metric="score")
    heads = rows["place"] == "v1 Figure 2"
    return pd.DataFrame({
        "kind": np.where(heads, "heads", "units"), "selection": rows["method"],
        "density": 1 - rows["heads"].where(heads, rows["units"]) / 100, "retained": 100 * rows["value"] / dense,
    })  # fmt: skip


def published_points() -> pd.DataFrame:
    """Table 1 and the later table (BERT-large) as retained share: place, heads, units (shares kept), recovery, F1 …"""
    rows = published("mccarley2019", place=["v1 Table 1", "later version, table"])
    keys = ["place", "heads", "units", "recovery"]
    frame = rows.pivot_table(index=keys, columns="metric", values="value").reset_index()
    dense = frame[(frame["heads"] == 0) & (frame["units"] == 0)].set_index("place")
    frame["retained"] = 100 * frame["score"] / frame["place"].map(dense["score"])
    frame["heads removed (%)"], frame["units removed (%)"] = frame["heads"], frame["units"]
    frame["heads"], frame["units"] = 1 - frame["heads"] / 100, 1 - frame["units"] / 100
    return frame.rename_axis(columns=None)


def data_sets_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Retained share of the L0 gates' operating points per data set, the paper's Table 1 beside each.

    Args:
        frame: of ``structured_frame``.

    What is distilled here stands beside what the paper retrained; ``published`` is the later version's where the first
    one's Table 1 has no such point, and NaN where neither has.
    """
    points = frame[(frame["kind"] == "both") & (frame["selection"] == "l0")]
    removed = {f"{kind} removed (%)": (100 * (1 - points[kind])).round(0) for kind in ("heads", "units")}
    table = summarise(points.assign(**removed), ["title", *removed, "recovery"], "retained")
    printed = published_points().sort_values("place", ascending=False).round({name: 0 for name in removed})
    paper = printed.drop_duplicates([*removed, "recovery"]).set_index([*removed, "recovery"])["retained"]
    trained = table["recovery"].where(table["recovery"] == NONE, "retrain")
    table["published"] = paper.reindex([*zip(*(table[name] for name in removed), trained, strict=True)]).to_numpy()
    return table.rename(columns={"title": "task"})


def at_point(frame: pd.DataFrame, point: Mapping[Any, Any]) -> pd.DataFrame:
    """Rows whose densities are those of an operating point, up to rounding to whole heads and units."""
    near = [(frame[kind] - point[kind]).abs() <= NEAR for kind in ("heads", "units")]
    return frame[near[0] & near[1]]


def against_published(frame: pd.DataFrame) -> pd.DataFrame:
    """Every row of the paper's two tables of BERT-large beside what the L0 gates retain here at the same densities.

    ``published`` and ``ours`` are percent; where nothing of ours is ``at_point``, ``ours`` is NaN and ``n`` (runs) 0.

    Args:
        frame: of ``structured_frame``, one task.
    """
    ours = frame[frame["selection"].isin(["l0", "dense"]) & (frame["embedding"] == 1)]
    rows = []
    for printed in published_points().to_dict("records"):
        found = at_point(ours[ours["recovery"] == printed["recovery"]], printed)["retained"]
        rows.append({
            "version": "first" if printed["place"].startswith("v1") else "later",
            "heads removed (%)": printed["heads removed (%)"], "units removed (%)": printed["units removed (%)"],
            "then": printed["recovery"], "published": printed["retained"], "ours": found.mean(), "n": len(found),
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values("version", kind="stable", ignore_index=True)


def exact_sizes() -> pd.DataFrame:
    """MiB of BERT-large in fp32 at Table 1's percentages, counted on the meta device, beside the printed sizes.

    Counted are the encoder and its pooler, which the paper's checkpoints kept although a span head does not read it.
    """
    table = published_points()
    table = table[(table["place"] == "v1 Table 1") & (table["recovery"] == NONE)]
    config = ARCHITECTURES["bert-large-uncased"]
    rows = []
    for row in table.to_dict("records"):
        with torch.device("meta"):
            model = AutoModel.from_config(config)
            shapes = even_shapes(config, row["heads"], row["units"])
            cut(model, [range(heads) for heads, _ in shapes], [range(units) for _, units in shapes])
        exact = 4 * sum(parameter.numel() for parameter in model.parameters()) / 2**20
        rows.append({
            "heads removed (%)": row["heads removed (%)"], "units removed (%)": row["units removed (%)"],
            "exact (MiB)": exact, "published (MiB)": row["size"], "difference (%)": 100 * (exact / row["size"] - 1),
        })  # fmt: skip
    return pd.DataFrame(rows)


def survivors(record: Record, layers: int) -> pd.DataFrame:
    """What one pruned model kept: layer (from 1), heads kept, share of units kept; NaN for a kind left alone."""
    kept = record["compression"]["kept"]
    heads = [len(row) for row in kept["heads"]] if "heads" in kept else [np.nan] * layers
    units = kept.get("units", [np.nan] * layers)
    return pd.DataFrame({"layer": range(1, layers + 1), "heads": heads, "units": units})


def gate_history(record: Record, kind: str) -> pd.DataFrame:
    """How the gates of one kind moved during training: progress, lambda, expected and realised density."""
    points = record["compression"]["history"]
    names = ("lambda", "expected_density", "density")
    return pd.DataFrame([{"progress": p["progress"]} | {name: p[kind][name] for name in names} for p in points])


def gate_counts(record: Record, kind: str) -> tuple[np.ndarray, list[float], list[float]]:
    """Histogram of log alpha over training: counts (points, bins), progress of each point, bin edges."""
    history = record["compression"]["history"]
    counts = np.array([point[kind]["log_alpha_counts"] for point in history])
    return counts, [point["progress"] for point in history], record["compression"]["bins"]


def find(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Training records whose selection, recovery, task or seed equal ``wanted``, in order."""
    found = []
    for record in records:
        if isinstance(record.spec, TrainSpec):
            about = {
                "selection": selection(record.spec), "recovery": recovery(record.spec), "task": record.spec.task,
                "seed": record.spec.seed, "kind": _kind(record["compression"].get("density", {})),
            }  # fmt: skip
            if all(about[key] == value for key, value in wanted.items()):
                found.append(record)
    return found
