"""Sets up an exported tokenizer directory, and checks that it encodes and decodes as the original tokenizer does."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_brain.data.tokenizer.awkward_texts import AWKWARD_TEXTS, where_differing
from megatron_brain.data.tokenizer.base import Before, Tokenizer
from megatron_brain.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


_JOINS = [
    ("when?\n", "at nine"),
    ("a long text\nTL;DR:", " a short one"),
    ("a: ", "nine"),
    ("a ", " b"),
    ("a:", "\nb"),
    ("a\n", "\nb"),
    ("some wor", "ds"),
    ("3.1", "4"),
    ("\u6f22", "\u5b57"),
]
"""Prompts and responses with different kinds of boundaries between them."""


def finish_config(directory: Path, head: Literal["policy", "reward"]) -> None:
    """Write the settings of tokenizer_config.json that ``save_pretrained`` leaves open, for transformers 4 and 5.

    A reward model pads on the right and cuts on the left: a cut on the right would remove the last token, at which the
    reward is read. The class is the one that uses tokenizer.json unchanged, under its name in transformers 4. The list
    of further special tokens also has its name of version 4, where the name of version 5 means a dictionary. In version
    4 that class makes `token_type_ids`, which no model here takes, unless `model_input_names` says otherwise.
    """
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if (directory / "tokenizer.json").is_file():
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings["model_input_names"] = ["input_ids", "attention_mask"]
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if head == "reward":
        settings |= {"padding_side": "right", "truncation_side": "left"}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_exported(directory: str | Path, tokenizer: Tokenizer) -> None:
    """Compare the tokenizer that `AutoTokenizer` reads from a directory with the original, encoding and decoding texts.

    A config.json in the directory matters: for some model types (qwen2, phi3) transformers uses a special class, which
    builds the tokenizer in another way. Where the files are right and only that class is wrong, this logs a warning.

    Raises:
        ConfigError: the ids or the decoded text differ; names the text, both results and the cure.
    """
    from transformers import PreTrainedTokenizerFast

    exported = _read(directory)
    problem = _first_problem(exported, tokenizer)
    if problem is None:
        return
    message = f"{directory}: AutoTokenizer ({type(exported).__name__}) {problem}"
    if (Path(directory) / "config.json").is_file():
        plain = PreTrainedTokenizerFast.from_pretrained(str(directory))
        if _first_problem(plain, tokenizer) is None:
            logger.warning(
                "%s; transformers takes this class for the model_type of config.json: load the tokenizer with "
                "PreTrainedTokenizerFast.from_pretrained, which gives the ids of here",
                message,
            )
            return
    if exported("a")["input_ids"][-1:] == [tokenizer.eos_id]:
        cure = "set add_eos_token to false in the checkpoint's tokenizer/tokenizer_config.json: prompts end without EOS"
    else:
        cure = "give transformers token ids that this tokenizer made"
    raise ConfigError(f"{message}; {cure}")


def warn_of_joins(directory: str | Path, tokenizer: Tokenizer) -> None:
    """Log texts where prompt + response + EOS as one text has other ids than prompt and response have here.

    In these a token crosses the boundary, and `transformers` computes another reward for the text.
    """
    exported = _read(directory)
    others = []
    for prompt, response in _JOINS:
        ids = tokenizer.encode_prompt(prompt)
        ours = [*ids, *tokenizer.encode_response(response, before=Before(prompt, ids[-1] if ids else None))]
        if exported(prompt + response + exported.eos_token, verbose=False)["input_ids"] != ours:
            others.append(f"{prompt!r} + {response!r}")
    if others:
        logger.warning(
            "%s: on a text of prompt + response + eos_token, transformers gives the rewards of here except where a "
            "token reaches across the boundary, as in %s; give it token ids there",
            directory,
            ", ".join(others),
        )


def _first_problem(exported: PreTrainedTokenizerBase, tokenizer: Tokenizer) -> str | None:
    for text, ours, theirs in _differences(exported, tokenizer, AWKWARD_TEXTS):
        return (
            f"turns {text[:80]!r} into {where_differing(theirs, ours)}, training and sampling here have "
            f"{where_differing(ours, theirs)}"
        )
    for text in AWKWARD_TEXTS:
        ids = [*tokenizer.encode_prompt(text), tokenizer.eos_id]
        if exported.unk_token_id in ids:
            continue  # An unknown token has no text.
        here, there = tokenizer.decode(ids), exported.decode(ids, skip_special_tokens=True)
        if here != there:
            return f"decodes {ids[:20]} as {there[:80]!r}, here it is {here[:80]!r}"
    return None


def warn_of_differences(directory: str | Path, tokenizer: Tokenizer, texts: Iterable[str], cure: str) -> None:
    """Log the texts that `AutoTokenizer` encodes differently, with both results."""
    for text, ours, theirs in _differences(_read(directory), tokenizer, texts):
        logger.warning(
            "%s: AutoTokenizer turns %r into %s, training and sampling here have %s; %s",
            directory,
            text[:80],
            where_differing(theirs, ours),
            where_differing(ours, theirs),
            cure,
        )


def _read(directory: str | Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)


def _differences(
    exported: PreTrainedTokenizerBase, tokenizer: Tokenizer, texts: Iterable[str]
) -> Iterator[tuple[str, list[int], list[int]]]:
    for text in texts:
        ours = tokenizer.encode_prompt(text)
        theirs = exported(text, split_special_tokens=True, verbose=False)["input_ids"]
        if ours != theirs:
            yield text, ours, theirs
