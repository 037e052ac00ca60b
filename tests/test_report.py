"""The gallery page, the LaTeX macros and the report, made from a small results folder."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest

from lib import gallery, report
from lib.config import StudyError
from lib.execute import notebooks
from lib.figures import new_figure, save_figure
from lib.tables import save_table

FORMULA = "The loss is $L = \\sum_i \\lambda_i \\hat{y}_i$, see [the start](00_start.ipynb)."


def executed(path: Path, title: str, code: str, picture: bytes | None = None) -> None:
    """A notebook as papermill leaves it, whose cells were never run here."""
    import base64

    made = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    made.cells = [nbformat.v4.new_markdown_cell(f'# {title}\n\n{FORMULA}\n\n- one < two & "three"')]
    cell = nbformat.v4.new_code_cell(code)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="2 runs, 2 cached\n")]
    if picture:
        data = {"image/png": base64.b64encode(picture).decode(), "text/plain": "<Figure>"}
        cell.outputs.append(nbformat.v4.new_output("display_data", data=data))
    made.cells.append(cell)
    for number, one in enumerate(made.cells):
        one.id = f"cell-{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nbformat.writes(made), encoding="utf-8")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    fig, ax = new_figure()
    ax.plot([1, 2], [3, 4])
    rows = pd.DataFrame({"x": [1, 2], "y": [3, 4]})
    paths = save_figure(fig, "05_curve", rows, "Score against K; n = 3.", folder / "figures")
    save_figure(fig, "05_gone", rows, "Of an earlier version.", folder / "figures")
    save_figure(fig, "05_curve_squad_v2", rows, "Of a task.", folder / "figures")
    plt.close(fig)
    verdicts = pd.DataFrame({
        "claim": ["Half is 40 % smaller", "Top | best"], "published": ["66 M", "1st"], "ours": ["66.96 M", "2 of 5"],
        "verdict": ["holds", "too few seeds to tell (n = 1)"],
    })  # fmt: skip
    save_table(verdicts, "05_verdicts", "Verdicts under tiny.", folder / "tables")
    scores = pd.DataFrame({"task": ["rte", "rte", "cola"], "K": [1, 2, 2], "score": [66.125, 70.0, float("nan")]})
    save_table(scores, "01_dense", "Dense.", folder / "tables", {"score": "{:.1f}"})
    long = pd.DataFrame({"x": range(40)})
    save_table(long, "05_long", "Many rows.", folder / "tables")
    executed(folder / "notebooks" / "00_start.ipynb", "Start", "1 + 1")
    picture = Path(paths["png"]).read_bytes()
    code = 'notebook.figure(fig, "05_curve")\nnotebook.table(t, "05_verdicts")\nnotebook.table(l, "05_long")'
    executed(folder / "notebooks" / "05_layers.ipynb", "Layers", code, picture)
    executed(folder / "notebooks" / "01_bases.ipynb", "Bases", 'notebook.table(frame, "01_dense")')
    (folder / "notebooks" / "05_layers.failed.ipynb").write_text("{}")
    (folder / "runs").mkdir()
    for day in (3, 21):
        (folder / "runs" / f"{day}.json").write_text(json.dumps({"created": f"2026-01-{day:02d}T10:00:00+00:00"}))
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Notebooks that are not executed yet."""
    executed(tmp_path / "notebooks" / "08_frontier.ipynb", "Frontier", "pass")
    return tmp_path / "notebooks"


def test_the_gallery_shows_everything_with_links_that_lead_somewhere(results, sources):
    page = gallery.gallery(results, sources)
    assert page.index("## 01 Bases") < page.index("## 05 Layers") and "Frontier" not in page and "## 00" not in page
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page) if link not in ("runs", "numbers.tex")]
    assert {"figures/05_curve.pdf", "figures/05_curve.svg", "figures/05_curve.csv", "tables/05_verdicts.tex",
            "tables/05_verdicts.md", "notebooks/05_layers.ipynb"} <= set(links)  # fmt: skip
    assert [link for link in links if not (results / link).is_file()] == []
    assert "![05_curve](figures/05_curve.png)\n\nScore against K; n = 3." in page
    assert page.count("the notebook makes it no more") == 1 and "Of an earlier version. *Left by" in page
    assert "| Half is 40 % smaller | 66 M" in page and "(40 rows)" in page and "from the 2 records" in page


def test_macros_have_names_of_letters_and_the_printed_values(results, sources):
    text = gallery.numbers(results, sources)
    macros = re.findall(r"^\\newcommand\{\\(\w+)\}\{(.*)\}$", text, re.MULTILINE)
    found = dict(macros)
    assert len(found) == len(macros) and all(re.fullmatch("[A-Za-z]+", name) for name in found)
    assert found["LayersVerdictsHalfIsFourZeroPercentSmallerOurs"] == "66.96 M"
    assert found["LayersVerdictsTopBestVerdict"] == "too few seeds to tell (n = 1)"
    assert found["BasesDenseRteOneScore"] == "66.1" and found["BasesDenseRteTwoScore"] == "70.0"
    assert found["BasesDenseColaTwoScore"] == "--" and found["StudyRecords"] == "2"
    assert found["ClaimsThatHolds"] == "1" and found["ClaimsThatTooFewSeedsToTell"] == "1"
    assert not any("Long" in name for name in found)


def test_names_that_fall_together_stay_apart():
    assert gallery._unique([gallery._macro("A", "1"), gallery._macro("A", "2"), "% A"]) == [
        "\\newcommand{\\A}{1}", "\\newcommand{\\AAgainTwo}{2}", "% A",
    ]  # fmt: skip


