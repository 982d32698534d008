"""Records with fields that are missing, empty, of another type, not supported, or too long."""

from __future__ import annotations

import json

from bad_inputs.assets import chat
from bad_inputs.case import BadInput, Maker

_GOOD = {
    "sft": {"prompt": "a tool", "completion": " small"},
    "reward": {"prompt": "a tool", "chosen": " small", "rejected": " large"},
    "brain": {"prompt": "a tool"},
}
_USER, _ANSWER = chat(("user", "hello"), ("assistant", "fine"))
_PAIR = {"chosen": [_USER, _ANSWER], "rejected": [_USER, {**_ANSWER, "content": "again"}]}


def _second(record: dict, *flags: str, stage: str = "sft") -> Maker:
    """Gives a command a good record, and then this one."""

    def make(site):
        command = {"sft": site.assets.sft_on, "reward": site.assets.reward_on, "brain": site.assets.brain_on}[stage]
        return command(site.write_records("data.jsonl", _GOOD[stage], record), *flags)

    return make


def _text(stage: str = "sft", **fields: object) -> Maker:
    return _second({**_GOOD[stage], **fields}, stage=stage)


def _chat(*messages: dict, **fields: object) -> Maker:
    return _second({"messages": list(messages), **fields})


def _answer(**fields: object) -> Maker:
    return _chat(_USER, {**_ANSWER, **fields})


def _call(call: object) -> Maker:
    return _answer(tool_calls=[call])


def _tool(tool: object) -> Maker:
    return _chat(_USER, _ANSWER, tools=[tool])


def _all_too_long(site):
    return site.assets.sft_on(site.write_records("data.jsonl", _long()), "--overlong", "drop")


def _long() -> dict:
    return {"prompt": "word " * 100, "completion": " b"}


_PLACE = r"data.jsonl:2: "

