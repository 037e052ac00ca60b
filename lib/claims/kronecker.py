"""The claims of Tahaei et al. (2021), each checked against the records of notebook 07."""

import pandas as pd

from lib.analysis.kronecker import DISTURBED, NAMES, complete, exact_sizes, published_retained
from lib.claims import (
    NOT_CLAIMED,
    NOT_RUN,
    SPEED_TOLERANCE,
    as_small,
    informative_rows,
    leads,
    reaches,
    retains,
    seeds_of,
    timed_on,
    verdict,
)
from lib.data import TASKS
from lib.published import published

UNTRAINED = 90.0  # percent of its first loss at which a training that gives one answer for all has learnt nothing
NEARLY_ALL = 99.0  # percent of the dense score


def verdicts(frame: pd.DataFrame, speed: pd.DataFrame) -> pd.DataFrame:
    """Verdicts on the paper.

    Args:
        frame: ``analysis.kronecker.kronecker_frame``.
        speed: ``analysis.kronecker.speed_frame``; may be empty.
    """
    full = frame[frame["variant"] == "full"].dropna(subset=["retained"])
    return pd.DataFrame([
        *(_size(name) for name in ("kron8", "kron19", "kron21")),
        _slower(speed),
        _faster(speed),
        *(_glue(full, name) for name in ("kron8", "kron21")),
        *(_nearly_all(full, name) for name in ("kron8", "kron21")),
        *(_squad(full, name) for name in ("kron8", "kron21")),
        _ablation(frame, "no_text", "The first stage is worth much", "no", "yes"),
        _ablation(frame, "no_teacher", "The teacher helps in the second stage too", "yes", "no"),
    ])  # fmt: skip


def _size(name: str) -> dict[str, str]:
    sizes = exact_sizes().set_index("configuration")
    row = sizes.loc[name]
    exact, printed = (float(sizes[column].loc[name]) for column in ("exact (M)", "published (M)"))
    holds = as_small(exact, printed)
    evidence = "exact count on BERT-base, with positions, biases and pooler; "
    if holds:
        evidence += f"{100 * (exact / printed - 1):+.1f} %"
    else:
        evidence += (
            f"the printed shapes cannot give the printed size; without position embeddings they count "
            f"{row['without positions (M)']:.2f} M, but then the other models do not fit"
        )
    compression = published("tahaei2021", metric="compression", method=name)["value"].max()
    return verdict(
        f"{NAMES[name]} is {compression:g} times smaller than BERT-base", "size", f"{printed:.1f} M",
        f"{exact:.2f} M ({row['ratio']:.1f} times)", holds, evidence,
    )  # fmt: skip


def _smallest_batch(speed: pd.DataFrame, name: str) -> tuple[pd.DataFrame, str]:
    """Rows of a model at batch 1, which the paper times, without disturbed ones, and what to say of those."""
    if speed.empty:
        return speed, ""
    rows = speed[(speed["model"] == name) & (speed["batch"] == 1)]
    kept, noisy = rows[~rows["disturbed"]], rows[rows["disturbed"]]["engine"].tolist()
    spread = f"; left out, the dense model's quartiles more than {100 * DISTURBED:.0f} % of its median apart: "
    return kept, spread + ", ".join(noisy) if noisy else ""


def _printed_speed(name: str) -> dict[str, float]:
    rows = published("tahaei2021", metric="speedup", method=name)
    return dict(zip(rows["device"], rows["value"], strict=True))


def _slower(speed: pd.DataFrame) -> dict[str, str]:
    claim, printed = "KroneckerBERT8 is slower than BERT-base", _printed_speed("kron8").values()
    shown, (rows, left_out) = f"{min(printed):.2f} to {max(printed):.2f} ×", _smallest_batch(speed, "kron8")
    if rows.empty:
        return _nothing_timed(claim, shown, left_out)
    ratios, (as_fast, _) = rows["ratio_to_dense"], reaches(rows, 1.0)
    slower = [None if fast is None else not fast for fast in as_fast]
    open_ = slower.count(None)
    found = f"slower on {slower.count(True)} of them" + f", {open_} cannot tell (the quartiles hold 1)" * bool(open_)
    evidence = f"{timed_on(rows)}, random weights; {found}{left_out}. Published: two phones and a Xeon"
    return verdict(claim, "speed", shown, f"{ratios.min():.2f} to {ratios.max():.2f} ×", slower, evidence)


def _faster(speed: pd.DataFrame) -> dict[str, str]:
    claim = "KroneckerBERT19 is faster than BERT-base on a CPU"
    xeon = next(value for device, value in _printed_speed("kron19").items() if "CPU" in device)
    rows, left_out = _smallest_batch(speed, "kron19")
    other = ""
    if rows.empty and not left_out:  # the same layers with other embeddings
        rows, left_out = _smallest_batch(speed, "kron21")
        other = "; measured on KroneckerBERT21, whose layers are the same"
    if rows.empty:
        return _nothing_timed(claim, f"{xeon:.2f} ×", left_out)
    ratios, (holds, found) = rows["ratio_to_dense"], reaches(rows, max(1.0, SPEED_TOLERANCE * xeon))
    return verdict(
        claim, "speed", f"{xeon:.2f} ×", f"{ratios.min():.2f} to {ratios.max():.2f} ×", holds,
        f"{found}: {timed_on(rows)}, random weights{other}{left_out}",
    )  # fmt: skip


