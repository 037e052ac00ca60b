"""DeepSparse, the engine of oBERT's speed claims, in an environment of its own (``./run_all.sh --with-deepsparse``).

Version 1.8.0 is the last whose package holds the engine. It needs CPython 3.8 to 3.11, NumPy 1 and Linux on x86-64, and
its licence is not for production. It runs in a process of its own, so a call includes a pipe to that process: about a
tenth of a millisecond, and part of every DeepSparse number here.
"""

import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from lib.config import ROOT, StudyError
from lib.deepsparse_worker import NUMBER, PAIR
from lib.int8 import as_array

FOLDER = ROOT / ".venv-deepsparse"
IR_VERSION = 8  # of ONNX files: it reads none newer than 9


def unavailable_reason() -> str | None:
    """None when DeepSparse can run here, else "not available: " and why."""
    if not sys.platform.startswith("linux"):
        return "not available: DeepSparse runs on Linux only"
    if not _python().is_file():
        return "not available: DeepSparse is not installed (./run_all.sh --with-deepsparse)"
    return None


def _python() -> Path:
    return FOLDER / "bin" / "python"


def readable(source: Path, target: Path) -> None:
    """Write an ONNX graph again as DeepSparse reads it: an older file version, layer normalisation in single steps.

    It has no kernel for the operator LayerNormalization and hands such a node to another runtime, which cuts its graph
    into pieces; it computes the steps that older exporters wrote.
    """
    import onnx

    model = onnx.load(source)
    model.ir_version = IR_VERSION
    constants: dict[str, np.ndarray] = {
        "normalised_axis": np.array([-1], np.int64), "square": np.array(2, np.float32),
    }  # fmt: skip
    nodes = []
    for node in model.graph.node:
        if node.op_type == "LayerNormalization" and len(node.input) == 3:
            epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            constants[f"epsilon_{epsilon:g}"] = np.array(epsilon, np.float32)
            given, scale, bias = node.input
            nodes += _layer_norm_steps(given, scale, bias, node.output[0], f"epsilon_{epsilon:g}")
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    onnx.save(model, target)


def _layer_norm_steps(given: str, scale: str, bias: str, result: str, epsilon: str) -> list[Any]:
    """Nodes that normalise the last axis of ``given`` (batch, length, hidden) into ``result``."""
    from onnx.helper import make_node

    steps = ("mean", "centred", "squares", "variance", "safe", "root", "unit", "scaled")
    names = {step: f"{result}_{step}" for step in steps}
    return [
        make_node("ReduceMean", [given, "normalised_axis"], [names["mean"]]),
        make_node("Sub", [given, names["mean"]], [names["centred"]]),
        make_node("Pow", [names["centred"], "square"], [names["squares"]]),
        make_node("ReduceMean", [names["squares"], "normalised_axis"], [names["variance"]]),
        make_node("Add", [names["variance"], epsilon], [names["safe"]]),
        make_node("Sqrt", [names["safe"]], [names["root"]]),
        make_node("Div", [names["centred"], names["root"]], [names["unit"]]),
        make_node("Mul", [names["unit"], scale], [names["scaled"]]),
        make_node("Add", [names["scaled"], bias], [result]),
    ]


class Worker:
    """A model in DeepSparse's process; ``run`` hands it a batch. The process ends with this object."""

    def __init__(self, file: Path, threads: int, inputs: int) -> None:
        script = Path(__file__).with_name("deepsparse_worker.py")
        self._inputs, self._log = inputs, tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [str(_python()), "-I", str(script), str(file), str(threads), str(inputs)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self._end = weakref.finalize(self, _stop, self._process)
        self.version = self._read(self._number()).decode()

    def run(self, batch: dict[str, Any]) -> list[np.ndarray]:
        """All outputs, fp32, of inputs (batch, length) in the model's order.

        Raises:
            StudyError: DeepSparse refuses the model or ended.
        """
        arrays = [as_array(value) for value in batch.values()]
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(PAIR.pack(*arrays[0].shape) + b"".join(array.tobytes() for array in arrays))
            stream.flush()
        except OSError:
            raise self._ended() from None
        count = self._number()
        if count < 0:
            raise StudyError(f"deepsparse: {self._read(self._number()).decode()}")
        return [self._array() for _ in range(count)]

    def _array(self) -> np.ndarray:
        shape = [self._number() for _ in range(self._number())]
        data = self._read(4 * int(np.prod(shape)))
        return np.frombuffer(data, np.float32).reshape(shape).copy()

    def _number(self) -> int:
        return NUMBER.unpack(self._read(NUMBER.size))[0]

    def _read(self, size: int) -> bytes:
        stream = self._process.stdout
        assert stream is not None
        data = stream.read(size)
        if len(data) < size:
            raise self._ended()
        return data

    def _ended(self) -> StudyError:
        self._process.wait(timeout=20)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        reason = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "no message")
        return StudyError(f"deepsparse: its process ended ({reason.strip()[:200]}); leave this engine out")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    process.terminate()
    process.wait(timeout=20)
