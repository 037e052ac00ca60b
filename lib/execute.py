"""Papermill, made strict: ``python -m lib.execute PROFILE`` executes the notebooks in order.

An unknown parameter is an error, progress shows all along, and a notebook appears under ``results/<profile>/notebooks``
only when it is whole: it is executed into a partial file beside, cleaned of machine paths and stderr, and renamed. What
fails or is interrupted is kept under a name that says so. Records are cached, so a second run is quick.

Exit codes: 0 done; 2 the user can mend it (one line says how); 1 a notebook raised; 130 interrupted.
"""

import argparse
import contextlib
import errno
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil

from lib import kernel
from lib.command_line import Parser, exit_code
from lib.config import ROOT, NothingToDo, StudyError, load_profile
from lib.files import REFUSED, cannot_write, write_atomically
from lib.gallery import write_gallery
from lib.notebook_parameters import assign, help_parameters, parse
from lib.progress import duration
from lib.settings import Profile

NOTEBOOKS = ROOT / "notebooks"
OVERVIEW = "00_start_here"  # counts what the others find, so a series ends with it as it began
INTERRUPTED = "interrupted; run the same command again to go on"


@dataclass
class Outcome:
    """What became of one notebook: ``status`` is done, left out, failed, interrupted or not run; wall-clock seconds."""

    name: str
    status: str = "not run"
    seconds: float = 0.0


class NotebookError(Exception):
    """A notebook raised something that is not the user's mistake; one or two lines saying what and where."""


def notebooks(folder: Path = NOTEBOOKS, only: Sequence[str] = ()) -> list[Path]:
    """The notebooks of ``folder`` in order; ``only`` selects by number ("05") or name.

    Raises:
        StudyError: no notebooks, or a selection that names none.
    """
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise StudyError(f"no notebooks NN_*.ipynb in {folder}; run from a complete checkout")
    for wanted in only:
        if not any(_selects(wanted, path) for path in found):
            raise StudyError(f"no notebook '{wanted}'; there is {', '.join(path.stem for path in found)}")
    return [path for path in found if not only or any(_selects(wanted, path) for wanted in only)]


def _selects(wanted: str, path: Path) -> bool:
    return Path(wanted).name.removesuffix(".ipynb") in (path.stem, path.stem[:2])


def run(path: Path, folder: Path, parameters: dict[str, Any]) -> Path:
    """Execute one notebook into ``folder``; returns where the executed copy lies.

    Raises:
        NothingToDo: the parameters leave the notebook no runs; nothing is kept of it.
        StudyError: the notebook raised one, or ``folder`` cannot be written.
        NotebookError: anything else that a cell raised, or a dead kernel.
        kernel.Interrupted: Ctrl-C or SIGTERM.
    """
    target = folder / path.name
    partial = folder / f".{path.stem}.{os.getpid()}.partial.ipynb"
    _remove_abandoned(folder)
    write_atomically(partial, path.read_bytes())  # an unwritable folder shows before a kernel starts
    ending = "failed"
    try:
        executed = kernel.execute(path, partial, parameters)
        write_atomically(target, nbformat.writes(clean(executed, path, target, parameters)) + "\n")
        ending = ""
    except kernel.Interrupted:
        ending = "interrupted"
        raise
    except papermill.PapermillExecutionError as error:
        if error.ename == NothingToDo.__name__:
            ending = ""
            raise NothingToDo(_first_line(error)) from None
        raise _explained(error, path.name, kept_as(target, ending)) from None
    except OSError as error:
        raise cannot_write(target, error) if error.errno in REFUSED else error from None
    except RuntimeError as error:
        raise NotebookError(f"{path.name}: {error}\n  kept: {_near(kept_as(target, ending))}") from None
    finally:
        with contextlib.suppress(OSError):  # the error that led here is the one to show
            for stale in ("failed", "interrupted"):
                kept_as(target, stale).unlink(missing_ok=True)
            if ending:
                partial.replace(kept_as(target, ending))
            partial.unlink(missing_ok=True)
    return target


def _remove_abandoned(folder: Path) -> None:
    """Partial notebooks of processes that were killed; those of a run beside this one stay."""
    for partial in folder.glob(".*.partial.ipynb"):
        process = partial.name.split(".")[-3]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            partial.unlink(missing_ok=True)


