"""Notebook 03 around its runs: plan, frames, verdicts, upstream pruning end to end, and the Fisher's cost."""

import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import record, small_profile

from lib import benchmark, engines, environment, experiments, fisher_speed, plans
from lib.analysis import obert as frames
from lib.analysis.deviations import deviations, movement_sentence
from lib.analysis.obert import crossover, kind_of, method_of, obert_frame, published_frame, speed_frame
from lib.claims import obert as claims_of
from lib.config import ROOT, StudyError, load_profile
from lib.data import TASKS, load_task
from lib.distillation import Distillation
from lib.engines import unavailable_reason
from lib.fisher import BlockFisher
from lib.labels import label
from lib.models import published_parameters
from lib.plans.obert import (
    HEADLINE,
    RANKINGS,
    SOFT,
    SOFTER,
    fewer_layers,
    headline_compounds,
    language_model,
    pruned,
    published_checkpoints,
    schedule,
    sparse_speed,
    transfer,
)
from lib.plots import obert as plots
from lib.records import record_path
from lib.runs import ensure
from lib.specs import LatencySpec, TrainSpec, UpstreamSpec, parse_spec, spec_hash
from lib.speed_runs import run_latency
from lib.training import TrainingSettings
from lib.upstream import (
    IGNORED,
    MaskedDistiller,
    collator,
    load_masked_lm,
    masked_features,
    texts,
)


@pytest.fixture
def study(profile_file):
    return load_profile(profile_file())


def test_plan_begins_with_what_the_claims_need(study):
    plan = plans.make_plan("obert", study, None)
    kinds = [kind_of(spec) if isinstance(spec, TrainSpec) else spec.kind for spec in plan]
    assert kinds[:5] == ["dense", "gradual", "gradual", "gradual", "control"]
    assert [method_of(spec) for spec in plan[1:4]] == ["obert", "magnitude", "movement"]
    assert {"int8", "one-shot", "upstream", "transfer", "dense transfer"} <= set(kinds)
    for spec in plan:
        assert parse_spec(json.loads(spec.model_dump_json())) == spec and re.fullmatch(r"[\w.-]+", label(spec))


def test_other_tasks_get_every_ranking_over_epochs_of_their_own(profile_file):
    few = plans.make_plan("obert", load_profile(profile_file()), None)
    path = profile_file("more", **{"obert.other_tasks": {"world_pair": 2, "world_qa": 3}})
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["tasks"]["world_pair"] = values["tasks"]["world_sentiment"]
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    more = plans.make_plan("obert", load_profile(path), None)
    added = [spec for spec in more if getattr(spec, "task", "") == "world_pair"]
    assert len(more) - len(few) == len(added) and not any(getattr(spec, "task", "") == "world_qa" for spec in more)
    first = [spec for spec in added if spec.seed == 0]
    assert [kind_of(spec) for spec in first[:5]] == ["dense", "gradual", "gradual", "gradual", "control"]
    assert {spec.training.epochs for spec in first[1:5]} == {2}
    assert {kind_of(spec) for spec in first[5:]} == {"gradual", "int8", "one-shot"}


def test_headline_compounds_are_as_deep_as_the_encoder_allows(profile_file):
    """Four layers have a half and a quarter; of the four compounds, the profile's sparsities choose."""
    study = load_profile(profile_file(**{"obert.compound_sparsities": [0.8, 0.9]}))
    shapes = []
    for spec in headline_compounds(study, "world_sentiment", 1):
        drop = spec.start.compressor.settings["drop"] if kind_of(spec) == "gradual" and spec.start.compressor else []
        shapes.append((kind_of(spec), 4 - len(drop), spec.compressor.settings.get("sparsity"), method_of(spec)))
    assert shapes == [
        ("gradual", 4, 0.8, "obert-block4"), ("int8", 4, None, "obert-block4"), ("gradual", 2, 0.9, "obert"),
        ("gradual", 1, 0.8, "obert-block4"), ("int8", 4, None, "obert-block4"),
        ("gradual", 2, 0.8, "obert-block4"), ("int8", 4, None, "obert-block4"),
    ]  # fmt: skip
    plan = plans.make_plan("obert", study, None)
    compound = [pruned(study, 0, 0.8, group=4, layers=layers) for layers in study.obert.compound_layers]
    headline = {spec_hash(spec) for spec in headline_compounds(study, study.obert.task, 0)}
    assert study.obert.compound_layers == (2,) and (1 / 2, 0.8, 4) in HEADLINE
    assert {spec_hash(spec) for spec in compound} <= headline & {spec_hash(spec) for spec in plan}, "one run, not two"
    few = load_profile(profile_file("few", **{"obert.compound_sparsities": [0.6]}))
    assert headline_compounds(few, "world_sentiment", 1) == []


