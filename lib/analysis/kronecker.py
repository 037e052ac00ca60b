"""From the records of notebook 07 to its frames: stages, ablations, nearest products, exact sizes, cost of a pass."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lib.analysis import latency_frame, of_same_seed, one_label_scores, summarise, training_runs, uninformative
from lib.data import TASKS
from lib.kronecker_models import KINDS, PUBLISHED, PUBLISHED_ON, KroneckerShapes, encoder_parameters
from lib.models import ARCHITECTURES, SPEED_ARCHITECTURES
from lib.plans.kronecker import encoder_shapes, variant_of
from lib.published import published
from lib.records import Record
from lib.settings import Profile
from lib.specs import FactorisationSpec, MajoritySpec, TextDistillationSpec, TrainSpec

DENSE = "dense"
NAMES = {"kron8": "KroneckerBERT8", "kron19": "KroneckerBERT19", "kron21": "KroneckerBERT21"}
VARIANT_NAMES = {
    "full": "both stages",
    "no_text": "no first stage",
    "no_teacher": "no teacher on the task",
    "neither": "neither",
    "random": "random factors",
    "random_no_text": "random factors, no first stage",
}
TERM_NAMES = {
    "embedding": "embedding output",
    "attention_scores": "attention scores",
    "hidden_states": "layer outputs",
}
PAPER_METRICS = {"mrpc": "f1", "qqp": "f1", "stsb": "spearman"}  # what the GLUE test server's tables print of a task
DISTURBED = 0.2  # quartiles of dense times further apart than this share of their median: too noisy to judge by


def configuration_names(profile: Profile) -> dict[KroneckerShapes, str]:
    """The profile's configurations by their shapes; of two that are alike on a small encoder the first."""
    found: dict[KroneckerShapes, str] = {}
    for name in profile.kronecker.configurations:
        found.setdefault(encoder_shapes(profile, name), name)
    return found


def _configuration(spec: TrainSpec | TextDistillationSpec, names: Mapping[KroneckerShapes, str]) -> str:
    """A name in ``PUBLISHED``, "dense", or "other" for shapes that the profile does not name."""
    if spec.compressor is None:
        return DENSE
    settings = {key: value for key, value in spec.compressor.settings.items() if key in KroneckerShapes.model_fields}
    return names.get(KroneckerShapes.model_validate(settings), "other")


