"""Builds this rank's share of a policy or reward model."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.model import ModelConfig, ResolvedModel
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.config.stage_spec import Head
from megatron_brain.models.activation import ACTIVATIONS, activation_module
from megatron_brain.models.architecture import padded_vocab_size
from megatron_brain.models.fp8 import weights as fp8_weights
from megatron_brain.models.fp8.emulation import emulated_format
from megatron_brain.models.fp8.spec import check_fp8, fp8_settings
from megatron_brain.models.fused_kernels import gradient_accumulation_fusion
from megatron_brain.models.gpt import PolicyModel, RewardModel
from megatron_brain.models.initialize import initialize_weights, mark_tensor_parallel
from megatron_brain.models.norm import NORMS
from megatron_brain.models.specs import choose_transformer_impl, layer_spec, requested_impl
from megatron_brain.runtime.parallel import Parallel, virtual_pipeline_size

Chunk = PolicyModel | RewardModel


def transformer_config(
    model: ModelConfig, parallel_config: ParallelConfig, fp8: Fp8Config | None = None
) -> TransformerConfig:
    """megatron-core's configuration of the trunk. The sizes of `model` must be resolved."""
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    chunks = virtual_pipeline_size(parallel_config, model.num_layers)
    # With the batched default, two pipeline stages mix up activations of interleaved chunks; see docs/design.md.
    interleaved = {} if chunks is None else {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    full = model.recompute_granularity == "full"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_layernorm,
        gated_linear_unit=model.gated_linear_unit,
        activation_func=ACTIVATIONS[model.hidden_act],
        # This only means that the layer spec names a module for the activation; that may be ours.
        use_te_activation_func=activation_module(model) is not None,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_method_std,
        perform_initialization=False,
        # Weights in FP8 are made on the device, whose kernels round them.
        use_cpu_initialization=not (fp8 is not None and fp8.fp8_param_gather),
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        bf16=model.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel_config.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel_config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks,
        sequence_parallel=parallel_config.sequence_parallel,
        recompute_granularity=model.recompute_granularity,
        recompute_method=(model.recompute_method or "uniform") if full else None,
        recompute_num_layers=(model.recompute_num_layers or 1) if full else None,
        calculate_per_token_loss=True,
        **interleaved,
        **fp8_settings(fp8),
    )


@dataclass(frozen=True, kw_only=True)
class Layers:
    """How a device computes the layers, and the reasons."""

    impl: str
    """`local` or `transformer_engine`."""
    reason: str
    gradient_accumulation_fusion: bool
    """Whether the product that computes a weight gradient adds it to the float32 buffer."""
    fusion_reason: str


def choose_layers(
    model: ModelConfig, parallel_config: ParallelConfig, fp8: Fp8Config | None, device: torch.device
) -> Layers:
    """How a device computes the layers. It needs no process groups.

    Raises:
        ConfigError: the implementation or the FP8 recipe that was asked for cannot run on the device.
    """
    impl, reason = choose_transformer_impl(requested_impl(model, fp8), device)
    if fp8 is not None and fp8.uses_kernels:
        check_fp8(fp8, transformer_config(model, parallel_config, fp8), impl, reason, device)
    fused, fusion_reason = gradient_accumulation_fusion(device)
    return Layers(impl=impl, reason=reason, gradient_accumulation_fusion=fused, fusion_reason=fusion_reason)


def build_model(
    model: ResolvedModel,
    parallel_config: ParallelConfig,
    parallel: Parallel,
    *,
    head: Head,
    seed: int | None,
    fp8: Fp8Config | None = None,
    layers: Layers | None = None,
) -> list[Chunk]:
    """This rank's model chunks: one chunk, unless the pipeline is interleaved.

    Args:
        model: architecture with every size resolved.
        head: vocabulary projection (`policy`) or scalar head (`reward`).
        seed: seeds random weights, which depend on it alone and not on the layout. With None the weights are zeros,
            which is for weights that will be loaded.
        fp8: FP8 of the layers' linear maps, or None.
        layers: what the run chose when it started. With None it is chosen here, for a model outside of a run.

    Raises:
        ConfigError: the implementation or the FP8 recipe that was asked for cannot run here.
    """
    config = transformer_config(model, parallel_config, fp8)
    layers = layers or choose_layers(model, parallel_config, fp8, parallel.device)
    config.gradient_accumulation_fusion = layers.gradient_accumulation_fusion
    packed_multiple = (fp8 or Fp8Config()).packed_multiple(parallel_config)
    vp_size = config.virtual_pipeline_model_parallel_size
    chunks = [
        (PolicyModel if head == "policy" else RewardModel)(
            model=model,
            packed_multiple=packed_multiple,
            device=parallel.device,
            **_trunk(model, config, parallel, head=head, impl=layers.impl, fp8=fp8, vp_stage=vp_stage),
        )
        for vp_stage in (range(vp_size) if vp_size else [None])
    ]
    for chunk in chunks:
        mark_tensor_parallel(chunk)
        with fp8_weights.written([chunk]):
            if seed is None:
                _zero_weights(chunk)
            else:
                initialize_weights(chunk, model, seed=seed)
        # Weights on the meta device, which are given memory later, stay there.
        if not any(parameter.is_meta for parameter in chunk.parameters()):
            chunk.to(parallel.device)
    return chunks


def _trunk(
    model: ResolvedModel,
    config: TransformerConfig,
    parallel: Parallel,
    *,
    head: Head,
    impl: str,
    fp8: Fp8Config | None,
    vp_stage: int | None,
) -> dict[str, Any]:
    """The arguments of megatron-core's GPTModel for one chunk."""
    last_chunk = (config.virtual_pipeline_model_parallel_size or 1) - 1
    if impl == "local":
        # We make the block spec ourselves, because the default one ends in a norm that refuses sequence parallelism.
        place = {"vp_stage": vp_stage, "pp_rank": parallel.pp_rank}
        first, count = get_transformer_layer_offset(config, **place), get_num_layers_to_build(config, **place)
        formats = [emulated_format(fp8, layer, model.num_layers) for layer in range(first, first + count)]
        layers = [layer_spec(impl, model, emulated_format=each) for each in formats]
        spec = TransformerBlockSubmodules(layer_specs=layers, layer_norm=NORMS[model.normalization])
    else:
        spec = layer_spec(impl, model)
    return dict(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(model, config.tensor_model_parallel_size),
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel.is_first_pipeline_stage and vp_stage in (None, 0),
        post_process=parallel.is_last_pipeline_stage and vp_stage in (None, last_chunk),
        share_embeddings_and_output_weights=head == "policy" and not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_base=model.rotary_base,
        rotary_percent=model.rotary_percent,
        pg_collection=parallel.groups,
        vp_stage=vp_stage,
    )


@torch.no_grad()
def _zero_weights(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()
