"""The ids are those of tokenizer.json, whatever class transformers takes for a folder."""

import json
import logging
import re

import pytest
from helpers.tiny_tokenizers import SPECIAL, write_hf_tokenizer, write_qwen2_tokenizer
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from megatron_brain.data.tokenizer import HuggingFaceTokenizer
from megatron_brain.data.tokenizer.awkward_texts import AWKWARD_TEXTS
from megatron_brain.errors import ConfigError

NAMES = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TEXTS = [*AWKWARD_TEXTS[:24], "1234567", "call 555-0199", "a</s> b<|im_end|>\nc"]
DIGIT_BY_DIGIT = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


def change(folder, **changes):
    """Parts of tokenizer.json, or settings of tokenizer_config.json and config.json."""
    path = folder / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if name in changes:
            setattr(backend, name, changes[name])
    backend.save(str(path))
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **changes.get("settings", {})}))
    if "model_type" in changes:
        (folder / "config.json").write_text(json.dumps({"model_type": changes["model_type"]}))


def ids_of_file(folder, text, *, literal):
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.encode_special_tokens = literal
    return own.encode(text, add_special_tokens=False).ids


def require_ids_of_file(folder, tokenizer):
    for literal in (True, False):
        found = tokenizer.encode_batch(TEXTS, parse_special=not literal)
        assert found == [ids_of_file(folder, text, literal=literal) for text in TEXTS]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("model_type qwen2, digits one by one", {"model_type": "qwen2", "pre_tokenizer": DIGIT_BY_DIGIT}),
        ("class GPT2Tokenizer", {"settings": {"tokenizer_class": "GPT2Tokenizer"}, "pre_tokenizer": DIGIT_BY_DIGIT}),
        ("class Qwen2Tokenizer", {"settings": {"tokenizer_class": "Qwen2Tokenizer"}, "pre_tokenizer": DIGIT_BY_DIGIT}),
        (
            "class GPT2Tokenizer, lower case",
            {"settings": {"tokenizer_class": "GPT2Tokenizer"}, "normalizer": normalizers.Lowercase()},
        ),
        (
            "model_type qwen2, another pattern",
            {
                "model_type": "qwen2",
                "pre_tokenizer": pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Split(Regex(r"\p{N}{1,2}|\s+|[^\s\p{N}]+"), "isolated"),
                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                    ]
                ),
                "decoder": decoders.ByteLevel(),
            },
        ),
    ],
)
def test_a_class_that_builds_another_tokenizer_is_not_taken_and_named(kind, changes, tmp_path, caplog):
    write_hf_tokenizer(tmp_path, **NAMES)
    change(tmp_path, **changes)
    chosen = AutoTokenizer.from_pretrained(tmp_path)
    theirs = [chosen(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in TEXTS]
    assert theirs != [ids_of_file(tmp_path, text, literal=True) for text in TEXTS], f"{kind} rebuilds nothing"
    with caplog.at_level(logging.WARNING):
        tokenizer = HuggingFaceTokenizer(str(tmp_path))
    require_ids_of_file(tmp_path, tokenizer)
    assert "AutoTokenizer" in caplog.text and "The file's ids are taken" in caplog.text
    assert "tokenizer.json into" in caplog.text


@pytest.mark.parametrize("kind", ["plain", "qwen2 of its own", "an added token", "prefix space"])
def test_a_folder_that_is_read_as_it_is_gets_no_warning(kind, tmp_path, caplog):
    if kind == "qwen2 of its own":
        write_qwen2_tokenizer(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    else:
        special = [*SPECIAL, "<extra>"] if kind == "an added token" else SPECIAL
        write_hf_tokenizer(tmp_path, special=special, **NAMES)
        if kind == "prefix space":
            change(tmp_path, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
    with caplog.at_level(logging.WARNING):
        tokenizer = HuggingFaceTokenizer(str(tmp_path))
    require_ids_of_file(tmp_path, tokenizer)
    assert "AutoTokenizer" not in caplog.text


def test_settings_that_change_what_the_file_says_are_refused(tmp_path):
    """No class of transformers gives the ids of the file then."""
    write_hf_tokenizer(tmp_path, **NAMES)
    fox = {"content": "fox", "special": False, "lstrip": False, "rstrip": False, "normalized": False}
    change(tmp_path, settings={"added_tokens_decoder": {"500": {**fox, "single_word": False}}})
    with pytest.raises(ConfigError, match="without its class, transformers turns .* repair tokenizer_config.json"):
        HuggingFaceTokenizer(str(tmp_path))


def test_what_is_saved_with_a_checkpoint_is_the_file_again(tmp_path, caplog):
    write_hf_tokenizer(tmp_path / "a", **NAMES)
    change(tmp_path / "a", model_type="qwen2", pre_tokenizer=DIGIT_BY_DIGIT)
    HuggingFaceTokenizer(str(tmp_path / "a")).save(tmp_path / "b")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        again = HuggingFaceTokenizer(str(tmp_path / "b"))
    require_ids_of_file(tmp_path / "a", again)
    assert "AutoTokenizer" not in caplog.text


@pytest.mark.parametrize("files", [[], ["config.json"], ["config.json", "tokenizer_config.json"]])
def test_a_folder_without_a_tokenizer_says_so(files, tmp_path):
    for name in files:
        (tmp_path / name).write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="there is no tokenizer in it.*copy the files of the model's tokenizer"):
        HuggingFaceTokenizer(str(tmp_path))


@pytest.mark.parametrize("settings", [{"eos_token": "<|endoftext|>"}, {"bos_token": "<start>"}])
def test_an_end_or_beginning_that_the_file_does_not_have_is_refused(settings, tmp_path):
    """transformers makes a new id of it, of which a padded embedding has a row that nobody trained."""
    write_hf_tokenizer(tmp_path, **NAMES)
    change(tmp_path, settings=settings)
    [(name, token)] = settings.items()
    with pytest.raises(ConfigError, match=f"{name} '{re.escape(token)}' is not in its tokenizer.json: .*new id 330"):
        HuggingFaceTokenizer(str(tmp_path))


@pytest.mark.parametrize("setting", ["padding", "truncation"])
def test_padding_and_cutting_that_were_saved_with_the_file_are_no_part_of_it(setting, tmp_path, caplog):
    """They are once a tokenizer was saved after it was used with them."""
    write_hf_tokenizer(tmp_path, **NAMES)
    path = tmp_path / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.enable_padding(length=64, pad_id=5, pad_token="<pad>") if setting == "padding" else None
    backend.enable_truncation(4) if setting == "truncation" else None
    backend.save(str(path))
    with caplog.at_level(logging.WARNING):
        tokenizer = HuggingFaceTokenizer(str(tmp_path))
    assert "AutoTokenizer" not in caplog.text
    text = "the quick brown fox jumps over the lazy dog"
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.pad_id not in tokenizer.encode("a")
