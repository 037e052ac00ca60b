"""The papers' claims, each checked against records: one module per paper, one row per claim.

A claim is split by what can be checked here: *size* (exact counts), *speed* (published shapes, on each
processor that was timed), *quality* (retained share on the profile's encoder and data), *original setting* (profile
``paper``). A row whose records do not exist yet says so instead of guessing.
"""

from collections.abc import Iterable

import pandas as pd

from lib.analysis import distinct
from lib.data import TASKS
from lib.figures import counted
from lib.intervals import Interval, bootstrap_interval, t_interval
from lib.settings import Profile

SIZE_TOLERANCE = 0.02  # a size holds when it is larger than the printed one by this share at most
SPEED_TOLERANCE = 0.9  # a speed-up holds at 90 % of the published one
QUALITY_TOLERANCE = 2.0  # points of retained share
ENOUGH_SEEDS = 2  # below this a difference in quality may be the seed's
RULES = (
    "*Size* is exact arithmetic on the published architecture and holds where it is at most "
    f"{100 * SIZE_TOLERANCE:.0f} % above the printed one. *Speed* is measured at the published shape on the processors "
    "that are named beside it (the papers' numbers are mostly a GPU's) and holds from "
    f"{100 * SPEED_TOLERANCE:.0f} % of the printed one; a ratio whose quartiles over rounds hold that bound decides "
    "nothing. *Quality* compares shares of the dense model's score on this "
    f"profile's encoder and data, and holds from {QUALITY_TOLERANCE:.0f} points below the printed share; the "
    "range beside a share is that of two or three seeds, the 95 % bootstrap interval of more. Where another bound is "
    "used, the evidence names it; where only some engines, processors or tasks reach it, a claim *holds "
    "in part*. Whether one method is better than another is judged by paired runs, on every task for itself unless the "
    "evidence says that it is over tasks, and cannot be told where the 95 % Student t interval holds zero. Fewer than "
    f"{ENOUGH_SEEDS} seeds decide nothing about quality; a task with fewer, beside one with enough, can only turn "
    "*holds* into *holds in part*. Times of different runs decide nothing where their quartiles overlap. *Not "
    "testable here* is what this profile's encoder or data cannot show; *not run yet* waits for its records."
)
NOT_RUN = "not run yet"
NOT_CLAIMED = "(not claimed)"  # ends a row that judges what the paper does not say
VERDICTS = (
    "holds",
    "holds in part",
    "does not hold here",
    "cannot tell",
    "too few seeds to tell",
    "not run yet",
    "not testable here",
)


def verdict(claim: str, check: str, printed: str, ours: str, holds: bool | Iterable[bool | None] | None,
            evidence: str, seeds: int | None = None) -> dict[str, str]:  # fmt: skip
    """One row of a table of verdicts.

    Args:
        check: "size", "speed", "quality" or "original setting".
        ours: what was measured, or ``NOT_RUN``, which is the verdict as well.
        holds: one answer, or one for each engine, processor or task, of which some may hold, others not and others
            (None) decide nothing; None for all means that the records at hand cannot tell.
        seeds: of the compared rows (``seeds_of``); fewer than ``ENOUGH_SEEDS`` leave a claim about quality undecided.
    """
    word = ours if ours == NOT_RUN else "not testable here"
    if holds is not None:
        cases = [holds] if isinstance(holds, bool) else [case for case in holds if case is not None]
        word = "holds" if all(cases) else "holds in part" if any(cases) else "does not hold here"
        word = word if cases else "cannot tell: every one's quartiles hold the bound"
    if check == "quality" and holds is not None and seeds is not None and seeds < ENOUGH_SEEDS:
        word = f"too few seeds to tell (n = {seeds})"
    return {"claim": claim, "check": check, "published": printed, "ours": ours, "verdict": word, "evidence": evidence}


def as_small(exact: float, printed: float) -> bool:
    """Whether an exact size is the printed one, rounding allowed for, or below it; both in the same unit."""
    return bool(exact <= (1 + SIZE_TOLERANCE) * printed)


def timed_on(rows: pd.DataFrame) -> str:
    """The conditions of timed ``rows`` (columns engine, cpu, batch, length, threads) in words.

    Processors that timed different batches have theirs named each.
    """
    batches = {str(cpu): distinct(part, "batch") for cpu, part in rows.groupby("cpu")}
    shared = len(set(batches.values())) == 1
    places = [cpu if shared else f"{cpu} at batch {batch}" for cpu, batch in batches.items()]
    size = f"batch {distinct(rows, 'batch')} × " * shared + f"{distinct(rows, 'length')} tokens"
    engines = counted(rows["engine"].nunique(), "engine")
    return f"{engines} on {' and '.join(places)}, {size}, {distinct(rows, 'threads')} threads"


def reaches(rows: pd.DataFrame, bound: float, ratio: str = "ratio_to_dense") -> tuple[list[bool | None], str]:
    """Whether each timed row is at least ``bound`` times as fast as dense; None where its quartiles hold the bound.

    Args:
        rows: columns ``ratio``, ratio_q1 and ratio_q3 (over rounds).

    Returns:
        One answer a row for ``verdict``, and what the evidence says of them.
    """
    low, high = rows["ratio_q1"] >= bound, rows["ratio_q3"] >= bound
    answers = rows[ratio] >= bound
    found = [bool(answer) if one == other else None for answer, one, other in zip(answers, low, high, strict=True)]
    open_ = found.count(None)
    note = f"{found.count(True)} of {len(found)} reach the bound of {bound:.2f} ×"
    return found, note + f", {open_} cannot tell (it lies within the quartiles)" * bool(open_)


