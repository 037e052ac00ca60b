"""What notebooks begin and end with: the opening sentence, limits, figures and tables that are saved, provenance."""

from typing import Any

import pandas as pd
import pytest
from IPython.display import Image, Markdown
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lib import notebook
from lib.config import StudyError, load_profile
from lib.figures import new_figure
from lib.records import Record
from lib.settings import Profile
from lib.specs import ContributionSpec, spec_hash
from lib.training import device

LOCAL = {"data": "local", "tasks": {"rte": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 32}}}


@pytest.fixture
def shown(monkeypatch) -> list[Any]:
    """Everything displayed: Markdown as its text, pictures as they are."""
    found: list[Any] = []
    monkeypatch.setattr(
        notebook, "display", lambda item: found.append(item.data if isinstance(item, Markdown) else item)
    )
    return found


@pytest.fixture
def machine(monkeypatch) -> dict[str, Any]:
    """The hardware that ``start`` finds; the allocator of the tests' own process stays as it is."""
    found = {"cpu": "Toy CPU", "gpu": None}
    monkeypatch.setattr(notebook.environment, "hardware", lambda: found)
    monkeypatch.setenv("STUDY_ALLOCATOR", "default")
    return found


@pytest.fixture
def study(profile_file) -> Profile:
    return load_profile(profile_file())


@pytest.mark.parametrize(
    ("refresh", "minutes", "expected"),
    [
        (False, -1, {"refresh": False, "budget_minutes": None}),
        (False, -0.5, {"refresh": False, "budget_minutes": None}),
        (False, 0, {"refresh": False, "budget_minutes": 0}),
        (True, 7.5, {"refresh": True, "budget_minutes": 7.5}),
    ],
)
def test_limits_are_what_the_reader_asked_for(study, refresh, minutes, expected):
    assert notebook.limits(study, refresh, minutes) == expected


def test_without_the_data_that_a_profile_wants_nothing_is_computed(profile_file, tmp_path):
    path = profile_file(**LOCAL)
    nothing = {"refresh": False, "budget_minutes": 0.0}
    assert notebook.limits(load_profile(path), True, 30) == nothing == notebook.limits(load_profile(path), False, -1)
    given = load_profile(path, data_dir=str(tmp_path))
    assert notebook.limits(given, True, 30) == {"refresh": True, "budget_minutes": 30}
    assert notebook.limits(load_profile(profile_file(**LOCAL | {"data": "hub"})), False, -1)["budget_minutes"] is None


def test_the_opening_says_what_the_notebook_will_run_on(profile_file, shown, machine):
    path = profile_file(**{"tasks.world_pair": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 32}})
    study = notebook.start(str(path), seeds=2)
    assert study == load_profile(path, seeds=2) and study.task_seeds("world_pair") == (0, 1)
    (text,) = shown
    assert text == (
        "Profile **tiny**: encoder `tiny-bert`, embedded data, tasks world_sentiment, world_pair. This copy was "
        f"executed on Toy CPU; what it had to train was trained there ({device().type}, 1 threads, fp32). "
        "Records tell their own machine and precision: provenance, at the end."
    )


def test_the_opening_names_the_gpu_and_the_precision(profile_file, shown, machine):
    machine["gpu"] = "Toy GPU"
    notebook.start(str(profile_file(**{"training.precision": "bf16"})))
    assert "executed on Toy GPU; " in shown[0] and ", bf16 autocast)" in shown[0]


def test_the_opening_says_whether_the_data_are_there(profile_file, shown, machine, tmp_path):
    path = str(profile_file(**LOCAL))
    notebook.start(path)
    notebook.start(path, data_dir=str(tmp_path))
    notebook.start(str(profile_file(**LOCAL | {"data": "hub"})))
    assert ", data from a local folder (not given: only finished records can be shown), tasks rte." in shown[0]
    assert ", data from a local folder, tasks rte." in shown[1] and ", hub data, tasks rte." in shown[2]
    assert str(tmp_path) not in shown[1], "executed notebooks name no folder of this machine"


def test_a_wrong_profile_is_an_error_before_anything_is_shown(shown, machine):
    with pytest.raises(StudyError, match="unknown profile 'quik'"):
        notebook.start("quik")
    assert shown == []


def test_source_is_the_real_one(shown):
    notebook.source(notebook.text, notebook.limits)
    assert shown[0].startswith("```python\ndef text(markdown: str) -> None:\n") and shown[0].endswith("\n```")
    assert "budget_minutes" in shown[1] and len(shown) == 2


def drawing() -> Figure:
    fig, axes = new_figure()
    axes.plot([0, 1], [0, 1])
    return fig


