"""Tokenizers from SentencePiece models, without `transformers`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_brain.data.tokenizer.base import Before, Tokenizer
from megatron_brain.data.tokenizer.export import (
    check_exported,
    finish_config,
    warn_of_differences,
    warn_of_joins,
)
from megatron_brain.data.tokenizer.word_mark import begins_word
from megatron_brain.errors import ConfigError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

logger = logging.getLogger(__name__)

SENTENCEPIECE_FILE = "tokenizer.model"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file, or a directory that holds one as ``tokenizer.model``.

    BOS is added where the model has one, because Llama and Mistral were trained so (the file itself has no such
    setting). Control symbols are never read from text. User-defined symbols are, because the model says so.
    """

    tokenizer_type = "SentencePieceTokenizer"

    def __init__(self, tokenizer_model: str, chat_template: str | None = None) -> None:
        import sentencepiece

        if chat_template is not None:
            raise ConfigError(
                f"--chat-template {chat_template}: a SentencePieceTokenizer renders no chats; use a "
                "HuggingFaceTokenizer, which tools/train_tokenizer.py and the export write beside it"
            )

        self.path = Path(tokenizer_model)
        if self.path.is_dir():
            self.path = self.path / SENTENCEPIECE_FILE
        if not self.path.is_file():
            raise ConfigError(
                f"--tokenizer-model {tokenizer_model}: no file {self.path.absolute()}; give a .model file, or a folder "
                f"with {SENTENCEPIECE_FILE}"
            )
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"--tokenizer-model {self.path}: not a SentencePiece model ({error}); copy the model's .model file "
                "there again, or give --tokenizer-type HuggingFaceTokenizer a folder"
            ) from error
        if self.sp.eos_id() < 0:
            raise ConfigError(f"--tokenizer-model {self.path}: no EOS piece; train the model with --eos_id set")
        self.eos_id = self.sp.eos_id()
        self.bos_id = self.sp.bos_id() if self.sp.bos_id() >= 0 else None
        self.adds_bos = self.bos_id is not None
        self.vocab_size = self.sp.get_piece_size()
        self._unmarked, self._folds_spaces = _without_word_mark(self.sp)
        self.pad_id = self.sp.pad_id()
        if self.pad_id < 0 or self.pad_id == self.eos_id:
            self.pad_id = self.sp.unk_id()
            logger.info("tokenizer pads with id %d (unknown): it has no pad piece other than EOS", self.pad_id)

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[list[int]]:
        if parse_special:
            raise ConfigError(self._no_chat_template())
        encoded: list[list[int]] = self.sp.encode(list(texts), out_type=int)
        return encoded

    def encode_continuations(
        self, texts: Sequence[str], before: Sequence[Before], *, parse_special: bool = False
    ) -> list[list[int]]:
        if self._unmarked is None or parse_special:
            return self.encode_batch(texts, parse_special=parse_special)
        return [
            (self.sp if self._begins_word(text, last.text) else self._unmarked).encode(text, out_type=int)
            for text, last in zip(texts, before, strict=True)
        ]

    def _begins_word(self, text: str, before: str) -> bool:
        """Whether the joined text has a word mark before `text`; only where the tokenizer folds white space.

        The mark of a beginning then replaces the space that was cut from the end of one text or the beginning of the
        other.
        """
        if not self._folds_spaces:
            return False
        return begins_word(self.sp.normalize(f"a{before[-1:] if before[-1:].isspace() else ''}{text}"))

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.sp.decode([int(i) for i in ids if 0 <= i < self.vocab_size and not self.sp.is_control(int(i))])
        return text

    @property
    def marks_words(self) -> bool:
        return self._unmarked is not None

    def save(self, directory: str | Path) -> None:
        target = Path(directory) / SENTENCEPIECE_FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        # The model is written from memory: the checkpoint that it was read from may be gone by now.
        target.write_bytes(self.sp.serialized_model_proto())

    def export(self, directory: str | Path, head: Literal["policy", "reward"]) -> None:
        """Do the same as :meth:`Tokenizer.export`, and also write ``tokenizer.model`` for readers that use it."""
        from transformers import PreTrainedTokenizerFast

        from megatron_brain.data.tokenizer.sentencepiece_fast import CURE, doubtful_texts, fast_tokenizer

        model = self.sp.serialized_model_proto()
        named = {
            "eos_token": self.eos_id,
            "bos_token": self.bos_id,
            "unk_token": self.sp.unk_id(),
            "pad_token": self.pad_id,
        }
        PreTrainedTokenizerFast(
            tokenizer_object=fast_tokenizer(model),
            **{name: self.sp.id_to_piece(i) for name, i in named.items() if i is not None},
            add_bos_token=self.adds_bos,
            add_eos_token=False,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(str(directory))
        finish_config(Path(directory), head)
        self.save(directory)
        check_exported(directory, self)
        if head == "reward":
            warn_of_joins(directory, self)
        warn_of_differences(directory, self, doubtful_texts(model), f"texts of this kind differ, others do not; {CURE}")


def _without_word_mark(sp: SentencePieceProcessor) -> tuple[SentencePieceProcessor | None, bool]:
    """The same model without the mark that it puts before every text (None where it puts none), and whether it folds
    white space."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(sp.serialized_model_proto())
    spec = model.normalizer_spec
    if not spec.add_dummy_prefix or model.trainer_spec.treat_whitespace_as_suffix:
        return None, False
    spec.add_dummy_prefix = False
    return SentencePieceProcessor(model_proto=model.SerializeToString()), spec.remove_extra_whitespaces
