"""Checks of FP8 against the other sections, the model's sizes and the device. They need no torch.

They refuse what megatron-core and Transformer Engine would ignore in silence or refuse in the middle of a step:
`require_fp8` when a configuration is loaded, `validate_fp8_sizes` when the model's sizes are known, and
`validate_fp8_device` when the device is known, before weights are made.
"""

from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.model import ResolvedModel
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import spec_of
from megatron_brain.errors import ConfigError

_CAPABILITY = {"mxfp8": (10, 0), "blockwise": (9, 0)}
"""Least compute capability of a recipe, as in Transformer Engine's `check_recipe_support`."""
_ANY_RECIPE = (8, 9)
_BLOCKWISE_CUDA = (12, 9)
_WITHOUT_MXFP8 = (12, 0)


def require_fp8(config: RunConfig) -> None:
    """Check FP8 against the precision, the layers' implementation, the optimizer and the sequence length.

    Raises:
        ConfigError: naming the settings that do not fit together and what would work.
    """
    fp8, impl = config.fp8, config.model.transformer_impl
    if fp8.fp8_format is None:
        return
    if fp8.fp8_emulate:
        if impl == "transformer_engine":
            raise ConfigError("fp8_emulate=true rounds in the local layers; use --transformer-impl local or auto")
        return
    if impl == "local":
        raise ConfigError(
            f"fp8_format={fp8.fp8_format}: the layers of transformer_impl=local have no FP8; use --transformer-impl "
            "transformer_engine, or --fp8-emulate to study the rounding"
        )
    if not config.model.bf16:
        raise ConfigError(f"fp8_format={fp8.fp8_format} needs bf16 for everything that is not in FP8: add --bf16")
    if fp8.fp8_param_gather:
        _require_sharded_weights(config)
    _require_aligned_sequences(config)


def _require_sharded_weights(config: RunConfig) -> None:
    if not spec_of(config).trains:
        raise ConfigError(f"fp8_param_gather=true: the {config.stage} stage updates no weights; drop fp8_param_gather")
    if not config.optimizer.use_distributed_optimizer:
        raise ConfigError(
            "fp8_param_gather=true: without use_distributed_optimizer there is nothing to gather; add "
            "--use-distributed-optimizer"
        )
    if not config.checkpoint.save_optim:
        raise ConfigError(
            "fp8_param_gather=true: checkpoints take whole weights from the optimizer; drop --no-save-optim"
        )


def _require_aligned_sequences(config: RunConfig) -> None:
    """Check that full sequences need no padding beyond --seq-length."""
    length, unit = config.data.seq_length, config.fp8.sequence_multiple
    needs = f"the {unit} rows that fp8_recipe={config.fp8.fp8_recipe} needs"
    if config.parallel.sequence_parallel:
        processes = config.parallel.tensor_model_parallel_size
        unit *= processes
        needs += f" x tensor_model_parallel_size={processes}, over which sequence_parallel splits it"
    if length % unit:
        raise ConfigError(
            f"seq_length={length} is not a multiple of {needs}: use a multiple of {unit}, such as "
            f"{-(-length // unit) * unit}"
        )


def validate_fp8_sizes(config: RunConfig, model: ResolvedModel) -> None:
    """Check the number of layers in bf16 against the model's layers, and its matrices against the sizes of FP8 GEMMs.

    Args:
        config: the run; its fp8 and parallel sections are read.
        model: its sizes, which `validate_layout` has accepted.

    Raises:
        ConfigError: naming key, value and what would work.
    """
    if config.fp8.fp8_format is None:
        return
    _check_layers_in_bf16(config, model)
    if config.fp8.uses_kernels:
        _check_widths(config, model)


def _check_layers_in_bf16(config: RunConfig, model: ResolvedModel) -> None:
    start, end = config.fp8.layers_in_bf16
    stages = config.parallel.pipeline_model_parallel_size
    per_stage = model.num_layers // stages
    for name, count in (("num_layers_at_start_in_bf16", start), ("num_layers_at_end_in_bf16", end)):
        if count > per_stage:
            raise ConfigError(
                f"{name}={count} exceeds the {per_stage} layers of a pipeline stage (num_layers={model.num_layers} / "
                f"pipeline_model_parallel_size={stages}): use {per_stage} or less"
            )
    if start + end >= model.num_layers:
        raise ConfigError(
            f"num_layers_at_start_in_bf16={start} + num_layers_at_end_in_bf16={end} leave none of num_layers="
            f"{model.num_layers} in FP8: lower them, or drop fp8_format"
        )


def _check_widths(config: RunConfig, model: ResolvedModel) -> None:
    """Check both sides of a process's matrices: Transformer Engine's `assert_dim_for_fp8_exec`, and mxfp8's blocks."""
    multiple, processes = 32 if config.fp8.fp8_recipe == "mxfp8" else 16, config.parallel.tensor_model_parallel_size
    hidden, ffn, heads = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads
    groups, channels = model.num_query_groups or heads, model.kv_channels or hidden // heads
    queries = f"num_attention_heads={heads} x kv_channels={channels}"
    with_keys = f"(num_attention_heads={heads} + 2 x num_query_groups={groups}) x kv_channels={channels}"
    for name, width, parts in (
        (f"hidden_size={hidden}", hidden, 1),
        (queries, heads * channels, processes),
        (with_keys, (heads + 2 * groups) * channels, processes),
        (f"ffn_hidden_size={ffn}", ffn, processes),
    ):
        if width % (multiple * parts):
            share = f" / tensor_model_parallel_size={parts} = {width / parts:g}" if parts > 1 else ""
            cure = "lower tensor_model_parallel_size or drop fp8_format" if width % multiple == 0 else "drop fp8_format"
            raise ConfigError(
                f"{name}{share} is not a multiple of {multiple}, as fp8_recipe={config.fp8.fp8_recipe} needs: {cure}"
            )


def validate_fp8_device(
    fp8: Fp8Config, capability: tuple[int, int] | None, cuda: tuple[int, int] | None = None
) -> None:
    """Check that the device can compute the recipe.

    Args:
        fp8: the fp8 section of the run.
        capability: compute capability of the device, (9, 0) for H100; None: it is not known and not checked.
        cuda: version of CUDA that torch was built for; None: it is not known and not checked.

    Raises:
        ConfigError: naming the recipe, what it needs, what the device has and which recipes would work.
    """
    if not fp8.uses_kernels:
        return
    recipe = fp8.fp8_recipe
    if capability is not None:
        least = _CAPABILITY.get(recipe, _ANY_RECIPE)
        if capability < least:
            cure = "use --fp8-recipe tensorwise" if capability >= _ANY_RECIPE else "drop fp8_format"
            raise ConfigError(
                f"fp8_recipe={recipe} needs compute capability {_version(least)} or higher, the device has "
                f"{_version(capability)}: {cure}"
            )
        if recipe == "mxfp8" and capability >= _WITHOUT_MXFP8:
            raise ConfigError(
                f"fp8_recipe=mxfp8 is not there for compute capability {_version(capability)} yet: use --fp8-recipe "
                "tensorwise"
            )
    if recipe == "blockwise" and cuda is not None and cuda < _BLOCKWISE_CUDA:
        raise ConfigError(
            f"fp8_recipe=blockwise needs CUDA {_version(_BLOCKWISE_CUDA)} or newer, torch was built for "
            f"{_version(cuda)}: use --fp8-recipe tensorwise"
        )


def _version(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
