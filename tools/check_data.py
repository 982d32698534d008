"""Report every problem of a data set before a long job starts.

`python tools/check_data.py --help`; what it does is in `megatron_brain.commands.check_data`.
"""

import sys

from megatron_brain.commands.check_data import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
