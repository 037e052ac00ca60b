"""Notebook 08's arithmetic by hand, and a small series of compounds from training to an exported folder."""

import errno
import itertools
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from transformers import AutoModel

from lib import figures, frontier, plans, recipes
from lib.blocks import dense_weights
from lib.compressors import COMPRESSORS, CompressorSpec
from lib.config import StudyError, load_profile
from lib.models import load_config, load_model
from lib.plans.frontier import FACTORS, HYBRID, latency_model, recipe_name
from lib.records import weights_folder
from lib.runs import ensure
from lib.specs import EngineQualitySpec, TrainSpec, dense_spec, spec_hash
from lib.surgery import load_compressed

LONGER = "2 layers dropped; 50 % heads, 25 % units cut; 2 epochs"
QA = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 64, "stride": 16, "train_examples": 24,
      "eval_examples": 8}  # fmt: skip


def test_pareto_by_hand():
    frame = pd.DataFrame({"cost": [1, 2, 2, 3, 4, np.nan], "value": [10, 30, 20, 25, 31, 99.0]})
    assert frontier.pareto(frame, "cost", "value")["value"].tolist() == [10, 30, 31]
    assert frontier.pareto(frame.iloc[:0], "cost", "value").empty


MEANS = pd.DataFrame({
    "recipe": ["dense", "small", "tiny", "small"], "engine": ["a", "a", "a", "b"], "retained": [100, 97, 80, 99.0],
    "speed": [2.0, 5.0, 9.0, 4.0], "ms": [4.0, 2, 1, 2.5], "size (MB)": [9.0, 5, 2, 5], "n": [3, 3, 3, 1],
})  # fmt: skip


def test_decisions_take_the_fastest_within_the_loss():
    table = recipes.decisions(MEANS, [2.0, 5.0, 0.5, 7.5])
    taken = {(row["engine"], row["loss accepted (%)"]): row["take"] for row in table.to_dict("records")}
    assert taken == {
        ("any", "0.5"): "dense, on a", ("any", "2.0"): "small, on b", ("any", "5.0 to 7.5"): "small, on a",
        ("a", "0.5 to 2.0"): "dense", ("a", "5.0 to 7.5"): "small",
        ("b", "0.5"): recipes.NOTHING, ("b", "2.0 to 7.5"): "small",
    }  # fmt: skip
    there = table.set_index(["engine", "take"])["× dense there"]
    assert there[("a", "small")] == 2 and there[("any", "small, on a")] == 2 and there[("any", "dense, on a")] == 1
    assert np.isnan(there[("b", "small")]), "the dense model was not timed on b"
    assert recipes.taken(table) == ["dense", "small"]
    twin = pd.concat([MEANS, MEANS.iloc[[1]].assign(recipe="twin", retained=98)], ignore_index=True)
    assert recipes.decisions(twin, [5.0])["take"].tolist()[0] == "twin, on a", "as fast, and better"
    untimed = recipes.decisions(MEANS.assign(speed=np.nan), [2.0])
    assert untimed.columns.tolist() == table.columns.tolist() and untimed["ms"].isna().all()
    assert set(untimed["take"]) == {recipes.NOT_TIMED} and recipes.taken(untimed) == []


def test_what_keeps_most_within_a_latency():
    table = recipes.within_latency(MEANS, [4.0, 0.5, 2.0, 3.0])
    taken = {(row["engine"], row["at most (ms)"]): row["take"] for row in table.to_dict("records")}
    assert taken == {
        ("any", "0.5"): recipes.NOTHING, ("any", "2"): "small, on a", ("any", "3"): "small, on b",
        ("any", "4"): "dense, on a", ("a", "0.5"): recipes.NOTHING, ("a", "2 to 3"): "small", ("a", "4"): "dense",
        ("b", "0.5 to 2"): recipes.NOTHING, ("b", "3 to 4"): "small",
    }  # fmt: skip


