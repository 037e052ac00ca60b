"""Runs and the cache: nothing is computed twice.

``ensure(plan, profile)`` returns the records of a plan and computes only those that are missing. A record is written to
a temporary file, flushed to disk and renamed, so it is whole or absent. Two processes may share a results folder: each
run is guarded by a lock of its own.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import ValidationError

from lib import environment
from lib.command_line import RESUMABLE, Parser, exit_code

if __name__ == "__main__":
    environment.reexec_with_fast_allocator()  # here, because the imports below take seconds

from lib import distributed
from lib.config import StudyError, load_profile
from lib.files import cannot_write, refused_write, whole_folder, write_atomically
from lib.labels import label
from lib.problems import first_problem
from lib.progress import duration, say
from lib.records import (
    Record,
    Records,
    cached,
    checkpoints_folder,
    data_read,
    older_than_start,
    read_record,
    record_path,
    weights_folder,
    weights_read,
)
from lib.settings import Profile
from lib.specs import Spec, parse_spec, spec_hash

SAME_MODEL = 2.0  # points of score: by how much weights that are trained again may differ from their record
IN_POINTS = ("score", "accuracy")  # what a model is told apart by, where its run measured it
SAME_LOSS = 0.05  # the same as a share, of a model that is measured by its loss alone


def ensure(
    plan: Sequence[Spec],
    profile: Profile,
    refresh: bool = False,
    budget_minutes: float | None = None,
    title: str = "runs",
) -> Records:
    """Records of every spec of ``plan``, in order, computing what is missing.

    Args:
        refresh: compute all again, replacing records.
        budget_minutes: start no further run after this time; what is left is in ``.missing``. 0 computes nothing.

    Raises:
        StudyError: a record is corrupt, or a run cannot be made (bad settings, missing data, full disk).
    """
    from lib.experiments import execute

    unique = {spec_hash(spec): spec for spec in plan}
    found = {} if refresh else {key: record for key, spec in unique.items() if (record := cached(profile, spec))}
    todo = [spec for key, spec in unique.items() if key not in found]
    started, missing = time.monotonic(), []
    for number, spec in enumerate(todo, start=1):
        if budget_minutes is not None and time.monotonic() - started >= budget_minutes * 60:
            missing = todo[number - 1 :]
            break
        say(f"{title}: {len(unique) - len(todo)} cached, run {number} of {len(todo)}: {spec.kind} {label(spec)}")
        found[spec_hash(spec)] = _compute(profile, spec, execute, refresh)
    computed = len(todo) - len(missing)
    state = f"{title}: {len(unique)} runs, {len(unique) - len(todo)} cached, {computed} computed"
    if computed:
        state += f" in {duration(time.monotonic() - started)}"
    print(state + (f", {len(missing)} not run yet" if missing else ""))
    if budget_minutes != 0:  # who may compute them again
        _note_other_code(found.values())
    _note_older(found)
    return Records((found[key] for key in unique if key in found), missing)


def obtain(profile: Profile, spec: Spec) -> Record:
    """The record of one spec, computed when it is missing: for a run that needs another's result."""
    from lib.experiments import execute

    return cached(profile, spec) or _compute(profile, spec, execute, refresh=False)


def _same_as_recorded(profile: Profile, spec: Spec, found: Mapping[str, Any], weights: Path) -> None:
    """Check weights that were trained again because only their record travelled; ``found`` is the new run's result.

    Other threads or hardware make another model of the same settings: small differences in what the run measured
    (``SAME_MODEL`` points of a score or accuracy, ``SAME_LOSS`` of a loss) are let pass, others are refused and the
    ``weights`` removed.

    Raises:
        StudyError: it is another model than the recorded one.
    """
    recorded = cached(profile, spec)
    now = _quality(found)
    for name, before in _quality(recorded.result).items() if recorded else ():
        if abs(now[name] - before) > (SAME_MODEL if name in IN_POINTS else SAME_LOSS * abs(before)):
            shutil.rmtree(weights, ignore_errors=True)
            raise StudyError(
                f"{label(spec)}: its weights were missing and were trained again: {name} {now[name]:.4g}, its record "
                f"says {before:.4g}. Runs that begin with it would refer to another model: delete "
                f"{record_path(profile, spec)} and the records made from it, or take another folder (-p results FOLDER)"
            )


def _quality(result: Mapping[str, Any]) -> dict[str, float]:
    """What tells a run's model from another: its score, a language model's accuracy, or the losses of a first stage."""
    measure = next((name for name in IN_POINTS if name in result), None)
    return {measure: result[measure]} if measure else dict(result["after"])


def _note_other_code(records: Iterable[Record]) -> None:
    code = environment.code_digest()
    other = [record for record in records if record.code != code]
    if other:
        commits = sorted({(record.commit or "no commit")[:7] for record in other})
        shown = ", ".join(commits[:4]) + (" …" if len(commits) > 4 else "")
        print(f"  {len(other)} of them were made by earlier versions of lib/ ({shown}); refresh computes them again")


def _note_older(records: Mapping[str, Record]) -> None:
    older = older_than_start(records)
    if older:
        names = ", ".join(label(record.spec) for record in older[:3]) + (" …" if len(older) > 3 else "")
        print(
            f"  {len(older)} of them ({names}) are older than the run that they begin with or learn from; "
            "remove their records, or refresh"
        )


