"""All methods on one set of axes: what every record says of size, quality and cost.

A *configuration* is a run without its seeds. Which of the models to take for a latency or a loss: ``lib.recipes``.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lib.analysis import is_dense, one_label_scores
from lib.data import TASKS
from lib.intervals import bootstrap_interval
from lib.records import Record, read_record
from lib.settings import Profile
from lib.sparse_storage import smallest
from lib.specs import EngineQualitySpec, Spec, TrainSpec, needed_runs, spec_hash

# compressor: (name of the family, its style in lib.figures.METHODS)
FAMILIES: dict[str, tuple[str, str]] = {
    "layer_dropping": ("Poor Man's BERT", "top"),
    "l0_gates": ("Structured pruning", "l0"),
    "structured": ("Structured pruning", "l0"),
    "obert": ("oBERT", "obert"),
    "fixed_masks": ("oBERT", "obert"),
    "sparse_int8": ("oBERT", "obert"),
    "block_movement": ("Block movement", "hybrid"),
    "refill": ("Block movement", "hybrid"),
    "quantization": ("FullyQT", "int8"),
    "kronecker": ("KroneckerBERT", "kronecker"),
}
DENSE, COMPOUND = "Dense", "Compound"
ENGINE = ("INT8 by an engine", "engine-int8")  # an engine's own INT8 of a dense model
INT8 = "-int8"  # how the names of engines end that quantise what they load
NUMBERS = ("weights kept (%)", "size (MB)", "dense (MB)", "cost (core-min)")


def all_records(profile: Profile) -> list[Record]:
    """Every record of a profile, in the order of their names.

    Raises:
        StudyError: one cannot be read; names it.
    """
    return [read_record(path) for path in sorted((profile.results / "runs").glob("*.json"))]


def of_encoder(records: Iterable[Record], encoder: str) -> list[Record]:
    """The records of an encoder's models, and those that are of none: a results folder may hold several encoders."""
    return [record for record in records if _encoder_of(record.spec) in (encoder, None)]


def _encoder_of(spec: Any) -> str | None:
    """The encoder that a run, or the one that it begins with, compresses."""
    if hasattr(spec, "encoder"):
        return str(spec.encoder)
    return _encoder_of(spec.start) if getattr(spec, "start", None) is not None else None


def family(spec: TrainSpec) -> tuple[str, str]:
    """Family and style of a run. A run whose start was already compressed is a compound, unless both are one family."""
    if spec.compressor is None:
        return DENSE, "dense"
    own = FAMILIES.get(spec.compressor.name, (spec.compressor.name.rpartition(":")[2], "compound"))
    before = spec.start if isinstance(spec.start, TrainSpec) and spec.start.compressor else None
    if before is not None and family(before)[0] != own[0]:
        return COMPOUND, "compound"
    return own


def is_rival(spec: TrainSpec) -> bool:
    """Whether a run is a baseline of its paper: another ranking or selection than its own, or nothing removed."""
    if spec.compressor is None:
        return False
    name, settings = spec.compressor.name, spec.compressor.settings
    if name == "structured":
        return not any(isinstance(source, TrainSpec) for source in spec.informed_by)  # trained gates choose, or others
    single = name == "block_movement" and list(settings.get("block", ())) == [1, 1]
    return single or settings.get("importance") == "magnitude" or (name == "obert" and not settings["sparsity"])


def configuration(spec: Spec) -> str:
    """The run's spec without any seed, hashed: equal for runs that differ in seeds alone."""

    def seedless(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: seedless(item) for key, item in value.items() if key != "seed"}
        return [seedless(item) for item in value] if isinstance(value, list) else value

    return json.dumps(seedless(spec.model_dump(mode="json", exclude_defaults=True)), sort_keys=True)


def training_cost(record: Record, by_hash: Mapping[str, Record]) -> float:
    """Core-seconds of training of a run and of every run that it starts from, learns from or is informed by, each once.

    Core-seconds are seconds times the CPU threads that computed, and plain seconds on a GPU. NaN when the record of one
    of those runs is missing.
    """
    seconds, waiting = {record.hash: _core_seconds(record)}, [record.spec]
    while waiting:
        for other in needed_runs(waiting.pop()):
            key = spec_hash(other)
            if key not in seconds:
                seconds[key] = _core_seconds(by_hash[key]) if key in by_hash else np.nan
                waiting.append(other)
    return sum(seconds.values())


def _core_seconds(record: Record) -> float:
    """Of the run's own training; records that do not say how many threads computed had one on every core."""
    training = record.result.get("training", {})
    threads = 1 if record.hardware["gpu"] else training.get("threads", record.hardware["cores"])
    return float(training.get("seconds", 0.0) * threads)