def test_every_processor_has_choices_of_its_own():
    means = pd.concat([
        MEANS.assign(processor="slow"), MEANS.assign(processor="fast", speed=3 * MEANS["speed"], ms=MEANS["ms"] / 3),
    ], ignore_index=True)  # fmt: skip
    table = recipes.on_each(means, lambda rows: recipes.decisions(rows, [5.0]))
    assert table.columns[0] == "processor" and table["processor"].unique().tolist() == ["slow", "fast"]
    alone = recipes.decisions(MEANS, [5.0])
    for name, factor in (("slow", 1), ("fast", 3)):
        part = table[table["processor"] == name].drop(columns="processor").reset_index(drop=True)
        scaled = alone.assign(ms=alone["ms"] / factor, **{"speed ×": factor * alone["speed ×"]})
        pd.testing.assert_frame_equal(part, scaled)
    assert recipes.targets(MEANS) == [4.0, 3.0, 2.0, 1.6, 4 / 3] and recipes.targets(MEANS[:0]) == []
    timely = recipes.on_each(means, lambda rows: recipes.within_latency(rows, recipes.targets(rows)[:1]))
    assert timely.drop_duplicates("processor")["at most (ms)"].tolist() == ["4", "1.33"]
    untimed = means.assign(ms=np.nan, speed=np.nan)
    assert recipes.on_each(untimed, lambda rows: recipes.within_latency(rows, recipes.targets(rows))).empty


def test_recipes_timed_on_two_processors_have_rows_for_both(series):
    study, records, (timed,) = series
    faster = [row | {"median_ms": row["median_ms"] / 2} for row in timed["rows"]]
    other = timed.model_copy(update={
        "spec": timed.spec.model_copy(update={"instructions": "amx_tile"}),
        "result": {**timed.result, "rows": faster}, "hardware": {**timed.hardware, "cpu": "another", "gpu": "a GPU"},
    })  # fmt: skip
    both = recipes.over_seeds(recipes.by_seed(study, records, [timed, other]))
    alone = recipes.over_seeds(recipes.by_seed(study, records, [timed]))
    assert both["processor"].unique().tolist() == [timed.processor, other.processor] and len(both) == 2 * len(alone)
    assert other.processor.startswith("another")
    first, second = both[: len(alone)], both[len(alone) :].reset_index(drop=True)
    pd.testing.assert_frame_equal(first, alone)
    np.testing.assert_allclose(second["ms"], first["ms"] / 2)
    assert second["retained"].tolist() == first["retained"].tolist()
    assert recipes.by_seed(study, records, [])["processor"].unique().tolist() == [""]


@pytest.mark.parametrize(
    ("changes", "waiting", "outcome"),
    [
        ({}, 0, "reached"),
        ({"n": 1}, 0, "reached on 1 seed alone"),
        ({"speed q1": 9.9}, 0, "reached by the median over rounds, not by the lower quartile"),
        ({"retained": 97.9}, 0, "missed"),
        ({"retained": 97.9}, 2, "not reached yet, 2 recipes not measured"),
    ],
)
def test_an_aim_is_reached_by_what_keeps_enough_and_says_what_that_rests_on(changes, waiting, outcome):
    fast = {"recipe": "fast", "engine": "a", "retained": 98.5, "speed": 12.0, "speed q1": 11.0, "ms": 2.0, "n": 2}
    slow = {"recipe": "slow", "engine": "b", "retained": 99.0, "speed": 4.0, "speed q1": 3.9, "ms": 6.0, "n": 2}
    dense = {"recipe": "dense", "engine": "a", "retained": 100.0, "speed": 1.0, "speed q1": 1.0, "ms": 5.0, "n": 2}
    fast |= changes
    first, second = recipes.aims(pd.DataFrame([fast, slow, dense]), waiting).to_dict("records")
    assert second["× dense there"] == 2.5, "on its own engine"
    assert first["aim"].startswith("10 ×") and first["outcome"] == outcome
    kept = fast["retained"] >= 98
    assert first["fastest within the loss"] == ("fast, on a" if kept else "slow, on b")
    assert first["best at that speed (%)"] == fast["retained"]
    assert second["outcome"] == (outcome if waiting else "missed") and second["fastest within the loss"] == "fast, on a"
    assert np.isnan(second["best at that speed (%)"]), "nothing is 29 times faster"


