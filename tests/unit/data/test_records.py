import datetime
import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_brain.config.data import DataConfig
from megatron_brain.data.chat import Chat
from megatron_brain.data.last_turn import render_prompt
from megatron_brain.data.records import PreferenceReader, PromptReader, SFTReader, read_records
from megatron_brain.data.sources import load_records
from megatron_brain.errors import ConfigError, RecordError

ROOMY = DataConfig(seq_length=512)
USER = {"role": "user", "content": "hello"}
GOOD = {"role": "assistant", "content": "a short summary"}
BAD = {"role": "assistant", "content": "no"}


def sft_groups(records, tokenizer, limits, **options):
    return read_records(SFTReader(tokenizer, limits, **options), records)


def preference_groups(records, tokenizer, limits):
    return read_records(PreferenceReader(tokenizer, limits), records)


def prompt_groups(records, tokenizer, limits, **options):
    return read_records(PromptReader(tokenizer, limits, **options), records)


def at(*records):
    return [(f"d.jsonl:{line}", record) for line, record in enumerate(records, start=1)]


def test_sft_group_is_encoded_prompt_then_encoded_response(any_tokenizer):
    (group,), report = sft_groups(at({"prompt": "hello\nTL;DR:", "completion": " fast"}), any_tokenizer, ROOMY)
    assert group.prompt == tuple(any_tokenizer.encode_prompt("hello\nTL;DR:"))
    assert group.responses == (tuple(any_tokenizer.encode_response(" fast")),)
    assert group.loss_masks is None and group.record_id == "d.jsonl:1"
    assert (report.read, report.kept) == (1, 1)


def test_both_chat_formats_give_the_same_group(hf):
    groups, _ = sft_groups(at({"messages": [USER, GOOD]}, {"prompt": [USER], "completion": [GOOD]}), hf, ROOMY)
    rendered = render_prompt(Chat(hf, [USER], ""))
    assert groups[0].prompt == groups[1].prompt == tuple(hf.encode_prompt(rendered, chat=True))
    assert groups[0].responses == groups[1].responses == (tuple(hf.encode_response("a short summary")),)


def test_multi_turn_loss_marks_every_assistant_turn(hf_marked):
    (group,), _ = sft_groups(at({"messages": [USER, BAD, USER, GOOD]}), hf_marked, ROOMY, multi_turn_loss=True)
    (response,), (mask,) = group.responses, group.loss_masks
    counted = [i for i, m in zip(response, mask, strict=True) if m]
    assert counted == hf_marked.encode_response("no") + hf_marked.encode_response("a short summary")
    assert not all(mask)


def test_order_is_kept_across_formats_and_batches(hf):
    plain = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(2500)]
    mixed = plain[:1200] + [{"messages": [USER, GOOD]}] + plain[1200:]
    groups, report = sft_groups(at(*mixed), hf, ROOMY)
    assert [g.record_id for g in groups] == [where for where, _ in at(*mixed)]
    assert groups[2000].responses == (tuple(hf.encode_response("c1999")),)
    assert report.read == report.kept == 2501 and report.duplicates == 0


def test_preference_pair_holds_chosen_then_rejected_and_the_margin(any_tokenizer):
    pairs, _ = preference_groups(
        at(
            {"prompt": "p", "chosen": " yes", "rejected": " no", "margin": 2},
            {"prompt": "p", "chosen": " yes", "rejected": " no", "margin": None},
        ),
        any_tokenizer,
        ROOMY,
    )
    assert pairs[0].group.responses == tuple(tuple(any_tokenizer.encode_response(t)) for t in (" yes", " no"))
    assert [p.margin for p in pairs] == [2.0, 0.0]


def test_explicit_and_implicit_prompts_of_chats_are_the_same_pair(hf):
    pairs, report = preference_groups(
        at(
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        ),
        hf,
        ROOMY,
    )
    assert pairs[0].group.prompt == pairs[1].group.prompt
    assert pairs[0].group.responses == pairs[1].group.responses
    assert report.duplicates == 1


def test_implicit_prompt_of_plain_dialogues(hf):
    cue = "\n\nHuman: hello\n\nAssistant:"
    (pair,), _ = preference_groups(at({"chosen": cue + " yes", "rejected": cue + " no"}), hf, ROOMY)
    assert hf.decode(pair.group.prompt) == cue
    assert [hf.decode(r) for r in pair.group.responses] == [" yes", " no"]


def test_identical_pairs_are_counted(hf):
    _, report = preference_groups(at({"prompt": "p", "chosen": "same", "rejected": "same"}), hf, ROOMY)
    assert report.identical_pairs == 1 and "1 identical pairs" in str(report)


def test_prompts_have_the_ids_that_training_conditions_on(any_tokenizer):
    record = {"prompt": "hello\nTL;DR:", "completion": " fast", "id": 7}
    (prompt,), _ = prompt_groups(at(record), any_tokenizer, ROOMY)
    (group,), _ = sft_groups(at(record), any_tokenizer, ROOMY)
    assert prompt.tokens == group.prompt
    assert (prompt.text, prompt.reference, prompt.record_id) == ("hello\nTL;DR:", " fast", "7")


