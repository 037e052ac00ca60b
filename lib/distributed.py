"""One run on several processes, one GPU each: ``torchrun --nproc-per-node 4 -m lib.runs SPEC.json --profile study``.

Every process trains on its share of each batch of ``batch_size`` examples and evaluates everything; gradients are
averaged, so the result is that of one process up to rounding. The first process alone takes the run's lock, decides
what is cached, writes and speaks. Without torchrun there is one process, and every function here returns at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lib.config import StudyError

if TYPE_CHECKING:
    from torch import Tensor  # imported where it is used: every command line reads this module before it needs torch


def processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def join() -> None:
    """Meet the other processes: sets this process's GPU, or gloo on a CPU. Once is enough."""
    if processes() == 1:
        return
    import torch

    if not torch.distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def leave() -> None:
    """Part from the other processes at the end of the command."""
    if processes() == 1:
        return
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def agree(answer: bool) -> bool:
    """The first process's ``answer`` in all of them; waits until every process has asked."""
    if processes() == 1:
        return answer
    join()
    flag = _summed([float(answer and is_main())])
    return bool(flag.item())


def share_of(batch_size: int) -> int:
    """Examples of each batch that one process takes.

    Raises:
        StudyError: they cannot be shared out evenly.
    """
    if batch_size % processes():
        raise StudyError(f"batch_size {batch_size} cannot be shared by {processes()} processes; start a divisor of it")
    return batch_size // processes()


def check_equal(parameters: Iterable[Tensor], what: str) -> None:
    """Make sure that every process ended with the same weights.

    Raises:
        StudyError: they differ, because something that ``what`` trains was not averaged.
    """
    if processes() == 1:
        return
    import torch

    own = torch.tensor([float(p.detach().double().abs().sum()) for p in parameters], dtype=torch.float64)
    mean = _summed(own.tolist()).cpu() / processes()
    worst = float(((own - mean).abs() / mean.clamp(min=1e-12)).max()) if len(own) else 0.0
    if agree_any(worst > 1e-6):
        raise StudyError(f"{what}: the processes ended with different weights; train this one in a single process")


def agree_any(answer: bool) -> bool:
    """Whether any process answers yes."""
    return bool(_summed([float(answer)]).item()) if processes() > 1 else answer


def description() -> dict[str, Any]:
    """What a record's ``hardware`` says besides: nothing for a single process."""
    return {"processes": processes()} if processes() > 1 else {}


def _summed(values: list[float]) -> Tensor:
    import torch

    join()
    where = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=where)
    torch.distributed.all_reduce(total)
    return total