def test_names_of_recipes():
    assert recipe_name(0, 1.0, 1.0) == "dense"
    assert recipe_name(1, 1.0, 1.0) == "1 layer dropped"
    assert recipe_name(2, 0.474, 0.348) == "2 layers dropped; 53 % heads, 65 % units cut"
    assert recipe_name(2, 0.5, 0.75, 2.0) == LONGER


def test_a_longer_distillation_changes_its_own_epochs_alone(series):
    study, records, _ = series
    made = plans.recipes(study, 0)
    longer, plain = made[LONGER], made["2 layers dropped; 50 % heads, 50 % units cut"]
    assert (longer.training.epochs, plain.training.epochs) == (2, study.structured_pruning.retrain_epochs)
    assert longer.start == plain.start and longer.distillation == plain.distillation
    steps = {record.hash: record["training"]["steps"] for record in records if "training" in record.result}
    assert steps[spec_hash(longer)] == 2 * steps[spec_hash(plain)]
    changes = {"distilled_longer": ((2, 1.0, 1.0, 2.0),)}
    with pytest.raises(StudyError, match=r"distilled_longer: .* cuts nothing"):
        plans.recipes(study.model_copy(update={"frontier": study.frontier.model_copy(update=changes)}), 0)


def test_recipes_may_have_seeds_of_their_own_and_those_distilled_for_longer_come_first():
    study = load_profile("study", tasks=["squad_v1"])
    settings = study.frontier.model_copy(update={"seeds": {"squad_v1": 2}, "task": "squad_v1"})
    study = study.model_copy(update={"frontier": settings})
    plan = plans.frontier(study)
    seeds = [spec.seed for spec in plan if isinstance(spec, TrainSpec)]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1} and study.task_seeds("squad_v1") == (0,)
    measured = [spec_hash(spec.start) for spec in plan if isinstance(spec, EngineQualitySpec)]
    order = sorted(plans.recipes(study, 1).items(), key=lambda item: measured.index(spec_hash(item[1])))
    longer = [recipe_name(*compound) for compound in settings.distilled_longer]
    assert [name for name, _ in order][: 1 + len(longer)] == ["dense", *longer]
    one = load_profile("study", tasks=["squad_v1"], seeds=[5])
    assert plans.recipe_seeds(one) == (5,)


@pytest.mark.parametrize(("point", "densities"), [((1, 0.5), {"units": 0.5}), ((0.5, 1), {"heads": 0.5})])
def test_a_point_may_leave_heads_or_units_whole(profile_file, point, densities):
    study = load_profile(profile_file(**{"frontier.task": "world_sentiment", "frontier.operating_points": [point]}))
    (recipe,) = [spec for name, spec in plans.recipes(study, 0).items() if "layer" not in name and "cut" in name]
    assert recipe.compressor.settings["densities"] == densities


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """A tiny profile with two seeds, its frontier's records and timings."""
    from conftest import small_profile
    from yaml import safe_dump

    folder = tmp_path_factory.mktemp("frontier")
    values = small_profile(folder / "results")
    values["tasks"] = {"world_qa": QA}
    values["frontier"] |= {"operating_points": [[1, 1], [0.5, 0.5]], "block_movement": True, "kronecker": ["kron8"]}
    values["frontier"]["distilled_longer"] = [[2, 0.5, 0.75, 2]]
    (folder / "tiny.yaml").write_text(safe_dump(values), encoding="utf-8")
    study = load_profile(folder / "tiny.yaml")
    records = ensure(plans.frontier(study), study)
    return study, records, ensure(plans.recipe_latency(study, list(records)), study)


