"""How many bytes a sparse model takes on disk, in encodings that are really written (and read back by the tests).

- *bitmask*: one bit per weight (or per run of four) says whether it lives; the living values follow.
- *CSR*: values, 16-bit column numbers, 32-bit row starts.

Everything else of the model (embeddings, biases, norms, head) is stored as it is. Values are fp32, or int8 with one
fp32 scale per row, which is lossless for weights that lie on such a grid (``int8_scale``). ``gzip`` beside them is the
paper's own measure: its sizes are those of gzipped files.
"""

import gzip
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from lib.config import StudyError

MAGIC = b"SPARSE1"
HEADER = struct.Struct("<7sBBII")  # magic, run length, bytes per value, rows, columns


def int8_scale(weight: Tensor) -> Tensor:
    """Scale of each row's symmetric 8-bit grid, (rows, 1): largest absolute value / 127; 1 for a row of zeros."""
    largest = weight.detach().abs().amax(1, keepdim=True)
    return torch.where(largest > 0, largest / 127, 1.0)


def encode_bitmask(weight: Tensor, group: int = 1, int8: bool = False) -> bytes:
    """A matrix as bitmask and living values; ``group`` weights of a row share a bit.

    Raises:
        StudyError: ``group`` does not divide a row.
    """
    if weight.dim() != 2 or weight.shape[1] % group:
        raise StudyError(f"sparse storage: groups of {group} do not divide rows of {weight.shape[-1]} weights")
    dense = weight.detach().cpu().to(torch.float32)
    runs = dense.reshape(-1, group)
    alive = (runs != 0).any(1)
    values, scales = _values(dense, int8)
    kept = values.reshape(-1, group)[alive].numpy().tobytes()
    header = HEADER.pack(MAGIC, group, 1 if int8 else 4, *dense.shape)
    return header + scales + np.packbits(alive.numpy()).tobytes() + kept


def encode_csr(weight: Tensor, int8: bool = False) -> bytes:
    """A matrix as compressed sparse rows, of single weights.

    Raises:
        StudyError: more columns than 16 bits can number.
    """
    dense = weight.detach().cpu().to(torch.float32)
    if dense.shape[1] > 1 << 16:
        raise StudyError(f"sparse storage: {dense.shape[1]} columns, 16 bits number at most {1 << 16}")
    alive = dense != 0
    values, scales = _values(dense, int8)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), alive.sum(1).cumsum(0)]).to(torch.int32)
    columns = alive.nonzero()[:, 1].numpy().astype(np.uint16)
    header = HEADER.pack(MAGIC, 0, 1 if int8 else 4, *dense.shape)
    return header + scales + starts.numpy().tobytes() + columns.tobytes() + values[alive].numpy().tobytes()


def _values(dense: Tensor, int8: bool) -> tuple[Tensor, bytes]:
    """Values as they are stored, and the rows' scales."""
    if not int8:
        return dense, b""
    scale = int8_scale(dense)
    return (dense / scale).round().to(torch.int8), scale.numpy().tobytes()


def storage(model: nn.Module, pruned: Sequence[nn.Linear], int8: Sequence[nn.Module] = ()) -> dict[str, int]:
    """Bytes of a whole model in each encoding.

    Args:
        pruned: linear maps whose weights are encoded; the smaller of single weights and runs of four is taken.
        int8: modules whose ``weight`` lies on an 8-bit grid per row and is stored so (an embedding, stored densely,
            may be among them).

    Returns:
        ``dense`` (safetensors, or 8-bit values and scales for ``int8``), ``bitmask``, ``csr``, and ``gzip`` of the
        dense bytes.
    """
    eight_bit, matrices = {id(module.weight) for module in int8}, {id(linear.weight) for linear in pruned}
    rest: dict[str, Tensor] = {}
    sizes = {"dense": 0, "bitmask": 0, "csr": 0}
    dense_bytes: list[bytes] = []
    unique = {id(tensor): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}  # tied ones once
    for name, tensor in unique.values():
        if id(tensor) not in matrices and id(tensor) not in eight_bit:
            rest[name] = tensor.detach().cpu().contiguous()
            continue
        narrow = id(tensor) in eight_bit
        values, scales = _values(tensor.detach().cpu().to(torch.float32), narrow)
        dense_bytes.append(scales + values.numpy().tobytes())
        sizes["dense"] += len(dense_bytes[-1])
        if id(tensor) in matrices:
            groups = [group for group in (1, 4) if tensor.shape[1] % group == 0]
            sizes["bitmask"] += min(len(encode_bitmask(tensor, group, narrow)) for group in groups)
            sizes["csr"] += len(encode_csr(tensor, narrow))
        else:
            sizes["bitmask"] += len(dense_bytes[-1])
            sizes["csr"] += len(dense_bytes[-1])
    others = safetensors.torch.save(rest)
    sizes = {name: size + len(others) for name, size in sizes.items()}
    return sizes | {"gzip": len(gzip.compress(others + b"".join(dense_bytes), 6, mtime=0))}


def smallest(sizes: Mapping[str, int]) -> tuple[str, int]:
    """Of ``storage``'s encodings the smallest that can be loaded as it is (no gzip), and its bytes."""
    return min(((name, sizes[name]) for name in ("bitmask", "csr", "dense")), key=lambda encoded: encoded[1])
