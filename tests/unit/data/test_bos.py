"""Whether BOS stands before a text, where the files of a tokenizer do not agree."""

import json
import logging

import pytest
from helpers.tiny_tokenizers import write_hf_tokenizer
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from megatron_brain.data.tokenizer import HuggingFaceTokenizer
from megatron_brain.errors import ConfigError

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def write(folder, *, front=(), settings=None, **names):
    """A folder whose tokenizer.json puts tokens, as (name, id), before a text."""
    path = write_hf_tokenizer(folder, **{**NAMES, **names})
    backend = Tokenizer.from_file(f"{path}/tokenizer.json")
    if front:
        single = [*(name for name, _ in front), "$A"]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(front))
    backend.save(f"{path}/tokenizer.json")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **(settings or {})}))
    return str(path)


LLAMA = {"tokenizer_class": "LlamaTokenizerFast"}


@pytest.mark.parametrize(
    ("front", "settings", "adds", "warned"),
    [
        ([], {}, False, False),
        ([("<s>", 1)], {}, True, False),
        ([], {**LLAMA, "add_bos_token": True}, True, True),
        ([("<s>", 1)], {**LLAMA, "add_bos_token": True}, True, False),
        ([("<s>", 1)], {**LLAMA, "add_bos_token": False}, False, True),
        ([], {**LLAMA, "add_bos_token": False}, False, False),
        # Another class never went by the setting.
        ([], {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}, False, False),
        ([("<s>", 1)], {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}, True, False),
    ],
)
def test_bos_is_put_as_the_files_say_here_and_in_what_is_saved(front, settings, adds, warned, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = HuggingFaceTokenizer(write(tmp_path / "a", front=front, settings=settings))
    text = tokenizer.encode("hello")
    assert tokenizer.adds_bos == adds
    assert tokenizer.encode_prompt("hello") == ([1, *text] if adds else text)
    assert ("before a text" in caplog.text) == warned
    tokenizer.save(tmp_path / "b")
    tokenizer.export(tmp_path / "c", "policy")
    assert HuggingFaceTokenizer(str(tmp_path / "b")).encode_prompt("hello") == tokenizer.encode_prompt("hello")
    assert AutoTokenizer.from_pretrained(tmp_path / "c")("hello")["input_ids"] == tokenizer.encode_prompt("hello")


@pytest.mark.parametrize(
    ("front", "names", "message"),
    [
        ([("<s>", 7)], {}, r".*\(id 7\) stands before every text, and bos_token is '<s>' \(id 1\)"),
        ([("<s>", 1)], {"bos_token": None}, r"'<s>' \(id 1\) stands before every text, and bos_token is null"),
        ([("<|im_start|>", 3)], {}, r"'<\|im_start\|>' \(id 3\) stands before every text, and bos_token is '<s>'"),
        ([("<s>", 1), ("<s>", 1)], {}, r"'<s>' \(id 1\) '<s>' \(id 1\) stands before every text"),
    ],
)
def test_another_token_before_every_text_is_refused_with_its_id(front, names, message, tmp_path):
    with pytest.raises(ConfigError, match=f"--tokenizer-model .*: {message}.*set bos_token in tokenizer_config.json"):
        HuggingFaceTokenizer(write(tmp_path, front=front, **names))


def test_a_chat_template_writes_its_own_bos_whatever_is_put_before_texts(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    path = write(tmp_path, settings={**LLAMA, "add_bos_token": True}, chat_template=template)
    tokenizer = HuggingFaceTokenizer(path)
    rendered = tokenizer.render_chat([{"role": "user", "content": "hello"}], add_generation_prompt=False)
    assert tokenizer.encode_prompt(rendered, chat=True) == [1, *tokenizer.encode("hello")]