def test_every_ranking_differs_in_nothing_else(study):
    """Movement, whose scores are trained, has its authors' start and schedule; teacher and training are the others'."""
    specs = [pruned(study, 0, 0.8, importance) for importance in RANKINGS]
    for spec in specs:
        assert spec.distillation == SOFT and spec.teacher == specs[0].start and spec.training == specs[0].training
    assert specs[2].start is None
    for spec in specs[:2]:
        assert spec.teacher == spec.start
        settings = spec.compressor.settings
        chosen = [settings[name] for name in ("prune_at", "rewind_at", "first_step")]
        assert chosen == [*schedule(study, "long").values(), 0.5]
    movement = specs[2].compressor
    assert movement.name == "block_movement" and method_of(specs[2]) == "movement"
    assert movement.settings == {
        "variant": "block", "block": [1, 1], "mask": "top-k", "density": 0.2, "per_matrix": True,
        "begin": 0.1, "end": 0.8,
    }  # fmt: skip


@pytest.mark.parametrize("profile", ["smoke", "quick", "study", "paper"])
def test_profiles_plan_the_papers_schedules(profile):
    study = load_profile(profile)
    long, short = schedule(study, "long"), schedule(study, "short")
    assert long["prune_at"][0] == pytest.approx(2 / 30) and long["prune_at"][-1] == pytest.approx(26 / 30)
    assert len(long["prune_at"]) == study.obert.prunings and long["rewind_at"] == long["prune_at"]
    assert len(short["prune_at"]) == 13 and short["rewind_at"] == [0.8]
    if profile == "paper":
        assert pruned(study, 0, 0.9).training.batch_size == 16
        averaged = {
            task: pruned(study, 0, 0.9, task=task).compressor.settings["gradient_batch"]
            for task in ("squad_v1", "mnli")
        }
        assert averaged == {"squad_v1": 8, "mnli": 16}  # examples in the mean that one gradient is
        assert [round(30 * moment, 6) for moment in long["prune_at"]] == [2, 6, 10, 14, 18, 22, 26]
        assert [round(10 * moment, 6) for moment in short["prune_at"]] == [2 + half / 2 for half in range(13)]


def test_models_with_fewer_layers_begin_pruning_lower(profile_file):
    study = load_profile(profile_file(**{"obert.first_step": 0.7}))
    assert pruned(study, 0, 0.8).compressor.settings["first_step"] == 0.7
    shallow = pruned(study, 0, 0.8, group=4, layers=2)
    assert shallow.compressor.settings["first_step"] == 0.3
    assert shallow.start.compressor.settings == {"drop": [3, 4]} and kind_of(shallow) == "gradual"
    with pytest.raises(StudyError, match="0 of 4 layers; give 1 to 4"):
        fewer_layers(study, 0, 0)


def test_the_dense_control_begins_with_the_pretrained_encoder_and_a_shallow_one_with_its_layers(study):
    """A copy of the teacher would match it before the first step."""
    control, sparse = pruned(study, 0, 0.0), pruned(study, 0, 0.8)
    assert control.start is None and kind_of(control) == "control" and sparse.start == sparse.teacher
    assert (control.teacher, control.training) == (sparse.teacher, sparse.training)
    assert pruned(study, 0, 0.0, budget="short").start is None
    assert pruned(study, 0, 0.0, layers=2).start == fewer_layers(study, 0, 2)


def test_an_upstream_start_is_another_run_than_a_downstream_one(study):
    upstream, spec = language_model(study), transfer(study, "world_sentiment", 0, 0.0)
    assert isinstance(spec.start, UpstreamSpec) and spec.start == upstream
    assert spec.distillation == language_model(study, 0.8).distillation == SOFTER
    again = parse_spec(json.loads(spec.model_dump_json()))
    assert isinstance(again.start, UpstreamSpec) and spec_hash(again) == spec_hash(spec)
    assert spec_hash(spec) != spec_hash(spec.model_copy(update={"start": spec.teacher}))


def test_engines_that_are_not_here_are_left_out_of_the_plan(study, monkeypatch):
    monkeypatch.setattr(engines.deepsparse, "FOLDER", Path("/nowhere"))
    plan = sparse_speed(study)
    assert [spec.engines for spec in plan] == [("pytorch-fp32",), ("pytorch-csr-fp32",), ("pytorch-csr-fp32",)]
    assert all(isinstance(spec, LatencySpec) and spec.dense == "4 layers dense" in spec.models for spec in plan)
    assert {model.group for spec in plan for model in spec.models.values() if model.sparsity} == {1, 4}


