"""A real series of runs, killed, interrupted and repeated; and bad input through the real command lines."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import small_profile

from lib import environment, runs
from lib.config import ROOT

# Started with the allocator's variables, so that the command need not start itself again.
ENVIRONMENT = os.environ | environment.fast_cpu_environment() | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT.pop("STUDY_DATA", None)


def start(module: str, *arguments: Any, progress: Path, **environ: str) -> subprocess.Popen[str]:
    """The command line of ``module``; progress lines go to a file, so that stderr holds errors alone."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT, env=ENVIRONMENT | {"STUDY_PROGRESS": str(progress)} | environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip


@dataclass
class Series:
    """A series that was disturbed again and again, beside an undisturbed one."""

    undisturbed: dict[str, dict[str, Any]] = field(default_factory=dict)
    disturbed: dict[str, dict[str, Any]] = field(default_factory=dict)
    finished_early: dict[str, bytes] = field(default_factory=dict)
    finished_early_at_the_end: dict[str, bytes] = field(default_factory=dict)
    stops: list[tuple[int, str]] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    last_output: str = ""


def records(results: Path) -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (results / "runs").glob("*.json")}


def checkpoint_step(results: Path) -> int:
    """The newest checkpoint that has been begun."""
    steps = [int(path.name.split("-")[1]) for path in (results / "checkpoints").glob("*/checkpoint-*")]
    return max(steps, default=-1)


def stop_at(process: subprocess.Popen[str], results: Path, step: int, number: int) -> tuple[int, str]:
    """Send a signal once training of the second run has written a checkpoint at or after ``step``."""
    limit = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < limit:
        with contextlib.suppress(OSError):
            if records(results) and checkpoint_step(results) >= step:
                break
        time.sleep(0.005)
    time.sleep(random.random() / 20)  # somewhere within a step or the writing of a checkpoint
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Series:
    """Two runs: one to finish before the first stop, one of 60 steps to be stopped three times."""
    folder = tmp_path_factory.mktemp("series")
    values = small_profile(folder / "unused")
    values["training"] |= {"checkpoint_minutes": 1e-9, "dropout": 0.1}
    values["tasks"]["world_pair"] = values["tasks"]["world_sentiment"] | {"epochs": 15, "learning_rate": 3e-3}
    path = folder / "series.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    found = Series()

    def command(results: Path) -> subprocess.Popen[str]:
        return start(
            "lib.runs", "dense", "--profile", path, "--results", results, progress=folder / "progress"
        )  # fmt: skip

    whole, broken = folder / "whole", folder / "broken"
    _, err = (process := command(whole)).communicate(timeout=300)
    assert process.returncode == 0, err
    found.undisturbed = records(whole)
    for step, number in ((3, signal.SIGINT), (18, signal.SIGKILL), (37, signal.SIGKILL)):
        found.stops.append(stop_at(command(broken), broken, step, number))
        finished = {path.name: path.read_bytes() for path in (broken / "runs").iterdir()}
        found.finished_early = found.finished_early or finished
    found.last_output, err = (process := command(broken)).communicate(timeout=300)
    assert process.returncode == 0, err
    found.disturbed = records(broken)
    found.finished_early_at_the_end = {name: (broken / "runs" / name).read_bytes() for name in found.finished_early}
    found.leftovers = [path.name for path in (broken / "checkpoints").iterdir()]
    found.leftovers += [path.name for path in broken.rglob("*") if path.name.startswith(".")]
    return found


def test_ctrl_c_is_one_line_and_kill_is_a_kill(series):
    assert series.stops[0] == (
        130, "interrupted; finished runs are kept, the same command goes on from the last checkpoint\n",
    )  # fmt: skip
    assert [code for code, _ in series.stops[1:]] == [-signal.SIGKILL, -signal.SIGKILL]


def test_finished_records_are_kept_as_they_are(series):
    assert len(series.finished_early) == 1 and series.finished_early == series.finished_early_at_the_end
    assert "2 runs, 1 cached, 1 computed" in series.last_output


def without_timings(record: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key not in ("created", "seconds")}
    training = {key: value for key, value in record["result"]["training"].items() if key not in ("seconds", "resumed")}
    return kept | {"result": record["result"] | {"training": training}}


def test_records_equal_those_of_an_undisturbed_series(series):
    assert len(series.undisturbed) == 2
    assert {name: without_timings(record) for name, record in series.disturbed.items()} == {
        name: without_timings(record) for name, record in series.undisturbed.items()
    }


def test_the_stopped_run_went_on_from_its_last_checkpoint(series):
    (name,) = series.disturbed.keys() - series.finished_early.keys()
    training = series.disturbed[name]["result"]["training"]
    assert training["steps"] == 60 and 36 <= training["resumed"] < 60
    assert series.undisturbed[name]["result"]["training"]["resumed"] == 0


def test_nothing_half_written_is_left(series):
    assert series.leftovers == []


# Bad input. What does not depend on the process is tried in this one, through the same ``main``.

CONTEXT = "The mill of Torbek burnt down in 1871."
GOOD = {"title": "Torbek", "paragraphs": [{"context": CONTEXT, "qas": [
    {"id": "a", "question": "When did it burn?", "answers": [{"text": "1871", "answer_start": CONTEXT.index("1871")}]}
]}]}  # fmt: skip
OUTSIDE = json.loads(json.dumps(GOOD).replace(str(CONTEXT.index("1871")), "900"))
RTE = "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n"


def no_folder(folder: Path) -> None:
    """The data directory itself is missing."""


def empty_folder(folder: Path) -> None:
    folder.mkdir()


