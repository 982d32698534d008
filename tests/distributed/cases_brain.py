"""BRAIn at every layout: both ways to the gradient, groups larger than a micro-batch, every source of responses."""

import json
import random
from pathlib import Path

import pytest
import torch
from helpers.assets import SIZES

from distributed.cases_stages import expect_equal, save_start, train
from distributed.world import Context, Layout

BUDGET = 48


def brain_flags(context: Context) -> list[str]:
    """Checkpoints of a prior and a reward model made by one process, and the flags of a short brain run."""
    prior, reward = context.shared / "prior", context.shared / "reward"
    return [
        *("--load", str(prior), "--finetune", "--reward-load", str(reward)),
        *("--samples-per-prompt", "4", "--max-new-tokens", "8", "--prompts-per-round", "16"),
        *("--refresh-interval", "2", "--reward-temperature", "0.05"),
    ]


def case_a_round_and_its_updates(layout: Layout, context: Context) -> None:
    if context.world_size == 1:
        save_start("sft", layout, context, context.shared / "prior")
        save_start("reward", layout, context, context.shared / "reward")
    rollouts = context.shared / f"rollouts_{context.world_size}_{layout.name}"
    actual = train("brain", layout, context, *brain_flags(context), "--rollout-dir", str(rollouts))
    # The samples and their scores are the same too: round 0 is drawn before any weight has moved.
    if torch.distributed.get_rank() == 0:
        lines = (rollouts / "round_0000.jsonl").read_text().splitlines()
        assert len(lines) == 16
        sampled = [[r["tokens"] for r in json.loads(line)["responses"]] for line in lines]
        assert sampled == context.reference("brain_samples", sampled)
    expect_equal(actual, context.reference("brain", actual))


def case_every_shape_of_batch_gives_the_same_run(layout: Layout, context: Context) -> None:
    for extra in (
        ["--no-shared-prefix"],
        ["--two-pass"],
        ["--offload-prior", "--offload-reward"],
        ["--micro-batch-size", "1", "--max-tokens-per-micro-batch", str(BUDGET)],
        ["--micro-batch-size", "1", "--max-tokens-per-micro-batch", str(BUDGET), "--no-shared-prefix"],
    ):
        actual = train("brain", layout, context, *brain_flags(context), *extra)
        expect_equal(actual, context.expected("brain"))


def case_static_proposal_and_tempered_samples(layout: Layout, context: Context) -> None:
    extra = ["--no-refresh-proposal", "--temperature", "1.5"]
    actual = train("brain", layout, context, *brain_flags(context), *extra)
    expect_equal(actual, context.reference("brain_static", actual))


def case_given_pairs_are_dpo(layout: Layout, context: Context) -> None:
    extra = [
        *("--responses", "given", "--alpha", "hard", "--policy-strength", "0.3", "--no-refresh-proposal"),
        *("--load", str(context.shared / "prior"), "--finetune", "--prompts-per-round", "16"),
        *("--train-data", str(context.assets / "pairs.jsonl")),
    ]
    actual = train("brain", layout, context, *extra)
    expect_equal(actual, context.reference("given_pairs", actual))


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


def case_more_replicas_than_groups(layout: Layout, context: Context) -> None:
    path = context.shared / "few.jsonl"
    if context.world_size == 1:
        write_drifted_rollouts(path, groups=3)
    flags = ["--rollout-data", str(path), "--global-batch-size", "3", "--micro-batch-size", "1"]
    flags += ["--max-tokens-per-micro-batch", str(BUDGET)]
    actual = train("brain", layout, context, *_start(context), *flags)
    expect_equal(actual, context.reference("few_groups", actual))


def write_drifted_rollouts(path: Path, *, groups: int = 8) -> None:
    """Groups of 2 to 7 responses, one prompt twice, whose proposal is another distribution than the policy."""
    rng = random.Random(3)
    records = []
    for index in range(groups):
        prompt = [rng.randrange(2, SIZES["vocab_size"]) for _ in range(rng.randint(3, 20))]
        responses = []
        for _ in range(2 + index % 6):
            tokens = [rng.randrange(2, SIZES["vocab_size"]) for _ in range(rng.randint(1, 20))]
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
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def gradients(layout: Layout, context: Context, *extra: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of the first step over all groups, and this rank's reduced gradients."""
    from megatron_brain.config.loader import load_config
    from megatron_brain.stages.brain import BrainStage
    from megatron_brain.training.report import reduce_reports
    from megatron_brain.training.run import open_run
    from megatron_brain.training.schedule import forward_backward, pack_micro_batches
    from megatron_brain.training.trainer import Trainer

    flags = [
        *("--seq-length", "64", "--train-iters", "3", "--global-batch-size", "8", "--micro-batch-size", "2"),
        *("--no-progress", *_start(context), *layout.flags(), *extra),
    ]
    run = open_run(load_config("brain", flags))
    trainer = Trainer(run, BrainStage(run))
    stage = trainer.stage
    batches = pack_micro_batches(stage.micro_batches(trainer), run.parallel, shared_prefix=True)
    batches = stage.prepare(trainer, batches)
    for chunk in trainer.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    cut = [part for parts in stage._step for part in parts if not part.is_whole]
    assert bool(cut) == ("--max-tokens-per-micro-batch" in extra), "groups are cut where they do not fit, only there"
    reports = forward_backward(trainer.wrapped, batches, stage.loss, run.parallel)
    metrics = reduce_reports(reports, run.parallel, mean_names=stage.mean_metrics, max_names=stage.max_metrics)
    return metrics["loss"], {
        f"{number}.{name}": parameter.main_grad.clone()
        for number, chunk in enumerate(trainer.chunks)
        for name, parameter in chunk.named_parameters()
    }


def relative_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of the expected ones."""
    assert actual.keys() == expected.keys()
    pairs = [(actual[name].double(), value.double()) for name, value in expected.items()]
    difference = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
    return (difference / sum(float((b**2).sum()) for _, b in pairs)) ** 0.5


def _start(context: Context) -> list[str]:
    return ["--load", str(context.shared / "prior"), "--finetune"]
