"""Notebook 04 around the compressor: published shapes, block-sparse execution, plans, frames, figures, verdicts."""

import copy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from conftest import small_profile

from lib import engines, figures, plans
from lib.agreement import check_agreement, random_batch
from lib.analysis import block_movement as frames
from lib.analysis import latency_frame, training_speed_frame
from lib.benchmark import main as benchmark
from lib.block_sparse import empty_block, stored_bytes, to_block_sparse, zero_blocks
from lib.blocks import attention_parts
from lib.claims import block_movement as claims_of
from lib.compressors import CompressorSpec
from lib.config import StudyError, load_profile
from lib.labels import label
from lib.models import ARCHITECTURES
from lib.plans.block_movement import COPIES, chunks, pruned, resident_bytes
from lib.plots import block_movement as plots
from lib.published import published
from lib.published_shapes import FILE, HEADLINE, distinct_shapes, published_shapes, shapes_frame
from lib.records import record_path, weights_folder
from lib.runs import ensure
from lib.specs import LatencyModel, LatencySpec, TrainSpec, needed_weights, parse_spec, spec_hash
from lib.speed_runs import build, run_latency
from lib.surgery import load_compressed

# Published shapes


def test_published_shapes_are_many_and_fit_their_models():
    shapes, frame = published_shapes(), shapes_frame()
    assert len(shapes) == len({shape.checkpoint for shape in shapes}) >= 40 and len(distinct_shapes()) >= 40
    assert {shape.model for shape in shapes} == {"bert-base-uncased", "bert-large-uncased"}
    by_name = {shape.name: shape.shapes for shape in shapes}
    assert all(by_name[shape.name] == shape.shapes for shape in shapes)  # one name, one shape
    assert (frame["density"] <= frame["stored density"] + 1.2).all()  # struct: their removal drops some weights
    filled = frame[frame["variant"] == "hybrid-filled"]
    assert (filled["density"] - filled["stored density"]).abs().max() < 1e-9


def test_the_headlines_shape_is_the_published_number():
    """Table 2 prints 3.94 and 2.76 as compression of two models; the README 74 % fewer weights for the headline's."""
    shapes = {shape.checkpoint: shape for shape in published_shapes()}
    headline = shapes[HEADLINE]
    assert (headline.f1, headline.speedup, sum(headline.heads)) == (87.709, 2.437, 64)
    total = 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert 100 * (1 - headline.stored_weights / total) == pytest.approx(73.805, abs=1e-3)
    table = published("lagunas2021", place="v1 Table 2", method="hybrid-filled", teacher="base", metric="compression")
    for checkpoint, weights in (("squad_v1-186", 21), ("squad_v1-189", 30)):
        printed = table[table["weights"] == weights]["value"].item()
        assert total / shapes[checkpoint].stored_weights == pytest.approx(printed, abs=5e-3)
    hybrid = next(shape for shape in shapes.values() if shape.name == headline.name and shape.variant == "hybrid")
    assert hybrid.shapes == headline.shapes and hybrid.weights < headline.weights == headline.stored_weights
    assert set(headline.attention_densities) == {1.0} and 0.3 < min(hybrid.attention_densities) < 0.8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row.replace(",hybrid,", ",rows,"), "line 2: variant: Input should be"),
        (lambda row: row.replace("7 5 9 9 11 10", "7 5 9 9 13 10"), "line 2: the row: .*heads: .*from 0 to 12"),
        (lambda row: row.replace("7 5 9 9 11 10", "7 5 9 9 11"), "line 2: the row: .*heads: expected 12 numbers"),
        (lambda row: row.replace("88.11", "881.1"), "line 2: f1: Input should be less than or equal to 100"),
        (lambda row: row.replace("721 829", "721 many"), "line 2: units.1"),
        (lambda row: row + ",more", "line 2: wrong number of columns"),
    ],
)
def test_a_damaged_list_of_shapes_names_the_line(tmp_path: Path, change, said):
    header, row = FILE.read_text(encoding="utf-8").splitlines()[:2]
    damaged = tmp_path / "shapes.csv"
    damaged.write_text(f"{header}\n{change(row)}\n", encoding="utf-8")
    with pytest.raises(StudyError, match=said):
        published_shapes(damaged)
    with pytest.raises(StudyError, match="not a readable CSV"):
        published_shapes(tmp_path / "absent.csv")