def test_compounds_are_trained_measured_and_timed(series):
    study, records, timed = series
    names = list(plans.recipes(study, 0))
    assert len(names) == 7 and names[0] == "dense" and names[4:] == [LONGER, HYBRID, f"{FACTORS}kron8"]
    rows = recipes.by_seed(study, records, timed)
    engines = list(dict.fromkeys([study.frontier.reference, *study.frontier.engines]))
    assert rows[["recipe", "engine"]].apply(tuple, axis=1).tolist() == list(itertools.product(names, engines))
    assert (rows["speed"] > 0).all() and (rows["size (MB)"] > 0).all()
    dense = next(record for record in records if record.hash == spec_hash(dense_spec(study, "world_qa", 0)))
    kept = 100 * rows["score"] / dense["score"]
    np.testing.assert_allclose(rows["retained"], kept)
    assert {row["dense"] for record in timed for row in record["rows"]} == {"dense/pytorch-fp32"}
    smallest = timed[0]["models"][names[3]]
    assert smallest["layers"] == 2 and smallest["shapes"] is not None
    assert timed[0]["models"][f"{FACTORS}kron8"]["parameters"] < timed[0]["models"]["dense"]["parameters"]


def test_timed_shapes_are_the_trained_ones(series):
    study, records, _ = series
    done = {record.hash: record for record in records}
    for name, spec in plans.recipes(study, 0).items():
        if name.startswith(FACTORS):
            continue
        record = done[spec_hash(spec)]
        model = latency_model(record, "tiny")
        assert [list(shape) for shape in model.shapes] == record["model"]["shapes"], name
        assert len(model.drop) == 4 - record["model"]["layers"], name


def test_records_of_own_files_that_this_run_does_not_name_are_no_rows(series, monkeypatch):
    study, *_ = series
    records, known = frontier.all_records(study), dict(frontier.TASKS)
    del known["world_qa"]
    monkeypatch.setattr(frontier, "TASKS", known)
    assert frontier.overview(records).empty


def test_a_dense_model_that_gets_nothing_right_has_no_shares():
    assert np.isnan(frontier.share(3.0, 0.0)) and frontier.share(3.0, 4.0) == 75


def test_overview_counts_families_and_the_cost_of_the_whole_chain(series):
    study, records, _ = series
    frame = frontier.overview([r for r in frontier.all_records(study) if not isinstance(r.spec, EngineQualitySpec)])
    assert set(frame["family"]) == {
        "Poor Man's BERT", "Structured pruning", "Compound", "Block movement", "KroneckerBERT"
    }  # fmt: skip
    training = {record.hash: record.result.get("training", {"seconds": 0, "threads": 1}) for record in records}
    seconds = {hash_: about["seconds"] * about["threads"] for hash_, about in training.items()}
    dropped = frame[frame["family"] == "Poor Man's BERT"].iloc[0]
    dense = seconds[spec_hash(dense_spec(study, "world_qa", 0))]
    assert dropped["cost (core-min)"] == pytest.approx((seconds[dropped["hash"]] + dense) / 60)
    thinned = frame[frame["family"] != "Block movement"]  # whose few steps here prune nothing yet
    assert (thinned["weights kept (%)"] < 100).all() and (frame["weights kept (%)"] <= 100).all()
    points = frontier.by_configuration(frame)
    assert len(points) == len(frame) and (points["n"] == 1).all()


def test_shares_refer_to_the_dense_model_without_a_teacher_whatever_the_order(series):
    """A dense model distilled from a dense one is a rival of a paper, not what shares refer to."""
    study, records, _ = series
    dense = dense_spec(study, "world_qa", 0)
    taught = dense.model_copy(update={"teacher": dense})
    base = next(record for record in records if record.hash == spec_hash(dense))
    result = {**base.result, "score": 2 * base["score"] + 1}
    other = base.model_copy(update={"hash": spec_hash(taught), "spec": taught, "result": result})
    pruned = next(record for record in records if record.hash == spec_hash(plans.recipes(study, 0)["2 layers dropped"]))
    for order in ([base, other, pruned], [other, base, pruned], [pruned, base, other]):
        (row,) = frontier.overview(order).to_dict("records")
        assert row["retained"] == pytest.approx(frontier.share(pruned["score"], base["score"]), nan_ok=True)


