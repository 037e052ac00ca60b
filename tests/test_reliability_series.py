"""A small series of every kind of run: killed at random moments, run twice at once, repeated, and watched.

It runs in forks of one process (``fork_server``), which refuse every connection and report every class that a pickle
asks for. ``STUDY_KILLS`` says how many random moments (10).
"""

import ast
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ENVIRONMENT, small_profile, without_timings

from lib.config import ROOT

KILLS = int(os.environ.get("STUDY_KILLS", "10"))
PLANS = ["dense", "poor_mans_bert", "structured_qa"]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


class Server:
    """Speaks to ``fork_server``; hub access is not switched off, so that only good manners keep a run offline."""

    def __init__(self, folder: Path) -> None:
        environ = {name: value for name, value in ENVIRONMENT.items() if name != "HF_HUB_OFFLINE"}
        environ |= {"STUDY_PROGRESS": str(folder / "progress"), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fork_server.py")], cwd=ROOT, env=environ, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"

    def ask(self, **request: Any) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, profile: Path, results: Path, plans: list[str] = PLANS, *more: str) -> int:
        results.mkdir(parents=True, exist_ok=True)
        arguments = [*plans, "--profile", str(profile), "--results", str(results), *more]
        return self.ask(start=arguments, log=str(results.with_suffix(".log")))

    def wait(self, child: int) -> int:
        return self.ask(wait=child)

    def run(self, profile: Path, results: Path, plans: list[str] = PLANS, *more: str) -> None:
        code = self.wait(self.start(profile, results, plans, *more))
        assert code == 0, said(results)


def said(results: Path) -> str:
    return Path(f"{results.with_suffix('.log')}.output").read_text(encoding="utf-8")


def watched(results: Path) -> str:
    """Connections that were tried and classes that pickles asked for."""
    log = results.with_suffix(".log")
    return log.read_text(encoding="utf-8") if log.exists() else ""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.process.stdin.close()  # type: ignore[union-attr]
    server.process.wait(timeout=60)


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Path:
    """Dense models, dropped layers in every order, gates, importance, distillation; a checkpoint at every step."""
    values = small_profile(Path("unused")) | {"seeds": [0]}
    values["training"] |= {"checkpoint_minutes": 1e-9, "dropout": 0.1}
    values["tasks"]["world_sentiment"] |= {"epochs": 2}
    values["tasks"]["world_qa"] = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 96, "stride": 16,
                                   "train_examples": 12, "eval_examples": 6}  # fmt: skip
    values["layer_dropping"] |= {"ablation_tasks": ["world_sentiment"]}
    values["structured_pruning"] |= {"head_densities": [], "unit_densities": []}
    path = tmp_path_factory.mktemp("profile") / "series.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def undisturbed(server, profile, tmp_path_factory) -> tuple[Path, float]:
    """The series, and the seconds that it took."""
    results, started = tmp_path_factory.mktemp("undisturbed") / "results", time.monotonic()
    server.run(profile, results)
    return results, time.monotonic() - started


def outcome(results: Path) -> dict[str, Any]:
    """Records without what time, interruptions and a commit in between change, and the weights that were kept."""
    records = {path.name: without_timings(json.loads(path.read_text())) for path in (results / "runs").glob("*.json")}
    return records | {path.parent.name: path.read_bytes() for path in (results / "models").glob("*/model.safetensors")}


def leftovers(results: Path) -> list[str]:
    unfinished = [path.name for path in (results / "checkpoints").glob("*")]
    return unfinished + [path.name for path in results.rglob(".*")]


def test_the_series_has_runs_of_every_sort_and_leaves_nothing_behind(undisturbed):
    results, _ = undisturbed
    made = outcome(results)
    assert len([name for name in made if name.endswith(".json")]) >= 15
    for part in ("contribution-", "importance-", "layer_dropping", "l0_gates", "structured", "trained"):
        assert any(part in name for name in made), part
    assert leftovers(results) == []


def until_a_checkpoint(results: Path) -> float:
    """Seconds until a run had written its first whole checkpoint."""
    started = time.monotonic()
    while not list(results.glob("checkpoints/*/*/trainer_state.json")):
        assert time.monotonic() - started < 300, said(results)
        time.sleep(0.01)
    return time.monotonic() - started


@pytest.fixture(scope="module")
def killed(server, profile, undisturbed, tmp_path_factory) -> tuple[Path, list[str]]:
    """The series killed again and again, then left to finish; where each kill struck."""
    results, moments = tmp_path_factory.mktemp("killed") / "results", list[str]()
    for number in range(KILLS):
        child, seconds = server.start(profile, results), random.uniform(0, 3 * undisturbed[1] / KILLS)
        if number == 0:  # this one in the middle of training, wherever chance puts the others
            seconds = until_a_checkpoint(results)
        else:
            time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        code = server.wait(child)
        steps = [path.name for path in (results / "checkpoints").glob("*/*")]
        moments.append(f"after {seconds:.2f} s: exit {code}, {len(list(results.glob('runs/*')))} records, {steps}")
    server.run(profile, results)
    return results, moments


def test_killed_at_random_moments_it_ends_with_the_same_records(undisturbed, killed):
    results, moments = killed
    assert any(f"exit {-signal.SIGKILL}" in moment for moment in moments), moments
    assert outcome(results) == outcome(undisturbed[0]), moments
    assert leftovers(results) == [], moments


