"""Plans fit the machine and the user: no run that cannot be made, no encoder or task that stops a series."""

import pytest

from lib import engines, environment, models, notebook, plans
from lib.config import load_profile
from lib.plans.common import timed_architecture
from lib.records import record_path
from lib.settings import Profile
from lib.specs import EngineQualitySpec, LatencySpec, Spec, UpstreamSpec

QUESTIONS = '{"data": [{"title": "t", "paragraphs": [{"context": "A lamp stands here.", "qas": [%s]}]}]}'
QUESTION = '{"id": "%d", "question": "What stands here?", "answers": [{"text": "A lamp", "answer_start": 0}]}'


def planned(profile: Profile) -> list[Spec]:
    """Every run of every plan that needs no measurement first."""
    return [spec for name, plan in plans.PLANS.items() if name not in plans.MEASURED_FIRST for spec in plan(profile)]


def runs_here(spec: Spec) -> bool:
    if isinstance(spec, EngineQualitySpec):
        return engines.unavailable_reason(spec.engine) is None
    if isinstance(spec, LatencySpec):
        needed = [spec.reference] if spec.reference else spec.engines
        return environment.offers(spec.instructions) and any(engines.unavailable_reason(one) is None for one in needed)
    return True


@pytest.mark.parametrize("name", ["quick", "study"])
def test_a_processor_without_fast_units_is_asked_for_nothing_that_it_cannot_run(name, monkeypatch):
    """bf16 engines are not available there; what other machines recorded is shown all the same."""
    before = planned(load_profile(name))
    for module in (environment, engines):
        monkeypatch.setattr(module, "isa_flags", lambda: ("avx2",))
    assert engines.unavailable_reason("openvino-bf16") is not None
    profile = load_profile(name)
    after = planned(profile)
    assert all(runs_here(spec) or record_path(profile, spec).exists() for spec in after)
    lost = [spec for spec in before if spec not in after]
    assert all(isinstance(spec, EngineQualitySpec | LatencySpec) for spec in lost)
    assert any(isinstance(spec, LatencySpec) for spec in after)


@pytest.mark.parametrize(("family", "upstream"), [("bert", True), ("roberta", False)])
def test_only_a_bert_is_pruned_upstream(family, upstream, tmp_path):
    """Another family has no masked-language head here: the rest of notebook 03 is planned without it."""
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}
    kind = {"bert": models.BertConfig, "roberta": models.RobertaConfig}[family]
    kind(**small, vocab_size=50).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # a plan reads the config alone
    plan = plans.obert(load_profile("study", encoder=str(tmp_path)))
    assert any(isinstance(spec, UpstreamSpec) for spec in plan) is upstream and len(plan) > 10


@pytest.mark.parametrize(
    ("encoder", "architecture", "timed"),
    [
        ("minilm", "minilm", "minilm"),
        ("tiny-bert", "tiny", "tiny"),
        ("roberta-base", "roberta-base", "roberta-base"),
        ("bert-large-uncased", "bert-large-uncased", "bert-large-uncased"),
        ("xlnet-base-cased", "xlnet-base-cased", "bert-base-uncased"),  # no ONNX engine runs it
        ("somebody/their-bert", None, "bert-base-uncased"),
    ],
)
def test_the_encoder_itself_is_timed_where_its_architecture_is_known(encoder, architecture, timed):
    assert models.architecture_of(encoder) == architecture
    profile = load_profile("study").model_copy(update={"encoder": encoder})
    assert timed_architecture(profile) == timed
    assert {spec.dense for spec in plans.engine_latency(profile)} == {timed, "bert-base-uncased"}


def test_a_folder_with_the_name_of_an_architecture_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roberta-base").mkdir()
    assert models.architecture_of("roberta-base") is None


def test_own_files_need_no_data_folder(tmp_path, monkeypatch, capsys):
    """Under ``study`` the user's file is computed with; what has no data here is named and left out."""
    monkeypatch.delenv("STUDY_DATA", raising=False)
    own = tmp_path / "lamps.json"
    own.write_text(QUESTIONS % ", ".join(QUESTION % number for number in range(40)), encoding="utf-8")
    profile = load_profile("study", tasks=[str(own)], results=tmp_path / "results")
    assert list(profile.tasks) == ["lamps"]
    assert notebook.limits(profile, False, -1.0) == {"refresh": False, "budget_minutes": None}
    tasks = {spec.task for spec in plans.fully_quantized(profile)}
    assert tasks and "multi30k" not in tasks and "no data here: Multi30k En-De" in capsys.readouterr().out
    assert "squad_v1" not in {task for spec in plans.kronecker(profile) for task in getattr(spec, "tasks", ())}
    sections = {"structured_pruning": plans.structured_qa, "block_movement": plans.block_movement}
    for section, plan in sections.items():  # notebooks 02 and 04 choose tasks in their own section
        whole = load_profile("study", results=tmp_path / "results", **{f"{section}.tasks": [str(own)]})
        assert notebook.limits(whole, False, -1.0)["budget_minutes"] == 0
        assert notebook.limits(whole, False, -1.0, getattr(whole, section).tasks)["budget_minutes"] is None
        assert {spec.task for spec in plan(whole)} == {"lamps"}
    assert plans.majority(whole) == [], "the profile's other tasks have no data"
    mixed = load_profile("study", tasks=[str(own), "squad_v1"], results=tmp_path / "results")
    assert notebook.limits(mixed, False, -1.0)["budget_minutes"] == 0
    everything = load_profile("study", results=tmp_path / "results")
    assert "multi30k" in {spec.task for spec in plans.fully_quantized(everything)}, "none is computed, all are counted"
