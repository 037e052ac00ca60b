"""A results folder for readers: a gallery page of its figures and tables, and its headline numbers as LaTeX macros.

Both are made from the files that notebooks left behind and from nothing else, so they are byte-stable: a diff means
that a result changed. ``numbers.tex`` has one ``\\newcommand`` for each cell of a headline table, as printed there.
"""

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat

from lib.claims import NOT_CLAIMED
from lib.config import ROOT, StudyError
from lib.data import TASKS
from lib.files import write_atomically
from lib.problems import first_line
from lib.tables import latex_text

HEADLINE = ("*_verdicts", "*_headline", "01_dense", "01_sizes", "08_*")  # tables whose cells get macros
MOST_ROWS, MOST_COLUMNS = 12, 8  # of a table that is shown in the gallery; larger ones are linked
FIGURE_FILES = {"PDF": "pdf", "SVG": "svg", "PNG": "png", "CSV of the plotted rows": "csv"}
TABLE_FILES = {"Markdown": "md", "LaTeX": "tex", "CSV": "csv"}
DIGITS = dict(zip("0123456789", "Zero One Two Three Four Five Six Seven Eight Nine".split(), strict=True))
WORDS = {"%": " percent ", "×": " times ", "+": " plus ", "Δ": " delta ", "λ": " lambda "} | {
    digit: f" {word} " for digit, word in DIGITS.items()
}


@dataclass(frozen=True)
class Maker:
    """A notebook: ``executed`` is its copy with outputs, None when there is none; ``source`` the code of its cells."""

    stem: str
    title: str
    executed: Path | None
    source: str

    @property
    def number(self) -> str:
        """The two digits that the names of its figures and tables begin with."""
        return self.stem[:2]


def makers(results: Path, notebooks: Path = ROOT / "notebooks") -> list[Maker]:
    """The series' notebooks in order, executed copies first of all.

    Raises:
        StudyError: a notebook cannot be read.
    """
    executed = {path.stem: path for path in (results / "notebooks").glob("[0-9][0-9]_*.ipynb") if "." not in path.stem}
    known = executed | {path.stem: path for path in notebooks.glob("[0-9][0-9]_*.ipynb") if path.stem not in executed}
    return [_maker(path, executed.get(stem)) for stem, path in sorted(known.items())]


def _maker(path: Path, executed: Path | None) -> Maker:
    try:
        cells = nbformat.read(path, as_version=4).cells
    except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
        raise StudyError(f"{path}: not a readable notebook ({first_line(error, 100)})") from None
    text = next((cell.source for cell in cells if cell.cell_type == "markdown"), "")
    heading = re.search(r"^# +(.+)$", text, re.MULTILINE)
    source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    return Maker(path.stem, heading.group(1).strip() if heading else path.stem, executed, source)


def gallery(results: Path, notebooks: Path = ROOT / "notebooks") -> str:
    """The gallery page, in Markdown, with links relative to ``results``.

    Raises:
        StudyError: there is neither a figure nor a table.
    """
    figures, tables = _names(results / "figures", "pdf"), _names(results / "tables", "csv")
    if not figures and not tables:
        raise StudyError(f"no figures or tables in {results}; execute the notebooks first (./run_all.sh PROFILE)")
    parts = [_introduction(results)]
    for maker in makers(results, notebooks):
        mine = [[name for name in names if name.startswith(f"{maker.number}_")] for names in (figures, tables)]
        if not any(mine):
            continue
        where = f"[{maker.stem}.ipynb](notebooks/{maker.stem}.ipynb)" if maker.executed else "no executed copy here yet"
        parts.append(f"## {maker.number} {maker.title}\n\nMade by {where}.")
        parts += [_figure(results, name, maker) for name in mine[0]]
        parts += [_table(results, name, maker) for name in mine[1]]
    return "\n\n".join(parts) + "\n"


def _introduction(results: Path) -> str:
    records = len(list((results / "runs").glob("*.json")))
    name = results.name
    return (
        f"# Results of the profile `{name}`\n\n"
        f"Every figure and table of the series, made by its notebooks from the {records} records in [runs/](runs). "
        f"Made by `./run_all.sh report {name}`; do not edit. "
        "Headline numbers as LaTeX macros: [numbers.tex](numbers.tex)."
    )


def _names(folder: Path, suffix: str) -> list[str]:
    return sorted(path.stem for path in folder.glob(f"[0-9][0-9]_*.{suffix}"))


def _stale(name: str, maker: Maker) -> str:
    """A note unless the notebook names ``name``, or what is left of it without the task that it ends with."""
    bases = [name, *(name.removesuffix(f"_{task}") for task in TASKS if name.endswith(f"_{task}"))]
    if any(f'"{base}"' in maker.source or f'"{base}_{{' in maker.source for base in bases):
        return ""
    return " *Left by an earlier version; the notebook makes it no more.*"


def _links(folder: str, name: str, kinds: dict[str, str], results: Path) -> str:
    present = {label: suffix for label, suffix in kinds.items() if (results / folder / f"{name}.{suffix}").is_file()}
    return " · ".join(f"[{label}]({folder}/{name}.{suffix})" for label, suffix in present.items())


def _figure(results: Path, name: str, maker: Maker) -> str:
    caption = (results / "figures" / f"{name}.txt").read_text(encoding="utf-8").strip()
    links = _links("figures", name, FIGURE_FILES, results)
    return f"### {name}\n\n![{name}](figures/{name}.png)\n\n{caption}{_stale(name, maker)}\n\n{links}"