def kept_as(target: Path, ending: str) -> Path:
    """Where the partial copy of a notebook that did not finish is kept."""
    return target.with_name(f"{target.stem}.{ending}.ipynb")


def _first_line(error: papermill.PapermillExecutionError) -> str:
    return (str(error.evalue).strip().splitlines() or [""])[0][:400]


def _explained(error: papermill.PapermillExecutionError, name: str, kept: Path) -> Exception:
    text = _first_line(error)
    if error.ename == "StudyError":
        return StudyError(text)
    if text.startswith(f"[Errno {errno.ENOSPC}]"):
        return StudyError(f"{name}: disk full; finished records are safe, free some space and run again")
    return NotebookError(f"{name}, cell [{error.exec_count}]: {error.ename}: {text}\n  kept: {_near(kept)}")


def clean(notebook: Any, source: Path, target: Path, parameters: dict[str, Any]) -> Any:
    """An executed notebook without what would differ in the next run of the same: paths, dates, stderr, random ids."""
    output = _near(target, ROOT) if target.is_relative_to(ROOT) else target.name
    notebook.metadata.papermill.update(input_path=f"notebooks/{source.name}", output_path=output)
    for metadata in (notebook.metadata.papermill, *(cell.metadata.get("papermill", {}) for cell in notebook.cells)):
        metadata.pop("start_time", None)
        metadata.pop("end_time", None)
    secrets = {text: f"<{name}>" for name, value in parameters.items() for text in _texts_in(value) if _is_path(text)}
    secrets |= {os.environ["STUDY_DATA"]: "<STUDY_DATA>"} if _is_path(os.environ.get("STUDY_DATA")) else {}
    secrets |= {f"{ROOT}{os.sep}": "", str(ROOT): ".", sys.prefix: "<environment>", str(Path.home()): "~"}
    # longest first, since one may lie inside another; a home of "/" would take every slash
    order = sorted((text for text in secrets if len(text) > 2), key=len, reverse=True)
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"  # papermill draws a new one each time
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return _replaced(notebook, [(text, secrets[text]) for text in order])


