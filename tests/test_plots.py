"""Figures of single papers from hand-made frames: uneven records neither stop them nor bend what they show."""

import itertools
import math
from typing import Any

import pandas as pd
import pytest
from conftest import record

from lib.analysis import machines
from lib.analysis.block_movement import shown_task
from lib.analysis.deviations import units_sentence
from lib.analysis.frontier import published_curves
from lib.analysis.obert import speed_frame
from lib.claims.obert import _against_dense, _speed, speed_sentence
from lib.config import StudyError
from lib.figures import SERIES, series_style
from lib.plots import frontier as frontier_plots
from lib.plots import fullyqt as fullyqt_plots
from lib.plots.obert import crossing_table, fastest_dense, processors_figure, speed_figure
from lib.plots.structured_qa import ORDER, recovery_figure, selection_figure
from lib.records import Record
from lib.specs import LatencyModel, LatencySpec

DENSE = LatencyModel(architecture="bert-base-uncased")


def timed(
    engine: str, sparsity: float | None, dense_ms: float, ms: float = 0.0, group: int = 1,
    other: LatencyModel | None = None, other_ms: float = 0.0, spread: float = 0.0,
) -> Record:  # fmt: skip
    """A run at batch 32 of the dense model, of a sparse one where ``sparsity`` is given, and of an ``other`` one."""
    models = {"dense": DENSE} | ({"other": other} if other else {})
    if sparsity:
        models["sparse"] = DENSE.model_copy(update={"sparsity": sparsity, "group": group})
    spec = LatencySpec(models=models, dense="dense", engines=(engine,), batch=32, length=128, threads=2, rounds=3)
    times = {"dense": dense_ms} | ({"sparse": ms} if sparsity else {}) | ({"other": other_ms} if other else {})
    rows: list[dict[str, Any]] = [
        {"model": name, "engine": engine, "precision": "fp32", "batch": 32, "length": 128, "threads": 2, "n": 3,
         "median_ms": value, "q1_ms": value - spread, "q3_ms": value + spread, "ratio_to_dense": dense_ms / value,
         "size_bytes": 1}
        for name, value in times.items()
    ]  # fmt: skip
    return record(spec, rows=rows)


def test_runs_on_a_slower_machine_do_not_bend_a_curve():
    """Each run is twice as slow as the one before; the ratios, and the curve through them, stay."""
    speed = speed_frame([
        timed("deepsparse-fp32", 0.8, 1000, 500), timed("deepsparse-fp32", 0.9, 2000, 500),
        timed("deepsparse-fp32", 0.97, 4000, 500), timed("openvino-bf16", None, 600),
    ])  # fmt: skip
    sparse = speed[speed["sparsity"] > 0]
    assert sparse["over fp32"].tolist() == [2, 4, 8]
    assert sparse["over fp32 low"].tolist() == [0.5, 1, 2] and sparse["over fp32 high"].tolist() == [8, 16, 32]
    assert sparse["anchored ms"].tolist() == [1000, 500, 250]  # the dense median is 2000
    assert sparse["low ms"].tolist() == [500, 250, 125]  # as in the fastest run
    assert sparse["high ms"].tolist() == [2000, 1000, 500]  # and in the slowest
    assert sparse["over best dense"].tolist() == pytest.approx([0.6, 1.2, 2.4])
    assert sparse["over best dense low"].tolist() == pytest.approx([0.3, 0.6, 1.2])
    _, drawn = speed_figure(speed)
    curve = drawn[drawn["engine"] == "deepsparse-fp32"]
    assert curve["anchored ms"].tolist() == [2000, 1000, 500, 250]
    assert curve["faster from (%)"].tolist() == 4 * [97]  # at 80 and 90 % the runs do not say
    assert curve["slower up to (%)"].tolist() == 4 * [0]
    table = crossing_table(speed).set_index(["curve", "against dense on"])["32 × 128"]
    assert table["DeepSparse fp32", "OpenVINO bf16"] == table["DeepSparse fp32", "its fastest engine"] == "from 97 %"


