"""Fan-out: what jobs a set of plans means, for Snakemake to run over cores, Slurm or Kubernetes.

One job is one spec: ``python -m lib.runs SPEC.json`` makes its record. A job needs the records of the runs that its
spec begins with, distils from or is informed by. Some plans can be made only once others were measured (which layers
to drop is decided by their contributions): the Snakefile makes those runs first, then plans again at a checkpoint.

Nothing is computed here, and no record is written: ``lib.runs`` locks, caches and resumes every run, so a record made
by a job is the one that a notebook would have made.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock, Timeout

from lib import plans
from lib.command_line import RESUMABLE, Parser, exit_code
from lib.config import ROOT, StudyError, load_profile
from lib.files import write_atomically
from lib.own_data import is_path
from lib.plans import MEASURED_FIRST, PLANS, common, make_plan
from lib.progress import say
from lib.records import record_path
from lib.settings import Profile
from lib.specs import Spec, needed_runs

# Kinds of runs that measure time, in rounds, and that another run beside them would disturb.
MEASURING = tuple(kind.model_fields["kind"].default for kind in get_args(Spec) if "rounds" in kind.model_fields)
FIRST_PRIORITY = 1_000_000  # of a plan's first job; the next has one less, so that both plannings order alike
PROFILE_PARAMETERS = ("tasks", "seeds", "encoder", "data", "data_dir", "results")  # what may replace the profile's
INSTALL = "pip install 'snakemake>=9', or leave --jobs out and the notebooks compute the runs one after another"


def job_name(profile: Profile, spec: Spec) -> str:
    """A job is called like its record."""
    return record_path(profile, spec).stem


def jobs_of(plan: Iterable[Spec], profile: Profile) -> dict[str, Spec]:
    """Every run of ``plan`` and every run that one of them needs, by name; what is needed stands first."""
    jobs: dict[str, Spec] = {}

    def add(spec: Spec) -> None:
        if job_name(profile, spec) not in jobs:
            for other in needed_runs(spec):
                add(other)
            jobs[job_name(profile, spec)] = spec

    for spec in plan:
        add(spec)
    return jobs


def plan_jobs(profile: Profile, names: Sequence[str]) -> tuple[dict[str, Spec], list[str]]:
    """The jobs of the plans called ``names``, and which of them must be finished before the rest can be planned.

    Raises:
        StudyError: an unknown plan.
    """
    unknown = [name for name in names if name not in PLANS]
    if unknown:
        raise StudyError(f"unknown plan '{unknown[0]}'; known: {', '.join(PLANS)}")
    first = [spec for name in names if name in MEASURED_FIRST for spec in MEASURED_FIRST[name](profile)]
    with contextlib.redirect_stdout(sys.stderr):  # what a plan says of the records that it lacks
        jobs = jobs_of([*first, *(spec for name in names for spec in make_plan(name, profile, 0.0))], profile)
    waiting = [name for name in jobs_of(first, profile) if not (profile.results / "runs" / f"{name}.json").exists()]
    return jobs, waiting


def write_plan(path: Path, profile: Profile, names: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
    """Write the jobs file that the Snakefile reads, and every spec beside it in ``specs/``; returns what it holds.

    Args:
        arguments: what ``python -m lib.runs SPEC.json`` is to be called with besides.
    """
    jobs, waiting = plan_jobs(profile, names)
    for name, spec in jobs.items():
        text = json.dumps(spec.model_dump(mode="json"), indent=1)
        write_atomically(path.parent / "specs" / f"{name}.json", text + "\n")
    plan = {
        "runs": str(profile.results.absolute() / "runs"),
        "arguments": list(arguments),
        "measuring": "|".join(MEASURING),
        "measured_first": waiting,
        "rest": f"rest-{hashlib.sha256(' '.join(waiting).encode()).hexdigest()[:12]}.json",
        "jobs": {
            name: {"needs": [job_name(profile, one) for one in needed_runs(spec)], "priority": FIRST_PRIORITY - number}
            for number, (name, spec) in enumerate(jobs.items())
        },
    }
    write_atomically(path, json.dumps(plan, indent=1) + "\n")
    return plan


def plans_of(notebooks: Iterable[Path]) -> list[str]:
    """The plans that these notebooks use, in the order of ``PLANS``.

    A notebook uses a plan when it names it as ``plans.NAME``, and a paper's when it names anything of their module.
    """
    text = "".join(path.read_text(encoding="utf-8") for path in notebooks)
    used = set(re.findall(r"\bplans\.(\w+)", text))
    modules = {getattr(getattr(plans, name, None), "__module__", None) for name in used}
    modules -= {common.__name__, plans.__name__}
    return [name for name, plan in PLANS.items() if name in used or plan.__module__ in modules]


def compute(profile: Profile, names: Sequence[str], arguments: Sequence[str], jobs: int, gpus: str = "",
            extra: Sequence[str] = ()) -> None:  # fmt: skip
    """Compute every missing run of the plans ``names``, ``jobs`` at once, by Snakemake; nothing to do starts nothing.

    Args:
        arguments: the options after the profile, for planning again.
        gpus: this machine's GPUs to hand out, one to a run, like "0,1,2,3"; "" leaves that to torch.
        extra: further options of Snakemake.

    Raises:
        StudyError: Snakemake is not installed, or a run failed.
    """
    folder = profile.results.absolute() / "fanout"
    jobs_file = folder / ".snakemake" / "jobs" / f"{profile.name}" / "jobs.json"
    plan = write_plan(jobs_file, profile, names, job_arguments(arguments))
    missing = [name for name in plan["jobs"] if not Path(plan["runs"], f"{name}.json").exists()]
    say(f"fan-out: {len(plan['jobs'])} runs, {len(plan['jobs']) - len(missing)} cached, {len(missing)} to compute")
    if not missing and "--dry-run" not in extra:
        return
    ids = [number for number in gpus.split(",") if number]
    threads = max(1, usable_cores() // jobs)
    config = {
        "profile": arguments[0], "options": shlex.join([*arguments[1:], "--plans", ",".join(names)]), "planned": True,
        "folder": str(jobs_file.parent), "python": sys.executable, "threads": threads, "gpu": int(bool(ids)),
        "gpu_ids": gpus,
    }  # fmt: skip
    settings = write_atomically(folder / "config.json", json.dumps(config, indent=1) + "\n")
    done = subprocess.run(
        [
            *snakemake(), "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder),
            "--configfile", str(settings), "--cores", str(jobs * threads), "--resources", "exclusive=1",
            f"gpu={len(ids)}", "--scheduler", "greedy", "--rerun-triggers", "mtime", "--rerun-incomplete",
            "--keep-going", "--nolock", "--quiet", "rules", "host", "reason", *extra,
        ],
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise StudyError("fan-out: not every run was made, see above; finished records are kept, run again to go on")


def usable_cores() -> int:
    """Physical cores that this process may use: one training thread each."""
    import psutil

    from lib.environment import usable_cpus

    return min(psutil.cpu_count(logical=False) or 1, usable_cpus())


def snakemake() -> list[str]:
    """How to start Snakemake: of this Python, or the command on PATH.

    Raises:
        StudyError: neither is there.
    """
    if importlib.util.find_spec("snakemake"):
        return [sys.executable, "-m", "snakemake"]
    if command := shutil.which("snakemake"):
        return [command]
    raise StudyError(f"fan-out needs Snakemake, which is not installed; {INSTALL}")


def run_on_free_gpu(ids: Sequence[str], folder: Path, arguments: Sequence[str]) -> int:
    """``python -m lib.runs`` with ``arguments`` on a GPU that no other job of this machine holds; its exit code.

    Snakemake counts GPUs but does not say which is free: each is a lock in ``folder``. Waits until one is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for number in ids:
            with contextlib.suppress(Timeout), FileLock(folder / f"gpu-{number}.lock", timeout=0):
                environment = os.environ | {"CUDA_VISIBLE_DEVICES": number}
                return subprocess.run([sys.executable, "-m", "lib.runs", *arguments], env=environment).returncode
        time.sleep(1)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m lib.fanout", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("profile", nargs="?", default="quick", help="smoke, quick, study, paper or a YAML file")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once; a run gets its share of the cores")
    parser.add_argument("--gpus", default="", metavar="0,1", help="hand out these GPUs, one to a run")
    parser.add_argument("--plans", default=None, help=f"comma-separated, of {', '.join(PLANS)} (default: all)")
    for name in PROFILE_PARAMETERS:
        kind = int if name == "seeds" else str  # 0 seeds, as in notebooks, are the profile's
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None, help="in place of the profile's")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the jobs file for Snakemake and stop")
    parser.add_argument("--dry-run", action="store_true", help="let Snakemake say what it would run")
    parser.add_argument("--on-gpu", metavar="IDS", help=argparse.SUPPRESS)
    return parser


