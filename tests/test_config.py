"""Profiles: complete, validated, with a clear precedence; every mistake is one line that names file, key and remedy."""

import re
from pathlib import Path

import pytest

from lib import config, experiments, plans
from lib.config import ROOT, StudyError, load_profile
from lib.data import TASKS
from lib.engines import ENGINES


def message(*arguments, **overrides) -> str:
    with pytest.raises(StudyError) as caught:
        load_profile(*arguments, **overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", config.PROFILES)
def test_a_shipped_profile_is_complete(name):
    profile = load_profile(name)
    assert profile.name == name and profile.results == ROOT / "results" / name
    assert set(profile.tasks) <= set(TASKS) and set(profile.latency.engines) <= set(ENGINES)
    dropping = profile.layer_dropping
    assert set(dropping.grid_tasks) | set(dropping.ablation_tasks) <= set(profile.tasks)
    assert all(settings.max_length > settings.stride + 8 for settings in profile.tasks.values())
    assert [profile.task_seeds(task) for task in profile.tasks] == [
        profile.seeds[: settings.seeds] for settings in profile.tasks.values()
    ]
    text = (ROOT / "config" / f"{name}.yaml").read_text(encoding="utf-8")
    for field in ("encoder", "data", "seeds", "training", "tasks", "latency", "layer_dropping"):
        assert re.search(rf"^{field}:", text, re.MULTILINE), f"{name}.yaml leaves {field} to a default"


def test_profiles_that_need_no_network_take_their_data_from_the_corpus():
    for name in ("smoke", "quick"):
        profile = load_profile(name)
        assert profile.data == "embedded" and all(TASKS[task].embedded for task in profile.tasks)


def test_unknown_profile_lists_the_known_ones(tmp_path):
    assert message("quik") == (
        "unknown profile 'quik'; allowed: smoke, quick, study, paper, or the path of a YAML file"
    )
    assert "does not exist" in message(tmp_path / "mine.yaml") and str(tmp_path) in message(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encodr": "minilm"}, ("tiny.yaml", "unknown key 'encodr'", "correct its spelling")),
        ({"training.dropuot": 0.1}, ("tiny.yaml", "unknown key 'training.dropuot' in training")),
        ({"training.dropout": "much"}, ("tiny.yaml", "training.dropout", "valid number", "'much'")),
        ({"training.dropout": 1.5}, ("tiny.yaml", "training.dropout", "less than 1", "1.5")),
        ({"training.attention": "flash"}, ("tiny.yaml", "training.attention", "'eager' or 'sdpa'", "'flash'")),
        ({"data": "internet"}, ("tiny.yaml", "data", "'embedded', 'local' or 'hub'", "'internet'")),
        ({"encoder": None}, ("tiny.yaml", "encoder", "required")),
        ({"seeds": []}, ("tiny.yaml", "seeds", "at least 1")),
        ({"seeds": [0, -3]}, ("tiny.yaml", "seeds", "-3", "0 or more")),
        ({"tasks": 3}, ("tiny.yaml", "tasks", "dictionary", "3")),
        ({"tasks.world_sentiment.batch_size": 0}, ("tiny.yaml", "tasks.world_sentiment.batch_size", "greater than 0")),
        ({"tasks.world_sentiment.stride": 30}, ("tiny.yaml", "tasks.world_sentiment.stride", "30", "max_length")),
        ({"tasks.world_sentiment.seeds": 3}, ("tiny.yaml", "tasks.world_sentiment.seeds", "3", "only 2 listed")),
        ({"layer_dropping.strategies": ["tpo"]}, ("layer_dropping.strategies.0", "'top', 'bottom'", "'tpo'")),
        ({"layer_dropping.k": [0]}, ("tiny.yaml", "layer_dropping.k.0", "greater than 0", "found 0")),
        ({"structured_pruning.head_densities": [0.0]}, ("structured_pruning.head_densities.0", "greater than 0")),
        ({"structured_pruning.unit_densities": [0.5, 1.0]}, ("structured_pruning.unit_densities.1", "less than 1")),
        ({"structured_pruning.embedding_densities": ["few"]}, ("embedding_densities.0", "valid number", "'few'")),
        ({"structured_pruning.operating_points": [[0.5, 1.5]]}, ("operating_points.0.1", "less than 1", "1.5")),
        ({"structured_pruning.operating_points": [[0.5]]}, ("operating_points.0.1", "required")),
        ({"structured_pruning.speed_points": [[1.0, 1.1]]}, ("speed_points.0.1", "less than or equal to 1", "1.1")),
        ({"structured_pruning.tasks": []}, ("structured_pruning.tasks", "at least 1")),
        ({"structured_pruning.seeds": {"world_qa": 0}}, ("structured_pruning.seeds.world_qa", "greater than 0", "0")),
        ({"structured_pruning.seeds": {"world_qa": 3}}, ("structured_pruning.seeds.world_qa", "3", "only 2 listed")),
        ({"frontier.seeds": {"world_qa": 3}}, ("frontier.seeds.world_qa", "3", "only 2 listed")),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_line(profile_file, changes, said):
    text = message(profile_file(**changes))
    assert not [part for part in said if part not in text], text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"seeds: [0\nencoder: x\n", "line 2: not valid YAML"),
        (b"- a list\n", "expected 'key: value' lines, found a list"),
        (b"encoder: \xff\n", "cannot be read"),
        (b"", "found a NoneType"),
    ],
)
def test_a_file_that_is_no_profile(tmp_path, content, said):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    text = message(path)
    assert said in text and "mine.yaml" in text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"colour": "red"}, ("unknown setting 'colour'", "encoder", "layer_dropping")),
        ({"training.dropuot": 0.1}, ("unknown key 'training.dropuot'",)),
        ({"tasks.rte.epochs": 1}, ("unknown setting 'tasks.rte.epochs'",)),
        ({"encoder.size": 1}, ("unknown setting 'encoder.size'",)),
        ({"tasks": ["world_qa"]}, ("'world_qa' has no settings in tiny.yaml", "it has world_sentiment")),
        ({"seeds": -1}, ("seeds: found -1", "1 or more")),
        ({"seeds": [0, -1]}, ("seeds: found -1", "0 or more")),
        ({"data_dir": "/no/such/folder"}, ("data directory /no/such/folder does not exist", "STUDY_DATA")),
    ],
)
def test_a_mistake_in_an_override_is_one_line(profile_file, overrides, said):
    text = message(profile_file(), **overrides)
    assert not [part for part in said if part not in text], text


