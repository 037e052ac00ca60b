"""Records and the cache: stable names, nothing computed twice, nothing finished lost, one line when it goes wrong."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import record

from lib import experiments, files, plans, runs, speed_runs
from lib.compressors import CompressorSpec
from lib.config import ROOT, StudyError, load_profile
from lib.distillation import Distillation
from lib.labels import label
from lib.plans.poor_mans_bert import dropped_after, dropped_and_distilled, dropped_before
from lib.records import Record, Records, cached, older_than_start, read_record, record_path, weights_folder
from lib.runs import ensure
from lib.settings import Profile
from lib.specs import (
    ContributionSpec,
    ImportanceSpec,
    LatencyModel,
    LatencySpec,
    MajoritySpec,
    Spec,
    StockComparisonSpec,
    TrainingSpeedSpec,
    TrainSpec,
    dense_spec,
    needed_weights,
    parse_spec,
    spec_hash,
)
from lib.training import TrainingSettings

TRAINING = TrainingSettings(epochs=3, batch_size=16, learning_rate=1e-4, max_length=128)
TRAIN = TrainSpec(task="rte", data="local", encoder="minilm", seed=1, training=TRAINING)
MODEL = {"minilm": LatencyModel(architecture="minilm")}
LATENCY = LatencySpec(
    models=MODEL, dense="minilm", engines=("pytorch-fp32",), batch=1, length=128, threads=2, rounds=5
)  # fmt: skip

GAIN = ImportanceSpec(task="rte", data="local", start=TRAIN, method="gain", examples=8)


def test_hashes_are_the_names_of_committed_records():
    """If this fails, every record made so far is orphaned."""
    assert spec_hash(TRAIN) == "4ce3aec8063b" and spec_hash(LATENCY) == "95ff225de9d3"


@pytest.mark.parametrize("profile", [path.name for path in (ROOT / "results").glob("*") if (path / "runs").is_dir()])
def test_committed_records_are_whole_and_under_their_own_names(profile):
    folder = ROOT / "results" / profile / "runs"
    study = load_profile("study", results=str(ROOT / "results" / profile))
    records = {path: read_record(path) for path in folder.glob("*.json")}
    for path, found in records.items():
        assert record_path(study, found.spec) == path
    older = older_than_start({found.hash: found for found in records.values()})
    assert not [label(found.spec) for found in older], "the model that they began with was made again since"


def test_a_run_whose_start_was_made_again_is_named(profile, capsys):
    dense = dense_spec(profile, "world_sentiment", 0)
    made = [
        record(dense),
        record(dense.model_copy(update={"start": dense})),
        record(dense.model_copy(update={"seed": 1})),
    ]
    times = ["2026-01-02T00:00:00+00:00", "2026-01-01T00:00:00+00:00", "2025-01-01T00:00:00+00:00"]
    found = {r.hash: r.model_copy(update={"created": time}) for r, time in zip(made, times, strict=True)}
    assert [r.hash for r in older_than_start(found)] == [made[1].hash]
    runs._note_older(found)
    assert (
        "1 of them (world_sentiment_dense_seed0) are older than the run that they begin with" in capsys.readouterr().out
    )
    runs._note_older({made[1].hash: made[1]})
    assert not capsys.readouterr().out


def test_a_field_added_later_leaves_older_hashes_alone():
    class LaterTraining(TrainingSettings):
        momentum: float = 0.9

    class LaterSpec(TrainSpec):
        training: LaterTraining
        note: str = ""

    values = TRAIN.model_dump()
    assert spec_hash(LaterSpec(**values)) == spec_hash(TRAIN)
    assert spec_hash(LaterSpec(**values | {"note": "x"})) != spec_hash(TRAIN)
    assert spec_hash(LaterSpec(**values | {"training": values["training"] | {"momentum": 0.8}})) != spec_hash(TRAIN)


def test_everything_that_can_change_a_result_changes_the_hash():
    drop = CompressorSpec(name="layer_dropping", settings={"drop": [4]})
    changes: list[dict[str, Any]] = [
        {"seed": 2}, {"task": "cola"}, {"data": "hub"}, {"encoder": "bert-base-uncased"}, {"compressor": drop},
        {"compressor": drop.model_copy(update={"settings": {"drop": [3]}})}, {"start": TRAIN}, {"teacher": TRAIN},
        {"distillation": Distillation()}, {"distillation": Distillation(temperature=3.0)},
        {"informed_by": (TRAIN,)}, {"informed_by": (GAIN,)}, {"informed_by": (TRAIN, GAIN)},
        {"informed_by": (GAIN, TRAIN)},
    ]  # fmt: skip
    settings = {"epochs": 2, "batch_size": 8, "learning_rate": 2e-4, "max_length": 64, "dropout": 0.1, "warmup": 0.1,
                "freeze_embeddings": False, "attention": "sdpa", "precision": "fp32", "weight_decay": 0.0,
                "max_grad_norm": 2.0, "train_examples": 9, "eval_examples": 9, "stride": 8,
                "attention_dropout": 0.2}  # fmt: skip
    assert set(settings) == set(TrainingSettings.model_fields)
    changes += [{"training": TRAINING.model_copy(update={name: value})} for name, value in settings.items()]
    hashes = [spec_hash(TRAIN.model_copy(update=change)) for change in changes]
    assert len({spec_hash(TRAIN), *hashes}) == 1 + len(changes)
    changes = [{"task": "cola"}, {"data": "hub"}, {"start": TRAIN.model_copy(update={"seed": 2})},
               {"method": "leave_one_out"}, {"examples": 9}]  # fmt: skip
    assert {name for change in changes for name in change} == set(ImportanceSpec.model_fields) - {"kind"}
    assert len({spec_hash(GAIN), *(spec_hash(GAIN.model_copy(update=change)) for change in changes)}) == 6


SPECS: list[Spec] = [
    TRAIN,
    TRAIN.model_copy(update={"start": TRAIN, "distillation": Distillation(), "teacher": TRAIN}),
    TRAIN.model_copy(update={"informed_by": (TRAIN, GAIN, GAIN.model_copy(update={"method": "leave_one_out"}))}),
    GAIN,
    ContributionSpec(task="rte", data="local", encoder="minilm", max_length=64, examples=8),
    MajoritySpec(task="rte", data="local"),
    LATENCY,
    TrainingSpeedSpec(models=MODEL, dense="minilm", batch=2, length=8, threads=1, rounds=2, bf16=False),
    StockComparisonSpec(
        encoder="minilm", task="rte", data="local", examples=8, batch=2, max_length=16, rounds=2, threads=1
    ),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_a_spec_survives_json(spec):
    again = parse_spec(json.loads(json.dumps(spec.model_dump(mode="json"))))
    assert again == spec and type(again) is type(spec) and spec_hash(again) == spec_hash(spec)


@pytest.fixture
def profile(profile_file) -> Profile:
    return load_profile(profile_file())


@pytest.fixture
def plan(profile) -> list[Spec]:
    """Four runs, one of them twice."""
    first = dense_spec(profile, "world_sentiment", 0)
    return [
        first,
        dense_spec(profile, "world_sentiment", 1),
        dropped_before(profile, "world_sentiment", 0, (3, 4)),
        first,
        dropped_after(profile, "world_sentiment", 0, (4,), retrain=False),
    ]


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """Replaces the computation; lists the specs that were asked for."""
    asked: list[str] = []

    def execute(spec: Spec, profile: Profile) -> dict[str, Any]:
        asked.append(spec_hash(spec))
        return {"score": 50.0 + len(asked), "curve": [[1, 0.5]], "label": "größer"}

    monkeypatch.setattr(experiments, "execute", execute)
    return asked


def test_nothing_is_computed_twice(profile, plan, computed, capsys):
    first = ensure(plan, profile, title="toy")
    assert len(first) == 4 == len(computed) and first.missing == []
    assert "toy: 4 runs, 0 cached, 4 computed in 0:0" in capsys.readouterr().out
    second = ensure(plan, profile, title="toy")
    assert list(second) == list(first) and len(computed) == 4
    assert capsys.readouterr().out == "toy: 4 runs, 4 cached, 0 computed\n"
    assert [record.hash for record in first] == list(dict.fromkeys(spec_hash(spec) for spec in plan))
    assert [record.spec for record in first] == [plan[0], plan[1], plan[2], plan[4]]
    assert [record["score"] for record in first] == [51.0, 52.0, 53.0, 54.0]


def test_a_record_survives_reading(profile, plan, computed):
    (record,) = ensure(plan[:1], profile)
    path = record_path(profile, plan[0])
    assert read_record(path) == record and record.spec == plan[0] and record["label"] == "größer"
    assert path.name == f"train-world_sentiment_dense_seed0-{record.hash}.json"
    assert record.data and record.code and record.hardware["cpu"] and record.packages["torch"]
    text = path.read_text(encoding="utf-8")
    assert "größer" in text and text.endswith("}\n") and str(profile.results) not in text


def test_a_result_that_is_not_a_number_can_be_kept(profile, plan, monkeypatch):
    monkeypatch.setattr(experiments, "execute", lambda spec, profile: {"score": float("nan")})
    ensure(plan[:1], profile)
    assert ensure(plan[:1], profile)[0]["score"] is None


def test_a_budget_of_zero_computes_nothing_and_says_what_is_missing(profile, plan, computed, capsys):
    ensure(plan[1:2], profile)
    records = ensure(plan, profile, budget_minutes=0, title="toy")
    assert len(computed) == 1 and [record.spec for record in records] == plan[1:2]
    assert records.missing == [plan[0], plan[2], plan[4]]
    assert capsys.readouterr().out.endswith("toy: 4 runs, 1 cached, 0 computed, 3 not run yet\n")
    assert isinstance(records, Records)


def test_a_budget_finishes_the_run_that_it_started(profile, plan, computed, monkeypatch):
    clock = iter([0.0, 0.0, 0.0, 0.0, 61.0, 61.0, 61.0])
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(clock))
    records = ensure(plan, profile, budget_minutes=1)
    assert len(records) == len(computed) == 1 and len(records.missing) == 3


def test_refresh_computes_again_and_replaces(profile, plan, computed):
    ensure(plan[:2], profile)
    again = ensure(plan[:2], profile, refresh=True)
    assert [record["score"] for record in again] == [53.0, 54.0]
    assert ensure(plan[:2], profile) == again


def spoil(path: Path, how: str) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    match how:
        case "cut off":
            os.truncate(path, 100)
        case "empty":
            os.truncate(path, 0)
        case "no result":
            del values["result"]
        case "unknown key":
            values["extra"] = 1
        case "other seed":
            values["spec"]["seed"] = 5
        case "other hash":
            values["hash"] = "0" * 12
    if how not in ("cut off", "empty"):
        path.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut off", "the file: "),
        ("empty", "the file: "),
        ("no result", "result: Field required"),
        ("unknown key", "extra: Extra inputs"),
        ("other seed", "its hash does not belong to its spec"),
        ("other hash", "its hash does not belong to its spec"),
    ],
)
def test_a_corrupt_record_is_named_and_never_overwritten(profile, plan, computed, how, said):
    ensure(plan[:1], profile)
    path = record_path(profile, plan[0])
    spoil(path, how)
    before = path.read_bytes()
    with pytest.raises(StudyError) as caught:
        ensure(plan, profile)
    text = str(caught.value)
    assert text.startswith(f"corrupt record {path}: ") and said in text and "\n" not in text
    assert "restore it from version control" in text
    assert len(computed) == 1 and path.read_bytes() == before


def test_a_record_under_another_records_name_is_not_taken_for_it(profile, plan, computed):
    ensure(plan[:1], profile)
    record_path(profile, plan[0]).rename(record_path(profile, plan[1]))
    with pytest.raises(StudyError, match=f"corrupt record .*it holds run {spec_hash(plan[0])}"):
        ensure(plan[1:2], profile)


def test_records_of_other_data_stop_the_run(profile, plan, computed):
    ensure(plan[:1], profile)
    path = record_path(profile, plan[0])
    values = json.loads(path.read_text(encoding="utf-8"))
    actual = values["data"]
    path.write_text(json.dumps(values | {"data": "0" * 12}), encoding="utf-8")
    with pytest.raises(StudyError, match=rf"made with other data \(000000000000, now {actual}\).*refresh"):
        ensure(plan[:1], profile)
    assert ensure(plan[:1], profile, refresh=True)[0].data == actual


def test_records_of_local_data_are_shown_where_the_data_are_not(profile_file, computed):
    settings = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 32}
    profile = load_profile(profile_file(data="local", tasks={"rte": settings}))
    spec = dense_spec(profile, "rte", 0)
    with pytest.raises(StudyError, match="needs a data directory; set STUDY_DATA"):
        ensure([spec], profile)
    record = Record(
        hash=spec_hash(spec), spec=spec, result={"score": 1.0}, data="0" * 12, code="x", commit=None, created="now",
        seconds=1.0, hardware={}, packages={},
    )  # fmt: skip
    files.write_atomically(record_path(profile, spec), json.dumps(record.model_dump(mode="json")))
    assert ensure([spec], profile) == [record]


def test_records_of_older_code_are_used_and_counted(profile, plan, computed, capsys):
    ensure(plan[:2], profile)
    path = record_path(profile, plan[0])
    values = json.loads(path.read_text(encoding="utf-8")) | {"code": "older", "commit": "abcdef123456"}
    path.write_text(json.dumps(values), encoding="utf-8")
    capsys.readouterr()
    ensure(plan[:2], profile)
    assert "1 of them were made by earlier versions of lib/ (abcdef1); refresh" in capsys.readouterr().out


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_while_a_record_is_written_leaves_what_was_there(profile, plan, computed, monkeypatch):
    (before,) = ensure(plan[:1], profile)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full_disk)
        with pytest.raises(StudyError, match=r"disk full while writing .*json; finished records are safe"):
            ensure(plan[:2], profile)
        with pytest.raises(StudyError, match="disk full"):
            ensure(plan[:1], profile, refresh=True)
    folder = record_path(profile, plan[0]).parent
    assert [path.name for path in folder.iterdir()] == [record_path(profile, plan[0]).name]
    assert ensure(plan[:1], profile) == [before]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "model"), "disk full while writing model"),
        (OSError(errno.EROFS, "Read-only file system", "model"), "cannot write model"),
        (Exception("No space left on device (os error 28)"), "disk full"),  # as tokenizers and safetensors say it
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "disk full"),  # torch
    ],
)
def test_a_write_that_fails_while_computing_is_one_line(profile, plan, monkeypatch, error, said):
    def execute(*_: Any) -> None:
        raise error

    monkeypatch.setattr(experiments, "execute", execute)
    with pytest.raises(StudyError, match=said) as caught:
        ensure(plan, profile)
    assert "\n" not in str(caught.value) and not (profile.results / "runs").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.EBADF, "Bad file descriptor"), RuntimeError("a bug"), ValueError("another")]
)
def test_a_bug_is_not_taken_for_a_full_disk(profile, plan, monkeypatch, error):
    def execute(*_: Any) -> None:
        raise error

    monkeypatch.setattr(experiments, "execute", execute)
    with pytest.raises(type(error)) as caught:
        ensure(plan, profile)
    assert caught.value is error


def test_an_unwritable_results_folder_is_one_line_before_anything_is_computed(profile, plan, computed):
    profile.results.parent.mkdir(exist_ok=True)
    profile.results.write_text("a file where the folder should be")
    with pytest.raises(StudyError, match=r"cannot write .*give a writable results folder"):
        ensure(plan, profile)
    assert computed == []


def test_a_folder_without_permission_is_one_line(profile, plan, computed, monkeypatch):
    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkstemp", forbidden)
    with pytest.raises(StudyError, match=r"cannot write .* \(Permission denied\); give a writable results folder"):
        ensure(plan, profile)


def test_a_lock_that_cannot_be_taken_is_one_line(profile, plan, computed):
    (profile.results / "locks" / f"{spec_hash(plan[0])}.lock").mkdir(parents=True)
    with pytest.raises(StudyError, match="cannot write"):
        ensure(plan, profile)
    assert computed == []


def test_locks_are_given_back(profile, plan, computed):
    ensure(plan[:1], profile)
    lock = runs.FileLock(profile.results / "locks" / f"{spec_hash(plan[0])}.lock")
    with lock.acquire(blocking=False):
        assert lock.is_locked


COUNTING = """
import os, time
from lib.compressors import LayerDropping

