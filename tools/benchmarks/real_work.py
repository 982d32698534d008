"""The model and the records of the subjects against other packages: all sides get the same weights and texts."""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from megatron_brain.config.stage_spec import Head
from megatron_brain.errors import ConfigError, RecordError

_MOST_RECORDS = 2000
"""Records that are read; no subject needs more."""


@dataclass(frozen=True)
class TextRecord:
    """A prompt and the text to learn for it."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all sides work on.

    folder: a temporary one. model: a Hugging Face directory whose weights are rounded to the dtype, so that those who
    compute in it and those who keep float32 weights start alike. records: those that fit the limits, in file order.
    """

    folder: Path
    model: Path
    tokenizer: PreTrainedTokenizerBase
    records: list[TextRecord]
    dtype: torch.dtype
    seed: int

    def write(self, name: str, records: list[dict]) -> str:
        """Write records as JSON lines. Returns the path."""
        file = self.folder / name
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(file)

    def reward_model(self) -> Path:
        """Write a reward model with this trunk and a random head. Returns its directory."""
        return _write_model(self.model, self.folder / "reward", "reward", self)

    def first(self, count: int) -> list[TextRecord]:
        """The first records.

        Raises:
            ConfigError: there are not so many.
        """
        if len(self.records) < count:
            raise ConfigError(
                f"--train-data: {count} records are needed, {len(self.records)} are within --max-prompt-length and "
                "--max-response-length"
            )
        return self.records[:count]


def add_work_arguments(parser: argparse.ArgumentParser, *, pairs: int) -> None:
    """Add the flags that these subjects share."""
    work = parser.add_argument_group("work")
    work.add_argument("--hf-model", type=Path, required=True, help="directory of a Hugging Face language model")
    work.add_argument("--train-data", type=Path, required=True, help="JSON lines with prompt and completion")
    work.add_argument("--max-prompt-length", type=int, default=104, help="longest prompt in tokens [%(default)s]")
    work.add_argument("--max-response-length", type=int, default=24, help="longest completion in tokens [%(default)s]")
    work.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    work.add_argument("--seed", type=int, default=1234)
    timing = parser.add_argument_group("timing")
    timing.add_argument("--pairs", type=int, default=pairs, help="timed calls of each side [%(default)s]")
    timing.add_argument("--threads", type=int, default=2, help="threads of each side [%(default)s]")


@contextmanager
def opened_work(args: argparse.Namespace) -> Iterator[Work]:
    """The work that the flags describe.

    Raises:
        ConfigError: the model is no Hugging Face directory, or a number is too small.
        RecordError: a line is no record with prompt and completion.
    """
    for flag in ("pairs", "threads"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if not (args.hf_model / "config.json").exists():
        raise ConfigError(f"--hf-model {args.hf_model}: no Hugging Face directory; it has no config.json")
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.hf_model)
    records = _read(args, tokenizer)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        work = Work(
            folder=Path(name),
            model=Path(name) / "policy",
            tokenizer=tokenizer,
            records=records,
            dtype=getattr(torch, args.dtype),
            seed=args.seed,
        )
        _write_model(args.hf_model, work.model, "policy", work)
        yield work


def _read(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[TextRecord]:
    if not args.train_data.exists():
        raise ConfigError(f"--train-data {args.train_data}: no such file")
    lines = args.train_data.read_text(encoding="utf-8").splitlines()[:_MOST_RECORDS]
    found = [_record(f"{args.train_data}:{number}", line) for number, line in enumerate(lines, start=1)]
    prompts = tokenizer([record.prompt for record in found])["input_ids"]
    completions = tokenizer([record.completion for record in found])["input_ids"]
    return [
        record
        for record, prompt, completion in zip(found, prompts, completions, strict=True)
        # The end of the text is a token too.
        if len(prompt) <= args.max_prompt_length and len(completion) < args.max_response_length
    ]


def _record(where: str, line: str) -> TextRecord:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise RecordError(where, "no JSON", f"no JSON: {error}") from error
    texts = [values.get(name) if isinstance(values, dict) else None for name in ("prompt", "completion")]
    if not all(isinstance(text, str) for text in texts):
        raise RecordError(where, "no texts", "expected an object with the texts prompt and completion")
    return TextRecord(*texts)


def _write_model(source: Path, directory: Path, head: Head, work: Work) -> Path:
    torch.manual_seed(work.seed)
    if head == "policy":
        model = AutoModelForCausalLM.from_pretrained(source, dtype=work.dtype)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(source, dtype=work.dtype, num_labels=1)
        model.config.pad_token_id = work.tokenizer.pad_token_id
    model.save_pretrained(directory)
    work.tokenizer.save_pretrained(directory)
    return directory
