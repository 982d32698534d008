"""A step of reward modelling on preference pairs, against TRL's RewardTrainer.

    python tools/benchmark.py reward --hf-model DIR --train-data FILE

The reward model has the trunk of --hf-model and a random head. The chosen response of a pair is a record's completion,
the rejected one that of the next record. Every step trains on the same --batch pairs, so that losses can be compared.
TRL gets the token ids of our pairs and pads them; ours computes a prompt once for both responses and packs all.
"""

import argparse
import itertools
from collections.abc import Sequence

import trl
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from benchmarks.real_work import Work, add_work_arguments, opened_work
from benchmarks.trainers import (
    OurTrainer,
    PeerTrainer,
    add_peer_arguments,
    compare_losses,
    open_stage_run,
    peer_dtype,
    peer_settings,
    required,
)
from megatron_brain.data.groups import Group
from megatron_brain.stages.reward.stage import RewardStage

REQUIRED = 2.0
"""Least ratio of the times that is required, of the default sizes and a model of 135M parameters."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the subject."""
    parser.add_argument("--batch", type=int, default=16, help="pairs of a step [%(default)s]")
    add_peer_arguments(parser, micro_batch=8, of="pairs", peer_micro_batch=8)
    add_work_arguments(parser, pairs=3)


def run(args: argparse.Namespace) -> dict:
    """Measure. `failures` in the result names what the two sides did not compute alike."""
    failures: list[str] = []
    with opened_work(args) as work:
        model = str(work.reward_model())
        ours = _open_ours(work, model, args)
        groups = ours.groups()
        peer = PeerTrainer(_open_peer(work, model, args, groups))
        sizes = _sizes(groups, peer.trainer.train_dataset, failures)
        timed = peer.compare(ours.step, pairs=args.pairs, label="reward")
        losses = compare_losses(ours.losses, peer.losses, work, failures)
    return {
        "peer": f"TRL {trl.__version__}",
        **sizes,
        "loss": losses,
        "step": timed,
        **required(REQUIRED, timed["wall"]["ratio"]),
        "failures": failures,
    }


def _open_ours(work: Work, model: str, args: argparse.Namespace) -> OurTrainer:
    records = work.first(args.batch + 1)
    pairs = [
        {"prompt": record.prompt, "chosen": record.completion, "rejected": other.completion}
        for record, other in itertools.pairwise(records)
    ]
    settings = {
        "hf_model": model,
        "train_data": work.write("pairs.jsonl", pairs),
        "seq_length": args.max_prompt_length + args.max_response_length,
        "global_batch_size": args.batch,
        "micro_batch_size": args.micro_batch_size,
    }
    return OurTrainer(open_stage_run(work, "reward", **settings), RewardStage)


def _open_peer(work: Work, model: str, args: argparse.Namespace, groups: Sequence[Group]) -> RewardTrainer:
    """TRL's trainer on the token ids of the same pairs."""
    rows = []
    for group in groups:
        chosen, rejected = ([*group.prompt, *response] for response in group.responses)
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected})
    return RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(model, dtype=peer_dtype(args)),
        args=RewardConfig(**peer_settings(work, args, batch=args.batch), max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=work.tokenizer,
    )


def _sizes(groups: Sequence[Group], rows: Dataset, failures: list[str]) -> dict:
    """Sizes of a step. Both sides must have the same pairs and tokens."""
    ours = {"batch": len(groups), "tokens": sum(group.num_tokens(shared_prefix=False) for group in groups)}
    theirs = {"batch": len(rows), "tokens": sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)}
    if ours != theirs:
        failures.append(f"a step is {ours} on our side and {theirs} on TRL's")
    return {**ours, "tokens_with_shared_prompts": sum(group.num_tokens(shared_prefix=True) for group in groups)}
