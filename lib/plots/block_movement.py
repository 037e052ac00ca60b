"""The figures of notebook 04; each function returns the figure and the plotted rows, none when nothing is measured."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import figures
from lib.analysis import summarise
from lib.analysis.block_movement import alive, history_frame, score_counts, survivors
from lib.intervals import bootstrap_interval
from lib.plots.over_training import cell_edges, density_over_training
from lib.published_shapes import HEADLINE
from lib.records import Record

PRUNED = ("hybrid", "hybrid-filled", "hybrid-top-k", "hybrid-alone", "block", "struct", "movement", "magnitude",
          "hybrid-large", "hybrid-large-filled")  # fmt: skip
PALE = {"linestyle": "", "alpha": 0.6, "markersize": 2.5, "markeredgewidth": 0, "label": "_seeds"}  # single seeds
SHADES = (figures.GREEN, figures.VERMILION, figures.BLUE, figures.ORANGE, figures.PURPLE, figures.SKY)


def score_against_density(frame: pd.DataFrame, theirs: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Left the score of each way to prune against the density, right the retained share; one row of panels per task.

    Args:
        frame: ``analysis.block_movement.block_frame`` with blocks of one size.
        theirs: ``analysis.block_movement.published_curves``; drawn beside the first task.
    """
    titles = list(dict.fromkeys(frame["title"]))
    fig, axes = figures.panels(2 * len(titles), across=2, row=2.0, margin=0.6, sharex=True)
    drawn = []
    for title, left, right in zip(titles, axes[::2], axes[1::2], strict=True):
        rows = frame[frame["title"] == title]
        for method in PRUNED:
            part = rows[rows["method"] == method]
            if len(part):
                for ax, y in ((left, "score"), (right, "retained")):
                    drawn.append(_by_strength(ax, part, "density", y, method).assign(title=title))
            printed = theirs[(theirs["method"] == method) & (theirs["teacher"] == "base")].sort_values("density")
            if len(printed) and title == titles[0]:
                right.plot(printed["density"], printed["retained"], **figures.style_of(method, published=True))
                columns = ["title", "method", "published", "density", "retained", "n"]
                drawn.append(printed.assign(title=title, published=True, n=1)[columns])
        left.set(title=title, ylabel="score (%)", xlim=(0, 102))
        right.set(title=title, ylabel="retained share (%)")
        dense = rows[rows["method"] == "dense"]["score"]
        if len(dense):
            left.axhline(dense.mean(), color=figures.BLACK, linewidth=0.9)
            figures.retained_line(left, dense.mean())
        if rows["floor"].notna().any():
            floor = rows["floor"].mean()
            left.axhline(floor, color=figures.GREY, linestyle=":", linewidth=0.9)
            right.axhline(100 * floor / dense.mean(), color=figures.GREY, linestyle=":", linewidth=0.9)
        figures.retained_line(right, 100)
    for ax in axes[-2:]:
        ax.set_xlabel("weights left (%)")
    figures.outside_legend(fig)
    return fig, pd.concat(drawn, ignore_index=True)


def _ring(ax: Axes, held: pd.DataFrame, x: str, y: str) -> None:
    """A ring around each row of ``held``, whose density is the least one that was allowed."""
    if len(held):
        ax.plot(held[x], held[y], linestyle="", marker="o", markersize=8, markerfacecolor="none",
                markeredgecolor=figures.BLACK, markeredgewidth=0.7, label="Least density held")  # fmt: skip


def _by_strength(ax: Axes, part: pd.DataFrame, x: str, y: str, method: str) -> pd.DataFrame:
    """Mean over seeds of both coordinates at each strength, joined by a line, with the 95 % interval of ``y``.

    Seeds end at different densities: each is drawn too, small and pale. Runs whose least density held are ringed.
    """
    rows = []
    for strength, group in part.groupby("strength"):
        found = bootstrap_interval(group[y])
        rows.append({"method": method, "published": False, "strength": strength, x: group[x].mean(), y: found.mean,
                     "low": found.low, "high": found.high, "n": found.n})  # fmt: skip
    points = pd.DataFrame(rows).sort_values(x)
    style = figures.style_of(method)
    ax.errorbar(points[x], points[y], figures.error_bars(points, y), capsize=2, zorder=3, **style)
    if points["n"].max() > 1:
        ax.plot(part[x], part[y], zorder=2, **style | PALE)
    _ring(ax, part[part["held"]], x, y)
    return points


