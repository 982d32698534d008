"""Tokenizers that `transformers` reads."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2

from megatron_brain.data.tokenizer.base import Tokenizer
from megatron_brain.data.tokenizer.export import check_exported, finish_config

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class HuggingFaceTokenizer(Tokenizer):
    """A directory or hub name that ``transformers.AutoTokenizer`` reads. Code of the directory is never run."""

    tokenizer_type = "HuggingFaceTokenizer"

    def __init__(self, tokenizer_model: str) -> None:
        from transformers import AutoTokenizer

        if not Path(tokenizer_model).exists() and not _HUB_NAME.fullmatch(tokenizer_model):
            place = Path(tokenizer_model).absolute()
            raise ValueError(f"--tokenizer-model {tokenizer_model}: no such folder (looked for {place})")
        try:
            self.hf = AutoTokenizer.from_pretrained(tokenizer_model, trust_remote_code=False)
        except Exception as error:  # the library's readers raise many unrelated types for a bad directory
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"--tokenizer-model {tokenizer_model}: AutoTokenizer cannot read it ({reason}); "
                "give a directory with tokenizer.json and tokenizer_config.json, or a hub name that can be reached"
            ) from error
        if self.hf.eos_token_id is None:
            raise ValueError(
                f"--tokenizer-model {tokenizer_model}: no EOS token, so no response could end; "
                "set eos_token in tokenizer_config.json"
            )
        self.eos_id = self.hf.eos_token_id
        self.bos_id = self.hf.bos_token_id
        self.adds_bos = self.bos_id is not None and self.hf("a")["input_ids"][:1] == [self.bos_id]
        self.vocab_size = max(self.hf.get_vocab().values()) + 1
        templates = self.hf.chat_template
        self.chat_template = templates.get("default") if isinstance(templates, dict) else templates
        added = {i for i, token in self.hf.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(added | set(self.hf.all_special_ids))
        self.pad_id = self._choose_pad()
        self._warn_of_other_end_of_turn()
        if self.eos_id in self.encode(self.hf.eos_token):
            logger.warning(
                "%s cannot take special tokens literally: %r inside a text ends the response there",
                tokenizer_model,
                self.hf.eos_token,
            )

    def _choose_pad(self) -> int:
        """The tokenizer's pad id, or another valid id where it is missing or EOS.

        An id that is special anyway also becomes the pad token of the saved tokenizer, so that a classifier
        exported beside it finds the last token (EOS) of a right-padded row. An ordinary token stays ordinary.
        """
        if self.hf.pad_token_id is not None and self.hf.pad_token_id != self.eos_id:
            return self.hf.pad_token_id
        special = sorted(self.special_ids - {self.eos_id})
        named_pad = [i for i in special if "pad" in self.hf.convert_ids_to_tokens(i).lower()]
        unknown = [i for i in special if i == self.hf.unk_token_id]
        rest = sorted(special, key=lambda i: i == self.bos_id)
        candidates = named_pad + unknown + rest
        pad_id = candidates[0] if candidates else min(set(self.hf.get_vocab().values()) - {self.eos_id})
        token = self.hf.convert_ids_to_tokens(pad_id)
        if candidates:
            self.hf.pad_token = token
        logger.info("tokenizer pads with id %d (%r): it has no pad token of its own other than EOS", pad_id, token)
        return pad_id

    def _warn_of_other_end_of_turn(self) -> None:
        """Say where the template ends turns with another token than EOS, the only one that sampling stops at."""
        if self.chat_template is None:
            return
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            rendered = self.render_chat(messages, add_generation_prompt=False)
        except (jinja2.TemplateError, TypeError, ValueError):
            return  # It takes other messages than these; what is wrong with a record is said there.
        [ids] = self.encode_batch([rendered.rpartition("answer")[2]], parse_special=True)
        end = next((i for i in ids if i in self.special_ids), self.eos_id)
        if end != self.eos_id:
            logger.warning(
                "the chat template ends a turn with %r, but EOS is %r, and sampling stops at EOS alone: training "
                "teaches both, one after the other; for a model that already stops at %r, make that the eos_token in "
                "tokenizer_config.json",
                self.hf.convert_ids_to_tokens(end),
                self.hf.eos_token,
                self.hf.convert_ids_to_tokens(end),
            )

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[list[int]]:
        if not texts:
            return []
        return self.hf(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=not parse_special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if 0 <= i < self.vocab_size]
        return self.hf.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, directory: str | Path) -> None:
        self.hf.save_pretrained(str(directory))

    def export(self, directory: str | Path, head: Literal["policy", "reward"]) -> None:
        self.save(directory)
        finish_config(Path(directory), head)
        if head == "reward" and self.hf.pad_token_id != self.pad_id:
            logger.warning(
                "%s: the tokenizer pads with %s, which transformers would read the reward at: pad with id %d",
                directory,
                self.hf.pad_token,
                self.pad_id,
            )
        check_exported(directory, self)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, tools: list | None = None
    ) -> str:
        if self.chat_template is None:
            raise ValueError(self._no_chat_template())
        return self.hf.apply_chat_template(
            list(messages),
            tools=tools,
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def render_chat_marked(
        self, messages: Sequence[Mapping[str, Any]], *, tools: list | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.chat_template is None:
            raise ValueError(self._no_chat_template())
        # Not apply_chat_template, which marks tokens of a text that it has tokenised as a whole.
        [text], [spans] = render_jinja_template(
            conversations=[list(messages)],
            tools=tools,
            chat_template=self.chat_template,
            return_assistant_tokens_mask=True,
            **self.hf.special_tokens_map,
        )
        return text, [tuple(span) for span in spans]