def test_a_figure_is_saved_and_shown_once(study, shown):
    rows = pd.DataFrame({"k": [1, 2], "score": [70.0, 65.123456789]})
    notebook.figure(drawing(), "99_toy", rows, "Score against K.", study)
    folder = study.results / "figures"
    assert {path.name for path in folder.iterdir()} == {
        f"99_toy.{kind}" for kind in ("pdf", "svg", "png", "csv", "txt")
    }
    assert (folder / "99_toy.csv").read_text() == "k,score\n1,70\n2,65.1235\n"
    picture, caption = shown
    assert isinstance(picture, Image) and picture.data == (folder / "99_toy.png").read_bytes()
    assert caption == "*Score against K.*" and plt.get_fignums() == []  # pyplot would show it a second time


def test_a_figure_of_no_rows_is_refused(study, shown):
    fig = drawing()
    with pytest.raises(StudyError, match="figure '99_toy': needs the plotted rows"):
        notebook.figure(fig, "99_toy", pd.DataFrame({"k": []}), "Score against K.", study)
    assert shown == [] and not (study.results / "figures").exists()


@pytest.mark.parametrize("scores", [[70.0], [70.0, 65.25, float("nan")]])
def test_a_table_is_saved_and_shown(study, shown, scores):
    frame = pd.DataFrame({"task": [f"task{i}" for i in range(len(scores))], "score": scores})
    notebook.table(frame, "99_toy", "All scores.", study, {"score": "{:.1f} %"})
    folder = study.results / "tables"
    assert {path.name for path in folder.iterdir()} == {"99_toy.csv", "99_toy.md", "99_toy.tex"}
    (text,) = shown
    lines = text.splitlines()
    assert lines[0].split() == ["|", "task", "|", "score", "|"] and lines[-1] == "*All scores.*"
    cells = [line.strip("|").split("|")[1].strip() for line in lines[2 : 2 + len(scores)]]
    assert cells == ["70.0 %", "65.2 %", "–"][: len(scores)]
    assert (folder / "99_toy.md").read_text(encoding="utf-8").splitlines()[:-1] == lines[:-1]


def test_a_table_of_no_rows_is_refused(study, shown):
    with pytest.raises(StudyError, match="table '99_toy': has no rows"):
        notebook.table(pd.DataFrame({"task": []}), "99_toy", "All scores.", study)
    assert shown == [] and not (study.results / "tables").exists()


def test_text_is_markdown(shown):
    notebook.text("**70.0** of 80.0")
    assert shown == ["**70.0** of 80.0"]


def record(seed: int, **changes: Any) -> Record:
    spec = ContributionSpec(task="rte", data="local", encoder="minilm", max_length=64, examples=8 + seed)
    values: dict[str, Any] = {
        "hash": spec_hash(spec), "spec": spec, "result": {}, "data": "d1", "code": "c", "commit": "a" * 40,
        "created": "2026-02-03T10:00:00+00:00", "seconds": 60.0, "hardware": {"cpu": "Toy CPU", "gpu": None},
        "packages": {"python": "3.11.0", "torch": "2.9.0", "numpy": "2.0.0"},
    }  # fmt: skip
    return Record(**values | changes)


def provenance(study: Profile, shown: list[Any], *records: Record) -> dict[str, str]:
    shown.clear()
    notebook.provenance(study, iter(records))
    (text,) = shown
    pairs = (line.strip("|").split("|") for line in text.splitlines()[2:])
    return {pair[0].strip(): pair[1].strip() for pair in pairs}


def test_provenance_of_nothing_says_so(study, shown):
    notebook.provenance(study, [])
    assert shown == ["No record was used."]


def test_provenance_of_one_record(study, shown):
    assert provenance(study, shown, record(0, data=None, commit=None)) == {
        "records": "1 in `results/results/runs`", "made": "2026-02-03", "hardware": "Toy CPU", "trained in": "nothing",
        "compute": "1 minutes in all", "commits": "none", "data digests": "none", "packages": "torch 2.9.0",
    }  # fmt: skip


def test_provenance_of_several_counts_each_once_and_names_every_condition(study, shown):
    other = record(
        1, created="2026-01-30T23:00:00+00:00", seconds=150.0, data="d2", commit="b" * 40,
        hardware={"cpu": "Toy CPU", "gpu": "Toy GPU"}, packages={"torch": "2.8.0", "transformers": "5.0.0"},
    )  # fmt: skip
    first = record(0, result={"training": {"precision": "bf16 autocast"}})
    other = other.model_copy(update={"result": {"training": {}}})
    found = provenance(study, shown, first, other, first, record(2, data=None))
    assert found == {
        "records": "3 in `results/results/runs`", "made": "2026-01-30 to 2026-02-03",
        "hardware": "Toy CPU; Toy GPU", "trained in": "bf16 autocast (1), not noted (1)",
        "compute": "4 minutes in all", "commits": f"{'a' * 10}, {'b' * 10}",
        "data digests": "d1, d2", "packages": "torch 2.8.0, torch 2.9.0, transformers 5.0.0",
    }  # fmt: skip