def test_shares_refer_to_the_dense_model_of_the_same_encoder(series):
    """A large teacher's record, or a folder that another encoder was tried in, lies beside."""
    study, records, _ = series
    base = next(record for record in records if record.hash == spec_hash(dense_spec(study, "world_qa", 0)))
    large = base.spec.model_copy(update={"encoder": "bert-large-uncased"})
    other = base.model_copy(update={"hash": spec_hash(large), "spec": large})
    pruned = next(record for record in records if record.hash == spec_hash(plans.recipes(study, 0)["2 layers dropped"]))
    (row,) = frontier.overview([base, other, pruned]).to_dict("records")
    assert row["dense (MB)"] == base["model"]["size_bytes"] / 1e6
    assert frontier.overview([other, pruned]).empty
    engine = next(r for r in frontier.all_records(study) if isinstance(r.spec, EngineQualitySpec))
    assert frontier.of_encoder([base, other, pruned, engine], study.encoder) == [base, pruned, engine]


def test_recipes_are_timed_at_the_size_of_ones_own_encoder(series, tmp_path):
    study, records, _ = series
    for layers, timed in ((4, "tiny"), (5, None)):
        config = load_config("tiny-bert")
        config.num_hidden_layers = layers
        AutoModel.from_config(config).save_pretrained(tmp_path / str(layers))
        own = study.model_copy(update={"encoder": str(tmp_path / str(layers))})
        found = [model.architecture for spec in plans.recipe_latency(own, records) for model in spec.models.values()]
        assert set(found) == ({timed} if timed else set())


def test_every_run_of_a_chain_costs_once(series):
    """The gates of a cut model start from the same model with layers dropped, and learn from the same dense one."""
    study, records, _ = series
    by_hash = {record.hash: record for record in records}
    recipe = plans.recipes(study, 0)["2 layers dropped; 50 % heads, 50 % units cut"]
    chain, waiting = set(), [recipe]
    while waiting:
        spec = waiting.pop()
        chain.add(spec_hash(spec))
        waiting += [other for other in (spec.start, spec.teacher, *spec.informed_by) if other is not None]
    assert len(chain) == 5, "dense, layers dropped, gates on heads and on units, and the recipe itself"
    by_hand = sum(by_hash[key]["training"]["seconds"] * by_hash[key]["training"]["threads"] for key in chain)
    assert frontier.training_cost(by_hash[spec_hash(recipe)], by_hash) == pytest.approx(by_hand)
    without = {key: record for key, record in by_hash.items() if key != spec_hash(recipe.informed_by[0])}
    assert np.isnan(frontier.training_cost(by_hash[spec_hash(recipe)], without))


def test_recipes_of_one_shape_share_their_times(series):
    *_, (record,) = series
    first, other = "dense", "3 layers dropped"
    spec = record.spec.model_copy(update={"models": {**record.spec.models, other: record.spec.models[first]}})
    rows = [row for row in record["rows"] if row["model"] != other]
    dense = next(row for row in rows if row["model"] == first and row["engine"] == "pytorch-fp32")
    slower = {"median_ms": dense["median_ms"] + 2, "ratio_to_dense": 0.5, "ratio_q1": 0.4, "ratio_q3": 0.6}
    twin = record.model_copy(update={"spec": spec, "result": {"rows": [*rows, {**dense, **slower, "model": other}]}})
    found = recipes.timing(twin)
    assert found[first, "pytorch-fp32"] == found[other, "pytorch-fp32"]
    assert found[first, "pytorch-fp32"]["ms"] == pytest.approx(dense["median_ms"] + 1)
    assert (found[first, "pytorch-fp32"]["speed q1"], found[first, "pytorch-fp32"]["speed q3"]) == (0.4, 1.0)


