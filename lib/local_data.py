"""Readers of the files that benchmarks are shipped as: SQuAD JSON, GLUE TSV, parallel text.

They check what they read, because a wrong offset or a shifted column trains a model without any complaint. Each problem
raises a StudyError that names the file and the line, article or question.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.config import StudyError

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Glue:
    """How GLUE ships a task: folder, text and label columns (by header name, or index where there is no header), and
    the label names in the hub's order; no names means a regression score of 0 to 5."""

    folder: str
    columns: tuple[str | int, ...]
    label: str | int
    labels: tuple[str, ...] = ()
    dev: str = "dev.tsv"
    drop_broken_rows: bool = False

    @property
    def header(self) -> bool:
        return isinstance(self.label, str)


def read_squad(path: Path, unanswerable: bool) -> Rows:
    """Questions of a SQuAD 1.1 or 2.0 file, one row each.

    Every answer text must stand at its ``answer_start`` in the context. Without ``unanswerable`` every question needs
    an answer.
    """
    try:
        articles = json.loads(_text(path))["data"]
    except json.JSONDecodeError as error:
        raise StudyError(
            f"{path} line {error.lineno}: not valid JSON ({error.msg}); the file may be cut off, fetch it again"
        ) from None
    except (KeyError, TypeError):
        articles = None
    if not isinstance(articles, list):
        raise StudyError(f"{path}: no list 'data' at the top; expected a SQuAD 1.1 or 2.0 JSON file")
    rows: Rows = []
    seen: set[str] = set()
    for number, article in enumerate(articles):
        try:
            for row in _article_rows(article, unanswerable, path):
                if row["id"] in seen:
                    raise StudyError(f"{path}: question id '{row['id']}' occurs twice; ids must be unique")
                seen.add(row["id"])
                rows.append(row)
        except (KeyError, TypeError, ValueError) as error:
            title = article.get("title", "untitled") if isinstance(article, dict) else "untitled"
            what = f"field {error} is missing" if isinstance(error, KeyError) else f"wrong structure ({error})"
            raise StudyError(f"{path}: article {number} ('{title}'): {what}; expected SQuAD JSON") from None
    if not rows:
        raise StudyError(f"{path}: contains no questions; expected a SQuAD 1.1 or 2.0 JSON file")
    return rows


def _article_rows(article: dict[str, Any], unanswerable: bool, path: Path) -> Rows:
    rows: Rows = []
    for paragraph in article["paragraphs"]:
        context = paragraph["context"]
        for question in paragraph["qas"]:
            name = str(question["id"])
            answers = question["answers"]
            if not isinstance(context, str) or not isinstance(question["question"], str):
                raise TypeError(f"context or question of '{name}' is not a text")
            if not answers and not unanswerable:
                raise StudyError(f"{path}: question '{name}' has no answer; load it as squad_v2 if that is meant")
            texts = [str(answer["text"]) for answer in answers]
            starts = [int(answer["answer_start"]) for answer in answers]
            for text, start in zip(texts, starts, strict=True):
                found = context[start : start + len(text)] if start >= 0 else ""
                if found != text or not text:
                    raise StudyError(
                        f"{path}: question '{name}': found {found[:60]!r} at answer_start {start} of the context, "
                        f"expected the answer {text[:60]!r}; correct answer_start or remove the question"
                    )
            rows.append(
                {
                    "id": name,
                    "title": str(article.get("title", "")),
                    "context": context,
                    "question": question["question"],
                    "answers": {"text": texts, "answer_start": starts},
                }
            )
    return rows


def read_glue(path: Path, files: Glue, names: tuple[str, ...]) -> Rows:
    """Rows ``idx, *names, label`` of a GLUE file.

    The files are tab-separated without any quoting, so a quote is text and lines are split at line feeds alone.
    """
    lines = _lines(path)
    header = lines[0].split("\t") if files.header else []
    columns = [_column(path, header, column) for column in (*files.columns, files.label)]
    width = len(header) or max(columns) + 1
    rows: Rows = []
    for number, line in enumerate(lines[files.header :], 1 + files.header):
        cells = line.split("\t")
        if len(cells) != width:
            if files.drop_broken_rows:
                continue
            raise StudyError(f"{path} line {number}: found {len(cells)} columns, expected {width}; correct the line")
        *texts, label = (cells[column] for column in columns)
        row = {"idx": len(rows), **dict(zip(names, texts, strict=True)), "label": _label(path, number, label, files)}
        rows.append(row)
    if not rows:
        raise StudyError(f"{path}: contains no examples below its header; fetch it again")
    return rows


def header_of(path: Path) -> list[str]:
    """Column names of a tab-separated file."""
    return _lines(path)[0].split("\t")


def _column(path: Path, header: list[str], column: str | int) -> int:
    if isinstance(column, int):
        return column
    if column not in header:
        raise StudyError(f"{path} line 1: found columns {', '.join(header)[:120]}, expected one called '{column}'")
    return header.index(column)


def _label(path: Path, number: int, label: str, files: Glue) -> int | float:
    if files.labels:
        if label not in files.labels:
            expected = ", ".join(files.labels)
            raise StudyError(
                f"{path} line {number}: found label {label[:40]!r}, expected one of {expected}; correct it"
            )
        return files.labels.index(label)
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        raise StudyError(f"{path} line {number}: found score {label[:40]!r}, expected a number from 0 to 5; correct it")
    return score


def read_parallel(source: Path, target: Path) -> Rows:
    """Rows ``source, target`` of two files with one sentence a line, line n translating line n."""
    sources, targets = _lines(source), _lines(target)
    if len(sources) != len(targets):
        raise StudyError(f"{source} has {len(sources)} lines, {target.name} has {len(targets)}; expected equal counts")
    for number, pair in enumerate(zip(sources, targets, strict=True), 1):
        if not all(sentence.strip() for sentence in pair):
            file = target if pair[0].strip() else source
            raise StudyError(f"{file} line {number}: the line is empty, expected a sentence; remove it from both files")
    return [{"source": one.strip(), "target": other.strip()} for one, other in zip(sources, targets, strict=True)]


def _lines(path: Path) -> list[str]:
    """Lines without their ends. Only line feeds end a line: sentences may contain other Unicode line separators."""
    lines = [line.removesuffix("\r") for line in _text(path).split("\n")]
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise StudyError(f"{path}: the file is empty; fetch it again")
    return lines


def _text(path: Path) -> str:
    """The file as text, without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise StudyError(f"{path} line {line}: not UTF-8 text; convert the file to UTF-8") from None
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
