"""The claims of Lagunas, Charlaix, Sanh and Rush (2021), each checked against the records of notebook 04."""

import numpy as np
import pandas as pd

from lib.analysis.block_movement import PAIR, filled_speed, headline_shape, held_count, paired
from lib.claims import (
    NOT_RUN,
    SPEED_TOLERANCE,
    as_small,
    informative_rows,
    kept_by_task,
    leads,
    reaches,
    retains,
    timed_on,
    verdict,
)
from lib.data import TASKS
from lib.models import ARCHITECTURES
from lib.published import published

NEAR = 8.0  # points of density within which two models count as equally small


def verdicts(task: str, frame: pd.DataFrame, speed: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """Verdicts on the paper.

    Args:
        task: on which the headline is checked.
        frame: ``analysis.block_movement.block_frame``; tasks that are not ``informative`` are left out of the verdicts
            on quality, and named.
        speed: ``analysis.block_movement.shape_speed_frame``; may be empty.
        own: ``analysis.latency_frame`` of ``plans.trained_speed``; may be empty.
    """
    headline = frame[frame["task"] == task]
    return pd.DataFrame([
        _size(),
        _speed(speed),
        _kept(headline),
        _struct(frame),
        _unstructured(frame),
        _filling(frame, own),
        _teacher(frame),
        _generation(frame),
    ])  # fmt: skip


def _size() -> dict[str, str]:
    shape = headline_shape()
    printed = published("lagunas2021", place="v1 sec. 1", metric="weights_removed")["value"].item()
    config = ARCHITECTURES[shape.model]
    total = config.num_hidden_layers * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size)
    exact = 100 * (1 - shape.stored_weights / total)
    return verdict(
        "The pruned BERT-base is 74 % smaller", "size", f"{printed:.0f} %", f"{exact:.1f} %",
        as_small(100 - exact, 100 - printed),
        "linear weights of the layers, counted from the published shape; with embeddings the model shrinks less",
    )  # fmt: skip


def _speed(speed: pd.DataFrame) -> dict[str, str]:
    claim = "The same model is 2.4 times faster"
    printed = published("lagunas2021", place="v1 sec. 1", task="squad_v1", metric="speedup")["value"].item()
    rows = speed[speed["checkpoint"] == headline_shape().checkpoint] if len(speed) else speed
    if rows.empty:
        return verdict(claim, "speed", f"{printed:.1f} ×", NOT_RUN, None, "")
    ratios, (holds, found) = rows["ours"], reaches(rows, SPEED_TOLERANCE * printed, "ours")
    evidence = f"{found}: {timed_on(rows)}, random weights in the published shape; the paper: a GPU, batch 128"
    ours = f"{ratios.min():.2f} to {ratios.max():.2f} ×"
    return verdict(claim, "speed", f"{printed:.1f} ×", ours, holds, evidence)


def _kept(frame: pd.DataFrame) -> dict[str, str]:
    claim = "It loses 1 % of its F1"
    printed = 100 - published("lagunas2021", place="v1 sec. 1", metric="score_loss")["value"].item()
    target = 100 - published("lagunas2021", place="v1 sec. 1", metric="weights_removed")["value"].item()
    rows, left_out = informative_rows(frame[(frame["method"] == "hybrid-filled") & frame["retained"].notna()])
    if rows.empty:
        return _nothing(claim, f"{printed:.0f} %", left_out)
    distance = (rows.groupby("strength")["stored"].mean() - target).abs()
    rows = rows[rows["strength"] == distance.idxmin()]
    stored = rows["stored"].mean()
    evidence = f"hybrid filled, {100 - stored:.0f} % smaller{_held(rows)}"
    if stored <= target + NEAR:
        return retains(claim, printed, rows, evidence, f"{printed:.0f} %")
    evidence += f"; too little is removed to compare with {100 - target:.0f} %"
    return verdict(claim, "quality", f"{printed:.0f} %", kept_by_task(rows)[0], None, evidence)


def _nothing(claim: str, printed: str, left_out: str) -> dict[str, str]:
    """The verdict where nothing is compared: not run, or only on tasks that are not informative."""
    ours = "no task to judge by" if left_out else NOT_RUN
    return verdict(claim, "quality", printed, ours, None, left_out.removeprefix("; "))


def _held(rows: pd.DataFrame) -> str:
    count = held_count(rows["held"])
    return f"; in {count} the least density held: the penalty alone would have pruned more" if count else ""


def _struct(frame: pd.DataFrame) -> dict[str, str]:
    claim = "Small blocks keep more than whole heads, at the same density"
    table = published("lagunas2021", place="v1 Table 2", weights=14).set_index(["method", "metric"])["value"]
    printed = table["hybrid", "score"] - table["struct", "score"]
    return _lead(frame, claim, "struct", f"{printed:+.1f} F1 at 14 M weights", "hybrid")


def _unstructured(frame: pd.DataFrame) -> dict[str, str]:
    claim = "Single weights (movement) keep a little more than hybrid blocks"
    table = published("lagunas2021", place="v1 Table 10", task="mnli", compression=10, teacher="base")
    scores = table.set_index("method")["value"]
    return _lead(frame, claim, "movement", f"{scores['movement'] - scores['hybrid']:+.1f} on MNLI", "movement")


