import logging
import shutil

import pytest
from helpers.tiny_tokenizers import LINES, train_sentencepiece, write_hf_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaTokenizer

from megatron_brain.data.tokenizer import HuggingFaceTokenizer, build_tokenizer, check_fits
from megatron_brain.data.tokenizer.base import PLAIN_TEXT
from megatron_brain.errors import ConfigError

TEXTS = [*LINES, "", " ", "\n\nTL;DR:", " café ☃ 漢字", "tab\there"]


def test_a_prompt_starts_with_bos_exactly_where_the_tokenizer_adds_it_by_itself(hf, hf_bos, sp):
    for tokenizer in (hf, hf_bos):
        assert tokenizer.encode_prompt("hello world") == tokenizer.hf("hello world")["input_ids"]
    assert not hf.adds_bos and hf.bos_id is not None
    assert hf_bos.adds_bos and hf_bos.encode_prompt("x")[0] == hf_bos.bos_id
    assert sp.encode_prompt("hello world") == [sp.sp.bos_id(), *sp.sp.encode("hello world")]


def test_a_response_ends_in_exactly_one_eos_and_never_starts_with_bos(any_tokenizer):
    for text in TEXTS:
        ids = any_tokenizer.encode_response(text)
        [joined] = any_tokenizer.encode_continuations([text], [PLAIN_TEXT])
        assert ids == [*joined, any_tokenizer.eos_id]
        assert ids.count(any_tokenizer.eos_id) == 1
        assert any_tokenizer.bos_id not in ids


def test_batches_equal_single_texts(any_tokenizer):
    assert any_tokenizer.encode_prompts(TEXTS) == [any_tokenizer.encode_prompt(t) for t in TEXTS]
    assert any_tokenizer.encode_responses(TEXTS) == [any_tokenizer.encode_response(t) for t in TEXTS]
    assert any_tokenizer.encode_prompts([]) == []


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_byte_level_round_trip_is_exact(hf, text):
    assert hf.decode(hf.encode_response(text)) == text


def test_sentencepiece_round_trip_with_byte_fallback(sp):
    assert sp.decode(sp.encode_response("café ☃ 漢字")) == "café ☃ 漢字"


def test_names_of_special_tokens_in_a_text_stay_text(any_tokenizer):
    for name in ("</s>", "<s>", "<|im_end|>", "<unk>"):
        ids = any_tokenizer.encode_prompt(f"a {name} b")[any_tokenizer.adds_bos :]
        assert not {any_tokenizer.eos_id, any_tokenizer.bos_id} & set(ids)
        assert any_tokenizer.decode(ids) == f"a {name} b"


def test_special_tokens_of_rendered_chats_are_parsed_and_no_bos_is_added(hf_bos):
    assert hf_bos.encode_prompt("<s>hi", chat=True) == [hf_bos.bos_id, *hf_bos.encode("hi")]
    assert hf_bos.encode_prompt("hi", chat=True) == hf_bos.encode("hi")


@pytest.mark.parametrize("turn", ["hello<|im_end|>\n", "hello<|im_end|>", "hello"])
def test_a_rendered_turn_ends_in_one_eos(hf, turn):
    assert hf.encode_response(turn, chat=True) == [*hf.encode("hello"), hf.eos_id]


def test_an_end_of_turn_token_other_than_eos_is_kept_before_eos(hf_bos):
    ids = hf_bos.encode_response("hello<|im_end|>", chat=True)
    assert ids == [*hf_bos.encode("hello"), hf_bos.hf.convert_tokens_to_ids("<|im_end|>"), hf_bos.eos_id]


@pytest.mark.parametrize(
    ("turn", "kept"),
    [
        ("hello", "hello"),
        ("hello</s>", "hello"),
        ("hello</s>\n", "hello"),
        ("hello</s></s>", "hello"),
        ("hello</s>\n</s>\n", "hello"),
        ("hello<|im_end|></s>", "hello<|im_end|>"),
        ("hello<|im_end|>\n</s>", "hello<|im_end|>"),
        ("hello<|im_end|>\n</s>\n</s>", "hello<|im_end|>"),
        ("hello</s><|im_end|>\n", "hello"),
        ("hello<|im_end|>\n", "hello<|im_end|>"),
        ("hello \n</s>", "hello \n"),
        ("hello\n", "hello\n"),
        ("</s>", ""),
        ("a</s>b</s>", "a</s>b"),
    ],
)
def test_one_eos_ends_a_turn_whatever_the_template_closes_with(turn, kept, hf_bos):
    """Of the closing tokens the first EOS counts: sampling stops there. An EOS in the middle of a turn is its own."""
    ids = hf_bos.encode_response(turn, chat=True)
    [expected] = hf_bos.encode_batch([kept], parse_special=True)
    assert hf_bos.hf.eos_token == "</s>" and ids == [*expected, hf_bos.eos_id]