def what_survives(records: Mapping[str, Record], heads: int, units: int) -> tuple[Figure, pd.DataFrame]:
    """Share of heads (left) and units (right) kept in each layer, one line per run.

    Args:
        records: legend -> finished pruning run of one encoder.
        heads, units: of each layer before pruning.
    """
    fig, axes = figures.new_figure("page", 1, 2, sharey=True)
    drawn = []
    for (name, record), color in zip(records.items(), SHADES * 2, strict=False):
        kept = survivors(record)
        for ax, kind, total in zip(axes, ("heads", "units"), (heads, units), strict=True):
            rows = kept[kept["kind"] == kind]
            rows = rows.assign(run=name, share=100 * rows["kept"] / total)
            ax.plot(rows["index"], rows["share"], marker="os"[kind == "units"], color=color, label=name)
            ax.set(xlabel="layer", ylim=(-4, 104), title=kind, xticks=sorted(rows["index"]))
            drawn.append(rows)
    axes[0].set_ylabel("kept (%)")
    figures.outside_legend(fig)
    return fig, pd.concat(drawn, ignore_index=True) if drawn else pd.DataFrame()


def scores_in_training(record: Record) -> tuple[Figure, pd.DataFrame]:
    """Distribution of attention's (left) and the FFN's (right) scores over training, with the threshold on S."""
    fig, axes = figures.new_figure("page", 1, 2, sharey=True)
    history = history_frame(record)
    parts = {"attention": "attention blocks", "ffn": "FFN units"}
    counts = [score_counts(record, kind) for kind in parts]
    drawn = density_over_training(axes, counts, "Greens", "scores per unit of S (%)")
    lowest, highest = axes[0].get_ylim()
    for ax, title in zip(axes, parts.values(), strict=True):
        if history["threshold"].notna().all():
            tau = history["threshold"].astype(float).to_numpy()
            with np.errstate(divide="ignore"):
                bound = np.log(tau / (1 - tau))
            ax.plot(history["progress"], np.clip(bound, lowest, highest), color=figures.VERMILION, label="threshold")
        ax.set_title(title)
    axes[0].set_ylabel("score S")
    rows = pd.concat([part.assign(kind=kind) for part, kind in zip(drawn, parts, strict=True)])
    return fig, rows.merge(history, on="progress")


def deaths_in_training(record: Record) -> tuple[Figure, pd.DataFrame]:
    """Heads (left) and units (right) alive in each place while the masks close, as shares of those at the start."""
    fig, axes = figures.new_figure("page", 1, 2)
    drawn = []
    for ax, kind, part in zip(axes, ("heads", "units"), ("attention", "ffn"), strict=True):
        counts, progress = alive(record, kind)
        places = record["compression"]["places"][part]
        share = 100 * counts / counts[0]
        rows = np.arange(len(places) + 1) + 0.5
        mesh = ax.pcolormesh(cell_edges(progress), rows, share.T, cmap="Greens", vmin=0, vmax=100)
        ax.set(xlabel="progress of training", title=kind, ylabel="layer", yticks=range(1, len(places) + 1))
        table = pd.DataFrame(share, columns=places).assign(progress=progress, kind=kind)
        drawn.append(table.melt(["kind", "progress"], var_name="place", value_name="alive (%)"))
    fig.colorbar(mesh, ax=list(axes), label="alive (%)")
    return fig, pd.concat(drawn, ignore_index=True)


def block_sizes(frame: pd.DataFrame, sizes: Sequence[str]) -> tuple[Figure, pd.DataFrame]:
    """Retained share against weights left (left) and against weights stored after removal (right), by block size.

    Args:
        frame: ``analysis.block_movement.block_trials``; one colour per block size, one marker per task, bars over
            seeds; every seed small and pale, with a ring where its least density held.

    Returns:
        The figure, and its means with the span of their seeds' weights left (``least left``, ``most left``).
    """
    fig, axes = figures.new_figure("page", 1, 2, sharey=True)
    by, frame = ["block", "title"], frame.dropna(subset=["retained"])
    sizes_left = frame.groupby(by).agg(
        density=("density", "mean"), stored=("stored", "mean"), held=("held", "sum"),
        **{"least left": ("density", "min"), "most left": ("density", "max")},
    )  # fmt: skip
    rows = summarise(frame, by, "retained").join(sizes_left, on=by)
    titles = list(dict.fromkeys(rows["title"]))
    for size, color in zip(sizes, SHADES, strict=False):
        for title, marker in zip(titles, "os^D", strict=False):
            part = rows[(rows["block"] == size) & (rows["title"] == title)]
            seeds = frame[(frame["block"] == size) & (frame["title"] == title)]
            for ax, x in zip(axes, ("density", "stored"), strict=True):
                style = {"marker": marker, "color": color, "linestyle": ""}
                named = style | {"elinewidth": 0.7, "label": f"{size}, {title}"}
                ax.errorbar(part[x], part["retained"], figures.error_bars(part, "retained"), **named)
                if len(seeds) > len(part):
                    ax.plot(seeds[x], seeds["retained"], zorder=2, **style | PALE)
                _ring(ax, seeds[seeds["held"]], x, "retained")
    for ax, label in zip(axes, ("weights left (%)", "weights stored after removal (%)"), strict=True):
        ax.set(xlabel=label)
    axes[0].set_ylabel("retained share (%)")
    figures.outside_legend(fig)
    return fig, rows