def test_a_grid_that_always_drops_layers_still_has_the_dense_model(series):
    study, *_ = series
    only = study.frontier.model_copy(update={"layers_dropped": (1, 2)})
    assert next(iter(plans.recipes(study.model_copy(update={"frontier": only}), 0))) == "dense"


def test_what_continues_a_method_belongs_to_it_and_two_methods_are_a_compound(series):
    study, *_ = series
    dense = dense_spec(study, "world_qa", 0)

    def after(name: str, start: TrainSpec) -> TrainSpec:
        return dense.model_copy(update={"start": start, "compressor": CompressorSpec(name=name)})

    pruned, sparse = after("block_movement", dense), after("obert", dense)
    assert frontier.family(after("refill", pruned))[0] == frontier.family(pruned)[0] == "Block movement"
    assert {frontier.family(after(name, sparse))[0] for name in ("fixed_masks", "sparse_int8")} == {"oBERT"}
    assert frontier.family(after("obert", after("layer_dropping", dense)))[0] == frontier.COMPOUND
    assert set(frontier.FAMILIES) == set(COMPRESSORS)


def test_zeros_count_as_removed_and_are_stored_as_such(series):
    study, *_ = series
    dense = dense_spec(study, "world_qa", 0)
    settings = {"sparsity": 0.5, "importance": "magnitude", "prune_at": [], "first_step": 0.0}
    pruned = dense.model_copy(update={
        "start": dense, "training": dense.training.model_copy(update={"epochs": 0.0}),
        "compressor": CompressorSpec(name="obert", settings=settings),
    })  # fmt: skip
    first, sparse = ensure([dense, pruned], study)
    (row,) = frontier.overview([first, sparse]).to_dict("records")
    model = load_model("tiny-bert", "qa")
    layers = sum(parameter.numel() for layer in model.bert.encoder.layer for parameter in layer.parameters())
    assert row["weights kept (%)"] == pytest.approx(100 * (1 - 0.5 * dense_weights(model) / layers), abs=0.01)
    saved = first["model"]["size_bytes"] - 1e6 * row["size (MB)"]  # half the values, less one bit for each place
    assert saved == pytest.approx(dense_weights(model) * (4 / 2 - 1 / 8), rel=0.05)


def test_a_model_that_an_engine_made_int8_of_is_a_compound_of_that_size(series):
    study, *_ = series
    everything = frontier.all_records(study)
    frame = frontier.overview(everything).set_index("hash")
    done = {spec_hash(spec): spec for spec in plans.recipes(study, 0).values()}
    made = [r for r in everything if isinstance(r.spec, EngineQualitySpec) and spec_hash(r.spec.start) in done]
    assert len(made) == len(done)
    for record in made:
        row, start = frame.loc[record.hash], record.spec.start
        assert row["family"] == ("Compound" if start.compressor else "INT8 by an engine")
        assert row["size (MB)"] == record["size_bytes"] / 1e6 and row["score"] == record["score"]
        if start.compressor:
            same = frame.loc[spec_hash(start)]
            assert row["weights kept (%)"] == same["weights kept (%)"] and row["configuration"] != same["configuration"]