def kronecker_frame(records: Iterable[Record], profile: Profile) -> pd.DataFrame:
    """One row per training run on a task.

    ``configuration`` is "dense" or a name in ``PUBLISHED``, ``variant`` one of ``VARIANT_NAMES`` ("dense" without a
    compressor). ``retained`` is the score as a share (percent) of the dense score of the same task and seed; NaN
    without one; ``paper retained`` the same of the metric that the paper prints (``PAPER_METRICS``). ``ratio`` is how
    many times smaller the encoder is, its pooler included where it has one. ``loss left (%)`` is the training loss at
    the end as a share of that at the start (means over a tenth of what was logged; NaN without training). ``floor`` is
    the score of one answer for all where ``records`` hold it, ``floor retained`` what that is of the dense model's in
    the paper's metric, ``informative`` as in ``analysis.uninformative``.

    Raises:
        StudyError: no run is finished.
    """
    names, rows, records = configuration_names(profile), [], list(records)
    for record in training_runs(records):
        spec: Any = record.spec
        rows.append({
            "hash": record.hash, "task": spec.task, "title": TASKS[spec.task].title, "seed": spec.seed,
            "configuration": _configuration(spec, names), "variant": variant_of(spec) if spec.compressor else DENSE,
            "score": record["score"], "paper score": _paper_score(record),
            "ratio": record["compression"].get("ratio", 1.0),
            "parameters": record["model"]["parameters"], "size_bytes": record["model"]["size_bytes"],
            "train_s": record.result.get("training", {}).get("seconds", 0.0), "loss left (%)": _loss_left(record),
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    dense = frame[frame["configuration"] == DENSE].set_index(["task", "seed"])
    frame["retained"] = 100 * frame["score"] / of_same_seed(frame, dense["score"])
    own = of_same_seed(frame, dense["paper score"])
    frame["paper retained"] = 100 * frame["paper score"] / own
    frame["floor"] = frame["task"].map(one_label_scores(records)).astype(float)
    floors = {record.spec.task: _paper_score(record) for record in records if isinstance(record.spec, MajoritySpec)}
    frame["floor retained"] = 100 * frame["task"].map(floors).astype(float) / own
    frame["informative"] = ~frame["task"].isin(uninformative(records))
    return frame


def _paper_score(record: Record) -> float:
    """The score in the metric that the paper prints for the record's task, in percent."""
    spec: Any = record.spec
    return float(record[PAPER_METRICS.get(spec.task, "score")])


def _loss_left(record: Record) -> float:
    losses = [loss for _, loss in record.result.get("training", {}).get("loss", [])]
    if not losses:
        return float("nan")
    tenth = max(1, len(losses) // 10)
    return float(100 * np.mean(losses[-tenth:]) / np.mean(losses[:tenth]))


def complete(frame: pd.DataFrame, variants: Sequence[str]) -> pd.DataFrame:
    """Rows of ``variants`` for the tasks and seeds that have every variant that is there at all."""
    rows = frame[frame["variant"].isin(variants)]
    counts = rows.groupby(["task", "seed"])["variant"].transform("nunique")
    return rows[counts == rows["variant"].nunique()]


def ablation_frame(frame: pd.DataFrame, configuration: str) -> pd.DataFrame:
    """What a configuration scores without a part of its training, against all of it on the same task and seed.

    Args:
        frame: ``kronecker_frame``.

    Returns:
        One row per title and variant but the first of ``VARIANT_NAMES``: ``points`` (mean difference), ``low`` and
        ``high`` (95 % bootstrap interval), ``n`` pairs. Two further variants say how much there is to win and to lose:
        "dense", and "floor", one answer for all.
    """
    own = frame[frame["configuration"] == configuration]
    whole = own[own["variant"] == "full"]
    least = whole.assign(variant="floor", score=whole["floor"]).dropna(subset="score")
    others = pd.concat([own[own["variant"] != "full"], frame[frame["configuration"] == DENSE], least])
    pairs = others.merge(whole[["task", "seed", "score"]], on=["task", "seed"], suffixes=("", " of all"))
    return summarise(pairs.assign(points=pairs["score"] - pairs["score of all"]), ["title", "variant"], "points")


def first_stage_frame(records: Iterable[Record], profile: Profile) -> pd.DataFrame:
    """One row per first stage and term: mean squared error on held-out text before and after, and what is left (%).

    ``share of loss (%)`` is the term's part, with its weight, of the loss before training.
    """
    names, rows = configuration_names(profile), []
    for record in records:
        if not isinstance(record.spec, TextDistillationSpec):
            continue
        weights = record.spec.distillation.model_dump()
        loss = sum(weights[term] * record["before"][term] for term in TERM_NAMES)
        for term in TERM_NAMES:
            before, after = record["before"][term], record["after"][term]
            rows.append({
                "configuration": _configuration(record.spec, names),
                "factors": record["compression"]["initialisation"], "term": term, "before": before, "after": after,
                "left (%)": 100 * after / before, "share of loss (%)": 100 * weights[term] * before / loss,
                "minutes": record["training"]["seconds"] / 60, "processor": record.processor,
                "tokens": record["training"]["tokens"],
            })  # fmt: skip
    columns = ["configuration", "factors", "term", "before", "after", "left (%)", "share of loss (%)"]
    return pd.DataFrame(rows, columns=[*columns, "minutes", "processor", "tokens"])


def loss_curves(records: Iterable[Record], profile: Profile) -> pd.DataFrame:
    """The first stages' training loss: configuration, factors, step, loss."""
    names = configuration_names(profile)
    return pd.DataFrame(
        [
            {"configuration": _configuration(record.spec, names), "step": step, "loss": loss,
             "factors": record["compression"]["initialisation"]}
            for record in records if isinstance(record.spec, TextDistillationSpec)
            for step, loss in record["training"]["loss"]
        ],
        columns=["configuration", "factors", "step", "loss"],
    )  # fmt: skip


def error_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per shape and kind of weight: name, terms, swap, ratio, kind, relative error (percent)."""
    rows = []
    for record in records:
        if isinstance(record.spec, FactorisationSpec):
            for label, found in record["configurations"].items():
                shapes = record.spec.shapes[label]
                rows += [
                    {"configuration": label.partition(",")[0], "terms": shapes.terms, "swap": shapes.swap,
                     "ratio": found["ratio"], "kind": kind, "error": 100 * found["factors"][kind]["error"]}
                    for kind in KINDS
                ]  # fmt: skip
    return pd.DataFrame(rows, columns=["configuration", "terms", "swap", "ratio", "kind", "error"])


def published_retained() -> pd.DataFrame:
    """Published scores of the three configurations as shares (percent) of BERT-base's on the same test or dev set.

    GLUE is the test server's, SQuAD the development set's; both dense rows are from the later version's Tables 2 and 5.
    """
    places = ["NAACL Table 2", "NAACL Table 3", "NAACL Table 5", "v1 Table 2", "v1 Table 4"]
    rows = published("tahaei2021", metric="score", place=places)
    dense = rows[rows["method"] == DENSE].set_index("task")["value"]
    later = ~rows["place"].str.startswith("v1") | (rows["method"] == "kron19")  # kron19 is in the first version only
    frame = rows[later & (rows["method"] != DENSE)][["task", "method", "value", "place"]].copy()
    frame["retained"] = 100 * frame["value"] / frame["task"].map(dense)
    return frame.rename(columns={"method": "configuration", "value": "score"}).reset_index(drop=True)


def claims_table() -> pd.DataFrame:
    """What the paper prints of each configuration: parameters, compression, FLOPs, GLUE and SQuAD retained, speed.

    ``GLUE retained`` is the mean score over the tasks as a share of BERT-base's mean over them.
    """
    rows = published("tahaei2021")
    retained = published_retained()
    sentences = retained[retained["task"].map(lambda task: TASKS[task].kind != "qa").astype(bool)]
    sentences = sentences.assign(dense=sentences["score"] / sentences["retained"])  # a hundredth of BERT-base's score
    sums = sentences.groupby("configuration")[["score", "dense"]].sum()
    glue = sums["score"] / sums["dense"]
    squad = retained[retained["task"] == "squad_v1"].set_index("configuration")["retained"]
    found = []
    for name in PUBLISHED:
        own = rows[rows["method"] == name]
        speed = own[own["metric"] == "speedup"]["value"]
        found.append({
            "model": NAMES[name], "version": "first" if own["place"].str.startswith("v1").all() else "later",
            "parameters (M)": _only(own, "parameters"),
            "compression ×": _only(own, "compression"), "FLOPs (G)": _only(own, "flops"),
            "GLUE retained (%)": glue.get(name), "SQuAD 1.1 retained (%)": squad.get(name),
            "speed ×": f"{speed.min():.2f} to {speed.max():.2f}" if len(speed) else None,
        })  # fmt: skip
    return pd.DataFrame(found)


def _only(rows: pd.DataFrame, metric: str) -> float:
    """The later version's number where both print one."""
    found = rows[rows["metric"] == metric].sort_values("place")
    return float(found["value"].iloc[0])


def exact_sizes() -> pd.DataFrame:
    """Exact parameters of the published configurations, encoder and pooler, beside the printed millions."""
    config = ARCHITECTURES[PUBLISHED_ON]
    dense = encoder_parameters(config)
    positions = config.max_position_embeddings * config.hidden_size
    printed = published("tahaei2021", metric="parameters").set_index("method")["value"]
    rows: list[dict[str, Any]] = [{"model": "BERT-base", "configuration": DENSE, "exact": dense, "ratio": 1.0}]
    for name, shapes in PUBLISHED.items():
        exact = encoder_parameters(config, shapes)
        rows.append({"model": NAMES[name], "configuration": name, "exact": exact, "ratio": dense / exact})
    frame = pd.DataFrame(rows)
    frame["exact (M)"], frame["published (M)"] = frame["exact"] / 1e6, frame["configuration"].map(printed)
    frame["difference (M)"] = frame["exact (M)"] - frame["published (M)"]
    frame["without positions (M)"] = (frame["exact"] - positions) / 1e6
    return frame


def speed_frame(records: Iterable[Record]) -> pd.DataFrame:
    """``analysis.latency_frame`` of ``plans.kronecker_speed`` with the rates that every model reaches.

    ``GFLOP/s`` and ``GB/s`` are the operations and bytes (as in fp32) of a pass over its median time, ``… of dense
    (%)`` their shares of the dense model's on the same engine. ``disturbed`` marks engines by ``DISTURBED``.
    """
    frame = latency_frame(records)
    if frame.empty:
        return frame
    frame["GFLOP/s"] = frame["flops"] / frame["median_ms"] / 1e6
    frame["GB/s"] = frame["traffic_bytes"] / frame["median_ms"] / 1e6
    run = ["engine", "batch"]
    dense = frame[frame["model"] == DENSE].set_index(run).reindex(pd.MultiIndex.from_frame(frame[run]))
    for rate in ("GFLOP/s", "GB/s"):
        frame[f"{rate} of dense (%)"] = 100 * frame[rate].to_numpy() / dense[rate].to_numpy()
    frame["disturbed"] = (dense["q3_ms"] - dense["q1_ms"] > DISTURBED * dense["median_ms"]).to_numpy()
    return frame


def bounds(speed: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows of ``speed_frame`` with factors, by what may hold them up.

    ``arithmetic``: at least half of the operations a second that the dense model reaches on the engine; ``traffic``:
    not that, but at least half of the most bytes a second of any row on the processor (``GB/s of most (%)``), since the
    dense model, which arithmetic binds, shows no ceiling; ``neither``: less than half of both. Disturbed runs are left
    out, and INT8 engines, of which bytes counted in fp32 say nothing.
    """
    counted = speed[(speed["precision"] != "int8") & ~speed["disturbed"]]
    most = counted.groupby("cpu")["GB/s"].transform("max")
    rows = counted.assign(**{"GB/s of most (%)": 100 * counted["GB/s"] / most})
    rows = rows[rows["model"] != DENSE]
    fast, traffic = rows["GFLOP/s of dense (%)"] >= 50, rows["GB/s of most (%)"] >= 50
    return {"arithmetic": rows[fast], "traffic": rows[~fast & traffic], "neither": rows[~fast & ~traffic]}


def cost_frame(speed: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """What one forward pass computes and moves, per model and batch, relative to the dense model's.

    ``linear`` is ``flops`` without attention's two products of activations. ``published`` are the printed FLOPs (G),
    the later version's first, where what was timed is what they were printed for: BERT-base, one text of 128 tokens.

    Args:
        speed: ``speed_frame``; not empty.
    """
    columns = ["model", "batch", "length", "layers", "parameters", "flops", "traffic_bytes"]
    frame = speed[columns].drop_duplicates(["model", "batch"]).reset_index(drop=True)
    architecture = SPEED_ARCHITECTURES[profile.kronecker.speed_shape]
    width = ARCHITECTURES[architecture].hidden_size
    frame["linear"] = frame["flops"] - 4 * width * frame["batch"] * frame.pop("layers") * frame["length"] ** 2
    rows = published("tahaei2021", metric="flops").sort_values("place")
    printed = {name: ", ".join(f"{value:g}" for value in part["value"]) for name, part in rows.groupby("method")}
    same = (frame["batch"] == 1) & (frame.pop("length") == 128) & (architecture == PUBLISHED_ON)
    frame["published"] = frame["model"].map(printed).where(same)
    dense = frame[frame["model"] == DENSE].set_index("batch")
    for column, name in (("flops", "FLOPs ÷"), ("traffic_bytes", "traffic ÷")):
        frame[name] = frame["batch"].map(dense[column]) / frame[column]
    frame["FLOPs per byte"] = frame["flops"] / frame["traffic_bytes"]
    return frame
