"""Dropout that costs little on a CPU: a byte of randomness decides on each element, instead of a number in [0, 1).

Drawing those numbers is most of what PyTorch's dropout takes there. With a byte the rate is a multiple of 1/256 (0.1
becomes 26/256), and what stays is divided by exactly the share that stays, so the expectation is unchanged.
"""

from typing import Any

import torch
from torch import Tensor, nn

LEVELS = 256


class _ByteDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, dropped: int) -> Tensor:
        words = torch.empty((states.numel() + 3) // 4, dtype=torch.int32).random_(-(2**31), 2**31)
        kept = words.view(torch.uint8)[: states.numel()].view(states.shape) >= dropped
        mask = kept.to(states.dtype).mul_(LEVELS / (LEVELS - dropped))
        ctx.save_for_backward(mask)
        return states * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradients[0] * mask, None


class ByteDropout(nn.Dropout):
    """As ``torch.nn.Dropout``, with its rate rounded to 1/256 on a CPU; elsewhere it is PyTorch's."""

    def forward(self, states: Tensor) -> Tensor:
        """``states`` of any shape -> the same shape."""
        dropped = round(self.p * LEVELS)
        if not self.training or not 0 < dropped < LEVELS or states.device.type != "cpu":
            return super().forward(states)
        return _ByteDropout.apply(states, dropped)


def use_byte_dropout(model: nn.Module) -> None:
    """Turn every ``torch.nn.Dropout`` of a model into a ``ByteDropout``, in place."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = ByteDropout
