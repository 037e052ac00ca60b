"""Where the runs of notebook 03 differ from the paper's, and what failed, from the profile and the records."""

import pandas as pd

from lib.data import TASKS
from lib.plans.obert import prunes_upstream
from lib.settings import Profile


def deviations(profile: Profile, quality: pd.DataFrame, speed: pd.DataFrame) -> list[str]:
    """Where the runs differ from the paper's in what a profile sets or records say, a sentence or two each.

    Args:
        quality: ``analysis.obert.obert_frame``; may be empty.
        speed: ``analysis.obert.speed_frame``; may be empty.
    """
    own = profile.obert
    others = "".join(f", {TASKS[task].title} {batch}" for task, batch in own.gradient_batches.items())
    lines = [
        f"The long schedule has {own.prunings} prunings (the paper: 7), the first to {100 * own.first_step:.0f} % "
        f"(70 %, and 30 % for models with fewer layers), at a learning rate of {own.learning_rate:.0e} (8e-05).",
        f"The Fisher takes {own.gradients} gradients (1,024) and blocks of {own.widths[0]}, for runs of four "
        f"{own.widths[1]} (50 and 32); a gradient is the mean over {own.gradient_batch} examples{others} (8 on SQuAD, "
        "16 on GLUE).",
    ]
    if prunes_upstream(profile):
        lines.append(
            f"The language model is pruned over {own.upstream_prune_epochs:g} epochs at the moments of the long "
            "schedule; the authors' recipe takes 3 epochs and prunes every quarter of one."
        )
    if failed := movement_sentence(quality):
        lines.append(
            f"{failed} A score of a single weight is a noisy sum over the steps of training, of which the original has "
            "far more, and the student has to learn the task while its weights go; which of it is the reason was "
            "not tried."
        )
    if len(speed) and (units := units_sentence(speed)):
        lines.append(f"Speed is that of the machines which the tables name. {units}")
    return lines


def units_sentence(speed: pd.DataFrame) -> str:
    """Whether the timed processors multiply bf16 and INT8 in matrix units (AMX); "" where no record says.

    Args:
        speed: ``analysis.obert.speed_frame``.
    """
    texts, measured = [], speed["isa"].str.contains("amx").any()
    for cpu, runs in speed.groupby("cpu", sort=False)["isa"]:
        flags = dict.fromkeys(" ".join(runs).split())
        matrix = [flag for flag in flags if flag.startswith("amx")]
        vector = [flag for flag in flags if "bf16" in flag or "vnni" in flag]
        numbers = "bf16 and INT8" if any("bf16" in flag for flag in vector) else "INT8 alone"
        if matrix:
            texts.append(f"{cpu} has matrix units for bf16 and INT8 ({', '.join(matrix)}).")
        elif vector:
            texts.append(
                f"{cpu} has vector instructions for {numbers} ({', '.join(vector)}) and no matrix units (AMX)"
                + ("." if measured else ": a dense model on those was not measured in this comparison.")
            )
    return " ".join(texts)


def movement_sentence(quality: pd.DataFrame) -> str:
    """How many runs of movement pruning give one answer for all, by task; "" without such runs.

    Args:
        quality: ``analysis.obert.obert_frame``; may be empty.
    """
    runs = quality[quality["method"] == "movement"] if len(quality) else quality
    if runs.empty or not runs["constant"].any():
        return ""
    counts = runs.groupby("title", sort=False)["constant"].agg(["sum", "size"])
    counts, others = counts[counts["sum"] > 0], runs.loc[~runs["constant"].astype(bool), "retained"].dropna()
    failed = ", ".join(f"{row.sum} of {row.size} runs on {row.Index}" for row in counts.itertuples(name="Counts"))
    kept = f" The best of the others keeps {others.max():.0f} %." if len(others) else ""
    return f"Movement pruning failed here: {failed} give one answer for all.{kept}"
