"""Tokenize a corpus once, for any number of runs.

`python tools/preprocess_data.py --help`; what it does is in `megatron_brain.commands.preprocess_data`.
"""

import sys

from megatron_brain.commands.preprocess_data import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