def _table(results: Path, name: str, maker: Maker) -> str:
    header, rows, caption = read_table(results / "tables" / f"{name}.md")
    shown = ""
    if len(rows) <= MOST_ROWS and len(header) <= MOST_COLUMNS:
        shown = (results / "tables" / f"{name}.md").read_text(encoding="utf-8").partition("\n\n")[0] + "\n\n"
    size = "" if shown else f" ({len(rows)} rows)"
    links = _links("tables", name, TABLE_FILES, results)
    return f"### {name}\n\n{shown}{caption}{_stale(name, maker)}\n\n{links}{size}"


def read_table(path: Path) -> tuple[list[str], list[list[str]], str]:
    """Header, rows and caption of a table that ``lib.tables.save_table`` wrote, every cell as it is printed.

    Raises:
        StudyError: not such a table.
    """
    text, _, caption = (path.read_text(encoding="utf-8") if path.is_file() else "").partition("\n\n")
    lines = text.splitlines()
    if len(lines) < 2 or not all(line.startswith("|") for line in lines):
        raise StudyError(f"{path}: not a table that the study wrote; execute its notebook again")
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return cells[0], cells[2:], caption.strip()


def numbers(results: Path, notebooks: Path = ROOT / "notebooks") -> str:
    """LaTeX macros for the cells of the headline tables, named by notebook, table, row and column.

    A row is named by its first cells, as many as tell it from the others. Digits are spelled out, because names of
    LaTeX macros are letters only: ``\\PoorMansBertVerdicts…Ours``.
    """
    titles = {maker.number: maker.stem[3:] for maker in makers(results, notebooks)}
    lines = [
        f"% Headline numbers of the profile {results.name}, as printed in its tables.",
        "% Made by the study from results/; do not edit. \\input{numbers.tex}, then write \\TheMacro{}.",
        _macro("StudyRecords", str(len(list((results / "runs").glob("*.json"))))),
    ]
    verdicts: Counter[str] = Counter()
    for name in _names(results / "tables", "csv"):
        if not any(fnmatch.fnmatch(name, pattern) for pattern in HEADLINE):
            continue
        header, rows, _ = read_table(results / "tables" / f"{name}.md")
        lines.append(f"% tables/{name}.csv")
        prefix = camel(f"{titles.get(name[:2], name[:2])} {name[3:]}")
        lines += [_macro(prefix + where, text) for where, text in _cells(header, rows)]
        if "verdict" in header and "paper" not in header:  # the table of all papers would count each twice
            claimed = [row for row in rows if not row[header.index("claim")].endswith(NOT_CLAIMED)]
            verdicts.update(re.split(r" \(|:", row[header.index("verdict")])[0] for row in claimed)
    lines += [_macro(f"{camel('claims that')}{camel(word)}", str(count)) for word, count in sorted(verdicts.items())]
    return "\n".join(_unique(lines)) + "\n"


def _cells(header: list[str], rows: list[list[str]]) -> Iterator[tuple[str, str]]:
    """(name of row and column, text) of every cell that does not name its row."""
    keys = next((n for n in range(1, len(header)) if len({tuple(row[:n]) for row in rows}) == len(rows)), 1)
    for row in rows:
        for column, text in zip(header[keys:], row[keys:], strict=True):
            yield camel(" ".join(row[:keys])) + camel(column), text


def camel(text: str) -> str:
    """Letters only: ``camel("rte, K=2")`` is ``RteKTwo``."""
    spelled = "".join(WORDS.get(character, character) for character in text)
    return "".join(word[0].upper() + word[1:] for word in re.findall(r"[A-Za-z]+", spelled.replace("'", "")))


def _macro(name: str, text: str) -> str:
    return f"\\newcommand{{\\{name}}}{{{latex_text(text)}}}"


def _unique(lines: Iterable[str]) -> list[str]:
    """Macros whose name occurs a second time get the word for how often it did."""
    seen: Counter[str] = Counter()
    unique = []
    for line in lines:
        name = line.partition("}")[0]
        seen[name] += 1
        again = seen[name] > 1 and not line.startswith("%")
        unique.append(line.replace(name, name + camel(f"again {seen[name]}"), 1) if again else line)
    return unique


def with_tables(page: Path) -> str:
    """The text of ``page`` with each table that it quotes as the table's file has it now.

    A quoted table stands between a comment that names its file, relative to the page, and the comment ``end``.

    Raises:
        StudyError: a file that is named is not a table of the study.
    """

    def table(match: re.Match[str]) -> str:
        header, rows, _ = read_table(page.parent / match.group(2))
        lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
        return match.group(1) + "".join(f"| {' | '.join(_escaped(cells))} |\n" for cells in lines) + match.group(3)

    quoted = re.compile(r"(<!-- (\S+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)
    return quoted.sub(table, page.read_text(encoding="utf-8"))


def _escaped(cells: list[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]


def write_gallery(results: Path, notebooks: Path = ROOT / "notebooks") -> list[Path]:
    """Write ``README.md`` and ``numbers.tex`` into ``results``."""
    return [
        write_atomically(results / "README.md", gallery(results, notebooks)),
        write_atomically(results / "numbers.tex", numbers(results, notebooks)),
    ]
