"""What a measurement ran on, and the settings that make CPU runs fast.

A latency without its processor, instruction set, thread count and package versions cannot be compared with anything,
so every record carries ``hardware()``, ``packages()``, ``git_commit()`` and ``code_digest()``. The second half changes
how glibc hands out memory: by default it returns every large block to the system when it is freed and pays the page
faults again at the next training step, which on a CPU costs a third of the step.

torch is imported where it is needed only, so that a command line can start itself again before that slow import.
"""

import ast
import ctypes
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from lib.config import ROOT, StudyError

PACKAGES = (
    "torch", "transformers", "datasets", "evaluate", "accelerate", "numpy", "onnx", "onnxscript", "onnxruntime",
    "openvino", "nncf", "scikit-learn", "scipy", "sacrebleu", "papermill",
)  # fmt: skip

# Instruction sets that decide which engine wins: names as Linux and the Arm kernel print them.
ISA_OF_INTEREST = (
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni",
    "amx_tile", "amx_bf16", "amx_int8", "amx_fp16",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sme",
)  # fmt: skip
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
_VNNI_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}

# glibc keeps blocks up to 4 GiB for itself, returns nothing below 8 GiB of free memory, and grows by 256 MiB at a time.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
# "set" once a command line has started itself again; "default" forbids any switching.
ALLOCATOR_VARIABLE = "STUDY_ALLOCATOR"
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_switched_in_process = False


@cache
def isa_flags() -> tuple[str, ...]:
    """Instruction sets of interest that this CPU and its virtual machine offer; empty where the system hides them."""
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    elif sys.platform == "darwin":
        for flag, key in (("bf16", "FEAT_BF16"), ("i8mm", "FEAT_I8MM"), ("asimddp", "FEAT_DotProd")):
            if _sysctl(f"hw.optional.arm.{key}") == "1":
                flags.add(flag)
    return tuple(flag for flag in ISA_OF_INTEREST if flag in flags)


def kind_of_processor(instructions: str) -> tuple[str, list[str]]:
    """What a kind of processor has and what it lacks: "avx512_vnni_without_avx512_bf16" has the first, not the second.

    Raises:
        StudyError: a name that is not of ``ISA_OF_INTEREST``.
    """
    has, *lacks = instructions.split("_without_")
    if unknown := [name for name in (has, *lacks) if name not in ISA_OF_INTEREST]:
        raise StudyError(
            f"latency.also_with: '{unknown[0]}' is no instruction set of {', '.join(ISA_OF_INTEREST)} "
            "(NAME, or NAME_without_NAME)"
        )
    return has, lacks


def offers(instructions: str) -> bool:
    """Whether this processor is of a kind (``kind_of_processor``); "" stands for any."""
    if not instructions:
        return True
    has, lacks = kind_of_processor(instructions)
    return has in isa_flags() and not set(lacks) & set(isa_flags())


def dense_units(isa: Collection[str]) -> str:
    """The best that ``isa`` has for dense matrices, as a reader knows it; "" where nothing is known of it.

    Processors of one name differ in it: a virtual machine may hide what its host has.
    """
    for units, there in (
        ("AMX", any(flag.startswith("amx") for flag in isa)),
        ("bf16 vectors", bool(_BF16_FLAGS & set(isa))),
        ("INT8 vectors, no bf16", bool(_VNNI_FLAGS & set(isa))),
    ):
        if there:
            return units
    return ""


def native_bf16(device: str = "cpu") -> bool:
    """Whether ``device`` ("cpu" or "cuda") multiplies bfloat16 in hardware; without it bf16 is emulated and slow."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(_BF16_FLAGS & set(isa_flags()))


def native_int8() -> bool:
    """Whether the CPU has 8-bit dot products (VNNI, AMX, or Arm's).

    Plain AVX2 and AVX-512 add pairs of 8-bit products in 16 bits, which saturates: weights then need 7 bits.
    """
    return bool((_VNNI_FLAGS | {"asimddp", "i8mm"}) & set(isa_flags()))


@cache
def _sysctl(name: str) -> str:
    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string")
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Logical CPUs that this process may use (fewer than the machine's under taskset or in a container's cpuset)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def hardware() -> dict[str, Any]:
    """The machine: processor, physical ``cores``, usable ``threads``, memory, instruction sets, GPU, allocator."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "threads": usable_cpus(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "isa": list(isa_flags()),
        "gpu": gpu,
        "os": f"{platform.system()} {platform.machine()}",
        "allocator": "keeps memory" if allocator_is_fast() else "default",
    }


