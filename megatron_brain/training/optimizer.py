"""Gradient buffers, AdamW and the learning-rate schedule. All of them are megatron-core's."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_brain.config.run import RunConfig
from megatron_brain.models.provider import Chunk
from megatron_brain.planning.summary import Row
from megatron_brain.runtime.parallel import Parallel


def wrap_for_training(chunks: Sequence[Chunk], config: RunConfig, parallel: Parallel) -> list[DistributedDataParallel]:
    """Give every chunk float32 gradient buffers that are summed over data-parallel replicas."""
    settings = config.optimizer
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=settings.overlap_grad_reduce,
        overlap_param_gather=settings.overlap_param_gather,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        bucket_size=settings.ddp_bucket_size,
        fp8_param_gather=config.fp8.fp8_param_gather,
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
    if settings.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        model_config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    if settings.overlap_param_gather and wrapped[-1].module.post_process:
        _gather_before_head(wrapped[-1])
    return wrapped


def overlap(wrapped: Sequence[DistributedDataParallel]) -> list[Row]:
    """Row of the banner: which communication over replicas runs beside the computation. No row if none does."""
    settings = wrapped[0].ddp_config
    if not settings.overlap_grad_reduce:
        return []
    gathers = ", weights gathered during the forward pass" if settings.overlap_param_gather else ""
    buckets = sum(len(chunk.bucket_groups) for chunk in wrapped)
    text = f"gradients are reduced during the backward pass{gathers}: {buckets} bucket(s) on the first pipeline stage"
    return [("overlap", text)]


def _gather_before_head(chunk: DistributedDataParallel) -> None:
    """Make the forward pass wait for the head's weight too.

    megatron-core waits for a weight when its module is called. Our heads are not called as modules: they read their
    weight right after the final norm.
    """
    head = chunk.module.output_layer if chunk.module.output_layer is not None else chunk.module.reward_head
    if head.weight is None:
        return  # Tied on one pipeline stage: the embedding has waited already.
    bucket = chunk.param_to_bucket_group[head.weight]
    chunk.module.decoder.final_layernorm.register_forward_pre_hook(lambda *_: bucket.finish_param_sync())


def finish_param_gather(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Gather the weights that --overlap-param-gather leaves in shards after an update. All ranks must call it."""
    for chunk in wrapped:
        chunk.start_param_sync(force_sync=True)
    # In FP8 the backward pass reads a transposed copy, which megatron-core does not make after a forced gather.
    rounded = [parameter for chunk in wrapped for parameter in chunk.parameters() if is_float8tensor(parameter)]
    if rounded:
        post_all_gather_processing(rounded)


def _fuse_torch_adam(optimizer: MegatronOptimizer) -> None:
    """Make torch's AdamW update each parameter in one kernel. On a CPU this is a few times faster and needs no
    temporary tensors. megatron-core uses torch's AdamW where neither Transformer Engine nor Apex is installed."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            for group in part.optimizer.param_groups:
                group.update(fused=True, foreach=False)


def clip_and_step(optimizer: MegatronOptimizer, grad_norm: float, max_norm: float) -> None:
    """`optimizer.step()` for prepared gradients whose norm is known. `step` itself would compute the norm again."""
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
            fp8_recipe=config.fp8.fp8_recipe if config.fp8.fp8_param_gather else None,
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
