"""Conversations of all shapes that occur in records, drawn by hypothesis."""

from hypothesis import strategies as st

_WORDS = st.sampled_from(
    ["why", "nine", "Ulm", "{", '"a"', "  ", "\n", "é", "漢字", "🙂", "None", "\u2028", "get_time", "0.5"]
)
TEXTS = st.lists(_WORDS, min_size=1, max_size=6).map(" ".join).filter(str.strip)
_NAMES = st.sampled_from(["get_time", "search", "add_item"])
_KEYS = st.sampled_from(["city", "item", "count", "when"])
_SCALARS = st.none() | st.booleans() | st.integers(-3, 99) | TEXTS
ARGUMENTS = st.dictionaries(_KEYS, _SCALARS | st.dictionaries(_KEYS, _SCALARS, max_size=2), max_size=3)
"""Arguments of a call. Nulls at any depth count as missing."""


def _call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = st.lists(st.builds(_call, _NAMES, ARGUMENTS), min_size=1, max_size=2)


def _tool(name, keys):
    properties = {key: {"type": "string", "description": f"the {key}"} for key in keys}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


TOOLS = st.lists(
    st.builds(_tool, _NAMES, st.lists(_KEYS, max_size=3, unique=True)),
    min_size=1,
    max_size=2,
    unique_by=lambda tool: tool["function"]["name"],
)


@st.composite
def assistants(draw, *, thinks=True, calls=True, weighs=True):
    """A message of the assistant: a text, calls, or both, and perhaps thoughts and a weight."""
    message = {"role": "assistant"}
    called = calls and draw(st.booleans())
    if called:
        message["tool_calls"] = draw(CALLS)
    if not called or draw(st.booleans()):
        message["content"] = draw(TEXTS)
    if thinks and draw(st.booleans()):
        message["reasoning_content"] = draw(TEXTS)
    if weighs and draw(st.booleans()):
        message["weight"] = draw(st.integers(0, 1))
    return message


@st.composite
def conversations(draw, *, thinks=True, calls=True, weighs=True):
    """A record with messages, the last of which is the assistant's, and perhaps tools."""
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        answer = draw(assistants(thinks=thinks, calls=calls, weighs=weighs))
        messages.append(answer)
        if "tool_calls" in answer and draw(st.booleans()):
            messages.append({"role": "tool", "content": draw(TEXTS)})
            messages.append(draw(assistants(thinks=thinks, calls=False, weighs=weighs)))
    record = {"messages": messages}
    if any("tool_calls" in message for message in messages):
        record["tools"] = draw(TOOLS)
    return record


THINKING = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content | trim }}\n</think>\n{% endif %}{{ m.content or '' }}"
    '{% for c in m.tool_calls or [] %}<call>{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}</call>{% endfor %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A ChatML template that writes tools, and thoughts and calls of every turn, and marks what the assistant writes."""


def without_marks(template):
    """The same template without its generation blocks. Control of white space stays."""
    import re

    def plain(match):
        keyword = "endif" if "endgeneration" in match[0] else "if true"
        return f"{{%{'-' if match[1] else ''} {keyword} {'-' if match[2] else ''}%}}"

    return re.sub(r"\{%(-?)\+?\s*(?:end)?generation\s*(-?)%\}", plain, template)
