"""Fans the study's runs out, one process a run: over cores, or over Slurm, Kubernetes and others by an executor plugin.

    ./run_all.sh study --jobs 4                                     what most people want: this, then the notebooks
    snakemake --config profile=study --executor slurm --jobs 50     see docs/scale_out.md for this and every setting

Snakemake decides what runs when and where; everything else stays with lib.runs, so records are the same as without it:
a finished record is never computed again or removed, and a run that was killed goes on from its last checkpoint.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

PYTHON = config.get("python", sys.executable)
PROFILE = str(config.get("profile", "study"))
THREADS, GPU = int(config.get("threads", 1)), int(config.get("gpu", 0))  # of one training run
GPU_IDS = str(config.get("gpu_ids", ""))  # GPUs of this machine to hand out, like 0,1,2,3; on a cluster it does that
FOLDER = Path(config.get("folder", f".snakemake/jobs/{Path(PROFILE).stem}"))
PLAN = shlex.join([PYTHON, "-m", "lib.fanout", PROFILE, *shlex.split(str(config.get("options", "")))])

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(workflow.basedir), os.environ.get("PYTHONPATH", "")]))
if workflow.is_main_process and not config.get("planned"):
    if subprocess.run(f"{PLAN} --write {shlex.quote(str(FOLDER / 'jobs.json'))}", shell=True).returncode:
        raise SystemExit(2)
FIRST = json.loads((FOLDER / "jobs.json").read_text())
REST, RUNS = FOLDER / FIRST["rest"], FIRST["runs"]
MEASURING = f"({FIRST['measuring']})-"


def job(name):
    """What the plan says of a run; runs of the second planning are known once it is done."""
    plans = [FIRST] + ([json.loads(REST.read_text())] if REST.exists() else [])
    return next(plan["jobs"][name] for plan in plans if name in plan["jobs"])


def records(names):
    """Finished runs whose age does not matter: after a git checkout, ages mean nothing."""
    return [ancient(f"{RUNS}/{name}.json") for name in names]


def rest(wildcards):
    if not FIRST["measured_first"]:
        return []
    return records(json.loads(Path(checkpoints.plan_the_rest.get().output[0]).read_text())["jobs"])


def command(wildcards, threads=None):
    few = ["env", f"OMP_NUM_THREADS={threads}"] if threads else []
    on_gpu = ["lib.fanout", "--on-gpu", GPU_IDS, "--"] if GPU_IDS and GPU else ["lib.runs"]
    return shlex.join([*few, PYTHON, "-m", *on_gpu, f"{FOLDER}/specs/{wildcards.name}.json", *FIRST["arguments"]])


def whole_machine(wildcards):
    """All cores that Snakemake may use here; a cluster has no such number."""
    try:
        return workflow.cores
    except WorkflowError:
        return int(config.get("measuring_threads", 4))


localrules: all, plan_the_rest


rule all:
    input: records(FIRST["jobs"]), rest


checkpoint plan_the_rest:
    input: records(FIRST["measured_first"])
    output: str(REST)
    priority: 10_000_000
    shell: "{PLAN} --write {output}"


rule compute:
    input: lambda wildcards: records(job(wildcards.name)["needs"])
    output: update(RUNS + "/{name}.json")
    wildcard_constraints: name=f"(?!{MEASURING})[^/]+"
    priority: lambda wildcards: job(wildcards.name)["priority"]
    threads: THREADS
    resources: gpu=GPU
    params: command=lambda wildcards, threads: command(wildcards, threads)
    shell: "{params.command}"


# Speed is measured alone: with every core of this machine, and one at a time wherever `exclusive=1` is the limit.
use rule compute as measure with:
    wildcard_constraints: name=f"{MEASURING}[^/]+"
    threads: whole_machine
    resources: gpu=GPU, exclusive=1
    params: command=lambda wildcards: command(wildcards)
