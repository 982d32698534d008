"""What AutoTokenizer reads from an exported directory is what training and sampling here used."""

import functools
import json
import logging
import tempfile
from pathlib import Path

import pytest
from helpers.tiny_tokenizers import CHATML, train_sentencepiece, write_hf_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_brain.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, build_tokenizer
from megatron_brain.data.tokenizer.export import AWKWARD_TEXTS, check_exported
from megatron_brain.data.tokenizer.sentencepiece_fast import fast_tokenizer
from megatron_brain.errors import ConfigError

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
NAMES = "<>/sunk0x41"  # of special pieces, so that a unigram model can spell them
PARTS = ["tool", " the ", "index", "  ", "   ", "\n", "\r\n", "\t", "\u2581", "<s>", "</s>", "<unk>", "<0x41>"]
PARTS += ["<sym>", "sym>", "aaaa", "\u6f22", "\U0001f642", "\u00bd", "\ufb01", "\u3000", "\u200b", "\u00e9", "\x00"]
TEXTS = st.lists(st.sampled_from(PARTS) | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join)
# transformers' character maps lose combining marks, which export warns of.
LETTERS = st.characters(exclude_categories=["Cs", "Mn", "Mc", "Me"], max_codepoint=0x2FF)
UNMARKED = st.lists(st.sampled_from(PARTS) | LETTERS, max_size=12).map("".join)


@functools.cache
def trained(**changes) -> SentencePieceTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = train_sentencepiece(Path(folder), required_chars=NAMES, **PLAIN | changes)
        return SentencePieceTokenizer(path)


@functools.cache
def fast(**changes) -> FastTokenizer:
    made = fast_tokenizer(trained(**changes).sp.serialized_model_proto())
    made.encode_special_tokens = True
    return made


def exported(tokenizer, directory, head="policy"):
    tokenizer.export(directory, head)
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@settings(max_examples=150, deadline=None)
@given(
    text=TEXTS,
    byte_fallback=st.booleans(),
    add_dummy_prefix=st.booleans(),
    remove_extra_whitespaces=st.booleans(),
    user_defined_symbols=st.sampled_from(["", "<sym>,sym"]),
)
def test_a_fast_sentencepiece_tokenizer_encodes_and_decodes_any_text_as_sentencepiece(model_type, text, **changes):
    if changes["add_dummy_prefix"] and text.strip(" ") in changes["user_defined_symbols"].split(","):
        return  # The one kind of text that export warns of.
    _assert_same(text, model_type=model_type, **changes)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("add_dummy_prefix", [True, False])
@pytest.mark.parametrize("remove_extra_whitespaces", [True, False])
def test_awkward_texts_are_the_same_with_every_rule_for_spaces(model_type, add_dummy_prefix, remove_extra_whitespaces):
    for text in AWKWARD_TEXTS:
        _assert_same(
            text,
            model_type=model_type,
            byte_fallback=True,
            user_defined_symbols="",
            add_dummy_prefix=add_dummy_prefix,
            remove_extra_whitespaces=remove_extra_whitespaces,
        )


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@settings(max_examples=60, deadline=None)
@given(text=UNMARKED, remove_extra_whitespaces=st.booleans())
def test_a_character_map_is_exported_but_for_combining_marks(model_type, text, **changes):
    _assert_same(text, model_type=model_type, normalization_rule_name="nmt_nfkc", **changes)


def _assert_same(text, **model):
    sp, made = trained(**model).sp, fast(**model)
    ids = sp.encode(text)
    assert made.encode(text, add_special_tokens=False).ids == ids
    if sp.unk_id() not in ids:
        assert made.decode([sp.bos_id(), *ids, sp.eos_id()], skip_special_tokens=True) == sp.decode(ids)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", ["hf", "bpe", "unigram"])