# Block-sparse execution


def test_blocks_that_are_missing_are_found_and_stored_as_such(small_model):
    model = small_model("bert", "sdpa")
    zero_blocks(model, (8, 8), [0.5, 0.25, 1.0, 0.0])
    for part, density in zip(attention_parts(model), (0.5, 0.25, 1.0, 0.0), strict=True):
        weights = torch.stack([part.query.weight, part.key.weight, part.value.weight, part.attention_output.weight])
        assert int((weights != 0).sum()) == round(64 * density) * 64
        assert (empty_block(part.query.weight) or 0) >= (8 if density < 1 else 0)
    assert empty_block(torch.ones(8, 8)) is None and empty_block(torch.eye(64)) is None
    sparse = copy.deepcopy(model)
    converted, total = to_block_sparse(sparse)
    assert converted >= 9 and total == 25  # three layers, but perhaps a matrix without an empty block
    assert stored_bytes(sparse) < stored_bytes(model)
    ids = torch.arange(5, 17).view(2, 6)
    with torch.inference_mode():
        assert torch.allclose(sparse(ids).start_logits, model(ids).start_logits, atol=1e-5)
    with pytest.raises(StudyError, match="3 densities for 4 layers"):
        zero_blocks(model, (8, 8), [0.5] * 3)
    with pytest.raises(StudyError, match="does not divide"):
        zero_blocks(model, (5, 8), [0.5] * 4)


def test_the_block_sparse_engine_agrees_and_says_what_it_did(small_model, tmp_path):
    model = small_model("bert")
    zero_blocks(model, (16, 16), [0.4] * 4)
    batches = [random_batch(2, 12, 60, 1, padding=5), random_batch(1, 7, 60, 2)]
    prepared = engines.prepare("pytorch-bsr-fp32", model, batches[0], 1, None, tmp_path)
    assert check_agreement(prepared, model, batches)["max_abs_diff"] < 1e-4
    assert "of 25 matrices block-sparse" in prepared.runs_on and prepared.size_bytes < stored_bytes(model)


