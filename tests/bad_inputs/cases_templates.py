"""Chat templates that are invalid, refuse or leave out something, or write what cannot be learned; and bad dates."""

from __future__ import annotations

from helpers.tiny_tokenizers import CHATML

from bad_inputs.assets import chat
from bad_inputs.case import BadInput, Maker

_USER, _ANSWER = chat(("user", "hi there"), ("assistant", "yo you"))
_SYSTEM = {"role": "system", "content": "be kind"}
_CALL = {"type": "function", "function": {"name": "look", "arguments": {"place": "north"}}}
_TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
_CALLING = {"role": "assistant", "content": "", "tool_calls": [_CALL]}

_HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
_TAIL = "<|im_end|>\n{% endfor %}"
_OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_CONTENT = _HEAD + "{{ m.content }}" + _TAIL + _OPENING


def _without(role: str) -> str:
    """A template that leaves out one role."""
    return _CONTENT.replace("in messages", f"in messages if m.role != '{role}'")


def _marking(marked: str, *, where: str = "m.role == 'assistant'") -> str:
    """A template with marks around the assistant's words."""
    plain = "{{ m.content }}<|im_end|>"
    return _HEAD + f"{{% if {where} %}}{marked}{{% else %}}{plain}{{% endif %}}\n{{% endfor %}}" + _OPENING


def _template(content: str | bytes, *messages: dict, flags: tuple[str, ...] = (), **fields: object) -> Maker:
    """Trains on a conversation with a template. Without messages, it trains on the chats of the assets."""

    def make(site):
        data = str(site.assets.records("chats"))
        if messages:
            data = site.write_records("data.jsonl", {"messages": list(messages), **fields})
        return site.assets.sft_on(data, "--chat-template", site.write("c.jinja", content), *flags)

    return make


def _every_turn(content: str) -> Maker:
    return _template(content, _USER, _ANSWER, _USER, _ANSWER, flags=("--multi-turn-loss",))


def _own(content: bytes | None, name: str = "chat_template.jinja") -> Maker:
    """Trains on chats with a tokenizer whose own template is replaced."""

    def make(site):
        (site.copy(site.assets.tokenizer, "tok") / "chat_template.jinja").unlink()
        if content is not None:
            site.write(f"tok/{name}", content)
        return site.assets.sft_on(str(site.assets.records("chats")), "--tokenizer-model", "tok")

    return make


def _date(date: str) -> Maker:
    return lambda site: site.assets.sft_on(str(site.assets.records("chats")), "--template-date", date)


def _folder(site):
    (site.folder / "c.jinja").mkdir()
    return site.assets.sft_on(str(site.assets.records("chats")), "--chat-template", "c.jinja")


_FILE = r"--chat-template c.jinja: "
_PLACE = r"data.jsonl:1: the chat template "
_REFUSES = r"chats.jsonl:1: the chat template refuses these messages: "
_OTHER = r"or another template \(--chat-template FILE\)"
_KEEP = r"use a template that keeps it \(--chat-template FILE\)"
_MARK = r"wrap what the assistant writes.* \{% generation %\}"

