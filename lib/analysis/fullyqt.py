"""From the records of notebook 06 to its frames: translation and question answering at every bit width."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from lib.analysis import of_same_seed
from lib.data import TASKS
from lib.plans.fullyqt import GUARDS
from lib.published import published
from lib.quantized_layers import PARTS
from lib.records import Record
from lib.runs import SAME_MODEL
from lib.specs import EngineQualitySpec, TrainSpec, TranslationLatencySpec, TranslationSpec

# How a model came to its bits.
PROCEDURES = {
    "dense": "dense", "control": "dense, trained on", "post": "rounded after training",
    "aware": "trained on with rounding", "scratch": "from random weights, rounding after a delay",
    "naive": "without a guard",
}  # fmt: skip
STYLES = {"post": "quantized-post", "aware": "quantized-aware", "scratch": "quantized-scratch"}
FLOAT_BITS = 32
Trained = TranslationSpec | TrainSpec


def procedure(spec: Trained) -> str:
    """Which of ``PROCEDURES`` a run is."""
    if spec.compressor is None:
        return "dense" if spec.start is None else "control"
    if spec.start is not None:
        return "aware" if spec.training.epochs else "post"
    guards = ("mask_guard", "denominator_guard")
    return "naive" if not all(spec.compressor.settings.get(name, True) for name in guards) else "scratch"


def guards_taken(settings: Mapping[str, Any]) -> str:
    """Which of ``GUARDS`` these settings of the compressor are; "" when nothing is taken away."""
    taken = {name: False for name in ("mask_guard", "denominator_guard") if not settings.get(name, True)}
    return next((name for name, wanted in GUARDS.items() if wanted == taken), "")


def quantized_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per translation or QA run: procedure, bits, score (percent), size (bytes) and retained share (percent).

    ``retained`` compares with the dense model of the same task and seed, ``controlled`` with that model trained on for
    as long as the quantised one was; NaN without it. ``smaller`` is dense bytes / bytes. ``part`` names what alone was
    quantised, "" is everything. ``guards`` says what was taken away. ``spread`` is the largest over the smallest
    LayerNorm denominator. A diverged run scores 0 and has its place in ``diverged``.
    """
    rows = [_row(record) for record in records if isinstance(record.spec, TranslationSpec | TrainSpec)]
    columns = ["hash", "task", "title", "seed", "procedure", "bits", "bucketing", "recalibrated", "part", "delay",
               "guards", "score", "greedy", "size_bytes", "train_s", "spread", "diverged",
               "diverged_progress"]  # fmt: skip
    frame = pd.DataFrame(rows, columns=columns)
    for name, kind in (("retained", "dense"), ("controlled", "control")):
        base = frame[frame["procedure"] == kind].set_index(["task", "seed"])["score"]
        frame[name] = 100 * frame["score"].to_numpy() / of_same_seed(frame, base)
    dense = frame[frame["procedure"] == "dense"].set_index(["task", "seed"])["size_bytes"]
    frame["smaller"] = of_same_seed(frame, dense) / frame["size_bytes"].to_numpy()
    return frame


def _row(record: Record) -> dict[str, Any]:
    spec = record.spec
    assert isinstance(spec, TranslationSpec | TrainSpec)
    settings = spec.compressor.settings if spec.compressor else {}
    parts, diverged = settings.get("parts", []), record.result.get("diverged", {})
    return {
        "hash": record.hash, "task": spec.task, "title": TASKS[spec.task].title, "seed": spec.seed,
        "procedure": procedure(spec), "bits": settings.get("bits", FLOAT_BITS),
        "bucketing": settings.get("bucketing", True), "recalibrated": "recalibration_batches" in settings,
        "part": parts[0] if parts else "", "delay": settings.get("delay", np.nan), "guards": guards_taken(settings),
        "score": record["score"], "greedy": record.result.get("greedy", np.nan),
        "size_bytes": record.result.get("model", {}).get("size_bytes", np.nan),
        "train_s": record.result.get("training", {}).get("seconds", 0.0),
        "spread": record.result.get("compression", {}).get("denominator_spread"),
        "diverged": diverged.get("place", ""), "diverged_progress": diverged.get("progress", np.nan),
    }  # fmt: skip


def everything(frame: pd.DataFrame, scratch_delay: float, procedures: Iterable[str] = tuple(STYLES)) -> pd.DataFrame:
    """Rows of the paper's own setting: all parts, bucketed, guarded, trained from scratch after just this delay.

    Where a model's ranges were also taken anew after training, the run that kept those of training is left out.
    """
    whole = frame[frame["procedure"].isin(list(procedures)) & (frame["part"] == "") & frame["bucketing"].astype(bool)]
    other = (whole["procedure"] == "scratch") & (whole["delay"] != scratch_delay)
    anew = whole["recalibrated"].groupby([whole[name] for name in ("task", "seed", "procedure", "bits")])
    kept_old = ~whole["recalibrated"].astype(bool) & anew.transform("any").astype(bool)
    return whole[(whole["guards"] == "") & ~other & ~kept_old]


