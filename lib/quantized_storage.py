"""Quantised models as integers on disk: codes of 2 to 8 bits packed without gaps, beside their grids in fp32.

A weight is stored as ``NAME.codes`` (uint8, packed row by row), ``NAME.low`` and ``NAME.step`` (one per row, or one);
biases stay in fp32, and so do the ranges of activations, all of them in one tensor. Reading gives back the very numbers
that the model computed with, so logits are identical.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from lib.config import StudyError
from lib.problems import first_line
from lib.quantized_layers import Quantizing, is_quantized, quantize_model, quantized_weights, ranges, weights_of
from lib.quantizers import RunningRange, Switch, decode, encode

DESCRIPTION = "quantization.json"
RANGES = "study_ranges"  # (activations, 2): low and high, in the order of ``quantized_layers.ranges``
Grids = dict[str, tuple[Tensor, Tensor]]  # name of a weight -> its low and step, (rows, 1) or (1, 1) or (1,)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, uint8 of any shape, as one row of ceil(n bits / 8) bytes, most significant bit first."""
    spread = np.unpackbits(codes.detach().cpu().numpy().reshape(-1, 1), axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(spread))


def unpack(packed: Tensor, bits: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Inverse of ``pack``: uint8 codes of ``shape``.

    Raises:
        ValueError: another number of bytes.
    """
    count = int(np.prod(shape))
    expected = -(-count * bits // 8)
    if packed.numel() != expected:
        raise ValueError(f"found {packed.numel()} bytes, expected {expected} for {count} codes of {bits} bits")
    spread = np.zeros((count, 8), dtype=np.uint8)
    spread[:, 8 - bits :] = np.unpackbits(packed.detach().cpu().numpy(), count=count * bits).reshape(count, bits)
    return torch.from_numpy(np.packbits(spread)).reshape(tuple(shape))


def keep_grids(model: nn.Module, grids: Grids) -> None:
    """Remember the grids of weights that were rounded for good."""
    model.study_grids = grids  # type: ignore[assignment]


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a finished quantised model as they are stored."""
    bits = _settings(model).bits
    grids: Grids = model.study_grids  # type: ignore[assignment]
    rounded = dict(quantized_weights(model))
    apart = {*rounded, *_range_buffers(model)}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in apart}
    for name, weight in rounded.items():
        low, size = grids[name]
        state[f"{name}.codes"] = pack(encode(weight, low, size, bits), bits)
        state |= {f"{name}.low": low, f"{name}.step": size}
    if ends := [torch.stack([one.low, one.high]) for one in ranges(model)]:
        state[RANGES] = torch.stack(ends)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def load_packed_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Fill a model on which ``quantize_model`` has been called with what ``packed_state`` gave, ready to run.

    Raises:
        StudyError: a tensor is missing or does not fit.
    """
    weights = weights_of(model)
    names, plain, grids = dict(quantized_weights(model)), dict(state), Grids()
    try:
        for name, weight in names.items():
            low, size = plain.pop(f"{name}.low"), plain.pop(f"{name}.step")
            codes = unpack(plain.pop(f"{name}.codes"), weights.settings.bits, weight.shape)
            plain[name], grids[name] = decode(codes, low, size), (low, size)
        for one, (low, high) in zip(ranges(model), plain.pop(RANGES, torch.empty(0, 2)), strict=True):
            one.low.copy_(low)
            one.high.copy_(high)
            one.seen.fill_(1)
        left = set(_range_buffers(model))
        plain |= {name: tensor for name, tensor in model.state_dict().items() if name in left}
        model.load_state_dict(plain)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise StudyError(f"quantised weights do not fit {DESCRIPTION} ({reason}); save the model again") from None
    keep_grids(model, grids)
    weights.switch.frozen = weights.switch.quantizing = True


def _range_buffers(model: nn.Module) -> list[str]:
    """Names of the ranges' tensors in the model's state."""
    places = (name for name, module in model.named_modules() if isinstance(module, RunningRange))
    return [f"{place}.{buffer}" for place in places for buffer in ("low", "high", "seen")]


def save_quantized(model: nn.Module, file: Path) -> None:
    """Write a finished quantised model's tensors into ``file`` and how to read them beside it."""
    described = {"format": 1} | _settings(model).model_dump(mode="json")
    (file.parent / DESCRIPTION).write_text(json.dumps(described, indent=1), encoding="utf-8")
    safetensors.torch.save_file(packed_state(model), str(file))


def load_quantized(model: Any, file: Path) -> None:
    """Turn a dense model of the right shape, in place, into the one that ``save_quantized`` wrote.

    Raises:
        StudyError: damaged files.
    """
    try:
        described = json.loads((file.parent / DESCRIPTION).read_text(encoding="utf-8"))
        settings = Quantizing.model_validate({key: value for key, value in described.items() if key != "format"})
        state = safetensors.torch.load_file(str(file))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        reason = first_line(error)
        raise StudyError(f"{file.parent} holds a damaged quantised model ({reason}); save it again") from None
    quantize_model(model, settings, Switch())
    load_packed_state(model, state)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the file that ``save_quantized`` writes, exactly: it is serialised in memory."""
    return len(safetensors.torch.save(packed_state(model)))


def exact_bytes(model: Any, bits: int | None) -> int:
    """Bytes of a model's numbers, file headers left out: in fp32, or quantised to ``bits`` with a range per row.

    Args:
        model: dense, on any device, also ``meta``; it is changed when ``bits`` is given.
    """
    if bits is None:
        return 4 * sum(parameter.numel() for parameter in model.parameters())
    quantize_model(model, Quantizing(bits=bits), Switch())
    rounded = [weight for _, weight in quantized_weights(model)]
    plain = sum(parameter.numel() for parameter in model.parameters()) - sum(weight.numel() for weight in rounded)
    rows = sum(weight.shape[0] if weight.dim() > 1 else 1 for weight in rounded)
    codes = sum(-(-weight.numel() * bits // 8) for weight in rounded)
    return codes + 4 * plain + 8 * (rows + sum(1 for _ in ranges(model)))


def _settings(model: nn.Module) -> Quantizing:
    if not is_quantized(model) or not hasattr(model, "study_grids"):
        raise StudyError("only a finished quantised model can be stored as integers; call finalize first")
    return weights_of(model).settings
