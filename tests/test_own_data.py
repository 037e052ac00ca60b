"""A user's own files as tasks: named in place of a task, or described in a profile; what is wrong is one line."""

import json
from pathlib import Path

import nbformat
import pytest
import yaml

from lib import data, execute, notebook_parameters, records, runs
from lib.config import StudyError, load_profile
from lib.data import data_digest, load_task
from lib.plans import PLANS
from lib.specs import data_source, dense_spec

TOPICS = ("sport", "politics", "weather")


@pytest.fixture(autouse=True)
def _forget_own_tasks(monkeypatch):
    """Tasks that a test registers are gone after it, with what was read of them."""
    from lib import experiments

    monkeypatch.setattr(data, "TASKS", known := dict(data.TASKS))
    for module in (experiments,):
        module._load.cache_clear()
        module._encoded.cache_clear()
    yield known


def squad(path: Path, contexts: int = 20, unanswerable: bool = False) -> Path:
    """One question for each context; every fifth one without an answer where that is asked for."""
    paragraphs = []
    for number in range(contexts):
        context = f"The mill of village {number} burnt down in {1800 + number}."
        answer = {"text": str(1800 + number), "answer_start": context.index(str(1800 + number))}
        answers = [] if unanswerable and number % 5 == 0 else [answer]
        question = {"id": f"q{number}", "question": "When did it burn?", "answers": answers}
        paragraphs.append({"context": context, "qas": [question]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"data": [{"title": "mills", "paragraphs": paragraphs}]}), encoding="utf-8")
    return path