class Counting(LayerDropping):
    name = "counting"

    def attach(self, model):
        with open(os.environ["COUNT_FILE"], "a") as file:
            file.write("computed\\n")
        time.sleep(3)  # long enough for the other process to arrive
        super().attach(model)
"""


def test_two_processes_that_want_the_same_run_make_it_once(tmp_path, profile_file):
    (tmp_path / "counting.py").write_text(COUNTING)
    path = profile_file()
    compressor = CompressorSpec(name="counting:Counting", settings={"drop": [2]})
    spec = dense_spec(load_profile(path), "world_sentiment", 0).model_copy(update={"compressor": compressor})
    (tmp_path / "spec.json").write_text(json.dumps(spec.model_dump(mode="json")))
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path), "COUNT_FILE": str(tmp_path / "count"), "OMP_NUM_THREADS": "1",
        "STUDY_ALLOCATOR": "default",
    }  # fmt: skip
    command = [sys.executable, "-m", "lib.runs", str(tmp_path / "spec.json"), "--profile", str(path)]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert (tmp_path / "count").read_text() == "computed\n"
    (only,) = (tmp_path / "results" / "runs").iterdir()
    assert read_record(only)["compression"]["dropped_layers"] == [2]


def test_two_that_miss_the_same_weights_train_them_once(profile, monkeypatch):
    spec = dense_spec(profile, "world_sentiment", 0)
    started, go_on = threading.Event(), threading.Event()
    trained: list[str] = []

    def train(spec: TrainSpec, profile: Profile, keep_weights: bool) -> dict[str, float]:
        assert keep_weights
        trained.append(spec_hash(spec))
        started.set()
        assert go_on.wait(30)
        weights_folder(profile, spec).mkdir(parents=True)
        return {"score": 50.0}

    monkeypatch.setattr(experiments, "run_training", train)
    monkeypatch.setattr(experiments, "load_compressed", lambda folder: folder)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(experiments.finished_model, profile, spec)
        assert started.wait(30)
        second = pool.submit(experiments.finished_model, profile, spec)
        time.sleep(0.3)  # what trains without a lock would be in the list by now
        assert trained == [spec_hash(spec)] and not second.done()
        go_on.set()
        assert first.result(30) == second.result(30) == weights_folder(profile, spec)
    assert trained == [spec_hash(spec)]


def test_a_model_trained_to_begin_with_leaves_its_record(profile, monkeypatch):
    """What was trained for the sake of another run is a finished run itself: asking for it later trains nothing."""
    dense = dense_spec(profile, "world_sentiment", 0)
    drop = CompressorSpec(name="layer_dropping", settings={"drop": [2]})
    ensure([dense.model_copy(update={"start": dense, "compressor": drop})], profile)
    monkeypatch.setattr(experiments, "run_training", lambda *_, **__: pytest.fail("trained twice"))
    (record,) = ensure([dense], profile)
    assert record.spec == dense and record["training"]["steps"] and record.seconds > 0


def test_weights_without_a_record_are_trained_again_for_it(profile):
    """A run that was killed between its weights and its record: another run's start is a finished run all the same."""
    dense = dense_spec(profile, "world_sentiment", 0)
    experiments.finished_model(profile, dense)
    before = read_record(record_path(profile, dense))
    record_path(profile, dense).unlink()
    experiments.finished_model(profile, dense)
    assert read_record(record_path(profile, dense))["score"] == before["score"]


