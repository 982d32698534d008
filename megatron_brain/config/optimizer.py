"""Optimizer, learning-rate schedule and the communication of gradients and weights."""

from dataclasses import dataclass
from typing import Literal

from megatron_brain.errors import ConfigError


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW, its learning-rate schedule and its communication over data-parallel processes."""

    lr: float = 1e-5
    """Peak learning rate."""

    min_lr: float = 0.0
    """Learning rate at the end of the decay."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = "cosine"
    """Shape of the decay after warm-up."""

    lr_decay_iters: int | None = None
    """Iterations of the decay; default: --train-iters."""

    lr_warmup_iters: int = 0
    """Iterations of linear warm-up from 0."""

    weight_decay: float = 0.0
    """Decoupled weight decay (not of norms and biases)."""

    adam_beta1: float = 0.9
    """Decay of the first moment."""

    adam_beta2: float = 0.95
    """Decay of the second moment."""

    adam_eps: float = 1e-8
    """Added to the root of the second moment."""

    clip_grad: float = 1.0
    """Global gradient norm to clip to; 0 turns clipping off."""

    use_distributed_optimizer: bool = False
    """Split optimizer state over data-parallel processes."""

    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel processes during the backward pass."""

    overlap_param_gather: bool = False
    """Gather updated weights during the next forward pass; needs --overlap-grad-reduce and
    --use-distributed-optimizer."""

    ddp_bucket_size: int | None = None
    """Parameters reduced or gathered together; unset: max(40 million, 1 million x replicas), as megatron-core."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"lr={self.lr}: must be positive")
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"min_lr={self.min_lr}: must lie in [0, lr={self.lr}]")
        for name in ("lr_warmup_iters", "weight_decay", "clip_grad"):
            value = getattr(self, name)
            if value < 0:
                raise ConfigError(f"{name}={value}: must not be negative")
        if self.adam_eps <= 0:
            raise ConfigError(f"adam_eps={self.adam_eps}: must be positive, what is divided by may be 0")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"{name}={value}: must lie in [0, 1)")
        if self.lr_decay_iters is not None and self.lr_decay_iters <= self.lr_warmup_iters:
            raise ConfigError(
                f"lr_decay_iters={self.lr_decay_iters} must exceed lr_warmup_iters={self.lr_warmup_iters}"
            )
        self._check_overlap()

    def _check_overlap(self) -> None:
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise ConfigError(
                "overlap_param_gather=true needs use_distributed_optimizer: without it every process updates all of "
                "its weights and there is nothing to gather"
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ConfigError("overlap_param_gather=true needs overlap_grad_reduce")
        if self.ddp_bucket_size is None:
            return
        if self.ddp_bucket_size < 1:
            raise ConfigError(f"ddp_bucket_size={self.ddp_bucket_size}: must be at least 1")
        if not self.overlap_grad_reduce:
            raise ConfigError(
                f"ddp_bucket_size={self.ddp_bucket_size} needs overlap_grad_reduce: without it everything is reduced "
                "at once"
            )