CASES = [
    # No template.
    BadInput(
        "no file",
        lambda site: site.assets.sft_on(str(site.assets.records("chats")), "--chat-template", "c.jinja"),
        _FILE + "No such file",
        r"looked for /.*c.jinja\); give the file of a Jinja template",
    ),
    BadInput("a folder", _folder, _FILE + "Is a directory", r"give the file of a Jinja template"),
    BadInput("an empty file", _template(" \n"), _FILE + "the file is empty", r"write a template into it"),
    BadInput(
        "not UTF-8", _template("caf\xe9".encode("latin1")), _FILE + "not UTF-8 .* byte 3", r"write the file as UTF-8"
    ),
    BadInput(
        "a loop without end", _template("\n{% for m in messages %}"), _FILE + r".*line 2.*endfor", r"mend that line"
    ),
    BadInput("half an expression", _template("{{ messages | }}"), _FILE + "not a Jinja template", r"mend that line"),
    BadInput(
        "an unknown filter", _template("{{ messages | nope }}"), _FILE + r".*'nope'", r"leave --chat-template out"
    ),
    BadInput(
        "none at all",
        _own(None),
        r"chats.jsonl:1: HuggingFaceTokenizer has no chat template",
        r"give --chat-template FILE",
    ),
    BadInput("the tokenizer's is no Jinja", _own(b"{% for"), _REFUSES + "unexpected 'end of template'", _OTHER),
    BadInput(
        "the tokenizer's is not UTF-8", _own(b"caf\xe9"), r"model tok: .*utf-8", r"give a directory with tokenizer.json"
    ),
    BadInput(
        "none for records without documents",
        _own(CHATML.encode(), "additional_chat_templates/rag.jinja"),
        r"the chat templates rag and none called default",
        r"give one with --chat-template FILE",
    ),
    BadInput(
        "an exported one that is no Jinja",
        lambda site: site.assets.export(site.assets.policy, "--chat-template", site.write("c.jinja", "{{")),
        _FILE + "not a Jinja template",
        r"mend that line",
    ),
    BadInput(
        "one for a tokenizer without chats",
        lambda site: site.assets.train_tokenizer("x", "--chat-template", site.write("c.jinja", "{%")),
        _FILE + "not a Jinja template",
        r"mend that line",
    ),
    # Templates that refuse something.
    BadInput("an error of its own", _template("{{ raise_exception('no users') }}"), _REFUSES + "no users", _OTHER),
    BadInput("an unknown function", _template("{{ now() }}"), _REFUSES + "'now' is undefined", _OTHER),
    BadInput("calls of itself", _template("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"), _REFUSES, _OTHER),
    BadInput("what is not safe", _template("{{ ''.__class__.__mro__ }}"), _REFUSES + r".*unsafe", _OTHER),
    BadInput(
        "a system message",
        _template(
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
            _SYSTEM,
            _USER,
            _ANSWER,
        ),
        _PLACE + "refuses these messages: no system",
        r"give messages that it takes",
    ),
    # Templates that leave something out.
    BadInput(
        "a thought",
        _template(_CONTENT, _USER, {**_ANSWER, "reasoning_content": "so it is"}),
        _PLACE + ".*'so it is'",
        _KEEP,
    ),
    BadInput(
        "a thought between tags",
        _template(
            _CONTENT.replace("m.content", "m.content.split('</think>')[-1]"),
            _USER,
            {**_ANSWER, "content": "<think>deep</think>yo"},
        ),
        _PLACE + "leaves out some of what the assistant wrote, '<think>deep</think>yo'",
        _KEEP,
    ),
    BadInput("a call", _template(_CONTENT, _USER, _CALLING), _PLACE + "leaves out .* 'look'", _KEEP),
    BadInput(
        "the arguments of a call",
        _template(
            _CONTENT.replace(
                "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
            ),
            _USER,
            _CALLING,
        ),
        _PLACE + "leaves out .* 'north'",
        _KEEP,
    ),
    BadInput(
        "what a tool found",
        _template(
            _without("tool").replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | default('') }}"),
            _USER,
            _CALLING,
            {"role": "tool", "content": "sunny"},
            _ANSWER,
        ),
        _PLACE + "leaves out some of the tool's message, 'sunny'",
        _KEEP,
    ),
    BadInput(
        "the tools",
        _template(_CONTENT, _USER, _ANSWER, tools=[_TOOL]),
        _PLACE + "leaves out the tool 'look'",
        r"writes 'tools'",
    ),
    BadInput(
        "a tool without a name",
        _template(_CONTENT, _USER, _ANSWER, tools=[{}]),
        _PLACE + "leaves out a tool without a name",
        r"writes 'tools'",
    ),
    BadInput(
        "the system message",
        _template(_without("system"), _SYSTEM, _USER, _ANSWER),
        _PLACE + ".*system's message, 'be kind'",
        _KEEP,
    ),
    BadInput(
        "the question", _template(_without("user"), _USER, _ANSWER), _PLACE + ".*user's message, 'hi there'", _KEEP
    ),
    BadInput("all", _template("hello"), r"chats.jsonl:1: the chat template leaves out .*' tool number 0'", _KEEP),
    BadInput(
        "capitals",
        _template(_CONTENT.replace("m.content", "m.content | upper"), _USER, _ANSWER),
        _PLACE + "leaves out .*'yo you'",
        _KEEP,
    ),
    # Templates whose text cannot be cut into prompt and response, or into turns.
    BadInput(
        "another opening of the answer",
        _template(_CONTENT.replace("<|im_start|>assistant\n{% endif", "<|im_start|>bot\n{% endif"), _USER, _ANSWER),
        _PLACE + r"renders the prompt as ...'bot\\n'",
        r"use a chat template whose text",
    ),
    BadInput(
        "earlier turns written otherwise",
        _every_turn(
            _CONTENT.replace(
                "{{ m.content }}", "{% if m.role == 'assistant' and not loop.last %}[old]{% endif %}{{ m.content }}"
            )
        ),
        _PLACE + r"writes the assistant's turn messages\[1\] otherwise",
        _MARK,
    ),
    BadInput(
        "marks without the end of the turn",
        _every_turn(_marking("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>")),
        _PLACE + r"leaves the end-of-turn token unmarked, or more: '<\|im_end\|>'",
        _MARK,
    ),
    BadInput(
        "marks of the last turn alone",
        _every_turn(
            _marking(
                "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}",
                where="m.role == 'assistant' and loop.last",
            )
        ),
        _PLACE + "marks 1 of 2 assistant turns",
        _MARK,
    ),
    BadInput(
        "marks of everything",
        _every_turn(_marking("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}", where="true")),
        _PLACE + "marks 4 of 2 assistant turns",
        r"or train on the last turn only",
    ),
    # The date.
    BadInput("a date in words", _date("yesterday"), r"template_date=yesterday", r"a date such as 2026-11-30"),
    BadInput("a month that is none", _date("2026-13-30"), r"template_date=2026-13-30", r"a date such as 2026-11-30"),
    BadInput("a time zone", _date("2026-11-30T12:00+01:00"), r"template_date=2026-11-30T12:00\+01:00", r"no time zone"),
    BadInput(
        "a date in words, checked",
        lambda site: site.assets.check(str(site.assets.records("chats")), "--template-date", "soon"),
        r"template_date=soon",
        r"a date such as 2026-11-30",
    ),
]
