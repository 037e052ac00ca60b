"""Inference engines behind one call: ``prepare(engine, model, ...)`` gives something that maps a batch to logits.

The papers' speed-ups depend on the engine as much as on the model: a sparse model that is 10 times faster than dense
fp32 on one engine may lose to a dense bf16 model on another. So each engine gets the same model, the same threads and
the same batch, runs end to end from NumPy arrays to NumPy logits, and is compared with PyTorch fp32 before it is timed
(``lib.agreement.check_agreement``).

To add an engine: write a ``_prepare_<name>`` function like the ones below and list it in ``_TABLE``.
"""

import importlib.metadata
import importlib.util
import inspect
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from lib import deepsparse
from lib.block_sparse import stored_bytes, to_block_sparse
from lib.config import StudyError
from lib.deepsparse_graph import readable
from lib.environment import isa_flags, native_bf16, native_int8
from lib.int8 import as_array, data_digest, quantize_dynamic, quantize_operators, quantize_static
from lib.onnx_export import (
    cached_export,
    evaluation_copy,
    export_bytes,
    export_onnx,
    fingerprint,
    first_line,
    logits_of,
)
from lib.sparse_layers import make_sparse

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
Batch = Mapping[str, Any]  # name -> (batch, length) integer tensor or array
Run = Callable[[dict[str, Any]], list[np.ndarray]]


@dataclass(frozen=True)
class Prepared:
    """A model ready to run on one engine.

    ``size_bytes`` is what lies on disk for it (its weights and graph); ``runs_on`` says library, version, device and
    the precision that the engine really chose; ``names`` are the inputs it reads.
    """

    engine: str
    precision: str
    threads: int
    size_bytes: int
    runs_on: str
    names: tuple[str, ...]
    _run: Run = field(repr=False)

    def run(self, batch: Batch) -> list[np.ndarray]:
        """All logits, fp32: QA gives start and end, (batch, length) each; classification one (batch, labels).

        Raises:
            StudyError: an input that the model was exported with is missing.
        """
        missing = [name for name in self.names if name not in batch]
        if missing:
            raise StudyError(f"{self.engine}: input '{missing[0]}' is missing; it was prepared with {self.names}")
        return self._run({name: batch[name] for name in self.names})


@dataclass(frozen=True)
class _Job:
    """What every ``_prepare_*`` function is given."""

    engine: str
    precision: str
    model: nn.Module
    names: tuple[str, ...]
    threads: int
    calibration: Sequence[Batch] | None
    folder: Path


@dataclass(frozen=True)
class _Engine:
    """``needs``: packages; ``prepare``: job -> (run, size in bytes, what it runs on); ``check``: what else may lack."""

    precision: str
    device: str
    needs: tuple[str, ...]
    prepare: Callable[[_Job], tuple[Run, int, str]]
    check: Callable[[], str | None] = lambda: None


def prepare(
    engine: str,
    model: nn.Module,
    example: Batch,
    threads: int,
    calibration: Sequence[Batch] | None,
    folder: Path,
) -> Prepared:
    """Make ``model`` ready to run on ``engine``; later changes to ``model`` do not reach the result.

    Args:
        engine: one of ``ENGINES``.
        model: a transformers model whose output has ``...logits`` fields; layers may be missing, narrower or uneven.
        example: a batch whose names say which inputs the model takes (others than ``INPUTS`` are ignored); batch size
            and length are dynamic, so any later batch may differ.
        threads: CPU threads of this engine.
        calibration: batches of real data for engines that quantise activations beforehand.
        folder: where exports of *this* model are kept and reused (440 MB for BERT-base in fp32); an export of other
            weights found there is replaced.

    Raises:
        StudyError: unknown or unavailable engine, no calibration data, a model that cannot be exported, full disk.
    """
    reason = unavailable_reason(engine)
    if reason:
        raise StudyError(f"engine '{engine}' is {reason}; available here: {', '.join(available_engines())}")
    if threads < 1:
        raise StudyError(f"engine '{engine}': threads: found {threads}, expected 1 or more")
    entry = _TABLE[engine]
    job = _Job(engine, entry.precision, model, _input_names(model, example), threads, calibration, Path(folder))
    try:
        run, size_bytes, runs_on = entry.prepare(job)
    except (RuntimeError, ValueError) as error:
        raise StudyError(
            f"{engine} cannot prepare {type(model).__name__}: {first_line(error)}; leave it out"
        ) from error
    return Prepared(engine, entry.precision, threads, size_bytes, runs_on, job.names, run)


