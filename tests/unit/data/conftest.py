"""Fixtures: one tokenizer of each kind, built once a run."""

import pytest
from helpers.tiny_tokenizers import CHATML, CHATML_MARKED, train_sentencepiece, write_hf_tokenizer

from megatron_brain.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory) -> str:
    """No BOS; EOS is <|im_end|>; ChatML."""
    return write_hf_tokenizer(
        tmp_path_factory.mktemp("hf"),
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def hf_marked(tmp_path_factory) -> HuggingFaceTokenizer:
    """The same with a template that marks the assistant's tokens."""
    path = write_hf_tokenizer(
        tmp_path_factory.mktemp("marked"),
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=CHATML_MARKED,
    )
    return HuggingFaceTokenizer(path)


@pytest.fixture(scope="session")
def hf(hf_dir) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(hf_dir)


@pytest.fixture(scope="session")
def hf_bos(tmp_path_factory) -> HuggingFaceTokenizer:
    """Adds BOS by itself; pad is EOS."""
    path = write_hf_tokenizer(
        tmp_path_factory.mktemp("bos"), add_bos=True, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    return HuggingFaceTokenizer(path)


@pytest.fixture(scope="session")
def sp_file(tmp_path_factory) -> str:
    return train_sentencepiece(tmp_path_factory.mktemp("sp"))


@pytest.fixture(scope="session")
def sp(sp_file) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(sp_file)


@pytest.fixture(params=["hf", "hf_bos", "sp"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)
