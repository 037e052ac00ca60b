"""The house style of every figure, and the one way to save it (tables: ``lib.tables``).

A figure is saved as PDF, SVG and PNG together with the plotted rows (CSV) and its caption, and is byte-stable: the
same data gives the same files, so a diff means that results changed. Every method has one colour and marker
everywhere (Okabe-Ito without yellow, with more greens for the variants of one paper; dense is black); ours is filled,
published hollow.
"""

import io
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.config import StudyError
from lib.files import write_atomically
from lib.intervals import bootstrap_interval
from lib.tables import csv_text
from lib.tables import save_table as save_table
from lib.tables import show as show

SIZES = {"column": (3.25, 2.3), "page": (5.5, 2.6)}  # inches

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"
DARK_GREEN, LIGHT_GREEN, OLIVE = "#00543D", "#6FCBAE", "#8A8F1F"  # the variants of one paper, in one figure

# method: (colour, marker, name in legends). Methods that share a colour never share a marker; the first of each paper
# is the one that the overview figures show, and those differ in colour.
METHODS: dict[str, tuple[str, str, str]] = {
    "dense": (BLACK, "o", "Dense"),
    "magnitude": (GREY, "<", "Magnitude"),
    # structured pruning for question answering
    "l0": (BLUE, "s", "$L_0$ gates"),
    "l0-joint": (BLUE, "*", "$L_0$ gates, joint"),
    "magnitude-iterative": (GREY, ">", "Magnitude, iterative"),
    "gain": (SKY, "^", "Gain"),
    "leave-one-out": (PURPLE, "v", "Leave one out"),
    "random": (VERMILION, ">", "Random"),
    # oBERT
    "obert": (ORANGE, "D", "oBERT"),
    "obert-block4": (ORANGE, "P", "oBERT, blocks of 4"),
    "movement": (SKY, "X", "Movement"),
    # block movement pruning
    "hybrid": (GREEN, "h", "Hybrid"),
    "hybrid-filled": (DARK_GREEN, ">", "Hybrid filled"),
    "block": (LIGHT_GREEN, "X", "Blocks everywhere"),
    "struct": (OLIVE, "d", "Whole heads and units"),
    "hybrid-top-k": (GREEN, "*", "Hybrid, best k"),
    "hybrid-alone": (GREEN, "v", "Hybrid, no teacher"),
    "hybrid-large": (GREEN, "p", "Hybrid, large teacher"),
    "hybrid-large-filled": (DARK_GREEN, "<", "Hybrid filled, large teacher"),
    "dense-distilled": (BLACK, "D", "Dense, distilled"),
    # Poor Man's BERT: which layers are dropped
    "top": (VERMILION, "o", "Top"),
    "bottom": (BLUE, "v", "Bottom"),
    "odd": (ORANGE, "^", "Odd alternate"),
    "even": (SKY, "D", "Even alternate"),
    "symmetric": (GREEN, "s", "Symmetric"),
    "contribution": (PURPLE, "P", "Contribution"),
    # fully quantized Transformer
    "int8": (SKY, "v", "8 bit"),
    "int7": (ORANGE, "<", "7 bit"),
    "int6": (BLUE, "<", "6 bit"),
    "int5": (GREEN, "P", "5 bit"),
    "int4": (PURPLE, ">", "4 bit"),
    "int3": (VERMILION, "D", "3 bit"),
    "int2": (GREY, "v", "2 bit"),
    "quantized-aware": (SKY, "o", "Trained on with rounding"),
    "quantized-post": (VERMILION, "v", "Rounded after training"),
    "quantized-scratch": (BLUE, "^", "Trained with rounding"),
    # KroneckerBERT
    "kronecker": (PURPLE, "X", "Kronecker"),
    "kron8": (PURPLE, "h", "KroneckerBERT$_{8}$"),
    "kron19": (SKY, "p", "KroneckerBERT$_{19}$"),
    "kron21": (BLUE, "p", "KroneckerBERT$_{21}$"),
    # several methods on one model
    "compound": (BLACK, "*", "Compound"),
    "engine-int8": (OLIVE, "X", "INT8 by an engine"),
    # engines: colour is the engine, marker the precision
    "pytorch-fp32": (BLACK, "s", "PyTorch fp32"),
    "pytorch-bf16": (BLACK, "^", "PyTorch bf16"),
    "pytorch-bsr-fp32": (VERMILION, "P", "PyTorch block-sparse fp32"),
    "onnxruntime-fp32": (BLUE, "o", "ONNX Runtime fp32"),
    "onnxruntime-int8": (BLUE, "D", "ONNX Runtime INT8"),
    "openvino-fp32": (ORANGE, "s", "OpenVINO fp32"),
    "openvino-bf16": (ORANGE, "v", "OpenVINO bf16"),
    "openvino-int8": (ORANGE, "X", "OpenVINO INT8"),
    "pytorch-csr-fp32": (VERMILION, "<", "PyTorch CSR fp32"),
    "pytorch-tiles-fp32": (VERMILION, "d", "PyTorch 4×4 tiles fp32"),
    "openvino-sparse-int8": (ORANGE, "*", "OpenVINO sparse INT8"),
    "deepsparse-fp32": (PURPLE, "s", "DeepSparse fp32"),
    "deepsparse-int8": (PURPLE, "D", "DeepSparse INT8"),
    "pytorch-cuda-fp32": (GREEN, "o", "CUDA fp32"),
    "pytorch-cuda-fp16": (GREEN, "D", "CUDA fp16"),
    "pytorch-cuda-bf16": (GREEN, "^", "CUDA bf16"),
}

