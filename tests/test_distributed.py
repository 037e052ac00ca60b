"""One run on two processes: the record of one process, written once, spoken of once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import small_profile

from lib import distributed, runs
from lib.config import ROOT, StudyError, load_profile
from lib.plans.kronecker import text_stage
from lib.plans.obert import language_model
from lib.specs import spec_hash
from lib.text_distillation import run_text_distillation
from lib.upstream import run_upstream

TOLERANCE = 1e-4  # gradients are summed in another order


def on_two_processes(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m lib.runs`` by torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port",
               str(port), "-m", "lib.runs", *arguments]  # fmt: skip
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "STUDY_ALLOCATOR": "default"},
    )  # fmt: skip


def written(folder: Path, epochs: float) -> Path:
    """A small profile of one seed, whose results are in ``folder / "two"``."""
    values = small_profile(folder / "two") | {"seeds": [0]}
    values["tasks"]["world_sentiment"] |= {"epochs": epochs}
    profile = folder / "two.yaml"
    profile.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return profile


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Folder of a run by torchrun, its finished process, and the profile that it used."""
    folder = tmp_path_factory.mktemp("distributed")
    profile = written(folder, epochs=3)
    return folder, on_two_processes("dense", "--profile", str(profile)), profile


def only_record(results: Path) -> dict:
    (path,) = (results / "runs").iterdir()
    return json.loads(path.read_text(encoding="utf-8"))


def test_one_process_writes_and_speaks(two_processes):
    folder, done, _ = two_processes
    assert done.returncode == 0, done.stderr
    assert done.stdout == "dense: 1 runs, 0 cached, 1 computed in " + done.stdout.rpartition(" ")[2]
    assert done.stderr.count("run 1 of 1") == 1
    assert only_record(folder / "two")["hardware"]["processes"] == 2
    assert len(list((folder / "two" / "models").iterdir())) == 1
    assert not [path for path in (folder / "two").rglob(".*")]


def test_the_result_is_that_of_one_process(two_processes, tmp_path):
    folder, _, profile = two_processes
    assert runs.main(["dense", "--profile", str(profile), "--results", str(tmp_path / "one")]) == 0
    one, two = only_record(tmp_path / "one"), only_record(folder / "two")
    assert one["hash"] == two["hash"]
    alike = ("steps", "examples", "tokens")
    assert [one["result"]["training"][k] for k in alike] == [two["result"]["training"][k] for k in alike]
    losses = [[loss for _, loss in record["result"]["training"]["loss"]] for record in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) > 5
    folders = [next((results / "models").iterdir()) for results in (tmp_path / "one", folder / "two")]
    weights = [load(path / "model.safetensors") for path in folders]
    assert weights[0].keys() == weights[1].keys()
    worst = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    assert 0 < worst < TOLERANCE


def load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_language_models_and_first_stages_are_saved_by_one_process(tmp_path):
    """The pruned language model begins with the dense one, whose weights both processes then read."""
    study = load_profile(written(tmp_path, epochs=1))
    specs = [language_model(study), language_model(study, 0.8), text_stage(study, "kron8")]
    files = [tmp_path / f"{number}.json" for number in range(len(specs))]
    for file, spec in zip(files, specs, strict=True):
        file.write_text(json.dumps(spec.model_dump(mode="json")), encoding="utf-8")
    done = on_two_processes(*map(str, files), "--profile", str(tmp_path / "two.yaml"))
    assert done.returncode == 0, done.stderr
    models = tmp_path / "two" / "models"
    assert sorted(path.name for path in models.iterdir()) == sorted(map(spec_hash, specs))
    assert all((path / "config.json").is_file() for path in models.iterdir())
    assert len(list((tmp_path / "two" / "runs").iterdir())) == 3


def test_a_process_that_is_not_the_first_saves_nothing(tmp_path, monkeypatch):
    study = load_profile(written(tmp_path, epochs=1))
    half_saved = tmp_path / "two" / "models" / f".saving-{spec_hash(language_model(study))}-of-the-first"
    half_saved.mkdir(parents=True)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    run_upstream(language_model(study), study)
    run_text_distillation(text_stage(study, "kron8"), study)
    assert list(half_saved.parent.iterdir()) == [half_saved]


def test_a_batch_that_cannot_be_shared_is_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(StudyError, match="batch_size 16 cannot be shared by 3 processes"):
        distributed.share_of(16)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert distributed.share_of(16) == 4


def test_alone_nothing_is_started():
    assert distributed.agree(True) and not distributed.agree(False) and distributed.description() == {}
    distributed.check_equal([torch.ones(2)], "alone")
    distributed.leave()
    assert not torch.distributed.is_initialized()