def test_an_exported_directory_encodes_prompts_and_responses_as_we_do(kind, bos, tmp_path):
    if kind == "hf":
        path = write_hf_tokenizer(tmp_path, add_bos=bos, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
        tokenizer = HuggingFaceTokenizer(path)
    else:
        tokenizer = trained(model_type=kind, **({} if bos else {"bos_id": -1}))
    hf = exported(tokenizer, tmp_path / "out")
    assert tokenizer.adds_bos == bos
    for text in ["hello world", " leading", "two\n\nlines ", "\U0001f642 caf\u00e9"]:
        assert hf(text)["input_ids"] == tokenizer.encode_prompt(text)
        assert hf(text + hf.eos_token)["input_ids"] == [*tokenizer.encode_prompt(text), tokenizer.eos_id]
        assert hf.decode(tokenizer.encode_response(text), skip_special_tokens=True) == text
    assert (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    again = build_tokenizer(tokenizer.tokenizer_type, tmp_path / "out")
    assert again.encode_prompts(AWKWARD_TEXTS) == tokenizer.encode_prompts(AWKWARD_TEXTS)
    assert build_tokenizer("HuggingFaceTokenizer", tmp_path / "out").adds_bos == bos


def test_special_pieces_keep_their_ids_and_user_defined_ones_are_not_special(tmp_path):
    tokenizer = trained(model_type="bpe", user_defined_symbols="<sym>", control_symbols="<ctl>", pad_id=3)
    hf = exported(tokenizer, tmp_path)
    for name in ("<unk>", "<s>", "</s>", "<pad>", "<ctl>", "<sym>"):
        assert hf.convert_tokens_to_ids(name) == tokenizer.sp.piece_to_id(name)
    assert "<sym>" not in hf.all_special_tokens
    assert hf.decode(hf("a<sym>b")["input_ids"], skip_special_tokens=True) == "a<sym>b"
    literal = hf("<ctl>", split_special_tokens=True)["input_ids"]
    assert literal == tokenizer.encode_prompt("<ctl>") != hf("<ctl>")["input_ids"]


@pytest.mark.parametrize("kind", ["hf", "sp"])
def test_a_reward_models_tokenizer_pads_right_and_cuts_left(kind, hf, tmp_path):
    tokenizer = hf if kind == "hf" else trained(model_type="bpe")
    reward = exported(tokenizer, tmp_path / "reward", "reward")
    assert (reward.padding_side, reward.truncation_side) == ("right", "left")
    longer, shorter = tokenizer.encode_prompt("hello world"), tokenizer.encode_prompt("hello")
    rows = reward(["hello world", "hello"], padding=True)["input_ids"]
    assert rows == [longer, shorter + [reward.pad_token_id] * (len(longer) - len(shorter))]


def test_a_reward_models_tokenizer_without_special_pad_is_warned_of(tmp_path, caplog):
    path = write_hf_tokenizer(tmp_path, special=["</s>"], eos_token="</s>", pad_token="</s>")
    HuggingFaceTokenizer(path).export(tmp_path / "out", "reward")
    assert "pads with </s>" in caplog.text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "e\u0302\u0301"),
        ({"add_dummy_prefix": True, "user_defined_symbols": "<sym>"}, "<sym>"),
    ],
)
def test_what_no_fast_tokenizer_can_do_is_warned_of_with_text_and_both_ids(changes, text, tmp_path, caplog):
    tokenizer = trained(model_type="bpe", **changes)
    with caplog.at_level(logging.WARNING):
        hf = exported(tokenizer, tmp_path)
    ours, theirs = tokenizer.encode_prompt(text), hf(text)["input_ids"]
    assert ours != theirs
    assert f"{text!r} into {theirs}, training and sampling here have {ours}" in caplog.text
    assert "tools/train_tokenizer.py" in caplog.text


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"model_type": "char"}, "model_type=char"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix=true"),
        (
            {"model_type": "bpe", "remove_extra_whitespaces": True, "user_defined_symbols": "\u2581\u2581"},
            "remove_extra_whitespaces=true and user-defined symbols that begin or end",
        ),
    ],
)
def test_settings_without_counterpart_are_refused_by_name(changes, setting, tmp_path):
    with pytest.raises(ConfigError, match=f"{setting}.*tools/train_tokenizer.py"):
        trained(**changes).export(tmp_path, "policy")


def test_a_directory_that_encodes_otherwise_is_refused_with_text_and_both_ids(tmp_path):
    tokenizer = trained(model_type="bpe")
    tokenizer.export(tmp_path, "policy")
    backend = FastTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), backend.normalizer])
    backend.save(str(tmp_path / "tokenizer.json"))
    text = next(text for text in AWKWARD_TEXTS if text != text.lower())
    with pytest.raises(ConfigError) as error:
        check_exported(tmp_path, tokenizer)
    ours, theirs = tokenizer.encode_prompt(text), tokenizer.encode_prompt(text.lower())
    assert ours[1] != theirs[1]
    assert repr(text) in str(error.value)
    assert f"into {theirs[1:9]}... from token 1" in str(error.value)
    assert f"here have {ours[1:9]}... from token 1" in str(error.value)


def test_a_model_type_whose_class_rebuilds_the_tokenizer_is_warned_of(tmp_path, caplog):
    """transformers gives every qwen2 model Qwen2Tokenizer, whatever tokenizer_config.json says."""
    tokenizer = trained(model_type="bpe")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer.export(tmp_path, "policy")
    assert "model_type" not in caplog.text
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer.export(tmp_path, "policy")
    assert "(Qwen2Tokenizer) turns" in caplog.text
    assert "model_type of config.json: load the tokenizer with PreTrainedTokenizerFast.from_pretrained" in caplog.text
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert [fast(text, split_special_tokens=True)["input_ids"] for text in AWKWARD_TEXTS] == tokenizer.encode_prompts(
        AWKWARD_TEXTS
    )


def test_a_tokenizer_that_ends_prompts_with_eos_is_refused_with_the_setting(tmp_path):
    tokenizer = HuggingFaceTokenizer(write_hf_tokenizer(tmp_path, eos_token="</s>", pad_token="<pad>"))
    tokenizer.hf.add_eos_token = True
    with pytest.raises(ConfigError, match="set add_eos_token to false"):
        tokenizer.export(tmp_path / "out", "policy")


def test_the_chat_template_is_exported(tmp_path):
    path = write_hf_tokenizer(tmp_path, eos_token="</s>", pad_token="<pad>", chat_template=CHATML)
    assert exported(HuggingFaceTokenizer(path), tmp_path / "out").chat_template == CHATML


def test_an_export_makes_no_token_type_ids(hf, tmp_path):
    """Version 4 of transformers makes them for its plain fast class, and no model of ours takes them."""
    hf.export(tmp_path, "policy")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_input_names"] == [
        "input_ids",
        "attention_mask",
    ]
    assert set(AutoTokenizer.from_pretrained(tmp_path)("hello")) == {"input_ids", "attention_mask"}
