"""Which compressed model to take: recipes by quality, latency and size, for a loss or a latency, and ready to load.

A recipe's quality is measured through the engine that its latency is measured on, so that what INT8 costs in score is
on the same plot as what it saves in time.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.claims import ENOUGH_SEEDS
from lib.config import StudyError
from lib.experiments import finished_model
from lib.figures import counted
from lib.files import refused_write, whole_folder, write_atomically
from lib.frontier import share
from lib.intervals import bootstrap_interval
from lib.plans.frontier import DENSE, recipe_seeds, recipes
from lib.records import Record, weights_folder
from lib.settings import Profile
from lib.specs import EngineQualitySpec, TrainSpec, spec_hash

# Columns of a recipe's latency, and what a record of one calls them.
TIMED = {"speed": "ratio_to_dense", "speed q1": "ratio_q1", "speed q3": "ratio_q3", "ms": "median_ms"}
AIMS = ((10, 98.0), (29, 92.5))  # times faster than the dense model on the reference engine, percent of the score kept
NOTHING = "nothing measured here is within it"
NOT_TIMED = "not timed on this processor"


def by_seed(study: Profile, records: Iterable[Record], timed: Iterable[Record]) -> pd.DataFrame:
    """One row per processor, recipe, engine and seed: score through the engine, retained share, speed against the
    reference.

    Args:
        records: of ``plans.frontier``.
        timed: of ``plans.recipe_latency``.

    ``retained`` refers to the dense model in PyTorch; ``speed`` is the median over rounds of the dense model's latency
    on the reference engine over the recipe's, ``speed q1`` and ``speed q3`` their quartiles; recipes of one shape share
    them (``timing``). A reference engine that is PyTorch in fp32 has rows as well: training measured its score.
    """
    latency = {record.processor: timing(record) for record in timed} or {"": {}}
    done = {record.hash: record for record in records}
    scored = {}
    for record in done.values():
        if isinstance(record.spec, EngineQualitySpec):
            scored[spec_hash(record.spec.start), record.spec.engine] = record["score"], record["size_bytes"]
        elif isinstance(record.spec, TrainSpec):
            scored[record.hash, "pytorch-fp32"] = record["score"], record["model"]["size_bytes"]
    engines = dict.fromkeys((study.frontier.reference, *study.frontier.engines))
    rows = []
    by_seeds = {seed: recipes(study, seed) for seed in recipe_seeds(study)}
    for processor, (seed, made) in itertools.product(latency, by_seeds.items()):
        dense = done.get(spec_hash(made[DENSE]))
        for name, engine in itertools.product(made, engines):
            if dense is None or (spec_hash(made[name]), engine) not in scored:
                continue
            score, size = scored[spec_hash(made[name]), engine]
            rows.append({
                "processor": processor, "recipe": name, "engine": engine, "seed": seed, "score": score,
                "retained": share(score, dense["score"]), "size (MB)": size / 1e6,
                **latency[processor].get((name, engine), dict.fromkeys(TIMED, np.nan)),
            })  # fmt: skip
    columns = ["processor", "recipe", "engine", "seed", "score", "retained", "size (MB)", *TIMED]
    return pd.DataFrame(rows, columns=columns)


def timing(record: Record) -> dict[tuple[str, str], dict[str, float]]:
    """The columns of ``TIMED`` for every (recipe, engine) of a record of ``plans.recipe_latency``.

    Recipes of one shape were timed as models of their own. They are builds of the same model: all of them get the means
    of the medians, and the outermost quartiles.
    """
    found = {}
    shapes = record.spec.models  # type: ignore[union-attr]
    for row in record["rows"]:
        same = [other for other in record["rows"] if other["engine"] == row["engine"]
                and shapes[other["model"]] == shapes[row["model"]]]  # fmt: skip
        ends = {"speed q1": min, "speed q3": max}
        found[row["model"], row["engine"]] = {
            name: float(ends.get(name, np.mean)([other[key] for other in same])) for name, key in TIMED.items()
        }
    return found


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds per processor, recipe and engine, with the interval of the retained share and n."""
    rows = []
    for (processor, recipe, engine), group in frame.groupby(["processor", "recipe", "engine"], sort=False):
        found = bootstrap_interval(group["retained"])
        rows.append({"processor": processor, "recipe": recipe, "engine": engine, "retained": found.mean,
                     "low": found.low, "high": found.high, "n": found.n,
                     **{name: group[name].mean() for name in ("size (MB)", *TIMED)}})  # fmt: skip
    columns = ["processor", "recipe", "engine", "retained", "low", "high", "n", "size (MB)", *TIMED]
    return pd.DataFrame(rows, columns=columns)


