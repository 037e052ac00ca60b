"""Notebook 06 around its runs: the plan, the frames and verdicts from hand-made records, and speed on engines."""

from typing import Any

import pandas as pd
import pytest
from conftest import record

from lib.analysis.fullyqt import (
    bucketing_frame,
    engine_quality_frame,
    everything,
    guard_frame,
    norm_frame,
    parents_note,
    part_frame,
    procedure,
    published_retained,
    quantized_frame,
    translation_latency_frame,
)
from lib.claims import NOT_CLAIMED
from lib.claims import fullyqt as claims_of
from lib.config import StudyError, load_profile
from lib.labels import label
from lib.plans import fullyqt as plan
from lib.plans import make_plan
from lib.quantized_layers import PARTS
from lib.records import Record
from lib.runs import ensure
from lib.specs import EngineQualitySpec, Spec, TranslationLatencySpec, TranslationSpec, dense_spec, spec_hash

DELAY = 0.25
TASK = "world_translation"


@pytest.fixture
def profile(profile_file):
    sentences = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 64, "stride": 8,
                 "train_examples": 16, "eval_examples": 8}  # fmt: skip
    return load_profile(profile_file(**{
        "tasks.world_qa": sentences, "fully_quantized.bits": [8, 6, 4], "fully_quantized.qa_bits": [8, 4],
        "translation.world_translation.seeds": 2, "fully_quantized.qa_engines": ["onnxruntime-int8"],
        "fully_quantized.qa_aware_bits": [8],
    }))  # fmt: skip


def scored(spec: Spec, score: float, size: int = 1000, **rest: Any) -> Record:
    return record(spec, score=score, greedy=score - 1, model={"size_bytes": size}, compression={}, **rest)


def records(profile, eight: float = 29.9, six: float = 29.8, six_post: float = 27.0, four: float = 12.0,
            scratch: float = 29.9, diverges: bool = True) -> list[Record]:  # fmt: skip
    """Two seeds of all translation runs that the verdicts read; dense scores 30, trained on 30.5."""
    made = []
    for seed in (0, 1):
        made += [scored(plan.dense_translation(profile, TASK, seed), 30.0, 4000)]
        made += [scored(plan.trained_on(profile, TASK, seed), 30.5, 4000)]
        for bits, aware, post in ((8, eight, eight), (6, six, six_post), (4, four, four - 6)):
            made += [scored(plan.aware(profile, TASK, seed, bits), aware, 125 * bits)]
            made += [scored(plan.post_training(profile, TASK, seed, bits), post, 125 * bits)]
        made += [scored(plan.from_scratch(profile, TASK, seed, bits, DELAY), scratch) for bits in (8, 6)]
        made += [scored(plan.from_scratch(profile, TASK, seed, 8, 0.0), 1.0)]
        for taken in plan.GUARDS.values():
            naive = plan.from_scratch(profile, TASK, seed, 8, 0.0, **taken, watch=True)
            bad = {"diverged": {"place": "layer, scores", "progress": 0.0}} if diverges else {}
            made += [record(naive, score=0.0 if diverges else 30.0, **bad)]
    return made


def test_the_plan_begins_with_the_dense_model_and_holds_everything(profile):
    specs = make_plan("fullyqt", profile, None)
    assert specs[0] == plan.dense_translation(profile, TASK, 0) and len({spec_hash(s) for s in specs}) == len(specs) - 2
    translated = [spec for spec in specs if isinstance(spec, TranslationSpec)]
    kinds = pd.Series([procedure(spec) for spec in translated]).value_counts().to_dict()
    # per seed: 3 + 3 post-training of each kind of guard and bucketing, 6 parts; 3 aware and one without bucketing
    assert kinds == {"dense": 2, "control": 2, "post": 2 * (3 * 3 + 6), "aware": 2 * 4, "naive": 2 * 3, "scratch": 6}
    qa = [spec for spec in specs if spec.task == "world_qa"]
    assert [type(spec).__name__ for spec in qa].count("EngineQualitySpec") == 1 and len(qa) == 1 + 4 + 1 + 6 + 1 + 3
    assert all("quantization" in label(spec) or "dense" in label(spec) for spec in qa)


