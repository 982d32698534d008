"""Convert a Hugging Face model to a checkpoint.

`python tools/convert_hf_to_megatron.py --help`; what it does is in `megatron_brain.commands.convert_hf_to_megatron`.
"""

import sys

from megatron_brain.commands.convert_hf_to_megatron import entry

if __name__ == "__main__":
    sys.exit(entry())