def overview(records: Sequence[Record]) -> pd.DataFrame:
    """One row per compressed training run that has a dense run of the same task, seed and encoder beside it, and one
    per engine that made INT8 of a finished run's model.

    ``weights kept (%)`` are the encoder layers' weights that are not zero, ``size (MB)`` is the smallest form in which
    the record says the model was stored (``dense (MB)``: the dense model's), ``cost (core-min)`` the training of the
    whole chain; ``trained`` says whether the run itself trained, or only compressed and measured, ``rival`` whether it
    is what a paper compares its method with. ``floor`` is what one answer for all retains, NaN where there are none.
    """
    by_hash = {record.hash: record for record in records}
    floors = one_label_scores(records)
    runs = [(record.spec, record) for record in records if isinstance(record.spec, TrainSpec)]
    dense = {(s.task, s.seed, s.encoder): record for s, record in runs if is_dense(s)}
    rows = []
    for record in records:
        engine = record.spec.engine if isinstance(record.spec, EngineQualitySpec) else ""
        made = by_hash.get(spec_hash(record.spec.start)) if isinstance(record.spec, EngineQualitySpec) else record
        spec = made.spec if made else None
        if made is None or not isinstance(spec, TrainSpec) or spec.task not in TASKS:  # own data that is not named now
            continue
        base = dense.get((spec.task, spec.seed, spec.encoder))
        if base is None or (not engine.endswith(INT8) if engine else spec.compressor is None):
            continue
        name, style = _on_engine(spec) if engine else family(spec)
        rows.append({
            "hash": record.hash, "configuration": configuration(record.spec), "task": spec.task,
            "title": TASKS[spec.task].title, "seed": spec.seed, "family": name, "style": style,
            "score": record["score"], "retained": share(record["score"], base["score"]),
            "weights kept (%)": 100 * _weights(made) / base["model"]["layer_parameters"],
            "size (MB)": (record["size_bytes"] if engine else _bytes(made)) / 1e6, "dense (MB)": _bytes(base) / 1e6,
            "cost (core-min)": training_cost(made, by_hash) / 60, "trained": spec.training.epochs > 0,
            "rival": is_rival(spec), "floor": share(floors.get(spec.task, np.nan), base["score"]),
        })  # fmt: skip
    about = ["hash", "configuration", "task", "title", "seed", "family", "style", "trained", "rival", "floor", "score",
             "retained"]  # fmt: skip
    return pd.DataFrame(rows, columns=[*about, *NUMBERS])


def _on_engine(spec: TrainSpec) -> tuple[str, str]:
    """Family and style of a model that an engine made INT8 of."""
    return (COMPOUND, "compound") if spec.compressor else ENGINE


def share(score: float, dense: float) -> float:
    """``score`` as a percentage of ``dense``; NaN where the dense model got nothing right."""
    return 100 * score / dense if dense else np.nan


def _weights(record: Record) -> float:
    """Encoder-layer parameters that are not zero: the layers' own, less the zeros that a sparse method stores."""
    about = record["compression"]
    zeros = about["weights"] - about["nonzero"] if "nonzero" in about else 0
    return float(record["model"]["layer_parameters"] - zeros)


def _bytes(record: Record) -> float:
    """The smallest form that can be loaded as it is: integers for quantised models, sparse encodings for zeros."""
    about = record["compression"]
    if "storage" in about:
        return float(smallest(about["storage"])[1])
    return float(about.get("stored_bytes", record["model"]["size_bytes"]))


def by_configuration(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of every configuration, with the 95 % interval of the retained share and n."""
    rows = []
    for _, group in frame.groupby(["task", "configuration"], sort=False):
        found = bootstrap_interval(group["retained"])
        first = group.iloc[0]
        numbers = {name: group[name].mean() for name in ("score", "floor", *NUMBERS)}
        about = {
            name: first[name] for name in ("task", "configuration", "title", "family", "style", "trained", "rival")
        }
        rows.append({**about, **numbers, "retained": found.mean,
                     "low": found.low, "high": found.high, "n": found.n})  # fmt: skip
    return pd.DataFrame(rows)


def pareto(frame: pd.DataFrame, cost: str, value: str) -> pd.DataFrame:
    """Rows that no other row beats in both: less ``cost`` and more ``value``. Sorted by cost."""
    ordered = frame.dropna(subset=[cost, value]).sort_values([cost, value], ascending=[True, False])
    best = ordered[value].cummax().shift(fill_value=-np.inf)
    return ordered[ordered[value] > best]
