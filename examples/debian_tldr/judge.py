"""The judge of the example. It scores how near a response is to the synopsis that the package's maintainer wrote:

    score = 0.25 ROUGE-2 F + 0.25 ROUGE-L F + 0.5 max(0, cosine of MiniLM sentence embeddings)

and 0 for an empty response.

It needs the reference, which neither the policy nor the reward model ever sees. It labels preference pairs of samples
on training prompts, and it evaluates on held-out prompts. Nothing is trained on its scores directly.

`score` needs the encoder that `fetch_judge.py` writes, in the directory named by the environment variable
TLDR_JUDGE_DIR (default: `work/judge` of this checkout). `score_rouge` needs no download.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_DIRECTORY = Path(__file__).resolve().parents[2] / "work" / "judge"
MAX_TOKENS = 256
"""Longest text that the encoder was made for. The rest of a longer text is not read."""
BATCH_SIZE = 64


def score(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    """Score each response against its reference, between 0 and 1; the prompts are not read.

    Raises:
        ValueError: the lists differ in length.
        FileNotFoundError: the encoder is not there.
    """
    check_lengths(prompts, responses, references)
    texts = sorted({text.strip() for text in responses + references}, key=len)
    row = {text: index for index, text in enumerate(texts)}
    embeddings = embed(texts)
    scores = []
    for response, reference in zip(responses, references, strict=True):
        if not response.strip():
            scores.append(0.0)
            continue
        rouge_2, rouge_l = rouge(response, reference)
        cosine = float(embeddings[row[response.strip()]] @ embeddings[row[reference.strip()]])
        scores.append(0.25 * rouge_2 + 0.25 * rouge_l + 0.5 * max(0.0, cosine))
    return scores


def score_rouge(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    """Score each response by 0.5 ROUGE-2 F + 0.5 ROUGE-L F, between 0 and 1. It needs no model: for quick checks.

    Raises:
        ValueError: the lists differ in length.
    """
    check_lengths(prompts, responses, references)
    return [0.5 * sum(rouge(*pair)) for pair in zip(responses, references, strict=True)]


def check_lengths(prompts: list[str], responses: list[str], references: list[str]) -> None:
    if not len(prompts) == len(responses) == len(references):
        raise ValueError(
            f"{len(prompts)} prompts, {len(responses)} responses and {len(references)} references: "
            "the judge needs one of each per row"
        )


def rouge(response: str, reference: str) -> tuple[float, float]:
    """ROUGE-2 and ROUGE-L F-measures without stemming (Lin, 2004)."""
    scores = rouge_scorer().score(target=reference, prediction=response)
    return scores["rouge2"].fmeasure, scores["rougeL"].fmeasure


@cache
def rouge_scorer() -> RougeScorer:
    return RougeScorer(["rouge2", "rougeL"])


@torch.inference_mode()
def embed(texts: list[str]) -> torch.Tensor:
    """Sentence embeddings of unit length, [len(texts), h] float32: the mean of the encoder's states over tokens.

    The texts are sorted by length, so that batches need little padding.
    """
    tokenizer, encoder = load_encoder(os.environ.get("TLDR_JUDGE_DIR", str(DEFAULT_DIRECTORY)))
    batches = [torch.empty(0, encoder.config.hidden_size)]
    for start in range(0, len(texts), BATCH_SIZE):
        batch = tokenizer(
            texts[start : start + BATCH_SIZE],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        states = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)
        batches.append(torch.nn.functional.normalize(means, dim=-1))
    return torch.cat(batches)


@cache
def load_encoder(directory: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load MiniLM from a directory, never from the network."""
    if not (Path(directory) / "model.safetensors").exists():
        raise FileNotFoundError(
            f"the judge's encoder is not in {directory}: run fetch_judge.py --out DIR and set TLDR_JUDGE_DIR=DIR"
        )
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    encoder = AutoModel.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
    return tokenizer, encoder.eval()