def test_curves_are_compared_with_bf16_and_with_the_fastest_dense_engine():
    """Half the bits make the sparse engine faster than bf16 without zeros; against INT8 only zeros do."""
    runs = [timed("deepsparse-int8", 0.8, 500, 350), timed("deepsparse-int8", 0.97, 500, 100)]
    speed = speed_frame([*runs, timed("openvino-bf16", None, 600), timed("openvino-int8", None, 300)])
    assert fastest_dense(speed) == "openvino-int8"
    assert crossing_table(speed).to_dict("records") == [
        {"curve": "DeepSparse INT8", "against dense on": "OpenVINO bf16", "32 × 128": "without zeros"},
        {"curve": "DeepSparse INT8", "against dense on": "its fastest engine", "32 × 128": "from 97 %, slower to 80 %"},
    ]


@pytest.mark.parametrize(
    ("times", "said"),
    [((500, 100), "from 80 %"), ((590, 100), "from 97 %"), ((700, 590), "overlap"), ((700, 650), "never")],
)
def test_a_crossing_is_told_where_quartiles_are_apart_and_never_between_measured_sparsities(times, said):
    runs = [timed("deepsparse-fp32", sparsity, 1000, ms) for sparsity, ms in zip((0.8, 0.97), times, strict=True)]
    table = crossing_table(speed_frame([*runs, timed("openvino-bf16", None, 600, spread=30)]))
    assert table["32 × 128"].tolist() == [said, said]


def test_a_curve_that_overlaps_from_the_start_on_is_not_said_to_stay_slower():
    runs = [timed("deepsparse-fp32", 0.97, 610, 600), timed("openvino-bf16", None, 600, spread=30)]
    assert crossing_table(speed_frame(runs))["32 × 128"].tolist() == ["overlap", "overlap"]


def test_a_curve_that_ends_early_is_not_said_to_stay_slower():
    """CSR was timed at 80 % alone: what it does at 97 %, where DeepSparse was timed, nobody knows."""
    runs = [timed("pytorch-csr-fp32", 0.8, 1000, 900), timed("deepsparse-fp32", 0.97, 1000, 900)]
    table = crossing_table(speed_frame([*runs, timed("openvino-bf16", None, 600)]))
    states = table.groupby("curve")["32 × 128"].unique().map(list).to_dict()
    assert states == {"PyTorch CSR fp32": ["slower to 80 %"], "DeepSparse fp32": ["never (80 not timed)"]}


def test_a_curve_is_compared_with_no_bf16_that_was_not_timed():
    table = crossing_table(speed_frame([timed("deepsparse-fp32", 0.8, 1000, 300), timed("openvino-int8", None, 600)]))
    assert table.set_index("against dense on")["32 × 128"].to_dict() == {"its fastest engine": "from 80 %"}


def test_times_of_two_machines_are_not_compared():
    runs = [timed("deepsparse-fp32", 0.8, 1000, 500), timed("openvino-bf16", None, 600)]
    foreign = timed("deepsparse-fp32", 0.9, 100, 10)
    foreign.hardware["cpu"] = "another one"
    speed = speed_frame([foreign, *runs])
    pd.testing.assert_frame_equal(speed, speed_frame(runs))
    assert machines(speed) == machines(speed_frame(runs)) != "another one"
    assert machines(pd.DataFrame({"cpu": ["b", "a", "b"]})) == "a and b"


def on_matrix_units(run: Record) -> Record:
    """The same run as a processor with matrix units made it."""
    spec = run.spec.model_copy(update={"instructions": "amx_tile"})
    return run.model_copy(update={"spec": spec, "hardware": {**run.hardware, "cpu": "matrix", "isa": ["amx_tile"]}})


def test_a_kind_of_processor_has_rows_of_its_own_however_few():
    runs = [timed("deepsparse-fp32", sparsity, 1000, 500) for sparsity in (0.8, 0.9)]
    runs.append(timed("openvino-bf16", None, 600))
    there = [
        on_matrix_units(run) for run in (timed("deepsparse-fp32", 0.8, 900, 100), timed("openvino-bf16", None, 90))
    ]
    speed = speed_frame([*there, *runs])
    pd.testing.assert_frame_equal(speed[speed["instructions"] == ""].reset_index(drop=True), speed_frame(runs))
    matrix = speed[speed["instructions"] == "amx_tile"]
    assert set(matrix["cpu"]) == {"matrix (AMX)"} and matrix["over fp32"].dropna().tolist() == [1, 9]
    assert crossing_table(matrix)["32 × 128"].tolist() == ["never", "never"]
    said = units_sentence(speed_frame([*there, *[run.model_copy(update={"hardware": {
        **run.hardware, "isa": ["avx512_vnni"]}}) for run in runs]]))  # fmt: skip
    assert "matrix (AMX) has matrix units" in said and "not measured" not in said
    assert "has vector instructions for INT8 alone (avx512_vnni) and no matrix units (AMX)." in said


