"""Makes a fast tokenizer of transformers from a SentencePiece model.

Each converter of transformers assumes the settings of one model (Llama's dummy prefix, T5's normaliser). So this module
puts the components of the `tokenizers` library together from what the `.model` file says:

- normaliser: the character map, removal of extra spaces, the dummy prefix, and a space as U+2581;
- BPE or unigram over the whole text, as SentencePiece does, with unknown characters fused or as bytes;
- control pieces are special tokens; user-defined pieces are added tokens that are searched in normalised text.

Some differences stay (:func:`doubtful_texts` has examples): the library's character maps lose some sequences of
combining marks; with a dummy prefix, a text that is one user-defined symbol and nothing else gets no prefix; a unigram
model that lacks the characters of a special piece's name reads that name as the piece; and where two unigram
segmentations have equal scores (the same pieces in another order, as in long runs of spaces), either may result.
"""

from __future__ import annotations

import re
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from megatron_brain.errors import ConfigError

CURE = (
    "train a bpe model with tools/train_tokenizer.py, or give transformers token ids made with the sentencepiece "
    "library"
)
"""What the user can do where no fast tokenizer equals the model."""

_SPACE = "\u2581"

_COMBINING = ["e\u0302\u0301", "\u1106\u1167"]


def fast_tokenizer(serialized_model: bytes) -> tokenizers.Tokenizer:
    """The tokenizer, without BOS.

    Raises:
        ConfigError: a setting of the model has no counterpart in the `tokenizers` library; names it and the cure.
    """
    model = _parse(serialized_model)
    _check_settings(model)
    fast = tokenizers.Tokenizer(_model(model))
    fast.normalizer = _normalizer(model, serialized_model)
    fast.decoder = _decoder(model)
    piece = type(model).SentencePiece
    added = {piece.CONTROL: True, piece.UNKNOWN: True, piece.USER_DEFINED: False}
    # User-defined pieces are found after normalisation, as in SentencePiece, where one with a space is never found.
    fast.add_tokens(
        [
            AddedToken(p.piece, special=added[p.type], normalized=not added[p.type])
            for p in model.pieces
            if p.type in added and " " not in p.piece
        ]
    )
    return fast


def doubtful_texts(serialized_model: bytes) -> list[str]:
    """Texts for each difference that the module's docstring lists and that this model may show."""
    model = _parse(serialized_model)
    piece = type(model).SentencePiece
    symbols = [p.piece for p in model.pieces if p.type == piece.USER_DEFINED]
    names = [p.piece for p in model.pieces if p.type in (piece.CONTROL, piece.UNKNOWN, piece.BYTE)]
    marks = _COMBINING if model.normalizer_spec.precompiled_charsmap else []
    spaces = ["\n".join("a" + " " * n + "b" for n in range(2, 50))] if _is_unigram(model) else []
    return [*symbols[:1], *names[:5], *marks, *spaces]


def _parse(serialized_model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(serialized_model)
    return model


def _is_unigram(model: Any) -> bool:
    return bool(model.trainer_spec.model_type == model.trainer_spec.UNIGRAM)


def _check_settings(model: Any) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    piece = type(model).SentencePiece
    symbols = [p.piece for p in model.pieces if p.type == piece.USER_DEFINED]
    kinds = {trainer.BPE: "bpe", trainer.UNIGRAM: "unigram", trainer.WORD: "word", trainer.CHAR: "char"}
    reasons = {
        f"model_type={kinds.get(trainer.model_type)}": trainer.model_type not in (trainer.BPE, trainer.UNIGRAM),
        "treat_whitespace_as_suffix=true": trainer.treat_whitespace_as_suffix,
        "escape_whitespaces=false": not normalizer.escape_whitespaces,
        "denormalization_rule_tsv": bool(model.denormalizer_spec.precompiled_charsmap),
        "unused pieces": any(p.type == piece.UNUSED for p in model.pieces),
        # The library would search for the symbols without these spaces, or for an empty text.
        "remove_extra_whitespaces=true and user-defined symbols that begin or end with a space": (
            normalizer.remove_extra_whitespaces and any(symbol != symbol.strip(_SPACE) for symbol in symbols)
        ),
    }
    for setting, present in reasons.items():
        if present:
            raise ConfigError(f"the SentencePiece model has {setting}, which no fast tokenizer can do; {CURE}")


def _model(model: Any) -> models.Model:
    from transformers.convert_slow_tokenizer import generate_merges

    trainer, normal = model.trainer_spec, type(model).SentencePiece.NORMAL
    scores = {p.piece: p.score for p in model.pieces if p.type == normal}
    if _is_unigram(model):
        # Only ordinary pieces are found in text. The others must be in the vocabulary, with scores too low to choose.
        never = min(scores.values(), default=-1.0) * 100 - 100
        vocab = [(p.piece, scores.get(p.piece, never)) for p in model.pieces]
        return models.Unigram(vocab, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    merges = generate_merges({p.piece: i for i, p in enumerate(model.pieces) if p.type == normal}, scores)
    return models.BPE(
        {p.piece: i for i, p in enumerate(model.pieces)},
        merges,
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _normalizer(model: Any, serialized_model: bytes) -> normalizers.Normalizer:
    spec = model.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        # The library treats "\r\n" as one character, and its map has no such character.
        steps.append(normalizers.Replace("\r\n", _line_break(serialized_model)))
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(_dummy_prefix(model))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _dummy_prefix(model: Any) -> normalizers.Normalizer:
    """Put a space before a text, but not before the patterns of user-defined symbols, which are normalised too."""
    symbols = [re.escape(p.piece) for p in model.pieces if p.type == type(p).USER_DEFINED and " " not in p.piece]
    if not symbols:
        return normalizers.Prepend(_SPACE)
    return normalizers.Replace(Regex(rf"\A(?!(?:{'|'.join(symbols)})\z)(?=[\s\S])"), _SPACE)


def _line_break(serialized_model: bytes) -> str:
    """The result of the character map alone for "\\r\\n"."""
    from sentencepiece import SentencePieceProcessor

    model = _parse(serialized_model)
    spec = model.normalizer_spec
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = spec.escape_whitespaces = False
    written: str = SentencePieceProcessor(model_proto=model.SerializeToString()).normalize("\r\n")
    return written


def _decoder(model: Any) -> decoders.Decoder:
    spec = model.normalizer_spec
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 2**31, 0))
    elif spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
