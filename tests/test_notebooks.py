"""Every notebook: stripped, its parameters documented, its cells short, and it runs under the smoke profile."""

import ast
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest

from lib import execute
from lib.config import ROOT, load_profile

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OUTLINE = ["What the paper claims", "The idea", "Check it by hand", "The runs"]
OUTLINE += ["Verdicts", "What deviates, and what failed", "Take away", "Provenance"]
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def headings(path: Path) -> list[str]:
    """The section titles, in order."""
    prose = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    return re.findall(r"^## (.+)$", prose, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Iterator[Path]:
    """Results of all notebooks, executed once in order, since later ones reuse the records of earlier ones."""
    results = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("STUDY_DATA", raising=False)
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert execute.main(["smoke", "-p", "results", str(results)]) == 0
        yield results


@each
def test_is_stripped(path):
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in code(path):
        assert not cell.outputs and cell.execution_count is None
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata and "widgets" not in notebook.metadata


@each
def test_every_parameter_has_a_type_and_a_meaning(path):
    tagged = [cell for cell in code(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    statements = ast.parse(tagged[0].source).body
    assert all(isinstance(statement, ast.AnnAssign) and statement.value for statement in statements)
    shown = papermill.inspect_notebook(str(path))
    # papermill drops a line that it cannot parse, such as one with "=" in its comment or "|" in its type
    assert list(shown) == [statement.target.id for statement in statements]
    for name, parameter in shown.items():
        assert parameter["inferred_type_name"] != "None" and parameter["help"], name
    assert shown["profile"]["default"] == '"quick"' and shown["results"]["default"] == '""'


@each
def test_code_cells_are_short(path):
    lengths = [len(cell.source.splitlines()) for cell in code(path)]
    assert statistics.median(lengths) <= 8 and max(lengths) <= 25, sorted(lengths)


@each
def test_starts_with_a_title_and_names_no_machine(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(/home/|/Users/|/tmp/|[A-Z]:\\\\)", text)


@each
def test_no_section_comes_twice(path):
    found = headings(path)
    assert sorted(found) == sorted(set(found))


@pytest.mark.parametrize("path", NOTEBOOKS[2:8], ids=lambda path: path.stem)
def test_papers_share_one_outline(path):
    assert [title for title in headings(path) if title in OUTLINE] == OUTLINE


@each
def test_runs_under_smoke(path, smoke):
    executed = read(smoke / "notebooks" / path.name)
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(cell.execution_count for cell in cells if cell.source.strip())
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    plain = [output.data["text/plain"] for output in outputs if set(output.get("data", ())) == {"text/plain"}]
    assert not [text for text in plain if re.match(r"\[?<|Text\(", text)], "the name of an object is shown"
    text = json.dumps(executed)
    for machine in (str(ROOT), str(smoke), sys.prefix):
        assert machine not in text


@each
def test_saves_the_figures_and_tables_that_it_names(path, smoke):
    source = "\n".join(cell.source for cell in code(path))
    names = set(re.findall(rf'"({path.stem[:2]}_\w+)"', source))
    assert names
    kinds = {"figures": ("pdf", "svg", "png", "csv", "txt"), "tables": ("csv", "md", "tex")}
    for name in names:
        made = {kind for kind in kinds if (smoke / kind / f"{name}.csv").is_file()}
        assert made, f"{name} was neither saved as a figure nor as a table"
        for kind in made:
            for suffix in kinds[kind]:
                assert (smoke / kind / f"{name}.{suffix}").stat().st_size, f"{kind}/{name}.{suffix}"


def test_smoke_leaves_records_and_nothing_half_written(smoke):
    assert list((smoke / "runs").glob("*.json"))
    assert {path.name for path in (smoke / "notebooks").iterdir()} == {path.name for path in NOTEBOOKS}
    assert not [path for path in smoke.rglob("*") if path.name.endswith((".tmp", ".failed.ipynb"))]


@each
def test_plain_papermill_works_from_another_folder(path, smoke, tmp_path):
    """As the README says, without lib.execute; the records are those of the run above, so it is quick."""
    environment = os.environ | {"JUPYTER_DATA_DIR": str(tmp_path / "jupyter")}  # no personal kernels
    arguments = [str(path), "out.ipynb", "-p", "profile", "smoke", "-p", "results", str(smoke), "--no-progress-bar"]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out.ipynb").is_file()


@each
def test_every_setting_that_a_parameter_stands_for_is_one_of_the_profile(path):
    """An empty parameter is skipped, so that a wrong name shows only when somebody gives it a value."""
    (start,) = [cell.source for cell in code(path) if "notebook.start(" in cell.source]
    keys = [key.value for node in ast.walk(ast.parse(start)) if isinstance(node, ast.Dict) for key in node.keys]
    profile = load_profile("quick")
    for key in keys:
        value: Any = profile
        for name in key.split("."):
            value = getattr(value, name)
        assert load_profile("quick", **{key: value}) == profile


@each
def test_papermill_prints_the_parameters(path):
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "--help-notebook", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0
    for name, parameter in papermill.inspect_notebook(str(path)).items():
        assert f"{name}: " in done.stdout and parameter["help"] in done.stdout
