"""The claims of McCarley, Chakravarti and Sil (2019), each checked against the records of notebook 02."""

from collections.abc import Sequence

import pandas as pd

from lib.analysis.structured_qa import NONE, at_point, exact_sizes, published_points
from lib.claims import (
    NOT_CLAIMED,
    NOT_RUN,
    QUALITY_TOLERANCE,
    SPEED_TOLERANCE,
    as_small,
    informative_rows,
    kept_by_task,
    leads,
    reaches,
    retains,
    seeds_of,
    timed_on,
    verdict,
)
from lib.published import published

FAILED = 95.0  # percent of the dense score: a mildly pruned model that keeps less is not usable
POINT = {"heads": 0.474, "units": 0.348}  # the operating point of the headline: "ff2 + attn2" of Table 1


def verdicts(frame: pd.DataFrame, speed: pd.DataFrame) -> pd.DataFrame:
    """Verdicts on the paper, on quality from the first task whose dense score is well above its floor.

    Args:
        frame: ``structured_analysis.structured_frame``.
        speed: ``analysis.latency_frame`` of ``plans.operating_speed``, with ``heads`` and ``units`` kept; may be empty.
    """
    telling = frame[frame["informative"]]
    first = telling[telling["task"] == telling["task"].iloc[0]] if len(telling) else telling
    return pd.DataFrame([
        _size(),
        _speed(speed),
        _lost(first, "retrain", "v1 Table 1"),
        _distilled(first),
        _across(frame),
        _best(first, "heads", ("gain", "leave-one-out", "random")),
        *(_best(first, kind, ("gain", "random")) for kind in ("units", "both")),
        _embedding(first),
    ])  # fmt: skip


def _size() -> dict[str, str]:
    sizes = exact_sizes()
    row, worst = sizes.iloc[-1], sizes["difference (%)"].abs().max()
    return verdict(
        "Without 52.6 % of the heads and 65.2 % of the units, BERT-large is less than half as big", "size",
        f"{row['published (MiB)']:.0f} MiB", f"{row['exact (MiB)']:.1f} MiB",
        as_small(row["exact (MiB)"], row["published (MiB)"]),
        f"exact count of encoder and pooler in fp32; the five sizes of Table 1 differ by {worst:.2f} % at most",
    )  # fmt: skip


def _speed(speed: pd.DataFrame) -> dict[str, str]:
    claim = "The same model is nearly twice as fast"
    printed = published("mccarley2019", place="v1 Table 1", metric="speedup", heads=52.6, recovery=NONE)["value"].item()
    rows = at_point(speed, POINT) if len(speed) else speed
    if rows.empty:
        return verdict(claim, "speed", f"{printed:.2f} ×", NOT_RUN, None, "")
    ratios, (holds, found) = rows["ratio_to_dense"], reaches(rows, SPEED_TOLERANCE * printed)
    evidence = f"{found}: {timed_on(rows)}, random weights at the printed percentages; the paper: GPU"
    ours = f"{ratios.min():.2f} to {ratios.max():.2f} ×"
    return verdict(claim, "speed", f"{printed:.2f} ×", ours, holds, evidence)


def _points(frame: pd.DataFrame, recoveries: Sequence[str], selection: str = "l0") -> pd.DataFrame:
    rows = at_point(frame[frame["kind"] == "both"], POINT)
    return rows[rows["recovery"].isin(recoveries) & (rows["selection"] == selection)]


def _lost(frame: pd.DataFrame, recovery: str, place: str) -> dict[str, str]:
    claim = "Pruned to that point and retrained, it keeps nearly all of its F1"
    table = published_points()
    row = table[(table["place"] == place) & (table["recovery"] == recovery)].iloc[0]
    rows = _points(frame, [recovery])
    if rows.empty:
        return verdict(claim, "quality", f"{row['retained']:.1f} %", NOT_RUN, None, "")
    return retains(claim, row["retained"], rows, _lost_points(rows))