def _nothing_timed(claim: str, shown: str, left_out: str) -> dict[str, str]:
    if not left_out:
        return verdict(claim, "speed", shown, NOT_RUN, None, "")
    row = verdict(claim, "speed", shown, "disturbed", None, left_out.removeprefix("; "))
    return row | {"verdict": "cannot tell: every run was disturbed"}


def _sentences(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["task"].map(lambda task: TASKS[task].kind != "qa").astype(bool)]


def _glue(full: pd.DataFrame, name: str) -> dict[str, str]:
    """Task by task, in the paper's metric: the shares of Tables 2 and 3."""
    claim = f"{NAMES[name]} keeps its shares of the GLUE scores"
    theirs = _sentences(published_retained()).query("configuration == @name").set_index("task")["retained"]
    rows, left_out = informative_rows(_sentences(full[full["configuration"] == name]))
    rows = rows[rows["task"].isin(theirs.index)]
    if rows.empty:
        return verdict(claim, "quality", "per task", NOT_RUN, None, left_out.removeprefix("; "))
    evidence = (
        "retained share in the metric of the paper's table (F1 on MRPC, Spearman's correlation on STS-B)" + left_out
    )
    return retains(claim, theirs, rows.assign(retained=rows["paper retained"]), evidence)


def _nearly_all(full: pd.DataFrame, name: str) -> dict[str, str]:
    """What a summary says of the paper and its own table does not bear out for the smaller model."""
    claim = f"{NAMES[name]} retains more than {NEARLY_ALL:.0f} % on most GLUE tasks {NOT_CLAIMED}"
    table = _sentences(published_retained())
    theirs = table[table["configuration"] == name]["retained"]
    printed = f"{(theirs > NEARLY_ALL).sum()} of {len(theirs)} tasks in its own table"
    rows, left_out = informative_rows(_sentences(full[full["configuration"] == name]))
    if rows.empty:
        return verdict(claim, "quality", printed, NOT_RUN, None, left_out.removeprefix("; "))
    means = rows.groupby("title")["paper retained"].mean()
    above = int((means > NEARLY_ALL).sum())
    evidence = (
        f"retained share, {means.min():.1f} ({means.idxmin()}) to {means.max():.1f} % ({means.idxmax()}){left_out}"
    )
    holds = above > len(means) / 2
    return verdict(claim, "quality", printed, f"{above} of {len(means)} tasks", holds, evidence, seeds_of(rows))


def _squad(full: pd.DataFrame, name: str) -> dict[str, str]:
    claim = f"{NAMES[name]} keeps that share of its F1 on SQuAD 1.1"
    theirs = published_retained()
    printed = theirs[(theirs["configuration"] == name) & (theirs["task"] == "squad_v1")]["retained"].item()
    rows = full[(full["configuration"] == name) & full["task"].isin(["squad_v1", "world_qa"])]
    if rows.empty:
        return verdict(claim, "quality", f"{printed:.1f} %", NOT_RUN, None, "")
    evidence = f"{rows['title'].iloc[0]}, retained share of the same seed's dense model"
    return retains(claim, printed, rows, evidence)


def _ablation(frame: pd.DataFrame, variant: str, claim: str, text: str, teacher: str) -> dict[str, str]:
    """Points of score lost without one stage, beside the published loss on the same kind of development sets."""
    table = published("tahaei2021", place="NAACL Table 6")
    with_all = table[(table["text"] == "yes") & (table["teacher"] == "yes")].set_index("task")["value"]
    without = table[(table["text"] == text) & (table["teacher"] == teacher)].set_index("task")["value"]
    lost = with_all - without
    printed = ", ".join(f"{TASKS[str(task)].title} −{value:.1f}" for task, value in lost.items())
    rows = complete(frame[frame["configuration"] == "kron8"], ["full", variant])
    pairs = rows.pivot_table(index=["task", "seed"], columns="variant", values="score").dropna()
    if pairs.shape[1] < 2 or pairs.empty:
        return verdict(claim, "quality", printed, NOT_RUN, None, "")
    evidence = f"points of score, paired over {len(pairs)} (task, seed): {', '.join(rows['title'].unique())}"
    rivals = rows[rows["variant"] == variant]
    useless = rivals[rivals["score"] <= rivals["floor"] + 1e-6]
    if len(useless):
        left = useless["loss left (%)"].min()
        evidence += (
            f"; without it {len(useless)} of {len(rivals)} do no better than one answer for all: their training "
        )
        evidence += f"loss ended at {left:.0f} % of its start or more, at the learning rate of the others"
    untrained = useless[useless["loss left (%)"] > UNTRAINED]
    pairs = pairs[~pairs.index.isin(pd.MultiIndex.from_frame(untrained[["task", "seed"]]))]
    if pairs.empty:  # a training that never began says nothing of what the stage is worth
        return verdict(claim, "quality", printed, "nothing to compare", None, evidence)
    gains = (pairs["full"] - pairs[variant]).rename("gain").reset_index()
    return leads(claim, printed, gains, evidence, "points with it")
