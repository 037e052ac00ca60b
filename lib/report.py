"""The executed notebooks as one HTML page and one PDF: ``python -m lib.report PROFILE`` or ``./run_all.sh report``.

nbconvert turns each executed notebook into Markdown, pandoc the whole into a page that needs no network (formulas are
MathML, pictures are inside) and into Typst, which sets the PDF with the figures as vector graphics. All of them come
with pip. The same notebooks give the same bytes: the PDF is dated by its newest record. The gallery (``lib.gallery``)
is renewed first.
"""

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat

from lib.command_line import Parser, exit_code
from lib.config import ROOT, StudyError, load_profile
from lib.files import write_atomically
from lib.gallery import Maker, makers, with_tables, write_gallery
from lib.problems import first_line

STYLE = Path(__file__).parent / "report_style"
READ = "gfm+tex_math_dollars+attributes"
INSTALL = "pip install pypandoc-binary typst"


def build(results: Path, folder: Path | None = None) -> list[Path]:
    """Write ``report.html`` and ``report.pdf`` of the executed notebooks of ``results`` into ``folder``.

    Raises:
        StudyError: no executed notebooks, a package is missing, or the report cannot be set or written.
    """
    executed = [maker for maker in makers(results) if maker.executed]
    if not executed:
        raise StudyError(f"no executed notebooks in {results / 'notebooks'}; run ./run_all.sh {results.name} first")
    pandoc, typst = _tools()
    folder, title = folder or results / "report", f"BERT compression: results of the profile {results.name}"
    with tempfile.TemporaryDirectory(prefix="study-report-") as name:
        work = Path(name)
        vectors = _vectors(results)
        pages = [_page(maker, {other.stem for other in executed}, work) for maker in executed]
        text = "\n\n".join(pages)
        html = _convert(pandoc, text, "html5", [
            "--embed-resources", "--mathml", "--toc-depth=2", f"--css={STYLE / 'report.css'}",
            f"--metadata=pagetitle:{title}", f"--resource-path={work}",
        ])  # fmt: skip
        source = _convert(pandoc, _with_vectors(text, work, vectors), "typst", [
            "--toc-depth=2", "-V", "papersize=a4", "-V", "fontsize=10pt", "-V", f"title={title}",
            f"--include-in-header={STYLE / 'report.typ'}", f"--include-in-header={_dated(work, newest(results))}",
        ])  # fmt: skip
        (work / "report.typ").write_text(source, encoding="utf-8")
        try:
            pdf = typst.compile(str(work / "report.typ"), ignore_system_fonts=True)
        except Exception as error:  # typst's own class is not the same in every version
            raise StudyError(f"the PDF cannot be set ({first_line(error, 200)})") from None
    return [
        write_atomically(folder / "report.html", html + "\n"), write_atomically(folder / "report.pdf", pdf),
    ]  # fmt: skip


def _tools() -> tuple[Any, Any]:
    """pypandoc and typst, which only a report needs.

    Raises:
        StudyError: one of them is missing.
    """
    try:
        import pypandoc
        import typst

        pypandoc.get_pandoc_version()
    except ImportError as error:
        raise StudyError(f"a report needs the Python package {error.name}, which is not installed; {INSTALL}") from None
    except OSError:
        raise StudyError(f"a report needs pandoc, which pypandoc does not find; {INSTALL}") from None
    return pypandoc, typst


def _dated(work: Path, made: datetime) -> Path:
    """A file that gives the PDF its date; typst would take the time of the build."""
    numbers = ", ".join(
        f"{name}: {getattr(made, name)}" for name in ("year", "month", "day", "hour", "minute", "second")
    )
    file = work / "date.typ"
    file.write_text(f"#set document(date: datetime({numbers}))\n", encoding="utf-8")
    return file


def _page(maker: Maker, stems: set[str], work: Path) -> str:
    """One executed notebook as Markdown; its pictures are written into ``work``."""
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(maker.executed, as_version=4)
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = re.sub(r"^# Parameters\n", "", cell.source)
    resources = {"unique_key": maker.stem, "output_files_dir": maker.stem}
    body, found = MarkdownExporter().from_notebook_node(notebook, resources)
    for name, content in found["outputs"].items():
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_bytes(content)
    body = re.sub(r"^# +(.+)$", rf"# \1 {{#{maker.stem}}}", body, count=1, flags=re.MULTILINE)

    def linked(match: re.Match[str]) -> str:
        return f"](#{match.group(1)})" if match.group(1) in stems else match.group(0)

    return re.sub(r"\]\((?:[./]*notebooks/)?(\d\d_\w+)\.ipynb\)", linked, body)


def _vectors(results: Path) -> dict[str, Path]:
    """The SVG of each figure, by the digest of the PNG that notebooks show."""
    return {
        hashlib.sha256(png.read_bytes()).hexdigest(): png.with_suffix(".svg")
        for png in (results / "figures").glob("*.png")
        if png.with_suffix(".svg").is_file()
    }


def _with_vectors(text: str, work: Path, vectors: dict[str, Path]) -> str:
    """``text`` with vector graphics in place of the pictures that are figures of the study."""

    def vector(match: re.Match[str]) -> str:
        picture = work / match.group(1)
        svg = vectors.get(hashlib.sha256(picture.read_bytes()).hexdigest()) if picture.is_file() else None
        if svg is None:
            return match.group(0)
        picture.with_suffix(".svg").write_bytes(svg.read_bytes())
        return f"]({match.group(1).removesuffix('.png')}.svg)"

    return re.sub(r"\]\(([^()\s]+\.png)\)", vector, text)


def _convert(pandoc: Any, text: str, to: str, arguments: Sequence[str]) -> str:
    try:
        return pandoc.convert_text(text, to, READ, extra_args=["--standalone", "--toc", *arguments])
    except RuntimeError as error:
        raise StudyError(f"pandoc cannot make {to} of the notebooks ({str(error).splitlines()[-1][:200]})") from None


def newest(results: Path) -> datetime:
    """When the newest record was made, in UTC; the beginning of 1970 without records."""
    made = [json.loads(path.read_bytes()).get("created", "") for path in (results / "runs").glob("*.json")]
    times = [datetime.fromisoformat(text).astimezone(UTC) for text in made if text]
    return max(times, default=datetime.fromtimestamp(0, UTC))


def main(arguments: Sequence[str] | None = None) -> int:
    """Renew a profile's gallery and what the README quotes, and set the executed notebooks as one HTML page and PDF."""
    parser = Parser(prog="python -m lib.report", description=main.__doc__)
    parser.add_argument("profile", nargs="?", default="study", help="smoke, quick, study, paper or a YAML file")
    parser.add_argument("--results", default=None, help="results folder (default: results/PROFILE)")
    parser.add_argument("--gallery", action="store_true", help="only README.md and numbers.tex of the results folder")

    def run() -> None:
        options = parser.parse_args(arguments)
        results = load_profile(options.profile, results=options.results).results
        made = [*write_gallery(results), write_atomically(ROOT / "README.md", with_tables(ROOT / "README.md"))]
        made += [] if options.gallery else build(results)
        print("\n".join(f"made {path}" for path in made))

    return exit_code(run, "interrupted; what is written is whole, run the same command again")


if __name__ == "__main__":
    sys.exit(main())
