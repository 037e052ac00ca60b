"""Loading: every local format and its quirks, every bad file as one clear line, the hub's columns, subsets, digests."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from lib import data
from lib.config import StudyError
from lib.data import TASKS, data_digest, load_task

CONTEXT = 'The mill of Torbek burnt down in 1871. Its owner, "Old" Anna Krell, built it up again.'
GLUE_FILES = {
    "SST-2": 'sentence\tlabel\na fine film \t1\na "dull one \t0\n',
    "MRPC": '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said " yes .\tHe agreed .\n'
    "0\t9\t10\tOne .\tTwo .\n",
    "RTE": "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n"
    "1\tIt snows.\tIt is hot.\tnot_entailment\n",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    "0\tg\tf\ty\t1\ts\ts\tA cat sits.\tA cat is sitting.\t4.750\n1\tg\tf\ty\t2\ts\ts\tA cat.\tA car.\t0.0\n",
    "CoLA": "x01\t1\t\tThe door opened.\nx01\t0\t*\tDoor the opened.\n",
    "QNLI": "index\tquestion\tsentence\tlabel\n0\tWho?\tShe did.\tentailment\n1\tWhy?\tAt noon.\tnot_entailment\n",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tHow?\tHow so?\t1\n"
    "1\t3\tbroken off\n2\t5\t6\tA?\tB?\t0\n",
    "MNLI": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tIt rains.\tIt is wet.\tx\tentailment\n"
    "1\tIt rains.\tIt is dry.\tx\tcontradiction\n",
}
NAMES = {"sst2": "SST-2", "mrpc": "MRPC", "rte": "RTE", "stsb": "STS-B", "cola": "CoLA", "qnli": "QNLI", "qqp": "QQP"}


def question(name: str, text: str | None, context: str = CONTEXT) -> dict[str, Any]:
    answers = [] if text is None else [{"text": text, "answer_start": context.index(text)}]
    return {"id": name, "question": f"What about {name}?", "answers": answers, "is_impossible": text is None}


def squad(*questions: dict[str, Any]) -> dict[str, Any]:
    return {"version": "x", "data": [{"title": "Torbek", "paragraphs": [{"context": CONTEXT, "qas": list(questions)}]}]}


def write_squad(folder: Path, content: dict[str, Any] | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{split}.json").write_text(text, encoding="utf-8")


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A data directory with a small, correct copy of every local format."""
    write_squad(tmp_path / "squad_v1", squad(question("a", "1871"), question("b", "Anna Krell")))
    write_squad(tmp_path / "squad_v2", squad(question("a", "1871"), question("b", None)))
    for name, text in GLUE_FILES.items():
        folder = tmp_path / "glue" / name
        folder.mkdir(parents=True)
        for file in ("train.tsv", "dev_matched.tsv" if name == "MNLI" else "dev.tsv"):
            (folder / file).write_text(text, encoding="utf-8")
    (tmp_path / "multi30k").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "multi30k" / f"{split}.en").write_text("A dog runs.\nTwo\u2028men wait.\n", encoding="utf-8")
        (tmp_path / "multi30k" / f"{split}.de").write_text("Ein Hund läuft.\nZwei Männer warten.\n", encoding="utf-8")
    return tmp_path


def fails(*expected: str, task: str, folder: Path | None, source: str = "local") -> None:
    """Loading raises one line that contains all of ``expected``."""
    with pytest.raises(StudyError) as caught:
        load_task(task, source, folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message, f"{part!r} not in {message!r}"


def test_squad_rows(local: Path) -> None:
    splits = load_task("squad_v1", "local", local)
    assert set(splits) == {"train", "validation"}
    row = splits["train"][1]
    assert row["id"] == "b" and row["title"] == "Torbek" and row["context"] == CONTEXT
    assert row["answers"] == {"text": ["Anna Krell"], "answer_start": [CONTEXT.index("Anna")]}
    unanswerable = load_task("squad_v2", "local", local)["validation"][1]
    assert unanswerable["answers"] == {"text": [], "answer_start": []}


@pytest.mark.parametrize(("name", "folder"), NAMES.items())
def test_glue_columns(local: Path, name: str, folder: str) -> None:
    rows = load_task(name, "local", local)["validation"]
    assert rows.column_names == ["idx", *TASKS[name].columns, "label"]
    assert rows["idx"][:] == [0, 1]


def test_glue_quirks(local: Path) -> None:
    def column(task: str, name: str) -> list[Any]:
        return load_task(task, "local", local)["train"][name][:]

    assert column("sst2", "sentence1") == ["a fine film ", 'a "dull one ']
    assert column("mrpc", "sentence1") == ['He said " yes .', "One ."] and column("mrpc", "label") == [1, 0]
    assert column("cola", "sentence1") == ["The door opened.", "Door the opened."] and column("cola", "label") == [1, 0]
    assert column("rte", "label") == [0, 1]
    assert column("stsb", "label") == [4.75, 0.0]
    assert column("qqp", "sentence2") == ["How so?", "B?"]
    assert column("mnli", "label") == [0, 2]


def test_parallel_text_splits_at_line_feeds_only(local: Path) -> None:
    splits = load_task("multi30k", "local", local)
    assert set(splits) == {"train", "validation", "test"}
    assert splits["test"][1] == {"source": "Two\u2028men wait.", "target": "Zwei Männer warten."}


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.embedded])
def test_world_tasks_ignore_the_source(name: str) -> None:
    splits = load_task(name, "hub", train_examples=5, eval_examples=3)
    assert [len(splits[split]) for split in splits] == [5, *[3] * (len(splits) - 1)]
    columns = {"qa": data.QA_FEATURES, "translation": ("source", "target")}
    expected = list(columns.get(TASKS[name].kind, ("idx", *TASKS[name].columns, "label")))
    assert splits["train"].column_names == expected


