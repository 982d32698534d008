"""The descriptor of the evaluate stage."""

from megatron_brain.config.checks import require_set
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import PROMPTS, ScoringModel, StageSpec, Work, prior_and_reward
from megatron_brain.errors import ConfigError
from megatron_brain.stages.generate.spec import output, read_prompts


def _require(config: RunConfig) -> None:
    require_set(config, "checkpoint.load", "generate.prompts", "generate.output", "scoring.prior_load")
    if config.scoring.reward_load is None and config.scoring.judge is None:
        raise ConfigError("reward_load and judge are not set: the evaluate stage needs --reward-load, --judge or both")


def _work(config: RunConfig) -> Work:
    baseline = config.evaluate.baseline_load
    models = prior_and_reward(config)
    if baseline not in (None, config.scoring.prior_load):
        models = (*models, ScoringModel(name="baseline", head="policy", load=baseline))
    return Work(
        unit="prompts",
        responses_per_prompt=config.sampling.samples_per_prompt,
        draws=True,
        scoring=models,
        user_code=("--judge", config.scoring.judge),
    )


EVALUATE = StageSpec(
    name="evaluate",
    help="compare checkpoints on held-out prompts",
    code="megatron_brain.stages.evaluate.stage:main",
    sections=("sampling", "engine", "scoring", "generate", "evaluate"),
    require=_require,
    sources=lambda config: (PROMPTS,),
    reader=read_prompts,
    work=_work,
    outputs=output,
)