def signed(found: Interval, unit: str = "points", alone: str = "a single pair") -> str:
    """A difference as the reader sees it, with its interval: "+1.2 points (+0.3 to +2.0)"."""
    spread = f" ({found.low:+.1f} to {found.high:+.1f})" if found.n > 1 else f", {alone}"
    return f"{found.mean:+.1f} {unit}{spread}"


def gains_by_task(pairs: pd.DataFrame, unit: str = "points") -> tuple[dict[str, Interval], list[str]]:
    """Every task's mean gain over its seeds, by its title, with its 95 % Student t interval; and what the reader sees.

    Pairs of one seed (several sparsities) are no independent evidence and count once.

    Args:
        pairs: columns task (or another condition to be judged for itself, in words), seed and gain (how much better,
            in ``unit``), one row per pair.
        unit: what ``gain`` is in, as the reader sees it.
    """
    titled = pairs.assign(task=[TASKS[task].title if task in TASKS else task for task in pairs["task"]])
    seeds = titled.groupby(["task", "seed"], sort=False)["gain"].mean()
    found = {str(title): t_interval(part) for title, part in seeds.groupby("task", sort=False)}
    single = titled["task"].value_counts() == 1
    return found, [
        signed(gain, unit, "a single pair" if single[title] else "one seed") for title, gain in found.items()
    ]


def leads(claim: str, printed: str, pairs: pd.DataFrame, evidence: str, unit: str = "points") -> dict[str, str]:
    """Verdict on a claim that one method is better than another, from pairs of runs that differ in it alone.

    Every task is judged for itself (``gains_by_task``, whose ``pairs`` and ``unit`` these are). An interval that holds
    zero decides nothing. Beside a task with enough seeds, one with fewer speaks only against a claim (``weighed``).
    """
    found, shown = gains_by_task(pairs, unit)
    if len(found) > 1:
        shown = [f"{gain} on {title}" for gain, title in zip(shown, found, strict=True)]
    judged = [gain for gain in found.values() if gain.n >= ENOUGH_SEEDS]
    better, worse = [gain.low > 0 for gain in judged], [gain.high < 0 for gain in judged]
    few = {title: gain for title, gain in found.items() if gain.n < ENOUGH_SEEDS}
    against = [gain for gain in few.values() if gain.mean < 0]
    if len(judged) > 1:
        undecided = len(judged) - sum(better) - sum(worse)
        evidence += f"; ahead at {sum(better)}, behind at {sum(worse)}, undecided at {undecided}"
    evidence += f"; n = {' and '.join(str(n) for n in sorted({gain.n for gain in found.values()}))}"
    evidence += f"; too few seeds to judge {', '.join(few)}" if judged and few else ""
    holds = better + [False] * len(against)
    row = verdict(claim, "quality", printed, "; ".join(shown), holds or [False], evidence, seeds_of(pairs))
    if judged and not any(better) and not any(worse):
        row["verdict"] = "cannot tell: the interval holds zero"
    return row


def seeds_of(frame: pd.DataFrame) -> int:
    """Seeds of the task that has most of them in ``frame`` (columns task, seed): what ``verdict`` asks for."""
    return int(frame.groupby("task")["seed"].nunique().max()) if len(frame) else 0


def informative_rows(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The rows (columns title, informative) of informative tasks, and what evidence says of the others."""
    titles = ", ".join(rows[~rows["informative"]]["title"].unique())
    return rows[rows["informative"]], f"; left out, dense close to one answer for all: {titles}" if titles else ""


def kept_by_task(rows: pd.DataFrame) -> tuple[str, pd.Series]:
    """Mean shares of the dense score per task as the reader sees them, with intervals over seeds; and the means.

    Args:
        rows: columns title, seed and retained (in percent); runs of one seed count once.
    """
    seeds = rows.groupby(["title", "seed"], sort=False)["retained"].mean()
    found = {str(title): bootstrap_interval(part) for title, part in seeds.groupby("title", sort=False)}
    shown = [
        f"{share.mean:.1f} %{f' ({share.low:.1f}–{share.high:.1f})' if share.n > 1 else ''} on {title} (n = {share.n})"
        for title, share in found.items()
    ]
    return "; ".join(shown), pd.Series({title: share.mean for title, share in found.items()})


def weighed(rows: pd.DataFrame, holds: pd.Series) -> list[bool | None]:
    """Every task's answer for ``verdict``: beside a task with enough seeds, one with fewer speaks only against a claim.

    Args:
        rows: columns title and seed.
        holds: whether each title bears the claim out.
    """
    few = rows.groupby("title")["seed"].nunique().reindex(holds.index) < ENOUGH_SEEDS
    silent = few & holds & (not few.all())
    return [None if quiet else bool(answer) for quiet, answer in zip(silent, holds, strict=True)]


def retains(claim: str, share: float | pd.Series, rows: pd.DataFrame, evidence: str,
            printed: str = "") -> dict[str, str]:  # fmt: skip
    """Verdict on a claim of quality: the mean ``retained`` share against the published one, in percent, per task.

    Tasks with too few seeds decide nothing alone; beside others, one that misses the bound leaves *holds in part*
    (``weighed``).

    Args:
        share: what the paper keeps, in percent; a series where it prints that of every task (its index).
        rows: columns task, title, seed and retained, one row per run.
        printed: what the reader sees of the paper, if that is more than ``share``; before the shares of the tasks.
    """
    shown, means = kept_by_task(rows)
    if isinstance(share, pd.Series):
        share = share.rename(lambda task: TASKS[task].title)[means.index]
        printed += ", ".join(f"{title} {value:.1f} %" for title, value in share.items())
    holds = weighed(rows, means >= share - QUALITY_TOLERANCE)
    return verdict(claim, "quality", printed or f"{share:.1f} %", shown, holds, evidence, seeds_of(rows))


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