def test_a_kind_of_processor_is_timed_where_it_is_at_hand(study, monkeypatch):
    """Its runs come last, have names of their own, and are planned elsewhere only where they are recorded."""
    latency = study.latency.model_copy(update={"also_with": ("amx_tile",)})
    there = study.model_copy(update={"latency": latency})
    monkeypatch.setattr(environment, "isa_flags", lambda: ("amx_tile",))
    plain, plan = sparse_speed(study), sparse_speed(there)
    assert plan[: len(plain)] == plain
    assert {spec.instructions for spec in plan[len(plain) :]} == {"amx_tile"}
    assert [spec.engines for spec in plan[len(plain) :]] == [("pytorch-fp32",), *2 * [("pytorch-csr-fp32",)]]
    assert len({spec_hash(spec) for spec in plan}) == len(plan)
    assert record_path(there, plan[-1]).name.startswith("latency-4 layers dense_batch1_length16_amx_tile-")
    monkeypatch.setattr(environment, "isa_flags", lambda: ("avx2",))
    assert sparse_speed(there) == plain
    with pytest.raises(StudyError, match="is for a processor with amx_tile, which this one is not"):
        run_latency(plan[-1])
    for name in ("amx", "avx2_without_amx"):
        wrong = study.model_copy(update={"latency": latency.model_copy(update={"also_with": (name,)})})
        with pytest.raises(StudyError, match=r"latency\.also_with: 'amx' is no instruction set of avx2, "):
            sparse_speed(wrong)


def test_a_kind_of_processor_may_be_one_that_lacks_something(study, monkeypatch):
    kind = "avx512_vnni_without_avx512_bf16_without_amx_tile"
    there = study.model_copy(update={"latency": study.latency.model_copy(update={"also_with": (kind,)})})
    monkeypatch.setattr(environment, "isa_flags", lambda: ("avx512f", "avx512_vnni"))
    plan = [spec for spec in sparse_speed(there) if spec.instructions]
    assert [spec.engines for spec in plan] == [("pytorch-fp32",), *2 * [("pytorch-csr-fp32",)]]
    assert kind in record_path(there, plan[0]).name
    for flags in (("avx512f",), ("avx512_vnni", "avx512_bf16"), ("avx512_vnni", "amx_tile")):
        monkeypatch.setattr(environment, "isa_flags", lambda flags=flags: flags)
        assert sparse_speed(there) == sparse_speed(study)
        with pytest.raises(StudyError, match="with avx512_vnni and without avx512_bf16 and without amx_tile, which"):
            run_latency(plan[0])


def test_a_run_on_a_sparse_engine_holds_the_models_of_one_sparsity(study):
    update = {"speed_sparsities": (0.8, 0.9), "sparse_engines": (("pytorch-csr-fp32",),)}
    several = study.obert.model_copy(update=update)
    plan = sparse_speed(study.model_copy(update={"obert": several}))[1:]
    held = [[(model.sparsity, model.group) for model in spec.models.values()] for spec in plan]
    whole, shorter = [(0, 1), (0.8, 1), (0.8, 4)], [(0, 1), (0, 1), (0.8, 1), (0.8, 4)]
    second = [(0, 1), (0.9, 1), (0.9, 4)]
    assert held == [whole, second, shorter, second]


def test_the_first_sparse_engines_run_at_every_depth_and_the_conditions_of_a_set_of_models_follow_each_other(study):
    update = {
        "speed_conditions": ((1, 16), (2, 16)),
        "sparse_engines": (("pytorch-csr-fp32",), ("pytorch-tiles-fp32",)),
    }
    settings = study.obert.model_copy(update=update)
    plan = sparse_speed(study.model_copy(update={"obert": settings}))
    assert [(spec.engines[0], spec.batch) for spec in plan] == [
        (engine, batch)
        for engine in ["pytorch-fp32", "pytorch-csr-fp32", "pytorch-csr-fp32", "pytorch-tiles-fp32"]
        for batch in (1, 2)
    ]
    depths = [min(4 - len(model.drop) for model in spec.models.values()) for spec in plan]
    assert depths == [2, 2, 4, 4, 2, 2, 4, 4]


def test_texts_are_unlabelled_and_different():
    rows = load_task("world_qa", "embedded", None, 60, 8)["train"]
    found = texts(TASKS["world_qa"], rows)
    assert len(set(found)) == len(found) < 60 and set(found) == set(rows["context"])
    pairs = load_task("world_pair", "embedded", None, 10, 8)["train"]
    assert set(texts(TASKS["world_pair"], pairs)) == set(pairs["sentence1"]) | set(pairs["sentence2"])


