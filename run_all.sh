#!/usr/bin/env bash
# Sets up what is missing and runs the study, its tests, or the lock file's renewal. See --help.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
lock=$root/requirements.lock
profiles="smoke quick study paper"

usage() {
    cat <<'TEXT'
Usage: ./run_all.sh [PROFILE] [OPTIONS]   execute every notebook (PROFILE: smoke, quick, study, paper; default quick)
       ./run_all.sh report [PROFILE]      gallery, LaTeX macros, one HTML and one PDF of what was executed (default study)
       ./run_all.sh test [PYTEST ARGS]    ruff, mypy and the tests
       ./run_all.sh lock                  renew requirements.lock from pyproject.toml (needs uv)

--with-deepsparse, before or after the profile, first installs the sparse engine DeepSparse into .venv-deepsparse (Linux on
x86-64 and a Python from 3.8 to 3.11; where it cannot be installed, its rows say "not available").

Options after the profile go to `python -m lib.execute`:
  --only 00 05            only these notebooks
  -p NAME VALUE           set a notebook parameter (repeatable); see --help-parameters
  --jobs N                first compute the runs, N at once, by Snakemake (docs/scale_out.md)
  --help-parameters       list every notebook's parameters with their meaning
  --list                  list the notebooks

A virtual environment is made in .venv and filled from requirements.lock, unless the active virtual or conda
environment already has what pyproject.toml asks for. Both are skipped when nothing changed. A second run reuses
every finished record. Set STUDY_DATA to a data directory for the study profile. Needs Python 3.11, 3.12 or 3.13.
TEXT
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-2}"
}

# Path of a Python that can run the study, or nothing.
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

# Succeeds when this Python has every package that pyproject.toml asks for, in its range; prints what is amiss.
has_packages() {
    "$1" - "$root/pyproject.toml" <<'PY' 2>/dev/null
import sys, tomllib
from importlib import metadata
try:
    from packaging.requirements import Requirement
except ImportError:
    sys.exit("packaging is missing")
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
    need = Requirement(line)
    try:
        found = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        print(f"{need.name} is missing")
        sys.exit(1)
    if not need.specifier.contains(found, prereleases=True):
        print(f"{need} is needed, {found} is installed")
        sys.exit(1)
PY
}

# Runs pip with its output in a log file; prints a count while it works, and one clear line when it fails.
pip_install() {
    local log=$1 total
    shift
    total=$(grep -c '==' "$lock" || true)
    if ! "$python" -m pip install --disable-pip-version-check --no-input "$@" 2>&1 | tee "$log" | awk -v total="$total" '
            /^(Collecting|Requirement already satisfied:) / { n++; if (n % 25 == 0) { print "      " n " of about " total " packages found"; fflush() } }
            /^Installing collected packages/ && n >= 25 { print "      unpacking, a minute or two"; fflush() }'; then
        tail -n 8 "$log" | sed 's/^/      /' >&2
        if grep -q 'No space left on device' "$log"; then
            fail "the disk is full; free about 4 GB and run again (pip's log: $log)"
        elif grep -qE 'Permission denied|Read-only file system' "$log"; then
            fail "pip may not write to $("$python" -c 'import sys; print(sys.prefix)'); use a writable checkout (pip's log: $log)"
        elif grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|name resolution|Network is unreachable|Connection refused|from versions: none' "$log"; then
            fail "pip cannot reach its package index, or it lacks the package above; connect or set PIP_INDEX_URL, then run again (pip's log: $log)"
        fi
        fail "pip could not install the packages above (its log: $log)"
    fi
}

# Sets $python to an interpreter with everything installed.
set_up() {
    local active="" found stamp
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        active=$(find_python)
    fi
    if [ -n "$active" ] && found=$(has_packages "$active"); then
        python=$active
        echo "[1/3] Python: the active environment, ${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
        echo "[2/3] Packages: present"
    else
        if [ -n "$active" ]; then
            echo "      the active environment is not used: ${found:-packages are missing}"
        fi
        make_venv
        stamp=$root/.venv/.study-lock
        if [ "$(cat "$stamp" 2>/dev/null)" = "$(digest)" ]; then
            echo "[2/3] Packages: present"
        else
            echo "[2/3] Packages: installing requirements.lock, some minutes (log: .venv/install.log)"
            pip_install "$root/.venv/install.log" -r "$lock"
            digest >"$stamp"
        fi
    fi
    # Editable, so that notebooks import lib from any folder; checked from another folder, without this one on the path.
    if [ "$(cd / && "$python" -c 'import lib.config; print(lib.config.ROOT)' 2>/dev/null)" != "$root" ]; then
        local log
        log=$(mktemp "${TMPDIR:-/tmp}/study-install.XXXXXX")
        (cd "$root" && pip_install "$log" --no-deps --no-build-isolation -e "$root")
        rm -f "$log"
    fi
}

digest() {
    "$python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), sys.version.split()[0])' "$lock"
}