def test_two_series_at_once_corrupt_nothing_and_one_survives_the_others_death(server, profile, undisturbed, tmp_path):
    results = tmp_path / "results"
    children = [server.start(profile, results) for _ in range(3)]
    time.sleep(undisturbed[1] / 3)
    os.kill(children[0], signal.SIGKILL)
    assert [server.wait(child) for child in children][1:] == [0, 0], said(results)
    assert outcome(results) == outcome(undisturbed[0]) and leftovers(results) == []


def test_the_same_seed_gives_identical_metrics_and_another_does_not(server, profile, undisturbed, tmp_path):
    values, two = yaml.safe_load(profile.read_text()), tmp_path / "two.yaml"
    values["tasks"]["world_sentiment"]["seeds"] = 2
    two.write_text(yaml.safe_dump(values | {"seeds": [0, 1]}, sort_keys=False), encoding="utf-8")
    server.run(two, tmp_path / "again", ["dense"])
    again, before = outcome(tmp_path / "again"), outcome(undisturbed[0])
    shared = set(again) & set(before)
    assert len([name for name in shared if name.endswith(".json")]) == 2
    assert {name: again[name] for name in shared} == {name: before[name] for name in shared}
    curves = {name[-22:-18]: made["result"]["training"]["loss"] for name, made in again.items()
              if "world_sentiment_dense" in name}  # fmt: skip
    assert len(curves) == 2 and len({json.dumps(curve) for curve in curves.values()}) == 2


CONTEXT = "The mill of Torbek burnt down in 1871."


def local_data(folder: Path) -> Path:
    question = {"question": "When did it burn?", "answers": [{"text": "1871", "answer_start": CONTEXT.index("1871")}]}
    (folder / "squad_v1").mkdir(parents=True)
    (folder / "glue" / "RTE").mkdir(parents=True)
    for split, dev in (("train", "train"), ("validation", "dev")):
        asked = [question | {"id": f"{split}{number}"} for number in range(4)]
        article = {"title": "Torbek", "paragraphs": [{"context": CONTEXT, "qas": asked}]}
        (folder / "squad_v1" / f"{split}.json").write_text(json.dumps({"data": [article]}), encoding="utf-8")
        rows = [f"{number}\tIt rains.\tIt is wet.\tentailment" for number in range(4)]
        text = "\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n"
        (folder / "glue" / "RTE" / f"{dev}.tsv").write_text(text, encoding="utf-8")
    return folder


def test_local_data_and_the_packaged_model_need_no_network(server, profile, tmp_path):
    values = yaml.safe_load(profile.read_text()) | {"encoder": "minilm", "data": "local"}
    settings = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-4, "max_length": 32}
    values["tasks"] = {"squad_v1": settings, "rte": settings}
    values["layer_dropping"] |= {"grid_tasks": ["rte"], "half_tasks": [], "ablation_tasks": []}
    path = tmp_path / "local.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    results = tmp_path / "results"
    server.run(path, results, ["dense", "contributions"], "--data-dir", str(local_data(tmp_path / "data")))
    assert len(list((results / "runs").iterdir())) == 3
    assert watched(results) == ""


def test_a_try_to_connect_would_be_seen(server, profile, tmp_path):
    values = yaml.safe_load(profile.read_text()) | {"data": "hub"}
    values["tasks"] = {"rte": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-4, "max_length": 32}}
    path = tmp_path / "hub.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    child = server.start(path, tmp_path / "results", ["dense"])
    assert server.wait(child) == 2 and "cannot be loaded" in said(tmp_path / "results")
    assert "socket." in watched(tmp_path / "results")


def test_no_connection_and_no_pickle_in_a_series_that_was_resumed(undisturbed, killed):
    resumed = [made["result"]["training"]["resumed"] for made in raw_records(killed[0]) if "training" in made["result"]]
    assert any(resumed), killed[1]
    assert watched(undisturbed[0]) == "" and watched(killed[0]) == ""


def raw_records(results: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in (results / "runs").glob("*.json")]


def test_weights_are_kept_as_safetensors_alone(undisturbed):
    kept = [path for path in (undisturbed[0] / "models").rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} <= {".safetensors", ".json", ".txt"} and len(kept) > 3


UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What loads pickles or runs code that comes with a model."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"import {name}" for name in names if name.partition(".")[0] in UNSAFE_MODULES)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.jit.load", "pd.read_pickle"):
            yield ast.unparse(node)
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            yield f"{node.arg}={ast.unparse(node.value)}"
        careful = isinstance(node, ast.keyword) and node.arg in ("weights_only", "use_safetensors")
        if careful and ast.unparse(node.value) != "True":
            yield f"{node.arg}={ast.unparse(node.value)}"


def code_of(path: Path) -> str:
    """The Python of a module, or of all code cells of a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")


@pytest.mark.parametrize(("folder", "pattern"), [("lib", "*.py"), ("docs", "*.py"), ("notebooks", "*.ipynb")])
def test_nothing_loads_a_pickle_or_runs_remote_code(folder, pattern):
    files = sorted((ROOT / folder).rglob(pattern))
    found = {path.name: list(unsafe(ast.parse(code_of(path)))) for path in files}
    assert files and {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "code", ["import pickle", "from joblib import load", "torch.load(f)", "f(trust_remote_code=True)",
             "np.load(f, allow_pickle=True)", "load(f, weights_only=False)"],
)  # fmt: skip
def test_unsafe_code_would_be_seen(code):
    assert list(unsafe(ast.parse(code)))
