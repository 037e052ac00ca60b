"""The figures of notebook 03, each from frames of ``lib.analysis.obert``; all return the figure and the drawn rows."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lib import figures
from lib.analysis.obert import crossover, published_frame
from lib.config import StudyError

BF16 = "openvino-bf16"  # the dense model on matrix units, which a sparse one has to beat
PART_COLOURS = {
    "query": figures.BLUE, "key": figures.SKY, "value": figures.GREEN, "attention_output": figures.PURPLE,
    "ffn_in": figures.ORANGE, "ffn_out": figures.VERMILION,
}  # fmt: skip


def sparsity_figure(quality: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Left: score against sparsity of every ranking, gradual, long. Right: retained share, ours and published.

    Raises:
        StudyError: no gradual run of the full-depth model.
    """
    rows = quality[(quality["layers"] == quality["layers"].max()) & (quality["budget"] == "long")]
    gradual = rows[(rows["kind"] == "gradual") & (rows["group"] == 1)]
    if gradual.empty:
        raise StudyError("oBERT: no gradual run is finished yet; raise budget_minutes, or run the plan to the end")
    fig, (left, right) = figures.new_figure("page", 1, 2)
    drawn = []
    for method, part in gradual.groupby("method", sort=False):
        drawn.append(figures.band_plot(left, part, "target", "score", str(method)).assign(panel="score"))
        known = part.dropna(subset=["retained"])
        if len(known):
            drawn.append(figures.band_plot(right, known, "target", "retained", str(method)).assign(panel="retained"))
    theirs = published_frame()
    for method, epochs in (("obert", 30), ("movement", 10)):
        chosen = (theirs["kind"] == "gradual") & (theirs["place"] == "Table 1") & (theirs["method"] == method)
        part = theirs[chosen & (theirs["epochs"] == epochs)]
        points = figures.band_plot(right, part, "sparsity", "retained", method, published=True)
        drawn.append(points.rename(columns={"sparsity": "target"}).assign(panel="retained"))
    same = quality[quality["task"].isin(gradual["task"])]
    shared = set(same[same["kind"] == "control"]["seed"]) or set(same["seed"])  # both lines are means over these
    for kind, style in (("dense", "-"), ("control", ":")):
        scores = same[(same["kind"] == kind) & same["seed"].isin(shared)]["score"]
        if len(scores):
            label = "Dense" if kind == "dense" else "Dense, same recipe"
            left.axhline(scores.mean(), color=figures.BLACK, linewidth=0.9, linestyle=style, label=label)
    figures.retained_line(right, 100)
    left.set(xlabel="sparsity (%)", ylabel="score (%)")
    right.set(xlabel="sparsity (%)", ylabel="retained share (%)")
    figures.outside_legend(fig)
    return fig, pd.concat(drawn, ignore_index=True)


