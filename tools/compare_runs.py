"""Metrics of several runs side by side, as a table and a figure.

`python tools/compare_runs.py --help`; what it does is in `megatron_brain.commands.compare_runs`.
"""

import sys

from megatron_brain.commands.compare_runs import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
