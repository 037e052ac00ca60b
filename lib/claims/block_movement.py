"""The claims of Lagunas, Charlaix, Sanh and Rush (2021), each checked against the records of notebook 04."""

import numpy as np
import pandas as pd

from lib.analysis.block_movement import headline_shape
from lib.claims import NOT_RUN, QUALITY_TOLERANCE, SPEED_TOLERANCE, as_small, leads, seeds_of, timed_on, verdict
from lib.data import TASKS
from lib.intervals import bootstrap_interval
from lib.models import ARCHITECTURES
from lib.published import published

NEAR = 8.0  # points of density within which two models count as equally small


def verdicts(task: str, frame: pd.DataFrame, speed: pd.DataFrame) -> pd.DataFrame:
    """Verdicts on the paper.

    Args:
        task: on which the headline is checked.
        frame: ``analysis.block_movement.block_frame``.
        speed: ``analysis.block_movement.shape_speed_frame``; may be empty.
    """
    headline = frame[frame["task"] == task]
    return pd.DataFrame([
        _size(),
        _speed(speed),
        _kept(headline),
        _struct(frame),
        _unstructured(frame),
        _filling(frame),
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
    ratios = rows["ours"]
    evidence = f"{timed_on(rows)}, random weights in the published shape; the paper: a GPU, batch 128"
    ours = f"{ratios.min():.2f} to {ratios.max():.2f} ×"
    return verdict(claim, "speed", f"{printed:.1f} ×", ours, ratios >= SPEED_TOLERANCE * printed, evidence)


def _kept(frame: pd.DataFrame) -> dict[str, str]:
    claim = "It loses 1 % of its F1"
    printed = 100 - published("lagunas2021", place="v1 sec. 1", metric="score_loss")["value"].item()
    target = 100 - published("lagunas2021", place="v1 sec. 1", metric="weights_removed")["value"].item()
    rows = frame[(frame["method"] == "hybrid-filled") & frame["retained"].notna()]
    if rows.empty:
        return verdict(claim, "quality", f"{printed:.0f} % retained", NOT_RUN, None, "")
    distance = (rows.groupby("strength")["stored"].mean() - target).abs()
    rows = rows[rows["strength"] == distance.idxmin()]
    found, stored = bootstrap_interval(rows["retained"]), rows["stored"].mean()
    spread = f" ({found.low:.1f} to {found.high:.1f})" if found.n > 1 else ""
    evidence = f"{rows['title'].iloc[0]}, hybrid filled, {100 - stored:.0f} % smaller; n = {found.n} seeds"
    holds = bool(found.mean >= printed - QUALITY_TOLERANCE) if stored <= target + NEAR else None
    evidence += "" if holds is not None else f"; too little is removed to compare with {100 - target:.0f} %"
    ours = f"{found.mean:.1f} % retained{spread}"
    return verdict(claim, "quality", f"{printed:.0f} % retained", ours, holds, evidence, seeds_of(rows))


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
    known = frame[frame["retained"].notna()]
    rivals, lost = known[known["method"] == other], known[(known["method"] == other) & known["constant"]]
    ours = known[known["method"].isin(["hybrid", "hybrid-top-k"]) & ~known["constant"]]
    for rival in rivals[~rivals["constant"]].to_dict("records"):
        same = ours[(ours["task"] == rival["task"]) & (ours["seed"] == rival["seed"])]
        gap = (same["density"] - rival["density"]).abs()
        gaps += [gap.min()] if len(gap) else []
        if len(gap) and gap.min() <= NEAR:
            lead = same.loc[gap.idxmin(), "retained"] - rival["retained"]
            pairs.append({"task": rival["task"], "seed": rival["seed"], "lead": lead if better == "hybrid" else -lead})
    collapsed = f"{len(lost)} of {len(rivals)} models of the rival give one answer for all" if len(lost) else ""
    if not pairs:
        found = f"no pair of like density; they differ by {min(gaps):.0f} points at least" if gaps else NOT_RUN
        return verdict(
            claim, "quality", printed, found if gaps or not collapsed else "nothing to compare", None, collapsed
        )
    table = pd.DataFrame(pairs)
    evidence = f"retained share, {len(table)} pairs whose densities differ by {NEAR:.0f} points at most"
    evidence += f"; left out: {collapsed}" if collapsed else ""
    return leads(claim, printed, table["lead"], evidence, seeds_of(table))


def _paired(frame: pd.DataFrame, one: str, other: str, near: float = np.inf) -> pd.DataFrame:
    """Difference of retained share, method ``one`` minus ``other``, for the same task, seed, strength and block.

    Pairs whose densities differ by more than ``near`` are left out: the same lambda need not prune as much.
    """
    rows = frame[frame["method"].isin([one, other])].dropna(subset=["retained"])
    keys = ["task", "seed", "strength", "block"]
    table = rows.pivot_table(index=keys, columns="method", values=["retained", "density"])
    if one not in set(rows["method"]) or other not in set(rows["method"]):
        return pd.DataFrame(columns=[*keys, "lead"])
    table = table.dropna()
    table = table[(table["density"][one] - table["density"][other]).abs() <= near]["retained"]
    return (table[one] - table[other]).rename("lead").reset_index()


def _difference(claim: str, printed: str, table: pd.DataFrame, about: str) -> dict[str, str]:
    if table.empty:
        return verdict(claim, "quality", printed, NOT_RUN, None, "")
    evidence = f"retained share, paired over {len(table)} {about}"
    return leads(claim, printed, table["lead"], evidence, seeds_of(table))


def _filling(frame: pd.DataFrame) -> dict[str, str]:
    rows = published("lagunas2021", place="authors notebook, filled gain")
    gains = rows.pivot_table(index="speed", columns="method", values="value")
    gain = gains["hybrid-filled"] - gains["hybrid"]
    claim = "Filling the zeros again gains quality at the same speed"
    printed = f"{gain.min():+.1f} to {gain.max():+.1f} F1"
    return _difference(
        claim,
        printed,
        _paired(frame, "hybrid-filled", "hybrid"),
        "(task, seed, strength); filling comes with training on, and the speed is not measured",
    )


def _teacher(frame: pd.DataFrame) -> dict[str, str]:
    rows = published("lagunas2021", place="v1 Table 7")
    gains = rows.pivot_table(index=["task", "weights"], columns="method", values="value")
    gain = gains["hybrid"] - gains["hybrid-alone"]
    claim = "A teacher helps"
    printed = f"{gain.min():+.1f} to {gain.max():+.1f} points (SST-2, QQP)"
    pairs = _paired(frame, "hybrid", "hybrid-alone", NEAR)
    if pairs.empty and len(_paired(frame, "hybrid", "hybrid-alone")):
        return verdict(claim, "quality", printed, "no pair of like density", None, "")
    return _difference(claim, printed, pairs,
                       f"(task, seed) whose densities differ by {NEAR:.0f} points at most")  # fmt: skip


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
    found, kept = bootstrap_interval(mildest["retained"]), mildest["density"].mean()
    evidence = f"BLEU, {mildest['title'].iloc[0]}, {kept:.0f} % of the weights; n = {found.n} seeds"
    holds, shown = bool(found.mean >= printed - QUALITY_TOLERANCE), f"{found.mean:.1f} % retained"
    return verdict(claim, "quality", f"{printed:.1f} % of ROUGE-L", shown, holds, evidence, seeds_of(mildest))
