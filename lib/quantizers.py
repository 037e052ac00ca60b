"""Uniform asymmetric quantisation, simulated (Prato, Charlaix and Rezagholizadeh 2020, arXiv:1910.10485).

    Q(x) = round((clamp(x, low, high) - low) / s) s + low,    s = (high - low) / (2^k - 1)

Its gradient is 1 where x lies in [low, high] and 0 where it is clamped (straight-through). A weight's range is its
exact minimum and maximum, per output row or over the whole matrix; an activation's is a running average of what
passes (``RunningRange``).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lib.config import StudyError

MOMENTUM = 0.9  # share that a running average keeps of what it was
LOWEST, HIGHEST = 2, 8  # bits; codes are stored in bytes


def check_bits(bits: int) -> int:
    """``bits`` if it can be stored.

    Raises:
        StudyError: too few or too many.
    """
    if not LOWEST <= bits <= HIGHEST:
        raise StudyError(f"quantization: bits: found {bits}, expected {LOWEST} to {HIGHEST}")
    return bits


def step_size(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """s = (high - low) / (2^bits - 1), of the ranges' shape; 1 where a range is a single point."""
    size = (high - low) / (2**bits - 1)
    return torch.where(size == 0, torch.ones_like(size), size)


def encode(x: Tensor, low: Tensor, size: Tensor, bits: int) -> Tensor:
    """Integer codes 0 to 2^bits - 1 as uint8; ``low`` and ``size`` broadcast against ``x``."""
    return ((x - low) / size).round().clamp(0, 2**bits - 1).to(torch.uint8)


def decode(codes: Tensor, low: Tensor, size: Tensor) -> Tensor:
    """The values that codes stand for, in the ranges' precision."""
    return codes.to(size.dtype) * size + low


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Any, high: Any, bits: int) -> Tensor:
        size: Any = step_size(low, high, bits)
        if low.dim() == 0 and x.device.type == "cpu":
            low, high, size = low.item(), high.item(), size.item()  # numbers take half the time there
        rounded = x.clamp(low, high)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(rounded == x)
        return rounded.sub_(low).div_(size).round_().mul_(size).add_(low)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.saved_tensors[0], None, None, None


def fake_quantize(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """``x`` rounded to the 2^bits values between ``low`` and ``high``, which broadcast against it."""
    return _FakeQuantize.apply(x, low, high, bits)


def weight_range(weight: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight, (rows, 1) each, or (1, 1) over all; (1,) of a vector."""
    flat = weight.detach()
    if flat.dim() == 1:
        return flat.amin(0, keepdim=True), flat.amax(0, keepdim=True)
    if per_row:
        return flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return flat.amin((0, 1), keepdim=True), flat.amax((0, 1), keepdim=True)


@dataclass
class Switch:
    """What all quantisers of a model do now; they share one.

    ``observing``: running averages move (they also do in training mode). ``quantizing``: values are rounded.
    ``frozen``: weights hold rounded values already. ``watching``: ``first_bad`` becomes the name of the first place
    that meets a number that is not finite.
    """

    observing: bool = False
    quantizing: bool = False
    frozen: bool = False
    watching: bool = False
    first_bad: str = ""


class RunningRange(nn.Module):
    """Quantises one activation over a running average of its minima and maxima (momentum 0.9).

    ``low``, ``high`` and ``seen`` (how many batches) are buffers, so that checkpoints carry them.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, switch: Switch, bits: int, name: str, from_zero: bool = False) -> None:
        """``from_zero`` holds the lower end at 0: after ReLU and softmax, where 0 is a value of its own."""
        super().__init__()
        self.switch, self.bits, self.name, self.from_zero = switch, bits, name, from_zero
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, x: Tensor, visible: Tensor | None = None) -> None:
        """Move the running average; positions where ``visible`` (broadcastable) is False are left out."""
        if visible is None:
            low, high = torch.aminmax(x)
        else:
            low, high = x.masked_fill(~visible, float("inf")).amin(), x.masked_fill(~visible, float("-inf")).amax()
        if self.from_zero:
            low = self.low
        if self.switch.watching and not self.switch.first_bad and not (torch.isfinite(low) & torch.isfinite(high)):
            self.switch.first_bad = self.name
        if self.seen == 0:
            self.low.copy_(low)
            self.high.copy_(high)
        else:
            self.low.lerp_(low, 1 - MOMENTUM)
            self.high.lerp_(high, 1 - MOMENTUM)
        self.seen += 1

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """``x`` in fp32, rounded when the switch says so.

        Raises:
            StudyError: asked to quantise before any data were seen.
        """
        x = x.float()
        if self.training or self.switch.observing:
            self.observe(x, visible)
        if not self.switch.quantizing:
            return x
        if self.seen == 0:
            raise StudyError(f"quantization: no calibration data reached {self.name}; train, or calibrate on some")
        return fake_quantize(x, self.low, self.high, self.bits)