def unavailable_reason(engine: str) -> str | None:
    """None when ``engine`` can run here, else "not available: " and why, for a table's cell.

    Raises:
        StudyError: unknown engine.
    """
    if engine not in _TABLE:
        raise StudyError(f"engine '{engine}' is unknown; allowed: {', '.join(ENGINES)}")
    entry = _TABLE[engine]
    for package in entry.needs:
        if importlib.util.find_spec(package) is None:
            return f"not available: package {package} is not installed"
    if entry.device == "cuda" and not torch.cuda.is_available():
        return "not available: no CUDA device"
    if entry.precision == "bf16" and not native_bf16(entry.device):
        return f"not available: this {entry.device.upper()} has no bf16 instructions and would only emulate them"
    return entry.check()


def available_engines(device: str | None = None) -> list[str]:
    """Engines that can run here, on ``device`` ("cpu" or "cuda") or, with None, on either."""
    return [
        name
        for name, entry in _TABLE.items()
        if (device is None or entry.device == device.split(":")[0]) and unavailable_reason(name) is None
    ]


def safetensors_bytes(model: nn.Module) -> int:
    """Size of ``model`` as a safetensors file, exactly: it is serialised in memory. Shared tensors count once."""
    state = model.state_dict()
    unique = {tensor.data_ptr() if tensor.numel() else name: name for name, tensor in state.items()}
    tensors = {name: state[name].detach().cpu().contiguous() for name in unique.values()}
    return len(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def _input_names(model: nn.Module, example: Batch) -> tuple[str, ...]:
    accepted = inspect.signature(model.forward).parameters
    names = tuple(name for name in INPUTS if name in example and name in accepted)
    if "input_ids" not in names:
        raise StudyError(f"example batch: no 'input_ids' among its fields ({', '.join(example)}); tokenize first")
    return names


def _tensor(value: Any, device: str) -> Tensor:
    return torch.as_tensor(value, dtype=torch.int64, device=device)


def _prepare_pytorch(job: _Job) -> tuple[Run, int, str]:
    """PyTorch without compilation, all weights in the precision named; scaled-dot-product attention where it exists."""
    device = "cuda" if "cuda" in job.engine else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[job.precision]
    model = evaluation_copy(job.model, "sdpa", dtype, device)
    where = torch.cuda.get_device_name(0) if device == "cuda" else f"CPU {torch.backends.cpu.get_cpu_capability()}"
    runs_on = f"PyTorch {torch.__version__}, {where}{_bf16_unit(job, device)}"
    return _pytorch_run(model, job.threads, device), safetensors_bytes(model), runs_on


def _pytorch_run(model: Any, threads: int, device: str) -> Run:
    def run(batch: dict[str, Any]) -> list[np.ndarray]:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.inference_mode():
            output = model(**{name: _tensor(value, device) for name, value in batch.items()})
            # Copying to the CPU also waits for the GPU, so a timed call is the whole call.
            return [logits.float().cpu().numpy() for logits in logits_of(output)]

    return run


def _prepare_pytorch_sparse(job: _Job) -> tuple[Run, int, str]:
    """PyTorch with the encoder's weights in CSR, or in BSR with tiles of 4×4."""
    model, layout = evaluation_copy(job.model, "sdpa", torch.float32, "cpu"), job.engine.split("-")[1]
    size = make_sparse(model, layout)
    return _pytorch_run(model, job.threads, "cpu"), size, f"PyTorch {torch.__version__}, CPU, {layout.upper()} weights"


def _prepare_block_sparse(job: _Job) -> tuple[Run, int, str]:
    """PyTorch in fp32 with every matrix whose zeros are whole blocks stored as BSR; the others stay dense."""
    model = evaluation_copy(job.model, "sdpa", torch.float32, "cpu")
    converted, total = to_block_sparse(model)
    runs_on = f"PyTorch {torch.__version__}, CPU, {converted} of {total} matrices block-sparse"
    return _pytorch_run(model, job.threads, "cpu"), stored_bytes(model), runs_on


def _no_mkl() -> str | None:
    if torch.backends.mkl.is_available():
        return None
    return "not available: this build of PyTorch has no MKL, which multiplies block-sparse matrices"


def _bf16_unit(job: _Job, device: str) -> str:
    units = [flag for flag in isa_flags() if flag in ("avx512_bf16", "amx_bf16", "bf16")]
    return f", {units[-1]}" if job.precision == "bf16" and device == "cpu" and units else ""


def _onnx_file(job: _Job) -> tuple[Path, str]:
    """The fp32 export of the job's model, and the key that anything derived from it includes."""
    key = fingerprint(job.model, job.names)
    return cached_export(job.folder, "fp32.onnx", key, lambda file: export_onnx(job.model, job.names, file)), key


def _prepare_onnxruntime(job: _Job) -> tuple[Run, int, str]:
    """ONNX Runtime's CPU provider; int8 is dynamic: weights per output channel, activations ranged at run time."""
    import onnxruntime

    file, key = _onnx_file(job)
    note = ""
    if job.precision == "int8":
        seven_bit = not native_int8()
        note = ", 7-bit weights (no 8-bit dot product)" if seven_bit else ""
        source, key = file, f"{key} onnxruntime {onnxruntime.__version__} {seven_bit}"
        file = cached_export(
            job.folder, "int8-dynamic.onnx", key, lambda made: quantize_dynamic(source, made, seven_bit)
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    # Its threads spin on after a run, which would slow down whichever engine is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(batch: dict[str, Any]) -> list[np.ndarray]:
        return session.run(None, {name: as_array(value) for name, value in batch.items()})

    return run, export_bytes(file), f"ONNX Runtime {onnxruntime.__version__}, {session.get_providers()[0]}{note}"


def _prepare_openvino(job: _Job) -> tuple[Run, int, str]:
    """OpenVINO's CPU plug-in, one stream, latency hint; int8 is NNCF's post-training quantisation, the rest in fp32."""
    import openvino

    file, key = _onnx_file(job)
    if job.precision == "int8":
        batches = _calibration_batches(job)
        source, key = file, f"{key} nncf {importlib.metadata.version('nncf')} {data_digest(batches)}"
        file = cached_export(job.folder, "int8-static.xml", key, lambda made: quantize_static(source, made, batches))
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if job.precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": job.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    sparse = ", sparse weights" if "sparse" in job.engine else ""
    if sparse:
        settings["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = SPARSE_FROM
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    request = compiled.create_infer_request()
    outputs = range(len(compiled.outputs))

    def run(batch: dict[str, Any]) -> list[np.ndarray]:
        results = request.infer({name: as_array(value) for name, value in batch.items()})
        # The result's memory belongs to the request and is overwritten by the next call.
        return [np.array(results[index], dtype=np.float32) for index in outputs]

    chosen = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    version = openvino.__version__.split("-")[0]
    return run, export_bytes(file), f"OpenVINO {version}, CPU, {chosen}{_bf16_unit(job, 'cpu')}{sparse}"


def _no_amx_int8() -> str | None:
    """OpenVINO unpacks sparse weights for AMX's 8-bit products alone."""
    return None if "amx_int8" in isa_flags() else "not available: OpenVINO's sparse weights need AMX INT8 instructions"


def _prepare_deepsparse(job: _Job) -> tuple[Run, int, str]:
    """DeepSparse in its own process; int8 is ONNX Runtime's static quantisation into integer operators.

    It writes the shape of a batch into the file that it is given, so that file is for nothing else.
    """
    exported, key = _onnx_file(job)
    plain = cached_export(job.folder, "torch1.onnx", key, lambda made: readable(exported, made))

    if job.precision == "int8":
        batches = _calibration_batches(job)
        key = f"{key} onnxruntime {importlib.metadata.version('onnxruntime')} {data_digest(batches)}"
        build = partial(quantize_operators, plain, batches=batches)
    else:
        build = partial(shutil.copyfile, plain)
    file = cached_export(job.folder, f"{job.engine}.onnx", key, build)
    worker = deepsparse.Worker(file, job.threads, len(job.names))
    return worker.run, export_bytes(file), f"DeepSparse {worker.version}, CPU, its own process"


def _calibration_batches(job: _Job) -> list[dict[str, np.ndarray]]:
    if not job.calibration:
        raise StudyError(f"{job.engine}: no calibration data; pass a few batches of the task's training data")
    for number, batch in enumerate(job.calibration):
        missing = [name for name in job.names if name not in batch]
        if missing:
            raise StudyError(f"{job.engine}: calibration batch {number} has no '{missing[0]}'; it needs {job.names}")
    return [{name: as_array(batch[name]) for name in job.names} for batch in job.calibration]


SPARSE_FROM = 0.5  # OpenVINO unpacks the weights of layers at least this sparse

_TABLE: dict[str, _Engine] = {
    "pytorch-fp32": _Engine("fp32", "cpu", (), _prepare_pytorch),
    "pytorch-bf16": _Engine("bf16", "cpu", (), _prepare_pytorch),
    "pytorch-bsr-fp32": _Engine("fp32", "cpu", (), _prepare_block_sparse, _no_mkl),
    "onnxruntime-fp32": _Engine("fp32", "cpu", ("onnxscript", "onnxruntime"), _prepare_onnxruntime),
    "onnxruntime-int8": _Engine("int8", "cpu", ("onnxscript", "onnxruntime"), _prepare_onnxruntime),
    "openvino-fp32": _Engine("fp32", "cpu", ("onnxscript", "openvino"), _prepare_openvino),
    "openvino-bf16": _Engine("bf16", "cpu", ("onnxscript", "openvino"), _prepare_openvino),
    "openvino-int8": _Engine("int8", "cpu", ("onnxscript", "openvino", "nncf"), _prepare_openvino),
    "pytorch-csr-fp32": _Engine("fp32", "cpu", (), _prepare_pytorch_sparse),
    "pytorch-tiles-fp32": _Engine("fp32", "cpu", (), _prepare_pytorch_sparse),
    "openvino-sparse-int8": _Engine("int8", "cpu", ("onnxscript", "openvino", "nncf"), _prepare_openvino, _no_amx_int8),
    "deepsparse-fp32": _Engine("fp32", "cpu", ("onnxscript",), _prepare_deepsparse, deepsparse.unavailable_reason),
    "deepsparse-int8": _Engine(
        "int8", "cpu", ("onnxscript", "onnxruntime"), _prepare_deepsparse, deepsparse.unavailable_reason
    ),
    "pytorch-cuda-fp32": _Engine("fp32", "cuda", (), _prepare_pytorch),
    "pytorch-cuda-fp16": _Engine("fp16", "cuda", (), _prepare_pytorch),
    "pytorch-cuda-bf16": _Engine("bf16", "cuda", (), _prepare_pytorch),
}
ENGINES: tuple[str, ...] = tuple(_TABLE)
