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


def unavailable_reason() -> str | None:
    """None when DeepSparse can run here, else "not available: " and why."""
    if not sys.platform.startswith("linux"):
        return "not available: DeepSparse runs on Linux only"
    if not _python().is_file():
        return "not available: DeepSparse is not installed (./run_all.sh --with-deepsparse)"
    return None


def _python() -> Path:
    return FOLDER / "bin" / "python"


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
