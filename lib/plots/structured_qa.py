"""The figures of notebook 02 that are more than a curve; each returns the figure and the drawn rows."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from lib import figures
from lib.analysis import summarise
from lib.analysis.structured_qa import gate_counts, gate_history
from lib.config import StudyError
from lib.gates import CLOSED_BELOW
from lib.plots.over_training import density_over_training
from lib.records import Record

ORDER = ("none", "retrain", "distil", "retrain and distil")
SHADES = (figures.BLUE, figures.VERMILION, figures.GREEN, figures.PURPLE)


def recovery_figure(points: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Retained share of every way of training after the cut, a colour per operating point.

    Args:
        points: columns removed, recovery, retained, one row per run. An operating point need not have every recovery.

    Raises:
        StudyError: no pruned run.
    """
    if points.empty:
        raise StudyError("structured pruning: no operating point is finished yet; raise budget_minutes")
    order = [name for name in ORDER if name in set(points["recovery"])]
    fig, ax = figures.new_figure("column")
    drawn = []
    for number, (removed, part) in enumerate(points.groupby("removed", sort=False)):
        rows = summarise(part, ["recovery"], "retained")
        where = rows["recovery"].map(order.index) + 0.12 * number
        style = {"color": SHADES[number % len(SHADES)], "marker": "o", "linestyle": "", "capsize": 2}
        ax.errorbar(where, rows["retained"], figures.error_bars(rows, "retained"), label=removed, **style)
        drawn.append(rows.assign(removed=removed))
    ax.set_xticks(range(len(order)), [name.replace(" and ", "\nand ") for name in order])
    ax.set(ylabel="retained share of F1 (%)")
    figures.retained_line(ax, 100)
    figures.outside_legend(fig)
    return fig, pd.concat(drawn, ignore_index=True)


def selection_figure(frame: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Score of every selection against what is removed: heads (left), units (middle), both (right).

    Args:
        frame: of ``structured_frame``, one task, nothing retrained. For both, x is the share of the layers' parameters.
    """
    fig, axes = figures.new_figure("page", 1, 3, sharey=True)
    drawn = []
    for ax, kind in zip(axes, ("heads", "units", "both"), strict=True):
        rows = frame[frame["kind"] == kind]
        left = rows["layers kept" if kind == "both" else kind]
        for name, part in rows.assign(removed=(100 * (1 - left)).round(1)).groupby("selection", sort=False):
            drawn.append(figures.band_plot(ax, part, "removed", "score", str(name)).assign(kind=kind))
        dense = frame[frame["selection"] == "dense"]["score"].mean()
        ax.axhline(dense, color=figures.BLACK, linewidth=0.9)
        figures.retained_line(ax, dense)
        ax.set(xlabel="both: weights removed (%)" if kind == "both" else f"{kind} removed (%)")
    axes[0].set_ylabel("F1 (%)")
    figures.outside_legend(fig)
    return fig, pd.concat(drawn, ignore_index=True) if drawn else pd.DataFrame()


def gates_in_training(records: Sequence[Record]) -> tuple[Figure, pd.DataFrame]:
    """Distribution of log alpha over training, one panel per run; below the line a gate is shut without noise.

    Args:
        records: of finished runs that trained gates of one kind each, at least one.
    """
    fig, axes = figures.new_figure("page", 1, len(records), squeeze=False, sharey=True)
    kinds = [next(iter(record["compression"]["density"])) for record in records]
    counts = [gate_counts(record, kind) for record, kind in zip(records, kinds, strict=True)]
    densities = density_over_training(axes[0], counts, "Blues", r"gates per unit of $\log\alpha$ (%)")
    drawn = []
    for ax, record, kind, rows in zip(axes[0], records, kinds, densities, strict=True):
        ax.axhline(CLOSED_BELOW, color=figures.VERMILION, linewidth=0.8)
        ax.set_title(f"{kind}, {100 * record['compression']['density'][kind]:.0f} % kept")
        drawn.append(rows.merge(gate_history(record, kind), on="progress").assign(kind=kind))
    axes[0, 0].set_ylabel(r"$\log\alpha$")
    return fig, pd.concat(drawn, ignore_index=True)
