"""The figures of notebook 06 that are more than a curve; the first one returns its drawn rows as well."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from lib import figures
from lib.analysis import summarise
from lib.analysis.fullyqt import STYLES
from lib.config import StudyError

NEAR = (92, 104)
AFTER = {"embeddings": "s", "attention": "o", "feed-forward": "v"}


def score_against_bits(frame: pd.DataFrame, theirs: pd.DataFrame, bits: Sequence[int]) -> tuple[Figure, pd.DataFrame]:
    """Retained share against bit width, one column of panels per task; below each the same near 100 %.

    Args:
        frame: columns title, procedure, bits, retained, one row per run.
        theirs: the published points: columns procedure, bits, retained.
        bits: widths that the axis names beside the published ones.

    Raises:
        StudyError: no quantised run.
    """
    if frame.empty:
        raise StudyError("full quantisation: no quantised run is finished yet; raise budget_minutes")
    titles = list(dict.fromkeys(frame["title"]))
    fig, axes = figures.new_figure("page", 2, len(titles), height=4.2, squeeze=False, sharex="col", sharey="row")
    drawn = []
    for title, (ax, near) in zip(titles, axes.T, strict=True):
        for place, (kind, part) in enumerate(frame[frame["title"] == title].groupby("procedure", sort=False)):
            aside = 0.12 * (place - 1)  # so that the ways at one width do not hide each other
            figures.band_plot(near, part, "bits", "retained", STYLES[str(kind)], shift=aside)
            points = figures.band_plot(ax, part, "bits", "retained", STYLES[str(kind)], shift=aside)
            drawn.append(points.assign(task=title))
        for kind, part in theirs.groupby("procedure", sort=False):
            style = STYLES["scratch" if kind == "aware" else str(kind)]  # the paper rounds from the start
            figures.band_plot(near, part, "bits", "retained", style, published=True)
            points = figures.band_plot(ax, part, "bits", "retained", style, published=True)
            drawn.append(points.assign(task="WMT14 En-De"))
        for one in (ax, near):
            figures.retained_line(one, 100)
        ax.set(title=title)
        near.set(xlabel="bits", xticks=sorted({*bits, *theirs["bits"]}), ylim=NEAR)
    for one in axes[:, 0]:
        one.set_ylabel("retained BLEU (%)")
    figures.outside_legend(fig)
    return fig, pd.concat(drawn, ignore_index=True)


def parts_alone(parts: pd.DataFrame) -> Figure:
    """Retained share with one kind of tensor rounded, a panel per task, a colour per bit width; bars span the seeds.

    Args:
        parts: of ``part_frame``, at least one row.
    """
    titles, names = list(dict.fromkeys(parts["title"])), list(dict.fromkeys(parts["part"]))
    fig, axes = figures.panels(len(titles), across=1, row=1.9)
    for ax, title in zip(axes, titles, strict=True):
        here = parts[parts["title"] == title]
        for offset, (width, part) in enumerate(here.groupby("bits", sort=False)):
            means = summarise(part, ["part"], "retained")
            where = means["part"].map(names.index) + 0.2 * (offset - 0.5 * (here["bits"].nunique() - 1))
            bars, style = figures.error_bars(means, "retained"), figures.style_of(f"int{width}") | {"linestyle": ""}
            ax.errorbar(where, means["retained"], bars, capsize=2, **style)
        ax.set(ylabel="retained score (%)", title=title, xlim=(-0.5, len(names) - 0.5))
        ax.set_xticks(range(len(names)), names)
        figures.retained_line(ax, 100)
    figures.outside_legend(fig)
    return fig


def layer_norm_steps(norms: pd.DataFrame) -> Figure:
    """Coarseness of every LayerNorm's rounding, from the input on, a panel per task; dashed: one step per deviation.

    Args:
        norms: of ``norm_frame``, one bit width, at least one row.
    """
    titles = list(dict.fromkeys(norms["title"]))
    limits = min(0.02, norms["coarse"].min() / 1.5), max(2, norms["coarse"].max() * 1.5)
    fig, axes = figures.panels(len(titles), across=3, row=2.0, sharey=True)
    for ax, title in zip(axes, titles, strict=True):
        for (kind, marker), color in zip(AFTER.items(), figures.SERIES, strict=False):
            rows = norms[(norms["title"] == title) & (norms["after"] == kind)]
            if len(rows):
                ax.plot(rows["place"], rows["coarse"], linestyle="", color=color, marker=marker, label=f"after {kind}")
        ax.axhline(1, color=figures.BLACK, linewidth=0.7, linestyle=figures.DASHES)
        ax.set(yscale="log", ylim=limits, title=title, xlabel="LayerNorm, from the input on")
    axes[0].set_ylabel("one step (smallest deviations)")
    figures.outside_legend(fig)
    return fig


def score_against_delay(scratch: pd.DataFrame) -> Figure:
    """Retained share against the delay of rounding: points are seeds, lines their means, a colour per bit width.

    Args:
        scratch: columns bits, delay (0 to 1), retained, one row per run, at least one.
    """
    fig, ax = figures.new_figure("column")
    for width, part in scratch.groupby("bits"):
        style = figures.style_of(f"int{width}")
        ax.plot(
            part["delay"], part["retained"], **style | {"linestyle": "", "markersize": 3, "alpha": 0.5, "label": "_"}
        )
        ax.plot(part.groupby("delay")["retained"].mean(), **style | {"marker": ""})
    figures.retained_line(ax, 100)
    ax.set(xlabel="share of training before rounding", ylabel="retained BLEU (%)")
    figures.outside_legend(fig)
    return fig


def speed_of_engines(rows: pd.DataFrame) -> Figure:
    """Speed against the fastest fp32 engine, a line of markers per model and condition.

    Args:
        rows: columns what, engine and speedup (1 is the fastest fp32 engine of the same ``what``), at least one row.
    """
    names = list(dict.fromkeys(rows["what"]))
    fig, ax = figures.new_figure("page", height=0.6 + 0.5 * len(names))
    for number, name in enumerate(names):
        for engine, one in rows[rows["what"] == name].groupby("engine", sort=False):
            ax.plot(one["speedup"], [number] * len(one), **figures.style_of(str(engine)) | {"linestyle": ""})
    ax.axvline(1, color=figures.BLACK, linewidth=0.7, linestyle=figures.DASHES)
    ax.set(xlabel="times as fast as the fastest fp32 engine")
    ax.set_yticks(range(len(names)), names)
    figures.outside_legend(fig)
    return fig
