"""Tokenizers that `transformers` reads."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from megatron_brain.data.tokenizer.base import Before, Tokenizer, Tools
from megatron_brain.data.tokenizer.bos import settle_bos
from megatron_brain.data.tokenizer.chat_template import ChatRenderer, TemplateRefusalError, marks_turns, read_template
from megatron_brain.data.tokenizer.export import check_exported, finish_config, warn_of_joins
from megatron_brain.data.tokenizer.own_file import read_tokenizer
from megatron_brain.data.tokenizer.word_mark import begins_word, without_word_mark
from megatron_brain.errors import ConfigError

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LETTER = "a"


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer that ``transformers.AutoTokenizer`` reads. Code in its directory is never run.

    Args:
        tokenizer_model: directory or hub name.
        chat_template: file of a Jinja template that replaces the tokenizer's own ones.

    Raises:
        ConfigError: there is no tokenizer, it has no EOS, or its files contradict each other.
    """

    tokenizer_type = "HuggingFaceTokenizer"

    def __init__(self, tokenizer_model: str, chat_template: str | None = None) -> None:
        if not Path(tokenizer_model).exists() and not _HUB_NAME.fullmatch(tokenizer_model):
            place = Path(tokenizer_model).absolute()
            raise ConfigError(f"--tokenizer-model {tokenizer_model}: no such folder (looked for {place})")
        self.hf, own = read_tokenizer(tokenizer_model)
        if self.hf.eos_token_id is None:
            raise ConfigError(
                f"--tokenizer-model {tokenizer_model}: no EOS token, so no response could end; "
                "set eos_token in tokenizer_config.json"
            )
        if chat_template is not None:
            self.hf.chat_template = read_template(chat_template)
        self.eos_id = self.hf.eos_token_id
        self.bos_id = self.hf.bos_token_id
        self.adds_bos = settle_bos(self.hf, tokenizer_model, own)
        self.vocab_size = max(self.hf.get_vocab().values()) + 1
        added = self.hf.added_tokens_decoder
        self._added_ids = frozenset(added)
        self.special_ids = frozenset({i for i, token in added.items() if token.special} | set(self.hf.all_special_ids))
        self.special_texts = frozenset(self.hf.convert_ids_to_tokens(sorted(self.special_ids)))
        self._chats = ChatRenderer(self.hf)
        self.chat_templates = self._chats.templates
        backend = getattr(self.hf, "backend_tokenizer", None)
        self._unmarked = None if backend is None else without_word_mark(backend)
        self._marks_after_added = self._unmarked is not None and self._finds_mark_after_added()
        self._cuts_spaces = self._unmarked is not None and self._finds_spaces_cut()
        self.pad_id = self._choose_pad()
        self._warn_of_ends_of_turns()
        if self.eos_id in self.encode(self.hf.eos_token):
            logger.warning(
                "%s cannot take special tokens literally: %r inside a text ends the response there",
                tokenizer_model,
                self.hf.eos_token,
            )

    @property
    def template_time(self) -> datetime:
        return self._chats.time

    @template_time.setter
    def template_time(self, time: datetime) -> None:
        self._chats.time = time

    def _finds_mark_after_added(self) -> bool:
        """Whether a word mark also follows added tokens, and not only begins a text."""
        [joined], [alone] = (
            self.encode_batch([text], parse_special=True) for text in (self.hf.eos_token + _LETTER, _LETTER)
        )
        return joined[1:] == alone

    def _finds_spaces_cut(self) -> bool:
        """Whether the tokenizer drops white space at the beginning of a text."""
        assert self._unmarked is not None
        return (
            self._unmarked.encode(" a", add_special_tokens=False).ids
            == self._unmarked.encode("a", add_special_tokens=False).ids
        )

    def _has_mark(self, text: str, before: Before) -> bool:
        """Whether a text that continues another still gets a word mark: after an added token, or for a space that is
        cut from its beginning or from the end of the text before it."""
        if self._marks_after_added and before.last_id in self._added_ids:
            return True
        assert self._unmarked is not None
        space = before.text[-1:] if before.text[-1:].isspace() else ""
        return self._cuts_spaces and begins_word(self._unmarked.normalizer.normalize_str(f"{_LETTER}{space}{text}"))

    def _choose_pad(self) -> int:
        """The tokenizer's pad id, or another valid id where there is none or it is EOS.

        If the other id is a special token, it also becomes the pad token of the saved tokenizer, so that an exported
        classifier finds the last token (EOS) of a right-padded row. An ordinary token stays ordinary.
        """
        pad_id: int | None = self.hf.pad_token_id
        if pad_id is not None and pad_id != self.eos_id:
            return pad_id
        special = sorted(self.special_ids - {self.eos_id})
        named_pad = [i for i in special if "pad" in str(self.hf.convert_ids_to_tokens(i)).lower()]
        unknown = [i for i in special if i == self.hf.unk_token_id]
        rest = sorted(special, key=lambda i: i == self.bos_id)
        candidates = named_pad + unknown + rest
        pad_id = candidates[0] if candidates else min(set(self.hf.get_vocab().values()) - {self.eos_id})
        token = self.hf.convert_ids_to_tokens(pad_id)
        if candidates:
            self.hf.pad_token = token
        logger.info("tokenizer pads with id %d (%r): it has no pad token of its own other than EOS", pad_id, token)
        return pad_id

    def _warn_of_ends_of_turns(self) -> None:
        """Warn where the template writes no generation prompt, and where it ends turns with another token than EOS:
        sampling stops at EOS alone."""
        if not self.chat_templates:
            return
        if header := self._chats.header_of_answers():
            logger.warning(
                "the chat template writes no generation prompt: %r before an answer is learned as its beginning, and "
                "sampled with it; give one that writes it where add_generation_prompt is set (--chat-template FILE)",
                header,
            )
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            rendered = self.render_chat(messages, add_generation_prompt=False)
        except (TemplateRefusalError, ConfigError):
            return  # The template takes other messages than these. Problems with records are reported later.
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
        encoded: list[list[int]] = self.hf(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=not parse_special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return encoded

    def encode_continuations(
        self, texts: Sequence[str], before: Sequence[Before], *, parse_special: bool = False
    ) -> list[list[int]]:
        if self._unmarked is None or not texts:
            return self.encode_batch(texts, parse_special=parse_special)
        self._unmarked.encode_special_tokens = not parse_special
        encoded = [encoding.ids for encoding in self._unmarked.encode_batch(list(texts), add_special_tokens=False)]
        marked = [i for i, (text, last) in enumerate(zip(texts, before, strict=True)) if self._has_mark(text, last)]
        for i, ids in zip(marked, self.encode_batch([texts[i] for i in marked], parse_special=parse_special)):
            encoded[i] = ids
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if 0 <= i < self.vocab_size]
        text = self.hf.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    @property
    def marks_words(self) -> bool:
        return self._unmarked is not None

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
        if head == "reward":
            warn_of_joins(directory, self)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Tools | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        if not self.chat_templates:
            raise ConfigError(self._no_chat_template())
        text, _ = self._chats.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, template_kwargs=template_kwargs
        )
        return text

    def render_chat_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Tools | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        if not self.chat_templates:
            raise ConfigError(self._no_chat_template())
        return self._chats.render(messages, tools=tools, template_kwargs=template_kwargs, marked=True)

    def opens_behind(self, tools: Tools | None = None) -> str:
        return self._chats.opens_behind(tools) if self.chat_templates else ""

    def marks_turns(self, tools: Tools | None = None) -> bool:
        return bool(self.chat_templates) and marks_turns(self._chats.template_for(tools))
