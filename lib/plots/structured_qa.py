"""The figures of notebook 02 that are more than a curve; each returns the figure and the drawn rows."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib import figures
from lib.analysis import summarise
from lib.config import StudyError

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
        errors = np.abs(rows[["low", "high"]].to_numpy().T - rows["retained"].to_numpy())
        where = rows["recovery"].map(order.index) + 0.12 * number
        style = {"color": SHADES[number % len(SHADES)], "marker": "o", "linestyle": "", "capsize": 2}
        ax.errorbar(where, rows["retained"], errors, label=removed, **style)
        drawn.append(rows.assign(removed=removed))
    ax.set_xticks(range(len(order)), [name.replace(" and ", "\nand ") for name in order])
    ax.set(ylabel="F1 retained (%)")
    figures.retained_line(ax, 100)
    figures.outside_legend(fig)
    return fig, pd.concat(drawn, ignore_index=True)
