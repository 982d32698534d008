"""Which chat template a record gets, from where, and what its clock says."""

import json
import logging
import shutil
from datetime import datetime

import pytest
from helpers.conversations import THINKING
from helpers.tiny_tokenizers import CHATML, write_hf_tokenizer
from transformers import AutoTokenizer

from megatron_brain.data.chat import Chat
from megatron_brain.data.conversations import check_messages
from megatron_brain.data.last_turn import render_last_turn, render_prompt
from megatron_brain.data.tokenizer import HuggingFaceTokenizer, build_tokenizer
from megatron_brain.data.tokenizer.chat_template import TemplateRefusalError, read_template
from megatron_brain.data.turns import encode_all_turns
from megatron_brain.errors import ConfigError, RecordError

MESSAGES = [{"role": "user", "content": "when?"}, {"role": "assistant", "content": "at nine"}]
TOOLS = [{"type": "function", "function": {"name": "get_time", "parameters": {}}}]
NAMES = {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
DATED = "{{ strftime_now('%Y-%m-%d %H:%M') }}\n" + CHATML


def write(folder, template):
    return HuggingFaceTokenizer(write_hf_tokenizer(folder, chat_template=template, **NAMES))


def render(tokenizer, tools=None, **more):
    return tokenizer.render_chat(MESSAGES, add_generation_prompt=False, tools=tools, **more)


@pytest.mark.parametrize("spelling", ["folder", "list"])
def test_of_named_templates_tool_use_is_taken_with_tools_and_default_without(spelling, tmp_path):
    """As transformers chooses, in both forms of its files, after a copy too."""
    folder = write_hf_tokenizer(tmp_path / "a", **NAMES, chat_template={"default": CHATML, "tool_use": THINKING})
    if spelling == "list":
        (tmp_path / "a" / "chat_template.jinja").unlink()
        shutil.rmtree(tmp_path / "a" / "additional_chat_templates")
        path = tmp_path / "a" / "tokenizer_config.json"
        listed = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": THINKING}]
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": listed}))
    tokenizer = HuggingFaceTokenizer(folder)
    tokenizer.save(tmp_path / "b")
    tokenizer.export(tmp_path / "c", "policy")
    for place in ("a", "b", "c"):
        theirs = AutoTokenizer.from_pretrained(tmp_path / place)
        ours = HuggingFaceTokenizer(str(tmp_path / place))
        for tools in (None, TOOLS):
            text = theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
            assert render(ours, tools) == text and ("get_time" in text) == (tools is not None)
        assert ours.marks_turns(TOOLS) and not ours.marks_turns()
        _, response = render_last_turn(Chat(ours, MESSAGES, "x", TOOLS))
        assert response == "at nine<|im_end|>\n"


def test_named_templates_without_a_default_are_refused_with_their_names(tmp_path):
    tokenizer = write(tmp_path, {"rag": CHATML, "tool_use": THINKING})
    assert "get_time" in render(tokenizer, TOOLS)
    with pytest.raises(ConfigError, match="the chat templates rag, tool_use and none called default.*--chat-template"):
        render(tokenizer)


@pytest.mark.parametrize("own", [None, THINKING, {"default": THINKING, "tool_use": THINKING}])
def test_a_template_of_the_users_replaces_all_and_travels(own, tmp_path):
    write_hf_tokenizer(tmp_path / "a", **NAMES, **({} if own is None else {"chat_template": own}))
    file = tmp_path / "mine.jinja"
    file.write_text("MINE " + CHATML)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tmp_path / "a", chat_template=str(file))
    tokenizer.save(tmp_path / "b")
    tokenizer.export(tmp_path / "c", "policy")
    for tools in (None, TOOLS):
        assert render(tokenizer, tools).startswith("MINE")
        for place in ("b", "c"):
            assert render(HuggingFaceTokenizer(str(tmp_path / place)), tools).startswith("MINE")
            theirs = AutoTokenizer.from_pretrained(tmp_path / place)
            assert theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False).startswith("MINE")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"{% for m in messages %}\n{{ m", "not a Jinja template .line 2"),
        (b"{% nothing %}", "not a Jinja template .line 1"),
        (b"", "empty"),
        (b" \n", "empty"),
    ],
)
def test_a_file_that_is_no_template_is_told_with_the_flag(content, message, tmp_path):
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"--chat-template .*mine.jinja: .*{message}"):
        read_template(str(path))


def test_a_clock_stands_still_and_each_tokenizer_has_its_own(tmp_path):
    """Also where two tokenizers have the same template, which the library keeps compiled."""
    one, two = write(tmp_path / "1", DATED), write(tmp_path / "2", DATED)
    one.template_time, two.template_time = datetime(2026, 11, 30, 23, 59), datetime(2027, 1, 1, 8)
    for _ in range(2):
        assert render(one).startswith("2026-11-30 23:59\n") and render(two).startswith("2027-01-01 08:00\n")
    assert one.uses_clock and not write(tmp_path / "3", CHATML).uses_clock
    assert write(tmp_path / "4", {"default": CHATML, "tool_use": DATED}).uses_clock


def test_a_template_that_raises_says_what_and_one_that_is_missing_says_the_cure(tmp_path):
    strict = "{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + CHATML
    with pytest.raises(TemplateRefusalError, match="no tools here"):
        render(write(tmp_path / "1", strict), TOOLS)
    with pytest.raises(TemplateRefusalError, match="no attribute 'missing'"):
        render(write(tmp_path / "2", "{{ messages[0].missing.again }}"))
    tokenizer = HuggingFaceTokenizer(write_hf_tokenizer(tmp_path / "3", **NAMES))
    with pytest.raises(ConfigError, match="no chat template: give --chat-template FILE"):
        render(tokenizer)