def test_prompts_come_from_every_format(hf):
    records = [
        {"messages": [USER, GOOD]},
        {"messages": [USER]},
        {"prompt": [USER], "completion": [GOOD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER]},
    ]
    prompts, report = prompt_groups(at(*records), hf, ROOMY)
    assert {p.tokens for p in prompts} == {tuple(hf.encode_prompt(prompts[0].text, chat=True))}
    assert prompts[0].text == render_prompt(Chat(hf, [USER], ""))
    assert [p.reference for p in prompts] == ["a short summary", None] + ["a short summary"] * 3 + [None]
    assert prompts[0].record_id == "d.jsonl:1" and report.duplicates == 5


def test_prompts_leave_room_for_the_response(hf):
    limits = DataConfig(seq_length=20, overlong="truncate")
    record = {"prompt": "0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 TL;DR:"}
    (prompt,), report = prompt_groups(at(record), hf, limits, room=8)
    assert len(prompt.tokens) == 12 and report.truncated_prompt == 1
    assert hf.decode(prompt.tokens).endswith("TL;DR:") and prompt.text.startswith("0 1")
    with pytest.raises(RecordError, match="d.jsonl:1: too long.*12 leave room"):
        prompt_groups(at({"prompt": prompt.text}), hf, DataConfig(seq_length=20), room=8)


def test_dropped_and_truncated_records_are_counted(hf):
    long = {"prompt": "0123456789" * 5 + "TL;DR:", "completion": "ok"}
    short = {"prompt": "hi", "completion": "ok"}
    groups, report = sft_groups(at(long, short, short), hf, DataConfig(seq_length=16, overlong="drop"))
    assert [g.record_id for g in groups] == ["d.jsonl:2", "d.jsonl:3"]
    assert report.as_dict() == {
        "read": 3,
        "kept": 2,
        "dropped_overlong": 1,
        "dropped_unlearned": 0,
        "dropped_dialogues": 0,
        "truncated_prompt": 0,
        "truncated_response": 0,
        "duplicates": 1,
        "identical_pairs": 0,
    }
    groups, report = sft_groups(at(long, short), hf, DataConfig(seq_length=16, overlong="truncate"))
    assert len(groups[0].prompt) + len(groups[0].responses[0]) == 16
    assert groups[0].responses[0][-1] == hf.eos_id and report.truncated_prompt == 1
    with pytest.raises(ConfigError, match="no record left"):
        sft_groups(at(long), hf, DataConfig(seq_length=16, overlong="drop"))


@pytest.mark.parametrize("overlong", ["error", "drop", "truncate"])
def test_a_response_without_tokens_is_an_error_in_every_mode(sp, overlong):
    limits = DataConfig(seq_length=64, overlong=overlong)
    invisible = next(c for c in "\u200b\ufeff\x01\x7f" if sp.encode(c) == [])
    with pytest.raises(RecordError, match="d.jsonl:1: a response has no tokens"):
        sft_groups(at({"prompt": "hello", "completion": invisible}), sp, limits)


def test_truncated_conversations_still_start_with_a_token_to_learn(hf_marked):
    limits = DataConfig(seq_length=64, max_response_length=1, overlong="truncate")
    messages = [USER, GOOD, USER, GOOD]
    (group,), report = sft_groups(at({"messages": messages}), hf_marked, limits, multi_turn_loss=True)
    assert group.loss_masks == ((True,),) and report.truncated_response == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "text": "t"}, "'completion' is missing; the record has prompt, text"),
        ({"text": "t"}, "is missing; the record has text"),
        ({}, "no fields"),
        ({"prompt": None, "completion": "c"}, "'prompt' is missing"),
        ({"prompt": "", "completion": "c"}, "'prompt' is empty"),
        ({"prompt": "p", "completion": " \n"}, "'completion' is empty"),
        ({"prompt": "p", "completion": 3}, "'completion' must be a text"),
        ({"prompt": "p", "completion": [GOOD]}, "all texts or all lists of messages"),
        ({"prompt": [USER], "completion": [GOOD, USER]}, "one assistant message"),
        ({"prompt": [USER], "completion": [USER]}, "must be the assistant's"),
        ({"prompt": [], "completion": [GOOD]}, "one or more messages"),
        ({"messages": None}, "list of one or more messages"),
    ],
)
def test_bad_sft_records_name_line_field_and_keys(hf, record, message):
    good = {"prompt": "p", "completion": "c"}
    with pytest.raises(RecordError, match=f"^d.jsonl:2: .*{message}"):
        sft_groups(at(good, record), hf, ROOMY)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, "'rejected' is missing; the record has prompt, chosen"),
        ({"prompt": "p", "chosen": "", "rejected": "r"}, "'chosen' is empty"),
        ({"prompt": "p", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "leave 'prompt' out"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": "1"}, "'margin' must be a finite number, not '1'"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": float("nan")}, "'margin' must be a finite"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": True}, "'margin' must be a finite"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": 10**400}, "'margin' must be a finite"),
        ({"chosen": True, "rejected": False}, "field 'chosen' must be a text or a list of messages, not bool"),
        ({"chosen": "a\n\nAssistant: b", "rejected": 5}, "field 'rejected' must be a text .* not int"),
    ],
)
def test_bad_preference_records_name_line_and_field(hf, record, message):
    with pytest.raises(RecordError, match=f"^d.jsonl:1: .*{message}"):
        preference_groups(at(record), hf, ROOMY)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"completion": "c"}, "'prompt' is missing"),
        ({"prompt": " "}, "'prompt' is empty"),
        ({"prompt": 3}, "'prompt' must be a text"),
        ({"prompt": "p", "completion": ""}, "'completion' is empty"),
        ({"prompt": "p", "chosen": 1}, "'chosen' must be a text"),
    ],
)
def test_bad_prompt_records_name_line_and_field(hf, record, message):
    with pytest.raises(RecordError, match=f"^d.jsonl:1: .*{message}"):
        prompt_groups(at(record), hf, ROOMY)


