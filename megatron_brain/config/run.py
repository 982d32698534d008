"""The configuration of one run: the sections of settings that its stage reads."""

from dataclasses import dataclass, field
from typing import Any

from megatron_brain.config.data import DataConfig, TokenizerConfig
from megatron_brain.config.engine import EngineConfig
from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.guards import GuardConfig
from megatron_brain.config.judging import JudgingConfig
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.optimizer import OptimizerConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.config.posterior import PosteriorConfig
from megatron_brain.config.stages import (
    BrainConfig,
    EvaluateConfig,
    GenerateConfig,
    RewardConfig,
    SamplingConfig,
    ScoringConfig,
    SFTConfig,
)
from megatron_brain.config.training import CheckpointConfig, LoggingConfig, TrainingConfig


@dataclass(kw_only=True)
class RunConfig:
    """All settings of a run. Sections that its stage does not read keep their defaults."""

    stage: str
    model: ModelConfig = field(default_factory=ModelConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    posterior: PosteriorConfig = field(default_factory=PosteriorConfig)
    brain: BrainConfig = field(default_factory=BrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    judging: JudgingConfig = field(default_factory=JudgingConfig)
    more: dict[str, Any] = field(default_factory=dict)
    """Sections of a stage that is defined elsewhere, by name."""

    def section(self, name: str) -> Any:
        """The settings of a section."""
        return self.more[name] if name in self.more else getattr(self, name)
