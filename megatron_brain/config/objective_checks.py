"""Checks that objective, responses and their settings fit together."""

from megatron_brain.config.fields import stage_fields
from megatron_brain.config.objectives import OBJECTIVE_TRAITS
from megatron_brain.config.run import RunConfig
from megatron_brain.errors import ConfigError

_RSO_SETTINGS = ("rso_candidates", "rso_fewer_pairs")


def require_objective(config: RunConfig) -> None:
    """Check the objective of a brain run.

    Raises:
        ConfigError: a setting that nothing reads, responses that the objective cannot use, or groups of a size that it
            cannot use.
    """
    traits = OBJECTIVE_TRAITS[config.brain.objective]
    _check_unread(config)
    _check_group_size(config, traits.group_multiple)
    if traits.needs_log_proposal and config.brain.responses == "rso":
        raise ConfigError(
            "responses=rso: nobody knows the probability of an accepted response, which --objective "
            f"{config.brain.objective} needs; use --responses sampled, or --objective {_without_log_proposal()}"
        )
    if "clip_ratio" in traits.settings:
        _check_ratios(config)


def _check_group_size(config: RunConfig, multiple: int) -> None:
    samples, brain = config.sampling.samples_per_prompt, config.brain
    if samples % multiple and brain.responses != "given" and brain.rollout_data is None:
        raise ConfigError(
            f"samples_per_prompt={samples}: --objective {brain.objective} takes multiples of {multiple} responses; use "
            f"{samples + multiple - samples % multiple}"
        )


def _check_ratios(config: RunConfig) -> None:
    """Check that responses have rewards and are drawn from the distribution that trains."""
    brain, sampling = config.brain, config.sampling
    if brain.responses == "given":
        raise ConfigError(
            f"responses=given: pairs have no rewards, which --objective {brain.objective} needs; use --responses "
            f"sampled, or --objective {_without_log_proposal()}"
        )
    for name, plain in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
        value = getattr(sampling, name)
        if value != plain and brain.rollout_data is None:
            raise ConfigError(
                f"{name}={value}: --objective {brain.objective} clips ratios of policy and proposal, which would be "
                f"far from 1 at once; use --{name.replace('_', '-')} {plain:g}, or --objective brain"
            )


def require_rejection_sampling(config: RunConfig) -> None:
    """Check the candidates of `--responses rso`.

    Raises:
        ConfigError: the candidates would come from the policy, or are fewer than the responses to choose.
    """
    candidates, samples = config.brain.rso_candidates, config.sampling.samples_per_prompt
    if config.brain.refresh_proposal:
        raise ConfigError("responses=rso: candidates are samples of the prior in all rounds; add --no-refresh-proposal")
    if candidates < samples:
        raise ConfigError(
            f"rso_candidates={candidates} are fewer than samples_per_prompt={samples}, which are chosen of them: use "
            f"--rso-candidates {samples} or more"
        )


def _check_unread(config: RunConfig) -> None:
    """Raise ConfigError for a changed setting that the run would not read."""
    brain = config.brain
    fields = stage_fields(config.stage)
    read = set(OBJECTIVE_TRAITS[brain.objective].settings)
    if brain.responses == "rso":
        read |= {"reward_temperature", *_RSO_SETTINGS}
    if config.posterior.posterior_samples:
        read.add("reward_temperature")
    if OBJECTIVE_TRAITS[brain.objective].needs_log_proposal:
        read |= {"max_refresh_error", "max_sampler_difference"}
    if not brain.refresh_proposal:
        # The trainer computes log q' then, because it is log p, which every objective needs.
        read.add("max_sampler_difference")
    settings = {name for traits in OBJECTIVE_TRAITS.values() for name in traits.settings}
    for name in sorted(settings | {"max_refresh_error", "max_sampler_difference", *_RSO_SETTINGS}):
        value = getattr(config.section(fields[name].section), name)
        if name in read or value == fields[name].default:
            continue
        if name in _RSO_SETTINGS:
            raise ConfigError(f"{name}={value} is read with --responses rso alone: leave it out, or choose that")
        readers = [objective for objective, traits in OBJECTIVE_TRAITS.items() if name in traits.settings]
        other = f", or use --objective {_one_of(readers)}" if readers else ""
        raise ConfigError(f"{name}={value} is not read by --objective {brain.objective}: leave it out{other}")


def _without_log_proposal() -> str:
    return _one_of([name for name, traits in OBJECTIVE_TRAITS.items() if not traits.needs_log_proposal])


def _one_of(names: list[str]) -> str:
    *head, last = names
    return f"{', '.join(head)} or {last}" if head else last
