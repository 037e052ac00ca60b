"""The papers' claims, each checked against records: one module per paper, one row per claim.

A claim is split by what can be checked here: *size* (exact counts), *speed* (published shapes, this machine), *quality*
(retained share on the profile's encoder and data), *original setting* (profile ``paper``). A row whose records do not
exist yet says so instead of guessing.
"""

from collections.abc import Iterable

import pandas as pd

from lib.figures import Interval, bootstrap_interval

SPEED_TOLERANCE = 0.9  # a speed-up holds at 90 % of the published one
QUALITY_TOLERANCE = 2.0  # points of retained share
ENOUGH_SEEDS = 2  # below this a difference in quality may be the seed's
NOT_RUN = "not run yet"


def verdict(claim: str, check: str, printed: str, ours: str, holds: bool | Iterable[bool] | None, evidence: str,
            seeds: int | None = None, lead: Interval | None = None) -> dict[str, str]:  # fmt: skip
    """One row of a table of verdicts.

    Args:
        check: "size", "speed", "quality" or "original setting".
        holds: one answer, or one for each engine or task, of which some may hold and others not; None means that the
            records at hand cannot tell.
        seeds: of the compared rows (``seeds_of``); fewer than ``ENOUGH_SEEDS`` leave a claim about quality undecided.
        lead: of one method over another, where the claim is about that; one whose interval holds zero is undecided too.
    """
    word = "not testable here"
    if holds is not None:
        cases = [holds] if isinstance(holds, bool) else list(holds)
        word = "holds" if all(cases) else "holds in part" if any(cases) else "does not hold here"
    if check == "quality" and holds is not None and seeds is not None and seeds < ENOUGH_SEEDS:
        word = f"too few seeds to tell (n = {seeds})"
    elif lead is not None and lead.low < 0 < lead.high:
        word = "cannot tell: the interval holds zero"
    return {"claim": claim, "check": check, "published": printed, "ours": ours, "verdict": word, "evidence": evidence}


def leads(claim: str, printed: str, by: pd.Series, evidence: str, seeds: int, unit: str = "points") -> dict[str, str]:
    """Verdict on a claim that one method is better than another.

    Args:
        by: how much better, one value for each pair of runs; its mean is judged, its interval shown.
        seeds: among the pairs (``seeds_of``).
        unit: what ``by`` is in, as the reader sees it.
    """
    found = bootstrap_interval(by)
    spread = f" ({found.low:+.1f} to {found.high:+.1f})" if found.n > 1 else ", a single pair"
    ours = f"{found.mean:+.1f} {unit}{spread}"
    return verdict(claim, "quality", printed, ours, bool(found.mean > 0), evidence, seeds, found)


def seeds_of(frame: pd.DataFrame) -> int:
    """Seeds of the task that has most of them in ``frame`` (columns task, seed): what ``verdict`` asks for."""
    return int(frame.groupby("task")["seed"].nunique().max()) if len(frame) else 0


def retains(claim: str, printed: float, rows: pd.DataFrame, evidence: str) -> dict[str, str]:
    """Verdict on a claim of quality: the mean ``retained`` share of ``rows`` against the published one, in percent."""
    mean = rows["retained"].mean()
    holds = bool(mean >= printed - QUALITY_TOLERANCE)
    return verdict(claim, "quality", f"{printed:.1f} %", f"{mean:.1f} %", holds, evidence, seeds_of(rows))
