"""Chooses the chat template of a Hugging Face tokenizer for a record, and gives it the messages in the form it expects.

Templates differ in what they expect. Most write `message.content` as a text; those of multimodal models read its
parts. Most write the arguments of a tool call with `tojson`; a few expect JSON text. What a template expects is found
by rendering a message made for this purpose, so a record has the same meaning under all templates.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import jinja2

from megatron_brain.data.tokenizer.base import Tools
from megatron_brain.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
Marks = list[tuple[int, int]]
"""Starts and ends, in characters, of the texts that ``{% generation %}`` blocks have written."""

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*-?%\}")
_BOM = "\ufeff"
_WORD, _CALLED = "zqxword", "zqxcall"
_NoContent = Literal["absent", "null", "empty"]
_NO_CONTENTS: tuple[_NoContent, ...] = get_args(_NoContent)


class TemplateRefusalError(Exception):
    """A chat template does not take some messages: it raised its own error, or missed something that it expected."""


def read_template(path: str) -> str:
    """The Jinja template in a file.

    Raises:
        ConfigError: there is no such file, or it is not UTF-8 or not Jinja.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        template = Path(path).read_text(encoding="utf-8-sig")
        _compile_jinja_template(template)
    except OSError as error:
        raise ConfigError(
            f"--chat-template {path}: {error.strerror or error} (looked for {Path(path).absolute()}); give the file of "
            "a Jinja template"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--chat-template {path}: not UTF-8 text ({error.reason} at byte {error.start}); write the file as UTF-8"
        ) from error
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"--chat-template {path}: not a Jinja template (line {error.lineno}: {error}); mend that line, or leave "
            "--chat-template out for the tokenizer's own"
        ) from error
    if not template.strip():
        raise ConfigError(
            f"--chat-template {path}: the file is empty; write a template into it, or leave --chat-template out for "
            "the tokenizer's own"
        )
    return template


def marks_turns(template: str) -> bool:
    """Whether a template has ``{% generation %}`` blocks."""
    return _GENERATION_BLOCK.search(template) is not None


