"""Renders the messages of a record with the tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from megatron_brain.data.conversations import Messages
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.data.tokenizer.base import Tools
from megatron_brain.data.tokenizer.chat_template import TemplateRefusalError
from megatron_brain.data.tools import called_functions
from megatron_brain.errors import ConfigError, RecordError

Rendered = TypeVar("Rendered")


class Span(NamedTuple):
    """Characters [start, end) of a rendered text."""

    start: int
    end: int


class Chat:
    """Messages of a record under the chat template of a tokenizer.

    Args:
        tokenizer: renders the messages.
        messages: what `conversations.check_messages` returned.
        where: place of the record, for error messages.
        tools: what `tools.check_tools` returned.
        template_kwargs: further variables of the template.

    Attributes:
        settings: whether there are tools, and `template_kwargs` as JSON text; can be hashed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        messages: Messages,
        where: str,
        tools: Tools | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.messages, self.where = tokenizer, messages, where
        self.tools, self._kwargs = tools, dict(template_kwargs or {})
        self.settings = tools is not None, json.dumps(self._kwargs, sort_keys=True)
        self._rendered: dict[tuple[int, bool], str] = {}

    def closed(self, count: int) -> str:
        """Text of the first `count` messages.

        Raises:
            RecordError: the template refuses them, or leaves out the tools.
        """
        return self._text(count, add_generation_prompt=False)

    def opened(self, count: int) -> str:
        """Text of the first `count` messages and the opening of an assistant turn, which is what sampling continues.

        Raises:
            RecordError: as `closed`.
        """
        return self._text(count, add_generation_prompt=True)

    def marked(self) -> tuple[str, list[Span]]:
        """Text of all messages, and where the template's ``{% generation %}`` blocks are in it.

        Raises:
            RecordError: as `closed`.
        """
        text, blocks = self._attempt(self.tokenizer.render_chat_marked, self.messages, tools=self.tools)
        self._rendered[len(self.messages), False] = text
        self._require_tools()
        return text, [Span(*block) for block in blocks]

    def render(self, messages: Messages, *, add_generation_prompt: bool, with_tools: bool = True) -> str:
        """Text of other messages with the record's tools and settings.

        Raises:
            RecordError: the template refuses them.
        """
        tools = self.tools if with_tools else None
        return self._attempt(
            self.tokenizer.render_chat, messages, tools=tools, add_generation_prompt=add_generation_prompt
        )

    def _text(self, count: int, *, add_generation_prompt: bool) -> str:
        key = count, add_generation_prompt
        if key not in self._rendered:
            is_first = not self._rendered
            self._rendered[key] = self.render(self.messages[:count], add_generation_prompt=add_generation_prompt)
            if is_first:
                self._require_tools()
        return self._rendered[key]

    def _require_tools(self) -> None:
        """Raise RecordError where the template leaves out the tools, or one of them."""
        if self.tools is None:
            return
        (count, opened), text = next(iter(self._rendered.items()))
        without = self.render(self.messages[:count], add_generation_prompt=opened, with_tools=False)
        names = [function.get("name") for function in called_functions(self.tools)]
        left_out = names if text == without else [name for name in names if isinstance(name, str) and name not in text]
        if left_out:
            named = f"the tool {left_out[0]!r}" if left_out[0] else "a tool without a name"
            raise RecordError(
                self.where,
                "chat template",
                f"the chat template leaves out {named}: use a template that writes 'tools' (--chat-template FILE), or "
                "remove the field",
            )

    def _attempt(self, render: Callable[..., Rendered], messages: Messages, **settings: Any) -> Rendered:
        # The template does not see `weight`: which messages are learned must not change the text.
        said = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
        try:
            return render(said, template_kwargs=self._kwargs, **settings)
        except TemplateRefusalError as error:
            raise RecordError(
                self.where,
                "chat template",
                f"the chat template refuses these messages: {error}; give messages that it takes, or another template "
                "(--chat-template FILE)",
            ) from error
        except ConfigError as error:
            raise RecordError(self.where, "chat template", f"{error}") from error
