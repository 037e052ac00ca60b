"""All methods on one set of axes: what every record says of size, quality and cost, and which recipes are worth taking.

A *configuration* is a run without its seeds. A recipe's quality is measured through the engine that its latency is
measured on, so that what int8 costs in score is on the same plot as what it saves in time.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.analysis import one_label_scores
from lib.claims import NOT_CLAIMED
from lib.config import StudyError
from lib.data import TASKS
from lib.experiments import finished_model, weights_folder
from lib.files import write_atomically
from lib.intervals import bootstrap_interval
from lib.plans.frontier import recipes
from lib.records import Record, read_record
from lib.settings import Profile
from lib.sparse_storage import smallest
from lib.specs import EngineQualitySpec, TrainSpec, spec_hash

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
INT8 = "-int8"  # how the names of engines end that quantise what they load
NUMBERS = ("weights kept (%)", "size (MB)", "dense (MB)", "cost (core-min)")
# Columns of a recipe's latency, and what a record of one calls them.
TIMED = {"speed": "ratio_to_dense", "speed q1": "ratio_q1", "speed q3": "ratio_q3", "ms": "median_ms"}
VERDICTS = (
    "holds",
    "holds in part",
    "does not hold here",
    "cannot tell",
    "too few seeds to tell",
    "not run yet",
    "not testable here",
)


def all_records(profile: Profile) -> list[Record]:
    """Every record of a profile, in the order of their names.

    Raises:
        StudyError: one cannot be read; names it.
    """
    return [read_record(path) for path in sorted((profile.results / "runs").glob("*.json"))]


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


def configuration(spec: TrainSpec) -> str:
    """The run's spec without any seed, hashed: equal for runs that differ in seeds alone."""

    def seedless(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: seedless(item) for key, item in value.items() if key != "seed"}
        return [seedless(item) for item in value] if isinstance(value, list) else value

    return json.dumps(seedless(spec.model_dump(mode="json", exclude_defaults=True)), sort_keys=True)


def training_cost(record: Record, by_hash: Mapping[str, Record]) -> float:
    """Core-seconds of training of a run and of every run that it starts from, learns from or is informed by.

    Core-seconds are seconds times the CPU threads that computed, and plain seconds on a GPU. NaN when the record of one
    of those runs is missing.
    """
    spec = record.spec
    own = _core_seconds(record)
    needed: dict[str, Any] = {}
    for other in [getattr(spec, "start", None), getattr(spec, "teacher", None), *getattr(spec, "informed_by", ())]:
        if other is not None:
            needed[spec_hash(other)] = other
    for key in needed:
        own += training_cost(by_hash[key], by_hash) if key in by_hash else np.nan
    return own


def _core_seconds(record: Record) -> float:
    """Of the run's own training; records that do not say how many threads computed had one on every core."""
    training = record.result.get("training", {})
    threads = 1 if record.hardware["gpu"] else training.get("threads", record.hardware["cores"])
    return float(training.get("seconds", 0.0) * threads)


def overview(records: Sequence[Record]) -> pd.DataFrame:
    """One row per compressed training run that has a dense run of the same task and seed beside it, and one per engine
    that made INT8 of a finished run's model.

    ``weights kept (%)`` are the encoder layers' weights that are not zero, ``size (MB)`` is the smallest form in which
    the record says the model was stored (``dense (MB)``: the dense model's), ``cost (core-min)`` the training of the
    whole chain; ``trained`` says whether the run itself trained, or only compressed and measured, ``rival`` whether it
    is what a paper compares its method with. ``floor`` is what one answer for all retains, NaN where there are none.
    """
    by_hash = {record.hash: record for record in records}
    floors = one_label_scores(records)
    runs = [(record.spec, record) for record in records if isinstance(record.spec, TrainSpec)]
    dense = {(s.task, s.seed): record for s, record in runs if s.compressor is None and s.start is None}
    rows = []
    for record in records:
        engine = record.spec.engine if isinstance(record.spec, EngineQualitySpec) else ""
        made = by_hash.get(spec_hash(record.spec.start)) if isinstance(record.spec, EngineQualitySpec) else record
        spec = made.spec if made else None
        if made is None or not isinstance(spec, TrainSpec) or spec.task not in TASKS:  # own data that is not named now
            continue
        base = dense.get((spec.task, spec.seed))
        if base is None or (not engine.endswith(INT8) if engine else spec.compressor is None):
            continue
        name, style = _on_engine(spec) if engine else family(spec)
        rows.append({
            "hash": record.hash, "configuration": configuration(spec) + engine, "task": spec.task,
            "title": TASKS[spec.task].title, "seed": spec.seed, "family": name, "style": style,
            "score": record["score"], "retained": _share(record["score"], base["score"]),
            "weights kept (%)": 100 * _weights(made) / base["model"]["layer_parameters"],
            "size (MB)": (record["size_bytes"] if engine else _bytes(made)) / 1e6, "dense (MB)": _bytes(base) / 1e6,
            "cost (core-min)": training_cost(made, by_hash) / 60, "trained": spec.training.epochs > 0,
            "rival": is_rival(spec), "floor": _share(floors.get(spec.task, np.nan), base["score"]),
        })  # fmt: skip
    about = ["hash", "configuration", "task", "title", "seed", "family", "style", "trained", "rival", "floor", "score",
             "retained"]  # fmt: skip
    return pd.DataFrame(rows, columns=[*about, *NUMBERS])