def test_a_sparse_model_that_wins_on_one_processor_alone_wins_in_part():
    runs = [timed("deepsparse-fp32", 0.8, 1000, 500), timed("openvino-bf16", None, 600)]
    there = [on_matrix_units(run) for run in (runs[0], timed("openvino-bf16", None, 90))]
    row = _against_dense(speed_frame([*runs, *there]))
    cpu = runs[0].processor
    assert row["verdict"] == "holds in part"
    shown = {f"1.20 × over 1 condition on {cpu}", "0.18 × over 1 condition on matrix (AMX)"}
    assert set(row["ours"].split("; ")) == shown
    overlap = [on_matrix_units(run) for run in (runs[0], timed("openvino-bf16", None, 505, spread=30))]
    assert _against_dense(speed_frame([*runs, *overlap]))["verdict"] == "cannot tell: the quartiles overlap"


def test_zeros_are_compared_between_processors_at_the_conditions_that_several_timed():
    runs = [timed("deepsparse-fp32", sparsity, 1000, ms, group) for sparsity, ms, group in
            ((0.8, 700, 1), (0.8, 500, 4), (0.9, 300, 1))] + [timed("openvino-bf16", None, 600)]  # fmt: skip
    there = [on_matrix_units(run) for run in (runs[0], timed("openvino-bf16", None, 90))]
    fig, drawn = processors_figure(speed_frame([*runs, *there]))
    cpu = runs[0].processor
    found = drawn.set_index(["cpu", "sparsity"])["over best dense"].to_dict()
    assert found == {(cpu, 80.0): 1.2, (cpu, 90.0): 2.0, ("matrix (AMX)", 80.0): pytest.approx(90 / 700)}
    assert drawn.set_index(["cpu", "sparsity"])["group"].to_dict()[cpu, 80.0] == 4
    assert drawn["complete"].all()
    also = timed("openvino-sparse-int8", 0.97, 1000, 100)  # the fastest there, and not timed at 80 and 90 %
    _, drawn = processors_figure(speed_frame([*runs, *there, also, on_matrix_units(also)]))
    assert drawn["complete"].sum() == 0, "at 97 % DeepSparse was not timed, below it OpenVINO"
    dense = timed("openvino-bf16", None, 600)
    _, alone = processors_figure(speed_frame([runs[0], also, timed("deepsparse-fp32", 0.97, 1000, 400), dense]))
    assert alone["complete"].tolist() == [False, True] and alone["sparsity"].tolist() == [80.0, 97.0]
    assert [text.get_text() for text in fig.legends[0].texts] == sorted(drawn["cpu"].unique())


def test_zeros_timed_on_one_processor_are_drawn_at_every_condition():
    runs = [timed("deepsparse-fp32", 0.8, 1000, 500), timed("openvino-bf16", None, 600)]
    for one in (runs, [*runs, on_matrix_units(runs[1])]):
        _, drawn = processors_figure(speed_frame(one))
        assert drawn["cpu"].tolist() == [runs[0].processor] and drawn["over best dense"].tolist() == [1.2]
    for none in (pd.DataFrame(), speed_frame(runs[1:])):
        with pytest.raises(StudyError, match="no sparse model of full depth is timed"):
            processors_figure(none)


def test_a_papers_speed_up_is_judged_on_every_processor():
    half = DENSE.model_copy(update={"drop": tuple(range(7, 13)), "sparsity": 0.9})
    runs = [timed("deepsparse-fp32", None, 1000, other=half, other_ms=ms) for ms in (200, 100)]
    row = _speed(speed_frame([runs[0], on_matrix_units(runs[1])]), "speed")
    assert row["verdict"] == "holds in part"
    assert row["ours"] == f"5.0 × on {runs[0].processor}; 10.0 × on matrix (AMX)"
    assert _speed(speed_frame([runs[0]]), "speed")["verdict"] == "does not hold here"


