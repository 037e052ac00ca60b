"""The figures of notebook 08: every method on one set of axes, and the recipes on engines."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lib import figures, frontier
from lib.analysis.frontier import KEPT, published_curves

FLOOR = 50.0  # percent of the dense score: what keeps less is of no use to anyone, and is counted instead of drawn
ONE_ANSWER = "one answer for all"
COST_NAMES = {
    KEPT: "encoder-layer weights kept (%)",
    "size (MB)": "size on disk (MB)",
    "cost (core-min)": "training, whole chain (core-minutes)",
}


def quality_against(points: pd.DataFrame, cost: str) -> tuple[Figure, pd.DataFrame]:
    """Retained share against a cost, a panel per task: each family's Pareto front solid, its other models faint.

    A paper's baselines, and what does no better than one answer for all, are on no front.

    Args:
        points: of ``frontier.by_configuration``.
        cost: one of ``COST_NAMES``.

    Returns:
        The figure and ``points`` with a column ``front``: whether no model of the same family and task beats the row.
        Rows below ``FLOOR`` are not drawn.
    """
    by_methods = points.groupby("title", sort=False)["family"].nunique().sort_values(ascending=False, kind="stable")
    rows = points.assign(front=False)
    fig, axes = figures.panels(len(by_methods), row=1.75, margin=0.75, sharey=True)
    for ax, title in zip(axes, by_methods.index, strict=False):
        here = rows[rows["title"] == title]
        for (name, style), part in here.groupby(["family", "style"], sort=False):
            best = frontier.pareto(eligible(part), cost, "retained")
            rows.loc[best.index, "front"] = True
            _family(ax, part, best, cost, str(style), str(name))
        if cost == "size (MB)":
            ax.plot(here["dense (MB)"].iloc[:1], [100], **figures.style_of("dense") | {"linestyle": ""})
        ax.set_title(title)
        if cost == "cost (core-min)":
            ax.set_xscale("log")
            low, high = ax.get_xlim()
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high > 10 * low else (1, 2, 3, 5)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter("")
        if cost == KEPT:
            ax.set_xlim(0, 104)
        figures.retained_line(ax, 100)
        if here["floor"].notna().any():
            ax.axhline(here["floor"].mean(), color=figures.GREY, linewidth=0.8, linestyle=":", label=ONE_ANSWER)
    highest = rows.loc[rows["front"], ["retained", "high"]].max().max()
    axes[0].set_ylim(FLOOR, max(104.0, np.nan_to_num(highest) + 2))
    figures.name_axes(fig, COST_NAMES[cost], "retained share (%)")
    return fig, rows


def eligible(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that may be on a front: the method itself, and better than one answer for all."""
    return rows[~rows["rival"] & ~(rows["retained"] <= rows["floor"] + 0.5)]


def _family(ax: Axes, part: pd.DataFrame, best: pd.DataFrame, cost: str, style: str, name: str) -> None:
    """One method's models on one task; large, with an interval, where those on the front have seeds for one."""
    look = figures.style_of(style)
    ax.plot(part[cost], part["retained"], **look | {"linestyle": "", "label": "_", "markersize": 2, "alpha": 0.3})
    errors = figures.error_bars(best, "retained")
    ax.errorbar(best[cost], best["retained"], errors, elinewidth=0.6, **look | {"label": name, "markersize": 2})
    sure = best[best["n"] > 1]
    ax.plot(sure[cost], sure["retained"], **look | {"linestyle": "", "label": "_", "markersize": 4.5})


def markers_and_floor(rows: pd.DataFrame, cost: str) -> str:
    """The caption's sentences on the size of markers and on what ``quality_against`` did not draw."""
    low, front = rows[rows["retained"] < FLOOR], rows[rows["front"]]
    best = f", {low['front'].sum()} of them on a front" if low["front"].any() else ""
    said = [f"Large: two seeds or more ({(front['n'] > 1).sum()} of {len(front)} models on a front)."]
    if len(low):
        said.append(f"{len(low)} of {len(rows)} models keep less than {FLOOR:.0f} % and are not drawn{best}.")
    unknown = int(rows[cost].isna().sum())
    if unknown:
        said.append(f"{figures.counted(unknown, 'model')} cannot be placed: what it began with is not on record.")
    return " ".join(said)


