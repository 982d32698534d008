"""Tokenizers: Hugging Face directories and SentencePiece model files behind one class.

`base.py` has the common class and the one rule for BOS and EOS; `huggingface.py` and `sentencepiece.py` have the two
kinds; `chat_template.py` renders chats; `own_file.py` takes the tokenizer of tokenizer.json; `word_mark.py` handles
texts that continue others; `export.py` and `sentencepiece_fast.py` write what `AutoTokenizer` reads; `fingerprint.py`
tells whether two tokenizers are the same; `kinds.py` tells which tokens are not ordinary; `awkward_texts.py` has texts
to compare two tokenizers with; `training.py` trains a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_brain.data.tokenizer.base import Tokenizer
from megatron_brain.data.tokenizer.huggingface import HuggingFaceTokenizer
from megatron_brain.data.tokenizer.sentencepiece import SENTENCEPIECE_FILE, SentencePieceTokenizer
from megatron_brain.errors import ConfigError

__all__ = [
    "SENTENCEPIECE_FILE",
    "TOKENIZER_TYPES",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "check_fits",
]

TOKENIZER_TYPES: dict[str, Callable[[str, str | None], Tokenizer]] = {
    HuggingFaceTokenizer.tokenizer_type: HuggingFaceTokenizer,
    SentencePieceTokenizer.tokenizer_type: SentencePieceTokenizer,
}


def build_tokenizer(
    tokenizer_type: str, tokenizer_model: str | Path, chat_template: str | Path | None = None
) -> Tokenizer:
    """The tokenizer of ``--tokenizer-type``, ``--tokenizer-model`` and ``--chat-template``.

    Args:
        tokenizer_type: a key of ``TOKENIZER_TYPES`` (Megatron-LM's names).
        tokenizer_model: directory or hub name (HuggingFaceTokenizer), or ``.model`` file (SentencePieceTokenizer);
            or a directory that :meth:`Tokenizer.save` wrote.
        chat_template: file of a Jinja template that replaces the tokenizer's own ones.

    Raises:
        ConfigError: the type is unknown, the model or the template cannot be read, the tokenizer has no EOS, or it
            renders no chats although a template is given.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise ConfigError(f"--tokenizer-type {tokenizer_type}: must be one of {', '.join(TOKENIZER_TYPES)}")
    template = None if chat_template is None else str(chat_template)
    return TOKENIZER_TYPES[tokenizer_type](str(tokenizer_model), template)


def check_fits(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raise ConfigError where the tokenizer has ids for which the model has no embedding row.

    Args:
        tokenizer: any tokenizer.
        model_vocab_size: embedding rows of the model, with or without padding for tensor parallelism.
    """
    if tokenizer.vocab_size > model_vocab_size:
        raise ConfigError(
            f"the tokenizer needs a vocabulary of {tokenizer.vocab_size} ids and the model has {model_vocab_size}: "
            "give --tokenizer-model the tokenizer that belongs to the model, or resize the model's embeddings "
            "(transformers: model.resize_token_embeddings(len(tokenizer))) and convert it again"
        )