def test_runs_of_four_are_curves_of_their_own_and_say_when_they_stay_slower():
    runs = [timed("deepsparse-fp32", 0.8, 1000, 900, group) for group in (1, 4)]
    fig, drawn = speed_figure(speed_frame([*runs, timed("openvino-bf16", None, 600)]))
    assert set(drawn["curve"]) == {"DeepSparse fp32", "DeepSparse fp32, runs of 4", "OpenVINO bf16"}
    labels = [text.get_text() for text in fig.legends[0].texts]
    assert "DeepSparse fp32, runs of 4" in labels and drawn["faster from (%)"].isna().all()
    table = crossing_table(speed_frame([*runs, timed("openvino-bf16", None, 600)]))
    assert table["curve"].unique().tolist() == ["DeepSparse fp32", "DeepSparse fp32, runs of 4"]
    assert set(table["32 × 128"]) == {"never"}


def test_speed_sentence_leaves_out_engines_without_fp32_and_says_when_dense_models_gain_more():
    """INT8 without its fp32 has no ratio; a dense model of half the layers gains more than zeros do."""
    half = DENSE.model_copy(update={"drop": tuple(range(7, 13))})
    records = [timed("deepsparse-fp32", 0.8, 1000, 500, 4), timed("onnxruntime-int8", None, 100),
               timed("openvino-fp32", None, 1200, other=half, other_ms=400)]  # fmt: skip
    speed = speed_frame(records)
    assert speed.set_index("engine")["over fp32"].isna().to_dict()["onnxruntime-int8"]
    said = speed_sentence(speed)
    assert "2.0× with zeros (DeepSparse fp32, sparse, batch 32 × 128 tokens), but more without any: 3.0×" in said
    assert "nan" not in said and "0.20 × (0.20 to 0.20; DeepSparse fp32" in said
    assert "and less without any" in speed_sentence(speed[speed["layers"] == 12])


@pytest.mark.parametrize(
    ("dense", "verdict"),
    [(600, "holds"), (400, "does not hold here"), (510, "cannot tell: the quartiles overlap")],
)
def test_a_sparse_model_beats_dense_ones_only_where_the_quartiles_are_apart(dense, verdict):
    speed = speed_frame([timed("deepsparse-fp32", 0.9, 1000, 500, spread=30), timed("openvino-bf16", None, dense)])
    row = _against_dense(speed)
    assert row["verdict"] == verdict
    assert ("different runs" in row["evidence"]) is (dense == 510)
    assert row["ours"] == f"{dense / 500:.2f} × over 1 condition on {machines(speed)}"
    assert "DeepSparse fp32, sparse" in row["evidence"]


def test_the_papers_compound_stands_beside_the_best_sparse_model():
    runs = [timed("deepsparse-fp32", 0.8, 1000, 500, 4), timed("deepsparse-fp32", 0.97, 1000, 250)]
    speed = speed_frame([*runs, timed("openvino-bf16", None, 600)])
    row, cpu = _against_dense(speed), machines(speed)
    assert row["ours"] == f"2.40 × over 1 condition on {cpu}"
    assert row["evidence"].endswith(
        f"at 80 % in runs of four, as the paper's compound: 1.20 × over 1 condition on {cpu}"
    )
    elsewhere = [timed("openvino-sparse-int8", 0.8, 1000, 100, 4), timed("openvino-bf16", None, 600)]
    without = speed_frame([on_matrix_units(run) for run in elsewhere])
    assert "as the paper's compound" not in _against_dense(without)["evidence"], "the paper's engine was not timed"


@pytest.mark.parametrize(
    ("isa", "said"),
    [(["avx2", "amx_tile", "amx_int8"], "has matrix units for bf16 and INT8 (amx_tile, amx_int8)."),
     (["avx512_bf16", "avx2"], "vector instructions for bf16 and INT8 (avx512_bf16) and no matrix units"), ([], "")],
)  # fmt: skip
def test_records_say_whether_the_timed_machine_has_matrix_units(isa, said):
    run = timed("openvino-bf16", None, 600)
    run.hardware["isa"] = isa
    found = units_sentence(speed_frame([run]))
    assert said in found and bool(found) is bool(isa)


