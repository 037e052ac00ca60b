"""Batches apart from the trainer's own: to evaluate, to calibrate, and for a compressor that looks at gradients.

Drawing training examples disturbs nothing: the order depends on the run's seed and on the draw alone, so a resumed run
sees the same batches, and so does a run that does not train at all.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import BatchEncoding

from lib.config import StudyError

LABELS = ("labels", "start_positions", "end_positions")
Collate = Callable[[list[dict[str, Any]]], Any]


def in_batches(rows: Dataset, collate: Collate, size: int, device: torch.device | str = "cpu",
               order: Sequence[int] | None = None) -> Iterator[tuple[Sequence[int], dict[str, Tensor]]]:  # fmt: skip
    """``rows``, ``size`` at a time, each batch with the indices of its rows; the last one may be smaller.

    Args:
        rows: the model's inputs, not padded.
        collate: pads a list of rows.
        order: of the indices; as they come when None.
    """
    order = range(len(rows)) if order is None else order
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, dict(BatchEncoding(collate([rows[index] for index in chosen])).to(device))


class TrainingData:
    """A run's training features, tokenised when first asked for."""

    def __init__(
        self,
        features: Callable[[], Dataset],
        collate: Collate,
        names: list[str],
        seed: int,
        device: torch.device,
        bf16: bool,
    ) -> None:
        """``names``: the model's inputs; labels are added where the features have them."""
        self._features, self._collate, self._names = features, collate, names
        self.seed, self.device, self.bf16 = seed, device, bf16

    def __len__(self) -> int:
        return len(self._features())

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that the run trains in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def batches(self, size: int, count: int, draw: int = 0) -> Iterator[dict[str, Tensor]]:
        """``count`` batches of ``size`` different examples, with labels, on the run's device.

        Args:
            draw: another number gives another order.

        Raises:
            StudyError: there are not that many examples.
        """
        features = self._features()
        if size * count > len(features):
            raise StudyError(
                f"pruning asks for {count} gradients of {size} examples each, but there are {len(features)} training "
                f"examples, enough for {len(features) // size}; lower gradients or gradient_batch"
            )
        names = [name for name in (*self._names, *LABELS) if name in features.column_names]
        rows = features.select_columns(names)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draw)
        order = torch.randperm(len(rows), generator=generator)[: size * count].tolist()
        yield from (batch for _, batch in in_batches(rows, self._collate, size, self.device, order))