def packages() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit(folder: Path = ROOT) -> str | None:
    """Hash of the commit that ``folder`` is on, with "-dirty" when tracked files differ; None outside git."""
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changes else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def code_digest(folder: Path = ROOT / "lib") -> str:
    """12 hex digits over every Python file below ``folder`` without comments, docstrings and layout.

    Two records with the same digest were made by the same code. The digest is taken over the syntax tree, written out
    here field by field, because ``ast.unparse`` and ``ast.dump`` print the same code differently from one Python
    version to the next.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        digest.update(f"{path.relative_to(folder).as_posix()}\n{_canonical(tree)}\n".encode())
    return digest.hexdigest()[:12]


def _canonical(node: Any) -> str:
    """A syntax tree as text: docstrings, positions, empty fields and string prefixes left out."""
    if isinstance(node, list):
        return "[" + ",".join(_canonical(item) for item in node) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and _has_docstring(node):
        fields["body"] = fields["body"][1:]
    fields.pop("kind", None)
    if isinstance(node, ast.JoinedStr):
        # Python 3.12 ends a nested format specification with an empty string.
        fields["values"] = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
    written = ",".join(f"{name}={_canonical(value)}" for name, value in fields.items() if value not in (None, []))
    return f"{type(node).__name__}({written})"


def _has_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    first = node.body[0] if node.body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def on_glibc() -> bool:
    """Whether this Python runs on Linux with glibc, the only allocator that the settings below speak to."""
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def fast_cpu_environment() -> dict[str, str]:
    """Variables that keep freed memory in the process; glibc reads them once, before Python starts. {} off glibc."""
    return dict(_MALLOC) if on_glibc() else {}


def allocator_is_fast() -> bool:
    """Whether this process keeps freed memory: started with the variables, or switched by ``use_fast_allocator``."""
    if not on_glibc():
        return False
    if _switched_in_process:
        return True
    try:
        at_start = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return all(os.environ.get(name) == value for name, value in _MALLOC.items())
    return all(f"{name}={value}".encode() in at_start for name, value in _MALLOC.items())


def use_fast_allocator() -> bool:
    """Switch the running process to the same behaviour through ``mallopt``; for notebooks, whose kernel already runs.

    Memory handed out before the call is unaffected. Returns whether the allocator is fast now.
    """
    global _switched_in_process
    if allocator_is_fast() or not on_glibc() or os.environ.get(ALLOCATOR_VARIABLE) == "default":
        return allocator_is_fast()
    mallopt = ctypes.CDLL(None).mallopt
    # The threshold's own option takes an int and so ends at 2 GiB; forbidding mmap altogether has no such limit.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, int(_MALLOC["MALLOC_TOP_PAD_"])))
    _switched_in_process = all([mallopt(option, value) == 1 for option, value in settings])
    return _switched_in_process


def release_freed_memory() -> None:
    """Give the system back what the fast allocator keeps and nothing uses; without it, does nothing.

    Batches of ever other lengths leave gaps into which the next one does not fit, so that a long training run would
    grow for hours. A call takes a fraction of a second.
    """
    if allocator_is_fast():
        ctypes.CDLL(None).malloc_trim(0)


def reexec_with_fast_allocator() -> None:
    """Start this command line again, once, with ``fast_cpu_environment()``; returns where nothing is to be gained.

    Call it under ``if __name__ == "__main__"`` before the slow imports, so that they happen once. The process keeps
    its id, arguments and terminal.
    """
    if not on_glibc() or allocator_is_fast() or os.environ.get(ALLOCATOR_VARIABLE):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(
        sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **_MALLOC, ALLOCATOR_VARIABLE: "set"}
    )