def test_a_record_names_the_weights_that_its_run_began_with(profile):
    """Two records compare one model with another only where they name the same weights."""
    dense = dense_spec(profile, "world_sentiment", 0)
    child = dense.model_copy(update={"start": dense, "training": dense.training.model_copy(update={"epochs": 0})})
    record_of_dense, record_of_child = ensure([dense, child], profile)
    (weights,) = weights_folder(profile, dense).glob("*.safetensors")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    assert record_of_dense.weights == {} and record_of_child.weights == {record_of_dense.hash: digest}
    assert read_record(record_path(profile, child)).weights == record_of_child.weights


@pytest.mark.parametrize("points", [-5.0, -1.0, 1.0, 5.0])
def test_weights_trained_again_must_be_the_recorded_model(profile, monkeypatch, points):
    """A record that travelled without its weights: retraining may round differently, but not end elsewhere."""
    spec = dense_spec(profile, "world_sentiment", 0)
    (record,) = ensure([spec], profile)
    folder = weights_folder(profile, spec)
    shutil.rmtree(folder)

    def train(spec: TrainSpec, profile: Profile, keep_weights: bool) -> dict[str, float]:
        folder.mkdir(parents=True)
        return {"score": record["score"] + points}

    monkeypatch.setattr(experiments, "run_training", train)
    monkeypatch.setattr(experiments, "load_compressed", lambda folder: folder)
    if abs(points) < runs.SAME_MODEL:
        assert experiments.finished_model(profile, spec) == folder
        return
    with pytest.raises(StudyError, match=r"world_sentiment_dense_seed0: .* trained again: score .*its record says"):
        experiments.finished_model(profile, spec)
    assert not folder.exists() and cached(profile, spec) is not None


