"""Runs of a tiny model, which several cases share."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.assets import size_flags

from distributed.world import LAYOUTS, Context, Layout

if TYPE_CHECKING:
    from megatron_brain.training.trainer import Trainer

STEPS = 3
_DATA = {"sft": "sft.jsonl", "reward": "pairs.jsonl", "brain": "prompts.jsonl"}


def open_trainer(stage: str, flags: Sequence[str]) -> "Trainer":
    """The trainer of a stage, as the command makes it."""
    from megatron_brain.config.loader import load_config
    from megatron_brain.stages.brain import stage as brain
    from megatron_brain.stages.reward import stage as reward
    from megatron_brain.stages.sft import stage as sft
    from megatron_brain.training.start import open_run
    from megatron_brain.training.trainer import Trainer

    run = open_run(load_config(stage, flags))
    make = {"sft": sft.SFTStage, "reward": reward.RewardStage, "brain": brain.BrainStage}[stage]
    return Trainer(run, make(run))


def step(trainer: "Trainer") -> dict[str, float]:
    """Make one step of the loop. Returns its metrics."""
    metrics = trainer.step(trainer.stage.micro_batches(trainer))
    trainer.stage.after_step(trainer, metrics)
    return metrics


def flags_of(stage: str, layout: Layout, context: Context, *extra: str) -> list[str]:
    """Flags of a short run on the tiny data. `extra` may override any of them."""
    return [
        *([] if "--rollout-data" in extra else ["--train-data", str(context.assets / _DATA[stage])]),
        *("--seq-length", "64", "--global-batch-size", "8", "--micro-batch-size", "2", "--lr", "1e-3"),
        *("--no-progress", *layout.flags(), *extra),
    ]


def train(stage: str, layout: Layout, context: Context, *extra: str) -> dict[str, list[float]]:
    """Train a few steps with a constant learning rate. Returns each step's loss and gradient norm."""
    flags = ["--train-iters", str(STEPS), "--lr-decay-style", "constant", *extra]
    trainer = open_trainer(stage, flags_of(stage, layout, context, *flags))
    steps = [step(trainer) for _ in range(STEPS)]
    assert all(torch.isfinite(p).all() for chunk in trainer.gathered_chunks() for p in chunk.parameters())
    return {name: [metrics[name] for metrics in steps] for name in ("loss", "grad_norm")}


def expect_equal(actual: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    for name, values in expected.items():
        assert actual[name] == pytest.approx(values, rel=1e-5), f"{name}: {actual[name]}, one process: {values}"


def random_start(context: Context) -> list[str]:
    """Flags of a model with random weights."""
    return [*size_flags(), "--tokenizer-model", str(context.assets / "tokenizer")]


def start(stage: str, context: Context) -> Path:
    """A checkpoint of random weights. The world of one writes it at its first use."""
    path = context.shared / {"sft": "prior", "reward": "reward"}[stage]
    if context.world_size == 1 and not path.exists():
        flags = [*random_start(context), "--train-iters", "1", "--save", str(path)]
        open_trainer(stage, flags_of(stage, LAYOUTS[1][0], context, *flags)).save()
    return path
