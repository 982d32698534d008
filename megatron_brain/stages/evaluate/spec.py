"""The descriptor of the evaluate stage."""

from megatron_brain.config.checks import require_reward, require_set
from megatron_brain.config.posterior import PosteriorConfig
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import (
    PROMPTS,
    Output,
    ScoringModel,
    StageSpec,
    Work,
    judge_code,
    posterior_output,
    prior_and_rewards,
    reward_code,
)
from megatron_brain.errors import ConfigError
from megatron_brain.stages.generate.spec import output, read_prompts


def _require(config: RunConfig) -> None:
    require_set(config, "checkpoint.load", "generate.prompts", "generate.output", "scoring.prior_load")
    posterior = config.posterior
    if posterior.posterior_samples:
        require_reward(config)
    elif config.scoring.judge is None and config.judging.judge_url is None:
        require_reward(config, "--judge", "--judge-url")
    if not posterior.posterior_samples and posterior.reward_temperature != PosteriorConfig.reward_temperature:
        raise ConfigError(
            f"reward_temperature={posterior.reward_temperature} is read with --posterior-samples alone: give that, or "
            "leave it out"
        )


def _work(config: RunConfig) -> Work:
    baseline = config.evaluate.baseline_load
    models = prior_and_rewards(config)
    if baseline not in (None, config.scoring.prior_load):
        models = (*models, ScoringModel(name="baseline", flag="--baseline-load", head="policy", load=baseline))
    return Work(
        unit="prompts",
        responses_per_prompt=config.sampling.samples_per_prompt,
        draws=True,
        scoring=models,
        user_code=(*reward_code(config), *judge_code(config)),
    )


def verdict_file(config: RunConfig) -> str:
    """The place of the verdicts of a language model."""
    return config.judging.judge_cache or f"{config.generate.output}.verdicts.jsonl"


def _outputs(config: RunConfig) -> tuple[Output, ...]:
    verdicts = None if config.judging.judge_url is None else verdict_file(config)
    return *output(config), posterior_output(config), Output(flag="--judge-cache", place=verdicts)


EVALUATE = StageSpec(
    name="evaluate",
    help="compare checkpoints on held-out prompts",
    code="megatron_brain.stages.evaluate.stage:main",
    sections=("sampling", "engine", "scoring", "posterior", "generate", "evaluate", "judging"),
    require=_require,
    sources=lambda config: (PROMPTS,),
    reader=read_prompts,
    work=_work,
    outputs=_outputs,
)
