"""Compares a policy with a baseline checkpoint and with reference responses on held-out prompts."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_brain.checkpointing import load_weights
from megatron_brain.config.stages import SamplingConfig
from megatron_brain.data.records import Prompt
from megatron_brain.files import write_whole
from megatron_brain.generation.batch import Completion
from megatron_brain.generation.engine import THE_PRIOR
from megatron_brain.stages.answers import gather_rows, my_share, read_prompts, sample_answers
from megatron_brain.stages.comparison import (
    add_judge_scores,
    add_rewards,
    describe,
    log_ratios,
    open_judge,
    reference_tokens,
    require_finite,
    wins_over,
)
from megatron_brain.stages.engine import open_engine
from megatron_brain.stages.evaluate.llm_judge import (
    add_verdicts,
    describe_llm_judge,
    llm_metrics,
    llm_report,
    open_llm_judge,
)
from megatron_brain.stages.intervals import Estimate, bootstrap, bootstrap_statistic, ratio
from megatron_brain.stages.judging.judge import LanguageModelJudge
from megatron_brain.stages.posterior import add_distances, add_kl_from_policy
from megatron_brain.stages.prior_samples import PriorSamples
from megatron_brain.stages.rewards.rewards import Rewards
from megatron_brain.stages.rewards.scale import Scale
from megatron_brain.training.banner import show_banner
from megatron_brain.training.frozen import FrozenModel
from megatron_brain.training.run import Run
from megatron_brain.training.same_data import read_on_all
from megatron_brain.user_functions import ScoringFunction

log = logging.getLogger(__name__)

_ANSWERS = ("policy", "baseline", "reference")


def main(run: Run) -> None:
    """Sample both checkpoints, score all answers, and write the report as JSON."""
    settings, scoring = run.config.evaluate, run.config.scoring
    prompts = read_prompts(run)
    judge = open_judge(scoring.judge, prompts)
    llm_judge = open_llm_judge(run)
    mine = my_share(prompts, run.parallel)
    policy = run.build_model("policy")
    load_weights(run.start_from, policy, head="policy", verify=run.config.checkpoint.verify)
    prior = FrozenModel(run, "prior", scoring.prior_load, head="policy", offload=scoring.offload_prior)
    rewards, scale = Rewards(run), Scale()
    # A baseline that is the prior is not loaded twice.
    other = settings.baseline_load not in (None, scoring.prior_load)
    baseline = FrozenModel(run, "baseline", settings.baseline_load, head="policy") if other else prior
    models = {"baseline": baseline.path, "prior": prior.path, "judge": scoring.judge, **describe_llm_judge(run)}
    engine = open_engine(run, prompts)
    asked = run.config.posterior.posterior_samples
    posterior = PriorSamples(run, prompts, engine, prior, rewards, scale) if asked else None
    if posterior is not None:
        posterior.open()
    places = [(name, place) for name, place in models.items() if place is not None]
    show_banner(run, [*places, *rewards.rows(), *([] if posterior is None else posterior.rows())])

    def draw(sampling: SamplingConfig) -> list[Completion]:
        return [sample for [sample] in sample_answers(run, engine, prompts, mine, sampling)]

    answer = dataclasses.replace(run.config.sampling, samples_per_prompt=1)
    engine.take_weights(policy, f"--load {run.config.checkpoint.load}")
    # These are samples of the policy itself, at temperature 1, for any temperature of the answers.
    of_policy = draw(dataclasses.replace(answer, temperature=1.0, top_p=1.0, top_k=0))
    drawn = {"policy": draw(answer)}
    with baseline.loaded() as chunks:
        engine.take_weights(chunks, f"the baseline {baseline.path}" if other else THE_PRIOR)
        drawn["baseline"] = draw(answer)
    if posterior is not None:
        drawn["plain"] = of_policy
        # Their rewards come first: several reward models are then standardised by them, for any policy.
        posterior.rollouts()
    rows = [describe(run, prompts[i], {name: drawn[name][k] for name in drawn}) for k, i in enumerate(mine)]
    answered = {i: prompts[i] for i in mine}
    for row, difference in zip(rows, log_ratios(run, policy, prior, [*answered.values()], of_policy), strict=True):
        row["kl_to_prior"] = difference
    if rewards.parts:
        _add_rewards(run, rewards, scale, rows, answered, drawn)
    if posterior is not None:
        by_place = dict(zip(mine, rows, strict=True))
        add_distances(run, posterior, policy, by_place)
        add_kl_from_policy(run, posterior, by_place)
    everything = gather_rows(list(zip(mine, rows, strict=True)), run.parallel)
    _report(run, judge, llm_judge, everything)


def _report(run: Run, judge: ScoringFunction | None, llm_judge: LanguageModelJudge | None, rows: list[dict]) -> None:
    """Add what both judges say to the rows of the writing rank, and write the report. All ranks call it."""

    def without_verdicts() -> dict[str, Estimate]:
        if not run.parallel.is_writer:
            return {}
        if judge is not None:
            add_judge_scores(judge, rows, _ANSWERS)
        metrics = _write_report(run, rows)
        _log_metrics(metrics)
        return metrics

    if run.config.judging.judge_url is None:
        without_verdicts()
        return
    # A language model that fails, perhaps after an hour, does not take the rest of the report with it.
    written = read_on_all(without_verdicts, run.parallel)
    add_verdicts(run, llm_judge, rows)
    if run.parallel.is_writer:
        metrics = _write_report(run, rows)
        _log_metrics({name: metrics[name] for name in metrics if name not in written})


def _add_rewards(
    run: Run,
    rewards: Rewards,
    scale: Scale,
    rows: Sequence[dict],
    answered: Mapping[int, Prompt],
    drawn: Mapping[str, Sequence[Completion]],
) -> None:
    """Add the rewards of all answers and of the references to the rows."""
    answers = [{name: samples[k].tokens for name, samples in drawn.items()} for k in range(len(rows))]
    for prompt, named in zip(answered.values(), answers, strict=True):
        if prompt.reference is not None:
            named["reference"] = reference_tokens(run, prompt)
    add_rewards(rewards, scale, rows, answered, answers)


def _write_report(run: Run, rows: list[dict]) -> dict[str, Estimate]:
    """Write the report of what is in the rows, and return its metrics."""
    settings = run.config.evaluate
    require_finite(rows)
    estimates = summarize(rows, bootstrap_samples=settings.bootstrap_samples, seed=run.config.training.seed)
    estimates |= llm_metrics(run, rows)
    output = Path(run.config.generate.output)
    write_report(output, rows, estimates, num_examples=settings.num_examples, more=llm_report(run, rows))
    return estimates


def write_report(
    path: Path,
    rows: Sequence[dict],
    metrics: Mapping[str, Estimate],
    *,
    num_examples: int,
    more: Mapping[str, object] | None = None,
) -> None:
    """Write the JSON report of an evaluation, whole or not at all.

    Args:
        rows: one row per prompt, with the texts of its answers `policy` and `baseline`, and `reference`.
        metrics: what `summarize` made of them.
        num_examples: how many prompts stand at the top with their answers.
        more: further keys and values of the report.
    """
    report = {
        "num_prompts": len(rows),
        "metrics": {name: dataclasses.asdict(estimate) for name, estimate in metrics.items()},
        **(more or {}),
        "examples": [
            {"prompt": r["prompt"], "reference": r["reference"], "baseline": r["baseline"], "response": r["policy"]}
            for r in rows[:num_examples]
        ],
        "rows": rows,
    }
    write_whole(path, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False))


def _log_metrics(metrics: Mapping[str, Estimate]) -> None:
    for name, estimate in metrics.items():
        log.info("%-40s %8.4f  [%.4f, %.4f]", name, estimate.value, estimate.low, estimate.high)


def summarize(rows: Sequence[dict], *, bootstrap_samples: int, seed: int) -> dict[str, Estimate]:
    """Means and win-rates with 95% intervals over prompts.

    Args:
        rows: one row per prompt, with numbers `kind/answer` and `kl_to_prior`, and the texts of the answers. The first
            ones, or all, may have distances to the posterior, `posterior/NAME`.

    Returns:
        the mean of every number, of distances over the rows that have them. For the kinds reward and judge, if all
        prompts have both scores, also `win_rate/<kind>/policy_vs_baseline`, `.../policy_vs_reference`,
        `.../baseline_vs_reference`. Equal texts tie. With distances `posterior/reward_gain_reached`: how much of the
        posterior's gain in expected reward over the prior the policy's own samples have. The posterior's gain is too
        low by O(1/N), so this share is too high: 1.9 times for N = 8 samples, 1.01 times for N = 64, where exp(r/tau)
        of one response in ten is 148 times that of the others.
    """
    columns = {
        name: [row[name] for row in rows]
        for name in rows[0]
        if isinstance(rows[0][name], (int, float)) and all(name in row for row in rows)
    }
    for kind in ("reward", "judge"):
        for one, other in (("policy", "baseline"), ("policy", "reference"), ("baseline", "reference")):
            won = wins_over(rows, kind, one, other)
            if won is not None:
                columns[f"win_rate/{kind}/{one}_vs_{other}"] = won
    measured = [row for row in rows if "posterior/reward" in row]
    for name in measured[0] if measured else ():
        if name.startswith("posterior/"):
            columns[name] = [row[name] for row in measured]
    found = {name: bootstrap(values, samples=bootstrap_samples, seed=seed) for name, values in columns.items()}
    if measured:
        gained = [row["reward/plain"] - row["posterior/prior_reward"] for row in measured]
        possible = [max(0.0, row["posterior/reward"] - row["posterior/prior_reward"]) for row in measured]
        reached = bootstrap_statistic([gained, possible], ratio, samples=bootstrap_samples, seed=seed)
        if reached is not None:
            found["posterior/reward_gain_reached"] = reached
    return found
