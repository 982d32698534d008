"""The equality matrix: the runs at every layout, as data.

An entry trains `STEPS` steps of one stage. For any flags and any layout, its losses, gradient norms and final weights
must equal those of its reference. One process runs the reference, with the reference's flags only. So one entry varies
several things at once. For each thing, one entry has the distributed optimizer and one has not.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.assets import SIZES, WORDS, size_flags

STEPS = 3
GLOBAL_BATCH_SIZE = 8
TOLERANCE = 1e-5
BF16_TOLERANCE = 2e-2

_DISTRIBUTED = ("--use-distributed-optimizer",)
_BUCKETS = ("--overlap-grad-reduce", "--ddp-bucket-size", "4000")
_OVERLAP = (*_BUCKETS, "--overlap-param-gather", *_DISTRIBUTED)
_MICRO_1 = ("--micro-batch-size", "1")
_BUDGET = (*_MICRO_1, "--max-tokens-per-micro-batch", "96")
_BUDGET_OF_PAIRS = (*_MICRO_1, "--max-tokens-per-micro-batch", "160")
_FULL = ("--recompute-granularity", "full")
_SELECTIVE = ("--recompute-granularity", "selective")
_NO_PREFIX = ("--no-shared-prefix",)
_TWO_PASS = ("--two-pass",)
_UNTIED = ("--untie-embeddings-and-output-weights",)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run of the matrix. It must equal the run of one process that `reference` names."""

    stage: str
    reference: str
    flags: tuple[str, ...] = ()

    @property
    def is_bf16(self) -> bool:
        return "--bf16" in REFERENCES[self.reference]


REFERENCES: dict[str, tuple[str, ...]] = {
    "sft": (),
    "sft_untied": _UNTIED,
    "sft_bf16": ("--bf16",),
    "reward": (),
    "brain": (),
}
"""Flags of the runs of one process. All entries of a reference have them too."""


def _sft(*flags: tuple[str, ...], reference: str = "sft") -> Entry:
    return Entry(stage="sft", reference=reference, flags=sum(flags, ()))


def _reward(*flags: tuple[str, ...]) -> Entry:
    return Entry(stage="reward", reference="reward", flags=sum(flags, ()))


def _brain(*flags: tuple[str, ...]) -> Entry:
    return Entry(stage="brain", reference="brain", flags=sum(flags, ()))


MATRIX: dict[str, Entry] = {
    "sft": _sft(_BUCKETS),
    "sft_distributed": _sft(_DISTRIBUTED, _SELECTIVE),
    "sft_budget_overlap": _sft(_BUDGET, _OVERLAP),
    "sft_untied": _sft(_MICRO_1, _SELECTIVE, reference="sft_untied"),
    "sft_untied_overlap": _sft(_OVERLAP, _FULL, reference="sft_untied"),
    "sft_bf16": _sft(_FULL, reference="sft_bf16"),
    "sft_bf16_overlap": _sft(_OVERLAP, reference="sft_bf16"),
    "reward": _reward(_FULL, _BUCKETS),
    "reward_overlap": _reward(_OVERLAP, _MICRO_1),
    "reward_separate": _reward(_NO_PREFIX, _BUDGET_OF_PAIRS),
    "reward_separate_distributed": _reward(_NO_PREFIX, _DISTRIBUTED, _SELECTIVE),
    "brain": _brain(_SELECTIVE),
    "brain_overlap": _brain(_OVERLAP, _FULL),
    "brain_separate": _brain(_NO_PREFIX, _BUCKETS),
    "brain_separate_distributed": _brain(_NO_PREFIX, _DISTRIBUTED),
    "brain_two_pass": _brain(_TWO_PASS, _BUDGET),
    "brain_two_pass_overlap": _brain(_TWO_PASS, _OVERLAP),
    "brain_two_pass_separate": _brain(_TWO_PASS, _NO_PREFIX, _FULL),
    "brain_two_pass_separate_distributed": _brain(_TWO_PASS, _NO_PREFIX, _DISTRIBUTED, _MICRO_1),
}
"""`separate`: without a shared prefix. `overlap`: the distributed optimizer with several buckets."""


def stage_flags(stage: str, shared: Path, tokenizer: Path) -> list[str]:
    """Flags that all runs of a stage have."""
    common = [
        *("--seq-length", "64", "--train-iters", str(STEPS), "--global-batch-size", str(GLOBAL_BATCH_SIZE)),
        *("--lr", "1e-3", "--weight-decay", "0.1", "--lr-decay-style", "constant", "--no-progress"),
        # Some gradients are sums of terms that cancel, so they are only rounding. With the usual 1e-8 Adam makes a
        # whole step of them: even in one process, the order of summation changes single elements by 3e-5.
        *("--adam-eps", "1e-5"),
    ]
    if stage == "brain":
        start = ["--load", str(shared / "prior"), "--finetune", "--policy-strength", "0.5"]
        return [*common, *start, "--rollout-data", str(shared / "uneven_brain.jsonl")]
    data = ["--train-data", str(shared / f"uneven_{stage}.jsonl"), "--tokenizer-model", str(tokenizer)]
    return [*common, *size_flags(), *data]


def write_data(shared: Path) -> None:
    """Write records whose responses differ much in length, and groups that also differ in size."""
    rng = random.Random(11)
    texts = [(f"package {number}: {_words(rng, 4)}\nTL;DR:", _words(rng, 12), _words(rng, 12)) for number in range(24)]
    _write(shared / "uneven_sft.jsonl", [{"prompt": prompt, "completion": text} for prompt, text, _ in texts])
    pairs = [{"prompt": prompt, "chosen": text, "rejected": other} for prompt, text, other in texts]
    _write(shared / "uneven_reward.jsonl", pairs)
    _write(shared / "uneven_brain.jsonl", drifted_rollouts(rng, groups=16))


def drifted_rollouts(
    rng: random.Random, *, groups: int, sizes: Sequence[int] = range(2, 8), longest: int = 20
) -> list[dict]:
    """Groups of 2 to 7 responses. One prompt comes twice; the proposal is another distribution than the policy."""
    records = []
    for index in range(groups):
        prompt = [rng.randrange(2, SIZES["vocab_size"]) for _ in range(rng.randint(3, 20))]
        responses = []
        for _ in range(sizes[index % len(sizes)]):
            tokens = [rng.randrange(2, SIZES["vocab_size"]) for _ in range(rng.randint(1, longest))]
            near = -5.8 * len(tokens)
            responses.append(
                {
                    "tokens": tokens,
                    "log_proposal": near + rng.gauss(0, 1),
                    "log_prior": near + rng.gauss(0, 1),
                    "reward": rng.gauss(0, 1),
                }
            )
        records.append({"id": f"drifted:{index}", "index": index, "prompt_tokens": prompt, "responses": responses})
    records[-1]["prompt_tokens"] = records[0]["prompt_tokens"]
    return records


def _words(rng: random.Random, most: int) -> str:
    return " " + " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def _write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
