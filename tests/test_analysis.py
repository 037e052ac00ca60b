"""From hand-made records to frames and verdicts: the shares are right, and a verdict flips when the numbers do."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import record

from lib import claims
from lib.analysis import (
    examples_note,
    latency_frame,
    published_retained,
    structured_qa,
    summarise,
    training_speed_frame,
)
from lib.analysis.poor_mans_bert import PROCEDURES, contribution_frame, procedure, quality_frame, strategy_frame
from lib.claims import poor_mans_bert as claims_of
from lib.claims import structured_qa as structured_claims
from lib.compressors import CompressorSpec
from lib.config import StudyError, load_profile
from lib.distillation import Distillation
from lib.records import Record
from lib.specs import (
    ContributionSpec,
    LatencyModel,
    LatencySpec,
    MajoritySpec,
    TrainingSpeedSpec,
    TrainSpec,
)
from lib.training import TrainingSettings

TRAINING = TrainingSettings(epochs=2, batch_size=8, learning_rate=1e-4, max_length=64)
TASKS = ("rte", "cola")
LAYERS = 6


def dense(task: str = "rte", seed: int = 0) -> TrainSpec:
    return TrainSpec(task=task, data="local", encoder="minilm", seed=seed, training=TRAINING)


def dropped(drop: tuple[int, ...], kind: str = "before", task: str = "rte", seed: int = 0) -> TrainSpec:
    """A run of one of ``PROCEDURES``."""
    settings: dict[str, Any] = {"drop": list(drop)} | ({"iterative": True} if kind == "iterative" else {})
    changes: dict[str, Any] = {"compressor": CompressorSpec(name="layer_dropping", settings=settings)}
    if kind in ("after", "untrained"):
        changes["start"] = dense(task, seed)
    if kind == "untrained":
        changes["training"] = TRAINING.model_copy(update={"epochs": 0})
    if kind == "distilled":
        changes |= {"distillation": Distillation(), "teacher": dense(task, seed)}
    return dense(task, seed).model_copy(update=changes)


def trained(spec: TrainSpec, score: float, seconds: float = 4.0) -> Record:
    drop = list(spec.compressor.settings["drop"]) if spec.compressor else []
    result: dict[str, Any] = {
        "score": score,
        "model": {"layers": LAYERS - len(drop), "parameters": 100 - 10 * len(drop), "size_bytes": 400},
        "compression": {"dropped_layers": drop} if drop else {},
    }
    if spec.training.epochs:
        result["training"] = {"seconds": seconds, "examples": 80}
    return record(spec, **result)


def test_every_procedure_is_recognised():
    found = {kind: procedure(dropped((1,), kind)) for kind in PROCEDURES if kind != "dense"}
    assert found == {kind: kind for kind in found} and procedure(dense()) == "dense"


def test_quality_frame_takes_shares_of_the_same_task_and_seed():
    frame = quality_frame([
        trained(dense("rte", 0), 80.0), trained(dense("rte", 1), 50.0), trained(dense("cola", 0), 40.0),
        trained(dropped((5, 6), task="rte", seed=0), 60.0), trained(dropped((5, 6), task="rte", seed=1), 60.0),
        trained(dropped((4,), task="cola", seed=0), 30.0), trained(dropped((4,), task="cola", seed=1), 30.0),
        trained(dropped((6,), "untrained", seed=0), 20.0),
        record(TrainingSpeedSpec(models={}, dense="x", batch=1, length=1, threads=1, rounds=1, bf16=False), rows=[]),
    ])  # fmt: skip
    assert len(frame) == 8
    np.testing.assert_allclose(frame["retained"], [100, 100, 100, 75, 120, 75, np.nan, 25])
    assert frame["k"].tolist() == [0, 0, 0, 2, 2, 1, 1, 1] and frame["drop"][3] == (5, 6)
    assert frame["layers"].tolist() == [6, 6, 6, 4, 4, 5, 5, 5]
    assert frame["examples_per_s"][0] == 20.0 and np.isnan(frame["examples_per_s"][7])
    assert frame["procedure"].tolist() == ["dense"] * 3 + ["before"] * 4 + ["untrained"]


def test_quality_frame_of_nothing_is_one_line():
    with pytest.raises(StudyError, match="no training run is finished yet"):
        quality_frame([])


def test_contributions_have_a_row_per_task_and_layer():
    specs = [
        ContributionSpec(task=task, data="local", encoder="minilm", max_length=64, examples=8)
        for task in ("rte", "cola")
    ]
    found = contribution_frame([
        record(specs[0], similarity=[0.9, 0.5]), trained(dense(), 80.0), record(specs[1], similarity=[0.7])
    ])  # fmt: skip
    assert found.values.tolist() == [["rte", 1, 0.9], ["rte", 2, 0.5], ["cola", 1, 0.7]]
    assert found.columns.tolist() == ["task", "layer", "similarity"]
    with pytest.raises(StudyError, match=r"no layer contribution is finished yet; give the data .* \(data_dir\)"):
        contribution_frame([trained(dense(), 80.0)])


SETS = {task: {("top", "K=2"): (5, 6), ("odd", "K=2"): (3, 5), ("contribution", "K=2"): (5, 6)} for task in TASKS}


def test_one_run_serves_every_strategy_that_drops_its_layers():
    quality = quality_frame([
        trained(dense(), 80.0), trained(dropped((5, 6)), 60.0), trained(dropped((3, 5)), 40.0),
        trained(dropped((5, 6), "untrained"), 20.0), trained(dropped((1, 2)), 10.0),
    ])  # fmt: skip
    frame = strategy_frame(quality, SETS)
    shown = {(row.strategy, row.variant): (row.score, row.retained) for row in frame.itertuples()}
    assert shown == {("top", "K=2"): (60, 75), ("odd", "K=2"): (40, 50), ("contribution", "K=2"): (60, 75)}
    untrained = strategy_frame(quality, SETS, "untrained")
    assert untrained["strategy"].tolist() == ["top", "contribution"] and set(untrained["score"]) == {20}


def test_summaries_have_mean_interval_and_count():
    frame = pd.DataFrame({"task": ["a", "a", "a", "b"], "score": [1.0, 2.0, 6.0, 5.0]})
    first, second = summarise(frame, ["task"], "score").to_dict("records")
    assert (first["task"], first["score"], first["n"]) == ("a", 3.0, 3) and 1 <= first["low"] < 3 < first["high"] <= 6
    assert (second["score"], second["n"]) == (5.0, 1) and np.isnan(second["low"])
    assert summarise(frame.iloc[:0], ["task"], "score").columns.tolist() == ["task", "score", "low", "high", "n"]


def test_speed_frames_join_rows_with_their_conditions():
    models = {"dense": LatencyModel(architecture="tiny"), "half": LatencyModel(architecture="tiny", drop=(3, 4))}
    spec = LatencySpec(models=models, dense="dense", engines=("e",), batch=4, length=16, threads=2, rounds=3)
    row = {"name": "half/e", "model": "half", "engine": "e", "median_ms": 2.0, "size_bytes": 70}
    timed = record(spec, rows=[row], models={"half": {"layers": 2, "size_bytes": 90}},
                   agreement={"half/e": {"relative_diff": 1e-6}})  # fmt: skip
    (found,) = latency_frame([timed, trained(dense(), 1.0)]).to_dict("records")
    assert found["cpu"] == "Toy CPU" and found["layers"] == 2 and found["file_bytes"] == 70
    assert found["agreement"] == 1e-6 and found["median_ms"] == 2.0
    speed = TrainingSpeedSpec(models=models, dense="dense", batch=4, length=16, threads=2, rounds=3, bf16=True)
    (found,) = training_speed_frame([record(speed, rows=[{"name": "half"}]), timed]).to_dict("records")
    assert found["precision"] == "bf16" and (found["batch"], found["length"], found["threads"]) == (4, 16, 2)
    assert latency_frame([]).empty and training_speed_frame([]).empty


def test_published_shares_are_of_the_same_tables_dense_score():
    frame = published_retained("sajjad2020", 12, place="v1 Table 1", model="BERT-base", task="sst2")
    assert frame[frame["K"] == 0]["retained"].item() == pytest.approx(100)
    six = frame[(frame["K"] == 6) & (frame["method"] == "top")].iloc[0]
    assert six["dropped_share"] == 0.5 and six["retained"] == pytest.approx(100 * six["score"] / 92.43)


# The published values that the verdicts compare with: 1.94 times, 50 % saved.


def speed(ratio: float) -> pd.DataFrame:
    row = {"dropped (%)": 50.0, "precision": "fp32", "cpu": "Toy CPU", "batch": 4, "length": 16, "n": 3,
           "ratio_to_dense": ratio, "ratio_q1": ratio - 0.1, "ratio_q3": ratio + 0.1}  # fmt: skip
    other = {"dropped (%)": 0.0, "ratio_to_dense": 9.0}, {"precision": "bf16", "ratio_to_dense": 9.0}
    return pd.DataFrame([*(row | change for change in other), row])


def inference(*saved: float) -> pd.DataFrame:
    base = {"dropped (%)": 50.0, "batch": 32, "length": 128, "threads": 2, "cpu": "Toy CPU"}
    rows = [base | {"engine": f"e{i}", "time saved (%)": value} for i, value in enumerate(saved)]
    frame = pd.DataFrame([*rows, base | {"batch": 1, "engine": "e0", "time saved (%)": 0.0}])
    ratio = 1 / (1 - frame["time saved (%)"] / 100)
    return frame.assign(ratio_to_dense=ratio, ratio_q1=ratio - 0.01, ratio_q3=ratio + 0.01)


def quality(scores: dict[tuple[str, tuple[int, ...]], float], seeds: tuple[int, ...] = (0, 1)) -> pd.DataFrame:
    """Two tasks and two seeds with a dense score of 80, and the given score for (procedure, layers)."""
    runs = []
    for task in TASKS:
        for seed in seeds:
            runs.append(trained(dense(task, seed), 80.0))
            runs += [trained(dropped(drop, kind, task, seed), score + seed) for (kind, drop), score in scores.items()]
    return quality_frame(runs)


HALVES = {task: {("top", "K=3"): (4, 5, 6), ("bottom", "K=3"): (1, 2, 3)} for task in TASKS}


def verdicts(top: float = 79.0, bottom: float = 60.0, after: float = 79.0, iterative: float = 79.0,
             ratio: float = 1.9, saved: tuple[float, ...] = (50.0, 48.0),
             seeds: tuple[int, ...] = (0, 1)) -> pd.DataFrame:  # fmt: skip
    frame = quality({
        ("before", (4, 5, 6)): top, ("before", (1, 2, 3)): bottom, ("after", (4, 5, 6)): after,
        ("iterative", (4, 5, 6)): iterative,
    }, seeds)  # fmt: skip
    orders = pd.concat([strategy_frame(frame, HALVES, kind) for kind in ("before", "after", "iterative")])
    found = claims_of.verdicts(
        LAYERS, strategy_frame(frame, HALVES), orders[orders["strategy"] == "top"], speed(ratio), inference(*saved)
    )
    return found.set_index("claim")


CLAIMS = {
    "Half the layers fine-tune almost twice as fast": {"ratio": 1.6},
    "Half the layers halve the inference time": {"saved": (40.0, 30.0)},
    "Half of the layers, dropped from the top, keep nearly all of the score": {"top": 70.0, "bottom": 50.0},
    "Dropping from the top is the best or near-best strategy": {"bottom": 83.0},
    "Dropping from the fine-tuned model and fine-tuning again is comparable": {"after": 70.0},
    "Dropping one layer at a time gains nothing": {"iterative": 84.0},
}


def test_every_claim_holds_on_numbers_like_the_papers():
    found = verdicts()
    assert set(CLAIMS) < set(found.index) and len(found) == 7
    assert set(found["verdict"]) == {"holds"} and (found["evidence"] != "").all()


def test_a_claim_that_some_engines_reach_holds_in_part():
    halved = "Half the layers halve the inference time"
    assert verdicts(saved=(50.0, 30.0)).loc[halved, "verdict"] == "holds in part"
    near = verdicts(saved=(50.0, 44.9)).loc[halved]  # its quartiles hold the bound, so it decides nothing
    assert near["verdict"] == "holds" and near["evidence"].startswith("1 of 2 reach the bound of 1.82 ×, 1 cannot tell")
    assert verdicts(saved=(44.9,)).loc[halved, "verdict"] == "cannot tell: every one's quartiles hold the bound"
    tuned = "Half the layers fine-tune almost twice as fast"  # 1.94 × are printed, of which 90 % are 1.75
    assert verdicts(ratio=1.7).loc[tuned, "verdict"] == "cannot tell: every one's quartiles hold the bound"
    assert verdicts(ratio=1.6).loc[tuned, "verdict"] == "does not hold here"


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_verdict_flips_with_its_numbers_and_no_other_does(claim):
    changed = verdicts(**CLAIMS[claim])
    flipped = set(changed.index[changed["verdict"] == "does not hold here"])
    assert claim in flipped
    related = {
        "Half of the layers, dropped from the top, keep nearly all of the score",
        "Dropping from the fine-tuned model and fine-tuning again is comparable",
        "Dropping one layer at a time gains nothing",
    }
    assert flipped == {claim} or flipped <= related  # a worse "before" makes the other orders better than it
    assert changed.loc[claim, "ours"] != verdicts().loc[claim, "ours"]


def test_a_worse_order_is_no_gain_and_a_better_one_is_not_comparable():
    order = "Dropping one layer at a time gains nothing"
    assert verdicts(iterative=60.0).loc[order, "verdict"] == "holds"
    comparable = "Dropping from the fine-tuned model and fine-tuning again is comparable"
    assert verdicts(after=90.0).loc[comparable, "verdict"] == "does not hold here"


@pytest.mark.parametrize(
    ("procedure", "by", "verdict"),
    [
        ("iterative", (-9.0, -9.2, -8.8), "holds"),
        ("iterative", (1.8, 1.9, 2.0), "cannot tell: the interval crosses +2 points"),  # the mean is within
        ("iterative", (-40.0, 0.0, 12.0), "cannot tell: the interval crosses +2 points"),
        ("iterative", (8.0, 8.1, 7.9), "does not hold here"),
        ("after", (0.1, 0.0, -0.1), "holds"),
        ("after", (-9.0, -9.2, -8.8), "does not hold here"),
        ("after", (9.0, 9.2, 8.8), "does not hold here"),
        ("after", (-1.9, -2.0, -1.8), "cannot tell: the interval crosses ±2 points"),
    ],
)
def test_no_difference_needs_an_interval_that_has_no_room_for_one(procedure, by, verdict):
    orders = pd.DataFrame([
        {"k": 3, "task": "cola", "title": "CoLA", "seed": seed, "procedure": name, "retained": retained,
         "informative": True, "score": 50.0, "floor": 0.0}
        for seed, gain in enumerate(by) for name, retained in (("before", 60.0), (procedure, 60.0 + gain))
    ])  # fmt: skip
    row = claims_of._order(orders, procedure, "a claim")
    assert row["verdict"] == verdict and "95 % Student t interval" in row["evidence"]
    alone = claims_of._order(orders[orders["seed"] == 0], procedure, "a claim")
    assert alone["verdict"] == "too few seeds to tell (n = 1)" and alone["ours"].endswith("a single pair on CoLA")


@pytest.mark.parametrize(
    ("by", "word"),
    [((-9.0, -9.4, -8.6), "does not hold here"), ((-20.0, 3.0, -9.0), "cannot tell: the interval holds zero"),
     ((-1.0, -1.2, -0.8), "holds"), ((-9.0,), "too few seeds to tell (n = 1)")],
)  # fmt: skip
def test_another_strategy_is_better_where_the_interval_over_pairs_says_so(by, word):
    glue = pd.DataFrame([
        {"k": 3, "task": "cola", "title": "CoLA", "seed": seed, "strategy": name, "retained": kept, "informative": True}
        for seed, gap in enumerate(by) for name, kept in (("bottom", 80.0), ("top", 80.0 + gap))
    ])  # fmt: skip
    assert claims_of._top_is_best(glue, 6)["verdict"] == word


@pytest.mark.parametrize(("mrpc", "word"), [(90.0, "holds"), (88.0, "holds in part")])
def test_half_of_the_layers_is_judged_by_the_papers_share_of_the_same_task(mrpc, word):
    """BERT-base keeps 91.1 % on MRPC and 96.6 % on average; a task that the paper has not is told beside."""
    kept = {"MRPC": mrpc, "STS-B": 99.0, "CoLA": 40.0}
    glue = pd.DataFrame([
        {"strategy": "top", "k": 3, "task": title.lower().replace("-", ""), "title": title, "seed": seed,
         "retained": share, "informative": True} for title, share in kept.items() for seed in (0, 1)
    ])  # fmt: skip
    row = claims_of._retained(glue, LAYERS)
    assert row["verdict"] == word and row["published"] == "96.6 % over 7 tasks: MRPC 91.1 %, STS-B 99.6 %"
    assert row["evidence"] == "not in the paper: 40.0 % (40.0–40.0) on CoLA (n = 2)"


def test_an_order_is_judged_on_every_task_for_itself():
    """One task lies below the bound, the other on both sides of it: pooled, the first would be drowned."""
    orders = pd.DataFrame([
        {"k": 3, "task": task, "title": task, "seed": seed, "procedure": name, "retained": retained,
         "informative": True, "score": 50.0, "floor": 0.0}
        for task, gains in {"mrpc": (-9.0, -9.2, -8.8), "stsb": (-40.0, 0.0, 60.0)}.items()
        for seed, gain in enumerate(gains) for name, retained in (("before", 60.0), ("iterative", 60.0 + gain))
    ])  # fmt: skip
    row = claims_of._order(orders, "iterative", "a claim")
    assert row["verdict"] == "holds in part" and row["ours"].startswith(
        "-9.0 points (-9.5 to -8.5) on MRPC; +6.7 points"
    )
    after = claims_of._order(orders.replace("iterative", "after"), "after", "a claim")
    assert after["verdict"] == "does not hold here"


def test_what_the_rows_say():
    found = verdicts()
    size = found.loc["BERT-base without six layers is 40 % smaller"]
    assert (size["published"], size["ours"]) == ("66 M", "66.96 M")
    assert found.loc["Half the layers fine-tune almost twice as fast", "ours"] == "1.90 × (1.80–2.00)"
    halved = found.loc["Half the layers halve the inference time"]
    assert halved["ours"] == "48 to 50 % saved"
    assert halved["evidence"].endswith("45 % saved: 2 engines on Toy CPU, batch 32 × 128 tokens, 2 threads")
    kept = found.loc["Half of the layers, dropped from the top, keep nearly all of the score"]
    assert kept["ours"] == "99.4 % (98.8–100.0) on RTE (n = 2)"
    assert kept["evidence"] == "not in the paper: 99.4 % (98.8–100.0) on CoLA (n = 2)"
    assert found.loc["Dropping from the top is the best or near-best strategy", "ours"] == "rank 1 of 2"
    order = found.loc["Dropping from the fine-tuned model and fine-tuning again is comparable"]
    assert order["ours"] == "+0.0 points (+0.0 to +0.0) on CoLA; +0.0 points (+0.0 to +0.0) on RTE"
    assert "paired over 4" in order["evidence"]
    assert "2 seeds each; 95 %" in order["evidence"]


@pytest.mark.parametrize("scores", [{}, {"top": 70.0, "bottom": 78.0, "after": 79.0, "iterative": 79.0}])
def test_one_seed_decides_nothing_about_quality_and_everything_else(scores):
    found = verdicts(**scores, seeds=(3,))
    undecided = found["check"] == "quality"
    assert undecided.sum() == 4 and set(found.loc[undecided, "verdict"]) == {"too few seeds to tell (n = 1)"}
    assert set(found.loc[~undecided, "verdict"]) == {"holds"}
    kept = "Half of the layers, dropped from the top, keep nearly all of the score"
    assert found.loc[undecided].drop(kept)["evidence"].str.contains("1 seed each").all()


def test_seeds_are_counted_on_one_task_and_only_where_a_share_is_known():
    frame = pd.DataFrame({"task": ["rte", "rte", "cola"], "seed": [0, 0, 1]})
    assert claims.seeds_of(frame) == 1 and claims.seeds_of(frame.assign(seed=[0, 2, 1])) == 2
    assert claims.seeds_of(frame.iloc[:0]) == 0
    known = quality({("before", (4, 5, 6)): 79.0, ("before", (1, 2, 3)): 60.0})
    orphan = known[~((known["procedure"] == "dense") & (known["seed"] == 1))].copy()
    orphan.loc[orphan["seed"] == 1, "retained"] = float("nan")  # a run whose dense model has no record
    empty = training_speed_frame([])
    for frame, word in ((known, "holds"), (orphan, "too few seeds to tell (n = 1)")):
        curves = strategy_frame(frame, HALVES)
        found = claims_of.verdicts(LAYERS, curves, curves, empty, empty).set_index("claim")["verdict"]
        assert found["Half of the layers, dropped from the top, keep nearly all of the score"] == word
        assert found["Dropping from the top is the best or near-best strategy"] == word


@pytest.mark.parametrize(
    ("check", "holds", "seeds", "word"),
    [
        ("quality", True, 1, "too few seeds to tell (n = 1)"),
        ("quality", False, 0, "too few seeds to tell (n = 0)"),
        ("quality", False, 2, "does not hold here"),
        ("quality", True, None, "holds"),
        ("quality", None, 1, "not testable here"),
        ("speed", True, 1, "holds"),
        ("speed", np.array([True, True]), None, "holds"),
        ("speed", pd.Series([True, False]), None, "holds in part"),
        ("speed", [True, None], None, "holds"),
        ("speed", [None, None], None, "cannot tell: every one's quartiles hold the bound"),
        ("quality", [False, False], 2, "does not hold here"),
        ("quality", [True, False], 1, "too few seeds to tell (n = 1)"),
    ],
)
def test_only_quality_needs_seeds(check, holds, seeds, word):
    row = claims.verdict("c", check, "p", "o", holds, "e", seeds=seeds)
    assert row["verdict"] == word and (row["ours"], row["evidence"]) == ("o", "e")


FEW = "n = 1 and 3; too few seeds to judge CoLA"


@pytest.mark.parametrize(
    ("gains", "word", "said"),
    [
        ({"rte": [2.0, 2.2, 1.8], "cola": [9.0, 9.1]}, "holds", "ahead at 2, behind at 0, undecided at 0; n = 2 and 3"),
        ({"rte": [2.0, 2.2, 1.8], "cola": [80.0]}, "holds", FEW),
        ({"rte": [2.0, 2.2, 1.8], "cola": [-0.1]}, "holds in part", FEW),
        ({"rte": [-2.0, -2.2, -1.8], "cola": [-0.1]}, "does not hold here", FEW),
        ({"rte": [2.0, 2.2, 1.8], "cola": [-9.0, -9.1]}, "holds in part",
         "ahead at 1, behind at 1, undecided at 0; n = 2 and 3"),
        ({"rte": [-2.0, -2.2, -1.8], "cola": [-9.0, 9.0]}, "does not hold here",
         "ahead at 0, behind at 1, undecided at 1; n = 2 and 3"),
        ({"rte": [-2.0, 2.2, 1.8], "cola": [80.0]}, "cannot tell: the interval holds zero", FEW),
        ({"rte": [2.0], "cola": [80.0]}, "too few seeds to tell (n = 1)", "n = 1"),
    ],
)  # fmt: skip
def test_a_lead_is_judged_on_every_task_for_itself(gains, word, said):
    """Two unlike tasks in one interval would leave +2 and +80 undecided."""
    pairs = pd.DataFrame([
        {"task": task, "seed": seed, "gain": gain} for task, part in gains.items() for seed, gain in enumerate(part)
    ])  # fmt: skip
    row = claims.leads("a claim", "+1", pairs, "pairs")
    assert row["verdict"] == word and " on RTE; " in row["ours"]
    assert row["evidence"] == f"pairs; {said}"


def test_pairs_of_one_seed_count_once():
    """Two sparsities of one seed are no two seeds: the interval is that over three means, not over six pairs."""
    one = pd.DataFrame({"task": "rte", "seed": [0, 1, 2], "gain": [1.0, 2.0, 3.0]})
    twice = pd.concat([one.assign(gain=one["gain"] - 1), one.assign(gain=one["gain"] + 1)])
    assert claims.leads("c", "p", twice, "e") == claims.leads("c", "p", one, "e")
    alone = [claims.leads("c", "p", rows[rows["seed"] == 0], "e")["ours"] for rows in (one, twice)]
    assert alone == ["+1.0 points, a single pair", "+1.0 points, one seed"]


def test_one_seed_beside_enough_speaks_only_against_a_claim():
    rows = pd.DataFrame({"title": ["RTE", "RTE", "CoLA"], "seed": [0, 1, 0]})
    answers = {(rte, cola): claims.weighed(rows, pd.Series({"RTE": rte, "CoLA": cola}))
               for rte in (True, False) for cola in (True, False)}  # fmt: skip
    assert answers[True, True] == [True, None] and answers[True, False] == [True, False]
    assert answers[False, True] == [False, None] and answers[False, False] == [False, False]
    assert claims.weighed(rows[1:], pd.Series({"RTE": True, "CoLA": False})) == [True, False]


@pytest.mark.parametrize(("other", "word"), [(95.0, "holds"), (66.0, "holds in part")])
def test_what_is_kept_is_judged_on_every_task_and_one_seed_alone_decides_nothing(other, word):
    rows = pd.DataFrame({"task": ["rte", "rte", "cola"], "title": ["RTE", "RTE", "CoLA"], "seed": [0, 1, 0],
                         "retained": [96.0, 98.0, other]})  # fmt: skip
    row = claims.retains("a claim", 96.0, rows, "shares")
    assert row["verdict"] == word and row["ours"] == f"97.0 % (96.0–98.0) on RTE (n = 2); {other:.1f} % on CoLA (n = 1)"
    assert claims.retains("a claim", 96.0, rows[rows["seed"] == 0], "shares")["verdict"].startswith("too few seeds")


def test_orders_that_share_no_run_are_not_run_yet():
    frame = quality({("before", (4, 5, 6)): 70.0, ("after", (4, 5, 6)): 60.0})
    orders = pd.concat([strategy_frame(frame, HALVES, kind) for kind in ("before", "after")])
    orders = orders[(orders["procedure"] == "after") == (orders["seed"] == 1)]
    empty = training_speed_frame([])
    found = claims_of.verdicts(LAYERS, orders.iloc[:0], orders, empty, empty).set_index("claim")
    row = found.loc["Dropping from the fine-tuned model and fine-tuning again is comparable"]
    assert row["ours"] == row["verdict"] == claims.NOT_RUN


def majority(task: str, score: float) -> Record:
    return record(MajoritySpec(task=task, data="local"), score=score)


def test_a_dense_score_near_one_label_for_all_says_nothing():
    runs = [trained(dense(task, seed), 80.0) for task in TASKS for seed in (0, 1, 2)]
    runs += [trained(dropped((4, 5, 6), "before", task, seed), {"rte": 79.0}.get(task, 40.0))
             for task in TASKS for seed in (0, 1, 2)]  # fmt: skip
    claim = "Half of the layers, dropped from the top, keep nearly all of the score"
    empty = training_speed_frame([])
    for floor, left_out in ((75.0, False), (75.1, True)):
        frame = quality_frame([*runs, majority("rte", floor)])
        floors = frame.groupby("task")["floor"].first()
        assert floors["rte"] == floor and np.isnan(floors["cola"])
        assert (frame["informative"] | (left_out & (frame["task"] == "rte"))).all()
        curves = strategy_frame(frame, HALVES)
        row = claims_of.verdicts(LAYERS, curves, curves, empty, empty).set_index("claim").loc[claim]
        assert row["verdict"] == (claims.NOT_RUN if left_out else "holds")
        assert row["evidence"].startswith("not in the paper: 50.0 % (50.0–50.0) on CoLA (n = 3)")
        assert row["evidence"].endswith("left out, dense close to one answer for all: RTE") is left_out
    curves = strategy_frame(quality_frame([*runs, *(majority(task, 79.0) for task in TASKS)]), HALVES)
    row = claims_of.verdicts(LAYERS, curves, curves, empty, empty).set_index("claim").loc[claim]
    assert row["ours"] == row["verdict"] == claims.NOT_RUN
    assert row["evidence"] == "left out, dense close to one answer for all: RTE, CoLA"


def test_without_runs_everything_but_the_size_is_not_run_yet():
    frame = quality({})
    curves = strategy_frame(frame, HALVES)
    assert curves.empty
    for orders in (curves, strategy_frame(frame, {})):
        found = claims_of.verdicts(LAYERS, curves, orders, training_speed_frame([]), latency_frame([]))
        assert found["ours"].tolist()[1:] == [claims.NOT_RUN] * 6
        assert found["verdict"].tolist() == ["holds"] + [claims.NOT_RUN] * 6


def test_a_strategy_that_lacks_runs_is_compared_on_the_shared_ones():
    frame = quality({("before", (4, 5, 6)): 70.0, ("before", (1, 2, 3)): 60.0})
    lonely = frame[(frame["task"] == "cola") & (frame["drop"] == (1, 2, 3))].index
    curves = strategy_frame(frame.drop(lonely), HALVES)
    empty = training_speed_frame([])
    found = claims_of.verdicts(LAYERS, curves, curves, empty, empty).set_index("claim")
    row = found.loc["Dropping from the top is the best or near-best strategy"]
    assert row["ours"] == "rank 1 of 2" and "mean over RTE, 2 seeds each" in row["evidence"]


def test_operating_points_stand_beside_their_own_row_of_the_paper():
    """Table 1 has 44.3 % of the heads twice, with all units and without 47.7 % of them."""
    points = [
        (0.557, 0.523, "none"),
        (0.557, 0.523, "retrain"),
        (0.474, 0.348, "retrain and distil"),
        (0.3, 0.2, "none"),
    ]
    rows = [{"title": "SQuAD 1.1", "kind": "both", "selection": "l0", "heads": heads, "units": units,
             "recovery": recovery, "retained": 90.0} for heads, units, recovery in points]  # fmt: skip
    table = structured_qa.data_sets_frame(pd.DataFrame(rows)).set_index(["heads removed (%)", "recovery"])["published"]
    printed = structured_qa.published_points().query("place == 'v1 Table 1'")
    wanted = printed.set_index(["heads removed (%)", "units removed (%)", "recovery"])["retained"]
    assert table[44, "none"] == wanted[44.3, 47.7, "none"] != wanted[44.3, 0, "none"]
    assert table[53, "retrain and distil"] == wanted[52.6, 65.2, "retrain"]
    later = structured_qa.published_points().query("place != 'v1 Table 1'")
    (retrained,) = later.query("heads == 0.56 and recovery == 'retrain'")["retained"]
    assert table[44, "retrain"] == retrained and np.isnan(table[70, "none"])
    assert structured_qa.data_sets_frame(pd.DataFrame(rows).query("kind == 'heads'")).empty


def test_a_data_set_on_which_no_answer_scores_nearly_as_much_decides_nothing():
    """Two data sets keep 99 %; the third keeps 50 % and counts only when its dense model is clear of the floor."""
    point = {"heads": 0.474, "units": 0.348, "kind": "both", "selection": "l0", "recovery": "retrain and distil"}
    tasks = {"squad_v1": ("SQuAD 1.1", 99.0), "policyqa": ("PolicyQA", 99.0), "squad_v2": ("SQuAD 2.0", 50.0)}
    frame = pd.DataFrame([
        {"task": task, "title": title, "seed": seed, "retained": retained, "informative": True, **point}
        for task, (title, retained) in tasks.items()
        for seed in range(claims.ENOUGH_SEEDS)
    ])  # fmt: skip
    assert structured_claims._across(frame)["verdict"] == "holds in part"
    row = structured_claims._across(frame.assign(informative=frame["task"] != "squad_v2"))
    assert row["verdict"] == "holds" and "left out" in row["evidence"] and "SQuAD 2.0" in row["evidence"]
    one_short = structured_claims._across(frame[(frame["task"] != "policyqa") | (frame["seed"] == 0)])
    assert one_short["verdict"].startswith("too few seeds")


def test_verdicts_on_quality_rest_on_the_first_data_set_above_its_floor():
    """The paper's data set comes first and keeps 50 %; near its floor it gives way to the second, which keeps 99 %."""
    claim = "Pruned to that point and retrained, it keeps nearly all of its F1"
    point = {"heads": 0.474, "units": 0.348, "embedding": 1.0, "kind": "both", "selection": "l0", "recovery": "retrain"}
    tasks = {"squad_v2": ("SQuAD 2.0", 50.0), "squad_v1": ("SQuAD 1.1", 99.0)}
    frame = pd.DataFrame([
        {"task": task, "title": title, "seed": seed, "score": 70.0, "retained": retained, **point}
        for task, (title, retained) in tasks.items()
        for seed in range(claims.ENOUGH_SEEDS)
    ])  # fmt: skip
    for left_out, title, word in ((), "SQuAD 2.0", "does not hold here"), (("squad_v2",), "SQuAD 1.1", "holds"):
        found = structured_claims.verdicts(frame.assign(informative=~frame["task"].isin(left_out)), pd.DataFrame())
        row = found.set_index("claim").loc[claim]
        assert row["verdict"] == word and title in row["ours"]
    nothing = structured_claims.verdicts(frame.assign(informative=False), pd.DataFrame()).set_index("claim").loc[claim]
    assert nothing["ours"] == nothing["verdict"] == claims.NOT_RUN


