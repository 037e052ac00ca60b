"""Which compressed model to take: recipes by quality, latency and size, for a loss or a latency, and ready to load.

A recipe's quality is measured through the engine that its latency is measured on, so that what INT8 costs in score is
on the same plot as what it saves in time.
"""

import itertools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.config import StudyError
from lib.experiments import finished_model, weights_folder
from lib.files import write_atomically
from lib.frontier import share
from lib.intervals import bootstrap_interval
from lib.plans.frontier import recipe_seeds, recipes
from lib.records import Record
from lib.settings import Profile
from lib.specs import EngineQualitySpec, spec_hash

# Columns of a recipe's latency, and what a record of one calls them.
TIMED = {"speed": "ratio_to_dense", "speed q1": "ratio_q1", "speed q3": "ratio_q3", "ms": "median_ms"}


def by_seed(study: Profile, records: Iterable[Record], timed: Iterable[Record]) -> pd.DataFrame:
    """One row per recipe, engine and seed: score through the engine, retained share, speed against the reference.

    Args:
        records: of ``plans.frontier``.
        timed: of ``plans.recipe_latency``.

    ``retained`` refers to the dense model in PyTorch; ``speed`` is the median over rounds of the dense model's latency
    on the reference engine over the recipe's, ``speed q1`` and ``speed q3`` their quartiles.
    """
    latency = {(row["model"], row["engine"]): row for record in timed for row in record["rows"]}
    done = {record.hash: record for record in records}
    scored = {}
    for record in done.values():
        spec = record.spec
        if isinstance(spec, EngineQualitySpec):
            scored[spec_hash(spec.start), spec.engine] = record
    rows = []
    for seed in recipe_seeds(study):
        made = recipes(study, seed)
        dense = done.get(spec_hash(made["dense"])) if "dense" in made else None
        for name, engine in itertools.product(made, study.frontier.engines):
            found = scored.get((spec_hash(made[name]), engine))
            if found is None or dense is None:
                continue
            time = latency.get((name, engine))
            rows.append({
                "recipe": name, "engine": engine, "seed": seed, "score": found["score"],
                "retained": share(found["score"], dense["score"]), "size (MB)": found["size_bytes"] / 1e6,
                **{name: time[key] if time else np.nan for name, key in TIMED.items()},
            })  # fmt: skip
    return pd.DataFrame(rows, columns=["recipe", "engine", "seed", "score", "retained", "size (MB)", *TIMED])


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
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
    seed = recipe_seeds(study)[0]
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
