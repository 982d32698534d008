"""Tiny data for whole-stage tests: a tokenizer, prompt/response records and preference pairs."""

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_NOUNS = ["editor", "server", "library", "game", "tool", "reader", "writer", "viewer", "terminal", "network", "file"]
WORDS = [*_NOUNS, "small", "fast", "simple", "graphical"]

SIZES = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
}
"""Sizes of a Llama that every layout of up to four ranks divides."""


def write_assets(directory: Path) -> None:
    """Write tokenizer/, sft.jsonl, pairs.jsonl and prompts.jsonl."""
    rng = random.Random(7)
    records = [_record(rng, number) for number in range(40)]
    _write_tokenizer(directory / "tokenizer", [r["prompt"] + r["completion"] for r in records])
    _write(directory / "sft.jsonl", records)
    _write(directory / "prompts.jsonl", [{"prompt": r["prompt"]} for r in records])
    pairs = [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": f" some {rng.choice(WORDS)} or other"}
        for r in records
    ]
    _write(directory / "pairs.jsonl", pairs)


def size_flags(**changes: object) -> list[str]:
    """SIZES as command-line flags."""
    sizes = {**SIZES, **changes}
    return [part for name, value in sizes.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def _record(rng: random.Random, number: int) -> dict:
    words = rng.sample(WORDS, rng.randint(2, 5))
    prompt = f"package {number}: a {' '.join(words)}\nTL;DR:"
    return {"prompt": prompt, "completion": f" {words[-1]} {words[0]}"}


def _write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _write_tokenizer(directory: Path, texts: list[str]) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>").save_pretrained(directory)
