"""Is all of it there? A template that leaves something out is refused, whatever words stand elsewhere; one that only
writes it with other white space is not."""

import pytest
from helpers.conversations import THINKING, conversations, without_marks
from helpers.tiny_tokenizers import CHATML, write_hf_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_brain.data.chat import Chat
from megatron_brain.data.conversations import check_messages
from megatron_brain.data.json_values import without_nulls
from megatron_brain.data.last_turn import render_last_turn, render_prompt
from megatron_brain.data.tokenizer import HuggingFaceTokenizer
from megatron_brain.data.tools import check_tools
from megatron_brain.data.turns import encode_all_turns
from megatron_brain.errors import RecordError

# White space of its own around thoughts, written in two fields or one: Qwen 3, GLM 4.5, Nemotron.
RESPACED = THINKING.replace(
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content | trim }}\n</think>\n{% endif %}{{ m.content or '' }}",
    "{% set c = m.content or '' %}{% set r = m.reasoning_content or '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1] %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{% if r %}<think>\n\n{{ r.split() | join(' ') }}\n\n</think>\n\n{% endif %}{{ c.split() | join('  ') }}",
)
# What each leaves out.
DROPS = {
    "thoughts in a field": ("{% if m.reasoning_content %}", "{% if false %}"),
    "thoughts but in the last message": ("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}"),
    "calls": ("{% for c in m.tool_calls or [] %}", "{% for c in [] %}"),
    "calls beside a text": (
        "{% for c in m.tool_calls or [] %}",
        "{% for c in (m.tool_calls or []) if not m.content %}",
    ),
    "the second call": ("{% for c in m.tool_calls or [] %}", "{% for c in (m.tool_calls or [])[:1] %}"),
    "arguments": ("{{ c.function.arguments | tojson }}", "{}"),
    "a text beside calls": ("{{ m.content or '' }}", "{{ m.content if m.content and not m.tool_calls else '' }}"),
    "the system message": ("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
    "a tool's result": ("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"),
    "tools": ("{% if tools %}", "{% if false %}"),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    made = {}

    def tokenizer(template):
        if template not in made:
            folder = tmp_path_factory.mktemp("omissions")
            names = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "chat_template": template}
            made[template] = HuggingFaceTokenizer(write_hf_tokenizer(folder, **names))
        return made[template]

    return tokenizer


def chat_of(tokenizer, record):
    return Chat(tokenizer, check_messages(record["messages"], "messages", "x"), "x", check_tools(record, "x"))


def outcome(function, tokenizer, record):
    try:
        return function(chat_of(tokenizer, record))
    except RecordError as error:
        return str(error)


def leaves_out(drop, record, *, every_turn, anything=False):
    """Whether a template of DROPS loses something of a record that must be there, or `anything` at all."""
    messages = record["messages"]
    answers = [m for m in messages if m["role"] == "assistant"]
    learned = [m for m in answers if m.get("weight", 1)] if every_turn else answers[-1:]
    learned = answers if anything else learned
    if drop == "tools":
        return "tools" in record
    if drop in ("the system message", "a tool's result"):
        return any(message["role"] == {"the system message": "system"}.get(drop, "tool") for message in messages)
    lost = {
        "thoughts in a field": lambda m: "reasoning_content" in m,
        "thoughts but in the last message": lambda m: "reasoning_content" in m and m is not messages[-1],
        "calls": lambda m: "tool_calls" in m,
        "calls beside a text": lambda m: "tool_calls" in m and "content" in m,
        "the second call": lambda m: len(m.get("tool_calls", [])) > 1,
        "arguments": lambda m: any(without_nulls(c["function"]["arguments"]) for c in m.get("tool_calls", [])),
        "a text beside calls": lambda m: "tool_calls" in m and "content" in m,
    }[drop]
    return any(map(lost, learned))


# Texts without a letter or a digit cannot be told from others: nothing of them is looked for.
TOLD = conversations().filter(
    lambda record: all(
        any(character.isalnum() for character in message.get(name, "a"))
        for message in record["messages"]
        for name in ("content", "reasoning_content")
    )
)


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("function", [render_last_turn, encode_all_turns])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=TOLD)
def test_what_a_template_leaves_out_is_refused_and_nothing_else(function, drop, make, record):
    """The words of a drawn conversation are few: what is left out often stands elsewhere."""
    whole, part = THINKING, THINKING.replace(*DROPS[drop])
    assert part != whole
    expected = outcome(function, make(whole), record)
    found = outcome(function, make(part), record)
    every_turn = function is encode_all_turns
    if isinstance(expected, str):
        assert "nothing is learned" in expected, expected
    elif leaves_out(drop, record, every_turn=every_turn):
        assert isinstance(found, str) and "the chat template leaves out" in found, (record, found)
    elif leaves_out(drop, record, every_turn=every_turn, anything=True):
        assert not isinstance(found, str), "an earlier turn, of which nothing is learned, may lose something"
    else:
        assert found == expected, (record, found)


