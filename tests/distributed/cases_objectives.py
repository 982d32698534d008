"""Every objective trains alike at every layout, in one pass and in two. Rejection sampling accepts alike."""

import dataclasses
import json
import random

import torch

from distributed.cases_brain import brain_flags, halves
from distributed.cases_matrix import micro_batch_size
from distributed.matrix import GLOBAL_BATCH_SIZE, TOLERANCE, drifted_rollouts, stage_flags
from distributed.runs import expect_equal, open_trainer, start, train
from distributed.weights import gather_weights, relative_differences
from distributed.world import Context, Layout

SETTINGS = {
    "dpo": {"policy_strength": 0.5},
    "ipo": {"policy_strength": 0.5},
    "rso-hinge": {"policy_strength": 0.5},
    "rloo": {"kl_coefficient": 0.1, "clip_ratio": 0.5},
    "grpo": {"kl_coefficient": 0.1, "clip_ratio": 0.5},
}
"""The settings of each objective. rso-sigmoid is dpo by another name."""

ONE_PASS = {}
TWO_PASSES = {"micro_batch_size": 1, "max_tokens_per_micro_batch": 40}
"""Settings of the second step of each objective. The token budget cuts groups."""


def case_a_step_of_each_in_one_pass_and_one_in_two(layout: Layout, context: Context) -> None:
    path = context.shared / "pairs_drifted.jsonl"
    weights_path = context.shared / "weights_objectives.pt"
    if context.world_size == 1:
        path.write_text("".join(json.dumps(record) + "\n" for record in pairs_drifted()))
        expected, weights = steps_of_each(layout, context, ["--micro-batch-size", "4"], [ONE_PASS, ONE_PASS])
        context.reference("objectives", expected)
        torch.save(weights, weights_path)
    actual, weights = steps_of_each(layout, context, micro_batch_size(layout), [ONE_PASS, TWO_PASSES])
    expect_equal(actual, context.expected("objectives"))
    if weights:
        found = relative_differences(weights, torch.load(weights_path))
        different = {name: value for name, value in found.items() if value > TOLERANCE}
        assert not different, f"relative differences of weights: {different}"


def pairs_drifted() -> list[dict]:
    """Groups of pairs, one of them a tie."""
    records = drifted_rollouts(random.Random(5), groups=GLOBAL_BATCH_SIZE, sizes=(2, 4, 6), longest=8)
    for response in (response for record in records for response in record["responses"]):
        # Likelier responses are worse. Otherwise terms of both signs would leave almost nothing of rloo's loss.
        response["reward"] += response["log_proposal"] + 5.8 * len(response["tokens"])
    records[1]["responses"][0]["reward"] = records[1]["responses"][1]["reward"]
    return records


def steps_of_each(layout: Layout, context: Context, flags, ways) -> tuple[dict[str, list[float]], dict]:
    """Losses and gradient norms of one step of each objective in each way, one after another in one trainer, and the
    final weights on rank 0."""
    from megatron_brain.stages.brain.stage import BrainStage

    start("sft", context)
    common = stage_flags("brain", context.shared, context.assets / "tokenizer")
    trainer = open_trainer(
        "brain", [*common, *layout.flags(), *flags, "--rollout-data", str(context.shared / "pairs_drifted.jsonl")]
    )
    config, found = trainer.config, {"loss": [], "grad_norm": []}
    for objective, settings in SETTINGS.items():
        for way in ways:
            brain = dataclasses.replace(config.brain, objective=objective, policy_strength=1.0, two_pass=bool(way))
            brain = dataclasses.replace(brain, **settings)
            training = dataclasses.replace(config.training, **way)
            run = dataclasses.replace(trainer.run, config=dataclasses.replace(config, brain=brain, training=training))
            trainer.stage = BrainStage(run)
            micro_batches = trainer.stage.micro_batches(trainer)
            cut = trainer.parallel.gather_over_data_parallel(
                any(not part.is_whole for parts in trainer.stage._step for part in parts)
            )
            assert any(cut) == bool(way), "groups are cut where they do not fit, only there"
            metrics = trainer.step(micro_batches)
            for name, values in found.items():
                values.append(metrics[name])
    return found, gather_weights(trainer.gathered_chunks())


@halves
def case_rejection_sampling_accepts_the_same(layout: Layout, context: Context) -> None:
    folder = context.shared / f"accepted_{context.world_size}_{layout.name}"
    extra = [
        *("--objective", "rso-hinge", "--responses", "rso", "--no-refresh-proposal", "--rso-candidates", "12"),
        *("--policy-strength", "0.5", "--rollout-dir", str(folder)),
    ]
    actual = train("brain", layout, context, *brain_flags(context), *extra)
    if torch.distributed.get_rank() == 0:
        lines = (folder / "round_0000.jsonl").read_text().splitlines()
        groups = [json.loads(line)["responses"] for line in lines]
        accepted = [[response["tokens"] for response in group] for group in groups]
        assert accepted == context.reference("accepted", accepted)
    expect_equal(actual, context.reference("rejection_sampling", actual))
