"""A hash of a tokenizer's vocabulary and rules. No run may train on data that another tokenizer prepared."""

import hashlib
import json
import tempfile
from pathlib import Path

from megatron_brain.data.tokenizer import Tokenizer

# These describe batches, or name the tokenizer. They are not rules that turn text into ids.
_OTHER_FILES = {"tokenizer_config.json", "special_tokens_map.json", "generation_config.json"}
_OTHER_KEYS = {"padding", "truncation"}


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hexadecimal digest, the same for a tokenizer and for the one that is read back after `Tokenizer.save`."""
    digest = hashlib.blake2b(digest_size=16)
    rules = ("tokenizer_type", "vocab_size", "bos_id", "adds_bos", "eos_id", "chat_templates")
    digest.update(repr([getattr(tokenizer, name) for name in rules]).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and path.name not in _OTHER_FILES and path.suffix != ".jinja":
                digest.update(path.name.encode())
                digest.update(_content(path))
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    if path.name != "tokenizer.json":
        return path.read_bytes()
    rules = json.loads(path.read_bytes())
    return json.dumps({key: value for key, value in rules.items() if key not in _OTHER_KEYS}).encode()
