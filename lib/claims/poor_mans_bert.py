"""Claims of Sajjad et al. 2020, checked against the records of notebook 05."""

import numpy as np
import pandas as pd

from lib.analysis import published_retained
from lib.analysis.poor_mans_bert import with_most_seeds
from lib.claims import (
    ENOUGH_SEEDS,
    NOT_RUN,
    QUALITY_TOLERANCE,
    SPEED_TOLERANCE,
    as_small,
    gains_by_task,
    informative_rows,
    kept_by_task,
    reaches,
    retains,
    seeds_of,
    signed,
    timed_on,
    verdict,
)
from lib.data import TASKS
from lib.intervals import t_interval
from lib.models import published_parameters
from lib.published import published

# Layers of BERT-base whose similarity is above the threshold, as the paper prints them (section 3).
PUBLISHED_ABOVE = {0.95: (3, 5), 0.925: (3, 5, 8, 9)}


def verdicts(layers: int, curves: pd.DataFrame, orders: pd.DataFrame, training: pd.DataFrame,
             inference: pd.DataFrame) -> pd.DataFrame:  # fmt: skip
    """Verdicts on Sajjad et al. 2020.

    Args:
        layers: of the profile's encoder.
        curves: rows of ``analysis.strategy_frame`` for "before", variants ``K=…``; as in ``orders``, tasks that are not
            ``informative`` are left out of the verdicts, and named.
        orders: rows of ``analysis.strategy_frame`` of several procedures; paired here by K, task and seed.
        training: ``analysis.training_speed_frame`` with ``dropped (%)``; may be empty.
        inference: ``analysis.latency_frame`` with ``time saved (%)`` and ``dropped (%)``; may be empty.
    """
    sentences = curves["task"].map(lambda task: TASKS[task].kind != "qa").astype(bool)  # an empty map is text
    glue = curves[sentences].dropna(subset=["retained"])
    rows = [
        _size(),
        _fine_tuning(training),
        _inference(inference),
        _retained(glue, layers),
        _top_is_best(glue, layers),
        _order(orders, "after", "Dropping from the fine-tuned model and fine-tuning again is comparable"),
        _order(orders, "iterative", "Dropping one layer at a time gains nothing"),
    ]
    return pd.DataFrame(rows)


def _size() -> dict[str, str]:
    exact = published_parameters("bert-base-uncased", 6) / 1e6
    bare = published_parameters("bert-base-uncased", 6, pooler=False) / 1e6
    printed = published("sajjad2020", metric="parameters", model="BERT-base", K=6)["value"].item()
    return verdict(
        "BERT-base without six layers is 40 % smaller", "size", f"{printed:.0f} M", f"{exact:.2f} M",
        as_small(exact, printed),
        f"exact count on the published architecture; {bare:.2f} M without its pooler",
    )  # fmt: skip


def _fine_tuning(training: pd.DataFrame) -> dict[str, str]:
    claim = "Half the layers fine-tune almost twice as fast"
    printed = published("sajjad2020", metric="finetuning_speedup", model="BERT-base", K=6)["value"].item()
    half = training
    if len(training):
        half = training[np.isclose(training["dropped (%)"], 50) & (training["precision"] == "fp32")]
    if half.empty:
        return verdict(claim, "speed", f"{printed:.2f} ×", NOT_RUN, None, "")
    row, (holds, found) = half.iloc[0], reaches(half.head(1), SPEED_TOLERANCE * printed)
    conditions = f"fp32, batch {row['batch']} × {row['length']} tokens, {row['n']} interleaved rounds"
    ours = f"{row['ratio_to_dense']:.2f} × ({row['ratio_q1']:.2f}–{row['ratio_q3']:.2f})"
    return verdict(claim, "speed", f"{printed:.2f} ×", ours, holds, f"{found}: {row['cpu']}, {conditions}")


def _inference(inference: pd.DataFrame) -> dict[str, str]:
    claim = "Half the layers halve the inference time"
    printed = published("sajjad2020", metric="inference_time_reduction", model="BERT-base", K=6)["value"].item()
    if inference.empty:
        return verdict(claim, "speed", f"{printed:.0f} % saved", NOT_RUN, None, "")
    half = inference[np.isclose(inference["dropped (%)"], 50) & (inference["batch"] == inference["batch"].max())]
    if half.empty:
        return verdict(claim, "speed", f"{printed:.0f} % saved", NOT_RUN, None, "")
    saved, bound = half["time saved (%)"], SPEED_TOLERANCE * printed
    holds, found = reaches(half, 1 / (1 - bound / 100))
    ours = f"{saved.min():.0f} to {saved.max():.0f} % saved"
    evidence = f"{found}, {bound:.0f} % saved: {timed_on(half)}"
    return verdict(claim, "speed", f"{printed:.0f} % saved", ours, holds, evidence)


def _retained(glue: pd.DataFrame, layers: int) -> dict[str, str]:
    """Task by task against the paper's own share of it; tasks that the paper does not have are told beside them."""
    claim = "Half of the layers, dropped from the top, keep nearly all of the score"
    theirs = published_retained("sajjad2020", 12, place="v1 Table 1", model="BERT-base")
    shares = theirs[theirs["dropped_share"] == 0.5].set_index("task")["retained"]
    printed = f"{shares.mean():.1f} % over {len(shares)} tasks"
    ours, left_out = informative_rows(glue[(glue["strategy"] == "top") & (2 * glue["k"] == layers)])
    shared, beside = ours[ours["task"].isin(shares.index)], ours[~ours["task"].isin(shares.index)]
    evidence = f"not in the paper: {kept_by_task(beside)[0]}{left_out}" if len(beside) else left_out.removeprefix("; ")
    if shared.empty:
        return verdict(claim, "quality", printed, NOT_RUN, None, evidence)
    return retains(claim, shares, shared, evidence, f"{printed}: ")


