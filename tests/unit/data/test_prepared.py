"""Prepared data: the items of the raw records, made on demand, and refused where they are not the run's."""

import dataclasses
import json

import numpy
import pytest
from helpers.reading import reading_settings

from megatron_brain.config.data import DataConfig
from megatron_brain.data.corpus import num_tokens, read_corpus
from megatron_brain.data.prepared.preparation import Preparation, prepare
from megatron_brain.data.tokenizer import HuggingFaceTokenizer
from megatron_brain.data.tokenizer.fingerprint import tokenizer_fingerprint
from megatron_brain.errors import ConfigError, RecordError

USER = {"role": "user", "content": "hello, how are you?"}
GOOD = {"role": "assistant", "content": "a short summary é\u2028"}
BAD = {"role": "assistant", "content": "no"}
LONG = "the quick brown fox jumps over the lazy dog, again and again and again"
DIALOGUE = "\n\nHuman: hello\n\nAssistant:"
RECORDS = {
    "text": ("sft", [{"prompt": "hello\nTL;DR:", "completion": " fast"}, {"prompt": LONG, "completion": LONG}]),
    "chat": ("sft", [{"prompt": [USER], "completion": [GOOD]}, {"messages": [USER, BAD, USER, GOOD]}]),
    "multi-turn": ("sft", [{"messages": [USER, BAD, USER, GOOD]}, {"prompt": "p", "completion": LONG}]),
    "pairs": (
        "reward",
        [
            {"prompt": "p", "chosen": LONG, "rejected": " no", "margin": 0.1},
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            {"chosen": [USER, GOOD], "rejected": [USER, BAD], "margin": -3},
            {"chosen": DIALOGUE + " yes", "rejected": DIALOGUE + " no"},
        ],
    ),
    "prompts": (
        "brain",
        [
            {"prompt": LONG, "completion": "fast \u2028 é", "id": 7},
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            {"messages": [USER, GOOD], "id": "ü"},
            {"chosen": DIALOGUE + " yes", "rejected": DIALOGUE + " no"},
            {"prompt": "alone"},
        ],
    ),
}


def settings(tokenizer, stage, *, multi_turn_loss=False, max_new_tokens=8, **limits):
    limits = DataConfig(**{"seq_length": 40, "overlong": "truncate", **limits})
    return reading_settings(
        stage=stage,
        tokenizer_type=tokenizer.tokenizer_type,
        tokenizer_model=tokenizer.hf.name_or_path,
        limits=limits,
        multi_turn_loss=multi_turn_loss,
        max_new_tokens=max_new_tokens,
    )


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def prepared(tmp_path):
    """A function that prepares records and returns where they are, raw and prepared."""

    def make(records, reading, form="indexed"):
        raw, prefix = write(tmp_path / "raw.jsonl", records), str(tmp_path / "out" / "data")
        prepare(Preparation(input=raw, split=None, prefix=prefix, format=form, reading=reading))
        return raw, prefix

    return make


@pytest.mark.parametrize("form", ["indexed", "arrow"])
@pytest.mark.parametrize("case", RECORDS)
def test_prepared_items_are_those_of_the_raw_records(case, form, prepared, hf_marked):
    stage, records = RECORDS[case]
    reading = settings(hf_marked, stage, multi_turn_loss=case == "multi-turn")
    raw, prefix = prepared(records, reading, form)
    expected = read_corpus(raw, reading.build()).items
    for source in (prefix, f"{prefix}.json", f"{prefix}.{'arrow' if form == 'arrow' else 'bin'}"):
        items = read_corpus(source, reading.build()).items
        assert list(items) == list(expected) and len(items) == len(records)
    assert items[-1] == expected[-1]
    if stage == "sft":
        assert num_tokens(items) == num_tokens(expected)
        assert (expected[0].loss_masks is not None) == (case == "multi-turn")


