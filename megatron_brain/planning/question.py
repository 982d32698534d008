"""What the planner is asked: a model, a stage, its sizes, and the machines."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_brain.config.fields import stage_fields
from megatron_brain.config.loader import config_from_dict
from megatron_brain.config.model import ResolvedModel
from megatron_brain.config.stage_spec import stage_spec, stages
from megatron_brain.errors import ConfigError
from megatron_brain.planning.machine import GIB, Machine
from megatron_brain.planning.servers import tensor_sizes
from megatron_brain.planning.workload import Precision

OF_SOME_STAGES = (
    "samples_per_prompt",
    "prompts_per_round",
    "refresh_interval",
    "sampling_batch_size",
    "offload_prior",
    "offload_reward",
    "two_pass",
    "rounds_ahead",
)
"""Fields of `Question` for those stages only that have a setting of the same name."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be run, and on what."""

    stage: str
    """Name of a stage that trains."""
    model: ResolvedModel
    """The model that trains, its sizes resolved."""
    machine: Machine
    gpus: int
    prompt_length: int
    response_length: int
    samples_per_prompt: int = 8
    """brain: responses of a group, n."""
    seq_length: int | None = None
    """sft: length of the sequences that records are packed into; None: that of one record, rounded up for FP8."""
    global_batch_size: int = 128
    prompts_per_round: int | None = None
    """brain: prompts of a round; None: those of one step."""
    refresh_interval: int | None = None
    """brain: steps of a round; None: one pass over the round."""
    sampling_batch_size: int | None = None
    """brain: responses decoded at one time; None: as many of a round as fit."""
    precision: Precision = "bf16"
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    """auto: the least recomputation that fits."""
    shared_prefix: bool = True
    distributed_optimizer: bool = True
    offload_prior: bool = False
    offload_reward: bool = False
    two_pass: bool = False
    reward_model: ResolvedModel | None = None
    """brain: sizes of the reward model; None: the policy's."""
    reserved_bytes: int = 6 * GIB
    """Memory of a GPU that is left to the CUDA context, NCCL and fragmentation."""
    engine_gpus: int | Literal["auto"] | None = None
    """brain: GPUs of vLLM servers beside `gpus`; auto: the fewest that draw a round no slower than it is scored and
    trained on; None: the GPUs that train draw."""
    engine_tensor_parallel: int | None = None
    """brain: tensor-parallel size of a server; None: the best."""
    rounds_ahead: int = 0
    """brain: rounds that the servers draw while the policy trains on the one before."""

    def __post_init__(self) -> None:
        if self.reserved_bytes < 0:
            raise ConfigError(f"reserved_bytes={self.reserved_bytes} is negative: a GPU has no more memory than it has")
        for name in OF_SOME_STAGES:
            self._require_setting(name, setting=name)
        self._require_setting("reward_model", setting="reward_load")
        self._require_setting("engine_gpus", setting="engine_url")
        self._check_engine()
        if self.reward_model is not None and self.reward_model.vocab_size != self.model.vocab_size:
            raise ConfigError(
                f"the reward model has vocab_size={self.reward_model.vocab_size}, the policy has "
                f"{self.model.vocab_size}: all models of a run share one tokenizer"
            )
        can_pack = packs(self.stage)
        if self.seq_length is not None and not can_pack:
            raise ConfigError(
                f"seq_length={self.seq_length} packs records of --stage {_named(packs)}, not {self.stage}: leave it out"
            )
        record = self.prompt_length + self.response_length
        if self.seq_length is not None and self.seq_length < record:
            raise ConfigError(
                f"seq_length={self.seq_length} holds no record of prompt_length={self.prompt_length} + response_length="
                f"{self.response_length}: use {record} or more"
            )
        if self.prompt_length == 0 and (not can_pack or self.seq_length not in (None, self.response_length)):
            raise ConfigError(
                "prompt_length=0 stands for sequences of which every token is predicted: use it with --stage "
                f"{_named(packs)} and "
                "give their length as --response-length"
            )

    def _check_engine(self) -> None:
        if self.engine_gpus is None:
            for name in ("engine_tensor_parallel", "rounds_ahead"):
                if getattr(self, name):
                    raise ConfigError(f"{name}={getattr(self, name)} is for servers: give engine_gpus, or leave it out")
            return
        sizes, tensor = tensor_sizes(self.model, self.machine), self.engine_tensor_parallel
        if tensor is not None and tensor not in sizes:
            raise ConfigError(
                f"engine_tensor_parallel={tensor}: the model's heads and nodes of {self.machine.gpus_per_node} GPUs "
                f"allow {', '.join(map(str, sizes))}"
            )
        if self.engine_gpus != "auto" and self.engine_gpus % (tensor or 1):
            raise ConfigError(f"engine_gpus={self.engine_gpus} is not a multiple of engine_tensor_parallel={tensor}")
        if self.sampling_batch_size is not None:
            raise ConfigError(
                f"sampling_batch_size={self.sampling_batch_size} is for GPUs that train and draw, and engine_gpus="
                f"{self.engine_gpus} draws with others: leave one of them out"
            )

    def _require_setting(self, name: str, *, setting: str) -> None:
        """Raise ConfigError where the question sets a field that the stage has no setting for."""
        if getattr(self, name) != getattr(type(self), name) and setting not in stage_fields(self.stage):
            readers = _named(lambda stage: setting in stage_fields(stage))
            raise ConfigError(f"{name}={getattr(self, name)} is for --stage {readers}, not {self.stage}: leave it out")


def training_stages() -> list[str]:
    """Names of the stages that can be planned."""
    return [name for name, spec in stages().items() if spec.trains]


def packs(stage: str) -> bool:
    """Whether a stage packs records by default."""
    return stage_spec(stage).work(config_from_dict(stage, {})).packed


def _named(has: Callable[[str], bool]) -> str:
    """The names of the stages that can be planned and satisfy `has`, in words."""
    return " or ".join(filter(has, training_stages()))