def test_the_conditions_of_timed_rows_name_every_machine_and_batch():
    rows = pd.DataFrame(
        {"engine": ["a", "b", "b"], "cpu": ["Y", "Y", "X"], "batch": [1, 1, 24], "length": 384, "threads": 2}
    )
    assert claims.timed_on(rows) == "2 engines on X at batch 24 and Y at batch 1, 384 tokens, 2 threads"
    assert claims.timed_on(rows.assign(batch=1)) == "2 engines on X and Y, batch 1 × 384 tokens, 2 threads"
    assert claims.timed_on(rows[:1]) == "1 engine on Y, batch 1 × 384 tokens, 2 threads"


def test_a_size_holds_up_to_its_tolerance_and_below():
    assert claims.as_small(101.9, 100) and claims.as_small(50, 100) and not claims.as_small(102.1, 100)
    assert f"{100 * claims.SIZE_TOLERANCE:.0f} % above" in claims.RULES


def test_published_operating_points_stand_beside_ours_at_the_same_densities():
    """44.3 and 47.7 % of the first table are 44.0 and 48.1 % of the later one: the same model of ours is near both."""
    ours = {"selection": "l0", "recovery": "none", "heads": 40 / 72, "units": 0.523, "embedding": 1.0, "retained": 95.0}
    frame = pd.DataFrame(
        [ours, ours | {"recovery": "retrain", "retained": 98.0}, ours | {"selection": "gain", "retained": 1.0}]
    )
    table = structured_qa.against_published(frame)
    found = table[table["n"] > 0]
    assert set(found["version"]) == {"first", "later"} and found["heads removed (%)"].tolist() == [44.3, 44.0, 44.0]
    assert dict(zip(found["then"], found["ours"], strict=True)) == {"none": 95.0, "retrain": 98.0}
    assert table[table["n"] == 0]["ours"].isna().all()