@pytest.mark.parametrize("form", ["indexed", "arrow"])
def test_the_first_records_are_counted_in_the_source_not_in_what_was_kept_of_it(form, prepared, hf):
    short, long = {"prompt": "hi", "completion": "ok"}, {"prompt": LONG, "completion": LONG}
    reading = settings(hf, "sft", seq_length=16, overlong="drop")
    raw, prefix = prepared([short, long, short, long, long, short], reading, form)
    for limit in range(1, 8):
        items = read_corpus(prefix, reading.build(), limit=limit).items
        assert list(items) == read_corpus(raw, reading.build(), limit=limit).items
        assert num_tokens(items) == num_tokens(list(items))


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("reward", {}, "prepared with --stage sft, and reward records are needed here; run .* --stage reward"),
        ("sft", {"multi_turn_loss": True}, "prepared with --no-multi-turn-loss; run with it, or prepare it again"),
        ("sft", {"seq_length": 39}, "prepared with --seq-length 40, the run has --seq-length 39; run with --seq-l"),
        ("sft", {"max_prompt_length": 30}, "prepared without --max-prompt-length, .* run without --max-prompt-length"),
        ("sft", {"max_response_length": 9}, "prepared with --max-response-length 10, the run has .* 9"),
    ],
)
def test_data_prepared_for_another_run_are_refused_with_the_cure(stage, changes, message, prepared, hf):
    made = {"max_response_length": 10}
    _, prefix = prepared(RECORDS["text"][1], settings(hf, "sft", **made))
    with pytest.raises(ConfigError, match=message):
        read_corpus(prefix, settings(hf, stage, **{**made, **changes}).build())
    read_corpus(prefix, settings(hf, "sft", seq_length=50, overlong="error").build())


def test_prompts_prepared_for_shorter_responses_are_refused(prepared, hf):
    _, prefix = prepared(RECORDS["prompts"][1][:1], settings(hf, "brain", max_new_tokens=8))
    read_corpus(prefix, settings(hf, "brain", max_new_tokens=24, seq_length=56).build())
    with pytest.raises(ConfigError, match="prompts of up to 32 tokens, .* leave room for 31; raise --seq-length"):
        read_corpus(prefix, settings(hf, "brain", max_new_tokens=9).build())


def test_data_of_another_tokenizer_are_refused(prepared, hf, hf_marked):
    _, prefix = prepared(RECORDS["text"][1], settings(hf, "sft"))
    with pytest.raises(ConfigError, match="prepared with another tokenizer .* or another chat template; run .* --load"):
        read_corpus(prefix, settings(hf_marked, "sft").build())


def test_damaged_and_unfinished_data_are_refused_by_name(prepared, hf, tmp_path):
    reading = settings(hf, "sft")
    _, prefix = prepared(RECORDS["text"][1], reading)
    info, data = tmp_path / "out" / "data.json", tmp_path / "out" / "data.bin"
    kept, whole = info.read_text(), data.read_bytes()
    data.write_bytes(whole[:-4])
    with pytest.raises(ConfigError, match=f"data.bin has {len(whole) - 4} bytes, data.json says {len(whole)}"):
        read_corpus(prefix, reading.build())
    data.unlink()
    with pytest.raises(ConfigError, match="data.bin is missing"):
        read_corpus(prefix, reading.build())
    data.write_bytes(whole)
    info.write_text(json.dumps({**json.loads(kept), "format_version": 0}))
    with pytest.raises(ConfigError, match="prepared in format version 0, this is version 2"):
        read_corpus(prefix, reading.build())
    info.write_text(kept[:-4])
    with pytest.raises(ConfigError, match="data.json: not written by tools/preprocess_data.py"):
        read_corpus(prefix, reading.build())
    info.unlink()
    with pytest.raises(ConfigError, match="data.bin and .*data.idx without a .*data.json .*: copy that too"):
        read_corpus(prefix, reading.build())
    (tmp_path / "out" / "data.parts").mkdir()
    with pytest.raises(ConfigError, match="its preparation has not finished; run the same .* again"):
        read_corpus(prefix, reading.build())