@pytest.mark.parametrize("tasks", [{"world_sentiment": 1}, None])
def test_overriding_tasks_of_a_profile_without_any_is_one_line(profile_file, tasks):
    assert "expected the settings of each task" in message(profile_file(tasks=tasks), seeds=2)


def test_an_unknown_task_is_named_before_anything_runs(profile_file):
    settings = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 32}
    profile = load_profile(profile_file(tasks={"sst3": settings}))
    with pytest.raises(StudyError, match=r"unknown task 'sst3'; allowed: squad_v1"):
        plans.dense(profile)


def test_dropping_as_many_layers_as_there_are_is_impossible(profile_file):
    profile = load_profile(profile_file(**{"layer_dropping.k": [2, 4]}))
    with pytest.raises(StudyError, match=r"layer_dropping.k: K=4 is impossible, tiny-bert has 4 layers"):
        plans.layer_sets(profile, [0.9, 0.8, 0.7, 0.6])


@pytest.mark.parametrize("budget", [None, 0.0])
def test_an_impossible_k_is_reported_before_contributions_are_measured(profile_file, monkeypatch, budget):
    monkeypatch.setattr(experiments, "execute", lambda *_: pytest.fail("something was measured"))
    profile = load_profile(profile_file(**{"layer_dropping.k": [4]}))
    with pytest.raises(StudyError, match=r"layer_dropping.k: K=4 is impossible, tiny-bert has 4 layers"):
        plans.make_plan("poor_mans_bert", profile, budget)
    with pytest.raises(StudyError, match=r"K=4 is impossible"):
        plans.contributions(profile)
    (only,) = plans.contributions(load_profile(profile_file(**{"layer_dropping.k": [3]})))
    assert only.kind == "contribution"


def test_precedence_is_override_then_environment_then_file(profile_file, tmp_path, monkeypatch):
    folders = {name: tmp_path / name for name in ("file", "environment", "override")}
    for folder in folders.values():
        folder.mkdir()
    path = profile_file(data_dir=str(folders["file"]))
    assert load_profile(path).data_dir == folders["file"]
    monkeypatch.setenv("STUDY_DATA", str(folders["environment"]))
    assert load_profile(path).data_dir == folders["environment"]
    assert load_profile(path, data_dir=str(folders["override"])).data_dir == folders["override"]
    assert load_profile(path, data_dir="", tasks=[]).data_dir == folders["environment"]
    monkeypatch.setenv("STUDY_DATA", str(tmp_path / "gone"))
    assert f"data directory {tmp_path / 'gone'} does not exist" in message(path)


def test_overrides_reach_inside_and_paths_become_absolute(profile_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile = load_profile(profile_file(), results="elsewhere", seeds=3, **{"training.dropout": 0.2})
    assert profile.results == tmp_path / "elsewhere" and profile.training.dropout == 0.2
    assert profile.task_seeds("world_sentiment") == (0, 1, 2)
    assert list(load_profile("study", tasks=["rte", "cola"]).tasks) == ["rte", "cola"]
    assert load_profile("study", seeds=[7]).task_seeds("rte") == (7,)


def test_a_profile_cannot_be_changed_by_accident(profile_file):
    profile = load_profile(profile_file())
    with pytest.raises(ValueError, match="frozen"):
        profile.encoder = "minilm"
    assert isinstance(profile.results, Path)
