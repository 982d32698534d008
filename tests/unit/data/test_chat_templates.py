"""Templates of the shapes that models come with: which tokens are learned, and what is refused instead of guessed."""

import logging
from dataclasses import dataclass

import pytest
from helpers.tiny_tokenizers import CHATML, CHATML_MARKED, train_sentencepiece, write_hf_tokenizer

from megatron_brain.data.chat import Chat
from megatron_brain.data.last_turn import render_last_turn
from megatron_brain.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_brain.data.turns import encode_all_turns
from megatron_brain.errors import RecordError

QUESTION = {"role": "user", "content": "hello world"}
DIALOGUE = [
    QUESTION,
    {"role": "assistant", "content": "how are you?"},
    {"role": "user", "content": "fine!"},
    {"role": "assistant", "content": "a short summary"},
]


@dataclass
class Shape:
    """A template, its special tokens, and what a turn of the assistant is made of."""

    template: str
    special: list[str]
    eos: str
    turn: str
    system: bool = True


LLAMA3 = (
    "{{ bos_token }}{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}{{ tools | tojson }}"
    "{{ '<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% if role == 'model' %}{% generation %}"
    "{{ m['content'] | trim + '<end_of_turn>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PHI3_TOKENS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
SHAPES = {
    "chatml": Shape(CHATML_MARKED, CHATML_TOKENS, "<|im_end|>", "{}<|im_end|>"),
    "chatml_other_eos": Shape(CHATML_MARKED, CHATML_TOKENS, "</s>", "{}<|im_end|>"),
    "llama3": Shape(LLAMA3, LLAMA3_TOKENS, "<|eot_id|>", "{}<|eot_id|>"),
    "llama3_other_eos": Shape(LLAMA3, LLAMA3_TOKENS, "</s>", "{}<|eot_id|>"),
    "mistral": Shape(MISTRAL, ["[INST]", "[/INST]"], "</s>", " {}</s>", system=False),
    "gemma": Shape(GEMMA, ["<start_of_turn>", "<end_of_turn>"], "</s>", "{}<end_of_turn>", system=False),
    "phi3": Shape(PHI3, PHI3_TOKENS, "</s>", "{}<|end|>"),
}


def make(tmp_path, shape, template=None):
    special = ["<unk>", "<s>", "</s>", "<pad>", *shape.special]
    names = {"bos_token": "<s>", "eos_token": shape.eos, "pad_token": "<pad>"}
    template = shape.template if template is None else template
    return HuggingFaceTokenizer(write_hf_tokenizer(tmp_path, special=special, chat_template=template, **names))


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def expected_turn(tokenizer, shape, text):
    """Ids of a turn by hand: its text, its end-of-turn token, and EOS where that is another token."""
    ids = tokenizer.encode_batch([shape.turn.format(text)], parse_special=True)[0]
    return ids if ids[-1] == tokenizer.eos_id else [*ids, tokenizer.eos_id]


def test_the_last_turn_is_its_text_its_end_of_turn_token_and_eos(shape, tmp_path):
    tokenizer = make(tmp_path, shape)
    prompt, response = render_last_turn(Chat(tokenizer, DIALOGUE, "x"))
    ids = tokenizer.encode_response(response, chat=True)
    assert ids == expected_turn(tokenizer, shape, "a short summary")
    assert prompt.count("<s>") == shape.template.count("bos_token")
    assert tokenizer.encode_prompt(prompt, chat=True).count(tokenizer.bos_id) == shape.template.count("bos_token")


def test_all_turns_are_exactly_the_assistants_and_one_turn_is_the_same_either_way(shape, tmp_path):
    tokenizer = make(tmp_path, shape)
    prompt, response, mask = encode_all_turns(Chat(tokenizer, DIALOGUE, "x"))
    learned = [i for i, m in zip(response, mask, strict=True) if m]
    first = expected_turn(tokenizer, shape, "how are you?")
    if tokenizer.encode_batch([shape.turn], parse_special=True)[0][-1] != tokenizer.eos_id:
        first = first[:-1]  # EOS ends the whole conversation only
    assert learned == first + expected_turn(tokenizer, shape, "a short summary")
    prompt, response, mask = encode_all_turns(Chat(tokenizer, DIALOGUE[:2], "x"))
    texts = render_last_turn(Chat(tokenizer, DIALOGUE[:2], "x"))
    assert prompt == tokenizer.encode_prompt(texts[0], chat=True)
    assert response == tokenizer.encode_response(texts[1], chat=True)
    assert all(mask)


def test_system_messages_and_tools_are_prompt_or_refused_at_the_record(shape, tmp_path):
    tokenizer = make(tmp_path, shape)
    messages = [{"role": "system", "content": "numbers"}, *DIALOGUE]
    for function in (render_last_turn, encode_all_turns):
        if not shape.system:
            with pytest.raises(RecordError, match="d.jsonl:3: the chat template refuses these messages"):
                function(Chat(tokenizer, messages, "d.jsonl:3"))
            continue
        prompt = function(Chat(tokenizer, messages, "x"))[0]
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        assert "numbers" in text
    if shape.template is LLAMA3:
        tools = [{"name": "search"}]
        assert '"search"' in render_last_turn(Chat(tokenizer, DIALOGUE, "x", tools))[0]
        assert '"search"' in tokenizer.decode(encode_all_turns(Chat(tokenizer, DIALOGUE, "x", tools))[0])


def test_an_end_of_turn_token_that_is_not_marked_is_refused(shape, tmp_path):
    """The turn's last token moves behind the end of the generation block."""
    end = shape.turn.rpartition("{}")[2]
    written = next(way for way in (f" + '{end}' }}}}", " + eos_token }}", end) if way in shape.template)
    moved = {end: end}.get(written, "{{" + written.removeprefix(" +"))
    rest = {end: ""}.get(written, " }}")
    template = shape.template.replace(written + "{% endgeneration %}", rest + "{% endgeneration %}" + moved)
    assert template != shape.template
    with pytest.raises(RecordError, match="d.jsonl:3: .*leaves the end-of-turn token unmarked.*{% generation %}"):
        encode_all_turns(Chat(make(tmp_path, shape, template), DIALOGUE, "d.jsonl:3"))


def test_a_template_that_marks_everything_is_refused(shape, tmp_path):
    bare = shape.template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    template = "<pad>{% generation %}" + bare + "{% endgeneration %}"
    tokenizer = make(tmp_path, shape, template)
    with pytest.raises(RecordError, match="d.jsonl:3: .*marks what precedes the assistant's turn messages.1."):
        encode_all_turns(Chat(tokenizer, DIALOGUE[:2], "d.jsonl:3"))
    with pytest.raises(RecordError, match="d.jsonl:3: .*marks 1 of 2 assistant turns"):
        encode_all_turns(Chat(tokenizer, DIALOGUE, "d.jsonl:3"))


@pytest.mark.parametrize(
    ("user_end", "marked", "message"),
    [
        (
            "{% generation %}<|im_end|>{% endgeneration %}",
            "{% generation %}<|im_start|>assistant\n",
            "marks what precedes the assistant's turn messages.1., '<.im_end.>'",
        ),
        (
            "<|im_end|>",
            "<|im_start|>assistant\n{{ m['content'][:3] }}{% generation %}",
            "leaves the beginning of the assistant's turn messages.1. unmarked, 'how'",
        ),
    ],
)
def test_marks_that_do_not_begin_where_sampling_does_are_refused(tmp_path, user_end, marked, message):
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>user\n{{ m['content'] }}"
        + user_end
        + "{% else %}"
        + marked
        + "{{ m['content'] }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(RecordError, match=f"d.jsonl:3: .*{message}"):
        encode_all_turns(Chat(make(tmp_path, SHAPES["chatml"], template), DIALOGUE, "d.jsonl:3"))


def test_a_header_that_is_marked_is_not_learned(tmp_path):
    """Sampling begins behind it: it is the generation prompt. TRL marks Qwen 2.5 and gpt-oss like that."""
    header = "<|im_start|>{{ m['role'] }}\n"
    for place, begins in enumerate(["{% generation %}" + header, header[:-1] + "{% generation %}{{ '\n' }}"]):
        template = CHATML_MARKED.replace(header, "").replace("{% else %}", "{% else %}" + header)
        tokenizer = make(tmp_path / str(place), SHAPES["chatml"], template.replace("{% generation %}", begins))
        whole = make(tmp_path / f"{place}whole", SHAPES["chatml"])
        assert encode_all_turns(Chat(tokenizer, DIALOGUE, "x")) == encode_all_turns(Chat(whole, DIALOGUE, "x"))


def test_blocks_that_adjoin_are_one_turn(tmp_path):
    end = "{% endgeneration %}{% generation %}<|im_end|>"
    tokenizer = make(tmp_path, SHAPES["chatml"], CHATML_MARKED.replace("<|im_end|>{% endg", end + "{% endg"))
    whole = make(tmp_path / "whole", SHAPES["chatml"])
    assert encode_all_turns(Chat(tokenizer, DIALOGUE, "x")) == encode_all_turns(Chat(whole, DIALOGUE, "x"))


def test_white_space_that_is_marked_behind_the_end_of_turn_token_is_not_learned(tmp_path):
    end = "<|im_end|>{% endgeneration %}"
    template = CHATML_MARKED.replace(end, end.replace("{%", "{{ '\n' }}{%"))
    tokenizer = make(tmp_path, SHAPES["chatml"], template)
    _, response, mask = encode_all_turns(Chat(tokenizer, DIALOGUE, "x"))
    learned = [i for i, m in zip(response, mask, strict=True) if m]
    turns = [expected_turn(tokenizer, SHAPES["chatml"], DIALOGUE[i]["content"]) for i in (1, 3)]
    assert learned == turns[0] + turns[1]


def test_tools_their_calls_and_thoughts_that_the_template_does_not_write_are_refused(tmp_path):
    tokenizer = make(tmp_path, SHAPES["chatml"])
    search = {"type": "function", "function": {"name": "search", "arguments": {"q": "x"}}}
    for function in (render_last_turn, encode_all_turns):
        for field, message in ({"tool_calls": [search]}, "search"), ({"reasoning_content": "numbers"}, "numbers"):
            with pytest.raises(RecordError, match=f"d.jsonl:3: .*leaves out some of what the assistant.*{message}"):
                function(Chat(tokenizer, [QUESTION, DIALOGUE[1] | field], "d.jsonl:3"))
        with pytest.raises(RecordError, match="d.jsonl:3: .*leaves out the tool 'search'"):
            function(Chat(tokenizer, DIALOGUE, "d.jsonl:3", [search]))


def test_a_sentencepiece_prefix_gives_one_eos_and_the_same_turn_either_way(tmp_path):
    """The library puts a token of nothing but a space before each text, that behind EOS included."""
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + eos_token }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    SentencePieceTokenizer(train_sentencepiece(tmp_path, **settings)).export(tmp_path / "hf", "policy")
    (tmp_path / "hf" / "chat_template.jinja").write_text(template)
    tokenizer = HuggingFaceTokenizer(str(tmp_path / "hf"))
    prompt, response, mask = encode_all_turns(Chat(tokenizer, DIALOGUE[:2], "x"))
    texts = render_last_turn(Chat(tokenizer, DIALOGUE[:2], "x"))
    assert response == tokenizer.encode_response(texts[1], chat=True) == tokenizer.encode_response("how are you?")
    assert prompt == tokenizer.encode_prompt(texts[0], chat=True) and all(mask)


