"""Brain runs with sampling, scoring, every source of responses, and groups that are cut.

The matrix has the updates alone, on given rollouts.
"""

import json
import random
from pathlib import Path

import pytest
import torch

from distributed.matrix import drifted_rollouts
from distributed.runs import expect_equal, flags_of, open_trainer, start, train
from distributed.world import Context, Layout, at

BUDGET = 48

# The matrix runs the updates at larger layouts, and cases_generation.py runs the sampling there.
rounds = at(lambda layout: layout.size <= 4 and layout.tp < 4)
halves = at(lambda layout: layout.size <= 2 or layout.name in ("tp2_dp2", "pp2_dp2"))


def brain_flags(context: Context) -> list[str]:
    """Flags of a short brain run. One process makes the checkpoints of its prior and its reward model."""
    return [
        *_start(context),
        *("--reward-load", str(start("reward", context))),
        *("--samples-per-prompt", "4", "--max-new-tokens", "8", "--prompts-per-round", "16"),
        *("--refresh-interval", "2", "--reward-temperature", "0.05"),
    ]


@rounds
def case_a_round_and_its_updates(layout: Layout, context: Context) -> None:
    rollouts = context.shared / f"rollouts_{context.world_size}_{layout.name}"
    actual = train("brain", layout, context, *brain_flags(context), "--rollout-dir", str(rollouts))
    # Samples and scores are equal too, because round 0 is drawn before any weight changes.
    if torch.distributed.get_rank() == 0:
        lines = (rollouts / "round_0000.jsonl").read_text().splitlines()
        assert len(lines) == 16
        sampled = [[r["tokens"] for r in json.loads(line)["responses"]] for line in lines]
        assert sampled == context.reference("brain_samples", sampled)
    expect_equal(actual, context.reference("brain", actual))


@halves
def case_every_shape_of_batch_gives_the_same_run(layout: Layout, context: Context) -> None:
    for extra in (
        ["--two-pass", "--offload-prior", "--offload-reward"],
        ["--micro-batch-size", "1", "--max-tokens-per-micro-batch", str(BUDGET), "--no-shared-prefix"],
    ):
        actual = train("brain", layout, context, *brain_flags(context), *extra)
        expect_equal(actual, context.reference("brain", actual))


@halves
def case_static_proposal_and_tempered_samples(layout: Layout, context: Context) -> None:
    extra = ["--no-refresh-proposal", "--temperature", "1.5"]
    actual = train("brain", layout, context, *brain_flags(context), *extra)
    expect_equal(actual, context.reference("brain_static", actual))


@halves
def case_given_pairs_are_dpo(layout: Layout, context: Context) -> None:
    extra = [
        *("--responses", "given", "--alpha", "hard", "--policy-strength", "0.3", "--no-refresh-proposal"),
        *(*_start(context), "--prompts-per-round", "16"),
        *("--train-data", str(context.assets / "pairs.jsonl")),
    ]
    actual = train("brain", layout, context, *extra)
    expect_equal(actual, context.reference("given_pairs", actual))


@halves
def case_two_passes_give_the_gradient_of_one(layout: Layout, context: Context) -> None:
    path = context.shared / "drifted.jsonl"
    if context.world_size == 1:
        write_drifted_rollouts(path)
    for baseline in ("self-normalized", "unnormalized", "none"):
        flags = ["--rollout-data", str(path), "--baseline", baseline, "--policy-strength", "0.5"]
        loss, expected = gradients(layout, context, *flags)
        assert loss == pytest.approx(context.reference(f"drifted_{baseline}", loss), rel=1e-5)
        ways = [["--micro-batch-size", "1", "--max-tokens-per-micro-batch", str(BUDGET)]]
        for extra in [*ways, ["--two-pass"]] if baseline == "self-normalized" else ways:
            other_loss, actual = gradients(layout, context, *flags, *extra)
            assert abs(other_loss / loss - 1) < 1e-6, f"{extra}: loss {other_loss}, in one pass {loss}"
            error = relative_error(actual, expected)
            assert error < 1e-6, f"{baseline}, {extra}: gradients differ by {error:.2e} of their norm"


@halves
def case_more_replicas_than_groups(layout: Layout, context: Context) -> None:
    path = context.shared / "few.jsonl"
    if context.world_size == 1:
        write_drifted_rollouts(path, groups=3)
    flags = ["--rollout-data", str(path), "--global-batch-size", "3", "--micro-batch-size", "1"]
    flags += ["--max-tokens-per-micro-batch", str(BUDGET)]
    actual = train("brain", layout, context, *_start(context), *flags)
    expect_equal(actual, context.reference("few_groups", actual))


def write_drifted_rollouts(path: Path, *, groups: int = 8) -> None:
    records = drifted_rollouts(random.Random(3), groups=groups)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def gradients(layout: Layout, context: Context, *extra: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of the first step over all groups, and this rank's reduced gradients."""
    from megatron_brain.training.report import reduce_reports
    from megatron_brain.training.schedule import forward_backward, pack_micro_batches

    flags = ["--train-iters", "3", *_start(context), *extra]
    trainer = open_trainer("brain", flags_of("brain", layout, context, *flags))
    stage, parallel = trainer.stage, trainer.parallel
    batches = pack_micro_batches(stage.micro_batches(trainer), parallel, shared_prefix=True)
    batches = stage.prepare(trainer, batches)
    for chunk in trainer.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    cut = [part for parts in stage._step for part in parts if not part.is_whole]
    assert bool(cut) == ("--max-tokens-per-micro-batch" in extra), "groups are cut where they do not fit, only there"
    reports = forward_backward(trainer.wrapped, batches, stage.loss, parallel)
    metrics = reduce_reports(reports, parallel, mean_names=stage.mean_metrics, max_names=stage.max_metrics)
    return metrics["loss"], {
        f"{number}.{name}": parameter.main_grad.clone()
        for number, chunk in enumerate(trainer.gathered_chunks())
        for name, parameter in chunk.named_parameters()
    }


def relative_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of the expected ones."""
    assert actual.keys() == expected.keys()
    pairs = [(actual[name].double(), value.double()) for name, value in expected.items()]
    difference = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
    return (difference / sum(float((b**2).sum()) for _, b in pairs)) ** 0.5


def _start(context: Context) -> list[str]:
    return ["--load", str(start("sft", context)), "--finetune"]
