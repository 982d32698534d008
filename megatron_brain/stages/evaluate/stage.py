"""Compares a policy with a baseline checkpoint and with reference responses on held-out prompts."""

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from megatron_brain.checkpointing import load_weights
from megatron_brain.data.groups import Group
from megatron_brain.data.last_turn import encode_answer
from megatron_brain.data.records import Prompt
from megatron_brain.data.tokenizer.base import Before
from megatron_brain.errors import ConfigError
from megatron_brain.files import write_whole
from megatron_brain.generation.batch import Completion
from megatron_brain.models.provider import Chunk
from megatron_brain.stages.answers import gather_rows, my_share, read_prompts, sample_answers
from megatron_brain.stages.brain.placement import Part
from megatron_brain.stages.brain.rollouts import Response, Rollout
from megatron_brain.stages.engine import open_engine
from megatron_brain.stages.intervals import Estimate, bootstrap, wins
from megatron_brain.stages.rewards.rewards import Rewards
from megatron_brain.stages.rewards.scale import Scale
from megatron_brain.training.banner import show_banner
from megatron_brain.training.frozen import FrozenModel
from megatron_brain.training.run import Run
from megatron_brain.training.validation import score_groups
from megatron_brain.user_functions import ScoringFunction

log = logging.getLogger(__name__)

_ANSWERS = ("policy", "baseline", "reference")
_AT_ONCE = 16
"""Prompts whose answers a reward model scores in sequences of one padded length."""


def main(run: Run) -> None:
    """Sample both checkpoints, score all answers, and write the report as JSON."""
    settings = run.config.evaluate
    judge = ScoringFunction(settings.judge, "judge") if settings.judge else None
    prompts = read_prompts(run)
    if judge is not None and any(prompt.reference is None for prompt in prompts):
        missing = next(prompt.record_id for prompt in prompts if prompt.reference is None)
        raise ConfigError(
            f"judge={settings.judge}: it compares with references, and {missing} has none; give the record a "
            "completion, or leave --judge out"
        )
    mine = my_share(prompts, run.parallel)
    policy = run.build_model("policy")
    load_weights(run.start_from, policy, head="policy", verify=run.config.checkpoint.verify)
    scoring = run.config.scoring
    prior = FrozenModel(run, "prior", scoring.prior_load, head="policy", offload=scoring.offload_prior)
    rewards = Rewards(run)
    # A baseline that is the prior is not loaded twice.
    other = settings.baseline_load not in (None, scoring.prior_load)
    baseline = FrozenModel(run, "baseline", settings.baseline_load, head="policy") if other else prior
    models = {"baseline": baseline.path, "prior": prior.path, "judge": settings.judge}
    show_banner(run, [*((name, place) for name, place in models.items() if place is not None), *rewards.rows()])
    one = dataclasses.replace(run.config.sampling, samples_per_prompt=1)
    engine = open_engine(run, prompts)
    engine.take_weights(policy, f"--load {run.config.checkpoint.load}")
    drawn = {"policy": [samples[0] for samples in sample_answers(run, engine, prompts, mine, one)]}
    # These are samples of the policy itself, at temperature 1, for any temperature of the answers.
    plain = dataclasses.replace(one, temperature=1.0, top_p=1.0, top_k=0)
    of_policy = [samples[0] for samples in sample_answers(run, engine, prompts, mine, plain)]
    with baseline.loaded() as chunks:
        engine.take_weights(chunks, f"the baseline {baseline.path}")
        drawn["baseline"] = [samples[0] for samples in sample_answers(run, engine, prompts, mine, one)]
    rows = [_row(run, prompts[i], {name: drawn[name][k] for name in drawn}) for k, i in enumerate(mine)]
    answered = [prompts[i] for i in mine]
    for row, difference in zip(rows, _log_ratios(run, policy, prior, answered, of_policy), strict=True):
        row["kl_to_prior"] = difference
    if rewards.parts:
        _add_rewards(run, rewards, list(zip(mine, rows, strict=True)), answered, drawn)
    everything = gather_rows(list(zip(mine, rows, strict=True)), run.parallel)
    if run.parallel.is_writer:
        if judge is not None:
            _add_judge_scores(judge, everything)
        _write_report(run, everything)


def _row(run: Run, prompt: Prompt, drawn: dict[str, Completion]) -> dict:
    row = {"id": prompt.record_id, "prompt": prompt.text, "reference": prompt.reference}
    for name, sample in drawn.items():
        row[name] = run.tokenizer.decode_response(sample.tokens)
        row[f"length/{name}"] = len(sample.tokens)
        row[f"unfinished/{name}"] = float(not sample.finished)
    return row


def _log_ratios(
    run: Run, policy: Sequence[Chunk], prior: FrozenModel, prompts: Sequence[Prompt], samples: Sequence[Completion]
) -> list[float]:
    """log q(y|x) - log p(y|x) of one sample y ~ q per prompt, whose mean estimates KL(policy || prior) in nats."""
    groups = [
        [Group(prompt=prompt.tokens, responses=(sample.tokens,), record_id=prompt.record_id)]
        for prompt, sample in zip(prompts, samples, strict=True)
    ]
    under_policy = score_groups(policy, groups, run.parallel, head="policy", shared_prefix=True)
    with prior.loaded() as chunks:
        under_prior = score_groups(chunks, groups, run.parallel, head="policy", shared_prefix=True)
    return [(q[0] - p[0]).item() for q, p in zip(under_policy, under_prior, strict=True)]


