"""The descriptor of the brain stage."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from megatron_brain.config.checks import nearest_multiples, require_reward, require_set
from megatron_brain.config.objective_checks import require_objective, require_rejection_sampling
from megatron_brain.config.run import RunConfig
from megatron_brain.config.run_length import length_by_rounds
from megatron_brain.config.stage_spec import (
    TRAIN_DATA,
    TRAINING_SECTIONS,
    VALID_DATA,
    Output,
    RecordSource,
    StageSpec,
    Work,
    judge_code,
    posterior_output,
    prior_and_rewards,
    reward_code,
)
from megatron_brain.errors import ConfigError
from megatron_brain.stages.generate.spec import read_prompts

if TYPE_CHECKING:
    from megatron_brain.data.records import RecordReader
    from megatron_brain.data.tokenizer import Tokenizer

ROLLOUTS = RecordSource(section="brain", name="rollout_data", holds="rollouts")

HELD_OUT = dataclasses.replace(VALID_DATA, reader=read_prompts)
"""The held-out prompts, which are prompts whatever the run trains on."""


def _require(config: RunConfig) -> None:
    require_set(config, "checkpoint.load")
    for name in ("hidden_dropout", "attention_dropout"):
        if getattr(config.model, name):
            raise ConfigError(
                f"{name}={getattr(config.model, name)}: dropout makes another policy of every pass, so that its ratio "
                "to the proposal means nothing; leave it at 0"
            )
    require_objective(config)
    _require_engine(config)
    _require_held_out(config)
    if config.brain.rollout_data:
        _require_rollout_data(config)
        return
    if config.data.train_data is None:
        raise ConfigError(
            "train_data is not set: the brain stage needs --train-data (prompts to sample) or --rollout-data"
        )
    if config.scoring.prior_load is None and not config.checkpoint.finetune:
        raise ConfigError(
            "prior_load is not set: give --prior-load, or --finetune if --load is the prior the run starts from"
        )
    (_require_given_pairs if config.brain.responses == "given" else _require_samples)(config)
    if config.brain.responses == "rso":
        require_rejection_sampling(config)
    prompts, batch = config.brain.prompts_per_round, config.training.global_batch_size
    if prompts % batch:
        raise ConfigError(
            f"prompts_per_round={prompts} is not a multiple of global_batch_size={batch} (groups a step): "
            f"use {nearest_multiples(prompts, batch)}"
        )


def _require_rollout_data(config: RunConfig) -> None:
    """Rollout files hold prompts and responses, so no other source may be set."""
    if config.data.train_data:
        raise ConfigError("train_data and rollout_data are both set: rollouts hold their own prompts; give one")
    if config.brain.responses == "given":
        raise ConfigError("responses=given takes pairs from --train-data, and rollout_data is set: give one of them")
    if config.brain.responses == "rso":
        raise ConfigError("responses=rso draws responses to --train-data, and rollout_data is set: give one of them")


def _require_samples(config: RunConfig) -> None:
    require_reward(config)
    samples = config.sampling.samples_per_prompt
    if samples < 2:
        raise ConfigError(f"samples_per_prompt={samples}: the loss of a group of one is always 0; use 2 or more")
    if config.sampling.temperature == 0:
        raise ConfigError("temperature=0.0: greedy samples of a prompt are all the same; use a temperature above 0")


def _require_given_pairs(config: RunConfig) -> None:
    """Pairs stand for two samples of the prior, of which it is only known which one is better."""
    if config.brain.objective == "brain" and config.brain.alpha != "hard":
        raise ConfigError("responses=given: pairs say which response is better, not by how much; add --alpha hard")
    if config.brain.refresh_proposal:
        raise ConfigError("responses=given: the pairs are no samples of the policy; add --no-refresh-proposal")
    for part in config.scoring.rewards if config.data.valid_data is None else ():
        raise ConfigError(
            f"responses=given: pairs need no reward; drop {part.flag} {part.source}, or give --valid-data, "
            "whose answers it scores"
        )


def _require_engine(config: RunConfig) -> None:
    """What only some engines can do, and only for some proposals."""
    brain, engine = config.brain, config.engine.engine
    draws = brain.responses != "given" and brain.rollout_data is None
    if engine != "native" and not draws and config.data.valid_data is None:
        raise ConfigError(
            f"engine={engine}: nothing is drawn with --responses given or --rollout-data but answers to --valid-data; "
            "drop it, or give that"
        )
    if brain.rounds_ahead and engine == "native":
        raise ConfigError(
            "rounds_ahead=1: the native engine draws on the devices that train, so it cannot draw at the same time; "
            "add --engine vllm with --engine-url"
        )
    if brain.rounds_ahead and (brain.responses != "sampled" or not brain.refresh_proposal):
        raise ConfigError(
            "rounds_ahead=1: only samples of the policy are drawn ahead; drop it, or --responses and "
            "--no-refresh-proposal"
        )
    if brain.proposal_logprobs == "engine" and (not draws or brain.responses != "sampled"):
        raise ConfigError("proposal_logprobs=engine: log q' is known of responses that are drawn and all kept; drop it")


def _require_held_out(config: RunConfig) -> None:
    """What looks at answers to held-out prompts needs the prompts; they need a prior."""
    if config.data.valid_data is None:
        for name, value in (
            ("judge", config.scoring.judge),
            ("stop_at_kl", config.brain.stop_at_kl),
            ("posterior_samples", config.posterior.posterior_samples or None),
        ):
            if value is not None:
                raise ConfigError(f"{name}={value} needs --valid-data, the held-out prompts whose answers it looks at")
    elif config.scoring.prior_load is None and not config.checkpoint.finetune:
        raise ConfigError(
            "prior_load is not set: answers to --valid-data are compared with the prior's; give --prior-load, or "
            "--finetune if --load is the prior the run starts from"
        )
    if config.posterior.posterior_samples:
        require_reward(config)


def _sources(config: RunConfig) -> tuple[RecordSource, ...]:
    return (TRAIN_DATA if config.brain.rollout_data is None else ROLLOUTS, HELD_OUT)


def _reader(config: RunConfig, tokenizer: Tokenizer) -> RecordReader:
    from megatron_brain.data.records import PreferenceReader

    if config.brain.responses == "given":
        return PreferenceReader(tokenizer, config.data)
    return read_prompts(config, tokenizer)


def _work(config: RunConfig) -> Work:
    brain = config.brain
    given = brain.responses == "given"
    return Work(
        unit="groups",
        responses_per_prompt=2 if given else config.sampling.samples_per_prompt,
        candidates_per_prompt=brain.rso_candidates if brain.responses == "rso" else None,
        draws=not given and brain.rollout_data is None,
        answers_held_out=config.data.valid_data is not None,
        scoring=prior_and_rewards(config),
        user_code=(*reward_code(config), *judge_code(config)),
    )


BRAIN = StageSpec(
    name="brain",
    help="BRAIn: match the reward-conditioned posterior",
    code="megatron_brain.stages.brain.stage:BrainStage",
    sections=(*TRAINING_SECTIONS, "sampling", "engine", "scoring", "posterior", "brain"),
    rounds=True,
    require=_require,
    sources=_sources,
    reader=_reader,
    reads=("max_new_tokens",),
    length=length_by_rounds,
    work=_work,
    outputs=lambda config: (
        Output(flag="--rollout-dir", place=config.brain.rollout_dir, is_folder=True),
        posterior_output(config),
    ),
)
