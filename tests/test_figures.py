"""House style, byte-stable files, honest intervals, and tables that LaTeX takes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lib import engines, figures, tables
from lib.config import StudyError
from lib.intervals import bootstrap_interval
from lib.plots.over_training import density_over_training

DRAW = """
import sys
import matplotlib
matplotlib.use("Agg")
import pandas as pd
from lib import figures
frame = pd.DataFrame({"K": [0, 0, 1, 1, 2, 2], "score": [90, 91, 88, 86.5, 70, 74]})
fig, ax = figures.new_figure("column")
rows = pd.concat([figures.band_plot(ax, frame, "K", "score", "top"),
                  figures.band_plot(ax, frame + 1, "K", "score", "bottom", published=True)])
figures.retained_line(ax, 90)
ax.set_xlabel("Layers dropped $K$")
figures.outside_legend(fig)
figures.save_figure(fig, "drops", rows, "Toy. " + figures.spread_note(rows), sys.argv[1])
"""


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> list[Path]:
    """The same figure saved by two processes, with different hash seeds."""
    folders = []
    for seed in ("1", "2"):
        folder = tmp_path_factory.mktemp("figures")
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", DRAW, str(folder)], check=True, env=environment)
        folders.append(folder)
    return folders


def test_files_are_the_same_bytes_in_two_processes(saved):
    first, second = saved
    names = sorted(path.name for path in first.iterdir())
    assert names == ["drops.csv", "drops.pdf", "drops.png", "drops.svg", "drops.txt"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_size_resolution_fonts_and_rows(saved):
    folder = saved[0]
    with Image.open(folder / "drops.png") as image:
        assert image.size == (975, 690)  # 3.25 × 2.3 in at 300 dpi
    pdf = (folder / "drops.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType, embedded
    assert b"CreationDate" not in pdf
    assert "<dc:date>" not in (folder / "drops.svg").read_text(encoding="utf-8")
    rows = pd.read_csv(folder / "drops.csv")
    assert list(rows.columns) == ["method", "published", "K", "score", "low", "high", "n"]
    assert rows["n"].tolist() == [2] * 6 and rows["published"].tolist() == [False] * 3 + [True] * 3
    interval = "Mean and 95 % bootstrap interval (band or bar; of two or three seeds: their range) over n = 2 seeds."
    assert (folder / "drops.txt").read_text() == f"Toy. {interval}\n"


def test_every_method_has_its_own_look_and_dense_is_black():
    looks = [(color, marker) for color, marker, _ in figures.METHODS.values()]
    assert len(set(looks)) == len(looks)
    assert figures.METHODS["dense"][0] == "#000000"
    assert "#F0E442" not in {color for color, _ in looks}  # Okabe-Ito's yellow is too pale on paper
    headline = ["dense", "magnitude", "l0", "obert", "hybrid", "top", "int8", "kronecker"]
    assert len({figures.METHODS[method][0] for method in headline}) == len(headline)
    strategies = ["top", "bottom", "odd", "even", "symmetric", "contribution"]
    assert len({figures.METHODS[method][0] for method in strategies}) == len(strategies)


def test_every_engine_has_a_style():
    for engine in engines.ENGINES:
        assert figures.style_of(engine)["label"]


def test_ours_is_filled_and_published_hollow():
    ours, published = figures.style_of("top"), figures.style_of("top", published=True)
    assert ours["markerfacecolor"] == ours["color"] == published["color"]
    assert published["markerfacecolor"] == "white" and published["linestyle"] != ours["linestyle"]
    with pytest.raises(StudyError, match="no style for method 'tpo'"):
        figures.style_of("tpo")
    with pytest.raises(StudyError, match="figure size 'poster'"):
        figures.new_figure("poster")


def test_bootstrap_interval():
    values = np.random.default_rng(3).normal(80, 2, size=40)
    interval = bootstrap_interval(values)
    assert interval == bootstrap_interval(values)
    assert interval.mean == pytest.approx(values.mean()) and interval.n == 40
    half = 1.96 * values.std() / np.sqrt(40)  # the normal approximation is close at n = 40
    assert interval.low == pytest.approx(values.mean() - half, abs=0.15)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.15)

    alone = bootstrap_interval([81.0, float("nan")])
    assert alone.mean == 81 and alone.n == 1 and np.isnan(alone.low) and np.isnan(alone.high)
    assert bootstrap_interval([5.0, 5.0]) == (5, 5, 5, 2)
    assert np.isnan(bootstrap_interval([]).mean)


def test_band_plot_draws_what_it_returns():
    _, ax = figures.new_figure()
    frame = pd.DataFrame({"K": [1, 0, 1, 0], "score": [80.0, 90.0, 84.0, 92.0]})
    rows = figures.band_plot(ax, frame, "K", "score", "odd")
    assert rows[["K", "score", "n"]].to_numpy().tolist() == [[0, 91, 2], [1, 82, 2]]
    assert ax.get_lines()[0].get_ydata().tolist() == [91, 82]
    assert len(ax.collections) == 1
    assert (rows["low"] <= rows["score"]).all() and (rows["score"] <= rows["high"]).all()

    _, ax = figures.new_figure()
    lonely = pd.DataFrame({"K": [0, 1, 1, 2, 3, 3], "score": [9.0, 7.0, 8.0, 6.0, 3.0, 5.0]})
    figures.band_plot(ax, lonely, "K", "score", "odd")
    (bars,) = ax.containers  # a band would have no width at K = 1 and K = 3
    assert bars.lines[0].get_xdata().tolist() == [1, 3] and len(ax.collections) == 1

    _, ax = figures.new_figure()
    moved = figures.band_plot(ax, lonely, "K", "score", "odd", shift=0.25)
    assert moved["K"].tolist() == [0, 1, 2, 3]  # the data keep their place, the drawing does not
    assert ax.get_lines()[0].get_xdata().tolist() == [0.25, 1.25, 2.25, 3.25]
    assert ax.containers[0].lines[0].get_xdata().tolist() == [1.25, 3.25]

    _, ax = figures.new_figure()
    single = figures.band_plot(ax, frame.iloc[:2], "K", "score", "even")
    assert single["low"].isna().all() and not ax.collections and not ax.containers
    with pytest.raises(StudyError, match="no rows for method 'even'"):
        figures.band_plot(ax, frame.iloc[:0], "K", "score", "even")


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ([3, 3], "over n = 3 seeds."),
        ([2, 5], "over n = 2 to 5 seeds."),
        ([1, 3], "n = 1 to 3 seeds; no interval where n = 1."),
        ([1, 1], "Single runs (n = 1), so no interval."),
    ],
)
def test_captions_say_how_many(counts, says):
    assert figures.spread_note(pd.DataFrame({"n": counts})).endswith(says)


def test_a_legend_covers_no_data():
    fig, ax = figures.new_figure()
    for i, method in enumerate(["top", "bottom", "odd", "even"]):
        ax.plot([0, 1, 2], [90, 85, 80 - 0.01 * i], **figures.style_of(method))
    figures.outside_legend(fig)
    fig.draw_without_rendering()
    assert not fig.legends[0].get_window_extent().overlaps(ax.get_window_extent())


def test_a_legend_of_ours_and_published_names_each_method_once():
    fig, ax = figures.new_figure()
    for published in (False, True):
        ax.plot([0, 1], [1, 2], **figures.style_of("top", published))
    ax.plot([0, 1], [2, 3], **figures.style_of("odd", published=True))
    figures.outside_legend(fig)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["Top", "Odd alternate", "Ours", "Published"]


def test_retained_line_lies_at_the_share():
    _, ax = figures.new_figure()
    assert figures.retained_line(ax, 80) == pytest.approx(79.2)
    assert ax.get_legend_handles_labels()[1] == ["99 % of dense"]


def test_a_legend_ends_with_the_share_of_the_dense_score():
    fig, axes = figures.new_figure("page", 1, 2)
    for ax, method in zip(axes, ("top", "odd"), strict=True):
        ax.plot([0, 1], [1, 2], **figures.style_of(method))
        figures.retained_line(ax, 2)
    figures.outside_legend(fig)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["Top", "Odd alternate", "99 % of dense"]


@pytest.mark.parametrize(
    ("count", "grid", "height"), [(0, (1, 1), 2.0), (1, (1, 1), 2.0), (2, (1, 2), 2.0), (5, (2, 3), 3.5)]
)
def test_panels_are_as_many_as_asked_for_and_the_rest_stays_blank(count, grid, height):
    fig, axes = figures.panels(count, across=3, row=1.5, margin=0.5, sharex=True)
    assert len(axes) == max(count, 1) and [ax for ax in fig.axes if ax.get_visible()] == axes
    assert all(ax.xaxis.get_tick_params()["labelbottom"] for ax in axes[-grid[1] :])
    assert axes[0].get_gridspec().get_geometry() == grid and fig.get_size_inches()[1] == height


def test_a_figure_without_rows_or_caption_is_refused(tmp_path):
    fig, _ = figures.new_figure()
    for rows, caption in ((pd.DataFrame(), "A caption."), (pd.DataFrame({"x": [1]}), " ")):
        with pytest.raises(StudyError, match="figure 'empty'"):
            figures.save_figure(fig, "empty", rows, caption, tmp_path)
    assert not list(tmp_path.iterdir())


def test_error_bars_are_lengths_below_and_above_and_nothing_where_no_interval_is():
    rows = pd.DataFrame({"retained": [90.0, 80.0], "low": [88.5, np.nan], "high": [91.0, np.nan]})
    np.testing.assert_allclose(figures.error_bars(rows, "retained"), [[1.5, np.nan], [1.0, np.nan]])
    _, ax = figures.new_figure("column")
    drawn = ax.errorbar([0, 1], rows["retained"], figures.error_bars(rows, "retained"))
    ends = [segment for segment in drawn.lines[2][0].get_segments() if len(segment)]
    np.testing.assert_allclose(ends, [[[0, 88.5], [0, 91.0]]])


def test_unwritable_folder_is_a_study_error_and_leaves_nothing(tmp_path):
    fig, _ = figures.new_figure()
    (tmp_path / "figures").write_text("a file", encoding="utf-8")
    with pytest.raises(StudyError, match="cannot write"):
        figures.save_figure(fig, "name", pd.DataFrame({"x": [1]}), "A caption.", tmp_path / "figures")
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]


TABLE = pd.DataFrame(
    {
        "model_name": ["BERT & co", "a|b 50%"],
        "score (%)": [91.237, np.nan],
        "K": [2, 4],
        "ratio": [1.94, 12345.678],
    }
)


def test_tables_in_three_formats(tmp_path):
    files = tables.save_table(
        TABLE, "sizes", "Sizes ± 1 %.", tmp_path, {"score (%)": "{:.1f}", "ratio": lambda x: f"{x:.2f}×"}
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sizes.csv", "sizes.md", "sizes.tex"]
    assert pd.read_csv(files["csv"])["score (%)"][0] == 91.237

    lines = files["md"].read_text(encoding="utf-8").splitlines()
    assert [cell.strip() for cell in lines[2].split(" | ")] == ["| BERT & co", "91.2", "2", "1.94× |"]
    assert "a\\|b 50%" in lines[3] and " – " in lines[3]
    assert [cell.endswith(":") for cell in lines[1].strip("|").split("|")] == [False, True, True, True]
    assert lines[-1] == "Sizes ± 1 %."

    tex = files["tex"].read_text(encoding="utf-8")
    for part in (r"\toprule", r"\bottomrule", r"{lrrr}", r"\caption{Sizes $\pm$ 1 \%.}", r"\label{tab:sizes}"):
        assert part in tex
    assert r"BERT \& co & 91.2 & 2 & 1.94$\times$ \\" in tex and r"a|b 50\% & --" in tex and r"model\_name" in tex


def test_long_text_wraps_in_latex_within_the_line():
    text = "a sentence that no page holds beside another of its kind, " * 3
    frame = pd.DataFrame({"claim": [text, "short"], "score": [1.0, 2.0], "evidence": [text * 2, "short"]})
    columns = tables.latex_table(frame, "c", "l").split("\\begin{tabular}{")[1].splitlines()[0]
    shares = [float(share) for share in re.findall(r"p{([\d.]+)\\linewidth}", columns)]
    assert len(shares) == 2 and shares[0] < shares[1] and sum(shares) < 0.9 and "r" in columns
    assert r"{lr}" in tables.latex_table(frame[1:].drop(columns="claim")[["evidence", "score"]], "c", "l")


def test_table_mistakes_are_named(tmp_path):
    with pytest.raises(StudyError, match="table 'none': has no rows"):
        tables.save_table(TABLE.iloc[:0], "none", "c", tmp_path)
    with pytest.raises(StudyError, match="format for column 'speed'"):
        tables.markdown_table(TABLE, {"speed": "{}"})


def test_show_is_markdown_with_its_caption():
    shown = tables.show(TABLE, "Two models.", {"ratio": "{:.1f}"})
    assert shown.data.startswith("| model_name") and shown.data.endswith("\n\n*Two models.*")


def test_a_distribution_over_training_is_drawn_per_unit_of_y():
    """Bins of unlike width: shares per unit times widths are 100 % at every point, and the axis ends with the data."""
    counts = np.array([[0, 4, 4, 0, 0], [2, 2, 4, 0, 0]])
    _, axes = figures.new_figure("page", 1, 1, squeeze=False)
    (drawn,) = density_over_training(axes[0], [(counts, [0.0, 1.0], [-50, -2, -1, 1, 5, 50])], "Blues", "label")
    widths = drawn["to"] - drawn["from"]
    assert (drawn["per unit (%)"] * widths).groupby(drawn["progress"]).sum().tolist() == pytest.approx([100, 100])
    assert drawn["from"].min() == -3 and drawn["to"].max() == 9  # outer bins as wide as their neighbours
    assert axes[0, 0].get_ylim() == (-3, 1)
    at_end = drawn[(drawn["progress"] == 1) & (drawn["from"] == -1)]
    assert at_end["per unit (%)"].item() == pytest.approx(25)  # 4 of 8 in a bin two wide


def test_a_speed_is_drawn_with_its_quartiles():
    _, ax = figures.new_figure()
    rows = pd.DataFrame({"ratio_to_dense": [1.0, 2.0], "ratio_q1": [1.0, 1.7], "ratio_q3": [1.0, 2.2]})
    figures.speed_line(ax, [0, 1], rows, "openvino-bf16", shift=0.1)
    (bars,) = ax.containers
    segments = bars.lines[2][0].get_segments()
    assert np.array(segments)[1] == pytest.approx(np.array([[1.1, 1.7], [1.1, 2.2]]))


def test_a_span_names_one_number_or_two():
    assert figures.span([3, 3]) == "3" and figures.span(pd.Series([2.0, 1, 3])) == "1 to 3"
