"""Peak memory of one piece of work, a training step or an inference.

CUDA: the allocator's own peak (``torch.cuda.max_memory_allocated``). CPU: the kernel's high-water mark of resident
memory in a fresh process, because each simpler way is wrong: a sampling thread misses short peaks, a process that has
worked before hides the rise in memory it had kept, and torch's counters see neither oneDNN's scratch space nor the
engines'.
The fresh process returns freed blocks at once, whatever the caller's allocator does, and does the work twice, so that
imports and thread pools are there before the second, measured time.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from lib.config import StudyError
from lib.environment import ALLOCATOR_VARIABLE


def peak_memory(function: Callable[..., Any], device: str = "cpu", **arguments: Any) -> int:
    """Bytes by which ``function(**arguments)`` raises memory use at its highest point.

    Where the system cannot reset its high-water mark (others than Linux) a single call is measured, imports included.

    Args:
        function: on CPU a module-level function, found again by name in the new process; what it loads, it must load
            itself.
        arguments: on CPU values that JSON can hold.

    Raises:
        StudyError: the function cannot be found by name or fails.
    """
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(**arguments)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    name = f"{function.__module__}.{function.__qualname__}"
    if function.__module__ == "__main__" or "<" in function.__qualname__:
        raise StudyError(f"peak memory of {name}: a new process cannot import it; move the function into a module")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", "import lib.memory; lib.memory._measure_peak()",
         function.__module__, function.__qualname__, json.dumps(arguments)],
        env={**inherited, "MALLOC_MMAP_THRESHOLD_": "65536", ALLOCATOR_VARIABLE: "default", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise StudyError(f"peak memory of {name}: {reason.removeprefix('lib.config.StudyError: ')}")
    return int(done.stdout.strip().splitlines()[-1])


def _measure_peak() -> None:
    """The new process of ``peak_memory``: prints the rise in bytes as its last line."""
    module, qualname, arguments = sys.argv[1:]
    function = getattr(importlib.import_module(module), qualname)
    resettable = Path("/proc/self/clear_refs").exists()
    before = psutil.Process().memory_info().rss
    function(**json.loads(arguments))
    if resettable:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = psutil.Process().memory_info().rss
        function(**json.loads(arguments))
    print(max(0, _high_water_mark() - before))


def _high_water_mark() -> int:
    """Largest resident memory of this process so far (since the last reset), in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
