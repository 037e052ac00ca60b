"""A real series of runs, killed, interrupted and repeated."""

import contextlib
import json
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import small_profile, start_module, without_timings


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
        return start_module(
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
