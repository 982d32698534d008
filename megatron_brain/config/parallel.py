"""How the model is laid out over processes."""

from dataclasses import dataclass

from megatron_brain.errors import ConfigError


@dataclass(kw_only=True)
class ParallelConfig:
    """Layout of the model over processes. The data-parallel size follows: world / (tensor x pipeline)."""

    tensor_model_parallel_size: int = 1
    """Processes over which the matrices of each layer are split."""

    pipeline_model_parallel_size: int = 1
    """Pipeline stages over which the layers are split."""

    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of one chunk in the interleaved pipeline schedule; unset: not interleaved."""

    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over the tensor-parallel processes."""

    distributed_timeout_minutes: int = 10
    """A collective that waits longer than this fails instead of hanging; each rank must also write its part of a
    checkpoint in this time."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "num_layers_per_virtual_pipeline_stage",
            "distributed_timeout_minutes",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "sequence_parallel=true needs tensor_model_parallel_size > 1; it is 1: drop sequence_parallel"
            )
        if self.num_layers_per_virtual_pipeline_stage and self.pipeline_model_parallel_size == 1:
            raise ConfigError("num_layers_per_virtual_pipeline_stage needs pipeline_model_parallel_size > 1; it is 1")
