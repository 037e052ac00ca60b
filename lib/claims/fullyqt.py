"""Verdicts on FullyQT (Prato et al. 2020). All its published numbers are second-hand here, and say so."""

import pandas as pd

from lib.analysis.fullyqt import PROCEDURES, everything, guard_frame, published_retained
from lib.claims import NOT_CLAIMED, NOT_RUN, as_small, kept_by_task, leads, seeds_of, verdict, weighed
from lib.published import published
from lib.quantized_storage import exact_bytes
from lib.translation import TranslationConfig, TranslationModel

LOSSLESS = 1.0  # points of retained share; the paper's BLEU varies by up to 2 % from seed to seed
COLLAPSED = 90.0  # percent retained; below this a translation model is of little use
SECOND_HAND = "published: second-hand"


def verdicts(frame: pd.DataFrame, qa: pd.DataFrame, scratch_delay: float) -> pd.DataFrame:
    """One row per claim.

    Args:
        frame: ``analysis.fullyqt.quantized_frame``, the translation tasks' rows; may be empty.
        qa: the same of question answering, of which the paper says nothing; may be empty.
        scratch_delay: the delay that training with rounding from the start is judged by.
    """
    whole, bert = everything(frame, scratch_delay), everything(qa, scratch_delay)
    rows = [
        _size(8),
        _lossless("8 bits, trained quantised, are as good as full precision", whole, 8, "scratch"),
        _lossless("8 bits, trained on quantised, are as good as full precision", whole, 8, "aware"),
        _lossless("8 bits, rounded after training, are as good as full precision", whole, 8, "post"),
        _lossless("6 bits, trained on quantised, are as good as full precision", whole, 6, "aware"),
        _lossless("6 bits, trained quantised, are as good as full precision", whole, 6, "scratch"),
        _gains_from_training(whole, 6),
        _collapses(whole, 4),
        _diverges(frame, "denominator from zero"),
        _diverges(frame, "masked scores counted", NOT_CLAIMED),
        _diverges(frame, "neither guard", NOT_CLAIMED),
        _lossless(f"8 bits, rounded after training, are as good on BERT {NOT_CLAIMED}", bert, 8, "post"),
        _lossless(f"8 bits, trained on quantised, are as good on BERT {NOT_CLAIMED}", bert, 8, "aware"),
    ]
    return pd.DataFrame(rows)


def transformer_base_bytes(bits: int | None) -> int:
    """Bytes of the published shape, Transformer base with 37,000 tokens, in fp32 or quantised, without file headers."""
    import torch

    with torch.device("meta"):
        model = TranslationModel(TranslationConfig(
            vocab_size=37_000, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048,
        ))  # fmt: skip
    return exact_bytes(model, bits)


def _size(bits: int) -> dict[str, str]:
    printed = published("prato2020", metric="compression", bits=bits)["value"].item()
    ours = transformer_base_bytes(None) / transformer_base_bytes(bits)
    return verdict(
        f"{bits} bits are {printed:.2f} × smaller", "size", f"{printed:.2f} ×", f"{ours:.2f} ×",
        as_small(1 / ours, 1 / printed),
        f"exact count: Transformer base, 37,000 tokens, a range per row, biases in fp32; {SECOND_HAND}",
    )  # fmt: skip


def _printed(bits: int, kind: str) -> str:
    """Published retained share of WMT14 En-De; training with rounding is one procedure there."""
    rows = published_retained()
    known = "post" if kind == "post" else "aware"
    found = rows[(rows["task"] == "wmt14") & (rows["bits"] == bits) & (rows["procedure"] == known)]
    return f"{found['retained'].item():.1f} %" if len(found) else "none"


def _lossless(claim: str, whole: pd.DataFrame, bits: int, kind: str) -> dict[str, str]:
    rows = whole[(whole["procedure"] == kind) & (whole["bits"] == bits)].dropna(subset=["retained"])
    printed = "none" if claim.endswith(NOT_CLAIMED) else _printed(bits, kind)
    source = "" if claim.endswith(NOT_CLAIMED) else f"; {SECOND_HAND}"
    if rows.empty:
        return verdict(claim, "quality", printed, NOT_RUN, None, "")
    shown, means = kept_by_task(rows)
    evidence = f"retained score, at least {100 - LOSSLESS:.0f} %{_against_control(rows)}{source}"
    holds = weighed(rows, means >= 100 - LOSSLESS)
    return verdict(claim, "quality", printed, shown, holds, evidence, seeds_of(rows))


