"""Tables for reports: CSV to six digits, Markdown and LaTeX (booktabs) as printed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.config import StudyError
from lib.files import write_atomically

PAGE = 100  # characters of a line that fits a page as it is
LONG = 24  # characters of a cell that is wrapped where the line does not fit

Formats = Mapping[str, str | Callable[[Any], str]]


def csv_text(frame: pd.DataFrame) -> str:
    """``frame`` as CSV without its index, floats to six significant digits, the same bytes on every platform."""
    return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def save_table(
    frame: pd.DataFrame, name: str, caption: str, folder: Path | str, formats: Formats | None = None
) -> dict[str, Path]:
    """Write ``name`` as .csv (six digits), .md and .tex (booktabs) into ``folder``; the index is left out.

    ``formats`` maps a column to a format string ("{:.1f}") or a function, for Markdown and LaTeX.

    Raises:
        StudyError: an empty table, a format for an absent column, or ``folder`` cannot be written.
    """
    if frame.empty:
        raise StudyError(f"table '{name}': has no rows; nothing was measured or the filter is wrong")
    files = {
        "csv": csv_text(frame),
        "md": f"{markdown_table(frame, formats)}\n\n{caption.strip()}\n",
        "tex": latex_table(frame, caption, f"tab:{name}", formats),
    }
    return {kind: write_atomically(Path(folder) / f"{name}.{kind}", content) for kind, content in files.items()}


def show(frame: pd.DataFrame, caption: str = "", formats: Formats | None = None) -> Any:
    """``frame`` as a Markdown display with its caption, the last expression of a notebook cell."""
    from IPython.display import Markdown

    note = f"\n\n*{caption.strip()}*" if caption else ""
    return Markdown(markdown_table(frame, formats) + note)


def markdown_table(frame: pd.DataFrame, formats: Formats | None = None) -> str:
    """``frame`` as a Markdown pipe table, numbers to the right."""
    cells = _formatted(frame, formats).map(lambda text: text.replace("|", "\\|").replace("\n", " "))
    cells.columns = [str(column).replace("|", "\\|") for column in frame.columns]
    sides = ["right" if numeric else "left" for numeric in _numeric(frame)]
    return cells.to_markdown(index=False, disable_numparse=True, colalign=sides if len(cells) else None)


def latex_table(frame: pd.DataFrame, caption: str, label: str, formats: Formats | None = None) -> str:
    """``frame`` as a LaTeX table with booktabs rules, everything escaped; long text wraps to the width of the line."""
    plain = _formatted(frame, formats)
    cells, columns = plain.map(latex_text), _latex_columns(plain, _numeric(frame))
    cells.columns = [latex_text(str(column)) for column in frame.columns]
    return cells.to_latex(
        index=False, escape=False, caption=latex_text(caption.strip()), label=label, column_format=columns,
        position="tbp",
    )  # fmt: skip


def _latex_columns(cells: pd.DataFrame, numeric: list[bool]) -> str:
    """Numbers to the right; columns of long text share what the others leave of a line that is too long for a page."""
    widths = [int(cells[column].map(len).max()) if len(cells) else 0 for column in cells]
    long = [width > LONG and not number for width, number in zip(widths, numeric, strict=True)]
    if sum(widths) <= PAGE or not any(long):
        return "".join("r" if number else "l" for number in numeric)
    taken = sum(width for width, wraps in zip(widths, long, strict=True) if not wraps)
    room = max(0.5, 0.94 - 0.03 * len(widths) - taken / PAGE)  # of the line, less the space between columns
    shares = [width**0.5 * wraps for width, wraps in zip(widths, long, strict=True)]
    return "".join(
        f"p{{{room * share / sum(shares):.2f}\\linewidth}}" if share else "r" if number else "l"
        for share, number in zip(shares, numeric, strict=True)
    )


def _numeric(frame: pd.DataFrame) -> list[bool]:
    kinds = (frame.iloc[:, i] for i in range(frame.shape[1]))
    return [pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind) for kind in kinds]


def _formatted(frame: pd.DataFrame, formats: Formats | None) -> pd.DataFrame:
    """Every cell as text: by ``formats``, else floats to four significant digits; a missing value is an en dash."""
    formats = formats or {}
    if unknown := set(formats) - set(frame.columns):
        raise StudyError(f"format for column '{min(map(str, unknown))}', the columns are {', '.join(map(str, frame))}")

    def text(value: Any, how: str | Callable[[Any], str] | None) -> str:
        if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
            return "–"
        if how is not None:
            return how(value) if callable(how) else how.format(value)
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    columns = [[text(value, formats.get(column)) for value in frame[column]] for column in frame.columns]
    return pd.DataFrame(dict(enumerate(columns)), dtype=object)


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "×": r"$\times$", "±": r"$\pm$", "≤": r"$\leq$",
        "≥": r"$\geq$", "−": r"$-$", "–": "--", "…": r"\dots{}", "λ": r"$\lambda$", "γ": r"$\gamma$", "τ": r"$\tau$",
        "<": r"\textless{}", ">": r"\textgreater{}", "\n": " ",
    }
)  # fmt: skip


def latex_text(text: str) -> str:
    """``text`` with everything that means something to LaTeX escaped."""
    return text.translate(_LATEX)
