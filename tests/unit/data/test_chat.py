import pytest
from helpers.tiny_tokenizers import CHATML, CHATML_MARKED, write_hf_tokenizer

from megatron_brain.data.chat import Chat
from megatron_brain.data.conversations import check_messages, split_shared_dialogue, split_shared_messages
from megatron_brain.data.last_turn import render_last_turn, render_prompt
from megatron_brain.data.tokenizer import HuggingFaceTokenizer
from megatron_brain.data.turns import encode_all_turns
from megatron_brain.errors import RecordError

DIALOGUE = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "how are you?"},
    {"role": "user", "content": "fine!"},
    {"role": "assistant", "content": "a short summary"},
]


CALLS = [{"role": "assistant", "content": "x", "tool_calls": "search"}]


def with_template(tmp_path, template):
    return HuggingFaceTokenizer(write_hf_tokenizer(tmp_path, eos_token="<|im_end|>", chat_template=template))


def test_last_turn_is_cut_after_the_generation_prompt(hf):
    prompt, response = render_last_turn(Chat(hf, DIALOGUE, "d.jsonl:1"))
    assert prompt.endswith("<|im_start|>user\nfine!<|im_end|>\n<|im_start|>assistant\n")
    assert response == "a short summary<|im_end|>\n"
    assert prompt == render_prompt(Chat(hf, DIALOGUE[:-1], "d.jsonl:1"))


def test_all_turns_mask_counts_exactly_what_the_assistant_wrote(hf_marked):
    prompt, response, mask = encode_all_turns(Chat(hf_marked, DIALOGUE, "d.jsonl:1"))
    rendered = hf_marked.render_chat(DIALOGUE, add_generation_prompt=False)
    assert prompt + response == hf_marked.encode_prompt(rendered.rstrip("\n"), chat=True)
    counted = [i for i, m in zip(response, mask, strict=True) if m]
    turns = [hf_marked.encode_response(DIALOGUE[i]["content"]) for i in (1, 3)]
    assert counted == turns[0] + turns[1]
    assert response[-1] == hf_marked.eos_id and mask[0] and mask[-1]


def test_one_turn_is_the_same_with_either_loss(hf_marked):
    prompt, response, mask = encode_all_turns(Chat(hf_marked, DIALOGUE[:2], "x"))
    prompt_text, response_text = render_last_turn(Chat(hf_marked, DIALOGUE[:2], "x"))
    assert prompt == hf_marked.encode_prompt(prompt_text, chat=True)
    assert response == hf_marked.encode_response(response_text, chat=True)
    assert all(mask)


def test_all_turns_add_eos_where_the_template_ends_turns_otherwise(tmp_path):
    path = write_hf_tokenizer(tmp_path, eos_token="</s>", chat_template=CHATML_MARKED)
    tokenizer = HuggingFaceTokenizer(path)
    _, response, mask = encode_all_turns(Chat(tokenizer, DIALOGUE, "x"))
    assert response[-2:] == [tokenizer.hf.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_id]
    assert mask[-2:] == [True, True]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML_MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"), "end-of-turn token"),
        (CHATML_MARKED.replace("m['role'] == 'assistant'", "m['content'] == 'how are you?'"), "marks 1 of 2"),
        (CHATML_MARKED.replace("m['role'] == 'assistant'", "false"), "marks 0 of 2"),
    ],
)
def test_a_template_that_does_not_mark_every_turn_is_an_error_with_the_cure(tmp_path, template, message):
    with pytest.raises(RecordError, match=rf"d.jsonl:3: .*{message}") as error:
        encode_all_turns(Chat(with_template(tmp_path, template), DIALOGUE, "d.jsonl:3"))
    assert "{% generation %}" in str(error.value)


def test_a_template_that_rewrites_the_prompt_is_an_error(tmp_path):
    tokenizer = with_template(tmp_path, CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"))
    with pytest.raises(RecordError, match="d.jsonl:3: .*cannot be cut out"):
        render_last_turn(Chat(tokenizer, DIALOGUE, "d.jsonl:3"))


def test_a_template_that_refuses_the_messages_names_the_record(tmp_path):
    tokenizer = with_template(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RecordError, match="d.jsonl:3: the chat template refuses.*roles must alternate"):
        render_prompt(Chat(tokenizer, DIALOGUE[:1], "d.jsonl:3"))


def test_tokenizers_without_chat_template_say_what_to_do(sp, hf_bos):
    for tokenizer in (sp, hf_bos):
        for function in (render_last_turn, encode_all_turns):
            with pytest.raises(RecordError, match="d.jsonl:3: .*no chat template: give --chat-template"):
                function(Chat(tokenizer, DIALOGUE, "d.jsonl:3"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (DIALOGUE[:3], "must be the assistant's, not the user's"),
        ([*DIALOGUE[:3], {"role": "assistant", "content": " "}], "last assistant message is empty"),
        (DIALOGUE[1:2], "must have a message before"),
    ],
)
def test_conversations_without_an_answer_or_a_prompt_are_errors(hf, messages, message):
    with pytest.raises(RecordError, match=rf"d.jsonl:3: .*{message}"):
        render_last_turn(Chat(hf, messages, "d.jsonl:3"))


@pytest.mark.parametrize("bad", ["text", [], ["text"], [{"content": "x"}], [{"role": "user"}], CALLS])
def test_malformed_messages_name_record_and_field(bad):
    with pytest.raises(RecordError, match="d.jsonl:3: '?messages"):
        check_messages(bad, "messages", "d.jsonl:3")


def test_a_content_in_parts_is_the_same_as_one_text():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert check_messages([{"role": "user", "content": parts}], "messages", "x") == [
        {"role": "user", "content": "one two"}
    ]


def test_null_columns_of_a_table_are_removed():
    table_row = [{"role": "user", "content": "x", "tool_calls": None}]
    assert check_messages(table_row, "messages", "x") == [{"role": "user", "content": "x"}]


def test_shared_messages_become_the_prompt():
    other = [*DIALOGUE[:3], {"role": "assistant", "content": "no"}]
    assert split_shared_messages(DIALOGUE, other, "x") == (DIALOGUE[:3], DIALOGUE[3:], other[3:])
    with pytest.raises(RecordError, match="share every message but the last"):
        split_shared_messages(DIALOGUE, DIALOGUE[:2], "x")


def test_plain_dialogues_split_at_the_last_shared_answer_cue():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert split_shared_dialogue(start + " yes it is", start + " yes no", "x") == (start, " yes it is", " yes no")
    with pytest.raises(RecordError, match="d.jsonl:3: no 'prompt'"):
        split_shared_dialogue("abc", "abd", "d.jsonl:3")