def test_subsets_are_fixed_and_nested() -> None:
    small = load_task("world_sentiment", "embedded", train_examples=20)["train"]["idx"][:]
    large = load_task("world_sentiment", "embedded", train_examples=50)["train"]["idx"][:]
    assert large[:20] == small and sorted(large) != large
    assert len(load_task("world_sentiment", "embedded", train_examples=10**6)["train"]) == 1500


def test_digest_follows_the_bytes(local: Path) -> None:
    before = data_digest("rte", "local", local)
    assert len(before) == 12 and before == data_digest("rte", "local", local)
    with (local / "glue/RTE/dev.tsv").open("a", encoding="utf-8") as file:
        file.write("2\tIt is late.\tIt is night.\tentailment\n")
    assert data_digest("rte", "local", local) != before
    assert data_digest("world_qa", "hub") == data_digest("world_qa", "local", local)
    assert data_digest("world_qa", "hub") != data_digest("world_qa2", "hub")


def test_missing_folders_and_files(local: Path, tmp_path: Path) -> None:
    fails("unknown task 'squad'", "squad_v1", task="squad", folder=local)
    fails("data directory", "STUDY_DATA", task="squad_v1", folder=None)
    fails(str(local / "nowhere"), "does not exist", task="squad_v1", folder=local / "nowhere")
    (tmp_path / "empty").mkdir()
    fails("is empty", "squad_v1", task="squad_v1", folder=tmp_path / "empty")
    fails("policyqa", "does not exist", "train.json", task="policyqa", folder=local)
    (local / "glue/RTE/dev.tsv").unlink()
    fails("dev.tsv", "does not exist", task="rte", folder=local)
    fails("data source 'embedded'", "world_", task="rte", folder=local, source="embedded")
    fails("data source 'web'", task="rte", folder=local, source="web")


