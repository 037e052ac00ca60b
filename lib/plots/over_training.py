"""How a distribution moves while training: what the figures of gates and of scores share."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes


def density_over_training(
    axes: Sequence[Axes],
    histograms: Sequence[tuple[np.ndarray, Sequence[float], Sequence[float]]],
    cmap: str,
    label: str,
) -> list[pd.DataFrame]:
    """How a distribution moves while training: one panel for each histogram, one colour scale and y range for all.

    Colour is percent *per unit of y*, since bins differ in width; the y axis ends with the bins that ever hold half a
    percent. ``label`` names the colour bar.

    Args:
        histograms: for each panel counts (points, bins), progress of each point (0 to 1) and the edges of the bins.
            Outer bins hold all that is beyond, and are drawn as wide as their neighbours.

    Returns:
        For each panel what is drawn: columns progress, from, to (the edges) and "per unit (%)".
    """
    shown, used, drawn = [], [], []
    for counts, _, edges in histograms:
        inner = np.array(edges, dtype=float)
        inner[0], inner[-1] = 2 * inner[1] - inner[2], 2 * inner[-2] - inner[-3]
        share = 100 * counts / counts.sum(1, keepdims=True)
        shown.append((share / np.diff(inner), inner))
        full = np.flatnonzero(share.max(0) >= 0.5)
        used += [inner[full[0]], inner[full[-1] + 1]]
    top = max(float(np.quantile(density, 0.99)) for density, _ in shown)
    for ax, (density, inner), (_, progress, _) in zip(axes, shown, histograms, strict=True):
        mesh = ax.pcolormesh(cell_edges(progress), inner, density.T, cmap=cmap, vmin=0, vmax=top)
        ax.set(xlabel="progress of training", ylim=(min(used), max(used)))
        ax.grid(visible=False)
        table = pd.DataFrame(density, index=pd.Index(progress, name="progress")).reset_index()
        table = table.melt("progress", var_name="bin", value_name="per unit (%)")
        bins = table.pop("bin").astype(int)
        drawn.append(table.assign(**{"from": inner[bins], "to": inner[bins + 1]}))
    axes[0].figure.colorbar(mesh, ax=list(axes), label=label, extend="max")
    return drawn


def cell_edges(progress: Sequence[float]) -> np.ndarray:
    """Edges (0 to 1) of cells centred on the points of training."""
    middles = (np.array(progress[1:]) + np.array(progress[:-1])) / 2
    return np.concatenate([[0.0], middles, [1.0]])
