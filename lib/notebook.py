"""What every notebook does at its beginning and end: read the profile, show figures and tables, state provenance."""

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure

from lib import claims, environment
from lib.config import NothingToDo, StudyError, load_profile
from lib.figures import save_figure
from lib.plans.common import has_data
from lib.records import Record
from lib.settings import Profile
from lib.specs import Spec
from lib.tables import Formats, save_table, show
from lib.training import device, use_bf16


def start(profile: str, **overrides: Any) -> Profile:
    """Read the profile, make the CPU fast, and say in one paragraph what this notebook will run on.

    Raises:
        StudyError: unknown profile or setting.
    """
    environment.use_fast_allocator()
    study = load_profile(profile, **overrides)
    machine = environment.hardware()
    where = machine.get("gpu") or machine["cpu"]
    source = f"{study.data} data" if study.data != "local" else "data from a local folder"
    if not all(has_data(study, task) for task in study.tasks):
        others = "of tasks that are not your own, " if study.own_tasks else ""
        source += f" (not given: {others}only finished records can be shown)"
    text(
        f"Profile **{study.name}**: encoder `{study.encoder}`, {source}, tasks {', '.join(study.tasks)}. "
        f"This copy was executed on {where}; what it had to train was trained there ({device().type}, "
        f"{torch.get_num_threads()} threads, {'bf16 autocast' if use_bf16(study.training.precision) else 'fp32'}). "
        "Records tell their own machine and precision: provenance, at the end."
    )
    return study


def limits(study: Profile, refresh: bool, budget_minutes: float, tasks: Iterable[str] = ()) -> dict[str, Any]:
    """What ``runs.ensure`` may do: arguments ``refresh`` and ``budget_minutes`` (negative means no limit).

    Where a chosen task lacks its local data, nothing can be computed and finished records are shown. A user's own files
    need no folder.

    Args:
        tasks: those that the notebook is about, where they are not all of the profile's.
    """
    if not all(has_data(study, task) for task in tuple(tasks) or study.tasks):
        return {"refresh": False, "budget_minutes": 0.0}
    return {"refresh": refresh, "budget_minutes": None if budget_minutes < 0 else budget_minutes}


def needed(plan: list[Spec], what: str, tasks: Iterable[str]) -> list[Spec]:
    """``plan``, where there is one.

    Raises:
        NothingToDo: the chosen tasks leave it without runs.
    """
    if not plan:
        raise NothingToDo(f"this notebook is about {what}, and none of the tasks is: {', '.join(tasks)}")
    return plan


def text(markdown: str) -> None:
    """Show Markdown rendered from records: the only way a result gets into prose."""
    display(Markdown(markdown))


def verdicts(rows: pd.DataFrame, name: str, study: Profile) -> None:
    """Show how claims are judged, then the table of verdicts on one paper's."""
    text(claims.RULES)
    table(rows, name, f"The paper's claims, checked under the profile {study.name}.", study)


def source(*objects: Callable[..., Any] | type) -> None:
    """Show the real source of functions and classes of the library."""
    for item in objects:
        text(f"```python\n{inspect.getsource(item).rstrip()}\n```")


def figure(fig: Figure, name: str, rows: pd.DataFrame, caption: str, study: Profile) -> None:
    """Save a figure (PDF, SVG, PNG, CSV, caption) under ``results/<profile>/figures`` and show it with its caption."""
    paths = save_figure(fig, name, rows, caption, study.results / "figures")
    display(Image(data=Path(paths["png"]).read_bytes(), width=round(fig.get_figwidth() * 130)))
    text(f"*{caption}*")


def attempt(
    draw: Callable[[pd.DataFrame], tuple[Figure, pd.DataFrame]], rows: pd.DataFrame, name: str,
    caption: Callable[[pd.DataFrame], str], study: Profile,
) -> None:  # fmt: skip
    """Draw a figure of ``rows``, and save and show it with a caption of what was drawn; or say what is missing."""
    try:
        fig, drawn = draw(rows)
    except (StudyError, KeyError) as missing:
        text(f"Not drawn: {missing}")
    else:
        figure(fig, name, drawn, caption(drawn), study)


def table(frame: pd.DataFrame, name: str, caption: str, study: Profile, formats: Formats | None = None) -> None:
    """Save a table (CSV, Markdown, LaTeX) under ``results/<profile>/tables`` and show it with its caption."""
    save_table(frame, name, caption, study.results / "tables", formats)
    display(show(frame, caption, formats))


def provenance(study: Profile, records: Iterable[Record]) -> None:
    """Which records were used: how many, made when, by which code, on which hardware, with which packages."""
    used = list({record.hash: record for record in records}.values())
    if not used:
        text("No record was used.")
        return
    versions = {f"{name} {version}" for record in used for name, version in record.packages.items()}
    trained = [r["training"] for r in used if "training" in r.result]
    precisions = pd.Series([training.get("precision", "not noted") for training in trained], dtype=str)
    shown = ("torch", "transformers", "datasets", "onnxruntime", "openvino")
    rows = {
        "records": f"{len(used)} in `results/{study.results.name}/runs`",
        "made": " to ".join(sorted({min(r.created for r in used)[:10], max(r.created for r in used)[:10]})),
        "hardware": "; ".join(sorted({r.machine for r in used})),
        "trained in": ", ".join(f"{name} ({count})" for name, count in precisions.value_counts().items()) or "nothing",
        "compute": f"{sum(r.seconds for r in used) / 60:.0f} minutes in all",
        "commits": ", ".join(sorted({(r.commit or "none")[:10] for r in used})),
        "data digests": ", ".join(sorted({r.data for r in used if r.data})) or "none",
        "packages": ", ".join(sorted(v for v in versions if v.split()[0] in shown)),
    }
    display(show(pd.DataFrame(rows.items(), columns=["what", "value"])))