SERIES = (BLACK, VERMILION, BLUE, GREEN, ORANGE, PURPLE, SKY)  # of what has no style of its own, such as tasks
DASHES = (0, (3, 1.5))
PUBLISHED = ", published"  # ends the label of what is drawn hollow
OF_DENSE = " of dense"  # ends the label of lines that mark a share of the dense score

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs everywhere
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.labelpad": 2.5,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
    "figure.constrained_layout.use": True,
    "figure.dpi": 144,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "bert-compression-study",
}

# Everything a backend would otherwise stamp into a file: dates and versions would differ without a new result.
_UNSTAMPED: dict[str, dict[str, None]] = {
    "pdf": {"CreationDate": None, "ModDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
}


def new_figure(size: str = "column", rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of house size ("column" 3.25×2.3 in, "page" 5.5×2.6 in) and its axes; sets the house style globally.

    ``options`` go to ``matplotlib.pyplot.subplots``; ``height`` (inches) replaces the size's own for tall figures.
    """
    if size not in SIZES:
        raise StudyError(f"figure size '{size}' is unknown; allowed: {', '.join(SIZES)}")
    plt.rcParams.update(STYLE)
    width, height = SIZES[size]
    fig, axes = plt.subplots(rows, columns, figsize=(width, options.pop("height", height)), **options)
    plt.close(fig)  # takes it from pyplot, which would show it at the end of a cell, finished or not
    return fig, axes


def panels(
    count: int, across: int = 3, row: float = 1.75, margin: float = 0.5, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A page-wide grid of ``count`` panels (at least one), ``across`` abreast, and their axes in reading order.

    ``row`` is the height of a row of panels, ``margin`` what the figure has besides, in inches; ``options`` as for
    ``new_figure``. Places of the grid that no panel takes stay blank.
    """
    count = max(count, 1)
    columns = min(across, count)
    rows = -(-count // columns)
    fig, axes = new_figure("page", rows, columns, height=margin + row * rows, squeeze=False, **options)
    for blank in axes.flat[count:]:
        blank.set_visible(False)
    used = list(axes.flat[:count])
    for lowest in used[-columns:]:
        lowest.tick_params(labelbottom=True)  # a shared x axis has its numbers in the last row, blank or not
    return fig, used


def style_of(method: str, published: bool = False) -> dict[str, Any]:
    """Keyword arguments for ``Axes.plot``: the method's colour, marker and label; published is hollow and dashed."""
    if method not in METHODS:
        raise StudyError(f"no style for method '{method}'; add it to METHODS in lib/figures.py ({', '.join(METHODS)})")
    color, marker, label = METHODS[method]
    return {
        "color": color,
        "marker": marker,
        "markerfacecolor": "white" if published else color,
        "markeredgecolor": color,
        "markeredgewidth": 0.9,
        "linestyle": DASHES if published else "-",
        "label": label + PUBLISHED if published else label,
    }


def series_style(number: int) -> dict[str, Any]:
    """Colour and line of one of several series, numbered from 0; where the colours start again the line changes."""
    return {"color": SERIES[number % len(SERIES)], "linestyle": ("-", DASHES, ":")[number // len(SERIES) % 3]}


def error_bars(rows: pd.DataFrame, value: str, low: str = "low", high: str = "high") -> np.ndarray:
    """Lengths of the bars below and above ``value``, as ``Axes.errorbar`` takes them.

    Args:
        rows: with the columns ``value``, ``low`` and ``high``, in the same units; NaN ends where there is no interval.

    Returns:
        Array of shape (2, rows); NaN, which draws no bar, where an end is unknown.
    """
    return np.abs(rows[[low, high]].to_numpy(dtype=float).T - rows[value].to_numpy(dtype=float))


def band_plot(
    ax: Axes,
    frame: pd.DataFrame,
    x: str,
    y: str,
    method: str,
    published: bool = False,
    label: str | None = None,
    seed: int = 0,
    shift: float = 0.0,
) -> pd.DataFrame:
    """Draw the mean of ``y`` at each ``x`` with its bootstrap interval; one row of ``frame`` is one seed.

    ``shift``, in units of ``x``, moves what is drawn aside, so that several methods' error bars at one ``x`` can be
    told apart. Returns what was drawn, for ``save_figure``: columns ``method``, ``published``, x (not moved), y,
    ``low``, ``high``, ``n``.
    """
    if frame.empty:
        raise StudyError(f"band_plot: no rows for method '{method}'; nothing was measured or the filter is wrong")
    intervals = {key: bootstrap_interval(group, seed) for key, group in frame.groupby(x, sort=True)[y]}
    drawn = pd.DataFrame([{x: key, y: i.mean, "low": i.low, "high": i.high, "n": i.n} for key, i in intervals.items()])
    style = style_of(method, published) | ({"label": label} if label else {})
    at = drawn[x] + shift if shift else drawn[x]
    ax.plot(at, drawn[y], **style, zorder=3)
    known = drawn["low"].notna()
    if (known & known.shift(1, fill_value=False)).any():
        ax.fill_between(at, drawn["low"], drawn["high"], color=style["color"], alpha=0.18, lw=0, zorder=2)
    # where no neighbour has an interval the band has no width: an error bar instead
    alone = drawn[known & ~known.shift(1, fill_value=False) & ~known.shift(-1, fill_value=False)]
    if len(alone):
        bars = {"color": style["color"], "capsize": 2, "linewidth": 0.9, "linestyle": "", "zorder": 2}
        ax.errorbar(at[alone.index], alone[y], error_bars(alone, y), **bars)
    drawn.insert(0, "method", method)
    drawn.insert(1, "published", published)
    return drawn


def speed_line(ax: Axes, at: Sequence[float] | pd.Series, rows: pd.DataFrame, engine: str, shift: float = 0.0) -> None:
    """Times faster than dense at ``at``: median over rounds with quartiles as a bar, in the engine's style.

    Args:
        rows: of ``analysis.latency_frame``, one engine, in the order of ``at``.
        shift: in units of x, moves what is drawn aside so that the bars of several engines can be told apart.
    """
    where, bars = np.asarray(at, dtype=float) + shift, error_bars(rows, "ratio_to_dense", "ratio_q1", "ratio_q3")
    ax.errorbar(where, rows["ratio_to_dense"], bars, capsize=1.5, elinewidth=0.7, **style_of(engine))


def counted(number: int, noun: str) -> str:
    """A number and its noun: "1 model", "3 models"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def span(numbers: Iterable[float]) -> str:
    """Whole numbers from the least to the largest: "3", "1 to 3"."""
    whole = [int(number) for number in numbers]
    least, most = min(whole), max(whole)
    return f"{least}" if least == most else f"{least} to {most}"


def spread_note(rows: pd.DataFrame, of: str = "seeds") -> str:
    """The caption's sentence on means, bands and n, from the ``n`` column of ``band_plot``'s rows."""
    counts = sorted({int(n) for n in rows["n"]})
    if not counts:
        return "No run of ours is finished yet."
    if counts == [1]:
        return "Single runs (n = 1), so no interval."
    ranges = f"; of two or three {of}: their range" if 2 in counts or 3 in counts else ""
    note = f"Mean and 95 % bootstrap interval (band or bar{ranges}) over n = {span(counts)} {of}"
    return f"{note}; no interval where n = 1." if counts[0] == 1 else f"{note}."


def retained_line(ax: Axes, dense: float, share: float = 0.99) -> float:
    """Dashed line at ``share`` of the dense score, named in the legend; returns its height."""
    height = share * dense
    label = f"{100 * share:.0f} %{OF_DENSE}"
    ax.axhline(height, color=BLACK, linestyle=(0, (4, 3)), linewidth=0.7, zorder=0.8, label=label)
    return height


def outside_legend(fig: Figure, columns: int | None = None, side: str = "top") -> None:
    """One legend for all axes, above ("top") or beside ("right") them, where it covers no data.

    Where ours and published numbers are drawn, each method is named once and two grey entries tell them apart.
    Lines at a share of the dense score come last.
    """
    found: dict[str, Any] = {}
    for ax in fig.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    marks = {label: found.pop(label) for label in list(found) if label.endswith(OF_DENSE)}
    if any(label.endswith(PUBLISHED) for label in found):
        found = _named_once(found)
    found |= marks
    if side == "right":
        fig.legend(found.values(), found.keys(), loc="outside right center", ncols=columns or 1)
        return
    column_width = 0.3 + 0.053 * max(map(len, found), default=1)  # inches: handle and gaps, then 7 pt letters
    columns = columns or max(1, int(fig.get_size_inches()[0] / column_width))
    fig.legend(found.values(), found.keys(), loc="outside upper center", ncols=min(columns, max(1, len(found))))


def name_axes(fig: Figure, x: str, y: str) -> None:
    """One name for the x axes of all panels and one for their y axes, and the legend."""
    fig.supxlabel(x, fontsize=8)
    fig.supylabel(y, fontsize=8)
    outside_legend(fig)


def _named_once(found: dict[str, Any]) -> dict[str, Any]:
    """Legend entries by method, whether ours or published or both, then one of each kind in grey."""
    entries: dict[str, Any] = {}
    for label, handle in found.items():
        name = label.removesuffix(PUBLISHED)
        if name not in entries or not label.endswith(PUBLISHED):
            entries[name] = handle
    ours = Line2D([], [], color=GREY, marker="o")
    published = Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle=DASHES)
    return entries | {"Ours": ours, "Published": published}


def save_figure(fig: Figure, name: str, rows: pd.DataFrame, caption: str, folder: Path | str) -> dict[str, Path]:
    """Write ``name`` as .pdf, .svg, .png (300 dpi), .csv (the plotted ``rows``) and .txt (the caption) into ``folder``.

    Raises:
        StudyError: no rows or no caption, or ``folder`` cannot be written.
    """
    if rows.empty or not caption.strip():
        raise StudyError(f"figure '{name}': needs the plotted rows and a caption; pass both to save_figure")
    files: dict[str, bytes | str] = {}
    with plt.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        for kind, metadata in _UNSTAMPED.items():
            buffer = io.BytesIO()
            fig.savefig(buffer, format=kind, metadata=metadata)
            files[kind] = buffer.getvalue()
    files["csv"] = csv_text(rows)
    files["txt"] = caption.strip() + "\n"
    return {kind: write_atomically(Path(folder) / f"{name}.{kind}", content) for kind, content in files.items()}
