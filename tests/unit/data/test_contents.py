"""What was tokenised has a fingerprint: an edit shows, with its place, where a count would not tell."""

import dataclasses
import json
import logging
from datetime import datetime

import pytest
from helpers.reading import reading_settings
from helpers.tiny_tokenizers import CHATML_MARKED, write_hf_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from megatron_brain.config.data import DataConfig
from megatron_brain.data.contents import Contents, contents_of, hash_item
from megatron_brain.data.corpus import read_corpus
from megatron_brain.data.prepared.preparation import Preparation, prepare
from megatron_brain.data.records import PreferenceReader, PromptReader, SFTReader
from megatron_brain.data.tokenizer import HuggingFaceTokenizer
from megatron_brain.errors import AgreedError
from megatron_brain.training.same_data import as_state, require_same_as_before

LIMITS = DataConfig(seq_length=128)
RECORDS = [{"prompt": f"package {n}:", "completion": f"tool {n}"} for n in range(200)]
PAIRS = [{"prompt": f"package {n}:", "chosen": "a tool", "rejected": "no", "margin": 1.0} for n in range(5)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def corpus(tmp_path, tokenizer, records, reader=SFTReader):
    return read_corpus(write(tmp_path / "d.jsonl", records), reader(tokenizer, LIMITS))


def edited(number, **changes):
    return [{**record, **changes} if n == number else record for n, record in enumerate(RECORDS)]


@pytest.mark.parametrize("number", [0, 77, 199])
def test_an_edited_record_is_told_by_where_it_is(number, hf, tmp_path):
    before = corpus(tmp_path, hf, RECORDS)
    after = corpus(tmp_path, hf, edited(number, completion=f"took {number}"))
    assert after.contents.count == before.contents.count == 200
    block = after.contents.first_other_block(before.contents)
    assert number in block and len(block) <= 4
    with pytest.raises(AgreedError) as told:
        require_same_as_before({"train_data": after}, as_state({"train_data": before}))
    places = f"some between {tmp_path}/d.jsonl:{block[0] + 1} and {tmp_path}/d.jsonl:{block[-1] + 1} have other ids"
    assert f"--train-data is not what it was trained on so far: of the 200 records, {places}" in str(told.value)
    assert "they were edited, or their order was changed" in str(told.value) and "--finetune" in str(told.value)


def test_order_and_number_of_records_are_part_of_it(hf, tmp_path):
    before = as_state({"train_data": corpus(tmp_path, hf, RECORDS)})
    swapped = [*RECORDS[:9], RECORDS[10], RECORDS[9], *RECORDS[11:]]
    fewer = "there were 200 records, now there are 199"
    for records, message in ((swapped, "their order was changed"), (RECORDS[:-1], fewer)):
        with pytest.raises(AgreedError, match=message):
            require_same_as_before({"train_data": corpus(tmp_path, hf, records)}, before)
    spelled = [{**record, "note": "which changes no token"} for record in RECORDS]
    require_same_as_before({"train_data": corpus(tmp_path, hf, spelled)}, before)


def test_all_that_a_stage_has_of_a_record_counts(hf_marked, tmp_path):
    """Margins, masks and references, and not ids alone."""
    other_margin = [{**pair, "margin": 2.0} if n == 3 else pair for n, pair in enumerate(PAIRS)]
    found = [corpus(tmp_path, hf_marked, pairs, PreferenceReader).contents for pairs in (PAIRS, other_margin)]
    assert found[0] != found[1]
    turn = [{"role": "user", "content": "when?"}, {"role": "assistant", "content": "at nine"}]
    first, second = (
        read_corpus(
            write(tmp_path / "d.jsonl", [{"messages": [*turn, turn[0], {**turn[1], "weight": weight}]}]),
            SFTReader(hf_marked, LIMITS, multi_turn_loss=True),
        ).contents
        for weight in (0, 1)
    )
    assert first != second
    prompts = [[{"prompt": "when?", "completion": said}] for said in ("at nine", "at ten")]
    first, second = (corpus(tmp_path, hf_marked, records, PromptReader).contents for records in prompts)
    assert first != second


def test_raw_and_prepared_records_have_the_same(hf, tmp_path):
    raw = write(tmp_path / "d.jsonl", RECORDS)
    reading = reading_settings(
        stage="sft", tokenizer_type=hf.tokenizer_type, tokenizer_model=hf.hf.name_or_path, limits=LIMITS
    )
    for form in ("indexed", "arrow"):
        prepare(Preparation(input=raw, split=None, prefix=str(tmp_path / form), format=form, reading=reading))
        for limit in (None, 70):
            expected = read_corpus(raw, reading.build(), limit=limit).contents
            assert read_corpus(str(tmp_path / form), reading.build(), limit=limit).contents == expected


def test_another_tokenizer_or_date_is_named_as_the_cause(hf, tmp_path):
    dated = CHATML_MARKED.replace("{% for", "{{ strftime_now('%d') }}{% for", 1)
    names = {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
    turn = [{"role": "user", "content": "when?"}, {"role": "assistant", "content": "at nine"}]
    tokenizers = [
        HuggingFaceTokenizer(write_hf_tokenizer(tmp_path / str(n), **names, chat_template=template))
        for n, template in enumerate([CHATML_MARKED, "SYS" + CHATML_MARKED, dated, dated])
    ]
    for tokenizer, day in zip(tokenizers[2:], (1, 2), strict=True):
        tokenizer.template_time = datetime(2026, 5, day)
    plain, other, first, second = (corpus(tmp_path, tokenizer, [{"messages": turn}]) for tokenizer in tokenizers)
    with pytest.raises(AgreedError, match="the tokenizer or its chat template is another one"):
        require_same_as_before({"train_data": other}, as_state({"train_data": plain}))
    with pytest.raises(AgreedError, match="was 2026-05-01T00:00:00, now it is 2026-05-02T00:00:00 .--template-date"):
        require_same_as_before({"train_data": second}, as_state({"train_data": first}))
    # Where no id is another one, it is the same data.
    text = [{"prompt": "when?", "completion": "at nine"}]
    require_same_as_before(
        {"train_data": corpus(tmp_path, tokenizers[1], text)},
        as_state({"train_data": corpus(tmp_path, tokenizers[0], text)}),
    )


def test_other_validation_data_is_told_and_no_hindrance(hf, tmp_path, caplog):
    before, after = (corpus(tmp_path, hf, records) for records in (RECORDS, edited(5, prompt="other")))
    with caplog.at_level(logging.WARNING):
        require_same_as_before({"valid_data": after}, as_state({"valid_data": before}))
    assert "--valid-data is not what the run was validated on before" in caplog.text


def test_a_checkpoint_of_before_has_none_and_says_so(hf, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        require_same_as_before({"train_data": corpus(tmp_path, hf, RECORDS)}, None)
    assert "has no fingerprint of its data" in caplog.text
    require_same_as_before({"train_data": corpus(tmp_path, hf, RECORDS)}, {})


@given(hashes=st.lists(st.integers(0, 2**64 - 1), max_size=300), other=st.integers(0, 2**64 - 1), data=st.data())
def test_one_changed_item_shows_in_its_run_alone(hashes, other, data):
    before = contents_of(hashes, tokenizer="t")
    assert Contents.from_dict(json.loads(json.dumps(before.as_dict()))) == before
    assert before.first_other_block(dataclasses.replace(before)) is None
    if not hashes:
        return
    place = data.draw(st.integers(0, len(hashes) - 1))
    changed = contents_of([*hashes[:place], other, *hashes[place + 1 :]], tokenizer="t")
    if other == hashes[place]:
        assert changed == before
    else:
        assert place in changed.first_other_block(before)
        assert sum(a != b for a, b in zip(changed.blocks, before.blocks, strict=True)) == 1


@given(
    one=st.lists(st.lists(st.integers(0, 500)), max_size=3),
    two=st.lists(st.lists(st.integers(0, 500)), max_size=3),
)
def test_items_have_equal_hashes_only_if_they_are_equal(one, two):
    """Where one sequence ends and the next begins is part of it."""
    assert (hash_item(one) == hash_item(two)) == (one == two)