def topics(path: Path, rows: int = 30, header: str = "text\tlabel", value: str = "") -> Path:
    lines = [header] + [f"Report number {n} is long.\t{value or TOPICS[n % 3]}" for n in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_squad_file_takes_the_place_of_the_profiles_first_task_of_its_kind(tmp_path):
    profile = load_profile("smoke", tasks=[str(squad(tmp_path / "Mills 1.json")), "world_pair"])
    assert list(profile.tasks) == ["mills_1", "world_pair"]
    assert profile.tasks["mills_1"] == load_profile("smoke").tasks["world_qa"]
    assert profile.structured_pruning.tasks == ("mills_1", "world_qa2")
    assert profile.layer_dropping.half_tasks == ("mills_1",)
    assert data_source(profile, "mills_1") == "local" and data_source(profile, "world_pair") == "embedded"
    splits = load_task("mills_1", "local")
    assert (len(splits["train"]), len(splits["validation"])) == (18, 2)
    assert not set(splits["train"]["context"]) & set(splits["validation"]["context"])
    task = data.get_task("mills_1")
    assert (task.kind, task.unanswerable) == ("qa", False)


def test_a_folder_has_its_own_validation_file_and_squad_2_is_recognised(tmp_path):
    squad(tmp_path / "mills" / "train.json", unanswerable=True)
    squad(tmp_path / "mills" / "validation.json", contexts=3)
    load_profile("smoke", tasks=[str(tmp_path / "mills")])
    assert data.get_task("mills").unanswerable
    assert len(load_task("mills", "local")["validation"]) == 3


def test_a_file_has_what_a_section_gives_the_task_whose_place_it_takes(tmp_path):
    own = str(squad(tmp_path / "own.json"))
    quick, study = (load_profile(name, tasks=[own]) for name in ("quick", "study"))
    assert quick.block_movement.score_learning_rates == {"world_qa": 0.2, "world_pair": 0.25, "own": 0.2}
    (rate,) = {spec.compressor.settings["score_learning_rate"] for spec in PLANS["block_movement"](quick)
               if spec.kind == "train" and spec.compressor and spec.compressor.name == "block_movement"}  # fmt: skip
    assert rate == 0.2
    assert study.structured_pruning.seeds == {"squad_v1": 3, "policyqa": 3, "own": 3}
    assert study.frontier.seeds == {"squad_v1": 3, "own": 3} and study.kronecker.epochs == {"squad_v1": 1, "own": 1}
    assert list(study.tasks) == list(study.own_tasks) == ["own"]
    few = load_profile("study", tasks=[own], seeds=1)
    assert few.structured_pruning.seeds == few.frontier.seeds == {}
    other = load_profile("quick", tasks=[str(topics(tmp_path / "topics.tsv"))])
    assert other.block_movement.lambda_factors == {"world_pair": 0.1, "topics": 0.1}


def test_a_task_that_stands_in_has_what_a_section_gives_one_of_its_kind():
    smoke, study = load_profile("smoke", tasks=["world_sentiment"]), load_profile("study", tasks=["stsb"])
    assert smoke.block_movement.tasks == ("world_sentiment",) and smoke.obert.other_tasks == {"world_pair": 1}
    assert smoke.block_movement.score_learning_rates == {"world_qa": 1.0, "world_pair": 0.7, "world_sentiment": 0.7}
    assert study.block_movement.lambda_factors == {"mrpc": 0.1, "sst2": 0.1, "stsb": 0.1}
    assert study.frontier.task == "stsb" and study.frontier.seeds == {"squad_v1": 3}  # of another kind
    own = load_profile("study", tasks=["mrpc"]).block_movement
    assert own.score_learning_rates == load_profile("study").block_movement.score_learning_rates


def test_a_tsv_file_has_the_labels_that_occur(tmp_path):
    profile = load_profile("smoke", tasks=[str(topics(tmp_path / "topics.tsv"))])
    task = data.get_task("topics")
    assert (task.kind, task.num_labels, task.columns) == ("classification", 3, ("sentence1",))
    assert profile.layer_dropping.grid_tasks == ("topics", "world_pair")
    train = load_task("topics", "local")["train"]
    names = [sorted(TOPICS)[label] for label in train["label"]]
    assert [name in TOPICS for name in names] == [True] * 27 and names[:3] == list(TOPICS)


def test_pairs_with_a_score_are_a_regression(tmp_path):
    path = tmp_path / "pairs.tsv"
    rows = [f"{n}\tA is {n}.\tB is {n}.\t{n % 6}" for n in range(20)]
    path.write_text("\n".join(["id\tone\tother\tscore", *rows]) + "\n", encoding="utf-8")
    load_profile("smoke", tasks=[str(path)])
    task = data.get_task("pairs")
    assert (task.kind, task.num_labels, task.columns, task.metric) == (
        "regression", 1, ("sentence1", "sentence2"), "pearson_spearman",
    )  # fmt: skip
    assert load_task("pairs", "local")["train"]["label"][:3] == [0.0, 1.0, 2.0]


def test_a_profile_describes_columns_and_files_relative_to_itself(tmp_path, profile_file):
    rows = [f"{n}\tReport {n}.\tnobody\t{TOPICS[n % 3]}" for n in range(12)]
    (tmp_path / "reports.tsv").write_text("\n".join(["nr\tbody\tauthor\ttopic", *rows]) + "\n", encoding="utf-8")
    path = profile_file()
    values = yaml.safe_load(path.read_text())
    values["own_tasks"] = {"reports": {"train": "reports.tsv", "columns": ["body"], "label": "topic"}}
    values["tasks"]["reports"] = values["tasks"]["world_sentiment"]
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    profile = load_profile(path)
    assert data.get_task("reports").num_labels == 3
    assert load_task("reports", "local")["train"][0]["sentence1"] == "Report 0."
    assert dense_spec(profile, "reports", 0).data == "local"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "absent.json", "file {folder}/absent.json does not exist"),
        (lambda folder: squad(folder / "few.json", 5), "few.json: fewer than 10 contexts; give a validation file"),
        (lambda folder: squad(folder / "rte.json"), "'rte' is a task of the study; choose another name"),
        (lambda folder: topics(folder / "a.tsv", header="text\tclass"), "a.tsv line 1: found columns text, class"),
        (lambda folder: topics(folder / "b.tsv", value="same"), "found 1 labels in column 'label', expected 2 to 100"),
        (lambda folder: topics(folder / "c.tsv", header="text\tscore"), "line 2: found score 'sport', expected a"),
        (lambda folder: (folder / "d").mkdir() or folder / "d", "folder {folder}/d has no train.json or train.tsv"),
        (lambda folder: folder / "e" / "f.csv", "f.csv is neither .json (SQuAD format) nor .tsv"),
    ],
)
def test_bad_files_are_one_line(make, said, tmp_path):
    item = str(make(tmp_path))
    with pytest.raises(StudyError) as caught:
        profile = load_profile("smoke", tasks=[item])
        load_task(next(iter(profile.tasks)), "local")
    assert said.format(folder=tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_line_makes_paths_absolute_and_keeps_them_out_of_executed_notebooks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    declared = {"inferred_type_name": "list", "help": ""}
    assert notebook_parameters.parse("tasks", '["mine.json", rte]', declared) == [str(tmp_path / "mine.json"), "rte"]
    cell = nbformat.v4.new_code_cell(f"tasks = ['{tmp_path}/mine.json']")
    made = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {}})
    parameters = {"tasks": [str(tmp_path / "mine.json"), "rte"]}
    cleaned = execute.clean(made, Path("00_x.ipynb"), tmp_path / "out" / "00_x.ipynb", parameters)
    assert cleaned.cells[0].source == "tasks = ['<tasks>']"


