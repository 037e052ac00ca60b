"""What the block Fisher costs: this study's batched recursion against the obvious loop over blocks.

Both take turns on one slice of weights, so their ratio holds; the time of a pruning step of a whole BERT is the slice's
(gradients, saliencies and update), scaled by the number of weights, which is exact for a method that handles every
block alike. Memory is the rise of a fresh process.

    python -m lib.benchmark fisher --weights 2000000 --width 50
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from lib.compressors.masked import encoder_linears
from lib.config import StudyError
from lib.environment import hardware
from lib.fisher import BlockFisher, smallest
from lib.memory import peak_memory
from lib.models import ARCHITECTURES, random_model
from lib.progress import say
from lib.training import device
from lib.training_speed import torch_threads


def add_in_a_loop(inverse: Tensor, gradient: Tensor, gradients: int) -> None:
    """The same step with a Python loop over the blocks of ``inverse`` (blocks, width, width), in place.

    Args:
        gradient: (blocks * width,).
        gradients: m.
    """
    for block, g in zip(inverse, gradient.view(len(inverse), -1), strict=True):
        product = block @ g
        block -= torch.outer(product, product) / (gradients + g @ product)


def encoder_weights(architecture: str) -> int:
    """How many weights of a published architecture are pruned: the linear maps of all its layers."""
    with torch.device("meta"):
        model = random_model(architecture)
    return sum(linear.weight.numel() for linear in encoder_linears(model))


def _seconds(function: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def one_gradient(weights: int, width: int) -> None:
    """Make a Fisher and add one gradient; what ``peak_memory`` runs in a fresh process."""
    fisher = BlockFisher(weights, width, 1024, device=device())
    fisher.add(torch.full((weights,), 1e-3, device=device()))


def fisher_cost(weights: int, width: int, gradients: int, threads: int, rounds: int, full: str = "") -> dict[str, Any]:
    """Seconds per gradient of both ways on ``weights`` weights, interleaved, and of the rest of a pruning step.

    Args:
        weights: of the slice.
        full: a published architecture whose encoder is measured whole as well, batched only; "" none.

    Returns:
        ``rows``: name, weights, per_gradient_s (median and quartiles over rounds), saliency_s, update_s;
        ``speedup`` of the batched way (median of the rounds' ratios, quartiles); ``memory_bytes`` and what d·B floats
        plus one gradient are (``floor_bytes``); BERT-base's weights (``base_weights``).

    Raises:
        StudyError: a value below 1, or a width that is above the number of weights.
    """
    for name, value in (("weights", weights), ("width", width), ("gradients", gradients), ("rounds", rounds)):
        if value < 1:
            raise StudyError(f"fisher cost: {name}: found {value}, expected 1 or more")
    if width > weights:
        raise StudyError(f"fisher cost: width {width} is above the {weights} weights; take more weights")
    weights -= weights % width  # the loop knows no incomplete block
    with torch_threads(threads):
        ours, loop = _turns(weights, width, gradients, rounds)
        rows = [_row("loop over blocks", weights, loop), _rest(_row("batched", weights, ours), weights, width)]
        if full:
            say(f"fisher cost: {full} in full")
            number = encoder_weights(full)
            whole, _ = _turns(number, width, gradients, max(1, rounds // 2), with_loop=False)
            rows.append(_rest(_row(f"batched, {full}", number, whole), number, width))
    ratios = np.percentile(np.divide(loop, ours), (25, 50, 75))
    return {
        "rows": rows, "speedup": float(ratios[1]), "speedup_q1": float(ratios[0]), "speedup_q3": float(ratios[2]),
        "memory_bytes": peak_memory(one_gradient, device().type, weights=weights, width=width),
        "floor_bytes": 4 * weights * (width + 1), "slice": weights, "width": width, "gradients": gradients,
        "base_weights": encoder_weights("bert-base-uncased"), "device": device().type,
    }  # fmt: skip


def projected_seconds(cost: Mapping[str, Any]) -> float:
    """What a whole pruning step of BERT-base takes, from a result of ``fisher_cost``: all gradients, then the rest."""
    row = next(row for row in cost["rows"] if row["name"] == "batched")
    slice_s = cost["gradients"] * row["per_gradient_s"] + row["saliency_s"] + row["update_s"]
    return float(slice_s * cost["base_weights"] / row["weights"])


def _turns(weights: int, width: int, gradients: int, rounds: int,
           with_loop: bool = True) -> tuple[list[float], list[float]]:  # fmt: skip
    """Seconds per gradient of the batched way and of the loop, in turns, after one of each that is not counted."""
    gradient = 1e-3 * torch.randn(weights, generator=torch.Generator().manual_seed(0)).to(device())
    fisher = BlockFisher(weights, width, gradients + rounds + 1, device=device())
    inverse = fisher.inverse.clone() if with_loop else fisher.inverse
    ours, loop = list[float](), list[float]()
    for _ in range(rounds + 1):
        ours.append(_seconds(fisher.add, gradient))
        if with_loop:
            loop.append(_seconds(add_in_a_loop, inverse, gradient, gradients + rounds + 1))
    return ours[1:], loop[1:]


def _row(name: str, weights: int, seconds: list[float]) -> dict[str, Any]:
    q1, median, q3 = (float(value) for value in np.percentile(seconds, (25, 50, 75)))
    return {"name": name, "weights": weights, "per_gradient_s": median, "q1_s": q1, "q3_s": q3, "n": len(seconds)}


def _rest(row: dict[str, Any], weights: int, width: int) -> dict[str, Any]:
    """Saliencies and update, which a pruning step takes once."""
    fisher = BlockFisher(weights, width, 1, device=device())
    values = torch.randn(weights, generator=torch.Generator().manual_seed(1)).to(device())
    saliency = _seconds(fisher.saliency, values)
    chosen = smallest(fisher.saliency(values), weights // 2)
    return row | {"saliency_s": saliency, "update_s": _seconds(fisher.update, values, chosen)}


def fisher_report(options: Any) -> str:
    """The printed table of ``python -m lib.benchmark fisher``.

    Args:
        options: ``weights``, ``width``, ``gradients``, ``threads``, ``rounds``, ``full``.

    Raises:
        StudyError: see ``fisher_cost``; or an unknown architecture.
    """
    if options.full and options.full not in ARCHITECTURES:
        raise StudyError(f"--full: '{options.full}' is no architecture; known: {', '.join(ARCHITECTURES)}")
    found = fisher_cost(
        options.weights, options.width, options.gradients, options.threads, options.rounds, options.full
    )
    cells = [[
        row["name"], f"{row['weights']:,}", f"{1e3 * row['per_gradient_s']:.1f}",
        f"{1e3 * row['q1_s']:.1f}–{1e3 * row['q3_s']:.1f}",
        *(f"{1e3 * row[name]:.0f}" if name in row else "–" for name in ("saliency_s", "update_s")),
    ] for row in found["rows"]]  # fmt: skip
    headers = ("recursion", "weights", "ms per gradient", "quartiles", "saliency ms", "update ms")
    return "\n".join([
        f"block Fisher of width {found['width']}, {options.threads} threads, {options.rounds} interleaved rounds, "
        f"{hardware()['gpu'] or hardware()['cpu']}",
        "", tabulate(cells, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 5)), "",
        f"batched is {found['speedup']:.1f} times faster per gradient "
        f"({found['speedup_q1']:.1f}–{found['speedup_q3']:.1f})",
        f"memory: {found['memory_bytes'] / 1e6:.0f} MB; d·B floats and one gradient are "
        f"{found['floor_bytes'] / 1e6:.0f} MB",
        f"BERT-base, {found['base_weights'] / 1e6:.1f} M weights and {found['gradients']} gradients, projected: "
        f"{projected_seconds(found) / 60:.1f} minutes with saliencies and update",
    ])  # fmt: skip
