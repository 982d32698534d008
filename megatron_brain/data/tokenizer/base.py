"""The class of all tokenizers, and the one rule for BOS and EOS.

Only this module has the rule:

- a prompt is ``[BOS] + encode(text)``, with BOS only where the tokenizer adds one by itself;
- a response is ``encode(text) + [EOS]``;
- prompt and response are tokenised separately and then joined, so that SFT, reward model, sampling and
  scoring see the same ids on both sides of the boundary (with a token across it, the ids would differ
  from every continuation that sampling can make of that prompt);
- a response continues a text: a tokenizer that puts a word mark before every text puts none before a
  response, unless the joined text would have one there too.

A text that a chat template has rendered (``chat=True``) already holds its special tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from megatron_brain.errors import ConfigError

Tools = list[dict[str, Any]]
"""JSON schemas of functions."""


@dataclass(frozen=True)
class Before:
    """What precedes a text: the text before it, and the last id of that text."""

    text: str
    last_id: int | None


PLAIN_TEXT = Before("a", None)
"""A text before that ends in a letter."""


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        tokenizer_type: the name that :func:`build_tokenizer` takes.
        vocab_size: number of embedding rows that a model needs: the largest id + 1, added tokens included.
        bos_id: id of the begin-of-sequence token, or None.
        adds_bos: True where every plain prompt starts with ``bos_id``.
        eos_id: id that ends every complete response.
        pad_id: a valid id other than ``eos_id``. No mask may be derived from it.
        special_ids: ids of special tokens, which only a chat template writes into a text.
        special_texts: texts of these tokens.
        chat_templates: the Jinja templates of chat records by name; records without tools use "default".
        template_time: the time that templates take for now where they write a date; the same for a whole run.
    """

    tokenizer_type: str
    vocab_size: int
    bos_id: int | None
    adds_bos: bool
    eos_id: int
    pad_id: int
    special_ids: frozenset[int] = frozenset()
    special_texts: frozenset[str] = frozenset()
    chat_templates: Mapping[str, str] = {}
    template_time: datetime

    @property
    def uses_clock(self) -> bool:
        """Whether a chat template writes the date or the time."""
        return any("strftime_now" in template for template in self.chat_templates.values())

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[list[int]]:
        """Token ids of each text, without BOS or EOS.

        Args:
            texts: any number of texts.
            parse_special: False takes the text literally (``"</s>"`` becomes ordinary tokens). True turns
                the names of special tokens into their ids, which the output of a chat template needs.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids. Special tokens and ids that have no token (padded vocabulary) are left out."""

    def encode_continuations(
        self, texts: Sequence[str], before: Sequence[Before], *, parse_special: bool = False
    ) -> list[list[int]]:
        """Token ids of texts that each continue another text, without the word mark of a beginning.

        Args:
            texts: as `encode_batch` takes them.
            before: what precedes each text.
            parse_special: as `encode_batch` takes it.
        """
        return self.encode_batch(texts, parse_special=parse_special)

    @property
    def marks_words(self) -> bool:
        """Whether the tokenizer puts a word mark before every text. A response after a prompt must not have one."""
        return False

    def decode_response(self, ids: Sequence[int]) -> str:
        """Text of a response that follows a prompt, including a space at its beginning."""
        if not self.marks_words:
            return self.decode(ids)
        letter = self.encode("a")
        return self.decode([*letter, *ids]).removeprefix(self.decode(letter))

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write the tokenizer so that ``build_tokenizer(self.tokenizer_type, directory)`` reads it back."""

    @abstractmethod
    def export(self, directory: str | Path, head: Literal["policy", "reward"]) -> None:
        """Write the tokenizer so that ``AutoTokenizer.from_pretrained(directory)`` encodes and decodes as this one.

        `AutoTokenizer` encodes a text as a prompt: with BOS where ``adds_bos``, never with EOS. It turns the names of
        special tokens into their ids (so a response can get its EOS); ``split_special_tokens=True`` prevents that.

        Args:
            directory: made if missing; other files in it stay.
            head: head of the model beside it. A reward is read at the last token: the tokenizer of a reward model pads
                on the right and cuts on the left.

        Raises:
            ConfigError: `transformers` cannot do what this tokenizer does; names the setting or the text, and the cure.
        """

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, taken literally, without BOS or EOS."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of one prompt: see :meth:`encode_prompts`."""
        return self.encode_prompts([text], chat=chat)[0]

    def encode_response(self, text: str, *, chat: bool = False, before: Before = PLAIN_TEXT) -> list[int]:
        """Token ids of one response, ending in EOS: see :meth:`encode_responses`."""
        return self.encode_responses([text], [before], chat=chat)[0]

    def encode_prompts(self, texts: Sequence[str], *, chat: bool = False) -> list[list[int]]:
        """Token ids of prompts. A plain one starts with BOS where ``adds_bos``; a chat template writes its own BOS."""
        batch = self.encode_batch(texts, parse_special=chat)
        if self.adds_bos and not chat:
            assert self.bos_id is not None
            return [[self.bos_id, *ids] for ids in batch]
        return batch

    def encode_responses(
        self, texts: Sequence[str], before: Sequence[Before] | None = None, *, chat: bool = False
    ) -> list[list[int]]:
        """Token ids of complete responses, each ending in exactly one EOS.

        A rendered assistant turn (``chat=True``) often ends in EOS and a line break. The line break is cut, because
        sampling stops at EOS. Where the template ends a turn with another special token, EOS follows that token.

        Args:
            texts: the responses.
            before: the prompt of each response. Without `before`, all prompts are taken to end in a letter.
        """
        before = [PLAIN_TEXT] * len(texts) if before is None else before
        batch = self.encode_continuations(texts, before, parse_special=chat)
        if chat:
            return [self.close_turn(ids) for ids in batch]
        return [[*ids, self.eos_id] for ids in batch]

    def encode_pieces(self, pieces: Sequence[str]) -> list[list[int]]:
        """Token ids of consecutive pieces of one rendered chat. No token reaches from one piece into the next."""
        if not self.marks_words:
            return self.encode_batch(pieces, parse_special=True)
        first, *rest = pieces
        encoded = self.encode_batch([first], parse_special=True)
        for text in rest:
            last = next((ids[-1] for ids in reversed(encoded) if ids), None)
            encoded += self.encode_continuations([text], [Before(pieces[len(encoded) - 1], last)], parse_special=True)
        return encoded

    def close_turn(self, ids: Sequence[int]) -> list[int]:
        """A rendered assistant turn that ends in exactly one EOS, whatever the template closes it with.

        The first EOS among the special tokens and white space at its end ends it. Where there is none, EOS is put after
        the last special token. White space before that EOS is left out after a special token; otherwise it is text.
        """
        closing = len(ids)
        while closing and (ids[closing - 1] in self.special_ids or self.is_space(ids[closing - 1])):
            closing -= 1
        ends = [place for place in range(closing, len(ids)) if ids[place] == self.eos_id]
        if not ends:
            return [*ids[: self.turn_length(ids)], self.eos_id]
        before = self._without_space(ids[: ends[0]])
        end = before if before and ids[before - 1] in self.special_ids else ends[0]
        return [*ids[:end], self.eos_id]

    def turn_length(self, ids: Sequence[int]) -> int:
        """Length of a rendered turn without the white space after the special token that ends it."""
        end = self._without_space(ids)
        return end if end and ids[end - 1] in self.special_ids else len(ids)

    def _without_space(self, ids: Sequence[int]) -> int:
        """Length of the ids without the tokens of white space at their end."""
        end = len(ids)
        while end and self.is_space(ids[end - 1]):
            end -= 1
        return end

    def is_space(self, token: int) -> bool:
        """Whether a token writes white space or nothing, as the prefix that SentencePiece puts before a text does."""
        return token not in self.special_ids and not self.decode([token]).strip()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Tools | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The messages as the chat template writes them.

        Args:
            messages: `{"role", "content", ...}` each; arguments of tool calls are objects.
            add_generation_prompt: whether the text ends in the opening of an assistant turn.
            tools: JSON schemas of functions.
            template_kwargs: further variables of the template, such as `enable_thinking`.

        Raises:
            ConfigError: the tokenizer has no chat template.
            TemplateRefusalError: the template does not take the messages.
        """
        raise ConfigError(self._no_chat_template())

    def render_chat_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Tools | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The messages as the chat template writes them, and where ``{% generation %}`` blocks start and end in it.

        Raises:
            the errors of :meth:`render_chat`.
        """
        raise ConfigError(self._no_chat_template())

    def opens_behind(self, tools: Tools | None = None) -> str:
        """What the template for these tools writes after every conversation to open another turn; "" if nothing."""
        return ""

    def marks_turns(self, tools: Tools | None = None) -> bool:
        """Whether the template for these tools has ``{% generation %}`` blocks."""
        return False

    def _no_chat_template(self) -> str:
        return (
            f"{self.tokenizer_type} has no chat template: give --chat-template FILE, use a HuggingFaceTokenizer whose "
            "directory has one (chat_template.jinja), or plain {'prompt', 'completion'} records"
        )
