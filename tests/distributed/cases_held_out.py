"""Answers to held-out prompts and their numbers are those of one process, also in a run that another layout resumes.

The distance to the posterior is one of the numbers.
"""

import json

import pytest

from distributed.cases_brain import brain_flags
from distributed.runs import flags_of, open_trainer, step
from distributed.world import Context, Layout, at

# Seven prompts are no multiple of the replicas; two are fewer than four.
_PROMPTS, _FEW = 7, 2

some = at(lambda layout: layout.name in ("tp2_sp", "pp2", "dp2", "tp2_dp2", "dp4"))


@some
def case_held_out_answers_and_their_numbers(layout: Layout, context: Context) -> None:
    saved, samples = context.shared / "held_out_run", context.shared / f"prior_{context.world_size}_{layout.name}.jsonl"
    extra = ["--save", str(saved)] if context.world_size == 1 else []
    trainer = _open(layout, context, _PROMPTS, *extra, "--posterior-data", str(samples))
    found = evaluated(trainer)
    written = [json.loads(line) for line in samples.read_text().splitlines()]
    drawn = [[response["tokens"] for response in line["responses"]] for line in written]
    assert drawn == context.reference("prior_samples", drawn) and list(map(len, drawn)) == [4] * 5
    if context.world_size == 1:
        trainer.save()
    for _ in range(2):
        step(trainer)
    _expect_reference("held_out_before", found, context)
    _expect_reference("held_out_after", evaluated(trainer), context)


@some
def case_a_resumed_run_keeps_the_priors_answers_at_any_layout(layout: Layout, context: Context) -> None:
    """The checkpoint is that of one process."""
    start = ["--load", str(context.shared / "held_out_run"), "--prior-load", str(context.shared / "prior")]
    resumed = _open(layout, context, _PROMPTS, *start)  # It draws the samples of the prior again.
    resumed.stage._held_out._answer_by_prior = None  # It is not called.
    for _ in range(2):
        step(resumed)
    _expect_reference("held_out_after", evaluated(resumed), context)


@at(lambda layout: layout.name in ("dp2", "dp4"))
def case_fewer_held_out_prompts_than_replicas(layout: Layout, context: Context) -> None:
    read = ["--posterior-data", str(context.shared / "prior_of_one_process.jsonl")]
    _expect_reference("held_out_few", evaluated(_open(layout, context, _FEW, *read)), context)


@at(lambda layout: layout.name in ("dp2", "pp2"))
def case_a_judge_that_fails_on_one_rank_ends_all_with_one_message(layout: Layout, context: Context) -> None:
    from megatron_brain.errors import AgreedError

    judge = context.shared / f"failing_{context.world_size}.py"
    judge.write_text("def score(*columns):\n    raise ValueError('no judge today')\n")
    trainer = _open(layout, context, _FEW, "--judge", f"{judge}:score")
    with pytest.raises(AgreedError, match="raised ValueError on the record"):
        trainer.stage.validate(trainer)


def _open(layout: Layout, context: Context, prompts: int, *extra: str):
    judge = context.shared / "judge.py"
    if context.world_size == 1:
        judge.write_text("def score(prompts, responses, references):\n    return [len(text) for text in responses]\n")
    held_out = ["--valid-data", str(context.assets / "sft.jsonl"), "--max-valid-records", str(prompts)]
    held_out += ["--judge", f"{judge}:score", "--train-iters", "9"]
    held_out += ["--posterior-samples", "4", "--posterior-prompts", "5"]
    flags = [*brain_flags(context), "--lr", "1e-2", *held_out, *extra]
    if "--load" in extra:
        flags.remove("--finetune")
    return open_trainer("brain", flags_of("brain", layout, context, *flags))


def evaluated(trainer) -> dict:
    """The metrics of a validation, and the answers of policy and prior."""
    texts: dict[str, str] = {}
    trainer.logger.log_text = lambda step, tag, text: texts.update({tag: text})
    metrics = trainer.stage.validate(trainer)
    del metrics["seconds"]
    answers = [line.partition(": `")[2] for text in texts.values() for line in text.splitlines()]
    return {"metrics": metrics, "answers": answers}


def _expect_reference(name: str, found: dict, context: Context) -> None:
    expected = context.reference(name, found)
    assert found["answers"] == expected["answers"]
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, abs=1e-5)
