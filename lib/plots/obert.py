"""The figures of notebook 03, each from frames of ``lib.analysis.obert``; all return the figure and the drawn rows."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lib import figures
from lib.analysis import summarise
from lib.analysis.obert import compounds, crossover, full_depth, published_frame
from lib.config import StudyError
from lib.published import published

BF16 = "openvino-bf16"  # the dense model in half the bits, which costs no quality: the least a sparse one has to beat
PART_COLOURS = {
    "query": figures.BLUE, "key": figures.SKY, "value": figures.GREEN, "attention_output": figures.PURPLE,
    "ffn_in": figures.ORANGE, "ffn_out": figures.VERMILION,
}  # fmt: skip
IN_FOURS = {"linestyle": ":", "fillstyle": "bottom", "markerfacecoloralt": "white", "zorder": 1.9}
FOURS = ", runs of 4"  # ends the name of such a curve
LARGEST, SMALLEST = 7.0, 2.5  # markers of all layers and of none


def seeds_text(counts: pd.Series) -> str:
    """How many seeds means are over: "n = 1 seed", "n = 2 to 3 seeds"."""
    low, high = int(counts.min()), int(counts.max())
    return f"n = {f'{low} to ' if high > low else ''}{figures.counted(high, 'seed')}"


def constant_sentence(drawn: pd.DataFrame, quality: pd.DataFrame, task: str, target: float | None = None) -> str:
    """The caption's sentence on models that answer the same whatever is asked; "" where none does.

    Args:
        drawn: rows of the figure, whose column ``constant`` says whether such models are drawn: only where all are.
    """
    note = constant_note(quality, task, target)
    if not note:
        return ""
    return f" {'Give' if drawn['constant'].eq(True).any() else 'Left out, since they give'} one answer for all: {note}."


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

    Models that answer the same whatever is asked are left out, unless all of them do. The lines of the dense model and
    of its control have a drawn row each, with ``panel`` "line".

    Raises:
        StudyError: no gradual run of the full-depth model.
    """
    gradual = full_depth(quality, "long").query("group == 1")
    if gradual.empty:
        raise StudyError("oBERT: no gradual run is finished yet; raise budget_minutes, or run the plan to the end")
    fig, (left, right) = figures.new_figure("page", 1, 2)
    drawn, told = [], _unless_constant(gradual)
    for method, part in told.groupby("method", sort=False):
        drawn.append(figures.band_plot(left, part, "target", "score", str(method)).assign(panel="score"))
        known = part.dropna(subset=["retained"])
        if len(known):
            drawn.append(figures.band_plot(right, known, "target", "retained", str(method)).assign(panel="retained"))
    drawn = [rows.assign(constant=bool(told["constant"].any())) for rows in drawn]
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