ABOUT_TASKS = ("dense", "contributions", "structured_qa", "obert", "block_movement", "kronecker", "frontier", "fullyqt")


@pytest.mark.parametrize("profile", ["smoke", "quick"])
@pytest.mark.parametrize("make", [lambda folder: squad(folder / "own.json"), lambda folder: topics(folder / "own.tsv")])
def test_every_plan_about_a_task_has_runs_on_the_own_file_alone(profile, make, tmp_path):
    study = load_profile(profile, tasks=[str(make(tmp_path))])
    kind = data.get_task("own").kind
    for name in set(PLANS) - {"poor_mans_bert"}:  # which measures before it plans; its tasks are those of contributions
        tasks = {spec.task for spec in PLANS[name](study) if getattr(spec, "task", None)}
        assert tasks <= {"own", *study.translation}, name
        if kind == "qa" or name not in ("structured_qa", "fullyqt"):
            assert name not in ABOUT_TASKS or "own" in tasks, name
    if kind != "qa":
        assert not PLANS["structured_qa"](study)
        only = load_profile(profile, **{"structured_pruning.tasks": [str(tmp_path / "own.tsv")]})
        assert not PLANS["structured_qa"](only)


def test_only_question_answering_is_not_replaced_by_another_kind():
    study = load_profile("smoke", tasks=["world_pair"])
    assert study.obert.task == study.frontier.task == study.block_movement.variant_task == "world_pair"
    assert study.structured_pruning.tasks == load_profile("smoke").structured_pruning.tasks
    assert study.fully_quantized.qa_task == "world_qa" and study.fully_quantized.ablation_task == "world_translation"
    both = load_profile("smoke", tasks=["world_pair", "world_qa2"])
    assert both.obert.task == "world_qa2" and both.structured_pruning.tasks == ("world_qa", "world_qa2")


def test_a_series_on_an_own_file_leaves_out_what_it_cannot_do_and_goes_on(tmp_path, capfd):
    results = str(tmp_path / "results")
    own = ["-p", "tasks", json.dumps([str(topics(tmp_path / "own.tsv", rows=60))]), "-p", "seeds", "1"]
    assert execute.main(["smoke", "--only", "02", "08", "-p", "results", results, *own]) == 0
    shown = capfd.readouterr().out
    assert "02 | this notebook is about question answering, and none of the tasks is: own" in shown
    assert "left out" in shown and not (tmp_path / "results" / "notebooks" / "02_structured_qa_pruning.ipynb").exists()
    made = [json.loads(file.read_text(encoding="utf-8"))["spec"] for file in (tmp_path / "results" / "runs").iterdir()]
    trained = [spec["task"] for spec in made if spec["kind"] == "train"]
    assert set(trained) == {"own"} and len(trained) > 10
    assert (tmp_path / "results" / "tables" / "08_recipe_table.csv").is_file()


