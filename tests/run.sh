#!/usr/bin/env bash
# The whole test suite in its own virtual environment. Arguments go to pytest: bash tests/run.sh -k reward
#
#   bash tests/run.sh --python 3.12 [pytest argument ...]
#
# runs the suite on that Python, in .venv-3.12, with the versions of constraints-cpu-3.12.txt. The exit status is 77 if that
# Python does not run. Then nothing was tested, and a CI should report skipped, neither passed nor failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# pyenv puts a python3.12 on PATH that runs only if that version is chosen.
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
source tools/environment.sh test docs examples report
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
ruff check .
ruff format --check .
mypy
codespell
# Two processes get whole files in the order of the folders: one runs the distributed worlds, the other the rest.
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