@pytest.mark.parametrize(
    ("recorded", "found", "same"),
    [
        ({"accuracy": 40.0, "loss": 3.0}, {"accuracy": 41.5, "loss": 9.0}, True),
        ({"accuracy": 40.0}, {"accuracy": 37.0}, False),
        ({"after": {"hidden": 0.5, "embedding": 2.0}}, {"after": {"hidden": 0.51, "embedding": 1.95}}, True),
        ({"after": {"hidden": 0.5, "embedding": 2.0}}, {"after": {"hidden": 0.5, "embedding": 2.2}}, False),
    ],
)
def test_models_without_a_task_are_told_apart(profile, monkeypatch, tmp_path, recorded, found, same):
    """Language models by their accuracy in points, first stages by each loss as a share."""
    spec = dense_spec(profile, "world_sentiment", 0)
    monkeypatch.setattr(runs, "cached", lambda *_: record(spec, **recorded))
    weights = tmp_path / "weights"
    weights.mkdir()
    if same:
        runs._same_as_recorded(profile, spec, found, weights)
    else:
        with pytest.raises(StudyError, match="its weights were missing and were trained again"):
            runs._same_as_recorded(profile, spec, found, weights)
    assert weights.exists() == same


def test_weights_are_not_trained_while_their_record_is_computed(profile, monkeypatch):
    """The lock is the run's own: whoever computes the record of a dense model keeps its weights too."""
    spec = dense_spec(profile, "world_sentiment", 0)
    monkeypatch.setattr(experiments, "run_training", lambda *_, **__: pytest.fail("trained a second time"))
    monkeypatch.setattr(experiments, "load_compressed", lambda folder: folder)
    with ThreadPoolExecutor(1) as pool, runs.hold_lock(profile, spec):
        waiting = pool.submit(experiments.finished_model, profile, spec)
        time.sleep(0.3)
        assert not waiting.done()
        weights_folder(profile, spec).mkdir(parents=True)
        finished = record(spec, score=1.0).model_dump(mode="json")
        files.write_atomically(record_path(profile, spec), json.dumps(finished))
    assert waiting.result(30) == weights_folder(profile, spec)