@pytest.mark.parametrize("marks", [True, False])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=conversations())
def test_other_white_space_around_thoughts_and_answers_is_no_loss(marks, make, record):
    template = RESPACED if marks else without_marks(RESPACED)
    for function in (render_last_turn, encode_all_turns):
        found = outcome(function, make(template), record)
        assert not isinstance(found, str) or "nothing is learned" in found, (record, found)


QUESTION = {"role": "user", "content": "what time is it?"}


@pytest.mark.parametrize(
    "content",
    ["<think>\nwhy\n</think>\n\nanswer", "<think>why</think>answer", "<think>\nwhy\n</think>\nanswer", "answer"],
)
def test_thinking_that_is_spaced_anew_is_taken_as_it_is_written(content, make):
    record = {"messages": [QUESTION, {"role": "assistant", "content": content}]}
    _, response = render_last_turn(chat_of(make(RESPACED), record))
    assert response.split() == content.replace("<think>", " <think> ").replace("</think>", " </think> ").split()[
        :-1
    ] + ["answer<|im_end|>"]


@pytest.mark.parametrize("earlier", ["why", "the reason why is get_time", "answer", '{"city": "Ulm"}'])
def test_words_that_stand_elsewhere_do_not_stand_in_for_what_is_left_out(earlier, make):
    """In an earlier message, in the same turn, or in the tools."""
    calls = [{"function": {"name": "get_time", "arguments": {"city": "Ulm"}}}]
    answers = {
        "thoughts in a field": {"content": "answer why", "reasoning_content": "why"},
        "calls": {"content": 'I say get_time({"city": "Ulm"})', "tool_calls": calls},
        "arguments": {"content": "Ulm city", "tool_calls": calls},
        "a text beside calls": {"content": "get_time", "tool_calls": calls},
    }
    for drop, answer in answers.items():
        record = {
            "messages": [{"role": "user", "content": earlier}, {"role": "assistant", **answer}],
            "tools": [{"function": {"name": "get_time", "parameters": {}}}],
        }
        assert not isinstance(outcome(render_last_turn, make(THINKING), record), str)
        for function in (render_last_turn, encode_all_turns):
            found = outcome(function, make(THINKING.replace(*DROPS[drop])), record)
            assert isinstance(found, str) and "leaves out some of what the assistant wrote" in found, drop


def test_a_name_is_written_or_refused_but_of_tools(make):
    named = {"role": "user", "name": "Alice", "content": "hello Alice"}
    answer = {"role": "assistant", "content": "fine"}
    result = {"role": "tool", "name": "get_time", "content": "nine"}
    for function in (render_last_turn, encode_all_turns):
        found = outcome(function, make(CHATML), {"messages": [named, answer]})
        assert "leaves out some of the user's message, 'Alice'" in found
        found = outcome(function, make(CHATML), {"messages": [QUESTION, {**answer, "name": "planner"}]})
        assert "leaves out some of what the assistant wrote, 'planner'" in found
        assert not isinstance(outcome(function, make(CHATML), {"messages": [QUESTION, answer, result, answer]}), str)
        writes = CHATML.replace("{{ m['role'] }}", "{{ m['role'] + (' name=' + m.name if m.name else '') }}")
        assert not isinstance(outcome(function, make(writes), {"messages": [named, answer]}), str)


def test_a_prompt_to_sample_for_is_whole_too(make):
    system = {"role": "system", "content": "why"}
    question = {"role": "user", "content": "why?"}
    drops = THINKING.replace(*DROPS["the system message"])
    assert "why" in render_prompt(chat_of(make(THINKING), {"messages": [system, question]}))
    with pytest.raises(
        RecordError, match="leaves out some of the system's message, 'be kind': use a template that keeps"
    ):
        render_prompt(chat_of(make(drops), {"messages": [{**system, "content": "be kind"}, question]}))


@pytest.mark.parametrize("content", ["?!", "🙂", "…"])
def test_answers_without_a_word_are_taken(content, make):
    record = {"messages": [QUESTION, {"role": "assistant", "content": content, "reasoning_content": "why"}]}
    assert content in render_last_turn(chat_of(make(RESPACED), record))[1]


