"""Settings of single stages, and of sampling and scoring."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_brain.config.objectives import OBJECTIVE_TRAITS
from megatron_brain.config.rewards import RewardPart, reward_parts
from megatron_brain.errors import ConfigError


@dataclass(kw_only=True)
class SFTConfig:
    """Supervised fine-tuning."""

    packing: bool = True
    """Pack several records into one sequence of --seq-length; they never attend to each other."""

    multi_turn_loss: bool = False
    """Train on all assistant turns of a conversation, not only on the last one."""


@dataclass(kw_only=True)
class RewardConfig:
    """Training of a reward model with the Bradley-Terry loss."""

    centering_coefficient: float = 0.0
    """Weight of the mean squared sum of a pair's rewards, which keeps rewards near zero."""

    def __post_init__(self) -> None:
        if self.centering_coefficient < 0:
            raise ConfigError(f"centering_coefficient={self.centering_coefficient}: must not be negative")


@dataclass(kw_only=True)
class SamplingConfig:
    """How responses are drawn."""

    samples_per_prompt: int = 8
    """Responses for each prompt (n)."""

    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""

    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probability reaches this; 1 keeps all."""

    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""

    max_new_tokens: int = 64
    """Longest response, EOS included, in tokens."""

    sampling_batch_size: int = 64
    """Responses decoded at one time on one data-parallel replica."""

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "max_new_tokens", "sampling_batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature}: must not be negative (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must lie in (0, 1]")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: must not be negative (0 keeps all)")


@dataclass(kw_only=True)
class ScoringConfig:
    """What scores responses: frozen models on the layout of the policy, functions, and servers."""

    prior_load: str | None = None
    """Checkpoint of the prior p, the SFT model; default: the checkpoint that a --finetune run starts from."""

    reward_load: str | None = None
    """Checkpoint of the reward model r; several with commas: the mean of their standardised rewards."""

    reward_function: str | None = None
    """Rewards `path/to/file.py:function` of (prompts, responses, records), several with commas; see docs/rewards.md."""

    reward_url: str | None = None
    """Addresses of servers that answer POST requests with rewards, with commas between them; see docs/rewards.md."""

    reward_weights: str | None = None
    """Weights w1,w2,... of the reward models, functions and servers in the reward, in this order; unset: 1 each."""

    reward_timeout: float = 300.0
    """Longest wait for a --reward-function or --reward-url to score a replica's responses of a round, in seconds."""

    reward_batch_size: int = 32
    """Responses in one request to a --reward-url."""

    reward_concurrency: int = 8
    """Requests of one data-parallel replica that are under way to a --reward-url at one time."""

    offload_prior: bool = False
    """Keep the prior's weights in host memory and bring them to the device only while it scores."""

    offload_reward: bool = False
    """Keep the reward models' weights in host memory and bring each to the device only while it scores."""

    judge: str | None = None
    """Judge `path/to/file.py:function` of (prompts, responses, references) -> scores; nothing trains on it."""

    def __post_init__(self) -> None:
        if self.reward_weights is not None and not (self.reward_load or self.reward_function or self.reward_url):
            raise ConfigError(
                f"reward_weights={self.reward_weights}: there is no reward to weigh; give --reward-load, "
                "--reward-function or --reward-url"
            )
        _ = self.rewards  # It checks their names and weights.
        for name in ("reward_timeout", "reward_batch_size", "reward_concurrency"):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigError(f"{name}={value}: must be positive")

    @property
    def rewards(self) -> tuple[RewardPart, ...]:
        """The parts of the reward; none where no reward is given."""
        return reward_parts(self.reward_load, self.reward_function, self.reward_url, self.reward_weights)

    @property
    def reads_records(self) -> bool:
        """Whether a part of the reward reads the other fields of the records."""
        return self.reward_function is not None or self.reward_url is not None


