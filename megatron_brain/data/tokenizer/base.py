"""What every tokenizer does, and the one rule of BOS and EOS.

The rule lives here and nowhere else:

- a prompt is ``[BOS] + encode(text)``, BOS only where the tokenizer adds one by itself;
- a response is ``encode(text) + [EOS]``;
- prompt and response are tokenised apart and then joined, so that SFT, reward model, sampling and
  scoring see the same ids on both sides of the boundary (a merge across it would be an id sequence
  that sampling after that prompt can never continue).

A text that a chat template has rendered (``chat=True``) already holds its special tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal


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
        end = self.turn_length(ids)
        if not end or ids[end - 1] not in self.special_ids:
            return [*ids, self.eos_id]
        if ids[end - 1] == self.eos_id:
            # Some templates end the turn with a token of its own and the conversation with EOS.
            before = self._without_space(ids[: end - 1])
            end = before if before and ids[before - 1] in self.special_ids else end - 1
        return [*ids[:end], self.eos_id]

    def turn_length(self, ids: Sequence[int]) -> int:
        """Length of a rendered turn without white space behind the special token that ends it."""
        end = self._without_space(ids)
        return end if end and ids[end - 1] in self.special_ids else len(ids)

    def _without_space(self, ids: Sequence[int]) -> int:
        """Length of the ids without the tokens of white space at their end."""
        end = len(ids)
        while end and self.is_space(ids[end - 1]):
            end -= 1
        return end

    def is_space(self, token: int) -> bool:
        """Whether a token writes white space or, as the prefix that SentencePiece puts before a text, nothing."""
        return token not in self.special_ids and not self.decode([token]).strip()

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, tools: list | None = None
    ) -> str:
        """The messages as the chat template writes them.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        raise ValueError(self._no_chat_template())

    def render_chat_marked(
        self, messages: Sequence[Mapping[str, Any]], *, tools: list | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The messages as the chat template writes them, and where in that ``{% generation %}`` blocks start and end.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        raise ValueError(self._no_chat_template())

    def _no_chat_template(self) -> str:
        return (
            f"{self.tokenizer_type} has no chat template: use a HuggingFaceTokenizer whose directory has one "
            "(chat_template.jinja), or plain {'prompt', 'completion'} records"
        )