def test_a_run_is_told_by_its_procedure(profile):
    wanted = {
        "dense": plan.dense_translation(profile, TASK, 0), "control": plan.trained_on(profile, TASK, 0),
        "post": plan.post_training(profile, TASK, 0, 8), "aware": plan.aware(profile, TASK, 0, 8),
        "scratch": plan.from_scratch(profile, TASK, 0, 8, 0.5),
        "naive": plan.from_scratch(profile, TASK, 0, 8, 0.0, mask_guard=False),
    }  # fmt: skip
    assert {kind: procedure(spec) for kind, spec in wanted.items()} == {kind: kind for kind in wanted}
    aware = wanted["aware"].training
    assert aware.epochs == profile.fully_quantized.epochs["world_translation"] * wanted["dense"].training.epochs
    assert aware.learning_rate == pytest.approx(0.5 * wanted["dense"].training.learning_rate)
    assert procedure(plan.qa_post_training(profile, 0, 8)) == "post"
    assert procedure(plan.qa_trained_on(profile, 0, 8)) == "aware"
    assert procedure(plan.qa_trained_on(profile, 0, None)) == "control"


def test_the_frame_takes_shares_of_the_same_seed(profile):
    dense = plan.dense_translation(profile, TASK, 0)
    other = plan.dense_translation(profile, TASK, 1)
    rows = [scored(dense, 20.0, 4000), scored(other, 40.0, 4000), scored(plan.trained_on(profile, TASK, 1), 50.0)]
    rows += [scored(plan.aware(profile, TASK, seed, 8), 10.0, 1000) for seed in (0, 1)]
    frame = quantized_frame(rows)
    aware = frame[frame["procedure"] == "aware"].set_index("seed")
    assert aware["retained"].tolist() == [50.0, 25.0] and aware["smaller"].tolist() == [4.0, 4.0]
    assert pd.isna(aware.loc[0, "controlled"]) and aware.loc[1, "controlled"] == 20.0
    assert aware["bits"].tolist() == [8, 8] and aware["greedy"].tolist() == [9.0, 9.0]
    assert frame[frame["procedure"] == "dense"]["bits"].unique().tolist() == [32]


def test_no_records_make_an_empty_frame_with_its_columns():
    frame = quantized_frame([])
    assert frame.empty and {"retained", "controlled", "smaller"} <= set(frame)
    assert everything(frame, DELAY).empty and part_frame(frame).empty and bucketing_frame(frame).empty
    assert guard_frame(frame).empty and engine_quality_frame([]).empty and translation_latency_frame([]).empty


def test_everything_leaves_ablations_out(profile):
    rows = records(profile)
    rows += [scored(plan.post_training(profile, TASK, 0, 8, bucketing=False), 9.0)]
    rows += [scored(plan.post_training(profile, TASK, 0, 8, parts=["ffn"]), 8.0)]
    rows += [scored(plan.post_training(profile, TASK, 0, 8, denominator_guard=False), 7.0)]
    whole = everything(quantized_frame(rows), DELAY)
    assert set(whole["procedure"]) == {"post", "aware", "scratch"} and whole["score"].min() == 6.0
    assert len(whole) == 2 * (3 + 3 + 2)


def test_the_run_that_keeps_the_ranges_of_training_gives_way_to_the_one_that_does_not(profile):
    rows = [scored(dense_spec(profile, "world_qa", 0), 40.0), scored(plan.qa_post_training(profile, 0, 8), 10.0)]
    old, anew = (plan.qa_trained_on(profile, 0, 8, recalibrated=anew) for anew in (False, True))
    rows += [scored(old, 20.0)]
    assert everything(quantized_frame(rows), DELAY)["score"].tolist() == [10.0, 20.0]
    assert everything(quantized_frame([*rows, scored(anew, 30.0)]), DELAY)["score"].tolist() == [10.0, 30.0]


def test_parts_are_compared_with_everything(profile):
    rows = [scored(plan.dense_translation(profile, TASK, 0), 40.0)]
    rows += [scored(plan.post_training(profile, TASK, 0, bits), 10.0) for bits in (8, 4)]
    rows += [scored(plan.post_training(profile, TASK, 0, 4, parts=[part]), 30.0 + i) for i, part in enumerate(PARTS)]
    frame = quantized_frame(rows)
    without = frame[frame["part"] == ""].assign(task="without single parts")
    parts = part_frame(pd.concat([frame, without]))
    assert parts["part"].tolist() == [*(part.replace("_", " ") for part in PARTS), "everything"]
    assert parts["retained"].tolist()[-1] == 25.0 and set(parts["bits"]) == {4}