def test_bad_squad(local: Path) -> None:
    def broken(content: dict[str, Any] | str, *expected: str, task: str = "squad_v1") -> None:
        write_squad(local / task, content)
        fails("train.json", *expected, task=task, folder=local)

    text = json.dumps(squad(question("a", "1871")), indent=1)
    broken(text[: len(text) // 2], "not valid JSON", "line ")
    broken("", "not valid JSON")
    broken("[]", "'data'")
    broken('{"data": 5}', "'data'")
    broken({"data": []}, "no questions")
    broken({"data": [{"title": "Torbek"}]}, "article 0 ('Torbek')", "paragraphs")
    broken({"data": ["Torbek"]}, "article 0", "wrong structure")
    broken(squad(question("a", "1871"), question("a", "1871")), "'a' occurs twice")
    broken(squad(question("q7", None)), "question 'q7' has no answer", "squad_v2")
    broken(squad({**question("q8", "1871"), "question": None}), "'q8'", "not a text")
    shifted = question("q9", "Anna Krell")
    shifted["answers"][0]["answer_start"] += 1
    broken(squad(shifted), "question 'q9'", "'Anna Krell'", "'nna Krell,'", "answer_start")
    broken(squad(shifted), "question 'q9'", task="squad_v2")
    for start in (-4, 10**6):
        shifted["answers"][0]["answer_start"] = start
        broken(squad(shifted), "question 'q9'", str(start))
    shifted["answers"][0]["answer_start"] = "late"
    broken(squad(shifted), "article 0 ('Torbek')", "late")
    (local / "squad_v1/train.json").write_bytes(b'{"data":\n "\xff"}')
    fails("train.json line 2", "UTF-8", task="squad_v1", folder=local)


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("rte", "", ("the file is empty",)),
        ("rte", "index\tsentence1\tsentence2\tlabel\n", ("no examples",)),
        ("rte", "index\tsentence1\tlabel\n0\tIt rains.\tentailment\n", ("line 1", "'sentence2'")),
        ("rte", GLUE_FILES["RTE"] + "2\tIt rains.\tIt is wet.\n", ("line 4", "3 columns", "expected 4")),
        ("rte", GLUE_FILES["RTE"] + "2\tIt rains.\tIt is wet.\tmaybe\n", ("line 4", "'maybe'", "not_entailment")),
        ("rte", GLUE_FILES["RTE"] + "2\tIt rains.\tIt is\twet.\tentailment\n", ("line 4", "5 columns", "expected 4")),
        ("sst2", GLUE_FILES["SST-2"] + "fine \tgood\n", ("line 4", "'good'", "0, 1")),
        ("sst2", GLUE_FILES["SST-2"] + "fine \t2\n", ("line 4", "'2'")),
        ("cola", GLUE_FILES["CoLA"] + "x01\t1\n", ("line 3", "2 columns", "expected 4")),
        ("stsb", GLUE_FILES["STS-B"].replace("4.750", "high"), ("line 2", "'high'", "0 to 5")),
        ("stsb", GLUE_FILES["STS-B"].replace("4.750", "5.5"), ("line 2", "'5.5'")),
        ("stsb", GLUE_FILES["STS-B"].replace("4.750", "nan"), ("line 2", "'nan'")),
    ],
)
def test_bad_glue(local: Path, task: str, text: str, expected: tuple[str, ...]) -> None:
    (local / "glue" / NAMES[task] / "dev.tsv").write_text(text, encoding="utf-8")
    fails("dev.tsv", *expected, task=task, folder=local)


def test_bad_parallel_text(local: Path) -> None:
    file = local / "multi30k/validation.de"
    file.write_text("Ein Hund läuft.\n", encoding="utf-8")
    fails("validation.en has 2 lines", "validation.de has 1", task="multi30k", folder=local)
    file.write_text("Ein Hund läuft.\n\n", encoding="utf-8")
    fails("validation.de line 2", "empty", task="multi30k", folder=local)
    file.write_text("", encoding="utf-8")
    fails("validation.de", "empty", task="multi30k", folder=local)


def test_hub_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    qa = {"id": "1", "title": "T", "context": CONTEXT, "question": "When?", "answers": {"text": [], "answer_start": []}}
    rows: dict[str, dict[str, Any]] = {
        "rajpurkar/squad_v2": {"train": qa, "validation": qa},
        "mnli": {
            split: {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0, "idx": 4}
            for split in ("train", "validation_matched", "validation_mismatched")
        },
        "wmt/wmt14": {split: {"translation": {"de": "Ja.", "en": "Yes."}} for split in ("train", "validation", "test")},
        "bentrevett/multi30k": {split: {"en": "Yes.", "de": "Ja."} for split in ("train", "validation", "test")},
    }

    def load(path: str, name: str | None) -> DatasetDict:
        found = rows.get(path) or rows[str(name)]
        return DatasetDict({split: Dataset.from_list([row]) for split, row in found.items()})

    monkeypatch.setattr(data, "load_dataset", load)
    assert load_task("squad_v2", "hub")["validation"][0] == qa
    mnli = load_task("mnli", "hub")
    assert set(mnli) == {"train", "validation"}
    assert mnli["train"][0] == {"idx": 4, "sentence1": "It rains.", "sentence2": "It is wet.", "label": 0}
    for task in ("wmt14", "multi30k"):
        assert load_task(task, "hub")["test"][0] == {"source": "Yes.", "target": "Ja."}
    rows["mnli"].pop("validation_matched")
    fails("expected 'validation_matched'", task="mnli", folder=None, source="hub")
    rows["rajpurkar/squad_v2"]["train"] = {"id": "1"}
    fails("expected 'title'", task="squad_v2", folder=None, source="hub")


def test_hub_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ConnectionError("no route\nto host")

    for function in ("load_dataset", "load_dataset_builder"):
        monkeypatch.setattr(data, function, refuse)
    fails("rajpurkar/squad", "no route", "STUDY_DATA", "quick", task="squad_v1", folder=None, source="hub")
    with pytest.raises(StudyError, match="STUDY_DATA"):
        data_digest("squad_v1", "hub")


def test_hub_offline_for_real() -> None:
    fails("nyu-mll/glue", "STUDY_DATA", task="rte", folder=None, source="hub")
