"""What a model costs before any clock runs: parameters, bytes on disk, FLOPs, memory traffic."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from lib.config import StudyError
from lib.engines import safetensors_bytes
from lib.gates import head_size
from lib.models import count_parameters, layers
from lib.onnx_export import evaluation_copy
from lib.quantized_layers import is_quantized
from lib.quantized_storage import stored_bytes
from lib.surgery import layer_shapes


def size_on_disk(model: nn.Module) -> int:
    """Bytes of the model's safetensors file; zeros cost as much as other weights, shared tensors count once.

    A quantised model counts as the packed integers that it is stored as.
    """
    return stored_bytes(model) if is_quantized(model) else safetensors_bytes(model)


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """Size of a model: parameters in all and in the encoder's layers, and bytes as safetensors.

    ``shapes`` is the (heads, FFN units) of every layer, None where layers are not made of plain linear maps.
    """
    stack = layers(model)
    return {
        "layers": len(stack),
        "parameters": count_parameters(model),
        "layer_parameters": count_parameters(stack),
        "size_bytes": size_on_disk(model),
        "shapes": _heads_and_units(model),
    }


def _heads_and_units(model: PreTrainedModel) -> list[list[int]] | None:
    try:
        size = head_size(model)
        return [[shape["attention"] // size, shape["units"]] for shape in layer_shapes(model)]
    except StudyError:
        return None


def flops(model: nn.Module, batch: int, length: int) -> int:
    """Floating-point operations of one forward pass's matrix products, a multiply-add as two (embeddings: none)."""
    counted = evaluation_copy(model, "eager", torch.float32, "cpu")
    ids = torch.zeros(1, length, dtype=torch.int64)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        counted(input_ids=ids, attention_mask=torch.ones_like(ids))
    return batch * counter.get_total_flops()


class _Traffic(TorchDispatchMode):
    """Adds up what the operations of a model read and write. Views move nothing, a lookup reads only its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        made = [value for value in tree_leaves(output) if isinstance(value, torch.Tensor)]
        view = any(returned.alias_info is not None for returned in func._schema.returns)
        if view or func is torch.ops.aten._unsafe_view.default or not made:
            return output
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if func is torch.ops.aten.embedding.default:
            read = [read[1], *made]
        self.bytes += sum(value.numel() * value.element_size() for value in (*read, *made))
        return output


def memory_traffic(model: nn.Module, batch: int, length: int) -> int:
    """Bytes that one forward pass in fp32 reads and writes, every operation by itself.

    An upper bound: engines that fuse operations or find operands in a cache move less. With the FLOPs it says whether a
    model is bound by arithmetic or by memory.
    """
    counted = evaluation_copy(model, "eager", torch.float32, "meta")
    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    with torch.inference_mode(), _Traffic() as traffic:
        counted(input_ids=ids)
    return traffic.bytes
