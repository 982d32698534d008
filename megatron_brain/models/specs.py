"""Layer specs: modules of megatron-core (`local`) or of Transformer Engine, with those that we bring ourselves."""

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.model import ModelConfig
from megatron_brain.errors import ConfigError
from megatron_brain.models.activation import activation_module
from megatron_brain.models.attention import CoreAttention
from megatron_brain.models.fp8.emulation import emulate_fp8
from megatron_brain.models.norm import NORMS, RMSNorm
from megatron_brain.models.parallel_residual import ParallelResidualLayer
from megatron_brain.models.te_attention import TransformerEngineAttention
from megatron_brain.runtime import transformer_engine
from megatron_brain.runtime.megatron_versions import mlp_submodules

_LEAST_CAPABILITY = (8, 0)
"""The lowest compute capability that Transformer Engine has kernels for (Ampere)."""


def requested_impl(model: ModelConfig, fp8: Fp8Config | None) -> str:
    """--transformer-impl, or `local` where FP8 is emulated, because only those layers can emulate it."""
    return "local" if fp8 is not None and fp8.fp8_emulate else model.transformer_impl


def choose_transformer_impl(requested: str, device: torch.device) -> tuple[str, str]:
    """Resolve `auto`. It returns the implementation and the reason for the choice.

    Raises:
        ConfigError: Transformer Engine was asked for and cannot run here.
    """
    if requested == "local":
        return "local", "asked for"
    missing = transformer_engine.problem() or _problem_of_device(device)
    if missing is None:
        return "transformer_engine", f"version {transformer_engine.version()}"
    if requested == "transformer_engine":
        raise ConfigError(f"transformer_impl=transformer_engine: {missing}; {transformer_engine.CURE}")
    return "local", missing


def _problem_of_device(device: torch.device) -> str | None:
    found = transformer_engine.capability(device)
    if found is None:
        return "there is no CUDA device"
    if found < _LEAST_CAPABILITY:
        return f"the device has compute capability {found[0]}.{found[1]}, Transformer Engine needs 8.0"
    return None


def layer_spec(transformer_impl: str, model: ModelConfig, *, emulated_format: str | None = None) -> ModuleSpec:
    """Spec of one decoder layer. The transformer_engine spec has not been run on a GPU.

    Args:
        emulated_format: FP8 format that the linear maps of a `local` layer emulate, or None.
    """
    if transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_layernorm)
        spec.submodules.self_attention.submodules.core_attention = TransformerEngineAttention
    else:
        spec = _local_spec(model)
    if model.use_parallel_residual:
        spec.module = ParallelResidualLayer
    mlp_submodules(spec).activation_func = activation_module(model)
    if emulated_format is not None:
        emulate_fp8(spec, emulated_format)
    return spec


def _local_spec(model: ModelConfig) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(normalization=model.normalization, qk_layernorm=model.qk_layernorm)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = NORMS[model.normalization]
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = CoreAttention
    if model.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