def _top_is_best(glue: pd.DataFrame, layers: int) -> dict[str, str]:
    claim = "Dropping from the top is the best or near-best strategy"
    at_half = glue[2 * glue["k"] == layers]
    shared = at_half.groupby(["task", "seed"])["strategy"].transform("nunique") == at_half["strategy"].nunique()
    compared, left_out = _compared(at_half[shared])
    means = compared.groupby(["strategy", "task"])["retained"].mean().groupby("strategy").mean()
    means = means.sort_values(ascending=False)
    if "top" not in means or len(means) < 2:
        return verdict(claim, "quality", "best at K = 6", NOT_RUN, None, left_out.removeprefix("; "))
    best = means.index[0]
    ours = f"rank {list(means.index).index('top') + 1} of {len(means)}" + (
        "" if best == "top" else f" ({best} {means.iloc[0]:.1f} %, top {means['top']:.1f} %)"
    )
    evidence = f"retained share at half of the layers, mean over {_titles(compared)}, {_seeds(compared)}{left_out}"
    holds, seeds = bool(means["top"] >= means.iloc[0] - QUALITY_TOLERANCE), seeds_of(compared)
    if holds or seeds < ENOUGH_SEEDS:
        return verdict(claim, "quality", "best at K = 6", ours, holds, evidence, seeds)
    pairs = compared.pivot_table(index=["task", "seed"], columns="strategy", values="retained").dropna()
    behind = t_interval(pairs["top"] - pairs[best])
    evidence += f"; top less {best} over {behind.n} pairs: {signed(behind)}"
    row = verdict(claim, "quality", "best at K = 6", ours, False, evidence, seeds)
    return row | {"verdict": "cannot tell: the interval holds zero"} if behind.high > 0 else row


def _titles(rows: pd.DataFrame) -> str:
    return ", ".join(rows["title"].unique())


def _compared(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Rows of informative tasks that have as many seeds as any, and what to say of the others."""
    informative, left_out = informative_rows(rows)
    chosen = with_most_seeds(informative)
    fewer = _titles(informative[~informative["task"].isin(chosen["task"])])
    return chosen, left_out + (f"; left out, fewer seeds: {fewer}" if fewer else "")


def _order(orders: pd.DataFrame, procedure: str, claim: str) -> dict[str, str]:
    """Whether a procedure is no better than dropping first, or, for "after", neither better nor worse.

    A claim of no difference needs an interval that leaves no room for one: all of it within the tolerance. Every task
    is judged for itself, over its seeds; one that cannot tell leaves what others hold *in part*.
    """
    printed = "comparable" if procedure == "after" else "no gain"
    both, left_out = informative_rows(orders[orders["procedure"].isin(["before", procedure])])
    pairs = both.pivot_table(index=["k", "task", "seed"], columns="procedure", values="retained").dropna()
    if both["procedure"].nunique() < 2 or pairs.empty:
        return verdict(claim, "quality", printed, NOT_RUN, None, left_out.removeprefix("; "))
    found, shown = gains_by_task((pairs[procedure] - pairs["before"]).rename("gain").reset_index())
    room, worst = f"+{QUALITY_TOLERANCE:.0f} points", -np.inf
    if procedure == "after":
        room, worst = f"±{QUALITY_TOLERANCE:.0f} points", -QUALITY_TOLERANCE
    compared = pairs.reset_index()
    evidence = f"retained share, paired over {len(pairs)} (K, task, seed), {_seeds(compared)}; 95 % Student t intervals"
    evidence += f", a task holds where all of its own is {'within' if procedure == 'after' else 'below'} {room}"
    evidence += "; fine-tuned twice, each time as long as the others" if procedure == "after" else ""
    alone = both[both.set_index(["k", "task", "seed"]).index.isin(pairs.index)]
    floored = alone[(alone["procedure"] == procedure) & (alone["score"] <= alone["floor"] + 1e-6)]
    evidence += f"; {len(floored)} of the runs give one answer for all" if len(floored) else ""
    ours = "; ".join(f"{gain} on {title}" for gain, title in zip(shown, found, strict=True))
    judged = [gain for gain in found.values() if gain.n >= ENOUGH_SEEDS]
    holds = [worst < gain.low and gain.high < QUALITY_TOLERANCE for gain in judged]
    fails = [gain.low >= QUALITY_TOLERANCE or gain.high <= worst for gain in judged]
    row = verdict(claim, "quality", printed, ours, holds or [False], evidence + left_out, seeds_of(compared))
    if judged and not any(holds) and not any(fails):
        row["verdict"] = f"cannot tell: the interval crosses {room}"
    return row


def _seeds(frame: pd.DataFrame) -> str:
    counts = frame.groupby("task")["seed"].nunique()
    low, high = counts.min(), counts.max()
    return f"{low} seed{'s' if low > 1 else ''} each" if low == high else f"{low} to {high} seeds each"
