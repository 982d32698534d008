#!/usr/bin/env bash
# The whole test suite in its own virtual environment. Arguments go to pytest: bash tests/run.sh -k reward
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh test examples
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
ruff check .
ruff format --check .
python -m pytest "$@"