def test_variables_of_the_record_reach_the_template(tmp_path):
    tokenizer = write(tmp_path, "{% if enable_thinking is defined and not enable_thinking %}QUIET {% endif %}" + CHATML)
    assert render(tokenizer, template_kwargs={"enable_thinking": False}).startswith("QUIET")
    assert not render(tokenizer, template_kwargs={"enable_thinking": True}).startswith("QUIET")


# How DeepSeek V3's template writes calls: only where the content is none, and with arguments that are texts.
NONE_ALONE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}<|im_start|>assistant\n"
    "{% for c in m['tool_calls'] %}{{ '<call>' + c['function']['name'] + c['function']['arguments'] + '</call>' }}"
    "{% endfor %}<|im_end|>{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EMPTY_ALONE = NONE_ALONE.replace("m['content'] is none", "m['content'] is defined and not m['content']").replace(
    "{% else %}", "{% elif m['content'] %}"
)


@pytest.mark.parametrize("template", [NONE_ALONE, EMPTY_ALONE, NONE_ALONE.replace("is none", "is undefined")])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_calls_without_a_text_go_to_templates_as_these_expect_them(template, content, tmp_path):
    call = {"role": "assistant", **content, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    messages = check_messages([MESSAGES[0], call, MESSAGES[0], MESSAGES[1]], "messages", "x")
    tokenizer = write(tmp_path, template)
    for function in (render_last_turn, encode_all_turns):
        function(Chat(tokenizer, messages[:2], "x"))
        function(Chat(tokenizer, messages, "x"))
    _, response = render_last_turn(Chat(tokenizer, messages[:2], "x"))
    assert response == '<call>f{"a": 1}</call><|im_end|>'


@pytest.mark.parametrize(
    ("turn", "header"),
    [
        # The first template of Llama 3: a turn is opened behind every conversation, asked for or not.
        ("<|im_start|>{{ m.role }}<pad>\n\n{{ m.content }}<|im_end|>", "<|im_start|>assistant<pad>\n\n"),
        ("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n"),
        ("{{ '<s>' if m.role == 'user' else '<pad>' }}{{ m.content }}<|im_end|>\n", "<pad>"),
        ("{{ m.role }}: {{ m.content }}\n", "assistant: "),
    ],
)
def test_a_turn_that_is_opened_behind_every_conversation_is_not_learned(turn, header, tmp_path):
    """Neither is a special token alone. Prompts to sample for are what they should be."""
    every = "{% for m in messages %}" + turn + "{% endfor %}"
    header = f"{{{{ {header!r} }}}}"
    tokenizer = write(tmp_path / "a", every + header)
    for function in (render_last_turn, encode_all_turns):
        with pytest.raises(RecordError, match="x:1: the chat template writes .* behind every conversation"):
            function(Chat(tokenizer, MESSAGES, "x:1"))
    asked = write(tmp_path / "b", every + "{% if add_generation_prompt %}" + header + "{% endif %}")
    assert render_prompt(Chat(tokenizer, MESSAGES[:1], "x")) == render_prompt(Chat(asked, MESSAGES[:1], "x"))
    assert render_last_turn(Chat(asked, MESSAGES, "x"))[1].startswith("at nine")


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        THINKING,
        CHATML + "{{ eos_token }}",
        CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", ""),
        "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}",
        "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else m.content + eos_token }}{% endfor %}",
    ],
)
def test_what_closes_a_conversation_opens_no_turn(template, tmp_path):
    assert write(tmp_path, template).opens_behind() == ""


@pytest.mark.parametrize("place", ["file", "tokenizer", "named"])
def test_a_byte_order_mark_is_no_part_of_a_template(place, tmp_path):
    own = {"tokenizer": "\ufeff" + CHATML, "named": {"default": "\ufeff" + CHATML, "tool_use": THINKING}}.get(place)
    folder = write_hf_tokenizer(tmp_path / "a", **NAMES, **({} if own is None else {"chat_template": own}))
    (tmp_path / "mine.jinja").write_bytes(b"\xef\xbb\xbf" + CHATML.encode())
    mine = {"chat_template": str(tmp_path / "mine.jinja")} if place == "file" else {}
    tokenizer = HuggingFaceTokenizer(folder, **mine)
    tokenizer.export(tmp_path / "b", "policy")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "b").apply_chat_template(MESSAGES, tokenize=False)
    assert render(tokenizer) == theirs and theirs.startswith("<|im_start|>user")


def test_a_template_that_ends_no_turn_in_the_middle_is_warned_of(tmp_path, caplog):
    """GLM 4's: the header of the next message is what stops a turn."""
    ends = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    opens = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = write(tmp_path / "a", ends + opens)
    with caplog.at_level(logging.WARNING):
        encode_all_turns(Chat(tokenizer, MESSAGES, "x"))
        encode_all_turns(Chat(write(tmp_path / "b", CHATML), 2 * MESSAGES, "x"))
    assert "ends no turn but the last" not in caplog.text
    with caplog.at_level(logging.WARNING):
        encode_all_turns(Chat(tokenizer, 2 * MESSAGES, "x"))
    assert "ends no turn but the last" in caplog.text


def test_a_template_without_a_generation_prompt_is_warned_of(tmp_path, caplog):
    """The header of an answer is learned and sampled as part of it."""
    without = CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "")
    for number, template in enumerate([CHATML, "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"]):
        with caplog.at_level(logging.WARNING):
            write(tmp_path / str(number), template)
    assert "generation prompt" not in caplog.text
    with caplog.at_level(logging.WARNING):
        write(tmp_path / "c", without)
    assert "writes no generation prompt: '<|im_start|>assistant' before an answer is learned" in caplog.text
