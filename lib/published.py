"""The papers' own numbers, each with where it stands and how well it is known.

One CSV per paper under ``published_numbers/``; a new paper only adds a file. Names are the study's own, so that a
published row joins a measured one: ``task`` as in ``lib.data.TASKS`` (``glue`` is the mean over a paper's GLUE tasks),
``method`` as in ``lib.figures.METHODS``. ``setting`` is ``key=value`` pairs joined by "; ", and each key becomes a
column (``K`` layers dropped, ``tolerance`` in percent, ``drop`` before or after fine-tuning).
"""

import csv
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from lib.config import StudyError
from lib.problems import first_problem

FOLDER = Path(__file__).parent / "published_numbers"

# From best known to least: read in the paper, read in the authors' repository, measured off a figure (about ±0.3
# points), arithmetic on printed numbers, somebody else's transcription.
Evidence = Literal["paper", "authors_code", "digitised", "derived", "secondary"]
Row = TypeVar("Row", bound=BaseModel)


class PublishedNumber(BaseModel):
    """One published number. ``value`` is in ``unit``: "%", "points", "M" (million), "x" (times), "layers", "ms", …"""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    paper: str = Field(min_length=1)
    place: str = Field(min_length=1)
    model: str = Field(min_length=1)
    task: str
    method: str = Field(min_length=1)
    setting: str = Field(pattern=r"^([A-Za-z_]\w*=[^=;]+(; [A-Za-z_]\w*=[^=;]+)*)?$")
    metric: str = Field(min_length=1)
    value: FiniteFloat
    unit: str
    evidence: Evidence
    source: str = Field(min_length=1)
    note: str = ""

    def settings(self) -> dict[str, float | str]:
        """``setting`` taken apart; a number where it reads as one."""
        pairs = (pair.split("=", 1) for pair in self.setting.split("; ") if pair)
        return {key: float(text) if re.fullmatch(r"-?\d+(\.\d+)?", text) else text for key, text in pairs}


def papers(folder: Path = FOLDER) -> list[str]:
    """Names of the papers whose numbers are here."""
    return sorted(path.stem for path in folder.glob("*.csv"))


def published(paper: str, folder: Path = FOLDER, **filters: Any) -> pd.DataFrame:
    """Published numbers of ``paper`` whose columns equal ``filters``; a list, tuple or set means any of its members.

    >>> published("sajjad2020", model="BERT-base", metric="parameters", K=6)["value"].item()
    66.0

    Raises:
        StudyError: unknown paper, unknown column, a filter that no row passes, or a damaged file.
    """
    frame = _read(paper, folder)
    for column, wanted in filters.items():
        if column not in frame.columns:
            raise StudyError(f"published({paper!r}): no column '{column}'; the columns are {', '.join(frame.columns)}")
        choices = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
        rows = frame[frame[column].isin(choices)]
        if rows.empty:
            there = ", ".join(str(value) for value in frame[column].dropna().unique())
            raise StudyError(f"published({paper!r}): no row with {column} = {wanted!r}; there is {there}")
        frame = rows
    return frame.reset_index(drop=True)


@cache
def _read(paper: str, folder: Path) -> pd.DataFrame:
    """All rows of one file, validated; the caller never changes this frame in place."""
    path = folder / f"{paper}.csv"
    if not path.is_file():
        raise StudyError(f"no published numbers for '{paper}' ({path.name} is missing); there is {_listed(folder)}")
    numbers = read_rows(path, PublishedNumber)
    if strangers := sorted({number.paper for number in numbers} - {paper}):
        raise StudyError(f"{path.name}: holds rows of '{strangers[0]}', expected only '{paper}'; move them")
    return pd.DataFrame([number.model_dump() | number.settings() for number in numbers])


def read_rows(path: Path, model: type[Row]) -> list[Row]:
    """Every row of a CSV file of the repository, validated.

    Raises:
        StudyError: the file is missing, empty or damaged; names the line.
    """
    advice, rows = "restore it from the repository", []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise StudyError(f"{path.name} line {reader.line_num}: wrong number of columns; {advice}")
                try:
                    rows.append(model.model_validate(row))
                except ValidationError as error:
                    problem = first_problem(error, "the row")
                    raise StudyError(f"{path.name} line {reader.line_num}: {problem}; {advice}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StudyError(f"{path.name}: not a readable CSV file ({error}); {advice}") from None
    if not rows:
        raise StudyError(f"{path.name}: has no rows; {advice}")
    return rows


def _listed(folder: Path) -> str:
    return ", ".join(papers(folder)) or "none"