def _on_engine(spec: TrainSpec) -> tuple[str, str]:
    """Family and style of a model that an engine made INT8 of."""
    return (COMPOUND, "compound") if spec.compressor else ("INT8 by an engine", "openvino-int8")


def _share(score: float, dense: float) -> float:
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


def recipe_frame(study: Profile, records: Iterable[Record], timed: Iterable[Record]) -> pd.DataFrame:
    """One row per recipe, engine and seed: score through the engine, retained share, speed against the reference.

    Args:
        records: of ``plans.frontier``.
        timed: of ``plans.recipe_latency``.

    ``retained`` refers to the dense model in PyTorch; ``speed`` is the median over rounds of the dense model's latency
    on the reference engine over the recipe's, ``speed q1`` and ``speed q3`` their quartiles.
    """
    latency = {(row["model"], row["engine"]): row for record in timed for row in record["rows"]}
    done = {record.hash: record for record in records}
    rows = []
    for seed in study.task_seeds(study.frontier.task):
        made = recipes(study, seed)
        names = {spec_hash(spec): name for name, spec in made.items()}
        dense = done.get(spec_hash(made["dense"])) if "dense" in made else None
        for record in done.values():
            spec = record.spec
            if not isinstance(spec, EngineQualitySpec) or spec_hash(spec.start) not in names or dense is None:
                continue
            name = names[spec_hash(spec.start)]
            time = latency.get((name, spec.engine))
            rows.append({
                "recipe": name, "engine": spec.engine, "seed": seed, "score": record["score"],
                "retained": _share(record["score"], dense["score"]), "size (MB)": record["size_bytes"] / 1e6,
                **{name: time[key] if time else np.nan for name, key in TIMED.items()},
            })  # fmt: skip
    return pd.DataFrame(rows, columns=["recipe", "engine", "seed", "score", "retained", "size (MB)", *TIMED])