def test_a_cut_that_leaves_nothing_to_learn_drops_the_record_and_counts_it(hf_marked):
    """Weight 0 on the first answer, and the cut ends in it: there would be no token to divide the loss by."""
    user, long = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "fox " * 30, "weight": 0}
    unlearned = {"messages": [user, long, user, {"role": "assistant", "content": "fine"}]}
    learned = {"messages": [user, {"role": "assistant", "content": "fine"}]}
    limits = DataConfig(seq_length=48, overlong="truncate")
    groups, report = read_records(SFTReader(hf_marked, limits, multi_turn_loss=True), at(unlearned, learned))
    assert [group.record_id for group in groups] == ["d.jsonl:2"]
    assert (report.kept, report.dropped_unlearned, report.truncated_response) == (1, 1, 0)
    assert "1 dropped unlearned" in str(report)
    with pytest.raises(ConfigError, match="no record left"):
        read_records(SFTReader(hf_marked, limits, multi_turn_loss=True), at(unlearned))


def test_other_fields_of_a_prompt_are_kept_where_a_reward_reads_them_and_only_there(hf, tmp_path):
    tests = [{"input": [1, 2], "output": 3.5, "note": None}]
    records = [
        {"prompt": "sum", "completion": "three", "id": 7, "tests": tests, "answer": 3},
        {"messages": [USER, GOOD], "answer": "ü", "source": {"page": 4}},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    kept, _ = read_records(PromptReader(hf, ROOMY, keeps_fields=True), load_records(str(path)))
    assert [prompt.record for prompt in kept] == [
        {"id": "7", "tests": [{"input": [1, 2], "output": 3.5}], "answer": 3, "completion": "three"},
        {"id": f"{path}:2", "answer": "ü", "source": {"page": 4}, "completion": "a short summary"},
    ]
    plain, _ = read_records(PromptReader(hf, ROOMY), load_records(str(path)))
    assert [(prompt.fields, prompt.record) for prompt in plain] == [(None, {})] * 2


def test_a_column_of_a_table_is_a_field_like_one_of_jsonl(hf, tmp_path):
    tests = [{"input": "1", "n": 2}]
    rows = [{"prompt": "sum", "tests": tests, "answer": None}, {"prompt": "a", "answer": "x"}]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "prompts.parquet")
    with (
        pyarrow.OSFile(str(tmp_path / "prompts.arrow"), "wb") as file,
        pyarrow.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)
    for name in ("prompts.parquet", "prompts.arrow"):
        found, _ = read_records(PromptReader(hf, ROOMY, keeps_fields=True), load_records(str(tmp_path / name)))
        assert [prompt.fields for prompt in found] == [{"tests": tests}, {"answer": "x"}]


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 2), b"x", float("nan")])
def test_a_field_that_json_cannot_write_is_refused_where_a_reward_reads_it(value, hf):
    record = {"prompt": "sum", "answer": {"of": [value]}}
    read_records(PromptReader(hf, ROOMY), at(record))
    with pytest.raises(RecordError, match=r"field 'answer', which the reward reads,.of\[0\] is"):
        read_records(PromptReader(hf, ROOMY, keeps_fields=True), at(record))


def test_the_fingerprint_covers_the_fields_where_a_reward_reads_them(hf):
    records = [{"prompt": "sum", "answer": 3}, {"prompt": "sum", "answer": 4}, {"answer": 3, "prompt": "sum"}]
    for keeps, distinct in ((True, [0, 1, 0]), (False, [0, 0, 0])):
        reader = PromptReader(hf, ROOMY, keeps_fields=keeps)
        hashes = [reader.hash(item) for item in read_records(reader, at(*records))[0]]
        assert [hashes.index(found) for found in hashes] == distinct
