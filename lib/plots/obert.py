"""The figures of notebook 03, each from frames of ``lib.analysis.obert``; all return the figure and the drawn rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lib import figures
from lib.analysis.obert import compounds, crossover, full_depth, published_frame
from lib.config import StudyError
from lib.published import published

BF16 = "openvino-bf16"  # the dense model on matrix units, which a sparse one has to beat
PART_COLOURS = {
    "query": figures.BLUE, "key": figures.SKY, "value": figures.GREEN, "attention_output": figures.PURPLE,
    "ffn_in": figures.ORANGE, "ffn_out": figures.VERMILION,
}  # fmt: skip
IN_FOURS = {"linestyle": ":", "fillstyle": "bottom", "markerfacecoloralt": "white", "zorder": 1.9}
FOURS = ", runs of 4"  # ends the name of such a curve
LARGEST, SMALLEST = 6.0, 1.5  # markers of all layers and of none


def seeds_text(counts: pd.Series) -> str:
    """How many seeds means are over: "n = 1 seed", "n = 2 to 3 seeds"."""
    low, high = int(counts.min()), int(counts.max())
    return f"n = {f'{low} to ' if high > low else ''}{figures.counted(high, 'seed')}"


def constant_note(quality: pd.DataFrame, task: str, target: float | None = None) -> str:
    """Which of the models of ``sparsity_figure`` answer the same whatever is asked; "" where none does."""
    rows = full_depth(quality, "long")
    rows = rows[(rows["task"] == task) & (np.isclose(rows["target"], target) if target else True)]
    return "; ".join(
        f"{part['constant'].sum()} of {len(part)} models of {figures.METHODS[str(method)][2]} at {at:.0f} %"
        for (method, at), part in rows.groupby(["method", "target"], sort=False) if part["constant"].any()
    )  # fmt: skip


def sparsity_figure(quality: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Left: score against sparsity of every ranking, gradual, long. Right: retained share, ours and published.

    The lines of the dense model and of its control have a drawn row each, with ``panel`` "line".

    Raises:
        StudyError: no gradual run of the full-depth model.
    """
    gradual = full_depth(quality, "long").query("group == 1")
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
    control = same[(same["kind"] == "control") & (same["budget"] == "long")]
    dense = same[same["kind"] == "dense"]
    dense = dense[dense["seed"].isin(control["seed"])] if len(control) else dense  # means over the same seeds
    for label, scores, style in (("Dense", dense["score"], "-"), ("Dense, same recipe", control["score"], ":")):
        if len(scores):
            left.axhline(scores.mean(), color=figures.BLACK, linewidth=0.9, linestyle=style, label=label)
            line = {"method": label, "published": False, "score": scores.mean(), "n": len(scores), "panel": "line"}
            drawn.append(pd.DataFrame([line]))
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

    Models that answer the same whatever is asked are left out, unless all of them do.

    Raises:
        StudyError: no gradual run.
    """
    rows = layers[(layers["layers"] == layers["layers"].max()) & (layers["budget"] == "long")]
    if rows.empty:
        raise StudyError("oBERT: no gradual run is finished yet; raise budget_minutes, or run the plan to the end")
    targets = sorted(rows["target"].unique(), key=lambda value: abs(value - 90))
    rows = rows[rows["target"] == targets[0]]
    rows = rows if rows["constant"].all() else rows[~rows["constant"].astype(bool)]
    methods = list(dict.fromkeys(rows["method"]))
    fig, axes = figures.new_figure("page", 1, len(methods), squeeze=False, sharey=True)
    by = ["task", "method", "part", "layer", "target", "constant"]
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


def speed_figure(speed: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Anchored time against sparsity at full depth, a panel per condition: sparse engines are curves, dense ones lines.

    Bars are quartiles over the runs. Where a curve passes the dense bf16 model, a bracket at its time goes from the
    last measured sparsity at which it is slower to the first at which it is faster (``crossing_note`` says the rest).

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
        drawn.append(_speed_panel(ax, here))
        ax.set(title=f"batch {batch}, {length} tokens", xlabel="sparsity (%)", yscale="log")
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if high < 100 * low else (1, 3)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    for ax in axes[::2]:
        ax.set_ylabel("time of a call (ms)")
    figures.outside_legend(fig)
    return fig, pd.concat(drawn, ignore_index=True)


def _speed_panel(ax: Any, here: pd.DataFrame) -> pd.DataFrame:
    """One condition; returns the drawn rows, with column ``curve`` and, on curves, what ``crossover`` found."""
    drawn = []
    bf16 = here[(here["engine"] == BF16) & (here["sparsity"] == 0)]
    level = bf16[["anchored ms", "low ms", "high ms"]].median()  # NaN, which nothing passes, where it is not measured
    if len(bf16):
        ax.axhspan(level["low ms"], level["high ms"], color=figures.style_of(BF16)["color"], alpha=0.15, linewidth=0)
    for engine, rows in here.groupby("engine", sort=False):
        style = figures.style_of(str(engine))
        start, sparse = rows[rows["sparsity"] == 0].head(1), rows[rows["sparsity"] > 0]
        if sparse.empty:
            ax.axhline(start["anchored ms"].item(), color=style["color"], linewidth=0.8, linestyle=figures.DASHES)
            ax.plot([0], start["anchored ms"], **style)
            drawn.append(start.assign(curve=style["label"]))
        for group, curve in sparse.groupby("group"):
            shown = style | IN_FOURS | {"label": style["label"] + FOURS} if group == 4 else style
            points = pd.concat([start, curve]).sort_values("sparsity")
            bars = np.abs(points[["low ms", "high ms"]].to_numpy().T - points["anchored ms"].to_numpy())
            ax.errorbar(points["sparsity"], points["anchored ms"], bars, capsize=1.5, elinewidth=0.7, **shown)
            slower, faster = crossover(points, level)
            if not np.isnan(faster):
                ends = [faster if np.isnan(slower) else slower, faster]
                ax.plot(ends, 2 * [level["anchored ms"]], marker="|", markersize=9, color=style["color"], linewidth=2)
            found = {"curve": shown["label"], "slower up to (%)": slower, "faster from (%)": faster}
            drawn.append(points.assign(**found))
    return pd.concat(drawn, ignore_index=True)


def crossing_note(drawn: pd.DataFrame) -> str:
    """The caption's sentence on which curves of ``speed_figure`` pass the dense model in bf16, and where."""
    curves = drawn[drawn["sparsity"] > 0].merge(drawn[drawn["engine"] == BF16][["batch", "length"]].drop_duplicates())
    if curves.empty:
        return ""
    found: dict[str, dict[str, list[str]]] = {}
    for (batch, length, curve), points in curves.groupby(["batch", "length", "curve"], sort=False):
        slower, faster = points["slower up to (%)"].iloc[0], points["faster from (%)"].iloc[0]
        last = points["sparsity"].max()
        if not np.isnan(faster):
            state = f"faster from {faster:.0f} %" + ("" if np.isnan(slower) else f", slower up to {slower:.0f} %")
        elif slower == last:
            state = f"slower throughout, up to {last:.0f} %"
        else:
            state = "quartiles overlap" + ("" if np.isnan(slower) else f" beyond {slower:.0f} %") + ", no crossing told"
        found.setdefault(state, {}).setdefault(str(curve), []).append(f"{batch} × {length}")
    states = "; ".join(f"{state}: {_by_conditions(curves)}" for state, curves in found.items())
    against = f"Against the dense model in {figures.METHODS[BF16][2]} (shaded), at measured sparsities"
    return f"{against}, by batch × tokens: {states}."


