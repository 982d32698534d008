"""Which layouts of a model on a cluster fit, how long a step takes, and why others do not.

`python tools/plan.py --help`; what it does is in `megatron_brain.commands.plan`.
"""

import sys

from megatron_brain.commands.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