def test_thinking_that_the_template_drops_is_never_dropped_silently(tmp_path):
    keep_last = "(m['content'].split('</think>')[-1] if not loop.last else m['content'])"
    drop_all = "m['content'].split('</think>')[-1]"
    thinking = [
        QUESTION,
        {"role": "assistant", "content": "<think>numbers</think>how are you?"},
        {"role": "user", "content": "fine!"},
        {"role": "assistant", "content": "<think>strings</think>a short summary"},
    ]
    shape = SHAPES["chatml"]
    earlier = make(tmp_path / "a", shape, CHATML_MARKED.replace("m['content']", keep_last))
    prompt, response = render_last_turn(Chat(earlier, thinking, "x"))
    assert "numbers" not in prompt and response == "<think>strings</think>a short summary<|im_end|>"
    with pytest.raises(RecordError, match="d.jsonl:3: .*leaves out.*numbers.*--multi-turn-loss"):
        encode_all_turns(Chat(earlier, thinking, "d.jsonl:3"))
    everywhere = make(tmp_path / "b", shape, CHATML_MARKED.replace("m['content']", drop_all))
    with pytest.raises(RecordError, match="d.jsonl:3: .*leaves out.*strings"):
        render_last_turn(Chat(everywhere, thinking, "d.jsonl:3"))