def recipe_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds per recipe and engine, with the interval of the retained share and n."""
    rows = []
    for (recipe, engine), group in frame.groupby(["recipe", "engine"], sort=False):
        found = bootstrap_interval(group["retained"])
        rows.append({"recipe": recipe, "engine": engine, "retained": found.mean, "low": found.low, "high": found.high,
                     "n": found.n, **{name: group[name].mean() for name in ("size (MB)", *TIMED)}})  # fmt: skip
    columns = ["recipe", "engine", "retained", "low", "high", "n", "size (MB)", *TIMED]
    return pd.DataFrame(rows, columns=columns)


def decisions(means: pd.DataFrame, losses: Sequence[float]) -> pd.DataFrame:
    """For every loss (percent of the dense score) that one accepts: the fastest recipe, on any engine and on each.

    Losses that lead to the same choice share a row. ``speed ×`` refers to the reference engine; ``× dense there`` is
    the dense model's median latency on the row's own engine over the recipe's, in the rows for any engine the dense
    model's on its fastest.
    """
    bounds = [("loss accepted (%)", f"{loss:.1f}", means["retained"] >= 100 - loss) for loss in sorted(losses)]
    return _choices(means, bounds, "speed")


def within_latency(means: pd.DataFrame, latencies: Sequence[float]) -> pd.DataFrame:
    """For every latency (ms) that one may spend: the recipe that keeps most, on any engine and on each."""
    bounds = [("at most (ms)", f"{latency:g}", means["ms"] <= latency) for latency in sorted(latencies)]
    return _choices(means, bounds, "retained")


def _choices(means: pd.DataFrame, bounds: Sequence[tuple[str, str, pd.Series]], best_by: str) -> pd.DataFrame:
    """The row of ``means`` that is best within each bound (its name, its value in words, the rows within it)."""
    rows: list[dict[str, Any]] = []
    dense = means[means["recipe"] == "dense"].set_index("engine")["ms"]
    for engine in ["any", *dict.fromkeys(means["engine"])]:
        there = means[means["speed"].notna() & ((means["engine"] == engine) | (engine == "any"))]
        accepted: dict[int | None, list[str]] = {}
        for _, value, within in bounds:
            good = there[within.reindex(there.index)].sort_values(best_by, kind="stable")
            accepted.setdefault(None if good.empty else int(good.index[-1]), []).append(value)
        for best, values in accepted.items():
            about = {bounds[0][0]: " to ".join(dict.fromkeys((values[0], values[-1])))}
            if best is None:
                rows.append({"engine": engine, **about, "take": "nothing measured here is within it"})
                continue
            row = there.loc[best]
            rows.append({
                "engine": f"any: {row['engine']}" if engine == "any" else engine, **about, "take": row["recipe"],
                "speed ×": row["speed"],
                "× dense there": (dense.min() if engine == "any" else dense.get(engine, np.nan)) / row["ms"],
                "ms": row["ms"], "retained (%)": row["retained"], "size (MB)": row["size (MB)"], "n": row["n"],
            })  # fmt: skip
    columns = ["engine", bounds[0][0] if bounds else "", "take", "speed ×", "× dense there", "ms", "retained (%)",
               "size (MB)", "n"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def export(study: Profile, recipe: str, about: Mapping[str, Any], train: bool = False) -> Path | None:
    """Copy a recipe's model to ``results/<profile>/recipes/<name>``, ready to load, with ``recipe.json`` beside it.

    The weights are fp32; an engine makes its own INT8 or bf16 of them when it loads them (``lib.engines.prepare``).

    Args:
        about: what ``recipe.json`` says besides the recipe and its run.
        train: train the model again where only its record is here; None is returned otherwise.

    Raises:
        StudyError: unknown recipe, the folder cannot be written, or training again gives another model.
    """
    seed = study.task_seeds(study.frontier.task)[0]
    made = recipes(study, seed)
    if recipe not in made:
        raise StudyError(f"frontier: no recipe '{recipe}'; there is {'; '.join(made)}")
    source = weights_folder(study, made[recipe])
    if not source.is_dir() and train:
        finished_model(study, made[recipe])
    if not source.is_dir():
        return None
    slug = "".join(letter if letter.isalnum() else "-" for letter in recipe.lower())
    target = study.results / "recipes" / "-".join(filter(None, slug.split("-")))
    try:
        shutil.copytree(source, target, dirs_exist_ok=True)
    except OSError as error:
        raise StudyError(f"cannot write {target} ({error.strerror}); free some space") from None
    described = {"recipe": recipe, "run": spec_hash(made[recipe]), "weights": "fp32", **about}
    write_atomically(target / "recipe.json", json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    return target


def verdicts(study: Profile) -> tuple[pd.DataFrame, list[str]]:
    """The verdict tables that the papers' notebooks saved for this profile, in one; and the papers that are missing."""
    papers = {"02": "McCarley 2019", "03": "Kurtic 2022", "04": "Lagunas 2021", "05": "Sajjad 2020", "06": "Prato 2020",
              "07": "Tahaei 2021"}  # fmt: skip
    found, missing = [], []
    for number, paper in papers.items():
        path = study.results / "tables" / f"{number}_verdicts.csv"
        if path.is_file():
            found.append(pd.read_csv(path, keep_default_na=False).assign(paper=paper))
        else:
            missing.append(f"{paper} (notebook {number})")
    columns = ["paper", "claim", "check", "published", "ours", "verdict", "evidence"]
    return pd.concat(found)[columns] if found else pd.DataFrame(columns=columns), missing


def verdict_counts(study: Profile) -> pd.DataFrame:
    """How many claims of each paper got which verdict; a column more for the papers whose notebook has not run.

    What a notebook judges beside the paper's claims, and calls "not claimed", is not counted.
    """
    table, missing = verdicts(study)
    table = table[~table["claim"].str.endswith(NOT_CLAIMED)]
    waiting = pd.DataFrame({"paper": missing, "verdict": "not executed yet"})
    every = pd.concat([table[["paper", "verdict"]], waiting])
    reasons_off = every["verdict"].str.split(r" \(|:", regex=True).str[0]
    counts = pd.crosstab(every["paper"], reasons_off).reindex(every["paper"].unique())
    ordered = [verdict for verdict in VERDICTS if verdict in counts]
    return counts[[*ordered, *counts.columns.difference(ordered)]].rename_axis(columns=None).reset_index()
