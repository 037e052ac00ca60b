"""Fan-out: what jobs a plan means, and a real series over Snakemake, killed and finished by a cluster executor."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import record, small_profile
from filelock import FileLock

from lib import execute, fanout, status
from lib.config import ROOT, load_profile
from lib.plans import contributions
from lib.plans.structured_qa import pruned
from lib.records import record_path
from lib.runs import ensure
from lib.specs import dense_spec, needed_runs, parse_spec, spec_hash

SNAKEMAKE = importlib.util.find_spec("snakemake") or shutil.which("snakemake")
needs_snakemake = pytest.mark.skipif(not SNAKEMAKE, reason="needs Snakemake: pip install 'snakemake>=9'")


def small(folder: Path, **changes: Any) -> Path:
    """A profile with one task, whose plan ``poor_mans_bert`` is four runs."""
    values = small_profile(folder / "results") | {"seeds": [0]} | changes
    values["training"] |= {"checkpoint_minutes": 1e-9}
    values["tasks"]["world_sentiment"] |= {"epochs": 8, "seeds": len(values["seeds"])}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


# What a plan means


def test_a_run_needs_those_that_it_begins_with_distils_from_or_is_informed_by(profile_file):
    profile = load_profile(profile_file())
    profile = load_profile(
        "smoke", results=profile.results, **{"structured_pruning.operating_points": [[0.5, 0.5]]}
    )  # fmt: skip
    spec = pruned(profile, "world_qa", 0, {"heads": 0.5}, "gain", "distil")
    dense, importance = dense_spec(profile, "world_qa", 0), spec.informed_by[0]
    assert [spec_hash(other) for other in needed_runs(spec)] == [
        spec_hash(other) for other in (dense, dense, importance)
    ]
    assert needed_runs(dense) == [] and needed_runs(importance) == [dense]
    names = list(fanout.jobs_of([spec], profile))
    assert names == [fanout.job_name(profile, other) for other in (dense, importance, spec)]


def test_spec_files_are_the_runs_that_they_are_named_after(tmp_path):
    profile = load_profile("smoke", results=tmp_path / "results")
    plan = fanout.write_plan(tmp_path / "jobs" / "jobs.json", profile, ["dense", "structured_qa", "halved_speed"], [])
    assert len(plan["jobs"]) > 30 and plan["measured_first"] == []
    for name, job in plan["jobs"].items():
        spec = parse_spec(json.loads((tmp_path / "jobs" / "specs" / f"{name}.json").read_text(encoding="utf-8")))
        assert name.endswith(spec_hash(spec)) and record_path(profile, spec).stem == name
        assert set(job["needs"]) <= set(plan["jobs"])
    order = list(plan["jobs"])
    assert all(order.index(need) < order.index(name) for name, job in plan["jobs"].items() for need in job["needs"])
    assert json.loads((tmp_path / "jobs" / "jobs.json").read_text()) == plan


def test_what_measures_time_runs_alone():
    assert {"latency", "training_speed", "stock_comparison"} <= set(fanout.MEASURING)
    assert not {"train", "importance", "contribution"} & set(fanout.MEASURING)


def test_a_further_seed_adds_exactly_its_runs(tmp_path):
    one, two = (load_profile(small(tmp_path, seeds=seeds)) for seeds in ([0], [0, 1]))
    before, _ = fanout.plan_jobs(one, ["dense", "halved_speed"])
    after, _ = fanout.plan_jobs(two, ["dense", "halved_speed"])
    added = [spec for name, spec in after.items() if name not in before]
    assert set(before) < set(after) and added == [dense_spec(two, "world_sentiment", 1)]


def test_what_must_be_measured_before_the_rest_can_be_planned(tmp_path):
    profile = load_profile(small(tmp_path))
    jobs, waiting = fanout.plan_jobs(profile, ["poor_mans_bert"])
    assert list(jobs) == waiting and waiting[0].startswith("contribution-")
    ensure(contributions(profile), profile)
    jobs, waiting = fanout.plan_jobs(profile, ["poor_mans_bert"])
    assert waiting == [] and len([name for name in jobs if "layer_dropping" in name]) >= 2


def test_a_notebooks_plans_are_those_that_it_names(tmp_path):
    (tmp_path / "00.ipynb").write_text('"runs = ensure(plans.engine_latency(study))\\n", "plans.dense(x)", "plans.y"')
    assert fanout.plans_of([tmp_path / "00.ipynb"]) == ["dense", "engine_latency"]
    real = ROOT / "notebooks" / "05_poor_mans_bert.ipynb"
    assert fanout.plans_of([real]) == ["majority", "contributions", "poor_mans_bert", "halved_speed"]
    sparse = ["obert", "fisher_cost", "sparse_speed", "published_checkpoints"]
    assert fanout.plans_of([ROOT / "notebooks" / "03_obert.ipynb"]) == sparse


def test_a_comparison_that_the_profile_leaves_out_is_no_job(tmp_path):
    jobs = [
        fanout.plan_jobs(load_profile(name, results=tmp_path), ["stock_comparison"])[0] for name in ("quick", "study")
    ]
    assert [len(found) for found in jobs] == [0, 1]


def test_a_status_counts_the_records_of_every_notebooks_plan(tmp_path):
    profile, name = load_profile(small(tmp_path)), "01_dense_baselines"
    made = record(dense_spec(profile, "world_sentiment", 0))
    before, after = (status.by_notebook(profile, found).set_index("notebook") for found in ([], [made]))
    planned = len(fanout.plan_jobs(profile, fanout.plans_of([ROOT / "notebooks" / f"{name}.ipynb"]))[0])
    columns = ["planned", "finished", "missing", "hours of runs", "machines"]
    assert before.loc[name, columns].tolist() == [planned, 0, planned, 0.0, ""]
    assert after.loc[name, columns].tolist() == [planned, 1, planned - 1, made.seconds / 3600, "Toy CPU"]
    assert "'world_qa' is not among those of this run" in before.loc["08_frontier", "machines"]


def test_each_job_gets_a_gpu_of_its_own(tmp_path, monkeypatch):
    seen = []

    def started(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        seen.append((env["CUDA_VISIBLE_DEVICES"], command[-1]))
        if len(seen) == 1:
            fanout.run_on_free_gpu(["2", "5"], tmp_path, ["second.json"])
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(fanout.subprocess, "run", started)
    assert fanout.run_on_free_gpu(["2", "5"], tmp_path, ["first.json"]) == 3
    assert seen == [("2", "first.json"), ("5", "second.json")]
    with FileLock(tmp_path / "gpu-2.lock", timeout=0):
        pass


# What the user gets wrong


def test_without_snakemake_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fanout.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fanout.shutil, "which", lambda name: None)
    assert fanout.main([str(small(tmp_path)), "--plans", "dense", "--jobs", "2"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: fan-out needs Snakemake, which is not installed; pip install 'snakemake>=9'")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["smoke"], "give --jobs N, how many runs at once"),
        (["smoke", "--jobs", "0"], "give --jobs N"),
        (["smoke", "--jobs", "2", "--plans", "dense,dens"], "unknown plan 'dens'; known: "),
        (["smoke", "--jobs", "many"], "invalid int value: 'many'"),
        (["quik", "--jobs", "2"], "unknown profile 'quik'"),
        (["quick", "--seeds", "two"], "argument --seeds: invalid int value: 'two'; see python -m lib.fanout --help"),
        (["quick", "--seeds", "-1"], "seeds: found -1, expected how many seeds (1 or more)"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said, capsys):
    assert fanout.main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(("seeds", "given", "used"), [("0", [], [0, 1]), ("1", ["--seeds", "1"], [0])])
def test_seeds_0_are_the_profiles(seeds, given, used, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(fanout, "compute", lambda profile, names, arguments, *_: called.append((profile, arguments)))
    path = small(tmp_path, seeds=[0, 1])
    paths = [ROOT / "notebooks" / "05_poor_mans_bert.ipynb"]
    execute.fan_out(paths, str(path), [("seeds", seeds)], 2, "")
    assert fanout.main([str(path), "--jobs", "2", "--seeds", seeds]) == 0
    assert [(list(profile.seeds), arguments) for profile, arguments in called] == 2 * [(used, [str(path), *given])]


def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys):
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fanout, "compute", stop)
    assert fanout.main([str(small(tmp_path)), "--jobs", "2"]) == 130
    said = "interrupted; finished runs are kept, the same command goes on from the last checkpoint\n"
    assert capsys.readouterr().err == said


def test_what_only_a_notebook_understands_cannot_be_fanned_out(tmp_path, capsys):
    arguments = ["smoke", "--only", "05", "--jobs", "2", "-p", "k", "[1]", "-p", "results", str(tmp_path / "results")]
    assert execute.main(arguments) == 2
    assert "--jobs cannot carry parameter 'k' (only tasks, seeds," in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


# Snakemake itself


def command(folder: Path, *options: str) -> list[str]:
    """Snakemake on the jobs that lie in ``folder``, three slots."""
    config = {"profile": str(folder / "small.yaml"), "options": "--plans poor_mans_bert,dense", "planned": True,
              "folder": str(folder / "jobs"), "python": sys.executable, "threads": 1}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return [
        *fanout.snakemake(), "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder), "--configfile",
        str(folder / "config.json"), "--resources", "exclusive=1", "--scheduler", "greedy", "--rerun-triggers", "mtime",
        "--nolock", "--rerun-incomplete", *options,
    ]  # fmt: skip


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "STUDY_ALLOCATOR": "default", "HF_HUB_OFFLINE": "1"}


def snakemake(folder: Path, *options: str) -> str:
    done = subprocess.run(command(folder, *options), capture_output=True, text=True, env=ENVIRONMENT, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def counts(folder: Path) -> dict[str, int]:
    """How many jobs of each rule a dry-run counts."""
    said = snakemake(folder, "--cores", "3", "--dry-run", "--quiet", "rules", "host", "reason")
    return {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", said, re.MULTILINE)}


@needs_snakemake
def test_a_dry_run_counts_what_is_missing_and_a_seed_adds_its_runs(tmp_path):
    def plan(seeds: list[int]) -> Any:
        profile = load_profile(small(tmp_path, seeds=seeds))
        fanout.write_plan(tmp_path / "jobs" / "jobs.json", profile, ["dense", "engine_latency"], [])
        return profile

    profile = plan([0])
    assert counts(tmp_path) == {"compute": 1, "measure": 1, "all": 1, "total": 3}
    record = record_path(profile, dense_spec(profile, "world_sentiment", 0))
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    os.utime(record, (1, 1))  # older than everything, as after a checkout
    assert counts(tmp_path) == {"measure": 1, "all": 1, "total": 2}
    plan([0, 1, 2])
    assert counts(tmp_path) == {"compute": 2, "measure": 1, "all": 1, "total": 4}
    said = snakemake(tmp_path, "--cores", "3", "--dry-run")
    assert re.search(r"rule measure:.*?threads: 3\n", said, re.DOTALL) and "exclusive=1" in said
    assert record.read_text() == "{}"


def training_step(folder: Path) -> int:
    steps = [int(path.name.split("-")[1]) for path in (folder / "results" / "checkpoints").glob("*/checkpoint-*")]
    return max(steps, default=-1)


def kill_while_training(folder: Path) -> int:
    """Start the series here, kill every process of it at once in the middle of the dense training; the step reached."""
    process = subprocess.Popen(
        command(folder, "--cores", "1"), env=ENVIRONMENT, start_new_session=True,
        stdout=(folder / "killed.log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    limit = time.monotonic() + 600
    while training_step(folder) < 5 and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return training_step(folder)


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> dict[str, Any]:
    """All of ``poor_mans_bert``: begun by the local executor, killed, finished by one that submits to a "cluster"."""
    said = subprocess.run([*fanout.snakemake(), "--help"], capture_output=True, text=True).stdout
    if "cluster-generic" not in said:
        pytest.skip("needs a cluster executor: pip install snakemake-executor-plugin-cluster-generic")
    folder = tmp_path_factory.mktemp("fanout")
    profile = load_profile(small(folder))
    jobs_file, plans = folder / "jobs" / "jobs.json", ["poor_mans_bert", "dense"]
    fanout.write_plan(jobs_file, profile, plans, ["--profile", str(folder / "small.yaml")])
    dense = record_path(profile, dense_spec(profile, "world_sentiment", 0))
    found = {"profile": profile, "dense": dense, "killed at": kill_while_training(folder)}
    found["before"] = sorted(path.name for path in (folder / "results" / "runs").glob("*.json"))
    submit = folder / "submit.sh"
    log = shlex.quote(str(folder / "submissions"))
    submit.write_text(f'#!/bin/sh\necho submitted >> {log}\nsh "$1" >> "$1.log" 2>&1 &\necho $$\n', encoding="utf-8")
    submit.chmod(0o755)
    found["said"] = snakemake(
        folder, "--executor", "cluster-generic", "--cluster-generic-submit-cmd", str(submit), "--jobs", "2",
        "--local-cores", "1", "--seconds-between-status-checks", "1", "--latency-wait", "20",
    )  # fmt: skip
    found["submissions"] = (folder / "submissions").read_text().count("submitted")
    found["left"] = counts(folder)
    return found


@needs_snakemake
def test_a_killed_series_goes_on_from_its_last_checkpoint(series):
    assert series["killed at"] >= 5 and series["dense"].name not in series["before"]
    training = json.loads(series["dense"].read_text(encoding="utf-8"))["result"]["training"]
    # The newest checkpoint may have been cut off while it was written; then the one before it counts.
    assert training["resumed"] in (series["killed at"], series["killed at"] - 1) and training["steps"] == 32


@needs_snakemake
def test_a_cluster_executor_finishes_it_with_what_was_planned_on_the_way(series):
    profile = series["profile"]
    jobs, waiting = fanout.plan_jobs(profile, ["poor_mans_bert", "dense"])
    assert waiting == [] and len(jobs) == 4
    made = sorted(path.stem for path in (profile.results / "runs").glob("*.json"))
    assert made == sorted(jobs)
    assert series["submissions"] == len(jobs) - len(series["before"])
    assert series["left"] == {}
    ensure(list(jobs.values()), profile, budget_minutes=0)
    assert not ensure(list(jobs.values()), profile, budget_minutes=0).missing