def _lead(frame: pd.DataFrame, claim: str, other: str, printed: str, better: str) -> dict[str, str]:
    """Hybrid (either mask) against another way to prune, wherever their densities are ``NEAR`` each other.

    Models that answer the same whatever is asked are counted, not compared.
    """
    pairs, gaps = [], []
    known, left_out = frame[frame["retained"].notna()], informative_rows(frame[frame["method"] == other])[1]
    known = known[known["informative"]]
    rivals, lost = known[known["method"] == other], known[(known["method"] == other) & known["constant"]]
    ours = known[known["method"].isin(["hybrid", "hybrid-top-k"]) & ~known["constant"]]
    for rival in rivals[~rivals["constant"]].to_dict("records"):
        same = ours[(ours["task"] == rival["task"]) & (ours["seed"] == rival["seed"])]
        gap = (same["density"] - rival["density"]).abs()
        gaps += [gap.min()] if len(gap) else []
        if len(gap) and gap.min() <= NEAR:
            nearest = same.loc[gap.idxmin()]
            lead = nearest["retained"] - rival["retained"]
            pairs.append({
                "task": rival["task"], "seed": rival["seed"], "lead": lead if better == "hybrid" else -lead,
                "block": nearest["block"], "held": nearest["held"] or rival["held"],
            })  # fmt: skip
    collapsed = f"{len(lost)} of {len(rivals)} models of the rival give one answer for all" if len(lost) else ""
    if not pairs and not gaps and not collapsed:
        return _nothing(claim, printed, left_out)
    if not pairs:
        found = (
            f"no pair of like density; they differ by {min(gaps):.0f} points at least" if gaps else "nothing to compare"
        )
        return verdict(claim, "quality", printed, found, None, (collapsed + left_out).removeprefix("; "))
    table = pd.DataFrame(pairs)
    evidence = f"retained share, {len(table)} pair{'s' * (len(table) > 1)} with densities that differ by {NEAR:.0f} "
    evidence += f"points at most; hybrid's blocks: {', '.join(sorted(table['block'].unique()))}{_held(table)}"
    evidence += (f"; left out: {collapsed}" if collapsed else "") + left_out
    return leads(claim, printed, table.rename(columns={"lead": "gain"}), evidence)


def _difference(claim: str, printed: str, table: pd.DataFrame, about: str, left_out: str = "") -> dict[str, str]:
    if table.empty:
        return _nothing(claim, printed, left_out)
    evidence = f"retained share, paired over {len(table)} {about}{_held(table)}{left_out}"
    return leads(claim, printed, table.rename(columns={"lead": "gain"}), evidence)


def _filling(frame: pd.DataFrame, own: pd.DataFrame) -> dict[str, str]:
    rows = published("lagunas2021", place="authors notebook, filled gain")
    gains = rows.pivot_table(index="speed", columns="method", values="value")
    gain = gains["hybrid-filled"] - gains["hybrid"]
    claim = "Filling the zeros again gains quality at the same speed"
    printed = f"{gain.min():+.1f} to {gain.max():+.1f} F1"
    judged, left_out = informative_rows(frame[frame["method"].isin(["hybrid-filled", "hybrid"])])
    about, timed = "(task, seed, strength); filling comes with training on; ", filled_speed(judged, own)
    if timed.empty:
        about += "the speed of no pair is measured"
    else:
        low, high, pairs = timed["ratio"].min(), timed["ratio"].max(), timed.groupby(list(PAIR)).ngroups
        about += f"speed of {pairs} pair{'s' * (pairs > 1)}: filled is {low:.2f} to {high:.2f} × as fast as hybrid, "
        about += timed_on(timed)
    return _difference(claim, printed, paired(judged, "hybrid-filled", "hybrid"), about, left_out)


def _teacher(frame: pd.DataFrame) -> dict[str, str]:
    rows = published("lagunas2021", place="v1 Table 7")
    gains = rows.pivot_table(index=["task", "weights"], columns="method", values="value")
    gain = gains["hybrid"] - gains["hybrid-alone"]
    claim = "A teacher helps"
    printed = f"{gain.min():+.1f} to {gain.max():+.1f} points (SST-2, QQP)"
    _, left_out = informative_rows(frame[frame["method"] == "hybrid-alone"])
    judged = frame[frame["informative"]]
    pairs = paired(judged, "hybrid", "hybrid-alone", NEAR)
    if pairs.empty and len(paired(judged, "hybrid", "hybrid-alone")):
        return verdict(claim, "quality", printed, "no pair of like density", None, left_out.removeprefix("; "))
    about = f"(task, seed) whose densities differ by {NEAR:.0f} points at most"
    return _difference(claim, printed, pairs, about, left_out)


def _generation(frame: pd.DataFrame) -> dict[str, str]:
    claim = "It prunes an encoder-decoder to half with little loss"
    rows = published("lagunas2021", place="v1 Table 4", model="BART-large", metric="rougeL", weights=[353, 158])
    scores = rows.set_index("weights")["value"]
    printed = 100 * scores[158] / scores[353]
    generated = frame["task"].map(lambda task: TASKS[task].kind == "translation").astype(bool)
    ours = frame[generated & (frame["method"] != "dense") & frame["retained"].notna()]
    if ours.empty:
        return verdict(claim, "quality", f"{printed:.1f} % of ROUGE-L", NOT_RUN, None, "")
    mildest = ours[np.isclose(ours["strength"], ours["strength"].max())]
    evidence = f"BLEU, {mildest['density'].mean():.0f} % of the weights"
    return retains(claim, printed, mildest, evidence, f"{printed:.1f} % of ROUGE-L")
