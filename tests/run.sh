#!/usr/bin/env bash
# The whole test suite in its own virtual environment. Arguments go to pytest: bash tests/run.sh -k reward
#
#   bash tests/run.sh --python 3.12 [pytest argument ...]
#
# does so on that Python, in .venv-3.12, with the versions of constraints-cpu-3.12.txt. Its exit status is 77 where no such
# Python runs: nothing was tested, which a CI should report as skipped, neither as passed nor as failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# pyenv puts a python3.12 on PATH that runs only where that version is chosen.
find_python() {
    local candidate
    for candidate in "python$1" $(pyenv whence --path "python$1" 2>/dev/null); do
        if "$candidate" -c "" 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "skipped: no python$1 runs here, neither from PATH nor from pyenv's versions; install one (python$1-venv too)" >&2
    exit 77
}

if [ "${1:-}" = --python ]; then
    PYTHON=$(find_python "${2:?--python needs a version, such as 3.12}")
    VENV=${VENV:-.venv-$2}
    shift 2
fi
source tools/environment.sh test docs examples
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
ruff check .
ruff format --check .
mypy
codespell
# Whole files go to two processes, in the order of the folders: the distributed worlds in one, the rest beside them.
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