def parents_note(frame: pd.DataFrame) -> str:
    """The caption's sentence on tasks whose rounded models of one seed do not all come from the same weights; or "".

    ``spread`` is measured before anything is rounded, so runs of one model have the same. Where a dense model's weights
    had not travelled with its record, it was trained again, and another processor or thread count makes another model.
    """
    rows = frame[(frame["procedure"] == "post") & frame["spread"].notna()]
    spreads = rows.assign(spread=rows["spread"].astype(float).round(2)).groupby(["title", "seed"])["spread"].nunique()
    mixed = [str(title) for title, count in spreads.groupby("title").max().items() if count > 1]
    if not mixed:
        return ""
    return (
        f"On {', '.join(mixed)} the dense model was trained again between these runs, on another machine, and may "
        f"differ by the {SAME_MODEL:.0f} points of score that are let pass: smaller differences say nothing there."
    )


def part_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Post-training runs that quantise one part alone, ordered as ``PARTS``, with those of the same task and bits that
    quantise all.
    """
    rows = frame[(frame["procedure"] == "post") & frame["bucketing"].astype(bool) & (frame["guards"] == "")].copy()
    alone = rows["part"].ne("").groupby([rows["task"], rows["bits"]])
    rows = rows[alone.transform("any").astype(bool)]
    rows["part"] = rows["part"].replace("", "everything").str.replace("_", " ")
    order = [*(part.replace("_", " ") for part in PARTS), "everything"]
    rows["order"] = rows["part"].map(order.index)
    return rows.sort_values(["bits", "order"], ascending=[False, True]).drop(columns="order")


def bucketing_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Retained share with and without bucketing, one row per task, procedure, bits and seed that has both."""
    rows = frame[frame["procedure"].isin(["post", "aware"]) & (frame["part"] == "") & (frame["guards"] == "")]
    keys = ["task", "title", "procedure", "bits", "seed"]
    pairs = rows.pivot_table(index=keys, columns="bucketing", values="retained").reindex(columns=[True, False]).dropna()
    return pairs.rename(columns={True: "bucketed", False: "whole"}).reset_index().rename_axis(columns=None)


def guard_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """LayerNorm's guard after training: retained share over its own range and from zero, per task and bits.

    ``spread`` is the measured ratio of the largest to the smallest denominator, ``vanishes`` the ratio from which the
    smallest variance is less than half a step, and so rounds to 0: sqrt(2 (2^bits - 1)).
    """
    rows = frame[(frame["procedure"] == "post") & (frame["part"] == "") & frame["bucketing"].astype(bool)]
    rows = rows.assign(guards=rows["guards"].replace("", "guarded"))
    keys = ["title", "bits"]
    shares = rows.pivot_table(index=keys, columns="guards", values="retained")
    shares = shares.reindex(columns=["guarded", "denominator from zero"])
    spread = rows[rows["guards"] == "guarded"].groupby(keys)["spread"].max()
    table = shares.join(spread.astype(float)).reset_index().sort_values(["title", "bits"], ascending=[True, False])
    table["vanishes"] = np.sqrt(2.0 * (2.0 ** table["bits"] - 1))
    return table


def norm_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per LayerNorm of every model whose LayerNorms alone were rounded after training.

    ``place`` counts them from the input on (from 1), ``after`` is what they follow, ``step`` is the distance of two
    values of the rounded numerator, ``narrowest`` the smallest denominator (a standard deviation) in its range,
    ``coarse`` step / narrowest.
    """
    rows = []
    for record in records:
        spec = record.spec
        if not isinstance(spec, TranslationSpec | TrainSpec) or procedure(spec) != "post":
            continue
        about, found = _row(record), record.result.get("compression", {}).get("norms", {})
        if about["part"] != "layer_norm":
            continue
        for place, (name, norm) in enumerate(found.items(), start=1):
            low, high = norm["numerator"]
            step, narrowest = (high - low) / (2 ** about["bits"] - 1), norm["denominator"][0]
            after = "attention" if any(word in name for word in ("attention", "cross", "sa_")) else "feed-forward"
            after = "embeddings" if "embeddings" in name else after
            sizes = {"step": step, "narrowest": narrowest}
            rows.append(about | {"place": place, "layer_norm": name, "after": after} | sizes)
    columns = ["task", "title", "seed", "bits", "place", "layer_norm", "after", "step", "narrowest"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(coarse=frame["step"] / frame["narrowest"])


def published_retained() -> pd.DataFrame:
    """Published BLEU as a share (percent) of the same task's full precision: task, procedure, bits, retained."""
    rows = published("prato2020", metric="bleu")
    dense = rows[rows["training"] == "none"].set_index("task")["value"]
    frame = rows[rows["training"] != "none"].rename(columns={"training": "procedure"})
    frame = frame[["task", "procedure", "bits", "value", "evidence"]].copy()
    frame["retained"] = 100 * frame["value"] / frame["task"].map(dense)
    return frame.reset_index(drop=True)


def engine_quality_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per engine that ran a finished QA model: engine, score, bytes of its files."""
    rows = [
        {"task": record.spec.task, "seed": record.spec.start.seed, "engine": record.spec.engine,
         "score": record["score"], "size_bytes": record["size_bytes"], "runs_on": record["runs_on"]}
        for record in records if isinstance(record.spec, EngineQualitySpec)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["task", "seed", "engine", "score", "size_bytes", "runs_on"])


def translation_latency_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per engine and condition that the translation model was timed at."""
    rows = [
        row | {"cpu": record.ran_on(row["engine"]), "hidden_size": record.spec.shape.hidden_size,
               "layers": record.spec.shape.layers, "agreement": record["agreement"][row["name"]]["relative_diff"]}
        for record in records if isinstance(record.spec, TranslationLatencySpec)
        for row in record["rows"]
    ]  # fmt: skip
    return pd.DataFrame(rows)