def _texts_in(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and os.path.isabs(value)


def _replaced(node: Any, pairs: Sequence[tuple[str, str]]) -> Any:
    """``node`` with every text in it rewritten."""
    if isinstance(node, dict):
        return type(node)({key: _replaced(value, pairs) for key, value in node.items()})
    if isinstance(node, list):
        return [_replaced(value, pairs) for value in node]
    if isinstance(node, str):
        for old, new in pairs:
            node = node.replace(old, new)
    return node


def _near(path: Path, base: Path | None = None) -> str:
    """``path`` relative to ``base`` (the working directory) where it lies below, else as it is; "/" between parts."""
    base = base or Path.cwd()
    return (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()


def run_all(paths: Sequence[Path], profile: Profile, chosen: dict[Path, dict[str, Any]]) -> None:
    """Execute ``paths`` in order, the overview once more, stop at the first that fails; print what was made."""
    again = [path for path in paths if path.stem == OVERVIEW and len(paths) > 1]
    outcomes = [Outcome(path.name) for path in paths] + [Outcome(f"{path.name}, again") for path in again]
    paths = [*paths, *again]
    before = _counts(profile.results)
    try:
        for number, (path, outcome) in enumerate(zip(paths, outcomes, strict=True), 1):
            print(f"-> {outcome.name} ({number} of {len(paths)})", flush=True)
            started, outcome.status = time.monotonic(), "failed"
            try:
                run(path, profile.results / "notebooks", chosen[path])
                outcome.status = "done"
            except NothingToDo as reason:
                outcome.status = "left out"
                print(f"   {path.stem[:2]} | {reason}", flush=True)
            except (kernel.Interrupted, KeyboardInterrupt):
                outcome.status = "interrupted"
                raise
            finally:
                outcome.seconds = time.monotonic() - started
            print(f"   {path.stem[:2]} | {outcome.status} in {duration(outcome.seconds)}", flush=True)
    finally:
        print(summary(outcomes, profile.results, before), flush=True)


def _counts(results: Path) -> dict[str, int]:
    patterns = {"figures": "figures/*.pdf", "tables": "tables/*.csv", "records": "runs/*.json"}
    return {what: len(list(results.glob(pattern))) for what, pattern in patterns.items()}


def summary(outcomes: Sequence[Outcome], results: Path, before: dict[str, int]) -> str:
    """The closing table: notebooks with status and time, then what lies where and how many records are new."""
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"\n{'notebook':<{width}}  {'status':<11}  {'time':>7}"]
    lines += [f"{o.name:<{width}}  {o.status:<11}  {duration(o.seconds) if o.seconds else '-':>7}" for o in outcomes]
    for what, count in _counts(results).items():
        new = f", {count - before[what]} new" if what == "records" else ""
        lines.append(f"{count:>4} {what + new:<18} in {_near(results / ('runs' if what == 'records' else what))}/")
    return "\n".join([*lines, f"     executed notebooks in {_near(results / 'notebooks')}/"])


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m lib.execute", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("profile", nargs="?", default="quick", help="smoke, quick, study, paper or a YAML file")
    parser.add_argument("--only", nargs="+", default=[], metavar="NN", help="only these notebooks, by number or name")
    parser.add_argument(
        "-p", dest="given", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="notebook parameter"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="first compute the runs, N at once, by Snakemake")
    parser.add_argument("--gpus", default="", metavar="0,1", help="with --jobs: hand out these GPUs, one to a run")
    parser.add_argument("--notebooks", type=Path, default=NOTEBOOKS, help="folder of the notebooks")
    parser.add_argument("--list", action="store_true", help="list the notebooks and stop")
    parser.add_argument("--help-parameters", action="store_true", help="list every parameter with its meaning and stop")
    return parser


def _main(arguments: Sequence[str] | None) -> None:
    options = _parser().parse_args(arguments)
    given = [(name, value) for name, value in options.given]
    profile = load_profile(options.profile, results=dict(given).get("results"))
    named = options.profile if options.profile == profile.name else str(Path(options.profile).absolute())
    paths = notebooks(options.notebooks, options.only)
    if options.list or options.help_parameters:
        print("\n".join(path.name for path in paths) if options.list else help_parameters(paths))
        return
    chosen = assign(paths, given, named)
    if os.environ.get("STUDY_DATA"):  # kernels start in another folder
        os.environ["STUDY_DATA"] = str(Path(os.environ["STUDY_DATA"]).absolute())
    if options.jobs is not None:
        fan_out(paths, named, given, options.jobs, options.gpus)
    run_all(paths, profile, chosen)
    if any(profile.results.glob("figures/*.pdf")) or any(profile.results.glob("tables/*.csv")):
        write_gallery(profile.results, options.notebooks)


def fan_out(paths: Sequence[Path], profile: str, given: Sequence[tuple[str, str]], jobs: int, gpus: str) -> None:
    """Compute the runs that the notebooks ask for before they do, ``jobs`` at once.

    Raises:
        StudyError: a parameter that only a notebook understands, no Snakemake, or a run failed.
    """
    from lib import fanout  # here, because it imports the plans and so torch

    names = fanout.plans_of(paths)
    values = {name: parse(name, text, {"inferred_type_name": "list" if name == "tasks" else "str", "help": ""})
              for name, text in given}  # fmt: skip
    unknown = [name for name in values if name not in fanout.PROFILE_PARAMETERS]
    if unknown:
        known = ", ".join(fanout.PROFILE_PARAMETERS)
        raise StudyError(f"--jobs cannot carry parameter '{unknown[0]}' (only {known}); put it into a YAML profile")
    command = [profile, "--jobs", str(jobs), "--gpus", gpus, "--plans", ",".join(names)]
    for name, value in values.items():
        text = ",".join(value) if isinstance(value, list) else str(value)
        command += [f"--{name.replace('_', '-')}", text] if text else []
    if names:
        fanout.run(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    for noisy in ("papermill", "traitlets"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # what they report is raised as well
    try:
        return exit_code(lambda: _main(arguments), INTERRUPTED)
    except NotebookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except kernel.Interrupted as error:
        print(INTERRUPTED, file=sys.stderr)
        return 128 + error.signal


if __name__ == "__main__":
    sys.exit(main())
