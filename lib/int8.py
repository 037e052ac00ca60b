"""Post-training int8 versions of an exported graph, by the engines' own tools.

ONNX Runtime's quantiser succeeds without quantising anything when it finds no constant weights, which is checked here;
NNCF reports usage and draws progress bars unasked, which is switched off.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lib.config import StudyError
from lib.onnx_export import quiet


def quantize_dynamic(source: Path, target: Path, seven_bit: bool) -> None:
    """ONNX Runtime: int8 weights per output channel, activations ranged at run time; embeddings stay in fp32.

    Args:
        seven_bit: leave a bit of the weights unused, for CPUs whose 8-bit products saturate.

    Raises:
        StudyError: nothing was quantised.
    """
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    graph = onnx.load(source)
    # Gemm weights are transposed on the way, and a shape noted before that would contradict them.
    del graph.graph.value_info[:]
    with quiet():
        quantize(
            graph,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=seven_bit,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    operators = {node.op_type for node in onnx.load(target, load_external_data=False).graph.node}
    if "MatMulInteger" not in operators:
        raise StudyError("onnxruntime-int8: the quantiser found no weights in the graph; use onnxruntime-fp32 instead")


def quantize_static(source: Path, target: Path, batches: list[dict[str, np.ndarray]]) -> None:
    """NNCF: int8 weights and activations, ranges from ``batches``; writes OpenVINO's .xml and .bin."""
    # NNCF reports usage over the network unless this is set before it is imported.
    os.environ.setdefault("NNCF_CI", "1")
    import nncf
    import openvino

    with quiet():
        quantized = nncf.quantize(
            openvino.Core().read_model(source),
            nncf.Dataset(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
        )
        openvino.save_model(quantized, target, compress_to_fp16=False)


def quantize_operators(source: Path, target: Path, batches: list[dict[str, np.ndarray]]) -> None:
    """ONNX Runtime, static: int8 weights, uint8 activations with ranges from ``batches``, as integer operators.

    DeepSparse runs QLinearMatMul sparse; with the same numbers between QuantizeLinear and DequantizeLinear it would
    multiply in fp32.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    class Batches(CalibrationDataReader):
        rows = iter(batches)

        def get_next(self) -> Any:
            return next(self.rows, None)

    graph = onnx.load(source)
    del graph.graph.value_info[:]  # as in quantize_dynamic
    with quiet():
        quantize(
            graph, target, Batches(), quant_format=QuantFormat.QOperator, op_types_to_quantize=["MatMul", "Gemm"],
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True},
        )  # fmt: skip


def data_digest(batches: list[dict[str, np.ndarray]]) -> str:
    """12 hex digits over calibration batches."""
    digest = hashlib.blake2b(digest_size=6)
    for batch in batches:
        for array in batch.values():
            digest.update(repr(array.shape).encode() + array.tobytes())
    return digest.hexdigest()


def as_array(value: Any) -> np.ndarray:
    """A tensor or array as the contiguous int64 array that the engines take."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    return np.ascontiguousarray(array, dtype=np.int64)