@dataclass(kw_only=True)
class BrainConfig:
    """BRAIn: the policy trains to match the reward-conditioned posterior of the prior. Or another objective."""

    objective: str = field(default="brain", metadata={"choices": OBJECTIVE_TRAITS})
    """Loss of a group; docs/stages.md has the formulas and the settings that each reads."""

    baseline: Literal["self-normalized", "unnormalized", "none"] = "self-normalized"
    """Weight on grad log q(y_i): alpha_i - beta_i, alpha_i - (1/n) q/q', or alpha_i."""

    alpha: Literal["soft", "hard"] = "soft"
    """Posterior weights alpha: softmax (soft), or one-hot at the largest reward (hard)."""

    policy_strength: float = 1.0
    """Strength b in beta proportional to (q/q')^b; 1 is BRAIn, DPO calls it beta, IPO tau, RSO gamma."""

    kl_coefficient: float = 0.05
    """Weight of the divergence from the prior: in the reward (rloo) or in the loss (grpo)."""

    clip_ratio: float = 0.2
    """Ratios of policy and proposal are clipped to 1 - this and 1 + this (rloo, grpo)."""

    responses: Literal["sampled", "given", "rso"] = "sampled"
    """Draw responses to the prompts of --train-data, take its chosen and rejected ones, or draw and reject (RSO)."""

    rso_candidates: int = 64
    """Samples of the prior from which --responses rso accepts --samples-per-prompt."""

    rso_fewer_pairs: bool = False
    """Train on fewer pairs of a prompt that has too few distinct candidates, instead of stopping."""

    two_pass: bool = False
    """Compute beta of every group in a separate forward pass, not only of groups larger than a micro-batch."""

    prompts_per_round: int = 64
    """Prompts of one round (or pairs, with --responses given)."""

    refresh_interval: int | None = None
    """Optimizer steps K between refreshes of the proposal q' <- policy; unset: one pass over the round."""

    refresh_proposal: bool = True
    """Sample every round from the current policy; off: always from the prior (static proposal)."""

    rollout_dir: str | None = None
    """Write each round's samples, rewards, log-probs and weights to round_NNNN.jsonl here."""

    rollout_data: str | None = None
    """Train on rollout files of an earlier run (file or glob, one file for a round) instead of sampling."""

    proposal_logprobs: Literal["trainer", "engine"] = "trainer"
    """Whose log q' makes the weights: the trainer's, or that of the engine that drew; see docs/engines.md."""

    rounds_ahead: int = 0
    """Rounds (0 or 1) that the engine draws while the policy trains on the one before; 1 needs --engine vllm."""

    stop_at_kl: float | None = None
    """Save and end, with exit status 0, when the KL to the prior on --valid-data exceeds this, in nats."""

    max_refresh_error: float = 1e-4
    """Largest |beta - 1/n|, or |ratio - 1|, that is allowed right after a refresh; see docs/stages.md."""

    max_sampler_difference: float = 0.1
    """Largest mean difference that is allowed between the trainer's and the sampler's log q', in nats per token."""

    def __post_init__(self) -> None:
        limits = ("clip_ratio", "max_refresh_error", "max_sampler_difference")
        for name in ("policy_strength", *limits):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigError(f"{name}={value}: must be positive")
        if self.stop_at_kl is not None and self.stop_at_kl <= 0:
            raise ConfigError(f"stop_at_kl={self.stop_at_kl}: must be positive")
        if self.kl_coefficient < 0:
            raise ConfigError(f"kl_coefficient={self.kl_coefficient}: must not be negative")
        if self.rso_candidates < 2:
            raise ConfigError(f"rso_candidates={self.rso_candidates}: must be at least 2")
        if self.prompts_per_round < 1:
            raise ConfigError(f"prompts_per_round={self.prompts_per_round}: must be at least 1")
        if self.rounds_ahead not in (0, 1):
            raise ConfigError(f"rounds_ahead={self.rounds_ahead}: must be 0 or 1")
        if self.refresh_interval is not None and self.refresh_interval < 1:
            raise ConfigError(f"refresh_interval={self.refresh_interval}: must be at least 1")
        if self.rollout_dir and self.rollout_data:
            raise ConfigError("rollout_dir writes and rollout_data reads rollouts: give one of them")


@dataclass(kw_only=True)
class GenerateConfig:
    """Generation of responses to the prompts of a file."""

    prompts: str | None = None
    """Records with prompts, of the same kinds as --train-data."""

    output: str | None = None
    """File to write: one JSON line per prompt (generate) or a JSON report (evaluate)."""

    max_prompts: int | None = None
    """Largest number of prompts; the first ones are used. Unset: all."""

    def __post_init__(self) -> None:
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ConfigError(f"max_prompts={self.max_prompts}: must be at least 1")


@dataclass(kw_only=True)
class EvaluateConfig:
    """Comparison of --load with the references and with a baseline checkpoint."""

    baseline_load: str | None = None
    """Checkpoint whose answers --load is compared with; default: --prior-load."""

    bootstrap_samples: int = 2000
    """Number of resamplings of the prompts for each 95% interval."""

    num_examples: int = 3
    """Number of prompts that the report shows with all answers."""

    def __post_init__(self) -> None:
        if self.bootstrap_samples < 1:
            raise ConfigError(f"bootstrap_samples={self.bootstrap_samples}: must be at least 1")
        if self.num_examples < 0:
            raise ConfigError(f"num_examples={self.num_examples}: must not be negative")