def test_recovery_figure_takes_operating_points_with_different_recoveries():
    both = "retrain and distil"
    rows = [("47 %", "none", 90.0), ("47 %", "none", 92.0), ("47 %", both, 99.0), ("35 %", "none", 80.0)]
    points = pd.DataFrame(rows, columns=["removed", "recovery", "retained"]).assign(task="squad_v1", seed=[0, 1, 0, 0])
    fig, drawn = recovery_figure(points)
    labels = [label.get_text().replace("\n", " ") for label in fig.axes[0].get_xticklabels()]
    assert labels == [name for name in ORDER if name in ("none", both)]
    found = drawn.set_index(["removed", "recovery"])
    assert found.loc[("47 %", "none"), "retained"] == 91 and found.loc[("47 %", "none"), "n"] == 2
    assert ("35 %", both) not in found.index
    with pytest.raises(StudyError, match="no operating point"):
        recovery_figure(points[:0])


def models(*rows: tuple[str, str, float, float, bool]) -> pd.DataFrame:
    """What ``frontier.by_configuration`` gives, from (task, style, weights kept, retained, trained)."""
    families = {"top": "Poor Man's BERT", "obert": "oBERT", "l0": "Structured pruning"}
    return pd.DataFrame([
        {"task": task, "title": task.upper(), "family": families[style], "style": style, "trained": trained,
         "rival": False, "floor": math.nan, "weights kept (%)": kept, "size (MB)": 20 + kept, "dense (MB)": 120.0,
         "cost (core-min)": 1.0 + index, "retained": retained, "low": retained - 1,
         "high": retained + 1 if trained else math.nan, "n": 2}
        for index, (task, style, kept, retained, trained) in enumerate(rows)
    ])  # fmt: skip


MODELS = models(
    ("a", "top", 50, 90, True), ("a", "top", 50, 80, True), ("a", "top", 80, 99, True), ("a", "top", 90, 98, True),
    ("b", "top", 50, 40, True), ("b", "obert", 10, 95, False), ("b", "obert", 20, 30, False),
)  # fmt: skip


@pytest.mark.parametrize("cost", frontier_plots.COST_NAMES)
def test_a_front_holds_what_nothing_of_its_method_and_task_beats(cost):
    fig, rows = frontier_plots.quality_against(MODELS, cost)
    panels = [ax for ax in fig.axes if ax.get_visible()]
    assert [ax.get_title() for ax in panels] == ["B", "A"]  # the task with more methods comes first
    assert rows.index[rows["front"]].tolist() == [0, 2, 4, 5]
    assert panels[0].get_ylim() == (frontier_plots.FLOOR, 104)
    assert ("Dense" in [text.get_text() for text in fig.legends[0].texts]) is (cost == "size (MB)")
    large, low = "Large: two seeds or more (4 of 4 models on a front).", "2 of 7 models keep less than 50 % and are not"
    assert frontier_plots.markers_and_floor(rows, cost) == f"{large} {low} drawn, 1 of them on a front."
    few = rows[:4].assign(n=1, **{cost: [math.nan, 1, 2, 3]})
    nowhere = "1 model cannot be placed: what it began with is not on record."
    assert (
        frontier_plots.markers_and_floor(few, cost) == f"Large: two seeds or more (0 of 2 models on a front). {nowhere}"
    )


def test_neither_baselines_nor_one_answer_for_all_are_on_a_front():
    """The best model of A is a rival; of B's two that are left, one retains what one answer for all does."""
    points = MODELS.assign(rival=[False, False, True] + 4 * [False], floor=[math.nan] * 4 + [94.8] * 3)
    fig, rows = frontier_plots.quality_against(points, "weights kept (%)")
    assert rows.index[rows["front"]].tolist() == [0, 3]
    dotted = [line.get_ydata()[0] for ax in fig.axes for line in ax.lines if line.get_linestyle() == ":"]
    assert dotted == [94.8] and "one answer for all" in [text.get_text() for text in fig.legends[0].texts]


def test_methods_that_only_cut_are_named():
    assert frontier_plots.only_compressed(MODELS).endswith("so far: oBERT on B. ")
    assert frontier_plots.only_compressed(MODELS[:4]) == ""


