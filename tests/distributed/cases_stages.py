"""Each stage's losses, gradient norms and final weights are those of one process, whatever the layout."""

from pathlib import Path

import pytest
import torch
from helpers.assets import size_flags

from distributed.world import Context, Layout

STEPS = 3


def train(stage: str, layout: Layout, context: Context, *extra: str) -> dict[str, list[float]]:
    """Train a tiny model for a few steps from its seed; returns each step's loss and gradient norm."""
    from megatron_brain.config.loader import load_config
    from megatron_brain.stages import brain, reward, sft
    from megatron_brain.training.run import open_run
    from megatron_brain.training.trainer import Trainer

    data = {"sft": "sft.jsonl", "reward": "pairs.jsonl", "brain": "prompts.jsonl"}[stage]
    flags = [
        *([] if "--rollout-data" in extra else ["--train-data", str(context.assets / data)]),
        *("--seq-length", "64"),
        *("--train-iters", str(STEPS), "--global-batch-size", "8", "--micro-batch-size", "2"),
        *("--lr", "1e-3", "--lr-decay-style", "constant", "--no-progress"),
        *layout.flags(),
        *extra,
    ]
    run = open_run(load_config(stage, flags))
    make = {"sft": sft.SFTStage, "reward": reward.RewardStage, "brain": brain.BrainStage}[stage]
    trainer = Trainer(run, make(run))
    steps = []
    for _ in range(STEPS):
        metrics = trainer.step(trainer.stage.micro_batches(trainer))
        trainer.stage.after_step(trainer, metrics)
        steps.append(metrics)
    weights = [p.detach().float() for chunk in trainer.chunks for p in chunk.parameters()]
    assert all(torch.isfinite(w).all() for w in weights)
    return {name: [step[name] for step in steps] for name in ("loss", "grad_norm")}


def random_start(context: Context) -> list[str]:
    return [*size_flags(), "--tokenizer-model", str(context.assets / "tokenizer")]


def expect_equal(actual: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    for name, values in expected.items():
        assert actual[name] == pytest.approx(values, rel=1e-5), f"{name}: {actual[name]}, one process: {values}"


def case_sft(layout: Layout, context: Context) -> None:
    actual = train("sft", layout, context, *random_start(context))
    expect_equal(actual, context.reference("sft", actual))


def case_sft_untied_recomputed(layout: Layout, context: Context) -> None:
    extra = ["--untie-embeddings-and-output-weights"]
    actual = train("sft", layout, context, *random_start(context), *extra)
    plain = context.reference("sft_untied", actual)
    expect_equal(actual, plain)
    extra += ["--recompute-granularity", "full"]
    expect_equal(train("sft", layout, context, *random_start(context), *extra), plain)


def case_reward(layout: Layout, context: Context) -> None:
    actual = train("reward", layout, context, *random_start(context))
    expect_equal(actual, context.reference("reward", actual))


def case_reward_without_shared_prefix(layout: Layout, context: Context) -> None:
    actual = train("reward", layout, context, *random_start(context), "--no-shared-prefix")
    expect_equal(actual, context.reference("reward", actual))


def case_token_budget(layout: Layout, context: Context) -> None:
    budget = ["--micro-batch-size", "1", "--max-tokens-per-micro-batch"]
    expect_equal(train("sft", layout, context, *random_start(context), *budget, "64"), context.expected("sft"))
    expect_equal(train("reward", layout, context, *random_start(context), *budget, "100"), context.expected("reward"))


def case_checkpoint_continues_at_every_layout(layout: Layout, context: Context) -> None:
    """Saved by one process after STEPS steps; goes on anywhere as if never stopped."""
    saved = context.shared / "resume"
    flags = [*random_start(context), "--save", str(saved)]
    if context.world_size == 1:
        save_start("sft", layout, context, saved, steps=STEPS)
    resumed = _train_on("sft", layout, context, *flags, "--load", str(saved))
    uninterrupted = context.reference("uninterrupted", _uninterrupted(layout, context))
    assert resumed == pytest.approx(uninterrupted, rel=1e-5)


def _trainer(stage: str, layout: Layout, context: Context, *extra: str):
    from megatron_brain.config.loader import load_config
    from megatron_brain.stages import reward, sft
    from megatron_brain.training.run import open_run
    from megatron_brain.training.trainer import Trainer

    data = {"sft": "sft.jsonl", "reward": "pairs.jsonl"}[stage]
    flags = [
        *("--train-data", str(context.assets / data), "--seq-length", "64", "--train-iters", str(2 * STEPS)),
        *("--global-batch-size", "8", "--lr", "1e-2", "--no-progress"),
        *layout.flags(),
        *extra,
    ]
    run = open_run(load_config(stage, flags))
    return Trainer(run, (sft.SFTStage if stage == "sft" else reward.RewardStage)(run))


def _steps(trainer, count: int) -> list[float]:
    metrics = [trainer.step(trainer.stage.micro_batches(trainer)) for _ in range(count)]
    return [m[name] for m in metrics for name in ("loss", "grad_norm", "lr")]


def save_start(stage: str, layout: Layout, context: Context, path: Path, *, steps: int = 0) -> None:
    trainer = _trainer(stage, layout, context, *random_start(context), "--save", str(path))
    _steps(trainer, steps)
    trainer.save()


def _train_on(stage: str, layout: Layout, context: Context, *extra: str) -> list[float]:
    return _steps(_trainer(stage, layout, context, *extra), STEPS)


def _uninterrupted(layout: Layout, context: Context) -> list[float]:
    if context.world_size > 1:
        return []
    trainer = _trainer("sft", layout, context, *random_start(context))
    _steps(trainer, STEPS)
    return _steps(trainer, STEPS)
