"""Say what a checkpoint holds, and whether it is unchanged since it was saved.

`python tools/inspect_checkpoint.py --help`; what it does is in `megatron_brain.commands.inspect_checkpoint`.
"""

import sys

from megatron_brain.commands.inspect_checkpoint import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