def _add_rewards(
    run: Run,
    rewards: Rewards,
    rows: Sequence[tuple[int, dict]],
    prompts: Sequence[Prompt],
    drawn: dict[str, list[Completion]],
) -> None:
    """Add the rewards of the answers to the rows, which come with the places of their prompts. Equal responses are
    scored once: at another place of a packed sequence a model's reward would differ by rounding."""
    rollouts, places = [], []
    for k, (prompt, (index, row)) in enumerate(zip(prompts, rows, strict=True)):
        answers = {name: drawn[name][k].tokens for name in drawn}
        if prompt.reference is not None:
            ids = encode_answer(
                run.tokenizer,
                prompt.reference,
                chat=prompt.chat,
                before=Before(prompt.text, prompt.tokens[-1]),
                where=prompt.record_id,
            )
            answers["reference"] = tuple(ids)
        texts = {tokens: row[name] for name, tokens in answers.items()}
        responses = {tokens: Response(tokens=tokens, text=text) for tokens, text in texts.items()}
        places.append({name: responses[tokens] for name, tokens in answers.items()})
        rollouts.append(
            Rollout(
                id=prompt.record_id,
                index=index,
                prompt_tokens=prompt.tokens,
                prompt=prompt.text,
                record=prompt.record,
                responses=list(responses.values()),
            )
        )
    micro_batches = [[Part(rollout, tuple(range(len(rollout.responses))))] for rollout in rollouts]
    steps = [micro_batches[start : start + _AT_ONCE] for start in range(0, len(micro_batches), _AT_ONCE)]
    rewards.score(steps, Scale())
    for (_, row), of_answer in zip(rows, places, strict=True):
        for name, response in of_answer.items():
            row[f"reward/{name}"] = response.reward
        if len(rewards.parts) > 1:
            row |= {
                f"reward/{part.name}/{name}": response.reward_parts[part.name]
                for part in rewards.parts
                for name, response in of_answer.items()
            }


def _add_judge_scores(judge: ScoringFunction, rows: list[dict]) -> None:
    columns = {name: [row[name] for row in rows] for name in ("prompt", "reference", "id")}
    for name in _ANSWERS:
        scores = judge(columns["prompt"], [row[name] for row in rows], columns["reference"], columns["id"])
        for row, score in zip(rows, scores, strict=True):
            row[f"judge/{name}"] = score


def _write_report(run: Run, rows: list[dict]) -> None:
    settings = run.config.evaluate
    _require_finite(rows)
    metrics = {
        name: dataclasses.asdict(estimate)
        for name, estimate in summarize(
            rows, bootstrap_samples=settings.bootstrap_samples, seed=run.config.training.seed
        ).items()
    }
    report = {
        "num_prompts": len(rows),
        "metrics": metrics,
        "examples": [
            {"prompt": r["prompt"], "reference": r["reference"], "baseline": r["baseline"], "response": r["policy"]}
            for r in rows[: settings.num_examples]
        ],
        "rows": rows,
    }
    write_whole(Path(run.config.generate.output), json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False))
    for name, estimate in metrics.items():
        log.info("%-40s %8.4f  [%.4f, %.4f]", name, *estimate.values())


def _require_finite(rows: Sequence[dict]) -> None:
    """Raise FloatingPointError if a model has computed NaN or infinity. A mean with it would mean nothing."""
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} of {row['id']} is {value}: the model gives no number for it. Are its weights finite "
                    "(python tools/inspect_checkpoint.py CHECKPOINT --finite)? No report is written"
                )


def summarize(rows: Sequence[dict], *, bootstrap_samples: int, seed: int) -> dict[str, Estimate]:
    """Means and win-rates with 95% intervals over prompts.

    Args:
        rows: one row per prompt, with numbers `kind/answer` and `kl_to_prior`, and the texts of the answers.

    Returns:
        the mean of every number. For the kinds reward and judge, if all prompts have both scores, also
        `win_rate/<kind>/policy_vs_baseline`, `.../policy_vs_reference`, `.../baseline_vs_reference`. Equal texts tie.
    """
    columns = {
        name: [row[name] for row in rows]
        for name in rows[0]
        if isinstance(rows[0][name], (int, float)) and all(name in row for row in rows)
    }
    for kind in ("reward", "judge"):
        for one, other in (("policy", "baseline"), ("policy", "reference"), ("baseline", "reference")):
            scores = [columns.get(f"{kind}/{answer}") for answer in (one, other)]
            if all(score is not None for score in scores):
                same = [row.get(one) is not None and row.get(one) == row.get(other) for row in rows]
                columns[f"win_rate/{kind}/{one}_vs_{other}"] = wins(*scores, ties=same)
    return {name: bootstrap(values, samples=bootstrap_samples, seed=seed) for name, values in columns.items()}