def _against_control(rows: pd.DataFrame) -> str:
    """For models that were trained on: their shares of the dense model trained on as long, per task."""
    if set(rows["procedure"]) != {"aware"} or rows["controlled"].isna().all():
        return ""
    shares = rows.dropna(subset=["controlled"]).groupby("title", sort=False)["controlled"].mean()
    each = ", ".join(f"{shares[title]:.1f} % on {title}" for title in shares.index)
    return f"; of the dense model trained on as long: {each}"


def _gains_from_training(whole: pd.DataFrame, bits: int) -> dict[str, str]:
    claim = f"{bits} bits want training with rounding: rounding afterwards loses more"
    table = published_retained()
    printed = table[(table["task"] == "wmt14") & (table["bits"] == bits)].set_index("procedure")["retained"]
    theirs = f"{printed['aware'] - printed['post']:+.1f} points"
    rows = whole[whole["bits"] == bits]
    pairs = rows.pivot_table(index=["task", "seed"], columns="procedure", values="retained")
    if not {"aware", "post"} <= set(pairs) or pairs[["aware", "post"]].dropna().empty:
        return verdict(claim, "quality", theirs, NOT_RUN, None, "")
    pairs = pairs[["aware", "post"]].dropna()
    evidence = f"retained BLEU, trained on minus rounded afterwards, {len(pairs)} pairs of task and seed; {SECOND_HAND}"
    return leads(claim, theirs, (pairs["aware"] - pairs["post"]).rename("gain").reset_index(), evidence)


def _collapses(whole: pd.DataFrame, bits: int) -> dict[str, str]:
    claim = f"{bits} bits collapse"
    rows = whole[whole["bits"] == bits].dropna(subset=["retained"])
    if rows.empty:
        return verdict(claim, "quality", _printed(bits, "aware"), NOT_RUN, None, "")
    means = rows.groupby(["title", "procedure"])["retained"].mean().reset_index().sort_values("retained")
    best = means.groupby("title", sort=False).last()
    chosen = [rows[(rows["title"] == title) & (rows["procedure"] == row.procedure)] for title, row in best.iterrows()]
    at_best = pd.concat(chosen)
    shown, means_of_best = kept_by_task(at_best)
    ways = ", ".join(PROCEDURES[name] for name in best["procedure"].unique())
    evidence = f"retained BLEU of the best way ({ways}); collapse: under {COLLAPSED:.0f} %; {SECOND_HAND}"
    ends = at_best.groupby("title")["retained"].agg(["min", "max"]).reindex(means_of_best.index)
    open_ = (ends["min"] < COLLAPSED) & (ends["max"] >= COLLAPSED)
    answers = zip(weighed(at_best, means_of_best < COLLAPSED), open_, strict=True)
    holds = [None if undecided else answer for answer, undecided in answers]
    row = verdict(claim, "quality", _printed(bits, "aware"), shown, holds, evidence, seeds_of(rows))
    if open_.any() and all(answer is None for answer in holds):
        row["verdict"] = "cannot tell: the range over seeds holds the bound"
    return row


def _diverges(frame: pd.DataFrame, guards: str, claimed: str = "") -> dict[str, str]:
    """``claimed`` is ``NOT_CLAIMED`` where the paper does not name this mistake as the cause."""
    claim = f"Quantising everything naively diverges ({guards}) {claimed}".rstrip()
    rows = frame[(frame["guards"] == guards) & (frame["procedure"] == "naive")]
    if rows.empty:
        return verdict(claim, "quality", "it diverges", NOT_RUN, None, "")
    bad = rows[rows["diverged"] != ""]
    places = {place.rpartition(", ")[2] for place in bad["diverged"]}
    ours = f"{len(bad)} of {len(rows)} runs"
    found = f"first not finite: {', '.join(sorted(places))}" if len(bad) else "all values stayed finite"
    bits = ", ".join(str(width) for width in sorted(rows["bits"].unique(), reverse=True))
    evidence = f"{found}; trained with rounding, {bits} bits; {SECOND_HAND}"
    holds: bool | None = len(bad) == len(rows)
    measured = guard_frame(frame[frame["task"].isin(rows["task"])]).dropna(subset=["spread"])
    if guards == "denominator from zero" and bad.empty and len(measured):
        most, least = measured["spread"].max(), measured["vanishes"].min()
        holds = None if most < least else holds
        evidence += f"; a variance vanishes where denominators differ {least:.1f} times, the finished models' "
        evidence += f"differ {most:.1f} times at most on {', '.join(rows['title'].unique())}"
    return verdict(claim, "quality", "it diverges", ours, holds, evidence, seeds_of(rows))
