"""A linear map as an 8-bit engine computes it, in floating point: fake quantisation of its input and its weight.

Weights: symmetric, one scale per row, -127 to 127, so that a zero stays exactly zero. Inputs: asymmetric, 0 to 255, one
range per tensor, a running average of the batches' extremes while training. The gradient goes straight through inside
the range and is zero outside of it (Jacob et al. 2018, section 3; ``torch.fake_quantize_*``).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.sparse_storage import int8_scale

AVERAGING = 0.99  # share of the old range that a batch leaves in place


def round_to_int8(weight: Tensor) -> Tensor:
    """The nearest values on each row's symmetric 8-bit grid."""
    scale = int8_scale(weight)
    return (weight / scale).round() * scale


class Int8Linear(nn.Linear):
    """Takes over the weight and bias of a linear map; ``low`` and ``high`` are the input's range, and buffers."""

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros((), device=linear.weight.device))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool, device=linear.weight.device))
        self.train(linear.training)

    @torch.no_grad()
    def _observe(self, states: Tensor) -> None:
        low, high = states.amin().float().clamp(max=0), states.amax().float().clamp(min=0)  # zero is always on the grid
        share = torch.where(self.seen, AVERAGING, 0.0)
        self.low.copy_(share * self.low + (1 - share) * low)
        self.high.copy_(share * self.high + (1 - share) * high)
        self.seen.fill_(True)

    def forward(self, states: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features). In eval mode in fp32, which holds every 8-bit value exactly."""
        if self.training:
            self._observe(states)
        device = states.device.type
        with torch.autocast(device, enabled=self.training and torch.is_autocast_enabled(device)):
            scale = ((self.high - self.low) / 255).clamp(min=1e-8)
            zero_point = (-self.low / scale).round().clamp(0, 255).to(torch.int32)
            rounded = torch.fake_quantize_per_tensor_affine(states.float(), scale, zero_point, 0, 255)
            zeros = torch.zeros(self.out_features, dtype=torch.int32, device=states.device)
            rows = int8_scale(self.weight).squeeze(1)
            weight = torch.fake_quantize_per_channel_affine(self.weight, rows, zeros, 0, -127, 127)
            return F.linear(rounded, weight, self.bias)


def put_int8_linears(model: nn.Module, wanted: list[nn.Linear]) -> list[Int8Linear]:
    """Put an ``Int8Linear`` in the place of each of ``wanted``, in place; returns them in their order."""
    made = {id(linear): Int8Linear(linear) for linear in wanted}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in made:
                setattr(parent, name, made[id(child)])
    return [made[id(linear)] for linear in wanted]