make_venv() {
    local base
    python=$root/.venv/bin/python
    [ -d "$root/.venv/Scripts" ] && python=$root/.venv/Scripts/python.exe
    if "$python" -m pip --version >/dev/null 2>&1; then
        echo "[1/3] Python: .venv"
        return
    fi
    base=$(find_python)
    [ -n "$base" ] || fail "no Python 3.11, 3.12 or 3.13 found on PATH; install one (from your package manager, python.org or conda)"
    echo "[1/3] Python: making .venv with $base"
    mkdir -p "$root/.venv" 2>/dev/null || fail "cannot write to $root; use a writable checkout, or activate an environment that has the packages"
    "$base" -m venv --clear "$root/.venv" >"${TMPDIR:-/tmp}/study-venv.$$" 2>&1 ||
        fail "'$base -m venv' failed: $(tr '\n' ' ' <"${TMPDIR:-/tmp}/study-venv.$$" | cut -c1-200)(on Debian and Ubuntu: apt install python3-venv)"
    rm -f "${TMPDIR:-/tmp}/study-venv.$$"
    [ -d "$root/.venv/Scripts" ] && python=$root/.venv/Scripts/python.exe
    return 0
}

# DeepSparse, in an environment of its own: it wants older packages than the study. Never stops the run.
install_deepsparse() {
    local folder=$root/.venv-deepsparse base="" candidate
    if [ "$("$folder/bin/python" -c 'import deepsparse; print(deepsparse.__version__)' 2>/dev/null)" = 1.8.0 ]; then
        echo "      DeepSparse: present"
        return
    fi
    for candidate in python3.11 python3.10 python3.9 python3.8 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 8) <= sys.version_info[:2] <= (3, 11))' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    if [ "$(uname -sm)" != "Linux x86_64" ] || [ -z "$base" ]; then
        echo "      DeepSparse: not installed, it needs Linux on x86-64 and a Python from 3.8 to 3.11; its rows will say so"
        return
    fi
    echo "      DeepSparse: installing into .venv-deepsparse with $base, some minutes (log: .venv-deepsparse/install.log)"
    if mkdir -p "$folder" && "$base" -m venv --clear "$folder" >/dev/null 2>&1 &&
        "$folder/bin/python" -m pip install --disable-pip-version-check --no-input \
            'deepsparse==1.8.0' 'numpy<2' 'onnx<1.15' >"$folder/install.log" 2>&1; then
        echo "      DeepSparse: installed"
    else
        echo "      DeepSparse: could not be installed ($(tail -n 1 "$folder/install.log" 2>/dev/null | cut -c1-160)); its rows will say so"
        rm -f "$folder/bin/python"
    fi
}

# Settings that a kernel must find in its environment when it starts.
set_environment() {
    if [ "$(uname -s)" = Linux ]; then
        # glibc otherwise returns large blocks to the system after every training step: a third of the time on CPU
        export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"
        export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8589934592}"
        export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"
    fi
    # Libraries choose one thread per core by themselves, but do not see a container's CPU quota.
    local quota period
    if [ -z "${OMP_NUM_THREADS:-}" ] && read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [ "$quota" != max ]; then
        local cores=$(((quota + period - 1) / period))
        [ "$cores" -ge "$(nproc)" ] || export OMP_NUM_THREADS=$cores
    fi
    if [ "$1" = smoke ] || [ "$1" = quick ] || [ "$1" = test ]; then
        export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
    fi
}

make_report() {
    cd "$root"
    echo "[3/3] Report"
    exec "$python" -m lib.report "$@"
}

run_tests() {
    cd "$root"
    echo "[3/3] Tests: ruff, mypy, pytest"
    # One thread in each process (tests/conftest.py); a file stays in one process, with what its tests share.
    "$python" -m ruff check . && "$python" -m ruff format --check lib tests docs && "$python" -m mypy lib &&
        exec "$python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
}

renew_lock() {
    local uv
    uv=$(command -v uv) || fail "uv is not on PATH; install it (pip install uv) and run again"
    cd "$root"
    # GPU lines are left out: pip then takes what the installed torch build itself asks for, and a CPU build stays CPU.
    {
        echo "# Exact pins of everything, for CPython 3.11 to 3.13 on Linux, macOS and Windows."
        echo "# Made by ./run_all.sh lock from pyproject.toml; do not edit."
        "$uv" pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
            --extra dev --extra scale --extra report \
            --no-header --no-annotate --no-emit-index-url --no-emit-find-links pyproject.toml |
            grep -vE '^(nvidia-|cuda-|triton)|^[^;]*; .*sys_platform == .emscripten|^-'
    } >requirements.lock.new
    mv requirements.lock.new requirements.lock
    echo "requirements.lock: $(grep -c '==' requirements.lock) packages"
}

trap 'echo >&2; echo "interrupted; run the same command again to go on" >&2; exit 130' INT

with_deepsparse=""
arguments=()
for argument in "$@"; do
    if [ "$argument" = --with-deepsparse ]; then with_deepsparse=1; else arguments+=("$argument"); fi
done
set -- ${arguments[@]+"${arguments[@]}"}

command=quick
case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    "" | -*) ;;
    *) command=$1; shift ;;
esac
[ "${1:-}" != "--" ] || shift

case "$command" in
    test)
        set_up
        set_environment test
        run_tests "$@"
        ;;
    report)
        set_up
        make_report "$@"
        ;;
    lock) renew_lock ;;
    smoke | quick | study | paper | *.yaml | *.yml)
        set_up
        [ -z "$with_deepsparse" ] || install_deepsparse
        set_environment "$(basename "$command")"
        echo "[3/3] Notebooks: profile $command"
        exec "$python" -m lib.execute "$command" "$@"
        ;;
    *) fail "unknown profile '$command'; allowed: ${profiles// /, }, the path of a YAML file, or the commands report, test and lock" ;;
esac