def hold_lock(profile: Profile, spec: Spec) -> AbstractContextManager[object]:
    """``with hold_lock(…)``: no other process computes this run meanwhile; waits for one that does.

    Of processes that train together the first one holds it for all.

    Raises:
        StudyError: the lock cannot be made.
    """
    if not distributed.is_main():
        return nullcontext()
    lock = profile.results / "locks" / f"{spec_hash(spec)}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(lock).acquire()
    except OSError as error:
        raise cannot_write(lock, error) from None


def _compute(profile: Profile, spec: Spec, execute: Callable[[Spec, Profile], dict[str, Any]], refresh: bool) -> Record:
    with hold_lock(profile, spec):
        finished = cached(profile, spec) if distributed.is_main() and not refresh else None
        if distributed.agree(finished is not None):
            return finished or read_record(record_path(profile, spec))
        return _run_and_record(profile, spec, lambda: execute(spec, profile))


def _run_and_record(profile: Profile, spec: Spec, run: Callable[[], dict[str, Any]]) -> Record:
    """What ``run`` returns, written down as the record of ``spec``; the caller holds its lock."""
    started = time.monotonic()
    try:
        result = run()
    except Exception as error:
        if refusal := refused_write(error, profile.results):
            raise refusal from None
        raise
    record = Record(
        hash=spec_hash(spec), spec=spec, result=result, data=data_read(profile, spec),
        weights=weights_read(profile, spec), code=environment.code_digest(), commit=environment.git_commit(),
        created=datetime.now(UTC).isoformat(timespec="seconds"), seconds=round(time.monotonic() - started, 3),
        hardware=environment.hardware() | distributed.description(), packages=environment.packages(),
    )  # fmt: skip
    if distributed.is_main():
        write_atomically(
            record_path(profile, spec), json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
        )
    return record


def ensure_weights(profile: Profile, spec: Spec, run: Callable[[], dict[str, Any]]) -> Path:
    """Make sure of a finished run's weights, which another run begins with or learns from.

    Where they are missing, ``run`` trains the model and leaves them behind (``leave_behind``). If only its record has
    travelled, the two must agree; if there is none either, what ``run`` returns becomes the record, so that nothing is
    trained twice. Two processes that miss the same weights train them once.

    Returns:
        Their folder.

    Raises:
        StudyError: what was trained again is another model than the recorded one.
    """
    folder = weights_folder(profile, spec)

    def there() -> bool:  # weights without a record are those of a run that was cut off between the two
        return distributed.agree(folder.is_dir() and record_path(profile, spec).exists())

    if there():
        return folder
    with hold_lock(profile, spec):
        if not there():
            if distributed.agree(cached(profile, spec) is not None):
                _same_as_recorded(profile, spec, run(), folder)
            else:
                _run_and_record(profile, spec, run)
    distributed.agree(True)  # the first process has written them
    return folder


def leave_behind(profile: Profile, spec: Spec, save: Callable[[Path], object] | None = None) -> None:
    """End a run: its weights stay, whole, where ``save`` writes them into a folder; its checkpoints go."""
    if save is not None and distributed.is_main():
        with whole_folder(weights_folder(profile, spec)) as folder:
            save(folder)
    shutil.rmtree(checkpoints_folder(profile, spec), ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m lib.runs``: compute the runs of a notebook, or of spec files, without a notebook."""
    from lib.plans import PLANS, make_plan

    parser = Parser(prog="python -m lib.runs", description=main.__doc__)
    parser.add_argument("what", nargs="+", help=f"plans ({', '.join(PLANS)}), or JSON files that hold one spec each")
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--data-dir", default=None, help="folder of local data sets (default: STUDY_DATA)")
    parser.add_argument("--tasks", default=None, help="comma-separated: only these tasks of the profile")
    parser.add_argument("--results", default=None, help="results folder (default: results/PROFILE)")
    parser.add_argument("--budget-minutes", type=float, default=None, help="start no further run after this time")
    parser.add_argument("--only", default=None, help="only runs whose record's name matches; * stands for anything")
    parser.add_argument("--list", action="store_true", help="print each run and whether it is cached, compute nothing")

    def run() -> None:
        options = parser.parse_args(arguments)
        budget = 0.0 if options.list else options.budget_minutes
        tasks = options.tasks.split(",") if options.tasks else None
        profile = load_profile(options.profile, data_dir=options.data_dir, results=options.results, tasks=tasks)
        plan: list[Spec] = []
        for what in options.what:
            plan += make_plan(what, profile, budget) if what in PLANS else [_read_spec(Path(what), list(PLANS))]
        if options.only:
            chosen = [spec for spec in plan if fnmatch(record_path(profile, spec).name, options.only)]
            if not chosen:
                raise StudyError(f"--only '{options.only}' matches none of {len(plan)} runs; --list prints their names")
            plan = chosen
        if options.list:
            for spec in {spec_hash(spec): spec for spec in plan}.values():
                print("cached " if record_path(profile, spec).exists() else "missing", record_path(profile, spec).name)
            return
        ensure(plan, profile, budget_minutes=budget, title=" ".join(Path(what).stem for what in options.what))

    return exit_code(run, RESUMABLE)


def _read_spec(path: Path, plans: list[str]) -> Spec:
    if not path.is_file():
        raise StudyError(f"'{path}' is neither a plan ({', '.join(plans)}) nor a file")
    try:
        return parse_spec(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise StudyError(f"spec file {path}: {first_problem(error)}") from None
    except (OSError, ValueError) as error:
        raise StudyError(f"spec file {path} cannot be read as JSON ({error})") from None


if __name__ == "__main__":
    if not distributed.is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    code = main()
    distributed.leave()
    sys.exit(code)