def on_each(means: pd.DataFrame, choose: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
    """What ``choose`` makes of every processor's rows of ``over_seeds``, in one table that names the processor."""
    tables = {str(name): choose(rows) for name, rows in means.groupby("processor", sort=False)}
    return pd.concat(tables, names=["processor"]).reset_index("processor").reset_index(drop=True)


def aims(means: pd.DataFrame, waiting: int) -> pd.DataFrame:
    """One row per aim of ``AIMS``: whether a recipe reaches it, and the fastest one that keeps what it asks for.

    Args:
        means: of ``over_seeds``, the timed rows of one processor.
        waiting: recipes that are not measured yet.

    Returns:
        ``speed ×`` refers to the reference engine, ``× dense there`` to the dense model on the recipe's own engine.
    """
    rows, dense = [], means[means["recipe"] == DENSE].set_index("engine")["ms"]
    for speed, kept in AIMS:
        fast, good = means[means["speed"] >= speed], means[means["retained"] >= kept].sort_values("speed")
        quickest = good.iloc[-1] if len(good) else None
        rows.append({
            "aim": f"{speed} × faster, at most {100 - kept:.1f} % lost", "outcome": _outcome(quickest, speed, waiting),
            "best at that speed (%)": fast["retained"].max(), "fastest within the loss": "none",
        })  # fmt: skip
        if quickest is not None:
            names = {"speed": "speed ×", "speed q1": "lower quartile ×", "retained": "retained (%)", "n": "n"}
            rows[-1] |= {"fastest within the loss": f"{quickest['recipe']}, on {quickest['engine']}"}
            rows[-1] |= {new: quickest[name] for name, new in names.items()}
            rows[-1]["× dense there"] = dense.get(quickest["engine"], np.nan) / quickest["ms"]
    columns = ["aim", "outcome", "best at that speed (%)", "fastest within the loss", "speed ×", "lower quartile ×",
               "× dense there", "retained (%)", "n"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _outcome(quickest: pd.Series | None, speed: float, waiting: int) -> str:
    """Whether the fastest recipe within an aim's loss reaches its speed, and what that rests on."""
    if quickest is None or quickest["speed"] < speed:
        return f"not reached yet, {counted(waiting, 'recipe')} not measured" if waiting else "missed"
    if quickest["speed q1"] < speed:
        return "reached by the median over rounds, not by the lower quartile"
    return "reached" if quickest["n"] >= ENOUGH_SEEDS else f"reached on {counted(int(quickest['n']), 'seed')} alone"


def decisions(means: pd.DataFrame, losses: Sequence[float]) -> pd.DataFrame:
    """For every loss (percent of the dense score) that one accepts: the fastest recipe, on any engine and on each.

    ``means`` are rows of ``over_seeds`` of one processor, here and in ``within_latency``.
    Losses that lead to the same choice share a row. ``speed ×`` refers to the reference engine; ``× dense there`` is
    the dense model's median latency on the row's own engine over the recipe's, in the rows for any engine the dense
    model's on its fastest.
    """
    bounds = [("loss accepted (%)", f"{loss:.1f}", means["retained"] >= 100 - loss) for loss in sorted(losses)]
    return _choices(means, bounds, ["speed", "retained"])


def targets(means: pd.DataFrame) -> list[float]:
    """Latencies in ms, from the dense model's on its fastest engine down to a third of it; none where it is not timed.

    ``means`` are rows of ``over_seeds`` of one processor.
    """
    fastest = means.loc[means["recipe"] == DENSE, "ms"].min()
    return [fastest * part for part in (1, 0.75, 0.5, 0.4, 1 / 3) if fastest > 0]


def within_latency(means: pd.DataFrame, latencies: Sequence[float]) -> pd.DataFrame:
    """For every latency (ms) that one may spend: the recipe that keeps most, on any engine and on each."""
    bounds = [("at most (ms)", f"{latency:.3g}", means["ms"] <= latency) for latency in sorted(latencies)]
    return _choices(means, bounds, ["retained", "speed"])


def _choices(means: pd.DataFrame, bounds: Sequence[tuple[str, str, pd.Series]], best_by: list[str]) -> pd.DataFrame:
    """The row of ``means`` that is best within each bound (its name, its value in words, the rows within it)."""
    rows: list[dict[str, Any]] = []
    dense = means[means["recipe"] == DENSE].set_index("engine")["ms"]
    for engine in ["any", *dict.fromkeys(means["engine"])]:
        there = means[means["speed"].notna() & ((means["engine"] == engine) | (engine == "any"))]
        if there.empty and bounds:
            rows.append({"engine": engine, "take": NOT_TIMED})
            continue
        accepted: dict[int | None, list[str]] = {}
        for _, value, within in bounds:
            good = there[within.reindex(there.index)].sort_values(best_by, kind="stable")
            accepted.setdefault(None if good.empty else int(good.index[-1]), []).append(value)
        for best, values in accepted.items():
            about = {"engine": engine, bounds[0][0]: " to ".join(dict.fromkeys((values[0], values[-1])))}
            if best is None:
                rows.append({**about, "take": NOTHING})
                continue
            row = there.loc[best]
            rows.append({
                **about, "take": row["recipe"] + (f", on {row['engine']}" if engine == "any" else ""),
                "speed ×": row["speed"],
                "× dense there": (dense.min() if engine == "any" else dense.get(engine, np.nan)) / row["ms"],
                "ms": row["ms"], "retained (%)": row["retained"], "n": row["n"],
            })  # fmt: skip
    columns = ["engine", bounds[0][0] if bounds else "", "take", "speed ×", "× dense there", "ms", "retained (%)", "n"]
    return pd.DataFrame(rows, columns=columns)


def taken(table: pd.DataFrame) -> list[str]:
    """The recipes that a table of ``decisions`` or ``within_latency`` names, each once."""
    return [name for name in dict.fromkeys(table["take"].str.split(", on ").str[0]) if name not in (NOTHING, NOT_TIMED)]


def export(study: Profile, recipe: str, about: Mapping[str, Any], train: bool = False) -> Path | None:
    """Copy a recipe's model to ``results/<profile>/recipes/<name>``, ready to load, with ``recipe.json`` beside it.

    The weights are fp32; an engine makes its own INT8 or bf16 of them when it loads them (``lib.engines.prepare``). An
    earlier export is replaced as a whole, or stays.

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
    described = {"recipe": recipe, "run": spec_hash(made[recipe]), "weights": "fp32", **about}
    try:
        with whole_folder(target) as new:
            shutil.copytree(source, new, dirs_exist_ok=True)
            write_atomically(new / "recipe.json", json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        reason = error.args[0][0][-1] if isinstance(error, shutil.Error) else error
        broken = StudyError(
            f"cannot copy {source} to {target} ({reason}); what was there stays, mend that and run again"
        )
        raise refused_write(error, target) or broken from None
    return target
