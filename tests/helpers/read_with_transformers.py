"""Reads exported directories with an installed transformers. It runs under the Python of a separate environment.

    python read_with_transformers.py QUESTIONS.json ANSWERS.json

QUESTIONS: {"texts": [str], "chats": [[message]], "ids": [[int]], "policies": [DIR], "rewards": [DIR]}. ANSWERS:
{"transformers": version, "warnings": [str], DIR: {"texts": [[int]] as ids, "literal": [[int]] without special tokens,
"decoded": [str], "chats": [str], "values": logits [[[float]]] of a policy or rewards [float] of the ids}}.
"""

import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

_KINDS = {"policies": AutoModelForCausalLM, "rewards": AutoModelForSequenceClassification}


def main(questions: Path, answers: Path) -> None:
    asked = json.loads(questions.read_text(encoding="utf-8"))
    said = []
    logger = logging.getLogger("transformers")
    logger.addHandler(type("Keep", (logging.Handler,), {"emit": lambda _, record: said.append(record.getMessage())})())
    found = {"transformers": transformers.__version__}
    for kind, auto in _KINDS.items():
        for directory in asked[kind]:
            found[directory] = read(directory, auto, asked)
    answers.write_text(json.dumps({**found, "warnings": said}), encoding="utf-8")


@torch.no_grad()
def read(directory: str, auto: type, asked: dict) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = auto.from_pretrained(directory, torch_dtype=torch.float32).eval()
    ids = [tokenizer(text)["input_ids"] for text in asked["texts"]]
    return {
        "texts": ids,
        "literal": [tokenizer(t, split_special_tokens=True)["input_ids"] for t in asked["texts"]],
        "decoded": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "chats": [tokenizer.apply_chat_template(chat, tokenize=False) for chat in asked["chats"]],
        "values": [model(torch.tensor([row])).logits[0].tolist() for row in asked["ids"]],
    }


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
