"""A step of supervised fine-tuning on packed sequences, against TRL's SFTTrainer with packing.

    python tools/benchmark.py sft --hf-model DIR --train-data FILE

A batch is --sequences packed sequences of --seq-length tokens. Every step trains on the same records, so that losses
can be compared. TRL gets the token ids of our records. Its trainer keeps float32 weights and computes under autocast,
as ours keeps float32 weights in its optimizer; with --peer-weights bfloat16 its weights and moments are bfloat16 too.
"""

import argparse
from collections.abc import Sequence

import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from benchmarks.real_work import TextRecord, Work, add_work_arguments, opened_work
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
from megatron_brain.data.packing import pack_by_length
from megatron_brain.stages.sft.stage import SFTStage

REQUIRED = 3.0
"""Least ratio of the times that is required, of the default sizes and a model of 135M parameters."""

_IGNORED = -100
"""Label of a token that is not learned."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the subject."""
    parser.add_argument("--seq-length", type=int, default=512, help="tokens of a packed sequence [%(default)s]")
    parser.add_argument("--sequences", type=int, default=4, help="packed sequences of a step [%(default)s]")
    add_peer_arguments(parser, micro_batch=1, of="packed sequences", peer_micro_batch=1)
    add_work_arguments(parser, pairs=3)


def run(args: argparse.Namespace) -> dict:
    """Measure. `failures` in the result names what the two sides did not compute alike."""
    failures: list[str] = []
    with opened_work(args) as work:
        ours = _open_ours(work, args)
        groups = ours.groups()
        peer = PeerTrainer(_open_peer(work, args, groups))
        sizes = _sizes(groups, peer.trainer.train_dataset, args.sequences, failures)
        timed = peer.compare(ours.step, pairs=args.pairs, label="sft")
        losses = compare_losses(ours.losses, peer.losses, work, failures)
    seconds = timed["wall"]
    speeds = {side: sizes["tokens"] / seconds[f"{side}_seconds"] for side in ("ours", "baseline")}
    return {
        "peer": f"TRL {trl.__version__}",
        **sizes,
        "loss": losses,
        "step": timed,
        "tokens_per_second": speeds,
        **required(REQUIRED, seconds["ratio"]),
        "failures": failures,
    }


def _open_ours(work: Work, args: argparse.Namespace) -> OurTrainer:
    """Our trainer on as many of the first records as fill the sequences of one step."""
    records = [{"prompt": record.prompt, "completion": record.completion} for record in _batch(work, args)]
    settings = {
        "hf_model": str(work.model),
        "train_data": work.write("sft.jsonl", records),
        "seq_length": args.seq_length,
        "global_batch_size": args.sequences,
        "micro_batch_size": args.micro_batch_size,
    }
    return OurTrainer(open_stage_run(work, "sft", **settings), SFTStage)


def _batch(work: Work, args: argparse.Namespace) -> list[TextRecord]:
    records = work.first(args.sequences)
    lengths = [len(work.tokenizer(record.prompt + record.completion)["input_ids"]) + 1 for record in work.records]
    for count in range(args.sequences, len(lengths) + 1):
        if len(pack_by_length(lengths[:count], args.seq_length, seed=work.seed)) > args.sequences:
            break
        records = work.records[:count]
    return records


def _open_peer(work: Work, args: argparse.Namespace, groups: Sequence[Group]) -> SFTTrainer:
    """TRL's trainer on the token ids of the same records."""
    rows = [
        {
            "input_ids": [*group.prompt, *group.responses[0]],
            "labels": [_IGNORED] * len(group.prompt) + list(group.responses[0]),
        }
        for group in groups
    ]
    settings = peer_settings(work, args, batch=args.sequences)
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(work.model, dtype=peer_dtype(args)),
        args=SFTConfig(**settings, packing=True, max_length=args.seq_length),
        train_dataset=Dataset.from_list(rows),
        processing_class=work.tokenizer,
    )


def _sizes(groups: Sequence[Group], rows: Dataset, sequences: int, failures: list[str]) -> dict:
    """Sizes of a step, which must be the same on both sides."""
    ours = {
        "sequences": sequences,
        "tokens": sum(group.num_tokens(shared_prefix=False) for group in groups),
        "trained_tokens": sum(len(group.responses[0]) for group in groups),
    }
    theirs = {
        "sequences": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "trained_tokens": sum(label != _IGNORED for row in rows for label in row["labels"]),
    }
    if ours != theirs:
        failures.append(f"a step is {ours} on our side and {theirs} on TRL's")
    return {"records": len(groups), **ours}