def _by_conditions(curves: Mapping[str, Sequence[str]]) -> str:
    """Curves in words, each with its conditions in brackets; those with the same conditions share the brackets."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for curve, conditions in curves.items():
        alike.setdefault(tuple(conditions), []).append(curve)
    texts = []
    for conditions, names in alike.items():
        both = [name for name in names if name + FOURS in names]
        rest = [name for name in names if name.removesuffix(FOURS) not in both]
        words = [f"{name} with and without{FOURS.removeprefix(',')}" for name in both] + rest
        texts.append(f"{', '.join(words)} ({', '.join(conditions)})")
    return ", ".join(texts)


def frontier_figure(quality: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Retained share against how many times smaller the stored model is: the compound, ours and the paper's.

    The smaller a marker, the fewer layers are left.

    Raises:
        StudyError: no pruned run.
    """
    rows = compounds(quality).dropna(subset=["smaller", "retained"])
    if rows.empty:
        raise StudyError("oBERT: no pruned run is finished yet; raise budget_minutes, or run the plan to the end")
    fig, ax = figures.new_figure("page")
    drawn = []
    for (method, bits), part in rows.groupby(["method", "bits"], sort=False):
        style = figures.style_of(str(method)) | {"linestyle": "", "markeredgecolor": "white", "markeredgewidth": 0.4}
        if bits == 8:
            style |= {"label": style["label"] + ", INT8", "color": figures.VERMILION,
                      "markerfacecolor": figures.VERMILION}  # fmt: skip
        _by_depth(ax, part, style, quality["layers"].max())
        drawn.append(part[["method", "bits", "layers", "target", "smaller", "retained"]].assign(published=False))
    table = published("kurtic2022", place="Table 17").pivot_table(
        index=["method", "bits", "layers", "sparsity"], columns="metric", values="value"
    )
    theirs = table.reset_index().rename(columns={"compression": "smaller", "sparsity": "target"})
    for method, part in theirs[theirs["method"] != "dense"].groupby("method", sort=False):
        _by_depth(ax, part, figures.style_of(str(method), published=True) | {"linestyle": ""}, theirs["layers"].max())
        drawn.append(part[["method", "bits", "layers", "target", "smaller", "retained"]].assign(published=True))
    figures.retained_line(ax, 100)
    ax.set(xlabel="times smaller on disk", ylabel="retained share (%)", xscale="log")
    ax.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    ax.minorticks_off()
    figures.outside_legend(fig, side="right")
    return fig, pd.concat(drawn, ignore_index=True)


def _by_depth(ax: Any, rows: pd.DataFrame, style: dict[str, Any], total: int) -> None:
    """Points whose size says which share of ``total`` layers is left, the small ones in front."""
    for layers in sorted(rows["layers"].unique(), reverse=True):
        part, size = rows[rows["layers"] == layers], SMALLEST + (LARGEST - SMALLEST) * layers / total
        ax.plot(part["smaller"], part["retained"], **style | {"markersize": size})