@pytest.mark.parametrize("form", ["indexed", "arrow"])
@pytest.mark.parametrize("case", ["text", "pairs", "prompts", "multi-turn"])
def test_a_flipped_bit_of_a_token_is_found_when_its_item_is_read(case, form, prepared, hf_marked, tmp_path):
    """Another token of the vocabulary is as wrong as none; the others are read as they are."""
    stage, records = RECORDS[case]
    reading = settings(hf_marked, stage, multi_turn_loss=case == "multi-turn")
    raw, prefix = prepared(records, reading, form)
    expected = read_corpus(raw, reading.build()).items
    ids = reading.build().ids(expected[1])[0]
    width = "<u2" if form == "indexed" else "<i4"
    path = tmp_path / "out" / ("data.bin" if form == "indexed" else "data.arrow")
    data = bytearray(path.read_bytes())
    place = bytes(data).index(numpy.asarray(ids, width).tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    items = read_corpus(prefix, reading.build()).items
    assert items[0] == expected[0]
    with pytest.raises(ConfigError, match=f"{prefix}: document 1 is damaged .*by its checksum.* copy the files again"):
        items[1]


def test_records_beside_a_file_of_the_same_name_are_still_records(hf, tmp_path):
    raw = tmp_path / "data.json"
    raw.write_text(json.dumps(RECORDS["text"][1]))
    (tmp_path / "data.arrow").touch()
    assert len(read_corpus(str(raw), settings(hf, "sft").build()).items) == len(RECORDS["text"][1])


@pytest.mark.parametrize("name", ["hf", "hf_bos", "sp"])
def test_a_saved_tokenizer_keeps_its_fingerprint_and_another_has_another(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    tokenizer.encode_batch(["some", "text"])
    tokenizer.save(tmp_path)
    again = type(tokenizer)(str(tmp_path))
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    others = {tokenizer_fingerprint(request.getfixturevalue(other)) for other in ("hf", "hf_bos", "hf_marked", "sp")}
    assert len(others) == 4


def test_chat_template_and_merge_rules_are_part_of_the_fingerprint(hf, tmp_path):
    hf.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(hf.chat_templates["default"] + " ")
    assert tokenizer_fingerprint(HuggingFaceTokenizer(str(tmp_path))) != tokenizer_fingerprint(hf)
    hf.save(tmp_path)
    assert tokenizer_fingerprint(HuggingFaceTokenizer(str(tmp_path))) == tokenizer_fingerprint(hf)
    path = tmp_path / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["model"]["merges"].pop()
    path.write_text(json.dumps(rules))
    assert tokenizer_fingerprint(HuggingFaceTokenizer(str(tmp_path))) != tokenizer_fingerprint(hf)


def test_an_item_that_nobody_asks_for_is_not_read(prepared, hf):
    reading = settings(hf, "sft")
    _, prefix = prepared(RECORDS["text"][1], reading)
    items = read_corpus(prefix, reading.build()).items

    class Closed:
        def __len__(self):
            return len(items)

        def lengths(self):
            return lengths()

    lengths = items._documents.lengths
    items._documents = Closed()
    assert num_tokens(items) and len(items) == 2
    with pytest.raises(TypeError):
        items[0]


def test_settings_of_the_reader_are_kept(prepared, hf):
    reading = settings(hf, "sft", max_prompt_length=20)
    _, prefix = prepared(RECORDS["text"][1], reading)
    with open(f"{prefix}.json") as file:
        info = json.load(file)
    limits = dataclasses.asdict(reading.config.data)
    assert info["settings"] == {name: limits.get(name, False) for name in info["settings"]}


@pytest.mark.parametrize("form", ["indexed", "arrow"])
def test_prepared_prompts_have_the_other_fields_where_a_reward_reads_them(form, prepared, hf):
    records = [{"prompt": "p", "completion": "r", "answer": {"n": 1}, "id": 3}, {"prompt": "q"}]
    raw, prefix = prepared(records, settings(hf, "brain"), form)
    for keeps in (True, False):
        reader = settings(hf, "brain").build()
        reader.keeps_fields = keeps
        expected, actual = read_corpus(raw, reader), read_corpus(prefix, reader)
        assert list(actual.items) == expected.items and actual.contents == expected.contents
        assert [item.fields for item in actual.items] == ([{"answer": {"n": 1}}, {}] if keeps else [None, None])


def test_prepared_prompts_without_the_fields_that_a_reward_reads_are_refused(prepared, hf):
    nan = float("nan")
    _, prefix = prepared([{"prompt": "p", "answer": 1}, {"prompt": "q", "answer": nan}], settings(hf, "brain"))
    reader = settings(hf, "brain").build()
    read_corpus(prefix, reader)
    reader.keeps_fields = True
    with pytest.raises(RecordError, match=r"raw.jsonl:2: .* lacks the other fields of the record, which the reward"):
        read_corpus(prefix, reader)