CASES = [
    # Texts.
    BadInput(
        "no completion",
        _second({"prompt": "a"}),
        _PLACE + "field 'completion' is missing",
        r"rename the one that it is in",
    ),
    BadInput("a null", _text(completion=None), _PLACE + "field 'completion' is missing", r"the record has prompt"),
    BadInput(
        "a null, as a process",
        _text(completion=None),
        _PLACE + "field 'completion' is missing",
        r"the record has prompt",
        as_process=True,
    ),
    BadInput("no fields", _second({}), _PLACE + "field 'completion' is missing", r"the record has no fields"),
    BadInput(
        "other spelling", _second({"Prompt": "a", "Completion": "b"}), _PLACE + "field 'comp", r"has Prompt, Comp"
    ),
    BadInput("an empty prompt", _text(prompt=""), _PLACE + "field 'prompt' is empty", r"remove the record"),
    BadInput(
        "a blank completion", _text(completion=" \n"), _PLACE + "field 'completion' is empty", r"remove the record"
    ),
    BadInput("a number", _text(prompt=3), _PLACE + "field 'prompt'", r"must be a text or a list of messages, not int"),
    BadInput(
        "not a number", _text(completion=float("nan")), _PLACE + "field 'completion'", r"must be a text .* not float"
    ),
    BadInput(
        "a text and messages", _text(completion=[_ANSWER]), _PLACE + "'prompt' and 'completion'", r"must be all texts"
    ),
    BadInput("messages as text", _text(prompt=json.dumps([_USER])), _PLACE + "field 'prompt'", r"give the list itself"),
    # Fields that are not supported.
    BadInput("one not to learn", _text(label=False), _PLACE + "field 'label' is false", r"remove the record"),
    BadInput("one not to learn, as 0", _text(label=0), _PLACE + "field 'label' is 0", r"remove the record"),
    BadInput("images", _text(images=["a.png"]), _PLACE + "field 'images' is not supported", r"remove it"),
    BadInput(
        "a weight", _text(weight=0.5), _PLACE + "field 'weight' is not supported", r"'weight': 0 or 1 on assistant"
    ),
    BadInput("a mask", _text(loss_mask=[1]), _PLACE + "field 'loss_mask' is not supported", r"--multi-turn-loss"),
    BadInput("functions", _chat(_USER, _ANSWER, functions=[{}]), _PLACE + "field 'functions'", r"give .* as 'tools'"),
    BadInput("a system field", _chat(_USER, _ANSWER, system="be"), _PLACE + "field 'system'", r"as the first message"),
    # Lengths.
    BadInput("too long", _second(_long()), _PLACE + r"too long: prompt 301 \+ response 3 tokens", r"raise the limit"),
    BadInput(
        "a prompt too long",
        _second({"prompt": "word " * 9, "completion": " b"}, "--max-prompt-length", "8"),
        _PLACE + r"too long: prompt of 28 tokens \(--max-prompt-length 8\)",
        r"--overlong truncate or --overlong drop",
    ),
    BadInput(
        "a prompt without room", _second({"prompt": "word " * 30}, stage="brain"), _PLACE + "too long: prompt", r"raise"
    ),
    BadInput("all too long", _all_too_long, r"no record left \(1 records read, 0 kept", r"raise the length limits"),
    # Messages.
    BadInput("no messages", _chat(), _PLACE + "'messages'", r"must be a list of one or more messages"),
    BadInput(
        "a text for messages", _second({"messages": "hello"}), _PLACE + "'messages' .* no JSON", r"must be a list"
    ),
    BadInput("one message for a list", _second({"messages": _USER}), _PLACE + "'messages'", r"must be a list of one"),
    BadInput("texts for messages", _second({"messages": ["hello"]}), _PLACE + r"messages\[0\]", r"must be an object"),
    BadInput("no role", _chat({"content": "a"}, _ANSWER), _PLACE + r"messages\[0\]", r"with a text 'role'"),
    BadInput("an empty role", _chat({**_USER, "role": ""}, _ANSWER), _PLACE + r"messages\[0\]", r"with a text 'role'"),
    BadInput("other names", _chat({"from": "human", "value": "a"}), _PLACE + r"messages\[0\]", r"with a text 'role'"),
    BadInput("no content", _chat({"role": "user"}, _ANSWER), _PLACE + r"messages\[0\] \(user\)", r"has no 'content'"),
    BadInput(
        "content of a number", _chat({**_USER, "content": 3}), _PLACE + r"messages\[0\] \(user\)", r"must be a text"
    ),
    BadInput(
        "a picture in a message",
        _chat({**_USER, "content": [{"type": "image", "url": "a.png"}]}, _ANSWER),
        _PLACE + r"messages\[0\] \(user\): content\[0\] is of type 'image'",
        r"only texts are read",
    ),
    BadInput(
        "nobody answers", _chat(_USER, _ANSWER, _USER), _PLACE + "the last message .* not the user's", r"remove it"
    ),
    BadInput(
        "an empty answer", _answer(content=" "), _PLACE + "the last assistant message is empty", r"remove the record"
    ),
    BadInput(
        "an answer to nothing", _chat(_ANSWER), _PLACE + "a prompt", r"must have a message before the assistant's"
    ),
    BadInput("half a weight", _answer(weight=0.5), _PLACE + r"messages\[1\] .* weight 0.5", r"'weight': 0 or 1"),
    BadInput("weight 0", _answer(weight=0), _PLACE + "the answer in 'messages' has weight 0", r"remove the record"),
    BadInput(
        "weight on a question", _chat({**_USER, "weight": 1}, _ANSWER), _PLACE + r"messages\[0\]", r"on assistant"
    ),
    BadInput("another mask", _answer(train=False), _PLACE + r"messages\[1\] .* 'train'", r"'weight': 0 or 1"),
    BadInput(
        "nothing to learn in any turn",
        _second({"messages": [_USER, {**_ANSWER, "weight": 0}]}, "--multi-turn-loss"),
        _PLACE + "every assistant message has weight 0",
        r"remove the record",
    ),
    # Calls of tools, tools and settings of the template.
    BadInput("an old call", _answer(function_call={"name": "f"}), _PLACE + r".*'function_call'", r"in 'tool_calls'"),
    BadInput("calls that are no JSON", _answer(tool_calls="f()"), _PLACE + r".*'tool_calls' .* no JSON", r"be a list"),
    BadInput("a call without a name", _call({"function": {}}), _PLACE + r".*tool_calls\[0\].function", r"text 'name'"),
    BadInput(
        "arguments that are no JSON",
        _call({"function": {"name": "f", "arguments": "{a: 1}"}}),
        _PLACE + r".*tool_calls\[0\].function.arguments",
        r"must be an object, and is a text that is no JSON",
    ),
    BadInput(
        "arguments in a list",
        _call({"function": {"name": "f", "arguments": [1]}}),
        _PLACE + r".*tool_calls\[0\].function.arguments",
        r"must be an object, or the JSON text of one",
    ),
    BadInput("tools that are no list", _chat(_USER, _ANSWER, tools={}, chat_template_kwargs=3), _PLACE, r"an object"),
    BadInput("a tool that is a number", _tool(3), _PLACE + r"tools\[0\]", r"must be an object, not 3"),
    BadInput(
        "parameters that are no JSON",
        _tool({"type": "function", "function": {"name": "f", "parameters": "{"}}),
        _PLACE + r"tools\[0\].function.parameters",
        r"must be an object, and is a text that is no JSON",
    ),
    BadInput(
        "a setting that is the messages",
        _chat(_USER, _ANSWER, chat_template_kwargs={"messages": []}),
        _PLACE + "field 'chat_template_kwargs' sets 'messages'",
        r"which is no setting; remove it",
    ),
    BadInput(
        "a setting of the renderer",
        _chat(_USER, _ANSWER, chat_template_kwargs={"continue_final_message": True}),
        _PLACE + "field 'chat_template_kwargs' sets 'continue_final_message'",
        r"which is no setting; remove it",
    ),
    # Pairs and prompts.
    BadInput(
        "no rejected answer",
        _second({"prompt": "a", "chosen": " b"}, stage="reward"),
        _PLACE + "field 'rejected' is missing",
        r"the record has prompt, chosen",
    ),
    BadInput(
        "dialogues of nothing in common",
        _second({"chosen": "a", "rejected": "b"}, stage="reward"),
        _PLACE + "no 'prompt', and 'chosen' and 'rejected'",
        r"give the prompt as its own field",
    ),
    BadInput(
        "conversations of another length",
        _second({**_PAIR, "rejected": [_USER, _ANSWER, _USER, _ANSWER]}, stage="reward"),
        _PLACE + "without a 'prompt', 'chosen' and 'rejected'",
        r"give the shared messages as 'prompt'",
    ),
    BadInput(
        "several answers",
        _second({"prompt": [_USER], "chosen": [_ANSWER, _USER, _ANSWER], "rejected": [_ANSWER]}, stage="reward"),
        _PLACE + "'chosen' must be the one assistant message .* not 3",
        r"give longer conversations as 'messages'",
    ),
    BadInput(
        "an endless margin", _text("reward", margin=10**400), _PLACE + "field 'margin'", r"must be a finite number"
    ),
    BadInput("a margin in words", _text("reward", margin="big"), _PLACE + "field 'margin'", r"must be a finite number"),
    BadInput(
        "no prompt", _second({"question": "a"}, stage="brain"), _PLACE + "field 'prompt' is missing", r"has question"
    ),
    BadInput(
        "a prompt that is answered",
        _second({"prompt": [_USER, _ANSWER]}, stage="brain"),
        _PLACE + "a prompt must have a message before",
        r"must not end with the assistant's",
    ),
]