def profile_arguments(options: argparse.Namespace) -> list[str]:
    """The options that change the profile, as a command line, paths made absolute."""
    found = [_absolute(options.profile) if options.profile.endswith((".yaml", ".yml")) else options.profile]
    for name in PROFILE_PARAMETERS:
        if value := getattr(options, name):
            if name in ("data_dir", "results"):
                value = _absolute(value)
            elif name == "tasks":
                value = ",".join(_absolute(task) if is_path(task) else task for task in value.split(","))
            found += [f"--{name.replace('_', '-')}", str(value)]
    return found


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def job_arguments(arguments: Sequence[str]) -> list[str]:
    """Of a planning command line, what ``python -m lib.runs SPEC.json`` has to know: the spec holds all the rest."""
    profile, *rest = arguments
    pairs, kept = zip(rest[::2], rest[1::2], strict=True), ("--tasks", "--results", "--data-dir")
    return ["--profile", profile, *(part for pair in pairs if pair[0] in kept for part in pair)]


def run(arguments: Sequence[str]) -> int:
    """The command line; its exit code.

    Raises:
        StudyError: whatever the user can mend.
    """
    if "--on-gpu" in arguments:
        at = list(arguments).index("--")
        ids = arguments[list(arguments).index("--on-gpu") + 1].split(",")
        return run_on_free_gpu(ids, Path(".snakemake", "gpus"), arguments[at + 1 :])
    options = _parser().parse_args(arguments)
    profile = load_profile(
        options.profile, tasks=options.tasks.split(",") if options.tasks else None,
        seeds=options.seeds or None, encoder=options.encoder, data=options.data, data_dir=options.data_dir,
        results=options.results,
    )  # fmt: skip
    names, given = options.plans.split(",") if options.plans else list(PLANS), profile_arguments(options)
    if options.write:
        write_plan(options.write, profile, names, job_arguments(given))
    elif options.jobs is None or options.jobs < 1:
        raise StudyError("give --jobs N, how many runs at once (1 or more)")
    else:
        compute(profile, names, given, options.jobs, options.gpus, ["--dry-run"] if options.dry_run else [])
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m lib.fanout``: compute the runs of all plans, several at once, by Snakemake."""
    return exit_code(lambda: run(sys.argv[1:] if arguments is None else arguments), RESUMABLE)


if __name__ == "__main__":
    sys.exit(main())
