"""Gradient buffers, AdamW and the learning-rate schedule, all megatron-core's."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_brain.config.errors import ConfigError
from megatron_brain.config.run import RunConfig
from megatron_brain.models.provider import Chunk
from megatron_brain.runtime.parallel import Parallel


def wrap_for_training(chunks: Sequence[Chunk], config: RunConfig, parallel: Parallel) -> list[DistributedDataParallel]:
    """Give every chunk float32 gradient buffers that are summed over data-parallel replicas."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=ddp_config,
            module=chunk,
            disable_bucketing=i > 0,
            pg_collection=parallel.groups,
        )
        for i, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    model_config = chunks[0].config
    model_config.finalize_model_grads_func = finalize_model_grads
    if config.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        model_config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


def check_optimizer_can_be_saved(config: RunConfig) -> None:
    """Refuse at the start what would fail at the first save.

    Raises:
        ConfigError: the distributed optimizer's state would be saved, which megatron-core 0.16 cannot do for torch's
            AdamW and which is not tried yet with a fused one.
    """
    saves = config.checkpoint.save is not None and config.checkpoint.save_optim
    if config.optimizer.use_distributed_optimizer and saves:
        raise ConfigError(
            "use_distributed_optimizer=true cannot save its state yet: add --no-save-optim to save weights alone, or "
            "leave out --use-distributed-optimizer"
        )


def _fuse_torch_adam(optimizer: MegatronOptimizer) -> None:
    """Let torch's AdamW, which megatron-core takes where it finds neither Transformer Engine nor Apex, update each
    parameter in one kernel: a few times faster on a CPU, and without temporaries."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            for group in part.optimizer.param_groups:
                group.update(fused=True, foreach=False)


def clip_and_step(optimizer: MegatronOptimizer, grad_norm: float, max_norm: float) -> None:
    """`optimizer.step()` on gradients that are prepared and whose norm is known, which it would compute again."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = part.get_parameters()
        if max_norm > 0.0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=max_norm, total_norm=grad_norm)
    optimizer.step_with_ready_grads()


def build_optimizer(
    wrapped: Sequence[DistributedDataParallel], config: RunConfig, train_iters: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW over the wrapped chunks' parameters, and its schedule in units of iterations."""
    settings = config.optimizer
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    optimizer = get_megatron_optimizer(
        config=MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=config.model.bf16,
            params_dtype=dtype,
            use_distributed_optimizer=settings.use_distributed_optimizer,
        ),
        model_chunks=list(wrapped),
    )
    _fuse_torch_adam(optimizer)
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    decay_iters = settings.lr_decay_iters or train_iters
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=decay_iters,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=max(train_iters, 1),
        wd_incr_style="constant",
        # A resumed run follows its own flags; only its position comes from the checkpoint.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler
