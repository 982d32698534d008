"""Tiny real tokenizers. The tests train them."""

from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

LINES = [
    "a tool that reads the package index and prints a short summary",
    "the quick brown fox jumps over the lazy dog, again and again",
    "TL;DR: small fast text editor with syntax colours",
    "library of routines for numbers, strings and lists; version 0123456789",
    "user assistant system hello world, how are you? fine!",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_hf_tokenizer(directory: Path, *, add_bos: bool = False, special: list[str] = SPECIAL, **settings) -> str:
    """Write a byte-level BPE tokenizer of about 330 ids as a transformers directory."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=backend, **settings).save_pretrained(directory)
    return str(directory)


def write_qwen2_tokenizer(directory: Path) -> None:
    """Write a tokenizer of the class that transformers uses beside every qwen2 model. It splits text in its own way."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        LINES, 330, new_special_tokens=["<|im_end|>"], show_progress=False
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(directory)


def train_sentencepiece(directory: Path, **settings) -> str:
    prefix = directory / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 4),
        model_prefix=str(prefix),
        **{"model_type": "bpe", "byte_fallback": True, **settings},
        vocab_size=340,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    return f"{prefix}.model"
