"""Tokenizers: Hugging Face directories and SentencePiece model files behind one class.

The BOS and EOS rule of every stage lives here and nowhere else:

- a prompt is ``[BOS] + encode(text)``, BOS only where the tokenizer adds one by itself;
- a response is ``encode(text) + [EOS]``;
- prompt and response are tokenised apart and then joined, so that SFT, reward model, sampling and
  scoring see the same ids on both sides of the boundary (a merge across it would be an id sequence
  that sampling after that prompt can never continue).

A text that a chat template has rendered (``chat=True``) already holds its special tokens.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2

from megatron_brain.data.tokenizer_export import check_exported, finish_config, warn_of_differences

logger = logging.getLogger(__name__)

SENTENCEPIECE_FILE = "tokenizer.model"


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        tokenizer_type: name that :func:`build_tokenizer` takes.
        vocab_size: number of embedding rows that a model needs: the largest id + 1, added tokens included.
        bos_id: id of the begin-of-sequence token, or None.
        adds_bos: True where every plain prompt starts with ``bos_id``.
        eos_id: id that ends every complete response.
        pad_id: a valid id other than ``eos_id``. No mask may be derived from it.
        special_ids: ids of special tokens, which only a chat template writes into a text.
        chat_template: the Jinja template of chat records, or None.
    """

    tokenizer_type: str
    vocab_size: int
    bos_id: int | None
    adds_bos: bool
    eos_id: int
    pad_id: int
    special_ids: frozenset[int] = frozenset()
    chat_template: str | None = None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[list[int]]:
        """Token ids of each text, no BOS or EOS added.

        Args:
            texts: any number of texts.
            parse_special: False takes the text literally (``"</s>"`` becomes ordinary tokens); True turns
                the names of special tokens into their ids, as the output of a chat template needs.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids. Special tokens and ids that have no token (padded vocabulary) are left out."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write the tokenizer so that ``build_tokenizer(self.tokenizer_type, directory)`` reads it back."""

    @abstractmethod
    def export(self, directory: str | Path, head: Literal["policy", "reward"]) -> None:
        """Write the tokenizer so that ``AutoTokenizer.from_pretrained(directory)`` encodes and decodes as this one.

        A text is encoded as a prompt: BOS where ``adds_bos``, never EOS. The names of special tokens in a text become
        their ids, which is how a response gets its EOS there; ``split_special_tokens=True`` takes them literally.

        Args:
            directory: made if missing; other files in it stay.
            head: of the model beside it. A reward model is read at the end of text: its tokenizer pads on the right
                and cuts on the left.

        Raises:
            ValueError: `transformers` cannot do what this tokenizer does; names the setting or the text, and the cure.
        """

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, taken literally, without BOS or EOS."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of one prompt: see :meth:`encode_prompts`."""
        return self.encode_prompts([text], chat=chat)[0]

    def encode_response(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of one response, ending in EOS: see :meth:`encode_responses`."""
        return self.encode_responses([text], chat=chat)[0]

    def encode_prompts(self, texts: Sequence[str], *, chat: bool = False) -> list[list[int]]:
        """Token ids of prompts. A plain one starts with BOS where ``adds_bos``; a chat template writes its own."""
        batch = self.encode_batch(texts, parse_special=chat)
        if self.adds_bos and not chat:
            return [[self.bos_id, *ids] for ids in batch]
        return batch

    def encode_responses(self, texts: Sequence[str], *, chat: bool = False) -> list[list[int]]:
        """Token ids of complete responses, each ending in exactly one EOS.

        A rendered assistant turn (``chat=True``) often ends in EOS and a line break: the line break is cut,
        since sampling stops at EOS. Where the template ends a turn with another special token, EOS follows that.
        """
        batch = self.encode_batch(texts, parse_special=chat)
        if chat:
            return [self.close_turn(ids) for ids in batch]
        return [[*ids, self.eos_id] for ids in batch]

    def close_turn(self, ids: Sequence[int]) -> list[int]:
        """A rendered assistant turn with one EOS: in place of its own, else behind the special token that ends it.

        White space after either is left out; behind a turn that ends in neither, EOS just follows.
        """
        end = self._without_space(ids)
        if not end or ids[end - 1] not in self.special_ids:
            return [*ids, self.eos_id]
        if ids[end - 1] == self.eos_id:
            # Some templates end the turn with a token of its own and the conversation with EOS.
            before = self._without_space(ids[: end - 1])
            end = before if before and ids[before - 1] in self.special_ids else end - 1
        return [*ids[:end], self.eos_id]

    def _without_space(self, ids: Sequence[int]) -> int:
        """Length of the ids without the tokens of white space at their end."""
        end = len(ids)
        while end and self.decode(ids[end - 1 : end]).isspace():
            end -= 1
        return end

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, tools: list | None = None
    ) -> str:
        """The messages as the chat template writes them.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        raise ValueError(self._no_chat_template())

    def encode_chat_marked(
        self, messages: Sequence[Mapping[str, Any]], *, tools: list | None = None
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation and, per token, whether ``{% generation %}`` of the template marks it.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        raise ValueError(self._no_chat_template())

    def _no_chat_template(self) -> str:
        return (
            f"{self.tokenizer_type} has no chat template: use a HuggingFaceTokenizer whose directory has one "
            "(chat_template.jinja), or plain {'prompt', 'completion'} records"
        )


class HuggingFaceTokenizer(Tokenizer):
    """A directory or hub name that ``transformers.AutoTokenizer`` reads. Code of the directory is never run."""

    tokenizer_type = "HuggingFaceTokenizer"

    def __init__(self, tokenizer_model: str) -> None:
        from transformers import AutoTokenizer

        try:
            self.hf = AutoTokenizer.from_pretrained(tokenizer_model, trust_remote_code=False)
        except Exception as error:  # the library's readers raise many unrelated types for a bad directory
            raise ValueError(
                f"--tokenizer-model {tokenizer_model}: AutoTokenizer cannot read it ({type(error).__name__}: {error}); "
                "give a directory with tokenizer.json and tokenizer_config.json, or a hub name that can be reached"
            ) from error
        if self.hf.eos_token_id is None:
            raise ValueError(
                f"--tokenizer-model {tokenizer_model}: no EOS token, so no response could end; "
                "set eos_token in tokenizer_config.json"
            )
        self.eos_id = self.hf.eos_token_id
        self.bos_id = self.hf.bos_token_id
        self.adds_bos = self.bos_id is not None and self.hf("a")["input_ids"][:1] == [self.bos_id]
        self.vocab_size = max(self.hf.get_vocab().values()) + 1
        templates = self.hf.chat_template
        self.chat_template = templates.get("default") if isinstance(templates, dict) else templates
        added = {i for i, token in self.hf.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(added | set(self.hf.all_special_ids))
        self.pad_id = self._choose_pad()
        self._warn_of_other_end_of_turn()
        if self.eos_id in self.encode(self.hf.eos_token):
            logger.warning(
                "%s cannot take special tokens literally: %r inside a text ends the response there",
                tokenizer_model,
                self.hf.eos_token,
            )

    def _choose_pad(self) -> int:
        """The tokenizer's pad id, or another valid id where it is missing or EOS.

        An id that is special anyway also becomes the pad token of the saved tokenizer, so that a classifier
        exported beside it finds the last token (EOS) of a right-padded row. An ordinary token stays ordinary.
        """
        if self.hf.pad_token_id is not None and self.hf.pad_token_id != self.eos_id:
            return self.hf.pad_token_id
        special = sorted(self.special_ids - {self.eos_id})
        named_pad = [i for i in special if "pad" in self.hf.convert_ids_to_tokens(i).lower()]
        unknown = [i for i in special if i == self.hf.unk_token_id]
        rest = sorted(special, key=lambda i: i == self.bos_id)
        candidates = named_pad + unknown + rest
        pad_id = candidates[0] if candidates else min(set(self.hf.get_vocab().values()) - {self.eos_id})
        token = self.hf.convert_ids_to_tokens(pad_id)
        if candidates:
            self.hf.pad_token = token
        logger.info("tokenizer pads with id %d (%r): it has no pad token of its own other than EOS", pad_id, token)
        return pad_id

    def _warn_of_other_end_of_turn(self) -> None:
        """Say where the template ends turns with another token than EOS, the only one that sampling stops at."""
        if self.chat_template is None:
            return
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            rendered = self.render_chat(messages, add_generation_prompt=False)
        except (jinja2.TemplateError, TypeError, ValueError):
            return  # It takes other messages than these; what is wrong with a record is said there.
        [ids] = self.encode_batch([rendered.rpartition("answer")[2]], parse_special=True)
        end = next((i for i in ids if i in self.special_ids), self.eos_id)
        if end != self.eos_id:
            logger.warning(
                "the chat template ends a turn with %r, but EOS is %r, and sampling stops at EOS alone: training "
                "teaches both, one after the other; for a model that already stops at %r, make that the eos_token in "
                "tokenizer_config.json",
                self.hf.convert_ids_to_tokens(end),
                self.hf.eos_token,
                self.hf.convert_ids_to_tokens(end),
            )

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[list[int]]:
        if not texts:
            return []
        return self.hf(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=not parse_special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if 0 <= i < self.vocab_size]
        return self.hf.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, directory: str | Path) -> None:
        self.hf.save_pretrained(str(directory))

    def export(self, directory: str | Path, head: Literal["policy", "reward"]) -> None:
        self.save(directory)
        finish_config(Path(directory), head)
        if head == "reward" and self.hf.pad_token_id != self.pad_id:
            logger.warning(
                "%s: the tokenizer pads with %s, which transformers would read the reward at: pad with id %d",
                directory,
                self.hf.pad_token,
                self.pad_id,
            )
        check_exported(directory, self)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, tools: list | None = None
    ) -> str:
        if self.chat_template is None:
            raise ValueError(self._no_chat_template())
        return self.hf.apply_chat_template(
            list(messages),
            tools=tools,
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def encode_chat_marked(
        self, messages: Sequence[Mapping[str, Any]], *, tools: list | None = None
    ) -> tuple[list[int], list[bool]]:
        if self.chat_template is None:
            raise ValueError(self._no_chat_template())
        output = self.hf.apply_chat_template(
            list(messages),
            tools=tools,
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(output["input_ids"]), [bool(m) for m in output["assistant_masks"]]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file, or a directory that holds one as ``tokenizer.model``.

    BOS is added where the model has one, as Llama and Mistral were trained (the file itself has no such
    setting). Control symbols are never read from text; user-defined symbols are, as their model asks.
    """

    tokenizer_type = "SentencePieceTokenizer"

    def __init__(self, tokenizer_model: str) -> None:
        import sentencepiece

        self.path = Path(tokenizer_model)
        if self.path.is_dir():
            self.path = self.path / SENTENCEPIECE_FILE
        if not self.path.is_file():
            raise ValueError(f"--tokenizer-model {tokenizer_model}: no file {self.path.absolute()}")
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"--tokenizer-model {self.path}: not a SentencePiece model ({error})") from error
        if self.sp.eos_id() < 0:
            raise ValueError(f"--tokenizer-model {self.path}: no EOS piece; train the model with --eos_id set")
        self.eos_id = self.sp.eos_id()
        self.bos_id = self.sp.bos_id() if self.sp.bos_id() >= 0 else None
        self.adds_bos = self.bos_id is not None
        self.vocab_size = self.sp.get_piece_size()
        self.pad_id = self.sp.pad_id()
        if self.pad_id < 0 or self.pad_id == self.eos_id:
            self.pad_id = self.sp.unk_id()
            logger.info("tokenizer pads with id %d (unknown): it has no pad piece other than EOS", self.pad_id)

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[list[int]]:
        if parse_special:
            raise ValueError(self._no_chat_template())
        return self.sp.encode(list(texts), out_type=int)

    def decode(self, ids: Sequence[int]) -> str:
        return self.sp.decode([int(i) for i in ids if 0 <= i < self.vocab_size and not self.sp.is_control(int(i))])

    def save(self, directory: str | Path) -> None:
        target = Path(directory) / SENTENCEPIECE_FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not copied: the checkpoint that the tokenizer was read from may be gone by now.
        target.write_bytes(self.sp.serialized_model_proto())

    def export(self, directory: str | Path, head: Literal["policy", "reward"]) -> None:
        """As :meth:`Tokenizer.export`; ``tokenizer.model`` is written too, for readers that take it."""
        from transformers import PreTrainedTokenizerFast

        from megatron_brain.data.sentencepiece_fast import CURE, doubtful_texts, fast_tokenizer

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
        warn_of_differences(directory, self, doubtful_texts(model), f"texts of this kind differ, others do not; {CURE}")


TOKENIZER_TYPES: dict[str, type[Tokenizer]] = {
    cls.tokenizer_type: cls for cls in (HuggingFaceTokenizer, SentencePieceTokenizer)
}


def build_tokenizer(tokenizer_type: str, tokenizer_model: str | Path) -> Tokenizer:
    """The tokenizer of ``--tokenizer-type`` and ``--tokenizer-model``.

    Args:
        tokenizer_type: a key of ``TOKENIZER_TYPES`` (Megatron-LM's names).
        tokenizer_model: directory or hub name (HuggingFaceTokenizer), or ``.model`` file (SentencePieceTokenizer);
            or a directory that :meth:`Tokenizer.save` wrote.

    Raises:
        ValueError: unknown type, unreadable model, or a tokenizer without EOS.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise ValueError(f"--tokenizer-type {tokenizer_type}: must be one of {', '.join(TOKENIZER_TYPES)}")
    return TOKENIZER_TYPES[tokenizer_type](str(tokenizer_model))


def check_fits(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raise ValueError where the tokenizer has ids for which the model has no embedding row.

    Args:
        tokenizer: any tokenizer.
        model_vocab_size: embedding rows of the model, padding for tensor parallelism included or not.
    """
    if tokenizer.vocab_size > model_vocab_size:
        raise ValueError(
            f"the tokenizer needs a vocabulary of {tokenizer.vocab_size} ids and the model has {model_vocab_size}: "
            "give --tokenizer-model the tokenizer that belongs to the model, or resize the model's embeddings "
            "(transformers: model.resize_token_embeddings(len(tokenizer))) and convert it again"
        )