def only_compressed(points: pd.DataFrame) -> str:
    """The caption's sentence on methods none of whose models on a task was trained after the cut, and a space."""
    trained = points.groupby(["family", "title"], sort=False)["trained"].any()
    names = [f"{family} on {title}" for family, title in trained[~trained].index]
    return f"Compressed and not trained afterwards, so far: {', '.join(names)}. " if names else ""


def beside_published(points: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """The Pareto front of each family on one task, and the papers' own curves, hollow.

    Args:
        points: of ``frontier.by_configuration``, one task; may be empty.
    """
    theirs = published_curves()
    names = {style: name for name, style in frontier.FAMILIES.values()}
    fig, ax = figures.new_figure("page", height=2.9)
    drawn = []
    for (name, style), part in points.groupby(["family", "style"], sort=False):
        front = frontier.pareto(eligible(part), KEPT, "retained")
        if front.empty:
            continue
        _family(ax, front, front, KEPT, str(style), str(name))
        drawn.append(front.assign(data="ours", published=False))
    for style, part in theirs.groupby("style", sort=False):
        label = names[str(style)] + figures.PUBLISHED
        ax.plot(part[KEPT], part["retained"], **figures.style_of(str(style), published=True) | {"label": label})
        drawn.append(part.assign(family=names[str(style)], published=True))
    rows = pd.concat(drawn, ignore_index=True)
    figures.retained_line(ax, 100)
    ax.set(xlabel=COST_NAMES[KEPT], ylabel="retained share (%)", xlim=(0, 104))
    ax.set_ylim(max(70, rows["retained"].min() - 2), rows["retained"].max() + 2)
    figures.outside_legend(fig)
    return fig, rows.reindex(columns=["family", "published", "data", KEPT, "retained", "low", "high", "n"])


def recipes_on_engines(means: pd.DataFrame, aims: tuple[tuple[float, float], ...], x: str) -> Figure:
    """Retained share against speed of every recipe and engine, with the Pareto front named and the aims as crosses.

    Args:
        means: of ``recipes.over_seeds``, at least one row; a panel for each processor.
        aims: pairs of speed and retained share (percent).
        x: name of the axis of speed.
    """
    processors = list(means.groupby("processor", sort=False))
    fig, axes = figures.panels(len(processors), across=1, row=2.4, margin=0.8, sharex=True)
    for ax, (processor, rows) in zip(axes, processors, strict=True):
        _recipes_panel(ax, rows)
        ax.plot(*zip(*aims, strict=True), "x", color=figures.VERMILION, zorder=5, label="the aims")  # above names
        ax.set(ylabel="retained share (%)", title=processor if len(processors) > 1 else "")
        figures.retained_line(ax, 100)
    axes[-1].set_xlabel(x)
    figures.outside_legend(fig)
    return fig


def _recipes_panel(ax: Axes, means: pd.DataFrame) -> None:
    """One processor's recipes on every engine, and the Pareto front through them."""
    for engine, part in means.groupby("engine", sort=False):
        errors = figures.error_bars(part, "retained")
        style = figures.style_of(str(engine)) | {"linestyle": ""}
        aside = figures.error_bars(part, "speed", "speed q1", "speed q3")
        ax.errorbar(part["speed"], part["retained"], errors, aside, elinewidth=0.7, **style)
    front = frontier.pareto(means.assign(slowness=-means["speed"]), "slowness", "retained")
    look: dict[str, Any] = {"color": figures.GREY, "linewidth": 0.8, "zorder": 0, "label": "Pareto front"}
    ax.step(front["speed"], front["retained"], where="post", **look)  # from the fastest on: what at least x times keeps
    named = front.sort_values("speed").drop_duplicates("recipe", keep="last")
    crowded = (named["speed"].diff(-1).abs() < 0.1 * means["speed"].max()) & (named["retained"].diff(-1).abs() < 0.5)
    blank = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
    line = {"arrowstyle": "-", "linewidth": 0.4, "color": figures.GREY}
    for row, near in zip(named.to_dict("records"), crowded, strict=True):  # near the next: below, on a line of its own
        place = {"xytext": (-2, -20), "ha": "right", "arrowprops": line} if near else {"xytext": (4, 3)}
        at = (row["speed"], row["retained"])
        ax.annotate(row["recipe"], at, textcoords="offset points", fontsize=6, bbox=blank, **place)