def test_two_files_that_would_be_one_task_are_refused_and_one_file_twice_is_not(tmp_path):
    first, second = squad(tmp_path / "2023" / "tickets.json"), squad(tmp_path / "2024" / "tickets.json", contexts=30)
    with pytest.raises(StudyError) as caught:
        load_profile("smoke", tasks=[str(first), str(second)])
    assert str(caught.value).startswith(f"tasks: {first} and {second} would both be task 'tickets'; rename one of them")
    again = tmp_path / "2024" / ".." / "2023" / "tickets.json"
    assert list(load_profile("smoke", tasks=[str(first), str(again), "world_pair"]).tasks) == ["tickets", "world_pair"]


def test_a_file_that_the_profile_describes_keeps_its_description(tmp_path, profile_file):
    for name in ("reports.tsv", "held_out.tsv", "elsewhere/reports.tsv"):
        topics(tmp_path / name, header="body\ttopic")
    path = profile_file()
    values = yaml.safe_load(path.read_text())
    described = {"train": "reports.tsv", "validation": "held_out.tsv", "columns": ["body"], "label": "topic"}
    values |= {
        "own_tasks": {"reports": described},
        "tasks": values["tasks"] | {"reports": values["tasks"]["world_sentiment"]},
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    profile = load_profile(path, tasks=[str(tmp_path / "reports.tsv")])
    assert profile.own_tasks == load_profile(path).own_tasks and list(profile.tasks) == ["reports"]
    with pytest.raises(StudyError, match=r"reports\.tsv and .*elsewhere/reports\.tsv would both be task 'reports'"):
        load_profile(path, tasks=[str(tmp_path / "elsewhere" / "reports.tsv")])


def test_own_tasks_that_are_no_mapping_are_refused_with_a_file_and_without(tmp_path, profile_file):
    path = profile_file()
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"own_tasks": None}, sort_keys=False))
    with pytest.raises(StudyError, match="own_tasks: found None, expected"):
        load_profile(path, tasks=[str(topics(tmp_path / "tickets.tsv"))])
    with pytest.raises(StudyError, match="own_tasks"):
        load_profile(path)


def test_other_files_under_the_same_name_are_refused_in_one_process(tmp_path):
    load_profile("smoke", tasks=[str(squad(tmp_path / "mine.json"))])
    load_profile("smoke", tasks=[str(tmp_path / "mine.json")])
    with pytest.raises(StudyError, match="was read from other files in this process"):
        load_profile("smoke", tasks=[str(squad(tmp_path / "other" / "mine.json", contexts=30))])


def test_a_run_on_an_own_file_ends_in_a_record_that_other_contents_do_not_reuse(tmp_path, profile_file, monkeypatch):
    monkeypatch.setenv("STUDY_PROGRESS", str(tmp_path / "progress"))
    path = topics(tmp_path / "topics.tsv")
    command = ["dense", "--profile", str(profile_file(seeds=[0])), "--tasks", str(path)]
    assert runs.main(command) == 0
    (record,) = [json.loads(file.read_text()) for file in (tmp_path / "results" / "runs").iterdir()]
    assert record["spec"]["task"] == "topics" and record["spec"]["data"] == "local"
    assert record["result"]["train_examples"] == 27 and record["data"] == data_digest("topics", "local")
    assert str(tmp_path) not in json.dumps(record["spec"])
    del data.TASKS["topics"]
    topics(path, rows=40)
    profile = load_profile(command[2], tasks=[str(path)])
    with pytest.raises(StudyError, match="was made with other data"):
        records.cached(profile, dense_spec(profile, "topics", 0))
