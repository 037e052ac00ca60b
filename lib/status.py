"""How much of a series is finished: the runs that its notebooks plan, and those whose records are there."""

import contextlib
import io
from collections.abc import Iterable

import pandas as pd

from lib.config import StudyError
from lib.execute import notebooks
from lib.fanout import job_name, plan_jobs, plans_of
from lib.records import Record
from lib.settings import Profile

COLUMNS = ["notebook", "planned", "finished", "missing", "hours of runs", "machines"]


def by_notebook(study: Profile, records: Iterable[Record]) -> pd.DataFrame:
    """One row per notebook that plans runs: how many are planned, finished and missing, and how long they took.

    A run that several notebooks plan counts in each of them. Runs that only other runs begin with or learn from count
    too; what can be planned only once others are finished does not. ``hours of runs`` are wall-clock hours, whether or
    not another run went on beside them; ``machines`` may say why there is no plan.
    """
    done = {job_name(study, record.spec): record for record in records}
    rows = []
    for path in notebooks():
        if not (names := plans_of([path])):
            continue
        planned, where = set[str](), ""
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # what a plan says of the records that it lacks
                planned = set(plan_jobs(study, names)[0])
        except StudyError as reason:
            where = f"cannot be planned: {reason}"
        found = [done[name] for name in planned & done.keys()]
        rows.append({
            "notebook": path.stem, "planned": len(planned), "finished": len(found),
            "missing": len(planned) - len(found), "hours of runs": sum(record.seconds for record in found) / 3600,
            "machines": where or ", ".join(sorted({record.machine for record in found})),
        })  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)