@dataclass(frozen=True)
class _Dialect:
    """The form of messages that a template expects."""

    parts: bool = False
    """Whether contents are lists of parts instead of texts."""
    text_arguments: bool = False
    """Whether arguments of tool calls are JSON text instead of objects."""
    no_content: _NoContent = "absent"
    """What stands for the content of a message that only calls tools."""

    def spell(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message as the template expects it."""
        spelled = dict(message)
        if self.parts and isinstance(message.get("content"), str):
            spelled["content"] = [{"type": "text", "text": message["content"]}]
        if self.text_arguments and message.get("tool_calls"):
            spelled["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
        if self.no_content != "absent" and "content" not in message:
            spelled["content"] = None if self.no_content == "null" else ""
        return spelled


class ChatRenderer:
    """Renders chats with the templates of a tokenizer.

    Args:
        hf: the tokenizer. Its `chat_template` is read once, and loses a byte order mark if it has one. Its special
            tokens are read whenever a chat is rendered.
    """

    def __init__(self, hf: PreTrainedTokenizerBase) -> None:
        self._hf = hf
        self.time = datetime.now()
        found = hf.chat_template
        self.templates: dict[str, str] = (
            {} if found is None else found if isinstance(found, dict) else {"default": found}
        )
        for name, template in self.templates.items():
            if not isinstance(template, str):
                raise ConfigError(
                    f"the tokenizer's chat template {name!r} is {template!r}, which is no text: mend chat_template in "
                    "tokenizer_config.json, or give --chat-template FILE"
                )
        if any(template.startswith(_BOM) for template in self.templates.values()):
            # The template would write the mark before every prompt, here and wherever the saved tokenizer is used.
            self.templates = {name: template.removeprefix(_BOM) for name, template in self.templates.items()}
            hf.chat_template = self.templates if isinstance(found, dict) else self.templates["default"]
        self._dialect = functools.cache(self._find_dialect)
        self._behind = functools.cache(self._find_behind)

    def template_for(self, tools: Tools | None) -> str:
        """The template for records with or without tools, chosen in the way of transformers.

        Raises:
            ConfigError: none of several templates is the default.
        """
        if tools is not None and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" not in self.templates:
            raise ConfigError(
                f"the tokenizer has the chat templates {', '.join(sorted(self.templates))} and none called default: "
                "give one with --chat-template FILE"
            )
        return self.templates["default"]

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        tools: Tools | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        marked: bool = False,
    ) -> tuple[str, Marks]:
        """Text of the messages and, if `marked`, the places of its generation blocks.

        Raises:
            TemplateRefusalError: the template does not take the messages.
            ConfigError: there is no template for them.
        """
        template = self.template_for(tools)
        spell = self._dialect(template).spell
        return self._render(
            template,
            [spell(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            template_kwargs=template_kwargs or {},
            marked=marked,
        )

    def opens_behind(self, tools: Tools | None) -> str:
        """What the template for these tools writes after every conversation to open another turn; "" if nothing."""
        return self._behind(self.template_for(tools))

    def header_of_answers(self) -> str:
        """What a template that writes no generation prompt puts between a question and its answer; "" for others."""
        user, answer = {"role": "user", "content": _WORD}, {"role": "assistant", "content": f"{_WORD}1"}
        try:
            template = self.template_for(None)
            spell = self._dialect(template).spell
            asked, closed = (
                self._render(template, [spell(user)], add_generation_prompt=asks)[0] for asks in (True, False)
            )
            both = self._render(template, [spell(user), spell(answer)])[0]
        except (TemplateRefusalError, ConfigError):
            return ""  # The record that the template refuses is reported later.
        header = both.removeprefix(closed).partition(answer["content"])[0] if both.startswith(closed) else ""
        return header.strip() if asked == closed else ""

    def _find_behind(self, template: str) -> str:
        """Compare three messages: find the text that follows only the last answer, and also precedes an answer."""
        spell = self._dialect(template).spell
        first, answer, second = (f"{_WORD}{number}" for number in range(3))
        messages = [
            spell({"role": role, "content": content})
            for role, content in (("user", first), ("assistant", answer), ("user", second))
        ]
        try:
            short, long = (self._render(template, messages[:count])[0] for count in (2, 3))
        except TemplateRefusalError:
            return ""  # The record that the template refuses is reported later.
        if any(text.count(answer) != 1 or text.count(first) != 1 for text in (short, long)):
            return ""
        end, middle = short.partition(answer)[2], long.partition(answer)[2].partition(second)[0]
        rest = end[len(os.path.commonprefix([end, middle])) :]
        opening = short.partition(first)[2].partition(answer)[0]
        return rest if rest.strip() and opening.rstrip().endswith(rest.rstrip()) else ""

    def _render(
        self,
        template: str,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Tools | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        marked: bool = False,
    ) -> tuple[str, Marks]:
        from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

        try:
            # The library caches the compiled template and renders it. The function cannot be given as an argument.
            _compile_jinja_template(template).globals["strftime_now"] = self.time.strftime
            # apply_chat_template does not serve: it tokenises the whole text and marks tokens, not characters.
            written: Any = render_jinja_template(
                conversations=[list(messages)],
                tools=None if tools is None else [*tools],
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=marked,
                **{**self._hf.special_tokens_map, **(template_kwargs or {})},
            )
            [text], marks = written
        except Exception as error:  # The template's expressions may raise anything.
            raise TemplateRefusalError(f"{error}" or type(error).__name__) from error
        return text, [(start, end) for start, end in marks[0]] if marked else []

    def _find_dialect(self, template: str) -> _Dialect:
        plain, parts = _Dialect(), _Dialect(parts=True)
        user = {"role": "user", "content": _WORD}
        spoken = self._writes(template, [user], plain) or not self._writes(template, [user], parts)
        dialect = plain if spoken else parts
        arguments = {_WORD: _WORD}
        call = {"id": "callzqxw0", "type": "function", "function": {"name": _CALLED, "arguments": arguments}}
        contents: tuple[dict[str, str], ...] = ({}, {"content": ""})
        for content in contents:
            calling: Messages = [user, {"role": "assistant", **content, "tool_calls": [call]}]
            for no_content, text_arguments in product(_NO_CONTENTS, (False, True)):
                tried = replace(dialect, no_content=no_content, text_arguments=text_arguments)
                written = json.dumps(arguments) if text_arguments else _CALLED
                if self._writes(template, calling, tried, wanted=written, but_not=repr(arguments)):
                    return tried
        # The template writes no calls. This is reported later, so rendering them must not fail here.
        takes = (replace(dialect, no_content=no_content) for no_content in _NO_CONTENTS)
        return next((tried for tried in takes if self._writes(template, calling, tried, wanted="")), dialect)

    def _writes(
        self, template: str, messages: Messages, dialect: _Dialect, *, wanted: str = _WORD, but_not: str | None = None
    ) -> bool:
        """Whether the template takes messages in a dialect and writes the text `wanted`, but not `but_not`."""
        try:
            text, _ = self._render(template, [dialect.spell(message) for message in messages])
        except TemplateRefusalError:
            return False
        return wanted in text and (but_not is None or but_not not in text)


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as JSON text, with or without the wrapper `{"type": "function", ...}`."""
    if "function" in call:
        return {**call, "function": _with_text_arguments(call["function"])}
    return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)} if "arguments" in call else {**call}