def one_shot_figure(quality: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Retained share when pruning at once, with and without recomputed gradients, and gradually in two budgets.

    Raises:
        StudyError: no one-shot run.
    """
    full = quality[(quality["layers"] == quality["layers"].max()) & (quality["group"] == 1)].dropna(subset=["retained"])
    curves: dict[str, tuple[pd.DataFrame, dict[str, Any]]] = {}
    once = full[full["kind"] == "one-shot"]
    if once.empty:
        raise StudyError("oBERT: no one-shot run is finished yet; raise budget_minutes, or run the plan to the end")
    shades = (figures.ORANGE, figures.PURPLE, figures.BLUE, figures.GREEN)
    ways = sorted(once[once["method"] == "obert"]["recomputations"].unique())
    for (method, parts), rows in once.groupby(["method", "recomputations"]):
        shade = figures.GREY if method == "magnitude" else shades[ways.index(parts) % len(shades)]
        name = figures.METHODS[str(method)][2] + ", at once" + (f", {parts} parts" if parts > 1 else "")
        curves[name] = rows, {"color": shade, "marker": "<" if method == "magnitude" else "D", "linestyle": ":"}
    for budget, marker in (("short", "v"), ("long", "o")):
        rows = full[(full["kind"] == "gradual") & (full["method"] == "obert") & (full["budget"] == budget)]
        if len(rows):
            curves[f"oBERT, gradual, {budget}"] = rows, {"color": figures.ORANGE, "marker": marker, "linestyle": "-"}
    fig, ax = figures.new_figure("page")
    drawn = []
    for name, (rows, style) in curves.items():
        means = rows.groupby("target")["retained"].agg(["mean", "size"]).reset_index()
        ax.plot(means["target"], means["mean"], label=name, **style)
        drawn.append(means.rename(columns={"mean": "retained", "size": "n"}).assign(curve=name))
    figures.retained_line(ax, 100)
    ax.set(xlabel="sparsity (%)", ylabel="retained share (%)")
    figures.outside_legend(fig, side="right")
    return fig, pd.concat(drawn, ignore_index=True)


def layer_figure(layers: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Sparsity that the global ranking gave to every matrix, by layer: oBERT and its rivals at one target.

    Raises:
        StudyError: no gradual run.
    """
    rows = layers[(layers["layers"] == layers["layers"].max()) & (layers["budget"] == "long")]
    if rows.empty:
        raise StudyError("oBERT: no gradual run is finished yet; raise budget_minutes, or run the plan to the end")
    targets = sorted(rows["target"].unique(), key=lambda value: abs(value - 90))
    rows = rows[rows["target"] == targets[0]]
    methods = list(dict.fromkeys(rows["method"]))
    fig, axes = figures.new_figure("page", 1, len(methods), squeeze=False, sharey=True)
    by = ["task", "method", "part", "layer", "target"]
    means = rows.groupby(by, sort=False)["sparsity"].agg(["mean", "size"]).reset_index()
    for ax, method in zip(axes[0], methods, strict=True):
        for part, points in means[means["method"] == method].groupby("part", sort=False):
            name = str(part).replace("_", " ").replace("ffn", "FFN")
            ax.plot(points["layer"], points["mean"], marker="o", color=PART_COLOURS[str(part)], label=name)
        ax.axhline(targets[0], color=figures.BLACK, linewidth=0.7, linestyle=figures.DASHES)
        ax.set(title=figures.METHODS[method][2], xlabel="layer", xticks=sorted(means["layer"].unique()))
    axes[0, 0].set_ylabel("sparsity (%)")
    figures.outside_legend(fig)
    return fig, means.rename(columns={"mean": "sparsity", "size": "n"})


def speed_figure(speed: pd.DataFrame, group: int = 1) -> tuple[Figure, pd.DataFrame]:
    """Anchored time against sparsity at full depth, a panel per condition: sparse engines are curves, dense ones lines.

    The crossover to the dense bf16 model is marked on each curve that has one; in the rows, column ``crossover (%)``.

    Raises:
        StudyError: nothing was timed.
    """
    if speed.empty:
        raise StudyError("oBERT: no latency is measured yet; raise budget_minutes, or run the plan to the end")
    full = speed[speed["layers"] == speed["total"]]
    conditions = list(full[["batch", "length"]].drop_duplicates().itertuples(index=False, name=None))
    fig, axes = figures.panels(len(conditions), across=2, row=1.9, margin=0.7)
    drawn = []
    for ax, (batch, length) in zip(axes, conditions, strict=False):
        here = full[(full["batch"] == batch) & (full["length"] == length)]
        drawn.append(_speed_panel(ax, here, group))
        ax.set(title=f"batch {batch}, {length} tokens", xlabel="sparsity (%)", yscale="log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    for ax in axes[::2]:
        ax.set_ylabel("time of a call (ms)")
    figures.outside_legend(fig)
    return fig, pd.concat(drawn, ignore_index=True)


def _speed_panel(ax: Any, here: pd.DataFrame, group: int) -> pd.DataFrame:
    """One condition; returns the drawn rows."""
    drawn = []
    dense = here[here["sparsity"] == 0].drop_duplicates("engine")
    level = dense[dense["engine"] == BF16]["anchored ms"]
    for engine, rows in here.groupby("engine", sort=False):
        style = figures.style_of(str(engine))
        curve = rows[(rows["sparsity"] > 0) & (rows["group"] == group)]
        if curve.empty:
            ax.axhline(rows["anchored ms"].iloc[0], color=style["color"], linewidth=0.8, linestyle=figures.DASHES)
            ax.plot([0], [rows["anchored ms"].iloc[0]], **style)
            drawn.append(rows[rows["sparsity"] == 0].head(1))
            continue
        points = pd.concat([rows[rows["sparsity"] == 0].head(1), curve]).sort_values("sparsity")
        ax.plot(points["sparsity"], points["anchored ms"], **style)
        where = crossover(points["sparsity"], points["anchored ms"], float(level.iloc[0])) if len(level) else np.nan
        if not np.isnan(where):
            ax.plot([where], [level.iloc[0]], marker="|", markersize=11, color=style["color"], linestyle="")
        drawn.append(points.assign(**{"crossover (%)": where}))
    return pd.concat(drawn, ignore_index=True)


def frontier_figure(quality: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Retained share against how many times smaller the stored model is: the compound, ours and the paper's.

    Raises:
        StudyError: no pruned run.
    """
    from lib.published import published

    chosen = quality["kind"].isin(["gradual", "int8"]) & (quality["budget"] == "long") & quality["smaller"].notna()
    rows = quality[chosen].dropna(subset=["retained"])
    if rows.empty:
        raise StudyError("oBERT: no pruned run is finished yet; raise budget_minutes, or run the plan to the end")
    fig, ax = figures.new_figure("page")
    drawn = []
    for (method, bits), part in rows.groupby(["method", "bits"], sort=False):
        style = figures.style_of(str(method)) | {"linestyle": ""}
        if bits == 8:
            style |= {"label": style["label"] + ", INT8", "color": figures.VERMILION,
                      "markerfacecolor": figures.VERMILION, "markeredgecolor": figures.VERMILION}  # fmt: skip
        ax.plot(part["smaller"], part["retained"], **style)
        drawn.append(part[["method", "bits", "layers", "target", "smaller", "retained"]].assign(published=False))
    table = published("kurtic2022", place="Table 17").pivot_table(
        index=["method", "bits", "layers", "sparsity"], columns="metric", values="value"
    )
    theirs = table.reset_index().rename(columns={"compression": "smaller", "sparsity": "target"})
    for method, part in theirs[theirs["method"] != "dense"].groupby("method", sort=False):
        ax.plot(part["smaller"], part["retained"], **figures.style_of(str(method), published=True) | {"linestyle": ""})
        drawn.append(part[["method", "bits", "layers", "target", "smaller", "retained"]].assign(published=True))
    figures.retained_line(ax, 100)
    ax.set(xlabel="times smaller on disk", ylabel="retained share (%)", xscale="log")
    ax.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    ax.minorticks_off()
    figures.outside_legend(fig, side="right")
    return fig, pd.concat(drawn, ignore_index=True)
