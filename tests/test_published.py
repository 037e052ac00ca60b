"""The papers' numbers: complete, clean, and refused when damaged."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import BertModel

from lib import figures, published
from lib.config import StudyError
from lib.models import ARCHITECTURES, count_parameters
from lib.surgery import cut, even_shapes

HEADER = "paper,place,model,task,method,setting,metric,value,unit,evidence,source,note\n"
ROW = "toy2020,Table 1,BERT-base,sst2,top,K=2; drop=after,score,91.5,%,paper,arXiv:0000.00000v1,\n"


def write(folder: Path, text: str) -> Path:
    (folder / "toy2020.csv").write_text(text, encoding="utf-8")
    return folder


def test_every_shipped_file_is_valid_and_uses_the_studys_names():
    assert "sajjad2020" in published.papers()
    for paper in published.papers():
        frame = published.published(paper)
        assert set(frame["method"]) <= set(figures.METHODS)
        assert not frame.duplicated(["place", "model", "task", "method", "setting", "metric"]).any()


def test_poor_mans_bert_is_complete_and_numeric():
    frame = published.published("sajjad2020")
    assert len(frame) == 262
    assert frame["evidence"].value_counts().to_dict() == {"paper": 229, "digitised": 33}
    units = frame.groupby("metric")["unit"].unique().map(list).to_dict()
    assert units == {
        "score": ["%"],
        "score_loss": ["points"],
        "parameters": ["M"],
        "finetuning_speedup": ["x"],
        "inference_time_reduction": ["%"],
        "layers_droppable": ["layers"],
    }


@pytest.mark.parametrize(
    ("filters", "value"),
    [
        ({"model": "BERT-base", "metric": "parameters", "K": 6}, 66),
        ({"model": "BERT-base", "metric": "finetuning_speedup", "K": 6}, 1.94),
        ({"model": "BERT-base", "metric": "inference_time_reduction", "K": 6}, 50),
        ({"model": "XLNet-base", "metric": "parameters", "K": 4}, 86),
        ({"model": "RoBERTa-base", "task": "rte", "K": 2}, 71.84),
        ({"model": "BERT-base", "task": "sst2", "drop": "after"}, 90.02),
        ({"model": "BERT-base", "method": "bottom", "K": 6}, 70.28),
        ({"model": "DistilBERT", "task": "qqp", "tolerance": 3}, 4),
    ],
)
def test_known_numbers(filters, value):
    assert published.published("sajjad2020", **filters)["value"].item() == value


def test_score_loss_of_table_3_follows_from_table_1():
    """The loss printed in Table 3 is the mean over the tasks of Table 1, so a mistyped score would show."""
    for model, layers in (("BERT-base", (2, 4, 6)), ("XLNet-base", (2, 4, 6)), ("DistilBERT", (1, 2, 3))):
        scores = published.published("sajjad2020", place="v1 Table 1", model=model).pivot_table("value", "K")["value"]
        for k in layers:
            printed = published.published("sajjad2020", metric="score_loss", model=model, K=k)["value"].item()
            assert scores[0] - scores[k] == pytest.approx(printed, abs=0.06), (model, k)


def test_structured_qa_pruning_is_complete_and_numeric():
    frame = published.published("mccarley2019")
    assert len(frame) == 94
    assert frame["evidence"].value_counts().to_dict() == {"digitised": 35, "secondary": 25, "paper": 21, "derived": 13}
    units = frame.groupby("metric")["unit"].unique().map(list).to_dict()
    assert units == {"decode_time": ["s"], "score": ["%"], "score_loss": ["points"], "size": ["MiB"], "speedup": ["x"]}
    assert frame["heads"].dropna().between(0, 100).all() and frame["units"].dropna().between(0, 100).all()


@pytest.mark.parametrize("place", ["v1 Table 1", "later version, table"])
def test_speedups_of_structured_qa_pruning_are_the_ratios_of_the_printed_times(place):
    frame = published.published("mccarley2019", place=place)
    points = frame.pivot_table("value", ["heads", "units", "recovery"], "metric").dropna(subset="decode_time")
    dense = points.xs((0, 0), level=("heads", "units"))["decode_time"].item()
    assert len(points) == {"v1 Table 1": 6, "later version, table": 7}[place]
    assert (dense / points["decode_time"] - points["speedup"]).abs().max() <= 0.00501  # printed to two places


def mebibytes(heads: float, units: float) -> float:
    """Size of BERT-large with its pooler in fp32 when these percentages of all heads and units are removed."""
    config = ARCHITECTURES["bert-large-uncased"]
    with torch.device("meta"):
        model = BertModel(config)
    shapes = even_shapes(config, 1 - heads / 100, 1 - units / 100)
    cut(model, [range(kept) for kept, _ in shapes], [range(kept) for _, kept in shapes])
    return (4 * count_parameters(model)) / 2**20


@pytest.mark.parametrize("place", ["v1 Table 1", "later version, table"])
def test_sizes_of_structured_qa_pruning_follow_from_the_printed_percentages(place):
    """Each within 1 %; 1278.5 MiB is printed as 1278 in one version and 1279 in the other."""
    frame = published.published("mccarley2019", place=place, metric="size")
    printed = {(row.heads, row.units): row.value for row in frame.itertuples() if row.recovery == "none"}
    exact = {point: mebibytes(*point) for point in printed}
    assert exact[0, 0] == pytest.approx(1278.47, abs=0.01)
    differences = {point: abs(exact[point] - value) for point, value in printed.items()}
    assert max(differences[point] / printed[point] for point in printed) < 0.01
    within_one = sum(difference < 1 for difference in differences.values())
    assert (within_one, len(printed)) == {"v1 Table 1": (3, 5), "later version, table": (5, 7)}[place]


def test_a_filter_may_list_values_and_the_result_is_the_callers_own():
    frame = published.published("sajjad2020", metric="parameters", model=["BERT-base", "XLNet-base"], K=(2, 6))
    assert list(frame["value"]) == [94, 66, 101, 71]
    frame["value"] = 0.0
    again = published.published("sajjad2020", metric="parameters", model="BERT-base", K=6)
    assert again["value"].item() == 66


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"paper": "nobody1999"}, "nobody1999.csv is missing"),
        ({"paper": "sajjad2020", "colour": "red"}, "no column 'colour'"),
        ({"paper": "sajjad2020", "model": "BERT-huge"}, "there is BERT-base"),
    ],
)
def test_unknown_names_are_refused_with_what_there_is(call, says):
    with pytest.raises(StudyError, match=says) as caught:
        published.published(**call)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no rows"),
        (HEADER, "no rows"),
        (HEADER + ROW + ROW.replace("91.5", "about 91"), "line 3: value"),
        (HEADER + ROW.replace("91.5", "nan"), "line 2: value"),
        (HEADER + ROW.replace(",paper,", ",hearsay,"), "line 2: evidence"),
        (HEADER + ROW.replace("K=2; drop=after", "two layers"), "line 2: setting"),
        (HEADER + "toy2020,Table 1,BERT-base\n", "line 2: wrong number of columns"),
        (HEADER + ROW.rstrip("\n") + ",extra\n", "line 2: wrong number of columns"),
        (HEADER + ROW.replace("toy2020", "other2021"), "rows of 'other2021'"),
        (HEADER + ROW.replace("Table 1", '"Table 1'), "CSV"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, text, says):
    with pytest.raises(StudyError, match=says) as caught:
        published.published("toy2020", folder=write(tmp_path, text))
    assert "toy2020.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_become_columns(tmp_path):
    frame = published.published("toy2020", folder=write(tmp_path, HEADER + ROW + ROW.replace("; drop=after", "")))
    assert list(frame["K"]) == [2, 2]
    assert frame["drop"][0] == "after" and pd.isna(frame["drop"][1])
