"""Every kind of bad input in one table: each mistake as a user makes it, through the real command line.

Each ends with exit code 2 and one line that says what, where and what to do, without a traceback. Whatever was finished
before stays as it was, and nothing half-made is left.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, run_module, small_profile
from transformers import AutoModelForQuestionAnswering

from lib import files, models, plans, runs
from lib.config import load_profile
from lib.plans import fullyqt

SETTINGS = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 32}
CONTEXT = "The mill of Torbek burnt down in 1871."
FILES = {
    "squad_v1": ("squad_v1/train.json", "squad_v1/validation.json"),
    "rte": ("glue/RTE/train.tsv", "glue/RTE/dev.tsv"),
}
RTE = "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n"


@dataclass
class User:
    """Somebody with a folder, finished runs in it, and a profile to change."""

    folder: Path
    write: Callable[..., Path]
    patch: pytest.MonkeyPatch

    def plan(self, name: str, *options: Any, **changes: Any) -> list[str]:
        """Arguments for a plan of a changed profile."""
        return [name, "--profile", str(self.write(**changes)), *map(str, options)]

    def dense(self, *options: Any, **changes: Any) -> list[str]:
        return self.plan("dense", *options, **changes)

    def dense_spec(self, **changes: Any) -> dict[str, Any]:
        """The spec of the changed profile's first dense run; the unchanged one's is finished."""
        return plans.dense(load_profile(self.write(**changes)))[0].model_dump(mode="json")

    def data(self, task: str, content: str = "") -> list[str]:
        """The dense run of ``task`` on a data directory whose files of that task, if any, have this content."""
        for file in FILES[task] if content else ():
            path = self.folder / "data" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        return self.dense("--data-dir", self.folder / "data", data="local", tasks={task: SETTINGS})

    def spec(self, changes: dict[str, Any] | None = None, /, **profile: Any) -> list[str]:
        """The spec of a dense run, changed, in a file of its own."""
        values = self.dense_spec(**profile) | (changes or {})
        return self.plan(self.file("spec.json", json.dumps(values)), **profile)

    def compress(self, name: str, epochs: float = 1, /, **settings: Any) -> list[str]:
        """Compression of the dense run of the profile, already finished."""
        dense = self.dense_spec()
        training = dense["training"] | {"epochs": epochs}
        return self.spec({"start": dense, "training": training, "compressor": {"name": name, "settings": settings}})

    def translation(self, **settings: Any) -> list[str]:
        """A quantised translation model."""
        profile = load_profile(self.write())
        spec = fullyqt.dense_translation(profile, profile.fully_quantized.tasks[0], 0)
        values = spec.model_dump(mode="json") | {"compressor": {"name": "quantization", "settings": settings}}
        return self.plan(self.file("spec.json", json.dumps(values)))

    def xlnet(self) -> str:
        """A folder with a model whose layers have none of the parts that pruning needs."""
        folder = self.folder / "xlnet"
        AutoModelForQuestionAnswering.from_config(SMALL["xlnet"]).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            shutil.copy(models.packaged_minilm_dir() / name, folder)
        return str(folder)

    def file(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return str(path)


def squad(answer_start: int) -> str:
    """A SQuAD file with one question."""
    answer = {"text": "1871", "answer_start": answer_start}
    question = {"id": "a", "question": "When did it burn?", "answers": [answer]}
    return json.dumps({"data": [{"title": "Torbek", "paragraphs": [{"context": CONTEXT, "qas": [question]}]}]})


def empty_folder(user: User) -> list[str]:
    (user.folder / "data").mkdir()
    return user.data("squad_v1")


def without_weights(user: User) -> list[str]:
    (user.folder / "model").mkdir()
    (user.folder / "model" / "config.json").write_text('{"model_type": "bert"}')
    return user.dense(encoder=str(user.folder / "model"))


def wrong_checksum(user: User) -> list[str]:
    (user.folder / "package").mkdir()
    (user.folder / "package" / "config.json").write_text("{}")
    (user.folder / "package" / "model.safetensors").write_bytes(b"other weights")
    user.patch.setattr(models, "packaged_minilm_dir", lambda: user.folder / "package")
    return user.dense(encoder="minilm")


def corrupt_record(user: User) -> list[str]:
    for record in (user.folder / "results" / "runs").iterdir():
        os.truncate(record, 200)
    return user.dense()


def full_disk(user: User) -> list[str]:
    def fsync(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    user.patch.setattr(files.os, "fsync", fsync)
    return user.dense(seeds=[7])


def unwritable(user: User) -> list[str]:
    (user.folder / "file").write_text("no folder")
    return user.dense("--results", user.folder / "file" / "results")


def below_the_current_sparsity(user: User, **changes: Any) -> list[str]:
    """Dense weights, pruned to 80 % by one run, are asked for at 50 % by the next, or for what ``changes`` say."""
    settings = {"sparsity": 0.8, "importance": "magnitude", "prune_at": []}
    dense = user.dense_spec()
    compressor = {"name": "obert", "settings": settings}
    pruned = dense | {"compressor": compressor, "training": dense["training"] | {"epochs": 0}}
    return user.spec(
        pruned | {"start": pruned, "compressor": compressor | {"settings": settings | {"sparsity": 0.5} | changes}}
    )


def own_file(name: str, text: str) -> Callable[[User], list[str]]:
    """A data file of the user's own as the task."""

    def arguments(user: User) -> list[str]:
        path = user.folder / name
        if text:
            path.write_text(text, encoding="utf-8")
        return ["dense", "--profile", "smoke", "--results", str(user.folder / "results"), "--tasks", str(path)]

    return arguments