def test_a_template_that_looks_into_calls_is_no_hindrance(make):
    """It refuses functions that are not among the tools, which the words that stand in are not."""
    checks = THINKING.replace(
        "{% for c in m.tool_calls or [] %}",
        "{% for c in m.tool_calls or [] %}{% if c.function.name not in tools | map(attribute='function.name') | list %}"
        "{{ raise_exception('no such tool') }}{% endif %}",
    )
    record = {
        "messages": [
            QUESTION,
            {
                "role": "assistant",
                "content": "x y",
                "tool_calls": [{"function": {"name": "f", "arguments": {"a": "b"}}}],
            },
        ],
        "tools": [{"function": {"name": "f", "parameters": {}}}],
    }
    assert not isinstance(outcome(render_last_turn, make(checks), record), str)
    drops = checks.replace("{{ m.content or '' }}", "")
    assert "leaves out" in outcome(render_last_turn, make(drops), record)


def test_arguments_go_to_templates_as_these_expect_them(make):
    """As JSON text where a template adds it to a text or would write what Python writes (DeepSeek V3's)."""
    record = {
        "messages": [
            QUESTION,
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "é"}}}]},
        ]
    }
    expected = '<call>{"name": "f", "arguments": {"a": "é"}}</call><|im_end|>\n'
    for spelled in (
        "{{ c.function.arguments | tojson }}",
        "{{ '' + c.function.arguments }}",
        "{{ c.function.arguments }}",
    ):
        template = THINKING.replace("{{ c.function.arguments | tojson }}", spelled)
        assert render_last_turn(chat_of(make(template), record))[1] == expected, spelled


def test_contents_go_to_templates_as_these_expect_them(make):
    """In parts where a template goes through them, as those of multimodal models do."""
    parts = CHATML.replace(
        "{{ m['content'] }}",
        "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}",
    )
    record = {"messages": [QUESTION, {"role": "assistant", "content": "nine"}]}
    assert parts != CHATML
    assert render_last_turn(chat_of(make(parts), record)) == render_last_turn(chat_of(make(CHATML), record))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=conversations(), seed=st.integers(0, 3))
def test_nothing_of_the_check_reaches_what_is_trained_on(make, record, seed):
    """The words that stand in are rendered beside, and the record is not changed."""
    import copy

    before = copy.deepcopy(record)
    found = outcome(encode_all_turns, make(THINKING), record)
    assert record == before
    if not isinstance(found, str):
        text = make(THINKING).hf.decode([*found[0], *found[1]])
        assert "zq0" not in text and "7310000" not in text


@pytest.mark.parametrize("first", [{}, {"city": "Ulm"}, {"city": 4}, {"city": [True]}])
def test_a_conversation_that_was_fine_says_nothing_of_one_with_other_arguments(first, make):
    """What was found of a shape is remembered; arguments that a template could treat in another way are another one."""
    drops = THINKING.replace(
        "{{ c.function.arguments | tojson }}",
        "{% if c.function.arguments.city is boolean %}{}{% else %}{{ c.function.arguments | tojson }}{% endif %}",
    )
    tokenizer = make(drops)

    def record(arguments):
        return {
            "messages": [
                QUESTION,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
            ]
        }

    for _ in range(2):
        assert not isinstance(outcome(render_last_turn, tokenizer, record(first)), str)
        assert "leaves out" in outcome(render_last_turn, tokenizer, record({"city": False}))


@pytest.mark.parametrize("field", ["thought", "thoughts", "thinking_content", "thinking", "reasoning"])
def test_thoughts_under_another_name_are_written_or_refused(field, make):
    """Version 5 of transformers itself gives some of them to templates that ask for reasoning_content."""
    record = {"messages": [QUESTION, {"role": "assistant", "content": "nine", field: "the clock"}]}
    for function in (render_last_turn, encode_all_turns):
        found = outcome(function, make(THINKING), record)
        told = "leaves out some of what the assistant wrote, 'the clock'" in str(found)
        assert told or "the clock" in (found[1] if function is render_last_turn else make(THINKING).hf.decode(found[1]))
        writes = THINKING.replace("reasoning_content", field)
        assert "leaves out" not in str(outcome(function, make(writes), record))


def test_thoughts_that_are_given_twice_are_written_once(make):
    """vLLM gives them as reasoning and as reasoning_content."""
    twice = {"reasoning": "the clock", "reasoning_content": "the clock"}
    record = {"messages": [QUESTION, {"role": "assistant", "content": "nine", **twice}]}
    found = outcome(render_last_turn, make(THINKING), record)
    assert found[1].count("the clock") == 1
    other = {"messages": [QUESTION, {"role": "assistant", "content": "nine", **twice, "reasoning": "a clock in the"}]}
    assert "leaves out" in str(outcome(render_last_turn, make(THINKING), other))