def test_the_same_results_give_the_same_bytes(results, sources):
    first = [path.read_bytes() for path in gallery.write_gallery(results, sources)]
    for path in results.rglob("*"):
        os.utime(path, (1, 1))
    assert [path.read_bytes() for path in gallery.write_gallery(results, sources)] == first


def test_without_figures_and_tables_one_line_says_what_to_do(tmp_path, capsys):
    with pytest.raises(StudyError, match=r"no figures or tables in .*; execute the notebooks first"):
        gallery.write_gallery(tmp_path)
    assert report.main(["smoke", "--results", str(tmp_path / "empty")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_gallery", stop)
    assert report.main(["smoke", "--results", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted; what is written is whole, run the same command again\n"


def test_a_table_that_is_none_is_named(results):
    (results / "tables" / "05_verdicts.md").write_text("half a tab")
    with pytest.raises(StudyError, match=r"05_verdicts\.md: not a table that the study wrote"):
        gallery.gallery(results)


def test_a_page_quotes_tables_as_they_are_now(results):
    page = results / "page.md"
    page.write_text("before\n<!-- tables/05_verdicts.md -->\nformer\n<!-- end -->\nafter\n")
    text = gallery.with_tables(page)
    assert text.startswith("before\n<!-- tables/05_verdicts.md -->\n| claim | published |") and "former" not in text
    assert "| Top \\| best | 1st |" in text and text.endswith("|\n<!-- end -->\nafter\n")
    page.write_text(text)
    assert gallery.with_tables(page) == text
    page.write_text("<!-- tables/none.md -->\n<!-- end -->\n")
    with pytest.raises(StudyError, match=r"none\.md: not a table"):
        gallery.with_tables(page)


def test_a_report_without_its_packages_says_which(results, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "typst", None)
    pytest.importorskip("pypandoc", reason="needs the optional packages of a report")
    with pytest.raises(StudyError, match="needs the Python package typst, which is not installed; pip install"):
        report.build(results)


def test_a_report_without_executed_notebooks_says_so(tmp_path):
    with pytest.raises(StudyError, match=r"no executed notebooks in .*run \./run_all\.sh"):
        report.build(tmp_path / "none")


@pytest.fixture
def packages() -> None:
    for name in ("pypandoc", "typst"):
        pytest.importorskip(name, reason="needs the optional packages of a report: pip install pypandoc-binary typst")


def test_the_page_needs_no_network_and_holds_everything(packages, results, tmp_path):
    page = report.build(results, tmp_path / "out")[0].read_text(encoding="utf-8")
    body = page[page.index("<body") :]
    assert not re.findall(r'(?:src|href)="(?!#|data:|https://arxiv)[^"]*"', body)
    assert "<script" not in page and "@import" not in page and "<link" not in page
    assert "<math" in body and "$L" not in body and body.count("data:image/png;base64,") == 1
    assert [body.index(f'id="{stem}"') for stem in ("00_start", "01_bases", "05_layers")] == sorted(
        body.index(f'id="{stem}"') for stem in ("00_start", "01_bases", "05_layers")
    )
    assert 'href="#00_start">the start' in body and "one &lt; two" in body and "2 runs, 2 cached" in body


def test_the_pdf_is_dated_by_its_newest_record_and_byte_stable(packages, results, tmp_path):
    first, second = (report.build(results, tmp_path / name) for name in ("first", "second"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    pdf = first[1].read_bytes()
    assert pdf.startswith(b"%PDF-") and b"CreateDate>2026-01-21T10:00:00Z<" in pdf
    assert b"/Subtype/Image" not in pdf.replace(b" ", b"")  # the one picture is a figure, so it is drawn as vectors


def test_every_formula_of_the_notebooks_can_be_set(packages, results, tmp_path):
    for path in notebooks():
        shutil.copy(path, results / "notebooks" / path.name)
    page, pdf = report.build(results, tmp_path / "out")
    formulas = sum(len(re.findall(r"\$[^$]+\$", path.read_text(encoding="utf-8"))) for path in notebooks())
    assert formulas / 2 < page.read_text(encoding="utf-8").count("<math") and pdf.stat().st_size > 50_000


LOOK = """<script>
addEventListener("load", () => {
  const all = (name) => [...document.querySelectorAll(name)]
  const ids = new Set(all("[id]").map((one) => one.id))
  const wide = all("p, ul, math, img, h1, h2").filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
  document.body.dataset.seen = JSON.stringify({
    pictures: all("img").length, broken: all("img").filter((one) => one.naturalWidth === 0).length,
    flat: all("math").filter((one) => one.getBoundingClientRect().height === 0).length, formulas: all("math").length,
    lost: all('a[href^="#"]').map((one) => decodeURIComponent(one.hash.slice(1))).filter((id) => !ids.has(id)),
    wide: wide.map((one) => one.outerHTML.slice(0, 80)), requests: performance.getEntriesByType("resource")
      .map((one) => one.name).filter((name) => !name.startsWith("data:")),
  })
})
</script>"""


def test_a_browser_shows_the_page_as_it_is_meant(packages, results, tmp_path):
    """Pictures are drawn, formulas have a height, links lead somewhere, nothing is fetched or sticks out."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium or Chrome")
    page = report.build(results, tmp_path / "out")[0]
    page.write_text(page.read_text(encoding="utf-8") + LOOK, encoding="utf-8")
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--window-size=1280,800", f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    seen = json.loads(html.unescape(re.findall(r'data-seen="([^"]+)"', shown)[0]))
    assert seen["pictures"] == 1 and seen["formulas"] == 3 * FORMULA.count("$") / 2
    assert [seen[name] for name in ("broken", "flat", "lost", "wide", "requests")] == [0, 0, [], [], []]