CASES: dict[str, tuple[Callable[[User], list[str]], tuple[str, ...]]] = {
    # Profiles and the command line
    "unknown profile": (lambda user: ["dense", "--profile", "quik"], ("unknown profile 'quik'", "smoke, quick, study")),
    "unknown key": (lambda user: user.dense(encodr="minilm"), ("tiny.yaml", "unknown key 'encodr'", "spelling")),
    "wrong type": (lambda user: user.dense(**{"training.dropout": "much"}), ("training.dropout", "number", "'much'")),
    "negative seed": (lambda user: user.dense(seeds=[0, -3]), ("tiny.yaml", "seeds", "-3", "0 or more")),
    "K as large as the model": (
        lambda user: user.plan("poor_mans_bert", **{"layer_dropping.k": [4]}), ("K=4 is impossible", "has 4 layers"),
    ),
    "layer named twice": (
        lambda user: user.compress("layer_dropping", drop=[2, 2]), ("drop [2, 2] names a layer twice",),
    ),
    "frontier task that is not run": (
        lambda user: user.plan("frontier", **{"frontier.task": "sqaud_v1"}), ("task 'sqaud_v1' is not among those",),
    ),
    "unknown plan": (lambda user: ["dens"], ("'dens' is neither a plan (", "nor a file")),
    "spec that is no JSON": (
        lambda user: [user.file("spec.json", "{")], ("spec.json cannot be read as JSON",),
    ),
    "unknown key in a spec": (lambda user: user.spec({"sed": 1}), ("spec.json", "sed")),
    # Data
    "missing data directory": (lambda user: user.data("squad_v1"), ("data directory", "does not exist", "STUDY_DATA")),
    "empty data directory": (empty_folder, ("data directory", "is empty", "squad_v1, glue")),
    "missing file": (
        lambda user: (user.data("rte", RTE), user.data("squad_v1"))[1], ("squad_v1 does not exist", "train.json"),
    ),
    "truncated JSON": (
        lambda user: user.data("squad_v1", squad(CONTEXT.index("1871"))[:-20]),
        ("train.json line 1: not valid JSON", "fetch it again"),
    ),
    "answer outside its context": (
        lambda user: user.data("squad_v1", squad(900)),
        ("train.json: question 'a'", "answer_start 900", "expected the answer '1871'"),
    ),
    "TSV row of too few columns": (
        lambda user: user.data("rte", RTE + "1\tIt snows.\n"), ("train.tsv line 3: found 2 columns, expected 4",),
    ),
    "unknown label": (
        lambda user: user.data("rte", RTE + "1\tA.\tB.\tmaybe\n"), ("train.tsv line 3: found label 'maybe'",),
    ),
    "own file that is missing": (own_file("mine.json", ""), ("mine.json does not exist",)),
    "own file of another kind": (own_file("mine.csv", "a,b"), ("mine.csv is neither .json (SQuAD format) nor .tsv",)),
    "own file without a label": (own_file("mine.tsv", "text\tclass\nA.\tb\n"), ("mine.tsv line 1", "text, class")),
    # Models and the hub
    "data hub unreachable": (
        lambda user: user.dense(data="hub", tasks={"rte": SETTINGS}), ("cannot be loaded", "STUDY_DATA"),
    ),
    "model hub unreachable": (
        lambda user: user.dense(encoder="nobody/no-such-model"),
        ("'nobody/no-such-model' could not be loaded", "offline, use encoder=minilm"),
    ),
    "model folder without weights": (without_weights, ("has no model.safetensors",)),
    "weights with a wrong checksum": (wrong_checksum, ("sha256", "expected", "reinstall")),
    # Records and the disk
    "corrupt record": (corrupt_record, ("corrupt record",)),
    "full disk": (full_disk, ("disk full while writing", "finished records are safe")),
    "no place to write": (unwritable, ("cannot write", "give a writable results folder")),
    # Structured pruning
    "impossible density": (
        lambda user: user.compress("l0_gates", densities={"heads": 1.5}),
        ("density 1.5 for heads is impossible", "more than 0, less than 1"),
    ),
    "penalty that closes everything": (
        lambda user: user.compress("l0_gates", 5, penalties={"heads": 500.0, "units": 0.0}, learning_rate=9.0),
        ("penalty 500 closed all 16 heads at", "give a smaller one, or a density"),
    ),
    "model without heads to gate": (
        lambda user: user.spec(
            {"encoder": (folder := user.xlnet()), "compressor": {"name": "l0_gates", "settings": {"densities": {
                "heads": 0.5}}}}, encoder=folder,
        ),
        ("XLNetLayer has no query/key/value/FFN linear maps", "use BERT"),
    ),
    # oBERT
    "blocks of the Fisher matrix that do not divide": (
        lambda user: user.compress("obert", sparsity=0.8, group=4, width=10), ("groups of 4 do not divide width 10",),
    ),
    "dampening too small for the gradients": (
        lambda user: user.compress(
            "obert", sparsity=0.5, dampening=1e-16, width=2, gradients=8, gradient_batch=4, prune_at=[],
            precision="float32",
        ),
        ("dampening 1e-16 is too small for these gradients",),
    ),
    "sparsity below the current one": (below_the_current_sparsity, ("sparsity 0.5 is below the current one of 0.8",)),
    "first step below the current sparsity": (
        lambda user: below_the_current_sparsity(user, prune_at=[0.2, 0.4], first_step=0.5, sparsity=0.9),
        ("the first step to 0.5 is below the current sparsity of 0.8",),
    ),
    "fewer examples than gradients need": (
        lambda user: user.compress("obert", sparsity=0.5, gradients=50, gradient_batch=4, prune_at=[]),
        ("50 gradients of 4 examples each, but there are 32 training examples",),
    ),
    # Block movement pruning
    "block that does not divide a matrix": (
        lambda user: user.compress("block_movement", block=[5, 4]), ("a block of 5 × 4 does not divide a matrix of",),
    ),
    "everything pruned": (
        lambda user: user.compress("block_movement", 5, block=[4, 4], final_lambda=1e4, score_learning_rate=3.0),
        ("block is pruned at", "of training; lower final_la"),
    ),
    "threshold out of range": (
        lambda user: user.compress("block_movement", final_threshold=0.5), ("setting final_threshold", "less than 0.5"),
    ),
    # FullyQT
    "bits out of range": (lambda user: user.translation(bits=9), ("bits: found 9, expected 2 to 8",)),
    "calibration on too little data": (
        lambda user: user.translation(bits=8, calibration_batches=50, calibration_batch_size=32),
        ("50 batches of 32 examples, there are 64 examples",),
    ),
    # KroneckerBERT
    "factors that do not divide": (
        lambda user: user.compress("kronecker", attention=[5, 8], ffn=[2, 8], embedding=4),
        ("a first factor of 8 × 5 does not divide",),
    ),
}  # fmt: skip