def test_training_speed_takes_a_spec_that_was_written_out_in_full(monkeypatch):
    monkeypatch.setattr(speed_runs.training_speed, "training_steps", lambda models, *_: models)
    dropped = {"full": LatencyModel(architecture="tiny"), "half": LatencyModel(architecture="tiny", drop=(3, 4))}
    spec = TrainingSpeedSpec(models=dropped, dense="full", batch=2, length=8, threads=1, rounds=2, bf16=False)
    written = parse_spec(json.loads(json.dumps(spec.model_dump(mode="json"))))
    assert isinstance(written, TrainingSpeedSpec)
    assert speed_runs.run_training_speed(written) == speed_runs.run_training_speed(spec) == {
        "full": {"architecture": "tiny", "drop": [], "head": "qa"},
        "half": {"architecture": "tiny", "drop": [3, 4], "head": "qa"},
    }  # fmt: skip
    cut = spec.model_copy(update={"models": dropped | {"cut": LatencyModel(architecture="tiny", shapes=((1, 2),) * 4)}})
    with pytest.raises(StudyError, match="'cut' is more than a model with layers dropped"):
        speed_runs.run_training_speed(cut)


def test_stopping_while_a_model_is_evaluated_does_not_lose_its_training(profile_file, monkeypatch):
    profile = load_profile(profile_file(**{"training.checkpoint_minutes": 1e-9}))
    spec = dense_spec(profile, "world_sentiment", 0)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiments, "evaluate_model", stop)
        with pytest.raises(KeyboardInterrupt):
            ensure([spec], profile)
    (record,) = ensure([spec], profile)
    assert record["training"]["resumed"] == record["training"]["steps"] - 1 == 3
    assert list((profile.results / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("name", ["smoke", "study"])
def test_weights_that_other_planned_runs_begin_with_are_kept(name, tmp_path):
    """Otherwise a model whose record is there would be trained a second time, for whatever begins with it."""
    profile = load_profile(name, seeds=2, results=str(tmp_path))
    plan = {spec_hash(spec): spec for what in plans.PLANS for spec in plans.make_plan(what, profile, 0.0)}
    begun_with = [other for spec in plan.values() for other in needed_weights(spec)]
    planned = [other for other in begun_with if isinstance(other, TrainSpec) and spec_hash(other) in plan]
    compressed = {other.compressor.name for other in planned if other.compressor}
    assert compressed >= {"layer_dropping", "obert", "structured", "kronecker", "block_movement"}
    lost = {label(other) for other in planned if not experiments._worth_keeping(other, profile)}
    assert not lost


def test_a_distilled_run_end_to_end(profile):
    """The real thing once: a teacher is trained, kept, and used by the student; sizes and scores are recorded."""
    spec = dropped_and_distilled(profile, "world_sentiment", 0, (2, 3))
    teacher = dense_spec(profile, "world_sentiment", 0)
    student, dense = ensure([spec, teacher], profile)
    assert student["model"]["layers"] == 2 and dense["model"]["layers"] == 4
    assert student["model"]["parameters"] < dense["model"]["parameters"]
    assert 0 <= student["score"] <= 100 and student["training"]["steps"] == 4
    assert weights_folder(profile, teacher).is_dir()
    assert not weights_folder(profile, spec).exists()
    untrained = dropped_after(profile, "world_sentiment", 0, (1,), retrain=False)
    (record,) = ensure([untrained], profile)
    assert "training" not in record.result and record["model"]["layers"] == 3


def cli(capsys, *arguments: str) -> tuple[int, str, str]:
    code = runs.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_list_computes_nothing(profile_file, profile, computed, capsys):
    path = profile_file()
    code, out, _ = cli(capsys, "dense", "--profile", path, "--list")
    name = record_path(profile, dense_spec(profile, "world_sentiment", 0)).name
    assert (code, out) == (0, f"missing {name}\n")
    assert cli(capsys, "dense", "--profile", path)[0] == 0
    assert cli(capsys, "dense", "dense", "--profile", path, "--list")[:2] == (0, f"cached  {name}\n")
    assert cli(capsys, "poor_mans_bert", "--profile", path, "--list")[0] == 0
    assert len(computed) == 1


def test_only_the_runs_that_match_are_computed(profile_file, profile, computed, capsys):
    path = profile_file(**{"tasks.world_sentiment.seeds": 2})
    second = dense_spec(profile, "world_sentiment", 1)
    assert cli(capsys, "dense", "--profile", path, "--only", "*seed1*")[0] == 0
    assert computed == [spec_hash(second)]
    code, _, err = cli(capsys, "dense", "--profile", path, "--only", "*seed9*")
    assert code == 2 and err == "error: --only '*seed9*' matches none of 2 runs; --list prints their names\n"


def test_a_spec_file_is_computed(profile_file, profile, computed, capsys, tmp_path):
    spec = dense_spec(profile, "world_sentiment", 1)
    (tmp_path / "spec.json").write_text(json.dumps(spec.model_dump(mode="json")))
    assert cli(capsys, tmp_path / "spec.json", "--profile", profile_file())[0] == 0
    assert computed == [spec_hash(spec)] and record_path(profile, spec).exists()


def test_ctrl_c_keeps_finished_runs(profile_file, profile, monkeypatch, capsys):
    def execute(spec: Any, profile: Profile) -> dict[str, Any]:
        if spec.seed:
            raise KeyboardInterrupt
        return {"score": 1.0}

    monkeypatch.setattr(experiments, "execute", execute)
    path = profile_file(**{"tasks.world_sentiment.seeds": 2})
    code, _, err = cli(capsys, "dense", "--profile", path)
    assert code == 130 and err.splitlines()[-1].startswith("interrupted; finished runs are kept")
    assert len(list((profile.results / "runs").iterdir())) == 1


SPEC = TRAIN.model_dump(mode="json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON (Expecting property name"),
        ("[]", "the file"),
        ("{}", "the file: Unable to extract tag using discriminator 'kind'"),
        (json.dumps(SPEC | {"kind": "trian"}), "'trian'"),
        (json.dumps(SPEC | {"seed": -1}), "train.seed: Input should be greater than or equal to 0, found -1"),
        (json.dumps(SPEC | {"sede": 1}), "train.sede: Extra inputs are not permitted"),
        (json.dumps(SPEC | {"task": "rteee"}), "unknown task 'rteee'; allowed: squad_v1"),
        (json.dumps(SPEC | {"task": "multi30k"}), "task 'multi30k' is translation"),
        (json.dumps(SPEC | {"compressor": {"name": "nope"}, "task": "world_pair", "encoder": "tiny-bert"}),
         "unknown compressor 'nope'"),
        (json.dumps(LATENCY.model_dump(mode="json") | {"dense": "x"}), "dense model 'x' is not among minilm"),
        (json.dumps(LATENCY.model_dump(mode="json") | {"models": {"minilm": {"architecture": "x"}}}),
         "'x' is no architecture; known: bert-base-uncased"),
        (json.dumps(LATENCY.model_dump(mode="json") | {"engines": ["warp"]}), "warp"),
    ],
)  # fmt: skip
def test_a_bad_spec_file_is_one_line(profile_file, capsys, tmp_path, monkeypatch, content, said):
    monkeypatch.setenv("STUDY_PROGRESS", str(tmp_path / "progress"))
    (tmp_path / "spec.json").write_text(content)
    code, _, err = cli(capsys, tmp_path / "spec.json", "--profile", profile_file())
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err, err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dnese"], "'dnese' is neither a plan ("),
        (["dense", "--profile", "quik"], "unknown profile 'quik'"),
        (["dense", "--colour"], "unrecognized arguments: --colour"),
        (["dense", "--budget-minutes", "soon"], "argument --budget-minutes: invalid float value: 'soon'"),
        ([], "the following arguments are required: what"),
        (["dense", "--profile", "smoke", "--tasks", "rte"], "tasks: 'rte' has no settings in smoke.yaml"),
        (["dense", "--profile", "smoke", "--data-dir", "/no/such"], "data directory /no/such does not exist"),
        ([str(ROOT)], "is neither a plan"),
    ],
)
def test_a_bad_command_line_is_one_line(capsys, arguments, said):
    code, out, err = cli(capsys, *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_a_teacher_of_another_vocabulary_is_refused(monkeypatch, profile):
    """Its ids are other words: a crash on a GPU, or, worse, none."""
    spec = dense_spec(profile, "world_sentiment", 0)
    taught = spec.model_copy(update={"teacher": spec, "distillation": Distillation()})
    model, tokenizer = experiments.load_model("tiny-bert", "classification", 2), experiments.load_tokenizer("tiny-bert")
    other = experiments.load_tokenizer("tiny-bert")
    other.add_tokens(["anotherword"])
    monkeypatch.setattr(experiments, "finished_model", lambda *_: (model, other))
    with pytest.raises(StudyError, match="has another vocabulary than 'tiny-bert'"):
        experiments._distiller(taught, profile, model, tokenizer)
    monkeypatch.setattr(experiments, "finished_model", lambda *_: (model, experiments.load_tokenizer("tiny-bert")))
    assert experiments._distiller(taught, profile, model, tokenizer) is not None