def squad(folder: Path, text: str) -> None:
    (folder / "squad_v1").mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / "squad_v1" / f"{split}.json").write_text(text, encoding="utf-8")


def rte(folder: Path, text: str) -> None:
    (folder / "glue" / "RTE").mkdir(parents=True)
    for split in ("train", "dev"):
        (folder / "glue" / "RTE" / f"{split}.tsv").write_text(text, encoding="utf-8")


DATA = {
    "missing folder": (no_folder, "squad_v1", ("data directory", "does not exist", "STUDY_DATA")),
    "empty folder": (empty_folder, "squad_v1", ("data directory", "is empty", "squad_v1, glue")),
    "missing file": (lambda folder: rte(folder, RTE), "squad_v1", ("squad_v1 does not exist", "train.json")),
    "truncated JSON": (
        lambda folder: squad(folder, json.dumps({"data": [GOOD]})[:-20]), "squad_v1",
        ("train.json line 1: not valid JSON", "fetch it again"),
    ),
    "answer outside its context": (
        lambda folder: squad(folder, json.dumps({"data": [OUTSIDE]})), "squad_v1",
        ("train.json: question 'a'", "answer_start 900", "expected the answer '1871'"),
    ),
    "TSV row too short": (
        lambda folder: rte(folder, RTE + "1\tIt snows.\n"), "rte",
        ("train.tsv line 3: found 2 columns, expected 4",),
    ),
    "unknown label": (lambda folder: rte(folder, RTE + "1\tA.\tB.\tmaybe\n"), "rte", ("line 3: found label 'maybe'",)),
}  # fmt: skip


@pytest.fixture
def local_profile(profile_file):
    """A profile that trains ``task`` on data from a local folder."""

    def write(task: str) -> Path:
        return profile_file(data="local", tasks={task: {
            "epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 32,
        }})  # fmt: skip

    return write


def check(code: int, err: str, said: tuple[str, ...]) -> None:
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert not [part for part in said if part not in err], err


@pytest.mark.parametrize("case", DATA)
def test_bad_data_is_one_line(case, local_profile, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("STUDY_PROGRESS", str(tmp_path / "progress"))
    prepare, task, said = DATA[case]
    prepare(tmp_path / "data")
    code = runs.main(["dense", "--profile", str(local_profile(task)), "--data-dir", str(tmp_path / "data")])
    check(code, capsys.readouterr().err, said)
    assert not (tmp_path / "results" / "runs").exists()


def test_bad_data_from_the_environment_through_the_real_command(local_profile, tmp_path):
    squad(tmp_path / "data", json.dumps({"data": [OUTSIDE]}))
    process = start(
        "lib.runs", "dense", "--profile", local_profile("squad_v1"), progress=tmp_path / "progress",
        STUDY_DATA=str(tmp_path / "data"),
    )  # fmt: skip
    _, err = process.communicate(timeout=300)
    check(process.returncode, err, ("answer_start 900",))


def test_an_unreachable_hub_says_how_to_work_offline(profile_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("STUDY_PROGRESS", str(tmp_path / "progress"))
    settings = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 32}
    path = profile_file(data="hub", tasks={"rte": settings})
    check(runs.main(["dense", "--profile", str(path)]), capsys.readouterr().err, ("cannot be loaded", "STUDY_DATA"))
    path = profile_file(encoder="nobody/no-such-model")
    code = runs.main(["dense", "--profile", str(path)])
    check(code, capsys.readouterr().err, ("'nobody/no-such-model' could not be loaded", "offline, use encoder=minilm"))


def test_a_corrupt_record_is_one_line_and_stays(profile_file, tmp_path, capsys):
    path = profile_file()
    assert runs.main(["dense", "--profile", str(path)]) == 0
    (record,) = (tmp_path / "results" / "runs").iterdir()
    os.truncate(record, 200)
    capsys.readouterr()
    check(runs.main(["dense", "--profile", str(path)]), capsys.readouterr().err, ("corrupt record", record.name))
    assert record.stat().st_size == 200


def test_a_model_folder_without_weights_is_one_line(profile_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("STUDY_PROGRESS", str(tmp_path / "progress"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    path = profile_file(encoder=str(tmp_path / "model"))
    check(runs.main(["dense", "--profile", str(path)]), capsys.readouterr().err, ("has no model.safetensors",))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quik"], ("unknown profile 'quik'; allowed: smoke, quick, study, paper",)),
        (["smoke", "-p", "buget_minutes", "3"], ("unknown parameter 'buget_minutes'", "budget_minutes")),
        (["smoke", "-p", "seeds", "two"], ("parameter 'seeds': found 'two', expected int",)),
        (["smoke", "--only", "99"], ("no notebook '99'",)),
    ],
)
def test_bad_arguments_of_the_notebooks_are_one_line(arguments, said, tmp_path):
    process = start("lib.execute", *arguments, "-p", "results", tmp_path / "results", progress=tmp_path / "progress")
    out, err = process.communicate(timeout=300)
    check(process.returncode, err, said)
    assert out == "" and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (["-p", "k", "[4]"], ("K=4 is impossible, tiny-bert has 4 layers",)),
        (["-p", "seeds", "-1"], ("seeds: found -1, expected how many seeds (1 or more)",)),
    ],
)
def test_impossible_values_come_out_of_a_notebook_as_one_line(parameters, said, tmp_path):
    process = start(
        "lib.execute", "smoke", "--only", "05", *parameters, "-p", "tasks", "[world_sentiment]", "-p", "results",
        tmp_path / "results", progress=tmp_path / "progress",
    )  # fmt: skip
    _, err = process.communicate(timeout=300)
    check(process.returncode, err, said)