def test_an_engine_without_mkl_says_so(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert "has no MKL" in str(engines.unavailable_reason("pytorch-bsr-fp32"))


def test_a_timed_model_has_the_blocks_that_its_spec_says():
    half = {"attention_block": (4, 4), "attention_densities": (0.5,) * 4}
    model = LatencyModel(architecture="tiny", shapes=((2, 8),) * 4, **half)
    built = build(model)
    for part in attention_parts(built):
        weights = [part.query.weight, part.key.weight, part.value.weight, part.attention_output.weight]
        assert sum(int((weight != 0).sum()) for weight in weights) == 2 * 8 * 32 * 4 // 2
    spec = LatencySpec(models={"dense": LatencyModel(architecture="tiny"), "half": model}, dense="dense", batch=1,
                       engines=("pytorch-fp32", "pytorch-bsr-fp32"), length=8, threads=1, rounds=1)  # fmt: skip
    rows = {row["name"]: row for row in run_latency(spec)["rows"]}
    assert "16 of 25" in rows["half/pytorch-bsr-fp32"]["runs_on"]
    assert "0 of 25" in rows["dense/pytorch-bsr-fp32"]["runs_on"]


# Plans


@pytest.mark.parametrize("name", ["smoke", "quick", "study", "paper"])
def test_plans_are_whole_and_read_back(name):
    profile = load_profile(name)
    for plan in ("block_movement", "published_shape_speed", "block_sparse_speed", "training_overhead"):
        specs = plans.PLANS[plan](profile)
        assert all(parse_spec(spec.model_dump(mode="json")) == spec for spec in specs)
    specs = plans.block_movement(profile)
    first = next(spec for spec in specs if isinstance(spec, TrainSpec) and spec.compressor)
    assert [frames.method_of(spec) for spec in specs[:3]] == ["dense", "hybrid", "hybrid-filled"]
    assert first.distillation is not None and (first.distillation.hard, first.distillation.logits) == (0.1, 0.9)
    assert first.teacher == specs[0] and specs[2].start == first
    hashes = [spec_hash(spec) for spec in specs]
    for spec in specs:  # what a run begins with or learns from is planned before it, wherever it is planned at all
        for needed in needed_weights(spec):
            if spec_hash(needed) in hashes:
                assert hashes.index(spec_hash(needed)) < hashes.index(spec_hash(spec))


def test_the_papers_profile_has_the_papers_settings():
    profile = load_profile("paper")
    spec = pruned(profile, "squad_v1", 0, "hybrid", profile.block_movement.strengths[0])
    settings = spec.compressor.settings
    assert settings == {"block": [32, 32], "score_learning_rate": 0.01, "final_lambda": 10, "ffn_lambda": 1}
    assert spec.training.epochs == 20 and spec.start is None
    struct = pruned(profile, "squad_v1", 0, "struct", (5, 0.2)).compressor.settings
    assert struct["variant"] == "struct" and struct["least_density"] == 0.2
    assert struct["attention_lambda"] == profile.block_movement.struct_attention_lambda
    large = pruned(profile, "squad_v1", 0, "hybrid-large", (10, 0))
    assert "large" in large.teacher.encoder and large.encoder == "bert-base-uncased"


def test_every_published_shape_is_timed_once_on_every_engine_within_the_memory(monkeypatch):
    monkeypatch.setattr(engines, "unavailable_reason", lambda engine: None)
    profile = load_profile("study")
    specs = plans.published_shape_speed(profile)
    wanted = set(distinct_shapes())
    for engine in profile.block_movement.shape_engines:
        runs = [spec for spec in specs if spec.engines == (engine,)]
        timed = [name for spec in runs for name in spec.models if not name.startswith("dense")]
        assert sorted(timed) == sorted(wanted)
        assert [name for spec in runs for name in spec.models].count("dense large") == 1
    for spec in specs:
        assert spec.dense == "dense" and spec.models["dense"] == LatencyModel(architecture="bert-base-uncased")
        assert sum(map(resident_bytes, spec.models.values())) < 16e9 and len(spec.models) > 1
    assert {spec.engines[0] for spec in specs[: len(profile.block_movement.shape_engines)]} == set(
        profile.block_movement.shape_engines
    )
    headline = next(shape for shape in published_shapes() if shape.checkpoint == HEADLINE)
    assert list(specs[0].models)[1] == headline.name


def test_engines_that_are_not_here_are_left_out_unless_recorded(study, monkeypatch):
    wanted = {"shape_engines": ("pytorch-fp32", "openvino-fp32")}
    both = study.model_copy(update={"block_movement": study.block_movement.model_copy(update=wanted)})
    monkeypatch.setattr(engines, "unavailable_reason", lambda engine: None)
    everywhere = plans.published_shape_speed(both)
    assert {spec.engines for spec in everywhere} == {("pytorch-fp32",), ("openvino-fp32",)}
    reason = "not available: package openvino is not installed"
    monkeypatch.setattr(engines, "unavailable_reason", lambda engine: reason if "openvino" in engine else None)
    here = plans.published_shape_speed(both)
    assert here == [spec for spec in everywhere if spec.engines == ("pytorch-fp32",)]
    elsewhere = next(spec for spec in everywhere if spec not in here)
    record = record_path(both, elsewhere)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.touch()
    assert elsewhere in plans.published_shape_speed(both)
    record.unlink()
    absent = frames.not_timed(wanted["shape_engines"], pd.DataFrame({"engine": ["pytorch-fp32"]}))
    assert absent == f"Engines left out: OpenVINO fp32 ({reason})."
    assert not frames.not_timed(["pytorch-fp32"], pd.DataFrame({"engine": ["pytorch-fp32"]}))


def test_resident_bytes_count_what_is_left():
    dense = LatencyModel(architecture="tiny")
    cut = LatencyModel(architecture="tiny", shapes=((1, 10),) * 4)
    config = ARCHITECTURES["tiny"]
    weights = 4 * (3 * 4 * 32 * 8 + 2 * 32 * (config.intermediate_size - 10))
    assert resident_bytes(dense) - resident_bytes(cut) == 4 * COPIES * weights
    groups = chunks({str(i): dense for i in range(5)}, 2 * resident_bytes(dense))
    assert [list(group) for group in groups] == [["0", "1"], ["2", "3"], ["4"]]
    assert [len(group) for group in chunks({"a": dense, "b": dense}, 1)] == [1, 1]


def test_labels_tell_variants_apart():
    profile = load_profile("smoke")
    names = [label(spec) for spec in plans.block_movement(profile)]
    assert "world_qa_block_movement_hybrid-4x4-lambda0.02_seed0" in names
    assert any("block-1x1-density0.4" in name and "magnitude" in name for name in names)


# Runs, frames, figures, verdicts


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    values: Any = small_profile(folder / "results")
    values["tasks"]["world_sentiment"] |= {"train_examples": 48}
    values["block_movement"] |= {
        "ablation_tasks": ["world_sentiment"], "block_sizes": [[8, 8]], "densities": [0.4], "variant_strengths": 1,
        "block_sparse_densities": [0.5], "translation_tasks": ["world_translation"],
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_profile(folder / "tiny.yaml")


@pytest.fixture(scope="module")
def records(study):
    return ensure(plans.block_movement(study), study)


def test_frame_of_the_runs(study, records):
    frame = frames.block_frame(records)
    methods = {"dense", "hybrid", "hybrid-filled", "struct", "block", "hybrid-top-k", "movement", "magnitude",
               "hybrid-alone", "dense-distilled"}  # fmt: skip
    assert set(frame["method"]) == methods and methods <= set(figures.METHODS)
    assert not records.missing and len(frame) == len(records)
    assert (frame["density"] <= frame["stored"] + 1e-9).all()
    dense = frame[frame["method"] == "dense"]
    assert set(dense["density"]) == {100.0} and set(dense["task"]) == {"world_sentiment", "world_translation"}
    for name, density in (("movement", 40), ("magnitude", 40)):
        assert frame[frame["method"] == name]["density"].item() == pytest.approx(density, abs=1.0)
    hybrid, filled = (frames.find(records, method=name)[0] for name in ("hybrid", "hybrid-filled"))
    assert frames.strength_of(filled.spec) == frames.strength_of(hybrid.spec) == (0.01, (4, 4))
    assert filled["compression"]["density"] == filled["compression"]["stored_density"]
    assert filled["compression"]["heads"] == hybrid["compression"]["heads"]
    assert set(frame[frame["method"] == "struct"]["block"]) == {"whole heads"}
    floored = frames.block_frame([*records, *ensure(plans.majority(study), study)])
    assert floored.groupby("task")["floor"].first().notna().to_dict() == {
        "world_sentiment": True,
        "world_translation": False,
    }
    empty = frames.block_frame([])
    assert empty.empty and {"retained", "method", "score", "informative", "held"} <= set(empty)
    assert frames.at_block(empty, "4 × 4").empty and frames.block_trials(empty, ["4 × 4"]).empty


def test_runs_at_the_least_density_and_what_is_filled_from_them_are_marked(records):
    hybrid = frames.find(records, method="hybrid", block=(4, 4))[0]
    history = [*hybrid["compression"]["history"][:-1], hybrid["compression"]["history"][-1] | {"held": ["ffn"]}]
    result = hybrid.result | {"compression": hybrid["compression"] | {"history": history}}
    held = [record.model_copy(update={"result": result}) if record is hybrid else record for record in records]
    frame = frames.block_frame(held)
    assert set(frame[frame["held"]]["method"]) == {"hybrid", "hybrid-filled"}
    assert not frames.block_frame(records)["held"].any()
    assert frames.held_count(frame[frame["method"] == "hybrid"]["held"]) == "1 of 2"
    fig, _ = plots.score_against_density(frames.at_block(frame, "4 × 4"), frames.published_curves())
    assert "Least density held" in {text.get_text() for text in fig.legends[0].get_texts()}


def test_a_filled_model_is_kept_and_runs(study, records):
    filled = frames.find(records, method="hybrid-filled")[0]
    model, _ = load_compressed(weights_folder(study, filled.spec))
    assert [part.heads for part in attention_parts(model)] == filled["compression"]["heads"]


def test_histories_and_survivors(records):
    record = frames.find(records, method="hybrid")[0]
    history = frames.history_frame(record)
    assert history["progress"].is_monotonic_increasing and history.iloc[-1]["progress"] == 1
    counts, progress, edges = frames.score_counts(record, "attention")
    assert counts.shape == (len(progress), len(edges) - 1) and set(counts.sum(1)) == {4 * 4 * 64}
    heads, _ = frames.alive(record, "heads")
    kept = frames.survivors(record)
    assert heads[-1].tolist() == kept[kept["kind"] == "heads"]["kept"].tolist() == record["compression"]["heads"]
    assert frames.part_densities(record).shape == (6, 4)


def test_speed_of_trained_shapes_and_of_blocks(study, records):
    specs = plans.trained_speed(study, records)
    trained = [record for record in records if isinstance(record.spec, TrainSpec) and record.spec.compressor]
    assert len(specs) == 1 and set(specs[0].models) == {"dense", *(record.hash for record in trained)}
    assert plans.trained_speed(study, []) == []
    assert plans.trained_speed(study.model_copy(update={"encoder": "some/hub-name"}), records) == []
    frame = frames.block_frame(records)
    speed = latency_frame(ensure(specs, study))
    _, rows = plots.score_against_speed(frame, speed, frames.published_curves())
    assert len(rows) == len(trained) and rows["ratio_to_dense"].gt(0).all()
    sparse = latency_frame(ensure(plans.block_sparse_speed(study), study))
    assert set(sparse["model"]) == {"dense", "all blocks", "50 % of blocks"}
    cost = training_speed_frame(ensure([plans.training_overhead(study)], study))
    assert list(cost["name"]) == ["dense", "hybrid", "block", "movement", "magnitude"]


def test_figures_are_drawn_from_records(records):
    frame, theirs = frames.block_frame(records), frames.published_curves()
    task = frame[frame["task"] == "world_sentiment"]
    record = frames.find(records, method="hybrid")[0]
    one_size = frames.at_block(frame, "4 × 4")
    drawn = {
        "density": plots.score_against_density(one_size, theirs),
        "survivors": plots.what_survives({"one": record}, 4, 64),
        "scores": plots.scores_in_training(record),
        "deaths": plots.deaths_in_training(record),
        "blocks": plots.block_sizes(frames.block_trials(frame, ["4 × 4", "8 × 8"]), ["4 × 4", "8 × 8"]),
    }
    for name, (fig, rows) in drawn.items():
        assert len(rows) and fig.axes, name
    assert set(drawn["blocks"][1]["block"]) == {"4 × 4", "8 × 8"}
    fig, rows = drawn["density"]
    assert len(fig.axes) == 4  # a row of panels per task
    shown = rows[~rows["published"].astype(bool) & (rows["title"] == task["title"].iloc[0])]
    assert set(shown["method"]) == set(task["method"]) - {"dense", "dense-distilled"}
    assert drawn["survivors"][1]["share"].between(0, 100).all()


def timed(ratio: float) -> pd.DataFrame:
    """All shapes as if every engine gave ``ratio`` times the published speed-up."""
    frame = shapes_frame()
    conditions = {"batch": 1, "length": 384, "threads": 2, "cpu": "a CPU", "n": 5, "median_ms": 10.0}
    speed = ratio * frame["speedup"]
    ours = frame.assign(ours=speed, ratio_q1=speed, ratio_q3=speed, **conditions)
    return pd.concat([ours.assign(engine=engine) for engine in ("pytorch-fp32", "openvino-bf16")], ignore_index=True)


def test_speed_summary_and_the_main_figure():
    summary = frames.speed_summary(timed(0.8))
    assert summary["ours / published"].round(9).eq(0.8).all() and summary["rank correlation"].round(9).eq(1).all()
    assert (summary["shapes"] == len(distinct_shapes())).all()
    fig, rows = plots.published_speed(timed(0.8))
    assert len(rows) == 2 * len(published_shapes()) and len(fig.axes) == 2


def made(**rows: Any) -> pd.DataFrame:
    """A frame of runs on one task and two seeds: method -> (retained, density, stored)."""
    frame = pd.DataFrame([
        {"hash": f"{name}{seed}", "task": "world_sentiment", "title": "World sentiment", "seed": seed,
         "method": name.replace("_", "-"), "strength": 10.0, "block": "4 × 4", "retained": retained + 0.1 * seed,
         "score": retained, "density": density, "stored": stored, "constant": False, "held": False,
         "informative": True}
        for name, (retained, density, stored) in rows.items() for seed in (0, 1)
    ])  # fmt: skip
    return frame


def verdicts(frame: pd.DataFrame, speed: pd.DataFrame) -> dict[str, str]:
    table = claims_of.verdicts("world_sentiment", frame, speed, pd.DataFrame())
    return dict(zip(table["claim"], table["verdict"], strict=True))


def test_verdicts_follow_the_numbers():
    good = made(dense=(100, 100, 100), hybrid=(97, 18, 26), hybrid_filled=(99, 26, 26), struct=(95, 17, 17),
                movement=(98, 20, 99), hybrid_alone=(95, 18, 26))  # fmt: skip
    found = verdicts(good, timed(0.95))
    assert list(found.values())[:7] == ["holds"] * 7
    bad = made(dense=(100, 100, 100), hybrid=(90, 18, 26), hybrid_filled=(89, 26, 26), struct=(95, 17, 17),
               movement=(80, 20, 99), hybrid_alone=(92, 18, 26))  # fmt: skip
    found = verdicts(bad, timed(0.5))
    assert list(found.values())[1:7] == ["does not hold here"] * 6
    nothing = list(verdicts(frames.block_frame([]), pd.DataFrame()).values())
    assert nothing[0] == "holds" and set(nothing[1:]) == {"not run yet"}


def test_models_that_give_one_answer_are_not_compared():
    frame = made(dense=(100, 100, 100), hybrid=(90, 18, 26), movement=(88, 20, 99))
    claim = "Single weights (movement) keep a little more than hybrid blocks"
    for lost, ours in ((1, "-2.0 points, a single pair"), (2, "nothing to compare")):
        frame["constant"] = (frame["method"] == "movement") & (frame["seed"] < lost)
        row = claims_of.verdicts("world_sentiment", frame, pd.DataFrame(), pd.DataFrame()).set_index("claim").loc[claim]
        assert row["ours"] == ours and row["evidence"].endswith(
            f"{lost} of 2 models of the rival give one answer for all" + "; n = 1" * (lost == 1)
        )


def test_tasks_near_their_floor_are_left_out_of_the_verdicts_and_named():
    good = made(dense=(100, 100, 100), hybrid=(97, 18, 26), hybrid_filled=(99, 26, 26), struct=(95, 17, 17),
                movement=(98, 20, 99), hybrid_alone=(95, 18, 26))  # fmt: skip
    bad = made(dense=(100, 100, 100), hybrid=(97, 18, 26), hybrid_filled=(70, 26, 26), struct=(99, 17, 17),
               movement=(80, 20, 99), hybrid_alone=(99, 18, 26))  # fmt: skip
    dull = bad.assign(task="world_qa2", title="Dull", informative=False)
    alone = claims_of.verdicts("world_sentiment", good, pd.DataFrame(), pd.DataFrame())
    found = claims_of.verdicts("world_sentiment", pd.concat([good, dull]), pd.DataFrame(), pd.DataFrame())
    assert found[["verdict", "ours"]].equals(alone[["verdict", "ours"]])
    named = found["evidence"].str.contains(r"left out, dense close to one answer for all: Dull(?:; n = 2)?$")
    assert list(found["claim"][named]) == list(found["claim"][3:7]) and not alone["evidence"].str.contains("Dull").any()
    only = claims_of.verdicts("world_qa2", dull, pd.DataFrame(), pd.DataFrame()).iloc[2:7]
    assert set(only["verdict"]) == {"not testable here"} and set(only["ours"]) == {"no task to judge by"}
    assert only["evidence"].str.startswith("left out, dense close").all()


def test_the_headline_says_where_the_least_density_held():
    frame = made(dense=(100, 100, 100), hybrid=(97, 18, 26), hybrid_filled=(99, 26, 26), hybrid_alone=(95, 18, 26))
    frame["held"] = frame["method"].str.startswith("hybrid") & (frame["seed"] == 0)
    table = claims_of.verdicts("world_sentiment", frame, pd.DataFrame(), pd.DataFrame()).set_index("claim")["evidence"]
    for claim in ("It loses 1 % of its F1", "A teacher helps"):
        assert "in 1 of 2 the least density held" in table[claim]


def test_filling_prints_the_measured_speed_of_its_pairs():
    frame = made(dense=(100, 100, 100), hybrid=(97, 18, 26), hybrid_filled=(99, 26, 26))
    conditions = {"cpu": "a CPU", "batch": 1, "length": 384, "threads": 2}
    own = pd.DataFrame([
        {"model": f"{name}{seed}", "engine": engine, "median_ms": ms, **conditions}
        for engine, quick in (("pytorch-fp32", 8.0), ("openvino-fp32", 12.5))
        for seed in (0, 1) for name, ms in (("hybrid", 10.0), ("hybrid_filled", quick))
    ])  # fmt: skip
    claim = "Filling the zeros again gains quality at the same speed"
    said = claims_of.verdicts("world_sentiment", frame, pd.DataFrame(), own).set_index("claim")["evidence"][claim]
    assert "speed of 2 pairs: filled is 0.80 to 1.25 × as fast as hybrid, 2 engines on a CPU" in said
    other = own[own["model"] != "hybrid0"]
    said = claims_of.verdicts("world_sentiment", frame, pd.DataFrame(), other).set_index("claim")["evidence"][claim]
    assert "speed of 1 pair: " in said
    said = claims_of.verdicts("world_sentiment", frame, pd.DataFrame(), own[:0]).set_index("claim")["evidence"][claim]
    assert "the speed of no pair is measured" in said


def several_sizes() -> pd.DataFrame:
    """Hybrid models with blocks of three sizes, of which one has a seed that the others lack, and the control."""
    hybrid = made(hybrid=(90, 40, 50))
    sizes = [hybrid, hybrid.assign(block="8 × 8", retained=80.0)[1:], hybrid.assign(block="2 × 2", retained=70.0)[1:]]
    strong = hybrid.assign(strength=40.0, retained=60.0, block="4 × 4")
    control = made(dense_distilled=(95, 100, 100)).assign(strength=float("nan"), block="0 × 0")
    return pd.concat([*sizes, strong, control], ignore_index=True)


def test_block_sizes_are_compared_on_the_seeds_and_the_strength_that_all_have():
    frame = several_sizes()
    trials = frames.block_trials(frame, ["2 × 2", "4 × 4", "8 × 8"])
    assert set(trials["seed"]) == {1} and set(trials["strength"]) == {10.0} and len(trials) == 3
    _, rows = plots.block_sizes(trials, ["2 × 2", "4 × 4", "8 × 8"])
    assert rows.set_index("block")["retained"].to_dict() == {"2 × 2": 70.0, "4 × 4": pytest.approx(90.1), "8 × 8": 80.0}
    assert set(rows["n"]) == {1}
    twice = pd.concat([trials, trials.assign(seed=2, retained=trials["retained"] + 4)])
    fig, rows = plots.block_sizes(twice, ["8 × 8"])
    eights = rows[rows["block"] == "8 × 8"]
    assert eights[["low", "retained", "high", "n"]].values.tolist() == [[80, 82, 84, 2]]
    ends = [bar.get_segments()[0][:, 1].tolist() for ax in fig.axes for bar in ax.collections if bar.get_segments()]
    assert ends == [[80, 84]] * 2
    assert frames.block_trials(frame, ["4 × 4"]).empty


def test_the_control_is_compared_with_one_block_at_the_first_strength():
    frame = several_sizes()
    pairs = frames.beside_control(frame, "4 × 4")
    assert list(pairs["seed"]) == [0, 1] and pairs["lead"].tolist() == [pytest.approx(-5)] * 2
    assert list(frames.beside_control(frame, "8 × 8")["lead"]) == [pytest.approx(-15.1)]
    assert frames.beside_control(frame[frame["method"] == "hybrid"], "4 × 4").empty
    kept = frames.at_block(frame, "8 × 8")
    assert set(kept["block"]) == {"8 × 8", "0 × 0"}


def test_pairs_of_other_density_say_so():
    far = made(dense=(100, 100, 100), hybrid=(97, 18, 26), struct=(95, 40, 40), hybrid_alone=(95, 40, 50))
    table = claims_of.verdicts("world_sentiment", far, pd.DataFrame(), pd.DataFrame()).set_index("claim")["ours"]
    blocks = "Small blocks keep more than whole heads, at the same density"
    assert table[blocks] == "no pair of like density; they differ by 22 points at least"
    assert table["A teacher helps"] == "no pair of like density"


def test_a_model_that_is_not_small_enough_proves_nothing():
    mild = made(dense=(100, 100, 100), hybrid=(99, 60, 80), hybrid_filled=(100, 80, 80), struct=(99, 20, 20))
    found = verdicts(mild, pd.DataFrame())
    assert found["It loses 1 % of its F1"] == "not testable here"
    assert found["Small blocks keep more than whole heads, at the same density"] == "not testable here"


# The benchmark command


def test_overhead_command(capsys):
    assert benchmark(["overhead", "--profile", "smoke", "--threads", "1", "--rounds", "1", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "tiny, batch 2, 16 tokens" in out and all(name in out for name in ("dense", "hybrid", "movement"))
    assert benchmark(["overhead", "--rounds", "0"]) == 2
    assert "--rounds: found 0, expected 1 or more" in capsys.readouterr().err


def test_a_compressor_for_a_model_that_is_not_timed_is_refused(study):
    from lib.speed_runs import run_training_speed

    spec = plans.training_overhead(study)
    strange = spec.model_copy(update={"compressors": {"other": CompressorSpec(name="block_movement")}})
    with pytest.raises(StudyError, match="compressor for 'other', which is not among dense"):
        run_training_speed(strange)


@pytest.mark.parametrize(
    ("leads", "word"),
    [
        ([1.5, 2.0, 2.5], "holds"),
        ([1.0, 2.0, 3.0], "cannot tell: the interval holds zero"),
        ([-1.5, -2.0, -2.5], "does not hold here"),
        ([-3.1, 0.2, 4.4], "cannot tell: the interval holds zero"),
        ([4.4], "too few seeds to tell (n = 1)"),
    ],
)
def test_a_lead_whose_interval_holds_zero_decides_nothing(leads, word):
    pairs = pd.DataFrame({"task": "mrpc", "seed": range(len(leads)), "lead": leads, "held": False})
    assert claims_of._difference("a claim", "+1", pairs, "seeds")["verdict"] == word
