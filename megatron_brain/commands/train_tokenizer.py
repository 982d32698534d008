"""Train a SentencePiece tokenizer.

    python tools/train_tokenizer.py --input FILE_OR_GLOB ... --vocab-size N --save DIR [--model-type bpe|unigram]

Reads plain text, and the text fields of records (jsonl, json, parquet, arrow, a saved data set or a hub name). DIR gets
tokenizer.model, for --tokenizer-type SentencePieceTokenizer, and the same tokenizer as a fast one, which AutoTokenizer
and --tokenizer-type HuggingFaceTokenizer read. Exit status 2: a mistake of the user.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_brain.commands.reporting import reports_mistakes
from megatron_brain.data.tokenizer import SENTENCEPIECE_FILE, SentencePieceTokenizer
from megatron_brain.data.tokenizer.chat_template import read_template
from megatron_brain.data.tokenizer.training import Lines, TokenizerTraining, measure, train
from megatron_brain.errors import ConfigError
from megatron_brain.files import folder_problem


@reports_mistakes
def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    args = _parse(argv)
    settings = TokenizerTraining(
        vocab_size=args.vocab_size,
        model_type=args.model_type,
        character_coverage=args.character_coverage,
        user_defined_symbols=args.user_defined_symbols,
        input_sentence_size=args.input_sentence_size,
    )
    template = read_template(args.chat_template) if args.chat_template else None
    print(run(settings, args.input, args.save, template))
    return 0


def run(settings: TokenizerTraining, inputs: Sequence[str], save: Path, chat_template: str | None = None) -> str:
    """Train, write the folder, and describe it.

    Raises:
        ConfigError: the folder already exists, or the corpus or the settings are wrong.
        RecordError: a record is bad.
    """
    if (problem := folder_problem("--save", str(save))) is not None:
        raise ConfigError(problem)
    if save.exists():
        raise ConfigError(f"--save {save} exists: give another folder, or remove it")
    lines = Lines(inputs=inputs)
    partial = save.with_name(save.name + ".partial")
    try:  # before the training, which may take a long time
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--save {save}: {partial} cannot be made ({error.strerror}): give another folder") from error
    try:
        (partial / SENTENCEPIECE_FILE).write_bytes(train(settings, lines))
        tokenizer = SentencePieceTokenizer(str(partial))
        tokenizer.export(partial, "policy")
        if chat_template is not None:
            (partial / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        partial.rename(save)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    summary = f"{save}: {settings.model_type}, {tokenizer.vocab_size:,} pieces from {lines.read:,} lines"
    if not lines.held_out:
        return f"{summary}; too few to hold some out for statistics"
    found = measure(tokenizer, lines.held_out)
    return (
        f"{summary}\n{found.lines:,} held-out lines: {found.bytes_per_token:.2f} bytes per token, "
        f"{found.tokens_per_word:.2f} tokens per word, {found.byte_tokens:.2%} of the tokens are single bytes"
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a SentencePiece tokenizer.")
    parser.add_argument("--input", nargs="+", required=True, help="text files, records as --train-data, or globs")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, 4 special and 256 bytes included")
    parser.add_argument("--save", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--chat-template", help="Jinja file of the fast tokenizer's chat template")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="[%(default)s]")
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        help="share of the characters that get their own pieces, the others become bytes [%(default)s]",
    )
    parser.add_argument("--user-defined-symbols", nargs="+", default=[], help="texts that are always one token")
    parser.add_argument(
        "--input-sentence-size", type=int, default=0, help="train on so many lines drawn at random [all]"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
