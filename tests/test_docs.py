"""What the documentation promises: its commands exist, its example runs, its files are there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lib.compressors import CompressorSpec
from lib.config import ROOT, load_profile
from lib.experiments import finished_model
from lib.frontier import all_records
from lib.gallery import with_tables
from lib.models import layers
from lib.records import weights_folder
from lib.runs import ensure
from lib.specs import dense_spec

DOCS = sorted((ROOT / "docs").glob("*.md"))
LAYER_DROP = "docs.custom_compressor:LayerDrop"


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_quotes_the_committed_tables_and_is_short():
    page = ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    assert text == with_tables(page), "renew it: ./run_all.sh report"
    assert text.count("<!-- end -->") == 2 and len(text.splitlines()) < 150
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_says_how_many_hours_the_committed_records_took():
    hours = sum(record.seconds for record in all_records(load_profile("study"))) / 3600
    assert f"hold {hours:.0f} hours of runs" in (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem[:2])
def test_the_committed_series_executed_these_cells_and_prints_no_nan(path):
    cells, executed = (
        [
            cell
            for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]
            if "injected-parameters" not in tags(cell)
        ]
        for file in (path, ROOT / "results" / "study" / "notebooks" / path.name)
    )
    assert [cell["source"] for cell in executed] == [cell["source"] for cell in cells], "execute the study again"
    for cell in executed:
        for output in cell.get("outputs", []):
            text = "".join(output.get("data", {}).get("text/markdown", output.get("text", "")))
            if text.startswith("```python"):  # a docstring may name it
                continue
            assert not re.search(r"(?i)\bnan\b|\bn = (\d+) to \1\b", text), text[:300]


def tags(cell: dict[str, Any]) -> list[str]:
    return cell["metadata"].get("tags", [])


def test_the_example_compressor_is_short_and_really_drops_layers(profile_file, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_PROGRESS", str(tmp_path / "progress"))
    source = (ROOT / "docs" / "custom_compressor.py").read_text(encoding="utf-8")
    assert len([line for line in source[source.index("class LayerDrop") :].splitlines() if line.strip()]) <= 40
    profile = load_profile(profile_file())
    dense = dense_spec(profile, "world_sentiment", 0)
    settings = {"rate": 0.5}
    mine = dense.model_copy(update={"compressor": CompressorSpec(name=LAYER_DROP, settings=settings)})
    other = dense.model_copy(update={"compressor": CompressorSpec(name=LAYER_DROP, settings={"rate": 0.0})})
    base, dropped, unskipped = ensure([dense, mine, other], profile)
    assert dropped["compression"] == {"rate": 0.5, "kept_layers": [1, 3]} and dropped["model"]["layers"] == 2
    assert dropped["model"]["parameters"] < base["model"]["parameters"]
    losses = [record["training"]["loss"] for record in (base, dropped, unskipped)]
    assert losses[0] == losses[2] != losses[1]  # skipping nothing is dense training
    assert not weights_folder(profile, mine).is_dir()
    model, _ = finished_model(profile, mine)
    assert len(layers(model)) == 2


def test_the_example_in_the_docs_runs_as_printed(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "own_model_and_data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    results = str(tmp_path / "results")
    code = code.replace('load_profile("quick")', f'load_profile("smoke", results={json.dumps(results)})')
    exec(compile(code, "own_model_and_data.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1].endswith("{'rate': 0.2, 'kept_layers': [1, 3]}")


def test_every_command_and_parameter_of_the_docs_exists():
    from lib.execute import notebooks
    from lib.notebook_parameters import parameters_of
    from lib.plans import PLANS

    known = {name for path in notebooks() for name in parameters_of(path)}
    for page in DOCS:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r" -p (\w+) ", text)) <= known, page.name
        named = [name for names in re.findall(r"--plans ([\w,]+)", text) for name in names.split(",")]
        assert set(named) <= set(PLANS), page.name
        scripts = re.findall(r"python -m ([\w.]+)", text)
        assert [name for name in scripts if not Path(ROOT, *name.split(".")).with_suffix(".py").is_file()] == []
