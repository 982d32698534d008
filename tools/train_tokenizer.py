"""Train a SentencePiece tokenizer.

`python tools/train_tokenizer.py --help`; what it does is in `megatron_brain.commands.train_tokenizer`.
"""

import sys

from megatron_brain.commands.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