def test_a_layer_norms_step_is_in_its_smallest_standard_deviation(profile):
    rows = [scored(plan.post_training(profile, TASK, 0, 4, parts=[part]), 30.0) for part in ("layer_norm", "ffn")]
    rows += [scored(plan.post_training(profile, TASK, 0, 4), 10.0)]
    norms = {"0.cross_norm": {"numerator": [-20.0, 10.0], "denominator": [0.5, 9.0]},
             "0.ffn_norm": {"numerator": [-1.5, 1.5], "denominator": [2.0, 3.0]}}  # fmt: skip
    for row in rows:
        row.result["compression"] = {"norms": norms}
    frame = norm_frame(rows)
    assert frame[["place", "layer_norm", "after", "step", "narrowest"]].to_numpy().tolist() == [
        [1, "0.cross_norm", "attention", 2.0, 0.5], [2, "0.ffn_norm", "feed-forward", 0.2, 2.0]
    ]  # fmt: skip
    assert frame["coarse"].tolist() == [4.0, 0.1] and norm_frame([]).empty


def test_bucketing_and_guards_are_paired(profile):
    rows = [scored(plan.dense_translation(profile, TASK, 0), 40.0)]
    rows += [scored(plan.post_training(profile, TASK, 0, 6), 30.0)]
    rows[-1].result["compression"] = {"denominator_spread": 9.5}
    rows += [scored(plan.post_training(profile, TASK, 0, 6, bucketing=False), 20.0)]
    rows += [scored(plan.post_training(profile, TASK, 0, 6, denominator_guard=False), 4.0)]
    frame = quantized_frame(rows)
    assert bucketing_frame(frame)[["bucketed", "whole"]].to_numpy().tolist() == [[75.0, 50.0]]
    (guards,) = guard_frame(frame).to_dict("records")
    assert (guards["guarded"], guards["denominator from zero"], guards["spread"]) == (75.0, 10.0, 9.5)
    assert guards["vanishes"] == pytest.approx((2 * 63) ** 0.5)


def test_a_model_trained_again_between_runs_is_told(profile):
    """The denominators are measured before anything is rounded: other ones are another model's."""
    rows = [scored(plan.dense_translation(profile, TASK, 0), 40.0)]
    rows += [scored(plan.post_training(profile, TASK, 0, bits), 30.0) for bits in (8, 6)]
    for row, spread in zip(rows[1:], (6.999, 7.001), strict=True):
        row.result["compression"] = {"denominator_spread": spread}
    assert parents_note(quantized_frame(rows)) == "", "the same model, measured by another library"
    rows[-1].result["compression"] = {"denominator_spread": 6.69}
    assert parents_note(quantized_frame(rows)).startswith("On World translation (invented) the dense model was trained")
    assert parents_note(quantized_frame([])) == ""


def test_a_variance_that_cannot_vanish_tests_no_claim(profile):
    claim = "Quantising everything naively diverges (denominator from zero)"
    made = records(profile, diverges=False)
    for spread, word in ((2.5, "not testable here"), (99.0, "does not hold here")):
        for row in made:
            row.result["compression"] = {"denominator_spread": spread}
        row = claims_of.verdicts(quantized_frame(made), quantized_frame([]), DELAY).set_index("claim").loc[claim]
        assert row["verdict"] == word and row["evidence"].endswith(
            f"models' differ {spread:.1f} times at most on World translation (invented)"
        )


def test_published_shares():
    rows = published_retained().set_index(["task", "procedure", "bits"])
    assert rows.loc[("wmt14", "aware", 6.0), "retained"] == pytest.approx(100 * 26.98 / 26.46)
    assert rows.loc[("wmt14_en_fr", "aware", 4.0), "retained"] == pytest.approx(100 * 1.59 / 38.34)
    assert set(rows["evidence"]) == {"secondary"} and len(rows) == 8


def words(profile, **changes: Any) -> dict[str, str]:
    frame = quantized_frame(records(profile, **changes))
    found = claims_of.verdicts(frame, frame, DELAY)  # as if question answering had the same scores
    second_hand = found["evidence"].str.contains("second-hand")
    assert second_hand[~found["claim"].str.contains("on BERT")].all() and second_hand.sum() == len(found) - 2
    return dict(zip(found["claim"], found["verdict"], strict=True))