def test_every_paper_with_a_curve_stands_beside_ours():
    curves = published_curves()
    ends = curves.groupby("style")["weights kept (%)"].agg(["max", "min"])
    assert (ends["max"] == 100).all() and set(ends.index) == {"top", "l0", "obert", "hybrid", "kronecker"}
    assert ends.loc["obert", "min"] == 3 and ends.loc["top", "min"] == 50
    for ours in (MODELS[MODELS["task"] == "b"], MODELS[:0]):
        fig, rows = frontier_plots.beside_published(ours)
        names = [text.get_text() for text in fig.legends[0].texts]
        assert names[-3:] == ["Ours", "Published", "99 % of dense"] and names.count("oBERT") == 1
        assert len(rows) == len(curves) + (2 if len(ours) else 0)  # the worse oBERT point is larger, too


def test_the_recipes_on_the_front_are_named():
    rows = [
        ("dense", "openvino-bf16", 3.0, 100.0),
        ("small", "openvino-bf16", 6.0, 97.0),
        ("worse", "openvino-int8", 5.0, 96.0),
    ]
    means = pd.DataFrame(rows, columns=["recipe", "engine", "speed", "retained"]).assign(low=95.0, high=float("nan"))
    means = means.assign(processor="one", **{"speed q1": means["speed"] - 0.5, "speed q3": means["speed"] + 1})
    fig = frontier_plots.recipes_on_engines(means, ((10, 98.0),), "speed")
    assert sorted(text.get_text() for text in fig.axes[0].texts) == ["dense", "small"]
    (front,) = [line for line in fig.axes[0].lines if line.get_label() == "Pareto front"]
    assert front.get_xydata().tolist() == [[6, 97], [3, 100]]
    assert front.get_drawstyle() == "steps-post", "between three and six times faster 97 % is what one can have"
    assert fig.axes[0].get_title() == ""
    both = pd.concat([means, means.assign(processor="another", speed=2 * means["speed"])])
    fig = frontier_plots.recipes_on_engines(both, ((10, 98.0),), "speed")
    assert [ax.get_title() for ax in fig.axes] == ["one", "another"]
    fronts = [line for ax in fig.axes for line in ax.lines if line.get_label() == "Pareto front"]
    assert [line.get_xdata().tolist() for line in fronts] == [[6, 3], [12, 6]]


def test_names_of_neighbours_on_the_front_do_not_cover_each_other():
    rows = [("alone", 12.0, 86.0), ("two layers dropped and units cut", 7.0, 98.6), ("two layers dropped", 7.6, 98.4)]
    means = pd.DataFrame(rows, columns=["recipe", "speed", "retained"]).assign(
        engine="openvino-int8",
        low=float("nan"),
        high=float("nan"),
        processor="one",
        **{"speed q1": 7.0, "speed q3": 12.0},
    )
    fig = frontier_plots.recipes_on_engines(means, ((29, 92.5),), "speed")
    fig.canvas.draw()
    boxes = [text.get_window_extent() for text in fig.axes[0].texts]
    assert len(boxes) == 3 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_the_shown_task_has_pruned_runs_beside_a_dense_one():
    rows = [("a", "dense", 100.0), ("b", "dense", 100.0), ("b", "hybrid", 97.0), ("c", "hybrid", float("nan"))]
    frame = pd.DataFrame(rows, columns=["task", "method", "retained"])
    assert shown_task(frame, ["a", "c", "b"]) == "b" and shown_task(frame[:1], ["a", "b"]) == "a"
    assert shown_task(frame[:0], ["c"]) == "c"


def test_selections_are_drawn_for_heads_units_and_both():
    """Two models that lack heads and units are one point each, at the share of weights that they lack."""
    columns = ["kind", "selection", "heads", "units", "layers kept", "score"]
    rows = [("none", "dense", 1, 1, 1, 80.0), ("heads", "l0", 0.5, 1, 0.8, 79.0), ("both", "l0", 0.5, 0.5, 0.45, 75.0),
            ("both", "gain", 0.5, 0.5, 0.45, 70.0)]  # fmt: skip
    fig, drawn = selection_figure(pd.DataFrame(rows, columns=columns))
    both = drawn[drawn["kind"] == "both"]
    assert both["removed"].tolist() == [55.0, 55.0] and dict(zip(both["method"], both["score"], strict=True)) == {
        "l0": 75,
        "gain": 70,
    }
    assert [ax.get_xlabel().split()[0] for ax in fig.axes] == ["heads", "units", "both:"]