NOTEBOOKS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown profile": (["quik"], ("unknown profile 'quik'; allowed: smoke, quick, study, paper",)),
    "misspelt parameter": (
        ["smoke", "-p", "buget_minutes", "3"], ("unknown parameter 'buget_minutes'", "budget_minutes"),
    ),
    "parameter of a wrong type": (["smoke", "-p", "seeds", "two"], ("parameter 'seeds': found 'two', expected int",)),
    "no such notebook": (["smoke", "--only", "99"], ("no notebook '99'",)),
}  # fmt: skip

FROM_INSIDE: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "impossible K": (
        ["smoke", "--only", "05", "-p", "k", "[4]", "-p", "tasks", "[world_sentiment]"],
        ("K=4 is impossible, tiny-bert has 4 layers",),
    ),
    "negative number of seeds": (
        ["smoke", "--only", "05", "-p", "seeds", "-1"], ("seeds: found -1, expected how many seeds (1 or more)",),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The results folder of a profile whose dense runs are finished."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(small_profile(folder / "results")), encoding="utf-8")  # JSON is YAML
    assert runs.main(["dense", "--profile", str(path)]) == 0
    return folder / "results"


def contents(results: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (results / "runs").iterdir()}


def check(code: int, error: str, said: tuple[str, ...]) -> None:
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error, error
    assert not [part for part in said if part not in error], error


@pytest.fixture
def user(tmp_path, profile_file, monkeypatch, finished) -> User:
    shutil.copytree(finished, tmp_path / "results")
    monkeypatch.setenv("STUDY_PROGRESS", str(tmp_path / "progress"))
    return User(tmp_path, profile_file, monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line_and_nothing_lost(case, user, capsys):
    make, said = CASES[case]
    arguments = make(user)
    before = contents(user.folder / "results")
    capsys.readouterr()
    code = runs.main(arguments)
    check(code, capsys.readouterr().err, said)
    assert contents(user.folder / "results").items() >= before.items()  # a finished start leaves its own record too


@pytest.mark.parametrize("case", NOTEBOOKS | FROM_INSIDE)
def test_the_notebooks_command_says_it_too(case, tmp_path):
    arguments, said = (NOTEBOOKS | FROM_INSIDE)[case]
    code, out, error = run_module(
        "lib.execute", *arguments, "-p", "results", tmp_path / "results", progress=tmp_path / "progress"
    )
    check(code, error, said)
    if case in NOTEBOOKS:  # refused before anything starts
        assert out == "" and not (tmp_path / "results").exists()
    assert not list(tmp_path.glob("results/runs/*"))
    assert all(path.name.endswith(".failed.ipynb") for path in tmp_path.glob("results/notebooks/*"))


def test_the_data_directory_of_the_environment_is_named(user):
    """In a process of its own, with everything that comes before ``main``."""
    arguments = user.data("squad_v1", squad(900))[:3]
    code, _, error = run_module(
        "lib.runs", *arguments, progress=user.folder / "progress", STUDY_DATA=str(user.folder / "data")
    )
    check(code, error, ("answer_start 900",))