def test_verdicts_flip_with_the_numbers(profile):
    good = words(profile)
    assert len(good) == 13 and set(good.values()) == {"holds"}
    assert sum(claim.endswith(NOT_CLAIMED) for claim in good) == 4
    bad = words(profile, eight=29.0, six=28.0, six_post=28.5, four=28.0, scratch=20.0, diverges=False)
    size = next(claim for claim in bad if "smaller" in claim)
    assert bad.pop(size) == "holds" and set(bad.values()) == {"does not hold here"}


def test_a_task_with_one_seed_that_misses_the_bound_leaves_a_claim_that_holds_in_part(profile):
    frame = quantized_frame(records(profile))
    other = frame[frame["seed"] == 0].assign(task="other", title="Other pair")
    other.loc[other["procedure"] == "aware", ["retained", "controlled"]] = 50.0, 40.0
    claim = "6 bits, trained on quantised, are as good as full precision"
    row = claims_of.verdicts(pd.concat([frame, other]), frame[:0], DELAY).set_index("claim").loc[claim]
    assert row["verdict"] == "holds in part" and "50.0 % on Other pair (n = 1)" in row["ours"]
    assert "40.0 % on Other pair" in row["evidence"]
    alone = claims_of.verdicts(other, frame[:0], DELAY).set_index("claim").loc[claim]
    assert alone["verdict"] == "too few seeds to tell (n = 1)"


def test_verdicts_without_records_do_not_guess():
    empty = quantized_frame([])
    found = claims_of.verdicts(empty, empty, DELAY)
    assert (found.loc[found["check"] == "quality", "ours"] == "not run yet").all()
    assert (found.loc[found["check"] == "size", "verdict"] == "holds").all()


def test_size_of_the_published_shape_by_hand():
    tables, layers, hidden, units = 37_000, 6, 512, 2048
    weights = tables * hidden + layers * (3 * 4 * hidden**2 + 2 * 2 * hidden * units) + 5 * layers * hidden
    biases = layers * (3 * 4 * hidden + 2 * (units + hidden)) + 5 * layers * hidden
    assert claims_of.transformer_base_bytes(None) == 4 * (weights + biases)
    rows = tables + layers * (3 * 4 * hidden + 2 * (units + hidden)) + 5 * layers
    places = 2 + layers * (3 * 5 + 3 * 4 + 2 * 2 + 5 * 4)
    assert claims_of.transformer_base_bytes(4) == weights // 2 + 4 * biases + 8 * (rows + places)


def test_translation_is_timed_on_engines(profile):
    (spec,) = make_plan("translation_speed", profile, None)
    assert isinstance(spec, TranslationLatencySpec)
    wanted = spec.model_copy(update={"engines": ("pytorch-fp32", "onnxruntime-int8")})
    rows = translation_latency_frame(ensure([wanted], profile))
    assert rows["engine"].tolist() == ["pytorch-fp32", "onnxruntime-int8"] and (rows["median_ms"] > 0).all()
    assert (rows["size_bytes"] > 0).all() and rows["agreement"].tolist()[0] == 0
    assert label(wanted) == "16x1_batch1_length16"
    missing = wanted.model_copy(update={"engines": ("pytorch-cuda-fp32",)})
    with pytest.raises(StudyError, match="no engine is available"):
        ensure([missing], profile)


def test_engine_quality_frame(profile):
    dense = dense_spec(profile, "world_qa", 0)
    spec = EngineQualitySpec(task="world_qa", data="embedded", start=dense, engine="onnxruntime-int8", threads=1)
    frame = engine_quality_frame([record(spec, score=50.0, size_bytes=7, runs_on="here"), scored(dense, 60.0)])
    assert frame.to_dict("records") == [
        {"task": "world_qa", "seed": 0, "engine": "onnxruntime-int8", "score": 50.0, "size_bytes": 7, "runs_on": "here"}
    ]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fully_quantized.bits", [9], "fully_quantized.bits.0"),
        ("fully_quantized.tasks", ["multi30k"], "'multi30k' has no settings in translation; it has world_translation"),
        ("fully_quantized.delays", [1.5], "fully_quantized.delays.0"),
        ("fully_quantized.epochs", {}, "fully_quantized.epochs: 'world_translation' is missing; give its share"),
    ],
)
def test_impossible_settings_are_one_line(profile_file, key, value, message):
    with pytest.raises(StudyError, match=message):
        load_profile(profile_file(**{key: value}))