def test_thinking_that_the_generation_prompt_opens_is_learned_from_there_on(tmp_path):
    template = CHATML_MARKED.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = make(tmp_path, SHAPES["chatml"], template)
    thinking = [QUESTION, {"role": "assistant", "content": "<think>\nnumbers\n</think>\nfine!"}]
    prompt, response = render_last_turn(Chat(tokenizer, thinking, "x"))
    assert prompt.endswith("<think>\n") and response == "numbers\n</think>\nfine!<|im_end|>"


def test_an_end_of_turn_token_other_than_eos_is_warned_of_when_the_tokenizer_is_read(shape, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make(tmp_path, shape)
    end = shape.turn.rpartition("{}")[2]
    assert (f"ends a turn with {end!r}, but EOS is {shape.eos!r}" in caplog.text) == (end != shape.eos)


def test_a_generation_prompt_that_opens_more_than_the_marked_turns_begin_with_is_warned_of(tmp_path, caplog):
    """TRL marks DeepSeek's and Nemotron's like that: sampling opens a thought, and what has none is learned without."""
    opens = "assistant\n<think>\n{% endif %}"
    tokenizer = make(tmp_path, SHAPES["chatml"], CHATML_MARKED.replace("assistant\n{% endif %}", opens))
    plain = make(tmp_path / "plain", SHAPES["chatml"])
    with caplog.at_level(logging.WARNING):
        found = [encode_all_turns(Chat(tokenizer, DIALOGUE, "x")) for _ in range(2)]
    assert found == 2 * [encode_all_turns(Chat(plain, DIALOGUE, "x"))]
    assert caplog.text.count("opens a turn for sampling with '<|im_start|>assistant\\n<think>\\n' but begins some") == 1
    unmarked = make(tmp_path / "unmarked", SHAPES["chatml"], CHATML.replace("assistant\n{% endif %}", opens))
    with pytest.raises(RecordError, match=r"the assistant's turn messages\[1\] cannot be cut out"):
        encode_all_turns(Chat(unmarked, DIALOGUE, "x"))