def test_ways_at_one_width_stand_beside_each_other_and_the_papers_points_are_told_apart():
    rows = [("A", "post", 8, 99.0), ("A", "post", 8, 97.0), ("A", "aware", 8, 98.0), ("B", "post", 4, 50.0)]
    ours = pd.DataFrame(rows, columns=["title", "procedure", "bits", "retained"])
    theirs = pd.DataFrame({"procedure": ["aware", "post"], "bits": [6, 8], "retained": [100.0, 99.0]})
    fig, drawn = fullyqt_plots.score_against_bits(ours, theirs, [8, 4])
    means = drawn[~drawn["published"]].set_index(["task", "method"])["retained"]
    assert means["A", "quantized-post"] == 98 and means["A", "quantized-aware"] == 98
    assert set(drawn[drawn["published"]]["method"]) == {"quantized-scratch", "quantized-post"}
    above, near = fig.axes[0], fig.axes[2]
    assert [ax.get_title() for ax in fig.axes[:2]] == ["A", "B"] and near.get_ylim() == fullyqt_plots.NEAR
    assert near.get_xticks().tolist() == [4, 6, 8]
    places = {float(line.get_xdata()[0]) for line in above.lines if line.get_label() and line.get_xdata()[0] > 7}
    assert len(places) >= 2  # at 8 bits, side by side
    with pytest.raises(StudyError, match="no quantised run"):
        fullyqt_plots.score_against_bits(ours[:0], theirs, [8, 4])


def test_a_part_has_its_place_and_a_bar_over_its_seeds():
    rows = [
        ("A", "softmax", 8, 99.0),
        ("A", "softmax", 8, 97.0),
        ("A", "layer_norm", 8, 90.0),
        ("B", "layer_norm", 8, 60.0),
    ]
    parts = pd.DataFrame(rows, columns=["title", "part", "bits", "retained"]).assign(seed=[0, 1, 0, 0], task="a")
    fig = fullyqt_plots.parts_alone(parts)
    assert [label.get_text() for label in fig.axes[0].get_xticklabels()] == ["softmax", "layer_norm"]
    points = fig.axes[0].containers[0].lines[0]
    assert points.get_ydata().tolist() == [98, 90] and fig.axes[1].containers[0].lines[0].get_ydata().tolist() == [60]


def test_steps_of_layer_norms_have_a_colour_for_what_comes_before_and_fit_into_the_axis():
    rows = [("A", 1, "embeddings", 0.04), ("A", 2, "attention", 0.004), ("A", 3, "feed-forward", 9.0)]
    norms = pd.DataFrame(rows, columns=["title", "place", "after", "coarse"])
    (ax,) = fullyqt_plots.layer_norm_steps(norms).axes
    drawn = {line.get_label(): line for line in ax.lines if line.get_label().startswith("after")}
    assert set(drawn) == {f"after {kind}" for kind in fullyqt_plots.AFTER}
    assert len({line.get_color() for line in drawn.values()}) == 3
    assert ax.get_ylim()[0] < 0.004 and ax.get_ylim()[1] > 9


def test_lines_of_the_delay_are_means_of_the_drawn_seeds():
    rows = [(8, 0.0, 98.0), (8, 0.0, 100.0), (8, 0.5, 97.0), (4, 0.0, 80.0)]
    fig = fullyqt_plots.score_against_delay(pd.DataFrame(rows, columns=["bits", "delay", "retained"]))
    lines = [list(line.get_ydata()) for line in fig.axes[0].lines]
    assert [98, 100, 97] in lines and [99, 97] in lines and [80] in lines


def test_engines_of_one_model_share_a_row_and_rows_keep_their_order():
    rows = [("translation", "pytorch-fp32", 1.0), ("BERT", "openvino-int8", 4.0), ("BERT", "pytorch-fp32", 0.9)]
    (ax,) = fullyqt_plots.speed_of_engines(pd.DataFrame(rows, columns=["what", "engine", "speedup"])).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["translation", "BERT"]
    points = {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in ax.lines if len(line.get_xdata()) == 1
    }
    assert points == {(1, 0), (4, 1), (0.9, 1)}


def test_series_differ_in_colour_or_line():
    styles = [series_style(number) for number in range(3 * len(SERIES))]
    assert len({(style["color"], str(style["linestyle"])) for style in styles}) == len(styles)
    assert {style["linestyle"] for style in styles[: len(SERIES)]} == {"-"}
