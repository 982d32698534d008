"""Convert a checkpoint to a Hugging Face model.

`python tools/convert_megatron_to_hf.py --help`; what it does is in `megatron_brain.commands.convert_megatron_to_hf`.
"""

import sys

from megatron_brain.commands.convert_megatron_to_hf import entry

if __name__ == "__main__":
    sys.exit(entry())