def test_masks_are_the_papers_shares_and_depend_on_the_seed_alone(tokenizer):
    lines = texts(TASKS["world_qa"], load_task("world_qa", "embedded", None, 200, 8)["train"])
    one, again, other = (masked_features(lines, tokenizer, 64, 2, 0.15, seed) for seed in (0, 0, 1))
    assert one["input_ids"] == again["input_ids"] != other["input_ids"] and len(one) % 2 == 0
    assert one["input_ids"][0] != one["input_ids"][len(one) // 2]  # the copies differ
    tokens, masked, kinds = 0, 0, {"mask": 0, "same": 0, "other": 0}
    for ids, labels in zip(one["input_ids"], one["labels"], strict=True):
        tokens += len(ids) - 2
        assert len(ids) <= 64 and labels[0] == labels[-1] == IGNORED
        for token, truth in zip(ids, labels, strict=True):
            if truth != IGNORED:
                masked += 1
                kinds["mask" if token == tokenizer.mask_token_id else "same" if token == truth else "other"] += 1
    assert masked / tokens == pytest.approx(0.15, abs=0.01)
    assert [kinds[kind] / masked for kind in ("mask", "same", "other")] == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    with pytest.raises(StudyError, match="no text"):
        masked_features([], tokenizer, 64, 1, 0.15, 0)


@pytest.mark.parametrize(("attention", "rate"), [(None, 0.2), (0.0, 0.0)])
def test_language_model_has_both_dropout_rates(attention, rate):
    settings = TrainingSettings(epochs=1, batch_size=4, learning_rate=1e-3, max_length=32, dropout=0.2,
                                attention_dropout=attention)  # fmt: skip
    layer = load_masked_lm("tiny-bert", 0, settings).bert.encoder.layer[0]
    assert (layer.output.dropout.p, layer.attention.self.dropout.p) == (0.2, rate)


def test_language_model_head_runs_at_masked_positions_alone(tokenizer):
    settings = TrainingSettings(epochs=1, batch_size=4, learning_rate=1e-3, max_length=32)
    model = load_masked_lm("tiny-bert", 0, settings).eval()
    features = masked_features(["a ore miner sold the lamp", "the river"], tokenizer, 32, 1, 0.3, 0)
    names = ["input_ids", "attention_mask", "labels"]
    batch = dict(collator(tokenizer)([features.select_columns(names)[i] for i in range(2)]))
    output = model(**batch)
    chosen = batch["labels"] != IGNORED
    assert output.logits.shape == (int(chosen.sum()), 30522)
    states = model.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    everywhere = torch.nn.functional.cross_entropy(model.cls(states).view(-1, 30522), batch["labels"].view(-1))
    torch.testing.assert_close(output.loss, everywhere)
    distiller = MaskedDistiller(Distillation(hard=0.0, logits=1.0, temperature=5.5), copy.deepcopy(model))
    assert distiller.loss(output, output.loss, batch).item() == pytest.approx(0, abs=1e-5)


def test_other_encoders_have_no_upstream_pruning(small_model, tmp_path):
    small_model("roberta").save_pretrained(tmp_path)
    settings = TrainingSettings(epochs=1, batch_size=4, learning_rate=1e-3, max_length=32)
    with pytest.raises(StudyError, match="is of type 'roberta'; it handles bert"):
        load_masked_lm(str(tmp_path), 0, settings)


def test_upstream_pruning_and_sparse_transfer_keep_the_same_zeros(study):
    """The language model is pruned, and the task's model has exactly its zeros and the task's own head."""
    spec = transfer(study, "world_sentiment", 0, 0.8)
    records = ensure([language_model(study), spec.start, spec], study)
    assert [round(record["compression"].get("sparsity", 0), 3) for record in records] == [0, 0.8, 0.8]
    assert records[1]["compression"]["per_layer"] == records[2]["compression"]["per_layer"]
    assert records[0]["loss"] > 0 and records[1]["train_examples"] > 0
    frame = frames.upstream_frame(records)
    assert frame["sparsity"].round(1).tolist() == [0, 80]
    assert obert_frame(records)["kind"].tolist() == ["transfer"]
    again = experiments.run_upstream(spec.start, study)  # the same spec gives the same model
    assert again["loss"] == records[1]["loss"] and again["compression"] == records[1]["compression"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Records of the small profile's whole plan, computed once."""
    results = tmp_path_factory.mktemp("obert") / "results"
    path = results.parent / "tiny.yaml"
    path.write_text(yaml.safe_dump(small_profile(results)), encoding="utf-8")
    study = load_profile(path)
    return study, ensure(plans.make_plan("obert", study, None), study), ensure(sparse_speed(study), study)


def test_frames_say_what_every_run_is(finished):
    _, records, timed = finished
    frame = obert_frame(records)
    assert set(frame["kind"]) == {"dense", "gradual", "control", "int8", "one-shot", "transfer", "dense transfer"}
    pruned, movement = frame[frame["target"] > 0], frame["method"] == "movement"
    np.testing.assert_allclose(pruned[~movement[pruned.index]]["sparsity"], 80, atol=0.3)
    assert pruned[movement[pruned.index]]["sparsity"].between(79.9, 85).all()  # with what nothing reads any more
    assert (frame[frame["kind"] == "int8"]["smaller"] > 3).all()  # embeddings are most of this model
    assert frame[frame["kind"] == "dense"]["retained"].tolist() == [100.0]
    assert set(frame[frame["kind"] == "gradual"]["budget"]) == {"long", "short"}
    assert set(frame["encoding"]) >= {"bitmask"}
    assert "long" in set(frame[frame["kind"] == "transfer"]["budget"])  # and still no compound:
    assert set(frames.compounds(frame)["kind"]) == {"gradual", "int8"}
    assert set(frames.compounds(frame)["budget"]) == {"long"}
    layers = frames.layer_frame(records)
    doubled, prunings = frames.float64_prunings(records)
    assert (
        0 <= doubled <= prunings >= sum(frame["method"].isin(["obert", "obert-block4"]) & (frame["kind"] == "gradual"))
    )
    means = layers[layers["layers"] == 4].groupby(["method", "budget"])["sparsity"].count()
    assert (means == 24).all()
    speed = speed_frame(timed)
    here = {name for name in ("pytorch-fp32", "pytorch-csr-fp32", "deepsparse-fp32") if not unavailable_reason(name)}
    assert set(speed["engine"]) == here and speed["over fp32"].notna().all()
    whole = speed[(speed["engine"] == "pytorch-fp32") & (speed["layers"] == 4)].iloc[0]
    best = speed[(speed["layers"] == 4) & (speed["sparsity"] == 0)].groupby("engine")["ms"].median().min()
    assert whole["over best dense"] == pytest.approx(best / whole["anchored ms"])


def test_published_checkpoints_are_evaluated_as_they_come(finished, tmp_path):
    """A pruned model in a folder stands in for one of the hub: its own zeros, its own head, no training."""
    study, records, _ = finished
    mine = next(other for other in records if isinstance(other.spec, TrainSpec) and kind_of(other.spec) == "one-shot")
    model, tokenizer = experiments.finished_model(study, mine.spec)
    for folder in (tmp_path / "some-80", tmp_path / "elsewhere"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    checkpoints = {str(tmp_path / "some-80"): "world_sentiment", str(tmp_path / "elsewhere"): "mnli"}
    update = {"obert": study.obert.model_copy(update={"checkpoints": checkpoints})}
    assert plans.make_plan("published_checkpoints", study.model_copy(update=update), None) == []
    hub = study.model_copy(update=update | {"data": "hub"})
    plan = plans.make_plan("published_checkpoints", hub, None)  # the profile has no MNLI
    assert [(spec.encoder, spec.training.epochs) for spec in plan] == [(str(tmp_path / "some-80"), 0)]
    (found,) = ensure(plan, hub)
    assert kind_of(found.spec) == "checkpoint" and found["score"] == mine["score"]
    assert found["compression"]["sparsity"] == mine["compression"]["sparsity"]
    quality = obert_frame(records)
    row = frames.checkpoint_frame([found], quality).iloc[0]
    own = quality.query("kind == 'gradual' and method == 'obert' and budget == 'long' and layers == 4")["score"]
    assert (row["checkpoint"], round(row["sparsity"])) == ("some-80", 80) and np.isnan(row["printed"])
    assert row["seeds"] == len(own) > 0 and row["ours"] == own.mean()


def test_checkpoints_stand_beside_their_printed_scores(study):
    """The score of Table 1 with 30 epochs, at the sparsity that the file has."""
    (spec,) = published_checkpoints(study.model_copy(update={
        "data": "hub", "tasks": {"squad_v1": study.tasks["world_sentiment"]},
        "obert": study.obert.model_copy(update={"checkpoints": {"someone/obert-97": "squad_v1"}}),
    }))  # fmt: skip
    found = frames.checkpoint_frame([record(spec, score=80.0, compression={"sparsity": 0.9702})], pd.DataFrame())
    assert found["printed"].tolist() == [85.98] and found["checkpoint"].tolist() == ["obert-97"]
    assert found["seeds"].tolist() == [0] and found["ours"].isna().all()


def test_verdicts_are_complete_with_and_without_records(finished):
    _, records, timed = finished
    full = claims_of.verdicts(obert_frame(records), speed_frame(timed))
    empty = claims_of.verdicts(pd.DataFrame(), pd.DataFrame())
    assert full["claim"].tolist() == empty["claim"].tolist() and full["claim"].is_unique
    assert set(empty[empty["check"] != "size"]["ours"]) == {claims_of.NOT_RUN}
    assert "too few seeds" in full[full["claim"] == "What oBERT keeps at 80 % sparsity"]["verdict"].item()


def test_a_compound_is_judged_by_quartiles_not_by_a_median_alone():
    """10.07 × faster is printed, of which 90 % are 9.06."""
    row = {"engine": "deepsparse-fp32", "sparsity": 90.0, "layers": 6, "total": 12, "group": 1, "batch": 32, "n": 3,
           "length": 128, "threads": 2}  # fmt: skip
    runs = [("slow", 5.0, 4.0, 6.0), ("fast", 11.0, 10.0, 12.0), ("unsteady", 9.5, 8.0, 10.0)]
    columns = ["cpu", "over fp32", "over fp32 low", "over fp32 high"]
    timed = pd.DataFrame([row | dict(zip(columns, run, strict=True)) for run in runs])
    found = claims_of._speed(timed, "speed")
    assert found["verdict"] == "holds in part" and found["evidence"].startswith("1 of 3 reach the bound of 9.06 ×, 1 ")
    alone = claims_of._speed(timed[timed["cpu"] == "unsteady"], "speed")
    assert alone["verdict"] == "cannot tell: every one's quartiles hold the bound"


def gradual(*rows: tuple[str, int, float, bool]) -> pd.DataFrame:
    """Of ``obert_frame`` what verdicts on rankings read, from (method, seed, retained, constant)."""
    frame = pd.DataFrame(rows, columns=["method", "seed", "retained", "constant"])
    return frame.assign(kind="gradual", budget="long", layers=6, group=1, task="stsb", title="STS-B", target=90.0)


def test_a_rival_that_answers_the_same_to_all_is_counted_and_not_beaten():
    ours = [("obert", seed, 98.0 + seed, False) for seed in range(3)]
    lost = [("movement", seed, 0.0, True) for seed in range(2)]
    row = claims_of._better_than(gradual(*ours, *lost), "movement", 90.0)
    assert (row["ours"], row["verdict"]) == ("nothing to compare", "not testable here")
    assert row["evidence"] == "2 of 2 models of the rival give one answer for all"
    row = claims_of._better_than(gradual(*ours, lost[0], ("movement", 1, 89.0, False)), "movement", 90.0)
    assert row["ours"].startswith("+10.0 points") and "1 of 2 models of the rival give one answer" in row["evidence"]
    note = plots.constant_note(gradual(*ours, *lost), "stsb")
    assert note == "2 of 2 models of Movement at 90 %" and plots.constant_note(gradual(*ours), "stsb") == ""
    assert plots.constant_note(gradual(*ours, *lost), "stsb", 97.0) == ""


def test_rankings_are_compared_with_the_longest_schedule_that_both_are_published_for():
    def printed(rival, target):
        return claims_of._better_than(pd.DataFrame(), rival, target)["published"]

    dense = 88.54
    assert printed("movement", 90.0) == f"{100 * (88.31 - 87.42) / dense:+.1f} points (30 epochs)"
    assert printed("movement", 97.0) == f"{100 * (84.65 - 82.3) / dense:+.1f} points (10 epochs)"
    assert printed("magnitude", 90.0) == "better (no number)"


def test_curves_leave_out_models_that_answer_the_same_to_all_unless_all_do():
    ours, lost = ("obert", 0, 98.0, False), ("movement", 0, 0.0, True)
    for rows, methods, said in (
        ([ours, lost], {"obert"}, " Left out, since they give one answer for all: 1 of 1 models of Movement at 90 %."),
        ([lost], {"movement"}, " Give one answer for all: 1 of 1 models of Movement at 90 %."),
        ([ours], {"obert"}, ""),
    ):
        quality = gradual(*rows).assign(score=50.0)
        _, drawn = plots.sparsity_figure(quality)
        assert set(drawn[drawn["published"].eq(False)]["method"]) == methods
        assert plots.constant_sentence(drawn, quality, "stsb") == said
    sentence = movement_sentence(gradual(ours, lost, ("movement", 1, 5.0, False)))
    said = "Movement pruning failed here: 1 of 2 runs on STS-B give one answer for all."
    assert sentence == said + " The best of the others keeps 5 %."
    assert movement_sentence(gradual(ours)) == movement_sentence(pd.DataFrame()) == ""


@pytest.mark.parametrize("profile", ["quick", "study", "paper"])
def test_deviations_have_the_profiles_own_numbers(profile):
    study = load_profile(profile)
    text = " ".join(deviations(study, pd.DataFrame(), pd.DataFrame()))
    assert f"has {study.obert.prunings} prunings" in text and f"takes {study.obert.gradients} gradients" in text
    assert ("language model" in text) is bool(study.obert.upstream_sparsities)
    assert (f"{TASKS['mnli'].title} 16" in text) is (profile == "paper") and "Movement" not in text


def transferred(*rows: tuple[str, str, int, float]) -> pd.DataFrame:
    """Of ``obert_frame`` what the verdict on transfer reads, from (task, kind, seed, retained)."""
    frame = pd.DataFrame(rows, columns=["task", "kind", "seed", "retained"])
    return frame.assign(target=np.where(frame["kind"] == "transfer", 90.0, 0.0))


@pytest.mark.parametrize(
    ("control", "verdict"),
    [(99.0, "does not hold here"), (80.0, "not testable here"), (None, "does not hold here")],
)
def test_a_language_model_that_has_learnt_little_says_nothing_of_sparse_transfer(control, verdict):
    rows = [("stsb", "transfer", seed, 60.0) for seed in (0, 1)] + [("cola", "dense transfer", 0, 10.0)]
    rows += [("stsb", "dense transfer", 0, control)] if control else []
    row = claims_of._transfer(transferred(*rows))
    assert (row["ours"], row["verdict"]) == ("60.0 % kept", verdict)
    assert ("keeps 80.0 % when transferred" in row["evidence"]) is (control == 80)


def test_points_are_gzipped_ours_and_published_and_oberts_alone():
    """INT8 has its colour in both; magnitude and movement make no compound."""
    ours = gradual(("obert", 0, 98.0, False), ("obert-block4", 0, 96.0, False), ("magnitude", 0, 60.0, False))
    quality = pd.concat([ours.assign(bits=32), ours[1:2].assign(bits=8, kind="int8")])
    quality = quality.assign(smaller_gzip=4.0, smaller=3.0, recomputations=1)
    fig, drawn = plots.frontier_figure(quality)
    kinds = drawn.groupby("published").apply(lambda rows: set(zip(rows["method"], rows["bits"], strict=True)))
    assert kinds[False] == {("obert", 32), ("obert-block4", 32), ("obert-block4", 8)}
    assert kinds[True] == {("obert", 32), ("obert-block4", 8)} and drawn["times smaller"].min() > 2
    names = [text.get_text() for text in fig.legends[0].texts]
    assert names.count("oBERT, blocks of 4, INT8") == 1 and "Published" in names
    with pytest.raises(StudyError, match="the control that it is compared with"):
        plots.frontier_figure(quality.assign(smaller_gzip=np.nan))


def test_published_numbers_stand_beside_the_budget_whose_epochs_they_have():
    long, short = gradual(("obert", 0, 99.0, False), ("movement", 0, 0.0, True)), gradual(("obert", 0, 98.0, False))
    found = frames.against_published(pd.concat([long, short.assign(budget="short")])).set_index(["method", "budget"])
    dense = 88.54
    assert found[30].round(6).tolist() == [round(100 * score / dense, 6) for score in (88.31, 87.42, 88.31)]
    assert found[10].round(6).tolist() == [round(100 * score / dense, 6) for score in (87.98, 84.9, 87.98)]
    assert found["difference"]["obert", "long"] == pytest.approx(99 - 100 * 88.31 / dense)
    assert found["difference"]["obert", "short"] == pytest.approx(98 - 100 * 87.98 / dense)
    assert found["constant"].tolist() == [0, 1, 0] and np.isnan(found["difference"]["movement", "long"])
    mixed = frames.against_published(gradual(("movement", 0, 90.0, False), ("movement", 1, 0.0, True))).iloc[0]
    assert mixed["mean"] == 45 and mixed["difference"] == pytest.approx(90 - 100 * 87.42 / dense)


def test_layers_of_models_that_answer_the_same_to_all_are_drawn_only_where_there_is_no_other():
    rows = [(method, part, layer, method == "movement") for method in ("obert", "movement") for part in ("query", "key")
            for layer in (1, 2)]  # fmt: skip
    layers = pd.DataFrame(rows, columns=["method", "part", "layer", "constant"])
    layers = layers.assign(task="stsb", budget="long", target=90.0, layers=2, seed=0, sparsity=90.0)
    fig, drawn = plots.layer_figure(layers)
    assert [ax.get_title() for ax in fig.axes] == ["oBERT"] and len(drawn) == 4 and not drawn["constant"].any()
    fig, drawn = plots.layer_figure(layers[layers["constant"]])
    assert [ax.get_title() for ax in fig.axes] == ["Movement"] and drawn["constant"].all()


@pytest.mark.parametrize(
    ("counts", "said"), [([1, 1], "n = 1 seed"), ([2], "n = 2 seeds"), ([3, 1], "n = 1 to 3 seeds")]
)
def test_seeds_are_counted_in_words(counts, said):
    assert plots.seeds_text(pd.Series(counts)) == said


def test_size_claim_is_exact_arithmetic():
    """BERT-base under a QA head instead of its pooler, all in fp32; then 80 % of 85 M weights gone for a bit each."""
    dense = claims_of.compound_bytes()
    assert dense == 4 * (published_parameters("bert-base-uncased") - (768 * 768 + 768) + 2 * 768 + 2)
    mask = 84_934_656 / 8
    assert claims_of.compound_bytes(12, 0.8) == pytest.approx(dense - 4 * 0.8 * 84_934_656 + mask)
    assert 9 < dense / claims_of.compound_bytes(12, 0.8, 4, int8=True) < 11


def test_published_claims_are_the_abstracts():
    printed = {name: compound.printed() for name, compound in claims_of.COMPOUNDS.items()}
    assert printed == {"size": 10.18, "speed": 10.07, "both": 28.75}
    lost = {name: 100 - compound.printed("retained") for name, compound in claims_of.COMPOUNDS.items()}
    assert lost["size"] < 1 and lost["speed"] < 2 and lost["both"] < 7.5
    assert published_frame().query("kind == 'dense' and place == 'Table 1'")["retained"].tolist() == [100.0]


@pytest.mark.parametrize(
    ("sparsity", "ms", "where"),
    [
        ([0, 80, 90], [100, 60, 30], (80, 90)),
        ([90, 0, 80], [30, 100, 48], (0, 90)),  # the quartiles overlap at 80 %
        ([0, 90], [100, 52], (0, np.nan)),
        ([0, 90], [100, 60], (90, np.nan)),
        ([0, 90], [40, 20], (np.nan, 0)),
        ([0, 80, 90], [40, 50, 20], (np.nan, 90)),
    ],
)
def test_crossover_is_bracketed_by_measured_points_whose_quartiles_do_not_overlap(sparsity, ms, where):
    times = np.array(ms)
    curve = pd.DataFrame({"sparsity": sparsity, "low ms": times - 4, "high ms": times + 4})
    assert crossover(curve, {"low ms": 46, "high ms": 54}) == pytest.approx(where, nan_ok=True)


def test_loop_over_blocks_is_the_same_recursion():
    ours = BlockFisher(60, 6, 4, 1e-2, torch.float64)
    loop = ours.inverse.clone()
    for seed in range(4):
        gradient = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        ours.add(gradient)
        fisher_speed.add_in_a_loop(loop, gradient, 4)
    torch.testing.assert_close(ours.inverse, loop, rtol=1e-10, atol=1e-12 * float(loop.abs().max()))


def test_fisher_cost_projects_to_bert_base():
    found = fisher_speed.fisher_cost(700, 50, 1024, 1, 2, full="tiny")
    assert found["base_weights"] == 84_934_656 and found["slice"] == 700
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["loop over blocks", "batched", "batched, tiny"] and rows["batched, tiny"]["weights"] == 32_768
    batched = rows["batched"] | {"per_gradient_s": 2e-3, "saliency_s": 3.0, "update_s": 4.0}
    projected = fisher_speed.projected_seconds(found | {"rows": [rows["loop over blocks"], batched]})
    assert projected == pytest.approx((1024 * 2e-3 + 7) * 84_934_656 / 700) and found["floor_bytes"] == 4 * 700 * 51


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "0"], "weights: found 0, expected 1 or more"),
        (["--width", "90", "--weights", "50"], "width 90 is above the 50 weights"),
        (["--full", "gpt"], "--full: 'gpt' is no architecture"),
    ],
)
def test_bad_options_of_the_benchmark_are_one_line(arguments, said, capsys):
    assert benchmark.main(["fisher", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix" or not shutil.which("bash"), reason="needs bash")
def test_run_all_goes_on_where_deepsparse_cannot_be_installed(tmp_path):
    """A PATH whose only Python is too new for it: one line says so, and the notebooks run."""
    root, tools = tmp_path / "study", tmp_path / "bin"
    (root / "lib").mkdir(parents=True)
    tools.mkdir()
    shutil.copy(ROOT / "run_all.sh", root / "run_all.sh")
    script = (ROOT / "run_all.sh").read_text(encoding="utf-8")
    start, end = script.index("install_deepsparse() {"), script.index("# Settings that a kernel")
    text = f"root={root}\n{script[start:end]}\ninstall_deepsparse\necho went on\n"
    (root / "part.sh").write_text(text, encoding="utf-8")
    for name in ("python3.11", "python3.10", "python3.9", "python3.8", "python3"):
        (tools / name).write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    environment = {"PATH": os.pathsep.join([str(tools), "/usr/bin", "/bin"])}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", str(root / "part.sh")], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "went on", done.stderr
    assert "DeepSparse: not installed" in done.stdout
