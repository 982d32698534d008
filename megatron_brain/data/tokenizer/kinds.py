"""Tells which ids and texts of a tokenizer are not ordinary, for hints about a data set."""

import re
from dataclasses import dataclass

from megatron_brain.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, kw_only=True)
class TokenKinds:
    """The tokens of a vocabulary that are not ordinary pieces of text."""

    unknown: int | None
    """Id for text that the vocabulary cannot write."""
    byte_fallback: frozenset[int]
    """Ids of single bytes, if they replace characters that the vocabulary lacks."""
    special: frozenset[str]
    """Texts of the special tokens."""


def token_kinds(tokenizer: Tokenizer) -> TokenKinds:
    """The kinds of tokens of a tokenizer."""
    unknown, byte_fallback, special = _of_library(tokenizer)
    return TokenKinds(
        unknown=unknown,
        byte_fallback=frozenset(byte_fallback),
        special=frozenset(special),
    )


def _of_library(tokenizer: Tokenizer) -> tuple[int | None, list[int], list[str]]:
    if isinstance(tokenizer, HuggingFaceTokenizer):
        hf = tokenizer.hf
        added = [token.content for token in hf.added_tokens_decoder.values() if token.special]
        bytes_ = [i for piece, i in hf.get_vocab().items() if _BYTE_PIECE.fullmatch(piece)]
        return hf.unk_token_id, bytes_, [*hf.all_special_tokens, *added]
    if isinstance(tokenizer, SentencePieceTokenizer):
        sp = tokenizer.sp
        ids = range(sp.get_piece_size())
        control = [sp.id_to_piece(i) for i in ids if sp.is_control(i)]
        return sp.unk_id(), [i for i in ids if sp.is_byte(i)], control
    return None, [], []
