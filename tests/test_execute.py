"""Strict papermill, tried on small notebooks made here: whatever goes wrong, one line says so and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from lib import execute, notebook_parameters
from lib.config import ROOT

PARAMETERS = """\
profile: str = "quick"  # which profile
results: str = ""  # another results folder
count: int = 3  # how many
factor: float = 1.0  # by how much"""


def notebook(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A notebook whose kernel name is known to no Jupyter."""
    made = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "elsewhere", "display_name": "x", "language": "python"}}
    )
    made.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    made.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    path = folder / name
    path.write_text(nbformat.writes(made), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "notebooks"
    path.mkdir()
    return path


def command(folder: Path, *extra: str) -> list[str]:
    results = str(folder.parent / "results")
    return ["smoke", "--notebooks", str(folder), "-p", "results", results, *extra]


def run(folder: Path, *extra: str) -> int:
    return execute.main(command(folder, *extra))


def outputs(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def test_notebooks_run_in_order_with_this_interpreter_and_leave_no_machine_paths(folder, capfd, monkeypatch):
    monkeypatch.setenv("STUDY_DATA", str(folder))
    say = "from lib.progress import say\nsay('step 1 of 2')"
    look = f"import os, sys\nprint(sys.executable == {sys.executable!r}, sys.prefix, os.environ['STUDY_DATA'])"
    where = f"print(results, {str(ROOT)!r} + '/lib')\nprint('noise', file=sys.stderr)"
    notebook(folder, "01_second.ipynb", say, look, where)
    notebook(folder, "00_first.ipynb", "print(profile, count, factor)")
    assert run(folder, "-p", "factor", "1e-3") == 0

    shown = capfd.readouterr()
    assert shown.err == ""
    assert shown.out.index("00_first") < shown.out.index("01_second") < shown.out.index("01 | step 1 of 2")
    assert "done" in shown.out.split("notebook ")[-1]

    made = folder.parent / "results" / "notebooks"
    assert sorted(path.name for path in made.iterdir()) == ["00_first.ipynb", "01_second.ipynb"]
    assert [output["text"] for output in outputs(made / "00_first.ipynb")] == [["smoke 3 0.001\n"]]
    text = (made / "01_second.ipynb").read_text(encoding="utf-8")
    printed = "".join(line for output in outputs(made / "01_second.ipynb") for line in output["text"])
    assert printed == "True <environment> <STUDY_DATA>\n<results> lib\n"
    assert str(folder.parent) not in text and "noise\\n" not in printed and "start_time" not in text


def test_a_notebook_with_nothing_to_do_is_left_out_and_the_next_one_runs(folder, capfd):
    notebook(folder, "00_idle.ipynb", "from lib.config import NothingToDo\nraise NothingToDo('no task of mine')")
    notebook(folder, "01_busy.ipynb", "print(count)")
    assert run(folder) == 0
    shown = capfd.readouterr()
    assert "00 | no task of mine" in shown.out and shown.err == ""
    assert [line.split()[1] for line in shown.out.split("notebook ")[-1].splitlines()[1:3]] == ["left", "done"]
    assert [path.name for path in (folder.parent / "results" / "notebooks").iterdir()] == ["01_busy.ipynb"]


def test_a_second_run_gives_the_same_notebook_but_for_durations(folder):
    notebook(folder, "00_same.ipynb", "print(count)")
    target = folder.parent / "results" / "notebooks" / "00_same.ipynb"

    def without_durations() -> str:
        assert run(folder) == 0
        return "\n".join(line for line in target.read_text().splitlines() if '"duration"' not in line)

    assert without_durations() == without_durations()


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["-p", "cuont", "3"], "unknown parameter 'cuont' in 00_toy.ipynb; known: profile, results, count, factor"),
        (["-p", "count", "many"], "parameter 'count': found 'many', expected int (how many)"),
        (["-p", "count", "2.5"], "expected int"),
        (["-p", "count", "true"], "expected int"),
        (["-p", "count", "[1"], "cannot read '[1' as YAML"),
        (["-p", "profile", "study"], "first argument"),
        (["--only", "07"], "no notebook '07'; there is 00_toy"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["-p", "count"], "expected 2 arguments"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(folder, capfd, extra, says):
    notebook(folder, "00_toy.ipynb", "raise SystemExit('ran')")
    assert run(folder, *extra) == 2
    shown = capfd.readouterr()
    assert says in shown.err and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert not (folder.parent / "results").exists()


def test_unknown_profile_and_missing_or_damaged_notebooks(folder, capfd):
    assert execute.main(["quik"]) == 2
    assert "unknown profile 'quik'; allowed: smoke, quick, study, paper" in capfd.readouterr().err
    assert run(folder) == 2
    assert "no notebooks" in capfd.readouterr().err
    (folder / "00_cut.ipynb").write_text('{"cells": [', encoding="utf-8")
    assert run(folder) == 2
    assert "00_cut.ipynb: not a readable notebook" in capfd.readouterr().err


def test_a_parameter_goes_to_the_notebooks_that_have_it(folder):
    first = notebook(folder, "00_a.ipynb", parameters='profile: str = "quick"  # which')
    second = notebook(folder, "01_b.ipynb")
    chosen = notebook_parameters.assign([first, second], [("count", "7")], "smoke")
    assert chosen == {first: {"profile": "smoke"}, second: {"profile": "smoke", "count": 7}}


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("int", "3", 3),
        ("float", "3", 3.0),
        ("float", "1e-4", 1e-4),
        ("bool", "true", True),
        ("str", "2024", "2024"),
        ("str", "no", "no"),
        ("list[int]", "[1, 2]", [1, 2]),
        ("None", "word", "word"),
    ],
)
def test_values_are_yaml_held_to_the_annotation(kind, text, value):
    parsed = notebook_parameters.parse("x", text, {"inferred_type_name": kind, "help": ""})
    assert parsed == value and type(parsed) is type(value)


def test_help_lists_each_parameter_with_its_meaning(folder, capfd):
    notebook(folder, "00_a.ipynb")
    notebook(folder, "01_b.ipynb")
    assert execute.main(["--notebooks", str(folder), "--help-parameters"]) == 0
    shown = capfd.readouterr().out
    assert "  count: int = 3\n      how many  [00, 01]" in shown
    assert execute.main(["--notebooks", str(folder), "--list"]) == 0
    assert capfd.readouterr().out == "00_a.ipynb\n01_b.ipynb\n"


def test_a_series_ends_with_the_overview_once_more(folder, capfd):
    found = folder / "found"
    look = f"from pathlib import Path\nprint(Path({str(found)!r}).exists())"
    notebook(folder, f"{execute.OVERVIEW}.ipynb", look)
    notebook(folder, "01_toy.ipynb", f"open({str(found)!r}, 'w').close()")
    made = folder.parent / "results" / "notebooks" / f"{execute.OVERVIEW}.ipynb"
    assert run(folder, "--only", "00") == 0
    assert outputs(made)[0]["text"] == ["False\n"] and "again" not in capfd.readouterr().out
    assert run(folder) == 0
    assert outputs(made)[0]["text"] == ["True\n"] and "00_start_here.ipynb, again" in capfd.readouterr().out


def test_a_failing_cell_stops_the_run_and_keeps_what_was_there(folder, capfd):
    path = notebook(folder, "00_toy.ipynb", "print('good')")
    notebook(folder, "01_later.ipynb", "print('later')")
    assert run(folder, "--only", "00") == 0
    made = folder.parent / "results" / "notebooks"
    whole = (made / "00_toy.ipynb").read_bytes()
    capfd.readouterr()

    notebook(folder, "00_toy.ipynb", "print('first')", "1 / 0", "print('never')")
    assert run(folder) == 1
    shown = capfd.readouterr()
    assert "error: 00_toy.ipynb, cell [4]: ZeroDivisionError: division by zero\n  kept: " in shown.err
    assert "Traceback" not in shown.err and "not run" in shown.out
    assert (made / "00_toy.ipynb").read_bytes() == whole
    assert sorted(path.name for path in made.iterdir()) == ["00_toy.failed.ipynb", "00_toy.ipynb"]
    assert "first\n" in outputs(made / "00_toy.failed.ipynb")[0]["text"]

    path.write_bytes(notebook(folder, "00_toy.ipynb", "print('mended')").read_bytes())
    assert run(folder, "--only", "00") == 0
    assert [path.name for path in made.iterdir()] == ["00_toy.ipynb"]


def test_a_study_error_in_a_cell_is_just_its_message(folder, capfd):
    notebook(
        folder, "00_toy.ipynb", "from lib.config import StudyError\nraise StudyError('K: found 9, expected under 6')"
    )
    assert run(folder) == 2
    assert capfd.readouterr().err == "error: K: found 9, expected under 6\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_dead_kernel_is_named_with_its_signal(folder, capfd):
    notebook(folder, "00_toy.ipynb", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert run(folder) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: 00_toy.ipynb: the kernel died (SIGKILL, often: out of memory)")
    assert (folder.parent / "results" / "notebooks" / "00_toy.failed.ipynb").exists()


def test_an_unwritable_results_folder_is_one_line_before_a_kernel_starts(folder, capfd):
    marker = folder / "ran"
    notebook(folder, "00_toy.ipynb", f"open({str(marker)!r}, 'w').close()")
    (folder.parent / "results").write_text("a file where the folder should be", encoding="utf-8")
    assert run(folder) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: cannot write") and error.count("\n") == 1
    assert not marker.exists()


@pytest.mark.parametrize("number", [28, 13])
def test_a_full_disk_while_executing_is_one_line(folder, capfd, monkeypatch, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    notebook(folder, "00_toy.ipynb")
    monkeypatch.setattr("lib.kernel.execute", refuse)
    assert run(folder) == 2
    error = capfd.readouterr().err
    assert ("disk full" if number == 28 else "cannot write") in error and error.count("\n") == 1


def test_partial_copies_of_killed_runs_are_removed_and_those_of_live_ones_kept(folder):
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    dead, live = (folder / f".00_toy.{pid}.partial.ipynb" for pid in (finished.pid, os.getpid()))
    for path in (dead, live):
        path.touch()
    execute._remove_abandoned(folder)
    assert not dead.exists() and live.exists()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_keeps_the_partial_notebook_and_leaves_no_kernel(folder):
    started = folder / "started"
    tell = f"import os, time\nwith open({str(started)!r}, 'w') as file:\n    file.write(str(os.getpid()))"
    notebook(folder, "00_toy.ipynb", "print('whole cell')", tell, "time.sleep(600)")
    process = subprocess.Popen(
        [sys.executable, "-m", "lib.execute", *command(folder)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 120
    while not (started.exists() and started.read_text()) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted; run the same command again to go on\n"
    assert "interrupted" in out
    made = folder.parent / "results" / "notebooks"
    assert [path.name for path in made.iterdir()] == ["00_toy.interrupted.ipynb"]
    assert outputs(made / "00_toy.interrupted.ipynb")[0]["text"] == ["whole cell\n"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
