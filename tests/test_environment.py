import os
import subprocess
import sys

import pytest
import torch
from conftest import record

from lib import environment
from lib.config import ROOT, StudyError
from lib.environment import code_digest, git_commit, hardware, native_bf16, packages
from lib.memory import peak_memory
from lib.specs import MajoritySpec

SOURCE = '''"""Doc."""
# a comment
def f(x):
    """Docstring."""
    return x + 1  # why
'''


def write(folder, source, name="a.py"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(source, encoding="utf-8")
    return folder


def allocate(megabytes, times=1):
    """Run in another process by ``peak_memory``."""
    for _ in range(times):
        torch.ones(megabytes << 18)


def fail():
    raise StudyError("no such thing")


def test_digest_ignores_comments_docstrings_and_layout_only(tmp_path):
    digest = code_digest(write(tmp_path / "a", SOURCE))
    assert len(digest) == 12 and int(digest, 16) >= 0
    bare = "def f(\n    x,\n):\n\n    return (x + 1)\n"
    assert code_digest(write(tmp_path / "b", bare)) == digest
    assert code_digest(write(tmp_path / "c", SOURCE.replace("+ 1", "+ 2"))) != digest
    assert code_digest(write(tmp_path / "d", SOURCE, name="b.py")) != digest
    assert code_digest(write(tmp_path / "e", SOURCE.replace("    return", "    0\n    return"))) != digest


def test_digest_of_falsy_values_differs(tmp_path):
    digests = {
        code_digest(write(tmp_path / f"v{i}", f"a = {v}\n")) for i, v in enumerate(["None", "0", "False", "''", "[]"])
    }
    assert len(digests) == 5


def test_digest_is_the_same_in_every_python_version(tmp_path):
    source = "def f(a: int, w=3, *, c=None) -> str:\n    return f'{a!r:<{w}} {{}} ' 'b' + u'c'\n"
    assert code_digest(write(tmp_path, source)) == "d6fe80410c2d"


def test_git_commit_says_dirty_and_none_outside(tmp_path):
    assert git_commit(tmp_path) is None

    def git(*arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    write(tmp_path, SOURCE)
    git("add", "a.py")
    git("commit", "-m", "x")
    commit = git_commit(tmp_path)
    assert commit is not None and len(commit) == 40
    write(tmp_path, "x = 1\n")
    assert git_commit(tmp_path) == f"{commit}-dirty"


def test_hardware_and_packages_are_complete():
    machine = hardware()
    assert machine["cpu"] and machine["threads"] >= 1 and machine["memory_gb"] > 0
    assert torch.__version__.startswith(packages()["torch"]) and packages()["python"].startswith("3.")


@pytest.mark.parametrize(
    ("flags", "bf16", "int8"),
    [((), False, False), (("avx2", "avx512f"), False, False), (("avx512_bf16",), True, False),
     (("amx_bf16", "amx_int8"), True, True), (("asimd", "asimddp", "bf16"), True, True), (("avx_vnni",), False, True)],
)  # fmt: skip
def test_native_precisions_follow_the_instruction_sets(monkeypatch, flags, bf16, int8):
    monkeypatch.setattr(environment, "isa_flags", lambda: flags)
    assert native_bf16("cpu") is bf16
    assert environment.native_int8() is int8


@pytest.mark.parametrize(
    ("flags", "units"),
    [((), ""), (("avx2", "avx512f"), ""), (("avx512f", "avx512_vnni"), "INT8 vectors, no bf16"),
     (("avx512_bf16", "avx512_vnni"), "bf16 vectors"), (("avx512_bf16", "amx_tile"), "AMX")],
)  # fmt: skip
def test_processors_of_one_name_are_told_apart_by_what_they_have_for_dense_matrices(flags, units):
    assert environment.dense_units(flags) == units
    spec = MajoritySpec(task="rte", data="embedded")
    run = record(spec).model_copy(update={"hardware": {"cpu": "Toy CPU", "isa": list(flags)}})
    assert run.processor == run.machine == ("Toy CPU" + f" ({units})" * bool(units))


def run_python(code, **variables):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "STUDY_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(not environment.on_glibc(), reason="glibc only")
def test_allocator_is_switched_by_variables_by_mallopt_and_by_starting_again():
    say = "print(e.allocator_is_fast())"
    first = "import lib.environment as e; "
    assert run_python(first + say) == ["False"]
    assert run_python(first + say, **environment.fast_cpu_environment()) == ["True"]
    assert run_python(first + "print(e.use_fast_allocator()); " + say) == ["True", "True"]
    assert run_python(first + "print(e.use_fast_allocator())", STUDY_ALLOCATOR="default") == ["False"]
    again = "import os, lib.environment as e; e.reexec_with_fast_allocator(); print(os.environ['STUDY_ALLOCATOR']); "
    assert run_python(again + say) == ["set", "True"]


@pytest.mark.skipif(not environment.on_glibc(), reason="glibc only")
def test_freed_memory_goes_back_when_asked():
    """512 blocks of 1 MiB, every other one freed: the gaps stay in the process until they are released."""
    code = """
import ctypes, os, lib.environment as e
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
rss = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20
e.use_fast_allocator()
blocks = [libc.malloc(2**20) for _ in range(512)]
for block in blocks:
    ctypes.memset(block, 1, 2**20)
for block in blocks[::2]:
    libc.free(block)
before = rss()
e.release_freed_memory()
print(before - rss() > 128, before > 400)
"""
    assert run_python(code) == ["True", "True"]
    assert run_python(code, STUDY_ALLOCATOR="default")[1] == "False", "the usual allocator keeps no gaps of this size"


@pytest.mark.skipif(not environment.on_glibc(), reason="glibc only")
@pytest.mark.parametrize("module", ["lib.runs", "lib.benchmark"])
def test_command_lines_start_again_before_their_slow_imports(module, tmp_path):
    (tmp_path / "torch.py").write_text("import os, sys; print(os.environ.get('STUDY_ALLOCATOR')); sys.exit()")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "STUDY_"))}
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, env=clean | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "set\n", "torch was imported in the process that starts itself again"


def test_starting_again_happens_once(monkeypatch):
    monkeypatch.setattr(environment, "on_glibc", lambda: True)
    monkeypatch.setattr(environment, "allocator_is_fast", lambda: False)
    monkeypatch.setattr(environment.os, "execve", lambda *_: pytest.fail("started again in a loop"))
    monkeypatch.setenv("STUDY_ALLOCATOR", "set")
    environment.reexec_with_fast_allocator()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot reset the high-water mark")
def test_peak_memory_is_the_live_peak_not_the_sum():
    assert peak_memory(allocate, megabytes=96, times=3) == pytest.approx(96 << 20, rel=0.1)


def test_peak_memory_names_what_went_wrong():
    with pytest.raises(StudyError, match="fail: no such thing"):
        peak_memory(fail)
    with pytest.raises(StudyError, match="move the function into a module"):
        peak_memory(lambda: None)
