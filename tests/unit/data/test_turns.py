"""The assistant's turns of drawn conversations: by marks and by growing conversations, with weights, against a template
written anew in Python."""

import json
from itertools import chain

import pytest
from helpers.conversations import THINKING, conversations, without_marks
from helpers.tiny_tokenizers import write_hf_tokenizer
from hypothesis import given, settings

from megatron_brain.data.chat import Chat
from megatron_brain.data.conversations import check_messages
from megatron_brain.data.tokenizer import HuggingFaceTokenizer
from megatron_brain.data.tools import check_tools
from megatron_brain.data.turns import encode_all_turns, locate_turns
from megatron_brain.errors import RecordError

HEAD = "{{ bos_token }}"
TAIL = "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
LAST_BY_EOS = "{{ eos_token if loop.last else '<|im_end|>' }}"
# Templates that write a conversation's end otherwise than its middle, as Mistral's, Phi 3's and gpt-oss' do.
TEMPLATES = {
    "plain": THINKING,
    "EOS behind the last turn": THINKING + TAIL,
    "EOS behind each turn": THINKING.replace("<|im_end|>{% endg", "{{ eos_token }}{% endg"),
    "EOS ends the last turn": THINKING.replace("<|im_end|>{% endg", LAST_BY_EOS + "{% endg"),
    "no line between": THINKING.replace("{{ '\n' }}{% endfor %}", "{% endfor %}"),
    "no line behind the last turn": THINKING.replace(
        "{{ '\n' }}{% endfor %}", "{{ '\n' if not loop.last or add_generation_prompt }}{% endfor %}"),
    "a header in the marks": THINKING.replace(
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}",
        "{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{% endif %}{% if m.role == 'assistant' %}"
        "{% generation %}<|im_start|>{{ m.role }}\n"),
}  # fmt: skip


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    made = {}

    def tokenizer(template, eos="</s>"):
        if (template, eos) not in made:
            names = {"eos_token": eos, "bos_token": "<s>", "pad_token": "<pad>", "chat_template": template}
            made[template, eos] = HuggingFaceTokenizer(write_hf_tokenizer(tmp_path_factory.mktemp("turns"), **names))
        return made[template, eos]

    return tokenizer


def chat_of(tokenizer, record):
    return Chat(tokenizer, check_messages(record["messages"], "messages", "x"), "x", check_tools(record, "x"))


def outcome(tokenizer, record):
    try:
        return encode_all_turns(chat_of(tokenizer, record))
    except RecordError as error:
        return error.message


def written(message):
    """What THINKING makes of a message of the assistant, without its end."""
    thought = message.get("reasoning_content")
    calls = "".join(
        '<call>{"name": "' + c["function"]["name"] + '", "arguments": '
        + json.dumps(c["function"].get("arguments", {}), ensure_ascii=False) + "}</call>"
        for c in message.get("tool_calls", [])
    )  # fmt: skip
    return (f"<think>\n{thought.strip()}\n</think>\n" if thought else "") + message.get("content", "") + calls


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=80, deadline=None)
@given(record=conversations())
def test_marks_and_growing_conversations_tell_the_same_turns(name, make, record):
    marked, plain = make(TEMPLATES[name]), make(without_marks(TEMPLATES[name]))
    assert marked.marks_turns() and not plain.marks_turns()
    assert outcome(marked, record) == outcome(plain, record)


@settings(max_examples=150, deadline=None)
@given(record=conversations())
def test_each_turn_is_what_the_assistant_wrote_and_its_end(make, record):
    tokenizer = make(without_marks(THINKING))
    chat = chat_of(tokenizer, record)
    text, turns = locate_turns(chat)
    answers = {i: m for i, m in enumerate(chat.messages) if m["role"] == "assistant"}
    assert turns.keys() == answers.keys()
    for index, (start, end) in turns.items():
        assert text[start:end].rstrip() == written(answers[index]) + "<|im_end|>"
        assert text[:start].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("template", [THINKING, without_marks(THINKING)], ids=["marks", "growing"])
@settings(max_examples=150, deadline=None)
@given(record=conversations())
def test_weights_choose_turns_and_change_no_token(template, make, record):
    tokenizer = make(template, eos="<|im_end|>")
    unweighted = {
        **record,
        "messages": [{k: v for k, v in message.items() if k != "weight"} for message in record["messages"]],
    }
    prompt, response, mask = outcome(tokenizer, unweighted)
    answers = [m for m in check_messages(record["messages"], "messages", "x") if m["role"] == "assistant"]
    turns = tokenizer.encode_batch([written(m) + "<|im_end|>" for m in answers], parse_special=True)
    assert [i for i, m in zip(response, mask, strict=True) if m] == list(chain(*turns))
    found = outcome(tokenizer, record)
    kept = [turn for turn, message in zip(turns, answers, strict=True) if message.get("weight", 1)]
    if not kept:
        assert "every assistant message has weight 0" in found
        return
    assert found[:2] == (prompt, response)
    assert [i for i, m in zip(response, found[2], strict=True) if m] == list(chain(*kept))
    assert all(whole or not part for whole, part in zip(mask, found[2], strict=True))