def published_speed(frame: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """The paper's main figure again: published F1 against speed-up, theirs hollow, ours filled, one panel per engine.

    Args:
        frame: ``analysis.block_movement.shape_speed_frame`` at one batch size.
    """
    engines = list(dict.fromkeys(frame["engine"]))
    fig, axes = figures.panels(len(engines), across=4, row=1.7, margin=0.7, sharex=True, sharey=True)
    for ax, engine in zip(axes, engines, strict=False):
        part = frame[frame["engine"] == engine]
        for variant, rows in part.groupby("variant", sort=False):
            hollow = figures.style_of(str(variant), published=True) | {"linestyle": "", "alpha": 0.55}
            ax.plot(rows["speedup"], rows["f1"], **hollow)
            ax.plot(rows["ours"], rows["f1"], **figures.style_of(str(variant)) | {"linestyle": ""})
        headline = part[part["checkpoint"] == HEADLINE]
        for row in headline.to_dict("records"):
            ax.annotate("", (row["ours"], row["f1"]), (row["speedup"], row["f1"]),
                        arrowprops={"arrowstyle": "->", "color": figures.VERMILION, "linewidth": 0.9})  # fmt: skip
        ax.axvline(1, color=figures.GREY, linewidth=0.6)
        ax.set(title=figures.METHODS[engine][2])
    figures.name_axes(fig, "times faster than dense BERT-base", "published F1 (%)")
    return fig, frame


def score_against_speed(frame: pd.DataFrame, speed: pd.DataFrame, theirs: pd.DataFrame,
                        methods: Iterable[str] = PRUNED) -> tuple[Figure, pd.DataFrame]:  # fmt: skip
    """Retained share against measured speed of our models, one panel per engine, with the published points hollow.

    Args:
        frame: ``analysis.block_movement.block_frame``.
        speed: ``analysis.latency_frame`` of ``plans.trained_speed``, whose models are named by the hash of a record.
        theirs: ``analysis.block_movement.published_curves``.
    """
    joined = speed.merge(frame[["hash", "method", "task", "title", "seed", "strength", "density", "retained", "held"]],
                         left_on="model", right_on="hash")  # fmt: skip
    engines = list(dict.fromkeys(joined["engine"]))
    fig, axes = figures.panels(len(engines), across=4, row=1.7, margin=0.7, sharex=True, sharey=True)
    for ax, engine in zip(axes, engines, strict=False):
        for method in methods:
            rows = joined[(joined["engine"] == engine) & (joined["method"] == method)]
            if len(rows):
                ax.plot(rows["ratio_to_dense"], rows["retained"], **figures.style_of(method) | {"linestyle": ""})
                _ring(ax, rows[rows["held"]], "ratio_to_dense", "retained")
            printed = theirs[(theirs["method"] == method) & (theirs["teacher"] == "base")].sort_values("speedup")
            if len(printed):
                style = figures.style_of(method, published=True) | {"alpha": 0.55}
                ax.plot(printed["speedup"], printed["retained"], **style)
        figures.retained_line(ax, 100)
        ax.set(title=figures.METHODS[engine][2])
    figures.name_axes(fig, "times faster than dense", "retained share (%)")
    columns = ["engine", "batch", "length", "method", "title", "seed", "strength", "density", "retained", "held",
               "ratio_to_dense", "ratio_q1", "ratio_q3", "median_ms"]  # fmt: skip
    return fig, joined[columns]
