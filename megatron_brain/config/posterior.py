"""Settings of the posterior: how sharp it is, and how the distance of the policy to it is measured."""

from dataclasses import dataclass

from megatron_brain.errors import ConfigError


@dataclass(kw_only=True)
class PosteriorConfig:
    """The posterior, proportional to p(y|x) exp(r(x,y)/tau), and the distance of the policy to it."""

    reward_temperature: float = 1.0
    """Temperature tau of the reward in the posterior."""

    posterior_samples: int = 0
    """Samples of the prior for each held-out prompt, by which the distance is measured; 0: it is not."""

    posterior_prompts: int | None = None
    """Held-out prompts on which the distance is measured: the first ones. Unset: all."""

    posterior_data: str | None = None
    """File of the scored samples of the prior: written where it does not exist, else read instead of drawing."""

    def __post_init__(self) -> None:
        if self.reward_temperature <= 0:
            raise ConfigError(f"reward_temperature={self.reward_temperature}: must be positive")
        if self.posterior_samples < 0 or self.posterior_samples == 1:
            raise ConfigError(
                f"posterior_samples={self.posterior_samples}: one sample tells nothing; use 2 or more (64 say), or 0"
            )
        if self.posterior_prompts is not None and self.posterior_prompts < 1:
            raise ConfigError(f"posterior_prompts={self.posterior_prompts}: must be at least 1")
        if self.posterior_data is not None and not self.posterior_data.endswith(".jsonl"):
            raise ConfigError(f"posterior_data={self.posterior_data}: give a name that ends in .jsonl")
        for name in ("posterior_prompts", "posterior_data"):
            value = getattr(self, name)
            if value is not None and not self.posterior_samples:
                raise ConfigError(f"{name}={value} is read with --posterior-samples alone: give that, or leave it out")
