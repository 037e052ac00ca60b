"""run_all.sh on machines that lack something, and the files that describe the environment."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from lib.config import ROOT

needs_bash = pytest.mark.skipif(os.name != "posix" or not shutil.which("bash"), reason="needs bash")

TELL = "import json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\nsys.exit(7 * ('fail' in sys.argv))\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in a folder with a space, with nothing to install, whose lib.execute tells how it was called."""
    root = tmp_path / "a study"
    (root / "lib").mkdir(parents=True)
    for name in ("run_all.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    (root / "requirements.lock").write_text("# nothing\n", encoding="utf-8")
    (root / "lib" / "__init__.py").touch()
    (root / "lib" / "config.py").write_text(f"ROOT = {str(root.resolve())!r}\n", encoding="utf-8")
    (root / "lib" / "execute.py").write_text(TELL, encoding="utf-8")
    return root


def clean_environment(root: Path, **extra: str) -> dict[str, str]:
    """No active environment, no settings of pip or of the study; lib is found through PYTHONPATH."""
    drop = ("PIP_", "MALLOC_", "HF_", "STUDY_", "OMP_", "CONDA", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    base = str(Path(sys.base_prefix) / "bin")
    path = os.pathsep.join([base, "/usr/bin", "/bin"])
    return kept | {"PATH": path, "PYTHONPATH": str(root), "PIP_CONFIG_FILE": os.devnull} | extra


def start(root: Path, *arguments: str, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(root / "run_all.sh"), *arguments],
        cwd=cwd or root.parent,
        env=clean_environment(root, **extra),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The error, after checking that it is the only one and that the exit code says bad input."""
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.stderr
    return errors[0]


@needs_bash
def test_help_and_unknown_profile_need_nothing_installed(checkout):
    result = start(checkout, "--help", PATH="/usr/bin:/bin")
    assert result.returncode == 0 and result.stdout.startswith("Usage: ./run_all.sh [PROFILE]")
    error = one_line(start(checkout, "quik"))
    assert "unknown profile 'quik'; allowed: smoke, quick, study, paper" in error
    assert not (checkout / ".venv").exists()


@needs_bash
def test_first_run_makes_an_environment_and_the_second_reuses_it(checkout):
    first = start(checkout, "study", "-p", "seeds", "2")
    assert first.returncode == 0, first.stderr
    assert "[1/3] Python: making .venv" in first.stdout and "[2/3] Packages: installing" in first.stdout
    arguments, environment = json.loads(first.stdout.splitlines()[-1])
    assert arguments == ["study", "-p", "seeds", "2"]
    assert "HF_HUB_OFFLINE" not in environment
    if sys.platform == "linux":
        assert environment["MALLOC_MMAP_THRESHOLD_"] == "4294967296"
        assert environment["MALLOC_TRIM_THRESHOLD_"] == "8589934592"
        assert environment["MALLOC_TOP_PAD_"] == "268435456"

    second = start(checkout, MALLOC_TOP_PAD_="1")
    assert "[1/3] Python: .venv\n[2/3] Packages: present\n[3/3] Notebooks: profile quick\n" in second.stdout
    arguments, environment = json.loads(second.stdout.splitlines()[-1])
    assert arguments == ["quick"]
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["MALLOC_TOP_PAD_"] == "1"

    (checkout / "requirements.lock").write_text("# changed\n", encoding="utf-8")
    third = start(checkout, "smoke", "--", "fail", cwd=checkout / "lib")
    assert "[2/3] Packages: installing" in third.stdout
    assert third.returncode == 7 and json.loads(third.stdout.splitlines()[-1])[0] == ["smoke", "fail"]


@needs_bash
def test_an_active_environment_that_lacks_packages_is_named_and_not_used(checkout, tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    path = f"{bare / 'bin'}:{Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin"
    result = start(checkout, "smoke", VIRTUAL_ENV=str(bare), PATH=path)
    assert "the active environment is not used: packag" in result.stdout
    assert "[1/3] Python: making .venv" in result.stdout and result.returncode == 0


@needs_bash
def test_no_suitable_python(checkout, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "uname", "basename"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    old = tools / "python3"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")  # what a Python 3.9 answers to the version check
    old.chmod(0o755)
    assert "no Python 3.11, 3.12 or 3.13 found" in one_line(start(checkout, PATH=str(tools)))


@needs_bash
@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_checkout(checkout):
    checkout.chmod(0o555)
    try:
        assert "cannot write to" in one_line(start(checkout))
    finally:
        checkout.chmod(0o755)


@needs_bash
def test_no_network_and_a_missing_package(checkout):
    """pip says which of the two it is only when it was allowed to retry."""
    (checkout / "requirements.lock").write_text("no-such-package-here==1.0\n", encoding="utf-8")
    unreachable = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    error = one_line(start(checkout, **unreachable))
    assert "pip cannot reach its package index" in error and ".venv/install.log" in error
    result = start(checkout, PIP_NO_INDEX="1")
    assert "or it lacks the package above" in one_line(result)
    assert "no-such-package-here" in result.stderr
    assert not (checkout / ".venv" / ".study-lock").exists()


@needs_bash
def test_ctrl_c_while_installing(checkout):
    (checkout / "requirements.lock").write_text("no-such-package-here==1.0\n", encoding="utf-8")
    slow = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "20"}
    process = subprocess.Popen(
        ["bash", str(checkout / "run_all.sh")],
        env=clean_environment(checkout, **slow),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell that started the tests in the background made every child ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = checkout / ".venv" / "install.log"
    limit = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "interrupted; run the same command again to go on"


def lock_lines() -> list[str]:
    return [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]


def test_the_lock_pins_everything_exactly_and_brings_no_cuda():
    for line in lock_lines():
        assert re.match(r"^[a-z0-9-]+==[^ ;]+( ; .+)?$", line), line
        assert not line.startswith(("nvidia-", "triton", "cuda-")), line


def test_the_lock_satisfies_pyproject_and_is_satisfied_here():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {need.name: need for need in map(Requirement, lock_lines())}
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        wanted = Requirement(line)
        pin = str(pins[wanted.name].specifier).removeprefix("==")
        assert wanted.specifier.contains(pin), f"{wanted} but the lock has {pin}"
        assert wanted.specifier.contains(metadata.version(wanted.name), prereleases=True), wanted


def test_conda_installs_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, rest = environment["dependencies"]
    assert pip == "pip" and rest == {"pip": ["-r requirements.lock", "-e ."]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert python == f"python{project['requires-python']}"


def test_every_lib_module_ships_and_so_do_the_published_numbers():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "lib").rglob("*.py")}
    assert folders == set(setup["packages"])
    data = {path.relative_to(ROOT / "lib") for path in (ROOT / "lib").rglob("*.csv")}
    assert data and all(any(path.match(glob) for glob in setup["package-data"]["lib"]) for path in data)


def test_licence_and_citation():
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License\n")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["license"] == project["license"] and citation["version"] == project["version"]
    assert len(citation["references"]) == 6


@needs_bash
@pytest.mark.parametrize("script", ["run_all.sh", ".ci/run"])
def test_scripts_are_executable_and_parse(script):
    path = ROOT / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(path)], check=True)


def test_results_of_small_profiles_are_ignored_and_the_studys_kept():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")

    def ignored(path: str) -> bool:
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0

    for path in (
        "results/quick/runs/a.json",
        "results/smoke/figures/a.pdf",
        "results/study/notebooks/05_x.failed.ipynb",
    ):
        assert ignored(path), path
    for path in ("results/study/runs/a.json", "results/study/notebooks/05_x.ipynb", "lib/published_numbers/a.csv"):
        assert not ignored(path), path