def chosen(kind: str, **kept: tuple[float, ...]) -> pd.DataFrame:
    """Two seeds at two densities, no retraining: selection -> what it keeps at 80 and at 25 % of the ``kind``."""
    both = {"heads": 1.0, "units": 1.0, "kind": kind, "recovery": "none"}
    return pd.DataFrame([
        both | {kind: density, "selection": name.replace("_", "-"), "seed": seed, "retained": share + 0.1 * seed}
        for name, shares in kept.items() for density, share in zip((0.8, 0.25), shares, strict=True) for seed in (0, 1)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("l0", "word", "ahead"),
    [((99.0, 60.0), "holds", 2), ((97.0, 60.0), "holds in part", 1), ((97.0, 40.0), "does not hold here", 0)],
)
def test_a_selection_is_best_only_where_it_beats_the_best_other_at_every_density(l0, word, ahead):
    """At 80 % the rival is gain, at 25 % random: which of them is best on average decides nothing."""
    frame = chosen("heads", l0=l0, gain=(98.0, 10.0), leave_one_out=(90.0, 20.0), random=(50.0, 50.0))
    row = structured_claims._best(frame, "heads", ("gain", "leave-one-out", "random"))
    assert row["verdict"] == word and f"ahead in the mean at {ahead} of 2" in row["evidence"]
    assert f"{l0[0] - 98:+.1f} points" in row["ours"] and " on 20 %" in row["ours"] and " on 75 %" in row["ours"]
    alone = structured_claims._best(frame[frame["seed"] == 0], "heads", ("gain", "leave-one-out", "random"))
    assert alone["verdict"] == "too few seeds to tell (n = 1)"


def test_a_point_of_both_kinds_is_judged_beside_the_claims():
    frame = chosen("both", l0=(99.0, 60.0), gain=(98.0, 70.0))
    mild = frame["both"] == 0.8
    frame = frame.assign(heads=np.where(mild, 0.557, 0.474), units=np.where(mild, 0.523, 0.348))
    row = structured_claims._best(frame, "both", ("gain", "random"))
    assert row["claim"].endswith(claims.NOT_CLAIMED) and (row["published"], row["verdict"]) == ("–", "holds in part")
    assert "+1.0 points (+1.0 to +1.0) on 44 % of heads and 48 % of units" in row["ours"]
    assert row["evidence"].endswith(
        "at 1 of 2, against the best of the others there (gain); not run: random; ahead at 1, behind at 1, undecided "
        "at 0; n = 2"
    )


def test_nothing_is_a_share_of_a_dense_model_that_scores_nothing():
    """CoLA's correlation is 0 where the dense model gives one answer for all."""
    frame = quality_frame([trained(dense("cola"), 0.0), trained(dropped((4, 5, 6), task="cola"), 12.0)])
    assert frame["retained"].isna().all() and frame["score"].tolist() == [0.0, 12.0]


def test_captions_count_the_examples_behind_a_score():
    runs = [record(dense(task, 0), train_examples=12298, eval_examples=1391) for task in TASKS[:1]]
    assert examples_note(runs) == "Examples here, training / scored: RTE 12,298 / 1,391."
    assert examples_note([]) == examples_note(runs, ["cola"]) == ""
    assert examples_note(runs, ["rte"]) == examples_note(runs)


def test_what_a_gpu_timed_is_not_called_the_processors():
    timed = record(dense()).model_copy(update={"hardware": {"cpu": "Toy CPU", "gpu": "Toy GPU"}})
    assert timed.ran_on("pytorch-cuda-fp16") == "Toy GPU" and timed.ran_on("onnxruntime-int8") == "Toy CPU"


def test_verdicts_say_which_papers_are_missing(tmp_path):
    study = load_profile("smoke", results=tmp_path)
    folder = tmp_path / "tables"
    folder.mkdir()
    row = {"claim": "c", "check": "size", "published": "1", "ours": "1", "verdict": "holds", "evidence": "e"}
    pd.DataFrame([row]).to_csv(folder / "05_verdicts.csv", index=False)
    table, missing = claims.verdicts(study)
    assert table["paper"].tolist() == ["Sajjad 2020"] and len(missing) == 5


def test_verdicts_are_counted_without_their_reasons(tmp_path):
    study = load_profile("smoke", results=tmp_path)
    (tmp_path / "tables").mkdir()
    row = {"claim": "c", "check": "size", "published": "1", "ours": "1", "evidence": "e"}
    given = ["not testable here", "too few seeds to tell (n = 1)", "cannot tell: the interval holds zero", "holds"]
    pd.DataFrame([row | {"verdict": verdict} for verdict in [*given, "holds"]]).to_csv(
        tmp_path / "tables" / "05_verdicts.csv", index=False
    )
    counts = claims.verdict_counts(study)
    assert counts.columns.tolist() == [
        "paper", "holds", "cannot tell", "too few seeds to tell", "not testable here", "not executed yet"
    ]  # fmt: skip
    assert counts.set_index("paper").loc["Sajjad 2020"].tolist() == [2, 1, 1, 1, 0]
    assert len(counts) == 6 and counts["not executed yet"].sum() == 5