def _unless_constant(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` without models that answer the same whatever is asked; all of them where every one does."""
    return rows if rows["constant"].all() else rows[~rows["constant"].astype(bool)]


def one_shot_figure(quality: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Retained share when pruning at once, with and without recomputed gradients, and gradually in two budgets.

    Bars are 95 % bootstrap intervals of the mean, and moved aside so that they can be told apart.

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
    for number, (name, (rows, style)) in enumerate(curves.items()):
        means = summarise(rows, ["target"], "retained").sort_values("target")
        at, bars = means["target"] + 0.4 * (number - (len(curves) - 1) / 2), figures.error_bars(means, "retained")
        ax.errorbar(at, means["retained"], bars, capsize=1.5, elinewidth=0.7, label=name, **style)
        drawn.append(means.assign(curve=name))
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
    rows = _unless_constant(rows)
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
    last measured sparsity at which it is slower to the first at which it is faster (``crossing_table`` has the rest).
    It is a stroke where only the dense model is slower, since nothing was measured on the way, and absent where that
    one is faster already.

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
    level = _dense_level(here, BF16)  # NaN, which nothing passes, where it is not measured
    if level.notna().all():
        ax.axhspan(level["low ms"], level["high ms"], color=figures.style_of(BF16)["color"], alpha=0.15, linewidth=0)
    sparse = set(here[here["sparsity"] > 0]["engine"])
    for engine, rows in here[~here["engine"].isin(sparse)].groupby("engine", sort=False):
        style, dense = figures.style_of(str(engine)), rows.head(1)
        ax.axhline(dense["anchored ms"].item(), color=style["color"], linewidth=0.8, linestyle=figures.DASHES)
        ax.plot([0], dense["anchored ms"], **style)
        drawn.append(dense.assign(curve=style["label"]))
    for name, engine, group, points in _curves(here):
        shown = figures.style_of(engine) | {"label": name} | (IN_FOURS if group == 4 else {})
        bars = figures.error_bars(points, "anchored ms", "low ms", "high ms")
        ax.errorbar(points["sparsity"], points["anchored ms"], bars, capsize=1.5, elinewidth=0.7, **shown)
        slower, faster = crossover(points, level)
        if faster > 0:
            ends = [slower if slower > 0 else faster, faster]
            ax.plot(ends, 2 * [level["anchored ms"]], marker="|", markersize=9, color=shown["color"], linewidth=2)
        found: dict[str, Any] = {"curve": name, "slower up to (%)": slower, "faster from (%)": faster}
        drawn.append(points.assign(**found))
    return pd.concat(drawn, ignore_index=True)


def _curves(here: pd.DataFrame) -> Iterator[tuple[str, str, int, pd.DataFrame]]:
    """Name, engine, run length and points, dense first, of every sparse curve under one condition."""
    for engine, rows in here.groupby("engine", sort=False):
        start, sparse = rows[rows["sparsity"] == 0].head(1), rows[rows["sparsity"] > 0]
        for group in sorted(sparse["group"].unique()):
            name = figures.METHODS[str(engine)][2] + (FOURS if group == 4 else "")
            points = pd.concat([start, sparse[sparse["group"] == group]]).sort_values("sparsity")
            yield name, str(engine), int(group), points


def _dense_level(here: pd.DataFrame, engine: str) -> pd.Series:
    """Time of the dense model on an engine under one condition, with its bars; NaN where it is not measured."""
    rows = here[(here["engine"] == engine) & (here["sparsity"] == 0)]
    return rows[["anchored ms", "low ms", "high ms"]].median()


def crossing_table(speed: pd.DataFrame) -> pd.DataFrame:
    """Where curves of ``speed_figure`` pass the dense model in bf16 and on its fastest engine, a column per condition.

    "from 90 %": faster there and beyond; "without zeros": faster at every sparsity, 0 included; "never": slower at
    every one; "slower to 80 %" alone: slower as far as the curve goes, and sparser models were timed elsewhere only;
    "overlap": quartiles overlap, so nothing is told. In brackets: sparsities that were timed elsewhere alone.
    NaN where a curve or the dense model was not timed.

    Args:
        speed: ``analysis.obert.speed_frame`` with at least one sparse model of full depth.
    """
    cells = []
    full = speed[speed["layers"] == speed["total"]]
    end = full["sparsity"].max()
    for (batch, length), here in full.groupby(["batch", "length"], sort=False):
        engines = {figures.METHODS[BF16][2]: BF16, "its fastest engine": fastest_dense(here)}
        levels = {against: _dense_level(here, engine) for against, engine in engines.items()}
        for name, _, _, points in _curves(here):
            last, untimed = points["sparsity"].max(), _untimed(points["sparsity"], full["sparsity"])
            for against, level in levels.items():
                state = _state(*crossover(points, level), last, end) + untimed if level.notna().all() else None
                cells.append({"curve": name, "against dense on": against, "at": f"{batch} × {length}", "state": state})
    table = pd.DataFrame(cells, columns=["curve", "against dense on", "at", "state"])
    rows = ["curve", "against dense on"]
    wide = table.pivot_table(index=rows, columns="at", values="state", aggfunc="first", sort=False)
    return wide.rename_axis(columns=None).reset_index()


def processors_figure(speed: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """How many times faster than the fastest dense engine zeros are: a curve per processor, a panel per condition.

    At each sparsity stands the fastest sparse model of full depth, whatever its engine and pattern; bars are its
    quartiles and the dense model's. Where several processors timed sparse models, the conditions that several timed
    are drawn; else all. Hollow, and not ``complete``, are points at which an engine was not timed that is the fastest
    at another point of the processor.

    Raises:
        StudyError: no sparse model of full depth was timed.
    """
    condition, ratio = ["batch", "length"], "over best dense"
    full = speed[(speed["layers"] == speed["total"]) & (speed["sparsity"] > 0)] if len(speed) else speed
    if full.empty:
        raise StudyError("oBERT: no sparse model of full depth is timed; run sparse_speed")
    if full["cpu"].nunique() > 1:
        full = full[full.groupby(condition)["cpu"].transform("nunique") > 1]
    best = full.sort_values(ratio).groupby(["cpu", *condition, "sparsity"], sort=False).tail(1)
    best = best.sort_values([*condition, "cpu", "sparsity"], ascending=[False, True, True, True])
    timed = full.groupby(["cpu", *condition, "sparsity"])["engine"].agg(set)
    winners = best.groupby("cpu")["engine"].agg(set)
    places = best[["cpu", *condition, "sparsity"]].itertuples(index=False, name=None)
    best["complete"] = [winners[place[0]] <= timed[place] for place in places]
    panels = list(best.groupby(condition, sort=False))
    styles = {
        cpu: figures.series_style(number) | {"marker": "osD^v"[number % 5]}
        for number, cpu in enumerate(sorted(best["cpu"].unique()))
    }
    fig, axes = figures.panels(len(panels), across=2, row=1.7, margin=0.7, sharey=True)
    for ax, ((batch, length), here) in zip(axes, panels, strict=False):
        for cpu, points in here.groupby("cpu", sort=False):
            bars = figures.error_bars(points, ratio, f"{ratio} low", f"{ratio} high")
            ax.errorbar(points["sparsity"], points[ratio], bars, capsize=1.5, elinewidth=0.7, label=cpu, **styles[cpu])
            open_ = points[~points["complete"]]
            style = styles[cpu] | {"linestyle": "none", "markerfacecolor": "white"}
            ax.plot(open_["sparsity"], open_[ratio], zorder=4, **style)
        ax.axhline(1, color=figures.BLACK, linewidth=0.7, linestyle=figures.DASHES)
        ax.set(title=f"batch {batch}, {length} tokens", xlabel="sparsity (%)", xticks=sorted(best["sparsity"].unique()))
    for ax in axes[::2]:
        ax.set_ylabel("× fastest dense")
    figures.outside_legend(fig, columns=1)
    interval = [ratio, f"{ratio} low", f"{ratio} high"]
    shown = ["cpu", *condition, "sparsity", "engine", "group", "over fp32", *interval, "complete"]
    return fig, best[shown].reset_index(drop=True)


def fastest_dense(here: pd.DataFrame) -> str:
    """The engine on which the dense model is fastest, of rows of one condition."""
    return str(here[here["sparsity"] == 0].sort_values("anchored ms")["engine"].iloc[0])


def _untimed(curve: pd.Series, every: pd.Series) -> str:
    """Sparsities below a curve's last one that it has no point at, as a cell of ``crossing_table`` names them."""
    gaps = sorted(value for value in set(every) - set(curve) if 0 < value < curve.max())
    return f" ({', '.join(f'{value:.0f}' for value in gaps)} not timed)" if gaps else ""


def _state(slower: float, faster: float, last: float, end: float) -> str:
    """A cell of ``crossing_table`` from what ``crossover`` found and the largest sparsity, on the curve and of all."""
    if faster == 0:
        return "without zeros"
    if faster > 0:
        return f"from {faster:.0f} %" + (f", slower to {slower:.0f} %" if slower > 0 else "")
    if slower != last:  # NaN too: not even without zeros is it slower
        return "overlap"
    return "never" if last == end else f"slower to {slower:.0f} %"


def frontier_figure(quality: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Retained share against how many times smaller the gzipped model is: the compound, ours and the paper's.

    The smaller a marker, the fewer layers are left.

    Raises:
        StudyError: no pruned run, or no control whose gzipped size they could be compared with.
    """
    ours = compounds(quality).dropna(subset=["smaller_gzip", "retained"])
    if ours.empty:
        raise StudyError(
            "oBERT: no pruned run is finished yet, or not the control that it is compared with; raise budget_minutes, "
            "or run the plan to the end"
        )
    ours = ours.rename(columns={"smaller_gzip": "times smaller"}).assign(published=False)
    theirs = published("kurtic2022", place="Table 17").pivot_table(
        index=["method", "bits", "layers", "sparsity"], columns="metric", values="value"
    ).reset_index().rename(columns={"compression": "times smaller", "sparsity": "target"})  # fmt: skip
    theirs = theirs[theirs["method"] != "dense"].assign(published=True)
    fig, ax = figures.new_figure("page")
    drawn = []
    for rows, total in ((ours, quality["layers"].max()), (theirs, theirs["layers"].max())):
        for (method, bits, is_published), part in rows.groupby(["method", "bits", "published"], sort=False):
            _by_depth(ax, part, _compound_style(str(method), bits == 8, bool(is_published)), total)
            drawn.append(part[["method", "bits", "layers", "target", "times smaller", "retained", "published"]])
    figures.retained_line(ax, 100)
    ax.set(xlabel="times smaller, both gzipped", ylabel="retained share (%)", xscale="log")
    ax.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    ax.minorticks_off()
    figures.outside_legend(fig, side="right")
    return fig, pd.concat(drawn, ignore_index=True)


def _compound_style(method: str, int8: bool, is_published: bool) -> dict[str, Any]:
    """A point's style: INT8 has a colour of its own, ours a white edge, published ones a hollow face."""
    style = figures.style_of(method) | {"linestyle": ""}
    if int8:
        style |= {"label": style["label"] + ", INT8", "color": figures.VERMILION,
                  "markerfacecolor": figures.VERMILION, "markeredgecolor": figures.VERMILION}  # fmt: skip
    if is_published:
        return style | {"label": style["label"] + figures.PUBLISHED, "markerfacecolor": "white", "markeredgewidth": 0.6}
    return style | {"markeredgecolor": "white", "markeredgewidth": 0.4}


def _by_depth(ax: Any, rows: pd.DataFrame, style: dict[str, Any], total: int) -> None:
    """Points whose size says which share of ``total`` layers is left, the small ones in front."""
    for layers in sorted(rows["layers"].unique(), reverse=True):
        part, size = rows[rows["layers"] == layers], SMALLEST + (LARGEST - SMALLEST) * layers / total
        ax.plot(part["times smaller"], part["retained"], **style | {"markersize": size})