def test_configuration_forgets_seeds_and_nothing_else(series):
    study, records, _ = series
    first, second = (list(plans.recipes(study, seed).values()) for seed in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert frontier.configuration(one) == frontier.configuration(other)
    assert len({frontier.configuration(spec) for spec in first}) == len(first)
    run = next(record.spec for record in records if isinstance(record.spec, EngineQualitySpec))
    again, more = run.model_copy(update={"start": second[0]}), run.model_copy(update={"calibration": 512})
    first_run = run.model_copy(update={"start": first[0]})
    assert frontier.configuration(first_run) == frontier.configuration(again) != frontier.configuration(more)


def test_quality_on_an_engine_is_that_of_the_model(series):
    """PyTorch in fp32 as the engine gives the score that the record of the training run holds."""
    study, _, _ = series
    dense = dense_spec(study, "world_qa", 0)
    spec = EngineQualitySpec(task="world_qa", data="embedded", start=dense, engine="pytorch-fp32", threads=1)
    on_engine, trained = ensure([spec, dense], study)
    assert on_engine["score"] == pytest.approx(trained["score"])


@pytest.mark.parametrize(("name", "layers"), [(LONGER, 2), (HYBRID, 4), (f"{FACTORS}kron8", 4)])
def test_export_is_a_folder_that_loads(series, name, layers):
    study, _, _ = series
    folder = recipes.export(study, name, {"engine": "onnxruntime-int8"})
    model, tokenizer = load_compressed(folder)
    assert len(model.bert.encoder.layer) == layers and tokenizer is not None
    assert json.loads((folder / "recipe.json").read_text())["recipe"] == name
    with pytest.raises(StudyError, match="no recipe 'none'; there is dense; "):
        recipes.export(study, "none", {})


def test_export_trains_again_where_only_the_record_is_here(series):
    study, *_ = series
    weights = weights_folder(study, plans.recipes(study, 0)[LONGER])
    shutil.rmtree(weights)
    assert recipes.export(study, LONGER, {}) is None
    folder = recipes.export(study, LONGER, {"engine": "openvino-int8"}, train=True)
    described = json.loads((folder / "recipe.json").read_text())
    assert (described["weights"], described["engine"]) == ("fp32", "openvino-int8") and weights.is_dir()


@pytest.fixture
def exported(tmp_path):
    """A profile in whose results the dense recipe's weights, any files, lie and were exported once."""
    study = load_profile("smoke", results=tmp_path)
    source = weights_folder(study, plans.recipes(study, 0)["dense"])
    source.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (source / name).write_text("first")
    return study, source, recipes.export(study, "dense", {"engine": "one"})


def test_an_export_holds_nothing_of_an_earlier_one(exported):
    study, source, folder = exported
    (folder / "compression.json").write_text("stale")
    (source / "config.json").write_text("second")
    assert recipes.export(study, "dense", {"engine": "other"}) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "recipe.json"]
    assert (folder / "config.json").read_text() == "second"
    assert json.loads((folder / "recipe.json").read_text())["engine"] == "other"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, r"disk full while writing .*recipes/dense; finished records are safe"),
        (errno.EACCES, r"cannot write .*recipes/dense \(Permission denied\); give a writable results folder"),
        (errno.EIO, r"cannot copy .* to .*recipes/dense \(\[Errno 5\] Input/output error\); what was there stays"),
    ],
)
def test_a_copy_that_fails_leaves_the_earlier_export(exported, monkeypatch, number, said):
    study, source, folder = exported
    before = {path.name: path.read_text() for path in folder.iterdir()}
    (source / "config.json").write_text("second")
    copied, copy = [], shutil.copyfile

    def fail_at_the_second(*arguments, **options):
        copied.append(arguments)
        if len(copied) == 2:
            raise OSError(number, os.strerror(number))
        return copy(*arguments, **options)

    monkeypatch.setattr(shutil, "copyfile", fail_at_the_second)
    with pytest.raises(StudyError, match=said) as caught:
        recipes.export(study, "dense", {"engine": "other"})
    assert "\n" not in str(caught.value) and "None" not in str(caught.value)
    assert {path.name: path.read_text() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_too_many_layers_dropped_is_one_line(series):
    study, _, _ = series
    wrong = study.model_copy(update={"frontier": study.frontier.model_copy(update={"layers_dropped": (4,)})})
    with pytest.raises(StudyError, match="4 layers dropped is impossible with 4 layers; give 0 to 3"):
        plans.frontier(wrong)


def test_families_differ_in_colour():
    shown = {frontier.FAMILIES[name] for name in COMPRESSORS} | {frontier.ENGINE, (frontier.COMPOUND, "compound")}
    assert len({figures.METHODS[style][0] for _, style in shown}) == len(shown)
