"""Figures of single papers from hand-made frames: uneven records neither stop them nor bend what they show."""

from typing import Any

import pandas as pd
import pytest
from conftest import record

from lib.analysis.obert import speed_frame
from lib.config import StudyError
from lib.plots.obert import speed_figure
from lib.plots.structured_qa import ORDER, recovery_figure
from lib.runs import Record
from lib.specs import LatencyModel, LatencySpec

DENSE = LatencyModel(architecture="bert-base-uncased")


def timed(engine: str, sparsity: float | None, dense_ms: float, ms: float = 0.0) -> Record:
    """A run at batch 32 of the dense model, and of a sparse one where ``sparsity`` is given."""
    models = {"dense": DENSE}
    if sparsity:
        models["sparse"] = DENSE.model_copy(update={"sparsity": sparsity})
    spec = LatencySpec(models=models, dense="dense", engines=(engine,), batch=32, length=128, threads=2, rounds=3)
    times = {"dense": dense_ms} | ({"sparse": ms} if sparsity else {})
    rows: list[dict[str, Any]] = [
        {"model": name, "engine": engine, "precision": "fp32", "batch": 32, "length": 128, "threads": 2, "n": 3,
         "median_ms": value, "q1_ms": value, "q3_ms": value, "ratio_to_dense": dense_ms / value, "size_bytes": 1}
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
    assert sparse["on engine"].tolist() == [2, 4, 8] and sparse["over fp32"].tolist() == [2, 4, 8]
    assert sparse["anchored ms"].tolist() == [1000, 500, 250]  # the dense median is 2000
    assert sparse["over best dense"].tolist() == pytest.approx([0.6, 1.2, 2.4])
    _, drawn = speed_figure(speed)
    curve = drawn[drawn["engine"] == "deepsparse-fp32"]
    assert curve["anchored ms"].tolist() == [2000, 1000, 500, 250]
    assert curve["crossover (%)"].tolist() == pytest.approx([88] * 4)  # 600 ms: four fifths of the way


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