def _distilled(frame: pd.DataFrame) -> dict[str, str]:
    claim = "With distillation less than 0.5 F1 is lost (Natural Questions, RoBERTa-large)"
    printed = published("mccarley2019", place="v3 abstract")["value"].item()
    rows = _points(frame, ["distil", "retrain and distil"])
    if rows.empty:
        return verdict(claim, "quality", f"< {printed:.1f} points lost", NOT_RUN, None, "")
    best = rows.groupby("recovery")["retained"].mean().idxmax()
    rows = rows[rows["recovery"] == best]
    shown, means = kept_by_task(rows)
    evidence = f"{best}; the bound here is 99 % retained, since the paper's own dense score is not at hand; "
    evidence += _lost_points(rows)
    return verdict(claim, "quality", f"< {printed:.1f} points lost", shown, means >= 99.0, evidence, seeds_of(rows))


def _across(frame: pd.DataFrame) -> dict[str, str]:
    claim = "It is effective across data sets"
    table = published_points()
    printed = table[(table["place"] == "v1 Table 1") & (table["recovery"] == "retrain")]["retained"].item()
    rows, left_out = informative_rows(_points(frame, ["retrain and distil"]))
    if rows["task"].nunique() < 2:
        return verdict(claim, "quality", f"{printed:.1f} %", NOT_RUN, None, "")
    (shown, means), evidence = kept_by_task(rows), f"retrained and distilled{left_out}"
    fewest = int(rows.groupby("task")["seed"].nunique().min())  # a claim about every data set needs seeds on each
    return verdict(
        claim, "quality", f"{printed:.1f} %", shown, means >= printed - QUALITY_TOLERANCE, evidence, seeds=fewest
    )


def _best(frame: pd.DataFrame, kind: str, others: Sequence[str]) -> dict[str, str]:
    """Every density for itself, against the best of the others there: the paper's curves show gates best at each."""
    both = kind == "both"
    claim = f"Trained gates choose {'heads and units together' if both else kind} better than {', '.join(others)}"
    claim, printed = (f"{claim} {NOT_CLAIMED}", "–") if both else (claim, "best at every density")
    rows = frame[(frame["kind"] == kind) & (frame["recovery"] == NONE) & frame["selection"].isin(["l0", *others])]
    removed = 100 * (1 - rows[["heads", "units"]])
    names = [f"{heads:.0f} % of heads and {units:.0f} % of units" for heads, units in removed.to_numpy()]
    rows = rows.assign(task=names if both else [f"{share:.0f} %" for share in removed[kind]])
    table = rows.pivot_table(index=["task", "seed"], columns="selection", values="retained").dropna()
    if table.empty or "l0" not in table or table.shape[1] < 2:
        return verdict(claim, "quality", printed, NOT_RUN, None, "")
    means = table.groupby("task", sort=False).mean()
    rivals = means.drop(columns="l0").idxmax(axis=1)
    ahead = int((means["l0"] > means.drop(columns="l0").max(axis=1)).sum())
    evidence = f"retained share without retraining, what is removed beside each; ahead in the mean at {ahead} of "
    evidence += f"{len(means)}, against the best of the others there ({', '.join(dict.fromkeys(map(str, rivals)))})"
    waiting = [name for name in others if name not in table]
    evidence += f"; not run: {', '.join(waiting)}" if waiting else ""
    pairs = table.reset_index()
    best = [scores[rivals[scores["task"]]] for scores in pairs.to_dict("records")]
    pairs["gain"] = pairs["l0"] - best
    return leads(claim, printed, pairs, evidence)


def _embedding(frame: pd.DataFrame) -> dict[str, str]:
    claim = "Gates on embedding dimensions fail"
    rows = frame[frame["kind"] == "embedding"]
    if rows.empty:
        return verdict(claim, "quality", "not usable", NOT_RUN, None, "")
    means = rows.groupby("embedding")["retained"].mean().iloc[::-1]  # the mildest first
    closed = 100 * (1 - means.index.to_numpy(dtype=float))
    shown = [f"{mean:.1f} % with {share:.0f} % closed" for mean, share in zip(means, closed, strict=True)]
    fewest = int(rows.groupby("embedding")["seed"].nunique().min())
    evidence = "retained share, dimensions closed for all layers at once, no retraining; the paper prints no number: "
    evidence += f"below {FAILED:.0f} % counts as failed; n = {fewest}"
    return verdict(claim, "quality", "not usable", "; ".join(shown), means < FAILED, evidence, fewest)


def _lost_points(rows: pd.DataFrame) -> str:
    lost = (100 * rows["score"] / rows["retained"] - rows["score"]).mean()
    return f"{lost:.1f} points of F1 lost here"