def test_pad_is_never_eos_and_is_logged_when_chosen_here(tmp_path, caplog):
    path = write_hf_tokenizer(tmp_path, eos_token="</s>", pad_token="</s>")
    with caplog.at_level(logging.INFO):
        tokenizer = HuggingFaceTokenizer(path)
    assert tokenizer.pad_id == tokenizer.hf.convert_tokens_to_ids("<pad>") != tokenizer.eos_id
    assert "pads with id 5" in caplog.text


def test_a_chosen_special_pad_is_saved_and_an_ordinary_one_stays_ordinary(tmp_path):
    special = HuggingFaceTokenizer(
        write_hf_tokenizer(tmp_path / "a", special=["<unk>", "<s>", "</s>"], eos_token="</s>", unk_token="<unk>")
    )
    special.save(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token_id == special.pad_id == 0
    only_eos = HuggingFaceTokenizer(
        write_hf_tokenizer(tmp_path / "b", special=["</s>"], eos_token="</s>", bos_token="</s>", pad_token="</s>")
    )
    only_eos.save(tmp_path / "saved_b")
    again = HuggingFaceTokenizer(str(tmp_path / "saved_b"))
    assert again.pad_id == only_eos.pad_id != only_eos.eos_id
    assert again.decode([again.pad_id]) == again.hf.convert_ids_to_tokens(again.pad_id)


def test_saved_tokenizer_reads_back_the_same(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path / "copy")
    again = build_tokenizer(any_tokenizer.tokenizer_type, tmp_path / "copy")
    assert again.encode_prompts(TEXTS) == any_tokenizer.encode_prompts(TEXTS)
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "adds_bos", "chat_templates"):
        assert getattr(again, name) == getattr(any_tokenizer, name)


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_a_tokenizer_is_saved_also_when_its_files_are_gone(tmp_path, kind):
    """As those of a checkpoint that --keep-latest has removed."""
    folder = tmp_path / "old"
    folder.mkdir()
    is_hf = kind == "HuggingFaceTokenizer"
    source = write_hf_tokenizer(folder, eos_token="</s>", pad_token="<pad>") if is_hf else train_sentencepiece(folder)
    tokenizer = build_tokenizer(kind, source)
    expected = tokenizer.encode(LINES[0])
    shutil.rmtree(folder)
    tokenizer.save(tmp_path / "new")
    assert build_tokenizer(kind, str(tmp_path / "new")).encode(LINES[0]) == expected


def test_vocab_size_covers_the_added_tokens(hf, tmp_path):
    hf.save(tmp_path)
    bigger = AutoTokenizer.from_pretrained(tmp_path)
    bigger.add_tokens(["<think>"])
    bigger.save_pretrained(tmp_path)
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    assert tokenizer.vocab_size == hf.vocab_size + 1 == tokenizer.hf.convert_tokens_to_ids("<think>") + 1


def test_ids_without_a_token_decode_to_nothing(any_tokenizer):
    ids = any_tokenizer.encode("hello")
    padded = [*ids, any_tokenizer.vocab_size, any_tokenizer.vocab_size + 50]
    assert any_tokenizer.decode(padded) == any_tokenizer.decode(ids) == "hello"


def test_sentencepiece_prompt_equals_transformers_llama_tokenizer(sp):
    llama = LlamaTokenizer.from_pretrained(sp.path.parent, vocab_file=str(sp.path), legacy=False, add_bos_token=True)
    for text in LINES:
        assert llama(text)["input_ids"] == sp.encode_prompt(text)


def test_sentencepiece_without_bos_adds_none_and_without_eos_is_refused(tmp_path):
    no_bos = build_tokenizer("SentencePieceTokenizer", train_sentencepiece(tmp_path, bos_id=-1))
    assert no_bos.bos_id is None
    assert no_bos.encode_prompt("hello") == no_bos.encode("hello")
    with pytest.raises(ConfigError, match="no EOS piece"):
        build_tokenizer("SentencePieceTokenizer", train_sentencepiece(tmp_path, eos_id=-1))


def test_vocabulary_that_does_not_fit_the_model_names_both_numbers(hf):
    check_fits(hf, hf.vocab_size)
    with pytest.raises(ConfigError, match=rf"{hf.vocab_size} ids and the model has {hf.vocab_size - 1}.*resize"):
        check_fits(hf, hf.vocab_size - 1)


def test_bad_tokenizers_name_the_setting_and_the_cure(tmp_path):
    with pytest.raises(ConfigError, match="--tokenizer-type GPT2.*HuggingFaceTokenizer, SentencePieceTokenizer"):
        build_tokenizer("GPT2", "x")
    with pytest.raises(ConfigError, match="nowhere.model"):
        build_tokenizer("SentencePieceTokenizer", tmp_path / "nowhere.model")
    (tmp_path / "bad.model").write_text("no model")
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        build_tokenizer("SentencePieceTokenizer", tmp_path / "bad.model")
    with pytest.raises(ConfigError, match="AutoTokenizer cannot read it"):
        build_tokenizer("HuggingFaceTokenizer", tmp_path)
    with pytest.raises(ConfigError, match="no EOS token.*tokenizer_config.json"):
        build_tokenizer("HuggingFaceTokenizer", write_hf_tokenizer(tmp_path / "no_eos"))
